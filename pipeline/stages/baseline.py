"""The unpruned, trained network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from secateur.pipeline.config.schema import Recipe, digested
from secateur.pipeline.errors import UserError
from secateur.pipeline.files import sha256_of, write_whole
from secateur.pipeline.run.facts import BaselineFacts, Facts
from secateur.pipeline.run.run import Run
from secateur.pipeline.surroundings import home
from secateur.pipeline.training.baselines import BaselineCache
from secateur.pipeline.training.checkpoints import read_fitted, save_weights, write_fitted
from secateur.pipeline.training.curve import TrainingError
from secateur.pipeline.training.lesson import move
from secateur.pipeline.training.loop import VERSION, fit
from secateur.pipeline.training.precision import Precision, certain, remembered
from secateur.pipeline.training.trials import precision_of


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
        recipe = _settled(run)
        key, cache = _content_key(run, recipe), BaselineCache(home() / "baselines", run.progress.say)
        content, trained = cache.get(key, partial(_train, run, recipe))
        write_whole(file, content)
        digest, origin = sha256_of(file), f"{'trained' if trained else 'reused'} ({key}, {recipe.autocast})"
        return BaselineFacts(origin=origin, training=read_fitted(cache.folder / key), files={file.name: digest})
    return BaselineFacts(origin=origin, files={file.name: digest})


def _settled(run: Run) -> Recipe:
    """The recipe with the precision that it has on this machine: once chosen, always the same."""
    recipe = run.config.baseline
    if (known := certain(recipe.autocast, run.compute)) is not None:
        return recipe.model_copy(update={"autocast": known})

    def choose() -> Precision:
        with torch.random.fork_rng():
            model = move(run.workload.fresh_model(), run.compute)
        return precision_of(recipe, model, run.workload, run.workload.train, run.compute)

    chosen = remembered(home() / "baselines" / f"{_content_key(run, recipe)}.precision", choose)
    return recipe.model_copy(update={"autocast": chosen})


def _content_key(run: Run, recipe: Recipe) -> str:
    """Names the weights by everything that they follow from."""
    follows_from = json.dumps([run.workload.fingerprint, digested(recipe), run.config.seed, VERSION])
    return hashlib.sha256(follows_from.encode()).hexdigest()[:16]


def _train(run: Run, recipe: Recipe, checkpoint: Path) -> Mapping[str, Tensor]:
    torch.manual_seed(run.config.seed)
    model = run.workload.build_model()
    with run.progress.stage("Train the baseline") as report:
        try:
            fitted = fit(
                model,
                run.workload,
                run.workload.train,
                recipe,
                seed=run.config.seed,
                checkpoint=checkpoint,
                compute=run.compute,
                held_out=run.workload.search,
                compute_count=run.config.compute_count,
                report=report,
                say=run.progress.say,
            )
        except TrainingError as error:
            raise UserError(f"baseline: {error}") from error
    write_fitted(checkpoint.with_suffix(""), fitted)
    return model.state_dict()
