"""The worker's user in MLflow: made if it is not there, and given the password that the worker has.

It is no administrator. It may read every registered model, because MLflow tells only who may read one whether there is
one of a name; and whoever makes an experiment or a registered model may manage that one. Standard library only.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping

TIMEOUT_S = 60.0
GRANT = {"resource_type": "registered_model", "resource_id": "*", "permission": "READ"}


def ensure(environment: Mapping[str, str]) -> str:
    """Make the user, or set its password; returns what was done.

    Args:
        environment: MLFLOW_URL; MLFLOW_ADMIN and WORKER, each ``NAME:PASSWORD``.

    Raises:
        OSError: MLflow does not answer, or refuses.
    """
    entry = base64.b64encode(environment["MLFLOW_ADMIN"].encode()).decode()
    name, _, password = environment["WORKER"].partition(":")
    user = {"username": name, "password": password}

    def ask(method: str, path: str, content: Mapping[str, str]) -> bool:
        """Whether MLflow did it; otherwise it was so already."""
        request = urllib.request.Request(
            f"{environment['MLFLOW_URL']}/api/{path}",
            json.dumps(content).encode(),
            {"Authorization": f"Basic {entry}", "Content-Type": "application/json"},
            method=method,
        )
        try:
            urllib.request.urlopen(request, timeout=TIMEOUT_S).close()
        except urllib.error.HTTPError as error:
            if b"RESOURCE_ALREADY_EXISTS" not in error.read():
                raise
            return False
        return True

    made = ask("POST", "2.0/mlflow/users/create", user)
    if not made:
        ask("PATCH", "2.0/mlflow/users/update-password", user)
    ask("POST", "3.0/mlflow/users/permissions/grant", {"username": name, **GRANT})
    return f"{name} was made" if made else f"{name} is there; its password was set"


if __name__ == "__main__":
    try:
        print(ensure(os.environ))
    except OSError as error:
        sys.exit(f"MLflow's user for the worker could not be made: {error}")
