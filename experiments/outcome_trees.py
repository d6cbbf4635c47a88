"""Is the outcome network level with gradient-boosted trees (LightGBM)? Extra: [ranker].

    python -m experiments.outcome_trees --dataset synthetic

Both learn from the same rows: candidates of fold users, what the plain judges say of them, and
which were hidden and liked (pagellm/model/outcome.py). Both are asked about the same candidates
of validation users, by judges fitted to all train rows. Prints, for each: the correlation with
the picks within users, the log loss after a calibration on the other half of the users, and
observed over predicted picks in ten bins. Writes <runs>/outcome-trees/<dataset>.json.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pagellm import compose
from pagellm.baselines.boosted import grow
from pagellm.data.shop import load
from pagellm.model.composer import POOL, picks
from pagellm.model.judges import History, Judges, legal_items, tuned
from pagellm.model.outcome import Calibration, Outcome, fit_network, fold_rows
from pagellm.pages import stats
from pagellm.stage.command import main
from pagellm.stage.config import check, check_numbers
from pagellm.stage.files import write_json

__all__ = ["Config", "compare", "run"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The outcome network beside gradient-boosted trees."""

    dataset: str = "synthetic"  # name of the data set
    folds: int = 2  # folds of train rows that are hidden
    share: float = 0.2  # share of each user's train rows that a fold hides
    fold_users: int = 6000  # users of a fold that both learn from; 0: all
    users: int = 2000  # validation users whose candidates are scored; 0: all
    networks: int = 2  # outcome networks with different random starts
    trees: int = 250  # trees of LightGBM
    seed: int = 0  # seed of folds, networks and trees
    data: str = "data"  # directory of prepared data sets
    runs: str = "runs"  # directory of runs

    def __post_init__(self):
        check_numbers(self)
        check(
            self,
            folds=(self.folds > 0, "1 or more"),
            share=(0 < self.share * self.folds <= 1, "above 0, and folds * share at most 1"),
            networks=(self.networks > 0, "1 or more"),
            trees=(self.trees > 0, "1 or more"),
        )


def compare(
    chance: dict[str, np.ndarray], picked: np.ndarray, there: np.ndarray, seed: int = 0
) -> dict[str, dict]:
    """Name -> correlation, log loss and bins; rows but the first have their difference to it.

    chance  name -> (U, M) chances before calibration    picked, there (U, M) bool
    """
    half, found, within = np.arange(len(picked)) % 2, {}, {}
    for name, raw in chance.items():
        p = np.zeros(raw.shape)
        for side in (0, 1):
            fit = there & (half != side)[:, None]
            scale = Calibration.fit(raw[fit], np.zeros((int(fit.sum()), 0)), picked[fit])
            p[half == side] = scale(raw[half == side], np.zeros((*raw[half == side].shape, 0)))
        within[name] = stats.within_users(p, picked, there)
        loss = -np.log(np.where(picked, p, 1 - p).clip(1e-12))
        found[name] = {
            "correlation": stats.summary(within[name], seed),
            "log loss": float(loss[there].mean()),
            "reliability": stats.reliability(p, picked, there),
        }
    first = next(iter(chance))
    for name in chance:
        if name != first:
            found[name]["difference"] = stats.paired(within[name], within[first], seed)
    return found


def run(config: Config) -> dict[str, dict]:
    """Fit both, ask both, print and write."""
    shop = load(Path(config.data) / config.dataset)
    plain = compose.plain_settings(compose.Config(dataset=config.dataset))
    settings = tuned(plain, shop)
    x, y, _ = fold_rows(
        shop, settings, config.folds, config.share, POOL, config.seed, config.fold_users
    )
    began = time.process_time()
    network = Outcome([fit_network(x, y, config.seed + i) for i in range(config.networks)])
    middle = time.process_time()
    trees = grow(x, y, config.trees, config.seed, {"objective": "binary"})
    seconds = {"network": middle - began, "trees": time.process_time() - middle}
    held, train = shop.csr("valid"), shop.csr("train")
    users = np.flatnonzero((held.counts() > 0) & (train.counts() > 0))
    if 0 < config.users < len(users):
        users = np.sort(np.random.default_rng(config.seed).permutation(users)[: config.users])
    history = History.of(shop, shop.rows("train", None))
    judges = Judges.fit(shop.catalogue, history, settings, config.seed)
    parts = []
    for at in range(0, len(users), 256):
        some = users[at : at + 256]
        legal = legal_items(history.rows, some, shop.n_items)
        item, features = judges.candidates(judges.known.select(some), legal, POOL)
        flat = trees.predict(features.reshape(-1, features.shape[2]), num_threads=1)
        parts.append((item, network(features), flat.reshape(item.shape)))
    item, ours, theirs = (np.concatenate(column) for column in zip(*parts, strict=True))
    picked = picks(users, item, held, shop.n_items)
    found = compare({"network": ours, "trees": theirs}, picked, item >= 0, config.seed)
    for name, row in found.items():
        row["processor seconds"] = round(seconds[name], 1)
        c = row["correlation"]
        print(
            f"{name}: correlation {c['mean']:.4f} [{c['low']:.4f}, {c['high']:.4f}], log loss "
            f"{row['log loss']:.5f}, {row['processor seconds']} s, bins {row['reliability']}"
        )
    d = found["trees"]["difference"]
    print(f"trees - network: {d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]")
    folder = Path(config.runs) / "outcome-trees"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{config.dataset}.json", found)
    return found


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.outcome_trees"))
