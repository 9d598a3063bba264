"""Run files and device profiles that name code: nothing of it is imported or started without consent.

Every attack leaves a mark when its code runs; none may.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from secateur.device_profiles import load_profile
from secateur.pipeline.cli import app as cli
from secateur.pipeline.cli import registry as registry_cli
from secateur.pipeline.config import consents, trust
from secateur.pipeline.config.reading import load_run_file
from secateur.pipeline.errors import EXIT_GATE, EXIT_USER, UserError
from secateur.pipeline.lifecycle import promotion
from secateur.pipeline.tracking import Registry
from tests.device_profiles.test_shelf import GOOD, installed
from tests.pipeline.helpers import TINY, merged, quick_device
from tests.pipeline.registered import add, crown, embedded, linear_model, make_template, migrated_home

Secateur = Callable[..., tuple[int, str]]

MODULE = """
from pathlib import Path
from torch import nn
import torch

Path({mark!r}).touch()


class Net(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.image_size, self.body = 32, nn.Conv2d(3, 8, 3, 16, 1)
        self.default_boxes = torch.rand(4, 4)

    def forward(self, images):
        return self.body(images).flatten(1).reshape(len(images), -1)


def other(num_classes: int):
    return Net(num_classes)


def no_network(num_classes: int):
    return dict(num_classes=num_classes)
"""


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there when code has run."""
    return tmp_path / "executed"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as somebody sends it."""
    made = tmp_path / "theirs"
    made.mkdir()
    return made


@pytest.fixture
def secateur(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Secateur:
    """Run ``secateur ARGUMENTS`` in this process: exit code and what was printed."""

    def run(*arguments: object) -> tuple[int, str]:
        trust.withdraw_all()  # as a new process
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out + shown.err

    return run


@pytest.fixture(autouse=True)
def _import_nothing_of_earlier_tests() -> Iterator[None]:
    before = list(sys.path)
    yield
    sys.path[:] = before
    sys.modules.pop("theirs", None)


def write(folder: Path, name: str = "theirs:Net", **changes: Any) -> Path:
    """A run file that names a factory."""
    data = {"source": "digits", "scenes": 40, "image_size": 32}
    workload = {"name": "detection", "model": {"name": name}, "data": data}
    quick = folder / "quick.yaml"
    device = {"profile": str(quick if quick.is_file() else quick_device(folder))}
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(merged({"name": "theirs", "workload": workload, "device": device}, changes)))
    return file


def module(folder: Path, mark: Path) -> None:
    (folder / "theirs.py").write_text(MODULE.format(mark=str(mark)))


def profile(folder: Path, **connect: Any) -> Path:
    """A run file whose device profile names code."""
    quick_device(folder, **connect)
    return write(folder, "small_ssd")


COMMANDS = [("run",), ("validate",), ("deploy",)]
FACTORIES = ("theirs:Net", "theirs.py:Net")
"""The same class, as a module's and as a file's."""


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_factory_is_not_imported_without_consent(
    command: tuple[str, ...], name: str, secateur: Secateur, folder: Path, mark: Path
) -> None:
    module(folder, mark)
    code, said = secateur(*command, write(folder, name))
    assert code == EXIT_USER and not mark.exists()
    assert name in said and str(folder / "theirs.py") in said, "exactly what would run"
    assert f"secateur trust {folder}" in said, "and how to say yes"
    assert not list((folder.parent / "home").glob("runs/*")), "and no run directory was made"


def test_a_logging_configuration_is_no_network(secateur: Secateur, folder: Path, mark: Path) -> None:
    """``uvicorn:Config`` with a logging file calls whatever that names; consent does not make it a network."""
    log = {"version": 1, "handlers": {"a": {"class": "pathlib.Path.touch", "self": str(mark)}}}
    (folder / "log.json").write_text(json.dumps(log))
    options = {"model": {"options": {"log_config": str(folder / "log.json")}}}
    file = write(folder, "uvicorn:Config", workload=options)
    assert secateur("validate", file)[0] == EXIT_USER
    code, said = secateur("validate", file, "--trust")
    assert code == EXIT_USER and "builds no torch.nn.Module" in said and not mark.exists()


@pytest.mark.parametrize("name", ["os:system", "subprocess:run", "runpy:run_path", "builtins:eval", "logging.config:x"])
def test_python_itself_builds_no_networks(name: str, secateur: Secateur, folder: Path) -> None:
    code, said = secateur("validate", write(folder, name), "--trust")
    assert code == EXIT_USER and "is a part of Python" in said and "nn.Module builder" in said


@pytest.mark.parametrize("name", ["uvicorn:run", "numpy:load", "torch:load", "torch.hub:load", "yaml:SafeLoader"])
def test_callables_of_packages_that_build_no_network_are_not_called(
    name: str, folder: Path, secateur: Secateur
) -> None:
    code, said = secateur("validate", write(folder, name), "--trust")
    assert code == EXIT_USER and "builds no torch.nn.Module" in said


def test_what_a_factory_returns_must_be_a_network(secateur: Secateur, folder: Path, mark: Path) -> None:
    module(folder, mark)
    code, said = secateur("validate", write(folder, "theirs:no_network"), "--trust")
    assert code == EXIT_USER and "returned a dict" in said and "torch.nn.Module" in said


@pytest.mark.parametrize("name", ["a b:c", "theirs:Net:x", "theirs:", ":Net", "../theirs:Net", "theirs:Net.x", "a\n:b"])
def test_names_that_are_no_factory(name: str, secateur: Secateur, folder: Path, mark: Path) -> None:
    module(folder, mark)
    code, said = secateur("validate", write(folder, name), "--trust")
    assert code == EXIT_USER and not mark.exists() and "Traceback" not in said


def hostile_interpreter(folder: Path, mark: Path) -> Path:
    return profile(folder, connect={"python": ["/bin/sh", "-c", f"touch {mark}"]})


def hostile_proxy(folder: Path, mark: Path) -> Path:
    (folder / "ssh").write_text(f"Host *\n  ProxyCommand touch {mark}\n")
    return profile(folder, target="ssh", connect={"host": "127.0.0.1", "port": 1, "config": str(folder / "ssh")})


def hostile_match(folder: Path, mark: Path) -> Path:
    (folder / "ssh").write_text(f'Match exec "touch {mark}"\n  User x\n')
    return profile(folder, target="ssh", connect={"host": "127.0.0.1", "port": 1, "config": str(folder / "ssh")})


PROFILES = [hostile_interpreter, hostile_proxy, hostile_match]


@pytest.mark.parametrize("attack", PROFILES)
@pytest.mark.parametrize(
    "command", [*COMMANDS, ("devices", "check"), ("devices", "probe"), ("benchmark",), ("promote", "net")]
)
def test_a_device_profile_starts_nothing_without_consent(
    attack: Callable[[Path, Path], Path], command: tuple[str, ...], secateur: Secateur, folder: Path, mark: Path
) -> None:
    subject: tuple[Path | str, ...] = (attack(folder, mark),)
    if command not in COMMANDS:
        subject = (folder / "quick.yaml",)
    if command == ("benchmark",):
        linear_model(folder / "model.onnx")
        subject = (folder / "model.onnx", "--device", folder / "quick.yaml")
    if command[0] == "promote":
        subject = ("--device", str(folder / "quick.yaml"))
    code, said = secateur(*command, *subject)
    assert code == EXIT_USER and not mark.exists()
    assert "connect." in said and f"secateur trust {folder}" in said
    assert ("touch" in said) == (attack is hostile_interpreter), "exactly what would run"


@pytest.mark.parametrize("attack", PROFILES)
def test_the_last_door_is_closed_too(attack: Callable[[Path, Path], Path], folder: Path, mark: Path) -> None:
    """Whatever way leads to a device: nothing is opened that was not consented to in this process."""
    attack(folder, mark)
    with pytest.raises(UserError, match="nobody has consented"):
        trust.open_target(load_profile(folder / "quick.yaml"))
    module(folder, mark)
    sys.path.append(str(folder))
    with pytest.raises(UserError, match="nobody has consented"):
        trust.factory("theirs:Net", {})
    assert not mark.exists()


def test_a_base_brings_its_interpreter_along(secateur: Secateur, folder: Path, mark: Path) -> None:
    hostile_interpreter(folder, mark)
    (folder / "heir.yaml").write_text("extends: quick\n")
    code, said = secateur("devices", "check", folder / "heir.yaml")
    assert code == EXIT_USER and "/bin/sh" in said and not mark.exists()


def test_only_the_devices_scope_opens_targets() -> None:
    """No module of pipeline opens a device by another way than ``trust.open_target``."""
    package = Path(trust.__file__).parents[1]
    opening = [
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if "device_profiles import" in file.read_text()
        and any(
            "open_target" in line and "import" in line and "trust" not in line for line in file.read_text().splitlines()
        )
    ]
    assert not opening


# ------------------------------------------------------------------------------------------------ what consent covers


def kept(folder: Path) -> set[str]:
    return {entry.text.partition(" of ")[0] for entry in consents.kept(folder.resolve())}


def test_consent_is_once_per_folder_and_entry(secateur: Secateur, folder: Path, mark: Path) -> None:
    module(folder, mark)
    file = write(folder)
    code, said = secateur("trust", folder)
    assert code == 0 and "theirs:Net" in said and not mark.exists(), "consent runs nothing"
    trust.require(trust.code_in(load_run_file(file), file))
    (folder / "theirs.py").write_text(MODULE.format(mark=str(mark)) + "# changed\n")
    trust.withdraw_all()
    trust.require(trust.code_in(load_run_file(file), file))  # one's own module may change
    trust.withdraw_all()
    write(folder, "theirs:other")
    with pytest.raises(UserError, match="theirs:other"):  # a changed entry asks again
        trust.require(trust.code_in(load_run_file(file), file))
    elsewhere = folder.parent / "copy"
    shutil.copytree(folder, elsewhere)
    write(elsewhere)
    with pytest.raises(UserError, match="secateur trust"):  # and so does another folder
        trust.require(trust.code_in(load_run_file(elsewhere / "run.yaml"), elsewhere / "run.yaml"))


def test_a_module_that_comes_from_elsewhere_asks_again(secateur: Secateur, folder: Path, mark: Path) -> None:
    module(folder, mark)
    file = write(folder)
    secateur("trust", folder)
    other = folder.parent / "other"
    other.mkdir()
    module(other, mark)
    sys.path.insert(0, str(other))
    trust.withdraw_all()
    with pytest.raises(UserError, match=str(other / "theirs.py")):
        trust.require(trust.code_in(load_run_file(file), file))


def test_the_record_is_for_this_user_alone(secateur: Secateur, folder: Path, mark: Path, tmp_path: Path) -> None:
    module(folder, mark)
    write(folder)
    secateur("trust", folder)
    (record,) = (tmp_path / "home/trust").iterdir()
    key = tmp_path / "config/secateur/trust.key"
    assert [path.stat().st_mode & 0o777 for path in (record, key)] == [0o600, 0o600]
    assert kept(folder) == {"theirs:Net"}
    key.chmod(0o644)
    assert not kept(folder), "a key that others can read seals nothing"


def test_a_folder_brings_no_consent_along(
    secateur: Secateur, folder: Path, mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``SECATEUR_HOME`` is .secateur of the current folder, which may be theirs."""
    module(folder, mark)
    file = write(folder)
    monkeypatch.setenv("SECATEUR_HOME", str(folder / ".secateur"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "their-config"))
    assert secateur("trust", folder)[0] == 0  # where they are at home
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert secateur("validate", file)[0] == EXIT_USER, "no key of mine"
    (folder / "own").mkdir()
    (folder / "own" / "run.yaml").write_text(yaml.safe_dump(TINY))
    write(folder / "own")
    module(folder / "own", mark)
    secateur("trust", folder / "own")  # now there is a key of mine
    code, said = secateur("validate", file)
    assert code == EXIT_USER and not mark.exists() and "secateur trust" in said


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"content": 1, "seal": 2}', "[" * 10_000, "\0"])
def test_a_damaged_record_is_no_consent(
    damage: str, secateur: Secateur, folder: Path, mark: Path, tmp_path: Path
) -> None:
    module(folder, mark)
    file = write(folder)
    secateur("trust", folder)
    (record,) = (tmp_path / "home/trust").iterdir()
    text = json.loads(record.read_text())
    text["content"]["entries"].append(["workload.model.name", "theirs:other", ""])
    for content in (damage, json.dumps(text)):
        record.write_text(content)
        assert not kept(folder)
        code, said = secateur("validate", file)
        assert code == EXIT_USER and "Traceback" not in said and not mark.exists()


def test_consent_can_be_taken_back(secateur: Secateur, folder: Path, mark: Path) -> None:
    module(folder, mark)
    file = write(folder)
    secateur("trust", folder)
    assert "Consent taken back" in secateur("trust", "--forget", folder)[1]
    assert secateur("validate", file)[0] == EXIT_USER and not mark.exists()


@pytest.mark.parametrize("what", ["folder", "run.yaml", "theirs.py", "above", "ssh"])
@pytest.mark.parametrize("mode", [0o002, 0o020])
def test_what_others_can_write_gets_no_consent(
    what: str, mode: int, secateur: Secateur, folder: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consents, "_is_own_group", lambda *_: False)
    module(folder, mark)
    file = write(folder)
    if what == "ssh":
        hostile_proxy(folder, mark)
        write(folder)
    path = {"folder": folder, "above": folder.parent}.get(what, folder / what)
    path.chmod(path.stat().st_mode | mode)
    code, said = secateur("validate", file, "--trust")
    assert code == EXIT_USER and "others than you can write" in said and not mark.exists()
    assert f"chmod go-w {path}" in said
    assert not kept(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_what_another_user_owns_gets_no_consent(secateur: Secateur, folder: Path, mark: Path) -> None:
    module(folder, mark)
    file = write(folder)
    os.chown(folder / "theirs.py", 12345, 12345)
    code, said = secateur("validate", file, "--trust")
    assert code == EXIT_USER and "others than you can write" in said and not mark.exists()


def test_a_person_at_a_terminal_is_asked(
    secateur: Secateur, folder: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module(folder, mark)
    file = write(folder)
    for stream in (sys.stdin, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    answers = iter(["n", "", "what", "y"])
    asked: list[str] = []

    def answer(self: object, prompt: object = "", **_: Any) -> str:
        asked.append(str(prompt))
        return next(answers)

    monkeypatch.setattr("secateur.pipeline.terminal.Terminal.input", answer)
    for _ in range(3):
        code, said = secateur("validate", file)
        assert code == EXIT_USER and "theirs:Net" in said and not mark.exists()
    secateur("validate", file)
    assert mark.exists() and kept(folder) == {"theirs:Net"} and len(asked) == 4
    secateur("validate", file)
    assert len(asked) == 4, "once"


def test_shipped_files_and_networks_by_name_need_none(tmp_path: Path) -> None:
    package = Path(trust.__file__).parents[1]
    shipped = list(package.glob("runs/*.yaml"))
    boards = list(Path(package.parent, "device_profiles", "boards").glob("*.yaml"))
    assert shipped and boards
    for file in shipped:
        assert trust.code_in(load_run_file(file), file) == []
    for file in boards:
        assert trust.code_of_profile(file) is None
    (tmp_path / "board.yaml").write_text("target: ssh\nconnect: {host: a, python: python3}\n")
    assert trust.code_of_profile(tmp_path / "board.yaml") is None, "the default is no choice"


def test_builders_of_torchvision_need_none_unless_they_load_files(folder: Path) -> None:
    name = "torchvision.models.detection:ssd300_vgg16"
    file = write(folder, name)
    assert trust.code_in(load_run_file(file), file) == []
    for other in (
        write(folder, name, workload={"model": {"options": {"weights_backbone": "file:///x"}}}),
        write(folder, "torchvision.ops:nms"),
    ):
        assert trust.code_in(load_run_file(other), other)


def test_a_package_called_timm_in_their_folder_is_not_it(folder: Path, mark: Path) -> None:
    (folder / "timm").mkdir()
    (folder / "timm" / "__init__.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    sys.path.insert(0, str(folder))
    file = write(folder, "timm:resnet18")
    found = trust.code_in(load_run_file(file), file)
    assert [entry.text for one in found for entry in one.entries] and not mark.exists()


def test_a_device_added_with_an_interpreter_was_asked_for(
    secateur: Secateur, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("devices", "add", "mine", "--from", "local", "--python", sys.executable, "--no-check")
    assert secateur(*words)[0] == 0
    trust.withdraw_all()
    found = trust.code_of_profile("mine")
    assert found is not None
    trust.require([found])


def test_a_kind_of_target_says_itself_what_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "tool"
    tool.touch()
    good = GOOD.replace(
        "class Settings: ...",
        "import pathlib, pydantic\nclass Settings(pydantic.BaseModel):\n    wire: str = ''\n    python: str = ''",
    )
    says = f"""
from secateur.device_profiles.target import Started
def starts(connect):
    return [Started("wire", "the wire to " + connect["wire"], pathlib.Path({str(tool)!r}))]
"""
    installed(tmp_path, monkeypatch, wired=good + says, plain=good)
    for kind, connect, text in (
        ("wired", "{wire: pc7}", "connect.wire: the wire to pc7"),
        ("plain", "{python: /opt/py}", "connect.python: /opt/py (on this machine)"),
    ):
        (tmp_path / "board.yaml").write_text(f"target: {kind}\nconnect: {connect}\n")
        found = trust.code_of_profile(tmp_path / "board.yaml")
        assert found is not None and list(map(str, found.entries)) == [text]
        assert found.others == ((tool,) if kind == "wired" else ())
        with pytest.raises(UserError, match="nobody has consented"):
            trust.open_target(load_profile(tmp_path / "board.yaml"))


# --------------------------------------------------------------------------------------- runs, deployments, workers


@pytest.mark.parametrize("name", FACTORIES)
def test_a_run_directory_may_be_resumed_and_a_strangers_may_not(name: str, folder: Path, mark: Path) -> None:
    from secateur.pipeline.run.run import create_run_directory, open_run_directory

    module(folder, mark)
    file = write(folder, name)
    config = load_run_file(file)
    trust.require(trust.code_in(config, file), lambda _: True)
    directory = create_run_directory(config)
    trust.withdraw_all()
    _, resumed = open_run_directory(directory)
    assert resumed.folder == folder
    trust.require(trust.code_in(resumed, directory / "run.yaml"))
    copied = folder.parent / "sent"
    shutil.copytree(directory, copied)
    trust.withdraw_all()
    with pytest.raises(UserError, match="secateur trust"):
        trust.require(trust.code_in(open_run_directory(copied)[1], copied / "run.yaml"))
    assert not mark.exists()


def test_a_run_checks_before_it_opens_anything(folder: Path, mark: Path) -> None:
    from secateur.pipeline.progress import Silent
    from secateur.pipeline.run.run import Run, create_run_directory

    module(folder, mark)
    directory = create_run_directory(load_run_file(write(folder)))
    with pytest.raises(UserError, match="nobody has consented"):
        Run(directory, Silent())
    assert not mark.exists()


def test_a_deployment_records_consent_and_its_runs_check_it(folder: Path, mark: Path) -> None:
    pytest.importorskip("prefect")
    from secateur.pipeline.flow.deployments import Order, _parameters

    module(folder, mark)
    file = write(folder)
    order = Order(file, (), {})
    told = _parameters(order, load_run_file(file))
    trusted = told["compress"].model_dump()["trusted"]
    assert [entry[1].partition(" of ")[0] for entry in trusted] == ["theirs:Net"]
    assert told["profile"].model_dump()["trusted"] == trusted
    trust.withdraw_all()
    trust.accept(trusted)
    trust.require(trust.code_in(load_run_file(file), file))
    write(folder, "theirs:other")
    with pytest.raises(UserError, match="theirs:other"):
        trust.require(trust.code_in(load_run_file(file), file))


@pytest.mark.parametrize("name", FACTORIES)
def test_a_worker_may_run_what_its_driver_may(name: str, folder: Path, mark: Path) -> None:
    module(folder, mark)
    file = write(folder, name)
    trust.require(trust.code_in(load_run_file(file), file), lambda _: True)
    handed = json.loads(json.dumps(trust.allowed()))
    trust.withdraw_all()
    with pytest.raises(UserError):
        trust.factory(name, {})
    trust.accept(handed)
    assert trust.factory(name, {})(2).default_boxes.shape == (4, 4)


def test_a_file_of_code_finds_what_lies_beside_it_and_beside_the_run_file(folder: Path, mark: Path) -> None:
    (folder / "nets").mkdir()
    (folder / "nets" / "beside.py").write_text("from theirs import Net\n")
    (folder / "nets" / "mine.py").write_text("from beside import Net\n")
    module(folder, mark)
    file = write(folder, "nets/mine.py:Net")
    trust.require(trust.code_in(load_run_file(file), file), lambda _: True)
    assert trust.factory("nets/mine.py:Net", {})(2).default_boxes.shape == (4, 4)
    sys.modules.pop("beside")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("class Other: pass\n", "there is no Net in"),
        ("class Net: pass\n", "builds no torch.nn.Module"),
        ("def Net(num_classes): return 3\n", "returned a int"),
        ("def Net(num_classes): raise KeyError('x')\n", "failed: KeyError"),
        ("import nowhere_at_all\n", "cannot be imported: ModuleNotFoundError"),
        ("def (\n", "cannot be imported: SyntaxError"),
    ],
)
def test_what_is_wrong_with_a_file_of_code_is_said(content: str, said: str, secateur: Secateur, folder: Path) -> None:
    (folder / "theirs.py").write_text(content)
    code, text = secateur("validate", write(folder, "theirs.py:Net"), "--trust")
    assert code == EXIT_USER and said in text and "Traceback" not in text
    code, text = secateur("validate", write(folder, "gone.py:Net"), "--trust")
    assert code == EXIT_USER and "there is no file" in text and "beside the run file" in text


# -- registered versions -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_template(tmp_path_factory.mktemp("mlflow") / "mlflow.db")


@pytest.fixture
def registry(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    found = embedded(migrated_home(tmp_path / "home", store))
    monkeypatch.setattr(registry_cli, "registry_at", lambda _: found)
    monkeypatch.setattr(promotion, "RESAMPLES", 20)
    return found


def challenger(registry: Registry, folder: Path, run_file: Path) -> None:
    """A version that a run of this run file would have made, and a champion."""
    model = linear_model(folder / "model.onnx")
    crown(registry, add(registry, folder, model, "run-1"))
    config = load_run_file(run_file).model_dump(mode="json")
    add(registry, folder, linear_model(folder / "other.onnx", noise=1e-4), "run-2", base=config)


@pytest.mark.filterwarnings("ignore")  # MLflow's own
@pytest.mark.parametrize("name", FACTORIES)
def test_a_version_of_a_detector_with_a_factory_is_judged_with_consent_alone(
    name: str,
    registry: Registry,
    secateur: Secateur,
    folder: Path,
    mark: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A detector's boxes belong to its network, so the test images cannot be read without its code."""
    module(folder, mark)
    challenger(registry, tmp_path, write(folder, name))
    monkeypatch.chdir(folder)  # where the module is
    promoting = ("promote", "net", "--device", folder / "quick.yaml")
    code, said = secateur(*promoting)
    assert code == EXIT_USER and not mark.exists() and "Bug" not in said
    assert name in said and str(folder / "theirs.py") in said, "exactly what would run"
    assert f"secateur trust {folder}" in said, "and how to say yes"
    assert secateur("trust", folder)[0] == 0
    code, said = secateur(*promoting)
    assert mark.exists() and "names code" not in said and "Bug" not in said
    mark.unlink()
    for loaded in [n for n in sys.modules if n.endswith("theirs")]:
        del sys.modules[loaded]
    consents.forget(folder)
    assert secateur(*promoting)[0] == EXIT_USER and not mark.exists()
    secateur(*promoting, "--trust")
    assert mark.exists()


@pytest.mark.filterwarnings("ignore")
def test_a_version_of_a_run_that_was_made_here_needs_no_other_consent(
    registry: Registry, secateur: Secateur, folder: Path, mark: Path, tmp_path: Path
) -> None:
    module(folder, mark)
    challenger(registry, tmp_path, write(folder))
    run = registry.home / "runs" / "run-2"
    run.mkdir(parents=True)
    config = load_run_file(folder / "run.yaml")
    (run / "run.yaml").write_text((folder / "run.yaml").read_text())
    (run / "origin.json").write_text(json.dumps({"run_id": "run-2", "folder": str(folder)}))
    promoting = ("promote", "net", "--device", folder / "quick.yaml")
    code, said = secateur(*promoting)
    assert code == EXIT_USER and not mark.exists() and f"secateur trust {run}" in said
    trust.require(trust.code_in(config, folder / "run.yaml"), lambda _: True)
    trust.hand_on(config, run)
    secateur(*promoting)
    assert mark.exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", ["classification", "detection"])
def test_nothing_is_imported_where_the_code_of_a_version_is_not_needed(
    task: str, registry: Registry, secateur: Secateur, folder: Path, mark: Path, tmp_path: Path
) -> None:
    """A classifier is judged by its file and the images; and where no accuracy is asked for, so is a detector."""
    module(folder, mark)
    changes: dict[str, Any] = {"gate": {"max_drop_champion": None}}
    if task == "classification":
        data = {"source": "digits", "image_size": 8, "scenes": None}
        changes = {"workload": {"name": "classification", "data": data}}
    file = write(folder, **changes)
    if task == "classification":
        content = yaml.safe_load(file.read_text())
        del content["workload"]["data"]["scenes"]
        file.write_text(yaml.safe_dump(content))
    challenger(registry, tmp_path, file)
    code, said = secateur("promote", "net", "--device", folder / "quick.yaml")
    assert code in (0, EXIT_GATE) and "promoted" in said and "names code" not in said, said
    code, said = secateur("pull", "net", "-o", tmp_path / "model")
    assert code == 0, said
    assert not mark.exists() and "theirs" not in sys.modules


THINGS = {
    "a method": ({"search": {"method": "theirs.py:theirs"}}, {}, "search.method: theirs.py:theirs of"),
    "a workload": ({"workload": {"name": "theirs.py:theirs"}}, {}, "workload.name: theirs.py:theirs of"),
    "a target": ({}, {"target": "theirs.py:theirs"}, "target: "),
    "a runtime": ({}, {"runtime": "theirs.py:theirs"}, "runtime: "),
}


@pytest.mark.parametrize("command", [("validate",), ("run",)])
@pytest.mark.parametrize("thing", THINGS)
def test_a_file_of_code_is_not_loaded_without_consent(
    thing: str, command: tuple[str, ...], secateur: Secateur, folder: Path, mark: Path
) -> None:
    run_file, device, said_of_it = THINGS[thing]
    (folder / "theirs.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    profile_file = quick_device(folder, **device)
    file = write(folder, "small_ssd", **merged({"device": {"profile": str(profile_file)}}, run_file))
    code, said = secateur(*command, file)
    assert code == EXIT_USER and not mark.exists()
    assert said_of_it in said and str(folder / "theirs.py") in said and f"secateur trust {folder}" in said
    code, said = secateur("validate", file, "--trust")
    assert code != 0 and mark.exists(), "with consent it is loaded, and found to be no such thing"
    assert "theirs.py" in said and "it has no" in said


def test_others_may_not_write_a_file_of_code(secateur: Secateur, folder: Path, mark: Path) -> None:
    (folder / "theirs.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    (folder / "theirs.py").chmod(0o666)
    code, said = secateur("validate", write(folder, "small_ssd", search={"method": "theirs.py:theirs"}), "--trust")
    assert code == EXIT_USER and "others than you can write" in said and not mark.exists()


def test_a_task_of_one_s_own_is_not_loaded_without_consent(secateur: Secateur, folder: Path, mark: Path) -> None:
    (folder / "theirs.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    content = yaml.safe_load(write(folder, "small_ssd").read_text())
    file = folder / "task.yaml"
    file.write_text(yaml.safe_dump(content | {"workload": {"name": "custom", "task": "theirs.py:Task"}}))
    code, said = secateur("run", file)
    assert code == EXIT_USER and not mark.exists()
    assert "workload.task: theirs.py:Task of" in said and f"secateur trust {folder}" in said
    code, said = secateur("validate", file, "--trust")
    assert code == EXIT_USER and mark.exists() and "there is no Task in" in said
