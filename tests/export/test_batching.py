from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from secateur.export import batching, export_onnx, predict
from secateur.export.batching import WIDE, WORTH, Predictor, ties, twin_of
from tests.export.nets import Flat, Mobile, Shuffle, prepared

X = torch.randn(WORTH + 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Boxes(nn.Module):
    """Heads of a detector: one row for every place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).permute(0, 2, 3, 1).reshape(1, -1, 3)


class AcrossTheBatch(nn.Module):
    """One sample's output depends on the others of its batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) - x.mean((0, 2, 3))


class Folded(nn.Module):
    """Reads the batch as something else: a batch of more than one fails."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.reshape(3, 64)).sum(0, keepdim=True)


def exported(model: nn.Module, folder: Path) -> Path:
    return export_onnx(model, X[:1], folder / "m.onnx").path


@pytest.mark.parametrize("make", [Flat, Mobile, Shuffle, Boxes])
def test_a_twin_answers_as_the_very_file_does(make: type[nn.Module], tmp_path: Path) -> None:
    file = exported(prepared(make()), tmp_path)
    answer = Predictor(file)
    found, expected = answer(X.numpy()), predict(file, X.numpy())
    assert answer.twin is not None
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    if expected.ndim == 2:
        assert np.array_equal(found.argmax(1), expected.argmax(1))
    else:
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("make", [AcrossTheBatch, Folded])
def test_a_network_that_a_wider_batch_changes_is_answered_by_the_very_file(
    make: type[nn.Module], tmp_path: Path
) -> None:
    file = exported(prepared(make()), tmp_path)
    answer = Predictor(file)
    assert np.array_equal(answer(X.numpy()), predict(file, X.numpy()))
    assert answer.twin is None


def test_few_samples_and_files_of_an_open_batch_need_no_twin(tmp_path: Path) -> None:
    model = prepared(Flat())
    few = Predictor(exported(model, tmp_path))
    assert np.array_equal(few(X[: WORTH - 1].numpy()), predict(few.path, X[: WORTH - 1].numpy()))
    wide = Predictor(export_onnx(model, X[:1], tmp_path / "n.onnx", dynamic_batch=True).path)
    torch.testing.assert_close(torch.from_numpy(wide(X.numpy())), model(X).detach(), rtol=1e-4, atol=1e-5)
    assert few.twin is wide.twin is None


def test_the_very_file_answers_where_the_twin_could_turn_the_best_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slightly_off(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
        twin = twin_of(model, batch)
        bias = next(t for t in twin.graph.initializer if list(t.dims) == [2])
        bias.CopyFrom(numpy_helper.from_array(np.array([1e-1 + 5e-5, 0], np.float32), bias.name))
        return twin

    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2))
        layer.bias.copy_(torch.tensor([0.1, 0.0]))
    x = torch.rand(WORTH, 2, generator=torch.Generator().manual_seed(0))
    x[0] = torch.tensor([1.0, 0.0])  # the largest output, to which the tolerance is relative
    x[WIDE] = torch.tensor([0.4, 0.50001])  # the twin takes these for the first class
    x[-1] = torch.tensor([0.6, 0.70002])
    file = export_onnx(layer, x[:1], tmp_path / "m.onnx").path
    monkeypatch.setattr(batching, "twin_of", slightly_off)
    answer = Predictor(file)
    found, expected = answer(x.numpy()), predict(file, x.numpy())
    assert answer.twin is not None
    assert not np.array_equal(found, expected)  # the twin's word was taken
    assert np.array_equal(found[[WIDE, -1]], expected[[WIDE, -1]])
    assert np.array_equal(found.argmax(1), expected.argmax(1))
    assert np.array_equal(Predictor(file, tolerance=1e-6)(x.numpy()), expected)  # a twin that far off is none


def test_ties() -> None:
    near = ties(np.array([[3.0, 1.0, 2.9], [3.0, 3.0, 0.0], [1.0, 2.0, 4.0], [np.nan, 1.0, 2.0]]), 0.2)
    assert near.tolist() == [True, True, False, True]
