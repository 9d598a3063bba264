"""Whose turn it is on a device: Prefect's global concurrency limits."""

from __future__ import annotations

import contextlib
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from device_profiles import DeviceError, DeviceProfile
from pipeline.assemble import Run
from pipeline.errors import SurroundingsError

TURN_WAIT_S, LEASE_S = 3600.0, 60.0
"""How long a flow waits for a device that others use, and how long a killed flow keeps its turn."""


def device_turn(run: Run) -> Callable[[], AbstractContextManager[None]]:
    """One flow at a time on a device, over all machines of a Prefect server: a global concurrency limit of 1.

    Without a server of its own (``PREFECT_API_URL``) Prefect would never free the turn of a killed flow; the lock on
    the device, which the kernel frees, must then do.
    """
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        return contextlib.nullcontext
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.concurrency.sync import concurrency
    from prefect.exceptions import ObjectAlreadyExists

    name = limit_name(run.profile)
    try:
        with get_client(sync_client=True) as client:
            client.upsert_global_concurrency_limit_by_name(name, 1)
    except ObjectAlreadyExists:
        pass  # another flow made it at this very moment
    except httpx.HTTPError as error:
        raise SurroundingsError(f"the Prefect server at {PREFECT_API_URL.value()} does not answer: {error}") from error

    @contextlib.contextmanager
    def turn() -> Iterator[None]:
        lease = concurrency(
            name,
            timeout_seconds=TURN_WAIT_S,
            lease_duration=LEASE_S,
            strict=True,
            raise_on_lease_renewal_failure=False,
        )
        try:
            lease.__enter__()
        except TimeoutError as error:
            raise DeviceError(
                f"other flows have used {name} for {TURN_WAIT_S / 3600:g} h; see prefect global-concurrency-limit ls",
                "busy",
            ) from error
        with contextlib.ExitStack() as stack:
            stack.push(lease)
            yield

    return turn


def limit_name(profile: DeviceProfile) -> str:
    """The concurrency limit of the device behind a profile: profiles of one machine share it."""
    host = profile.connect.get("host") or platform.node()
    return "secateur-device-" + re.sub(r"[^A-Za-z0-9_.-]", "-", f"{profile.target}-{host}")
