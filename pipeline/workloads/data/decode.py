"""The one decoder of image files: what a person sees in a viewer, as 8-bit RGB or grey.

A copy of this file lies beside every delivered ``loader.py``; it needs numpy and Pillow, and nothing of Secateur.

Where nothing of the table below is in a file, its pixels are those of ``Image.open(file).convert("RGB")``, which is
what torchvision's loaders give. Where viewers show something else, the image is what they show:

==========================  ============================================================================================
a file carries              its pixels
==========================  ============================================================================================
an orientation (EXIF)       turned and mirrored as it says
transparency                on white, after the colours; a bitmap whose every pixel is transparent is taken as opaque
16 bits a channel           scaled to 8 (v / 257, rounded); Pillow itself drops the low byte of 16-bit colours
a colour profile            converted to sRGB, unless that changes nothing; one that does not fit is left aside
a gamma of its own (PNG)    converted to the usual 1 / 2.2
several frames or pages     the first
CMYK, Lab, a palette, 1 bit converted to RGB; CMYK and Lab by their profile
32-bit numbers              refused: there is no range that they are agreed to have
==========================  ============================================================================================

``remarks`` of a picture says which of these it had; ``REMARKS`` says each in words.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, UnidentifiedImageError

Pixels = npt.NDArray[np.uint8]

VERSION = 1
"""Raise it when any file would give other pixels than before."""
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""The only decoders that are tried, whatever a file is called: Pillow has some that start other programs (EPS)."""
SUFFIXES = frozenset(".bmp .dib .gif .jfif .jpe .jpeg .jpg .apng .png .pbm .pgm .pnm .ppm .tif .tiff .webp".split())
"""What files with images are called, in lower case; those that torchvision reads are among them."""
MAX_PIXELS = 178_956_970
"""Larger images are refused, as Pillow does by itself; it would warn of half as many, which phones have by now."""
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("ignore", module=r"PIL\.")  # of broken EXIF blocks and the like, which no viewer speaks of

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
"""How images are scaled, by the words of torchvision and timm."""
LONG = 4
"""From these proportions on, only the middle of an image is scaled."""

ORIENTATION = 0x0112
SRGB_GAMMA = 1 / 2.2
SAME_COLOURS = 2
"""A profile that changes no colour by more than this (of 255) is taken as sRGB."""
SAME_GAMMA = 0.05

REMARKS = {
    "turned": "image(s) is|are turned or mirrored as its|their orientation tag says",
    "transparent": "image(s) has|have transparent parts, which are white",
    "deep": "image(s) has|have more than 8 bits a channel; the lower ones are lost",
    "profile": "image(s) has|have a colour profile and was|were converted to sRGB",
    "odd_profile": "image(s) has|have a colour profile that cannot be used; its|their colours are as stored",
    "gamma": "image(s) has|have a gamma of its|their own and was|were converted",
    "frames": "image(s) has|have several frames or pages, of which the first is used",
    "cmyk": "image(s) is|are CMYK without a profile, so its|their colours are approximate",
}
"""What was done to an image, in words that follow a number."""


class DecodeError(ValueError):
    """A file is no image of a known format, is damaged, or holds values without an agreed range."""


@dataclass(frozen=True)
class Picture:
    """A decoded image.

    Args:
        image: in mode RGB or L, as a person sees it.
        orientation: EXIF's number 1 to 8: how it was turned; 1 = it was not.
        remarks: keys of ``REMARKS``.
    """

    image: Image.Image
    orientation: int = 1
    remarks: tuple[str, ...] = ()

    @property
    def pixels(self) -> Pixels:
        """Shape (height, width, 3 or 1)."""
        array: Pixels = np.array(self.image)
        return array[..., None] if array.ndim == 2 else array


@dataclass(frozen=True)
class Header:
    """What a file says of its image before it is decoded.

    Args:
        size: width and height in pixels, as a person sees it.
        orientation: as in ``Picture``.
    """

    size: tuple[int, int]
    orientation: int = 1

    @property
    def stored(self) -> tuple[int, int]:
        """Width and height before turning."""
        return turned_size(self.size, self.orientation)


def decode(source: Path | str | bytes, grey: bool = False) -> Picture:
    """An image file's first image.

    Args:
        source: a path, or the content of a file.
        grey: mode L (ITU-R BT.601 luma) instead of RGB.

    Raises:
        DecodeError: it cannot be decoded.
        OSError: the file cannot be opened.
    """
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            return _picture(opened, grey)
    except DecodeError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly every kind for damaged files
        raise DecodeError(_reason(content, error)) from error


def read_header(source: Path | str | bytes) -> Header:
    """Size and orientation of an image file; nothing is decoded.

    Raises:
        DecodeError: it is no image of a known format.
        OSError: the file cannot be opened.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as content:
        try:
            with Image.open(content, formats=FORMATS) as opened:
                _check_size(opened)
                orientation = _orientation(opened)
                seen = opened.format == "TIFF"  # whose size Pillow gives as it is seen, those of others as stored
                return Header(opened.size if seen else turned_size(opened.size, orientation), orientation)
        except DecodeError:
            raise
        except Exception as error:
            content.seek(0)
            raise DecodeError(_reason(content.read(16), error)) from error


def turned_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Width and height, exchanged where an orientation turns by a quarter."""
    return size[::-1] if orientation >= 5 else size


def turned_box(
    box: tuple[float, float, float, float], stored: tuple[int, int], orientation: int
) -> tuple[float, float, float, float]:
    """A box x1, y1, x2, y2 of the stored image (width, height ``stored``), where it lies in the turned one."""
    x1, y1, x2, y2 = box
    wide, high = stored
    match orientation:
        case 2:
            return wide - x2, y1, wide - x1, y2
        case 3:
            return wide - x2, high - y2, wide - x1, high - y1
        case 4:
            return x1, high - y2, x2, high - y1
        case 5:
            return y1, x1, y2, x2
        case 6:
            return high - y2, x1, high - y1, x2
        case 7:
            return high - y2, wide - x2, high - y1, wide - x1
        case 8:
            return y1, wide - x2, y2, wide - x1
    return box


@dataclass(frozen=True)
class Fitting:
    """How images of all sizes are brought to one.

    Args:
        size: height and width in pixels.
        resize: ``crop`` keeps an image's proportions and cuts out the middle, ``stretch`` does not keep them.
        short: for ``crop``, pixels of the short side before the cut; None = the shorter one of ``size``.
        interpolation: a key of ``INTERPOLATIONS``.
    """

    size: tuple[int, int]
    resize: str = "crop"
    short: int | None = None
    interpolation: str = "bilinear"

    @classmethod
    def of(cls, usage: Mapping[str, Any]) -> Fitting:
        """What ``usage.json`` says."""
        side, short = usage["image_size"], usage.get("resize_size")
        size = (int(side[0]), int(side[1])) if isinstance(side, list | tuple) else (int(side), int(side))
        resize = "crop" if usage.get("resize") == "crop" else "stretch"
        return cls(size, resize, None if short is None else int(short), usage.get("interpolation") or "bilinear")

    @property
    def usage(self) -> dict[str, Any]:
        """The same as ``usage.json`` says it; what is usual is left out."""
        high, wide = self.size
        said: dict[str, Any] = {"image_size": high if high == wide else [high, wide], "resize": self.resize}
        if self.short not in (None, min(self.size)):
            said["resize_size"] = self.short
        return said if self.interpolation == "bilinear" else {**said, "interpolation": self.interpolation}

    def __call__(self, image: Image.Image) -> Image.Image:
        if self.resize == "crop":
            return fit(image, self.size, self.short, self.interpolation)
        return stretch(image, self.size, self.interpolation)


def fit(
    image: Image.Image, size: int | tuple[int, int], short: int | None = None, interpolation: str = "bilinear"
) -> Image.Image:
    """An image scaled until it just covers a frame, and what lies in the middle of it cut out.

    For squares the pixels are those of torchvision's ``Resize(short)`` and ``CenterCrop(size)``. Of an image that is
    ``LONG`` times as long as it is wide only the middle is scaled, so that the memory does not grow with the
    proportions; a pixel can then differ by 1 of 255.

    Args:
        size: height and width that are cut out, or the side of a square.
        short: what the frame's short side is; None = that of ``size``.
    """
    high, wide = (size, size) if isinstance(size, int) else size
    covered = [round(side * (short or min(high, wide)) / min(high, wide)) for side in (wide, high)]
    ratios = [frame / own for frame, own in zip(covered, image.size, strict=True)]
    exact = ratios.index(max(ratios))
    scaled = [
        max(int(covered[exact] * own / image.size[exact]), side) for own, side in zip(image.size, covered, strict=True)
    ]
    left, top = (round((length - side) / 2.0) for length, side in zip(scaled, (wide, high), strict=True))
    method = INTERPOLATIONS[interpolation]
    if max(scaled) <= LONG * max(covered):
        return image.resize((scaled[0], scaled[1]), method).crop((left, top, left + wide, top + high))
    across, down = image.size[0] / scaled[0], image.size[1] / scaled[1]
    right, bottom = min(image.size[0], (left + wide) * across), min(image.size[1], (top + high) * down)
    return image.resize((wide, high), method, box=(left * across, top * down, right, bottom))


def stretch(image: Image.Image, size: int | tuple[int, int], interpolation: str = "bilinear") -> Image.Image:
    """An image of ``size`` (height and width, or a square's side); proportions are not kept."""
    high, wide = (size, size) if isinstance(size, int) else size
    return image.resize((wide, high), INTERPOLATIONS[interpolation])


def luma(pixels: Pixels) -> Pixels:
    """RGB of shape (..., 3) as grey of shape (..., 1), as Pillow computes it (ITU-R BT.601)."""
    weighted = pixels.astype(np.uint32) @ np.array([19595, 38470, 7471], dtype=np.uint32)
    return ((weighted + 0x8000) >> 16).astype(np.uint8)[..., None]


# -- the steps ---------------------------------------------------------------------------------------------------------


def _picture(opened: Image.Image, grey: bool) -> Picture:
    _check_size(opened)
    remarks = ["deep"] if _is_deep(opened) else []
    if getattr(opened, "is_animated", False) and opened.format != "MPO":  # a camera's second image is a preview
        remarks.append("frames")
    orientation = _orientation(opened)  # of a PNG it can stand at the end: this loads it
    profile, gamma = opened.info.get("icc_profile"), _gamma(opened)
    opened.load()
    image: Image.Image = opened
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    image, alpha = _without_alpha(image)
    if opened.format == "BMP" and alpha is not None and alpha.getextrema() == (0, 0):
        alpha = None
    image, remark = _in_srgb(image, profile)
    if remark:
        remarks.append(remark)
    elif gamma is not None:
        image = image.point(_gamma_table(gamma) * len(image.getbands()))
        remarks.append("gamma")
    if alpha is not None and alpha.getextrema() != (255, 255):
        remarks.append("transparent")
        white = Image.new(image.mode, image.size, "white")
        white.paste(image, mask=alpha)
        image = white
    if orientation != 1:
        remarks.append("turned")
        image = _turned(image, opened, orientation)
    return Picture(image.convert("L" if grey else "RGB"), orientation, tuple(remarks))


def _check_size(opened: Image.Image) -> None:
    wide, high = opened.size
    if wide * high > MAX_PIXELS:
        raise DecodeError(f"it has {wide}x{high} pixels (a decompression bomb?); expected at most {MAX_PIXELS:,}")
    if not wide or not high:
        raise DecodeError(f"it has {wide}x{high} pixels")


def _orientation(opened: Image.Image) -> int:
    """EXIF's orientation; 1 where there is none that can be read."""
    try:
        found = opened.getexif().get(ORIENTATION, 1)
    except Exception:  # noqa: BLE001  a broken EXIF block does not break the image; viewers ignore it too
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


_METHODS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _turned(image: Image.Image, opened: Image.Image, orientation: int) -> Image.Image:
    """The image as it is to be seen; newer versions of Pillow have turned a TIFF already when it was loaded."""
    if opened.format == "TIFF" and _orientation(opened) == 1:
        return image
    return image.transpose(_METHODS[orientation])


def _is_deep(opened: Image.Image) -> bool:
    """Whether the file has more than 8 bits a channel, whatever Pillow makes of them."""
    if opened.mode.startswith("I"):
        return True
    kinds = " ".join(str(part) for tile in getattr(opened, "tile", ()) for part in tile[3:])
    return ";16" in kinds


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits as one of 8."""
    values = np.asarray(image)
    wide = image.mode == "I" and image.format not in ("PNG", "PPM")
    if image.mode == "F" or wide or values.min() < 0 or values.max() > 65535:
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise DecodeError(f"its values are {kind} numbers, which have no agreed range; save it with 8 or 16 bits")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _without_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """(colours without alpha, in mode L, RGB, CMYK, LAB or YCbCr; alpha in mode L, None where there is none)."""
    if image.mode in ("RGBa", "La"):
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    if "transparency" in image.info and image.mode in ("1", "L", "RGB", "P"):
        image = image.convert("LA" if image.mode in ("1", "L") else "RGBA")
    if image.mode == "PA":
        image = image.convert("RGBA")
    alpha = image.getchannel("A") if image.mode in ("RGBA", "LA") else None
    if alpha is not None:
        bands = image.split()[:-1]
        image = bands[0] if len(bands) == 1 else Image.merge("RGB", bands)
    if image.mode in ("1", "P", "RGBX", "HSV", "YCbCr"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return image, alpha


def _in_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """Colours in mode L or RGB, and the remark on how they were converted; empty where they were not."""
    transform = _transform(profile, image.mode) if profile or image.mode == "LAB" else None
    if isinstance(transform, ImageCms.ImageCmsTransform):
        converted = transform.apply(image)
        return converted, "profile" if profile else ""
    remark = "odd_profile" if transform == "odd" else "cmyk" if image.mode == "CMYK" else ""
    return (image if image.mode == "L" else image.convert("RGB")), remark


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | str:
    """What converts a profile's colours to sRGB: ``same`` where nothing has to be done, ``odd`` where nothing can."""
    try:
        target = ImageCms.createProfile("sRGB")
        given: Any = (
            ImageCms.createProfile("LAB") if mode == "LAB" else ImageCms.ImageCmsProfile(io.BytesIO(profile or b""))
        )
        intent = ImageCms.Intent.PERCEPTUAL if mode == "LAB" else ImageCms.Intent(ImageCms.getDefaultIntent(given))
        found = ImageCms.buildTransform(given, target, mode, "RGB", intent)
        if mode in ("L", "RGB") and _largest_change(found, mode) <= SAME_COLOURS:
            return "same"
    except Exception:  # noqa: BLE001  profiles are data of anybody; without one that works, colours stay as they are
        return "odd"
    return found


def _largest_change(transform: ImageCms.ImageCmsTransform, mode: str) -> int:
    """The most that any of a grid of colours changes by."""
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(27, 27, 3)
    image = Image.fromarray(grid) if mode == "RGB" else Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    before, after = np.asarray(image.convert("RGB"), dtype=int), np.asarray(transform.apply(image), dtype=int)
    return int(np.abs(after - before).max())


def _gamma(opened: Image.Image) -> float | None:
    """A PNG's gamma where it says one that differs from the usual; None where it says none, or that it is sRGB."""
    found = opened.info.get("gamma")
    if "srgb" in opened.info or not isinstance(found, float | int) or not 0.05 < found < 20:
        return None
    return None if abs(found / SRGB_GAMMA - 1) < SAME_GAMMA else float(found)


@functools.cache
def _gamma_table(gamma: float) -> list[int]:
    """Values 0..255 encoded with an exponent, in the usual encoding."""
    encoded = (np.arange(256) / 255) ** (SRGB_GAMMA / gamma)
    return np.round(255 * encoded).astype(int).tolist()  # type: ignore[no-any-return]


def _reason(content: bytes, error: Exception) -> str:
    """Why a file cannot be decoded, in one line."""
    if not content:
        return "it is empty"
    if not content.strip(b"\0"):
        return "it holds nothing but zeros"
    if isinstance(error, UnidentifiedImageError):
        return f"cannot identify image file: it is none of {', '.join(FORMATS)}, or its beginning is damaged"
    text = (str(error).splitlines() or [""])[0][:200]
    return f"it is damaged: {text}" if text else f"it is damaged ({type(error).__name__})"
