"""Generalised advantage estimation over a batch of right-padded rows, without a Python loop over T.

The recurrence A_t = delta_t + ratio * A_{t+1} is a scan. Two forms of it, both of separate element-wise
products and sums, so that a row's bits depend neither on its neighbours nor on how far it is padded. (One
matrix product per block is faster still on CPU, but how it rounds depends on the shape of the batch.)
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels.checks import compute_dtype, require

__all__ = ["gae"]

BLOCK = 32    # steps of a block: sqrt(T) at T = 1,024. Fixed, because the partition decides the rounding.

# Entries of the rows taken at a time on CPU, 2 MB in float32. Rows are independent, so this moves no bit;
# with all rows at once every temporary is fresh memory from the system, which costs more than the sums.
ENTRIES = 2 ** 19


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
    if reward.dim() != 2 or not reward.shape == value.shape == mask.shape or mask.dtype != torch.bool:
        raise ValueError(f"gae: reward {tuple(reward.shape)}, value {tuple(value.shape)}, "
                         f"mask {tuple(mask.shape)} {mask.dtype}: want (B, T) three times, a bool mask")
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gae: gamma {gamma}, lam {lam}: want both in [0, 1]")
    # A hole would join two pages into one return, and nothing downstream could tell.
    require(mask[:, 1:] <= mask[:, :-1], "gae: mask has a hole at (row, step) {row}; want True, then False")

    if mask.is_cuda:
        return unchecked_gae(reward, value, mask, gamma, gamma * lam)
    advantage, ret = (torch.empty_like(mask, dtype=compute_dtype(reward, value)) for _ in range(2))
    size = max(ENTRIES // max(mask.shape[1], 1), 1)
    for start in range(0, len(mask), size):
        rows = slice(start, start + size)
        advantage[rows], ret[rows] = unchecked_gae(reward[rows], value[rows], mask[rows], gamma, gamma * lam)
    return advantage, ret


def unchecked_gae(
    reward: Tensor, value: Tensor, mask: Tensor, gamma: float, ratio: float
) -> tuple[Tensor, Tensor]:
    """gae of some rows; ratio = gamma * lam."""
    dtype = compute_dtype(reward, value)
    reward, value = (torch.where(mask, x.to(dtype), 0.0) for x in (reward, value))
    delta = reward - value
    delta[:, :-1] += value[:, 1:] if gamma == 1 else gamma * value[:, 1:]     # the usual 1 saves a pass
    # Off the mask delta is 0 and so is everything to its right: the advantage needs no second mask.
    advantage = DiscountedSum.apply(delta, ratio)
    return advantage, advantage + value


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


def by_blocks(x: Tensor, ratio: float) -> Tensor:
    """The scan of x (B, T) -> (B, T), time-major, all blocks of BLOCK steps abreast: 2 passes over memory.

    A first sweep finds what each block hands to the one before it, a second fills the blocks in. Between them
    the blocks' own sums are a shorter scan of the same kind. Blocks start at t = 0, so that more padding only
    appends zeros.
    """
    B, T = x.shape
    length = min(BLOCK, T)
    if length == 0 or B == 0:
        return x.clone()
    count = -(-T // length)
    steps = x.new_empty(count * length, B)
    steps[:T].copy_(x.t())
    steps[T:] = 0
    steps = steps.view(count, length, B)

    carry = x.new_zeros(count, B)       # A at the first step after each block
    if count > 1:
        head = steps[1:, -1].clone()
        for i in range(length - 2, -1, -1):
            head.mul_(ratio).add_(steps[1:, i])
        carry[:-1] = by_blocks(head.t(), ratio ** length).t()
    for i in range(length - 1, -1, -1):
        steps[:, i].add_(carry.mul_(ratio))
        carry.copy_(steps[:, i])
    return steps.view(count * length, B)[:T].t().contiguous()


def by_doubling(x: Tensor, ratio: float) -> Tensor:
    """The scan of x (B, T) -> (B, T) in log2(T) rounds: after round k every entry has summed 2^k steps."""
    shift, T = 1, x.shape[1]
    total = x.clone()
    while shift < T:
        total[:, :-shift] += total[:, shift:] * ratio ** shift
        shift *= 2
    return total
