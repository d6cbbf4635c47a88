"""Propensities of rows: another policy's worth, read off an exploring log, is what it truly is."""

import itertools

import numpy as np
import pyarrow.parquet as pq
import pytest

from pagellm.online import ope
from pagellm.online.simulator import READERS, World, expected, visit
from pagellm.stage.config import PageLLMError
from pagellm.storefront.fuse import Quota, SameLeaf, fill
from pagellm.storefront.parts import Candidates
from pagellm.storefront.sessions import session_table

USERS, M, K, VISITS = 20, 7, 3, 20_000
LOGGED, TARGET = 1.0, 0.5  # temperatures


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    click, buy = rng.uniform(0.05, 0.6, (USERS, M)), rng.uniform(0.2, 0.9, (USERS, M))
    return World(click, buy, np.ones(M), READERS["rows"])


@pytest.fixture(scope="module")
def shelf(world):
    """score (U, M) of the candidates, better for what is bought, and a quota by likeness."""
    noise = np.random.default_rng(1).normal(0, 0.5, (USERS, M))
    alike = SameLeaf(np.arange(M) % 3, np.zeros(M, dtype=np.int64))
    return np.log(world.click * world.buy) + noise, Quota(alike, 0.5)


def row(shelf, user, explore, uniform, given=None):
    score, quota = shelf
    found = Candidates(np.arange(M), np.zeros(M), np.zeros(M), np.zeros(M, np.int64))
    return fill(score[user], found, K, quota, np.zeros(M, bool), explore, uniform, given)


def test_a_given_row_has_the_propensities_that_its_own_draws_would_have(shelf):
    rng = np.random.default_rng(2)
    for user in range(USERS):
        drawn = row(shelf, user, LOGGED, rng.random(K))
        again = row(shelf, user, LOGGED, np.zeros(0), drawn.place)
        assert again.item.tolist() == drawn.item.tolist()
        assert again.propensity == pytest.approx(drawn.propensity, rel=1e-12)
        assert again.score == pytest.approx(drawn.score, rel=1e-12)
    best = row(shelf, 0, 0.0, np.zeros(0))
    assert row(shelf, 0, 0.0, np.zeros(0), best.place).propensity.tolist() == [1.0] * K
    assert 0.0 in row(shelf, 0, 0.0, np.zeros(0), best.place[::-1]).propensity
    with pytest.raises(ValueError, match="is shown above already"):
        row(shelf, 0, LOGGED, np.zeros(0), np.array([1, 1, 2]))


def test_propensities_of_all_rows_sum_to_one(shelf):
    rows = itertools.permutations(range(M), K)
    total = sum(row(shelf, 3, LOGGED, np.zeros(0), np.array(r)).propensity.prod() for r in rows)
    assert total == pytest.approx(1.0, rel=1e-9)


def test_ips_finds_the_worth_of_another_temperature(shelf, world, tmp_path):
    """Within three standard errors of the truth, which every possible row is summed for."""
    rng = np.random.default_rng(4)
    user = rng.integers(0, USERS, VISITS)
    drawn = [row(shelf, u, LOGGED, rng.random(K)) for u in user.tolist()]
    item = np.array([one.item for one in drawn])
    propensity = np.array([one.propensity for one in drawn])
    target = np.array(
        [
            row(shelf, u, TARGET, np.zeros(0), one.place).propensity
            for u, one in zip(user.tolist(), drawn, strict=True)
        ]
    )
    reward = visit(world, user, item, rng).bought.astype(float)
    path = tmp_path / "sessions.parquet"
    # Each visit is by a person of its own, so that errors are those of independent visits.
    pq.write_table(session_table(np.arange(VISITS), item, reward, propensity, target), path)
    found = ope.estimates(ope.read_log(path))

    pages = np.array(list(itertools.permutations(range(M), K)))
    truth = np.zeros(USERS)
    for u in range(USERS):
        chance = [row(shelf, u, TARGET, np.zeros(0), page).propensity.prod() for page in pages]
        worth = expected(world, np.full(len(pages), u), pages)["purchases"]
        truth[u] = np.array(chance) @ worth
    wanted = truth[user].mean()
    for name in ("IPS", "SNIPS", "cascade IPS"):
        assert not found[name].refused
        assert abs(found[name].value - wanted) < 3 * found[name].se, name
    # The logging policy itself is worth less: the estimate is not simply its mean.
    assert found["IPS"].value > reward.sum(1).mean()


def test_a_log_without_exploring_is_refused():
    ones = np.ones((4, 2))
    with pytest.raises(PageLLMError, match="no slot was explored"):
        session_table(np.arange(4), np.zeros((4, 2), int), ones, ones, ones)
    with pytest.raises(ValueError, match="want"):
        session_table(np.arange(3), np.zeros((4, 2), int), ones, ones, ones)
