"""Figures as inline SVG whose colours come from the page around them.

    lines({"SFT": (x, y)}, "step", "loss", alt="...")            # (x, y) or (x, y, low, high)
    dots(["Recall@20", "ILD"], {"PageLLM": [(mean, low, high), ...]}, "difference", alt="...")
    places({"SFT": (0.85, 0.41)}, "variety", "accuracy", alt="...")
    ladder([("Recall@20", {"SFT": 0.2, "ALS": 1.0}, "ALS 0.62")], alt="...")

Colours are currentColor and the CSS variables --s0 to --s5 and --grid, so one drawing serves light
and dark pages. Series differ by colour (the palette of Okabe and Ito), by dashes and by marker; any
one of the three is enough to tell them apart. The same input gives the same bytes.
"""

import html
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["clean", "dots", "inline", "ladder", "lines", "places", "short", "ticks"]


Curve = Sequence[np.ndarray]  # x, y or x, y, low, high: one length each

STYLES = ["", "6 3", "7 2.5 1.5 2.5", "1.5 2.5", "8 2 1.5 2 1.5 2", "1.5 5"]  # dashes
MARKERS = ["o", "s", "^", "D", "v", "X"]
WIDTH = 331.0  # of the viewBox, which a phone shows without shrinking the text
SIZE = 9.0  # of the text


def clean(text: str) -> str:
    """Text with every control character and line break replaced by a space: SVG forbids them."""
    return "".join(c if c.isprintable() else " " for c in text)


def short(text: str, most: int = 26) -> str:
    """At most `most` characters, the last an ellipsis where some are missing."""
    return text if len(text) <= most else text[: most - 1] + "…"


def width_of(text: str, size: float = SIZE) -> float:
    """About how wide a browser sets a text, in units of the viewBox: no font is at hand here.

    That of the widest usual font, DejaVu Sans: a label that is narrower has room all the same.
    """
    narrow, wide = " .,:;'|!ijltfr()[]", "mwMW@%↑↓+"
    em = sum(
        1.0
        if unicodedata.east_asian_width(c) in "WF"
        else 0.34
        if c in narrow
        else 0.88
        if c in wide
        else 0.74
        if c.isupper() and c != "I"
        else 0.62
        for c in text
    )
    return size * em


def number(x: float) -> str:
    """A coordinate: two digits after the point, no zeros at the end."""
    return f"{x:.2f}".rstrip("0").rstrip(".")


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """At most `most` + 1 round numbers in [low, high]: multiples of 1, 2, 2.5 or 5 times 10^n.

    whole  multiples of whole numbers only
    """
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / most))
    power = max(power, 1.0) if whole else power
    step = next(
        s * power
        for s in (1, 2, 2.5, 5, 10, 20)
        if span / (s * power) <= most and (not whole or (s * power) % 1 == 0)
    )
    # Of rounding. A range narrower than a step must not gain a tick beside it.
    slack = min(1e-9, 1e-7 * span / step)
    first, last = math.ceil(low / step - slack), math.floor(high / step + slack)
    return [round(i * step, 12) for i in range(first, last + 1)]


def tick_names(values: Sequence[float]) -> list[str]:
    """All with as many digits as tell them apart."""
    gap = min((abs(b - a) for a, b in zip(values, values[1:], strict=False)), default=0.0)
    near = 1e-3 * gap or 1e-9
    digits = next((d for d in range(12) if all(abs(round(v, d) - v) <= near for v in values)), 12)
    return [f"{v + 0.0:,.{digits}f}".replace("-", "−") for v in values]


def text_at(x: float, y: float, text: str, anchor: str = "start", more: str = "") -> str:
    where = "" if anchor == "start" else f' text-anchor="{anchor}"'
    words = html.escape(clean(text))
    return f'<text x="{number(x)}" y="{number(y)}"{where}{more}>{words}</text>'


def marker(kind: str, x: float, y: float, r: float = 2.3) -> str:
    """The path of a marker, to be filled: o a disc, s a square, ^ and v triangles, D X as named."""
    if kind == "o":
        arc = f"a{number(r)} {number(r)} 0 1 0 "
        return f"M{number(x - r)} {number(y)}{arc}{number(2 * r)} 0{arc}{number(-2 * r)} 0Z"
    r *= 1.15
    w = 0.45 * r
    corners = {
        "s": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        "^": [(0, -1.1), (1.1, 0.85), (-1.1, 0.85)],
        "v": [(0, 1.1), (1.1, -0.85), (-1.1, -0.85)],
        "D": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        "X": [
            *((-1, -1 + w / r), (-1 + w / r, -1), (0, -w / r), (1 - w / r, -1), (1, -1 + w / r)),
            *((w / r, 0), (1, 1 - w / r), (1 - w / r, 1), (0, w / r), (-1 + w / r, 1)),
            *((-1, 1 - w / r), (-w / r, 0)),
        ],
    }[kind]
    return path([(x + r * a, y + r * b) for a, b in corners]) + "Z"


def path(points: Sequence[tuple[float, float]]) -> str:
    """Through these points; one that is not finite ends a stretch."""
    out, pen = [], "M"
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y):
            out.append(f"{pen}{number(x)} {number(y)}")
            pen = "L"
        else:
            pen = "M"
    return "".join(out)


def stroke(i: int, width: float = 1.6) -> str:
    """Style of the line of series i: its dashes and its colour."""
    dashes = f"stroke-dasharray: {STYLES[i % 6]}; " if STYLES[i % 6] else ""
    return f'style="fill: none; {dashes}stroke: var(--s{i % 6}); stroke-width: {number(width)}"'


def colour(i: int) -> str:
    return f'style="fill: var(--s{i % 6})"'


LEVEL = 'style="fill: none; stroke: currentColor; stroke-width: .8; stroke-dasharray: 2 2"'


def inline(body: str, height: float, alt: str) -> str:
    """What was drawn as <svg role="img" aria-label=alt>, WIDTH wide."""
    return (
        f'<svg viewBox="0 0 {number(WIDTH)} {number(height)}" role="img" '
        f'aria-label="{html.escape(clean(alt))}">'
        f'<g style="font: {number(SIZE)}px system-ui, sans-serif; fill: currentColor">{body}</g>'
        "</svg>"
    )


def legend(
    names: Sequence[tuple[str, int | None]], lined: bool, least: int = 2
) -> tuple[str, float]:
    """Names beside their line or marker, and the height that they take.

    names  (name, number of its series; None: the level)
    least  with fewer names there is nothing to tell apart, and no legend
    """
    if len(names) < least:
        return "", 0.0
    parts, x, y, key = [], 4.0, 8.0, 22.0 if lined else 9.0
    for name, i in names:
        wide = key + 4 + width_of(short(name, 40), 8.5) + 12
        if x > 4 and x + wide > WIDTH:
            x, y = 4.0, y + 12
        if i is None or lined:
            style = LEVEL if i is None else stroke(i)
            parts.append(f'<path d="M{number(x)} {number(y)}h{number(key)}" {style}/>')
        if i is not None:
            parts.append(f'<path d="{marker(MARKERS[i % 6], x + key / 2, y)}" {colour(i)}/>')
        small = ' style="font-size: 8.5px"'
        parts.append(text_at(x + key + 4, y + 3, short(name, 40), more=small))
        x += wide
    return "".join(parts), y + 8


@dataclass
class Frame:
    """A rectangle of the drawing and the values at its edges.

    x_low at left, x_high at right; y_low at bottom, y_high at top
    """

    left: float
    top: float
    right: float
    bottom: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return self.left + share * (self.right - self.left)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return self.bottom - share * (self.bottom - self.top)

    def points(self, x, y) -> list[tuple[float, float]]:
        return [(self.x(float(a)), self.y(float(b))) for a, b in zip(x, y, strict=True)]

    def grid(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        """Grid lines at these values, and the two axes."""
        lines = "".join(
            f"M{number(self.x(v))} {number(self.top)}V{number(self.bottom)}" for v in xs
        )
        lines += "".join(
            f"M{number(self.left)} {number(self.y(v))}H{number(self.right)}" for v in ys
        )
        axes = f"M{number(self.left)} {number(self.top)}V{number(self.bottom)}H{number(self.right)}"
        return (
            f'<path d="{lines}" style="stroke: var(--grid); stroke-width: .6"/>'
            f'<path d="{axes}" style="fill: none; stroke: currentColor; stroke-width: .7"/>'
        )

    def x_axis(self, at: Sequence[float], names: Sequence[str], label: str) -> str:
        out = [
            text_at(self.x(v), self.bottom + 11, name, "middle")
            for v, name in zip(at, names, strict=True)
        ]
        middle = (self.left + self.right) / 2
        return "".join(out) + text_at(middle, self.bottom + 24, label, "middle")

    def y_axis(self, at: Sequence[float], names: Sequence[str], label: str) -> str:
        out = [
            text_at(self.left - 4, self.y(v) + 3, name, "end")
            for v, name in zip(at, names, strict=True)
        ]
        middle = (self.top + self.bottom) / 2
        turn = f' transform="rotate(-90 9 {number(middle)})"'
        return "".join(out) + text_at(9, middle, label, "middle", turn)


def extent(values: Sequence[float], margin: float) -> tuple[float, float]:
    """The smallest and largest finite value, with a margin: a share of their distance."""
    kept = np.asarray(values, float)
    kept = kept[np.isfinite(kept)]
    low, high = (float(kept.min()), float(kept.max())) if len(kept) else (0.0, 1.0)
    if high - low <= 1e-12 * max(1.0, abs(low), abs(high)):
        half = 0.05 * abs(low) or 0.5
        return low - half, high + half
    return low - margin * (high - low), high + margin * (high - low)


def framed(
    x: Sequence[float],
    y: Sequence[float],
    x_label: str,
    y_label: str,
    top: float,
    height: float,
    x_names: list[str] | None = None,
    whole: bool = False,
    margin: float = 0.03,
) -> tuple[Frame, str]:
    """A frame that holds these points, and its drawn grid, axes, ticks and labels."""
    x_low, x_high = extent(x, 0.06 if x_names else margin)
    y_low, y_high = extent(y, 0.06)
    y_at = ticks(y_low, y_high, 6)
    y_names = tick_names(y_at)
    left = 20 + max(map(width_of, y_names), default=0.0)
    frame = Frame(left, top + 4, WIDTH - 8, height - 28, x_low, x_high, y_low, y_high)
    if x_names is None:
        x_at = ticks(x_low, x_high, 7, whole)
        names = tick_names(x_at)
    else:
        x_at, names = list(range(len(x_names))), [short(n, 14) for n in x_names]
    drawn = frame.grid(x_at, y_at) + frame.y_axis(y_at, y_names, y_label)
    return frame, drawn + frame.x_axis(x_at, names, x_label)


def lines(
    curves: Mapping[str, Curve],
    x_label: str,
    y_label: str,
    alt: str,
    level: tuple[str, float] | None = None,
    diagonal: bool = False,
    markers: bool | None = None,
    x_names: list[str] | None = None,
    height: float = 194.0,
) -> str:
    """Draw curves, with a band around those that have low and high. Returns SVG.

    curves    name -> (x, y) or (x, y, low, high), arrays of one length
    alt       description of the figure for people who cannot see it
    level     (name, y) of a horizontal line to compare with
    diagonal  draw y = x from 0.5 to 1, for calibration
    markers   draw a marker on every point; None: only on curves of at most 25 points
    x_names   labels of x = 0, 1, ...
    height    in units of the viewBox, which is WIDTH wide
    """
    names: list[tuple[str, int | None]] = [(name, i) for i, name in enumerate(curves)]
    names += [("as sure as right", None)] if diagonal else []
    names += [(level[0], None)] if level is not None else []
    head, top = legend(names, lined=True)
    x = [float(v) for x, *_ in curves.values() for v in x] + [0.5, 1.0] * diagonal
    y = [float(v) for _, *ys in curves.values() for part in ys for v in part]
    y += [0.5, 1.0] * diagonal + ([] if level is None else [level[1]])
    whole = all(np.issubdtype(np.asarray(x).dtype, np.integer) for x, *_ in curves.values())
    frame, body = framed(x, y, x_label, y_label, top, height, x_names, whole)
    for i, (at, _, *band) in enumerate(curves.values()):
        if band:
            low, high = (frame.points(at, edge) for edge in band)
            ring = [p for p in low + high[::-1] if math.isfinite(p[1])]
            if ring:
                fill = f"fill: var(--s{i % 6}); fill-opacity: .18"
                body += f'<path d="{path(ring)}Z" style="{fill}"/>'
    if diagonal:
        body += f'<path d="{path(frame.points([0.5, 1.0], [0.5, 1.0]))}" {LEVEL}/>'
    if level is not None:
        edge = frame.points([frame.x_low, frame.x_high], [level[1]] * 2)
        body += f'<path d="{path(edge)}" {LEVEL}/>'
    for i, (at, values, *_) in enumerate(curves.values()):
        points = frame.points(at, values)
        body += f'<path d="{path(points)}" {stroke(i)}/>'
        if len(points) <= 25 if markers is None else markers:
            drawn = "".join(marker(MARKERS[i % 6], *p) for p in points if math.isfinite(p[1]))
            body += f'<path d="{drawn}" {colour(i)}/>'
    return inline(head + body, height, alt)


def dots(
    names: list[str],
    series: Mapping[str, Sequence[tuple | None]],
    x_label: str,
    alt: str,
    level: float | None = None,
) -> str:
    """Draw means with their intervals: one row for each name, one dot for each series. Returns SVG.

    names   labels of the rows
    series  name -> one (mean, low, high) for each row; None leaves the dot out
    alt     description of the figure for people who cannot see it
    level   x of a vertical line to compare with, such as 0 for differences
    """
    n = max(1, len(series))
    head, top = legend([(name, i) for i, name in enumerate(series)], lined=False)
    labels = [short(clean(name)) for name in names]
    each = 9.4 + 6.5 * n
    height = top + 34 + each * len(names)
    x_low, x_high = extent(
        [v for row in series.values() for value in row if value for v in value]
        + ([] if level is None else [level]),
        0.05,
    )
    at = ticks(x_low, x_high, 5)
    left = 8 + max(map(width_of, labels), default=0.0)
    bottom = len(names) - 0.5 if names else 0.5
    frame = Frame(left, top + 4, WIDTH - 10, height - 28, x_low, x_high, bottom, -0.5)
    body = frame.grid(at, []) + frame.x_axis(at, tick_names(at), x_label)
    body += frame.y_axis(range(len(names)), labels, "")
    if level is not None:
        x = number(frame.x(level))
        body += f'<path d="M{x} {number(frame.top)}V{number(frame.bottom)}" '
        body += 'style="stroke: currentColor; stroke-width: .8"/>'
    for i, values in enumerate(series.values()):
        lines_, marks = [], []
        for row, value in enumerate(values):
            if value is None:
                continue
            y = frame.y(row + (i - (n - 1) / 2) * 0.7 / n)
            mean, low, high = (frame.x(float(v)) for v in value)
            lines_.append(f"M{number(min(low, mean))} {number(y)}H{number(max(high, mean))}")
            lines_ += [f"M{number(x)} {number(y - 2)}v4" for x in {low: 0, high: 0}]
            marks.append(marker(MARKERS[i % 6], mean, y))
        edge = f"stroke: var(--s{i % 6}); stroke-width: 1.2"
        body += f'<path d="{"".join(lines_)}" style="{edge}"/>'
        body += f'<path d="{"".join(marks)}" {colour(i)}/>'
    return inline(head + body, height, alt)


def places(
    points: Mapping[str, tuple[float, float]],
    x_label: str,
    y_label: str,
    alt: str,
    bold: Sequence[str] = (),
    edge: Sequence[str] = (),
    height: float = 230.0,
) -> str:
    """Draw named points. Returns SVG.

    points  name -> (x, y)
    bold    names that stand out; the others are gray
    edge    names that a line joins, in the order of x
    """
    x, y = ([p[i] for p in points.values()] for i in (0, 1))
    frame, body = framed(x, y, x_label, y_label, 0.0, height, margin=0.1)
    joined = sorted(points[name] for name in edge if name in points)
    body += (
        f'<path d="{path(frame.points(*zip(*joined, strict=True)))}" {LEVEL}/>' if joined else ""
    )
    taken = [
        (frame.x(a) - 4, frame.y(b) - 4, frame.x(a) + 4, frame.y(b) + 4) for a, b in points.values()
    ]
    for name in sorted(points, key=lambda name: name not in bold):
        at = frame.x(points[name][0]), frame.y(points[name][1])
        i = bold.index(name) if name in bold else None
        fill = colour(i) if i is not None else 'style="fill: currentColor; fill-opacity: .5"'
        kind = MARKERS[i % 6] if i is not None else "o"
        body += f'<path d="{marker(kind, *at, r=3.2 if i is not None else 2.4)}" {fill}/>'
        weight = ' style="font-weight: 600"' if i is not None else ""
        body += beside(short(name), at, taken, frame, weight)
    return inline(body, height, alt)


def beside(name: str, at: tuple[float, float], taken: list, frame: Frame, more: str) -> str:
    """A name near its point, where it covers no other; "" where there is no room for it.

    taken  boxes that are not free (left, top, right, bottom); the name's own is added
    """
    wide = width_of(name) * (1.15 if more else 1.04)
    x, y = at
    for left, bottom in (
        *((x + 6, y + 3), (x - 6 - wide, y + 3), (x - wide / 2, y - 6), (x - wide / 2, y + 13)),
        *((x + 5, y - 6), (x + 5, y + 12), (x - 5 - wide, y - 6), (x - 5 - wide, y + 12)),
    ):
        box = (left, bottom - 8, left + wide, bottom + 2)
        inside = box[0] > frame.left and box[2] < WIDTH and 0 < box[1] and box[3] < frame.bottom
        clear = all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in taken)
        if inside and clear:
            taken.append(box)
            return text_at(left, bottom, name, more=more)
    return ""


def ladder(
    rows: Sequence[tuple[str, Mapping[str, float], str]], alt: str, bold: Sequence[str] = ()
) -> str:
    """Draw where each name stands between the worst (left) and the best (right). Returns SVG.

    rows  (label, name -> 0 for the worst to 1 for the best, what is written behind the row)
    bold  names that stand out; the others are gray
    """
    seen = {name for _, stands, _ in rows for name in stands}
    keys: list[tuple[str, int | None]] = [(n, i) for i, n in enumerate(bold) if n in seen]
    head, top = legend(keys, lined=False, least=1)
    labels, ends = [short(clean(r[0])) for r in rows], [short(clean(r[2]), 22) for r in rows]
    left = 8 + max(map(width_of, labels), default=0.0)
    right = WIDTH - 14 - 1.1 * max(map(width_of, ends), default=0.0)
    height = top + 22 + 21 * len(rows)
    frame = Frame(left + 6, top + 2, right - 6, height - 18, 0, 1, len(rows) - 0.5, -0.5)
    body = ""
    for row, (_, stands, _) in enumerate(rows):
        y = frame.y(row)
        rail = f"M{number(frame.left)} {number(y)}H{number(frame.right)}"
        body += f'<path d="{rail}" style="stroke: var(--grid); stroke-width: 1.2"/>'
        body += text_at(left - 4, y + 3, labels[row], "end")
        body += text_at(right + 4, y + 3, ends[row], more=' style="font-weight: 600"')
        gray = "".join(marker("o", frame.x(v), y, 2.4) for n, v in stands.items() if n not in bold)
        body += f'<path d="{gray}" style="fill: currentColor; fill-opacity: .45"/>' if gray else ""
        for i, name in enumerate(bold):
            if name in stands:
                mark = marker(MARKERS[i % 6], frame.x(stands[name]), y, 3.4)
                body += f'<path d="{mark}" {colour(i)}/>'
    quiet = ' style="fill-opacity: .75"'
    body += text_at(frame.left, height - 5, "worst", more=quiet)
    body += text_at(frame.right, height - 5, "best", "end", more=quiet)
    return inline(head + body, height, alt)
