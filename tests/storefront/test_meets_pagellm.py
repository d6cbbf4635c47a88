"""The two systems meet: PageLLM ranks the rows, and its reward reads them."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from experiments import storefront as study
from pagellm.data.shop import load
from pagellm.model.policy import Policy
from pagellm.pages.ranked import Scorer, seen_rows
from pagellm.stage.config import PageLLMError
from pagellm.storefront import build
from pagellm.storefront.front import Sources, open_store, page_ranker
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


def test_pagellm_s_policy_ranks_for_strangers_and_for_people_without_a_liked_item(both):
    """Strangers, and people of whom nothing is scored, get what is popular, not the first ids."""
    config = Sources(**both, ranker="policy", layout="B")
    store = open_store(config)
    for user in (None, "nobody at all"):
        found = page(replace(store.front, static=True), store.known.context(user), store.layout)
        for row in found.rows:
            assert (np.diff(store.front.households[row.item]) <= 0).all()
        assert len(page(store.front, store.known.context(user), store.layout).items()) > 40
    shop, user = store.shop, 5
    mine = shop.user == user
    nothing = replace(shop, positive=shop.positive & ~mine)
    for less in (nothing, replace(nothing, **columns_without(nothing, mine))):
        ranker = page_ranker(config, less, store.front.households)
        logit = ranker(store.known.context(shop.user_ids[user]))
        assert np.isfinite(logit).all() and len(np.unique(logit)) > 1
        front = replace(store.front, ranker=ranker)
        context, none = store.known.context(shop.user_ids[user]), np.zeros(0, np.int64)
        for asked in (context, replace(context, item=none, count=none)):
            assert len(page(front, asked, store.layout).items()) > 40 - len(context.item)


def columns_without(shop, gone):
    """The columns of a shop's rows without some of them."""
    names = ("user", "item", "rating", "time", "positive", "split")
    return {name: getattr(shop, name)[~gone] for name in names}


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
