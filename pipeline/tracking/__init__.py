"""MLflow: candidates, the registry, promotion. The only package that imports mlflow."""

from pipeline.tracking.registry import ChampionMovedError, Decision, Event, Gate, Registry, Version, alias_of
from pipeline.tracking.store import RUN_TAG, shown, store_uri
from pipeline.tracking.tracker import CANDIDATE_TAG, PARENT_TAG, Tracker

__all__ = [
    "CANDIDATE_TAG",
    "PARENT_TAG",
    "RUN_TAG",
    "ChampionMovedError",
    "Decision",
    "Event",
    "Gate",
    "Registry",
    "Tracker",
    "Version",
    "alias_of",
    "shown",
    "store_uri",
]
