"""The same data set by every engine, byte by byte, and logs that are read many rows at once."""

import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.data import engines, logs, text_store
from pagellm.data.files import Options
from pagellm.data.prepare import Config, run
from pagellm.data.raw import find
from pagellm.data.records import COLUMNS, Tally
from pagellm.stage.config import PageLLMError


@pytest.fixture
def engine():
    """The engine of this file; tests/data/test_spark.py runs some of its tests by Spark."""
    pytest.importorskip("duckdb", reason="needs the extra [duckdb]")
    return "duckdb"


def log(rows=3000, users=60, items=40, seed=0, **more):
    """A log with repeated pairs, equal times, unknown ratings and times, and ids out of order."""
    draw = np.random.default_rng(seed)
    user, item = draw.integers(0, users, rows), draw.integers(0, items, rows) ** 2 // items
    rating = draw.integers(1, 6, rows).astype(float)
    time = 1_400_000_000 + 86_400 * draw.integers(0, 30, rows)
    return pa.table(
        {
            "user_id": [f"u{n * 7919 % 101}" if n else "ü n" for n in user],
            "item_id": [f"I{n * 31 % 47}" for n in item],
            "rating": pa.array(rating, mask=draw.random(rows) < 0.1),
            "timestamp": pa.array(time, mask=draw.random(rows) < 0.05),
            **{name: make(draw, rows) for name, make in more.items()},
        }
    )


def texts(draw, rows):
    return [f"text {n}" if n % 3 else "" for n in draw.integers(0, 50, rows)]


def events(draw, rows):
    return draw.choice(["view", "click", "cart", "purchase"], rows).tolist()


def splits(draw, rows):
    return draw.choice(["train", "valid", "test", ""], rows, p=[0.7, 0.1, 0.1, 0.1]).tolist()


def fractions(draw, rows):
    return 1_400_000_000 + draw.integers(0, 400_000, rows) / 4


CASES = {
    "random": (log(), {}),
    "temporal": (log(seed=1), {"split": "temporal", "seed": 5}),
    "leave_one_out": (log(seed=2), {"split": "leave_one_out", "refit": True}),
    "texts": (log(seed=3, review=texts), {"split": "temporal"}),
    "events": (
        log(seed=4, event=events).drop_columns(["rating"]),
        {"k_core": 3, "positive_above": 1.5},
    ),
    "given": (log(seed=5, split=splits), {"split": "given"}),
    "scale": (log(seed=6), {"rating_max": 10.0, "positive_above": 2.0, "rating_min": 0.0}),
    "fractions": (
        log(seed=7, at=fractions).drop_columns(["timestamp"]),
        {"split": "temporal", "time_column": "at"},
    ),
    "thin core": (log(rows=900, seed=8), {"k_core": 6, "positive_above": 2.0}),
    "repeats": (
        log(seed=11, review=texts).drop_columns(["rating"]),
        {"repeat": True, "split": "temporal"},
    ),
    "repeats without times": (
        log(seed=12).drop_columns(["rating", "timestamp"]),
        {"repeat": True, "k_core": 3},
    ),
    "no core": (log(rows=300, seed=9), {"k_core": 0}),
}


def prepared(tmp_path, table, options, engine, processes=1):
    raw = tmp_path / "raw"
    if not raw.exists():
        raw.mkdir()
        half = len(table) // 2
        pq.write_table(table[:half], raw / "log-0.parquet")
        pq.write_table(table[half:], raw / "log-1.parquet")
    more = {} if engine == "memory" else {"processes": processes, "memory": "2GB"}
    config = Config(
        dataset="shop",
        raw=str(raw),
        data=str(tmp_path / engine),
        engine=engine,
        **(options | more),
    )
    return run(config)


@pytest.mark.parametrize("case", CASES)
def test_every_engine_writes_the_same_bytes(tmp_path, engine, case):
    """Table by table, then file by file: interactions, users, items, dropped, reviews, source."""
    check_same(tmp_path, engine, case)


def check_same(tmp_path, engine, case, processes=1):
    table, options = CASES[case]
    mine = prepared(tmp_path, table, options, "memory")
    theirs = prepared(tmp_path, table, options, engine, processes)
    assert sorted(p.name for p in mine.iterdir()) == sorted(p.name for p in theirs.iterdir())
    for path in sorted(mine.glob("*.parquet")):
        assert pq.read_table(path).equals(pq.read_table(theirs / path.name)), path.name
    one, other = (json.loads((folder / "source.json").read_text()) for folder in (mine, theirs))
    assert one == other
    for path in sorted(mine.iterdir()):
        assert path.read_bytes() == (theirs / path.name).read_bytes(), path.name
    if case == "thin core":
        assert one["counts"]["k_core"][0] != one["counts"]["k_core"][-1]
        assert (mine / "dropped.parquet").exists()
    if case == "texts":
        assert one["counts"]["reviews"] > 0


def test_several_processes_and_row_groups_change_nothing(tmp_path, monkeypatch):
    """Two threads, two parts that are read apart, and rows written a few at a time."""
    pytest.importorskip("duckdb", reason="needs the extra [duckdb]")
    monkeypatch.setattr(engines, "BATCH", 7)
    monkeypatch.setattr(text_store, "SPOOLED", 100)
    table, options = CASES["texts"]
    mine = prepared(tmp_path, table, options, "memory")
    theirs = prepared(tmp_path, table, options, "duckdb", processes=2)
    for path in sorted(mine.iterdir()):
        assert path.read_bytes() == (theirs / path.name).read_bytes(), path.name


def test_the_same_data_are_already_there_whoever_made_them(tmp_path, capsys):
    pytest.importorskip("duckdb", reason="needs the extra [duckdb]")
    table, options = CASES["random"]
    folder = prepared(tmp_path, table, options, "duckdb")
    assert not list(folder.glob("engine*")) and not list(folder.glob("part-*"))
    config = Config(dataset="shop", raw=str(tmp_path / "raw"), data=str(folder.parent), **options)
    run(config)
    assert "is already prepared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"k_core": 500}, "none is left of"),
        ({"split": "temporal", "time_column": "nothing"}, "no row has one"),
    ],
)
def test_errors_are_those_of_the_path_in_memory(tmp_path, engine, options, wanted):
    table = CASES["random"][0].append_column("nothing", pa.array([None] * 3000, pa.int64()))
    said = set()
    for name in ("memory", engine):
        with pytest.raises(PageLLMError, match=wanted) as caught:
            prepared(tmp_path, table, options, name)
        said.add(str(caught.value))
        assert not (tmp_path / name / "shop").exists()
    assert len(said) == 1


@pytest.mark.parametrize("name", ["duckdb", "spark"])
def test_an_engine_that_is_not_installed_says_how_to_get_it(tmp_path, monkeypatch, name):
    package = {"spark": "pyspark.sql"}.get(name, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PageLLMError, match=rf"pip install 'pagellm\[{name}\]'"):
        engines.opened(name, tmp_path / "engine", "", 1, "")


@pytest.mark.parametrize(
    "wrong",
    [
        {"engine": "sqlite"},
        {"engine": "duckdb", "dataset": "synthetic"},
        {"engine": "duckdb", "thin_users": 10},
        {"engine": "duckdb", "memory": "much"},
        {"memory": "4GB"},
        {"engine": "duckdb", "spark_master": "yarn"},
    ],
)
def test_options_that_do_not_go_together_are_refused(wrong):
    with pytest.raises(PageLLMError, match="want"):
        Config(**({"dataset": "shop"} | wrong))


CELLS = {
    "user": st.sampled_from(["a", "b7", "null", "1.0", "ü", "x y", "", "NaN", "a\x01", "z" * 300]),
    "plain": st.sampled_from(["a", "b7", "007", "1.05", "<x>"]),
    "number": st.integers(-5, 10**12),
    "rating": st.one_of(st.none(), st.sampled_from([1.0, 2.5, 5.0])),
    "broken": st.one_of(st.none(), st.sampled_from([0.0, 1.0, 6.0, float("nan"), float("inf")])),
    "time": st.one_of(st.none(), st.integers(0, 2_000_000_000)),
    "odd": st.one_of(st.none(), st.integers(-10, 5_000_000_000)),
}


@settings(max_examples=150)
@given(
    user=st.sampled_from(["user", "plain", "number"]),
    rating=st.sampled_from(["rating", "broken"]),
    time=st.sampled_from(["time", "odd"]),
    unit=st.sampled_from([1, 1000, 10**6, 10**9]),
    data=st.data(),
)
def test_many_rows_at_once_are_read_as_one_by_one(tmp_path_factory, user, rating, time, unit, data):
    """A batch of plain rows gives what its rows give; any other batch is left to be read by row."""
    n = data.draw(st.integers(1, 6))
    column = {
        name: data.draw(st.lists(CELLS[kind], min_size=n, max_size=n))
        for name, kind in {"user_id": user, "item_id": "plain", "rating": rating, "t": time}.items()
    }
    column["t"] = [None if value is None else value * unit for value in column["t"]]
    folder = tmp_path_factory.mktemp("log")
    kinds = {"user_id": pa.int64() if user == "number" else pa.string(), "rating": pa.float64()}
    kinds["t"] = pa.int64()
    pq.write_table(
        pa.table({k: pa.array(v, kinds.get(k)) for k, v in column.items()}),
        folder / "log.parquet",
    )
    form = {1: "s", 1000: "ms", 10**6: "us", 10**9: "ns"}[unit]
    options = Options(dataset="x", raw=str(folder), time_column="t", time_form=form)
    (file,) = find(options).review_files
    make = logs.reader(file, {}, (1.0, 5.0), logs.Where.parse(""))
    slow_tally, tally = Tally(), Tally()
    slow = [
        review._asdict()
        for review in logs.log_rows(file, slow_tally, {}, (1.0, 5.0), logs.Where.parse(""))
    ]
    found = pa.concat_tables(
        [COLUMNS.empty_table(), *logs.reviews([file], options, tally)]
    ).to_pylist()
    assert repr(found) == repr(slow)
    assert tally == slow_tally
    many = make.many(pq.read_table(folder / "log.parquet").to_batches()[0])
    plain = user != "user" and (rating, time) == ("rating", "time")
    assert not plain or many is not None or unit == 10**9 or 0 < min_time(column["t"]) < 1e8 * unit


def min_time(values):
    return min([v for v in values if v], default=0)


def test_what_was_bought_often_is_rated_higher_by_every_engine(tmp_path, engine):
    """By the log itself: 5 less one by the days on which a person bought a thing."""
    table = log(seed=13).drop_columns(["rating"])
    days = {}
    for row in table.to_pylist():
        pair = days.setdefault((row["user_id"], row["item_id"]), [])
        pair += [row["timestamp"]] if row["timestamp"] else [f"row {len(pair)}"]
    for name in ("memory", engine):
        folder = prepared(tmp_path, table, {"repeat": True}, name)
        rows = pq.read_table(folder / "interactions.parquet").to_pylist()
        ids = {
            of: pq.read_table(folder / f"{of}s.parquet")["id"].to_pylist()
            for of in ("user", "item")
        }
        told = {(ids["user"][r["user"]], ids["item"][r["item"]]): r["rating"] for r in rows}
        assert len(told) > 500 and all(row["positive"] for row in rows)
        assert all(abs(5 - 1 / len({*days[pair]}) - had) < 1e-6 for pair, had in told.items())
        noted = json.loads((folder / "source.json").read_text())
        often = [len({*times}) for times in days.values()]
        assert noted["counts"]["repeated"] == {
            "pairs": sum(n > 1 for n in often),
            "most": max(often),
        }


def test_a_log_with_ratings_is_not_rated_by_repeats(tmp_path, engine):
    for name in ("memory", engine):
        with pytest.raises(PageLLMError, match="already how much it is liked"):
            prepared(tmp_path, log(), {"repeat": True}, name)
