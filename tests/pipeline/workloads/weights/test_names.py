"""Wrappers, prefixes and copies: whatever a trainer writes around a state dict, the same tensors are found in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.weights import choose_weights
from secateur.pipeline.workloads.weights.names import copies, flattened


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))


OWN = network().state_dict()
OTHER = {name: tensor + 1 for name, tensor in OWN.items()}
PREFIXES = ["module.", "model.", "_orig_mod.", "net.", "backbone.", "student.model."]
WRAPPERS = ["model", "model_state_dict", "state_dict", "net", "network", "weights", "params", "anything"]
AVERAGED = ["ema", "model_ema", "ema_model", "state_dict_ema", "params_ema", "EMA", "swa_model", "averaged"]


def prefixed(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + name: tensor for name, tensor in state.items()}


def read(content: Any, own: Mapping[str, Tensor] = OWN) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    copy, notes = choose_weights(content, own, "w.pt")
    assert copy.faults == ()
    return copy.tensors, notes


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[n], t) for n, t in expected.items())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(PREFIXES), max_size=3), st.lists(st.sampled_from(WRAPPERS), max_size=3), st.booleans())
def test_any_prefixes_in_any_wrappers_are_seen_through(prefixes: list[str], wrappers: list[str], more: bool) -> None:
    content: Any = prefixed(OWN, "".join(prefixes))
    for wrapper in wrappers:
        content = {wrapper: content} | (
            {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(4)}}}} if more else {}
        )
    found, notes = read(content)
    assert same(found, OWN)
    assert notes == ()


@pytest.mark.parametrize("inserted", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_what_wrapped_modules_put_into_names_is_left_out_anywhere(inserted: str) -> None:
    assert same(read({name.replace("2.", f"2.{inserted}"): t for name, t in OWN.items()})[0], OWN)


@pytest.mark.parametrize("word", AVERAGED)
def test_an_averaged_copy_is_read_and_a_note_says_so(word: str) -> None:
    for content in (
        {"model": OTHER, word: OWN},
        {word: OWN, "model": OTHER},
        {"state_dict": {**prefixed(OTHER, "model."), **prefixed(OWN, f"{word}.")}},
        {"state_dict": OTHER, word: {"n_averaged": torch.tensor(3), **prefixed(OWN, "module.")}},
    ):
        found, notes = read(content)
        assert same({n: t for n, t in found.items() if n in OWN}, OWN)
        assert len(notes) == 1
        assert "the averaged weights" in notes[0] and word in notes[0] and "not those" in notes[0]


def test_an_averaged_copy_that_lacks_tensors_is_not_read() -> None:
    parameters = {name: t for name, t in OTHER.items() if "running" not in name}
    assert same(read({"model": OWN, "ema": parameters})[0], OWN)


def test_words_that_contain_ema_are_no_averages() -> None:
    found, _ = read({"state_dict": OWN, "schema": OTHER, "cinema": OTHER})
    assert same(found, OWN)


def test_networks_that_fit_alike_are_refused_by_name_unless_they_are_equal() -> None:
    with pytest.raises(UserError, match=r"several networks that fit: 'student' and 'teacher'"):
        read({"student": OWN, "teacher": OTHER})
    assert same(read({"student": OWN, "teacher": dict(OWN)})[0], OWN)
    found, notes = read({"teacher": OTHER, "state_dict": OWN})
    assert same(found, OWN)
    assert "not those under 'teacher'" in notes[0]


def test_momenta_are_no_weights() -> None:
    assert not copies(flattened({"optimizer": OWN}), OWN)
    assert same(read({"optimizer": {"exp_avg": OTHER}, "model": OWN})[0], OWN)


def test_tensors_beside_the_network_are_counted() -> None:
    found, notes = read({"state_dict": {**prefixed(OWN, "model."), "criterion.weight": torch.ones(2)}})
    assert same(found, OWN)
    assert notes == ("weights w.pt: 1 other tensor of the file was not read: state_dict.criterion.weight",)


def test_a_larger_network_that_begins_alike_does_not_fit() -> None:
    larger = {**OWN, "2.2.weight": torch.ones(2, 2)}
    for content in (larger, prefixed(larger, "module."), {"model": larger}):
        copy, _ = choose_weights(content, OWN, "w.pt")
        assert copy.faults == ("2.2.weight: not in the network",)


def test_values_beside_tensors_and_counters_are_left() -> None:
    without = {name: t for name, t in OWN.items() if not name.endswith("num_batches_tracked")}
    assert same(read({**without, "epoch": 3, "optimizer": {"state": {}}})[0], without)


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3) | st.just(torch.ones(1)),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text(max_size=4) | st.integers() | st.tuples(st.integers()), inner, max_size=3)
        ),
        max_leaves=12,
    )
)
def test_any_content_is_looked_through(content: Any) -> None:
    try:
        names = flattened(content)
    except ValueError as error:
        assert "are named" in str(error)
        return
    assert all(isinstance(name, str) for name in names)
    copies(names, OWN)


def test_a_mapping_that_holds_itself_ends() -> None:
    content: dict[str, Any] = {"w": torch.ones(1)}
    content["again"] = content
    assert len(flattened(content)) == 6
