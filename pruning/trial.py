"""The tracer checks itself: prune on trial, run, and settle the sizes that the model's code states.

A rule that meets a size written in the code (``view(b, n, heads, 32)``, ``split([12, 20])``, ``x[:, :8]``) goes on as
if the size followed the width. Here the network is pruned at random widths and run beside the record of the traced run:
every call must give the shapes that the labels promise. A call that does not is answered with a tensor of the promised
shape, so that one run finds all of them. Sizes that the code reads off tensors and off modules are integers that know
where they come from, and so tell what is to be done:

1. a size that comes from the shape of a tensor: both dimensions are tied, rectangle by rectangle;
2. a size that is an attribute of a module follows the width (``ChannelGraph.followed``);
3. anything else is a number written in the code: what it touches is frozen, with the line.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.pruning.channels import Assembly, ChannelGraph, Followed, assemble, layer_of
from secateur.pruning.comparisons import Comparison, comparisons_noted, note_comparisons, turning_plan
from secateur.pruning.lines import line_of, running_line
from secateur.pruning.plan import ChannelGroup, IntArray, PruningPlan
from secateur.pruning.reference import Arithmetic, Numbers, Scales, run_masked
from secateur.pruning.rules import MAKES, Dim, Labels, TensorMap, tensors_in
from secateur.pruning.shapes_only import NeedsValuesError, NoArithmetic
from secateur.pruning.surgery import compare_outputs, kept_shape, prune, rebuild
from secateur.pruning.tracer import (
    Call,
    Calls,
    Entered,
    Tracer,
    batch_size,
    modules_entered,
    tensors_of,
    undisturbed,
)

ROUNDS = 16
"""Trials before everything that is still in doubt is frozen; networks seen so far need at most six."""

TRIAL_TOLERANCE = 1e-2
"""Relative error of a trial: wrong channels differ by more, half precision by less."""

CLEAN = 2
"""Trials in a row, at different widths, that must find nothing; in them every group loses something."""


def settle(tracer: Tracer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ChannelGraph:
    """The graph of a traced run, after trials until the pruned network runs as promised.

    Args:
        tracer: what the run has shown; ties and frozen labels are added.
        args, kwargs: the example input.
    """
    batch = batch_size(args, kwargs)
    findings = _Findings(tracer)
    assembly = assemble(tracer, batch, findings.followed)
    clean, cut = 0, set[str]()
    shapes_only = not tracer.values
    for attempt in range(ROUNDS):
        graph = assembly.graph
        if not any((assembly.group[labels] >= 0).any() for labels, _ in tracer.labels.stated):
            return graph
        plan = trial_plan(graph, attempt)
        to_be_proven = findings.changed and clean >= CLEAN - 1
        try:
            trial = _Trial(tracer, assembly, plan, shapes_only=shapes_only and not to_be_proven)
            trial.run(args, kwargs)
        except NeedsValuesError:
            shapes_only = False
            continue
        if findings.learn(trial):
            clean, cut = 0, set()
            assembly = assemble(tracer, batch, findings.followed)
            continue
        clean += 1
        cut |= {group.name for group in graph.groups if plan.widths[group.name] < group.size}
        if clean < CLEAN or len(cut) < len(graph.groups):
            continue
        if to_be_proven and (wrong := trial.differs_from_masked(args, kwargs)):
            findings.withdraw(wrong)
        elif not _try_turns(findings, assembly, trial, args, kwargs):
            return graph
        clean, cut = 0, set()
        assembly = assemble(tracer, batch, findings.followed)
    for labels, reason in tracer.labels.stated:
        tracer.labels.freeze(labels, f"{reason}, and {ROUNDS} trials did not settle it")
    return settle(tracer, args, kwargs)


def _try_turns(
    findings: _Findings, assembly: Assembly, last: _Trial, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """Try each comparison at widths at which it turns; freeze what does not bear it. Whether anything was frozen."""
    frozen = False
    tried: dict[tuple[Any, ...], str] = {}
    for comparison in last.comparisons:
        sides = last.compared(comparison)
        if sides is None:
            continue
        key = (comparison.line, comparison.name, *(n if isinstance(n, int) else len(n) for n in sides))
        if key not in tried and (plan := turning_plan(comparison, sides, assembly, last.plan)) is not None:
            trial = _Trial(findings.tracer, assembly, plan, shapes_only=False)
            trial.run(args, kwargs)
            failed = trial.failure is not None or bool(trial.mismatches)
            tried[key] = "fails" if failed else trial.differs_from_masked(args, kwargs)
        if tried.get(key):
            frozen = True
            for side in sides:
                if not isinstance(side, int):
                    reason = f"a comparison of sizes turns at other widths: {comparison.line}"
                    findings.tracer.labels.freeze(side, reason)
    return frozen


def trial_plan(graph: ChannelGraph, seed: int) -> PruningPlan:
    """Random channels at random widths, those of groups of equal size pairwise different.

    Sizes that should be tied and are not show only where their groups keep other shares, so the groups with most
    members (residual streams) keep 45 to 60 % and the others 15 to 40 %; groups of up to four channels may stay whole.
    A width of 1 is avoided, because broadcasting hides it.
    """
    rng = np.random.default_rng(seed)
    many = np.quantile([len(group.members) for group in graph.groups], 0.75)
    by_size: dict[int, list[ChannelGroup]] = defaultdict(list)
    for group in graph.groups:
        by_size[group.size].append(group)
    masks = {}
    for size, groups in by_size.items():
        groups.sort(key=lambda group: len(group.members) > many)  # stable: the streams come last
        num_streams = sum(len(group.members) > many for group in groups)
        widths = _different_widths(size, len(groups), num_streams, seed, rng)
        for group, width in zip(groups, widths, strict=True):
            masks[group.name] = np.isin(np.arange(size), rng.permutation(size)[:width])
    return PruningPlan.from_masks({group.name: masks[group.name] for group in graph.groups})


def _different_widths(size: int, number: int, num_streams: int, seed: int, rng: np.random.Generator) -> list[int]:
    """Widths of ``number`` groups of ``size`` channels, the last ``num_streams`` of which keep more.

    They are pairwise different where there are enough. Else two groups that have the same width under one seed have
    different ones under the next, as long as there are no more groups than the square of the widths.
    """
    if size <= 4:
        allowed = np.arange(min(size, 2 if size > 2 else 1), size + 1)
    else:
        allowed = np.arange(2, size)
        usual = [
            allowed[(allowed >= low * size) & (allowed <= high * size)] for low, high in ((0.15, 0.4), (0.45, 0.6))
        ]
        if number - num_streams <= len(usual[0]) and num_streams <= len(usual[1]):
            chosen = [rng.permutation(usual[0])[: number - num_streams], rng.permutation(usual[1])[:num_streams]]
            return [int(width) for width in np.concatenate(chosen)]
        if number <= len(allowed):
            widths = np.sort(rng.permutation(allowed)[:number])
            few = number - num_streams
            return [int(width) for width in (*rng.permutation(widths[:few]), *rng.permutation(widths[few:]))]
    places = [(i + seed * (1 + i // len(allowed)) + seed // 2) % len(allowed) for i in range(number)]
    return [int(allowed[place]) for place in places]


@dataclass(frozen=True)
class Source:
    """Where an integer comes from: an attribute of a module, or a dimension of a tensor."""

    module: str = ""
    name: str = ""
    index: int | None = None
    value: int = 0
    labels: Dim = None

    @property
    def place(self) -> tuple[str, str, int | None]:
        """The attribute."""
        return self.module, self.name, self.index

    @property
    def key(self) -> Any:
        """The same for equal sources."""
        return self.place if self.labels is None else self.labels.tobytes()


class Number(int):
    """An integer that knows where it comes from; arithmetic keeps the sources and loses ``exact``.

    ``dense`` is what it is in the unpruned network.
    """

    sources: tuple[Source, ...]
    exact: bool
    dense: int

    @classmethod
    def of(cls, value: int, sources: tuple[Source, ...], dense: int | None = None, exact: bool = True) -> Number:
        number = cls(value)
        number.sources, number.exact = sources, exact
        number.dense = value if dense is None else dense
        return number

    def __neg__(self) -> Number:
        return Number.of(-int(self), self.sources, -self.dense, self.exact)


def _keep_sources(name: str) -> None:
    operation = getattr(int, name)

    def method(self: Number, other: Any) -> Any:
        result = operation(self, other)
        if result is NotImplemented:
            return result
        more = other.sources if isinstance(other, Number) else ()
        return Number.of(result, self.sources + more, operation(self.dense, _dense(other)), exact=False)

    setattr(Number, name, method)


def _dense(value: int) -> int:
    return value.dense if isinstance(value, Number) else value


note_comparisons(Number)
for _name in ("add", "sub", "mul", "floordiv", "mod"):
    _keep_sources(f"__{_name}__")
    _keep_sources(f"__r{_name}__")


@dataclass(frozen=True)
class Mismatch:
    """A call that did not give what the labels promise.

    Args:
        needs: numbers given to it, and the labels whose kept number each should be.
        labels: labelled dimensions of its inputs and outputs.
        line: line of the model's code.
    """

    needs: tuple[tuple[int, Dim], ...]
    labels: tuple[IntArray, ...]
    line: str


class _Trial(TorchFunctionMode):
    """Runs a pruned network beside the record of the traced one.

    Args:
        shapes_only: run without arithmetic, which takes hardly any time.
    """

    def __init__(self, tracer: Tracer, assembly: Assembly, plan: PruningPlan, *, shapes_only: bool) -> None:
        super().__init__()
        self.tracer, self.graph, self.plan = tracer, assembly.graph, plan
        self.kept = assembly.kept(plan)
        self.shapes_only = shapes_only
        self.mismatches: list[Mismatch] = []
        self.lost = False
        """Whether a tensor of another shape than promised could not be replaced: the rest of the run tells nothing."""
        self.failure: tuple[tuple[str, str], str, str] | None = None
        """The module that ran last and the one that raised, what, and the line."""
        self.comparisons: list[Comparison] = []
        """Comparisons of sizes that the code has made."""
        self.outputs: Any = None
        self.numbers: Numbers = {}
        self.followed = {(f.module, f.name, f.index): tracer.dims[f.dim - 1] for f in self.graph.followed}
        """The dimensions that attributes of modules follow."""
        self.lengths: dict[int, tuple[int, IntArray]] = {}
        self.labels: TensorMap[Labels] = TensorMap()
        self.astray: TensorMap[bool] = TensorMap()

    def run(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Run; afterwards ``mismatches`` and ``failure`` say what was found.

        Raises:
            NeedsValuesError: the run has shapes only and something asked for values.
        """
        make = _without_values if self.shapes_only else prune
        pruned = make(self.tracer.model, self.graph, self.plan)
        for path, module in pruned.named_modules():
            _mark_attributes(path, module, self.tracer.model.get_submodule(path))
        for size in self.graph.followed:
            _mark_followed(pruned.get_submodule(size.module), size)
        for name, tensor in tensors_of(pruned)[0].items():
            self.labels[tensor] = self.tracer.labels.of(self.tracer.tensors[name])
        quiet = undisturbed(pruned, before=self.tracer.before, watched=True)
        with quiet, modules_entered(pruned) as entered:
            self.calls, arithmetic = Calls(entered), Arithmetic(entered)
            scales = nullcontext() if self.shapes_only else Scales(arithmetic)
            try:
                with NoArithmetic() if self.shapes_only else arithmetic, self, scales, comparisons_noted() as compared:
                    self.comparisons = compared
                    self.outputs = pruned(*args, **kwargs)
            except NeedsValuesError:
                raise
            except Exception as error:  # noqa: BLE001 - a foreign forward may raise anything
                modules = (entered.last, _module_of(error, entered))
                self.failure = (modules, type(error).__name__, line_of(error))
        self.numbers = arithmetic.numbers
        entered.forget()

    def differs_from_masked(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """How the outputs of a run differ from those of the masked dense network; empty if they do not."""
        before = self.tracer.before
        expected = run_masked(self.tracer.model, self.graph, self.plan, args, kwargs, self.numbers, before)
        return compare_outputs(self.outputs, expected, TRIAL_TOLERANCE).reason

    def compared(self, comparison: Comparison) -> tuple[IntArray | int, IntArray | int] | None:
        """What the sides of a comparison count; None where none follows a width, or one is computed from others."""
        sides = [self._counted(side) for side in (comparison.left, comparison.right)]
        if any(side is None for side in sides) or all(isinstance(side, int) for side in sides):
            return None
        return sides[0], sides[1]  # type: ignore[return-value]

    def _counted(self, number: int) -> IntArray | int | None:
        if not isinstance(number, Number):
            return int(number)
        source = number.sources[0]
        labels = source.labels if source.labels is not None else self.followed.get(source.place)
        if labels is None:
            return int(number) if number.exact else None
        return labels if number.exact and len(labels) == number.dense else None

    def length(self, labels: IntArray) -> int:
        """How many of these labels the trial keeps."""
        known = self.lengths.get(id(labels))
        if known is None:  # the array is kept, so that no other gets its id
            known = self.lengths[id(labels)] = int(np.count_nonzero(self.kept[labels])), labels
        return known[0]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name == "__get__":
            return self._sized(args[0], func(*args, **kwargs))
        key = self.calls.key(name)
        call = None if self.lost else self.tracer.calls.get(key)
        try:
            out = func(*args, **kwargs)
        except NeedsValuesError:
            raise
        except Exception:  # whatever an operator raises at a size that does not fit; else it goes on to the model
            if call is None or not self._note(call, name, args, kwargs):
                raise
            return self._promised(call, name)
        if name == "size":
            return self._sized(args[0], out, *args[1:], **kwargs)
        if call is None:
            return out
        tensors = tensors_in((args[0] if name == "__setitem__" else out,))
        if len(tensors) != len(call.outputs) or self._differs(call, tensors, args, kwargs):
            if self._note(call, name, args, kwargs):
                return self._promised(call, name)
            for tensor in tensors:  # nothing with channels in it: the data led the run elsewhere
                self.astray[tensor] = True
            return out
        for tensor, (labels, *_) in zip(tensors, call.outputs, strict=True):
            self.labels[tensor] = labels
        return out

    def _differs(self, call: Call, tensors: Sequence[Tensor], args: Any, kwargs: Any) -> bool:
        """Whether labelled dimensions are not as promised, or others changed although nothing led them astray."""
        astray = any(self.astray.get(t) for t in tensors_in([*args, *kwargs.values()]))
        for tensor, (labels, shape, *_) in zip(tensors, call.outputs, strict=True):
            if tensor.ndim != len(shape):
                return True
            for n, dim, dense in zip(tensor.shape, labels, shape, strict=True):
                if dim is not None and self.length(dim) != len(dim):
                    if n != self.length(dim):
                        return True
                elif n != dense:
                    if not astray and self._follows_data(args):
                        astray = True
                    if not astray:
                        return True
                    self.astray[tensor] = True
        return False

    @staticmethod
    def _follows_data(args: Any) -> bool:
        """Whether a call picks entries by the values of a tensor."""
        return any(t.dtype in (torch.bool, torch.int64, torch.int32) for t in tensors_in(_flat(args)))

    def _promised(self, call: Call, name: str) -> Any:
        """Tensors of the promised shapes."""
        if name == "__setitem__":
            self.lost = True
            return None
        made = []
        for labels, shape, dtype, device in call.outputs:
            sizes = [n if dim is None else self.length(dim) for n, dim in zip(shape, labels, strict=True)]
            tensor = torch.zeros(sizes, dtype=dtype, device=device)
            self.labels[tensor] = labels
            made.append(tensor)
        return made[0] if len(made) == 1 else tuple(made)

    def _sized(self, tensor: Any, value: Any, *where: int, **named: int) -> Any:
        """Sizes that know the dimension they come from."""
        labels = self.labels.get(tensor) if isinstance(tensor, Tensor) else None
        if labels is None:
            return value
        if isinstance(value, torch.Size):
            return torch.Size(
                n if dim is None else Number.of(n, (Source(labels=dim),), len(dim))
                for n, dim in zip(value, labels, strict=True)
            )
        if type(value) is int and (where or named):
            dim = labels[where[0] if where else named["dim"]]
            return value if dim is None else Number.of(value, (Source(labels=dim),), len(dim))
        return value

    def _note(self, call: Call, name: str, args: Any, kwargs: Any) -> bool:
        """Keep a mismatch; False if no channels that the trial removed are in it."""
        inputs = tensors_in(_flat([*args, *kwargs.values()]))
        dims = [dim for t in inputs for dim in self.labels.get(t) or ()] + [d for out in call.outputs for d in out[0]]
        numbers = [n for n in _flat([*args, *kwargs.values()]) if isinstance(n, Number)]
        dims += [source.labels for n in numbers for source in n.sources]
        touched = self._smaller(dims) or self._smaller(self.followed.get(s.place) for n in numbers for s in n.sources)
        if not touched:
            return False
        needs = _needs(self, call, name, args, kwargs)
        wrong = tuple((n, dim) for n, dim in needs if dim is None or n != self.length(dim))
        self.mismatches.append(Mismatch(wrong, touched, running_line()))
        return True

    def _smaller(self, dims: Iterable[Dim]) -> tuple[IntArray, ...]:
        """Those of which the trial removes something, each once."""
        return tuple({id(dim): dim for dim in dims if dim is not None and self.length(dim) != len(dim)}.values())


def _without_values(model: nn.Module, graph: ChannelGraph, plan: PruningPlan) -> nn.Module:
    """The pruned network with zeros for weights; those of plain layers, which nobody looks into, share one zero."""
    slices = graph.slices(plan)
    plain = {f"{path}.weight" for path, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
    tensors = {}
    for name, tensor in tensors_of(model)[0].items():
        shape = kept_shape(tensor.shape, slices.get(name, {}))
        tensors[name] = tensor.new_zeros(()).expand(shape) if name in plain else tensor.new_zeros(shape)
    return rebuild(model, graph, plan, tensors)


def _mark_attributes(path: str, module: nn.Module, dense: nn.Module) -> None:
    """Turn the integers of a module into ``Number``; ``dense`` is the same module of the unpruned network."""
    is_torch = type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Unflatten)
    if is_torch or isinstance(module, torch.jit.ScriptModule):
        return
    for name, value in list(vars(module).items()):
        if name.startswith("_") or name == "training":
            continue
        if type(value) is int and value > 1:
            vars(module)[name] = Number.of(value, (Source(path, name, None, value),), vars(dense).get(name, value))
        elif type(value) in (tuple, list, torch.Size) and value and all(type(n) is int for n in value):
            whole = enumerate(zip(value, vars(dense).get(name, value), strict=True))
            vars(module)[name] = type(value)(Number.of(n, (Source(path, name, i, n),), old) for i, (n, old) in whole)


def _mark_followed(module: nn.Module, size: Followed) -> None:
    """Turn a size that a module of torch's keeps into a ``Number``: torch's own code compares it too."""
    value = vars(module).get(size.name)
    if type(value) is int:
        vars(module)[size.name] = Number.of(value, (Source(size.module, size.name, None, size.value),), size.value)


def _flat(values: Any) -> Iterator[Any]:
    """Items of nested lists, tuples and slices."""
    if isinstance(values, (list, tuple)):
        for value in values:
            yield from _flat(value)
    elif isinstance(values, slice):
        yield from (values.start, values.stop)
    else:
        yield values


def _needs(trial: _Trial, call: Call, name: str, args: Any, kwargs: Any) -> Sequence[tuple[int, Dim]]:
    """Numbers given to a call, and the labels whose kept number each should be."""
    first = call.outputs[0][0]
    if name in MAKES or name in ("view", "reshape", "expand", "broadcast_to", "repeat", "tile"):
        given = args if name in MAKES and not isinstance(args[0], Tensor) else args[1:]
        sizes = given[0] if given and isinstance(given[0], (tuple, list)) else given
        if name in ("repeat", "tile"):
            first = first[len(first) - len(sizes) :]
        return [(n, dim) for n, dim in zip(sizes, first, strict=False) if isinstance(n, int) and n != -1]
    if name == "unflatten":
        dim, sizes = (args[1], args[2]) if len(args) > 2 else (kwargs.get("dim", args[1]), kwargs["sizes"])
        ndim = len(first) - len(sizes) + 1
        return [(n, first[dim % ndim + i]) for i, n in enumerate(sizes) if n != -1]
    if name in ("split", "split_with_sizes") and len(args) > 1:
        where = args[2] if len(args) > 2 else kwargs.get("dim", 0)
        sizes = args[1] if isinstance(args[1], (tuple, list)) else [args[1]]
        return [(n, out[0][where]) for n, out in zip(sizes, call.outputs, strict=False)]
    if name in ("__getitem__", "__setitem__") and (labels := trial.labels.get(args[0])) is not None:
        return _bounds(labels, args[1])
    dims = [dim for out in call.outputs for dim in out[0] if dim is not None]
    dims += [d for t in tensors_in(_flat(args)) for d in trial.labels.get(t) or () if d is not None]
    numbers = [n for n in _flat([*args, *kwargs.values()]) if isinstance(n, Number)]
    return [(n, dim) for n in numbers for dim in dims if len(dim) == n.dense][:4]


def _bounds(labels: Labels, index: Any) -> Sequence[tuple[int, Dim]]:
    """Bounds of slices of labelled dimensions: each should count the labels kept before it, or from its end."""
    items = list(index) if isinstance(index, tuple) else [index]
    missing = len(labels) - sum(item is not None and item is not Ellipsis for item in items)
    dims: list[Dim] = list(labels)
    found: list[tuple[int, Dim]] = []
    d = 0
    for item in items:
        if item is Ellipsis:
            d += missing
        elif item is not None:
            dim = dims[d] if d < len(dims) else None
            if isinstance(item, slice) and dim is not None:
                bounds = [n for n in (item.start, item.stop) if isinstance(n, int) and _dense(n) != 0]
                found += [(n, dim[: _dense(n)]) if _dense(n) > 0 else (-n, dim[_dense(n) :]) for n in bounds]
            d += 1
    return found


class _Findings:
    """What the trials have taught."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self.norms = [
            Followed(path, "num_features", None, len(channels), 1 + tracer.dim_id(channels), len(channels))
            for path, channels in tracer.norms.items()
            if getattr(tracer.model.get_submodule(path), "num_features", None) == len(channels)
        ]
        self.followed = list(self.norms)
        self.tried: set[tuple[Any, ...]] = {(f.module, f.name, f.index) for f in self.norms}
        self.acted: set[Any] = set()
        """Sources of numbers that the last trial has settled; whether that suffices, the next one shows."""
        self.settled: list[tuple[IntArray, str]] = []

    @property
    def changed(self) -> bool:
        return bool(self.settled)

    def learn(self, trial: _Trial) -> bool:
        """Act on a trial; False if there is nothing left to do."""
        self.acted.clear()
        needs = [(n, dim, m) for m in trial.mismatches for n, dim in m.needs if isinstance(n, Number)]
        for exact in (True, False):
            if any([self._settle(n, dim, m) for n, dim, m in needs if n.exact == exact]):
                return True
        if (trial.mismatches or trial.failure) and any(
            [self._follow_guard(c, trial) for c in trial.comparisons if c.turned]
        ):
            return True
        if trial.mismatches:
            for m in trial.mismatches:
                for dim in m.labels:
                    self.tracer.labels.freeze(dim, f"a size written in the code: {m.line}")
            return True
        if trial.failure is None:
            return False
        (last, module), error, line = trial.failure
        reason = f"the pruned network raised {error} in {module or 'the model itself'}: {line}"
        fresh = self._seen_in(last, trial, below=False) or self._seen_in(module, trial, below=False)
        fresh = fresh or self._seen_in(module, trial)
        while module and not fresh:
            module = module.rpartition(".")[0]
            fresh = self._seen_in(module, trial)
        for dim in fresh:
            self.tracer.labels.freeze(dim, reason)
        return True

    def _follow_guard(self, comparison: Comparison, trial: _Trial) -> bool:
        """Sizes that are equal in the dense network and were compared (``x.shape[1] != self.width``) stay equal."""
        sides = (comparison.left, comparison.right)
        if not all(isinstance(n, Number) and n.exact for n in sides) or sides[0].dense != sides[1].dense:
            return False
        for known, other in (sides, sides[::-1]):
            labels = trial.compared(Comparison("eq", known, 0, True, False, ""))
            if labels is not None and isinstance(labels[0], np.ndarray):
                return self._settle(other, labels[0], Mismatch((), (), comparison.line))
        return False

    def _seen_in(self, module: str, trial: _Trial, *, below: bool = True) -> list[IntArray]:
        """Dimensions of tensors in a module (and the modules below it) that the trial made smaller."""
        inside = f"{module}." if module else ""
        dims = [
            dim
            for (path, _, _), call in self.tracer.calls.items()
            if path == module or (below and path.startswith(inside))
            for labels, *_ in call.outputs
            for dim in labels
        ]
        dims += [
            labels
            for name, _, labels in self.tracer.places
            if name.startswith(inside) and (below or layer_of(name) == module)
        ]
        return [dim for dim in dims if dim is not None and not trial.kept[dim].all()]

    def _settle(self, number: Number, dim: Dim, mismatch: Mismatch) -> bool:
        """Make one source of a number follow the dimension it should; False if nothing new can be done."""
        if dim is None:
            return False
        if not self.acted.isdisjoint(source.key for source in number.sources):
            return True
        for source in number.sources:
            if source.labels is not None and self._tie(source.labels, dim):
                self.acted.add(source.key)
                self.settled.append((dim, mismatch.line))
                return True
        attributes = [source for source in number.sources if source.labels is None]
        likely = (len(dim), len(np.unique(dim)))
        for source in sorted(attributes, key=lambda s: (s.value not in likely, -s.value)):
            if source.place not in self.tried:
                self.tried.add(source.place)
                self.acted.add(source.key)
                self.followed.append(Followed(*source.place, source.value, 1 + self.tracer.dim_id(dim), len(dim)))
                self.settled.append((dim, mismatch.line))
                return True
        for source in attributes:  # one attribute for two sizes: both have the same width
            for known in (f for f in self.followed if (f.module, f.name, f.index) == source.place):
                if self._tie(self.tracer.dims[known.dim - 1], dim):
                    self.acted.add(source.key)
                    self.settled.append((dim, mismatch.line))
                    return True
        return False

    def _tie(self, labels: IntArray, dim: IntArray) -> bool:
        """Tie two dimensions in equal parts, as long as both allow; False if that cannot be or was tried."""
        pair = (labels.tobytes(), dim.tobytes())
        part = gcd(len(labels), len(dim))
        if pair in self.tried or (part == 1 and min(len(labels), len(dim)) > 1):
            return False
        self.tried.add(pair)
        first = labels[:part]
        self.tracer.labels.edges += [(np.tile(first, len(whole) // part), whole) for whole in (labels, dim)]
        return True

    def withdraw(self, reason: str) -> None:
        """Freeze everything that was settled by ties and attributes: the certificate failed."""
        for dim, line in self.settled:
            self.tracer.labels.freeze(dim, f"sizes that could not be proven right ({reason}): {line}")
        self.settled.clear()
        self.followed = list(self.norms)


def _module_of(error: Exception, entered: Entered) -> str:
    """Path of the innermost module whose code a traceback went through."""
    trace, found = error.__traceback__, entered.last
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and module in entered.names:
            found = entered.names[module]
        trace = trace.tb_next
    return found
