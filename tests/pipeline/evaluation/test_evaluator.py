"""The evaluator: what a candidate's numbers mean, and the bounds it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from secateur.device_profiles import load_profile, open_target
from secateur.pipeline.config.schema import FinetuneSection, SearchSection
from secateur.pipeline.devices.fleet import Device, Fleet
from secateur.pipeline.evaluation.baseline import Baseline
from secateur.pipeline.evaluation.evaluator import Evaluator, make_evaluator
from secateur.pipeline.evaluation.inference import FORWARDS, PLAIN
from secateur.pipeline.run.records import to_dict, to_evaluation
from secateur.pipeline.training.statistics import recalibrate, training_images
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.cost import count
from secateur.pruning.masked_batch import outputs_under_masks
from secateur.pruning.plan import PruningPlan
from secateur.pruning.saliency import uniform_plan
from secateur.pruning.search.protocol import DENSE, RANDOM, Candidate, Distort, FineTune, MaskedLoss, Score
from secateur.pruning.surgery import prune
from secateur.pruning.trace import trace
from tests.pipeline.helpers import digits, quick_device

WORKLOAD = digits(image_size=8)


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, ChannelGraph]:
    torch.manual_seed(0)
    model = WORKLOAD.build_model()
    recalibrate(model, training_images(WORKLOAD, WORKLOAD.train, 512, torch.device("cpu")))
    return model, trace(model, WORKLOAD.example_input())


@pytest.fixture
def make(network: tuple[nn.Module, ChannelGraph], tmp_path: Path) -> Iterator[Any]:
    profile = load_profile(quick_device(tmp_path))
    target = open_target(profile)

    def build(**search: Any) -> Evaluator:
        recipe = FinetuneSection(epochs=1, batch_size=128, lr=0.05, autocast="fp32")
        settings = SearchSection(images=100, **search)
        fleet = Fleet([Device(profile, target)])
        return make_evaluator(Baseline(*network, WORKLOAD, seed=1), fleet, tmp_path / "c", settings, recipe)

    yield build
    target.close()


def candidate(
    network: tuple[nn.Module, ChannelGraph], seed: int = 0, ratio: float = 0.5, base: str = DENSE
) -> Candidate:
    plan = uniform_plan(network[1], ratio, model=network[0], saliency="random", seed=seed)
    return Candidate(seed, plan, "test", (), base)


def masked(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """The dense ResNet with removed channels silenced after batch norm (scale and shift zero)."""
    import copy

    silent = copy.deepcopy(model)
    norms = {"conv1": "bn1", "layer1.0.conv1": "layer1.0.bn1"}
    norms |= {f"layer{i}.0.conv1": f"layer{i}.0.bn1" for i in (1, 2, 3)}
    for group, kept in plan.kept.items():
        if group == "conv1":
            continue
        norm = silent.get_submodule(norms[group])
        removed = np.setdiff1d(np.arange(plan.sizes[group]), kept)
        with torch.no_grad():
            norm.weight[removed] = 0
            norm.bias[removed] = 0
    return silent


def test_accuracy_of_a_candidate_is_the_masked_networks(network: Any, make: Any) -> None:
    model, _ = network
    plan = candidate(network).plan
    plan = plan.replace({"conv1": range(plan.sizes["conv1"])})
    evaluator = make(recalibrate_images=0)
    pruned, _ = evaluator.accuracy.outputs(evaluator.network(plan))
    silent, targets = evaluator.accuracy.outputs(masked(model, plan))
    assert torch.allclose(pruned, silent, atol=1e-4)
    evaluation = evaluator.evaluate(Candidate(0, plan, "test"), latency=False)
    assert evaluation["top1"] == WORKLOAD.metrics(silent, targets)["top1"]


def test_an_accuracy_says_its_forward_pass_and_the_exact_one_is_of_float32(network: Any, make: Any) -> None:
    chosen, evaluator, other = candidate(network), make(recalibrate_images=0), make(recalibrate_images=0)
    inference = evaluator.accuracy.inference
    inference._fast = inference._bf16  # as on a processor on which it is the fastest
    rough = evaluator.evaluate(chosen, latency=False)
    assert rough.forward == FORWARDS["_bf16"]
    assert to_evaluation(to_dict(rough)) == rough
    exact, expected = evaluator.exact(chosen), other.evaluate(chosen, latency=False)
    assert exact.forward == expected.forward == PLAIN
    assert {**exact.metrics, "seconds": 0} == {**expected.metrics, "seconds": 0}
    assert exact["loss"] != rough["loss"]
    assert evaluator.evaluate(chosen, latency=False).forward == rough.forward  # from memory


def test_costs_are_those_of_the_built_network(network: Any, make: Any) -> None:
    model, graph = network
    chosen = candidate(network)
    evaluation = make().evaluate(chosen, latency=False)
    counted = count(prune(model, graph, chosen.plan), WORKLOAD.example_input())
    assert (evaluation["macs"], evaluation["params"]) == (counted.macs, counted.params)


def test_latency_is_a_point_estimate_and_the_full_plan_is_the_unit(network: Any, make: Any) -> None:
    evaluator = make()
    dense = evaluator.evaluate(Candidate(0, PruningPlan.full(network[1].groups), "reference"), latency=True)
    assert dense["latency_ratio"] == 1
    half = evaluator.evaluate(candidate(network), latency=True)
    assert half["latency_ratio"] > 0
    assert "latency_ratio_low" not in half.metrics  # one process: it guides the search, and claims nothing
    assert half["p50_ms"] == pytest.approx(half["latency_ratio"] * dense["p50_ms"])
    assert half["size_bytes"] < dense["size_bytes"]


def test_a_plan_seen_before_is_neither_run_nor_timed_again(network: Any, make: Any, monkeypatch: Any) -> None:
    evaluator = make()
    chosen = candidate(network)
    first = evaluator.evaluate(chosen, latency=True)
    monkeypatch.setattr(evaluator.accuracy, "_forward", None)
    monkeypatch.setattr(evaluator.latencies, "_measure", None)
    again = evaluator.evaluate(Candidate(9, chosen.plan, "again"), latency=True)
    without = ("seconds",)
    assert {k: v for k, v in first.metrics.items() if k not in without} == {
        k: v for k, v in again.metrics.items() if k not in without
    }


def test_a_candidate_beyond_the_time_bound_fails_with_its_reason(network: Any, make: Any) -> None:
    evaluation = make(seconds_per_candidate=1e-9).evaluate(candidate(network), latency=False)
    assert evaluation.status == "failed"
    assert "search.seconds_per_candidate" in evaluation.reason
    assert evaluation["macs"] > 0


def test_memory_bounds_the_batch_but_not_the_result(network: Any, make: Any) -> None:
    sizes = []
    narrow = make(memory_mb=1)
    hook = narrow.accuracy.baseline.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    whole = Candidate(0, PruningPlan.full(network[1].groups), "x")
    expected = make(recalibrate_images=0).evaluate(whole, latency=False)
    sizes.clear()
    outputs, targets = narrow.accuracy.outputs(narrow.accuracy.baseline.model)
    hook.remove()
    assert max(sizes) < 100
    assert WORKLOAD.metrics(outputs, targets)["top1"] == expected["top1"]


def test_fine_tuned_weights_are_inherited_by_narrower_plans_and_restored(network: Any, make: Any) -> None:
    evaluator = make()
    wide = candidate(network, ratio=0.75)
    request = FineTune(wide, 1)
    answer, checkpoint = evaluator.finetune(request)
    assert answer.base != DENSE
    kept = {name: k[: max(1, len(k) - 2)] for name, k in wide.plan.kept.items()}
    narrow = Candidate(5, wide.plan.replace(kept), "narrower", (), answer.base)
    before = evaluator.evaluate(narrow, latency=False)
    other = make()
    assert other.restore(request, answer.base, checkpoint)
    assert other.evaluate(narrow, latency=False)["loss"] == before["loss"]
    assert evaluator.spent["images_trained"] == len(WORKLOAD.train)
    file = evaluator.accuracy.weights.path(answer.base)
    file.write_bytes(file.read_bytes()[:-1])
    assert not make().restore(request, answer.base, checkpoint)


def test_weights_written_back_leave_every_other_channel_as_it_was(network: Any, make: Any) -> None:
    evaluator, graph = make(), network[1]
    first = candidate(network, seed=1)
    answer, checkpoint = evaluator.finetune(FineTune(first, 1, write_back=True, latency=False))
    full = PruningPlan.full(graph.groups)
    dense, written = network[0].state_dict(), evaluator.accuracy.weights.state(answer.base, full)
    trained = evaluator.network(first.plan, answer.base).state_dict()
    slices = graph.slices(first.plan)
    for name, tensor in written.items():
        if tensor.ndim == 0:  # a counter
            continue
        inside = torch.zeros(tensor.shape, dtype=torch.bool)
        rows = [torch.as_tensor(slices.get(name, {}).get(d, range(n))) for d, n in enumerate(tensor.shape)]
        inside[torch.meshgrid(*rows, indexing="ij")] = True
        assert torch.equal(tensor[~inside], dense[name][~inside])
        assert torch.equal(tensor[inside], trained[name].flatten())
    assert not torch.equal(written["linear.weight"], dense["linear.weight"])
    second = candidate(network, seed=2, base=answer.base)  # channels that the first plan removed are there
    again = evaluator.finetune(FineTune(second, 1, write_back=True, latency=False))[0]
    other = make()
    assert other.restore(FineTune(first, 1, write_back=True, latency=False), answer.base, checkpoint)
    assert other.evaluate(second, latency=False)["loss"] == evaluator.evaluate(second, latency=False)["loss"]
    assert "latency_ratio" not in again.evaluation.metrics


def test_weights_pushed_out_of_memory_are_read_again(network: Any, make: Any) -> None:
    evaluator = make()
    evaluator.accuracy.weights.memory_bytes = 1
    tuned = [candidate(network, seed=i, ratio=0.75) for i in (1, 2)]
    answers = [evaluator.finetune(FineTune(c, 1))[0] for c in tuned]
    full = PruningPlan.full(network[1].groups)
    states = [evaluator.accuracy.weights.state(a.base, full) for a in [*answers, *answers]]
    assert len(evaluator.accuracy.weights._loaded) == 1
    assert all(torch.equal(states[0][n], states[2][n]) for n in states[0])
    assert not torch.equal(states[0]["linear.weight"], states[1]["linear.weight"])


def test_random_weights_are_the_same_for_the_same_seed_and_not_the_trained_ones(network: Any, make: Any) -> None:
    state = torch.random.get_rng_state()
    first, second = (make().network(PruningPlan.full(network[1].groups), RANDOM).state_dict() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["linear.weight"], network[0].linear.weight)


def test_fine_tuning_learns_and_a_diverging_one_is_a_failed_evaluation(network: Any, make: Any) -> None:
    evaluator = make()
    chosen = candidate(network, ratio=0.75)
    raw = evaluator.evaluate(chosen, latency=False)
    answer, _ = evaluator.finetune(FineTune(chosen, 2))
    assert answer.evaluation["loss"] < raw["loss"]
    evaluator.trainer.recipe = evaluator.trainer.recipe.model_copy(update={"lr": 1e9, "warmup_epochs": 0.0})
    failed, checkpoint = evaluator.finetune(FineTune(Candidate(7, chosen.plan, "x"), 8))
    assert failed.evaluation.status == "failed"
    assert "lower lr" in failed.evaluation.reason
    assert checkpoint == {}


def test_a_request_may_name_its_own_learning_rate(network: Any, make: Any) -> None:
    evaluator, chosen = make(), candidate(network, ratio=0.75)
    start = evaluator.network(chosen.plan).state_dict()

    def moved(lr: float | None) -> float:
        answer, _ = evaluator.finetune(FineTune(chosen, 0.2, lr=lr, latency=False))
        trained = evaluator.network(chosen.plan, answer.base).state_dict()
        return float((trained["linear.weight"] - start["linear.weight"]).norm())

    assert moved(1e-6) < 0.01 * moved(None)


def test_a_candidate_that_cannot_reach_the_floor_is_given_up_and_no_other_is(network: Any, make: Any) -> None:
    evaluator, twin = make(memory_mb=1), make(memory_mb=1)
    chosen = candidate(network, ratio=0.3)
    top1 = twin.evaluate(chosen, latency=False)["top1"]
    hopeless = evaluator.evaluate(chosen, False, min(1.0, top1 + 0.3))
    assert hopeless.status == "infeasible"
    assert "cannot reach" in hopeless.reason
    assert evaluator.spent["images_forwarded"] < twin.spent["images_forwarded"]
    assert evaluator.evaluate(chosen, False, top1)["top1"] == top1


def test_outputs_that_are_no_numbers_fail_with_a_reason(network: Any, make: Any) -> None:
    evaluator = make()
    full = PruningPlan.full(network[1].groups)
    broken = {**network[0].state_dict(), "linear.bias": torch.full((10,), float("nan"))}
    evaluator.accuracy.weights.save_learned("broken", "sparsity", broken)
    evaluation = evaluator.evaluate(Candidate(0, full, "x", (), "broken"), latency=False)
    assert evaluation.status == "failed"
    assert "NaN" in evaluation.reason


def test_masked_losses_are_those_of_the_masked_networks_on_the_first_images(network: Any, make: Any) -> None:
    evaluator = make(recalibrate_images=0)
    chosen = candidate(network)
    whole, part = (
        evaluator.masked_loss(MaskedLoss((chosen.plan,))),
        evaluator.masked_loss(MaskedLoss((chosen.plan,), images=40)),
    )
    assert whole[0] == pytest.approx(evaluator.evaluate(chosen, latency=False)["loss"], rel=1e-4)
    cpu = torch.device("cpu")
    first = WORKLOAD.batch(WORKLOAD.search, torch.arange(40), train=False, generator=None, device=cpu)
    with torch.inference_mode():
        outputs = evaluator.network(chosen.plan)(first[0])
    assert part[0] == pytest.approx(WORKLOAD.metrics(outputs, first[1])["loss"], rel=1e-4)


def test_masks_that_share_a_batch_give_the_same_losses(
    network: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator, rng = make(), np.random.default_rng(0)
    masks = [{g.name: rng.random(g.size) < 0.8 for g in network[1].groups} for _ in range(7)]
    for mask in masks:
        for kept in mask.values():
            kept[0] = True
    request = MaskedLoss(tuple(map(PruningPlan.from_masks, masks)), images=40)
    inference, shared = evaluator.accuracy.inference, []
    alone = evaluator.masked_loss(request)
    before = dict(evaluator.spent)
    inference._try_backends()
    monkeypatch.setattr(inference, "_fast", inference._folded)
    monkeypatch.setattr(
        "secateur.pipeline.evaluation.inference.outputs_under_masks",
        lambda *arguments: shared.append(1) or outputs_under_masks(*arguments),
    )
    assert evaluator.masked_loss(request) == pytest.approx(alone, rel=1e-4)
    assert len(shared) == 2  # six masks of 40 images, and one
    assert evaluator.spent["image_macs"] == 2 * before["image_macs"]


def test_images_the_unpruned_network_gets_wrong_are_seen_first(network: Any, make: Any) -> None:
    evaluator = make(memory_mb=1)
    outputs, targets = evaluator.accuracy.outputs(network[0])
    right = (outputs.argmax(1) == targets).int()
    assert 0 < int(right.sum()) < len(right)
    assert torch.equal(right, right.sort().values)


def test_recalibrated_statistics_are_those_of_the_training_images(network: Any) -> None:
    model, _ = network
    with torch.no_grad():
        model.bn1.running_mean.add_(3)
    recalibrate(model, training_images(WORKLOAD, WORKLOAD.train, 200, torch.device("cpu")))
    cpu = torch.device("cpu")
    images, _ = WORKLOAD.batch(WORKLOAD.train, torch.arange(200), train=False, generator=None, device=cpu)
    expected = model.conv1(images).mean((0, 2, 3))
    assert torch.allclose(model.bn1.running_mean, expected, atol=1e-4)
    assert not model.bn1.training
    assert model.bn1.momentum == 0.1


def scored_with(evaluator: Evaluator, network: nn.Module, num_images: int) -> float:
    """The loss on the search split of a network whose statistics are taken anew; 0 images = they are not."""
    if num_images:
        cpu = torch.device("cpu")
        batches = training_images(WORKLOAD, WORKLOAD.train, num_images, cpu, evaluator.accuracy._batch_size)
        recalibrate(network, batches)
    return WORKLOAD.metrics(*evaluator.accuracy.outputs(network))["loss"]


def test_candidates_are_scored_with_statistics_of_their_own_and_finalists_with_better_ones(
    network: Any, make: Any
) -> None:
    """A quarter as many training images as search images, then all that the run file names; the reference likewise."""
    full = Candidate(0, PruningPlan.full(network[1].groups), "reference")
    evaluator = make()
    for chosen in (candidate(network), full):
        plain = scored_with(evaluator, evaluator.network(chosen.plan), 0)
        for found, num_images in ((evaluator.evaluate(chosen, latency=False), 25), (evaluator.exact(chosen), 512)):
            expected = scored_with(evaluator, evaluator.network(chosen.plan), num_images)
            assert found["loss"] == pytest.approx(expected, rel=1e-4)
            assert found["loss"] != pytest.approx(plain, rel=1e-3)


def test_a_network_trained_as_it_is_is_scored_as_it_would_be_shipped(network: Any, make: Any) -> None:
    evaluator, chosen = make(), candidate(network)
    tuned, _ = evaluator.finetune(FineTune(chosen, 0.1, latency=False))
    shipped = scored_with(evaluator, evaluator.network(chosen.plan, tuned.base), 0)
    assert tuned.evaluation["loss"] == pytest.approx(shipped, rel=1e-4)


@pytest.mark.parametrize("search", [{"recalibrate_images": 0}, {"options": {"paper_compat": True}}])
def test_the_papers_protocol_leaves_statistics_as_they_were(search: Any, network: Any, make: Any) -> None:
    evaluator, chosen = make(**search), candidate(network)
    expected = scored_with(evaluator, evaluator.network(chosen.plan), 0)
    assert evaluator.evaluate(chosen, latency=False)["loss"] == pytest.approx(expected, rel=1e-4)


def test_scores_are_of_the_asked_base_and_plan(network: Any, make: Any) -> None:
    evaluator = make()
    scores = evaluator.score(Score("l1"))
    assert {name: len(v) for name, v in scores.items()} == {g.name: g.size for g in network[1].groups}
    plan = candidate(network).plan
    inside = evaluator.score(Score("l1", plan=plan))
    for name, kept in plan.kept.items():
        assert set(np.flatnonzero(np.isfinite(inside[name]))) == set(kept)
        assert (inside[name] <= scores[name] + 1e-9).all()  # removed inputs no longer count
    distances = evaluator.score(Score("feature_distance", plan=plan, options={"images": 20}))
    for name, kept in plan.kept.items():
        assert distances[name].shape == (plan.sizes[name],) * 2
        assert np.isfinite(distances[name]).sum() == len(kept) ** 2
    assert not np.array_equal(evaluator.score(Score("l1", RANDOM))["conv1"], scores["conv1"])


def test_distortions_are_repeatable_and_grow_with_what_is_removed(network: Any, make: Any) -> None:
    plan = PruningPlan.full(network[1].groups)
    name = next(g.name for g in network[1].groups if g.name.endswith("conv1") and "layer" in g.name)
    request = Distort(plan, ({name: (0,)}, {name: tuple(range(8))}), batch_size=32)
    first, second = make().distort(request)[name], make().distort(request)[name]
    assert np.array_equal(first, second)
    assert 0 <= first[0] < first[1]
