"""One table from runs that differ in their seed: our policies beside the plain baselines.

    make seeds DATASET=instruments RAW=... SEEDS="0 1 2 3 4"
    python -m experiments.seeds --dataset instruments --seeds 0,1,2,3,4

Reads   runs/<run>-s<seed>/evaluate of every seed, runs/<baselines>/baselines if it is there
Writes  runs/<run>-seeds/table.{md,tex,parquet}, versus.json

A cell holds the mean over seeds and users, and the paired difference to `versus` with its 95%
interval (bootstrap over seeds, then users). Baselines are fitted once and count as equal in every
seed. Below it the last policy is ahead of every baseline, level, unclear or behind, metric by
metric.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pagellm.baselines.compare import read_rows
from pagellm.pages.tables import ALL_COLUMNS, compare, per_user, save
from pagellm.pages.yardstick import verdict_table, verdicts
from pagellm.stage import hints
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import read_json, write_json
from pagellm.stage.run import finished

__all__ = ["Config", "OURS", "run"]


OURS = {"sft": 'SFT = "w/o reward"', "ppo": "PageLLM", "compose": "PageLLM, composed"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Put runs of several seeds and the plain baselines into one table."""

    dataset: str = "synthetic"  # name of the data set
    run: str = ""  # runs are <run>-s<seed>; empty: the data set's name
    seeds: str = "0,1,2,3,4"  # seeds of the runs, with commas or blanks between them
    policies: str = "auto"  # our rows, some of sft,ppo,compose; popularity comes with the
    # baselines. auto: all that every seed has evaluated
    baselines: str = ""  # run whose baselines are added; empty: the data set's name
    versus: str = ""  # row that every other row's differences are taken to; empty: the first of
    # policies
    n_boot: int = 1000  # bootstrap draws for each interval
    runs: str = "runs"  # directory of runs

    def __post_init__(self):
        names = self.each
        check(
            self,
            policies=(
                self.policies == "auto"
                or bool(set(self.policies.split(",")) & set(OURS))
                and set(self.policies.split(",")) <= {"popularity", *OURS},
                f"auto, or some of {','.join(OURS)}, beside popularity if you like",
            ),
            seeds=(
                0 < len(names) == len(set(names)) and all(n.isdigit() for n in names),
                "numbers, each once",
            ),
            n_boot=(self.n_boot > 1, "2 or more"),
        )

    @property
    def each(self) -> list[str]:
        """The seeds one by one."""
        return self.seeds.replace(",", " ").split()


def run(config: Config) -> list[dict]:
    """Write and print the table. Returns one record for each row and metric (tables.compare)."""
    name, root = config.run or config.dataset, Path(config.runs)
    seeds, data = config.each, set()
    folders = {seed: root / f"{name}-s{seed}" / "evaluate" for seed in seeds}
    for seed, folder in folders.items():
        finished(
            folder,
            f"evaluation of seed {seed}",
            hints.command("evaluate", config.dataset, f"{name}-s{seed}", seed),
        )
        made = read_json(folder / "config.json")
        if made["config"]["seed"] != int(seed):
            raise PageLLMError(
                f"{folder} was made with seed {made['config']['seed']}, not {seed}\n"
                "  Make it with: "
                + hints.command("evaluate", config.dataset, f"{name}-s{seed}", seed)
            )
        data.add(made["inputs"]["data"])
    wanted = config.policies.split(",")
    ours = {
        policy: row
        for policy, row in OURS.items()
        if policy in wanted
        or wanted == ["auto"]
        and all((at / policy / "per_user.parquet").exists() for at in folders.values())
    }
    results: dict[str, list[dict[str, np.ndarray]]] = {
        row: [per_user(at / policy / "per_user.parquet") for at in folders.values()]
        for policy, row in ours.items()
    }
    folder = root / (config.baselines or config.dataset) / "baselines"
    if (folder / "done").exists():
        data.add(read_json(folder / "config.json")["inputs"]["data"])
        results |= {row: [scores] * len(seeds) for row, scores in read_rows(folder)[0].items()}
    elif config.baselines:
        finished(folder, "baselines", hints.command("baselines", config.dataset, config.baselines))
    if len(data) > 1:
        raise PageLLMError(
            "these runs were scored on different data: their source.json have the ids "
            f"{sorted(data)}\n  Evaluate all on one prepared data set."
        )
    versus = config.versus or next(iter(ours.values()))
    records = compare(results, ALL_COLUMNS, versus, 0, config.n_boot)
    out = root / f"{name}-seeds"
    out.mkdir(parents=True, exist_ok=True)
    print(
        save(
            out,
            records,
            f"{config.dataset}: {len(seeds)} seeds ({','.join(seeds)}), test split; difference to "
            f"{versus} with its 95% interval over seeds and users",
        )
    )
    plain = {row: scores for row, scores in results.items() if row not in ours.values()}
    if plain:
        last = list(ours.values())[-1]
        found = verdicts(results[last], plain, ALL_COLUMNS, 0, config.n_boot)
        write_json(out / "versus.json", found)
        print(verdict_table(found, last))
    return records


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.seeds"))
