"""``--set``: whatever is written there ends in a run file or in one message, never in a traceback."""

from __future__ import annotations

import pytest
import yaml

from secateur.pipeline.config.reading import parse_run_file
from secateur.pipeline.errors import UserError
from tests.pipeline.helpers import TINY

BASE = "name: t\nworkload: {name: classification, model: {name: cifar/resnet8}, data: {source: digits}}\n"

SECTIONS = [
    "search: ccep",
    "search: [1]",
    "search: 5",
    "search: 1.5",
    "search: true",
    "search: 2024-01-01",
    "search: ''",
]
SECTIONS += ["reward: device", "reward: [[1]]", "device: local", "workload: classification", "tracking: http://a"]
KEYS = [
    "search.method=random",
    "reward.preset=amc",
    "search.target.macs_ratio=0.5",
    "device.others.0=x",
    "workload.name=x",
]
KEYS += ["device.wait_s.x=1", "search.method.x.y=1", "search.options.include.0=x", "name.x=1", "workload.data.x.y.z=1"]
KEYS += ["=1", "a..b=1", ".a=1", "a.=1", ".=1", "..=1", "", "seed", " =1", "search..method=random", "workload..=1"]
KEYS += [
    "serach.method=random",
    "search.methd.x=1",
    "x.y.z=1",
    "0.1=2",
    "name=1=2",
    "[]=1",
    "\x1b[2J=1",
    "\ud800=1",
    "é=1",
]
VALUES = [
    "2024-13-45",
    "9" * 6000,
    "-" + "9" * 6000,
    "0." + "9" * 6000,
    "1e" + "9" * 50,
    "&a [*a]",
    "&a {b: *a}",
    "*x",
    "&x",
]
VALUES += [
    "[" * 5000,
    "{a: " * 60,
    "!!python/object/apply:os.system [x]",
    "!x y",
    "%",
    "@",
    "`",
    "- a",
    "a: b",
    "a: b: c",
    "---",
]
VALUES += [
    "--- 1\n--- 2",
    "...",
    "[1, 2",
    "'",
    '"',
    '"\\x00"',
    '"\\ud800"',
    '"\\UFFFFFFFF"',
    "\x1b[2J",
    "\udcff",
    "\ufeff1",
    "? a",
]
VALUES += [
    "#x",
    "a #b",
    "|\n a",
    "<<",
    "=",
    "{<<: 1}",
    "{[1]: 2}",
    "{a: 1, a: 2}",
    "!!int x",
    "!!set {a}",
    "\t1",
    "1\t",
    "",
]
PLACES = [
    "seed",
    "name",
    "search",
    "search.options",
    "search.options.population",
    "search.method",
    "reward.preset",
    "device",
]
PLACES += [
    "workload",
    "workload.model.options",
    "finetune.distill",
    "reward.options.alpha",
    "search.frozen",
    "threads",
    "new",
]


def outcome(text: str, *overrides: str) -> str | None:
    """The message; None = it is a run file. Anything but a UserError passes on."""
    try:
        parse_run_file(text, "run.yaml", overrides)
    except UserError as error:
        assert all(c.isprintable() or c == "\n" for c in str(error)), "no control character reaches the terminal"
        assert len(str(error)) < 5000
        return str(error)
    return None


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_that_is_none_can_be_overridden_or_is_named(section: str) -> None:
    for key in KEYS:
        assert outcome(BASE.replace("workload: {", "w: {") + section, key)
        outcome(BASE + section if section.split(":")[0] not in BASE else BASE, key)


@pytest.mark.parametrize("section", ["search: ccep", "search: [1]", "search: 5"])
def test_a_value_where_a_section_belongs_is_named(section: str) -> None:
    message = outcome(BASE + section, "search.method=random")
    assert message and "'search' is a" in message and "search.method=random" in message


@pytest.mark.parametrize("key", KEYS)
def test_any_key_ends_in_a_message_or_a_run_file(key: str) -> None:
    for text in (BASE, yaml.safe_dump(TINY)):
        outcome(text, key)


@pytest.mark.parametrize("place", PLACES)
def test_any_value_ends_in_a_message_or_a_run_file(place: str) -> None:
    for value in VALUES:
        outcome(BASE, f"{place}={value}")


@pytest.mark.parametrize("key", ["=1", "a..b=1", ".a=1", "a.=1", "seed", "", " =1"])
def test_a_key_with_an_empty_part_says_how_one_is_written(key: str) -> None:
    message = outcome(BASE, key)
    assert message and "section.key=value, for example --set search.method=random" in message


def test_a_list_is_set_as_a_whole() -> None:
    text = BASE + "device: {others: [a, b]}\n"
    message = outcome(text, "device.others.0=x")
    assert message and "'device.others' is a list; set the whole list" in message
    assert parse_run_file(text, overrides=["device.others=[x]"]).device.others == ("x",)


@pytest.mark.parametrize("empty", ["search:\n", "search: null\n", "search: ~\n", "search: {}\n", ""])
def test_an_empty_section_is_filled(empty: str) -> None:
    found = parse_run_file(BASE + empty, overrides=["search.method=random", "search.options.num_plans=3"])
    assert (found.search.method, found.search.options) == ("random", {"num_plans": 3})


def test_keys_of_unknown_sections_are_told_with_the_known_ones() -> None:
    message = outcome(BASE, "serach.method=random", "search.options.poplation=3")
    assert message and "did you mean 'search'" in message and "did you mean 'population'" in message


def test_a_fault_says_that_it_was_given_with_set_also_where_the_file_has_that_place() -> None:
    text = BASE + "search:\n  options:\n    population: 4\n"
    message = outcome(text, "search.options={population: 0}")
    assert message and "(--set)" in message and "line" not in message


@pytest.mark.parametrize("value", ["#1", "a #b"])
def test_what_yaml_takes_for_a_comment_is_not_lost(value: str) -> None:
    message = outcome(BASE, f"tracking.experiment={value}")
    assert message and "the rest is a comment" in message
    assert parse_run_file(BASE, overrides=[f'tracking.experiment="{value}"']).tracking.experiment == value


def test_what_is_no_yaml_says_how_a_text_is_quoted() -> None:
    message = outcome(BASE, "tracking.experiment=@x")
    assert message and "tracking.experiment='\"...\"'" in message


def test_the_last_override_of_a_key_counts_and_an_alias_is_a_copy() -> None:
    assert parse_run_file(BASE, overrides=["seed=1", "seed=2"]).seed == 2
    text = BASE + "baseline: &r {epochs: 2}\nfinetune: *r\n"
    found = parse_run_file(text, overrides=["baseline.epochs=3"])
    assert (found.baseline.epochs, found.finetune.epochs) == (3, 2)
