"""timm's networks bring their images' preparation and weights along; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads import classification
from secateur.pipeline.workloads.networks import timm_zoo

NAME = "test_efficientnet"
"""One of the smallest of timm: 0.4 M parameters, for images of 160 pixels."""


@pytest.fixture(autouse=True)
def _no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Photographs of three classes, of many sizes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 2)):
        for name in ("a", "b", "c"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (170 + 31 * i, 260 - 17 * i, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def built(folder: Path, data: dict[str, Any] | None = None, **model: Any) -> classification.Classification:
    options = {
        "model": {"name": f"timm/{NAME}", **model},
        "data": {"source": "folder", "path": str(folder)} | (data or {}),
    }
    return classification.build(classification.Options.model_validate(options))


def put(name: str = NAME) -> dict[str, torch.Tensor]:
    """Weights of 1000 classes where timm keeps what it fetched."""
    torch.manual_seed(1)
    state = timm.create_model(name, pretrained=False).state_dict()
    place = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"models--timm--{name}.r160_in1k"
    (place / "snapshots" / "1").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("1")
    save_file(state, place / "snapshots" / "1" / "model.safetensors")
    return state


def test_images_are_prepared_as_timm_does(folder: Path) -> None:
    workload = built(folder)
    said = timm.get_pretrained_cfg(NAME)
    images, _ = workload.batch(workload.test, torch.arange(6), train=False, generator=None, device=torch.device("cpu"))
    theirs = timm.data.create_transform(**timm.data.resolve_data_config({}, pretrained_cfg=said.to_dict()))
    for index, found in zip(workload.test.indices, images, strict=True):
        with Image.open(workload.test.source.files[index]) as opened:  # type: ignore[attr-defined]
            assert torch.allclose(found, theirs(opened.convert("RGB")), atol=1e-5)
    usage = workload.usage
    assert (usage["image_size"], usage["interpolation"], usage["resize"]) == (160, said.interpolation, "crop")
    assert usage["mean"] == pytest.approx(said.mean) and usage["std"] == pytest.approx(said.std)


def test_the_run_file_goes_before_what_timm_says(folder: Path) -> None:
    workload = built(folder, {"image_size": [32, 48], "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]})
    assert workload.example_input().shape == (1, 3, 32, 48)
    assert workload.usage["image_size"] == [32, 48] and workload.usage["mean"] == pytest.approx([0.1, 0.2, 0.3])


def test_weights_are_read_where_timm_has_put_them_and_the_head_is_replaced(folder: Path) -> None:
    with pytest.raises(UserError, match=r"not on this machine.*create_model"):
        built(folder, weights="timm")
    state = put()
    with pytest.raises(UserError, match=r"1,000 classes, the data has 3.*but_classes"):
        built(folder, weights="timm")
    workload = built(folder, weights="timm", load="but_classes")
    assert not workload.pretrained, "a baseline is trained from there"
    found = workload.build_model().state_dict()
    assert found["classifier.weight"].shape[0] == 3
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items() if not name.startswith("classifier."))
    (note,) = (note for note in workload.notes if "weights timm" in note)
    assert "classifier.weight (1000, " in note and "3 classes" in note
    save_file({name: t for name, t in state.items() if name != "bn1.bias"}, timm_zoo.find_weights(NAME))
    with pytest.raises(UserError, match="not in the file"):
        built(folder, weights="timm", load="but_classes").build_model()


def test_names_options_and_other_zoos_are_refused_with_the_way_out(folder: Path) -> None:
    for wrong, said in {"resnet19": "did you mean 'resnet", f"{NAME}.r161_in1k": "did you mean 'r160_in1k'"}.items():
        with pytest.raises(UserError, match=said):
            timm_zoo.check_name(wrong)
    timm_zoo.check_name(f"{NAME}.r160_in1k")
    for option in ("pretrained", "checkpoint_path", "pretrained_cfg", "cache_dir"):
        with pytest.raises(UserError, match=r"model\.weights"):
            built(folder, options={option: "x"}).build_model()
    with pytest.raises(UserError, match="are for networks of timm"):
        built(folder, name="resnet18", weights="timm")
    with pytest.raises(UserError, match="are for networks of torchvision"):
        built(folder, weights="torchvision")


def test_another_preparation_is_another_content(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = built(folder).fingerprint
    found = timm_zoo.preparation(NAME)
    assert found is not None
    other = type(found)(found.fitting, (0.1, 0.1, 0.1), found.std)
    monkeypatch.setattr(timm_zoo, "preparation", lambda _: other)
    assert built(folder).fingerprint != before
