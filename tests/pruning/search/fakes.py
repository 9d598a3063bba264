"""A study made of arithmetic: every channel is worth a fixed amount of accuracy, so the best plans are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

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

BASELINE = 0.9


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
    value: dict[str, np.ndarray] = field(default_factory=dict)
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

    def costs(self, widths: np.ndarray) -> dict[str, np.ndarray]:
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
        ratio = (macs / self.macs(self.space.full)) ** 0.5
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
            full = self.macs(self.space.full)
            return np.array([(self.macs(plan) / full) ** 0.5 for plan in request.plans])
        if isinstance(request, Predict):
            return {}  # no model to be trusted
        if isinstance(request, Remaining):
            return Left(spent=dict.fromkeys(("evaluations", "seconds", "epochs", "work"), 0.0))
        if isinstance(request, AuxiliaryTraining):
            base = f"learned-{len(self.weights)}"
            self.weights[base] = self.space.full, BASELINE - 0.05
            return AuxiliaryTrained(base, self.value, self.metrics(self.space.full, BASELINE - 0.05, latency=False))
        return self.scores(request)

    def damage(self, name: str, removed: dict[str, tuple[int, ...]]) -> float:
        return float(self.value[name][list(removed[name])].sum()) if name in removed else float("nan")

    def scores(self, request: Score) -> dict[str, np.ndarray]:
        plan = request.plan or self.space.full
        scores = {}
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
        return end.value


def at_the_target(fake: FakeStudy, plan: PruningPlan, target: float) -> bool:
    """Whether a plan's MACs are 0.99 to 1.00 of a ratio, or no single step fits any more."""
    space, whole = fake.space, fake.macs(fake.space.full)
    wider = [{**plan.widths, n: space.above(n, plan.widths[n])} for n in space.names]
    steps = [fake.macs(space.full.replace({n: range(w) for n, w in ws.items()})) for ws in wider if ws != plan.widths]
    ratio = fake.macs(plan) / whole
    return ratio <= target and (ratio >= 0.99 * target or all(macs > target * whole for macs in steps))


def study(sizes: Sequence[int] = (16, 24, 32), channel_multiple: int = 1, **space: object) -> FakeStudy:
    return FakeStudy(SearchSpace.of(chain(*sizes), channel_multiple=channel_multiple, **space))
