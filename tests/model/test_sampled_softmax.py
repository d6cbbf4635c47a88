"""The softmax over drawn items: its sum is unbiased, and it tends to the full softmax; sparse
gradients of rows.
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from pagellm.kernels.logprob import linear_logp
from pagellm.model.gpt2 import GPT2, Shape
from pagellm.model.page_loss import Batch, sft_loss
from pagellm.model.sampled_softmax import Proposal, locate, sampled_logits, sampled_logp
from pagellm.stage import dist
from pagellm.stage.config import PageLLMError
from pagellm.stage.train import GuardedStep, RowAdamW, optimiser

N, C = 8, 3
TRAIN = np.array([0, 0, 0, 1, 2, 2, 5])  # items 3, 4, 6 and 7 were never bought


class Fixed:
    """A generator whose draws are given.

    popular  which draws come from the train rows; the others are uniform over items
    """

    def __init__(self, popular, uniform, row):
        self.popular, self.values = np.array(popular), [np.array(uniform), np.array(row)]

    def random(self, size):
        return np.where(self.popular, 0.0, 1.0 - 1e-12)

    def integers(self, high, size):
        return self.values[0].copy() if high == N else self.values[1][:size]


def problem(seed):
    g = torch.Generator().manual_seed(seed)
    hidden, rows = torch.randn(2, C, generator=g), torch.randn(N, C, generator=g)
    return hidden, rows, torch.tensor([2, 4]), torch.tensor([[0, -1], [3, 6]])


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99))
def test_the_estimated_sum_is_right_on_average_by_enumeration(seed):
    """E[Z^] = Z exactly, over all 2 N R ways in which two draws can fall; one of them is given."""
    hidden, rows, target, illegal = problem(seed)
    proposal, want = Proposal(TRAIN, N), torch.zeros(2, dtype=torch.float64)
    assert proposal.q.sum() == pytest.approx(1.0) and (proposal.q > 0).all()
    ways = [([False], [i], [0], 0.5 / N) for i in range(N)] + [
        ([True], [0], [r], 0.5 / len(TRAIN)) for r in range(len(TRAIN))
    ]
    for (p1, u1, r1, w1), (p2, u2, r2, w2) in itertools.product(ways, ways):
        row = [r for p, r in ((p1, r1), (p2, r2)) if p[0]]
        rng = Fixed(p1 + p2, u1 + u2, [r[0] for r in row])
        candidates = proposal.draw(target, 2, rng)
        z = sampled_logits(hidden, rows[candidates[0]], candidates).double()
        gone = (locate(candidates, illegal)[:, :, None] == torch.arange(z.shape[1])).any(1)
        want += w1 * w2 * z.exp().masked_fill(gone, 0.0).sum(1)
    full = (hidden @ rows.T).double().exp()
    full[0, 0] = full[1, 3] = full[1, 6] = 0.0
    assert_close(want, full.sum(1), atol=1e-5, rtol=1e-5)


def losses(n, seed, draws=60):
    """Mean sampled loss and gradient over independent draws, beside the full softmax's."""
    hidden, rows, target, illegal = problem(seed)
    hidden, rows = hidden.requires_grad_(), rows.requires_grad_()
    proposal, found = Proposal(TRAIN, N), []
    full = -linear_logp(hidden, rows, target, illegal).sum()
    want = [full.detach(), *torch.autograd.grad(full, (hidden, rows))]
    for i in range(draws):
        candidates = proposal.draw(target, n, np.random.default_rng([seed, n, i]))
        loss = -sampled_logp(hidden, rows[candidates[0]], candidates, target, illegal).sum()
        found.append([loss.detach(), *torch.autograd.grad(loss, (hidden, rows))])
    return [torch.stack(column) for column in zip(*found, strict=True)], want


@pytest.mark.parametrize("seed", range(4))
def test_more_draws_come_closer_to_the_full_softmax_in_loss_and_gradient(seed):
    """The mean square error falls about as 1/n.

    64 times the draws give at most an eighth of its root.
    """
    error = {}
    for n in (16, 1024):
        got, want = losses(n, seed)
        error[n] = [float((g - w).square().mean().sqrt()) for g, w in zip(got, want, strict=True)]
    assert all(late < early / 4 for early, late in zip(error[16], error[1024], strict=True)), error


def test_jensen_the_loss_is_too_small_on_average_never_too_large():
    got, want = losses(4, 1, draws=2000)
    gap = float(want[0] - got[0].mean())
    assert 0 < gap < 0.5


def test_an_excluded_item_counts_nowhere_and_the_correction_matters():
    hidden, rows, target, illegal = problem(3)
    proposal = Proposal(TRAIN, N)
    candidates = proposal.draw(target, 50, np.random.default_rng(0))
    before = sampled_logp(hidden, rows[candidates[0]], candidates, target, illegal)
    for row, gone in ((0, [0]), (1, [3, 6])):
        changed = rows.clone()
        changed[gone] = 50.0
        after = sampled_logp(hidden, changed[candidates[0]], candidates, target, illegal)
        assert_close(after[row], before[row])
        assert not torch.allclose(after[1 - row], before[1 - row])
    assert not torch.allclose(
        before, sampled_logp(hidden, torch.ones(len(candidates[0]), C), candidates, target)
    )


def test_candidates_are_the_batch_and_the_draws_once_each():
    proposal, target = Proposal(TRAIN, N), torch.tensor([[4, -1], [2, 4]])
    item, log_weight = proposal.draw(target, 500, np.random.default_rng(1))
    assert item.tolist() == list(range(N)) and log_weight[2] == log_weight[4] == 0
    # n q draws are expected of each item, so its weight is near 1.
    others = torch.tensor([0, 1, 3, 5, 6, 7])
    assert log_weight[others].abs().max() < 0.5
    assert locate((item, log_weight), torch.tensor([-1, 4])).tolist() == [-1, 4]
    empty = Proposal(np.zeros(0, np.int64), N).draw(target, 3, np.random.default_rng(0))
    assert {2, 4} <= set(empty[0].tolist())


def model_of(seed, items=40):
    torch.manual_seed(seed)
    return GPT2(Shape(1, 2, 8, 32), 9, 5, items, dropout=0.0)


def batch(proposal=None, n=0, items=40):
    rng = np.random.default_rng(5)
    item = torch.from_numpy(np.stack([rng.permutation(items)[:3] for _ in range(4)]))
    excluded = (item[:, :1] + 1) % items
    excluded = torch.where((excluded[:, :, None] == item[:, None]).any(2), -1, excluded)
    prompt = torch.randint(0, 9 + 5 + items, (4, 5), generator=torch.Generator().manual_seed(0))
    valid, mask = (torch.ones_like(x, dtype=torch.bool) for x in (prompt, item))
    b = Batch(prompt, valid, item, mask, excluded)
    if n:
        b.candidates = proposal.draw(item, n, rng)
    return b


@pytest.mark.parametrize("objective", ["list", "multinomial", "both"])
def test_the_fine_tuning_loss_tends_to_the_full_one(objective):
    model, proposal = model_of(0), Proposal(np.arange(40), 40)
    full = float(sft_loss(model, batch(), objective).detach())
    far, near = (
        abs(float(sft_loss(model, batch(proposal, n), objective).detach()) - full)
        for n in (5, 200_000)
    )
    assert near < 3e-3 and near < far


def test_a_row_goes_as_plain_adamw_would_with_its_own_gradients():
    """Row r under RowAdamW moves as under torch's AdamW on that row alone.

    AdamW gets the gradients of the steps in which the row occurs.
    """
    torch.manual_seed(1)
    table = torch.nn.Parameter(torch.randn(5, 3))
    alone = [torch.nn.Parameter(row.detach().clone()) for row in table]
    opts = [torch.optim.AdamW([w], lr=0.1, betas=(0.9, 0.95), weight_decay=0.2) for w in alone]
    opt = RowAdamW(
        [{"params": [table], "weight_decay": 0.2, "lazy": True}], lr=0.1, betas=(0.9, 0.95)
    )
    for step in range(12):
        met = torch.randperm(5)[: 1 + step % 3]
        value = torch.randn(len(met), 3)
        for r, g in zip(met.tolist(), value, strict=True):
            alone[r].grad = g
            opts[r].param_groups[0]["lr"] = 0.1 / (1 + step)
            opts[r].step()
        # Repeats must add up, and rows without a gradient (here one of zeros) must not move.
        still = [r for r in range(5) if r not in met.tolist()][0]
        index = torch.cat([met, met, torch.tensor([still])])
        table.grad = torch.sparse_coo_tensor(
            index[None],
            torch.cat([value / 4, value * 3 / 4, torch.zeros(1, 3)]),
            (5, 3),
            check_invariants=True,
        )
        if step % 4 == 3:
            table.grad = table.grad.to_dense()
        opt.param_groups[0]["lr"] = 0.1 / (1 + step)
        before = table.detach().clone()
        opt.step()
        assert torch.equal(table[still], before[still])
    for r in range(5):
        assert_close(table[r], alone[r], atol=1e-6, rtol=1e-5)


def test_lazy_rows_equal_plain_adamw_where_all_rows_are_met_and_differ_where_not():
    def learn(lazy, steps, items):
        model = model_of(2, items)
        opt = optimiser(model, 1e-2, 0.1, lazy=lazy)
        guard = GuardedStep(opt, model.parameters(), 0.5)
        proposal = Proposal(np.arange(items), items)
        for step in range(steps):
            b = batch(items=items)
            b.candidates = proposal.draw(
                b.item, 400 if items < 20 else 2, np.random.default_rng(step)
            )
            sft_loss(model, b).backward()
            assert model.item.grad.is_sparse == lazy
            guard.step("here")
        return model.state_dict()

    plain, lazy = (learn(kind, 4, 8) for kind in (False, True))
    unmet = {"user"}  # no prompt shows every user: their rows alone may differ
    for name in set(plain) - unmet:
        assert_close(lazy[name], plain[name], atol=1e-5, rtol=1e-4)
    plain, lazy = (learn(kind, 4, 200)["item"] for kind in (False, True))
    assert not torch.allclose(plain, lazy, atol=1e-4)


def test_moments_of_lazy_rows_survive_a_checkpoint():
    model, other = model_of(3), model_of(4)
    opts = [optimiser(m, 1e-2, lazy=True) for m in (model, other)]

    def learn(m, opt):
        sft_loss(m, batch(Proposal(np.arange(40), 40), 10)).backward()
        GuardedStep(opt, m.parameters(), 1.0).step("here")

    learn(model, opts[0])
    dist.load_weights(other, dist.weights(model))
    dist.load_optimiser(other, opts[1], dist.optimiser_state(model, opts[0]))
    for m, opt in zip((model, other), opts, strict=True):
        learn(m, opt)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_lazy_rows_are_refused_in_several_processes(monkeypatch):
    monkeypatch.setattr(dist, "world", lambda: 2)
    with pytest.raises(
        PageLLMError, match="lazy_rows works in one process, or with --parallel rows"
    ):
        optimiser(model_of(0), 1e-3, lazy=True)
