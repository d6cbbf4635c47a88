"""Does a reward of whole pages pay, where a page is more than the sum of its slots? Simulated.

    python -m experiments.whole_page --dataset synthetic --seeds 3

For every seed an exploring policy's pages are logged (pagellm/online/simulate.py), and two models
of a purchase are fitted to that log alone: one that reads the slots above (the page reward), and
one that reads item and place (pointwise). Five policies write pages for the same users:

    ALS+facts             the best by its scores
    ALS+facts, MMR        re-ranked by MMR; the strength that earns most on half of the users, in
                          closed form, which no real shop could know
    pointwise, greedy     slot by slot the best by the pointwise model
    page reward, greedy   slot by slot the best by the page reward
    page reward, RLOO     a policy that RLOO teaches by the page reward's totals

They are scored on the other half of the users: purchases a session in closed form
(shopper.expected), differences paired over users and seeds, and the off-policy estimators (ope.py)
on a softened version of the greedy page policy, beside its true value.

Writes <runs>/whole-page/<dataset>.json and prints the tables.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pagellm.data.shop import Shop, load
from pagellm.online import ope
from pagellm.online.page_reward import PageReward, fit_reward, places, standard, teach
from pagellm.online.shopper import Habits, Shoppers, expected, shoppers_of
from pagellm.online.simulate import PageLog, candidates, log_pages
from pagellm.pages import stats
from pagellm.pages.rerank import Kin, mmr
from pagellm.stage import randomness
from pagellm.stage.command import main
from pagellm.stage.config import check, check_numbers
from pagellm.stage.files import write_json

__all__ = ["Config", "policies", "run", "softened"]

STRENGTHS = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.5, 4.0)  # of MMR, in deviations of a score
BASES = ("ALS+facts, MMR", "pointwise, greedy")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Purchases a session of pages that look above, beside pages that do not."""

    dataset: str = "synthetic"  # name of the data set, which must know the truth
    seeds: int = 3  # number of seeds: 0, 1, ...
    pages: int = 20000  # logged sessions for each seed
    k: int = 10  # slots of a page
    pool: int = 40  # candidates of each user
    temperature: float = 0.5  # temperature of the exploring policy, in standard deviations of a
    # user's scores
    steps: int = 100  # steps of RLOO
    data: str = "data"  # directory of prepared data sets
    runs: str = "runs"  # directory of runs

    def __post_init__(self):
        check_numbers(self)
        check(
            self,
            seeds=(self.seeds > 0, "1 or more"),
            pages=(self.pages > 0, "1 or more"),
            pool=(self.pool >= self.k, f"k={self.k} or more"),
            temperature=(self.temperature > 0, "above 0"),
            steps=(self.steps > 0, "1 or more"),
        )


def earned(world: Shoppers, users: np.ndarray, page: np.ndarray) -> np.ndarray:
    """(U,) expected purchases of a session."""
    return expected(world, users, page)["purchases"]


def policies(
    config: Config, shop: Shop, world: Shoppers, log: PageLog, users, item, score, seed: int
) -> tuple[dict[str, np.ndarray], PageReward, float]:
    """Name -> pages (U, K) of items; the page reward; the strength of MMR.

    users (U,), item (U, M), score (U, M) of the candidates
    """
    k, kin, z = config.k, Kin.of(shop.catalogue), standard(score)
    half = np.arange(len(users)) % 2 == 0

    def ranked(strength: float) -> np.ndarray:
        return np.take_along_axis(item, mmr(item, z, kin, k, strength), 1)

    gains = [earned(world, users[half], ranked(s)[half]).mean() for s in STRENGTHS]
    best = STRENGTHS[int(np.argmax(gains))]
    columns = world.how.columns
    whole = fit_reward(shop.catalogue, log, columns, seed=seed)
    alone = fit_reward(shop.catalogue, log, columns, above=False, seed=seed)
    policy = teach(whole, z, item, k, config.steps, seed=seed)
    pages = {
        "ALS+facts": ranked(0.0),
        "ALS+facts, MMR": ranked(best),
        "pointwise, greedy": np.take_along_axis(item, alone.maximise(z, item, k), 1),
        "page reward, greedy": np.take_along_axis(item, whole.maximise(z, item, k), 1),
        "page reward, RLOO": np.take_along_axis(item, policy.write(z, item, k)[0], 1),
    }
    return pages, whole, best


def softened(reward: PageReward, log: PageLog, weight: float) -> np.ndarray:
    """(S, K): probability of each logged slot under a policy between the log's and the reward's.

    Its logits are the logging policy's plus `weight` times the standardised log-chance that the
    page reward gives, given the slots above.
    """
    z, place = standard(log.score), places(log.candidates, log.page)
    every = np.broadcast_to(np.arange(z.shape[1]), z.shape)
    target = np.zeros(place.shape)
    for k in range(place.shape[1]):
        logits = soft_logits(reward, z, log.candidates, log.score, place, k, every, weight)
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        target[:, k] = np.take_along_axis(p, place[:, k : k + 1], 1)[:, 0]
    return target


def soft_logits(reward, z, item, score, place, k, every, weight) -> np.ndarray:
    """(B, M) logits of slot k, -inf for what stands above."""
    chance = np.log(np.maximum(reward.chance(reward.reader(z, item, place, k, every)), 1e-12))
    logits = score + weight * standard(chance)
    np.put_along_axis(logits, place[:, :k], -np.inf, 1)
    return logits


def soft_pages(reward: PageReward, z, item, score, k: int, weight: float, rng) -> np.ndarray:
    """Pages (B, K) of items drawn from the softened policy."""
    place = np.zeros((len(z), k), np.int64)
    every = np.broadcast_to(np.arange(z.shape[1]), z.shape)
    for slot in range(k):
        logits = soft_logits(reward, z, item, score, place, slot, every, weight)
        place[:, slot] = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    return np.take_along_axis(item, place, 1)


def estimate(reward: PageReward, world: Shoppers, log: PageLog, seed: int, weight: float) -> dict:
    """What the estimators say of the softened policy's purchases, and the truth of 20,000 pages."""
    target = softened(reward, log, weight)
    own = ope.Log(log.user, log.page, log.bought.astype(float), log.propensity, target)
    found = ope.estimates(own)
    rng = randomness.rng(seed, "whole page", "soft")
    rows = rng.integers(len(log), size=min(20_000, 4 * len(log)))
    z, k = standard(log.score)[rows], log.page.shape[1]
    page = soft_pages(reward, z, log.candidates[rows], log.score[rows], k, weight, rng)
    truth = float(earned(world, log.user[rows], page).mean())
    return {
        "truth": truth,
        "logged": float(log.bought.sum(1).mean()),
        "estimates": {
            name: {"value": v.value, "se": v.se, "ess": v.ess, "refused": v.refused}
            for name, v in found.items()
        },
    }


def run(config: Config, habits: Habits = Habits()) -> dict:  # noqa: B008 (frozen)
    """Print and write both tables; returns what is written."""
    shop = load(Path(config.data) / config.dataset)
    scores: dict[str, list[np.ndarray]] = {}
    more = []
    for seed in range(config.seeds):
        world = shoppers_of(shop, habits, seed)
        users, item, score = candidates(shop, config.pool, seed)
        rng = randomness.rng(seed, "whole page", "log")
        log = log_pages(world, users, item, score / config.temperature, config.pages, config.k, rng)
        pages, reward, strength = policies(
            config, shop, world, log, users, item, score / config.temperature, seed
        )
        other = np.arange(len(users)) % 2 == 1
        for name, page in pages.items():
            scores.setdefault(name, []).append(earned(world, users[other], page[other]))
        more.append({"MMR": strength} | estimate(reward, world, log, seed, 0.3))
    rows = {}
    for name, mine in scores.items():
        row: dict = {"purchases": float(np.mean([x.mean() for x in mine]))}
        for base in BASES:
            row[f"minus {base}"] = stats.interval(mine, scores[base])
        rows[name] = row
    result = {"rows": rows, "off-policy": more}
    folder = Path(config.runs) / "whole-page"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{config.dataset}.json", result)
    print("SIMULATED purchases a session, closed form: assumptions, not people\n")
    print("| | purchases |" + "".join(f" minus {b} |" for b in BASES) + "\n|" + "---|" * 4)
    for name, row in rows.items():
        cells = [
            "{:+.4f} [{:+.4f}, {:+.4f}]".format(*row[f"minus {b}"]) if name != b else ""
            for b in BASES
        ]
        print(f"| {name} | {row['purchases']:.4f} | " + " | ".join(cells) + " |")
    for seed, one in enumerate(more):
        found = ", ".join(
            f"{name} " + ("refused" if v["refused"] else f"{v['value']:.4f} ± {1.96 * v['se']:.4f}")
            for name, v in one["estimates"].items()
        )
        print(
            f"seed {seed}: softened policy, truth {one['truth']:.4f}, log {one['logged']:.4f}: "
            + found
        )
    return json.loads((folder / f"{config.dataset}.json").read_text())


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.whole_page"))
