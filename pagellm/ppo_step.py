"""The arithmetic of one PPO step: tensors in, tensors out; no device, no logging."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pagellm.kernels import masked
from pagellm.model.backbone import Backbone
from pagellm.model.page_loss import Batch

__all__ = [
    "AdaptiveKL",
    "Rollout",
    "RunningMoments",
    "exact_kl",
    "hit_reward",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "legal_logits",
    "normalise_reward",
    "policy_loss",
    "step_reward",
    "value_loss",
]


def kl_k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log pi - log ref of each drawn token: unbiased for KL(pi || ref), and can be negative. In nats."""
    return logp - ref_logp


def kl_k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Half the squared log-ratio: never negative, biased, low variance (Schulman, "Approximating KL", 2020)."""
    return 0.5 * (logp - ref_logp).square()


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """exp(ref - logp) - 1 - (ref - logp): never negative, and unbiased for KL(pi || ref)."""
    log_ratio = ref_logp - logp
    return torch.expm1(log_ratio) - log_ratio


def step_reward(
    token_reward: Tensor,
    page_reward: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    w_token: float,
    w_page: float,
    kl_coef: float,
    hit: Tensor | float = 0.0,
) -> Tensor:
    """Reward of every slot: w_token token_k / T + hit_k - kl_coef (logp - ref_logp)_k, + w_page page at the last slot.

    token_reward, logp, ref_logp, hit (B, K) float    page_reward (B,) float    mask (B, K) bool, a prefix of each row
    returns (B, K), 0 off the mask. Its row sums are w_token mean(token) + w_page page + sum(hit) - kl_coef sum(k1).
    A row without a slot gets nothing. Raises ValueError on unequal shapes.
    """
    if (
        not token_reward.shape == logp.shape == ref_logp.shape == mask.shape
        or page_reward.shape != mask.shape[:1]
    ):
        raise ValueError(
            f"step_reward: token_reward {tuple(token_reward.shape)}, logp {tuple(logp.shape)}, ref_logp "
            f"{tuple(ref_logp.shape)}, mask {tuple(mask.shape)}, page_reward {tuple(page_reward.shape)}: "
            "want (B, K) four times and (B,)"
        )
    length = mask.sum(1, keepdim=True)
    slot = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    reward = w_token * token_reward / length.clamp(min=1) + hit - kl_coef * (logp - ref_logp)
    reward = reward + torch.where(slot == length, w_page * page_reward[:, None], 0.0)
    return torch.where(mask, reward, 0.0)


def policy_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Clipped objective (arXiv 1707.06347 eq. 7), negated: mean over kept slots of max(-r A, -clip(r, 1 +- clip) A).

    logp, old_logp, advantage (B, K) float; mask (B, K) bool. r = exp(logp - old_logp).
    returns loss (scalar) and the clip fraction: the share of kept slots whose clipped branch wins. 0, 0 on an
    empty mask.
    """
    ratio = torch.exp(torch.where(mask, logp - old_logp, 0.0))
    advantage = torch.where(mask, advantage, 0.0)
    plain, clipped = -ratio * advantage, -ratio.clamp(1 - clip, 1 + clip) * advantage
    loss = masked.mean(torch.maximum(plain, clipped), mask)
    return loss, masked.mean((clipped > plain).to(loss.dtype), mask)


def value_loss(
    value: Tensor, old_value: Tensor, ret: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Half the mean over kept slots of max((V - R)^2, (V_clipped - R)^2), V_clipped within old_value +- clip.

    All (B, K). returns loss (scalar) and the share of kept slots whose clipped branch wins; 0, 0 on an empty mask.
    """
    value, old_value, ret = (torch.where(mask, x, 0.0) for x in (value, old_value, ret))
    # clamp(V, old - c, old + c), not old + clamp(V - old): the second rounds V even where nothing is clipped.
    limited = torch.maximum(torch.minimum(value, old_value + clip), old_value - clip)
    plain, clipped = (value - ret).square(), (limited - ret).square()
    loss = 0.5 * masked.mean(torch.maximum(plain, clipped), mask)
    return loss, masked.mean((clipped > plain).to(loss.dtype), mask)


class RunningMoments:
    """Count, mean and unbiased standard deviation of a whole stream, in any split or order (Welford; Chan et al.)."""

    def __init__(self):
        self.count, self.mean, self.m2 = 0, 0.0, 0.0

    def update(self, x: Tensor) -> None:
        """x: any shape, every entry counts. Raises ValueError on NaN or infinity, which would stay for ever."""
        x = torch.as_tensor(x).detach().double().flatten()
        if not x.isfinite().all():
            raise ValueError(
                f"RunningMoments: {int((~x.isfinite()).sum())} of {x.numel()} values are not finite"
            )
        n = x.numel()
        if n == 0:
            return
        mean = float(x.mean())
        delta, total = mean - self.mean, self.count + n
        self.m2 += float((x - mean).square().sum()) + delta * delta * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    @property
    def std(self) -> float:
        """0 until two values were seen."""
        return math.sqrt(self.m2 / (self.count - 1)) if self.count > 1 else 0.0

    def state_dict(self) -> dict:
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: dict) -> None:
        self.count, self.mean, self.m2 = state["count"], state["mean"], state["m2"]


class AdaptiveKL:
    """KL coefficient that steers towards a target (Ziegler et al. 2019, section 2.2).

    target   nats a page      horizon  pages over which a steady 20% error moves the coefficient by a factor e^0.2
    """

    def __init__(self, coef: float, target: float, horizon: float):
        if target <= 0 or horizon <= 0:
            raise ValueError(f"AdaptiveKL: target={target}, horizon={horizon}: want both above 0")
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, n_pages: int) -> float:
        """kl: mean over pages of the sum over slots. coef *= 1 + clip(kl / target - 1, +-0.2) n_pages / horizon."""
        error = min(0.2, max(-0.2, float(kl) / self.target - 1.0))
        self.coef *= 1.0 + error * n_pages / self.horizon
        return self.coef


def hit_reward(item: Tensor, mask: Tensor, label: Tensor) -> Tensor:
    """NDCG@K of every page against the items hidden from its prompt, slot by slot: a hit at slot k is worth
    1 / log2(k + 1) over the DCG of the best page. Ours: the paper's reward is learnt throughout.

    item, mask (B, K)    label (B, L) item ids, padded with -1    returns (B, K) float32, a row sums to its NDCG; 0
    for pages without labels
    """
    discount = 1.0 / torch.arange(2, item.shape[1] + 2, device=item.device).log2()
    hit = mask & (item[:, :, None] == label.masked_fill(label < 0, -2)[:, None]).any(2)
    best = discount.cumsum(0)[(label >= 0).sum(1).clamp(1, len(discount)) - 1]
    return hit * discount / best[:, None]


def normalise_reward(
    token_reward: Tensor,
    page_reward: Tensor,
    mask: Tensor,
    moments: RunningMoments,
    w_token: float,
    w_page: float,
    limit: float = 5.0,
    hit: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Running normalisation of the page's whole reward S = w_token mean(token) + w_page page + sum(hit), in its parts.

    token part w_token token / sigma and terminal part (w_page page - mu) / sigma, each clipped to +- limit, and hit /
    sigma, which is bounded by itself, so that their sum is (S - mu) / sigma. `moments` takes in this batch first.
    Before KL: that stays in nats.
    returns token (B, K), page (B,), hit (B, K): weights are already inside
    """
    hit = torch.zeros_like(token_reward) if hit is None else torch.where(mask, hit, 0.0)
    mean = torch.where(mask, token_reward, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    moments.update(w_token * mean + w_page * page_reward + hit.sum(1))
    sigma = max(moments.std, 1e-6)
    return (
        (w_token * token_reward / sigma).clamp(-limit, limit),
        ((w_page * page_reward - moments.mean) / sigma).clamp(-limit, limit),
        hit / sigma,
    )


@dataclass
class Rollout:
    """Pages of one step and all that was known of them before the first update. (B, K) unless said otherwise."""

    prompt: Tensor  # (B, P)
    valid: Tensor  # (B, P)
    excluded: Tensor  # (B, E) item ids, padded with -1
    item: Tensor
    mask: Tensor
    old_logp: Tensor
    ref_logp: Tensor
    value: Tensor
    token: Tensor  # raw token rewards
    page: Tensor  # (B,) raw page rewards
    entropy: Tensor  # of the legal distribution of each slot, nats
    kl_exact: Tensor  # sum over the legal set of pi log(pi / ref)
    drift: float  # largest |sampled logp - old_logp|: cached generation against the full pass
    hit: Tensor | None = None  # NDCG of the page in its parts,
    # if train items were hidden from its prompt
    sft: Batch | None = None  # what SFT would teach of the same users

    def __len__(self) -> int:
        return len(self.item)

    def state(self) -> dict:
        """All of it as plain tensors."""
        return vars(self) | {"sft": self.sft and vars(self.sft)}


def legal_logits(states: Tensor, model: Backbone, item: Tensor, excluded: Tensor) -> Tensor:
    """(B, K, N) item logits with -inf on whatever slot k may not hold. For exact KL on a micro-batch only."""
    B, K = item.shape
    logits = model.item_logits(states[:, :K])
    illegal = torch.zeros(B, K, model.n_items + 1, dtype=torch.bool, device=item.device)
    before = torch.ones(K, K, dtype=torch.bool, device=item.device).tril(-1)
    placed = torch.where(before & (item[:, None] >= 0), item[:, None], model.n_items)
    gone = torch.where(excluded >= 0, excluded, model.n_items)[:, None].expand(B, K, -1)
    illegal.scatter_(2, torch.cat([placed, gone], 2), True)
    return logits.masked_fill(illegal[..., :-1], -torch.inf)


def exact_kl(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    """KL(pi || ref) of every slot over its legal set, (B, K); 0 off the mask."""
    safe = mask[..., None]
    logp = torch.where(safe, logits, 0.0).log_softmax(-1)
    ref = torch.where(safe, ref_logits, 0.0).log_softmax(-1)
    return torch.where(
        mask, torch.where(logp.isfinite(), logp.exp() * (logp - ref), 0.0).sum(-1), 0.0
    )
