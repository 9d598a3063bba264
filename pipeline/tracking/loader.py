"""Runs the model beside this file: ``python loader.py image.jpg``, or ``Model().predict(images)``.

Needs numpy, pillow and onnxruntime, and nothing of Secateur. ``usage.json`` says how images are prepared.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from PIL import Image

Array = npt.NDArray[Any]


class Model:
    """The model in a folder.

    Args:
        folder: of ``model.onnx`` and ``usage.json``; None = this file's.
        threads: of the CPU.
        providers: of ONNX Runtime, in the order they are tried.
    """

    def __init__(
        self, folder: str | Path | None = None, threads: int = 1, providers: Sequence[str] = ("CPUExecutionProvider",)
    ) -> None:
        here = Path(folder) if folder else Path(__file__).parent
        self.usage: dict[str, Any] = json.loads((here / "usage.json").read_text(encoding="utf-8"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(here / "model.onnx"), options, providers=list(providers))
        self.input = self.session.get_inputs()[0]

    def predict(self, images: Array | Sequence[Array]) -> Array:
        """The first output for every image, shape (n, ...).

        Args:
            images: uint8 of shape (height, width, channels) or (height, width), of any size; several of them as a list
                or with one more dimension in front. Or prepared ones: float of shape (n, channels, height, width).
        """
        if isinstance(images, np.ndarray) and images.dtype.kind == "f" and images.ndim == 4:
            prepared = images.astype(np.float32)
        else:
            several = [images] if isinstance(images, np.ndarray) and images.ndim <= 3 else list(images)
            prepared = np.stack([self.prepare(image) for image in several])
        size = self.input.shape[0] if isinstance(self.input.shape[0], int) else len(prepared)
        outputs = []
        for start in range(0, len(prepared), size):
            part = prepared[start : start + size]
            filled = np.concatenate([part, np.repeat(part[:1], size - len(part), axis=0)])
            outputs.append(self.session.run(None, {self.input.name: filled})[0][: len(part)])
        return np.concatenate(outputs)

    def prepare(self, image: Array) -> Array:
        """uint8 pixels, resized and normalised: float32 of shape (channels, side, side).

        Raises:
            ValueError: it is not an image of 8-bit pixels.
        """
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
            raise ValueError(
                f"expected uint8 pixels of shape (height, width, channels), got {pixels.dtype} of {pixels.shape}; "
                "prepared images are float, of shape (n, channels, height, width)"
            )
        grey = self.input.shape[1] == 1
        flat = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
        picture = Image.fromarray(flat).convert("L" if grey else "RGB")
        x = np.asarray(self._resized(picture), dtype=np.float32) / 255
        x = (x[..., None] if grey else x) - np.asarray(self.usage["mean"], dtype=np.float32)
        scaled: Array = x / np.asarray(self.usage["std"], dtype=np.float32)
        return scaled.transpose(2, 0, 1)

    def _resized(self, picture: Image.Image) -> Image.Image:
        """A square: ``stretch`` ignores the image's proportions, ``crop`` keeps them and cuts out the middle."""
        side = int(self.usage["image_size"])
        if self.usage.get("resize") != "crop":
            return picture.resize((side, side), Image.Resampling.BILINEAR)
        scale = side / min(picture.size)
        wide, high = (max(side, round(length * scale)) for length in picture.size)
        left, top = (wide - side) // 2, (high - side) // 2
        return picture.resize((wide, high), Image.Resampling.BILINEAR).crop((left, top, left + side, top + side))


def main() -> None:
    model = Model()
    for name in sys.argv[1:]:
        with Image.open(name, formats=("BMP", "JPEG", "PNG", "WEBP")) as opened:
            output = model.predict(np.asarray(opened.convert("RGB")))[0]
        if output.ndim == 1:
            classes = model.usage.get("classes")
            best = int(output.argmax())
            sys.stdout.write(f"{name}: class {classes[best] if classes else best}\n")
        else:
            sys.stdout.write(f"{name}: {json.dumps(output.tolist())}\n")


if __name__ == "__main__":
    main()
