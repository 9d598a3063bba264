"""README and docs cannot lie: every block is tried, as `blocks.py` says; commands, options, links and pages exist."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from secateur.pipeline.cli.app import app
from tests.docs.blocks import PAGES, REASONS, ROOT, Reader, documents, language, place, said

LANGUAGES = {"python", "sh", "yaml", "json", "text", "{toctree}", "{eval-rst}"}
LEAST_TRIED = 0.9
"""Share of the blocks in Python, shell and YAML that run."""
BLOCKS = [(page, example) for page, document in documents() for example in document.examples()]
TRIED = [(page, example) for page, example in BLOCKS if language(example) != "text"]


def pages(*words: str) -> list[str]:
    """Pages with a block of which the comment above says one of these."""
    return sorted({page for page, example in TRIED if said(example)[0] in words})


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / ".secateur"))
    monkeypatch.syspath_prepend(tmp_path)
    return Reader(tmp_path)


@pytest.mark.parametrize("page", pages("", "file"))
def test_blocks_do_what_their_page_says(page: str, reader: Reader) -> None:
    reader.run(page)
    assert reader.done


@pytest.mark.long
@pytest.mark.parametrize("page", pages("long"))
def test_long_blocks_do_what_their_page_says(page: str, reader: Reader) -> None:
    reader.long = True
    reader.run(page)
    assert reader.done


def test_every_block_says_what_it_is_and_few_are_not_run() -> None:
    fences = [
        (f"{page}:{token.map[0] + 1}", token.info.split(" ")[0])
        for page in PAGES
        for token in MarkdownIt().parse((ROOT / page).read_text(encoding="utf-8"))
        if token.type == "fence" and token.map
    ]
    assert [where for where, info in fences if info not in LANGUAGES] == []
    left_out = [(place(example), said(example)[1]) for _, example in TRIED if said(example)[0] == "not run"]
    assert {reason for _, reason in left_out} <= set(REASONS)
    counted = Counter(language(example) for _, example in BLOCKS)
    long = sum(said(example)[0] == "long" for _, example in TRIED)
    print(f"{dict(counted)}: {len(left_out)} of {len(TRIED)} are not run, {long} with the long tests")
    print("\n".join(f"{where}: {reason}" for where, reason in left_out))
    assert len(left_out) <= (1 - LEAST_TRIED) * len(TRIED)


# -- commands


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of each ``secateur`` command of a script."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words and Path(words[0]).name == "secateur":
            end = next((i for i, word in enumerate(words) if word in (">", "||", "|", "&&")), len(words))
            yield words[1:end]


def is_understood(words: list[str]) -> bool:
    """Whether a command and its options exist: then it would show its help."""
    return CliRunner().invoke(app, [*words, "--help"]).exit_code == 0


def test_commands_and_their_options_exist() -> None:
    scripts = [(place(example), example.parsed) for _, example in BLOCKS if language(example) == "sh"]
    wrong = [
        f"{where}: {shlex.join(words)}"
        for where, script in scripts
        for words in command_lines(script)
        if not is_understood(words)
    ]
    assert scripts and not wrong


def unknown(words: list[str]) -> list[str]:
    """What of a command in a sentence there is not: the command itself, or an option of it."""
    command = typer.main.get_command(app)
    while words and (below := getattr(command, "commands", None)):
        if words[0] not in below:  # an option, or a placeholder
            return [] if words[0].startswith("-") or words[0].isupper() else words[:1]
        command, words = below[words[0]], words[1:]
    known = {name for each in command.params for name in (*each.opts, *each.secondary_opts)} | {"--help"}
    return [word for word in words if word.startswith("--") and word.partition("=")[0] not in known]


def test_commands_in_sentences_exist() -> None:
    wrong = []
    for page in PAGES:
        for text in re.findall(r"(?<!`)`secateur ([^`]+)`(?!`)", (ROOT / page).read_text(encoding="utf-8")):
            wrong += [f"{page}: {word}" for word in unknown(re.sub(r"[\[\]|,]", " ", text).split())]
    assert not wrong
    assert unknown(["inspect"]) and unknown(["validate", "FILE", "--gruops"]) and not unknown(["devices", "list"])


def test_examples_in_the_help_exist() -> None:
    def texts(command: object) -> Iterator[str]:
        yield getattr(command, "help", None) or ""
        for below in getattr(command, "commands", {}).values():
            yield from texts(below)

    examples = re.findall(r"Example: (.+)", "\n".join(texts(typer.main.get_command(app))))
    assert len(examples) > 10
    assert [line for line in examples for words in command_lines(line) if not is_understood(words)] == []


def test_a_command_that_does_not_exist_is_found() -> None:
    for wrong in ("rum flowers.yaml", "run flowers.yaml --sett seed=1", "devices chek kitchen"):
        assert not is_understood(wrong.split())


# -- links


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    tokens = MarkdownIt().parse((ROOT / page).read_text(encoding="utf-8"))
    links = [
        str(child.attrs["href"])
        for token in tokens
        for child in token.children or ()
        if child.type == "link_open" and "href" in child.attrs
    ]
    for link in links:
        path, _, anchor = link.partition("#")
        if "://" in path or path.startswith("mailto:"):
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page}: {link}"


def test_pages_that_messages_and_comments_name_are_there() -> None:
    """A moved page leaves error messages, docstrings and comments behind that nothing else looks at."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    wrong = [
        f"{name}: {page}"
        for name in listed
        if name and not (ROOT / name).is_symlink() and (ROOT / name).is_file()
        for page in re.findall(r"(?<![\w/])docs/[\w/-]+\.(?:md|json)\b", (ROOT / name).read_text("utf-8", "ignore"))
        if not (ROOT / page).is_file()
    ]
    assert listed and not wrong


def anchors(file: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    tokens = MarkdownIt().parse(file.read_text(encoding="utf-8"))
    titles = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
