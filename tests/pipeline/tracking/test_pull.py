"""Pulling: verified, from the cache when MLflow is unreachable, and nothing hostile gets through."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from onnx import TensorProto, helper
from PIL import Image

from secateur.pipeline import errors
from secateur.pipeline.cli import app as cli
from secateur.pipeline.cli import registry as registry_cli
from secateur.pipeline.errors import TrackingError, UserError, VersionError
from secateur.pipeline.tracking import Registry, Version
from secateur.pipeline.tracking.fetched import check_onnx
from secateur.pipeline.tracking.manifest import MANIFEST, MAX_BYTES, MODEL, Manifest
from secateur.pipeline.tracking.pull import Cache, _chosen, card, pull
from secateur.pipeline.tracking.registry import MANIFEST_TAG, MODEL_TAG
from tests.pipeline.helpers import digits
from tests.pipeline.registered import add, crown, embedded, linear_model, make_template, migrated_home
from tests.pipeline.tracking.test_check import PAGE, always, answering
from tests.servers import free_port

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SECATEUR_HOME with versions 1 (champion) and 2 (challenger) of ``net``."""
    folder = tmp_path_factory.mktemp("filled")
    registry = embedded(migrated_home(folder / "home", make_template(folder / "mlflow.db")))
    one = add(registry, folder, linear_model(folder / "one.onnx"), "run-1")
    crown(registry, one)
    add(registry, folder, linear_model(folder / "two.onnx", noise=0.1), "run-2")
    return folder / "home"


@pytest.fixture
def registry(filled: Path, tmp_path: Path) -> Registry:
    """The same registry, with a cache of its own."""
    return Registry(f"sqlite:///{filled}/mlflow.db", tmp_path / "home")


def unreachable(registry: Registry) -> Registry:
    """A registry of the same address and cache whose store cannot be read any more."""

    class Unreachable(Registry):
        def _model(self, name: str) -> Any:
            raise TrackingError("tracking server: it is unreachable", unreachable=True)

    return Unreachable(registry.uri, registry.home)


def test_a_pulled_folder_runs_without_secateur(registry: Registry, tmp_path: Path) -> None:
    pull(registry, "net", tmp_path / "model", device="quick")
    names = {file.name for file in (tmp_path / "model").iterdir()}
    assert {"model.onnx", "loader.py", "CARD.md", "provenance.json", "usage.json", "run.yaml", "parity.json"} <= names
    workload = digits(image_size=8)
    pixels = workload.test.source.read(workload.test.indices[:20])
    labels = workload.test.source.labels[workload.test.indices[:20]]
    np.save(tmp_path / "pixels.npy", pixels)
    Image.fromarray(np.repeat(pixels[0], 3, axis=2).repeat(5, 0).repeat(7, 1)).save(tmp_path / "wide.png")
    script = """
import json, sys
import numpy as np
sys.path.insert(0, "model")
from loader import Model
model, pixels = Model(), np.load("pixels.npy")
prepared = np.stack([model.prepare(image) for image in pixels])
found = [model.predict(x) for x in (pixels, list(pixels), prepared)]
print(json.dumps([x.argmax(1).tolist() for x in found] + [list(model.predict(pixels[0]).shape)]))
assert not [name for name in sys.modules if name.split(".")[0] in ("secateur", "mlflow", "torch")]
"""
    found = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    *answers, shape = json.loads(found.stdout)
    assert answers[0] == answers[1] == answers[2]
    assert np.mean(np.array(answers[0]) == labels) > 0.8
    assert shape == [1, 10]
    command = [sys.executable, "model/loader.py", "wide.png"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert said.stdout == f"wide.png: class {answers[0][0]}\n"


def test_the_loader_prepares_images_as_the_workload_does(registry: Registry, tmp_path: Path) -> None:
    import torch

    from secateur.pipeline.tracking.loader import Model

    pull(registry, "net", tmp_path / "model")
    workload = digits(image_size=8)
    rows = torch.arange(5)
    x, _ = workload.batch(workload.test, rows, train=False, generator=None, device=torch.device("cpu"))
    pixels = workload.test.source.read(workload.test.indices[:5])
    model = Model(tmp_path / "model")
    for image, expected in zip(pixels, x.numpy(), strict=True):
        assert np.allclose(model.prepare(image), expected, atol=1e-5)
    with pytest.raises(ValueError, match="expected uint8"):
        model.prepare(pixels[0].astype(np.int32))


@pytest.mark.parametrize(
    ("reference", "device", "version"),
    [
        ("net", None, "1"),
        ("net@champion", "quick", "1"),
        ("net@champion@quick", None, "1"),
        ("net@challenger", None, "2"),
        ("net@2", None, "2"),
    ],
)
def test_references(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str, device: str | None, version: str
) -> None:
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))
    registry_cli.pull(reference, tmp_path / "model", device, f"sqlite:///{filled}/mlflow.db")
    assert json.loads((tmp_path / "model/pulled.json").read_text())["version"] == f"models:/net/{version}"


@pytest.mark.parametrize("reference", ["", "@champion", "net@", "net@champion@"])
def test_a_reference_that_is_none_is_refused(reference: str) -> None:
    with pytest.raises(UserError, match="write NAME"):
        registry_cli.split(reference)


def test_an_earlier_pull_is_replaced_and_anything_else_is_left_alone(registry: Registry, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    pull(registry, "net", folder, which="1")
    pull(registry, "net", folder, which="2")
    assert json.loads((folder / "pulled.json").read_text())["version"] == "models:/net/2"
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        pull(registry, "net", folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_the_cache_answers_when_mlflow_is_away_and_says_so(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="unreachable"):
        pull(unreachable(registry), "net", tmp_path / "never")
    assert not (tmp_path / "never").exists()
    first = pull(registry, "net", tmp_path / "one")
    assert first.notice == ""
    second = pull(unreachable(registry), "net", tmp_path / "two")
    assert "Using what was pulled last: version 1" in second.notice
    third = pull(unreachable(registry), "net", tmp_path / "three", offline=True)
    assert "Offline" in third.notice
    for name in ("model.onnx", "provenance.json", "CARD.md", "loader.py"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
    with pytest.raises(TrackingError, match="never pulled"):
        pull(unreachable(registry), "net", tmp_path / "four", which="2", offline=True)


def test_a_damaged_cache_is_noticed_offline_and_mended_online(registry: Registry, tmp_path: Path) -> None:
    got = pull(registry, "net", tmp_path / "one")
    digest = got.manifest.files["model.onnx"]["sha256"]
    blob = registry.home / "models/sha256" / digest
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(TrackingError, match="in the cache was changed"):
        pull(registry, "net", tmp_path / "two", offline=True)
    assert not (tmp_path / "two").exists()
    pull(registry, "net", tmp_path / "two")
    assert hashlib.sha256((tmp_path / "two/model.onnx").read_bytes()).hexdigest() == digest
    (registry.home / "models/sha256" / got.manifest.sha256).write_bytes(b"{}")
    with pytest.raises(TrackingError, match=r"provenance of .* was changed"):
        pull(registry, "net", tmp_path / "three", offline=True)


def test_a_version_whose_model_is_not_the_one_registered_is_refused(registry: Registry, tmp_path: Path) -> None:
    client, version = MlflowClient(registry.uri, registry.uri), registry.version("net")
    try:
        client.set_model_version_tag("net", version.version, MODEL_TAG, "0" * 64)
        with pytest.raises(VersionError, match="that of another version"):
            pull(registry, "net", tmp_path / "model")
    finally:
        client.set_model_version_tag("net", version.version, MODEL_TAG, version.tags[MODEL_TAG])
    assert not (tmp_path / "model").exists()


def test_a_damaged_store_is_no_reason_to_use_the_cache(filled: Path, registry: Registry, tmp_path: Path) -> None:
    pull(registry, "net", tmp_path / "one")
    shutil.rmtree(registry.home / "models/sha256")
    stored = {f: f.read_bytes() for f in filled.joinpath("artifacts").rglob("model.onnx")}
    try:
        for file, content in stored.items():
            file.write_bytes(content[:-1] + b"x")
        with pytest.raises(TrackingError, match="changed: sha256"):
            pull(registry, "net", tmp_path / "two")
    finally:
        for file, content in stored.items():
            file.write_bytes(content)


def test_a_server_that_does_not_answer_ends_with_4_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))
    uri = f"http://me:hidden-word@127.0.0.1:{free_port()}"
    monkeypatch.setattr(sys, "argv", ["secateur", "pull", "net", "-o", str(tmp_path / "model"), "--uri", uri])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == errors.EXIT_SURROUNDINGS
    said = capsys.readouterr().err
    assert "hidden-word" not in said
    assert "127.0.0.1" in said


def test_the_registry_tells_programs_what_it_tells_people(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))

    def told(*words: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["secateur", *words, "--uri", f"sqlite:///{filled}/mlflow.db", "--json"])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == errors.EXIT_OK
        return json.loads(capsys.readouterr().out)

    pulled = told("pull", "net", "-o", str(tmp_path / "model"))
    digest = hashlib.sha256((tmp_path / "model" / "model.onnx").read_bytes()).hexdigest()
    assert (pulled["version"], pulled["sha256"]["model.onnx"]) == ("1", digest)
    history = told("history", "net")
    assert list(history["champions"].values()) == ["1"]
    assert [(event["kind"], event["version"]) for event in history["events"]] == [("promote", "1")]


NONSENSE = [
    PAGE,
    b"[]",
    b"{}",
    b"null",
    b'"x"',
    b"",
    b'{"registered_model": 5}',
    b'{"registered_model": {"name": ["net"]}}',
    b'{"registered_model": {"aliases": [{}]}}',
    b'{"registered_model":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
]


@pytest.mark.parametrize("body", NONSENSE, ids=lambda body: body[:40].decode())
def test_a_server_that_answers_nonsense_is_not_away_and_the_cache_does_not_answer_for_it(
    registry: Registry, tmp_path: Path, body: bytes
) -> None:
    with answering(always(200, body)) as server:
        reference = f"{server.url} net champion "
        Cache(registry.home / "models").keep(registry, registry.version("net"), reference)
        with pytest.raises(TrackingError, match="no MLflow server") as caught:
            pull(Registry(server.url, registry.home), "net", tmp_path / "model")
    assert not caught.value.unreachable
    assert not (tmp_path / "model").exists()


def test_a_server_that_answered_nonsense_and_is_away_now_is_answered_for_by_the_cache(
    registry: Registry, tmp_path: Path
) -> None:
    with answering(always(200, PAGE)) as server:
        Cache(registry.home / "models").keep(registry, registry.version("net"), f"{server.url} net champion ")
        with pytest.raises(TrackingError, match="no MLflow server"):
            pull(Registry(server.url, registry.home), "net", tmp_path / "model")
    kept = pull(Registry(server.url, registry.home), "net", tmp_path / "model")  # nobody is there any more
    assert "Using what was pulled last: version 1" in kept.notice


# -- hostile versions --------------------------------------------------------------------------------------------------


def manifest(**files: Any) -> bytes:
    entry = {"sha256": "0" * 64, "bytes": 1}
    data = {"format": 1, "kind": "secateur-version", "files": {"model.onnx": entry, **files}}
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (manifest(**{"../evil": {"sha256": "0" * 64, "bytes": 1}}), "cannot be called"),
        (manifest(**{"/evil": {"sha256": "0" * 64, "bytes": 1}}), "cannot be called"),
        (manifest(**{"MODEL.onnx": {"sha256": "0" * 64, "bytes": 1}}), "named twice"),
        (manifest(big={"sha256": "0" * 64, "bytes": MAX_BYTES}), "more than any version"),
        (manifest(**{f"f{i}": {"sha256": "0" * 64, "bytes": 1} for i in range(300)}), "more than any version"),
        (manifest(x={"sha256": "short", "bytes": 1}), r"files\.x\.sha256"),
        (manifest(x={"sha256": "0" * 64 + "\n", "bytes": 1}), r"files\.x\.sha256"),
        (manifest(x={"sha256": "0" * 64, "bytes": -1}), r"files\.x\.bytes"),
        (manifest(x={"sha256": "0" * 64, "bytes": "1"}), r"files\.x\.bytes"),
        (manifest(x={"sha256": "0" * 64, "bytes": float("inf")}), r"files\.x\.bytes"),
        (manifest(x={"sha256": ["0" * 64], "bytes": 1}), r"files\.x\.sha256"),
        (manifest(x=None), r"files\.x"),
        (manifest()[:-1] + b',"device":"pi"}', "device"),
        (manifest()[:-1] + b',"weights":[1]}', "weights"),
        (manifest()[:-1] + b',"x":' + b"[" * 500 + b"]" * 500 + b"}", "nested too deeply"),
        (manifest()[:-1] + b',"x":' + b'{"y":' * 50_000 + b"1" + b"}" * 50_001, "nested too deeply"),
        (manifest()[:-1] + b',"x":' + b"9" * 5000 + b"}", "cannot be used"),
        (b"\xff\xfe{}", "cannot be used"),
        (b"[]", "cannot be used"),
        (b"null", "cannot be used"),
        (b"{", "cannot be used"),
    ],
)
def test_a_hostile_list_of_files_is_refused(raw: bytes, said: str) -> None:
    with pytest.raises(VersionError, match=said):
        Manifest.read(raw, hashlib.sha256(raw).hexdigest(), "a version")


class Stored(Registry):
    """A registry of one version with these files, as a store gives them."""

    def __init__(self, folder: Path, files: dict[str, bytes]) -> None:
        super().__init__("sqlite:///none.db", folder / "home")
        self.stored = files

    def version(self, name: str, which: str = "champion", device: str | None = None) -> Version:
        digests = (hashlib.sha256(self.stored[path]).hexdigest() for path in (MANIFEST, MODEL))
        return Version(name, "1", dict(zip((MANIFEST_TAG, MODEL_TAG), digests, strict=True)))

    def _download(self, version: Version, path: str, folder: Path, sizes: range) -> Path:
        (folder / "file").write_bytes(self.stored[path])
        return folder / "file"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
DEEP = [[]]
for _ in range(500):
    DEEP = [DEEP]
HOSTILE = JSON | st.just(DEEP)
TOLD = {
    "provenance.json": {
        "format": 1,
        "kind": "secateur-version",
        "name": "net",
        "run": "run-1",
        "data": "d",
        "plan": "p",
        "weights": {"baseline.safetensors": "0" * 64},
        "device": {"name": "quick", "fingerprint": "f", "facts": {"cores": 2}},
    },
    "usage.json": {"image_size": 8, "mean": [0.5], "std": [0.5], "resize": "stretch", "classes": ["a", "b"]},
    "gate.json": {
        "passed": True,
        "metric": "top1",
        "checks": [{"name": "parity", "value": 1e-6, "relation": "<=", "bound": 1e-4, "ok": True}],
        "models": {"baseline": {"top1": 0.9}, "compact": {"top1": 0.9, "peak_rss_bytes": None}},
    },
}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in parts for place in places(part, (*path, key)))]


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The same value with another one at a place."""
    if not path:
        return new
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[path[0]] = put(value[path[0]], path[1:], new)
    return changed


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return linear_model(tmp_path_factory.mktemp("network") / "model.onnx").read_bytes()


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@pytest.mark.parametrize("hostile", [None, *TOLD])
def test_any_content_of_a_version_is_pulled_or_ends_in_one_refusal(
    tmp_path_factory: pytest.TempPathFactory, network: bytes, hostile: str | None, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    files = {MODEL: network}
    for name in ("usage.json", "gate.json"):
        told = TOLD[name]
        if name == hostile:
            told = put(told, data.draw(st.sampled_from(places(told))), data.draw(HOSTILE))
        files[f"secateur/{name}"] = json.dumps(told).encode()
    listed = {p: {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)} for p, raw in files.items()}
    told = {**TOLD["provenance.json"], "files": listed}
    if hostile == "provenance.json":
        told = put(told, data.draw(st.sampled_from(places(told))), data.draw(HOSTILE))
    registry = Stored(folder, {**files, MANIFEST: json.dumps(told).encode()})
    try:
        pulled = pull(registry, "net", folder / "model")
    except (VersionError, TrackingError) as error:
        assert hostile is not None, error
        assert isinstance(error, VersionError) or "was changed" in str(error), "the size or sha256 it names is another"
        assert str(error).isprintable()
        assert not (folder / "model").exists()
    else:
        assert (pulled.folder / "CARD.md").read_text().startswith("# net, version 1")
    assert [file.name for file in folder.iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize("path", [MODEL, MANIFEST])
def test_a_file_of_another_size_is_refused_before_it_is_sent(
    filled: Path, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    (file,) = (file.parent / path for file in filled.joinpath("artifacts").rglob("MLmodel") if _is_of(file, "run-1"))
    content = file.read_bytes()
    sent = []
    plain = LocalArtifactRepository.download_artifacts
    monkeypatch.setattr(
        LocalArtifactRepository, "download_artifacts", lambda *a, **k: (sent.append(a[1]), plain(*a, **k))[1]
    )
    try:
        with file.open("r+b") as opened:
            opened.truncate(MAX_BYTES)  # sparse: it takes no room
        with pytest.raises(TrackingError, match=r"was changed: 4294967296 bytes, expected"):
            pull(registry, "net", tmp_path / "model", which="1")
        assert path not in sent
        file.unlink()
        file.mkdir()  # of which everything would be sent
        with pytest.raises(TrackingError, match=f"has no file {path}"):
            pull(registry, "net", tmp_path / "model", which="1")
        assert path not in sent
    finally:
        file.rmdir()
        file.write_bytes(content)


def _is_of(file: Path, run: str) -> bool:
    return bool(json.loads((file.parent / MANIFEST).read_text())["run"] == run)


@pytest.mark.parametrize("path", ["secateur/loader.py", "secateur/MODEL.onnx", "secateur/deep/x", "secateur/card.md"])
def test_no_file_of_a_version_takes_the_place_of_one_that_a_pull_writes(path: str) -> None:
    raw = manifest(**{path: {"sha256": "0" * 64, "bytes": 1}})
    read = Manifest.read(raw, hashlib.sha256(raw).hexdigest(), "a version")
    with pytest.raises(VersionError, match="refused"):
        _chosen(read, "a version")


def test_the_card_of_a_version_is_delivered_with_what_was_pulled(tmp_path: Path) -> None:
    raw = manifest(**{"secateur/CARD.md": {"sha256": "0" * 64, "bytes": 1}})
    read = Manifest.read(raw, hashlib.sha256(raw).hexdigest(), "a version")
    assert _chosen(read, "a version")["secateur/CARD.md"] == "CARD.md"
    (tmp_path / "CARD.md").write_text("---\nlicense: mit\n---\n# net\x1b[2J\n")
    text = card(Version("net", "3"), read, tmp_path)
    assert text.startswith("---\nlicense: mit\n---\n# net[2J\n")
    assert "`models:/net/3`" in text
    assert f"`{read.sha256}`" in text


def model_with(tensor: onnx.TensorProto, deep: bool) -> onnx.ModelProto:
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("x", "y")]
    if deep:  # in a subgraph's constant
        inner = helper.make_graph([helper.make_node("Constant", [], ["y"], value=tensor)], "then", [], value[1:])
        condition = helper.make_tensor("c", TensorProto.BOOL, [], [True])
        nodes = [helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)]
        return helper.make_model(helper.make_graph(nodes, "g", value[:1], value[1:], [condition]))
    tensor.name = "t"
    return helper.make_model(
        helper.make_graph([helper.make_node("Add", ["x", "t"], ["y"])], "g", value[:1], value[1:], [tensor])
    )


@pytest.mark.parametrize("deep", [False, True])
def test_weights_in_other_files_are_refused_wherever_they_hide(tmp_path: Path, deep: bool) -> None:
    file = tmp_path / "model.onnx"
    inside = helper.make_tensor("t", TensorProto.FLOAT, [1], [1.0])
    onnx.save(model_with(inside, deep), file)
    check_onnx(file)
    outside = onnx.TensorProto(data_type=TensorProto.FLOAT, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="../../etc/passwd")
    file.write_bytes(model_with(outside, deep).SerializeToString())
    with pytest.raises(VersionError, match="other files"):
        check_onnx(file)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"PK\x03\x04", onnx.ModelProto().SerializeToString()])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    with pytest.raises(VersionError, match="no valid ONNX"):
        check_onnx(file)
