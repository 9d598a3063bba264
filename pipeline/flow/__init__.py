"""Prefect: flows, schedules and workers. The only package that imports prefect, and not before it is set up."""

from secateur.pipeline.flow.compress import UndeliveredError, execute
from secateur.pipeline.flow.device_lease import lease_of, limit_name
from secateur.pipeline.flow.environment import runtime_env
from secateur.pipeline.flow.logs import logged

__all__ = ["UndeliveredError", "execute", "lease_of", "limit_name", "logged", "runtime_env"]
