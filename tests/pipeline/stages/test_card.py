"""The model card: figures with what they rest on, what is unknown, and front matter that hubs can read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import yaml

from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.run.opening import device_profiles
from secateur.pipeline.stages.card import About, body, card, check, cut, front_matter
from tests.pipeline.helpers import TINY, made_up_facts, merged


def about(**changes: Any) -> About:
    base = merged({k: v for k, v in TINY.items() if k != "device"}, changes)
    config = RunFile.model_validate(base)
    return About(config, "tiny-1", device_profiles(config)[0], "My digits", 385, "c" * 40)


def read(text: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = yaml.safe_load(text)
    return found


def test_front_matter_tells_the_test_metrics_with_their_data() -> None:
    told = read(front_matter(about(), made_up_facts()))
    assert (told["license"], told["library_name"], told["pipeline_tag"]) == ("unknown", "onnx", "image-classification")
    (result,) = told["model-index"][0]["results"]
    assert result["dataset"] == {"name": "My digits", "type": "My-digits", "split": "test"}
    assert result["metrics"] == [{"type": "accuracy", "value": 0.9, "name": "top1 (test split, n = 385)"}]
    assert card(about(), made_up_facts()).startswith("---\n")


@pytest.mark.parametrize(
    ("licences", "told"),
    [
        ({"model": "mit"}, {"license": "unknown"}),
        ({"model": "mit", "weights": "mit", "data": "mit"}, {"license": "mit"}),
        (
            {"model": "mit", "weights": "Own: terms", "data": "cc0-1.0"},
            {"license": "other", "license_name": "model: mit, weights: Own: terms, data: cc0-1.0"},
        ),
    ],
)
def test_licences_are_the_user_s_words_or_unknown(licences: dict[str, str], told: dict[str, str]) -> None:
    given = about(card={"licence": licences})
    found = read(front_matter(given, made_up_facts()))
    assert {key: value for key, value in found.items() if key.startswith("license")} == told
    page = body(given, made_up_facts())
    assert all(f"| {part} | {name} |" in page for part, name in licences.items())
    unsaid = [part for part in ("model", "weights", "data") if part not in licences]
    assert (f"Nobody has said under which licence these are: {', '.join(unsaid)}." in page) == bool(unsaid)


def test_what_speaks_against_a_model_is_in_its_card() -> None:
    disturbed = made_up_facts(benchmark={"flags": ("contended",)}, gate={"passed": False})
    page = body(about(card={"limits": "Not for cars."}), disturbed)
    for line in ("Gate: not passed", "`contended` (other programs", "do not ship it", "- Not for cars.", "n = 385"):
        assert line in page or line in card(about(), disturbed), line
    assert "Flags of the timing: none." in body(about(), made_up_facts())


def test_a_metric_that_is_no_number_is_left_to_the_report() -> None:
    facts = made_up_facts()
    facts.gate.models.compact.metrics["loss"] = math.inf  # type: ignore[index]
    (result,) = read(front_matter(about(), facts))["model-index"][0]["results"]
    assert [metric["type"] for metric in result["metrics"]] == ["accuracy"]


def test_a_network_of_one_s_own_is_named_without_its_folders() -> None:
    own = about(workload={"model": {"name": "/home/me/nets.py:small"}})
    assert "/home/me" not in card(own, made_up_facts())
    assert "`nets.py:small`" in card(own, made_up_facts())


def test_the_schema_refuses_what_hubs_do_not_know() -> None:
    told = dict(read(front_matter(about(), made_up_facts())))
    check(told)
    for wrong in ({"license": "My Licence"}, {"pipeline_tag": "classification"}, {"author": "me"}):
        with pytest.raises(ValueError, match="front matter of the model card is wrong"):
            check({**told, **wrong})


def test_a_description_is_cut_between_sections() -> None:
    page = "# a\n\nfirst\n\n## b\n\nsecond\n\n## c\n\n" + "x" * 100
    assert cut(page, 1000) == page
    assert cut(page, 90).startswith("# a\n\nfirst\n\n## b\n\nsecond\n")
    assert len(cut(page, 90)) <= 90
    assert "x" not in cut(page, 90).replace("The rest", "").replace("CARD", "")
