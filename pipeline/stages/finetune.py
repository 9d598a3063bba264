"""The best plans, fine-tuned; the best of these is the compact network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from secateur.export.quantize import precision as precision_of
from secateur.pipeline.config.schema import GateSection
from secateur.pipeline.errors import UserError
from secateur.pipeline.evaluation.evaluator import Evaluator
from secateur.pipeline.evaluation.precisions import FLOAT
from secateur.pipeline.files import sha256_of, write_whole
from secateur.pipeline.run.facts import ControlFacts, Facts, FinetuneFacts, WidthsFacts
from secateur.pipeline.run.kept_facts import GROUPS
from secateur.pipeline.run.opening import make_problem
from secateur.pipeline.run.records import request_of
from secateur.pipeline.run.run import Run
from secateur.pipeline.run.study import Study
from secateur.pipeline.stages.loading import load_baseline
from secateur.pipeline.stages.search import merit
from secateur.pipeline.training.checkpoints import save_weights
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.cost import cost, costs
from secateur.pruning.plan import PruningPlan, SearchSpace
from secateur.pruning.search.landing import filled
from secateur.pruning.search.protocol import (
    RANDOM,
    AuxiliaryTraining,
    Candidate,
    Entry,
    Evaluation,
    FineTune,
    Score,
    Time,
)
from secateur.pruning.search.support import Limit, SearchError, macs_ratios

LAST = "compact.last.safetensors"
"""The compact network's weights of its last epoch, where those of the best one by the search split are kept."""
AGAIN, SLOWER = 0.25, 0.1
"""Of the epochs and of the learning rate, for the training with 8-bit steps behind the first one."""
MAX_DROP = GateSection.model_fields["max_drop"].default
"""Where the gate does not look at the drop."""


def finetune(run: Run, facts: Facts) -> FinetuneFacts:
    """Fine-tune the best plans with the baseline as teacher; the best by reward becomes the compact model.

    Raises:
        UserError: the search found no pruned network, or fine-tuning fails for every plan.
        DeviceError: the device is unreachable, or its answers are of no use.
        JournalError: what is recorded is of another search.
    """
    model, graph = load_baseline(run)
    oracle, reference = run.evaluator(model, graph), facts.search.reference
    oracle.calibrate(reference)
    reward = run.reward(reference, run.workload.metric)
    oracle.prefer(lambda evaluation: merit(run, reward, evaluation, reference))
    chosen = best_plans(facts.search.archive)
    if not chosen:
        raise UserError("the search found no pruned network to fine-tune; give it more evaluations or a looser target")
    revive_weights(run, oracle)
    study = Study(run.journal, oracle, run.tracker.candidate, stage="final")
    finals = tuple(_tuned(run, study, i, old) for i, old in enumerate(chosen[: run.config.finetune.top]))
    finals += tuple(filter(None, [_for_integers(run, study, oracle, final) for final in finals]))
    best = max(finals, key=lambda entry: merit(run, reward, entry.evaluation, reference))
    if best.evaluation.status != "ok":
        raise UserError(f"fine-tuning failed for every plan: {best.evaluation.reason}")
    weights = save_weights(run.directory / "compact.safetensors", _cut(oracle, best.candidate).state_dict())
    plan = run.directory / "compact.plan.json"
    write_whole(plan, best.candidate.plan.to_json() + "\n")
    files = {"compact.safetensors": weights, "compact.plan.json": sha256_of(plan)}
    files[GROUPS] = _write_groups(run.directory / GROUPS, graph)
    if (last := oracle.trainer.last(best.candidate.base)) is not None:
        write_whole(run.directory / LAST, last.read_bytes())
        files[LAST] = sha256_of(last)
    scope = facts.search.scope
    space = run.spaces(model, graph).of("inner" if scope is not None and scope.chosen == "inner" else "all")
    widths = _cost_of_widths(run, oracle, graph, best.candidate.plan)
    if widths is not None:
        run.progress.say(widths.text)
    return FinetuneFacts(
        best=best,
        finals=finals,
        control=control(run, oracle, space, reference, best.candidate.plan),
        widths=widths,
        training=oracle.trainer.fitted(best.candidate.base),
        files=files,
    )


def _write_groups(file: Path, graph: ChannelGraph) -> str:
    """What the channel groups cost, and what is frozen with the reason, for the report; returns the file's sha256."""
    widths = np.tile([group.size for group in graph.groups], (len(graph.groups) + 1, 1))
    widths[np.arange(len(graph.groups)), np.arange(len(graph.groups))] = 0  # the last row is the whole network
    macs = costs(graph, widths).macs
    told = {
        "format": 1,
        "groups": [
            {"name": group.name, "channels": group.size, "macs_share": round(float(1 - left / macs[-1]), 6)}
            for group, left in zip(graph.groups, macs, strict=False)
        ],
        "frozen": [
            {"layer": each.layer, "channels": each.size, "macs_share": each.macs_share, "reason": each.reason}
            for each in graph.frozen
        ],
    }
    write_whole(file, json.dumps(told) + "\n")
    return sha256_of(file)


def control(
    run: Run, oracle: Evaluator, space: SearchSpace, reference: Evaluation, chosen: PruningPlan
) -> ControlFacts | None:
    """Uniform at the MACs and in the scope of the chosen plan, and that plan, as they are cut; recorded as a stage.

    Both are timed as well, in the first precision that may ship: one measurement more than the finalists need.

    None where the report is to have none, or no uniform plan has so few MACs.
    """
    if run.config.report.control == "none":
        return None
    rewards = run.reward(reference, run.workload.search_metric)  # what these are scored by may not be the gate's metric
    oracle.prefer(lambda evaluation: merit(run, rewards, evaluation, reference))
    problem = make_problem(run.config, oracle.graph, space, reference, rewards, run.workload.search_metric)
    ratio = oracle.accuracy.baseline.macs(chosen) / reference["macs"]
    study = Study(run.journal, oracle, run.tracker.candidate, stage="control")
    with run.progress.stage("Score the uniform control"):
        saliency = study.answer(Score("l1"))
        assert isinstance(saliency, Mapping)
        try:
            plan = filled(problem, Limit("macs_ratio", macs_ratios(problem), ratio), saliency)
        except SearchError:
            return None
        candidates = Candidate(0, plan, "uniform"), Candidate(1, chosen, "chosen")
        entries = [Entry(candidate, study.evaluate(candidate, latency=False)) for candidate in candidates]
        if not all(entry.evaluation.status == "ok" for entry in entries):
            return None
        ratios = Study(run.journal, oracle, stage="control latency").answer(Time((plan, chosen)))
    assert isinstance(ratios, np.ndarray)
    uniform_latency, chosen_latency = ratios.tolist()
    return ControlFacts(
        uniform=entries[0], chosen=entries[1], uniform_latency=uniform_latency, chosen_latency=chosen_latency
    )


def _cost_of_widths(run: Run, oracle: Evaluator, graph: ChannelGraph, plan: PruningPlan) -> WidthsFacts | None:
    """The plan timed beside the one with the device's widths, outside the search's budget; None where it is that."""
    if run.config.search.channel_multiple is None:
        return None
    space = run.device_space(graph)
    widths = {name: space.snap(name, plan.widths[name]) for name in space.names}
    changed = {name: range(width) for name, width in widths.items() if width != plan.widths[name]}
    if not changed:
        return None
    rounded = plan.replace(changed)
    answer = Study(run.journal, oracle, stage="widths").answer(Time((plan, rounded)))
    assert isinstance(answer, np.ndarray)
    own, other = answer.tolist()
    macs = cost(graph, rounded).macs / cost(graph, PruningPlan.full(graph.groups)).macs
    return WidthsFacts(latency_ratio=own, rounded_latency_ratio=other, rounded_macs_ratio=macs, groups=len(changed))


def best_plans(archive: Sequence[Entry]) -> list[Candidate]:
    """One candidate of every pruned plan: an archive is ranked, so the first of equal plans is the best trained one."""
    chosen: dict[str, Candidate] = {}
    for entry in archive:
        if not entry.candidate.plan.is_full:
            chosen.setdefault(entry.candidate.plan.digest, entry.candidate)
    return list(chosen.values())


def revive_weights(run: Run, oracle: Evaluator) -> None:
    """Make the weights of the search's own fine-tunings usable in this process."""
    for record in run.journal.records:
        if record.get("stage") != "search" or not record.get("checkpoint"):
            continue
        request = request_of(record)
        if not oracle.restore(request, record["base"], record["checkpoint"]):
            oracle.train_auxiliary(request) if isinstance(request, AuxiliaryTraining) else oracle.finetune(request)


def _tuned(run: Run, study: Study, number: int, old: Candidate) -> Entry:
    """A candidate of the search, trained by the run's recipe."""
    base = RANDOM if run.config.finetune.from_scratch else old.base
    candidate = Candidate(number, old.plan, "final", (old.id,), base, old.projected_share)
    answer = study.finetune(FineTune(candidate, run.config.finetune.epochs))
    return Entry(replace(candidate, base=answer.base), answer.evaluation)


def _for_integers(run: Run, study: Study, oracle: Evaluator, final: Entry) -> Entry | None:
    """A fine-tuned candidate trained on with the steps of an int8 file; None where that is not asked for or not due."""
    section, candidate = run.config.finetune, final.candidate
    precision = quantised_precision(final.evaluation.precision, tuple(oracle.precisions))
    if section.quantise == "off" or precision is None or final.evaluation.status != "ok":
        return None
    if section.quantise == "auto":
        exact, rounded = (study.exact(candidate, name)[run.workload.metric] for name in (FLOAT, precision))
        if not exact - rounded > tolerated(run.config.gate.max_drop):
            return None
        run.progress.say(
            f"In {precision} the network loses {exact - rounded:.2%} {run.workload.metric}, more than half of what the "
            "gate allows: it trains on with 8-bit steps (finetune.quantise)"
        )
    request = FineTune(candidate, AGAIN * section.epochs, lr=SLOWER * section.lr, quantise=precision)
    answer = study.finetune(request)
    return Entry(replace(candidate, base=answer.base), answer.evaluation)


def quantised_precision(chosen: str, tried: Sequence[str]) -> str | None:
    """Whose steps a network trains with: those of the precision it has, else of the first that has any."""
    return next((name for name in (chosen, *tried) if precision_of(name).calibrated), None)


def tolerated(max_drop: float | None) -> float:
    """What integers may cost a network before it is trained for them: half of what the gate allows."""
    return (MAX_DROP if max_drop is None else max_drop) / 2


def _cut(oracle: Evaluator, best: Candidate) -> nn.Module:
    return oracle.network(best.plan, best.base).cpu()
