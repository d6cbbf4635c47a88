"""What a softmax over sampled items, instead of all items, costs in quality, over several seeds.

    python -m experiments.sampled_softmax --dataset synthetic --sampled_items 64 --seeds 3

Trains pretrain and SFT with the full softmax, with --sampled_items, and with --lazy_rows in
addition. Scores SFT's pages on the validation split; differences to the full softmax are paired
over seeds and users. Rows already done are not run again. Writes
<runs>/sampled/<dataset>-<sampled_items>.parquet and prints it. Two minutes a row and seed on the
synthetic shop. --pretrain and --sft take options of those stages, or a preset:
"--sft=@pagellm/presets/toys/sft".
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from experiments.study import Stages, Variant, overrides, run_variant
from pagellm import pretrain, sft
from pagellm.pages.tables import COLUMNS, compare_seeds, per_user, spread, write_table
from pagellm.stage.command import main
from pagellm.stage.config import Options, check, check_numbers

__all__ = ["Config", "run"]


FIXED = {"dataset", "run", "data", "runs", "seed", "source_run", "sampled_items", "lazy_rows"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Does a softmax over a few items learn what the full one learns?"""

    dataset: str = "synthetic"  # name of the data set
    raw: str = ""  # directory of its raw files, if it is not prepared yet
    sampled_items: int = 64  # items sampled in each step, beside those of the batch
    seeds: int = 3  # number of seeds: 0, 1, ...
    pretrain: Options = Options("")  # options for that stage in every row, as on its command line
    sft: Options = Options("")  # options for sft
    data: str = "data"  # directory of prepared data sets
    runs: str = "runs"  # directory of runs

    def __post_init__(self):
        check_numbers(self)
        check(
            self,
            sampled_items=(self.sampled_items > 0, "1 or more"),
            seeds=(self.seeds > 0, "1 or more"),
        )
        for stage, module in (("pretrain", pretrain), ("sft", sft)):
            overrides(module, getattr(self, stage), FIXED)


def run(config: Config) -> list[dict]:
    """Train and compare the rows. Returns the records of tables.compare_seeds."""
    drawn = {"sampled_items": config.sampled_items}
    ways = {
        "full": {},
        f"{config.sampled_items} drawn": drawn,
        f"{config.sampled_items} drawn, lazy rows": drawn | {"lazy_rows": True},
    }
    results: dict[str, list] = {name: [] for name in ways}
    for seed in range(config.seeds):
        for at, (name, own) in enumerate(ways.items()):
            stages = Stages(
                config.data,
                config.runs,
                config.raw,
                pretrain=overrides(pretrain, config.pretrain) | own,
                sft=overrides(sft, config.sft) | own,
                evaluate={"split": "valid", "mask": "train"},
            )
            folder = f"sampled/{('full', 'drawn', 'lazy')[at]}" + (
                f"-{config.sampled_items}" if at else ""
            )
            results[name].append(
                per_user(run_variant(folder, config.dataset, Variant(name, "sft"), seed, stages))
            )
    records = compare_seeds(results, (*COLUMNS[:3], "ILD", "energy"))
    path = Path(config.runs) / "sampled" / f"{config.dataset}-{config.sampled_items}.parquet"
    write_table(path, records)
    print(
        f"{spread(records)}\n\n"
        f"{config.seeds} seeds, validation: mean ± standard deviation over seeds; the paired "
        "difference to the full softmax with its 95% interval (bootstrap over seeds and users)\n"
        f"{path}"
    )
    return records


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.sampled_softmax"))
