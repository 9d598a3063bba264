"""Executes a Dockerfile without a container engine: each instruction, in a root file system of its own, by chroot.

``tests/tools/image.sh`` starts it in a mount and process name space of its own. It builds the stages on a base root
that stands for the ``FROM`` image, then starts what the image would start, as its user, on a read-only root, without
network and without privileges, and says what came of it. Standard library only.

Of Dockerfiles it knows what ours uses: FROM .. AS, ARG, ENV, LABEL, WORKDIR, COPY (--from), RUN (shell form), USER,
VOLUME, STOPSIGNAL, HEALTHCHECK CMD, ENTRYPOINT and CMD (JSON form). Anything else is an error.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PACKAGES = "/machine-packages"
NODES = ("null", "zero", "full", "random", "urandom", "tty")
TINY = (
    "workload.model={name: cifar/resnet8}",
    "workload.data={source: digits, image_size: 8}",
    "device={profile: quick, probe: false}",
    "baseline.epochs=2",
    "search.method=global",
    "search.images=64",
    "search.latency.mode=measure",
    "finetune.top=1",
    "finetune.epochs=1",
    "gate={max_drop: 1.0, min_speedup: null, budgets: false}",
    "threads=1",
)

GATE = 3
"""Exit code of a run that is done and did not pass its gate, which may ask for a quiet machine."""
QUICK = """\
extends: local
search: {processes: 1, warmup: 1, min_repeats: 3, min_seconds: 0.0}
final: {processes: 2, warmup: 1, min_repeats: 5, min_seconds: 0.0, strict: false}
"""
"""A device profile for the tiny run: it is there to be run, not to be timed."""


class DockerfileError(Exception):
    """The Dockerfile says something this interpreter does not know, or a step of it failed."""


@dataclass(frozen=True)
class Instruction:
    """One instruction: its line in the file, its keyword, and the rest with continuation lines joined."""

    line: int
    keyword: str
    value: str

    def __str__(self) -> str:
        return f"{self.keyword} {' '.join(self.value.split())}"


def parse(text: str) -> list[Instruction]:
    """The instructions of a Dockerfile, without comments.

    Raises:
        DockerfileError: a here-document, which this interpreter does not know.
    """
    found: list[Instruction] = []
    parts: list[str] = []
    first = 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or (not line.strip() and not parts):
            continue
        first = first if parts else number
        parts.append(line.rstrip().removesuffix("\\"))
        if line.rstrip().endswith("\\"):
            continue
        keyword, _, value = " ".join(parts).strip().partition(" ")
        if "<<" in value:
            raise DockerfileError(f"line {first}: here-documents are not known")
        found.append(Instruction(first, keyword.upper(), value.strip()))
        parts = []
    return found


def substituted(text: str, variables: Mapping[str, str]) -> str:
    """``$NAME``, ``${NAME}`` and ``${NAME:-default}`` by their values; unknown ones are empty."""

    def value(match: re.Match[str]) -> str:
        return variables.get(match["plain"] or match["name"], "") or match["default"] or ""

    return re.sub(r"\$(?:(?P<plain>\w+)|\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\})", value, text)


@dataclass
class Stage:
    """A stage of the build: its root, and what its image says of how to run it."""

    root: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    args: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0:0"
    volumes: list[str] = field(default_factory=list)
    stop_signal: str = "SIGTERM"
    health: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def inside(self, path: str) -> Path:
        """Where a path of the image lies here; relative ones count from the working directory."""
        return self.root / os.path.normpath(Path("/", self.workdir, path)).lstrip("/")


class Build:
    """The execution of one Dockerfile.

    Args:
        context: folder that COPY copies from.
        base: root file system that stands for every image named in FROM.
        work: folder for the stages.
        given: build arguments of the command line.
        packages: site-packages that count as installed already; None = everything is installed.
    """

    def __init__(self, context: Path, base: Path, work: Path, given: Mapping[str, str], packages: Path | None) -> None:
        self.context, self.base, self.work, self.given, self.packages = context, base, work, dict(given), packages
        self.globals: dict[str, str] = {}
        self.stages: dict[str, Stage] = {}
        self.stage: Stage | None = None

    def run(self, instructions: Sequence[Instruction]) -> Stage:
        """Execute them all; returns the last stage.

        Raises:
            DockerfileError: names the line.
        """
        for number, each in enumerate(instructions, 1):
            print(f"[{number}/{len(instructions)}] {each}", flush=True)
            started = time.monotonic()
            try:
                self._execute(each)
            except (DockerfileError, OSError, ValueError, subprocess.CalledProcessError) as error:
                raise DockerfileError(f"Dockerfile line {each.line}: {each}: {error}") from error
            if each.keyword in ("RUN", "COPY"):
                print(f"    {time.monotonic() - started:.1f} s", flush=True)
        assert self.stage is not None
        return self.stage

    def _execute(self, each: Instruction) -> None:
        if each.keyword == "FROM":
            self._from(each.value)
        elif each.keyword == "ARG":
            self._arg(each.value)
        elif self.stage is None:
            raise DockerfileError("expected FROM or ARG first")
        else:
            getattr(self, f"_{each.keyword.lower()}", self._unknown)(self.stage, each.value)

    def _unknown(self, stage: Stage, value: str) -> None:
        raise DockerfileError("this instruction is not known")

    def _from(self, value: str) -> None:
        image, _, name = substituted(value, self.globals).partition(" AS ")
        lower = self.stages[image].root if image in self.stages else self.base
        name = name or "final"
        upper, scratch, root = (self.work / name / part for part in ("upper", "scratch", "root"))
        for folder in (upper, scratch, root):
            folder.mkdir(parents=True)
        options = f"lowerdir={lower},upperdir={upper},workdir={scratch}"
        mount("-t", "overlay", "overlay", "-o", options, root)
        python = root / "usr/local/bin/python"
        if not python.exists():  # what the python images call Debian's python3
            python.symlink_to("/usr/bin/python3")
        self.stage = self.stages[name] = Stage(root)

    def _arg(self, value: str) -> None:
        name, _, default = value.partition("=")
        if self.stage is None:
            self.globals[name] = self.given.get(name, default)
        elif name in self.given or "=" in value:
            self.stage.args[name] = self.given.get(name, substituted(default, self._variables(self.stage)))

    def _variables(self, stage: Stage) -> dict[str, str]:
        return {**stage.args, **stage.env}

    def _env(self, stage: Stage, value: str) -> None:
        variables = self._variables(stage)
        for pair in shlex.split(value):
            name, _, text = pair.partition("=")
            stage.env[name] = substituted(text, variables)

    def _label(self, stage: Stage, value: str) -> None:
        for pair in shlex.split(value):
            name, _, text = pair.partition("=")
            stage.labels[name] = substituted(text, self._variables(stage))

    def _workdir(self, stage: Stage, value: str) -> None:
        stage.workdir = "/" + str(stage.inside(substituted(value, self._variables(stage))).relative_to(stage.root))
        stage.inside(".").mkdir(parents=True, exist_ok=True)

    def _user(self, stage: Stage, value: str) -> None:
        stage.user = value

    def _volume(self, stage: Stage, value: str) -> None:
        stage.volumes += json.loads(value)

    def _stopsignal(self, stage: Stage, value: str) -> None:
        stage.stop_signal = value

    def _healthcheck(self, stage: Stage, value: str) -> None:
        options, _, command = value.partition("CMD ")
        if not all(option.startswith("--") for option in options.split()):
            raise DockerfileError("expected HEALTHCHECK [--option=value ...] CMD [...]")
        stage.health = json.loads(command)

    def _entrypoint(self, stage: Stage, value: str) -> None:
        stage.entrypoint = json.loads(value)

    def _cmd(self, stage: Stage, value: str) -> None:
        stage.command = json.loads(value)

    def _copy(self, stage: Stage, value: str) -> None:
        words = substituted(value, self._variables(stage)).split()
        source = self.context
        if words[0].startswith("--from="):
            source = self.stages[words.pop(0).removeprefix("--from=")].root
        if words[0].startswith("--"):
            raise DockerfileError(f"{words[0]} is not known")
        *patterns, to = words
        target = stage.inside(to)
        for pattern in patterns:
            found = sorted(glob.glob(str(source / pattern.lstrip("/"))))
            if not found:
                raise DockerfileError(f"{pattern}: no such file in the build context (see .dockerignore)")
            for path in map(Path, found):
                whole = target / path.name if path.is_file() and (to.endswith("/") or len(words) > 2) else target
                whole.parent.mkdir(parents=True, exist_ok=True)
                copy = [str(path) + ("/." if path.is_dir() else ""), str(whole)]
                whole.mkdir(exist_ok=True) if path.is_dir() else None
                subprocess.run(["cp", "-a", "--no-preserve=ownership", *copy], check=True)

    def _run(self, stage: Stage, value: str) -> None:
        variables = {"HOME": "/root", **self._variables(stage)}
        with machine(stage.root, self.packages) as settings:
            command = ["/bin/sh", "-c", 'cd "$0" && exec /bin/sh -c "$1"', stage.workdir, value]
            uid, _, gid = stage.user.partition(":")
            user = ["setpriv", f"--reuid={uid}", f"--regid={gid or uid}", "--clear-groups"]
            subprocess.run(
                ["chroot", str(stage.root), *user, *command], env={**settings, **variables}, check=True, stdin=-3
            )


def mount(*arguments: object) -> None:
    """``mount`` with these arguments."""
    subprocess.run(["mount", *map(str, arguments)], check=True)


@contextlib.contextmanager
def mounted(root: Path) -> Iterator[list[Path]]:
    """``/proc`` and a bare ``/dev`` in a root; what else is mounted goes onto the list, and away at the end."""
    points: list[Path] = []

    def put(path: Path, *arguments: object) -> None:
        mount(*arguments, path)
        points.append(path)

    (root / "proc").mkdir(exist_ok=True)
    (root / "dev").mkdir(exist_ok=True)
    try:
        put(root / "proc", "-t", "proc", "proc")
        put(root / "dev", "-t", "tmpfs", "-o", "mode=755", "tmpfs")
        for node in NODES:
            (root / "dev" / node).touch()
            put(root / "dev" / node, "--bind", Path("/dev", node))
        (root / "dev/shm").mkdir()
        put(root / "dev/shm", "-t", "tmpfs", "-o", "mode=1777", "tmpfs")
        yield points
    finally:
        for point in reversed(points):
            subprocess.run(["umount", str(point)], check=False)


@contextlib.contextmanager
def machine(root: Path, packages: Path | None) -> Iterator[dict[str, str]]:
    """Network settings of this machine inside a root, for a RUN line: DNS, certificates, and pip's configuration.

    An engine does this by its own means and a build argument. pip's configuration and the variables of proxies and
    certificates are passed on; the files and folders they name appear at the same place. Nothing of it stays.
    """
    names = re.compile(r"PIP_.*|.*_PROXY|NO_PROXY|.*(CERT|SSL|CA_BUNDLE).*", re.IGNORECASE)
    settings = {**pip_settings(), **{name: value for name, value in os.environ.items() if names.fullmatch(name)}}
    named = (re.findall(r"(?:^|\s|file://[^/\s]*)(/[^\s?#]+)", value) for value in settings.values())
    shown = {Path(path.removesuffix("/simple")) for paths in named for path in paths}  # an index's files lie beside it
    shown |= {Path("/etc/resolv.conf"), Path("/etc/hosts"), Path("/etc/ssl/certs")}
    shown |= {path.resolve() for path in shown}
    shown = {path for path in shown if path.exists()}
    made: list[Path] = []
    with mounted(root) as points:
        for path in sorted(shown):
            inside = root / str(path).lstrip("/")
            if any(inside.is_relative_to(point) for point in points):
                continue
            if not inside.exists() or inside.is_symlink():
                inside.unlink(missing_ok=True)
                inside.parent.mkdir(parents=True, exist_ok=True)
                inside.mkdir() if path.is_dir() else inside.touch()
                made.append(inside)
            mount("--bind", path, inside)
            points.append(inside)
        if packages:
            settings["PYTHONPATH"] = PACKAGES
            see_packages(root, packages, points)
        yield settings
    for path in made:
        path.rmdir() if path.is_dir() else path.unlink()


@functools.cache
def pip_settings() -> dict[str, str]:
    """What pip's configuration files say on this machine, as environment variables."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = re.findall(r"^(?:global|install)\.([a-z-]+)=(.*)$", listing.stdout, re.MULTILINE)
    return {f"PIP_{name.upper().replace('-', '_')}": ast.literal_eval(value) for name, value in lines}


def see_packages(root: Path, packages: Path, points: list[Path]) -> None:
    """Mount site-packages where pip and Python find them through PYTHONPATH."""
    inside = root / PACKAGES.lstrip("/")
    inside.mkdir(exist_ok=True)
    mount("--bind", "-o", "ro", packages, inside)
    points.append(inside)


def started(
    stage: Stage,
    command: Sequence[str],
    home: Path,
    packages: Path | None,
    writable: bool = True,
    network: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a command as ``docker run --read-only --tmpfs /tmp --cap-drop ALL --network none -v HOME:...`` would.

    Args:
        home: folder that is mounted at the image's first volume.
        writable: whether that volume can be written.
        network: False = nothing but the loopback.
    """
    env = dict(stage.env)
    if packages:
        env["PYTHONPATH"] = PACKAGES
    uid, _, gid = stage.user.partition(":")
    shutil.chown(home, int(uid), int(gid or uid))
    with mounted(stage.root) as points:

        def put(path: Path, *arguments: object) -> None:
            path.mkdir(parents=True, exist_ok=True)
            mount(*arguments, path)
            points.append(path)

        if packages:
            see_packages(stage.root, packages, points)
        put(stage.root / "tmp", "-t", "tmpfs", "-o", "mode=1777", "tmpfs")
        volume = stage.root / stage.volumes[0].lstrip("/")
        put(volume, "--bind", home)
        if not writable:
            mount("-o", "remount,bind,ro", volume)
        mount("-o", "remount,ro", stage.root)
        drop = ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--clear-groups"]
        inner = ["setpriv", f"--reuid={uid}", f"--regid={gid or uid}", *drop, "--"]
        inner += ["/bin/sh", "-c", 'cd "$0" && exec "$@"', stage.workdir, *command]
        outer = ["chroot", str(stage.root), *inner]
        if not network:
            outer = ["unshare", "--net", "sh", "-c", 'ip link set lo up; exec "$@"', "sh", *outer]
        try:
            return subprocess.run(outer, env=env, capture_output=True, text=True)
        finally:
            mount("-o", "remount,rw", stage.root)


def context_of(checkout: Path, folder: Path) -> Path:
    """What of a checkout an engine would send: the names that .dockerignore lets in, without those of ``**/`` lines."""
    lines = (checkout / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = [line[1:] for line in lines if line.startswith("!")]
    ignored = [line.removeprefix("**/") for line in lines if line.startswith("**/")]
    for name in allowed:
        source = checkout / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns(*ignored))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder / name)
    return folder


class Checks:
    """What is asked of the finished image; the first thing that is not as it should be ends it."""

    def __init__(self, stage: Stage, work: Path, packages: Path | None) -> None:
        self.stage, self.work, self.packages = stage, work, packages
        self.home = work / "home"
        self.home.mkdir()

    def ask(self, what: str, *command: str, says: str = "", codes: Sequence[int] = (0,), writable: bool = True) -> str:
        """Run a command in the image and compare its exit code and a word of its output.

        Raises:
            DockerfileError: they differ; has the end of the output.
        """
        began = time.monotonic()
        result = started(self.stage, command, self.home, self.packages, writable)
        output = result.stdout + result.stderr
        if result.returncode not in codes or says not in output:
            raise DockerfileError(
                f"{what}: {shlex.join(command)}: exit code {result.returncode}, not one of {codes}, or no "
                f"{says!r} in:\n{output[-4000:]}"
            )
        print(f"ok  {what} ({time.monotonic() - began:.1f} s)", flush=True)
        return output

    def all(self, whole: bool) -> None:
        """Every check; ``whole`` = with the image's own command instead of a tiny run."""
        stage, entry = self.stage, self.stage.entrypoint
        uid = stage.user.partition(":")[0]
        self.ask(f"runs as uid {uid}", "id", "-u", says=uid)
        privileges = self.ask("no privileges, and none to gain", "cat", "/proc/self/status", says="NoNewPrivs:\t1")
        if not re.search(r"CapBnd:\t0+\n", privileges):
            raise DockerfileError(f"capabilities are left: {privileges}")
        self.ask("the root is read-only", "sh", "-c", "! touch /app/x /opt/secateur/x", says="Read-only file system")
        if left := [name for name in stage.env if "PIP_" in name or "INDEX" in name]:
            raise DockerfileError(f"the package index is left in the image's environment: {left}")
        self.ask("help", *entry, "--help", says="Prune a PyTorch vision model")
        self.ask("methods", *entry, "list", "methods", says="ccep")
        self.ask("SBOM", "grep", "-c", '"purl"', "/opt/secateur/sbom.json")
        self.ask("health", *stage.health, says="healthy")
        self.ask(
            "health where the home cannot be written", *stage.health, says="cannot write", codes=(1,), writable=False
        )
        self.ask("a run file is valid", *entry, "validate", "runs/digits.yaml", says="is valid")
        if whole:
            output = self.ask("the image's own command", *entry, *stage.command, says="Registered", codes=(0, GATE))
        else:
            profile = self.home / "devices/quick.yaml"
            profile.parent.mkdir()
            profile.write_text(QUICK, encoding="utf-8")
            settings = [word for text in TINY for word in ("--set", text)]
            output = self.ask(
                "a tiny run", *entry, "run", "runs/digits.yaml", *settings, says="Registered", codes=(0, GATE)
            )
        print(output[-2500:])
        written = sorted(path.name for path in self.home.iterdir())
        print(f"In the home: {', '.join(written)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="root file system that stands for the FROM image")
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    parser.add_argument("--packages", type=Path, help="site-packages that count as installed")
    parser.add_argument("--checkout", type=Path, default=Path(__file__).parents[2])
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--whole", action="store_true", help="start the image's own command, not a tiny run")
    arguments = parser.parse_args()
    began = time.monotonic()
    given = dict(text.split("=", 1) for text in arguments.build_arg)
    work = arguments.work
    packages = arguments.packages and without_ourselves(arguments.packages, work)
    build = Build(context_of(arguments.checkout, work / "context"), arguments.base, work, given, packages)
    try:
        stage = build.run(parse((arguments.checkout / "Dockerfile").read_text(encoding="utf-8")))
        print(f"built in {time.monotonic() - began:.0f} s", flush=True)
        Checks(stage, work, packages).all(arguments.whole)
    except DockerfileError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"image: all checks passed after {time.monotonic() - began:.0f} s")
    return 0


def without_ourselves(packages: Path, work: Path) -> Path:
    """A view of site-packages in which Secateur is not installed."""
    upper, scratch, view = (work / "packages" / part for part in ("upper", "scratch", "view"))
    for folder in (upper, scratch, view):
        folder.mkdir(parents=True)
    mount("-t", "overlay", "overlay", "-o", f"lowerdir={packages},upperdir={upper},workdir={scratch}", view)
    for path in (*view.glob("secateur-*"), *view.glob("__editable__*secateur*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return view


if __name__ == "__main__":
    sys.exit(main())
