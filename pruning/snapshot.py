"""Everything that a forward pass may change in a model: kept, put back, and left out of smaller copies.

A forward may store what is no parameter and no buffer: a cache made on the first call, features in a dict or a list, by
itself or by a hook, a buffer that is assigned anew, a layer made when the first input is seen. ``Snapshot`` keeps which
objects every module, container and plain object within reach holds, which is a list of references and no copy of
weights; only buffers and tensors that are not registered are copied, because a forward writes into them. ``Remade``
says which attributes a forward makes, so that those of the dense size do not reach a pruned network.
"""

from __future__ import annotations

import functools
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

ATOMS = frozenset((bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size))
"""Types of values that hold nothing that changes."""

CONTAINERS = (dict, list, tuple, set, frozenset, deque)

MISSING = "no such attribute"
"""Stands for the value of an attribute that does not exist."""

REGISTERS = frozenset(vars(nn.Module()))
"""Attributes that every module has: registers of parameters, buffers, modules and hooks, and the mode."""

HOOKS = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, dict) and "hooks" in name)
"""Of these the registers of hooks, most of them empty."""

Root = tuple[str, str]
"""Path of a module, and the attribute through which something is reached; no attribute = the module's own ones."""


SHARED = "(shared)"
"""In place of the attribute: what the instances of a class have in common."""


ALREADY = REGISTERS | {"", SHARED}
"""What is no attribute of a module's own."""


@dataclass(frozen=True, eq=False)
class Remade:
    """An attribute or buffer that a forward makes anew where it is not there.

    Args:
        module: path of the module.
        name: the attribute.
        before: its value before the forward.
    """

    module: str
    name: str
    before: Any

    @property
    def path(self) -> str:
        """What a state dict calls it, if it is a buffer."""
        return _step(self.module, self.name)


def reachable(model: nn.Module, *, functions: bool = True) -> Iterator[tuple[Root, str, Any]]:
    """Modules, containers, plain objects, classes and tensors that a forward can reach, each once.

    Args:
        functions: also what hooks and methods reach: variables they close over, and global containers they name.

    Yields:
        the attribute through which a thing was reached, its path in full, and the thing.
    """
    seen: dict[int, Any] = {}
    paths = {id(module): path for path, module in model.named_modules()}
    todo: list[tuple[Root, str, Any, bool]] = [(("", ""), "", model, functions)]
    while todo:
        root, path, value, follow = todo.pop()
        if type(value) in ATOMS or id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            module = paths.get(id(value))
            root = root if module is None else (module, "")
            for name, item in vars(value).items():
                if type(item) in ATOMS or (name in HOOKS and not item):
                    continue
                below = path if name in ("_parameters", "_buffers", "_modules") else _step(path, name)
                todo.append((root if module is None else (module, name), below, item, follow))
            todo += [
                ((root[0], SHARED), path, kind, True)
                for kind in (type(value).__mro__ if follow else ())
                if id(kind) not in seen
            ]
        elif isinstance(value, CONTAINERS):
            items: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else enumerate(value)
            named = root[1] in ("_parameters", "_buffers", "_modules")
            todo += [
                (root, _step(path, str(k)) if named else f"{path}[{k!r}]", item, follow)
                for k, item in items
                if type(item) not in ATOMS
            ]
        elif isinstance(value, type):
            if not _is_own(value):
                continue
            kinds = (Tensor, types.FunctionType, *CONTAINERS)
            own = [(name, item) for name, item in vars(value).items() if isinstance(item, kinds)]
            todo += [(root, _step(path, name), item, True) for name, item in own]
        elif isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
            todo += [(root, path, item, True) for item in _bound(value) if follow]
            todo += [(root, name, item, False) for name, item in _named_globals(value) if follow]
            continue
        elif not isinstance(value, (Tensor, torch.Generator)):
            if not hasattr(value, "__dict__") or not (_is_own(type(value)) or isinstance(value, types.SimpleNamespace)):
                continue
            todo += [(root, f"{path}.{name}", item, follow) for name, item in vars(value).items()]
        yield root, path, value


def _step(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_own(kind: type) -> bool:
    """Whether a class is somebody's own. Objects of torch's and of Python's own classes lead everywhere."""
    package = kind.__module__.partition(".")[0]
    return package not in ("torch", "builtins") and package not in sys.stdlib_module_names


def _bound(function: Any) -> list[Any]:
    """What a function closes over, a method or a partial call is bound to."""
    if isinstance(function, types.MethodType):
        return [function.__self__, function.__func__]
    if isinstance(function, functools.partial):
        return [function.func, *function.args, *function.keywords.values()]
    cells = [cell for cell in function.__closure__ or () if cell != types.CellType()]
    return [*(cell.cell_contents for cell in cells), *(function.__defaults__ or ())]


def _named_globals(function: Any) -> list[tuple[str, Any]]:
    """Global containers that a function names."""
    if not isinstance(function, types.FunctionType):
        return []
    known, names = function.__globals__, function.__code__.co_names
    return [(n, known[n]) for n in names if isinstance(known.get(n), (dict, list, set, deque))]


class Snapshot:
    """What a model holds now.

    Args:
        model: the model; what its modules, containers and objects hold is kept by reference.
    """

    def __init__(self, model: nn.Module) -> None:
        self._mappings: list[tuple[Root, dict[Any, Any], dict[Any, Any]]] = []
        self._sequences: list[tuple[Root, Any, list[Any]]] = []
        self._classes: list[tuple[type, dict[str, Any]]] = []
        self._generators: list[tuple[torch.Generator, Tensor]] = []
        self._tensors: list[tuple[Root, Tensor, Tensor, Tensor | None]] = []
        for root, _, value in reachable(model):
            if isinstance(value, Tensor):
                if _is_dense(value):
                    written = None if isinstance(value, nn.Parameter) else value.detach().clone()
                    self._tensors.append((root, value, value.detach(), written))
            elif isinstance(value, torch.Generator):
                self._generators.append((value, value.get_state()))
            elif isinstance(value, (list, set, deque)):
                self._sequences.append((root, value, list(value)))
            elif isinstance(value, type):
                self._classes.append((value, dict(vars(value))))
            elif not isinstance(value, (tuple, frozenset)):
                mapping = value if isinstance(value, dict) else vars(value)
                kind: Any = OrderedDict if isinstance(mapping, OrderedDict) else dict  # past what a subclass overrides
                self._mappings.append((root, mapping, dict(kind.items(mapping))))

    def restore(self) -> None:
        """Put everything back that has changed."""
        for _, mapping, before in self._mappings:
            if not _same_mapping(mapping, before):
                kind = OrderedDict if isinstance(mapping, OrderedDict) else dict
                kind.clear(mapping)
                for key, item in before.items():
                    kind.__setitem__(mapping, key, item)
        for _, sequence, items in self._sequences:
            if not _same(sequence, items):
                sequence.clear()
                (sequence.update if isinstance(sequence, set) else sequence.extend)(items)
        for owner, before in self._classes:
            now = vars(owner)
            for name in now.keys() - before.keys():
                delattr(owner, name)
            for name in [name for name, item in before.items() if now.get(name) is not item]:
                setattr(owner, name, before[name])
        for generator, state in self._generators:
            generator.set_state(state)
        for _, tensor, storage, values in self._tensors:
            if tensor.data_ptr() != storage.data_ptr() or tensor.shape != storage.shape:
                tensor.data = storage
            if values is not None and not _equal(tensor, values):  # a batch norm writes without raising the version
                tensor.detach().copy_(values)

    def remade(self, has_channels: Callable[[Tensor], bool]) -> tuple[Remade, ...]:
        """Attributes that a forward has changed since, of modules where one of these holds tensors now.

        The others of such a module belong to it: the flag beside a cache, say. Of a buffer it counts that it is
        another tensor. What the module was made with stays, although the forward makes it anew (anchors that it
        converts to the type of its input), if there are no channels in it.

        Args:
            has_channels: whether a tensor of the forward has a dimension whose size may follow a width.
        """
        changed: dict[Root, tuple[Any, Any]] = {}
        attributes = {root[0]: (now, before) for root, now, before in self._mappings if root[1] == ""}
        for root, now, before in self._mappings:
            if root[1] in ("", "_buffers"):
                for name in dict.fromkeys((*before, *now)) if not _same_mapping(now, before) else ():
                    values = before.get(name, MISSING), now.get(name, MISSING)
                    if name not in REGISTERS and values[0] is not values[1]:
                        changed[root[0], name] = values
        nested = [(root, list(now.values()), list(before.values())) for root, now, before in self._mappings]
        for root, items, before_items in (*nested, *self._sequences):
            if root[1] not in ALREADY and root not in changed and not _same(items, before_items):
                now, before = attributes[root[0]]
                changed[root] = before.get(root[1], MISSING), now.get(root[1], MISSING)
        changed = {
            root: (before, now)
            for root, (before, now) in changed.items()
            if not _holds_tensors(before) or not _holds_tensors(now) or _holds_tensors(now, has_channels)
        }
        holding = {module for (module, _), (_, now) in changed.items() if _holds_tensors(now)}
        found = [Remade(*root, before) for root, (before, _) in changed.items() if root[0] in holding]
        kept = {id(tensor): copied for _, tensor, _, copied in self._tensors}
        return tuple(Remade(item.module, item.name, kept.get(id(item.before), item.before)) for item in found)


def forget(copied: nn.Module, model: nn.Module, remade: Iterable[Remade]) -> None:
    """Take what a forward makes out of a copy of a model that may have run: the copy's forward makes it again.

    Attributes get the values from before; containers lose what holds tensors, attributes of plain objects become None;
    a tensor that was there before the forward stays, unless the model's has another shape by now.
    """
    for item in remade:
        module = copied.get_submodule(item.module)
        now = getattr(module, item.name, MISSING)
        if isinstance(item.before, str) and item.before == MISSING:
            vars(module).pop(item.name, None)
        elif type(item.before) in ATOMS and (_holds_tensors(now) or type(now) in ATOMS):
            setattr(module, item.name, item.before)
        elif isinstance(item.before, Tensor):
            if _shape(model, item) != item.before.shape:
                setattr(module, item.name, item.before.clone())
        elif type(now) is type(item.before):
            _drop_tensors(now)


def _shape(model: nn.Module, item: Remade) -> Any:
    return getattr(getattr(model.get_submodule(item.module), item.name, None), "shape", None)


def _drop_tensors(container: Any) -> None:
    if isinstance(container, dict):
        for key in [key for key, item in container.items() if _holds_tensors(item)]:
            del container[key]
    elif not isinstance(container, (list, set, deque)):
        vars(container).update(dict.fromkeys((n for n, item in vars(container).items() if _holds_tensors(item)), None))
    else:
        kept = [item for item in container if not _holds_tensors(item)]
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(kept)


def _holds_tensors(value: Any, such: Callable[[Tensor], bool] = lambda _: True, above: tuple[int, ...] = ()) -> bool:
    """Whether a value is a tensor, or a container or object with one in it, of such a kind."""
    if isinstance(value, Tensor):
        return such(value)
    if type(value) in ATOMS or isinstance(value, nn.Module) or id(value) in above:
        return False
    items: Iterable[Any] = ()
    if isinstance(value, CONTAINERS):
        items = value.values() if isinstance(value, dict) else value
    elif hasattr(value, "__dict__") and _is_own(type(value)):
        items = vars(value).values()
    return any(_holds_tensors(item, such, (*above, id(value))) for item in items)


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has values that can be copied and compared."""
    is_made = not isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer))
    return is_made and tensor.layout is torch.strided and tensor.device.type != "meta" and not tensor.is_quantized


def _same(items: Iterable[Any], before: list[Any]) -> bool:
    items = list(items)
    return len(items) == len(before) and all(map(is_, items, before))


def _same_mapping(mapping: dict[Any, Any], before: dict[Any, Any]) -> bool:
    return _same(mapping, list(before)) and _same(mapping.values(), list(before.values()))


def _equal(tensor: Tensor, values: Tensor) -> bool:
    """Whether a tensor holds these values; not-a-number equals itself."""
    return torch.equal(tensor, values) or torch.allclose(tensor, values, rtol=0, atol=0, equal_nan=True)
