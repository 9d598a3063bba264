"""The one door for writing: whole or not at all, for any number of writers, and what a full disk says."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from secateur.pipeline import errors, files
from secateur.pipeline.errors import SurroundingsError
from secateur.pipeline.files import sha256_of, sweep_parts, write_whole
from secateur.pipeline.foreign import exit_code
from secateur.pipeline.training.baselines import BaselineCache
from secateur.pipeline.training.checkpoints import load_weights, save_checkpoint, save_weights
from tests.pipeline.devices.test_faults_device import largest_file

ROOT = Path(__file__).parents[2]
WRITES_FOR_EVER = """
import os, sys
from pathlib import Path
from secateur.pipeline import files
real = os.write
def slowly(file, data):
    if file > 2:
        real(file, bytes(data)[:1])
        print("began", flush=True)
        sys.stdin.read()
    return real(file, data)
files.os.write = slowly
files.write_whole(Path(sys.argv[1]), b"new")
"""


def parts(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if files.PART.fullmatch(entry.name)]


def writer(path: Path) -> subprocess.Popen[str]:
    """A process in the middle of writing a file."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITES_FOR_EVER, str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "began\n"
    return process


def test_a_writer_that_is_killed_leaves_the_old_content_and_its_part_is_swept(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with writer(path) as process:
        (part,) = parts(tmp_path)
        assert sweep_parts(tmp_path) == []  # it is being written
        process.send_signal(signal.SIGKILL)
    assert path.read_bytes() == b"old"
    assert sweep_parts(tmp_path) == [part]
    assert list(tmp_path.iterdir()) == [path]


def test_the_first_write_to_a_folder_sweeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_swept", set())
    with writer(tmp_path / "other") as process:
        process.kill()
    assert parts(tmp_path)
    write_whole(tmp_path / "file", "text")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_many_writers_of_one_file_each_leave_a_whole_one(tmp_path: Path) -> None:
    path, faults = tmp_path / "deep" / "file", []
    contents = [bytes([i]) * 200_000 for i in range(8)]

    def write(content: bytes) -> None:
        try:
            for _ in range(20):
                write_whole(path, content)
                assert path.read_bytes() in contents
                sweep_parts(path.parent)  # takes from nobody what he is writing
        except BaseException as error:
            faults.append(error)
            raise

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_part_that_was_swept_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = files.fcntl.flock, []

    def late(file: int, how: int) -> None:
        if not seen:
            seen.append(file)
            parts(tmp_path)[0].unlink()
        real(file, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    write_whole(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES])
def test_a_failure_names_the_file_its_size_and_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "write", fail)
    with pytest.raises(SurroundingsError) as caught:
        write_whole(path, bytes(2_500_000))
    assert exit_code(caught.value) == errors.EXIT_SURROUNDINGS
    for said in (str(path), "it needs 2.5 MB", os.strerror(number), files.FAILURES[number]):
        assert said in str(caught.value)
    assert ("are free" in str(caught.value)) == (number in files.FULL)
    assert path.read_bytes() == b"old"
    assert not parts(tmp_path)


@pytest.mark.parametrize("kind", ["checkpoint", "weights"])
def test_a_disk_full_during_a_checkpoint_is_one_message(tmp_path: Path, kind: str) -> None:
    state = nn.Linear(300, 300).state_dict()
    path = tmp_path / "candidates" / kind
    with largest_file(50_000), pytest.raises(SurroundingsError) as caught:
        save_checkpoint(path, {"model": state}) if kind == "checkpoint" else save_weights(path, state)
    assert str(path) in str(caught.value)
    assert "it needs 0.4 MB" in str(caught.value)
    assert exit_code(caught.value) == errors.EXIT_SURROUNDINGS
    assert list(path.parent.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 50_000


# -- baselines


def trained(log: list[Path], value: float = 1.0) -> object:
    def train(checkpoint: Path) -> Mapping[str, Tensor]:
        log.append(checkpoint)
        return {"weight": torch.full((4,), value)}

    return train


def test_a_kept_baseline_is_used_only_while_it_is_what_was_written(tmp_path: Path) -> None:
    cache, log = BaselineCache(tmp_path, print), []
    content, new = cache.get("key", trained(log))
    assert new and cache.get("key", trained(log)) == (content, False)
    kept = tmp_path / "key.safetensors"
    assert sha256_of(kept) == hashlib.sha256(content).hexdigest()
    damages = {
        "cut short": lambda: kept.write_bytes(content[:-2]),
        "another value": lambda: kept.write_bytes(content[:-1] + b"\x01"),
        "no digest": lambda: kept.with_suffix(".sha256").unlink(),
        "a digest of nothing": lambda: kept.with_suffix(".sha256").write_bytes(b"\xff"),
        "gone": kept.unlink,
    }
    for number, (name, damage) in enumerate(damages.items(), start=2):
        damage()
        assert cache.get("key", trained(log)) == (content, True), name
        assert len(log) == number
        assert load_weights(kept)["weight"].tolist() == [1.0] * 4


def test_runs_that_want_the_same_baseline_train_it_once(tmp_path: Path) -> None:
    """Processes in truth; threads here, which lock through file descriptors of their own just so."""
    log: list[Path] = []
    said: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def slowly(checkpoint: Path) -> Mapping[str, Tensor]:
        log.append(checkpoint)
        begun.set()
        go_on.wait(60)
        return {"weight": torch.ones(4)}

    def second_says(line: str) -> None:
        said.append(line)
        go_on.set()

    answers: list[tuple[bytes, bool]] = []
    first = threading.Thread(target=lambda: answers.append(BaselineCache(tmp_path, print).get("key", slowly)))
    first.start()
    assert begun.wait(60)
    answers.append(BaselineCache(tmp_path, second_says).get("key", slowly))
    first.join(60)
    assert len(log) == 1
    assert {content for content, _ in answers} == {answers[0][0]}
    assert sorted(new for _, new in answers) == [False, True]
    assert f"process {os.getpid()}" in said[0]
