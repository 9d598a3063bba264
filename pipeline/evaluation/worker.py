"""A worker process: evaluates batches of candidates with an accuracy evaluator that is kept between them.

The first batch of a run makes it: the workload, the baseline, its channel groups, the ONNX template. Files come by
hash: from where the driver has them if that can be seen from here, else from the engine's object store, into ``blobs``
of this machine's SECATEUR_HOME. Nothing is unpickled here: weights are safetensors, arrays are npy and npz.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from secateur.export.qdq import DEFAULT_SCHEME
from secateur.export.slicing import OnnxTemplate
from secateur.pipeline.children import leave_terminal
from secateur.pipeline.config import trust
from secateur.pipeline.config.schema import SearchSection
from secateur.pipeline.errors import UserError
from secateur.pipeline.evaluation import shipped_data
from secateur.pipeline.evaluation.accuracy import AccuracyEvaluator, Agreed
from secateur.pipeline.evaluation.baseline import Baseline
from secateur.pipeline.evaluation.precisions import Precisions
from secateur.pipeline.evaluation.weights import Checkpoint
from secateur.pipeline.evaluation.worker_pool import IMAGES, PRECISE, groups_digest, request_from_json
from secateur.pipeline.files import sha256_of, write_whole
from secateur.pipeline.surroundings import home
from secateur.pipeline.training.checkpoints import load_weights
from secateur.pipeline.training.loop import keep_freed_memory
from secateur.pipeline.workloads import Workload
from secateur.pipeline.workloads.data.content import Reading
from secateur.pruning.trace import trace

MAX_CACHED = 2
"""Evaluators that stay in one process; the one used longest ago goes."""


class BlobStore(Protocol):
    """Where an engine keeps blobs for workers that do not see the driver's files."""

    def fetch(self, sha256: str) -> bytes | None:
        """A blob's content; None if it was not published."""


class MissingError(LookupError):
    """A blob is neither here nor in the store; ``args[0]`` names it."""


def evaluate_batch(spec: Mapping[str, Any], batch: Mapping[str, Any], store: BlobStore | None = None) -> dict[str, Any]:
    """Evaluate the candidates of a batch.

    Args:
        spec: of the run, as ``WorkerPool`` describes it.
        batch: ``asks``, and the ``checkpoints`` they refer to.

    Returns:
        ``answers``, the fields of a ``Accuracy`` each, in order; or ``missing``: the hash of a blob to be published; or
        ``error``: what the user has to change.
    """
    leave_terminal()
    with _one_at_a_time:
        try:
            cached = _evaluator_for(spec, store)
            for name, file in batch["checkpoints"].items():
                cached.know(name, file, store)
            return {"answers": [asdict(cached.accuracy.evaluate(request_from_json(row))) for row in batch["asks"]]}
        except MissingError as missing:
            return {"missing": missing.args[0]}
        except UserError as error:
            return {"error": str(error)}


_one_at_a_time = threading.Lock()  # some engines run several tasks in one process
_cached: OrderedDict[str, CachedEvaluator] = OrderedDict()


class CachedEvaluator:
    """An accuracy evaluator with what it was made of.

    Raises:
        MissingError: a blob has to be published first.
        UserError: this process finds another network or other channel groups than the driver.
    """

    def __init__(self, spec: Mapping[str, Any], store: BlobStore | None) -> None:
        keep_freed_memory()
        self.files = tempfile.TemporaryDirectory(prefix="secateur-worker-")
        baseline = find_blob(spec["baseline"], store)
        template = None if spec["template"] is None else find_blob(spec["template"], store)
        order = None if spec["order"] is None else np.load(find_blob(spec["order"], store), allow_pickle=False).tolist()
        workload = open_data(spec, store).going_by(spec["metric"])
        model = workload.fresh_model()
        model.load_state_dict(load_weights(baseline))
        graph = trace(model.eval(), workload.example_input())
        if (found := groups_digest(graph)) != spec["groups"]:
            raise UserError(
                f"a worker finds other channel groups ({found}) than the driver ({spec['groups']}); install the same "
                "versions of Secateur and PyTorch on all machines"
            )
        quantised = {k.removeprefix(PRECISE): blob for k, blob in spec.items() if k.startswith(PRECISE)}
        files = {name: find_blob(blob, store) for name, blob in quantised.items()}
        scheme = next((blob["scheme"] for blob in quantised.values()), DEFAULT_SCHEME)
        opened = cache(lambda: None if template is None else OnnxTemplate.load(template, graph))
        precisions = Precisions(workload, opened, Path(self.files.name), scheme, files) if files else None
        self.accuracy = AccuracyEvaluator(
            Baseline(model, graph, workload, spec["seed"], _compute(spec["compute"])),
            Path(self.files.name),
            SearchSection.model_validate(spec["search"]),
            opened,
            deterministic=True,
            agreed=Agreed(spec["backend"], order),
            precisions=precisions,
        )

    def know(self, name: str, file: Mapping[str, Any], store: BlobStore | None) -> None:
        """Make a checkpoint's weights usable."""
        weights = self.accuracy.weights
        if name not in weights.checkpoints or weights.checkpoints[name].sha256 != file["sha256"]:
            weights.restore(name, Checkpoint.from_json(file, find_blob(file, store)))


def _evaluator_for(spec: Mapping[str, Any], store: BlobStore | None) -> CachedEvaluator:
    """The evaluator for a run; made, where there is none."""
    trust.accept(spec["code"])
    content = {name: value for name, value in spec.items() if name != IMAGES}
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    if key not in _cached:
        made = CachedEvaluator(spec, store)  # before another one goes: it may fail
        _cached[key] = made
        if len(_cached) > MAX_CACHED:
            _cached.popitem(last=False)[1].files.cleanup()
    _cached.move_to_end(key)
    return _cached[key]


def _compute(kind: str) -> torch.device:
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("a worker has no CUDA device, and the driver has; set compute: cpu, or take it off the cluster")
    return torch.device(kind)


def open_data(spec: Mapping[str, Any], store: BlobStore | None) -> Workload:
    """The run's workload: from the data the run file names, if it is here and the same; else from images sent along.

    Raises:
        MissingError: it is not here, and no images were sent yet.
    """
    with contextlib.suppress(UserError):
        workload = shipped_data.open_section(spec["workload"], Reading(check="none"))
        if workload.fingerprint == spec["fingerprint"]:
            return workload
    if spec[IMAGES] is None:
        raise MissingError(IMAGES)
    return shipped_data.unpack(spec["workload"], find_blob(spec[IMAGES], store))


def find_blob(blob: Mapping[str, Any], store: BlobStore | None) -> Path:
    """A file with the blob's content: the driver's own, or one kept here.

    Raises:
        MissingError: it is not here, and not in the store.
        UserError: what came from the store is something else.
    """
    kept: Path = home() / "blobs" / blob["sha256"]
    for path in (Path(blob["path"]), kept):
        with contextlib.suppress(OSError):  # another machine: no such folder, or no right to look into it
            if path.is_file() and sha256_of(path) == blob["sha256"]:
                return path
    content = None if store is None else store.fetch(blob["sha256"])
    if content is None:
        raise MissingError(blob["sha256"])
    if hashlib.sha256(content).hexdigest() != blob["sha256"]:
        raise UserError(f"blob {blob['sha256'][:16]} arrived altered; look at the engine's object store")
    write_whole(kept, content)
    return kept
