"""The part of the tests that CI runs with older instructions (`make test-avx2`): another one for each commit.

Of the files whose numbers come from PyTorch's or ONNX Runtime's kernels it takes a share, drawn by the commit's hash: a
commit always gets the same part, and over some commits every file has its turn.

    python tests/tools/part.py 8      # the files of an eighth, one per line; what was drawn, and by what, on stderr
    python tests/tools/part.py all    # every test there is
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NUMERICS = re.compile(r"^\s*(import|from) (torch|onnxruntime|onnx|export|tests\.numerics)\b", re.MULTILINE)
"""Imports of a file that computes something."""
WHOLE_RUNS = re.compile(
    r"\b(perform|opened|start_server|write_tiny|tiny_config)\(|^pytestmark = .*(slow|long)", re.MULTILINE
)
"""What a file calls whose tests are runs of whole stages or processes: they take long, and compute what others test."""


def eligible(root: Path = ROOT) -> list[str]:
    """Test files with numerics in them, relative to the repository, sorted."""
    files = {file: file.read_text(encoding="utf-8") for file in (root / "tests").rglob("test_*.py")}
    fitting = (file for file, text in files.items() if NUMERICS.search(text) and not WHOLE_RUNS.search(text))
    return sorted(str(file.relative_to(root)) for file in fitting)


def part(files: Iterable[str], commit: str, share: int) -> list[str]:
    """One of ``share`` parts of the files, at least one file; drawn by the commit."""
    drawn = sorted(files, key=lambda file: hashlib.sha256(f"{commit} {file}".encode()).digest())
    return sorted(drawn[: max(1, round(len(drawn) / share))])


def commit_of(root: Path = ROOT) -> str:
    """The commit that is checked out; zeros where there is no repository."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "0" * 40
    return done.stdout.strip()


def main(arguments: list[str]) -> int:
    """Print the part that the one argument asks for."""
    wanted = arguments[0] if len(arguments) == 1 else ""
    if wanted == "all":
        print("tests")
        return 0
    if not wanted.isdecimal() or int(wanted) < 1:
        print("usage: part.py N|all (N >= 1: a Nth of the files with numerics)", file=sys.stderr)
        return 2
    files, commit = eligible(), commit_of()
    chosen = part(files, commit, int(wanted))
    print(
        f"{len(chosen)} of {len(files)} files with numerics, drawn by commit {commit[:12]}:", *chosen, file=sys.stderr
    )
    print("\n".join(chosen))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
