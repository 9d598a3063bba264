"""Number types: which ones the hardware multiplies natively, which one is used for what, how far results may lie apart.

Everything that depends on it asks here, so that a test can say what the hardware does: by ``Inference(bf16=...)``, or
by putting another function in the place of ``native_bf16``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from secateur.pipeline.files import write_whole
from secateur.pruning.surgery import TOLERANCE

Precision = Literal["fp32", "bf16"]
"""The type of a forward pass; ``bf16`` of its weights and activations, while sums are kept in float32."""
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def native_bf16(compute: torch.device) -> bool:
    """Whether the hardware multiplies bf16 natively (where it does not, bf16 is slower than fp32).

    On a processor that has the instructions, oneDNN must be allowed to use them as well (``ONEDNN_MAX_CPU_ISA``).
    """
    if compute.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    if not (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")):
        return False
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(available and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def trains_in_bf16(precision: Literal["fp32", "bf16", "auto"], compute: torch.device) -> bool:
    """Whether a recipe's training runs in mixed precision; ``auto`` = where it is native there."""
    return precision == "bf16" or (precision == "auto" and native_bf16(compute))


def certain(precision: Literal["fp32", "bf16", "auto"], compute: torch.device) -> Precision | None:
    """A recipe's precision; None where it is ``auto`` and has to be found by trying."""
    if precision != "auto":
        return precision
    return None if native_bf16(compute) else "fp32"


ROUNDS = 3
"""Times each type is timed; the fastest counts."""


def faster(seconds: Callable[[Precision], float]) -> Precision:
    """The type in which steps take less time, each tried in turn: depthwise convolutions often gain nothing by bf16.

    Args:
        seconds: of a step in one type; the first one of each is not counted.
    """
    kinds: tuple[Precision, ...] = ("bf16", "fp32")
    times: dict[Precision, list[float]] = {kind: [] for kind in kinds}
    for _ in range(1 + ROUNDS):
        for kind in kinds:
            times[kind].append(seconds(kind))
    return min(kinds, key=lambda kind: min(times[kind][1:]))


def remembered(file: Path, choose: Callable[[], Precision]) -> Precision:
    """What was chosen before, as a file says; else what is chosen now, for whoever asks next.

    Raises:
        SurroundingsError: the file cannot be written.
    """
    known = file.read_text(encoding="ascii", errors="replace").strip() if file.is_file() else ""
    for precision in DTYPES:
        if known == precision:
            return precision
    chosen = choose()
    write_whole(file, chosen + "\n")
    return chosen


def tolerance(precision: Precision) -> float:
    """Largest relative error between two forward passes of one network that is still equal."""
    return TOLERANCE.get(DTYPES[precision], 1e-4)
