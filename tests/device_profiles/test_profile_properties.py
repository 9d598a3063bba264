"""Any YAML ends in a device profile or one message; every number has bounds; YAML guesses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secateur.device_profiles import DeviceError, DeviceProfile, load_profile
from secateur.device_profiles.profile import TARGETS
from secateur.device_profiles.settle import schema_of
from tests.tools import schemas

SHARED = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
TIER = "{processes: 1, warmup: 1, min_repeats: 5, min_seconds: 0}"


def outcome(folder: Path, text: str) -> DeviceProfile | str:
    file = folder / "board.yaml"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        return load_profile(file)
    except DeviceError as error:
        assert error.code == "profile"
        assert all(c.isprintable() or c == "\n" for c in str(error)), repr(str(error))
        return str(error)


def strategy() -> st.SearchStrategy[str]:
    """Profiles in which anything may stand anywhere."""
    own = schema_of(DeviceProfile)
    lines = [
        schemas.values(below, own["$defs"]).map(lambda text, key=key: f"{key}: {text}")
        for key, below in own["properties"].items()
        if key != "connect"
    ]
    for target in TARGETS.names():
        settings_ = schema_of(TARGETS.load(target).Settings)
        lines.append(
            schemas.values(settings_, settings_.get("$defs", {})).map(
                lambda text, target=target: f"target: {target}\nconnect: {text}"
            )
        )
    lines.append(st.sampled_from(schemas.SURPRISES).map(lambda word: f"extends: {word}"))
    return st.lists(st.one_of(lines), max_size=4).map(lambda found: "\n".join([*found, ""]))


@given(strategy())
@SHARED
def test_any_profile_is_valid_or_told_what_is_wrong(tmp_path: Path, text: str) -> None:
    found = outcome(tmp_path, text)
    if isinstance(found, DeviceProfile):
        assert schemas.finite(found.model_dump(mode="json"), 2**50)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
@SHARED
def test_any_text_is_a_profile_or_told_what_is_wrong(tmp_path: Path, text: str) -> None:
    outcome(tmp_path, text)


@pytest.mark.parametrize("number", ["1000000000000000000", "-1000000000000000000", "1e308", "1e999", ".nan"])
def test_every_number_of_a_profile_and_of_every_target_has_bounds(tmp_path: Path, number: str) -> None:
    own = schema_of(DeviceProfile)
    found = [(key, form, "") for key, form in schemas.numbers(own, own["$defs"])]
    for target in TARGETS.names():
        settings_ = schema_of(TARGETS.load(target).Settings)
        places = schemas.numbers(settings_, settings_.get("$defs", {}), "connect")
        found += [(key, form, f"target: {target}\n") for key, form in places]
    assert {"threads", "final.min_repeats", "channel_multiple.conv", "connect.port"} <= {key for key, *_ in found}
    for key, form, before in found:
        section, _, last = key.partition(".")
        value = form.replace("@", number)
        text = f"{section}: {{{last}: {value}}}\n" if last else f"{key}: {value}\n"
        message = outcome(tmp_path, before + text)
        assert isinstance(message, str) and f"{key}: " in message, key


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("description: 0100\n", 'line 1: description: expected text, got 0100.*"0100" in quotes'),
        ("threads: 1_0\n", "line 1: threads: expected a whole number.* write 10"),
        ("timing: maybe\n", "line 1: timing: expected true or false"),
        ("sources: [2024-01-01]\n", 'line 1: sources.0: .*"2024-01-01" in quotes'),
        ("facts: {released: 2024-01-01}\n", 'line 1: facts.released: .*"2024-01-01" in quotes'),
        ("facts:\n  - 1\n", "line 1: facts: Input should be a valid dictionary"),
        ("target: ssh\nconnect: {host: 0100}\n", 'line 2: connect.host: .*"0100" in quotes'),
        ("target: ssh\nconnect: {host: a, port: 0x16}\n", "line 2: connect.port: .*write 22"),
        ("extends: off\n", "line 1: extends: unknown device profile 'off'"),
        (f"final: {TIER[:-2]}99, max_seconds: 60}}\n".replace("min_seconds: 99", "min_seconds: 99"), "max_seconds"),
    ],
)
def test_a_guess_is_refused_in_a_profile_too(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DeviceError, match=said):
        file = tmp_path / "board.yaml"
        file.write_text(text)
        load_profile(file)


def test_a_boolean_of_a_profile_takes_yes_and_off_and_an_empty_section_is_none(tmp_path: Path) -> None:
    found = outcome(tmp_path, f"timing: off\nfinal: {TIER}\nsearch: {TIER[:-1]}, strict: yes}}\nbudgets:\nfacts:\n")
    assert isinstance(found, DeviceProfile)
    assert (found.timing, found.search.strict, found.budgets.p50_ms, found.facts) == (False, True, None, {})
