"""The JSON documents of the storefront as JSON Schema, and a check in plain Python.

problems = check(document, LAYOUT)          [] or e.g. ["placements[2].slots: 0 is below 1"]

Of JSON Schema 2020-12 only these words are used and understood: type, required, properties,
additionalProperties (false), items, enum, const, minimum, maximum, minLength, maxLength, minItems,
maxItems, pattern.
"""

import re

from pagellm.stage.config import PageLLMError
from pagellm.storefront.parts import INTENTS, Layout, Placement

__all__ = ["KEYWORDS", "LAYOUT", "PAGE", "POLICY", "THEME", "check", "layout_of"]

MOST_SLOTS = 200  # of all rows together


def text(low: int = 0, high: int = 1000) -> dict:
    return {"type": "string", "minLength": low, "maxLength": high}


def whole(low: int, high: int | None = None) -> dict:
    return {"type": "integer", "minimum": low} | ({} if high is None else {"maximum": high})


def share() -> dict:
    return {"type": "number", "minimum": 0, "maximum": 1}


def some(what: dict, low: int = 0, high: int = 1000) -> dict:
    return {"type": "array", "minItems": low, "maxItems": high, "items": what}


def record(required: str, **properties) -> dict:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required.split(),
        "properties": properties,
    }


PLACEMENT = record(
    "id intent slots",
    id=text(1, 64),
    role={"enum": ["hero", "carousel", "grid"]},
    intent={"enum": list(INTENTS)},
    slots=whole(1, 40),
    min_items=whole(1, 40),
    title=text(3, 40),
    categories={"type": "array", "maxItems": 50, "items": {"type": "string"}},
    sponsored=whole(0, 40),
)
LAYOUT = {"$id": "layout/1"} | record(
    "schema id placements",
    schema={"const": "layout/1"},
    id=text(1, 64),
    locale={"type": "string", "pattern": "^[a-z]{2}(-[A-Z]{2})?$"},
    placements=some(PLACEMENT, 1, 20),
)
POLICY = {"$id": "policy/1"} | record(
    "",
    banned=some(text(1, 80)),
    claims=some(text(1, 80)),
    sensitive=some(text(1, 80)),
    instructions=some(text(1, 80)),
    restricted=some(text(1, 80)),
    calendar=some(
        record(
            "name from to categories",
            name=text(3, 40),
            **{"from": {"type": "string"}, "to": {"type": "string"}},
            categories=some(text(1, 80), 1),
        )
    ),
    sponsored_share=share(),
    caps={"type": "object"},
    min_items=whole(1, 40),
    titles={"type": "object"},
)
THEME = {"$id": "theme/1"} | record(
    "title concepts",
    title=text(3, 40),
    subtitle=text(0, 80),
    persona=text(0, 80),
    concepts=some(text(0, 40), 1, 8),
    avoid=some(text(0, 40), 0, 8),
)
KEYWORDS = {"$id": "keywords/1"} | record("keywords", keywords=some({"type": "string"}, 3, 8))
ITEM = record(
    "id rank score parts propensity",
    id={"type": "string"},
    title={"type": "string"},
    rank=whole(1),
    score={"type": "number"},
    keyword={"type": "string"},
    sponsored={"type": "boolean"},
    propensity=share(),
    parts=record(
        "ranker ret agree redundancy",
        ranker={"type": "number"},
        ret={"type": "number"},
        agree={"type": "number"},
        redundancy={"type": "number"},
        reward={"type": "number"},
    ),
)
ROW = record(
    "id position intent source theme keywords items quality",
    id={"type": "string"},
    position=whole(1),
    intent={"type": "string"},
    source={"enum": ["generated", "segment", "static", "editorial"]},
    propensity=share(),
    theme=record(
        "title concepts",
        title=text(3, 40),
        subtitle={"type": "string", "maxLength": 80},
        concepts={"type": "array", "maxItems": 8, "items": {"type": "string", "maxLength": 40}},
        writer={"type": "string"},
    ),
    keywords={
        "type": "array",
        "maxItems": 8,
        "items": record(
            "text type score matches",
            text={"type": "string"},
            type={"enum": ["category", "brand", "attribute", "query"]},
            score={"type": "number"},
            matches=whole(1),
        ),
    },
    items={"type": "array", "maxItems": 40, "items": ITEM},
    quality={"type": "object"},
)
PAGE = {"$id": "storefront/1"} | record(
    "schema page_id user at layout seed explore models placements page fallbacks ms cost",
    schema={"const": "storefront/1"},
    page_id={"type": "string"},
    user={"type": ["string", "null"]},
    at={"type": "integer"},
    layout={"type": "string"},
    seed={"type": "integer"},
    explore={"type": "number", "minimum": 0},
    models={"type": "object"},
    fallbacks={"type": "array", "items": {"type": "string"}},
    ms={"type": "object"},
    cost={"type": "object"},
    page={"type": "object"},
    placements={"type": "array", "items": ROW},
)

TYPES = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "integer": lambda v: (
        isinstance(v, int) and not isinstance(v, bool) or isinstance(v, float) and v.is_integer()
    ),
}


def check(value, schema: dict, path: str = "") -> list[str]:
    """What is wrong with a document: a list of "path: problem", empty where it is valid."""
    here = path or "document"
    wanted = schema.get("type")
    if wanted:
        names = [wanted] if isinstance(wanted, str) else wanted
        if not any(TYPES[name](value) for name in names):
            return [f"{here}: {shown(value)} is not of type {' or '.join(names)}"]
    found = check_value(value, schema, here)
    if isinstance(value, dict):
        found += check_object(value, schema, path)
    if isinstance(value, list):
        found += check_size(len(value), schema, here, "Items", "entries")
        for at, entry in enumerate(value):
            found += check(entry, schema.get("items", {}), f"{path}[{at}]")
    return found


def check_value(value, schema: dict, here: str) -> list[str]:
    """The words about one value by itself."""
    found = []
    if "const" in schema and not same(value, schema["const"]):
        found.append(f"{here}: {shown(value)} is not {schema['const']!r}")
    if "enum" in schema and not any(same(value, choice) for choice in schema["enum"]):
        choices = ", ".join(map(str, schema["enum"][:20]))
        found.append(f"{here}: {shown(value)} is none of {choices}")
    if TYPES["number"](value):
        if value < schema.get("minimum", value):
            found.append(f"{here}: {value} is below {schema['minimum']}")
        if value > schema.get("maximum", value):
            found.append(f"{here}: {value} is above {schema['maximum']}")
    if isinstance(value, str):
        found += check_size(len(value), schema, here, "Length", "characters")
        if "pattern" in schema and not re.search(schema["pattern"], value):
            found.append(f"{here}: {shown(value)} does not match {schema['pattern']}")
    return found


def check_object(value: dict, schema: dict, path: str) -> list[str]:
    """The fields of an object: those that must be there, those that may, and each by itself."""
    known = schema.get("properties", {})
    dot = f"{path}." if path else ""
    found = [f"{dot}{name}: is missing" for name in schema.get("required", ()) if name not in value]
    for name, entry in value.items():
        if name in known:
            found += check(entry, known[name], f"{dot}{name}")
        elif schema.get("additionalProperties") is False:
            found.append(f"{dot}{name}: no such field; there are {', '.join(known)}")
    return found


def check_size(size: int, schema: dict, here: str, kind: str, unit: str) -> list[str]:
    low, high = schema.get(f"min{kind}", 0), schema.get(f"max{kind}", size)
    if size < low:
        return [f"{here}: {size} {unit}, want {low} or more"]
    return [f"{here}: {size} {unit}, want {high} or fewer"] if size > high else []


def same(a, b) -> bool:
    """Equal as JSON has it: true is not 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def layout_of(document: dict) -> Layout:
    """A layout from its JSON. Raises PageLLMError with the path of every field that is wrong."""
    problems = check(document, LAYOUT)
    if not problems:
        rows = document["placements"]
        names = [row["id"] for row in rows]
        problems += [
            f"placements[{at}].id: {name!r} is there twice"
            for at, name in enumerate(names)
            if name in names[:at]
        ]
        titles = [row.get("title") for row in rows]
        problems += [
            f"placements[{at}].title: {title!r} is there twice"
            for at, title in enumerate(titles)
            if title and title in titles[:at]
        ]
        total = sum(row["slots"] for row in rows)
        if total > MOST_SLOTS:
            problems.append(f"placements: {total} slots in all, want {MOST_SLOTS} or fewer")
    if problems:
        raise PageLLMError("the layout is not valid\n  " + "\n  ".join(problems))
    placements = tuple(map(placement_of, rows))
    return Layout(document["id"], placements, document.get("locale", "en"))


def placement_of(row: dict) -> Placement:
    # JSON knows one kind of number, so that 10.0 is a whole number too.
    numbers = {name: int(row[name]) for name in ("slots", "min_items", "sponsored") if name in row}
    return Placement(**row | numbers | {"categories": tuple(row.get("categories", ()))})
