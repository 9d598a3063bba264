"""Both networks as verified ONNX files."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, replace

import onnx
import torch
from torch import nn

from secateur.export.artifact import describe
from secateur.export.errors import TemplateError
from secateur.export.onnx_export import OPSET, export_onnx, write_atomically
from secateur.export.slicing import OnnxTemplate, candidate_onnx
from secateur.export.verify import predict, verify_parity
from secateur.pipeline.evaluation.onnx_files import CANDIDATES, TEMPLATE
from secateur.pipeline.run.facts import ExportedNetwork, ExportFacts, Facts, ParityFacts, Proof, ResultParity
from secateur.pipeline.run.run import Run
from secateur.pipeline.stages.loading import load_baseline, load_compact, parity_images
from secateur.pipeline.workloads import Postprocessing
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import PruningPlan
from secateur.pruning.surgery import certify, prune


def export(run: Run, facts: Facts) -> ExportFacts:
    """Both networks as optimised ONNX, proven equal to their PyTorch models; the certificate of the final cut.

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
    certificate = certify(model, prune(model, graph, plan), graph, plan, run.workload.example_input())
    return ExportFacts(
        baseline=exported[0],
        compact=exported[1],
        certificate=Proof(**asdict(certificate)),
        usage=dict(run.workload.usage),
        files=exported[0].files | exported[1].files,
    )


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
    parity = verify_parity(path, network, torch.split(images, 1), tolerance=section.tolerance)
    exported = ExportedNetwork(artifact=artifact, parity=ParityFacts(**asdict(parity)))
    return exported if after is None else _with_postprocessing(exported, after, network, images)


def _with_postprocessing(
    exported: ExportedNetwork, after: Postprocessing, network: nn.Module, images: torch.Tensor
) -> ExportedNetwork:
    """The network's second file, and its results compared with those of PyTorch."""
    path = exported.artifact.path
    whole = path.with_name(f"{path.stem}.{after.name}.onnx")
    write_atomically(whole, after.append(onnx.load(path)).SerializeToString())
    with torch.inference_mode():
        expected = torch.cat([after.apply(network(part)) for part in torch.split(images, 1)])
    results = torch.from_numpy(predict(whole, images.numpy(), threads=torch.get_num_threads()))
    return ExportedNetwork(
        artifact=exported.artifact,
        parity=exported.parity,
        whole=describe(whole, plan_digest=exported.artifact.plan_digest),
        postprocessing=ResultParity(
            **asdict(after.compare(results, expected)), counts=tuple(after.count(expected).tolist())
        ),
    )
