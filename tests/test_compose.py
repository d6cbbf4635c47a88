"""The stage compose: what it learns, what it keeps, and that evaluation and files use the same."""

import json
import shutil

import numpy as np
import pytest

from pagellm import compose, evaluate
from pagellm.data.shop import load
from pagellm.model.composer import Composer, picks, standardised
from pagellm.model.policy import Policy
from pagellm.pages import stats
from pagellm.pages.compose import Taste
from pagellm.pages.ranked import Scorer, seen_rows
from pagellm.stage.config import PageLLMError


@pytest.fixture(scope="module")
def composed(served, tmp_path_factory):
    """A shop with every stage up to ppo, and compose."""
    root = tmp_path_factory.mktemp("composed")
    shutil.copytree(served / "data", root / "data")
    for stage in ("sft", "ppo"):
        shutil.copytree(served / "runs" / "base" / stage, root / "runs" / "base" / stage)
    compose.run(compose.Config(**where(root), networks=1))
    return root


def where(root) -> dict:
    return {"run": "base", "data": str(root / "data"), "runs": str(root / "runs"), "k": 6}


def composer_of(root, **more) -> tuple[Composer, object]:
    shop = load(root / "data" / "synthetic")
    policy = Policy.load(root / "runs" / "base" / "sft")
    return Composer.load(root / "runs" / "base" / "compose", shop, policy, **more), shop


def test_done_says_what_was_chosen_and_what_the_outcome_model_knows(composed):
    done = json.loads((composed / "runs/base/compose/done").read_text())
    assert set(done["taste"]) == {"worth", "order", "spread"} and done["tried"] > 5
    assert len(done["reliability"]) == 10
    assert -1 <= done["correlation"]["outcome"]["mean"] <= 1
    choice = json.loads((composed / "runs/base/compose/choice.json").read_text())
    assert {r["base"] for r in choice["frontier"]} == {"EASE", "ALS", "ALS+facts", "ALS+ratings"}


def test_the_same_seed_gives_the_same_file(composed, tmp_path):
    shutil.copytree(composed / "runs", tmp_path / "runs")
    shutil.copytree(composed / "data", tmp_path / "data")
    shutil.rmtree(tmp_path / "runs/base/compose")
    compose.run(compose.Config(**where(tmp_path), networks=1))
    ids = [
        json.loads((r / "runs/base/compose/done").read_text())["id"] for r in (composed, tmp_path)
    ]
    assert ids[0] == ids[1]


def test_pages_hold_distinct_unseen_items_of_the_pool(composed):
    composer, shop = composer_of(composed)
    scorer, seen = Scorer(shop, "test"), seen_rows(shop, "test", "train+valid")
    pages = composer.rank(scorer.users, seen, 6, 20)
    for user, item, slots in zip(pages.user, pages.item, pages.slots, strict=True):
        kept = item[item >= 0].tolist()
        assert len(set(kept)) == len(kept) and not set(kept) & set(seen.of(user)[0].tolist())
        assert slots == min(6, len(kept))
    assert (np.diff(pages.score, axis=1)[pages.item[:, 1:] >= 0] <= 0).all()


def test_a_user_does_not_depend_on_the_others(composed):
    composer, shop = composer_of(composed)
    users, seen = Scorer(shop, "test").users, seen_rows(shop, "test", "train+valid")
    composer.taste = Taste(0.3, 0.2, 0.0)  # without spread: its unit is a mean over users
    together = composer.rank(users, seen, 6, 20)
    alone = composer.rank(users[:1], seen, 6, 20)
    assert together.item[0].tolist() == alone.item[0].tolist()


def test_evaluation_scores_composed_pages_beside_the_policies(composed):
    found = evaluate.run(
        evaluate.Config(**where(composed), depth=20, n_boot=20, examples=0, quiet=True)
    )
    assert list(found)[:4] == ["popularity", "sft", "ppo", "compose"]
    pages = composed / "runs/base/evaluate/compose/pages.parquet"
    assert pages.exists()


def test_held_out_rows_of_the_test_split_reach_nothing(composed, tmp_path):
    """Judges and pages of the train rows are the same whatever the test rows say."""
    composer, shop = composer_of(composed)
    before = composer.rank(np.arange(5), seen_rows(shop, "valid", "train"), 6, 20)
    test = shop.rows("test", None)
    other, _ = composer_of(composed)
    shop.item[test] = (shop.item[test] + 1) % shop.n_items
    changed = Composer(shop, other.policy, other.outcome, other.settings, other.scale, other.taste)
    after = changed.rank(np.arange(5), seen_rows(shop, "valid", "train"), 6, 20)
    assert np.array_equal(before.item, after.item)


def test_all_rows_may_be_known_to_the_judges_of_a_shop_that_ships(composed):
    every = ("train", "valid", "test")
    composer, shop = composer_of(composed, splits=every)
    pages = composer.rank(np.arange(5), shop.csr(every, positive=None), 6, 20)
    for user, item in zip(pages.user, pages.item, strict=True):
        assert not set(item[item >= 0]) & set(shop.csr(every, positive=None).of(user)[0])


def test_picks_are_the_held_out_candidates(composed):
    shop = load(composed / "data" / "synthetic")
    held = shop.csr("valid")
    user = int(np.flatnonzero(held.counts())[0])
    right = int(held.of(user)[0][0])
    wrong = next(i for i in range(shop.n_items) if i not in held.of(user)[0])
    item = np.array([[right, wrong, -1]])
    assert picks(np.array([user]), item, held, shop.n_items).tolist() == [[True, False, False]]


def test_correlation_within_users_knows_shift_scale_and_sign():
    picked = np.array([[True, False, False, True]])
    there = np.ones((1, 4), bool)
    score = np.array([[3.0, 1.0, 1.0, 3.0]])
    for factor, want in ((2.0, 1.0), (-1.0, -1.0)):
        assert stats.within_users(score * factor + 7, picked, there)[0] == pytest.approx(want)
    assert np.isnan(stats.within_users(score, picked & False, there)[0])


def test_a_shop_without_a_policy_gets_composed_pages(composed, tmp_path):
    """Nothing but data and compose: no policy is trained, none is asked, and the table says so."""
    shutil.copytree(composed / "data", tmp_path / "data")
    compose.run(compose.Config(**where(tmp_path), networks=1, policy="none"))
    done = json.loads((tmp_path / "runs/base/compose/done").read_text())
    assert set(done["correlation"]) == {"outcome"} and done["calibration"]["c"] == 0
    found = evaluate.run(
        evaluate.Config(**where(tmp_path), depth=20, n_boot=20, examples=0, quiet=True)
    )
    assert list(found) == ["popularity", "compose"]
    assert found["compose"]["NDCG@100"]["mean"] > found["popularity"]["NDCG@100"]["mean"]


def test_a_policy_s_opinion_has_mean_0_and_spread_1_among_the_candidates():
    logp = np.array([[-1.0, -2.0, -3.0, -9.0], [-1.0, -1.0, -1.0, -1.0]])
    z = standardised(logp, np.array([[0, 2, -1], [-1, -1, -1]]))
    assert z.tolist() == [[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]


def test_what_is_missing_or_wrong_is_said(tmp_path, composed):
    with pytest.raises(PageLLMError, match="sft, ppo or none"):
        compose.Config(policy="reward")
    with pytest.raises(PageLLMError, match="folds"):
        compose.Config(folds=3, share=0.5)
    (tmp_path / "s.json").write_text("[]")
    with pytest.raises(PageLLMError, match="settings of plain models"):
        compose.plain_settings(compose.Config(settings=str(tmp_path / "s.json")))
    with pytest.raises(PageLLMError, match="no sft policy"):
        compose.run(compose.Config(**where(composed) | {"run": "nowhere"}))
