"""What our embeddings add to a plain ranker (the paper's 6.6): LightGBM with and without them.

Reads   data/<dataset>, runs/<run>/ppo, runs/<run>/reward
Writes  runs/<run>/ranker/              table.{md,tex,parquet}, and {valid,test}.npz: candidates
                                        with their features

    make ranker                         python -m experiments.ranker --dataset synthetic

EASE, fitted to train rows, proposes each user's candidates. LightGBM (lambdarank) orders them. It
learns from the validation labels and is scored once on the test labels; no feature reads a held-out
row. (PageLLM chose its own step on validation, so its features are slightly better where the ranker
learns than where it is scored. That can only reduce their measured gain.)

    plain      popularity, item mean rating, price, price minus the user's usual, affinity to
               category, department and brand, history length
    dot        h_u . e_i
    marginal   change of the page's reward (pagellm/serving/features.py)
    first      EASE's score of the candidate

About three minutes for the synthetic shop on one core. Needs the extra [ranker].
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pagellm.data.shop import Shop, load
from pagellm.model.plain import fit
from pagellm.model.policy import MODES, Policy
from pagellm.model.reward_model import RewardModel
from pagellm.pages.ranked import RankedPages, Scorer, check_pages, rank_all, seen_rows
from pagellm.pages.stats import difference
from pagellm.pages.tables import compare, markdown, save
from pagellm.pages.truth import item_scores, popularity
from pagellm.serving.features import pair_features
from pagellm.stage import hints, randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.dist import pick_device
from pagellm.stage.files import atomic
from pagellm.stage.run import Run, StageConfig, file_id, finished

__all__ = ["Candidates", "Config", "PLAIN", "ROWS", "candidates", "learn", "plain_features", "run"]


PLAIN = (
    "popularity",
    "mean rating",
    "price",
    "price - usual",
    "category",
    "department",
    "brand",
    "history",
)
ROWS = {
    "plain": PLAIN,
    "plain + dot": (*PLAIN, "dot"),
    "plain + marginal": (*PLAIN, "marginal"),
    "plain + both": (*PLAIN, "dot", "marginal"),
    "plain + first": (*PLAIN, "first"),
    "plain + first + dot": (*PLAIN, "first", "dot"),
    "plain + first + marginal": (*PLAIN, "first", "marginal"),
    "plain + first + both": (*PLAIN, "first", "dot", "marginal"),
}
SHOWN = ("Recall@20", "Recall@40", "NDCG@100", "ILD", "true_energy")
MASK = "train+valid"


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Order a first stage's candidates with LightGBM, with and without our two features."""

    source_run: str = ""  # run whose sft is read with policy=sft; empty: this run
    reward_run: str = ""  # run whose reward model is read; empty: source_run
    policy: str = "ppo"  # policy that the features come from: ppo or sft
    candidates: int = 100  # number of items that the first stage proposes for each user
    ridge: float = 100.0  # strength of EASE's ridge; EASE is the first stage
    k: int = 20  # slots on a page
    mode: str = "greedy"  # how the page of the marginal reward is decoded
    seeds: int = 5  # number of rankers; each samples its own rows and columns for its trees
    trees: int = 100  # trees of a ranker
    leaves: int = 15  # leaves of a tree
    lr: float = 0.05  # learning rate of the boosting

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            policy=(self.policy in ("ppo", "sft"), "ppo or sft"),
            mode=(self.mode in MODES, ", ".join(MODES)),
            candidates=(self.candidates >= self.k, f"k={self.k} or more"),
            ridge=(self.ridge > 0, "above 0"),
            k=(self.k > 0, "1 or more"),
            seeds=(self.seeds > 0, "1 or more"),
            trees=(self.trees > 0, "1 or more"),
            leaves=(self.leaves > 1, "2 or more"),
            lr=(self.lr > 0, "above 0"),
        )


@dataclass
class Candidates:
    """The items to order for the users of one split.

    user      (U,)
    item      (U, M), -1 where there are fewer
    label     (U, M) bool, True for held-out items
    features  name -> (U, M) float32, NaN where unknown
    """

    user: np.ndarray
    item: np.ndarray
    label: np.ndarray
    features: dict[str, np.ndarray]

    def rows(self, names, users: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """LightGBM's input for these users: X (R, F), y (R,), group sizes; one row a candidate."""
        kept = self.item[users] >= 0
        return (
            np.stack([self.features[name][users][kept] for name in names], 1),
            self.label[users][kept].astype(int),
            kept.sum(1),
        )


def plain_features(shop: Shop, users: np.ndarray, item: np.ndarray) -> dict[str, np.ndarray]:
    """The features PLAIN of items (U, M) for users (U,), from the catalogue and train rows only."""
    c, train = shop.catalogue, shop.csr("train")
    top_name = [names[0] if names else "" for names in c.categories]
    known = {name: at for at, name in enumerate(sorted(set(top_name) - {""}))}
    top = np.array([known.get(name, -1) for name in top_name])
    owner = np.repeat(np.arange(shop.n_users), train.counts())
    size = np.maximum(train.counts(), 1)

    def affinity(group: np.ndarray) -> np.ndarray:
        """Share of the user's train positives in the item's group; NaN if the item has no group."""
        n = int(group.max(initial=-1)) + 1
        if n == 0:
            return np.full(item.shape, np.nan)
        mine = group[train.items]
        share = (
            np.bincount((owner * n + mine)[mine >= 0], minlength=shop.n_users * n).reshape(-1, n)
            / size[:, None]
        )
        have = group[np.maximum(item, 0)]
        return np.where(have >= 0, share[users[:, None], np.maximum(have, 0)], np.nan)

    price = c.price.astype(float)
    paid = ~np.isnan(price[train.items])
    total = np.bincount(owner[paid], price[train.items][paid], shop.n_users)
    usual = total / np.where(
        count := np.bincount(owner[paid], minlength=shop.n_users), count, np.nan
    )
    at = np.maximum(item, 0)
    found = {
        "popularity": np.log1p(popularity(shop))[at],
        "mean rating": item_scores(shop, 5.0)[at],
        "price": price[at],
        "price - usual": price[at] - usual[users][:, None],
        "category": affinity(c.leaf_id),
        "department": affinity(top),
        "brand": affinity(c.brand_id),
        "history": np.broadcast_to(np.log1p(train.counts()[users])[:, None], item.shape),
    }
    return {name: np.where(item >= 0, x, np.nan).astype(np.float32) for name, x in found.items()}


def candidates(
    shop: Shop, split: str, policy: Policy, reward: RewardModel, config: Config
) -> Candidates:
    """EASE's best candidates for every user with held-out rows of `split`, with all features."""
    held, train, seen = shop.csr(split), shop.csr("train"), seen_rows(shop, split, MASK)
    users = np.flatnonzero(held.counts() > 0)
    ease = fit("EASE", train, shop.n_users, shop.n_items, {"ridge": config.ridge})
    first = rank_all(ease.score, users, seen, config.k, config.candidates, config.seed)
    check_pages(f"candidates of {split}", first, users, seen)
    owner = np.repeat(np.arange(shop.n_users), held.counts())
    label = np.isin(
        users[:, None] * shop.n_items + first.item, owner * shop.n_items + held.items
    ) & (first.item >= 0)
    dot, marginal = pair_features(
        policy,
        reward,
        train,
        seen,
        users,
        first.item,
        config.k,
        config.mode,
        progress=f"features, {split}",
    )
    assert marginal is not None  # there is a reward model
    return Candidates(
        users,
        first.item,
        label,
        plain_features(shop, users, first.item)
        | {
            "dot": dot,
            "marginal": marginal,
            "first": np.where(first.item >= 0, first.score, np.nan),
        },
    )


def kept(path: Path, make: Callable[[], Candidates]) -> Candidates:
    """make(), stored in `path`; or what an interrupted run with the same options stored there."""
    if not path.exists():
        made = make()
        arrays: dict[str, Any] = {"user": made.user, "item": made.item, "label": made.label}
        arrays |= made.features
        with atomic(path) as beside, open(beside, "wb") as file:
            np.savez_compressed(file, **arrays)
    with np.load(path, allow_pickle=False) as file:
        found = dict(file)
    return Candidates(found.pop("user"), found.pop("item"), found.pop("label"), found)


def dealt(found: Candidates, seed: int) -> Candidates:
    """Shuffle each user's candidates: with equal scores their order would leak EASE's ranking."""
    place = np.argsort(randomness.rng(seed, "ranker", "places").random(found.item.shape), axis=1)
    item, label = (np.take_along_axis(x, place, 1) for x in (found.item, found.label))
    return Candidates(
        found.user,
        item,
        label,
        {name: np.take_along_axis(x, place, 1) for name, x in found.features.items()},
    )


def learn(found: Candidates, names, config: Config, seed: int):
    """Fit a LightGBM booster with these features to `found`."""
    import lightgbm

    if not found.label.any():
        raise PageLLMError(
            f"the first stage found no held-out item of {len(found.user):,} users: nothing to "
            "learn\n  Raise --candidates."
        )
    x, y, group = found.rows(names, np.arange(len(found.user)))
    params = {
        "objective": "lambdarank",
        "num_leaves": config.leaves,
        "learning_rate": config.lr,
        "min_data_in_leaf": 50,
        "bagging_fraction": 0.8,
        "bagging_freq": 1,
        "feature_fraction": 0.8,
        "seed": seed,
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": 1,
        "verbose": -1,
    }
    return lightgbm.train(
        params, lightgbm.Dataset(x, y, group=group, params={"verbose": -1}), config.trees
    )


def order(found: Candidates, names, booster, k: int) -> RankedPages:
    """Pages of the candidates with the best scores; equal scores keep their order.

    booster  None: order by the first stage's score
    """
    score = np.full(found.item.shape, -np.inf, np.float32)
    kept = found.item >= 0
    if booster is None:
        score[kept] = found.features["first"][kept]
    else:
        score[kept] = booster.predict(
            found.rows(names, np.arange(len(found.user)))[0], num_threads=1
        )
    best = np.argsort(-score, axis=1, kind="stable")
    item = np.take_along_axis(found.item, best, 1)
    return RankedPages(
        found.user, item, np.take_along_axis(score, best, 1), np.minimum((item >= 0).sum(1), k)
    )


def run(config: Config) -> list[dict]:
    try:
        import lightgbm  # noqa: F401
    except ImportError:
        raise PageLLMError(
            "the ranker learns with LightGBM, which is not installed\n"
            f"  Install it with: {hints.install('ranker')}"
        ) from None
    where = {
        config.policy: config.stage(
            config.policy, config.source_run if config.policy == "sft" else ""
        ),
        "reward": config.stage("reward", config.reward_run or config.source_run),
    }
    inputs = {
        name: finished(path, f"{name} model", config.make(name))["id"]
        for name, path in where.items()
    }
    shop, device = load(config.data_dir), pick_device(config.device)
    inputs["data"] = file_id(config.data_dir / "source.json")
    with Run(config.stage("ranker"), config, inputs) as out:
        if out.already_done():
            print((out.path / "table.md").read_text())
            return []
        policy = Policy.load(where[config.policy], device)
        reward = RewardModel.load(where["reward"], device).requires_grad_(False)
        valid, test = (
            dealt(
                kept(
                    out.path / f"{split}.npz",
                    partial(candidates, shop, split, policy, reward, config),
                ),
                config.seed,
            )
            for split in ("valid", "test")
        )
        scorer = Scorer(shop, "test")
        seen = seen_rows(shop, "test", MASK)
        results = {"EASE": [scorer(order(test, (), None, config.k), config.k)] * config.seeds}
        gain: dict[str, list[np.ndarray]] = {}
        for name, features in ROWS.items():
            results[name], gain[name] = [], []
            for seed in range(config.seeds):
                booster = learn(valid, features, config, config.seed + seed)
                ranked = order(test, features, booster, config.k)
                check_pages(name, ranked, scorer.users, seen)
                results[name].append(scorer(ranked, config.k))
                share = booster.feature_importance("gain")
                gain[name].append(share / max(share.sum(), 1e-12))
        records = compare(results, SHOWN, "plain")
        save(out.path, records, "LightGBM with and without our features")
        text = report(records, results, gain, test)
        with atomic(out.path / "table.md") as beside:
            beside.write_text(text + "\n")
        out.finish()
        print(
            f"{config.dataset}: {len(test.user):,} users, {config.seeds} rankers\n\n{text}\n\n"
            f"{out.path}"
        )
    return records


def report(records, results, gain, test: Candidates) -> str:
    """The text: differences to "plain", those with EASE's score as a feature, and feature gains."""
    lines = [markdown(records), ""]
    for more in ("dot", "marginal", "both"):
        a, b = results[f"plain + first + {more}"], results["plain + first"]
        cells = []
        for metric in SHOWN:
            if metric in a[0] and not all(np.isnan(s[metric]).all() for s in a):
                mean, low, high = difference([s[metric] for s in a], [s[metric] for s in b])
                cells.append(f"{metric} {mean:+.4f} [{low:+.4f}, {high:+.4f}]")
        lines.append(f"{more} beside EASE's score, to plain + first: " + ", ".join(cells))
    names = ROWS["plain + first + both"]
    share = np.mean(gain["plain + first + both"], axis=0)
    lines += [
        "",
        "share of the trees' gain, plain + first + both: "
        + ", ".join(f"{names[i]} {share[i]:.0%}" for i in np.argsort(-share)),
        f"the candidates hold {test.label.sum():,} held-out items, those of "
        f"{test.label.any(1).mean():.1%} of the users at least one",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.ranker"))
