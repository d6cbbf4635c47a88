"""Choose on validation rows: the ranker's calibration and the weights of the score.

Reads   runs/<run>/storefront/build, the validation rows
Writes  runs/<run>/storefront/tune/tuned.json

    pagellm storefront tune --dataset complete_journey

One weight after the other is set to the value of {0, .25, .5, 1} with the largest recall@page of
the people drawn, as long as nine of ten items in the first five slots fit their theme's mission.
"""

import sys
from dataclasses import asdict, dataclass, replace

import numpy as np

from pagellm.stage import randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import read_json, write_json
from pagellm.stage.run import Run, finished
from pagellm.storefront.front import Sources, Store, open_store, with_tuning
from pagellm.storefront.page import Front, page
from pagellm.storefront.parts import Page, Weights
from pagellm.storefront.rankers import calibration_error, fit_platt

__all__ = ["Config", "calibrate", "fitting", "people_of", "run"]

GRID = (0.0, 0.25, 0.5, 1.0)
UNBOUGHT = 200  # items a person that were not bought, drawn for the calibration
LEAST_FITTING = 0.9


@dataclass(frozen=True, kw_only=True)
class Config(Sources):
    """Calibrate the ranker and choose the score's weights on the validation rows."""

    people: int = 200  # users whose pages are made for each setting of the weights

    def __post_init__(self):
        super().__post_init__()
        check(self, people=(self.people > 0, "1 or more"))


def people_of(store: Store, split: str) -> tuple[np.ndarray, object]:
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


def scores(store: Store, front: Front, users: np.ndarray, labels) -> tuple[float, float]:
    """recall@page and TP@5 of a front on some users."""
    pages = [
        page(front, store.known.context(store.shop.user_ids[u]), store.layout)
        for u in users.tolist()
    ]
    shown = zip(users.tolist(), pages, strict=True)
    recall = [np.isin(labels.of(u)[0], found.items()).mean() for u, found in shown]
    return float(np.mean(recall)), fitting(front, pages)


def choose_weights(
    store: Store, front: Front, users: np.ndarray, labels
) -> tuple[Weights, list[dict]]:
    """One weight after the other, from all 0; equal recall keeps the smaller weight."""
    best, tried = Weights(0.0, 0.0, 0.0, 0.0), []
    best_recall = -1.0
    for name in ("redundancy", "ret", "agree"):
        for value in GRID:
            weights = replace(best, **{name: value})
            if best_recall >= 0 and value == 0.0:
                continue
            recall, fits = scores(store, replace(front, weights=weights), users, labels)
            tried.append({**asdict(weights), "recall": recall, "tp5": fits})
            if fits >= LEAST_FITTING and recall > best_recall:
                best, best_recall = weights, recall
    return best, tried


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
        weights, tried = choose_weights(store, front, drawn, labels)
        tuned |= {"weights": asdict(weights), "tried": tried}
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
