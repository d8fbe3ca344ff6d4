"""Line charts as SVG text: the mean of several runs by step, with their range as a band."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 60, 190, 20, 50
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Colours that colour-blind readers can distinguish (Okabe and Ito)."""
Curve = Sequence[tuple[float, float]]


def svg(series: Mapping[str, Sequence[Curve]], *, x: str, y: str) -> str:
    """Return a chart of `series`: name -> runs, each a list of (x, y) with y between 0 and 1.

    Raises ValueError if there is nothing to draw, if there are too many series, or if the runs of a series differ in x.
    """
    if not 0 < len(series) <= len(COLOURS):
        raise ValueError(f"1 to {len(COLOURS)} series can be drawn, not {len(series)}")
    most = max(point[0] for runs in series.values() for run in runs for point in run)
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(step: float, value: float) -> str:
        return f"{LEFT + width * step / most:.1f},{TOP + height * (1 - value):.1f}"

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *axes(most, width, height, escape(x), escape(y)),
    ]
    for i, ((name, runs), colour) in enumerate(zip(series.items(), COLOURS, strict=False)):
        steps = [step for step, _ in runs[0]]
        if any([step for step, _ in run] != steps for run in runs):
            raise ValueError(f"the runs of {name} were not measured at the same steps")
        columns = [[run[k][1] for run in runs] for k in range(len(steps))]
        above = [at(step, max(column)) for step, column in zip(steps, columns, strict=True)]
        below = [at(step, min(column)) for step, column in zip(steps, columns, strict=True)]
        mean = [at(step, statistics.mean(column)) for step, column in zip(steps, columns, strict=True)]
        row = TOP + 20 + 22 * i
        out += [
            f'<polygon points="{" ".join([*above, *reversed(below)])}" fill="{colour}" fill-opacity="0.12"/>',
            f'<polyline points="{" ".join(mean)}" fill="none" stroke="{colour}" stroke-width="2"/>',
            f'<line x1="{WIDTH - RIGHT + 15}" y1="{row}" x2="{WIDTH - RIGHT + 35}" y2="{row}" stroke="{colour}" '
            'stroke-width="2"/>',
            f'<text x="{WIDTH - RIGHT + 42}" y="{row + 4}">{escape(name)}</text>',
        ]
    return "\n".join([*out, "</svg>"]) + "\n"


def axes(most: float, width: int, height: int, x: str, y: str) -> list[str]:
    """Return grid, numbers and axis names, with values in fifths and steps in fourths."""
    out = []
    for k in range(6):
        row = TOP + height * (1 - k / 5)
        out.append(f'<line x1="{LEFT}" y1="{row:.1f}" x2="{LEFT + width}" y2="{row:.1f}" stroke="#dddddd"/>')
        out.append(f'<text x="{LEFT - 8}" y="{row + 4:.1f}" text-anchor="end">{k / 5:.1f}</text>')
    for k in range(5):
        column = LEFT + width * k / 4
        out.append(f'<text x="{column:.1f}" y="{TOP + height + 20}" text-anchor="middle">{most * k / 4:g}</text>')
    middle = TOP + height / 2
    out.append(f'<text x="{LEFT + width / 2}" y="{HEIGHT - 10}" text-anchor="middle">{x}</text>')
    out.append(f'<text x="18" y="{middle}" text-anchor="middle" transform="rotate(-90 18 {middle})">{y}</text>')
    return out
