"""What a check asks of MLflow, and what it is told: the port that servers and databases are behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from secateur.pipeline.tracking.ownership import PROMPT_TAG


@dataclass(frozen=True)
class Experiment:
    """An experiment as a store has it.

    Args:
        deleted: whether only its name is kept.
        artifacts: where its files are.
        runs_of_ours: whether a run in it bears a tag of ours.
    """

    number: str
    deleted: bool
    tags: Mapping[str, str]
    artifacts: str = ""
    runs_of_ours: bool = False


@dataclass(frozen=True)
class Model:
    """A registered model, or a prompt, as a store has it.

    Args:
        aliases: alias -> version.
        versions_of_ours: those of the versions with aliases that bear our tag.
    """

    tags: Mapping[str, str]
    aliases: Mapping[str, str]
    versions_of_ours: tuple[str, ...] = ()

    @property
    def is_prompt(self) -> bool:
        return self.tags.get(PROMPT_TAG) == "true"


class StoreRefusedError(Exception):
    """A store that cannot be used as it stands; says why, and what to do."""


class StoreUnreachableError(Exception):
    """A store that does not answer now, and may do so later."""


class Store(Protocol):
    """What a check asks of MLflow.

    Raises, in every method:
        StoreRefusedError: it cannot be used as it stands.
        StoreUnreachableError: it does not answer now.
    """

    notes: tuple[str, ...] = ()

    def experiment(self, name: str) -> Experiment | None:
        """The experiment of a name, deleted ones too; None = there is none."""
        ...

    def model(self, name: str) -> Model | None:
        """The registered model or prompt of a name; None = there is none."""
        ...
