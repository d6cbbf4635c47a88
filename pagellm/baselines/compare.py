"""Plain baselines, scored by the same code as our policies: pages.parquet -> metrics.

    make baselines DATASET=toys       pagellm baselines --dataset toys --refit

Popularity, ItemKNN, EASE and implicit ALS (pagellm/model/plain.py); where LightGBM is installed,
also its trees over the scores of all of them (boosted.py). Every model is fitted to train
rows only. Its settings are those with the best validation NDCG@100 out of at most `trials`, which
are searched in the same way for all models. Test rows are used once, for the final scores. --refit
adds each model fitted to train + validation with the chosen settings. --settings takes the settings
of an earlier search instead of searching.

Writes runs/<run>/baselines/
    settings.json                        chosen settings, searched grid, validation score
    trials.json, split.json              every setting tried; hash and sizes of the split
    metrics.json, table.{txt,md,tex,parquet}
    <model>/{pages,per_user}.parquet

Takes seconds for 1,000 items and minutes for 12,000, where EASE inverts an N x N matrix (a minute
and 2 GB on one core).
"""

import json
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from pagellm.baselines.boosted import Boosted, installed
from pagellm.data.shop import SPLITS, Rows, Shop, load
from pagellm.model.als import item_groups
from pagellm.model.plain import GRIDS, Chosen, Fitted, fit, gram_matrix, grid_of
from pagellm.pages.ranked import (
    RankedPages,
    Scorer,
    audience,
    check_leak,
    check_mask,
    rank_all,
    score_row,
    seen_rows,
)
from pagellm.pages.rerank import METHODS, Kin, reranked
from pagellm.pages.tables import (
    ALL_COLUMNS,
    check_decimals,
    compare,
    per_user,
    rewrite,
    save,
    text_table,
    write_table,
)
from pagellm.pages.yardstick import chosen as allowed
from pagellm.pages.yardstick import frontier_table, sweep
from pagellm.stage import hints, presets
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import atomic, read_json, slug, write_json
from pagellm.stage.run import Run, StageConfig, file_id, finished

__all__ = ["Config", "RATED", "Workbench", "climb", "read_rows", "run"]


LIGHTGBM = "LightGBM"  # name of the row
GOAL = "NDCG@100"  # the validation metric that chooses settings
# Further settings of ALS+ratings, where no search has found others; the rest are those of ALS.
RATED = {"disliked": 0.35, "slope": 0.15, "facts": 0.5, "stars": 0.0}


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Choose settings on validation, fit, write pages, score them on the test split."""

    PRESET_FILES: ClassVar[dict[str, str]] = {"settings": "baselines.json"}

    models: str = ",".join(GRIDS)  # models to fit, comma-separated. ALS+facts reads titles and
    # categories too, ALS+ratings also ratings and disliked items
    ranker: str = "auto"  # a row of LightGBM over the scores of all models, cross-fitted: auto,
    # where it is installed (extra [ranker]); always, or an error; never
    rerank: str = "mmr"  # also add each model re-ranked for variety, as strongly as validation
    # allows: some of mmr, dpp, energy; empty: none
    trials: int = 24  # most settings tried for each model on validation;
    # the search stops earlier where no neighbour is better
    settings: str = ""  # settings.json of an earlier search, used instead of searching; empty: on
    # the command line the data set's own (<dataset>/baselines.json in ./presets or in the package),
    # if there is one; none: search
    refit: bool = False  # also fit each model to train + validation with the chosen settings
    mask: str = "train+valid"  # splits whose items no page may hold; some papers mask train only
    versus: str = "EASE"  # row that every other row's differences are taken to
    k: int = 20  # slots on a page
    depth: int = 100  # length of the ranked list, k or more
    n_boot: int = 1000  # bootstrap draws for each interval
    decimals: int = 4  # digits after the decimal point in the tables; the same command with another
    # number only writes the tables anew

    def __post_init__(self):
        super().__post_init__()
        names = self.models.split(",")
        check(
            self,
            models=(
                set(names) <= set(GRIDS) and len(set(names)) == len(names),
                f"some of {','.join(GRIDS)}",
            ),
            rerank=(
                set(self.rerank.split(",")) <= {"", *METHODS},
                f"some of {','.join(METHODS)}, or empty",
            ),
            ranker=(self.ranker in ("auto", "always", "never"), "auto, always or never"),
            trials=(self.trials > 0, "1 or more"),
            mask=check_mask(self.mask),
            k=(self.k > 0, "1 or more"),
            versus=(
                self.versus in [*names, *(f"{n}, refit" for n in names if self.refit)],
                "one of the rows",
            ),
            settings=(
                not self.settings or presets.resolve(self.settings).is_file(),
                "a settings.json, or empty",
            ),
            depth=(self.depth >= self.k, f"k={self.k} or more"),
            n_boot=(self.n_boot > 1, "2 or more"),
            decimals=check_decimals(self.decimals),
        )

    @property
    def has_trees(self) -> bool:
        """Whether there is a row of LightGBM."""
        return self.ranker == "always" or (self.ranker == "auto" and installed())


def climb(
    grid: dict[str, tuple], value: Callable[[dict], float], trials: int
) -> tuple[dict, float, int]:
    """Coordinate search for the settings with the largest value (Hooke and Jeeves, 1961).

    Starts in the middle of the grid. Changes one setting at a time, and goes on in the same
    direction while the value rises. Strides begin at a quarter of each range and are halved when no
    step is better. Ends when no neighbour is better, or after `trials` values.

    grid     name of a setting -> its values, in order
    value    settings -> the number to maximise
    returns  the best settings, their value, the number of settings tried
    """
    at = {name: len(values) // 2 for name, values in grid.items()}
    stride = {name: max(1, round(len(values) / 4)) for name, values in grid.items()}
    seen: dict[tuple, float] = {}

    def settings(place: dict) -> dict:
        return {name: grid[name][i] for name, i in place.items()}

    best = seen[tuple(at.values())] = value(settings(at))
    moves, failed = deque((name, step) for name in grid for step in (1, -1)), 0
    while moves:
        if failed == len(moves):
            if max(stride.values()) == 1:
                break
            stride, failed = {name: max(1, n // 2) for name, n in stride.items()}, 0
        name, step = moves[0]
        to = at | {name: at[name] + step * stride[name]}
        found = -np.inf
        if 0 <= to[name] < len(grid[name]):
            place = tuple(to.values())
            if place not in seen:
                if len(seen) >= trials:
                    break
                seen[place] = value(settings(to))
            found = seen[place]
        if found > best:
            at, best, failed = to, found, 0
        else:
            moves.rotate(-1)
            failed += 1
    return settings(at), best, len(seen)


class Workbench:
    """What all models share: the data, the scorers, and the N x N Gram matrix last computed."""

    def __init__(self, config: Config):
        self.config, self.shop = config, load(config.data_dir)
        self.test, self.valid = Scorer(self.shop, "test"), Scorer(self.shop, "valid")
        if len(self.test.users) == 0 or len(self.valid.users) == 0:
            raise PageLLMError(
                f"{config.data_dir} has no validation or no test rows: nothing to choose or score "
                "by"
            )
        self._gram: tuple = (None, None)
        self.kin = Kin.of(self.shop.catalogue, self.test.near)

    def fit(self, name: str, settings: dict, splits: tuple[str, ...] = ("train",)) -> Fitted:
        """Fit the model `name` to the rows of these splits."""
        shop, rows, gram = self.shop, self.shop.csr(splits), None
        if name in ("ItemKNN", "EASE"):
            if self._gram[0] != splits:
                self._gram = (splits, gram_matrix(rows, shop.n_items))
            gram = self._gram[1]
        reads = name in ("ALS+facts", "ALS+ratings")
        groups = item_groups(shop.catalogue) if reads else None
        chosen = Chosen.of(shop, splits) if name == "ALS+ratings" else None
        return fit(
            name,
            rows,
            shop.n_users,
            shop.n_items,
            settings,
            self.config.seed,
            gram,
            groups,
            chosen,
        )

    def rank(self, fitted: Fitted | Boosted, users: np.ndarray, seen: Rows) -> RankedPages:
        """Ranked pages of these users, without the items they have seen."""
        if isinstance(fitted, Boosted):
            return fitted.rank(users, seen, self.config.k, self.config.depth)
        return rank_all(
            fitted.score, users, seen, self.config.k, self.config.depth, self.config.seed
        )

    def frontier(self, name: str, fitted: Fitted | Boosted) -> list[dict]:
        """The model's pages of validation users, re-ranked at rising strengths."""
        methods = [m for m in self.config.rerank.split(",") if m]
        if not methods:
            return []
        ranked = self.rank(fitted, self.valid.users, seen_rows(self.shop, "valid", "train"))
        return sweep(name, ranked, self.valid, self.kin, self.config.k, methods)

    def validate(self, fitted: Fitted) -> float:
        """Mean validation NDCG@100."""
        ranked = self.rank(fitted, self.valid.users, seen_rows(self.shop, "valid", "train"))
        return float(np.mean(self.valid(ranked, self.config.k)[GOAL]))

    def choose(
        self, name: str, path: Path, grid: dict[str, tuple] | None = None, most: int = 0
    ) -> tuple[dict, Fitted]:
        """Search the settings that are best on validation.

        path     file that keeps every setting tried, so that an interrupted search continues
        grid     values of every setting; None: those of GRIDS
        most     settings tried at most; 0: as the config says
        returns  the record for settings.json, and the model fitted with the chosen settings
        """
        tried = json.loads(path.read_text()) if path.exists() else {}
        best: tuple = (-np.inf, None, None)
        started = time.perf_counter()

        def value(settings: dict) -> float:
            nonlocal best
            key = f"{name} {json.dumps(settings)}"
            if key not in tried:
                fitted = self.fit(name, settings)
                tried[key] = self.validate(fitted)
                write_json(path, tried)
                if tried[key] > best[0]:
                    best = (tried[key], settings, fitted)
                print(
                    f"  {key}: {tried[key]:.5f}, {time.perf_counter() - started:.0f} s", flush=True
                )
            return tried[key]

        grid = grid or grid_of(name, self.shop.n_items)
        settings, found, tries = climb(grid, value, most or self.config.trials)
        print(
            f"{name}: {settings or 'nothing to choose'}, validation {GOAL} {found:.4f}, {tries} "
            "tried",
            flush=True,
        )
        fitted = best[2] if best[1] == settings else self.fit(name, settings)
        tested = {what: " ".join(f"{v:g}" for v in values) for what, values in grid.items()}
        return {
            "settings": settings,
            f"valid {GOAL}": found,
            "tried": tries,
            "grid": tested,
        }, fitted


def split_record(config: Config, shop: Shop) -> dict:
    """Hash of the split file and rows of each split."""
    return {
        "file": "interactions.parquet",
        "id": file_id(config.data_dir / "interactions.parquet"),
        "rows": {
            name: {
                "positive": int(shop.rows(name).sum()),
                "other": int(shop.rows(name, False).sum()),
            }
            for name in SPLITS
        },
    }


def stored(path: Path, names: list[str]) -> dict[str, dict]:
    """Settings of an earlier search, for those of `names` that it has.

    ALS+facts and ALS+ratings take those of ALS where they have none of their own.
    Raises PageLLMError for a file that holds no settings, or none of a model that needs some.
    """
    try:
        known = {name: row["settings"] for name, row in json.loads(path.read_text()).items()}
        if "ALS" in known:
            known = {"ALS+facts": known["ALS"], "ALS+ratings": known["ALS"] | RATED} | known
        return {name: {"settings": known[name], "from": path.name} for name in names}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PageLLMError(
            f"{path} has no settings of {', '.join(names)} ({error})\n"
            "  Take a settings.json that this command wrote, or search anew: --settings none"
        ) from error


def read_rows(folder: Path) -> tuple[dict[str, dict[str, np.ndarray]], dict]:
    """Read finished baselines.

    Returns row -> per-user scores, in the table's order, and the Config they were made with.
    """
    names = finished(folder, "baselines", hints.command("baselines"))["rows"]
    return (
        {name: per_user(folder / slug(name) / "per_user.parquet") for name in names},
        json.loads((folder / "config.json").read_text())["config"],
    )


def run(config: Config) -> dict[str, dict[str, dict]]:
    """Fit, score and write all baselines. Returns row -> metric -> {mean, low, high, ...}."""
    # Before the run's directory is made: a shop that cannot be read must not leave one behind.
    bench = Workbench(config)
    inputs = {"data": file_id(config.data_dir / "source.json")}
    if config.settings:
        inputs["settings"] = file_id(presets.resolve(config.settings))
    with Run(
        config.stage("baselines"), config, inputs, ("device", "save_every", "settings", "decimals")
    ) as out:
        if out.done:
            results = read_json(out.path / "metrics.json")
            rewrite(out.path, config.decimals)
            made = read_json(out.path / "config.json")["config"]
            print(
                (out.path / "table.txt").read_text()
                if config.decimals == made.get("decimals", 4)
                else text_table(results, ALL_COLUMNS, decimals=config.decimals)
            )
            return results
        shop, scorer = bench.shop, bench.test
        seen = seen_rows(shop, "test", config.mask)
        names = config.models.split(",")
        chosen = stored(presets.resolve(config.settings), names) if config.settings else {}
        results, rows = {}, {}

        def add(name: str, pages: RankedPages) -> None:
            rows[name], results[name] = score_row(
                out.path / slug(name),
                name,
                pages,
                scorer,
                seen,
                config.k,
                config.seed,
                config.n_boot,
            )

        frontier, strengths = [], {}
        for name in names + ([LIGHTGBM] if config.has_trees else []):
            fitted: Fitted | Boosted
            if name == LIGHTGBM:
                plain = {n: chosen[n]["settings"] for n in names}
                fitted = Boosted.fit(shop, plain, config.seed)
                chosen[name] = {"settings": {"trees": fitted.number}}
            elif name in chosen:
                fitted = bench.fit(name, chosen[name]["settings"])
            else:
                chosen[name], fitted = bench.choose(name, out.path / "trials.json")
            pages = bench.rank(fitted, scorer.users, seen)
            add(name, pages)
            records = bench.frontier(name, fitted)
            frontier += records
            for method in dict.fromkeys(r["method"] for r in records):
                strength = strengths[f"{name} + {method}"] = allowed(records, name, method)
                again = reranked(pages, bench.kin, config.k, method, strength)
                add(f"{name} + {method.upper()}", again)
        write_json(out.path / "settings.json", chosen)
        write_json(out.path / "strengths.json", strengths)
        write_table(out.path / "frontier.parquet", frontier)
        write_json(out.path / "split.json", split_record(config, shop))
        for name in names if config.refit else ():
            fitted = bench.fit(name, chosen[name]["settings"], ("train", "valid"))
            add(f"{name}, refit", bench.rank(fitted, scorer.users, seen))
        for name, scores in rows.items():
            check_leak(name, scores, scorer.held.counts()[scorer.users], results.get("EASE"))
        write_json(out.path / "metrics.json", results)
        heading = f"{config.dataset}: {audience(shop, scorer, config.mask)}"
        text = (
            f"{heading}; pages of {config.k}, mean over users and its 95% bootstrap interval\n\n"
            f"{text_table(results, ALL_COLUMNS, decimals=config.decimals)}\n\n"
            + "\n".join(
                f"{name}: {json.dumps(row['settings'])}"
                for name, row in chosen.items()
                if row["settings"]
            )
            + (f"\n\n{frontier_table(frontier)}" if frontier else "")
            + "\n"
        )
        with atomic(out.path / "table.txt") as beside:
            beside.write_text(text)
        save(
            out.path,
            compare(
                {name: [scores] for name, scores in rows.items()},
                ALL_COLUMNS,
                config.versus,
                config.seed,
                config.n_boot,
            ),
            heading,
            config.decimals,
        )
        out.finish(rows=list(rows))
        print(text)
        return results


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm baselines"))
