"""Several devices in one run: measured at once, combined honestly, and each one's faults its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto

from secateur.device_profiles import DeviceError, Ratio
from secateur.device_profiles.profile import Multiples
from secateur.export.slicing import OnnxTemplate
from secateur.pipeline.config.reading import parse_run_file
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.devices import fleet as fleets
from secateur.pipeline.devices.device import meet
from secateur.pipeline.devices.fleet import Device, Fleet, Tally
from secateur.pipeline.errors import SurroundingsError, UserError
from secateur.pipeline.evaluation.baseline import Baseline
from secateur.pipeline.evaluation.evaluator import Evaluator, make_evaluator
from secateur.pipeline.evaluation.fleet_latency import FleetLatencies, mean_of, worst_of
from secateur.pipeline.evaluation.latency import LATENCIES
from secateur.pipeline.evaluation.onnx_files import SharedFiles
from secateur.pipeline.progress import Silent
from secateur.pipeline.report import final_table
from secateur.pipeline.run.facts import Facts
from secateur.pipeline.run.opening import device_profiles
from secateur.pipeline.run.run import Run, create_run_directory
from secateur.pipeline.run.widths import common_multiples
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import PruningPlan
from secateur.pruning.saliency import uniform_plan
from secateur.pruning.search.protocol import Candidate, Predict, Time
from secateur.pruning.trace import trace
from tests.device_profiles import sshd
from tests.device_profiles.layered import plain
from tests.device_profiles.tiny import quick_profile
from tests.pipeline.evaluation.test_latency import Device as Arithmetic
from tests.pipeline.helpers import QUICK_DEVICE, TINY, consent, digits, merged, perform, quick_device

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own
WORKLOAD = digits(image_size=8)


@dataclass
class MadeUp:
    """A target on which the unpruned network takes ``base_ms``, and a file of a share s of its size base_ms * s**power.

    Args:
        during: called while the agent would work, with what it reports its progress to.
        faults: raised by the next calls of ``run``, one each.
    """

    base_ms: float = 10.0
    power: float = 1.0
    during: Callable[[Any], None] = lambda progress: None
    faults: list[DeviceError] = field(default_factory=list)
    cpu: str = "Abacus"
    calls: list[str] = field(default_factory=list)

    def prepare(self) -> Mapping[str, Any]:
        self.calls.append("prepare")
        return {"device": {"cpu": self.cpu, "machine": "wood", "cpus": 4}, "runtime": {"onnxruntime": "1.0"}}

    def put(self, path: Path) -> str:
        return str(path)

    def run(self, request: Mapping[str, Any], timeout_s: float, progress: Any = None) -> dict[str, Any]:
        self.calls.append("run")
        if self.faults:
            raise self.faults.pop(0)
        self.during(progress)
        sizes = {model["name"]: Path(model["path"]).stat().st_size for model in request["models"]}
        models = {}
        for name, size in sizes.items():
            ms = self.base_ms * (size / sizes["baseline"]) ** self.power
            times = {"wall_ms": [ms] * 5, "cpu_ms": [ms] * 5, "load_ms": 1.0, "first_ms": ms, "output_sha256": "00"}
            models[name] = {**times, "peak_rss_bytes": 1000}
        return {"models": models, "environment": {}, "started": 0.0, "ended": 1.0}

    def fetch(self, path: str, to: Path) -> None: ...

    def close(self) -> None: ...


def device(name: str, target: Any = None, host: str = "") -> Device:
    """A device on a machine of its own, or on that of a name."""
    profile = quick_profile(name=name, target="ssh", connect={"host": host or name})
    return Device(profile, target or MadeUp())


@pytest.fixture(scope="module")
def network() -> tuple[Any, ChannelGraph]:
    model = WORKLOAD.build_model().eval()
    return model, trace(model, WORKLOAD.example_input())


@pytest.fixture(scope="module")
def template(network: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network exported once, for all evaluators."""
    model, graph = network
    file = tmp_path_factory.mktemp("template") / "template.onnx"
    OnnxTemplate.export(model, WORKLOAD.example_input(), graph, file)
    return file


@pytest.fixture
def evaluator(network: Any, template: Path, tmp_path: Path) -> Callable[..., Evaluator]:
    """An evaluator on a fleet."""

    def build(devices: Sequence[Device], combine: Any = "worst", **latency: Any) -> Evaluator:
        data = merged(TINY, {"search": {"latency": {"mode": "measure", **latency}}})
        config = parse_run_file(yaml.safe_dump(data))
        fleet, folder = Fleet(devices, combine), tmp_path / "candidates"
        folder.mkdir(exist_ok=True)
        shutil.copy(template, folder)
        return make_evaluator(Baseline(*network, WORKLOAD), fleet, folder, config.search, config.finetune)

    return build


@dataclass
class Reading(MadeUp):
    """A target that looks at the number types of activations in the candidates it is sent."""

    types: list[int] = field(default_factory=list)

    def run(self, request: Mapping[str, Any], timeout_s: float, progress: Any = None) -> dict[str, Any]:
        for model in request["models"]:
            if model["name"] == "candidate":
                graph = onnx.load(model["path"]).graph
                kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
                self.types += {kinds[n.input[2]] for n in graph.node if n.op_type == "QuantizeLinear"}
        return super().run(request, timeout_s, progress)


def test_each_device_is_timed_with_the_number_types_of_its_processor(
    network: Any, template: Path, tmp_path: Path
) -> None:
    folder, targets = tmp_path / "candidates", {"x86": Reading(), "arm": Reading(), "old": Reading()}
    folder.mkdir()
    shutil.copy(template, folder)
    fleet = Fleet([device(name, target) for name, target in targets.items()])
    config = parse_run_file(yaml.safe_dump(merged(TINY, {"search": {"latency": {"mode": "measure"}}})))
    schemes = {"x86": "U8S8", "arm": "S8S8", "old": "U8S7"}
    oracle = make_evaluator(
        Baseline(*network, WORKLOAD),
        fleet,
        folder,
        config.search,
        config.finetune,
        precisions=["int8"],
        schemes=schemes,
    )
    figures = oracle.latency(some_plan(network), precision="int8")
    assert {name: set(target.types) for name, target in targets.items()} == {
        "x86": {TensorProto.UINT8},
        "arm": {TensorProto.INT8},
        "old": {TensorProto.UINT8},
    }
    assert {f"latency_ratio.{name}" for name in targets} <= set(figures)
    assert len(list(folder.glob("template.int8-*.onnx"))) == 3, "a template for each scheme"
    assert oracle.accuracy.precisions is not None
    assert oracle.accuracy.precisions.scheme == "U8S7", "accuracies are of the most careful number types"


def some_plan(network: Any, ratio: float = 0.5, seed: int = 0) -> PruningPlan:
    model, graph = network
    return uniform_plan(graph, ratio, model=model, saliency="random", seed=seed)


# -- what a fleet's latency is


def test_each_device_has_its_ratio_and_the_worst_or_the_mean_counts(network: Any, evaluator: Any) -> None:
    devices = [device("pi", MadeUp(10, 1)), device("jetson", MadeUp(2, 0.5)), device("nuc", MadeUp(1, 2))]
    plan = some_plan(network)
    for combine, expected in (("worst", max), ("mean", lambda ratios: sum(ratios) / 3)):
        oracle = evaluator(devices, combine)
        dense = oracle.evaluate(Candidate(0, PruningPlan.full(network[1].groups), "reference"), latency=True)
        assert [dense[name] for name in ("latency_ratio", "p50_ms", "p50_ms.jetson", "p50_ms.nuc")] == [1, 10, 2, 1]
        found = oracle.evaluate(Candidate(1, plan, "test"), latency=True)
        ratios = [found[f"latency_ratio.{name}"] for name in ("pi", "jetson", "nuc")]
        share = found["size_bytes"] / dense["size_bytes"]
        assert ratios == pytest.approx([share, share**0.5, share**2])
        assert found["latency_ratio"] == pytest.approx(expected(ratios))
        assert "latency_ratio_low" not in found.metrics  # one process guides the search and claims nothing
        assert found["p50_ms"] == found["p50_ms.pi"] == pytest.approx(10 * share)
        assert found["p95_ms.jetson"] == pytest.approx(2 * share**0.5)
        assert found["latency_measured"] == 1
        assert oracle.time(Time((plan,))).tolist() == [found["latency_ratio"]]


def test_one_device_says_what_it_always_said(network: Any, evaluator: Any, tmp_path: Path) -> None:
    oracle = evaluator([device("pi")])
    found = oracle.evaluate(Candidate(1, some_plan(network), "test"), latency=True)
    assert set(found.metrics) == {"macs", "params", "seconds", "loss", "top1", "loss_score", *LATENCIES} & set(
        found.metrics
    )
    assert set(LATENCIES) - set(found.metrics) == {"latency_ratio_low", "latency_ratio_high"}
    assert [path.name for path in (tmp_path / "candidates").glob("*.jsonl")] == ["latencies.jsonl"]


def test_a_resumed_fleet_shares_the_scale_of_its_reference(network: Any, evaluator: Any) -> None:
    full, plan = PruningPlan.full(network[1].groups), some_plan(network)
    reference = evaluator([device("pi", MadeUp(10)), device("nuc", MadeUp(4))]).evaluate(
        Candidate(0, full, "reference"), latency=True
    )
    slower = [MadeUp(20), MadeUp(8)]  # busy today: ratios hold
    again = evaluator([device("pi", slower[0]), device("nuc", slower[1])])
    again.calibrate(reference)
    found = again.evaluate(Candidate(1, plan, "test"), latency=True)
    for name, base in (("pi", 10), ("nuc", 4)):
        assert found[f"p50_ms.{name}"] == pytest.approx(base * found[f"latency_ratio.{name}"])
    assert [len(target.calls) for target in slower] == [1, 1]  # the reference was not measured again


def test_the_intervals_of_worst_and_mean_hold_what_they_promise() -> None:
    rng = np.random.default_rng(0)
    hit = {"worst": 0, "mean": 0}
    trials = 2000
    for _ in range(trials):
        true = rng.uniform(0.4, 0.8, 3)
        spread = rng.uniform(0.005, 0.05, 3)
        seen = true * (1 + spread * rng.standard_normal(3))
        half = 1.96 * spread * true
        ratios = [Ratio(s, s - h, s + h) for s, h in zip(seen, half, strict=True)]
        worst, mean = worst_of(ratios), mean_of(ratios)
        hit["worst"] += worst.low <= true.max() <= worst.high
        hit["mean"] += mean.low <= true.mean() <= mean.high
    assert 0.93 < hit["mean"] / trials < 0.97
    assert hit["worst"] / trials > 0.93


def test_a_less_certain_device_widens_the_interval_of_the_worst() -> None:
    found = worst_of([Ratio(0.6, 0.59, 0.61), Ratio(0.58, 0.40, 0.76)])
    assert (found.value, found.low, found.high) == (0.6, 0.59, 0.76)


def test_a_device_that_was_asked_in_one_process_leaves_worst_and_mean_without_an_interval() -> None:
    ratios = [Ratio(0.6, 0.59, 0.61), Ratio.unknown(0.7)]
    assert worst_of(ratios) == Ratio.unknown(0.7)
    assert mean_of(ratios) == Ratio.unknown(pytest.approx(0.65))


def test_only_common_multiples_are_searched() -> None:
    found = common_multiples([Multiples(conv=16, linear=5), Multiples(conv=4, linear=2), Multiples(depthwise=1)])
    assert found == Multiples(conv=16, pointwise=8, depthwise=8, linear=40)


# -- at the same time


def test_a_candidate_is_measured_on_all_devices_at_once(network: Any, evaluator: Any) -> None:
    both = threading.Barrier(3, timeout=30)  # nobody gets past it before all three are being measured

    def meet_others(progress: Any) -> None:
        both.wait()

    oracle = evaluator([device(name, MadeUp(during=meet_others)) for name in ("a", "b", "c")])
    assert oracle.latency(PruningPlan.full(network[1].groups))["latency_ratio"] == 1
    assert oracle.latency(some_plan(network))["latency_measured.c"] == 1


def test_devices_of_one_machine_take_turns(network: Any, evaluator: Any) -> None:
    inside, most = [0], [0]

    def count(progress: Any) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.05)
        inside[0] -= 1

    oracle = evaluator([device(name, MadeUp(during=count), host="same") for name in ("one-thread", "four-threads")])
    oracle.latency(some_plan(network))
    assert most == [1]


def test_a_candidates_file_is_made_once_and_gone_in_the_end(network: Any, evaluator: Any, tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=30)
    seen: list[Path] = []

    def look(progress: Any) -> None:
        both.wait()
        seen.extend((tmp_path / "candidates").glob("candidate*.onnx"))
        both.wait()

    oracle = evaluator([device("a", MadeUp(during=look)), device("b", MadeUp(during=look))])
    oracle.latency(PruningPlan.full(network[1].groups))
    oracle.latency(some_plan(network))
    assert {path.name for path in seen} == {"candidate.onnx"}
    assert not list((tmp_path / "candidates").glob("candidate*.onnx"))


def test_files_of_different_plans_have_different_names(tmp_path: Path, network: Any) -> None:
    def make(plan: PruningPlan, name: str) -> Path:
        (tmp_path / name).write_text(plan.digest)
        return tmp_path / name

    files, plans = SharedFiles(make), [some_plan(network, 0.5, seed) for seed in range(3)]
    with files.of(plans[0]) as first, files.of(plans[1]) as second:
        with files.of(plans[0]) as same:
            assert same == first
        assert first.read_text() == plans[0].digest
        assert second.read_text() == plans[1].digest
    with files.of(plans[2]) as third:
        assert third == first
    assert not list(tmp_path.iterdir())


def test_progress_of_several_devices_is_one_sum() -> None:
    seen: list[tuple[int, int, str]] = []
    tally = Tally(lambda done, total, note="": seen.append((done, total, note)), ["a", "b"], each=5)
    tally.of("a")(2, 5, "warm")
    tally.of("b")(1, 7)
    assert seen == [(2, 10, "a: warm"), (3, 12, "")]


# -- a model per device


class WithInterval(Arithmetic):
    """A device made of arithmetic whose figures have an interval, as real ones have."""

    def measure(self, plan: PruningPlan) -> tuple[dict[str, float], Any]:
        figures, result = super().measure(plan)
        ratio = figures["latency_ratio"]
        return {**figures, "latency_ratio_low": 0.99 * ratio, "latency_ratio_high": 1.01 * ratio}, result


def learned(folder: Path, combine: Any = "worst") -> tuple[FleetLatencies, dict[str, Arithmetic]]:
    """Two devices made of arithmetic; the second one's latencies are random numbers, which no model predicts."""
    made = {
        "good": WithInterval(plain(5), folder / "latencies.good.jsonl"),
        "wild": WithInterval(plain(5), folder / "latencies.wild.jsonl", worth_nothing=True),
    }
    members = {name: found.latencies() for name, found in made.items()}
    latencies = FleetLatencies(Fleet([device(name) for name in made], combine), members)
    latencies.of(made["good"].full, exact=True)
    assert latencies.model() is None  # there is no array that says what both take
    for found in made.values():
        assert len(found.plans) == 13
        found.plans.clear()
    return latencies, made


def test_a_plan_is_predicted_where_that_has_proven_good_and_measured_elsewhere(tmp_path: Path) -> None:
    latencies, made = learned(tmp_path)
    new = [plan for plan in made["good"].random(40) if plan.digest not in latencies.members["good"].measured]
    for plan in new[:8]:
        figures = latencies.of(plan, exact=False)
        assert (figures["latency_measured.good"], figures["latency_measured.wild"]) == (0, 1)
        assert figures["latency_measured"] == 0
        assert figures["latency_ratio"] == max(figures["latency_ratio.good"], figures["latency_ratio.wild"])
    assert (len(made["good"].plans), len(made["wild"].plans)) == (0, 8)
    assert latencies.of(new[0], exact=True)["latency_measured"] == 1
    assert len(made["good"].plans) == 1
    report = latencies.report()
    assert not report["trusted"]
    assert (report["predicted"], report["devices"]["wild"]["predicted"]) == (8, 0)
    assert report["measured"] == sum(found["measured"] for found in report["devices"].values())
    assert report["devices"]["good"]["trusted"] and not report["devices"]["wild"]["trusted"]


def test_several_devices_give_a_method_no_arrays(network: Any, evaluator: Any) -> None:
    oracle = evaluator([device("a"), device("b")], mode="auto", measurements=6)
    assert oracle.predict(Predict()) == {}


# -- faults


def test_an_error_names_the_device_and_what_others_measured_is_kept(
    network: Any, evaluator: Any, tmp_path: Path
) -> None:
    gone = MadeUp()
    oracle = evaluator([device("pi"), device("jetson", gone)])
    oracle.latency(PruningPlan.full(network[1].groups))
    gone.faults = [DeviceError("no SSH connection to jetson", "unreachable")]
    with pytest.raises(DeviceError, match=r"^device jetson: no SSH connection") as caught:
        oracle.latency(some_plan(network))
    assert caught.value.code == "unreachable"
    folder = tmp_path / "candidates"
    assert len((folder / "latencies.jsonl").read_text().splitlines()) == 1
    assert not (folder / "latencies.jetson.jsonl").exists()
    calls = {d.name: len(d.target.target.calls) for d in oracle.latencies.fleet}
    assert oracle.latency(some_plan(network))["latency_measured"] == 1
    assert {d.name: len(d.target.target.calls) for d in oracle.latencies.fleet} == {
        **calls,
        "jetson": calls["jetson"] + 1,
    }


def test_what_is_no_devices_fault_is_not_called_one() -> None:
    def work(found: Device) -> None:
        raise SurroundingsError("another board") if found.name == "b" else DeviceError("unreachable", "link-dead")

    with pytest.raises(SurroundingsError, match=r"^another board$"):
        Fleet([device("a"), device("b")]).each(work)


def test_ctrl_c_ends_the_work_of_every_device() -> None:
    finished: list[str] = []
    both = threading.Barrier(3, timeout=30)

    def long(progress: Any) -> None:
        both.wait()
        for _ in range(3000):
            progress({"event": "progress"})
            time.sleep(0.01)
        finished.append(threading.current_thread().name)

    def interrupt() -> None:
        both.wait()
        os.kill(os.getpid(), signal.SIGINT)

    others = set(threading.enumerate())  # of earlier tests
    fleet = Fleet([device("a", MadeUp(during=long)), device("b", MadeUp(during=long))])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a session in the background ignores it
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            fleet.each(lambda found: found.target.run({"models": []}, 60))
    finally:
        signal.signal(signal.SIGINT, before)
    assert not finished
    deadline = time.monotonic() + 20
    while (left := set(threading.enumerate()) - others) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


# -- a device that is unreachable for a while


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(fleets, "LONGEST_PAUSE_S", 0.02)


UNREACHABLE = [DeviceError("no SSH connection", "connection-refused"), DeviceError("the link broke", "link-dead")]


@pytest.mark.usefixtures("_impatient")
def test_a_device_that_comes_back_in_time_costs_no_error(tmp_path: Path) -> None:
    said: list[str] = []
    target = MadeUp(faults=[*UNREACHABLE])
    fleet = Fleet([device("pi", target)], wait_s=60, say=said.append)
    fleet.meet(lambda d: meet(d.target, d.profile, tmp_path, tmp_path, probing=False, progress=Silent()))
    assert fleet.primary.target.run({"models": []}, 1)["models"] == {}
    assert target.calls == ["prepare", "run", "prepare", "run", "prepare", "run"]  # looked at before it is used again
    assert [line.partition(";")[0] for line in said] == [f"Device pi is unreachable ({error})" for error in UNREACHABLE]


@pytest.mark.usefixtures("_impatient")
def test_another_device_in_its_place_ends_the_run(tmp_path: Path) -> None:
    target = MadeUp()
    fleet = Fleet([device("pi", target)], wait_s=60)
    fleet.meet(lambda d: meet(d.target, d.profile, tmp_path, tmp_path, probing=False, progress=Silent()))
    target.faults, target.cpu = [*UNREACHABLE], "Slide rule"
    with pytest.raises(SurroundingsError, match="cpu Abacus -> Slide rule"):
        fleet.primary.target.run({"models": []}, 1)


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize(
    ("wait_s", "fault", "calls"),
    [(0.0, UNREACHABLE[0], 1), (60.0, DeviceError("no such program", "no-python"), 1), (0.05, UNREACHABLE[0], None)],
    ids=["not to wait", "waiting cannot help", "for too long"],
)
def test_waiting_has_an_end(wait_s: float, fault: DeviceError, calls: int | None) -> None:
    target = MadeUp(faults=[fault] * 1000)
    with pytest.raises(DeviceError, match=str(fault)) as caught:
        Fleet([device("pi", target)], wait_s=wait_s).primary.target.run({"models": []}, 1)
    assert caught.value.code == fault.code
    assert len(target.calls) == calls if calls else "waited 0.05 s" in str(caught.value)


# -- the run file


def run_file(folder: Path, others: Sequence[str], **changes: Any) -> RunFile:
    """The tiny run on the quick device ``quick`` and others."""
    section = {"profile": str(quick_device(folder)), "others": list(others), "probe": False, **changes}
    return parse_run_file(yaml.safe_dump(merged(TINY, {"device": section})))


def profile_file(folder: Path, name: str, **changes: Any) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(merged(QUICK_DEVICE, changes)))
    return str(path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("quick", {}, "device.others: quick would be measured twice"),
        ("emulated", {"timing": False}, "emulated is emulated"),
        ("a b", {}, "'a b' has other characters"),
    ],
)
def test_a_fleet_that_cannot_be_is_refused(tmp_path: Path, name: str, changes: Any, message: str) -> None:
    other = profile_file(tmp_path, name, **changes)
    with pytest.raises(UserError, match=message):
        device_profiles(run_file(tmp_path, [other]))


def test_an_unknown_device_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"device\.others: unknown device profile 'nowhere'"):
        device_profiles(run_file(tmp_path, ["nowhere"]))


def test_runs_of_before_there_were_fleets_can_be_resumed() -> None:
    """The digest guards a journal; these are of run files as they were when there was one device."""
    old = parse_run_file(Path("pipeline/runs/digits.yaml").read_text())
    assert old.digest == "b7cf217b91cd07b4"
    assert parse_run_file(yaml.safe_dump(old.model_dump(mode="json"))).digest == old.digest
    assert parse_run_file(Path("pipeline/runs/voc-ssd300.yaml").read_text()).digest == "b458de5dd25bd1bc"


def test_what_a_run_finds_depends_on_its_devices_and_not_on_its_patience(tmp_path: Path) -> None:
    digests = [run_file(tmp_path, *rest).digest for rest in ([[]], [["b"]], [["b", "c"]])]
    digests.append(run_file(tmp_path, ["b"], combine="mean").digest)
    assert len(set(digests)) == 4
    assert run_file(tmp_path, ["b"], wait_s=3600).digest == digests[1]


# -- a whole run


@pytest.mark.long
def test_a_run_on_two_boards_and_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))
    with sshd.public_folder() as folder:
        boards = []
        try:
            for name in ("pi-a", "pi-b"):
                (folder / name).mkdir(mode=0o755)
                boards.append(sshd.start_device(folder / name))
            others = [
                profile_file(tmp_path, name, target="ssh", connect=board.settings().model_dump(mode="json"))
                for name, board in zip(("pi-a", "pi-b"), boards, strict=True)
            ]
            gate = {"budgets": True, "min_speedup": 0.01}
            config = run_file(tmp_path, others, combine="mean").model_copy(
                update={"gate": RunFile.model_fields["gate"].default.model_copy(update={**gate, "max_drop": 1.0})}
            )
            directory = create_run_directory(config)
            consent(config, directory)
            with Run(directory, Silent()) as run:
                run.tracker.start()
                facts = perform(run)
            look_at(directory, facts)
            (directory / "device.pi-b.json").write_text(
                (directory / "device.pi-b.json").read_text().replace('"fingerprint": "', '"fingerprint": "0')
            )
            with Run(directory, Silent()) as run, pytest.raises(SurroundingsError, match="pi-b is not the one"):
                _ = run.fleet
        finally:
            for board in boards:
                board.close()
    assert not any(board.agents() for board in boards)


def look_at(directory: Path, facts: Facts) -> None:
    """What a run on the devices quick, pi-a and pi-b leaves behind."""
    names = ["quick", "pi-a", "pi-b"]
    assert {path.name for path in directory.glob("device*.json")} == {
        *("device.json", "device.pi-a.json", "device.pi-b.json")
    }
    assert {path.name for path in directory.glob("benchmark*.json")} == {
        *("benchmark.json", "benchmark.pi-a.json", "benchmark.pi-b.json")
    }
    fleet = facts.benchmark.of_devices
    assert list(fleet) == names == list(facts.search.devices or {})
    assert facts.benchmark.device == "quick"
    assert facts.benchmark.latency == fleet["quick"].latency
    for name in names[1:]:
        kept = json.loads((directory / f"benchmark.{name}.json").read_text())
        assert kept["profile"] == name
        assert len(kept["processes"]) == QUICK_DEVICE["final"]["processes"]
    best = facts.finetune.best.evaluation.metrics
    ratios = [best[f"latency_ratio.{name}"] for name in names]
    assert best["latency_ratio"] == pytest.approx(sum(ratios) / 3)
    checks = [check.name for check in facts.gate.checks]
    assert [name for name in checks if "speed-up" in name] == [f"speed-up on {name}, lower end" for name in names]
    assert [row[0] for row in final_table(facts)][-2:] == ["p50 on pi-a", "p50 on pi-b"]
    page = (directory / "report.html").read_text()
    assert "the mean ratio of all devices" in page
    assert all(f"<tr><th scope=row>{name}<td>" in page for name in names)
