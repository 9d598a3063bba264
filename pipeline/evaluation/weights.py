"""Weights by name: what ``Candidate.base`` refers to, in memory as far as it fits and in files always.

``DENSE`` is the trained baseline, ``RANDOM`` the network with fresh weights; every fine-tuning and every auxiliary
training adds a checkpoint under a name of its own. It is loaded again when it was pushed out of memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.pipeline.evaluation.baseline import Baseline
from secateur.pipeline.files import sha256_of
from secateur.pipeline.training import auxiliary
from secateur.pipeline.training.checkpoints import load_weights, save_weights
from secateur.pruning.plan import PruningPlan
from secateur.pruning.search.protocol import DENSE, RANDOM
from secateur.pruning.surgery import scatter

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights, and how it is turned into weights: what any process needs to use it.

    Args:
        sha256: of the file.
        path: the safetensors file.
        plan: the file holds a pruned network of this plan; None = dense shapes, or what ``training`` makes of it.
        training: the auxiliary training that left it; "" = fine-tuning did.
    """

    sha256: str
    path: Path
    plan: PruningPlan | None = None
    training: str = ""

    @property
    def is_supernet(self) -> bool:
        """Whether the weights depend on the plan that is cut from them."""
        return bool(self.training) and hasattr(auxiliary.TRAININGS.load(self.training), "weights")

    def to_json(self) -> dict[str, Any]:
        plan = None if self.plan is None else self.plan.to_json()
        return {"sha256": self.sha256, "path": str(self.path), "plan": plan, "training": self.training}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], path: Path) -> Checkpoint:
        """The inverse of ``to_json``, with the file where this process has it."""
        plan = None if data["plan"] is None else PruningPlan.from_json(data["plan"])
        return cls(data["sha256"], path, plan, data["training"])


class Weights:
    """The weights of one run.

    Args:
        baseline: the unpruned network that has the weights ``DENSE``.
        folder: for the files.
        memory_bytes: of loaded weights; the least recently used ones are dropped beyond it.
    """

    def __init__(self, baseline: Baseline, folder: Path, memory_bytes: int = 1 << 30) -> None:
        self.baseline, self.folder, self.memory_bytes = baseline, folder, memory_bytes
        self.checkpoints: dict[str, Checkpoint] = {}
        self._loaded: OrderedDict[str, State] = OrderedDict()

    def state(self, base: str, plan: PruningPlan) -> State | None:
        """Dense-shaped weights to cut ``plan`` from; None = the baseline's own."""
        if base == DENSE:
            return None
        loaded = self._load(base)
        if not self.is_supernet(base):
            return loaded
        training = auxiliary.TRAININGS.load(self.checkpoints[base].training)
        made: State = training.weights(self.baseline.model, self.baseline.graph, loaded, plan)
        return made

    def network(self, plan: PruningPlan, base: str = DENSE) -> nn.Module:
        """The pruned network with weights cut from ``base``, on the compute device, in eval mode."""
        return self.baseline.cut(plan, self.state(base, plan))

    def is_supernet(self, base: str) -> bool:
        """Whether the weights depend on the plan, so that batch-norm statistics must be taken anew for each."""
        return base in self.checkpoints and self.checkpoints[base].is_supernet

    def is_trained(self, base: str, plan: PruningPlan) -> bool:
        """Whether fine-tuning ended with just this network, whose batch-norm statistics are its own then."""
        return base in self.checkpoints and self.checkpoints[base].plan == plan

    def path(self, base: str) -> Path:
        """The file of a checkpoint that this process writes."""
        return self.folder / f"{base}.safetensors"

    def save_tuned(self, base: str, parent: str, plan: PruningPlan, state: State, write_back: bool) -> str:
        """Keep a fine-tuned network's weights; returns the file's sha256.

        With ``write_back`` they are put into the weights of ``parent``, so that every channel is there.
        """
        if write_back:
            state = scatter(self.baseline.model, self.baseline.graph, plan, state, self.state(parent, plan))
        return self._save(base, state, None if write_back else plan)

    def save_learned(self, base: str, training: str, state: State) -> str:
        """Keep what an auxiliary training left; returns the file's sha256."""
        return self._save(base, state, training=training)

    def restore(self, base: str, checkpoint: Checkpoint) -> bool:
        """Know the weights of an earlier or another process; False if their file is gone or altered."""
        if not checkpoint.path.is_file() or sha256_of(checkpoint.path) != checkpoint.sha256:
            return False
        self._know(base, checkpoint)
        return True

    def _save(self, base: str, state: State, plan: PruningPlan | None = None, training: str = "") -> str:
        digest = save_weights(self.path(base), dict(state))
        self._know(base, Checkpoint(digest, self.path(base), plan, training))
        return digest

    def _know(self, base: str, checkpoint: Checkpoint) -> None:
        self.checkpoints[base] = checkpoint
        self._loaded.pop(base, None)

    def _load(self, base: str) -> State:
        if base not in self._loaded:
            self._loaded[base] = {name: t.to(self.baseline.compute) for name, t in self._read(base).items()}
            sizes = {
                name: sum(t.numel() * t.element_size() for t in state.values()) for name, state in self._loaded.items()
            }
            while len(self._loaded) > 1 and sum(sizes.values()) > self.memory_bytes:
                sizes.pop(self._loaded.popitem(last=False)[0])
        self._loaded.move_to_end(base)
        return self._loaded[base]

    def _read(self, base: str) -> State:
        if base == RANDOM:
            return self.baseline.fresh().state_dict()
        checkpoint = self.checkpoints[base]
        state = load_weights(checkpoint.path)
        if checkpoint.plan is None:
            return state
        moved = {name: tensor.to(self.baseline.compute) for name, tensor in state.items()}
        return scatter(self.baseline.model, self.baseline.graph, checkpoint.plan, moved)
