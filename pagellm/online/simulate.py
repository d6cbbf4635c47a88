"""Log pages that an exploring policy shows to simulated shoppers, with exact propensities.

Reads   data/<dataset> with truth.npy
Writes  runs/<run>/simulate      log.parquet, one line a session

    pagellm simulate --dataset synthetic --pages 20000

    user, page           who saw which items (dense ids), first slot first
    propensity           list of K: P(item | items above) under the logging policy
    candidates           list of M items that the page was drawn from
    logging_score        list of M: the policy's scores of them, divided by its temperature
    clicked, bought      list of K: 1 where the slot was clicked, and bought
    price                list of K

The policy is Plackett-Luce over each user's best candidates by ALS with titles: the better ones
come first more often, and every order is possible. Shoppers are those of shopper.py; the options
here set their habits. `pagellm ope` reads such a log once a column target_propensity stands
beside it. Seconds for 20,000 pages.
"""

import sys
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pagellm.data.shop import Shop, load
from pagellm.model.als import item_groups
from pagellm.model.plain import Chosen, fit
from pagellm.online.ope import draw_pages, pl_propensity
from pagellm.online.shopper import Habits, Shoppers, shoppers_of, visit
from pagellm.pages.topk import largest
from pagellm.stage import randomness
from pagellm.stage.command import main
from pagellm.stage.config import check
from pagellm.stage.files import atomic
from pagellm.stage.run import Run, StageConfig, file_id

__all__ = ["Config", "PageLog", "candidates", "log_pages", "read_pages_log", "run"]

ALS = {"factors": 64, "alpha0": 0.1, "reg": 0.03, "nu": 1.0}


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Log the pages of an exploring policy."""

    pages: int = 20000  # number of sessions; each sees one page
    k: int = 10  # slots of a page
    pool: int = 40  # candidates of each user, from which a page is drawn
    temperature: float = 0.5  # temperature of the exploring policy, in standard deviations of a
    # user's scores; a higher one explores more
    columns: int = 5  # slots in a row of the grid
    glance: float = 0.9  # column c of a row is looked at with probability glance ** c
    next_row: float = 0.8  # probability of going on to the next row
    bored: float = 0.4  # further probability of leaving after a row without a click
    satiation: float = 0.8  # mean loss, in logits, for each item of the same leaf category above;
    # 0: none
    satiation_spread: float = 0.5  # relative spread of that loss over users
    substitutes: bool = True  # a purchase ends the need for its leaf category in the session
    buy_price: float = 2.62  # loss of a purchase, in logits, for each factor e of price

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            pages=(self.pages > 0, "1 or more"),
            k=(self.k > 0, "1 or more"),
            pool=(self.pool >= self.k, f"k={self.k} or more"),
            temperature=(self.temperature > 0, "above 0"),
            columns=(self.columns > 0, "1 or more"),
            glance=(0 < self.glance <= 1, "above 0, at most 1"),
            next_row=(0 <= self.next_row <= 1, "0 to 1"),
            bored=(0 <= self.bored <= 1, "0 to 1"),
            satiation=(self.satiation >= 0, "0 or more"),
            satiation_spread=(self.satiation_spread >= 0, "0 or more"),
        )

    @property
    def habits(self) -> Habits:
        """The options that say how shoppers behave."""
        names = {f.name for f in fields(Habits)} & {f.name for f in fields(self)}
        return Habits(**{name: getattr(self, name) for name in names})


@dataclass
class PageLog:
    """S logged sessions: user (S,); page, propensity, clicked, bought (S, K); candidates, score
    (S, M).
    """

    user: np.ndarray
    page: np.ndarray
    propensity: np.ndarray
    clicked: np.ndarray
    bought: np.ndarray
    candidates: np.ndarray
    score: np.ndarray

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> "PageLog":
        """Some sessions."""
        return PageLog(**{name: column[rows] for name, column in vars(self).items()})


def candidates(shop: Shop, pool: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every user's best items by ALS+facts without train rows.

    returns  users (U,); item (U, M); score (U, M) float64, in standard deviations of a user's
    """
    train, users = shop.csr("train"), np.flatnonzero(shop.csr("train").counts() > 0)
    groups = item_groups(shop.catalogue)
    chosen = Chosen.of(shop)
    model = fit("ALS+facts", train, shop.n_users, shop.n_items, ALS, seed, None, groups, chosen)
    score = np.asarray(model.score(users), dtype=np.float32).copy()
    row, gone = shop.csr("train", positive=None).flat(users)
    score[row, gone] = -np.inf
    item, best = largest(score, min(pool, shop.n_items))
    best = best.astype(np.float64)
    spread = np.maximum(best.std(1, keepdims=True), 1e-9)
    return users, item, (best - best.mean(1, keepdims=True)) / spread


def log_pages(
    world: Shoppers,
    users: np.ndarray,
    item: np.ndarray,
    score: np.ndarray,
    pages: int,
    k: int,
    rng: np.random.Generator,
    block: int = 4096,
) -> PageLog:
    """Show `pages` pages of k to users drawn at random, and see what they do.

    users (U,), item (U, M) candidates, score (U, M) of the Plackett-Luce policy that explores
    """
    parts = []
    for start in range(0, pages, block):
        row = rng.integers(len(users), size=min(block, pages - start))
        place = draw_pages(score[row], k, rng)
        page = np.take_along_axis(item[row], place, 1)
        seen = visit(world, users[row], page, rng)
        parts.append(
            PageLog(
                users[row],
                page,
                pl_propensity(score[row], place),
                seen.clicked,
                seen.bought,
                item[row],
                score[row],
            )
        )
    names = vars(parts[0])
    return PageLog(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in names})


def read_pages_log(path: Any) -> PageLog:
    """A log that `run` wrote."""
    table = pq.read_table(path)

    def grid(name: str) -> np.ndarray:
        return np.array(table[name].to_pylist())

    return PageLog(
        table["user"].to_numpy(),
        grid("page"),
        grid("propensity"),
        grid("clicked").astype(bool),
        grid("bought").astype(bool),
        grid("candidates"),
        grid("logging_score"),
    )


def run(config: Config) -> PageLog:
    """Write log.parquet."""
    shop = load(config.data_dir)
    world = shoppers_of(shop, config.habits, config.seed)
    inputs = {"data": file_id(config.data_dir / "source.json")}
    with Run(config.stage("simulate"), config, inputs) as out:
        path = out.path / "log.parquet"
        if out.already_done():
            return read_pages_log(path)
        users, item, score = candidates(shop, config.pool, config.seed)
        rng = randomness.rng(config.seed, "simulate", "sessions")
        log = log_pages(world, users, item, score / config.temperature, config.pages, config.k, rng)
        columns = {
            "user": log.user,
            "page": list(log.page),
            "propensity": list(log.propensity),
            "candidates": list(log.candidates),
            "logging_score": list(log.score),
            "clicked": list(log.clicked.astype(np.int8)),
            "bought": list(log.bought.astype(np.int8)),
            "price": list(world.price[log.page]),
        }
        with atomic(path) as beside:
            pq.write_table(pa.table(columns), beside)
        clicked, bought = (float(x.sum(1).mean()) for x in (log.clicked, log.bought))
        out.finish(simulated=True, pages=len(log), clicked=clicked, bought=bought)
        print(
            f"simulate: {path}, {len(log):,} SIMULATED sessions, {clicked:.3f} clicks and "
            f"{bought:.3f} purchases each: assumptions, not people (online/shopper.py)"
        )
    return log


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm simulate"))
