"""Pins the images of the Dockerfiles and of compose.yaml: NAME:TAG becomes NAME:TAG@sha256:..., as the registry has it.

    python3 docker/pin.py        # asks through `docker buildx`, and writes the files; see the difference with git

A tag can be moved, a digest cannot. It is that of the index of all platforms. Standard library only.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
FILES = ("Dockerfile", "compose.yaml", ".devcontainer/Dockerfile")
DIGEST = r"sha256:[0-9a-f]{64}"
IMAGE = re.compile(rf"^(ARG PYTHON_IMAGE=| +image: )([a-z][\w./-]*:[\w.-]+)(@{DIGEST})?$", re.MULTILINE)


def unpinned(folder: Path) -> list[str]:
    """Images without a digest, as ``FILE: NAME:TAG``."""
    found = [(name, *match.groups()) for name in FILES for match in IMAGE.finditer((folder / name).read_text())]
    return [f"{name}: {tag}" for name, _, tag, digest in found if not digest]


def pin(folder: Path, ask: Callable[[str], str]) -> list[str]:
    """Write the digests that ``ask`` knows for tags; returns the images."""
    texts = {name: (folder / name).read_text() for name in FILES}
    tags = sorted({match[2] for text in texts.values() for match in IMAGE.finditer(text)})
    images = {tag: f"{tag}@{ask(tag)}" for tag in tags}  # all of them before the first is written
    for name, text in texts.items():
        (folder / name).write_text(IMAGE.sub(lambda match: match[1] + images[match[2]], text))
    return list(images.values())


def registry(tag: str) -> str:
    """The digest of a tag in its registry, by ``docker buildx``.

    Raises:
        OSError: there is no Docker, no buildx, no registry, or no such tag.
    """
    command = ["docker", "buildx", "imagetools", "inspect", "--format", "{{json .Manifest}}", tag]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise OSError(f"{' '.join(command[:4])} {tag}: {result.stderr.strip()}")
    digest = str(json.loads(result.stdout).get("digest"))
    if not re.fullmatch(DIGEST, digest):
        raise OSError(f"{tag}: expected sha256:..., got {digest!r}")
    return digest


if __name__ == "__main__":
    try:
        print("\n".join(pin(CHECKOUT, registry)))
    except OSError as error:
        sys.exit(f"nothing was written: {error}")
