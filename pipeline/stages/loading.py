"""What stages need in memory, made again from the files of a run and from its workload."""

from __future__ import annotations

import torch
from torch import nn

from secateur.pipeline.run.opening import trace_network
from secateur.pipeline.run.run import Run
from secateur.pipeline.training.checkpoints import load_weights
from secateur.pipeline.workloads import Split
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import PruningPlan
from secateur.pruning.surgery import prune


def load_baseline(run: Run) -> tuple[nn.Module, ChannelGraph]:
    """The baseline from the run directory, on the CPU, and its channel groups."""
    model = run.workload.build_model()
    model.load_state_dict(load_weights(run.directory / "baseline.safetensors"))
    model.eval()
    return model, trace_network(model, run.workload.example_input())


def load_compact(run: Run, model: nn.Module, graph: ChannelGraph, plan: PruningPlan) -> nn.Module:
    """The fine-tuned compact model from the run directory, on the CPU."""
    compact = prune(model, graph, plan)
    compact.load_state_dict(load_weights(run.directory / "compact.safetensors"))
    return compact.eval()


def first_batch(run: Run, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of a small split, on the CPU, in plain NCHW memory."""
    every = torch.arange(len(split))
    images, targets = run.workload.batch(split, every, train=False, generator=None, device=torch.device("cpu"))
    return images.contiguous(), targets


def parity_images(run: Run) -> torch.Tensor:
    """The images that exported files are checked with, shape (n, channels, height, width)."""
    return first_batch(run, run.workload.search.first(run.config.export.parity_images))[0]
