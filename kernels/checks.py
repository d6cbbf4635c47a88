"""What every kernel shares: the dtype to compute in, selection by a mask, and argument checks."""

import math

import torch
from torch import Tensor

__all__ = ["compute_dtype", "kept", "require", "require_temperature"]


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32 (also for half precision and integers)."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def kept(x: Tensor, mask: Tensor, out: Tensor | None = None) -> Tensor:
    """x where the mask is True, 0 elsewhere, whatever x holds there.

    x     (...) float32 or float64
    mask  (...) bool
    out   (...) or None: where to write the result; it then carries no gradient

    Selects instead of multiplying by the mask, because 0 * NaN is NaN.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() and x.requires_grad:
        return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device), out=out)
    # On a CPU a bitwise "and" with a word of ones or zeros takes a quarter of torch.where's time.
    word = torch.int32 if x.element_size() == 4 else torch.int64
    found = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    torch.bitwise_and(x.detach().view(word), mask.to(word).neg_(), out=found.view(word))
    return found


def require(ok: Tensor, message: str) -> None:
    """Raise ValueError unless every entry of `ok` (bool, any shape) is True.

    message  text of the error; {row} in it becomes the index of the first False entry, a tuple if
             `ok` has several dimensions

    On a CUDA device the CPU does not wait for the answer: waiting in every step would idle the GPU.
    A wrong call ends in a device-side assertion there, whose message does not name the row.
    """
    if ok.device.type == "cuda":
        torch._assert_async(ok.all(), message.replace("{row}", "?"))
    elif ok.numel() and not ok.view(torch.uint8).amin():  # 20 times faster than all() on a CPU
        first = tuple((~ok).nonzero()[0].tolist())
        raise ValueError(message.replace("{row}", str(first[0] if len(first) == 1 else first)))


def require_temperature(temperature: float, where: str) -> None:
    """Raise ValueError unless the temperature is positive and finite.

    Temperature 0 is no way to ask for the greedy choice: take the argmax instead.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"{where}: temperature {temperature}, want a positive finite number")
