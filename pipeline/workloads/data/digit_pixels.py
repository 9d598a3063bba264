"""The file of scikit-learn's 1,797 handwritten digits, read without importing scikit-learn."""

from __future__ import annotations

import csv
import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt


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
