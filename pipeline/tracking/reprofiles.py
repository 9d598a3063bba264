"""Champions timed again: a run of its own per champion in MLflow, whose series are the picture of a device's drift."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from mlflow.entities import Metric, RunTag

from secateur.pipeline.errors import TrackingError
from secateur.pipeline.tracking.place import equals
from secateur.pipeline.tracking.store import RUN_TAG, Unreachable, connect, experiment_of, first_line, redacted

VIEW = "?workflowType=machine_learning"
"""Of a page's address: the view for models, whichever the reader's browser opened last."""
REPROFILE_TAG, LAST_TAG = "secateur.champion", "secateur.last_reading"


def record_reprofile(
    uri: str,
    home: Path,
    champion: tuple[str, str, str],
    key: str,
    metrics: Mapping[str, float],
    document: str,
    experiment: str = "secateur-profiles",
) -> str:
    """Add a re-profile to its champion's run; once per key, however often it is called. Returns MLflow's id of the run.

    Args:
        uri: of MLflow's store.
        home: SECATEUR_HOME, for the files of a store that has no server.
        champion: model, version, device.
        key: names the re-profile.
        metrics: numbers, each a point of its series.
        document: the whole re-profile, as JSON.

    Raises:
        TrackingError: MLflow is unreachable or refuses.
    """
    name, version, device = champion
    try:
        client = connect(uri, make=False)
        experiment_id = experiment_of(client, uri, experiment, home)
        label = f"{name}/{version}/{device}"
        likely = client.search_runs([experiment_id], equals(f"tags.`{REPROFILE_TAG}`", label))
        runs = [run for run in likely if run.data.tags[REPROFILE_TAG] == label]
        tags = {REPROFILE_TAG: label, "model": name, "version": version, "device": device}
        run = runs[0] if runs else client.create_run(experiment_id, tags=tags, run_name=f"{name} {version} on {device}")
        run_id = str(run.info.run_id)
        if run.data.tags.get(LAST_TAG) == key:
            return run_id
        history = client.get_metric_history(run_id, "regressed") if runs else []
        now_ms, step = int(time.time() * 1000), max((point.step for point in history), default=-1) + 1
        points = [Metric(metric, value, now_ms, step) for metric, value in metrics.items()]
        client.log_text(run_id, document, f"readings/{step:05d}.json")
        client.log_batch(run_id, metrics=points, tags=[RunTag(LAST_TAG, key)])
        client.set_terminated(run_id)
    except Unreachable as error:
        raise TrackingError(f"tracking server {redacted(uri)}: {first_line(error)}") from error
    return run_id


def page_of(uri: str, experiment: str, run_id: str) -> str:
    """Address of a run's page in MLflow's interface, found by Secateur's id of it; empty where no server shows it.

    Raises:
        TrackingError: MLflow is unreachable or refuses.
    """
    if not uri.startswith(("http://", "https://")):
        return ""
    try:
        client = connect(uri, make=False)
        known = client.get_experiment_by_name(experiment)
        if known is None:
            return ""
        runs = client.search_runs([known.experiment_id], f"tags.`{RUN_TAG}` = '{run_id}'", max_results=1)
    except Unreachable as error:
        raise TrackingError(f"tracking server {redacted(uri)}: {first_line(error)}") from error
    parts = urlsplit(uri)
    server = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")
    place = f"{server}/#/experiments/{known.experiment_id}"
    return f"{place}/runs/{runs[0].info.run_id}{VIEW}" if runs else f"{place}{VIEW}"
