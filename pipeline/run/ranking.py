"""The order in which plans go on to fine-tuning: by accuracies that all come from float32.

A search goes by whichever forward pass is fastest, and where that is bfloat16, neighbours may change places. Before
plans are chosen for good, the reference and the best of the archive are scored once more, exactly, and put in order
by that. Each answer is in the journal before it counts, so a kill costs the one in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from secateur.pipeline.run.study import Study
from secateur.pruning.plan import PruningPlan
from secateur.pruning.search.protocol import Candidate, Entry, Evaluation

PER_PLACE = 4
"""Plans scored again for each that is fine-tuned."""

Merit = Callable[[Evaluation], tuple[bool, float]]
"""What ranks an evaluation; larger is better."""


def rank_exactly(
    study: Study,
    archive: Sequence[Entry],
    reference: Evaluation,
    full: PruningPlan,
    top: int,
    merit_against: Callable[[Evaluation], Merit],
) -> tuple[list[Entry], Evaluation]:
    """The archive with its best in the order of their float32 accuracies, and the reference scored likewise.

    Args:
        study: under a stage of its own in the journal.
        archive: whatever the search returned, in any order.
        reference: the unpruned network's evaluation.
        full: its plan.
        top: how many plans are to be fine-tuned; four times as many distinct ones are scored again.
        merit_against: what ranks plans, given the reference.
    """
    merit = merit_against(reference)
    ranked = sorted(archive, key=lambda entry: merit(entry.evaluation), reverse=True)
    chosen: dict[str, list[Entry]] = {}
    for entry in ranked:
        if not entry.candidate.plan.is_full:
            chosen.setdefault(entry.candidate.plan.digest, []).append(entry)
    again = [entry for entries in list(chosen.values())[: PER_PLACE * top] for entry in entries]
    exact_reference = _exactly(study, Candidate(0, full, "reference"), reference)
    best = [Entry(entry.candidate, _exactly(study, entry.candidate, entry.evaluation)) for entry in again]
    merit = merit_against(exact_reference)
    usable = [entry for entry in best if entry.evaluation.status == "ok"]
    usable.sort(key=lambda entry: merit(entry.evaluation), reverse=True)
    scored = set(map(id, again))
    return usable + [entry for entry in ranked if id(entry) not in scored], exact_reference


def _exactly(study: Study, candidate: Candidate, known: Evaluation) -> Evaluation:
    """An evaluation with its accuracies replaced by those of float32; all else stays as it was measured."""
    exact = study.exact(candidate, known.precision)
    kept = {name: known.metrics[name] for name in ("seconds",) if name in known.metrics}
    return replace(exact, scored=known.scored, metrics={**known.metrics, **exact.metrics, **kept})
