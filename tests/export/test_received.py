"""ONNX files that somebody else made, hostile ones among them: refused in one sentence, by kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from secateur.export.errors import ExportError
from secateur.export.received import check_received

Change = Callable[[onnx.ModelProto], None]


def model() -> onnx.ModelProto:
    """A convolution and an activation."""
    weight = numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "weight")
    nodes = [helper.make_node("Conv", ["x", "weight"], ["y"], name="c"), helper.make_node("Relu", ["y"], ["z"])]
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8]),
        helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 4, 6, 6]),
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def external(place: str) -> Change:
    def change(made: onnx.ModelProto) -> None:
        tensor = made.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", place

    return change


def in_an_attribute(made: onnx.ModelProto) -> None:
    """Weights elsewhere, hidden in a constant of a branch."""
    inner = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.ones(3, np.float32), "k"))
    tensor = inner.attribute[0].t
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    branch = helper.make_graph([inner], "b", [], [helper.make_tensor_value_info("k", TensorProto.FLOAT, [3])])
    made.graph.node.append(helper.make_node("If", ["c"], ["w"], then_branch=branch, else_branch=branch))


def cyclic(made: onnx.ModelProto) -> None:
    made.graph.node[0].input[0] = "z"


def without_operators(made: onnx.ModelProto) -> None:
    del made.graph.node[:]


def wide_weight(made: onnx.ModelProto) -> None:
    made.graph.initializer[0].dims[0] = 1 << 40


def negative_weight(made: onnx.ModelProto) -> None:
    made.graph.initializer[0].dims[0] = -4


def wrong_weight(made: onnx.ModelProto) -> None:
    made.graph.initializer[0].dims[0] = 5


def wide_input(made: onnx.ModelProto) -> None:
    made.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 1 << 31


def negative_input(made: onnx.ModelProto) -> None:
    made.graph.input[0].type.tensor_type.shape.dim[2].dim_value = -8


def control_codes(made: onnx.ModelProto) -> None:
    made.graph.node[0].op_type = "\x1b[31mConv\nred"


HOSTILE: dict[str, tuple[Change, str]] = {
    "weights in another folder": (external("../../../secret.bin"), "outside of its folder"),
    "weights at a root": (external("/etc/passwd"), "outside of its folder"),
    "weights at a drive": (external("C:\\secret.bin"), "outside of its folder"),
    "weights beside it": (external("weights.bin"), "save it as a single file"),
    "weights elsewhere in a branch": (in_an_attribute, "outside of its folder"),
    "a cycle": (cyclic, "no valid ONNX model"),
    "no operator": (without_operators, "no operator"),
    "a weight of terabytes": (wide_weight, "tensor 'weight' claims the shape"),
    "a weight of negative size": (negative_weight, "tensor 'weight' claims the shape"),
    "a weight of another size than it says": (wrong_weight, "no valid ONNX model"),
    "an input of gigabytes": (wide_input, "input 'x' claims the shape"),
    "an input of negative size": (negative_input, "input 'x' claims the shape"),
    "control codes in a name": (control_codes, "no valid ONNX model"),
}


def hostile(kind: str, folder: Path) -> tuple[Path, str]:
    """A file of a kind, and what is said of it."""
    change, said = HOSTILE[kind]
    made, file = model(), folder / "theirs.onnx"
    change(made)
    file.write_bytes(made.SerializeToString())
    return file, said


def test_a_model_in_one_piece_passes(tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    file.write_bytes(model().SerializeToString())
    check_received(file)


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_in_one_sentence(kind: str, tmp_path: Path) -> None:
    file, said = hostile(kind, tmp_path)
    with pytest.raises(ExportError) as caught:
        check_received(file)
    text = str(caught.value)
    assert said in text and text.startswith("theirs.onnx")
    assert text.isprintable() and len(text) < 400


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(share: float, tmp_path: Path) -> None:
    file, content = tmp_path / "m.onnx", model().SerializeToString()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ExportError, match=r"m\.onnx (is damaged or )?(is )?no valid ONNX model"):
        check_received(file)


@pytest.mark.parametrize("content", [b"\x00" * 64, b"<html>not found</html>", b"PK\x03\x04", b"\xff" * 999])
def test_another_kind_of_file_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    file.write_bytes(content)
    with pytest.raises(ExportError, match="no valid ONNX model"):
        check_received(file)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    with file.open("wb") as large:
        large.truncate((1 << 31) + 5)  # a sparse file
    with pytest.raises(ExportError, match=r"has 2\.1 GB, and an ONNX file holds 2 GB at most"):
        check_received(file)


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none.onnx"):
        with pytest.raises(ExportError, match="cannot be read"):
            check_received(place)
