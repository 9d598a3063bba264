"""Small real things for the pipeline's tests: run files, device profiles, workloads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from secateur.export.artifact import ExportedModel, TensorSpec
from secateur.pipeline.config import trust
from secateur.pipeline.config.reading import parse_run_file
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.devices.device import RunDevice
from secateur.pipeline.progress import Silent
from secateur.pipeline.run import facts as found
from secateur.pipeline.run.facts import Both, Facts
from secateur.pipeline.run.run import Run, create_run_directory
from secateur.pipeline.stages.order import STAGES
from secateur.pipeline.workloads import classification
from secateur.pruning.plan import PruningPlan
from secateur.pruning.search.protocol import Candidate, Entry, Evaluation

QUICK_DEVICE = {
    "description": "The local machine, timed very briefly (tests of behaviour, not of speed)",
    "target": "local",
    "provider": "CPUExecutionProvider",
    "threads": 1,
    "batch": 1,
    "channel_multiple": 4,
    "search": {"processes": 1, "warmup": 1, "min_repeats": 3, "min_seconds": 0.0},
    "final": {"processes": 3, "max_processes": 3, "warmup": 1, "min_repeats": 5, "min_seconds": 0.0, "strict": False},
}

TINY: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "threads": 1,
    "workload": {
        "name": "classification",
        "model": {"name": "cifar/resnet8"},
        "data": {"source": "digits", "image_size": 8, "augment": "shift"},
    },
    "baseline": {"epochs": 2, "lr": 0.1, "batch_size": 64, "autocast": "fp32"},
    "search": {
        "method": "ccep",
        "images": 64,
        "options": {"outer_iterations": 2, "population": 2, "generations": 1, "finetune_epochs": 1},
    },
    "reward": {"preset": "rewarded_v2"},  # by MACs: a killed run must reach the same plan whatever the clock says
    "finetune": {"top": 2, "epochs": 1, "batch_size": 64, "autocast": "fp32"},
    "gate": {"max_drop": 1.0, "min_speedup": None},
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with nested ``changes``."""
    result = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict) and key != "options"
        result[key] = merged(result[key], value) if nested else value
    return result


def quick_device(folder: Path, **changes: Any) -> Path:
    """A device profile file that measures briefly."""
    path = folder / "quick.yaml"
    path.write_text(yaml.safe_dump(merged(QUICK_DEVICE, changes)))
    return path


def tiny_config(folder: Path, **changes: Any) -> RunFile:
    """The tiny run, on the quick device."""
    device = {"device": {"profile": str(quick_device(folder)), "probe": False}}
    return parse_run_file(yaml.safe_dump(merged(merged(TINY, device), changes)))


def write_tiny(folder: Path, **changes: Any) -> Path:
    """The tiny run as a file."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(folder, **changes).model_dump(mode="json")))
    return path


def digits(**data: Any) -> classification.Classification:
    """The digits workload with a small ResNet."""
    options = {"model": {"name": "cifar/resnet8"}, "data": {"source": "digits", **data}}
    return classification.build(classification.Options.model_validate(options))


def opened(config: RunFile) -> Run:
    """A new run."""
    return Run(create_run_directory(config), Silent())


def consent(config: RunFile, directory: Path) -> None:
    """Consent, as a person would give it, to what a run's file and profiles name as code."""
    trust.allow(entry for found in trust.code_in(config, directory / "run.yaml") for entry in found.entries)


def perform(run: Run, until: str = "promote", facts: Facts | None = None) -> Facts:
    """The stages of a run that are not done yet, up to one, as the flow does them, without Prefect."""
    facts = facts or Facts()
    for stage in STAGES:
        if stage.name not in vars(facts):
            facts = facts.plus(**{stage.name: stage.read(stage.perform(run, facts))})
        if stage.name == until:
            break
    return facts


def made_up_facts(**changes: dict[str, Any]) -> Facts:
    """Facts of a whole run, made up.

    Args:
        changes: of a stage's facts, e.g. ``gate={"passed": False}``.
    """
    size = {"macs": 1_000_000, "params": 10_000, "size_bytes": 100_000}
    timing = found.Timing(
        p50_ms=1.0, p95_ms=2.0, cpu_p50_ms=0.9, cpu_p95_ms=1.9, load_ms=5.0, first_ms=3.0, peak_rss_bytes=10_000_000
    )
    model = found.ModelFacts(metrics={"top1": 0.9}, timing=timing, **size)
    reference = Evaluation(metrics={"top1": 0.9, "macs": 1e6})
    plan = PruningPlan({"a": 4}, {"a": (0, 1)})
    best = Entry(Candidate(0, plan, "final", (1,), "tuned"), Evaluation(metrics={"top1": 0.9, "macs": 5e5}))
    proof = found.Proof(ok=True, max_relative_error=1e-7, reason="")
    parity = found.ParityFacts(**vars(proof), argmax_agreement=1.0, samples=8)
    ports = {"input": TensorSpec((1, 3, 8, 8), "float32")}
    artifact = ExportedModel(Path("compact.onnx"), "0" * 64, 17, "fp32", ports, {}, size["size_bytes"])
    network = found.ExportedNetwork(artifact=artifact, parity=parity)
    facts = Facts(
        baseline=found.BaselineFacts(origin="trained (0)", files={}),
        search=found.SearchFacts(
            reference=reference,
            archive=(best,),
            num_candidates=4,
            agreement=None,
            spent={"evaluations": 4.0, "images_forwarded": 256},
            latency=found.LatencyFacts(measured=2, predicted=0, trusted=False),
            device=RunDevice("f", {"conv": 4}, None, {}, "the profile, unprobed", {"cpus": 2}),
            certificate=proof,
            graph="a: 4 channels",
            files={},
        ),
        finetune=found.FinetuneFacts(best=best, finals=(best,), files={}),
        export=found.ExportFacts(
            baseline=network, compact=network, certificate=proof, usage={"image_size": 8}, files={}
        ),
        benchmark=found.BenchmarkFacts(
            latency=Both(timing, timing),
            speedup=found.Speedup(low=1.4, high=1.6, value=1.5),
            flags=(),
            statistic="cpu",
            device="quick",
            files={},
        ),
        gate=found.GateFacts(
            models=Both(model, model), checks=(), passed=True, metric="top1", search_metric="top1", files={}
        ),
        report=found.ReportFacts(html="report.html", front=1, files={}),
        register=found.RegisterFacts(name="tiny", version="1", uri="models:/tiny/1", files={}),
        promote=found.PromoteFacts(promoted=True, devices={}, reason="", files={}),
    )
    return facts.plus(**{name: replace(getattr(facts, name), **change) for name, change in changes.items()})


def start_server(home: Path, port: int) -> subprocess.Popen[bytes]:
    """A real MLflow server on the SQLite store of ``home``; stop it with ``end``."""
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{home}/mlflow.db", "--artifacts-destination", str(home / "served")]
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, start_new_session=True, env=env, stdout=quiet, stderr=quiet)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
