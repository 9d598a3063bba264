"""A run's candidates written to MLflow, by this process or by one beside it.

MLflow's client is 30 ms of Python per candidate. In a thread most of them are taken from the search, whose forward
passes wait for the interpreter; in a process beside it they are not. That process reads candidates from its input, a
JSON line each, answers each with a line, and ends with its input: however its parent ends, it does not stay behind.

MLflow's API takes no run id and has no transactions, so that whoever writes late doubles. So a candidate is written
under a lock that all processes of its run share, only while the parent lives, and only if it is not there.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

import secateur
from secateur.pipeline.errors import SurroundingsError, masked
from secateur.pipeline.locks import held
from secateur.pipeline.tracking.answers import is_refusal
from secateur.pipeline.tracking.ownership import CANDIDATE_TAG, PARENT_TAG
from secateur.pipeline.tracking.store import Unreachable, connect, first_line

CLOSE_S, DEATH_S = 5.0, 60.0
"""How long its end is waited for: after a kill, and after it gave up by itself (a busy machine takes its time)."""
ALONE_WAIT_S = 120.0
"""How long it waits for another process of the run that writes."""


@dataclass(frozen=True)
class Child:
    """The run of one candidate.

    Args:
        experiment_id: where it belongs.
        at_ms: when it was evaluated, milliseconds since 1970.
        params: what candidates are compared by.
    """

    experiment_id: str
    name: str
    at_ms: int
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    params: Mapping[str, str] = field(default_factory=dict)


class DeliveryError(OSError):
    """MLflow could not be told by the process beside this one; says why."""


class RefusedError(DeliveryError):
    """MLflow took a candidate for wrong, and would do so again."""


def write(client: MlflowClient, child: Child) -> None:
    """Write a candidate's run; it is there in full once it is FINISHED.

    Raises:
        RefusedError: MLflow takes it for wrong; nothing of it is left there.
        MlflowException: MLflow is unreachable, or fails.
    """
    metrics, run = [Metric(name, value, child.at_ms, 0) for name, value in child.metrics.items()], None
    try:
        run = client.create_run(child.experiment_id, start_time=child.at_ms, tags=dict(child.tags), run_name=child.name)
        params = [Param(name, value) for name, value in child.params.items()]
        client.log_batch(run.info.run_id, metrics, params)  # what no chart compares is a tag, which costs less
        client.set_terminated(run.info.run_id, "FINISHED", child.at_ms)
    except MlflowException as error:
        if not is_refusal(error):
            raise
        if run is not None:
            client.delete_run(run.info.run_id)
        raise RefusedError(first_line(error)) from error


def is_there(client: MlflowClient, child: Child) -> bool:
    """Whether a candidate's run is there in full; one that was cut short is removed."""
    key, parent = child.tags[CANDIDATE_TAG], child.tags[PARENT_TAG]
    query = f"tags.`{PARENT_TAG}` = '{parent}' and tags.`{CANDIDATE_TAG}` = '{key}'"
    runs = client.search_runs([child.experiment_id], query)
    for run in runs:
        if run.info.status != "FINISHED":
            client.delete_run(run.info.run_id)
    return any(run.info.status == "FINISHED" for run in runs)


@contextlib.contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    """No other process of the run writes candidates meanwhile.

    Raises:
        OSError: another one has done so for ``ALONE_WAIT_S``.
    """
    with contextlib.ExitStack() as stack:
        if lock is not None:
            try:
                stack.enter_context(held(lock, "the run's candidates in MLflow", ALONE_WAIT_S, lambda _: None))
            except SurroundingsError as error:
                raise OSError(str(error)) from error
        yield


class Delivery:
    """The process beside this one; it takes some seconds to start, for which its first candidate waits.

    Args:
        uri: of the store. It may hold a password, so it is no argument of the process, where others could read it.
        lock: as the tracker's.
    """

    def __init__(self, uri: str, lock: Path | None = None) -> None:
        root = str(Path(secateur.__file__).parents[1])
        self._noise = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by `close`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "secateur.pipeline.tracking.delivery"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._noise,
            text=True,
            start_new_session=True,  # Ctrl-C is for the run, which delivers the rest before it ends
        )
        self._send({"uri": uri, "lock": None if lock is None else str(lock.absolute())})

    def write(self, child: Child) -> None:
        """Write a candidate's run.

        Raises:
            RefusedError: MLflow takes it for wrong.
            DeliveryError: the server is unreachable or refuses everything, or the process was killed.
            RuntimeError: anything else went wrong there.
        """
        self._send(asdict(child))
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise self._death()
        told = json.loads(answer)
        if told["refused"]:
            raise RefusedError(told["refused"])
        if told["unreachable"]:
            raise DeliveryError(told["unreachable"])

    def close(self) -> None:
        """End the process; what it is writing is cut short, and written again by the run's next process."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_S)
        self._noise.close()

    def _send(self, line: Mapping[str, object]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def _death(self) -> Exception:
        """Why there is no answer."""
        if self._process.wait(DEATH_S) < 0:
            return DeliveryError("the process that tells MLflow was killed")
        self._noise.seek(0)
        last = (self._noise.read().strip().splitlines() or ["no reason given"])[-1]
        return RuntimeError(f"the process that tells MLflow failed: {masked(last)}")


def main() -> None:
    """Write what comes until nothing comes any more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints is no answer
    told = json.loads(sys.stdin.readline())
    client, lock = None, None if told["lock"] is None else Path(told["lock"])
    for line in sys.stdin:
        unreachable = refused = ""
        try:
            client = client or connect(told["uri"])
            child = Child(**json.loads(line))
            with alone(lock):
                if _parent_is_gone():
                    return  # whoever has taken its place sees to this candidate
                if not is_there(client, child):
                    write(client, child)
        except RefusedError as error:
            refused = first_line(error)
        except Unreachable as error:
            unreachable = first_line(error)
        answers.write(json.dumps({"unreachable": unreachable, "refused": refused}) + "\n")
        answers.flush()


def _parent_is_gone() -> bool:
    """Whether nobody holds the other end of the input any more."""
    waiting = select.poll()
    waiting.register(0, select.POLLHUP)
    return any(event & select.POLLHUP for _, event in waiting.poll(0))


if __name__ == "__main__":
    main()
