"""What a client makes of the agent's words and of its end."""

from __future__ import annotations

import json
from typing import Any

import pytest

from secateur.device_profiles import DeviceError
from secateur.device_profiles.agent import PROTOCOL
from secateur.device_profiles.protocol import CANCEL_LINE, Reader, error_of, hung, read_answer, request_line

ANSWER = f'{{"protocol": {PROTOCOL}, "models": 1}}\n'


def test_a_request_is_one_line_whatever_is_in_it():
    line = request_line({"op": "probe", "work": "a\nb é\udcff", "timeout_s": 3}, run_id="r", python=None, timeout_s=4)
    assert line.endswith("\n")
    assert line.count("\n") == 1
    assert line.isascii()
    expected = {"protocol": PROTOCOL, "op": "probe", "work": "a\nb é\udcff", "timeout_s": 4, "run_id": "r"}
    assert json.loads(line) == expected
    assert json.loads(CANCEL_LINE) == {"cancel": True}
    assert CANCEL_LINE.endswith("\n")


def test_noise_around_the_answer_is_ignored():
    noise = 'Welcome to "this" board!\n\n[2]\n{"color": "red"}\nnull\n{broken\n'
    answer = read_answer(f"{noise}{ANSWER}{noise}bye", "", 0)
    assert answer == {"protocol": PROTOCOL, "models": 1}


def test_events_arrive_in_order_and_in_any_pieces():
    seen: list[Any] = []
    reader = Reader(seen.append)
    stream = (
        'motd\n{"event": "started", "pid": 7, "worker_pid": 8}\n{"event": "progress", "text": "é"}\n' + ANSWER
    ).encode()
    for i in range(len(stream)):
        reader.feed(stream[i : i + 1])  # cuts the é in two
    assert [event["event"] for event in seen] == ["started", "progress"]
    assert (reader.pid, reader.worker_pid) == (7, 8)
    assert reader.answer(0)["models"] == 1


def test_an_answer_without_a_last_newline_counts():
    assert read_answer(ANSWER.rstrip(), "", 0)["models"] == 1


def test_what_progress_raises_is_not_swallowed():
    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Reader(stop).feed('{"event": "progress"}\n')


def test_only_the_end_of_stderr_is_kept():
    reader = Reader()
    for _ in range(100):
        reader.feed_stderr("x" * 1000)
    reader.feed_stderr(b"last \xff words")
    assert reader.stderr.endswith("last � words")
    assert len(reader.stderr) < 30_000


@pytest.mark.parametrize("returncode", [66, 0, -9, None])
def test_the_agents_own_error_wins_over_its_exit_code(returncode: int | None):
    with pytest.raises(DeviceError, match="the device reports model-load: m: broken; export it again") as caught:
        read_answer('{"error": "model-load", "detail": "m: broken; export it again"}\n', "noise", returncode)
    assert caught.value.code == "model-load"


@pytest.mark.parametrize(
    ("returncode", "signal", "code", "text"),
    [
        (-4, None, "agent-died", "signal SIGILL"),
        (-9, None, "agent-died", "signal SIGKILL"),
        (-99, None, "agent-died", "signal 99"),
        (None, "KILL", "agent-died", "signal SIGKILL"),
        (-1, "SIGSEGV", "agent-died", "signal SIGSEGV"),
        (1, None, "agent-died", "exit code 1"),
        (0, None, "agent-died", "exit code 0"),
        (None, None, "agent-died", "not known"),
        (127, None, "no-python", r"set connect\.python"),
        (126, None, "wrong-arch", r"set connect\.python"),
    ],
)
def test_no_answer(returncode: int | None, signal: str | None, code: str, text: str):
    with pytest.raises(DeviceError, match=f"{text}.*last words") as caught:
        read_answer("noise", "Traceback\nlast words", returncode, signal)
    assert caught.value.code == code


def test_an_answer_from_an_agent_that_then_failed_is_no_answer():
    with pytest.raises(DeviceError, match=r"SIGSEGV.*nothing on stderr"):
        read_answer(ANSWER, "", -11)


def test_errors_are_made_without_a_reader_too():
    assert error_of({"error": "busy", "detail": "pid 3"}, "", 75).code == "busy"
    assert hung(3.5).code == "client-timeout"
    assert "3.5 s" in str(hung(3.5))


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("opening", ["[", '{"error": ', '{"event": ['])
def test_what_is_nested_too_deeply_is_said_whether_the_line_ends_or_the_agent_does(opening: str, end: str):
    """The answer is the same for a line that came whole and for one that the agent's end cut off."""
    with pytest.raises(DeviceError, match="nested too deeply") as caught:
        read_answer(opening * 100_000 + end, "", 0)
    assert caught.value.code == "reply-too-long"
