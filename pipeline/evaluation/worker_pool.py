"""The driver's side of a worker pool: worker processes that evaluate candidates, wherever they run.

The driver says ahead which candidates it will ask for. They go to the workers in batches, and ``answer`` waits for each
in turn; so what is journalled and told keeps its order, whoever is finished first. A worker that dies costs its batch,
which another one gets. How a batch reaches a worker is an engine's business
(``secateur.pipeline.flow.worker_engines``).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from secateur.device_profiles.cores import usable_cores
from secateur.export.quantize import precision
from secateur.pipeline.children import keep_from_children
from secateur.pipeline.config import trust
from secateur.pipeline.errors import SurroundingsError, UserError
from secateur.pipeline.evaluation import shipped_data
from secateur.pipeline.evaluation.accuracy import Accuracy, AccuracyEvaluator, AccuracyRequest, Key
from secateur.pipeline.evaluation.onnx_files import TEMPLATE
from secateur.pipeline.evaluation.precisions import FLOAT
from secateur.pipeline.files import sha256_of, write_whole
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import PruningPlan

if TYPE_CHECKING:
    from secateur.pipeline.config.schema import RunFile

LIVES = 3
"""Deaths of workers over one batch, before its candidates are tried one by one; and then over one candidate."""
PRECISE = "quantised "
"""Before the name of a precision: the key of what its files are cut from."""
IMAGES = "images"
"""What a worker names as missing if it cannot open the run's data itself."""


class WorkerDiedError(RuntimeError):
    """The process that had a batch is gone; the batch may be tried again."""


class Engine(Protocol):
    """Brings batches to worker processes.

    Args:
        count: batches that are under way at once.
        local: whether workers run on this machine.
    """

    count: int
    local: bool

    def perform(self, spec: Mapping[str, Any], batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """What ``secateur.pipeline.evaluation.worker.evaluate_batch`` answers in some worker process; called by several
        threads.

        Raises:
            WorkerDiedError: the process died.
        """

    def publish(self, sha256: str, path: Path) -> None:
        """Make a file's content available to workers that do not see the file."""


class WorkerPool:
    """Workers of one run and one baseline.

    Args:
        engine: how to reach them.
        config: the run file.
        baseline: the unpruned network's weights.
        folder: for files made for the workers.
    """

    def __init__(self, engine: Engine, config: RunFile, baseline: Path, folder: Path) -> None:
        self.engine, self.config, self.baseline, self.folder = engine, config, baseline, folder
        self._spec: dict[str, Any] = {}
        self._ship: Callable[[], Path] | None = None
        self._shipping = threading.Lock()
        self._under_way: dict[Key, tuple[Future[list[Accuracy]], int]] = {}
        self._pool = ThreadPoolExecutor(engine.count, "workers", keep_from_children)  # one thread waits for one batch

    def can(self, accuracy: AccuracyEvaluator, name: str) -> bool:
        """Whether workers can evaluate networks in a precision, with the bits that this process would find.

        Other precisions than fp32 are computed by ONNX Runtime's kernels for the processor at hand: by workers of this
        machine alone, and from a template that was made here.

        Raises:
            ExportError: the network cannot be quantised at all.
        """
        if name == FLOAT:
            return True
        if not self.engine.local or accuracy.precisions is None:
            return False
        return precision(name).calibrated and accuracy.precisions.kept(name) is not None

    def begin(self, accuracy: AccuracyEvaluator, asks: Mapping[Key, AccuracyRequest]) -> None:
        """Hand out candidates; those handed out before and not answered yet are given up.

        A single one is left to the driver if the workers share its machine: it has more threads, and nothing to send.
        """
        self._forget()
        if not asks or (len(asks) == 1 and self.engine.local):
            return
        names = {request.precision for request in asks.values()} - {FLOAT}
        if not self._spec or any(PRECISE + name not in self._spec for name in names):
            self._spec = self._describe(accuracy, names)
        size = max(1, min(self.config.workers.batch, -(-len(asks) // self.engine.count)))
        keys, used = list(asks), {request.base for request in asks.values()}
        told = {base: c.to_json() for base, c in accuracy.weights.checkpoints.items() if base in used}
        for start in range(0, len(keys), size):
            part = keys[start : start + size]
            rows = [request_to_json(asks[key]) for key in part]
            future = self._pool.submit(self._deliver, rows, told)
            self._under_way |= {key: (future, place) for place, key in enumerate(part)}

    def answer(self, key: Key) -> Accuracy | None:
        """What the workers found, waited for; None if they were not asked.

        Raises:
            UserError: the workers cannot do this at all; says what to change.
        """
        if key not in self._under_way:
            return None
        future, place = self._under_way[key]
        return future.result()[place]

    def rest(self) -> None:
        """Wait until no worker computes: who measures on their machine needs it for itself."""
        wait({future for future, _ in self._under_way.values()})

    def close(self) -> None:
        """Give up what is not begun, and wait for the rest."""
        self._forget()
        self._pool.shutdown(cancel_futures=True)

    # -- the parts ---------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        for future, _ in self._under_way.values():
            future.cancel()
        self._under_way = {}

    def _deliver(self, rows: Sequence[Mapping[str, Any]], checkpoints: Mapping[str, Any]) -> list[Accuracy]:
        """Accuracies of a batch; a candidate that no worker survives has failed."""
        for _ in range(LIVES):
            with contextlib.suppress(WorkerDiedError):
                return self._perform({"asks": list(rows), "checkpoints": dict(checkpoints)})
        if len(rows) > 1:
            return [scored for row in rows for scored in self._deliver([row], checkpoints)]
        return [Accuracy("failed", f"every worker process that tried it died ({LIVES} in turn); out of memory?")]

    def _perform(self, batch: Mapping[str, Any]) -> list[Accuracy]:
        published: set[str] = set()
        while True:
            answer = self.engine.perform(self._spec, batch)
            if "answers" in answer:
                return [Accuracy(**row) for row in answer["answers"]]
            if "error" in answer:
                raise UserError(f"workers: {answer['error']}")
            missing = answer["missing"]
            if missing in published:
                raise SurroundingsError(f"workers: {missing} was sent to a worker and did not arrive; see its log")
            published.add(missing)
            if missing == IMAGES:
                self._take_images_along()
            else:
                self.engine.publish(missing, self._path_of(missing, batch))

    def _path_of(self, sha256: str, batch: Mapping[str, Any]) -> Path:
        blobs = [*self._spec.values(), *batch["checkpoints"].values()]
        (path, *_) = [b["path"] for b in blobs if isinstance(b, Mapping) and b.get("sha256") == sha256]
        return Path(path)

    def _take_images_along(self) -> None:
        """Put the images that workers need into a file; they are told of it from now on."""
        with self._shipping:
            if self._spec[IMAGES] is None:
                assert self._ship is not None
                self._spec = {**self._spec, IMAGES: _blob(self._ship())}

    def _describe(self, accuracy: AccuracyEvaluator, names: Iterable[str]) -> dict[str, Any]:
        """All that workers must know, as JSON; files by path and hash.

        Args:
            names: of calibrated precisions that candidates are asked for in.
        """
        known = {key.removeprefix(PRECISE) for key in self._spec if key.startswith(PRECISE)}
        precise = {}
        for name in sorted(known.union(names)):
            file = None if accuracy.precisions is None else accuracy.precisions.kept(name)
            assert accuracy.precisions is not None and file is not None, "what `can` said"
            precise[PRECISE + name] = {**_blob(file), "scheme": accuracy.precisions.scheme}
        config, inference, baseline = self.config, accuracy.deterministic, accuracy.baseline
        order, template = accuracy.order(), accuracy.folder / TEMPLATE
        if order is not None:
            content = io.BytesIO()
            np.save(content, np.array(order, dtype=np.int64))
            write_whole(self.folder / "order.npy", content.getbuffer())
        num_train, num_search = accuracy.num_recalibration_images, len(accuracy.split)

        def ship() -> Path:
            return shipped_data.pack(baseline.workload, num_train, num_search, self.folder / "images.npz")

        self._ship = ship
        threads = config.threads or max(1, (usable_cores() // self.engine.count if self.engine.local else 0))
        return {
            "workload": config.workload,
            "metric": baseline.workload.search_metric,
            "code": trust.allowed(),
            "search": config.search.model_dump(mode="json"),
            "seed": config.seed,
            "compute": baseline.compute.type,
            "threads": threads if self.engine.local or config.threads else None,
            "fingerprint": baseline.workload.fingerprint,
            "groups": groups_digest(baseline.graph),
            "backend": inference.backend,
            "baseline": _blob(self.baseline),
            "template": _blob(template) if inference.backend == "onnx" or precise else None,
            "order": None if order is None else _blob(self.folder / "order.npy"),
            IMAGES: None,
            **precise,
        }


def request_to_json(request: AccuracyRequest) -> dict[str, Any]:
    """A request as JSON's types."""
    return {
        "plan": request.plan.to_json(),
        "base": request.base,
        "floor": request.floor,
        "exact": request.exact,
        "brief": request.brief,
        "recalibration_images": request.recalibration_images,
        "precision": request.precision,
    }


def request_from_json(row: Mapping[str, Any]) -> AccuracyRequest:
    """The inverse of ``request_to_json``."""
    return AccuracyRequest(**{**row, "plan": PruningPlan.from_json(row["plan"])})


def groups_digest(graph: ChannelGraph) -> str:
    """Names what plans of a graph mean: its groups, and what each removes from which tensor."""
    content = hashlib.sha256()
    for group in graph.groups:
        content.update(f"{group.name} {group.size}\n".encode())
        for member in group.members:
            content.update(f"{member.tensor} {member.dim} {member.reads} {member.index.shape}\n".encode())
            content.update(np.ascontiguousarray(member.index, dtype=np.int64).tobytes())
    return content.hexdigest()[:16]


def _blob(path: Path) -> dict[str, str]:
    return {"sha256": sha256_of(path), "path": str(path.absolute())}
