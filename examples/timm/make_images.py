"""Write class folders that stand for yours: pieces of scikit-learn's two photographs, `images/SPLIT/CLASS/NUMBER.jpg`.

The left two thirds of each photograph are for training, the rest for the test: no piece shows what another split has.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

SIDE = 128
NUMBERS = {"train": 200, "test": 60}

photographs = load_sample_images()
for name, pixels in zip(photographs.filenames, photographs.images, strict=True):
    cut = 2 * pixels.shape[1] // 3
    for split, part in (("train", pixels[:, :cut]), ("test", pixels[:, cut:])):
        folder = Path("images", split, Path(name).stem)
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        for number in range(NUMBERS[split]):
            side = int(rng.integers(SIDE // 2, SIDE))
            top, left = rng.integers(0, part.shape[0] - side), rng.integers(0, part.shape[1] - side)
            piece = Image.fromarray(part[top : top + side, left : left + side])
            piece.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{number:03}.jpg", quality=90)
print("images/: pieces of", " and ".join(Path(name).stem for name in photographs.filenames))
