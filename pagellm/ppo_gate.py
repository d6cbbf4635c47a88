"""The gate before PPO: does the reward predict hits better than the policy itself does?

Pages of validation users are drawn as PPO draws them, from SFT's first slot. Each page gets three
numbers: its reward in PPO, its score by SFT's own logits, and its hits on held-out items. For each
user, reward and logits are correlated with the hits over the user's pages. If the reward's
correlation is not above that of the logits, PPO can only lead the policy away from the hits.

Neither the reward nor the policy has learnt from these held-out rows. The three numbers of an
outcome model's calibration are fitted on the other half of the users.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pagellm.data.shop import Rows, Shop
from pagellm.model.composer import picks
from pagellm.model.draws import draw, first_logits
from pagellm.model.outcome import Calibration
from pagellm.model.policy import Policy
from pagellm.pages import stats
from pagellm.pages.compose import Opinion
from pagellm.stage import dist, randomness

__all__ = ["CLOSED", "crossed_calibration", "knowledge", "said", "validation_users"]

CLOSED = "this reward knows nothing that the policy does not"
BATCH = 32  # users whose pages are drawn and judged at once; fewer where the catalogue is large,
ENTRIES = 2**25  # so that the random numbers of their pages are at most so many (float64: 256 MB)

# Rewards of pages: users (B,), prompt (B, P), valid (B, P), item (B, K), mask (B, K) -> (B,)
Pay = Callable[[np.ndarray, Tensor, Tensor, Tensor, Tensor], Tensor]


def validation_users(shop: Shop, limit: int, seed: int) -> np.ndarray:
    """Users with train and validation items, rising; at most `limit`, drawn at random; 0: all."""
    users = np.flatnonzero((shop.csr("train").counts() > 0) & (shop.csr("valid").counts() > 0))
    if 0 < limit < len(users):
        users = np.sort(randomness.rng(seed, "ppo", "gate").permutation(users)[:limit])
    return users


def hits(user: np.ndarray, item: np.ndarray, held: Rows, n_items: int) -> np.ndarray:
    """(B,) discounted hits of pages (B, K): the sum of 1 / log2(k + 1) over slots k that hit."""
    return (picks(user, item, held, n_items) / np.log2(np.arange(2, item.shape[1] + 2))).sum(1)


@torch.no_grad()
def knowledge(
    shop: Shop,
    policy: Policy,
    pay: Pay,
    users: np.ndarray,
    k: int,
    pages: int,
    temperature: float,
    seed: int,
) -> dict[str, Any]:
    """Correlation within users of reward, and of SFT's logits, with validation hits.

    pay      the reward that PPO would give to some pages
    pages    drawn for each user, at `temperature`
    returns  reward, sft, difference: mean over users, 95% interval (stats.summary). A user counts
             if some pages hit more than others. open: whether the whole interval of the
             difference lies above 0
    """
    history, seen, held = shop.csr("train"), shop.csr("train", positive=None), shop.csr("valid")
    device, N = policy.model.word.device, shop.n_items
    discount = 1.0 / np.log2(np.arange(2, k + 2))
    mine, busy = dist.shard(users)
    found = [np.zeros((0, 3, pages))]
    size = max(1, min(BATCH, ENTRIES // (pages * N)))
    for some in np.split(mine, range(size, len(mine), size)):
        prompt, valid = policy.prompt(some, [history.of(u) for u in some])
        excluded = dist.send(torch.from_numpy(seen.padded(some)), device)
        logits = first_logits(policy.model, prompt, valid, excluded)
        uniform = np.stack([randomness.rng(seed, "gate", int(u)).random((pages, N)) for u in some])
        many = np.arange(len(some)).repeat(pages)
        at = torch.from_numpy(many).to(device)
        numbers = dist.send(torch.from_numpy(uniform.reshape(-1, N)), device)
        drawn = draw(logits[at] / temperature, numbers, k)
        item, mask = drawn.item, drawn.mask
        paid = pay(some[many], prompt[at], valid[at], item, mask)
        z = logits[at].gather(1, item.clamp(min=0)).masked_fill(~mask, 0.0).cpu().numpy()
        columns = (
            paid.double().cpu().numpy(),
            (z * discount[: z.shape[1]]).sum(1),
            hits(some[many], item.cpu().numpy(), held, N),
        )
        found.append(np.stack([c.reshape(-1, pages) for c in columns], 1))
    reward, sft, truth = np.moveaxis(
        dist.gather(np.concatenate(found)[: None if busy else 0]), 1, 0
    )
    there, differ = np.ones(truth.shape, bool), np.ptp(truth, 1) > 0
    # A reward that is equal for all pages of a user has no correlation; it counts as 0.
    a, b = (
        np.where(np.ptp(score, 1) > 0, stats.within_users(score, truth, there), 0.0)
        for score in (reward, sft)
    )
    a, b = (np.where(differ, x, np.nan) for x in (a, b))
    result = {
        "reward": stats.summary(a, seed),
        "sft": stats.summary(b, seed),
        "difference": stats.paired(a, b, seed),
    }
    low = result["difference"]["low"]
    return {"pages": pages, **result, "open": low is not None and low > 0}


def said(gate: dict[str, Any]) -> str:
    """The correlations with their intervals, in one line."""

    def shown(name: str) -> str:
        row = gate[name]
        if row["mean"] is None:
            return "undefined"
        return f"{row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"

    return (
        f"correlation with validation hits within {gate['difference']['count']} users, "
        f"{gate['pages']} drawn pages each: reward {shown('reward')}, SFT's logits {shown('sft')}, "
        f"difference {shown('difference')}"
    )


def crossed_calibration(
    o: Opinion, raw: np.ndarray, other: np.ndarray, held: Rows, n_items: int
) -> tuple[Opinion, list[float]]:
    """The opinion with every user's chances calibrated on the other half of the users.

    raw, other  (U, M) as in Composer.opinion
    returns     the opinion; and the ratio of observed to predicted picks in ten bins of equally
                many candidates, by rising chance
    """
    there, picked = o.item >= 0, picks(o.user, o.item, held, n_items)
    chance, half = np.zeros(raw.shape), np.arange(len(o.user)) % 2
    for side in (0, 1):
        fit = there & (half != side)[:, None]
        scale = Calibration.fit(raw[fit], other[fit], picked[fit])
        rows = half == side
        chance[rows] = np.where(there[rows], scale(raw[rows], other[rows]), 0.0)
    crossed = Opinion(o.user, o.item, chance, o.stars, o.mean)
    return crossed, stats.reliability(chance, picked, there)
