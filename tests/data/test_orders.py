"""Orders beside a shop:

counted once a basket, newest first, and only beside the tables they were written for.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm.data import prepare
from pagellm.data.orders import Orders, load_orders, orders_of, write_orders
from pagellm.data.shop import load
from pagellm.stage.config import PageLLMError


@st.composite
def orders(draw):
    """A few lines of up to six baskets of three people, items repeated within baskets and among
    them.
    """
    lines = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=20))
    basket, item = (
        np.array(c, np.int64) for c in (zip(*lines, strict=True) if lines else ([], []))
    )
    n = len(lines)
    return Orders(
        basket % 3, item, basket, basket * 10, np.ones(n, np.int64), np.ones(n, np.float32),
        np.zeros(n, np.int8), 3, 5,
    )  # fmt: skip


@given(orders())
def test_an_item_counts_once_for_every_basket_that_holds_it(given_orders):
    user, item, count, last = given_orders.pairs()
    lines = set(zip(given_orders.user, given_orders.item, given_orders.basket, strict=True))
    for u, i, n, at in zip(user, item, count, last, strict=True):
        baskets = [b for x, y, b in lines if (x, y) == (u, i)]
        assert n == len(baskets) and at == max(baskets) * 10
    assert len(user) == len({(u, i) for u, i, _ in lines})


@given(orders())
def test_a_history_is_newest_first(given_orders):
    rows, count = given_orders.history()
    last = {(u, i): t for u, i, _, t in zip(*given_orders.pairs(), strict=True)}
    assert rows.indptr[-1] == len(count) == len(last)
    for u in range(3):
        times = [last[u, i] for i in rows.of(u)[0]]
        assert times == sorted(times, reverse=True)


@given(orders(), st.integers(0, 60))
def test_nothing_at_the_moment_or_later_is_known(given_orders, at):
    assert given_orders.where(given_orders.time < at).end() <= at


@given(orders(), st.integers(0, 1000))
def test_the_order_of_lines_moves_nothing(given_orders, seed):
    shuffled = given_orders.where(np.random.default_rng(seed).permutation(len(given_orders.user)))
    for a, b in zip(given_orders.pairs(), shuffled.pairs(), strict=True):
        assert a.tolist() == b.tolist()
    assert given_orders.baskets().items.tolist() == shuffled.baskets().items.tolist()


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    data = str(tmp_path_factory.mktemp("orders"))
    prepare.run(prepare.Config(data=data, users=40, items=30))
    return load(f"{data}/synthetic")


def test_a_shop_without_orders_counts_every_row_once(shop):
    assert load_orders(shop) is None
    found = orders_of(shop)
    assert (found.only("train").pairs()[2] == 1).all()
    assert len(found.only("train").user) == shop.rows("train").sum()


def lines_of(shop):
    found = orders_of(shop)
    names = ("user", "item", "basket", "time", "quantity", "paid", "split")
    return {name: getattr(found, name) for name in names}


def test_orders_come_back_as_they_were_written(shop):
    path = write_orders(shop.path, lines_of(shop))
    try:
        back, there = load_orders(shop), orders_of(shop)
        for a, b in zip(back.pairs(), there.pairs(), strict=True):
            assert a.tolist() == b.tolist()
        assert np.isnan(back.paid).all()
    finally:
        path.unlink()


def test_orders_of_another_preparation_are_refused(shop):
    path = write_orders(shop.path, lines_of(shop))
    source = shop.path / "source.json"
    before = source.read_text()
    try:
        source.write_text(before + " ")
        with pytest.raises(PageLLMError, match="written for another preparation"):
            load_orders(shop)
    finally:
        source.write_text(before)
        path.unlink()
