"""The Prefect server of a run: the user's is seen to be one, the temporary one is a child like all others."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from secateur.pipeline import children, errors
from secateur.pipeline.errors import SurroundingsError
from secateur.pipeline.flow import logs, runtime_env, server
from secateur.pipeline.foreign import exit_code
from secateur.pipeline.progress import Silent
from tests.pipeline.test_children import of_home, wait_until
from tests.servers import free_port

ANSWERS = {
    "a web page": (200, b"<html><body>true</body></html>", "web page"),
    "nothing in it": (200, b"", "web page"),
    "other JSON": (200, b'{"status": "ok"}', "something else than a Prefect API"),
    "a number": (200, b"1", "something else than a Prefect API"),
    "JSON nested without end": (200, b"[" * 60_000, "something else"),
    "no such page": (404, b"true", "answers 404"),
    "an error": (500, b"true", "answers 500"),
    "no entry": (401, b"true", "PREFECT_API_AUTH_STRING"),
}


@contextlib.contextmanager
def answering(status: int, content: bytes) -> Iterator[str]:
    """A web server that answers everything alike; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as made:
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{made.server_port}/api"
        finally:
            made.shutdown()
            thread.join()


def refusal(url: str) -> str:
    with pytest.raises(SurroundingsError) as caught:
        server.check(url)
    assert exit_code(caught.value) == errors.EXIT_SURROUNDINGS
    said = str(caught.value)
    assert "PREFECT_API_URL" in said and "\n" not in said
    return said


@pytest.mark.parametrize("name", list(ANSWERS))
def test_an_answer_that_is_no_prefect_api_s_is_one_message(name: str) -> None:
    status, content, said = ANSWERS[name]
    with answering(status, content) as url:
        found = refusal(url)
    assert said in found
    assert url in found


def test_a_prefect_api_passes() -> None:
    with answering(200, b"true\n") as url:
        server.check(url)
        server.check(url + "/")


@pytest.mark.parametrize("kind", ["silent", "endless", "no HTTP", "nobody", "no host", "no address", "a file"])
def test_no_answer_is_one_message_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    monkeypatch.setattr(server, "ANSWER_S", 0.5)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def talk() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listening.accept()
                with connection:
                    if kind == "no HTTP":
                        connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                    while kind == "endless":
                        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 10)
                        threading.Event().wait(0.05)
                    threading.Event().wait(2)

        threading.Thread(target=talk, daemon=True).start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
        others = {
            "nobody": f"http://127.0.0.1:{free_port()}/api",
            "no host": "http://prefect.invalid/api",
            "no address": "127.0.0.1:4200/api",
            "a file": f"file://{tmp_path}",
        }
        url = others.get(kind, address)
        assert url in refusal(url)


def test_a_password_in_the_address_is_not_shown() -> None:
    assert "secret" not in refusal(f"http://user:secret@127.0.0.1:{free_port()}/api")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_temporary_server_is_a_child_that_every_thread_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.delenv(server.URL, raising=False)
    runtime_env()
    import prefect.context
    from prefect.settings import PREFECT_API_URL

    prefect.context.refresh_global_settings_context()
    home = Path(os.environ["SECATEUR_HOME"])
    seen: list[str | None] = []
    with children.kept(home, "test"):
        with server.serving():
            thread = threading.Thread(target=lambda: seen.append(PREFECT_API_URL.value()))
            thread.start()
            thread.join()
            assert seen[0] is not None
            server.check(seen[0])
            assert server.server_url() is None  # no server of the user's: no leases are taken there
            (process,) = [p for p in of_home(home) if "uvicorn" in p.cmdline()]
            assert os.getsid(process.pid) == process.pid
            assert len(list((home / children.FOLDER).glob("*.json"))) == 1
            a_flow_s_lines_and_progress_reach_the_server(monkeypatch, capfd)
        assert not PREFECT_API_URL.value()
        assert wait_until(lambda: not [p for p in of_home(home) if p.pid == process.pid])


def a_flow_s_lines_and_progress_reach_the_server(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Part of the test above, whose server takes seconds to start."""
    import prefect
    from prefect.client.orchestration import get_client

    monkeypatch.setattr(logs, "ARTIFACT_AFTER_S", 0.0)
    view = logs.logged(Silent())
    view.say("nobody listens yet")

    @prefect.task
    def search() -> None:
        with view.stage("Search (ccep)") as report:
            report(3, 12, "top1 0.9")

    @prefect.flow
    def whole(method: str) -> None:
        view.say("Stage 2 of 9: Search")
        search()

    capfd.readouterr()
    logging.disable(logging.CRITICAL)  # as the program does
    try:
        with logs.only_for_prefect(), prefect.tags("method:ccep"):
            whole("ccep")
    finally:
        logging.disable(logging.NOTSET)
    assert capfd.readouterr() == ("", "")
    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs()
        assert (run.tags, run.parameters) == (["method:ccep"], {"method": "ccep"})
        said = [line.message for line in client.read_logs(limit=100, offset=0)]
        wanted = ["Stage 2 of 9: Search", "Search (ccep) ...", "Search (ccep): done, top1 0.9"]
        assert [line for line in said if line in wanted] == wanted
        assert "nobody listens yet" not in said
        assert wait_until(lambda: progress(client) == [("secateur-search-ccep", 100.0)], 30)


def progress(client: Any) -> list[tuple[str, float]]:
    """Progress artifacts of a server: key and percent."""
    told = client._client.post("/artifacts/filter", json={}).json()
    return [(one["key"], one["data"]) for one in told if one["type"] == "progress"]
