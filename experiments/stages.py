"""Study of stages: what does a page lose if one of them is left out?

    python -m experiments.stages
    python -m experiments.stages --dataset scientific --pretrain "--rows als --pool --steps 0"

    all stages          the factorisation, SFT, PPO paid by the outcome model, composed pages
    no factorisation    network rows are random at first (pretrain --rows random)
    no SFT              PPO and composing begin at the pre-trained network
    no PPO              composed pages that SFT's policy proposes for
    no language model   composed pages of plain models alone (compose --policy none)
    no composing        the page that PPO's policy writes
    SFT alone           the page that SFT's policy writes

PPO learns the pages that maximise the outcome reward (--algo expert), which is the cheapest way to
what that reward can give (docs/results/optimising.md); --ppo takes others. Writes
runs/<study>/<dataset>.parquet and prints it; Markdown and LaTeX with effect sizes lie in
runs/<study>/<dataset>/. Some five minutes a seed on the synthetic shop. What is done is not made
anew.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.study import COMMON, common_fields, overrides, prepared, publish
from pagellm import compose, evaluate, ppo, pretrain, sft
from pagellm.pages.tables import per_user
from pagellm.stage.command import main
from pagellm.stage.config import Options, check
from pagellm.stage.files import slug

__all__ = ["Config", "ROWS", "run"]


@dataclass(frozen=True)
class Row:
    """What is left out: the policy that is scored, the one that composing asks, and options."""

    scored: str = "compose"
    asked: str = "ppo"
    pretrain: dict = field(default_factory=dict)
    sft: dict = field(default_factory=dict)


FIRST = "all stages"  # the row that others are compared with
ROWS = {
    FIRST: Row(),
    "no factorisation": Row(pretrain={"rows": "random", "rated": False}),
    "no SFT": Row(sft={"epochs": 0.0}),
    "no PPO": Row(asked="sft"),
    "no language model": Row(asked="none"),
    "no composing": Row(scored="ppo"),
    "SFT alone": Row(scored="sft"),
}
STAGES = {"pretrain": pretrain, "sft": sft, "compose": compose, "ppo": ppo, "evaluate": evaluate}
FIXED = COMMON | {"policy", "compose_run", "item_reward", "w_page", "w_hit"}  # three of PAID
PAID = {
    "item_reward": "outcome",
    "w_page": 0.0,  # the page head is taught by pairs: a stage of its own, see `ablation`
    "w_hit": 0.0,
    "algo": "expert",
    "force": True,  # a study asks what training does, whatever the gate before it would say
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compare pages of all stages with pages that lack one, over several seeds."""

    dataset: str = "synthetic"  # name of the data set
    raw: str = ""  # directory of its raw files, if it is not prepared yet
    study: str = "stages"  # name of the study: results lie in <runs>/<study>
    seeds: int = 3  # number of seeds: 0, 1, ...; each trains all rows anew
    rows: str = ",".join(ROWS)  # which rows, with commas between them; the first is compared with
    preset: str = "auto"  # auto: every stage begins with the data set's preset, if there is one;
    # none: with its defaults
    data: str = "data"  # directory of prepared data sets
    runs: str = "runs"  # directory of runs
    pretrain: Options = Options("")  # options for that stage in every row, as on its command line
    sft: Options = Options("")  # options for sft
    compose: Options = Options("")  # options for compose
    ppo: Options = Options("")  # options for ppo, e.g. "--algo rloo"
    evaluate: Options = Options("")  # options for evaluate

    def __post_init__(self):
        check(
            self,
            seeds=(self.seeds > 0, "1 or more"),
            rows=(
                set(self.names) <= set(ROWS) and len(set(self.names)) == len(self.names) > 1,
                f"two or more of: {', '.join(ROWS)}",
            ),
        )

    @property
    def names(self) -> list[str]:
        """The rows one by one."""
        return [name.strip() for name in self.rows.split(",")]


def one(config: Config, options: dict[str, dict], name: str, seed: int) -> Path:
    """Run the stages of a row that are missing; returns its per_user.parquet.

    Rows that begin alike share runs: <study>/<dataset>-s<seed>, with what differs behind it.
    """
    row = ROWS[name]
    common = common_fields(config, config.dataset, seed)
    base = f"{config.study}/{config.dataset}-s{seed}"
    if row.pretrain or row.sft:
        base += f"-{slug(name)}"
    pretrain.run(pretrain.Config(run=base, **common, **options["pretrain"] | row.pretrain))
    sft.run(sft.Config(run=base, **common, **options["sft"] | row.sft))
    # The outcome model of SFT's policy: it pays PPO, and composes the page without PPO.
    if row.scored != "sft" and row.asked != "none":
        compose.run(compose.Config(run=base, policy="sft", **common, **options["compose"]))
    own = f"{base}-alone" if row.scored == "sft" else base
    if row.asked == "ppo" and row.scored != "sft":
        own = f"{base}-ppo"
        ppo.run(ppo.Config(run=own, source_run=base, **common, **PAID | options["ppo"]))
    if row.scored == "compose" and row.asked != "sft":
        asked, own = own, f"{base}-{row.asked}-composed"
        fields = options["compose"] | {"policy": row.asked}
        compose.run(compose.Config(run=own, source_run=asked, **common, **fields))
    scoring: dict[str, Any] = {"examples": 0, "quiet": True} | options["evaluate"]
    evaluate.run(
        evaluate.Config(run=own, source_run=base, policies=row.scored, **common, **scoring)
    )
    return Path(config.runs) / own / "evaluate" / row.scored / "per_user.parquet"


def run(config: Config) -> list[dict]:
    """Train and compare the rows. Returns the records of compare_seeds."""
    options = {
        name: overrides(module, getattr(config, name), FIXED) for name, module in STAGES.items()
    }
    prepared(config.dataset, config.raw, config.data, config.preset)
    results = {
        name: [per_user(one(config, options, name, seed)) for seed in range(config.seeds)]
        for name in config.names
    }
    path = Path(config.runs) / config.study / f"{config.dataset}.parquet"
    return publish(results, path, config.dataset)


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.stages"))
