"""Which way of optimising gets most of a reward into the policy, at equal processor time?

Reads   data/<dataset>, runs/<run>/sft, runs/<run>/compose
Writes  runs/<run>-optimise-<row>/ppo, runs/<run>-optimise/table.json, table.md

    python -m experiments.optimise --dataset synthetic --seconds 60

Every row is paid by the same outcome reward (model/outcome_reward.py), begins with the same SFT
policy, and learns for the same processor seconds. How many steps these are is measured first, on
four steps of each row. The reference is direct: for each user the outcome model is asked about
every candidate, and each slot takes what adds most to the reward. Its gain over SFT's page is 100%.

Pages are written for validation users from train rows, one-shot. The last step is taken, so nothing
is chosen on these users; the calibration of the reward has three numbers fitted on them.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pagellm import ppo
from pagellm.data.shop import Shop, load
from pagellm.model.composer import Composer
from pagellm.model.outcome_reward import OutcomeReward
from pagellm.model.policy import Policy
from pagellm.pages import stats
from pagellm.pages.ranked import RankedPages, Scorer
from pagellm.stage.command import main
from pagellm.stage.config import check
from pagellm.stage.files import slug, write_json
from pagellm.stage.run import StageConfig, finished

__all__ = ["ROWS", "Config", "run", "shares", "table"]

GROUP = {"samples": 8, "rollout": 512, "minibatch": 512, "micro": 512}
# name -> options of ppo; all with item_reward outcome, w_page 0, select last
ROWS: dict[str, dict[str, Any]] = {
    "expert iteration": {"algo": "expert", "rollout": 256, "minibatch": 256, "micro": 256},
    "RLOO": {"algo": "rloo", **GROUP},
    "GRPO": {"algo": "grpo", **GROUP},
    "Dr. GRPO": {"algo": "dr_grpo", **GROUP},
    "RLOO + SFT's loss": {"algo": "rloo", "sft_coef": 1.0, **GROUP},
    "PPO + SFT's loss": {"algo": "ppo", "sft_coef": 1.0, "lr": 2e-4},
}
SHOWN = ("Recall@20", "NDCG@100", "PWKT", "ILD", "energy", "true_energy")


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Ways of optimising one reward, at equal processor time."""

    seconds: float = 60.0  # processor seconds that each row learns
    rows: str = ""  # names of rows, comma-separated; empty: all
    lr: float = 1e-3  # learning rate of the rows drawn at once
    row_lr: float = 0.1  # learning rate of item and user rows, as a share of lr
    kl_coef: float = 0.02  # price of one nat of KL to the SFT policy, per slot, in normalised
    # reward
    k: int = 20  # slots of a page
    users: int = 1000  # validation users whose pages are scored; 0: all

    def __post_init__(self):
        super().__post_init__()
        names = [name for name in self.rows.split(",") if name]
        check(
            self,
            seconds=(self.seconds > 0, "above 0"),
            rows=(set(names) <= set(ROWS), "some of " + ",".join(ROWS)),
            users=(self.users >= 0, "0 or more"),
        )


def train(config: Config, name: str, steps: int, run: str) -> float:
    """Train one row for some steps; the processor seconds of a step, the first one apart."""
    base = config.run or config.dataset
    options: dict[str, Any] = {"lr": config.lr, "row_lr": config.row_lr} | ROWS[name]
    if options["algo"] != "expert":  # it has no KL penalty
        options = {"kl_coef": config.kl_coef} | options
    ppo.run(
        ppo.Config(
            dataset=config.dataset,
            data=config.data,
            runs=config.runs,
            seed=config.seed,
            device=config.device,
            run=run,
            source_run=base,
            item_reward="outcome",
            w_page=0.0,
            gate_users=100,
            force=True,
            select="last",
            mode="one_shot",
            k=config.k,
            epochs=1e-6,
            min_steps=steps,
            eval_every=10**6,
            eval_users=100,
            save_every=10**6,
            **options,
        )
    )
    log = Path(config.runs) / run / "ppo" / "timing.jsonl"
    took = [json.loads(line)["cpu"] for line in log.read_text().splitlines()]
    return sum(took[1:]) / len(took[1:])


def shares(reward: dict[str, np.ndarray], seed: int = 0) -> dict[str, dict[str, float]]:
    """Share of the direct page's gain over SFT's that each row has, with a 95% interval.

    reward  row -> (U,) reward of each user's page; rows "SFT" and "direct" are among them
    The interval draws users; a share is a ratio of two means over the same draw.
    """
    rng = np.random.default_rng(seed)
    n = len(reward["SFT"])
    draws = rng.integers(n, size=(1000, n))
    whole = reward["direct"] - reward["SFT"]
    out = {}
    for name, mine in reward.items():
        gain = mine - reward["SFT"]
        drawn = gain[draws].mean(1) / whole[draws].mean(1)
        low, high = np.quantile(drawn, [0.025, 0.975])
        share = float(gain.mean() / whole.mean())
        out[name] = {"share": share, "low": float(low), "high": float(high)}
    return out


def pages_of(policy: Policy, shop: Shop, users: np.ndarray, k: int) -> tuple[RankedPages, float]:
    """One-shot pages from train rows, and the processor milliseconds of a page."""
    began = time.process_time()
    pages = policy.rank(
        users, shop.csr("train"), shop.csr("train", positive=None), k, 100, "one_shot"
    )
    return pages, 1000 * (time.process_time() - began) / len(users)


def direct(
    composer: Composer, shop: Shop, users: np.ndarray, k: int
) -> tuple[OutcomeReward, RankedPages, float]:
    """The reward, the pages that maximise it slot by slot, and the milliseconds of a page."""
    began = time.process_time()
    reward = OutcomeReward.of(composer, users, shop.csr("train", positive=None), k)
    page = reward.maximise(users, k)
    took = 1000 * (time.process_time() - began) / len(users)
    order = np.argsort(-np.where(reward.item >= 0, reward.value, -np.inf), axis=1, kind="stable")
    rest = np.take_along_axis(reward.item, order, 1)
    rest = np.where((rest[:, :, None] == page[:, None]).any(2), -1, rest)
    rest = np.take_along_axis(rest, np.argsort(rest < 0, axis=1, kind="stable"), 1)
    item = np.concatenate([page, rest], 1)[:, :100]
    score = -np.arange(item.shape[1], dtype=np.float32)[None].repeat(len(users), 0)
    return reward, RankedPages(users, item, score, (page >= 0).sum(1)), took


def table(results: dict[str, dict]) -> str:
    """The rows as a Markdown table."""
    names = [n for n in SHOWN if any(n in row["scores"] for row in results.values())]
    head = ["", "share of the gain", "reward", *names, "steps", "processor s", "ms a page"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in results.items():
        share = f"{row['share']:.0%} [{row['low']:.0%}, {row['high']:.0%}]"
        cells = [name, share, f"{row['reward']:.3f}"]
        cells += [f"{row['scores'].get(n, float('nan')):.4f}" for n in names]
        cells += [str(row["steps"]), f"{row['seconds']:.0f}", f"{row['ms']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(config: Config) -> dict[str, dict]:
    base = config.run or config.dataset
    finished(config.stage("sft"), "SFT policy", config.make("sft"))
    finished(config.stage("compose"), "outcome model", config.make("compose"))
    shop = load(config.data_dir)
    start = Policy.load(config.stage("sft"))
    composer = Composer.load(config.stage("compose"), shop, start)
    scorer = Scorer(shop, "valid")
    users = scorer.users[shop.csr("train").counts()[scorer.users] > 0]
    if 0 < config.users < len(users):
        drawn = np.random.default_rng(config.seed).permutation(users)
        users = np.sort(drawn[: config.users])
    reward, best, ms = direct(composer, shop, users, config.k)
    found = {"direct": (best, 0, 0.0, ms)}
    found["SFT"] = (*(x := pages_of(start, shop, users, config.k))[:1], 0, 0.0, x[1])
    for name in [n for n in config.rows.split(",") if n] or list(ROWS):
        own = f"{base}-optimise-{slug(name)}"
        step = train(config, name, 4, f"{own}-probe")
        steps = max(4, round(config.seconds / step))
        train(config, name, steps, own)
        policy = Policy.load(Path(config.runs) / own / "ppo")
        pages, ms = pages_of(policy, shop, users, config.k)
        found[name] = (pages, steps, steps * step, ms)
    paid, results = {}, {}
    for name, (pages, *_) in found.items():
        item = torch.from_numpy(pages.item[:, : config.k].astype(np.int64))
        paid[name] = reward(users, item, item >= 0).sum(1).double().numpy()
    share = shares(paid, config.seed)
    for name, (pages, steps, seconds, ms) in found.items():
        scores = {n: x for n, x in scorer(pages, config.k).items() if n in SHOWN}
        results[name] = {
            **share[name],
            "reward": float(paid[name].mean()),
            "scores": {n: float(np.nanmean(x)) for n, x in scores.items()},
            "NDCG@100 interval": stats.summary(scores["NDCG@100"], config.seed),
            "steps": steps,
            "seconds": seconds,
            "ms": ms,
        }
    out = Path(config.runs) / f"{base}-optimise"
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "table.json", results)
    text = table(results)
    (out / "table.md").write_text(text + "\n")
    print(text)
    return json.loads((out / "table.json").read_text())


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.optimise"))
