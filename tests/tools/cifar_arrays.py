"""Turn CIFAR-10 stored as WebP strips into the arrays that ``pipeline/runs/cifar10-resnet20.yaml`` reads.

    python -m tests.tools.cifar_arrays SOURCE DESTINATION

SOURCE holds ``cifar10/`` (strips of 500 images, label files, ``meta.json``) and ``weights/cifar10/``; DESTINATION
becomes the folder for SECATEUR_DATA: ``cifar10/{train,test}_{images,labels}.npy`` and the pretrained weights.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image


def read_split(folder: Path, split: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Images (n, 32, 32, 3) and labels (n,) of ``train`` or ``test``."""
    count = json.loads((folder / "meta.json").read_text())[split]
    strips = [np.asarray(Image.open(folder / f"{split}_{k:02d}.webp").convert("RGB")) for k in range(count // 500)]
    return np.concatenate([s.reshape(-1, 32, 32, 3) for s in strips]), np.load(folder / f"{split}_labels.npy")


def convert(source: Path, destination: Path) -> Path:
    """Write the arrays and weights once; returns the folder for SECATEUR_DATA."""
    target = destination / "cifar10"
    target.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        if not (target / f"{split}_labels.npy").exists():
            images, labels = read_split(source / "cifar10", split)
            np.save(target / f"{split}_images.npy", images)
            np.save(target / f"{split}_labels.npy", labels)
    for weights in sorted((source / "weights" / "cifar10").glob("*.safetensors")):
        copy = target / weights.name
        if not copy.exists():
            shutil.copyfile(weights, copy)
    return destination


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    folder = convert(Path(sys.argv[1]), Path(sys.argv[2]))
    for file in sorted((folder / "cifar10").iterdir()):
        print(hashlib.sha256(file.read_bytes()).hexdigest()[:16], file)
