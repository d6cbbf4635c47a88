"""What a run has left on disk, read for the report: stages, results, pages, studies; and what follows from them.

    found = read("runs", "synthetic", "data")
    found.stages["ppo"].log, found.results["PageLLM"]["ILD"]["mean"], found.pages["ppo"].item

Nothing here is trained or changed. A stage that is missing is said by `Missing`, with the command that makes it.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pagellm.data.shop import Shop, load, source
from pagellm.evaluate import LABELS
from pagellm.model.policy import Policy
from pagellm.model.prompts import pad_ids
from pagellm.model.reward_model import RewardModel
from pagellm.pages import stats
from pagellm.pages.pairs import KINDS, Pair, from_table
from pagellm.pages.ranked import RankedPages, Scorer, read_pages, with_users
from pagellm.reward import is_held_out, score_pairs
from pagellm.serving.recommender import Ask, Recommender
from pagellm.serving.sources import Sources
from pagellm.stage import hints, randomness
from pagellm.stage.config import PageLLMError
from pagellm.stage.files import read_json, slug
from pagellm.stage.run import file_id

__all__ = [
    "Found",
    "Judged",
    "Missing",
    "STAGES",
    "Stage",
    "bins_of",
    "brand_hits",
    "hits",
    "judge",
    "judge_rows",
    "margins",
    "page_items",
    "prompt_text",
    "read",
    "trace",
]


STAGES = ("pretrain", "sft", "reward", "ppo", "evaluate")


class Missing(Exception):
    """A section cannot be made: what is missing, and the command that makes it ("" if none does)."""

    def __init__(self, what: str, command: str = ""):
        super().__init__(what, command)
        self.what, self.command = what, command


@dataclass
class Stage:
    """One stage's directory. done, recorded ({config, inputs, versions}): {} where the file is not there."""

    name: str
    path: Path
    command: str
    done: dict
    recorded: dict
    log: list[dict]

    def need(self, *fields: str) -> list[dict]:
        """The log, if the stage has run and has a line with one of these fields. Raises Missing."""
        if not any(name in row for row in self.log for name in fields):
            raise Missing(f"no {self.name} log in {self.path}", self.command)
        return self.log

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """step, value of the log's lines that have this field as a finite number."""
        rows = [
            (row["step"], row[name])
            for row in self.log
            if isinstance(row.get(name), int | float) and np.isfinite(row[name])
        ]
        return np.array([r[0] for r in rows]), np.array([r[1] for r in rows], dtype=float)


@dataclass
class Found:
    """A run as it lies on disk.

    results   row of the table -> metric -> {mean, low, high, coverage, count}; the metrics.json of evaluate and of
              baselines as they are, and whatever other pages.parquet lies below the run, scored here
    labels    key -> row of the table: "ppo" -> "PageLLM"
    pages     key -> RankedPages        per_user  key -> {"user": (U,), metric: (U,)}
    studies   file -> records of tables.compare_seeds        cold  the same of experiments.coldstart.drops
    notes     what was found but could not be used, and why
    kept      results that several sections share
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

    def add(self, key: str, label: str, per_user: dict[str, np.ndarray], place: Path) -> None:
        """A row of the table with its users' scores, and its pages where they can be read."""
        self.labels[key], self.per_user[key] = label, per_user
        if self.shop is not None and (place / "pages.parquet").exists():
            try:
                self.pages[key] = with_users(
                    read_pages(place / "pages.parquet", self.shop), per_user["user"]
                )
            except (PageLLMError, pa.ArrowException) as error:
                self.notes.append(f"{place / 'pages.parquet'}: {error}")

    def both(self, what: str) -> tuple[RankedPages, RankedPages]:
        """SFT's and PageLLM's pages of the same users. Raises Missing."""
        for name in ("sft", "ppo"):
            if name not in self.pages:
                why = f"; {self.notes[0]}" if self.notes else ""
                raise Missing(
                    f"{what} needs the pages of {LABELS[name]}{why}",
                    self.stages["evaluate"].command,
                )
        return self.pages["sft"], self.pages["ppo"]


def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl; a last line that a dying process left half-written is passed over."""
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
    """Everything about one run. dataset empty: the one its stages name.

    Raises PageLLMError if the run has no stage at all, or a file is damaged.
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
    for name in ("sft", "ppo"):
        seen = found.stages["evaluate"].recorded.get("inputs", {}).get(name)
        if seen is not None and seen != found.stages[name].done.get("id"):
            found.notes.append(
                f"{found.stages[name].path} is not what was evaluated: made again, or gone, since"
            )
    read_results(found, Path(runs))
    read_studies(found, Path(runs))
    return found


def read_results(found: Found, runs: Path) -> None:
    """metrics.json and pages of evaluate, of baselines and run files of this run or its data set; other pages.parquet
    below the run are scored."""
    root, base = runs / found.run, runs / found.dataset
    made = found.stages["evaluate"].recorded
    used = set()
    folders = {
        folder.name: folder
        for place in (base, root)
        for pattern in ("baselines", "runfile-*")
        for folder in sorted(place.glob(pattern))
    }  # the run's own come last, and so count
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
                continue  # a difference: it has no pages
            table = pq.read_table(place / "per_user.parquet")
            found.add(name, label, {c: table[c].to_numpy() for c in table.column_names}, place)
    if found.shop is None:
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
    """<runs>/<study>/<dataset>-*.parquet with the columns that a study writes."""
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


def hits(pages: RankedPages, scorer: Scorer, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(U, k) bool: the slot holds a held-out item of its user; (U, k) bool: another item of such an item's category."""
    item, shop = page_items(pages, k), scorer.shop
    user = np.repeat(np.arange(shop.n_users), scorer.held.counts())
    exact = np.isin(
        pages.user[:, None] * shop.n_items + item, user * shop.n_items + scorer.held.items
    ) & (item >= 0)
    return exact, shared(pages.user, item, scorer, shop.catalogue.leaf_id) & ~exact


def brand_hits(pages: RankedPages, scorer: Scorer, k: int) -> np.ndarray:
    """(U, k) bool: the slot holds an item, not itself held out, of the brand of a held-out item of its user."""
    item = page_items(pages, k)
    return (
        shared(pages.user, item, scorer, scorer.shop.catalogue.brand_id)
        & ~hits(pages, scorer, k)[0]
    )


def shared(users: np.ndarray, item: np.ndarray, scorer: Scorer, group: np.ndarray) -> np.ndarray:
    """(U, k) bool: the group (N,) of the slot's item, -1 where unknown, is that of a held-out item of its user."""
    n, owner = (
        int(group.max(initial=-1)) + 2,
        np.repeat(np.arange(scorer.shop.n_users), scorer.held.counts()),
    )
    held = group[scorer.held.items]
    have = np.where(item >= 0, group[np.maximum(item, 0)], -1)
    return (have >= 0) & np.isin(users[:, None] * n + have, (owner * n + held)[held >= 0])


def page_items(pages: RankedPages, k: int) -> np.ndarray:
    """(U, k) items of the pages' own slots, -1 past the end."""
    item = np.full((len(pages.user), k), -1, dtype=np.int64)
    width = min(k, pages.item.shape[1])
    item[:, :width] = np.where(np.arange(width) < pages.slots[:, None], pages.item[:, :width], -1)
    return item


@dataclass
class Judged:
    """Rewards of the pages of some users, drawn once for good; columns: without reward, with it.

    user (n,)    row (n,) their rows in the pages    token (2, n, k) NaN past the end    total (2, n)
    """

    user: np.ndarray
    row: np.ndarray
    token: np.ndarray
    total: np.ndarray


def judge(found: Found, config, limit: int, batch: int = 128) -> Judged:
    """What the reward model says of both policies' pages of at most `limit` users, drawn at random. Raises Missing."""
    n = len(found.both("scoring pages")[0].user)
    return judge_rows(
        found,
        config,
        np.sort(randomness.rng(config.seed, "report", "judged").permutation(n)[:limit]),
        batch,
    )


@torch.no_grad()
def judge_rows(found: Found, config, row: np.ndarray, batch: int = 128) -> Judged:
    """`judge` for these rows (n,) of the pages."""
    both = found.both("scoring pages")
    for name in ("sft", "reward"):
        if not found.stages[name].done:
            raise Missing(
                f"no {name} model in {found.stages[name].path}", found.stages[name].command
            )
    if not np.array_equal(both[0].user, both[1].user):
        raise Missing(
            "the two policies' pages are for different users", found.stages["evaluate"].command
        )
    of = {name: found.stages[name].path.parent.name for name in ("sft", "reward")}
    rec = Recommender.load(
        Sources(
            dataset=found.dataset,
            run=found.run,
            data=config.data,
            runs=config.runs,
            source_run=of["sft"],
            reward_run=of["reward"],
            split=found.split,
            device=config.device,
        ),
        policies=("sft",),
        reward=True,
    )
    token, total = np.full((2, len(row), found.k), np.nan), np.zeros((2, len(row)))
    for side, pages in enumerate(both):
        items = page_items(pages, found.k)[row]
        for at in range(0, len(row), batch):
            some, users = items[at : at + batch], pages.user[row[at : at + batch]]
            asks = [rec.resolve(Ask(user=found.shop.user_ids[u], policy="sft", k=1)) for u in users]
            item = torch.from_numpy(pad_ids([i[i >= 0] for i in some], -1, found.k))
            slots, page = rec.rewards(asks, item, item >= 0)
            kept = (item >= 0).numpy()
            token[side, at : at + batch] = np.where(kept, slots.numpy(), np.nan)
            total[side, at : at + batch] = page.numpy() + np.where(kept, slots.numpy(), 0).sum(
                1
            ) / kept.sum(1).clip(1)
    return Judged(both[0].user[row], row, token, total)


def trace(token: np.ndarray) -> np.ndarray:
    """(..., K) rewards of slots, NaN past the end -> the part of Eq. 6's R_f that the slots down to k have brought,
    sum_{t <= k} r_t / T; the last one is R_f itself."""
    kept = ~np.isnan(token)
    total = np.cumsum(np.where(kept, token, 0.0), axis=-1) / np.maximum(
        kept.sum(-1, keepdims=True), 1
    )
    return np.where(kept, total, np.nan)


def prompt_text(policy: Policy, found: Found, user: int) -> str:
    """The prompt that a user's page was written behind, token by token, users and items by the shop's own ids."""
    history = found.shop.csr("train").of(user)
    ids = policy.prompts.page(user if policy.style.use_user else None, *history)
    v, c = policy.vocab, found.shop.catalogue
    parts = [
        f"<{found.shop.user_ids[t - v.user0]}>"
        if v.user0 <= t < v.item0
        else f" <{c.ids[t - v.item0]}>"
        if t >= v.item0
        else v.decode([t])
        for t in ids
    ]
    return "".join(parts)


def margins(found: Found, config, per_kind: int) -> dict[str, np.ndarray]:
    """kind -> (n, 2): margin of the reward (chosen minus rejected) and of the energy, on held-out users' pairs.

    At most per_kind of a kind, drawn once for good. Raises Missing.
    """
    stage = found.stages["reward"]
    if not stage.done or not (stage.path / "pairs.parquet").exists():
        raise Missing(f"no reward model in {stage.path}", stage.command)
    if found.shop is None:
        raise Missing(found.notes[0], hints.command("prepare", found.dataset))
    before = SimpleNamespace(**stage.recorded["config"])
    table = pq.read_table(stage.path / "pairs.parquet")
    users, back = np.unique(table["user"].to_numpy(), return_inverse=True)
    held = np.array([is_held_out(int(u), before) for u in users])[back]
    kind = np.array(table["kind"].to_pylist())
    policy = Policy.load(found.stages["sft"].path, "cpu")
    model = RewardModel.load(stage.path, "cpu")
    out = {}
    for name in KINDS:
        rows = np.flatnonzero(held & (kind == name))
        if not len(rows):
            continue
        rows = np.sort(
            randomness.rng(config.seed, "report", "pairs", name).permutation(rows)[:per_kind]
        )
        pairs: list[Pair] = from_table(table.take(rows))
        scores = score_pairs(model, pairs, policy)
        total = scores["page"] + scores["token"]
        out[name] = np.stack([total[:, 0] - total[:, 1], [p.delta_E for p in pairs]], 1)
    return out


def bins_of(values: np.ndarray, n: int) -> list[np.ndarray]:
    """Up to n groups of rows with rising values and about equally many rows; equal values stay together."""
    if not len(values):
        return []
    edges = np.unique(np.quantile(values, np.linspace(0, 1, n + 1)[1:-1], method="higher"))
    index = np.searchsorted(edges, values, side="right")
    return [rows for g in range(len(edges) + 1) if len(rows := np.flatnonzero(index == g))]
