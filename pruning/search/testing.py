"""What every search method promises, as checks that an author of one runs on it; and a study to run it on.

``check_method(module)`` makes all checks; a test that wants each of them by name goes through ``CHECKS``. They need no
network, no device and no pytest, and take about a second: the study is made of arithmetic. Every channel is worth a
fixed amount of accuracy, so the best plans are known.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from secateur.pruning.plan import ChannelGroup, PruningPlan, SearchSpace
from secateur.pruning.search.protocol import (
    DENSE,
    RANDOM,
    Answer,
    Archive,
    AuxiliaryTrained,
    AuxiliaryTraining,
    Budget,
    Candidate,
    Distort,
    Entry,
    Evaluate,
    Evaluation,
    FineTune,
    FineTuned,
    Goal,
    Left,
    MaskedLoss,
    Predict,
    Problem,
    Remaining,
    Request,
    Score,
    Strategy,
    Time,
)

FloatArray = npt.NDArray[np.float64]

BASELINE = 0.9
GOAL = Goal(macs_ratio=0.6)
SPACES: Mapping[str, tuple[tuple[int, ...], int, tuple[str, ...]]] = {
    "fine": ((8, 12, 16), 1, ()),
    "coarse": ((64, 24, 64), 8, ("layer1.conv1",)),
}
"""Channels of each group, the multiple their widths keep, and the groups that stay as they are."""


def chain(*sizes: int) -> list[ChannelGroup]:
    """Groups of a plain chain of convolutions."""
    return [ChannelGroup(f"layer{i}.conv1", size) for i, size in enumerate(sizes)]


@dataclass
class FakeStudy:
    """Answers the requests of a strategy.

    Accuracy of a candidate = accuracy of its base less the value of the channels it removes from the base's plan;
    fine-tuning wins back half of what is lost. Latency falls with the square root of the MACs. Every criterion scores a
    channel by its value; feature maps are as far apart as the channels' values.
    """

    space: SearchSpace
    value: dict[str, FloatArray] = field(default_factory=dict)
    fails: Callable[[Candidate], bool] = lambda candidate: False
    log: list[tuple[Request, Answer]] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(7)
        for name, size in self.space.full.sizes.items():
            self.value.setdefault(name, rng.random(size) * BASELINE / len(self.space.full.sizes) / size)
        self.weights = {DENSE: (self.space.full, BASELINE), RANDOM: (self.space.full, 0.1)}

    def macs(self, plan: PruningPlan) -> float:
        widths = [3, *plan.widths.values(), 10]
        return 100.0 * sum(a * b for a, b in pairwise(widths))

    def latency(self, plan: PruningPlan) -> float:
        """Latency ratio to the unpruned network; another one may be given in a class of your own."""
        return float((self.macs(plan) / self.macs(self.space.full)) ** 0.5)

    def costs(self, widths: npt.NDArray[np.int64]) -> dict[str, FloatArray]:
        """Costs of width vectors of the space, shape (plans, groups)."""
        macs = np.array([self.macs(self.plan_of(row)) for row in widths], dtype=float)
        return {"macs": macs, "params": macs / 100, "activation_bytes": 4.0 * widths.sum(axis=1)}

    def plan_of(self, widths: Sequence[int]) -> PruningPlan:
        """The plan that keeps the first channels of every group."""
        return self.space.full.replace({n: range(int(w)) for n, w in zip(self.space.names, widths, strict=True)})

    def top1(self, candidate: Candidate) -> float:
        plan, accuracy = self.weights[candidate.base]
        assert candidate.plan.is_within(plan), "a candidate needs channels its base no longer has"
        return accuracy - sum(
            float(self.value[n][list(set(plan.kept[n]) - set(candidate.plan.kept[n]))].sum()) for n in plan.kept
        )

    def metrics(self, plan: PruningPlan, top1: float, *, latency: bool) -> Evaluation:
        macs = self.macs(plan)
        metrics = {"top1": top1, "loss": 1 - top1, "macs": macs, "params": macs / 100, "size_bytes": macs / 25}
        ratio = self.latency(plan)
        return Evaluation(metrics=metrics | ({"latency_ratio": ratio, "p50_ms": 5 * ratio} if latency else {}))

    def evaluate(self, candidate: Candidate, *, latency: bool, floor: float | None = None) -> Evaluation:
        if self.fails(candidate):
            return Evaluation("failed", "the fake says so")
        if floor is not None and self.top1(candidate) < floor:
            return Evaluation("infeasible", "cannot reach the floor")
        return self.metrics(candidate.plan, self.top1(candidate), latency=latency)

    def __call__(self, request: Request) -> Answer:
        answer = self.answer(request)
        self.log.append((request, answer))
        return answer

    def answer(self, request: Request) -> Answer:
        if isinstance(request, Evaluate):
            return tuple(self.evaluate(c, latency=request.latency, floor=request.floor) for c in request.candidates)
        if isinstance(request, FineTune):
            if self.fails(request.candidate):
                return FineTuned("", Evaluation("failed", "the fake says so"))
            top1 = (self.top1(request.candidate) + BASELINE) / 2
            base = f"tuned-{request.candidate.id}"
            plan, accuracy = self.weights[request.candidate.base]
            whole = plan, (accuracy + BASELINE) / 2  # every channel is there, all of them a little better
            self.weights[base] = whole if request.write_back else (request.candidate.plan, top1)
            return FineTuned(base, self.metrics(request.candidate.plan, top1, latency=request.latency))
        if isinstance(request, MaskedLoss):
            return np.array([1 - self.top1(Candidate(0, plan, "probe", (), request.base)) for plan in request.plans])
        if isinstance(request, Distort):
            names = dict.fromkeys(name for removed in request.removed for name in removed)
            return {name: np.array([self.damage(name, removed) for removed in request.removed]) for name in names}
        if isinstance(request, Time):
            return np.array([self.latency(plan) for plan in request.plans])
        if isinstance(request, Predict):
            return {}  # no model to be trusted
        if isinstance(request, Remaining):
            return Left(spent=dict.fromkeys(("evaluations", "seconds", "epochs", "work"), 0.0))
        if isinstance(request, AuxiliaryTraining):
            base = f"learned-{len(self.weights)}"
            self.weights[base] = self.space.full, BASELINE - 0.05
            return AuxiliaryTrained(base, self.value, self.metrics(self.space.full, BASELINE - 0.05, latency=False))
        return self.saliency(request)

    def damage(self, name: str, removed: Mapping[str, tuple[int, ...]]) -> float:
        return float(self.value[name][list(removed[name])].sum()) if name in removed else float("nan")

    def saliency(self, request: Score) -> dict[str, FloatArray]:
        plan = request.plan or self.space.full
        scores: dict[str, FloatArray] = {}
        for name, value in self.value.items():
            gone = ~plan.mask(name)
            answer = np.abs(value[:, None] - value[None]) if request.criterion == "feature_distance" else value.copy()
            if request.criterion == "feature_distance":
                answer[gone], answer[:, gone] = np.inf, np.inf
            else:
                answer[gone] = -np.inf
            scores[name] = answer
        return scores

    @property
    def requests(self) -> list[Request]:
        return [request for request, _ in self.log if not isinstance(request, Remaining)]

    @property
    def candidates(self) -> list[Candidate]:
        """Everything that was proposed, in ask order."""
        asked: list[Candidate] = []
        for request in self.requests:
            if isinstance(request, Evaluate):
                asked += request.candidates
            elif isinstance(request, FineTune):
                asked.append(request.candidate)
        return asked

    def problem(self, goal: Goal = Goal(), seed: int = 0, budget: Budget = Budget()) -> Problem:  # noqa: B008
        return Problem(
            self.space,
            reference=self.metrics(self.space.full, BASELINE, latency=True),
            reward=lambda e: e["top1"] - 0.1 * e["macs"] / self.macs(self.space.full),
            costs=self.costs,
            goal=goal,
            rng=np.random.default_rng(seed),
            budget=budget,
        )


def drive(strategy: Strategy, answer: Callable[[Request], Answer]) -> Archive:
    """Run a strategy to its end."""
    try:
        request = next(strategy)
        while True:
            request = strategy.send(answer(request))
    except StopIteration as end:
        archive: Archive = end.value
        return archive


def at_the_target(fake: FakeStudy, plan: PruningPlan, target: float) -> bool:
    """Whether a plan's MACs are 0.99 to 1.00 of a ratio, or no single step fits any more."""
    space, whole = fake.space, fake.macs(fake.space.full)
    wider = [{**plan.widths, n: space.above(n, plan.widths[n])} for n in space.names]
    steps = [fake.macs(space.full.replace({n: range(w) for n, w in ws.items()})) for ws in wider if ws != plan.widths]
    ratio = fake.macs(plan) / whole
    return ratio <= target and (ratio >= 0.99 * target or all(macs > target * whole for macs in steps))


def study(sizes: Sequence[int] = (16, 24, 32), channel_multiple: int = 1, **space: Any) -> FakeStudy:
    """A study of a chain of convolutions."""
    return FakeStudy(SearchSpace.of(chain(*sizes), channel_multiple=channel_multiple, **space))


# -- what a method promises --------------------------------------------------------------------------------------------


def check_method(module: Any) -> None:
    """Every check of a method.

    Args:
        module: what has ``Options`` and ``search``, as a module of ``secateur.pruning.search.methods`` does.

    Raises:
        AssertionError: the method breaks a promise; the function it comes from says which.
    """
    for check in CHECKS:
        check(module)


def check_description(module: Any) -> None:
    """The docstring begins with one sentence of 20 to 110 characters, which lists show."""
    first = (inspect.getdoc(module) or "").partition("\n")[0]
    assert re.fullmatch(r"[A-Z].{20,110}\.", first), f"{first!r} is no sentence for a list"


def check_options(module: Any) -> None:
    """Options are a frozen dataclass with defaults; each is documented, and an unknown one is refused."""
    options: Any = module.Options
    assert dataclasses.is_dataclass(options) and vars(options)["__dataclass_params__"].frozen
    for option in dataclasses.fields(options):
        text = rf"^\s+{option.name}: \S"
        assert re.search(text, options.__doc__ or "", re.MULTILINE), f"option {option.name} is not documented"
    adapter = TypeAdapter(options)
    assert adapter.validate_python({}) == module.Options()
    try:
        adapter.validate_python({"no_such_option": 1})
    except ValidationError:
        return
    raise AssertionError("an option that does not exist is taken; set __pydantic_config__ = {'extra': 'forbid'}")


def check_seed(module: Any) -> None:
    """The same seed finds the same, and the global random numbers are neither used nor moved."""
    for space in SPACES:
        fake, twin = of_space(space), of_space(space)
        before = random.getstate(), _numpy_state()
        archive = run(module, fake)
        assert (random.getstate(), _numpy_state()) == before, "global random numbers were drawn"
        random.seed(1)
        np.random.seed(1)
        assert plain(run(module, twin)) == plain(archive)
        assert twin.requests == fake.requests


def check_replay(module: Any) -> None:
    """The same answers lead to the same requests: this is how a run is resumed."""
    for space in SPACES:
        fake, archive = _first_run(module, space)
        log = list(fake.log)

        def replay(request: Request, log: list[tuple[Request, Answer]] = log) -> Answer:
            recorded, answer = log.pop(0)
            assert request == recorded
            return answer

        again = drive(module.search(fake.problem(GOAL), module.Options()), replay)
        assert log == []
        assert plain(again) == plain(archive)


def check_candidates(module: Any) -> None:
    """Ids count up from 0 in the order of asking, parents come first, and every candidate tells its origin."""
    for space in SPACES:
        fake, _ = _first_run(module, space)
        assert [c.id for c in fake.candidates] == list(range(len(fake.candidates)))
        assert all(parent < c.id for c in fake.candidates for parent in c.parents)
        assert all(c.origin for c in fake.candidates)


def check_plans(module: Any) -> None:
    """Every plan lies in the space, and its indices are plain integers, as JSON has them."""
    for name in SPACES:
        fake, _ = _first_run(module, name)
        space = fake.space
        for candidate in fake.candidates:
            assert candidate.plan.sizes == space.full.sizes
            for group, kept in candidate.plan.kept.items():
                assert all(type(i) is int for i in kept), "an index is no plain integer"
                assert len(kept) in space.allowed.get(group, (space.full.sizes[group],))


def check_bases(module: Any) -> None:
    """A candidate's base was trained before, and has every channel that the candidate keeps."""
    for space in SPACES:
        fake, _ = _first_run(module, space)
        plans = {DENSE: fake.space.full, RANDOM: fake.space.full}
        for request, answer in fake.log:
            asked = request.candidates if isinstance(request, Evaluate) else ()
            asked = (request.candidate,) if isinstance(request, FineTune) else asked
            assert all(c.plan.is_within(plans[c.base]) for c in asked)
            if isinstance(request, FineTune) and isinstance(answer, FineTuned):
                plans[answer.base] = plans[request.candidate.base] if request.write_back else request.candidate.plan
            elif isinstance(answer, AuxiliaryTrained):
                plans[answer.base] = fake.space.full


def check_requests(module: Any) -> None:
    """No request asks for nothing."""
    for space in SPACES:
        fake, _ = _first_run(module, space)
        assert all(request.candidates for request in fake.requests if isinstance(request, Evaluate))


def check_archive(module: Any) -> None:
    """The archive is a tuple of candidates that were asked for, evaluated and can be ranked; it is not empty."""
    for space in SPACES:
        fake, archive = _first_run(module, space)
        assert isinstance(archive, tuple) and archive
        asked = {c.id: c for c in fake.candidates}
        for entry in archive:
            assert isinstance(entry, Entry)
            assert dataclasses.replace(asked[entry.candidate.id], base=entry.candidate.base) == entry.candidate
            assert entry.evaluation.status == "ok"
            assert not np.isnan(fake.problem().reward(entry.evaluation))


def check_macs_goal(module: Any) -> None:
    """A goal in MACs is met, and not by a network of next to nothing."""
    for space in SPACES:
        fake, archive = _first_run(module, space)
        within = float(GOAL.macs_ratio or 1) * fake.macs(fake.space.full)
        assert min(entry.evaluation["macs"] for entry in archive) <= within
        assert max(archive, key=lambda e: e.evaluation["macs"] <= within).evaluation["macs"] > 0.2 * within


def check_latency_goal(module: Any) -> None:
    """A goal in latency alone is met."""
    fake = of_space("fine")
    archive = drive(module.search(fake.problem(Goal(latency_ratio=0.8)), module.Options()), fake)
    full = fake.macs(fake.space.full)
    assert min((fake.macs(entry.candidate.plan) / full) ** 0.5 for entry in archive) <= 0.8


def check_failures(module: Any) -> None:
    """Candidates that fail are survived, and are not in the archive."""
    for space in SPACES:
        fake = of_space(space)
        fake.fails = lambda c: c.id % 7 == 3
        archive = run(module, fake)
        assert archive and all(entry.candidate.id % 7 != 3 for entry in archive)


CHECKS: tuple[Callable[[Any], None], ...] = (
    *(check_description, check_options, check_seed, check_replay, check_candidates, check_plans, check_bases),
    *(check_requests, check_archive, check_macs_goal, check_latency_goal, check_failures),
)
"""All of them, the quick ones first."""


def of_space(name: str) -> FakeStudy:
    """A study of one of ``SPACES``."""
    sizes, multiple, frozen = SPACES[name]
    return study(sizes, multiple, frozen=frozen)


def run(module: Any, fake: FakeStudy, seed: int = 0) -> Archive:
    """One search with the method's default options."""
    return drive(module.search(fake.problem(GOAL, seed), module.Options()), fake)


def plain(archive: Archive) -> list[tuple[Candidate, dict[str, float]]]:
    """An archive as values that can be compared."""
    return [(entry.candidate, dict(entry.evaluation.metrics)) for entry in archive]


@functools.lru_cache(maxsize=8)
def _first_run(module: Any, space: str) -> tuple[FakeStudy, Archive]:
    """A run that the checks only look at."""
    fake = of_space(space)
    return fake, run(module, fake)


def _numpy_state() -> Any:
    return np.random.get_state()[1].tolist()  # type: ignore[index]
