"""``secateur check``: a task of one's own tried on two batches, with everything that is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.pipeline import errors
from secateur.pipeline.cli.options import Json, Trust
from secateur.pipeline.cli.trust import consented
from secateur.pipeline.terminal import command, out, table

if TYPE_CHECKING:
    from secateur.pipeline.config.schema import RunFile


def check(
    task: Annotated[str, typer.Argument(metavar="FILE.py:NAME", help="The task, or a run file that names one.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An argument the task is made with.")
    ] = None,
    json_: Json = False,
    trust: Trust = False,
) -> None:
    """Try a task of your own on two batches: data, network, loss, metrics, cut, export, training; tell all faults.

    The file's code is run: naming it here is your consent, for this once. `secateur validate` checks a run file,
    `secateur doctor` this machine.

    Example: secateur check task.py:Task --set size=32
    """
    config = _config(task, set_ or [], trust)
    from secateur.pipeline.config.choices import workload_options
    from secateur.pipeline.config.trust import consented_code
    from secateur.pipeline.run.checkup import check_task

    options = workload_options(config.workload)
    made_of, _ = consented_code(options.task, "workload.task")
    findings = check_task(options.task, made_of, options.options)
    faults = [finding for finding in findings if finding.outcome == "fault"]
    if json_:
        out.data({"task": options.task, "ok": not faults, "findings": [vars(finding) for finding in findings]})
    else:
        rows = table("part", "", "found", title=f"Task {options.task}")
        for finding in findings:
            rows.add_row(finding.part, finding.outcome, finding.told)
        out.print(rows)
    if faults:
        raise typer.Exit(errors.EXIT_USER)
    if not json_:
        out.print(f"{options.task} is ready. Next: {command('secateur', 'validate', 'run.yaml')}")


def _config(task: str, given: list[str], trusted: bool) -> RunFile:
    """A run file of the task; the one that is named, or one made of its name.

    Raises:
        UserError: there is no such file, or a run file names no task.
    """
    from secateur.device_profiles.shelf import in_file
    from secateur.pipeline.config import trust
    from secateur.pipeline.config.reading import load_run_file, parse_run_file

    overrides = [f"workload.options.{one}" for one in given]
    if in_file(task) is None and trust.CODE.fullmatch(task) is None:
        file = Path(task)
        if file.suffix not in (".yaml", ".yml"):
            raise errors.UserError(
                f"{task} is neither FILE.py:NAME or PACKAGE.MODULE:NAME, such as task.py:Task, nor a run file"
            )
        config = consented(lambda: load_run_file(file, overrides), file, trusted)
        if config.workload["name"] != "custom":
            raise errors.UserError(f"{task} names no task of your own; check it with `secateur validate`")
        return config
    made = parse_run_file("name: check\nworkload: {name: custom, task: task.py:Task}", task, overrides)
    config = made.model_copy(update={"workload": {**made.workload, "task": task}}).lying_in(Path.cwd())
    trust.allow_typed(trust.code_in(config, Path.cwd() / "run.yaml"))
    return config
