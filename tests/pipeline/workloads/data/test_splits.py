"""Splits by content: nothing moves when other images come or go, equal images stay together, no class is lost."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from secateur.pipeline.workloads.data.notes import Tally
from secateur.pipeline.workloads.data.splits import draw, in_order, note_conflicts, note_repeats, shares_of


def contents(*names: object) -> list[bytes]:
    return [hashlib.sha256(str(name).encode()).digest() for name in names]


def drawn(
    names: list[object], labels: list[int], test: float | None = 0.2, search: float | None = 0.1
) -> dict[object, str]:
    """Name -> split; names must differ."""
    classes = [(label,) for label in labels]
    parts = draw(contents(*names), classes, shares_of(test, search), [str(i) for i in range(max(labels) + 1)], Tally())
    return {names[i]: split for split, indices in parts.items() for i in indices.tolist()}


@given(st.integers(200, 400), st.lists(st.integers(0, 399), max_size=40), st.integers(1, 3))
def test_no_image_moves_when_others_go_or_come(num: int, gone: list[int], num_classes: int) -> None:
    labels = [i % num_classes for i in range(num)]
    before = drawn(list(range(num)), labels)
    left = [i for i in range(num) if i not in gone]
    after = drawn(list(left), [labels[i] for i in left])
    assert all(before[name] == split for name, split in after.items())


def test_shares_are_about_what_is_asked_for() -> None:
    found = list(drawn(list(range(20_000)), [0] * 20_000).values())
    assert abs(found.count("test") / 20_000 - 0.2) < 0.015
    assert abs(found.count("search") / 20_000 - 0.08) < 0.01


@given(st.lists(st.integers(0, 30), min_size=60, max_size=200))
def test_equal_images_are_in_one_split(names: list[int]) -> None:
    labels = [(0,)] * len(names)
    parts = draw(contents(*names), labels, shares_of(0.3, 0.3), ["a"], Tally())
    where = [{names[i] for i in indices} for indices in parts.values()]
    assert sum(map(len, where)) == len(set(names))
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(names)))


@given(st.lists(st.integers(3, 9), min_size=2, max_size=6))
def test_every_class_with_three_images_is_in_every_split(sizes: list[int]) -> None:
    names = [f"{label}-{i}" for label, size in enumerate(sizes) for i in range(size)]
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    found = drawn(list(names), labels)
    for label, size in enumerate(sizes):
        own = {found[f"{label}-{i}"] for i in range(size)}
        assert own == {"train", "search", "test"}


def test_a_class_drawn_by_rank_is_noted_and_so_is_one_that_is_too_small() -> None:
    tally = Tally()
    names = [*(f"a{i}" for i in range(60)), "b0", "b1", "b2", "c0"]
    labels = [(0,)] * 60 + [(1,)] * 3 + [(2,)]
    parts = draw(contents(*names), labels, shares_of(0.2, 0.1), ["a", "b", "c"], tally)
    assert 63 in parts["train"]
    notes = " | ".join(tally.notes())
    assert "by its content and was drawn by rank: b" in notes
    assert "too few different images for one in test: c" in notes


def test_an_image_of_several_classes_leaves_none_of_them_untrained() -> None:
    parts = draw(contents("x", "y", "z"), [(0, 1), (1,), (0, 1)], shares_of(0.4, 0.3), ["a", "b"], Tally())
    trained = {label for i in parts["train"] for label in [(0, 1), (1,), (0, 1)][i]}
    assert trained == {0, 1}


def test_the_order_mixes_classes_and_depends_on_content_alone() -> None:
    names = contents(*range(100))
    assert in_order(names).tolist() == sorted(range(100), key=lambda i: names[i])
    order = drawn(list(range(100)), [0] * 50 + [1] * 50, None, 0.2)
    first = [name for name, split in order.items() if split == "train"][:20]
    assert 4 < sum(int(str(name)) < 50 for name in first) < 16


def test_equal_content_in_two_given_splits_and_classes_is_counted_and_named() -> None:
    tally = Tally()
    same = contents("x", "y", "x", "z", "y")
    note_repeats(same, {"train": [0, 1], "test": [2, 3, 4]}, [f"{i}.png" for i in range(5)], tally)
    note_conflicts(same, np.array([0, 1, 1, 0, 1]), ["cat", "dog"], [f"{i}.png" for i in range(5)], tally)
    assert tally.notes() == (
        "2 images of test have the content of one in train: 2.png = 0.png, 4.png = 1.png",
        "1 image stands in more than one class with the same content: 2.png (cat and dog)",
    )
