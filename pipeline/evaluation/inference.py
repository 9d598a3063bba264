"""Outputs of pruned candidates on fixed images, by the fastest backend that computes what the pruned network does.

Three observations carry it. One ONNX template is cut to any plan in milliseconds, and ONNX Runtime folds and fuses what
PyTorch runs one by one. Its convolutions work on blocks of channels, and a width between two blocks costs more than the
next block: widths are rounded up, and what is added is read with zeros. Where candidates differ in one group only,
everything before the group's readers is the same for all: it is computed once and kept, and a candidate is a mask.

Batch-norm statistics may be taken anew for each candidate first, on training images. They go into its weights like any
others, so every backend takes them; and before a group's readers they are the same for all as well.

Every backend is compared with the plain pruned network before it is used. What fails or computes something else is left
out, and the plain network remains.
"""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree

from secateur.export.errors import TemplateError
from secateur.export.slicing import OnnxTemplate
from secateur.export.verify import open_session
from secateur.pipeline.errors import UserError
from secateur.pipeline.training import precision
from secateur.pipeline.training.precision import DTYPES, Precision
from secateur.pipeline.training.statistics import moving_norms, recalibrate
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.masked_batch import MaskedBatchError, outputs_under_masks
from secateur.pruning.plan import Member, PruningPlan
from secateur.pruning.search.protocol import DENSE
from secateur.pruning.surgery import compare_outputs, relative_error
from secateur.pruning.weights import inherit

Array = npt.NDArray[Any]
State = Mapping[str, Tensor]
ForwardFn = Callable[[int, Tensor], Any]
"""Number of a batch and its images ``(n, channels, height, width)`` -> what the forward gives."""
Backend = Callable[[PruningPlan, State | None], ForwardFn]
"""Prepares the network of a plan, with weights of a dense-shaped state (None = the model's own)."""

TOLERANCE = precision.tolerance("fp32")
"""Largest relative error of a backend in float32."""
RANK_AGREEMENT = 0.99
"""Least Spearman correlation of plans' scores between a backend in bfloat16 and the plain network."""
BLOCKS = (16, 8, 1)
"""Channels per block on common vector units; 1 = widths stay as they are."""
CHUNKS = (16, 8, 32)
"""Images that go through ONNX Runtime at once: few enough for their activations to stay in the processor's cache."""
CHECK_IMAGES = 64
RANKED_PLANS = 12
REMEMBERED_PLANS = 32
MASKED_IMAGES = 256
"""Images that go through as one batch under several masks."""
FORWARDS = {
    "_plain": "PyTorch, fp32",
    "_folded": "PyTorch with batch norm folded, fp32",
    "_bf16": "PyTorch with batch norm folded, bf16",
    "_onnx": "ONNX Runtime, fp32",
}
"""What a backend is called in records."""
PLAIN = FORWARDS["_plain"]
SERVED = 4
"""Candidates that a cut must have served before the next group of the same plan is cut for its first."""


@dataclass(frozen=True)
class BackendTrial:
    """How a backend did when it was tried.

    Args:
        name: the backend.
        seconds: for one candidate on all images, extrapolated; infinite where it failed.
        error: largest relative error to the plain network; NaN where it failed.
        precision: the type it computes in.
        reason: why it is not used; empty if it may be.
    """

    name: str
    seconds: float
    error: float
    precision: Precision = "fp32"
    reason: str = ""


class ForwardError(UserError):
    """The one forward pass that a deterministic search may use failed twice for a candidate."""


_FINAL = (torch.OutOfMemoryError, MemoryError, ForwardError)
"""Failures that no other forward pass mends."""


class Inference:
    """Runs candidates of one network, in eval mode.

    Args:
        model: the unpruned network, on ``compute``; left as it is.
        graph: its channel groups.
        images: gives the batches, each of shape ``(n, channels, height, width)``, the same ones at every call.
        template: gives the network's ONNX template, made at batch 1, or None where there is none; called once at most.
        compute: where the images are, and where outputs will be.
        threads: of ONNX Runtime; None = as many as PyTorch uses.
        cache_bytes: bound of the activations kept for candidates that differ in one group.
        patience_s: what candidates may cost with the plain one before others are tried, which takes seconds itself.
        bf16: whether bfloat16 is tried; None = where the hardware multiplies it natively.

    Attributes:
        trials: how each backend did; empty before they were tried.
        used: by which forward pass the last candidate went; where that is another than it should have been, why.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        images: Callable[[], Iterable[Tensor]],
        template: Callable[[], OnnxTemplate | None],
        *,
        compute: torch.device,
        threads: int | None = None,
        cache_bytes: int = 1 << 30,
        patience_s: float = 5.0,
        bf16: bool | None = None,
    ) -> None:
        self.model, self.graph, self.images, self.compute = model, graph, images, compute
        self.trials: tuple[BackendTrial, ...] = ()
        self.used = ""
        self._open_template = template
        self._template: OnnxTemplate | None = None
        self._patience_s, self._cache_bytes, self._bf16_is_native = patience_s, cache_bytes, bf16
        threads = threads or torch.get_num_threads()
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self._clock = time.process_time if threads == 1 and compute.type == "cpu" else time.perf_counter
        self._fast: Backend = self._plain
        self._exact: Backend = self._plain
        self._pairs: list[tuple[str, str]] = []
        self._block, self._chunk = 1, CHUNKS[0]
        zeros_will_do = not graph.mixed and not graph.aliases
        self._not_zeroed = set() if zeros_will_do else {group.name for group in graph.groups}
        """Groups whose removed channels cannot be replaced by zeros."""
        self._not_cut = dict.fromkeys(self._not_zeroed, "its removed channels cannot be replaced by zeros")
        """Groups whose candidates run from the first layer on, and why."""
        self._seen: OrderedDict[tuple[str, str], PruningPlan] = OrderedDict()
        self._neighbours: Counter[tuple[str, str, str]] = Counter()
        self._branch: _Branch | None = None

    def outputs(
        self,
        plan: PruningPlan,
        base: str | None = DENSE,
        state: State | None = None,
        *,
        exact: bool = False,
        images: Iterable[Tensor] | None = None,
        training: Sequence[Tensor] = (),
    ) -> Iterator[Any]:
        """What the plan's network gives for each batch, in order; floating-point numbers as float32.

        Args:
            base: names the weights; None = they are of this plan alone.
            state: the weights in the unpruned network's shapes; None = the model's own.
            exact: not in bfloat16, even where that orders plans alike.
            images: other batches than the usual ones.
            training: batches of training images on which batch-norm statistics are taken anew; none = they are not. The
                same sequence for all candidates, so that what is computed from it can be kept.
        """
        started = time.perf_counter()
        if not self.trials and self._patience_s <= 0:
            self._try_backends()
        self.used = FORWARDS["_onnx"]
        run = None if images is not None or base is None else self._from_branch(plan, base, state, training)
        if run is None:
            state = self.recalibrated(plan, state, training, exact) if training else state
            run = self._prepared(plan, state, exact)
        for number, batch in enumerate(self.images() if images is None else images):
            with torch.inference_mode():
                try:
                    result = run(number, batch)
                except _FINAL:
                    raise
                except Exception as error:
                    if not self.trials:
                        raise
                    run = self._instead(plan, state, error)
                    result = run(number, batch)
            self._patience_s -= time.perf_counter() - started
            yield result
            started = time.perf_counter()

    def recalibrated(
        self, plan: PruningPlan, state: State | None, training: Sequence[Tensor], exact: bool = True
    ) -> State:
        """Weights in the unpruned network's shapes, with the batch-norm statistics that the plan's network has.

        Args:
            state: the weights, as in ``outputs``.
            training: batches of training images.
            exact: in float32, even where bfloat16 is the type of the forward pass.
        """
        network = inherit(self.model, self.graph, plan, state)
        dtype = DTYPES["fp32" if exact else self.precision]
        network.to(self.compute, dtype, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        for norm in moving_norms(network).values():
            norm.float()
        recalibrate(network, (images.to(dtype) for images in training))
        result = dict(self.model.state_dict() if state is None else state)
        slices = self.graph.slices(plan)
        for name, norm in moving_norms(network).items():
            for statistic in ("running_mean", "running_var"):
                tensor, found = f"{name}.{statistic}", getattr(norm, statistic)
                at = torch.as_tensor(slices.get(tensor, {}).get(0, range(len(result[tensor]))), device=found.device)
                result[tensor] = result[tensor].index_copy(0, at, found.to(result[tensor]))
        return result

    def under_masks(self, plans: Sequence[PruningPlan], state: State | None, images: Tensor) -> Iterator[Any]:
        """What each plan's network gives for the same images, in order; several go through at once, as masks.

        The first one is compared with the pruned network.

        Args:
            state: as for ``outputs``; one for all plans.
            images: a batch, shape ``(n, channels, height, width)``.

        Raises:
            MaskedBatchError: they cannot go through at once, or one by one they are faster.
        """
        if self._fast == self._onnx or not (self.trials or self.compute.type == "cuda"):
            raise MaskedBatchError("ONNX Runtime is faster, or nothing is known of what is fastest")
        network, dtype = self._without_norms(PruningPlan.full(self.graph.groups), state), DTYPES[self.precision]
        network.to(self.compute, dtype, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        at_once = max(1, MASKED_IMAGES // len(images))
        for start in range(0, len(plans), at_once):
            found = outputs_under_masks(network, self.graph, plans[start : start + at_once], images.to(dtype))
            found = [pytree.tree_map_only(Tensor, _as_float32, output) for output in found]
            if start == 0:
                expected = self._result(partial(self._folded, dtype=dtype), plans[0], images, state)
                certificate = compare_outputs(found[0], expected, precision.tolerance(self.precision))
                if certificate.reason:
                    raise MaskedBatchError(certificate.reason)
            yield from found

    @property
    def precision(self) -> Precision:
        """The type in which candidates go through, unless an answer has to be exact."""
        return "bf16" if self._fast == self._bf16 else "fp32"

    def describe(self) -> str:
        """The backends tried, fastest first, one line each; then the groups that are never cut at, and why."""
        if not self.trials:
            return "plain PyTorch; nothing else tried yet"
        lines = [
            f"{trial.name}: {trial.reason or _figures(trial)}"
            for trial in sorted(self.trials, key=lambda trial: (bool(trial.reason), trial.seconds))
        ]
        return "\n".join(lines + [f"not cut at {name}: {reason}" for name, reason in self._not_cut.items()])

    # -- backends ----------------------------------------------------------------------------------------------------

    def _prepared(self, plan: PruningPlan, state: State | None, exact: bool) -> ForwardFn:
        backend = self._exact if exact else self._fast
        self.used = FORWARDS.get(backend.__name__, backend.__name__)
        if backend == self._plain:
            return backend(plan, state)
        try:
            return backend(plan, state)
        except _FINAL:
            raise
        except Exception as failure:  # noqa: BLE001 - what this one cannot do, the plain one can, or says why not
            return self._instead(plan, state, failure)

    def _instead(self, plan: PruningPlan, state: State | None, failure: Exception) -> ForwardFn:
        """What a candidate goes through whose forward pass failed: the plain network, noted in ``used``."""
        if self.used != PLAIN:
            self.used = f"{PLAIN}, for {self.used} failed: {first_line(failure)}"
        return self._plain(plan, state)

    def _plain(self, plan: PruningPlan, state: State | None) -> ForwardFn:
        return self._eager(inherit(self.model, self.graph, plan, state), torch.float32)

    def _folded(self, plan: PruningPlan, state: State | None, dtype: torch.dtype = torch.float32) -> ForwardFn:
        return self._eager(self._without_norms(plan, state), dtype)

    def _without_norms(self, plan: PruningPlan, state: State | None) -> nn.Module:
        """The plan's network with its batch norms folded into the convolutions before them."""
        network = inherit(self.model, self.graph, plan, state).eval()
        for conv, norm in self._pairs:
            modules: Any = network.get_submodule(conv), network.get_submodule(norm)
            network.set_submodule(conv, fuse_conv_bn_eval(*modules))
            network.set_submodule(norm, nn.Identity())
        return network

    def _bf16(self, plan: PruningPlan, state: State | None) -> ForwardFn:
        return self._folded(plan, state, DTYPES["bf16"])

    def _eager(self, network: nn.Module, dtype: torch.dtype) -> ForwardFn:
        if dtype != torch.float32:
            network.to(dtype)
        network.to(self.compute, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        return lambda _, images: pytree.tree_map_only(Tensor, _as_float32, network(images.to(dtype)))

    def _onnx(self, plan: PruningPlan, state: State | None) -> ForwardFn:
        model = self._model(plan, state)
        (port,) = (port.name for port in model.graph.input)
        session = open_session(model.SerializeToString())
        return lambda _, images: _joined(self._spread(session, [{port: part} for part in self._parts(images)]))

    def _model(self, plan: PruningPlan, state: State | None) -> onnx.ModelProto:
        """The plan's ONNX model for any batch size, its widths rounded up to whole blocks."""
        if self._template is None:
            raise TemplateError("the network has no template")
        rounded = self._rounded(plan)
        weights, own = dict(state or {}), self.model.state_dict()
        if state is not None and not own.keys() <= state.keys():
            raise TemplateError("the state dict is not of the unpruned network")
        for group in self.graph.groups:
            added = rounded.mask(group.name) & ~plan.mask(group.name)
            for member in (m for m in group.members if m.reads and added.any()):
                weight = weights.get(member.tensor, own[member.tensor]).detach().clone()
                at = torch.from_numpy(member.index[added].ravel()).to(weight.device)
                weights[member.tensor] = weight.index_fill_(member.dim, at, 0)
        return _any_batch(onnx.load_from_string(self._template.slice(rounded, weights)))

    def _rounded(self, plan: PruningPlan) -> PruningPlan:
        kept = {}
        for name in plan.kept.keys() - self._not_zeroed:
            missing = -plan.widths[name] % self._block
            kept[name] = sorted([*plan.kept[name], *np.flatnonzero(~plan.mask(name))[:missing].tolist()])
        return plan.replace(kept)

    def _parts(self, images: Tensor) -> list[Array]:
        return [part.float().contiguous().numpy() for part in torch.split(images, self._chunk)]

    def _spread(self, session: onnxruntime.InferenceSession, feeds: Sequence[Mapping[str, Array]]) -> list[list[Array]]:
        """One thread per chunk: the operators are too small to be shared by several."""
        run = partial(session.run, None)
        return list(self._pool.map(run, feeds) if self._pool else map(run, feeds))

    # -- trying them -------------------------------------------------------------------------------------------------

    def _try_backends(self) -> None:
        """Compare all backends with the plain one on a few images, and take the fastest that computes the same."""
        num_images = sum(len(batch) for batch in self.images())
        images = next(iter(self.images()))[:CHECK_IMAGES]
        rng = np.random.default_rng(0)
        plan = self._random_plan(rng)
        expected = self._result(self._plain, plan, images)
        self._pairs = _foldable(self.model)

        def attempt(name: str, backend: Backend, number_type: Precision = "fp32") -> tuple[BackendTrial, Backend]:
            exact = number_type == "fp32"
            try:
                with torch.inference_mode():
                    prepared, run = self._timed(lambda: backend(plan, None))
                    found = run(0, images)
                    once = min(self._timed(lambda: run(0, images))[0] for _ in range(3))
                certificate = compare_outputs(found, expected, TOLERANCE if exact else math.inf)
                reason = certificate.reason
                if not exact and not reason and not self._orders_alike(backend, images, rng):
                    reason = "orders plans differently"
            except Exception as failure:  # noqa: BLE001 - a foreign forward may raise anything
                return BackendTrial(name, math.inf, math.nan, number_type, first_line(failure)), backend
            seconds = prepared + once * num_images / len(images)
            return BackendTrial(name, seconds, certificate.max_relative_error, number_type, reason), backend

        tried = [attempt("PyTorch", self._plain), attempt("PyTorch, batch norm folded", self._folded)]
        if self._bf16_is_native if self._bf16_is_native is not None else precision.native_bf16(self.compute):
            tried.append(attempt("PyTorch, batch norm folded, bfloat16", self._bf16, "bf16"))
        if self.compute.type == "cpu":
            tried += self._try_onnx(attempt)
        usable = sorted((t for t in tried if not t[0].reason), key=lambda t: t[0].seconds)
        self.trials = tuple(trial for trial, _ in tried)
        self._fast = next((backend for _, backend in usable), self._plain)
        self._exact = next((backend for trial, backend in usable if trial.precision == "fp32"), self._plain)

    def _try_onnx(
        self, attempt: Callable[[str, Backend], tuple[BackendTrial, Backend]]
    ) -> list[tuple[BackendTrial, Backend]]:
        """Find the best size of blocks, then of chunks; no template is left where none works."""
        try:
            self._template = self._open_template()
        except Exception as failure:  # noqa: BLE001 - whatever the exporter raises for a foreign network
            return [(BackendTrial("ONNX Runtime", math.inf, math.nan, reason=first_line(failure)), self._plain)]
        tried: dict[tuple[int, int], BackendTrial] = {}

        def try_setting(block: int, chunk: int) -> tuple[int, int]:
            self._block, self._chunk = block, chunk
            name = f"ONNX Runtime, blocks of {block} channels, {chunk} images at once"
            tried[block, chunk] = attempt(name, self._onnx)[0]
            return min(tried, key=lambda setting: (bool(tried[setting].reason), tried[setting].seconds))

        best = BLOCKS[0], CHUNKS[0]
        for block in BLOCKS:
            best = try_setting(block, CHUNKS[0])
        for chunk in CHUNKS[1:]:
            best = try_setting(best[0], chunk)
        self._block, self._chunk = best
        if tried[best].reason:
            self._template = None
        return [(trial, self._onnx) for trial in tried.values()]

    def _orders_alike(self, backend: Backend, images: Tensor, rng: np.random.Generator) -> bool:
        """Whether plans come in the same order, by the distance of their outputs from the unpruned network's."""
        dense = self._result(self._plain, PruningPlan.full(self.graph.groups), images)
        plans = [self._random_plan(rng) for _ in range(RANKED_PLANS)]
        scores = [[_distance(self._result(w, plan, images), dense) for plan in plans] for w in (self._plain, backend)]
        ranks = np.argsort(np.argsort(scores, axis=1), axis=1)
        return bool(np.corrcoef(ranks).min() >= RANK_AGREEMENT)

    def _result(self, backend: Backend, plan: PruningPlan, images: Tensor, state: State | None = None) -> Any:
        with torch.inference_mode():
            return backend(plan, state)(0, images)

    def _timed(self, action: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds and result; CPU time of a single thread, so that other load on the machine decides nothing."""
        started = self._clock()
        result = action()
        if self.compute.type == "cuda":
            torch.cuda.synchronize(self.compute)
        return self._clock() - started, result

    def _random_plan(self, rng: np.random.Generator) -> PruningPlan:
        masks = {}
        for group in self.graph.groups:
            width = max(1, round(group.size * rng.uniform(0.5, 1.0)))
            masks[group.name] = rng.permutation(group.size) < width
        return PruningPlan.from_masks(masks)

    # -- candidates that differ in one group -------------------------------------------------------------------------

    def _from_branch(
        self, plan: PruningPlan, base: str, state: State | None, training: Sequence[Tensor]
    ) -> ForwardFn | None:
        """From kept activations on, where a plan seen before gets a second neighbour in a group.

        A neighbour in the next group is enough if the last cut of that plan served several candidates.
        """
        if self._template is None:
            return None
        branch = self._branch
        if branch is None or branch.seen[0] != base or branch.training is not training or not branch.covers(plan):
            found = self._neighbour(plan, base)
            if found is None:
                self._seen[base, plan.digest] = plan
                if len(self._seen) > REMEMBERED_PLANS:
                    self._seen.popitem(last=False)
                return None
            key, name = found
            self._seen.move_to_end(key)
            self._neighbours[(*key, name)] += 1
            usual = branch is not None and branch.seen == key and branch.served >= SERVED
            if self._neighbours[(*key, name)] < 2 and not usual:
                return None
            self._branch = branch = None  # its activations go before new ones come
            self._branch = branch = self._cut(key, name, plan, state, training)
            if branch is None:
                return None
        branch.served += 1
        return self._continued(branch, plan)

    def _continued(self, branch: _Branch, plan: PruningPlan) -> Callable[[int | None, Tensor], Tensor]:
        """A candidate of a branch: its masks, and its own statistics from the masks on."""
        masks = branch.masks(plan)
        after = self._recalibrated_after(branch, masks) if branch.trained_on else branch.after
        return partial(self._continue, branch, after, masks)

    def _recalibrated_after(self, branch: _Branch, masks: Mapping[str, Array]) -> onnxruntime.InferenceSession:
        """The part behind the masks, with statistics taken from the kept activations of training images."""
        run = partial(branch.statistics.run, None)
        feeds = [{**feed, **masks} for feed in branch.trained_on]
        found = list(self._pool.map(run, feeds) if self._pool else map(run, feeds))
        return branch.with_statistics(found)

    def _neighbour(self, plan: PruningPlan, base: str) -> tuple[tuple[str, str], str] | None:
        """The last plan seen that differs in one group only, and the group."""
        for key, other in reversed(self._seen.items()):
            if key[0] == base:
                different = [name for name, kept in plan.kept.items() if kept != other.kept[name]]
                if len(different) == 1 and different[0] not in self._not_cut:
                    return key, different[0]
        return None

    def _cut(
        self, key: tuple[str, str], name: str, plan: PruningPlan, state: State | None, training: Sequence[Tensor]
    ) -> _Branch | None:
        """The network of a plan seen, cut where the group is read; None, and why, where that cannot be done right."""
        seen = self._seen[key]
        if not plan.is_within(seen):
            seen = seen.replace({name: range(seen.sizes[name])})
        images = next(iter(self.images()))[: self._chunk]

        def of(plan: PruningPlan) -> State | None:
            return self.recalibrated(plan, state, training) if training else state

        try:
            readers = [member for member in self.graph.group(name).members if member.reads]
            slices = self.graph.slices(self._rounded(seen))
            branch = _Branch(self._model(seen, of(seen)), key, name, seen, readers, slices, self._parts(images)[0])
            if training:
                branch.training, branch.num_bytes = training, branch.bytes_per_image * sum(map(len, training))
                if branch.num_bytes > self._cache_bytes:
                    raise TemplateError("the activations of the training images do not fit into search.memory_mb")
                branch.take_statistics(training, moving_norms(self.model))
            expected = self._onnx(plan, of(plan))(0, images)
            found = self._continued(branch, plan)(None, images)
        except Exception as failure:  # noqa: BLE001 - it runs like any other plan; ``describe`` says why
            self._not_cut[name] = first_line(failure)
            return None
        error = relative_error(found, expected)
        if error > TOLERANCE:
            self._not_cut[name] = f"relative error {error:.0e}"
            return None
        return branch

    def _continue(
        self,
        branch: _Branch,
        after: onnxruntime.InferenceSession,
        masks: Mapping[str, Array],
        number: int | None,
        images: Tensor,
    ) -> Tensor:
        """Outputs of a batch, from the activations kept for it; they are computed and kept if there is room.

        Args:
            after: the part behind the masks.
            number: of the batch; None = keep nothing.
        """
        feeds = branch.kept.get(number) if number is not None else None
        if feeds is None:
            inputs = [{branch.port: part} for part in self._parts(images)]
            feeds = [dict(zip(branch.crossing, r, strict=True)) for r in self._spread(branch.before, inputs)]
            num_bytes = branch.num_bytes + len(images) * branch.bytes_per_image
            if number is not None and num_bytes <= self._cache_bytes:
                branch.kept[number], branch.num_bytes = feeds, num_bytes
        return _joined(self._spread(after, [{**feed, **masks} for feed in feeds]))


class _Branch:
    """The network of a plan in two parts: up to where one group is read, and from there on with masks on what is read.

    Args:
        model: the network of ``plan``, for any batch size.
        seen: base and digest of the plan that candidates are neighbours of.
        name: the group.
        plan: what is kept; candidates keep a part of it in the group, and the same everywhere else.
        readers: the group's members that are summed over.
        slices: tensor name -> dimension -> positions of the unpruned network that are in ``model``.
        sample: some images, shape ``(n, channels, height, width)``.

    Raises:
        TemplateError: a reader is neither a plain convolution nor a linear layer.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        seen: tuple[str, str],
        name: str,
        plan: PruningPlan,
        readers: Sequence[Member],
        slices: Mapping[str, Mapping[int, npt.NDArray[np.int64]]],
        sample: Array,
    ) -> None:
        self.seen, self.name, self.plan, self.served = seen, name, plan, 0
        self.port: str = model.graph.input[0].name
        self.kept: dict[int, list[dict[str, Array]]] = {}
        self.num_bytes = 0
        self.training: Sequence[Tensor] = ()
        self.trained_on: list[dict[str, Array]] = []
        self._masks: dict[str, tuple[Member, Array, int]] = {}
        for member in readers:
            self._mask(model.graph, member, slices.get(member.tensor, {}).get(member.dim))
        live = _downstream(model.graph.node, {self.port})
        masked = _downstream(model.graph.node, set(self._masks))
        read = {name for node in model.graph.node if masked & set(node.output) for name in node.input}
        self.crossing = sorted((read & live | (read & {self.port})) - masked - set(self._masks))
        outputs = [onnx.ValueInfoProto(name=name) for name in self.crossing]
        self._ahead = _part(model, model.graph.input[:1], outputs)
        self.before = open_session(self._ahead.SerializeToString())
        arrays = self.before.run(None, {self.port: sample})
        self.bytes_per_image = sum(array.nbytes for array in arrays) // len(sample)
        inputs = [_value_info(name, array) for name, array in zip(self.crossing, arrays, strict=True)]
        inputs += model.graph.input[1:]
        self._behind = _part(model, inputs, model.graph.output)

    @cached_property
    def after(self) -> onnxruntime.InferenceSession:
        """The part behind the masks, with the statistics that the whole plan has."""
        return open_session(self._behind.SerializeToString())

    def take_statistics(self, training: Sequence[Tensor], norms: Mapping[str, _BatchNorm]) -> None:
        """Keep what batches of training images come to at the cut, for ``statistics`` of what lies behind it.

        Every batch goes through whole, normalised by its own statistics.

        Args:
            training: each of shape ``(n, channels, height, width)``.
            norms: path -> those whose statistics are taken; others stay as they are.

        Raises:
            TemplateError: one of them is not of images.
        """
        self._norms, behind = _by_the_batch(self._behind, norms)
        if not self._norms:
            return
        outputs = [output.name for output in self._ahead.graph.output]
        ahead = open_session(_by_the_batch(self._ahead, norms, outputs)[1].SerializeToString())
        for images in training:
            arrays = ahead.run(outputs, {self.port: images.float().contiguous().numpy()})
            self.trained_on.append(dict(zip(self.crossing, arrays, strict=True)))
        self.statistics = open_session(behind.SerializeToString())

    def with_statistics(self, batches: Sequence[Sequence[Array]]) -> onnxruntime.InferenceSession:
        """The part behind the masks, with the average of what ``statistics`` said of batches."""
        places = {tensor.name: tensor for tensor in self._behind.graph.initializer}
        columns: list[Array] = [np.asarray(np.mean(values, axis=0)) for values in zip(*batches, strict=True)]
        for node, mean, variance, size in zip(self._norms, columns[::3], columns[1::3], columns[2::3], strict=True):
            count = float(size) / len(mean)
            unbiased = variance * (count / max(1.0, count - 1))
            for name, value in zip(node.input[3:5], (mean, unbiased), strict=True):
                places[name].CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))
        return open_session(self._behind.SerializeToString())

    def covers(self, plan: PruningPlan) -> bool:
        """Whether a plan is this one, or keeps less of the group and the same of all others."""
        others = (kept == self.plan.kept[name] for name, kept in plan.kept.items() if name != self.name)
        return all(others) and set(plan.kept[self.name]) <= set(self.plan.kept[self.name])

    def masks(self, plan: PruningPlan) -> dict[str, Array]:
        """What the inputs of the readers are multiplied by."""
        removed = ~plan.mask(self.name)
        result = {}
        for port, (member, positions, ndim) in self._masks.items():
            gone = np.isin(positions, member.index[removed])
            result[port] = (~gone).astype(np.float32).reshape(1, -1, *[1] * (ndim - 2))
        return result

    def _mask(self, graph: onnx.GraphProto, member: Member, positions: npt.NDArray[np.int64] | None) -> None:
        """Multiply by a new input of the graph what the operators with this weight read."""
        (weight,) = (tensor for tensor in graph.initializer if tensor.name == member.tensor)
        at = np.arange(weight.dims[member.dim]) if positions is None else positions
        port = f"{member.tensor}_mask"
        self._masks[port] = member, at, len(weight.dims)
        shape = [1, len(at)] + [1] * (len(weight.dims) - 2)
        graph.input.append(helper.make_tensor_value_info(port, onnx.TensorProto.FLOAT, shape))
        nodes = []
        for node in graph.node:
            if member.tensor in node.input:
                values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
                plain = node.op_type == "Conv" and values.get("group", 1) == 1
                plain |= node.op_type == "Gemm" and values.get("transB") == 1 and not values.get("transA")
                if not plain or member.dim != 1 or list(node.input).index(member.tensor) != 1:
                    raise TemplateError(f"{node.op_type} reads {member.tensor}: what it reads cannot be masked")
                product = f"{node.output[0]}_masked"
                nodes.append(helper.make_node("Mul", [node.input[0], port], [product]))
                node.input[0] = product
            nodes.append(node)
        made = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(made)


def _downstream(nodes: Iterable[onnx.NodeProto], sources: set[str]) -> set[str]:
    """Values that depend on some of the sources."""
    reached: set[str] = set()
    for node in nodes:
        if not (sources | reached).isdisjoint(node.input):
            reached.update(node.output)
    return reached


def _part(
    model: onnx.ModelProto, inputs: Iterable[onnx.ValueInfoProto], outputs: Iterable[onnx.ValueInfoProto]
) -> onnx.ModelProto:
    """The nodes between some values and others; inputs that are not needed are left out."""
    inputs, outputs = list(inputs), list(outputs)
    given, wanted = {port.name for port in inputs}, {port.name for port in outputs}
    nodes = []
    for node in reversed(model.graph.node):
        if not (wanted - given).isdisjoint(node.output):
            nodes.append(node)
            wanted.update(node.input)
    weights = [tensor for tensor in model.graph.initializer if tensor.name in wanted]
    inputs = [port for port in inputs if port.name in wanted]
    graph = helper.make_graph(nodes[::-1], "part", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _by_the_batch(
    model: onnx.ModelProto, norms: Mapping[str, _BatchNorm], outputs: Sequence[str] = ()
) -> tuple[list[onnx.NodeProto], onnx.ModelProto]:
    """The batch norms of a model, and the model with each of them normalising by the statistics of the batch.

    Its outputs are the mean and the (biased) variance of each, shape ``(channels,)``, and the number of values.

    Args:
        norms: path -> those that are meant.
        outputs: the model's outputs that are wanted instead.

    Raises:
        TemplateError: one is not of images.
    """
    paths = {f"{path}.running_mean": path for path in norms}
    found: list[onnx.NodeProto] = []
    nodes, said = [], []
    axes = numpy_helper.from_array(np.array([0, 2, 3]), "secateur_axes")
    for node in model.graph.node:
        if node.op_type != "BatchNormalization" or node.input[3] not in paths:
            nodes.append(node)
            continue
        if not isinstance(norms[paths[node.input[3]]], nn.BatchNorm2d):
            raise TemplateError(f"the batch norm {paths[node.input[3]]} is not of images")
        x, y = node.input[0], node.output[0]
        mean, square, squared = f"{y}_mean", f"{y}_square", f"{y}_squared"
        second, variance, size = f"{y}_second", f"{y}_variance", f"{y}_size"
        nodes += [
            helper.make_node("ReduceMean", [x, axes.name], [mean], keepdims=0),
            helper.make_node("Mul", [x, x], [square]),
            helper.make_node("ReduceMean", [square, axes.name], [second], keepdims=0),
            helper.make_node("Mul", [mean, mean], [squared]),
            helper.make_node("Sub", [second, squared], [f"{y}_difference"]),
            helper.make_node("Relu", [f"{y}_difference"], [variance]),
            helper.make_node("Size", [x], [size]),
        ]
        moved = onnx.NodeProto.FromString(node.SerializeToString())
        moved.input[3], moved.input[4] = mean, variance
        nodes.append(moved)
        found.append(node)
        said += [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in (mean, variance)]
        said.append(helper.make_tensor_value_info(size, onnx.TensorProto.INT64, None))
    wanted = [port for port in model.graph.output if port.name in outputs] or said
    graph = helper.make_graph(nodes, "statistics", model.graph.input, wanted, [*model.graph.initializer, axes])
    return found, helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _value_info(name: str, array: Array) -> onnx.ValueInfoProto:
    """An input like an array, of any length in its first dimension."""
    shape = [None if d == 0 else n for d, n in enumerate(array.shape)]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), shape)


def _any_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """Free a model of its batch size 1, where that stands in ports and in the targets of reshapes; in place."""
    graph = model.graph
    for port in [*graph.input, *graph.output]:
        if port.type.tensor_type.shape.dim:
            port.type.tensor_type.shape.dim[0].dim_param = "batch"
    values = {node.output[0]: node for node in graph.node if node.op_type == "Constant"}
    nodes = []
    for node in graph.node:
        if node.op_type == "Reshape" and node.input[1] in values:
            value = helper.get_attribute_value(values[node.input[1]].attribute[0])
            target = numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.array(value)
            if target.ndim == 1 and len(target) > 1 and target[0] == 1:
                name = f"{node.output[0]}_any_batch"
                free = numpy_helper.from_array(np.array([0, *target[1:]]))
                nodes.append(helper.make_node("Constant", [], [name], value=free))
                node.input[1] = name
        nodes.append(node)
    made = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(made)
    return model


def _foldable(model: nn.Module) -> list[tuple[str, str]]:
    """Paths of convolutions and of the batch norms that alone read them; none where the code cannot be traced."""
    try:
        nodes = list(torch.fx.Tracer().trace(model).nodes)
    except Exception:  # noqa: BLE001 - a forward that looks at its values raises many kinds
        return []
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    pairs = []
    for node in nodes:
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
        if not isinstance(before, torch.fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        conv, norm = str(before.target), str(node.target)
        first, second = model.get_submodule(conv), model.get_submodule(norm)
        if not isinstance(second, _BatchNorm) or second.running_mean is None or is_parametrized(first):
            continue
        if isinstance(first, nn.Conv1d | nn.Conv2d | nn.Conv3d) and calls[conv] == calls[norm] == 1:
            pairs.append((conv, norm))
    return pairs


def _joined(results: Sequence[Sequence[Array]]) -> Tensor:
    """One tensor of the outputs of all chunks."""
    if len(results[0]) != 1:
        raise TemplateError(f"the network has {len(results[0])} outputs")
    return torch.from_numpy(np.concatenate([output for (output,) in results]))


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _distance(found: Any, expected: Any) -> float:
    """Mean absolute difference of all numbers of two outputs."""
    pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True)
    differences = [(a - b).abs().mean().item() for a, b in pairs if isinstance(a, Tensor) and a.is_floating_point()]
    return float(np.mean(differences))


def _figures(trial: BackendTrial) -> str:
    """How a backend did that can be used; without a time, where none was taken."""
    error = f"relative error {trial.error:.0e}"
    return error if math.isnan(trial.seconds) else f"{trial.seconds:.3g} s for a candidate, {error}"


def first_line(failure: Exception) -> str:
    """Kind and first line of an exception, short enough for a record."""
    return f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
