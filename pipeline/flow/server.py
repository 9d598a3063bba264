"""The Prefect server of a run: the user's, seen to be one before anything begins; else a temporary one of our own.

The temporary one is what Prefect itself would start. But Prefect's lives in the terminal's process group, so that
Ctrl-C ends it before the run, and outlives a run that is killed; this one is a child like all others
(``secateur.pipeline.children``).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from secateur.device_profiles.wording import command, printable
from secateur.pipeline import children
from secateur.pipeline.errors import SurroundingsError, masked

ANSWER_S = 15.0
"""How long a server of the user's has to answer."""
START_S, LOOK_S, ATTEMPTS = 180.0, 0.1, 3
"""How long the temporary one may take to start, how often it is asked, and on how many ports it is tried."""
MAX_ANSWER = 65536
URL = "PREFECT_API_URL"
_temporary: list[str] = []


def server_url() -> str | None:
    """Address of the user's Prefect server; None where there is none but a temporary one."""
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value() or None
    return None if url in _temporary else url


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """A Prefect API for this process meanwhile.

    Raises:
        SurroundingsError: the user's server gives no answer, or not that of a Prefect API; or none can be started.
    """
    import prefect.context

    given = server_url()
    if given is not None:
        check(given)
        yield
        return
    with _started() as url:
        before = os.environ.get(URL)
        _temporary.append(url)
        os.environ[URL] = url
        prefect.context.refresh_global_settings_context()  # every thread, and every child, sees it from now on
        try:
            yield
        finally:
            _temporary.remove(url)
            os.environ.pop(URL) if before is None else os.environ.__setitem__(URL, before)
            prefect.context.refresh_global_settings_context()


def check(url: str) -> None:
    """See that a Prefect API answers at an address.

    Raises:
        SurroundingsError: none does within ``ANSWER_S``; names the address and what to do.
    """
    fault = _health(url, ANSWER_S)
    if fault:
        fix = (
            f"Start it, or correct {URL} (of the environment, or of a Prefect profile: "
            f"{command('prefect', 'config', 'view')}); it ends in /api. Without it a temporary server is used: "
            f"{command('prefect', 'config', 'unset', URL)}"
        )
        raise SurroundingsError(f"the Prefect server at {masked(printable(url))} {fault}. {fix}")


def _health(url: str, timeout_s: float) -> str:
    """What is wrong with the API at an address; empty = nothing."""
    request = urllib.request.Request(f"{url.rstrip('/')}/health", headers=_credentials())  # noqa: S310  checked below
    if request.type not in ("http", "https"):
        return "has no address that begins with http:// or https://"
    give_up = time.monotonic() + timeout_s
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:  # noqa: S310
            content = b""
            while len(content) < MAX_ANSWER and (piece := answer.read1(4096)):
                content += piece
                if time.monotonic() > give_up:
                    return "does not finish its answer"
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return f"wants to know who asks ({error.code}); set PREFECT_API_AUTH_STRING or PREFECT_API_KEY"
        return f"answers {error.code} to {URL}/health, as no Prefect API does"
    except (OSError, ValueError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", None) or error
        return f"does not answer ({masked(printable(str(reason)))[:200]})"
    except Exception as error:  # noqa: BLE001  http.client has many for what is no HTTP
        return f"answers no HTTP ({type(error).__name__})"
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        return "answers something else than a Prefect API (a web page?)"
    return "" if told is True else "answers something else than a Prefect API"


def _credentials() -> dict[str, str]:
    """As Prefect's client sends them."""
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY

    auth, key = PREFECT_API_AUTH_STRING.value(), PREFECT_API_KEY.value()
    if auth:
        return {"Authorization": "Basic " + base64.b64encode(auth.get_secret_value().encode()).decode()}
    return {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}


@contextlib.contextmanager
def _started() -> Iterator[str]:
    """A temporary server in a session of its own; its address."""
    with tempfile.TemporaryFile() as log:
        process, url = _start(log)
        try:
            yield url
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _start(log: IO[bytes]) -> tuple[subprocess.Popen[bytes], str]:
    import prefect
    from prefect.settings import PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS, get_current_settings

    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    own = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    environment = {**os.environ, **settings, **own}
    environment.pop(URL, None)
    give_up = time.monotonic() + (PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value() or START_S)
    for _ in range(ATTEMPTS):
        port = _free_port()
        words = [sys.executable, "-m", "uvicorn", "--app-dir", str(Path(prefect.__file__).parent.parent)]
        words += ["--factory", "prefect.server.api.server:create_app", "--host", "127.0.0.1", "--port", str(port)]
        process = children.start([*words, "--log-level", "error", "--lifespan", "on"], environment, log)
        try:
            while process.poll() is None and time.monotonic() < give_up:
                if not _health(url := f"http://127.0.0.1:{port}/api", ANSWER_S):
                    return process, url
                time.sleep(LOOK_S)
        except BaseException:
            process.kill()
            process.wait()
            raise
        if process.poll() is None:
            process.kill()
            process.wait()
            break
    log.seek(0)
    said = (log.read()[-20_000:].decode("utf-8", "replace").strip().splitlines() or ["it did not answer in time"])[-1]
    raise SurroundingsError(
        f"Prefect's temporary server does not start: {masked(printable(said))[:300]}. See whether "
        f"{printable(os.environ.get('PREFECT_HOME', '~/.prefect'))} can be written, or name a server in {URL}"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
