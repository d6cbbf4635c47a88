"""What a good team would ship: LightGBM's lambdarank over all plain models. Extra: [ranker].

    ranker = Boosted.fit(shop, {"ALS+facts": {...}, "EASE": {...}}, seed=0)
    pages = ranker.rank(users, seen, k=20, depth=100)

The strongest row that needs no language model. Folds hide train rows, the plain models (the judges
of pagellm/model/judges.py) are fitted to the others, and the trees learn to put the hidden rows
first, from the scores and ranks of all models, popularity, price, dates, categories and brands. So
the trees learn from the very numbers that composed pages learn from. No held-out row is read, but
for the number of trees, which validation chooses.
"""

import importlib.util

import numpy as np

from pagellm.data.shop import Rows, Shop
from pagellm.model.judges import History, Judges, legal_items, tuned
from pagellm.model.outcome import fold_rows
from pagellm.pages.ranked import RankedPages, Scorer, seen_rows
from pagellm.stage import hints
from pagellm.stage.config import PageLLMError

__all__ = ["Boosted", "POOL", "TREES", "installed"]

POOL = 150  # candidates of a user
TREES = (25, 50, 100, 200, 400)  # numbers that validation may choose
FOLDS, SHARE, FOLD_USERS = 2, 0.2, 4000  # of fold_rows
BLOCK = 256  # users whose candidates are scored at once


def installed() -> bool:
    """Whether LightGBM is there."""
    return importlib.util.find_spec("lightgbm") is not None


class Boosted:
    """Judges fitted to all train rows, and the trees that order their candidates."""

    def __init__(self, shop: Shop, judges: Judges, trees, number: int):
        """trees: a lightgbm.Booster, of which the first `number` are used."""
        self.shop, self.judges, self.trees, self.number = shop, judges, trees, number

    @classmethod
    def fit(
        cls, shop: Shop, plain: dict[str, dict], seed: int = 0, fold_users: int = FOLD_USERS
    ) -> "Boosted":
        """Learn from train rows; choose the number of trees by validation NDCG@100.

        plain  name of a plain model -> its settings, for the judges of its kind
        Raises PageLLMError where LightGBM is not installed.
        """
        if not installed():
            raise PageLLMError(
                "LightGBM is not installed\n"
                f"  Install it with {hints.install('ranker')}, or leave the row out: --ranker never"
            )
        import lightgbm

        settings = tuned(plain, shop)
        x, y, sizes = fold_rows(shop, settings, FOLDS, SHARE, POOL, seed, fold_users)
        judges = Judges.fit(shop.catalogue, History.of(shop, shop.rows("train", None)), settings)
        data = lightgbm.Dataset(x, y.astype(np.int32), group=sizes, free_raw_data=True)
        trees = lightgbm.train(parameters(seed), data, max(TREES))
        scorer, seen = Scorer(shop, "valid"), seen_rows(shop, "valid", "train")
        users = scorer.users[:2000]
        made = {n: cls(shop, judges, trees, n) for n in TREES}
        value = {
            n: float(np.nanmean(scorer(one.rank(users, seen, 20, 100), 20)["NDCG@100"]))
            for n, one in made.items()
        }
        return made[max(TREES, key=lambda n: value[n])]

    def rank(self, users: np.ndarray, seen: Rows, k: int, depth: int) -> RankedPages:
        """Pages of k and the ranks after them, at most POOL, without items in `seen`."""
        depth, parts = min(depth, POOL), []
        for some in (users[at : at + BLOCK] for at in range(0, len(users), BLOCK)):
            legal = legal_items(seen, some, self.shop.n_items)
            item, x = self.judges.candidates(self.judges.known.select(some), legal, POOL)
            flat = x.reshape(-1, x.shape[2])
            score = self.trees.predict(flat, num_iteration=self.number, num_threads=1)
            score = np.where(item >= 0, score.reshape(item.shape), -np.inf)
            order = np.argsort(-score, axis=1, kind="stable")[:, :depth]
            parts.append([np.take_along_axis(column, order, 1) for column in (item, score)])
        item, score = (np.concatenate(column) for column in zip(*parts, strict=True))
        slots = np.minimum((item >= 0).sum(1), k)
        return RankedPages(users, item, score.astype(np.float32), slots)


def parameters(seed: int) -> dict:
    """Of LightGBM; one thread and fixed seeds, so that the same rows give the same trees."""
    return {
        "objective": "lambdarank",
        "lambdarank_truncation_level": 100,
        "num_leaves": 15,
        "learning_rate": 0.05,
        "min_data_in_leaf": 100,
        "feature_fraction": 0.7,
        "bagging_fraction": 0.7,
        "bagging_freq": 1,
        "lambda_l2": 10.0,
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": 1,
        "seed": seed,
        "verbose": -1,
    }
