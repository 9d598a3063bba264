"""Kept results checked: everything that can be computed again is, and a number that was changed is found.

Files against their sha256, the facts against their digest, the recorded numbers against the recorded answers, and these
against the answers of the kept models here. Answers may differ only on images whose two best answers are nearly equal
(``figures``). The folders are somebody else's: nothing in them is run or unpickled, sizes are bounded, and a run file
that names code needs consent as always.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from secateur.device_profiles.wording import printable
from secateur.pipeline.config import trust
from secateur.pipeline.config.reading import parse_run_file
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.errors import UserError
from secateur.pipeline.files import sha256_of
from secateur.pipeline.lifecycle import figures
from secateur.pipeline.lifecycle.figures import BASE, COMPACT, Answers, Figures, Task
from secateur.pipeline.lifecycle.results import FACTS, MODEL, PLAN, RUN_FILE, UnitFacts, answered, read_unit
from secateur.pipeline.lifecycle.rows import other_pixels, read_row
from secateur.pruning.cost import cost

MOST_TEXT = 1 << 20
"""Bytes of a plan or run file that is read."""
MOST_OPEN = 0.01
"""Share of images whose two best answers may be nearly equal: trained networks have a hundredth of it."""
NEAR = 1e-9
"""Relative difference of numbers that are the same but for how they were added up."""
Consent = Callable[[Callable[[], RunFile], Path], RunFile]


@dataclass(frozen=True)
class Verified:
    """What came of a unit's folder.

    Args:
        faults: what does not agree; empty = everything does.
        notes: what was found besides.
    """

    folder: Path
    faults: tuple[str, ...]
    notes: tuple[str, ...] = ()


def unit_folders(paths: Iterable[Path]) -> list[Path]:
    """The folders with facts in and below some folders, in order.

    Raises:
        UserError: there are none in one of them.
    """
    found: list[Path] = []
    for path in paths:
        files = sorted(path.rglob(FACTS))
        if not files:
            raise UserError(f"{printable(path)} holds no {FACTS}; name results, results/ROW or results/ROW/UNIT-sSEED")
        found += [file.parent for file in files]
    return list(dict.fromkeys(found))


def verify(folder: Path, consent: Consent = trust.consented, *, computing: bool = True) -> Verified:
    """Check one unit.

    Args:
        consent: how consent is had for a run file that names code.
        computing: False = nothing is computed by the models: files, digest, and numbers against recorded answers.
    """
    try:
        facts = read_unit(folder)
        faults = [*_files(folder, facts), *_own_digest(facts)]
        notes: list[str] = []
        if not faults:
            _check_sizes(folder)
            config = consent(lambda: _run_file(folder), folder / RUN_FILE)
            faults += _same_unit(facts, config)
            if computing and not faults:
                faults += _computed(folder, facts, config, notes)
            elif not faults:
                faults += _follow(facts, facts.figures, facts.figures.right)
    except UserError as error:
        return Verified(folder, (printable(error),))
    return Verified(folder, tuple(faults), tuple(notes))


def _files(folder: Path, facts: UnitFacts) -> Iterator[str]:
    """Files that are not what the facts say; nothing outside the row's folder is looked at."""
    for needed in (PLAN, MODEL, RUN_FILE):
        if needed not in facts.files:
            yield f"{FACTS} says no sha256 of {needed}"
    for name, digest in facts.files.items():
        file = folder / name
        inside = Path(name).parts in ((Path(name).name,), ("..", Path(name).name))
        if not inside:
            yield f"{FACTS} names {printable(name)}, which is no file of the row"
        elif not file.is_file():
            yield f"{printable(name)} is missing"
        elif file.stat().st_size > figures.MOST_BYTES:
            yield f"{printable(name)} has more than {figures.MOST_BYTES:,} bytes"
        elif (found := sha256_of(file)) != digest:
            yield f"{printable(name)} was changed: sha256 {found[:16]}..., recorded {printable(digest)[:16]}..."


def _own_digest(facts: UnitFacts) -> Iterator[str]:
    if facts.digest != facts.own_digest:
        yield f"{FACTS} was changed: its numbers do not have the digest that it says"


def _check_sizes(folder: Path) -> None:
    for name in (PLAN, RUN_FILE):
        if (folder / name).stat().st_size > MOST_TEXT:
            raise UserError(f"{name} has more than {MOST_TEXT:,} bytes")


def _run_file(folder: Path) -> RunFile:
    try:
        text = (folder / RUN_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {RUN_FILE}: {error}") from error
    return parse_run_file(text, RUN_FILE).lying_in(folder)


def _same_unit(facts: UnitFacts, config: RunFile) -> Iterator[str]:
    if config.seed != facts.seed:
        yield f"{RUN_FILE} has seed {config.seed}, {FACTS} says {facts.seed}"


def _computed(folder: Path, facts: UnitFacts, config: RunFile, notes: list[str]) -> Iterator[str]:
    """What does not agree with what the models compute here."""
    task = Task.opened(config)
    plan, found = answered(task, folder, [folder / name for name in facts.files])
    here = figures.figures(task, plan, found, other_pixels(read_row(facts.row)))
    recorded = facts.figures
    yield from _different("metric", recorded.metric, here.metric)
    yield from _different("images", recorded.images, here.images)
    costs = {BASE: cost(task.graph, task.full), COMPACT: cost(task.graph, plan)}
    for name, each in costs.items():
        yield from _different(f"MACs of {name}", recorded.macs.get(name), int(each.macs))
        yield from _different(f"parameters of {name}", recorded.params.get(name), int(each.params))
    yield from _different("networks", sorted(recorded.accuracy), sorted(found))
    if recorded.images != here.images or set(recorded.accuracy) != set(found):
        return
    if figures.of_images(task.workload):
        yield from _follow(facts, recorded, recorded.right)
        for name, answers in found.items():
            yield from _same_answers(name, recorded, answers, notes)
        return
    for name, answers in found.items():
        allowed = figures.tolerance(task.workload, answers)
        off = abs(recorded.accuracy[name] - here.accuracy[name])
        notes.append(f"{name}: {here.metric} {here.accuracy[name]:.4f}, tolerance {allowed:.1e}")
        if off > allowed + NEAR:
            yield f"{here.metric} of {name}: recorded {recorded.accuracy[name]:.6f}, here {here.accuracy[name]:.6f}"
    drop = 100 * (recorded.accuracy[BASE] - recorded.accuracy[COMPACT])
    if not _near(recorded.drop_pp, drop):
        yield f"drop_pp: recorded {recorded.drop_pp:.6f}, its accuracies say {drop:.6f}"


def _same_answers(name: str, recorded: Figures, here: Answers, notes: list[str]) -> Iterator[str]:
    """Images that were answered otherwise than here although their best answer is clear."""
    then, open_ = figures.unpacked(recorded.right[name], recorded.images), here.open_images
    differ = then != here.right
    notes.append(
        f"{name}: {recorded.metric} {here.right.mean():.4f}, {int(differ.sum())} images answered otherwise, "
        f"{int(open_.sum())} could be on another processor"
    )
    if open_.mean() > MOST_OPEN:
        yield f"{name} leaves {open_.mean():.1%} of the images undecided; an accuracy of such answers means nothing"
    clear = int((differ & ~open_).sum())
    if clear:
        yield (
            f"{recorded.metric} of {name}: recorded {recorded.accuracy[name]:.4f}, here {here.right.mean():.4f}; "
            f"{clear} images with a clear answer are answered otherwise"
        )


def _follow(facts: UnitFacts, recorded: Figures, right: Mapping[str, str]) -> Iterator[str]:
    """Recorded numbers that do not follow from the recorded answers."""
    if not right:
        return
    if set(right) != set(recorded.accuracy) or not {BASE, COMPACT} <= set(right):
        yield "right answers and accuracies are not of the same networks"
        return
    pixels = other_pixels(read_row(facts.row))
    told = figures.of_right_answers(recorded.metric, right, recorded.images, pixels, {})
    for key, value in told.model_dump(exclude={"macs", "params", "right"}).items():
        before = getattr(recorded, key)
        if not _near(before, value):
            yield f"{key}: recorded {before}, the recorded answers say {value}"


def _different(what: str, recorded: object, here: object) -> Iterator[str]:
    if recorded != here:
        yield f"{what}: recorded {printable(recorded)}, here {printable(here)}"


def _near(one: object, other: object) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_near(one[key], other[key]) for key in one)
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=NEAR, abs_tol=NEAR)
    return one == other
