"""Shortlists: of all legal items they give what the whole catalogue gives; else what they hold."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from pagellm import ppo
from pagellm.data.shop import Rows
from pagellm.model.als import transpose
from pagellm.model.decode import LegalItems, greedy, page_logp, sample, slot_states
from pagellm.model.shortlist import READ, Proposals, Shortlist, best_items, columns_of, neighbours
from pagellm.ppo_step import exact_kl, legal_logits
from tests.model.test_decode import MODEL, N, make_model, prompts
from tests.strategies import seeds

OTHER = make_model(3)


def whole(ids, valid, excluded):
    """Shortlists of all legal items."""
    hidden = MODEL(ids, valid)[:, -1]
    return best_items(hidden, MODEL.item, excluded, N)


@settings(deadline=None, max_examples=12)
@given(prompts(), st.integers(1, 9), seeds, st.sampled_from([1.0, 0.3]))
def test_a_shortlist_of_all_items_is_the_catalogue(batch, k, seed, tau):
    ids, valid, excluded, _ = batch
    found = whole(ids, valid, excluded)
    uniform = torch.rand(
        len(ids), k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    short, ref = (Shortlist(model, found) for model in (MODEL, OTHER))
    for mine, all_items in (
        (
            sample(MODEL, ids, valid, short.constraint(), uniform, tau, None, short),
            sample(MODEL, ids, valid, LegalItems(excluded, N), uniform, tau),
        ),
        (
            greedy(MODEL, ids, valid, short.constraint(), k, short=short),
            greedy(MODEL, ids, valid, LegalItems(excluded, N), k),
        ),
    ):
        assert torch.equal(mine.item, all_items.item) and torch.equal(mine.mask, all_items.mask)
        assert_close(mine.logp, all_items.logp, atol=1e-5, rtol=1e-5)
    item, mask = mine.item, mine.mask
    gradients, results, kls = [], [], []
    for way in (0, 1):
        MODEL.zero_grad()
        states = slot_states(MODEL, ids, valid, item, mask)
        theirs = slot_states(OTHER, ids, valid, item, mask)
        if way:
            short = Shortlist(MODEL, found)
            logp, entropy = short.logp(states, item, mask, tau)
            logits = short.legal_logits(states, item, mask), ref.legal_logits(theirs, item, mask)
        else:
            logp, entropy = page_logp(states, MODEL.item, item, mask, excluded, tau, True)
            logits = (
                legal_logits(states, MODEL, item, excluded),
                legal_logits(theirs, OTHER, item, excluded),
            )
        (logp.sum() + 0.3 * entropy.sum()).backward()
        results.append((logp, entropy))
        kls.append(exact_kl(*(x / tau for x in logits), mask))
        gradients.append([p.grad.clone() for p in MODEL.parameters() if p.grad is not None])
    for a, b in zip(results[0], results[1], strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert_close(*kls, atol=1e-5, rtol=1e-5)
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=20)
@given(seeds, st.integers(1, 12), st.integers(0, 6))
def test_shortlists_hold_what_is_proposed_and_then_the_best(seed, size, proposed):
    g = torch.Generator().manual_seed(seed)
    n = 9
    hidden, rows = torch.randn(4, 3, generator=g), torch.randn(n, 3, generator=g)
    excluded = torch.randint(-1, n, (4, 5), generator=g)
    ids = torch.randint(-1, n, (4, proposed), generator=g)
    allowed = torch.rand(4, n, generator=g) < 0.8
    found = best_items(hidden, rows, excluded, size, ids if proposed else None, allowed)
    scores = hidden @ rows.T
    for u in range(4):
        legal = set(range(n)) - set(excluded[u].tolist())
        legal &= set(allowed[u].nonzero().flatten().tolist())
        first = [i for i in dict.fromkeys(ids[u].tolist()) if i in legal]
        rest = sorted(legal - set(first), key=lambda i: -scores[u, i].item())
        want = sorted((first + rest)[:size])
        assert found[u].tolist() == [-1] * (min(size, n) - len(want)) + want


def test_columns_are_where_items_stand():
    candidates = torch.tensor([[-1, 2, 5], [0, 1, 7]])
    items = torch.tensor([[5, -1, 3, 2, 5], [7, 0, 8, -1, 2]])
    assert columns_of(candidates, items).tolist() == [[2, -1, -1, 1, 2], [2, 0, -1, -1, -1]]


def rows_of(lists):
    """Rows of these items of every user."""
    indptr = np.cumsum([0, *map(len, lists)])
    items = np.array([i for some in lists for i in some], np.int64)
    return Rows(indptr, items, np.full(len(items), np.nan, np.float32))


def test_neighbours_are_counted_as_they_say():
    rng = np.random.default_rng(0)
    rows = rows_of([rng.permutation(12)[: 1 + u % 5] for u in range(20)])
    by_item = transpose(rows, 12)
    assert by_item.counts().max() <= READ  # so that nobody is left out
    found = neighbours(rows, by_item, np.arange(10), 4)
    for user, mine in enumerate(found):
        score = Counter()
        for h in rows.of(user)[0]:
            for other in by_item.of(h)[0]:
                for i in rows.of(other)[0]:
                    score[i] += 1 / np.sqrt(by_item.counts()[h] * by_item.counts()[i])
        kept = mine[mine >= 0]
        assert len(set(kept)) == len(kept) == min(4, len(score))
        values = np.array([score[i] for i in kept])
        assert (np.diff(values) <= 1e-9).all()
        left = [v for i, v in score.items() if i not in set(kept)]
        assert not left or max(left) <= values[-1] + 1e-9


def test_of_an_item_that_everybody_has_some_users_stand_for_all():
    rows = rows_of([[0, 1 + u // 50] for u in range(200)])  # 50 users of each of 1, 2, 3, 4
    found = neighbours(rows, transpose(rows, 5), np.array([0]), 9)[0].tolist()
    assert found[:2] == [1, 0] and sorted(found[2:]) == [-1] * 4 + [2, 3, 4]


@pytest.fixture(scope="module")
def asked(served):
    """PPO's networks over the small run, and what its first step asks."""
    where = {"run": "base", "data": str(served / "data"), "runs": str(served / "runs")}
    config = ppo.Config(rollout=8, minibatch=8, samples=2, k=6, **where)
    nets = ppo.Networks.load(config, config.stage("sft"), config.stage("reward"), "cpu")
    shop = ppo.load(config.data_dir)
    return config, nets, shop


def test_a_rollout_over_all_items_is_the_rollout_of_the_catalogue(asked):
    config, nets, shop = asked
    plain = ppo.roll_out(config, nets, ppo.Prompts(config, shop, nets.policy)(0))
    wide = dataclasses.replace(config, candidates=shop.n_items)
    ask = ppo.Prompts(wide, shop, nets.policy)(0)
    assert ask.proposed is None  # a shortlist of everything is the catalogue
    ask.proposed = torch.from_numpy(Proposals(shop, shop.n_items, 0)(ask.users))
    short = ppo.roll_out(wide, nets, ask)
    assert torch.equal(plain.item, short.item) and plain.candidates is None
    for name in ("old_logp", "ref_logp", "value", "token", "page", "entropy", "kl_exact"):
        assert_close(getattr(plain, name), getattr(short, name), atol=2e-5, rtol=2e-5)


def test_the_ratio_starts_at_one_and_no_page_leaves_its_shortlist(asked):
    config, nets, shop = asked
    few = dataclasses.replace(config, candidates=12)
    r = ppo.roll_out(few, nets, ppo.Prompts(few, shop, nets.policy)(0))
    assert r.candidates.shape == (8, 12)
    assert (columns_of(r.candidates, r.item)[r.mask] >= 0).all()
    assert (columns_of(r.candidates, r.excluded) == -1).all()
    assert torch.equal(r.candidates[0], r.candidates[1]), "pages of one user share a shortlist"
    learner = ppo.Objective(ppo.minibatch_loss, policy=nets.policy.model, critic=nets.critic)
    zero = torch.zeros_like(r.value)
    _, row = ppo.minibatch_loss(learner, few, r, torch.arange(8), zero, zero, True)
    assert row["policy/approxkl_k3"].abs() < 1e-10 and r.drift < 1e-4
    logp = r.old_logp[r.mask]
    assert (logp <= 0).all() and (r.entropy <= np.log(12) + 1e-5).all()


def test_ppo_learns_over_shortlists_and_resumes_to_the_bit(served, monkeypatch):
    where = {"data": str(served / "data"), "runs": str(served / "runs"), "source_run": "base"}
    small = dict(
        **where,
        candidates=20,
        lazy_rows=True,
        rollout=8,
        minibatch=8,
        inner_epochs=2,
        k=6,
        epochs=0.1,
        min_steps=3,
        eval_every=10,
        eval_users=10,
        critic_warmup=0,
        lr=1e-3,
        select="last",
        force=True,
        save_every=1,
    )
    ppo.run(ppo.Config(run="short-a", **small))
    real, steps = ppo.roll_out, []

    def killed(*args):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(ppo, "roll_out", killed)
    with pytest.raises(KeyboardInterrupt):
        ppo.run(ppo.Config(run="short-b", **small))
    monkeypatch.setattr(ppo, "roll_out", real)
    ppo.run(ppo.Config(run="short-b", **small))
    a, b, base = (
        torch.load(served / "runs" / run / stage / "model.pt", weights_only=True)["weights"]
        for run, stage in (("short-a", "ppo"), ("short-b", "ppo"), ("base", "sft"))
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    moved = (a["item"] != base["item"]).any(1)
    assert moved.any() and not torch.equal(
        a["h.0.attn.c_attn.weight"], base["h.0.attn.c_attn.weight"]
    )
