"""README and docs cannot lie: Python runs and prints what stands below it, YAML is valid, commands and options exist.

A Python block that cannot run here says why in a comment on the line before it, ``<!-- not run: REASON -->``; what is
saved under a name says so, ``<!-- file: NAME -->``. The blocks of a page run in order, in one empty folder.
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from secateur.device_profiles import load_profile
from secateur.pipeline.cli.app import app
from secateur.pipeline.config.reading import parse_run_file
from tests.pipeline.helpers import merged

ROOT = Path(__file__).parents[2]
DOCS = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "docs").rglob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", *DOCS]
REASONS = {"names of the text", "a trained model"}
MOST_NOT_RUN = 5
"""Python blocks that are parsed and not run; may only shrink."""
COMMENT = re.compile(r"<!-- (not run|file): (.+?) -->")
PRINTS = "It prints:"
MARK = "=== block ==="


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    reason: str = ""
    file: str = ""
    prints: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> Iterator[Block]:
    """The blocks of a page, in order; what a block prints stands in the next one, after "It prints:"."""
    tokens = MarkdownIt().parse((ROOT / page).read_text(encoding="utf-8"))
    for i, token in enumerate(tokens):
        if token.type != "fence" or token.map is None:
            continue
        before = COMMENT.search(tokens[i - 1].content) if i and tokens[i - 1].type == "html_block" else None
        said = {"reason" if before[1] == "not run" else "file": before[2]} if before else {}
        follows = [t for t in tokens[i + 1 : i + 6] if t.type in ("inline", "fence")]
        prints = follows[1].content if len(follows) > 1 and follows[0].content.endswith(PRINTS) else None
        yield Block(page, token.map[0] + 1, token.info, token.content, prints=prints, **said)


def of(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language in languages]


def test_every_block_says_what_it_is() -> None:
    known = {"python", "sh", "yaml", "json", "text", "mermaid"}
    assert [str(block) for page in PAGES for block in blocks(page) if block.language not in known] == []
    for block in of("python"):
        ast.parse(block.text)
    assert {block.reason for block in of("python")} <= REASONS | {""}
    skipped = [str(block) for block in of("python") if block.reason]
    print(f"{len(skipped)} of {len(of('python'))} Python blocks are not run: {', '.join(skipped)}")
    assert len(skipped) <= MOST_NOT_RUN


@pytest.mark.parametrize("page", sorted({block.page for block in of("python") if not block.reason}))
def test_python_runs_and_prints_what_stands_below_it(page: str, tmp_path: Path) -> None:
    found = [block for block in blocks(page) if block.language == "python" and not block.reason]
    script = ["scope = {'__name__': '__main__'}"]
    for block in found:
        name = str(tmp_path / (block.file or f"line_{block.line}.py"))
        Path(name).write_text(block.text, encoding="utf-8")
        script += [f"print({MARK!r})", f"exec(compile({block.text!r}, {name!r}, 'exec'), scope)"]
    (tmp_path / "page.py").write_text("\n".join(script), encoding="utf-8")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = done.stdout.split(f"{MARK}\n")[1:]
    for block, text in zip(found, printed, strict=True):
        if block.prints is not None:
            assert text.splitlines() == block.prints.splitlines(), block


# -- YAML


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_yaml_is_a_run_file_a_part_of_one_or_a_device(block: Block, tmp_path: Path) -> None:
    content = yaml.safe_load(block.text)
    if "extends" in content:
        file = tmp_path / "documented.yaml"
        file.write_text(block.text, encoding="utf-8")
        assert load_profile(file)
        return
    whole = "name" in content
    base = {} if whole else yaml.safe_load((ROOT / "pipeline/runs/digits.yaml").read_text(encoding="utf-8"))
    if "search" in content and not whole:
        base.pop("search")  # another method's options are no part of it
    parse_run_file(block.text if whole else yaml.safe_dump(merged(base, content)), str(block))


# -- commands


def command_lines(block: Block) -> Iterator[list[str]]:
    """The words of each ``secateur`` command of a block."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words and Path(words[0]).name == "secateur":
            yield words[1:]


COMMANDS = [(block, words) for block in of("sh") for words in command_lines(block)]


def is_understood(words: list[str]) -> bool:
    """Whether a command and its options exist: then it would show its help."""
    return CliRunner().invoke(app, [*words, "--help"]).exit_code == 0


@pytest.mark.parametrize(("block", "words"), COMMANDS, ids=[f"{b}-{' '.join(w[:2])}" for b, w in COMMANDS])
def test_commands_and_their_options_exist(block: Block, words: list[str]) -> None:
    assert is_understood(words)


def test_a_command_that_does_not_exist_is_found() -> None:
    for wrong in ("rum flowers.yaml", "run flowers.yaml --sett seed=1", "devices chek kitchen"):
        assert not is_understood(wrong.split())


@pytest.mark.parametrize("block", of("sh"), ids=str)
def test_shell_can_be_pasted(block: Block) -> None:
    done = subprocess.run(["/bin/bash", "-n"], input=block.text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
