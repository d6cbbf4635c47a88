"""The gate before PPO: does the reward predict hits better than the SFT policy itself does?

A hit is an item of a page that its user picked in the validation rows. The SFT policy draws several
pages for each validation user. Each page gets three numbers: the reward that PPO would pay, its
score by SFT's own logits, and its hits. Over the pages of each user, the reward and the score are
both correlated with the hits. The gate is open if the reward's correlation is the higher one, that
is if the 95% interval of the difference, over users, lies above 0. Behind a closed gate PPO would
only lead the policy away from the hits.

Neither the reward nor the policy was trained on validation rows. An outcome model's calibration
(three numbers) was; for the gate it is fitted anew, for each half of the users on the other half.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pagellm.data.shop import Rows, Shop
from pagellm.model.composer import Composer, picks
from pagellm.model.draws import draw, first_logits
from pagellm.model.outcome import Calibration
from pagellm.model.outcome_reward import OutcomeReward
from pagellm.model.policy import Policy
from pagellm.pages import stats
from pagellm.pages.compose import Opinion
from pagellm.ppo_config import Config
from pagellm.ppo_setup import Networks
from pagellm.ppo_step import page_pay
from pagellm.stage import dist, hints, randomness
from pagellm.stage.config import PageLLMError
from pagellm.stage.files import read_json, write_json
from pagellm.stage.run import Run

__all__ = [
    "CLOSED",
    "ask_gate",
    "crossed_calibration",
    "hit_correlations",
    "refuse_to_force",
    "in_words",
    "validation_users",
]

CLOSED = "the reward does not predict validation hits better than SFT's own logits do"
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


def ask_gate(
    config: Config, shop: Shop, nets: Networks, composer: Composer | None, out: Run
) -> dict:
    """Whether PPO may start: `hit_correlations` of this run, kept in gate.json.

    Returns the contents of gate.json; "open" says whether the gate is open. Where there is nothing
    to measure the gate is open, and "skipped" says why.
    """
    path = out.path / "gate.json"
    if path.exists():
        return read_json(path)
    if (out.path / "LAST").exists():
        return {"open": True, "skipped": "the run was begun by a version without a gate"}
    users, gate = validation_users(shop, config.gate_users, config.seed), {}
    own = bool(config.reward_fn and config.w_fn)
    if own or config.w_token == config.w_page == 0 or len(users) == 0:
        why = (
            "no user has validation items"
            if len(users) == 0
            else "only w_hit pays, and it pays for known hits"
        )
        why = f"your own reward {config.reward_fn} pays: judge it yourself" if own else why
        gate = {"open": True, "skipped": why}
    else:
        judges = nets
        if composer is not None:
            seen = shop.csr("train", positive=None)
            opinion = composer.opinion(users, seen)
            crossed, bins = crossed_calibration(*opinion, shop.csr("valid"), shop.n_items)
            taste = composer.taste
            outcome = OutcomeReward.from_opinion(
                crossed, composer.kin, taste.worth, taste.spread, config.k
            )
            judges, gate = replace(nets, outcome=outcome), {"reliability": bins}

        def pay(user, prompt, valid, item, mask):
            group = np.unique(user, return_inverse=True)[1]
            token, page = judges.judge(user, group, prompt, valid, item, mask)
            return page_pay(token, page, mask, config.w_token, config.w_page)

        policy = Policy(nets.ref, nets.policy.vocab, nets.policy.style)
        gate |= hit_correlations(
            shop, policy, pay, users, config.k, config.gate_pages, config.temperature, config.seed
        )
    if dist.is_main():
        write_json(path, gate)
        print("ppo: " + (f"no gate: {gate['skipped']}" if "skipped" in gate else in_words(gate)))
        if not gate["open"] and config.force:
            print(f"ppo: {CLOSED}; trains all the same, because of --force")
    return gate


@torch.no_grad()
def hit_correlations(
    shop: Shop,
    policy: Policy,
    pay: Pay,
    users: np.ndarray,
    k: int,
    pages: int,
    temperature: float,
    seed: int,
) -> dict[str, Any]:
    """How well the reward, and SFT's logits, predict validation hits among pages of one user.

    pay      the reward that PPO would pay for some pages
    pages    how many pages of k slots are drawn for each user, at `temperature`
    returns  reward, sft: their correlation with the hits over a user's pages, as a mean over users
             with its 95% interval (stats.summary); difference: the first minus the second. A user
             counts if some of the pages hit more than others. open: whether the whole interval of
             the difference lies above 0
    """
    history, seen, held = shop.csr("train"), shop.csr("train", positive=None), shop.csr("valid")
    device, N = policy.model.word.device, shop.n_items
    discount = 1.0 / np.log2(np.arange(2, k + 2))
    mine, busy = dist.shard(users)
    found = [np.zeros((0, 3, pages))]
    size = max(1, min(BATCH, ENTRIES // (pages * N)))
    for some, real in dist.pieces(mine, size, policy.model.parts is not None):
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
        if real:
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


def in_words(gate: dict[str, Any]) -> str:
    """The correlations with their intervals, as a sentence."""

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
    o: Opinion, raw: np.ndarray, others: np.ndarray, held: Rows, n_items: int
) -> tuple[Opinion, list[float]]:
    """The opinion with every user's chances calibrated on the other half of the users.

    raw, others  as in Composer.opinion
    returns      the opinion; and the ratio of observed to predicted picks in ten bins of equally
                 many candidates, by rising chance
    """
    there, picked = o.item >= 0, picks(o.user, o.item, held, n_items)
    chance, half = np.zeros(raw.shape), np.arange(len(o.user)) % 2
    for side in (0, 1):
        fit = there & (half != side)[:, None]
        scale = Calibration.fit(raw[fit], others[fit], picked[fit])
        rows = half == side
        chance[rows] = np.where(there[rows], scale(raw[rows], others[rows]), 0.0)
    crossed = Opinion(o.user, o.item, chance, o.stars, o.mean)
    return crossed, stats.reliability(chance, picked, there)


def refuse_to_force(config: Config, out: Run) -> None:
    """Raise PageLLMError where --force is given to a run that has ended at the gate."""
    done = read_json(out.path / "done")
    if config.force and not done["steps"] and not done.get("gate", {}).get("open", True):
        raise PageLLMError(
            f"{out.path} ended at the gate: {CLOSED}\n"
            f"  To train all the same: {hints.another_run()}, or remove {out.path}"
        )
