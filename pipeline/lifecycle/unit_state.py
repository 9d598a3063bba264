"""The state of an interrupted run as one file, from which it goes on in another place.

A safetensors file of byte arrays, one for each file of the run directory that a resume needs, by its path; nothing in
it is run or unpickled (checkpoints are read with ``weights_only``; kept results of stages, which Prefect reads, stay
behind). What follows from other things is left out: those results, which the journal gives again, ONNX files, logs, and
the record of the data, whose fingerprint is in the journal. A baseline that was trained comes along from the home.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from secateur.device_profiles.wording import printable
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.errors import JournalError, UserError
from secateur.pipeline.files import sha256_of, write_whole
from secateur.pipeline.progress import Silent
from secateur.pipeline.run.journal import read_journal
from secateur.pipeline.run.opening import looks_at_latency, open_workload
from secateur.pipeline.run.origin import ORIGIN, origin_of
from secateur.pipeline.run.run import open_run_directory
from secateur.pipeline.surroundings import home
from secateur.pipeline.workloads.data.content import Reading
from secateur.pipeline.workloads.data.record import write as write_record

MOST_BYTES = 256 << 20
"""Of a state that is read."""
RUN, BASELINES, BASELINE = "run", "baselines", "baseline.safetensors"
KEPT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,=+-]*(/[A-Za-z0-9_][A-Za-z0-9_.,=+-]*){1,3}")
"""Paths in a state."""
LEFT_OUT = re.compile(
    r".*\.(onnx|onnx\.data|log|html|parquet|lock|part)"
    r"|origin\.json|data\.jsonl?|baseline\.safetensors|tracking\..*|(stages|workers|version)/.*|\..*"
)
"""Files of a run directory that are made again."""


def pack(directory: Path, config: RunFile, pieces: int) -> bytes:
    """What a resume needs of a run, as the content of one file.

    Args:
        pieces: how many the run has had: the state with most is the latest.

    Raises:
        OSError: a file cannot be read.
    """
    found = dict([*_of_run(directory, config), *_of_baseline(directory)])
    content = {path: np.frombuffer(data, np.uint8) for path, file in found.items() if (data := file.read_bytes())}
    made: bytes = save(content, metadata={"run_id": directory.name, "pieces": str(pieces)})
    return made


def _of_run(directory: Path, config: RunFile) -> Iterator[tuple[str, Path]]:
    for file in sorted(directory.rglob("*")):
        path = file.relative_to(directory).as_posix()
        left_out = any(LEFT_OUT.fullmatch(text) for text in (path, file.name))
        if path == "device.json":  # another machine may go on where no latency counts
            left_out = not looks_at_latency(config)
        if file.is_file() and not left_out:
            yield f"{RUN}/{path}", file


def _of_baseline(directory: Path) -> Iterator[tuple[str, Path]]:
    """Files of the home for a baseline that the run has trained, or is training."""
    folder, own, begun = home() / BASELINES, directory / BASELINE, (directory / "run.yaml").stat().st_mtime
    files = [*folder.glob("*.precision"), *(file for file in folder.glob("*.ckpt") if file.stat().st_mtime >= begun)]
    if own.is_file():
        digest = sha256_of(own)
        for kept in folder.glob("*.sha256"):
            if kept.read_text(encoding="ascii").strip() == digest:
                files += folder.glob(f"{kept.stem}.*")
    for file in sorted({file for file in files if file.suffix != ".lock"}):
        yield f"{BASELINES}/{file.name}", file


def run_of(file: Path) -> tuple[str, int]:
    """The id of the run whose state a file is, and how many pieces it has had.

    Raises:
        UserError: it is none.
    """
    run_id, pieces, _ = _opened(file)
    return run_id, pieces


def unpack(file: Path) -> Path:
    """Make a run directory in this home from a state; it is a run of this place from now on.

    Raises:
        UserError: it is no state, or the data here is not what the run began with.
        SurroundingsError: the disk is full.
    """
    run_id, _, content = _opened(file)
    directory = home() / "runs" / run_id
    for path, data in content.items():
        place, _, rest = path.partition("/")
        write_whole({RUN: directory, BASELINES: home() / BASELINES}[place] / rest, data)
    write_whole(directory / ORIGIN, json.dumps({"run_id": run_id}) + "\n")
    config = open_run_directory(directory)[1]
    write_whole(directory / ORIGIN, json.dumps(origin_of(run_id, config)) + "\n")
    _record_data(directory, config)
    return directory


def _record_data(directory: Path, config: RunFile) -> None:
    """Write down which images the run has, which must be those that its journal was begun with."""
    try:
        header = read_journal(directory / "journal.jsonl")[0]
    except JournalError as error:
        raise UserError(f"the state of {directory.name} holds no journal: {error}") from error
    workload = open_workload(config, Reading(Silent()))
    if header.get("data") not in (None, workload.fingerprint):
        raise UserError(
            f"the data here ({workload.fingerprint}) is not what the run {directory.name} began with "
            f"({header['data']}); set SECATEUR_DATA to the folder of that data"
        )
    write_record(workload.record, directory)


def _opened(file: Path) -> tuple[str, int, dict[str, bytes]]:
    """The run's id, its pieces, and its files by path.

    Raises:
        UserError: the file is too large, damaged, or holds other paths than those of a run.
    """
    wrong = f"{printable(file)} is no state of a run"
    try:
        if file.stat().st_size > MOST_BYTES:
            raise UserError(f"{wrong}: it has more than {MOST_BYTES:,} bytes")
        with safe_open(file, framework="numpy") as opened:
            told = opened.metadata() or {}
            run_id, pieces = told.get("run_id", ""), int(told.get("pieces", "0"))
            content = {path: opened.get_tensor(path).tobytes() for path in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{wrong}: {printable(error)}") from error
    foreign = [path for path in content if not KEPT.fullmatch(path) or path.split("/")[0] not in (RUN, BASELINES)]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", run_id) or foreign:
        raise UserError(f"{wrong}: it names {printable(foreign[:1] or [run_id])}")
    return run_id, pieces, content
