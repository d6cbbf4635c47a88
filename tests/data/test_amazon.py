"""The three spellings of Amazon's files, and what is not one of them."""

import json
import math
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.data import amazon, records
from pagellm.data.amazon import (
    category_paths,
    is_items,
    is_reviews,
    mapping,
    parse_item,
    parse_review,
    review_table,
)
from pagellm.data.records import Item, Review, Tally, parsed, parsed_batches
from pagellm.data.values import NO_TIME, Broken, is_missing

few = settings(deadline=None, max_examples=60)
plain = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8).filter(
    lambda text: not is_missing(text)  # "none", "nan" and their like name nothing
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain, inner, max_size=3),
    max_leaves=6,
)


@few
@given(st.dictionaries(plain, values, min_size=1, max_size=4))
def test_json_and_python_literals_read_alike(record):
    assert mapping(json.dumps(record)) == record
    assert mapping(repr(record)) == record


@few
@given(st.text(max_size=30) | st.text("{}[]'\":,0a\\(", max_size=20).map(lambda text: "{'" + text))
def test_any_line_is_a_mapping_or_broken(text):
    for parse in (mapping, parse_review, parse_item):
        try:
            parse(text)
        except Broken:
            pass


@pytest.mark.parametrize(
    "text, reason",
    [
        ("[" * 100_000, "nested too deeply|bad JSON"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ("{'a': " * 100_000, "nested too deeply|bad Python"),
        ("{'a': " + "(" * 50_000, "nested too deeply|bad Python"),
        ("{'a': " + "-" * 500_000 + "1}", "nested too deeply|bad Python"),
        ("[1]", "not an object"),
        ("7", "not an object"),
        ("{'a', 'b'}", "not an object"),
        ("{'a': __import__('os').getcwd()}", "bad Python"),
        ("{'a': [] * 9}", "bad Python"),
        ("{'a': f'{1}'}", "bad Python"),
        ("{'a': {}: 1}", "bad Python"),
        ("{'a': {[]: 1}}", "bad Python"),
        ("{", "bad JSON"),
        ('{"a": 1', "bad JSON"),
        ("{'a': 1", "bad Python"),
        ('{"a": "\\ud8"}', "bad JSON"),
        ("", "bad JSON"),
    ],
)
def test_broken_lines(text, reason):
    with pytest.raises(Broken, match=reason):
        mapping(text)


@pytest.mark.filterwarnings("error")
def test_a_backslash_that_escapes_nothing_is_no_warning():
    assert mapping(r"{'a': 'C:\d'}") == {"a": r"C:\d"}


def test_a_python_literal_has_a_limit(monkeypatch):
    monkeypatch.setattr(amazon, "LITERAL_LIMIT", 12)
    assert mapping("{'a': 'bcd'}") == {"a": "bcd"}
    with pytest.raises(Broken, match="over 1 MB"):
        mapping("{'a': 'bcde'}")


@few
@given(st.integers(1, 5), st.integers(10**8, 2_000_000_000), plain, plain)
def test_one_review_in_three_spellings(rating, time, user, item):
    old = {
        "reviewerID": user,
        "asin": item,
        "overall": float(rating),
        "unixReviewTime": time,
        "summary": "It &amp; I",
        "reviewText": "Good  one",
    }
    new = {
        "user_id": user,
        "parent_asin": item,
        "asin": "variant",
        "rating": rating,
        "timestamp": time * 1000 + 999,
        "title": "It &amp; I",
        "text": "Good<br />one",
    }
    expected = Review(user, item, rating, time, "It & I\nGood one")
    assert parse_review(json.dumps(old)) == parse_review(repr(old)) == expected
    # 2023 counts milliseconds, and none of them is lost
    assert parse_review(json.dumps(new)) == expected._replace(time=(time * 1000 + 999) / 1000)


def test_what_a_review_may_lack():
    review = parse_review('{"reviewerID": "u", "asin": "i"}')
    assert (
        math.isnan(review.rating)
        and review.time == NO_TIME
        and review.text == ""
        and review.split == ""
    )
    assert parse_review('{"user_id": "u", "asin": "i", "rating": 3}').item == "i"


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"asin": "i", "overall": 5.0}, "no user"),
        ({"reviewerID": "u", "overall": 5.0}, "no item"),
        ({"reviewerID": "u", "asin": ["i"]}, "item of a wrong type"),
        ({"reviewerID": "u", "asin": "i", "overall": 9}, "1..5"),
        ({"reviewerID": "u", "asin": "i", "overall": "x"}, "rating of a wrong type"),
        ({"reviewerID": "u", "asin": "i", "unixReviewTime": -5}, "absurd time"),
        ({"reviewerID": "u", "asin": "i", "reviewText": 7}, "text of a wrong type"),
        ({"user_id": "u", "parent_asin": "i", "rating": 0}, "1..5"),
        ({"user_id": "u"}, "no item"),
        ({}, "no user"),
    ],
)
def test_broken_reviews(record, reason):
    with pytest.raises(Broken, match=reason):
        parse_review(json.dumps(record))


def test_one_item_in_three_spellings():
    expected = Item("i", 'A "B" & c', "Maker", (("Music", "Drums & Co"),), 1040.5, "Loud. Very.")
    spelled = [
        repr(
            {
                "asin": "i",
                "title": "A &quot;B&quot; &amp; c",
                "brand": "Maker",
                "price": 1040.5,
                "salesRank": {"x": 1},
                "categories": [["Music", "Drums &amp; Co"]],
                "description": "Loud. Very.",
            }
        ),
        json.dumps(
            {
                "asin": "i",
                "title": "A &#34;B&#34; & c",
                "brand": "Maker",
                "price": "$1,040.50",
                "category": ["Music", "Drums &amp; Co"],
                "description": ["Loud.", "", "Very."],
            }
        ),
        json.dumps(
            {
                "parent_asin": "i",
                "asin": "v",
                "title": 'A "B" & c',
                "store": "Maker",
                "price": 1040.5,
                "categories": ["Music", "Drums & Co"],
                "description": ["Loud.", "Very."],
                "details": {},
            }
        ),
    ]
    assert [parse_item(line) for line in spelled] == [expected] * 3


def test_pieces_of_page_script_are_unknown():
    item = parse_item(
        json.dumps(
            {
                "asin": "i",
                "title": "var aPageStart = (new Date()).getTime();",
                "brand": "x" * 101,
                "price": ".a{b:c}",
                "category": ["Music", "Drums", "</span></span></span>", "Made of wood"],
                "description": "<script>no",
            }
        )
    )
    assert (
        item[:4] == ("i", "", "", (("Music", "Drums"),))
        and math.isnan(item.price)
        and item.description == ""
    )
    assert parse_item('{"asin": "i", "brand": "%s"}' % ("x" * 100)).brand == "x" * 100
    assert parse_item('{"asin": "i", "category": ["%s", "b"]}' % ("x" * 101)).paths == ()


def test_brand_may_hide_in_the_details():
    assert parse_item('{"parent_asin": "i", "store": null, "details": {"Brand": "M"}}').brand == "M"
    assert parse_item('{"parent_asin": "i", "store": "S", "details": {"Brand": "M"}}').brand == "S"
    assert parse_item('{"parent_asin": "i", "details": "none"}').brand == ""


@pytest.mark.parametrize(
    "value, paths",
    [
        ([["a", "b"], ["c"]], (("a", "b"), ("c",))),
        (["a", "b"], (("a", "b"),)),
        ([["a"], []], (("a",),)),
        ([], ()),
        (None, ()),
        ("a", (("a",),)),
        ([[]], ()),
        (["a", "", "b"], (("a",),)),
    ],
)
def test_category_paths(value, paths):
    assert category_paths(value) == paths


@pytest.mark.parametrize("value", [7, {"a": 1}, [["a", 1]], [1]])
def test_broken_categories(value):
    with pytest.raises(Broken, match="wrong type"):
        category_paths(value)


def test_files_are_told_apart_by_their_fields():
    old = {"reviewerID", "asin", "overall"}
    assert is_reviews(old) == is_reviews(old | {"helpful"}) == "2014"
    assert [is_reviews(old | {field}) for field in ("verified", "vote", "style", "image")] == [
        "2018"
    ] * 4
    assert is_reviews({"user_id", "parent_asin", "timestamp", "text"}) == "2023"
    assert is_reviews({"user_id", "item_id", "timestamp"}) == is_reviews({"asin", "title"}) == ""
    assert (
        is_items({"asin", "title", "categories"}) == "2014"
        and is_items({"asin", "category"}) == "2018"
    )
    assert is_items({"parent_asin", "title"}) == "2023"
    assert is_items(old) == is_items({"user_id", "parent_asin"}) == is_items({"title"}) == ""


# What may stand in a field of a review, from plain to hostile: JSON as text.
VALUES = st.sampled_from(
    [
        '"A1"',
        '"B2"',
        '"a  b"',
        '" lead"',
        '"trail "',
        '"&amp; &#34;x&#34;"',
        '"&#34;x&quot;  y"',
        '"&amp;#34;"',
        '"&lt&#39;"',
        '"& &#34"',
        '"a<br />b"',
        '"caf\\u00e9 \\u2603"',
        '"é"',
        '""',
        '" "',
        '"\\ud83d\\ude00"',
        '"\\ud800"',
        '"\\n"',
        '"tab\\t"',
        '"\t"',
        "null",
        "true",
        "5",
        "5.0",
        "1",
        "0",
        "5.5",
        "1e400",
        "-0",
        "1e2",
        "NaN",
        "Infinity",
        '"4"',
        "1400000000",
        "1400000000000",
        "5000000000",
        "-1",
        "1.4e9",
        '"1400000000"',
        '"a\\u0020\\u0020b"',
        '"\\u0026#34;"',
        "[]",
        '["a"]',
        "{}",
        '{"reviewerID": "x"}',
        "[" * 600 + "]" * 600,
        "01",
        "1.",
        "99999999999999999999",
    ]
)
PLAIN = {
    "2014": {
        "reviewerID": '"A1"',
        "asin": '"B2"',
        "overall": "5.0",
        "unixReviewTime": "1400000000",
        "summary": '"Fine"',
        "reviewText": '"Good sound."',
    },
    "2023": {
        "user_id": '"AE1"',
        "parent_asin": '"B2"',
        "rating": "5.0",
        "timestamp": "1588687728923",
        "title": '"Fine"',
        "text": '"Good sound."',
        "asin": '"B3"',
        "images": "[]",
    },
}
MORE = {
    "2014": ("verified", "style", "helpful"),
    "2023": (
        "verified_purchase",
        "helpful_vote",
        "overall",
        "reviewerID",
        "\\u006fverall",
        "r\\u0065viewerID",
    ),
}
LINES = {
    "2014": ("{'asin': 'B2'}",),
    "2023": ('{"reviewerID": "A1", "asin": "B2"}', '{"user_id": "u", "asin": "B"}'),
}


@st.composite
def review_lines(draw, spelling):
    fields = PLAIN[spelling]
    changed = draw(
        st.lists(st.tuples(st.sampled_from([*fields, *MORE[spelling]]), VALUES), max_size=2)
    )
    gone = draw(st.sets(st.sampled_from(list(fields)), max_size=1))
    written = [(name, value) for name, value in fields.items() if name not in gone] + changed
    line = "{" + ", ".join(f'"{name}": {value}' for name, value in written) + "}"
    return draw(
        st.sampled_from(
            [
                *[line] * 12,
                line + line,
                line + " ",
                " " + line,
                line[:-1],
                line[1:],
                "",
                " ",
                line + "\r",
                '{"a":',
                '{"b": 1}}',
                line.replace("Good", "Go\x00od"),
                line.replace("Good", "G\udcff"),
                line + "{}",
                "{}",
                "[]",
                line[:40],
                "\ufeff" + line,
                *LINES[spelling],
            ]
        )
    )


@pytest.mark.parametrize("spelling", ["2014", "2018", "2023"])
@settings(deadline=None, max_examples=200)
@given(
    data=st.data(),
    end=st.sampled_from(["\n", "\n\n", "\r\n"]),
    last=st.booleans(),
    first=st.integers(1, 300),
)
def test_many_lines_at_once_are_what_they_are_one_by_one(
    tmp_path_factory, spelling, data, end, last, first
):
    rows = data.draw(
        st.lists(review_lines("2023" if spelling == "2023" else "2014"), min_size=1, max_size=4)
    )
    path = tmp_path_factory.getbasetemp() / "lines.json"
    path.write_bytes((end.join(rows) + end * last).encode("utf-8", "surrogateescape"))
    slow, fast = Tally(), Tally()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "FIRST_READ", first)
        found = list(parsed(path, parse_review, slow))
        tables = list(
            parsed_batches(path, parse_review, partial(review_table, spelling=spelling), fast)
        )
    quick = [Review(*row.values()) for table in tables for row in table.to_pylist()]
    assert repr(quick) == repr(found)
    assert (slow.read, slow.broken, slow.examples) == (fast.read, fast.broken, fast.examples)


@pytest.mark.parametrize(
    "spelling, more, least",
    [
        ("2014", ', "helpful": [0, 1]', {"reviewerID", "asin"}),
        (
            "2018",
            ', "verified": true, "vote": null, "style": {"Size:": " L"}',
            {"reviewerID", "asin"},
        ),
        (
            "2023",
            ', "helpful_vote": 0, "verified_purchase": true,'
            ' "images": [{"small_image_url": "https://x/y.jpg"}]',
            {"user_id", "parent_asin"},
        ),
    ],
)
def test_plain_lines_need_no_second_look(spelling, more, least):
    fields = PLAIN["2023" if spelling == "2023" else "2014"] | {
        "title" if spelling == "2023" else "summary": '"It  is &#34;fine&quot; &amp; \\u00e9 "'
    }
    line = "{" + ", ".join(
        f'"{name}": {value}' for name, value in fields.items() if name != "images"
    )
    sparse = (
        "{"
        + ", ".join(f'"{name}": {value}' for name, value in fields.items() if name in least)
        + "}"
    )
    lines = [line + "}", line + more + "}", sparse, line + ', "unknown": 1}']
    table = review_table("\n".join(lines).encode(), spelling)
    assert repr([Review(*row.values()) for row in table.to_pylist()]) == repr(
        [*map(parse_review, lines)]
    )


def test_what_only_escapes_hold_is_cleaned_too():
    line = (
        '{"reviewerID": "A", "asin": "B", "summary": "a\\u0020\\u0020b",'
        ' "reviewText": "\\u0026#34;c"}'
    )
    (found,) = review_table(line.encode()).to_pylist()
    assert found["text"] == 'a b\n"c' == parse_review(line).text


def test_one_odd_line_makes_few_others_slow(tmp_path):
    line = (
        b"{"
        + b", ".join(f'"{name}": {value}'.encode() for name, value in PLAIN["2023"].items())
        + b"}\n"
    )
    lines = [line] * 320
    lines[100] = b"{broken\n"
    (tmp_path / "x.json").write_bytes(b"".join(lines))
    looked, tally = [], Tally()

    def parse(text):
        looked.append(text)
        return parse_review(text)

    tables = list(
        parsed_batches(tmp_path / "x.json", parse, partial(review_table, spelling="2023"), tally)
    )
    assert (
        sum(map(len, tables)) == 319
        and tally.examples == ["x.json:101: bad JSON"]
        and 1 < len(looked) < 30
    )
