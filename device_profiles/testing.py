"""What every kind of target and every runtime promises, as checks for whoever writes one; no pytest needed."""

from __future__ import annotations

import ast
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from secateur.device_profiles.agent import PROTOCOL
from secateur.device_profiles.errors import DeviceError
from secateur.device_profiles.target import Target, TargetKind

OLDEST_PYTHON = (3, 8)
RUN_S = 120.0
NUMBER_TYPES = {"float32", "float16", "float64", "uint8", "int8", "int32", "int64", "bool"}


def check_kind_of_target(module: Any, connect: Mapping[str, Any]) -> None:
    """What a kind of target says of itself; nothing is reached.

    Args:
        module: as those of ``secateur.device_profiles.targets``.
        connect: settings that would reach a device.

    Raises:
        AssertionError: something of it is not as promised, or does not fit the rest.
    """
    kind = TargetKind("mine", module)
    assert (module.__doc__ or "").strip(), "there is no docstring; its first line is how the kind is listed"
    kind.settings(**connect)
    _refuses(kind, {**connect, "no_such_setting": 1}, "set extra='forbid' in model_config")
    assert not kind.missing(connect), f"{kind.missing(connect)} is said to be missing from settings that reach a device"
    assert set(kind.missing({})) <= kind.settings.model_fields.keys(), "what is missing is no setting"
    words = (*kind.machine(connect), kind.address(connect))
    assert all(isinstance(word, str) and word.isprintable() for word in words), f"{words} are no words to show"
    for option in kind.add_options:
        given = option.read(option.example)
        assert given and given.keys() <= kind.settings.model_fields.keys(), f"--{option.name} gives no settings"
    given_by_options = {name for option in kind.add_options for name in option.read(option.example)}
    assert set(kind.missing({})) <= given_by_options, "a setting without default has no option of `devices add`"


def check_target(target: Target, file: Path) -> None:
    """What an opened target does, on a device that can be reached.

    Args:
        target: closed in the end.
        file: any file, which is brought to the device.

    Raises:
        AssertionError: a method does not do what ``Target`` says.
    """
    probed = target.prepare()
    assert probed["protocol"] == PROTOCOL, "prepare() returns no answer of the agent to a probe"
    assert target.put(file) == target.put(file), "a file that is there is brought again, to another place"
    for wrong in (lambda: target.put(file.with_name("no such file")), lambda: _infer(target, "/no/such/file")):
        _fails(wrong)
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder, "fetched")
        _fails(lambda: target.fetch("/no/such/file", there))
        assert not there.exists(), "half a file was left"
    target.close()
    target.close()
    assert target.prepare()["protocol"] == PROTOCOL, "a closed target cannot be used again"
    target.close()


def check_runtime(module: Any, file: Path, provider: str = "CPUExecutionProvider") -> None:
    """What a runtime promises, on this machine.

    Args:
        module: as those of ``secateur.device_profiles.runtimes``.
        file: a network in the runtime's format.

    Raises:
        AssertionError: a function is missing or does not give what the agent needs.
    """
    _check_runs_beside_the_agent(Path(module.__file__))
    assert isinstance(module.FORMAT, str) and module.FORMAT, "FORMAT names no format"
    facts = module.facts()
    assert isinstance(facts["version"], str) and provider in facts["providers"], f"{facts} lacks version or provider"
    session = module.load(str(file), 1, provider)
    inputs, outputs = module.inputs(session), module.outputs(session)
    assert inputs and outputs and all(isinstance(name, str) for name in outputs)
    for _, shape, number in inputs:
        assert number in NUMBER_TYPES, f"{number} is no number type of NumPy that the agent knows"
        assert all(isinstance(size, int | str) or size is None for size in shape)
    feeds = {name: np.ones([n if isinstance(n, int) else 1 for n in shape], number) for name, shape, number in inputs}
    first, second = module.run(session, feeds), module.run(session, feeds)
    assert len(first) == len(outputs), "run() gives another number of arrays than outputs() has names"
    for one, other in zip(first, second, strict=True):
        assert np.isfinite(np.asarray(one, dtype=np.float64)).all() and np.array_equal(one, other)


def _check_runs_beside_the_agent(file: Path) -> None:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"), feature_version=OLDEST_PYTHON)
    except SyntaxError as error:
        raise AssertionError(f"{file.name} is not for Python {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]}: {error}") from error
    for node in ast.walk(tree):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        ours = [name for name in names if name.partition(".")[0] == "secateur"]
        assert not ours, f"{file.name} imports {ours[0]}, which is not on the device"


def _refuses(kind: TargetKind, connect: Mapping[str, Any], fix: str) -> None:
    try:
        kind.settings(**connect)
    except ValidationError:
        return
    raise AssertionError(f"an unknown setting is taken; {fix}")


def _infer(target: Target, place: str) -> None:
    model = {"name": "m", "path": place, "sha256": "0" * 64}
    target.run({"protocol": PROTOCOL, "op": "infer", "models": [model], "threads": 1}, RUN_S)


def _fails(call: Any) -> None:
    """See that a call fails as every method of a target does."""
    try:
        call()
    except DeviceError as error:
        assert str(error) and error.code, "a DeviceError without text or code"
        return
    except Exception as error:
        raise AssertionError(f"a target raises {type(error).__name__} where only DeviceError may come") from error
    raise AssertionError("what cannot be done raises no DeviceError")
