"""The reward model's losses: Bradley-Terry's laws, and what each head is taught by."""

import math
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from pagellm import reward
from pagellm.model.gpt2 import GPT2, Shape
from pagellm.model.policy import Policy
from pagellm.model.reward_model import Compare, RewardModel, mean_reward
from pagellm.pages.pairs import Pair, from_table
from pagellm.pages.stats import calibration, spearman
from pagellm.reward import (
    Config,
    PairBatch,
    learn_pairs,
    page_loss,
    pair_loss,
    score_pairs,
    sequence_loss,
    swapped,
    token_loss,
)
from pagellm.stage.config import PageLLMError


@st.composite
def pairs(draw):
    B, K = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    lengths = [draw(st.lists(st.integers(1, K), min_size=B, max_size=B)) for _ in range(2)]
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    masks = [torch.arange(K) < torch.tensor(n)[:, None] for n in lengths]
    return [torch.randn(B, K, generator=g, dtype=torch.float64) for _ in range(2)], masks


@settings(deadline=None)
@given(pairs())
def test_eq_8_is_a_probability_of_the_better_page(batch):
    """exp(-loss of a pair) = p(i > j), p(i > j) + p(j > i) = 1, p = sigma(mean_i - mean_j)."""
    (a, b), (ma, mb) = batch
    for row in range(len(a)):
        one = [x[row : row + 1] for x in (a, ma, b, mb)]
        p = math.exp(-sequence_loss(*one))
        q = math.exp(-sequence_loss(one[2], one[3], one[0], one[1]))
        assert p + q == pytest.approx(1.0)
        gap = a[row][ma[row]].mean() - b[row][mb[row]].mean()
        assert p == pytest.approx(1 / (1 + math.exp(-gap.item())))
    rows = [sequence_loss(*(x[r : r + 1] for x in (a, ma, b, mb))) for r in range(len(a))]
    assert_close(sequence_loss(a, ma, b, mb), torch.stack(rows).mean())


@settings(deadline=None)
@given(pairs(), st.floats(-5, 5), st.integers(2, 3))
def test_shifting_all_and_repeating_every_reward_change_nothing(batch, shift, times):
    (a, b), (ma, mb) = batch
    base = sequence_loss(a, ma, b, mb)
    assert_close(sequence_loss(a + shift, ma, b + shift, mb), base)
    longer = [x.repeat_interleave(times, 1) for x in (a, ma, b, mb)]
    assert_close(sequence_loss(*longer), base)


@settings(deadline=None)
@given(pairs(), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_garbage_off_the_mask_changes_nothing(batch, junk):
    (a, b), (ma, mb) = batch
    x, y = torch.where(ma, a, junk).requires_grad_(), torch.where(mb, b, junk).requires_grad_()
    loss = sequence_loss(x, ma, y, mb)
    assert torch.equal(loss, sequence_loss(a, ma, b, mb))
    loss.backward()
    assert x.grad.isfinite().all() and (x.grad[~ma] == 0).all()
    edit = ma & mb
    x, y = torch.where(edit, a, junk).requires_grad_(), torch.where(edit, b, junk).requires_grad_()
    loss = token_loss(x, y, edit)
    assert torch.equal(loss, token_loss(a, b, edit))
    loss.backward()
    assert x.grad.isfinite().all() and (x.grad[~edit] == 0).all()


@settings(deadline=None)
@given(pairs(), st.data())
def test_token_loss_is_the_mean_over_edited_slots(batch, data):
    (a, b), _ = batch
    edit = torch.tensor([[data.draw(st.booleans()) for _ in row] for row in a.tolist()])
    loss = token_loss(a, b, edit)
    if not edit.any():
        assert loss == 0
        return
    slots = [
        math.log1p(math.exp(-(x - y)))
        for x, y, m in zip(
            a.flatten().tolist(), b.flatten().tolist(), edit.flatten().tolist(), strict=True
        )
        if m
    ]
    assert loss.item() == pytest.approx(sum(slots) / len(slots))


def test_losses_are_finite_at_huge_margins():
    m = torch.ones(1, 1, dtype=torch.bool)
    big, small = torch.tensor([[800.0]]), torch.tensor([[-800.0]])
    for loss, want in (
        (sequence_loss(big, m, small, m), 0.0),
        (sequence_loss(small, m, big, m), 1600.0),
        (token_loss(small, big, m), 1600.0),
        (page_loss(small[0], big[0]), 1600.0),
    ):
        assert loss.item() == pytest.approx(want)


def test_shapes_are_checked():
    x, m = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="sequence_loss"):
        sequence_loss(x, m[:, :2], x, m)
    with pytest.raises(ValueError, match="token_loss"):
        token_loss(x, x[:, :2], m)


soft_labels = st.lists(
    st.tuples(st.floats(-4, 4), st.floats(-4, 4), st.floats(0, 1)), min_size=1, max_size=4
)


@settings(deadline=None)
@given(soft_labels)
def test_a_soft_label_is_met_by_cross_entropy(rows):
    """L = -mean [p log q + (1 - p) log (1 - q)], q = sigma(g+ - g-): dL/dg+ = (q - p) / B."""
    g, h, p = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    g.requires_grad_()
    loss = page_loss(g, h, p)
    q = 1 / (1 + (h - g.detach()).exp())
    assert_close(loss.detach(), F.binary_cross_entropy(q, p), atol=1e-9, rtol=1e-9)
    loss.backward()
    assert_close(g.grad, (q - p) / len(p))
    assert_close(page_loss(h, g, 1 - p), loss)  # the other page first, the other label
    assert_close(page_loss(g, h, torch.ones_like(p)), page_loss(g, h))


@pytest.mark.parametrize("soften", [None, 2.0])
def test_soft_labels_ask_for_the_energy_gap_and_no_more(soften):
    """At g+ - g- = gap / soften both losses have gradient 0; soften is 0.5 by default."""
    options = {} if soften is None else {"soften": soften}
    config = Config(shrink=0.0, token=0.0, **options)
    gap, m = torch.tensor([0.3, 1.2]), torch.ones(2, 3, dtype=torch.bool)
    batch = PairBatch(m, m, m, m, m, m, detail=torch.tensor([0, 1]), gap=gap)
    for stretch, sign in ((1.0, 0), (0.5, -1), (2.0, 1)):  # too small a margin is pulled up
        margin = stretch * gap / (soften or 0.5)
        tokens = [margin[:, None].repeat(1, 3).requires_grad_(), torch.zeros(2, 3)]
        pages = [margin.clone().requires_grad_(), torch.zeros(2)]
        pair_loss(config, batch, *tokens, *pages).backward()
        for grad in (tokens[0].grad, pages[0].grad):
            if sign:
                assert (grad * sign > 1e-3).all()
            else:
                assert_close(grad, torch.zeros_like(grad), atol=1e-6, rtol=0)


def test_preference_pairs_teach_the_page_head_alone():
    m = torch.ones(2, 3, dtype=torch.bool)
    zero = torch.zeros(2, 3, dtype=torch.long)
    tokens = [torch.randn(2, 3, requires_grad=True) for _ in range(2)]
    pages = [torch.randn(2, requires_grad=True) for _ in range(2)]
    config = Config(shrink=0.0, soften=0.0)
    batch = PairBatch(
        zero, m, zero, zero, m, m, detail=torch.tensor([False, False]), gap=torch.ones(2)
    )
    pair_loss(config, batch, *tokens, *pages).backward()
    assert all((t.grad == 0).all() for t in tokens) and all(p.grad.abs().min() > 0 for p in pages)
    batch.detail = torch.tensor([False, True])
    pair_loss(config, batch, *tokens, *pages).backward()
    assert all((t.grad[0] == 0).all() and (t.grad[1] != 0).all() for t in tokens)


def test_weights_switch_their_part_off():
    m = torch.ones(1, 2, dtype=torch.bool)
    batch = PairBatch(m, m, m, m, m, m, detail=torch.tensor([True]), gap=torch.ones(1))
    t, u = torch.randn(1, 2), torch.randn(1, 2)
    g, h = torch.randn(1), torch.randn(1)
    off = {"page": 0.0, "sequence": 0.0, "token": 0.0, "shrink": 0.0, "soften": 0.0}
    parts = {
        "page": page_loss(g, h),
        "sequence": sequence_loss(t, m, u, m),
        "token": token_loss(t, u, m),
    }
    for name, want in parts.items():
        assert_close(pair_loss(Config(**(off | {name: 2.0})), batch, t, u, g, h), 2 * want)
    shrink = pair_loss(Config(**(off | {"shrink": 1.0})), batch, t, u, g, h)
    assert_close(shrink, 0.5 * (g.square() + h.square() + t.square().mean() + u.square().mean())[0])


@pytest.fixture(scope="module", params=[True, False], ids=["compare", "paper's heads"])
def model(request):
    torch.manual_seed(0)
    trunk = GPT2(Shape(2, 2, 8, 20), 5, 2, 7, dropout=0.3)
    with torch.no_grad():
        for weight in trunk.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return RewardModel(trunk, compare=request.param).eval()


def test_compare_reads_the_nearest_item_above():
    """Against the definition in a loop: the largest cosine to a slot above, -1 for none."""
    torch.manual_seed(0)
    compare, rows = Compare(6, measures=2, features=3).requires_grad_(False), torch.randn(2, 4, 6)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    got = compare(rows, mask)
    for b, t in mask.nonzero().tolist():
        near = []
        for map_ in compare.project.weight.chunk(2):
            x = [map_ @ rows[b, s] for s in range(t + 1)]
            near.append(
                max((float(F.cosine_similarity(x[t], x[s], 0)) for s in range(t)), default=-1.0)
            )
        want = F.gelu(compare.features(torch.tensor(near)), approximate="tanh")
        assert_close(got[b, t], want, atol=1e-5, rtol=1e-5)
    other = rows.clone()
    other[:, 2:] = torch.randn(2, 2, 6)
    assert torch.equal(compare(other, mask)[:, :2], got[:, :2])  # no slot sees a later one
    assert got.isfinite().all()


def test_compare_learns_to_tell_a_repeat_on_users_and_pages_it_has_not_seen():
    """What a plain head cannot do in so few steps: the second slot is, or is not, a near copy of
    the first.
    """
    torch.manual_seed(0)
    trunk = GPT2(Shape(1, 2, 16, 20), 5, 2, 40)
    with torch.no_grad():
        # item 20 + i nearly repeats i
        trunk.item[20:] = trunk.item[:20] + 0.002 * torch.randn(20, 16)
    model = RewardModel(trunk)
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    prompt, valid, m = (
        torch.tensor([[5, 1]]).expand(64, 2),
        torch.ones(64, 2).bool(),
        torch.ones(64, 2).bool(),
    )

    def margin(first, last):
        at = torch.randint(first, last, (64,))
        other = first + (at - first + torch.randint(1, last - first, (64,))) % (last - first)
        good, bad = torch.stack([at, other + 20], 1), torch.stack([at, at + 20], 1)
        return model(prompt, valid, good, m)[0][:, 1] - model(prompt, valid, bad, m)[0][:, 1]

    for _ in range(60):
        opt.zero_grad()
        F.softplus(-margin(0, 10)).mean().backward()
        opt.step()
    assert (margin(10, 20) > 0).float().mean() > 0.95  # items of no training pair


def test_rewards_ignore_padding_and_neighbours(model):
    prompt = torch.tensor([[4, 5, 1, 2], [0, 0, 6, 3]])
    valid = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]).bool()
    item, mask = torch.tensor([[3, 1, 2], [6, 0, -1]]), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    with torch.no_grad():
        token, page = model(prompt, valid, item, mask)
        alone = model(prompt[1:, 2:], valid[1:, 2:], item[1:, :2], mask[1:, :2])
    assert_close(token[1:, :2], alone[0], atol=1e-5, rtol=1e-5)
    assert_close(page[1:], alone[1], atol=1e-5, rtol=1e-5)
    assert token[1, 2] == 0


def test_a_token_reward_reads_its_own_item_but_not_later_ones(model):
    prompt, valid = torch.tensor([[5, 1]]), torch.ones(1, 2, dtype=torch.bool)
    m = torch.ones(1, 3, dtype=torch.bool)
    with torch.no_grad():
        a, _ = model(prompt, valid, torch.tensor([[3, 1, 2]]), m)
        b, _ = model(prompt, valid, torch.tensor([[3, 4, 2]]), m)
    assert a[0, 0] == b[0, 0] and a[0, 1] != b[0, 1]


def test_the_page_head_sees_order_and_user(model):
    prompt, valid = torch.tensor([[5, 1]]), torch.ones(1, 2, dtype=torch.bool)
    m = torch.ones(1, 2, dtype=torch.bool)
    with torch.no_grad():
        scores = [
            model(p, valid, torch.tensor([i]), m)[1].item()
            for p, i in ((prompt, [3, 1]), (prompt, [1, 3]), (torch.tensor([[6, 1]]), [3, 1]))
        ]
    assert len(set(scores)) == 3


def test_pairs_are_scored_in_batches_of_like_length_and_come_back_in_their_order(served):
    path = served / "runs" / "base" / "reward"
    model, policy = RewardModel.load(path), Policy.load(served / "runs" / "base" / "sft")
    pairs = from_table(pq.read_table(path / "pairs.parquet"))[:90:2]
    got, chosen = (
        score_pairs(model, pairs, policy, batch=8),
        score_pairs(model, pairs, policy, batch=8, rejected=False),
    )
    for i, pair in enumerate(pairs):
        alone = score_pairs(model, [pair], policy)
        for head in ("page", "token"):
            assert_close(got[head][i], alone[head][0], atol=1e-5, rtol=1e-5)
            assert_close(chosen[head][i], alone[head][0, :1], atol=1e-5, rtol=1e-5)
    read = []
    hook = model.trunk.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    score_pairs(model, pairs, policy, batch=8)
    hook.remove()
    assert sum(read[:3]) < sum(read[-3:])  # the short ones stand together
    for empty in (True, False):
        assert score_pairs(model, [], policy, rejected=empty)["page"].shape == (0, 1 + empty)


def test_save_and_load(model, tmp_path):
    model.page_mean.fill_(0.25)
    torch.save(model.state(), tmp_path / "model.pt")
    again = RewardModel.load(tmp_path)
    prompt, valid = torch.tensor([[5, 1]]), torch.ones(1, 2, dtype=torch.bool)
    args = prompt, valid, torch.tensor([[3, 1]]), torch.ones(1, 2, dtype=torch.bool)
    for x, y in zip(model(*args), again(*args), strict=True):
        assert torch.equal(x, y)


def test_mean_reward_counts_own_slots():
    r = torch.tensor([[1.0, 3.0, 99.0], [5.0, 5.0, 5.0], [7.0, 7.0, 7.0]])
    m = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]]).bool()
    assert mean_reward(r, m).tolist() == [2.0, 5.0, 0.0]


def test_the_control_swaps_half_of_the_pairs_and_nothing_else():
    pairs = [
        Pair(0, "ranked", [1], [5.0], [2, 3], [3, 2], [True, True], 1.0, "swap", seed)
        for seed in range(2000)
    ]
    first, second = ([swapped(p, seed) for p in pairs] for seed in (0, 1))
    assert first == [swapped(p, 0) for p in pairs] and first != second
    for some in (first, second):
        share = np.mean([p.chosen == [3, 2] for p in some])
        assert 0.45 < share < 0.55
    assert all(
        {tuple(p.chosen), tuple(p.rejected)} == {(2, 3), (3, 2)} and p.kind == "ranked"
        for p in first
    )


def batch_of(tokens, detail):
    """Pairs whose pages are two slots long, with an energy gap of 1."""
    m = torch.ones(len(tokens[0]), 2, dtype=torch.bool)
    at = torch.tensor(detail, dtype=torch.long)
    return PairBatch(m, m, m, m, m, m, detail=at, gap=torch.ones(len(m)))


def test_a_batch_of_preference_pairs_alone_has_the_page_loss_and_the_shrinkage():
    tokens, pages = torch.randn(2, 3, 2), torch.randn(2, 3)
    config = Config(soften=0.0, shrink=0.1)
    loss = pair_loss(config, batch_of(tokens, []), *tokens, *pages)
    shrunk = (pages.square().sum() / 3 + tokens.square().sum() / 6) * 0.1 / 2
    assert_close(loss, page_loss(*pages) + shrunk)


def test_learning_counts_the_pairs_whose_better_page_scores_higher_by_both_heads():
    """A page scores its page reward and the mean of its token rewards."""
    tokens = torch.tensor([[[4.0, 0.0], [0.0, 0.0], [1.0, 1.0]], torch.zeros(3, 2).tolist()])
    pages = torch.tensor([[0.0, 0.0, -3.0], [1.0, 1.0, 0.0]])
    batch, config = batch_of(tokens, [0, 2]), Config()

    def model(prompt, valid, item, mask):
        return tokens.flatten(0, 1), pages.flatten()

    loss, right = learn_pairs(SimpleNamespace(model=model), config, batch, True)
    assert right == pytest.approx(1 / 3)  # 2 > 1; 0 < 1; -2 < 0
    assert_close(loss, pair_loss(config, batch, *tokens, *pages))


def pair_of(kind, gap=1.0, user=0):
    return Pair(user, kind, [1], [5.0], [2, 3], [3, 2], [True, True], gap, "swap", 0)


def test_the_report_is_of_both_heads_and_of_each(monkeypatch):
    page = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    token = np.array([[0.0, 0.5], [0.0, 1.0], [3.0, 0.0], [1.0, 0.0]])
    monkeypatch.setattr(reward, "score_pairs", lambda *_: {"page": page, "token": token})
    gaps = [0.1, 0.2, 0.3, 0.4]
    pairs = [pair_of("ranked", g) for g in gaps[:3]] + [pair_of("diversity", gaps[3])]
    found = reward.report(None, pairs, None)
    assert found["ranked"] == {
        "accuracy": round(2 / 3, 4),
        "page_accuracy": 0.5,  # right, equal, wrong
        "token_accuracy": round(1 / 3, 4),
        "pairs": 3,
    }
    assert found["diversity"]["accuracy"] == 1.0 and found["pairs"] == 4
    margin = np.array([0.5, -1.0, 1.0, 4.0])
    assert found["energy_correlation"] == pytest.approx(spearman(margin, np.array(gaps)))
    assert found["calibration_error"] == pytest.approx(calibration(margin))
    assert reward.report(None, [], None) == {}


def test_held_out_users_are_the_share_asked_for_and_of_no_pair_to_learn_from():
    config = Config(held_out=0.2, leave_out="ranked")
    pairs = [pair_of(kind, user=u) for u in range(2000) for kind in ("ranked", "diversity")]
    train, held = reward.split_pairs(config, pairs)
    users = {p.user for p in held}
    assert 0.17 < len(users) / 2000 < 0.23 and not users & {p.user for p in train}
    assert {p.kind for p in train} == {"diversity"} and {p.kind for p in held} == {
        "ranked",
        "diversity",
    }
    with pytest.raises(PageLLMError, match="held out"):
        reward.split_pairs(config, held)


def test_better_pages_score_0_on_average_once_the_heads_are_centred(model, monkeypatch):
    scores = {"page": np.array([[1.0], [3.0]]), "token": np.array([[-1.0], [-2.0]])}
    monkeypatch.setattr(reward, "score_pairs", lambda *_, rejected: scores)
    page, token = model.page_mean.item(), model.token_mean.item()
    reward.centre(model, [], None)
    assert model.page_mean.item() == page + 2.0 and model.token_mean.item() == token - 1.5
    model.page_mean.fill_(page)
    model.token_mean.fill_(token)
