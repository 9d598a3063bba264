"""From a plan to a physically smaller network and back: cut, scatter, save, load, and prove that the cut is right."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import IntArray, PruningPlan
from secateur.pruning.reference import run_masked, run_pruned
from secateur.pruning.rules import weight_name
from secateur.pruning.snapshot import ATOMS, REGISTERS, forget, reachable
from secateur.pruning.tracer import PruningError, named_tensors, tensors_of

PLAN_FILE = "plan.json"
WEIGHTS_FILE = "weights.safetensors"

Slices = Mapping[str, Mapping[int, IntArray]]


def prune(model: nn.Module, graph: ChannelGraph, plan: PruningPlan) -> nn.Module:
    """A new model of the same class with smaller tensors; state_dict names, tied weights and modes stay.

    Args:
        model: the traced model, or another one of the same architecture; it is left untouched.
        graph: its channel groups.
        plan: what to keep.

    Raises:
        PruningError: the model's tensors are not those of the graph; names the first mismatches.
        PlanError: the plan belongs to another network.
    """
    slices = graph.slices(plan)
    tensors = check_model(model, graph)
    sliced = [name for name, tensor in tensors.items() if name in slices and tuple(tensor.shape) == graph.shapes[name]]
    return rebuild(model, graph, plan, {name: cut(tensors[name], slices[name]) for name in sliced})


def cut(tensor: Tensor, kept: Mapping[int, IntArray]) -> Tensor:
    """The kept positions of a tensor along each of the given dimensions; a new tensor."""
    result = tensor.detach()
    for dim, positions in sorted(kept.items(), key=lambda item: len(item[1]) / tensor.shape[item[0]]):
        result = result.index_select(dim, torch.from_numpy(positions).to(tensor.device))
    return in_format_of(tensor, result)


def in_format_of(tensor: Tensor, result: Tensor) -> Tensor:
    """The second tensor, channels-last in memory if the first one is."""
    for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.ndim == dims and tensor.is_contiguous(memory_format=layout) and not tensor.is_contiguous():
            return result.contiguous(memory_format=layout)
    return result


def rebuild(model: nn.Module, graph: ChannelGraph, plan: PruningPlan, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model in which some tensors (by first name) are replaced and layers know their new sizes.

    The replaced tensors of ``model`` are never copied.

    Raises:
        PruningError: the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for name, old in tensors_of(model)[0].items():
        if name in tensors:
            new = tensors[name]
            memo[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    for _, _, value in reachable(model):  # made by old-style weight norm, or kept from a forward
        if isinstance(value, Tensor) and not value.is_leaf and id(value) not in memo:
            memo[id(value)] = value.detach().clone()
    try:
        result = copied(model, memo)
    except Exception as error:
        raise PruningError(f"the model cannot be copied: {_uncopied(model, memo)}{error}") from error
    resize(result, model, graph, plan, tensors)
    forget(result, model, graph.remade)
    return result


def resize(network: nn.Module, model: nn.Module, graph: ChannelGraph, plan: PruningPlan, names: Iterable[str]) -> None:
    """Layers of a copy of the model take the sizes of the tensors that it has by now; again, for every other plan.

    Args:
        network: the copy.
        names: its tensors (by first name) that are not the model's.
    """
    changed = set(names)
    changed |= {alias for alias, name in graph.aliases.items() if name in changed}
    owners = {weight_name(name).rpartition(".")[0] for name in changed}
    for (path, module), dense in zip(network.named_modules(), model.modules(), strict=True):
        if path not in owners:
            continue
        weight = f"{path}.weight" if path else "weight"
        if weight in graph.scaled_groups and hasattr(module, "groups"):
            module.groups = vars(dense)["groups"] * _weight(module).shape[0] // _weight(dense).shape[0]
        for kind, adapt in ADAPTERS.items():
            if isinstance(module, kind):
                adapt(module, dense)
    _follow(network, graph, plan)


def _uncopied(model: nn.Module, memo: Mapping[int, Any]) -> str:
    """Names the first attribute that cannot be copied, with a colon; empty if none fails alone."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in REGISTERS:
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except Exception as error:  # noqa: BLE001 - a foreign object may raise anything
                where = path or "the model itself"
                return f"attribute {name!r} of {where} ({type(value).__name__}, {type(error).__name__}): "
    return ""


def copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy(model, memo)``, which would spend most of its time on the settings and empty hooks of modules."""
    plain = [module for module in model.modules() if id(module) not in memo and _is_plain(type(module))]
    for module in plain:
        memo[id(module)] = type(module).__new__(type(module))
    for module in plain:
        attributes = vars(memo[id(module)])
        for name, value in module.__getstate__().items():  # type: ignore[no-untyped-call]
            if type(value) in ATOMS:
                attributes[name] = value
            elif type(value) in (dict, OrderedDict) and id(value) not in memo:
                memo[id(value)] = attributes[name] = type(value)()
                for key, item in value.items():
                    own = key if type(key) in ATOMS else copy.deepcopy(key, memo)
                    attributes[name][own] = copy.deepcopy(item, memo)
            else:
                attributes[name] = copy.deepcopy(value, memo)
    result: nn.Module = copy.deepcopy(model, memo)
    return result


def _is_plain(kind: type[nn.Module]) -> bool:
    """Whether modules of a class are copied attribute by attribute: the class does not say otherwise."""
    ways = ("__reduce__", "__reduce_ex__", "__getstate__", "__deepcopy__")
    is_own = any(getattr(kind, way, None) is not getattr(nn.Module, way, None) for way in ways)
    return not is_own and kind.__setstate__.__module__.startswith("torch.nn.modules.")


def _follow(model: nn.Module, graph: ChannelGraph, plan: PruningPlan) -> None:
    """Set the sizes that modules keep as attributes."""
    widths = np.array([plan.widths[group.name] for group in graph.groups], dtype=np.int64)
    for size in graph.followed:
        module = model.get_submodule(size.module)
        length = int(graph.lengths.constant[size.dim] + graph.lengths.per_width[size.dim] @ widths)
        new = size.value * length // size.length
        if size.index is None:
            setattr(module, size.name, new)
        else:
            old = getattr(module, size.name)
            setattr(module, size.name, type(old)([*old[: size.index], new, *old[size.index + 1 :]]))


def _weight(module: Any) -> Tensor:
    """Weight of a layer, or the parameter that a parametrization, weight norm or spectral norm makes it from."""
    if is_parametrized(module, "weight"):
        sources: list[Tensor] = list(module.parametrizations.weight.parameters(recurse=False))
        return max(sources, key=Tensor.numel)
    for name in ("weight_orig", "weight_v", "weight"):
        if isinstance(found := module._parameters.get(name), Tensor):
            return found
    made: Tensor = module.weight  # by a hook of the model
    return made


def _conv(module: Any, dense: Any) -> None:
    first, second = _weight(module).shape[:2]
    second *= module.groups
    module.in_channels, module.out_channels = (first, second) if module.transposed else (second, first)


def _linear(module: Any, dense: Any) -> None:
    module.out_features, module.in_features = _weight(module).shape


def _norm(module: Any, dense: Any) -> None:
    module.num_features = (module.running_mean if module.weight is None else module.weight).shape[0]


def _layer_norm(module: Any, dense: Any) -> None:
    module.normalized_shape = tuple(module.weight.shape)


def _group_norm(module: Any, dense: Any) -> None:
    if dense.num_groups == dense.num_channels:
        module.num_groups = module.weight.shape[0]
    module.num_channels = module.weight.shape[0]


def _embedding(module: Any, dense: Any) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape


def _bilinear(module: Any, dense: Any) -> None:
    module.out_features, module.in1_features, module.in2_features = _weight(module).shape


def _attention(module: Any, dense: Any) -> None:
    if module.in_proj_weight is not None:
        module.embed_dim = module.kdim = module.vdim = module.in_proj_weight.shape[1]
        module.head_dim = module.embed_dim // module.num_heads


def _prelu(module: Any, dense: Any) -> None:
    module.num_parameters = module.weight.shape[0]


ADAPTERS: dict[type[nn.Module], Callable[[Any, Any], None]] = {
    _ConvNd: _conv,
    nn.Linear: _linear,
    nn.Bilinear: _bilinear,
    _NormBase: _norm,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.Embedding: _embedding,
    nn.PReLU: _prelu,
    nn.MultiheadAttention: _attention,
}
"""Layers that remember sizes -> how they read them off their new weight, beside the layer of the model."""


def check_model(model: nn.Module, graph: ChannelGraph) -> dict[str, Tensor]:
    """Tensors of a model by first name.

    Raises:
        PruningError: they are not those of the graph; names the first mismatches.
    """
    tensors = tensors_of(model)[0]
    remade = {item.path for item in graph.remade}
    found = {n: graph.shapes.get(n) if n in remade else tuple(t.shape) for n, t in tensors.items()}
    _check_shapes({n: s for n, s in found.items() if s is not None}, graph.shapes, "the model is not the traced one")
    return tensors


def _check_shapes(found: Mapping[str, object], expected: Mapping[str, object], what: str) -> None:
    names = [*expected, *(n for n in found if n not in expected)]
    wrong = [
        f"{n}: expected {expected.get(n, 'no such tensor')}, got {found.get(n, 'no such tensor')}"
        for n in names
        if found.get(n) != expected.get(n)
    ]
    if wrong:
        more = f"\n  and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise PruningError(f"{what}:\n  " + "\n  ".join(wrong[:5]) + more)


def scatter(
    model: nn.Module,
    graph: ChannelGraph,
    plan: PruningPlan,
    pruned_state: Mapping[str, Tensor],
    into: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Put the weights of a pruned network back into dense shapes: the inverse of slicing.

    Args:
        model: the dense model.
        graph: its channel groups.
        plan: what was kept.
        pruned_state: state dict of the pruned network.
        into: dense-shaped weights whose values stand where channels were removed; None = the model's own.

    Returns:
        A state dict of the dense model's shapes; slicing it by ``plan`` gives ``pruned_state`` back exactly.

    Raises:
        PruningError: ``pruned_state`` is not of this plan; names the first mismatches.
    """
    check_model(model, graph)
    slices = graph.slices(plan)
    dense = model.state_dict() if into is None else into
    tensors = {name: tensor for name, tensor in dense.items() if isinstance(tensor, Tensor)}  # the rest is extra state
    found = {name: tuple(t.shape) for name, t in pruned_state.items() if isinstance(t, Tensor)}
    expected = {name: kept_shape(tensor.shape, slices.get(name, {})) for name, tensor in tensors.items()}
    _check_shapes(found, expected, "the pruned state does not belong to the plan")
    result = {name: pruned_state.get(name, value) for name, value in dense.items() if name not in tensors}
    for name, tensor in tensors.items():
        new = pruned_state[name].detach()
        result[name] = new.clone()
        if name in slices:
            positions = [torch.as_tensor(slices[name].get(d, range(n))) for d, n in enumerate(tensor.shape)]
            grid = torch.meshgrid(*(p.to(tensor.device) for p in positions), indexing="ij")
            result[name] = tensor.detach().clone().index_put_(grid, new.to(tensor))
    return result


def kept_shape(shape: Iterable[int], kept: Mapping[int, IntArray]) -> tuple[int, ...]:
    """Shape of a tensor after slicing."""
    return tuple(len(kept[d]) if d in kept else n for d, n in enumerate(shape))


def save_pruned(path_dir: str | Path, model: nn.Module, plan: PruningPlan) -> None:
    """Write a pruned model as ``plan.json`` and ``weights.safetensors``; no pickle, no code.

    Args:
        path_dir: directory, made if missing.
        model: the pruned model.
        plan: the plan it was made with.

    Raises:
        PruningError: a module has extra state that is no JSON.
    """
    folder = Path(path_dir)
    folder.mkdir(parents=True, exist_ok=True)
    extra = json.dumps({path: _extra_state(path, module) for path, module in with_extra_state(model).items()})
    state = {name: tensor.detach().contiguous() for name, tensor in stored_tensors(model).items()}
    save_file(state, folder / WEIGHTS_FILE, metadata={"plan": plan.digest, "extra": extra})
    (folder / PLAN_FILE).write_text(plan.to_json() + "\n")


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by the first name of their attribute, whatever a state dict calls them."""
    passing = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    return {name: tensor for name, tensor in tensors_of(model)[0].items() if name not in passing}


def with_extra_state(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that keep more than tensors (``get_extra_state``), by path."""
    own = nn.Module.get_extra_state
    return {path: module for path, module in model.named_modules() if type(module).get_extra_state is not own}


def _extra_state(path: str, module: nn.Module) -> Any:
    """Extra state that JSON holds unchanged.

    Raises:
        PruningError: it is of another kind.
    """
    value = module.get_extra_state()
    try:
        is_kept = bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError, RecursionError):
        is_kept = False
    if not is_kept:
        raise PruningError(
            f"cannot save the extra state of {path or 'the model itself'} ({type(module).__name__}.get_extra_state): "
            f"expected numbers, texts, lists and dicts with texts as keys, got {type(value).__name__}; keep tensors in "
            "buffers (register_buffer)"
        )
    return value


def load_pruned(path_dir: str | Path, dense_model: nn.Module, graph: ChannelGraph) -> tuple[nn.Module, PruningPlan]:
    """Read what ``save_pruned`` wrote.

    Args:
        path_dir: the directory.
        dense_model: a model of the unpruned architecture, with any weights; left untouched.
        graph: its channel groups.

    Returns:
        The pruned model and its plan.

    Raises:
        PruningError: files are missing or changed, or they belong to another architecture; names the first mismatches.
    """
    folder = Path(path_dir)
    try:
        plan = PruningPlan.from_json((folder / PLAN_FILE).read_text())
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            metadata = file.metadata() or {}
            digest = metadata.get("plan")
            state: dict[str, Tensor] = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        slices = graph.slices(plan)
        extra = json.loads(metadata.get("extra", "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        raise PruningError(f"cannot load the pruned model in {folder}: {error}") from error
    if digest != plan.digest:
        raise PruningError(
            f"{folder / PLAN_FILE} (digest {plan.digest}) is not the plan of its weights (digest {digest})"
        )
    tensors = check_model(dense_model, graph)
    stored = list(stored_tensors(dense_model))
    made = {item.path for item in graph.remade} - tensors.keys()
    state = {name: tensor for name, tensor in state.items() if name not in made}
    _check_shapes(
        {n: (tuple(t.shape), t.dtype) for n, t in state.items()},
        {n: (kept_shape(tensors[n].shape, slices.get(n, {})), tensors[n].dtype) for n in stored},
        f"{folder / WEIGHTS_FILE} does not fit the plan and this architecture",
    )
    rest = {n: cut(tensors[n], slices[n]) for n in tensors if n in slices and n not in state}
    moved = {n: in_format_of(tensors[n], t.to(tensors[n].device)) for n, t in state.items()}
    pruned = rebuild(dense_model, graph, plan, {**rest, **moved})
    _check_shapes(
        dict.fromkeys(extra, "extra state"), dict.fromkeys(with_extra_state(pruned), "extra state"), f"{folder}"
    )
    for path, value in extra.items():
        pruned.get_submodule(path).set_extra_state(value)
    return pruned, plan


@dataclass(frozen=True)
class Certificate:
    """Whether a pruned network computes what the dense one does with the removed channels masked.

    Args:
        ok: it ran, and every output agrees within the tolerance.
        max_relative_error: largest difference of an output over its largest magnitude; NaN if not compared.
        reason: what failed; empty if ok.
    """

    ok: bool
    max_relative_error: float
    reason: str = ""


TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest relative error that is still equal, where it is not 1e-4."""


def certify(
    model: nn.Module,
    pruned: nn.Module,
    graph: ChannelGraph,
    plan: PruningPlan,
    *example_inputs: Any,
    tolerance: float | None = None,
    **kwargs: Any,
) -> Certificate:
    """Compare a pruned model with the dense one whose removed channels are masked (``secateur.pruning.reference``).

    Both run in eval mode without gradients from the same random state and are left as they were. A broken pruned
    model is an answer, not an exception. Tensors of one container whose rows belong together (boxes, labels and
    scores of an image) are compared as sets of rows where their order differs.

    Args:
        tolerance: largest relative error that is still equal; None = 1e-4, for float16 2e-2, for bfloat16 5e-2.
    """
    nan = float("nan")
    try:
        check_model(model, graph)
        plan.validate(graph)
    except ValueError as error:
        return Certificate(False, nan, str(error))
    running = "pruned"
    try:
        found, numbers = run_pruned(pruned, example_inputs, kwargs)
        running = "dense"
        expected = run_masked(model, graph, plan, example_inputs, kwargs, numbers)
    except Exception as error:  # noqa: BLE001 - any failure of a foreign forward is the answer
        return Certificate(False, nan, f"the {running} model's forward raised {type(error).__name__}: {error}")
    return compare_outputs(found, expected, tolerance)


def compare_outputs(found: Any, expected: Any, tolerance: float | None = None) -> Certificate:
    """Compare what a pruned model gives with what it should.

    Args:
        found, expected: outputs of a forward: tensors in nested lists, mappings and objects.
        tolerance: as for ``certify``.
    """
    small, dense = (dict(named_tensors(outputs)) for outputs in (found, expected))
    if tolerance is None:
        tolerance = max((TOLERANCE.get(t.dtype, 1e-4) for t in dense.values()), default=1e-4)
    shapes, wanted = ({path: tuple(t.shape) for path, t in outputs.items()} for outputs in (small, dense))
    wrong = [
        f"output{p} is {shapes.get(p)} instead of {wanted.get(p)}"
        for p in shapes | wanted
        if shapes.get(p) != wanted.get(p)
    ]
    if wrong:
        return Certificate(False, float("nan"), "shapes differ: " + "; ".join(wrong[:5]))
    errors = output_errors(small, dense, tolerance)
    where = max(errors, key=errors.__getitem__, default="")
    worst = errors.get(where, 0.0)
    if worst <= tolerance:
        return Certificate(True, worst)
    return Certificate(False, worst, f"output{where} differs by {worst:.2e} relative, more than {tolerance:.0e}")


def output_errors(small: Mapping[str, Tensor], dense: Mapping[str, Tensor], tolerance: float) -> dict[str, float]:
    """Relative error per output; of tensors whose rows belong together the error of matched rows, if that is smaller.

    Args:
        small, dense: outputs by path.
        tolerance: outputs that agree so far need no matching.
    """
    errors = {p: relative_error(small[p], dense[p]) for p in dense if p in small and small[p].shape == dense[p].shape}
    containers: dict[str, list[str]] = {}
    for path in dense:
        containers.setdefault(path[: max(path.rfind("["), path.rfind("."))], []).append(path)
    for paths in containers.values():
        if len(paths) < 2 or all(errors.get(p, 1.0) <= tolerance for p in paths):
            continue
        tables = [[found[p] for p in paths if p in found] for found in (small, dense)]
        if any(len(t) < len(paths) or any(x.ndim == 0 or len(x) != len(t[0]) for x in t) for t in tables):
            continue
        matched = row_error(*tables)
        errors |= {p: min(errors.get(p, float("inf")), matched) for p in paths}
    return errors


def row_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest relative distance of a row to its nearest row in the other table; a row spans all tensors.

    Args:
        found, expected: tensors of shapes ``(rows, ...)``, the same but for the number of rows.
    """
    if min(len(found[0]), len(expected[0])) == 0:
        return 0.0 if len(found[0]) == len(expected[0]) else float("inf")
    distances = torch.zeros(len(found[0]), len(expected[0]), dtype=torch.float64)
    for a, b in zip(found, expected, strict=True):
        if a.shape[1:] != b.shape[1:]:
            return float("inf")
        scale = b.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        rows = [t.double().flatten(1) if t.ndim > 1 else t.double()[:, None] for t in (a, b)]
        distance = torch.cdist(rows[0] / scale, rows[1] / scale, p=float("inf")).cpu()
        distances = torch.maximum(distances, distance)
    return float(torch.maximum(distances.amin(0).max(), distances.amin(1).max()))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest magnitude expected; infinite where one of them is not finite alone."""
    a, b = found.double(), expected.double()
    if a.numel() == 0:
        return 0.0
    finite = torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), finite) or not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    difference = (a - b)[finite].abs()
    scale = b[finite].abs()
    if difference.numel() == 0 or difference.max() == 0:
        return 0.0
    return float(difference.max() / scale.max().clamp_min(torch.finfo(torch.float32).tiny))
