"""What a run file chooses by name, a workload, a search method and a reward, each with options of its own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, create_model

from secateur.device_profiles.plain_yaml import Content, Place, Plain
from secateur.device_profiles.settle import Schema, schema_of
from secateur.device_profiles.shelf import PluginError, Shelf, in_file
from secateur.device_profiles.wording import shown
from secateur.pipeline.config.faults import Fault, Report, known
from secateur.pipeline.config.schema import RewardSection, RunFile, SearchSection, Section

WORKLOADS = Shelf("secateur.pipeline.workloads", "workload", ("Options", "build"), "secateur.workloads")
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
    from secateur.pruning.search import METHODS

    return TypeAdapter(METHODS.load(section.method).Options).validate_python(section.options)


@functools.cache
def reward_model(preset: str) -> type[Section]:
    """The options of a reward as a section."""
    from secateur.pruning.search import reward

    kind, settings = reward.PRESETS[preset]
    parameters = inspect.signature(kind, eval_str=True).parameters
    options: Any = {
        name: (p.annotation, settings.get(name, p.default)) for name, p in parameters.items() if name != "reference"
    }
    return create_model("RewardOptions", __base__=Section, __doc__=inspect.getdoc(kind), **options)


# -- what their places take --------------------------------------------------------------------------------------------


def schemas(content: Mapping[str, Content]) -> dict[Place, Schema | None]:
    """What the places of a run file take: its sections, and the options of what they name."""
    from secateur.pruning.search import METHODS

    workload = _named(content, "workload", "name")
    method, preset = _named(content, "search", "method"), _named(content, "reward", "preset")
    return {
        (): schema_of(RunFile),
        ("workload",): _options(WORKLOADS, workload),
        ("search", "options"): _options(METHODS, method),
        ("reward", "options"): reward_schema(preset),
    }


def _options(shelf: Shelf, name: str) -> Schema | None:
    """What the options of a thing on a shelf take; None = it is not there, or cannot be used, which is told later."""
    try:
        return schema_of(shelf.load(name).Options)
    except ValueError:
        return None


def reward_schema(preset: str) -> Schema | None:
    """What the options of a reward take; None = there is no such reward."""
    from secateur.pruning.search import reward

    return schema_of(reward_model(preset)) if preset in reward.PRESETS else None


def _named(content: Mapping[str, Content], section: str, key: str) -> str:
    """The text at ``section.key``, before anything of it was checked."""
    given, default = content.get(section), DEFAULTS.get(f"{section}.{key}", "")
    value = given.get(key, default) if isinstance(given, dict) else default
    return value.written if isinstance(value, Plain) else str(value)


# -- whether they can be -----------------------------------------------------------------------------------------------


def check_workload(section: object, report: Report) -> None:
    """Tell what is wrong with the section ``workload``."""
    if not isinstance(section, dict):
        return
    name = section.get("name")
    module = _chosen(WORKLOADS, name, "workload", ("workload", "name"), report)
    if module is not None:
        report.check(module.Options, section, ("workload",))


def check_method(section: object, report: Report) -> None:
    """Tell what is wrong with the choice of a search method, and with its options."""
    from secateur.pruning.search import METHODS

    section = section if isinstance(section, dict) else {}
    method, options = section.get("method", DEFAULTS["search.method"]), section.get("options", {})
    if not isinstance(method, str):
        return  # the schema has said so already
    module = _chosen(METHODS, method, "method", ("search", "method"), report)
    if module is not None and isinstance(options, dict):
        report.check(module.Options, options, ("search", "options"))


def _chosen(shelf: Shelf, name: object, kind: str, place: Place, report: Report) -> Any:
    """What a name chooses; None = it cannot be used, which is told, or there is no consent for its file so far."""
    if in_file(name) and not shelf.has(name):
        return None  # read anew after consent (``trust.consented``)
    try:
        if isinstance(name, str) and shelf.has(name):
            return shelf.load(name)
    except PluginError as error:
        report.add(Fault(place, str(error)))
        return None
    report.add(Fault(place, f"unknown {kind} {shown(name)}; {known(shelf.names(), str(name))}"))
    return None


def check_reward(section: object, report: Report) -> None:
    """Tell what is wrong with the choice of a reward, and with its options."""
    from secateur.pruning.search import reward
    from secateur.pruning.search.protocol import Evaluation

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
