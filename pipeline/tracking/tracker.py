"""A run's candidates and model in MLflow.

MLflow is told everything, and trusted with nothing: the journal is the record. Candidates are delivered by a thread
that works through the journal's records. After any doubt (a failure, a restart) it first asks the server what it
already has, so that none is lost or doubled, however often the server or this process ends.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from secateur.pipeline.config.schema import TrackingSection
from secateur.pipeline.errors import TrackingError, UserError, masked, placeless
from secateur.pipeline.tracking.answers import is_refusal
from secateur.pipeline.tracking.comparable import Record as Record
from secateur.pipeline.tracking.comparable import name_of, params_of
from secateur.pipeline.tracking.delivery import Child, Delivery, RefusedError, alone, write
from secateur.pipeline.tracking.ownership import CANDIDATE_TAG, PARENT_TAG
from secateur.pipeline.tracking.registry import Registry, Version
from secateur.pipeline.tracking.store import (
    RUN_TAG,
    Unreachable,
    connect,
    experiment_of,
    first_line,
    redacted,
    store_uri,
)
from secateur.pruning.search.protocol import on_images

FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0
MAX_TEXT = 5000
MANY = 64
"""With so many candidates delivered, a process beside this one takes over: it costs some seconds to start."""
SERIES_EVERY_S, MAX_SERIES = 5.0, 900
"""The learning curve's points go to MLflow together, this often, or when there are so many (it takes 1000 at once)."""
SERIES = ("reward", "macs", "latency_ratio", "p50_ms")
"""Metrics that, beside those on images, are also kept as a series on the parent run: the learning curve."""


NOTE, CONTEXT = "mlflow.note.content", "mlflow.data.context"
"""Tags of MLflow's own: the description of a run, and what a data set is for."""
BECAME = "\n\n---\n\n"
"""Between what became of a run's model and its card, in the description."""
REPORT_TAG = "report"
"""Of a version: where the report lies that knows what became of it."""


@dataclass(frozen=True)
class Data:
    """The data of a run.

    Args:
        name: what it is called.
        digest: of what is in it, and of how it is split.
        images: how many each split has, by the split's name.
        shape: of a batch of them as the network sees it, the first dimension -1.
    """

    name: str
    digest: str
    images: Mapping[str, int]
    shape: tuple[int, ...]

    def inputs(self) -> list[DatasetInput]:
        """A data set of MLflow's for each split."""
        spec = [{"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": list(self.shape)}}]
        schema = json.dumps({"mlflow_tensorspec": {"features": json.dumps(spec), "targets": None}})
        source = json.dumps({"tags": {"data": self.name}})
        return [
            DatasetInput(
                Dataset(f"{self.name}.{split}", self.digest, "code", source, schema, json.dumps({"num_rows": count})),
                [InputTag(CONTEXT, split)],
            )
            for split, count in self.images.items()
        ]


class Tracker:
    """One run in MLflow: a parent run, a child run per candidate, and the registered model.

    Args:
        section: the run file's ``tracking`` section.
        home: SECATEUR_HOME, for the embedded SQLite store and artifacts.
        run_id: Secateur's id of the run; the parent is found again by it.
        run_name: shown in MLflow.
        params: of the parent run.
        lock: file of the lock under which candidates are written, whichever process does it; None = none is needed.
        derived: a candidate's record -> what follows from its metrics and the unpruned network's (``reward``,
            ``macs_ratio``), as far as that is known.
        data: that the run uses; None = that is not told.
    """

    def __init__(
        self,
        section: TrackingSection,
        home: Path,
        run_id: str,
        run_name: str,
        params: Mapping[str, Any],
        labels: Mapping[str, str] | None = None,
        lock: Path | None = None,
        derived: Callable[[Record], Mapping[str, float]] = lambda _: {},
        data: Data | None = None,
    ) -> None:
        self.section, self.home, self.run_id, self.run_name, self.params = section, home, run_id, run_name, params
        self.labels, self.lock, self.derived, self.data = dict(labels or {}), lock, derived, data
        self.uri = store_uri(section, home)
        self.failure = ""
        self.refused: dict[str, str] = {}
        """Candidates that MLflow took for wrong -> why; they are in the journal and the table of candidates."""
        self._client: MlflowClient | None = None
        self._parent = ""
        self._delivered: set[str] = set()
        self._queued: set[str] = set()
        self._pending: deque[Record] = deque()
        self._delivery: Delivery | None = None
        self._series: list[Metric] = []
        self._series_told, self._flushing = 0.0, False
        self._changed = threading.Condition()
        self._closing = False
        self._connecting = threading.Lock()
        self._thread = threading.Thread(target=self._deliver_all, name="tracking", daemon=True)

    # -- connection --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin delivering in the background.

        Raises:
            TrackingError: the server is unreachable and the run file says ``required: true``.
        """
        if self.section.required:
            try:
                self._connect()
            except Unreachable as error:
                raise TrackingError(
                    f"tracking server {redacted(self.uri)} is required and not usable: {first_line(error)}. "
                    "Start it, correct tracking.uri, or set tracking.required: false to deliver later"
                ) from error
        # Imported here, by one thread: the stores' modules are imported late otherwise, and not safely by two threads.
        import mlflow.store.model_registry.sqlalchemy_store
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

        self._thread.start()

    def _connect(self) -> MlflowClient:
        """The client, with the parent run found or made and the delivered candidates known."""
        with self._connecting:
            if self._client is not None:
                return self._client
            client = connect(self.uri)
            experiment_id = experiment_of(client, self.uri, self.section.experiment, self.home, self.section.take_over)
            runs = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{self.run_id}'", max_results=1)
            if runs:
                self._parent = runs[0].info.run_id
            else:
                tags = {**self.labels, RUN_TAG: self.run_id}
                self._parent = client.create_run(experiment_id, tags=tags, run_name=self.run_name).info.run_id
                params = [Param(key, placeless(masked(str(value)))[:MAX_TEXT]) for key, value in self.params.items()]
                client.log_batch(self._parent, params=params)
                if self.data is not None:
                    client.log_inputs(self._parent, self.data.inputs())
            self._experiment_id = experiment_id
            with alone(self.lock):  # what tells MLflow for a dead process of this run may not have ended yet
                self._delivered = self._children(client, experiment_id)
            self._client = client
            return client

    def _children(self, client: MlflowClient, experiment_id: str) -> set[str]:
        """Ids of the candidates the server has in full; those cut short are removed and sent again.

        Whatever others nested under the run is no candidate, and left alone.
        """
        ids, token = set(), None
        while True:
            query = f"tags.`{PARENT_TAG}` = '{self._parent}'"
            page = client.search_runs([experiment_id], query, max_results=1000, page_token=token)
            for run in page:
                key = run.data.tags.get(CANDIDATE_TAG)
                if key is None:
                    continue
                if run.info.status == "FINISHED" and key not in ids:
                    ids.add(key)
                else:
                    client.delete_run(run.info.run_id)
            token = page.token
            if not token:
                return ids

    def label(self, name: str, value: str) -> None:
        """Tag the parent run: when it is made, or at its end where it is there already."""
        self.labels[name] = value

    # -- candidates --------------------------------------------------------------------------------------------------

    def candidate(self, record: Record) -> None:
        """Queue a journal record of a candidate; returns at once."""
        with self._changed:
            if _key(record) not in self._queued:
                self._queued.add(_key(record))
                self._pending.append(record)
                self._changed.notify_all()

    def curve(self, name: str, points: Mapping[str, Sequence[tuple[int, float]]]) -> None:
        """Queue the epochs of a training.

        Args:
            name: of what was trained; the series are ``NAME.loss`` and so on.
            points: (epoch, value) of each series.
        """
        now_ms = int(time.time() * 1000)
        with self._changed:
            for what, values in points.items():
                self._series += [Metric(f"{name}.{what}", value, now_ms, epoch) for epoch, value in values]
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> int:
        """Wait until everything queued is delivered; returns how many are not after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._flushing = True
            self._changed.notify_all()
            while (self._pending or self._series) and self._thread.is_alive() and time.monotonic() < deadline:
                self._changed.wait(min(0.5, max(0.01, deadline - time.monotonic())))
            self._flushing = False
            return len(self._pending)

    def _deliver_all(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._closing:
            with self._changed:
                if not self._pending and not self._series_due():
                    self._changed.wait(1.0)
                record = self._pending[0] if self._pending else None
                if record is None and not self._series_due():
                    continue
            try:
                client = self._connect()
                if record is not None:
                    self._deliver_or_refuse(client, record)
                if self._series_due():
                    self._tell_series(client)
            except BaseException as error:
                self.failure, self._client = first_line(error), None
                self._dismiss()
                if not isinstance(error, (*Unreachable, UserError)):
                    raise  # a bug; `flush` tells that nothing is delivered any more
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                continue
            self.failure, pause_s = "", FIRST_PAUSE_S
            with self._changed:
                if record is not None:
                    self._pending.popleft()
                self._changed.notify_all()

    def _series_due(self) -> bool:
        waited = time.monotonic() - self._series_told
        return bool(self._series) and (self._flushing or waited >= SERIES_EVERY_S or len(self._series) >= MAX_SERIES)

    def _tell_series(self, client: MlflowClient) -> None:
        """Points of the learning curve; MLflow takes a point it has already for the same one."""
        while self._series:
            try:
                client.log_batch(self._parent, metrics=self._series[:MAX_SERIES])
            except MlflowException as error:
                if not is_refusal(error):
                    raise
                self._tell_each(client, self._series[:MAX_SERIES])
            with self._changed:
                del self._series[:MAX_SERIES]
        self._series_told = time.monotonic()

    def _tell_each(self, client: MlflowClient, points: Sequence[Metric]) -> None:
        """Points one by one, without those that are refused: the candidates' own runs have their values."""
        for point in points:
            try:
                client.log_batch(self._parent, metrics=[point])
            except MlflowException as error:
                if not is_refusal(error):
                    raise

    def _deliver_or_refuse(self, client: MlflowClient, record: Record) -> None:
        """Deliver a candidate; one that is refused is noted, and does not block those behind it."""
        try:
            self._deliver(client, record)
        except RefusedError as error:
            self.refused[_key(record)] = first_line(error)
            self._client = None  # should it be the experiment that is refused, connecting anew tells

    def _deliver(self, client: MlflowClient, record: Record) -> None:
        candidate, evaluation = record["candidate"], record["evaluation"]
        key, at_ms = _key(record), int(record["time"] * 1000)
        figures = {**evaluation["metrics"], **self.derived(record)}
        values = {name: float(v) for name, v in figures.items() if np.isfinite(v)}
        if key not in self._delivered:
            self._deliver_child(client, record, key, at_ms, values)
        if record["kind"] == "finetune" or "latency_ratio" in values:  # an earlier process may not have told it
            # A candidate as cut and fine-tuned are points of two curves; neither sees another split than the search's.
            curve = f"{record['stage']}.tuned" if record["kind"] == "finetune" else record["stage"]
            told = {f"{curve}.{name}": values[name] for name in SERIES if name in values}
            searched = on_images(evaluation["metrics"]).keys() & values.keys()
            told |= {f"{curve}.search_split.{name}": values[name] for name in searched}
            points = [Metric(name, value, at_ms, candidate["id"]) for name, value in told.items()]
            with self._changed:
                self._series += points

    def _deliver_child(
        self, client: MlflowClient, record: Record, key: str, at_ms: int, values: Mapping[str, float]
    ) -> None:
        """The child run of a candidate."""
        candidate, evaluation = record["candidate"], record["evaluation"]
        tags = {
            PARENT_TAG: self._parent,
            CANDIDATE_TAG: key,
            "candidate.stage": record["stage"],
            "candidate.origin": candidate["origin"],
            "candidate.parents": " ".join(map(str, candidate["parents"])),
            "candidate.status": evaluation["status"],
            "candidate.reason": placeless(evaluation["reason"]),
            "candidate.forward": evaluation.get("forward", "unknown"),
            "candidate.precision": evaluation.get("precision", "fp32"),
            "candidate.plan": _whole(candidate["plan"], candidate["digest"]),
            "candidate.digest": candidate["digest"],
            "candidate.base": candidate["base"] or "baseline",
            "candidate.kind": record["kind"],
        }
        if share := candidate.get("projected_share"):
            tags["candidate.projected_share"] = f"{share:g}"
        told = {k: v[:MAX_TEXT] for k, v in tags.items()}
        child = Child(self._experiment_id, name_of(record), at_ms, told, values, params_of(record))
        if self._delivery is None and len(self._delivered) >= MANY:
            self._delivery = Delivery(self.uri, self.lock)
        if (delivery := self._delivery) is not None:
            delivery.write(child)
        else:
            with alone(self.lock):
                write(client, child)
        self._delivered.add(key)

    # -- the end of a run --------------------------------------------------------------------------------------------

    def finish(
        self, metrics: Mapping[str, float], files: list[Path], version: Version | None = None, description: str = ""
    ) -> None:
        """Log the run's final metrics and files on the parent and end it.

        Args:
            version: that the run has registered; its model carries the metrics too.
            description: of the run, as Markdown.

        Raises:
            TrackingError: the server is unreachable.
        """
        try:
            client = self._connect()
            now_ms, model = int(time.time() * 1000), None if version is None else version.model_id
            told = [
                Metric(name, value, now_ms, 0, model, *self._data_of(name), self._parent)
                for name, value in metrics.items()
                if np.isfinite(value)
            ]
            labels = {**self.labels, **({NOTE: description[:MAX_TEXT]} if description else {})}
            client.log_batch(self._parent, told, tags=[RunTag(name, label) for name, label in labels.items()])
            for file in files:
                client.log_artifact(self._parent, str(file))
            client.set_terminated(self._parent)
        except Unreachable as error:
            self._client = None
            raise TrackingError(f"tracking server {redacted(self.uri)}: {first_line(error)}") from error

    def renew(self, files: Sequence[Path], version: Version, became: str) -> None:
        """Log files of the ended run once more, as they are now that it is known what became of its model.

        Args:
            files: those that were logged before, by their names.
            version: that the run has registered; a tag of it leads to the report, for its own copy is of before.
            became: of the version, in a sentence; the run's description begins with it.

        Raises:
            TrackingError: the server is unreachable.
        """
        try:
            client = self._connect()
            for file in files:
                client.log_artifact(self._parent, str(file))
            described = client.get_run(self._parent).data.tags.get(NOTE, "")
            page = described.partition(BECAME)[2] if BECAME in described else described
            client.set_tag(self._parent, NOTE, f"{became}{BECAME}{page}"[:MAX_TEXT])
            client.set_model_version_tag(version.name, version.version, REPORT_TAG, f"runs:/{self._parent}/report.html")
        except Unreachable as error:
            self._client = None
            raise TrackingError(f"tracking server {redacted(self.uri)}: {first_line(error)}") from error

    def _data_of(self, metric: str) -> tuple[str | None, str | None]:
        """Name and digest of the data set that a metric is on."""
        split = next((split for split in ("test", "search") if f".{split}_" in metric), None)
        return (None, None) if self.data is None or split is None else (f"{self.data.name}.{split}", self.data.digest)

    def register(
        self,
        name: str,
        devices: Sequence[str],
        onnx_file: Path,
        example: np.ndarray,
        outputs: np.ndarray,
        tags: Mapping[str, Any],
        files: Sequence[Path] = (),
        facts: Mapping[str, Any] | None = None,
        description: str = "",
    ) -> Version:
        """Register an ONNX file as the challenger of its devices; once per run, however often it is called.

        Args:
            devices: the run's own first.
            example: input example, shape (1, ...).
            outputs: what the model answers to it, for the signature.
            tags: of the version.
            files: what else belongs to it.
            facts: of its provenance.
            description: of the version, as Markdown.

        Raises:
            TrackingError: the server is unreachable or refuses.
        """
        try:
            self._connect()
        except Unreachable as error:
            self._client = None
            raise TrackingError(f"tracking server {redacted(self.uri)}: {first_line(error)}") from error
        version = self.registry.add(
            name,
            devices[0],
            onnx_file,
            run_key=self.run_id,
            example=example,
            outputs=outputs,
            experiment=self.section.experiment,
            parent=self._parent,
            tags=tags,
            files=files,
            facts=facts,
            description=description,
        )
        for device in devices:
            self.registry.challenge(name, version.version, device)
        return version

    @cached_property
    def registry(self) -> Registry:
        """The registry of the run's MLflow."""
        return Registry(self.uri, self.home, take_over=self.section.take_over)

    def close(self) -> None:
        """Stop the delivery thread; what is left stays in the journal."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        self._dismiss()

    def _dismiss(self) -> None:
        """Do without the process beside this one, until it is needed again."""
        delivery, self._delivery = self._delivery, None
        if delivery is not None:
            delivery.close()


def _whole(plan: str, digest: str) -> str:
    """The plan's text, or where to read it: a tag has a limit, and a plan cut short would be no plan."""
    return (
        plan if len(plan) <= MAX_TEXT else f"too long for a tag: row {digest} of candidates.parquet on the parent run"
    )


def _key(record: Record) -> str:
    """Names a record within its run."""
    return f"{record['stage']}:{record['kind']}:{record['candidate']['id']}"
