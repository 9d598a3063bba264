"""Which channels went, group by group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.pipeline.report import figures as say
from secateur.pipeline.report.content import Axis, Chart, Code, Figure, Layer, Ramp, Row, Section, Table, nothing
from secateur.pipeline.report.material import Material
from secateur.pipeline.report.roles import on_ramp
from secateur.pipeline.report.sections.macs import step_of
from secateur.pruning.search.landing import MARKED

TITLE = "What was cut"
MOST_FROZEN, LEAST_SHARE = 12, 0.0005
"""Frozen layers of the chart, and the share of the MACs that one has at least."""


def section(m: Material) -> Section:
    """Widths before and after, the device's steps, and what could not be cut."""
    if m.finetune is None:
        return nothing(TITLE, "No plan was chosen, so nothing was cut.")
    plan = m.finetune.best.candidate.plan
    before, after = sum(plan.sizes.values()), sum(plan.widths.values())
    cut = [name for name in plan.sizes if plan.widths[name] < plan.sizes[name]]
    said = (
        f"{say.plural(before - after, 'channel')} of {before:,} were cut, in {len(cut)} of "
        f"{say.plural(len(plan.sizes), 'group')}"
    )
    if cut:
        most = min(cut, key=lambda name: plan.widths[name] / plan.sizes[name])
        said += f"; most in {most}, which keeps {plan.widths[most]} of {plan.sizes[most]}"
    text = [m.finetune.widths.text] if m.finetune.widths is not None else []
    share = m.finetune.best.candidate.projected_share
    if share > 0:
        mark = "Much of this plan is no choice of the method's: " if share > MARKED else ""
        text.append(f"{mark}{say.percent(share, 0)} of the MACs it removes were moved to bring it to the target.")
    if m.search is not None and m.search.scope is not None and m.search.scope.reason:
        scope = m.search.scope
        text.append(f"Which groups could be cut: {scope.chosen} (search.scope {scope.asked}); {scope.reason}.")
    frozen = _frozen(m)
    graph = [Code("Channel groups and what is frozen", m.search.graph)] if m.search is not None else []
    missing = [] if m.groups else ["What was cut: the groups' shares of the MACs were not recorded."]
    return Section(
        TITLE,
        said + ".",
        text=text,
        figures=[_figure(m)],
        tables=[frozen] if frozen is not None else [],
        code=graph,
        missing=missing,
    )


def _figure(m: Material) -> Figure:
    assert m.finetune is not None
    plan, step = m.finetune.best.candidate.plan, step_of(m)
    shares = {str(each["name"]): each.get("macs_share") for each in m.groups.get("groups", ())}
    frozen = _heaviest_frozen(m)
    known = [share for share in (*shares.values(), *(each["macs_share"] for each in frozen.values())) if share]
    top = max(known, default=0.0)
    rows: list[Row] = []
    steps: list[Row] = []
    cells = []
    for name, size in plan.sizes.items():
        width, share = plan.widths[name], shares.get(name)
        of_macs = "" if share is None else f", in {say.percent(share, 1)} of the MACs"
        rows += [
            {
                "x": size,
                "y": name,
                "side": "before",
                "role": "baseline",
                "hollow": True,
                "tip": f"{name}: {size} channels before{of_macs}",
            },
            {
                "x": width,
                "y": name,
                "side": "after",
                "role": "compact",
                "tip": f"{name}: {width} of {size} channels{of_macs}",
                "macs_share": share,
                **({} if share is None or not top else {"fill": on_ramp(share / top)}),
            },
        ]
        nearest = max(step, round(width / step) * step)
        if nearest <= size:
            steps.append(
                {"x": nearest, "y": name, "role": "the device's step", "tip": f"{nearest} is a multiple of {step}"}
            )
        pays = "yes" if width % step == 0 else "no"
        cells.append(
            [
                name,
                str(size),
                str(width),
                say.percent(width / size, 0),
                pays,
                "" if share is None else say.percent(share, 1),
            ]
        )
    rows += [
        {
            "x": each["channels"],
            "y": name,
            "side": "after",
            "role": "frozen",
            "hatched": True,
            "tip": f"{name} is frozen: {each['channels']} channels, {say.percent(each['macs_share'], 1)} of the MACs; "
            f"{each['reason']}",
            "macs_share": each["macs_share"],
        }
        for name, each in frozen.items()
    ]
    names = (*plan.sizes, *frozen)
    chart = Chart(
        Axis("Channels", zero=True),
        Axis("Channel group, in the network's order", scale="names", names=names),
        [Layer("bars", rows), Layer("ticks", steps)],
        "Channels of each group before and after, darker with a larger share of the MACs, with the device's nearest "
        "step; frozen layers are hatched",
        height=max(100, 26 * len(names)),
        grouped=True,
        ramp=Ramp("share of the MACs", "0 %", say.percent(top, 0)) if top else None,
    )
    note = (
        f"Red: the device's step (multiples of {step}) nearest to the width. MACs: the share of all that would go "
        "with the whole group."
    )
    if frozen:
        note += " Hatched, below the groups: frozen layers; the table has the reasons"
        note += f" ({MOST_FROZEN} with the most MACs are drawn)." if len(frozen) == MOST_FROZEN else "."
    columns = ("group", "before|", "after|", "kept|", f"multiple of {step}", "share of MACs|")
    return Figure("widths", "Widths before and after", chart, Table("Widths", columns, cells), note)


def _heaviest_frozen(m: Material) -> dict[str, Mapping[str, Any]]:
    """Layers that no plan cuts, in their order: those with the most MACs, by what they are called in the chart."""
    told: dict[str, Mapping[str, Any]] = {}
    for (layer, _), each in _every_frozen(m).items():
        if each["macs_share"] < LEAST_SHARE:
            continue
        told.setdefault(f"{layer} (frozen)", each)
    kept = sorted(told, key=lambda name: -told[name]["macs_share"])[:MOST_FROZEN]
    return {name: each for name, each in told.items() if name in kept}


def _every_frozen(m: Material) -> dict[tuple[str, str], Mapping[str, Any]]:
    """One for each layer and reason."""
    told: dict[tuple[str, str], Mapping[str, Any]] = {}
    for each in m.groups.get("frozen", ()):
        told.setdefault((str(each["layer"]), str(each["reason"])), each)
    return told


def _frozen(m: Material) -> Table | None:
    """Layers that no plan cuts, with the reason."""
    told = _every_frozen(m)
    if not told:
        return None
    rows = [
        [layer, str(each["channels"]), say.percent(each["macs_share"], 1), reason]
        for (layer, reason), each in told.items()
    ]
    return Table("Frozen: what could not be cut, and why", ("layer", "channels|", "share of MACs|", "reason"), rows)
