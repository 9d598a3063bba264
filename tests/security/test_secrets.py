"""Passwords and keys are used, and kept nowhere: not in a run directory, a store, a log, a report or a terminal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from secateur.pipeline.config.reading import parse_run_file
from secateur.pipeline.errors import UserError
from tests import servers
from tests.pipeline.helpers import TINY, merged, write_tiny

pytestmark = pytest.mark.filterwarnings("ignore")
CANARY, KEY = "canary-c0ffee-password", "canary-c0ffee-api-key"
MARKUP = "<script>alert('{{ 7 * 191 }}')</script>"

URIS = [
    f"http://someone:{CANARY}@tracking.example:5000",
    f"https://:{CANARY}@tracking.example/mlflow",
    f"postgresql+psycopg2://someone:{CANARY}@db.example/mlflow",
    f"postgresql://db.example/mlflow?user=someone&password={CANARY}",
]


@pytest.mark.parametrize("uri", URIS)
def test_a_password_in_the_run_file_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_PASSWORD.*SECATEUR_TRACKING_URI") as caught:
        parse_run_file(yaml.safe_dump(merged(TINY, {"tracking": {"uri": uri}})))
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize("uri", ["http://tracking.example:5000", "postgresql://someone@db/mlflow", "sqlite:///a.db"])
def test_addresses_without_a_password_are_fine(uri: str) -> None:
    assert parse_run_file(yaml.safe_dump(merged(TINY, {"tracking": {"uri": uri}}))).tracking.uri == uri


@dataclass(frozen=True)
class Ran:
    """A run of the command line that used secrets."""

    folder: Path
    home: Path
    output: str
    code: int


def command(folder: Path, uri: str, *more: str) -> Ran:
    """``secateur run`` of the tiny run, with a password in SECATEUR_TRACKING_URI and an API key of Prefect's."""
    home = folder / "home"
    text = write_tiny(folder, search={"budget": {"evaluations": 2}}, finetune={"top": 1})
    profile = folder / "quick.yaml"
    profile.write_text(profile.read_text() + f'sources: ["{MARKUP}"]\n')
    profile.write_text(profile.read_text().replace("The local machine", MARKUP))
    env = {**os.environ, **servers.QUIET, "SECATEUR_HOME": str(home), "OMP_NUM_THREADS": "1"}
    env |= {"SECATEUR_TRACKING_URI": uri, "PREFECT_API_KEY": KEY}
    words = [sys.executable, "-m", "secateur", "run", str(text), *more]
    result = subprocess.run(words, env=env, capture_output=True, text=True, timeout=500, cwd=folder)
    return Ran(folder, home, result.stdout + result.stderr, result.returncode)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """A whole run against an MLflow server that asks for a password; all its traces lie in one folder."""
    folder = tmp_path_factory.mktemp("secrets")
    server = servers.mlflow_server(folder / "mlflow", auth=("keeper", CANARY))
    with servers.running(server):
        yield command(folder, server.url.replace("://", f"://keeper:{CANARY}@"), "--debug")


@pytest.mark.long
def test_no_secret_of_a_run_is_written_anywhere(ran: Ran) -> None:
    assert ran.code in (0, 3), ran.output[-3000:]
    assert "Registered" in ran.output and "keeper:***@" in ran.output, "it used the password, and hid it"
    files = [path for path in ran.folder.rglob("*") if path.is_file() and path.name != "auth.ini"]
    assert {"run.yaml", "journal.jsonl", "report.html", "mlflow.db", "server.log"} <= {path.name for path in files}
    leaks = [str(path) for path in files for secret in (CANARY, KEY) if secret.encode() in path.read_bytes()]
    assert not leaks
    assert CANARY not in ran.output and KEY not in ran.output


@pytest.mark.long
def test_words_of_others_are_text_in_the_report(ran: Ran) -> None:
    pages = list(ran.home.rglob("report.html"))
    assert pages
    for page in pages:
        text = page.read_text()
        assert "&lt;script&gt;alert" in text and "<script>alert" not in text, "markup is shown, not run"
        shown = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
        assert "{{ 7 * 191 }}" in shown and "1337" not in shown, "and no template is filled in"


@pytest.mark.slow
def test_no_secret_is_in_an_error(tmp_path: Path) -> None:
    uri = f"http://keeper:{CANARY}@127.0.0.1:{servers.free_port()}"
    result = command(tmp_path, uri, "--set", "tracking.required=true", "--debug")
    assert result.code == 4 and "keeper:***@" in result.output
    assert CANARY not in result.output
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]


def test_a_key_with_a_passphrase_is_not_asked_for_it() -> None:
    """No passphrase passes through Secateur: such keys are left to ssh-agent (tests/device_profiles/test_ssh.py)."""
    from secateur.device_profiles.targets.ssh import Settings

    assert not [name for name in Settings.model_fields if "pass" in name or "secret" in name]
