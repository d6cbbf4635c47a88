"""Generalised advantage estimation over a batch of right-padded rows, without a Python loop over T.

The recurrence A_t = delta_t + ratio * A_{t+1} is a scan. It is computed in blocks on a CPU and by
doubling on a GPU. Both use element-wise products and sums only, so that the bits of a row depend
neither on the other rows nor on the length of its padding. Matrix products would be as fast on a
CPU, but their rounding depends on the shape of the batch.
"""

import math

import torch
from torch import Tensor

from .checks import compute_dtype, kept, require

__all__ = ["gae", "group_advantage"]

# A block of steps is as long as its weights ratio^t stay above 2^-RANGE. A float32 has full
# precision down to 2^-126, so weighted entries keep it if they are above 2^-62 = 2e-19. The length
# of a block depends on the ratio alone, never on T, because the partition into blocks decides the
# rounding.
RANGE = 64

# Entries of the rows that are processed at a time on a CPU: 2 MB in float32, which stay in the
# cache. Rows are independent, so this changes no bit of the result.
ENTRIES = 2**19


def gae(
    reward: Tensor,
    value: Tensor,
    mask: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimate of every token of a batch of pages.

        delta_t = r_t + gamma * V_{t+1} - V_t        V after the last kept token is 0
        A_t     = delta_t + gamma * lam * A_{t+1}

    reward  (B, T) float  r_t in reward-model units; the page score sits on the last kept token
    value   (B, T) float  V_t, the value head's guess before token t is drawn; same units
    mask    (B, T) bool   True on the page's own tokens: one unbroken run from t = 0, perhaps empty
    gamma   in [0, 1]     discount of a step
    lam     in [0, 1]     0: one-step error; 1: reward still to come minus V_t
    out     two (B, T) tensors of the results' dtype to write the results into, none of them an
            input, without gradient; None: fresh memory, which on a CPU takes a third of the time
    returns advantage, ret: (B, T) float32 (float64 if an input is), 0 off the mask, not normalised;
            ret = A + V

    Raises ValueError on unequal shapes, a mask that is not bool or has a hole, gamma or lam outside
    [0, 1], and an `out` of another shape or dtype or beside inputs with a gradient. Differentiable
    in reward and value, also twice. The contents of the padding change no bit.
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
    taped = torch.is_grad_enabled() and (reward.requires_grad or value.requires_grad)
    if out is not None and (
        taped or any(x.shape != mask.shape or x.dtype != dtype or x.requires_grad for x in out)
    ):
        raise ValueError(
            f"gae: out {[(tuple(x.shape), x.dtype) for x in out]}: want (B, T) twice, {dtype}, "
            "and no gradient anywhere"
        )
    if mask.is_cuda or taped:
        advantage = DiscountedSum.apply(step_error(reward, value, mask, gamma, dtype), ratio)
        ret = advantage + kept(value.to(dtype), mask)
        return (advantage, ret) if out is None else (out[0].copy_(advantage), out[1].copy_(ret))
    advantage, ret = out or (torch.empty_like(mask, dtype=dtype) for _ in range(2))
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
    """delta_t of `gae`, (B, T), 0 off the mask; arguments as there.

    dtype       to compute in
    kept_value  (B, T) or None: where to write the value, with 0 off the mask
    """
    value = kept(value.to(dtype), mask, out=kept_value)
    delta = kept(reward.to(dtype), mask).sub_(value)
    # gamma = 1 is the usual case and saves a pass over memory
    delta[:, :-1] += value[:, 1:] if gamma == 1 else gamma * value[:, 1:]
    return delta


class DiscountedSum(torch.autograd.Function):
    """y_t = sum_{s >= t} ratio^(s - t) x_s along the rows of x (B, T).

    Linear in x, so the backward pass needs no saved tensors.
    """

    @staticmethod
    def forward(ctx, x: Tensor, ratio: float) -> Tensor:
        ctx.ratio = ratio
        # A GPU spends its time on kernel launches, of which doubling needs few; a CPU on memory.
        return by_doubling(x, ratio) if x.device.type == "cuda" else by_blocks(x, ratio)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        # The transpose of a sum over what follows is the same sum over what came before.
        return DiscountedSum.apply(grad.flip(1), ctx.ratio).flip(1), None


def by_blocks(x: Tensor, ratio: float, out: Tensor | None = None) -> Tensor:
    """The scan of x (B, T) -> (B, T), written into `out` if given: running sums, block by block.

    Within a block y_t = ratio^-t sum_{s >= t} ratio^s x_s. The sum runs from the end of the row, so
    that small weights are added first and nothing cancels. On a CPU torch computes the running sum
    of each row in float64. It takes 5 passes over memory and a few calls a block; at ratio = 0.95 a
    block has 865 steps.
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
        if end < T:  # add the sum over all later blocks to this block's last step
            block[:, 0] += y[:, T - end - 1] * (ratio * weight[end - 1])
        block.cumsum_(1)
    return torch.mul(y.flip(1), inverse, out=out)


def by_doubling(x: Tensor, ratio: float) -> Tensor:
    """The scan of x (B, T) -> (B, T) in log2(T) rounds: after round k an entry sums 2^k steps."""
    shift, T = 1, x.shape[1]
    total = x.clone()
    while shift < T:
        total[:, :-shift] += total[:, shift:] * ratio**shift
        shift *= 2
    return total


def group_advantage(total: Tensor, samples: int, kind: str) -> Tensor:
    """The advantage of each of a group's pages over the others: no critic is needed.

        rloo     R_i - mean of the other R_j              Ahmadian et al., arXiv 2402.14740
        grpo     (R_i - mean R) / standard deviation of R  Shao et al., arXiv 2402.03300
        dr_grpo  R_i - mean R                              Liu et al., arXiv 2503.20783

    total    (B,) float  the reward R of every page; the pages of a group are neighbours
    samples  pages of a group, 2 or more; divides B
    returns  (B,) float, sums to 0 over every group; grpo: 0 where all of a group earn the same

    Raises ValueError for an unknown kind, for groups of one, and where samples does not divide B.
    """
    if kind not in ("rloo", "grpo", "dr_grpo"):
        raise ValueError(f"group_advantage: kind={kind!r}: want rloo, grpo or dr_grpo")
    if total.dim() != 1 or samples < 2 or len(total) % samples:
        raise ValueError(
            f"group_advantage: total {tuple(total.shape)} in groups of {samples}: want (B,), and "
            "groups of 2 or more that divide it"
        )
    group = total.view(-1, samples)
    centred = group - group.mean(1, keepdim=True)
    if kind == "rloo":
        centred = centred * (samples / (samples - 1))
    elif kind == "grpo":
        # Equal rewards differ by rounding alone, which must not be blown up to size 1.
        spread = group.std(1, keepdim=True)
        floor = 1e-6 * group.abs().amax(1, keepdim=True).clamp(min=1e-6)
        centred = torch.where(spread > floor, centred / spread.clamp(min=1e-12), 0.0)
    return centred.flatten()
