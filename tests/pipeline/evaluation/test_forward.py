"""Which forward pass an accuracy comes from is known, and a deterministic search never takes another one in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from secateur.pipeline.evaluation.deterministic import DeterministicInference
from secateur.pipeline.evaluation.inference import FORWARDS, PLAIN, ForwardError, Inference
from secateur.pruning.plan import PruningPlan
from tests.pipeline.evaluation.test_inference import (
    BATCHES,
    CPU,
    Branching,
    Residual,
    assert_plain,
    inference,
    random_plan,
    template,
    traced,
)

ONNX = FORWARDS["_onnx"]


def deterministic(kind: Callable[[], nn.Module], **options: Any) -> DeterministicInference:
    model, graph = traced(kind)
    return DeterministicInference(
        model, graph, lambda: BATCHES, lambda: template(kind), compute=CPU, threads=1, **options
    )


def failing(engine: Inference, monkeypatch: pytest.MonkeyPatch, times: int, at: str, error: Exception) -> None:
    """Have ONNX Runtime fail so many times: when a candidate is prepared, or at its second batch."""
    real, left = engine._onnx, times

    def _onnx(plan: Any, state: Any) -> Any:
        nonlocal left
        if at == "prepare" and left > 0:
            left -= 1
            raise error
        run = real(plan, state)

        def runs(number: int, images: Any) -> Any:
            nonlocal left
            if at == "run" and number == 1 and left > 0:
                left -= 1
                raise error
            return run(number, images)

        return runs

    list(engine.outputs(PruningPlan.full(engine.graph.groups)))  # backends are tried
    monkeypatch.setattr(engine, "_onnx", _onnx)
    monkeypatch.setattr(engine, "_fast", _onnx)
    monkeypatch.setattr(engine, "_exact", _onnx)


@pytest.mark.parametrize("at", ["prepare", "run"])
def test_deterministic_inference_tries_the_same_way_again(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = deterministic(Residual)
    plan = random_plan(engine.graph, 0)
    expected = list(engine.outputs(plan))
    failing(engine, monkeypatch, 1, at, RuntimeError("hiccup"))
    monkeypatch.setattr(engine, "_plain", None)  # nothing may fall back
    found = list(engine.outputs(plan))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert engine.used == ONNX


@pytest.mark.parametrize("at", ["prepare", "run"])
def test_deterministic_inference_that_fails_twice_is_an_error_with_the_fix(
    at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = deterministic(Residual)
    failing(engine, monkeypatch, 2, at, RuntimeError("no kernel"))
    monkeypatch.setattr(engine, "_plain", None)
    with pytest.raises(ForwardError, match=r"failed twice .* no kernel.*resume.*search\.forward: auto"):
        list(engine.outputs(random_plan(engine.graph, 0)))


@pytest.mark.parametrize("at", ["prepare", "run"])
def test_auto_goes_on_by_the_plain_network_and_says_so(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = inference(Residual, bf16=False)
    failing(engine, monkeypatch, 1, at, RuntimeError("no kernel"))
    plan = random_plan(engine.graph, 0)
    assert_plain(list(engine.outputs(plan)), Residual, plan)
    assert engine.used == f"{PLAIN}, for {ONNX} failed: RuntimeError: no kernel"
    list(engine.outputs(plan))
    assert engine.used == ONNX  # the next candidate


@pytest.mark.parametrize("make", [deterministic, inference])
@pytest.mark.parametrize("at", ["prepare", "run"])
@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError()])
def test_no_forward_pass_mends_a_lack_of_memory(
    make: Any, at: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(Residual, bf16=False)
    failing(engine, monkeypatch, 1, at, error)
    monkeypatch.setattr(engine, "_plain", None)
    with pytest.raises(type(error)):
        list(engine.outputs(random_plan(engine.graph, 0)))


@pytest.mark.parametrize(("kind", "used"), [(Residual, ONNX), (Branching, PLAIN)])
def test_what_is_chosen_is_said_without_a_time_that_nobody_took(kind: type[nn.Module], used: str) -> None:
    engine = deterministic(kind)
    list(engine.outputs(random_plan(engine.graph, 0)))
    assert engine.used == used
    first, *more = engine.describe().splitlines()
    assert first.startswith(used.split(",")[0])
    assert "nan" not in first
    assert bool(more) == (used == PLAIN)  # why it is not ONNX Runtime


@pytest.mark.parametrize("failure", [RuntimeError("invalid graph"), ValueError("unknown operator")])
def test_whatever_keeps_onnx_runtime_from_a_network_is_a_reason_for_all_of_its_candidates(
    failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = deterministic(Residual)
    monkeypatch.setattr(engine, "_open_template", lambda: (_ for _ in ()).throw(failure))
    assert engine.backend == "plain"
    assert str(failure) in engine.describe()
    told = deterministic(Residual, backend="onnx")  # another process found that it works
    monkeypatch.setattr(told, "_open_template", lambda: (_ for _ in ()).throw(failure))
    with pytest.raises(type(failure)):
        list(told.outputs(random_plan(told.graph, 0)))
