"""The stage compose: what it learns, what it keeps, and that evaluation and files use the same."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from pagellm import compose, evaluate, pipeline
from pagellm.data.shop import load
from pagellm.model import judges
from pagellm.model.als import item_groups
from pagellm.model.composer import Composer, Maker, load_composer, picks, standardised
from pagellm.model.judges import History, Judges, People, legal_items
from pagellm.model.plain import fit
from pagellm.model.policy import Policy
from pagellm.pages import compose as page_composition
from pagellm.pages import stats
from pagellm.pages.compose import Taste
from pagellm.pages.ranked import RankedPages, Scorer, seen_rows
from pagellm.stage.config import PageLLMError


def where(root) -> dict:
    return {"run": "base", "data": str(root / "data"), "runs": str(root / "runs"), "k": 6}


def composer_of(root) -> tuple[Composer, object]:
    shop = load(root / "data" / "synthetic")
    policy = Policy.load(root / "runs" / "base" / "sft")
    return Composer.load(root / "runs" / "base" / "compose", shop, policy), shop


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
    compose.run(compose.Config(**where(tmp_path), networks=1, fallback=False))
    ids = [
        json.loads((r / "runs/base/compose/done").read_text())["id"] for r in (composed, tmp_path)
    ]
    assert ids[0] == ids[1]


def test_what_does_not_depend_on_the_policy_is_shared_and_the_file_stays_the_same(
    composed, tmp_path, monkeypatch
):
    """As `pagellm tune` composes: without a policy, then with one; the second time nothing is
    fitted."""
    for part in ("data", "runs"):
        shutil.copytree(composed / part, tmp_path / part)
    shutil.rmtree(tmp_path / "runs/base/compose")
    shared, options = {}, where(tmp_path) | {"networks": 1, "fallback": False}
    compose.run(compose.Config(**options | {"run": "alone", "policy": "none"}), shared)
    for name in ("learn", "fit"):
        monkeypatch.setattr(compose, name, lambda *_, **__: pytest.fail("a model is fitted"))
    compose.run(compose.Config(**options), shared)
    ids = [
        json.loads((r / "runs/base/compose/done").read_text())["id"] for r in (composed, tmp_path)
    ]
    assert ids[0] == ids[1]
    apart = {
        compose.fitted_from(compose.Config(**options | more), {"data": data, "sft": "x"})
        for more in ({}, {"seed": 1}, {"eval_users": 9}, {"folds": 1})
        for data in ("a", "b")
    }
    assert len(apart) == 8


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
    """Pages and scores of the judges, to the last bit; the policy's numbers round by batch."""
    composer, shop = composer_of(composed)
    users, seen = Scorer(shop, "test").users, seen_rows(shop, "test", "train+valid")
    composer.taste = Taste(0.3, 0.2, 0.4)
    together = composer.rank(users, seen, 6, 20)
    for row in (0, 7):
        alone = composer.rank(users[row : row + 1], seen, 6, 20)
        assert together.item[row].tolist() == alone.item[0].tolist()
    composer.policy = None
    together, alone = (composer.rank(some, seen, 6, 20) for some in (users, users[3:4]))
    assert (together.score[3] == alone.score[0]).all()


def test_a_loaded_composer_writes_the_pages_of_the_one_that_was_fitted(
    composed, tmp_path, monkeypatch
):
    """Bit by bit, and no model is fitted on the way."""
    kept = []
    state = Composer.state
    monkeypatch.setattr(Composer, "state", lambda self: (kept.append(self), state(self))[1])
    for part in ("data", "runs"):
        shutil.copytree(composed / part, tmp_path / part)
    shutil.rmtree(tmp_path / "runs/base/compose")
    compose.run(compose.Config(**where(tmp_path), networks=1, fallback=False))
    for name in ("als", "fit_stars", "ease_weights", "knn_weights", "contents"):
        monkeypatch.setattr(judges, name, lambda *_, **__: pytest.fail("a model is fitted"))
    loaded, shop = composer_of(tmp_path)
    seen, users = seen_rows(shop, "test", "train+valid"), np.arange(shop.n_users)
    a, b = (composer.rank(users, seen, 6, 40) for composer in (kept[0], loaded))
    assert (a.item == b.item).all() and (a.score == b.score).all() and (a.slots == b.slots).all()
    plain = [
        composer.plain.write(
            shop.csr("train"), np.ones((shop.n_users, shop.n_items), bool), composer.kin, 6, 9
        )
        for composer in (kept[0], loaded)
    ]
    assert all((x == y).all() for x, y in zip(*plain, strict=True))


def test_a_history_given_by_hand_is_placed_where_the_fit_placed_its_user(composed):
    """The same rows, folded in from outside, give the numbers of the fit but for rounding."""
    composer, shop = composer_of(composed)
    known, users = composer.judges.known, np.arange(10)
    history = History.of(shop, shop.rows("train", None))
    people = composer.judges.people(History.joined([history.one(u) for u in users]))
    for name, x in people.factors.items():
        torch.testing.assert_close(x, known.factors[name][:10], atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(people.bias, known.bias[:10], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(people.taste, known.taste[:10], atol=2e-4, rtol=1e-3)
    for name in ("paid", "about", "first", "last"):
        np.testing.assert_allclose(getattr(people, name), getattr(known, name)[:10], atol=1e-5)
    legal = legal_items(seen_rows(shop, "test", "train+valid"), users, shop.n_items)
    pages = [composer.write(p, None, legal, 6, 20) for p in (people, known.select(users))]
    assert (pages[0].item == pages[1].item).mean() > 0.99
    alone = composer.judges.people(History.joined([history.one(4)]))
    assert (alone.factors["levels"][0] == people.factors["levels"][4]).all()


def test_what_somebody_likes_moves_the_page_and_what_is_unknown_breaks_nothing(composed):
    """A stranger without a history, one with a single event, and an item nobody chose in train."""
    composer, shop = composer_of(composed)
    nobody = composer.judges.people(History.joined([([], [], [], [])]))
    cold = int(np.argmin(np.bincount(shop.item[shop.rows("train", None)], minlength=shop.n_items)))
    one = composer.judges.people(
        History.joined([([cold], [np.nan], [True], [0]), ([3], [5.0], [True], [10**12])])
    )
    legal = np.ones((1, shop.n_items), bool)
    empty = composer.write(nobody, None, legal, 6)
    assert empty.slots[0] == 6 and np.isfinite(empty.score[empty.item >= 0]).all()
    many = np.bincount(shop.csr("train").items, minlength=shop.n_items)
    pool, _ = composer.judges.candidates(nobody, legal, 5)
    assert set(many[pool[0]]) == set(np.sort(many)[::-1][:5])  # the most liked, for lack of more
    told = composer.write(one, None, legal.repeat(2, 0), 6)
    assert not np.array_equal(told.chance[1], empty.chance[0])
    only = np.zeros((1, shop.n_items), bool)
    only[0, [7, 9]] = True
    few = composer.write(nobody, None, only, 6)
    assert set(few.item[0]) == {7, 9, -1} and few.slots[0] == 2
    assert (few.chance[0][few.item[0] < 0] == 0).all()


def test_evaluation_scores_composed_pages_beside_the_policies(composed):
    found = evaluate.run(
        evaluate.Config(**where(composed), depth=20, n_boot=20, examples=0, quiet=True)
    )
    assert list(found)[:4] == ["popularity", "sft", "ppo", "compose"]
    pages = composed / "runs/base/evaluate/compose/pages.parquet"
    assert pages.exists()


def test_held_out_rows_of_the_test_split_reach_nothing(composed):
    """Judges and pages of the train rows are the same whatever the test rows say."""
    composer, shop = composer_of(composed)
    before = composer.rank(np.arange(5), seen_rows(shop, "valid", "train"), 6, 20)
    test = shop.rows("test", None)
    shop.item[test] = (shop.item[test] + 1) % shop.n_items
    again = Judges.fit(
        shop.catalogue,
        History.of(shop, shop.rows("train", None)),
        composer.judges.settings,
    )
    after = Composer(
        shop,
        composer.policy,
        again,
        composer.outcome,
        composer.scale,
        composer.taste,
        composer.unit,
    ).rank(np.arange(5), seen_rows(shop, "valid", "train"), 6, 20)
    assert np.array_equal(before.item, after.item)


def test_a_policy_or_data_made_anew_are_told_from_those_that_compose_read(composed, tmp_path):
    base, made = composed / "runs/base", Maker.of(composed / "runs/base/compose", "make compose")
    data = made.inputs["data"]
    assert made.policy == "sft" and made.stale(lambda name, run: base / name, data) == []
    assert made.stale(lambda name, run: base / "ppo", "other") == ["data", "sft"]
    shop = load(composed / "data" / "synthetic")
    with pytest.raises(PageLLMError, match="another sft"):
        load_composer(base / "compose", shop, lambda *_: base / "ppo", "cpu", data, "make compose")


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
    assert set(done["correlation"]) == {"outcome", "ALS+facts"}
    policy, plain = done["calibration"]["c"]
    assert policy == 0 and plain != 0
    found = evaluate.run(
        evaluate.Config(**where(tmp_path), depth=20, n_boot=20, examples=0, quiet=True)
    )
    assert list(found) == ["popularity", "compose"]
    assert found["compose"]["NDCG@100"]["mean"] > found["popularity"]["NDCG@100"]["mean"]


def test_a_policy_s_opinion_has_mean_0_and_spread_1_among_the_candidates():
    score = np.array([[-1.0, -3.0, -9.0], [-1.0, -1.0, -2.0], [-4.0, -4.0, 0.0]])
    there = np.array([[True, True, False], [False, False, False], [True, True, False]])
    assert standardised(score, there).tolist() == [[1.0, -1.0, 0.0], [0.0] * 3, [0.0] * 3]


def test_the_judge_liked_has_the_settings_and_the_scores_of_the_plain_row(composed):
    """What the calibration weighs beside the outcome is ALS+facts itself, but for rounding."""
    composer, shop = composer_of(composed)
    settings = composer.judges.settings
    plain = compose.plain_settings(compose.Config())["ALS+facts"]
    assert all(settings[name] == plain for name in ("liked", "chosen"))
    users = np.arange(20)
    people = composer.judges.known.select(users)
    item, x = composer.judges.candidates(people, np.ones((20, shop.n_items), bool), 30)
    fitted = fit(
        "ALS+facts",
        shop.csr("train"),
        shop.n_users,
        shop.n_items,
        plain,
        0,
        None,
        item_groups(shop.catalogue),
    )
    scores = np.take_along_axis(fitted.score(users).numpy(), item, 1)
    np.testing.assert_allclose(composer.judges.score_in(x, "liked"), scores, atol=2e-3)


def test_where_everything_is_liked_two_judges_differ_by_their_settings(composed):
    _, shop = composer_of(composed)
    plain = compose.PLAIN | {"ALS+facts": {"factors": 8, "alpha0": 0.2, "reg": 0.1, "nu": 0.5}}
    found = judges.tuned(plain, shop)
    assert found["liked"] == found["chosen"] == plain["ALS+facts"]
    shop.positive[:] = True
    alike = judges.tuned(plain, shop)
    assert alike["liked"] == plain["ALS+facts"] and alike["chosen"] == judges.SETTINGS["chosen"]


def test_without_ratings_levels_keeps_settings_that_follow_the_size_of_the_shop(composed):
    _, shop = composer_of(composed)
    plain = compose.PLAIN | {"ALS+ratings": compose.PLAIN["ALS+ratings"] | {"factors": 9}}
    assert shop.rated and judges.tuned(plain, shop)["levels"]["factors"] == 9
    bare = replace(shop, rating=np.full_like(shop.rating, np.nan))
    assert not bare.rated and judges.tuned(plain, bare)["levels"] == judges.SETTINGS["levels"]
    many = 3 * judges.SIZED_FOR
    large = replace(bare, n_items=many)
    found = judges.tuned({}, large)
    for name in ("levels", "liked", "chosen"):
        own = judges.SETTINGS[name]
        assert found[name] == own | {"alpha0": pytest.approx(own["alpha0"] / 3)}
    assert found["EASE"] == judges.SETTINGS["EASE"]


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


def test_the_plain_rows_pages_are_taken_where_nothing_learnt_is_better(
    composed, tmp_path, monkeypatch
):
    """choose_taste compares them by the same margins; the composer then writes them, bit by bit."""
    composer, shop = composer_of(composed)
    scorer = Scorer(shop, "valid")
    users, seen = scorer.users, seen_rows(shop, "valid", "train")
    opinion, _, _ = composer.opinion(users, seen)
    blind = replace(opinion, chance=np.where(opinion.item >= 0, 1e-3, 0.0))
    knowing, config = perfect(opinion, scorer), compose.Config(**where(composed))
    pages = page_composition.compose(knowing, composer.kin, Taste(), 6, 100)
    best = scorer(RankedPages(users, *pages), 6)
    composer.plain_pages = True
    shipped = scorer(composer.rank(users, seen, 6, 100), 6)
    monkeypatch.setattr(compose, "MEASURES", ("Recall@20", "NDCG@100"))
    for think, plain in ((blind, True), (knowing, False)):
        rows = {"ALS+facts": [shipped], "EASE": [best]}
        found = compose.choose_taste(config, shop, scorer, think, rows, composer.kin, shipped)
        assert found[2] is plain
    alone = replace(config, fallback=False)
    assert not compose.choose_taste(alone, shop, scorer, blind, rows, composer.kin, shipped)[2]
    torch.save(composer.state(), tmp_path / "model.pt")
    loaded = Composer.load(tmp_path, shop, None)
    pages, people = loaded.rank(users, seen, 6, 9), loaded.judges.known.select(users)
    legal = legal_items(seen, users, shop.n_items)
    plain = loaded.plain.write(people.liked, legal, loaded.kin, 6, 9)
    assert (pages.item == plain.item).all() and (pages.score == plain.score).all()
    # the plain row knows nothing about a person without likes, and scores all items 0
    nobody = loaded.judges.people(History.joined([([], [], [], [])]))
    some, every = (
        People.joined([people.select(np.arange(2)), nobody]),
        np.ones((3, shop.n_items), bool),
    )
    assert loaded.asks_policy(some) and not loaded.asks_policy(people)
    mixed = loaded.write(some, None, every, 6, 100)
    learnt = loaded.write_learnt(nobody, None, every[:1], 6, 100)
    known = loaded.plain.write(some.liked, every, loaded.kin, 6, 100)
    assert (mixed.item[:2] == known.item[:2]).all() and (
        mixed.item[2] == learnt.item[0, : mixed.item.shape[1]]
    ).all()
    assert mixed.slots.tolist() == [6, 6, 6]


def perfect(opinion, scorer):
    """An opinion that knows the held-out items of two users in three."""
    held = scorer.held
    code = np.repeat(np.arange(len(held.indptr) - 1), held.counts()) * 10_000 + held.items
    hit = np.isin(opinion.user[:, None] * 10_000 + opinion.item, code) & (opinion.item >= 0)
    return replace(opinion, chance=opinion.chance + (hit & (opinion.user[:, None] % 3 > 0)))


@pytest.mark.parametrize("plain", [True, False])
def test_evaluate_and_fit_say_whose_pages_they_are(tmp_path, plain):
    done = tmp_path / "runs/base/compose/done"
    done.parent.mkdir(parents=True)
    done.write_text(json.dumps({"plain_pages": plain}))
    (done.parent / "config.json").write_text(json.dumps({"config": {"policy": "sft"}}))
    config = pipeline.Config(run="base", data=str(tmp_path), runs=str(tmp_path / "runs"))
    assert evaluate.is_plain(done) is plain
    assert ("ALS+facts with MMR" in pipeline.what_it_is(config, "compose")) is plain
