"""``secateur check``: a task, or a run file that names one; its findings as a table or as JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secateur.pipeline.cli.app import app
from secateur.pipeline.config import consents, trust
from secateur.pipeline.errors import EXIT_USER, UserError
from tests.pipeline.workloads.custom import tasks


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(tasks.__file__, tmp_path / "task.py")
    (tmp_path / "run.yaml").write_text(
        "name: mine\nworkload: {name: custom, task: task.py:Task, options: {width: 4}}\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_task_is_checked_by_its_name_or_by_a_run_file_and_naming_it_keeps_no_consent(folder: Path) -> None:
    named = CliRunner().invoke(app, ["check", "task.py:Task", "--set", "width=4", "--json"])
    assert named.exit_code == 0, named.output
    assert json.loads(named.stdout)["ok"] and not consents.kept(folder.resolve())
    trust.withdraw_all()  # as in a new process
    with pytest.raises(UserError, match="nobody has consented"):
        CliRunner().invoke(app, ["check", "run.yaml"], catch_exceptions=False)
    by_file = CliRunner().invoke(app, ["check", "run.yaml", "--trust", "--json"])
    assert json.loads(by_file.stdout)["findings"] == json.loads(named.stdout)["findings"]


def test_a_task_may_be_of_a_package(folder: Path) -> None:
    (folder / "of_mine").mkdir()
    (folder / "of_mine" / "__init__.py").write_text("")
    (folder / "task.py").rename(folder / "of_mine" / "dots.py")
    text = (folder / "run.yaml").read_text()
    (folder / "run.yaml").write_text(text.replace("task.py:Task", "of_mine.dots:Task"))
    with pytest.raises(UserError, match="nobody has consented"):
        CliRunner().invoke(app, ["check", "run.yaml"], catch_exceptions=False)
    for arguments in (["of_mine.dots:Task", "--set", "width=4"], ["run.yaml", "--trust"]):
        done = CliRunner().invoke(app, ["check", *arguments, "--json"])
        assert done.exit_code == 0 and json.loads(done.stdout)["ok"], done.output


def test_faults_end_with_the_exit_code_of_a_mistake(folder: Path) -> None:
    text = (folder / "task.py").read_text()
    (folder / "task.py").write_text(text.replace('"misses": (100 * (1 - right), "%", "lower")', '"misses": right'))
    done = CliRunner().invoke(app, ["check", "task.py:Task", "--set", "width=4"])
    assert done.exit_code == EXIT_USER and "fault" in done.output and "(value, unit," in " ".join(done.output.split())


@pytest.mark.parametrize("name", ["task.txt", "absent.py:Task", "task.py:Other", "no_such.module:Task", "os.path:Task"])
def test_what_is_no_task_is_refused_in_plain_words(name: str, folder: Path) -> None:
    with pytest.raises(UserError, match=r"is neither|there is no|no module|is a part of Python"):
        CliRunner().invoke(app, ["check", name], catch_exceptions=False)
