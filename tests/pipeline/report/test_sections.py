"""What a report says: of a whole run, of one that failed half-way, of one with many candidates."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from importlib.resources import files
from typing import Any

import jsonschema
import pytest

from secateur.pipeline.report import roles
from secateur.pipeline.report.content import Section
from secateur.pipeline.report.document import SCHEMA_FILE, document, schema, text_of
from secateur.pipeline.report.markdown import markdown
from secateur.pipeline.report.material import Material
from secateur.pipeline.report.page import page
from secateur.pipeline.report.sections import sections, tradeoff
from secateur.pipeline.report.testing import GROUPS, made_up
from secateur.pipeline.run.facts import Facts, PromoteFacts
from secateur.pipeline.tracking import Decision, Gate

TITLES = [
    *("Verdict", "Trade-off", "Why MACs would have misled", "Gates", "Latency", "Where the time goes", "What was cut"),
    *("Sensitivity", "Search", "Accuracy in detail", "Precision", "Device", "Proofs", "Training"),
    *("Reproduce and use", "Limits of this report"),
]
PACKAGE = files("secateur.pipeline.report")


def section_of(material: Material, number: int) -> Section:
    """A section by its place in the report."""
    return sections(material)[number]


def test_a_whole_run_has_every_section_with_a_sentence() -> None:
    made = {section.title: section for section in sections(made_up())}
    assert list(made) == TITLES
    assert made["Verdict"].sentence == (
        "Do not ship: peak memory is unknown; 1.39x faster (95 % 1.380-1.400) on local, -1.00 pp top-1 (95 % "
        "-2.2 to +0.2, n = 400); 3 of 4 gates hold; not registered."
    )
    assert "budget: peak memory is unknown" in made["Gates"].sentence
    assert made["Trade-off"].sentence.startswith("61 candidates, ")
    assert "layer1.0.conv1" in made["Sensitivity"].sentence or "layer" in made["Sensitivity"].sentence
    assert all(section.figures for title, section in made.items() if title in TITLES[1:10])


@pytest.mark.parametrize("done", [(), ("baseline", "search")])
def test_a_run_that_failed_half_way_says_in_every_section_what_is_missing(done: tuple[str, ...]) -> None:
    whole = made_up()
    records = whole.records[:20] if done else ()
    nothing = {"benchmark": None, "layers": {}, "groups": {}, "images": {}, "changed": (), "profile": None, "code": {}}
    failed = made_up(facts=whole.facts.only(done) if done else Facts(), records=records, **nothing)
    made = sections(failed)
    assert [section.title for section in made] == TITLES
    assert all(section.sentence for section in made)
    stage = "the fine-tuning of the best candidates" if done else "the training of the baseline"
    assert f"{len(done)} of 6 stages are done. It goes on, or stopped, in {stage}." in made[0].sentence
    assert len(made[-1].text) > 5, "the last section collects what was not measured"
    told = text_of(document(failed, made))
    assert "Verdict" in page(failed, made, told) and "Verdict" in markdown(failed, made)


@pytest.mark.parametrize("metrics", [{"top1": 0.25}, {"latency_ratio": 1.2}])
def test_a_search_in_which_every_candidate_is_alike_has_its_report_too(metrics: dict[str, float]) -> None:
    material = made_up()
    records = json.loads(json.dumps(material.records))
    for record in records[2:]:
        record["evaluation"]["metrics"] |= metrics
    made = {section.title: section for section in sections(made_up(records=records))}
    assert "the front did not grow" in made["Search"].sentence
    assert made["Search"].text, "what the search cost is told all the same"


def bare(records: Any, *names: str) -> list[dict[str, Any]]:
    """Records without some metrics."""
    made = json.loads(json.dumps(list(records)))
    for record in made:
        for name in names:
            record.get("evaluation", {"metrics": {}})["metrics"].pop(name, None)
    return made


@pytest.mark.parametrize(
    "material",
    [
        made_up(0),
        made_up(1),
        made_up(2),
        made_up(4, records=bare(made_up(4).records, "latency_ratio", "latency_measured")),
        made_up(4, records=bare(made_up(4).records, "top1")),
        made_up(4, records=made_up(4).records[:1]),
    ],
    ids=["none", "one", "two", "none timed", "none scored", "no records"],
)
def test_a_run_with_few_or_untimed_candidates_has_a_report(material: Material) -> None:
    made = sections(material)
    assert [section.title for section in made] == TITLES
    assert "Verdict" in page(material, made, text_of(document(material, made)))


def test_the_json_fits_its_published_schema_and_names_no_machine() -> None:
    material = made_up()
    told = json.loads(text_of(document(material, sections(material))))
    published = json.loads((PACKAGE / SCHEMA_FILE).read_text(encoding="utf-8"))
    assert published == schema(), "write it anew: secateur.pipeline.report.document.schema"
    jsonschema.validate(told, published)
    text = json.dumps(told)
    assert "a-name" not in text and "/somewhere" not in text
    assert told["facts"]["export"]["compact"]["artifact"]["path"] == "compact.onnx"


def test_many_candidates_make_a_small_page_that_says_what_it_leaves_out() -> None:
    material = made_up(3000)
    made = sections(material)
    told = text_of(document(material, made))
    figure = next(figure for figure in made[1].figures if figure.name == "tradeoff")
    points = figure.chart.layers[-1]
    assert len(points.rows) == tradeoff.MOST_DRAWN + 1, "and the baseline"
    assert {row["role"] for row in points.rows} == {"candidate", "compact", "control", "baseline"}
    assert "1,500 of 3,002 points are drawn" in figure.note
    assert len(figure.table.rows) == 3002
    in_json = json.loads(told)["sections"][1]["figures"][0]["chart"]["layers"][-1]["rows"]
    assert len(in_json) == 3003
    assert len(page(material, made, told).encode()) < 2.5e6


def test_layers_in_float_are_named_with_what_8_bits_cost_them_and_integers_that_are_slower_are_said() -> None:
    whole = made_up()
    first = next(iter(GROUPS))
    compact = replace(
        whole.facts.export.compact,
        artifact=replace(whole.facts.export.compact.artifact, precision=f"int8 except {first}"),
    )
    made = section_of(replace(whole, facts=whole.facts.plus(export=replace(whole.facts.export, compact=compact))), 10)
    said = " ".join(made.text)
    assert f"In float stay {first} (20.0 %)" in said
    assert "The unpruned network in int8 takes 1.21 of its latency in fp32 on local: int8 is slower there." in said
    rows = made.figures[-1].chart.layers[0].rows
    assert [row["role"] for row in rows] == ["in float", *["in int8"] * (len(GROUPS) - 1)]
    assert [row["x"] for row in rows] == list(whole.facts.search.layer_precisions.sensitivity["int8"].values())


def test_proofs_are_the_steps_that_the_gate_has_written_down_with_the_metric_of_each() -> None:
    rows = section_of(made_up(), 12).tables[0].rows
    assert rows[-1][0] == "cut" and rows[-1][3:] == ["2.0e-07", "1.0e-04", "95.00 % to 94.00 %", "holds"]


def test_widths_are_coloured_by_their_share_of_the_macs_and_what_is_frozen_is_hatched() -> None:
    shares = dict(zip(GROUPS, [0.01 * (i + 1) for i in range(len(GROUPS))], strict=True))
    groups = made_up().groups | {"groups": [{"name": name, "macs_share": share} for name, share in shares.items()]}
    chart = section_of(made_up(groups=groups), 6).figures[0].chart
    rows = {row["y"]: row for row in chart.layers[0].rows if row["side"] == "after"}
    darkness = [-sum(int(rows[name]["fill"][i : i + 2], 16) for i in (1, 3, 5)) for name in GROUPS]
    assert darkness == sorted(darkness) and darkness[0] < darkness[-1]
    assert rows["fc (frozen)"]["hatched"] and "reaches the model's output" in rows["fc (frozen)"]["tip"]
    assert chart.ramp is not None and chart.ramp.high == "9 %"


@pytest.mark.parametrize("promoted", [True, False])
def test_the_champion_stands_as_far_from_the_compact_network_as_both_were_apart(promoted: bool) -> None:
    whole = made_up()
    gates = (Gate("accuracy drop", -0.02, 0.01, promoted), Gate("p50 ratio", 0.8, 1.0, True))
    decision = Decision("m", "3", "local", "2", gates, promoted)
    decided = PromoteFacts(promoted=promoted, devices={"local": decision}, reason="", files={})
    material = replace(whole, facts=whole.facts.plus(promote=decided))
    chosen = material.chosen
    assert chosen is not None and chosen.accuracy is not None
    made = section_of(material, 1)
    marks = {row["role"]: row for row in made.figures[0].chart.layers[-1].rows if "champion" in row["role"]}
    other = marks.pop("former champion" if promoted else "champion")
    assert other["y"] == pytest.approx(chosen.accuracy - 0.02)
    assert other["xs"]["latency"] == pytest.approx(chosen.costs["latency"] / 0.8, abs=1e-4)
    assert "version 2" in other["tip"] and "-2.00 pp" in other["tip"] and "1.25x its latency" in other["tip"]
    assert [(row["key"], row["y"]) for row in marks.values()] == ([(chosen.key, chosen.accuracy)] if promoted else [])
    assert f"Version 2 {'was' if promoted else 'is'} the champion of local" in " ".join(made.text)


def test_a_sustained_run_says_what_heat_does_and_a_run_without_one_says_so() -> None:
    whole = made_up()
    made = section_of(whole, 4)
    assert any(
        "30.0 s of calls without a pause slows it down: p50 of the compact network is 0.170 ms" in text
        and "50 °C at the beginning, 71 °C at most, 70 °C at the end" in text
        for text in made.text
    )
    heat = {figure.name: figure for figure in made.figures if figure.name.startswith("heat")}
    assert list(heat) == ["heat", "heat-temperature_c"]
    assert [row["y"] for row in heat["heat"].chart.layers[0].rows] == [
        round(each["p50_ms"], 6) for each in whole.sustained["seconds"]
    ]
    assert any("no clock frequency of the sustained run" in text for text in made.missing)
    without = replace(whole, facts=whole.facts.plus(benchmark=replace(whole.facts.benchmark, sustained=None)))
    assert any("no sustained run" in text and "device.sustain_s" in text for text in section_of(without, 4).missing)


def test_the_uniform_control_has_the_latency_that_was_measured_with_the_finalists() -> None:
    made = section_of(made_up(), 1)
    (control,) = [row for row in made.figures[0].chart.layers[-1].rows if row["role"] == "control"]
    assert control["xs"]["latency"] == 0.79 and not control["hollow"]
    assert "in fp32, they take 0.790 and 0.700 of the baseline's latency" in " ".join(made.text)


def test_pictures_can_be_left_out_everywhere() -> None:
    shown, hidden = made_up(), made_up(changed=())
    assert any(section.pictures for section in sections(shown))
    assert not any(section.pictures for section in sections(hidden))
    assert "data:image" not in page(hidden, sections(hidden), "{}")


def test_words_of_others_are_text() -> None:
    evil = "</script><script>alert(1)</script>{{ 7 * 191 }}"
    material = made_up(run_id=evil)
    text = page(material, sections(material), "{}")
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text and "1337" not in text


def test_only_the_page_s_own_scripts_may_run() -> None:
    material = made_up()
    text = page(material, sections(material), "{}")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    directives = [directive.strip().split() for directive in policy[1].replace("&#39;", "'").split(";")]
    assert directives[:3] == [["default-src", "'none'"], ["img-src", "data:"], ["style-src", "'unsafe-inline'"]]
    assert directives[3][0] == "script-src" and all(each.startswith("'sha256-") for each in directives[3][1:])
    assert len(directives[3]) == 1 + len(re.findall(r"<script>", text))


def test_vendored_files_are_what_they_are_said_to_be() -> None:
    for each in json.loads((PACKAGE / "vendor" / "vendor.json").read_text(encoding="utf-8"))["packages"]:
        content = (PACKAGE / "vendor" / each["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == each["sha256"], each["name"]
        assert "Redistribution" in (PACKAGE / "vendor" / each["license_file"]).read_text(encoding="utf-8")


@pytest.mark.parametrize("background", [roles.LIGHT, roles.DARK])
def test_every_colour_stands_out_from_the_page(background: str) -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(colour: str) -> float:
        darker, lighter = sorted((luminance(colour), luminance(background)))
        return (lighter + 0.05) / (darker + 0.05)

    weak: dict[str, Any] = {n: contrast(r.colour) for n, r in {**roles.ROLES, "": roles.OTHER}.items()}
    assert not {name: value for name, value in weak.items() if value < 3}
