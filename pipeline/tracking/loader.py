"""Runs the model beside this file: ``python loader.py image.jpg``, or ``Model().predict(images)``.

Needs numpy, pillow and onnxruntime, and nothing of Secateur. ``usage.json`` says how images are prepared, and
``decode.py`` reads their files, exactly as when the model was trained.
"""

from __future__ import annotations

import importlib.util
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


def _decoder() -> Any:
    """The file ``decode.py`` beside this one, wherever this one is imported from; in Secateur itself, its own."""
    file = Path(__file__).with_name("decode.py")
    if not file.is_file():
        return importlib.import_module("secateur.pipeline.workloads.data.decode")
    spec = importlib.util.spec_from_file_location("secateur_decode", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


decoder = _decoder()


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

    @property
    def classes(self) -> list[str]:
        """Names of the classes, by index; empty where the data had none."""
        return list(self.usage.get("classes", ()))

    def predict(self, images: Array | Sequence[Array | str | Path]) -> Array:
        """The first output for every image, shape (n, ...).

        Args:
            images: uint8 of shape (height, width, channels) or (height, width), of any size; several of them as a list
                or with one more dimension in front. Paths of image files, as a list. Or prepared ones: float of shape
                (n, channels, height, width).
        """
        if isinstance(images, np.ndarray) and images.dtype.kind == "f" and images.ndim == 4:
            prepared = images.astype(np.float32)
        else:
            several = [images] if isinstance(images, np.ndarray) and images.ndim <= 3 else list(images)
            prepared = np.stack([self.prepare(self.read(i) if isinstance(i, str | Path) else i) for i in several])
        size = self.input.shape[0] if isinstance(self.input.shape[0], int) else len(prepared)
        outputs = []
        for start in range(0, len(prepared), size):
            part = prepared[start : start + size]
            filled = np.concatenate([part, np.repeat(part[:1], size - len(part), axis=0)])
            outputs.append(self.session.run(None, {self.input.name: filled})[0][: len(part)])
        return np.concatenate(outputs)

    def read(self, path: str | Path) -> Array:
        """An image file as a person sees it, uint8 of shape (height, width, channels).

        Raises:
            ValueError: it cannot be decoded.
        """
        pixels: Array = decoder.decode(path, self.input.shape[1] == 1).pixels
        return pixels

    def prepare(self, image: Array) -> Array:
        """uint8 pixels, resized and normalised: float32 of shape (channels, height, width).

        Raises:
            ValueError: it is not an image of 8-bit pixels, or ``usage.json`` does not say how images are prepared.
        """
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
            raise ValueError(
                f"expected uint8 pixels of shape (height, width, channels), got {pixels.dtype} of {pixels.shape}; "
                "prepared images are float, of shape (n, channels, height, width)"
            )
        if not {"image_size", "mean", "std"} <= self.usage.keys():
            raise ValueError(
                "usage.json does not say how images are prepared: the model's task does that itself; give "
                "prepared ones, float of shape (n, channels, height, width)"
            )
        grey = self.input.shape[1] == 1
        flat = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
        picture = Image.fromarray(flat).convert("L" if grey else "RGB")
        x = np.asarray(decoder.Fitting.of(self.usage)(picture), dtype=np.float32) / 255
        x = (x[..., None] if grey else x) - np.asarray(self.usage["mean"], dtype=np.float32)
        scaled: Array = x / np.asarray(self.usage["std"], dtype=np.float32)
        return scaled.transpose(2, 0, 1)


def main() -> None:
    """Print what the model says of the image files named on the command line."""
    model = Model()
    for name in sys.argv[1:]:
        output = model.predict([name])[0]
        if output.ndim == 1:
            best = int(output.argmax())
            sys.stdout.write(f"{name}: class {model.classes[best] if model.classes else best}\n")
        else:
            sys.stdout.write(f"{name}: {json.dumps(output.tolist())}\n")


if __name__ == "__main__":
    main()
