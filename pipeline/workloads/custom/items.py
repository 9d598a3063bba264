"""The data of a task of one's own, and its splits: the search split is carved here, whole groups at a time."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
import torch

from secateur.device_profiles.wording import number_of
from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads import Split
from secateur.pipeline.workloads.custom.calls import kind
from secateur.pipeline.workloads.custom.task import OwnCode
from secateur.pipeline.workloads.data import splits
from secateur.pipeline.workloads.data.decode import Pixels
from secateur.pipeline.workloads.data.notes import Tally, some
from secateur.pipeline.workloads.data.seeds import seeded
from secateur.pipeline.workloads.data.sources import ImageSource


class Items:
    """Items (input, target) of one data set of a task, read when needed.

    Args:
        code: the task's.
        split: ``train`` or ``test``, as the task calls it.
        named: the task's own name of its data's content; None = every item is read, once.

    Raises:
        UserError: it is no data set of (input, target), or groups are not given for every item.
    """

    def __init__(self, code: OwnCode, split: Literal["train", "test"], named: str | None) -> None:
        self.split, self._code = split, code
        self.dataset: Any = code.ask("data", split)
        try:
            self.num = len(self.dataset)
            self.dataset.__getitem__  # noqa: B018
        except (TypeError, AttributeError) as error:
            raise UserError(
                f"{code.of('data')}({split!r}) returned {kind(self.dataset)}, which has no length or no items; "
                "return a torch.utils.data.Dataset with __len__ and __getitem__"
            ) from error
        if not self.num:
            raise UserError(f"{code.of('data')}({split!r}) is empty")
        self.places = [f"{split} item {index}" for index in range(self.num)]
        self.sizes: Counter[tuple[int, int]] = Counter()
        if named is None:
            self.contents = [self._content(index) for index in range(self.num)]
        else:
            self.contents = [hashlib.sha256(f"{named} {place}".encode()).digest() for place in self.places]
        self.labels = np.zeros(self.num, dtype=np.int64)
        self.groups = self._groups()

    def __len__(self) -> int:
        return self.num

    def read(self, indices: Any) -> Pixels:
        """Nobody reads items without their targets."""
        raise NotImplementedError

    def items(self, indices: Sequence[int], seeds: Sequence[int] | None = None) -> list[tuple[Any, Any]]:
        """Items as the data set gives them; augmented, each by its own seed, where there are seeds.

        Raises:
            UserError: the task's code fails, or an item is no pair of input and target.
        """
        found = []
        for position, index in enumerate(indices):
            item = self._code.attempt(f"data({self.split!r})[{index}]", self.dataset.__getitem__, index)
            if not isinstance(item, tuple | list) or len(item) != 2:
                raise UserError(
                    f"{self._code.of('data')}({self.split!r})[{index}] is {kind(item)}; return (input, target)"
                )
            if seeds is not None:
                with seeded(seeds[position]):
                    item = self._code.ask("augment", *item)
            found.append(tuple(item))
        return found

    def _content(self, index: int) -> bytes:
        """A digest of an item; its size is counted."""
        inputs, targets = self._code.collated(self.items([index]))
        self.sizes[inputs.shape[3], inputs.shape[2]] += 1
        digest = hashlib.sha256(f"{inputs.dtype} {inputs.shape} {targets.dtype} {targets.shape}".encode())
        for tensor in (inputs, targets):
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
        return digest.digest()

    def _groups(self) -> list[bytes]:
        """A digest of every item's group; of its content, where there are no groups."""
        if not self._code.has("groups"):
            return self.contents
        given = list(self._code.ask("groups", self.split))
        if len(given) != self.num:
            raise UserError(
                f"{self._code.of('groups')}({self.split!r}) has {number_of(len(given), 'entry|entries')} for "
                f"{number_of(self.num, 'item(s)')}; "
                "give one for every item, in their order"
            )
        return [hashlib.sha256(repr(group).encode()).digest() for group in given]


def carve(train: Items, test: Items, share: float) -> tuple[Split, Split, Split, tuple[str, ...]]:
    """(train, search, test, notes): the search split is drawn from the training items, whole groups at a time.

    Raises:
        UserError: a group is in the training and the test data, or there is only one in the training data.
    """
    both = set(train.groups) & set(test.groups)
    torn = [train.places[i] for i, group in enumerate(train.groups) if group in both]
    if torn and train.groups is not train.contents:
        raise UserError(
            f"{number_of(len(both), 'group(s) is|are')} in the training and in the test data ({some(torn)}), so "
            "the test would not be "
            'of anything new; have data("train") and data("test") share no group'
        )
    if len(set(train.groups)) < 2:
        raise UserError(
            "all training items are equal or of one group, so none can be held out for the search; give at least two"
        )
    tally, one = Tally(), [(0,)] * len(train)
    drawn = splits.draw(train.groups, one, splits.shares_of(None, share), ("item",), Tally())
    parts = {"test": np.arange(len(test)), **drawn}
    mixed = {
        name: np.array(sorted(places, key=lambda i, of=source.contents: (of[i], i)), dtype=np.int64)  # type: ignore[misc]
        for name, places in parts.items()
        for source in [test if name == "test" else train]
    }
    contents, places = [*train.contents, *test.contents], [*train.places, *test.places]
    shifted = {**drawn, "test": parts["test"] + len(train)}
    splits.note_repeats(contents, shifted, places, tally)
    of = {name: Split(cast(ImageSource, test if name == "test" else train), indices) for name, indices in mixed.items()}
    return of["train"], of["search"], of["test"], tally.notes()
