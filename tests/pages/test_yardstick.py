"""The yardstick: frontiers of re-ranked pages, and who is ahead."""

import numpy as np
import pytest

from pagellm.data import prepare
from pagellm.data.shop import load
from pagellm.pages import rerank
from pagellm.pages.ranked import Scorer, popularity_pages, seen_rows
from pagellm.pages.yardstick import (
    best_of,
    chosen,
    frontier_table,
    said_of_best,
    sweep,
    verdict,
    verdict_table,
    verdicts,
)


@pytest.fixture(scope="module")
def frontier(tmp_path_factory):
    """Records of popular items of a small shop, and what made them."""
    root = tmp_path_factory.mktemp("yardstick")
    prepare.run(prepare.Config(data=str(root), users=120, items=80))
    shop = load(root / "synthetic")
    scorer, kin = Scorer(shop, "valid"), rerank.Kin.of(shop.catalogue)
    pages = popularity_pages(shop, scorer.users, seen_rows(shop, "valid", "train"), 6, 40)
    return sweep("popularity", pages, scorer, kin, 6), pages, scorer, kin


def test_a_frontier_begins_at_the_base_and_trades_accuracy_for_variety(frontier):
    records, pages, scorer, _ = frontier
    plain = scorer(pages, 6)
    for method in rerank.METHODS:
        mine = [r for r in records if r["method"] == method]
        strengths = [r["strength"] for r in mine]
        assert strengths == sorted(set(strengths)) and strengths[0] == 0
        assert mine[0]["NDCG@100"] == pytest.approx(np.nanmean(plain["NDCG@100"]))
        assert mine[-1]["ILD"] > mine[0]["ILD"] or method == "energy"


def test_the_chosen_strength_costs_at_most_a_hundredth(frontier):
    records = frontier[0]
    for method in rerank.METHODS:
        at = chosen(records, "popularity", method)
        row, plain = (
            next(r for r in records if (r["method"], r["strength"]) == (method, s))
            for s in (at, 0.0)
        )
        for metric in ("Recall@20", "NDCG@100"):
            assert row[metric] >= 0.99 * plain[metric]


def test_users_can_be_limited(frontier):
    _, pages, scorer, kin = frontier
    few = sweep("popularity", pages, scorer, kin, 6, methods=("mmr",), users=5)
    first = {name: values[:5] for name, values in scorer(pages, 6).items()}
    assert few[0]["NDCG@100"] == pytest.approx(np.nanmean(first["NDCG@100"]))


def test_the_table_names_every_base_and_its_methods(frontier):
    text = frontier_table(frontier[0])
    assert "popularity" in text and "as it is" in text and "NDCG@100" in text


@pytest.mark.parametrize(
    "low, high, value, want",
    [
        (0.001, 0.2, 1.0, "ahead"),
        (0.0, 0.2, 1.0, "level"),
        (-0.01, 0.2, 1.0, "level"),
        (-0.0101, 0.2, 1.0, "unclear"),
        (-0.0101, 0.0, 1.0, "unclear"),  # it holds 0
        (-0.0101, 0.2, -2.0, "level"),
        (-0.3, -0.2, 1.0, "behind"),
    ],
)
def test_ahead_level_unclear_and_behind(low, high, value, want):
    assert verdict(low, high, value) == want


def test_a_smaller_redundancy_is_ahead():
    rng = np.random.default_rng(0)
    low, high = rng.random(50), rng.random(50) + 1
    for metric, want in (("redundancy", "ahead"), ("ILD", "behind")):
        (record,) = verdicts([{metric: low}], {"other": [{metric: high}]}, [metric])
        assert record["verdict"] == want
        sign = -1 if metric == "redundancy" else 1
        assert record["difference"] == pytest.approx(sign * (low - high).mean())
        assert record["low"] <= record["difference"] <= record["high"]


def test_several_seeds_widen_the_interval_where_seeds_differ():
    rng = np.random.default_rng(0)
    base = rng.random(200)
    ours = [{"ILD": base + shift} for shift in (-0.2, 0.0, 0.3)]
    theirs = [{"ILD": base}] * 3
    (many,) = verdicts(ours, {"other": theirs}, ["ILD"])
    assert many["low"] < 0 < many["high"] and many["difference"] == pytest.approx(0.1 / 3)


def test_metrics_that_a_row_lacks_are_left_out():
    row = {"ILD": np.full(3, np.nan), "WAS": np.ones(3)}
    records = verdicts([row | {"PWKT": np.ones(3)}], {"other": [row]}, ["ILD", "WAS", "PWKT"])
    assert [r["metric"] for r in records] == ["WAS"]


def test_the_verdict_table_counts_and_names_what_is_behind():
    records = [
        {"row": "ALS", "metric": m, "verdict": v}
        for m, v in (("ILD", "ahead"), ("WAS", "unclear"), ("PWKT", "behind"), ("DPA", "behind"))
    ]
    line = verdict_table(records).splitlines()[1]
    assert line.split()[:5] == ["ALS", "1", "0", "1", "2"] and "behind: PWKT, DPA" in line


def test_the_best_of_several_is_the_one_that_loses_least_anywhere():
    found = {
        "a": {"Recall@20": 1.0, "NDCG@100": 0.5, "ILD": 0.5, "energy": -2.0},
        "b": {"Recall@20": 0.9, "NDCG@100": 0.5, "ILD": 0.9, "energy": -1.0},
        "c": {"Recall@20": 1.0, "NDCG@100": 0.3, "ILD": 1.0, "energy": -1.0},
    }
    best, worst = best_of(found)
    assert best == "b" and worst["b"] == pytest.approx(-0.1)
    assert worst["a"] == pytest.approx(-1.0)  # energy, a whole |-1| below b's and c's
    assert "b -10.0%" in said_of_best(best, worst)
    assert best_of({"x": {}}) == ("x", {"x": 0.0})
    assert best_of({"x": {"ILD": 1.0}, "y": {"ILD": 1.0, "energy": 9.0}})[0] == "x"  # a tie
    with pytest.raises(ValueError, match="nothing"):
        best_of({})
