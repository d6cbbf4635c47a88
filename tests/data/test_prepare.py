"""From raw files to data/<dataset>: what is written, what is refused, and that nothing leaks."""

import gzip
import json
import math
import os
import random
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.data import download, prepare
from pagellm.data.prepare import Config, catalogue, run
from pagellm.data.records import Item
from pagellm.data.shop import load, source
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
MARKER = "xyzzymarker"


def review(user, item, rating=5.0, time=86_400, text="", **more):
    return {
        "reviewerID": user,
        "asin": item,
        "overall": rating,
        "unixReviewTime": time,
        "reviewText": text,
        "verified": True,
        **more,
    }


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records),
        encoding="utf-8",
    )
    return path


def dense(users=8, items=9):
    """Everybody rates everything; u3 and everybody's item 2 are disliked here and there."""
    return [
        review(
            f"u{u}",
            f"i{i}",
            rating=2.0 if (u + i) % 4 == 2 else 4.0 + (u + i) % 2,
            time=86_400 * (1 + i * 7 % 5),
            text=f"text {u} {i}",
            summary=f"sum &amp; {u}",
        )
        for u in range(users)
        for i in range(items)
    ]


def prepared(tmp_path, records, name="shop", **options):
    write_lines(tmp_path / "raw" / name / "reviews_5.json", records)
    return run(Config(dataset=name, data=str(tmp_path), **options))


def table(path, name="interactions"):
    return pq.read_table(path / f"{name}.parquet").to_pylist()


def artefacts(path):
    """Every value that any file of a data set holds, as text."""
    for file in sorted(path.rglob("*")):
        if file.suffix == ".parquet":
            yield file.name, repr(pq.read_table(file).to_pydict()) + str(pq.read_schema(file))
        elif file.suffix == ".npy":
            yield file.name, repr(np.load(file).tolist())
        else:
            yield file.name, file.read_text()


# What is written


def test_schema_and_order(tmp_path):
    path = prepared(tmp_path, dense())
    schema = pq.read_schema(path / "interactions.parquet")
    assert [(field.name, str(field.type)) for field in schema] == [
        ("user", "int32"),
        ("item", "int32"),
        ("rating", "float"),
        ("time", "int64"),
        ("positive", "bool"),
        ("split", "dictionary<values=string, indices=int32, ordered=0>"),
    ]
    rows = table(path)
    assert rows == sorted(rows, key=lambda row: (row["user"], row["time"]))
    # on one day the order is a draw, not that of the item numbers
    assert rows != sorted(rows, key=lambda row: (row["user"], row["time"], row["item"]))
    assert len({(row["user"], row["item"]) for row in rows}) == len(rows) == 72
    assert all(row["positive"] == (row["rating"] > 3) for row in rows)
    assert [(row["user"], row["id"]) for row in table(path, "users")] == [
        (n, f"u{n}") for n in range(8)
    ]
    assert [(row["item"], row["id"]) for row in table(path, "items")] == [
        (n, f"i{n}") for n in range(9)
    ]
    assert [(field.name, str(field.type)) for field in pq.read_schema(path / "items.parquet")] == [
        ("item", "int32"),
        ("id", "string"),
        ("title", "string"),
        ("brand", "string"),
        ("categories", "list<element: string>"),
        ("leaf", "string"),
        ("price", "float"),
        ("description", "string"),
    ]
    assert not [file for file in path.parent.iterdir() if file.name not in ("raw", "shop")]
    assert sorted(os.listdir(path)) == [
        "interactions.parquet",
        "items.parquet",
        "reviews.parquet",
        "source.json",
        "users.parquet",
    ]


def test_reviews_are_of_train_rows_in_their_order(tmp_path):
    path = prepared(tmp_path, dense())
    train = [row for row in table(path) if row["split"] == "train"]
    assert table(path, "reviews") == [
        {
            "user": row["user"],
            "item": row["item"],
            "text": f"sum & {row['user']}\ntext {row['user']} {row['item']}",
        }
        for row in train
    ]
    assert any(not row["positive"] for row in train)


@pytest.mark.parametrize("split", ["random", "temporal", "leave_one_out"])
def test_nothing_of_held_out_rows_is_in_any_file(tmp_path, split):
    """The split does not depend on texts, so held-out texts can be marked and looked for."""
    rows = table(prepared(tmp_path / "plain", dense(), split=split))
    held_out = {(f"u{row['user']}", f"i{row['item']}") for row in rows if row["split"] != "train"}
    assert held_out
    marked = [
        {**r, "reviewText": MARKER, "summary": MARKER}
        if (r["reviewerID"], r["asin"]) in held_out
        else r
        for r in dense()
    ]
    path = prepared(tmp_path / "marked", marked, split=split)
    assert table(path) == rows
    assert not [name for name, text in artefacts(path) if MARKER in text]
    everything = [{**r, "reviewText": MARKER} for r in dense()]
    path = prepared(tmp_path / "all", everything, split=split)
    assert [name for name, text in artefacts(path) if MARKER in text] == ["reviews.parquet"]


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 99), st.sampled_from(["random", "temporal"]))
def test_the_order_of_lines_moves_no_byte(tmp_path_factory, seed, split):
    records = dense() + [
        review("u1", "i1", 1.0, 86_400 * 9, "later"),
        review("u1", "i1", 1.0, 86_400 * 9, "latest"),
        review("u2", "i2", None, None, "undated"),
    ]
    results = []
    for order in (records, random.Random(seed).sample(records, len(records))):
        path = prepared(tmp_path_factory.mktemp("order"), order, split=split, seed=seed)
        results.append(
            [
                (path / f"{name}.parquet").read_bytes()
                for name in ("interactions", "items", "users", "reviews")
            ]
        )
    assert results[0] == results[1]


def test_thinning_leaves_the_users_asked_for_whatever_the_order_of_lines(tmp_path, capsys):
    """Rows are left out at random, then the k-core is taken.

    About as many users stay as were asked for: the same each time, others with another seed.
    """
    rng = random.Random(0)
    records = [review(f"u{u}", f"i{i}") for u in range(60) for i in rng.sample(range(25), 9)]
    full = table(prepared(tmp_path / "full", records, k_core=4))
    path = prepared(tmp_path / "a", records, k_core=4, thin_users=45)
    counts = source(path)["counts"]
    assert abs(counts["users"] - 45) <= 2 and counts["thinned"]["left_out"] + counts["thinned"][
        "kept"
    ] == len(records)
    assert (
        f"thinned at random to {counts['thinned']['kept']} of 540 rows for 45 users"
        in capsys.readouterr().out
    )
    names = [{(u, i) for u, i in pairs_of(p)} for p in (tmp_path / "full" / "shop", path)]
    assert names[1] < names[0] and len(full) == len(names[0])
    assert (
        min(Counter(u for u, _ in names[1]).values())
        >= 4
        <= min(Counter(i for _, i in names[1]).values())
    )
    rng.shuffle(records)
    again, other = (
        prepared(tmp_path / to, records, k_core=4, thin_users=45, seed=seed)
        for to, seed in (("b", 0), ("c", 1))
    )
    assert table(again) == table(path) and pairs_of(other) != pairs_of(path)
    # as before there was such an option
    assert "thin_users" not in source(tmp_path / "full" / "shop")["config"]
    with pytest.raises(PageLLMError, match=r"thin_users=61: all 540 rows leave 60 users"):
        prepared(tmp_path / "d", records, k_core=4, thin_users=61)
    with pytest.raises(PageLLMError, match="was prepared differently: thin_users was 45, now 44"):
        prepared(tmp_path / "a", records, k_core=4, thin_users=44)
    with pytest.raises(PageLLMError, match="thin_users="):
        Config(dataset="shop", split="given", thin_users=5)


def test_newer_rows_under_an_old_name_lead_to_update(tmp_path):
    rows = "user,item\n" + "".join(f"u{u},i{i}\n" for u in range(8) for i in range(8))
    (tmp_path / "raw" / "shop").mkdir(parents=True)
    for day in range(9):
        (tmp_path / "raw" / "shop" / f"log-{day}.csv").write_text(rows)
        if day == 1:
            run(Config(dataset="shop", data=str(tmp_path), k_core=4))
    newer = r"is new; and 2 files more\.\n.*\n.*newer rows.*\n.*pagellm update --from RUN --data"
    with pytest.raises(PageLLMError, match=newer):
        run(Config(dataset="shop", data=str(tmp_path), k_core=4))
    with pytest.raises(PageLLMError, match="k_core was 4, now 3") as other_options:
        run(Config(dataset="shop", data=str(tmp_path), k_core=3))
    assert "update" not in str(other_options.value)


def pairs_of(path):
    """(user, item) of every row, by the shop's own identifiers."""
    users, items = ([row["id"] for row in table(path, name)] for name in ("users", "items"))
    return {(users[row["user"]], items[row["item"]]) for row in table(path)}


def test_duplicates_keep_the_latest_and_are_counted(tmp_path):
    extra = [
        review("u0", "i0", 1.0, 9 * 86_400, "new"),
        review("u0", "i0", 3.0, 8 * 86_400, "middle"),
        dense()[5],
    ]
    path = prepared(tmp_path, dense() + extra)
    row = next(row for row in table(path) if (row["user"], row["item"]) == (0, 0))
    assert (row["rating"], row["time"], row["positive"]) == (1.0, 9 * 86_400, False)
    counts = source(path)["counts"]
    assert (counts["records"], counts["duplicates"], counts["distinct"]) == (75, 3, 72)


def test_missing_ratings_and_times_stay_missing(tmp_path):
    records = [review(f"u{u}", f"i{i}", None, None) for u in range(6) for i in range(6)]
    path = prepared(tmp_path, records)
    assert all(
        row["rating"] is None and row["time"] is None and row["positive"] for row in table(path)
    )
    assert source(path)["missing"] == {
        "rating": 1.0,
        "time": 1.0,
        "text": 1.0,
        "title": 1.0,
        "brand": 1.0,
        "categories": 1.0,
        "price": 1.0,
        "description": 1.0,
    }
    assert pq.read_table(path / "reviews.parquet").num_rows == 0 and load(path).reviews()[2] == []


def test_disliked_rows_of_survivors_stay_and_others_go(tmp_path):
    """k-core on positives: u9 has 9 rows but 4 positives, i9 likewise.

    Their dislikes go with them.
    """
    lonely = [review("u9", f"i{i}", 5.0 if i < 4 else 1.0) for i in range(9)]
    path = prepared(
        tmp_path,
        dense() + lonely + [review(f"u{u}", "i9", 5.0 if u < 4 else 1.0) for u in range(8)],
    )
    counts = source(path)["counts"]
    assert (counts["users"], counts["items"], counts["interactions"]) == (8, 9, 72)
    assert (
        counts["distinct"] == 89
        and counts["positives"] == sum(r["overall"] > 3 for r in dense()) + 8
    )
    assert [r["users"] for r in counts["k_core"]] == [9, 8, 8] and any(
        not row["positive"] for row in table(path)
    )
    everybody = prepared(tmp_path / "all", dense() + lonely, k_core=0)
    assert source(everybody)["counts"]["users"] == 9 and "k_core" not in source(everybody)["counts"]


def test_source_json_counts_add_up(tmp_path):
    bad = ["{", json.dumps(review("", "i1")), json.dumps(review("u1", "i1", 9.0))]
    path = prepared(tmp_path, dense() + bad, max_broken=0.05)
    info = source(path)
    assert info["release"] == "amazon2018" and info["dataset"] == "shop"
    assert info["counts"]["lines"] == {
        "read": 75,
        "kept": 72,
        "broken": {"bad JSON": 1, "rating outside 1..5": 1},
        "passed": {"no user": 1},
    }
    rows = table(path)
    for split, parts in info["counts"]["rows"].items():
        for name, positive in (("positive", True), ("other", False)):
            assert parts[name] == sum(
                row["split"] == split and row["positive"] == positive for row in rows
            )
    assert info["counts"]["reviews"] == len(table(path, "reviews"))
    assert info["files"] == [
        {
            "name": "reviews_5.json",
            "role": "reviews",
            "bytes": (tmp_path / "raw/shop/reviews_5.json").stat().st_size,
            "sha256": info["files"][0]["sha256"],
        }
    ]
    assert (
        len(info["files"][0]["sha256"]) == 64
        and str(tmp_path) not in (path / "source.json").read_text()
    )
    unnamed = {"users", "items", *prepare.LATER, *prepare.PLACES}
    assert set(info["config"]) | unnamed == set(Config.__dataclass_fields__)


def test_the_same_files_give_the_same_bytes(tmp_path):
    one, two = (prepared(tmp_path / name, dense()) for name in "ab")
    assert {f.name: f.read_bytes() for f in one.iterdir()} == {
        f.name: f.read_bytes() for f in two.iterdir()
    }


def test_texts_are_cut_and_short_ones_left_out(tmp_path):
    records = [
        {**r, "summary": "", "reviewText": "abcdefgh" if r["asin"] != "i1" else "ab"}
        for r in dense()
    ]
    path = prepared(tmp_path, records, min_text=3, max_text=5)
    assert {row["text"] for row in table(path, "reviews")} == {"abcde"}
    assert all(row["item"] != 1 for row in table(path, "reviews"))


# Items


def test_item_tables_are_joined(tmp_path):
    write_lines(
        tmp_path / "raw/shop/meta_x.json",
        [
            {"asin": "i0", "title": "", "category": ["Root", "A", "B"], "brand": "M"},
            {
                "asin": "i0",
                "title": "Second line &amp; more",
                "category": ["Root", "C"],
                "price": "$4.50",
            },
            {"asin": "elsewhere", "title": "x", "category": ["Other"]},
            {"asin": "i1", "title": "One", "category": ["Root"], "description": ["long " * 9]},
        ],
    )
    path = prepared(tmp_path, dense(), max_text=12)
    rows = table(path, "items")
    assert rows[0] == {
        "item": 0,
        "id": "i0",
        "title": "Second line & more",
        "brand": "M",
        "categories": ["A", "B"],
        "leaf": "B",
        "price": 4.5,
        "description": "",
    }
    assert rows[1] == {
        "item": 1,
        "id": "i1",
        "title": "One",
        "brand": "",
        "categories": [],
        "leaf": "",
        "price": None,
        "description": "long long lo",
    }
    assert rows[2]["title"] == "" and rows[2]["categories"] == []
    info = source(path)
    assert info["counts"]["item_lines"] == {"read": 4, "kept": 4, "broken": {}}
    assert [file["role"] for file in info["files"]] == ["reviews", "items"]
    assert info["missing"]["title"] == round(7 / 9, 6) and info["missing"]["price"] == round(
        8 / 9, 6
    )


names = st.sampled_from("abc")
path_lists = st.lists(st.lists(names, min_size=1, max_size=3).map(tuple), max_size=2).map(tuple)


@settings(deadline=None, max_examples=100)
@given(st.lists(path_lists, min_size=1, max_size=4))
def test_a_root_that_all_items_share_is_left_out(all_paths):
    """Putting one root above every path changes nothing.

    Names are distinct, and the leaf is the end of the first path.
    """
    ids = [f"i{n}" for n in range(len(all_paths))]

    def columns(all_paths):
        items = (Item(name, paths=paths) for name, paths in zip(ids, all_paths, strict=True))
        found = catalogue(items, ids, 9)
        return found["categories"], found["leaf"]

    rooted = [tuple(("root", *path) for path in paths) for paths in all_paths]
    categories, leaf = columns(rooted)
    assert categories == [
        list(dict.fromkeys(name for path in paths for name in path)) for paths in all_paths
    ]
    assert leaf == [paths[0][-1] if paths else "" for paths in all_paths]


def test_a_name_that_some_item_lacks_is_no_root():
    def categories(*all_paths):
        items = [Item(str(n), paths=paths) for n, paths in enumerate(all_paths)]
        return catalogue(iter(items), [item.id for item in items], 9)["categories"]

    assert categories((("r", "a"),), (("s", "b"),)) == [["r", "a"], ["s", "b"]]
    assert categories((("r", "a"), ("s", "b")), (("s",),)) == [["r", "a", "b"], []]
    # nothing below it: a category after all
    assert categories((("r",),), (("r",),)) == [["r"], ["r"]]
    assert categories((("r", "r"),), (), (("r", "a"),)) == [["r"], [], ["a"]]


# The second time


def test_the_same_again_does_nothing(tmp_path, capsys):
    path = prepared(tmp_path, dense())
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    assert prepared(tmp_path, dense()) == path
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == before
    assert "already prepared" in capsys.readouterr().out
    (tmp_path / "raw").rename(tmp_path / "elsewhere")  # the raw files may be put away, or moved
    assert run(Config(dataset="shop", data=str(tmp_path))) == path
    assert (
        run(Config(dataset="shop", data=str(tmp_path), raw=str(tmp_path / "elsewhere/shop")))
        == path
    )
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == before


def test_a_refit_adds_the_validation_rows_to_train_and_moves_nothing_else(tmp_path):
    plain, whole = prepared(tmp_path, dense()), prepared(tmp_path, dense(), "again", refit=True)
    before, after = table(plain), table(whole)
    assert any(row["split"] == "valid" for row in before)
    assert after == [
        row | {"split": "train" if row["split"] == "valid" else row["split"]} for row in before
    ]
    assert len(table(whole, "reviews")) == sum(row["split"] == "train" for row in after)
    counts = source(whole)["counts"]["rows"]
    assert counts["valid"] == {"positive": 0, "other": 0}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"k_core": 4}, "k_core was 5, now 4"),
        ({"split": "temporal"}, "split was 'random', now 'temporal'"),
        ({"refit": True}, "refit was None, now True"),
    ],
)
def test_other_options_are_refused(tmp_path, change, message):
    path = prepared(tmp_path, dense())
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(PageLLMError, match=rf"(?s){message}.*Delete .*another --dataset"):
        prepared(tmp_path, dense(), **change)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_other_files_are_refused(tmp_path):
    prepared(tmp_path, dense())
    with pytest.raises(PageLLMError, match=r"reviews file reviews_5\.json has other bytes"):
        prepared(tmp_path, dense(7))
    write_lines(tmp_path / "raw/shop/meta.json", [{"asin": "i0", "title": "x"}])
    with pytest.raises(PageLLMError, match=r"items file meta\.json is new"):
        prepared(tmp_path, dense())
    write_lines(tmp_path / "raw/shop/other.json", dense())
    with pytest.raises(
        PageLLMError, match=r"other\.json is new; reviews file reviews_5\.json is gone"
    ):
        run(
            Config(dataset="shop", data=str(tmp_path), review_files="other.json", item_files="none")
        )


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "thesis.txt").write_text("precious")
    with pytest.raises(PageLLMError, match="no source.json"):
        prepared(tmp_path, dense())
    assert (tmp_path / "shop" / "thesis.txt").read_text() == "precious"
    (tmp_path / "shop" / "thesis.txt").unlink()
    assert prepared(tmp_path, dense()) == tmp_path / "shop"  # an empty directory is in nobody's way
    (tmp_path / "shop" / "source.json").write_text("{")
    with pytest.raises(PageLLMError, match="Delete"):
        prepared(tmp_path, dense())


@pytest.mark.parametrize("where", ["write_tables", "catalogue"])
def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch, where):
    def fail(*args, **kwargs):
        raise RuntimeError("power cut")

    monkeypatch.setattr(prepare, where, fail)
    with pytest.raises(RuntimeError, match="power cut"):
        prepared(tmp_path, dense())
    assert os.listdir(tmp_path) == ["raw"]


# What is refused


def test_too_many_broken_lines_stop(tmp_path, capsys):
    records = dense() + ["{"]
    with pytest.raises(
        PageLLMError,
        match=r"(?s)1 of 73 review lines.*1 bad JSON.*reviews_5\.json:73.*--max_broken 0.01",
    ):
        prepared(tmp_path, records)
    assert not (tmp_path / "shop").exists()
    prepared(tmp_path, records, max_broken=0.02)
    assert "reviews_5.json:73: bad JSON" in capsys.readouterr().out
    write_lines(tmp_path / "raw/other/meta.json", [{"asin": "i0"}, "{"])
    with pytest.raises(PageLLMError, match=r"1 of 2 item lines"):
        prepared(tmp_path, dense(), name="other")


def test_nothing_left_says_what_to_change(tmp_path):
    with pytest.raises(PageLLMError, match=r"(?s)none is left of 9 rows.*Lower --k_core"):
        prepared(tmp_path, dense(3, 3))


def test_a_split_by_time_needs_times(tmp_path):
    with pytest.raises(PageLLMError, match="split=temporal needs times.*\n.*--time_column"):
        prepared(
            tmp_path,
            [review(f"u{u}", f"i{i}", 5.0, None) for u in range(6) for i in range(6)],
            split="temporal",
        )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dataset": ""}, "dataset"),
        ({"dataset": "raw"}, "dataset"),
        ({"dataset": "a/b"}, "dataset"),
        ({"dataset": ".x"}, "dataset"),
        ({"split": "half"}, "split"),
        ({"k_core": -1}, "k_core"),
        ({"max_broken": 2.0}, "max_broken"),
        ({"positive_above": math.inf}, "positive_above"),
        ({"release": "1"}, "release"),
        ({"rating_min": 5.0}, "rating_max"),
        ({"event_values": "view"}, "event_values"),
        ({"max_text": 0}, "max_text"),
        ({"event_values": "view=9"}, "event_values"),
        ({"train": "a"}, "split=given"),
        ({"split_column": "a"}, "split=given"),
        ({"dataset": "toys", "users": 9}, "users"),
        ({"dataset": "toys", "items": 9}, "items"),
        ({"min_text": -1}, "min_text"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(PageLLMError, match=message):
        Config(**options)


def test_no_raw_files(tmp_path, capsys):
    with pytest.raises(
        PageLLMError, match=rf"(?s){tmp_path}/raw/shop does not exist.*--raw.*user_column"
    ):
        run(Config(dataset="shop", data=str(tmp_path)))
    with pytest.raises(PageLLMError, match="nowhere does not exist"):
        run(Config(dataset="toys", data=str(tmp_path), raw=str(tmp_path / "nowhere")))
    assert main(Config, run, "prepare", ["--dataset", "shop", "--data", str(tmp_path)]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "shop").exists()


def test_an_official_set_is_downloaded_or_says_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setitem(
        download.SOURCES,
        "2018",
        ("http://127.0.0.1:9/{}_5.json.gz", "http://127.0.0.1:9/meta_{}.json.gz"),
    )
    for _ in range(2):
        with pytest.raises(
            PageLLMError, match=rf"(?s)meta_Gift_Cards\.json\.gz.*into {tmp_path}/raw/gift_cards"
        ):
            run(Config(dataset="gift_cards", data=str(tmp_path)))
    write_lines(
        tmp_path / "raw/gift_cards/Gift_Cards_5.json", dense()
    )  # put there by hand: no server is asked
    assert source(run(Config(dataset="gift_cards", data=str(tmp_path))))["counts"]["users"] == 8


def test_what_it_cannot_choose_it_lists(tmp_path):
    write_lines(tmp_path / "raw/shop/a.sequences.txt", ["u i j k"])
    with pytest.raises(
        PageLLMError,
        match=r"(?s)several sets.*a\.sequences\.txt: sequences.*5\.json: 2018 amazon reviews"
        r".*--review_files",
    ):
        prepared(tmp_path, dense())
    prepared(tmp_path, dense(), review_files="reviews_5.json")
    for name in ("meta_a.json", "meta_b.json"):
        write_lines(tmp_path / "raw/other" / name, [{"asin": "i0", "title": name}])
    with pytest.raises(
        PageLLMError,
        match=r"(?s)several item tables.*meta_a\.json: 2014 amazon items.*--item_files",
    ):
        prepared(tmp_path, dense(), name="other")
    path = prepared(tmp_path, dense(), name="other", item_files="meta_b.json")
    assert load(path).catalogue.title[0] == "meta_b.json" and source(path)["unused_files"] == [
        "meta_a.json"
    ]


def test_files_named_by_option(tmp_path):
    write_lines(tmp_path / "raw/shop/meta.json", [{"asin": "i0", "title": "x"}])
    for options, message in [
        ({"review_files": "gone.json"}, "no file gone.json in"),
        ({"review_files": "meta.json"}, r"--review_files: not interactions: meta\.json: 2014"),
        ({"item_files": "reviews_5.json"}, "--item_files: not an item table"),
        (
            {"user_column": "usr"},
            "(?s)--user_column: no column 'usr' in.*reviews_5.json: reviewerID",
        ),
        ({"title_column": "name"}, "--title_column: no column 'name'"),
    ]:
        with pytest.raises(PageLLMError, match=message):
            prepared(tmp_path, dense(), **options)
    path = prepared(tmp_path, dense(), item_files="none")
    assert source(path)["missing"]["title"] == 1.0
    alone = run(
        Config(dataset="alone", data=str(tmp_path), raw=str(tmp_path / "raw/shop/reviews_5.json"))
    )
    assert table(alone) == table(path)


def test_nothing_to_read_lists_what_is_there(tmp_path):
    folder = tmp_path / "raw/shop"
    write_lines(folder / "notes.md", ["Some notes about this shop."])
    write_lines(folder / "table.csv", ["colour,size", "red,4"])
    write_lines(folder / "array.json", ["[", "]"])
    (folder / "empty").touch()
    with pytest.raises(
        PageLLMError,
        match=r"(?s)no interactions.*array\.json: other.*empty: other.*notes\.md: other.*"
        r"table\.csv: csv other \(colour, size\).*--user_column",
    ):
        run(Config(dataset="shop", data=str(tmp_path)))


# Logs and other people's splits


def log_lines(rows, header="customer,sku,score,when"):
    return [header, *(",".join(map(str, row)) for row in rows)]


def test_columns_by_option(tmp_path):
    rows = [
        (f"u{u}", f"i{i}", 10 - (u + i) % 3, f"2020-01-{1 + i:02d}")
        for u in range(6)
        for i in range(6)
    ]
    write_lines(tmp_path / "raw/shop/log.csv", log_lines(rows, "who,what,mark,when"))
    write_lines(
        tmp_path / "raw/shop/products.tsv",
        ["code\tlabel\tkind", *(f"i{i}\tT{i}\tA > B" for i in range(6))],
    )
    path = run(
        Config(
            dataset="shop",
            data=str(tmp_path),
            user_column="who",
            item_column="what",
            rating_column="mark",
            time_column="when",
            rating_min=0.0,
            rating_max=10.0,
            id_column="code",
            title_column="label",
            category_column="kind",
            split="leave_one_out",
        )
    )
    shop = load(path)
    assert shop.catalogue.title == [f"T{i}" for i in range(6)] and shop.catalogue.leaf == ["B"] * 6
    assert sorted(set(shop.rating.tolist())) == pytest.approx([4.2, 4.6, 5.0])
    assert (
        shop.item[shop.rows("test")].tolist() == [5] * 6
        and shop.item[shop.rows("valid")].tolist() == [4] * 6
    )
    assert source(path)["release"] == "log"


def test_events_become_grades_and_the_highest_counts(tmp_path):
    rows = [
        (f"u{u}", f"i{i}", event, 100 + n)
        for u in range(6)
        for i in range(6)
        for n, event in enumerate(
            ["view", "purchase", "view"] if (u + i) % 6 else ["view", "click"]
        )
    ]
    write_lines(
        tmp_path / "raw/shop/log.csv", log_lines(rows, "user_id,item_id,event_type,timestamp")
    )
    path = run(Config(dataset="shop", data=str(tmp_path), k_core=2))
    for row in table(path):
        bought = (row["user"] + row["item"]) % 6 != 0
        assert (row["rating"], row["positive"], row["time"]) == (
            (5.0, True, 102) if bought else (2.0, False, 101)
        )
    other = run(
        Config(
            dataset="two",
            data=str(tmp_path),
            raw=str(tmp_path / "raw/shop"),
            k_core=2,
            event_values="view=1,click=4,purchase=5",
        )
    )
    assert all(row["positive"] for row in table(other))


def test_parts_are_read_as_one(tmp_path):
    rows = [(f"u{u}", f"i{i}") for u in range(6) for i in range(6)]
    for part in range(2):
        write_lines(
            tmp_path / f"raw/shop/part-{part:04d}.csv", log_lines(rows[part::2], "user_id,item_id")
        )
    path = run(Config(dataset="shop", data=str(tmp_path)))
    assert len(table(path)) == 36 and len(source(path)["files"]) == 2


@pytest.mark.parametrize("how", ["names", "options", "column", "sequences"])
def test_a_given_split_is_taken_as_it_is(tmp_path, how):
    split_of = {0: "train", 1: "train", 2: "valid", 3: "test"}
    rows = [(f"u{u}", f"i{i}") for u in range(3) for i in range(4)]
    folder = tmp_path / "raw/shop"
    options = {}
    if how == "column":
        lines = [f"{u},{i},{split_of[int(i[1])]},9" for u, i in rows] + ["u0,i9,unused,9"]
        write_lines(folder / "log.csv", ["user_id,item_id,part,fold", *lines])
        options = {"split_column": "part"}
    else:
        for split in ("train", "valid", "test"):
            mine = [(u, i) for u, i in rows if split_of[int(i[1])] == split]
            name = (
                f"x_{split}"
                if how == "names"
                else {"train": "one", "valid": "two", "test": "three"}[split]
            )
            if how == "sequences":
                by_user = {u: [i for v, i in mine if v == u] for u, _ in mine}
                write_lines(
                    folder / f"{name}.txt", [" ".join([u, *items]) for u, items in by_user.items()]
                )
                options[split] = f"{name}.txt"
            else:
                write_lines(folder / f"{name}.csv", log_lines(mine, "user_id,item_id"))
                options |= {split: f"{name}.csv"} if how == "options" else {}
    path = run(Config(dataset="shop", data=str(tmp_path), split="given", **options))
    found = [row for row in table(path) if row["split"] != "unused"]
    assert Counter(
        (f"u{row['user']}", f"i{row['item']}", row["split"]) for row in found
    ) == Counter((u, i, split_of[int(i[1])]) for u, i in rows)
    assert len(table(path)) - len(found) == (how == "column")
    if how == "sequences":
        assert [row["time"] for row in table(path)] == [0, 1, 2, 3] * 3
    if how in ("names", "options"):
        assert {file["role"] for file in source(path)["files"]} == {"train", "valid", "test"}


def test_a_given_split_must_be_given(tmp_path):
    with pytest.raises(PageLLMError, match="split=given, but nothing says"):
        prepared(tmp_path, dense(), split="given")
    write_lines(tmp_path / "raw/two/a_train.csv", log_lines([("u", "i")], "user_id,item_id"))
    write_lines(tmp_path / "raw/two/b_train.csv", log_lines([("u", "i")], "user_id,item_id"))
    with pytest.raises(PageLLMError, match=r"(?s)several files look like the train rows.*--train"):
        run(Config(dataset="two", data=str(tmp_path), split="given"))
    with pytest.raises(PageLLMError, match=r"(?s)several sets.*--split given --train"):
        run(Config(dataset="two", data=str(tmp_path)))


def test_texts_of_a_given_test_file_are_stored_nowhere(tmp_path):
    for split in ("train", "valid", "test"):
        text = "fine" if split == "train" else MARKER
        rows = [{"user_id": f"u{u}", "item_id": f"i{split}{u}", "text": text} for u in range(4)]
        write_lines(tmp_path / f"raw/shop/{split}.jsonl", rows)
    path = run(Config(dataset="shop", data=str(tmp_path), split="given"))
    assert not [name for name, text in artefacts(path) if MARKER in text]
    assert [row["text"] for row in table(path, "reviews")] == ["fine"] * 4


def test_one_pair_in_two_given_splits_is_in_the_later(tmp_path):
    for split in ("train", "test"):
        write_lines(
            tmp_path / f"raw/shop/{split}.csv",
            log_lines([("u", "i"), ("u", f"{split}")], "user_id,item_id"),
        )
    path = run(Config(dataset="shop", data=str(tmp_path), split="given"))
    assert Counter((row["item"], row["split"]) for row in table(path)) == {
        (0, "test"): 1,
        (1, "test"): 1,
        (2, "train"): 1,
    }
    assert source(path)["counts"]["duplicates"] == 1


def test_a_split_column_that_was_not_asked_for_is_ignored(tmp_path):
    rows = [(f"u{u}", f"i{i}", i) for u in range(6) for i in range(6)]
    write_lines(tmp_path / "raw/shop/log.csv", log_lines(rows, "user_id,item_id,fold"))
    assert source(run(Config(dataset="shop", data=str(tmp_path))))["counts"]["users"] == 6


# The files of the paper, where they are at hand


def real(name):
    if not (REAL / name).is_dir():
        pytest.skip(f"shared: no real data in {REAL / name}")
    return str(REAL / name)


@pytest.mark.parametrize(
    "name, release, records, duplicates, users, items",
    [
        ("instruments", "amazon2014", 10_261, 0, 526, 347),
        ("gift_cards", "amazon2018", 2_972, 7, 430, 144),
        ("all_beauty", "amazon2018", 5_269, 5_269 - 4_092, 134, 24),
        ("toys", "sequences", 167_597, 0, 19_412, 11_924),
    ],
)
def test_real_files(tmp_path, name, release, records, duplicates, users, items):
    """Counts as published or as counted by hand.

    134 users because All Beauty's core is of liked rows.
    """
    path = run(Config(dataset=name, data=str(tmp_path), raw=real(name)))
    info = source(path)
    counts = info["counts"]
    assert (
        info["release"] == release
        and not counts["lines"]["broken"]
        and not counts["item_lines"]["broken"]
    )
    assert (counts["records"], counts["duplicates"], counts["users"], counts["items"]) == (
        records,
        duplicates,
        users,
        items,
    )
    shop = load(path)
    held_out = np.bincount(shop.user[shop.rows("test")], minlength=users)
    assert np.array_equal(
        held_out, np.maximum(1, np.bincount(shop.user[shop.rows(None)], minlength=users) // 10)
    )
    text = " ".join(shop.catalogue.title + shop.reviews()[2])
    assert "&quot;" not in text and "&amp;" not in text and "&#34;" not in text
    if name == "instruments":
        assert info["counts"]["positives"] == 2_084 + 6_938 and shop.rows(None).sum() == 3_615
    if name == "gift_cards":
        assert info["missing"]["title"] == 0 and 0.25 < info["missing"]["price"] < 0.3
    if name == "toys":
        assert info["missing"]["title"] == 0 and not any(
            "Toys & Games" in c for c in shop.catalogue.categories
        )


def test_two_real_sets_in_one_directory_are_not_guessed_at(tmp_path):
    raw = real("scientific")
    with pytest.raises(PageLLMError, match=r"(?s)several sets.*subset\.sequences.*--review_files"):
        run(Config(dataset="scientific", data=str(tmp_path), raw=raw))
    path = run(
        Config(
            dataset="scientific",
            data=str(tmp_path),
            raw=raw,
            review_files="Industrial_and_Scientific.subset.sequences.txt.gz",
        )
    )
    counts = source(path)["counts"]
    assert (counts["records"], counts["duplicates"]) == (19_712, 144) and all(
        load(path).catalogue.title
    )


def test_a_cut_raw_file_is_an_error(tmp_path):
    folder = tmp_path / "raw/shop"
    folder.mkdir(parents=True)
    packed = gzip.compress("".join(json.dumps(r) + "\n" for r in dense(40, 40)).encode())
    (folder / "reviews.json.gz").write_bytes(packed[:-2000])
    with pytest.raises(PageLLMError, match="damaged or cut short"):
        run(Config(dataset="shop", data=str(tmp_path)))
    assert os.listdir(tmp_path) == ["raw"]


def test_parquet_logs_stream(tmp_path):
    rows = [(f"u{u}", f"i{i}", 5.0) for u in range(6) for i in range(6)]
    columns = [pa.array(column) for column in zip(*rows, strict=True)]
    (tmp_path / "raw/shop").mkdir(parents=True)
    pq.write_table(
        pa.table(columns, ["user_id", "item_id", "rating"]),
        tmp_path / "raw/shop/log.parquet",
        row_group_size=7,
    )
    assert len(table(run(Config(dataset="shop", data=str(tmp_path))))) == 36


def test_a_data_set_that_appears_meanwhile_is_left_alone(tmp_path, monkeypatch):
    """Two commands at once: the slower one gives way."""

    def slow(folder, table, items):
        (tmp_path / "shop").mkdir()
        (tmp_path / "shop" / "source.json").write_text("the other's")
        write_tables(folder, table, items)

    write_tables = prepare.write_tables
    monkeypatch.setattr(prepare, "write_tables", slow)
    with pytest.raises(PageLLMError, match="appeared while it was being prepared"):
        prepared(tmp_path, dense())
    assert (tmp_path / "shop" / "source.json").read_text() == "the other's"
    assert sorted(os.listdir(tmp_path)) == ["raw", "shop"]


def test_words_about_items_are_titles_only_when_asked_for(tmp_path):
    lines = [" ".join([f"u{u}", *(f"i{i}" for i in range(6))]) for u in range(6)]
    write_lines(tmp_path / "raw/shop/x.sequences.txt", lines)
    write_lines(tmp_path / "raw/shop/x.item_keyphrases.txt", [f"i{i} red {i}" for i in range(6)])
    path = run(Config(dataset="shop", data=str(tmp_path)))
    raw, words = str(tmp_path / "raw/shop"), "x.item_keyphrases.txt"
    assert load(path).catalogue.title == [""] * 6 and source(path)["unused_files"] == [words]
    asked = run(Config(dataset="two", data=str(tmp_path), raw=raw, item_files=words))
    assert (
        load(asked).catalogue.title == [f"red {i}" for i in range(6)]
        and not source(asked)["unused_files"]
    )


def test_hidden_files_half_files_and_lists_are_passed_over(tmp_path):
    for name in (".hidden.json", "other.json.part"):
        write_lines(tmp_path / "raw/shop" / name, dense())
    write_lines(tmp_path / "raw/shop/words.txt", ["one", "word", "a", "line"])
    write_lines(tmp_path / "raw/shop/list.txt", ["[1, 2]", "[3, 4]"])
    (tmp_path / "raw/shop/folder.json").mkdir()
    path = prepared(tmp_path, dense())
    assert source(path)["unused_files"] == ["list.txt", "words.txt"]


def test_a_given_split_without_training_rows_is_no_split(tmp_path):
    for split in ("valid", "test"):
        write_lines(
            tmp_path / f"raw/shop/x_{split}.csv", log_lines([("u", "i")], "user_id,item_id")
        )
    with pytest.raises(PageLLMError, match="several sets of interactions"):
        run(Config(dataset="shop", data=str(tmp_path), split="given"))


def test_ratings_from_one_to_five_and_the_shortest_texts_stay_by_default(tmp_path):
    rows = [
        {"user_id": f"u{u}", "item_id": f"i{i}", "rating": 1 + (u + i) % 5, "text": "x"}
        for u in range(6)
        for i in range(6)
    ]
    write_lines(tmp_path / "raw/shop/log.jsonl", rows)
    path = run(Config(dataset="shop", data=str(tmp_path), k_core=1))
    assert sorted({row["rating"] for row in table(path)}) == [1, 2, 3, 4, 5]
    assert {row["text"] for row in table(path, "reviews")} == {"x"} and source(path)["counts"][
        "reviews"
    ] > 20


def test_the_synthetic_shop_is_counted_like_any_other(tmp_path):
    counts = source(run(Config(data=str(tmp_path), users=60, items=50)))["counts"]
    assert counts["lines"] == {"read": counts["records"], "kept": counts["records"], "broken": {}}
    assert counts["item_lines"]["read"] == 50 and counts["duplicates"] == 0


def test_what_was_written_is_what_is_loaded(tmp_path):
    path = run(Config(data=str(tmp_path), users=60, items=40))
    load(path)
    for name in ("interactions.parquet", "truth.npy"):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole + b"\0")
        with pytest.raises(
            PageLLMError, match=f"{name} has changed since it was written\n.*make prepare"
        ):
            load(path)
        (path / name).unlink()
        with pytest.raises(PageLLMError, match=f"{name} is gone"):
            load(path)
        (path / name).write_bytes(whole)
    load(path)


def test_what_a_killed_prepare_left_is_cleared_away_and_a_living_ones_is_not(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    for pid in (dead.pid, os.getppid()):
        (tmp_path / f".synthetic.{pid}.tmp").mkdir()
    (tmp_path / f".other.{dead.pid}.tmp").mkdir()
    run(Config(data=str(tmp_path), users=60, items=40))
    assert sorted(p.name for p in tmp_path.glob(".*")) == sorted(
        [f".synthetic.{os.getppid()}.tmp", f".other.{dead.pid}.tmp"]
    )
