"""Whatever backend candidates go through, they give what the plain pruned network gives."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur.pipeline.evaluation.inference
from secateur.export.slicing import OnnxTemplate
from secateur.pipeline.evaluation.inference import Inference
from secateur.pipeline.training.precision import DTYPES, Precision, native_bf16
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.masked_batch import MaskedBatchError
from secateur.pruning.plan import PruningPlan
from secateur.pruning.trace import trace
from secateur.pruning.weights import inherit
from tests.numerics import LOWERED, assert_same, pretend_bf16, rounding_of, run_lowered

CPU = torch.device("cpu")
BATCHES = [torch.from_numpy(np.random.default_rng(n).normal(size=(n, 3, 12, 12)).astype(np.float32)) for n in (40, 23)]


def normed(channels: int, width: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    )


class Residual(nn.Module):
    """Stem, two blocks with a projection between them, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = normed(3, 20)
        self.inner1, self.outer1 = normed(20, 18), nn.Conv2d(18, 20, 3, 1, 1)
        self.inner2, self.outer2 = normed(20, 26, 2), nn.Conv2d(26, 34, 3, 1, 1)
        self.project = nn.Conv2d(20, 34, 1, 2)
        self.head = nn.Linear(34, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.outer1(self.inner1(x)))
        x = F.relu(self.project(x) + self.outer2(self.inner2(x)))
        return cast(Tensor, self.head(x.mean((2, 3))))


class Depthwise(nn.Module):
    """An inverted bottleneck with squeeze-and-excitation, flattened into its head."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depthwise = normed(3, 20), normed(20, 20, 2, groups=20)
        self.squeeze, self.excite = nn.Conv2d(20, 5, 1), nn.Conv2d(5, 20, 1)
        self.project = nn.Conv2d(20, 9, 1)
        self.head = nn.Linear(9 * 36, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.expand(x))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return cast(Tensor, self.head(torch.flatten(self.project(x), 1)))


class Dense(nn.Module):
    """Every layer reads all layers before it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = normed(3, 12), normed(12, 10), normed(22, 14)
        self.head = nn.Linear(36, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = torch.cat([x, self.b(x)], 1)
        x = torch.cat([x, self.c(x)], 1)
        return cast(Tensor, self.head(x.mean((2, 3))))


class Normalised(nn.Module):
    """Group norm over channels: here zeros are not the same as no channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 12, 3), nn.GroupNorm(1, 12), normed(12, 10)
        self.head = nn.Linear(10, 7)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.b(self.norm(self.a(x))).mean((2, 3))))


class Branching(Residual):
    """Looks at its values, which torch.onnx cannot export."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.abs().max() > 0.5 else x + 1)


class Named(Residual):
    """Several outputs, by name."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return {"logits": y, "best": y.argmax(1)}


FAST = (Residual, Depthwise, Dense)
SLOW = (Branching, Named)


@cache
def traced(kind: Callable[[], nn.Module]) -> tuple[nn.Module, ChannelGraph]:
    torch.manual_seed(0)
    model = kind()
    model.train()
    with torch.no_grad():
        model(BATCHES[0])  # batch norms that do something
    model.eval()
    return model, trace(model, BATCHES[0][:1])


@cache
def template(kind: Callable[[], nn.Module]) -> OnnxTemplate:
    model, graph = traced(kind)
    return OnnxTemplate.export(model, BATCHES[0][:1], graph)


def inference(kind: Callable[[], nn.Module], **options: Any) -> Inference:
    model, graph = traced(kind)
    options = {"threads": 1, "patience_s": 0.0} | options
    return Inference(model, graph, lambda: BATCHES, lambda: template(kind), compute=CPU, **options)


def onnx_only(kind: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch, **options: Any) -> Inference:
    """With PyTorch out of the race, and blocks of 16: whatever is fastest, this is what the test is about."""
    monkeypatch.setattr(secateur.pipeline.evaluation.inference, "BLOCKS", (16,))
    engine = inference(kind, **options)
    list(engine.outputs(PruningPlan.full(engine.graph.groups)))
    assert engine._template is not None, engine.describe()
    monkeypatch.setattr(engine, "_fast", engine._onnx)
    monkeypatch.setattr(engine, "_plain", None)  # nothing may fall back
    return engine


def plain(
    kind: Callable[[], nn.Module], plan: PruningPlan, state: Mapping[str, Tensor] | None = None
) -> list[dict[str, Tensor] | Tensor]:
    model, graph = traced(kind)
    network = inherit(model, graph, plan, state).eval()
    with torch.inference_mode():
        return [network(images) for images in BATCHES]


def assert_plain(
    found: list[Any],
    kind: type[nn.Module],
    plan: PruningPlan,
    state: Mapping[str, Tensor] | None = None,
    number_type: Precision = "fp32",
) -> None:
    """The outputs are those of the plain pruned network, up to what rounding in a type explains."""
    assert_same(found, plain(kind, plan, state), rounding_of(traced(kind)[0], DTYPES[number_type]))


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """PyTorch's number of threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=[False, True], ids=["fp32 only", "bf16 native"])
def bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both kinds of processor, whatever this one is."""
    native: bool = request.param
    pretend_bf16(monkeypatch, native)
    return native


def random_plan(graph: ChannelGraph, seed: int) -> PruningPlan:
    rng = np.random.default_rng(seed)
    masks = {}
    for group in graph.groups:
        mask = rng.random(group.size) < rng.uniform(0.2, 1.0)
        mask[rng.integers(group.size)] = True
        masks[group.name] = mask
    return PruningPlan.from_masks(masks)


def other_weights(kind: Callable[[], nn.Module], seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = traced(kind)[0].state_dict()
    return {
        name: t * (1 + 0.3 * torch.rand(t.shape, generator=generator)) if t.is_floating_point() else t.clone()
        for name, t in state.items()
    }


@pytest.mark.parametrize("kind", [*FAST, Normalised])
def test_any_plan_with_any_weights_through_onnx(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = onnx_only(kind, monkeypatch)
    state = other_weights(kind)
    for seed in range(8):
        plan = random_plan(engine.graph, seed)
        assert_plain(list(engine.outputs(plan)), kind, plan)
        assert_plain(list(engine.outputs(plan, "other", state)), kind, plan, state)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**31), kind=st.sampled_from([*FAST, Normalised]), block=st.sampled_from([1, 8, 16]))
def test_blocks_never_change_outputs(seed: int, kind: type[nn.Module], block: int) -> None:
    model, graph = traced(kind)
    engine = Inference(model, graph, lambda: BATCHES, lambda: None, compute=CPU, threads=1)
    engine._template, engine._block = template(kind), block
    plan = random_plan(graph, seed)
    rounded = engine._rounded(plan)
    for group in graph.groups:
        width = rounded.widths[group.name]
        assert width in (plan.widths[group.name], group.size) or width % block == 0
    with torch.inference_mode():
        found = [engine._onnx(plan, None)(n, images) for n, images in enumerate(BATCHES)]
    assert_plain(found, kind, plan)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", FAST)
def test_one_group_of_a_pruned_and_tuned_snapshot(
    kind: type[nn.Module], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All groups in turn: candidates start from kept activations, and give what the plain network gives."""
    engine = onnx_only(kind, monkeypatch, threads=threads)
    state = other_weights(kind)
    snapshot = random_plan(engine.graph, 0)
    assert_plain(list(engine.outputs(snapshot, "tuned", state)), kind, snapshot, state)
    rng = np.random.default_rng(0)
    cut = set()
    for group in engine.graph.groups:
        alive = np.array(snapshot.kept[group.name])
        for _ in range(4):
            chosen = rng.random(len(alive)) < 0.7
            chosen[rng.integers(len(alive))] = True
            plan = snapshot.replace({group.name: alive[chosen]})
            assert_plain(list(engine.outputs(plan, "tuned", state)), kind, plan, state)
        if engine._branch is not None and engine._branch.name == group.name:
            assert len(engine._branch.kept) == len(BATCHES)
            cut.add(group.name)
    assert cut == {group.name for group in engine.graph.groups if group.size > 1}


TRAINING = [1 + 2 * torch.randn((n, 3, 12, 12), generator=torch.Generator().manual_seed(n)) for n in (30, 29)]


def reestimated(network: nn.Module, batches: list[Tensor]) -> nn.Module:
    """A network whose batch norms have the statistics that PyTorch's own moving average gives them, batch by batch."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    network.eval()
    sums = [[torch.zeros(norm.num_features), torch.zeros(norm.num_features)] for norm in norms]
    with torch.no_grad():
        for images in batches:
            for norm in norms:
                norm.train()
                norm.momentum = 1.0  # the last batch alone
            network(images)
            for pair, norm in zip(sums, norms, strict=True):
                pair[0] += cast(Tensor, norm.running_mean) / len(batches)
                pair[1] += cast(Tensor, norm.running_var) / len(batches)
        for (mean, var), norm in zip(sums, norms, strict=True):
            cast(Tensor, norm.running_mean).copy_(mean)
            cast(Tensor, norm.running_var).copy_(var)
    return network.eval()


@pytest.mark.parametrize("kind", FAST)
def test_statistics_taken_anew_are_those_of_the_cut_network(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a plan over all groups, and of neighbours in one group that begin at kept activations."""
    engine = onnx_only(kind, monkeypatch)
    state, rounding = other_weights(kind), rounding_of(traced(kind)[0], torch.float32)
    snapshot, cut = random_plan(engine.graph, 0), set()
    plans = [
        snapshot.replace({group.name: snapshot.kept[group.name][:n]})
        for group in engine.graph.groups
        for n in range(max(1, snapshot.widths[group.name] - 3), snapshot.widths[group.name])
    ]
    for plan in [snapshot, *plans]:
        found = list(engine.outputs(plan, "tuned", state, training=TRAINING))
        network = reestimated(inherit(*traced(kind), plan, state), TRAINING)
        with torch.inference_mode():
            assert_same(found, [network(images) for images in BATCHES], rounding)
        cut |= {engine._branch.name} if engine._branch is not None and engine._branch.covers(plan) else set()
    assert len(cut) >= len(engine.graph.groups) - 1, engine.describe()


def test_frozen_statistics_and_those_of_no_batch_norm_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch norm whose scale is not trained keeps its statistics, in the cut network and behind a cut."""
    model, graph = traced(Residual)
    engine = onnx_only(Residual, monkeypatch)
    assert isinstance(model, Residual)
    frozen = cast(nn.BatchNorm2d, model.inner2[1])
    frozen.weight.requires_grad_(False)
    try:
        for width in (20, 19, 18):
            plan = PruningPlan.full(graph.groups).replace({"inner1.0": range(width - 4)})
            before = inherit(model, graph, plan).state_dict()
            after = engine.recalibrated(plan, None, TRAINING)
            name = "inner2.1.running_mean"
            assert torch.equal(after[name], before[name])
            assert not torch.equal(after["inner1.1.running_mean"], model.state_dict()["inner1.1.running_mean"])
            expected = inherit(model, graph, plan, after).eval()
            with torch.inference_mode():
                wanted = [expected(images) for images in BATCHES]
            assert_same(list(engine.outputs(plan, training=TRAINING)), wanted, rounding_of(model, torch.float32))
        assert engine._branch is not None
    finally:
        frozen.weight.requires_grad_(True)


def test_a_candidate_outside_the_snapshot_is_right_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a resume the snapshot itself was never run: its neighbours are neighbours of each other."""
    engine = onnx_only(Residual, monkeypatch)
    snapshot = random_plan(engine.graph, 3)
    name, size = "inner2.0", snapshot.sizes["inner2.0"]
    for start in range(0, 12, 2):
        plan = snapshot.replace({name: range(start, size - 6 + start // 2)})
        assert_plain(list(engine.outputs(plan)), Residual, plan)
    assert engine._branch is not None
    assert engine._branch.plan.widths[name] == size


def test_weights_of_another_base_never_meet_kept_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = onnx_only(Residual, monkeypatch)
    full, state = PruningPlan.full(engine.graph.groups), other_weights(Residual)
    plans = [full.replace({"inner1.0": range(n)}) for n in (10, 11, 12)]
    for plan in plans:
        list(engine.outputs(plan))
    assert engine._branch is not None
    for plan in plans:
        assert_plain(list(engine.outputs(plan, "other", state)), Residual, plan, state)
        assert_plain(list(engine.outputs(plan)), Residual, plan)


@pytest.mark.parametrize(("images", "kept"), [(0, 0), (45, 1), (63, 2)])
def test_kept_activations_stay_within_the_bound(images: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch for which there is no room goes through the whole network."""
    engine = onnx_only(Residual, monkeypatch)
    full = PruningPlan.full(engine.graph.groups)
    plans = [full.replace({"inner1.0": range(n)}) for n in (9, 10, 11, 12)]
    list(engine.outputs(plans[0]))
    per_image = 4 * 144 * (20 + 18)  # the block's input and what its second convolution reads
    monkeypatch.setattr(engine, "_cache_bytes", images * per_image)
    for plan in plans[1:]:
        assert_plain(list(engine.outputs(plan)), Residual, plan)
    branch = engine._branch
    assert branch is not None
    assert len(branch.kept) == kept
    held = sum(array.nbytes for feeds in branch.kept.values() for feed in feeds for array in feed.values())
    assert held == branch.num_bytes <= images * per_image


def test_prefix_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = onnx_only(Residual, monkeypatch)
    full = PruningPlan.full(engine.graph.groups)
    for n in (9, 10):
        list(engine.outputs(full.replace({"inner2.0": range(n)})))
    assert engine._branch is not None
    assert sorted(engine._branch.crossing) == sorted(engine._branch.kept[0][0])
    monkeypatch.setattr(engine._branch, "before", None)  # running it would raise
    plan = full.replace({"inner2.0": range(11)})
    assert_plain(list(engine.outputs(plan)), Residual, plan)


@pytest.mark.parametrize("kind", SLOW)
def test_what_onnx_cannot_do_is_done_by_pytorch(kind: type[nn.Module], bf16: bool) -> None:
    engine = inference(kind)
    for seed in range(3):
        plan = random_plan(engine.graph, seed)
        found = list(engine.outputs(plan))
        assert_plain(found, kind, plan, number_type=engine.precision)
        assert_plain(list(engine.outputs(plan, exact=True)), kind, plan)
    assert any(t.precision == "bf16" for t in engine.trials) == bf16
    assert all(t.reason for t in engine.trials if t.name.startswith("ONNX"))
    assert not any(t.reason for t in engine.trials if t.name == "PyTorch")
    assert "ONNX Runtime" in engine.describe()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_network_without_a_template(threads: int, bf16: bool, set_threads: Callable[[int], None]) -> None:
    set_threads(threads)
    model, graph = traced(Residual)
    engine = Inference(model, graph, lambda: BATCHES, lambda: None, compute=CPU, patience_s=0)
    plan = random_plan(graph, 0)
    found = list(engine.outputs(plan))
    assert_plain(found, Residual, plan, number_type=engine.precision)
    assert engine.precision == "fp32" or bf16


def test_a_way_that_computes_something_else_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = inference(Residual, bf16=False)
    monkeypatch.setattr(secateur.pipeline.evaluation.inference, "fuse_conv_bn_eval", lambda conv, _: conv)
    monkeypatch.setattr(secateur.pipeline.evaluation.inference, "_any_batch", _negated)
    plan = random_plan(engine.graph, 0)
    assert_plain(list(engine.outputs(plan)), Residual, plan)
    assert [t.name for t in engine.trials if not t.reason] == ["PyTorch"]
    assert "differs" in engine.describe()


def test_exact_answers_never_come_from_lower_precision() -> None:
    engine = inference(Residual, bf16=True)
    plan = random_plan(engine.graph, 0)
    assert_plain(list(engine.outputs(plan, exact=True)), Residual, plan)
    (trial,) = [t for t in engine.trials if "bfloat16" in t.name]
    assert trial.precision == "bf16"
    assert trial.error > rounding_of(engine.model)
    engine._fast = engine._bf16
    assert engine.precision == "bf16"
    rough = list(engine.outputs(plan))
    assert {batch.dtype for batch in rough} == {torch.float32}
    assert_plain(rough, Residual, plan, number_type="bf16")
    with pytest.raises(AssertionError, match="differs"):
        assert_plain(rough, Residual, plan)
    assert_plain(list(engine.outputs(plan, exact=True)), Residual, plan)


@pytest.mark.long
def test_the_same_holds_with_older_instructions() -> None:
    """The tests of this file that PyTorch's kernels decide, where PyTorch and oneDNN may use AVX2 at most."""
    names = (test_a_network_without_a_template, test_a_way_that_computes_something_else_is_left_out)
    names += (test_exact_answers_never_come_from_lower_precision, test_lowered_instructions_are_not_native_bf16)
    assert " failed" not in run_lowered(*(f"{__file__}::{test.__name__}" for test in names))


def test_lowered_instructions_are_not_native_bf16() -> None:
    """Whatever the processor has: what oneDNN may not use is not native."""
    if os.environ.get("ONEDNN_MAX_CPU_ISA") == LOWERED["ONEDNN_MAX_CPU_ISA"] or not any(
        torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16")
    ):
        assert not native_bf16(CPU)


def pytorch_only(kind: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> Inference:
    """With ONNX Runtime out of the race."""
    engine = inference(kind, bf16=False)
    list(engine.outputs(PruningPlan.full(engine.graph.groups)))
    monkeypatch.setattr(engine, "_fast", engine._folded)
    return engine


@pytest.mark.parametrize("kind", [Residual, Depthwise, Dense])
def test_several_masks_in_one_batch_give_what_each_network_gives(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, state = pytorch_only(kind, monkeypatch), other_weights(kind)
    plans = [random_plan(engine.graph, seed) for seed in range(9)]  # six of 40 images at once
    for plan, found in zip(plans, engine.under_masks(plans, state, BATCHES[0]), strict=True):
        assert_same([found], plain(kind, plan, state)[:1], rounding_of(traced(kind)[0], DTYPES["fp32"]))


def test_masks_that_compute_something_else_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, plans = pytorch_only(Residual, monkeypatch), [random_plan(traced(Residual)[1], 0)]
    monkeypatch.setattr(
        secateur.pipeline.evaluation.inference,
        "outputs_under_masks",
        lambda network, *_: [network(BATCHES[0]).detach()],
    )
    with pytest.raises(MaskedBatchError, match="differ"):
        next(engine.under_masks(plans, None, BATCHES[0]))
    monkeypatch.setattr(engine, "_fast", engine._onnx)
    with pytest.raises(MaskedBatchError, match="ONNX Runtime is faster"):
        next(engine.under_masks(plans, None, BATCHES[0]))


def test_nothing_is_tried_before_patience_ends() -> None:
    calls = []
    model, graph = traced(Residual)
    engine = Inference(model, graph, lambda: BATCHES, lambda: calls.append(1), compute=CPU, patience_s=1e3)
    list(engine.outputs(PruningPlan.full(graph.groups)))
    assert not calls
    assert "nothing else" in engine.describe()
    engine._patience_s = 0.0
    for seed in range(2):
        list(engine.outputs(random_plan(graph, seed)))
    assert len(calls) == 1


def test_a_caller_may_stop_early_and_the_model_stays_as_it_was() -> None:
    model, graph = traced(Residual)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    engine = inference(Residual, bf16=False)
    plan = random_plan(graph, 0)
    assert len(next(engine.outputs(plan))) == len(BATCHES[0])
    assert_plain(list(engine.outputs(plan)), Residual, plan)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_broken_weights_are_reported() -> None:
    engine = inference(Residual)
    list(engine.outputs(PruningPlan.full(engine.graph.groups)))
    engine._fast = engine._onnx
    with pytest.raises(ValueError, match="no dense tensor"):
        list(engine.outputs(random_plan(engine.graph, 0), "broken", {}))


def _negated(model: Any) -> Any:
    model = _ANY_BATCH(model)
    for tensor in model.graph.initializer:
        if tensor.name == "head.bias":
            tensor.raw_data = np.negative(np.frombuffer(tensor.raw_data, np.float32) + 1).tobytes()
    return model


_ANY_BATCH = secateur.pipeline.evaluation.inference._any_batch
