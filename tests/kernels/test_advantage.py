"""Laws of generalised advantage estimation; both scans are held to them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import advantage, reference
from kernels.advantage import by_blocks, by_doubling, gae, group_advantage
from tests.strategies import garbage, pages, prefix_mask, seeds, unit

SCANS = [by_blocks, by_doubling]
BLOCK = 65  # steps of by_blocks' blocks at a ratio of one half
LENGTHS = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 1, 3 * BLOCK]


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@given(pages(), unit, unit)
@settings(deadline=None)
def test_equals_the_definition(page, gamma, lam):
    reward, value, mask = page
    assert_close(gae(reward, value, mask, gamma, lam), reference.gae(*page, gamma, lam))


@given(pages(dtype=torch.float32), unit, unit)
@settings(deadline=None, max_examples=20)
def test_results_go_into_given_memory(page, gamma, lam):
    """Whatever it holds before; strided memory too. The bits are those of fresh memory."""
    want = gae(*page, gamma, lam)
    wide = torch.full((2, *page[0].shape, 2), torch.nan)
    out = wide[0, ..., 0], wide[1, ..., 0]
    for got, mine, fresh in zip(gae(*page, gamma, lam, out=out), out, want, strict=True):
        assert got is mine and torch.equal(got, fresh)
    assert wide[..., 1].isnan().all()


def test_memory_that_does_not_fit_is_refused():
    reward, value, mask = randn(2, 4), randn(2, 4), prefix_mask([4, 2], 4)
    good = torch.zeros(2, 4, dtype=torch.float64)
    for wrong in (good[:1], good.float(), good.clone().requires_grad_()):
        with pytest.raises(ValueError, match="gae: out"):
            gae(reward, value, mask, out=(good, wrong))
    with pytest.raises(ValueError, match="no gradient"):
        gae(reward.requires_grad_(), value, mask, out=(good, good.clone()))


def test_gamma_and_lam_default_to_1_and_95_percent():
    page = randn(2, 4), randn(2, 4), prefix_mask([4, 2], 4)
    for ours, given_ in zip(gae(*page), gae(*page, gamma=1.0, lam=0.95), strict=True):
        assert torch.equal(ours, given_)


@given(pages())
@settings(deadline=None)
def test_undiscounted_return_is_the_reward_still_to_come(page):
    """gamma = lam = 1 telescopes:  A_t + V_t = sum_{s >= t} r_s."""
    reward, value, mask = page
    to_come = (reward * mask).flip(1).cumsum(1).flip(1) * mask
    result, ret = gae(reward, value, mask, gamma=1.0, lam=1.0)
    assert_close(ret, to_come)
    assert_close(result, to_come - value * mask)


@given(pages(), unit)
@settings(deadline=None)
def test_lam_zero_is_the_one_step_error(page, gamma):
    """A_t = r_t + gamma V_{t+1} - V_t, and V after the last kept token is 0."""
    reward, value, mask = page
    next_value = torch.cat([(value * mask)[:, 1:], torch.zeros(len(value), 1)], 1)
    result, _ = gae(reward, value, mask, gamma, lam=0.0)
    assert_close(result, (reward + gamma * next_value - value) * mask)


@given(pages(dtype=torch.float32), garbage, unit, unit)
@settings(deadline=None)
def test_garbage_in_the_padding_moves_no_bit(page, junk, gamma, lam):
    reward, value, mask = page
    clean = gae(torch.where(mask, reward, 0.0), torch.where(mask, value, 0.0), mask, gamma, lam)
    dirty = gae(torch.where(mask, reward, junk), torch.where(mask, value, junk), mask, gamma, lam)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
        assert not b[~mask].any()


@given(pages(dtype=torch.float32), st.integers(1, 2 * BLOCK), garbage, unit, unit)
@settings(deadline=None)
def test_a_padded_row_equals_the_row_alone_bit_for_bit(page, extra, junk, gamma, lam):
    reward, value, mask = page
    B, T = mask.shape
    wide_mask = torch.cat([mask, torch.zeros(B, extra, dtype=torch.bool)], 1)
    padding = torch.full((B, extra), junk)
    wide = gae(
        torch.cat([reward, padding], 1), torch.cat([value, padding], 1), wide_mask, gamma, lam
    )
    for b, n in enumerate(mask.sum(1).tolist()):
        alone = gae(reward[b : b + 1, :n], value[b : b + 1, :n], mask[b : b + 1, :n], gamma, lam)
        for x, y in zip(wide, alone, strict=True):
            assert torch.equal(x[b, :n], y[0])
            assert not x[b, n:].any()


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("ratio", [0.0, 1e-300, 1e-30, 1e-6, 0.5, 0.99, 1.0])
def test_both_scans_equal_the_recurrence_at_block_edges(scan, T, ratio):
    x = randn(3, T)
    expected, carry = torch.zeros_like(x), torch.zeros(3, dtype=x.dtype)
    for t in reversed(range(T)):
        expected[:, t] = carry = x[:, t] + ratio * carry
    before = x.clone()
    assert_close(scan(x, ratio), expected, rtol=1e-12, atol=1e-11)
    assert torch.equal(x, before)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("ratio", [0.5, 0.97])
def test_neither_neighbours_nor_padding_move_a_bit_of_a_scan(scan, T, ratio):
    x = randn(3, T, dtype=torch.float32)
    padded = torch.cat([x, torch.zeros(3, 2 * BLOCK + 1)], 1)
    assert torch.equal(scan(padded, ratio)[:, :T], scan(x, ratio))
    assert torch.equal(scan(x[1:2], ratio), scan(x, ratio)[1:2])


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
def test_scans_of_nothing(scan, shape):
    for ratio in (0.0, 0.9, 1.0):
        assert scan(torch.zeros(shape), ratio).shape == shape


class Sums(TorchDispatchMode):
    """Counts running sums."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "cumsum" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "ratio, T, blocks",
    [(0.95, 865, 1), (0.95, 866, 2), (0.5, 65, 1), (0.5, 130, 2), (1.0, 9000, 1), (0.0, 3, 3)],
)
def test_a_block_is_as_long_as_its_weights_stay_above_two_to_the_minus_64(ratio, T, blocks):
    """Each block costs calls: a page of 20 slots is one block at any usual ratio."""
    with Sums() as seen:
        by_blocks(torch.ones(2, T), ratio)
    assert seen.count == blocks


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0), (2, 3)])
def test_nothing_kept_gives_zeros(shape, requires_grad):
    reward, value = (torch.full(shape, float("nan"), requires_grad=requires_grad) for _ in range(2))
    for x in gae(reward, value, torch.zeros(shape, dtype=torch.bool)):
        assert torch.equal(x, torch.zeros(shape))


@pytest.mark.parametrize("lam", [0.01, 0.5, 0.95, 0.99, 1.0])
def test_float32_stays_near_float64_over_a_thousand_steps(lam):
    reward, value, mask = (
        randn(4, 1024),
        randn(4, 1024) * 10,
        prefix_mask([1024, 1000, 33, 1], 1024),
    )
    page = reward.float(), value.float(), mask
    for ours, exact in zip(gae(*page, 1.0, lam), reference.gae(*page, 1.0, lam), strict=True):
        assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize(
    "dtypes, expected",
    [
        ((torch.bfloat16, torch.bfloat16), torch.float32),
        ((torch.float16, torch.float32), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
        ((torch.int64, torch.float32), torch.float32),
    ],
)
def test_dtypes_widen(dtypes, expected):
    """The result is that of the widened inputs: no sum is kept in half precision."""
    reward, value = ((randn(2, 5) * 4).to(dtype) for dtype in dtypes)
    mask = prefix_mask([5, 3], 5)
    widened = gae(reward.to(expected), value.to(expected), mask)
    for x, y in zip(gae(reward, value, mask), widened, strict=True):
        assert x.dtype == expected and torch.equal(x, y)


@given(pages(max_length=4), unit, unit)
@settings(deadline=None, max_examples=20)
def test_gradients_flow_to_reward_and_value_and_not_from_padding(page, gamma, lam):
    reward, value, mask = page
    reward, value = (torch.where(mask, x, float("nan")).requires_grad_() for x in (reward, value))
    result = gae(reward, value, mask, gamma, lam)
    for grad in torch.autograd.grad(
        sum((x * randn(*x.shape)).sum() for x in result), (reward, value)
    ):
        assert grad.isfinite().all() and not grad[~mask].any()


@pytest.mark.parametrize("entries", [16, 2**19])
def test_gradients_equal_finite_differences_also_twice(monkeypatch, entries):
    monkeypatch.setattr(advantage, "RANGE", 1)  # several blocks
    monkeypatch.setattr(advantage, "ENTRIES", entries)
    reward, value = (randn(2, 8).requires_grad_() for _ in range(2))
    mask = prefix_mask([8, 5], 8)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda r, v: gae(r, v, mask, 0.9, 0.8), (reward, value))


@pytest.mark.parametrize("entries", [1, 20, 1000])
def test_rows_taken_at_a_time_move_no_bit(monkeypatch, entries):
    reward, value = (randn(7, 10, dtype=torch.float32) for _ in range(2))
    page = reward, value, prefix_mask([10, 0, 3, 9, 1, 10, 5], 10)
    whole = gae(*page)
    taped = gae(reward.clone().requires_grad_(), value, page[2])
    monkeypatch.setattr(advantage, "ENTRIES", entries)
    for a, b, c in zip(gae(*page), whole, taped, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@given(seeds)
@settings(deadline=None, max_examples=20)
def test_a_hole_in_the_mask_is_refused_and_named(seed):
    generator = torch.Generator().manual_seed(seed)
    mask = prefix_mask([4, 4, 2], 4)
    row, step = (int(torch.randint(n, (1,), generator=generator)) for n in (2, 3))
    mask[row, step] = False
    with pytest.raises(ValueError, match=rf"hole at \(row, step\) \({row}, {step}\)"):
        gae(torch.zeros(3, 4), torch.zeros(3, 4), mask)


def test_wrong_calls_are_refused():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for wrong in [
        (x[:1], x, mask),
        (x, x[:, :2], mask),
        (x, x, mask[:, :2]),
        (x, x, mask.float()),
        (x[0], x[0], mask[0]),
    ]:
        with pytest.raises(ValueError, match="gae: reward"):
            gae(*wrong)
    for wrong in (1.1, -0.1, float("nan")):
        for rates in ({"gamma": wrong}, {"lam": wrong}):
            with pytest.raises(ValueError, match="gamma"):
                gae(x, x, mask, **rates)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuda: no CUDA device")
def test_a_gpu_gives_the_same():
    page = randn(5, 200), randn(5, 200), prefix_mask([200, 0, 1, 33, 150], 200)
    there = [x.cuda() for x in page]
    assert_close([x.cpu() for x in gae(*there, 0.99, 0.9)], list(gae(*page, 0.99, 0.9)))


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(2, 6), st.floats(-50, 50))
def test_group_advantages(seed, groups, samples, shift):
    """Every group sums to 0; a constant added to a group's rewards changes nothing; rloo is what a
    page earns above the mean of the others; grpo does not know the scale.
    """
    R = torch.randn(groups * samples, generator=torch.Generator().manual_seed(seed)).double()
    for kind in ("rloo", "grpo", "dr_grpo"):
        A = group_advantage(R, samples, kind)
        assert_close(A.view(-1, samples).sum(1), torch.zeros(groups).double(), atol=1e-9, rtol=0)
        moved = R.clone()
        moved[:samples] += shift
        assert_close(group_advantage(moved, samples, kind), A, atol=1e-7, rtol=1e-6)
        # groups do not meet: the last alone has the advantages that it has beside the others
        assert_close(group_advantage(R[-samples:], samples, kind), A[-samples:])
    for i in range(samples):
        others = [R[j] for j in range(samples) if j != i]
        assert_close(group_advantage(R, samples, "rloo")[i], R[i] - sum(others) / len(others))
    assert_close(group_advantage(R, samples, "dr_grpo")[0], R[0] - R[:samples].mean())
    grpo = group_advantage(R, samples, "grpo")
    assert_close(group_advantage(7 * R, samples, "grpo"), grpo)
    assert_close(grpo.view(-1, samples).std(1), torch.ones(groups).double())


def test_equal_rewards_have_no_advantage_and_wrong_groups_are_refused():
    same = torch.full((4,), 0.1)
    for kind in ("rloo", "grpo", "dr_grpo"):
        assert group_advantage(same, 4, kind).abs().max() < 1e-6
    for total, samples, kind in ((same, 3, "rloo"), (same, 1, "rloo"), (same, 2, "ppo")):
        with pytest.raises(ValueError, match="group_advantage"):
            group_advantage(total, samples, kind)
    with pytest.raises(ValueError, match="group_advantage"):
        group_advantage(same.view(2, 2), 2, "rloo")
