"""Number types: which ones the hardware multiplies natively, which one is used for what, how far results may lie apart.

Everything that depends on it asks here, so that a test can say what the hardware does: by ``Inference(bf16=...)``, or
by putting another function in the place of ``native_bf16``.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from secateur.pipeline.config.schema import Recipe
from secateur.pipeline.files import write_whole
from secateur.pipeline.surroundings import home
from secateur.pipeline.workloads import Split, Workload
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


TIMED_IMAGES = 64
"""Images of a step by which the precision is chosen, at most."""
ROUNDS = 3
"""Times each type is timed; the fastest counts."""
CLEAR = 1.1
"""How many times as fast as fp32 bf16 has to be, so that no chance decides where both take equally long."""


def faster(seconds: Callable[[Precision], float]) -> Precision:
    """bf16 where steps clearly take less time in it, each tried in turn: depthwise convolutions often gain nothing.

    Args:
        seconds: of a step in one type; the first one of each is not counted.
    """
    kinds: tuple[Precision, ...] = ("bf16", "fp32")
    times: dict[Precision, list[float]] = {kind: [] for kind in kinds}
    for _ in range(1 + ROUNDS):
        for kind in kinds:
            times[kind].append(seconds(kind))
    bf16, fp32 = (min(times[kind][1:]) for kind in kinds)
    return "bf16" if CLEAR * bf16 <= fp32 else "fp32"


def remembered(file: Path, choose: Callable[[], Precision]) -> Precision:
    """What was chosen before, as a file says; else what is chosen now, for whoever asks next.

    Raises:
        SurroundingsError: the file cannot be written.
    """
    if (known := chosen_before(file)) is not None:
        return known
    chosen = choose()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, chosen + "\n")
    return chosen


def chosen_before(file: Path) -> Precision | None:
    """The choice that a file holds; None where there is no such file, or it is damaged."""
    said = file.read_text(encoding="ascii", errors="replace").strip() if file.is_file() else ""
    return next((precision for precision in DTYPES if said == precision), None)


def kept_for(model: nn.Module, shape: Sequence[int], compute: torch.device) -> Path:
    """Where the choice for a network on this processor is kept, for all runs.

    Args:
        shape: of a batch of images.
    """
    plain = re.sub(r"0x[0-9a-f]+", "", repr(model))
    tensors = [(name, list(tensor.shape)) for name, tensor in model.state_dict().items()]
    told = json.dumps([plain, tensors, list(shape), processor(compute), torch.__version__])
    return home() / "precisions" / hashlib.sha256(told.encode()).hexdigest()[:32]


def to_be_timed(
    recipe: Recipe, workload: Workload, split: Split, compute: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch that steps are timed on."""
    some = torch.arange(min(recipe.batch_size, TIMED_IMAGES, len(split)))
    return workload.batch(split, some, train=False, generator=None, device=compute)


def likely(recipe: Recipe, model: nn.Module, workload: Workload, compute: torch.device) -> Precision:
    """What a training will run in, without trying: what is certain, or was chosen before, else what is native."""
    if (known := certain(recipe.autocast, compute)) is not None:
        return known
    shape = to_be_timed(recipe, workload, workload.train, compute)[0].shape
    return chosen_before(kept_for(model, shape, compute)) or "bf16"


def processor(compute: torch.device) -> str:
    """What the processor is called; the kind of machine where the system does not say."""
    if compute.type == "cuda":
        return torch.cuda.get_device_name()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def tolerance(precision: Precision) -> float:
    """Largest relative error between two forward passes of one network that is still equal."""
    return TOLERANCE.get(DTYPES[precision], 1e-4)
