"""What the schemas of ATen operators say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

Arguments = Mapping[str, Any]
"""Arguments of an ATen call by the names in its schema, defaults filled in."""


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Tensors among values and in their lists and tuples, in order."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


@dataclass(frozen=True, eq=False, slots=True)
class Operator:
    """What the schema of an ATen operator says.

    Args:
        name: ``relu`` for ``aten::relu_``; operators of other libraries keep their prefix (``torchvision::nms``).
        arguments: names of its arguments.
        defaults: the same names, with their default values or None.
        is_pointwise: whether PyTorch tags it as elementwise.
        is_view: whether its output shares memory with its input and is not written by it.
        allocates: whether its outputs are new memory, neither views nor in-place results.
        writes: whether its output is its input, written anew.
    """

    name: str
    arguments: tuple[str, ...]
    defaults: Arguments
    is_pointwise: bool
    is_view: bool
    allocates: bool
    writes: bool

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        """Arguments of a call by name, defaults filled in."""
        return {**self.defaults, **dict(zip(self.arguments, args, strict=False)), **kwargs}


@cache
def operator_of(func: Any) -> Operator:
    schema = func._schema
    name = str(schema.name).removeprefix("aten::")
    name = name if name.endswith("__") else name.removesuffix("_")
    defaults = {a.name: a.default_value if a.has_default_value() else None for a in schema.arguments}
    alias = schema.returns[0].alias_info if schema.returns else None
    return Operator(
        name,
        tuple(defaults),
        defaults,
        is_pointwise=torch.Tag.pointwise in func.tags,
        is_view=alias is not None and not alias.is_write,
        allocates=bool(schema.returns) and alias is None and name != "_unsafe_view",
        writes=alias is not None and alias.is_write,
    )
