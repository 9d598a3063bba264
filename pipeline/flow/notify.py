"""Telling people: one JSON document to a webhook when a flow fails, raises an alarm or promotes a model.

``SECATEUR_NOTIFY`` is the webhook's address, read in the process that runs the flow. It may hold a secret, so it is
never logged, kept or sent anywhere.
"""

from __future__ import annotations

import json
import logging
import os
import urllib.error
import urllib.request
from datetime import UTC, datetime
from typing import Any

VARIABLE = "SECATEUR_NOTIFY"
TIMEOUT_S = 10.0
ALARM, PROMOTED = "Alarm", "Promoted"
"""Names of states that a flow ends in, beside Prefect's own."""

logger = logging.getLogger("prefect.secateur")


def tell(flow: Any, flow_run: Any, state: Any) -> None:
    """Prefect's hook at the end of a flow run: says what people should know, and nothing of what they need not."""
    event = event_of(state)
    if event is None:
        return
    message = {
        "event": event,
        "flow": flow.name,
        "flow_run": flow_run.name,
        "flow_run_id": str(flow_run.id),
        "state": state.name,
        "message": state.message or "",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    send(message)


def event_of(state: Any) -> str | None:
    """What an end of a flow run means to people; None = they need not know."""
    if state.name == ALARM:
        return "alarm"
    if state.name == PROMOTED:
        return "promotion"
    return "failure" if state.is_failed() or state.is_crashed() else None


def send(message: dict[str, Any]) -> bool:
    """POST a message to the webhook; whether it was taken. A webhook that is unreachable stops nothing."""
    address = os.environ.get(VARIABLE, "")
    if not address:
        return False
    if not address.startswith(("https://", "http://")):
        logger.warning("%s is no http(s) address: nobody was told of the %s", VARIABLE, message["event"])
        return False
    body = json.dumps(message).encode()
    request = urllib.request.Request(  # noqa: S310  the scheme is checked above
        address, data=body, headers={"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
            return bool(200 <= answer.status < 300)
    except (
        OSError,
        ValueError,
    ) as error:  # an HTTPError is an OSError; neither text is logged: it may hold the address
        why = f"answers {error.code}" if isinstance(error, urllib.error.HTTPError) else "does not answer"
        logger.warning("the webhook of %s %s: nobody was told of the %s", VARIABLE, why, message["event"])
        return False
