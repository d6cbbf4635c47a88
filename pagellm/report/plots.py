"""Figures as inline SVG whose colours come from the page around them. Needs matplotlib ([report]).

    lines({"SFT": (x, y)}, "step", "loss", alt="...")            # (x, y) or (x, y, low, high)
    dots(["Recall@20", "ILD"], {"PageLLM": [(mean, low, high), ...]}, "difference", alt="...")

matplotlib draws with placeholder colours. `inline` replaces them by currentColor and by CSS
variables, so one drawing serves light and dark pages. Series differ by colour (the palette of Okabe
and Ito), by line style and by marker; any one of the three is enough to tell them apart. The same
input gives the same bytes.
"""

import html
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pagellm.stage import hints
from pagellm.stage.config import PageLLMError

__all__ = ["available", "clean", "dots", "inline", "lines"]


Curve = Sequence[np.ndarray]  # x, y or x, y, low, high: one length each

INK, GRID = "#010203", "#010204"
SERIES = [f"#0100a{i}" for i in range(6)]
STYLES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3))]
MARKERS = ["o", "s", "^", "D", "v", "X"]
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "font.family": ["sans-serif"],
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "axes.linewidth": 0.7,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "path.simplify": True,
}
WIDTH = 4.6  # inches; 331 units of the viewBox, which a phone shows without shrinking the text


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def clean(text: str) -> str:
    """Text with every control character and line break replaced by a space: SVG forbids them."""
    return "".join(c if c.isprintable() else " " for c in text)


def canvas(height: float):
    """An empty figure and its axes. Needs no display and ignores the user's matplotlibrc."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise PageLLMError(
            "the report draws with matplotlib, which is not installed\n"
            f"  Install it with: {hints.install('report')}"
        ) from None
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(SETTINGS)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def inline(figure, alt: str) -> str:
    """A matplotlib figure as <svg role="img" aria-label=alt>.

    Ids are unique to the figure, so that several fit on one page; no URL of a schema remains.
    """
    import matplotlib

    # matplotlib hashes the ids of clip paths and markers with this salt
    matplotlib.rcParams["svg.hashsalt"] = alt
    file = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that matplotlib's font lacks; a browser has them
        figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    box = re.findall(r'viewBox="[^"]*"', svg)[0]
    svg = (
        f'<svg {box} role="img" aria-label="{html.escape(clean(alt))}">' + svg[svg.index(">") + 1 :]
    )
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r' (d|points)="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m.group()), svg)
    svg = re.sub(r"\bfont: (\S+) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    svg = svg.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    for i, colour in enumerate(SERIES):
        svg = svg.replace(colour, f"var(--s{i})")
    return re.sub(r"\n\s*", "\n", svg).strip()


def legend(figure, axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    if len(names) > 1:
        figure.legend(
            handles,
            names,
            loc="outside upper left",
            ncols=min(3, len(names)),
            handlelength=3.2,
            columnspacing=1.2,
            borderaxespad=0.1,
        )


def lines(
    curves: Mapping[str, Curve],
    x_label: str,
    y_label: str,
    alt: str,
    level: tuple[str, float] | None = None,
    diagonal: bool = False,
    markers: bool | None = None,
    x_names: list[str] | None = None,
    height: float = 2.7,
) -> str:
    """Draw curves, with a band around those that have low and high. Returns SVG.

    curves    name -> (x, y) or (x, y, low, high), arrays of one length
    alt       description of the figure for people who cannot see it
    level     (name, y) of a horizontal line to compare with
    diagonal  draw y = x from 0.5 to 1, for calibration
    markers   draw a marker on every point; None: only on curves of at most 25 points
    x_names   labels of x = 0, 1, ...
    height    inches
    """
    figure, axes = canvas(height)
    for i, (name, (x, y, *band)) in enumerate(curves.items()):
        marked = len(x) <= 25 if markers is None else markers
        axes.plot(
            x,
            y,
            label=clean(name),
            color=SERIES[i % 6],
            linestyle=STYLES[i % 6],
            marker=MARKERS[i % 6] if marked else None,
        )
        if band:
            axes.fill_between(x, *band, color=SERIES[i % 6], alpha=0.18, linewidth=0)
    if diagonal:
        axes.plot(
            [0.5, 1],
            [0.5, 1],
            color=INK,
            linewidth=0.8,
            linestyle=(0, (2, 2)),
            label="as sure as right",
        )
    if level is not None:
        axes.axhline(
            level[1], color=INK, linewidth=0.8, linestyle=(0, (2, 2)), label=clean(level[0])
        )
    if x_names is not None:
        axes.set_xticks(range(len(x_names)), [clean(n) for n in x_names])
    else:
        whole = all(np.issubdtype(np.asarray(x).dtype, np.integer) for x, *_ in curves.values())
        axes.locator_params(axis="x", nbins=7, **({"integer": True} if whole else {}))
    axes.set_xlabel(clean(x_label))
    axes.set_ylabel(clean(y_label))
    legend(figure, axes)
    return inline(figure, alt)


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
    figure, axes = canvas(0.85 + (0.13 + 0.09 * n) * len(names))
    for i, (label, values) in enumerate(series.items()):
        at = [(row, v) for row, v in enumerate(values) if v is not None]
        y = np.array([row for row, _ in at]) + (i - (n - 1) / 2) * 0.7 / n
        mean, low, high = (np.array([v[j] for _, v in at], dtype=float) for j in range(3))
        axes.errorbar(
            mean,
            y,
            xerr=[np.maximum(mean - low, 0), np.maximum(high - mean, 0)],
            fmt=MARKERS[i % 6],
            color=SERIES[i % 6],
            ecolor=SERIES[i % 6],
            label=clean(label),
            elinewidth=1.2,
            capsize=2,
        )
    if level is not None:
        axes.axvline(level, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(names)), [short(clean(name)) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(clean(x_label))
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="y", visible=False)
    legend(figure, axes)
    return inline(figure, alt)


def short(text: str, most: int = 26) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
