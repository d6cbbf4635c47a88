"""Read what a run has left on disk, for the report: stages, results, pages, studies.

    found = read("runs", "synthetic", "data")
    found.stages["ppo"].log, found.results["PageLLM"]["ILD"]["mean"], found.pages["ppo"].item

Nothing is trained or changed. Where something is missing, `Missing` names it and the command that
makes it.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pagellm.data.shop import Shop, load, source
from pagellm.evaluate import LABELS
from pagellm.pages import stats
from pagellm.pages.ranked import RankedPages, Scorer, read_pages, with_users
from pagellm.stage import hints
from pagellm.stage.config import PageLLMError
from pagellm.stage.files import read_json, slug
from pagellm.stage.run import file_id

__all__ = [
    "DIFFERENCE",
    "Found",
    "Missing",
    "COMPOSED",
    "PPO",
    "SFT",
    "STAGES",
    "WRITERS",
    "Stage",
    "read",
]


SFT, PPO, COMPOSED = LABELS["sft"], LABELS["ppo"], LABELS["compose"]
DIFFERENCE = "PageLLM - SFT"
STAGES = ("pretrain", "sft", "reward", "ppo", "compose", "evaluate")
WRITERS = ("sft", "ppo", "compose")  # policies whose pages are shown, in this order


class Missing(Exception):
    """Raised where a section of the report cannot be made.

    what     what is missing, in words
    command  the command that makes it; "" where none does
    """

    def __init__(self, what: str, command: str = ""):
        super().__init__(what, command)
        self.what, self.command = what, command


@dataclass
class Stage:
    """One stage's directory.

    command   makes the stage, e.g. "make sft DATASET=synthetic RUN=synthetic"
    done      contents of the file `done`; {} where it does not exist
    recorded  contents of config.json: config, inputs, versions; {} where it does not exist
    log       the lines of log.jsonl
    """

    name: str
    path: Path
    command: str
    done: dict
    recorded: dict
    log: list[dict]

    def need(self, *fields: str) -> list[dict]:
        """Return the log. Raises Missing if none of its lines has one of these fields."""
        if not any(name in row for row in self.log for name in fields):
            raise Missing(f"no {self.name} log in {self.path}", self.command)
        return self.log

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of the log lines in which this field is a finite number."""
        rows = [
            (row["step"], row[name])
            for row in self.log
            if isinstance(row.get(name), int | float) and np.isfinite(row[name])
        ]
        return np.array([r[0] for r in rows]), np.array([r[1] for r in rows], dtype=float)


@dataclass
class Found:
    """A run as it lies on disk.

    results   row of the results table -> metric -> {mean, low, high, coverage, count}. Rows come
              from the metrics.json of evaluate, baselines and run files; any other pages.parquet
              below the run is scored here
    labels    key -> name of the row: "ppo" -> "PageLLM"
    pages     key -> RankedPages
    per_user  key -> {"user": (U,), metric: (U,)}
    studies   file -> records of tables.compare_seeds
    cold      file -> records of experiments.coldstart.drops
    notes     what was found but could not be used, and why
    kept      results that several sections share, so that they are computed once
    """

    run: str
    dataset: str
    stages: dict[str, Stage]
    split: str = "test"
    k: int = 20
    shop: Shop | None = None
    source: dict = field(default_factory=dict)
    scorer: Scorer | None = None
    results: dict[str, dict] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    pages: dict[str, RankedPages] = field(default_factory=dict)
    per_user: dict[str, dict] = field(default_factory=dict)
    studies: dict[str, list[dict]] = field(default_factory=dict)
    cold: dict[str, list[dict]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kept: dict = field(default_factory=dict)

    @property
    def data(self) -> Shop:
        """The prepared shop. Raises Missing where there is none."""
        if self.shop is None:
            raise Missing(f"no prepared data of {self.dataset}")
        return self.shop

    @property
    def scoring(self) -> Scorer:
        """What scores pages. Raises Missing where there is no prepared data."""
        if self.scorer is None:
            raise Missing(f"no prepared data of {self.dataset}")
        return self.scorer

    def add(self, key: str, label: str, per_user: dict[str, np.ndarray], place: Path) -> None:
        """Add a row of the results table: its users' scores, and its pages if they can be read."""
        self.labels[key], self.per_user[key] = label, per_user
        if self.shop is not None and (place / "pages.parquet").exists():
            try:
                self.pages[key] = with_users(
                    read_pages(place / "pages.parquet", self.shop), per_user["user"]
                )
            except (PageLLMError, pa.ArrowException) as error:
                self.notes.append(f"{place / 'pages.parquet'}: {error}")

    def both(self, what: str) -> tuple[RankedPages, RankedPages]:
        """Pages of SFT and of PageLLM. Raises Missing, saying that `what` needs them."""
        for name in ("sft", "ppo"):
            if name not in self.pages:
                why = f"; {self.notes[0]}" if self.notes else ""
                raise Missing(
                    f"{what} needs the pages of {LABELS[name]}{why}",
                    self.stages["evaluate"].command,
                )
        return self.pages["sft"], self.pages["ppo"]

    def written(self, what: str) -> dict[str, RankedPages]:
        """Pages of every policy of WRITERS that was evaluated, by name.

        Raises Missing, saying that `what` needs them, if there is none, and where they are of
        different users.
        """
        pages = {name: self.pages[name] for name in WRITERS if name in self.pages}
        command = self.stages["evaluate"].command
        if not pages:
            why = f"; {self.notes[0]}" if self.notes else ""
            raise Missing(f"{what} needs the pages of a policy{why}", command)
        first = next(iter(pages.values())).user
        if not all(np.array_equal(first, p.user) for p in pages.values()):
            raise Missing("the policies' pages are for different users", command)
        return pages


def read_log(path: Path) -> list[dict]:
    """Lines of a log.jsonl. Skips a half-written last line, which a killed process may leave."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def read_stage(name: str, path: Path, command: str) -> Stage:
    done, recorded = (
        {} if not (path / f).exists() else read_json(path / f) for f in ("done", "config.json")
    )
    return Stage(name, path, command, done, recorded, read_log(path / "log.jsonl"))


def read(runs: str, run: str, data: str, dataset: str = "") -> Found:
    """Read everything about one run.

    dataset  name of the data set; empty: the one that the run's stages name
    Raises PageLLMError if the run has no stage at all, or if a file is damaged.
    """
    root = Path(runs) / run
    near = {name: read_stage(name, root / name, "") for name in STAGES}
    recorded = [s.recorded["config"] for s in near.values() if s.recorded]
    if not recorded:
        raise PageLLMError(
            f"no stage in {root}: nothing to report\n"
            f"  Make one with: {hints.command('evaluate', dataset or run, run)}"
        )
    dataset = dataset or recorded[0]["dataset"]
    of = {
        key: next((c[key] for c in reversed(recorded) if c.get(key)), "")
        for key in ("source_run", "reward_run")
    }
    place = {
        "pretrain": of["source_run"],
        "sft": of["source_run"],
        "reward": of["reward_run"] or of["source_run"],
    }
    found = Found(
        run,
        dataset,
        {
            name: read_stage(
                name,
                Path(runs) / (place.get(name) or run) / name,
                hints.command(name, dataset, place.get(name) or run),
            )
            for name in STAGES
        },
    )
    config = found.stages["evaluate"].recorded.get("config", {})
    found.split, found.k = config.get("split", "test"), config.get("k", 20)
    if (Path(data) / dataset / "source.json").exists():
        found.source = source(Path(data) / dataset)
        wanted = found.stages["evaluate"].recorded.get("inputs", {}).get("data")
        if wanted in (None, file_id(Path(data) / dataset / "source.json")):
            found.shop = load(Path(data) / dataset)
            found.scorer = Scorer(found.shop, found.split)
        else:
            found.notes.append(
                f"{Path(data) / dataset} has changed since these pages were evaluated"
            )
    else:
        found.notes.append(f"no prepared data in {Path(data) / dataset}")
    for name in WRITERS:
        seen = found.stages["evaluate"].recorded.get("inputs", {}).get(name)
        if seen is not None and seen != found.stages[name].done.get("id"):
            found.notes.append(
                f"{found.stages[name].path} is not what was evaluated: made again, or gone, since"
            )
    read_results(found, Path(runs))
    read_studies(found, Path(runs))
    return found


def read_results(found: Found, runs: Path) -> None:
    """Fill the rows of the results table.

    Reads metrics.json and pages of evaluate, and of the baselines and run files of this run or of
    its data set. Scores every other pages.parquet below the run.
    """
    root, base = runs / found.run, runs / found.dataset
    made = found.stages["evaluate"].recorded
    used = set()
    folders = {
        folder.name: folder
        for place in (base, root)
        for pattern in ("baselines", "runfile-*")
        for folder in sorted(place.glob(pattern))
    }  # the run's own come last and replace those of its data set
    for folder in (root / "evaluate", *folders.values()):
        if not (folder / "done").exists() or not (folder / "metrics.json").exists():
            continue
        used.add(folder)
        theirs = read_json(folder / "config.json")
        differs = [
            what
            for what, a, b in (
                ("data", made.get("inputs", {}), theirs["inputs"]),
                ("mask", made.get("config", {}), theirs["config"]),
            )
            if what in a and what in b and a[what] != b[what]
        ]
        if differs:
            found.notes.append(
                f"{folder} was made with another {differs[0]} than evaluate: left out"
            )
            continue
        for name, scores in read_json(folder / "metrics.json").items():
            label = LABELS.get(name, name)
            if label in found.results:
                continue
            found.results[label] = scores
            place = next(
                (
                    p
                    for p in (
                        folder / name,
                        folder / slug(name),
                        folder / slug(name.split(",")[0]),
                        folder,
                    )
                    if (p / "per_user.parquet").exists()
                ),
                None,
            )
            if place is None:
                continue  # the row of differences has no pages
            table = pq.read_table(place / "per_user.parquet")
            found.add(name, label, {c: table[c].to_numpy() for c in table.column_names}, place)
    if found.shop is None or found.scorer is None:
        return
    for path in sorted(root.rglob("pages.parquet")):
        if used & {*path.parents}:
            continue
        try:
            ranked = with_users(read_pages(path, found.shop), found.scorer.users)
        except (PageLLMError, pa.ArrowException, IndexError) as error:
            found.notes.append(f"{path}: {error}")
            continue
        name = str(path.parent.relative_to(root))
        scores = found.scorer(ranked, found.k)
        found.results[name] = {
            m: stats.summary(v, 0) for m, v in scores.items() if not np.isnan(v).all()
        }
        found.add(name, name, {"user": ranked.user, **scores}, path.parent)


def read_studies(found: Found, runs: Path) -> None:
    """Read every <runs>/<study>/<dataset>-*.parquet that has the columns which a study writes."""
    for path in sorted(runs.glob("*/*.parquet")):
        if not path.name.startswith((f"{found.dataset}-", f"{found.dataset}.")):
            continue
        try:
            records = pq.read_table(path).to_pylist()
        except pa.ArrowException as error:
            found.notes.append(f"{path}: {error}")
            continue
        name, columns = str(path.relative_to(runs)), set(records[0]) if records else set()
        if {"variant", "metric", "mean", "difference", "low", "high", "versus"} <= columns:
            found.studies[name] = records
        elif {
            "variant",
            "users",
            "count",
            "metric",
            "full",
            "thinned",
            "difference",
            "low",
            "high",
        } <= columns:
            found.cold[name] = records
        else:
            found.notes.append(
                f"{path} is no table of a study: want variant, metric, mean, difference, low, high"
            )
