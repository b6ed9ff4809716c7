"""The things that the demo draws: each a stack of flat parts, every part an outline and a tone.

Outlines are in units of the thing's radius: x to the right and y down, from -1 to 1, (0, 0) in the middle. A thing is
drawn in one colour and its shades, with neutral parts where the real thing has them: wheels, windows, a stem.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Point = tuple[float, float]
Outline = Sequence[Point]
# The colour itself, a darker and a lighter shade of it; and of no colour: white, black, gray, and the tan of wood.
Tone = Literal["colour", "dark", "light", "white", "black", "gray", "tan"]


@dataclass(frozen=True)
class Part:
    """A filled outline of one tone."""

    outline: Outline
    tone: Tone = "colour"


def box(left: float, top: float, right: float, bottom: float) -> Outline:
    """Return a rectangle."""
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def arc(x: float, y: float, width: float, height: float, first: float = 0, last: float = 360) -> list[Point]:
    """Return points on an ellipse with these half axes, from one angle to another: degrees from the right, downwards.

    A whole turn, closed, is the ellipse.
    """
    steps = max(3, round(abs(last - first) / 18))
    angles = [math.radians(first + (last - first) * step / steps) for step in range(steps + 1)]
    return [(x + width * math.cos(angle), y + height * math.sin(angle)) for angle in angles]


def stroke(points: Outline, thickness: float) -> Outline:
    """Return the outline of a line of some thickness through these points."""
    sides: list[list[Point]] = [[], []]
    for index, (x, y) in enumerate(points):
        (x0, y0), (x1, y1) = points[max(index - 1, 0)], points[min(index + 1, len(points) - 1)]
        length = math.hypot(x1 - x0, y1 - y0) or 1.0
        across, down = -(y1 - y0) / length * thickness / 2, (x1 - x0) / length * thickness / 2
        sides[0].append((x + across, y + down))
        sides[1].append((x - across, y - down))
    return [*sides[0], *reversed(sides[1])]


def mirrored(*parts: Part) -> list[Part]:
    """Return the parts, and each once more on the other side of the middle."""
    return [*parts, *(Part([(-x, y) for x, y in part.outline], part.tone) for part in parts)]


def wave(left: float, right: float, height: float, *, waves: float, y: float = 0.0) -> list[Point]:
    """Return points on a sine."""
    steps = 24
    places = [step / steps for step in range(steps + 1)]
    return [(left + (right - left) * at, y - height * math.sin(2 * math.pi * waves * at)) for at in places]


_PETALS = [(0.36 * math.cos(turn), -0.32 + 0.36 * math.sin(turn)) for turn in (math.radians(60 * k) for k in range(6))]
_SNAKE = wave(-0.95, 0.62, 0.36, waves=1.5, y=0.1)

# In order of drawing: a later part covers an earlier one.
THINGS: dict[str, list[Part]] = {
    "house": [
        Part(box(0.4, -0.85, 0.62, -0.2), "gray"),
        Part(box(-0.72, -0.15, 0.72, 0.92)),
        Part([(-1.0, -0.1), (0, -0.95), (1.0, -0.1)], "dark"),
        Part(box(-0.18, 0.3, 0.2, 0.92), "tan"),
        *mirrored(Part(box(0.36, 0.12, 0.6, 0.4), "white")),
    ],
    "car": [
        Part([(-0.62, 0.0), (-0.34, -0.52), (0.32, -0.52), (0.66, 0.0)]),
        Part(box(-1.0, -0.05, 1.0, 0.42)),
        Part([(-0.46, -0.06), (-0.27, -0.4), (-0.04, -0.4), (-0.04, -0.06)], "white"),
        Part([(0.06, -0.06), (0.06, -0.4), (0.26, -0.4), (0.48, -0.06)], "white"),
        *mirrored(Part(arc(0.52, 0.42, 0.27, 0.27), "black"), Part(arc(0.52, 0.42, 0.12, 0.12), "gray")),
    ],
    "boat": [
        Part(box(-0.05, -0.95, 0.05, 0.4), "gray"),
        Part([(0.12, -0.9), (0.12, 0.22), (0.82, 0.22)], "light"),
        Part([(-0.12, -0.6), (-0.12, 0.22), (-0.62, 0.22)], "white"),
        Part([(-1.0, 0.36), (1.0, 0.36), (0.62, 0.9), (-0.62, 0.9)]),
    ],
    "cup": [
        Part(stroke(arc(0.45, 0.1, 0.36, 0.32, -90, 90), 0.16)),
        Part([(-0.72, -0.4), (0.52, -0.4), (0.4, 0.8), (-0.6, 0.8)]),
        Part(arc(-0.1, -0.4, 0.62, 0.16), "dark"),
        Part(stroke([(-0.3, -0.6), (-0.22, -0.75), (-0.32, -0.9)], 0.08), "gray"),
        Part(stroke([(0.05, -0.6), (0.13, -0.75), (0.03, -0.9)], 0.08), "gray"),
    ],
    "plate": [
        Part(arc(0, 0, 0.7, 0.7)),
        Part(arc(0, 0, 0.47, 0.47), "light"),
        Part(box(-0.92, -0.1, -0.82, 0.75), "gray"),
        Part(box(-1.0, -0.75, -0.94, -0.1), "gray"),
        Part(box(-0.9, -0.75, -0.84, -0.1), "gray"),
        Part(box(-0.8, -0.75, -0.74, -0.1), "gray"),
        Part([(0.8, -0.75), (0.95, -0.6), (0.95, 0.75), (0.84, 0.75)], "gray"),
    ],
    "chair": [
        *mirrored(Part(box(0.38, -0.95, 0.54, 0.2)), Part(box(0.42, 0.25, 0.58, 0.95))),
        Part(box(-0.4, -0.88, 0.4, -0.62)),
        Part(box(-0.4, -0.42, 0.4, -0.2)),
        Part([(-0.56, 0.06), (0.56, 0.06), (0.7, 0.34), (-0.7, 0.34)], "dark"),
    ],
    "umbrella": [
        Part(stroke([(0, -0.1), (0, 0.7), *arc(-0.17, 0.7, 0.17, 0.2, 0, 170)], 0.1), "gray"),
        Part([*arc(0, 0, 1.0, 0.95, 180, 360), *arc(0.67, 0, 0.33, 0.13, 0, -180), *arc(0, 0, 0.34, 0.13, 0, -180)]),
        Part([(0, -0.95), *arc(0, 0, 0.34, 0.13, 0, -180)], "light"),
        Part(box(-0.04, -1.0, 0.04, -0.9), "gray"),
    ],
    "mushroom": [
        Part([(-0.26, 0), (0.26, 0), (0.36, 0.9), (-0.36, 0.9)], "tan"),
        Part([*arc(0, 0.1, 0.98, 0.98, 180, 360), *arc(0, 0.1, 0.98, 0.16, 0, 180)]),
        Part(arc(-0.1, -0.5, 0.2, 0.19), "white"),
        *mirrored(Part(arc(0.56, -0.15, 0.17, 0.17), "white")),
    ],
    "moon": [Part([*arc(0, 0, 0.95, 0.95, 52, 308), *arc(0.444, 0, 0.761, 0.761, 281, 79)])],
    "flower": [
        Part(box(-0.05, -0.2, 0.05, 1.0), "dark"),
        Part([(0, 0.85), (0.2, 0.5), (0.6, 0.4), (0.45, 0.75)], "dark"),
        *(Part(arc(x, y, 0.27, 0.27)) for x, y in _PETALS),
        Part(arc(0, -0.32, 0.24, 0.24), "tan"),
    ],
    "hat": [
        Part(box(-0.56, -0.8, 0.56, 0.5)),
        Part(box(-0.56, 0.12, 0.56, 0.4), "white"),
        Part(arc(0, 0.55, 1.0, 0.22)),
    ],
    "plane": [
        *mirrored(
            Part([(0.08, -0.25), (1.0, 0.3), (1.0, 0.5), (0.08, 0.25)]),
            Part([(0.05, 0.6), (0.42, 0.82), (0.42, 0.96), (0.05, 0.85)], "dark"),
            Part(box(0.45, -0.1, 0.57, 0.2), "gray"),
        ),
        Part([*arc(0, -0.6, 0.17, 0.4, 180, 360), (0.08, 1.0), (-0.08, 1.0)]),
        Part(arc(0, -0.72, 0.1, 0.12), "white"),
    ],
    "bicycle": [
        *mirrored(Part(stroke(arc(0.57, 0.35, 0.38, 0.38), 0.1), "black")),
        Part(stroke([(-0.57, 0.35), (-0.2, -0.3), (0.36, -0.3), (0.0, 0.35), (-0.57, 0.35)], 0.15)),
        Part(stroke([(-0.28, -0.45), (0.0, 0.35)], 0.15)),
        Part(stroke([(0.57, 0.35), (0.32, -0.5)], 0.15)),
        Part(stroke([(0.2, -0.56), (0.55, -0.56)], 0.13)),
        Part(box(-0.48, -0.54, -0.1, -0.42), "black"),
    ],
    "lamp": [
        Part(box(-0.08, -0.1, 0.08, 0.85), "gray"),
        Part([(-0.4, -0.95), (0.4, -0.95), (0.85, 0.0), (-0.85, 0.0)]),
        Part([(-0.1, -0.95), (0.1, -0.95), (0.22, 0.0), (-0.22, 0.0)], "light"),
        Part(arc(0, 0.95, 0.5, 0.3, 180, 360), "dark"),
    ],
    "bottle": [
        Part(box(-0.17, -0.9, 0.17, -0.3)),
        Part([*arc(0, 0, 0.42, 0.5, 180, 360), (0.42, 1.0), (-0.42, 1.0)]),
        Part(box(-0.42, 0.2, 0.42, 0.65), "white"),
        Part(box(-0.2, -1.0, 0.2, -0.8), "dark"),
    ],
    "cat": [
        *mirrored(
            Part([(0.12, -0.4), (0.72, -0.98), (0.8, 0.1)]),
            Part([(0.34, -0.4), (0.63, -0.68), (0.66, -0.2)], "light"),
        ),
        Part(arc(0, 0.15, 0.82, 0.7)),
        *mirrored(
            Part(arc(0.34, 0.0, 0.17, 0.17), "white"),
            Part(arc(0.34, 0.0, 0.08, 0.15), "black"),
            Part(stroke([(0.3, 0.42), (1.0, 0.3)], 0.05), "gray"),
            Part(stroke([(0.3, 0.5), (1.0, 0.58)], 0.05), "gray"),
        ),
        Part([(-0.14, 0.28), (0.14, 0.28), (0, 0.46)], "light"),
    ],
    "rabbit": [
        *mirrored(Part(arc(0.27, -0.5, 0.2, 0.5)), Part(arc(0.27, -0.48, 0.09, 0.36), "light")),
        Part(arc(0, 0.4, 0.62, 0.55)),
        *mirrored(Part(arc(0.26, 0.26, 0.11, 0.13), "black")),
        Part(arc(0, 0.62, 0.26, 0.2), "light"),
        Part(box(-0.11, 0.68, 0.11, 0.92), "white"),
    ],
    "snake": [
        Part(stroke(_SNAKE, 0.3)),
        *(Part(arc(*_SNAKE[place], 0.09, 0.09), "dark") for place in range(2, 22, 3)),
        Part(stroke([(0.85, 0.05), (1.05, 0.0)], 0.08), "gray"),
        Part(arc(0.7, 0.05, 0.27, 0.21)),
        Part(arc(0.74, -0.02, 0.08, 0.08), "white"),
    ],
    "present": [
        *mirrored(Part(stroke(arc(0.3, -0.68, 0.26, 0.2), 0.13), "light")),
        Part(box(-0.76, -0.2, 0.76, 0.92)),
        Part(box(-0.9, -0.5, 0.9, -0.18), "dark"),
        Part(box(-0.14, -0.5, 0.14, 0.92), "light"),
    ],
    "crown": [
        Part([(-0.82, 0.75), (-0.98, -0.5), (-0.45, 0.05), (0, -0.8), (0.45, 0.05), (0.98, -0.5), (0.82, 0.75)]),
        Part(box(-0.82, 0.5, 0.82, 0.75), "dark"),
        Part(arc(0, -0.8, 0.13, 0.13), "light"),
        *mirrored(Part(arc(0.95, -0.5, 0.12, 0.12), "light"), Part(arc(0.45, 0.62, 0.09, 0.09), "white")),
        Part(arc(0, 0.62, 0.09, 0.09), "white"),
    ],
    "dress": [
        Part([(-0.42, -0.95), (-0.2, -0.95), (0, -0.6), (0.2, -0.95), (0.42, -0.95), (0.3, -0.1), (-0.3, -0.1)]),
        Part([(-0.28, -0.1), (0.28, -0.1), (0.85, 0.9), (-0.85, 0.9)]),
        Part([(-0.76, 0.74), (0.76, 0.74), (0.85, 0.9), (-0.85, 0.9)], "light"),
        Part(box(-0.31, -0.16, 0.31, 0.0), "dark"),
    ],
    "rocket": [
        Part([(-0.2, 0.6), (0, 1.05), (0.2, 0.6)], "tan"),
        *mirrored(Part([(0.25, 0.1), (0.72, 0.6), (0.68, 0.85), (0.2, 0.6)], "dark")),
        Part([*arc(0, 0.0, 0.36, 1.0, 180, 360), (0.26, 0.65), (-0.26, 0.65)]),
        Part(arc(0, -0.25, 0.19, 0.19), "white"),
        Part(arc(0, -0.25, 0.11, 0.11), "gray"),
    ],
    "ghost": [
        Part([*arc(0, -0.2, 0.74, 0.75, 180, 360), *wave(0.74, -0.74, 0.13, waves=2.5, y=0.8)]),
        *mirrored(Part(arc(0.27, -0.25, 0.18, 0.23), "white"), Part(arc(0.27, -0.2, 0.09, 0.12), "black")),
        Part(arc(0, 0.2, 0.13, 0.16), "dark"),
    ],
    "flag": [
        Part([*wave(-0.7, 0.95, 0.1, waves=1, y=-0.8), *wave(0.95, -0.7, -0.1, waves=1, y=0.2)]),
        Part([*wave(-0.7, 0.95, 0.1, waves=1, y=-0.45), *wave(0.95, -0.7, -0.1, waves=1, y=-0.15)], "light"),
        Part(box(-0.82, -1.0, -0.68, 1.0), "gray"),
    ],
}
