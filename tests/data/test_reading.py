"""Nothing is decided in silence: what prepare reads, passes over, splits and says."""

import bz2
import gzip
import io
import json
import lzma
import random
import re
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pagellm.data import logs
from pagellm.data.account import Account, share
from pagellm.data.evidence import category_form, paths_in, steady
from pagellm.data.packed import what_else
from pagellm.data.prepare import Config, run
from pagellm.data.raw import recognise
from pagellm.data.records import lines
from pagellm.data.shop import source
from pagellm.data.tables import id_list, ids_of, read_table
from pagellm.data.where import Where
from pagellm.stage.config import PageLLMError

few = settings(deadline=None, max_examples=60)
ROWS = [(f"u{u}", f"i{i}", 1 + (u + i) % 5) for u in range(6) for i in range(6)]


def folder_of(tmp_path, files):
    (tmp_path / "raw").mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "raw" / name).write_bytes(data)
    return tmp_path / "raw"


def csv_text(rows=ROWS, heading="user_id,item_id,rating", mark=","):
    heading = [heading.replace(",", mark)] if heading else []
    return "\n".join([*heading, *(mark.join(map(str, row)) for row in rows)]) + "\n"


def prepared(tmp_path, files, name="shop", **options):
    raw = folder_of(tmp_path, files)
    options = {"k_core": 1} | options
    return run(Config(dataset=name, data=str(tmp_path / "data"), raw=str(raw), **options))


def rows_of(path):
    users, items = (
        pq.read_table(path / f"{n}.parquet")["id"].to_pylist() for n in ("users", "items")
    )
    return [
        row | {"user": users[row["user"]], "item": items[row["item"]]}
        for row in pq.read_table(path / "interactions.parquet").to_pylist()
    ]


def items_of(path):
    return pq.read_table(path / "items.parquet").to_pylist()


# Packing and encoding change nothing


def zipped(path, data):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("log.csv", data)
        archive.writestr("__MACOSX/._log.csv", b"what a Mac adds")


@pytest.mark.parametrize(
    "name, write",
    [
        ("log.csv.gz", lambda p, d: p.write_bytes(gzip.compress(d))),
        ("log.csv.bz2", lambda p, d: p.write_bytes(bz2.compress(d))),
        ("log.csv.xz", lambda p, d: p.write_bytes(lzma.compress(d))),
        ("log.csv.zst", lambda p, d: p.write_bytes(pa.compress(d, "zstd", asbytes=True))),
        ("log.zip", zipped),
        ("utf16.csv", lambda p, d: p.write_bytes(d.decode().encode("utf-16"))),
        ("bare.csv", lambda p, d: p.write_bytes(d.decode().encode("utf-16-le"))),
        ("big.csv", lambda p, d: p.write_bytes(d.decode().encode("utf-16-be"))),
        ("utf32.csv", lambda p, d: p.write_bytes(d.decode().encode("utf-32"))),
        ("mark.csv", lambda p, d: p.write_bytes(b"\xef\xbb\xbf" + d)),
        ("mac.csv", lambda p, d: p.write_bytes(d.replace(b"\n", b"\r"))),
        ("windows.csv", lambda p, d: p.write_bytes(d.replace(b"\n", b"\r\n"))),
        ("excel.csv", lambda p, d: p.write_bytes(b"sep=,\n" + d)),
        ("twice.csv", lambda p, d: p.write_bytes(d + d)),
    ],
)
def test_a_log_reads_the_same_however_it_is_packed(tmp_path, name, write):
    plain = rows_of(prepared(tmp_path / "plain", {"log.csv": csv_text()}))
    folder_of(tmp_path, {})
    write(tmp_path / "raw" / name, csv_text().encode())
    assert rows_of(prepared(tmp_path, {})) == plain


def test_an_array_of_objects_is_read_as_lines(tmp_path):
    records = [{"user_id": u, "item_id": i, "note": "a [b] {c}, \\ é" * 99} for u, i, _ in ROWS]
    (tmp_path / "x.json").write_text(" [\n" + ",\n ".join(map(json.dumps, records)) + "\n]\n")
    assert [json.loads(line) for line in lines(tmp_path / "x.json")] == records
    # one that is cut short is not a smaller one
    text = (tmp_path / "x.json").read_text()
    (tmp_path / "x.json").write_text(text[: len(text) // 2])
    assert len(list(lines(tmp_path / "x.json"))[-1]) > 5
    with pytest.raises(ValueError):
        json.loads(list(lines(tmp_path / "x.json"))[-1])


def archive(kind, *names):
    """A zip or tar archive of some small files, as bytes."""
    data = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(data, "w") as file:
            for name in names:
                file.writestr(name, "user_id,item_id")
    else:
        with tarfile.open(fileobj=data, mode=f"w:{kind}") as file:
            for name in names:
                file.addfile(tarfile.TarInfo(name))
    return data.getvalue()


@pytest.mark.parametrize(
    "content, what",
    [
        (archive("zip", "a.csv", "b.csv"), r"a zip archive of 2 files \(a\.csv, b\.csv \.\.\.\)"),
        (archive("zip", "[Content_Types].xml", "xl/workbook.xml"), "an Excel or other Office file"),
        (archive("gz", "log.csv"), "a tar archive"),
        (b"ARROW1\0\0rest", "an Arrow file"),
        (b"SQLite format 3\0rest", "an SQLite database"),
        (b"\xd0\xcf\x11\xe0rest", "an old Excel or Word file"),
    ],
    ids=["zip", "office", "tar", "arrow", "sqlite", "old office"],
)
def test_a_file_that_is_not_read_is_named_for_what_it_is(tmp_path, capsys, content, what):
    """Alone it is refused by that name; beside a log it is passed over under that name."""
    with pytest.raises(PageLLMError, match=rf"no interactions .*\n +all\.x: {what}"):
        prepared(tmp_path, {"all.x": content})
    assert len(rows_of(prepared(tmp_path, {"log.csv": csv_text()}))) == 36
    assert re.search(rf"not read +all\.x \({what}", capsys.readouterr().out)


def test_one_endless_line_beside_the_log_is_no_trouble(tmp_path):
    path = prepared(tmp_path, {"log.csv": csv_text(), "notes.txt": "a,b" + "x" * 140_000})
    assert len(rows_of(path)) == 36


def test_keys_of_json_that_begin_late_are_read_or_named(tmp_path, capsys, monkeypatch):
    records = [{"user_id": u, "item_id": i} for u, i, _ in ROWS]
    records += [{"user_id": u, "item_id": i + "x", "rating": r} for u, i, r in ROWS]
    files = {"log.jsonl": "\n".join(map(json.dumps, records)) + "\n"}
    text, _ = said(tmp_path, capsys, files)
    assert "rating in 36 of 72 (50.0%)" in text and "WARNING" not in text
    monkeypatch.setattr(logs, "SAMPLE", 30)
    text, read = said(tmp_path / "few", capsys, files)
    assert "'rating' begins after the first 30 lines, is in 36 lines, and is not read" in text
    assert len(read["warnings"]) == 1


# Identifiers, times and thresholds


@settings(deadline=None, max_examples=12)  # an example prepares six shops
@given(st.lists(st.integers(0, 2**40), min_size=4, max_size=6, unique=True))
@example([0, 7, 10, 2**40])
def test_ids_are_the_same_from_every_format(tmp_path_factory, ids):
    """As CSV, JSON, integers, floats with a gap, decimals and binary: one set of users."""
    tmp_path = tmp_path_factory.mktemp("ids")
    gap = [*ids, None]
    kinds = {"i": pa.int64(), "f": pa.float64(), "d": pa.decimal128(38, 0)}
    users = {name: pa.array(gap, pa.int64()).cast(kind) for name, kind in kinds.items()}
    users["b"] = pa.array([None if n is None else str(n).encode() for n in gap], pa.binary())
    tables = {
        f"{n}.parquet": pa.table({"user_id": c, "item_id": [7] * len(c)}) for n, c in users.items()
    }
    found = []
    for name, table in tables.items():
        raw = folder_of(tmp_path / name, {})
        pq.write_table(table, raw / name)
        found.append(prepared(tmp_path / name, {}))
    text = "user_id,item_id\n" + "".join(f"{'NULL' if n is None else n},7\n" for n in gap)
    lines = [json.dumps({"user_id": n, "item_id": 7.0}) + "\n" for n in gap]
    found.append(prepared(tmp_path / "csv", {"log.csv": text}))
    found.append(prepared(tmp_path / "json", {"log.jsonl": "".join(lines)}))
    for path in found:
        assert {row["user"] for row in rows_of(path)} == {str(n) for n in ids}
        assert {row["item"] for row in rows_of(path)} == {"7"}
        assert sum(source(path)["counts"]["lines"]["passed"].values()) == 1


def test_the_last_of_many_clicks_within_a_second_is_held_out(tmp_path):
    """Item numbers fall while time rises by milliseconds: the last click is the smallest number."""
    rows = [(f"u{u}", f"i{9 - n}", 1_600_000_000_000 + n) for u in range(3) for n in range(6)]
    text = csv_text(rows, "user_id,item_id,timestamp")
    path = prepared(tmp_path, {"log.csv": text}, split="leave_one_out")
    assert {row["item"] for row in rows_of(path) if row["split"] == "test"} == {"i4"}
    assert rows_of(path)[0]["time"] == 1_600_000_000.0
    assert rows_of(path)[1]["time"] == 1_600_000_000.001


def test_the_threshold_is_on_the_shops_own_scale(tmp_path, capsys):
    """Half stars from 0.5 to 5, liked above 3: 3 itself is not, whatever it becomes on 1 to 5."""
    rows = [(f"u{n}", f"i{m}", m / 2) for n in range(3) for m in range(1, 11)]
    path = prepared(tmp_path, {"log.csv": csv_text(rows)}, rating_min=0.5, k_core=0)
    liked = {row["item"] for row in rows_of(path) if row["positive"]}
    assert liked == {f"i{m}" for m in range(7, 11)}
    assert {row["rating"] for row in rows_of(path) if row["item"] in ("i1", "i10")} == {1.0, 5.0}
    assert "on the scale 0.5..5" in capsys.readouterr().out
    rows = [(u, i, 2 * r) for u, i, r in ROWS]
    prepared(tmp_path, {"log.csv": csv_text(rows)}, "ten", rating_min=0.1, rating_max=10.0)
    assert "below its middle; --positive_above decides" in capsys.readouterr().out


def test_mixed_units_of_time_are_refused_and_decided_by_option(tmp_path):
    rows = [("u", f"i{n}", 1_600_000_000 * (1000 if n % 2 else 1)) for n in range(6)]
    files = {"log.csv": csv_text(rows, "user_id,item_id,ts")}
    with pytest.raises(PageLLMError, match=r"log\.csv: column ts .*mixes units(.|\n)*--time_form"):
        prepared(tmp_path, files)
    with pytest.raises(PageLLMError, match="3 time not in the unit|3 absurd time"):
        prepared(tmp_path, files, time_form="ms")


# What is said


def said(tmp_path, capsys, files, **options):
    path = prepared(tmp_path, files, **options)
    return capsys.readouterr().out, source(path)["read"]


def test_columns_taken_and_left_over_are_said(tmp_path, capsys):
    rows = [(u, i, r, "x") for u, i, r in ROWS]
    text, read = said(tmp_path, capsys, {"log.csv": csv_text(rows, "uid,item,movie_score,junk")})
    assert "user = uid, item = item; no rating, no time; left over: movie_score, junk" in text
    assert "every row counts as liked; columns of numbers left over: movie_score" in text
    assert read["columns"]["log.csv interactions"]["left"] == ["movie_score", "junk"]
    assert any("movie_score" in warning for warning in read["warnings"])
    assert len(text.splitlines()) <= 25


def test_files_and_folders_passed_over_are_said(tmp_path, capsys):
    (tmp_path / "raw" / "old").mkdir(parents=True)
    text, read = said(
        tmp_path, capsys, {"log.csv": csv_text(), "notes.md": "Hello.", ".x": "", "y.part": ""}
    )
    for name in ("notes.md (not known)", "old/ (a folder)", ".x (hidden", "y.part (hidden"):
        assert name in text and any(entry.startswith(name) for entry in read["passed_over"])


def test_a_part_without_heading_is_read_and_one_with_another_is_named(tmp_path, capsys):
    files = {"log-1.csv": csv_text(ROWS[:18]), "log-2.csv": csv_text(ROWS[18:], "")}
    text, read = said(tmp_path / "a", capsys, files)
    assert "log-2.csv has no heading; it is read with that of log-1.csv" in text
    assert read["rows"]["with_rating"] == 36
    files["log-2.csv"] = csv_text(ROWS[18:], "who,what,how")
    text, _ = said(tmp_path / "b", capsys, files)
    assert "WARNING    log-2.csv looks like a part of log-1.csv, but its columns (who" in text


def test_an_item_table_that_knows_nothing_is_a_warning_and_strict_stops(tmp_path, capsys):
    files = {"log.csv": csv_text(), "items.csv": "item_id,title\n0,A\n1,B\n"}
    text, _ = said(tmp_path / "a", capsys, files)
    assert "items.csv knows 0 of 6 items of the log: it has '0', the log has 'i0'" in text
    with pytest.raises(PageLLMError, match=r"items\.csv knows 0 of 6(.|\n)*--strict"):
        prepared(tmp_path / "b", files, strict=True)
    assert not (tmp_path / "b" / "data" / "shop").exists()


def test_two_columns_for_one_role_are_said(tmp_path, capsys):
    rows = [("Kim", u, i) for u, i, _ in ROWS]
    text, _ = said(tmp_path, capsys, {"log.csv": csv_text(rows, "customer,user_id,item")})
    assert "user_id is taken for the user, customer is not; --user_column decides" in text


def test_what_the_k_core_takes_away_is_said(tmp_path, capsys):
    rows = ROWS + [(f"rare{n}", "i0", 5) for n in range(20)]
    text, _ = said(tmp_path, capsys, {"log.csv": csv_text(rows)}, k_core=2)
    assert "k-core     2 liked rows each: 6 of 26 (23.1%) users" in text
    assert "leaves out 20 of 26 users; --k_core decides" in text


def test_a_file_of_titles_is_no_log_whatever_its_name(tmp_path):
    movies = "1::Toy Story (1995)::Animation|Comedy\n2::Heat (1995)::Action|Crime\n"
    rows = [(u[1:], 1 + int(i[1:]) % 2, r, 978300760) for u, i, r in ROWS]
    files = {"movies.dat": movies, "ratings.dat": csv_text(rows, "", "::")}
    folder = folder_of(tmp_path, files | {"plain.dat": "1 Toy Story\n2 Heat of the day\n"})
    for name in ("movies.dat", "plain.dat"):
        assert recognise(folder / name, Config(dataset="x")).role == ""
    with pytest.raises(
        PageLLMError, match=r"(?s)ratings\.dat: csv table without a heading.*--columns"
    ):
        prepared(tmp_path, files)
    path = prepared(
        tmp_path, files, columns="user,item,rating,time", item_columns="item,title,genres"
    )
    assert [item["title"] for item in items_of(path)] == ["Toy Story (1995)", "Heat (1995)"]
    assert len(rows_of(path)) == 12


# Categories, a log as its own catalogue, filters


@pytest.mark.parametrize(
    "cells, form, mark",
    [
        (["Action|Drama", "Comedy|Drama", "Drama", "Action|Comedy"], "set", "|"),
        (["Music|Drums", "Music|Horns", "Music|Drums|Snares"], "path", "|"),
        (["Music > Drums", "Toys > Cars"], "path", ">"),
        (["Food, Tea", "Tea, Shops", "Food, Shops"], "set", ", "),
        (["Home, Garden & Pets", "Toys"], "path", ""),
        (["['b', 'a']", "['a', 'c']", "['c', 'b']"], "set", ""),
        ([12, 13.0], "path", ""),
        ([], "path", ""),
    ],
)
def test_the_form_of_categories_is_told_by_evidence(cells, form, mark):
    assert category_form(cells) == (form, mark)


def test_one_cell_in_every_spelling():
    for cell in (["a", "b"], '["a", "b"]', "['a', 'b']", "a|b", ("a", "b")):
        assert paths_in(cell, "path", "|") == (("a", "b"),)
        assert paths_in(cell, "set", "|") == (("a",), ("b",))
    assert paths_in(12, "path", "") == paths_in("12", "path", "") == paths_in(12.0, "path", "")
    assert paths_in("a > b | c", "path", ">") == (("a", "b"), ("c",))
    assert paths_in("\\N", "path", "") == paths_in(None, "set", "|") == ()


def test_order_lines_are_log_and_catalogue_in_one(tmp_path):
    """Titles by majority, the middle price; the order of lines moves nothing."""
    rows = [(u, i, f"Thing {i[1:]}", 10 + int(u[1:])) for u, i, _ in ROWS]
    rows += [("NULL", "i0", "damaged", 0), ("u9", "i0", "?", 1)]
    heading, found = "CustomerID,StockCode,Description,UnitPrice", []
    for seed in (0, 1):
        random.Random(seed).shuffle(rows)
        path = prepared(tmp_path / str(seed), {"orders.csv": csv_text(rows, heading)})
        found.append(items_of(path))
        assert [item["title"] for item in found[-1]] == [f"Thing {n}" for n in range(6)]
    assert found[0] == found[1] and found[0][1]["price"] == 13


def test_titles_of_reviews_are_not_those_of_items():
    rng = random.Random(0)
    items = [f"i{n % 5}" for n in range(50)]
    assert not steady(items, [f"review {rng.random()}" for _ in items])
    assert steady(items, [f"Thing {item}" for item in items])


@few
@given(st.integers(-9, 9), st.sampled_from([">", ">=", "<", "<=", "==", "!="]), st.integers(-9, 9))
def test_conditions_compare_numbers_as_numbers(cell, sign, value):
    where = Where.parse(f"n {sign} {value}")
    expected = {
        **{">": cell > value, ">=": cell >= value, "<": cell < value},
        **{"<=": cell <= value, "==": cell == value, "!=": cell != value},
    }[sign]
    for written in (cell, str(cell), f"{cell}.0", float(cell)):
        assert where.keeps({"n": written}) == expected


def test_conditions_of_words():
    where = Where.parse("status != cancelled and country in (UK, 'New Zealand') or vip = true")
    assert where.columns == ["status", "country", "vip"]
    assert where.keeps({"status": "ok", "country": "New Zealand", "vip": "false"})
    assert where.keeps({"status": "cancelled", "country": "UK", "vip": True})
    assert not where.keeps({"status": "cancelled", "country": "UK", "vip": None})
    assert not Where.parse("n > 3").keeps({"n": "many"}) and Where.parse("").keeps({})


@pytest.mark.parametrize(
    "text", ["n >", "n 3", "> 3", "n > 3 and", "(n > 3)", "__import__('os')", "n in ()", "n > 'x"]
)
def test_what_is_no_condition_is_refused(text):
    with pytest.raises(PageLLMError, match="--where"):
        Where.parse(text)


def test_rows_that_a_filter_excludes_are_counted(tmp_path, capsys):
    path = prepared(tmp_path, {"log.csv": csv_text()}, where="rating > 1")
    assert source(path)["counts"]["lines"]["passed"] == {"not rating > 1": 8}
    assert "not rating > 1" in capsys.readouterr().out
    with pytest.raises(PageLLMError, match=r"log\.csv: no column 'colour'; there are user_id"):
        prepared(tmp_path, {}, "other", where="colour == red")


# The same ids in the tables that users hand to a command


@pytest.mark.parametrize("form", ["csv", "tsv", "csv.gz", "jsonl", "parquet"])
def test_small_tables_give_ids_as_text(tmp_path, form):
    path = tmp_path / f"x.{form}"
    if form == "parquet":
        pq.write_table(pa.table({"user": ["007", "7"], "arm": [True, False], "n": [1, 2]}), path)
    elif form == "jsonl":
        path.write_text(
            '{"user": "007", "arm": true, "n": 1}\n{"user": "7", "arm": false, "n": 2}\n'
        )
    else:
        mark = "\t" if form == "tsv" else ","
        text = "user,arm,n\n007,true,1\n7,false,2\n".replace(",", mark).encode()
        path.write_bytes(gzip.compress(text) if form.endswith("gz") else text)
    table = read_table(path, ("user", "arm"))
    assert ids_of(table, "user", path) == ["007", "7"]
    assert ids_of(table, "arm", path) == ["true", "false"]
    assert table["n"].to_pylist() == [1, 2]


def test_rows_of_nobody_are_refused_by_column(tmp_path):
    (tmp_path / "x.csv").write_text("user,n\nNULL,1\nu,2\n")
    with pytest.raises(PageLLMError, match="column user is empty in 1 line;"):
        ids_of(read_table(tmp_path / "x.csv", ("user",)), "user", tmp_path / "x.csv")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_a_list_of_ids_in_a_file_or_in_an_option(tmp_path, encoding):
    (tmp_path / "ids.txt").write_bytes("B1\r\nred, large\r\n\r\n17850.0\n".encode(encoding))
    ids = ("B1", "red, large", "17850")
    assert id_list(f"@{tmp_path / 'ids.txt'}", "exclude") == ids
    assert id_list('B1, "red, large",17850') == ids
    assert id_list("") == ()
    with pytest.raises(PageLLMError, match="--exclude @.*none: cannot be read"):
        id_list(f"@{tmp_path / 'none'}", "exclude")
    with pytest.raises(PageLLMError, match=r"--exclude .*one id a line"):
        (tmp_path / "odd").write_bytes(b"\xff\xf0\n")
        id_list(f"@{tmp_path / 'odd'}", "exclude")


def test_small_tables_below_a_line_that_names_the_mark(tmp_path):
    (tmp_path / "x.csv").write_text('sep=;\nuser;n\n007;1\n"a\nb";2\n')
    assert read_table(tmp_path / "x.csv", ("user",))["user"].to_pylist() == ["007", "a\nb"]


def test_a_column_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("user,n,n\nu,1,2\n")
    with pytest.raises(PageLLMError, match="column n stands there twice"):
        read_table(tmp_path / "x.csv", ("user",))


@pytest.mark.parametrize("ids", [["2019-11-24", "2019-11-25"], [2**60 + 1, 7]])
def test_ids_of_json_are_as_they_were_written(tmp_path, ids):
    rows = [json.dumps({"user": name, "n": 1.5}) + "\n" for name in ids]
    (tmp_path / "x.jsonl").write_text("".join(rows))
    table = read_table(tmp_path / "x.jsonl", ("user", "arm"))
    assert table.column_names == ["user", "n"]
    assert ids_of(table, "user", "x") == list(map(str, ids))


# What the account says of a shop


def test_ids_written_in_several_ways_are_said(tmp_path, capsys):
    rows = [*ROWS, ("0u1", "i0", 5), ("u2 ", "i0", 5)]
    text, read = said(tmp_path, capsys, {"log.csv": csv_text(rows)})
    assert "WARNING    2 users are written in several ways, such as '0u1' and 'u1'" in text
    assert read["users_written_in_several_ways"] == 2
    rows = [*ROWS, ("U1", "i0", 5)]  # capitals often tell users apart: said, and no warning
    text, read = said(tmp_path / "b", capsys, {"log.csv": csv_text(rows)})
    assert "1 user is written in several ways, such as 'U1' and 'u1'" in text
    assert not read["warnings"]


def test_ids_that_may_stand_for_none_are_said_and_kept(tmp_path, capsys):
    rows = [*ROWS, ("N/A", "i0", 5), ("undefined", "i0", 5), ("undefined", "i1", 5)]
    text, read = said(tmp_path, capsys, {"log.csv": csv_text(rows)})
    assert "users named 'N/A', 'undefined' have 3 rows; if they stand for none" in text
    assert read["users_that_may_be_none"] == ["N/A", "undefined"] and not read["warnings"]


def test_lines_of_an_item_table_without_an_item_are_counted(tmp_path, capsys):
    table = "item_id,title\ni0,A\nNULL,B\n,C\n"
    text, _ = said(tmp_path, capsys, {"log.csv": csv_text(), "items.csv": table})
    assert "lines left out: 1 no item (written NULL); 1 no item" in text


@pytest.mark.parametrize(
    "rows, hint",
    [
        ([(u, i, r + 5) for u, i, r in ROWS], "--rating_min and --rating_max"),
        ([(u, i, "good") for u, i, _ in ROWS], "--event_values"),
        ([("é", "i0", 3), *ROWS], "Write the file in UTF-8"),
    ],
)
def test_what_to_do_about_broken_lines_is_said(tmp_path, rows, hint):
    with pytest.raises(PageLLMError, match=hint):
        prepared(tmp_path, {"log.csv": csv_text(rows).encode("latin-1")})


def test_tuples_and_sets_as_python_writes_them_are_categories():
    assert paths_in("('X', 'Y')", "path", "") == (("X", "Y"),)
    assert paths_in("{'B', 'A'}", "set", "") == (("A",), ("B",))
    assert paths_in("(no genres listed)", "path", "|") == (("(no genres listed)",),)
    assert paths_in("('X', open('y'))", "path", "") == (("('X', open('y'))",),)


def test_ratings_with_a_comma_are_ratings(tmp_path):
    rows = [(u, i, f"{r - 0.5}".replace(".", ",")) for u, i, r in ROWS if r > 1]
    path = prepared(tmp_path, {"log.csv": csv_text(rows, mark=";")})
    assert {row["rating"] for row in rows_of(path)} == {1.5, 2.5, 3.5, 4.5}


def test_what_is_known_of_items_is_counted(tmp_path, capsys):
    table = "item_id,title,price\ni0,A,2.5\ni1,,40\ni2,C,\ni0,Again,9\n"
    text, read = said(tmp_path, capsys, {"log.csv": csv_text(), "items.csv": table})
    assert "known of 6 items: title 2, brand 0, category 0, price 2, description 0" in text
    assert "prices from 2.5 to 40" in text and "no brand, no category, no description" in text
    assert "1 further lines of items.csv are about items that had one already" in text
    assert read["items"]["with"]["title"] == 2 and read["items"]["prices"] == [2.5, 40.0]


def test_times_without_a_clock_and_reviews_are_counted(tmp_path, capsys):
    heading, day = "user_id,item_id,rating,date,text", "2014-05-1{}"
    rows = [
        (u, i, r, day.format(n % 5), "fine" if n < 9 else "") for n, (u, i, r) in enumerate(ROWS)
    ]
    text, read = said(tmp_path, capsys, {"log.csv": csv_text(rows, heading)})
    assert "2014-05-10 to 2014-05-14, whole days; review text in 9 of 36 (25.0%)" in text
    assert read["rows"]["with_text"] == 9


def test_a_lost_part_and_a_file_broken_off_are_said(tmp_path, capsys):
    parts = {f"log-0{n}.csv": csv_text(ROWS[9 * n : 9 * n + 9]) for n in (0, 1, 3)}
    parts["log-03.csv"] = parts["log-03.csv"].rstrip("\n")
    text, _ = said(tmp_path, capsys, parts)
    assert "are numbered 0 to 3, and number 2 is not there" in text
    assert "the last line of log-03.csv has no end" in text
    days = {f"log-201401{n}.csv": csv_text(ROWS[:9]) for n in (30, 31)}
    days |= {f"log-201402{n}.csv": csv_text(ROWS[9:]) for n in ("01", "02")}
    assert "is not there" not in said(tmp_path / "b", capsys, days)[0]


def test_a_column_that_stands_twice_is_said(tmp_path, capsys):
    rows = [(u, i, r, 1) for u, i, r in ROWS]
    log = csv_text(rows, "user_id,item_id,rating,rating")
    text, read = said(tmp_path, capsys, {"log.csv": log})
    assert "column rating stands there twice; the first is read" in text and read["warnings"]


def test_a_split_by_time_names_the_columns_left_over(tmp_path):
    rows = [(u, i, 7) for u, i, _ in ROWS]
    with pytest.raises(
        PageLLMError, match=r"(?s)log\.csv has no column of times.*left over: seen_at"
    ):
        files = {"log.csv": csv_text(rows, "user_id,item_id,seen_at")}
        prepared(tmp_path, files, split="leave_one_out")


def test_shares_are_whole_only_where_all_are_meant():
    assert share(9_999, 10_000) == "9,999 of 10,000 (99.9%)"
    assert share(1, 10_000) == "1 of 10,000 (0.1%)"
    assert share(3, 3) == "3 of 3 (100.0%)" and share(0, 3) == "0 of 3 (0.0%)"
    assert share(0, 0) == "0 of 0"


def test_a_condition_may_spell_a_column_in_its_own_way():
    where = Where.parse("unit_price > 0 and user == 007")
    assert where.of(["Unit Price", "user"]).columns == ["Unit Price", "user"]
    assert where.of(["Unit Price", "unitprice", "user"]).columns == ["unit_price", "user"]
    assert where.keeps({"unit_price": "2", "user": "007"})
    assert not where.keeps({"unit_price": "2", "user": "7"})
    ids = Where.parse("user == 9007199254740993")
    assert ids.keeps({"user": 9007199254740993}) and not ids.keeps({"user": "9007199254740992"})


def test_a_first_prepare_says_all_in_25_lines(tmp_path, capsys):
    """Of a shop where much goes wrong: broken lines, files passed over, odd ids, near misses."""
    heading = "user_id,user,item_id,product,score,date,timestamp,item_price,genre,name,comment"
    row = "{u},x{u},{i},p{i},{r},2020-01-0{r},1577836800,1.5,a|b,N {i},fine"
    rows = [row.format(u=u, i=i, r=r) for u, i, r in [*ROWS * 9, ("N/A", "rare", 5)]]
    files = {"log-0.csv": "\n".join([heading, *rows, "broken", "too", "short"])}
    files |= {"log-2.csv": "\n".join([heading, *rows, *["x,y"] * 3]), "log-4.csv": "a,b\n1,2\n"}
    files |= {"u.bin": b"7z\xbc\xaf", "notes.md": "hello", "empty.csv": ""}
    items = "item_id,title,brand,price,cost,categories,genres\n"
    items += "".join(f"i{n},T,NULL,cheap,2,{{}},x\n" for n in range(5)) + "i5,T\ni0,U,B,1,2,c,d\n"
    text, _ = said(tmp_path, capsys, files | {"items.csv": items}, max_broken=0.5, k_core=2)
    lines = text.splitlines()
    assert len(lines) <= 25, text
    assert "broken" in lines[0] and "dropped.parquet: 1 row of 1 user and 1 item" in lines[-1]
    for word in ("WARNING", "not read", "left over", "k-core", "more lines: see `read`"):
        assert word in text


def test_an_account_is_short_and_says_what_it_leaves_out():
    account = Account([f"line {n}" for n in range(40)], ["mind this"])
    assert len(account.text(before=6).splitlines()) == 17
    lines = account.text().splitlines()
    assert len(lines) == 23 and lines[-1].split() == ["WARNING", "mind", "this"]
    assert "and 19 more lines" in lines[-2] and lines[20] == "line 20"
    assert Account(["a"], []).text() == "a"


def test_a_heading_that_begins_as_an_orc_file_does_is_a_heading(tmp_path):
    path = tmp_path / "log"
    for start, said in ((b"ORCID,item_id\na,b\n", ""), (b"ORC\n\x06\x12\x04", "an ORC file")):
        path.write_bytes(start)
        assert what_else(path).startswith(said) and bool(what_else(path)) == bool(said)


def test_a_log_that_lacks_one_of_two_columns_is_told_which_it_may_be(tmp_path):
    """The item column is the one that log and item table share, here as X-Wines has them."""
    (tmp_path / "ratings.csv").write_text("RatingID,UserID,WineID,Rating\n1,a,7,5\n2,b,8,4\n")
    (tmp_path / "wines.csv").write_text("WineID,WineName,Type\n7,Red,dry\n8,White,sweet\n")
    with pytest.raises(PageLLMError) as told:
        run(Config(dataset="wines", raw=str(tmp_path), data=str(tmp_path / "data")))
    assert "ratings.csv: UserID is its user column" in str(told.value)
    assert "perhaps --item_column WineID\n" in str(told.value) and "Rating" in str(told.value)
    (tmp_path / "wines.csv").unlink()
    (tmp_path / "ratings.csv").write_text("colour,client_code,product_id\nred,a,7\n")
    with pytest.raises(PageLLMError, match="perhaps --user_column client_code\n"):
        run(Config(dataset="wines", raw=str(tmp_path), data=str(tmp_path / "data")))
    (tmp_path / "ratings.csv").write_text("colour,size\nred,7\n")
    with pytest.raises(PageLLMError) as told:
        run(Config(dataset="wines", raw=str(tmp_path), data=str(tmp_path / "data")))
    assert "perhaps" not in str(told.value)
