"""Variety inside decoding: what it changes, against the definition, item by item."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.pages.energy import LAMBDA_D, LAMBDA_R
from pagellm.pages.rerank import Kin
from pagellm.pages.variety import KINDS, Variety


@pytest.fixture(scope="module")
def kin(shop):
    return Kin.of(shop.catalogue)


def change_of(kin, method, strength, page):
    """The change of every item's log-probability behind a page, straight from the definition."""
    n, out = len(kin.leaf), np.zeros(len(kin.leaf))
    for i in range(n):
        if method == "mmr":
            like = [kin.similarity(np.array([[i]]), np.array([j]))[0, 0] for j in page]
            out[i] = -strength * max(like, default=0.0)
        else:
            novel = kin.leaf[i] >= 0 and kin.leaf[i] not in [kin.leaf[j] for j in page]
            redundant = any(i in kin.near.of(j) for j in page)
            out[i] = strength * (LAMBDA_D * novel - LAMBDA_R * redundant)
    return out


@pytest.mark.parametrize("method", KINDS[1:])
@given(data=st.data())
@settings(deadline=None, max_examples=15)
def test_the_change_is_that_of_the_definition_whatever_stands_above(kin, method, data):
    n = len(kin.leaf)
    pages = data.draw(
        st.lists(st.lists(st.integers(0, n - 1), max_size=4, unique=True), min_size=1, max_size=3)
    )
    strength = data.draw(st.floats(0, 5))
    above = Variety(kin, method, strength).begin(len(pages))
    for slot in range(max(map(len, pages))):
        above.add(np.array([p[slot] if slot < len(p) else -1 for p in pages]))
    want = [change_of(kin, method, strength, page) for page in pages]
    np.testing.assert_allclose(above.change, want, atol=1e-5)
    rows = np.array([len(pages) - 1, 0])
    above.select(rows)
    np.testing.assert_allclose(above.change, [want[r] for r in rows], atol=1e-5)
    above.add(np.array([0, -1]))  # a page that was chosen twice goes on alone
    np.testing.assert_allclose(above.change[1], want[0], atol=1e-5)


def test_what_is_kept_of_similarities_is_bounded(kin, monkeypatch):
    monkeypatch.setattr("pagellm.pages.variety.KEPT", 3 * len(kin.leaf))
    variety = Variety(kin, "mmr", 1.0)
    above = variety.begin(1)
    for item in range(9):
        above.add(np.array([item]))
        assert len(variety.rows) <= 3


def test_other_methods_and_strengths_are_refused(kin):
    for method, strength in (("none", 1.0), ("dpp", 1.0), ("mmr", -1.0), ("mmr", np.inf)):
        with pytest.raises(ValueError, match="variety"):
            Variety(kin, method, strength)
