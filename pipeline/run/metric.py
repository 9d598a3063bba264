"""What a run's search goes by: ``metrics.search`` of its workload, settled before anything is evaluated.

Pretrained weights may know the search images by heart: then accuracies on them say little. Whether they do is found
once; the finding and the metric that follows from it are a line of the journal, which is where everybody reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

from secateur.pipeline.run.facts import SearchSplitFacts
from secateur.pipeline.run.journal import Journal, Record
from secateur.pipeline.workloads import DIVERGENCE_SCORE, Workload

STAGE = "metric"
MEMORISED = 0.03
"""How much more accurate (fraction) a network is on images that it knows by heart than on augmented ones, at least."""


def settled(records: Sequence[Record]) -> SearchSplitFacts | None:
    """What a journal says of the search images and the metric; None before it is settled."""
    for record in records:
        if record.get("stage") == STAGE:
            return SearchSplitFacts(**{name: record[name] for name in SearchSplitFacts.__dataclass_fields__})
    return None


def settle(journal: Journal, workload: Workload, look: Callable[[], tuple[float, float]]) -> SearchSplitFacts:
    """Find whether the search images are known by heart, choose the metric, and write both down; once a run.

    Weights that are trained by the run itself have never seen the search images: nothing is measured then.

    Args:
        workload: as its run file has it.
        look: measures the unpruned network's accuracy on the search images as they are, and on augmented ones.
    """
    if (known := settled(journal.records)) is not None:
        return known
    accuracy, augmented = look() if workload.pretrained else (None, None)
    memorised = accuracy is not None and augmented is not None and accuracy - augmented > MEMORISED
    metric = DIVERGENCE_SCORE if memorised and workload.search_metric_is_open else workload.search_metric
    found = SearchSplitFacts(metric=metric, accuracy=accuracy, augmented=augmented, memorised=memorised)
    journal.append({"stage": STAGE, "kind": "choice", **asdict(found)})
    return found
