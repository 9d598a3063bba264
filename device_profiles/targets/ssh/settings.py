"""``connect`` of a device reached over SSH."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

DEFAULT_FOLDER = "~/.cache/secateur"
DEFAULT_PYTHON = ("python3",)


class Settings(BaseModel):
    """``connect`` of a device reached over SSH. Whatever is not set comes from the user's SSH configuration.

    Args:
        host: name, address or an alias of the SSH configuration.
        port: default 22.
        user: default: the local user's name.
        python: the device's Python: one program, or a list of a program and its arguments. ``~/`` is the home there.
        folder: where the agent and the models are kept on the device; relative to the home there.
        known_hosts: file of the host keys that are trusted.
        identity: file of the private key to log in with; an agent's keys are tried as well.
        config: SSH configuration to use instead of ``~/.ssh/config``.
        keepalive_s: seconds without a sign of the device before it is asked for one; after four times as long the link
            counts as dead.
        connect_timeout_s: seconds to connect and log in, for each hop.
        busy_wait_s: seconds to wait while another process measures on the device.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(min_length=1)
    port: int | None = Field(default=None, ge=1, le=65535)
    user: str | None = Field(default=None, min_length=1)
    python: tuple[str, ...] = Field(default=DEFAULT_PYTHON, min_length=1)
    folder: str = Field(default=DEFAULT_FOLDER, min_length=1)
    known_hosts: Path | None = None
    identity: Path | None = None
    config: Path | None = None
    keepalive_s: float = Field(default=5.0, gt=0)
    connect_timeout_s: float = Field(default=20.0, gt=0)
    busy_wait_s: float = Field(default=120.0, ge=0)

    @field_validator("python", mode="before")
    @classmethod
    def _one_program(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("python", "folder")
    @classmethod
    def _printable(cls, value: Any) -> Any:
        words = (value,) if isinstance(value, str) else value
        if not all(word.isprintable() and word for word in words):
            raise ValueError("must not be empty or contain line breaks and other control characters")
        return value
