"""Every kernel beside its plain version, timed in one run.

    python -m kernels.bench [--device cuda] [--quick]

The columns of a row:

    plain ms, ours ms    median time of the plain version and of ours
    x                    plain / ours
    floor ms, share      time of the unavoidable arithmetic or memory traffic alone; floor / ours
    plain MB, ours MB    peak memory beyond the inputs
    |diff|               largest difference of ours from the float64 reference, over values and
                         gradients, relative to the largest entry of the reference

One line of JSON with the same numbers follows. It takes minutes on two CPU cores, seconds with
--quick. Times depend on the machine: compare ratios within one run only.
"""

import argparse
import ctypes
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import advantage, logprob, masked, reference

__all__ = [
    "Case",
    "cases",
    "machine",
    "main",
    "measure",
    "milliseconds",
    "peak_megabytes",
    "plain_gae",
    "plain_linear_logp",
    "plain_whiten",
    "synchronise",
]

HEADER = (
    "kernel",
    "shape",
    "plain ms",
    "ours ms",
    "x",
    "floor ms",
    "share",
    "plain MB",
    "ours MB",
    "|diff|",
)


@dataclass(frozen=True)
class Case:
    """One row of the table.

    plain, ours and exact take no argument and return the same tensors, in the same order; floor is
    only timed.
    """

    kernel: str
    shape: str
    plain: Callable[[], list[Tensor]]
    ours: Callable[[], list[Tensor]]
    exact: Callable[[], list[Tensor]]
    floor: Callable[[], object]


def plain_linear_logp(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    excluded: Tensor | None = None,
    with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The usual way: all (N, V) logits, log_softmax, gather. Arguments as for `linear_logp`."""
    logits = (hidden @ weight.t()).float()
    if excluded is not None:
        illegal = torch.zeros(len(hidden), len(weight) + 1, dtype=torch.bool, device=hidden.device)
        illegal.scatter_(1, excluded.masked_fill(excluded < 0, len(weight)), True)
        logits = logits.masked_fill(illegal[:, :-1], -torch.inf)
    every = torch.log_softmax(logits, 1)
    logp = every.gather(1, target[:, None])[:, 0]
    if not with_entropy:
        return logp
    return logp, -(every.exp() * every.masked_fill(every == -torch.inf, 0.0)).sum(1)


def plain_gae(
    reward: Tensor, value: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> list[Tensor]:
    """The usual way: a Python loop over the T columns, from the last. Arguments as for `gae`."""
    next_value = F.pad(value * mask, (0, 1))[:, 1:]
    delta = (reward + gamma * next_value - value) * mask
    result, carry = torch.zeros_like(delta), delta.new_zeros(len(delta))
    for t in reversed(range(delta.shape[1])):
        result[:, t] = carry = delta[:, t] + gamma * lam * carry
    return [result, (result + value) * mask]


def plain_whiten(x: Tensor, mask: Tensor) -> Tensor:
    """The usual way: sums of products with the mask. Arguments as for `masked.whiten`."""
    count = mask.sum()
    middle = (x * mask).sum() / count
    spread = ((x - middle).square() * mask).sum() / (count - 1)
    return (x - middle) * torch.rsqrt(spread + 1e-8) * mask


def linear_case(
    N: int,
    C: int,
    V: int,
    device: str,
    dtype: torch.dtype = torch.float32,
    n_excluded: int = 0,
    with_entropy: bool = False,
    rows: int | None = None,
) -> Case:
    """Forward and backward of the mean log-probability (plus the mean entropy) of N positions.

    N, C, V       positions, channels, rows of the head
    n_excluded    random excluded ids of each position
    with_entropy  compute the entropy as well
    rows          choose among the first `rows` head rows only; the plain version masks the others
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=generator).to(device, dtype)
    weight = (torch.randn(V, C, generator=generator) * 3 * C**-0.5).to(device, dtype)
    target = torch.randint(rows or V, (N,), generator=generator).to(device)
    excluded = None
    if n_excluded:
        excluded = torch.randint(-1, rows or V, (N, n_excluded), generator=generator).to(device)
        excluded[excluded == target[:, None]] = -1
    outside = torch.arange(rows, V, device=device).expand(N, -1) if rows else excluded

    def run(function: Callable, head: Tensor, out: Tensor | None, **options) -> list[Tensor]:
        h, w = hidden.detach().requires_grad_(), head.detach().requires_grad_()
        result = function(h, w, target, out, **options)
        parts = list(result) if isinstance(result, tuple) else [result]
        grads = torch.autograd.grad(sum(x.mean() for x in parts), (h, w))
        return [x.detach() for x in (*parts, grads[0], grads[1][: rows or V])]

    def exact() -> list[Tensor]:
        # A few rows at a time: the float64 logits of a large case would not fit.
        grad_head = torch.zeros(V if not rows else rows, C, dtype=torch.float64, device=device)
        parts, grad_hidden = [], []
        for some in logprob.even_slices(N, max(1, 2**24 // V)):
            h = hidden[some].double().requires_grad_()
            w = weight[: rows or V].double().requires_grad_()
            result = reference.linear_logp(
                h,
                w,
                target[some],
                None if excluded is None else excluded[some],
                return_entropy=with_entropy,
            )
            outputs = result if isinstance(result, tuple) else (result,)
            total = torch.stack([x.sum() for x in outputs]).sum() / N
            grads = torch.autograd.grad(total, (h, w))
            parts.append([x.detach() for x in outputs])
            grad_hidden.append(grads[0])
            grad_head += grads[1]
        return [
            *(torch.cat(x) for x in zip(*parts, strict=True)),
            torch.cat(grad_hidden),
            grad_head,
        ]

    def floor() -> None:
        # Matrix products that no tiling avoids: for the logits, forward and again backward, and for
        # the two gradients.
        head = weight[: rows or V]
        tiles = logprob.even_slices(len(head), max(1, 2**21 // N))
        z, to_hidden, to_head = (
            hidden.new_empty(shape) for shape in ((N, tiles[0].stop), (N, C), (tiles[0].stop, C))
        )
        for some in tiles:
            w = head[some]
            for _ in range(2):
                torch.mm(hidden, w.t(), out=z[:, : len(w)])
            torch.mm(z[:, : len(w)], w, out=to_hidden)
            torch.mm(z[:, : len(w)].t(), hidden, out=to_head[: len(w)])

    kind = (
        "linear_logp"
        + ("+entropy" if with_entropy else "")
        + (" bf16" if dtype == torch.bfloat16 else "")
    )
    choice = f"{rows} of {V}" if rows else f"{V}"
    return Case(
        kind,
        f"{N}, {C}, {choice}" + (f", E {n_excluded}" if n_excluded else ""),
        lambda: run(plain_linear_logp, weight, outside, with_entropy=with_entropy),
        lambda: run(
            logprob.linear_logp, weight[: rows or V], excluded, return_entropy=with_entropy
        ),
        exact,
        floor,
    )


def gae_case(B: int, T: int, device: str, given: bool = False) -> Case:
    """Advantages of B rows of random length up to T; given: written into memory that is there."""
    generator = torch.Generator().manual_seed(0)
    reward, value = (torch.randn(B, T, generator=generator).to(device) for _ in range(2))
    mask = (torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=generator)).to(device)
    out = (torch.zeros_like(reward), torch.zeros_like(value)) if given else None
    return Case(
        "gae, given memory" if given else "gae",
        f"{B}, {T}",
        lambda: plain_gae(reward, value, mask),
        lambda: list(advantage.gae(reward, value, mask, out=out)),
        lambda: [x.to(device) for x in plain_gae(reward.double(), value.double(), mask)],
        lambda: (reward.clone(), value.clone()),  # two tensors read, two written
    )


def whiten_case(B: int, T: int, device: str) -> Case:
    """Whitening of B rows of random length up to T, with mean 100 and standard deviation 3."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(B, T, generator=generator) * 3 + 100).to(device)
    mask = (torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=generator)).to(device)
    return Case(
        "whiten",
        f"{B}, {T}",
        lambda: [plain_whiten(x, mask)],
        lambda: [masked.whiten(x, mask)],
        lambda: [reference.whiten(x, mask)],
        lambda: x.clone(),
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    """The rows of the table; made one at a time, since the large ones do not fit side by side."""
    if quick:
        yield linear_case(64, 32, 500, device)
        yield linear_case(64, 32, 500, device, n_excluded=8, with_entropy=True)
        yield linear_case(16, 32, 100, device, rows=50)
        yield gae_case(64, 64, device)
        yield gae_case(64, 64, device, given=True)
        yield whiten_case(64, 64, device)
        return
    yield linear_case(2048, 256, 80_000, device)  # next token, large vocabulary
    yield linear_case(2048, 768, 24_000, device)  # the same at GPT-2's width
    yield linear_case(2048, 768, 24_000, device, dtype=torch.bfloat16)
    yield linear_case(1280, 64, 1_000, device)  # SFT on the synthetic shop
    yield linear_case(1280, 64, 12_000, device)  # SFT on a real one
    # PPO: history, page
    yield linear_case(1280, 64, 12_000, device, n_excluded=70, with_entropy=True)
    yield linear_case(320, 64, 12_000, device, rows=1_000)  # items, mask afterwards
    yield gae_case(64, 20, device)
    yield gae_case(4096, 1024, device)
    yield gae_case(4096, 1024, device, given=True)
    yield whiten_case(4096, 1024, device)


def measure(case: Case, device: str, repeats: int) -> dict:
    """One row of the table. Plain and ours take turns, so that a busy moment hits both."""
    exact = case.exact()
    scale = [max(1e-30, x.abs().max().item()) for x in exact]
    diff = max(
        (x.double() - y).abs().max().item() / s
        for x, y, s in zip(case.ours(), exact, scale, strict=True)
    )
    del exact
    times: dict[str, list[float]] = {"plain": [], "ours": [], "floor": []}
    for _ in range(repeats):
        for name, spent in times.items():
            spent.append(milliseconds(getattr(case, name), device))
    plain, ours, floor = (statistics.median(spent) for spent in times.values())
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "plain_ms": plain,
        "ours_ms": ours,
        "x": plain / ours,
        "floor_ms": floor,
        "share": floor / ours,
        "max_diff": diff,
        "plain_mb": peak_megabytes(case.plain, device),
        "ours_mb": peak_megabytes(case.ours, device),
    }


def milliseconds(function: Callable, device: str) -> float:
    """Wall-clock time of function(), in ms; on CUDA until the device is done."""
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return (time.perf_counter() - start) * 1e3


def synchronise(device: str) -> None:
    """Wait until a CUDA device is done; nothing to do on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def peak_megabytes(function: Callable, device: str) -> float | None:
    """Peak memory of function() beyond what was in use before, in MB; None if it cannot be read.

    On CUDA torch counts. On a CPU it is Linux's high-water mark of resident memory, which can be
    reset.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        # Freed memory that the C library holds back could be used again without raising the mark.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = high_water()
        function()
        return (high_water() - before) / 1e3
    except (OSError, AttributeError, ValueError):
        return None


def high_water() -> int:
    """Most resident memory of this process since the last reset, in kB."""
    found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    if found is None:
        raise ValueError("no VmHWM in /proc/self/status")
    return int(found[1])


def machine(device: str) -> dict:
    """CPU, threads, device, versions of torch and of this code: what the numbers depend on."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found = None
    return {
        "cpu": name[1] if name else platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "cpu",
        "torch": torch.__version__,
        "commit": found,
    }


def line(row: dict) -> str:
    """One row as text, in columns under HEADER."""
    peaks = ["n/a" if row[key] is None else f"{row[key]:.1f}" for key in ("plain_mb", "ours_mb")]
    numbers = [
        f"{row['plain_ms']:.2f}",
        f"{row['ours_ms']:.2f}",
        f"{row['x']:.2f}",
        f"{row['floor_ms']:.2f}",
        f"{row['share']:.0%}",
        *peaks,
        f"{row['max_diff']:.1e}",
    ]
    return f"{row['kernel']:<22}{row['shape']:<24}" + "".join(f"{number:>11}" for number in numbers)


def main(argv: list[str] | None = None) -> int:
    """Print the table and the JSON line. Options: see --help."""
    parser = argparse.ArgumentParser(prog="kernels.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes: shows that it runs, no more"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed runs of each version (default: 3)"
    )
    options = parser.parse_args(argv)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(
            "--device cuda: torch sees no CUDA device here; leave the option out to run on the CPU"
        )
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: want at least 1")
    print(
        f"{HEADER[0]:<22}{HEADER[1]:<24}" + "".join(f"{name:>11}" for name in HEADER[2:]),
        flush=True,
    )
    rows = []
    for case in cases(options.device, options.quick):
        rows.append(measure(case, options.device, options.repeats))
        print(line(rows[-1]), flush=True)
    print(json.dumps({**machine(options.device), "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
