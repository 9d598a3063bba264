"""Deployments: the three flows on a Prefect server, each with its schedule, for one run file."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import secateur
from secateur.device_profiles import DeviceProfile
from secateur.device_profiles.wording import command
from secateur.pipeline.config import trust
from secateur.pipeline.config.consents import written
from secateur.pipeline.config.reading import load_run_file
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.errors import SurroundingsError, UserError
from secateur.pipeline.flow.compress import TAG, tags_of
from secateur.pipeline.flow.device_lease import limit_name, make_limit
from secateur.pipeline.flow.parameters import Compress, Parameters, Profile, Promote
from secateur.pipeline.flow.server import server_url
from secateur.pipeline.run.opening import device_profiles
from secateur.pipeline.surroundings import DATA, HOME, folder, home


@dataclass(frozen=True)
class Order:
    """What is to be deployed.

    Args:
        crons: flow name -> cron expression; None or missing = by hand only.
        timezone: of the cron expressions.
        paused: whether the schedules wait to be switched on.
    """

    file: Path
    overrides: tuple[str, ...]
    crons: dict[str, str | None]
    name: str | None = None
    pool: str = "secateur"
    timezone: str = "UTC"
    paused: bool = False


def deploy(order: Order) -> list[str]:
    """Make or update work pool, deployments and limits; returns what was done, in lines.

    Raises:
        UserError: the run file or a cron expression is wrong, or there is no consent for code that it names.
        SurroundingsError: there is no Prefect server, or it does not answer.
    """
    config = trust.consented(lambda: load_run_file(order.file, order.overrides), order.file)
    profiles = device_profiles(config)
    schedules = {flow: _schedule(flow, cron, order) for flow, cron in order.crons.items()}
    url = server_url()
    if url is None:
        raise SurroundingsError(
            f"schedules need a Prefect server: start one with `{command('prefect', 'server', 'start')}` and set "
            "PREFECT_API_URL, "
            "for example PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    import httpx
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        return _deploy(order, config, profiles, schedules)
    except PrefectHTTPStatusError as error:
        raise SurroundingsError(f"the Prefect server at {url} refuses: {error}") from error
    except httpx.HTTPError as error:
        raise SurroundingsError(f"the Prefect server at {url} does not answer: {error}") from error


def _deploy(order: Order, config: RunFile, profiles: tuple[DeviceProfile, ...], schedules: dict[str, Any]) -> list[str]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
    from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.utilities.callables import parameter_schema
    from prefect.workers.process import ProcessWorker

    from secateur.pipeline.flow import deployed

    lines = []
    name = order.name or config.name
    with get_client(sync_client=True) as client:
        try:
            template = ProcessWorker.get_default_base_job_template()
            pool = WorkPoolCreate(name=order.pool, type="process", base_job_template=template)
            client.create_work_pool(pool)
            lines.append(f"Work pool {order.pool}: made")
        except ObjectAlreadyExists:
            kind = client.read_work_pool(order.pool).type
            if kind != "process":
                raise UserError(
                    f"work pool {order.pool} is of type {kind}, not process; name another with --pool"
                ) from None
            lines.append(f"Work pool {order.pool}: exists")
        for flow, parameters in _parameters(order, config).items():
            made = getattr(deployed, flow)
            schedule = schedules.get(flow)
            client.create_deployment(
                client.create_flow(made),
                name,
                schedules=[]
                if schedule is None
                else [DeploymentScheduleCreate(schedule=schedule, active=not order.paused)],
                concurrency_limit=1,
                concurrency_options=ConcurrencyOptions(collision_strategy=ConcurrencyLimitStrategy.ENQUEUE),
                parameters={"job": parameters.model_dump(mode="json")},
                description=made.description,
                work_pool_name=order.pool,
                tags=[tag for tag in tags_of(config, profiles) if flow == "compress" or not tag.startswith("method:")],
                entrypoint=f"{deployed.__name__}.{flow}",
                parameter_openapi_schema=parameter_schema(made).model_dump_for_openapi(),
                enforce_parameter_schema=True,
                pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(Path.cwd())}}],
                job_variables={"env": _environment()},
            )
            when = "by hand only" if schedule is None else f"cron {schedule.cron} {schedule.timezone}"
            lines.append(f"Deployment {flow}/{name}: {when}{', paused' if schedule and order.paused else ''}")
    for limit in sorted({limit_name(profile) for profile in profiles}):
        make_limit(limit)
        lines.append(f"Concurrency limit {limit}: 1")
    lines += [*_warnings(), *_of_earlier_versions()]
    return lines


def _parameters(order: Order, config: RunFile) -> dict[str, Parameters]:
    """What each flow is told."""
    section = config.device
    files = [str(Path(p).absolute()) for p in (section.profile, *section.others) if Path(p).suffix == ".yaml"]
    model = config.tracking.registered_model or config.name
    code = trust.code_in(config, order.file)
    trusted = [written(entry) for one in code for entry in one.entries]
    about = {"names": [model], "tracking": config.tracking.uri, "device_profiles": files, "trusted": trusted}
    return {
        "compress": Compress(file=str(order.file.absolute()), overrides=list(order.overrides), trusted=trusted),
        "profile": Profile(**about),  # type: ignore[arg-type]
        "promote": Promote(**about),  # type: ignore[arg-type]
    }


def _environment() -> dict[str, str]:
    """Folders of the flow's process; addresses and secrets are the worker's own affair."""
    variables = {HOME: str(home())}
    if (data := folder(DATA)) is not None:
        variables[DATA] = str(data)
    root = str(Path(secateur.__file__).parents[1])
    if root in sys.path and "site-packages" not in root:  # run from a checkout
        variables["PYTHONPATH"] = root
    return variables


def _schedule(flow: str, cron: str | None, order: Order) -> Any:
    if cron is None:
        return None
    from prefect.client.schemas.schedules import CronSchedule
    from pydantic import ValidationError

    try:
        return CronSchedule(cron=cron, timezone=order.timezone)
    except ValidationError as error:
        faults = "; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())
        raise UserError(
            f"the schedule of {flow} is wrong: {cron!r} ({order.timezone}): {faults}. "
            "A cron expression has five fields, for example '0 2 * * *': every night at two"
        ) from error


def _warnings() -> list[str]:
    """What would not go well later."""
    if not _lease_storage().endswith(".memory"):
        return []
    return [
        "Note: this server forgets who holds a limit when it is restarted. Start it with "
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=prefect.server.concurrency.lease_storage.filesystem"
    ]


def _of_earlier_versions() -> list[str]:
    """Deployments that name modules as they were called before all of them were ``secateur``'s: their runs fail."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags

    lines = []
    with get_client(sync_client=True) as client:
        ours = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
        for deployment in client.read_deployments(deployment_filter=ours):
            module, _, flow = (deployment.entrypoint or "").rpartition(".")
            if module.startswith("pipeline."):
                file = deployment.parameters.get("job", {}).get("file", "RUN_FILE")
                anew = command("secateur", "deploy", file, "--name", deployment.name)
                lines.append(
                    f"Note: {flow}/{deployment.name} was made by an earlier version, and cannot start; run: {anew}"
                )
    return lines


def _lease_storage() -> str:
    """Where the server keeps who holds a limit, as its settings say; empty where it does not tell."""
    import httpx
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True) as client:
            settings = client._client.get("/admin/settings").json()
        return str(settings["server"]["concurrency"]["lease_storage"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return ""
