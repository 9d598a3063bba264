"""Colours, shapes and dashes: fixed by what a mark stands for, with 3:1 contrast at least on both backgrounds."""

from __future__ import annotations

from dataclasses import dataclass

LIGHT, DARK = "#ffffff", "#14171c"
"""Backgrounds of the page."""


@dataclass(frozen=True)
class Role:
    """How a mark looks.

    Args:
        shape: of points, as Vega calls it.
        dash: of lines, lengths in pixels; empty = none.
        hatched: whether its mark is hatched in a list of what is what.
    """

    colour: str
    shape: str = "circle"
    dash: tuple[int, ...] = ()
    hatched: bool = False


BLUE, GREEN, ORANGE, PURPLE, GREY, RED, TEAL, BROWN = (
    *("#3b7dd8", "#0e8a5f", "#c8641b", "#a259c4", "#7a7f8a", "#d8453b", "#17879c", "#96703c"),
)
ROLES = {
    "baseline": Role(GREY, "square", (6, 3)),
    "compact": Role(GREEN, "diamond"),
    "candidate": Role(BLUE, "circle"),
    "control": Role(ORANGE, "triangle-up", (2, 2)),
    "champion": Role(PURPLE, "cross", (8, 2, 2, 2)),
    "former champion": Role(PURPLE, "triangle-down"),
    "frozen": Role(GREY, "square", hatched=True),
    "front": Role(BLUE, "stroke"),
    "target or budget": Role(RED, "stroke", (4, 4)),
    "interval": Role(PURPLE, "stroke"),
    "bound": Role(GREY, "stroke", (4, 4)),
    "the device's step": Role(RED, "stroke"),
    "error band": Role(RED, "stroke"),
    "both alike": Role(GREY, "stroke", (4, 4)),
    "holds": Role(GREEN, "square"),
    "does not hold": Role(RED, "square"),
    "aligned": Role(GREEN, "circle"),
    "unaligned": Role(ORANGE, "triangle-up"),
    "infeasible": Role(ORANGE, "stroke"),
    "failed": Role(RED, "stroke"),
    "load": Role(PURPLE, "square"),
    "first call": Role(ORANGE, "square"),
    "steady": Role(GREEN, "square"),
    "Conv": Role(BLUE),
    "FusedConv": Role(BLUE),
    "Gemm": Role(ORANGE),
    "MatMul": Role(ORANGE),
    "FusedMatMul": Role(ORANGE),
    "Add": Role(GREEN),
    "Mul": Role(GREEN),
    "Relu": Role(TEAL),
    "Clip": Role(TEAL),
    "Softmax": Role(TEAL),
    "ReorderInput": Role(RED),
    "ReorderOutput": Role(RED),
    "QLinearConv": Role(PURPLE),
    "in float": Role(ORANGE, "square"),
    "conv": Role(BLUE, "circle"),
    "pointwise": Role(GREEN, "diamond", (6, 3)),
    "depthwise": Role(ORANGE, "triangle-up", (2, 2)),
    "linear": Role(PURPLE, "cross", (8, 2, 2, 2)),
}
OTHER = Role(BROWN, "circle")


PALE, DARKEST = "#f3d9c5", "#a33c06"
"""Ends of a ramp; what is filled with it has an outline besides, for the pale end has too little contrast."""


def on_ramp(share: float) -> str:
    """The colour of a share (0-1) of a ramp's length."""
    ends = ((int(PALE[i : i + 2], 16), int(DARKEST[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(a + max(0.0, min(1.0, share)) * (b - a)):02x}" for a, b in ends)


def role(name: str) -> Role:
    """How marks of a role look; all that have none of their own look alike."""
    return ROLES.get(name, OTHER)
