"""The part of the tests for older instructions: the same for a commit, another for the next, everything over some."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from tests.tools.part import commit_of, eligible, main, part
from tests.tools.third import THIRDS, due, third_of

FILES = [f"tests/test_{i}.py" for i in range(40)]
COMMITS = [hashlib.sha1(str(i).encode()).hexdigest() for i in range(60)]


def test_a_commit_has_one_part_whatever_the_order_of_files() -> None:
    assert part(FILES, COMMITS[0], 8) == part(FILES[::-1], COMMITS[0], 8)
    assert len({tuple(part(FILES, commit, 8)) for commit in COMMITS}) == len(COMMITS)


def test_parts_have_their_size_and_every_file_has_its_turn() -> None:
    parts = [part(FILES, commit, 8) for commit in COMMITS]
    assert {len(chosen) for chosen in parts} == {5}
    assert set().union(*parts) == set(FILES)
    assert part(FILES[:1], COMMITS[0], 8) == FILES[:1]
    assert part(FILES, COMMITS[0], 1) == sorted(FILES)


def test_files_with_numerics_are_drawn_from_and_whole_runs_are_not(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    texts = {
        "test_net.py": "import torch\n",
        "test_words.py": "import re\n# import torch\n",
        "test_run.py": "import torch\n\ndef test_it():\n    with opened(config) as run: ...\n",
        "test_slow.py": "import torch\n\npytestmark = pytest.mark.slow\n",
        "helpers.py": "import torch\n",
    }
    for name, text in texts.items():
        (tmp_path / "tests" / name).write_text(text)
    assert eligible(tmp_path) == ["tests/test_net.py"]
    assert commit_of(tmp_path) == "0" * 40
    assert "tests/pruning/test_feature_maps.py" in eligible()
    assert "tests/pipeline/evaluation/test_inference.py" in eligible()


def test_what_is_drawn_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["8"]) == 0
    out, err = capsys.readouterr()
    assert out.split() == part(eligible(), commit_of(), 8)
    assert commit_of()[:12] in err
    assert main(["all"]) == 0
    assert capsys.readouterr().out == "tests\n"


@pytest.mark.parametrize("arguments", [[], ["0"], ["some"], ["8", "9"]])
def test_anything_else_is_refused_and_draws_nothing(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "usage" in err


def test_every_long_test_is_in_one_third_and_three_commits_in_a_row_run_all(tmp_path: Path) -> None:
    thirds = [third_of(f"tests/test_{i}.py::test_it[{i}]") for i in range(300)]
    assert all(70 < thirds.count(third) < 130 for third in THIRDS)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], cwd=tmp_path, check=True)
    turns = []
    for _ in range(4):
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], cwd=tmp_path, check=True)
        turns.append(due(tmp_path))
    assert set(turns[:3]) == set(THIRDS) and turns[3] == turns[0]
