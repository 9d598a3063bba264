"""Candidates in several precisions: which one is chosen, what its numbers are of, what may go wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from secateur.device_profiles import load_profile, open_target
from secateur.export import ExportError, TemplateError, open_session
from secateur.pipeline.config.schema import FinetuneSection, SearchSection
from secateur.pipeline.devices.fleet import Device, Fleet
from secateur.pipeline.evaluation import precisions
from secateur.pipeline.evaluation.baseline import Baseline
from secateur.pipeline.evaluation.evaluator import Evaluator, make_evaluator
from secateur.pipeline.evaluation.latency import plan_of, random_widths
from secateur.pipeline.run.records import to_dict, to_evaluation
from secateur.pipeline.training.statistics import recalibrate, training_images
from secateur.pipeline.workloads.data.record import Member
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import PruningPlan, SearchSpace
from secateur.pruning.saliency import uniform_plan
from secateur.pruning.search.protocol import Candidate, Evaluation, Predict, Time
from secateur.pruning.trace import trace
from tests.pipeline.helpers import digits, quick_device

WORKLOAD = digits(image_size=8)
Network = tuple[nn.Module, ChannelGraph]


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    model = WORKLOAD.build_model()
    recalibrate(model, training_images(WORKLOAD, WORKLOAD.train, 512, torch.device("cpu")))
    return model, trace(model, WORKLOAD.example_input())


@pytest.fixture
def make(network: Network, tmp_path: Path) -> Iterator[Any]:
    profile = load_profile(quick_device(tmp_path))
    target = open_target(profile)

    def build(*names: str, mode: str = "measure", **options: Any) -> Evaluator:
        baseline, fleet = Baseline(*network, WORKLOAD, seed=1), Fleet([Device(profile, target)])
        settings = SearchSection(images=200, latency={"mode": mode, "measurements": 6, "max_error": 9.0})
        return make_evaluator(baseline, fleet, tmp_path / "c", settings, FinetuneSection(), precisions=names, **options)

    yield build
    target.close()


@pytest.fixture(scope="module")
def chosen(network: Network) -> Candidate:
    return Candidate(1, uniform_plan(network[1], 0.6, model=network[0], saliency="random", seed=0), "test")


def test_accuracy_is_of_the_very_file_that_ships(make: Any, chosen: Candidate) -> None:
    evaluator = make("int8")
    found = evaluator.evaluate(chosen, latency=True)
    assert (found.status, found.precision, found.scored, found.forward) == ("ok", "int8", 1, "ONNX Runtime, int8")
    accuracy = evaluator.accuracy
    images = accuracy.recalibration_images("", chosen.plan, final=False)
    state = accuracy.inference.recalibrated(chosen.plan, None, accuracy.training(images))
    file = accuracy.precisions.network("int8", chosen.plan, state, lambda: pytest.fail("it can be cut"))
    session, answers, labels = open_session(file), [], []
    for batch, targets in accuracy.batches():
        answers += [session.run(None, {"input": image[None].numpy()})[0] for image in batch]
        labels.append(targets)
    outputs = torch.from_numpy(np.concatenate(answers))
    assert found["top1"] == pytest.approx(WORKLOAD.metrics(outputs, torch.cat(labels))["top1"])
    in_float = make("fp32").evaluate(chosen, latency=True)
    assert found["loss"] != in_float["loss"] and abs(found["top1"] - in_float["top1"]) <= 0.03
    assert found["size_bytes"] < in_float["size_bytes"] and found["latency_ratio"] != in_float["latency_ratio"]
    assert to_evaluation(to_dict(found)) == found


def test_the_best_by_merit_is_chosen_and_each_one_tried_counts(make: Any, chosen: Candidate) -> None:
    evaluator = make("fp32", "int8")
    assert evaluator.evaluate(chosen, latency=True).precision == "fp32"  # there is nothing to choose by yet
    for wanted, merit in (("int8", lambda e: -e["size_bytes"]), ("fp32", lambda e: e["size_bytes"])):
        evaluator.prefer(merit)
        found = evaluator.evaluate(chosen, latency=True)
        assert (found.precision, found.scored) == (wanted, 2)
        assert to_evaluation(to_dict(found)) == found
    assert evaluator.evaluate(chosen, latency=False).scored == 1
    whole = Candidate(0, evaluator.accuracy.baseline.full, "reference")
    assert evaluator.evaluate(whole, latency=True).precision == "fp32"  # what all ratios are to
    assert evaluator.exact(chosen, "int8").precision == "int8"


def test_one_that_cannot_reach_the_floor_in_float_is_not_tried_in_less(make: Any, chosen: Candidate) -> None:
    evaluator = make("fp32", "int8")
    evaluator.prefer(lambda evaluation: evaluation["top1"])
    found = evaluator.evaluate(chosen, latency=True, floor=0.999)
    assert (found.status, found.scored) == ("infeasible", 1)


def test_a_remembered_answer_is_of_its_precision(make: Any, chosen: Candidate) -> None:
    evaluator = make("int8", "fp32")
    evaluator.remember(chosen, False, Evaluation(metrics={"top1": 0.25}, precision="int8"))
    assert evaluator.evaluate(chosen, latency=False)["top1"] == 0.25
    assert evaluator.exact(chosen)["top1"] != 0.25


def test_plans_are_timed_in_what_ships_and_no_model_of_fp32_answers_for_int8(make: Any, chosen: Candidate) -> None:
    evaluator = make("int8")
    timed = evaluator.evaluate(chosen, latency=True)["latency_ratio"]
    full = evaluator.accuracy.baseline.full
    assert evaluator.time(Time((full, chosen.plan))).tolist() == [1.0, timed]
    assert evaluator.predict(Predict()) == {}


def test_a_model_of_int8_learns_from_int8_alone_and_answers_for_int8(make: Any, chosen: Candidate) -> None:
    space = SearchSpace.of(make("fp32").graph.groups)
    evaluator = make("int8", mode="auto", space=space)
    oracle = evaluator.precisions["int8"]
    full = evaluator.accuracy.baseline.full
    evaluator.latency(full, precision="int8")
    oracle.model()
    assert len(oracle.samples) == 6 and not evaluator.latencies.samples, "every profile of int8 was read"
    found = [evaluator.latency(plan, exact=False, precision="int8") for plan in random_plans(space, 2)]
    predicted = [figures for figures in found if not figures["latency_measured"]]
    assert oracle.report()["predicted"] == len(predicted)
    assert evaluator.latency_report()["precisions"]["int8"]["samples"] == 6
    sizes = {figures["size_bytes"] for figures in found}
    assert max(sizes) < len(evaluator.files.template().slice(full)) / 2, "sizes are those of files in int8"


def random_plans(space: SearchSpace, count: int) -> list[PruningPlan]:
    return [plan_of(space.full, widths) for widths in random_widths(space, count, np.random.default_rng(5))]


def test_what_cannot_be_cut_is_quantised_from_the_beginning_and_said(
    make: Any, chosen: Candidate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cut = make("int8").evaluate(chosen, latency=False)

    def refuse(*_: Any, **__: Any) -> None:
        raise TemplateError("it follows another rule")

    monkeypatch.setattr(precisions.QuantisedTemplate, "make", refuse)
    with caplog.at_level(logging.WARNING):
        whole = make("int8").evaluate(chosen, latency=False)
    assert abs(whole["top1"] - cut["top1"]) <= 0.03
    assert "quantised from the beginning, which takes seconds: it follows another rule" in caplog.text


Batches = Callable[[torch.Tensor], torch.Tensor]


def with_nan(images: torch.Tensor) -> torch.Tensor:
    images[17, 0, 3, 3] = float("nan")
    return images


def mostly_empty(images: torch.Tensor) -> torch.Tensor:
    images[5:] = 0.25
    return images


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_nan, r"NaN or infinite numbers, the first one in image 17 \(photos/17\.jpg\); look at how it is read"),
        (mostly_empty, r"195 of 200 are one number each, the first one image 5 \(photos/5\.jpg\)"),
        (lambda images: torch.zeros_like(images), r"all the same number \(0\)"),
        (lambda images: images[:, :, :4], r"have the shape \(1, 4, 8\), the network takes \(1, 8, 8\)"),
        (lambda images: images.repeat(1, 3, 1, 1), r"have the shape \(3, 8, 8\)"),
    ],
    ids=["NaN", "mostly empty", "all empty", "another size", "other channels"],
)
def test_training_images_that_say_nothing_of_ranges_are_refused(
    make: Any, monkeypatch: pytest.MonkeyPatch, change: Batches, said: str
) -> None:
    split, cpu = WORKLOAD.train.first(200), torch.device("cpu")
    images = torch.cat(list(training_images(WORKLOAD, split, 200, cpu))).clone()
    monkeypatch.setattr(precisions, "calibration_images", lambda *_: change(images))
    members = tuple(Member("train", f"photos/{i}.jpg", "00") for i in range(300))
    monkeypatch.setattr(WORKLOAD, "record", replace(WORKLOAD.record, files=True, members=members))
    made = make("int8").accuracy.precisions
    with pytest.raises(ExportError, match=said):
        made.calibration("int8")


def test_too_few_training_images_cannot_calibrate(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WORKLOAD, "train", WORKLOAD.train.first(15))
    made = make("int8").accuracy.precisions
    with pytest.raises(ExportError, match=r"15 images are too few .* it takes 16 at least: give the run more"):
        made.calibration("int8")


def test_a_task_of_ones_own_may_name_the_images_that_calibrate(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.rand(20, 1, 8, 8)
    monkeypatch.setattr(WORKLOAD, "calibration", lambda: own, raising=False)
    np.testing.assert_array_equal(make("int8").accuracy.precisions.calibration("int8").images, own.numpy())
    own = own[:3]
    with pytest.raises(ExportError, match=r"3 images are too few .* let the task's calibration\(\) give more"):
        make("int8").accuracy.precisions.calibration("int8")
