"""Time: tokens show the period, pages come after their history, a planted fashion is learned."""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from experiments import drift
from pagellm import evaluate, ppo, pretrain, reward, sft
from pagellm.data import prepare
from pagellm.data.shop import load
from pagellm.model.policy import Policy, PromptStyle
from pagellm.model.prompts import Prompts
from pagellm.model.vocab import SPECIALS, Vocab
from pagellm.pages import ranked, truth
from pagellm.serving import export, recommend
from pagellm.stage import randomness
from pagellm.stage.config import PageLLMError

NANO = {"size": "nano", "steps": 4, "batch": 8, "rating_batch": 8, "words": 300}
SMALL = {"epochs": 1, "batch": 16, "max_history": 8, "k": 6}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A small shop split by time, and a policy whose prompts show four periods."""
    root = tmp_path_factory.mktemp("drift")
    prepare.run(prepare.Config(data=str(root / "data"), users=80, items=60, split="temporal"))
    common = {
        "data": str(root / "data"),
        "runs": str(root / "runs"),
        "device": "cpu",
        "run": "timed",
    }
    pretrain.run(pretrain.Config(**common, **NANO, times=4))
    sft.run(sft.Config(**common, **SMALL, cut="time"))
    return root


def test_time_tokens_stand_behind_the_other_specials_and_change_nothing_else(tmp_path):
    plain, timed = (Vocab.train(["a history of words"], 3, 4, 260, times) for times in (0, 5))
    assert timed.time(0) == timed.n_words + len(SPECIALS) and timed.user0 == plain.user0 + 5
    assert timed.decode([timed.time(0), timed.page, timed.time(4)]) == "<t1><page><t5>"
    assert [plain.special(s) for s in SPECIALS] == [timed.special(s) for s in SPECIALS]
    for vocab, period in ((plain, 0), (timed, 5), (timed, -1)):
        with pytest.raises(ValueError, match="outside"):
            vocab.time(period)
    for vocab in (plain, timed):
        vocab.save(tmp_path)
        assert Vocab.load(tmp_path).times == vocab.times and (
            "times" in (tmp_path / "vocab.json").read_text()
        ) == (vocab.times > 0)


def test_the_token_stands_before_the_page_and_only_if_asked():
    vocab = Vocab.train(["a history of words"], 3, 4, 260, 5)
    history = [2, 1], [5.0, 4.0]
    silent, shown = Prompts(vocab, 40), Prompts(vocab, 40, now=4)
    row = silent.page(1, *history)
    assert shown.page(1, *history) == [*row[:-1], vocab.time(4), vocab.page]
    assert silent.page(1, *history, period=0) == [*row[:-1], vocab.time(0), vocab.page]
    assert (
        silent.page_room
        == Prompts(Vocab.train(["a history of words"], 3, 4, 260), 40).page_room + 1
    )


def test_moments_become_periods_and_no_moment_is_now(root):
    shop, policy = load(root / "data" / "synthetic"), Policy.load(root / "runs" / "timed" / "sft")
    clock = policy.style.clock
    train = np.sort(shop.time[shop.rows("train")])
    assert len(clock) == 3 and list(clock) == sorted(clock)
    shares = np.diff([0, *np.searchsorted(train, clock), len(train)]) / len(train)
    assert shares == pytest.approx(0.25, abs=0.02)
    when = np.array([clock[0] - 1, clock[0], clock[2], clock[2] + 10**9])
    assert policy.periods(when, 4) == [0, 1, 3, 3]
    history = [shop.csr("train").of(0)] * 4
    ids, _ = policy.prompt([0] * 4, history, when)
    v = policy.vocab
    assert ids[:, -2].tolist() == [v.time(p) for p in (0, 1, 3, 3)] and (ids[:, -1] == v.page).all()
    now, _ = policy.prompt([0], history[:1])
    assert now[0].tolist() == ids[3].tolist()
    assert "clock" not in Policy(policy.model, v, PromptStyle()).state()["style"]


def test_pages_come_after_their_history(root):
    shop = load(root / "data" / "synthetic")
    maker, train = truth.PageMaker(shop), shop.csr("train")
    place = {
        (u, i): t
        for u, i, t in zip(shop.user.tolist(), shop.item.tolist(), shop.time.tolist(), strict=True)
    }
    lengths = set()
    for user in maker.users[:30].tolist():
        for draw in range(4):
            (items, ratings), page, when = maker.later(user, randomness.rng(0, user, draw))
            assert len(items) == len(ratings) > 0 and len(page) and not set(items) & set(page)
            assert set(items) | set(page) <= set(train.of(user)[0])
            assert (
                max(place[user, i] for i in items.tolist())
                <= when
                == min(
                    place[user, i] for i in set(train.of(user)[0].tolist()) - set(items.tolist())
                )
            )
            lengths.add(len(items))
    assert len(lengths) > 5


def test_a_moment_is_that_of_the_first_held_out_positive(root):
    shop = load(root / "data" / "synthetic")
    moments = shop.moments("test")
    for user in range(20):
        mine = (shop.user == user) & shop.rows("test")
        if mine.any():
            assert (
                moments[user]
                == shop.time[mine].min()
                >= shop.time[(shop.user == user) & shop.rows("train")].max()
            )
    assert (shop.moments("unused") == shop.time[shop.rows("train", None)].max()).all()


def test_every_later_stage_reads_time_tokens(root, capsys):
    """Reward, PPO and served pages show the last period, evaluate and validation each user's."""
    common = {
        "data": str(root / "data"),
        "runs": str(root / "runs"),
        "device": "cpu",
        "run": "timed",
    }
    reward.run(reward.Config(**common, per_kind=1, epochs=1, batch=32, warmup=2))
    ppo.run(
        ppo.Config(
            **common,
            epochs=1.0,
            rollout=16,
            minibatch=8,
            micro=4,
            inner_epochs=1,
            k=6,
            eval_every=2,
            min_steps=1,
            critic_warmup=2,
            force=True,
            lr=1e-3,
        )
    )
    evaluate.run(
        evaluate.Config(
            **common, k=6, depth=20, policies="sft,ppo", n_boot=10, mode="greedy", quiet=True
        )
    )
    shop, where = load(root / "data" / "synthetic"), root / "runs" / "timed"
    moments, seen = shop.moments("test"), ranked.seen_rows(shop, "test", "train+valid")
    for stage in ("sft", "ppo"):
        policy = Policy.load(where / stage)
        assert policy.vocab.times == 4 and len(policy.style.clock) == 3
        got = ranked.read_pages(where / "evaluate" / stage / "pages.parquet", shop)
        then, now = (
            policy.rank(got.user, shop.csr("train"), seen, 6, 20, when=when)
            for when in (moments, None)
        )
        earlier = np.array(policy.periods(moments[got.user], len(got.user))) < 3
        assert earlier.any() and not earlier.all()
        assert np.array_equal(got.item, then.item) and np.array_equal(got.score, then.score)
        assert (got.score[earlier] != now.score[earlier]).any(1).all()
        assert np.array_equal(got.score[~earlier], now.score[~earlier])
    recommend.run(recommend.Config(**common, user=shop.user_ids[0], k=3, policy="ppo"))
    assert f"user {shop.user_ids[0]}" in capsys.readouterr().out
    export.run(export.Config(**common))
    users = np.load(where / "export-ppo" / "user_content.npy")
    policy = Policy.load(where / "ppo")
    prompt, valid = policy.prompt([0], [shop.csr(None).of(0)])
    assert prompt[0, -2] == policy.vocab.time(3)
    with torch.no_grad():
        assert users[0] == pytest.approx(policy.model(prompt, valid)[0, -1].numpy(), abs=5e-3)


def test_time_tokens_want_pages_that_come_after_their_history(root, tmp_path):
    shutil.copytree(root / "runs" / "timed" / "pretrain", tmp_path / "timed" / "pretrain")
    with pytest.raises(PageLLMError, match="give --cut time"):
        sft.run(
            sft.Config(
                data=str(root / "data"), runs=str(tmp_path), device="cpu", run="timed", **SMALL
            )
        )
    with pytest.raises(PageLLMError, match="cut='x'"):
        sft.Config(cut="x")


def test_a_fashion_is_planted_in_time_and_nowhere_else(root, tmp_path):
    shop = load(root / "data" / "synthetic")
    drift.plant(shop.path, tmp_path / "planted", 0)
    drift.plant(shop.path, tmp_path / "planted", 0)
    got = load(tmp_path / "planted")
    code = [np.sort(s.user * s.n_items + s.item) for s in (shop, got)]
    assert np.array_equal(*code)
    assert (np.diff(got.user) >= 0).all() and (np.diff(got.time)[np.diff(got.user) == 0] >= 0).all()
    by_item = dict(
        zip(
            zip(shop.user.tolist(), shop.item.tolist(), strict=True),
            shop.rating.tolist(),
            strict=True,
        )
    )
    assert all(
        by_item[u, i] == r
        for u, i, r in zip(got.user.tolist(), got.item.tolist(), got.rating.tolist(), strict=True)
    )
    top = np.array([names[0] for names in got.catalogue.categories])[got.item]
    late = got.time > np.quantile(got.time, 0.9)
    share = [max(np.mean(x == name) for name in set(top)) for x in (top, top[late])]
    assert share[1] > 2 * share[0]  # few departments hold the latest tenth
    users, items, _ = got.reviews()
    train = set(
        zip(*(x[got.rows("train", None)].tolist() for x in (got.user, got.item)), strict=True)
    )
    assert len(users) and set(zip(users.tolist(), items.tolist(), strict=True)) <= train
    with pytest.raises(PageLLMError, match="planted differently"):
        drift.plant(shop.path, tmp_path / "planted", 1)


def test_recent_popularity_counts_the_latest_rows(root):
    shop = load(root / "data" / "synthetic")
    users, seen = np.arange(5), shop.csr("train", positive=None)
    rows = np.flatnonzero(shop.rows("train"))
    late = rows[np.argsort(shop.time[rows], kind="stable")[-round(0.1 * len(rows)) :]]
    count = np.bincount(shop.item[late], minlength=shop.n_items)
    got = drift.recent_pages(shop, users, seen, 0.1)
    for row in range(5):
        shown = got.item[row][got.item[row] >= 0]
        assert not set(shown) & set(seen.of(row)[0]) and (np.diff(count[shown]) <= 0).all()


def test_rows_of_one_moment_are_recent_together(root):
    """With one time in all rows, the latest tenth is all of them, whatever their order."""
    shop = load(root / "data" / "synthetic")
    shop = dataclasses.replace(shop, time=np.zeros_like(shop.time))
    seen = shop.csr("train", positive=None)
    got, whole = (drift.recent_pages(shop, np.arange(5), seen, share) for share in (0.1, 1.0))
    assert (got.item == whole.item).all()


def test_the_study_runs_and_says_what_it_cannot_do(tmp_path, capsys):
    data = tmp_path / "data"
    base = {
        "data": str(data),
        "runs": str(tmp_path / "runs"),
        "seeds": 1,
        "times": 4,
        "prepare": "--users 80 --items 60",
        "pretrain": "--size nano --steps 3 --batch 8 --words 300 --device cpu",
        "sft": "--epochs 1 --batch 16 --max_history 8 --k 6 --device cpu",
    }
    records = drift.run(drift.Config(**base))
    assert len({r["variant"] for r in records}) == 6
    assert "random split → temporal split" in capsys.readouterr().out
    # the study prepared the missing data sets
    for folder, split in ((data, "random"), (data / "temporal", "temporal")):
        made = json.loads((folder / "synthetic" / "source.json").read_text())["config"]
        assert (made["users"], made["items"], made["split"]) == (80, 60, split)
    with pytest.raises(PageLLMError, match="--prepare must not set split"):
        drift.run(drift.Config(**base | {"prepare": "--split leave_one_out"}))
    drift.run(drift.Config(**base, planted=True))
    assert pq.read_table(tmp_path / "runs" / "drift" / "synthetic-planted.parquet").num_rows == len(
        records
    )
    with pytest.raises(PageLLMError, match="--pretrain must not set times"):
        drift.run(drift.Config(**base | {"pretrain": "--times 3"}))
    with pytest.raises(PageLLMError, match="for the synthetic shop only"):
        drift.Config(dataset="toys", planted=True)
