"""Every kernel again, slow and plain, in float64: tests compare with it, and reading starts here.

Nothing is tiled, clamped, fused or checked. Arguments and results are those of the fast versions.
"""

import math

import torch
from torch import Tensor

__all__ = ["center", "entropy", "gae", "linear_logp", "mean", "token_logp", "variance", "whiten"]


def gae(
    reward: Tensor, value: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """See kernels.advantage.gae. Row by row, and step by step from the end."""
    advantage, ret = (torch.zeros(reward.shape, dtype=torch.float64) for _ in range(2))
    for b in range(len(reward)):
        next_value = next_advantage = 0.0
        for t in reversed(range(int(mask[b].sum()))):
            r, v = reward[b, t].item(), value[b, t].item()
            delta = r + gamma * next_value - v
            next_advantage = delta + gamma * lam * next_advantage
            next_value = v
            advantage[b, t], ret[b, t] = next_advantage, next_advantage + v
    return advantage, ret


def mean(x: Tensor, mask: Tensor) -> float:
    """See kernels.masked.mean."""
    kept = x[mask].tolist()
    return math.fsum(kept) / len(kept) if kept else 0.0


def variance(x: Tensor, mask: Tensor) -> float:
    """See kernels.masked.variance."""
    kept, middle = x[mask].tolist(), mean(x, mask)
    return (
        math.fsum((value - middle) ** 2 for value in kept) / (len(kept) - 1)
        if len(kept) > 1
        else 0.0
    )


def center(x: Tensor, mask: Tensor) -> Tensor:
    """See kernels.masked.center."""
    return torch.where(mask, x.double() - mean(x, mask), 0.0)


def whiten(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """See kernels.masked.whiten."""
    return center(x, mask) / math.sqrt(variance(x, mask) + eps * eps)


def token_logp(
    logits: Tensor, ids: Tensor, legal: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """See kernels.logprob.token_logp. The log of the softmax's quotient."""
    return _probability(logits, legal, temperature).gather(-1, ids.long()[..., None])[..., 0].log()


def entropy(logits: Tensor, legal: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """See kernels.logprob.entropy."""
    p = _probability(logits, legal, temperature)
    return -torch.where(p > 0, p * torch.where(p > 0, p, 1.0).log(), 0.0).sum(-1)


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    excluded: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See kernels.logprob.linear_logp. All (N, V) logits at once; differentiable by autograd."""
    logits = hidden.double() @ weight.double().t()
    legal = torch.ones(logits.shape, dtype=torch.bool, device=logits.device)
    for n, ids in enumerate([] if excluded is None else excluded.tolist()):
        for item in ids:
            if item >= 0:
                legal[n, item] = False
    # log_softmax, because the quotient underflows at the widely spread logits of a benchmark.
    every = torch.log_softmax(logits.masked_fill(~legal, -torch.inf) / temperature, 1)
    logp = every.gather(1, target.long()[:, None])[:, 0]
    logp = torch.where(legal.gather(1, target.long()[:, None])[:, 0], logp, -torch.inf)
    return (
        (logp, (every.exp() * -every.masked_fill(~legal, 0.0)).sum(1)) if return_entropy else logp
    )


def _probability(logits: Tensor, legal: Tensor | None, temperature: float) -> Tensor:
    """softmax by its definition, (..., V); 0 on illegal entries."""
    logits = logits.double() if legal is None else torch.where(legal, logits.double(), -torch.inf)
    weight = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp()
    return weight / weight.sum(-1, keepdim=True)
