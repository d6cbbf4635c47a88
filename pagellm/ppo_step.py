"""The arithmetic of one PPO step: tensors in, tensors out. No config, no logging.

    reward_terms -> normalise -> step_reward -> advantages -> policy_loss, value_loss

A reward term is one function that returns a (B, K) tensor, the reward of every slot, and one entry
in `reward_terms`, which weights it. `normalise` divides all terms by one standard deviation, and
`step_reward` sums them.

Shapes: B pages, K slots of a page, P prompt tokens, E excluded items, N items. `mask` (B, K) is
True on the slots that hold an item: a prefix of each row.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pagellm.kernels import masked
from pagellm.kernels.advantage import gae, group_advantage
from pagellm.model.backbone import Backbone
from pagellm.model.page_loss import Batch, sft_loss

__all__ = [
    "AdaptiveKL",
    "Rollout",
    "RunningMoments",
    "add_sft_loss",
    "advantages",
    "exact_kl",
    "gated",
    "hit_reward",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "legal_logits",
    "last_slot",
    "normalise",
    "page_pay",
    "page_term",
    "page_total",
    "policy_loss",
    "reward_terms",
    "step_reward",
    "token_term",
    "value_loss",
]


@dataclass
class Rollout:
    """The pages of one step and everything measured on them before the first update.

    (B, K) unless said otherwise.
    """

    prompt: Tensor  # (B, P)
    valid: Tensor  # (B, P)
    excluded: Tensor  # (B, E) item ids, padded with -1
    item: Tensor
    mask: Tensor
    old_logp: Tensor
    ref_logp: Tensor
    value: Tensor
    token: Tensor  # token rewards as the reward model gives them
    page: Tensor  # (B,) page rewards as the reward model gives them
    entropy: Tensor  # of the legal distribution of each slot, in nats
    kl_exact: Tensor  # sum over the legal set of pi log(pi / ref)
    candidates: Tensor | None = None  # (B, S) shortlists (shortlist.py); None: all items
    # Largest |log-probability when sampled - old_logp|: cached generation against the full pass.
    drift: float = 0.0
    # Reward terms by name, weighted, before normalisation.
    terms: dict[str, Tensor] = field(default_factory=dict)
    # Ground-truth pages of the same users, for SFT's loss.
    sft: Batch | None = None

    def __len__(self) -> int:
        return len(self.item)

    def state(self) -> dict:
        """Everything as plain tensors, for a file."""
        return vars(self) | {"sft": self.sft and vars(self.sft)}


def kl_k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log pi - log ref of each drawn token, in nats: unbiased for KL(pi || ref), any sign."""
    return logp - ref_logp


def kl_k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Half the squared log-ratio: never negative, biased, of low variance.

    Source: Schulman, "Approximating KL divergence", 2020.
    """
    return 0.5 * (logp - ref_logp).square()


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """exp(ref - logp) - 1 - (ref - logp): never negative, and unbiased for KL(pi || ref)."""
    log_ratio = ref_logp - logp
    return torch.expm1(log_ratio) - log_ratio


def legal_logits(states: Tensor, model: Backbone, item: Tensor, excluded: Tensor) -> Tensor:
    """Item logits (B, K, N), -inf on every item that slot k may not hold.

    Takes memory for B x K x N numbers: use it on a micro-batch, for the exact KL only.
    """
    B, K = item.shape
    logits = model.item_logits(states[:, :K])
    illegal = torch.zeros(B, K, model.n_items + 1, dtype=torch.bool, device=item.device)
    before = torch.ones(K, K, dtype=torch.bool, device=item.device).tril(-1)
    placed = torch.where(before & (item[:, None] >= 0), item[:, None], model.n_items)
    gone = torch.where(excluded >= 0, excluded, model.n_items)[:, None].expand(B, K, -1)
    illegal.scatter_(2, torch.cat([placed, gone], 2), True)
    return logits.masked_fill(illegal[..., :-1], -torch.inf)


def exact_kl(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    """KL(pi || ref) of every slot over its legal set, in nats: (B, K), 0 off the mask."""
    safe = mask[..., None]
    logp = torch.where(safe, logits, 0.0).log_softmax(-1)
    ref = torch.where(safe, ref_logits, 0.0).log_softmax(-1)
    kl = torch.where(logp.isfinite(), logp.exp() * (logp - ref), 0.0).sum(-1)
    return torch.where(mask, kl, 0.0)


def last_slot(mask: Tensor) -> Tensor:
    """(B, K) bool: True on the last kept slot of each row; nowhere in an empty row."""
    slot = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return mask & (slot == mask.sum(1, keepdim=True))


def token_term(token_reward: Tensor, mask: Tensor) -> Tensor:
    """r_k / T on each of a page's T slots, so that the page earns their mean (Eq. 6).

    token_reward (B, K) float, mask (B, K) bool -> (B, K), 0 off the mask
    """
    return torch.where(mask, token_reward, 0.0) / mask.sum(1, keepdim=True).clamp(min=1)


def page_term(page_reward: Tensor, mask: Tensor) -> Tensor:
    """The page reward (B,) on the last slot of each page: (B, K). An empty page earns nothing."""
    return torch.where(last_slot(mask), page_reward[:, None], 0.0)


def hit_reward(item: Tensor, mask: Tensor, label: Tensor) -> Tensor:
    """NDCG@K of every page against the items that were hidden from its prompt, slot by slot.

    A hit at slot k earns 1 / log2(k + 1), divided by the DCG of the best possible page. This
    term is ours: the paper's reward comes from the reward model alone.

    item, mask (B, K)    label (B, L) item ids, padded with -1
    returns (B, K) float32; a row sums to its page's NDCG, 0 where a page has no labels
    """
    discount = 1.0 / torch.arange(2, item.shape[1] + 2, device=item.device).log2()
    hit = mask & (item[:, :, None] == label.masked_fill(label < 0, -2)[:, None]).any(2)
    best = discount.cumsum(0)[(label >= 0).sum(1).clamp(1, len(discount)) - 1]
    return hit * discount / best[:, None]


def reward_terms(
    r: Rollout, w_token: float, w_page: float, w_hit: float = 0.0, label: Tensor | None = None
) -> dict[str, Tensor]:
    """Name -> (B, K): what each slot earns from each term, weights included.

    A page's whole reward is the sum over its slots and terms:
    S = w_token mean_k(token_k) + w_page page + w_hit NDCG.

    label (B, L) item ids hidden from the prompts, padded with -1. Raises ValueError if w_hit is
    above 0 and it is missing.
    """
    terms = {
        "token": w_token * token_term(r.token, r.mask),
        "page": w_page * page_term(r.page, r.mask),
    }
    if w_hit:
        if label is None:
            raise ValueError(f"reward_terms: w_hit={w_hit} wants the hidden items as label")
        terms["hit"] = w_hit * hit_reward(r.item, r.mask, label)
    return terms


def page_pay(token: Tensor, page: Tensor, mask: Tensor, w_token: float, w_page: float) -> Tensor:
    """(B,): the sum of the learnt terms of `reward_terms` over each page, before normalisation."""
    return (w_token * token_term(token, mask) + w_page * page_term(page, mask)).sum(1)


def page_total(terms: dict[str, Tensor]) -> Tensor:
    """(B,): the sum of all terms over the slots of each page."""
    return torch.stack(list(terms.values())).sum((0, 2))


def normalise(
    terms: dict[str, Tensor], mask: Tensor, moments: "RunningMoments", limit: float = 5.0
) -> dict[str, Tensor]:
    """Divide all terms by one running standard deviation, so that each page earns (S - mu) / sigma.

    S is a page's sum over all terms. `moments` first takes in the S of this batch; mu and sigma
    are its running mean and standard deviation. The mean is subtracted at the last slot, as a term
    of its own named "mean". Where |S - mu| / sigma is above `limit`, all of the page's terms are
    scaled down until it equals `limit`. The KL penalty is added later: it stays in nats.

    terms name -> (B, K), 0 off the mask    mask (B, K) bool    returns name -> (B, K)
    """
    total = page_total(terms)
    moments.update(total)
    sigma = max(moments.std, 1e-6)
    centred = terms | {"mean": torch.where(last_slot(mask), -moments.mean, 0.0).to(total.dtype)}
    size = (total - moments.mean).abs() / sigma
    scale = (limit / size.clamp(min=limit) / sigma)[:, None]
    return {name: term * scale for name, term in centred.items()}


def step_reward(
    terms: dict[str, Tensor], logp: Tensor, ref_logp: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    """Reward of every slot: the sum of all terms - kl_coef (logp - ref_logp) (Eq. 9).

    terms name -> (B, K)    logp, ref_logp (B, K) float    mask (B, K) bool
    returns (B, K), 0 off the mask. Raises ValueError on unequal shapes.
    """
    shapes = {name: tuple(x.shape) for name, x in terms.items()}
    shapes |= {"logp": tuple(logp.shape), "ref_logp": tuple(ref_logp.shape)}
    if set(shapes.values()) != {tuple(mask.shape)}:
        raise ValueError(
            f"step_reward: {shapes}, mask {tuple(mask.shape)}: want one (B, K) for all"
        )
    paid = torch.stack(list(terms.values())).sum(0) - kl_coef * kl_k1(logp, ref_logp)
    return torch.where(mask, paid, 0.0)


def advantages(
    algo: str,
    reward: Tensor,
    value: Tensor,
    mask: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    samples: int = 1,
) -> tuple[Tensor, Tensor]:
    """The advantage of every slot, and the return that the critic learns.

    ppo        GAE with the critic's values, then whitened over the kept slots. The return is not
               whitened.
    reinforce  the page's whole reward minus the mean over the batch (Eq. 11 with a baseline)
    rloo, grpo, dr_grpo   the page's whole reward against those of the same user's other pages
               (kernels/advantage.py). The loss is a mean over slots; grpo weights it so that every
               page counts the same (1 / |o_i|), dr_grpo so that its divisor does not depend on the
               length of the pages. On full pages both weights are 1
    expert     1: the likelihood of the pages themselves

    reward, value (B, K) float, 0 off the mask    mask (B, K) bool
    samples   pages of one user, which are neighbours in the batch; the groups need 2 or more
    returns   advantage, ret: (B, K), 0 off the mask
    """
    if algo == "ppo":
        advantage, ret = gae(reward, value, mask, gamma, lam)
        return masked.whiten(advantage, mask), ret
    total = reward.sum(1)
    if algo == "expert":
        page = torch.ones_like(total)
    elif algo == "reinforce":
        page = total - total.mean()
    else:
        page = group_advantage(total, samples, algo)
    weight, kept = torch.ones_like(total), mask.sum()
    if algo == "grpo":  # every page counts the same, however many slots it has
        weight = kept / len(mask) / mask.sum(1).clamp(min=1).to(total.dtype)
    elif algo == "dr_grpo":  # every slot counts the same, and empty slots count too
        weight = weight * kept / mask.numel()
    return torch.where(mask, (page * weight)[:, None], 0.0), value


def gated(token: Tensor, ref_logits: Tensor, item: Tensor, depth: int) -> Tensor:
    """Token rewards (B, K), but at most 0 for items outside the reference's best `depth` items.

    The policy then gains nothing by items that the reference ranks low, whatever their reward
    is. Source: the relevance gate of GenRec, arXiv 2604.14878.

    ref_logits (B, N), the reference's of the first slot    item (B, K), -1 for none
    depth 0: as they are
    """
    if not depth:
        return token
    least = ref_logits.topk(min(depth, ref_logits.shape[1]), dim=1).values[:, -1:]
    near = ref_logits.gather(1, item.clamp(min=0)) >= least
    return torch.where(near, token, token.clamp(max=0.0))


def policy_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped objective, negated (arXiv 1707.06347, Eq. 7).

        mean over kept slots of max(-r A, -clip(r, 1 - clip, 1 + clip) A), r = exp(logp - old_logp)

    logp, old_logp, advantage (B, K) float; mask (B, K) bool
    returns the loss (scalar), and the share of kept slots whose clipped branch wins; both are 0
    on an empty mask
    """
    ratio = torch.exp(torch.where(mask, logp - old_logp, 0.0))
    advantage = torch.where(mask, advantage, 0.0)
    plain, clipped = -ratio * advantage, -ratio.clamp(1 - clip, 1 + clip) * advantage
    loss = masked.mean(torch.maximum(plain, clipped), mask)
    return loss, masked.mean((clipped > plain).to(loss.dtype), mask)


def value_loss(
    value: Tensor, old_value: Tensor, ret: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Half the mean over kept slots of max((V - R)^2, (V_clipped - R)^2).

    V_clipped is V limited to old_value - clip .. old_value + clip.

    value, old_value, ret (B, K) float; mask (B, K) bool
    returns the loss (scalar), and the share of kept slots whose clipped branch wins; both are 0
    on an empty mask
    """
    value, old_value, ret = (torch.where(mask, x, 0.0) for x in (value, old_value, ret))
    # Not old + clamp(V - old, -c, c): that rounds V even where nothing is clipped.
    limited = torch.maximum(torch.minimum(value, old_value + clip), old_value - clip)
    plain, clipped = (value - ret).square(), (limited - ret).square()
    loss = 0.5 * masked.mean(torch.maximum(plain, clipped), mask)
    return loss, masked.mean((clipped > plain).to(loss.dtype), mask)


def add_sft_loss(
    policy: Backbone,
    r: Rollout,
    rows: Tensor,
    loss: Tensor,
    row: dict[str, Tensor],
    coef: float,
    objective: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add coef times SFT's loss, in nats per slot of the rollout, if it has SFT's pages.

    rows       which pages of the rollout the loss is over
    row        what is logged of them; gets policy/sft_loss
    objective  what SFT's loss learns of a page: see `sft_loss`
    """
    if r.sft is not None:
        b, slots = r.sft.select(rows), r.mask[rows].sum().clamp(min=1)
        taught = sft_loss(policy, b, objective) * b.mask.sum() / slots
        loss, row["policy/sft_loss"] = loss + coef * taught, taught.detach()
    return loss, row


class RunningMoments:
    """Count, mean and unbiased standard deviation of a stream, whatever its order or its pieces.

    Source: Welford 1962; Chan, Golub and LeVeque 1983 for merging pieces.
    """

    def __init__(self):
        self.count, self.mean, self.m2 = 0, 0.0, 0.0

    def update(self, x: Tensor) -> None:
        """Take in every entry of x. Raises ValueError on NaN or infinity."""
        x = torch.as_tensor(x).detach().double().flatten()
        if not x.isfinite().all():
            bad = int((~x.isfinite()).sum())
            raise ValueError(f"RunningMoments: {bad} of {x.numel()} values are not finite")
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
        """0 until there are two values."""
        return math.sqrt(self.m2 / (self.count - 1)) if self.count > 1 else 0.0

    def state_dict(self) -> dict:
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: dict) -> None:
        self.count, self.mean, self.m2 = state["count"], state["mean"], state["m2"]


class AdaptiveKL:
    """A KL coefficient that steers the KL of a page towards a target (Ziegler et al. 2019, 2.2).

    target   nats a page
    horizon  pages over which a steady error of 20% moves the coefficient by a factor e^0.2
    """

    def __init__(self, coef: float, target: float, horizon: float):
        if target <= 0 or horizon <= 0:
            raise ValueError(f"AdaptiveKL: target={target}, horizon={horizon}: want both above 0")
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, n_pages: int) -> float:
        """coef *= 1 + clip(kl / target - 1, -0.2, 0.2) n_pages / horizon.

        kl   mean over pages of the sum over slots, in nats
        """
        error = min(0.2, max(-0.2, float(kl) / self.target - 1.0))
        self.coef *= 1.0 + error * n_pages / self.horizon
        return self.coef
