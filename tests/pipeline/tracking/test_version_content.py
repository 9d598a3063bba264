"""Whatever a version holds: each command that reads it uses it, or ends in one refusal; nothing of it is promoted."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from secateur.device_profiles import BenchmarkResult, DeviceProfile
from secateur.pipeline import foreign
from secateur.pipeline.cli import app as cli
from secateur.pipeline.cli import registry as registry_cli
from secateur.pipeline.config.reading import parse_run_file
from secateur.pipeline.config.schema import GateSection
from secateur.pipeline.errors import EXIT_GATE, EXIT_USER, UserError
from secateur.pipeline.flow.deployed import refused
from secateur.pipeline.lifecycle import promotion
from secateur.pipeline.lifecycle.reprofile import Reprofile, Tolerances, compared, markdown, profile_of, recorded
from secateur.pipeline.terminal import out
from secateur.pipeline.tracking import RUN_TAG, Decision, Registry, Version
from secateur.pipeline.tracking.history import EVENTS
from secateur.pipeline.tracking.manifest import MANIFEST, MODEL
from secateur.pipeline.tracking.registry import MANIFEST_TAG, MODEL_TAG
from secateur.pipeline.workloads import Workload
from tests.pipeline.helpers import QUICK_DEVICE, TINY, digits, merged
from tests.pipeline.lifecycle.test_reprofile import result
from tests.pipeline.registered import linear_model
from tests.pipeline.tracking.test_pull import HOSTILE, places, put

PROFILE = DeviceProfile(name="quick", **QUICK_DEVICE)
RUN = merged(TINY, {"workload": {"data": {"augment": "none"}}, "device": {"profile": "local"}})
SECTION = GateSection(min_accuracy=0.5, max_latency_increase=None, max_resource_increase=None, budgets=False)
FEW = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
DEEP = b"[" * 500 + b"]" * 500
ENDLESS = b'{"compact":' * 100_000


class Two(Registry):
    """Versions 2, the challenger, and 1, the champion where there is one; as a store gives them."""

    def __init__(self, folder: Path, challenger: Mapping[str, bytes], champion: Mapping[str, bytes] | None = None):
        super().__init__("sqlite:///none.db", folder / "home")
        self.stored = {"2": challenger, **({"1": champion} if champion else {})}
        self.promoted = False

    def version(self, name: str, which: str = "champion", device: str | None = None) -> Version:
        number = which if which.isdigit() else "2"
        digests = (hashlib.sha256(self.stored[number][path]).hexdigest() for path in (MANIFEST, MODEL))
        tags = dict(zip((MANIFEST_TAG, MODEL_TAG), digests, strict=True))
        return Version(name, number, {**tags, "gate": "passed", RUN_TAG: "run-1"})

    def champion(self, name: str, device: str) -> Version | None:
        return self.version(name, "1") if "1" in self.stored else None

    def deleted_champion(self, name: str, device: str) -> None:
        return None

    def log_decision(self, decision: Decision, key: str, files: Any = ()) -> str:
        json.dumps(decision.to_dict())
        return "run"

    def promote(self, *_: Any) -> None:
        self.promoted = True

    def _download(self, version: Version, path: str, folder: Path, sizes: range) -> Path:
        (folder / "file").write_bytes(self.stored[version.version][path])
        return folder / "file"


@pytest.fixture(scope="module")
def workload() -> Workload:
    return digits(image_size=8)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, workload: Workload) -> dict[str, Any]:
    """What the files of a version of ours hold; JSON as data."""
    model = linear_model(tmp_path_factory.mktemp("network") / "model.onnx").read_bytes()
    compared_ = {"ok": True, "max_relative_error": 1e-6, "tolerance": 1e-4}
    return {
        MODEL: model,
        "secateur/network.onnx": model,
        "secateur/parity.json": {"baseline": compared_, "compact": compared_},
        "secateur/data.json": workload.record.facts(),
        "secateur/run.yaml": RUN,
        MANIFEST: {
            "format": 1,
            "kind": "secateur-version",
            "name": "net",
            "run": "run-1",
            "data": workload.fingerprint,
            "device": {"name": "quick", "fingerprint": "f"},
        },
    }


def version_of(told: Mapping[str, Any], path: str = "", content: Any = None) -> dict[str, bytes]:
    """A version's files, one with other content; the list of files vouches for it."""
    every = {**told, path: content} if path else dict(told)
    files = {name: held if isinstance(held, bytes) else json.dumps(held).encode() for name, held in every.items()}
    listed = {
        name: {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
        for name, raw in files.items()
        if name != MANIFEST
    }
    if isinstance(every[MANIFEST], dict):
        files[MANIFEST] = json.dumps({"files": listed, **every[MANIFEST]}).encode()
    return files


def judged(registry: Two, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Decision:
    """The decision, without a device."""
    names = {"champion": None, "challenger": 1.0} if "1" in registry.stored else {"compact": 1.0}
    timed = result(1.0, None, processes=3)
    sample = timed.processes[0].models["compact"]
    processes = tuple(type(p)({name: sample for name in names}, {}, 0.0, 1.0) for p in timed.processes)
    found = BenchmarkResult("quick", "final", tuple(names), {}, "cpu", processes)
    monkeypatch.setattr(promotion, "_measure", lambda *_: found)
    monkeypatch.setattr(promotion, "RESAMPLES", 20)
    target: Any = SimpleNamespace()
    return promotion.promote(registry, "net", PROFILE, target, recorded=found, **{"section": SECTION, **options})


def test_a_version_of_ours_is_promoted(
    told: Any, workload: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, champion in (("first", None), ("second", version_of(told))):
        registry = Two(tmp_path / name, version_of(told), champion)
        decision = judged(registry, monkeypatch, workload=workload)
        assert decision.promoted and registry.promoted, decision.gates


def model(nodes: list[Any], inputs: list[Any], outputs: list[Any], tensors: list[Any] | None = None) -> bytes:
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors or [])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(made.SerializeToString())


def value(name: str, *shape: int | str, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


IMAGE = value("input", 1, 1, 8, 8)
HUGE = helper.make_tensor("size", TensorProto.INT64, [2], [1 << 40, 1 << 20])
MODELS: dict[str, bytes] = {
    "empty": b"",
    "no model": b"\xff" * 100,
    "no graph": onnx.ModelProto().SerializeToString(),
    "text for images": model(
        [helper.make_node("Identity", ["input"], ["output"])],
        [value("input", 1, kind=TensorProto.STRING)],
        [value("output", 1, kind=TensorProto.STRING)],
    ),
    "endless images": model(
        [helper.make_node("Identity", ["input"], ["output"])], [value("input", 1 << 40)], [value("output", 1 << 40)]
    ),
    "other images": model(
        [helper.make_node("Identity", ["input"], ["output"])], [value("input", 1, 3, 9)], [value("output", 1, 3, 9)]
    ),
    "images for classes": model([helper.make_node("Identity", ["input"], ["output"])], [IMAGE], [IMAGE]),
    "endless answers": model(
        [helper.make_node("ConstantOfShape", ["size"], ["output"])], [IMAGE], [value("output", "a", "b")], [HUGE]
    ),
    "fails": model(
        [helper.make_node("Reshape", ["input", "shape"], ["output"])],
        [IMAGE],
        [value("output", "a")],
        [helper.make_tensor("shape", TensorProto.INT64, [1], [7])],
    ),
}
RUNNING = ("other images", "images for classes")
"""They run, and answer no test image. A classifier's test images are answered by its ``model.onnx``, as users' are."""
BYTES = {"empty": b"", "binary": b"\xff\xfe\x00", "list": b"[]", "null": b"null", "text": b'"\\u001b[2J"', "cut": b"{"}
BYTES |= {"deep": DEEP, "endless": ENDLESS, "digits": b'{"compact": ' + b"9" * 5000 + b"}"}
HELD = [
    *((MODEL, name, raw) for name, raw in MODELS.items()),
    *(("secateur/network.onnx", name, raw) for name, raw in MODELS.items() if name not in RUNNING),
    *(
        (f"secateur/{file}", name, raw)
        for file in ("parity.json", "provenance.json", "run.yaml")
        for name, raw in BYTES.items()
    ),
    *(
        ("secateur/parity.json", f"{key} {wrong!r}"[:40], {"compact": {**good, key: wrong}})
        for good in ({"ok": True, "max_relative_error": 1e-6, "tolerance": 1e-4},)
        for key, wrongs in {
            "ok": (1, "true", None, False),
            "max_relative_error": (math.nan, math.inf, -1.0, "0", True, None, [1e-6]),
            "tolerance": (math.nan, math.inf, -1.0, 0.0, 1e9, "1", None),
        }.items()
        for wrong in wrongs
    ),
    ("secateur/parity.json", "nothing about the model", {"baseline": {"ok": True}}),
]


READ = {"challenger": HELD, "champion": [row for row in HELD if row[0].endswith((".onnx", "provenance.json"))]}


@pytest.mark.parametrize(
    ("role", "path", "content"),
    [
        pytest.param(role, path, content, id=f"{role} {path}: {name}")
        for role, rows in READ.items()
        for path, name, content in rows
    ],
)
def test_what_no_version_of_ours_holds_promotes_nothing_and_is_said(
    role: str, path: str, content: Any, told: Any, workload: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"challenger": version_of(told), "champion": version_of(told), role: version_of(told, path, content)}
    registry = Two(tmp_path, files["challenger"], files["champion"])
    options = {"section": None} if path.endswith("run.yaml") else {"workload": workload}
    decision = judged(registry, monkeypatch, **options)
    failed = [gate for gate in decision.gates if not gate.ok]
    assert failed and not registry.promoted and not decision.promoted and decision.outcome == "refused"
    assert all(gate.reason and gate.reason.isprintable() for gate in failed)


@given(data=st.data())
@FEW
@pytest.mark.parametrize("file", ["parity.json", "data.json", "provenance.json", "run.yaml"])
def test_any_content_is_judged_or_ends_in_one_refusal(
    file: str, told: Any, workload: Workload, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch, data: Any
) -> None:
    path = f"secateur/{file}"
    content = put(told[path], data.draw(st.sampled_from(places(told[path]))), data.draw(HOSTILE))
    if file == "run.yaml":
        content = yaml.safe_dump(content, allow_unicode=True).encode() if data.draw(st.booleans()) else content
    champion = version_of(told)
    if file == "data.json":  # which is read where the data differ, to say in what
        champion = version_of(told, MANIFEST, {**told[MANIFEST], "data": "other"})
    registry = Two(tmp_path_factory.mktemp("any"), version_of(told, path, content), champion)
    options = {"section": None} if file == "run.yaml" else {"workload": workload}
    try:
        judged(registry, monkeypatch, **options)
    except Exception as error:  # noqa: BLE001 - whatever it is, it must be one that means something
        assert foreign.exit_code(error) == EXIT_USER, repr(error)
        return
    assert not (registry.promoted and file == "data.json")
    if registry.promoted and file == "parity.json":
        found = content["compact"]
        assert found["ok"] is True and 0 <= found["max_relative_error"] <= found["tolerance"] <= 1
    if registry.promoted and file == "provenance.json":
        assert content["data"] == workload.fingerprint
    if registry.promoted and file == "run.yaml":
        parse_run_file(content.decode() if isinstance(content, bytes) else json.dumps(content))


def test_the_command_says_what_is_wrong_and_ends_with_the_code_of_a_gate(
    told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = Two(tmp_path, version_of(told, "secateur/parity.json", DEEP))
    monkeypatch.setattr(registry_cli, "registry_at", lambda _: registry)
    monkeypatch.setattr("sys.argv", ["secateur", "promote", "net", "--device", "local"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == EXIT_GATE
    said = capsys.readouterr()
    assert "not promoted" in said.out and "deeply" in said.out and "Bug" not in said.err


# -- timed again -------------------------------------------------------------------------------------------------------


def written(sha256: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(result(1.0, processes=2, sha256=sha256, temperature_c={"max": 40.0}).to_json())
    return made


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_benchmark_of_a_version_is_compared_with_or_is_none(tmp_path_factory: Any, data: Any) -> None:
    folder = tmp_path_factory.mktemp("again")
    (folder / MODEL).write_bytes(b"model")
    good = written(hashlib.sha256(b"model").hexdigest())
    for process in good["processes"]:
        for samples in process["models"].values():
            samples["wall_ms"], samples["cpu_ms"] = samples["wall_ms"][:2], samples["cpu_ms"][:2]
    content = put(good, data.draw(st.sampled_from(places(good))), data.draw(HOSTILE))
    (folder / "benchmark.json").write_text(json.dumps(content))
    try:
        before, own, _ = recorded(folder, "quick")
        with np.errstate(all="ignore"):
            found = compared(Version("net", "1"), "quick", before, result(1.0), own, Tolerances())
    except UserError as error:
        assert "carries no benchmark" in str(error)
        return
    assert isinstance(found, Reprofile)
    assert all(math.isfinite(number) for number in found.metrics().values())
    json.loads(found.to_json())
    markdown([found])


@pytest.mark.parametrize("name", ["../x.yaml", "/etc/passwd.yml", "a\0b.yaml", "a\0b", "\x1b[2J", "x" * 5000, ""])
def test_a_champion_s_device_is_a_name_and_no_path(name: str) -> None:
    with pytest.raises(UserError, match="the champion's device") as caught:
        profile_of(name)
    assert str(caught.value).replace("\n", "").isprintable()


@pytest.mark.parametrize("run", ["../../etc", "/", ".", "..", "a/b", "a\0b", ""])
def test_the_run_of_a_version_names_no_other_folder(run: str) -> None:
    assert Version("net", "1", {RUN_TAG: run}).run == ""
    assert Version("net", "1", {RUN_TAG: "digits-20261129-120000-ab12"}).run


# -- the history -------------------------------------------------------------------------------------------------------


MOVE = {"kind": "promote", "device": "quick", "version": "1", "previous": None, "at": 1e9, "done": True, "run_id": "r"}


class Tagged(Registry):
    """A registered model with these tags."""

    def __init__(self, tags: Mapping[str, str]) -> None:
        super().__init__("sqlite:///none.db", Path("none"))
        self.tags = tags

    def _model(self, name: str) -> Any:
        return SimpleNamespace(name=name, tags=self.tags, aliases={"champion-quick": "1"})

    def _models(self) -> list[Any]:
        return []

    def versions(self, name: str) -> list[Version]:
        return [Version(name, "1")]


def entry_with(change: Callable[[dict[str, Any]], Any]) -> str:
    return json.dumps(change(dict(MOVE)))


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_entry_of_the_history_is_shown_or_passed_over(data: Any) -> None:
    entry = put(MOVE, data.draw(st.sampled_from(places(MOVE))), data.draw(HOSTILE))
    registry = Tagged({f"{EVENTS}{1:017d}-aaaa": json.dumps(MOVE), f"{EVENTS}{2:017d}-aaaa": json.dumps(entry)})
    with pytest.MonkeyPatch.context() as patch, out.capture():
        patch.setattr(registry_cli, "registry_at", lambda _: registry)
        registry_cli.history("net")
    assert registry.history("net")[0].version == "1"
    registry.deleted_champion("net", "quick")


@pytest.mark.parametrize("text", ["", "[]", "null", "{", DEEP.decode(), ENDLESS.decode(), "9" * 5000, '{"at": 1e400}'])
def test_a_tag_that_is_no_entry_is_passed_over(text: str) -> None:
    assert Tagged({f"{EVENTS}{1:017d}-aaaa": text}).history("net") == []
    assert refused({"secateur.decision.quick": text}, "quick", None) is False


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_note_of_a_decision_counts_or_does_not(data: Any) -> None:
    note = {"outcome": "refused", "champion": "1", "run_id": "r", "refused_by": ["p50 ratio"]}
    tags = {"secateur.decision.quick": json.dumps(note)}
    assert refused(tags, "quick", "1")
    hostile = put(note, data.draw(st.sampled_from(places(note))), data.draw(HOSTILE))
    assert refused({"secateur.decision.quick": json.dumps(hostile)}, "quick", "1") in (True, False)
