"""The image's health check: can what runs here keep what it finds, and do its own servers answer? Exit code 0 or 1.

That the process is alive the engine knows itself. A run that can no longer write its journal is of no use; a tracking
server that is unreachable does not matter, as candidates are delivered later. A worker has a health server of its own,
which is named in SECATEUR_HEALTH_URLS. Standard library only: it is started every half minute.
"""

from __future__ import annotations

import os
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping

TIMEOUT_S = 5.0
PROBE_BYTES = 65_536


def faults(environment: Mapping[str, str]) -> list[str]:
    """What is wrong; empty = healthy.

    Args:
        environment: SECATEUR_HOME, and SECATEUR_HEALTH_URLS: addresses separated by spaces that must answer 200.
    """
    found = []
    home = environment.get("SECATEUR_HOME", ".secateur")
    try:
        with tempfile.TemporaryFile(dir=home) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        found.append(f"cannot write in {home}: {error.strerror}; see that its volume is mounted, ours, and has space")
    for url in environment.get("SECATEUR_HEALTH_URLS", "").split():
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
                if answer.status != 200:
                    found.append(f"{url} answers {answer.status}")
        except (urllib.error.URLError, OSError, ValueError) as error:
            found.append(f"{url} does not answer: {error}")
    return found


if __name__ == "__main__":
    wrong = faults(os.environ)
    print("; ".join(wrong) or "healthy")
    sys.exit(bool(wrong))
