"""The report of a run, the Pareto front as a file, and what the report shows beyond what other stages found."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import torch
from PIL import Image

from secateur.export.verify import predict
from secateur.pipeline.errors import TrackingError, UserError
from secateur.pipeline.files import sha256_of, write_whole
from secateur.pipeline.lifecycle.rescore import check_whole, front_rows
from secateur.pipeline.report import registered, write_report
from secateur.pipeline.run.facts import Facts, ReportFacts
from secateur.pipeline.run.kept_facts import PICTURES
from secateur.pipeline.run.run import Run
from secateur.pipeline.run.study import Study
from secateur.pipeline.stages.loading import first_batch, load_baseline
from secateur.pruning.plan import PruningPlan
from secateur.pruning.search.protocol import Candidate, Score

NUM_PICTURES = 4
SWEEP, KEEPS = "sensitivity", (0.75, 0.5, 0.25)
"""Stage of the journal, and the shares of its channels that each group alone is cut to."""


def report(run: Run, facts: Facts) -> ReportFacts:
    """The device profiling report, as a page, JSON and Markdown: made before the model is registered, as part of it.

    Raises:
        JournalError: candidates of the search are missing in the journal.
    """
    check_whole(run.journal, facts.search.num_candidates)
    front = run.directory / "front.json"
    rows = front_rows(run.journal.records, run.workload.search_metric)
    write_whole(front, json.dumps({"format": 1, "candidates": rows}, indent=1) + "\n")
    if run.config.report.sensitivity:
        sweep(run, facts)
    _draw(run)
    records, unreachable = run.journal.records, bool(run.tracker.failure)
    made = write_report(run.directory, run.run_id, run.config, facts, records, run.profile, unreachable)
    return ReportFacts(html=made.html.name, front=len(rows), files={front.name: sha256_of(front)})


def renew(run: Run, facts: Facts) -> None:
    """The report once more, now that it is known what became of the model: its version, and whether it is champion.

    MLflow gets it too; where it cannot be told now, a resumed run tells it.
    """
    if "report" not in vars(facts):
        return
    records, unreachable, entry = run.journal.records, bool(run.tracker.failure), facts.register
    made = write_report(run.directory, run.run_id, run.config, facts, records, run.profile, unreachable)
    if entry is None or unreachable:
        return
    try:
        version = run.tracker.registry.version(entry.name, entry.version)
        run.tracker.renew([made.html, made.json, made.markdown], version, " ".join(registered(facts)))
    except (TrackingError, UserError) as error:
        run.progress.say(
            f"Note: the report in MLflow is of before the registration ({error}); `secateur resume` logs it again"
        )


def sweep(run: Run, facts: Facts) -> None:
    """Cut every group alone to three widths, and evaluate what is left; each answer is journalled.

    The channels with the smallest L1 norms go; nothing is trained.
    """
    model, graph = load_baseline(run)
    oracle = run.evaluator(model, graph)
    study = Study(run.journal, oracle, stage=SWEEP)
    full = PruningPlan.full(graph.groups)
    saliency = study.answer(Score("l1"))
    assert isinstance(saliency, dict)
    cuts = [(name, round(keep * size)) for name, size in full.sizes.items() for keep in KEEPS]
    with run.progress.stage("Cut each group alone") as told:
        for number, (name, width) in enumerate((name, max(1, width)) for name, width in cuts):
            kept = sorted(saliency[name].argsort(kind="stable")[-width:].tolist())
            study.evaluate(Candidate(number, full.replace({name: kept}), SWEEP), latency=False)
            told(number + 1, len(cuts), name)


def _draw(run: Run) -> None:
    """Keep what baseline and compact network find on the same few images of the search split, drawn on them."""
    after, file = run.workload.postprocessing, run.directory / PICTURES
    if after is None or not run.config.report.pictures:
        file.unlink(missing_ok=True)
        return
    images, targets = first_batch(run, run.workload.search.first(NUM_PICTURES))
    rows: list[dict[str, Any]] = []
    for name in ("baseline", "compact"):
        results = torch.from_numpy(predict(run.directory / f"{name}.{after.name}.onnx", images.numpy()))
        drawn = zip(after.draw(images, results, targets), after.count(results).tolist(), strict=True)
        for number, (picture, found) in enumerate(drawn, start=1):
            alt = f"search image {number}: the {name} network finds {found} {after.name}; white: what is there"
            caption = f"image {number}, {name}: {found} {after.name}"
            rows.append({"image": number, "source": _data_uri(picture), "alt": alt, "caption": caption})
    rows.sort(key=lambda row: row["image"])  # before beside after
    write_whole(file, json.dumps({"format": 1, "pictures": rows}) + "\n")


def _data_uri(picture: torch.Tensor) -> str:
    """A picture as part of a page: JPEG in base64."""
    file = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
