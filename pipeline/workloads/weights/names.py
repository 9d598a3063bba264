"""Which tensors of a file are a network's: wrappers and prefixes of names are seen through, copies are told apart.

What ``torch.save`` is given differs from trainer to trainer: a state dict, or ``{"model": ..., "epoch": 3}``; names
with ``module.`` (DataParallel), ``_orig_mod.`` (torch.compile), ``model.`` (Lightning); an averaged copy beside the
trained one. Here all of these are one thing: tensors with dotted names, of which those after some prefix are the
network's. Nothing here reads files, and no values are looked at.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from secateur.device_profiles.wording import number_of, printable
from secateur.pipeline.workloads.data.notes import some
from secateur.pipeline.workloads.weights.tensors import kind_fault

DEPTH = 6
"""Levels of mappings within mappings that are looked through."""
INSERTED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Parts of names that torch.compile, FSDP and activation checkpointing put anywhere into them."""
COUNTER = "num_batches_tracked"
AVERAGED = re.compile(r"(?<![a-z])(ema|swa|averaged?|average_model|polyak|shadow)(?![a-z])", re.IGNORECASE)
"""Words for the averaged copy of the weights."""
OPTIMIZER = re.compile(r"optim|momentum|exp_avg|grad|sched|scaler", re.IGNORECASE)
"""Words for tensors of a training that look like weights by name and shape, and are none."""
USUAL = {"state", "dict", "model", "models", "module", "net", "network", "weights", "params", "parameters", "best", "0"}
"""Words that wrappers and prefixes are made of; other words mean another network (a teacher, say)."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a file.

    Args:
        tensor: itself.
        home: dotted path of the mapping that it is in directly; empty for the outermost.
    """

    tensor: Tensor
    home: str


@dataclass(frozen=True)
class Copy:
    """Tensors of a file that may be a network's.

    Args:
        prefix: what their names begin with in the file (``model.module.``): the names of mappings and of modules.
        tensors: the network's name -> tensor; also names of these mappings that the network does not have.
        faults: one line for each name that is missing, or is not the network's, or is of another shape or kind.
        beside: names of other tensors in the same mappings, which belong to none of the network's modules.
    """

    prefix: str
    tensors: Mapping[str, Tensor]
    faults: tuple[str, ...]
    beside: tuple[str, ...]

    @property
    def averaged(self) -> bool:
        """Whether it is the averaged copy (EMA, SWA)."""
        return AVERAGED.search(self.prefix) is not None

    @property
    def rank(self) -> int:
        """0 = averaged, 1 = trained, 2 = of something with another name."""
        if self.averaged:
            return 0
        return 1 if set(re.split(r"[._]+", self.prefix.lower().strip("._"))) <= {*USUAL, ""} else 2

    @property
    def title(self) -> str:
        """What a message calls it."""
        return f"those under {self.prefix.rstrip('.')!r}" if self.prefix else "those at its top"


def flattened(content: object) -> dict[str, Entry]:
    """Every tensor by its dotted name through nested mappings and lists; what has no text as its key is left out.

    Raises:
        ValueError: two tensors have the same name.
    """
    found = list(_walk(content, "", DEPTH))
    for insertion in INSERTED:
        shorter = [(name.replace(insertion, ""), entry) for name, entry in found]
        if len({name for name, _ in shorter}) == len(found):
            found = shorter
    result: dict[str, Entry] = {}
    for name, entry in found:
        if name in result:
            raise ValueError(f"two of its tensors are named {name!r}")
        result[name] = entry
    return result


def copies(entries: Mapping[str, Entry], own: Mapping[str, Tensor], spare: tuple[str, ...] = ()) -> list[Copy]:
    """What in a file may be a network's tensors, best first: fewest faults, then averaged ones before trained ones.

    Args:
        entries: the file's tensors.
        own: the network's state dict.
        spare: beginnings of names that need not be there, or fit.
    """
    required = {name for name in own if not name.endswith(COUNTER) and not name.startswith(spare)}
    counts: Counter[str] = Counter()
    for name in entries:
        counts.update(prefix for prefix in _prefixes(name) if name[len(prefix) :] in required)
    likely = {prefix: n for prefix, n in counts.items() if not OPTIMIZER.search(prefix)}
    most = max(likely.values(), default=0)
    found = [_copy(entries, own, spare, required, prefix) for prefix, n in likely.items() if n == most]
    return sorted(found, key=lambda c: (len(c.faults), c.rank, len(c.prefix), c.prefix))


def faults_of(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], spare: tuple[str, ...] = ()) -> list[str]:
    """One line for each name that is missing, not the network's, or of another shape or kind; counters may be missing.

    Args:
        tensors: of a file, by the network's names.
        own, spare: as for ``copies``.
    """
    needed = [name for name in own if not name.startswith(spare)]
    foreign = [name for name in tensors if name not in own and not name.startswith(spare)]
    faults = [f"{name}: not in the file" for name in needed if name not in tensors and not name.endswith(COUNTER)]
    faults += [f"{printable(name)}: not in the network" for name in foreign if not name.endswith(COUNTER)]
    here = [name for name in needed if name in tensors]
    return faults + [f"{name}: {fault}" for name in here if (fault := kind_fault(tensors[name], own[name]))]


def alternatives(ordered: Sequence[Copy]) -> list[Copy]:
    """Copies that are as good as the first one by faults, and are not."""
    return [copy for copy in ordered[1:] if len(copy.faults) == len(ordered[0].faults)]


def notes(ordered: Sequence[Copy]) -> list[str]:
    """What a user should know of the choice: other copies, and tensors that are no part of it."""
    chosen, others = ordered[0], alternatives(ordered)
    lines = []
    if others:
        which = "the averaged weights, " if chosen.averaged else ""
        lines.append(f"{which}{chosen.title}, were read, not {' or '.join(other.title for other in others)}")
    taken = tuple(other.prefix for other in others if other.prefix)
    beside = [name for name in chosen.beside if not name.startswith(taken) and not name.endswith("n_averaged")]
    if beside:
        lines.append(f"{number_of(len(beside), 'other tensor(s) of the file was|were not read')}: {some(beside)}")
    return lines


def _walk(content: object, path: str, depth: int) -> Iterator[tuple[str, Entry]]:
    if isinstance(content, Mapping):
        items: list[tuple[Any, Any]] = list(content.items())
    elif isinstance(content, list | tuple):
        items = [(str(i), value) for i, value in enumerate(content)]
    else:
        return
    for key, value in items:
        if not isinstance(key, str):
            continue
        if isinstance(value, Tensor):
            yield path + key, Entry(value, path)
        elif depth > 1:
            yield from _walk(value, f"{path}{key}.", depth - 1)


def _prefixes(name: str) -> Iterator[str]:
    yield ""
    for dot in re.finditer(r"\.", name):
        yield name[: dot.end()]


def _copy(
    entries: Mapping[str, Entry], own: Mapping[str, Tensor], spare: tuple[str, ...], required: set[str], prefix: str
) -> Copy:
    under = {name[len(prefix) :]: entry for name, entry in entries.items() if name.startswith(prefix)}
    homes = {entry.home for name, entry in under.items() if name in required}
    tensors = {name: entry.tensor for name, entry in under.items() if name in own or entry.home in homes}
    beside = [n for n, entry in entries.items() if entry.home in homes and not n.startswith(prefix)]
    return Copy(prefix, tensors, tuple(faults_of(tensors, own, spare)), tuple(beside))
