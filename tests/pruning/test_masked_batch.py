"""Several masks in one batch give what each pruned network gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from secateur.pruning.masked_batch import MaskedBatchError, outputs_under_masks
from secateur.pruning.plan import PruningPlan
from secateur.pruning.surgery import prune
from secateur.pruning.trace import trace
from tests.pruning.models import CifarResNet, randomise


class Small(nn.Module):
    """A depthwise layer in between, a flatten, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.last = nn.Conv2d(12, 6, 3, stride=4)
        self.fc, self.side = nn.Linear(6 * 16, 5), nn.Linear(6 * 16, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.last(torch.relu(self.deep(torch.relu(self.first(x))))))
        return self.fc(x.flatten(1)), self.side(x.flatten(1))


def drawn(graph, number: int) -> list[PruningPlan]:
    rng = np.random.default_rng(0)
    return [
        PruningPlan.from_masks({g.name: rng.permutation(g.size) < rng.integers(1, g.size + 1) for g in graph.groups})
        for _ in range(number)
    ]


@pytest.mark.parametrize("model", [Small(), CifarResNet("A"), CifarResNet("B")], ids=["small", "A", "B"])
def test_every_part_of_the_batch_is_a_pruned_network(model):
    torch.manual_seed(0)
    model, images = randomise(model).eval(), torch.randn(3, 3, 16, 16)
    graph = trace(model, images[:1])
    plans = [*drawn(graph, 4), PruningPlan.full(graph.groups)]
    found = outputs_under_masks(model, graph, plans, images)
    assert len(found) == len(plans)
    for output, plan in zip(found, plans, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(output, prune(model, graph, plan)(images), atol=1e-4, rtol=1e-4)


def test_what_cannot_be_masked_is_refused():
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.norm(self.a(x)))

    model, images = Normed().eval(), torch.randn(2, 8)
    graph = trace(model, images[:1])
    with pytest.raises(MaskedBatchError, match="sees the removed channels"):
        outputs_under_masks(model, graph, drawn(graph, 2), images)
