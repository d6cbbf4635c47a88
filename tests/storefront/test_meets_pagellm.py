"""The two systems meet: PageLLM ranks the rows, and its reward reads them."""

import shutil

import numpy as np
import pytest

from experiments import storefront as study
from pagellm.data.shop import load
from pagellm.model.policy import Policy
from pagellm.pages.ranked import Scorer, seen_rows
from pagellm.stage.config import PageLLMError
from pagellm.storefront import build
from pagellm.storefront.front import Sources, open_store
from pagellm.storefront.page import page


@pytest.fixture(scope="module")
def both(served, tmp_path_factory):
    """A run with PageLLM's stages and a storefront."""
    root = tmp_path_factory.mktemp("both")
    shutil.copytree(served / "runs" / "base", root / "base")
    options = {"data": str(served / "data"), "runs": str(root), "run": "base", "device": "cpu"}
    build.run(build.Config(**options))
    return options


def test_pagellm_s_policy_ranks_the_rows(both):
    """A static row of the page is the policy's own order of its category."""
    store = open_store(Sources(**both, ranker="policy", static=True, layout="B"))
    assert store.front.ranker.name.startswith("ppo/")
    config = Sources(**both)
    policy = Policy.load(config.stage("ppo"))
    history = store.shop.csr("train")
    for user in (0, 7):
        context = store.known.context(store.shop.user_ids[user])
        prompt, valid = policy.prompt(np.array([user]), [history.of(user)])
        logits = policy.model.item_logits(policy.model(prompt, valid)[:, -1])[0].detach().numpy()
        for row in page(store.front, context, store.layout).rows:
            assert (np.diff(logits[row.item]) <= 1e-5).all()


def test_a_ranker_that_is_not_trained_is_named(both):
    with pytest.raises(PageLLMError, match="no compose in"):
        open_store(Sources(**both, ranker="compose"))


def test_pagellm_s_reward_reads_pages_of_rows_and_visitors_walk_them(both):
    shop = load(f"{both['data']}/synthetic")
    scorer, seen = Scorer(shop, "test"), seen_rows(shop, "test", "train+valid")
    users = scorer.users[:6]
    store = open_store(Sources(**both, layout="B"))
    pages = {
        study.FIRST: study.rows_of_everybody(store, users, seen, study.grid()),
        "other": study.rows_of_everybody(store, users[:6], seen, study.grid(10)),
    }
    for user, item in zip(users.tolist(), pages[study.FIRST].item, strict=True):
        assert not np.isin(item[item >= 0], seen.of(user)[0]).any()
    config = study.Config(**both, visitors=200, n_boot=20)
    reward = study.rewards(config, shop, pages)
    assert all(np.isfinite(r).all() and len(r) == 6 for r in reward.values())
    exact, test = study.tested(config, shop, pages)
    view, visit = exact[study.FIRST]
    assert (visit >= view).all() and (view > 0).all()  # a visit has one page view at least
    assert test["other"]["per view"]["value"] > 0
