"""The page of rows as one more arm: beside PageLLM's flat pages, ALS with MMR, and static rows.

Reads   data/<dataset>, runs/<run>/{ppo or sft, compose, evaluate, baselines, storefront}, and
        reward where it is there
Writes  runs/<run>/storefront-arms/<arm>/pages.parquet, per_user.parquet; metrics.json, table.txt

    python -m experiments.storefront --dataset synthetic

All pages have as many slots as the layout (4 rows of 5), leave out what the user has already, and
are scored by the code of `pagellm evaluate`. Reward is PageLLM's, in reward-model units. On the
made-up shop, whose truth is known, adds per page view and per visit come in closed form and from
simulated visitors, who read row by row (pagellm/online/simulator.py). These lifts are statements
about the test, not earnings. On a real shop the table ends before them. Takes a minute.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from pagellm.data.shop import load
from pagellm.model.policy import Policy
from pagellm.model.reward_model import RewardModel
from pagellm.online import abtest, simulator
from pagellm.pages import stats
from pagellm.pages.ranked import RankedPages, Scorer, read_pages, score_row, seen_rows, with_users
from pagellm.serving.sources import pick_policy
from pagellm.stage import dist
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError
from pagellm.stage.files import atomic, write_json
from pagellm.stage.hints import counted
from pagellm.storefront.front import Sources, Store, open_store, with_tuning
from pagellm.storefront.page import page
from pagellm.storefront.parts import Layout, Placement, Weights
from pagellm.storefront.tune import calibrate, people_of

__all__ = ["Config", "keep", "rewards", "run", "tested"]

ROWS, COLUMNS = 4, 5
SHOWN = ("Recall@20", "NDCG@100", "ILD", "entropy", "energy", "reward", "per view", "per visit")
FIRST = "PageLLM"  # the arm that all others are compared with


@dataclass(frozen=True, kw_only=True)
class Config(Sources):
    """Score the page of rows beside flat pages, as one more arm."""

    visitors: int = 200_000  # simulated visitors of each arm
    n_boot: int = 1000  # bootstrap draws behind an interval


def grid(slots: int = ROWS * COLUMNS) -> Layout:
    """Rows of items that are new to the person."""
    names = (f"p{n}" for n in range(1, slots // COLUMNS + 1))
    return Layout("grid", tuple(Placement(name, "discover", COLUMNS) for name in names))


def rows_of_everybody(store: Store, users: np.ndarray, seen, layout: Layout) -> RankedPages:
    """Everybody's page of rows in reading order. seen: what no page may hold."""
    width = sum(placement.slots for placement in layout.placements)
    item = np.full((len(users), width), -1, dtype=np.int64)
    score = np.full(item.shape, -np.inf, dtype=np.float32)
    slots = np.zeros(len(users), dtype=np.int64)
    for at, user in enumerate(users.tolist()):
        gone = np.unique(seen.of(user)[0])
        context = store.known.context(store.shop.user_ids[user], gone)
        found = page(store.front, context, layout, 0).items()
        slots[at] = len(found)
        item[at, : len(found)] = found
        # Only the order counts: a row below may hold a better item than the row above it.
        score[at, : len(found)] = -np.arange(len(found))
    return RankedPages(users, item, score, slots)


def tuned_store(config: Config, ranker: str) -> Store:
    """A storefront with this ranker, calibrated on validation rows; the score is the ranker's."""
    store = open_store(replace(config, ranker=ranker, scores=""))
    users, labels = people_of(store, "valid")
    platt, _ = calibrate(store, users, labels, config.seed)
    tuned = {
        "ranker": store.front.ranker.name,
        "platt": [platt.alpha, platt.beta],
        "weights": vars(Weights(0.0, 0.0, 0.0, 0.0)),
    }
    return replace(store, front=with_tuning(store.front, tuned))


def arms_of(config: Config, shop, scorer: Scorer, seen) -> dict[str, RankedPages]:
    """name -> pages of all users with held-out rows."""
    found, layout = {}, grid()
    kept = {
        FIRST: config.stage("evaluate") / "compose",
        "PageLLM, ppo": config.stage("evaluate") / "ppo",
        "PageLLM, sft": config.stage("evaluate") / "sft",
        "ALS + MMR": config.stage("baselines") / "als---mmr",
    }
    for name, folder in kept.items():
        if (folder / "pages.parquet").exists():
            pages = with_users(read_pages(folder / "pages.parquet", shop), scorer.users)
            k = ROWS * COLUMNS
            slots = np.minimum(pages.slots, k)
            found[name] = RankedPages(pages.user, pages.item[:, :k], pages.score[:, :k], slots)
    if FIRST not in found:
        raise PageLLMError(f"no composed pages to compare with\n  {config.make('evaluate')}")
    policy = pick_policy("", config.stage, config.make)
    rankers = (("blend", "blend"), (f"{policy} ranks", "policy"), ("PageLLM ranks", "compose"))
    for name, ranker in rankers:
        store = tuned_store(config, ranker)
        found[f"rows, {name}"] = rows_of_everybody(store, scorer.users, seen, layout)
        static = replace(store, front=replace(store.front, static=True))
        found[f"static rows, {name}"] = rows_of_everybody(static, scorer.users, seen, layout)
    return found


def rewards(config: Config, shop, pages: dict[str, RankedPages]) -> dict[str, np.ndarray]:
    """name -> (U,) PageLLM's page reward of given pages, whoever made them."""
    device = dist.start(config.device)
    name = pick_policy("", config.stage, config.make)
    policy = Policy.load(config.stage(name), device)
    model = RewardModel.load(config.stage("reward"), device).eval()
    history, found = shop.csr("train"), {}
    for arm, ranked in pages.items():
        parts = []
        for start in range(0, len(ranked.user), 256):
            some = slice(start, start + 256)
            users = ranked.user[some]
            prompt, valid = policy.prompt(users, [history.of(u) for u in users])
            item = torch.from_numpy(ranked.item[some]).to(device)
            with torch.no_grad():
                parts.append(model(prompt, valid, item.clamp(min=0), item >= 0)[1].cpu().numpy())
        found[arm] = np.concatenate(parts)
    return found


def tested(
    config: Config, shop, pages: dict[str, RankedPages]
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, dict]]:
    """Adds per page view and per visit in closed form, name -> (U,), (U,); and a simulated test.

    The test's arms are compared with FIRST; its intervals are those of the delta method, clustered
    by visitor.
    """
    reader = replace(simulator.READERS["rows"], columns=COLUMNS)
    world = simulator.world_of(shop, reader)
    exact, logs = {}, {}
    for at, (name, ranked) in enumerate(pages.items()):
        one = simulator.expected(world, ranked.user, ranked.item)
        _, per_visit = simulator.visits(one["purchases"], one["purchase"])
        exact[name] = one["purchases"], per_visit
        logs[name] = simulator.visit_log(world, ranked.user, ranked.item, config.visitors, at)
    found: dict[str, dict] = {}
    for name, log in logs.items():
        for metric, per in (("per view", "views"), ("per visit", "visits")):
            a, b = (abtest.estimate(x["adds"], x[per]) for x in (logs[FIRST], log))
            test = abtest.welch(a, b)
            found.setdefault(name, {})[metric] = {
                "value": b.value,
                "relative": test.relative,
                "low": test.relative_low,
                "high": test.relative_high,
                "p": test.p,
            }
        found[name]["views"] = float(log["views"].mean())
    return exact, found


def run(config: Config) -> dict:
    """Make the arms, score them, print one table; returns name -> column -> summary."""
    shop = load(config.data_dir)
    scorer, seen = Scorer(shop, "test"), seen_rows(shop, "test", "train+valid")
    out = config.stage("storefront-arms")
    pages = arms_of(config, shop, scorer, seen)
    more: dict[str, dict] = {name: {} for name in pages}
    if (config.stage("reward") / "done").exists():
        for name, worth in rewards(config, shop, pages).items():
            more[name]["reward"] = worth
    test: dict[str, dict] = {}
    if shop.truth is not None:
        exact, test = tested(config, shop, pages)
        for name, adds in exact.items():
            more[name] |= dict(zip(("per view", "per visit"), adds, strict=True))
    rows, results = {}, {}
    for name, ranked in pages.items():
        folder = out / name.lower().replace(",", "").replace(" ", "-")
        rows[name], _ = score_row(
            folder, name, ranked, scorer, seen, ROWS * COLUMNS, config.seed, config.n_boot
        )
        rows[name] |= more[name]
        results[name] = {
            column: stats.summary(rows[name][column], config.seed, config.n_boot)
            | {"less": stats.paired(rows[name][column], rows[FIRST][column], config.seed, 200)}
            for column in SHOWN
            if column in rows[name]
        }
    text = table(results, test, len(scorer.users), config)
    keep(out, {"rows": results, "test": test}, text)
    return results


def keep(folder: Path, results: dict, text: str) -> None:
    """Write a study's metrics.json and table.txt to its folder, and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", results)
    with atomic(folder / "table.txt") as beside:
        Path(beside).write_text(text)
    print(text, flush=True)


def table(results: dict, test: dict, users: int, config: Config) -> str:
    shown = [column for column in SHOWN if column in results[FIRST]]
    lines = [
        f"{config.dataset}: {counted(users, 'user')}, test rows, {ROWS} rows of {COLUMNS}; mean, "
        f"and the paired 95% interval of the difference to {FIRST}",
        *(["adds: in closed form, by simulated readers of rows"] if test else []),
        "",
        f"{'':<26}" + "".join(f"{name:>26}" for name in shown),
    ]
    for name, found in results.items():
        cells = []
        for column in shown:
            less = found[column]["less"]
            gap = "" if name == FIRST else f" [{less['low']:+.3f}, {less['high']:+.3f}]"
            cells.append(f"{found[column]['mean']:.3f}{gap}")
        lines.append(f"{name:<26}" + "".join(f"{cell:>26}" for cell in cells))
    if test:
        visitors = f"{config.visitors:,} visitors an arm, each against {FIRST}:"
        lines += ["", f"simulated test, {visitors}"]
    for name, found in test.items():
        cells = [
            f"adds {metric} {found[metric]['value']:.4f}"
            + (
                ""
                if name == FIRST
                else f" {found[metric]['relative']:+.1%} [{found[metric]['low']:+.1%}, "
                f"{found[metric]['high']:+.1%}]"
            )
            for metric in ("per view", "per visit")
        ]
        lines.append(f"  {name:<26}" + "; ".join(cells) + f"; views a visit {found['views']:.3f}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.storefront"))
