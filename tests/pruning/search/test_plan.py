from __future__ import annotations

import json
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.pruning.plan import ChannelGroup, PlanError, PruningPlan, SearchSpace, from_ranges, to_ranges

sizes = st.integers(1, 40)
names = st.text(min_size=1, max_size=12)


@st.composite
def plans(draw) -> PruningPlan:
    masks = {}
    for name in draw(st.lists(names, unique=True, max_size=5)):
        mask = np.array(draw(st.lists(st.booleans(), min_size=1, max_size=40)))
        mask[draw(st.integers(0, len(mask) - 1))] = True
        masks[name] = mask
    return PruningPlan.from_masks(masks)


@st.composite
def spaces(draw) -> SearchSpace:
    groups = [
        ChannelGroup(f"g{i}", size) for i, size in enumerate(draw(st.lists(st.integers(2, 80), min_size=1, max_size=4)))
    ]
    multiple, least = draw(st.sampled_from([1, 2, 4, 8, 16])), draw(st.floats(0, 0.5))
    try:
        return SearchSpace.of(groups, channel_multiple=multiple, min_keep_ratio=least)
    except PlanError:
        return SearchSpace.of(groups)


@given(plans())
def test_json_brings_back_the_same_plan(plan):
    text = plan.to_json()
    again = PruningPlan.from_json(text)
    assert "\n" not in text
    assert again == plan
    assert again.digest == plan.digest
    assert list(again.kept) == list(plan.kept)
    json.loads(text)


@given(st.sets(st.integers(0, 60)).filter(bool))
def test_ranges_bring_back_the_same_indices(indices):
    ordered = tuple(sorted(indices))
    assert from_ranges(to_ranges(ordered)) == ordered


def test_ranges_are_short():
    assert to_ranges((0, 1, 2, 3, 5, 7, 8)) == "0-3,5,7-8"


@given(plans(), st.randoms(use_true_random=False))
def test_the_digest_names_the_content_whatever_the_order(plan, shuffle):
    order = list(plan.kept)
    shuffle.shuffle(order)
    twin = PruningPlan({n: plan.sizes[n] for n in order}, {n: plan.kept[n] for n in order})
    assert twin.digest == plan.digest
    assert len(plan.digest) == 16
    for name, kept in plan.kept.items():
        if len(kept) > 1:
            assert plan.replace({name: kept[1:]}).digest != plan.digest


@given(plans())
def test_masks_widths_and_fullness_agree(plan):
    for name, width in plan.widths.items():
        assert plan.mask(name).shape == (plan.sizes[name],)
        assert plan.mask(name).sum() == width
    assert PruningPlan.from_masks({n: plan.mask(n) for n in plan.kept}) == plan
    full = PruningPlan.full([ChannelGroup(n, s) for n, s in plan.sizes.items()])
    assert full.is_full
    assert plan.is_within(full)
    assert full.is_within(plan) == plan.is_full == (plan == full)
    plan.validate(SimpleNamespace(groups=[ChannelGroup(n, s) for n, s in plan.sizes.items()]))


def test_replace_leaves_the_original_alone():
    plan = PruningPlan.full([ChannelGroup("a", 4), ChannelGroup("b", 2)])
    cut = plan.replace({"a": np.array([1, 3])})
    assert cut.kept == {"a": (1, 3), "b": (0, 1)}
    assert plan.is_full
    assert all(type(i) is int for i in cut.kept["a"])


@pytest.mark.parametrize(
    ("sizes", "kept", "message"),
    [
        ({"a": 4}, {"a": ()}, "a: keeps no channel"),
        ({"a": 4}, {"a": (1, 1)}, "a: kept indices must be strictly increasing"),
        ({"a": 4}, {"a": (2, 1)}, "a: kept indices must be strictly increasing"),
        ({"a": 4}, {"a": (0, 4)}, r"a: kept indices must lie in 0..3, got 0..4"),
        ({"a": 4}, {"a": (-1, 2)}, r"a: kept indices must lie in 0..3, got -1..2"),
        ({"a": 4}, {"a": (0.5, 1)}, "a: kept indices must be whole numbers, got 0.5"),
        ({"a": 4}, {"a": (True,)}, "a: kept indices must be whole numbers, got True"),
        ({"a": 4}, {"a": (0, np.float64(1))}, "a: kept indices must be whole numbers"),
        ({"a": 4}, {"a": ("0",)}, "a: kept indices must be whole numbers, got '0'"),
        ({"a": 4}, {"a": (None,)}, "a: kept indices must be whole numbers, got None"),
        ({"a": 4}, {"a": None}, "a: kept indices must be a tuple, got NoneType"),
        ({"a": 4}, {"a": "01"}, "a: kept indices must be a tuple, got str"),
        ({"a": 4.0}, {"a": (0,)}, "a: a size must be a whole number from 1, got 4.0"),
        ({"a": True}, {"a": (0,)}, "a: a size must be a whole number from 1, got True"),
        ({"a": None}, {"a": (0,)}, "a: a size must be a whole number from 1, got None"),
        ({"a": -3}, {"a": (0,)}, "a: a size must be a whole number from 1, got -3"),
        ({"a": 4}, {"b": (0,)}, r"(?s)a: named in sizes or kept only.*b: named"),
    ],
)
def test_invalid_plans_are_refused(sizes, kept, message):
    with pytest.raises(PlanError, match=message):
        PruningPlan(sizes, kept)


def test_all_faults_are_reported_together():
    with pytest.raises(PlanError) as caught:
        PruningPlan({"a": 4, "b": 4}, {"a": (), "b": (9,)})
    assert "a: keeps no channel" in str(caught.value)
    assert "b: kept indices" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{}",
        '{"format": 1}',
        '{"format": 1, "groups": {"a": {"of": 4}}}',
        '{"format": 1, "groups": {"a": {"of": 4, "keep": ""}}}',
        '{"format": 1, "groups": {"a": {"of": 4, "keep": "x"}}}',
        '{"format": 1, "groups": {"a": {"of": 4, "keep": "3-1"}}}',
        '{"format": 1, "groups": {"a": {"of": 4, "keep": "0-9"}}}',
        '{"format": 2, "groups": {}}',
        '{"format": true, "groups": {}}',
        '{"format": 1, "groups": []}',
        '{"format": 1, "groups": {"a": []}}',
        *(
            f'{{"format": 1, "groups": {{"a": {{"of": {of}, "keep": {keep}}}}}}}'
            for of, keep in [
                ("4", '"0-99999999"'),
                ("4", '"0-999999999999999999999999"'),
                ("99999999999", '"0-99999999998"'),
                ("1e400", '"0"'),
                ("-1e400", '"0"'),
                ("NaN", '"0"'),
                ("4.0", '"0"'),
                ("true", '"0"'),
                ('"4"', '"0"'),
                ("null", '"0"'),
                ("[4]", '"0"'),
                ("0", '"0"'),
                ("4", "0"),
                ("4", "[0, 1]"),
                ("4", "null"),
                ("4", '"0,0"'),
                ("4", '"2,0-1"'),
                ("4", '"-1"'),
                ("4", '"1-"'),
                ("4", '"0.5,1"'),
                ("4", '"\u0661"'),
                ("4", '"' + "0," * 5000 + '0"'),
                ("9" * 5000, '"0"'),
            ]
        ),
        '{"format": 1, "groups": {"a": {"of": 4, "keep": "0"}, "a": {"of": 4, "keep": "1"}}}',
        json.dumps({"format": 1, "groups": {f"g{i}": {"of": 2**21, "keep": f"0-{2**21 - 1}"} for i in range(9)}}),
        "[" * 100_000,
    ],
)
def test_text_that_is_no_plan_is_refused(text):
    with pytest.raises(PlanError):
        PruningPlan.from_json(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just("0-99999999"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["of", "keep", "a"]), inner, max_size=3)
    ),
    max_leaves=9,
)


@given(st.dictionaries(st.sampled_from(["format", "groups"]), st.just(1) | JSON) | JSON)
def test_any_json_is_a_plan_or_refused(data):
    try:
        PruningPlan.from_json(json.dumps(data))
    except PlanError as error:
        assert len(str(error)) < 2000


@given(st.lists(st.integers(0, 99) | st.floats() | st.booleans() | st.none() | st.text(max_size=2), max_size=4))
def test_any_indices_are_a_plan_or_refused(kept):
    full = PruningPlan.full([ChannelGroup("a", 4)])
    for make in (lambda: full.replace({"a": kept}), lambda: PruningPlan({"a": 4}, {"a": tuple(kept)})):
        try:
            plan = make()
        except PlanError:
            continue
        assert all(type(i) is int for i in plan.kept["a"]) and plan.mask("a").sum() == len(kept)


def test_a_plan_of_another_network_is_refused_with_every_difference():
    plan = PruningPlan.full([ChannelGroup("a", 4), ChannelGroup("b", 2)])
    with pytest.raises(
        PlanError, match=r"(?s)a: 4 channels in the plan, 8 .*b: no such channel group.*c: not in the plan"
    ):
        plan.validate(SimpleNamespace(groups=[ChannelGroup("a", 8), ChannelGroup("c", 2)]))


@given(spaces())
def test_allowed_widths_increase_up_to_the_full_size(space):
    assert space.names
    for name in space.names:
        allowed = space.allowed[name]
        assert list(allowed) == sorted(set(allowed))
        assert allowed[0] >= 1
        assert allowed[-1] == space.sizes[name]
        assert len(allowed) > 1


@given(st.integers(2, 200), st.sampled_from([1, 2, 4, 8, 16, 32]), st.floats(0, 0.4))
def test_widths_are_multiples_above_the_minimum(size, multiple, least):
    try:
        space = SearchSpace.of([ChannelGroup("g", size)], channel_multiple=multiple, min_keep_ratio=least)
    except PlanError:
        return
    *inner, _ = space.allowed["g"]
    assert all(width >= least * size for width in inner)
    if size >= 2 * multiple:
        assert all(width % multiple == 0 for width in inner)


def test_a_small_group_halves_the_multiple_and_frozen_groups_are_left_out():
    groups = [ChannelGroup("small", 16), ChannelGroup("large", 64), ChannelGroup("kept", 32)]
    space = SearchSpace.of(groups, channel_multiple=16, frozen=["kept"])
    assert space.allowed == {"small": (8, 16), "large": (16, 32, 48, 64)}
    assert space.full.widths == {"small": 16, "large": 64, "kept": 32}
    assert space.smallest().widths == {"small": 8, "large": 16, "kept": 32}
    with pytest.raises(PlanError, match=r"cannot freeze unknown channel groups \['head'\]; the network has"):
        SearchSpace.of(groups, frozen=["head"])
    with pytest.raises(PlanError, match="the search space is empty"):
        SearchSpace.of(groups, frozen=["small", "large", "kept"])


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 40)), st.floats(0, 0.4))
def test_every_group_may_have_a_multiple_of_its_own(multiples, least):
    sizes = {"a": 16, "b": 24, "c": 64, "d": 7}
    space = SearchSpace.of(
        [ChannelGroup(name, size) for name, size in sizes.items()], channel_multiple=multiples, min_keep_ratio=least
    )
    for name, size in sizes.items():
        try:
            alone = SearchSpace.of(
                [ChannelGroup(name, size)], channel_multiple=multiples.get(name, 1), min_keep_ratio=least
            )
        except PlanError:
            assert name not in space.names
        else:
            assert space.allowed[name] == alone.allowed[name]


def test_a_group_without_a_multiple_of_its_own_has_every_width():
    groups = [ChannelGroup("conv", 32), ChannelGroup("free", 3)]
    space = SearchSpace.of(groups, channel_multiple={"conv": 16, "elsewhere": 8})
    assert space.allowed == {"conv": (16, 32), "free": (1, 2, 3)}


@given(spaces(), st.data())
def test_decode_keeps_the_most_salient_and_encode_brings_the_widths_back(space, data):
    widths = [data.draw(st.sampled_from(space.allowed[name])) for name in space.names]
    values = st.floats(-1e6, 1e6)
    saliency = {
        n: np.array(data.draw(st.lists(values, min_size=size, max_size=size))) for n, size in space.sizes.items()
    }
    plan = space.decode(widths, saliency)
    assert space.encode(plan).tolist() == widths
    for name in space.names:
        mask = plan.mask(name)
        if not mask.all():
            assert saliency[name][mask].min() >= saliency[name][~mask].max()


def test_among_equals_decode_keeps_the_lower_index():
    space = SearchSpace.of([ChannelGroup("g", 600)])
    saliency = np.arange(600) % 3.0
    assert space.decode([50], {"g": saliency}).kept == {"g": tuple(range(2, 152, 3))}


@given(spaces(), st.floats(-10, 100))
def test_snap_is_nearest_and_below_is_the_next_step(space, width):
    for name in space.names:
        allowed = space.allowed[name]
        snapped = space.snap(name, width)
        assert snapped in allowed
        assert all(abs(snapped - width) <= abs(w - width) for w in allowed)
        for smaller, larger in pairwise(allowed):
            assert space.below(name, larger) == smaller
            assert space.snap(name, (smaller + larger) / 2) == smaller
        assert space.below(name, allowed[0]) == allowed[0]
