"""The registry: versions, aliases per device, promotion that is atomic, roll-back; on SQLite and on real servers."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import subprocess
import sys
import textwrap
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from secateur.pipeline.errors import TrackingError, UserError, VersionError
from secateur.pipeline.tracking import ChampionMovedError, Registry, alias_of
from secateur.pipeline.tracking.history import Event
from secateur.pipeline.tracking.manifest import MANIFEST, check_name
from secateur.pipeline.tracking.pull import pull
from secateur.pipeline.tracking.registry import DeletedChampion, signature_of
from secateur.pipeline.tracking.reprofiles import record_reprofile
from tests.pipeline.helpers import digits
from tests.pipeline.registered import EXAMPLE, add, crown, decided, embedded, linear_model, make_template, migrated_home
from tests.servers import database_url, free_port, mlflow_server, postgres, running

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own
PASSWORD = "only-for-tests-1234"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_template(tmp_path_factory.mktemp("mlflow") / "mlflow.db")


@pytest.fixture
def registry(tmp_path: Path, template: Path) -> Registry:
    return embedded(migrated_home(tmp_path / "home", template))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return linear_model(tmp_path_factory.mktemp("onnx") / "model.onnx")


# -- versions ----------------------------------------------------------------------------------------------------------


def test_a_version_carries_everything_with_its_digest_and_is_made_once(
    registry: Registry, model: Path, tmp_path: Path
) -> None:
    version = add(registry, tmp_path, model, "run-1")
    again = add(registry, tmp_path, model, "run-1")
    assert version.version == again.version == "1"
    assert version.tags["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    manifest = registry.fetch(version, tmp_path / "out")
    assert {"model.onnx", "MLmodel", "input_example.json", "secateur/run.yaml", "secateur/parity.json"} <= set(
        manifest.files
    )
    for path, entry in manifest.files.items():
        assert hashlib.sha256((tmp_path / "out" / path).read_bytes()).hexdigest() == entry["sha256"]
    written = (tmp_path / "out" / MANIFEST).read_bytes()
    assert hashlib.sha256(written).hexdigest() == version.tags["secateur.provenance"]
    facts = json.loads(written)
    assert len(facts["code"]) == 64
    assert facts["packages"]["onnxruntime"]
    assert facts["data"] == digits(image_size=8).fingerprint


def test_a_version_says_what_its_file_takes_and_its_logged_model_leads_to_it(
    registry: Registry, model: Path, tmp_path: Path
) -> None:
    import mlflow

    add(registry, tmp_path, model, "run-1")
    client = mlflow.MlflowClient(registry.uri, registry.uri)
    version = client.get_model_version("net", "1")
    assert version.description == "# net"
    logged = client.get_logged_model(version.source.removeprefix("models:/"))
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": "net", "version": "1"}]
    assert logged.params == {"device": "quick", "precision": "fp32"}
    mlflow.set_tracking_uri(registry.uri)
    signature = mlflow.models.get_model_info("models:/net/1").signature
    assert [spec.shape for spec in (*signature.inputs, *signature.outputs)] == [(1, 1, 8, 8), (1, 10)]
    open_batch = onnx.load(model)
    open_batch.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    assert signature_of(open_batch).inputs.inputs[0].shape == (-1, 1, 8, 8)


def photographs_model(file: Path, side: int) -> Path:
    """The mean of each channel of a photograph."""
    info, shape = onnx.helper.make_tensor_value_info, (1, 3, side, side)
    node = onnx.helper.make_node("GlobalAveragePool", ["x"], ["y"])
    ports = [info("x", 1, shape)], [info("y", 1, (1, 3, 1, 1))]
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([node], "g", *ports), opset_imports=opset, ir_version=9), file
    )
    return file


def test_an_input_example_of_a_photograph_can_be_read_and_used_by_mlflow_itself(
    registry: Registry, tmp_path: Path
) -> None:
    import mlflow

    model = photographs_model(tmp_path / "mean.onnx", 128)
    photograph = np.random.default_rng(0).standard_normal((1, 3, 128, 128)).astype(np.float32)
    version = registry.add("net", "quick", model, run_key="r", example=photograph, outputs=photograph.mean((2, 3)))
    mlflow.set_tracking_uri(registry.uri)
    loaded = mlflow.pyfunc.load_model(version.uri)
    for example in (loaded.input_example, loaded.metadata.load_input_example(version.uri)):
        assert example.dtype == np.float32 and example.shape == photograph.shape
        assert np.abs(example - photograph).max() <= 0.00051
    means = loaded.predict(loaded.input_example)["y"].reshape(3)
    assert np.abs(means - photograph.mean((0, 2, 3))).max() < 0.001
    assert registry.files(version).files["input_example.json"]["bytes"] < 8 * photograph.size
    registry.fetch(version, tmp_path / "fetched")
    assert np.array_equal(np.load(tmp_path / "fetched/secateur/example.npz")["input"], photograph), "to the last digit"


def test_an_input_example_too_large_for_json_is_kept_as_an_array_only(
    registry: Registry, model: Path, tmp_path: Path
) -> None:
    photograph = np.zeros((1, 3, 640, 640), np.float32)
    version = registry.add("net", "quick", model, run_key="r", example=photograph, outputs=np.zeros((1, 10)))
    files = registry.files(version).files
    assert "input_example.json" not in files
    assert sum(entry["bytes"] for entry in files.values()) < 100_000
    registry.fetch(version, tmp_path)
    assert np.load(tmp_path / "secateur/example.npz")["input"].shape == photograph.shape


@pytest.mark.parametrize("path", ["model.onnx", "secateur/gate.json", MANIFEST])
def test_a_file_that_was_changed_in_the_store_is_refused(
    registry: Registry, model: Path, tmp_path: Path, path: str
) -> None:
    version = add(registry, tmp_path, model, "run-1")
    (stored,) = [f for f in (registry.home / "artifacts").rglob(Path(path).name) if f.as_posix().endswith(path)]
    content = bytearray(stored.read_bytes())
    content[len(content) // 2] ^= 1
    stored.write_bytes(content)
    with pytest.raises(TrackingError, match=r"(?s)changed: sha256"):
        registry.fetch(version, tmp_path / "out")
    assert not (tmp_path / "out" / path).exists()


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "a//x", "", ".hidden", "a\\x", "a\nb", "a/."])
def test_a_file_name_that_could_leave_its_folder_is_refused(path: str) -> None:
    with pytest.raises(VersionError, match="cannot be called"):
        check_name(path)


def test_errors_name_what_there_is(registry: Registry, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no registered model 'net'"):
        registry.version("net")
    add(registry, tmp_path, model, "run-1")
    with pytest.raises(UserError, match=r"no alias champion; it has: challenger \(version 1\)"):
        registry.version("net")
    with pytest.raises(UserError, match="no version 7; it has: 1"):
        registry.version("net", "7")
    with pytest.raises(UserError, match=r"no registered model 'other'.*it has: net"):
        registry.version("other")


def test_a_server_that_is_away_is_said_without_its_password(tmp_path: Path) -> None:
    uri = f"http://somebody:{PASSWORD}@127.0.0.1:{free_port()}"
    with pytest.raises(TrackingError) as caught:
        Registry(uri, tmp_path).names()
    assert PASSWORD not in str(caught.value)
    assert caught.value.unreachable


# -- aliases -----------------------------------------------------------------------------------------------------------


def test_every_device_has_its_own_champion_and_plain_aliases_follow_the_first(
    registry: Registry, model: Path, tmp_path: Path
) -> None:
    one = add(registry, tmp_path, model, "run-1", "quick")
    two = add(registry, tmp_path, model, "run-2", "raspberry pi/5")
    crown(registry, one, "quick")
    crown(registry, two, "raspberry pi/5")
    assert registry.champions() == [
        ("net", "quick", registry.version("net", "1")),
        ("net", "raspberry pi/5", registry.version("net", "2")),
    ]
    assert registry.version("net").version == "1"
    assert registry.version("net", "champion", "raspberry pi/5").version == "2"
    assert alias_of("champion", "raspberry pi/5") != alias_of("champion", "raspberry-pi-5")
    assert registry.champion("net", "a device without one") is None


def test_only_a_decision_that_passed_and_is_about_this_makes_a_champion(
    registry: Registry, model: Path, tmp_path: Path
) -> None:
    one, two = (add(registry, tmp_path, model, f"run-{i}") for i in (1, 2))
    for wrong in (decided(one, None, ok=False), decided(two, None), decided(one, None, "other")):
        with pytest.raises(UserError):
            registry.promote("net", one.version, "quick", wrong)
    assert registry.champion("net", "quick") is None
    registry.promote("net", one.version, "quick", decided(one, None))
    with pytest.raises(ChampionMovedError, match="compare again"):
        registry.promote("net", two.version, "quick", decided(two, None))
    assert registry.version("net").version == one.version


def test_rolling_back_goes_further_back_each_time_and_history_keeps_everything(
    registry: Registry, model: Path, tmp_path: Path
) -> None:
    versions = [add(registry, tmp_path, model, f"run-{i}") for i in range(4)]
    for version in versions[:3]:
        crown(registry, version)
    assert registry.rollback("net").version == "2"
    crown(registry, versions[3])  # a new branch: 3 is not gone back to any more
    assert [registry.rollback("net").version for _ in range(2)] == ["2", "1"]
    with pytest.raises(UserError, match="first champion"):
        registry.rollback("net")
    assert registry.version("net").version == registry.version("net", "champion", "quick").version == "1"
    events = [(e.kind, e.version, e.previous, e.done) for e in registry.history("net")]
    assert events == [
        ("promote", "1", None, True),
        ("promote", "2", "1", True),
        ("promote", "3", "2", True),
        ("rollback", "2", "3", True),
        ("promote", "4", "2", True),
        ("rollback", "2", "4", True),
        ("rollback", "1", "2", True),
    ]


def test_a_deleted_version_is_passed_over_by_a_rollback(registry: Registry, model: Path, tmp_path: Path) -> None:
    versions = [add(registry, tmp_path, model, f"run-{i}") for i in range(3)]
    for version in versions:
        crown(registry, version)
    MlflowClient(registry.uri, registry.uri).delete_model_version("net", "2")
    assert registry.rollback("net").version == "1"


@pytest.mark.parametrize("back_s", [3600, 10**9])
def test_a_clock_that_is_set_back_loses_no_champion(
    registry: Registry, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back_s: float
) -> None:
    versions = [add(registry, tmp_path, model, f"run-{i}") for i in range(4)]
    now = time.time()
    for i, version in enumerate(versions):  # each later by the history, earlier by the clock
        monkeypatch.setattr("time.time", lambda i=i: now - i * back_s)
        crown(registry, version)
    assert [event.version for event in registry.history("net")] == ["1", "2", "3", "4"]
    assert [registry.rollback("net").version for _ in range(3)] == ["3", "2", "1"]


def test_entries_of_an_earlier_version_come_before_new_ones(registry: Registry, model: Path, tmp_path: Path) -> None:
    versions = [add(registry, tmp_path, model, f"run-{i}") for i in range(3)]
    client = MlflowClient(registry.uri, registry.uri)
    ahead_us = int((time.time() + 10**6) * 1e6)  # of a machine whose clock was ahead
    for i, version in enumerate(versions[:2]):
        event = Event("promote", "quick", version.version, str(i) if i else None, ahead_us / 1e6 + i)
        client.set_registered_model_tag("net", f"secateur.event.{ahead_us + i:017d}-abcd", json.dumps(asdict(event)))
        client.set_registered_model_alias("net", "champion-quick", version.version)
    crown(registry, versions[2])
    assert [event.version for event in registry.history("net")] == ["1", "2", "3"]
    assert [registry.rollback("net").version for _ in range(2)] == ["2", "1"]


def test_a_deleted_champion_is_told_from_one_that_was_never_there_or_removed(
    registry: Registry, model: Path, tmp_path: Path
) -> None:
    versions = [add(registry, tmp_path, model, f"run-{i}") for i in range(2)]
    client = MlflowClient(registry.uri, registry.uri)
    assert registry.deleted_champion("net", "quick") is None
    for version in versions:
        crown(registry, version)
    assert registry.deleted_champion("net", "quick") is None
    client.delete_model_version("net", "2")
    assert registry.champion("net", "quick") is None
    assert registry.deleted_champion("net", "quick") == DeletedChampion("2", "1")
    assert registry.rollback("net").version == "1"
    assert registry.deleted_champion("net", "quick") is None
    client.delete_registered_model_alias("net", "champion-quick")  # by hand: it is to have none
    assert registry.deleted_champion("net", "quick") is None
    client.delete_model_version("net", "1")
    assert registry.deleted_champion("net", "quick") == DeletedChampion("1", None)


QUOTED = ["it's", 'say "hi"', "both ' and \"", "x' OR name = 'net", "back\\slash", "%_", "'"]


@pytest.mark.parametrize("name", QUOTED)
def test_names_with_quotes_are_found_and_nothing_else_is(registry: Registry, name: str) -> None:
    client = MlflowClient(registry.uri, registry.uri)
    for other in (name, name.replace("'", "-"), "net"):
        with contextlib.suppress(MlflowException):
            client.create_registered_model(other)
            client.create_model_version(other, "file:///nowhere")
    assert [(v.name, v.version) for v in registry.versions(name)] == [(name, "1")]
    assert registry.version(name, "1").name == name
    with pytest.raises(UserError, match="it has: 1"):
        registry.version(name, "2")


@pytest.mark.parametrize("device", QUOTED)
def test_devices_with_quotes_keep_decisions_and_readings_once(
    registry: Registry, model: Path, tmp_path: Path, device: str
) -> None:
    version = add(registry, tmp_path, model, "run-1", device)
    for like in (device, device.replace("'", "-")):
        runs = {registry.log_decision(decided(version, None, like), f"key {like}") for _ in range(2)}
        assert len(runs) == 1
        reprofiles = [
            record_reprofile(registry.uri, registry.home, ("net", "1", like), str(i), {"p50_ms": 1.0}, "{}")
            for i in range(2)
        ]
        assert len(set(reprofiles)) == 1
    crown(registry, version, device)
    assert registry.version("net", "champion", device).version == "1"


def test_an_alias_moved_by_hand_is_where_a_rollback_starts_from(
    registry: Registry, model: Path, tmp_path: Path
) -> None:
    versions = [add(registry, tmp_path, model, f"run-{i}") for i in range(3)]
    crown(registry, versions[0])
    MlflowClient(registry.uri, registry.uri).set_registered_model_alias("net", "champion-quick", "2")
    crown(registry, versions[2])
    assert registry.rollback("net").version == "2"


def test_a_late_resume_of_an_old_run_takes_no_newer_challengers_place(
    registry: Registry, model: Path, tmp_path: Path
) -> None:
    add(registry, tmp_path, model, "run-1")
    two = add(registry, tmp_path, model, "run-2")
    add(registry, tmp_path, model, "run-1")
    assert registry.version("net", "challenger").version == two.version
    crown(registry, two)
    add(registry, tmp_path, model, "run-2")  # the champion challenges nobody
    with pytest.raises(UserError, match="no alias challenger"):
        registry.version("net", "challenger")


def test_a_decision_is_kept_once_per_key_with_every_gate(registry: Registry, model: Path, tmp_path: Path) -> None:
    version = add(registry, tmp_path, model, "run-1")
    runs = {registry.log_decision(decided(version, None), "key", [model]) for _ in range(2)}
    assert len(runs) == 1
    client = MlflowClient(registry.uri, registry.uri)
    experiment = client.get_experiment_by_name("secateur-promotions")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics["p50 ratio.high"] == 0.92
    assert run.data.tags["outcome"] == "passed"
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"decision.json", "model.onnx"}
    note = json.loads(registry.version("net", "1").tags["secateur.decision.quick"])
    assert note["run_id"] == run.info.run_id


# -- deaths and races --------------------------------------------------------------------------------------------------

DEATHS = """
    import json, os, signal, sys, time
    from pathlib import Path
    sys.path.insert(0, {root!r})
    import mlflow.store.model_registry.sqlalchemy_store, mlflow.store.tracking.sqlalchemy_store
    from mlflow import MlflowClient
    from secateur.pipeline.errors import UserError
    from secateur.pipeline.tracking import ChampionMovedError, Decision, Gate, Registry

    home = Path(sys.argv[1])
    WRITES = ("set_registered_model_tag", "set_registered_model_alias", "delete_registered_model_alias")

    def registry():
        return Registry(f"sqlite:///{{home}}/mlflow.db", home)

    def act(version, champion):
        gates = (Gate("made up", 1.0, 1.0, True),)
        if version == "rollback":
            registry().rollback("net")
        else:
            registry().promote("net", version, "quick", Decision("net", version, "quick", champion, gates))

    def in_child(work):
        # forked before anything is connected: no child shares a connection with another
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            try:
                os.write(writer, json.dumps(work()).encode())
            finally:
                os._exit(0)
        os.close(writer)
        return pid, reader

    def answer(child):
        pid, reader = child
        text = b""
        while part := os.read(reader, 65536):
            text += part
        os.close(reader)
        os.waitpid(pid, 0)
        return json.loads(text) if text else None

    def dying(moment, version, champion):
        count = 0
        def counted(name):
            plain = getattr(MlflowClient, name)
            def call(self, *args, **kwargs):
                nonlocal count
                count += 1
                if count == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return plain(self, *args, **kwargs)
            setattr(MlflowClient, name, call)
        for name in WRITES:
            counted(name)
        act(version, champion)
        return count

    def state():
        r = registry()
        aliases = {{k: str(v) for k, v in r._model("net").aliases.items()}}
        return aliases, [(e.kind, e.version, e.done) for e in r.history("net")]
"""


def drive(home: Path, script: str) -> Any:
    """Run a script after ``DEATHS``; returns the JSON it prints."""
    root = str(Path(__file__).parents[3])
    code = textwrap.dedent(DEATHS.format(root=root)) + textwrap.dedent(script)
    found = subprocess.run([sys.executable, "-c", code, str(home)], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["promote", "rollback"])
def test_a_kill_at_any_step_leaves_the_old_or_the_new_champion_and_the_next_call_repairs(
    registry: Registry, model: Path, tmp_path: Path, kind: str
) -> None:
    versions = [add(registry, tmp_path, model, f"run-{i}") for i in range(3)]
    for version in versions[:2]:
        crown(registry, version)
    new = "3" if kind == "promote" else "rollback"
    seen = drive(
        registry.home,
        f"""
        found = []
        for moment in range(1, 12):
            finished = answer(in_child(lambda: dying(moment, {new!r}, "2")))
            found.append([answer(in_child(state)), finished])
            if finished is not None:
                break
            current = found[-1][0][0]["champion-quick"]
            if current != "2":  # back to where it began, for the next death
                def restore():
                    client = MlflowClient(registry().uri, registry().uri)
                    client.set_registered_model_alias("net", "champion-quick", "2")
                    if {kind!r} == "promote":
                        client.set_registered_model_alias("net", "challenger-quick", "3")
                answer(in_child(restore))
        print(json.dumps(found))
        """,
    )
    after = {"promote": "3", "rollback": "1"}[kind]
    champions = [aliases["champion-quick"] for (aliases, _), _ in seen]
    assert set(champions) == {"2", after}, "a champion is always there: the old or the new one"
    assert all(aliases["champion"] in ("2", after) for (aliases, _), _ in seen)
    assert len(seen) >= 4, "every step was died at"
    (aliases, events), finished = seen[-1]
    assert finished is not None
    assert aliases["champion"] == aliases["champion-quick"] == after
    assert events[-1] == [kind, after, True]
    assert [e[2] for e in events].count(True) >= 3


@pytest.mark.slow
def test_of_two_promotions_at_once_one_wins_and_the_other_is_told_to_compare_again(
    registry: Registry, model: Path, tmp_path: Path
) -> None:
    for i in range(5):
        add(registry, tmp_path, model, f"run-{i}")
    outcomes = drive(
        registry.home,
        """
        champion, outcomes = None, []
        for pair in (("1", "2"), ("3", "4")):
            at = time.time() + 1.0
            def race(version, champion=champion, at=at):
                registry().names()  # connected
                time.sleep(max(0.0, at - time.time()))
                try:
                    act(version, champion)
                    return "promoted"
                except ChampionMovedError:
                    return "moved"
            children = [in_child(lambda v=version: race(v)) for version in pair]
            told = [answer(child) for child in children]
            aliases, events = answer(in_child(state))
            champion = aliases["champion-quick"]
            outcomes.append([sorted(told), champion == pair[told.index("promoted")], all(e[2] for e in events)])
        print(json.dumps(outcomes))
        """,
    )
    assert outcomes == [[["moved", "promoted"], True, True]] * 2


# -- real stores -------------------------------------------------------------------------------------------------------


STORES = [
    "embedded",
    pytest.param("server on SQLite", marks=pytest.mark.slow),
    pytest.param("server on PostgreSQL with authentication", marks=pytest.mark.long),
]


@pytest.fixture(scope="module", params=STORES)
def store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, template: Path
) -> Iterator[tuple[str, tuple[str, str] | None]]:
    """(address, credentials) of a store."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "embedded":
            yield f"sqlite:///{migrated_home(folder / 'home', template)}/mlflow.db", None
        elif request.param == "server on SQLite":
            migrated_home(folder / "server", template)
            with running(mlflow_server(folder / "server")) as server:
                yield server.url, None
        else:
            with running(postgres(folder / "postgres", ("mlflow",))) as database:
                address = database_url(database, "mlflow", "postgresql+psycopg2")
                with running(mlflow_server(folder / "server", address, ("admin", PASSWORD))) as server:
                    patch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
                    patch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
                    yield server.url, ("admin", PASSWORD)


def test_every_store_gives_the_same_bytes_by_every_way_of_pulling(
    store: tuple[str, tuple[str, str] | None], model: Path, tmp_path: Path
) -> None:
    import mlflow

    uri, credentials = store
    registry = Registry(uri, Path(uri.removeprefix("sqlite:///")).parent if uri.startswith("sqlite") else tmp_path)
    one, two = (add(registry, tmp_path, model, f"run-{i}") for i in (1, 2))
    crown(registry, one)
    registry.log_decision(decided(two, one), "key")
    crown(registry, two)
    assert registry.rollback("net").version == "1"
    assert [v.version for v in registry.versions("net")] == ["2", "1"]
    assert registry.champions() == [("net", "quick", registry.version("net", "1"))]

    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    got = pull(registry, "net", tmp_path / "pulled", device="quick")
    assert got.version.version == "1"
    assert hashlib.sha256((tmp_path / "pulled/model.onnx").read_bytes()).hexdigest() == digest
    mlflow.set_tracking_uri(uri)
    file = mlflow.artifacts.download_artifacts("models:/net@champion/model.onnx", dst_path=str(tmp_path))
    assert hashlib.sha256(Path(file).read_bytes()).hexdigest() == digest
    assert mlflow.onnx.load_model("models:/net@champion").SerializeToString() == model.read_bytes()
    answers = mlflow.pyfunc.load_model("models:/net@champion-quick").predict(EXAMPLE)
    assert answers["output"].shape == (1, 10)
    if uri.startswith("http"):
        query = urllib.parse.urlencode({"name": "net", "alias": "champion-quick"})
        about = json.loads(plain_http(f"{uri}/api/2.0/mlflow/registered-models/alias?{query}", credentials))
        version = about["model_version"]["version"]
        query = urllib.parse.urlencode({"name": "net", "version": version, "path": "model.onnx"})
        content = plain_http(f"{uri}/model-versions/get-artifact?{query}", credentials)
        tags = {tag["key"]: tag["value"] for tag in about["model_version"]["tags"]}
        assert hashlib.sha256(content).hexdigest() == tags["sha256"] == digest


@pytest.mark.long
def test_a_wrong_password_is_refused_and_is_no_reason_to_use_a_cache(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another-password-1")
    with running(mlflow_server(tmp_path / "server", auth=("admin", PASSWORD))) as server:
        with pytest.raises(TrackingError) as caught:
            Registry(server.url, tmp_path).names()
        assert not caught.value.unreachable
        assert "another-password-1" not in str(caught.value)


def plain_http(url: str, credentials: tuple[str, str] | None) -> bytes:
    request = urllib.request.Request(url)
    if credentials:
        request.add_header("Authorization", "Basic " + base64.b64encode(":".join(credentials).encode()).decode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        content: bytes = answer.read()
        return content
