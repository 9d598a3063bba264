"""What the test split says of both networks, image by image: how sure their accuracy is, and which images changed."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from secateur.pipeline.files import sha256_of, write_whole
from secateur.pipeline.lifecycle import promotion
from secateur.pipeline.run.facts import AccuracyFacts, Interval
from secateur.pipeline.run.kept_facts import CHANGED, PER_IMAGE
from secateur.pipeline.workloads import Split, TellsImages, Workload

DRAWS, SECONDS = 1000, 10.0
FEWEST = 30
"""Images under which an interval over them tells nothing."""
MOST_CHANGED = 12
SIDE = 96
"""Pixels of a picture's longer side."""


def accuracy_of(workload: Workload, answers: Sequence[Tensor], targets: Tensor) -> AccuracyFacts:
    """The metric of both networks with intervals from a paired bootstrap (Efron & Tibshirani 1993, 10.3).

    Args:
        answers: of the baseline and the compact network, shape (n, ...) each.
        targets: shape (n, ...).
    """
    values = [float(workload.metrics(each, targets)[workload.metric]) for each in answers]
    images = len(targets)
    if images < FEWEST:
        told = [Interval(value=value, low=None, high=None) for value in (*values, values[1] - values[0])]
        reason = f"cannot tell: {images} images, under {FEWEST}"
        return AccuracyFacts(images=images, draws=0, baseline=told[0], compact=told[1], change=told[2], reason=reason)
    drawn = _drawn(workload, answers, targets)
    change = drawn[1] - drawn[0]
    return AccuracyFacts(
        images=images,
        draws=drawn.shape[1],
        baseline=_interval(values[0], drawn[0]),
        compact=_interval(values[1], drawn[1]),
        change=_interval(values[1] - values[0], change),
    )


def _drawn(workload: Workload, answers: Sequence[Tensor], targets: Tensor) -> np.ndarray:
    """The metric of bootstrap samples, shape (2, draws): from what is known of every image, else from the answers."""
    if isinstance(workload, TellsImages):
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(len(targets), (DRAWS, len(targets)), generator=generator)
        weights = torch.zeros(DRAWS, len(targets)).scatter_add_(1, rows, torch.ones(rows.shape))
        drawn = [workload.resampled(workload.per_image(each, targets), weights) for each in answers]
        known = [each.numpy() for each in drawn if each is not None]
        if len(known) == len(drawn):
            return np.stack(known)
    return promotion.resampled(workload, answers, targets, draws=DRAWS, seconds=SECONDS)[:, 1:]


def _interval(value: float, drawn: np.ndarray) -> Interval:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(value=value, low=float(low), high=float(high))


def keep(
    directory: Path, workload: Workload, answers: Sequence[Tensor], targets: Tensor, pictures: bool
) -> dict[str, str]:
    """Write down what is known of every image, and pictures of some that changed; returns the files' sha256.

    Args:
        pictures: whether images of the data may be kept.
    """
    if not isinstance(workload, TellsImages):
        return {}
    named: dict[str, Any] = {}
    for name, each in zip(("baseline", "compact"), answers, strict=True):
        named |= {f"{name}.{key}": _small(value) for key, value in workload.per_image(each, targets).items()}
    content = io.BytesIO()
    np.savez_compressed(content, **named)
    write_whole(directory / PER_IMAGE, content.getbuffer())
    files = {PER_IMAGE: sha256_of(directory / PER_IMAGE)}
    positions = changed(named)[:MOST_CHANGED]
    if pictures and positions:
        images = [_data_uri(picture) for picture in _pixels(workload, positions)]
        rows = [{"image": at, "picture": picture} for at, picture in zip(positions, images, strict=True)]
        write_whole(directory / CHANGED, json.dumps({"format": 1, "changed": rows}) + "\n")
        files[CHANGED] = sha256_of(directory / CHANGED)
    return files


def _small(values: Tensor) -> np.ndarray:
    array = values.numpy()
    return array if array.dtype == bool else array.astype(np.float32 if array.dtype.kind == "f" else np.int32)


def changed(told: Mapping[str, np.ndarray]) -> list[int]:
    """Images that one network has right and the other wrong, in turn: lost, won, lost ...; of classifiers only.

    Args:
        told: of ``keep``.
    """
    if "baseline.found" not in told:
        return []
    before, after = (told[f"{name}.found"] == told["baseline.target"] for name in ("baseline", "compact"))
    lost, won = np.flatnonzero(before & ~after).tolist(), np.flatnonzero(~before & after).tolist()
    half = MOST_CHANGED // 2
    kept = lost[: max(half, MOST_CHANGED - len(won))] + won[: max(half, MOST_CHANGED - len(lost))]
    return sorted(kept, key=lambda at: (at in won, at))


def _pixels(workload: Workload, positions: Sequence[int]) -> list[np.ndarray]:
    """Images of the test split as the network sees them, uint8 of shape (height, width, channels)."""
    split = Split(workload.test.source, workload.test.indices[list(positions)])
    every = torch.arange(len(split))
    images, _ = workload.batch(split, every, train=False, generator=None, device=torch.device("cpu"))
    usage = workload.usage
    mean, std = (
        torch.tensor(usage.get(name, [usual])).view(1, -1, 1, 1) for name, usual in (("mean", 0.0), ("std", 1.0))
    )
    pixels = ((images.float() * std + mean).clamp(0, 1) * 255).round().byte()
    return [picture.permute(1, 2, 0).numpy() for picture in pixels]


def _data_uri(pixels: np.ndarray) -> str:
    """A picture as part of a page."""
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3])
    times = SIDE / max(picture.size)
    how = Image.Resampling.NEAREST if times > 1 else Image.Resampling.LANCZOS
    file = io.BytesIO()
    picture.resize((max(1, round(picture.width * times)), max(1, round(picture.height * times))), how).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
