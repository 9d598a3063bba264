"""How far apart results of the same mathematics may lie: by number type and depth, never by what one machine gave.

Kernels add in different orders: another processor, another number of threads, another batch size or another runtime
changes the last bits. Rounding errors of one layer add up like a random walk (Higham and Mary 2019, SIAM J. Sci.
Comput. 41(5), A2815: the constant is lambda * sqrt(n) * u instead of n * u), and so do those of layers in sequence.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

import secateur.pipeline.training.precision
from secateur.pruning.surgery import compare_outputs

CONFIDENCE = 4.0
"""Lambda: the bound fails with a probability below 2 exp(-lambda^2 / 2) per number, 7e-4 before the layers' average."""
STORED = 3
"""Numbers that are rounded to the type in each layer: its input, its weights, its output."""
LOWERED = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""Variables that take the newer instructions from PyTorch and oneDNN (ONNX Runtime listens to neither)."""


def rounding(dtype: torch.dtype = torch.float32, *, depth: int = 1, terms: int = 1) -> float:
    """Largest error, relative to the largest magnitude, that rounding explains.

    Args:
        dtype: in which numbers are stored; half types are summed in float32, as all kernels do.
        depth: layers one after another.
        terms: numbers that are summed for one output of a layer.
    """
    stored, summed = (torch.finfo(d).eps / 2 for d in (dtype, _summed_in(dtype)))
    return CONFIDENCE * math.sqrt(depth) * (STORED * stored + math.sqrt(terms) * summed)


def rounding_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> float:
    """``rounding`` for a network: as deep as it has modules with weights, as wide as its largest sum."""
    weights = [m.weight for m in model.modules() if isinstance(getattr(m, "weight", None), torch.Tensor)]
    terms = max((w[0].numel() for w in weights if w.ndim > 1), default=1)
    return rounding(dtype, depth=max(1, len(weights)), terms=terms)


def assert_same(found: Iterable[Any], expected: Iterable[Any], tolerance: float) -> None:
    """Outputs of forward passes, batch by batch: tensors in nested containers, relative to their largest magnitude."""
    for a, b in zip(found, expected, strict=True):
        certificate = compare_outputs(a, b, tolerance)
        assert certificate.ok, certificate.reason


def pretend_bf16(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    """Have this process believe that its processor multiplies bfloat16, or that it does not."""
    monkeypatch.setattr(secateur.pipeline.training.precision, "native_bf16", lambda _: native)


def run_lowered(*tests: str) -> str:
    """Run tests, by node ids, in a process whose kernels use no instructions beyond AVX2; returns what it said."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=os.environ | LOWERED, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def _summed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
