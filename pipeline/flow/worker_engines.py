"""Batches of candidates on Prefect's task runners: one Prefect task per batch, one cached evaluator per worker process.

A runner is started when the first batch is there. It is used by itself, not as the flow's: every process of
``ProcessPoolTaskRunner`` is a pool of its own here, because a pool ends with the first of its processes; and a flow
sends itself along with what is submitted to its own runner, which would take the whole run with it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from secateur.device_profiles.cores import usable_cores
from secateur.device_profiles.wording import command, number_of
from secateur.pipeline.children import end_with
from secateur.pipeline.config.schema import WorkersSection
from secateur.pipeline.errors import SurroundingsError, UserError
from secateur.pipeline.evaluation import worker as workers
from secateur.pipeline.evaluation.worker_pool import Engine, WorkerDiedError

TRAVELLING = "secateur-blob-"
"""Before the hash, in the names of what is published to a Dask cluster."""


@contextlib.contextmanager
def open_engine(section: WorkersSection) -> Iterator[Engine | None]:
    """The engine that a run file names; ends its workers, or lets go of the cluster, afterwards.

    Raises:
        UserError: its extra is not installed.
        SurroundingsError: there is no cluster at the address.
    """
    if section.engine == "none":
        yield None
        return
    kinds: dict[str, Callable[[WorkersSection], _Runner]] = {"processes": Processes, "dask": Dask, "ray": Ray}
    with contextlib.closing(kinds[section.engine](section)) as engine:
        yield engine


class _Runner(ABC):
    """What the engines share: a task runner that is started when it is first needed, and tasks through it."""

    def __init__(self, section: WorkersSection) -> None:
        self.section = section
        self.local = section.address is None
        self.count = section.count or usable_cores()
        self._starting = threading.Lock()
        self._api = ""

    @abstractmethod
    def perform(self, spec: Mapping[str, Any], batch: Mapping[str, Any]) -> Mapping[str, Any]: ...

    @abstractmethod
    def publish(self, sha256: str, path: Path) -> None: ...

    @abstractmethod
    def close(self) -> None: ...

    def _server(self) -> str:
        """Where the Prefect server of this process is, embedded or not."""
        from prefect.client.orchestration import get_client

        if not self._api:
            with self._starting, get_client(sync_client=True) as client:
                self._api = str(client.api_url)
        return self._api

    def _submit(self, runner: Any, arguments: Mapping[str, Any], deaths: tuple[type[Exception], ...]) -> Any:
        """A task's result, waited for.

        Raises:
            WorkerDiedError: one of ``deaths`` came instead.
        """
        from prefect import Task
        from prefect.cache_policies import NO_CACHE
        from prefect.exceptions import CrashedRun
        from prefect.settings import PREFECT_API_URL, temporary_settings

        count = len(arguments["batch"]["asks"])
        name = f"Evaluate {number_of(count, 'candidate(s)')}"
        task = Task(workers.evaluate_batch, name=name, cache_policy=NO_CACHE, persist_result=False, retries=0)
        died: tuple[type[Exception], ...] = (CrashedRun, *deaths)
        try:
            with temporary_settings({PREFECT_API_URL: self._server()}):  # workers start no servers of their own
                future = runner.submit(task, parameters=dict(arguments))
            return future.result()
        except died as error:
            raise WorkerDiedError(f"{type(error).__name__}: {error}") from error


class Processes(_Runner):
    """Processes of this machine, which end with this one."""

    def __init__(self, section: WorkersSection) -> None:
        super().__init__(section)
        self._idle: SimpleQueue[Any] = SimpleQueue()
        self._runners: list[Any] = []

    def perform(self, spec: Mapping[str, Any], batch: Mapping[str, Any]) -> Mapping[str, Any]:
        from concurrent.futures.process import BrokenProcessPool

        self._start()
        runner = self._idle.get()
        try:
            answer: Mapping[str, Any] = self._submit(runner, {"spec": spec, "batch": batch}, (BrokenProcessPool,))
            return answer
        except WorkerDiedError:
            runner.__exit__(None, None, None)  # a pool is of no use once its process is gone
            runner.__enter__()
            raise
        finally:
            self._idle.put(runner)

    def publish(self, sha256: str, path: Path) -> None:
        """Nothing to do: workers on this machine see every file."""

    def close(self) -> None:
        for runner in self._runners:
            runner.__exit__(None, None, None)

    def _start(self) -> None:
        from prefect.task_runners import ProcessPoolTaskRunner

        with self._starting:
            for _ in range(self.count - len(self._runners)):
                runner = ProcessPoolTaskRunner(max_workers=1, initializer=end_with, initargs=(os.getpid(),))
                self._runners.append(runner.__enter__())
                self._idle.put(runner)


class Dask(_Runner):
    """Dask's workers: of a cluster, or of one made for this run on this machine."""

    def __init__(self, section: WorkersSection) -> None:
        super().__init__(section)
        module = _extra("prefect_dask", "dask")
        local = {"n_workers": self.count, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
        where = {"cluster_kwargs": local} if section.address is None else {"address": section.address}
        self._runner = module.DaskTaskRunner(**where)
        self._published: list[str] = []
        self._client: Any = None
        if not self.local:
            self._start()
            self.count = section.count or max(1, len(self._runner.client.scheduler_info(n_workers=-1)["workers"]))

    def perform(self, spec: Mapping[str, Any], batch: Mapping[str, Any]) -> Mapping[str, Any]:
        from distributed.client import FutureCancelledError
        from distributed.comm.core import CommClosedError
        from distributed.scheduler import KilledWorker

        self._start()
        deaths = (KilledWorker, FutureCancelledError, CommClosedError)
        answer: Mapping[str, Any] = self._submit(
            self._runner, {"spec": spec, "batch": batch, "store": DaskBlobStore()}, deaths
        )
        return answer

    def publish(self, sha256: str, path: Path) -> None:
        """On the scheduler: what lies on workers goes with them."""
        name = TRAVELLING + sha256
        with self._starting:
            if name not in self._published:
                self._client.publish_dataset(**{name: path.read_bytes()}, override=True)
                self._published.append(name)

    def close(self) -> None:
        if self._client is not None:
            for name in self._published:
                self._client.unpublish_dataset(name)
            self._runner.__exit__(None, None, None)

    def _start(self) -> None:
        with self._starting:
            if self._client is None:
                self._runner.__enter__()
                try:
                    self._client = self._runner.client
                except OSError as error:
                    raise SurroundingsError(
                        f"no Dask scheduler answers at {self.section.address}: {error}; start one with `dask scheduler`"
                    ) from error


class DaskBlobStore:
    """Blobs published to the cluster that this process works for."""

    def fetch(self, sha256: str) -> bytes | None:
        from distributed import get_client

        try:
            content: bytes = get_client().get_dataset(TRAVELLING + sha256)
        except KeyError:
            return None
        return content


class Ray(_Runner):
    """Ray's workers: of a cluster, or of one made for this run on this machine."""

    def __init__(self, section: WorkersSection) -> None:
        super().__init__(section)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        module = _extra("prefect_ray", "ray")
        settings: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
        if section.address is None:
            self._runner = module.RayTaskRunner(init_kwargs={**settings, "num_cpus": self.count})
        else:
            self._runner = module.RayTaskRunner(address=section.address, init_kwargs={"log_to_driver": False})
        self._started = False
        self._refs: dict[str, Any] = {}
        if section.address is not None:
            self._start()
            self.count = section.count or max(1, int(_extra("ray", "ray").cluster_resources().get("CPU", 1)))

    def perform(self, spec: Mapping[str, Any], batch: Mapping[str, Any]) -> Mapping[str, Any]:
        import ray.exceptions
        from prefect_ray.context import remote_options

        self._start()
        deaths = (ray.exceptions.RayError,)
        with remote_options(max_retries=0):  # the worker pool counts deaths itself
            answer: Mapping[str, Any] = self._submit(
                self._runner, {"spec": spec, "batch": batch, "store": RayBlobStore(dict(self._refs))}, deaths
            )
        return answer

    def publish(self, sha256: str, path: Path) -> None:
        """Into the object store."""
        import ray

        with self._starting:
            if sha256 not in self._refs:
                self._refs[sha256] = ray.put(path.read_bytes())

    def close(self) -> None:
        self._refs = {}
        if self._started:
            self._runner.__exit__(None, None, None)

    def _start(self) -> None:
        with self._starting:
            if not self._started:
                try:
                    self._runner.__enter__()
                except (ConnectionError, ValueError, RuntimeError) as error:
                    raise SurroundingsError(
                        f"no Ray cluster answers at {self.section.address}: {error}; start one with `ray start --head`"
                    ) from error
                self._started = True


class RayBlobStore:
    """Blobs in the object store, by reference; a reference is followed where a blob is needed, and only then.

    Args:
        refs: hash -> reference.
    """

    def __init__(self, refs: Mapping[str, Any]) -> None:
        self.refs = refs

    def fetch(self, sha256: str) -> bytes | None:
        import ray

        if sha256 not in self.refs:
            return None
        content: bytes = ray.get(self.refs[sha256])
        return content


def _extra(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"workers.engine: {extra} needs what is not installed ({error}); run: "
            + command("pip", "install", f"secateur[{extra}]")
        ) from error
