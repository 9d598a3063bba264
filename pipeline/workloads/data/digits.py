"""scikit-learn's 1,797 handwritten digits, 8x8 grey (UCI; Alpaydin and Kaynak 1998): data without a download."""

from __future__ import annotations

import csv
import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from secateur.pipeline.workloads.data.sources import ArraySource, ImageData, Wanted


def load(wanted: Wanted) -> ImageData:
    """All digits, without splits of their own.

    Args:
        wanted: as stored they are 8x8 and grey.
    """
    pixels, labels = read()
    images = np.round(pixels * (255 / 16)).astype(np.uint8)
    source = ArraySource(images, labels, wanted.size, wanted.channels, "digit")
    return ImageData(source, tuple(str(digit) for digit in range(10)))


def read() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Images of shape (1797, 8, 8) with values from 0 to 16, and their labels, as ``sklearn.datasets.load_digits``.

    Read from scikit-learn's file without importing it, which would take longer than everything else that is done here.
    """
    package = find_spec("sklearn")
    assert package is not None and package.submodule_search_locations
    file = Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    with gzip.open(file, "rt", encoding="ascii", newline="") as opened:
        rows = np.array([[float(value) for value in row] for row in csv.reader(opened)])
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(np.int64)
