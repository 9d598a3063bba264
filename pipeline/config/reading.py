"""A run file is read: YAML, overrides, what each value means, and one report of everything that is wrong."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from secateur.device_profiles import plain_yaml
from secateur.device_profiles.plain_yaml import Content
from secateur.device_profiles.settle import settle
from secateur.device_profiles.wording import command
from secateur.pipeline.config.choices import (
    check_method,
    check_reward,
    check_workload,
    reward_model,
    reward_schema,
    schemas,
)
from secateur.pipeline.config.faults import Fault, FaultsError, Report
from secateur.pipeline.config.overrides import apply, in_order
from secateur.pipeline.config.renamed import with_new_keys, with_new_words
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.errors import UserError

FILES = (("data", "path"), ("data", "train"), ("data", "test"), ("model", "weights"))
"""Keys of the workload that may name files beside the run file."""


def load_run_file(path: Path, overrides: Sequence[str] = ()) -> RunFile:
    """Read and check a run file.

    Args:
        path: the YAML file.
        overrides: ``section.key=value`` texts, applied before checking; values are YAML.

    Raises:
        UserError: the file cannot be read, or anything in it is wrong; all faults in one message.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except IsADirectoryError as error:
        write = command("secateur", "init", path)
        raise UserError(f"cannot read run file {path}: it is a folder; of data, {write} writes one") from error
    except OSError as error:
        folder, write = Path(__file__).parents[1] / "runs", command("secateur", "init", "--help")
        raise UserError(
            f"cannot read run file {path}: {error.strerror}; `{write}` says how one is written for your data, and "
            f"examples are in {folder}"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"run file {path} is not UTF-8 text") from error
    folder = path.absolute().parent
    return _beside(parse_run_file(text, str(path), overrides), folder).lying_in(folder)


def _beside(config: RunFile, folder: Path) -> RunFile:
    """The same run file; what lies beside it, and not where data and weights are looked for first, is named in full."""
    workload = dict(config.workload)
    bases = [Path(), *([Path(data).expanduser()] if (data := os.environ.get("SECATEUR_DATA")) else [])]
    for section, key in FILES:
        given = (workload.get(section) or {}).get(key)
        if not given or any((base / given).expanduser().exists() for base in bases) or not (folder / given).exists():
            continue
        workload[section] = {**workload[section], key: str(folder.resolve() / given)}
    return config.model_copy(update={"workload": workload})


def parse_run_file(text: str, name: str = "run file", overrides: Sequence[str] = ()) -> RunFile:
    """Check the text of a run file; ``load_run_file`` without the file.

    Raises:
        UserError: it is no YAML, or no mapping.
        FaultsError: anything in it is wrong; all faults in one message.
    """
    try:
        document = plain_yaml.read(text)
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not valid YAML: {error}") from error
    content = document.content
    if not isinstance(content, dict):
        raise UserError(f"{name}: expected a mapping with the keys {', '.join(RunFile.model_fields)}")
    origins = {place: f"line {line}" for place, line in document.lines.items()}
    for override in in_order(overrides):
        place = apply(content, override)
        origins = {at: origin for at, origin in origins.items() if at[: len(place)] != place}
        origins[place] = "--set"
    for old, new in with_new_keys(content).items():
        origins |= {new: origins[old]} if old in origins else {}
    with_new_words(content)
    report = Report(Fault(place, f"given {len(lines)} times") for place, lines in document.repeated.items())
    run_file = _checked(content, report)
    if run_file is None:
        raise FaultsError(name, report.located(origins))
    return run_file


def _checked(content: dict[str, Content], report: Report) -> RunFile | None:
    """The run file that a text says; None = it has faults, which are told."""
    data, misread = settle(content, schemas(content))
    report.faults += [Fault(misreading.place, misreading.message) for misreading in misread]
    run_file = report.check(RunFile, data)
    check_workload(data.get("workload"), report)
    check_method(data.get("search"), report)
    check_reward(data.get("reward"), report)
    return None if report.faults else run_file


def reward_options(preset: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The options of a reward, checked as those of a run file are.

    Args:
        overrides: ``parameter=value`` texts; values are YAML.

    Raises:
        UserError: there is no such reward, or anything in its options is wrong; all faults in one message.
    """
    content: dict[str, Content] = {}
    for override in overrides:
        apply(content, override, "parameter=value, for example --set alpha=1")
    schema = reward_schema(preset)
    data, misread = settle(content, {(): schema})
    report = Report(Fault(misreading.place, misreading.message) for misreading in misread)
    if schema is not None:
        report.check(reward_model(preset), data)
    if not report.faults:
        check_reward({"preset": preset, "options": data}, report)
    if report.faults:
        raise UserError("; ".join(map(str, report.faults)))
    return dict(data)
