"""Both networks as verified ONNX files."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own


def test_parity_and_certificate_hold(finished: Any) -> None:
    _, facts = finished
    proofs = [facts.search.certificate, facts.export.certificate]
    for proof in [*proofs, *(network.parity for network in facts.export.networks)]:
        assert proof.ok
        assert proof.max_relative_error < 1e-5


def test_every_file_is_named_with_its_digest(finished: Any) -> None:
    _, facts = finished
    assert facts.export.files == {
        "baseline.onnx": facts.export.baseline.artifact.sha256,
        "compact.onnx": facts.export.compact.artifact.sha256,
    }
