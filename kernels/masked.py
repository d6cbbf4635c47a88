"""Mean, variance, centring and whitening over the entries that a mask keeps.

The statistics run over the whole tensor, not over rows: PPO whitens advantages over the batch. What lies off
the mask is replaced before any arithmetic, never multiplied by 0 (0 * NaN is NaN), so it moves no bit of any
output.
"""

import torch
from torch import Tensor

from kernels.checks import compute_dtype, kept

__all__ = ["center", "mean", "variance", "whiten"]


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of the kept entries, a scalar; 0 when none is kept.

    x     (...) any number dtype
    mask  (...) bool, True on the entries that count
    returns a scalar, float32 (float64 if x is). Differentiable: 1/n on each kept entry, 0 elsewhere.
    Raises ValueError when shapes differ or mask is not bool.
    """
    _check(x, mask, "mean")
    pivot, deviation, count = _deviations(x, mask)
    return pivot + deviation.sum() / count.clamp(min=1)


def variance(x: Tensor, mask: Tensor) -> Tensor:
    """Unbiased variance of the kept entries, sum (x - mean)^2 / (n - 1), a scalar in squared units of x.

    Arguments and errors as for `mean`; 0 when fewer than two entries are kept.
    """
    _check(x, mask, "variance")
    return _centred(x, mask)[1]


def center(x: Tensor, mask: Tensor) -> Tensor:
    """x minus the mean of its kept entries, shaped like x, 0 off the mask. Arguments as for `mean`."""
    _check(x, mask, "center")
    return _centred(x, mask)[0]


def whiten(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Centred and divided by the standard deviation: kept entries have mean 0 and unbiased variance 1.

    x, mask  as for `mean`; returns a tensor shaped like x, 0 off the mask
    eps      the least standard deviation worth dividing by, in units of x:
             (x - mean) / sqrt(variance + eps^2). Fewer than two kept entries, or equal ones, give zeros.
    """
    _check(x, mask, "whiten")
    centred, spread = _centred(x, mask)
    # eps^2, not eps: variance + 1e-8 would leave rewards of size 1e-4 visibly unwhitened, so that the result
    # would depend on their unit. Inside the root, so that the gradient at spread 0 is finite.
    scale = torch.rsqrt(spread + eps * eps)
    return centred * scale if centred.requires_grad else centred.mul_(scale)


def _deviations(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A rounded mean (scalar, no gradient), x minus it (0 off the mask), and the number of kept entries."""
    x = x.to(compute_dtype(x))
    count = mask.sum()
    first = kept(x.detach(), mask)
    pivot = first.sum() / count.clamp(min=1)
    # The subtraction is exact for entries near the pivot, so a large common offset costs no digits later on.
    return pivot, _minus(x, pivot, mask, first), count


def _centred(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """x minus its mean (0 off the mask), and the unbiased variance (scalar)."""
    _, deviation, count = _deviations(x, mask)
    # The pivot is rounded; taking off what is left of the mean makes equal entries exactly 0, not one ulp.
    centred = _minus(deviation, deviation.sum() / count.clamp(min=1), mask, deviation)
    return centred, centred.square().sum() / (count - 1).clamp(min=1)


def _minus(x: Tensor, middle: Tensor, mask: Tensor, spare: Tensor) -> Tensor:
    """x - middle, 0 off the mask: in the memory of `spare` unless autograd must remember x."""
    if torch.is_grad_enabled() and x.requires_grad:
        return kept(x - middle, mask)
    return kept(torch.sub(x, middle, out=spare), mask, out=spare)


def _check(x: Tensor, mask: Tensor, where: str) -> None:
    if x.shape != mask.shape or mask.dtype != torch.bool:
        raise ValueError(f"masked.{where}: x {tuple(x.shape)}, mask {tuple(mask.shape)} {mask.dtype}: "
                         "want one shape for both and a bool mask")
