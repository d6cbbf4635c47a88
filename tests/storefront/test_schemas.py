"""The check in plain Python against the package jsonschema, and what a wrong layout is told."""

import copy
import random

import pytest

from pagellm.stage.config import PageLLMError
from pagellm.storefront.schemas import KEYWORDS, LAYOUT, PAGE, POLICY, THEME, check, layout_of

GOOD_LAYOUT = {
    "schema": "layout/1",
    "id": "tiny",
    "locale": "en",
    "placements": [
        {"id": "p1", "intent": "restock", "slots": 3, "title": "Buy it again"},
        {"id": "p2", "intent": "browse", "slots": 3, "min_items": 3, "role": "grid"},
    ],
}
GOOD_ITEM = {
    "id": "g01",
    "title": "Organic whole milk",
    "rank": 1,
    "score": -0.2,
    "parts": {"ranker": -0.2, "ret": 0, "agree": 0, "redundancy": 0},
    "propensity": 1,
}
GOOD_PAGE = {
    "schema": "storefront/1",
    "page_id": "d1b6c0",
    "user": None,
    "at": 1509494400,
    "layout": "tiny",
    "seed": 0,
    "explore": 1.0,
    "models": {"ranker": "frequency/1"},
    "placements": [
        {
            "id": "p1",
            "position": 1,
            "intent": "browse",
            "source": "generated",
            "propensity": 0.5,
            "theme": {
                "title": "Breakfast",
                "subtitle": "",
                "concepts": ["oat"],
                "writer": "template/1",
            },
            "keywords": [{"text": "oat", "type": "query", "score": 0.5, "matches": 2}],
            "items": [GOOD_ITEM],
            "quality": {},
        }
    ],
    "page": {},
    "fallbacks": [],
    "ms": {},
    "cost": {},
}
GOOD_THEME = {"title": "Breakfast", "concepts": ["oat", "milk"], "avoid": ["soap"]}
GOOD_KEYWORDS = {"keywords": ["oat", "milk", "tea"]}
GOOD_POLICY = {"banned": ["scam"], "sponsored_share": 0.1, "min_items": 4, "caps": {"Milk": 2}}
CASES = (
    (LAYOUT, GOOD_LAYOUT),
    (PAGE, GOOD_PAGE),
    (THEME, GOOD_THEME),
    (KEYWORDS, GOOD_KEYWORDS),
    (POLICY, GOOD_POLICY),
)
VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    1.0,
    2.5,
    41,
    "",
    "x",
    "restock",
    "é" * 41,
    [],
    {},
    ["a"] * 9,
    [1],
)


def spots(value, path=()):
    """Every place of a document."""
    yield path
    entries = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for name, entry in entries:
        yield from spots(entry, (*path, name))


def mutated(document, rng: random.Random):
    """A copy with one place replaced, taken out, or given a new field."""
    document = copy.deepcopy(document)
    path = rng.choice([spot for spot in spots(document) if spot])
    parent = document
    for name in path[:-1]:
        parent = parent[name]
    how = rng.choice(("replace", "replace", "delete", "add"))
    if how == "delete":
        del parent[path[-1]]
    elif how == "add" and isinstance(parent, dict):
        parent["extra"] = 1
    else:
        parent[path[-1]] = rng.choice(VALUES)
    return document


@pytest.mark.parametrize("schema, good", CASES, ids=lambda c: c.get("$id", ""))
def test_a_good_document_has_no_problem(schema, good):
    assert check(good, schema) == []


def test_the_check_agrees_with_jsonschema_on_a_thousand_mutated_documents():
    jsonschema = pytest.importorskip("jsonschema")
    rng = random.Random(0)
    verdicts = []
    for _ in range(1000):
        schema, good = rng.choice(CASES)
        document = mutated(good, rng)
        ours = not check(document, schema)
        assert ours == jsonschema.Draft202012Validator(schema).is_valid(document), document
        verdicts.append(ours)
    assert 50 < sum(verdicts) < 950  # both verdicts are there


def test_an_error_names_the_path_and_what_is_allowed():
    bad = copy.deepcopy(GOOD_LAYOUT)
    bad["placements"][1]["slots"] = 0
    bad["placements"][0]["intnt"] = "x"
    found = check(bad, LAYOUT)
    assert "placements[1].slots: 0 is below 1" in found
    assert any(
        line.startswith("placements[0].intnt: no such field; there are id") for line in found
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"id": "p1"}, r"placements\[1\].id: 'p1' is there twice"),
        ({"slots": 41}, r"placements\[1\].slots: 41 is above 40"),
        ({"intent": "sell"}, r"placements\[1\].intent: 'sell' is none of restock, browse"),
    ],
)
def test_a_wrong_layout_is_refused_by_field(change, words):
    bad = copy.deepcopy(GOOD_LAYOUT)
    bad["placements"][1] |= change
    with pytest.raises(PageLLMError, match=words):
        layout_of(bad)


def test_the_same_title_twice_is_refused():
    row = {"intent": "editorial", "slots": 4, "title": "Hot cups", "categories": ["Coffee"]}
    rows = [row | {"id": name} for name in "ab"]
    with pytest.raises(PageLLMError, match=r"placements\[1\].title: 'Hot cups' is there twice"):
        layout_of({"schema": "layout/1", "id": "x", "placements": rows})


def test_a_page_of_more_than_200_slots_or_21_rows_is_refused():
    row = {"intent": "browse", "slots": 40}
    big = GOOD_LAYOUT | {"placements": [row | {"id": str(n)} for n in range(6)]}
    with pytest.raises(PageLLMError, match="240 slots in all, want 200 or fewer"):
        layout_of(big)
    many = GOOD_LAYOUT | {"placements": [row | {"id": str(n), "slots": 1} for n in range(21)]}
    with pytest.raises(PageLLMError, match="21 entries, want 20 or fewer"):
        layout_of(many)


def test_a_good_layout_is_read():
    layout = layout_of(GOOD_LAYOUT)
    assert [row.slots for row in layout.placements] == [3, 3]
    assert layout.placements[0].title == "Buy it again" and layout.placements[0].min_items == 4
