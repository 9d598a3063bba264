"""A runtime of one matrix: it multiplies, with numpy alone."""

from __future__ import annotations

from typing import Any, Dict, List, Tuple  # noqa: UP035 - runs on the device, whose Python may be old

import numpy as np

FORMAT = "matrix"


def facts() -> Dict[str, Any]:  # noqa: UP006
    return {"version": "1.0", "providers": ["CPUExecutionProvider"]}


def load(path: str, threads: int, provider: str) -> Any:
    return np.load(path, allow_pickle=False)


def inputs(session: Any) -> List[Tuple[str, List[Any], str]]:  # noqa: UP006
    return [("x", [1, session.shape[0]], "float32")]


def outputs(session: Any) -> List[str]:  # noqa: UP006
    return ["y"]


def run(session: Any, feeds: Dict[str, Any]) -> List[Any]:  # noqa: UP006
    return [feeds["x"] @ session]
