"""The compact model and all that proves it, into the registry of MLflow."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from secateur.device_profiles.wording import number_of
from secateur.export.verify import predict
from secateur.pipeline.config.schema import TrackingSection
from secateur.pipeline.errors import TrackingError
from secateur.pipeline.files import write_whole
from secateur.pipeline.lifecycle import promotion
from secateur.pipeline.lifecycle.rescore import check_whole
from secateur.pipeline.run.facts import Both, Facts, RegisterFacts, to_json
from secateur.pipeline.run.origin import COMMIT, read_origin
from secateur.pipeline.run.records import of_candidates
from secateur.pipeline.run.run import Run
from secateur.pipeline.stages.card import CARD, About, body, card, cut
from secateur.pipeline.tracking import redacted
from secateur.pipeline.tracking.registry import MAX_DESCRIPTION, MAX_TAG
from secateur.pipeline.workloads.data.record import FACTS as DATA_FACTS

NETWORKS = ("baseline", "final")
"""How names of MLflow's metrics and of a version's tags begin; a version's own figures have no such beginning."""
REPORTS = ("report.html", "report.json", "report.md")
"""They are no part of what the stage's result rests on: `secateur report` makes them anew."""


def register(run: Run, facts: Facts) -> RegisterFacts:
    """The compact model into the registry, with all that proves it, as the challenger of its devices.

    Raises:
        TrackingError: the tracking server is unreachable or refuses.
        JournalError: candidates of the search are missing in the journal.
    """
    check_whole(run.journal, facts.search.num_candidates)
    told = about(run)
    write_whole(run.directory / CARD, card(told, facts))
    page = body(told, facts)
    with run.progress.stage("Track and register"):
        _deliver(run, facts)
        example, after = run.workload.example_input().numpy(), run.workload.postprocessing
        file = run.directory / ("compact.onnx" if after is None else f"compact.{after.name}.onnx")
        entry = run.tracker.register(
            run.config.tracking.registered_model or run.config.name,
            [profile.name for profile in run.profiles],
            file,
            example,
            predict(file, example),
            _tags(facts),
            _version_files(run, facts),
            _provenance(run, facts),
            cut(page, MAX_DESCRIPTION),
        )
        names = [*REPORTS, *facts.report.files, *facts.benchmark.files]
        names += ["compact.plan.json", "compact.safetensors", "version/run.yaml", CARD]
        names += [] if after is None else ["compact.onnx"]  # the registry has the file with postprocessing
        kept = [run.directory / name for name in dict.fromkeys(names)]
        run.tracker.finish(final_metrics(facts), [*kept, candidate_table(run)], entry, cut(page, MAX_DESCRIPTION))
    return RegisterFacts(name=entry.name, version=entry.version, uri=entry.uri, files={})


def about(run: Run) -> About:
    """What the card says of a run besides its facts."""
    data = run.tracker.data
    commit = str(read_origin(run.directory).get(COMMIT) or "")
    return About(run.config, run.run_id, run.profile, data.name if data else "data", len(run.workload.test), commit)


def _deliver(run: Run, facts: Facts) -> None:
    """Wait until MLflow has every candidate and the epochs of trainings; name those it does not take.

    Raises:
        TrackingError: some are not delivered.
    """
    for name, fitted in facts.trainings.items():
        run.tracker.curve(f"training.{name}", fitted.series())
    waiting = run.tracker.flush(timeout_s=600 if not run.tracker.failure else 10)
    if waiting:
        raise TrackingError(
            f"{number_of(waiting, 'candidate(s) is|are')} not delivered to {redacted(run.tracker.uri)}: "
            f"{run.tracker.failure}"
        )
    for key, reason in run.tracker.refused.items():
        run.progress.say(
            f"Note: MLflow does not take candidate {key} ({reason}); it is in the journal and in candidates.parquet"
        )


def _tags(facts: Facts) -> dict[str, Any]:
    """What a version is known by."""
    base, compact = facts.gate.models
    figures = {**{f"baseline.{name}": value for name, value in base.flat().items()}, **compact.flat()}
    return {
        "plan_digest": facts.finetune.best.candidate.plan.digest,
        "precision": facts.export.compact.artifact.precision,
        "search_metric": facts.gate.search_metric,
        "gate": "passed" if facts.gate.passed else "failed",
        "speedup": sensible(facts.benchmark.speedup.value),
        "timing_flags": " ".join(facts.benchmark.flags) or "none",
        "usage": usage_tag(facts.export.usage),
        **{name: sensible(value) for name, value in figures.items() if value is not None},
    }


def sensible(value: float) -> str:
    """A number with as many digits as a measurement has; whole ones as they are."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def usage_tag(usage: Mapping[str, Any]) -> str:
    """How the model is used, as a tag; a tag has a limit, beyond which class names are in the version's file only."""
    text = json.dumps(usage)
    if len(text) <= MAX_TAG:
        return text
    return json.dumps({**usage, "classes": f"{len(usage['classes'])} names, in secateur/usage.json"})


def _version_files(run: Run, facts: Facts) -> list[Path]:
    """What a version carries besides its model: how it was made, what was measured, and how to use it."""
    folder, passed = run.directory / "version", to_json(facts.gate)
    folder.mkdir(exist_ok=True)
    # Where it is registered is no part of what it is; and an address may hold a password.
    config = {**run.config.model_dump(mode="json"), "tracking": TrackingSection().model_dump()}
    config["device"] |= {"profile": run.profile.name, "others": [profile.name for profile in run.profiles[1:]]}
    made = {
        "usage.json": json.dumps(facts.export.usage),
        "gate.json": json.dumps({key: passed[key] for key in ("passed", "metric", "checks", "models")}, indent=1),
        "parity.json": json.dumps(_parity(facts, run.config.export.tolerance), indent=1),
        "run.yaml": yaml.safe_dump(config, sort_keys=False),
    }
    for name, text in made.items():
        write_whole(folder / name, text)
    shutil.copyfile(run.directory / "compact.plan.json", folder / "plan.json")
    names = [*facts.benchmark.files, facts.report.html, DATA_FACTS, CARD]
    after = run.workload.postprocessing
    kind = "" if after is None else f".{after.name}"
    names += [facts.export.file("compact", device, kind) for device in facts.export.schemes or ()]
    files = [folder / name for name in (*made, "plan.json")]
    files += [run.directory / name for name in dict.fromkeys(names)]
    if run.workload.postprocessing is not None:
        shutil.copyfile(run.directory / "compact.onnx", folder / promotion.NETWORK)
        files += [folder / promotion.NETWORK, run.directory / promotion.INPUTS]
    return files


def _parity(facts: Facts, tolerance: float) -> dict[str, Any]:
    """How both files compare with their PyTorch networks, and the compact network with the masked one."""
    export = to_json(facts.export)

    def of(network: Mapping[str, Any]) -> dict[str, Any]:
        results = {name: network[name] for name in ("rounded", "postprocessing") if name in network}
        return {**network["parity"], **results, "tolerance": tolerance}

    return {**{name: of(export[name]) for name in ("baseline", "compact")}, "certificate": export["certificate"]}


def _provenance(run: Run, facts: Facts) -> dict[str, Any]:
    """Where a version comes from, as digests: data, weights, code, device."""
    name, device = "compact.safetensors", facts.search.device
    return {
        "data": run.workload.fingerprint,
        "weights": {**facts.baseline.files, name: facts.finetune.files[name]},
        "plan": facts.finetune.best.candidate.plan.digest,
        "device": {"name": run.profile.name, "fingerprint": device.fingerprint, "facts": device.facts},
        "seed": run.config.seed,
    }


def final_metrics(facts: Facts) -> dict[str, float]:
    """The run's own metrics in MLflow: of both models on both splits, each named."""
    searched = Both(facts.search.reference, facts.finetune.best.evaluation)
    metrics: dict[str, float] = {}
    for name, model, evaluation in zip(NETWORKS, facts.gate.models, searched, strict=True):
        told = {key: float(value) for key, value in model.metrics.items() if value is not None}
        costs = {key: value for key, value in model.flat().items() if key not in model.metrics and value is not None}
        metrics |= {f"{name}.{key}": float(value) for key, value in costs.items()}
        metrics |= {f"{name}.test_{key}": value for key, value in told.items()}
        on_search_split = evaluation.metrics
        metrics |= {f"{name}.search_{key}": float(on_search_split[key]) for key in told if key in on_search_split}
    base, compact = facts.gate.models
    metrics |= {"macs_ratio": compact.macs / base.macs, "latency_ratio": 1 / facts.benchmark.speedup.value}
    metrics |= _speedups(facts)
    metrics |= {f"flag.{flag}": 1.0 for flag in facts.benchmark.flags}
    return metrics | {f"search.{name}": float(amount) for name, amount in facts.search.spent.items()}


def _speedups(facts: Facts) -> dict[str, float]:
    """Every speed-up with the ends of its interval, and what postprocessing costs."""
    metrics: dict[str, float] = {}
    speedups = {"speedup": facts.benchmark.speedup}
    speedups |= {f"speedup.{name}": timed.speedup for name, timed in (facts.benchmark.fleet or {}).items()}
    if (after := facts.benchmark.postprocessing) is not None:
        metrics[f"final.p50_ms_{after.name}"] = after.latency.compact.p50_ms
        speedups[f"speedup_{after.name}"] = after.speedup
    for name, speedup in speedups.items():
        ends = {name: speedup.value, f"{name}.low": speedup.low, f"{name}.high": speedup.high}
        metrics |= {key: value for key, value in ends.items() if value is not None}
    return metrics


def candidate_table(run: Run) -> Path:
    """All candidates of the journal as one parquet file."""
    import pandas as pd  # type: ignore[import-untyped]

    rows = [
        {
            "stage": r["stage"],
            "kind": r["kind"],
            **{k: v for k, v in r["candidate"].items() if k != "parents"},
            "status": r["evaluation"]["status"],
            "forward": r["evaluation"].get("forward", ""),
            "precision": r["evaluation"].get("precision", "fp32"),
            **r["evaluation"]["metrics"],
        }
        for r in of_candidates(run.journal.records)
    ]
    path = run.directory / "candidates.parquet"
    pd.DataFrame(rows).to_parquet(path)
    return path
