"""What every kernel shares: the dtype it computes in, and how a wrong call is refused."""

import math

import torch
from torch import Tensor

__all__ = ["compute_dtype", "require", "require_temperature"]


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32: halves are widened, whole numbers become float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def require(ok: Tensor, message: str) -> None:
    """Raise ValueError unless every entry of `ok` (bool, any shape) is True.

    message  may name the first offender: {row} becomes its index, a tuple if `ok` has several dimensions

    On a CUDA device nobody waits for the answer, since a wait in every step would idle the GPU: a wrong call
    stops there as a device-side assertion that prints the message without the row.
    """
    if ok.device.type == "cuda":
        torch._assert_async(ok.all(), message.replace("{row}", "?"))
    elif not ok.all():
        first = tuple((~ok).nonzero()[0].tolist())
        raise ValueError(message.replace("{row}", str(first[0] if len(first) == 1 else first)))


def require_temperature(temperature: float, where: str) -> None:
    """Raise ValueError unless the temperature is positive and finite: greedy choice is argmax, not 0."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"{where}: temperature {temperature}, want a positive finite number")
