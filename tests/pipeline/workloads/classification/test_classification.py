"""Classification data from every source, splits that never mix, and errors that name the fix."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file

from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads import classification
from tests.pipeline.helpers import digits

CPU = torch.device("cpu")


def build(**sections: object) -> classification.Classification:
    return classification.build(classification.Options.model_validate(sections))


def arrays(folder: Path, n: int = 60, size: int = 12) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        np.save(folder / f"{split}_images.npy", rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8))
        np.save(folder / f"{split}_labels.npy", np.arange(n, dtype=np.uint8) % 3)


def folder_of_images(root: Path) -> None:
    rng = np.random.default_rng(0)
    for split, n in (("train", 10), ("test", 4)):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 100, (20 + i, 30, 3), dtype=np.uint8) + np.uint8(120 * label)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")


def test_splits_are_disjoint_mixed_and_the_same_for_every_run() -> None:
    a, b = digits(), digits()
    parts = [a.train, a.search, a.test]
    everything = np.concatenate([p.indices for p in parts])
    assert len(np.unique(everything)) == len(everything) == 1797
    assert all(np.array_equal(p.indices, q.indices) for p, q in zip(parts, [b.train, b.search, b.test], strict=True))
    for part in parts:
        shares = np.bincount(part.source.labels[part.indices]) / len(part)
        assert shares.min() > 0.05
        assert shares.max() < 0.16
    assert 0.15 < len(a.test) / 1797 < 0.25
    assert 0.05 < len(a.search) / (1797 - len(a.test)) < 0.15


def test_digits_are_normalised_and_enlarged() -> None:
    workload = digits(image_size=16)
    images, targets = workload.batch(workload.train, torch.arange(500), train=False, generator=None, device=CPU)
    assert images.shape == (500, 1, 16, 16)
    assert abs(images.mean().item()) < 0.05
    assert abs(images.std().item() - 1) < 0.05
    assert targets.unique().tolist() == list(range(10))
    assert workload.example_input().shape == (1, 1, 16, 16)


def test_augmentation_moves_images_and_repeats_with_its_generator() -> None:
    workload = digits(image_size=16, augment="flip_shift")

    def batch(seed: int, train: bool = True) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return workload.batch(workload.train, torch.arange(8), train=train, generator=generator, device=CPU)[0]

    assert torch.equal(batch(0), batch(0))
    assert not torch.equal(batch(0), batch(1))
    assert not torch.equal(batch(0), batch(0, train=False))
    plain, moved = batch(0, train=False), batch(0)
    found = False
    for dy in range(-2, 3):  # the first image is a shifted, perhaps mirrored copy
        for dx in range(-2, 3):
            for image in (plain[0], plain[0].flip(-1)):
                rolled = torch.roll(image, (dy, dx), (1, 2))
                found |= torch.allclose(rolled[:, 2:-2, 2:-2], moved[0][:, 2:-2, 2:-2])
    assert found


def test_arrays_keep_their_test_split(tmp_path: Path) -> None:
    arrays(tmp_path)
    data = {"source": "arrays", "train": str(tmp_path / "train"), "test": str(tmp_path / "test")}
    workload = build(data=data)
    assert (len(workload.train) + len(workload.search), len(workload.test)) == (60, 60)
    assert 2 <= len(workload.search) <= 12
    assert workload.test.source is not workload.train.source
    np.savez(tmp_path / "all.npz", images=np.load(tmp_path / "train_images.npy"), labels=np.arange(60) % 3)
    assert 6 <= len(build(data={"source": "arrays", "train": str(tmp_path / "all.npz")}).test) <= 18


def test_relative_paths_are_found_under_secateur_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays(tmp_path)
    data = {"source": "arrays", "train": "train", "test": "test"}
    monkeypatch.delenv("SECATEUR_DATA", raising=False)
    with pytest.raises(UserError, match="set SECATEUR_DATA"):
        build(data=data)
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    assert len(build(data=data).test) == 60
    with pytest.raises(UserError, match=r"tried .*nowhere_images\.npy and "):
        build(data={**data, "train": "nowhere"})


def test_an_image_folder_is_read_resized_and_cropped(tmp_path: Path) -> None:
    folder_of_images(tmp_path)
    workload = build(data={"source": "folder", "path": str(tmp_path), "image_size": 16})
    assert (len(workload.train) + len(workload.search), len(workload.test)) == (20, 8)
    assert workload.usage["classes"] == ["cat", "dog"]
    images, targets = workload.batch(workload.test, torch.arange(8), train=False, generator=None, device=CPU)
    assert images.shape == (8, 3, 16, 16)
    assert images[targets == 1].mean() > images[targets == 0].mean()


def test_a_torchvision_data_set_without_its_files_says_what_to_do(tmp_path: Path) -> None:
    data = {"source": "torchvision", "dataset": "CIFAR10", "path": str(tmp_path), "download": False}
    with pytest.raises(UserError, match=r"data\.download: true"):
        build(data=data)
    with pytest.raises(UserError, match="no 'CIFAR11'"):
        build(data={**data, "dataset": "CIFAR11"})


def test_a_torchvision_data_set_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    import torchvision.datasets as zoo

    for name, _ in [*zoo.CIFAR10.train_list, *zoo.CIFAR10.test_list]:
        content = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(20)]}
        (batches / name).write_bytes(pickle.dumps(content))
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    integrity = zoo.CIFAR10._check_integrity
    zoo.CIFAR10._check_integrity = lambda self: True  # our files are not the original ones
    zoo_check = zoo.cifar.check_integrity
    zoo.cifar.check_integrity = lambda *a: True
    try:
        data = {"source": "torchvision", "dataset": "CIFAR10", "path": str(tmp_path), "download": False}
        workload = build(data=data)
    finally:
        zoo.CIFAR10._check_integrity, zoo.cifar.check_integrity = integrity, zoo_check
    assert (len(workload.train) + len(workload.search), len(workload.test)) == (100, 20)
    assert workload.example_input().shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (np.zeros((4, 8, 8, 3), np.float32), np.zeros(4, np.int64), "uint8"),
        (np.zeros((4, 3, 8, 8), np.uint8), np.zeros(4, np.int64), "height, width"),
        (np.zeros((4, 8, 8, 3), np.uint8), np.zeros(3, np.int64), "4 labels"),
        (np.zeros((4, 8, 8, 3), np.uint8), np.full(4, -1), "labels from 0"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path: Path, images: np.ndarray, labels: np.ndarray, said: str) -> None:
    np.savez(tmp_path / "x.npz", images=images, labels=labels)
    with pytest.raises(UserError, match=said):
        build(data={"source": "arrays", "train": str(tmp_path / "x.npz")})


def test_pickled_arrays_are_never_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.array([{"evil": 1}], dtype=object), labels=np.zeros(1))
    with pytest.raises(UserError, match="not a readable"):
        build(data={"source": "arrays", "train": str(tmp_path / "x.npz")})


def test_folders_without_classes_or_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder 'train'"):
        build(data={"source": "folder", "path": str(tmp_path)})
    (tmp_path / "train" / "only").mkdir(parents=True)
    with pytest.raises(UserError, match="at least two classes"):
        build(data={"source": "folder", "path": str(tmp_path)})
    (tmp_path / "train" / "other").mkdir()
    with pytest.raises(UserError, match="no images"):
        build(data={"source": "folder", "path": str(tmp_path)})


def test_weights_that_do_not_fit_name_the_first_mismatches(tmp_path: Path) -> None:
    state = digits().build_model().state_dict()
    wrong = {name: t for name, t in state.items() if name != "linear.bias"} | {"linear.weight": torch.zeros(7, 64)}
    save_file(wrong | {"extra": torch.zeros(1)}, tmp_path / "w.safetensors")
    workload = build(model={"name": "cifar/resnet8", "weights": str(tmp_path / "w.safetensors")})
    with pytest.raises(UserError) as caught:
        workload.build_model()
    for part in ("linear.bias: not in the file", "extra: not in the network", "(7, 64) in the file, (10, 64) in the"):
        assert part in str(caught.value)


def test_weights_load_from_safetensors_and_pt_but_never_from_pickled_code(tmp_path: Path) -> None:
    state = digits().build_model().state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        model = build(model={"name": "cifar/resnet8", "weights": str(tmp_path / name)}).build_model()
        assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="cannot read weights"):
        build(model={"name": "cifar/resnet8", "weights": str(tmp_path / "evil.pt")})
    assert not Bomb.gone_off


def test_an_averaged_copy_is_read_with_a_note(tmp_path: Path) -> None:
    state = digits().build_model().state_dict()
    other = {name: tensor + 1 for name, tensor in state.items()}
    averaged = {"n_averaged": torch.tensor(3)} | {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"model": other, "model_ema": averaged, "epoch": 3}, tmp_path / "w.pt")
    workload = build(model={"name": "cifar/resnet8", "weights": str(tmp_path / "w.pt")})
    before = torch.get_rng_state()
    file, note = tmp_path / "w.pt", [note for note in workload.notes if "weights" in note]
    assert torch.equal(torch.get_rng_state(), before)
    assert note == [
        f"weights {file}: the averaged weights, those under 'model_ema.module', were read, not those under 'model'"
    ]
    assert all(torch.equal(t, state[k]) for k, t in workload.build_model().state_dict().items())


class Bomb:
    """Sets a flag when unpickled."""

    gone_off = False

    def __reduce__(self) -> tuple[object, tuple[()]]:
        return _explode, ()


def _explode() -> None:
    Bomb.gone_off = True


def test_unknown_networks_list_near_names() -> None:
    with pytest.raises(UserError, match="did you mean 'cifar/resnet"):
        build(model={"name": "cifar/resnet21"}).build_model()
    with pytest.raises(UserError, match="channels: 3"):
        build(model={"name": "resnet18"}).build_model()


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    assert digits().fingerprint == digits().fingerprint
    assert digits().fingerprint != digits(image_size=12).fingerprint
    arrays(tmp_path)
    data = {"source": "arrays", "train": str(tmp_path / "train"), "test": str(tmp_path / "test")}
    before = build(data=data).fingerprint
    images = np.load(tmp_path / "train_images.npy")
    images[0, 0, 0, 0] ^= 1
    np.save(tmp_path / "train_images.npy", images)
    assert build(data=data).fingerprint != before


def test_metrics_know_the_right_answers() -> None:
    outputs = torch.tensor([[5.0, 0.0], [0.0, 5.0], [5.0, 0.0], [5.0, 0.0]])
    metrics = digits().metrics(outputs, torch.tensor([0, 1, 1, 0]))
    assert metrics["top1"] == 0.75
    assert metrics["loss"] == pytest.approx((3 * 0.0067153 + 5.0067153) / 4, abs=1e-4)


def test_options_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValidationError):
        classification.Options.model_validate({"data": {"sorce": "digits"}})


def test_every_accuracy_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(400, 10, generator=generator)
    targets = (torch.rand(400, generator=generator) ** 3 * 10).long()  # some classes are rare
    found = digits().test_metrics(outputs, targets)
    assert found["top1"] == pytest.approx((outputs.argmax(1) == targets).float().mean().item())
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(targets, outputs.argmax(1)))
    assert found["top5"] == pytest.approx(top_k_accuracy_score(targets, outputs.numpy(), k=5, labels=range(10)))


@pytest.mark.parametrize("metric", ["top1", "top5", "balanced_accuracy"])
def test_the_metric_of_the_run_file_is_the_gates_and_its_bound_holds(metric: str) -> None:
    workload = build(metric=metric, model={"name": "cifar/resnet8"})
    assert (workload.metric, workload.search_metric) == (metric, metric)
    assert workload.fingerprint == digits().fingerprint, "the data is the same"
    generator = torch.Generator().manual_seed(1)
    outputs, targets = torch.randn(60, 10, generator=generator), torch.randint(0, 10, (60,), generator=generator)
    whole = workload.metrics(outputs, targets)[metric]
    for seen in (5, 30, 59, 60):
        assert workload.bound(outputs[:seen], targets[:seen], 60 - seen) >= whole - 1e-6
    assert workload.bound(outputs, targets, 0) == pytest.approx(whole)
