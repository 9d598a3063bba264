"""Words for people: what others wrote, shown so that it can do nothing; and commands that can be pasted.

Nothing here prints. What a terminal shows goes through ``pipeline/terminal.py``.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

SHOWN = 60
"""Characters of a value that a message shows."""


def printable(text: object) -> str:
    """A text in one line: what is no visible character (what moves a cursor, say) is written as an escape."""
    return "".join(c if c.isprintable() else _escape(c) for c in str(text))


def printable_lines(text: object) -> str:
    """The same of a text with line breaks, which stay."""
    return "\n".join(map(printable, str(text).replace("\t", "    ").split("\n")))


ENDINGS = re.compile(r"\((e?s)\)|(\w+)\|(\w+)")


def number_of(num: float, what: str) -> str:
    """``number_of(1, "image(s) is|are too small")``: "1 image is too small"; "2 images are too small".

    Args:
        what: with ``(s)`` or ``(es)`` after nouns, and ``one|several`` for words that follow the number otherwise.
    """
    one = num == 1
    words = ENDINGS.sub(lambda found: (found[2] if one else found[3]) or ("" if one else found[1]) or "", what)
    return f"{num:,} {words}" if isinstance(num, int) else f"{num:g} {words}"


def cut(text: str) -> str:
    """The beginning of a long text."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def shown(value: object) -> str:
    """A value for a message: as Python writes it, not too long, and nothing in it that moves a cursor."""
    if isinstance(value, str):
        return repr(cut(value))
    text = repr(value)
    return text if len(text) <= 2 * SHOWN else f"{text[: 2 * SHOWN]}..."


def command(*words: object) -> str:
    """A command that a shell takes as these words, whatever is in them.

    From the command line, programs of its environment are named so that they are found: by path where PATH has another
    of that name, or none.

    Args:
        words: the program and its arguments; a path may be given as such.
    """
    program, *arguments = map(str, words)
    return " ".join([*_program(program), *map(quoted, arguments)])


def quoted(word: str) -> str:
    """A word for a shell. Characters that no terminal shows need bash or zsh (``$'...'``)."""
    if word.isprintable():
        return shlex.quote(word)
    return f"$'{''.join(_in_c(c) for c in word)}'"


OURS = ("secateur", "prefect", "mlflow")
"""Programs that are installed with Secateur."""


def _program(name: str) -> list[str]:
    beside = Path(sys.executable).parent / name
    if name not in OURS or not _by_command_line() or _same(shutil.which(name), beside):
        return [quoted(name)]
    if beside.is_file():
        return [quoted(_near(beside))]
    if name == "secateur":  # run from its sources
        return [quoted(_near(Path(sys.executable))), "-m", "secateur"]
    return [name]


def _by_command_line() -> bool:
    """Whether this process is ``secateur``, or ``python -m secateur``; others know nothing of somebody's shell."""
    started = sys.orig_argv[1:3]
    return started == ["-m", "secateur"] or Path("".join(started[:1])).name == "secateur"


def _same(program: str | None, path: Path) -> bool:
    return program is not None and Path(program).resolve() == path.resolve()


def _current_folder() -> Path | None:
    try:
        return Path.cwd()
    except OSError:  # it was removed
        return None


START = _current_folder()
"""Where the program was started, which is where a shell goes on; a run may change to another folder."""


def _near(path: Path) -> str:
    """A path, relative to where the program was started if it lies below."""
    return str(path.relative_to(START)) if START is not None and path.is_relative_to(START) else str(path)


BYTE = re.compile("[\udc80-\udcff]")


def _escape(c: str) -> str:
    """One invisible character, or one byte of a file name that is no UTF-8, as Python writes it in a text."""
    return f"\\x{ord(c) - 0xDC00:02x}" if BYTE.match(c) else repr(c)[1:-1]


def _in_c(c: str) -> str:
    """One character within ``$'...'``."""
    if c in "\\'":
        return f"\\{c}"
    if c.isprintable():
        return c
    how = "surrogateescape" if BYTE.match(c) else "surrogatepass"
    return "".join(f"\\x{byte:02x}" for byte in c.encode("utf-8", how))
