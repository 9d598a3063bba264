from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from secateur.export import ExportedModel, ExportError, describe, export_onnx, predict, verify_parity
from secateur.export.onnx_export import renamed, write_atomically
from tests.export.nets import Flat, Mobile, prepared

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return prepared(Flat())


@pytest.fixture(scope="module")
def exported(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    return export_onnx(model, X, tmp_path_factory.mktemp("onnx") / "flat.onnx", plan_digest="abc")


def test_what_is_written_is_what_is_described(exported: ExportedModel):
    assert exported == describe(exported.path, plan_digest="abc")
    assert exported.opset == 20
    assert exported.size_bytes == exported.path.stat().st_size
    assert (exported.inputs["input"].shape, exported.inputs["input"].dtype) == ((1, 3, 8, 8), "float32")
    assert exported.outputs["logits"].shape == (1, 5)
    assert [p.name for p in exported.path.parent.iterdir()] == ["flat.onnx"]  # one file, nothing left over
    exported.verify_unchanged()


def test_no_local_paths_in_the_file(exported: ExportedModel):
    data = exported.path.read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in data
    assert b"site-packages" not in data
    assert b"stack_trace" not in data


def test_dictionary_round_trip(exported: ExportedModel):
    assert ExportedModel.from_dict(json.loads(json.dumps(exported.to_dict()))) == exported
    with pytest.raises(ExportError, match=r"ExportedModel\.to_dict"):
        ExportedModel.from_dict({"path": "x"})


def test_parity_and_prediction(exported: ExportedModel, model: nn.Module):
    batches = torch.randn(7, 1, 3, 8, 8)
    parity = verify_parity(exported, model, batches)
    assert parity.ok
    assert parity.max_relative_error < 1e-5
    assert (parity.argmax_agreement, parity.samples, parity.reason) == (1.0, 7, "")
    seen: list[tuple[int, int]] = []
    found = predict(exported, batches[:, 0].numpy(), progress=lambda done, total: seen.append((done, total)))
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(found), model(batches[:, 0]), rtol=1e-4, atol=1e-5)
    assert seen[-1] == (7, 7)


def test_parity_fails_for_another_model(exported: ExportedModel):
    parity = verify_parity(exported, prepared(Flat(), seed=1), torch.randn(5, 1, 3, 8, 8))
    assert not parity.ok
    assert parity.max_relative_error > 0.1
    assert "exceeds" in parity.reason
    wider = nn.Sequential(nn.Flatten(), nn.Linear(192, 6))
    parity = verify_parity(exported, wider, [X])
    assert not parity.ok
    assert "shapes" in parity.reason


def test_parity_fails_for_nan(exported: ExportedModel):
    broken = prepared(Flat())
    nn.init.constant_(broken.classifier[2].bias, float("nan"))
    assert not verify_parity(exported, broken, [X]).ok


def test_parity_and_prediction_need_data(exported: ExportedModel, model: nn.Module):
    with pytest.raises(ExportError, match="at least one batch"):
        verify_parity(exported, model, [])
    with pytest.raises(ExportError, match="no samples"):
        predict(exported, X.numpy()[:0])


def test_dynamic_batch(tmp_path: Path):
    model = prepared(Mobile())
    exported = export_onnx(model, X, tmp_path / "m.onnx", dynamic_batch=True)
    assert exported.inputs["input"].shape[0] == "batch"
    assert verify_parity(exported, model, [torch.randn(n, 3, 8, 8) for n in (1, 2, 5)]).ok
    assert predict(exported, torch.randn(40, 3, 8, 8).numpy()).shape == (40, 4)


def test_static_batch_pads_the_last_one(tmp_path: Path):
    model = prepared(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))
    exported = export_onnx(model, X.repeat(4, 1, 1, 1), tmp_path / "m.onnx")
    inputs = torch.randn(6, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(predict(exported, inputs.numpy())), model(inputs))


def test_opset_that_the_exporter_ignores(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(ExportError, match="asked for opset 13, the exporter wrote 18"):
        export_onnx(model, X, tmp_path / "m.onnx", opset=13)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")
    assert export_onnx(model, X, tmp_path / "m.onnx", opset=18).opset == 18


def test_modes_are_restored_module_by_module(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.BatchNorm1d(2))
    model[2].eval()
    exported = export_onnx(model, torch.ones(1, 2), tmp_path / "m.onnx")
    assert [m.training for m in model] == [True, True, False]
    assert verify_parity(exported, model, [torch.randn(1, 2)]).ok  # dropout was off in both
    assert [m.training for m in model] == [True, True, False]
    assert capfd.readouterr() == ("", "")


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("not \x1b[31mready\nat all")


@pytest.mark.parametrize(
    ("part", "code", "said"),
    [
        (DataDependent, "return x * 2 if x.sum() > 0 else x", "depend"),
        (Bessel, "return torch.special.bessel_j0(x)", "operator prims.bessel_j0"),
        (Broken, "raise RuntimeError(", "RuntimeError: not ready"),
    ],
)
def test_what_cannot_be_exported_is_told_in_three_lines(
    part: type[nn.Module], code: str, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, 3, 1))
    model.add_module("neck", part())
    with pytest.raises(ExportError) as caught:
        export_onnx(model, X, tmp_path / "m.onnx")
    where, what, fix = str(caught.value).split("\n")
    assert where.startswith(f"torch.onnx cannot export Sequential at neck ({part.__name__}), test_export.py line ")
    assert code in where and said in f"{what} {fix}" and fix.endswith(".")
    assert str(caught.value).replace("\n", "").isprintable()
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")


def test_a_file_says_what_it_is(tmp_path: Path):
    facts = {"classes": ["cat", "däg"], "mean": [0.5], "note": "", "run": "r1", "nothing": None}
    path = tmp_path / "m.onnx"
    model = prepared(Mobile())
    exported = export_onnx(model, X, path, plan_digest="abc", metadata=facts)
    told = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert told.keys() == {"classes", "mean", "plan_digest", "precision", "run"} and list(told) == sorted(told)
    assert json.loads(told["classes"]) == facts["classes"] and (told["run"], told["plan_digest"]) == ("r1", "abc")
    assert verify_parity(exported, model, [X]).ok


def test_inputs_and_outputs_have_the_names_that_are_chosen(tmp_path: Path):
    model = prepared(Mobile())
    exported = export_onnx(model, X, tmp_path / "m.onnx")
    proto = onnx.load(exported.path)
    renamed(proto, {"input": "pixels", "logits": "scores"})
    write_atomically(exported.path, proto.SerializeToString())
    again = describe(exported.path)
    assert (list(again.inputs), list(again.outputs)) == (["pixels"], ["scores"])
    assert verify_parity(again, model, [X]).ok
    inner = proto.graph.node[0].output[0]
    with pytest.raises(ExportError, match="is the name of another tensor"):
        renamed(proto, {"scores": inner})


def test_damaged_and_changed_files(exported: ExportedModel, tmp_path: Path):
    data = exported.path.read_bytes()
    copy = tmp_path / "m.onnx"
    copy.write_bytes(data)
    record = describe(copy)
    copy.write_bytes(data[:-1] + b"\x01")
    with pytest.raises(ExportError, match="has changed since its export"):
        record.verify_unchanged()
    copy.write_bytes(data[:100])
    with pytest.raises(ExportError, match="export it again"):
        describe(copy)
    with pytest.raises(ExportError, match="cannot open"):
        predict(copy, X.numpy())
    copy.write_bytes(onnx.ModelProto().SerializeToString())
    with pytest.raises(ExportError, match="no valid ONNX model"):
        describe(copy)
    with pytest.raises(ExportError, match="cannot read"):
        describe(tmp_path / "none.onnx")
