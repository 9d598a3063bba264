"""The device profiling report: one self-contained HTML page and the same facts as JSON, and the final table."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from PIL import Image
from torch import Tensor

from secateur.device_profiles import BenchmarkResult, DeviceProfile
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.files import write_whole
from secateur.pipeline.report.charts import cloud, courses, histogram, lines
from secateur.pipeline.run.facts import EARLIER_NAMES, Facts, InRuntime, ModelFacts, Speedup
from secateur.pipeline.run.records import of_candidates
from secateur.pipeline.training.curve import Fitted
from secateur.pruning.search.landing import MARKED

Row = tuple[str, str, str, str]
METRICS = {"map50": "mAP50", "map": "COCO mAP"}
"""Names of metrics as people know them, where these differ."""
MAX_FRONT = 15
LATENCIES = (
    ("load", "load_ms", "ms", 3),
    ("first call", "first_ms", "ms", 3),
    ("p50", "p50_ms", "ms", 3),
    ("p95", "p95_ms", "ms", 3),
    ("CPU time, p50", "cpu_p50_ms", "ms", 3),
    ("CPU time, p95", "cpu_p95_ms", "ms", 3),
    ("peak memory", "peak_rss_bytes", "bytes", 0),
    ("energy of a call", "energy_mj", "mJ", 3),
)
"""Title, key, unit and decimals of what is said of latency."""


def final_table(facts: Facts) -> list[Row]:
    """Rows (what, baseline, compact, change) of the table a run ends with."""
    base, compact = facts.gate.models
    metric = facts.gate.metric
    rows: list[Row] = []
    for name in (metric, *(name for name in ("map",) if name in base.metrics)):
        change = f"{100 * (compact[name] - base[name]):+.2f} pp"
        rows.append((f"{METRICS.get(name, name)} (test split)", f"{base[name]:.2%}", f"{compact[name]:.2%}", change))
    rows += [_other(name, told, base, compact) for name, told in (facts.gate.others or {}).items()]
    units = (("MACs", "macs", 1e6, "M"), ("params", "params", 1e3, "k"), ("file size", "size_bytes", 1e3, "kB"))
    for title, key, scale, unit in units:
        before, after = base.size[key], compact.size[key]
        change = f"{after / before - 1:+.1%}"
        rows.append((title, f"{before / scale:,.2f} {unit}", f"{after / scale:,.2f} {unit}", change))
    if (rounded := facts.export.compact.rounded) is not None:
        agreement = f"same argmax as PyTorch in {rounded.argmax_agreement:.1%}"
        rows.append(("precision", "fp32", facts.export.compact.artifact.precision, agreement))
    rows.append(_milliseconds("p50 latency", base.timing.p50_ms, compact.timing.p50_ms))
    rows.append(_milliseconds("p95 latency", base.timing.p95_ms, compact.timing.p95_ms))
    timed = facts.benchmark
    if (whole := timed.postprocessing) is not None:
        rows.append(_milliseconds(f"p50 with {whole.name}", *(timing.p50_ms for timing in whole.latency)))
    rows.append(("speed-up", "1.00x", f"{timed.speedup.value:.2f}x", interval(timed.speedup)))
    if timed.flags:
        rows.append(("what disturbed the timing", "", "", ", ".join(timed.flags)))
    others = [row for row in _devices(facts) if row[0] != timed.device]
    return rows + [(f"p50 on {name}", before, now, change) for name, before, now, change in others]


def _other(name: str, told: tuple[str, str], base: ModelFacts, compact: ModelFacts) -> Row:
    """A metric of any unit; its change is a share of what it was."""
    unit, better = told
    before, after = (f"{model[name]:.4g} {unit}".strip() for model in (base, compact))
    change = f"{compact[name] / base[name] - 1:+.1%}" if base[name] else ""
    return f"{name} (test split, {better} is better)", before, after, change


def _milliseconds(title: str, before: float, after: float) -> Row:
    return title, f"{before:.3f} ms", f"{after:.3f} ms", f"{after / before - 1:+.1%}"


def _devices(facts: Facts) -> list[Row]:
    """Rows (device, p50 of the baseline, of the compact model, speed-up), where there are several devices."""
    rows = []
    for name, timed in (facts.benchmark.fleet or {}).items():
        before, now = (f"{timing.p50_ms:.3f} ms" for timing in timed.latency)
        rows.append((name, before, now, f"{timed.speedup.value:.2f}x, {interval(timed.speedup)}"))
    return rows


def runtimes(facts: Facts, own: str) -> list[tuple[str, ...]]:
    """Rows (device, runtime, precision, both medians, speed-up, remark), where there are several runtimes.

    Args:
        own: the runtime of the devices' profiles.
    """
    if not facts.benchmark.runtimes:
        return []
    timed = [InRuntime(device=n, runtime=own, timed=each) for n, each in facts.benchmark.of_devices.items()]
    every = [*timed, *facts.benchmark.runtimes]
    fastest = {
        device: min((e for e in every if e.device == device and e.timed), key=lambda e: _medians(e)[1]).runtime
        for device in facts.benchmark.of_devices
    }
    return [_in_runtime(entry, entry.runtime == fastest[entry.device]) for entry in every]


def _medians(entry: InRuntime) -> tuple[float, float]:
    """Milliseconds of both networks, by the clock that ratios come from."""
    assert entry.timed is not None
    before, after = entry.timed.latency
    cpu = entry.timed.statistic == "cpu"
    return (before.cpu_p50_ms, after.cpu_p50_ms) if cpu else (before.p50_ms, after.p50_ms)


def _in_runtime(entry: InRuntime, is_fastest: bool) -> tuple[str, ...]:
    if entry.timed is None:
        return entry.device, entry.runtime, "", "", "", "", entry.reason
    times = (f"{ms:.3f} ms" for ms in _medians(entry))
    faster = f"{entry.timed.speedup.value:.2f}x, {interval(entry.timed.speedup)}"
    return entry.device, entry.runtime, entry.precision or "", *times, faster, "the fastest here" if is_fastest else ""


def interval(faster: Speedup) -> str:
    """The interval of a speed-up, in words."""
    if faster.low is None or faster.high is None:
        return "no interval: under 3 processes"
    return f"95 % {faster.low:.2f} to {faster.high:.2f}"


def final_table_markdown(facts: Facts) -> str:
    """The final table, the gate and the registered version, as Markdown."""
    lines = ["| | baseline | compact | change |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in final_table(facts)]
    lines += ["", f"Gate: **{'passed' if facts.gate.passed else 'not passed'}**", "", went_by(facts)]
    lines += registered(facts)
    return "\n".join(lines)


def went_by(facts: Facts) -> str:
    """What the search went by, as a sentence."""
    split, said = facts.search.split, f"The search went by {facts.gate.search_metric}"
    return f"{said}; the weights know its images by heart" if split is not None and split.memorised else said


def registered(facts: Facts) -> list[str]:
    """What became of the model in the registry, a line each: its version, and whether it was promoted where."""
    entry, decided = facts.register, facts.promote
    if entry is None:
        return []
    alias = "champion" if decided is not None and decided.promoted else "challenger"
    said = [f"Registered: {entry.name} version {entry.version}, alias {alias}"]
    if decided is None:
        return said
    for device, decision in decided.devices.items():
        if not decision.promoted:
            against = f"champion version {decision.champion}" if decision.champion else "no champion"
            failed = "; ".join(f"{gate.name}: {gate.reason}" for gate in decision.gates if not gate.ok)
            said.append(f"Not promoted on {device} ({against}): {failed}")
    return said + ([f"Not promoted: {decided.reason}"] if decided.reason else [])


def write_report(
    directory: Path,
    config: RunFile,
    profile: DeviceProfile,
    facts: Facts,
    records: Sequence[Mapping[str, Any]],
    front: Sequence[Mapping[str, Any]] = (),
    pictures: Sequence[tuple[Tensor, Tensor]] = (),
    unreachable: bool = False,
) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.json`` into the run directory; returns both paths.

    Args:
        records: the journal's.
        front: the Pareto front, as ``secateur.pipeline.lifecycle.rescore.front_rows`` gives it.
        pictures: what the baseline and the compact model find on the same images, uint8 (3, H, W).
        unreachable: whether the tracking server is unreachable just now.
    """
    result = BenchmarkResult.from_json((directory / "benchmark.json").read_text(encoding="utf-8"))
    points, metric = _points(config, facts, records), facts.gate.search_metric
    page = Environment(
        loader=PackageLoader("secateur.pipeline.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    html = page.get_template("report.html.j2").render(
        config=config,
        profile=profile,
        facts=facts,
        table=final_table(facts),
        model=config.tracking.registered_model or config.name,
        unreachable=unreachable,
        devices=_devices(facts),
        runtimes=runtimes(facts, profile.runtime),
        interval=interval,
        environment={key: value for key, value in result.environment.items() if key != "telemetry"},
        spoiled=result.spoiled,
        statistic=result.statistic,
        num_processes=len(result.processes),
        num_calls=len(result.wall_ms("compact")),
        latency_chart=histogram(
            {name: result.wall_ms(name) for name in ("baseline", "compact")}, "latency of one call, ms"
        ),
        search_chart=cloud(points, "MACs, share of the baseline", f"{config.name}: {metric} on the search split"),
        num_points=len(points),
        front=[_front_row(row, facts) for row in front[:MAX_FRONT]],
        widths=_widths(facts),
        projected=facts.finetune.best.candidate.projected_share,
        marked=MARKED,
        control=_control(facts),
        pictures=[(_data_uri(before), _data_uri(after)) for before, after in pictures],
        latencies=_latencies(facts),
        trainings=[(name, fitted, _course(facts, fitted)) for name, fitted in facts.trainings.items()],
        device=(device := facts.search.device),
        stairs=lines(device.curves, "channels", "time, narrowest = 1", 16) if device.curves else "",
    )
    html_file, json_file = directory / "report.html", directory / "report.json"
    write_whole(html_file, html)
    told = config.model_dump(mode="json", exclude={"tracking": {"uri"}})  # an address may hold a password
    known = facts.to_json()
    known |= {earlier: known[name] for name, earlier in EARLIER_NAMES.items()}
    data = {"format": 1, "name": config.name, "config": told, "facts": known, "environment": dict(result.environment)}
    write_whole(json_file, json.dumps(data, indent=1) + "\n")
    return html_file, json_file


def _course(facts: Facts, fitted: Fitted) -> str:
    """A training's loss, and the gate's metric on the search split, by epoch."""
    metric, series = facts.gate.metric, fitted.series()
    held_out = series.get(f"search_split.{metric}", [])
    shown = {"loss": series["loss"], f"{metric} (search split)": held_out}
    return courses({name: points for name, points in shown.items() if points}, "epoch", "loss and metric")


def _data_uri(picture: Tensor) -> str:
    """A picture as part of a page: JPEG in base64."""
    file = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _latencies(facts: Facts) -> list[tuple[str, str, str]]:
    """Rows (what, baseline, compact) of the latency table, those that the device tells."""
    rows = []
    for title, key, unit, decimals in LATENCIES:
        values = [getattr(timing, key) for timing in facts.benchmark.latency]
        if None not in values:
            before, now = (f"{value:,.{decimals}f} {unit}" for value in values)
            rows.append((title, before, now))
    if (after := facts.benchmark.postprocessing) is not None:
        for title, key in (("p50", "p50_ms"), ("p95", "p95_ms")):
            before, now = (f"{getattr(timing, key):,.3f} ms" for timing in after.latency)
            rows.append((f"{title} with {after.name}", before, now))
    return rows


def _front_row(row: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    """One line of the front's table."""
    candidate, metrics = row["candidate"], row["evaluation"]["metrics"]
    return {
        "name": " ".join(dict.fromkeys((row["stage"], candidate["origin"], str(candidate["id"])))),
        "weights": " ".join(filter(None, (row["weights"], candidate["base"]))),
        "accuracy": metrics[facts.gate.search_metric],
        "macs": metrics["macs"] / facts.search.reference["macs"],
        "latency": metrics.get("latency_ratio"),
    }


def _points(config: RunFile, facts: Facts, records: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, str, str]]:
    """Every evaluated candidate as (MACs ratio, accuracy, kind, label)."""
    macs = facts.search.reference["macs"]
    points = []
    for record in of_candidates(records):
        values = record["evaluation"]["metrics"]
        accuracy = values.get(facts.gate.search_metric)
        if accuracy is None or record["stage"] in ("smallest", "control"):
            continue
        kind = record["stage"] if record["stage"] != "search" else record["kind"]
        label = f"{record['candidate']['origin']} {record['candidate']['id']}: {accuracy:.4f}"
        points.append((values["macs"] / macs, accuracy, kind, label))
    return points


def _control(facts: Facts) -> list[tuple[str, float, float]]:
    """Rows (what, accuracy, MACs ratio): the chosen plan and the uniform control, both as cut from the baseline."""
    control, metric, macs = facts.finetune.control, facts.gate.search_metric, facts.search.reference["macs"]
    if control is None:
        return []
    pairs = ("the chosen plan", control.chosen), ("uniform", control.uniform)
    return [(what, entry.evaluation[metric], entry.evaluation["macs"] / macs) for what, entry in pairs]


def _widths(facts: Facts) -> list[tuple[str, int, int]]:
    """(group, channels before, channels after) of the compact model."""
    plan = facts.finetune.best.candidate.plan
    return [(name, plan.sizes[name], plan.widths[name]) for name in plan.sizes]
