"""A page from opinions: each of the three numbers does what it says; the choice takes no setting
that is behind.
"""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.data.shop import Catalogue
from pagellm.pages import compose as compositions
from pagellm.pages.compose import (
    ENOUGH,
    Opinion,
    Taste,
    accuracy_lost,
    as_varied,
    choose,
    compose,
    margin,
    worst,
)
from pagellm.pages.energy import Near
from pagellm.pages.rerank import Kin, relevance

STEADY = settings(deadline=None, max_examples=40)
SEEDS = st.integers(0, 10_000)


def world(seed: int, n: int = 12, users: int = 3, m: int = 7):
    """A small catalogue with shared categories and near-duplicates, and candidates of a few users;
    scores differ.
    """
    rng = np.random.default_rng(seed)
    categories = [tuple(f"c{c}" for c in np.flatnonzero(rng.random(4) < 0.4)) for _ in range(n)]
    categories[n - 3 :] = categories[:3]  # near-duplicates lie in one category
    leaf = [names[-1] if names else "" for names in categories]
    catalogue = Catalogue.of(
        [str(i) for i in range(n)], [""] * n, [""] * n, categories, leaf, [""] * n, [np.nan] * n
    )
    kin = Kin.of(catalogue, Near.of_pairs(np.array([[n - 3, 0], [n - 2, 1], [n - 1, 2]]), n))
    item = np.stack([rng.permutation(n)[:m] for _ in range(users)])
    item[-1, m - 2 :] = -1  # a user with fewer candidates
    return (
        kin,
        categories,
        item,
        relevance(item, rng.permutation(users * m).reshape(users, m) / 7.0),
    )


def opinion(seed: int) -> tuple[Opinion, object]:
    kin, _, item, _ = world(seed)
    rng = np.random.default_rng(seed)
    return Opinion(
        np.arange(len(item)),
        item,
        rng.random(item.shape) * 0.2,
        rng.normal(size=item.shape),
        rng.normal(size=item.shape),
    ), kin


@STEADY
@given(SEEDS, st.integers(1, 8))
def test_all_zero_ranks_by_chance(seed, k):
    o, kin = opinion(seed)
    item, score, slots = compose(o, kin, Taste(), k)
    order = np.argsort(-np.where(o.item >= 0, o.chance, -1), axis=1)
    assert (item == np.take_along_axis(o.item, order, 1)).all()
    assert slots.tolist() == [min(k, int((mine >= 0).sum())) for mine in o.item]


@STEADY
@given(SEEDS, st.floats(0, 2), st.floats(0, 2), st.floats(0, 3), st.integers(1, 7))
def test_a_page_is_a_rearrangement_of_the_candidates_with_falling_scores(
    seed, worth, order, spread, k
):
    o, kin = opinion(seed)
    item, score, _ = compose(o, kin, Taste(worth, order, spread), k)
    assert (np.sort(item, 1) == np.sort(o.item, 1)).all()
    with np.errstate(invalid="ignore"):
        steps = np.diff(score, axis=1)
    assert (steps[~np.isnan(steps)] <= 0).all()


@STEADY
@given(SEEDS, st.floats(0, 2), st.floats(0, 3), st.integers(1, 7))
def test_order_moves_items_within_the_page_only(seed, worth, spread, k):
    o, kin = opinion(seed)
    pages = [compose(o, kin, Taste(worth, order, spread), k)[0] for order in (0.0, 1.5)]
    assert (np.sort(pages[0][:, :k], 1) == np.sort(pages[1][:, :k], 1)).all()
    assert (pages[0][:, k:] == pages[1][:, k:]).all()


@STEADY
@given(SEEDS, st.floats(0.01, 100))
def test_a_scale_of_all_chances_changes_nothing(seed, scale):
    """Spread is counted in mean chances, so rarer picks ask for no other number."""
    o, kin = opinion(seed)
    taste = Taste(0.3, 0.2, 0.7)
    again = Opinion(o.user, o.item, o.chance * scale, o.stars, o.mean)
    assert (compose(o, kin, taste, 4)[0] == compose(again, kin, taste, 4)[0]).all()


def test_stars_lift_an_item_by_worth():
    o = Opinion(
        np.array([0]),
        np.array([[4, 7]]),
        np.array([[0.2, 0.1]]),
        np.array([[0.0, 1.0]]),
        np.zeros((1, 2)),
    )
    kin, *_ = world(0)
    # 0.1 e^0.6 < 0.2 < 0.1 e^0.8
    assert compose(o, kin, Taste(worth=0.6), 1)[0].tolist() == [[4, 7]]
    assert compose(o, kin, Taste(worth=0.8), 1)[0].tolist() == [[7, 4]]


def test_a_margin_allows_1_percent_and_knows_what_is_better():
    ours, row = (
        {"ILD": np.array([0.5, 0.5]), "WMRD": np.array([3.0, 5.0])},
        {"ILD": np.array([0.6, 0.4]), "WMRD": np.array([5.0, 7.0])},
    )
    assert np.isclose(margin(ours, row, "ILD")[0], 0.005)
    assert np.isclose(margin(ours, row, "WMRD")[0], 2.06)
    assert worst(ours, [row], ("ILD", "WMRD")) == np.inf  # two users say nothing
    ours, row = ({n: np.tile(v, 20) for n, v in x.items()} for x in (ours, row))
    assert (
        worst(ours, [row], ("ILD", "WMRD"))
        == margin(ours, row, "ILD")[0] / margin(ours, row, "ILD")[1]
    )


def test_no_accuracy_is_sold_however_large_the_errors_are():
    """The difference has an error of 1% of the hits; variety is behind until the end. At 0.4 the
    means of the hits are equal, which is not sure enough; at 0.2 they are 2% higher.
    """
    noise = np.random.default_rng(0).normal(size=100) * 2

    def scored(taste):
        recall = 1.02 - 0.1 * max(taste.spread - 0.2, 0) + noise
        return {"ILD": 0.5 + taste.spread + noise / 100, "Recall@20": recall}

    apart = np.tile([0.1, -0.1], 50)
    row = {"ILD": 1.05 + apart / 100, "Recall@20": 1.0 + noise + apart}
    grid = {"worth": (0.0,), "order": (0.0,), "spread": (0.0, 0.2, 0.4, 0.6)}
    names = ("ILD", "Recall@20")
    taste, tried = choose(scored, [[row]], names, grid)
    assert taste.spread == 0.2 and tried[taste][0] == 0 and tried[Taste(0.0, 0.0, 0.4)][0] < 0
    sold = tried[Taste(0.0, 0.0, 0.6)]
    assert sold[0] < 0 and sold[1] > tried[taste][1]
    scores = scored(Taste())
    for share, lost in ((1.0, 0), (1.0004, 0), (1.0012, 1), (1.02, 20)):
        better = {"Recall@20": scores["Recall@20"] + (share - 1) * scores["Recall@20"].mean()}
        assert accuracy_lost(scores, [better], names) == lost
    # the same mean difference, unsure: one standard error more is lost
    swing = np.tile([0.5, -0.5], 50)
    unsure = {"Recall@20": scores["Recall@20"] + swing}
    share = 0.05 / abs(unsure["Recall@20"].mean())
    assert accuracy_lost(scores, [unsure], names) == round(share / 0.001) > 0
    assert accuracy_lost(scores, [{"ILD": scores["ILD"] * 9}], names) == 0


def test_the_choice_is_level_with_the_first_rows_before_it_looks_at_the_second(monkeypatch):
    """Of two measures one rises with spread and one falls; the first row is met in between, the
    second pulls on.
    """
    noise = np.random.default_rng(0).normal(size=400) * 0.1

    def scored(taste):
        return {"ILD": taste.spread + noise, "Recall@20": 1 - taste.spread + noise}

    def row(ild, recall):
        return {"ILD": np.full(400, ild) - noise, "Recall@20": np.full(400, recall) - noise}

    grid = {"worth": (0.0,), "order": (0.0,), "spread": tuple(np.linspace(0, 1, 11))}
    monkeypatch.setattr(compositions, "ACCURACY", ())
    names = ("ILD", "Recall@20")
    taste, tried = choose(scored, [[row(0.3, 0.3)], [row(0.65, 0.1)]], names, grid)
    # the second row alone is best met at 0.8, the first is not
    assert np.isclose(taste.spread, 0.6)
    first = worst(scored(taste), [row(0.3, 0.3)], names)
    assert tried[taste][1] == min(first, ENOUGH) == ENOUGH
    alone, _ = choose(scored, [[row(0.65, 0.1)]], names, grid)
    assert np.isclose(alone.spread, 0.8)


def test_spread_is_raised_to_the_variety_of_the_plain_row_where_no_accuracy_is_lost():
    rng = np.random.default_rng(0)
    noise = 0.01 * rng.normal(size=400)

    def row(hits: float, variety: float) -> dict[str, np.ndarray]:
        return {"Recall@20": hits + noise, "NDCG@100": hits + noise, "ILD": variety + noise}

    def scored(taste: Taste) -> dict[str, np.ndarray]:
        return row(0.40 - 0.05 * taste.spread, 0.5 + 0.1 * taste.spread)

    spreads = (0.0, 0.5, 1.0, 1.5, 2.0)
    start = Taste(0.1, 0.2, 0.5)
    # the smallest spread at which the variety is there, to an eighth of a step; the rest stays
    assert as_varied(start, scored, row(0.30, 0.5749), spreads) == Taste(0.1, 0.2, 0.75)
    assert as_varied(start, scored, row(0.30, 0.6251), spreads) == Taste(0.1, 0.2, 1.3125)
    # varied enough already, even where there are fewer hits than the plain row has
    assert as_varied(start, scored, row(0.99, 0.5499), spreads) == start
    # there is no such spread
    assert as_varied(start, scored, row(0.20, 0.80), spreads) == start
    # with it, there are fewer hits than the plain row has; with a little less spread there were not
    assert as_varied(start, scored, row(0.3374, 0.6249), spreads) == Taste(0.1, 0.2, 1.25)
    assert as_varied(start, scored, row(0.3376, 0.6249), spreads) == start
    for name in ("Recall@20", "NDCG@100"):
        better = row(0.30, 0.6249) | {name: 0.3376 + noise}
        assert as_varied(start, scored, better, spreads) == start
    bare = {name: x for name, x in row(0.30, 0.9).items() if name != "ILD"}
    assert as_varied(start, scored, bare, spreads) == start
