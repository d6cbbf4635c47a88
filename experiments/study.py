"""A study: variants x seeds, each run through the stages it needs, compared on the same users.

    rows = [Variant("mixed"), Variant("item-only", ppo={"w_page": 0.0}), Variant("without reward", policy="sft")]
    results = study("ablation", "synthetic", rows, seeds=range(3))

Variants of one seed share pretrain and sft (run <study>/<dataset>-s<seed>), and the reward model unless a variant
changes it. Whatever is already done is not run again: a stage knows its own `done`.

Intervals: the per-user difference to the first row, two-level bootstrap (seeds, then users), since both vary.
"""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pagellm import evaluate, ppo, pretrain, reward, sft
from pagellm.__main__ import VERBS
from pagellm.data import prepare
from pagellm.pages.tables import per_user
from pagellm.stage.config import PageLLMError, parse
from pagellm.stage.files import slug

__all__ = [
    "Stages",
    "Variant",
    "overrides",
    "prepared",
    "print_table",
    "run_variant",
    "study",
]


@dataclass(frozen=True)
class Variant:
    """One row of a study: which policy is scored, and what its stages change."""

    name: str
    policy: str = "ppo"  # "sft": the policy without reward
    ppo: dict = field(default_factory=dict)
    reward: dict = field(default_factory=dict)  # if not empty, a reward model of its own


@dataclass(frozen=True)
class Stages:
    """Overrides that all variants share, and where things lie."""

    data: str = "data"
    runs: str = "runs"
    raw: str = ""
    preset: str = "auto"  # "none": no preset where the data set has to be prepared
    pretrain: dict = field(default_factory=dict)
    sft: dict = field(default_factory=dict)
    reward: dict = field(default_factory=dict)
    ppo: dict = field(default_factory=dict)
    evaluate: dict = field(default_factory=dict)


def overrides(module, text: str) -> dict:
    """Options of a stage that differ from its defaults: "--lr 0.1 --k 10" -> {"lr": 0.1, "k": 10}.

    Such a text is in a study's field of type Options. Where the study runs as a command, `parse` has
    put the data set's preset before what was typed: "@toys/sft --lr 0.1". Raises PageLLMError for
    what is no option of the stage.
    """
    verb = next(verb for verb, name in VERBS.items() if name == module.__name__)
    config, default = parse(module.Config, shlex.split(text), f"pagellm {verb}"), module.Config()
    found = {
        name: getattr(config, name)
        for name in config.__dataclass_fields__
        if getattr(config, name) != getattr(default, name)
    }
    if "preset" in found:
        raise PageLLMError(
            f"--{verb} must not set preset\n  Name it as @{found['preset']}, or switch presets off "
            "for the whole study: --preset none"
        )
    return found


def prepared(dataset: str, raw: str, data: str, preset: str = "auto") -> None:
    """Prepare a data set as `pagellm prepare` does, with its preset, unless it is there."""
    if (Path(data) / dataset / "source.json").exists():
        return
    words = [f"--dataset={dataset}", f"--raw={raw}", f"--data={data}"]
    words += ["--preset=none"] if preset == "none" else []
    prepare.run(parse(prepare.Config, words, "pagellm prepare", "prepare"))


def run_variant(name: str, dataset: str, variant: Variant, seed: int, stages: Stages) -> Path:
    """Make what is missing and return the per_user.parquet of this variant and seed."""
    base = f"{name}/{dataset}-s{seed}"
    common = {"dataset": dataset, "seed": seed, "data": stages.data, "runs": stages.runs}
    prepared(dataset, stages.raw, stages.data, stages.preset)
    pretrain.run(pretrain.Config(run=base, **common, **stages.pretrain))
    sft.run(sft.Config(run=base, **common, **stages.sft))
    own = base
    if variant.policy == "ppo":
        judge = f"{base}-{slug(variant.name)}" if variant.reward else base
        reward.run(
            reward.Config(
                run=judge,
                source_run=base if variant.reward else "",
                **common,
                **stages.reward | variant.reward,
            )
        )
        own = f"{base}-{slug(variant.name)}"
        ppo.run(
            ppo.Config(
                run=own, source_run=base, reward_run=judge, **common, **stages.ppo | variant.ppo
            )
        )
    scoring = {"examples": 0, "quiet": True} | stages.evaluate
    evaluate.run(
        evaluate.Config(run=own, source_run=base, policies=variant.policy, **common, **scoring)
    )
    return Path(stages.runs) / own / "evaluate" / variant.policy / "per_user.parquet"


def study(
    name: str,
    dataset: str,
    variants: list[Variant],
    seeds: Iterable[int],
    stages: Stages | None = None,
) -> dict[str, list[dict[str, np.ndarray]]]:
    """variant name -> one {metric: (U,) array, "user": (U,)} a seed, users in the same order everywhere."""
    stages = stages or Stages()
    return {
        v.name: [per_user(run_variant(name, dataset, v, seed, stages)) for seed in seeds]
        for v in variants
    }


def print_table(records: list[dict]) -> str:
    """Metrics down, variants across: mean, and below it the paired difference to the first, its interval, its d."""
    names = list(dict.fromkeys(r["variant"] for r in records))
    metrics_shown = list(dict.fromkeys(r["metric"] for r in records))
    at = {(r["variant"], r["metric"]): r for r in records}
    arrow = {"up": "↑", "down": "↓"}
    width = max(37, *(len(n) + 2 for n in names))
    lines = [" " * 18 + "".join(f"{n:>{width}}" for n in names)]
    for metric in metrics_shown:
        cells, under = [], []
        for name in names:
            r = at.get((name, metric))
            cells.append("–" if r is None else f"{r['mean']:.4f}")
            under.append(
                ""
                if r is None or name == names[0]
                else f"{r['difference']:+.4f} [{r['low']:+.4f}, {r['high']:+.4f}], d {r['effect']:+.2f}"
            )
        direction = next(r["direction"] for r in records if r["metric"] == metric)
        lines.append(
            f"{metric + ' ' + arrow[direction]:<18}" + "".join(f"{c:>{width}}" for c in cells)
        )
        lines.append(" " * 18 + "".join(f"{c:>{width}}" for c in under))
    return "\n".join(lines)
