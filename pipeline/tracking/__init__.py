"""MLflow: candidates, the registry, promotion. The only package that imports mlflow.

Names are imported on first use: ``secateur.pipeline.tracking.check`` looks at a store without MLflow, which takes
seconds to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.device_profiles.first_use import import_on_first_use

if TYPE_CHECKING:
    from secateur.pipeline.tracking.history import Event as Event
    from secateur.pipeline.tracking.ownership import CANDIDATE_TAG as CANDIDATE_TAG
    from secateur.pipeline.tracking.ownership import PARENT_TAG as PARENT_TAG
    from secateur.pipeline.tracking.ownership import RUN_TAG as RUN_TAG
    from secateur.pipeline.tracking.place import redacted as redacted
    from secateur.pipeline.tracking.place import store_uri as store_uri
    from secateur.pipeline.tracking.registry import ChampionMovedError as ChampionMovedError
    from secateur.pipeline.tracking.registry import Decision as Decision
    from secateur.pipeline.tracking.registry import Gate as Gate
    from secateur.pipeline.tracking.registry import Registry as Registry
    from secateur.pipeline.tracking.registry import Version as Version
    from secateur.pipeline.tracking.registry import alias_of as alias_of
    from secateur.pipeline.tracking.tracker import Tracker as Tracker

__all__ = import_on_first_use(
    __name__,
    {
        "history": ("Event",),
        "ownership": ("CANDIDATE_TAG", "PARENT_TAG", "RUN_TAG"),
        "place": ("redacted", "store_uri"),
        "registry": ("ChampionMovedError", "Decision", "Gate", "Registry", "Version", "alias_of"),
        "tracker": ("Tracker",),
    },
)
