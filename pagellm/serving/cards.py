"""Pages as cards in a grid, in one piece of HTML: what a notebook shows of `model.pages(...)`.

    pagellm.cards(model.pages(users=["C00001"], k=10))        the last line of a cell
    pagellm.cards(pages).save("pages.html")                   a file that opens without a network

The same cards as on the page of `pagellm serve`: a picture drawn from title and category
(static/picture.js draws the same), a band of category colours. Plain HTML, CSS and SVG without a
script: nothing is fetched, and every word of the shop is escaped.
"""

import html
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

from pagellm.stage.config import PageLLMError
from pagellm.stage.files import atomic

__all__ = ["Cards", "colours", "of", "picture"]

MASK = 0xFFFFFFFF
HUES, STEPS = 12, (0, 1, -1)  # 36 colours that can be told apart
Box = tuple[float, float, float, float]  # middle, upper edge, width, height
# What counts as a space in a title, as in JavaScript.
SPACE = r"[\t\n\v\f\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff]+"

# A notebook indents every list by a rule that outweighs ours, hence !important.
STYLE = """
.pagellm { color: #1a1d24; background: #f3f4f7; padding: .6rem .8rem; border-radius: .7rem;
  font: 15px/1.4 system-ui, sans-serif; }
.pagellm, .pagellm * { box-sizing: border-box; }
.pagellm h3 { font-size: 1rem; font-weight: 600; margin: .5rem 0 .4rem; color: inherit; }
.pagellm h3 small, .pagellm .about { color: #565d6b; font-weight: normal; }
.pagellm ol { list-style: none !important; padding: 0 !important; margin: .5rem 0 1rem !important;
  display: grid; gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(8.6rem, 1fr)); }
.pagellm li { margin: 0; border: 1px solid #d5d9e1; border-radius: .7rem; overflow: hidden;
  background: #fff; position: relative; min-width: 0; }
.pagellm svg { display: block; width: 100%; height: auto; aspect-ratio: 4 / 3; }
.pagellm .rank { position: absolute; left: .4rem; top: .4rem; min-width: 1.6rem; padding: 0 .3rem;
  line-height: 1.6rem; border-radius: .8rem; text-align: center; font-size: .8rem;
  font-weight: 600; background: #fff; }
.pagellm p { margin: 0 .6rem .25rem; font-size: .84rem; overflow-wrap: anywhere; }
.pagellm .title { margin-top: .45rem; font-weight: 550; font-size: .92rem; }
.pagellm i { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%;
  margin-right: .35rem; }
.pagellm .band { display: flex; height: 1.5rem; border-radius: .45rem; overflow: hidden; }
.pagellm .band span { flex: 1 1 0; min-width: 0; margin-right: 2px; }
.pagellm i, .pagellm .band span { background: oklch(calc(.75 + var(--step) * .1) .125 var(--h)); }
.pagellm .gray i, .pagellm .band .gray { background: #9aa1ae; }
.pagellm .wall { fill: oklch(94% var(--c, .035) var(--h)); }
.pagellm .light { fill: oklch(97.5% var(--c, .035) var(--h)); }
.pagellm .shelf { fill: oklch(87% var(--c, .035) var(--h)); }
.pagellm .shade { fill: #000; opacity: .18; }
.pagellm .tone0 { fill: oklch(60% var(--k, .125) var(--h)); }
.pagellm .tone1 { fill: oklch(72% var(--k, .125) calc(var(--h) + 24)); }
.pagellm .tone2 { fill: oklch(50% var(--k, .125) calc(var(--h) - 18)); }
.pagellm .accent { fill: oklch(86% .11 calc(var(--h) + 165)); }
.pagellm .paper { fill: oklch(97% .01 var(--h)); }
.pagellm .gray { --c: 0; --k: 0; }
"""


def hashed(text: str) -> int:
    """FNV-1a of 32 bits."""
    h = 0x811C9DC5
    for byte in text.encode("utf-8", "replace"):
        h = (h ^ byte) * 0x01000193 & MASK
    return h


def draws(text: str) -> Callable[[], float]:
    """Numbers in [0, 1) that follow from a text (mulberry32)."""
    state = hashed(text)

    def one() -> float:
        nonlocal state
        state = (state + 0x6D2B79F5) & MASK
        t = (state ^ (state >> 15)) * (state | 1) & MASK
        t ^= (t + ((t ^ (t >> 7)) * (t | 61) & MASK)) & MASK
        return (t ^ (t >> 14)) / 2**32

    return one


def colours(categories: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Category -> hue in degrees and step of lightness; each its own, as far as there are any.

    Near the one that its name asks for, rather in a hue that no other has.
    """
    free = [(hue, step) for step in STEPS for hue in range(HUES)]
    taken, out = [0] * HUES, {}
    for name in dict.fromkeys(name for name in categories if name):
        want, tilt = hashed(name) % HUES, hashed(f"{name} step") % 3

        def far(one: tuple[int, int], want: int = want, tilt: int = tilt) -> int:
            hue, step = one
            away = min((hue - want) % HUES, (want - hue) % HUES)
            return 3 * away + 9 * taken[hue] + (STEPS.index(step) - tilt) % 3

        hue, step = min(free, key=far) if free else (want, STEPS[tilt])
        if free:
            free.remove((hue, step))
        taken[hue] += 1
        out[name] = (hue * 360 // HUES + 12, step)
    return out


def number(value: float) -> str:
    """A number of an SVG path, as JavaScript writes it."""
    return str(int(value)) if value == int(value) else repr(value)


def shape(tag: str, kind: str = "", **values: Any) -> str:
    """An SVG element; numbers have one digit after the point."""
    told = {"class": kind} if kind else {}
    for name, value in values.items():
        if not isinstance(value, str):
            value = str(Decimal(value).quantize(Decimal("0.1"), ROUND_HALF_UP))
        told[name] = value
    return f"<{tag} " + " ".join(f'{n}="{v}"' for n, v in told.items()) + f"></{tag}>"


def path(kind: str, *parts: str | float) -> str:
    return shape("path", kind, d="".join(p if isinstance(p, str) else number(p) for p in parts))


def part_of(name: str, kind: str, box: Box) -> str:
    """One part of a thing: x is the middle, y the upper edge, w and h the size."""
    x, y, w, h = box
    if name in ("block", "slab"):
        round_ = min(4, h / 3) if name == "block" else h / 2
        return shape("rect", kind, x=x - w / 2, y=y, width=w, height=h, rx=round_)
    if name == "ball":
        return shape("ellipse", kind, cx=x, cy=y + h / 2, rx=w / 2, ry=h / 2)
    left, right, low = x - w / 2, x + w / 2, y + h
    if name == "dome":
        return path(kind, "M", left, " ", low, "A", w / 2, " ", h, " 0 0 1 ", right, " ", low, "Z")
    if name == "bowl":
        return path(kind, "M", left, " ", y, "A", w / 2, " ", h, " 0 0 0 ", right, " ", y, "Z")
    near, far = x - w * 0.34, x + w * 0.34
    if name == "drum":
        return path(kind, "M", near, " ", y, "H", far, "L", right, " ", low, "H", left, "Z")
    return path(kind, "M", left, " ", y, "H", right, "L", far, " ", low, "H", near, "Z")


PARTS = ("block", "slab", "ball", "dome", "bowl", "drum", "cup")


def label(kind: int, tone: str, box: Box, value: float) -> list[str]:
    """What is drawn on the largest part: this is where variants of one thing differ."""
    x, y, w, h = box
    at = y + h * (0.3 + 0.4 * value)
    if kind == 0:
        size = {"x": x - w * 0.3, "y": at - h * 0.14, "width": w * 0.6, "height": h * 0.28}
        return [shape("rect", tone, **size, rx=2)]
    if kind == 1:
        return [shape("circle", tone, cx=x, cy=at, r=min(w, h) * 0.18)]
    if kind == 2:
        r = min(w, h) * 0.08
        return [shape("circle", tone, cx=x + dx * w, cy=at, r=r) for dx in (-0.18, 0, 0.18)]
    return [
        shape("rect", tone, x=x - w * 0.28, y=at + dy * h - 1, width=w * 0.56, height=2.4)
        for dy in (-0.1, 0.1)
    ]


def picture(title: str, category: str) -> str:
    """An abstract thing on a shelf, as SVG.

    The category decides which parts are stacked, the first words of the title their sizes, all of
    it the label: what is alike looks alike.
    """
    words = [word for word in re.split(SPACE, title) if word]
    stem = " ".join(words[: max(1, min(3, len(words) - 1))])
    kind, size = draws(f"kind {category}"), draws(f"size {category} {stem}")
    own = draws(f"own {title}")
    count = 2 + math.floor(kind() * 2.6)
    parts = [PARTS[math.floor(kind() * len(PARTS))] for _ in range(count)]
    base, narrow = 24 + 20 * kind(), 0.55 + 0.4 * kind()
    heights = [(0.5 if at else 1) * (0.7 + 0.6 * size()) for at in range(count)]
    total, tall = sum(heights), 46 + 16 * size()
    light = {"cx": 30 + 60 * size(), "cy": 28 + 12 * size(), "r": 24 + 12 * size()}
    out = [
        shape("rect", "wall", width=120, height=90),
        shape("circle", "light", **light),
        shape("rect", "shelf", y=74, width=120, height=16),
    ]
    bottom, width = 78.0, base * (0.85 + 0.4 * size())
    out.append(shape("ellipse", "shade", cx=60, cy=78, rx=width * 0.62, ry=3.2))
    widest: Box = (0, 0, 0, 0)
    for at, name in enumerate(parts):
        h = tall * heights[at] / total
        box = (60.0, bottom - h, width, h)
        out.append(part_of(name, f"tone{at % 3}", box))
        if h * width > widest[2] * widest[3]:
            widest = box
        bottom -= h - 0.3
        width *= narrow * (0.85 + 0.4 * size())
    turn, value = math.floor(own() * 4), own()
    out += label(turn, "accent" if own() < 0.5 else "paper", widest, value)
    return f'<svg viewBox="0 0 120 90" aria-hidden="true" focusable="false">{"".join(out)}</svg>'


@dataclass(frozen=True)
class Cards:
    """Some users' pages as cards; a notebook shows it where it is a cell's last line.

    html  the whole of it, without a document around it
    """

    html: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"Cards of {self.html.count('<section>')} pages; in a notebook, or .save(FILE)"

    def save(self, file: str | Path) -> Path:
        """Write a document that a browser opens; returns its path."""
        head = '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Pages</title>\n'
        width = '<meta name="viewport" content="width=device-width">\n'
        with atomic(Path(file)) as beside:
            beside.write_text(head + width + self.html + "\n</html>\n", encoding="utf-8")
        return Path(file)


def of(rows: Sequence[dict[str, Any]], most: int = 4) -> Cards:
    """Cards of pages.

    rows  a dict for each slot: user, item, and perhaps rank, title, category, price, in any order
    most  users that are shown, the first ones; the others are counted
    Raises PageLLMError for `most` below 1.
    """
    if most < 1:
        raise PageLLMError(f"most={most}: want 1 or more")
    pages: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        pages.setdefault(row["user"], []).append(row)
    shown = list(pages.items())[:most]
    told = [row.get("category") or "" for _, page in shown for row in page]
    paint = colours(told)
    parts = [f"<style>{STYLE}</style>", '<div class="pagellm">']
    for user, page in shown:
        page.sort(key=lambda row: row.get("rank") or 0)
        parts += section(user, page, paint)
    if len(pages) > most:
        parts.append(f"<p>and {len(pages) - most:,} more users</p>")
    if not pages:
        parts.append("<p>no pages</p>")
    return Cards("\n".join([*parts, "</div>"]))


def section(
    user: Any, page: list[dict[str, Any]], paint: dict[str, tuple[int, int]]
) -> Iterator[str]:
    """One user's page: a heading, the band, the cards."""
    names = [row.get("category") or "" for row in page]
    kinds = len(set(names) - {""})
    who = "a stranger" if user is None else f"<bdi>{html.escape(str(user))}</bdi>"
    about = f"{len(page)} items" if len(page) != 1 else "1 item"
    about += f" of {kinds} {'category' if kinds == 1 else 'categories'}" if kinds else ""
    yield f"<section><h3>{who} <small>{about}</small></h3>"
    if kinds:
        said = html.escape(", ".join(name or "none" for name in names))
        spans = "".join(
            f'<span{colour(name, paint)} title="{at} · {html.escape(name or "no category")}">'
            "</span>"
            for at, name in enumerate(names, 1)
        )
        yield f'<div class="band" role="img" aria-label="categories in order: {said}">{spans}</div>'
    yield "<ol>"
    for at, row in enumerate(page, 1):
        yield card(at, row, paint)
    yield "</ol></section>"


def colour(category: str, paint: dict[str, tuple[int, int]]) -> str:
    """Attributes that give an element the colour of a category."""
    hue, step = paint.get(category, (260, 0))
    return f'{"" if category else " class=gray"} style="--h:{hue};--step:{step}"'


def card(at: int, row: dict[str, Any], paint: dict[str, tuple[int, int]]) -> str:
    """One slot."""
    item, category, price = str(row["item"]), row.get("category") or "", row.get("price")
    title = row.get("title") or item
    lines = [f'<p class="title" dir="auto">{html.escape(title)}</p>']
    if category:
        lines.append(f"<p><i></i><bdi>{html.escape(category)}</bdi></p>")
    about = [] if price is None or math.isnan(price) else [f"{price:.2f}"]
    about += [html.escape(item)] if item != title else []
    lines.append(f'<p class="about">{" · ".join(about)}</p>' if about else "")
    return (
        f"<li{colour(category, paint)}>{picture(title, category)}"
        f'<span class="rank">{at}</span>{"".join(lines)}</li>'
    )
