"""The champion of the run's device, as the trade-off shows it."""

from __future__ import annotations

from secateur.pipeline.report import figures as say
from secateur.pipeline.report.content import Row
from secateur.pipeline.report.material import Material
from secateur.pipeline.tracking import Decision

COMPARED = {"latency": "p50 ratio", "size": "size ratio", "memory": "peak RSS ratio"}
"""What was compared, by the axis on which it gives the champion a place."""
DROP = "accuracy drop"


def rows(m: Material) -> list[Row]:
    """Marks: this run's compact network where it was promoted (without a place: that is the network's own), and the
    version that it was compared with.

    That one is known by comparison only: both were timed in turn and read the same test images, and so it stands as far
    from the compact network as they were apart there.
    """
    decided, found = _decision(m), list[Row]()
    if decided is None or m.chosen is None:
        return []
    if decided.promoted:
        said = f"version {decided.version}, this run's compact network, is the champion of {decided.device}"
        found.append({"role": "champion", "hollow": False, "tip": said})
    other = _other(m, decided)
    return [*found, other] if other is not None else found


def told(m: Material) -> list[str]:
    """What the mark of another version stands for, in sentences."""
    decided = _decision(m)
    if decided is None or m.chosen is None:
        return []
    if decided.champion is None:
        return [f"{decided.device} had no champion before this version."] if decided.promoted else []
    who = f"Version {decided.champion} {'was' if decided.promoted else 'is'} the champion of {decided.device}"
    if _other(m, decided) is None:
        return [f"{who}; it has no mark here, because it was not compared by the accuracy and the costs of this chart."]
    return [
        f"{who}. It is no candidate of this run: both were timed in turn and read the same test images, and its mark "
        "stands as far from the compact network as they were apart there."
    ]


def _other(m: Material, decided: Decision) -> Row | None:
    """The version that was champion when the decision was made; None where its place is not known."""
    values = {gate.name: gate.value for gate in decided.gates}
    drop, place = values.get(DROP), m.chosen
    if decided.champion is None or place is None or place.accuracy is None or drop is None:
        return None
    apart = {cost: values.get(name) for cost, name in COMPARED.items() if cost in place.costs}
    xs = {cost: round(place.costs[cost] / ratio, 4) for cost, ratio in apart.items() if ratio}
    if not xs or m.metric != m.own_metric:
        return None
    who = "the champion before" if decided.promoted else f"the champion of {decided.device}"
    said = f"version {decided.champion}, {who}: {say.points(drop)} against the compact network on the test split"
    said += f", {say.times(1 / ratio)} its latency" if (ratio := apart.get("latency")) else ""
    role = "former champion" if decided.promoted else "champion"
    return {"xs": xs, "y": round(place.accuracy + drop, 5), "role": role, "tip": said}


def _decision(m: Material) -> Decision | None:
    """What was decided on the run's own device; None before that, or where nothing was compared."""
    if m.promote is None:
        return None
    named = (m.timed.device if m.timed is not None else m.device, m.device)
    return next((m.promote.devices[name] for name in named if name in m.promote.devices), None)
