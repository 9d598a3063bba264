"""What a forward leaves in a model: tracing puts it back, and a pruned network does not get it."""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.pruning.cost import count
from secateur.pruning.saliency import uniform_plan
from secateur.pruning.snapshot import Snapshot
from secateur.pruning.surgery import certify, prune
from secateur.pruning.trace import trace
from secateur.pruning.tracer import PruningError, undisturbed
from tests.pruning.models import Net, certified, half, randomise

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
SEEN: dict[str, Tensor] = {}


class Store:
    """A plain object that belongs to a model."""

    def __init__(self) -> None:
        self.last: Tensor | None = None


class Keeps(nn.Module):
    """conv, conv, conv; subclasses keep something between the first two."""

    shared: dict[str, Tensor] = {}  # noqa: RUF012 - a cache of the class is one of the cases

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)
        self.prepare()

    def prepare(self) -> None: ...

    def keep(self, y: Tensor) -> Tensor:
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.keep(self.first(x))))


class CacheAttribute(Keeps):
    def prepare(self) -> None:
        self.fused: Tensor | None = None

    def keep(self, y: Tensor) -> Tensor:
        if self.fused is None:
            self.fused = self.first.weight.abs().sum((1, 2, 3)).view(1, -1, 1, 1)
        return y * self.fused


class CacheWithFlag(Keeps):
    def prepare(self) -> None:
        self.ready = False

    def keep(self, y: Tensor) -> Tensor:
        if not self.ready:
            self.scale = self.first.bias.view(1, -1, 1, 1) + 2
            self.ready = True
        return y * self.scale


class CacheInDict(Keeps):
    def prepare(self) -> None:
        self.cache: dict[Any, Any] = {"calls": 0}

    def keep(self, y: Tensor) -> Tensor:
        self.cache["calls"] += 1
        if y.shape[2:] not in self.cache:
            self.cache[y.shape[2:]] = [self.first.weight.flatten(1).norm(dim=1).view(1, -1, 1, 1)]
        return y * self.cache[y.shape[2:]][0]


class ListOfFeatures(Keeps):
    def prepare(self) -> None:
        self.features: list[Tensor] = []

    def keep(self, y: Tensor) -> Tensor:
        self.features.append(y)
        return y


class FreshList(Keeps):
    def prepare(self) -> None:
        self.features: list[Tensor] = []

    def keep(self, y: Tensor) -> Tensor:
        self.features = [y, y + 1]
        return self.features[1]


class DequeOfFeatures(Keeps):
    def prepare(self) -> None:
        self.features: deque[Tensor] = deque(maxlen=2)

    def keep(self, y: Tensor) -> Tensor:
        self.features.append(y)
        return y


class FeatureAttribute(Keeps):
    def keep(self, y: Tensor) -> Tensor:
        self.seen = {"first": y}
        return y


class InAnObject(Keeps):
    def prepare(self) -> None:
        self.store = Store()

    def keep(self, y: Tensor) -> Tensor:
        self.store.last = y
        return y


class OfTheClass(Keeps):
    def keep(self, y: Tensor) -> Tensor:
        type(self).shared["y"] = y.sum((0, 1))
        type(self).newest = y.sum((0, 1))
        return y


class BufferAssigned(Keeps):
    def prepare(self) -> None:
        self.register_buffer("mean", torch.zeros(8), persistent=False)
        self.register_buffer("mask", None, persistent=False)

    def keep(self, y: Tensor) -> Tensor:
        self.mean = y.mean((0, 2, 3))
        self.mask = torch.ones_like(y)
        return y - self.mean.view(1, -1, 1, 1)


class BufferWritten(Keeps):
    def prepare(self) -> None:
        self.register_buffer("mean", torch.ones(8))
        self.plain = torch.ones(3)

    def keep(self, y: Tensor) -> Tensor:
        self.mean.mul_(0.5).add_(y.mean((0, 2, 3)))
        self.plain.add_(1)
        return y - self.mean.view(1, -1, 1, 1)


class WeightReplaced(Keeps):
    def keep(self, y: Tensor) -> Tensor:
        self.second.weight.data = self.second.weight.data * 0.5
        return y


class LayerMadeLate(Keeps):
    def keep(self, y: Tensor) -> Tensor:
        if not hasattr(self, "late"):
            self.late = nn.Conv2d(y.shape[1], 8, 1)
        return self.late(y)


class OwnGenerator(Keeps):
    def prepare(self) -> None:
        self.random = torch.Generator().manual_seed(3)
        self.spare = nn.ModuleDict()

    def keep(self, y: Tensor) -> Tensor:
        return y + torch.rand(1, generator=self.random).item() * 0


def with_hook(make: Callable[[], Callable[..., None]]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = Keeps()
        model.first.register_forward_hook(make())
        return model

    return build


def closing_over() -> Callable[..., None]:
    features: dict[str, Tensor] = {}

    def hook(_: nn.Module, __: Any, out: Tensor) -> None:
        features["first"] = out

    hook.features = features  # type: ignore[attr-defined]
    return hook


def naming_a_global() -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, out: Tensor) -> None:
        SEEN["first"] = out

    return hook


class Recorder:
    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    def take(self, _: nn.Module, __: Any, out: Tensor) -> None:
        self.outputs.append(out)


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{
        kind.__name__: kind
        for kind in (
            CacheAttribute,
            CacheWithFlag,
            CacheInDict,
            ListOfFeatures,
            FreshList,
            DequeOfFeatures,
            FeatureAttribute,
            InAnObject,
            OfTheClass,
            BufferAssigned,
            BufferWritten,
            WeightReplaced,
            LayerMadeLate,
            OwnGenerator,
        )
    },
    "hook that closes over a dict": with_hook(closing_over),
    "hook that names a global": with_hook(naming_a_global),
    "hook that is a method": with_hook(lambda: Recorder().take),
}


def image_of(value: Any, seen: tuple[int, ...] = ()) -> Any:
    """All that a value holds, in a form that can be compared; written apart from ``secateur.pruning.snapshot``."""
    if id(value) in seen:
        return "again"
    seen = (*seen, id(value))
    if isinstance(value, Tensor):
        return tuple(value.shape), value.detach().flatten().tolist()
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, nn.Module):
        cached = {name: item for name, item in vars(type(value)).items() if isinstance(item, (dict, Tensor))}
        return image_of(vars(value), seen), image_of(cached, seen)
    if isinstance(value, dict):
        return {str(key): image_of(item, seen) for key, item in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [image_of(item, seen) for item in value]
    if isinstance(value, (Store, Recorder)):
        return image_of(vars(value), seen)
    if hasattr(value, "__self__"):
        return image_of(value.__self__, seen)
    return image_of(value.features, seen) if hasattr(value, "features") else str(value)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("has_run", [False, True])
def test_tracing_and_all_that_runs_a_model_leave_no_marks(name: str, has_run: bool) -> None:
    SEEN.clear()
    model = randomise(MODELS[name]()).train()
    if has_run:
        model(IMAGES)
    before = image_of(model), image_of(SEEN)
    graph = trace(model, IMAGES)
    plan = half(graph)
    certify(model, prune(model, graph, plan), graph, plan, IMAGES)
    count(model, IMAGES)
    assert (image_of(model), image_of(SEEN)) == before


@pytest.mark.parametrize("name", [name for name in MODELS if name != "LayerMadeLate"])
@pytest.mark.parametrize("gradients", [False, True])
def test_what_a_forward_kept_does_not_reach_the_pruned_network(name: str, gradients: bool) -> None:
    SEEN.clear()
    model = randomise(MODELS[name]()).eval()
    graph = trace(model, IMAGES)
    assert graph.groups
    plan = half(graph)
    with torch.set_grad_enabled(gradients):  # caches and features of the dense size are there now
        model(IMAGES)
        model(IMAGES[:, :, :6])
    pruned = prune(model, graph, plan)
    certificate = certify(model, pruned, graph, plan, IMAGES)
    assert certificate.ok, certificate
    widths = {group.size for group in graph.groups}
    kept = [t for item in vars(pruned).values() for t in (item, getattr(item, "last", None)) if isinstance(t, Tensor)]
    assert not [t.shape for t in kept if t.ndim > 1 and t.shape[1] in widths]
    with torch.no_grad():
        assert pruned(IMAGES).shape == model(IMAGES).shape


def test_a_model_traced_after_a_run_is_pruned_rightly() -> None:
    for name, make in MODELS.items():
        SEEN.clear()
        model = randomise(make()).eval()
        model(IMAGES)
        graph = trace(model, IMAGES)
        plan = half(graph)
        certificate = certify(model, prune(model, graph, plan), graph, plan, IMAGES)
        assert certificate.ok, (name, certificate)


def test_what_cannot_be_copied_is_named() -> None:
    model = Keeps()
    graph = trace(model, IMAGES)
    model.second.lock = threading.Lock()
    with pytest.raises(PruningError, match="attribute 'lock' of second"):
        prune(model, graph, half(graph))


def test_references_are_kept_and_not_weights() -> None:
    model = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300))
    taken = Snapshot(model)
    copies = [values for *_, values in taken._tensors if values is not None]
    assert sum(values.numel() for values in copies) == 2 * 300 + 1


def test_two_threads_trace_at_once() -> None:
    torch.backends.mha.set_fastpath_enabled(True)
    models = [randomise(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), seed).eval() for seed in range(4)]
    tokens = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    alone = [group.name for group in trace(models[0], tokens).groups]
    found: list[Any] = []
    stop = threading.Event()

    def trace_often(model: nn.Module) -> None:
        try:
            for _ in range(3):
                graph = trace(model, tokens)
                plan = half(graph)
                found.append([g.name for g in graph.groups])
                assert certify(model, prune(model, graph, plan), graph, plan, tokens).ok
        except Exception as error:  # noqa: BLE001 - whatever a thread raises is to be shown
            found.append(error)

    def infer() -> None:
        other = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8)))
        while not stop.is_set():
            try:
                with torch.no_grad():
                    other(tokens)
            except Exception as error:  # noqa: BLE001 - the same
                found.append(error)
                return

    threads = [threading.Thread(target=trace_often, args=(model,)) for model in (*models, models[0])]
    bystander = threading.Thread(target=infer)
    bystander.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    bystander.join()
    assert found == [alone] * 15
    assert torch.backends.mha.get_fastpath_enabled()


def test_no_flag_of_torch_is_changed_for_other_threads() -> None:
    torch.backends.mha.set_fastpath_enabled(True)
    seen: list[bool] = []
    with undisturbed(nn.Linear(2, 2)):
        other = threading.Thread(
            target=lambda: seen.extend((torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled()))
        )
        other.start()
        other.join()
    assert seen == [True, True]


def test_fused_attention_of_a_module_is_not_taken() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(1, 3, 8)
    graph = trace(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), x)
    assert graph.groups
    with undisturbed(layer):
        assert F.relu(layer(x, x, x)[0]).shape == x.shape


class Makers(OrderedDict[str, type[nn.Module]]):
    """A dict whose items are made when they are looked up (the activations of transformers)."""

    def __getitem__(self, key: str) -> nn.Module:
        raise AssertionError(f"{key} was looked up")


MAKERS = Makers(relu=nn.ReLU)


def test_a_dict_that_makes_its_items_is_not_asked_for_them() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        assert "relu" in MAKERS
        return m.b(m.a(x).relu())

    model = Net(run, a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    model.makers = MAKERS
    graph, certificate = certified(model, torch.randn(2, 4))
    assert certificate.ok and len(graph.groups) == 1


class Holder:
    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors


ANCHORS: dict[str, tuple[Callable[[list[Tensor]], Any], Callable[[Any], list[Tensor]]]] = {
    "a list": (list, list),
    "a tuple": (tuple, list),
    "a dict": (lambda tensors: dict(enumerate(tensors)), lambda held: list(held.values())),
    "a list of lists": (lambda tensors: [[tensor] for tensor in tensors], lambda held: [tensor for (tensor,) in held]),
    "an object": (Holder, lambda held: held.tensors),
}
"""How a module holds tensors: made of them, and read."""


class Anchored(nn.Module):
    """Keeps tensors from its construction, and makes what holds them anew in every forward, of the type it works in."""

    def __init__(self, held_in: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.make, self.read = ANCHORS[held_in]
        self.anchors = self.make([torch.arange(4, dtype=dtype), torch.ones(4, dtype=dtype)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.anchors = self.make([tensor.to(x.dtype) for tensor in self.read(self.anchors)])
        first, second = self.read(self.anchors)
        return self.head(self.conv(x).relu()).mean((2, 3)) * first + second


@pytest.mark.parametrize("held_in", ANCHORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("has_run", [False, True])
def test_what_a_module_was_made_with_reaches_the_pruned_network(
    held_in: str, dtype: torch.dtype, has_run: bool
) -> None:
    model, example = Anchored(held_in, dtype).eval(), torch.randn(1, 3, 8, 8)
    if has_run:
        model(example)
    graph = trace(model, example)
    assert [group.name for group in graph.groups] == ["conv"]
    plan = uniform_plan(graph, 0.5, model=model)
    assert certify(model, prune(model, graph, plan), graph, plan, example).ok


def test_tracing_collects_cycles_of_its_own_only_and_leaves_the_collector_as_it_was() -> None:
    collected = []

    def generation(phase: str, info: dict[str, int]) -> None:
        collected.append(info["generation"])

    class MakesCycles(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(200_000):
                cycle: list[object] = []
                cycle.append(cycle)
            return x

    thresholds, frozen = gc.get_threshold(), gc.get_freeze_count()
    gc.callbacks.append(generation)
    try:
        trace(nn.Sequential(nn.Conv2d(3, 4, 3), MakesCycles(), nn.Conv2d(4, 4, 3)), IMAGES)
    finally:
        gc.callbacks.remove(generation)
    assert set(collected) == {0, 1}
    assert (gc.get_threshold(), gc.get_freeze_count()) == (thresholds, frozen)
