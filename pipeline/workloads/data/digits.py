"""scikit-learn's 1,797 handwritten digits, 8x8 grey (UCI; Alpaydin and Kaynak 1998): data without a download."""

from __future__ import annotations

import numpy as np

from pipeline.workloads.data.sources import ArraySource, ImageData


def load(size: int | None, channels: int | None) -> ImageData:
    """All digits, without splits of their own.

    Args:
        size: side in pixels; None = 8.
        channels: 1 or 3; None = 1.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    source = ArraySource(images, data.target.astype(np.int64), size or 8, channels, "digit")
    return ImageData(source, tuple(str(digit) for digit in range(10)))
