"""What a run file chooses by name, a workload, a search method and a reward, each with options of its own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, create_model

from device_profiles.plain_yaml import Content, Place, Plain
from device_profiles.settle import Schema, schema_of
from device_profiles.shelf import Shelf
from device_profiles.wording import shown
from pipeline.config.faults import Fault, Report, known
from pipeline.config.schema import RewardSection, RunFile, SearchSection, Section

WORKLOADS = Shelf("pipeline.workloads", "workload", ("Options", "build"))
"""The task families, named as their modules."""
DEFAULTS = {
    "search.method": SearchSection.model_fields["method"].default,
    "reward.preset": RewardSection.model_fields["preset"].default,
}
"""Keys that choose whose ``options`` a section holds, with their defaults."""


def workload_options(data: dict[str, Any]) -> Any:
    """The checked options of a workload section (an instance of its module's ``Options``)."""
    return WORKLOADS.load(data["name"]).Options.model_validate(data)


def method_options(section: SearchSection) -> Any:
    """The checked options of a search method (an instance of its module's ``Options``)."""
    from pruning.search import METHODS

    return TypeAdapter(METHODS.load(section.method).Options).validate_python(section.options)


@functools.cache
def reward_model(preset: str) -> type[Section]:
    """The options of a reward as a section."""
    from pruning.search import reward

    kind, _ = reward.PRESETS[preset]
    parameters = inspect.signature(kind, eval_str=True).parameters
    options: Any = {name: (p.annotation, p.default) for name, p in parameters.items() if name != "reference"}
    return create_model("RewardOptions", __base__=Section, **options)


# -- what their places take --------------------------------------------------------------------------------------------


def schemas(content: Mapping[str, Content]) -> dict[Place, Schema | None]:
    """What the places of a run file take: its sections, and the options of what they name."""
    from pruning.search import METHODS

    workload = _named(content, "workload", "name")
    method, preset = _named(content, "search", "method"), _named(content, "reward", "preset")
    return {
        (): schema_of(RunFile),
        ("workload",): schema_of(WORKLOADS.load(workload).Options) if workload in WORKLOADS.names() else None,
        ("search", "options"): schema_of(METHODS.load(method).Options) if method in METHODS.names() else None,
        ("reward", "options"): reward_schema(preset),
    }


def reward_schema(preset: str) -> Schema | None:
    """What the options of a reward take; None = there is no such reward."""
    from pruning.search import reward

    return schema_of(reward_model(preset)) if preset in reward.PRESETS else None


def _named(content: Mapping[str, Content], section: str, key: str) -> str:
    """The text at ``section.key``, before anything of it was checked."""
    found, default = content.get(section), DEFAULTS.get(f"{section}.{key}", "")
    value = found.get(key, default) if isinstance(found, dict) else default
    return value.written if isinstance(value, Plain) else str(value)


# -- whether they can be -----------------------------------------------------------------------------------------------


def check_workload(section: object, report: Report) -> None:
    """Tell what is wrong with the section ``workload``."""
    if not isinstance(section, dict):
        return
    names, name = WORKLOADS.names(), section.get("name")
    if name in names:
        report.check(WORKLOADS.load(name).Options, section, ("workload",))
    else:
        report.add(Fault(("workload", "name"), f"unknown workload {shown(name)}; {known(names, str(name))}"))


def check_method(section: object, report: Report) -> None:
    """Tell what is wrong with the choice of a search method, and with its options."""
    from pruning.search import METHODS

    section = section if isinstance(section, dict) else {}
    names, method = METHODS.names(), section.get("method", DEFAULTS["search.method"])
    options = section.get("options", {})
    if not isinstance(method, str):
        return  # the schema has said so already
    if method not in names:
        report.add(Fault(("search", "method"), f"unknown method {shown(method)}; {known(names, method)}"))
    elif isinstance(options, dict):
        report.check(METHODS.load(method).Options, options, ("search", "options"))


def check_reward(section: object, report: Report) -> None:
    """Tell what is wrong with the choice of a reward, and with its options."""
    from pruning.search import reward
    from pruning.search.protocol import Evaluation

    section = section if isinstance(section, dict) else {}
    preset, options = section.get("preset", DEFAULTS["reward.preset"]), section.get("options", {})
    if not isinstance(options, dict) or not isinstance(preset, str) or report.tells_of(("reward", "preset")):
        return  # the schema has said so already
    exists = preset in reward.PRESETS
    if exists and report.check(reward_model(preset), options, ("reward", "options")) is None:
        return
    sample = Evaluation(metrics={"top1": 0.9, "macs": 1e6, "params": 1e5, "latency_ratio": 1.0, "p50_ms": 1.0})
    try:
        reward.make_reward(preset, sample, **options)
    except (ValueError, TypeError) as error:
        report.add(Fault(("reward", "options") if exists else ("reward",), str(error)))
