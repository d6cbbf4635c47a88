"""Eq. 3 against its plain form; a batch read in parts of like length is the same batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from pagellm.model.gpt2 import GPT2, Shape
from pagellm.model.prompts import Example
from pagellm.pretrain import next_token_loss

WORDS, SPECIALS, USERS, ITEMS = 9, 3, 4, 6
PAD = WORDS
FIRST = WORDS + SPECIALS + USERS  # token of item 0


def model() -> GPT2:
    torch.manual_seed(0)
    return GPT2(
        Shape(n_layer=1, n_head=2, n_embd=8, n_ctx=16),
        n_words=WORDS + SPECIALS,
        n_users=USERS,
        n_items=ITEMS,
        dropout=0.0,
    ).double()


def example(rng: np.random.Generator, over: str, length: int, targets: int) -> Example:
    first, count = (0, WORDS) if over == "words" else (FIRST, ITEMS)
    prompt = rng.integers(WORDS, size=length - targets).tolist()
    return Example(
        prompt + (first + rng.integers(count, size=targets)).tolist(),
        [False] * (length - targets) + [True] * targets,
        over,
    )


def plainly(net: GPT2, examples: list[Example]) -> torch.Tensor:
    """One example after another, one softmax over the words or the items each."""
    nats, count = [], 0
    for e in examples:
        hidden = net(torch.tensor([e.ids]))[0]
        rows, first = (net.word[:WORDS], 0) if e.over == "words" else (net.item, FIRST)
        for t in np.flatnonzero(e.mask):
            nats.append(-(hidden[t - 1] @ rows.T).log_softmax(0)[e.ids[t] - first])
            count += 1
    return sum(nats, torch.zeros((), dtype=torch.float64)) / max(count, 1)


def gradients(net: GPT2, loss: torch.Tensor) -> list[torch.Tensor]:
    weights = list(net.parameters())
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]


@settings(deadline=None)
@given(
    seed=st.integers(0, 999),
    buckets=st.integers(1, 9),
    shapes=st.lists(
        st.tuples(st.sampled_from(["words", "items"]), st.integers(2, 12), st.integers(0, 11)),
        min_size=1,
        max_size=7,
    ),
)
def test_the_loss_and_its_gradients_are_eq_3_in_any_number_of_buckets(seed, buckets, shapes):
    rng = np.random.default_rng(seed)
    examples = [
        example(rng, over, length, min(targets, length - 1)) for over, length, targets in shapes
    ]
    net = model()
    want = plainly(net, examples)
    got = next_token_loss(net, examples, PAD, WORDS, buckets=buckets)
    assert_close(got.double(), want, rtol=1e-6, atol=1e-7)
    if want.requires_grad:
        assert_close(gradients(net, got), gradients(net, want), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "buckets, read", [(1, 8 * 16), (2, 4 * 5 + 4 * 16), (8, sum(range(2, 6)) + 4 * 16)]
)
def test_each_bucket_is_padded_to_its_own_longest(buckets, read):
    rng = np.random.default_rng(0)
    examples = [example(rng, "words", length, 1) for length in (16, 2, 16, 3, 16, 4, 16, 5)]
    net, seen = model(), []
    net.register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))
    next_token_loss(net, examples, PAD, WORDS, buckets=buckets)
    assert sum(seen) == read and len(seen) == buckets
