"""Pages drawn at once: they are legal, and their probabilities are those of the draw."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from pagellm.model.draws import draw, drawn_logp, first_kl

STEADY = settings(deadline=None, max_examples=40)


@st.composite
def cases(draw_from):
    """Logits (B, N) float64, some of them -inf, at least one legal item a row; k."""
    B, N = draw_from(st.integers(1, 3)), draw_from(st.integers(2, 5))
    g = torch.Generator().manual_seed(draw_from(st.integers(0, 2**31)))
    logits = 3 * torch.randn(B, N, generator=g, dtype=torch.float64)
    gone = torch.rand(B, N, generator=g) < 0.3
    gone[:, 0] = False
    return logits.masked_fill(gone, -torch.inf), draw_from(st.integers(1, 6))


@STEADY
@given(cases(), st.integers(0, 2**31))
def test_a_page_holds_different_legal_items_and_is_as_long_as_they_allow(case, seed):
    logits, k = case
    uniform = torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed))
    pages = draw(logits, uniform, k)
    for row, item, mask in zip(logits, pages.item.tolist(), pages.mask.tolist(), strict=True):
        legal = row.isfinite().sum().item()
        kept = [i for i, there in zip(item, mask, strict=True) if there]
        assert mask == sorted(mask, reverse=True) and len(kept) == min(k, legal)
        assert len(set(kept)) == len(kept) and all(math.isfinite(row[i]) for i in kept)
        assert all(i == -1 for i, there in zip(item, mask, strict=True) if not there)
    assert (pages.logp <= 1e-12).all()


@STEADY
@given(cases())
def test_probabilities_of_all_pages_add_up_to_one(case):
    """sum over ordered pages of exp(sum_k logp_k) = 1, and each slot is p_i / (what is left)."""
    logits, k = case
    row = logits[:1]
    legal = [i for i in range(row.shape[1]) if math.isfinite(row[0, i])]
    k = min(k, len(legal))
    pages = torch.tensor(list(itertools.permutations(legal, k)))
    mask = torch.ones(pages.shape, dtype=torch.bool)
    logp, _ = drawn_logp(row.expand(len(pages), -1), pages, mask)
    assert logp.double().sum(1).exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    of = torch.zeros(len(pages), dtype=torch.long)
    assert torch.equal(drawn_logp(row, pages, mask, of)[0], logp)  # one row for many pages
    p = row[0].softmax(0)
    left = 1.0
    for slot, item in enumerate(pages[-1].tolist()):
        assert logp[-1, slot].exp().item() == pytest.approx(float(p[item]) / left, rel=1e-4)
        left -= float(p[item])


def test_draws_follow_the_probabilities():
    """Frequencies of 20,000 pages of two out of three items, within five standard errors."""
    logits = torch.tensor([[1.0, 0.0, -1.0, -torch.inf]], dtype=torch.float64)
    n = 20_000
    uniform = torch.rand(n, 4, generator=torch.Generator().manual_seed(0))
    pages = draw(logits.expand(n, -1), uniform, 2)
    for page in itertools.permutations(range(3), 2):
        share = (pages.item == torch.tensor(page)).all(1).double().mean().item()
        want = drawn_logp(logits, torch.tensor([page]), torch.ones(1, 2, dtype=torch.bool))[0]
        p = math.exp(want.sum().item())
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_the_mode_is_the_ranking_and_a_page_depends_on_its_own_numbers():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]], dtype=torch.float64)
    same = torch.full((2, 3), 0.5)
    assert draw(logits, same, 3).item.tolist() == [[1, 2, 0], [0, 2, 1]]
    other = same.clone()
    other[1] = torch.tensor([0.9, 0.1, 0.99])
    assert torch.equal(draw(logits, same, 3).item[0], draw(logits, other, 3).item[0])


def test_almost_all_mass_on_one_item_leaves_the_others_their_share():
    """What is left after an item of probability 1 - 1e-13 is no rounding error: 2 : 1 stays."""
    logits = torch.tensor([[30.0, math.log(2.0), 0.0]], dtype=torch.float64)
    page, mask = torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool)
    logp, _ = drawn_logp(logits, page, mask)
    assert logp[0, 1].exp().item() == pytest.approx(2 / 3, rel=0.01)


@STEADY
@given(cases())
def test_entropy_and_kl_by_their_definitions(case):
    logits, _ = case
    mask = torch.ones(len(logits), 2, dtype=torch.bool)
    mask[-1, 1] = False
    item = logits.argmax(1, keepdim=True).expand(-1, 2)
    p, other = logits.softmax(1), logits.roll(1, 0).where(logits.isfinite(), -torch.inf)
    _, entropy = drawn_logp(logits, item, mask)
    want = -torch.where(p > 0, p * p.clamp(min=1e-300).log(), 0.0).sum(1)
    assert_close(entropy[:, 0].double(), want, atol=1e-5, rtol=1e-5)
    assert entropy[-1, 1] == 0
    assert_close(first_kl(logits, logits, mask), torch.zeros(mask.shape))
    ref = torch.where(other.isfinite() | ~logits.isfinite(), other, 0.0)
    kl = torch.where(p > 0, p * (logits.log_softmax(1) - ref.log_softmax(1)), 0.0).nan_to_num(0.0)
    assert_close(first_kl(logits, ref, mask)[:, 0].double(), kl.sum(1), atol=1e-5, rtol=1e-5)
