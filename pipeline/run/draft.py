"""A first run file for somebody's data: what is seen of the data decides the network, the image size and the recipe.

Nothing of a user's own is run: the data is read, and a file with a network is parsed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from secateur.device_profiles.shelf import in_file
from secateur.pipeline.config.choices import WORKLOADS
from secateur.pipeline.config.faults import known
from secateur.pipeline.config.json_schema import PACKAGED
from secateur.pipeline.config.reading import parse_run_file
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.errors import UserError
from secateur.pipeline.run.estimate import Estimate, estimate
from secateur.pipeline.run.preflight import Preflight, examine
from secateur.pipeline.workloads import Workload, networks
from secateur.pipeline.workloads.data import formats
from secateur.pipeline.workloads.data.content import Reading
from secateur.pipeline.workloads.detection import networks as detectors

Task = Literal["classification", "detection"]
SHELVES = {"classification": formats.IMAGES, "detection": formats.SCENES}
NAMED: Mapping[Task, Callable[[str], object]] = {
    "classification": networks.named,
    "detection": detectors.check_name,
}
"""What refuses the name of a network that is not there, or for another task."""
SUITED = {
    "classification": "take a classifier, such as resnet18",
    "detection": f"take a detector: {', '.join(detectors.DETECTORS)}",
}
SMALL_SIDE = 64
"""Pixels up to which images are taken as they are, by a network for small images."""
LARGEST_SIDE = 128
"""Pixels of the larger ones; 224 is what ImageNet's networks were made for, and takes three times as long."""
GENERAL = ("annotations", "data", "dataset", "images", "index", "labels", "train")
"""Names of files that say nothing of the data; the folder's name does."""
DETECTOR_STEP = 32
"""``small_ssd`` takes multiples of it."""
LONGEST_S = 540.0
"""What the recipe is cut down to on this machine: ten minutes, less what an estimate may be wrong by."""
STEPS, FEWEST_EPOCHS, MOST_EPOCHS = 600, 5, 60
"""Training steps of a baseline, and the bounds of its epochs; fine-tuning has half as many."""


@dataclass(frozen=True)
class Seen:
    """What is known of the data.

    Args:
        task: what it is for.
        said: what was found, for people.
        data: the section ``workload.data``.
        train: training images.
        side: the median of the images' shorter sides, in pixels.
        frame: height and width, where all images have the same; else None.
        notes: what was skipped or carved.
    """

    task: Task
    said: str
    data: Mapping[str, Any]
    train: int
    side: int
    frame: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """How long networks are trained: epochs of the baseline and of fine-tuning."""

    baseline: int
    finetune: int
    batch_size: int


def tasks_of(path: Path) -> dict[Task, str]:
    """What data can be used for -> what was seen of it.

    Raises:
        UserError: it is not there, or looks like nothing that is known.
    """
    if not path.exists():
        raise UserError(f"there is no {path}; name the folder or file of your data")
    seen: dict[Task, str] = {}
    ambiguous: list[str] = []
    for task, shelf in SHELVES.items():
        try:
            seen[task] = formats.detect(shelf, path)[1]  # type: ignore[index]
        except formats.AmbiguousError as error:
            ambiguous.append(str(error))
        except UserError:
            continue
    if not seen:
        images, scenes = (", ".join(shelf.names()) for shelf in SHELVES.values())
        found = "; ".join(ambiguous) or (
            f"{path} looks like no images with classes ({images}) and no images with boxes ({scenes}): "
            f"{formats.lying_in(path)}"
        )
        raise UserError(
            f"{found}. docs/reference/data.md shows how data lies. `secateur init` without a path writes a run file "
            "for digits, in which data.source and data.path can be set"
        )
    return seen


def look(path: Path | None, task: Task, said: str, reading: Reading) -> Seen:
    """Open the data and look at its images.

    Args:
        path: None = scikit-learn's digits.

    Raises:
        UserError: the data is damaged, or of a form that no run takes.
    """
    data: dict[str, Any] = {"source": "digits"} if path is None else {"path": str(path)}
    try:
        workload = _opened(task, data, reading)
    except UserError:
        data = {**data, "damaged": "leave_out"}
        without = _if_opened(task, data, reading)
        if without is None:  # damaged images are not the reason
            raise
        workload = without
    sizes = workload.summary().sizes
    sides = sorted(side for size, num in sizes.items() for side in [min(size)] * num)
    frame = next(((high, wide) for wide, high in sizes), None) if len(sizes) == 1 else None
    notes = workload.notes
    if notes and notes[0].startswith(said):  # what was found, with its counts
        said, notes = notes[0], notes[1:]
    return Seen(task, said, data, len(workload.train), sides[len(sides) // 2], frame, notes)


def _if_opened(task: Task, data: Mapping[str, Any], reading: Reading) -> Workload | None:
    try:
        return _opened(task, data, reading)
    except (UserError, ValidationError):
        return None


def _opened(task: Task, data: Mapping[str, Any], reading: Reading) -> Workload:
    kind = WORKLOADS.load(task)
    workload: Workload = kind.build(kind.Options.model_validate({"name": task, "data": data}), reading)
    return workload


def check_name(task: Task, model: str | None) -> None:
    """See that a network of a name is there, before the data is read; the file of one of a user's own is only parsed.

    Raises:
        UserError: there is none of this name for this task.
    """
    if model is None:
        return
    if (own := in_file(model)) is not None:
        check_factory(Path(own[0]), own[1])
        return
    other: Task = "classification" if task == "detection" else "detection"
    try:
        NAMED[task](model)
    except UserError:
        if not _is_for(other, model):
            raise
        raise UserError(f"{model} is for {other}, and the data is for {task}; {SUITED[task]}") from None


def _is_for(task: Task, model: str) -> bool:
    """Whether a network of a name is there for a task."""
    try:
        NAMED[task](model)
    except UserError:
        return False
    return True


def factory_in(file: Path) -> tuple[str, list[str]]:
    """The function or class of a Python file that builds a network, found without running it, and others like it.

    Raises:
        UserError: the file cannot be read or parsed, or nothing in it takes ``num_classes``.
    """
    found = [node.name for node in _parsed(file).body if _takes_classes(node)]  # type: ignore[attr-defined]
    if not found:
        raise UserError(
            f"nothing in {file} builds a network: write def NAME(num_classes): ... that returns an nn.Module, or name "
            f"what does: --model {file}:NAME"
        )
    return found[0], found[1:]


def check_factory(file: Path, name: str) -> None:
    """See, without running it, that a Python file gives something a name.

    Raises:
        UserError: the file cannot be read or parsed, or gives nothing this name.
    """
    parsed = _parsed(file)
    defined = {node.name for node in parsed.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    imported = [node.names for node in parsed.body if isinstance(node, ast.ImportFrom)]
    given = {alias.asname or alias.name for names in imported for alias in names}
    given |= {node.id for node in ast.walk(parsed) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    if name not in given | defined and "*" not in given:
        raise UserError(f"there is no {name} in {file}; {known(sorted(defined), name)}")


def _parsed(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read {file}: {reason}") from error


def _takes_classes(node: ast.stmt) -> bool:
    """Whether a definition is a function of ``num_classes``, or a class made with it."""
    if isinstance(node, ast.ClassDef):
        return any(isinstance(part, ast.FunctionDef) and part.name == "__init__" and _takes(part) for part in node.body)
    return isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and _takes(node)


def _takes(function: ast.FunctionDef) -> bool:
    return any(argument.arg == "num_classes" for argument in (*function.args.args, *function.args.kwonlyargs))


def recipe_for(train: int) -> Recipe:
    """A recipe that gives a small data set enough steps: smaller batches and more epochs than a large one."""
    batch_size = next((size for size in (64, 32) if train >= 20 * size), 16)
    epochs = min(MOST_EPOCHS, max(FEWEST_EPOCHS, round(STEPS * batch_size / max(1, train))))
    return Recipe(epochs, max(1, epochs // 2), batch_size)


def text_of(seen: Seen, name: str, model: str | None, device: str, recipe: Recipe) -> str:
    """The run file, with comments.

    Args:
        model: ``workload.model.name``; None = one that fits the images.

    Raises:
        UserError: something in it is refused.
    """
    training = f"batch_size: {recipe.batch_size}, clip_norm: 5.0"
    lines = [
        f"# yaml-language-server: $schema={PACKAGED.as_posix()}",
        f"# {seen.said}; {seen.train:,} training images.",
        "# What a key means: secateur explain KEY. All that is wrong, and how long it takes: secateur validate FILE.",
        f"name: {name}",
        "workload:",
        f"  name: {seen.task}",
        *(_classifier(seen, model) if seen.task == "classification" else _detector(seen, model)),
        "device:",
        f"  profile: {plain(device)}  # secateur list devices; a board of yours: secateur devices add --help",
        f"baseline: {{epochs: {recipe.baseline}, lr: 0.05, {training}}}  # not needed with model.weights",
        "search:",
        "  method: global  # takes seconds; then try others: secateur list methods",
        "  target: {macs_ratio: 0.5}  # half of the multiplications",
        f"finetune: {{top: 1, epochs: {recipe.finetune}, lr: 0.02, {training}}}",
        "gate: {max_drop: 0.02, min_speedup: 1.0}  # at most two percentage points lost, and faster for sure",
    ]
    text = "\n".join(lines) + "\n"
    parse_run_file(text, name)
    return text


def _classifier(seen: Seen, model: str | None) -> list[str]:
    small = seen.side <= SMALL_SIDE
    model = model or ("cifar/resnet20" if small else "torchvision/mobilenet_v2")
    data = _data(seen)
    if seen.data.get("source") == "digits":
        size = "    image_size: 16  # the digits have 8 x 8 pixels"
    elif small:
        high, wide = seen.frame or (seen.side, seen.side)
        size = f"    image_size: {max(4, high) if high == wide else [max(4, high), max(4, wide)]}  # as your images are"
    else:
        size = f"    image_size: {min(seen.side, LARGEST_SIDE)}  # yours have {seen.side}; 224 sees more and is slower"
    augment = "    augment: shift  # flip_shift where a mirrored image is as good (no digits, no text)"
    if not small:
        augment = (
            "    augment: random_resized_crop  # parts of images, also mirrored; flip: 0 where left and right matter"
        )
    return [
        "  model:",
        f"    name: {plain(model)}  # cifar/NAME, torchvision/NAME, timm/NAME, or FILE.py:FACTORY of your own",
        "    # weights: FILE.safetensors  # trained weights; also torchvision or timm for theirs",
        "    # load: but_classes  # where they were trained on other classes",
        "  data:",
        *data,
        size,
        augment,
    ]


def _detector(seen: Seen, model: str | None) -> list[str]:
    side = max(2, min(seen.side, LARGEST_SIDE) // DETECTOR_STEP) * DETECTOR_STEP
    named = [f"    name: {plain(model)}"] if model else ["    name: small_ssd"]
    if model is None:
        named.append(
            f"    options: {{image_size: {side}}}  # yours have {seen.side}; larger ones need ssd300_mobilenet_v1"
        )
    data = _data(seen)
    return [
        "  model:",
        *named,
        "    # weights: torchvision  # of some detectors; with load: but_classes",
        "  data:",
        *data,
    ]


def _data(seen: Seen) -> list[str]:
    """Where the images are, and what is done about damaged ones."""
    lines = [f"    {key}: {plain(value)}" for key, value in seen.data.items()]
    return [line + ("  # refuse = no run begins with damaged images" if "damaged:" in line else "") for line in lines]


def plain(value: object) -> str:
    """A value as YAML in one line."""
    from secateur.device_profiles import plain_yaml

    return plain_yaml.dump([value], width=100_000)[2:].rstrip("\n")


def name_for(path: Path | None) -> str:
    """A run's name after its data."""
    whole = Path() if path is None else path.absolute()
    named = whole.parent if whole.is_file() and whole.stem.lower() in GENERAL else whole
    stem = re.sub(r"[^A-Za-z0-9]+", "-", named.name.partition(".")[0]).strip("-")
    return stem[:60] or "digits"


def in_time(
    text: str, recipe: Recipe, name: str, folder: Path, reading: Reading
) -> tuple[Recipe, Preflight, Estimate | None]:
    """The recipe, shortened so that the run takes ten minutes on this machine where that is possible; and its estimate.

    Args:
        text: of the run file, with this recipe.
        folder: where it will lie.
    """
    preflight = examine(parse_run_file(text, name).lying_in(folder), reading)
    taken = estimate(preflight)
    if taken is None or taken.seconds <= LONGEST_S:
        return recipe, preflight, taken
    training = sum(part.seconds for part in taken.parts if part.stage in ("Baseline", "Fine-tune"))
    share = max(0.0, LONGEST_S - (taken.seconds - training)) / training
    shorter = replace(
        recipe, baseline=max(1, int(share * recipe.baseline)), finetune=max(1, int(share * recipe.finetune))
    )
    preflight.config = _with_recipe(preflight.config, shorter)
    return shorter, preflight, estimate(preflight)


def _with_recipe(config: RunFile, recipe: Recipe) -> RunFile:
    return config.model_copy(
        update={
            "baseline": config.baseline.model_copy(update={"epochs": float(recipe.baseline)}),
            "finetune": config.finetune.model_copy(update={"epochs": float(recipe.finetune)}),
        }
    )
