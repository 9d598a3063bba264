"""Both networks as verified ONNX files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import onnx
import torch
from torch import nn

from secateur import __version__
from secateur.export.artifact import ExportedModel, describe, sha256_of
from secateur.export.errors import TemplateError
from secateur.export.onnx_export import OPSET, describing, export_onnx, renamed, write_atomically
from secateur.export.qdq import DEFAULT_SCHEME, most_careful
from secateur.export.quantize import precision
from secateur.export.slicing import OnnxTemplate, candidate_onnx
from secateur.export.verify import TOLERANCE, predict, verify_parity
from secateur.pipeline.evaluation.hops import first_apart, first_rounded
from secateur.pipeline.evaluation.onnx_files import CANDIDATES, TEMPLATE
from secateur.pipeline.evaluation.precisions import FLOAT, Precisions
from secateur.pipeline.run import hop_table
from secateur.pipeline.run.facts import ExportedNetwork, ExportFacts, Facts, ParityFacts, Proof, ResultParity
from secateur.pipeline.run.run import Run
from secateur.pipeline.stages.loading import first_batch, load_baseline, load_compact, parity_images
from secateur.pipeline.workloads import Postprocessing
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import PruningPlan
from secateur.pruning.surgery import certify, prune

AT_ONCE = 16
"""Images that pass a network in PyTorch together, for its metric."""
VERSIONS = ("torch", "onnx", "onnxscript")
"""Packages that an exported file names."""


def export(run: Run, facts: Facts) -> ExportFacts:
    """Both networks as optimised ONNX, proven equal to their PyTorch models; the certificate of the final cut.

    Where another precision than fp32 was chosen, the compact network's file is made of the one that was proven.

    Raises:
        ExportError: a network cannot be exported.
    """
    model, graph = load_baseline(run)
    plan = facts.finetune.best.candidate.plan
    compact = load_compact(run, model, graph, plan)
    exported, template = [], _template(run, model, graph)
    full = PruningPlan.full(graph.groups)
    with run.progress.stage("Export to ONNX") as report:
        for name, network, own in (("baseline", model.cpu(), full), ("compact", compact, plan)):
            exported.append(_export_one(run, name, network, own, "" if own is full else own.digest, template))
            error = exported[-1].parity.max_relative_error
            report(len(exported), 2, f"largest relative difference {error:.1e}")
    apart = {
        key: first_apart(network, each.artifact.path, parity_images(run)[:1].numpy(), run.config.export.tolerance)
        for key, network, each in zip((hop_table.BASELINE, hop_table.COMPACT), (model, compact), exported, strict=True)
        if not each.parity.ok
    }
    images, targets = first_batch(run, run.workload.search.first(run.config.export.parity_images))
    chosen, tensor = facts.finetune.best.evaluation.precision, ""
    metrics = _metrics(run, model, compact, images, targets)
    of_devices: Mapping[str, str] = {}
    others, further = tuple[str, ...](), list[Path]()
    if chosen != FLOAT:
        in_float = exported[1].artifact.path.read_bytes()
        of_devices = run.schemes(model, graph)
        scheme = most_careful(of_devices.values()) if of_devices else DEFAULT_SCHEME
        if not precision(chosen).calibrated:
            of_devices = {}
        others = tuple(sorted({other for other in of_devices.values() if other != scheme}))
        exported[1] = _in_precision(run, chosen, exported[1], compact, plan, template, (scheme, *others))
        further = _files_of(run, others)
        file = exported[1].artifact.path
        metrics[hop_table.ROUNDED] = _metric_of_file(run, file, images, targets)
        tensor = first_rounded(in_float, file.read_bytes(), images[:1].numpy())
    certificate = Proof(**asdict(certify(model, prune(model, graph, plan), graph, plan, run.workload.example_input())))
    bounds = run.config.export.tolerance, metrics, run.config.gate.max_drop
    hops = hop_table.of_export(exported[0], exported[1], certificate, *bounds, tensor, apart)
    return ExportFacts(
        baseline=exported[0],
        compact=exported[1],
        certificate=certificate,
        hops=hops,
        usage=dict(run.workload.usage),
        files=exported[0].files | exported[1].files | {file.name: sha256_of(file) for file in further},
        schemes={device: s for device, s in of_devices.items() if s in others} or None,
    )


def _metrics(
    run: Run, model: nn.Module, compact: nn.Module, images: torch.Tensor, targets: torch.Tensor
) -> dict[str, float]:
    """The workload's metric of both networks in PyTorch and of both files, on the images of the parity check."""
    found = {}
    for key, network in ((hop_table.DENSE, model), (hop_table.PRUNED, compact)):
        with torch.inference_mode():
            outputs = torch.cat([network(part) for part in torch.split(images, AT_ONCE)])
        found[key] = _metric(run, outputs, targets)
    for key, name in ((hop_table.BASELINE, "baseline"), (hop_table.COMPACT, "compact")):
        found[key] = _metric_of_file(run, run.directory / f"{name}.onnx", images, targets)
    return found


def _metric_of_file(run: Run, file: Path, images: torch.Tensor, targets: torch.Tensor) -> float:
    return _metric(run, torch.from_numpy(predict(file, images.numpy(), torch.get_num_threads())), targets)


def _metric(run: Run, outputs: torch.Tensor, targets: torch.Tensor) -> float:
    workload = run.workload
    return float(workload.metrics(workload.answers(outputs, targets), targets)[workload.metric])


def _template(run: Run, model: nn.Module, graph: ChannelGraph) -> OnnxTemplate | None:
    """What both files are cut from: the search's template, or one that is exported now.

    None where the run file asks for other files than cut ones, or the network's cannot be cut.
    """
    section, file = run.config.export, run.directory / CANDIDATES / TEMPLATE
    if section.dynamic_batch or section.opset != OPSET:
        return None
    with suppress(TemplateError):
        return OnnxTemplate.load(file, graph)
    with suppress(TemplateError):
        return OnnxTemplate.export(model.cpu(), run.workload.example_input(), graph, file)
    return None


def _export_one(
    run: Run, name: str, network: nn.Module, plan: PruningPlan, digest: str, template: OnnxTemplate | None
) -> ExportedNetwork:
    """A network's ONNX file and its parity; the same with postprocessing behind it, where the workload has some."""
    section, after = run.config.export, run.workload.postprocessing
    path, images = run.directory / f"{name}.onnx", parity_images(run)
    example = run.workload.example_input()
    if template is None:
        artifact = export_onnx(
            network, example, path, opset=section.opset, plan_digest=digest, dynamic_batch=section.dynamic_batch
        )
    else:
        artifact = replace(candidate_onnx(template, network, example, plan, path, optimised=True), plan_digest=digest)
    artifact = _described(run, artifact)
    parity = verify_parity(path, network, torch.split(images, 1), tolerance=section.tolerance)
    exported = ExportedNetwork(artifact=artifact, parity=ParityFacts(**asdict(parity)))
    return exported if after is None else _with_postprocessing(exported, after, network, images)


def _described(run: Run, artifact: ExportedModel) -> ExportedModel:
    """The file with the names that the run file asks for, and with what it is, in its metadata."""
    section, proto = run.config.export, onnx.load(artifact.path)
    ports = {proto.graph.input[0].name: section.input_name, proto.graph.output[0].name: section.output_name}
    renamed(proto, ports)
    made = {"run": run.run_id, "plan_digest": artifact.plan_digest, "precision": artifact.precision}
    versions = {name: version(name) for name in VERSIONS}
    describing(proto, {**run.workload.usage, **made, "versions": {"secateur": __version__, **versions}})
    write_atomically(artifact.path, proto.SerializeToString())
    return describe(artifact.path, artifact.precision, artifact.plan_digest)


def _in_precision(
    run: Run,
    name: str,
    proven: ExportedNetwork,
    network: nn.Module,
    plan: PruningPlan,
    template: OnnxTemplate | None,
    schemes: Sequence[str],
) -> ExportedNetwork:
    """The network's file in another precision, in the place of the one in fp32, and how far its outputs are off.

    Args:
        schemes: number types of its integers; those behind the first get files of their own (``of_scheme``).

    Raises:
        ExportError: it cannot be made.
    """
    after, path, images = run.workload.postprocessing, proven.artifact.path, parity_images(run)
    with run.progress.stage(f"Export in {name}") as report:
        source = onnx.load(path)
        for scheme in reversed(schemes if precision(name).calibrated else schemes[:1]):  # the first in the end
            made = Precisions(run.workload, lambda: template, run.directory / CANDIDATES, scheme)
            content = made.network(name, plan, network.state_dict(), lambda: network)
            if template is None:  # the exporter's options hold for this file as well
                calibration = made.calibration(name) if precision(name).calibrated else None
                content = precision(name).make(source, calibration).SerializeToString()
            file = path if scheme == schemes[0] else of_scheme(path, scheme)
            write_atomically(file, content)
            artifact = _described(run, describe(file, name, plan.digest))
            if after is not None and file != path:
                write_atomically(behind(file, after), after.append(onnx.load(file)).SerializeToString())
        parity = verify_parity(path, network, torch.split(images, 1), precision(name).tolerance(TOLERANCE))
        report(
            1,
            1,
            f"{artifact.size_bytes / proven.artifact.size_bytes:.2f} of the size, same argmax in "
            f"{parity.argmax_agreement:.1%}",
        )
    exported = replace(proven, artifact=artifact, rounded=ParityFacts(**asdict(parity)))
    return exported if after is None else _with_postprocessing(exported, after, None, images)


def _files_of(run: Run, schemes: Sequence[str]) -> list[Path]:
    """The compact network's files in other number types."""
    after, files = run.workload.postprocessing, [of_scheme(run.directory / "compact.onnx", s) for s in schemes]
    return files if after is None else [*files, *(behind(file, after) for file in files)]


def of_scheme(path: Path, scheme: str) -> Path:
    """The same network's file in other number types, for devices that compute in those."""
    return path.with_name(f"{path.stem}.{scheme}.onnx")


def behind(path: Path, after: Postprocessing) -> Path:
    """The same file with postprocessing."""
    return path.with_name(f"{path.stem}.{after.name}.onnx")


def _with_postprocessing(
    exported: ExportedNetwork, after: Postprocessing, network: nn.Module | None, images: torch.Tensor
) -> ExportedNetwork:
    """The network's second file, and its results compared with those of PyTorch.

    Args:
        network: whose outputs they follow from; None = the outputs of the file without postprocessing.
    """
    path = exported.artifact.path
    whole = behind(path, after)
    write_atomically(whole, after.append(onnx.load(path)).SerializeToString())
    with torch.inference_mode():
        parts = torch.split(images, 1)
        raw = (
            map(network, parts)
            if network is not None
            else torch.split(torch.from_numpy(predict(path, images.numpy())), 1)
        )
        expected = torch.cat([after.apply(outputs) for outputs in raw])
    results = torch.from_numpy(predict(whole, images.numpy(), threads=torch.get_num_threads()))
    return replace(
        exported,
        whole=describe(whole, exported.artifact.precision, exported.artifact.plan_digest),
        postprocessing=ResultParity(
            **asdict(after.compare(results, expected)), counts=tuple(after.count(expected).tolist())
        ),
    )
