"""Shared by the training stages: order of examples, optimiser groups, schedule, guarded steps.

Randomness is a function of a seed, names and numbers (`randomness.rng`) and not of what was drawn
before. A resumed run draws what the uninterrupted run would have drawn, and cutting a batch into
smaller pieces changes no draw.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
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


T = TypeVar("T")

# Device types on which a fused optimiser can itself leave out a step with gradients that are not
# finite, so that the CPU need not wait to hear about it.
FUSED = ("cuda",)


def seed_dropout(seed: int, verb: str, step: int) -> None:
    """Seed torch's generator for the dropout of one step.

    verb   name of the stage
    step   number of the step, from 0

    Each process gets another seed: it drops other entries, as it sees other rows.
    """
    seed_torch(seed, verb, "dropout", step, *([dist.rank()] if dist.rank() else []))


def batch_at(
    step: int, n: int, batch: int, *parts: object, length: tuple[int, ...] | None = None
) -> tuple[int, np.ndarray]:
    """Which examples a step sees. An epoch sees each example once, in a random order.

    step     number of the step, from 0
    n        examples in an epoch
    batch    examples in a step; the last step of an epoch may have fewer
    parts    seed and names that decide the order
    length   the length of every example, if batches shall hold examples of similar length, so that
             little is padded: examples are sorted by length within pools of 16 batches, and the
             batches are taken in random order
    returns  epoch (from 0), index (at most `batch`,) of the examples
    """
    per_epoch = max(1, math.ceil(n / batch))
    epoch, at = divmod(step, per_epoch)
    return epoch, epoch_batches(n, batch, parts, epoch, length)[at]


@lru_cache(maxsize=4)
def epoch_batches(
    n: int, batch: int, parts: tuple[object, ...], epoch: int, length: tuple[int, ...] | None
) -> list[np.ndarray]:
    """All batches of one epoch, see `batch_at`."""
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


def prefetch(steps: Iterable[int], total: int, make: Callable[[int], T]) -> Iterator[tuple[int, T]]:
    """Yield (step, make(step)) for each step, and make the next one in a background thread.

    steps   consecutive numbers below `total`
    make    makes a step's batch. It must depend on the step alone and change nothing else, since
            it runs beside the training step before
    """
    with ThreadPoolExecutor(1, "batches") as pool:
        coming: Future[T] | None = None
        for step in steps:
            made = (coming or pool.submit(make, step)).result()
            coming = pool.submit(make, step + 1) if step + 1 < total else None
            yield step, made


class RowAdamW(torch.optim.AdamW):
    """AdamW that updates only the rows that a step used, for parameter groups with lazy=True.

    A row is used in a step if its gradient is not zero. Each row is trained as plain AdamW would
    train a parameter of its own that sees only the steps in which the row is used: between them the
    row's weight, moments and count of steps do not change. Plain AdamW on the whole table would
    meanwhile decay the row's moments and weight, move the row by its old moments, and count the
    steps for the bias correction. If every step uses every row, the two are the same.

    Gradients may be sparse or dense. Groups without lazy=True are trained by plain AdamW.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of all groups. `closure` is ignored."""
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

    def step_rows(self, group: dict[str, Any], p: nn.Parameter, grad: Tensor) -> None:
        """Update the rows of one parameter p (rows, C) whose gradient is not zero."""
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
    """AdamW over the parameters that learn, in groups.

    lr             learning rate
    weight_decay   of the matrices
    row_decay      weight decay of user and item rows. All else (norms, biases, words, positions)
                   has none
    lazy           train user and item rows with RowAdamW, and ask the network for sparse gradients
                   of them. With several processes it works where rows are cut (dist.wrap)
    row_lr         learning rate of all that is looked up (users, items, words, positions, gate) as
                   a multiple of `lr`

    Raises PageLLMError for lazy=True with several processes that do not divide the rows.
    """
    if lazy and dist.world() > 1 and not any(map(dist.parts_of, model.parameters())):
        raise PageLLMError(
            "lazy_rows works in one process, or with --parallel rows: leave it out, or NPROC"
        )
    for module in model.modules():
        if hasattr(module, "lazy"):
            module.lazy = lazy  # type: ignore[assignment]
    looked = ("wpe", "word", "word_out", "special", "gate", "blend")
    rows, matrices, looked_up, rest = [], [], [], []
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        last = name.rsplit(".", 1)[-1]
        if last in ("user", "item", "item_out"):
            rows.append(weight)
        elif weight.ndim >= 2 and last not in ("wpe", "word", "word_out", "special", "blend"):
            matrices.append(weight)
        elif row_lr != 1.0 and last in looked:
            looked_up.append(weight)
        else:
            rest.append(weight)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": rows, "weight_decay": row_decay, "share": row_lr},
        {"params": rest, "weight_decay": 0.0},
        {"params": looked_up, "weight_decay": 0.0, "share": row_lr},
    ]
    kind: type[torch.optim.AdamW] = torch.optim.AdamW
    # A fused step passes once over weights, gradients and moments. As a series of small operations
    # it takes three to four times as long.
    fused = all(p.device.type in ("cpu", "cuda") for g in groups for p in g["params"])
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
    """The learning rate of a step: a linear warm-up, then a decay until the last step.

    step     number of the step, from 0
    total    number of steps
    lr       the peak, reached after `warmup` steps
    shape    "cosine" decays to floor * lr, "linear" to 0
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if shape == "linear":
        return lr * max(0.0, 1.0 - done)
    return lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def set_lr(opt: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate; a group with a "share" gets that multiple of it (see `optimiser`)."""
    for group in opt.param_groups:
        group["lr"] = lr * group.get("share", 1.0)


def clip_grad_norm(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """torch's clip_grad_norm_ that also accepts sparse gradients, which it coalesces, and cut rows.

    max_norm   the largest norm of all gradients together; larger ones are scaled down to it
    returns    () the norm before that, of all processes together
    """
    for p in parameters:
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.coalesce()
    there = [p for p in parameters if p.grad is not None]
    own = any(dist.parts_of(p) is not None for p in parameters)
    if not own and not any(p.grad is not None and p.grad.is_sparse for p in there):
        norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        return cast(Any, norm).full_tensor() if dist.divided(norm) else norm
    cut = [gradient(p) for p in there if dist.parts_of(p) is not None]
    rest = [gradient(p) for p in there if dist.parts_of(p) is None]
    norm = nn.utils.get_total_norm(rest)
    norm = cast(Any, norm).full_tensor() if dist.divided(norm) else norm
    if own:
        squares = nn.utils.get_total_norm(cut).square() if cut else torch.zeros_like(norm)
        norm = (norm.square() + dist.all_reduce(squares)).sqrt()
    local = [cast(Any, g).to_local() if dist.divided(g) else g for g in (*rest, *cut)]
    torch._foreach_mul_(local, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def gradient(p: nn.Parameter) -> Tensor:
    """The gradient of a parameter; of a sparse one the values."""
    assert p.grad is not None
    return p.grad.values() if p.grad.is_sparse else p.grad


class GuardedStep:
    """Clips gradients and takes optimiser steps, but skips a step if a gradient is not finite.

    max_norm   the largest gradient norm; larger gradients are scaled down to it
    patience   how many skipped steps in a row stop the run

    On a GPU nobody waits for the gradient norm: the fused optimiser itself leaves a bad step out,
    and the CPU hears of it one step later, so the run also stops one step later than on a CPU.
    """

    def __init__(
        self,
        opt: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
        max_norm: float,
        patience: int = 5,
    ):
        self.opt, self.parameters = opt, [p for p in parameters if p.requires_grad]
        self.max_norm, self.patience = max_norm, patience
        self.bad: int | Tensor = 0  # steps skipped in a row so far; a tensor where it is on a GPU
        self.fused = opt.defaults["fused"] and all(p.device.type in FUSED for p in self.parameters)
        self.fetch: dist.AsyncScalars | None = None  # `bad` after the last step, on its way here

    def step(
        self, where: str, keep: Callable[[], Path] | None = None, skip: Tensor | None = None
    ) -> float | Tensor:
        """Take one step and clear the gradients.

        where    named in the error, e.g. "sft, step 12"
        keep     called before giving up: writes a file with what made the step go wrong, and
                 returns its path
        skip     () bool, on a GPU only: if True, leave out this step, whatever the gradients.
                 Weights, moments and counts of steps then stay as they are
        returns  the gradient norm before clipping; not finite if the step was skipped for that

        Raises PageLLMError after `patience` steps in a row whose norm was not finite.
        """
        norm: float | Tensor
        norm = clip_grad_norm(self.parameters, self.max_norm)
        if self.fused:
            bad = ~norm.isfinite()
            # a fused optimiser leaves the step out where found_inf is not 0
            found_inf = (bad if skip is None else bad | skip).float()
            self.opt.found_inf = found_inf  # type: ignore[attr-defined]
            self.opt.step()
            now = torch.where(bad, self.bad + 1.0, 0.0)
            self.bad = now if skip is None else torch.where(skip, self.bad, now)
            before, self.fetch = self.fetch, dist.AsyncScalars([self.bad])
            count = int(before.read()[0]) if before else 0
        else:
            norm = float(norm)
            self.bad = count = 0 if math.isfinite(norm) else int(self.bad) + 1
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
    """A loss and the modules that it trains, as one module for `dist.wrap`.

    loss      a function of this object, which has the modules as attributes, and of whatever
              `forward` is given
    modules   the modules by name

    Distributed training exchanges gradients of what happens inside the wrapped module's forward
    pass. So everything that carries a gradient happens in `loss`.
    """

    def __init__(self, loss: Callable[..., Any], **modules: nn.Module):
        super().__init__()
        self.loss = loss
        for name, module in modules.items():
            self.add_module(name, module)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)  # for mypy: a module here is of any class

    def forward(self, *args: Any) -> Any:
        return self.loss(self, *args)


def shared_means(terms: list[tuple[Tensor, Tensor | float]], busy: bool = True) -> list[Tensor]:
    """Losses to call `backward` on, from means over this process's part of a batch.

    `dist.wrap` averages gradients over the processes with equal weights. But one process may have
    more elements (tokens, pairs) than another, so the average of their means would not be the mean
    over the whole batch. Here each mean is multiplied by its process's weight,

        n_p * P / (n_1 + ... + n_P)      n_p elements in process p, P processes

    so that the average over the processes, of values and gradients alike, is the mean over all
    elements of the batch.

    terms    for each loss: (mean over this process's elements () float, number of these elements)
    busy     False if this process has only the stand-in row that `dist.shard` gives to a process
             without rows: its elements count as 0
    returns  one scalar a term. In one process: the means as they are
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
    """Means over the whole batch, for the log, from the scalars that `shared_means` returned.

    values   () float each, this process's results of `shared_means`
    returns  their averages over the processes, without gradients, still on the device. In one
             process: the values, detached
    """
    if dist.world() == 1:
        return [value.detach() for value in values]
    return list(
        (dist.all_reduce(torch.stack([value.detach() for value in values])) / dist.world()).unbind()
    )


def progress(start: int, total: int, name: str, unit: str = "step") -> tqdm:
    """A progress bar over range(start, total), with rate and remaining time.

    On a terminal it moves; if stderr is a file, it writes a line at most every ten seconds. Only
    the main process shows it.
    """
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
    """The best validation so far.

    score     the validation's score, higher is better; None where there is no validation
    step      the number of steps done then
    weights   what learns, as it was then (`dist.weights`); None before the first validation
    """

    score: float | None = -math.inf
    step: int = 0
    weights: dict[str, Tensor] | None = None

    def offer(self, score: float | None, step: int, module: nn.Module) -> None:
        """Keep the module's weights if the score is above the best so far.

        Call it on every process.
        """
        if score is not None and self.score is not None and score > self.score:
            self.keep(score, step, module)

    def keep(self, score: float | None, step: int, module: nn.Module) -> None:
        """Keep the module's weights whatever the score."""
        self.score, self.step = score, step
        self.weights = dist.weights(module, frozen=False)

    def restore(self, module: nn.Module) -> None:
        """Put the weights that were kept back into the module.

        Raises PageLLMError if none were kept, since every score was not a number.
        """
        if self.weights is None:
            raise PageLLMError(
                "no validation gave a score, so no step is the best; see the losses in log.jsonl"
            )
        dist.load_weights(module, self.weights)

    def stale(self, step: int, every: int, patience: int) -> bool:
        """Whether the last `patience` validations, one every `every` steps, were no better.

        step      steps done      patience  0: never
        It follows from the step of the best, so a run that is carried on stops where it would have.
        """
        return 0 < patience * every <= step - self.step and step % every == 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it; Best(**state) is the same object again."""
        return {"score": self.score, "step": self.step, "weights": self.weights}
