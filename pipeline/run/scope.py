"""Which groups a run's search may cut: ``search.scope``, settled before the method begins (``pruning.search.scope``).

The comparison is a study of its own stage, so that its candidates are recorded and replayed apart from the method's;
what it spent counts in the budget of the search.
"""

from __future__ import annotations

from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.run.journal import Journal
from secateur.pipeline.run.opening import make_problem
from secateur.pipeline.run.study import Study
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.search.protocol import Answer, Evaluation
from secateur.pruning.search.reward import Reward
from secateur.pruning.search.scope import ScopeChoice, Spaces, choose

STAGE = "scope"


def choose_scope(
    config: RunFile,
    study: Study,
    graph: ChannelGraph,
    spaces: Spaces,
    reference: Evaluation,
    reward: Reward,
    metric: str,
) -> ScopeChoice:
    """Settle the scope of a run's search; what is asked for it is journalled.

    Args:
        study: of the stage ``STAGE``.
        reference: the unpruned network's evaluation.
        metric: the accuracy that the search goes by.
    """
    whole = make_problem(config, graph, spaces.whole, reference, reward, metric)
    inner = None if spaces.inner is None else make_problem(config, graph, spaces.inner, reference, reward, metric)
    requests = choose(config.search.scope, whole, inner)
    answer: Answer | None = None
    while True:
        try:
            request = next(requests) if answer is None else requests.send(answer)
        except StopIteration as end:
            choice: ScopeChoice = end.value
            return choice
        answer = study.answer(request)


def write_down(journal: Journal, choice: ScopeChoice) -> None:
    """The choice as a line of the journal; it follows from the answers before it, and a replay asks for none."""
    told = any(record.get("stage") == STAGE and record["kind"] == "choice" for record in journal.records)
    if choice.reason and not told:
        journal.append({"stage": STAGE, "kind": "choice", "scope": choice.scope, "reason": choice.reason})
