"""What the deployed flows are told, with schemas that Prefect's interface and API check before a run begins."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from secateur.pipeline.config.schema import has_password
from secateur.pipeline.lifecycle.reprofile import Tolerances


class Parameters(BaseModel):
    """Refuses what it does not know."""

    model_config = ConfigDict(extra="forbid")
    trusted: list[list[str]] = Field(
        default_factory=list,
        description="What names code and may run, as `secateur deploy` found it with consent; to change it, deploy.",
    )


class Compress(Parameters):
    """A run: from the baseline to the registered, device-timed compact model."""

    file: str = Field(min_length=1, description="The run file (YAML), absolute or relative to the working directory.")
    overrides: list[str] = Field(
        default_factory=list, description="Values of the run file to override: section.key=value, as with --set."
    )


class Registered(Parameters):
    """Which registered models are meant, and where they are."""

    names: list[str] = Field(default_factory=list, description="Registered models; none = all.")
    device: str | None = Field(None, description="Only this device; none = every device that has one.")
    tracking: str | None = Field(
        None,
        pattern=r"^[a-z0-9+]+://[^:@/]*(?:$|/|:\d+(?:/|$)|@)",
        description="MLflow's address, without a password (that belongs into SECATEUR_TRACKING_URI or "
        "MLFLOW_TRACKING_PASSWORD of the worker); none = SECATEUR_TRACKING_URI, else the store in SECATEUR_HOME.",
    )

    @field_validator("tracking")
    @classmethod
    def _without_credentials(cls, uri: str | None) -> str | None:
        if uri is not None and has_password(uri):
            raise ValueError(
                "holds a password or a token; set MLFLOW_TRACKING_TOKEN, or _USERNAME and _PASSWORD, instead"
            )
        return uri

    device_profiles: list[str] = Field(
        default_factory=list, description="Files of device profiles that are neither installed nor in SECATEUR_HOME."
    )


class Profile(Registered):
    """Champions timed again on their devices."""

    tolerances: Tolerances = Field(Tolerances(), description="By how much a figure may grow.")
    on_regression: Literal["fail", "report"] = Field(
        "fail", description="fail = the flow run ends as Alarm (a failure, which notifies); report = it only says so."
    )


class Promote(Registered):
    """Challengers against the champions of their devices, timed in one interleaved run."""

    again: bool = Field(
        False, description="Also challengers that were refused against the very champion that still reigns."
    )
