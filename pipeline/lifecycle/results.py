"""What is kept of a finished unit.

``results/ROW/UNIT-sSEED/`` holds ``plan.json``, ``model.safetensors`` (and ``last.safetensors``, where the weights of
the best epoch by the search split were kept), ``run.yaml`` and ``facts.json``. A baseline that was trained lies beside
the units, under the beginning of its sha256, once for all that began with it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from secateur import __version__
from secateur.device_profiles.wording import printable
from secateur.pipeline import children
from secateur.pipeline.config.schema import TrackingSection
from secateur.pipeline.errors import UserError
from secateur.pipeline.files import sha256_of, write_whole
from secateur.pipeline.lifecycle import figures
from secateur.pipeline.lifecycle.figures import BASE, COMPACT, LAST, Figures, Task
from secateur.pipeline.lifecycle.rows import Profile, Unit, other_pixels, read_row
from secateur.pipeline.run.facts import Facts, from_json
from secateur.pipeline.run.run import open_run_directory
from secateur.pipeline.surroundings import home
from secateur.pipeline.training.checkpoints import load_weights, save_weights
from secateur.pipeline.training.curve import Fitted
from secateur.pruning.plan import PruningPlan

FACTS, PLAN, MODEL, LAST_MODEL, RUN_FILE = (
    "facts.json",
    "plan.json",
    "model.safetensors",
    "last.safetensors",
    "run.yaml",
)
MOST_FACTS = 1 << 20
"""Bytes of a facts.json that is read."""
FRONT = 200
"""Candidates of a front that are kept."""


class Speedup(BaseModel):
    """How many times faster the compact network is than the unpruned one, timed in turn, with its 95 % interval."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    value: float
    low: float | None
    high: float | None
    statistic: str


class Training(BaseModel):
    """How the compact network was trained; accuracies are those on the search split, as fractions."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    keep: str
    kept_epoch: float
    epochs: float
    last: float | None
    best: float | None
    precision: str


class UnitFacts(BaseModel):
    """A finished unit.

    Args:
        digest: sha256 of all the rest, as canonical JSON.
        device: the machine that timed it, as its agent described it.
        memorised: whether the unpruned weights know the search images by heart, as pretrained ones do.
        speedup: by precision.
        search_spent: running totals of the search: evaluations, image_macs, seconds ...
        baseline_epochs: that the unpruned network was trained for here; 0 = its weights came trained.
        front: (accuracy on the search split, MACs ratio) of the search's Pareto front.
        hypervolume: that the front dominates, of 1.
        baseline_key: names a trained baseline by all that it follows from.
        files: path from the unit's folder -> sha256.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    format: Literal[1] = 1
    row: str
    unit: str
    seed: int
    profile: Profile
    command: str
    version: str
    commit: str
    device: Mapping[str, Any]
    search_metric: str
    memorised: bool
    figures: Figures
    training: Training | None
    speedup: Mapping[str, Speedup]
    search_spent: Mapping[str, float]
    baseline_epochs: float
    front: tuple[tuple[float, float], ...]
    hypervolume: float
    baseline_key: str = ""
    files: Mapping[str, str]
    digest: str = ""

    @property
    def own_digest(self) -> str:
        """What ``digest`` has to be."""
        text = json.dumps(self.model_dump(mode="json", exclude={"digest"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def figure(self, name: str) -> float:
        """A figure as goals name it."""
        found = self.figures
        match name:
            case "macs_removed":
                return 1 - found.macs[COMPACT] / found.macs[BASE]
            case "params_removed":
                return 1 - found.params[COMPACT] / found.params[BASE]
            case "speedup":
                return self.speedup["fp32"].value if "fp32" in self.speedup else math.nan
            case "hypervolume":
                return self.hypervolume
        return found.drop_pp


def read_unit(folder: Path) -> UnitFacts:
    """The facts of a unit, checked for their form only.

    Raises:
        UserError: there are none, or they are none of this format.
    """
    file = folder / FACTS
    try:
        if file.stat().st_size > MOST_FACTS:
            raise UserError(f"{printable(file)} has more than {MOST_FACTS:,} bytes")
        return UnitFacts.model_validate_json(file.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {printable(file)}: {error.strerror}") from error
    except (ValidationError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "nested too deep"}
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{printable(file)} holds no facts of a unit: {printable(place)}: {first['msg']}") from error


def write_results(unit: Unit, directory: Path, folder: Path) -> UnitFacts:
    """Keep what is to be kept of a finished run: the compact model in fp16, and its facts, which are of that file.

    Args:
        directory: of the run.
        folder: of the unit's results.

    Raises:
        UserError: the data is not here any more.
        SurroundingsError: the disk is full.
    """
    _, config = open_run_directory(directory)
    report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    found = Facts(**{name: from_json(name, each) for name, each in report["facts"].items() if name in STAGES})
    plan = PruningPlan.from_json((directory / "compact.plan.json").read_text(encoding="utf-8"))
    write_whole(folder / PLAN, plan.to_json() + "\n")
    own = config.model_copy(update={"tracking": TrackingSection()})
    write_whole(folder / RUN_FILE, yaml.safe_dump(own.model_dump(mode="json"), sort_keys=False))
    names = {MODEL: "compact.safetensors", LAST_MODEL: "compact.last.safetensors"}
    kept = {
        name: figures.compact_weights(load_weights(directory / source))
        for name, source in names.items()
        if (directory / source).is_file()
    }
    if kept.get(LAST_MODEL) == kept[MODEL]:
        del kept[LAST_MODEL]  # the best epoch was the last one
    for name, content in kept.items():
        write_whole(folder / name, content)
    key = _key(found.baseline.origin)
    files = [folder / name for name in (PLAN, RUN_FILE, *kept)]
    files += [_keep_baseline(directory, folder.parent, key)] if key else []
    facts = UnitFacts(
        row=unit.row,
        unit=unit.name,
        seed=unit.seed,
        profile=unit.profile,
        command=shlex.join(
            ["secateur", "reproduce", unit.row, "--profile", unit.profile, "--seeds", str(unit.seed + 1)]
        ),
        version=__version__,
        commit=commit(),
        device=dict(found.search.device.facts),
        search_metric=found.gate.search_metric,
        memorised=found.search.split is not None and found.search.split.memorised,
        figures=measured(Task.opened(config), folder, unit.row, files),
        training=_training(found.finetune.training, found.gate.metric),
        speedup={found.export.compact.artifact.precision: Speedup(**_speedup(found))},
        search_spent={name: float(amount) for name, amount in found.search.spent.items()},
        baseline_epochs=0.0 if found.baseline.training is None else found.baseline.training.curve[-1].epoch,
        front=(front := _front(directory, found)),
        hypervolume=hypervolume(front),
        baseline_key=key,
        files={os.path.relpath(file, folder): sha256_of(file) for file in files},
    )
    facts = facts.model_copy(update={"digest": facts.own_digest})
    write_whole(folder / FACTS, facts.model_dump_json(indent=1) + "\n")
    return facts


STAGES = ("baseline", "search", "finetune", "export", "benchmark", "gate", "report")


def measured(task: Task, folder: Path, row: str, files: Sequence[Path]) -> Figures:
    """The figures of the files of a unit.

    Args:
        files: with that of a trained baseline, if there is one.

    Raises:
        UserError: a file does not fit.
    """
    plan, found = answered(task, folder, files)
    return figures.figures(task, plan, found, other_pixels(read_row(row)))


def answered(task: Task, folder: Path, files: Sequence[Path]) -> tuple[PruningPlan, dict[str, figures.Answers]]:
    """The plan of a unit, and the answers of its networks on the test split; as ``measured``."""
    plan = PruningPlan.from_json((folder / PLAN).read_text(encoding="utf-8"))
    trained = [file for file in files if file.name.startswith("baseline-")]
    networks = {BASE: task.network(trained[0], task.full) if trained else task.model}
    networks[COMPACT] = task.network(folder / MODEL, plan)
    if (folder / LAST_MODEL).is_file():
        networks[LAST] = task.network(folder / LAST_MODEL, plan)
    return plan, {name: figures.answers(task.workload, network) for name, network in networks.items()}


def _key(origin: str) -> str:
    """The key of a trained baseline in what its stage says; empty where the weights came trained."""
    found = re.fullmatch(r"(?:trained|reused) \(([0-9a-f]+),.*\)", origin)
    return found[1] if found else ""


def _keep_baseline(directory: Path, row: Path, key: str) -> Path:
    content = figures.compact_weights(load_weights(directory / "baseline.safetensors"), {"key": key})
    file = row / f"baseline-{hashlib.sha256(content).hexdigest()[:8]}.safetensors"
    if not file.is_file():
        write_whole(file, content)
    return file


def give_baselines(row: Path) -> None:
    """Have runs of this home begin with the baselines of a row's results, where they would train the same ones."""
    for file in sorted(row.glob("baseline-*.safetensors")):
        key = figures.read_metadata(file).get("key", "")
        kept = home() / "baselines" / f"{key}.safetensors"
        if re.fullmatch(r"[0-9a-f]{16}", key) and not kept.is_file():
            whole = {n: t.float() if t.is_floating_point() else t for n, t in figures.read_weights(file).items()}
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_whole(kept.with_suffix(".sha256"), save_weights(kept, whole) + "\n")


def _training(fitted: Fitted | None, metric: str) -> Training | None:
    if fitted is None:
        return None
    judged = [epoch.metrics[metric] for epoch in fitted.curve if metric in epoch.metrics]
    return Training(
        keep=fitted.keep,
        kept_epoch=fitted.kept_epoch,
        epochs=fitted.curve[-1].epoch,
        last=judged[-1] if judged else None,
        best=max(judged, default=None),
        precision=fitted.precision,
    )


def _speedup(found: Facts) -> dict[str, Any]:
    speedup = found.benchmark.speedup
    return {**vars(speedup), "statistic": found.benchmark.statistic}


def _front(directory: Path, found: Facts) -> tuple[tuple[float, float], ...]:
    """(accuracy on the search split, MACs ratio) of the candidates on the front, as cut and fine-tuned alike."""
    candidates = json.loads((directory / "front.json").read_text(encoding="utf-8"))["candidates"]
    metric, macs = found.gate.search_metric, found.search.reference["macs"]
    points = [each["evaluation"]["metrics"] for each in candidates if each["stage"] == "search"]
    return tuple((point[metric], point["macs"] / macs) for point in points[:FRONT] if point.get(metric) is not None)


def hypervolume(front: Sequence[tuple[float, float]]) -> float:
    """The area that points (accuracy, cost ratio) dominate in the unit square."""
    area, best = 0.0, 0.0
    edges = sorted(((min(cost, 1.0), accuracy) for accuracy, cost in front), key=lambda point: (point[0], -point[1]))
    for i, (cost, accuracy) in enumerate(edges):
        best = max(best, accuracy)
        area += best * ((edges[i + 1][0] if i + 1 < len(edges) else 1.0) - cost)
    return area


def commit() -> str:
    """The commit of the checkout that this code is of; empty where it is installed, or there is no git."""
    with tempfile.TemporaryFile() as output:
        program = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
        try:
            child = children.start(program, dict(os.environ), output)
        except OSError:
            return ""
        ended = child.wait(60)
        output.seek(0)
        return "" if ended else output.read(64).decode("ascii", "replace").strip()
