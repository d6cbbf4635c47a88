"""Study of backbones (the paper's Table 3, RQ4): GPT-2, Llama, and Llama with low-rank adapters.

    make backbones                      python -m experiments.backbones
    python -m experiments.backbones --dataset toys --raw path/to/files --seeds 1

    python -m experiments.backbones --gpt2 gpt2 --gpt2_weights models/gpt2 --gpt2_bpe models/gpt2 \\
        --llama llama-3.2-1b --llama_weights models/Llama-3.2-1B --llama_bpe models/Llama-3.2-1B \\
        --pretrain "--lr 1e-4" --sft "--lr 1e-4 --checkpoint_blocks"

All rows start from published weights and their tokeniser. If none are named, a stand-in is used:
the same network pre-trained here on another synthetic shop (seed 1: other items, users and brands,
the same kind of text), saved and read back like published files. Each stage runs in a process of
its own, so that its peak memory can be measured. Stages that are done are not run again.

Writes runs/<study>/<dataset>.parquet and .md, and prints the table: ranking metrics with 95%
intervals (bootstrap over seeds and users), then what each backbone costs (mean and range over the
seeds). For a stage that was interrupted, the seconds count from its last start.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from experiments.study import PAIRS_PPO, overrides, prepared
from pagellm import evaluate, ppo, pretrain, reward, sft
from pagellm.data import prepare
from pagellm.model.networks import SIZES, from_state, save_published
from pagellm.model.vocab import Vocab
from pagellm.pages.stats import difference
from pagellm.pages.tables import per_user, write_table
from pagellm.stage.command import deferred_signals, main
from pagellm.stage.config import Options, PageLLMError, check, check_numbers
from pagellm.stage.files import atomic, read_json, slug, write_json
from pagellm.stage.run import load_model_file

__all__ = ["Config", "ROWS", "costs", "markdown", "run", "stand_in", "summary"]


ROOT = Path(__file__).parent.parent
ROWS = ("GPT-2", "Llama", "Llama + LoRA")
RANKING = ("Recall@20", "Recall@40", "NDCG@100")
STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward, "ppo": ppo, "evaluate": evaluate}

FIXED = {"dataset", "run", "data", "runs", "seed", "device", "source_run", "reward_run", "policies"}
FIXED |= {"size", "weights", "bpe", "lora_rank", "lora_alpha", "lora_targets"}  # set by the study
START = {"ppo": PAIRS_PPO}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compare backbones: ranking, seconds, memory, parameters."""

    PRESET_FOLDER: ClassVar[str] = "backbones"  # where rows begin from a published trunk, other
    # options fit

    dataset: str = "synthetic"  # name of the data set
    raw: str = ""  # directory of its raw files, if it is not prepared yet
    study: str = "backbones"  # name of the study: results lie in <runs>/<study>
    seeds: int = 3  # seeds 0, 1, ...; each trains all stages anew
    policy: str = "sft"  # the policy that is scored: sft, or ppo (reward and ppo are run as well)
    gpt2: str = "tiny"  # size of GPT-2
    gpt2_weights: str = ""  # published weights for GPT-2: a path or a name on the hub; empty: a
    # stand-in
    gpt2_bpe: str = ""  # the tokeniser published with them
    llama: str = "llama-tiny"  # size of Llama, with and without adapters
    llama_weights: str = ""  # published weights for Llama; empty: a stand-in
    llama_bpe: str = ""  # the tokeniser published with them
    lora_rank: int = 8  # rank of the adapters
    lora_alpha: float = 16.0  # the adapters' scale is lora_alpha / lora_rank
    lora_targets: str = "q,k,v,o,gate,up,down"  # matrices that get an adapter
    device: str = "auto"  # cpu, cuda, cuda:1; auto takes cuda where there is one
    preset: str = "auto"  # auto: every stage begins with the data set's preset, if there is one;
    # none: with its defaults
    data: str = "data"  # directory of prepared data sets
    runs: str = "runs"  # directory of runs
    pretrain: Options = Options("")  # options for that stage in every row, as on its command line
    sft: Options = Options("")  # options for sft
    reward: Options = Options("")  # options for reward
    ppo: Options = Options("")  # options for ppo
    evaluate: Options = Options("")  # options for evaluate

    def __post_init__(self):
        check_numbers(self)
        check(
            self,
            seeds=(self.seeds > 0, "1 or more"),
            policy=(self.policy in ("sft", "ppo"), "sft or ppo"),
            gpt2=(self.gpt2 in SIZES and "llama" not in self.gpt2, "a size of GPT-2"),
            llama=(self.llama in SIZES and "llama" in self.llama, "a size of Llama"),
            lora_rank=(self.lora_rank > 0, "1 or more"),
            lora_alpha=(self.lora_alpha > 0, "above 0"),
        )
        for name in ("gpt2", "llama"):
            if bool(getattr(self, f"{name}_weights")) != bool(getattr(self, f"{name}_bpe")):
                raise PageLLMError(
                    f"--{name}_weights and --{name}_bpe go together: weights know their own words "
                    "only"
                )

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.study

    def options(self, stage: str) -> dict:
        """Fields that --<stage> sets. Raises PageLLMError for those that the study sets itself."""
        return overrides(STAGES[stage], getattr(self, stage), FIXED, START.get(stage))


def alone(module, **options) -> None:
    """Run a stage in a process of its own, with these fields of its Config.

    If the stage is done already, it runs in this process, which only compares its options. A signal
    is passed on to the child, and this process waits for the child's checkpoint. Raises
    PageLLMError if the child fails.
    """
    config = module.Config(**options)
    if (config.stage(module.__name__.rsplit(".", 1)[-1]) / "done").exists():
        module.run(config)
        return
    command = [
        sys.executable,
        "-m",
        module.__name__,
        "--preset=none",  # the study has looked it up
        *(f"--{name}={value}" for name, value in options.items()),
    ]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with deferred_signals() as waiting:
        # In a session of its own the child gets a terminal's Ctrl-C only from us. Otherwise it
        # would get two signals, and the second would end it before its checkpoint is written.
        child = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": path}, start_new_session=True
        )
        try:
            told = None
            while child.poll() is None:
                try:
                    child.wait(0.2)
                except subprocess.TimeoutExpired:
                    if waiting.signum is not None and told is None:
                        told = waiting.signum
                        child.send_signal(told)
        finally:
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)
                child.wait()
    if child.returncode:
        raise PageLLMError(
            f"{shlex.join(command[1:])} ended with code {child.returncode}; it says above why\n"
            "  The same command carries on."
        )


def stand_in(config: Config, size: str) -> Path:
    """Pre-train a network on another shop and save it like a published model: weights, config,
    tokeniser. Returns the directory."""
    root = config.folder / "other"
    if not (root / "data" / "synthetic" / "source.json").exists():
        prepare.run(prepare.Config(data=str(root / "data"), seed=1))
    alone(
        pretrain, run=size, data=str(root / "data"), runs=str(root), size=size, device=config.device
    )
    trained, folder = root / size / "pretrain", root / "published" / size
    record = {"from": read_json(trained / "done")["id"]}
    if not (folder / "from.json").exists() or read_json(folder / "from.json") != record:
        vocab = Vocab.load(trained)
        folder.mkdir(parents=True, exist_ok=True)
        vocab.save(folder)
        save_published(from_state(load_model_file(trained / "model.pt")), folder, vocab.n_words)
        write_json(folder / "from.json", record)
    return folder


def train(config: Config, row: str, seed: int, start: tuple[str, str, str]) -> str:
    """Run all stages of one row and seed; returns the run. start: size, weights, tokeniser."""
    name = f"{config.study}/{config.dataset}-{slug(row)}-s{seed}"
    common: dict[str, Any] = {
        "dataset": config.dataset,
        "run": name,
        "seed": seed,
        "data": config.data,
        "runs": config.runs,
        "device": config.device,
    }
    own: dict[str, Any] = dict(zip(("size", "weights", "bpe"), start, strict=True))
    if row == ROWS[2]:
        own |= {
            "lora_rank": config.lora_rank,
            "lora_alpha": config.lora_alpha,
            "lora_targets": config.lora_targets,
        }
    alone(pretrain, **common, **own, **config.options("pretrain"))
    alone(sft, **common, **config.options("sft"))
    if config.policy == "ppo":
        alone(reward, **common, **config.options("reward"))
        alone(ppo, **common, **{"force": True} | config.options("ppo"))
    alone(
        evaluate,
        **common,
        **{"policies": config.policy, "examples": 0, "quiet": True} | config.options("evaluate"),
    )
    return name


def costs(folder: Path) -> dict[str, float]:
    """Costs of one run's stages, from their `done` files. An SFT epoch excludes validation."""
    done = {
        stage: read_json(folder / stage / "done")
        for stage in STAGES
        if (folder / stage / "done").exists()
    }
    steps = [
        json.loads(line)["seconds"]
        for line in (folder / "sft" / "timing.jsonl").read_text().splitlines()
    ]
    epochs = read_json(folder / "sft" / "config.json")["config"]["epochs"]
    trained = [stage for stage in done if stage != "evaluate"]
    return {
        **{f"{stage}, s": done[stage]["seconds"] for stage in done},
        "epoch of SFT, s": sum(steps) / epochs,
        "peak memory, MB": max(done[stage]["peak_mb"] for stage in trained),
        "parameters": done["pretrain"]["parameters"],
        "of these trained": done["pretrain"]["trainable"],
    }


def summary(scores: dict[str, list[dict]], spent: dict[str, list[dict]]) -> list[dict]:
    """One record for each row and quantity.

    For a metric: mean, interval low..high, and the paired difference to the first row with its
    interval. For a cost: mean, and low..high is the range over the seeds.

    scores  row -> {metric: (U,)} for each seed
    spent   row -> `costs` for each seed
    """
    records, first = [], next(iter(scores))
    for row in scores:
        for metric in RANKING:
            mine, base = [s[metric] for s in scores[row]], [s[metric] for s in scores[first]]
            mean, low, high = difference(mine, [np.zeros_like(x) for x in mine])
            more = (0.0, 0.0, 0.0) if row == first else difference(mine, base)
            records.append(
                {
                    "row": row,
                    "quantity": metric,
                    "kind": "ranking",
                    "mean": mean,
                    "low": low,
                    "high": high,
                    **dict(
                        zip(("difference", "difference_low", "difference_high"), more, strict=True)
                    ),
                }
            )
        for name in spent[row][0]:
            values = [s[name] for s in spent[row]]
            records.append(
                {
                    "row": row,
                    "quantity": name,
                    "kind": "cost",
                    "mean": float(np.mean(values)),
                    "low": float(min(values)),
                    "high": float(max(values)),
                }
            )
    return records


def markdown(records: list[dict]) -> str:
    """The records as a Markdown table: quantities down, backbones across."""
    rows = list(dict.fromkeys(r["row"] for r in records))
    names = list(dict.fromkeys(r["quantity"] for r in records))
    at = {(r["row"], r["quantity"]): r for r in records}
    lines = ["| | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for name in names:
        found = [at[row, name] for row in rows]
        if found[0]["kind"] == "ranking":
            lines.append(
                f"| {name} ↑ | "
                + " | ".join(f"{r['mean']:.4f} [{r['low']:.4f}, {r['high']:.4f}]" for r in found)
                + " |"
            )
            lines.append(
                f"| − {rows[0]} | | "
                + " | ".join(
                    f"{r['difference']:+.4f} [{r['difference_low']:+.4f}, "
                    f"{r['difference_high']:+.4f}]"
                    for r in found[1:]
                )
                + " |"
            )
            continue
        digits = 0 if found[0]["mean"] >= 100 else 1 if found[0]["mean"] >= 10 else 2
        cells = [
            f"{r['mean']:,.{digits}f}"
            + (f" ({r['low']:,.{digits}f}–{r['high']:,.{digits}f})" if r["low"] < r["high"] else "")
            for r in found
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(config: Config) -> list[dict]:
    for stage in STAGES:
        config.options(stage)
    prepared(config.dataset, config.raw, config.data, config.preset)
    starts = {}
    for name, size, weights, bpe in (
        ("gpt2", config.gpt2, config.gpt2_weights, config.gpt2_bpe),
        ("llama", config.llama, config.llama_weights, config.llama_bpe),
    ):
        source = weights or str(stand_in(config, size))
        starts[name] = size, source, bpe or source
    scores: dict[str, list[dict]] = {row: [] for row in ROWS}
    spent: dict[str, list[dict]] = {row: [] for row in ROWS}
    for seed in range(config.seeds):
        for row in ROWS:
            folder = Path(config.runs) / train(
                config, row, seed, starts["gpt2" if row == ROWS[0] else "llama"]
            )
            scores[row].append(per_user(folder / "evaluate" / config.policy / "per_user.parquet"))
            spent[row].append(costs(folder))
    records = summary(scores, spent)
    write_table(config.folder / f"{config.dataset}.parquet", records)
    origin = {
        name: "published weights"
        if getattr(config, f"{name}_weights")
        else "pre-trained on another shop"
        for name in starts
    }
    heading = (
        f"{config.dataset}, {config.policy}, {config.seeds} seeds. GPT-2: {config.gpt2}, "
        f"{origin['gpt2']}; Llama: {config.llama}, {origin['llama']}; adapters of rank "
        f"{config.lora_rank} on {config.lora_targets}"
    )
    text = f"{heading}\n\n{markdown(records)}\n"
    with atomic(config.folder / f"{config.dataset}.md") as beside:
        beside.write_text(text)
    print(
        f"{text}\n"
        "In brackets 95% intervals (bootstrap over seeds and users), behind costs their range "
        f"over the seeds\n{config.folder / config.dataset}.parquet, .md"
    )
    return records


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.backbones"))
