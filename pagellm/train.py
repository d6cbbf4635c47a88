"""What every training stage needs: keyed randomness, epoch order, optimiser groups, schedule, one careful step.

Randomness is a function of (seed, names, numbers), never of an iterator's past. So a resumed run draws what the
uninterrupted one would have drawn, and a draw does not depend on how the batch was cut.
"""

import hashlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from pagellm import dist
from pagellm.config import PageLLMError

__all__ = ["Guard", "Objective", "ahead", "batch_at", "key", "keyed", "logged", "lr_at", "optimiser", "progress",
           "seed_dropout", "seed_torch", "set_lr", "shared_means"]


FUSED = ("cuda",)      # devices whose optimiser steps in one launch, and skips a bad step without asking the host


def key(*parts) -> int:
    """128 bits from a tuple of names and numbers; the same on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def keyed(*parts) -> np.random.Generator:
    """A generator of its own for (seed, verb, step, example ...)."""
    return np.random.Generator(np.random.Philox(key=key(*parts)))


def seed_torch(*parts) -> None:
    """Dropout and initialisation: torch's global generator, seeded anew (once a step, so resume needs no state)."""
    torch.manual_seed(key(*parts) % (1 << 63))


def seed_dropout(seed: int, verb: str, step: int) -> None:
    """Dropout of one step, another in every process."""
    seed_torch(seed, verb, "dropout", step, *([dist.rank()] if dist.rank() else []))


def batch_at(step: int, n: int, batch: int, *parts, length: tuple[int, ...] | None = None
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
def epoch_batches(n: int, batch: int, parts: tuple, epoch: int, length: tuple[int, ...] | None) -> list[np.ndarray]:
    rng = keyed(*parts, "order", epoch)
    order = rng.permutation(n)
    if length is None:
        return [order[i: i + batch] for i in range(0, max(n, 1), batch)]
    size = np.asarray(length)
    pools = [order[i: i + 16 * batch] for i in range(0, n, 16 * batch)]
    batches = [pool[np.argsort(size[pool], kind="stable")][i: i + batch]
               for pool in pools for i in range(0, len(pool), batch)]
    return [batches[i] for i in rng.permutation(len(batches))]


def ahead(steps: Iterable[int], total: int, make: Callable[[int], object]) -> Iterator[tuple[int, object]]:
    """(step, make(step)); the next step's is made in the background meanwhile.

    make   a function of the step alone, so that nothing depends on who is first; steps rise by one up to `total`
    """
    with ThreadPoolExecutor(1, "batches") as pool:
        coming = None
        for step in steps:
            made = (coming or pool.submit(make, step)).result()
            coming = pool.submit(make, step + 1) if step + 1 < total else None
            yield step, made


def optimiser(model: nn.Module, lr: float, weight_decay: float = 0.0, row_decay: float = 0.0, eps: float = 1e-8,
              betas: tuple[float, float] = (0.9, 0.95), row_lr: float = 1.0) -> torch.optim.AdamW:
    """AdamW in groups: matrices (weight_decay), user and item rows (row_decay), the rest (none).

    row_lr   learning rate of everything that is looked up (users, items, words, positions, gate) / that of the rest
    """
    rows, matrices, rest = [], [], []
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        last = name.rsplit(".", 1)[-1]
        if last in ("user", "item"):
            rows.append(weight)
        elif weight.ndim >= 2 and last not in ("wpe", "word", "special"):
            matrices.append(weight)
        else:
            rest.append(weight)
    looked_up = [] if row_lr == 1.0 else [w for name, w in model.named_parameters() if w.requires_grad and
                                          name.rsplit(".", 1)[-1] in ("wpe", "word", "special", "gate")]
    rest = [w for w in rest if not any(w is other for other in looked_up)]
    groups = [{"params": matrices, "weight_decay": weight_decay},
              {"params": rows, "weight_decay": row_decay, "share": row_lr}, {"params": rest, "weight_decay": 0.0},
              {"params": looked_up, "weight_decay": 0.0, "share": row_lr}]
    fused = all(p.device.type in FUSED for group in groups for p in group["params"])
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=fused,
                             foreach=not fused)


def lr_at(step: int, total: int, lr: float, warmup: int = 0, shape: str = "cosine", floor: float = 0.1) -> float:
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


class Guard:
    """Take an optimiser step unless a gradient is not finite; give up after `patience` such steps in a row.

    With a fused optimiser (`optimiser` on a GPU) the host is never waited for: the GPU leaves a bad step out by
    itself, and giving up comes one step later than elsewhere.
    """

    def __init__(self, opt: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], max_norm: float,
                 patience: int = 5):
        self.opt, self.parameters = opt, [p for p in parameters if p.requires_grad]
        self.max_norm, self.patience, self.bad = max_norm, patience, 0
        self.fused, self.fetch = opt.defaults["fused"], None

    def step(self, where: str, keep: Callable[[], Path] | None = None) -> float | Tensor:
        """-> the gradient norm before clipping, which is not finite where the step was skipped.

        keep   writes what made the last of the bad steps and says where
        Raises PageLLMError after `patience` non-finite norms in a row.
        """
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self.fused:
            bad = ~norm.isfinite()
            self.opt.found_inf = bad.float()
            self.opt.step()
            self.bad = torch.where(bad, self.bad + 1.0, 0.0)
            before, self.fetch = self.fetch, dist.Fetch([self.bad])
            count = int(before.read()[0]) if before else 0
        else:
            norm = float(norm)
            self.bad = count = 0 if math.isfinite(norm) else self.bad + 1
            if not count:
                self.opt.step()
        if count >= self.patience:
            kept = f"\n  Its batch, weights and moments are in {keep()} for a closer look." if keep else ""
            raise PageLLMError(f"{where}: the gradient was not finite {count} times in a row; lower the "
                               f"learning rate (RUN=another, or remove this stage's directory){kept}")
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
    counts = torch.stack([torch.as_tensor(count, dtype=torch.float64, device=mean.device) for mean, count in terms])
    counts = counts * busy
    shares = counts / dist.total(counts).clamp(min=1.0) * dist.world()
    return [mean * share.to(mean.dtype) for (mean, _), share in zip(terms, shares, strict=True)]


def logged(*values: Tensor) -> list[Tensor]:
    """Averages over the processes of what `shared_means` gave each: the whole batch's numbers, still on the device."""
    if dist.world() == 1:
        return [value.detach() for value in values]
    return list((dist.total(torch.stack([value.detach() for value in values])) / dist.world()).unbind())


def progress(start: int, total: int, name: str, unit: str = "step") -> tqdm:
    """A bar over range(start, total) with rate and remaining time; in a log file one line in ten seconds."""
    return tqdm(range(start, total), initial=start, total=total, desc=name, unit=unit, dynamic_ncols=True,
                mininterval=0.2 if sys.stderr.isatty() else 10.0, miniters=1, disable=not dist.is_main())
