"""A study trains several variants with several seeds and compares them on the same users.

    rows = [
        Variant("mixed"),
        Variant("item-only", ppo={"w_page": 0.0}),
        Variant("without reward", policy="sft"),
    ]
    results = study("ablation", "synthetic", rows, seeds=range(3))
    records = publish(results, Path("runs/ablation/synthetic-mine.parquet"), "synthetic")

Variants of one seed share pretrain and sft, in the run <study>/<dataset>-s<seed>. They also share
the reward model, unless a variant has options for it, and the outcome model of the stage compose,
where a variant is paid by it (--item_reward outcome). Stages that are done are not run again.

Each variant is compared with the first one: the difference for each user, and its 95% interval from
a two-level bootstrap (seeds, then users), because both vary.

To add a study, write experiments/<name>.py with a list of Variants, a Config and a run(config) that
calls study and publish; experiments/ablation.py is an example. Its table has to lie in
<runs>/<study>/<dataset>-*.parquet for `make report` to show it.
"""

import shlex
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pagellm import compose, evaluate, ppo, pretrain, reward, sft
from pagellm.__main__ import VERBS
from pagellm.data import prepare
from pagellm.pages.tables import ALL_COLUMNS, compare, compare_seeds, per_user, save, write_table
from pagellm.stage import hints
from pagellm.stage.config import PageLLMError, parse
from pagellm.stage.files import slug

__all__ = [
    "COMMON",
    "PAIRS_PPO",
    "Stages",
    "Variant",
    "common_fields",
    "overrides",
    "prepared",
    "print_table",
    "publish",
    "run_variant",
    "study",
]


# Fields of a stage that a study sets, whatever the stage. A study adds its own to them.
COMMON = frozenset({"dataset", "run", "data", "runs", "seed", "source_run", "policies"})
# Where a study of the paper's PPO begins, whatever the data set's preset pays PPO with.
PAIRS_PPO = {"algo": "ppo", "item_reward": "pairs", "w_page": 1.0}


@dataclass(frozen=True)
class Variant:
    """One row of a study: which policy is scored, and how its stages differ from the others'."""

    name: str  # name of the row
    policy: str = "ppo"  # policy that is scored: ppo, or sft, the policy without reward
    ppo: dict = field(default_factory=dict)  # fields of ppo.Config that this variant changes
    reward: dict = field(default_factory=dict)  # fields of reward.Config; if there are any, the
    # variant gets a reward model of its own


@dataclass(frozen=True)
class Stages:
    """What all variants share: directories, and fields of the stages' Configs."""

    data: str = "data"  # directory of prepared data sets
    runs: str = "runs"  # directory of runs
    raw: str = ""  # directory of raw files, if the data set is not prepared yet
    preset: str = "auto"  # none: prepare a missing data set without its preset
    pretrain: dict = field(default_factory=dict)  # fields of that stage's Config
    sft: dict = field(default_factory=dict)
    reward: dict = field(default_factory=dict)
    compose: dict = field(default_factory=dict)  # run only where the outcome reward pays PPO
    ppo: dict = field(default_factory=dict)
    evaluate: dict = field(default_factory=dict)


def overrides(
    module, text: str, fixed: Collection[str] = (), start: Mapping[str, Any] | None = None
) -> dict:
    """Options of a stage that differ from its defaults: "--lr 0.1 --k 10" -> {"lr": 0.1, "k": 10}.

    Such a text is in a study's field of type Options. Where the study runs as a command, `parse`
    has put the data set's preset before what was typed: "@toys/sft --lr 0.1".

    fixed   what the study sets itself. A preset's value of it is left out, and this is said
    start   values that replace the preset's, and that what is typed replaces: this is said too

    Raises PageLLMError for what is no option of the stage, and for one of `fixed` that was typed.
    """
    verb = next(verb for verb, name in VERBS.items() if name == module.__name__)
    default = module.Config()

    def differing(words: list[str]) -> dict:
        config = parse(module.Config, words, f"pagellm {verb}")
        every = {name: getattr(config, name) for name in config.__dataclass_fields__}
        return {name: value for name, value in every.items() if value != getattr(default, name)}

    words = shlex.split(text)
    files, own = [w for w in words if w.startswith("@")], [w for w in words if w[:1] != "@"]
    given = {w[2:].partition("=")[0] for w in own if w.startswith("--")}
    start = {name: x for name, x in (start or {}).items() if name not in {*fixed, *given}}
    for name, value in start.items() if files else ():
        if getattr(parse(module.Config, files, f"pagellm {verb}"), name) != value:
            print(
                f"{verb}: the study begins with --{name} {value}, whatever the preset says; "
                f"--{verb} takes another",
                file=sys.stderr,
            )
    found = differing([*files, *(f"--{name}={value}" for name, value in start.items()), *own])
    typed = differing(own)
    if "preset" in found:
        raise PageLLMError(
            f"--{verb} must not set preset\n  Name it as @{found['preset']}, or switch presets off "
            "for the whole study: --preset none"
        )
    if refused := set(fixed) & set(typed):
        raise PageLLMError(f"--{verb} must not set {', '.join(sorted(refused))}: the study does")
    if left := set(fixed) & set(found):
        print(
            f"{verb}: the study sets {', '.join(sorted(left))} itself, whatever the preset says",
            file=sys.stderr,
        )
    return {name: value for name, value in found.items() if name not in left}


def prepared(dataset: str, raw: str, data: str, preset: str = "auto") -> None:
    """Prepare a data set as `pagellm prepare` does, with its preset, unless it is there."""
    if (Path(data) / dataset / "source.json").exists():
        return
    words = [f"--dataset={dataset}", f"--raw={raw}", f"--data={data}"]
    words += ["--preset=none"] if preset == "none" else []
    prepare.run(parse(prepare.Config, words, "pagellm prepare", "prepare"))


def common_fields(places: Any, dataset: str, seed: int) -> dict[str, Any]:
    """Fields that every stage of one seed has.

    places  has `data` and `runs`, the directories: Stages, or a study's own Config
    """
    return {"dataset": dataset, "seed": seed, "data": places.data, "runs": places.runs}


def run_variant(name: str, dataset: str, variant: Variant, seed: int, stages: Stages) -> Path:
    """Run the stages that are missing and return this variant and seed's per_user.parquet."""
    base = f"{name}/{dataset}-s{seed}"
    common = common_fields(stages, dataset, seed)
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
        # A study asks what training does, whatever the gate before it would say.
        fields: dict[str, Any] = {"force": True} | stages.ppo | variant.ppo
        config = ppo.Config(run=own, source_run=base, reward_run=judge, **common, **fields)
        if config.reads_outcome:
            compose.run(compose.Config(run=base, **common, **stages.compose))
        ppo.run(config)
    scoring: dict[str, Any] = {"examples": 0, "quiet": True} | stages.evaluate
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
    """Run all variants with all seeds.

    name     of the study: runs and results lie in <runs>/<name>
    returns  variant's name -> for each seed {metric: (U,), "user": (U,)}; the users' order is the
             same everywhere
    """
    stages = stages or Stages()
    return {
        v.name: [per_user(run_variant(name, dataset, v, seed, stages)) for seed in seeds]
        for v in variants
    }


def publish(
    results: dict[str, list[dict[str, np.ndarray]]],
    path: Path,
    dataset: str,
    note: str = "",
    more: Mapping[str, dict] | None = None,
) -> list[dict]:
    """Compare the rows with the first one, write the table and print it.

    results  name -> for each seed what `tables.per_user` reads
    path     of the Parquet table; Markdown and LaTeX with effect sizes lie beside it, in a
             directory of this name without its suffix
    note     a line to print under the table
    more     name -> further columns of its rows in the Parquet table
    returns  the records of compare_seeds
    """
    records = compare_seeds(results, ALL_COLUMNS)
    write_table(path, [record | (more or {}).get(record["variant"], {}) for record in records])
    first, seeds = next(iter(results)), len(next(iter(results.values())))
    heading = (
        f"{dataset}: {hints.counted(seeds, 'seed')}; paired difference to {first!r} with its 95% "
        "interval (bootstrap over seeds and users) and effect size d"
    )
    save(path.with_suffix(""), compare(results, ALL_COLUMNS, first), heading)
    print("\n".join([print_table(records), "", *filter(None, [note]), heading, str(path)]))
    return records


def print_table(records: list[dict]) -> str:
    """The records of tables.compare_seeds as text: metrics down, variants across.

    Each cell holds the mean, and below it the difference to the first variant, its interval and d.
    """
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
                else f"{r['difference']:+.4f} [{r['low']:+.4f}, {r['high']:+.4f}], "
                f"d {r['effect']:+.2f}"
            )
        direction = next(r["direction"] for r in records if r["metric"] == metric)
        lines.append(
            f"{metric + ' ' + arrow[direction]:<18}" + "".join(f"{c:>{width}}" for c in cells)
        )
        lines.append(" " * 18 + "".join(f"{c:>{width}}" for c in under))
    return "\n".join(lines)
