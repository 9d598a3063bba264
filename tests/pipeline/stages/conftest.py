"""One whole run for all tests that only look at it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from secateur.pipeline.run.facts import Facts
from secateur.pipeline.run.run import Run
from secateur.pipeline.stages.report import renew
from tests.pipeline.helpers import opened, perform, tiny_config


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, Facts]]:
    """A run and the facts of all its stages; the files and the journal are left as they are."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECATEUR_HOME", str(folder / "home"))
        config = tiny_config(folder, search={"target": {"macs_ratio": 0.8}})
        with opened(config) as run:
            run.tracker.start()
            facts = perform(run)
            renew(run, facts)
    yield run, facts
