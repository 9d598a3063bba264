"""Words for people."""

from __future__ import annotations

import pytest

from secateur.device_profiles.wording import number_of


@pytest.mark.parametrize(
    ("num", "what", "said"),
    [
        (1, "evaluation(s)", "1 evaluation"),
        (0, "class(es)", "0 classes"),
        (1200, "entry|entries", "1,200 entries"),
        (1, "image(s) is|are turned by its|their tag", "1 image is turned by its tag"),
        (2, "image(s) is|are turned by its|their tag", "2 images are turned by their tag"),
        (1.0, "epoch(s)", "1 epoch"),
        (0.5, "epoch(s)", "0.5 epochs"),
    ],
)
def test_words_follow_their_number(num: float, what: str, said: str) -> None:
    assert number_of(num, what) == said
