"""The arithmetic of PPO: the laws of the recipe, each of which fails if its line is broken."""

import dataclasses
import json
import math
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from pagellm import ppo
from pagellm.kernels import masked
from pagellm.kernels.advantage import gae, group_advantage
from pagellm.pages.metrics import ndcg
from pagellm.ppo import Config
from pagellm.ppo_step import (
    AdaptiveKL,
    Rollout,
    RunningMoments,
    advantages,
    gated,
    hit_reward,
    kl_k1,
    kl_k2,
    kl_k3,
    last_slot,
    legal_logits,
    normalise,
    page_total,
    policy_loss,
    reward_terms,
    step_reward,
    value_loss,
)
from pagellm.ppo_watch import alarms, rollout_row
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError

unit = st.floats(0, 1)
weight = st.floats(-3, 3)


@st.composite
def batches(draw, columns=2, min_slots=0):
    """A mask (B, K) whose rows are prefixes, and `columns` tensors (B, K), float64."""
    B, K = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(min_slots, K), min_size=B, max_size=B))
    mask = torch.arange(K) < torch.tensor(lengths)[:, None]
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return mask, *(torch.randn(B, K, generator=g, dtype=torch.float64) for _ in range(columns))


def poison(x, mask, value):
    return torch.where(mask, x, value)


def terms_of(mask, token, page, w_token=1.0, w_page=1.0, hit=None):
    """The terms of pages with these raw rewards; hits (B, K) are a term beside them."""
    r = rollout(mask, torch.zeros_like(token), token=token, page=page)
    terms = reward_terms(r, w_token, w_page)
    return terms if hit is None else terms | {"hit": torch.where(mask, hit, 0.0)}


@settings(deadline=None)
@given(batches(4, min_slots=1), weight, weight, st.floats(0, 2))
def test_rewards_of_a_page_add_up(batch, w_token, w_page, kl_coef):
    """sum_k r_k = w_token mean(token) + w_page page + sum(hit) - kl_coef sum(k1), any length."""
    mask, token, logp, ref, hit = batch
    page = token[:, 0] * 3
    terms = terms_of(mask, token, page, w_token, w_page, hit)
    r = step_reward(terms, logp, ref, mask, kl_coef)
    n = mask.sum(1)
    want = (
        w_token * (token * mask).sum(1) / n
        + w_page * page
        + (hit * mask).sum(1)
        - kl_coef * ((logp - ref) * mask).sum(1)
    )
    assert_close(r.sum(1), want)
    assert (r[~mask] == 0).all()
    assert_close(page_total(terms), want + kl_coef * ((logp - ref) * mask).sum(1))


@settings(deadline=None)
@given(batches(3, min_slots=1))
def test_each_term_lands_on_its_slots(batch):
    mask, token, logp, ref = batch
    last = mask & ~torch.nn.functional.pad(mask, (0, 1))[:, 1:]
    page = torch.arange(1.0, len(mask) + 1, dtype=torch.float64)
    only_page = step_reward(terms_of(mask, token, page, 0.0, 2.0), logp, ref, mask, 0.0)
    assert torch.equal(only_page, torch.where(last, 2 * page[:, None], 0.0))
    only_token = step_reward(terms_of(mask, token, page, 1.0, 0.0), logp, ref, mask, 0.0)
    assert_close(only_token * mask.sum(1, keepdim=True), torch.where(mask, token, 0.0))
    only_kl = step_reward(terms_of(mask, token, page, 0.0, 0.0), logp, ref, mask, 1.0)
    assert_close(only_kl, torch.where(mask, ref - logp, 0.0))


def test_a_page_without_a_slot_earns_nothing():
    mask = torch.tensor([[True, True], [False, False]])
    terms = terms_of(mask, torch.ones(2, 2), torch.tensor([3.0, 5.0]))
    assert page_total(terms).tolist() == [4.0, 0.0]
    assert last_slot(mask).tolist() == [[False, True], [False, False]]
    paid = normalise(terms, mask, RunningMoments())
    assert all((x[1] == 0).all() for x in paid.values())


@settings(deadline=None)
@given(batches(4), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_garbage_in_the_padding_changes_nothing(batch, junk):
    mask, a, b, c, d = batch
    page = a[:, 0] * 0 + 1.5

    def everything(a, b, c):
        return [
            step_reward(terms_of(mask, a, page), b, c, mask, 0.1),
            *policy_loss(a, b, c, mask, 0.2),
            *value_loss(a, b, c, mask, 0.2),
        ]

    clean, dirty = everything(a, b, c), everything(*(poison(x, mask, junk) for x in (a, b, c)))
    for x, y in zip(clean, dirty, strict=True):
        assert torch.equal(x, y) and x.isfinite().all()


def test_shapes_are_checked():
    x, m = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="ref_logp"):
        step_reward({"token": x}, x, x[:, :2], m, 1.0)
    with pytest.raises(ValueError, match="token"):
        step_reward({"token": x[:, :2]}, x, x, m, 1.0)


@settings(deadline=None)
@given(st.integers(2, 6), st.integers(0, 2**31))
def test_kl_estimators_by_enumeration(n, seed):
    """E_p[k1] = E_p[k3] = KL(p || q); k2, k3 >= 0, 0 iff equal; E_p[k1 grad log p] = grad KL."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, generator=g, dtype=torch.float64, requires_grad=True)
    logp, logq = z.log_softmax(0), torch.randn(n, generator=g, dtype=torch.float64).log_softmax(0)
    p = logp.exp()
    kl = (p * (logp - logq)).sum()
    assert_close((p * kl_k1(logp, logq)).sum(), kl)
    assert_close((p * kl_k3(logp, logq)).sum(), kl)
    for k in (kl_k2, kl_k3):
        assert (k(logp, logq) >= 0).all() and (k(logp, logp) == 0).all()
        assert (k(logp, logp + 0.3) > 0).all()
    assert_close(kl_k2(logp, logp - 0.4), torch.full_like(p, 0.08))
    grad = torch.autograd.grad(kl, z, retain_graph=True)[0]
    surrogate = (p.detach() * kl_k1(logp, logq).detach() * logp).sum()
    assert_close(torch.autograd.grad(surrogate, z)[0], grad)


@settings(deadline=None)
@given(batches(2, min_slots=1))
def test_before_the_first_update_the_ratio_is_one(batch):
    mask, logp, adv = batch
    loss, clipped = policy_loss(logp, logp.clone(), adv, mask, 0.2)
    assert_close(loss, -masked.mean(adv, mask))
    assert clipped == 0


@settings(deadline=None)
@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(0.05, 0.5))
def test_gradient_of_the_clipped_objective_by_region(log_ratio, adv, clip):
    """dL / d logp = 0 iff (A > 0 and r > 1 + clip) or (A < 0 and r < 1 - clip); else -A r / N."""
    mask = torch.tensor([[True, True, False]])
    ratio = math.exp(log_ratio)
    if min(abs(ratio - 1 - clip), abs(ratio - 1 + clip), abs(adv)) < 1e-6:
        return
    logp = torch.tensor([[log_ratio, 0.0, 5.0]], dtype=torch.float64, requires_grad=True)
    A = torch.tensor([[adv, 1.0, 1.0]], dtype=torch.float64)
    loss, fraction = policy_loss(logp, torch.zeros(1, 3, dtype=torch.float64), A, mask, clip)
    loss.backward()
    cut = (adv > 0 and ratio > 1 + clip) or (adv < 0 and ratio < 1 - clip)
    want = 0.0 if cut else -adv * ratio / 2
    assert logp.grad[0, 0].item() == pytest.approx(want, rel=1e-9, abs=1e-12)
    assert logp.grad[0, 1].item() == pytest.approx(-0.5) and logp.grad[0, 2] == 0
    assert fraction.item() == (0.5 if cut else 0.0)


@settings(deadline=None)
@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3), st.floats(0.05, 1))
def test_value_loss_never_rewards_a_jump(v, old, ret, clip):
    """Half of max((V - R)^2, (V_clip - R)^2): never below the plain loss, equal to it within old +-
    clip.
    """
    one = torch.ones(1, 1, dtype=torch.bool)
    t = [torch.tensor([[x]], dtype=torch.float64) for x in (v, old, ret)]
    loss, fraction = value_loss(*t, one, clip)
    plain = 0.5 * (v - ret) ** 2
    limited = min(max(v, old - clip), old + clip)
    other = 0.5 * (limited - ret) ** 2
    assert loss.item() == pytest.approx(max(plain, other), abs=1e-12)
    assert fraction.item() == float(other > plain)
    if abs(v - old) <= clip:
        assert loss.item() == pytest.approx(plain, rel=1e-12, abs=1e-15)


@settings(deadline=None)
@given(batches(3, min_slots=1), st.integers(1, 3))
def test_micro_batches_share_one_mean(batch, micro):
    """sum over micro-batches of loss_i * n_i / N is the loss of the whole, for the policy and the
    value.
    """
    mask, a, b, c = batch
    whole = policy_loss(a, b, c, mask, 0.2)[0], value_loss(a, b, c, mask, 0.2)[0]
    parts = [0.0, 0.0]
    for rows in torch.arange(len(mask)).split(micro):
        share = mask[rows].sum() / mask.sum()
        parts[0] += policy_loss(a[rows], b[rows], c[rows], mask[rows], 0.2)[0] * share
        parts[1] += value_loss(a[rows], b[rows], c[rows], mask[rows], 0.2)[0] * share
    assert_close(
        torch.stack(whole), torch.stack([torch.as_tensor(p, dtype=torch.float64) for p in parts])
    )


@settings(deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30), st.integers(0, 2**31))
def test_running_moments_do_not_depend_on_the_cut(values, seed):
    random = Random(seed)
    whole, pieces = RunningMoments(), RunningMoments()
    whole.update(torch.tensor(values))
    shuffled = values[:]
    random.shuffle(shuffled)
    while shuffled:
        n = random.randint(0, len(shuffled))
        pieces.update(torch.tensor(shuffled[:n]))
        shuffled = shuffled[n:] if n else shuffled
    assert pieces.count == whole.count == len(values)
    exact = torch.tensor(values).double()
    for moments in (whole, pieces):
        assert moments.mean == pytest.approx(exact.mean().item(), abs=1e-9)
        assert moments.std == pytest.approx(exact.std(unbiased=True).item(), abs=1e-7)
    again = RunningMoments()
    again.load_state_dict(pieces.state_dict())
    assert again.state_dict() == pieces.state_dict()
    for moments in (again, pieces):
        moments.update(torch.tensor([1.0, 2.0]))
    assert again.state_dict() == pieces.state_dict()


def test_running_moments_at_the_edges():
    m = RunningMoments()
    assert (m.count, m.mean, m.std) == (0, 0.0, 0.0)
    m.update(torch.zeros(0))
    m.update(torch.tensor(3.0))
    assert (m.count, m.mean, m.std) == (1, 3.0, 0.0)
    with pytest.raises(ValueError, match="not finite"):
        m.update(torch.tensor([1.0, math.nan]))
    assert m.count == 1


@settings(deadline=None)
@given(batches(2, min_slots=1), st.floats(0, 3), st.floats(0.1, 3))
def test_normalised_terms_add_up_to_the_normalised_whole(batch, w_token, w_page):
    """sum over terms and slots = (S - mu) / sigma; every slot keeps its share of S."""
    mask, token, hit = batch
    page = token[:, -1] * 2 + 1
    for hits in (None, hit):
        moments = RunningMoments()
        moments.update(torch.tensor([-4.0, 0.0, 5.0]))
        terms = terms_of(mask, token, page, w_token, w_page, hits)
        paid = normalise(terms, mask, moments, limit=1e9)
        total = w_token * (token * mask).sum(1) / mask.sum(1) + w_page * page
        total = total if hits is None else total + (hit * mask).sum(1)
        assert_close(page_total(paid), (total - moments.mean) / moments.std)
        for name, term in terms.items():
            assert_close(paid[name] * moments.std, term)
        assert moments.count == 3 + len(mask)


def test_one_head_switched_off_has_no_say():
    """Item-only and page-only: whatever the other head says changes no term."""
    token, page, mask = torch.randn(3, 4), torch.randn(3), torch.ones(3, 4, dtype=torch.bool)
    for weights, other in (
        ((0.0, 1.0), (torch.randn(3, 4), page)),
        ((1.0, 0.0), (token, torch.randn(3))),
    ):
        mine = normalise(terms_of(mask, token, page, *weights), mask, RunningMoments())
        theirs = normalise(terms_of(mask, *other, *weights), mask, RunningMoments())
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@settings(deadline=None)
@given(batches(1, min_slots=1), st.floats(0.5, 5))
def test_no_page_is_paid_more_than_the_limit(batch, limit):
    mask, token = batch
    moments = RunningMoments()
    moments.update(torch.tensor([-1.0, 0.0, 1.0]).repeat(10_000))
    paid = normalise(terms_of(mask, token * 1e3, token[:, 0]), mask, moments, limit)
    plain = normalise(terms_of(mask, token * 1e3, token[:, 0]), mask, moments, 1e9)
    assert (page_total(paid).abs() <= limit * (1 + 1e-9)).all()
    assert (page_total(paid) * page_total(plain) >= 0).all()


def test_what_is_logged_as_reward_total_is_what_the_policy_is_paid():
    """reward_total = mean over pages of the sum of all terms, weights included."""
    mask = torch.tensor([[True, True, True], [True, True, False]])
    token = torch.tensor([[1.0, 2.0, 6.0], [4.0, 2.0, 99.0]])
    page = torch.tensor([10.0, -20.0])
    r = rollout(mask, torch.zeros(2, 3), token=token, page=page, item=PAGES, excluded=NOTHING)
    for w_token, w_page, want in ((1.0, 1.0, -2.0), (2.0, 0.0, 6.0), (0.0, 0.5, -2.5)):
        r.terms = reward_terms(r, w_token, w_page)
        row = rollout_row(r, mask * 1.0, mask * 1.0, mask * 1.0, RunningMoments())
        assert float(row["objective/reward_total"]) == pytest.approx(want)
        assert float(row["objective/paid_token"]) == pytest.approx(w_token * 3.0)
        assert float(row["objective/paid_page"]) == pytest.approx(w_page * -5.0)
        assert float(row["objective/reward_page"]) == pytest.approx(-5.0)
        assert float(row["objective/reward_token"]) == pytest.approx(3.0)


def test_the_logged_kl_of_a_page_is_a_sum_over_its_slots():
    """kl_seq_sum = mean over pages of sum over kept slots of (logp - ref): it steers AdaptiveKL."""
    mask = torch.tensor([[True, True, True], [True, True, False]])
    logp = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 77.0]])
    r = rollout(mask, torch.zeros(2, 3), old_logp=logp, item=PAGES, excluded=NOTHING)
    r.terms = reward_terms(r, 1.0, 1.0)
    row = rollout_row(r, mask * 1.0, mask * 1.0, mask * 1.0, RunningMoments())
    assert float(row["objective/kl_seq_sum"]) == pytest.approx((0.6 + 0.9) / 2)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(0, 8))
def test_hits_add_up_to_the_ndcg_of_the_page(seed, k, n_labels):
    random = Random(seed)
    page, labels = random.sample(range(9), k), random.sample(range(9), n_labels)
    item, mask = torch.tensor([page + [-1], page + [-1]]), torch.tensor([[True] * k + [False]] * 2)
    label = torch.tensor([labels + [-1, -1], [-1] * (n_labels + 2)])
    hit = hit_reward(item, mask, label)
    want = ndcg(labels, page, k + 1) if labels else 0.0
    assert hit[0].sum().item() == pytest.approx(want, abs=1e-6)
    assert (hit[0, :k] > 0).tolist() == [i in labels for i in page]
    assert (hit[1] == 0).all() and (hit[:, k:] == 0).all()


def test_adaptive_kl_follows_ziegler():
    """coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon."""
    for kl, factor in (
        (100.0, 1 + 0.2 * 64 / 640),
        (0.0, 1 - 0.2 * 64 / 640),
        (5.5, 1 + 0.1 * 64 / 640),
        (5.0, 1.0),
    ):
        c = AdaptiveKL(0.3, target=5.0, horizon=640)
        c.update(kl, 64)
        assert c.coef == pytest.approx(0.3 * factor)
    with pytest.raises(ValueError):
        AdaptiveKL(0.1, 0.0, 10)


PAGES = torch.tensor([[0, 1, 2], [3, 4, -1]])
NOTHING = torch.full((2, 1), -1)


def rollout(mask, value, **more):
    zero = torch.zeros_like(value)
    base = dict(
        prompt=zero,
        valid=mask,
        excluded=zero,
        item=zero.long(),
        mask=mask,
        old_logp=zero,
        ref_logp=zero,
        value=value,
        token=zero,
        page=zero[:, 0],
        entropy=zero,
        kl_exact=zero,
        drift=0.0,
    )
    return Rollout(**(base | more))


@settings(deadline=None)
@given(batches(2, min_slots=1))
def test_advantages_of_the_three_algorithms(batch):
    mask, reward, value = batch
    reward, value = reward * mask, value * mask
    adv, ret = advantages("ppo", reward, value, mask, lam=0.9)
    plain, want = gae(reward, value, mask, 1.0, 0.9)
    assert_close(ret, want)
    assert_close(adv, masked.whiten(plain, mask))
    adv, _ = advantages("reinforce", reward, value, mask)
    total = reward.sum(1)
    assert_close(adv, torch.where(mask, (total - total.mean())[:, None], 0.0))
    twice = mask.repeat_interleave(2, 0)
    noisy = torch.cat([reward, 2 * reward], 1).view(-1, reward.shape[1])
    adv, _ = advantages("rloo", noisy, noisy, twice, samples=2)
    a, b = noisy.view(-1, 2, reward.shape[1]).sum(2).unbind(1)
    for row, want in ((0, a - b), (1, b - a)):
        assert_close(
            adv.view(-1, 2, reward.shape[1])[:, row], torch.where(mask, want[:, None], 0.0)
        )


@settings(deadline=None)
@given(batches(1, min_slots=1))
def test_grpo_counts_pages_alike_and_dr_grpo_counts_empty_slots(batch):
    """The loss is a mean over kept slots: grpo's weights make it a mean over pages of means over
    slots, dr_grpo's the sum over slots divided by B K.
    """
    mask, noise = (x.repeat_interleave(2, 0) for x in batch)
    reward = torch.where(mask, noise, 0.0)
    reward[::2] *= 2
    total = reward.sum(1)
    for algo in ("grpo", "dr_grpo"):
        adv, _ = advantages(algo, reward, reward, mask, samples=2)
        page = group_advantage(total, 2, algo)
        slots = torch.where(mask, noise.abs(), 0.0)  # whatever a slot's gradient is
        got = masked.mean(adv * slots, mask)
        if algo == "grpo":
            want = (page * slots.sum(1) / mask.sum(1)).mean()
        else:
            want = (page * slots.sum(1)).sum() / mask.numel()
        assert_close(got, want)
    adv, _ = advantages("expert", reward, reward, mask)
    assert torch.equal(adv, mask.double())


def test_the_relevance_gate_takes_gains_and_leaves_losses():
    token = torch.tensor([[1.0, 2.0, -3.0, 4.0]])
    logits = torch.tensor([[5.0, 4.0, 3.0, -torch.inf]])
    item = torch.tensor([[0, 2, 1, 3]])
    assert gated(token, logits, item, 0) is token
    assert gated(token, logits, item, 1).tolist() == [[1.0, 0.0, -3.0, 0.0]]
    assert gated(token, logits, item, 3).tolist() == [[1.0, 2.0, -3.0, 0.0]]


EXPERT = {"algo": "expert", "item_reward": "outcome", "w_page": 0.0}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rollout": 10, "minibatch": 4}, "not a multiple of minibatch"),
        ({"clip": 1.5}, "clip=1.5"),
        ({"algo": "rloo"}, "samples of 2 or more"),
        ({"w_token": 0, "w_page": 0}, "nothing to optimise"),
        ({"sft_coef": -1}, "0 or more"),
        ({"label_share": 1.0}, "between 0 and 1"),
        ({"algo": "dpo"}, "ppo, reinforce, rloo"),
        ({"algo": "grpo"}, "samples of 2 or more"),
        ({"draw": "one_shot"}, "has a critic"),
        (EXPERT | {"kl_coef": 0.2, "lam": 1.0}, "does not read lam, kl_coef: it learns the pages"),
        (EXPERT | {"reward_fn": "a:b"}, "does not read reward_fn"),
        ({"algo": "rloo", "samples": 4, "critic_lr": 1e-3}, "does not read critic_lr: it has no"),
        ({"algo": "expert"}, "item_reward outcome"),
        ({"item_reward": "outcome", "w_hit": 1.0}, "has learnt from them"),
        ({"item_reward": "x"}, "pairs or outcome"),
        ({"kl_coef": -1}, "0 or more"),
        ({"select": "x"}, "energy, ndcg"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(PageLLMError, match=message):
        Config(**change)


QUIET = {
    "learning": True,
    "objective/kl_seq_sum": 0.5,
    "objective/entropy": 4.0,
    "objective/reward_total": 0.1,
    "val/explained_var": 0.2,
    "list/coverage": 100,
    "list/distinct": 1.0,
    "rollout/gen_vs_train_logp_diff": 1e-6,
    "rollout/first_epoch_max_abs_logratio": 0.0,
    "policy/clipfrac": 0.1,
}


@pytest.mark.parametrize(
    "change, word",
    [
        ({"rollout/first_epoch_max_abs_logratio": 0.1}, "ratio is not 1"),
        ({"rollout/gen_vs_train_logp_diff": 0.1}, "generation and update"),
        ({"objective/kl_seq_sum": -0.1}, "negative"),
        ({"objective/entropy": 1.0}, "entropy fell"),
        ({"policy/clipfrac": 0.5}, "clip fraction"),
        ({"val/explained_var": -0.5}, "explained variance"),
        ({"list/coverage": 40}, "coverage halved"),
        ({"list/distinct": 0.4}, "distinct halved"),
        ({"objective/kl_seq_sum": 30.0}, "twice the target"),
        ({"objective/kl_seq_sum": 0.0}, "still 0"),
    ],
)
def test_each_alarm_rings_for_its_cause_alone(change, word):
    log = [QUIET] * 20
    assert alarms(log, warmup=2, kl_target=5.0) == []
    bad = [QUIET] * 20 + [QUIET | change] * 5
    assert [text for text in alarms(bad, 2, 5.0) if word in text]
    assert len(alarms(bad, 2, 5.0)) == 1


@pytest.mark.parametrize("name", ["energy", "NDCG@100", "ILD", "entropy"])
def test_reward_hacking_rings(name):
    scores = {f"valid/{n}": 1.0 for n in ("energy", "NDCG@100", "ILD", "entropy")}
    up = QUIET | {"objective/reward_total": 0.9}
    fell = scores | {f"valid/{name}": 0.8}
    assert any(name in text for text in alarms([scores, QUIET, up | fell], 0))
    assert not alarms([scores, QUIET, up | scores], 0)
    assert not alarms([scores, QUIET, QUIET | {"objective/reward_total": 0.0} | fell], 0)


@pytest.mark.parametrize("excluded", [[-1, -1], [4, -1], [0, 5]])
def test_a_slot_may_hold_what_is_neither_excluded_nor_placed_before(excluded):
    """legal_logits against its definition, item by item; -1 is padding and forbids nothing."""
    B, K, N = 1, 3, 6
    plain = torch.arange(float(B * K * N)).reshape(B, K, N) + 1

    class Model:
        n_items = N

        def item_logits(self, hidden):
            assert hidden.shape[1] == K  # the states of the slots alone
            return plain

    item = torch.tensor([[2, 1, -1]])
    got = legal_logits(torch.zeros(B, K + 1, 2), Model(), item, torch.tensor([excluded]))
    for k in range(K):
        for i in range(N):
            legal = i not in excluded and i not in item[0, :k].tolist()
            assert got[0, k, i] == (plain[0, k, i] if legal else -math.inf)


def test_a_function_of_one_s_own_pays_without_a_reward_model(sft_alone, tmp_path, monkeypatch):
    """Its terms are what is paid; its hash is in config.json; another function is another run."""
    monkeypatch.chdir(tmp_path)
    code = "def first(pages, mask, shop, users):\n    return (pages[:, 0] < 30).float()\n"
    (tmp_path / "first_reward.py").write_text(code)
    config = ppo.Config(
        **{"run": "own", "source_run": "base", "runs": str(sft_alone / "runs"), "device": "cpu"},
        **{"data": str(sft_alone / "data"), "epochs": 0.1, "min_steps": 3, "critic_warmup": 0},
        **{"rollout": 16, "minibatch": 8, "micro": 8, "k": 4, "eval_every": 3, "w_fn": 2.0},
        **{"reward_fn": "first_reward:first", "w_token": 0.0, "w_page": 0.0, "lr": 1e-3},
    )
    ppo.run(config)
    out = sft_alone / "runs" / "own" / "ppo"
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()][1:]
    for row in log:
        paid = row["objective/paid_fn"]
        assert 0 <= paid <= 2 and paid == pytest.approx(round(paid * 8) / 8)  # of 16 pages
        assert row["objective/reward_total"] == pytest.approx(paid)
    assert len(json.loads((out / "config.json").read_text())["inputs"]["reward_fn"]) == 16
    ppo.run(config)  # done
    (tmp_path / "first_reward.py").write_text(code.replace("30", "31"))
    with pytest.raises(PageLLMError, match="made from another reward_fn"):
        ppo.run(config)
    with pytest.raises(PageLLMError, match="nothing to optimise"):
        dataclasses.replace(config, w_fn=0.0)
    with pytest.raises(PageLLMError, match="want module:function"):
        dataclasses.replace(config, reward_fn="first_reward.py")


def test_a_function_of_one_s_own_that_raises_is_shown_without_our_code(
    sft_alone, tmp_path, monkeypatch, capsys
):
    """Exit code 2, one line that names it, then the lines of its file; nothing of PageLLM."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong_reward.py").write_text(
        "def wrong(pages, mask, shop, users):\n    return shop.catalogue.prices[pages]\n"
    )
    words = ["--run", "wrong", "--source_run", "base", "--runs", str(sft_alone / "runs")]
    words += ["--data", str(sft_alone / "data"), "--device", "cpu", "--k", "4", "--rollout", "16"]
    words += ["--minibatch", "8", "--micro", "8", "--epochs", "0.1", "--w_token", "0"]
    words += ["--w_page", "0", "--reward_fn", "wrong_reward:wrong", "--preset", "none"]
    assert main(ppo.Config, ppo.run, "pagellm ppo", words) == 2
    told = capsys.readouterr().err
    told = told[told.index("pagellm ppo: reward_fn=") :].splitlines()
    assert told[0].endswith("raised AttributeError: 'Catalogue' object has no attribute 'prices'")
    assert told[1].startswith("  It was given pages (16, 4) int64, mask (16, 4) bool, users (16,)")
    assert told[2] == f'  File "{tmp_path / "wrong_reward.py"}", line 2, in wrong'
    assert told[3] == "    return shop.catalogue.prices[pages]"
    assert set("".join(told[4:])) <= set(" ^~")
