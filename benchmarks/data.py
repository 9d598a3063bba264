"""What opening a folder of images costs: digests of all files, once and again, beside ``sha256sum``; decoding them all.

    python benchmarks/data.py [--files 10000] [--json PATH]

CPU time of this process and its children, on JPEG files of 100 kB. Decoding, which ``validate`` and the start of a run
do, is told apart: it finds damaged files before anything is trained, and is remembered.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._output import Figure, parser, present
from secateur.pipeline.workloads.data import folder
from secateur.pipeline.workloads.data.content import Reading
from secateur.pipeline.workloads.data.sources import Wanted

BYTES = 100_000
STEPS: tuple[tuple[str, Literal["none", "all"]], ...] = (
    ("first opening", "none"),
    ("second opening", "none"),
    ("decoding all", "all"),
    ("opening after that", "all"),
)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--files", type=int, default=10_000, help="how many (default 10000)")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["SECATEUR_HOME"] = str(Path(temporary) / "home")
        root = make(Path(temporary) / "images", options.files)
        paths = [str(file) for file in sorted(root.rglob("*.jpg"))]
        spent = {"sha256sum": cpu_s(partial(run_sha256sum, paths))}
        for name, check in STEPS:
            spent[name] = cpu_s(partial(folder.load, str(root), Wanted((64, 64)), None, "refuse", Reading(check=check)))
    plain = spent["sha256sum"]
    rows = [{"what": name, "CPU s": seconds, "of sha256sum": seconds / plain} for name, seconds in spent.items()]
    ratio, second = spent["first opening"] / plain, spent["second opening"]
    figures = [
        Figure("first_opening_ratio", ratio, 3.0, ratio <= 3.0),
        Figure("second_opening_cpu_s", second, 1.0, second <= 1.0),
    ]
    present(f"{options.files:,} files of {BYTES // 1000} kB", rows, figures, options.json)


def make(root: Path, num: int) -> Path:
    """Class folders of JPEG files of about ``BYTES``: one picture, each with a few bytes of its own at its end."""
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (root / "train" / label).mkdir(parents=True)
    picture = root / "picture.jpg"
    Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(picture, quality=88)
    content = picture.read_bytes()
    picture.unlink()
    padding = bytes(max(0, BYTES - len(content)))
    for index in range(num):
        file = root / "train" / "ab"[index % 2] / f"{index:06d}.jpg"
        file.write_bytes(content + padding + index.to_bytes(4, "big"))
    return root


def run_sha256sum(paths: list[str]) -> None:
    for start in range(0, len(paths), 2000):
        subprocess.run(["sha256sum", *paths[start : start + 2000]], check=True, stdout=subprocess.DEVNULL)


def cpu_s(work: Callable[[], None]) -> float:
    """CPU seconds of this process and its children."""
    before = _spent()
    work()
    return _spent() - before


def _spent() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
