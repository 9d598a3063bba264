"""Image files of every kind, made in memory."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
from PIL import Image

SRGB = np.array([[0.4360, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
"""sRGB's primaries adapted to D50, one column each (ICC's registry)."""
ADOBE = np.array([[0.6097, 0.2053, 0.1492], [0.3111, 0.6257, 0.0632], [0.0195, 0.0609, 0.7446]])
"""Those of Adobe RGB (1998)."""


def noise(wide: int = 24, high: int = 16, seed: int = 0) -> Image.Image:
    """A coloured image of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (high, wide, 3), dtype=np.uint8))


def packed(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image as the content of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opened(content: bytes) -> Image.Image:
    """What Pillow makes of it."""
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile (version 2.1, input from ``space``, to XYZ) with these tags."""
    tags = {b"desc": text(b"desc"), b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz(0.9642, 1.0, 0.8249), **tags}
    start = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"none", 0x02100000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp").ljust(28, b"\0")
    head = head.ljust(64, b"\0") + struct.pack(">I", 0) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + body


def text(kind: bytes) -> bytes:
    return kind + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78)


def xyz(x: float, y: float, z: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * v) for v in (x, y, z)))


def curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * gamma)) + bytes(2)


def rgb_profile(primaries: np.ndarray, gamma: float = 2.2) -> bytes:
    """A profile of three primaries, one column each, and a gamma."""
    colours = {name: xyz(*column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries.T, strict=True)}
    return profile(b"RGB ", {**colours, **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(gamma))})


def grey_profile(gamma: float) -> bytes:
    return profile(b"GRAY", {b"kTRC": curve(gamma)})


def encoded(linear: np.ndarray) -> np.ndarray:
    """Linear light 0..1 in sRGB's encoding, 0..255."""
    clipped = linear.clip(0, 1)
    return 255 * np.where(clipped <= 0.0031308, 12.92 * clipped, 1.055 * clipped ** (1 / 2.4) - 0.055)
