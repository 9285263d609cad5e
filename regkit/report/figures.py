"""Small charts as inline SVG, coloured by the page's style sheet: box plots, before-to-after bars, curves.

No axis is drawn that the eye does not need: a few grid lines, the names of the rows, the figures on hover.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape

_LEFT, _WIDTH, _RIGHT = 150, 560, 14  # room for names, the whole, room for the last tick
_ROW, _TOP, _FOOT = 20, 6, 26
_FAR = 1.5  # times the farthest whisker beyond which single values leave the axis, so that the boxes stay readable


def finite(values: Sequence[Any]) -> list[float]:
    """The numbers among values."""
    return [float(v) for v in values if isinstance(v, (int, float)) and math.isfinite(v)]


def boxes(rows: Sequence[Mapping[str, Any]], *, title: str, unit: str, better: str, bounds: tuple[float, float] | None = None) -> Markup:
    """Horizontal box plots. rows: {name, tone, values, before}: `tone` numbers the colour (0 …), an empty name continues the
    row above, `before` is the median before or None. bounds: ends of the axis where they are known."""
    drawn = [(row, _five(finite(row["values"]))) for row in rows]
    drawn = [(row, five) for row, five in drawn if five is not None]
    if not drawn:
        return Markup("")
    low, high = bounds or _range([v for row, _ in drawn for v in finite(row["values"])], [five for _, five in drawn], better)
    axis = _Axis(low, high)
    body, y = [], _TOP
    for index, (row, five) in enumerate(drawn):
        if row["name"] and index:
            y += 7
        middle = y + _ROW / 2
        if row["name"]:
            body.append(_name(row["name"], middle))
        body.append(_box(row, five, axis, middle, unit))
        y += _ROW
    return _chart(body, axis, y, title, f"{unit}{' · ' if unit else ''}{'higher' if better == 'high' else 'lower'} is better")


def _box(row: Mapping[str, Any], five: tuple[float, ...], axis: _Axis, y: float, unit: str) -> Markup:
    low, first, median, third, high = five
    values = finite(row["values"])
    words = f"{row['name'] or row.get('full', '')}: median {figure(median, unit)}, middle half {figure(first, unit)} to " \
            f"{figure(third, unit)}, n = {len(values)}"
    parts = [_el("title", words),
             _line(axis(low), y, axis(high), y, "whisker"),
             _el("rect", x=axis(first), y=y - 6, width=max(1.5, axis(third) - axis(first)), height=12, rx=2.5, class_="box"),
             _line(axis(median), y - 6, axis(median), y + 6, "median")]
    for value in values if len(values) <= 12 else [v for v in values if not low <= v <= high]:
        if axis.low <= value <= axis.high:
            parts.append(_el("circle", cx=axis(value), cy=y, r=2, class_="dot"))
        else:
            x = _WIDTH - _RIGHT if value > axis.high else _LEFT
            parts.append(_el("path", d=f"M{x - 3:.1f} {y - 4:.1f}l5 4l-5 4", class_="beyond"))
    before = finite([row.get("before")])
    if before and axis.low <= before[0] <= axis.high:
        parts.append(_el("path", _el("title", f"median before: {figure(before[0], unit)}"),
                         d=f"M{axis(before[0]):.1f} {y - 6:.1f}l4 6l-4 6l-4 -6z", class_="before"))
    return _el("g", Markup("").join(parts), class_=f"tone{int(row['tone']) % 6}")


def steps(rows: Sequence[Mapping[str, Any]], *, title: str, unit: str) -> Markup:
    """Before → after, one line a row. rows: {name, tone, before, after}."""
    rows = [row for row in rows if finite([row["after"]])]
    if not rows:
        return Markup("")
    values = finite([row[k] for row in rows for k in ("before", "after")])
    far = float(np.percentile(values, 95)) * _FAR
    axis = _Axis(0.0, max(values) if max(values) <= far or far <= 0 else far)
    body, y = [], _TOP
    for index, row in enumerate(rows):
        if row["name"] and index:
            y += 3
        middle, (after,) = y + _ROW / 2, finite([row["after"]])
        start = finite([row["before"]])
        words = f"{row['name'] or row.get('full', '')}: {figure(start[0], unit) if start else '–'} before, {figure(after, unit)} after"
        parts = [_el("title", words)]
        if start:
            parts.append(_line(axis.held(start[0]), middle, axis.held(after), middle, "step" if after <= start[0] else "step worse"))
            parts.append(_el("circle", cx=axis.held(start[0]), cy=middle, r=3.5, class_="from"))
        parts.append(_el("circle", cx=axis.held(after), cy=middle, r=4, class_="to"))
        if row["name"]:
            body.append(_name(row["name"], middle))
        body.append(_el("g", Markup("").join(parts), class_=f"tone{int(row['tone']) % 6}"))
        y += _ROW
    return _chart(body, axis, y, title, f"{unit}{' · ' if unit else ''}○ before  ● after")


def curves(lines: Sequence[Mapping[str, Any]], *, title: str, across: str) -> Markup:
    """Shares (0 … 1) over a number, one line a row. lines: {name, tone, points: [(x, share)]}."""
    lines = [line for line in lines if line["points"]]
    if not lines:
        return Markup("")
    xs = [x for line in lines for x, _ in line["points"]]
    left, right, top, foot = 48, 16, 10, 220
    span = max(xs) - min(xs) or 1.0

    def place(x: float, share: float) -> tuple[float, float]:
        return left + (x - min(xs)) / span * (_WIDTH - left - right), foot - share * (foot - top)

    body = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = place(min(xs), share)[1]
        body += [_line(left, y, _WIDTH - right, y, "grid"), _text(left - 6, y + 4, f"{share:.0%}", "end")]
    for x in sorted(set(xs)):
        body.append(_text(place(x, 0)[0], foot + 17, f"{x:g}", "middle"))
    for line in lines:
        points = [place(x, share) for x, share in sorted(line["points"])]
        dots = [_el("circle", _el("title", f"{line['name']}: {share:.0%} at {x:g}"), cx=place(x, share)[0], cy=place(x, share)[1],
                    r=3.5, class_="to") for x, share in line["points"]]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        body.append(_el("g", _el("path", d=path, class_="curve") + Markup("").join(dots), class_=f"tone{int(line['tone']) % 6}"))
    body.append(_text(_WIDTH - right, foot + 34, across, "end"))
    return _svg(body, foot + 40, title)


class _Axis:
    """A number → its place along the width, and round ticks."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high if high > low else low + 1.0
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        self.step = next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= raw * 0.999)

    def __call__(self, value: float) -> float:
        return _LEFT + (value - self.low) / (self.high - self.low) * (_WIDTH - _LEFT - _RIGHT)

    def held(self, value: float) -> float:
        """The same, kept within the ends."""
        return self(min(max(value, self.low), self.high))

    def ticks(self) -> list[float]:
        first = math.ceil(self.low / self.step - 1e-9)
        return [k * self.step for k in range(first, first + 12) if k * self.step <= self.high + 1e-9 * self.step]


def _five(values: list[float]) -> tuple[float, ...] | None:
    """Lower whisker, quartiles, upper whisker (Tukey: the last values within 1.5 of the middle half)."""
    if not values:
        return None
    first, median, third = (float(q) for q in np.percentile(values, (25, 50, 75)))
    reach = 1.5 * (third - first)
    return (min(v for v in values if v >= first - reach), first, median, third, max(v for v in values if v <= third + reach))


def _range(values: list[float], fives: list[tuple[float, ...]], better: str) -> tuple[float, float]:
    far = _FAR * max(abs(five[4]) for five in fives)
    high = max(values) if max(values) <= far else far
    low = min(0.0, min(values)) if better == "low" else min(values)
    return low, high


def figure(value: Any, unit: str = "") -> str:
    """A number as people write it: shares of one with three decimals, others with three or four figures; – for none."""
    numbers = finite([value])
    if not numbers:
        return "–"
    number = numbers[0]
    size = abs(number)
    digits = (2 if size < 10 else 1 if size < 100 else 0) if unit else (3 if size < 10 else 1 if size < 1000 else 0)
    return f"{number:.{digits}f}{' ' + unit if unit else ''}".replace("-", "−")


def _name(text: Any, y: float) -> Markup:
    text = str(text)
    short = text if len(text) <= 22 else text[:20] + "…"
    return _el("text", _el("title", text) + escape(short), x=_LEFT - 8, y=y + 4, text_anchor="end", class_="name")


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return _el("text", text, x=x, y=y, text_anchor=anchor)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return _el("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def _chart(body: list[Markup], axis: _Axis, bottom: float, title: str, note: str) -> Markup:
    grid = []
    for tick in axis.ticks():
        grid += [_line(axis(tick), _TOP, axis(tick), bottom, "grid"), _text(axis(tick), bottom + 15, f"{tick:.10g}", "middle")]
    return _svg([*grid, *body, _text(0, bottom + 15, note, "start")], bottom + _FOOT, title)


def _svg(body: list[Markup], height: float, title: str) -> Markup:
    return _el("svg", Markup("").join(body), viewBox=f"0 0 {_WIDTH} {height:.0f}", role="img", aria_label=title, class_="chart")


def _el(tag: str, content: Any = "", **attributes: Any) -> Markup:
    """An element; content that is not Markup, and every attribute, is escaped."""
    names = {key: "class" if key == "class_" else key.replace("_", "-") for key in attributes}
    words = [f'{names[key]}="{escape(_short(value))}"' for key, value in attributes.items()]
    return Markup(f"<{tag} {' '.join(words)}>") + escape(content) + Markup(f"</{tag}>")


def _short(value: Any) -> Any:
    return f"{value:.1f}" if isinstance(value, float) else value
