"""bfloat16 in the network against float32: seconds of a step, and quality of whole runs.

    python -m experiments.precision                  speed at four sizes: two minutes
    python -m experiments.precision --seeds 3        whole runs too; rows already done are kept

Speed: one SFT step (forward, loss, backward, optimiser) at each size. The two precisions take turns
in one process, so that other work on the machine slows both; compare the medians' ratio.

Quality: every stage from pretrain to evaluate, with --precision float32 and with bfloat16, on the
test split; differences are paired over seeds and users, for SFT and PPO separately. --policies sft
leaves out the reward model and PPO. Writes <runs>/precision/<dataset>-<size>.parquet and prints it.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from experiments.study import Stages, Variant, run_variant
from pagellm import evaluate
from pagellm.model.gpt2 import GPT2, SIZES
from pagellm.model.page_loss import Batch, sft_loss
from pagellm.pages.tables import ALL_COLUMNS, compare_seeds, per_user, spread, write_table
from pagellm.stage import dist
from pagellm.stage.command import main
from pagellm.stage.config import check, check_numbers
from pagellm.stage.train import GuardedStep, optimiser

__all__ = ["Config", "quality", "run", "speed"]


PRECISIONS = ("float32", "bfloat16")
USERS = {"gpt2": 8}  # users in a step; 64 for the other sizes


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure whether bfloat16 is faster on this machine, and whether it costs quality."""

    sizes: str = "tiny,mini,small,gpt2"  # networks to time, comma-separated; empty: none
    steps: int = 9  # timed steps of each precision, after one to warm up
    device: str = "auto"  # device of steps and whole runs: cpu, cuda; auto: cuda if there is one
    seeds: int = 0  # number of whole runs of each precision: seeds 0, 1, ...; 0: none
    dataset: str = "synthetic"  # data set of the whole runs
    size: str = "tiny"  # network of the whole runs
    policies: str = "sft,ppo"  # policies scored in the whole runs, comma-separated
    data: str = "data"  # directory of prepared data sets
    runs: str = "runs"  # directory of runs

    def __post_init__(self):
        check_numbers(self)
        names = [name for name in self.sizes.split(",") if name]
        check(
            self,
            sizes=(set(names) <= set(SIZES), f"some of {','.join(SIZES)}"),
            steps=(self.steps > 0, "1 or more"),
            size=(self.size in SIZES, f"one of {', '.join(SIZES)}"),
            policies=(set(self.policies.split(",")) <= {"sft", "ppo"}, "sft, ppo or both"),
        )


def speed(size: str, steps: int, device: torch.device) -> dict:
    """Median seconds of one SFT step at each precision.

    Prompts of 50 tokens, pages of 10 slots, 1,000 items, and 64 users or what USERS says.
    """
    B, shape = USERS.get(size, 64), SIZES[size]
    torch.manual_seed(0)
    model = GPT2(shape, 2057, 2000, 1000).to(device)
    guard = GuardedStep(optimiser(model, 1e-4), model.parameters(), 1.0)
    prompt = torch.randint(0, 5057, (B, 50), device=device)
    item = torch.stack([torch.randperm(1000)[:10] for _ in range(B)]).to(device)
    ones = [torch.ones_like(x, dtype=torch.bool) for x in (prompt, item)]
    batch = Batch(prompt, ones[0], item, ones[1], torch.full((B, 1), -1, device=device))
    seconds: dict[str, list] = {name: [] for name in PRECISIONS}
    for _ in range(steps + 1):
        for name in PRECISIONS:
            model.bf16 = name == "bfloat16"
            wait(device)
            began = time.perf_counter()
            sft_loss(model, batch, "both").backward()
            guard.step(size)
            wait(device)
            seconds[name].append(time.perf_counter() - began)
    median = {name: float(np.median(values[1:])) for name, values in seconds.items()}
    return {
        "size": size,
        "columns": shape.n_embd,
        "users": B,
        **median,
        "gain": median["float32"] / median["bfloat16"],
        "auto": dist.pick_precision("auto", device, shape.n_embd),
    }


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quality(config: Config) -> list[dict]:
    """One record for every policy, precision and metric, as tables.compare_seeds makes them."""
    found: dict[str, dict[str, list]] = {
        policy: {name: [] for name in PRECISIONS} for policy in config.policies.split(",")
    }
    for seed in range(config.seeds):
        for name in PRECISIONS:
            own = {"precision": name, "device": config.device}
            stages = Stages(
                config.data,
                config.runs,
                pretrain=own | {"size": config.size},
                sft=own,
                reward=own,
                ppo=own,
                evaluate={"device": config.device},
            )
            for policy in found:
                path = run_variant(
                    f"precision/{config.size}-{name}",
                    config.dataset,
                    Variant(evaluate.LABELS[policy], policy),
                    seed,
                    stages,
                )
                found[policy][name].append(per_user(path))
    records = []
    for policy, results in found.items():
        rows = compare_seeds(results, ALL_COLUMNS)
        print(f"\n{evaluate.LABELS[policy]}\n{spread(rows)}")
        records += [{"policy": policy, **row} for row in rows]
    path = Path(config.runs) / "precision" / f"{config.dataset}-{config.size}.parquet"
    write_table(path, records)
    print(
        "\n"
        f"{config.seeds} seeds, test split: mean ± standard deviation over seeds; the paired "
        f"difference to float32 with its 95% interval (bootstrap over seeds and users)\n{path}"
    )
    return records


def run(config: Config) -> list[dict]:
    """Print both tables. Returns the rows of the speed table."""
    device = dist.pick_device(config.device)
    rows = []
    print(
        f"{'size':<12}{'columns':>8}{'users':>7}{'float32 ms':>12}{'bfloat16 ms':>13}{'gain':>7}   "
        "auto takes"
    )
    for name in filter(None, config.sizes.split(",")):
        rows.append(row := speed(name, config.steps, device))
        print(
            f"{name:<12}{row['columns']:>8}{row['users']:>7}{1e3 * row['float32']:>12.1f}"
            f"{1e3 * row['bfloat16']:>13.1f}{row['gain']:>7.2f}   {row['auto']}",
            flush=True,
        )
    print(
        json.dumps(
            {
                "device": str(device),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "has_bf16": dist.multiplies_bf16(device),
                "rows": rows,
            }
        )
    )
    if config.seeds:
        quality(config)
    return rows


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.precision"))
