"""Measure time and memory of every stage as users, items, page length or history length grow.

    make scaling                        python -m experiments.cost.scaling
    python -m experiments.cost.scaling --sweeps items --most 1000000

Each measurement runs in a process of its own, so that its peak memory is that of the stage. It
takes a few steps of the real stage on a generated shop of that size, and records the seconds before
the first step, the median seconds of a step between the first and the last, and peak resident
memory. --clock cpu shows processor seconds, which other work on the machine disturbs less; both are
stored.

A measurement is stored when it is done and not made again; remove <runs>/scaling to start anew. A
process that exceeds --limit_gb or --minutes is stopped, and the table says so. It is tried again
with larger limits; one that failed otherwise is always tried again. Rows marked "sampled" use the
sampled item softmax (--sampled_items), or in ppo shortlists (--candidates), and update only the
rows that were read (--lazy_rows). Evaluate has no such option, so it is measured once.

Six processor minutes with --most 100000. Writes <runs>/scaling/results.jsonl, scaling.json,
scaling.md and, with matplotlib (extra [report]), --figure. For the cost of a shop of millions on
GPUs see experiments/cost/extrapolate.py.
"""

import csv
import json
import multiprocessing
import os
import resource
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pagellm import evaluate, ppo, pretrain, reward, sft
from pagellm.data import prepare
from pagellm.model.gpt2 import SIZES
from pagellm.pages import pairs
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check, check_numbers
from pagellm.stage.files import atomic
from pagellm.stage.run import Run, file_id

__all__ = [
    "Clock",
    "Config",
    "Point",
    "Results",
    "STAGES",
    "cost",
    "draw",
    "figure",
    "grid",
    "held",
    "key_of",
    "measure",
    "run",
    "table",
    "took",
    "write_shop",
]


STAGES = ("prepare", "pretrain", "sft", "reward", "ppo", "evaluate")
WHOLE = ("prepare", "evaluate")  # stages without steps: only their total is measured
SWEEPS = {
    "users": (1_000, 10_000, 100_000),
    "items": (1_000, 10_000, 100_000, 1_000_000),
    "page": (5, 10, 20, 40),
    "history": (10, 20, 40, 80),
}
LEAVES = 40  # categories of a generated shop
# stage -> colour (the palette of Okabe and Ito) and marker in the figure
LOOKS = {
    "prepare": ("#0072B2", "o"),
    "pretrain": ("#E69F00", "s"),
    "sft": ("#009E73", "^"),
    "reward": ("#CC79A7", "D"),
    "ppo": ("#D55E00", "v"),
    "evaluate": ("#000000", "*"),
}
LARGE = 100_000  # with this many items or more a stage takes the fewest steps, 3
WORDS = (
    "red blue green soft hard quick calm bold small large plain fancy warm cold round square"
).split()


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure what each stage costs while one size grows and the others stay.

    A million items take most of the time; --most 100000 leaves them out.
    """

    sweeps: str = "users,items,page,history"  # sizes that grow, comma-separated
    most: int = 1_000_000  # largest number of users and items measured
    least: int = 0  # smallest number of users and items measured
    users: int = 1_000  # number of users while something else grows
    items: int = 1_000  # number of items while something else grows
    page: int = 10  # slots on a page while something else grows
    history: int = 20  # items in a prompt while something else grows
    stages: str = "prepare,pretrain,sft,reward,ppo,evaluate"  # stages to measure; each but prepare
    # needs those before it
    size: str = "tiny"  # shape of the network
    sampled_items: int = 8192  # items sampled by the softmax of the sampled rows
    candidates: int = 2000  # items of a user's shortlist in ppo of the sampled rows
    steps: int = 5  # steps of a stage, 3 from 100,000 items on; the first and last are not timed
    limit_gb: float = 20.0  # private memory that a measurement may take
    minutes: float = 15.0  # time that a measurement may take
    data: str = "data"  # generated shops lie in <data>/scaling while they are needed
    runs: str = "runs"  # results lie in <runs>/scaling
    clock: str = "wall"  # seconds shown: wall, or cpu (of all threads of the process)
    figure: str = "docs/scaling.png"  # image to write; empty: none
    device: str = "cpu"  # device of the stages

    def __post_init__(self):
        check_numbers(self)
        check(
            self,
            sweeps=(set(self.sweeps.split(",")) <= set(SWEEPS), f"some of {','.join(SWEEPS)}"),
            stages=(set(self.stages.split(",")) <= set(STAGES), f"some of {','.join(STAGES)}"),
            size=(self.size in SIZES, f"one of {', '.join(SIZES)}"),
            steps=(self.steps >= 3, "3 or more"),
            clock=(self.clock in ("wall", "cpu"), "wall or cpu"),
            users=(self.users >= 150, "150 or more: three steps of SFT"),
            items=(
                self.items >= 2 * LEAVES,
                f"{2 * LEAVES} or more, two for each of {LEAVES} categories",
            ),
            **{
                name: (getattr(self, name) > 0, "above 0")
                for name in (
                    "page",
                    "history",
                    "sampled_items",
                    "candidates",
                    "limit_gb",
                    "minutes",
                )
            },
        )


@dataclass(frozen=True)
class Point:
    """One shop, and one way to train on it.

    page     slots on a page
    history  items in a prompt
    sampled  whether to use the sampled softmax, shortlists and lazy rows
    """

    users: int
    items: int
    page: int
    history: int
    sampled: bool = False

    @property
    def name(self) -> str:
        return f"u{self.users}-i{self.items}-p{self.page}-h{self.history}" + (
            "-sampled" if self.sampled else ""
        )


def grid(config: Config) -> list[tuple[str, Point, tuple[str, ...]]]:
    """List of (sweep, point, stages to measure there).

    Sampled points measure the training stages. Evaluation has no sampled variant and is measured
    once: in the plain row, but at a million items in the sampled one, whose policy is trained
    sooner; and so is ppo over the whole catalogue of a million items not measured.
    """
    base = {name: getattr(config, name) for name in ("users", "items", "page", "history")}
    wanted = config.stages.split(",")
    found = []
    for sweep in config.sweeps.split(","):
        for value in SWEEPS[sweep]:
            if sweep in ("users", "items") and not config.least <= value <= config.most:
                continue
            point, learnt = Point(**base | {sweep: value}), ("pretrain", "sft", "reward")
            huge = sweep == "items" and value > LARGE
            found.append((sweep, point, ("prepare", *learnt) if huge else STAGES))
            if sweep == "items" and value >= 10_000:
                found.append(
                    (
                        sweep,
                        Point(**asdict(point) | {"sampled": True}),
                        (*learnt, "ppo", *(("evaluate",) if huge else ())),
                    )
                )
    return [
        (sweep, point, tuple(s for s in stages if s in wanted)) for sweep, point, stages in found
    ]


def held(point: Point) -> int:
    """Number of users with held-out items, for whom evaluation writes pages: one in ten."""
    return point.users // 10


def paired(point: Point) -> int:
    """Number of users for whom the reward stage makes pairs: one in ten, but at least 200."""
    return min(point.users, max(200, point.users // 10))


def steps_of(config: Config, point: Point) -> int:
    return 3 if point.items >= LARGE else config.steps


def key_of(stage: str, config: Config, point: Point) -> dict:
    """Everything that a measurement depends on, except the code and the machine."""
    return {
        **asdict(point),
        "stage": stage,
        "size": config.size,
        "threads": torch.get_num_threads(),
        "device": config.device,
        "steps": 0 if stage in WHOLE else steps_of(config, point),
        "sampled_items": config.sampled_items if point.sampled else 0,
        "candidates": config.candidates if point.sampled and stage == "ppo" else 0,
    }


def draw(point: Point, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Generate the shop's rows, ordered by user: user, item, rating.

    Every user has history + page train items; users with held-out items have 4 more. Seven in ten
    items are of the user's own category; the first items of a category are bought more often.
    """
    rng = np.random.default_rng([seed, point.users, point.items])
    want = np.full(point.users, point.history + point.page) + 4 * (
        np.arange(point.users) < held(point)
    )
    user = np.repeat(np.arange(point.users), 3 * want)
    leaf = np.where(
        rng.random(len(user)) < 0.7, user % LEAVES, rng.integers(LEAVES, size=len(user))
    )
    item = leaf + LEAVES * (rng.random(len(user)) ** 1.5 * (point.items // LEAVES)).astype(np.int64)
    code = rng.permutation(np.unique(user * point.items + item))
    code = code[np.argsort(code // point.items, kind="stable")]
    user = code // point.items
    first = np.searchsorted(user, np.arange(point.users))
    kept = np.arange(len(code)) - first[user] < want[user]
    user, item = user[kept], (code % point.items)[kept]
    rating = np.where(rng.random(len(user)) < 0.85, 4 + (item + user) % 2, 1 + (item + user) % 3)
    return user, item, rating.astype(np.float32)


def describe(items: int) -> dict[str, list]:
    """Columns of the item table: LEAVES categories in 8 departments, brands of 20 items, titles."""
    at = np.arange(items)
    word = [[WORDS[j] for j in (at // step % len(WORDS)).tolist()] for step in (1, 16, 256)]
    leaf = [f"Leaf {j}" for j in (at % LEAVES).tolist()]
    brand = [f"Brand {j}" for j in (at // (20 * LEAVES) * LEAVES + at % LEAVES).tolist()]
    title = [f"{a} {b} {c} M{i}" for i, (a, b, c) in enumerate(zip(*word, strict=True))]
    return {
        "title": title,
        "brand": brand,
        "categories": [[f"Top {int(name[5:]) % 8}", name] for name in leaf],
        "leaf": leaf,
        "price": [1.0 + i % 50 for i in range(items)],
        "description": [""] * items,
    }


def write_shop(folder: Path, point: Point) -> None:
    """Write <folder>/scaling as `prepare` would, with every item, bought or not.

    15 s for a million items.
    """
    user, item, rating = draw(point)
    place = np.arange(len(user)) - np.searchsorted(user, np.arange(point.users))[user]
    split = np.where(user < held(point), np.select([place < 2, place < 4], [1, 2], 0), 0).astype(
        np.int8
    )
    table = prepare.Table(
        user.astype(np.int32),
        item.astype(np.int32),
        rating,
        place,
        rating > 3,
        split,
        np.zeros(len(user), bool),
        np.arange(len(user)),
        [f"U{u}" for u in range(point.users)],
        [f"B{i}" for i in range(point.items)],
    )
    target = folder / "scaling"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    prepare.write_tables(target, table, describe(point.items))
    written = {path.name: file_id(path) for path in sorted(target.iterdir())}
    (target / "source.json").write_text(
        json.dumps({"config": {"split": "random"}, "written": written})
    )


def write_raw(folder: Path, point: Point) -> int:
    """Write the same shop as raw CSV files. Returns the number of rows in the log."""
    user, item, rating = draw(point)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "interactions.csv", "w", newline="") as file:
        file.write("user_id,item_id,rating,timestamp\n")
        file.writelines(
            f"U{u},B{i},{r:.0f},{1_300_000_000 + n}\n"
            for n, (u, i, r) in enumerate(
                zip(user.tolist(), item.tolist(), rating.tolist(), strict=True)
            )
        )
    columns = describe(point.items)
    with open(folder / "items.csv", "w", newline="") as file:
        write = csv.writer(file, lineterminator="\n")
        write.writerow(["item_id", "title", "brand", "categories", "price"])
        write.writerows(
            [f"B{i}", title, brand, " > ".join(path), price]
            for i, (title, brand, path, price) in enumerate(
                zip(*(columns[c] for c in ("title", "brand", "categories", "price")), strict=True)
            )
        )
    return len(user)


def now() -> np.ndarray:
    """Wall-clock seconds and processor seconds of this process, (2,)."""
    return np.array([time.perf_counter(), time.process_time()])


def named(prefix: str, seconds: np.ndarray, suffix: str = "") -> dict[str, float]:
    return {
        f"{prefix}{kind}{suffix}": float(value)
        for kind, value in zip(("_s", "_cpu_s"), seconds, strict=True)
    }


class Clock:
    """Replaces Run.steps: lets a stage take its first steps and its last, and times them."""

    def __init__(self, steps: int):
        self.steps, self.began = steps, now()
        self.marks: list[np.ndarray] = []

    def __call__(self, _run: Run, bar):
        total = bar.total
        for step in [*range(min(self.steps, total) - 1), total - 1]:
            self.marks.append(now())
            yield step

    def result(self) -> dict:
        """Seconds: start_s before the first step, step_s of a step; start_cpu_s, step_cpu_s.

        step_s is the median of the steps between the first and the last, which validates. {} for a
        stage that has no steps. Raises RuntimeError for fewer than three.
        """
        if not self.marks:
            return {}
        if len(self.marks) < 3:
            raise RuntimeError(
                f"{len(self.marks)} steps in all, none between the first and the last"
            )
        return named("start", self.marks[0] - self.began) | named(
            "step", np.median(np.diff(self.marks, axis=0)[1:], axis=0)
        )


def stage_config(stage: str, config: Config, point: Point):
    """The stage's Config for this point: defaults, except sizes and what keeps it short."""
    common: dict[str, Any] = {
        "dataset": "scaling",
        "run": f"scaling/{point.name}",
        "data": str(Path(config.data) / "scaling"),
        "runs": config.runs,
        "device": config.device,
    }
    rows: dict[str, Any] = {"lazy_rows": point.sampled}
    drawn = rows | {"sampled_items": config.sampled_items if point.sampled else 0}
    share = point.page / (point.page + point.history)
    if stage == "pretrain":  # without the kinds of text that score no items
        return pretrain.Config(
            size=config.size,
            steps=steps_of(config, point),
            words=512,
            contents=0.0,
            second_order=0.0,
            **drawn,
            **common,
        )
    if stage == "sft":
        return sft.Config(
            label_share=share,
            max_page=point.page,
            max_history=point.history,
            k=point.page,
            epochs=1,
            eval_users=16,
            **drawn,
            **common,
        )
    if stage == "reward":
        return reward.Config(per_kind=2, label_share=share, **rows, **common)
    if stage == "ppo":
        # For the exact KL a micro-batch holds several tensors of micro x slots x items.
        held_items = config.candidates if point.sampled else point.items
        micro = max(1, min(16, 2**25 // (point.page * held_items)))
        return ppo.Config(
            candidates=config.candidates if point.sampled else 0,
            **rows,
            rollout=16,
            minibatch=16,
            micro=micro,
            k=point.page,
            min_steps=steps_of(config, point),
            eval_users=16,
            critic_warmup=0,
            min_accuracy=0.0,
            force=True,
            gate_users=4,
            gate_pages=2,
            **common,
        )
    return evaluate.Config(k=point.page, n_boot=10, quiet=True, examples=0, **common)


def work(stage: str, config: Config, point: Point, answer) -> None:
    """Make one measurement; runs in a process of its own and sends a dict through `answer`.

    The dict holds Clock.result, whole_s, whole_cpu_s and peak_gb, or else `failed`. For the reward
    stage it also holds the cost of making pairs: pairs_start_s once, pairs_s_per_1000_users (two
    draws of each kind for a user), and the processor seconds of both.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (int(config.limit_gb * 2**30),) * 2)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    clock, more = Clock(steps_of(config, point)), {}
    whole, stock = reward.make_pairs, pairs.Stock.of

    def timed_stock(*args):
        began = now()
        made = stock(*args)
        more.update(named("pairs_start", now() - began))
        return made

    def some_pairs(shop, *args, **kwargs):
        began = now()
        made = whole(shop, *args, users=range(paired(point)), **kwargs)
        spent = now() - began - [more["pairs_start_s"], more["pairs_start_cpu_s"]]
        more.update(named("pairs", 1000 * spent / paired(point), "_per_1000_users"))
        return made

    # Nothing else runs in this process, so that what is timed is replaced for good.
    for owner, name, timed in (
        (Run, "steps", lambda self, bar: clock(self, bar)),
        (reward, "make_pairs", some_pairs),
        (pairs.Stock, "of", timed_stock),
    ):
        setattr(owner, name, timed)
    try:
        if stage == "prepare":
            raw = Path(config.data) / "scaling" / "raw"
            options = prepare.Config(
                dataset="prepared", raw=str(raw), data=str(raw.parent), k_core=0
            )
            clock.began = now()
            prepare.run(options)
        else:
            module = {
                "pretrain": pretrain,
                "sft": sft,
                "reward": reward,
                "ppo": ppo,
                "evaluate": evaluate,
            }[stage]
            module.run(stage_config(stage, config, point))
        answer.send(
            named("whole", now() - clock.began) | {"peak_gb": peak_gb()} | clock.result() | more
        )
    except Exception as error:
        short = isinstance(error, MemoryError) or "memory" in str(error).lower()
        answer.send(
            {
                "failed": f"more than {config.limit_gb:g} GB"
                if short
                else f"{type(error).__name__}: {error}"
            }
        )


def peak_gb() -> float:
    """Peak resident memory of this process so far."""
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(stage: str, config: Config, point: Point) -> dict:
    """Run `work` and wait for it, at most config.minutes. Adds took_s, the seconds of it all."""
    shutil.rmtree(Path(config.runs) / "scaling" / point.name / stage, ignore_errors=True)
    # Processes are forked from a server that has imported everything and done nothing: each starts
    # as clean as a new one, but sooner.
    server, began = multiprocessing.get_context("forkserver"), time.perf_counter()
    server.set_forkserver_preload(
        [module.__name__ for module in (evaluate, ppo, prepare, pretrain, reward, sft)]
    )
    ours, theirs = server.Pipe(duplex=False)
    process = server.Process(target=work, args=(stage, config, point, theirs))
    process.start()
    theirs.close()
    result: dict[str, Any] = {"failed": f"more than {config.minutes:g} minutes"}
    try:
        if ours.poll(config.minutes * 60):
            result = ours.recv()
            process.join(30)
    except EOFError:
        process.join()
        result = {"failed": f"ended by itself, exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()
    result["took_s"] = time.perf_counter() - began
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}


class Results:
    """The measurements so far, one JSON object a line. The file is replaced atomically."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []
        for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
            try:
                self.rows.append(json.loads(line))
            except ValueError:
                raise PageLLMError(
                    f"{path}, line {number} is not JSON: it is not as this study wrote it\n"
                    "  Remove that line, or the file; what it held is measured again."
                ) from None

    def find(self, key: dict, config: Config) -> dict | None:
        """The last measurement with this key that need not be repeated, or None.

        A failed one counts only if it exceeded limits that are no smaller than config's.
        """
        for row in reversed(self.rows):
            if all(row.get(name) == value for name, value in key.items()):
                by_limit = row.get("failed", "").startswith("more than ")
                if "whole_s" in row or (
                    by_limit
                    and row["limit_gb"] >= config.limit_gb
                    and row["minutes"] >= config.minutes
                ):
                    return row
        return None

    def add(self, row: dict) -> None:
        self.rows.append(row)
        with atomic(self.path) as beside:
            beside.write_text("".join(json.dumps(row) + "\n" for row in self.rows))


def run(config: Config) -> list[dict]:
    """Measure all points. Returns a record for each cell of the table.

    A point that two sweeps share is measured once.
    """
    out = Path(config.runs) / "scaling"
    out.mkdir(parents=True, exist_ok=True)
    data = Path(config.data) / "scaling"
    if (data / "source.json").exists():
        raise PageLLMError(
            f"{data} holds a data set, where this study puts its made-up shops and removes them\n"
            "  Give another directory: --data <directory>"
        )
    results, records = Results(out / "results.jsonl"), []
    for sweep, point, stages in grid(config):
        records += [
            {"sweep": sweep, **row}
            for row in rows_at(point, stages, config, results, out, data, sweep)
        ]
    minutes, busy = took(records)
    text = (
        f"{table(records, config.clock)}\n\n"
        f"The measurements took {minutes:.0f} minutes, {busy:.0f} of processor time, "
        f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}, torch "
        f"{torch.__version__}."
    )
    for name, content in (
        ("scaling.json", json.dumps(records, indent=1) + "\n"),
        ("scaling.md", text + "\n"),
    ):
        with atomic(out / name) as beside:
            beside.write_text(content)
    print(f"\n{text}\n\n{out / 'scaling.json'}")
    if config.figure:
        figure(records, Path(config.figure), config.clock)
    return records


def rows_at(
    point: Point,
    stages: tuple[str, ...],
    config: Config,
    results: Results,
    out: Path,
    data: Path,
    sweep: str,
) -> list[dict]:
    """A row for each of the stages at this point, measured if `results` has none.

    If a stage fails, the stages after it are not measured.
    """
    found = [results.find(key_of(stage, config, point), config) for stage in stages]
    rows = [row for row in found if row is not None]
    if len(rows) == len(stages):
        return rows
    write_shop(data, point)
    broken, rows = "", []
    for stage in stages:
        key = key_of(stage, config, point)
        row = results.find(key, config)
        if row is None and broken and stage != "prepare":
            row = {**key, "failed": f"needs {broken}"}
        # A stage that is measured but whose output is gone is run again for the stages after it.
        elif row is None or not (
            stage in WHOLE or "failed" in row or (out / point.name / stage / "done").exists()
        ):
            if stage == "prepare":
                write_raw(data / "raw", point)
                shutil.rmtree(data / "prepared", ignore_errors=True)
            again = {**key, **measure(stage, config, point)}
            if row is None or "failed" in again:
                if "failed" in again:
                    again |= {"limit_gb": config.limit_gb, "minutes": config.minutes}
                results.add(row := again)
            shutil.rmtree(data / "raw", ignore_errors=True)
        if "failed" in row and stage != "prepare":
            broken = broken or stage
        rows.append(row)
        print(line_of(sweep, row, config.clock), flush=True)
    shutil.rmtree(out / point.name, ignore_errors=True)
    shutil.rmtree(data, ignore_errors=True)
    return rows


def took(records: list[dict]) -> tuple[float, float]:
    """Minutes of all measurements, and processor minutes of those that succeeded.

    A point that two sweeps share counts once.
    """
    distinct = {
        (*(r[name] for name in ("users", "items", "page", "history", "sampled", "stage")),): r
        for r in records
    }
    return tuple(
        sum(r.get(name, 0.0) for r in distinct.values()) / 60 for name in ("took_s", "whole_cpu_s")
    )


def key_by(clock: str, part: str) -> str:
    """Where a row holds the seconds of a part (start, step or whole) by this clock."""
    return f"{part}_cpu_s" if clock == "cpu" else f"{part}_s"


def seconds(row: dict, clock: str, part: str) -> float | None:
    """Seconds of a row's part (start, step or whole) by this clock; None if it has no such part."""
    return row.get(key_by(clock, part))


def cost(row: dict, clock: str = "wall") -> str:
    """A cell of the table: seconds before the first step + seconds of a step, and peak GB.

    For prepare and evaluate the seconds are the total.
    """
    if "failed" in row:
        return row["failed"]
    parts = ("whole",) if row["stage"] in WHOLE else ("start", "step")
    spent = " + ".join(short(row[key_by(clock, part)]) for part in parts)
    return f"{spent} s, {short(row['peak_gb'])} GB"


def short(value: float) -> str:
    """Two digits, without a 0 before the point: 0.0312 -> .031, 7.25 -> 7.2, 283.3 -> 283."""
    text = f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"
    return text.removeprefix("0") if value < 1 else text


def line_of(sweep: str, row: dict, clock: str) -> str:
    sampled = " sampled" if row["sampled"] else ""
    return f"{sweep}={row[sweep]:,}{sampled} {row['stage']}: {cost(row, clock)}"


def table(records: list[dict], clock: str = "wall") -> str:
    """Markdown table: a row for every point, a column for each stage."""
    lines = ["| | " + " | ".join(STAGES) + " |", "|---" * (len(STAGES) + 1) + "|"]
    points = list(dict.fromkeys((r["sweep"], r[r["sweep"]], r["sampled"]) for r in records))
    label = {"page": "slots", "history": "items of history"}
    for sweep, value, sampled in points:
        cells = {
            r["stage"]: cost(r, clock)
            for r in records
            if (r["sweep"], r[sweep], r["sampled"]) == (sweep, value, sampled)
        }
        lines.append(
            f"| {value:,} {label.get(sweep, sweep)}{', sampled' if sampled else ''} | "
            + " | ".join(cells.get(stage, "") for stage in STAGES)
            + " |"
        )
    return "\n".join(lines)


def plot_sweep(axes, sweep: str, records: list[dict], measures: tuple) -> None:
    """Draw one sweep into a column of axes: one line for each stage, dashed where it is sampled.

    measures  one function a row of axes, record -> value or None
    """
    for stage, (colour, marker) in LOOKS.items():
        for sampled in (False, True):
            some = [
                r
                for r in records
                if (r["sweep"], r["stage"], r["sampled"]) == (sweep, stage, sampled)
                and "failed" not in r
            ]
            some.sort(key=lambda r: r[sweep])
            style = {
                "color": colour,
                "marker": marker,
                "linestyle": "--" if sampled else "-",
                "markersize": 5,
                "markerfacecolor": "none" if sampled else colour,
            }
            for axis, value in zip(axes, measures, strict=True):
                kept = [r for r in some if value(r) is not None]
                axis.plot([r[sweep] for r in kept], [value(r) for r in kept], **style)
    last = axes[-1]
    last.set_xlabel({"page": "slots of a page", "history": "items in a prompt"}.get(sweep, sweep))
    ticks = sorted({r[sweep] for r in records if r["sweep"] == sweep})
    last.set_xscale("log")
    last.set_xticks(ticks, [f"{t:,}" if t < 1e6 else f"{t / 1e6:g} M" for t in ticks])
    last.minorticks_off()


def figure(records: list[dict], path: Path, clock: str = "wall") -> None:
    """Draw seconds before the first step, seconds of a step and peak memory against each size.

    For prepare and evaluate the first row shows the total. Needs matplotlib; says so without it.
    """
    try:
        import matplotlib
    except ImportError:
        print("no figure: pip install 'pagellm[report]'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    sweeps = list(dict.fromkeys(r["sweep"] for r in records))
    drawn, axes = pyplot.subplots(
        3,
        len(sweeps),
        figsize=(max(6.6, 3.1 * len(sweeps)), 8.4),
        squeeze=False,
        sharey="row",
        sharex="col",
    )
    measures = (
        lambda r: seconds(r, clock, "whole" if r["stage"] in WHOLE else "start"),
        lambda r: seconds(r, clock, "step"),
        lambda r: r["peak_gb"],
    )
    for column, sweep in enumerate(sweeps):
        plot_sweep(axes[:, column], sweep, records, measures)
    for axis in axes.flat:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
        axis.grid(alpha=0.3)
    unit = "processor seconds" if clock == "cpu" else "seconds"
    for axis, name in zip(
        axes[:, 0],
        (
            f"{unit} before the first step\n(prepare, evaluate: in all)",
            f"{unit} a step",
            "peak memory, GB",
        ),
        strict=True,
    ):
        axis.set_ylabel(name)
    handles = [
        pyplot.Line2D([], [], color=c, marker=m, label=stage) for stage, (c, m) in LOOKS.items()
    ]
    handles.append(
        pyplot.Line2D(
            [],
            [],
            color="grey",
            linestyle="--",
            marker="o",
            markerfacecolor="none",
            label="sampled softmax, lazy rows",
        )
    )
    drawn.legend(handles=handles, loc="upper center", ncol=4, frameon=False, fontsize=9)
    drawn.tight_layout(rect=(0, 0, 1, 0.93))
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=100)
    pyplot.close(drawn)
    print(path)


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.cost.scaling"))
