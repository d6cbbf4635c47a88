"""Cards in a notebook: the pictures of the browser page, nothing fetched, every word escaped."""

import json
import subprocess
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pagellm
from pagellm.serving import cards, recommend
from pagellm.stage.config import PageLLMError

STATIC = Path(cards.__file__).parent / "static"
ITEMS = [
    ("Norvik Snare 12 Red", "Drums"),
    ("Norvik Snare 12 Blue", "Drums"),
    ("Molten Lamp", "Lamps"),
    ("Élan – cup\u00a0of tea", "Küche"),
    ("x", ""),
    ("", "Nothing"),
    *((f"Thing {n} of many {n % 7}", f"Kind {n % 40}") for n in range(60)),
]
# A document of plain objects, enough for picture.js.
STUB = """
const node = (tag) => ({
  tag, names: [], values: {}, children: [],
  setAttribute(name, value) { this.values[name] = value; },
  append(child) { this.children.push(child); },
  get classList() { return { add: (...names) => this.names.push(...names), toggle: () => {} }; },
  style: { vars: {}, setProperty(name, value) { this.vars[name] = value; } },
});
globalThis.document = { createElementNS: (_, tag) => node(tag) };
const { picture, tell, paint } = await import(process.argv[2]);
const items = JSON.parse(process.argv[3]);
tell(items.map(([, category]) => category));
console.log(JSON.stringify(items.map(([title, category]) => {
  const { vars } = paint(Object.assign(node("li"), { style: node("x").style }), category).style;
  const drawn = picture(title, category);
  return [vars["--h"], vars["--step"],
          drawn.children.map(({ tag, names, values }) => [tag, names.join(" "), values])];
})));
"""


class Elements(HTMLParser):
    """(tag, attributes) of every element, and the text."""

    def __init__(self, text):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def node():
    """The Node that comes with playwright."""
    if not (found := find_spec("playwright")):
        pytest.skip("needs playwright: pip install 'pagellm[dev]'")
    return Path(found.origin).parent / "driver" / "node"


def test_pictures_and_colours_are_those_of_the_browser_page(tmp_path):
    (tmp_path / "stub.mjs").write_text(STUB)
    done = subprocess.run(
        [node(), tmp_path / "stub.mjs", STATIC / "picture.js", json.dumps(ITEMS)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    paint = cards.colours([category for _, category in ITEMS])
    for (title, category), (hue, step, theirs) in zip(ITEMS, json.loads(done.stdout), strict=True):
        ours = Elements(cards.picture(title, category)).found[1:]
        assert [[tag, a.pop("class"), a] for tag, a in ours] == theirs
        assert paint.get(category, (260, 0)) == (float(hue), int(step))


TEXT = st.text(max_size=30)
TAGS = {"style", "div", "section", "h3", "bdi", "small", "span", "ol", "li", "p", "i", "svg"}
TAGS |= {"rect", "circle", "ellipse", "path"}


@given(TEXT, TEXT, TEXT, TEXT)
def test_whatever_a_shop_calls_its_things_is_text(user, item, title, category):
    user, item, title, category = (
        text.encode("utf-8", "replace").decode() for text in (user, item, title, category)
    )
    row = {"user": user, "item": item, "title": title, "category": category, "price": 1.0}
    page = Elements(cards.of([row]).html)
    assert {tag for tag, _ in page.found} <= TAGS
    for word in (user, title or item, category):
        assert word in page.text
    assert category in {a.get("aria-label", "")[21:] for _, a in page.found} or not category


def test_a_script_in_a_title_is_shown_and_nothing_is_fetched():
    bad = "<script>alert(1)</script>\"' onload=x"
    found = cards.of([{"user": bad, "item": bad, "title": bad, "category": bad, "price": None}])
    page = Elements(found.html)
    assert "<script" not in found.html and page.text.count("<script>alert(1)</script>") == 3
    allowed = {"class", "style", "title", "role", "aria-label", "aria-hidden", "focusable", "dir"}
    allowed |= {"x", "y", "width", "height", "cx", "cy", "r", "rx", "ry", "d", "viewbox"}
    for tag, attributes in page.found:
        assert tag not in ("script", "img", "link", "iframe", "object", "use", "image")
        assert set(attributes) <= allowed
    assert "url(" not in found.html and "@import" not in found.html and "http" not in found.html


def test_pages_of_users_in_order_and_the_others_counted(tmp_path):
    rows = [
        {"user": f"u{n}", "rank": rank, "item": f"i{n}{rank}", "title": None, "category": "A"}
        for n in range(6)
        for rank in (2, 1)
    ]
    shown = cards.of(rows, most=2)
    page = Elements(shown._repr_html_())
    assert [tag for tag, _ in page.found].count("section") == 2 and "and 4 more users" in page.text
    assert page.text.index("i01") < page.text.index("i02") < page.text.index("i11")
    assert "2 items of 1 category" in page.text and repr(shown).startswith("Cards of 2 pages")
    (band,) = {a["aria-label"] for _, a in page.found if a.get("class") == "band"}
    assert band == "categories in order: A, A"
    text = shown.save(tmp_path / "pages.html").read_text()
    assert text.startswith("<!doctype html>") and shown.html in text
    assert "no pages" in cards.of([]).html
    with pytest.raises(PageLLMError, match="most=0"):
        cards.of(rows, most=0)


def test_tables_of_python_and_files_of_the_command_line(served, rec, tmp_path):
    user = rec.shop.user_ids[0]
    model = pagellm.load("base", runs=str(served / "runs"))
    pages = model.pages(users=[user], k=4)
    shown = Elements(pagellm.cards(pages).html)
    assert user in shown.text and all(title in shown.text for title in pages["title"].to_pylist())
    assert [tag for tag, _ in shown.found].count("li") == 4
    out = tmp_path / "all.parquet"
    told = {"data": str(served / "data"), "runs": str(served / "runs"), "run": "base", "k": 4}
    recommend.run(recommend.Config(all=True, out=str(out), depth=8, device="cpu", **told))
    every = Elements(pagellm.cards(pq.read_table(out), most=1).html)
    assert [tag for tag, _ in every.found].count("li") == 4 and user in every.text
    with pytest.raises(PageLLMError, match="no column item; there are user"):
        pagellm.cards(pa.table({"user": ["a"]}))
