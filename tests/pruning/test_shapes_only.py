"""Runs without arithmetic: every operator gives the shape and the layout that computing gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.pruning import trace
from secateur.pruning.rules import tensors_in
from secateur.pruning.shapes_only import LARGE, NoArithmetic

CHANNELS, SIDE = 8, 72
CONV = nn.Conv2d(3, CHANNELS, 3, padding=1).eval()
LAYOUTS = {"in order": torch.contiguous_format, "channels last": torch.channels_last}
LIGHT: dict[str, Callable[[Tensor], Any]] = {
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu, roughly": lambda x: F.gelu(x, approximate="tanh"),
    "relu in place": lambda x: F.relu(x, inplace=True),
    "clamp": lambda x: x.clamp(1, 6),
    "numbers": lambda x: 2 * x + 1,
    "one for each channel": lambda x: torch.ones(1, CHANNELS, 1, 1) + x,
    "one for each channel, in place": lambda x: x.add_(torch.ones(CHANNELS, 1, 1)),
    "one for each column": lambda x: x + torch.ones(SIDE),
    "another type": lambda x: x + torch.ones((), dtype=torch.float64) + torch.ones(SIDE, dtype=torch.float64),
    "a larger one": lambda x: x[:1] + torch.ones(3, 1, 1, 1),
    "transposed": lambda x: x.transpose(1, 3) + x.transpose(1, 3),
    "one transposed": lambda x: x.transpose(2, 3) + x,
    "a mask": lambda x: x.masked_fill(torch.ones(SIDE, dtype=torch.bool), 1.0),
    "batch norm": nn.BatchNorm2d(CHANNELS).eval(),
    "batch norm without weights": nn.BatchNorm2d(CHANNELS, affine=False).eval(),
    "layer norm": nn.LayerNorm(SIDE),
    "layer norm without weights": nn.LayerNorm((SIDE, SIDE), elementwise_affine=False),
    "group norm": nn.GroupNorm(2, CHANNELS),
    "softmax": lambda x: x.softmax(1),
    "log softmax": lambda x: x.log_softmax(-1),
    "joined": lambda x: torch.cat([x, x[:, :3], x], 1),
    "copied": lambda x: x.permute(0, 2, 3, 1).contiguous(),
    "copied as it is": lambda x: x.transpose(1, 2).clone(),
    "rolled": lambda x: x.roll((3, -3), (2, 3)),
    "padded": lambda x: F.pad(x, (1, 2, 3, 4)),
    "cropped": lambda x: F.pad(x, (-1, 2)),
    "pooled": lambda x: F.adaptive_avg_pool2d(x, 5),
    "enlarged": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "enlarged by neighbours": lambda x: F.interpolate(x, size=(80, 90)),
    "mean": lambda x: x.mean((2, 3)),
    "mean that keeps dimensions": lambda x: x.mean((2, 3), keepdim=True),
    "sum of all": lambda x: x.sum(),
    "compared": lambda x: x > 0,
    "as integers": lambda x: x.long(),
}
WRONG: dict[str, Callable[[Tensor], Any]] = {
    "sizes that do not face each other": lambda x: x + torch.ones(SIDE + 1),
    "larger than what is written": lambda x: x.add_(torch.ones(3, 1, 1, 1)),
    "other features": nn.BatchNorm2d(CHANNELS + 1).eval(),
    "another last dimension": nn.LayerNorm(SIDE + 1),
    "joined across": lambda x: torch.cat([x, x[:, :, 1:]], 1),
    "no such dimension": lambda x: x.softmax(4),
    "no such dimensions": lambda x: x.mean((2, 5)),
    "a dimension twice": lambda x: x.mean((2, -2)),
    "rolled without a place": lambda x: x.roll((1, 2), (2,)),
}


def described(outputs: Any) -> list[tuple[Any, ...]]:
    return [(tuple(t.shape), t.stride(), t.dtype, t.device) for t in tensors_in((outputs,))]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LIGHT)
def test_an_answer_has_the_shape_and_the_layout_of_what_is_computed(name: str, layout: str) -> None:
    images = torch.randn(2, 3, SIDE, SIDE).contiguous(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    assert CHANNELS * SIDE * SIDE > LARGE
    with torch.no_grad():
        computed = LIGHT[name](CONV(images))
        with NoArithmetic():
            answered = LIGHT[name](CONV(images))
    assert described(answered) == described(computed)


def test_light_operators_of_zeros_are_not_computed() -> None:
    with torch.no_grad(), NoArithmetic():
        answered = torch.sigmoid(CONV(torch.randn(2, 3, SIDE, SIDE)))
        computed = torch.sigmoid(torch.zeros(2, CHANNELS, SIDE, SIDE))
    assert not answered.any()
    assert (computed == 0.5).all()


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_computed_cannot_be_answered(name: str) -> None:
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        with pytest.raises((RuntimeError, IndexError)):
            WRONG[name](CONV(images))
        with NoArithmetic(), pytest.raises((RuntimeError, IndexError)):
            WRONG[name](CONV(images))


def test_writing_into_an_answer_changes_no_other() -> None:
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad(), NoArithmetic():
        first, second = CONV(images), CONV(images)
        first[:, :2].copy_(torch.ones(2, 2, SIDE, SIDE))
    assert (first[:, :2] == 1).all()
    assert not second.any()


class Normed(nn.Module):
    """Images normalised one by one; the channels' number is read, so that trials follow the trace."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 1), norm(8)) for _ in range(4)), nn.Conv2d(8, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            y = layer(x)
            x = y.view(y.shape[0], y.shape[1], -1).view_as(y).relu()
        return self.layers[-1](x)


def test_sizes_that_torch_compares_in_its_own_norms_are_not_tried_one_by_one() -> None:
    runs = {}
    for norm in (nn.BatchNorm2d, nn.InstanceNorm2d):
        model, calls = Normed(norm).eval(), list[int]()
        model.register_forward_hook(lambda *_, calls=calls: calls.append(1))  # type: ignore[misc]
        assert len(trace(model, torch.randn(1, 8, 6, 6)).groups) == 4
        runs[norm] = len(calls)
    assert runs[nn.InstanceNorm2d] <= runs[nn.BatchNorm2d] + 1  # followed sizes are compared once with the masked
