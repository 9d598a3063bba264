"""The registered version against the champions of its devices."""

from __future__ import annotations

from secateur.pipeline.devices.fleet import Device
from secateur.pipeline.lifecycle import promotion
from secateur.pipeline.run.facts import Facts, PromoteFacts, RegisterFacts
from secateur.pipeline.run.run import Run
from secateur.pipeline.stages.benchmark import load_benchmark
from secateur.pipeline.tracking import Decision


def promote(run: Run, facts: Facts) -> PromoteFacts:
    """Champion of its devices, if the gate passed and it is no worse than the champion there is; see ``promotion``.

    Raises:
        TrackingError: the tracking server is unreachable or refuses.
        DeviceError: a device is unreachable, or its times mean nothing.
    """
    if facts.register is None:
        return _nothing_decided("it is not registered yet")
    if not run.config.gate.promote:
        return _nothing_decided("gate.promote is false")
    decisions = {device.name: _decide(run, facts.register, device) for device in run.fleet}
    promoted = all(decision.promoted for decision in decisions.values())
    return PromoteFacts(promoted=promoted, devices=decisions, reason="", files={})


def _nothing_decided(reason: str) -> PromoteFacts:
    return PromoteFacts(promoted=False, devices={}, reason=reason, files={})


def _decide(run: Run, entry: RegisterFacts, device: Device) -> Decision:
    after = run.workload.postprocessing
    kind = "" if after is None else f".{after.name}"
    return promotion.promote(
        run.tracker.registry,
        entry.name,
        device.profile,
        device.target,
        version=entry.version,
        section=run.config.gate,
        workload=run.workload,
        noise_floor=device.noise_floor,
        recorded=load_benchmark(run.directory, run.fleet.file("benchmark", f"{kind}.json", device.name)),
        key=run.run_id,
        progress=run.progress,
    )
