"""Keyed randomness, epochs, schedule, optimiser groups, and the guarded step."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.model.gpt2 import GPT2, Shape
from pagellm.stage import randomness
from pagellm.stage.config import PageLLMError
from pagellm.stage.dist import pick_device
from pagellm.stage.train import GuardedStep, batch_at, lr_at, optimiser, set_lr


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5))
def test_an_epoch_sees_every_example_once(n, batch, epoch):
    per_epoch = -(-n // batch)
    got = [batch_at(epoch * per_epoch + i, n, batch, 7) for i in range(per_epoch)]
    assert all(e == epoch for e, _ in got)
    assert sorted(np.concatenate([index for _, index in got])) == list(range(n))
    assert all(len(index) <= batch for _, index in got)


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 5), st.integers(0, 3))
def test_bucketed_batches_see_everything_once_and_pad_less(n, batch, epoch):
    length = tuple(int(x) for x in randomness.rng(n, "length").integers(1, 50, n))
    per_epoch = -(-n // batch)
    got = [batch_at(epoch * per_epoch + i, n, batch, 7, length=length)[1] for i in range(per_epoch)]
    assert sorted(np.concatenate(got)) == list(range(n))
    plain = [batch_at(epoch * per_epoch + i, n, batch, 7)[1] for i in range(per_epoch)]
    cost = [sum(len(b) * max(length[i] for i in b) for b in batches) for batches in (got, plain)]
    if n >= 10 * batch and batch > 1:
        assert cost[0] < cost[1]


def test_draws_depend_on_their_key_alone():
    assert randomness.rng(1, "a", 2).random() == randomness.rng(1, "a", 2).random()
    values = {
        randomness.rng(*parts).random()
        for parts in ((1, "a", 2), (2, "a", 2), (1, "b", 2), (1, "a", 3), (1, "a2"))
    }
    assert len(values) == 5
    # The same on every machine: these bits come from sha256 and Philox, both fixed by their papers.
    assert randomness.seed_of(0, "x") == int.from_bytes(
        __import__("hashlib").sha256(b"0\x1fx").digest()[:16], "little"
    )
    assert not np.array_equal(batch_at(0, 50, 50, 1)[1], batch_at(1, 50, 50, 1)[1])


def test_schedules():
    assert lr_at(0, 100, 1.0, warmup=10) == 0.1 and lr_at(9, 100, 1.0, warmup=10) == 1.0
    assert lr_at(100, 100, 1.0) == pytest.approx(0.1) and lr_at(0, 100, 1.0) == 1.0
    assert lr_at(50, 100, 1.0) == pytest.approx(0.55)
    assert [lr_at(s, 4, 1.0, shape="linear") for s in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_decay_falls_on_matrices_and_rows_apart():
    model = GPT2(Shape(1, 1, 4, 8), 5, 2, 3)
    groups = optimiser(model, 0.1, weight_decay=0.3, row_decay=0.2).param_groups
    by = {g["weight_decay"]: {id(p) for p in g["params"]} for g in groups}
    assert (
        id(model.h[0].mlp.c_fc.weight) in by[0.3]
        and id(model.item) in by[0.2]
        and id(model.user) in by[0.2]
    )
    assert (
        id(model.word) in by[0.0] and id(model.ln_f.weight) in by[0.0] and id(model.wpe) in by[0.0]
    )
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_a_step_that_is_not_finite_is_left_out_and_many_stop_the_run():
    w = torch.nn.Parameter(torch.ones(2))
    guard = GuardedStep(torch.optim.SGD([w], lr=1.0), [w], max_norm=1.0, patience=3)
    w.grad = torch.tensor([3.0, 4.0])
    assert guard.step("here") == pytest.approx(5.0)
    assert torch.allclose(w, torch.tensor([1 - 0.6, 1 - 0.8])) and w.grad is None
    before = w.detach().clone()
    for _ in range(2):
        w.grad = torch.tensor([math.nan, 1.0])
        guard.step("here")
    assert torch.equal(w, before)
    w.grad = torch.tensor([math.inf, 1.0])
    with pytest.raises(PageLLMError, match="here: the gradient was not finite 3 times"):
        guard.step("here")


def test_devices():
    assert pick_device("cpu").type == "cpu" and pick_device("auto").type in ("cpu", "cuda")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(PageLLMError, match="not usable here"):
            pick_device(name)


def test_rows_may_learn_slower_than_the_rest():
    """row_lr scales the step of everything that is looked up, at any later learning rate, and
    nothing else.
    """

    def moved(row_lr):
        model = GPT2(
            Shape(1, 1, 8, 8), 5, 3, 4, dropout=0.0, generator=torch.Generator().manual_seed(0)
        )
        model.add_gate(1.0)
        before = {name: w.detach().clone() for name, w in model.named_parameters()}
        opt = optimiser(model, 1e-3, row_lr=row_lr)
        set_lr(opt, 1e-2)
        sum(w.sum() for w in model.parameters()).backward()
        opt.step()
        return {
            name: float((w.detach() - before[name]).abs().max())
            for name, w in model.named_parameters()
        }

    plain, slow = moved(1.0), moved(0.1)
    for name, step in plain.items():
        looked_up = name in ("user", "item", "word", "wpe", "gate")
        assert slow[name] == pytest.approx(step * (0.1 if looked_up else 1.0), rel=1e-3), name
