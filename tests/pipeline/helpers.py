"""Small real things for the pipeline's tests: run files, device profiles, workloads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.reading import parse_run_file
from pipeline.config.schema import RunFile
from pipeline.workloads import classification

QUICK_DEVICE = {
    "description": "The local machine, timed very briefly (tests of behaviour, not of speed)",
    "target": "local",
    "provider": "CPUExecutionProvider",
    "threads": 1,
    "batch": 1,
    "precision": "fp32",
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
        "model": {"name": "cifar_resnet8"},
        "data": {"source": "digits", "image_size": 8, "augment": "shift"},
    },
    "baseline": {"epochs": 2, "lr": 0.1, "batch_size": 64},
    "search": {
        "method": "ccep",
        "images": 64,
        "options": {"outer_iterations": 2, "population": 2, "generations": 1, "finetune_epochs": 1},
    },
    "reward": {"preset": "rewarded_v2"},  # by MACs: a killed run must reach the same plan whatever the clock says
    "finetune": {"top": 2, "epochs": 1, "batch_size": 64},
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
    options = {"model": {"name": "cifar_resnet8"}, "data": {"source": "digits", **data}}
    return classification.build(classification.Options.model_validate(options))


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
