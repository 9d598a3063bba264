"""Which number types int8 has on a device: by its processor, and by measurement where either kernel may be faster."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from secateur.device_profiles import DeviceProfile, load_profile
from secateur.export.qdq import SCHEMES, most_careful
from secateur.pipeline.run import schemes
from secateur.pipeline.run.journal import Journal
from secateur.pipeline.run.schemes import candidates, scheme_of, settle, settled


def board(name: str, arch: str, isa: str = "") -> DeviceProfile:
    like = load_profile("generic-arm64")
    return like.model_copy(update={"name": name, "facts": {"arch": arch, "isa": isa}})


def measured(ratios: Mapping[str, float], asked: list[str]) -> Any:
    def measure(name: str, tried: tuple[str, ...]) -> Mapping[str, float]:
        asked.append(name)
        return {scheme: ratios[scheme] for scheme in tried}

    return measure


def test_a_processor_says_which_number_types_may_be_best() -> None:
    assert candidates(board("pi", "aarch64", "asimd asimddp")) == ("U8S8", "S8S8")
    assert candidates(board("old", "armv7l")) == ("U8S8", "S8S8")
    assert candidates(board("server", "x86_64", "avx512_vnni")) == ("U8S8",)
    assert candidates(board("laptop", "x86_64", "avx2")) == ("U8S7",)
    assert scheme_of([board("pi", "aarch64"), board("laptop", "x86_64", "avx2")]) == "U8S7"
    assert most_careful(SCHEMES) == "U8S7" and most_careful(["S8S8", "U8S8"]) == "U8S8"


@pytest.mark.parametrize(
    ("ratios", "best"),
    [
        ({"U8S8": 0.8, "S8S8": 0.5}, "S8S8"),
        ({"U8S8": 0.5, "S8S8": 0.8}, "U8S8"),
        ({"U8S8": 0.500, "S8S8": 0.495}, "U8S8"),  # within the noise
    ],
)
def test_on_arm_what_measures_faster_is_taken_and_written_down(
    tmp_path: Path, ratios: Mapping[str, float], best: str
) -> None:
    profiles, asked = [board("pi", "aarch64"), board("server", "x86_64", "vnni")], list[str]()
    with Journal(tmp_path / "journal.jsonl", "run", "config") as journal:
        assert settle(journal, profiles, measured(ratios, asked)) == {"pi": best, "server": "U8S8"}
        assert asked == ["pi"]
        assert settle(journal, profiles, measured({}, asked)) == settled(journal.records)
    assert asked == ["pi"]


def test_a_run_of_an_earlier_version_goes_on_with_one_scheme_for_all(tmp_path: Path) -> None:
    profiles = [board("pi", "aarch64"), board("laptop", "x86_64", "avx2")]
    with Journal(tmp_path / "journal.jsonl", "run", "config") as journal:
        journal.append({"stage": sorted(schemes.BEFORE)[0], "kind": "choice"})
        found = settle(journal, profiles, measured({}, []))
        assert found == {"pi": "U8S7", "laptop": "U8S7"} and settled(journal.records) is None
