"""Laws of statistics under a mask."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from kernels import masked, reference
from tests.strategies import garbage, seeds

FUNCTIONS = ["mean", "variance", "center", "whiten"]


@pytest.fixture(scope="module", autouse=True, params=[masked.BLOCK, 1, 5])
def block(request):
    """Every law holds for tensors taken whole and for tensors taken by blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked, "BLOCK", request.param)
        yield


@st.composite
def masked_tensors(draw, dtype=torch.float64, least=0, most=12):
    """x and a mask of one shape, any pattern, at least `least` entries kept."""
    shape = draw(st.sampled_from([(most,), (3, 4), (2, 3, 2)]))
    kept = draw(st.lists(st.booleans(), min_size=most, max_size=most))
    assume(sum(kept) >= least)
    generator = torch.Generator().manual_seed(draw(seeds))
    x = torch.randn(most, generator=generator, dtype=dtype)
    return x.reshape(shape), torch.tensor(kept).reshape(shape)


@pytest.mark.parametrize("name", FUNCTIONS)
@given(masked_tensors())
@settings(deadline=None)
def test_equals_the_definition(name, case):
    x, mask = case
    exact = getattr(reference, name)(x, mask)
    assert_close(getattr(masked, name)(x, mask), torch.as_tensor(exact, dtype=torch.float64))


@pytest.mark.parametrize("name", FUNCTIONS)
@given(masked_tensors(dtype=torch.float32), garbage)
@settings(deadline=None)
def test_what_lies_off_the_mask_moves_no_bit(name, case, junk):
    x, mask = case
    function = getattr(masked, name)
    clean, dirty = (
        function(torch.where(mask, x, 0.0), mask),
        function(torch.where(mask, x, junk), mask),
    )
    assert torch.equal(clean, dirty) and dirty.isfinite().all()
    if dirty.dim():
        assert not dirty[~mask].any()


@given(masked_tensors(dtype=torch.float32, least=3), st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
@settings(deadline=None)
def test_whitened_has_mean_0_and_variance_1_whatever_unit_and_origin(case, a, b):
    """whiten(a x + b) = whiten(x) for a > 0, up to the rounding of a x + b itself."""
    x, mask = case
    white = masked.whiten(x, mask)
    assert_close(masked.mean(white, mask), torch.tensor(0.0), rtol=0, atol=1e-6)
    assert_close(masked.variance(white, mask), torch.tensor(1.0), rtol=1e-5, atol=0)
    noise = 1e-6 * (abs(b) + a * 4) / (a * reference.variance(x, mask) ** 0.5)
    assert_close(masked.whiten(x * a + b, mask), white, rtol=0, atol=1e-5 + noise)


@given(masked_tensors(least=1), seeds)
@settings(deadline=None)
def test_order_does_not_matter(case, seed):
    """Permuting the cells permutes the result."""
    x, mask = (y.flatten() for y in case)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    assert_close(masked.whiten(x[order], mask[order]), masked.whiten(x, mask)[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(st.floats(-1e4, 1e4, width=32), st.integers(1, 3000))
@settings(deadline=None, max_examples=50)
def test_equal_entries_are_exactly_their_mean(dtype, value, n):
    """The rounding of the mean leaves nothing that a tiny spread could blow up."""
    n = min(n, 40 * masked.BLOCK)  # so many blocks are enough, and a block of one entry is slow
    x, mask = torch.full((n,), value, dtype=dtype) / 3, torch.ones(n, dtype=torch.bool)
    assert_close(masked.mean(x, mask), x[0], rtol=1e-6 if dtype == torch.float32 else 1e-15, atol=0)
    assert masked.variance(x, mask) == 0
    assert not masked.center(x, mask).any()
    assert not masked.whiten(x, mask).any()


def test_a_large_offset_costs_no_digits():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, generator=generator) + 1e4  # float32: one part in 1e7 of 1e4 is 1e-3
    mask = torch.ones(4000, dtype=torch.bool)
    assert_close(masked.variance(x, mask).double(), x.double().var(), rtol=1e-5, atol=0)
    assert_close(masked.center(x, mask).double(), x.double() - x.double().mean(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1e4, -3e6])
def test_blocks_of_different_levels_join_to_the_variance_of_all(offset, monkeypatch):
    """Most of this variance is that of the blocks' means; float64 is the reference."""
    monkeypatch.setattr(masked, "BLOCK", 5000)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5 * masked.BLOCK + 7, generator=generator) + offset
    x += (torch.arange(len(x)) // masked.BLOCK) * 30.0
    mask = torch.rand(len(x), generator=generator) < 0.7
    mask[masked.BLOCK : 2 * masked.BLOCK] = False
    exact = x[mask].double()
    assert_close(masked.mean(x, mask).double(), exact.mean(), rtol=1e-7, atol=1e-6)
    assert_close(masked.variance(x, mask).double(), exact.var(), rtol=1e-6, atol=0)
    want = (exact - exact.mean()) / exact.std()
    assert_close(masked.whiten(x, mask)[mask].double(), want, rtol=0, atol=1e-6)
    assert_close(masked.center(x, mask)[mask].double(), exact - exact.mean(), rtol=0, atol=3e-5)
    assert not masked.whiten(x, mask)[~mask].any() and masked.whiten(x, mask).shape == x.shape


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 0), (3,), (2, 2)])
@pytest.mark.parametrize("kept", [0, 1])
def test_fewer_than_two_entries(shape, kept):
    x, mask = torch.full(shape, 3.7), torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[:kept] = True
    assert masked.mean(x, mask) == (x.flatten()[0] if mask.any() else 0.0)
    assert masked.variance(x, mask) == 0
    for function in (masked.center, masked.whiten):
        assert torch.equal(function(x, mask), torch.zeros(shape))


def test_two_entries():
    """Unbiased: (1 - 2)^2 + (3 - 2)^2 over n - 1 = 1."""
    x, mask = torch.tensor([1.0, math.nan, 3.0]), torch.tensor([True, False, True])
    assert masked.mean(x, mask) == 2 and masked.variance(x, mask) == 2
    assert torch.equal(masked.center(x, mask), torch.tensor([-1.0, 0.0, 1.0]))
    assert_close(masked.whiten(x, mask), torch.tensor([-1.0, 0.0, 1.0]) / math.sqrt(2))


def test_eps_is_a_standard_deviation_not_a_variance():
    x, mask = torch.tensor([-1e-4, 1e-4]), torch.ones(2, dtype=torch.bool)
    assert_close(masked.variance(masked.whiten(x, mask), mask), torch.tensor(1.0))
    spread = masked.variance(x, mask)
    assert_close(masked.whiten(x, mask, eps=1e-4), x / torch.sqrt(spread + 1e-8))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_equal_finite_differences_and_none_comes_from_padding(name):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, generator=generator, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    function = getattr(masked, name)
    assert torch.autograd.gradcheck(lambda x: function(x, mask), x)
    dirty = torch.where(mask, x.detach(), math.nan).requires_grad_()
    out = function(dirty, mask)
    (grad,) = torch.autograd.grad(
        (out * torch.arange(out.numel()).reshape(out.shape)).sum() + out.sum(), dirty
    )
    assert grad.isfinite().all() and not grad[~mask].any()


def test_the_gradient_of_equal_entries_is_finite():
    x = torch.ones(3, requires_grad=True)
    (grad,) = torch.autograd.grad(masked.whiten(x, torch.ones(3, dtype=torch.bool))[0], x)
    assert grad.isfinite().all()
    (grad,) = torch.autograd.grad(masked.mean(x, torch.ones(3, dtype=torch.bool)), x)
    assert_close(grad, torch.full((3,), 1 / 3))


@pytest.mark.parametrize(
    "dtype, expected",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.int64, torch.float32),
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_dtypes_widen(name, dtype, expected):
    x, mask = torch.arange(300).to(dtype), torch.ones(300, dtype=torch.bool)
    out = getattr(masked, name)(x, mask)
    assert out.dtype == expected and torch.equal(out, getattr(masked, name)(x.to(expected), mask))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_wrong_calls_are_refused(name):
    for mask in (
        torch.ones(2, 2, dtype=torch.bool),
        torch.ones(2),
        torch.ones(1, dtype=torch.bool),
    ):
        with pytest.raises(ValueError, match=f"masked.{name}: x"):
            getattr(masked, name)(torch.zeros(2), mask)
