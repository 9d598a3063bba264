"""Every step from the unpruned network in PyTorch to a file on a device, as one list.

Each says what was compared, how far it lies apart, and the metric of the very network or file. The first step that
breaks is where to look.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from secateur.pipeline.run.facts import ExportedNetwork, Hop, ParityFacts, Proof, ProofHop

CERTIFIED = 1e-4
"""The largest relative difference of the pruned network to the masked one."""
DENSE, PRUNED, BASELINE, COMPACT, ROUNDED = "dense", "pruned", "baseline file", "compact file", "rounded file"
"""Whose metrics the table holds, besides devices'."""


def of_export(
    baseline: ExportedNetwork,
    compact: ExportedNetwork,
    certificate: Proof,
    tolerance: float,
    metrics: Mapping[str, float],
    max_drop: float | None = None,
    tensor: str = "",
    apart: Mapping[str, str] | None = None,
) -> tuple[ProofHop, ...]:
    """The steps up to the files.

    Args:
        tolerance: between a network in PyTorch and its file.
        metrics: by ``DENSE``, ``PRUNED`` ..., on the images of the parity check.
        max_drop: what the gate allows the metric to lose: the bound of a step that has no other.
        tensor: the first one that 8 bits change much.
        apart: ``BASELINE``, ``COMPACT`` -> the first layer whose output is another one in the file than in PyTorch.
    """
    samples = compact.parity.samples

    def hop(
        name: str, words: tuple[str, str], keys: tuple[str, str], proof: Proof | ParityFacts, bound: float | None
    ) -> ProofHop:
        before, after = (metrics.get(key) for key in keys)
        reason = "" if proof.ok else proof.reason
        if bound is None and None not in (before, after, max_drop) and before - after > max_drop:  # type: ignore[operator]
            reason = f"the metric falls by {before - after:.4f}, more than {max_drop:g}"  # type: ignore[operator]
        return ProofHop(
            name=name,
            expected=words[0],
            found=words[1],
            error=proof.max_relative_error,
            tolerance=bound,
            metric_expected=before,
            metric=after,
            samples=samples,
            reason=reason,
            tensor=(tensor if bound is None else (apart or {}).get(keys[1], "")) if reason else "",
        )

    hops = [
        hop(
            "cut",
            ("unpruned network in PyTorch, removed channels masked", "pruned network in PyTorch"),
            (DENSE, PRUNED),
            certificate,
            CERTIFIED,
        ),
        hop(
            "baseline as ONNX",
            ("unpruned network in PyTorch", "its file in fp32 in ONNX Runtime here"),
            (DENSE, BASELINE),
            baseline.parity,
            tolerance,
        ),
        hop(
            "compact as ONNX",
            ("pruned network in PyTorch", "its file in fp32 in ONNX Runtime here"),
            (PRUNED, COMPACT),
            compact.parity,
            tolerance,
        ),
    ]
    if compact.rounded is not None:
        number = compact.artifact.precision
        words = "pruned network in PyTorch", f"its file in {number} in ONNX Runtime here"
        hops.append(hop(f"compact in {number}", words, (PRUNED, ROUNDED), compact.rounded, None))
    return tuple(hops)


def of_device(hop: Hop) -> ProofHop:
    """A file on a device, in the words of the table."""
    return ProofHop(
        name=f"{hop.network} in {hop.runtime} on {hop.device}",
        expected="the same file in ONNX Runtime here",
        found=f"{hop.runtime} on {hop.device}",
        error=hop.error,
        tolerance=hop.tolerance,
        metric_expected=hop.metric_here,
        metric=hop.metric,
        samples=hop.samples,
        reason=hop.reason,
        tensor=hop.tensor,
    )


def first_broken(hops: Iterable[ProofHop]) -> str | None:
    """The first step that does not hold, in a sentence; None = all do."""
    for hop in hops:
        if not hop.ok:
            where = f"; the first tensor that differs: {hop.tensor}" if hop.tensor else ""
            return f"{hop.name}: {hop.reason}{where}"
    return None
