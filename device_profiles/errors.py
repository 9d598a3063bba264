"""The one error of this package."""

from __future__ import annotations


class DeviceError(RuntimeError):
    """A device cannot be described, reached or measured.

    Args:
        message: what happened and what to do about it.
        code: short name of the cause (``busy``, ``timeout``, ``model-load``, ``profile``...), for programs.
    """

    def __init__(self, message: str, code: str = "device") -> None:
        super().__init__(message)
        self.code = code
