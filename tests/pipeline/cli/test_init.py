"""``secateur init``: a run file that fits the data; off a terminal nothing is asked, and never is a user's code run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from secateur.pipeline import errors
from secateur.pipeline.config.reading import load_run_file
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.run import draft
from secateur.pipeline.terminal import Terminal
from tests.pipeline.cli.test_app import Captured, call

SIDE = 20


@pytest.fixture
def flowers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Class folders in the current folder."""
    random = np.random.default_rng(0)
    for label in ("daisy", "rose"):
        (tmp_path / "flowers" / label).mkdir(parents=True)
        for i in range(30):
            pixels = random.integers(0, 256, (SIDE, SIDE + 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "flowers" / label / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return Path("flowers")


@pytest.fixture
def own_network(flowers: Path) -> Path:
    """A file with a network; it tells when it is run."""
    Path("mynet.py").write_text(
        "import pathlib\npathlib.Path('was_run').touch()\nfrom torch import nn\n"
        "class Block(nn.Module):\n    def __init__(self, width): ...\n"
        "def _hidden(num_classes): ...\n"
        "def tiny(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), "
        "nn.Linear(8, num_classes))\n"
    )
    return Path("mynet.py")


def read(file: str) -> RunFile:
    return load_run_file(Path(file))


def test_a_run_file_fits_the_data_and_says_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, flowers: Path
) -> None:
    assert call(monkeypatch, "init", "flowers") == errors.EXIT_OK
    shown = capsys.readouterr().out
    assert "class folders" in shown
    assert " min" in shown
    config = read("flowers.yaml")
    assert (config.name, config.workload["name"]) == ("flowers", "classification")
    assert config.workload["data"] == {"path": "flowers", "image_size": SIDE, "augment": "shift"}
    schema = Path("flowers.yaml").read_text().splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert Path(schema).is_file()


def test_code_of_ones_own_is_found_and_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, own_network: Path
) -> None:
    Path("flowers.yaml").write_text("mine\n")
    assert call(monkeypatch, "init", "flowers", "--model", "mynet.py") == errors.EXIT_OK
    shown = capsys.readouterr().out
    assert "secateur run flowers-2.yaml --trust" in shown
    assert "On this machine" not in shown
    assert Path("flowers.yaml").read_text() == "mine\n"
    assert read("flowers-2.yaml").workload["model"]["name"] == "mynet.py:tiny"
    assert not Path("was_run").exists()


def test_on_a_terminal_only_what_cannot_be_seen_is_asked(monkeypatch: pytest.MonkeyPatch, own_network: Path) -> None:
    answers = iter(["flowers", "n"])
    questions = []

    def answer(self: Terminal, prompt: object = "", **settings: object) -> str:
        questions.append(str(prompt))
        return next(answers)

    monkeypatch.setattr(Terminal, "is_attended", True)
    monkeypatch.setattr(Terminal, "input", answer)
    assert call(monkeypatch, "init", "--model", "mynet.py") == errors.EXIT_OK
    assert [question.split()[0] for question in questions] == ["Folder", "Have"]  # the data, and consent
    assert Path("flowers.yaml").is_file()


@pytest.mark.parametrize(("text", "said"), [("x = 1\n", "num_classes"), ("def (\n", "mynet.py")])
def test_a_file_without_a_network_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, flowers: Path, text: str, said: str
) -> None:
    Path("mynet.py").write_text(text)
    assert call(monkeypatch, "init", "flowers", "--model", "mynet.py") == errors.EXIT_USER
    assert said in capsys.readouterr().err


@given(st.integers(1, 10**7))
def test_small_data_is_passed_more_often(train: int) -> None:
    recipe = draft.recipe_for(train)
    assert draft.FEWEST_EPOCHS <= recipe.baseline <= draft.MOST_EPOCHS
    assert recipe.baseline >= draft.recipe_for(2 * train).baseline
    assert 1 <= recipe.finetune < recipe.baseline
