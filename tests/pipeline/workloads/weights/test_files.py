"""Files of all kinds where weights should be: read if they hold tensors, else one message that says what they are."""

from __future__ import annotations

import argparse
import os
import pathlib
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import nn

from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.data import paths
from secateur.pipeline.workloads.weights import choose_weights, find_weights, fit_weights, read_weights
from secateur.pipeline.workloads.weights.files import describe

Write = Callable[[Path], object]


class Net(nn.Module):
    """A network with a last layer for three classes."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.bn(self.conv(x)).mean((2, 3)))


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    return dict(Net().state_dict())


def load(path: Path, classes: tuple[str, ...] = ("a", "b", "c")) -> nn.Module:
    """As a workload does it."""
    model, content = Net(len(classes)), read_weights(path)
    chosen, _ = choose_weights(content, model.state_dict(), "FILE")
    fit_weights(model, chosen.tensors, "FILE", "net", held=describe(content), classes=classes)
    return model


# -- files -------------------------------------------------------------------------------------------------------------


def legacy(path: Path, content: Any) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


READ: dict[str, Write] = {
    "zip": lambda p: torch.save(state(), p),
    "before torch 1.6": lambda p: legacy(p, state()),
    "safetensors by another name": lambda p: p.write_bytes(save(state())),
    "parameters": lambda p: torch.save(
        OrderedDict((k, nn.Parameter(v, v.is_floating_point())) for k, v in state().items()), p
    ),
    "arguments of a command line": lambda p: torch.save({"model": state(), "args": argparse.Namespace(lr=0.1)}, p),
    "numbers of NumPy": lambda p: torch.save({"model": state(), "best": np.float64(3), "all": np.arange(3)}, p),
    "paths": lambda p: torch.save({"model": state(), "out": pathlib.PurePosixPath("runs")}, p),
    "a pair": lambda p: torch.save((state(), {"epoch": 3}), p),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ""])
@pytest.mark.parametrize("kind", READ)
def test_files_that_are_read_whatever_their_name(kind: str, suffix: str, tmp_path: Path) -> None:
    READ[kind](tmp_path / f"w{suffix}")
    found = load(tmp_path / f"w{suffix}").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state().items())


def truncated(path: Path) -> None:
    torch.save(state(), path)
    path.write_bytes(path.read_bytes()[:-200])


def damaged_header(path: Path) -> None:
    path.write_bytes(save(state()).replace(b'"F32"', b'"X32"'))


REFUSED: dict[str, tuple[Write, str]] = {
    "empty": (lambda p: p.write_bytes(b""), "the file is empty"),
    "a folder": (lambda p: (p.mkdir(), (p / "model.safetensors").touch()), r"it is a folder; .*model\.safetensors"),
    "a pipe": (lambda p: os.mkfifo(p), "no regular file"),
    "a cut zip": (truncated, "cut short or damaged"),
    "noise": (lambda p: p.write_bytes(bytes(range(1, 200))), "damaged or of another kind"),
    "zeros": (lambda p: p.write_bytes(bytes(4096)), "damaged or of another kind"),
    "a whole network": (lambda p: torch.save(Net(), p), r"objects of .*Net.*model\.state_dict\(\)"),
    "a whole network before torch 1.6": (lambda p: legacy(p, Net()), r"objects of .*Net.*model\.state_dict\(\)"),
    "a wrapped whole network": (lambda p: torch.save({"model": Net()}, p), r"objects of .*Net.*model\.state_dict\(\)"),
    "TorchScript": (lambda p: zipped(p, "constants.pkl"), r"torch\.jit\.load\(FILE\)\.state_dict\(\)"),
    "torch.export": (lambda p: zipped(p, "archive_format"), r"torch\.export\.load\(FILE\)\.state_dict"),
    "another zip": (lambda p: zipped(p, "word/document.xml"), "damaged or of another kind"),
    "Python": (lambda p: p.write_text("from torch import nn\n"), "neither safetensors nor what torch.save writes"),
    "a pickle": (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "cannot read weights"),
    "a safetensors header": (damaged_header, "cannot read weights"),
    "Git LFS": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "a web page": (lambda p: p.write_text("\n<!DOCTYPE html><html>"), "web page"),
    "gzip": (lambda p: p.write_bytes(b"\x1f\x8b\x08" + bytes(60)), "gzip"),
    "Keras": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(60)), "HDF5"),
    "NumPy": (lambda p: p.write_bytes(b"\x93NUMPY" + bytes(60)), "NumPy"),
    "an index": (lambda p: p.write_text('{"weight_map": {}}'), "JSON"),
    "a number": (lambda p: torch.save(3, p), "no state dict .* but int"),
    "a list": (lambda p: torch.save([1, 2], p), "no state dict"),
    "nothing in a mapping": (lambda p: torch.save({}, p), "an empty mapping"),
    "a tensor": (lambda p: torch.save(torch.ones(3), p), "no state dict .* but a tensor"),
    "keys that are no text": (lambda p: torch.save({0: torch.zeros(2), None: 3}, p), "0, a key of kind int"),
    "wrapped keys that are no text": (lambda p: torch.save({"model": {0: torch.zeros(2)}}, p), "keys that are no text"),
    "two tensors of a name": (
        lambda p: torch.save({"model": {"a": torch.zeros(1)}, "model.a": torch.zeros(1)}, p),
        "two of its tensors are named 'model.a'",
    ),
    "nested tensors": (
        lambda p: torch.save({"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, p),
        "nested|cannot read weights",
    ),
}


def zipped(path: Path, name: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"archive/{name}", "x")


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_files_that_are_refused_say_what_they_are(kind: str, tmp_path: Path) -> None:
    write, words = REFUSED[kind]
    write(tmp_path / "w.pt")
    with pytest.raises(UserError, match=words) as caught:
        load(tmp_path / "w.pt")
    assert str(tmp_path / "w.pt") in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch advises to switch it off, which would run code


def test_real_programs_are_refused(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(Net().eval(), (torch.zeros(1, 3, 8, 8),)), tmp_path / "w.pt2")
    with pytest.raises(UserError, match=r"torch\.export\.load"):
        load(tmp_path / "w.pt2")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    where=st.integers(0, 10**6),
    byte=st.integers(0, 255),
    kind=st.sampled_from(["zip", "before torch 1.6", "safetensors by another name"]),
)
def test_a_file_with_any_byte_changed_or_cut_there_is_read_or_refused(
    where: int, byte: int, kind: str, tmp_path: Path
) -> None:
    READ[kind](tmp_path / "w.pt")
    content = bytearray((tmp_path / "w.pt").read_bytes())
    where %= len(content)
    content[where] = byte
    for damaged in (content, content[:where]):
        (tmp_path / "w.pt").write_bytes(damaged)
        try:
            load(tmp_path / "w.pt")
        except UserError as error:
            assert str(error)


@pytest.mark.parametrize("name", ["~nosuchuser/w.pt", "no/w.pt", "w\0.pt", "x" * 300])
def test_paths_that_are_none(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (None, str(tmp_path)):
        monkeypatch.setenv("SECATEUR_DATA", data) if data else monkeypatch.delenv("SECATEUR_DATA", raising=False)
        with pytest.raises(UserError):
            find_weights(name)
        with pytest.raises(UserError):
            paths.find(name, "weights file")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.pt")
    with pytest.raises(UserError, match="is a pipe"):
        find_weights(str(tmp_path / "w.pt"))


# -- tensors -----------------------------------------------------------------------------------------------------------


def changed(change: Callable[[torch.Tensor], torch.Tensor], names: str = "weight") -> dict[str, Any]:
    return {name: change(t.clone()) if names in name else t for name, t in state().items()}


def spoilt(t: torch.Tensor, value: float) -> torch.Tensor:
    t.view(-1)[0] = value
    return t


ODD: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "int8": (
        lambda: changed(lambda t: (10 * t).to(torch.int8)),
        r"conv\.weight: int8 in the file; .*before quantisation",
    ),
    "bool": (lambda: changed(lambda t: t > 0), "bool in the file"),
    "float8": (lambda: changed(lambda t: t.to(torch.float8_e4m3fn)), "float8_e4m3fn in the file"),
    "complex": (lambda: changed(lambda t: t.to(torch.complex64)), "complex64 in the file"),
    "meta": (lambda: changed(lambda t: t.to("meta")), "a shape and no values"),
    "NaN": (lambda: changed(lambda t: spoilt(t, float("nan"))), r"conv\.weight: 1 of 108 values are NaN or infinite"),
    "infinity": (lambda: changed(lambda t: spoilt(t, -float("inf"))), "1 of 108 values are NaN or infinite"),
    "too large for float32": (lambda: changed(lambda t: spoilt(t.double(), 1e300)), "NaN or infinite"),
    "NaN in statistics": (lambda: changed(lambda t: spoilt(t, float("nan")), "running_mean"), "running_mean: 1 of 4"),
    "negative variances": (lambda: changed(lambda t: t - 2, "running_var"), "running_var: variances below 0"),
    "transposed": (lambda: changed(lambda t: t.mT if t.ndim == 2 else t), r"\(4, 3\) in the file, \(3, 4\) in the net"),
    "a giant that is one number": (
        lambda: changed(lambda t: torch.ones(1).expand(10**6, 10**6) if t.ndim == 2 else t),
        r"\(1000000, 1000000\) in the file",
    ),
}


@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_cannot_be_a_networks_weights(kind: str, tmp_path: Path) -> None:
    make, words = ODD[kind]
    torch.save(make(), tmp_path / "w.pt")
    with pytest.raises(UserError, match=words):
        load(tmp_path / "w.pt")


def test_quantised_tensors_are_refused() -> None:
    from secateur.pipeline.workloads.weights.tensors import kind_fault

    class Quantised:
        shape, dtype = (1,), torch.quint8
        is_meta, is_quantized = False, True

    assert "quint8" in kind_fault(Quantised(), torch.ones(1))  # type: ignore[arg-type]


FINE: dict[str, Callable[[], dict[str, Any]]] = {
    "sparse": lambda: changed(lambda t: t.to_sparse()),
    "compressed rows": lambda: changed(lambda t: t.to_sparse_csr() if t.ndim == 2 else t),
    "half": lambda: changed(lambda t: t.half()),
    "bfloat16": lambda: changed(lambda t: t.bfloat16()),
    "double": lambda: changed(lambda t: t.double()),
    "strided": lambda: changed(lambda t: t.mT.contiguous().mT if t.ndim == 2 else t),
    "counters as floats": lambda: changed(lambda t: t.float(), "tracked"),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("kind", FINE)
def test_tensors_that_become_the_networks(kind: str, tmp_path: Path) -> None:
    torch.save(FINE[kind](), tmp_path / "w.pt")
    found = load(tmp_path / "w.pt").state_dict()
    for name, tensor in state().items():
        assert found[name].dtype == tensor.dtype
        assert found[name].layout == torch.strided
        assert torch.allclose(found[name].double(), tensor.double(), atol=1e-2)


def test_a_mask_with_infinities_of_its_own_may_keep_them() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
    fit_weights(model, dict(model.state_dict()), "FILE", "net")


# -- what messages say -------------------------------------------------------------------------------------------------


def test_a_file_of_another_network_is_described(tmp_path: Path) -> None:
    other = {"stem.weight": torch.ones(3), "last.bias": torch.ones(3)}
    torch.save({"model": other, "epoch": 3, "optimizer": {}, 7: 1}, tmp_path / "w.pt")
    with pytest.raises(UserError) as caught:
        load(tmp_path / "w.pt")
    for part in (
        "do not fit network net",
        "conv.weight: not in the file",
        "and 3 more",
        "The file holds model (mapping of 2, 2 of them tensors), epoch (int), optimizer (empty mapping), 7, a key",
        "1 of the network's 9 tensors are there",
        "Set model.name",
    ):
        assert part in str(caught.value)


def test_a_last_layer_for_other_classes_is_named(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "w.safetensors")
    with pytest.raises(UserError) as caught:
        load(tmp_path / "w.safetensors", ("cat", "dog"))
    for part in ("for 3 classes, the data has 2 (cat, dog)", "last.weight: (3, 4) in the file", "leave it out"):
        assert part in str(caught.value)


def test_names_of_a_file_move_no_cursor(tmp_path: Path) -> None:
    torch.save({"\x1b[2J": 3, "a\nb": {"c": torch.ones(1)}}, tmp_path / "w.pt")
    with pytest.raises(UserError) as caught:
        load(tmp_path / "w.pt")
    assert "\x1b" not in str(caught.value)
    assert "a\nb" not in str(caught.value)
