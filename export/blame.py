"""Why a network cannot be exported, in three lines: where in the user's code, which operator, what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from secateur.device_profiles.wording import printable

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
NODE = re.compile(r"translating node %(\w+) .*?target=(?:torch\.ops\.)?([\w.]+)")
MISSING = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'")
LIBRARY = Path(torch.__file__).parent
OURS = Path(__file__).parent
REASON_LENGTH = 200


def explained(error: BaseException, model: torch.nn.Module, inputs: tuple[Any, ...]) -> str:
    """Three lines on an error of ``torch.onnx.export``.

    Args:
        inputs: what was exported with; a network is traced once more, where only that tells who called an operator.
    """
    chain = list(_chain(error))
    missing = next((found for each in chain if (found := MISSING.search(str(each)))), None)
    if missing is not None:
        place = _place_of_node(chain, model, inputs)
        what = f"operator {missing[1]}: ONNX has nothing for it"
        fix = "Replace it by operators that ONNX has, or keep it out of the exported module."
    else:
        place = _place_of_frames(chain, model)
        what = _reason(chain[-1])
        fix = (
            "Shapes and branches that depend on the data (NMS, `if x.sum() > 0`) must stay out of the exported module."
        )
    where = f" at {place}" if place else ""
    return f"torch.onnx cannot export {type(model).__name__}{where}\n{printable(what)}\n{fix}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _reason(error: BaseException) -> str:
    """The first line of an error, without escape sequences."""
    first = next((line for line in ESCAPES.sub("", str(error)).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first.strip()}"[:REASON_LENGTH]


def _place_of_frames(chain: list[BaseException], model: torch.nn.Module) -> str:
    """The module, line and code of the user's that ran when an error came; empty where none did."""
    names = {id(module): name for name, module in model.named_modules()}
    for error in reversed(chain):
        frames = [frame for frame in _frames(error) if _is_users(frame[0].f_code.co_filename)]
        if frames:
            frame, line = frames[-1]
            owner = frame.f_locals.get("self")
            name = names.get(id(owner), "")
            kind = type(owner).__name__ if isinstance(owner, torch.nn.Module) else frame.f_code.co_name
            return _place(name, kind, frame.f_code.co_filename, line)
    return ""


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _is_users(file: str) -> bool:
    path = Path(file)
    return path.is_file() and not path.is_relative_to(LIBRARY) and path.parent != OURS and path.name != "runpy.py"


def _place_of_node(chain: list[BaseException], model: torch.nn.Module, inputs: tuple[Any, ...]) -> str:
    """The module and line that called the operator that an error names; empty where that cannot be found."""
    named = next((found for each in chain if (found := NODE.search(str(each)))), None)
    if named is None:
        return ""
    try:
        program = torch.export.export(model, inputs, strict=False).run_decompositions()
    except Exception:  # noqa: BLE001 - the error that matters is the first one
        return ""
    operator = named[2].split(".")[1]  # its name in the graph of a later step may be that of a part of it
    nodes = [node for node in program.graph.nodes if named[1] == node.name or operator in str(node.target)]
    if not nodes:
        return ""
    path, kind = list(nodes[0].meta.get("nn_module_stack", {"": ("", "")}).values())[-1]
    lines = re.findall(r'File "(.+?)", line (\d+)', nodes[0].meta.get("stack_trace") or "")
    own = [(file, int(line)) for file, line in lines if _is_users(file)]
    return _place(path, str(kind).rpartition(".")[2], *own[-1]) if own else f"{path} ({kind})"


def _place(name: str, kind: str, file: str, line: int) -> str:
    """``block (Block), nets.py line 15: x = bessel(x)``."""
    text = Path(file).read_text(encoding="utf-8", errors="replace").splitlines()[line - 1].strip()
    return f"{f'{name} ({kind})' if name else kind}, {Path(file).name} line {line}: {printable(text)[:REASON_LENGTH]}"
