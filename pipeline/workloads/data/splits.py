"""Splits that follow the content of each image, and nothing else.

The digest of an image's content, read as a fraction of 1, says which split it is in: so no image moves when another one
comes, goes or is renamed, equal images are in one split, and shares are approximate. Only a class that would have no
image in a split is drawn by rank, with a note; there a change of the data can move images of that class.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from secateur.pipeline.workloads.data.notes import Tally

Indices = npt.NDArray[np.int64]
TRAIN = "train"


@dataclass
class _Content:
    """What is equal of an image: one digest, all places where it stands, every class it has there."""

    position: float
    places: list[int] = field(default_factory=list)
    classes: set[int] = field(default_factory=set)
    split: str = TRAIN


def position(content: bytes) -> float:
    """A digest as a number in 0..1, evenly distributed."""
    return int.from_bytes(content[:8], "big") / 2**64


def draw(
    contents: Sequence[bytes],
    classes: Sequence[Iterable[int]],
    shares: Mapping[str, float],
    names: Sequence[str],
    tally: Tally,
    among: Sequence[int] | None = None,
) -> dict[str, Indices]:
    """The images of every split.

    Args:
        contents: a digest of each image's content.
        classes: the classes of each image; several for a detector's.
        shares: of the splits besides ``train``, in the order they are laid out; together below 1.
        names: of the classes.
        tally: told which classes were drawn by rank, and which are too small for every split.
        among: the images that are to be split; None = all.

    Returns:
        for ``train`` and every split of ``shares`` the indices of its images, in the order of their digests.
    """
    known: dict[bytes, _Content] = {}
    for place in range(len(contents)) if among is None else among:
        content = known.setdefault(contents[place], _Content(position(contents[place])))
        content.places.append(int(place))
        content.classes.update(classes[place])
    ordered = sorted(known.values(), key=lambda content: content.position)
    for content in ordered:
        content.split = _split_of(content.position, shares)
    _see_that_every_class_is_everywhere(ordered, shares, names, tally)
    found: dict[str, list[int]] = {TRAIN: [], **{name: [] for name in shares}}
    for content in ordered:
        found[content.split] += content.places
    return {name: np.array(places, dtype=np.int64) for name, places in found.items()}


def _split_of(at: float, shares: Mapping[str, float]) -> str:
    edge = 0.0
    for name, share in shares.items():
        edge += share
        if at < edge:
            return name
    return TRAIN


def _see_that_every_class_is_everywhere(
    ordered: Sequence[_Content], shares: Mapping[str, float], names: Sequence[str], tally: Tally
) -> None:
    """Move images of classes that a split would lack, the lowest digests first; ``train`` comes first of all."""
    members: dict[int, list[_Content]] = defaultdict(list)
    for content in ordered:
        for label in content.classes:
            members[label].append(content)
    counts = {label: Counter(content.split for content in of) for label, of in members.items()}

    def move(content: _Content, split: str) -> None:
        for label in content.classes:
            counts[label][content.split] -= 1
            counts[label][split] += 1
        content.split = split

    def spare(content: _Content) -> bool:
        """Whether every class it has stays where it is now."""
        return all(counts[label][content.split] > 1 for label in content.classes)

    for label in sorted(members):
        own = members[label]
        for split, share in ((TRAIN, 1.0), *shares.items()):
            if counts[label][split] or share <= 0:
                continue
            free = [c for c in own if c.split == TRAIN and spare(c)] or [c for c in own if spare(c)][:1]
            if split == TRAIN:
                free = [c for c in own if spare(c)][-1:] or own[-1:]
            wanted = max(1, round(share * len(own))) if split != TRAIN else 1
            for content in free[:wanted]:
                if split == TRAIN or spare(content):
                    move(content, split)
            what = "would have no image in {} by its|their content and was|were drawn by rank"
            if not free:
                what = "has|have too few different images for one in {}"
            tally.add(f"class(es) {what.format(split)}", names[label])


def in_order(contents: Sequence[bytes]) -> Indices:
    """All images of a given split, in the order of their digests, which mixes the classes."""
    return np.array(sorted(range(len(contents)), key=lambda i: (contents[i], i)), dtype=np.int64)


def note_repeats(
    contents: Sequence[bytes], splits: Mapping[str, Sequence[int] | Indices], places: Sequence[str], tally: Tally
) -> None:
    """Count images that are in two given splits, byte for byte: what is measured on them is remembered, not learnt."""
    seen: dict[bytes, tuple[str, int]] = {}
    for split, indices in splits.items():
        for index in indices:
            first, at = seen.setdefault(contents[index], (split, int(index)))
            if first != split:
                tally.add(
                    f"image(s) of {split} has|have the content of one in {first}", f"{places[index]} = {places[at]}"
                )


def note_conflicts(
    contents: Sequence[bytes], classes: npt.NDArray[np.int64], names: Sequence[str], places: Sequence[str], tally: Tally
) -> None:
    """Count images that stand in two classes, byte for byte."""
    seen: dict[bytes, int] = {}
    for index, (content, label) in enumerate(zip(contents, classes.tolist(), strict=True)):
        first = seen.setdefault(content, label)
        if first != label:
            pair = f"{places[index]} ({names[first]} and {names[label]})"
            tally.add("image(s) stands|stand in more than one class with the same content", pair)


def shares_of(test: float | None, search: float | None) -> dict[str, float]:
    """Shares of all images.

    Args:
        test: share of all images; None = the test split is given.
        search: share of what is not the test's; None = the search split is given.
    """
    found = {} if test is None else {"test": test}
    return found if search is None else {**found, "search": (1 - (test or 0.0)) * search}
