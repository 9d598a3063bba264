"""What channels do: saliencies, losses of masked networks, and how much the next layers change without them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.pipeline.errors import UserError
from secateur.pipeline.evaluation.accuracy import AccuracyEvaluator
from secateur.pipeline.evaluation.inference import MASKED_IMAGES
from secateur.pruning.distortion import distortions
from secateur.pruning.feature_maps import feature_distance
from secateur.pruning.masked_batch import MaskedBatchError
from secateur.pruning.saliency import CRITERIA, channel_saliency
from secateur.pruning.search.identity import draws_of
from secateur.pruning.search.protocol import Distort, MaskedLoss, Score
from secateur.pruning.weights import silence


class SaliencyScorer:
    """Scores channels of one baseline network.

    Args:
        accuracy: has the network, its weights, and the forward pass that losses come from.
    """

    def __init__(self, accuracy: AccuracyEvaluator) -> None:
        self.accuracy, self.baseline, self.weights = accuracy, accuracy.baseline, accuracy.weights
        self.images_forwarded = 0
        self.image_macs = 0

    def score(self, request: Score) -> Mapping[str, np.ndarray]:
        """Saliency of every channel of every group, or the distances between them.

        Raises:
            UserError: there is no such criterion, or it does not take these options.
        """
        graph, plan = self.baseline.graph, request.plan or self.baseline.full
        dense = self.weights.network(self.baseline.full, request.base)
        silence(dense, graph, plan)
        try:
            if request.criterion == "feature_distance":
                options: dict[str, Any] = {**request.options}
                batches = self._train_batches(request, int(options.pop("images", 200)), passes=1)
                scores = feature_distance(dense, graph, [images for images, _ in batches], **options)
            else:
                criterion = CRITERIA.get(request.criterion)
                passes = 3 if criterion is not None and criterion.gradients else 0
                batches = self._train_batches(request, int(request.options.get("images", 128)), passes=passes)
                scores = channel_saliency(
                    dense,
                    graph,
                    request.criterion,
                    self.baseline.seed,
                    batches=batches,
                    loss=self.baseline.workload.loss,
                    options=request.options,
                )
        except ValueError as error:  # an unknown criterion: it lists the known ones
            raise UserError(f"search.options: {error}") from error
        return {name: _outside(values, plan.mask(name)) for name, values in scores.items()}

    def masked_loss(self, request: MaskedLoss) -> np.ndarray:
        """Mean loss of each masked network, shape ``(plans,)``."""
        workload, batches = self.baseline.workload, list(self.accuracy.batches(request.images))
        targets, losses = torch.cat([labels for _, labels in batches]), []
        for plan, outputs in zip(request.plans, self._outputs(request, [images for images, _ in batches]), strict=True):
            pairs = zip(outputs, (labels for _, labels in batches), strict=True)
            answers = torch.cat([workload.answers(found, labels, brief=True) for found, labels in pairs])
            losses.append(workload.metrics(answers, targets)["loss"])
            self.images_forwarded += len(targets)
            self.image_macs += len(targets) * self.baseline.macs(plan)
        return np.array(losses)

    def _outputs(self, request: MaskedLoss, batches: Sequence[Tensor]) -> Iterator[Iterable[Any]]:
        """Per plan, its outputs for each batch; several masks share a forward pass where a batch is small enough."""
        inference, weights = self.accuracy.inference, self.weights
        if len(batches) == 1 and 2 * len(batches[0]) <= MASKED_IMAGES and not weights.is_supernet(request.base):
            state = weights.state(request.base, self.baseline.full)
            masked = inference.under_masks(request.plans, state, batches[0])
            with suppress(MaskedBatchError):
                yield [next(masked)]  # after the first one, nothing fails
                yield from ([output] for output in masked)
                return
        for plan in request.plans:
            yield inference.outputs(plan, request.base, weights.state(request.base, plan), images=batches)

    def distort(self, request: Distort) -> Mapping[str, np.ndarray]:
        """Change of the next layers' outputs, per group of shape ``(batches,)``.

        Raises:
            UserError: the request names channels that the network does not have.
        """
        num_images = len(request.removed) * request.batch_size
        batches = self._train_batches(request, num_images, request.batch_size, passes=2)
        state = self.weights.state(request.base, self.baseline.full)
        images = [images for images, _ in batches]
        try:
            return distortions(self.baseline.model, self.baseline.graph, request.plan, request.removed, images, state)
        except ValueError as error:
            raise UserError(f"search: {error}") from error

    def _train_batches(
        self, request: Score | Distort, num_images: int, batch_size: int = 64, *, passes: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Random training images without augmentation, the same for the same request.

        Args:
            passes: forward passes of the unpruned network that each image costs; a gradient is two more.
        """
        workload, split = self.baseline.workload, self.baseline.workload.train
        generator = torch.Generator().manual_seed(self.baseline.seed ^ int(draws_of(request), 16))
        order = torch.cat(
            [torch.randperm(len(split), generator=generator) for _ in range(1 + (num_images - 1) // len(split))]
        )[:num_images]
        self.images_forwarded += num_images
        self.image_macs += passes * num_images * self.baseline.macs(self.baseline.full)
        return [
            workload.batch(split, indices, train=False, generator=None, device=self.baseline.compute)
            for indices in torch.split(order, batch_size)
        ]


def _outside(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Scores with the channels outside the mask as ``Score`` wants them: -inf, or inf where they are distances."""
    values = values.copy()
    if values.ndim == 1:
        values[~mask] = -np.inf
    else:
        values[~mask], values[:, ~mask] = np.inf, np.inf
    return values
