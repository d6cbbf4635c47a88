"""LightGBM as the ranker of rows: trees over habit, taste, categories and brands. Extra: [ranker].

Reads   data/<dataset>, orders.parquet where there is one, runs/<run>/storefront/build
Writes  runs/<run>/storefront/trees/model.txt             LightGBM's own format

    pagellm storefront trees --dataset complete_journey
    pagellm storefront evaluate --dataset complete_journey --ranker lightgbm

The trees learn from train orders alone: what people bought in the last tenth of them, from what was
known before, factors fitted anew to that. Of each person they see what was bought, the best 100
other items by `blend`, and as many drawn from the shop. A score is a logit, as of any ranker.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pagellm.baselines.boosted import grow, installed
from pagellm.data.orders import Orders, load_orders, orders_of
from pagellm.data.shop import Shop, load
from pagellm.stage import hints, randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import atomic, read_json
from pagellm.stage.run import Run, StageConfig, finished
from pagellm.storefront.context import Known
from pagellm.storefront.parts import Context
from pagellm.storefront.rankers import Blend, Factors, dots, fit_factors, fold_in, habit_of
from pagellm.storefront.text import best_first

__all__ = ["Config", "Features", "Trees", "read_trees", "run"]

LATER = 0.9  # share of the train orders that are known when the rest is to be foreseen
NEAR, DRAWN = 100, 100  # items a person that were not bought: best by blend, any
NAMES = ("habit", "taste", "newest", "popularity", "leaf", "brand", "history")


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Fit LightGBM to train orders, as a ranker of rows."""

    people: int = 2000  # whose later train orders are foreseen, drawn by seed
    trees: int = 100  # of the model

    def __post_init__(self):
        super().__post_init__()
        check(self, people=(self.people > 0, "1 or more"), trees=(self.trees > 0, "1 or more"))


@dataclass(frozen=True)
class Features:
    """What the trees see of a person and an item. households, leaf, brand (N,); -1: unknown."""

    factors: Factors
    households: np.ndarray
    leaf: np.ndarray
    brand: np.ndarray

    def of(self, context: Context) -> Callable[[np.ndarray], np.ndarray]:
        """A function from items (n,) to (n, 7) float64: NAMES. A row hangs on its item alone."""
        item, count = context.item, context.count
        habit = habit_of(context)
        taste = fold_in(self.factors, item, count) if len(item) else None
        order = np.argsort(item)
        bought = item[order]
        groups = [
            np.bincount(ids[item] + 1, count, ids.max(initial=-1) + 2)
            for ids in (self.leaf, self.brand)
        ]

        def features(items: np.ndarray) -> np.ndarray:
            table = np.zeros((len(items), len(NAMES)))
            table[:, 0] = habit(items)
            if taste is not None:
                table[:, 1] = dots(self.factors.item[items], taste)
                at = np.minimum(np.searchsorted(bought, items), len(bought) - 1)
                known = bought[at] == items
                table[:, 2] = np.where(known, 1 / (1.0 + order[at]), 0.0)
            table[:, 3] = np.log1p(self.households[items])
            for column, (ids, times) in enumerate(
                zip((self.leaf, self.brand), groups, strict=True), 4
            ):
                table[:, column] = np.where(ids[items] >= 0, np.log1p(times[ids[items] + 1]), 0.0)
            table[:, 6] = np.log1p(len(item))
            return table

        return features


@dataclass(frozen=True)
class Trees:
    """The ranker. trees: a lightgbm.Booster."""

    features: Features
    trees: object
    name: str

    def __call__(self, context: Context) -> np.ndarray:
        return self.of(context)(np.arange(len(self.features.households)))

    def of(self, context: Context) -> Callable[[np.ndarray], np.ndarray]:
        rows = self.features.of(context)

        def logit(items: np.ndarray) -> np.ndarray:
            if not len(items):
                return np.zeros(0)
            predict = self.trees.predict  # type: ignore[attr-defined]
            return predict(rows(items), raw_score=True, num_threads=1)

        return logit


def examples(shop: Shop, train: Orders, people: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """features (R, 7), bought (R,) of people's later train orders.

    Raises PageLLMError where there are none.
    """
    cut = int(np.quantile(train.time, LATER)) if len(train.time) else 0
    before, after = train.where(train.time < cut), train.where(train.time >= cut)
    rows, count = before.history()
    later = after.history()[0]
    users = np.flatnonzero((rows.counts() > 0) & (later.counts() > 0))
    if not len(users):
        raise PageLLMError(
            "nobody has train orders both before and after their last tenth: nothing is to be "
            "foreseen\n  Take another ranker."
        )
    households = np.bincount(rows.items, minlength=shop.n_items)
    factors = fit_factors(rows, count, shop.n_items, seed)
    seen = Features(factors, households, shop.catalogue.leaf_id, shop.catalogue.brand_id)
    nobody = np.full(shop.n_items, -1)
    known, blend = Known.of(shop, before, nobody, 1, cut), Blend(factors, households)
    rng = randomness.rng(seed, "storefront", "trees")
    x, y = [], []
    for user in rng.permutation(users)[:people].tolist():
        context, label = known.context(shop.user_ids[user]), later.of(user)[0]
        near = best_first(blend(context), np.arange(shop.n_items), NEAR + len(label))
        drawn = rng.integers(0, shop.n_items, DRAWN)
        others = np.setdiff1d(np.concatenate([near, drawn]), label)
        items = np.concatenate([label, others])
        x.append(seen.of(context)(items))
        y.append(np.arange(len(items)) < len(label))
    return np.concatenate(x), np.concatenate(y)


def read_trees(folder: Path, shop: Shop, factors: Factors, households, make: str) -> Trees:
    """The fitted trees of a run. Raises PageLLMError where they, or LightGBM, are missing."""
    done = finished(folder, "trees", make)
    needs_lightgbm()
    import lightgbm

    try:
        trees = lightgbm.Booster(model_str=(folder / "model.txt").read_text())
    except (OSError, ValueError, lightgbm.basic.LightGBMError):
        raise PageLLMError(
            f"{folder / 'model.txt'} is damaged\n  Remove {folder} and fit it anew: {make}"
        ) from None
    seen = Features(factors, households, shop.catalogue.leaf_id, shop.catalogue.brand_id)
    return Trees(seen, trees, f"lightgbm/{done['id']}")


def needs_lightgbm() -> None:
    if not installed():
        raise PageLLMError(
            f"LightGBM is not installed\n  Install it with: {hints.install('ranker')}"
        )


def run(config: Config) -> dict:
    """Fit and write; returns what `done` says."""
    needs_lightgbm()
    make = config.make("storefront build")
    built = finished(config.stage("storefront/build"), "storefront", make)
    with Run(config.stage("storefront/trees"), config, {"build": built["id"]}) as out:
        if out.already_done():
            return read_json(out.path / "done")
        shop = load(config.data_dir)
        orders = load_orders(shop)
        train = (orders_of(shop) if orders is None else orders).only("train")
        x, y = examples(shop, train, config.people, config.seed)
        trees = grow(x, y, config.trees, config.seed, {"objective": "binary"})
        with atomic(out.path / "model.txt") as beside:
            beside.write_text(trees.model_to_string())
        gain = trees.feature_importance("gain")
        share = dict(zip(NAMES, (gain / max(gain.sum(), 1e-12)).round(4).tolist(), strict=True))
        out.finish(examples=len(y), bought=int(y.sum()), gain=share)
        told = ", ".join(f"{name} {part:.0%}" for name, part in share.items())
        print(f"{out.path}: {hints.counted(len(y), 'example')}, {int(y.sum()):,} bought; what the "
              f"trees gain by: {told}", flush=True)  # fmt: skip
        return read_json(out.path / "done")


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm storefront trees"))
