"""Pages: always legal, no item twice; generation, scoring and enumeration agree."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from pagellm.model.decode import (
    LegalItems,
    beam,
    greedy,
    hybrid,
    inverse_cdf,
    one_shot,
    page_logp,
    ranking,
    sample,
    shared_start,
    slot_states,
    trim_padding,
)
from pagellm.model.gpt2 import GPT2, Shape
from pagellm.pages.variety import Variety
from tests.strategies import seeds

N, WORDS, USERS = 7, 5, 2
SHAPE = Shape(n_layer=2, n_head=2, n_embd=8, n_ctx=24)


def make_model(seed=0, gated=False):
    model = GPT2(SHAPE, WORDS, USERS, N, dropout=0.5).eval()
    if gated:
        model.add_gate()
    with torch.no_grad():
        for i, (name, weight) in enumerate(model.named_parameters()):
            if ".ln_" not in f".{name}":
                weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(100 * seed + i))
    return model


MODEL, GATED = make_model(), make_model(gated=True)


@st.composite
def prompts(draw, max_excluded=N):
    """Left-padded prompts of one to four tokens, and excluded items padded with -1."""
    B = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(1, 4), min_size=B, max_size=B))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ids = torch.randint(0, WORDS + USERS + N, (B, 4), generator=g)
    valid = torch.arange(4) >= 4 - torch.tensor(lengths)[:, None]
    gone = [draw(st.sets(st.integers(0, N - 1), max_size=max_excluded)) for _ in range(B)]
    excluded = torch.full((B, N), -1)
    for i, items in enumerate(gone):
        excluded[i, : len(items)] = torch.tensor(sorted(items), dtype=torch.long)
    return ids, valid, excluded, gone


def modes(ids, valid, excluded, k, seed=0):
    uniform = torch.rand(
        len(ids), k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    yield "greedy", greedy(MODEL, ids, valid, LegalItems(excluded, N), k)
    yield "sample", sample(MODEL, ids, valid, LegalItems(excluded, N), uniform)
    yield "beam", beam(MODEL, ids, valid, LegalItems(excluded, N), k, width=3)
    yield "one_shot", one_shot(MODEL, ids, valid, LegalItems(excluded, N), k)
    yield "hybrid", hybrid(MODEL, ids, valid, LegalItems(excluded, N), k, 2)


@settings(deadline=None, max_examples=40)
@given(prompts(), st.integers(1, 9), st.integers(0, 1000))
def test_pages_are_legal_distinct_and_as_long_as_they_can_be(batch, k, seed):
    ids, valid, excluded, gone = batch
    for mode, pages in modes(ids, valid, excluded, k, seed):
        assert pages.item.shape == pages.logp.shape == pages.mask.shape == (len(ids), k)
        for row, illegal in enumerate(gone):
            page = pages.item[row][pages.mask[row]].tolist()
            assert len(page) == min(k, N - len(illegal)), mode
            assert len(set(page)) == len(page) and not set(page) & illegal, mode
            assert pages.mask[row].tolist() == [True] * len(page) + [False] * (k - len(page))
            assert (pages.item[row][len(page) :] == -1).all() and (
                pages.logp[row][len(page) :] == 0
            ).all()


@settings(deadline=None, max_examples=40)
@given(
    prompts(),
    st.integers(1, 9),
    st.integers(0, 1000),
    st.sampled_from([1.0, 0.5, 2.0]),
    st.sampled_from([MODEL, GATED]),
)
def test_generation_and_update_give_one_log_probability(batch, k, seed, temperature, model):
    """Cached generation under the constraint equals the full pass over the finished page."""
    ids, valid, excluded, _ = batch
    uniform = torch.rand(
        len(ids), k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    pages = sample(model, ids, valid, LegalItems(excluded, N), uniform, temperature)
    with torch.no_grad():
        states = slot_states(model, ids, valid, pages.item, pages.mask)
        logp, entropy = page_logp(
            states, model.item, pages.item, pages.mask, excluded, temperature, with_entropy=True
        )
    assert_close(logp, pages.logp, atol=1e-5, rtol=1e-5)
    assert states.shape == (len(ids), k + 1, 8)
    assert (
        (entropy >= -1e-6).all()
        and (logp[~pages.mask] == 0).all()
        and (entropy[~pages.mask] == 0).all()
    )


def test_the_gate_says_how_loud_placed_items_are():
    """At 1, items on the page are read like any others. At 0, the states do not depend on them."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, WORDS + USERS + N, (3, 4), generator=g)
    valid, mask = torch.ones(3, 4, dtype=torch.bool), torch.ones(3, 5, dtype=torch.bool)
    pages = [torch.stack([torch.randperm(N, generator=g)[:5] for _ in range(3)]) for _ in range(2)]
    gated, plain = make_model(gated=True), make_model(gated=True)
    plain.gate = None
    with torch.no_grad():
        gated.gate.fill_(1.0)
        assert_close(
            slot_states(gated, ids, valid, pages[0], mask),
            slot_states(plain, ids, valid, pages[0], mask),
        )
        gated.gate.zero_()
        assert_close(*(slot_states(gated, ids, valid, page, mask) for page in pages))
        assert not torch.allclose(*(slot_states(plain, ids, valid, page, mask) for page in pages))


@settings(deadline=None, max_examples=30)
@given(
    prompts(),
    st.lists(st.integers(0, 2), min_size=1, max_size=6),
    st.integers(1, 6),
    st.integers(0, 1000),
)
def test_prompts_read_once_for_several_pages_change_nothing(batch, owners, k, seed):
    ids, valid, excluded, _ = batch
    group = torch.tensor([owner % len(ids) for owner in owners])
    prompt, seen, gone = ids[group], valid[group], excluded[group]
    uniform = torch.rand(
        len(group), k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    start = lambda: shared_start(MODEL, ids, valid, k, group)  # noqa: E731
    for alone, together in (
        (
            greedy(MODEL, prompt, seen, LegalItems(gone, N), k),
            greedy(MODEL, prompt, seen, LegalItems(gone, N), k, start()),
        ),
        (
            sample(MODEL, prompt, seen, LegalItems(gone, N), uniform),
            sample(MODEL, prompt, seen, LegalItems(gone, N), uniform, start=start()),
        ),
    ):
        assert torch.equal(alone.item, together.item) and torch.equal(alone.mask, together.mask)
        assert_close(alone.logp, together.logp, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            states = slot_states(MODEL, prompt, seen, alone.item, alone.mask)
        shared = slot_states(MODEL, prompt, seen, alone.item, alone.mask, start())
        assert_close(shared[:, 1:][alone.mask], states[:, 1:][alone.mask], atol=1e-5, rtol=1e-5)
        assert_close(shared[:, 0], states[:, 0], atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=15)
@given(prompts(max_excluded=3), st.integers(1, 3))
def test_probabilities_of_all_pages_sum_to_one_and_beam_finds_the_best(batch, k):
    """Over all legal pages, sum exp(logp) = 1; a beam as wide as the tree returns the likeliest."""
    ids, valid, excluded, gone = (x[:1] for x in batch)
    legal = [i for i in range(N) if i not in gone[0]]
    pages = torch.tensor(list(itertools.permutations(legal, k)))
    mask = torch.ones_like(pages, dtype=torch.bool)
    n = len(pages)
    with torch.no_grad():
        states = slot_states(MODEL, ids.expand(n, -1), valid.expand(n, -1), pages, mask)
        logp = page_logp(states, MODEL.item, pages, mask, excluded.expand(n, -1)).sum(1)
    assert logp.exp().sum().item() == pytest.approx(1.0, abs=1e-4)
    best = beam(MODEL, ids, valid, LegalItems(excluded, N), k, width=300)
    assert best.logp.sum().item() == pytest.approx(logp.max().item(), abs=1e-4)
    assert (
        beam(MODEL, ids, valid, LegalItems(excluded, N), k, width=1).item.tolist()
        == greedy(MODEL, ids, valid, LegalItems(excluded, N), k).item.tolist()
    )


def test_sampling_follows_the_distribution():
    """Over many draws the first slot's frequencies are exp(logp).

    The same random numbers give the same page.
    """
    B = 4000
    ids, valid = torch.tensor([[1, 6, 9]]).expand(B, -1), torch.ones(B, 3, dtype=torch.bool)
    excluded = torch.tensor([[2, -1]]).expand(B, -1)
    uniform = torch.rand(B, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pages = sample(MODEL, ids, valid, LegalItems(excluded, N), uniform)
    logits = torch.where(torch.arange(N) == 2, -torch.inf, pages.first[0])
    want = logits.softmax(0)
    seen = torch.bincount(pages.item[:, 0], minlength=N) / B
    assert (seen - want).abs().max() < 4 * (0.25 / B) ** 0.5
    again = sample(MODEL, ids[:5], valid[:5], LegalItems(excluded[:5], N), uniform[:5])
    assert torch.equal(again.item, pages.item[:5])


@settings(deadline=None, max_examples=30)
@given(prompts())
def test_neighbours_in_the_batch_and_padding_do_not_matter(batch):
    ids, valid, excluded, _ = batch
    together = greedy(MODEL, ids, valid, LegalItems(excluded, N), 4)
    for row in range(len(ids)):
        kept = valid[row]
        alone = greedy(
            MODEL,
            ids[row : row + 1, kept],
            valid[row : row + 1, kept],
            LegalItems(excluded[row : row + 1], N),
            4,
        )
        assert_close(alone.logp, together.logp[row : row + 1], atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=30)
@given(prompts(), st.integers(1, 4), st.integers(1, 10))
def test_a_ranking_is_the_page_and_then_the_rest_by_first_logits(batch, k, depth):
    ids, valid, excluded, gone = batch
    start = LegalItems(excluded, N)
    legal = start.legal.clone()
    pages = greedy(MODEL, ids, valid, start, k)
    item, score = ranking(pages, legal, depth)
    assert item.shape == score.shape == (len(ids), depth)
    for row, illegal in enumerate(gone):
        got = item[row][item[row] >= 0].tolist()
        page = pages.item[row][pages.mask[row]].tolist()
        rest = sorted(
            set(range(N)) - illegal - set(page), key=lambda i: (-pages.first[row, i].item(), i)
        )
        assert got == (page + rest)[: min(depth, N - len(illegal))]
        kept = score[row][: len(got)].tolist()
        assert kept == sorted(kept, reverse=True)


def test_constraint_with_a_filter_and_copies():
    allowed = torch.tensor([True, False] * 3 + [True])
    c = LegalItems(torch.tensor([[0, -1], [-1, -1]]), N, allowed)
    assert c.legal.int().tolist() == [[0, 0, 1, 0, 1, 0, 1], [1, 0, 1, 0, 1, 0, 1]]
    c.remove(torch.tensor([2, -1]))
    assert c.legal[0, 2].item() is False and c.legal[1].sum() == 4
    c.select(torch.tensor([0, 0, 1]))
    assert c.legal.shape == (3, N)


def test_gradient_reaches_legal_rows_only():
    """Items that the user may not see get exactly zero gradient from the page's log-probability."""
    model = make_model(3)
    ids, valid = torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool)
    item, excluded = torch.tensor([[3, 5]]), torch.tensor([[0, 6]])
    states = slot_states(model, ids, valid, item, torch.ones(1, 2, dtype=torch.bool)).detach()
    page_logp(
        states, model.item, item, torch.ones(1, 2, dtype=torch.bool), excluded
    ).sum().backward()
    moved = model.item.grad.abs().sum(1) > 0
    assert moved.tolist() == [False, True, True, True, True, True, False]


@given(seeds, st.integers(1, 40), st.integers(1, 6))
@settings(deadline=None, max_examples=100)
def test_a_draw_inverts_the_running_sum_and_never_takes_what_cannot_be(seed, N, B):
    """The item is the first at which the running sum exceeds uniform times the total.

    Probabilities are multiples of 1/8, whose sums are exact.
    """
    generator = torch.Generator().manual_seed(seed)
    p = (
        torch.randint(0, 4, (B, N), generator=generator).float()
        / 8
        * (torch.rand(B, N, generator=generator) < 0.5)
    )
    p[:, int(torch.randint(N, (1,), generator=generator))] += 0.125
    for uniform in (
        torch.rand(B, dtype=torch.float64, generator=generator),
        torch.zeros(B, dtype=torch.float64),
        torch.full((B,), 1 - 2.0**-53, dtype=torch.float64),
    ):
        total = p.double().cumsum(1)
        want = [
            next(n for n in range(N) if total[b, n] > uniform[b] * total[b, -1] or n == N - 1)
            for b in range(B)
        ]
        found = inverse_cdf(p, uniform)
        assert (p.gather(1, found[:, None]) > 0).all()
        # times the whole that may round to the whole, which nothing exceeds
        if uniform[0] < 1 - 2.0**-53:
            assert found.tolist() == want


def test_what_is_barred_is_what_is_not_legal_slot_after_slot():
    generator = torch.Generator().manual_seed(0)
    excluded = torch.tensor([[0, 3, -1], [-1, -1, -1], [1, 1, 6]])
    allowed = torch.rand(3, N, generator=generator) < 0.8
    one, two = LegalItems(excluded, N, allowed), LegalItems(excluded, N, allowed)
    for item in ([2, 4, -1], [5, -1, 2], None, [1, 0, 0]):
        if item is None:
            one.select(torch.tensor([1, 1, 0]))
            two.select(torch.tensor([1, 1, 0]))
        else:
            one.remove(torch.tensor(item))
            two.remove(torch.tensor(item))
        logits = torch.randn(3, N, generator=generator)
        want = torch.where(two.legal, logits, -torch.inf)
        assert torch.equal(one.mask(logits), want) and torch.equal(one.legal, two.legal)


def test_padding_that_all_rows_share_is_not_read():
    ids = torch.tensor([[0, 0, 0, 3, 4], [0, 0, 5, 6, 7]])
    valid = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]).bool()
    short = trim_padding(ids, valid)
    assert torch.equal(short[0], ids[:, 2:]) and torch.equal(short[1], valid[:, 2:])
    assert torch.equal(trim_padding(*short)[0], short[0])
    for none in (torch.zeros(2, 5, dtype=torch.bool), torch.zeros(2, 0, dtype=torch.bool)):
        assert trim_padding(ids[:, : none.shape[1]], none)[0].shape == none.shape
    item, mask, read = torch.tensor([[1, 2], [3, -1]]), torch.tensor([[1, 1], [1, 0]]).bool(), []
    hook = MODEL.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    padded, alone = (
        slot_states(MODEL, ids, valid, item, mask),
        slot_states(MODEL, *short, item, mask),
    )
    hook.remove()
    assert read == [5, 5] and torch.equal(padded, alone)


@settings(deadline=None, max_examples=20)
@given(prompts(), st.integers(1, 5), st.integers(1, 5))
def test_hybrid_is_greedy_at_the_top_and_one_shot_behind_it(case, head, k):
    """Slots up to `head` are greedy's; the others are the best legal items before slot head + 1."""
    ids, valid, excluded, _ = case
    page = hybrid(GATED, ids, valid, LegalItems(excluded, N), k, head)
    whole = greedy(GATED, ids, valid, LegalItems(excluded, N), min(head, k))
    m = min(head, k)
    assert torch.equal(page.item[:, :m], whole.item) and torch.equal(page.mask[:, :m], whole.mask)
    assert page.item.shape == (len(ids), k) and torch.equal(page.first, whole.first)
    if k > head:
        states = slot_states(GATED, ids, valid, whole.item, whole.mask)
        logits = GATED.item_logits(states[:, m])
        for row, (item, mask) in enumerate(zip(page.item, page.mask, strict=True)):
            gone = set(excluded[row].tolist()) | set(item[:m].tolist())
            rest = [i for i in logits[row].argsort(descending=True).tolist() if i not in gone]
            assert item[m:][mask[m:]].tolist() == rest[: k - m][: int(mask[m:].sum())]
            assert int(mask.sum()) == min(k, N - len(set(excluded[row].tolist()) - {-1}))


class Alike:
    """Stands for rerank.Kin: items of one parity are all alike, others not at all."""

    leaf = np.zeros(N, np.int64)

    @staticmethod
    def similarity(item, other):
        return (item % 2 == other[:, None] % 2).astype(float)


@settings(deadline=None, max_examples=20)
@given(prompts(), st.sampled_from([0.0, 0.7, 50.0]))
def test_variety_changes_what_each_slot_takes_in_every_mode(asked, strength):
    """Slot by slot, by one state, and by a beam of one: the largest changed logit that is legal."""
    ids, valid, excluded, gone = asked
    variety = Variety(Alike(), "mmr", strength)

    def legal():
        return LegalItems(excluded, N, variety=variety)

    found = {
        "greedy": greedy(MODEL, ids, valid, legal(), 4),
        "beam": beam(MODEL, ids, valid, legal(), 4, width=1),
        "one_shot": one_shot(MODEL, ids, valid, legal(), 4),
    }
    assert torch.equal(found["greedy"].item, found["beam"].item)
    states = slot_states(MODEL, ids, valid, found["greedy"].item, found["greedy"].mask)
    for mode, pages in found.items():
        for row, out in enumerate(gone):
            above = []
            for slot in range(min(4, N - len(out))):
                state = states[row, slot] if mode != "one_shot" else states[row, 0]
                logits = MODEL.item_logits(state[None])[0].detach().clone()
                for i in range(N):
                    alike = any(i % 2 == j % 2 for j in above)
                    logits[i] -= strength * alike
                    if i in above or i in out:
                        logits[i] = -torch.inf
                item = int(pages.item[row, slot])
                assert logits[item] >= logits.max() - 1e-4
                assert_close(
                    pages.logp[row, slot], logits.log_softmax(0)[item], atol=1e-4, rtol=1e-4
                )
                above.append(item)
    if strength == 0:
        plain = one_shot(MODEL, ids, valid, LegalItems(excluded, N), 4)
        assert torch.equal(found["one_shot"].item, plain.item)
