"""Nobody of the log is lost: what the k-core takes out is kept beside the data."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest

from pagellm.data.dropped import NAME, LeftOut
from pagellm.data.prepare import Config, run
from pagellm.data.shop import liked_above, load
from pagellm.stage.config import PageLLMError

FULL = [(f"u{u}", f"i{i}", 5 - (u + i) % 2, 10 * i) for u in range(6) for i in range(6)]
RARE = [  # below the k-core: two users and an item; i0 and u0 are above it
    *(("0late", "i3", 4, 30), ("0late", "i0", 2, 20), ("0late", "gone", 5, 10)),
    *(("u0", "gone", 5, 99), ("sad", "i1", 1, 5)),
]


def prepared(folder, rows, name="shop", **more):
    (folder / "raw").mkdir(exist_ok=True)
    lines = [",".join(map(str, row)) for row in rows]
    path = folder / "raw" / f"{name}.csv"
    path.write_text("user_id,item_id,rating,timestamp\n" + "\n".join(lines))
    options = {"dataset": name, "raw": str(path), "data": str(folder / "data"), "k_core": 3}
    return run(Config(**options | more))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dropped")


@pytest.fixture(scope="module")
def shop(folder):
    return prepared(folder, FULL + RARE)


def test_the_data_and_the_dropped_rows_together_are_the_log(shop):
    data = load(shop)
    kept = [
        (data.user_ids[u], data.catalogue.ids[i], r, t)
        for u, i, r, t in zip(data.user, data.item, data.rating, data.time, strict=True)
    ]
    gone = [tuple(row.values()) for row in pq.read_table(shop / NAME).to_pylist()]
    assert sorted(kept + [row[:4] for row in gone]) == sorted(FULL + RARE)
    assert all(row[4] == (row[2] > 3) for row in gone)
    assert gone == sorted(gone, key=lambda row: (row[0], row[3]))


def test_all_else_is_as_if_the_dropped_rows_were_no_matter(shop, folder):
    """No other file knows of them; and where nothing is dropped there is no such file."""
    assert NAME not in json.loads((shop / "source.json").read_text())["written"]
    without = prepared(folder, FULL, "without")
    assert not (without / NAME).exists() and not LeftOut.read(load(without)).users
    for name in ("interactions", "items", "users", "reviews"):
        file = f"{name}.parquet"
        assert (shop / file).read_bytes() == (without / file).read_bytes()


def test_the_order_of_lines_moves_no_byte_of_it(shop, folder):
    other = prepared(folder, [*RARE[::-1], *FULL], "other")
    assert (other / NAME).read_bytes() == (shop / NAME).read_bytes()


def test_users_without_a_row_have_their_history(shop):
    left = LeftOut.read(load(shop))
    assert list(left.users) == ["0late", "sad"] and left.items == ["gone"]
    assert left.of("0late") == (("i0", 2.0), ("i3", 4.0)) and left.of("sad") == (("i1", 1.0),)
    assert left.of("u0") == left.of("nobody") == left.of(None) == ()


def test_a_user_of_dropped_items_alone_is_there_with_an_empty_history(folder):
    left = LeftOut.read(load(prepared(folder, [*FULL, ("x", "gone", "", "")], "alone")))
    assert left.users == {"x": 0} and left.of("x") == ()


def test_a_missing_rating_stays_missing(folder):
    left = LeftOut.read(load(prepared(folder, [*FULL, ("x", "i2", "", "")], "unrated")))
    ((item, rating),) = left.of("x")
    assert item == "i2" and math.isnan(rating)


def test_a_damaged_file_is_refused(folder):
    path = prepared(folder, FULL + RARE, "damaged")
    whole = bytearray((path / NAME).read_bytes())
    whole[60] ^= 255
    (path / NAME).write_bytes(whole)
    with pytest.raises(PageLLMError, match="dropped.parquet cannot be read"):
        LeftOut.read(load(path))


def test_prepare_counts_and_names_what_it_drops(folder, capsys):
    prepared(folder, FULL + RARE, "said")
    said = capsys.readouterr().out
    assert "5 rows of 2 users and 1 item (gone) below the k-core" in said


@pytest.mark.parametrize(
    ("low", "high", "above"), [(0.5, 5, 3.5), (0, 10, 6), (1, 5, 3), (-1, 1, 0.1)]
)
def test_what_is_liked_is_told_from_stored_ratings_too(folder, low, high, above):
    """A threshold on the shop's own scale, carried over to 1..5, parts the same rows."""
    steps = np.linspace(low, high, 19)
    rows = [
        (u, f"i{i}", steps[(7 * n + i) % 19], i) for n, u in enumerate("abcd") for i in range(19)
    ]
    options = {"rating_min": low, "rating_max": high, "positive_above": above, "k_core": 1}
    path = prepared(folder, rows, f"scale{low}{high}", **options)
    data = load(path)
    assert 0 < data.positive.mean() < 1
    assert ((data.rating > liked_above(path)) == data.positive).all()
