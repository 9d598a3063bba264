"""docs/results.md: the rows of published claims beside what the kept facts show."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from secateur.pipeline.lifecycle.figures import BASE, COMPACT, LAST
from secateur.pipeline.lifecycle.results import FACTS, UnitFacts, read_unit
from secateur.pipeline.lifecycle.rows import RATIOS, Bound, Profile, read_row, row_names

Found = Mapping[str, list[UnitFacts]]
"""The finished units of a row by name, each with all its seeds."""


def page(results: Path) -> str:
    """docs/results.md, made of the rows and of the facts that are there.

    Raises:
        UserError: facts are damaged.
    """
    units = {row: of_row(results, row) for row in row_names()}
    parts = [HEADING]
    for row in units:
        parts += _section(row, units)
    return "\n".join(parts).rstrip() + "\n"


HEADING = """# Published claims, repeated

Written by `secateur results results --write docs/results.md` from `results/`; no number is typed. `secateur verify
results` computes accuracies, MACs and parameters again from the models that lie there, `secateur reproduce --list`
names the rows, and `secateur reproduce ROW --profile cpu --budget HOURS` goes on with one.

Figures are those of the kept files (weights in fp16), on the test split, which no search and no training has seen. A
baseline that is trained here holds the search split out; published weights have seen its images, and a row with such
says so. *best* = the weights of the epoch that was best on the search split, *last* = those of the last epoch. Drops
are in percentage points, positive = lost; beside one seed's stands the paired 95 % interval over test images, beside
several the standard deviation over seeds. Speed-ups are over the unpruned network, timed in turn with it on the machine
that made the row, with their 95 % interval. Controls are in italics.
"""


def of_row(results: Path, row: str) -> Found:
    """The finished units of a row, those of a shared control under the name that they have here."""
    content, found = read_row(row), dict[str, list[UnitFacts]]()
    places = {name: (row, name) for name in content.units}
    places |= {name: (where.partition("/")[0], where.partition("/")[2]) for name, where in content.shared.items()}
    for name, (of, unit) in places.items():
        files = sorted((results / of).glob(f"{unit}-s*/{FACTS}"))
        facts = [read_unit(file.parent) for file in files]
        found[name] = sorted((each for each in facts if each.unit == unit), key=lambda each: each.seed)
    return found


def _section(row: str, units: Mapping[str, Found]) -> list[str]:
    content, found = read_row(row), units[row]
    published = ", ".join(_published(name, value) for name, value in content.published.items())
    lines = [f"## {row}", "", f"{content.claim}.", "", f"- Source: {content.source}"]
    lines += [f"- Published: {published}"] if published else []
    done = [facts for name in content.units for facts in found[name]]
    profiles = sorted({facts.profile for facts in done}) or ["cpu"]
    for profile in profiles:
        goal = content.goal.get(profile, content.goal["cpu"])
        lines += [f"- Goal ({profile}): {'; '.join(map(_goal, goal))}"]
        lines += [f"- Reached ({profile})? {verdict(goal, found, profile)}"] if done else []
    if not done:
        return [*lines, f"- Not run here: {content.not_here or 'not yet'}", ""]
    if any(facts.memorised for facts in done):
        lines += ["- The unpruned weights are published ones and know the search images by heart."]
    return [*lines, "", *_table(content.units, found), "", *_costs(found), ""]


def _table(own: Sequence[str], found: Found) -> list[str]:
    heads = ["unit", "seeds", "unpruned %", "best %", "last %", "drop, pp", "MACs removed %", "params removed %"]
    heads += ["speed-up", "original pixels: unpruned %", "best %"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for name, seeds in found.items():
        if not seeds:
            lines += [f"| {_name(name, own)} | not run yet |{' |' * (len(heads) - 2)}"]
            continue
        cells = [_name(name, own), ", ".join(str(facts.seed) for facts in seeds)]
        cells += [_mean(seeds, lambda f: 100 * f.figures.accuracy[BASE])]
        cells += [_mean(seeds, lambda f: 100 * f.figures.accuracy[COMPACT])]
        cells += [_mean(seeds, lambda f: 100 * f.figures.accuracy.get(LAST, f.figures.accuracy[COMPACT]))]
        cells += [_drop(seeds)]
        cells += [_mean(seeds, lambda f: 100 * f.figure("macs_removed"))]
        cells += [_mean(seeds, lambda f: 100 * f.figure("params_removed"))]
        cells += [_speedups(seeds)]
        cells += [_mean(seeds, lambda f: 100 * f.figures.original_pixels.get(BASE, math.nan))]
        cells += [_mean(seeds, lambda f: 100 * f.figures.original_pixels.get(COMPACT, math.nan))]
        lines += [f"| {' | '.join(cells)} |"]
    return lines


def _name(name: str, own: Sequence[str]) -> str:
    return name if name == own[0] else f"*{name}*"


def _mean(seeds: Sequence[UnitFacts], of: Callable[[UnitFacts], float], digits: int = 2) -> str:
    """Mean and standard deviation over seeds; empty where it is unknown."""
    values = [value for facts in seeds if not math.isnan(value := of(facts))]
    if not values:
        return ""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


def _drop(seeds: Sequence[UnitFacts]) -> str:
    if len(seeds) > 1:
        return _mean(seeds, lambda f: f.figures.drop_pp)
    one = seeds[0].figures
    if one.drop_low_pp is None or one.drop_high_pp is None:
        return f"{one.drop_pp:+.2f} (cannot tell at n = {one.images})"
    return f"{one.drop_pp:+.2f} [{one.drop_low_pp:+.2f}, {one.drop_high_pp:+.2f}]"


def _speedups(seeds: Sequence[UnitFacts]) -> str:
    told = []
    for precision in dict.fromkeys(name for facts in seeds for name in facts.speedup):
        each = [facts.speedup[precision] for facts in seeds if precision in facts.speedup]
        first = each[0]
        ends = f" [{first.low:.2f}, {first.high:.2f}]" if len(each) == 1 and first.low and first.high else ""
        told.append(f"{precision} {fmean(s.value for s in each):.2f}x{ends}")
    return ", ".join(told)


def _costs(found: Found) -> list[str]:
    """What searches and trainings took, of the first seed; machines, commands."""
    lines = []
    for name, seeds in found.items():
        for facts in seeds[:1]:
            spent, training = facts.search_spent, facts.training
            said = [f"search {spent.get('evaluations', 0):.0f} evaluations, {spent.get('epochs', 0):g} epochs"]
            said += [f"{spent.get('image_macs', 0):.2g} image-MACs"]
            said += [f"then {training.epochs:g} epochs in {training.precision}"] if training else []
            said += [f"baseline {facts.baseline_epochs:g} epochs"] if facts.baseline_epochs else []
            machine = facts.device.get("cpu") or facts.device.get("processor") or facts.device.get("machine") or ""
            lines += [f"- {name}: {', '.join(said)}; {machine}; commit {facts.commit[:7] or facts.version}"]
    commands = dict.fromkeys(seeds[-1].command for seeds in found.values() if seeds)
    return [*lines, *(f"- `{each}`" for each in commands)]


def _published(name: str, value: float) -> str:
    match name:
        case "drop_pp":
            return f"drop {value:+g} pp"
        case "macs_removed" | "params_removed":
            return f"{100 * value:g} % of {'MACs' if name == 'macs_removed' else 'parameters'} removed"
    return f"{name} {value:g}"


def _goal(bound: Bound) -> str:
    relation, value = ("at most", bound.at_most) if bound.at_least is None else ("at least", bound.at_least)
    over = f" over {bound.over}" if bound.over else ""
    assert value is not None
    return f"{bound.unit}: {WORDS[bound.figure]}{over} {relation} {_in_unit(bound, value)}"


WORDS = {
    "drop_pp": "drop",
    "macs_removed": "MACs removed",
    "params_removed": "parameters removed",
    "speedup": "speed-up",
    "hypervolume": "hypervolume of the front",
}


def _in_unit(bound: Bound, value: float) -> str:
    if bound.figure == "drop_pp":
        return f"{value:.2f} pp"
    if bound.figure in RATIOS:
        return f"{value:.3f}{'x' if bound.figure == 'speedup' or bound.over else ''}"
    return f"{100 * value:.2f} %"


def verdict(goal: Sequence[Bound], found: Found, profile: Profile) -> str:
    """Whether means over seeds reach a goal, or by how much they miss it."""
    missed, unknown = [], []
    for bound in goal:
        value = _value(bound, found, profile)
        limit = bound.at_most if bound.at_least is None else bound.at_least
        assert limit is not None
        if value is None or math.isnan(value):
            unknown.append(bound.unit)
        elif (value > limit) if bound.at_least is None else (value < limit):
            missed.append(f"{_goal(bound)}: {_in_unit(bound, value)}, missed by {_in_unit(bound, abs(value - limit))}")
    if missed:
        return "No. " + "; ".join(missed)
    return f"Not known yet: {', '.join(dict.fromkeys(unknown))} is not run" if unknown else "Yes"


def _value(bound: Bound, found: Found, profile: Profile) -> float | None:
    """What a bound is about; None where a unit has not been run."""
    units = [bound.unit] if bound.over is None else [bound.unit, bound.over]
    means = []
    for name in units:
        values = [facts.figure(bound.figure) for facts in found[name] if facts.profile == profile]
        if not values:
            return None
        means.append(fmean(values))
    if bound.over is None:
        return means[0]
    return means[0] / means[1] if bound.figure in RATIOS else means[0] - means[1]
