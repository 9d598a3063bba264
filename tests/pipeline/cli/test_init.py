"""``secateur init``: a run file that fits the data; off a terminal nothing is asked, and never is a user's code run."""

from __future__ import annotations

import shutil
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
    assert shown.count("class folders") == shown.count("carved") == shown.count("test split") == 1
    assert " min" in shown
    config = read("flowers.yaml")
    assert (config.name, config.workload["name"]) == ("flowers", "classification")
    assert config.workload["data"] == {"path": "flowers", "image_size": [SIDE, SIDE + 4], "augment": "shift"}
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


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nothing.py", "No such file"),
        ("nothing.py:build", "No such file"),
        ("mynet.py:tidy", "did you mean 'tiny'"),
        ("resnet81", "did you mean"),
        ("torchvision/resnet81", "did you mean 'torchvision/resnet18'"),
        ("timm/resnet81", "did you mean"),
        ("small_ssd", "is for detection"),
    ],
)
def test_a_name_that_nothing_has_is_refused_before_the_data_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, own_network: Path, model: str, said: str
) -> None:
    monkeypatch.setattr(draft, "look", None)
    assert call(monkeypatch, "init", "flowers", "--model", model) == errors.EXIT_USER
    assert said in capsys.readouterr().err


def test_a_name_in_ones_own_file_is_taken(monkeypatch: pytest.MonkeyPatch, own_network: Path) -> None:
    assert call(monkeypatch, "init", "flowers", "--model", "mynet.py:tiny") == errors.EXIT_OK
    assert read("flowers.yaml").workload["model"]["name"] == "mynet.py:tiny"


def test_what_is_to_be_put_right_comes_before_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, flowers: Path
) -> None:
    Path("two.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__()\n"
        "        self.a = nn.Conv2d(3, num_classes, 1)\n"
        "    def forward(self, x):\n"
        "        return self.a(x).mean((2, 3)), x\n"
        "def soft(num_classes):\n"
        "    return nn.Sequential(Net(num_classes).a, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Softmax(1))\n"
    )
    assert call(monkeypatch, "init", "flowers", "--model", "two.py", "--trust") == errors.EXIT_OK
    shown = capsys.readouterr().out
    assert "gives a tuple" in shown and "secateur validate" in shown and "secateur run" not in shown
    call(monkeypatch, "init", "flowers", "--model", "two.py:soft", "--trust")
    assert "leave the softmax out" in capsys.readouterr().out


def test_images_that_cannot_be_read_are_left_out_aloud(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, flowers: Path
) -> None:
    (flowers / "rose" / "3.png").write_bytes(b"")
    assert call(monkeypatch, "init", "flowers") == errors.EXIT_OK
    assert "1 image cannot be read and was left out: rose/3.png" in " ".join(capsys.readouterr().out.split())
    assert read("flowers.yaml").workload["data"]["damaged"] == "leave_out"


def test_a_file_that_says_nothing_by_its_name_gives_its_folders(tmp_path: Path) -> None:
    for name in ("data.yaml", "birds.csv"):
        (tmp_path / name).touch()
    names = [draft.name_for(tmp_path / name) for name in ("data.yaml", "birds.csv", ".")]
    assert names == [tmp_path.name.replace("_", "-"), "birds", tmp_path.name.replace("_", "-")]


@pytest.mark.parametrize(("kept", "said"), [(["daisy"], "one folder of it, daisy"), ([], "in no class folder")])
def test_data_that_is_nearly_class_folders_is_told_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, flowers: Path, kept: list[str], said: str
) -> None:
    for folder in ("daisy", "rose"):
        if folder not in kept:
            (flowers / folder / "0.png").rename(flowers / f"{folder}.png")
            shutil.rmtree(flowers / folder)
    assert call(monkeypatch, "init", "flowers") == errors.EXIT_USER
    assert said in " ".join(capsys.readouterr().err.split())


@given(st.integers(1, 10**7))
def test_small_data_is_passed_more_often(train: int) -> None:
    recipe = draft.recipe_for(train)
    assert draft.FEWEST_EPOCHS <= recipe.baseline <= draft.MOST_EPOCHS
    assert recipe.baseline >= draft.recipe_for(2 * train).baseline
    assert 1 <= recipe.finetune < recipe.baseline
