"""Which channels to keep: the search, and what must hold before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import nn

from secateur.device_profiles.network_probe import NetworkProbe
from secateur.pipeline.errors import UserError
from secateur.pipeline.evaluation.evaluator import Evaluator
from secateur.pipeline.lifecycle.finish import chosen_plan, only
from secateur.pipeline.lifecycle.rescore import rank_agreement
from secateur.pipeline.run import layer_precisions, network_probe, precision_latency
from secateur.pipeline.run.facts import (
    Facts,
    LatencyFacts,
    Proof,
    RankAgreement,
    ScopeFacts,
    SearchFacts,
    SearchSplitFacts,
)
from secateur.pipeline.run.proof import prove
from secateur.pipeline.run.ranking import rank_exactly
from secateur.pipeline.run.run import Run
from secateur.pipeline.run.scope import STAGE, choose_scope, write_down
from secateur.pipeline.run.study import Study
from secateur.pipeline.stages.loading import load_baseline
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.cost import cost
from secateur.pruning.plan import PruningPlan, SearchSpace
from secateur.pruning.search.protocol import Archive, BudgetSpent, Candidate, Evaluation, Goal
from secateur.pruning.search.reward import Reward
from secateur.pruning.search.scope import ScopeChoice, Spaces
from secateur.pruning.search.support import SearchError
from secateur.pruning.surgery import Certificate

POINT_ESTIMATE = 0.1
"""How far (fraction) a ratio from one process may be off, before a target is called out of reach for it."""


def search(run: Run, facts: Facts) -> SearchFacts:
    """Trace, certify, search; the archive, best by reward first.

    Raises:
        UserError: the network cannot be pruned safely, no network of the search space meets the targets, or the
            method finds nothing.
        DeviceError: the device is unreachable, or its answers are of no use.
        JournalError: what is recorded is of another search.
    """
    del facts
    run.check_runtimes()
    model, graph = load_baseline(run)
    probes = settle_widths(run, model, graph)
    split = settle_metric(run, model, graph)
    spaces, certificate, oracle, reference = _begin(run, model, graph)
    ratios = settle_precision_latency(run, oracle)
    archive, study, scope = _search(run, oracle, graph, spaces, reference)
    full, again = PruningPlan.full(graph.groups), Study(run.journal, oracle, stage="ranking")
    with run.progress.stage("Score the best again in float32"):
        ranked, exact_reference = rank_exactly(
            again, archive, reference, full, run.config.finetune.top, partial(merit_against, run)
        )
    agreement = rank_agreement(run.journal.records, run.workload.metric, split.metric)
    return SearchFacts(
        reference=exact_reference,
        archive=tuple(ranked),
        num_candidates=study.num_candidates,
        scope=None if scope is None else ScopeFacts.of(run.config.search.scope, scope),
        agreement=None if agreement is None else RankAgreement(**agreement),
        spent=study.spent,
        latency=LatencyFacts.of(oracle.latency_report()),
        device=run.device_facts,
        devices=run.facts_of_devices if len(run.fleet) > 1 else None,
        certificate=Proof(**asdict(certificate)),
        graph=graph.report(),
        split=split,
        probes=probes or None,
        layer_precisions=layer_precisions.settled(run.journal.records),
        precision_latency=ratios,
        files={},
    )


def _begin(run: Run, model: nn.Module, graph: ChannelGraph) -> tuple[Spaces, Certificate, Evaluator, Evaluation]:
    """Widths with which the targets are within reach, their certificate, the evaluator and the reference."""
    spaces = run.spaces(model, graph)
    certificate = prove(model, graph, spaces.whole, run.workload.example_input(), run.config.seed)
    oracle = run.evaluator(model, graph, spaces.whole)
    reference = measure_reference(run, oracle, graph)
    reward = run.reward(reference, run.workload.search_metric)
    oracle.prefer(lambda evaluation: merit(run, reward, evaluation, reference))
    if settle_finer(run, reject_impossible(run, oracle, run.finer_spaces(graph), reference)):
        return _begin(run, model, graph)  # as a resumed run does: what was measured is in the journal
    return spaces, certificate, oracle, reference


def _search(
    run: Run, oracle: Evaluator, graph: ChannelGraph, spaces: Spaces, reference: Evaluation
) -> tuple[Archive, Study, ScopeChoice | None]:
    """What the method returns, the study that drove it, and the scope it had; or the one plan that a run is given."""
    metric = run.workload.search_metric
    reward = run.reward(reference, metric)
    plan = chosen_plan(run.directory, graph)
    before = Study(run.journal, oracle, run.tracker.candidate, stage=STAGE, budget=run.budget())
    scope = None if plan is not None else _scope(run, before, graph, spaces, reference, reward)
    with run.progress.stage(f"Search ({run.config.search.method})") as report:

        def notify(record: Mapping[str, Any]) -> None:
            run.tracker.candidate(record)
            metrics = record["evaluation"]["metrics"]
            saved = 1 - metrics.get("macs", float("nan")) / reference["macs"]
            show(f"{metric} {metrics.get(metric, float('nan')):.3f}, MACs -{saved:.0%}")

        def show(text: str) -> None:
            report(int(study.spent["evaluations"]), run.config.search.budget.evaluations or 0, text)

        study = Study(
            run.journal,
            oracle,
            notify,
            budget=run.budget(),
            watch=lambda work: show(f"{work} ..."),
            scores=len(oracle.precisions),
            closes=plan is None and run.goal != Goal(),
        )
        study.charge(before.spent)
        try:
            if plan is not None:
                return study.run(only(plan)), study, None
            assert scope is not None
            return study.run(run.strategy(graph, spaces.of(scope.scope), reference, reward)), study, scope
        except (SearchError, BudgetSpent) as error:
            raise UserError(f"search.{run.config.search.method}: {error}") from error


def _scope(
    run: Run, study: Study, graph: ChannelGraph, spaces: Spaces, reference: Evaluation, reward: Reward
) -> ScopeChoice:
    """Which groups the search may cut, said aloud."""
    metric = run.workload.search_metric
    choice = choose_scope(run.config, study, graph, spaces, reference, reward, metric)
    write_down(run.journal, choice)
    if choice.reason:
        run.progress.say(f"search.scope {run.config.search.scope} is {choice.scope}: {choice.reason}")
    return choice


def measure_reference(run: Run, oracle: Evaluator, graph: ChannelGraph) -> Evaluation:
    """The unpruned network's evaluation, under the protocol of the candidates.

    Raises:
        UserError: it cannot be evaluated.
    """
    with run.progress.stage("Measure the reference"):
        study = Study(run.journal, oracle, run.tracker.candidate, stage="reference")
        dense = Candidate(0, PruningPlan.full(graph.groups), "reference")
        reference = study.evaluate(dense, latency=True)
        oracle.calibrate(reference)
    if reference.status != "ok":
        raise UserError(f"the unpruned network cannot be evaluated: {reference.reason}")
    return reference


def settle_widths(run: Run, model: nn.Module, graph: ChannelGraph) -> Mapping[str, NetworkProbe]:
    """Which widths of this network pay on the devices, said aloud; by device, those that were probed with it."""
    settled = run.probe_network(model, graph, "the plan is given" if chosen_plan(run.directory, graph) else "")
    for name, probe in settled.probes.items():
        run.progress.say(f"On {name} this network's widths pay in multiples of {probe.text}")
    for name, reason in settled.reasons.items():
        run.progress.say(f"{name} was not probed with this network: {reason}")
    return settled.probes


def settle_metric(run: Run, model: nn.Module, graph: ChannelGraph) -> SearchSplitFacts:
    """What the search goes by; says so, and whether the weights know the search images by heart."""
    split = run.settle_metric(model, graph)
    told = f"The search goes by {split.metric}"
    if split.memorised:
        run.progress.say(
            f"Warning: the weights know the search images by heart: {run.workload.metric} {split.accuracy:.1%}, and "
            f"{split.augmented:.1%} once they are augmented. Pretrained weights have probably seen them; accuracies of "
            f"the search are too high. {told}"
        )
    else:
        run.progress.say(told)
    return split


def settle_precision_latency(run: Run, oracle: Evaluator) -> Mapping[str, Mapping[str, float]] | None:
    """How fast the unpruned network is in integers, and said aloud where it is slower; None where none are tried."""
    full = oracle.accuracy.baseline.full

    def measure(name: str) -> Mapping[str, float]:
        with run.progress.stage(f"Time the unpruned network in {name}") as report:
            figures = oracle.latency(full, precision=name)
            report(1, 1, f"{figures['latency_ratio']:.2f} of the latency in fp32")
        return figures

    names = [profile.name for profile in run.profiles]
    ratios = precision_latency.settle(run.journal, tuple(oracle.precisions), names, measure)
    for sentence in precision_latency.told(ratios or {}, run.schemes(oracle.accuracy.baseline.model, oracle.graph)):
        run.progress.say(sentence)
    return ratios


def settle_finer(run: Run, at_most: int | None) -> bool:
    """Go on with finer widths than those that pay, said aloud; whether that is new.

    Args:
        at_most: their largest multiple; None = those that pay do.
    """
    settled = network_probe.settled(run.journal.records)
    if at_most is None or settled is None or settled.at_most == at_most:
        return False
    network_probe.settle_finer(run.journal, at_most)
    run.progress.say(
        "With the widths that pay no network meets the targets, so the search takes finer ones: "
        + ("any" if at_most == 1 else f"multiples of {at_most} at most")
    )
    return True


def reject_impossible(
    run: Run, oracle: Evaluator, spaces: Mapping[int | None, SearchSpace], reference: Evaluation
) -> int | None:
    """Before searching: can the smallest network of a space meet the targets and the device's budgets at all?

    Args:
        spaces: by largest multiple, each finer than the one before it.

    Returns:
        The largest multiple of the first whose smallest network can.

    Raises:
        UserError: none can; says the smallest that can be reached.
    """
    limit, faults = run.config.search.target.macs_ratio, list[str]()
    study = Study(run.journal, oracle, stage="smallest")
    for at_most, space in spaces.items():
        smallest = space.smallest()
        ratio = cost(oracle.graph, smallest).macs / reference["macs"]
        faults = [] if limit is None or ratio <= limit else [_out_of_reach("macs_ratio", limit, ratio)]
        faults += _too_slow_or_large(run, study, smallest, reference)
        if not faults:
            return at_most
    listing = "\n  ".join(faults)
    raise UserError(
        f"no network in this search space meets the targets:\n  {listing}\nLoosen them, lower "
        "search.min_keep_ratio or device.channel_multiple, or start from a smaller network"
    )


def _too_slow_or_large(run: Run, study: Study, smallest: PruningPlan, reference: Evaluation) -> Iterator[str]:
    """Faults of the smallest network on the devices; measured only where something depends on it."""
    target = run.config.search.target.latency_ratio
    limits = {
        (profile.name, name): limit
        for profile in run.profiles
        for name in ("p50_ms", "p95_ms", "size_bytes")
        if (limit := getattr(profile.budgets, name)) is not None
    }
    if target is None and not limits:
        return
    least = study.evaluate(Candidate(0, smallest, "smallest"), latency=True)
    if target is not None and (ratio := _at_best(least.metrics)) > target:
        yield _out_of_reach("latency_ratio", target, ratio)
    for (device, name), limit in limits.items() if run.config.gate.budgets else ():
        at = f".{device}" if len(run.profiles) > 1 else ""  # how a device's own metrics are called
        value = least[name] if name == "size_bytes" else _at_best(least.metrics, at) * reference[f"{name}{at}"]
        if value > limit:
            yield f"budget {name} {limit:g} of device {device}: the smallest reachable is {value:.4g}"


def _out_of_reach(name: str, limit: float, ratio: float) -> str:
    return f"search.target.{name} {limit:g}: the smallest reachable is {ratio:.3f}"


def _at_best(metrics: Mapping[str, float], at: str = "") -> float:
    """The smallest latency ratio that a measurement leaves open."""
    estimate = metrics.get(f"latency_ratio{at}", 0.0) / (1 + POINT_ESTIMATE)
    return metrics.get(f"latency_ratio_low{at}", estimate)


def merit(run: Run, reward: Reward, evaluation: Evaluation, reference: Evaluation) -> tuple[bool, float]:
    """What ranks plans: whether the search's targets are met, then the reward."""
    return run.goal.met(evaluation, reference), reward(evaluation)


def merit_against(run: Run, reference: Evaluation) -> Callable[[Evaluation], tuple[bool, float]]:
    """What ranks plans of a search against a reference."""
    reward = run.reward(reference, run.workload.search_metric)
    return lambda evaluation: merit(run, reward, evaluation, reference)
