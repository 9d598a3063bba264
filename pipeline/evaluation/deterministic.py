"""A forward pass whose outputs depend on the network, the plan and the images alone: the same bits in every process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from secateur.export.errors import TemplateError
from secateur.pipeline.evaluation.inference import (
    BLOCKS,
    CHECK_IMAGES,
    CHUNKS,
    TOLERANCE,
    BackendTrial,
    ForwardError,
    ForwardFn,
    Inference,
    State,
    first_line,
)
from secateur.pruning.masked_batch import MaskedBatchError
from secateur.pruning.plan import PruningPlan
from secateur.pruning.surgery import compare_outputs

BackendName = Literal["onnx", "plain"]


class DeterministicInference(Inference):
    """Outputs that depend on the network, the plan and the images alone.

    ``Inference`` goes by the clock (which backend is fastest, and from when on) and by what it has seen (candidates
    that differ in one group); each of its backends has last bits of its own. Here the backend is chosen once, by a
    check that has no clock in it, and no candidate profits from another: so it does not matter who computes which
    candidate, and in which order. ONNX Runtime computes chunks of a fixed size on one thread each, so the number of
    threads does not matter either. A candidate for which that backend fails is tried once more and then is an error:
    another forward pass would have other last bits, and nobody would know.

    Args:
        backend: as another process found it with the same network; None = find it.
    """

    def __init__(self, *arguments: object, backend: BackendName | None = None, **options: object) -> None:
        super().__init__(*arguments, **options, patience_s=0.0)  # type: ignore[arg-type]
        self._backend = backend

    @property
    def backend(self) -> BackendName:
        """ONNX Runtime where it computes what the plain network does, else plain PyTorch."""
        if not self.trials:
            self._try_backends()
        return "onnx" if self._exact == self._onnx else "plain"

    def _try_backends(self) -> None:
        self._block, self._chunk = BLOCKS[0], CHUNKS[0]
        reason = "" if self.compute.type == "cpu" and self._backend != "plain" else "not asked for"
        error = math.nan
        if not reason:
            try:
                self._template = self._open_template()
                if self._backend is None:
                    plan, images = self._random_plan(np.random.default_rng(0)), next(iter(self.images()))[:CHECK_IMAGES]
                    found, expected = (self._result(backend, plan, images) for backend in (self._onnx, self._plain))
                    certificate = compare_outputs(found, expected, TOLERANCE)
                    reason, error = certificate.reason, certificate.max_relative_error
                elif self._template is None:
                    raise TemplateError("the network's template was not handed over")
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as failure:
                if self._backend is not None:
                    raise
                reason = first_line(failure)
        name = f"ONNX Runtime, blocks of {self._block} channels, {self._chunk} images at once"
        tried = BackendTrial(name, math.nan, error, reason=reason)
        self.trials = (tried, BackendTrial("PyTorch", math.nan, 0.0)) if reason else (tried,)
        self._fast = self._exact = self._plain if reason else self._onnx
        if reason:
            self._template = None

    def _instead(self, plan: PruningPlan, state: State | None, failure: Exception) -> ForwardFn:
        """The same backend once more; what fails twice is an error, never another forward pass."""
        del failure  # it is shown if it comes again

        def failed(error: Exception) -> ForwardError:
            return ForwardError(
                f"{self.used} failed twice for {plan.digest}: {first_line(error)}. A deterministic search takes no "
                "other forward pass for one candidate: resume to try again, with more free memory or fewer threads; if "
                "that does not help, start a run with search.forward: auto and no workers"
            )

        try:
            run = self._fast(plan, state)
        except Exception as error:
            raise failed(error) from error

        def again(number: int, images: Tensor) -> object:
            try:
                return run(number, images)
            except Exception as error:
                raise failed(error) from error

        return again

    def under_masks(self, plans: Sequence[PruningPlan], state: State | None, images: Tensor) -> Iterator[Any]:
        """Every plan goes through by itself, so that no other decides its last bits.

        Raises:
            MaskedBatchError: always.
        """
        raise MaskedBatchError("every plan goes through by itself")

    def _from_branch(
        self, plan: PruningPlan, base: str, state: State | None, training: Sequence[Tensor]
    ) -> ForwardFn | None:
        return None
