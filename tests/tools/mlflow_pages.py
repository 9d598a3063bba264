"""Screenshots of a run's pages in MLflow, for the documentation.

    python -m tests.tools.mlflow_pages SECATEUR_HOME docs/images [NAME...]

Needs Playwright and a Chromium (``.parts/chromium/chromium``, or one in PATH). The store is copied, and a server on the
copy shows: the runs of the experiment, the newest run, its candidates as parallel coordinates, and the newest version.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
import tempfile
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from secateur.pipeline.tracking.reprofiles import VIEW
from tests.servers import mlflow_server, running

WIDTH, HEIGHT = 1400, 900
SETTLE_MS = 20_000
"""How long a page has to ask its server and to draw: its network is never idle."""
ASSISTANT = json.dumps(
    [["mlflow.assistant.panelOpen_v1", "false"], ["mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true"]]
)
"""What MLflow keeps in a browser so that its assistant stays closed."""
CLICKED = {"mlflow-runs": ".ag-row [role=button], .ag-row button"}
"""What is clicked on a page before it is taken: the first of these; there, what shows a run's candidates."""
ROOT = Path(__file__).parents[2]


def chromium() -> str:
    """The browser's program.

    Raises:
        SystemExit: there is none.
    """
    own = ROOT / ".parts/chromium/chromium"
    found = str(own) if own.is_file() else shutil.which("chromium")
    if found is None:
        sys.exit("no Chromium: `make parts` brings one")
    return found


def pages(client: MlflowClient, experiment: str) -> dict[str, str]:
    """Name of a picture -> the page's address on a server, without the server."""
    known = client.get_experiment_by_name(experiment)
    assert known is not None
    runs = client.search_runs([known.experiment_id], "tags.`secateur.run_id` LIKE '%'", order_by=["start_time DESC"])
    place, run = f"#/experiments/{known.experiment_id}", runs[0].info.run_id
    (model,) = [m for m in client.search_registered_models() if m.aliases]
    version = max(int(v.version) for v in client.search_model_versions(f"name = '{model.name}'"))
    children = client.search_runs([known.experiment_id], f"tags.`mlflow.parentRunId` = '{run}'", max_results=1000)
    searched = [one for one in children if one.data.tags["candidate.stage"] == "search"]
    best = sorted(searched, key=lambda one: -one.data.metrics.get("reward", 0.0))[:20]
    compared = json.dumps([one.info.run_id for one in best], separators=(",", ":"))
    told = json.dumps([known.experiment_id], separators=(",", ":"))
    return {
        "mlflow-runs": f"{place}/runs{VIEW}",
        "mlflow-run": f"{place}/runs/{run}{VIEW}",
        "mlflow-candidates": f"#/compare-runs?runs={compared}&experiments={told}&{VIEW[1:]}",
        "mlflow-version": f"#/models/{model.name}/versions/{version}{VIEW}",
    }


def picture(browser: Any, address: str, file: Path, click: str = "") -> None:
    """A page as a picture.

    Args:
        click: a selector of what is clicked before; empty = nothing.
    """
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    page.set_default_timeout(120_000)
    page.add_init_script(f"for (const [key, value] of {ASSISTANT}) localStorage.setItem(key, value)")
    page.goto(address)
    page.wait_for_timeout(SETTLE_MS)
    if click:
        page.locator(click).first.click()
        page.wait_for_timeout(SETTLE_MS)
    page.screenshot(path=str(file))
    page.close()


def main(home: Path, to: Path, *names: str) -> None:
    """Write pictures into a folder: those that are named, or all."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder:
        with sqlite3.connect(home / "mlflow.db") as store, sqlite3.connect(Path(folder) / "mlflow.db") as copy:
            store.backup(copy)
        client = MlflowClient(f"sqlite:///{folder}/mlflow.db", f"sqlite:///{folder}/mlflow.db")
        shown = pages(client, "secateur")
        with running(mlflow_server(Path(folder))) as server, sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
            for name, place in shown.items():
                if names and name not in names:
                    continue
                picture(browser, f"{server.url}/{place}", to / f"{name}.png", CLICKED.get(name, ""))
                sys.stdout.write(f"{to / name}.png\n")
            browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
