"""Hop by hop: does each file compute what the one before it does?"""

from __future__ import annotations

from secateur.pipeline.report import figures as say
from secateur.pipeline.report.content import Section, Table, nothing
from secateur.pipeline.report.material import Material
from secateur.pipeline.run.facts import ExportFacts, Proof, ProofHop

TITLE = "Proofs"
CERTIFIED = 1e-4
"""The largest relative difference of a pruned network to the masked one."""
Cells = list[str]


def section(m: Material) -> Section:
    """One table."""
    rows: list[Cells] = []
    if m.search is not None:
        rows.append(_proof("surgery, every group cut in half", "the masked network", m.search.certificate, CERTIFIED))
    if m.hops:
        rows += [_hop(hop) for hop in m.hops]
        rows += _results(m, m.export) if m.export is not None else []
    else:
        rows += _earlier(m)
    if not rows:
        return nothing(TITLE, "Nothing was cut or exported yet, so there is nothing to prove.")
    held = sum(row[-1] == "holds" for row in rows)
    said = (
        f"{held} of {say.plural(len(rows), 'hop')} {'holds' if held == 1 else 'hold'}: each computes what it is "
        "made from, within its tolerance."
    )
    text = []
    if m.hops:
        text.append(
            f"The {say.metric(m.own_metric)} is of the very network or file, on the same images of the search split; "
            "the first step that does not hold is where to look."
        )
    if m.gate is not None and m.gate.broken:
        text.append(f"The first that breaks: {m.gate.broken}.")
    columns = (
        "hop",
        "expected",
        "found",
        "largest relative error|",
        "tolerance|",
        f"{say.metric(m.own_metric)}|",
        "result",
    )
    missing = (
        []
        if m.timed is None or m.timed.hops
        else [
            "Proofs: no outputs from another device or runtime were compared, because the files were timed with the "
            "runtime that checked them."
        ]
    )
    return Section(
        TITLE,
        said,
        "good" if held == len(rows) else "bad",
        text=text,
        tables=[Table("Every hop from the network to the device", columns, rows)],
        missing=missing,
    )


def _hop(hop: ProofHop) -> Cells:
    """A step of the table that the export and the gate have written down."""
    metrics = [
        say.percent(value) if 0 <= value <= 1 else say.number(value)
        for value in (hop.metric_expected, hop.metric)
        if value is not None
    ]
    found = hop.found if hop.ok else f"{hop.found}: {hop.reason}"
    return [
        hop.name,
        f"equal to {hop.expected}, {say.plural(hop.samples, 'image')}" if hop.samples else f"equal to {hop.expected}",
        f"{found}; first at {hop.tensor}" if hop.tensor else found,
        "not run" if hop.error is None else say.number(hop.error, 2),
        "any; accuracy tells" if hop.tolerance is None else say.number(hop.tolerance, 2),
        " to ".join(metrics),
        "holds" if hop.ok else "does not hold",
    ]


def _earlier(m: Material) -> list[Cells]:
    """The same of a run of an earlier version, or of one that did not come so far."""
    rows: list[Cells] = []
    if m.export is not None:
        rows.append(_proof("surgery, the final cut", "the masked network", m.export.certificate, CERTIFIED))
        rows += [*_exports(m, m.export), *_results(m, m.export)]
    return [*rows, *_hops(m)]


def _proof(hop: str, expected: str, proof: Proof, tolerance: float) -> Cells:
    error = "not compared" if proof.max_relative_error is None else say.number(proof.max_relative_error, 2)
    return [
        hop,
        f"equal to {expected}",
        "equal" if proof.ok else proof.reason,
        error,
        say.number(tolerance, 2),
        "",
        "holds" if proof.ok else "does not hold",
    ]


def _exports(m: Material, export: ExportFacts) -> list[Cells]:
    rows = []
    for name, network in export.networks.items():
        parity = network.parity
        rows.append(
            _proof(f"ONNX in fp32, {name}", f"PyTorch on {parity.samples} images", parity, m.config.export.tolerance)
        )
        if network.rounded is not None:
            rounded = network.rounded
            found = f"same argmax in {say.percent(rounded.argmax_agreement, 1)}" if rounded.ok else rounded.reason
            rows.append(
                [
                    f"ONNX in {network.artifact.precision}, {name}",
                    f"PyTorch on {rounded.samples} images",
                    found,
                    say.number(rounded.max_relative_error, 2),
                    "any; accuracy tells",
                    "",
                    "holds" if rounded.ok else "does not hold",
                ]
            )
    return rows


def _results(m: Material, export: ExportFacts) -> list[Cells]:
    """What postprocessing makes of ONNX and of PyTorch."""
    rows = []
    for name, network in export.networks.items():
        if network.postprocessing is not None:
            behind = network.postprocessing
            what = (
                m.timed.postprocessing.name if m.timed is not None and m.timed.postprocessing is not None else "results"
            )
            rows.append(
                [
                    f"{what} of ONNX, {name}",
                    f"those of PyTorch, {behind.compared} compared",
                    "equal" if behind.ok else behind.reason,
                    f"{say.number(behind.largest_error, 2)} (absolute)",
                    f"{behind.differing} differing",
                    "",
                    "holds" if behind.ok else "does not hold",
                ]
            )
    return rows


def _hops(m: Material) -> list[Cells]:
    rows = []
    for hop in (m.timed.hops if m.timed is not None else None) or ():
        metric = (
            ""
            if hop.metric is None
            else f"{say.metric(m.own_metric)} {say.number(hop.metric)} there, {say.number(hop.metric_here)} here"
        )
        found = hop.reason or metric or "equal"
        if hop.tensor:
            found += f"; first at {hop.tensor}"
        tolerance = "any; accuracy tells" if hop.tolerance is None else say.number(hop.tolerance, 2)
        rows.append(
            [
                f"{hop.network} on {hop.device} in {hop.runtime}",
                f"ONNX Runtime here, {hop.samples} images",
                found,
                "not run" if hop.error is None else say.number(hop.error, 2),
                tolerance,
                "",
                "holds" if hop.ok else "does not hold",
            ]
        )
    return rows
