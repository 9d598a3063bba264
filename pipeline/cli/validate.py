"""``secateur validate``: everything that is wrong with a run, and what is known of it, before it begins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.device_profiles.wording import number_of
from secateur.pipeline.cli.options import Overrides, Trust
from secateur.pipeline.cli.trust import consented
from secateur.pipeline.errors import EXIT_USER, UserError, masked
from secateur.pipeline.terminal import err, one_line, out, table

if TYPE_CHECKING:
    from secateur.pipeline.config.faults import Fault
    from secateur.pipeline.run.estimate import Estimate
    from secateur.pipeline.run.preflight import Preflight
    from secateur.pipeline.workloads import DataSummary

FORMAT = 1
"""Of the JSON document; raised when a key changes its meaning or goes."""
MOST_ROWS = 50
"""Classes and sizes that are printed; ``--json`` has all."""


def validate(
    file: Annotated[Path, typer.Argument(help="The run file (YAML).")],
    set_: Overrides = None,
    every: Annotated[
        bool, typer.Option("--all", help="Decode every image, also where there are more than 20,000.")
    ] = False,
    estimating: Annotated[
        bool, typer.Option("--estimate/--no-estimate", help="Time a few steps to tell what the run takes.")
    ] = True,
    groups: Annotated[
        bool, typer.Option("--groups", help="List the channel groups, and what is frozen and why.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
    trust: Trust = False,
) -> None:
    """Check all that a run needs, without training; report everything that is wrong, and what the run will be.

    `secateur doctor` checks this machine, `secateur check` the code of a task of your own.

    Example: secateur validate flowers.yaml --set search.target.macs_ratio=0.5
    """
    from secateur.pipeline.config.faults import Fault, FaultsError
    from secateur.pipeline.config.reading import load_run_file

    try:
        config = consented(lambda: load_run_file(file, set_ or []), file, trust)
    except UserError as error:
        if not as_json:
            raise
        faults = error.faults if isinstance(error, FaultsError) else (Fault((), str(error)),)
        out.data({"format": FORMAT, "file": str(file), "valid": False, "faults": _faults(faults), "notes": []})
        raise typer.Exit(EXIT_USER) from error
    from secateur.pipeline.progress import RichProgress
    from secateur.pipeline.run.estimate import estimate
    from secateur.pipeline.run.preflight import examine
    from secateur.pipeline.workloads.data.content import Reading

    preflight = examine(config, Reading(RichProgress(err), "all" if every else "sample"), tracking=True, whole=True)
    taken = estimate(preflight) if estimating else None
    if as_json:
        out.data(document(file, preflight, taken))
    else:
        _show(preflight, taken)
        if groups and preflight.network is not None:
            out.print(f"\n{preflight.network.graph.report()}\n")
    if preflight.faults and as_json:
        raise typer.Exit(EXIT_USER)
    if preflight.faults:
        raise FaultsError(str(file), preflight.faults)
    if not as_json:
        devices = ", ".join(profile.name for profile in preflight.profiles or ())
        out.print(f"{one_line(file)} is valid: {config.search.method} for device {devices}.")


def document(file: Path, preflight: Preflight, taken: Estimate | None = None) -> dict[str, Any]:
    """What is known of a run, as JSON can hold it; docs/reference/run-file.md describes every key."""
    return {
        "format": FORMAT,
        "file": str(file),
        "valid": not preflight.faults,
        "faults": _faults(preflight.faults),
        "notes": list(preflight.notes),
        "method": preflight.config.search.method,
        "devices": None if preflight.profiles is None else [profile.name for profile in preflight.profiles],
        "compute": None if preflight.compute is None else preflight.compute.type,
        "data": None if preflight.data is None else _data(preflight.data, preflight),
        "network": _network(preflight),
        "estimate": None if taken is None else _estimate(taken),
    }


def _estimate(taken: Estimate) -> dict[str, Any]:
    return {
        "seconds": round(taken.seconds, 1),
        "cpu_seconds": round(taken.cpu_seconds, 1),
        "parts": [
            {"stage": part.stage, "seconds": round(part.seconds, 1), "cpu_seconds": round(part.cpu_seconds, 1)}
            for part in taken.parts
        ],
        "memory_bytes": taken.memory_bytes,
        "memory": dict(taken.memory),
        "evaluations": taken.counted.evaluations,
        "epochs": round(taken.counted.epochs, 3),
        "measurements": round(taken.work["measurements"]),
        "at_least": not taken.counted.complete,
    }


def _faults(faults: tuple[Fault, ...] | list[Fault]) -> list[dict[str, str]]:
    return [
        {"key": ".".join(map(str, fault.place)), "where": fault.where, "message": masked(fault.message)}
        for fault in faults
    ]


def _data(data: DataSummary, preflight: Preflight) -> dict[str, Any]:
    return {
        "images": _images(preflight),
        "counted": data.counted,
        "classes": [{"name": c.name, "train": c.train, "search": c.search, "test": c.test} for c in data.classes],
        "sizes": [{"width": width, "height": height, "images": num} for (width, height), num in _by_count(data.sizes)],
    }


def _images(preflight: Preflight) -> dict[str, int]:
    """Images of each split."""
    workload = preflight.workload
    assert workload is not None
    return {"train": len(workload.train), "search": len(workload.search), "test": len(workload.test)}


def _network(preflight: Preflight) -> dict[str, Any] | None:
    network = preflight.network
    if network is None:
        return None
    whole, smallest, space = network.whole, network.smallest, network.space
    return {
        "input": list(network.input),
        "macs": whole.macs,
        "params": whole.params,
        "groups": [
            {"name": group.name, "channels": group.size, "widths": list(space.allowed.get(group.name, (group.size,)))}
            for group in network.graph.groups
        ],
        "frozen_macs_share": network.frozen_share,
        "smallest": {
            "macs": smallest.macs,
            "params": smallest.params,
            "macs_ratio": smallest.macs / whole.macs,
            "params_ratio": smallest.params / whole.params,
            "widths_from": network.steps,
        },
    }


def _by_count(sizes: Mapping[tuple[int, int], int]) -> list[tuple[tuple[int, int], int]]:
    return sorted(sizes.items(), key=lambda item: (-item[1], item[0]))


def _show(preflight: Preflight, taken: Estimate | None) -> None:
    """The same for people."""
    if preflight.data is not None:
        _show_data(preflight.data, preflight)
    if preflight.network is not None:
        _show_network(preflight)
    if taken is not None:
        _show_estimate(taken)
    for note in preflight.notes:
        out.print(f"Note: {note}")


def _show_data(data: DataSummary, preflight: Preflight) -> None:
    images = _images(preflight)
    parts = tuple(images)
    rows = table("class", *parts, title=f"{data.counted.capitalize()} of each class", right=parts)
    for c in data.classes[:MOST_ROWS]:
        rows.add_row(c.name, *(f"{num:,}" for num in (c.train, c.search, c.test)))
    if len(data.classes) > MOST_ROWS:
        rows.add_row(f"and {len(data.classes) - MOST_ROWS:,} more classes (--json has all)")
    if data.classes:
        out.print(rows)
    out.print("Images: " + ", ".join(f"{num:,} {part}" for part, num in images.items()))
    sizes = _by_count(data.sizes)
    shown = ", ".join(f"{width}x{height} ({num:,})" for (width, height), num in sizes[:5])
    more = f" and {len(sizes) - 5:,} more" if len(sizes) > 5 else ""
    out.print(f"Image sizes (width x height): {shown}{more}")


def _show_network(preflight: Preflight) -> None:
    network = preflight.network
    assert network is not None
    whole, smallest, space = network.whole, network.smallest, network.space
    groups = network.graph.groups
    channels = sum(group.size for group in groups)
    searched = sum(group.name in space.allowed for group in groups)
    out.print(f"Network: {whole.macs:,} MACs, {whole.params:,} params for inputs of shape {network.input}")
    out.print(
        f"Channel groups: {len(groups)} with {number_of(channels, 'channel(s)')}, {searched} of them searched; "
        f"layers with {network.frozen_share:.1%} of the MACs keep their channels"
    )
    out.print(
        f"Smallest reachable: {smallest.macs:,} MACs ({smallest.macs / whole.macs:.3f}), {smallest.params:,} params "
        f"({smallest.params / whole.params:.3f}); widths by {network.steps}"
    )


def _show_estimate(taken: Estimate) -> None:
    counted = taken.counted
    least = "" if counted.complete else "at least "
    parts = ", ".join(f"{part.stage.lower()} {_duration(part.seconds)}" for part in taken.parts)
    out.print(f"On this machine, about {least}{_duration(taken.seconds)} ({parts})")
    _show_search(taken)


def _show_search(taken: Estimate) -> None:
    counted = taken.counted
    least = "" if counted.complete else "at least "
    out.print(
        f"The search: {least}{number_of(counted.evaluations, 'evaluation(s)')} and "
        f"{number_of(counted.epochs, 'epoch(s)')} of training; "
        f"{number_of(round(taken.work['measurements']), 'measurement(s)')} on the device; memory "
        f"{taken.memory_bytes / 2**30:.1f} GiB"
    )


def show_plan(preflight: Preflight, taken: Estimate) -> None:
    """The stages of a run in their order, and what each takes."""
    config = preflight.config
    devices = ", ".join(profile.name for profile in preflight.profiles or ())
    out.print(f"{config.name}: {config.search.method} for device {devices}, on this machine")
    rows = table("stage", "time", box=None, header_style="bold", right=("time",))
    for part in taken.parts:
        rows.add_row(part.stage, _duration(part.seconds))
    rows.add_row("all", ("" if taken.counted.complete else "at least ") + _duration(taken.seconds))
    out.print(rows)
    _show_search(taken)
    out.print("Nothing was begun.")


def _duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
