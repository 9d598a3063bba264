"""What cannot be searched is said in one sentence, and the journal stays whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from secateur.pipeline.errors import UserError
from secateur.pipeline.progress import Silent
from secateur.pipeline.run.journal import read_journal
from secateur.pipeline.run.run import Run, create_run_directory
from tests.pipeline.helpers import perform, tiny_config

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown criterion": (
        {"method": "global", "target": {"macs_ratio": 0.6}, "options": {"criterion": "l3"}},
        "unknown saliency criterion 'l3'",
    ),
    "out of reach for the widths of the device": (
        {"method": "uniform", "target": {"macs_ratio": 0.06}},
        "smallest reachable is",
    ),
    "no target": ({"method": "cpmc"}, "search.target"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECATEUR_HOME", str(folder))
        yield folder


@pytest.mark.parametrize("case", CASES)
def test_it_ends_with_what_is_wrong(case: str, home: Path) -> None:
    section, message = CASES[case]
    section = {"images": 32, "options": {}, **section}
    with Run(create_run_directory(tiny_config(home, search=section)), Silent()) as run:
        facts = perform(run, "baseline")
        with pytest.raises(UserError, match=message):
            perform(run, "search", facts)
    assert read_journal(run.directory / "journal.jsonl")[0]["kind"] == "run"


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("acp", {"population": 0}),
        ("evofc", {"population": 0}),
        ("meta", {"population": 0}),
        ("optuna", {"sampler": "x"}),
    ],
)
def test_options_out_of_range_are_faults_of_the_run_file(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"search\.options"):
        tiny_config(tmp_path, search={"method": method, "options": options})
