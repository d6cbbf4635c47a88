"""Slots that are learnt behind the policy's own items, as sft --own does."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.model.decode import LegalItems, sample
from pagellm.model.page_loss import Batch, draw_prefixes, labels_left, sft_loss
from tests.model.test_decode import N, make_model

MODEL = make_model(seed=3)


def batch(draws=None):
    label = torch.tensor([[1, 4, 6], [2, 5, -1]])
    prompt = torch.tensor([[5, 0, 1], [6, 2, 3]])
    return Batch(
        prompt,
        torch.ones_like(prompt, dtype=torch.bool),
        label,
        label >= 0,
        torch.tensor([[0], [3]]),
        draws=draws,
    )


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_a_slot_learns_a_label_that_is_not_above_it(data):
    K = 4
    labels = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=K, unique=True))
    own = data.draw(st.lists(st.integers(0, 9), min_size=K, max_size=K, unique=True))
    uniform = data.draw(st.lists(st.floats(0, 0.999), min_size=K, max_size=K))
    label = torch.full((1, K), -1)
    label[0, : len(labels)] = torch.tensor(labels)
    found = labels_left(label, torch.tensor([own]), torch.tensor([uniform]))[0].tolist()
    for slot in range(K):
        left = [x for x in labels if x not in own[:slot]]
        want = left[int(uniform[slot] * len(left))] if left else -1
        assert found[slot] == want


def test_own_items_are_those_that_the_policy_draws_and_others_keep_their_labels():
    draws = torch.from_numpy(np.random.default_rng(0).random((2, 2, 3)))
    draws[1] = torch.nan
    MODEL.train()
    b = batch(draws)
    b.prefix = draw_prefixes(MODEL, b)
    assert MODEL.training  # dropout is off while it draws, and on again
    MODEL.eval()
    legal = LegalItems(b.excluded[:1], N)
    want = sample(MODEL, b.prompt[:1], b.valid[:1], legal, draws[:1, 0]).item
    assert torch.equal(b.prefix.above[:1], want)
    assert torch.equal(b.prefix.above[1], b.item[1])
    assert torch.equal(b.prefix.target[1], b.item[1])
    assert set(b.prefix.target[0].tolist()) <= {1, 4, 6}


@pytest.mark.parametrize("objective", ["list", "both"])
def test_the_loss_is_that_of_the_targets_behind_what_stands_above(objective):
    none = torch.full((2, 2, 3), torch.nan, dtype=torch.float64)
    plain = sft_loss(MODEL, batch(), objective)
    kept = batch(none)
    kept.prefix = draw_prefixes(MODEL, kept)
    assert kept.prefix is None and sft_loss(MODEL, kept, objective) == plain
    b = batch(torch.from_numpy(np.random.default_rng(1).random((2, 2, 3))))
    b.prefix = draw_prefixes(MODEL, b)
    other = sft_loss(MODEL, b, objective) - (
        sft_loss(MODEL, b, "multinomial") if objective == "both" else 0
    )
    total, slots = 0.0, 0
    for row in range(2):
        prompt, above = b.prompt[row : row + 1], []
        behind = b.prefix.above[row].tolist(), b.prefix.target[row].tolist()
        for on, target in zip(*behind, strict=True):
            if target >= 0:
                ids = torch.cat([prompt[0], torch.tensor(above, dtype=torch.long) + 5 + 2])[None]
                logits = MODEL.item_logits(MODEL(ids, torch.ones_like(ids) > 0)[:, -1])[0].clone()
                logits[[*above, int(b.excluded[row, 0])]] = -torch.inf
                total, slots = total - logits.log_softmax(0)[target], slots + 1
            if on >= 0:
                above.append(on)
    torch.testing.assert_close(other, total / slots, atol=1e-5, rtol=1e-5)
