"""The made-up log of experiments/cost/large_logs.py."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from experiments.cost.large_logs import make_log

pytest.importorskip("duckdb")


def test_the_numbers_of_a_row_are_drawn_apart(tmp_path):
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        make_log(tmp_path / name, 20_000, 3_000, 500, seed)
    table, again, other = (
        pq.read_table(tmp_path / name / "day=0000" / "part-0.parquet", partitioning=None)
        for name in ("one", "again", "other")
    )
    assert table.equals(again) and not table.equals(other)
    number = [
        np.array([int(name[1:]) for name in table[column].to_pylist()])
        for column in ("user_id", "item_id")
    ]
    number += [np.array(table[column].to_pylist()) for column in ("rating", "timestamp")]
    # If two numbers of a row went together, they would correlate or hold few pairs.
    assert np.abs(np.corrcoef(number) - np.eye(4)).max() < 0.03
    assert len(np.unique(number[0] * 500 + number[1])) > 17_000
    assert len(np.unique(number[0])) > 2_500 and len(np.unique(number[1])) == 500
