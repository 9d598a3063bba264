"""`validate` is quick because of what it does not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from secateur.pipeline.workloads.data import digit_pixels
from secateur.pruning.search import METHODS
from tests.pipeline.helpers import write_tiny

HEAVY = {"mlflow", "optuna", "pandas", "prefect", "sklearn", "scipy", "onnx", "onnxruntime", "pymoo", "torchvision"}
COMPILER = "torch._dynamo"
ASK = """
import json, sys
from secateur.pipeline.cli import app as cli
sys.argv = ["secateur", "validate", *sys.argv[1:]]
try:
    cli.main()
except SystemExit as ended:
    assert not ended.code, ended.code
print(json.dumps(sorted(sys.modules)))
"""


@pytest.mark.parametrize("override", [None, "search.method=optuna"], ids=["ccep", "a method whose engine is heavy"])
def test_validate_imports_nothing_heavy(override: str | None, tmp_path: Path) -> None:
    arguments = [str(write_tiny(tmp_path)), *(["--set", override] if override else [])]
    command = [sys.executable, "-c", ASK, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    modules = json.loads(done.stdout.splitlines()[-1])
    assert "torch" in modules
    assert HEAVY & {name.partition(".")[0] for name in modules} == set()
    assert COMPILER not in modules


def test_the_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    images, labels = digit_pixels.read()
    bundled = load_digits()
    np.testing.assert_array_equal(images, bundled.images)
    np.testing.assert_array_equal(labels, bundled.target)


def test_methods_are_found_by_their_text_as_by_running_them() -> None:
    for name, line in METHODS.descriptions().items():
        module = METHODS.load(name)
        assert hasattr(module, "search") and hasattr(module, "Options")
        assert line == (module.__doc__ or "").strip().partition("\n")[0]
