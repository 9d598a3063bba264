"""The unpruned, trained network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from secateur.pipeline.config.schema import digested
from secateur.pipeline.errors import UserError
from secateur.pipeline.files import sha256_of, write_whole
from secateur.pipeline.run.facts import BaselineFacts, Facts
from secateur.pipeline.run.run import Run
from secateur.pipeline.surroundings import home
from secateur.pipeline.training.baselines import BaselineCache
from secateur.pipeline.training.loop import VERSION, TrainingError, fit, save_weights
from secateur.pipeline.training.precision import Precision, trains_in_bf16


def baseline(run: Run, facts: Facts) -> BaselineFacts:
    """The unpruned, trained network: pretrained weights, or trained once and reused by content hash.

    Raises:
        UserError: the training fails.
    """
    del facts
    file = run.directory / "baseline.safetensors"
    if run.workload.pretrained:
        digest, origin = save_weights(file, run.workload.build_model().state_dict()), "pretrained weights"
    else:
        key = _content_key(run)
        content, trained = BaselineCache(home() / "baselines", run.progress.say).get(key, partial(_train, run))
        write_whole(file, content)
        digest, origin = sha256_of(file), f"{'trained' if trained else 'reused'} ({key}, {_precision(run)})"
    return BaselineFacts(origin=origin, files={file.name: digest})


def _precision(run: Run) -> Precision:
    """What the recipe's precision is on this machine."""
    return "bf16" if trains_in_bf16(run.config.baseline.precision, run.compute) else "fp32"


def _content_key(run: Run) -> str:
    """Names the weights by everything that they follow from; where precision is ``auto``, by what it is here."""
    recipe = {**digested(run.config.baseline), "precision": _precision(run)}
    follows_from = json.dumps([run.workload.fingerprint, recipe, run.config.seed, VERSION])
    return hashlib.sha256(follows_from.encode()).hexdigest()[:16]


def _train(run: Run, checkpoint: Path) -> Mapping[str, Tensor]:
    torch.manual_seed(run.config.seed)
    model = run.workload.build_model()
    with run.progress.stage("Train the baseline") as report:
        try:
            fit(
                model,
                run.workload,
                run.workload.train,
                run.config.baseline,
                seed=run.config.seed,
                checkpoint=checkpoint,
                compute=run.compute,
                report=report,
            )
        except TrainingError as error:
            raise UserError(f"baseline: {error}") from error
    return model.state_dict()
