"""Layers of an int8 network that stay in float: which mixtures are tried, and that they are what is evaluated."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from secateur.export.quantize import layers_in_float
from secateur.pipeline.config.faults import FaultsError
from secateur.pipeline.errors import UserError
from secateur.pipeline.run.layer_precisions import mixtures
from tests.pipeline.helpers import opened, perform, tiny_config


def test_mixtures_leave_the_first_and_the_most_sensitive_layers_in_float() -> None:
    errors = {f"layer{i}": 0.01 for i in range(20)} | {"layer7": 0.5, "layer12": 0.3}
    assert mixtures("int8", errors) == (
        "int8",
        "int8 except layer0",
        "int8 except layer0, layer1, layer2",
        "int8 except layer0, layer7, layer12",
    )
    assert mixtures("int8", {"a": 1.0, "b": 0.1}) == ("int8", "int8 except a")
    assert mixtures("int8", {"a": 1.0}) == ("int8",)


@pytest.mark.parametrize(
    ("precision", "ships"),
    [("int8", ("int8",)), (["fp32", "int8"], ("fp32", "int8")), ({"ship": "int8", "layers": True}, ("int8",))],
)
def test_one_word_a_list_or_a_section(tmp_path: Path, precision: object, ships: tuple[str, ...]) -> None:
    config = tiny_config(tmp_path, precision=precision)
    assert config.ships == ships and config.layers_may_differ == isinstance(precision, dict)


def test_layers_are_about_integers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match=r"precision: layers: true is about networks of integers; put int8 among"):
        opened(tiny_config(tmp_path, precision={"ship": ["fp32"], "layers": True}))
    with pytest.raises(FaultsError, match=r"precision.*layer"):
        tiny_config(tmp_path, precision={"ship": ["int8"], "layer": True})


@pytest.mark.slow
def test_a_run_tries_mixtures_and_ships_the_one_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))
    search = {"method": "uniform", "options": {}, "target": {"macs_ratio": 0.6}}
    precision = {"ship": ["int8"], "layers": True}
    config = tiny_config(tmp_path, precision=precision, search=search, finetune={"top": 1})
    with opened(config) as run:
        facts = perform(run, until="export")
        found = facts.search.layer_precisions
        assert found is not None and len(found.tried) == 4 and found.tried[0] == "int8"
        (line,) = [record for record in run.journal.records if record.get("stage") == "precision"]
        assert line["sensitivity"]["int8"].keys() == found.sensitivity["int8"].keys()
        records = [r for r in run.journal.records if "candidate" in r and r["stage"] == "search"]
        assert records and all(r["evaluation"]["scored"] == 4 for r in records)
        chosen = facts.finetune.best.evaluation.precision
        assert chosen in found.tried and facts.export.compact.artifact.precision == chosen
        file = onnx.load(run.directory / "compact.onnx")
        stored = {tensor.name: tensor.data_type for tensor in file.graph.initializer}
        for layer in layers_in_float(chosen):
            assert stored[f"{layer}.weight"] == onnx.TensorProto.FLOAT
