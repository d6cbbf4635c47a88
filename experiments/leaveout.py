"""How well the reward model generalises: to a kind of pair it never saw, and to held-out truth.

    make leaveout                       python -m experiments.leaveout --dataset synthetic --seeds 3

Left out. For each kind of pair, a reward model is fitted to the other kinds only. Its accuracy on
the held-out users' pairs of that kind is compared with that of the model fitted to all kinds,
paired over seeds and users.

Truth. Several pages of every user are drawn from SFT's policy, as PPO draws them. The model fitted
to all kinds scores them, and so do held-out data: NDCG on the validation items, the page energy E
with their ratings and, on the synthetic shop, the true energy. `within users` is Spearman's
correlation over the pages of one user, averaged over users; PPO climbs this one. `over users` is
the correlation of the users' mean values.

Writes <runs>/<study>/<dataset>-leaveout.parquet and <dataset>-truth.parquet, and prints both. Rows
already done are not run again. A few minutes a seed on the synthetic shop.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from experiments.study import overrides, prepared
from pagellm import pretrain, reward, sft
from pagellm.data.shop import Shop, load
from pagellm.model.decode import LegalItems, sample
from pagellm.model.policy import Policy
from pagellm.model.reward_model import RewardModel, mean_reward
from pagellm.pages.pairs import KINDS, from_table
from pagellm.pages.ranked import RankedPages, Scorer
from pagellm.pages.stats import difference, spearman
from pagellm.pages.tables import compare, markdown, write_table
from pagellm.reward import is_held_out, score_pairs
from pagellm.stage import randomness
from pagellm.stage.command import main
from pagellm.stage.config import Options, PageLLMError, check, check_numbers

__all__ = ["Config", "LEFT", "TAUGHT", "against_truth", "right_by_user", "run", "truth_records"]


STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward}
FIXED = {"dataset", "run", "data", "runs", "seed", "source_run", "leave_out"}
TAUGHT, LEFT = "taught all kinds", "that kind left out"
TRUTHS = {
    "NDCG@100": "validation hits (NDCG)",
    "energy": "validation energy",
    "true_energy": "true energy",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Leave-one-kind-out accuracy of the reward model, and its correlation with held-out truth."""

    dataset: str = "synthetic"  # name of the data set
    raw: str = ""  # directory of its raw files, if it is not prepared yet
    study: str = "leaveout"  # name of the study: results lie in <runs>/<study>
    seeds: int = 3  # number of seeds: 0, 1, ...; each trains all stages anew
    users: int = 500  # users whose pages are compared with the truth; 0: all with validation items
    pages: int = 16  # pages of each of these users
    k: int = 20  # slots on a page
    temperature: float = 0.3  # sampling temperature, as in ppo
    preset: str = "auto"  # auto: every stage begins with the data set's preset, if there is one;
    # none: with its defaults
    data: str = "data"  # directory of prepared data sets
    runs: str = "runs"  # directory of runs
    pretrain: Options = Options("")  # options for that stage, as on its command line
    sft: Options = Options("")  # options for sft
    reward: Options = Options("")  # options for reward

    def __post_init__(self):
        check_numbers(self)
        check(
            self,
            seeds=(self.seeds > 0, "1 or more"),
            users=(self.users >= 0, "0 or more"),
            pages=(self.pages > 1, "2 or more"),
            k=(self.k > 0, "1 or more"),
            temperature=(self.temperature > 0, "above 0"),
        )
        for stage, module in STAGES.items():
            overrides(module, getattr(self, stage), FIXED)


def run(config: Config) -> list[dict]:
    """Return the records of both tables: those of tables.compare, then those of `truth_records`."""
    prepared(config.dataset, config.raw, config.data, config.preset)
    shop = load(Path(config.data) / config.dataset)
    taught, left, truths = [], [], []
    for seed in range(config.seeds):
        base = f"{config.study}/{config.dataset}-s{seed}"
        common: dict[str, Any] = {
            "dataset": config.dataset,
            "seed": seed,
            "data": config.data,
            "runs": config.runs,
        }
        options = {
            name: overrides(module, getattr(config, name)) for name, module in STAGES.items()
        }
        pretrain.run(pretrain.Config(run=base, **common, **options["pretrain"]))
        sft.run(sft.Config(run=base, **common, **options["sft"]))
        made = reward.Config(run=base, **common, **options["reward"])
        reward.run(made)
        policy = Policy.load(made.stage("sft"))
        whole = right_by_user(made, made, policy, shop.n_users)
        if len(whole) < 2:
            raise PageLLMError(
                f"{made.stage('reward')} has pairs of one kind, {', '.join(whole)}: "
                "none can be left out"
            )
        others: dict = {}
        for kind in whole:
            without = reward.Config(
                run=f"{base}-no-{kind}",
                source_run=base,
                leave_out=kind,
                **common,
                **options["reward"],
            )
            reward.run(without)
            others |= {kind: right_by_user(without, made, policy, shop.n_users)[kind]}
        taught.append(whole)
        left.append(others)
        truths.append(
            against_truth(config, shop, policy, RewardModel.load(made.stage("reward"), "cpu"), seed)
        )
    kinds = [kind for kind in KINDS if all(kind in seeds for seeds in taught)]
    named = (
        [{f"{kind} pairs": one[kind] for kind in kinds} for one in seeds]
        for seeds in (taught, left)
    )
    records = compare(
        dict(zip((TAUGHT, LEFT), named, strict=True)),
        [f"{kind} pairs" for kind in kinds],
        versus=TAUGHT,
    )
    known = truth_records(truths)
    folder = Path(config.runs) / config.study
    for name, rows in (("leaveout", records), ("truth", known)):
        write_table(folder / f"{config.dataset}-{name}.parquet", rows)
    print(
        f"{config.dataset}, {config.seeds} seeds: accuracy on held-out users' pairs (mean over "
        "users; paired difference with its 95% interval over seeds and users)\n\n"
        f"{markdown(records)}\n"
    )
    print(
        f"Spearman's correlation of the reward with what was held out, {config.pages} pages a user "
        f"drawn at temperature {config.temperature:g}\n\n| | within users | over users |\n"
        "|---|---|---|"
    )
    for row in known:
        print(
            f"| {TRUTHS[row['truth']]} | {row['within']:.3f} [{row['low']:.3f}, {row['high']:.3f}] "
            f"| {row['over']:.3f} |"
        )
    return records + known


def right_by_user(
    model: reward.Config, made: reward.Config, policy: Policy, n_users: int
) -> dict[str, np.ndarray]:
    """kind -> (n_users,) share of a user's pairs whose better page has the higher score.

    model  Config of the reward model that scores
    made   Config of the stage whose pairs are scored: those of users held out from both models
    NaN for users who are not held out or have no pair of that kind
    """
    table = pq.read_table(made.stage("reward") / "pairs.parquet")
    users, back = np.unique(table["user"].to_numpy(), return_inverse=True)
    held = np.array([is_held_out(int(user), made) for user in users], bool)[back]
    pairs = from_table(table.filter(held))
    scores = score_pairs(RewardModel.load(model.stage("reward"), "cpu"), pairs, policy)
    total = scores["page"] + scores["token"]
    right = (total[:, 0] > total[:, 1]) + 0.5 * (total[:, 0] == total[:, 1])
    kinds, user, out = np.array([p.kind for p in pairs]), np.array([p.user for p in pairs]), {}
    for kind in KINDS:
        rows = kinds == kind
        if rows.any():
            count = np.bincount(user[rows], minlength=n_users)
            out[kind] = np.bincount(user[rows], right[rows], n_users) / np.where(
                count, count, np.nan
            )
    return out


@torch.no_grad()
def against_truth(
    config: Config, shop: Shop, policy: Policy, model: RewardModel, seed: int, batch: int = 64
) -> dict[str, dict[str, np.ndarray]]:
    """Score G sampled pages of each of U users: truth -> {"reward": (U, G), "truth": (U, G)}."""
    scorer, history, seen = (
        Scorer(shop, "valid"),
        shop.csr("train"),
        shop.csr("train", positive=None),
    )
    users = scorer.users[history.counts()[scorer.users] > 0]
    if 0 < config.users < len(users):
        # the same in all seeds
        users = np.sort(randomness.rng(0, "leaveout", "users").permutation(users)[: config.users])
    judged = np.zeros((len(users), config.pages))
    truth: dict = {}
    for page in tqdm(range(config.pages), f"pages against the truth, seed {seed}", mininterval=1.0):
        drawn = np.full((len(users), config.k), -1)
        for at in range(0, len(users), batch):
            some = users[at : at + batch]
            prompt, valid = policy.prompt(some, [history.of(user) for user in some])
            uniform = np.stack(
                [
                    randomness.rng(seed, "leaveout", "sample", page, int(user)).random(config.k)
                    for user in some
                ]
            )
            pages = sample(
                policy.model,
                prompt,
                valid,
                LegalItems(torch.from_numpy(seen.padded(some)), shop.n_items),
                torch.from_numpy(uniform),
                config.temperature,
            )
            token, whole = model(prompt, valid, pages.item, pages.mask)
            judged[at : at + batch, page] = (whole + mean_reward(token, pages.mask)).numpy()
            drawn[at : at + batch] = pages.item.numpy()
        ranked = RankedPages(users, drawn, np.zeros(drawn.shape, np.float32), (drawn >= 0).sum(1))
        scores = scorer(ranked, config.k)
        for name in TRUTHS:
            if name in scores:
                truth.setdefault(name, np.zeros(judged.shape))[:, page] = scores[name]
    return {name: {"reward": judged, "truth": values} for name, values in truth.items()}


def truth_records(truths: list[dict]) -> list[dict]:
    """One record for each truth.

    within  mean correlation over one user's pages, with its interval low..high (seeds and users)
    over    correlation over users, mean over seeds
    """
    records = []
    for name in truths[0]:
        within = [
            np.array(
                [
                    np.nan if (rho := spearman(*pair)) is None else rho
                    for pair in zip(one[name]["reward"], one[name]["truth"], strict=True)
                ]
            )
            for one in truths
        ]
        over = [spearman(one[name]["reward"].mean(1), one[name]["truth"].mean(1)) for one in truths]
        mean, low, high = difference(within, [np.zeros(len(rho)) for rho in within])
        records.append(
            {
                "truth": name,
                "within": mean,
                "low": low,
                "high": high,
                "seeds": len(truths),
                "over": float(np.mean([np.nan if rho is None else rho for rho in over])),
            }
        )
    return records


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.leaveout"))
