"""What YAML takes for something else than was written: refused with the way to write it, in every section and --set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import yaml

from secateur.device_profiles import plain_yaml
from secateur.pipeline.config.reading import parse_run_file, reward_options
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.errors import UserError
from tests.pipeline.helpers import TINY

TEXT, INTEGER, NUMBER, BOOLEAN, FREE = "text", "integer", "number", "boolean", "free"
FOLDER = {"name": "classification", "data": {"source": "folder", "path": "pictures"}}
PLACES: Mapping[str, tuple[str, str]] = {
    "name": (TEXT, "{}"),
    "tracking.experiment": (TEXT, "{}"),
    "device.others": (TEXT, "[quick, {}]"),
    "search.frozen": (TEXT, "[{}]"),
    "search.options.fitness": (TEXT, "{}"),
    "workload.data.path": (TEXT, "{}"),
    "workload.data.classes": (TEXT, "[si, {}]"),
    "seed": (INTEGER, "{}"),
    "search.images": (INTEGER, "{}"),
    "search.options.population": (INTEGER, "{}"),
    "workload.data.image_size": (INTEGER, "{}"),
    "baseline.lr": (NUMBER, "{}"),
    "search.options.finetune_epochs": (NUMBER, "{}"),
    "reward.options.alpha": (NUMBER, "{}"),
    "gate.max_latency_increase": (NUMBER, "{}"),
    "device.probe": (BOOLEAN, "{}"),
    "search.options.latency_aware": (BOOLEAN, "{}"),
    "gate.promote": (BOOLEAN, "{}"),
    "workload.model.options.width": (FREE, "{}"),
    "workload.model.options.stages": (FREE, "[{{deep: [{}]}}]"),
}
"""Place -> what it takes, and how the word stands there."""

BOOLEANS = {"yes": True, "Yes": True, "on": True, "ON": True, "no": False, "No": False, "off": False, "OFF": False}
NUMBERS = {
    "0100": "100",
    "007": "7",
    "08": "8",
    "0o17": "15",
    "0x10": "16",
    "0b11": "3",
    "1_0": "10",
    "1_000.5": "1000.5",
}
BASE_60 = {"1:30": "90", "1:30.5": "90.5", "10:20:30": "37230"}
DATES = ("2024-01-01", "2024-13-45", "2024-1-1", "2024-01-01 10:00:00", "2024-01-01T10:00:00Z")
SURPRISES = [*BOOLEANS, *NUMBERS, *BASE_60, *DATES]


def with_value(place: str, value: str) -> str:
    """The tiny run with ``place: value``, the value as it stands."""
    data: dict[str, Any] = {**TINY, "workload": FOLDER, "search": {}, "reward": {}}
    *parents, last = place.split(".")
    section = data
    for parent in parents:
        section[parent] = dict(section.get(parent, {}))
        section = section[parent]
    section[last] = "@@"
    return yaml.safe_dump(data).replace("'@@'", value)


def read(place: str, word: str, by: str) -> RunFile:
    value = PLACES[place][1].format(word)
    if by == "file":
        return parse_run_file(with_value(place, value))
    base = yaml.safe_dump({**TINY, "workload": FOLDER, "search": {}, "reward": {}})
    return parse_run_file(base, overrides=[f"{place}={value}"])


def value_at(run_file: RunFile, place: str) -> Any:
    found: Any = run_file.model_dump()
    for part in place.split("."):
        found = found[part]
    while isinstance(found, list | tuple | dict):
        found = list(found.values())[-1] if isinstance(found, dict) else found[-1]
    return found


def refused(place: str, word: str, by: str) -> str:
    with pytest.raises(UserError) as caught:
        read(place, word, by)
    lines = [line for line in str(caught.value).splitlines() if line.strip().startswith(place)]
    assert len(lines) == 1, f"one fault, which names the option:\n{caught.value}"
    assert ("--set" in lines[0]) is (by == "set") and ("(line" in lines[0]) is (by == "file")
    return lines[0]


EVERY_WAY = pytest.mark.parametrize("by", ["file", "set"])
TEXTS = [place for place, (wanted, _) in PLACES.items() if wanted in (TEXT, FREE)]


@EVERY_WAY
@pytest.mark.parametrize("place", PLACES)
def test_a_guess_is_refused_with_the_way_to_write_it(place: str, by: str) -> None:
    wanted, decimal = PLACES[place][0], NUMBERS | BASE_60
    for word in SURPRISES:
        if wanted == BOOLEAN and word in BOOLEANS:
            assert value_at(read(place, word, by), place) is BOOLEANS[word]
            continue
        message = refused(place, word, by)
        assert word in message
        if wanted in (TEXT, FREE):
            assert f'"{word}" in quotes' in message
        if wanted in (INTEGER, NUMBER, FREE) and word in decimal:
            assert decimal[word] in message.split("write", 1)[1]
        if wanted == FREE and word in BOOLEANS:
            assert f"write {str(BOOLEANS[word]).lower()} or" in message


@EVERY_WAY
@pytest.mark.parametrize("place", TEXTS)
def test_what_the_message_says_to_write_is_text_to_the_letter(place: str, by: str) -> None:
    for word in SURPRISES:
        if place != "name" or word.isalnum():  # ``name`` has a pattern of its own
            assert value_at(read(place, f'"{word}"', by), place) == word


@EVERY_WAY
@pytest.mark.parametrize("place", TEXTS)
def test_a_number_is_no_text_and_in_a_free_mapping_it_is_one(place: str, by: str) -> None:
    for word, meant in {"1.10": 1.1, "123": 123, "1e5": 1e5, "+1": 1, ".5": 0.5}.items():
        if PLACES[place][0] == FREE:
            assert value_at(read(place, word, by), place) == meant
        else:
            assert f'"{word}" in quotes' in refused(place, word, by)


@EVERY_WAY
@pytest.mark.parametrize("place", [place for place, (wanted, _) in PLACES.items() if wanted == NUMBER])
def test_a_decimal_number_is_one_everywhere(place: str, by: str) -> None:
    for word, meant in {"1e-3": 1e-3, "1E-3": 1e-3, "+1": 1, "1e0": 1, ".5": 0.5, '"0.5"': 0.5, "'1e-3'": 1e-3}.items():
        found = value_at(read(place, word, by), place)
        assert isinstance(found, int | float) and found == meant


@EVERY_WAY
@pytest.mark.parametrize("place", [place for place, (wanted, _) in PLACES.items() if wanted in (INTEGER, NUMBER)])
def test_what_is_no_number_is_never_made_one(place: str, by: str) -> None:
    for word in ('"0100"', '"1_0"', "' 5 '", '"1:30"', '"0x10"', "many", "true", "null", "", "[1]", "{a: 1}"):
        if word in ("null", "") and place in ("workload.data.image_size", "gate.max_latency_increase"):
            assert value_at(read(place, word, by), place) is None
        else:
            assert refused(place, word, by)


@pytest.mark.parametrize("word", ["2", "0.0", "maybe", "yesno", '""', "null", "[true]"])
@pytest.mark.parametrize("place", ["device.probe", "search.options.latency_aware"])
def test_what_is_no_boolean_is_refused(place: str, word: str) -> None:
    assert refused(place, word, "file")


@pytest.mark.parametrize(
    ("word", "meant"),
    [("y", True), ("N", False), ("1", True), ("0", False), ('"off"', False), ("'True'", True), ("TRUE", True)],
)
def test_a_boolean_key_takes_every_way_to_say_yes_or_no(word: str, meant: bool) -> None:
    assert value_at(read("device.probe", word, "file"), "device.probe") is meant


def test_a_letter_that_some_read_as_a_boolean_is_text_where_text_is_wanted_and_unclear_where_anything_is() -> None:
    assert value_at(read("workload.data.classes", "y", "file"), "workload.data.classes") == "y"
    assert 'write true or "y" in quotes' in refused("workload.model.options.width", "y", "file")


@pytest.mark.parametrize("word", ["null", "Null", "~"])
def test_nothing_is_no_text(word: str) -> None:
    assert f'"{word}" in quotes' in refused("workload.data.classes", word, "file")
    assert value_at(read("workload.model.options.width", word, "file"), "workload.model.options.width") is None


def test_a_listed_word_is_that_word_whatever_yaml_takes_it_for() -> None:
    """Were a choice ``off`` or ``2007``, its characters would say what is meant."""
    from typing import Literal

    from pydantic import TypeAdapter

    from secateur.device_profiles.settle import settle

    schema = TypeAdapter(Literal["off", "2007", "fast"]).json_schema()
    for word in ("off", "2007", "fast"):
        assert settle(plain_yaml.read(word).content, {(): schema}) == (word, ())
    assert settle(plain_yaml.read("on").content, {(): schema})[1]


def test_switching_a_section_off_says_null() -> None:
    assert "write null" in refused_text("finetune: {distill: off}")
    assert "write null" in refused_text("finetune: {clip_norm: None}")


def refused_text(section: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_run_file(f"name: a\nworkload: {{name: classification}}\n{section}\n")
    return str(caught.value)


def test_an_empty_section_has_its_defaults() -> None:
    empty = "".join(f"{key}:\n" for key in ("search", "reward", "finetune", "gate", "device", "tracking", "export"))
    plain = "name: a\nworkload: {name: classification}\n"
    assert parse_run_file(plain + empty) == parse_run_file(plain)
    nested = "search: {target: , budget: , options: , frozen: }\nworkload:\n  name: classification\n  data:\n"
    assert parse_run_file("name: a\n" + nested).search == parse_run_file(plain).search


def test_keys_are_names_to_the_letter() -> None:
    options = "{yes: 1, 0100: 2, 1.10: 3, null: 4, 2024-01-01: 5, '<<': 6}"
    text = f"name: a\nworkload: {{name: classification, model: {{options: {options}}}}}\n"
    found = parse_run_file(text).workload["model"]["options"]
    assert found == {"yes": 1, "0100": 2, "1.10": 3, "null": 4, "2024-01-01": 5, "<<": 6}
    assert "given 2 times" in refused_text("search: {options: {1: 2, '1': 3}}")


def test_merged_keys_are_checked_where_they_arrive_and_own_keys_win() -> None:
    text = "name: a\nworkload: {name: classification}\nbaseline: &r {epochs: 2, lr: 0.1}\nfinetune: {<<: *r, lr: 0.2}\n"
    found = parse_run_file(text)
    assert (found.finetune.epochs, found.finetune.lr, found.baseline.lr) == (2, 0.2, 0.1)
    message = refused_text("baseline: &r\n  lr: 0100\nfinetune: {<<: *r}")
    assert "baseline.lr (line 4)" in message and "finetune.lr (line 4)" in message


@pytest.mark.parametrize(
    ("value", "meant"),
    [("!!int 5", 5), ("!!float 5", 5.0), ('!!int "7"', 7), ("!!null ''", None), ("!!str 0100", "0100")],
)
def test_a_tag_that_says_the_type_is_followed(value: str, meant: object) -> None:
    found = read("workload.model.options.width", value, "file")
    assert value_at(found, "workload.model.options.width") == meant


@pytest.mark.parametrize(
    "value", ["!!int 0100", "!!int many", "!!float x", "!!binary aGk=", "!!set {a}", "!!timestamp 2024-01-01"]
)
def test_a_tag_that_does_not_fit_is_refused(value: str) -> None:
    with pytest.raises(UserError, match="not valid YAML"):
        read("workload.model.options.width", value, "file")


def test_rescore_reads_its_parameters_as_the_run_file_does() -> None:
    assert reward_options("device", ["delta_pp=1e-3", "floor_pp=null"]) == {"delta_pp": 1e-3, "floor_pp": None}
    for word in ("0100", "off", "1:30", '"1_0"', "2024-01-01", "9" * 6000, "1e999", "[1]", ""):
        with pytest.raises(UserError, match="alpha"):
            reward_options("mnasnet", [f"alpha={word}"])
    with pytest.raises(UserError, match="did you mean 'alpha'"):
        reward_options("mnasnet", ["alhpa=1"])
    with pytest.raises(UserError, match="did you mean 'mnasnet'"):
        reward_options("mnasnett")
    with pytest.raises(UserError, match="parameter=value"):
        reward_options("mnasnet", ["alpha"])


@pytest.mark.parametrize(
    "word", [*SURPRISES, "1e-3", "1e5", "y", "null", "~", "", "true", "12", "1.10", ".5", "<<", "="]
)
def test_what_is_written_out_is_read_back_as_it_was(word: str) -> None:
    data = {"text": word, word: [word, {"deep": word}]}
    text = plain_yaml.dump(data)
    from secateur.device_profiles.settle import settle

    assert settle(plain_yaml.read(text).content, {(): {}}) == (data, ())
    assert yaml.safe_load(text) == data, "and by every other reader"
