"""The study of ways to optimise: shares of the direct page's gain, and its options."""

import numpy as np
import pytest

from experiments import optimise, whole_page
from pagellm import ppo
from pagellm.online import page_reward, simulate
from pagellm.stage.config import PageLLMError


def test_shares_are_of_the_direct_gain_and_0_and_1_at_the_ends():
    rng = np.random.default_rng(0)
    start, gain = rng.normal(size=400), rng.uniform(0.5, 1.5, 400)
    found = optimise.shares({"SFT": start, "direct": start + gain, "half": start + gain / 2})
    assert (found["SFT"]["share"], found["direct"]["share"]) == (0.0, 1.0)
    assert found["half"]["share"] == pytest.approx(0.5)
    assert found["half"]["low"] == pytest.approx(0.5) == found["half"]["high"]


def test_every_row_is_an_option_of_ppo():
    for options in optimise.ROWS.values():
        assert ppo.Config(item_reward="outcome", w_page=0.0, **options).reads_outcome
    with pytest.raises(PageLLMError, match="some of"):
        optimise.Config(rows="nobody")


def test_the_softened_policy_gives_probabilities_of_what_was_logged(served, shop, tmp_path):
    config = simulate.Config(
        data=str(served / "data"), runs=str(tmp_path), run="r", pages=400, k=3, pool=6, columns=3
    )
    log = simulate.run(config)
    reward = page_reward.fit_reward(shop.catalogue, log, columns=3)
    same = whole_page.softened(reward, log, 0.0)
    assert np.allclose(same, log.propensity)  # weight 0 is the logging policy itself
    other = whole_page.softened(reward, log, 1.0)
    assert not np.allclose(other, log.propensity) and (other > 0).all() and (other <= 1).all()
