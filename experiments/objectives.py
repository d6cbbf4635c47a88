"""Study of ideas from public systems: item values, dropped ids, decoding. What is each worth?

    python -m experiments.objectives
    python -m experiments.objectives --dataset movielens_small --sft "--epochs 6 --lr 5e-4"

    likelihood              SFT as it is: the next item's likelihood
    likelihood, more steps  the same, as many steps again as the two value rows below have
    value, more steps       from the same weights: every item's value (sft --objective value)
    value, own rows         the same with output rows of their own (--untie)
    value alone             no likelihood before it
    dropped ids             a fifth of the item ids read by their contents (--id_dropout 0.2)
    slot by slot, hybrid    the first row's weights, decoded otherwise (evaluate --mode)

Values and hybrid decoding are those of GenPage (arXiv 2606.31031). Pages are decoded in one shot
unless the row says otherwise. `seconds` is the processor time of the row's SFT, of the row that it
goes on from too. Writes runs/<study>/<dataset>.parquet and prints it; Markdown and LaTeX with
effect sizes lie in runs/<study>/<dataset>/. A minute a row and seed on the synthetic shop. What is
done is not made anew.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments.study import COMMON, common_fields, overrides, prepared, publish
from pagellm import evaluate, pretrain, sft
from pagellm.pages.tables import per_user
from pagellm.stage.command import main
from pagellm.stage.config import Options, check, check_numbers
from pagellm.stage.files import read_json, slug, write_json
from pagellm.tuning.trials import copied

__all__ = ["Config", "ROWS", "run"]


@dataclass(frozen=True)
class Row:
    """What differs: fields of sft, whether it goes on from the first row, and the decoder."""

    sft: dict = field(default_factory=dict)
    more: bool = False
    mode: str = "one_shot"
    trained: bool = True  # False: the first row's weights are decoded


FIRST = "likelihood"  # the row that others are compared with, and go on from
VALUE = {"objective": "value"}
ROWS = {
    FIRST: Row(),
    "likelihood, more steps": Row(more=True),
    "value, more steps": Row(VALUE, more=True),
    "value, own rows": Row(VALUE | {"untie": True}, more=True),
    "value alone": Row(VALUE | {"untie": True}),
    "dropped ids": Row({"id_dropout": 0.2}),
    "slot by slot": Row(mode="greedy", trained=False),
    "hybrid": Row(mode="hybrid", trained=False),
}
STAGES = {"pretrain": pretrain, "sft": sft, "evaluate": evaluate}
FIXED = COMMON | {"mode", "start_run", "objective"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compare what SFT learns, and how its pages are decoded, over several seeds."""

    dataset: str = "synthetic"  # name of the data set
    raw: str = ""  # directory of its raw files, if it is not prepared yet
    study: str = "objectives"  # name of the study: results lie in <runs>/<study>
    seeds: int = 3  # number of seeds: 0, 1, ...; each trains all rows anew
    more: float = 2.0  # epochs of the rows that go on from the first one
    more_lr: float = 2e-4  # their learning rate
    preset: str = "auto"  # auto: every stage begins with the data set's preset, if there is one;
    # none: with its defaults
    data: str = "data"  # directory of prepared data sets
    runs: str = "runs"  # directory of runs
    pretrain: Options = Options("")  # options for that stage in every row, as on its command line
    sft: Options = Options("")  # options for sft
    evaluate: Options = Options("")  # options for evaluate

    def __post_init__(self):
        check_numbers(self)
        check(
            self,
            seeds=(self.seeds > 0, "1 or more"),
            more=(self.more > 0, "above 0"),
            more_lr=(self.more_lr > 0, "above 0"),
        )


def seconds(path: Path) -> float:
    """Processor seconds of the SFT of a run, as `trained` has noted them; 0 if it has not."""
    return read_json(path)["seconds"] if path.exists() else 0.0


def trained(config: sft.Config) -> None:
    """Run SFT, and note its processor seconds beside it. What a killed run took is not in them."""
    began = time.process_time()
    sft.run(config)
    note = config.stage("sft").parent / "seconds.json"
    if not note.exists():
        write_json(note, {"seconds": time.process_time() - began})


def one(config: Config, options: dict[str, dict], name: str, seed: int) -> tuple[Path, float]:
    """Run the stages of a row that are missing; returns its per_user.parquet and seconds."""
    row, runs = ROWS[name], Path(config.runs)
    common = common_fields(config, config.dataset, seed)
    base = f"{config.study}/{config.dataset}-s{seed}"
    own = base if name == FIRST else f"{base}-{slug(name)}"
    if name == FIRST:
        pretrain.run(pretrain.Config(run=base, **common, **options["pretrain"]))
    fields = options["sft"] | row.sft | {"mode": "one_shot"}
    took = 0.0
    if row.more:
        fields |= {"start_run": base, "epochs": config.more, "lr": config.more_lr}
        took = seconds(runs / base / "seconds.json")
    elif row.trained and name != FIRST:  # begins at the same pre-trained model
        copied(runs / base / "pretrain", runs / own / "pretrain", {"run": own})
    if row.trained:
        trained(sft.Config(run=own, **common, **fields))
        took += seconds(runs / own / "seconds.json")
    else:
        took = seconds(runs / base / "seconds.json")
    scoring: dict[str, Any] = {"examples": 0, "quiet": True} | options["evaluate"]
    scoring |= {"mode": row.mode, "source_run": own if row.trained else base, "policies": "sft"}
    evaluate.run(evaluate.Config(run=own, **common, **scoring))
    return runs / own / "evaluate" / "sft" / "per_user.parquet", took


def run(config: Config) -> list[dict]:
    """Train and compare the rows. Returns the records of compare_seeds, with `seconds`."""
    options = {
        name: overrides(module, getattr(config, name), FIXED) for name, module in STAGES.items()
    }
    prepared(config.dataset, config.raw, config.data, config.preset)
    made = {
        name: [one(config, options, name, seed) for seed in range(config.seeds)] for name in ROWS
    }
    results = {name: [per_user(path) for path, _ in each] for name, each in made.items()}
    took = {name: float(np.mean([s for _, s in each])) for name, each in made.items()}
    path = Path(config.runs) / config.study / f"{config.dataset}.parquet"
    spent = ", ".join(f"{name} {value:.0f}" for name, value in took.items())
    return publish(
        results,
        path,
        config.dataset,
        f"processor seconds of SFT: {spent}",
        {name: {"seconds": value} for name, value in took.items()},
    )


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.objectives"))
