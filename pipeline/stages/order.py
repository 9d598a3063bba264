"""Which stages a run has, in which order, what each needs, and when a kept result counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.device_profiles import DeviceError
from secateur.pipeline.errors import TrackingError
from secateur.pipeline.files import sha256_of
from secateur.pipeline.run.facts import EARLIER_NAMES, Facts, StageFacts, from_json, to_json
from secateur.pipeline.run.kept_facts import keep
from secateur.pipeline.run.run import Run
from secateur.pipeline.stages.baseline import baseline
from secateur.pipeline.stages.benchmark import benchmark
from secateur.pipeline.stages.export import export
from secateur.pipeline.stages.finetune import finetune
from secateur.pipeline.stages.gate import gate
from secateur.pipeline.stages.promote import promote
from secateur.pipeline.stages.register import register
from secateur.pipeline.stages.report import report
from secateur.pipeline.stages.search import search

Results = Mapping[str, Mapping[str, Any]]
"""By the name of a stage, its facts as JSON."""


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        name: under which its facts are kept.
        title: what a user reads.
        function: ``function(run, facts of earlier stages) -> facts``.
        needs: the stages whose facts it is given; those that the run could not do are missing among them.
        version: raise it when the function's meaning changes, so that kept results are not reused.
        retry_on: errors after which trying again can help.
    """

    name: str
    title: str
    function: Callable[[Run, Facts], StageFacts]
    needs: tuple[str, ...] = ()
    version: int = 1
    retry_on: tuple[type[Exception], ...] = ()

    def perform(self, run: Run, facts: Facts) -> dict[str, Any]:
        """The stage's facts, as JSON.

        Raises:
            UserError, SurroundingsError, DeviceError, ExportError: as its function does.
        """
        result = to_json(self.function(run, facts.only(self.needs)))
        keep(run.directory, self.name, result)
        return result

    def read(self, result: Mapping[str, Any]) -> StageFacts:
        """The facts of a result.

        Raises:
            ValueError: it is none of this stage.
        """
        return from_json(self.name, result)

    def stands(self, result: Mapping[str, Any], directory: Path) -> bool:
        """Whether a kept result counts: it can be read, and the files it names are in the run directory, unchanged."""
        try:
            files = self.read(result).files
        except ValueError:
            return False
        return all(
            (directory / name).is_file() and sha256_of(directory / name) == digest for name, digest in files.items()
        )

    def key(self, run: Run, results: Results, by_earlier_names: bool = False) -> dict[str, Any]:
        """What the stage's result follows from: the run, the stage's version, and everything that earlier stages found.

        Args:
            results: of the earlier stages.
            by_earlier_names: as an earlier version of Secateur named the stages.
        """
        names = {stage.name: stage.name for stage in STAGES} | (EARLIER_NAMES if by_earlier_names else {})
        known = {names[name]: result for name, result in results.items()}
        key = {"run": run.run_id, "config": run.config.digest, "stage": names[self.name], "version": self.version}
        return {**key, "facts": json.dumps(known, sort_keys=True)}


TIMED_AND_PROVEN = ("baseline", "search", "finetune", "export", "benchmark", "gate")
STAGES = (
    Stage("baseline", "Baseline", baseline),
    Stage("search", "Search", search, version=3, retry_on=(DeviceError,)),
    Stage("finetune", "Fine-tune", finetune, ("search",), retry_on=(DeviceError,)),
    Stage("export", "Export", export, ("finetune",), version=2),
    Stage("benchmark", "Benchmark", benchmark, ("export",), version=2, retry_on=(DeviceError,)),
    Stage("gate", "Gate", gate, ("finetune", "export", "benchmark"), version=3),
    Stage("report", "Report", report, TIMED_AND_PROVEN, version=2),
    Stage("register", "Register", register, (*TIMED_AND_PROVEN, "report"), version=3, retry_on=(TrackingError,)),
    Stage("promote", "Promote", promote, ("register",), retry_on=(DeviceError, TrackingError)),
)
