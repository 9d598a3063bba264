"""The report of a run, and the Pareto front as a file."""

from __future__ import annotations

import json

import torch

from secateur.export.verify import predict
from secateur.pipeline.files import sha256_of, write_whole
from secateur.pipeline.lifecycle.rescore import check_whole, front_rows
from secateur.pipeline.report import write_report
from secateur.pipeline.run.facts import Facts, ReportFacts
from secateur.pipeline.run.run import Run
from secateur.pipeline.stages.loading import first_batch

NUM_PICTURES = 4


def report(run: Run, facts: Facts) -> ReportFacts:
    """The device profiling report, as one HTML page and as JSON: made before the model is registered, as part of it.

    Raises:
        JournalError: candidates of the search are missing in the journal.
    """
    check_whole(run.journal, facts.search.num_candidates)
    front = run.directory / "front.json"
    rows = front_rows(run.journal.records, run.workload.search_metric)
    write_whole(front, json.dumps({"format": 1, "candidates": rows}, indent=1) + "\n")
    html, data = write_report(
        run.directory,
        run.config,
        run.profile,
        facts,
        run.journal.records,
        rows,
        _pictures(run),
        unreachable=bool(run.tracker.failure),
    )
    return ReportFacts(html=html.name, front=len(rows), files={f.name: sha256_of(f) for f in (html, data, front)})


def _pictures(run: Run) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What baseline and compact model find on the same few images of the search split, drawn: uint8 (3, H, W) each."""
    after = run.workload.postprocessing
    if after is None:
        return []
    images, targets = first_batch(run, run.workload.search.first(NUM_PICTURES))
    drawn = []
    for name in ("baseline", "compact"):
        results = torch.from_numpy(predict(run.directory / f"{name}.{after.name}.onnx", images.numpy()))
        drawn.append(after.draw(images, results, targets))
    return list(zip(*drawn, strict=True))
