"""Cold start (the paper's appendix F): train on half of the interactions.

    make coldstart DATASET=toys             python -m experiments.coldstart --dataset toys --seeds 3
    python -m experiments.coldstart --policies sft,ppo
    python -m experiments.coldstart --seeds 1 --run_files SASRec=full.parquet+half-s0.parquet

--policies adds our rows to the baselines', --run_files those of other libraries.

Each seed draws which half of every user's train rows stays, rounded up, so that every user keeps
some. The others become `unused`: no model sees them, and no page may hold them (mask
train+valid+unused). Full and half are thus ranked among the same items, and no model loses by
recommending an item that was removed. Validation and test rows do not change. Baselines' settings
are chosen on the full data and kept for the halves. Other libraries (pagellm/baselines/outside.py)
are fitted to data/<dataset> and to each data/<dataset>-half-s<seed>, which a first run of this
study makes; their run files are given with --run_files.

Writes data/<dataset>-half-s<seed>/, runs/<study>/..., and runs/<study>/<dataset>.{parquet,md}
"""

import json
import math
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from experiments.study import PAIRS_PPO, Stages, Variant, overrides, prepared, run_variant
from pagellm import evaluate, ppo, pretrain, reward, sft
from pagellm.baselines import compare
from pagellm.baselines.runfile import read_run
from pagellm.data import prepare
from pagellm.data.filters import group_rank
from pagellm.data.shop import Shop, load
from pagellm.model.plain import PLAIN
from pagellm.pages.ranked import Scorer, seen_rows
from pagellm.pages.stats import difference, effect
from pagellm.pages.tables import per_user, write_table
from pagellm.stage import randomness
from pagellm.stage.command import main
from pagellm.stage.config import Options, PageLLMError, check
from pagellm.stage.files import atomic
from pagellm.stage.run import file_id

__all__ = ["Config", "drops", "groups", "run", "thin"]


MASK = "train+valid+unused"
METRICS = ("Recall@20", "Recall@40", "NDCG@100")
FIXED = {
    "dataset",
    "run",
    "data",
    "runs",
    "seed",
    "source_run",
    "settings",
    "trials",
    "models",
    "mask",
    "policies",
}
STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward, "ppo": ppo, "evaluate": evaluate}
START = {"ppo": PAIRS_PPO}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What removing training interactions costs each recommender, by how many a user has."""

    dataset: str = "synthetic"  # name of the data set
    raw: str = ""  # directory of its raw files, if it is not prepared yet
    study: str = "coldstart"  # name of the study: results lie in <runs>/<study>
    share: float = 0.5  # share of each user's train rows that stays, rounded up
    seeds: int = 3  # number of seeds: 0, 1, ...; each draws its own half
    models: str = ",".join(PLAIN)  # baselines, comma-separated
    trials: int = 24  # most settings tried for each baseline, on the full data
    settings: str = ""  # settings.json of an earlier search, used instead of searching
    policies: str = ""  # our rows: sft, ppo, or both, comma-separated; each is trained on the full
    # data and on every half
    run_files: str = ""  # rows of other libraries: NAME=FULL+HALF0+HALF1..., comma-separated; one
    # run file for the full data and one for each seed's half
    bins: str = "4,8,16"  # groups of users by their full train rows: up to 4, 5 to 8, 9 to 16, more
    preset: str = "auto"  # auto: every stage begins with the data set's preset, if there is one;
    # none: with its defaults
    data: str = "data"  # directory of prepared data sets
    runs: str = "runs"  # directory of runs
    pretrain: Options = Options("")  # options for that stage of our rows, as on its command line
    sft: Options = Options("")  # options for sft
    reward: Options = Options("")  # options for reward
    ppo: Options = Options("")  # options for ppo
    evaluate: Options = Options("")  # options for evaluate
    baselines: Options = Options("")  # options for baselines

    def __post_init__(self):
        edges = [int(e) if e.isdigit() else -1 for e in self.bins.split(",")]
        rising = edges[0] >= 0 and all(a < b for a, b in zip(edges, edges[1:], strict=False))
        check(
            self,
            share=(0 < self.share < 1, "between 0 and 1"),
            seeds=(self.seeds > 0, "1 or more"),
            policies=(
                set(filter(None, self.policies.split(","))) <= {"sft", "ppo"},
                "sft, ppo or both",
            ),
            bins=(rising, "rising whole numbers, comma-separated"),
            run_files=(
                all(len(files) == 1 + self.seeds for files in self.others().values()),
                f"NAME= and {1 + self.seeds} files joined by +: of the full data and of each "
                "seed's half",
            ),
        )

    def others(self) -> dict[str, list[Path]]:
        """Row -> its run files: that of the full data, then those of each seed's half."""
        named = (text.partition("=") for text in filter(None, self.run_files.split(",")))
        return {name: [Path(path) for path in paths.split("+") if path] for name, _, paths in named}


def thin(source: Path, target: Path, share: float, seed: int) -> None:
    """Copy a prepared data set, keeping `share` of each user's train rows, rounded up.

    The other train rows become `unused`. Positive and other rows are thinned separately. The review
    text of removed rows is removed too. Does nothing if the same copy exists; raises PageLLMError
    if there is another.
    """
    record = {"from": file_id(source / "interactions.parquet"), "share": share, "seed": seed}
    if (target / "source.json").exists():
        if json.loads((target / "source.json").read_text()).get("thinned") != record:
            raise PageLLMError(f"{target} was thinned differently\n  Remove it to make it anew.")
        return
    shop = load(source)
    train = np.flatnonzero(shop.rows("train", None))
    draw = randomness.rng(seed, "thin").random(len(train))
    rank, size = group_rank(shop.user[train] * 2 + shop.positive[train], draw)
    dropped = train[rank >= np.ceil(share * size)]
    with prepare.building(target) as folder:
        for path in source.iterdir():
            shutil.copyfile(path, folder / path.name)
        table = pq.read_table(source / "interactions.parquet")
        split = np.asarray(table["split"].cast("string").to_pylist(), dtype=object)
        split[dropped] = "unused"
        at = table.column_names.index("split")
        pq.write_table(
            table.set_column(
                at, "split", pa.array(split.tolist(), pa.string()).dictionary_encode()
            ),
            folder / "interactions.parquet",
            compression="zstd",
        )
        if (source / "reviews.parquet").exists():
            reviews = pq.read_table(source / "reviews.parquet")
            gone = shop.user[dropped] * shop.n_items + shop.item[dropped]
            code = (
                reviews["user"].to_numpy().astype(np.int64) * shop.n_items
                + reviews["item"].to_numpy()
            )
            pq.write_table(
                reviews.filter(pa.array(~np.isin(code, gone))),
                folder / "reviews.parquet",
                compression="zstd",
            )
        written = {
            path.name: file_id(path)
            for path in sorted(folder.iterdir())
            if path.name != "source.json"
        }
        about = json.loads((source / "source.json").read_text()) | {
            "thinned": record,
            "written": written,
        }
        (folder / "source.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")


def groups(shop: Shop, users: np.ndarray, edges: Iterable[int]) -> dict[str, np.ndarray]:
    """Groups of users, name -> (U,) bool: all, and by train positives: up to each edge, or more."""
    count, low, found = (
        shop.csr("train").counts()[users],
        0,
        {"all": np.ones(len(users), dtype=bool)},
    )
    for edge in edges:
        found[f"{low}–{edge}"] = (low <= count) & (count <= edge)
        low = edge + 1
    return found | {f"{low}+": count >= low}


def run(config: Config) -> list[dict]:
    """Thin the data, train and score all rows, print the table. Returns the records of `drops`."""
    data = Path(config.data)
    prepared(config.dataset, config.raw, config.data, config.preset)
    options: dict[str, Any] = {
        name: overrides(module, getattr(config, name), FIXED, START.get(name))
        for name, module in STAGES.items()
    }
    plainly = overrides(compare, config.baselines, FIXED)
    options["evaluate"]["mask"] = MASK
    stages = Stages(config.data, config.runs, config.raw, **options)
    shared: dict[str, Any] = {
        "data": config.data,
        "runs": config.runs,
        "mask": MASK,
        "models": config.models,
        "rerank": "",
        "versus": config.models.split(",")[0],
        **plainly,
    }
    halves = [f"{config.dataset}-half-s{seed}" for seed in range(config.seeds)]
    for seed, half in enumerate(halves):
        thin(data / config.dataset, data / half, config.share, seed)

    def plain(dataset: str, settings: str, seed: int) -> dict[str, dict[str, np.ndarray]]:
        made = compare.Config(
            ranker="never",
            dataset=dataset,
            run=f"{config.study}/{dataset}",
            settings=settings,
            seed=seed,
            trials=config.trials,
            **shared,
        )
        compare.run(made)
        return compare.read_rows(made.stage("baselines"))[0]

    full = plain(config.dataset, config.settings, 0)
    settings = str(
        Path(config.runs) / config.study / config.dataset / "baselines" / "settings.json"
    )
    thinned = [plain(half, settings, seed) for seed, half in enumerate(halves)]
    rows = {name: ([full[name]] * config.seeds, [half[name] for half in thinned]) for name in full}
    for name, (first, *files) in config.others().items():
        rows[name] = (
            [read_scores(data / config.dataset, first)] * config.seeds,
            [read_scores(data / half, path) for half, path in zip(halves, files, strict=True)],
        )
    for policy in filter(None, config.policies.split(",")):
        variant = Variant(policy, policy=policy)
        before, after = (
            [
                per_user(run_variant(config.study, dataset, variant, seed, stages))
                for seed, dataset in enumerate(names)
            ]
            for names in ([config.dataset] * config.seeds, halves)
        )
        rows[evaluate.LABELS[policy]] = (before, after)
    shop = load(data / config.dataset)
    users = next(iter(full.values()))["user"]
    records = drops(rows, groups(shop, users, map(int, config.bins.split(","))))
    folder = Path(config.runs) / config.study
    write_table(folder / f"{config.dataset}.parquet", records)
    text = (
        f"{config.dataset}: {config.share:g} of each user's train rows, {config.seeds} draws; mean "
        "on full, on the thinned data, drop in percent; difference with its 95% interval "
        f"(bootstrap over seeds and users), d\n\n{show(records)}\n"
    )
    with atomic(folder / f"{config.dataset}.md") as beside:
        beside.write_text(text)
    print(text)
    return records


def read_scores(folder: Path, path: Path) -> dict[str, np.ndarray]:
    """Per-user scores of a run file for the prepared data in `folder`. Raises PageLLMError if they
    do not fit."""
    if not path.is_file():
        raise PageLLMError(
            f"no run file {path}\n"
            f"  Make it from {folder}, for example with pagellm/baselines/outside.py."
        )
    shop, plain = load(folder), compare.Config()
    scorer = Scorer(shop, "test")
    ranked, notes = read_run(
        path, shop, scorer.users, seen_rows(shop, "test", MASK), plain.k, plain.depth
    )
    print(f"{path}: {notes}")
    return {"user": scorer.users, **scorer(ranked, plain.k)}


def drops(rows: dict[str, tuple[list, list]], members: dict[str, np.ndarray]) -> list[dict]:
    """One record for each row, metric and group of users.

    rows     name -> (full, thinned): per-user scores of each seed
    members  group -> (U,) bool
    """
    records = []
    for name, (full, thinned) in rows.items():
        for group, mine in members.items():
            if not mine.any():
                continue
            for metric in METRICS:
                before, after = (
                    [scores[metric][mine] for scores in seeds] for seeds in (full, thinned)
                )
                change, low, high = difference(after, before, draws=1000)
                mean = float(np.nanmean(before))
                records.append(
                    {
                        "variant": name,
                        "users": group,
                        "count": int(mine.sum()),
                        "metric": metric,
                        "full": mean,
                        "thinned": float(np.nanmean(after)),
                        "difference": change,
                        "low": low,
                        "high": high,
                        "effect": effect(after, before),
                        "drop": -100 * change / mean if mean else math.nan,
                    }
                )
    return records


def show(records: list[dict]) -> str:
    """The records as a Markdown table: rows and groups down, metrics across."""
    lines = ["| | users | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 2) + "|"]
    for first in range(0, len(records), len(METRICS)):
        some = records[first : first + len(METRICS)]
        cells = [
            f"{r['full']:.4f} → {r['thinned']:.4f}, {-r['drop']:+.1f}% ({r['difference']:+.4f} "
            f"[{r['low']:+.4f}, {r['high']:+.4f}], d {r['effect']:+.2f})"
            for r in some
        ]
        who = f"{some[0]['users']} ({some[0]['count']:,})"
        lines.append(f"| {some[0]['variant']} | {who} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.coldstart"))
