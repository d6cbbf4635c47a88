"""Make a run the live one: compare it with the live run, then point the link at it.

    pagellm promote v2            runs/live -> v2, unless v2 is behind the run that is live
    pagellm promote --back        runs/live -> the run before
    pagellm serve --run live      takes up the new weights at its next look, losing no request

Reads   runs/<run>/evaluate, of both runs
Writes  runs/<live>, a symbolic link; runs/<live>.promotions.jsonl, one line a promotion
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pagellm.pages import stats
from pagellm.pages.metrics import DIRECTION
from pagellm.pages.tables import per_user
from pagellm.pages.yardstick import SHARE, verdict
from pagellm.serving.sources import WRITERS
from pagellm.stage import hints
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check, check_numbers
from pagellm.stage.files import atomic, read_json

__all__ = ["Config", "run"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Make a run the live one, unless its pages are worse than those of the run that is live."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("run",)

    run: str = ""  # the run that is to be live
    live: str = "live"  # name of the link, which `pagellm serve --run live` follows
    runs: str = "runs"  # directory of runs
    metric: str = "NDCG@100"  # metric by which the run must not be worse than the live one: the 95%
    # interval of the difference decides; where the data differ, a mean lower by more than --worse
    back: bool = False  # go back to the run that was live before
    worse: float = SHARE  # where the two runs were scored on different data, as those of two days
    # are: share by which the mean may be below that of the live run
    force: bool = False  # promote whatever the comparison says
    seed: int = 0  # seed of the bootstrap
    n_boot: int = 1000  # bootstrap draws for each interval

    def __post_init__(self):
        check_numbers(self)
        for name in ("run", "live"):
            value = getattr(self, name)
            check(self, **{name: (value == Path(value).name, f"a name below {self.runs}")})
        if self.run and self.run == self.live:
            raise PageLLMError(
                f"{self.run!r} is the name of the link, which leads to the run that is live\n"
                "  Name the run that it is to lead to; see those that are there with: pagellm runs"
                "\n  The run before is made live by: pagellm promote --back"
            )
        check(
            self,
            run=(bool(self.run) != self.back, "a run, or --back and no run"),
            live=(bool(self.live), "a name for the link"),
            n_boot=(self.n_boot > 1, "2 or more"),
        )


@dataclass(frozen=True)
class Scores:
    """What `pagellm evaluate` found about one run: its last policy's row.

    data    hash of the data it was scored on, with the split and the mask
    values  (U,) the metric of every user
    users   (U,) their numbers
    """

    policy: str
    data: tuple[str, str, str]
    users: np.ndarray
    values: np.ndarray


def scores_of(folder: Path, metric: str) -> Scores:
    """The evaluated scores of a run. Raises PageLLMError if it was not evaluated."""
    where = folder / "evaluate"
    if not (where / "done").exists():
        stage = next(iter(sorted(folder.glob("*/config.json"))), None)
        dataset = read_json(stage)["config"].get("dataset", "") if stage else ""
        raise PageLLMError(
            f"{folder.name} was not evaluated, so nothing says what its pages are worth\n"
            f"  Evaluate it with: {hints.command('evaluate', dataset, folder.name)}\n"
            "  or promote it all the same with --force"
        )
    made = read_json(where / "config.json")
    config = made["config"]
    rows = [name for name in config["policies"].split(",") if name != "popularity"]
    if not rows:
        raise PageLLMError(f"{where} holds no policy but popularity; evaluate it again")
    table = per_user(where / rows[-1] / "per_user.parquet")
    if metric not in table or metric == "user":
        known = ", ".join(sorted(set(table) - {"user"}))
        raise PageLLMError(f"metric={metric!r} is not in {where}; it has {known}")
    data = (made["inputs"]["data"], config["split"], config["mask"])
    return Scores(rows[-1], data, table["user"], table[metric])


def compare(new: Scores, old: Scores, config: Config) -> tuple[str, str]:
    """Ahead, level or behind, and the numbers in words.

    On the same data the difference is paired by user, and its interval decides. On different data
    only the two means can be compared: behind then means more than config.worse below.
    """
    sign = -1.0 if DIRECTION.get(config.metric, "up") == "down" else 1.0
    a, b = float(np.nanmean(new.values)), float(np.nanmean(old.values))
    means = f"{config.metric} {a:.4f} against {b:.4f}"
    if new.data == old.data and np.array_equal(new.users, old.users):
        mean, low, high, _ = stats.interval([new.values], [old.values], config.seed, config.n_boot)
        if sign < 0:
            mean, low, high = -mean, -high, -low
        said = f"{means}, better by {mean:+.4f} [{low:+.4f}, {high:+.4f}] on the same users"
        return verdict(low, high, b), said
    said = f"{means}, scored on other data, so only the means are compared"
    if sign * (a - b) > 0:
        return "ahead", said
    return ("level" if sign * (a - b) >= -config.worse * abs(b) else "behind"), said


def target(link: Path) -> str:
    """The run that a link names; empty if there is no link."""
    if not link.is_symlink():
        if link.exists():
            raise PageLLMError(
                f"{link} is a run and no link, so it cannot point to another\n"
                "  Rename it, or give the link another name with --live"
            )
        return ""
    return Path(os.readlink(link)).name


def history(path: Path) -> list[dict[str, Any]]:
    """The promotions that were made, oldest first."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def before(path: Path, live: str) -> str:
    """The run that was live before `live` was promoted. Going back twice goes two runs back.

    Raises PageLLMError if none is known.
    """
    for line in reversed(history(path)):
        if line["to"] == live and line["from"] and not line["back"]:
            return line["from"]
    raise PageLLMError(f"no run was live before {live or 'this one'}: {path} names none")


def move(link: Path, to: str) -> None:
    """Point the link at another run, atomically: a reader finds the old or the new one."""
    beside = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    beside.unlink(missing_ok=True)
    beside.symlink_to(to, target_is_directory=True)
    os.replace(beside, link)


def record(path: Path, line: dict[str, Any]) -> None:
    """Add a line to the promotions, whole or not at all."""
    lines = [json.dumps(x, sort_keys=True) + "\n" for x in (*history(path), line)]
    with atomic(path) as beside:
        beside.write_text("".join(lines))


def run(config: Config) -> str:
    """-> the run that is live now. Raises PageLLMError if it must not or cannot be promoted."""
    runs = Path(config.runs)
    link, notes = runs / config.live, runs / f"{config.live}.promotions.jsonl"
    now = target(link)
    to = before(notes, now) if config.back else config.run
    served = [name for name in WRITERS if (runs / to / name / "done").exists()]
    if not served:
        raise PageLLMError(
            f"{runs / to} holds no finished policy ({', '.join(WRITERS)})\n"
            "  See the runs that are there, and their stages, with: pagellm runs"
        )
    if (runs / to).is_symlink():
        raise PageLLMError(
            f"{runs / to} is a link itself, to {os.readlink(runs / to)}: promote that run"
        )
    if to == now:
        print(f"promote: {to} is live already")
        return to
    said = f"{now} was live before" if now else "nothing was live before"
    said = "going back" if config.back else said
    if now and not config.back and not config.force:
        how, said = compare(
            scores_of(runs / to, config.metric), scores_of(runs / now, config.metric), config
        )
        said = f"{how}: {said}"
        if how == "behind":
            raise PageLLMError(
                f"{to} is behind {now}, which stays live: {said.partition(': ')[2]}\n"
                "  Promote it all the same with --force"
            )
    elif not now and not config.force:
        scores_of(runs / to, config.metric)
    # The line comes first. If the link is not moved after it, `before` passes the line over.
    policy = served[0]
    done = read_json(runs / to / policy / "done")
    line: dict[str, str | bool] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "from": now,
        "to": to,
    }
    line |= {"back": config.back, "forced": config.force, "policy": policy, "id": done["id"]}
    record(notes, line | {"why": said})
    move(link, to)
    print(f"promote: {link} -> {to} ({policy} {done['id']}); {said}")
    return to


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm promote"))
