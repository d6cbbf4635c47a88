"""What every training stage needs: keyed randomness, epoch order, optimiser groups, schedule, one careful step.

Randomness is a function of (seed, names, numbers), never of an iterator's past. So a resumed run draws what the
uninterrupted one would have drawn, and a draw does not depend on how the batch was cut.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from pagellm.stage import dist, hints, randomness
from pagellm.stage.config import PageLLMError
from pagellm.stage.randomness import seed_torch

__all__ = [
    "Best",
    "GuardedStep",
    "Objective",
    "RowAdamW",
    "batch_at",
    "logged",
    "lr_at",
    "optimiser",
    "prefetch",
    "progress",
    "seed_dropout",
    "set_lr",
    "shared_means",
]


# devices whose optimiser skips a bad step by itself, so that the host need not ask about it
FUSED = ("cuda",)


def seed_dropout(seed: int, verb: str, step: int) -> None:
    """Dropout of one step, another in every process."""
    seed_torch(seed, verb, "dropout", step, *([dist.rank()] if dist.rank() else []))


def batch_at(
    step: int, n: int, batch: int, *parts, length: tuple[int, ...] | None = None
) -> tuple[int, np.ndarray]:
    """Which examples step `step` (from 0) sees: epochs of a keyed permutation, an uneven last batch.

    length   of every example: batches then hold examples of like length (sorted within pools of 16 batches, batches
             in random order), so that little is spent on padding
    returns  epoch, index (at most `batch`,)
    """
    per_epoch = max(1, math.ceil(n / batch))
    epoch, at = divmod(step, per_epoch)
    return epoch, epoch_batches(n, batch, parts, epoch, length)[at]


@lru_cache(maxsize=4)
def epoch_batches(
    n: int, batch: int, parts: tuple, epoch: int, length: tuple[int, ...] | None
) -> list[np.ndarray]:
    rng = randomness.rng(*parts, "order", epoch)
    order = rng.permutation(n)
    if length is None:
        return [order[i : i + batch] for i in range(0, max(n, 1), batch)]
    size = np.asarray(length)
    pools = [order[i : i + 16 * batch] for i in range(0, n, 16 * batch)]
    batches = [
        pool[np.argsort(size[pool], kind="stable")][i : i + batch]
        for pool in pools
        for i in range(0, len(pool), batch)
    ]
    return [batches[i] for i in rng.permutation(len(batches))]


def prefetch(
    steps: Iterable[int], total: int, make: Callable[[int], object]
) -> Iterator[tuple[int, object]]:
    """(step, make(step)); the next step's is made in the background meanwhile.

    make   a function of the step alone, so that nothing depends on who is first; steps rise by one up to `total`
    """
    with ThreadPoolExecutor(1, "batches") as pool:
        coming = None
        for step in steps:
            made = (coming or pool.submit(make, step)).result()
            coming = pool.submit(make, step + 1) if step + 1 < total else None
            yield step, made


class RowAdamW(torch.optim.AdamW):
    """AdamW; of the parameters in groups with lazy=True only rows whose gradient is not zero are touched, at all.

    A row's weight, moments and own count of steps stay as they are until it is next met: each row goes as plain AdamW
    would with that row's gradients alone. Plain AdamW on the whole table differs: between two meetings it lets a
    row's moments decay, moves the row on by them, decays its weight, and counts the steps for the correction of
    the bias. Where every row is met in every step the two are the same. Gradients may be sparse or dense.
    """

    @torch.no_grad()
    def step(self, closure=None) -> None:
        lazy = [
            (group, p, p.grad)
            for group in self.param_groups
            if group.get("lazy")
            for p in group["params"]
            if p.grad is not None
        ]
        for _, p, _ in lazy:
            p.grad = None
        super().step()
        for group, p, grad in lazy:
            self.step_rows(group, p, grad)
            p.grad = grad

    def step_rows(self, group: dict, p: nn.Parameter, grad: Tensor) -> None:
        (b1, b2), lr, state = group["betas"], group["lr"], self.state[p]
        if not state:
            state["step"] = torch.zeros(len(p), dtype=torch.int32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        if grad.is_sparse:
            grad = grad.coalesce()
            rows, grad = grad.indices()[0], grad.values()
        else:
            rows = torch.arange(len(p), device=p.device)
        met = (grad != 0).any(1)
        rows, grad = rows[met], grad[met]
        step, m, v = (state[name][rows] for name in ("step", "exp_avg", "exp_avg_sq"))
        step += 1
        m.lerp_(grad, 1 - b1)
        v.mul_(b2).addcmul_(grad, grad, value=1 - b2)
        for name, value in (("step", step), ("exp_avg", m), ("exp_avg_sq", v)):
            state[name].index_copy_(0, rows, value)
        t = step[:, None].double()
        rate, spread = (lr / (1 - b1**t)).to(p.dtype), (1 - b2**t).sqrt().to(p.dtype)
        move = rate * m / (v.sqrt() / spread + group["eps"])
        p.index_copy_(0, rows, p[rows] * (1 - lr * group["weight_decay"]) - move)


def optimiser(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    row_decay: float = 0.0,
    eps: float = 1e-8,
    betas: tuple[float, float] = (0.9, 0.95),
    lazy: bool = False,
    row_lr: float = 1.0,
) -> torch.optim.AdamW:
    """AdamW in groups: matrices (weight_decay), user and item rows (row_decay), the rest (none).

    lazy     the rows by RowAdamW, with sparse gradients where a backbone can give them. One process only: PageLLMError
    row_lr   learning rate of everything that is looked up (users, items, words, positions, gate) / that of the rest
    """
    if lazy and dist.world() > 1:
        raise PageLLMError("lazy_rows works in one process only: leave it out, or NPROC")
    for module in model.modules():
        if hasattr(module, "lazy"):
            module.lazy = lazy
    rows, matrices, looked_up, rest = [], [], [], []
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        last = name.rsplit(".", 1)[-1]
        if last in ("user", "item"):
            rows.append(weight)
        elif weight.ndim >= 2 and last not in ("wpe", "word", "special"):
            matrices.append(weight)
        elif row_lr != 1.0 and last in ("wpe", "word", "special", "gate"):
            looked_up.append(weight)
        else:
            rest.append(weight)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": rows, "weight_decay": row_decay, "share": row_lr},
        {"params": rest, "weight_decay": 0.0},
        {"params": looked_up, "weight_decay": 0.0, "share": row_lr},
    ]
    # One pass over weights, gradients and moments; one small operation after another takes three to four times as long
    kind, fused = (
        torch.optim.AdamW,
        all(p.device.type in ("cpu", "cuda") for g in groups for p in g["params"]),
    )
    if lazy:
        kind, groups[1]["lazy"], fused = RowAdamW, True, False
    return kind(
        [g for g in groups if g["params"]],
        lr=lr,
        betas=betas,
        eps=eps,
        fused=fused,
        foreach=not fused,
    )


def lr_at(
    step: int, total: int, lr: float, warmup: int = 0, shape: str = "cosine", floor: float = 0.1
) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then cosine to floor * lr or linear to 0."""
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if shape == "linear":
        return lr * max(0.0, 1.0 - done)
    return lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def set_lr(opt: torch.optim.Optimizer, lr: float) -> None:
    for group in opt.param_groups:
        group["lr"] = lr * group.get("share", 1.0)


def clip_grad_norm(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """torch's clip_grad_norm_, which knows no sparse gradients; these are coalesced on the way."""
    for p in parameters:
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.coalesce()
    if not any(p.grad is not None and p.grad.is_sparse for p in parameters):
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    grads = [
        p.grad.values() if p.grad.is_sparse else p.grad for p in parameters if p.grad is not None
    ]
    norm = nn.utils.get_total_norm(grads)
    torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


class GuardedStep:
    """Take an optimiser step unless a gradient is not finite; give up after `patience` such steps in a row.

    On a GPU (`optimiser` is fused there) the host is never waited for: the GPU leaves a bad step out by itself, and
    giving up comes one step later than elsewhere.
    """

    def __init__(
        self,
        opt: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
        max_norm: float,
        patience: int = 5,
    ):
        self.opt, self.parameters = opt, [p for p in parameters if p.requires_grad]
        self.max_norm, self.patience, self.bad = max_norm, patience, 0
        self.fused = opt.defaults["fused"] and all(p.device.type in FUSED for p in self.parameters)
        self.fetch = None

    def step(
        self, where: str, keep: Callable[[], Path] | None = None, skip: Tensor | None = None
    ) -> float | Tensor:
        """-> the gradient norm before clipping, which is not finite where the step was skipped.

        keep   writes what made the last of the bad steps and says where
        skip   bool, on a GPU only: True leaves weights, moments and counts of steps as they are
        Raises PageLLMError after `patience` non-finite norms in a row.
        """
        norm = clip_grad_norm(self.parameters, self.max_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self.fused:
            bad = ~norm.isfinite()
            self.opt.found_inf = (bad if skip is None else bad | skip).float()
            self.opt.step()
            count = torch.where(bad, self.bad + 1.0, 0.0)
            self.bad = count if skip is None else torch.where(skip, self.bad, count)
            before, self.fetch = self.fetch, dist.AsyncScalars([self.bad])
            count = int(before.read()[0]) if before else 0
        else:
            norm = float(norm)
            self.bad = count = 0 if math.isfinite(norm) else self.bad + 1
            if not count:
                self.opt.step()
        if count >= self.patience:
            kept = (
                f"\n  Its batch, weights and moments are in {keep()} for a closer look."
                if keep
                else ""
            )
            raise PageLLMError(
                f"{where}: the gradient was not finite {count} times in a row; lower the "
                f"learning rate ({hints.another_run()}, or remove this stage's directory){kept}"
            )
        self.opt.zero_grad(set_to_none=True)
        return norm


class Objective(nn.Module):
    """Modules that learn together and the loss that teaches them, in one forward: what `dist.wrap` takes.

    Gradients meet when a backward pass through this forward ends, so everything differentiable happens inside.
    """

    def __init__(self, loss: Callable, **modules: nn.Module):
        super().__init__()
        self.loss = loss
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args):
        return self.loss(self, *args)


def shared_means(terms: list[tuple[Tensor, Tensor | float]], busy: bool = True) -> list[Tensor]:
    """Means over a batch that several processes share, from each one's own.

    terms    (mean over this process's elements, how many these are)
    busy     False: this process has only a stand-in row, which weighs nothing
    returns  scalars whose averages over the processes, gradients included, are the means over all elements. In one
             process: the means themselves
    """
    if dist.world() == 1:
        return [mean for mean, _ in terms]
    counts = torch.stack(
        [torch.as_tensor(count, dtype=torch.float64, device=mean.device) for mean, count in terms]
    )
    counts = counts * busy
    shares = counts / dist.all_reduce(counts).clamp(min=1.0) * dist.world()
    return [mean * share.to(mean.dtype) for (mean, _), share in zip(terms, shares, strict=True)]


def logged(*values: Tensor) -> list[Tensor]:
    """Averages over the processes of what `shared_means` gave each: the whole batch's numbers, still on the device."""
    if dist.world() == 1:
        return [value.detach() for value in values]
    return list(
        (dist.all_reduce(torch.stack([value.detach() for value in values])) / dist.world()).unbind()
    )


def progress(start: int, total: int, name: str, unit: str = "step") -> tqdm:
    """A bar over range(start, total) with rate and remaining time; in a log file one line in ten seconds."""
    return tqdm(
        range(start, total),
        initial=start,
        total=total,
        desc=name,
        unit=unit,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        miniters=1,
        disable=not dist.is_main(),
    )


@dataclass
class Best:
    """The best validation so far: its score, its step, and the weights at that step."""

    score: float | None = -math.inf
    step: int = 0
    weights: dict[str, Tensor] | None = None

    def offer(self, score: float | None, step: int, module: nn.Module) -> None:
        """Keep the module's weights if this score is above the best one. Ask on every process."""
        if score is not None and self.score is not None and score > self.score:
            self.keep(score, step, module)

    def keep(self, score: float | None, step: int, module: nn.Module) -> None:
        """Keep the module's weights whatever the score; None where there is no validation."""
        self.score, self.step = score, step
        self.weights = dist.weights(module, frozen=False)

    def state(self) -> dict:
        """What a checkpoint holds; `Best(**state)` reads it."""
        return {"score": self.score, "step": self.step, "weights": self.weights}
