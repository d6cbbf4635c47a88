"""Pieces of HTML for the report: tables, figures, escaping."""

import html

import numpy as np

from pagellm.pages import metrics
from pagellm.report.plots import clean

__all__ = [
    "Html",
    "POINTS",
    "esc",
    "figure",
    "figures",
    "span",
    "story",
    "table",
    "text",
    "thin",
    "up",
    "verdict",
]

POINTS = 120  # of a learning curve, at most


class Html(str):
    """Markup that is safe as it is; every other string is escaped on its way into the page."""


def esc(text) -> str:
    return text if isinstance(text, Html) else html.escape(clean(str(text)))


def table(head: list, rows: list[list], caption: str = "") -> str:
    """Cells are escaped; Html goes in as it is, and may bring its own <td>."""
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
    """What a difference's interval says: better, worse, within noise, or equal."""
    if low == high == 0:
        return "equal"
    if low <= 0 <= high:
        return "within noise"
    return "better" if (low > 0) == up(metric) else "worse"


def span(low: float, high: float, sign: str = "") -> str:
    return f"[{low:{sign}.4f}, {high:{sign}.4f}]"


def story(curves: dict, digits: int = 3) -> str:
    """Curves in words, for those who cannot see them: where each begins, ends, and its extremes."""
    return "; ".join(
        f"{name} from {y[0]:.{digits}g} to {y[-1]:.{digits}g}, lowest {y.min():.{digits}g}, highest "
        f"{y.max():.{digits}g}"
        for name, (_, y, *_) in curves.items()
    )


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points: means of equally long runs of steps."""
    if len(x) <= POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), POINTS)
    return np.array([x[p].mean() for p in parts]), np.array([y[p].mean() for p in parts])
