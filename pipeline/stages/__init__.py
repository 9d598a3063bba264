"""The stages of a run, in order: plain functions from the facts known so far to new facts.

Facts are JSON. A stage that makes files names them under ``files`` (path within the run directory -> sha256), so that
whoever keeps its result can tell whether it still stands. What a stage needs in memory it can make again from files.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import yaml
from torch import Tensor, nn

from device_profiles import BenchmarkResult, DeviceError, measure
from export.artifact import ExportedModel
from export.artifact import describe as describe_onnx
from export.onnx_export import export_onnx, write_atomically
from export.verify import predict, verify_parity
from pipeline.config.schema import TrackingSection
from pipeline.devices.fleet import Device, Tally
from pipeline.errors import TrackingError, UserError
from pipeline.evaluation.evaluator import Evaluator
from pipeline.files import sha256_of, write_whole
from pipeline.lifecycle import promotion
from pipeline.lifecycle.finish import chosen_plan, only
from pipeline.lifecycle.rescore import check_whole, front_rows, rank_agreement
from pipeline.report import write_report
from pipeline.run.opening import trace_network
from pipeline.run.proof import facts_of, prove
from pipeline.run.ranking import rank_exactly
from pipeline.run.records import describe, request_of, to_candidate, to_dict, to_evaluation
from pipeline.run.run import Run
from pipeline.run.study import Study
from pipeline.surroundings import home
from pipeline.tracking import shown
from pipeline.tracking.registry import MAX_TAG
from pipeline.training.baselines import BaselineCache
from pipeline.training.loop import VERSION, TrainingError, fit, load_weights, save_weights
from pipeline.workloads import Split
from pipeline.workloads.data.record import FACTS as DATA_FACTS
from pruning.channels import ChannelGraph
from pruning.cost import cost
from pruning.plan import PruningPlan
from pruning.search.protocol import RANDOM, AuxiliaryTraining, BudgetSpent, Candidate, Entry, Evaluation, FineTune
from pruning.search.reward import Reward
from pruning.search.support import SearchError
from pruning.surgery import certify, prune

Facts = Mapping[str, Any]
NUM_PICTURES = 4
TIMED = ("p50_ms", "p95_ms", "cpu_p50_ms", "cpu_p95_ms", "load_ms", "first_ms", "peak_rss_bytes", "energy_mj")
"""Figures of a timed model."""
POINT_ESTIMATE = 0.1
"""How far (fraction) a ratio from one process may be off, before a target is called out of reach for it."""


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        name: under which its facts are kept.
        title: what a user reads.
        function: ``function(run, facts of earlier stages) -> facts``.
        version: raise it when the function's meaning changes, so that kept results are not reused.
        retry_on: errors after which trying again can help.
    """

    name: str
    title: str
    function: Callable[[Run, Facts], dict[str, Any]]
    version: int = 1
    retry_on: tuple[type[Exception], ...] = ()


def baseline(run: Run, facts: Facts) -> dict[str, Any]:
    """The unpruned, trained network: pretrained weights, or trained once and reused by content hash."""
    del facts
    model = run.workload.build_model()
    file = run.directory / "baseline.safetensors"
    if run.workload.pretrained:
        digest, origin = save_weights(file, model.state_dict()), "pretrained weights"
    else:
        recipe = run.config.baseline
        follows_from = json.dumps([run.workload.fingerprint, recipe.model_dump(mode="json"), run.config.seed, VERSION])
        key = hashlib.sha256(follows_from.encode()).hexdigest()[:16]

        def train(checkpoint: Path) -> Mapping[str, Tensor]:
            torch.manual_seed(run.config.seed)
            model = run.workload.build_model()
            with run.progress.stage("Train the baseline") as report:
                try:
                    fit(
                        model,
                        run.workload,
                        run.workload.train,
                        recipe,
                        seed=run.config.seed,
                        checkpoint=checkpoint,
                        compute=run.device,
                        report=report,
                    )
                except TrainingError as error:
                    raise UserError(f"baseline: {error}") from error
            return model.state_dict()

        content, trained = BaselineCache(home() / "baselines", run.progress.say).get(key, train)
        origin = f"trained ({key})" if trained else f"reused ({key})"
        write_whole(file, content)
        digest = sha256_of(file)
    return {"origin": origin, "files": {file.name: digest}}


def search(run: Run, facts: Facts) -> dict[str, Any]:
    """Trace, certify, search; the archive, best by reward first."""
    del facts
    model, graph = load_baseline(run)
    space = run.space(graph)
    certificate = facts_of(prove(model, graph, space, run.workload.example_input(), run.config.seed))
    oracle = run.evaluator(model, graph, space)
    reference = measure_reference(run, oracle, graph)
    reward = run.reward(reference, run.workload.search_metric)
    reject_impossible(run, oracle, space.smallest(), reference)
    count = 0
    with run.progress.stage(f"Search ({run.config.search.method})") as report:

        def notify(record: Mapping[str, Any]) -> None:
            nonlocal count
            count += 1
            run.tracker.candidate(record)
            metrics = record["evaluation"]["metrics"]
            accuracy = metrics.get(run.workload.search_metric, float("nan"))
            saved = 1 - metrics.get("macs", float("nan")) / reference["macs"]
            report(count, 0, f"{run.workload.search_metric} {accuracy:.3f}, MACs -{saved:.0%}")

        study = Study(
            run.journal, oracle, notify, budget=run.budget(), watch=lambda work: report(count, 0, f"{work} ...")
        )
        try:
            plan = chosen_plan(run.directory, graph)
            archive = study.run(only(plan) if plan else run.strategy(graph, space, reference, reward))
        except (SearchError, BudgetSpent) as error:
            raise UserError(f"search.{run.config.search.method}: {error}") from error
    full, again = PruningPlan.full(graph.groups), Study(run.journal, oracle, stage="ranking")
    with run.progress.stage("Score the best again in float32"):
        ranked, exact_reference = rank_exactly(
            again, archive, reference, full, run.config.finetune.top, partial(merit_against, run)
        )
    return {
        "reference": to_dict(exact_reference),
        "archive": [{"candidate": describe(e.candidate), "evaluation": to_dict(e.evaluation)} for e in ranked],
        "num_candidates": count,
        "agreement": rank_agreement(run.journal.records, "loss_score", run.workload.metric),
        "spent": study.spent,
        "latency": oracle.latencies.report(),
        "device": asdict(run.device_facts),
        **({"devices": {k: asdict(v) for k, v in run.facts_of_devices.items()}} if len(run.fleet) > 1 else {}),
        "certificate": certificate,
        "graph": graph.report(),
        "files": {},
    }


def finetune(run: Run, facts: Facts) -> dict[str, Any]:
    """Fine-tune the best plans with the baseline as teacher; the best by reward becomes the compact model."""
    model, graph = load_baseline(run)
    oracle = run.evaluator(model, graph)
    reference = to_evaluation(facts["search"]["reference"])
    oracle.calibrate(reference)
    reward = run.reward(reference, run.workload.metric)
    chosen: dict[str, Candidate] = {}
    for row in facts["search"]["archive"]:
        candidate = to_candidate(row["candidate"])
        if not candidate.plan.is_full:  # ranked: the first of equal plans is the best trained one
            chosen.setdefault(candidate.plan.digest, candidate)
    if not chosen:
        raise UserError("the search found no pruned network to fine-tune; give it more evaluations or a looser target")
    revive_weights(run, oracle)
    study = Study(run.journal, oracle, run.tracker.candidate, stage="final")
    finals: list[Entry] = []
    for i, old in enumerate(list(chosen.values())[: run.config.finetune.top]):
        base = RANDOM if run.config.finetune.from_scratch else old.base
        candidate = Candidate(i, old.plan, "final", (old.id,), base)
        answer = study.finetune(FineTune(candidate, run.config.finetune.epochs))
        final = Candidate(candidate.id, candidate.plan, candidate.origin, candidate.parents, answer.base)
        finals.append(Entry(final, answer.evaluation))
    best = max(finals, key=lambda entry: merit(run, reward, entry.evaluation, reference))
    if best.evaluation.status != "ok":
        raise UserError(f"fine-tuning failed for every plan: {best.evaluation.reason}")
    weights = save_weights(run.directory / "compact.safetensors", _cut(run, oracle, best).state_dict())
    plan = run.directory / "compact.plan.json"
    write_whole(plan, best.candidate.plan.to_json() + "\n")
    return {
        "best": {"candidate": describe(best.candidate), "evaluation": to_dict(best.evaluation)},
        "finals": [{"candidate": describe(e.candidate), "evaluation": to_dict(e.evaluation)} for e in finals],
        "files": {"compact.safetensors": weights, plan.name: sha256_of(plan)},
    }


def export(run: Run, facts: Facts) -> dict[str, Any]:
    """Both networks as optimised ONNX, proven equal to their PyTorch models; the certificate of the final cut."""
    model, graph = load_baseline(run)
    plan = PruningPlan.from_json(facts["finetune"]["best"]["candidate"]["plan"])
    compact = load_compact(run, model, graph, plan)
    exported: dict[str, Any] = {}
    with run.progress.stage("Export to ONNX") as report:
        for i, (name, network) in enumerate((("baseline", model.cpu()), ("compact", compact))):
            exported[name] = _export_one(run, name, network, plan.digest if name == "compact" else "")
            report(i + 1, 2, f"largest relative difference {exported[name]['parity']['max_relative_error']:.1e}")
    certificate = certify(model, prune(model, graph, plan), graph, plan, run.workload.example_input())
    exported["certificate"] = facts_of(certificate)
    artifacts = [exported[name][kind] for name in ("baseline", "compact") for kind in _kinds(exported[name])]
    exported["usage"] = dict(run.workload.usage)
    return {**exported, "files": {Path(a["path"]).name: a["sha256"] for a in artifacts}}


def benchmark(run: Run, facts: Facts) -> dict[str, Any]:
    """Baseline and compact model timed on every device, interleaved, with every raw latency kept.

    Then the files with postprocessing, where there are some. What that costs depends on what is found: they are timed
    on a real image: of those of the parity check the one in which the baseline finds the median number.

    With several devices, ``fleet`` has what was timed on each, by name; the rest is about the run's own.
    """
    fleet, after = run.fleet, run.workload.postprocessing
    timed = _timed(run, f"Time on {', '.join(fleet.names)}", "", None)
    if after is not None:
        inputs = run.directory / "benchmark-input.npz"
        images, counts = parity_images(run), facts["export"]["baseline"]["postprocessing"]["counts"]
        median = sorted(range(len(counts)), key=lambda i: counts[i])[len(counts) // 2]
        content = io.BytesIO()
        np.savez(content, input=images[median : median + 1].numpy())
        write_whole(inputs, content.getbuffer())
        title = f"Time with {after.name} on {', '.join(fleet.names)}"
        for name, with_it in _timed(run, title, f".{after.name}", inputs).items():
            del with_it["statistic"]
            timed[name]["postprocessing"] = with_it | {"name": after.name, "found": counts[median]}
    files: dict[str, str] = {}
    for part in timed.values():
        files |= part.pop("files") | part.get("postprocessing", {}).pop("files", {})
    found = {**timed[fleet.primary.name], "files": files, "device": fleet.primary.name}
    return found if len(fleet) == 1 else {**found, "fleet": timed}


def _timed(run: Run, title: str, kind: str, inputs: Path | None) -> dict[str, dict[str, Any]]:
    """Both ONNX files of a kind, measured at the final tier: per device its figures; the results are kept as files."""
    models = {name: run.directory / f"{name}{kind}.onnx" for name in ("baseline", "compact")}
    with run.progress.stage(title) as report:
        tally = Tally(report, run.fleet.names, run.profile.final.processes)

        least = run.config.gate.min_speedup

        def decided(result: BenchmarkResult) -> bool:
            speedup = result.speedup("compact", "baseline")
            return least is None or not speedup.low <= least < speedup.high

        def timed(device: Device) -> BenchmarkResult:
            told = tally.of(device.name)
            result = measure(
                device.target,
                device.profile,
                models,
                "final",
                told,
                energy=True,
                noise_floor=device.noise_floor,
                until=decided,
                inputs=inputs,
            )
            count = len(result.processes)
            told(count, count, f"speed-up {result.speedup('compact', 'baseline').value:.2f}x")
            return result

        results = run.fleet.each(timed)
    return {
        name: _kept(run.directory / run.fleet.file("benchmark", f"{kind}.json", name), results[name])
        for name in results
    }


def _kept(file: Path, result: BenchmarkResult) -> dict[str, Any]:
    """A measurement of baseline and compact model, written to a file: its figures."""
    write_whole(file, result.to_json() + "\n")
    figures = {
        name: {
            "p50_ms": result.p50_ms(name),
            "p95_ms": result.p95_ms(name),
            "cpu_p50_ms": result.cpu_p50_ms(name),
            "cpu_p95_ms": float(np.percentile(result.cpu_ms(name), 95)),
            "load_ms": result.load_ms(name),
            "first_ms": result.first_ms(name),
            "peak_rss_bytes": result.peak_rss_bytes(name),
            **({} if (energy := result.energy_mj(name)) is None else {"energy_mj": energy}),
        }
        for name in result.names
    }
    return {
        "latency": figures,
        "speedup": {"low": None, "high": None, **result.speedup("compact", "baseline").ends},
        "flags": list(result.flags),
        "files": {file.name: sha256_of(file)},
        "statistic": result.statistic,
    }


def judge(run: Run, facts: Facts) -> dict[str, Any]:
    """Read the test split, once, through the very files that were timed; then the gate."""
    model, graph = load_baseline(run)
    plan = PruningPlan.from_json(facts["finetune"]["best"]["candidate"]["plan"])
    costs = {"baseline": cost(graph, PruningPlan.full(graph.groups)), "compact": cost(graph, plan)}
    models: dict[str, dict[str, Any]] = {}
    with run.progress.stage("Read the test split") as report:
        for i, name in enumerate(("baseline", "compact")):
            artifact = ExportedModel.from_dict(facts["export"][name]["artifact"])
            metrics = test_metrics(run, run.directory / f"{name}.onnx")
            report(i + 1, 2, f"{run.workload.metric} {metrics[run.workload.metric]:.4f}")
            models[name] = {
                **metrics,
                "macs": costs[name].macs,
                "params": costs[name].params,
                "size_bytes": artifact.size_bytes,
                **facts["benchmark"]["latency"][name],
            }
    del model
    checks = gate(run, facts, models)
    passed = all(check["ok"] for check in checks)
    names = {"metric": run.workload.metric, "search_metric": run.workload.search_metric}
    return {"models": models, "checks": checks, "passed": passed, **names, "files": {}}


def report(run: Run, facts: Facts) -> dict[str, Any]:
    """The device profiling report, as one HTML page and as JSON: made before the model is registered, as part of it."""
    check_whole(run.journal, facts["search"]["num_candidates"])
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
        away=bool(run.tracker.failure),
    )
    return {"html": html.name, "front": len(rows), "files": {f.name: sha256_of(f) for f in (html, data, front)}}


def register(run: Run, facts: Facts) -> dict[str, Any]:
    """The compact model into the registry, with all that proves it, as the challenger of its devices."""
    check_whole(run.journal, facts["search"]["num_candidates"])
    with run.progress.stage("Track and register"):
        waiting = run.tracker.flush(timeout_s=600 if not run.tracker.failure else 10)
        if waiting:
            raise TrackingError(
                f"{waiting} candidates are not delivered to {shown(run.tracker.uri)}: {run.tracker.failure}"
            )
        for key, reason in run.tracker.refused.items():
            run.progress.say(
                f"Note: MLflow does not take candidate {key} ({reason}); it is in the journal and in candidates.parquet"
            )
        example, after = run.workload.example_input().numpy(), run.workload.postprocessing
        file = run.directory / ("compact.onnx" if after is None else f"compact.{after.name}.onnx")
        outputs = predict(file, example)
        files, name = _version_files(run, facts), run.config.tracking.registered_model or run.config.name
        known = {
            "plan_digest": facts["finetune"]["best"]["candidate"]["digest"],
            "gate": "passed" if facts["judge"]["passed"] else "failed",
            "speedup": f"{facts['benchmark']['speedup']['value']:.4f}",
            "timing_flags": " ".join(facts["benchmark"]["flags"]) or "none",
            "usage": _usage_tag(facts["export"]["usage"]),
            **{k: v for k, v in facts["judge"]["models"]["compact"].items() if v is not None},
        }
        devices = [profile.name for profile in run.profiles]
        entry = run.tracker.register(name, devices, file, example, outputs, known, files, _provenance(run, facts))
        names = [*facts["benchmark"]["files"], "compact.plan.json", "compact.safetensors", "version/run.yaml"]
        names += [] if after is None else ["compact.onnx"]  # the registry has the file with postprocessing
        extra = [run.directory / name for name in (*facts["report"]["files"], *names)]
        run.tracker.finish(_final_metrics(facts), [*extra, _candidate_table(run)])
    return {"name": entry.name, "version": entry.version, "uri": entry.uri, "files": {}}


def promote(run: Run, facts: Facts) -> dict[str, Any]:
    """Champion of its devices, if the gate passed and it is no worse than the champion there is; see ``promotion``."""
    if "register" not in facts:
        return {"promoted": False, "devices": {}, "reason": "it is not registered yet", "files": {}}
    if not run.config.gate.promote:
        return {"promoted": False, "devices": {}, "reason": "gate.promote is false", "files": {}}
    entry, decisions = facts["register"], {}
    kind = "" if run.workload.postprocessing is None else f".{run.workload.postprocessing.name}"
    for device in run.fleet:
        decisions[device.name] = promotion.promote(
            run.tracker.registry,
            entry["name"],
            device.profile,
            device.target,
            version=entry["version"],
            section=run.config.gate,
            workload=run.workload,
            noise_floor=device.noise_floor,
            recorded=load_benchmark(run.directory, run.fleet.file("benchmark", f"{kind}.json", device.name)),
            key=run.run_id,
            progress=run.progress,
        ).to_dict()
    promoted = all(decision["promoted"] for decision in decisions.values())
    return {"promoted": promoted, "devices": decisions, "reason": "", "files": {}}


STAGES = (
    Stage("baseline", "Baseline", baseline),
    Stage("search", "Search", search, version=3, retry_on=(DeviceError,)),
    Stage("finetune", "Fine-tune", finetune, retry_on=(DeviceError,)),
    Stage("export", "Export", export, version=2),
    Stage("benchmark", "Benchmark", benchmark, version=2, retry_on=(DeviceError,)),
    Stage("judge", "Gate", judge, version=2),
    Stage("report", "Report", report, version=2),
    Stage("register", "Register", register, version=2, retry_on=(TrackingError,)),
    Stage("promote", "Promote", promote, retry_on=(DeviceError, TrackingError)),
)


# -- parts of stages ---------------------------------------------------------------------------------------------------


def parity_images(run: Run) -> torch.Tensor:
    """The images that exported files are checked with, shape (n, channels, height, width)."""
    return first_batch(run, run.workload.search.first(run.config.export.parity_images))[0]


def _export_one(run: Run, name: str, network: nn.Module, plan_digest: str) -> dict[str, Any]:
    """A network's ONNX file and its parity; the same with postprocessing behind it, where the workload has some."""
    section, after = run.config.export, run.workload.postprocessing
    path, images = run.directory / f"{name}.onnx", parity_images(run)
    example = run.workload.example_input()
    artifact = export_onnx(
        network, example, path, opset=section.opset, plan_digest=plan_digest, dynamic_batch=section.dynamic_batch
    )
    parity = verify_parity(path, network, torch.split(images, 1), tolerance=section.tolerance)
    exported: dict[str, Any] = {"artifact": artifact.to_dict(), "parity": asdict(parity)}
    if after is not None:
        whole = run.directory / f"{name}.{after.name}.onnx"
        write_atomically(whole, after.append(onnx.load(path)).SerializeToString())
        with torch.inference_mode():
            expected = torch.cat([after.apply(network(part)) for part in torch.split(images, 1)])
        found = torch.from_numpy(predict(whole, images.numpy(), threads=torch.get_num_threads()))
        exported["whole"] = describe_onnx(whole, plan_digest=plan_digest).to_dict()
        agreement = asdict(after.compare(found, expected))
        exported["postprocessing"] = {**agreement, "counts": after.count(expected).tolist()}
    return exported


def _kinds(exported: Mapping[str, Any]) -> list[str]:
    """Under which keys an exported network's files are described."""
    return [kind for kind in ("artifact", "whole") if kind in exported]


def load_baseline(run: Run) -> tuple[nn.Module, ChannelGraph]:
    """The baseline from the run directory, on the CPU, and its channel groups."""
    model = run.workload.build_model()
    model.load_state_dict(load_weights(run.directory / "baseline.safetensors"))
    model.eval()
    return model, trace_network(model, run.workload.example_input())


def load_compact(run: Run, model: nn.Module, graph: ChannelGraph, plan: PruningPlan) -> nn.Module:
    """The fine-tuned compact model from the run directory, on the CPU."""
    compact = prune(model, graph, plan)
    compact.load_state_dict(load_weights(run.directory / "compact.safetensors"))
    return compact.eval()


def measure_reference(run: Run, oracle: Evaluator, graph: ChannelGraph) -> Evaluation:
    """The unpruned network's evaluation, under the protocol of the candidates."""
    with run.progress.stage("Measure the reference"):
        study = Study(run.journal, oracle, run.tracker.candidate, stage="reference")
        dense = Candidate(0, PruningPlan.full(graph.groups), "reference")
        reference = study.evaluate(dense, latency=True)
        oracle.calibrate(reference)
    if reference.status != "ok":
        raise UserError(f"the unpruned network cannot be evaluated: {reference.reason}")
    return reference


def reject_impossible(run: Run, oracle: Evaluator, smallest: PruningPlan, reference: Evaluation) -> None:
    """Before searching: can the smallest network of the space meet the targets and the device's budgets at all?

    Raises:
        UserError: it cannot; says the smallest that can be reached.
    """
    target = run.config.search.target
    macs_ratio = cost(oracle.graph, smallest).macs / reference["macs"]
    faults = []
    if target.macs_ratio is not None and macs_ratio > target.macs_ratio:
        faults.append(f"search.target.macs_ratio {target.macs_ratio:g}: the smallest reachable is {macs_ratio:.3f}")
    limits = {
        (profile.name, name): limit
        for profile in run.profiles
        for name in ("p50_ms", "p95_ms", "size_bytes")
        if (limit := getattr(profile.budgets, name)) is not None
    }
    if target.latency_ratio is not None or limits:
        study = Study(run.journal, oracle, stage="smallest")
        found = study.evaluate(Candidate(0, smallest, "smallest"), latency=True)
        ratio = _at_best(found.metrics)
        if target.latency_ratio is not None and ratio > target.latency_ratio:
            faults.append(
                f"search.target.latency_ratio {target.latency_ratio:g}: the smallest reachable is {ratio:.3f}"
            )
        for (device, name), limit in limits.items() if run.config.gate.budgets else ():
            at = f".{device}" if len(run.profiles) > 1 else ""  # how a device's own metrics are called
            least = found[name] if name == "size_bytes" else _at_best(found.metrics, at) * reference[f"{name}{at}"]
            if least > limit:
                faults.append(f"budget {name} {limit:g} of device {device}: the smallest reachable is {least:.4g}")
    if faults:
        listing = "\n  ".join(faults)
        raise UserError(
            f"nobody can meet this:\n  {listing}\nLoosen it, lower search.min_keep_ratio or device.channel_multiple, "
            "or start from a smaller network"
        )


def merit(run: Run, reward: Reward, evaluation: Evaluation, reference: Evaluation) -> tuple[bool, float]:
    """What ranks plans: whether the search's targets are met, then the reward."""
    return run.search_target.met(evaluation, reference), reward(evaluation)


def merit_against(run: Run, reference: Evaluation) -> Callable[[Evaluation], tuple[bool, float]]:
    """What ranks plans of a search against a reference."""
    reward = run.reward(reference, run.workload.search_metric)
    return lambda evaluation: merit(run, reward, evaluation, reference)


def revive_weights(run: Run, oracle: Evaluator) -> None:
    """Make the weights of the search's own fine-tunings usable in this process."""
    for record in run.journal.records:
        if record.get("stage") != "search" or not record.get("checkpoint"):
            continue
        request = request_of(record)
        if not oracle.restore(request, record["base"], record["checkpoint"]):
            oracle.train_auxiliary(request) if isinstance(request, AuxiliaryTraining) else oracle.finetune(request)


def _cut(run: Run, oracle: Evaluator, best: Entry) -> nn.Module:
    return oracle.network(best.candidate.plan, best.candidate.base).cpu()


def first_batch(run: Run, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of a small split, on the CPU, in plain NCHW memory."""
    every = torch.arange(len(split))
    images, targets = run.workload.batch(split, every, train=False, generator=None, device=torch.device("cpu"))
    return images.contiguous(), targets


def test_metrics(run: Run, onnx_file: Path) -> dict[str, float]:
    """Metrics of an ONNX file on the test split."""
    return dict(run.workload.test_metrics(*promotion.test_answers(run.workload, onnx_file)))


def _version_files(run: Run, facts: Facts) -> list[Path]:
    """What a version carries besides its model: how it was made, what was measured, and how to use it."""
    folder, judged = run.directory / "version", facts["judge"]
    folder.mkdir(exist_ok=True)
    tolerance = run.config.export.tolerance
    made = {
        "usage.json": json.dumps(facts["export"]["usage"]),
        "gate.json": json.dumps({key: judged[key] for key in ("passed", "metric", "checks", "models")}, indent=1),
        "parity.json": json.dumps(
            {name: {**_parity_of(facts["export"][name]), "tolerance": tolerance} for name in ("baseline", "compact")}
            | {"certificate": facts["export"]["certificate"]},
            indent=1,
        ),
        # Where it is registered is no part of what it is; and an address may hold a password.
        "run.yaml": yaml.safe_dump(
            {**run.config.model_dump(mode="json"), "tracking": TrackingSection().model_dump()}, sort_keys=False
        ),
    }
    for name, text in made.items():
        write_whole(folder / name, text)
    shutil.copyfile(run.directory / "compact.plan.json", folder / "plan.json")
    names = [*facts["benchmark"]["files"], facts["report"]["html"], DATA_FACTS]
    found = [folder / name for name in (*made, "plan.json")] + [run.directory / name for name in names]
    if run.workload.postprocessing is not None:
        shutil.copyfile(run.directory / "compact.onnx", folder / promotion.NETWORK)
        found += [folder / promotion.NETWORK, run.directory / promotion.INPUTS]
    return found


def _usage_tag(usage: Mapping[str, Any]) -> str:
    """How the model is used, as a tag; a tag has a limit, beyond which class names are in the version's file only."""
    text = json.dumps(usage)
    if len(text) <= MAX_TAG:
        return text
    return json.dumps({**usage, "classes": f"{len(usage['classes'])} names, in secateur/usage.json"})


def _parity_of(exported: Mapping[str, Any]) -> dict[str, Any]:
    after = exported.get("postprocessing")
    return {**exported["parity"], **({} if after is None else {"postprocessing": after})}


def _provenance(run: Run, facts: Facts) -> dict[str, Any]:
    """Where a version comes from, as digests: data, weights, code, device."""
    device = facts["search"]["device"]
    weights = {**facts["baseline"]["files"], "compact.safetensors": facts["finetune"]["files"]["compact.safetensors"]}
    return {
        "data": run.workload.fingerprint,
        "weights": weights,
        "plan": facts["finetune"]["best"]["candidate"]["digest"],
        "device": {"name": run.profile.name, "fingerprint": device["fingerprint"], "facts": device["facts"]},
        "seed": run.config.seed,
    }


def _final_metrics(facts: Facts) -> dict[str, float]:
    """The run's own metrics in MLflow: of both models on both splits, each named."""
    searched = {
        "baseline": facts["search"]["reference"]["metrics"],
        "compact": facts["finetune"]["best"]["evaluation"]["metrics"],
    }
    metrics: dict[str, float] = {}
    for name, model in facts["judge"]["models"].items():
        told = {key: float(value) for key, value in model.items() if value is not None}
        timed = {key: told.pop(key) for key in list(told) if key in ("macs", "params", "size_bytes") or key in TIMED}
        metrics |= {f"{name}.{key}": value for key, value in timed.items()}
        metrics |= {f"{name}.test_split.{key}": value for key, value in told.items()}
        found = searched[name]
        metrics |= {f"{name}.search_split.{key}": float(found[key]) for key in told if found.get(key) is not None}
    speedups = {"speedup": facts["benchmark"]["speedup"]}
    speedups |= {f"speedup.{name}": found["speedup"] for name, found in facts["benchmark"].get("fleet", {}).items()}
    if (timed := facts["benchmark"].get("postprocessing")) is not None:
        metrics[f"compact.p50_ms_{timed['name']}"] = timed["latency"]["compact"]["p50_ms"]
        speedups[f"speedup_{timed['name']}"] = timed["speedup"]
    for name, speedup in speedups.items():
        metrics |= {name if end == "value" else f"{name}.{end}": v for end, v in speedup.items() if v is not None}
    metrics |= {f"flag.{flag}": 1.0 for flag in facts["benchmark"]["flags"]}
    return metrics | {f"search.{name}": float(amount) for name, amount in facts["search"]["spent"].items()}


def gate(run: Run, facts: Facts, models: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every check with its value, its bound and whether it holds."""
    section, metric = run.config.gate, run.workload.metric
    base, compact = models["baseline"], models["compact"]
    checks: list[dict[str, Any]] = []

    def check(name: str, value: float, relation: str, bound: float) -> None:
        ok = {"<=": value <= bound, ">": value > bound}[relation]
        checks.append(
            {
                "name": name,
                "value": None if math.isnan(value) else value,
                "relation": relation,
                "bound": bound,
                "ok": bool(ok),
            }
        )

    proof = facts["export"]["certificate"]["max_relative_error"]
    check("certificate of the cut", math.nan if proof is None else proof, "<=", 1e-4)
    for name in ("baseline", "compact"):
        error = facts["export"][name]["parity"]["max_relative_error"]
        check(f"parity of {name}", error, "<=", run.config.export.tolerance)
        after = facts["export"][name].get("postprocessing")
        if after is not None:
            check(f"results of {name} that differ", float(after["differing"]), "<=", 0.0)
    if section.max_drop is not None:
        check(f"drop in {metric}", round(base[metric] - compact[metric], 6), "<=", section.max_drop)
    timed = facts["benchmark"].get("fleet", {run.profile.name: facts["benchmark"]})
    if section.min_speedup is not None:
        for name, found in timed.items():
            low = found["speedup"]["low"]
            check(f"speed-up{_on(run, name)}, lower end", math.nan if low is None else low, ">", section.min_speedup)
    if section.max_macs_ratio is not None:
        check("MACs ratio", compact["macs"] / base["macs"], "<=", section.max_macs_ratio)
    for profile in run.profiles if section.budgets else ():
        found = {**compact, **timed[profile.name]["latency"]["compact"]}
        for name, limit in profile.budgets.model_dump().items():
            if limit is not None:  # what the device does not tell cannot be promised
                value = math.nan if found[name] is None else found[name]
                check(f"{name}{_on(run, profile.name)}", value, "<=", limit)
    return checks


def _at_best(metrics: Mapping[str, float], at: str = "") -> float:
    """The smallest latency ratio that a measurement leaves open."""
    estimate = metrics.get(f"latency_ratio{at}", 0.0) / (1 + POINT_ESTIMATE)
    return metrics.get(f"latency_ratio_low{at}", estimate)


def _on(run: Run, name: str) -> str:
    """What tells a device's check from those of others; empty where there is one device."""
    return f" on {name}" if len(run.profiles) > 1 else ""


def _pictures(run: Run) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What baseline and compact model find on the same few images of the search split, drawn: uint8 (3, H, W) each."""
    after = run.workload.postprocessing
    if after is None:
        return []
    images, targets = first_batch(run, run.workload.search.first(NUM_PICTURES))
    drawn = []
    for name in ("baseline", "compact"):
        found = torch.from_numpy(predict(run.directory / f"{name}.{after.name}.onnx", images.numpy()))
        drawn.append(after.draw(images, found, targets))
    return list(zip(*drawn, strict=True))


def _candidate_table(run: Run) -> Path:
    """All candidates of the journal as one parquet file."""
    import pandas as pd  # type: ignore[import-untyped]

    rows = [
        {
            "stage": r["stage"],
            "kind": r["kind"],
            **{k: v for k, v in r["candidate"].items() if k != "parents"},
            "status": r["evaluation"]["status"],
            "forward": r["evaluation"].get("forward", ""),
            **r["evaluation"]["metrics"],
        }
        for r in run.journal.records
        if "evaluation" in r
    ]
    path = run.directory / "candidates.parquet"
    pd.DataFrame(rows).to_parquet(path)
    return path


def load_benchmark(directory: Path, name: str = "benchmark.json") -> BenchmarkResult:
    """The raw latencies of a run."""
    return BenchmarkResult.from_json((directory / name).read_text(encoding="utf-8"))
