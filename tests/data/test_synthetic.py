"""The made-up shop: one seed gives one shop, it can be learned, and every format keeps it."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.data.prepare import Config, run
from pagellm.data.shop import load
from pagellm.data.synthetic import FORMATS, STYLES, make, write
from pagellm.stage.config import PageLLMError


@pytest.fixture(scope="module")
def shop():
    return make(users=300, items=200, seed=3)


@settings(deadline=None, max_examples=8)
@given(st.integers(2, 12), st.integers(10, 30), st.integers(0, 5))
def test_the_same_seed_draws_the_same_shop(users, items, seed):
    one, two, other = (
        make(users, items, seed),
        make(users, items, seed),
        make(users, items, seed + 1),
    )
    assert (
        one.items == two.items
        and one.user_ids == two.user_ids
        and list(one.reviews()) == list(two.reviews())
    )
    assert np.array_equal(one.truth, two.truth)
    assert not np.array_equal(one.truth, other.truth) and one.items != other.items


def test_shape_of_the_shop(shop):
    assert shop.truth.shape == (300, 200) and shop.truth.dtype == np.float32
    assert shop.truth.min() >= 1 and shop.truth.max() <= 5
    assert set(shop.rating.tolist()) <= {1, 2, 3, 4, 5}
    assert len(set(zip(shop.user.tolist(), shop.item.tolist(), strict=True))) == len(shop.user)
    assert len(set(shop.user_ids)) == 300 and len({item.id for item in shop.items}) == 200
    assert shop.user_ids != sorted(shop.user_ids)  # so that dense ids are not the shop's own order
    counts = np.bincount(shop.user, minlength=300)
    assert 25 < counts.mean() < 45 and counts.min() >= 12 and counts.max() > 2 * counts.mean()
    assert 0.58 < (shop.rating > 3).mean() < 0.68
    assert (shop.time % 86_400 == 0).all() and shop.time.min() > 0
    moves = np.diff(shop.time)[np.diff(shop.user) == 0]
    assert (moves >= 0).all() and (np.diff(shop.user) >= 0).all()


def test_ratings_are_the_truth_with_noise(shop):
    expected = shop.truth[shop.user, shop.item]
    error = shop.rating - expected
    assert (
        np.corrcoef(expected, shop.rating)[0, 1] > 0.8
        and 0.3 < error.std() < 0.9
        and abs(error.mean()) < 0.1
    )


def test_people_choose_what_they_like_and_what_is_popular(shop):
    assert shop.truth[shop.user, shop.item].mean() > shop.truth.mean() + 0.5
    share = np.sort(np.bincount(shop.item, minlength=200))[::-1]
    assert share[:20].sum() > 0.2 * share.sum()


def tokens(title):
    return set(re.findall(r"\w+", title.lower()))


def test_near_duplicates(shop):
    """8% of items have another's brand and leaf, a title like it, and are liked alike.

    Titles are alike from a Jaccard index of 0.8 on.
    """
    copies = np.flatnonzero(shop.copies >= 0)
    assert len(copies) == 16 and len(set(shop.copies[copies].tolist())) == 16
    for n in copies:
        one, two = shop.items[n], shop.items[shop.copies[n]]
        assert (
            one.brand == two.brand
            and one.paths == two.paths
            and one.id != two.id
            and shop.copies[shop.copies[n]] < 0
        )
        assert (
            len(tokens(one.title) & tokens(two.title)) / len(tokens(one.title) | tokens(two.title))
            >= 0.8
        )
        assert np.abs(shop.truth[:, n] - shop.truth[:, shop.copies[n]]).mean() < 0.3
    titles = [tokens(item.title) for n, item in enumerate(shop.items) if shop.copies[n] < 0]
    assert all(len(a & b) / len(a | b) < 0.8 for m, a in enumerate(titles) for b in titles[:m])


def test_text_tells_the_style(shop):
    """The first adjective of a title is a word for the item's strongest style, at the right end."""
    for item, style in zip(shop.items, shop.style, strict=True):
        strongest = np.argmax(np.abs(style))
        words = STYLES[strongest][int(style[strongest] > 0)]
        assert item.title.split()[1] in words or shop.copies[shop.items.index(item)] >= 0
        assert any(word.lower() in item.description for word in words)
        assert item.brand in item.description and item.paths[0][-1] in item.description
    for review, rating in zip(shop.reviews(), shop.rating, strict=True):
        assert ("I like things" in review.text) == (rating > 3) and review.text.count("\n") == 1


def test_a_good_recommender_beats_popularity_which_beats_chance():
    """EASE (Steck 2019) has at least twice the Recall@20 of popularity.

    There is structure to be learned.
    """
    shop = make(users=800, items=300, seed=0)
    positive = shop.rating > 3
    fold = np.random.default_rng(0).integers(0, 5, len(positive))
    train, test = np.zeros(shop.truth.shape), np.zeros(shop.truth.shape)
    for matrix, rows in ((train, positive & (fold > 0)), (test, positive & (fold == 0))):
        matrix[shop.user[rows], shop.item[rows]] = 1

    def recall(score):
        top = np.argsort(np.where(train > 0, np.inf, -score), axis=1, kind="stable")[:, :20]
        some = test.sum(1) > 0
        return (np.take_along_axis(test, top, 1).sum(1)[some] / test.sum(1)[some]).mean()

    inverse = np.linalg.inv(train.T @ train + 100 * np.eye(300))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    popularity, ease, truth = (
        recall(np.tile(train.sum(0), (800, 1))),
        recall(train @ weights),
        recall(shop.truth),
    )
    assert 1.5 * 20 / 300 < popularity and 1.5 * popularity < ease < truth


@settings(deadline=None, max_examples=6)
@given(st.integers(12, 30), st.integers(24, 40), st.integers(0, 9), st.booleans())
def test_every_format_reads_back_to_the_same_tables(tmp_path_factory, users, items, seed, compress):
    """Byte for byte; sequences carry what they can: pairs in the same order, titles, categories."""
    root = tmp_path_factory.mktemp("formats")
    shop = make(users, items, seed)
    first = run(Config(data=str(root), users=users, items=items, seed=seed, k_core=2))
    for spelling in FORMATS:
        write(shop, root / "raw" / spelling, spelling, compress)
        path = run(Config(dataset=spelling, data=str(root), seed=seed, k_core=2))
        if spelling != "sequences":
            for name in (
                "interactions.parquet",
                "items.parquet",
                "users.parquet",
                "reviews.parquet",
            ):
                assert (path / name).read_bytes() == (first / name).read_bytes(), (
                    f"{spelling}: {name}"
                )
            assert load(path).truth is None
    carried = load(root / "sequences")
    index = {item.id: item for item in shop.items}
    assert [index[name].title for name in carried.catalogue.ids] == carried.catalogue.title
    assert [
        index[name].paths[0][1:] for name in carried.catalogue.ids
    ] == carried.catalogue.categories
    assert np.isnan(carried.rating).all() and carried.positive.all() and not carried.reviews()[2]
    by_user = {
        name: [shop.items[i].id for i in shop.item[shop.user == u]]
        for u, name in enumerate(shop.user_ids)
    }
    for u, name in enumerate(carried.user_ids):
        kept = [carried.catalogue.ids[i] for i in carried.item[carried.user == u]]
        assert kept == [item for item in by_user[name] if item in kept]


def test_truth_follows_the_dense_ids(tmp_path):
    path = run(Config(data=str(tmp_path), users=60, items=50))
    shop, prepared = make(60, 50, 0), load(path)
    users = [shop.user_ids.index(name) for name in prepared.user_ids]
    items = [[item.id for item in shop.items].index(name) for name in prepared.catalogue.ids]
    assert np.array_equal(prepared.truth, shop.truth[users][:, items]) and users != sorted(users)


@pytest.mark.parametrize("users, items", [(1, 100), (100, 9)])
def test_too_small_a_shop(users, items):
    with pytest.raises(PageLLMError, match="at least 2 and 10"):
        make(users, items)


def test_an_unknown_format(tmp_path):
    with pytest.raises(PageLLMError, match="there are amazon2014"):
        write(make(2, 10), tmp_path, "xml")
