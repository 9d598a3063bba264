"""Prefect: flows, schedules and workers. The only package that imports prefect, and not before it is set up."""

from pipeline.flow.compress import UndeliveredError, execute
from pipeline.flow.device_lease import lease_of, limit_name
from pipeline.flow.environment import runtime_env

__all__ = ["UndeliveredError", "execute", "lease_of", "limit_name", "runtime_env"]
