"""Number types: which ones the hardware multiplies natively, which one is used for what, how far results may lie apart.

Everything that depends on it asks here, so that a test can say what the hardware does: by ``Inference(bf16=...)``, or
by putting another function in the place of ``native_bf16``.
"""

from __future__ import annotations

from typing import Literal

import torch

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


def tolerance(precision: Precision) -> float:
    """Largest relative error between two forward passes of one network that is still equal."""
    return TOLERANCE.get(DTYPES[precision], 1e-4)
