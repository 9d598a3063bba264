"""Write class folders that stand for yours: scikit-learn's digits as PNG files, `images/CLASS/NUMBER.png`."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIDE = 32
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

digits = load_digits()
for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
    folder = Path("images", WORDS[label])
    folder.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.uint8(255 * pixels / 16)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    image.save(folder / f"{number:04}.png")
print(f"images/: {len(digits.target)} images in {len(WORDS)} folders")
