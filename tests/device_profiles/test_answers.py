"""What devices answer to a probe and to a parity check: taken whole or refused."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.device_profiles import DeviceError, LocalTarget
from secateur.device_profiles.answers import checked

PROBE: dict[str, Any] = {
    "device": {"machine": "x86_64", "cpus": 2, "host": "board"},
    "runtime": {"onnxruntime": "1.31.1", "providers": ["CPUExecutionProvider"]},
    "limits": {"free_bytes": 1000},
    "now": {"cpu_pressure": 0.0},
    "protocol": 2,
}


def code_of(op: str, answer: Any) -> str:
    with pytest.raises(DeviceError) as caught:
        checked(op, answer)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2000
    return caught.value.code


def test_a_real_device_passes():
    target = LocalTarget()
    assert target.prepare()["runtime"]["onnxruntime"]
    target.close()
    assert checked("probe", PROBE) is PROBE


@pytest.mark.parametrize(
    "changes",
    [
        {"device": None},
        {"device": ["board"]},
        {"device": {"host": "\x1b[2J"}},
        {"device": {"cpus": float("nan")}},
        {"device": {"cpus": 10**30}},
        {"device": {"host": "x" * 100_000}},
        {"runtime": "1.31"},
        {"runtime": {"onnxruntime": 1.31}},
        {"runtime": {"providers": "CPUExecutionProvider"}},
        {"runtime": {"providers": [7]}},
        {"limits": [1]},
        {"now": {"cpu_pressure": float("inf")}},
        {"later": {"a\x00b": 1}},
    ],
)
def test_a_hostile_probe_is_refused(changes: dict[str, Any]):
    assert code_of("probe", PROBE | changes) == "bad-answer"


@pytest.mark.parametrize("answer", [None, [], "fine", 7, {}, {"outputs": 7}, {"outputs": ""}, {"outputs": "a\x1b[2Jb"}])
def test_a_hostile_parity_answer_is_refused(answer: Any):
    assert code_of("infer", answer) == "bad-answer"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@given(st.sampled_from(["benchmark", "probe", "infer", "sweep"]), JSON, st.sampled_from(sorted(PROBE)))
def test_whatever_is_answered_ends_in_an_answer_or_one_error(op: str, value: Any, key: str):
    for answer in (value, PROBE | {key: value}):
        try:
            checked(op, answer)
        except DeviceError as error:
            assert error.code == "bad-answer"
            assert str(error).isprintable()
