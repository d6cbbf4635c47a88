"""Evaluation: policies -> pages.parquet -> one piece of code that scores them all.

Reads   data/<dataset>, runs/<run>/sft, runs/<run>/ppo
Writes  runs/<run>/evaluate                 <policy>/pages.parquet (user, rank, item, score, page)
                                            <policy>/per_user.parquet, metrics.json, table.txt

    make evaluate                           python -m pagellm.evaluate --dataset synthetic --policies popularity,sft

Every ranking is over the whole catalogue less what the mask takes out, and every test user counts. Equal scores go by
a seeded shuffle. Where runs/<dataset>/baselines lies, its rows are printed below, and a policy beyond three times
EASE stops as a suspected leak. Seconds for the synthetic shop on two CPU cores.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pagellm import metrics
from pagellm.data.shop import SPLITS, Rows, Shop, load
from pagellm.policy import BLOCK, MODES, Policy, RankedPages, Scorer, ties
from pagellm.stage import dist, randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import atomic, write_json
from pagellm.stage.run import Run, StageConfig, file_id, finished
from pagellm.top import largest

__all__ = [
    "COLUMNS",
    "Config",
    "LABELS",
    "audience",
    "check_leak",
    "check_mask",
    "check_pages",
    "popularity_pages",
    "rank_all",
    "read_pages",
    "run",
    "seen_rows",
    "table",
    "top_items",
    "with_users",
    "write_pages",
]


LABELS = {"popularity": "popularity", "sft": 'SFT = "w/o reward"', "ppo": "PageLLM"}
DIFFERENCE = "PageLLM - SFT"  # the paired row of the table
COLUMNS = (
    "Recall@20",
    "Recall@40",
    "NDCG@100",
    "WAS",
    "PWKT",
    "WMRD",
    "DPA",
    "ILD",
    "entropy",
    "redundancy",
    "duplicate_rate",
)
SUSPECT = 3.0  # times EASE: more than any honest recommender gains on it


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Write everybody's pages with each policy, score them on held-out items, print the table and some pages."""

    source_run: str = ""  # run whose sft is read; empty: this run (studies share one)
    policies: str = "popularity,sft,ppo"  # which to evaluate, comma-separated
    split: str = "test"  # held-out rows that count as right: test or valid
    mask: str = "train+valid"  # splits whose items no page may hold; "train":
    # as some papers do. With split=valid always train
    k: int = 20  # slots of a page, decoded one after another
    depth: int = 100  # ranks in all; past the page by the first slot's logits
    mode: str = "greedy"  # greedy, beam, or one_shot (all ranks by the first slot's logits)
    batch: int = 256  # users decoded at once
    n_boot: int = 1000  # bootstrap draws behind an interval
    examples: int = 3  # users whose pages are printed
    quiet: bool = False  # write the files, print nothing

    def __post_init__(self):
        super().__post_init__()
        names = self.policies.split(",")
        check(
            self,
            policies=(
                set(names) <= set(LABELS) and len(set(names)) == len(names),
                f"some of {','.join(LABELS)}",
            ),
            split=(self.split in ("test", "valid"), "test or valid"),
            mask=check_mask(self.mask),
            k=(self.k > 0, "1 or more"),
            depth=(self.depth >= self.k, f"k={self.k} or more"),
            mode=(self.mode in MODES, ", ".join(MODES)),
            batch=(self.batch > 0, "1 or more"),
            n_boot=(self.n_boot > 1, "2 or more"),
            examples=(self.examples >= 0, "0 or more"),
        )


def check_mask(mask: str) -> tuple[bool, str]:
    """Whether a Config's mask is one, and what would be: a rule for config.check."""
    names = mask.split("+")
    return (
        "train" in names and set(names) <= set(SPLITS) - {"test"} and len(set(names)) == len(names),
        "train, train+valid or train+valid+unused",
    )


def seen_rows(shop: Shop, split: str, mask: str) -> Rows:
    """What no page may hold when `split` is scored: rows of the mask's splits, liked or not; for valid, train's."""
    return shop.csr(tuple(mask.split("+")) if split == "test" else "train", positive=None)


def top_items(
    score: Tensor, users: np.ndarray, seen: Rows, depth: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The best `depth` items of each user that are not in `seen`, over the whole catalogue.

    score (B, N) float, users (B,). Returns item (B, depth) int64, -1 past the end, and score (B, depth) float32.
    Equal scores go by policy.ties. Raises ValueError on a NaN.
    """
    score = score.detach().float().contiguous().numpy()
    row, gone = seen.flat(users)
    before = score[row, gone]
    if np.isnan(before).any():
        raise ValueError("top_items: a score is NaN")
    rank = ties(seed, users, len(seen.indptr) - 1, score.shape[1])
    # in the caller's memory, and back again: a copy would cost more than all the rest
    score[row, gone] = -np.inf
    try:
        item, value = largest(score, depth, rank)
    finally:
        score[row, gone] = before
    return torch.from_numpy(item), torch.from_numpy(value)


def rank_all(
    score: Callable[[np.ndarray], Tensor],
    users: np.ndarray,
    seen: Rows,
    k: int,
    depth: int,
    seed: int = 0,
    block: int = 128,
) -> RankedPages:
    """`top_items` of many users, `block` at once; score: users (B,) -> (B, N)."""
    parts = [
        top_items(score(some), some, seen, depth, seed)
        for some in (users[at : at + block] for at in range(0, len(users), block))
    ]
    item, value = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return RankedPages(users, item, value, np.minimum((item >= 0).sum(1), k))


def popularity_pages(
    shop: Shop, users: np.ndarray, seen: Rows, k: int, depth: int, seed: int = 0
) -> RankedPages:
    """The most bought train items that a user has not seen."""
    count = torch.from_numpy(np.bincount(shop.csr("train").items, minlength=shop.n_items)).float()
    block = max(1, min(512, BLOCK // max(1, shop.n_items)))
    return rank_all(lambda some: count.expand(len(some), -1), users, seen, k, depth, seed, block)


def check_pages(name: str, ranked: RankedPages, users: np.ndarray, seen: Rows) -> None:
    """Raise PageLLMError unless these are lists of exactly these users (rising), free of masked items."""
    if not np.array_equal(ranked.user, users):
        raise PageLLMError(
            f"{name}: lists of {len(ranked.user):,} users, where {len(users):,} have held-out "
            "items: every one of them must count\n  Write a list, if an empty one, for each."
        )
    base = max(int(seen.items.max(initial=0)), int(ranked.item.max(initial=0))) + 1
    masked = np.repeat(np.arange(len(seen.indptr) - 1), seen.counts()) * base + seen.items
    shown = (ranked.user[:, None] * base + ranked.item)[ranked.item >= 0]
    bad = np.isin(shown, masked)
    if bad.any():
        user, item = divmod(int(shown[bad][0]), base)
        raise PageLLMError(
            f"{name}: {int(bad.sum()):,} listed items are masked, first item {item} of user "
            f"{user}\n  Leave out what the mask takes out before ranking."
        )


def check_leak(
    name: str,
    scores: dict[str, np.ndarray],
    n_labels: np.ndarray,
    ease: dict[str, dict] | None = None,
) -> None:
    """Raise PageLLMError for scores that no honest run has.

    scores    as Scorer gives them        n_labels (U,) held-out items of each user
    ease      metric -> {"mean": ...} of EASE on the same users: more than SUSPECT times that is a suspected leak,
              and where EASE is so good that nothing can be, an NDCG that misses less than 1 / SUSPECT of what it misses
    """
    bound = metrics.ndcg_bound(n_labels, {20: scores["Recall@20"], 40: scores["Recall@40"]})
    above = scores["NDCG@100"] > bound + 1e-9
    if above.any():
        raise PageLLMError(
            f"{name}: NDCG@100 of {int(above.sum()):,} users exceeds what their recall allows: "
            "suspected leak or broken metric\n  Look at how these lists were scored."
        )
    look = (
        "  Look for held-out rows in what it was fitted to, or for ranking among a few candidates."
    )
    for metric in ("Recall@20", "Recall@40", "NDCG@100"):
        mean, plain = (
            float(np.nanmean(scores[metric])),
            (ease or {}).get(metric, {}).get("mean", np.inf),
        )
        if mean > SUSPECT * plain > 0:
            raise PageLLMError(
                f"{name}: {metric} {mean:.4f} is more than {SUSPECT:g} times EASE's {plain:.4f}: "
                f"suspected leak\n{look}"
            )
    # Recall is let off: where a page holds most of a small catalogue, anybody's is nearly 1.
    if SUSPECT * plain >= 1 and 1 - mean < (1 - plain) / SUSPECT:
        raise PageLLMError(
            f"{name}: NDCG@100 {mean:.4f} misses less than 1/{SUSPECT:g} of what EASE's {plain:.4f} "
            f"misses: suspected leak\n{look}"
        )


def audience(shop: Shop, scorer: Scorer, mask: str, split: str = "test") -> str:
    """One sentence on who and what is scored: users, cold users, cold held-out items, mask, candidates."""
    users, held = scorer.users, scorer.held
    cold = int((shop.csr("train").counts()[users] == 0).sum())
    trained = np.bincount(shop.csr("train").items, minlength=shop.n_items) > 0
    return (
        f"{len(users):,} users, all counted, {cold:,} of them cold (no train row); {len(held.items):,} held-out "
        f"items, {int((~trained[held.items]).sum()):,} of them cold; ranked: all {shop.n_items:,} items less the "
        f"user's {mask if split == 'test' else 'train'} rows"
    )


def write_pages(path: Path, ranked: RankedPages) -> None:
    """pages.parquet: user, rank (from 1), item, score, page (True on the page's own slots)."""
    kept = ranked.item >= 0
    rank = np.broadcast_to(np.arange(1, ranked.item.shape[1] + 1), kept.shape)
    user = np.broadcast_to(ranked.user[:, None], kept.shape)
    on_page = rank <= ranked.slots[:, None]
    with atomic(path) as beside:
        pq.write_table(
            pa.table(
                {
                    "user": user[kept].astype(np.int32),
                    "rank": rank[kept].astype(np.int32),
                    "item": ranked.item[kept].astype(np.int32),
                    "score": ranked.score[kept],
                    "page": on_page[kept],
                }
            ),
            beside,
        )


def read_pages(path: Path, shop: Shop) -> RankedPages:
    """The inverse of write_pages; also takes pages.parquet from any other library (columns user, rank, item).

    Raises PageLLMError for missing columns, unknown users or items, or ranks that are not 1, 2, 3 ...
    """
    data = pq.read_table(path)
    missing = {"user", "rank", "item"} - set(data.column_names)
    if missing:
        raise PageLLMError(f"{path}: no column {', '.join(sorted(missing))}; want user, rank, item")
    user, rank, item = (data[c].to_numpy().astype(np.int64) for c in ("user", "rank", "item"))
    for name, values, n in (("user", user, shop.n_users), ("item", item, shop.n_items)):
        if len(values) and not (0 <= values.min() and values.max() < n):
            raise PageLLMError(
                f"{path}: {name} {values.min()}..{values.max()} is outside 0..{n - 1}"
            )
    order = np.lexsort((rank, user))
    user, rank, item = user[order], rank[order], item[order]
    users, start, count = np.unique(user, return_index=True, return_counts=True)
    if not np.array_equal(rank, np.arange(len(rank)) - np.repeat(start, count) + 1):
        raise PageLLMError(f"{path}: the ranks of a user must be 1, 2, 3 ... without gap or repeat")
    grid = np.full((len(users), count.max(initial=1)), -1, dtype=np.int64)
    score = np.full(grid.shape, -np.inf, dtype=np.float32)
    row = np.repeat(np.arange(len(users)), count)
    grid[row, rank - 1] = item
    score[row, rank - 1] = (
        data["score"].to_numpy()[order] if "score" in data.column_names else -rank
    )
    slots = (
        np.bincount(row, data["page"].to_numpy(zero_copy_only=False)[order], len(users)).astype(
            np.int64
        )
        if "page" in data.column_names
        else count
    )
    return RankedPages(users, grid, score, slots)


def with_users(ranked: RankedPages, users: np.ndarray) -> RankedPages:
    """The same lists with an empty one for each of `users` (rising) that a file cannot hold, having no row."""
    at = np.searchsorted(users, ranked.user)
    item = np.full((len(users), ranked.item.shape[1]), -1, np.int64)
    score, slots = np.full(item.shape, -np.inf, np.float32), np.zeros(len(users), np.int64)
    item[at], score[at], slots[at] = ranked.item, ranked.score, ranked.slots
    return RankedPages(users, item, score, slots)


def heading(name: str) -> str:
    """A column's heading: its name and the direction that is better."""
    return f"{name} {'↑' if metrics.DIRECTION.get(name, 'up') == 'up' else '↓'}"


def table(results: dict[str, dict[str, dict]], columns: tuple[str, ...], per_block: int = 6) -> str:
    """Rows of policies, columns of metrics: the mean, and under it its 95% interval, in blocks of columns.

    results  policy -> metric -> {mean, low, high} as metrics.summary gives; a metric nobody has is left out
    """
    columns = tuple(c for c in columns if any(c in scores for scores in results.values()))
    width = max(20, *(len(LABELS.get(name, name)) + 2 for name in results)) if results else 20
    lines = []
    for start in range(0, len(columns), per_block):
        block = columns[start : start + per_block]
        lines.append(" " * width + "".join(f"{heading(c):>20}" for c in block))
        for name, scores in results.items():
            cells = [scores.get(c, {"mean": None}) for c in block]
            sign = "+" if name == DIFFERENCE else ""
            means = ["–" if c["mean"] is None else f"{c['mean']:{sign}.4f}" for c in cells]
            spans = [
                "" if c["mean"] is None else f"[{c['low']:{sign}.4f}, {c['high']:{sign}.4f}]"
                for c in cells
            ]
            lines.append(
                f"{LABELS.get(name, name):<{width}}" + "".join(f"{cell:>20}" for cell in means)
            )
            lines.append(" " * width + "".join(f"{cell:>20}" for cell in spans))
        lines.append("")
    return "\n".join(lines[:-1])


def show_pages(
    shop: Shop, pages: dict[str, RankedPages], held, history, count: int, k: int, seed: int
) -> str:
    """The pages of a few users as people read them: history, held-out items, then each policy's first k."""
    if not pages or not count:
        return ""
    last = list(pages.values())[-1]
    chosen = randomness.rng(seed, "examples").permutation(len(last.user))[:count]
    name_of = [
        title or item for title, item in zip(shop.catalogue.title, shop.catalogue.ids, strict=True)
    ]
    leaf = shop.catalogue.leaf
    lines = []
    for row in sorted(chosen):
        user = int(last.user[row])
        right = set(held.of(user)[0].tolist())
        liked = [
            f"{name_of[i]}" + ("" if np.isnan(r) else f" ({r:.0f}★)")
            for i, r in zip(*history.of(user), strict=True)
        ]
        lines += [
            f"user {shop.user_ids[user]}",
            "  history   " + "; ".join(liked[-6:]),
            "  held out  " + "; ".join(name_of[i] for i in right),
        ]
        for policy, ranked in pages.items():
            lines.append(f"  {LABELS.get(policy, policy)}")
            page = ranked.item[row][: min(k, int(ranked.slots[row]))]
            lines += [
                f"   {'✓' if i in right else ' '}{rank:3d}  {name_of[i]}"
                + (f"  [{leaf[i]}]" if leaf[i] else "")
                for rank, i in enumerate(page.tolist(), 1)
                if i >= 0
            ]
        lines.append("")
    return "\n".join(lines[:-1])


def run(config: Config) -> dict[str, dict[str, dict]]:
    """-> policy -> metric -> {mean, low, high, coverage, count}; {} elsewhere than in the main process."""
    where = {"sft": config.stage("sft", config.source_run), "ppo": config.stage("ppo")}
    shop = load(config.data_dir)
    names, inputs = config.policies.split(","), {"data": file_id(config.data_dir / "source.json")}
    for name in names:
        if name in where:
            inputs[name] = finished(where[name], f"{LABELS[name]} policy", config.make(name))["id"]
    free = ("batch", "examples", "quiet")
    device = dist.start(config.device)
    with Run(config.stage("evaluate"), config, inputs, free) as out:
        if out.done:
            if dist.is_main() and not config.quiet:
                print((out.path / "table.txt").read_text())
            return json.loads((out.path / "metrics.json").read_text())
        scorer = Scorer(shop, config.split)
        history, held = shop.csr("train"), scorer.held
        seen = seen_rows(shop, config.split, config.mask)
        baselines = baselines_of(config)
        users = scorer.users
        if len(users) == 0:
            raise PageLLMError(
                f"{config.data_dir} has no {config.split} rows: nothing to evaluate on"
            )
        results, pages, rows, written = {}, {}, {}, {}
        for name in names:
            if name == "popularity":
                ranked = popularity_pages(shop, users, seen, config.k, config.depth, config.seed)
            elif inputs[name] in written:  # ppo kept sft's weights: its pages are these
                ranked = written[inputs[name]]
            else:
                policy = Policy.load(where[name], device)
                ranked = written[inputs[name]] = policy.rank(
                    users,
                    history,
                    seen,
                    config.k,
                    config.depth,
                    config.mode,
                    config.batch,
                    "" if config.quiet else f"pages of {name}",
                    shop.moments(config.split),
                    config.seed,
                )
            folder = out.path / name
            # it has done its share of the pages; the main process scores and writes
            if not dist.is_main():
                continue
            folder.mkdir(exist_ok=True)
            write_pages(folder / "pages.parquet", ranked)
            check_pages(name, ranked, users, seen)
            scores = scorer(with_users(read_pages(folder / "pages.parquet", shop), users), config.k)
            check_leak(name, scores, scorer.held.counts()[users], baselines.get("EASE"))
            with atomic(folder / "per_user.parquet") as beside:
                pq.write_table(pa.table({"user": ranked.user, **scores}), beside)
            results[name] = {
                metric: metrics.summary(values, config.seed, config.n_boot)
                for metric, values in scores.items()
                if not np.isnan(values).all()
            }
            pages[name], rows[name] = ranked, scores
        if not dist.is_main():
            dist.barrier()
            return {}
        text = table(results, COLUMNS)
        if "sft" in rows and "ppo" in rows:
            results[DIFFERENCE] = {
                metric: metrics.paired(
                    rows["ppo"][metric], rows["sft"][metric], config.seed, config.n_boot
                )
                for metric in results["ppo"]
            }
            text = table(results, (*COLUMNS, "energy", "true_energy"))
        short = int((pages[names[-1]].slots < config.k).sum())
        text = (
            f"{config.dataset}: {len(users):,} users, {shop.n_items:,} items, {config.split} split, pages of "
            f"{config.k}; mean over users and its 95% bootstrap interval\n"
            f"{audience(shop, scorer, config.mask, config.split)}\n\n{text}\n"
            + (
                f"\n{short} pages are shorter than {config.k}: no more legal items\n"
                if short
                else ""
            )
            + "\n"
            + show_pages(shop, pages, held, history, config.examples, config.k, config.seed)
            + "\n"
        )
        write_json(out.path / "metrics.json", results)
        with atomic(out.path / "table.txt") as beside:
            beside.write_text(text)
        out.finish(users=len(users))
        if not config.quiet:
            print(text)
            print(
                f"beside: runs of make baselines DATASET={config.dataset}\n\n{table(baselines, COLUMNS[:3])}"
                if baselines
                else f"plain baselines beside this: make baselines DATASET={config.dataset}"
            )
        return results


def baselines_of(config: Config) -> dict[str, dict[str, dict]]:
    """The baselines' scores of this data set, if they are there and were made on the same split under the same mask."""
    folder = Path(config.runs) / config.dataset / "baselines"
    if config.split != "test" or not (folder / "done").exists():
        return {}
    made = json.loads((folder / "config.json").read_text())
    if made["config"]["mask"] != config.mask or made["inputs"]["data"] != file_id(
        config.data_dir / "source.json"
    ):
        return {}
    return json.loads((folder / "metrics.json").read_text())


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm.evaluate"))
