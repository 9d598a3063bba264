"""One run of a foreign model with a label on every channel, and what it shows."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields, is_dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from secateur.pruning.lines import running_line
from secateur.pruning.modes import Watcher
from secateur.pruning.plan import IntArray
from secateur.pruning.rules import (
    Factor,
    Labels,
    Propagation,
    Rule,
    TensorMap,
    macs_of,
    operator_of,
    propagation,
    tensors_in,
    written_by,
)
from secateur.pruning.shapes_only import NeedsValuesError, ShapesOnly
from secateur.pruning.snapshot import Remade, Snapshot

OPAQUE = (nn.RNNBase, nn.RNNCellBase)
"""Modules that check tensor sizes against their constructor's: their own tensors are frozen."""

SIZED = {"layer_norm", "rms_norm", "group_norm"} | {f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)}
"""Torch functions that are told numbers of channels or groups ..."""

KNOWS_ITS_SIZE = (_ConvNd, _NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
"""... and the modules that surgery tells the new ones."""

CallKey = tuple[str, str, int]
"""Running module, torch function, how many times the module called it before."""


class PruningError(ValueError):
    """A model cannot be traced, pruned, saved or loaded; the message says what was expected and what came."""


def named_tensors(value: Any, path: str = "", above: tuple[int, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """Tensors in nested lists, tuples, mappings and plain objects, with their paths (``[0]['boxes']``).

    ``above`` holds the ids of the containers around ``value``, so that cycles end.
    """
    if id(value) in above:
        return
    above = (*above, id(value))
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from named_tensors(item, f"{path}[{key!r}]", above)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from named_tensors(item, f"{path}[{i}]", above)
    elif is_dataclass(value) and not isinstance(value, type):
        for item in fields(value):
            yield from named_tensors(getattr(value, item.name), f"{path}.{item.name}", above)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        for key, item in vars(value).items():
            yield from named_tensors(item, f"{path}.{key}", above)


def tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters and buffers by their first name, and the further names of tied ones -> the first."""
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    modules = [(f"{path}." if path else "", m) for path, m in model.named_modules(remove_duplicate=False)]
    parameters = ((path + name, p) for path, module in modules for name, p in module._parameters.items())
    buffers = ((path + name, b) for path, module in modules for name, b in module._buffers.items())
    for name, tensor in chain(parameters, buffers):
        if tensor is None:
            continue
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor
    return tensors, aliases


def batch_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Images in the inputs of a forward: the length of a list of images, else the first tensor's first dimension."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, (list, tuple)) and value:
            return len(value)
        if isinstance(value, Tensor) and value.ndim > 0:
            return max(1, value.shape[0])
    return 1


class _Composed(TorchFunctionMode):
    """Lets every torch function through; while any such mode is on, attention takes no fused shortcut of a module."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


ALONE = threading.RLock()
"""Held while a model's modes, its state and torch's random state are not those of its owner."""


@contextmanager
def undisturbed(
    model: nn.Module, *, training: bool = False, before: Snapshot | None = None, watched: bool = False
) -> Iterator[Snapshot]:
    """Eval (or training) mode without gradients; what the model holds and torch's random state are put back afterwards.

    ``nn.MultiheadAttention`` runs as a composition of operators meanwhile, not as one fused operator. One thread at a
    time is in here: the others wait.

    Args:
        before: what is put back: what the model held at a time since when it was only run in here, or, for a copy that
            nobody needs afterwards, what the model it was copied from held. None = what the model holds now.
        watched: whether a ``TorchFunctionMode`` of the caller's is on while the model runs.

    Yields:
        what is put back.
    """
    parameters = (p for module in model.modules() for p in module._parameters.values() if p is not None)
    devices = {p.device for p in parameters if p.is_cuda}
    with ALONE, torch.random.fork_rng([d.index for d in devices]), torch.no_grad():
        snapshot = Snapshot(model) if before is None else before
        for module in model.modules():
            if module.training != training:
                module.training = training
        try:
            with nullcontext() if watched else _Composed():  # not around the snapshot, thousands of small calls
                yield snapshot
        finally:
            snapshot.restore()


class Entered:
    """The stack of running modules, and the last one entered."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.names = {module: name for name, module in self.modules.items()}
        self.stack = [""]
        self.last = ""
        self.last_type = type(model).__name__

    @property
    def running(self) -> nn.Module:
        return self.modules[self.stack[-1]]

    def forget(self) -> None:
        """Let go of the model."""
        self.modules.clear()
        self.names.clear()


@contextmanager
def modules_entered(model: nn.Module) -> Iterator[Entered]:
    """Follow which module of the model is running."""
    entered = Entered(model)
    thread = threading.get_ident()

    def enter(module: nn.Module, _: object) -> None:
        if threading.get_ident() != thread:  # the hooks are torch's: they see the modules of every thread
            return
        name = entered.names.get(module)
        if name is not None:
            entered.last, entered.last_type = name, type(module).__name__
        entered.stack.append(entered.stack[-1] if name is None else name)

    def leave(_: nn.Module, __: object, ___: object) -> None:
        if threading.get_ident() == thread:
            entered.stack.pop()

    handles = [
        nn_module.register_module_forward_pre_hook(enter),
        nn_module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield entered
    finally:
        for handle in handles:
            handle.remove()


@dataclass(eq=False, slots=True)
class Call:
    """What one call of a torch function gave: per tensor its labels, shape, type and device."""

    outputs: list[tuple[Labels, tuple[int, ...], torch.dtype, torch.device]]


class Calls:
    """Numbers the calls of torch functions, so that two runs of a model can be compared call by call."""

    def __init__(self, entered: Entered) -> None:
        self.entered = entered
        self.counts: dict[tuple[str, str], int] = defaultdict(int)

    def key(self, function: str) -> CallKey:
        where = self.entered.stack[-1]
        self.counts[where, function] += 1
        return where, function, self.counts[where, function]


LEAVING = frozenset(("numpy", "tolist", "item", "__array__", "__float__", "__int__", "__index__", "__dlpack__"))
"""Torch functions that give values to Python, where labels do not go."""


class Told(TorchFunctionMode):
    """Tells the rules which torch function runs, and which size of a view the code leaves open."""

    def __init__(self, labels: Propagation) -> None:
        super().__init__()
        self.labels = labels

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.labels.enter(func.__name__, args)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.labels.enter("", ())


class _Functions(Told):
    """Keeps what each torch function gave, and tells the rules what the code asked for."""

    def __init__(self, tracer: Tracer, entered: Entered) -> None:
        super().__init__(tracer.labels)
        self.tracer = tracer
        self.calls = Calls(entered)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        labels = self.labels
        if name in LEAVING and labels.leave(args[0], running_line()) and not self.tracer.values:
            raise NeedsValuesError(name)
        if name == "__get__":
            if func.__self__ is torch.Tensor.shape:
                self._reads_sizes(args[0])
            return func(*args, **(kwargs or {}))
        if name == "size":
            self._reads_sizes(*args)
        key = self.calls.key(name)
        out = super().__torch_function__(func, types, args, kwargs)
        if name == "instance_norm" and (channels := labels.of(args[0])[1]) is not None:
            self.tracer.norms[key[0]] = channels
        if name in SIZED and not isinstance(self.calls.entered.running, KNOWS_ITS_SIZE):
            for dim in (dim for t in tensors_in([out]) for dim in labels.of(t)):
                labels.state(dim)
        tensors = tensors_in((args[0] if name == "__setitem__" else out,))
        if self.tracer.recording and tensors:
            outputs = [(labels.of(t), tuple(t.shape), t.dtype, t.device) for t in tensors]
            self.tracer.calls[key] = call = Call(outputs)
            if call.outputs and not any(map(labels.is_labelled, tensors)):
                for i, tensor in enumerate(tensors):
                    self.tracer.made_by[tensor] = (call, i)
        return out

    def _reads_sizes(self, tensor: Tensor, *dims: int) -> None:
        """The model's own code asks for a number of channels, and may have written down which one it expects."""
        labels = self.labels
        asked = [labels.of(tensor)[d] for d in dims] if dims else labels.of(tensor)
        running = type(self.calls.entered.running)
        if not running.__module__.startswith("torch.nn."):
            for dim in asked:
                labels.state(dim)


class Tracer(Watcher):
    """Runs a model with labels and keeps what the run shows.

    Args:
        rules: rules of the user, by operator name.
        values: compute everything; otherwise operators may give zeros, which most models never notice.
        before: what the model holds, if that is known; the caller lets no other thread run it meanwhile.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Mapping[str, Rule] | None = None,
        *,
        values: bool = True,
        before: Snapshot | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        for path, module in model.named_modules():
            tensors = (*module._parameters.values(), *module._buffers.values())
            if any(isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)) for tensor in tensors):
                raise PruningError(
                    f"{path or 'the model itself'} ({type(module).__name__}) has no sizes before it has seen an input; "
                    "run the model once on the example, then trace it"
                )
        self.rules, self.values, self.shapes, self.before = rules, values, ShapesOnly(), before
        self.labels = propagation(rules)
        self.tensors, self.aliases = tensors_of(model)
        self.parameters = {name for name, tensor in self.tensors.items() if isinstance(tensor, nn.Parameter)}
        self.places = [
            (name, d, labels)
            for name, tensor in self.tensors.items()
            for d, labels in enumerate(self.labels.register(name, tensor))
            if labels is not None
        ]
        self.dims: list[IntArray] = [labels for _, _, labels in self.places]
        self.dim_ids = {id(labels): i for i, labels in enumerate(self.dims)}
        self.macs: list[tuple[int, list[int], str | None]] = []
        self.bytes: list[tuple[int, list[int]]] = []
        self.calls: dict[CallKey, Call] = {}
        self.norms: dict[str, IntArray] = {}
        """Norms without tensors that were told a number of features, and the labels of the channels they see."""
        self._allocated: TensorMap[int] = TensorMap()
        self.made_by: TensorMap[tuple[Call, int]] = TensorMap()
        """Calls that made tensors without labels, which may get some later."""
        self.recording = True
        self.remade: tuple[Remade, ...] = ()
        """What the forward makes besides its outputs: caches, features that are kept."""
        self.entered = Entered(model)

    def run(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Run the model once; what reaches its outputs is frozen.

        Raises:
            PruningError: the forward fails; says in which module and with which shapes.
            NeedsValuesError: it looks at values that were not computed.
        """
        for path, module in self.entered.modules.items():
            if isinstance(module, OPAQUE):
                self._opaque(path, module)
        self._forward(args, kwargs)
        if not self.parameters <= self.labels.used.keys():
            self.recording = False  # auxiliary heads run in training only; they must be cut all the same
            with suppress(PruningError, NeedsValuesError):
                self._forward(args, kwargs, training=True)
        for unread in self.labels.unread:
            for dim in unread.labels:
                self.labels.freeze(dim, f"{unread.here} gives an empty tensor, so that nothing after it was seen")
        self._freeze_unused()
        for path, module in self.entered.modules.items():
            if isinstance(module, nn.MultiheadAttention):
                self._attention(path, module)

    def _forward(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, training: bool = False) -> None:
        quiet = undisturbed(self.model, training=training, before=self.before, watched=True)
        with quiet as before, modules_entered(self.model) as entered:
            self.entered = entered
            try:
                with _Functions(self, entered), self:
                    outputs = self.model(*args, **kwargs)
                if not training:
                    self.remade = before.remade(self.labels.is_labelled)
            except NeedsValuesError:
                raise
            except Exception as error:
                shapes = ", ".join(f"{path} {tuple(t.shape)}" for path, t in named_tensors((args, dict(kwargs))))
                raise PruningError(
                    f"the model fails on the example input, in module {entered.last!r} "
                    f"({entered.last_type}), given {shapes or 'no tensor'}: {type(error).__name__}: {error}"
                ) from error
        for path, tensor in named_tensors(outputs):
            for dim in self.labels.of(tensor):
                self.labels.freeze(dim, f"reaches the model's output{path}")

    def _freeze_unused(self) -> None:
        for name, dim, unused in self.places:
            if name not in self.labels.used:
                self.labels.freeze(unused, "never used on the example input" if dim == 0 else "")

    def _opaque(self, path: str, module: nn.Module) -> None:
        for parameter in module.parameters():
            for labels in self.labels.of(parameter):
                self.labels.freeze(labels, f"{type(module).__name__} {path} takes its sizes from its constructor")

    def _attention(self, path: str, module: nn.MultiheadAttention) -> None:
        """Heads together are as wide as the input, because the module has one ``embed_dim`` for both."""
        if module.in_proj_weight is None or module.bias_k is not None:
            self._opaque(path, module)
            return
        inputs, heads = self.labels.of(module.in_proj_weight)[1], self.labels.of(module.out_proj.weight)[1]
        self.labels.tie(inputs, heads)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {})) if self.values else self.shapes.answer(func, args, kwargs or {})
        self.labels.where = self.entered.stack[-1]
        arguments = self.labels.call(func, args, kwargs or {}, out)
        if not self.recording:
            return out
        operator = operator_of(func)
        for product in macs_of(operator, arguments, out):
            layer = next((s for t, _ in product if (s := self.labels.source(t)) is not None), None)
            self.macs.append((*self.product(product), layer))
        for tensor in written_by(operator, out):
            self._allocated[tensor] = len(self.bytes)
            self.bytes.append(self._bytes(tensor))
        while self.labels.relabelled:
            tensor = self.labels.relabelled.pop()
            if (place := self._allocated.get(tensor)) is not None:
                self.bytes[place] = self._bytes(tensor)
            if (made := self.made_by.get(tensor)) is not None:
                call, i = made
                call.outputs[i] = (self.labels.of(tensor), *call.outputs[i][1:])
        return out

    def _bytes(self, tensor: Tensor) -> tuple[int, list[int]]:
        scale, factors = self.product([(tensor, d) for d in range(tensor.ndim)])
        return scale * tensor.element_size(), factors

    def product(self, factors: list[Factor]) -> tuple[int, list[int]]:
        """Constant factor and the labelled dimensions (positions in ``dims``) of a product of lengths."""
        scale, labelled = 1, []
        last: Tensor | None = None
        dims: Labels = ()
        for tensor, d in factors:
            if tensor is not last:
                last, dims = tensor, self.labels.of(tensor)
            labels = dims[d]
            if labels is None:
                scale *= tensor.shape[d]
            else:
                labelled.append(self.dim_id(labels))
        return scale, labelled

    def dim_id(self, labels: IntArray) -> int:
        """Position of a dimension in ``dims``, where it is put if it is new."""
        place = self.dim_ids.get(id(labels))
        if place is None:
            place = self.dim_ids[id(labels)] = len(self.dims)
            self.dims.append(labels)
        return place
