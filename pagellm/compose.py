"""Learn which items a user will pick, and choose on validation rows how to build pages from this.

Reads   data/<dataset>, runs/<run>/sft (or ppo, or neither: --policy)
Writes  runs/<run>/compose      model.pt, choice.json (the settings tried and their scores)

    make compose                pagellm compose --dataset synthetic

Seconds to minutes on two CPU cores. Four steps:

1. Fit the outcome model (model/outcome.py): folds hide train rows, the plain judges
   (model/judges.py) are fitted to the others, and a small network learns which candidates were
   among the hidden rows.
2. Calibrate its probabilities on validation rows, together with the policy's log-probabilities.
3. Score the baselines on validation rows: EASE, ALS, ALS with titles, ALS with titles and ratings,
   each as it is and re-ranked for variety.
4. Choose worth, order and spread of a page (pages/compose.py): of the settings that lose no
   accuracy, the one whose smallest margin over all these baselines and all metrics is largest.
   Where its pages vary less than those of ALS with titles and MMR, more spread is taken, if no
   accuracy is lost to that row. If the pages lose more accuracy to that row than the other way
   round, its pages are taken: nothing that was learnt makes better ones here.

model.pt holds all that a page needs, the judges fitted to all train rows too. No test row is read.
A judge is never asked about a row that it was fitted to.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import resources
from importlib.abc import Traversable
from pathlib import Path

import numpy as np

from pagellm.data.shop import Shop, load
from pagellm.model.als import Space, add_pseudo_users, item_groups, penalty_scale
from pagellm.model.choice import standing
from pagellm.model.composer import Composer, PlainRow, picks
from pagellm.model.judges import DENSE, History, Judges, contents, tuned
from pagellm.model.outcome import Calibration, learn
from pagellm.model.plain import Chosen, Fitted, fit
from pagellm.model.policy import Policy
from pagellm.pages import stats
from pagellm.pages.compose import (
    GRID,
    Opinion,
    Taste,
    as_varied,
    choose,
    compose,
    ranked_by_value,
    unit_of,
)
from pagellm.pages.ranked import RankedPages, Scorer, rank_all, seen_rows
from pagellm.pages.rerank import METHODS, Kin, reranked
from pagellm.pages.tables import ALL_COLUMNS
from pagellm.pages.yardstick import ACCURACY, best_of, chosen, means, sweep
from pagellm.stage import dist
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import write_json
from pagellm.stage.run import Run, StageConfig, file_id, finished

__all__ = ["Config", "run"]

# Metrics by which the way of composing is chosen: those that validation rows know.
MEASURES = tuple(name for name in ALL_COLUMNS if name not in ("duplicate_rate", "true_energy"))
# Settings of the plain rows where no search has found others.
PLAIN = {
    "EASE": {"ridge": 200.0},
    "ALS": {"factors": 64, "alpha0": 0.1, "reg": 0.03, "nu": 1.0},
    "ALS+facts": {"factors": 64, "alpha0": 0.1, "reg": 0.03, "nu": 1.0},
    "ALS+ratings": {
        "factors": 64,
        "alpha0": 0.03,
        "reg": 0.03,
        "nu": 1.0,
        "disliked": 0.35,
        "slope": 0.15,
        "facts": 0.5,
        "stars": 0.0,
    },
}


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Fit the outcome model and choose how pages are composed."""

    source_run: str = ""  # run whose policy is read; empty: this run (studies share one)
    policy: str = "sft"  # the policy that proposes items, beside the plain models: sft, ppo, or
    # none, for a shop whose language model adds nothing
    settings: str = ""  # settings.json of `pagellm baselines`, for the plain models; empty: the
    # data set's preset if there is one, else defaults
    folds: int = 2  # number of folds. Each hides some train rows, and the outcome model learns to
    # predict them
    share: float = 0.2  # share of each user's train rows that a fold hides
    networks: int = 2  # outcome networks with different random starts; their probabilities are
    # averaged
    fold_users: int = 6000  # users of a fold that the networks learn from, drawn at random; 0: all
    eval_users: int = 6000  # validation users on whose rows the way of composing pages is chosen;
    # 0: all
    k: int = 20  # slots of a page
    depth: int = 100  # ranks that validation scores for each user: the page and what follows it
    fallback: bool = True  # take the pages of ALS with titles and MMR where validation finds
    # nothing better among what was learnt

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            policy=(self.policy in ("sft", "ppo", "none"), "sft, ppo or none"),
            folds=(self.folds > 0, "1 or more"),
            share=(0 < self.share * self.folds <= 1, "above 0, and folds * share at most 1"),
            networks=(self.networks > 0, "1 or more"),
            k=(self.k > 0, "1 or more"),
            depth=(self.depth >= self.k, f"k={self.k} or more"),
        )


def plain_settings(config: Config) -> dict[str, dict]:
    """Settings of every plain row: of the file, of the data set's preset, or the defaults."""
    path: Path | Traversable = Path(config.settings)
    if not config.settings:
        path = resources.files("pagellm") / "presets" / config.dataset / "baselines.json"
        if not path.is_file():
            return PLAIN
    try:
        found = {name: row["settings"] for name, row in json.loads(path.read_text()).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PageLLMError(
            f"{path} holds no settings of plain models ({error})\n"
            "  Take the settings.json that `pagellm baselines` wrote, or leave --settings out."
        ) from None
    facts = {"ALS+facts": found["ALS"]} if "ALS" in found else {}
    return PLAIN | facts | {name: found[name] for name in PLAIN if name in found}


def plain_rows(
    config: Config,
    shop: Shop,
    scorer: Scorer,
    users: np.ndarray,
    plain: dict,
    judges: Judges,
    kin: Kin,
) -> tuple[dict[str, list[dict]], list[dict], PlainRow, dict]:
    """Validation scores of every plain row, as it is and re-ranked at the strength chosen.

    judges   fitted to all train rows; a judge of a row's own settings is that row
    returns  name -> its scores, the re-ranked ones after them; the records of the frontier; and
             ALS with facts and MMR, which is kept, and its scores
    """
    seen, rows, frontier = seen_rows(shop, "valid", "train"), {}, []
    train, groups = shop.csr("train"), item_groups(shop.catalogue)
    for name, settings in plain.items():
        if (name == "EASE" and shop.n_items > DENSE) or (name == "ALS+ratings" and not shop.rated):
            continue
        model = judges.plain(name, settings) or fit(
            name,
            train,
            shop.n_users,
            shop.n_items,
            settings,
            config.seed,
            groups=groups,
            chosen=Chosen.of(shop),
        )
        pages = rank_all(model.score, users, seen, config.k, config.depth, config.seed)
        records = sweep(name, pages, scorer, kin, config.k, users=0)
        rows[name] = [scorer(pages, config.k)]
        for method in METHODS:
            if strength := chosen(records, name, method):
                again = reranked(pages, kin, config.k, method, strength)
                rows[name].append(scorer(again, config.k))
        frontier += records
        if name == "ALS+facts":
            space = space_of(model, shop, groups, settings)
            kept = PlainRow(space, chosen(records, name, "mmr"))
            shipped = scorer(reranked(pages, kin, config.k, "mmr", kept.strength), config.k)
    return rows, frontier, kept, shipped


def space_of(model: Fitted, shop: Shop, groups: list[np.ndarray], settings: dict) -> Space:
    """The item factors of a fitted ALS+facts, in which anybody's history finds its place."""
    rows = add_pseudo_users(shop.csr("train"), groups)
    alpha0, nu = settings["alpha0"], settings["nu"]
    size = len(rows.indptr) - 1, shop.n_items
    scale = penalty_scale(rows, *size, alpha0, settings["reg"], nu)
    return Space(model.learned["items"].clone(), alpha0, scale, nu)


def choose_taste(
    config: Config,
    shop: Shop,
    scorer: Scorer,
    opinion: Opinion,
    rows: dict[str, list[dict]],
    kin: Kin,
    shipped: dict,
) -> tuple[Taste, int, bool]:
    """The best Taste by validation scores, how many were tried, and if the plain row is better.

    shipped  the plain row's scores

    Baselines without ratings count first, then those with ratings. If a shop has no ratings, worth
    and order have no effect and stay 0.
    """
    rated = rows.get("ALS+ratings", [])
    others = [row for name, some in rows.items() if name != "ALS+ratings" for row in some]
    grid = GRID if shop.rated else GRID | {"worth": (0.0,), "order": (0.0,)}

    # `choose` tries many tastes of one worth in a row.
    ranked = lru_cache(maxsize=1)(lambda worth: ranked_by_value(opinion, worth))

    def scored(taste: Taste) -> dict[str, np.ndarray]:
        pages = compose(opinion, kin, taste, config.k, config.depth, ranked=ranked(taste.worth))
        return scorer(RankedPages(opinion.user, *pages), config.k)

    groups = [group for group in (others, rated) if group]
    taste, tried = choose(scored, groups, MEASURES, grid)
    taste = as_varied(taste, scored, shipped, grid["spread"])
    kinds = {"learnt": means(scored(taste)), "plain": means(shipped)}
    return taste, len(tried), config.fallback and best_of(kinds, ACCURACY)[0] == "plain"


def fitted_from(config: Config, inputs: dict[str, str]) -> str:
    """What judges, outcome network and plain rows depend on: all but the policy."""
    of = {key: value for key, value in inputs.items() if key in ("data", "settings")}
    own = {"run", "source_run", "policy", "fallback", "preset", "device"}
    return json.dumps([of, {key: value for key, value in vars(config).items() if key not in own}])


def fits(config: Config, shop: Shop, plain: dict[str, dict]) -> tuple:
    """The outcome network, and the judges fitted to all train rows."""
    settings, content = tuned(plain, shop), contents(shop.catalogue)
    outcome = learn(
        shop,
        settings,
        config.folds,
        config.share,
        networks=config.networks,
        seed=config.seed,
        users=config.fold_users,
        content=content,
    )
    history = History.of(shop, shop.rows("train", None))
    return outcome, Judges.fit(shop.catalogue, history, settings, config.seed, content)


def run(config: Config, shared: dict[str, tuple] | None = None) -> None:
    """The stage.

    shared  kept by a caller that composes with one policy and then with another: what does not
            depend on the policy is put here, and taken from here
    """
    where = config.stage(config.policy, config.source_run)
    shop, inputs = load(config.data_dir), {"data": file_id(config.data_dir / "source.json")}
    if config.policy != "none":
        make = config.make(config.policy, config.source_run)
        record = finished(where, f"{config.policy} policy", make)
        inputs[config.policy] = record["id"]
    if config.settings:
        inputs["settings"] = file_id(config.settings)
    device = dist.start(config.device)
    with Run(config.stage("compose"), config, inputs, free=("settings",)) as out:
        if out.already_done():
            return
        if not dist.is_main():  # one process is enough: the others wait for its result
            dist.barrier()
            return
        scorer = Scorer(shop, "valid")
        users = scorer.users[shop.csr("train").counts()[scorer.users] > 0]
        if len(users) == 0:
            raise PageLLMError(
                f"no user of {config.data_dir} has both train and validation items: nothing to "
                "calibrate and choose on"
            )
        if 0 < config.eval_users < len(users):
            rng = np.random.default_rng(config.seed)
            users = np.sort(rng.permutation(users)[: config.eval_users])
        plain, took = plain_settings(config), {}

        def timed(what: str, began: float) -> None:
            took[what] = round(time.process_time() - began, 1)

        began = time.process_time()
        policy = None if config.policy == "none" else Policy.load(where, device)
        shared = {} if shared is None else shared
        alike = fitted_from(config, inputs)
        if alike not in shared:
            shared.clear()
            shared[alike] = fits(config, shop, plain)
        outcome, judges = shared[alike][:2]
        composer = Composer(shop, policy, judges, outcome)
        timed("outcome model", began)

        began = time.process_time()
        seen = seen_rows(shop, "valid", "train")
        opinion, raw, others = composer.opinion(users, seen)
        there = opinion.item >= 0
        picked = picks(users, opinion.item, scorer.held, shop.n_items)
        composer.scale = Calibration.fit(raw[there], others[there], picked[there])
        chance = np.where(there, composer.scale(raw, others), 0.0)
        opinion = Opinion(users, opinion.item, chance, opinion.stars, opinion.mean)
        timed("opinions", began)

        began = time.process_time()
        if len(shared[alike]) == 2:
            shared[alike] += plain_rows(config, shop, scorer, users, plain, judges, composer.kin)
        rows, frontier, composer.plain, shipped = shared[alike][2:]
        timed("plain rows", began)
        began = time.process_time()
        composer.taste, tried, composer.plain_pages = choose_taste(
            config, shop, scorer, opinion, rows, composer.kin, shipped
        )
        composer.unit = unit_of(opinion, composer.taste, config.k)
        timed("choice", began)

        opinions = {"outcome": chance, "ALS+facts": others[:, :, 1]}
        opinions |= {} if policy is None else {"policy": others[:, :, 0]}
        knows = {
            name: stats.summary(stats.within_users(score, picked, there), config.seed)
            for name, score in opinions.items()
        }
        result = {
            "taste": asdict(composer.taste),
            "unit": composer.unit,
            "plain_pages": composer.plain_pages,
            "valid": standing(
                shop,
                config.k,
                lambda users, seen, there: composer.rank(users, seen, config.k, there.depth),
            ),
            "tried": tried,
            "calibration": asdict(composer.scale),
            "reliability": stats.reliability(chance, picked, there),
            "correlation": knows,
            "processor_seconds": took,
        }
        write_json(out.path / "choice.json", result | {"settings": plain, "frontier": frontier})
        out.finish(composer.state(), **result)
        dist.barrier()
        tell(out.path, composer, tried, knows, took)


def tell(path: Path, composer: Composer, tried: int, knows: dict, took: dict) -> None:
    """Print what was chosen, and what the opinions know of validation picks."""
    means = ", ".join(f"{name} {row['mean']:.3f}" for name, row in knows.items())
    print(
        f"compose: {path}, {composer.taste}, {tried} tried; within-user correlation with "
        f"validation picks: {means}; processor seconds {took}"
    )
    if composer.plain_pages:
        print(
            "compose: on validation rows ALS+facts with MMR loses less accuracy to the pages of "
            "what was learnt than they lose to it, so its pages are taken"
        )


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm compose"))
