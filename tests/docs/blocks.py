"""The blocks of the documentation, found by sybil, and what is done with each: by its language, and a comment above it.

``<!-- not run: REASON -->``  it cannot run here; the reasons are ``REASONS``
``<!-- long -->``             it runs with the long tests
``<!-- file: NAME -->``       it is saved under this name
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser

from secateur.device_profiles import load_profile
from secateur.pipeline.config.reading import parse_run_file
from tests.docs.surroundings import prepare, shorten
from tests.pipeline.helpers import merged

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "examples")
PAGES = [
    *("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md"),
    *sorted(str(page.relative_to(ROOT)) for folder in FOLDERS for page in (ROOT / folder).rglob("*.md")),
]
REASONS = ("root", "board", "cluster", "network")
COMMENT = re.compile(r"<!-- (not run|long|file)(?:: ([^>]+))? -->\s*\Z")
PRINTS = "It prints:"
LONGEST_S = 500
RUN = "secateur run flowers.yaml"
RUNS = ".secateur/runs/flowers-*"
"""Where a page goes on with a run, there is one."""
BASH = """
set -euo pipefail
make() { command make --dry-run --directory "$CHECKOUT" "$@" > /dev/null; }
"""
"""``make`` in a block shows that its targets exist; what they do is what runs these tests."""


@dataclass
class Reader:
    """Who tries a page, from its first block to its last, in one folder.

    Args:
        folder: where blocks run.
        long: whether blocks that take long run too.
        done: blocks that ran, as ``page:line``.
        printed: by the block before.
    """

    folder: Path
    long: bool = False
    done: list[str] = field(default_factory=list)
    printed: str | None = None

    def run(self, page: str) -> None:
        """Try every block of a page in turn.

        Raises:
            AssertionError: a block does not do what its page says.
        """
        document = SYBIL.parse(ROOT / page)
        if page.startswith("examples/"):
            shutil.copytree((ROOT / page).parent, self.folder, dirs_exist_ok=True)
        prepare(self.folder, document.text)
        document.namespace.update(reader=self, __name__="__main__")
        for example in document.examples():
            example.evaluate()


def said(example: Example) -> tuple[str, str]:
    """What the comment above a block says: its word and the rest; empty where there is none."""
    found = COMMENT.search(example.document.text[: example.start])
    return (found[1], found[2] or "") if found else ("", "")


def place(example: Example) -> str:
    return f"{Path(example.path).relative_to(ROOT)}:{example.line}"


def _is_left_out(example: Example) -> bool:
    reader: Reader = example.namespace["reader"]
    word = said(example)[0]
    reader.printed = None
    return word == "not run" or (word == "long" and not reader.long)


def python(example: Example) -> None:
    """Run it in the page's namespace, as a file."""
    reader: Reader = example.namespace["reader"]
    if _is_left_out(example):
        return
    word, name = said(example)
    file = reader.folder / (name if word == "file" else f"line_{example.line}.py")
    file.write_text(example.parsed, encoding="utf-8")
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(example.parsed, str(file), "exec", dont_inherit=True), example.namespace)
    reader.printed = output.getvalue()
    reader.done.append(place(example))


def shell(example: Example) -> None:
    """Paste it into bash."""
    reader: Reader = example.namespace["reader"]
    if _is_left_out(example):
        return
    if said(example)[0] == "long":
        shorten(reader.folder)
        if RUNS in example.parsed and not list(reader.folder.glob(RUNS)) and RUN not in example.parsed:
            begun = _bash(f"{RUN} --quiet", reader.folder)
            assert begun.returncode == 0, f"the run before {place(example)}: {begun.stderr[-3000:]}"
    done = _bash(example.parsed, reader.folder)
    assert done.returncode == 0, f"{place(example)}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
    reader.printed = done.stdout
    reader.done.append(place(example))


def _bash(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **{"PATH": f"{Path(sys.executable).parent}:{folder}:{os.environ['PATH']}", "HOME": str(folder)},
        **{"PYTHONPATH": str(ROOT), "CHECKOUT": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        "SECATEUR_LOCKS": os.environ["SECATEUR_LOCKS"],
    }
    words = ["bash", "-c", BASH + script]
    return subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=LONGEST_S, stdin=subprocess.DEVNULL
    )


def text(example: Example) -> None:
    """Compare it with what the block before printed, where the page says so."""
    reader: Reader = example.namespace["reader"]
    before = example.document.text[: example.start].rstrip()
    if before.endswith(PRINTS) and reader.printed is not None:
        assert [line.rstrip() for line in reader.printed.splitlines()] == example.parsed.splitlines(), place(example)
        reader.done.append(place(example))


def settings(example: Example) -> None:
    """Check a run file, a part of one, or a device profile; save it where it has a name."""
    reader: Reader = example.namespace["reader"]
    content = yaml.safe_load(example.parsed)
    if "extends" in content:
        file = reader.folder / "documented.yaml"
        file.write_text(example.parsed, encoding="utf-8")
        assert load_profile(file)
    else:
        parse_run_file(_whole(example.parsed, content), place(example))
    word, name = said(example)
    if word == "file":
        (reader.folder / name).write_text(example.parsed, encoding="utf-8")
    reader.done.append(place(example))


def _whole(written: str, content: dict[str, object]) -> str:
    """A run file of which a part is given: the rest is that of the digits."""
    if "name" in content:
        return written
    base = yaml.safe_load((ROOT / "pipeline/runs/digits.yaml").read_text(encoding="utf-8"))
    if "search" in content:
        base.pop("search")  # another method's options are no part of it
    return yaml.safe_dump(merged(base, content))


EVALUATORS = {"python": python, "sh": shell, "text": text, "yaml": settings}
SYBIL = Sybil([CodeBlockParser(language=name, evaluator=does) for name, does in EVALUATORS.items()], path=str(ROOT))


def documents() -> Iterator[tuple[str, Document]]:
    """Every page with its blocks."""
    for page in PAGES:
        yield page, SYBIL.parse(ROOT / page)


def language(example: Example) -> str:
    evaluator = example.region.evaluator
    return next(name for name, does in EVALUATORS.items() if does is evaluator)
