"""The flows that schedules start: compress, profile, promote. Prefect imports this module in a worker's process.

An expected error ends a flow run as Failed with its message; a gate that does not hold is a completed run that says
so. What a flow began and could not finish, the next run of its deployment finishes.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from prefect import flow
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.runtime import deployment as this_deployment
from prefect.runtime import flow_run as this_flow_run
from prefect.states import Completed, Crashed, Failed

from secateur.device_profiles import DeviceError, DeviceProfile
from secateur.export.errors import ExportError
from secateur.pipeline import children, foreign
from secateur.pipeline.config import trust
from secateur.pipeline.config.reading import load_run_file
from secateur.pipeline.config.schema import TrackingSection
from secateur.pipeline.devices.device import Leased
from secateur.pipeline.errors import SurroundingsError, TrackingError, UserError
from secateur.pipeline.flow import run_claim
from secateur.pipeline.flow.compress import ON_SCHEDULE_S, resume_tracking, work_through
from secateur.pipeline.flow.device_lease import Lease, lease_of, make_limit, promotion_limit
from secateur.pipeline.flow.logs import LogProgress, say
from secateur.pipeline.flow.notify import ALARM, PROMOTED, tell
from secateur.pipeline.flow.parameters import Compress, Profile, Promote, Registered
from secateur.pipeline.lifecycle.reprofile import Reprofile, chosen, markdown, profile_of, reprofile
from secateur.pipeline.report import registered
from secateur.pipeline.run.run import Run
from secateur.pipeline.surroundings import home, prepare
from secateur.pipeline.tracking import Decision, Registry, alias_of, store_uri
from secateur.pipeline.tracking.reprofiles import page_of, record_reprofile
from secateur.pipeline.tracking.schemas import DecisionTag, checked, read_json

Expected = (UserError, SurroundingsError, DeviceError, ExportError)
NOT_PASSED, NOT_PROMOTED = "Gate not passed", "Not promoted"


def answering(work: Callable[..., State[Any]]) -> Callable[..., State[Any]]:
    """An expected error becomes the flow run's message; anything else is a bug and keeps its traceback."""

    @functools.wraps(work)
    def answer(*args: Any, **kwargs: Any) -> State[Any]:
        try:
            with foreign.told():
                prepare()
                return work(*args, **kwargs)
        except Expected as error:
            get_run_logger().error(str(error))
            return Failed(message=str(error))

    return answer


@flow(name="compress", on_failure=[tell], on_crashed=[tell], on_completion=[tell])
@answering
def compress(job: Compress) -> State[Any]:
    """Run a run file from the baseline to the registered, device-timed compact model; or finish a run left undone.

    Raises:
        UserError: the run file is wrong, or its code needs consent; the next flow run begins anew.
        ExportError: a network of it cannot be exported; likewise.
        SurroundingsError: disk, network or tracking server fail; the next flow run goes on.
        DeviceError: the device cannot measure; likewise.
    """
    trust.accept(job.trusted)
    config = trust.consented(lambda: load_run_file(Path(job.file), job.overrides), Path(job.file))
    flow_run, deployment = own_id(), this_deployment.id or "none"
    progress = LogProgress(say)
    taken = run_claim.take(config, deployment, flow_run, lambda directory: Run(directory, progress), say)
    say(f"Run directory: {taken.directory}")
    if taken.earlier is not None:
        say(f"Continues what flow run {taken.earlier} left")
        mark_crashed(taken.earlier, flow_run)
    try:
        with foreign.told(), children.kept(home(), f"flow run {flow_run}"), taken.run as run:
            run.lease_devices({profile.name: lease_of(profile, say) for profile in run.profiles})
            resume_tracking(run)
            facts, undelivered = work_through(run, ON_SCHEDULE_S)
            link(run)
    except (UserError, ExportError) as error:
        run_claim.end(taken.directory, str(error))  # it would fail again
        raise
    except (SurroundingsError, DeviceError):
        raise  # the next run goes on
    except Exception as error:
        run_claim.end(taken.directory, f"bug: {error}")
        raise
    if undelivered is not None:
        raise undelivered
    passed, promoted = facts.gate.passed, facts.promote is not None and facts.promote.promoted
    run_claim.end(taken.directory, "passed" if passed else "not passed")
    lines = registered(facts)
    if not passed:
        failed = ", ".join(check.name for check in facts.gate.failed)
        return Completed(name=NOT_PASSED, message="\n".join([f"The gate did not pass: {failed}", *lines]))
    return Completed(name=PROMOTED if promoted else NOT_PROMOTED, message="\n".join(lines))


@flow(name="profile", on_failure=[tell], on_crashed=[tell], on_completion=[tell])
@answering
def profile(job: Profile) -> State[Any]:
    """Time registered champions again on their devices; an alarm where one has become slower or larger."""
    trust.accept(job.trusted)
    registry, uri = registry_of(job)
    champions = chosen(registry, job.names, job.device)
    reprofiles: list[Reprofile] = []
    faults: list[str] = []
    profiles = [Path(file) for file in job.device_profiles]
    for outcome in reprofile(
        registry, champions, job.tolerances, lease=device_lease, progress=LogProgress(say), profiles=profiles
    ):
        if isinstance(outcome, Reprofile):
            reprofiles.append(outcome)
            about = (outcome.name, outcome.version, outcome.device)
            with told(faults, *about):
                record_reprofile(uri, home(), about, own_id(), outcome.metrics(), outcome.to_json())
        else:
            name, device, error = outcome
            faults.append(f"{name} on {device}: {error}")
    if reprofiles:
        artifact(markdown(reprofiles), "secateur-profile")
    worse = [one for one in reprofiles if one.regressions]
    alarms = [
        f"{r.name} {r.version} on {r.device}: "
        + ", ".join(f"{f.name} {f.then:.4g} -> {f.now:.4g} ({f.change})" for f in r.regressions)
        + f"; {r.cause}"
        for r in worse
    ]
    if alarms and job.on_regression == "fail":
        return Failed(name=ALARM, message="\n".join([*alarms, *faults]))
    if faults:
        return Failed(message="\n".join([*faults, *alarms]))
    same = ", ".join(f"{r.name} {r.version} on {r.device}" for r in reprofiles)
    return Completed(message="\n".join(alarms) or f"As they were: {same}")


@flow(name="promote", on_failure=[tell], on_crashed=[tell], on_completion=[tell])
@answering
def promote(job: Promote) -> State[Any]:
    """Compare challengers with the champions of their devices; those that pass every gate take their place."""
    from secateur.pipeline.lifecycle import promotion

    trust.accept(job.trusted)
    registry, _ = registry_of(job)
    faults: list[str] = []
    decisions: list[Decision] = []
    for name, device in challengers(registry, job):
        limit = promotion_limit(name)
        with told(faults, name, device):
            where = profile_of(device, [Path(file) for file in job.device_profiles])
            make_limit(limit)
            target = Leased(trust.open_target(where), device_lease(where))
            try:
                with Lease(limit, say).held():
                    decisions.append(
                        promotion.promote(registry, name, where, target, key=own_id(), progress=LogProgress(say))
                    )
            finally:
                target.close()
    if decisions:
        artifact("\n".join(map(decided, decisions)), "secateur-promotion")
    promoted = [decision for decision in decisions if decision.promoted]
    lines = [summary(decision) for decision in decisions]
    if faults:
        return Failed(message="\n".join([*faults, *lines]))
    if promoted:
        return Completed(name=PROMOTED, message="\n".join(lines))
    return Completed(message="\n".join(lines) or "no challenger waits for a decision")


# -- parts ---------------------------------------------------------------------------------------------------------


def own_id() -> str:
    """Prefect's id of this flow run."""
    return str(this_flow_run.id)


def mark_crashed(flow_run: str, by: str) -> None:
    """Say of a flow run whose process is dead that it is; Prefect would show it as running for ever."""
    going_on = (StateType.RUNNING, StateType.PENDING, StateType.CANCELLING)
    with contextlib.suppress(httpx.HTTPError, ObjectNotFound), get_client(sync_client=True) as client:
        run = client.read_flow_run(flow_run)  # type: ignore[arg-type]
        if run.state is not None and run.state.type in going_on:
            message = f"its process is dead; flow run {by} continues its work"
            client.set_flow_run_state(run.id, Crashed(message=message), force=True)


def device_lease(device: DeviceProfile) -> Callable[[], contextlib.AbstractContextManager[None]]:
    return lease_of(device, say)


def registry_of(job: Registered) -> tuple[Registry, str]:
    """The registry that a flow is about, and its address."""
    uri = store_uri(TrackingSection(uri=job.tracking), home())
    return Registry(uri, home()), uri


@contextlib.contextmanager
def told(faults: list[str], *about: str) -> Iterator[None]:
    """An expected error of one model does not keep the others from being done; the flow fails at its end."""
    try:
        with foreign.told():
            yield
    except Expected as error:
        get_run_logger().error(str(error))
        faults.append(f"{' '.join(about)}: {error}")


def challengers(registry: Registry, job: Promote) -> Iterator[tuple[str, str]]:
    """(model, device) of every challenger that waits for a decision."""
    for name in job.names or registry.names():
        for device in registry.devices(name):
            if job.device not in (None, device):
                continue
            challenger = alias_of("challenger", device)
            version = next((v for v in registry.versions(name) if challenger in v.aliases), None)
            if version is None or alias_of("champion", device) in version.aliases:
                continue
            champion = registry.champion(name, device)
            if job.again or not refused(version.tags, device, champion.version if champion else None):
                yield name, device
            else:
                say(f"{name} version {version.version} was refused on {device} already; set again to compare anew")


def refused(tags: Any, device: str, champion: str | None) -> bool:
    """Whether a version has lost against this very champion: measuring until it wins by chance would be no gate."""
    try:
        note = checked(DecisionTag, read_json(tags[f"secateur.decision.{alias_of('', device).removeprefix('-')}"]))
    except (KeyError, ValueError):
        return False
    return note.outcome == "refused" and note.champion == champion


def summary(decision: Decision) -> str:
    """One line."""
    lost = ", ".join(gate.name for gate in decision.gates if not gate.ok)
    what = "is the champion" if decision.promoted else f"was {decision.outcome} ({lost})"
    return f"{decision.name} version {decision.version} {what} on {decision.device}"


def decided(decision: Decision) -> str:
    """A decision's gates, as a table."""
    rows = [f"**{summary(decision)}**\n", "| gate | value | bound | holds | |", "|---|---|---|---|---|"]
    for gate in decision.gates:
        value = "unknown" if gate.value is None else f"{gate.value:.4g}"
        rows.append(f"| {gate.name} | {value} | {gate.bound:.4g} | {'yes' if gate.ok else 'NO'} | {gate.reason} |")
    return "\n".join(rows) + "\n"


def link(run: Run) -> None:
    """Where a run is to be seen: its page in MLflow, its report."""
    report = run.directory / "report.html"
    with contextlib.suppress(TrackingError, httpx.HTTPError):
        page = page_of(run.tracker.uri, run.config.tracking.experiment, run.run_id)
        if page:
            create_link_artifact(page, "MLflow", key="secateur-mlflow", description=run.run_id)
    if report.is_file():
        with contextlib.suppress(httpx.HTTPError):
            create_link_artifact(
                report.as_uri(), "Report", key="secateur-report", description=f"on {os.uname().nodename}"
            )


def artifact(text: str, key: str) -> None:
    """A table in Prefect's interface; only a decoration."""
    with contextlib.suppress(httpx.HTTPError):
        create_markdown_artifact(text, key=key)
