"""A shop's own log in every form, item tables, sequence files.

Good rows are read whatever stands between them.
"""

import csv
import io
import json
import math
from datetime import UTC, datetime
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.data.logs import (
    ITEM_COLUMNS,
    LOG_COLUMNS,
    delimiter_of,
    match,
    read_items,
    read_log,
)
from pagellm.data.records import Item, Review, Tally
from pagellm.data.sequences import item_words, read_sequences
from pagellm.data.values import NO_TIME, is_missing
from pagellm.stage.config import PageLLMError

few = settings(deadline=None, max_examples=60)
GRADES = {"view": 1.0, "cart": 4.0}
COLUMNS = {"user": "user_id", "item": "item_id", "rating": "stars", "time": "ts", "text": "comment"}
word = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=6)
word = word.filter(lambda text: not is_missing(text))
prose = st.text(st.sampled_from("ab ,;\t\"|'é"), max_size=12)
rows = st.lists(
    st.tuples(
        word, word, st.sampled_from([None, 1.0, 2.5, 5.0]), st.none() | st.integers(0, 10**9), prose
    ),
    min_size=1,
    max_size=5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("interactions")


def log(path, kind, columns=None, scale=(1, 5), split=""):
    tally = Tally()
    found = list(read_log(path, kind, columns or COLUMNS, tally, GRADES, scale, split))
    left_out = tally.broken.total() + tally.passed.total()
    assert tally.read == tally.kept + left_out and tally.kept == len(found)
    return found, tally


def expected(table):
    return [
        Review(
            u,
            i,
            math.nan if r is None else r,
            NO_TIME if t is None else float(t),
            " ".join(c.split()),
        )
        for u, i, r, t, c in table
    ]


def same(found, wanted):
    return repr(found) == repr(wanted)  # NaN equals itself in writing


def write_csv(path, table, mark=",", quoting=csv.QUOTE_MINIMAL):
    out = io.StringIO()
    writer = csv.writer(out, delimiter=mark, quoting=quoting, lineterminator="\n")
    writer.writerow(COLUMNS.values())
    writer.writerows(table)
    path.write_text(out.getvalue(), encoding="utf-8")


@few
@given(rows, st.sampled_from(",\t;|"), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
def test_csv_reads_back(folder, table, mark, quoting):
    write_csv(folder / "log.csv", table, mark, quoting)
    found, tally = log(folder / "log.csv", "csv")
    assert same(found, expected(table)) and tally.read == len(table)


@few
@given(rows)
def test_json_lines_and_parquet_read_back(folder, table):
    records = [dict(zip(COLUMNS.values(), row, strict=True)) for row in table]
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    schema = pa.schema(
        [
            ("user_id", pa.string()),
            ("item_id", pa.string()),
            ("stars", pa.float64()),
            ("ts", pa.int64()),
            ("comment", pa.string()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(records, schema), folder / "log.parquet", row_group_size=2)
    for kind in ("jsonl", "parquet"):
        found, tally = log(folder / f"log.{kind}", kind)
        assert same(found, expected(table)) and tally.read == len(table)


def test_quoted_records_may_span_lines(folder):
    table = [("u", "i", 5.0, 7, 'two\n\nlines, "quoted"'), ("v", "i", 4.0, 8, "plain")]
    write_csv(folder / "log.csv", table)
    found, tally = log(folder / "log.csv", "csv")
    assert same(found, expected(table)) and tally.read == 2


@few
@given(
    rows,
    st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from(['"never closed', "a,b", '"x"y,z', ""])),
        max_size=3,
    ),
)
def test_a_broken_csv_line_costs_itself_only(folder, table, junk):
    table = [(*row[:4], "plain") for row in table]
    write_csv(folder / "log.csv", table)
    content = (folder / "log.csv").read_text().split("\n")
    for place, line in junk:
        content.insert(1 + min(place, len(content) - 2), line)
    (folder / "log.csv").write_text("\n".join(content))
    found, tally = log(folder / "log.csv", "csv")
    assert same(found, expected(table)) and tally.broken.total() == len(junk)


def test_quotes_that_were_never_meant_as_such(folder):
    (folder / "log.csv").write_text(
        'user_id\titem_id\tcomment\nu\ti\t"good" one\nv\ti\t"not closed\nw\ti\t5" drum\n'
    )
    columns = {role: COLUMNS[role] for role in ("user", "item", "text")}
    found, tally = log(folder / "log.csv", "csv", columns)
    assert [review.text for review in found] == [
        '"good" one',
        '"not closed',
        '5" drum',
    ] and not tally.broken


def test_broken_bytes_in_csv(folder):
    (folder / "log.csv").write_bytes(b"user_id,item_id\nu,i\n\xff,i\nu,\x00i\nu,i,j\n,i\nu,\nv,j")
    found, tally = log(folder / "log.csv", "csv", {"user": "user_id", "item": "item_id"})
    assert [(r.user, r.item) for r in found] == [("u", "i"), ("v", "j")]
    assert tally.counts() == {
        "read": 7,
        "kept": 2,
        "broken": {
            "NUL byte": 1,
            "not UTF-8": 1,
            "wrong number of fields": 1,
        },
        "passed": {"no item": 1, "no user": 1},
    }
    assert tally.examples[0] == "log.csv:3: not UTF-8" and len(tally.examples) == 3


def test_an_empty_csv_has_no_rows(folder):
    (folder / "log.csv").write_text("user_id,item_id\n")
    assert log(folder / "log.csv", "csv", {"user": "user_id", "item": "item_id"}) == ([], Tally())


def test_broken_json_lines_are_counted_by_reason(folder):
    lines = [
        '{"user_id": "u", "item_id": "i"}',
        "{",
        "[]",
        '{"user_id": [1.5], "item_id": "i"}',
        '{"user_id": "u", "item_id": "i", "stars": 9}',
        '{"user_id": "u", "item_id": "i", "ts": "soon"}',
        '{"user_id": "\\u0000", "item_id": "i"}',
    ]
    (folder / "log.jsonl").write_text("\n".join(lines))
    found, tally = log(folder / "log.jsonl", "jsonl")
    assert len(found) == 1 and tally.read == 7
    assert tally.broken == {
        "bad JSON": 1,
        "not an object": 1,
        "user of a wrong type": 1,
        "rating outside 1..5": 1,
        "time of a wrong type": 1,
        "control characters in the user": 1,
    }


def test_parquet_types(folder):
    moment = datetime(2001, 9, 9, 1, 46, 40, tzinfo=UTC)
    table = pa.table(
        {
            "user_id": pa.array([7, None]),
            "item_id": pa.array(["i", "j"]).dictionary_encode(),
            "stars": pa.array([Decimal("4.5"), None]),
            "ts": pa.array([moment, moment], pa.timestamp("us", "UTC")),
            "comment": pa.array([None, "x"], pa.string()),
            "other": [1, 2],
        }
    )
    pq.write_table(table, folder / "log.parquet")
    found, tally = log(folder / "log.parquet", "parquet")
    assert found == [Review("7", "i", 4.5, 1_000_000_000, "")] and tally.passed == {"no user": 1}
    assert not tally.broken and not tally.examples
    (folder / "bad.parquet").write_bytes((folder / "log.parquet").read_bytes()[:-9])
    with pytest.raises(PageLLMError, match="bad.parquet cannot be read"):
        log(folder / "bad.parquet", "parquet")


def test_events_are_graded(folder):
    (folder / "log.csv").write_text(
        "user_id,item_id,event,stars\nu,i,View,\nu,j,cart,\nu,k,view,2\nu,l,,\nu,m,steal,\n"
    )
    columns = {"user": "user_id", "item": "item_id", "event": "event", "rating": "stars"}
    found, tally = log(folder / "log.csv", "csv", columns)
    assert [(r.item, r.rating) for r in found] == [("i", 1.0), ("j", 4.0), ("k", 2.0)]
    assert tally.broken == {"no event": 1, "unknown event 'steal'": 1}


def test_scale_and_split(folder):
    (folder / "log.csv").write_text(
        "user_id,item_id,stars,part\nu,i,10,Train\nu,j,0,dev\nu,k,5,\nu,l,5,extra\n"
    )
    columns = {"user": "user_id", "item": "item_id", "rating": "stars", "split": "part"}
    found, tally = log(folder / "log.csv", "csv", columns, scale=(0, 10))
    assert [(r.rating, r.split) for r in found] == [(10.0, "train"), (0.0, "valid"), (5.0, "")]
    assert tally.broken == {"unknown split": 1}
    assert {r.split for r in log(folder / "log.csv", "csv", columns, (0, 10), "test")[0]} == {
        "test"
    }


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_item_tables(folder, kind):
    paths = [["Music", "Drums"], [["Music", "Drums"], ["Toys"]], None]
    records = [
        {
            "item_id": f"i{n}",
            "name": "A &amp; B",
            "Brand": "M",
            "category": path,
            "price": 9.5,
            "about": "text",
        }
        for n, path in enumerate(paths)
    ]
    if kind == "csv":
        texts = ["Music > Drums", json.dumps(paths[1]), ""]
        out = io.StringIO()
        writer = csv.DictWriter(out, records[0])
        writer.writeheader()
        writer.writerows(
            {**record, "category": text} for record, text in zip(records, texts, strict=True)
        )
        (folder / "items.csv").write_text(out.getvalue())
    elif kind == "jsonl":
        (folder / "items.jsonl").write_text("\n".join(map(json.dumps, records)))
    else:
        records = [
            {
                **record,
                "category": record["category"] and [record["category"]]
                if n == 0
                else record["category"],
            }
            for n, record in enumerate(records)
        ]
        pq.write_table(pa.Table.from_pylist(records), folder / "items.parquet")
    columns = match(list(records[0]), ITEM_COLUMNS, {})
    assert columns == {
        "id": "item_id",
        "title": "name",
        "brand": "Brand",
        "category": "category",
        "price": "price",
        "description": "about",
    }
    tally = Tally()
    found = list(read_items(folder / f"items.{kind}", kind, columns, tally))
    assert found == [
        Item(f"i{n}", "A & B", "M", path, 9.5, "text")
        for n, path in enumerate(((("Music", "Drums"),), (("Music", "Drums"), ("Toys",)), ()))
    ]
    assert tally.read == 3 and not tally.broken


def test_an_odd_field_costs_itself_and_not_its_line(folder):
    (folder / "items.csv").write_text(
        'item_id,title,category,price\ni,Drum,"[1",five\nj,Kit,a|b,5\n'
    )
    columns = match(["item_id", "title", "category", "price"], ITEM_COLUMNS, {})
    tally = Tally()
    found = list(read_items(folder / "items.csv", "csv", columns, tally))
    assert same(found, [Item("i", "Drum"), Item("j", "Kit", paths=(("a", "b"),), price=5.0)])
    assert tally.fields == {"categories of a wrong type": 1, "price not read": 1}
    assert tally.odd["price not read"] == "five" and not tally.broken


def test_columns_are_matched_by_name_or_by_spelling():
    names = ["User-ID", "asin", "parent_asin", "Rating:float", "junk", "timestamp"]
    assert match(names, LOG_COLUMNS, {}) == {
        "user": "User-ID",
        "item": "parent_asin",
        "rating": "Rating:float",
        "time": "timestamp",
    }
    assert match(names, LOG_COLUMNS, {"item": "junk"})["item"] == "junk"
    with pytest.raises(PageLLMError, match=r"no column 'usr' for user; there are User-ID, asin"):
        match(names, LOG_COLUMNS, {"user": "usr"})
    # a spelling stands for one role, written as it is compared
    for roles in (LOG_COLUMNS, ITEM_COLUMNS):
        spellings = [s for those in roles.values() for s in those]
        assert len(set(spellings)) == len(spellings) and all(
            s.isalnum() and s.islower() for s in spellings
        )


@pytest.mark.parametrize(
    "header, mark", [("a,b;c,d", ","), ("a\tb", "\t"), ("a;b;c", ";"), ("a|b", "|")]
)
def test_delimiters(header, mark):
    assert delimiter_of(header) == mark


@few
@given(st.dictionaries(word, st.lists(word, min_size=1, max_size=4), min_size=1, max_size=4))
def test_sequences_read_back_with_their_order_as_time(folder, sequences):
    path = folder / "x.sequences.txt"
    path.write_text(
        "".join(" ".join([user, *items]) + "\n" for user, items in sequences.items()),
        encoding="utf-8",
    )
    tally, positions = Tally(), {}
    found = list(read_sequences(path, tally, positions))
    assert [(r.user, r.item, r.time) for r in found] == [
        (user, item, n) for user, items in sequences.items() for n, item in enumerate(items)
    ]
    assert all(math.isnan(r.rating) and r.text == r.split == "" for r in found)
    assert tally.read == len(sequences) and not tally.broken
    # another split's file goes on from there
    more = list(read_sequences(path, tally, positions, "test"))
    assert [r.time for r in more] == [
        len(sequences[r.user]) + f.time for r, f in zip(more, found, strict=True)
    ]
    assert {r.split for r in more} == {"test"}


def test_broken_sequences(folder):
    path = folder / "x.sequences.txt"
    path.write_text("u i j\nv\nu k\n\nw \x01 i\nx i\n")
    tally = Tally()
    assert [(r.user, r.item) for r in read_sequences(path, tally, {})] == [
        ("u", "i"),
        ("u", "j"),
        ("x", "i"),
    ]
    assert tally.broken == {
        "no item": 1,
        "user on two lines": 1,
        "empty line": 1,
        "control characters in the item": 1,
    }


def test_item_words(folder):
    (folder / "words.txt").write_text("i red &amp; big\nj\n\x01 k\n")
    tally = Tally()
    found = list(item_words(folder / "words.txt", tally))
    assert same(found, [Item("i", "red & big"), Item("j")]) and tally.broken == {
        "control characters in the item": 1
    }
