"""The flow that compresses: one task per stage.

A stage's result is kept in the run directory (``stages/``) under a key of the run, the stage's version and everything
the earlier stages found; so a finished stage is not done twice, and a changed file or fact is noticed. Prefect is
the scheduler, not the record: candidates live in the journal and in MLflow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from secateur.device_profiles import DeviceProfile
from secateur.pipeline import children
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.errors import TrackingError
from secateur.pipeline.flow.device_lease import lease_of
from secateur.pipeline.flow.environment import runtime_env
from secateur.pipeline.flow.logs import only_for_prefect
from secateur.pipeline.flow.server import serving
from secateur.pipeline.flow.worker_engines import open_engine
from secateur.pipeline.report import final_table_markdown
from secateur.pipeline.run.facts import Facts
from secateur.pipeline.run.records import of_candidates, to_evaluation
from secateur.pipeline.run.run import Run
from secateur.pipeline.stages.order import STAGES, Results, Stage
from secateur.pipeline.stages.report import renew
from secateur.pipeline.surroundings import home
from secateur.pipeline.tracking.reprofiles import page_of

TAG, REPORT = "secateur", "report.html"
AT_A_TERMINAL_S, ON_SCHEDULE_S = (3.0, 9.0), (10.0, 60.0, 300.0, 900.0)
"""Pauses before a stage is tried again: short where somebody waits, long where a device may be unreachable."""
RETRY_JITTER = 0.3
"""Up to this fraction is added to a pause, so that flows that failed together do not come back together."""


def execute(run: Run, debug: bool = False) -> Facts:
    """Run every stage that is not done yet, as a Prefect flow; returns the facts of all stages.

    Raises:
        UserError, SurroundingsError: as the stages do.
        UndeliveredError: the tracking server became unreachable; everything else is done.
    """
    runtime_env(run.directory, debug)
    import prefect

    @prefect.flow(name="secateur", flow_run_name=run.run_id, validate_parameters=False)
    def secateur(  # its parameters are for people and for searches in Prefect; `run` has them all
        name: str,
        workload: str,
        method: str,
        target: Mapping[str, float],
        devices: Sequence[str],
        precision: Sequence[str],
        seed: int,
    ) -> tuple[Facts, TrackingError | None]:
        starting.close()
        return work_through(run, AT_A_TERMINAL_S)

    with contextlib.ExitStack() as starting, contextlib.ExitStack() as held:
        starting.enter_context(run.progress.stage("Start Prefect"))
        held.enter_context(children.kept(home(), f"run {run.run_id}"))
        held.enter_context(serving())
        held.enter_context(contextlib.nullcontext() if debug else only_for_prefect())
        resume_tracking(run)
        run.lease_devices({profile.name: lease_of(profile, run.progress.say) for profile in run.profiles})
        with prefect.tags(*tags_of(run.config, run.profiles)):
            found: tuple[Facts, TrackingError | None] = secateur(**parameters_of(run))
    facts, undelivered = found
    if undelivered is not None:
        raise UndeliveredError(facts, undelivered)
    return facts


def work_through(run: Run, retry_after_s: Sequence[float]) -> tuple[Facts, TrackingError | None]:
    """Every stage, as a task of the flow that calls this; and what the tracking server could not be told, if anything.

    Args:
        retry_after_s: pauses before a stage is tried again after a fault of the device or the tracking server.

    Raises:
        UserError, SurroundingsError, DeviceError: as the stages do.
    """
    from prefect.artifacts import create_markdown_artifact

    facts, results = Facts(), dict[str, Mapping[str, Any]]()
    undelivered: TrackingError | None = None
    with open_engine(run.config.workers) as engine, run.with_workers(engine):
        for stage in STAGES:
            try:
                results[stage.name] = _perform(run, stage, facts, results, retry_after_s)
            except TrackingError as error:  # everything that does not need the server is still done
                undelivered = undelivered or error
            else:
                facts = facts.plus(**{stage.name: stage.read(results[stage.name])})
    renew(run, facts)
    with contextlib.suppress(Exception):  # a decoration: the table is in the report and on the terminal too
        page = "\n".join([final_table_markdown(facts), "", *links(run)])
        create_markdown_artifact(page, key="secateur-result", description=run.run_id)
    return facts, undelivered


def parameters_of(run: Run) -> dict[str, Any]:
    """What a run is about, as a flow run's parameters."""
    config, devices = run.config, [profile.name for profile in run.profiles]
    target = config.search.target.model_dump(exclude_none=True)
    told = {"name": config.name, "workload": config.workload["name"], "method": config.search.method, "target": target}
    return {**told, "devices": devices, "precision": list(config.precision), "seed": config.seed}


def tags_of(config: RunFile, devices: Iterable[DeviceProfile]) -> list[str]:
    """By what flow runs are found: the method and the devices."""
    return [TAG, f"method:{config.search.method}", *sorted({f"device:{profile.name}" for profile in devices})]


def links(run: Run) -> list[str]:
    """Where a run is to be seen, in Markdown: its page in MLflow, where a server shows it, and its report."""
    tracking, report, page = run.config.tracking, run.directory / REPORT, ""
    with contextlib.suppress(TrackingError):
        page = page_of(run.tracker.uri, tracking.experiment, run.run_id)
    told = f"[MLflow]({page})" if page else f"MLflow: run `{run.run_id}` of the experiment `{tracking.experiment}`"
    return [f"- {told}", *([f"- [Report]({report.as_uri()}), on the run's machine"] if report.is_file() else [])]


def _perform(
    run: Run, stage: Stage, facts: Facts, results: Results, retry_after_s: Sequence[float]
) -> Mapping[str, Any]:
    """One stage as a task; its kept result is used only while it stands."""
    import prefect
    from prefect.cache_policies import INPUTS

    def work(key: Mapping[str, Any]) -> dict[str, Any]:
        run.progress.say(f"Stage {STAGES.index(stage) + 1} of {len(STAGES)}: {stage.title}")
        return stage.perform(run, facts)

    def can_help(task: Any, task_run: Any, state: Any) -> bool:
        return isinstance(state.result(raise_on_failure=False), stage.retry_on)

    task = prefect.Task(
        work,
        name=stage.title,
        persist_result=True,
        result_storage=run.directory / "stages",
        cache_policy=INPUTS,
        result_serializer="json",
        retries=len(retry_after_s) if stage.retry_on else 0,
        retry_delay_seconds=list(retry_after_s),
        retry_jitter_factor=RETRY_JITTER,
        retry_condition_fn=can_help if stage.retry_on else None,
    )
    key = key_of(run, stage, results)
    result: dict[str, Any] = task(key)
    if not stage.stands(result, run.directory):
        result = task.with_options(refresh_cache=True)(key)
    return result


def key_of(run: Run, stage: Stage, results: Results) -> Mapping[str, Any]:
    """What a stage's result is kept under; where a run was begun by an earlier version, what it was kept under then."""
    from prefect.cache_policies import INPUTS

    earlier = stage.key(run, results, by_earlier_names=True)
    kept_as = INPUTS.compute_key(None, {"key": earlier}, {})  # type: ignore[arg-type]
    return earlier if (run.directory / "stages" / str(kept_as)).is_file() else stage.key(run, results)


class UndeliveredError(TrackingError):
    """The run is complete but for what the tracking server must be told; ``facts`` holds the results."""

    def __init__(self, facts: Facts, cause: TrackingError) -> None:
        super().__init__(str(cause))
        self.facts = facts


def resume_tracking(run: Run) -> None:
    """Start tracking; hand it everything the journal already holds (it knows what was delivered)."""
    run.tracker.start()
    reference = next((r for r in run.journal.records if r.get("stage") == "reference"), None)
    if reference is not None:
        run.reward(to_evaluation(reference["evaluation"]), run.workload.metric)
    for record in of_candidates(run.journal.records):
        if record["stage"] != "smallest":
            run.tracker.candidate(record)
