"""MLflow: candidates, the registry, promotion. The only package that imports mlflow."""

from pipeline.tracking.store import RUN_TAG, shown
from pipeline.tracking.tracker import CANDIDATE_TAG, PARENT_TAG, Registered, Tracker

__all__ = ["CANDIDATE_TAG", "PARENT_TAG", "RUN_TAG", "Registered", "Tracker", "shown"]
