"""The command line as a user meets it: help, lists, validation, and one clear message per mistake."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from secateur.device_profiles import DeviceError
from secateur.export import ExportError
from secateur.pipeline import errors
from secateur.pipeline.cli import app as cli
from secateur.pipeline.cli import inspect
from secateur.pipeline.foreign import exit_code
from secateur.pipeline.run.facts import Check
from secateur.pruning.search import METHODS
from tests.pipeline.helpers import made_up_facts, quick_device, write_tiny

Captured = pytest.CaptureFixture[str]
LISTED = [("methods", "ccep"), ("methods", "uniform"), ("workloads", "classification"), ("devices", "local")]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run ``secateur ARGUMENTS`` in this process; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["secateur", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_help_names_every_command_and_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert call(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("run", "resume", "validate", "list", "Exit codes", "130"))


@pytest.mark.parametrize(
    ("what", "name"),
    [("methods", "ccep"), ("methods", "uniform"), ("workloads", "classification"), ("devices", "local")],
)
def test_lists(monkeypatch: pytest.MonkeyPatch, capsys: Captured, what: str, name: str) -> None:
    assert call(monkeypatch, "list", what) == 0
    assert name in capsys.readouterr().out


def test_own_devices_are_listed_even_when_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path
) -> None:
    devices = tmp_path / "home" / "devices"
    devices.mkdir(parents=True)
    quick_device(devices)
    (devices / "broken.yaml").write_text("threads: many\n")
    assert call(monkeypatch, "list", "devices") == 0
    text = capsys.readouterr().out
    assert "quick" in text
    assert "unusable" in text


def test_validate_tells_the_splits_and_the_channel_groups(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path
) -> None:
    assert call(monkeypatch, "validate", str(write_tiny(tmp_path)), "--groups") == 0
    shown = capsys.readouterr().out
    assert " test" in shown
    assert "read by" in shown
    assert "reaches the model's output" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "nothing.yaml"), "pipeline/runs"),
        (("run", "RUN", "--set", "device.profile=lokal"), "local"),
        (("run", "RUN", "--set", "workload.model.name=resnet18"), "channels: 3"),
        (("run", "RUN", "--set", "sead=1"), "did you mean 'seed'"),
        (("resume", "."), "not a run directory"),
        (("list", "colours"), "methods, workloads or devices"),
        (("prune",), "prune"),
        (("run",), "FILE"),
    ],
)
def test_mistakes_get_one_message_and_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
    tmp_path: Path,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    file = str(write_tiny(tmp_path))
    code = call(monkeypatch, *(file if a == "RUN" else a for a in arguments))
    shown = capsys.readouterr()
    assert code == errors.EXIT_USER
    assert said.lower() in shown.err.lower()
    assert "Traceback" not in shown.err + shown.out


def test_a_refused_run_leaves_no_directory_and_names_none(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path
) -> None:
    file = str(write_tiny(tmp_path))
    assert call(monkeypatch, "run", file, "--set", "workload.model.weights=none.safetensors") == errors.EXIT_USER
    assert not list((tmp_path / "home" / "runs").iterdir())
    assert "Run directory" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"), [(KeyError("x"), errors.EXIT_BUG), (DeviceError("gone"), errors.EXIT_SURROUNDINGS)]
)
@pytest.mark.parametrize("begun", [True, False])
def test_only_a_run_that_has_begun_is_said_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path, error: Exception, code: int, begun: bool
) -> None:
    """What fails in mid-run says how to go on; what fails before there is anything leaves nothing and promises none."""
    import secateur.pipeline.flow
    import secateur.pipeline.run.run

    def fail(*_: object, **__: object) -> None:
        raise error

    if begun:
        monkeypatch.setattr(secateur.pipeline.flow, "execute", fail)
    else:
        monkeypatch.setattr(secateur.pipeline.run.run, "examine", fail)
    assert call(monkeypatch, "run", str(write_tiny(tmp_path))) == code
    directories, said = list((tmp_path / "home" / "runs").iterdir()), capsys.readouterr().err
    assert len(directories) == begun
    assert ("Run directory" in said, "Continue with: " in said) == (begun, begun)
    if begun:
        assert said.rstrip().endswith(f"resume {directories[0]}")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UserError("x"), 2),
        (ExportError("x"), 2),
        (errors.JournalError("x"), 4),
        (errors.TrackingError("x"), 4),
        (DeviceError("x"), 4),
        (OSError(errno.ENOSPC, "full"), 4),
        (OSError(errno.EPERM, "no"), 1),
        (KeyError("x"), 1),
    ],
)
def test_every_kind_of_error_has_its_code(error: Exception, code: int) -> None:
    assert exit_code(error) == code


def test_an_interrupt_has_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(what: str) -> dict[str, str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "listing", interrupted)
    assert call(monkeypatch, "list", "methods") == errors.EXIT_INTERRUPTED


@pytest.mark.parametrize(("passed", "code"), [(True, errors.EXIT_OK), (False, errors.EXIT_GATE)])
def test_a_run_that_fails_its_gate_says_why_and_ends_with_3(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path, passed: bool, code: int
) -> None:
    import secateur.pipeline.flow

    check = Check(name="drop in top1", value=0.05, relation="<=", bound=0.02, ok=passed)
    facts = made_up_facts(gate={"checks": (check,), "passed": passed}, promote={"promoted": passed})
    monkeypatch.setattr(secateur.pipeline.flow, "execute", lambda run, debug: facts)
    assert call(monkeypatch, "run", str(write_tiny(tmp_path)), "--set", "search.target.macs_ratio=0.8") == code
    text = capsys.readouterr().out
    assert "1.50x" in text
    after = ["secateur pull tiny@1", "secateur benchmark", "secateur rescore"]
    helps = ["finetune.epochs=", "search.target.macs_ratio=0.9", "secateur list methods"]
    assert [step in text for step in (*after, *helps)] == 3 * [passed] + 3 * [not passed]
    assert ("drop in top1 is 0.05, must be <= 0.02" in text) is not passed


def test_a_run_that_is_quiet_and_asked_for_json_prints_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path
) -> None:
    import secateur.pipeline.flow

    monkeypatch.setattr(secateur.pipeline.flow, "execute", lambda run, debug: made_up_facts())
    assert call(monkeypatch, "run", str(write_tiny(tmp_path)), "--json", "--quiet") == errors.EXIT_OK
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert (told["passed"], told["registered"]) == (True, {"name": "tiny", "version": "1"})
    assert any("secateur pull tiny@1" in step for step in told["next"])
    assert shown.err == ""


def test_a_resumed_run_tells_programs_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path
) -> None:
    import secateur.pipeline.flow

    monkeypatch.setattr(secateur.pipeline.flow, "execute", lambda run, debug: made_up_facts())
    assert call(monkeypatch, "run", str(write_tiny(tmp_path)), "--json") == errors.EXIT_OK
    told = json.loads(capsys.readouterr().out)
    assert call(monkeypatch, "resume", told["directory"], "--json") == errors.EXIT_OK
    assert json.loads(capsys.readouterr().out) == told


@pytest.mark.parametrize(("passed", "code"), [(True, errors.EXIT_OK), (False, errors.EXIT_GATE)])
def test_a_promotion_tells_programs_its_decision_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path, passed: bool, code: int
) -> None:
    from secateur.pipeline.lifecycle import promotion
    from secateur.pipeline.tracking import Decision, Gate

    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))
    gate = Gate("p50", 1.2, 1.05, passed, low=None, high=None, reason="slower")
    decision = Decision("net", "2", "local", "1", (gate,), promoted=passed, run_id="r")
    monkeypatch.setattr(promotion, "promote", lambda *_, **__: decision)
    assert call(monkeypatch, "promote", "net", "--device", "local", "--json") == code
    told = json.loads(capsys.readouterr().out)
    assert (told["name"], told["version"], told["champion"], told["promoted"]) == ("net", "2", "1", passed)
    assert [(each["name"], each["value"], each["ok"]) for each in told["gates"]] == [("p50", 1.2, passed)]


def test_a_dry_run_tells_stages_and_time_and_begins_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path
) -> None:
    assert call(monkeypatch, "run", str(write_tiny(tmp_path)), "--dry-run", "--json") == errors.EXIT_OK
    estimate = json.loads(capsys.readouterr().out)["estimate"]
    assert [part["stage"] for part in estimate["parts"]][:3] == ["Start", "Baseline", "Search"]
    assert estimate["evaluations"] > 0
    assert not (tmp_path / "home" / "runs").exists() or not list((tmp_path / "home" / "runs").iterdir())


@pytest.mark.parametrize("method", METHODS.names())
def test_every_method_is_explained_with_options_that_can_be_pasted_into_a_run_file(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, method: str
) -> None:
    assert call(monkeypatch, "explain", method) == 0
    text = capsys.readouterr().out
    section = yaml.safe_load(text[text.index("search:\n") :].partition("\n\n")[0])["search"]
    options = METHODS.load(method).Options
    assert TypeAdapter(options).validate_python(section["options"]) == options()


def test_a_method_in_a_file_of_the_users_is_explained_like_a_shipped_one(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path
) -> None:
    uniform = METHODS.load("uniform").__file__
    assert uniform is not None
    (tmp_path / "mine.py").write_text(Path(uniform).read_text())
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "explain", "mine.py:mine") == 0
    assert (
        yaml.safe_load(capsys.readouterr().out.partition("search:")[2].partition("\n\n")[0])["method"] == "mine.py:mine"
    )
    assert call(monkeypatch, "explain", "other.py:mine") == errors.EXIT_USER
    assert "there is no file" in capsys.readouterr().err


def test_an_unknown_method_is_explained_by_the_known_ones(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert call(monkeypatch, "explain", "ccepp") == errors.EXIT_USER
    assert "did you mean 'ccep'" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["search.latency.max_error", "max_error"])
def test_a_key_is_explained_by_its_meaning_bounds_and_default(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, word: str
) -> None:
    assert call(monkeypatch, "explain", word) == 0
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("search.latency.max_error", "median error", "> 0", "<= 1,000", "0.08"))


def test_an_option_is_explained_for_every_method_that_has_it(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert call(monkeypatch, "explain", "search.options.population") == 0
    shown = capsys.readouterr().out
    assert "(of ccep): integer; default 5" in shown
    assert "(of meta): integer; default 20" in shown


def test_a_mistyped_key_is_answered_by_the_nearest(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert call(monkeypatch, "explain", "serch.latency.max_eror") == errors.EXIT_USER
    assert "did you mean 'search.latency.max_error'" in capsys.readouterr().err
