"""Variables that say nothing are unset, odd folders are one message, and this machine is reached past a proxy."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from secateur.pipeline import surroundings
from secateur.pipeline.errors import SurroundingsError, UserError
from secateur.pipeline.surroundings import (
    FOLDERS,
    WAITING,
    folder,
    home,
    made,
    prepare,
    spare_a_busy_machine,
    variable,
)
from tests.pipeline.helpers import write_tiny

ROOT = Path(__file__).parents[2]
DEAD_PROXY = "http://127.0.0.1:9"
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: Patch) -> None:
    """What ``prepare`` changes is undone after each test."""
    for name in ("NO_PROXY", "no_proxy", *FOLDERS, *WAITING, "HOME"):
        value = os.environ.get(name)
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)


@pytest.mark.parametrize("empty", ["", " ", "\t"])
def test_an_empty_home_is_the_default_one(monkeypatch: Patch, tmp_path: Path, empty: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECATEUR_HOME", empty)
    assert home() == tmp_path / ".secateur"


@pytest.mark.parametrize(
    "name",
    [
        *("SECATEUR_HOME", "SECATEUR_DATA", "SECATEUR_TRACKING_URI", "SECATEUR_NOTIFY", "PREFECT_API_URL", "HOME"),
        *("PREFECT_HOME", "PREFECT_API_KEY", "MLFLOW_TRACKING_USERNAME", "TORCH_HOME", "TMPDIR", "XDG_CACHE_HOME"),
        "OMP_NUM_THREADS",
    ],
)
def test_an_empty_variable_counts_as_unset_for_libraries_too(monkeypatch: Patch, name: str) -> None:
    monkeypatch.setenv(name, "")
    assert variable(name) is None
    prepare()
    assert name not in os.environ
    monkeypatch.setenv(name, "x")
    prepare()
    assert os.environ[name] == "x"


def test_an_empty_list_of_gpus_still_means_none(monkeypatch: Patch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    prepare()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize("name", FOLDERS)
def test_a_tilde_is_the_home_of_a_user_in_every_folder(monkeypatch: Patch, tmp_path: Path, name: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(name, "~/x")
    assert folder(name) == tmp_path / "x"
    prepare()
    assert os.environ[name] == str(tmp_path / "x")
    monkeypatch.setenv(name, "~nosuchuser/x")
    for read in (lambda: folder(name), prepare):
        with pytest.raises(UserError, match=rf"{name} is ~nosuchuser/x: there is no user 'nosuchuser'"):
            read()


@pytest.mark.parametrize("where", ["home", "home/deeper", "home/deeper/still"])
def test_a_home_that_is_a_file_names_the_variable(monkeypatch: Patch, tmp_path: Path, where: str) -> None:
    (tmp_path / "home").write_text("")
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / where))
    with pytest.raises(SurroundingsError, match=rf"SECATEUR_HOME is .*{where}: {tmp_path}/home is a file; set"):
        made(home(), "SECATEUR_HOME")


def test_a_home_that_cannot_be_written_names_the_variable(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECATEUR_HOME", "/proc/none")
    with pytest.raises(SurroundingsError, match="SECATEUR_HOME is /proc/none: it cannot be made"):
        made(home(), "SECATEUR_HOME")
    monkeypatch.setattr(surroundings.os, "access", lambda path, mode: False)  # these tests may run as root
    with pytest.raises(SurroundingsError, match=r"SECATEUR_HOME is .*: nothing may be written there"):
        made(tmp_path, "SECATEUR_HOME")
    monkeypatch.delenv("SECATEUR_HOME")
    with pytest.raises(SurroundingsError, match=r"SECATEUR_HOME is not set, which means .*nothing may be written"):
        made(tmp_path, "SECATEUR_HOME")


def call(env: dict[str, str], *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key not in env and "proxy" not in key.lower()}
    words = [sys.executable, "-m", "secateur", *arguments]
    whole = {**inherited, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(words, capture_output=True, text=True, env=whole, cwd=cwd, timeout=500)


@pytest.mark.parametrize(
    ("env", "code", "said"),
    [
        ({"SECATEUR_HOME": "{file}"}, 4, "SECATEUR_HOME is {file}: {file} is a file"),
        ({"SECATEUR_HOME": "~nosuchuser/x"}, 2, "SECATEUR_HOME is ~nosuchuser/x: there is no user 'nosuchuser'"),
        ({"TORCH_HOME": "~nosuchuser"}, 2, "TORCH_HOME is ~nosuchuser"),
        ({"PREFECT_HOME": "{file}/x"}, 4, "PREFECT_HOME is {file}/x: {file} is a file"),
    ],
)
def test_the_command_says_which_variable_is_wrong(tmp_path: Path, env: dict[str, str], code: int, said: str) -> None:
    (tmp_path / "file").write_text("")
    filled = {key: value.replace("{file}", str(tmp_path / "file")) for key, value in env.items()}
    found = call({"SECATEUR_HOME": str(tmp_path / "home"), **filled}, "run", str(write_tiny(tmp_path)), cwd=tmp_path)
    assert found.returncode == code, found.stderr
    assert said.replace("{file}", str(tmp_path / "file")) in found.stderr and "Traceback" not in found.stderr


def test_a_current_folder_that_was_removed_is_one_message(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    words = f"cd {gone}; rmdir {gone}; {shlex.quote(sys.executable)} -m secateur run x.yaml"
    env = {key: value for key, value in os.environ.items() if key != "SECATEUR_HOME"}
    found = subprocess.run(["bash", "-c", words], capture_output=True, text=True, env={**env, "PYTHONPATH": str(ROOT)})
    assert found.returncode == 2 and "Traceback" not in found.stderr


# -- proxies -----------------------------------------------------------------------------------------------------------


def bypassed(host: str) -> bool:
    return bool(urllib.request.proxy_bypass_environment(host))


@pytest.mark.parametrize("proxy", [*PROXIES, *(name.lower() for name in PROXIES)])
@pytest.mark.parametrize(
    "said",
    [{}, {"NO_PROXY": "corp.example"}, {"no_proxy": "corp.example"}, {"NO_PROXY": "a.b", "no_proxy": "corp.example"}],
)
def test_a_proxy_is_not_asked_for_this_machine_and_what_else_was_said_stays(
    monkeypatch: Patch, proxy: str, said: dict[str, str]
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {proxy: DEAD_PROXY, **said}.items():
        monkeypatch.setenv(name, value)
    prepare()
    prepare()
    assert all(bypassed(host) for host in ("127.0.0.1", "localhost", "::1"))
    assert bypassed("x.corp.example") is bool(said) and not bypassed("prefect.example")
    assert os.environ[proxy] == DEAD_PROXY
    assert os.environ["no_proxy"].count("localhost") == os.environ["NO_PROXY"].count("localhost") == 1


def test_no_proxy_at_all_stays_as_it_is(monkeypatch: Patch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("no_proxy", raising=False)
    prepare()
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "*"


@pytest.mark.parametrize(
    ("address", "through"), [("127.0.0.1", False), ("localhost", False), ("prefect.example", True)]
)
def test_the_clients_of_prefect_and_mlflow_follow(monkeypatch: Patch, address: str, through: bool) -> None:
    """httpx and requests, as they would choose: a server elsewhere is still reached by the proxy."""
    import httpx
    import requests.utils

    monkeypatch.setenv("HTTP_PROXY", DEAD_PROXY)
    prepare()
    url = f"http://{address}:4200/api"
    with httpx.Client() as client:
        transport = client._transport_for_url(httpx.URL(url))
        assert (transport is not client._transport) is through
    assert bool(requests.utils.get_environ_proxies(url)) is through


FLOW = """
from secateur.pipeline.flow import runtime_env
runtime_env()
import prefect

@prefect.flow
def little():
    return 7

print("answer", little())
"""


@pytest.mark.long
def test_prefects_embedded_server_is_reached_with_a_proxy_set(tmp_path: Path) -> None:
    proxies = {name: DEAD_PROXY for upper in PROXIES for name in (upper, upper.lower())}
    env = {key: value for key, value in os.environ.items() if key.lower() != "no_proxy"}
    env |= {**proxies, "SECATEUR_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", FLOW], capture_output=True, text=True, env=env, timeout=200)
    assert found.stdout.strip() == "answer 7", found.stderr[-2000:]


@pytest.mark.long
def test_a_whole_run_ends_well_with_a_proxy_and_empty_variables(tmp_path: Path) -> None:
    proxies = {name: DEAD_PROXY for upper in PROXIES for name in (upper, upper.lower())}
    empty = dict.fromkeys(
        ("SECATEUR_HOME", "SECATEUR_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME", "TORCH_HOME"), ""
    )
    found = call({**proxies, **empty}, "run", str(write_tiny(tmp_path)), cwd=tmp_path)
    assert found.returncode == 0, found.stderr[-2000:]
    assert list((tmp_path / ".secateur" / "runs").glob("tiny-*/report.html"))


@pytest.mark.parametrize(
    ("content", "given", "few"),
    [
        ("some avg10=0.00 avg60=97.67 avg300=96.77 total=43\nfull avg10=0.00 avg60=0.00 total=0\n", {}, True),
        ("some avg10=97.00 avg60=3.10 avg300=96.77 total=43\nfull avg10=0.00 avg60=90.00 total=0\n", {}, False),
        ("some avg10=0.00 avg60=97.67 total=43\n", {"OMP_WAIT_POLICY": "ACTIVE"}, False),
        ("some avg10=0.00 avg60=97.67 total=43\n", {"GOMP_SPINCOUNT": "7"}, False),
        ("nothing of it", {}, False),
        (None, {}, False),
    ],
)
def test_threads_look_a_few_times_only_where_others_want_the_cores(
    monkeypatch: Patch, tmp_path: Path, content: str | None, given: dict[str, str], few: bool
) -> None:
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    if content is not None:
        (tmp_path / "cpu").write_text(content)
    spare_a_busy_machine(tmp_path / "cpu")
    assert (os.environ.get("GOMP_SPINCOUNT") == "1000") is few
    assert all(os.environ[name] == value for name, value in given.items())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="OpenMP of GNU")
def test_it_is_said_before_pytorch_is_there() -> None:
    """OpenMP reads its variables once, when PyTorch brings it."""
    code = """
import sys
from pathlib import Path
from secateur.pipeline.cli import app
assert "torch" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
