"""What a request is known by stays what it is, however classes are called and whatever fields they get."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from secateur.pipeline.run.records import describe, to_candidate
from secateur.pruning.plan import ChannelGroup, PruningPlan
from secateur.pruning.search import identity as identities
from secateur.pruning.search.identity import FIRST_TEXTS, KINDS, digest_of, draws_of, identity
from secateur.pruning.search.protocol import (
    AuxiliaryTraining,
    Candidate,
    Distort,
    Evaluate,
    FineTune,
    MaskedLoss,
    Predict,
    Request,
    Score,
    Time,
)

FULL = PruningPlan.full((ChannelGroup("a", 4), ChannelGroup("b", 6)))
HALF = FULL.replace({"a": range(2)})
ONE = Candidate(3, HALF, "mutation", (1, 2), "1-tuned")
REQUESTS: tuple[tuple[Request, str], ...] = (
    (Evaluate((Candidate(0, HALF, "init"),)), "evaluation"),
    (FineTune(ONE, 2.0, (0.25, 0.5), write_back=True), "finetune"),
    (AuxiliaryTraining("indicators", 3.0, options={"target": 0.5}), "learn"),
    (Score("l1", "learned", HALF, {"images": 5}), "score"),
    (MaskedLoss((FULL, HALF)), "probe"),
    (Distort(FULL, ({"a": (0, 1)},)), "distort"),
    (Time((FULL,)), "time"),
    (Predict(), "predict"),
)


def test_identities_are_these_for_ever() -> None:
    """A changed line here invalidates every run: raise the journal's format with it."""
    said = [identity(request) for request, _ in REQUESTS]
    half, full = HALF.digest, FULL.digest
    assert said == [
        f'{{"kind":"evaluation","request":{{"candidates":[{{"id":0,"origin":"init","plan":"{half}"}}]}}}}',
        '{"kind":"finetune","request":{"candidate":{"base":"1-tuned","id":3,"origin":"mutation","parents":[1,2],'
        f'"plan":"{half}"}},"epochs":2,"part":[0.25,0.5],"write_back":true}}}}',
        '{"kind":"learn","request":{"epochs":3,"kind":"indicators","options":{"target":0.5}}}',
        f'{{"kind":"score","request":{{"base":"learned","criterion":"l1","options":{{"images":5}},"plan":"{half}"}}}}',
        f'{{"kind":"probe","request":{{"plans":["{full}","{half}"]}}}}',
        f'{{"kind":"distort","request":{{"plan":"{full}","removed":[{{"a":[0,1]}}]}}}}',
        f'{{"kind":"time","request":{{"plans":["{full}"]}}}}',
        '{"kind":"predict","request":{}}',
    ]
    assert [json.loads(text)["kind"] for text in said] == [kind for _, kind in REQUESTS]
    assert set(KINDS) == {type(request) for request, _ in REQUESTS}


def test_one_meaning_has_one_identity() -> None:
    by = {"x": 1, "y": 0.5}
    turned = dict(reversed(by.items()))
    assert identity(AuxiliaryTraining("a", 1, options=by)) == identity(AuxiliaryTraining("a", 1.0, options=turned))
    assert identity(AuxiliaryTraining("a", np.float64(0.1))) == identity(AuxiliaryTraining("a", 0.1))  # type: ignore[arg-type]
    assert identity(MaskedLoss([FULL], images=None)) == identity(MaskedLoss((FULL,)))  # type: ignore[arg-type]
    others = [
        AuxiliaryTraining("a", 0.1),
        AuxiliaryTraining("a", 0.2),
        AuxiliaryTraining("b", 0.1),
        AuxiliaryTraining("a", 0.1, "base"),
        AuxiliaryTraining("a", float("inf")),
    ]
    assert len({digest_of(request) for request in others}) == len(others)


def test_arrays_stand_as_digests_and_what_has_no_canonical_form_is_refused() -> None:
    def with_array(values: Any) -> AuxiliaryTraining:
        return AuxiliaryTraining("a", 1.0, options={"values": values})

    same = {digest_of(with_array(np.array([1.0, 2.0]))), digest_of(with_array(np.array([1.0, 2.0, 3.0])[:2]))}
    assert len(same) == 1
    assert digest_of(with_array(np.array([1.0, 2.5]))) not in same
    with pytest.raises(TypeError, match="no canonical form"):
        identity(with_array(object()))


def test_a_projected_share_is_a_part_of_a_candidate_only_where_there_is_one() -> None:
    moved = replace(ONE, projected_share=0.25)
    assert "projected_share" not in identity(Evaluate((ONE,)))
    assert '"projected_share":0.25' in identity(Evaluate((moved,)))
    assert draws_of(FineTune(moved, 1.0)) != draws_of(FineTune(ONE, 1.0))
    assert to_candidate(describe(moved)) == moved and "projected_share" not in describe(ONE)


@dataclass(frozen=True)
class Renamed:
    """``AuxiliaryTraining`` renamed, with a field more."""

    kind: str
    epochs: float
    base: str = ""
    options: Mapping[str, float | str] = field(default_factory=dict)
    warm: bool = False


def test_a_new_field_and_another_name_change_neither_identity_nor_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identities, "KINDS", {**KINDS, Renamed: "learn"})
    monkeypatch.setattr(identities, "FIRST_TEXTS", {**FIRST_TEXTS, Renamed: FIRST_TEXTS[AuxiliaryTraining]})
    old, new = AuxiliaryTraining("shared", 2.0, options={"x": 1.0}), Renamed("shared", 2.0, options={"x": 1.0})
    warm: Any = Renamed("shared", 2.0, options={"x": 1.0}, warm=True)
    assert identity(new) == identity(old) != identity(warm)  # type: ignore[arg-type]
    assert draws_of(new) == draws_of(old) != draws_of(warm)  # type: ignore[arg-type]


def test_draws_are_those_of_the_first_versions() -> None:
    """They were made from the requests' ``repr``: saliencies look at the same images as ever."""
    for request in (
        request for request, _ in REQUESTS if isinstance(request, FineTune | AuxiliaryTraining | Score | Distort)
    ):
        text = (
            repr(request)
            .replace("AuxiliaryTraining(", "Learn(", 1)
            .replace(", projected_share=0.0", "")
            .replace(", lr=None", "")
            .replace(", quantise=''", "")
        )
        assert draws_of(request) == hashlib.sha256(text.encode()).hexdigest()[:12]
    assert draws_of(Score("taylor", plan=HALF)) == "4e758b08c399"
