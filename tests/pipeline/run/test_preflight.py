"""What will fail is said before anything is trained: by `validate`, and by a run at its start, in the same words."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from secateur.pipeline import errors
from secateur.pipeline.cli import app as cli
from secateur.pipeline.config.faults import FaultsError
from secateur.pipeline.progress import Silent
from secateur.pipeline.run.preflight import examine
from secateur.pipeline.run.run import Run, create_run_directory
from secateur.pipeline.workloads.data import content
from secateur.pipeline.workloads.data.content import Reading
from secateur.pipeline.workloads.networks import build_network
from tests.pipeline.helpers import merged, quick_device, tiny_config, write_tiny

Captured = pytest.CaptureFixture[str]
Changes = dict[str, Any]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run ``secateur ARGUMENTS`` in this process; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["secateur", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def arrays(folder: Path, name: str, height: int, width: int, num: int = 60) -> str:
    """An array file of noise in three classes."""
    rng = np.random.default_rng(height * 100 + width)
    images = rng.integers(0, 256, (num, height, width, 1), dtype=np.uint8)
    np.savez(folder / f"{name}.npz", images=images, labels=np.arange(num) % 3)
    return str(folder / f"{name}.npz")


def pictures(folder: Path, damaged: tuple[str, ...] = ()) -> str:
    """A folder of images in two classes; those named ``damaged`` end in the middle."""
    rng = np.random.default_rng(1)
    for label in "ab":
        place = folder / "pictures" / "train" / label
        place.mkdir(parents=True)
        for i in range(20):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(place / f"{i}.png")
    for name in damaged:
        file = folder / "pictures" / "train" / name
        file.write_bytes(file.read_bytes()[:200])
    return str(folder / "pictures")


def data(**section: Any) -> Changes:
    return {"workload": {"data": {"augment": "none", **section}}}


def from_arrays(folder: Path, train: tuple[int, int], test: tuple[int, int] | None = None) -> Changes:
    files = {"train": arrays(folder, "train", *train)}
    if test is not None:
        files["test"] = arrays(folder, "test", *test)
    return data(source="arrays", image_size=None, **files)


def from_pictures(folder: Path, damaged: tuple[str, ...] = ()) -> Changes:
    section = data(source="folder", path=pictures(folder, damaged), image_size=16, mean=[0.5] * 3, std=[0.25] * 3)
    return {**section, "search": {"images": 1000}}


def bad_weights(folder: Path) -> Changes:
    state = build_network("cifar/resnet8", 10, (1, 8, 8), {}).state_dict()
    state["conv1.weight"].fill_(float("nan"))
    save_file(state, folder / "nan.safetensors")
    return {"workload": {"model": {"name": "cifar/resnet8", "weights": str(folder / "nan.safetensors")}}}


def device(folder: Path, **changes: Any) -> Changes:
    place = folder / "other"
    place.mkdir()
    return {"device": {"profile": str(quick_device(place, **changes))}}


FAULTS: dict[str, tuple[Callable[[Path], Changes], str, str]] = {
    "test arrays of another size": (lambda f: from_arrays(f, (8, 8), (12, 12)), "workload", "set data.image_size"),
    "a damaged file": (lambda f: from_pictures(f, ("a/3.png",)), "workload", "3.png"),
    "an empty file": (lambda f: from_pictures(f, ("a/3.png", "b/4.png")), "workload", "2 of 40 images"),
    "MACs below the smallest": (
        lambda f: {"search": {"target": {"macs_ratio": 0.0001}}},
        "search.target.macs_ratio",
        "",
    ),
    "MACs with few channels free": (
        lambda f: {
            "search": {"target": {"macs_ratio": 0.5}, "min_keep_ratio": 0.95},
            "device": {"channel_multiple": 1},
        },
        "search.target.macs_ratio",
        "min_keep_ratio",
    ),
    "MACs with frozen groups": (
        lambda f: {"search": {"target": {"macs_ratio": 0.4}, "frozen": ["layer[12]*", "conv1"]}},
        "search.target.macs_ratio",
        "freeze less",
    ),
    "a gate below the smallest": (lambda f: {"gate": {"max_macs_ratio": 0.0001}}, "gate.max_macs_ratio", "smallest"),
    "a budget below the weights": (
        lambda f: device(f, budgets={"size_bytes": 10}),
        "device.profile",
        "gate.budgets: false",
    ),
    "frozen that matches nothing": (lambda f: {"search": {"frozen": ["nope*"]}}, "search.frozen", "layer1.0.conv1"),
    "everything frozen": (lambda f: {"search": {"frozen": ["*"]}}, "search", "no channel group is left"),
    "a template": (lambda f: {"device": {"profile": "raspberry-pi-5"}}, "device.profile", "secateur devices add"),
    "a template among others": (lambda f: {"device": {"others": ["rk3588"]}}, "device.others", "secateur devices add"),
    "an unknown device": (lambda f: {"device": {"profile": "lokal"}}, "device.profile", "Did you mean 'local'"),
    "no CUDA": (lambda f: {"compute": "cuda"}, "compute", "compute: auto or cpu"),
    "batch norm synchronised on a processor": (
        lambda f: {"finetune": {"sync_batchnorm": True}, "compute_count": 2},
        "finetune.sync_batchnorm",
        "GPUs only",
    ),
    "more search images than there are": (lambda f: {"search": {"images": 99_999}}, "search.images", "or less"),
    "more images to recalibrate": (
        lambda f: {"search": {"recalibrate_images": 99_999}},
        "search.recalibrate_images",
        "the train split has",
    ),
    "more images for parity": (lambda f: {"export": {"parity_images": 99_999}}, "export.parity_images", "or less"),
    "weights that are not finite": (bad_weights, "workload.model", "nan.safetensors"),
    "weights that are not there": (
        lambda f: {"workload": {"model": {"weights": "none.safetensors"}}},
        "workload",
        "none.safetensors",
    ),
    "a network for other images": (
        lambda f: {"workload": {"model": {"name": "resnet18"}}},
        "workload.model",
        "channels",
    ),
}


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_found_without_training(case: str, tmp_path: Path) -> None:
    changes, key, said = FAULTS[case]
    faults = examine(tiny_config(tmp_path, **changes(tmp_path))).faults
    assert [".".join(map(str, fault.place)) for fault in faults] == [key]
    assert said in faults[0].message


@pytest.mark.parametrize("case", ["a damaged file", "a template", "frozen that matches nothing", "no CUDA"])
def test_a_run_begins_with_the_same_check(case: str, tmp_path: Path) -> None:
    changes, key, said = FAULTS[case]
    directory = create_run_directory(tiny_config(tmp_path, **changes(tmp_path)))
    with pytest.raises(FaultsError) as refused:
        Run(directory, Silent())
    assert key in str(refused.value)
    assert said in str(refused.value)
    assert not (directory / "journal.jsonl").exists()


@pytest.mark.parametrize(
    ("workload", "section", "said"),
    [
        ("classification", {"name": "resnet81"}, "did you mean"),
        ("classification", {"name": "timm/resnet81"}, "did you mean"),
        ("classification", {"name": "resnet18", "weights": "none.safetensors"}, "none.safetensors"),
        ("classification", {"name": "cifar/resnet20", "weights": "torchvision"}, "no trained weights"),
        ("detection", {"name": "ssd"}, "unknown network"),
        ("detection", {"name": "small_ssd", "weights": "torchvision"}, "no trained weights"),
        ("detection", {"name": "small_ssd", "weights": "none.pt"}, "none.pt"),
    ],
)
def test_what_is_quickly_seen_is_refused_before_data_is_read(
    tmp_path: Path, workload: str, section: Changes, said: str
) -> None:
    missing = {"source": "arrays", "train": "nowhere"} if workload == "classification" else {"path": "nowhere"}
    wrong = {"name": workload, "model": section, "data": missing}
    faults = examine(tiny_config(tmp_path).model_copy(update={"workload": wrong})).faults
    assert len(faults) == 1
    assert said in faults[0].message


def test_a_run_is_refused_before_its_data_is_read(tmp_path: Path) -> None:
    workload = {"name": "classification", "model": {}, "data": {"source": "folder", "path": "nowhere"}}
    config = tiny_config(tmp_path, compute="cuda").model_copy(update={"workload": workload})
    assert [fault.place for fault in examine(config).faults] == [("compute",)]
    assert len(examine(config, whole=True).faults) == 2


def test_a_detector_whose_images_are_to_be_mixed_is_refused(tmp_path: Path) -> None:
    data = {"source": "digits", "image_size": 64, "scenes": 40}
    section = {"name": "detection", "model": {"name": "small_ssd", "options": {"width": 8}}, "data": data}
    config = tiny_config(tmp_path, finetune={"mixup": 0.2}, search={"images": 3}, export={"parity_images": 3})
    faults = examine(config.model_copy(update={"workload": section})).faults
    assert [(fault.place, "mixup and cutmix" in fault.message) for fault in faults] == [(("finetune",), True)]


def test_a_sound_run_has_no_fault(tmp_path: Path) -> None:
    found = examine(tiny_config(tmp_path))
    assert found.faults == []
    assert found.network is not None
    assert found.network.bound.macs <= found.network.smallest.macs < found.network.whole.macs


def test_all_faults_are_told_at_once(monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path) -> None:
    changes = {"compute": "cuda", "search": {"frozen": ["nope"], "images": 99_999}, "device": {"others": ["rk3588"]}}
    assert call(monkeypatch, "validate", str(write_tiny(tmp_path, **changes))) == errors.EXIT_USER
    shown = capsys.readouterr()
    assert "has 4 faults" in shown.err
    for key in ("compute", "search.frozen", "search.images", "device.others"):
        assert f"  {key}: " in shown.err
    assert "is valid" not in shown.out


def test_a_target_that_only_the_device_can_rule_out_is_a_note(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, search={"target": {"macs_ratio": 0.06}})
    found = examine(config)
    assert found.network is not None
    assert found.network.bound.macs < 0.06 * found.network.whole.macs < found.network.smallest.macs
    assert found.faults == []
    assert any("search.target.macs_ratio 0.06 may be out of reach" in note for note in found.notes)


def test_default_numbers_of_images_take_what_there_is(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, search={"images": 1000})
    found = examine(config)
    assert found.faults == []
    assert any("all are used" in note for note in found.notes)


@pytest.mark.parametrize("values", [[0.5, 0.5, 0.0], [0.5, -0.1, 0.5]])
@pytest.mark.parametrize("section", [{"name": "detection", "input": {}}, {"name": "classification", "data": {}}])
def test_a_deviation_that_is_not_positive_is_refused(section: Changes, values: list[float], tmp_path: Path) -> None:
    part = next(key for key in section if key != "name")
    workload = {"name": section["name"], part: {"std": values}}
    with pytest.raises(FaultsError, match=f"workload.{part}.std"):
        tiny_config(tmp_path, workload=merged({"model": {}, "data": {}}, workload))


# -- what is said -----------------------------------------------------------------------------------------------------


def document(monkeypatch: pytest.MonkeyPatch, capsys: Captured, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = call(monkeypatch, "validate", *arguments, "--json")
    return code, json.loads(capsys.readouterr().out)


def test_json_is_one_document_with_everything(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path
) -> None:
    code, found = document(monkeypatch, capsys, str(write_tiny(tmp_path)))
    assert code == 0
    assert (found["format"], found["valid"], found["faults"]) == (1, True, [])
    assert (found["method"], found["devices"], found["compute"]) == ("ccep", ["quick"], "cpu")
    assert found["data"]["counted"] == "images"
    assert [c["name"] for c in found["data"]["classes"]] == [str(digit) for digit in range(10)]
    for part in ("train", "search", "test"):
        assert sum(c[part] for c in found["data"]["classes"]) == found["data"]["images"][part] > 0
    assert found["data"]["sizes"] == [{"width": 8, "height": 8, "images": 1797}]
    network = found["network"]
    assert network["input"] == [1, 1, 8, 8]
    assert network["macs"] > network["smallest"]["macs"] > 0
    assert network["params"] > network["smallest"]["params"] > 0
    assert 0 <= network["frozen_macs_share"] < 1
    assert all(group["widths"][-1] == group["channels"] for group in network["groups"])


def test_json_keys_are_documented(monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path) -> None:
    _, found = document(monkeypatch, capsys, str(write_tiny(tmp_path)))
    page = (Path(__file__).parents[3] / "docs" / "reference" / "run-file.md").read_text(encoding="utf-8")

    def names(value: Any, prefix: str = "") -> list[str]:
        if isinstance(value, list):
            return [name for item in value[:1] for name in names(item, f"{prefix}[]")]
        if not isinstance(value, dict):
            return []
        own = [f"{prefix}.{key}".lstrip(".") for key in value]
        return own + [name for key in value for name in names(value[key], f"{prefix}.{key}".lstrip("."))]

    documented = [name for name in names(found) if f"| `{name}` |" not in page]
    assert documented == []


@pytest.mark.parametrize(
    ("override", "key"),
    [("compute=cuda", "compute"), ("workload.data.path=x", "workload.data")],
    ids=["found by looking", "found by reading"],
)
def test_json_holds_faults_of_both_kinds(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path, override: str, key: str
) -> None:
    file = write_tiny(tmp_path)
    code, found = document(monkeypatch, capsys, str(file), "--set", override)
    assert code == errors.EXIT_USER
    assert found["valid"] is False
    assert [fault["key"] for fault in found["faults"]] == [key]


def test_people_see_classes_sizes_costs_and_notes(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path
) -> None:
    assert call(monkeypatch, "validate", str(write_tiny(tmp_path))) == 0
    text = capsys.readouterr().out
    for said in ("8x8 (1,797)", " MACs, ", "Channel groups: ", "Smallest reachable: ", "Note: ", "is valid", " test"):
        assert said in text


# -- how many files are decoded ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "seen"), [((), False), (("--all",), True)])
def test_of_many_files_all_are_decoded_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path, arguments: tuple[str, ...], seen: bool
) -> None:
    monkeypatch.setattr(content, "MANY", 30)
    monkeypatch.setattr(content, "SAMPLE", 4)  # of 40 files every tenth
    file = write_tiny(tmp_path, **from_pictures(tmp_path, ("a/3.png",)))
    code = call(monkeypatch, "validate", str(file), "--no-estimate", *arguments)  # whose timed steps read images too
    assert (code == errors.EXIT_USER) is seen
    assert ("3.png" in capsys.readouterr().err) is seen


def test_a_run_decodes_what_validate_did_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(content, "MANY", 30)
    monkeypatch.setattr(content, "SAMPLE", 4)
    config = tiny_config(tmp_path, **from_pictures(tmp_path, ("a/3.png",)))
    assert examine(config, Reading(check="sample")).faults == []
    with pytest.raises(FaultsError, match=r"3\.png"):
        Run(create_run_directory(config), Silent())


@pytest.mark.parametrize(
    ("method", "budget", "place", "says"),
    [
        ("ccep", {"evaluations": 2}, "evaluations", "2 cannot hold one round of ccep, whose least is"),
        ("dafp", {"epochs": 0.2}, "epochs", "0.2 cannot hold one round of dafp, whose least is 1;"),
        ("dafp", {"work": 1.0}, "work", "no method takes less"),
    ],
)
def test_a_budget_that_holds_no_round_of_its_method_is_refused(
    tmp_path: Path, method: str, budget: Changes, place: str, says: str
) -> None:
    section = {"method": method, "options": {}, "target": {"macs_ratio": 0.5}, "budget": budget}
    faults = examine(tiny_config(tmp_path, search=section)).faults
    assert [fault.place for fault in faults] == [("search", "budget", place)]
    assert says in faults[0].message
    if place != "work":
        assert "global" in faults[0].message.partition("take a method that it holds:")[2]
