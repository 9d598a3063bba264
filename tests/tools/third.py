"""The third of the long tests that CI runs (`make test-long`): by the number of commits, so that each has its turn.

python tests/tools/third.py      # 1, 2 or 3 for what is checked out
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

THIRDS = ("1", "2", "3")


def third_of(test: str) -> str:
    """The third that a test is in, by its name."""
    return THIRDS[hashlib.sha256(test.encode()).digest()[0] % len(THIRDS)]


def due(folder: Path) -> str:
    """The third whose turn it is in a checkout; the first where there is no repository."""
    try:
        words = ["git", "rev-list", "--count", "HEAD"]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return THIRDS[0]
    return THIRDS[int(done.stdout) % len(THIRDS)]


if __name__ == "__main__":
    turn = due(Path(__file__).parent)
    print(f"long tests: part {turn} of {len(THIRDS)}, by the number of commits", file=sys.stderr)
    print(turn)
