"""Weights, models, arrays and images that somebody else made: they are data, and never more than their file is."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import psutil
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

from secateur.export.artifact import describe
from secateur.export.errors import ExportError
from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.data import arrays
from secateur.pipeline.workloads.data import folder as folder_source
from secateur.pipeline.workloads.data.content import Reading
from secateur.pipeline.workloads.data.sources import Wanted
from secateur.pipeline.workloads.weights import read_weights


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.mark}",))


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_weights_is_not_run(tmp_path: Path, new_format: bool) -> None:
    mark, file = tmp_path / "executed", tmp_path / "weights.pt"
    content = {"conv.weight": torch.zeros(3), "extra": Payload(mark)}
    torch.save(content, file, _use_new_zipfile_serialization=new_format)
    with pytest.raises(UserError, match="cannot read weights"):
        read_weights(file)
    assert not mark.exists()


def test_a_bare_pickle_is_not_run(tmp_path: Path) -> None:
    mark, file = tmp_path / "executed", tmp_path / "weights.pth"
    file.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(UserError, match="cannot read weights"):
        read_weights(file)
    assert not mark.exists()


def test_weights_cannot_hold_more_than_their_file(tmp_path: Path) -> None:
    honest, bomb = tmp_path / "honest.pt", tmp_path / "bomb.pt"
    torch.save({"weight": torch.zeros(16_000_000)}, honest)
    with zipfile.ZipFile(honest) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert bomb.stat().st_size < 1_000_000
    with pytest.raises(UserError, match=r"torch\.save compresses nothing"):
        read_weights(bomb)
    assert list(read_weights(honest)) == ["weight"]


def safetensors(header: dict[str, Any], body: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


SAFETENSORS = {
    "a header longer than the file": safetensors({}, length=10**9),
    "a header longer than any": safetensors({}, length=2**63),
    "offsets beyond the file": safetensors({"w": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}),
    "a shape that is not its data": safetensors(
        {"w": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4]}}, b"1234"
    ),
    "a shape that overflows": safetensors(
        {"w": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 4]}}, b"1234"
    ),
    "overlapping tensors": safetensors(
        {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in ("a", "b")}, b"1234"
    ),
    "nothing": b"",
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_safetensors_header_that_lies(name: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(SAFETENSORS[name])
    with pytest.raises(UserError, match="cannot read weights"):
        read_weights(file)


# --- ONNX -------------------------------------------------------------------------------------------------------------


def with_external_data(folder: Path, location: str) -> Path:
    """A model whose only weight lies in another file."""
    folder.mkdir(exist_ok=True)
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "0", "length": "16"}.items():
        weight.external_data.add(key=key, value=value)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    file = folder / "model.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    file.write_bytes(model.SerializeToString())
    return file


@pytest.mark.parametrize("kind", ["up", "absolute", "link"])
def test_onnx_reads_no_file_outside_its_folder(kind: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(np.float32([1, 2, 3, 4]).tobytes())
    location = {"up": "../secret", "absolute": str(secret), "link": "linked"}[kind]
    file = with_external_data(tmp_path / "model", location)
    if kind == "link":
        (file.parent / "linked").symlink_to(secret)
    with pytest.raises(ExportError, match="valid ONNX"):
        describe(file)
    with pytest.raises(Exception, match=r"(?i)external") as caught:
        onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    print(caught.value)


def test_a_device_is_sent_one_file_only(tmp_path: Path) -> None:
    """A model with data beside it has no data there: the agent refuses it, and reads nothing of the device's."""
    from secateur.device_profiles import DeviceError, LocalTarget

    file = with_external_data(tmp_path / "model", "../../../../../../../../etc/passwd")
    with LocalClosing(LocalTarget()) as target, pytest.raises(DeviceError) as caught:
        place = {"name": "m", "path": target.put(file), "sha256": describe_digest(file)}
        target.run({"op": "infer", "models": [place], "provider": "CPUExecutionProvider", "threads": 1, "seed": 0}, 60)
    assert caught.value.code == "model-load" and "root:" not in str(caught.value)


class LocalClosing:
    """Closes a target at the end."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def __enter__(self) -> Any:
        return self.target

    def __exit__(self, *_: object) -> None:
        self.target.close()


def describe_digest(file: Path) -> str:
    import hashlib

    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"\xff" * 100, b"not a model", b"\x0a\xff\xff\xff\xff\x0f"])
def test_a_file_that_is_no_model(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    with pytest.raises(ExportError):
        describe(file)


# --- arrays -----------------------------------------------------------------------------------------------------------


def npy_header(shape: tuple[int, ...], descr: str = "|u1") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    objects = np.array([Payload(mark)], dtype=object)
    np.savez(tmp_path / "a.npz", images=objects, labels=objects)
    np.save(tmp_path / "b_images.npy", objects)
    np.save(tmp_path / "b_labels.npy", objects)
    for name in ("a.npz", "b_images.npy"):
        with pytest.raises(UserError, match="readable"):
            arrays.load(str(tmp_path / name), None, Wanted(), None)
    assert not mark.exists()


def test_an_archive_larger_than_memory_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "bomb.npz"
    np.savez_compressed(file, images=np.zeros((64, 512, 512), np.uint8), labels=np.zeros(64, np.int64))
    assert file.stat().st_size < 100_000
    little = type("Memory", (), {"available": 10_000_000})()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    with pytest.raises(UserError, match=r"bytes of memory and 10,000,000 are free; save the arrays as"):
        arrays.load(str(file), None, Wanted(), None)


@pytest.mark.parametrize("shape", [(10**15, 8, 8), (2**40, 2**40), (2**62, 4, 4), (-4, 8, 8)])
@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_an_array_header_that_lies(shape: tuple[int, ...], kind: str, tmp_path: Path) -> None:
    content = npy_header(shape) + bytes(64)
    if kind == "npz":
        file = tmp_path / "a.npz"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("images.npy", content)
            archive.writestr("labels.npy", npy_header((1,), "<i8") + bytes(8))
    else:
        file = tmp_path / "a_images.npy"
        file.write_bytes(content)
        np.save(tmp_path / "a_labels.npy", np.zeros(1, np.int64))
    with pytest.raises(UserError):
        arrays.load(str(file), None, Wanted(), None)


def test_labels_whose_header_lies(tmp_path: Path) -> None:
    np.save(tmp_path / "a_images.npy", np.zeros((4, 8, 8), np.uint8))
    (tmp_path / "a_labels.npy").write_bytes(npy_header((10**15,), "<i8") + bytes(64))
    with pytest.raises(UserError, match="readable"):
        arrays.load(str(tmp_path / "a_images.npy"), None, Wanted(), None)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_damaged_archives(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (32, 8, 8)).astype(np.uint8)
    np.savez_compressed(file, images=images, labels=np.zeros(32, np.int64))
    content = bytearray(file.read_bytes())
    middle = slice(200, 260)
    content[middle] = bytes(255 - byte for byte in content[middle])
    file.write_bytes({"cut": content[:300], "flipped": bytes(content), "empty": b"", "text": b"images"}[damage])
    with pytest.raises(UserError, match="readable"):
        arrays.load(str(file), None, Wanted(), None)


# --- images -----------------------------------------------------------------------------------------------------------


def folder_of(tmp_path: Path, content: bytes, name: str) -> Path:
    """A data set of two classes, one of which has a file with this content."""
    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / label / "good.png")
    (tmp_path / "train/a/" / name).write_bytes(content)
    return tmp_path


def read_all(folder: Path) -> None:
    source = folder_source.load(str(folder), Wanted((8, 8), 3), None, "refuse", Reading()).train
    source.read(np.arange(len(source)))


def test_an_image_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    packed = io.BytesIO()
    Image.new("1", (14_000, 14_000)).save(packed, "PNG")
    assert len(packed.getvalue()) < 1_000_000
    with pytest.raises(UserError, match=r"bomb\.png.*decompression bomb"):
        read_all(folder_of(tmp_path, packed.getvalue(), "bomb.png"))


def test_only_picture_decoders_are_tried(tmp_path: Path) -> None:
    """PostScript is a program, which Pillow would hand to an interpreter, whatever the file is called."""
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(executed) (w) file closefile\n%%EOF\n"
    with pytest.raises(UserError, match="cannot identify image file"):
        read_all(folder_of(tmp_path, script, "picture.png"))


@pytest.mark.parametrize("length", [0, 20, 60])
def test_a_damaged_image_is_named(length: int, tmp_path: Path) -> None:
    whole = io.BytesIO()
    Image.new("RGB", (64, 64)).save(whole, "PNG")
    with pytest.raises(UserError, match=r"cannot read image .*cut\.png.*remove or replace the file"):
        read_all(folder_of(tmp_path, whole.getvalue()[:length], "cut.png"))


def test_annotations_cannot_expand_or_fetch(tmp_path: Path) -> None:
    from secateur.pipeline.workloads.data.voc import _parse_xml

    file = tmp_path / "a.xml"
    file.write_text('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>')
    with pytest.raises(UserError, match="DTD or entity"):
        _parse_xml(file)
