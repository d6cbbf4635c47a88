"""Generalised advantage estimation over a batch of right-padded rows, without a Python loop over T.

The recurrence A_t = delta_t + ratio * A_{t+1} is a scan. Two forms of it, one for each kind of device, both of
separate element-wise products and sums, so that a row's bits depend neither on its neighbours nor on how far it
is padded. (Matrix products would be as fast on a CPU, but how they round depends on the shape of the batch.)
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .checks import compute_dtype, kept, require

__all__ = ["gae"]

# Weights ratio^t of a block of steps reach down to 2^-RANGE. A float32 has all its digits from 2^-126 on, so entries
# above 2^-62 = 2e-19 keep theirs. Blocks depend on the ratio alone, because the partition decides the rounding.
RANGE = 64

# Entries of the rows taken at a time on CPU, 2 MB in float32: what is made of them stays in the cache. Rows are
# independent, so this moves no bit.
ENTRIES = 2**19


def gae(
    reward: Tensor, value: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimate of every token of a batch of pages.

        delta_t = r_t + gamma * V_{t+1} - V_t        V after the last kept token is 0
        A_t     = delta_t + gamma * lam * A_{t+1}

    reward  (B, T) float  r_t in reward-model units; the page score sits on the last kept token
    value   (B, T) float  V_t, the value head's guess before token t is drawn; same units
    mask    (B, T) bool   True on the page's own tokens: one unbroken run from t = 0, perhaps empty
    gamma   in [0, 1]     discount of a step
    lam     in [0, 1]     0: one-step error; 1: reward still to come minus V_t
    returns advantage, ret: (B, T) float32 (float64 if an input is), 0 off the mask, not normalised;
            ret = A + V

    Raises ValueError on unequal shapes, a mask that is not bool or has a hole, gamma or lam outside [0, 1].
    Differentiable, twice too, in reward and value. Whatever the padding holds changes no bit.
    Source: Schulman et al., arXiv 1506.02438, section 3.
    """
    if (
        reward.dim() != 2
        or not reward.shape == value.shape == mask.shape
        or mask.dtype != torch.bool
    ):
        raise ValueError(
            f"gae: reward {tuple(reward.shape)}, value {tuple(value.shape)}, "
            f"mask {tuple(mask.shape)} {mask.dtype}: want (B, T) three times, a bool mask"
        )
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gae: gamma {gamma}, lam {lam}: want both in [0, 1]")
    # A hole would join two pages into one return, and nothing downstream could tell.
    flag = mask.view(torch.uint8)
    require(
        flag[:, 1:] <= flag[:, :-1],
        "gae: mask has a hole at (row, step) {row}; want True, then False",
    )

    dtype, ratio = compute_dtype(reward, value), gamma * lam
    if mask.is_cuda or torch.is_grad_enabled() and (reward.requires_grad or value.requires_grad):
        advantage = DiscountedSum.apply(step_error(reward, value, mask, gamma, dtype), ratio)
        return advantage, advantage + kept(value.to(dtype), mask)
    advantage, ret = (torch.empty_like(mask, dtype=dtype) for _ in range(2))
    size = max(ENTRIES // max(mask.shape[1], 1), 1)
    for some in (slice(start, start + size) for start in range(0, len(mask), size)):
        delta = step_error(
            reward[some], value[some], mask[some], gamma, dtype, kept_value=ret[some]
        )
        by_blocks(delta, ratio, out=advantage[some])
        ret[some] += advantage[some]
    return advantage, ret


def step_error(
    reward: Tensor,
    value: Tensor,
    mask: Tensor,
    gamma: float,
    dtype: torch.dtype,
    kept_value: Tensor | None = None,
) -> Tensor:
    """delta_t of gae (B, T), 0 off the mask. kept_value  where to leave the value, 0 off the mask."""
    value = kept(value.to(dtype), mask, out=kept_value)
    delta = kept(reward.to(dtype), mask).sub_(value)
    # the usual 1 saves a pass
    delta[:, :-1] += value[:, 1:] if gamma == 1 else gamma * value[:, 1:]
    return delta


class DiscountedSum(torch.autograd.Function):
    """y_t = sum_{s >= t} ratio^(s - t) x_s along the rows of x (B, T); linear, so it saves nothing."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, ratio: float) -> Tensor:
        ctx.ratio = ratio
        # Few launches where a launch is dear, few passes over memory where memory is.
        return by_doubling(x, ratio) if x.device.type == "cuda" else by_blocks(x, ratio)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        # The transpose of a sum over what follows is the same sum over what came before.
        return DiscountedSum.apply(grad.flip(1), ctx.ratio).flip(1), None


def by_blocks(x: Tensor, ratio: float, out: Tensor | None = None) -> Tensor:
    """The scan of x (B, T) -> (B, T), into `out` if given: running sums of weighted steps, block by block from the
    right.

    y_t = ratio^-t sum_{s >= t} ratio^s x_s within a block. Summed from its end the small weights come first, so
    that nothing cancels; torch's running sum on a CPU is taken in float64, one row after another. 5 passes over
    memory, and launches by the block, of which ratio = 0.95 needs one for 865 steps.
    """
    T = x.shape[1]
    length = (
        max(T, 1)
        if ratio == 1
        else int(RANGE / -math.log2(ratio)) + 1
        if ratio > 2.0**-RANGE
        else 1
    )
    power = ratio ** torch.arange(min(length, T), dtype=torch.float64, device=x.device)
    weight, inverse = (w.to(x.dtype).repeat(-(-T // length))[:T] for w in (power, 1 / power))
    y = x.flip(1).mul_(weight.flip(0))  # from here on time runs backwards
    for start in reversed(range(0, T, length)):
        end = min(start + length, T)
        block = y[:, T - end : T - start]
        if end < T:  # what the next block hands on joins the last step
            block[:, 0] += y[:, T - end - 1] * (ratio * weight[end - 1])
        block.cumsum_(1)
    return torch.mul(y.flip(1), inverse, out=out)


def by_doubling(x: Tensor, ratio: float) -> Tensor:
    """The scan of x (B, T) -> (B, T) in log2(T) rounds: after round k every entry has summed 2^k steps."""
    shift, T = 1, x.shape[1]
    total = x.clone()
    while shift < T:
        total[:, :-shift] += total[:, shift:] * ratio**shift
        shift *= 2
    return total
