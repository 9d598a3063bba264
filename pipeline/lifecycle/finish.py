"""A plan of an earlier run taken to the end: a run of its own whose search is that one plan.

Everything after the search is as in any run (fine-tuning, export, timing, gate, registry), and so are resuming and
tracking. The weights are cut anew from the baseline, which all runs of one recipe share.
"""

from __future__ import annotations

import json
from pathlib import Path

from secateur.device_profiles.wording import command
from secateur.pipeline.errors import UserError
from secateur.pipeline.files import write_whole
from secateur.pipeline.lifecycle.rescore import check_same_data, history
from secateur.pipeline.run.journal import read_journal
from secateur.pipeline.run.run import create_run_directory, open_run_directory
from secateur.pipeline.workloads.data.record import FACTS, MEMBERS
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import PlanError, PruningPlan
from secateur.pruning.search.protocol import Candidate, Entry, Strategy
from secateur.pruning.search.support import evaluate

CHOSEN = "chosen.json"
"""In the directory of such a run: the plan, and where it comes from."""


def begin(directory: Path, candidate: int | None, plan: Path | None) -> Path:
    """A new run directory that takes one plan of an earlier run to the end.

    Args:
        directory: of the earlier run, which is left as it is; it may still be going on.
        candidate: number of a candidate of its search.
        plan: a file with a plan instead, as ``rescore`` writes it.

    Raises:
        UserError: neither or both are given, there is no such candidate or plan, or it prunes nothing.
        JournalError: the journal is damaged.
    """
    if (candidate is None) == (plan is None):
        raise UserError("name either a candidate of the search with --candidate, or a file with a plan with --plan")
    run_id, config = open_run_directory(directory)
    chosen = _of_the_search(directory, candidate) if plan is None else _of_a_file(plan)
    if chosen.is_full:
        raise UserError("this plan keeps every channel: there is nothing to fine-tune and register")
    made = create_run_directory(config)
    for name in (FACTS, MEMBERS):
        if (directory / name).is_file():  # the same images, or the new run refuses to begin
            write_whole(made / name, (directory / name).read_bytes())
    told = {"format": 1, "run": run_id, "candidate": candidate, "plan": chosen.to_json()}
    write_whole(made / CHOSEN, json.dumps(told) + "\n")
    return made


def chosen_plan(directory: Path, graph: ChannelGraph) -> PruningPlan | None:
    """The one plan of such a run; None where the run searches.

    Raises:
        UserError: it is damaged, or of another network.
    """
    file = directory / CHOSEN
    if not file.is_file():
        return None
    try:
        plan = PruningPlan.from_json(json.loads(file.read_text(encoding="utf-8"))["plan"])
        plan.validate(graph)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file} holds no plan of this network: {error}") from error
    return plan


def only(plan: PruningPlan) -> Strategy:
    """The search whose archive is one plan.

    Raises:
        UserError: it cannot be evaluated.
    """
    candidate = Candidate(0, plan, "chosen")
    (evaluation,) = yield from evaluate([candidate], latency=True)
    if evaluation.status != "ok":
        raise UserError(f"the chosen plan cannot be evaluated: {evaluation.reason}")
    return (Entry(candidate, evaluation),)


def _of_the_search(directory: Path, candidate: int | None) -> PruningPlan:
    records = read_journal(directory / "journal.jsonl")
    check_same_data(directory, records)
    evaluated = {past.candidate.id: past for past in history(records) if past.stage == "search"}
    if candidate not in evaluated:
        ids = sorted(evaluated)
        known = f"{ids[0]} to {ids[-1]}" if ids else "none"
        raise UserError(
            f"the search of {directory} has no pruned candidate {candidate}; it has: {known}. "
            f"`{command('secateur', 'rescore', directory, '--reward', 'device')}` lists them"
        )
    return evaluated[candidate].candidate.plan


def _of_a_file(plan: Path) -> PruningPlan:
    try:
        return PruningPlan.from_json(plan.read_text(encoding="utf-8"))
    except PlanError as error:
        raise UserError(f"{plan} holds no plan: {error}") from error
