"""Conclusions from a sample of a column: how categories are written, whether it describes items."""

import ast
import json
import re
from collections import Counter, defaultdict

from pagellm.data.amazon import category_paths
from pagellm.data.values import Broken, is_missing, is_number, label

__all__ = ["category_form", "names_in", "paths_in", "steady"]

COMMON_MARKS = ("|", ";", ", ", ",", "/")  # between the categories of one cell, beside >
TUPLE = re.compile(r"\(['\"].*['\"],?\)|\{['\"].*['\"]\}")  # of names in quotes
RECURRING = 0.5  # a mark separates categories if more of the parts occur in other cells too
STEADY = 0.6  # a column describes the item if a larger share of each item's rows agree, on average


def names_in(cell, mark: str) -> list:
    """The names of one cell as a list, or a list of such lists; [] if it is empty. Raises Broken.

    cell  text, a number, a list; a list may be written as JSON or as Python writes it
    mark  what stands between names in text; "" if a cell is one name
    """
    if is_missing(cell):
        return []
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        cell = literal(cell.strip())
    elif isinstance(cell, str) and TUPLE.fullmatch(cell.strip()):
        cell = tuple_or_text(cell.strip())
    if isinstance(cell, str) and ">" in cell and mark == ">":
        return [part.split(">") for part in cell.split("|")]
    if isinstance(cell, str):
        return cell.split(mark) if mark else [cell]
    if isinstance(cell, dict):
        raise Broken("categories of a wrong type")
    return list(cell) if isinstance(cell, list | tuple) else [cell]


def tuple_or_text(text: str):
    """A tuple or a set as Python writes it, a set in the order of letters; other text as it is."""
    try:
        found = ast.literal_eval(text) if len(text) < 10_000 else text
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text
    return found if isinstance(found, tuple) else sorted(found) if isinstance(found, set) else text


def literal(text: str):
    """A list written as JSON or as a Python literal, never evaluated. Raises Broken."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        found = ast.literal_eval(text) if len(text) < 10_000 else None
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        found = None
    if not isinstance(found, list | tuple):
        raise Broken("categories of a wrong type")
    return found


def paths_in(cell, form: str, mark: str) -> tuple[tuple[str, ...], ...]:
    """The category paths of one cell. Raises Broken.

    form  path: the names lead from the root to the leaf; set: each name is a path of its own;
          name: the cell is one name
    """
    names = names_in(cell, mark)
    nested = bool(names) and all(isinstance(part, list | tuple) for part in names)
    if not nested and any(isinstance(part, list | tuple | dict) for part in names):
        raise Broken("categories of a wrong type")
    paths = [list(part) for part in names] if nested else [names]
    if any(isinstance(name, list | tuple | dict) for path in paths for name in path):
        raise Broken("categories of a wrong type")
    paths = [[text for name in path if (text := label(name))] for path in paths]
    if form == "set":
        paths = [[name] for path in paths for name in path]
    return category_paths(paths)


def category_form(cells: list, chosen: str = "") -> tuple[str, str]:
    """(path, set or name; the mark between names) of a column, from a sample of its cells.

    chosen  what the user says it is; "" to tell it from the cells

    With `>` a cell is a path. Otherwise the names of a path keep their depth, and often share the
    first name, while those of a set stand in any place, or in the order of letters.
    """
    texts = list(dict.fromkeys(c for c in cells if isinstance(c, str) and not is_missing(c)))
    texts = [t for t in texts if not (t.lstrip().startswith("[") or TUPLE.fullmatch(t.strip()))]
    if chosen == "name":
        return "name", ""
    mark = ">" if any(">" in text for text in texts) else ""
    mark = mark or next((m for m in COMMON_MARKS if separates(m, texts)), "")
    if chosen or mark == ">":
        return chosen or "path", mark
    several = []
    for cell in cells:
        try:
            names = names_in(cell, mark)
        except Broken:
            continue
        if len(names) > 1 and all(isinstance(name, str) for name in names):
            several.append([name.strip() for name in names])
    return ("set" if is_set(several, mark) else "path"), mark


def separates(mark: str, texts: list[str]) -> bool:
    """Whether a mark separates names: its parts occur in other cells too. A bar always does."""
    split = [[part.strip() for part in text.split(mark)] for text in texts]
    if mark == "|" or not any(len(parts) > 1 for parts in split):
        return any(len(parts) > 1 for parts in split)
    cells_with = Counter(part for parts in split for part in set(parts))
    among = [cells_with[part] > 1 for parts in split if len(parts) > 1 for part in parts]
    return sum(among) >= RECURRING * len(among)


def is_set(cells: list[list[str]], mark: str) -> bool:
    """Whether lists of names are sets rather than paths."""
    if not cells:
        return False
    firsts = {names[0] for names in cells}
    if len(firsts) == 1 and len({tuple(names) for names in cells}) > 1:
        return False
    places = defaultdict(set)
    count = Counter(name for names in cells for name in names)
    for names in cells:
        for place, name in enumerate(names):
            places[name].add(place)
    often = [name for name in places if count[name] > 1]
    moving = sum(len(places[name]) > 1 for name in often) / max(1, len(often))
    in_order = sum(names == sorted(names) for names in cells) / len(cells)
    if mark in (",", ", ", ";") and moving == 0 and len(often) < 3:
        return True  # undecided: commas then separate a set, bars a path, as in earlier versions
    return moving >= 0.3 or in_order >= 0.98 and moving > 0


def steady(items: list, values: list) -> bool:
    """Whether a column of a log describes the item: rows of one item mostly agree.

    items, values  one of each row of a sample; items as text
    """
    of: defaultdict[str, Counter] = defaultdict(Counter)
    for item, value in zip(items, values, strict=True):
        if not is_missing(value):
            of[item][str(value)] += 1
    repeated = [c for c in of.values() if c.total() > 1]
    if len(repeated) < 3 or len(set().union(*repeated)) < 2:
        return False
    agree = sum(c.most_common(1)[0][1] / c.total() for c in repeated) / len(repeated)
    return agree >= STEADY


def is_numeric(values: list) -> bool:
    """Whether a column holds numbers: nine in ten of its values at least, and one of them."""
    there = [v for v in values if not is_missing(v)]
    return bool(there) and sum(map(is_number, there)) >= 0.9 * len(there)
