"""scikit-learn's 1,797 handwritten digits, 8x8 grey (UCI; Alpaydin and Kaynak 1998): data without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from secateur.pipeline.workloads.data import digit_scenes
from secateur.pipeline.workloads.data.content import Reading
from secateur.pipeline.workloads.data.digit_pixels import read
from secateur.pipeline.workloads.data.scenes import SceneData
from secateur.pipeline.workloads.data.sources import ArraySource, ImageData, Wanted

KEYS: tuple[str, ...] = ("image_size", "scenes", "objects", "seed")
NEEDS: tuple[str, ...] = ()


def looks_like(path: Path) -> str | None:
    """Nothing: the digits lie in no path."""
    del path
    return None


def load_images(options: Any, wanted: Wanted, reading: Reading) -> ImageData:
    """All digits, without splits of their own.

    Args:
        wanted: as stored they are 8x8 and grey.
    """
    del options, reading
    pixels, labels = read()
    images = np.round(pixels * (255 / 16)).astype(np.uint8)
    source = ArraySource(images, labels, wanted.size, wanted.channels, "digit")
    return ImageData(source, tuple(str(digit) for digit in range(10)))


def load_scenes(options: Any, reading: Reading) -> SceneData:
    """Scenes made of digits (``digit_scenes.py``)."""
    del reading
    o = options
    return digit_scenes.load(o.scenes, o.image_size, o.objects, o.seed, o.search_fraction, o.test_fraction)
