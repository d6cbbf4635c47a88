"""What a good team would ship: LightGBM's lambdarank over all plain models. Extra: [ranker].

    ranker = Boosted.fit(shop, {"ALS+facts": {...}, "EASE": {...}}, seed=0)
    pages = ranker.rank(users, seen, k=20, depth=100)

Folds hide train rows, the plain models (the judges
of pagellm/model/judges.py) are fitted to the others, and the trees learn to put the hidden rows
first, from the scores and ranks of all models, popularity, price, dates, categories and brands. So
the trees learn from the very numbers that composed pages learn from. No held-out row is read, but
for the number of trees, which validation chooses.
"""

import importlib.util

import numpy as np

from pagellm.data.shop import Rows, Shop
from pagellm.model.composer import BLOCK, POOL
from pagellm.model.judges import History, Judges, legal_items, tuned
from pagellm.model.outcome import fold_rows
from pagellm.pages.ranked import RankedPages, Scorer, seen_rows
from pagellm.stage import hints
from pagellm.stage.config import PageLLMError

__all__ = ["Boosted", "TREES", "grow", "installed"]

TREES = (25, 50, 100, 200, 400)  # numbers that validation may choose
FOLDS, SHARE, FOLD_USERS = 2, 0.2, 4000  # of fold_rows
JUDGED = 2000  # validation users by whom the number is chosen
SHAPE = {
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
    "verbose": -1,
}  # of the trees, and that they are always the same


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
        settings = tuned(plain, shop)
        x, y, sizes = fold_rows(shop, settings, FOLDS, SHARE, POOL, seed, fold_users)
        lambdarank = {"objective": "lambdarank", "lambdarank_truncation_level": 100}
        trees = grow(x, y, max(TREES), seed, lambdarank, sizes)
        history = History.of(shop, shop.rows("train", None))
        judges = Judges.fit(shop.catalogue, history, settings, seed)
        made = cls(shop, judges, trees, max(TREES))
        scorer = Scorer(shop, "valid")
        users = scorer.users[:JUDGED]
        pool, value = made.pool(users, seen_rows(shop, "valid", "train")), {}
        for n in TREES:
            made.number = n
            pages = made.ordered(users, pool, 20, 100)
            value[n] = float(np.nanmean(scorer(pages, 20)["NDCG@100"]))
        made.number = max(TREES, key=lambda n: value[n])
        return made

    def pool(self, users: np.ndarray, seen: Rows) -> list[tuple[np.ndarray, np.ndarray]]:
        """Candidates (B, POOL) and features (B, POOL, F) of blocks of users; none in `seen`."""
        return [
            self.judges.candidates(
                self.judges.known.select(some), legal_items(seen, some, self.shop.n_items), POOL
            )
            for some in (users[at : at + BLOCK] for at in range(0, len(users), BLOCK))
        ]

    def ordered(
        self, users: np.ndarray, pool: list[tuple[np.ndarray, np.ndarray]], k: int, depth: int
    ) -> RankedPages:
        """Pages of k and the ranks after them, of the candidates in `pool`, by the trees."""
        parts = []
        for item, x in pool:
            flat = x.reshape(-1, x.shape[2])
            score = self.trees.predict(flat, num_iteration=self.number, num_threads=1)
            score = np.where(item >= 0, score.reshape(item.shape), -np.inf)
            order = np.argsort(-score, axis=1, kind="stable")[:, :depth]
            parts.append([np.take_along_axis(column, order, 1) for column in (item, score)])
        item, score = (np.concatenate(column) for column in zip(*parts, strict=True))
        slots = np.minimum((item >= 0).sum(1), k)
        return RankedPages(users, item, score.astype(np.float32), slots)

    def rank(self, users: np.ndarray, seen: Rows, k: int, depth: int) -> RankedPages:
        """Pages of k and the ranks after them, at most POOL, without items in `seen`."""
        parts = [
            self.ordered(some, self.pool(some, seen), k, depth)
            for some in (users[at : at + BLOCK] for at in range(0, len(users), BLOCK))
        ]
        columns = (np.concatenate(x) for x in zip(*(vars(p).values() for p in parts), strict=True))
        return RankedPages(*columns)


def grow(
    x: np.ndarray,
    y: np.ndarray,
    trees: int,
    seed: int,
    objective: dict,
    sizes: np.ndarray | None = None,
):
    """LightGBM on features x (R, F) and answers y (R,); returns its Booster.

    objective  its options that say what is learnt
    sizes      rows of each user, one after the other, where the order within a user is learnt

    One thread and fixed seeds, so that the same rows give the same trees.
    Raises PageLLMError where LightGBM is not installed.
    """
    if not installed():
        raise PageLLMError(
            f"LightGBM is not installed\n  Install it with: {hints.install('ranker')}"
        )
    import lightgbm

    data = lightgbm.Dataset(x, y.astype(np.float32), group=sizes)
    return lightgbm.train(SHAPE | objective | {"seed": seed}, data, trees)
