"""The study of repeat purchases: the cut, the plain row, and scores of the week after it."""

import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments import repeats
from pagellm.stage.config import PageLLMError


def orders(folder):
    """House 1 bought a three times and b once before the cut, and a and c in the week after it."""
    day = datetime.datetime(2017, 10, 2)
    rows = [(1, 10, -9), (1, 10, -5), (1, 10, -5), (1, 10, -2), (1, 11, -1), (2, 12, -3)]
    rows += [(2, 12, -2), (2, 11, -2), (1, 10, 0), (1, 12, 6), (1, 11, 7), (2, 13, 1)]
    pq.write_table(
        pa.table(
            {
                "household_id": [row[0] for row in rows],
                "product_id": [row[1] for row in rows],
                "transaction_timestamp": [day + datetime.timedelta(days=row[2]) for row in rows],
            }
        ),
        folder / "transactions.parquet",
    )
    items = {"product_id": [10, 11, 12, 13], "manufacturer_id": [1, 1, 2, 2]}
    items |= {"product_type": ["a", "b", "c", "d"], "product_category": ["x"] * 4}
    pq.write_table(pa.table(items), folder / "products.parquet")


def test_the_log_is_cut_at_the_day_and_rare_items_are_left_out(tmp_path):
    orders(tmp_path)
    before, after, items = repeats.read(repeats.Config(raw=str(tmp_path), least=2))
    assert sorted(zip(before.user, before.item, strict=True)) == [
        *[("1", "10")] * 4,
        ("1", "11"),
        ("2", "11"),
        *[("2", "12")] * 2,
    ]
    assert sorted(zip(after.user, after.item, strict=True)) == [("1", "10"), ("1", "12")]
    assert items["product_id"].to_pylist() == ["10", "11", "12"]


def test_most_often_counts_days_and_ends_with_the_shops_favourites(tmp_path):
    orders(tmp_path)
    before, _, _ = repeats.read(repeats.Config(raw=str(tmp_path), least=2))
    pages = repeats.most_often(before, ["1", "2"])
    assert pages == {"1": ["10", "11", "12"], "2": ["12", "11", "10"]}


def test_scores_tell_what_was_bought_again_from_what_was_new():
    page = [str(n) for n in range(repeats.K)]
    found = repeats.scores(page, {"0", "3", "99"}, had={"0", "99"})
    recall, ndcg, again, new = (found[metric] for metric in repeats.METRICS)
    ideal = 1 + 1 / np.log2(3) + 1 / np.log2(4)
    assert recall == 2 / 3 and again == 1 / 2 and new == 1
    assert ndcg == pytest.approx((1 + 1 / np.log2(5)) / ideal)
    assert np.isnan(repeats.scores(page, {"0"}, had={"0"})["Recall@20, new"])


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(PageLLMError, match="name the directory of complete_journey with --raw"):
        repeats.run(repeats.Config(raw=str(tmp_path / "gone")))
