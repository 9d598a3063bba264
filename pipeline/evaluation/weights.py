"""Weights by name: what ``Candidate.base`` refers to, in memory as far as it fits and in files always.

``DENSE`` is the trained baseline, ``RANDOM`` the network with fresh weights; every fine-tuning and every ``Learn``
request adds a base. A base is kept as one safetensors file and loaded again when it was pushed out of memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.files import sha256_of
from pipeline.training import auxiliary as learning
from pipeline.training.loop import load_weights, save_weights
from pruning.channels import ChannelGraph
from pruning.plan import PruningPlan
from pruning.search.protocol import DENSE, RANDOM
from pruning.surgery import scatter

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Origin:
    """How a base's file is turned into weights.

    Args:
        file: the safetensors file.
        plan: the file holds a pruned network of this plan; None = dense shapes, or what ``kind`` makes of it.
        kind: the kind of learning whose ``weights`` makes dense-shaped weights for each plan; "" = none.
    """

    file: Path
    plan: PruningPlan | None = None
    kind: str = ""


class Bases:
    """The weights of one run.

    Args:
        model: the baseline, on the compute device.
        graph: its channel groups.
        fresh: makes the network with random weights.
        folder: for the files.
        device: where weights are kept while in use.
        memory_bytes: of loaded weights; the least recently used ones are dropped beyond it.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        fresh: Callable[[], nn.Module],
        folder: Path,
        device: torch.device,
        memory_bytes: int = 1 << 30,
    ) -> None:
        self.model, self.graph, self.fresh, self.folder, self.device = model, graph, fresh, folder, device
        self.memory_bytes = memory_bytes
        self._origins: dict[str, Origin] = {}
        self._loaded: OrderedDict[str, State] = OrderedDict()

    def state(self, base: str, plan: PruningPlan) -> State | None:
        """Dense-shaped weights to cut ``plan`` from; None = the baseline's own."""
        if base == DENSE:
            return None
        loaded = self._load(base)
        kind = "" if base == RANDOM else self._origins[base].kind
        if not kind:
            return loaded
        made: State = learning.TRAININGS.load(kind).weights(self.model, self.graph, loaded, plan)
        return made

    def is_supernet(self, base: str) -> bool:
        """Whether the weights depend on the plan, so that batch-norm statistics must be taken anew for each."""
        return base in self._origins and bool(self._origins[base].kind)

    def path(self, base: str) -> Path:
        """The file of a base."""
        return self.folder / f"{base}.safetensors"

    def tuned(self, base: str, parent: str, plan: PruningPlan, state: State, write_back: bool) -> str:
        """Keep a fine-tuned network's weights; returns the file's sha256.

        With ``write_back`` they are put into the weights of ``parent``, so that the base has every channel.
        """
        if not write_back:
            digest = save_weights(self.path(base), dict(state))
            return self._know(base, Origin(self.path(base), plan), digest)
        parent_state = self.state(parent, plan)
        dense = scatter(self.model, self.graph, plan, state, parent_state)
        digest = save_weights(self.path(base), dense)
        return self._know(base, Origin(self.path(base)), digest)

    def learned(self, base: str, kind: str, state: State) -> str:
        """Keep what a kind of learning left; returns the file's sha256."""
        digest = save_weights(self.path(base), dict(state))
        return self._know(base, self._learned(base, kind), digest)

    def restore_tuned(self, base: str, plan: PruningPlan, write_back: bool, checkpoint: Mapping[str, str]) -> bool:
        """Know a base of an earlier process again; False if its file is gone or altered."""
        return self._restore(base, Origin(self.path(base), None if write_back else plan), checkpoint)

    def restore_learned(self, base: str, kind: str, checkpoint: Mapping[str, str]) -> bool:
        """The same, for a base of a ``Learn`` request."""
        return self._restore(base, self._learned(base, kind), checkpoint)

    def _learned(self, base: str, kind: str) -> Origin:
        depends = hasattr(learning.TRAININGS.load(kind), "weights")
        return Origin(self.path(base), kind=kind if depends else "")

    def _restore(self, base: str, origin: Origin, checkpoint: Mapping[str, str]) -> bool:
        if not checkpoint:  # the training failed; nothing was saved, nothing is needed
            return True
        if not origin.file.is_file() or sha256_of(origin.file) != checkpoint["sha256"]:
            return False
        self._know(base, origin, checkpoint["sha256"])
        return True

    def _know(self, base: str, origin: Origin, digest: str) -> str:
        self._origins[base] = origin
        self._loaded.pop(base, None)
        return digest

    def _load(self, base: str) -> State:
        if base not in self._loaded:
            self._loaded[base] = {name: t.to(self.device) for name, t in self._read(base).items()}
            sizes = {
                name: sum(t.numel() * t.element_size() for t in state.values()) for name, state in self._loaded.items()
            }
            while len(self._loaded) > 1 and sum(sizes.values()) > self.memory_bytes:
                sizes.pop(self._loaded.popitem(last=False)[0])
        self._loaded.move_to_end(base)
        return self._loaded[base]

    def _read(self, base: str) -> State:
        if base == RANDOM:
            return self.fresh().state_dict()
        origin = self._origins[base]
        state = load_weights(origin.file)
        if origin.plan is None:
            return state
        moved = {name: tensor.to(self.device) for name, tensor in state.items()}
        return scatter(self.model, self.graph, origin.plan, moved)
