"""The flow that compresses: one task per stage.

A stage's result is kept in the run directory (``stages/``) under a key of the run, the stage's version and everything
the earlier stages found; so a finished stage is not done twice, and a changed file or fact is noticed. Prefect is
the scheduler, not the record: candidates live in the journal and in MLflow.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from pipeline.assemble import Run
from pipeline.errors import SurroundingsError, TrackingError
from pipeline.flow.environment import runtime_env
from pipeline.flow.turns import device_turn
from pipeline.report import final_table_markdown
from pipeline.stages import STAGES, Facts, Stage
from pipeline.study import to_evaluation
from pipeline.training import sha256_of

RETRIES, RETRY_DELAY_S = 2, 3


def execute(run: Run, debug: bool = False) -> Facts:
    """Run every stage that is not done yet, as a Prefect flow; returns the facts of all stages.

    Raises:
        UserError, SurroundingsError: as the stages do.
        UndeliveredError: the tracking server went away; everything else is done.
    """
    runtime_env(run.directory, debug)
    import prefect
    from prefect.cache_policies import INPUTS

    if not debug:
        logging.getLogger("prefect").setLevel(logging.CRITICAL)
    _end_orphaned_server(run.directory)
    tracking_failure: TrackingError | None = None

    def retry(stage: Stage) -> Callable[..., bool]:
        def can_help(task: Any, task_run: Any, state: Any) -> bool:
            return isinstance(state.result(raise_on_failure=False), stage.retry_on)

        return can_help

    def perform(stage: Stage, facts: dict[str, Any]) -> dict[str, Any]:
        """One stage as a task; its kept result is used only while the files it names are unchanged."""

        def work(key: Mapping[str, Any]) -> dict[str, Any]:
            return stage.function(run, facts)

        task = prefect.Task(
            work,
            name=stage.title,
            persist_result=True,
            cache_policy=INPUTS,
            result_serializer="json",
            retries=RETRIES if stage.retry_on else 0,
            retry_delay_seconds=RETRY_DELAY_S,
            retry_condition_fn=retry(stage) if stage.retry_on else None,
        )
        key = {"run": run.run_id, "config": run.config.digest, "stage": stage.name, "version": stage.version}
        key["facts"] = json.dumps(facts, sort_keys=True)
        result: dict[str, Any] = task(key)
        if not _stands(run.directory, result):
            result = task.with_options(refresh_cache=True)(key)
        return result

    @prefect.flow(name="secateur", flow_run_name=run.run_id, validate_parameters=False)
    def secateur() -> dict[str, Any]:
        nonlocal tracking_failure
        starting.close()
        _record_server(run.directory)
        from prefect.artifacts import create_markdown_artifact

        facts: dict[str, Any] = {}
        for stage in STAGES:
            try:
                facts[stage.name] = perform(stage, facts)
            except TrackingError as error:  # everything that does not need the server is still done
                tracking_failure = tracking_failure or error
        with contextlib.suppress(Exception):  # a decoration: the table is in the report and on the terminal too
            create_markdown_artifact(final_table_markdown(facts), key="secateur-result", description=run.run_id)
        return facts

    resume_tracking(run)
    run.turn = device_turn(run)
    starting = contextlib.ExitStack()
    starting.enter_context(run.progress.stage("Start Prefect"))
    try:
        facts = secateur()
    except RuntimeError as error:
        if "Prefect" not in str(error):
            raise
        raise SurroundingsError(f"{error}. Run: secateur resume {run.directory}") from error
    finally:
        starting.close()
    if tracking_failure is not None:
        raise UndeliveredError(facts, tracking_failure)
    return facts


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
    for record in run.journal.records:
        if "evaluation" in record and record["stage"] != "smallest":
            run.tracker.candidate(record)


def _stands(directory: Path, result: Mapping[str, Any]) -> bool:
    """Whether every file a stage made is still there, unchanged."""
    return all(
        (directory / name).is_file() and sha256_of(directory / name) == digest
        for name, digest in result.get("files", {}).items()
    )


def _record_server(directory: Path) -> None:
    """Note the embedded server's process, so that a later start can end it should this process be killed."""
    children = psutil.Process().children(recursive=True)
    pids = [(p.pid, p.create_time()) for p in children if "uvicorn" in " ".join(p.cmdline())]
    with contextlib.suppress(OSError):
        (directory / "server.json").write_text(json.dumps(pids), encoding="utf-8")


def _end_orphaned_server(directory: Path) -> None:
    """End the embedded server of an earlier, killed process of this run (it would live for ever)."""
    try:
        noted = json.loads((directory / "server.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    for pid, created in noted:
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            if abs(process.create_time() - created) < 1 and "uvicorn" in " ".join(process.cmdline()):
                os.kill(pid, signal.SIGTERM)
