"""What is in files: digests follow the content, a second look reads nothing, the cache can be lost."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from secateur.pipeline.files import sha256_of
from secateur.pipeline.surroundings import home
from secateur.pipeline.workloads.data import content
from secateur.pipeline.workloads.data.content import Reading, kept, look
from tests.pipeline.workloads.data.pictures import noise


def files(folder: Path, num: int = 5, kind: str = "png") -> list[Path]:
    folder.mkdir(exist_ok=True)
    for i in range(num):
        noise(seed=i).save(folder / f"{i}.{kind}")
    found = sorted(folder.iterdir())
    for file in found:  # long ago, so that they are remembered
        os.utime(file, (time.time() - 100, time.time() - 100))
    return found


@pytest.fixture(autouse=True)
def _settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "CLOCK_STEP_NS", -1)  # every file counts as changed long ago


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that were opened."""
    opened: list[Path] = []
    whole = Path.read_bytes

    def spy(self: Path) -> bytes:
        opened.append(self)
        return whole(self)

    monkeypatch.setattr(Path, "read_bytes", spy)
    return opened


def test_a_digest_is_of_the_file_and_a_second_look_reads_nothing(tmp_path: Path, read: list[Path]) -> None:
    found = look(files(tmp_path / "a"), Reading())
    assert [one.digest for one in found] == [bytes.fromhex(sha256_of(f)) for f in files_of(tmp_path)]
    assert all(one.decoded and one.size == (24, 16) and not one.fault for one in found)
    read.clear()
    assert look(files_of(tmp_path), Reading()) == found and not read
    assert look(files_of(tmp_path), Reading(check="none")) == found and not read


def files_of(folder: Path) -> list[Path]:
    return sorted((folder / "a").iterdir())


def test_without_a_check_nothing_is_decoded_until_it_is_asked_for(tmp_path: Path, read: list[Path]) -> None:
    paths = files(tmp_path / "a")
    paths[0].write_bytes(b"no image")
    brief = look(paths, Reading(check="none"))
    assert not any(one.decoded or one.fault or one.size != (0, 0) for one in brief)
    sized = look(paths, Reading(check="none"), sizes=True)
    assert [one.size for one in sized[1:]] == [(24, 16)] * 4 and sized[0].fault
    whole = look(paths, Reading())
    assert [one.digest for one in whole] == [one.digest for one in brief]
    assert [bool(one.fault) for one in whole] == [True, False, False, False, False]


@pytest.mark.parametrize("how", ["swapped", "rewritten", "same size and time"])
def test_another_content_under_the_same_name_is_seen(how: str, tmp_path: Path) -> None:
    paths = files(tmp_path / "a", kind="bmp")  # all of one size
    before = look(paths, Reading())
    stamp = paths[0].stat()
    if how == "swapped":
        aside = tmp_path / "aside"
        paths[0].rename(aside)
        paths[1].rename(paths[0])
        aside.rename(paths[1])
    else:
        paths[0].write_bytes(bytes(255 - byte if i > 60 else byte for i, byte in enumerate(paths[0].read_bytes())))
        if how == "same size and time":
            os.utime(paths[0], ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    after = look(paths, Reading())
    assert after[0].digest != before[0].digest
    assert (after[1].digest == before[0].digest) == (how == "swapped")


def test_of_many_files_a_sample_is_decoded_and_the_headers_of_the_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[Path]
) -> None:
    monkeypatch.setattr(content, "MANY", 8)
    monkeypatch.setattr(content, "SAMPLE", 4)
    paths = files(tmp_path / "a", 12)
    found = look(paths, Reading(check="sample"))
    assert sum(one.decoded for one in found) == len(read) == 4
    assert {one.size for one in found} == {(24, 16)}
    assert not any(one.read for one in found if not one.decoded)
    everything = look(paths, Reading())  # what a sample did not read is read now
    assert all(one.decoded and one.read for one in everything)
    assert [one.digest for one in everything] == [bytes.fromhex(sha256_of(f)) for f in paths]


@pytest.mark.parametrize("damage", ["removed", "junk", "folder in its place", "read-only"])
def test_the_cache_only_saves_time(damage: str, tmp_path: Path) -> None:
    paths = files(tmp_path / "a")
    before, database = look(paths, Reading()), home() / "cache" / "images.sqlite"
    if damage == "removed":
        database.unlink()
    elif damage == "junk":
        database.write_bytes(b"junk" * 5000)
    elif damage == "folder in its place":
        for file in database.parent.iterdir():
            file.unlink()
        database.mkdir()
    else:
        database.chmod(0o400)
    assert look(paths, Reading()) == before
    assert kept("key", lambda: [1, 2]) == [1, 2]


def test_a_value_is_computed_once() -> None:
    calls: list[int] = []

    def compute() -> list[float]:
        calls.append(1)
        return [0.1, 2.0]

    assert kept("a key with \udce9", compute) == kept("a key with \udce9", compute) == [0.1, 2.0]
    assert kept("another", compute) and len(calls) == 2


def test_files_that_cannot_be_opened_have_a_fault(tmp_path: Path) -> None:
    paths = files(tmp_path / "a", 2)
    (tmp_path / "a/gone.png").symlink_to("/nonexistent.png")
    (tmp_path / "a/folder.png").mkdir()
    os.mkfifo(tmp_path / "a/pipe.png")
    odd = [tmp_path / "a" / name for name in ("gone.png", "folder.png", "pipe.png")]
    faults = [one.fault for one in look([*paths, *odd], Reading())]
    assert faults[:2] == ["", ""] and "link" in faults[2] and "directory" in faults[3].lower()
    assert "a pipe" in faults[4]
