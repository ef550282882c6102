"""A small generator of inline SVG: axes, lines, points with intervals, bars, all coloured by the page's CSS.

Written by hand rather than drawn by a plotting library, because inline SVG that inherits `color` follows light and
dark mode, prints well, shows its numbers on hover and costs a few kilobytes. Nothing is fetched. Every text is escaped.

Sizes are in units of the view box, chosen so that a chart is readable at the width of a phone (about 360 pixels)
and two stand side by side on a desk. Classes: `s0` the teacher, `s1` ... `s8` the students (see style.css).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from clipdistill.runtime.console import compact

WIDTH, HEIGHT = 400.0, 265.0
SMALL_WIDTH, SMALL_HEIGHT = 320.0, 210.0
COLOURS = 8


def number(value: float) -> str:
    """A coordinate with one decimal at most: "12", "12.5"."""
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


def colour_class(index: int) -> str:
    """CSS class of the entry with this colour index (0 is the teacher)."""
    return f"s{0 if index == 0 else (index - 1) % COLOURS + 1}"


@dataclass
class Axis:
    """A linear or logarithmic scale from data to the unit interval, with round ticks.

    show: how a tick is written. pad: share of the range added at both ends.
    """

    low: float
    high: float
    label: str
    log: bool = False
    show: Callable[[float], str] = compact
    pad: float = 0.06
    floor: float | None = None
    ticks: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.log:
            low, high = math.log10(self.low), math.log10(self.high)
            reach = max(high - low, 0.3)
            middle = (low + high) / 2
            self._a, self._b = middle - reach * (0.5 + self.pad), middle + reach * (0.5 + self.pad)
            self.ticks = _log_ticks(10**self._a, 10**self._b)
        else:
            reach = (self.high - self.low) or abs(self.high) * 0.1 or 1.0
            self._a, self._b = self.low - reach * self.pad, self.high + reach * self.pad
            if self.floor is not None:
                self._a = max(self._a, self.floor)
            self.ticks = _linear_ticks(self._a, self._b)

    def __call__(self, value: float) -> float:
        """Position of a value, 0 at the start of the axis and 1 at its end (clipped a little outside)."""
        scaled = math.log10(max(value, 1e-300)) if self.log else value
        return min(1.02, max(-0.02, (scaled - self._a) / (self._b - self._a)))


def _linear_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [s * 10.0**p for p in powers for s in steps if low <= s * 10.0**p <= high]
        if len(ticks) >= 3:
            break
    while len(ticks) > 6:
        ticks = ticks[::2]
    return ticks


class Chart:
    """One framed plot: create it with two axes, draw, then `render()`.

    name: what a screen reader says. Drawing methods take data coordinates.
    """

    def __init__(self, x: Axis, y: Axis, name: str, *, width: float = WIDTH, height: float = HEIGHT) -> None:
        self.x, self.y, self.name = x, y, name
        self.width, self.height = width, height
        widest = max([len(y.show(t)) for t in y.ticks] or [2])
        self.left, self.right, self.bottom = 16.0 + 7.0 * widest, width - 12.0, height - 42.0
        self.top = 26.0 if y.label else 12.0
        self.parts: list[str] = []
        self._boxes: list[tuple[float, float, float, float]] = []

    def px(self, value: float) -> float:
        """Horizontal position of a value of x."""
        return self.left + self.x(value) * (self.right - self.left)

    def py(self, value: float) -> float:
        """Vertical position of a value of y."""
        return self.bottom - self.y(value) * (self.bottom - self.top)

    def line(self, xs: Sequence[float], ys: Sequence[float], colour: int, tip: str, *, style: str = "line") -> None:
        """A polyline in the colour of an entry; `tip` shows on hover."""
        points = " ".join(f"{number(self.px(x))},{number(self.py(y))}" for x, y in zip(xs, ys))
        self.parts.append(
            f'<g class="{colour_class(colour)} hover"><polyline class="{style}" points="{points}"/>'
            f'<polyline class="reach" points="{points}"/>{_title(tip)}</g>'
        )

    def point(
        self,
        x: float,
        y: float,
        colour: int,
        tip: str,
        *,
        size: float = 5.5,
        x_range: tuple[float, float] | None = None,
        y_range: tuple[float, float] | None = None,
        focus: bool = True,
        hollow: bool = False,
    ) -> None:
        """A marker in the colour and shape of an entry, with whiskers for the intervals; `tip` shows on hover."""
        cx, cy = self.px(x), self.py(y)
        whiskers = ""
        if y_range is not None:
            low, high = (self.py(v) for v in y_range)
            whiskers += f'<path class="whisker" d="M{number(cx)} {number(low)}V{number(high)}"/>'
            self._boxes.append((cx - 1, high, cx + 1, low))
        if x_range is not None:
            low, high = (self.px(v) for v in x_range)
            whiskers += f'<path class="whisker" d="M{number(low)} {number(cy)}H{number(high)}"/>'
            self._boxes.append((low, cy - 1, high, cy + 1))
        reach = f'<circle class="reach" cx="{number(cx)}" cy="{number(cy)}" r="12"/>' if focus else ""
        tab = ' tabindex="0"' if focus else ""
        self.parts.append(
            f'<g class="{colour_class(colour)} hover{" hollow" if hollow else ""}"{tab}>'
            f"{whiskers}{marker(colour, cx, cy, size)}{reach}{_title(tip)}</g>"
        )
        self._boxes.append((cx - size - 2, cy - size - 2, cx + size + 2, cy + size + 2))

    def path(self, xs: Sequence[float], ys: Sequence[float], style: str) -> None:
        """A line that belongs to no entry (a front, a reference), behind what is drawn; labels keep off it."""
        places = [(self.px(x), self.py(y)) for x, y in zip(xs, ys)]
        points = " ".join(f"{number(x)},{number(y)}" for x, y in places)
        self.parts.insert(0, f'<polyline class="{style}" points="{points}"/>')
        for (x, y), (x2, y2) in itertools.pairwise(places):
            steps = 1 + int(math.hypot(x2 - x, y2 - y) / 6)
            between = ((x + (x2 - x) * i / steps, y + (y2 - y) * i / steps) for i in range(steps + 1))
            self._boxes += [(u - 1, v - 1, u + 1, v + 1) for u, v in between]

    def band(self, xs: Sequence[float], lows: Sequence[float], highs: Sequence[float], colour: int) -> None:
        """The area between two lines in the colour of an entry."""
        corners = [*zip(xs, highs), *reversed(list(zip(xs, lows)))]
        points = " ".join(f"{number(self.px(x))},{number(self.py(y))}" for x, y in corners)
        self.parts.append(f'<polygon class="band {colour_class(colour)}" points="{points}"/>')

    def label(self, x: float, y: float, name: str, colour: int) -> None:
        """A name beside a point, on the side where it covers nothing drawn so far."""
        shown = name if len(name) <= 26 else f"{name[:12]}…{name[-13:]}"  # what tells names apart is often their end
        cx, cy, wide = self.px(x), self.py(y), 6.6 * len(shown)
        sides = [
            ("start", 10, 4),
            ("end", -10, 4),
            ("middle", 0, -11),
            ("middle", 0, 20),
            ("start", 8, -9),
            ("end", -8, -9),
        ]
        sides += [("start", 8, 17), ("end", -8, 17), ("middle", 0, -24), ("middle", 0, 33)]
        best: tuple[float, str, float, float] | None = None
        for anchor, dx, dy in sides:
            start = cx + dx - {"start": 0.0, "end": wide, "middle": wide / 2}[anchor]
            box = (start, cy + dy - 11, start + wide, cy + dy + 3)
            cost = sum(_overlap(box, other, 1.0) for other in self._boxes)
            cost += 40 * max(
                0.0, self.left - box[0], box[2] - self.right + 2, self.top - 12 - box[1], box[3] - self.bottom
            )
            if best is None or cost < best[0]:
                best = (cost, anchor, cx + dx, cy + dy)
                chosen = box
        assert best is not None
        self._boxes.append(chosen)
        _, anchor, tx, ty = best
        self.parts.append(text(tx, ty, shown, anchor, f"name {colour_class(colour)}"))

    def note(self, x: float, y: float, words: str, colour: int, anchor: str) -> None:
        """A line of text above a point."""
        self.parts.append(text(self.px(x), self.py(y) - 11, words, anchor, f"name {colour_class(colour)}"))

    def bars(self, edges: Sequence[float], heights: Sequence[float], colour: int, tip: str) -> None:
        """A filled step outline (a histogram)."""
        base = number(self.bottom)
        steps = [f"M{number(self.px(edges[0]))} {base}"]
        for start, end, height in zip(edges[:-1], edges[1:], heights):
            steps.append(f"L{number(self.px(start))} {number(self.py(height))}H{number(self.px(end))}")
        steps.append(f"V{base}")
        self.parts.append(
            f'<g class="{colour_class(colour)} hover"><path class="area" d="{"".join(steps)}"/>{_title(tip)}</g>'
        )

    def render(self, place: tuple[float, float] | None = None) -> str:
        """The chart as an <svg> element; `place`: where it stands within another one (see `figure`)."""
        grid, words = [], []
        for tick in self.y.ticks:
            at = number(self.py(tick))
            grid.append(f'<path d="M{number(self.left)} {at}H{number(self.right)}"/>')
            words.append(text(self.left - 7, self.py(tick) + 4, self.y.show(tick), "end"))
        for tick in self.x.ticks:
            at = number(self.px(tick))
            grid.append(f'<path d="M{at} {number(self.bottom)}v5"/>')
            words.append(text(self.px(tick), self.bottom + 18, self.x.show(tick), "middle"))
        if self.x.label:
            words.append(text((self.left + self.right) / 2, self.height - 6, self.x.label, "middle", "axis"))
        if self.y.label:
            words.append(text(2, 13, self.y.label, "start", "axis"))
        size = f"{number(self.width)} {number(self.height)}"
        where = ""
        if place is not None:
            where = ' x="{}" y="{}" width="{}" height="{}"'.format(*map(number, (*place, self.width, self.height)))
        return (
            f'<svg class="chart"{where} viewBox="0 0 {size}" role="img" '
            f'aria-label="{escape(self.name)}"><g class="grid">{"".join(grid)}'
            f'<path class="base" d="M{number(self.left)} {number(self.bottom)}H{number(self.right)}"/></g>'
            f'<g class="ticks">{"".join(words)}</g>{"".join(self.parts)}</svg>'
        )


def figure(width: float, height: float, name: str, parts: Sequence[str], style: str) -> str:
    """Charts (rendered with their places) and texts as one SVG file that stands alone: white, with its own style."""
    size = f'width="{number(width)}" height="{number(height)}" viewBox="0 0 {number(width)} {number(height)}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(name)}">\n'
        f'<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join([*parts, "</svg>\n"])
    )


def marker(colour: int, cx: float, cy: float, r: float) -> str:
    """The shape of an entry: the teacher a star, students circle, square, triangle, diamond, ... in turn."""
    if colour == 0:
        return _polygon(cx, cy, [(r * (1.45 if i % 2 == 0 else 0.62), i * 36.0) for i in range(10)])
    kind = (colour - 1) % 6
    if kind == 0:
        return f'<circle class="mark" cx="{number(cx)}" cy="{number(cy)}" r="{number(r)}"/>'
    corners = {1: (4, 45.0, 1.3), 2: (3, 0.0, 1.35), 3: (4, 0.0, 1.35), 4: (3, 180.0, 1.35), 5: (6, 0.0, 1.15)}[kind]
    count, turn, scale = corners
    return _polygon(cx, cy, [(r * scale, turn + 360.0 * i / count) for i in range(count)])


def legend_mark(colour: int) -> str:
    """A small inline drawing of an entry's marker, for keys and tables."""
    shape = marker(colour, 8, 8, 5)
    return f'<svg class="key {colour_class(colour)}" viewBox="0 0 16 16" aria-hidden="true">{shape}</svg>'


def _polygon(cx: float, cy: float, polar: Sequence[tuple[float, float]]) -> str:
    points = " ".join(
        f"{number(cx + r * math.sin(math.radians(a)))},{number(cy - r * math.cos(math.radians(a)))}" for r, a in polar
    )
    return f'<polygon class="mark" points="{points}"/>'


def text(x: float, y: float, words: str, anchor: str, css: str = "") -> str:
    """A line of text; anchor: "start", "middle" or "end"."""
    kind = f' class="{css}"' if css else ""
    return f'<text{kind} x="{number(x)}" y="{number(y)}" text-anchor="{anchor}">{escape(words)}</text>'


def _title(tip: str) -> str:
    return f"<title>{escape(tip)}</title>" if tip else ""


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float], margin: float) -> float:
    """The area shared by two boxes; lines count as much as marks, so a margin is added."""
    a = (a[0] - margin, a[1] - margin, a[2] + margin, a[3] + margin)
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return wide * high if wide > 0 and high > 0 else 0.0
