"""The base of what watches a network run, operator by operator.

PyTorch wraps ``__torch_dispatch__`` of every mode so that ``torch.compile`` leaves it alone, and imports the whole
compiler at the first call: three CPU-seconds. Where the compiler was never imported nothing can be compiled, so the
method is called as it is.
"""

from __future__ import annotations

import sys
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that does not import the compiler."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        plain = cls.__dict__.get("__torch_dispatch__")
        super().__init_subclass__(**kwargs)  # type: ignore[no-untyped-call]
        if plain is None:
            return
        left_alone: Any = cls.__torch_dispatch__

        def dispatch(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            method = left_alone if "torch._dynamo" in sys.modules else plain
            return method(self, func, types, args, kwargs)

        cls.__torch_dispatch__ = dispatch  # type: ignore[method-assign]
