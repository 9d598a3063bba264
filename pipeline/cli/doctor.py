"""``secateur doctor``: whether this machine is ready for a run, and how to put right what is not."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.pipeline import errors
from secateur.pipeline.cli import completers
from secateur.pipeline.cli.devices import check, profiles
from secateur.pipeline.cli.options import Json, Trust
from secateur.pipeline.cli.trust import consent_to_profile
from secateur.pipeline.terminal import command, out

if TYPE_CHECKING:
    from secateur.device_profiles.check import Check, Status

LEAST_FREE, ENOUGH_FREE = 1 << 30, 10 << 30
"""Bytes of disk where runs are kept: below the first one nothing can run, above the second one many runs can."""
ENOUGH_MEMORY = 2 << 30
"""Bytes that a small run takes with all its libraries."""
PACKAGES = ("torch", "torchvision", "numpy", "onnx", "onnxruntime", "mlflow", "prefect")
LONGEST_S = 5.0
"""A server that has not answered by then is unreachable."""


def doctor(
    devices: Annotated[
        list[str] | None,
        typer.Option(
            "--device",
            "-d",
            metavar="NAME",
            help="A device to check too; default: local.",
            autocompletion=completers.devices,
        ),
    ] = None,
    json_: Json = False,
    trust: Trust = False,
) -> None:
    """Check this machine: versions, cores, number types, disk, stores and devices; say how to put right what is not.

    Ends with 0 if all is well or there are only warnings, with 4 if something is missing.
    `secateur validate` checks a run file, `secateur check` a task's code, `secateur devices check` one device.

    Example: secateur doctor --device kitchen
    """
    from secateur import __version__

    checks = [*_machine(), *_stores()]
    for name in devices or ["local"]:
        profile = profiles.load(name)
        consent_to_profile(name, trust)
        checks += [_of(name, entry) for entry in check.ask(profile)]
    if json_:
        out.data({"version": __version__, "checks": [vars(entry) for entry in checks]})
    else:
        out.print(f"Secateur {__version__}")
        check.print_checks("this machine", tuple(checks))
    if any(entry.status == "missing" for entry in checks):
        raise typer.Exit(errors.EXIT_SURROUNDINGS)


def _of(device: str, entry: Check) -> Check:
    from dataclasses import replace

    return replace(entry, name=f"{device}: {entry.name}")


def _machine() -> Iterator[Check]:
    from secateur.device_profiles.check import Check

    yield Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from _packages()
    yield from _cores()
    yield from _compute()
    yield from _room()


def _packages() -> Iterator[Check]:
    """The version of every part that a run uses."""
    from importlib.metadata import PackageNotFoundError, version

    from secateur.device_profiles.check import Check
    from secateur.pipeline.parts import EXTRA_OF

    for package in PACKAGES:
        try:
            yield Check(package, "ok", version(package))
        except PackageNotFoundError:
            part = f"secateur[{EXTRA_OF[package]}]" if package in EXTRA_OF else package
            yield Check(package, "missing", "is not installed", command("pip", "install", part))


def _cores() -> Iterator[Check]:
    """How many cores this process may use, by its affinity and its control groups."""
    from secateur.device_profiles.check import Check
    from secateur.device_profiles.cores import allowed_cores, cores_of_machine, usable_cores

    there, allowed, usable = cores_of_machine(), allowed_cores(), usable_cores()
    text = f"{usable} can be used; the machine has {there}, the affinity allows {allowed}"
    few = usable < 2 <= there
    fix = "give this process more (taskset, a container's CPU limit): training and measuring would share one"
    yield Check("cores", "warning" if few else "ok", text, fix if few else "")
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) != usable:
        yield Check("threads", "ok", f"OMP_NUM_THREADS is {asked}; a run sets its own (threads: in the run file)")


def _compute() -> Iterator[Check]:
    """Where networks are trained, and in which number types."""
    from secateur.device_profiles.check import Check

    try:
        import torch

        from secateur.pipeline.training.precision import native_bf16
    except ImportError:
        return  # told with the packages
    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else "no CUDA: networks are trained on the processor"
    yield Check("compute", "ok", name)
    native = native_bf16(torch.device("cuda" if cuda else "cpu"))
    yield Check("bf16", "ok", "native: autocast: auto trains in it" if native else "not native: autocast: auto is fp32")


def _room() -> Iterator[Check]:
    """Disk where runs are kept, and memory."""
    import psutil

    from secateur.device_profiles.check import Check
    from secateur.pipeline.surroundings import DATA, HOME, folder, home, made

    try:
        place = made(home(), HOME)
    except errors.SurroundingsError as error:
        yield Check("home", "missing", str(error), f"set {HOME} to a folder that you may write in")
    else:
        free = shutil.disk_usage(place).free
        status: Status = "ok" if free >= ENOUGH_FREE else "warning" if free >= LEAST_FREE else "missing"
        fix = "" if status == "ok" else f"make room, or set {HOME} to a folder on another disk"
        yield Check("disk", status, f"{free / 2**30:.1f} GiB free for runs in {place}", fix)
    data = folder(DATA)
    if data is not None:
        there = data.is_dir()
        fix = "" if there else f"make it, or set {DATA} to the folder that your data lies in"
        yield Check("data", "ok" if there else "warning", f"{data}{'' if there else ' is not there'}", fix)
    free = psutil.virtual_memory().available
    text, fix = f"{free / 2**30:.1f} GiB can be used", "end other programs, or lower search.memory_mb and batch_size"
    yield Check("memory", "ok", text) if free >= ENOUGH_MEMORY else Check("memory", "warning", text, fix)


def _stores() -> Iterator[Check]:
    """MLflow, and Prefect where it has a server of its own."""
    from secateur.device_profiles.check import Check
    from secateur.pipeline.config.schema import RunFile, TrackingSection
    from secateur.pipeline.surroundings import TRACKING_URI, home, variable
    from secateur.pipeline.tracking.check import check_tracking
    from secateur.pipeline.tracking.place import redacted, store_uri

    section = TrackingSection(required=True)
    report = check_tracking(RunFile(name="doctor", workload={}, tracking=section), home())
    if report.faults:
        fix = f"start it, or correct {TRACKING_URI}" if report.unreachable else "as it says there"
        yield Check("MLflow", "missing", "; ".join(report.faults), fix)
    else:
        yield Check("MLflow", "ok", "; ".join((redacted(store_uri(section, home())), *report.notes)))
    if (uri := variable("PREFECT_API_URL")) is not None:
        fault = _unreachable(f"{uri.rstrip('/')}/health")
        fix = "start it, or unset PREFECT_API_URL: a run then has a server of its own"
        found = f"{redacted(uri)} {'answers' if not fault else f'cannot be reached: {fault}'}"
        yield Check("Prefect", "missing" if fault else "ok", found, fix if fault else "")


def _unreachable(address: str) -> str:
    """Why nothing answers at an address; empty where something does."""
    from http.client import HTTPException
    from urllib.request import urlopen

    if not address.startswith(("http://", "https://")):
        return "it is no http address"
    try:
        with urlopen(address, timeout=LONGEST_S):  # noqa: S310 - http or https
            return ""
    except (OSError, HTTPException, ValueError) as error:
        return str(getattr(error, "reason", error))
