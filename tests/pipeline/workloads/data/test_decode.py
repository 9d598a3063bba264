"""The decoder: what it makes of what image files carry, a test for each row of docs/reference/data.md's table."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS, pil_loader

from secateur.pipeline.workloads.data import decode
from secateur.pipeline.workloads.data.decode import DecodeError, Picture
from tests.pipeline.workloads.data.pictures import (
    ADOBE,
    SRGB,
    encoded,
    grey_profile,
    noise,
    opened,
    packed,
    rgb_profile,
)

ROWS: dict[str, Callable[[], None]] = {}
DOCS = Path(__file__).parents[4] / "docs" / "reference" / "data.md"


def row(title: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """The test of a row of the table."""

    def add(test: Callable[[], None]) -> Callable[[], None]:
        ROWS[title] = test
        return test

    return add


def same(picture: Picture, expected: Image.Image | np.ndarray, remarks: tuple[str, ...] = ()) -> None:
    assert np.array_equal(np.asarray(picture.image), np.asarray(expected))
    assert picture.remarks == remarks


def close(picture: Picture, expected: np.ndarray, most: float = 2.5) -> None:
    assert np.abs(np.asarray(picture.image, dtype=float) - expected).max() <= most


def test_every_row_of_the_table_has_a_test() -> None:
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    assert set(ROWS) == set(_rows(lines, lines.index("| a file carries | its pixels | note |")))


def _rows(lines: list[str], start: int) -> list[str]:
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append(line.split("|")[1].strip())
    return found


@row("plain RGB")
def _plain() -> None:
    for kind in ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM"):
        content = packed(noise(), kind)
        same(decode.decode(content), opened(content).convert("RGB"))


@row("grey")
def _grey() -> None:
    for kind in ("JPEG", "PNG", "BMP", "TIFF", "PPM"):
        content = packed(noise().convert("L"), kind)
        same(decode.decode(content), opened(content).convert("RGB"))
        same(decode.decode(content, grey=True), opened(content))
    coloured = packed(noise(), "PNG")
    same(decode.decode(coloured, grey=True), noise().convert("L"))
    assert np.array_equal(decode.luma(np.asarray(noise()))[..., 0], np.asarray(noise().convert("L")))


@row("1 bit a pixel")
def _one_bit() -> None:
    for kind in ("PNG", "BMP", "TIFF", "PPM"):
        same(decode.decode(packed(noise().convert("1"), kind)), noise().convert("1").convert("RGB"))


@row("a palette")
def _palette() -> None:
    for kind in ("PNG", "BMP", "GIF", "TIFF"):
        content = packed(noise().convert("P"), kind)
        same(decode.decode(content), opened(content).convert("RGB"))


@row("16 bits a channel, grey")
def _deep_grey() -> None:
    values = np.arange(0, 65536, 171, dtype=np.uint16)[:384].reshape(16, 24)
    expected = np.repeat(np.round(values / 257).astype(np.uint8)[..., None], 3, axis=2)
    for kind in ("PNG", "TIFF"):
        same(decode.decode(packed(Image.fromarray(values), kind)), expected, ("deep",))
    same(decode.decode(packed(Image.fromarray(values.astype(np.int32)), "PPM")), expected, ("deep",))


@row("16 bits a channel, colour")
def _deep_colour() -> None:
    import struct
    import zlib

    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), dtype=np.uint16)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0))
    content += chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    picture = decode.decode(content)
    assert picture.remarks == ("deep",)
    close(picture, values / 257, 1)


@row("32-bit numbers")
def _numbers() -> None:
    for values in (np.ones((4, 4), np.float32), np.full((4, 4), 70000, np.int32), np.full((4, 4), -1, np.int32)):
        with pytest.raises(DecodeError, match="no agreed range; save it with 8 or 16 bits"):
            decode.decode(packed(Image.fromarray(values), "TIFF"))


@row("transparency")
def _transparency() -> None:
    cover = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 24), dtype=np.uint8))
    colours, alpha = np.asarray(noise(), dtype=float), np.asarray(cover, dtype=float)[..., None] / 255
    rgba, la = noise().copy(), noise().convert("L")
    rgba.putalpha(cover)
    la.putalpha(cover)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        picture = decode.decode(packed(rgba, kind, **options))
        assert picture.remarks == ("transparent",)
        close(picture, colours * alpha + 255 * (1 - alpha), 1)
    grey = np.asarray(noise().convert("L"), dtype=float)[..., None]
    close(decode.decode(packed(la, "PNG")), np.repeat(grey * alpha + 255 * (1 - alpha), 3, axis=2), 1)
    by_key = Image.new("RGB", (4, 2), (10, 20, 30))
    by_key.putpixel((1, 1), (0, 0, 0))
    flat = by_key.quantize(2)
    hidden = flat.getpixel((1, 1))
    for content in (
        packed(by_key, "PNG", transparency=(0, 0, 0)),
        packed(by_key.convert("L"), "PNG", transparency=0),
        packed(flat, "PNG", transparency=hidden),
        packed(flat, "GIF", transparency=hidden),
    ):
        picture = decode.decode(content)
        assert picture.remarks == ("transparent",)
        assert picture.image.getpixel((1, 1)) == (255, 255, 255)
        assert picture.image.getpixel((0, 0)) != (255, 255, 255)


@row("an alpha channel that is opaque")
def _opaque() -> None:
    opaque = noise().copy()
    opaque.putalpha(255)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        same(decode.decode(packed(opaque, kind, **options)), noise())


@row("a bitmap whose every pixel is transparent")
def _bitmap() -> None:
    import struct

    pixels = np.dstack([np.asarray(noise())[::-1, :, ::-1], np.zeros((16, 24), np.uint8)])
    head = struct.pack("<IiiHHIIiiII", 108, 24, 16, 1, 32, 3, pixels.size, 2835, 2835, 0, 0)
    head += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000).ljust(108 - 40, b"\0")
    content = struct.pack("<2sIHHI", b"BM", 14 + 108 + pixels.size, 0, 0, 14 + 108) + head + pixels.tobytes()
    assert opened(content).mode == "RGBA"
    same(decode.decode(content), noise())


@row("an orientation tag")
def _orientation() -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
            content = packed(noise(), kind, exif=exif)
            seen = ImageOps.exif_transpose(opened(content)).convert("RGB")
            picture, header = decode.decode(content), decode.read_header(content)
            same(picture, seen, () if orientation == 1 else ("turned",))
            assert (picture.orientation, header.orientation) == (orientation, orientation), kind
            assert (header.size, header.stored) == (seen.size, (24, 16)), kind
    broken = packed(noise(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03\0\0\0\x01")
    same(decode.decode(broken), opened(broken).convert("RGB"))


@row("a colour profile")
def _profile() -> None:
    linear = (np.asarray(noise()) / 255) ** 2.2 @ ADOBE.T
    expected = encoded(linear @ np.linalg.inv(SRGB).T)
    plain = np.asarray(noise(), dtype=float)
    for kind in ("PNG", "TIFF"):
        picture = decode.decode(packed(noise(), kind, icc_profile=rgb_profile(ADOBE)))
        assert picture.remarks == ("profile",)
        close(picture, expected, 4)
        assert np.abs(np.asarray(picture.image) - plain).max() > 20
    grey = noise().convert("L")
    picture = decode.decode(packed(grey, "PNG", icc_profile=grey_profile(1.0)))
    assert picture.remarks == ("profile",)
    lit = np.asarray(grey) > 8  # where one step is no leap
    expected = encoded(np.asarray(grey)[..., None] / 255)
    assert np.abs(np.asarray(picture.image, dtype=float) - expected)[lit].max() <= 4
    clear = noise().copy()
    clear.putalpha(255)
    same(
        decode.decode(packed(clear, "PNG", icc_profile=rgb_profile(ADOBE))),
        np.asarray(decode.decode(packed(noise(), "PNG", icc_profile=rgb_profile(ADOBE))).image),
        ("profile",),
    )


@row("a profile that is sRGB")
def _srgb() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        content = packed(noise(), kind, icc_profile=srgb)
        same(decode.decode(content), opened(content).convert("RGB"))


@row("a profile that is broken or does not fit")
def _odd_profile() -> None:
    for bad in (b"no profile", b"", rgb_profile(ADOBE)[:200]):
        content = packed(noise(), "PNG", icc_profile=bad)
        picture = decode.decode(content)
        same(picture, noise(), ("odd_profile",) if bad else ())
    same(decode.decode(packed(noise(), "PNG", icc_profile=grey_profile(2.2))), noise(), ("odd_profile",))


@row("CMYK")
def _cmyk() -> None:
    for kind in ("JPEG", "TIFF"):
        content = packed(noise().convert("CMYK"), kind)
        same(decode.decode(content), opened(content).convert("RGB"), ("cmyk",))


@row("Lab or YCbCr")
def _lab() -> None:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.buildTransform(srgb, lab, "RGB", "LAB").apply(noise())
    found = np.asarray(decode.decode(packed(image, "TIFF")).image, dtype=float)
    assert np.abs(found - np.asarray(noise(), dtype=float)).mean() < 2  # Lab in 8 bits is coarse
    content = packed(noise().convert("YCbCr"), "TIFF")
    same(decode.decode(content), opened(content).convert("RGB"))


@row("a gamma of its own (PNG)")
def _gamma() -> None:
    import struct
    import zlib

    def with_gamma(gamma: float) -> bytes:
        content = packed(noise(), "PNG")
        body = b"gAMA" + struct.pack(">I", round(100_000 * gamma))
        return content[:33] + struct.pack(">I", 4) + body + struct.pack(">I", zlib.crc32(body)) + content[33:]

    same(decode.decode(with_gamma(0.45455)), noise())
    picture = decode.decode(with_gamma(1.0))
    assert picture.remarks == ("gamma",)
    close(picture, 255 * (np.asarray(noise()) / 255) ** (1 / 2.2), 1)


@row("several frames or pages")
def _frames() -> None:
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        content = packed(noise(), kind, save_all=True, append_images=[noise(seed=1)])
        same(decode.decode(content), opened(content).convert("RGB"), ("frames",))


@row("a camera's preview image (MPO)")
def _mpo() -> None:
    content = packed(noise(), "MPO", save_all=True, append_images=[noise(8, 8)])
    same(decode.decode(content), opened(content).convert("RGB"))


@row("another suffix than its format")
def _suffix() -> None:
    same(decode.decode(packed(noise(), "PNG")), noise())  # content has no name at all


@row("damage")
def _damage() -> None:
    whole = packed(noise(64, 64), "PNG")
    for content, why in (
        (b"", "it is empty"),
        (bytes(500), "nothing but zeros"),
        (whole[:-200], "damaged"),
        (whole[:20], "cannot identify|damaged"),
        (b"no image", "cannot identify image file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "cannot identify image file"),
    ):
        with pytest.raises(DecodeError, match=why):
            decode.decode(content)


@row("more than 179 million pixels")
def _huge() -> None:
    content = packed(Image.new("1", (14_000, 14_000)), "PNG")
    for read in (decode.decode, decode.read_header):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(DecodeError, match="14000x14000 pixels"):
                read(content)
    large = packed(Image.new("1", (12_000, 9_000)), "PNG")  # a phone's 108 million: no warning, no error
    assert decode.read_header(large).size == (12_000, 9_000)


@pytest.mark.parametrize("title", sorted(ROWS))
def test_a_file_that_carries(title: str) -> None:
    ROWS[title]()


def test_files_that_torchvision_reads_have_its_pixels(tmp_path: Path) -> None:
    assert set(IMG_EXTENSIONS) <= decode.SUFFIXES
    for suffix in (".jpg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"):
        file = tmp_path / f"x{suffix}"
        (noise().convert("L") if suffix == ".pgm" else noise()).save(file)
        same(decode.decode(file), pil_loader(str(file)))


@given(
    st.binary(max_size=400), st.sampled_from(["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "none"]), st.data()
)
def test_no_bytes_end_in_another_error(junk: bytes, kind: str, data: st.DataObject) -> None:
    content = bytearray(junk if kind == "none" else packed(noise(), kind))
    for at in data.draw(st.lists(st.integers(0, max(0, len(content) - 1)), max_size=6)):
        if content:
            content[at] ^= 0xFF
    for read in (decode.decode, decode.read_header):
        try:
            read(bytes(content))
        except DecodeError as error:
            assert "\n" not in str(error)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(4, 90))
def test_images_are_fitted_as_torchvision_does(wide: int, high: int, side: int) -> None:
    image = noise(wide, high, wide * 1000 + high)
    found = np.asarray(decode.fit(image, side), dtype=int)
    assert found.shape == (side, side, 3)
    if max(wide, high) > 20 * min(wide, high):
        return
    expected = np.asarray(T.CenterCrop(side)(T.Resize(side)(image)), dtype=int)
    most = 0 if max(wide, high) <= 4 * min(wide, high) else 1
    assert np.abs(found - expected).max() <= most


def test_the_memory_of_fitting_does_not_grow_with_the_proportions() -> None:
    import tracemalloc  # Pillow's memory is not Python's: what is watched is the process

    import psutil

    del tracemalloc
    image, process = noise(60_000, 4), psutil.Process()
    before = process.memory_info().rss
    decode.fit(image, 224)
    assert process.memory_info().rss - before < 50 << 20  # scaled whole: 2.2 GB


@given(
    st.integers(1, 8),
    st.tuples(st.integers(3, 40), st.integers(3, 40)),
    st.tuples(*[st.floats(0, 1) for _ in range(4)]),
)
def test_boxes_turn_with_the_pixels(orientation: int, size: tuple[int, int], at: tuple[float, ...]) -> None:
    wide, high = size
    x1, x2 = sorted(int(v * wide) for v in (at[0], at[2]))
    y1, y2 = sorted(int(v * high) for v in (at[1], at[3]))
    x2, y2 = min(wide, x2 + 1), min(high, y2 + 1)
    marked = np.zeros((high, wide), np.uint8)
    marked[y1:y2, x1:x2] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = np.asarray(decode.decode(packed(Image.fromarray(marked), "PNG", exif=exif), grey=True).image)
    a, b, c, d = (int(v) for v in decode.turned_box((x1, y1, x2, y2), size, orientation))
    expected = np.zeros(seen.shape, np.uint8)
    expected[b:d, a:c] = 255
    assert np.array_equal(seen, expected)


def test_the_detector_reads_the_same_pixels(tmp_path: Path) -> None:
    from secateur.pipeline.workloads.data.content import read_file

    exif = Image.Exif()
    exif[0x0112] = 6
    noise().save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(read_file(tmp_path / "x.png").pixels, decode.decode(tmp_path / "x.png").pixels)
    assert torch.from_numpy(read_file(tmp_path / "x.png").pixels).shape == (24, 16, 3)
