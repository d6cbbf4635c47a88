"""Pieces of HTML for the report: tables, figures, escaping, notes on what is missing."""

import html
from collections.abc import Callable

import numpy as np

from pagellm.pages import metrics
from pagellm.report.findings import Missing
from pagellm.report.plots import clean
from pagellm.stage.config import PageLLMError

__all__ = [
    "Html",
    "POINTS",
    "esc",
    "figure",
    "figures",
    "missing_note",
    "or_missing",
    "span",
    "story",
    "table",
    "text",
    "thin",
    "up",
    "verdict",
]

POINTS = 120  # most points that a learning curve is drawn with


class Html(str):
    """Finished markup. Every other string is escaped before it is put into the page."""


def esc(text) -> str:
    """Text with &, <, > and quotes escaped and without control characters; Html as it is."""
    return text if isinstance(text, Html) else html.escape(clean(str(text)))


def table(head: list, rows: list[list], caption: str = "") -> str:
    """An HTML table. The first cell of a row is its heading.

    Cells are escaped. A cell that is Html is not, and may come with its own <td>.
    """
    cells = [
        "".join(
            c if isinstance(c, Html) and c.startswith("<td") else f"<td>{esc(c)}</td>"
            for c in row[1:]
        )
        for row in rows
    ]
    body = "".join(
        f'<tr><th scope="row">{esc(row[0])}</th>{c}</tr>'
        for row, c in zip(rows, cells, strict=True)
    )
    columns = "".join(f'<th scope="col">{esc(h)}</th>' for h in head)
    label = f' aria-label="{esc(caption)}"' if caption else ""
    return (
        (f'<p class="quiet">{esc(caption)}</p>' if caption else "")
        + f'<div class="scroll" tabindex="0"><table{label}>'
        f"<thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{esc(caption)}</figcaption></figure>"


def figures(parts: list[str]) -> str:
    return f'<div class="figures">{"".join(parts)}</div>'


def text(words: str) -> str:
    return f"<p>{esc(words)}</p>"


def up(metric: str) -> bool:
    return metrics.DIRECTION.get(metric, "up") == "up"


def verdict(metric: str, low: float, high: float) -> str:
    """What the interval [low, high] of a difference says: better, worse, within noise or equal."""
    if low == high == 0:
        return "equal"
    if low <= 0 <= high:
        return "within noise"
    return "better" if (low > 0) == up(metric) else "worse"


def span(low: float, high: float, sign: str = "") -> str:
    return f"[{low:{sign}.4f}, {high:{sign}.4f}]"


def story(curves: dict, digits: int = 3) -> str:
    """Describe curves in words, for a figure's alternative text: first, last, lowest, highest."""
    return "; ".join(
        f"{name} from {y[0]:.{digits}g} to {y[-1]:.{digits}g}, lowest {y.min():.{digits}g}, "
        f"highest {y.max():.{digits}g}"
        for name, (_, y, *_) in curves.items()
    )


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a curve to at most POINTS points, each the mean of neighbouring steps."""
    if len(x) <= POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), POINTS)
    return np.array([x[p].mean() for p in parts]), np.array([y[p].mean() for p in parts])


def or_missing(make: Callable[[], str]) -> str:
    """Return make(), or a note on what is missing or damaged and which command mends it."""
    try:
        return make()
    except Missing as missing:
        return missing_note(missing)
    except PageLLMError as error:
        return missing_note(Missing(str(error)))


def missing_note(missing: Missing) -> str:
    command = f"<br>Make it with: <code>{esc(missing.command)}</code>" if missing.command else ""
    return f'<p class="missing">Missing: {esc(missing.what)}{command}</p>'
