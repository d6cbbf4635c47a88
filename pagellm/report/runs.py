"""List the runs that are there: stages, date, NDCG@100, hash of the weights, and which is live.

    pagellm runs                    every run below ./runs, the newest first

Reads   runs/*/<stage>/config.json and done, runs/*/evaluate/metrics.json. Writes nothing.

A run is live if a link in the directory of runs leads to it, as `runs/live -> autumn` does.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pagellm.evaluate import LABELS
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError
from pagellm.stage.files import read_json

__all__ = ["UNREADABLE", "Config", "described", "links", "run"]


STAGES = ("pretrain", "update", "sft", "reward", "ppo", "compose", "evaluate", "baselines")
POLICIES = ("compose", "ppo", "sft")  # the policy shown is the first of these that is there
METRIC = "NDCG@100"
UNREADABLE = (PageLLMError, OSError, KeyError, TypeError)  # what a damaged run's files raise


@dataclass(frozen=True, kw_only=True)
class Config:
    """List the runs that are there, the newest first."""

    runs: str = "runs"  # directory of runs
    dataset: str = ""  # only runs of this data set; empty: all
    json: bool = False  # print one JSON object a line instead of a table


def links(runs: Path) -> dict[Path, list[str]]:
    """Directory of a run -> names of the links in `runs` that lead to it."""
    found: dict[Path, list[str]] = {}
    for path in sorted(runs.iterdir()):
        if path.is_symlink():
            found.setdefault(path.resolve(), []).append(path.name)
    return found


def finished_stages(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """(stage, its `done` record) of what a run holds; None for a stage that was only begun."""
    for stage in STAGES:
        if (path / stage / "done").exists():
            yield stage, read_json(path / stage / "done")
        elif (path / stage / "config.json").exists():
            yield stage, None


def described(path: Path) -> dict[str, Any] | None:
    """What a run's directory says about the run; None if it holds no stage.

    returns  run, dataset, stages (done), begun (not finished), changed (seconds since 1970),
             policy (the last one evaluated or trained), NDCG@100 of it on held-out rows (None: not
             evaluated), hash (of its weights)
    """
    stages = dict(finished_stages(path))
    if not stages:
        return None
    files = [path / s / n for s in stages for n in ("done", "log.jsonl", "config.json")]
    made = read_json(path / next(iter(stages)) / "config.json")["config"]
    results = path / "evaluate" / "metrics.json"
    scores = read_json(results) if stages.get("evaluate") and results.exists() else {}
    known = [p for p in POLICIES if p in scores] or [p for p in POLICIES if stages.get(p)]
    policy = known[0] if known else ""
    return {
        "run": path.name,
        "dataset": made.get("dataset", ""),
        "stages": [stage for stage, done in stages.items() if done is not None],
        "begun": [stage for stage, done in stages.items() if done is None],
        "changed": max(file.stat().st_mtime for file in files if file.exists()),
        "policy": policy,
        METRIC: scores.get(policy, {}).get(METRIC, {}).get("mean"),
        "hash": (stages.get(policy) or {}).get("id"),
    }


def table(found: list[dict[str, Any]]) -> str:
    """The runs as lines of text."""
    heading = ("run", "data", "changed", METRIC, "of", "weights", "stages")
    rows = [heading]
    for r in found:
        begun = [f"({stage} begun)" for stage in r["begun"]]
        mark = "".join(f" <- {name}" for name in r["links"])
        rows.append(
            (
                r["run"] + mark,
                r["dataset"],
                f"{datetime.fromtimestamp(r['changed']):%Y-%m-%d %H:%M}",
                "–" if r[METRIC] is None else f"{r[METRIC]:.4f}",
                LABELS.get(r["policy"], r["policy"]) or "–",
                r["hash"] or "–",
                " ".join([*r["stages"], *begun]),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(heading))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def run(config: Config) -> list[dict[str, Any]]:
    """Print and return the runs. Raises PageLLMError where there are none."""
    runs = Path(config.runs)
    found = []
    if runs.is_dir():
        linked = links(runs)
        for path in runs.iterdir():
            if path.is_symlink() or not path.is_dir():
                continue
            try:
                record = described(path)
            except UNREADABLE as error:  # one damaged run hides no other
                print(f"pagellm runs: {path.name} cannot be read: {error}", file=sys.stderr)
                continue
            if record:
                found.append(record | {"links": linked.get(path.resolve(), [])})
    found = [r for r in found if config.dataset in ("", r["dataset"])]
    if not found:
        of = f" of {config.dataset}" if config.dataset else ""
        raise PageLLMError(f"no run{of} in {runs}\n  Name the directory of runs with --runs.")
    found.sort(key=lambda r: -r["changed"])
    print("\n".join(map(json.dumps, found)) if config.json else table(found))
    return found


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm runs"))
