"""Prefect: flows, schedules and workers. The only package that imports prefect, and not before it is set up."""

from secateur.pipeline.flow.compress import UndeliveredError, execute
from secateur.pipeline.flow.device_lease import lease_of, limit_name
from secateur.pipeline.flow.environment import runtime_env

__all__ = ["UndeliveredError", "execute", "lease_of", "limit_name", "runtime_env"]
