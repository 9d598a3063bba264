"""Any YAML ends in a valid run file or one message; every number of every schema has sane bounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.device_profiles import plain_yaml
from secateur.device_profiles.settle import schema_of, settle
from secateur.pipeline.config.choices import WORKLOADS, reward_model
from secateur.pipeline.config.reading import parse_run_file, reward_options
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.errors import UserError
from secateur.pruning.search import METHODS, reward
from tests.tools import schemas

DATA = {"classification": "data: {source: digits}", "detection": "data: {source: digits}"}
PRESETS = sorted(reward.PRESETS)


def head(workload: str = "classification", method: str = "ccep", preset: str = "device") -> str:
    return f"name: t\nworkload: {{name: {workload}}}\nsearch: {{method: {method}}}\nreward: {{preset: {preset}}}\n"


def outcome(text: str, *overrides: str) -> RunFile | str:
    """The run file, or the message; anything but a UserError passes on."""
    try:
        found = parse_run_file(text, "run.yaml", overrides)
    except UserError as error:
        assert all(c.isprintable() or c == "\n" for c in str(error)), repr(str(error))
        return str(error)
    again = parse_run_file(plain_yaml.dump(found.model_dump(mode="json")))
    assert again == found and again.digest == found.digest, "a run directory's own run.yaml is the same run"
    assert schemas.finite(found.model_dump(), 1e24)  # image-MACs are many
    return found


# -- numbers -----------------------------------------------------------------------------------------------------------


def every_number() -> Iterator[tuple[str, str, str]]:
    """(text of a run file, key of a number in it, how the number stands there)."""

    def of(model: Any, prefix: str, text: str) -> Iterator[tuple[str, str, str]]:
        schema = schema_of(model)
        for key, form in schemas.numbers(schema, schema.get("$defs", {}), prefix):
            yield text, key, form

    yield from of(RunFile, "", head())
    for name in WORKLOADS.names():
        yield from of(WORKLOADS.load(name).Options, "workload", head(workload=name))
    for name in METHODS.names():
        yield from of(METHODS.load(name).Options, "search.options", head(method=name))
    for name in PRESETS:
        yield from of(reward_model(name), "reward.options", head(preset=name))


NUMBERS = list(dict.fromkeys(every_number()))


def test_the_numbers_of_all_schemas_are_found() -> None:
    keys = {key for _, key, _ in NUMBERS}
    assert {
        "finetune.epochs",
        "search.options.num_plans",
        "workload.data.image_size",
        "reward.options.floor_pp",
    } <= keys
    assert {"workload.input.mean", "search.options.sampler_options.anything", "finetune.distill.weight"} <= keys


@pytest.mark.parametrize(
    "number", ["1000000000000000000", "-1000000000000000000", "1e308", "-1e308", "9e18", "1e999", ".nan"]
)
def test_every_number_of_every_section_method_workload_and_reward_has_bounds(number: str) -> None:
    unbounded = []
    for text, key, form in NUMBERS:
        if key == "search.budget.work" and number in ("1000000000000000000", "9e18"):
            continue  # image-MACs are many
        found = outcome(text, f"{key}={form.replace('@', number)}")
        if isinstance(found, RunFile) or f"  {key}" not in found:
            unbounded.append(key)
    assert not unbounded


def test_a_new_method_s_options_have_bounds_without_a_word_about_them() -> None:
    @dataclass(frozen=True)
    class Options:
        plans: int = 3
        shares: tuple[float, ...] | None = None
        free: Mapping[str, float] | None = None

    schema = schema_of(Options)
    for text in ("plans: 1e18", "plans: -1000000000000", "shares: [0.5, 1e308]", "free: {a: 1e9}"):
        assert settle(plain_yaml.read(text).content, {(): schema})[1], text
    assert not settle(plain_yaml.read("plans: 1000\nshares: [0.5]\nfree: {a: -1e6}").content, {(): schema})[1]


@pytest.mark.parametrize("preset", PRESETS)
def test_no_reward_with_valid_options_overflows(preset: str) -> None:
    """At the edges of its options, for the evaluations that could be."""
    from secateur.pruning.search.protocol import Evaluation

    reference = Evaluation(metrics={"top1": 0.99, "macs": 1e9, "params": 1e6, "latency_ratio": 1.0})
    schema = schema_of(reward_model(preset))["properties"]
    for name in schema:
        for value in ("1e-9", "1e-6", "1", "16", "-16", "100", "200", "1e6", "-1e6", "0"):
            try:
                options = reward_options(preset, [f"{name}={value}"])
            except UserError:
                continue
            rate = reward.make_reward(preset, reference, **options)
            for top1, ratio in ((0.0, 1e-6), (1.0, 1e-6), (0.99, 1.0), (0.0, 1e3)):
                metrics = {"top1": top1, "macs": 1e9 * ratio, "params": 1e6 * ratio, "latency_ratio": ratio}
                assert isinstance(rate(Evaluation(metrics=metrics)), float)


# -- any text ----------------------------------------------------------------------------------------------------------


@given(st.one_of(st.text(max_size=80), st.text(alphabet="ab01:-,[]{}&*!|>'\"%@#?~<=. \n\t\\", max_size=60)))
@settings(max_examples=300)
def test_any_text_ends_in_a_message(text: str) -> None:
    assert isinstance(outcome(text), str)
    outcome(head() + text)


def sections(method: str, workload: str, preset: str) -> st.SearchStrategy[str]:
    """Run files in which anything may stand anywhere."""
    whole = schema_of(RunFile)
    own: dict[str, Any] = {
        "workload": schema_of(WORKLOADS.load(workload).Options),
        "search": schema_of(METHODS.load(method).Options),
        "reward": schema_of(reward_model(preset)),
    }

    def chosen(key: str) -> st.SearchStrategy[str]:
        if key == "workload":
            return within(own[key], {"name": workload})
        if key in own:
            names = {"search": ("method", method), "reward": ("preset", preset)}[key]
            options = within(own[key], {})
            return options.map(lambda text: schemas.mapping([names, ("options", text)]))
        return schemas.values(whole["properties"][key], whole["$defs"])

    def within(schema: Mapping[str, Any], fixed: Mapping[str, str]) -> st.SearchStrategy[str]:
        pairs = [
            st.tuples(st.just(key), schemas.values(below, schema.get("$defs", {})))
            for key, below in schema["properties"].items()
            if key not in fixed
        ]
        some = st.lists(st.one_of(pairs), max_size=4) if pairs else st.just([])
        return some.map(lambda found: schemas.mapping([*fixed.items(), *found]))

    keys = [key for key in whole["properties"] if key != "name"]
    part = st.one_of([chosen(key).map(lambda text, key=key: f"{key}: {text}") for key in keys])
    return st.lists(part, max_size=4).map(lambda parts: "\n".join(["name: t", *parts, ""]))


NAMES = [st.sampled_from(names) for names in (METHODS.names(), WORKLOADS.names(), PRESETS)]
FILES = st.tuples(*NAMES).flatmap(lambda names: sections(*names))


@given(FILES)
@settings(max_examples=100)
def test_any_run_file_is_valid_or_told_what_is_wrong(text: str) -> None:
    outcome(text if "workload:" in text else text + "workload: {name: classification}\n")


KEYS = st.lists(
    st.sampled_from(
        [*RunFile.model_fields, "options", "method", "preset", "data", "model", "epochs", "", "0", "x", "yes"]
    ),
    min_size=1,
    max_size=4,
).map(".".join)


@given(st.lists(st.tuples(KEYS, st.sampled_from(schemas.SURPRISES)).map("=".join), max_size=3), FILES)
@settings(max_examples=60)
def test_any_override_of_any_run_file_is_valid_or_told_what_is_wrong(overrides: list[str], text: str) -> None:
    outcome(head(), *overrides)
    outcome(text, *overrides)


@pytest.mark.parametrize("place", ["workload.data.image_size", "workload.input.image_size"])
def test_an_image_is_no_wall(place: str) -> None:
    text = head(workload="detection" if "input" in place else "classification")
    assert place in str(outcome(text, f"{place}=60000"))
