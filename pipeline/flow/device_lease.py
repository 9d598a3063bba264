"""Who may use a device: Prefect's global concurrency limits, one per device and one per model that is promoted."""

from __future__ import annotations

import contextlib
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from secateur.device_profiles import DeviceError, DeviceProfile
from secateur.device_profiles.target import kind_of
from secateur.device_profiles.wording import command
from secateur.pipeline.errors import SurroundingsError
from secateur.pipeline.flow.server import server_url

WAIT_S, LEASE_S, ALONE_S = 3600.0, 60.0, 300.0
"""How long a flow waits for a device that others use, how long a killed flow keeps its lease, and for how long a server
that did not answer is not asked again (asking takes Prefect's client a minute then)."""


def lease_of(profile: DeviceProfile, say: Callable[[str], None]) -> Callable[[], AbstractContextManager[None]]:
    """One flow at a time on a device, over all machines of a Prefect server: a global concurrency limit of 1.

    Args:
        say: told when the server cannot be asked.

    Raises:
        SurroundingsError: the server does not answer now, before anything began.
    """
    name = limit_name(profile)
    make_limit(name)
    return Lease(name, say).held


class Lease:
    """The only slot of a limit, held by one at a time.

    Without a server of its own (``PREFECT_API_URL``) Prefect would never free the slot of a killed flow; the lock on
    what the limit guards (a device's own, the registry's), which the kernel frees, must then do. So it must while a
    server is unreachable: the work goes on without it, and asks again after ``ALONE_S``.

    Args:
        name: of the limit.
        say: told when the server cannot be asked.
    """

    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self.name, self.say = name, say
        self._ask_from = 0.0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the slot.

        Raises:
            DeviceError: others have held it for ``WAIT_S``.
        """
        held = contextlib.ExitStack()
        if server_url() and time.monotonic() >= self._ask_from:
            self._take(held)
        try:
            yield
        finally:
            self._give_back(held)

    def _take(self, held: contextlib.ExitStack) -> None:
        from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
        from prefect.concurrency.sync import concurrency

        lease = concurrency(
            self.name,
            timeout_seconds=WAIT_S,
            lease_duration=LEASE_S,
            strict=True,
            raise_on_lease_renewal_failure=False,
        )
        try:
            held.enter_context(lease)
        except TimeoutError as error:
            raise DeviceError(
                f"other flows have used {self.name} for {WAIT_S / 3600:g} h; "
                f"see {command('prefect', 'global-concurrency-limit', 'ls')}",
                "busy",
            ) from error
        except ConcurrencySlotAcquisitionError as error:
            self._go_on_without(f"gives no lease ({error.__cause__ or error})")

    def _give_back(self, held: contextlib.ExitStack) -> None:
        import httpx

        try:
            held.close()
        except httpx.HTTPError as error:
            self._go_on_without(f"was not told that a lease is over ({error}); it runs out by itself")

    def _go_on_without(self, what: str) -> None:
        self._ask_from = time.monotonic() + ALONE_S
        self.say(f"{self.name}: the Prefect server {what}. For {ALONE_S:g} s only the device's own lock guards it")


def make_limit(name: str) -> None:
    """A global concurrency limit of 1, made where there is none; nothing without a server of its own.

    Raises:
        SurroundingsError: the server does not answer.
    """
    if not server_url():
        return
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectAlreadyExists

    try:
        with get_client(sync_client=True) as client:
            client.upsert_global_concurrency_limit_by_name(name, 1)
    except ObjectAlreadyExists:
        pass  # another flow made it at this very moment
    except httpx.HTTPError as error:
        raise SurroundingsError(f"the Prefect server at {server_url()} does not answer: {error}") from error


def limit_name(profile: DeviceProfile) -> str:
    """The concurrency limit of the device behind a profile: profiles of one machine share it."""
    kind = kind_of(profile)
    host = next(iter(kind.machine(profile.connect)), platform.node())
    return "secateur-device-" + _safe(f"{kind.name}-{host}")


def promotion_limit(model: str) -> str:
    """The concurrency limit of a registered model: one promotion of it at a time."""
    return "secateur-promote-" + _safe(model)


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text)
