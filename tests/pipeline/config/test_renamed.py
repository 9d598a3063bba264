"""An old word of the run file means the same as the new one, wherever it stands, and names the same run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import yaml

from secateur.pipeline.config import renamed
from secateur.pipeline.config.faults import FaultsError
from secateur.pipeline.config.reading import parse_run_file
from secateur.pipeline.config.renamed import KEYS, RENAMED
from secateur.pipeline.config.schema import RunFile
from tests.pipeline.helpers import TINY, merged

WORDS = [(place, old, new) for place, words in RENAMED.items() for old, new in words.items()]
BEGUN = "name: a\nworkload: {name: classification}\nsearch: {forward: steady}\n"
"""A run file of the release that knew the old word, and its digest there."""
WITH_PRECISION = "name: a\nworkload: {name: classification}\nfinetune: {precision: bf16}\n"
WITH_PRECISION_DIGEST = "4a69731e1c6b53a1"
BEGUN_DIGEST = "c301c7f954498e67"


@pytest.fixture(autouse=True)
def nothing_said_yet() -> Iterator[None]:
    renamed._say.cache_clear()
    yield
    renamed._say.cache_clear()


def in_file(place: tuple[str | int, ...], word: str) -> RunFile:
    section: object = word
    for part in reversed(place):
        section = {part: section}
    return parse_run_file(yaml.safe_dump(merged(TINY, section)))


def overridden(place: tuple[str | int, ...], word: str) -> RunFile:
    return parse_run_file(yaml.safe_dump(TINY), overrides=[f"{'.'.join(map(str, place))}={word}"])


@pytest.mark.parametrize("read", [in_file, overridden])
@pytest.mark.parametrize(("place", "old", "new"), WORDS)
def test_an_old_word_gives_the_same_run_file(read, place, old, new, capsys: pytest.CaptureFixture[str]) -> None:
    assert read(place, new) == read(place, old)
    assert read(place, new).digest == read(place, old).digest
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and old in said[0] and new in said[0], "told once, however often it is read"


def test_a_new_word_is_nothing_to_talk_about(capsys: pytest.CaptureFixture[str]) -> None:
    for place, _, new in WORDS:
        in_file(place, new)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("old", "new"), KEYS.items())
def test_an_old_key_gives_the_same_run_file(old: tuple[str, ...], new: str, capsys: pytest.CaptureFixture[str]) -> None:
    place = (*old[:-1], new)
    content = merged(TINY, {section: None for section in ("baseline", "finetune")})
    del content["baseline"], content["finetune"]
    texts = [yaml.safe_dump(merged(content, {old[0]: {key: "bf16"}})) for key in (new, old[-1])]
    files = [parse_run_file(text) for text in texts]
    files.append(parse_run_file(yaml.safe_dump(content), overrides=[f"{'.'.join(old)}=bf16"]))
    assert files[0] == files[1] == files[2] and len({file.digest for file in files}) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert f"{old[0]}: {old[-1]} is called {new} now" in said
    with pytest.raises(FaultsError, match=rf"{'.'.join(place)} \(line 3\)"):
        parse_run_file(f"name: a\n{old[0]}:\n  {old[-1]}: bf17\nworkload: {{name: classification}}\n")
    with pytest.raises(FaultsError, match=f"{'.'.join(old)}"):
        parse_run_file(yaml.safe_dump(merged(content, {old[0]: {old[-1]: "bf16", new: "bf16"}})))


def test_a_run_that_has_begun_keeps_its_digest() -> None:
    """Its journal names the digest: another one would be another run, which cannot go on."""
    assert parse_run_file(WITH_PRECISION).digest == WITH_PRECISION_DIGEST
    assert parse_run_file(BEGUN).digest == BEGUN_DIGEST
    assert parse_run_file(BEGUN.replace("steady", "deterministic")).digest == BEGUN_DIGEST


@pytest.mark.parametrize("text", ["search: 5", "search: {forward: 5}", "search: {forward: [steady]}", "search:"])
def test_what_is_no_word_is_left_to_the_schema(text: str) -> None:
    content = yaml.safe_load(text)
    renamed.with_new_words(content)
    assert content == yaml.safe_load(text)
