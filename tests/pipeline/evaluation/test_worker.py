"""Worker processes: any number of them finds what one process finds, and a death costs no more than a batch."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from secateur.device_profiles import load_profile, open_target
from secateur.export.slicing import OnnxTemplate
from secateur.pipeline.config.reading import load_run_file
from secateur.pipeline.config.schema import RunFile, WorkersSection
from secateur.pipeline.devices.fleet import Device, Fleet
from secateur.pipeline.errors import UserError
from secateur.pipeline.evaluation import worker as workers
from secateur.pipeline.evaluation.baseline import Baseline
from secateur.pipeline.evaluation.evaluator import Evaluator, make_evaluator
from secateur.pipeline.evaluation.worker_pool import Engine, WorkerDiedError, WorkerPool
from secateur.pipeline.flow.environment import runtime_env
from secateur.pipeline.flow.worker_engines import Dask, Processes, Ray, open_engine
from secateur.pipeline.run.journal import Journal
from secateur.pipeline.run.run import Run
from secateur.pipeline.run.study import Study
from secateur.pipeline.training.checkpoints import save_weights
from secateur.pipeline.training.statistics import recalibrate, training_images
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.saliency import uniform_plan
from secateur.pruning.search.protocol import AuxiliaryTraining, Candidate, Evaluate, FineTune, Strategy
from secateur.pruning.trace import trace
from tests.pipeline.helpers import digits, tiny_config, write_tiny

pytestmark = pytest.mark.filterwarnings("ignore")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Scene:
    """A baseline that can be searched, as a run has it."""

    config: RunFile
    folder: Path
    model: torch.nn.Module
    graph: ChannelGraph
    baseline: Path

    def network(self, metric: str = "top1") -> Baseline:
        workload = digits(image_size=8, augment="shift").going_by(metric)
        return Baseline(self.model, self.graph, workload, seed=3)

    def candidates(self, number: int, base: str = "", first: int = 0) -> tuple[Candidate, ...]:
        """Random plans, the same for the same ids."""
        rng = np.random.default_rng(7)
        ratios = rng.uniform(0.3, 0.9, first + number)
        return tuple(
            Candidate(
                i, uniform_plan(self.graph, ratios[i], model=self.model, saliency="random", seed=i), "x", (), base
            )
            for i in range(first, first + number)
        )


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("scene")
    workload = digits(image_size=8)
    torch.manual_seed(0)
    model = workload.build_model()
    recalibrate(model, training_images(workload, workload.train, 512, CPU))
    save_weights(folder / "baseline.safetensors", model.state_dict())
    graph = trace(model, workload.example_input())
    OnnxTemplate.export(model, workload.example_input(), graph, folder / "template.onnx")
    config = tiny_config(folder, search={"forward": "deterministic", "images": 100, "memory_mb": 1})
    return Scene(config, folder, model, graph, folder / "baseline.safetensors")


@pytest.fixture(scope="module")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prefect's embedded server with a database of its own, for the whole module."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("SECATEUR_HOME", str(home))
        runtime_env(home)


Make = Callable[..., Evaluator]


@pytest.fixture
def make(scene: Scene, tmp_path: Path) -> Iterator[Make]:
    """An evaluator in a new folder, with a worker pool where there is an engine."""
    profile = load_profile(scene.config.device.profile)
    target = open_target(profile)
    pools: list[WorkerPool] = []

    def build(
        engine: Engine | None = None,
        name: str = "run",
        batch: int = 3,
        metric: str = "top1",
        precisions: Sequence[str] = ("fp32",),
        **search: Any,
    ) -> Evaluator:
        changed = {
            "search": scene.config.search.model_copy(update=search),
            "workers": WorkersSection(batch=batch),
        }
        config = scene.config.model_copy(update=changed)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        shutil.copyfile(scene.folder / "template.onnx", folder / "template.onnx")  # exporting it takes seconds
        pool = None if engine is None else WorkerPool(engine, config, scene.baseline, folder / "workers")
        pools.extend([pool] if pool else [])
        fleet = Fleet([Device(profile, target)])
        return make_evaluator(
            scene.network(metric),
            fleet,
            folder,
            config.search,
            config.finetune,
            deterministic=True,
            workers=pool,
            precisions=precisions,
        )

    yield build
    for pool in pools:
        pool.close()
    target.close()


class InThreads:
    """An engine without processes: what is said to workers goes through JSON, and deaths are played."""

    local = False

    def __init__(self, count: int = 2, dies: Callable[[int, Sequence[Mapping[str, Any]]], bool] | None = None) -> None:
        self.count, self.dies = count, dies or (lambda number, asks: False)
        self.batches: list[int] = []
        self.published: dict[str, Path] = {}

    def perform(self, spec: Mapping[str, Any], batch: Mapping[str, Any]) -> Mapping[str, Any]:
        self.batches.append(len(batch["asks"]))
        if self.dies(len(self.batches), batch["asks"]):
            raise WorkerDiedError("killed")
        answer: dict[str, Any] = json.loads(
            json.dumps(workers.evaluate_batch(*json.loads(json.dumps([spec, batch])), self))
        )
        return answer

    def publish(self, sha256: str, path: Path) -> None:
        self.published[sha256] = path

    def fetch(self, sha256: str) -> bytes | None:
        return self.published[sha256].read_bytes() if sha256 in self.published else None


def asks(scene: Scene) -> Strategy:
    """Two requests with a training between them: plans met before, a plan twice, and a floor that some cannot reach."""
    first = scene.candidates(7)
    yield Evaluate(first)
    tuned: Any = yield FineTune(first[1], 0.2, latency=False)
    again = Candidate(7, first[2].plan, "again")
    yield Evaluate(
        (again, *scene.candidates(4, tuned.base, first=8), Candidate(12, first[2].plan, "again", (), tuned.base))
    )
    hopeless = scene.candidates(3, first=13)
    yield Evaluate((*hopeless, Candidate(16, hopeless[0].plan, "again")), floor=0.9)
    return ()


def journalled(folder: Path, oracle: Evaluator, strategy: Strategy) -> list[dict[str, Any]]:
    """What a study leaves in its journal, but for the times."""
    with Journal(folder / "journal.jsonl", "run", "config") as journal:
        Study(journal, oracle).run(strategy)
        records = [dict(record) for record in journal.records]
    return [timeless(record) for record in records]


def timeless(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: timeless(item) for key, item in value.items() if key not in ("seconds", "time")}
    return [timeless(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def alone(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The journal of one process."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copyfile(scene.folder / "template.onnx", folder / "template.onnx")
    profile = load_profile(scene.config.device.profile)
    fleet, config = Fleet([Device(profile, open_target(profile))]), scene.config
    oracle = make_evaluator(scene.network(), fleet, folder, config.search, config.finetune, deterministic=True)
    return journalled(folder, oracle, asks(scene))


@pytest.mark.parametrize("count", [1, 2])
def test_a_worker_pool_leaves_the_journal_of_one_process(
    scene: Scene, alone: list[dict[str, Any]], make: Make, tmp_path: Path, count: int
) -> None:
    engine = InThreads(count)
    assert journalled(tmp_path, make(engine), asks(scene)) == alone
    assert sum(engine.batches) == 7 + 5 + 3  # plans met before were not sent, and twins once
    assert any(record.get("evaluation", {}).get("status") == "infeasible" for record in alone)


@pytest.mark.parametrize("local", [True, False])
def test_workers_of_this_machine_evaluate_integers_with_the_same_bits(
    scene: Scene, make: Make, tmp_path: Path, local: bool
) -> None:
    ships, candidates = ("int8", "int8 except conv1"), scene.candidates(4)

    def scored(oracle: Evaluator) -> list[Mapping[str, float]]:
        oracle.ahead(candidates, latency=False)
        found = [oracle.evaluate(candidate, latency=False) for candidate in candidates]
        found += [oracle.evaluate(candidates[0], latency=False, precision=ships[1])]
        assert {evaluation.status for evaluation in found} == {"ok"}
        return [timeless(evaluation.metrics) for evaluation in found]

    engine = InThreads(2)
    engine.local = local
    assert scored(make(engine, "pool", precisions=ships)) == scored(make(None, "alone", precisions=ships))
    assert sum(engine.batches) == (4 if local else 0), "another processor would find other last bits"


def test_a_run_killed_and_resumed_with_a_worker_pool_leaves_the_same_journal(
    scene: Scene, alone: list[dict[str, Any]], make: Make, tmp_path: Path
) -> None:
    def stops(oracle: Evaluator, lives: int) -> Evaluator:
        evaluate = oracle.evaluate

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal lives
            lives -= 1
            if lives < 0:
                raise KeyboardInterrupt
            return evaluate(*arguments, **options)

        oracle.evaluate = counted  # type: ignore[method-assign]
        return oracle

    for lives in (2, 4, 8):
        with pytest.raises(KeyboardInterrupt):
            journalled(tmp_path, stops(make(InThreads()), lives), asks(scene))
    assert journalled(tmp_path, make(), asks(scene)) == alone


def test_supernets_and_recalibrated_networks_are_scored_alike(scene: Scene, make: Make, tmp_path: Path) -> None:
    def learns() -> Strategy:
        learned: Any = yield AuxiliaryTraining("shared", 0.2)
        yield Evaluate(scene.candidates(3, learned.base))
        return ()

    found = []
    for i, engine in enumerate((None, InThreads())):
        (tmp_path / str(i)).mkdir()
        oracle = make(engine, f"run{i}", recalibrate_images=64)
        found.append(journalled(tmp_path / str(i), oracle, learns()))
    assert found[0] == found[1]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_workers_go_by_the_metric_that_the_run_has_chosen(
    scene: Scene, make: Make, elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run file leaves it open; the images are opened there, or sent along."""
    engine, candidates = InThreads(), scene.candidates(3)
    here = make(None, "run0", metric="divergence_score")
    expected = [here.evaluate(candidate, False) for candidate in candidates]
    if elsewhere:
        monkeypatch.setattr(workers.shipped_data, "open_section", _no_data)
    there = make(engine, "run1", metric="divergence_score")
    there.ahead(candidates, False)
    found = [there.evaluate(candidate, False) for candidate in candidates]
    assert sum(engine.batches) >= 3
    assert [timeless(each.metrics) for each in found] == [timeless(each.metrics) for each in expected]
    assert all(0 < each["divergence_score"] < 1 for each in found)


def _no_data(*_: Any, **__: Any) -> Any:
    raise UserError("not here")


def test_a_batch_is_tried_again_where_a_worker_died(
    scene: Scene, alone: list[dict[str, Any]], make: Make, tmp_path: Path
) -> None:
    engine = InThreads(dies=lambda number, _: number % 3 == 1)
    assert journalled(tmp_path, make(engine), asks(scene)) == alone


def test_a_candidate_that_ends_every_worker_has_failed_and_its_neighbours_have_not(scene: Scene, make: Make) -> None:
    candidates = scene.candidates(4)
    deadly = candidates[2].plan.to_json()
    engine = InThreads(dies=lambda _, rows: any(row["plan"] == deadly for row in rows))
    oracle = make(engine, batch=4, count=1)
    oracle.ahead(candidates, False)
    statuses = [oracle.evaluate(candidate, False).status for candidate in candidates]
    assert statuses == ["ok", "ok", "failed", "ok"]
    assert "died" in oracle.evaluate(candidates[2], False).reason


def test_workers_elsewhere_get_files_by_hash_and_only_the_images_they_need(
    scene: Scene, alone: list[dict[str, Any]], make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the driver's can be seen: no path leads anywhere, and the data of the run file is another."""

    class Elsewhere(InThreads):
        def perform(self, spec: Mapping[str, Any], batch: Mapping[str, Any]) -> Mapping[str, Any]:
            hidden = json.loads(
                json.dumps([spec, batch]).replace(str(scene.folder), "/nowhere").replace(str(tmp_path), "/nowhere")
            )
            hidden[0]["workload"]["data"] = {"source": "folder", "path": "/nowhere", "augment": "shift"}
            return super().perform(*hidden)

    engine = Elsewhere()
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "elsewhere"))
    workers._cached.clear()
    found = journalled(tmp_path, make(engine), asks(scene))
    assert found == alone
    kept = {file.name for file in (tmp_path / "elsewhere" / "blobs").iterdir()}
    assert kept == set(engine.published)
    images = next(path for path in engine.published.values() if path.name == "images.npz")
    with np.load(images, allow_pickle=False) as content:
        assert len(content["search"]) == 100 and not any("test" in name for name in content.files)


@pytest.mark.parametrize(
    ("target", "local", "waits"), [("local", True, True), ("ssh", True, False), ("local", False, False)]
)
def test_nothing_is_timed_on_a_machine_whose_workers_compute(target: str, local: bool, waits: bool) -> None:
    said: list[str] = []
    run: Any = Run.__new__(Run)
    run._pool = SimpleNamespace(engine=SimpleNamespace(local=local), rest=lambda: said.append("rest"))
    run.lease_devices({})
    with run._leased(SimpleNamespace(name="here", target=target)):
        said.append("timed")
    assert said == (["rest", "timed"] if waits else ["timed"])


def test_rest_lasts_until_every_batch_is_done(scene: Scene, make: Make) -> None:
    class Slow(InThreads):
        done = 0

        def perform(self, spec: Mapping[str, Any], batch: Mapping[str, Any]) -> Mapping[str, Any]:
            answer = super().perform(spec, batch)
            time.sleep(0.2)
            self.done += 1
            return answer

    engine = Slow()
    oracle = make(engine, batch=2)
    assert oracle.workers is not None
    oracle.ahead(scene.candidates(4), False)
    oracle.workers.rest()
    assert engine.done == 2


def test_a_blob_that_arrives_altered_is_refused(tmp_path: Path) -> None:
    class Liar:
        def fetch(self, sha256: str) -> bytes | None:
            return b"something else"

    with pytest.raises(UserError, match="altered"):
        workers.find_blob({"sha256": "0" * 64, "path": "/nowhere"}, Liar())
    assert not any((tmp_path / "home").glob("blobs/*"))


def test_the_number_of_workers_is_no_part_of_a_runs_identity(tmp_path: Path) -> None:
    file = write_tiny(tmp_path)
    digests = {load_run_file(file, [f"workers={text}"]).digest for text in ("{}", "{engine: processes, count: 2}")}
    assert len(digests) == 1
    with pytest.raises(UserError, match="address"):
        load_run_file(file, ["workers={engine: processes, address: 'tcp://x:1'}"])


def test_a_missing_extra_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for engine in ("dask", "ray"):
        monkeypatch.setitem(sys.modules, f"prefect_{engine}", None)
        with (
            pytest.raises(UserError, match=rf"pip install 'secateur\[{engine}\]'"),
            open_engine(WorkersSection(engine=engine)),
        ):
            pass


# -- real processes ----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_worker_killed_in_mid_batch_costs_nothing_but_time(
    scene: Scene, alone: list[dict[str, Any]], make: Make, tmp_path: Path, prefect_home: None
) -> None:
    with open_engine(WorkersSection(engine="processes", count=2)) as engine:
        assert isinstance(engine, Processes)
        killer = threading.Thread(target=kill_one_at_work, daemon=True)
        killer.start()
        assert journalled(tmp_path, make(engine), asks(scene)) == alone
        killer.join(timeout=1)
        assert not killer.is_alive(), "nothing was killed"
    assert not workers_of_this_process()


def workers_of_this_process() -> list[psutil.Process]:
    """Spawned processes; the tracker of shared memory is none of them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "spawn_main" in " ".join(process.cmdline()):
                found.append(process)
    return found


def workers_at_work() -> list[psutil.Process]:
    """Those that have loaded everything: they hold a folder of their own."""
    folder = Path(tempfile.gettempdir())
    if not any(folder.glob("secateur-worker-*")):
        return []
    return [process for process in workers_of_this_process() if process.memory_info().rss > 300 << 20]


def kill_one_at_work() -> None:
    while not (alive := workers_at_work()):
        time.sleep(0.02)
    alive[0].kill()


@pytest.mark.long
@pytest.mark.parametrize("kind", [Dask, Ray])
def test_workers_of_a_cluster_find_the_same_without_seeing_any_file(
    scene: Scene,
    alone: list[dict[str, Any]],
    make: Make,
    tmp_path: Path,
    prefect_home: None,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Dask] | type[Ray],
) -> None:
    """The driver's files are renamed in what workers are told, and they live in a home and a folder of their own."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "cwd").mkdir(parents=True)
    monkeypatch.chdir(elsewhere / "cwd")
    monkeypatch.setenv("SECATEUR_HOME", str(elsewhere / "home"))
    with open_engine(WorkersSection(engine="dask" if kind is Dask else "ray", count=2)) as engine:
        assert isinstance(engine, kind)
        perform = engine.perform

        def hidden(spec: Mapping[str, Any], batch: Mapping[str, Any]) -> Mapping[str, Any]:
            text = (
                json.dumps([spec, batch])
                .replace(str(scene.folder), "/nowhere")
                .replace(str(tmp_path / "run"), "/nowhere")
            )
            spec, batch = json.loads(text)
            spec["workload"]["data"] = {"source": "folder", "path": "/nowhere", "augment": "shift"}
            return perform(spec, batch)

        engine.perform = hidden  # type: ignore[method-assign]
        assert journalled(tmp_path, make(engine), asks(scene)) == alone
    assert len(list((elsewhere / "home" / "blobs").iterdir())) == 5  # baseline, template, order, images, a base


@pytest.mark.parametrize(
    ("number", "kills", "pause_s"),
    [
        pytest.param(200, 2, (0.2, 2.0), marks=pytest.mark.long),
        pytest.param(2000, 1000, (5.0, 30.0), marks=[pytest.mark.long, pytest.mark.timeout(3600)]),
    ],
)
def test_a_soak_with_workers_killed_at_random_loses_and_doubles_nothing(
    scene: Scene, make: Make, tmp_path: Path, prefect_home: None, number: int, kills: int, pause_s: tuple[float, float]
) -> None:
    candidates = scene.candidates(number)
    done = threading.Event()
    killed: list[int] = []

    def kill_at_random() -> None:
        rng = random.Random(1)
        while len(killed) < kills and not done.wait(rng.uniform(*pause_s)):
            alive = workers_at_work()
            if alive:
                victim = rng.choice(alive)
                victim.kill()
                killed.append(victim.pid)

    def asks_many() -> Strategy:
        for start in range(0, number, 20):
            yield Evaluate(candidates[start : start + 20])
        return ()

    killer = threading.Thread(target=kill_at_random, daemon=True)
    with open_engine(WorkersSection(engine="processes", count=2)) as engine:
        killer.start()
        try:
            records = journalled(tmp_path, make(engine, batch=5), asks_many())[1:]
        finally:
            done.set()
            killer.join()
    assert len(killed) >= min(kills, 2)
    assert [record["candidate"]["id"] for record in records] == list(range(number))
    assert {record["evaluation"]["status"] for record in records} == {"ok"}
    checked = make(None, "checked")
    for candidate, record in list(zip(candidates, records, strict=True))[::20]:
        metrics = checked.evaluate(candidate, False).metrics
        assert timeless(metrics) == record["evaluation"]["metrics"]
