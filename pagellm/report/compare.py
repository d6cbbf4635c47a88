"""Compare two runs, metric by metric: paired differences over the same users, with intervals.

    pagellm compare autumn winter               winter - autumn, of what each of them evaluated last
    pagellm compare autumn winter --policy sft

Reads   runs/<a>/evaluate and runs/<b>/evaluate. Writes nothing.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pagellm.evaluate import LABELS
from pagellm.pages import metrics, stats
from pagellm.pages.tables import ALL_COLUMNS, DAGGER, check_decimals, dagger, heading, per_user
from pagellm.report.runs import described
from pagellm.stage import hints
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import read_json
from pagellm.stage.run import finished

__all__ = ["Config", "run"]


POLICIES = ("compose", "ppo", "sft", "popularity")  # the first one evaluated counts
SAME = (
    "dataset",
    "split",
    "mask",
    "k",
)  # options of evaluate that must be equal, or scores cannot be compared


@dataclass(frozen=True, kw_only=True)
class Config:
    """Paired differences of two runs, over the same held-out users: b - a."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("a", "b")

    a: str = ""  # a run
    b: str = ""  # another run; differences are b - a
    policy: str = ""  # whose pages: sft, ppo, compose; empty: the last that each has evaluated
    runs: str = "runs"  # directory of runs
    seed: int = 0  # seed of the bootstrap draws
    n_boot: int = 1000  # bootstrap draws for each interval and p-value
    decimals: int = 4  # digits after the decimal point

    def __post_init__(self):
        if not (self.a and self.b):
            raise PageLLMError("want two runs: pagellm compare A B; `pagellm runs` lists them")
        check(
            self,
            policy=(self.policy in ("", *POLICIES), f"{', '.join(POLICIES)}, or nothing"),
            n_boot=(self.n_boot > 1, "2 or more"),
            decimals=check_decimals(self.decimals),
        )


def scores_of(config: Config, name: str) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
    """A run's policy, its scores metric -> (U,), and the record of its evaluation."""
    folder = Path(config.runs) / name / "evaluate"
    dataset = (described(folder.parent) or {}).get("dataset", "")
    finished(folder, "evaluation", hints.command("evaluate", dataset, name))
    there = [p for p in POLICIES if (folder / p / "per_user.parquet").exists()]
    policy = config.policy or next(iter(there), "")
    if policy not in there:
        raise PageLLMError(f"{folder} has no pages of {policy}; there are {', '.join(there)}")
    return policy, per_user(folder / policy / "per_user.parquet"), read_json(folder / "config.json")


def check_same(config: Config, a: dict[str, Any], b: dict[str, Any]) -> None:
    """Raise PageLLMError for evaluations of other data, splits or lengths of page."""
    pairs = [(name, a["config"].get(name), b["config"].get(name)) for name in SAME]
    pairs.append(("data", a["inputs"].get("data"), b["inputs"].get("data")))
    if differ := [f"{name} {x!r} and {y!r}" for name, x, y in pairs if x != y]:
        raise PageLLMError(
            f"{config.a} and {config.b} were not evaluated alike: {'; '.join(differ)}\n"
            "  Evaluate both on the same data with the same options."
        )


def run(config: Config) -> list[dict[str, Any]]:
    """Print and return one record for each metric: a, b, difference, low, high, p, p_holm, effect.

    Raises PageLLMError where a run was not evaluated, or not like the other one.
    """
    policy_a, a, made_a = scores_of(config, config.a)
    policy_b, b, made_b = scores_of(config, config.b)
    check_same(config, made_a, made_b)
    if not np.array_equal(a["user"], b["user"]):
        raise PageLLMError(f"{config.a} and {config.b} were scored on other users")
    records = []
    for metric in (m for m in ALL_COLUMNS if m in a and m in b):
        mean, low, high, p = stats.interval([b[metric]], [a[metric]], config.seed, config.n_boot)
        if np.isnan(mean):
            continue
        values = {"a": float(np.nanmean(a[metric])), "b": float(np.nanmean(b[metric]))}
        spans = {"difference": mean, "low": low, "high": high, "p": p}
        effect = stats.effect([b[metric]], [a[metric]])
        records.append({"metric": metric, **values, **spans, "effect": effect, "of": ""})
    for record in stats.with_holm(records, "of"):
        del record["of"]
    names = [
        f"{name}: {LABELS.get(policy, policy)}"
        for name, policy in ((config.a, policy_a), (config.b, policy_b))
    ]
    made, users = made_a["config"], len(a["user"])
    print(
        f"{made['dataset']}: {hints.counted(users, 'user')}, {made['split']} split, pages of "
        f"{made['k']}\n"
        f"a  {names[0]}\nb  {names[1]}\n\n{table(records, config.decimals)}"
    )
    return records


def table(records: list[dict[str, Any]], decimals: int) -> str:
    """The records as text. "ahead" and "behind" say where b is clearly better or worse than a."""
    d = decimals
    lines = [
        f"{'':<18}{'a':>10}{'b':>10}{'b - a':>12}  {'95% interval':<24}{'p (Holm)':>9}{'d':>8}"
    ]
    for r in records:
        better = (r["difference"] > 0) == (metrics.DIRECTION.get(r["metric"], "up") == "up")
        word = ("ahead" if better else "behind") if dagger(r) else ""
        span = f"[{r['low']:+.{d}f}, {r['high']:+.{d}f}]"
        lines.append(
            f"{heading(r['metric']):<18}{r['a']:>10.{d}f}{r['b']:>10.{d}f}"
            f"{r['difference']:>+11.{d}f}{dagger(r) or ' '}  {span:<24}"
            f"{r['p_holm']:>9.4f}{r['effect']:>+8.2f}  {word}".rstrip()
        )
    return "\n".join([*lines, *([DAGGER] if any(map(dagger, records)) else [])])


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm compare"))
