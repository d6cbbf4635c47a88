"""Choose on validation rows: the ranker's calibration and the weights of the score.

Reads   runs/<run>/storefront/build, the validation rows
Writes  runs/<run>/storefront/tune/tuned.json

    pagellm storefront tune --dataset complete_journey

Weights begin at 0, the ranker's own order. One after the other is raised to the value of
{.25, .5, 1} with the largest recall@page of the people drawn, where the paired 95% interval of the
gain lies above 0 and nine of ten items in the first five slots fit their theme's mission. The
largest of several means alone is often luck.
"""

import sys
from dataclasses import asdict, dataclass, replace

import numpy as np

from pagellm.data.shop import Rows
from pagellm.pages import stats
from pagellm.stage import randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import read_json, write_json
from pagellm.stage.run import Run, finished
from pagellm.storefront.front import Sources, Store, open_store, with_tuning
from pagellm.storefront.making import Front
from pagellm.storefront.page import page, written_ahead
from pagellm.storefront.parts import Context, Layout, Page, Weights, Written
from pagellm.storefront.rankers import calibration_error, fit_platt

__all__ = ["Config", "calibrate", "fitting", "people_of", "run"]

GRID = (0.25, 0.5, 1.0)
UNBOUGHT = 200  # items a person that were not bought, drawn for the calibration
LEAST_FITTING = 0.9
N_BOOT = 2000  # draws behind the interval of a weight's gain


@dataclass(frozen=True, kw_only=True)
class Config(Sources):
    """Calibrate the ranker and choose the score's weights on the validation rows."""

    people: int = 200  # users whose pages are made for each setting of the weights

    def __post_init__(self):
        super().__post_init__()
        check(self, people=(self.people > 0, "1 or more"))


def people_of(store: Store, split: str) -> tuple[np.ndarray, Rows]:
    """Users with labels in a split and history before it, rising; and the labels by user."""
    labels = store.orders.only(split).history()[0]
    return np.flatnonzero((labels.counts() > 0) & (store.known.rows.counts() > 0)), labels


def calibrate(store: Store, users: np.ndarray, labels, seed: int) -> tuple:
    """Platt's rule of the ranker and its expected calibration error, on half of the users each."""
    rng = randomness.rng(seed, "storefront", "platt")
    columns = []
    for half, user in enumerate(users.tolist()):
        logit = store.front.ranker(store.known.context(store.shop.user_ids[user]))
        bought = np.zeros(store.shop.n_items, dtype=bool)
        bought[labels.of(user)[0]] = True
        rest = np.flatnonzero(~bought)
        drawn = rng.choice(rest, min(UNBOUGHT, len(rest)), replace=False)
        items = np.r_[np.flatnonzero(bought), drawn]
        weight = np.where(bought[items], 1.0, len(rest) / max(len(drawn), 1))
        columns.append((logit[items], bought[items], weight, np.full(len(items), half % 2)))
    logit, bought, weight, part = (np.concatenate(column) for column in zip(*columns, strict=True))
    fit, held = part == 0, part == 1
    platt = fit_platt(logit[fit], bought[fit], weight[fit])
    held = held if held.any() else fit
    error = calibration_error(platt(logit[held]), bought[held], weight[held])
    return platt, error


def fitting(front: Front, pages: list[Page]) -> float:
    """TP@5 by predicate: the share of the first five items of generated rows that are of the
    theme's mission.
    """
    shares = [
        (front.missions.of_item[row.item[:5]] == row.theme.mission).mean()
        for found in pages
        for row in found.rows
        if row.source == "generated"
    ]
    return float(np.mean(shares)) if shares else 1.0


def choose_weights(
    store: Store, front: Front, users: np.ndarray, labels, seed: int
) -> tuple[Weights, list[dict], float]:
    """The weights; every setting that was tried, its recall, and the gain's interval; and the share
    of looks at a theme that blocked it.

    Where the ranker's own order fits the themes too seldom, the setting with the most recall of
    those that fit is taken, whether or not its gain is sure.
    """
    people = [store.known.context(store.shop.user_ids[u]) for u in users.tolist()]
    # No writer looks at the weights, so that each person's rows are written once.
    made = [written_ahead(front, context, store.layout) for context in people]
    rows = [one for one, _ in made]
    looks = [d.action != "pass" for _, found in made for d in found if d.level == "theme"]
    blocked = float(np.mean(looks)) if looks else 0.0

    def measured(weights: Weights) -> tuple[np.ndarray, float]:
        return scores(replace(front, weights=weights), people, rows, store.layout, labelled)

    labelled = [labels.of(u)[0] for u in users.tolist()]
    best = Weights(0.0, 0.0, 0.0, 0.0)
    recall, fits = measured(best)
    tried = [{**asdict(best), "recall": float(recall.mean()), "tp5": fits}]
    for name in ("redundancy", "ret", "agree"):
        start, base, based = best, recall, fits
        for value in GRID:
            weights = replace(start, **{name: value})
            found, share = measured(weights)
            gain = stats.paired(found, base, seed, N_BOOT)
            tried.append({**asdict(weights), "recall": float(found.mean()), "tp5": share})
            tried[-1] |= {"low": gain["low"], "high": gain["high"]}
            if share < LEAST_FITTING:
                continue
            sure = based < LEAST_FITTING or gain["low"] > 0
            if fits < LEAST_FITTING or (sure and found.mean() > recall.mean()):
                best, recall, fits = weights, found, share
    return best, tried, blocked


def scores(
    front: Front,
    people: list[Context],
    rows: list[list[Written]],
    layout: Layout,
    labelled: list[np.ndarray],
) -> tuple[np.ndarray, float]:
    """recall@page (U,) and TP@5 of a front whose rows are written."""
    pages = [
        page(front, context, layout, written=written)
        for context, written in zip(people, rows, strict=True)
    ]
    recall = [
        np.isin(label, found.items()).mean() for label, found in zip(labelled, pages, strict=True)
    ]
    return np.array(recall), fitting(front, pages)


def run(config: Config) -> dict:
    """Choose and write; returns what tuned.json says."""
    make = config.make("storefront build")
    built = finished(config.stage("storefront/build"), "storefront", make)
    with Run(config.stage("storefront/tune"), config, {"build": built["id"]}) as out:
        if out.already_done():
            return read_json(out.path / "tuned.json")
        (out.path / "tuned.json").unlink(missing_ok=True)  # of a run that was stopped halfway
        store = open_store(config)
        users, labels = people_of(store, "valid")
        if not len(users):
            raise PageLLMError(
                f"{config.data_dir} has no validation rows of people with a history\n"
                "  Leave --steps tune out: the defaults serve."
            )
        drawn = np.sort(
            randomness.rng(config.seed, "storefront", "tune").permutation(users)[: config.people]
        )
        platt, error = calibrate(store, users, labels, config.seed)
        tuned = {
            "ranker": store.front.ranker.name,
            "platt": [platt.alpha, platt.beta],
            "calibration_error": error,
            "weights": asdict(Weights(0.0, 0.0, 0.0, 0.0)),
        }
        front = with_tuning(store.front, tuned)
        weights, tried, blocked = choose_weights(store, front, drawn, labels, config.seed)
        tuned |= {"weights": asdict(weights), "tried": tried, "blocked": blocked}
        write_json(out.path / "tuned.json", tuned)
        out.finish(people=len(drawn))
        print(
            f"{out.path}: calibration error {error:.4f}; weights ret {weights.ret:g}, "
            f"agree {weights.agree:g}, redundancy {weights.redundancy:g}",
            flush=True,
        )
        return tuned


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm storefront tune"))
