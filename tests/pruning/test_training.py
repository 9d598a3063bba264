"""A pruned network is an ordinary network: it trains, compiles, exports, copies, loads and runs distributed."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from secateur.pruning.surgery import load_pruned, prune, save_pruned
from secateur.pruning.trace import trace
from tests.pruning.models import CifarResNet, Net, PlainCNN, Tied, half, randomise

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
VECTORS = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([0, 1, 2, 3])
ROOT = Path(__file__).parents[2]


def mobile() -> nn.Module:
    """Depthwise convolutions, squeeze and excitation, residuals."""
    block = torchvision.models.mobilenetv3.InvertedResidualConfig(16, 3, 32, 16, True, "HS", 1, 1, 1.0)
    return torchvision.models.MobileNetV3([block], 24, num_classes=5, dropout=0.0)


class Transformer(nn.Module):
    """Patches, an encoder layer, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).mT).mean(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "plain": (PlainCNN, IMAGES),
    "resnet": (lambda: CifarResNet("B"), IMAGES),
    "resnet A": (lambda: CifarResNet("A"), IMAGES),
    "mobile": (mobile, IMAGES),
    "tied": (Tied, VECTORS),
    "transformer": (Transformer, IMAGES),
}
networks = pytest.mark.parametrize("name", NETWORKS)


def pruned_half(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The dense network, its pruned half in eval mode, and an input."""
    torch.manual_seed(0)
    build, x = NETWORKS[name]
    model = randomise(build())
    graph = trace(model, x)
    return model, prune(model, graph, half(graph)).eval(), x


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(
        found.double(), expected.double(), rtol=tolerance, atol=tolerance * float(expected.detach().abs().max())
    )


@networks
def test_training(name: str) -> None:
    dense, pruned, x = pruned_half(name)
    before = {n: p.detach().clone() for n, p in dense.named_parameters()}
    pruned.train()
    targets = TARGETS % 2
    optimiser = torch.optim.SGD(pruned.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(pruned(x), targets)
        optimiser.zero_grad()
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is not None and p.grad.shape == p.shape for p in pruned.parameters())
        optimiser.step()
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, before[n]) for n, p in dense.named_parameters())


def test_a_head_that_only_training_uses() -> None:
    def run(m: Net, x: Tensor) -> list[Tensor]:
        y = m.trunk(x)
        return [m.head(y), m.auxiliary(y)] if m.training else [m.head(y)]

    model = Net(run, trunk=nn.Conv2d(3, 8, 1), head=nn.Conv2d(8, 2, 1), auxiliary=nn.Conv2d(8, 2, 1))
    graph = trace(model, IMAGES)
    pruned = prune(model, graph, half(graph)).train()
    assert [tuple(y.shape) for y in pruned(IMAGES)] == [(4, 2, 16, 16)] * 2


@networks
def test_states(name: str) -> None:
    dense, pruned, x = pruned_half(name)
    state = pruned.state_dict()
    assert list(state) == list(dense.state_dict())
    assert sum(t.numel() for t in state.values()) < sum(t.numel() for t in dense.state_dict().values())
    expected = pruned(x)
    for parameter in (twin := copy.deepcopy(pruned)).parameters():
        nn.init.zeros_(parameter)
    assert not same(twin(x), expected) and same(pruned(x), expected)
    twin.load_state_dict(state, strict=True)
    assert torch.equal(twin(x), expected)
    with pytest.raises(RuntimeError, match="size mismatch"):
        dense.load_state_dict(state)


@networks
def test_saved_after_training(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, x = NETWORKS[name]
    model = build()
    graph = trace(model, x)
    plan = half(graph)
    pruned = prune(model, graph, plan).train()
    pruned(x).square().sum().backward()
    torch.optim.SGD(pruned.parameters(), lr=1e-3, momentum=0.9).step()
    save_pruned(tmp_path, pruned, plan)
    loaded = load_pruned(tmp_path, build(), graph)[0]
    assert torch.equal(loaded.eval()(x), pruned.eval()(x))


@networks
@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace(name: str) -> None:
    _, pruned, x = pruned_half(name)
    with torch.no_grad():
        traced = torch.jit.trace(pruned, (x,), check_trace=False)
        assert same(traced(x), pruned(x))


@pytest.mark.parametrize("name", ["resnet A", "mobile", "transformer"])
def test_export(name: str) -> None:
    _, pruned, x = pruned_half(name)
    program = torch.export.export(pruned, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    more = torch.cat([x, x.flip(0)])
    assert same(program.module()(more), pruned(more))


@pytest.mark.parametrize("name", ["plain", "mobile", "tied"])
def test_compile_eager(name: str) -> None:
    torch._dynamo.reset()
    _, pruned, x = pruned_half(name)
    compiled = torch.compile(pruned, backend="eager", fullgraph=True)
    assert same(compiled(x), pruned(x))
    compiled.train()
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in pruned.parameters())


WORKER = """
import json, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests.pruning.test_training import IMAGES, TARGETS, pruned_half

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
model = DistributedDataParallel(pruned_half("resnet")[1])
part = slice(2 * rank, 2 * rank + 2)
torch.nn.functional.cross_entropy(model(IMAGES[part]), TARGETS[part]).backward()
gradients = {n: p.grad.double().flatten().tolist() for n, p in model.module.named_parameters()}
with open(out, "w") as file:
    json.dump(gradients, file)
dist.destroy_process_group()
"""


@pytest.mark.long
def test_distributed_data_parallel(tmp_path: Path) -> None:
    outs = [tmp_path / "0.json", tmp_path / "1.json"]
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path / "store"), str(out)], cwd=ROOT)
        for rank, out in enumerate(outs)
    ]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    first, second = (json.loads(out.read_text()) for out in outs)
    assert first == second
    pruned = pruned_half("resnet")[1]
    F.cross_entropy(pruned(IMAGES), TARGETS).backward()  # eval mode: batch statistics do not matter
    assert first.keys() == {n for n, _ in pruned.named_parameters()}
    for name, parameter in pruned.named_parameters():
        assert parameter.grad is not None
        assert same(torch.tensor(first[name]), parameter.grad.double().flatten(), 1e-4), name


def test_looking_at_what_runs_in_training_only_leaves_running_statistics_as_they_were() -> None:
    def run(m: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        y = m.norm(m.trunk(x)).relu()
        return [m.head(y), m.auxiliary(y)] if m.training else [m.head(y)]

    parts = {"trunk": nn.Conv2d(3, 8, 1), "norm": nn.BatchNorm2d(8), "head": nn.Conv2d(8, 2, 1)}
    model = Net(run, **parts, auxiliary=nn.Conv2d(8, 2, 1)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trace(model, torch.randn(2, 3, 4, 4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
