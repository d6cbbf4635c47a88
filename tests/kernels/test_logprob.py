"""Laws of log-probabilities and entropies, from logits and straight from hidden states."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import logprob, reference
from kernels.logprob import entropy, even_slices, linear_logp, token_logp
from tests.strategies import garbage, seeds

temperatures = st.sampled_from([0.3, 1.0, 2.5])
# entries and rows of a tile, tiles that may be kept for backward
TILINGS = [
    (1, 1, 0),
    (7, 3, 0),
    (7, 3, 99),
    (12, 2, 0),
    (40, 2, 99),
    (2**21, 2048, 0),
    (2**21, 2048, 1),
]


# The fixture below only sets two numbers, the same for every example of a test.
per_tiling = settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def tiling(request, monkeypatch):
    monkeypatch.setitem(logprob.TILE, "cpu", request.param[0])
    monkeypatch.setattr(logprob, "TILE_ROWS", request.param[1])
    monkeypatch.setitem(logprob.KEEP, "cpu", request.param[2])
    monkeypatch.setattr(logprob, "KEEP_FROM", 0)


@st.composite
def choices(draw, dtype=torch.float64, width=6):
    """logits (B, V), ids (B,), and legal (B, V) with the id of each row and others."""
    B, V = draw(st.integers(1, 3)), draw(st.integers(1, width))
    generator = torch.Generator().manual_seed(draw(seeds))
    logits = torch.randn(B, V, generator=generator, dtype=dtype) * draw(
        st.sampled_from([0.1, 1.0, 10.0])
    )
    ids = torch.randint(V, (B,), generator=generator)
    legal = torch.rand(B, V, generator=generator) < 0.5
    return logits, ids, legal.scatter(1, ids[:, None], True)


@st.composite
def heads(draw, dtype=torch.float64, excluding=True):
    """hidden (N, C), weight (V, C), target (N,), excluded (N, E), repeats and padding anywhere."""
    N, C, V, E = (draw(st.integers(low, high)) for low, high in ((0, 5), (1, 3), (2, 9), (0, 6)))
    generator = torch.Generator().manual_seed(draw(seeds))
    hidden, weight = (torch.randn(n, C, generator=generator, dtype=dtype) * 2 for n in (N, V))
    target = torch.randint(V, (N,), generator=generator)
    excluded = torch.randint(-1, V, (N, E), generator=generator)
    if excluding:
        excluded[excluded == target[:, None]] = -1
    return hidden, weight, target, excluded


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def legal_set(excluded, V):
    legal = torch.ones(len(excluded), V + 1, dtype=torch.bool)
    return legal.scatter_(1, torch.where(excluded < 0, V, excluded), False)[:, :V]


def gradients(outputs, inputs, weights_seed=5):
    """Gradients of one fixed random combination of all finite outputs."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum(
        (torch.where(x.isfinite(), x, 0.0) * randn(*x.shape, seed=weights_seed + i)).sum()
        for i, x in enumerate(outputs)
    )
    return torch.autograd.grad(total, inputs)


# From logits


@given(choices(), temperatures)
@settings(deadline=None)
def test_equal_the_definition(choice, temperature):
    logits, ids, legal = choice
    for mask in (None, legal):
        assert_close(
            token_logp(logits, ids, mask, temperature),
            reference.token_logp(logits, ids, mask, temperature),
        )
        assert_close(
            entropy(logits, mask, temperature), reference.entropy(logits, mask, temperature)
        )


@given(choices(), temperatures)
@settings(deadline=None)
def test_probabilities_of_the_legal_set_sum_to_one(choice, temperature):
    """sum_{j in C} pi_C(j) = 1, every j outside has -inf, and 0 <= entropy <= log |C|."""
    logits, _, legal = choice
    B, V = logits.shape
    every = torch.arange(V).expand(B, V)
    wide = [x[:, None].expand(B, V, V) for x in (logits, legal)]
    logp = token_logp(wide[0], every, wide[1], temperature)
    assert (logp <= 0).all() and torch.equal(logp == -math.inf, ~legal)
    assert_close(logp.exp().sum(1), torch.ones(B, dtype=logits.dtype))
    spread = entropy(logits, legal, temperature)
    assert (spread >= 0).all() and (spread <= legal.sum(1).double().log() + 1e-12).all()


@given(choices(dtype=torch.float32), garbage, temperatures)
@settings(deadline=None)
def test_illegal_logits_change_nothing_and_get_no_gradient(choice, junk, temperature):
    logits, ids, legal = choice
    results = []
    for filling in (0.0, junk):
        x = torch.where(legal, logits, filling).requires_grad_()
        outputs = token_logp(x, ids, legal, temperature), entropy(x, legal, temperature)
        results.append([*outputs, *gradients(outputs, x)])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty) and dirty.isfinite().all()
    assert not results[1][-1][~legal].any()


def test_an_illegal_id_has_logp_minus_infinity_and_gradient_0():
    logits = randn(2, 3).requires_grad_()
    legal = torch.tensor([[True, True, False], [True, True, True]])
    logp = token_logp(logits, torch.tensor([2, 2]), legal)
    assert logp[0] == -math.inf and logp[1].isfinite()
    (grad,) = torch.autograd.grad(logp.sum(), logits)
    assert not grad[0].any() and grad[1].all()


def test_uniform_logits_and_the_only_choice():
    assert_close(token_logp(torch.zeros(1, 8), torch.tensor([3])), torch.tensor([-math.log(8)]))
    assert_close(entropy(torch.zeros(1, 8)), torch.tensor([math.log(8)]))
    logits = torch.tensor([[math.nan, 1e4, -3.0]])
    legal = torch.tensor([[False, True, False]])
    assert token_logp(logits, torch.tensor([1]), legal) == 0 and entropy(logits, legal) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stable_at_logits_of_ten_thousand(dtype):
    logits = torch.tensor([[1e4, -1e4, 1e4], [-1e4, -1e4, -1e4 - 1]], dtype=dtype).requires_grad_()
    logp = token_logp(logits, torch.tensor([1, 0]))
    assert_close(logp, torch.tensor([-2e4 - math.log(2), -math.log(2 + math.exp(-1))], dtype=dtype))
    spread = entropy(logits)
    assert_close(spread, reference.entropy(logits).to(dtype))
    assert all(x.isfinite().all() for x in gradients((logp, spread), logits))


def test_legal_logits_of_minus_infinity_leave_entropy_and_gradient_finite():
    logits = torch.tensor([[0.5, -math.inf, 1.5]], dtype=torch.float64, requires_grad=True)
    kept = torch.tensor([[0.5, 1.5]], dtype=torch.float64, requires_grad=True)
    assert_close(entropy(logits), entropy(kept))
    grad, expected = (torch.autograd.grad(entropy(x).sum(), x)[0] for x in (logits, kept))
    assert_close(grad[:, [0, 2]], expected)
    assert grad[0, 1] == 0


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_the_plain_forms_equal_finite_differences(masked):
    logits, ids = randn(2, 4).requires_grad_(), torch.tensor([1, 3])
    legal = torch.tensor([[True, True, False, True], [False, True, True, True]]) if masked else None
    for function in (lambda x: token_logp(x, ids, legal, 0.7), lambda x: entropy(x, legal, 0.7)):
        assert torch.autograd.gradcheck(function, logits)
        assert torch.autograd.gradgradcheck(function, logits)


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 3, 4), (0, 0)])
def test_any_number_of_leading_dimensions(shape):
    logits, ids = randn(*shape), torch.zeros(shape[:-1], dtype=torch.long)
    for out in (
        token_logp(logits, ids),
        entropy(logits),
        token_logp(logits, ids, torch.ones(shape) > 0),
    ):
        assert out.shape == shape[:-1]


def test_ids_may_be_short_integers():
    logits, legal = randn(2, 3), torch.ones(2, 3) > 0
    for out in (None, legal):
        assert torch.equal(
            token_logp(logits, torch.tensor([2, 0], dtype=torch.int32), out),
            token_logp(logits, torch.tensor([2, 0]), out),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_widened_first(dtype):
    logits, ids = randn(3, 50).to(dtype), torch.tensor([0, 1, 2])
    assert token_logp(logits, ids).dtype == entropy(logits).dtype == torch.float32
    assert torch.equal(token_logp(logits, ids), token_logp(logits.float(), ids))
    assert torch.equal(entropy(logits), entropy(logits.float()))


def test_wrong_calls_of_the_plain_forms():
    logits, ids, legal = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), torch.ones(2, 3) > 0
    legal[1] = False
    for function in (
        lambda *rest: token_logp(logits, ids, *rest),
        lambda *rest: entropy(logits, *rest),
    ):
        with pytest.raises(ValueError, match="row 1 has no legal entry"):
            function(legal)
        with pytest.raises(ValueError, match="legal"):
            function(legal[:, :2])
        with pytest.raises(ValueError, match="legal"):
            function(legal.float())
        for temperature in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match="temperature"):
                function(None, temperature)
    with pytest.raises(ValueError, match=r"row \(1, 0\) has no legal entry"):
        entropy(torch.zeros(2, 1, 3), legal[:, None])
    with pytest.raises(ValueError, match="one a row"):
        token_logp(logits, ids[:1])
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match="row 1"):
            token_logp(logits, torch.tensor([0, wrong]))
    with pytest.raises(ValueError, match="nothing to choose"):
        entropy(torch.zeros(2, 0))


# Straight from hidden states


@pytest.mark.parametrize("tiling", TILINGS, indirect=True)
@given(heads(excluding=False), temperatures)
@per_tiling
def test_linear_equals_the_definition_in_value_and_gradient(tiling, head, temperature):
    hidden, weight, target, excluded = head
    hidden.requires_grad_()
    weight.requires_grad_()
    if not legal_set(excluded, len(weight)).any(1).all():
        return
    for out in (None, excluded):
        for with_entropy in (False, True):
            ours, exact = (
                f(hidden, weight, target, out, temperature, with_entropy)
                for f in (linear_logp, reference.linear_logp)
            )
            assert_close(ours, exact)
            assert_close(gradients(ours, (hidden, weight)), gradients(exact, (hidden, weight)))


@pytest.mark.parametrize("tiling", TILINGS, indirect=True)
@given(heads(), temperatures)
@per_tiling
def test_linear_agrees_with_the_plain_form(tiling, head, temperature):
    hidden, weight, target, excluded = head
    logits, legal = hidden @ weight.t(), legal_set(excluded, len(weight))
    logp, spread = linear_logp(hidden, weight, target, excluded, temperature, return_entropy=True)
    assert_close(logp, token_logp(logits, target, legal, temperature))
    assert_close(spread, entropy(logits, legal, temperature))
    assert (logp <= 0).all() and (spread >= -1e-12).all()


@pytest.mark.parametrize("tiling", [(7, 3, 0), (7, 3, 99), (2**21, 2048, 1)], indirect=True)
@pytest.mark.parametrize("excluded", [None, [[0, 1, -1], [4, 4, 2], [-1, -1, -1], [0, 1, 2]]])
def test_linear_gradients_equal_finite_differences(tiling, excluded):
    excluded = None if excluded is None else torch.tensor(excluded)
    hidden, weight = (randn(n, 3, seed=n).requires_grad_() for n in (4, 6))
    target = torch.tensor([3] * 4)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logp(h, w, target, excluded, 0.7, return_entropy=True), (hidden, weight)
    )


def test_linear_refuses_a_second_derivative():
    hidden, weight = randn(2, 3).requires_grad_(), randn(4, 3)
    loss = linear_logp(hidden, weight, torch.tensor([0, 1])).sum()
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    assert torch.autograd.grad(loss, hidden)[0].any()


@pytest.mark.parametrize("tiling", [(7, 3, 0), (7, 3, 99), (2**21, 2048, 1)], indirect=True)
def test_each_gradient_alone_and_each_output_alone(tiling):
    """One gradient or output alone has the same numbers as all together, also asked for twice."""
    hidden, weight = (randn(n, 3, seed=n).requires_grad_() for n in (5, 6))
    rest = torch.tensor([3] * 5), torch.tensor([[0, 1]] * 5), 1.0, True
    both = gradients(linear_logp(hidden, weight, *rest), (hidden, weight))
    assert_close(gradients(linear_logp(hidden, weight.detach(), *rest), hidden), both[:1])
    assert_close(gradients(linear_logp(hidden.detach(), weight, *rest), weight), both[1:])
    logp, spread = linear_logp(hidden, weight, *rest)
    alone = [
        torch.autograd.grad(x.sum(), (hidden, weight), retain_graph=True) for x in (logp, spread)
    ]
    again = torch.autograd.grad((logp + spread).sum(), (hidden, weight), retain_graph=True)
    for i in range(2):
        assert_close(alone[0][i] + alone[1][i], again[i])
    assert torch.equal(again[0], torch.autograd.grad((logp + spread).sum(), hidden)[0])
    assert torch.equal(linear_logp(hidden, weight, *rest[:3]), logp)
    with torch.no_grad():
        assert torch.equal(linear_logp(hidden, weight, *rest[:3]), logp)


@pytest.mark.parametrize("tiling", TILINGS, indirect=True)
def test_an_excluded_target_is_minus_infinity_with_gradient_0(tiling):
    hidden, weight = randn(3, 2).requires_grad_(), randn(7, 2, seed=1).requires_grad_()
    target, excluded = torch.tensor([5, 6, 0]), torch.tensor([[-1, 5], [5, 0], [0, 0]])
    logp = linear_logp(hidden, weight, target, excluded)
    assert logp.isneginf().tolist() == [True, False, True]
    incoming = torch.tensor([math.nan, 1.0, 1.0], dtype=torch.float64)
    grad_hidden, grad_weight = torch.autograd.grad(logp, (hidden, weight), incoming)
    assert not grad_hidden[0].any() and grad_hidden[1].all() and not grad_hidden[2].any()
    assert grad_weight.isfinite().all()


@pytest.mark.parametrize("tiling", TILINGS, indirect=True)
@given(heads(dtype=torch.float32), seeds)
@per_tiling
def test_order_and_repeats_of_excluded_ids_move_no_bit(tiling, head, seed):
    hidden, weight, target, excluded = head
    mixed = torch.cat([excluded, excluded, torch.full((len(hidden), 2), -1)], 1)
    mixed = mixed[:, torch.randperm(mixed.shape[1], generator=torch.Generator().manual_seed(seed))]
    for a, b in zip(
        *(linear_logp(hidden, weight, target, x, return_entropy=True) for x in (excluded, mixed)),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tiling", TILINGS, indirect=True)
@pytest.mark.parametrize("only", [0, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_only_choice_is_certain(tiling, only, dtype):
    """One legal choice: logp, entropy and gradient are 0, however large the excluded logits are."""
    hidden = (randn(4, 3) * 100).to(dtype).requires_grad_()
    weight = (randn(7, 3, seed=1) * 100).to(dtype).requires_grad_()
    excluded = torch.tensor([[j for j in range(7) if j != only]] * 4)
    logp, spread = linear_logp(
        hidden, weight, torch.full((4,), only), excluded, 0.7, return_entropy=True
    )
    assert torch.equal(logp, torch.zeros(4, dtype=dtype))
    assert_close(spread, torch.zeros(4, dtype=dtype), rtol=0, atol=1e-23)
    assert not any(
        x.any() for x in torch.autograd.grad(logp.sum(), (hidden, weight), retain_graph=True)
    )
    for grad in torch.autograd.grad(spread.sum(), (hidden, weight)):
        assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-20)


@pytest.mark.parametrize("tiling", TILINGS, indirect=True)
def test_an_excluded_entry_gets_exactly_no_gradient(tiling):
    """Nothing else changes when the logit of the excluded entry grows beyond all others."""
    hidden, target, excluded = randn(3, 2), torch.tensor([0, 1, 2]), torch.tensor([[5]] * 3)
    results = []
    for size in (1.0, 1e4):
        weight = randn(7, 2, seed=1)
        weight[5] *= size
        weight.requires_grad_()
        outputs = linear_logp(hidden, weight, target, excluded, return_entropy=True)
        (grad,) = gradients(outputs, weight)
        assert not grad[5].any()
        results.append([*outputs, grad])
    for a, b in zip(*results, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("tiling", TILINGS, indirect=True)
def test_linear_is_stable_at_logits_of_ten_thousand(tiling):
    """float32 against float64: logits spread over 2e4, and ties at 1e4."""
    spread_out = (
        torch.tensor([[1e4], [-1e4]]),
        torch.linspace(-1, 1, 7)[:, None],
        torch.tensor([6, 6]),
    )
    ties = torch.tensor([[1e4], [1e4]]), torch.ones(7, 1), torch.tensor([0, 6])
    for hidden, weight, target in (spread_out, ties):
        hidden.requires_grad_()
        weight.requires_grad_()
        ours, exact = (
            f(hidden, weight, target, return_entropy=True)
            for f in (linear_logp, reference.linear_logp)
        )
        for x, y in zip(ours, exact, strict=True):
            assert_close(x.double(), y, rtol=1e-6, atol=1e-6)
        for x, y in zip(
            gradients(ours, (hidden, weight)), gradients(exact, (hidden, weight)), strict=True
        ):
            assert_close(x, y.float(), rtol=1e-5, atol=1e-5 * max(1.0, y.abs().max().item()))


def test_float32_agrees_with_float64_to_five_digits():
    hidden, weight, target = randn(64, 32), randn(3000, 32, seed=1) * 0.5, torch.arange(64)
    excluded = torch.arange(100, 120).expand(64, -1)
    fast = [x.float().requires_grad_() for x in (hidden, weight)]
    slow = [x.float().double().requires_grad_() for x in (hidden, weight)]
    ours = linear_logp(*fast, target, excluded, return_entropy=True)
    exact = reference.linear_logp(*slow, target, excluded, return_entropy=True)
    pairs = [*zip(ours, exact, strict=True)]
    pairs += zip(
        *(
            torch.autograd.grad(sum(x.mean() for x in out), inputs)
            for out, inputs in ((ours, fast), (exact, slow))
        ),
        strict=True,
    )
    for x, y in pairs:
        assert x.dtype == torch.float32
        assert_close(x.double(), y, rtol=1e-5, atol=1e-6 * y.abs().max().item())


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.float64),
    ],
)
@pytest.mark.parametrize("tiling", [(40, 2, 0), (40, 2, 99)], indirect=True)
def test_narrow_inputs_are_widened_and_their_gradients_narrowed(tiling, dtypes):
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    narrow = [randn(5, 8, seed=i).to(dtype).requires_grad_() for i, dtype in enumerate(dtypes)]
    widened = [x.detach().to(wide).requires_grad_() for x in narrow]
    target = torch.arange(5)
    outputs = [linear_logp(*inputs, target, return_entropy=True) for inputs in (narrow, widened)]
    for x, y in zip(*outputs, strict=True):
        assert x.dtype == wide and torch.equal(x, y)
    for x, y in zip(gradients(outputs[0], narrow), gradients(outputs[1], widened), strict=True):
        assert torch.equal(x, y.to(x.dtype))
    assert [x.dtype for x in gradients(linear_logp(*narrow, target), narrow)] == list(dtypes)


def test_autocast_rounds_nothing():
    hidden, weight = (randn(n, 16, dtype=torch.float32).requires_grad_() for n in (9, 50))
    target = torch.arange(9)
    plain = linear_logp(hidden, weight, target, return_entropy=True)
    expected = [*plain, *gradients(plain, (hidden, weight))]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = linear_logp(hidden, weight, target, return_entropy=True)
        found = [*outputs, *gradients(outputs, (hidden, weight))]
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


class Watch(TorchDispatchMode):
    """Records the entries of the largest tensor made, and whether any entry was denormal."""

    def __init__(self):
        super().__init__()
        self.largest, self.denormal = 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.largest = max(self.largest, x.numel())
                # Only of arithmetic: views of scratch that is not yet written may hold anything.
                if any(name in str(function) for name in ("exp", "mul", "mm", "div", "sub")):
                    self.denormal |= bool(((x != 0) & (x.abs() < torch.finfo(x.dtype).tiny)).any())
        return out


class Products(TorchDispatchMode):
    """Counts matrix products, and the entries of all new tensors together."""

    def __init__(self):
        super().__init__()
        self.count, self.made = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "addmm" in str(function)
        out = function(*args, **(kwargs or {}))
        self.made += out.numel() if "empty" in str(function) else 0
        return out


@pytest.mark.parametrize("C, keep, products", [(256, 6, 3), (256, 5, 4), (255, 6, 4)])
def test_few_logits_of_wide_states_are_kept_and_all_others_computed_again(
    monkeypatch, C, keep, products
):
    """Products a tile: one forward; backward two with kept logits, else three."""
    monkeypatch.setitem(logprob.TILE, "cpu", 40)
    monkeypatch.setattr(logprob, "TILE_ROWS", 4)
    monkeypatch.setitem(logprob.KEEP, "cpu", keep)
    hidden, weight, target = (
        randn(8, C).requires_grad_(),
        randn(30, C, seed=1).requires_grad_(),
        torch.arange(8),
    )
    with Products() as seen:
        linear_logp(hidden, weight, target).sum().backward()
    assert seen.count == products * 6
    made = []
    for inputs in ((hidden, weight), (hidden.detach(), weight.detach())):
        with torch.no_grad(), Products() as seen:
            linear_logp(*inputs, target)
        made.append(seen.made)
    with Products() as seen:
        linear_logp(hidden, weight, target)
    assert made[0] == made[1] and (seen.made > made[0]) == (products == 3)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_kept_logits_change_no_bit(monkeypatch, with_entropy):
    hidden, weight = (
        randn(5, 3).float().requires_grad_(),
        randn(9, 3, seed=1).float().requires_grad_(),
    )
    excluded, found = torch.tensor([[1, -1]] * 5), []
    monkeypatch.setattr(logprob, "KEEP_FROM", 0)
    monkeypatch.setitem(logprob.TILE, "cpu", 8)
    for keep in (0, 99):
        monkeypatch.setitem(logprob.KEEP, "cpu", keep)
        out = linear_logp(
            hidden, weight, torch.tensor([0, 8, 3, 4, 2]), excluded, 0.7, with_entropy
        )
        found.append([*(out if with_entropy else (out,)), *gradients(out, (hidden, weight))])
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_no_tensor_of_all_logits_and_no_denormals(monkeypatch, with_entropy):
    N, V, C, tile = 90, 400, 4, 1200
    monkeypatch.setitem(logprob.TILE, "cpu", tile)
    monkeypatch.setattr(logprob, "TILE_ROWS", 50)
    hidden = (randn(N, C) * 10).float().requires_grad_()
    weight = (randn(V, C, seed=1) * 10).float().requires_grad_()
    excluded = torch.arange(10).expand(N, -1)
    with Watch() as watch:
        out = linear_logp(
            hidden, weight, torch.full((N,), 50), excluded, return_entropy=with_entropy
        )
        sum(x.mean() for x in (out if with_entropy else (out,))).backward()
    assert max(tile, V * C) <= watch.largest <= tile + max(50, V * C)
    assert not watch.denormal


@given(st.integers(0, 50), st.integers(1, 60))
def test_even_slices_cover_everything_once(n, most):
    slices = even_slices(n, most)
    assert [i for some in slices for i in range(n)[some]] == list(range(n))
    assert len(slices) == -(-n // most)
    sizes = [some.stop - some.start for some in slices]
    assert sizes == sorted(sizes, reverse=True)
    assert all(size <= most for size in sizes)


@pytest.mark.parametrize("E", [None, 0, 2])
@pytest.mark.parametrize("V", [0, 4])
def test_no_positions(E, V):
    hidden, weight = torch.zeros(0, 3, requires_grad=True), torch.zeros(V, 3, requires_grad=True)
    excluded = None if E is None else torch.zeros(0, E, dtype=torch.long)
    target = torch.zeros(0, dtype=torch.long)
    logp, spread = linear_logp(hidden, weight, target, excluded, return_entropy=True)
    assert logp.shape == spread.shape == (0,)
    grads = torch.autograd.grad(logp.sum() + spread.sum(), (hidden, weight))
    assert torch.equal(grads[0], torch.zeros(0, 3)) and torch.equal(grads[1], torch.zeros(V, 3))


def test_states_without_channels_choose_evenly():
    logp = linear_logp(torch.zeros(2, 0), torch.zeros(5, 0), torch.tensor([0, 4]))
    assert_close(logp, torch.full((2,), -math.log(5)))


def test_rows_of_a_larger_table_and_short_integers():
    """weight may be a slice of a larger, also of a transposed table; ids may be int32."""
    table, hidden = randn(6, 9), randn(4, 6, seed=1)
    target, excluded = torch.tensor([0, 1, 2, 3]), torch.tensor([[4], [3], [0], [-1]])
    expected = linear_logp(hidden, table.t()[3:].contiguous(), target, excluded)
    assert_close(linear_logp(hidden, table.t()[3:], target.int(), excluded.int()), expected)
    assert_close(
        linear_logp(hidden.t().contiguous().t(), table.t()[3:], target, excluded), expected
    )


@pytest.mark.parametrize("tiling", TILINGS, indirect=True)
def test_wrong_calls_of_the_linear_form(tiling):
    hidden, weight, target = torch.zeros(3, 2), torch.zeros(4, 2), torch.tensor([0, 1, 3])
    excluded = torch.tensor([[0, 1, 2, -1], [0, 1, 2, 3], [0, 0, 0, 0]])
    with pytest.raises(ValueError, match="row 1 has nothing left"):
        linear_logp(hidden, weight, target, excluded)
    with pytest.raises(ValueError, match="row 0 has nothing left|target outside"):
        linear_logp(hidden, weight[:0], target)
    for shapes in [
        (hidden[0], weight, target),
        (hidden, weight[0], target),
        (hidden, weight[:, :1], target),
        (hidden, weight, target[:2]),
        (hidden, weight, target[:, None]),
    ]:
        with pytest.raises(ValueError, match="want .N, C., .V, C., .N,."):
            linear_logp(*shapes)
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=r"target outside \[0, 4\) in row 2"):
            linear_logp(hidden, weight, torch.tensor([0, 1, wrong]))
    for wrong in (-2, 4):
        with pytest.raises(ValueError, match=r"excluded id outside \[0, 4\) and not -1 in row 1"):
            linear_logp(hidden, weight, target, torch.tensor([[0], [wrong], [-1]]))
    for wrong in (excluded[:2], excluded[0]):
        with pytest.raises(ValueError, match="excluded .*want"):
            linear_logp(hidden, weight, target, wrong)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature"):
            linear_logp(hidden, weight, target, None, temperature)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuda: no CUDA device")
@pytest.mark.parametrize(
    "dtype, rtol", [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 2e-2)]
)
def test_a_gpu_gives_the_same(monkeypatch, dtype, rtol):
    monkeypatch.setitem(logprob.TILE, "other", 5000)
    monkeypatch.setattr(logprob, "TILE_ROWS", 50)
    hidden, weight = (randn(n, 16, seed=n).to(dtype) for n in (90, 400))
    rest = torch.arange(90), torch.arange(100, 110).expand(90, -1)
    results = []
    for device in ("cpu", "cuda"):
        h, w = (x.to(device).requires_grad_() for x in (hidden, weight))
        out = linear_logp(h, w, *(x.to(device) for x in rest), 0.7, return_entropy=True)
        grads = torch.autograd.grad(sum(x.mean() for x in out), (h, w))
        results.append([x.detach().double().cpu() for x in (*out, *grads)])
    for x, y in zip(*results, strict=True):
        assert_close(y, x, rtol=rtol, atol=rtol * x.abs().max().item())
