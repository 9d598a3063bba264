"""The compact network called without a pause: whether heat slows the device down."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from secateur.device_profiles import DeviceError, measure
from secateur.device_profiles.measure import Process, Second
from secateur.device_profiles.profile import Tier
from secateur.pipeline.devices.fleet import Device
from secateur.pipeline.files import sha256_of, write_whole
from secateur.pipeline.progress import ProgressView
from secateur.pipeline.run.facts import SustainedFacts
from secateur.pipeline.run.kept_facts import SUSTAINED

PHASE = "sustained"
"""What the agent calls it in its telemetry."""
BEFORE = Tier(processes=1, warmup=3, min_repeats=3, min_seconds=0.0, max_warmup_seconds=1.0, retries=0)
"""How the process is measured in which it is done; its calls count for nothing."""
SENSORS = ("temperature_c", "freq_mhz")
PART = 0.1
"""Of the seconds: what the first and the last ones are."""


def sustained(
    device: Device, model: Path, directory: Path, seconds: float, progress: ProgressView
) -> tuple[SustainedFacts | None, dict[str, str]]:
    """What a sustained run found, and the file with every second of it and its sha256; None where it could not be done.

    Args:
        seconds: 0 = none is wanted.
    """
    if not seconds:
        return None, {}
    with progress.stage(f"Call without a pause on {device.name} for {seconds:g} s") as report:
        try:
            result = measure(device.target, device.profile, {"compact": model}, BEFORE, sustain_s=seconds)
        except DeviceError as error:
            report(1, 1, f"not done: {error}")
            return None, {}
        process = result.processes[0]
        windows, samples = process.models["compact"].sustained, readings(process)
        if not windows:
            report(1, 1, "not done: the device did not answer to it")
            return None, {}
        facts = facts_of(windows, samples)
        report(1, 1, f"p50 {facts.first_p50_ms:.3f} ms first, {facts.last_p50_ms:.3f} ms last")
    file = directory / SUSTAINED
    told = {"format": 1, "device": device.name, "seconds": [asdict(each) for each in windows], "sensors": samples}
    write_whole(file, json.dumps(told) + "\n")
    return facts, {file.name: sha256_of(file)}


def readings(process: Process) -> list[dict[str, float]]:
    """Temperature and clock while a process called without a pause, those that the device tells; ``t_s`` from then."""
    told = [_numbers(each) for each in process.environment.get("telemetry", ()) if each.get("phase") == PHASE]
    told = [each for each in told if "t_s" in each]
    begin = told[0]["t_s"] if told else 0.0
    return [{**each, "t_s": round(each["t_s"] - begin, 3)} for each in told if len(each) > 1]


def _numbers(sample: Mapping[str, Any]) -> dict[str, float]:
    known = {name: sample[name] for name in ("t_s", *SENSORS) if name in sample}
    return {name: float(each) for name, each in known.items() if type(each) in (int, float)}


def facts_of(windows: Sequence[Second], samples: Sequence[Mapping[str, float]]) -> SustainedFacts:
    """The figures of a sustained run."""
    part = max(1, round(PART * len(windows)))
    first, last = (float(np.median([each.p50_ms for each in some])) for some in (windows[:part], windows[-part:]))
    heat = [each["temperature_c"] for each in samples if "temperature_c" in each]
    clock = [each["freq_mhz"] for each in samples if "freq_mhz" in each]
    known: dict[str, Any] = {"temperature_c": (heat[0], max(heat), heat[-1])} if heat else {}
    known |= {"freq_mhz": (clock[0], min(clock), clock[-1])} if clock else {}
    end = windows[-1]
    return SustainedFacts(
        seconds=round(end.t_s + end.calls * end.p50_ms / 1000, 1),
        calls=sum(each.calls for each in windows),
        first_p50_ms=first,
        last_p50_ms=last,
        **known,
    )
