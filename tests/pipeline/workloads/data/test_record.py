"""A run goes on with the images that it began with, in the splits that they were in, or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from secateur.pipeline.cli import app as cli
from secateur.pipeline.config.reading import parse_run_file
from secateur.pipeline.errors import EXIT_USER, UserError
from secateur.pipeline.lifecycle.rescore import rescore
from secateur.pipeline.progress import Silent
from secateur.pipeline.run.run import Run, create_run_directory
from secateur.pipeline.workloads.data.record import DataRecord, Member, differences, digest_of, read, write
from tests.pipeline.workloads.data.pictures import noise
from tests.pipeline.workloads.data.test_folder import tree

PLACES = st.text(alphabet=st.characters(), min_size=1, max_size=12)


def begun(root: Path, **data: object) -> Path:
    """A run directory of a run that has recorded something."""
    section = {"source": "folder", "path": str(root), "image_size": 16, **data}
    workload = {"name": "classification", "model": {"name": "cifar/resnet8"}, "data": section}
    directory = create_run_directory(parse_run_file(yaml.safe_dump({"name": "t", "workload": workload})))
    with Run(directory, Silent()) as run:
        run.journal.append({"kind": "evaluate", "stage": "reference"})
    return directory


def again(directory: Path) -> None:
    with Run(directory, Silent()):
        pass


def test_a_record_is_written_at_the_start_and_read_back(tmp_path: Path) -> None:
    directory = begun(tree(tmp_path / "data"))
    recorded = read(directory)
    assert recorded is not None and len(recorded.members) == 12
    assert {m.split for m in recorded.members} == {"train", "search", "test"}
    assert all((tmp_path / "data" / m.place).is_file() for m in recorded.members)
    again(directory)


@pytest.mark.parametrize("part", ["train", "search", "test"])
@pytest.mark.parametrize("how", ["gone", "new", "changed"])
def test_a_run_whose_data_has_changed_is_not_continued(part: str, how: str, tmp_path: Path) -> None:
    root = tree(tmp_path / "data", num=12)
    directory = begun(root)
    recorded = read(directory)
    assert recorded is not None
    place = next(m.place for m in recorded.members if m.split == part)
    if how == "gone":
        (root / place).unlink()
    else:
        target = root / (place if how == "changed" else "train/cat/another.png")
        noise(seed=4711).save(target)
        place = str(target.relative_to(root))
    with pytest.raises(UserError) as caught:
        again(directory)
    for text in (f"1 image {how} ({place})", "restore the data as it was and resume", "start a new run with"):
        assert text in str(caught.value)


def test_a_renamed_image_is_the_same_image(tmp_path: Path) -> None:
    root = tree(tmp_path / "data")
    directory = begun(root)
    (root / "train/cat/0.png").rename(root / "train/cat/zero.png")
    again(directory)
    (root / "train/cat/zero.png").rename(root / "train/dog/zero.png")
    with pytest.raises(UserError, match="not the data that the run began with"):
        again(directory)


def test_what_differs_besides_the_images_is_named(tmp_path: Path) -> None:
    import torch

    from secateur.pipeline.workloads.networks import build_network

    root, weights = tree(tmp_path / "data"), tmp_path / "w.pt"
    torch.save(build_network("cifar/resnet8", 2, (3, 32, 32), {}).state_dict(), weights)
    workload = {
        "name": "classification",
        "model": {"name": "cifar/resnet8", "weights": str(weights)},
        "data": {"source": "folder", "path": str(root), "image_size": 16},
    }
    directory = create_run_directory(parse_run_file(yaml.safe_dump({"name": "t", "workload": workload})))
    again(directory)
    torch.save(build_network("cifar/resnet8", 2, (3, 32, 32), {}).state_dict(), weights)
    with pytest.raises(UserError, match="began with: weights differs"):
        again(directory)


def test_a_run_without_a_record_that_has_begun_is_not_continued(tmp_path: Path) -> None:
    directory = begun(tree(tmp_path / "data"))
    for file in directory.glob("data.*"):
        file.unlink()
    with pytest.raises(UserError, match=r"holds no data\.json.*earlier version"):
        again(directory)


@pytest.mark.parametrize("damage", ["{", "[" * 100_000, '{"format": 2}', "null", '{"format": 1, "members": "x"}'])
def test_a_record_that_was_altered_is_refused(damage: str, tmp_path: Path) -> None:
    directory = begun(tree(tmp_path / "data"))
    (directory / "data.json").write_text(damage)
    with pytest.raises(UserError, match=r"do not tell which images this run began with.*restore them"):
        again(directory)


def test_members_that_were_altered_are_found(tmp_path: Path) -> None:
    directory = begun(tree(tmp_path / "data"))
    text = (directory / "data.jsonl").read_text()
    (directory / "data.jsonl").write_text(text.replace('"test"', '"train"', 1))
    with pytest.raises(UserError, match="it was altered"):
        again(directory)


def test_resume_says_it_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tree(tmp_path / "data")
    directory = begun(root)
    shutil.rmtree(root / "train" / "cat")
    (root / "train" / "cat").mkdir()
    noise(seed=1).save(root / "train" / "cat" / "only.png")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr("sys.argv", ["secateur", "resume", str(directory)])
        cli.main()
    assert stopped.value.code == EXIT_USER
    told = " ".join(capsys.readouterr().err.split())
    assert "images gone" in told and "and 3 more" in told and "1 image new (train/cat/only.png)" in told


def test_rescore_compares_the_same_record(tmp_path: Path) -> None:
    directory = begun(tree(tmp_path / "data"))
    recorded = read(directory)
    assert recorded is not None
    facts = json.loads((directory / "data.json").read_text())
    (directory / "data.json").write_text(json.dumps({**facts, "fingerprint": "f" * 16}))
    with pytest.raises(UserError, match="was written about other data"):
        rescore(directory, "device", {})


@given(st.lists(st.tuples(st.sampled_from(["train", "search", "test"]), PLACES, st.integers(0, 9)), max_size=12))
def test_any_names_are_kept(rows: list[tuple[str, str, int]]) -> None:
    import tempfile

    members = tuple(Member(split, place, f"{content:032x}") for split, place, content in rows)
    record = DataRecord("f", {"data": "d"}, members, True)
    with tempfile.TemporaryDirectory() as folder:
        write(record, Path(folder))
        assert read(Path(folder)) == record


def test_images_without_names_are_compared_by_content() -> None:
    def record(contents: str, fingerprint: str) -> DataRecord:
        members = tuple(Member("train", f"image {i}", c) for i, c in enumerate(contents))
        return DataRecord(fingerprint, {"data": fingerprint}, members, False)

    told = differences(record("abcd", "1"), record("bcde", "2"))
    assert told == "1 image gone (image 0); 1 image new (image 3)"
    assert differences(record("abc", "1"), record("abc", "1")) == ""


def test_the_digest_of_members_is_of_contents_and_splits() -> None:
    one = (Member("train", "a", "1"), Member("test", "b", "2"))
    assert digest_of(one) == digest_of((Member("train", "x", "1"), Member("test", "y", "2")))
    assert digest_of(one) != digest_of((Member("test", "a", "1"), Member("train", "b", "2")))
