"""torchvision's own weights: from torch's cache, or a message how to get them; nothing here needs a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.models as classifiers
import torchvision.models.detection as detectors
from torch import Tensor, nn

from secateur.pipeline.errors import UserError
from secateur.pipeline.files import sha256_of
from secateur.pipeline.workloads import classification, detection, weights

SSDLITE = "ssdlite320_mobilenet_v3_large"
COCO = detectors.SSDLite320_MobileNet_V3_Large_Weights.COCO_V1
UNREACHABLE = "http://127.0.0.1:9/weights-0123abcd.pth"
SCENES = {"source": "digits", "image_size": 64, "scenes": 20}
TEN_OF_90 = [3, 89, 0, 7, 8, 9, 10, 11, 12, 5]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch keeps what it downloads: empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def put(cache: Path, url: str, state: Any) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(state, cache / Path(url).name)
    return cache / Path(url).name


def trained_ssdlite(seed: int) -> Any:
    """torchvision's own network as its weights for COCO fit it."""
    torch.manual_seed(seed)
    return detectors.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=91).eval()


def detector(**model: Any) -> detection.Detection:
    options = {"model": {"name": SSDLITE, "weights": "torchvision", **model}, "data": SCENES}
    return detection.build(detection.Options.model_validate(options | {"input": {"augment": "none"}}))


def heads(model: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets and logits of one of torchvision's detectors."""
    found = model.head(list(model.backbone(image).values()))  # type: ignore[operator]
    return found["bbox_regression"], found["cls_logits"]


def test_a_detector_takes_torchvisions_weights_from_torchs_cache(cache: Path) -> None:
    theirs = trained_ssdlite(0)
    put(cache, COCO.url, theirs.state_dict())
    picked = detector(weight_classes=TEN_OF_90)
    assert picked.pretrained
    image = picked.example_input()
    with torch.inference_mode():
        found, (offsets, logits) = picked.build_model()(image), heads(theirs, image)
    assert torch.allclose(found[..., :4], offsets, atol=1e-5)
    assert torch.allclose(found[..., 4:], logits[..., [0, *(c + 1 for c in TEN_OF_90)]], atol=1e-5)
    with pytest.raises(UserError, match="but_classes"):
        detector()


def test_a_detector_for_other_classes_keeps_all_but_their_heads(cache: Path) -> None:
    theirs = trained_ssdlite(0)
    put(cache, COCO.url, theirs.state_dict())
    part = detector(load="but_classes")
    assert not part.pretrained
    image = part.example_input()
    with torch.inference_mode():
        found, (offsets, _) = part.build_model()(image), heads(theirs, image)
    assert found.shape == (1, 3234, 4 + 11)
    assert torch.allclose(found[..., :4], offsets, atol=1e-5)
    put(cache, COCO.url, trained_ssdlite(1).state_dict())
    assert detector(load="but_classes").fingerprint != part.fingerprint


def test_weights_that_cannot_be_downloaded_say_where_to_put_them(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(COCO.value, "url", UNREACHABLE)
    with pytest.raises(UserError, match=r"cannot download .*127\.0\.0\.1:9.* put it at .*weights-0123") as caught:
        detector()
    assert str(cache / "weights-0123abcd.pth") in str(caught.value)
    assert not (cache / "weights-0123abcd.pth").exists()


def test_a_download_with_another_hash_is_refused(cache: Path, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "weights-0123abcd.pth")
    with pytest.raises(UserError, match="invalid hash"):
        weights.download((tmp_path / "weights-0123abcd.pth").as_uri())
    assert list(cache.iterdir()) == []


def test_a_download_is_kept(cache: Path, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "part.pth")
    digest = sha256_of(tmp_path / "part.pth")
    source = (tmp_path / "part.pth").rename(tmp_path / f"weights-{digest[:8]}.pth")
    path = weights.download(source.as_uri())
    source.unlink()
    assert path == cache / source.name == weights.download(source.as_uri())
    assert weights.read_weights(path)["w"].tolist() == [1]


def test_a_damaged_file_in_the_cache_is_named(cache: Path) -> None:
    path = put(cache, COCO.url, {})
    path.write_bytes(b"half a file")
    with pytest.raises(UserError, match=f"cannot read weights {path}"):
        detector()


@pytest.mark.parametrize("name", ["small_ssd", "ssd300_vgg16_bn", "ssd300_mobilenet_v1", "somewhere:factory"])
def test_detectors_that_torchvision_has_no_weights_for_are_told_which_it_has(name: str) -> None:
    with pytest.raises(UserError, match=rf"no trained weights for network {name}, only for ssd300_vgg16 and {SSDLITE}"):
        detector(name=name)


def thousand_classes(folder: Path) -> dict[str, object]:
    """Two small images for each of ImageNet's classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (2000, 8, 8, 3), dtype=np.uint8)
    for split in ("train", "test"):
        np.savez(folder / f"{split}.npz", images=pixels, labels=np.arange(2000) % 1000)
    return {"source": "arrays", "train": str(folder / "train.npz"), "test": str(folder / "test.npz"), "image_size": 32}


def test_a_classifier_takes_torchvisions_weights_even_under_their_old_names(cache: Path, tmp_path: Path) -> None:
    """The files of DenseNets say ``norm.1`` where the network has ``norm1``, and have no counters of batches."""
    torch.manual_seed(0)
    theirs = classifiers.densenet121(weights=None).eval()
    new = {name: tensor for name, tensor in theirs.state_dict().items() if not name.endswith("num_batches_tracked")}
    old = {name.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): tensor for name, tensor in new.items()}
    assert old.keys() != new.keys()
    path = put(cache, classifiers.DenseNet121_Weights.DEFAULT.url, old)
    options = {"model": {"name": "densenet121", "weights": "torchvision"}, "data": thousand_classes(tmp_path)}
    state = torch.get_rng_state()
    workload = classification.build(classification.Options.model_validate(options))
    assert torch.equal(torch.get_rng_state(), state)
    image = workload.example_input()
    with torch.inference_mode():
        assert torch.allclose(workload.build_model()(image), theirs(image), atol=1e-5)
    torch.save({**old, "classifier.bias": torch.ones(1000)}, path)
    again = classification.build(classification.Options.model_validate(options))
    assert again.pretrained
    assert again.fingerprint != workload.fingerprint
    torch.save({"features.conv0.weight": torch.ones(1)}, path)
    with pytest.raises(UserError, match=f"{path} holds other weights than torchvision's for densenet121"):
        classification.build(classification.Options.model_validate(options))


def test_classifiers_that_the_weights_cannot_be_for_are_refused_before_a_download() -> None:
    with pytest.raises(UserError, match="no trained weights for network cifar/resnet20; known: alexnet"):
        digits_with("cifar/resnet20")
    with pytest.raises(UserError, match="resnet18 know 1,000 classes, the data has 10"):
        digits_with("resnet18")


def digits_with(name: str) -> classification.Classification:
    options = {"model": {"name": name, "weights": "torchvision"}, "data": {"channels": 3}}
    return classification.build(classification.Options.model_validate(options))
