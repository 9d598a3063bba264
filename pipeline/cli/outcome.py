"""What a run ends with: the final table, the gate, the registered version, and what can be done next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.device_profiles.wording import number_of
from secateur.pipeline.terminal import command, one_line, out, table

if TYPE_CHECKING:
    from secateur.pipeline.config.schema import RunFile
    from secateur.pipeline.run.facts import Facts

FORMAT = 1
"""Of the JSON document; raised when a key changes its meaning or goes."""
MILDER = 0.5
"""How far a milder target is from the old one towards the unpruned network."""
LONGER = 2
"""How much longer a longer fine-tuning is."""


def show(facts: Facts, config: RunFile, directory: Path, tracking_uri: str) -> None:
    """The same for people.

    Args:
        tracking_uri: of the store that knows the model; empty where it could not be told.
    """
    from secateur.pipeline.report import final_table, registered, went_by

    numbers = ("baseline", "compact", "change")
    rows = table("", *numbers, title=f"{directory.name} on device {facts.benchmark.device}", right=numbers)
    for row in final_table(facts):
        rows.add_row(*row)
    out.print(rows)
    for check in facts.gate.failed:
        value = "unknown" if check.value is None else f"{check.value:.4g}"
        out.print(f"Gate: {check.name} is {value}, must be {check.relation} {check.bound:.4g}")
    if facts.gate.passed:
        out.print(f"Gate: passed ({number_of(len(facts.gate.checks), 'check(s)')})")
    out.print(went_by(facts))
    for line in registered(facts):
        out.print(line)
    out.print(f"Report: {one_line(directory / facts.report.html)}")
    if tracking_uri:
        out.print("Next:")
        for text, step in next_steps(facts, config, directory, tracking_uri):
            out.print(f"  {step}{f'  # {text}' if text else ''}")


def document(facts: Facts, config: RunFile, directory: Path, tracking_uri: str) -> dict[str, Any]:
    """What a run ends with, as JSON can hold it; docs/reference/command-line.md describes every key."""
    known, entry = facts.to_json(), facts.register
    return {
        "format": FORMAT,
        "run": directory.name,
        "directory": str(directory),
        "device": facts.benchmark.device,
        "passed": facts.gate.passed,
        "checks": known["gate"]["checks"],
        "models": known["gate"]["models"],
        "speedup": known["benchmark"]["speedup"],
        "registered": None if entry is None else {"name": entry.name, "version": entry.version},
        "promoted": facts.promote is not None and facts.promote.promoted,
        "report": str(directory / facts.report.html),
        "next": [step for _, step in next_steps(facts, config, directory, tracking_uri)],
    }


def next_steps(facts: Facts, config: RunFile, directory: Path, tracking_uri: str) -> list[tuple[str, str]]:
    """(why, command) of what is worth doing now: with the model where the gate passed, else to come through it."""
    steps = _uses(facts, directory) if facts.gate.passed else _remedies(facts, config, directory)
    if tracking_uri.startswith("http"):
        steps.append(("every candidate", tracking_uri))
    elif tracking_uri:
        steps.append(("every candidate", command("mlflow", "ui", "--backend-store-uri", tracking_uri)))
    return steps


def _uses(facts: Facts, directory: Path) -> list[tuple[str, str]]:
    steps = []
    if facts.register is not None:
        reference = f"{facts.register.name}@{facts.register.version}"
        steps.append(("the model, verified", command("secateur", "pull", reference, "--output", facts.register.name)))
    files = (directory / "compact.onnx", "--against", directory / "baseline.onnx", "--device", facts.benchmark.device)
    steps.append(("time it again, or elsewhere", command("secateur", "benchmark", *files)))
    steps.append(("other winners", command("secateur", "rescore", directory, "--reward", "mnasnet")))
    return steps


def _remedies(facts: Facts, config: RunFile, directory: Path) -> list[tuple[str, str]]:
    """What helps against the checks that do not hold."""
    failed = [check.name for check in facts.gate.failed]
    steps = []
    if any("drop" in name or "accuracy" in name for name in failed):
        steps += _more_accurate(facts, config, directory)
    if any(name.startswith("search target") for name in failed):
        steps.append(("a method that comes down to it", command("secateur", "list", "methods")))
    if any(_is_of_cost(name) for name in failed):
        steps += _cheaper(facts, config, directory)
    if any(name.startswith(("parity", "certificate", "results")) for name in failed):
        steps.append(("networks that differ", command("secateur", "explain", "export.tolerance")))
    return list(dict.fromkeys(steps))


def _is_of_cost(check: str) -> bool:
    """Whether a check asks for a network that is faster or smaller."""
    return check.startswith(("speed-up", "MACs", "p50", "p95", "size", "peak"))


def _more_accurate(facts: Facts, config: RunFile, directory: Path) -> list[tuple[str, str]]:
    target, steps = config.search.target, []
    for name in ("macs_ratio", "latency_ratio"):
        if (ratio := getattr(target, name)) is not None:
            milder = round(ratio + MILDER * (1 - ratio), 2)
            steps.append(("a milder target", _again(directory, f"search.target.{name}={milder:g}")))
    epochs = LONGER * config.finetune.epochs
    steps.append(("longer fine-tuning", _again(directory, f"finetune.epochs={epochs:g}")))
    if (group := most_cut(facts)) is not None:
        frozen = [*config.search.frozen, group]
        steps.append((f"without cutting {group}, which lost most", _again(directory, f"search.frozen={frozen}")))
    steps.append(("another criterion", command("secateur", "list", "methods")))
    return steps


def _cheaper(facts: Facts, config: RunFile, directory: Path) -> list[tuple[str, str]]:
    ratio = config.search.target.latency_ratio or config.search.target.macs_ratio or 1.0
    return [
        ("search for speed on the device", _again(directory, f"search.target.latency_ratio={round(0.8 * ratio, 2):g}")),
        ("which widths are fast there", command("secateur", "devices", "probe", facts.benchmark.device)),
    ]


def most_cut(facts: Facts) -> str | None:
    """The channel group of which the compact network keeps the smallest share; None where it has only one."""
    plan = facts.finetune.best.candidate.plan
    shares = {name: len(kept) / plan.sizes[name] for name, kept in plan.kept.items()}
    return min(shares, key=shares.__getitem__) if len(shares) > 1 else None


def _again(directory: Path, override: str) -> str:
    return command("secateur", "run", directory / "run.yaml", "--set", override)
