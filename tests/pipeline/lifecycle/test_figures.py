"""Figures of kept models follow from which images are answered rightly, and files of strangers are read with bounds."""

from __future__ import annotations

import zlib
from base64 import b85encode
from pathlib import Path

import numpy as np
import pytest
import torch

from secateur.pipeline.errors import UserError
from secateur.pipeline.lifecycle import figures
from secateur.pipeline.lifecycle.figures import Answers, of_right_answers, packed, unpacked
from secateur.pipeline.lifecycle.results import hypervolume


def test_a_drop_has_the_interval_of_paired_images() -> None:
    base, compact = np.ones(100, dtype=bool), np.ones(100, dtype=bool)
    base[:10], compact[5:20] = False, False
    found = of_right_answers("top1", {"base": packed(base), "compact": packed(compact)}, 100, frozenset(range(5)), {})
    assert found.accuracy == {"base": 0.9, "compact": 0.85}
    assert found.drop_pp == pytest.approx(5.0)
    differences = np.array([-1.0] * 5 + [1.0] * 10 + [0.0] * 85)
    half = 196 * differences.std(ddof=1) / 10
    assert (found.drop_low_pp, found.drop_high_pp) == (pytest.approx(5 - half), pytest.approx(5 + half))
    assert found.original_images == 95 and found.original_pixels["base"] == pytest.approx(90 / 95)


def test_answers_are_open_where_the_two_best_are_nearly_equal() -> None:
    answers = torch.tensor([[9.0, 1.0], [5.0, 5.0005], [5.0, 5.01]])
    assert Answers(answers, torch.tensor([0, 0, 0])).open_images.tolist() == [False, True, False]


@pytest.mark.parametrize("text", ["", "no base85 \\", b85encode(b"no zlib").decode()])
def test_damaged_answers_are_told(text: str) -> None:
    with pytest.raises(UserError, match="right answers"):
        unpacked(text, 100)


def test_answers_that_unpack_to_more_are_not_unpacked() -> None:
    bomb = b85encode(zlib.compress(bytes(50_000_000), 9)).decode()
    with pytest.raises(UserError, match="not those of 100 images"):
        unpacked(bomb, 100)


@pytest.mark.parametrize(
    ("front", "area"),
    [
        ([], 0.0),
        ([(1.0, 0.0)], 1.0),
        ([(0.5, 0.5)], 0.25),
        ([(0.9, 0.6), (0.5, 0.2), (0.4, 0.5)], 0.5 * 0.4 + 0.9 * 0.4),
    ],
)
def test_the_hypervolume_is_the_area_below_the_front(front: list[tuple[float, float]], area: float) -> None:
    assert hypervolume(front) == pytest.approx(area)


def test_weights_in_a_file_that_is_none_are_told(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\x80\x04cposix\nsystem\n.")
    with pytest.raises(UserError, match="cannot read the weights"):
        figures.read_weights(file)
    with file.open("wb") as opened:
        opened.truncate(figures.MOST_BYTES + 1)
    with pytest.raises(UserError, match="has more than"):
        figures.read_weights(file)
