"""Mean, variance, centring and whitening over the entries that a mask keeps.

The statistics run over the whole tensor, not over rows: PPO whitens advantages over the batch.
Entries off the mask are replaced by 0 before any arithmetic, not multiplied by 0 (0 * NaN is NaN),
so they change no bit of any output.

For its statistics a large tensor on a CPU is read from memory once, in blocks that stay in the
cache. The mean of each block and the squares about that mean are merged into those of the blocks
before it (Chan, Golub, LeVeque, 1979, eq. 2.1).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .checks import compute_dtype, kept

__all__ = ["center", "mean", "variance", "whiten"]

BLOCK = 2**16  # entries of a block, 256 kB in float32


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of the kept entries, a scalar; 0 when none is kept.

    x     (...) any number dtype
    mask  (...) bool, True on the entries that count
    returns a scalar, float32 (float64 if x is). Differentiable: the gradient is 1/n on each kept
            entry, 0 elsewhere

    Raises ValueError if the shapes differ or the mask is not bool.
    """
    _check(x, mask, "mean")
    if _large(x):
        return torch.tensor(_moments(x, mask)[0], dtype=compute_dtype(x))
    pivot, deviation, count = _deviations(x, mask)
    return pivot + deviation.sum() / count.clamp(min=1)


def variance(x: Tensor, mask: Tensor) -> Tensor:
    """Unbiased variance of the n kept entries, sum (x - mean)^2 / (n - 1), in squared units of x.

    A scalar; 0 if fewer than two entries are kept. Arguments and errors as for `mean`.
    """
    _check(x, mask, "variance")
    if _large(x):
        return torch.tensor(_moments(x, mask)[1], dtype=compute_dtype(x))
    return _centred(x, mask)[1]


def center(x: Tensor, mask: Tensor) -> Tensor:
    """x minus the mean of its kept entries, 0 off the mask. Arguments and errors as for `mean`."""
    _check(x, mask, "center")
    if _large(x):
        return _scaled(x, mask, _moments(x, mask)[0], 1.0)
    return _centred(x, mask)[0]


def whiten(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(variance + eps^2): kept entries get mean 0 and unbiased variance 1.

    x, mask  as for `mean`
    eps      in units of x: standard deviations far below it are not scaled up to 1
    returns  shaped like x, 0 off the mask. Fewer than two kept entries, or equal ones, give zeros

    Errors as for `mean`.
    """
    _check(x, mask, "whiten")
    if _large(x):
        middle, square = _moments(x, mask)
        return _scaled(x, mask, middle, (square + eps * eps) ** -0.5 if square + eps else 0.0)
    centred, spread = _centred(x, mask)
    # eps^2, not eps: with variance + 1e-8 rewards of size 1e-4 would not be scaled to 1, and the
    # result would depend on their unit. Inside the root: the gradient at variance 0 is then finite.
    scale = torch.rsqrt(spread + eps * eps)
    return centred * scale if centred.requires_grad else centred.mul_(scale)


def _large(x: Tensor) -> bool:
    """Whether x is processed in blocks: larger than one, on a CPU, without a gradient."""
    return (
        x.device.type == "cpu"
        and x.numel() > BLOCK
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(x.reshape(-1).split(BLOCK) for x in tensors), strict=True)


def _moments(x: Tensor, mask: Tensor) -> tuple[float, float]:
    """Mean and unbiased variance of the kept entries, 0 where too few are kept."""
    dtype, count, middle, squares = compute_dtype(x), 0, 0.0, 0.0
    spare = torch.empty(BLOCK, dtype=dtype)
    for part, on in _blocks(x, mask):
        n = int(on.sum())
        if n == 0:
            continue
        y = kept(part.to(dtype), on, out=spare[: len(part)])
        pivot = y.sum() / n
        y = kept(y.sub_(pivot), on, out=y)
        # The pivot is a rounded mean. The remainder rest / n completes the mean, and n times its
        # square is subtracted from the squares about the pivot.
        rest = float(y.sum())
        own, shift = float(y.mul_(y).sum()) - rest * rest / n, float(pivot) + rest / n - middle
        squares += own + shift * shift * (count * n / (count + n))
        count += n
        middle += shift * (n / count)
    return middle, max(squares, 0.0) / (count - 1) if count > 1 else 0.0


def _scaled(x: Tensor, mask: Tensor, middle: float, scale: float) -> Tensor:
    """(x - middle) * scale, 0 off the mask.

    The mean is subtracted in two parts, since the dtype of x may be too narrow to hold it exactly.
    """
    out = torch.empty(x.shape, dtype=compute_dtype(x))
    high = float(torch.tensor(middle, dtype=out.dtype))
    for part, on, into in _blocks(x, mask, out):
        torch.sub(part.to(out.dtype), high, out=into)
        if middle != high:
            into -= middle - high
        if scale != 1:
            into *= scale
        kept(into, on, out=into)
    return out


def _deviations(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pivot, x minus the pivot (0 off the mask), and the number of kept entries.

    The pivot is a rounded mean of the kept entries: a scalar without gradient.
    """
    x = x.to(compute_dtype(x))
    count = mask.sum()
    first = kept(x.detach(), mask)
    pivot = first.sum() / count.clamp(min=1)
    # The subtraction is exact for entries near the pivot, so a large common offset costs no digits.
    return pivot, _minus(x, pivot, mask, first), count


def _centred(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """x minus its mean (0 off the mask), and the unbiased variance (scalar)."""
    _, deviation, count = _deviations(x, mask)
    # The pivot is rounded. Subtracting what is left of the mean makes equal entries exactly 0.
    centred = _minus(deviation, deviation.sum() / count.clamp(min=1), mask, deviation)
    return centred, centred.square().sum() / (count - 1).clamp(min=1)


def _minus(x: Tensor, middle: Tensor, mask: Tensor, spare: Tensor) -> Tensor:
    """x - middle, 0 off the mask; written into `spare` unless autograd needs x."""
    if torch.is_grad_enabled() and x.requires_grad:
        return kept(x - middle, mask)
    return kept(torch.sub(x, middle, out=spare), mask, out=spare)


def _check(x: Tensor, mask: Tensor, where: str) -> None:
    if x.shape != mask.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"masked.{where}: x {tuple(x.shape)}, mask {tuple(mask.shape)} {mask.dtype}: "
            "want one shape for both and a bool mask"
        )
