"""Random passwords for compose.yaml, into ``secrets/``; files that exist are left alone.

    python3 docker/make_secrets.py [FOLDER]

The folder is closed to others; the files in it can be read, because a container's user has another number than you.
"""

from __future__ import annotations

import re
import secrets
import sys
from pathlib import Path

FILES = {
    "postgres_password": "{postgres}\n",  # the superuser's: nobody but PostgreSQL is given it
    "postgres_mlflow": "{postgres_mlflow}\n",
    "postgres_prefect": "{postgres_prefect}\n",
    "mlflow.env": "MLFLOW_BACKEND_STORE_URI=postgresql+psycopg2://mlflow:{postgres_mlflow}@postgres:5432/mlflow\n"
    "MLFLOW_FLASK_SERVER_SECRET_KEY={cookies}\n",
    "mlflow_auth.ini": "[mlflow]\n"
    "default_permission = NO_PERMISSIONS\n"
    "database_uri = postgresql+psycopg2://mlflow:{postgres_mlflow}@postgres:5432/mlflow_auth\n"
    "admin_username = secateur\n"
    "admin_password = {mlflow}\n"
    "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n",
    "prefect.env": "PREFECT_SERVER_DATABASE_CONNECTION_URL="
    "postgresql+asyncpg://prefect:{postgres_prefect}@postgres:5432/prefect\n"
    "PREFECT_SERVER_API_AUTH_STRING=secateur:{prefect}\n",
    "accounts.env": "MLFLOW_ADMIN=secateur:{mlflow}\nWORKER=worker:{worker}\n",
    "worker.env": "MLFLOW_TRACKING_USERNAME=worker\n"
    "MLFLOW_TRACKING_PASSWORD={worker}\n"
    "PREFECT_API_AUTH_STRING=secateur:{prefect}\n",
}


def make(folder: Path) -> list[str]:
    """Write the files; returns their names.

    Raises:
        FileExistsError: some exist, but not all: their passwords would not fit together.
    """
    there = [name for name in FILES if (folder / name).exists()]
    if there:
        if len(there) < len(FILES):
            raise FileExistsError(
                f"{folder} holds only {', '.join(there)}; remove the folder, or bring the others back"
            )
        return []
    names = {name for text in FILES.values() for name in re.findall(r"{(\w+)}", text)}
    passwords = {name: secrets.token_urlsafe(24) for name in names}
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    for name, text in FILES.items():
        (folder / name).write_text(text.format(**passwords), encoding="utf-8")
    return list(FILES)


if __name__ == "__main__":
    place = Path(sys.argv[1] if len(sys.argv) > 1 else "secrets")
    try:
        made = make(place)
    except OSError as error:
        sys.exit(str(error))
    print(f"made in {place}: {', '.join(made)}" if made else f"{place} is complete already")
