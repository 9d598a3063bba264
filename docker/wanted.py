"""What the image installs, from pyproject.toml and the lock: ``wanted.txt`` for pip, ``torch.txt`` for another index.

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

TORCH = ("torch", "torchvision")
PROGRAM = ("pipeline", "detection")
"""Parts that every image has."""


def wanted(project: Path, extras: list[str]) -> list[str]:
    """The project's requirements with those of its build and of some extras.

    Raises:
        ValueError: there is no such extra.
    """
    content = tomllib.loads(project.read_text(encoding="utf-8"))
    table, known = content["project"], content["project"]["optional-dependencies"]
    if unknown := [name for name in extras if name not in known]:
        raise ValueError(f"no extra {', '.join(unknown)} in pyproject.toml; known: {', '.join(known)}")
    chosen = dict.fromkeys(line for name in (*PROGRAM, *extras) for line in part(known, name, table["name"]))
    return [*content["build-system"]["requires"], *table["dependencies"], *chosen]


def part(known: dict[str, list[str]], name: str, project: str) -> Iterator[str]:
    """The requirements of an extra, with those of the project's other extras that it names."""
    for line in known[name]:
        others = re.fullmatch(rf"{project}\[(.*)\]", line)
        if others is None:
            yield line
            continue
        for one in others[1].split(","):
            yield from part(known, one, project)


def torch_pins(lock: Path) -> list[str]:
    """The lock's lines of torch and torchvision; ``==2.14.1`` also means a build called ``2.14.1+cpu``."""
    lines = lock.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if re.split(r"[=<>!~ ;]", line)[0] in TORCH]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extras", help="separated by commas; writes wanted.txt")
    parser.add_argument("--torch", help="cpu or cuda; writes torch.txt")
    parser.add_argument("--index", default="", help="package index that has torch without CUDA")
    arguments = parser.parse_args()
    if arguments.torch is not None:
        if arguments.torch not in ("cpu", "cuda"):
            return _refuse(f"TORCH={arguments.torch}: choose cpu or cuda")
        if arguments.torch == "cpu" and not arguments.index:
            return _refuse(
                "TORCH=cpu needs TORCH_INDEX_URL, a package index with builds of torch that have no CUDA: the lock's "
                "own build does not start without NVIDIA's libraries"
            )
        Path("torch.txt").write_text("\n".join(torch_pins(Path("requirements.lock"))) + "\n", encoding="utf-8")
    if arguments.extras is not None:
        extras = [name.strip() for name in arguments.extras.split(",") if name.strip()]
        try:
            lines = wanted(Path("pyproject.toml"), extras)
        except ValueError as error:
            return _refuse(f"EXTRAS={arguments.extras}: {error}")
        Path("wanted.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


def _refuse(why: str) -> int:
    print(why, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
