"""One command from a shop's log to pages: prepare, tune, train, compose, evaluate.

Reads   raw files of any format (--raw), or data/<dataset>
Writes  data/<dataset>, runs/<run>/<stage> of every stage kept, runs/<run>/fit/summary.txt

    pagellm fit --dataset mine --raw log.csv        make DATASET=mine RAW=log.csv

1. prepare, unless data/<dataset> is there.
2. tune, unless the run or the data set has a preset (--tune always or never decides otherwise).
3. Train the stages that were kept, fit the plain models, and evaluate. Test rows are read only
   here.
4. Print a table beside popularity, EASE, ALS+facts and ALS+facts re-ranked; the stages that were
   kept and those that added nothing; the minutes of each stage.

A stage that is done is not run again. The same command carries on what was interrupted.
"""

import importlib
import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagellm import tune
from pagellm.data import prepare
from pagellm.data.stores import is_remote
from pagellm.evaluate import LABELS
from pagellm.pages.yardstick import verdict_grid
from pagellm.stage import presets
from pagellm.stage.command import main
from pagellm.stage.config import Options, PageLLMError, check, parse
from pagellm.stage.files import atomic, read_json, write_json
from pagellm.stage.order import in_order, reads
from pagellm.stage.run import StageConfig

__all__ = ["Config", "run"]

# Rows of the summary and its metrics, where they are there.
ROWS = ("popularity", "EASE", "ALS+facts", "ALS+facts + MMR", "LightGBM")
METRICS = ("Recall@20", "Recall@40", "NDCG@100", "PWKT", "ILD", "entropy", "redundancy", "energy")
TUNES = ("auto", "always", "never")


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """From a log to pages, with nothing set by hand: every stage that pays, and one table."""

    raw: str = ""  # directory or file of the log; empty: data/raw/<dataset>. Not read again once
    # data/<dataset> is there
    prepare: Options = Options("")  # options of prepare, as on its command line, for a log whose
    # columns are not recognised
    minutes: float = 15.0  # minutes that tune may take, where there is no preset
    tune: str = "auto"  # auto: tune where neither the run nor the data set has a preset; always;
    # never: the options of every stage are those of the preset or the defaults

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            minutes=(self.minutes > 0, "above 0"),
            tune=(self.tune in TUNES, ", ".join(TUNES)),
            preset=(self.preset in ("auto", "none"), "auto or none"),
            raw=(not self.raw or self.dataset != "synthetic", prepare.MADE_UP),
        )

    @property
    def folder(self) -> Path:
        """Directory of the run."""
        return self.stage("")

    def words(self) -> list[str]:
        """The options that every stage shares, as words."""
        shared = ("dataset", "run", "data", "runs", "seed", "device", "preset")
        return [f"--{name}={getattr(self, name)}" for name in shared if getattr(self, name) != ""]


def tell(line: str) -> None:
    """A line about a preset that was found."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def minutes_of(config: Config, stage: str) -> Iterator[None]:
    """Add the minutes of a block to runs/<run>/fit/minutes.json: of the clock, and of processors.

    An interrupted block adds nothing, and one of less than a second does not count as work.
    """
    path = config.stage("fit") / "minutes.json"
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    took, worked = time.perf_counter() - wall, time.process_time() - cpu
    known: dict[str, Any] = read_json(path) if path.exists() else {}
    if took < 1 and stage in known:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, known | {stage: {"minutes": took / 60, "processor": worked / 60}})


def prepared(config: Config) -> None:
    """Prepare the data set, unless it is there."""
    if (config.data_dir / "source.json").exists():
        return
    raw, words = Path(config.raw).expanduser(), [f"--dataset={config.dataset}"]
    words += [f"--data={config.data}"]
    if is_remote(config.raw):
        words += [f"--raw={config.raw}"]
    elif config.raw and not raw.exists():
        raise PageLLMError(f"{raw}: no such file or directory; --raw names the log")
    elif config.raw and raw.is_file():
        words += [f"--raw={raw.parent}", f"--review_files={raw.name}"]
    elif config.raw:
        words += [f"--raw={raw}"]
    words += ["--preset=none"] if config.preset == "none" else []
    # The data set's own preset is found by `parse`; fit's has put it before --prepare's words too.
    more = [w for w in shlex.split(config.prepare) if not w.startswith("@")]
    given = {w[2:].partition("=")[0] for w in more if w.startswith("--")}
    words = [w for w in words if w[2:].partition("=")[0] not in given]
    try:
        prepare.run(parse(prepare.Config, words + more, "pagellm prepare", "prepare", tell))
    except PageLLMError as error:
        if "--" not in str(error):
            raise
        raise PageLLMError(
            f"{error}\n  These are options of prepare. With fit they stand in quotes: "
            '--prepare "--item_column sku"'
        ) from error


def tuned(config: Config) -> None:
    """Tune where it is wanted: see Config.tune."""
    own = config.stage("preset") / "stages.json"
    known = own.exists() or (
        config.preset != "none" and presets.has_one(config.dataset, config.folder)
    )
    if config.tune == "never" or own.exists() or (known and config.tune == "auto"):
        return
    words = [w for w in config.words() if not w.startswith("--preset")]
    words += [f"--minutes={config.minutes:g}"]
    tune.run(parse(tune.Config, words, "pagellm tune"))


def stages_of(config: Config) -> tuple[list[str], list[str]]:
    """The stages to run, and what tune left out.

    Without tune: PPO, composed pages, and all that these read.
    """
    path = config.stage("preset") / "stages.json"
    if not path.exists():
        return in_order("ppo,compose", lambda stage: reads(stage, options_of(config, stage))), []
    record = read_json(path)
    return record["stages"], record["left_out"]


def options_of(config: Config, stage: str) -> Any:
    """The options that a stage will have, its preset's included."""
    loaded = importlib.import_module(f"pagellm.{stage}")
    return parse(loaded.Config, config.words(), f"pagellm {stage}", stage, lambda line: None)


def run_stage(config: Config, verb: str, module: str) -> Any:
    """Run a stage as its command would, with its preset."""
    loaded = importlib.import_module(module)
    return loaded.run(parse(loaded.Config, config.words(), f"pagellm {verb}", verb, tell))


def summary(config: Config, kept: list[str], left_out: list[str]) -> str:
    """The table against plain rows, ahead or not; stages; minutes."""
    versus = json.loads((config.stage("evaluate") / "versus.json").read_text())
    plain = json.loads((config.stage("baselines") / "metrics.json").read_text())
    ours = json.loads((config.stage("evaluate") / "metrics.json").read_text())
    last = [name for name in LABELS if name in ours][-1]  # the one that versus.json compares
    rows = {name: plain[name] for name in ROWS if name in plain} | {"PageLLM": ours[last]}
    known = {m for row in rows.values() for m, x in row.items() if x["mean"] is not None}
    shown = [m for m in METRICS if m in known]
    return "\n".join(
        [
            f"{config.dataset}, test rows; PageLLM: {what_it_is(config, last)}",
            "",
            means_table(rows, shown),
            "",
            verdict_grid([r for r in versus if r["row"] in ROWS], shown),
            "",
            f"stages of the run: {', '.join(kept)}",
            f"added nothing, or not tried: {', '.join(left_out) or 'none'}",
            "",
            times_table(read_json(config.stage("fit") / "minutes.json")),
            "",
        ]
    )


def what_it_is(config: Config, last: str) -> str:
    """The last policy in words."""
    if last != "compose":
        return LABELS[last]
    if read_json(config.stage("compose") / "done").get("plain_pages"):
        return "the pages of ALS+facts with MMR; nothing that was learnt was better on validation"
    policy = read_json(config.stage("compose") / "config.json")["config"]["policy"]
    if policy == "none":
        return "composed pages of plain models alone; the language model added nothing"
    return f"composed pages, with the language model of {policy}"


def times_table(took: dict[str, dict[str, float]]) -> str:
    """Minutes of every stage, and of all."""
    total = {part: sum(x[part] for x in took.values()) for part in ("minutes", "processor")}
    lines = [f"  {'':<12}{'minutes':>9}{'of processor':>14}"]
    for name, x in [*took.items(), ("all", total)]:
        lines.append(f"  {name:<12}{x['minutes']:>9.1f}{x['processor']:>14.1f}")
    return "\n".join(lines)


def means_table(rows: dict[str, dict], metrics: list[str]) -> str:
    """Means of every row."""
    lines = [f"{'':<18}" + "".join(f"{m:>12}" for m in metrics)]
    for name, row in rows.items():
        means = [row.get(m, {}).get("mean") for m in metrics]
        cells = "".join(f"{'–' if x is None else f'{x:.4f}':>12}" for x in means)
        lines.append(f"{name:<18}{cells}")
    return "\n".join(lines)


def run(config: Config) -> dict[str, dict]:
    """Run all of it; returns policy -> metric -> {mean, low, high, ...} on test rows."""
    with minutes_of(config, "prepare"):
        prepared(config)
    with minutes_of(config, "tune"):
        tuned(config)
    kept, left_out = stages_of(config)
    for stage in kept:
        with minutes_of(config, stage):
            run_stage(config, stage, f"pagellm.{stage}")
    with minutes_of(config, "baselines"):
        run_stage(config, "baselines", "pagellm.baselines.compare")
    with minutes_of(config, "evaluate"):
        results = run_stage(config, "evaluate", "pagellm.evaluate")
    text = summary(config, kept, left_out)
    with atomic(config.stage("fit") / "summary.txt") as beside:
        beside.write_text(text)
    print(text, flush=True)
    return results


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm fit"))
