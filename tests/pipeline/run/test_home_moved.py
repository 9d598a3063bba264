"""A home that was moved, or whose variable is not set: no second, empty store beside the run's own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from secateur.pipeline.cli.app import main
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.errors import TrackingError, UserError
from secateur.pipeline.lifecycle.rescore import rescore
from secateur.pipeline.progress import Silent
from secateur.pipeline.run.origin import ORIGIN, check_tracked_at, read_origin, return_to_origin
from secateur.pipeline.run.run import Run, create_run_directory
from secateur.pipeline.tracking import Registry
from secateur.pipeline.tracking.pull import pull
from secateur.pipeline.tracking.reprofiles import record_reprofile
from tests.pipeline.helpers import tiny_config
from tests.pipeline.registered import add, crown, embedded, linear_model, make_template, migrated_home

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own
SERVER = "http://tracking.example:5000"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home named by a variable, and a current folder that is another one."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SECATEUR_TRACKING_URI", raising=False)
    return tmp_path / "home"


def begun(folder: Path, **tracking: str) -> tuple[Path, RunFile]:
    """A run directory in the present home, and its configuration."""
    config = tiny_config(folder, tracking=tracking)
    return create_run_directory(config), config


def nothing_was_made(tmp_path: Path) -> bool:
    return not list((tmp_path / "elsewhere").iterdir())


# -- a run that is resumed ---------------------------------------------------------------------------------------------


def test_a_run_goes_on_in_the_home_it_was_begun_in_whose_variable_is_not_set(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, config = begun(tmp_path)
    monkeypatch.delenv("SECATEUR_HOME")
    return_to_origin(directory)
    check_tracked_at(directory, config)
    assert read_origin(directory)["tracking"] == f"sqlite:///{home}/mlflow.db"
    assert nothing_was_made(tmp_path)


def test_a_moved_home_whose_variable_is_not_set_is_said_with_both_places(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, config = begun(tmp_path)
    moved = home.rename(tmp_path / "new home")
    directory = moved / "runs" / directory.name
    monkeypatch.delenv("SECATEUR_HOME")
    with pytest.raises(UserError) as caught:
        return_to_origin(directory)
    said = str(caught.value)
    assert f"{home}, which is not there" in said
    assert f"{tmp_path}/elsewhere/.secateur would be a new, empty one" in said
    link = re.search(r"`(ln -s .*)`", said)
    assert link is not None
    assert nothing_was_made(tmp_path)
    home.symlink_to(moved)  # what the message advises
    assert link[1] == f"ln -s '{moved}' {home}"
    return_to_origin(directory)
    check_tracked_at(directory, config)


def test_a_moved_home_that_the_variable_names_is_not_tracked_in_anew(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, config = begun(tmp_path)
    (home / "mlflow.db").touch()
    moved = home.rename(tmp_path / "moved")
    monkeypatch.setenv("SECATEUR_HOME", str(moved))
    with pytest.raises(UserError, match=rf"tracked in sqlite:///{home}/mlflow.db.*ln -s {moved} {home}"):
        Run(moved / "runs" / directory.name, Silent())
    assert sorted(file.name for file in moved.iterdir()) == ["mlflow.db", "runs"]
    home.symlink_to(moved)
    check_tracked_at(moved / "runs" / directory.name, config)


def test_another_home_beside_the_runs_own_is_named_with_the_way_back(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = begun(tmp_path)
    (home / "mlflow.db").touch()
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "other"))
    return_to_origin(directory)
    with pytest.raises(UserError, match=rf"SECATEUR_HOME is {tmp_path}/other\. Set SECATEUR_HOME={home}\."):
        Run(directory, Silent())
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("now", [None, "http://another.example:5000"])
def test_a_server_that_a_variable_named_at_the_start_must_be_named_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: str | None
) -> None:
    monkeypatch.setenv("SECATEUR_TRACKING_URI", SERVER)
    directory, _ = begun(tmp_path)
    if now is None:
        monkeypatch.delenv("SECATEUR_TRACKING_URI")
    else:
        monkeypatch.setenv("SECATEUR_TRACKING_URI", now)
    wanted = now or f"sqlite:///{home}/mlflow.db"
    with pytest.raises(UserError, match=rf"tracked in {SERVER}, but now .* {wanted}.*Set SECATEUR_TRACKING_URI"):
        Run(directory, Silent())
    assert not (home / "mlflow.db").exists()
    monkeypatch.setenv("SECATEUR_TRACKING_URI", f"{SERVER}/")  # the same server, written otherwise
    check_tracked_at(directory, tiny_config(tmp_path))


def test_no_password_is_written_down_and_a_new_one_is_no_other_server(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_TRACKING_URI", "postgresql://me:first-secret@db/mlflow")
    directory, config = begun(tmp_path)
    assert "first-secret" not in (directory / ORIGIN).read_text()
    monkeypatch.setenv("SECATEUR_TRACKING_URI", "postgresql://me:second-secret@db/mlflow")
    check_tracked_at(directory, config)


def test_another_store_in_run_yaml_is_a_decision_but_a_relative_one_elsewhere_is_not(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = begun(tmp_path, uri="sqlite:///own.db")
    check_tracked_at(directory, tiny_config(tmp_path, tracking={"uri": SERVER}))
    check_tracked_at(directory, tiny_config(tmp_path, tracking={"uri": f"sqlite:///{tmp_path}/other.db"}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"elsewhere/own\.db, but now .*the current folder is another one"):
        check_tracked_at(directory, tiny_config(tmp_path, tracking={"uri": "sqlite:///own.db"}))


def test_a_run_of_an_earlier_version_which_noted_no_store_goes_on(home: Path, tmp_path: Path) -> None:
    directory, config = begun(tmp_path)
    noted = json.loads((directory / ORIGIN).read_text())
    del noted["tracking"]
    (directory / ORIGIN).write_text(json.dumps(noted))
    check_tracked_at(directory, config)


def test_the_command_ends_with_code_2_and_makes_no_home(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, _ = begun(tmp_path)
    home.rename(tmp_path / "moved")
    monkeypatch.delenv("SECATEUR_HOME")
    monkeypatch.setattr("sys.argv", ["secateur", "resume", str(tmp_path / "moved" / "runs" / directory.name)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "which is not there" in " ".join(capsys.readouterr().err.split())
    assert nothing_was_made(tmp_path)


# -- what only reads ---------------------------------------------------------------------------------------------------


def test_reading_makes_no_store_and_says_what_was_looked_for(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SECATEUR_HOME")
    here = tmp_path / "elsewhere" / ".secateur"
    registry = Registry(f"sqlite:///{here}/mlflow.db", here)
    ways = (
        lambda: registry.history("net"),
        lambda: registry.version("net", "challenger", "pi"),
        lambda: registry.champions(),
        lambda: pull(registry, "net", tmp_path / "out"),
        lambda: record_reprofile(registry.uri, here, ("net", "1", "pi"), "key", {}, "{}"),
    )
    for way in ways:
        with pytest.raises(UserError, match=rf"no MLflow store at {here}/mlflow.db \(SECATEUR_HOME is not set"):
            way()
    assert not (here / "mlflow.db").exists()


def test_rescoring_asks_no_store(home: Path, tmp_path: Path) -> None:
    directory, _ = begun(tmp_path)
    shutil.rmtree(tmp_path / "elsewhere")
    with pytest.raises(Exception, match="journal"):
        rescore(directory, "device", {})
    assert not (home / "mlflow.db").exists()


def test_files_of_versions_in_a_home_that_was_moved_are_missed_by_name_and_found_through_a_link(
    home: Path, tmp_path: Path
) -> None:
    registry = embedded(migrated_home(home, make_template(tmp_path / "template.db")))
    version = add(registry, tmp_path, linear_model(tmp_path / "model.onnx"), "run-1")
    crown(registry, version)
    moved = home.rename(tmp_path / "moved")
    registry = embedded(moved)
    with pytest.raises(TrackingError, match=rf"in {home}/artifacts/.* not there.*SECATEUR_HOME.*moved") as caught:
        pull(registry, "net", tmp_path / "out", device="quick")
    assert not caught.value.unreachable, "a cache does not hide it"
    assert not home.exists()
    home.symlink_to(moved)
    assert pull(registry, "net", tmp_path / "out", device="quick").version.version == "1"
