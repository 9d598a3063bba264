"""Whose a thing in MLflow is: ours is what carries our tag, the rest is left alone unless the run file takes it over.

Tables of what is refused, in words; who asks MLflow, and how, is the business of ``store``, ``registry`` and ``check``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from secateur.device_profiles.wording import command, printable
from secateur.pipeline.tracking.history import read_events
from secateur.pipeline.tracking.place import redacted

RUN_TAG = "secateur.run_id"
"""On an MLflow run and on a version: Secateur's id of the run that made it."""
CANDIDATE_TAG, PARENT_TAG = "candidate.id", "mlflow.parentRunId"
"""On the MLflow run of a candidate: which one it is, and of which run."""
MADE_TAG = "secateur.made"
"""On an experiment: ``made`` by Secateur, or ``taken over``."""
KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
"""On an experiment: MLflow opens it in the view for models, not in that for agents."""
DEFAULT_DEVICE = "secateur.default_device"
"""On a registered model: the device that its plain aliases are about. Every model of ours has it."""
RUN_TAGS = (RUN_TAG, "secateur.decision", "secateur.champion")
"""Tags of MLflow runs of ours: an experiment of an earlier Secateur, which bears no tag, is known by them."""
PROMPT_TAG = "mlflow.prompt.is_prompt"
"""MLflow keeps a prompt as a registered model with this tag."""
CHAMPION, CHALLENGER = "champion", "challenger"
TAKE_OVER = "take it over with `tracking.take_over: true`"


def is_alias_of_ours(alias: str) -> bool:
    """Whether Secateur writes an alias of that name: a role, or a role on a device."""
    return alias.partition("-")[0] in (CHAMPION, CHALLENGER)


def experiment_refused(name: str) -> str:
    """An experiment that somebody else made."""
    return (
        f"experiment {printable(name)!r} is in MLflow already, and Secateur did not make it: its runs would stand "
        f"among those of others. Choose another tracking.experiment, or {TAKE_OVER}"
    )


def experiment_deleted(name: str, experiment_id: str, uri: str) -> str:
    """An experiment that was deleted, which MLflow keeps under its name."""
    restore = command("mlflow", "experiments", "restore", "--experiment-id", experiment_id)
    return (
        f"experiment {printable(name)!r} was deleted in MLflow, which keeps its name: nothing can be written to it. "
        f"Restore it with `MLFLOW_TRACKING_URI={redacted(uri)} {restore}`, or choose another tracking.experiment"
    )


def prompt_refused(name: str) -> str:
    """A prompt that has the name of the model."""
    return (
        f"{printable(name)!r} is a prompt in MLflow, and a model cannot have the name of one: choose another "
        "tracking.registered_model"
    )


def model_refused(name: str) -> str:
    """A registered model that somebody else made."""
    return (
        f"registered model {printable(name)!r} is in MLflow already, and Secateur did not make it: its aliases would "
        f"be moved. Choose another tracking.registered_model, or {TAKE_OVER}"
    )


def alias_refused(name: str, alias: str, version: str) -> str:
    """An alias that points to a version that Secateur did not make."""
    return (
        f"alias {printable(alias)} of registered model {printable(name)!r} points to version {version}, which Secateur "
        f"did not make: it would be moved. Choose another tracking.registered_model, remove the alias, or {TAKE_OVER}"
    )


def foreign_aliases(
    tags: Mapping[str, str], aliases: Mapping[str, str], versions_of_ours: Iterable[str]
) -> dict[str, str]:
    """Aliases of ours by name that point to versions of others: alias -> version.

    Args:
        tags: of the registered model.
        aliases: alias -> version.
        versions_of_ours: versions that carry our tag.
    """
    known = {*versions_of_ours}
    for event in read_events(tags):
        known |= {event.version, event.previous or event.version}
    return {alias: v for alias, v in sorted(aliases.items()) if is_alias_of_ours(alias) and v not in known}
