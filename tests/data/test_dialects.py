"""CSV files of thirty dialects, read by us and by three independent readers; and what a split must
not depend on: names, the order of lines, files, units of time."""

import csv
import io
import itertools
import random
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.data.logs import csv_rows
from pagellm.data.prepare import Config, run
from pagellm.data.records import Tally

NAMES = ["user id", "item", "rating", "note"]
WORDS = [
    *("a", "007", "17850.0", "12345678901234567890", "3,5", "x;y", "p|q", "t\tu", "été", "東京"),
    *("NULL", "", "-0", "1e5", 'say "so"', "a b", "0x1F", "true", "2014-05-13", "ID"),
]
MARKS, ENDS = (",", ";", "\t", "|"), ("\n", "\r\n", "\r")
# (mark, quoting, line end, byte order mark, whether the last line has an end)
DIALECTS = random.Random(0).sample(
    list(itertools.product(MARKS, (csv.QUOTE_MINIMAL, csv.QUOTE_ALL), ENDS, (0, 1), (0, 1))), 30
)


def table_of(draw: random.Random, several_lines: bool) -> list[list[str]]:
    words = [*WORDS, *(["two\nlines"] if several_lines else [])]
    return [[f"u{n}", *(draw.choice(words) for _ in NAMES[1:])] for n in range(40)]


def written(rows, mark, quoting, end, bom, closed) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=mark, quoting=quoting, lineterminator=end).writerows([NAMES, *rows])
    whole = text.getvalue() if closed else text.getvalue().removesuffix(end)
    return whole.encode("utf-8-sig" if bom else "utf-8")


def by_pyarrow(data: bytes, mark: str, end: str) -> list[list[str]]:
    table = pyarrow.csv.read_csv(
        pa.BufferReader(data),
        parse_options=pyarrow.csv.ParseOptions(delimiter=mark, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(NAMES, pa.string())),
    )
    return [list(row.values()) for row in table.to_pylist()]


def by_pandas(data: bytes, mark: str, end: str) -> list[list[str]]:
    pandas = pytest.importorskip("pandas", reason="the dev extra is not installed")
    table = pandas.read_csv(
        io.BytesIO(data), sep=mark, dtype=str, keep_default_na=False, encoding="utf-8-sig"
    )
    return table.to_numpy().tolist()


def by_polars(data: bytes, mark: str, end: str) -> list[list[str]]:
    polars = pytest.importorskip("polars", reason="the dev extra is not installed")
    if end == "\r":
        data = data.replace(b"\r", b"\n")  # it reads one byte as a line's end, and no CR
    table = polars.read_csv(data, separator=mark, infer_schema=False)
    return [["" if cell is None else cell for cell in row] for row in table.rows()]


@pytest.mark.parametrize("reader", [by_pyarrow, by_pandas, by_polars])
def test_thirty_dialects_are_read_as_independent_readers_read_them(tmp_path, reader):
    for n, dialect in enumerate(DIALECTS):
        mark, _, end, _, _ = dialect
        rows = table_of(random.Random(n), several_lines=end != "\r")
        data = written(rows, *dialect)
        (tmp_path / "x.csv").write_bytes(data)
        tally = Tally()
        ours = [list(row.values()) for _, row in csv_rows(tmp_path / "x.csv", NAMES, tally)]
        assert ours == rows, dialect
        assert ours == reader(data, mark, end), dialect
        assert tally.read == len(rows) and not tally.broken


# What a split must not depend on


@st.composite
def logs(draw):
    """Rows (user, item, seconds), each pair once; half of the logs have equal times."""
    pairs = draw(
        st.lists(
            st.tuples(st.integers(0, 4), st.integers(0, 7)), min_size=12, max_size=30, unique=True
        )
    )
    if draw(st.booleans()):
        times = draw(st.permutations(range(len(pairs))))
    else:
        times = [draw(st.integers(0, 3)) for _ in pairs]
    return [(f"u{u}", f"i{i}", 1_400_000_000 + t) for (u, i), t in zip(pairs, times, strict=True)]


def splits(folder, parts, split, time=str) -> dict[tuple[str, str], str]:
    """(user, item) -> split, of a log in several files."""
    (folder / "raw").mkdir()
    for n, rows in enumerate(parts):
        lines = [f"{u},{i},{time(t)}" for u, i, t in rows]
        (folder / "raw" / f"log-{n}.csv").write_text(
            "\n".join(["user_id,item_id,timestamp", *lines]) + "\n"
        )
    path = run(
        Config(dataset="x", raw=str(folder / "raw"), data=str(folder), k_core=1, split=split)
    )
    users, items = (
        pq.read_table(path / f"{n}.parquet")["id"].to_pylist() for n in ("users", "items")
    )
    rows = pq.read_table(path / "interactions.parquet").to_pylist()
    return {(users[r["user"]], items[r["item"]]): r["split"] for r in rows}


UNITS = (
    lambda t: t * 1000,
    lambda t: t * 10**6,
    lambda t: t * 10**9,
    lambda t: datetime.fromtimestamp(t, UTC).isoformat(),
    lambda t: f"{t}.0",
)


@settings(deadline=None, max_examples=6)
@given(logs(), st.sampled_from(["random", "temporal", "leave_one_out"]), st.randoms())
def test_lines_files_and_units_move_no_row(tmp_path_factory, rows, split, draw):
    plain = splits(tmp_path_factory.mktemp("a"), [rows], split)
    other = draw.sample(rows, len(rows))
    cut = draw.randrange(1, len(rows))
    moved = splits(
        tmp_path_factory.mktemp("b"), [other[:cut], other[cut:]], split, draw.choice(UNITS)
    )
    assert moved == plain and set(plain.values()) >= {"train"}


@settings(deadline=None, max_examples=6)
@given(logs(), st.sampled_from(["temporal", "leave_one_out"]), st.randoms())
def test_other_names_move_no_row_whose_time_decides(tmp_path_factory, rows, split, draw):
    """Ids in another order: rows at times of their own keep their split. Equal times are drawn."""
    rows = [(u, i, 1_400_000_000 + n) for n, (u, i, _) in enumerate(rows)]
    new = {}
    for kind, at in (("v", 0), ("j", 1)):
        names = sorted({row[at] for row in rows})
        new |= {name: f"{kind}{n}" for n, name in enumerate(draw.sample(names, len(names)))}
    plain = splits(tmp_path_factory.mktemp("a"), [rows], split)
    named = splits(tmp_path_factory.mktemp("b"), [[(new[u], new[i], t) for u, i, t in rows]], split)
    assert {(new[u], new[i]): part for (u, i), part in plain.items()} == named
