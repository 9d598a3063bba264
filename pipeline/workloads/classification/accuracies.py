"""Accuracies of classifiers; answers are logits of shape (n, classes), targets are classes of shape (n,)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def top5(answers: Tensor, targets: Tensor) -> float:
    """The share of images whose class is among the five likeliest; 1 where there are no more than five."""
    likeliest = answers.topk(min(5, answers.shape[1]), dim=1).indices
    return (likeliest == targets[:, None]).any(1).float().mean().item()


def balanced_accuracy(answers: Tensor, targets: Tensor) -> float:
    """The mean over the classes that occur of the share of their images that is right (Brodersen et al. 2010)."""
    right = answers.argmax(1) == targets
    counts = torch.bincount(targets)
    hits = torch.bincount(targets[right], minlength=len(counts))
    there = counts > 0
    return float((hits[there].double() / counts[there]).mean())


def best_balanced(answers: Tensor, targets: Tensor, num_unseen: int) -> float:
    """The largest balanced accuracy that can be once ``num_unseen`` images follow: all of any class, and all right."""
    if not num_unseen:
        return balanced_accuracy(answers, targets)
    right = answers.argmax(1) == targets
    counts = torch.bincount(targets, minlength=answers.shape[1])
    hits = torch.bincount(targets[right], minlength=answers.shape[1])
    return ((hits + num_unseen) / (counts + num_unseen)).mean().item()


ACCURACIES: Mapping[str, Callable[[Tensor, Tensor], float]] = {"balanced_accuracy": balanced_accuracy, "top5": top5}
"""Besides ``top1``, by name."""
