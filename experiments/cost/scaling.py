"""Time and memory of every stage as a shop grows: users, items, page length, history length. Measured, not estimated.

    make scaling                            python -m experiments.cost.scaling
    python -m experiments.cost.scaling --sweeps items --most 1000000

Each measurement is a process of its own (so its peak memory is that stage's alone) that takes a few steps of the real
stage on a made-up shop of that size: seconds before the first step, median seconds of a step between the first and
the last, peak resident memory; --clock cpu shows processor seconds, which other work on the machine disturbs less (both
are kept). A measurement is written down when it is done and not made again; remove
<runs>/scaling to begin anew. A process beyond --limit_gb or --minutes is ended, and the table says so: that is what
breaks; it is tried again with larger limits, and so is one that failed in another way. With "sampled" the item
softmax is drawn (--sampled_items) and rows move only when read (--lazy_rows); what comes after the reward model knows
neither, and is measured once.

Six processor minutes with --most 100000. Writes <runs>/scaling/results.jsonl, scaling.json, scaling.md
and, with matplotlib (extra [report]), --figure. What a shop of millions would cost on GPUs is arithmetic from measured
parts: experiments/cost/extrapolate.py.
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
WHOLE = ("prepare", "evaluate")  # measured in all; the others have steps
SWEEPS = {
    "users": (1_000, 10_000, 100_000),
    "items": (1_000, 10_000, 100_000, 1_000_000),
    "page": (5, 10, 20, 40),
    "history": (10, 20, 40, 80),
}
LEAVES = 40
LARGE = 100_000  # items from which on a stage takes the fewest steps
WORDS = "red blue green soft hard quick calm bold small large plain fancy warm cold round square".split()


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure what each stage costs while one size grows and the others stay. A million items take most of the time;
    --most 100000 leaves them out."""

    sweeps: str = "users,items,page,history"  # what grows, comma-separated
    most: int = 1_000_000  # leave out users and items beyond
    least: int = 0  # leave out users and items below
    users: int = 1_000  # of the shop where something else grows
    items: int = 1_000  # likewise
    page: int = 10  # slots, likewise
    history: int = 20  # items in a prompt, likewise
    stages: str = "prepare,pretrain,sft,reward,ppo,evaluate"  # a stage needs those before it,
    # prepare excepted
    size: str = "tiny"  # shape of the network
    sampled_items: int = 8192  # drawn items of the sampled rows
    steps: int = 5  # of a stage, 3 from 100,000 items on; the first and the last are not timed
    limit_gb: float = 20.0  # of private memory a measurement may take
    minutes: float = 15.0  # that a measurement may take
    data: str = "data"  # made-up shops lie in <data>/scaling while they are needed
    runs: str = "runs"  # results lie in <runs>/scaling
    clock: str = "wall"  # seconds shown: wall, or cpu, those of all threads of the process
    figure: str = "docs/scaling.png"  # empty: none
    device: str = "cpu"  # of the stages

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
                for name in ("page", "history", "sampled_items", "limit_gb", "minutes")
            },
        )


@dataclass(frozen=True)
class Point:
    """One shop and one way to train on it. page: slots; history: items in a prompt; sampled: drawn items, lazy rows."""

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
    """(sweep, point, stages to measure). Sampled: pretrain, sft and reward; what follows stands in one of the two rows,
    at a million items in the sampled one, whose policy is there sooner."""
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
                        (*learnt, "ppo", "evaluate") if huge else learnt,
                    )
                )
    return [
        (sweep, point, tuple(s for s in stages if s in wanted)) for sweep, point, stages in found
    ]


def held(point: Point) -> int:
    """Users with held-out items, whom evaluation writes pages for: one in ten."""
    return point.users // 10


def paired(point: Point) -> int:
    """Users of whom the reward stage makes pairs: one in ten, but 200 where there are fewer."""
    return min(point.users, max(200, point.users // 10))


def steps_of(config: Config, point: Point) -> int:
    return 3 if point.items >= LARGE else config.steps


def key_of(stage: str, config: Config, point: Point) -> dict:
    """What a measurement depends on, beside the code and the machine."""
    return {
        **asdict(point),
        "stage": stage,
        "size": config.size,
        "threads": torch.get_num_threads(),
        "device": config.device,
        "steps": 0 if stage in WHOLE else steps_of(config, point),
        "sampled_items": config.sampled_items if point.sampled else 0,
    }


def draw(point: Point, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """user, item, rating of the shop's rows, by user: history + page train items each, 4 more of the `held` ones.
    Seven in ten come from the user's own category; early items of a category are bought more often."""
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
    """Columns of the item table: LEAVES categories below 8 departments, brands of 20 items, titles of six words."""
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
    """<folder>/scaling as `prepare` would leave it, every item in it, bought or not. 15 s for a million items."""
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
    """The same shop as somebody's CSV files; -> rows in the log."""
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
    """Seconds on the wall, processor seconds of this process."""
    return np.array([time.perf_counter(), time.process_time()])


def named(prefix: str, seconds: np.ndarray, suffix: str = "") -> dict[str, float]:
    return {
        f"{prefix}{kind}{suffix}": float(value)
        for kind, value in zip(("_s", "_cpu_s"), seconds, strict=True)
    }


class Clock:
    """Lets a stage take its first steps and its last, and keeps the time of each."""

    def __init__(self, steps: int):
        self.steps, self.marks, self.began = steps, [], now()

    def __call__(self, _run: Run, bar):
        total = bar.total
        for step in [*range(min(self.steps, total) - 1), total - 1]:
            self.marks.append(now())
            yield step

    def result(self) -> dict:
        """start_s before the first step; step_s the median of those between the first and the last, which validates;
        start_cpu_s and step_cpu_s likewise. Nothing of a stage that has no steps; of one with too few, RuntimeError."""
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
    """The stage's Config for this point: defaults but for sizes and what bounds a measurement."""
    common = {
        "dataset": "scaling",
        "run": f"scaling/{point.name}",
        "data": str(Path(config.data) / "scaling"),
        "runs": config.runs,
        "device": config.device,
    }
    rows = {"lazy_rows": point.sampled}
    drawn = rows | {"sampled_items": config.sampled_items if point.sampled else 0}
    share = point.page / (point.page + point.history)
    if stage == "pretrain":  # every step one that scores items
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
        # What a micro-batch holds for the exact KL is micro x slots x items, several times over.
        micro = max(1, min(16, 2**25 // (point.page * point.items)))
        return ppo.Config(
            rollout=16,
            minibatch=16,
            micro=micro,
            k=point.page,
            min_steps=steps_of(config, point),
            eval_users=16,
            critic_warmup=0,
            min_accuracy=0.0,
            **common,
        )
    return evaluate.Config(k=point.page, n_boot=10, quiet=True, examples=0, **common)


def work(stage: str, config: Config, point: Point, answer) -> None:
    """One measurement, in a process of its own: sends what Clock says, whole_s, whole_cpu_s and peak_gb, or {failed}.
    The reward stage also says what pairs cost: pairs_start_s once, pairs_s_per_1000_users (two draws of each kind a
    user), and the processor seconds of both."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(config.limit_gb * 2**30),) * 2)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    clock, more = Clock(steps_of(config, point)), {}
    Run.steps = lambda self, bar: clock(self, bar)
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

    reward.make_pairs, pairs.Stock.of = some_pairs, timed_stock
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
    """Largest resident memory of this process so far."""
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(stage: str, config: Config, point: Point) -> dict:
    """Run `work` and wait for it, at most config.minutes. Adds took_s, all that the measurement took."""
    shutil.rmtree(Path(config.runs) / "scaling" / point.name / stage, ignore_errors=True)
    # A server that has imported everything and done nothing: each process starts as clean as a new one, but sooner.
    server, began = multiprocessing.get_context("forkserver"), time.perf_counter()
    server.set_forkserver_preload(
        [module.__name__ for module in (evaluate, ppo, prepare, pretrain, reward, sft)]
    )
    ours, theirs = server.Pipe(duplex=False)
    process = server.Process(target=work, args=(stage, config, point, theirs))
    process.start()
    theirs.close()
    result = {"failed": f"more than {config.minutes:g} minutes"}
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
    """What has been measured, one JSON object a line; the file is whole at any moment."""

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
        """The last measurement with this key; not one that failed, unless by limits no smaller than config's."""
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
    """-> one record for every cell of the table; a point that two sweeps share is measured once."""
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
        f"{table(records, config.clock)}\n\nThe measurements took {minutes:.0f} minutes, {busy:.0f} of processor "
        f"time, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}, torch {torch.__version__}."
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
    """A row for each of the stages, measured where `results` has none. What failed takes those behind it along."""
    rows = [results.find(key_of(stage, config, point), config) for stage in stages]
    if all(rows):
        return rows
    write_shop(data, point)
    broken, rows = "", []
    for stage in stages:
        key = key_of(stage, config, point)
        row = results.find(key, config)
        if row is None and broken and stage != "prepare":
            row = {**key, "failed": f"needs {broken}"}
        # A stage that is measured but whose output is gone must be made again for those behind it.
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
    """Minutes of all measurements, and the processor minutes of those that succeeded; what sweeps share counts once."""
    distinct = {
        (*(r[name] for name in ("users", "items", "page", "history", "sampled", "stage")),): r
        for r in records
    }
    return tuple(
        sum(r.get(name, 0.0) for r in distinct.values()) / 60 for name in ("took_s", "whole_cpu_s")
    )


def seconds(row: dict, clock: str, part: str) -> float | None:
    """Of a row's part (start, step, whole) by this clock; None where a stage has no such part."""
    return row.get(f"{part}_cpu_s" if clock == "cpu" else f"{part}_s")


def cost(row: dict, clock: str = "wall") -> str:
    """prepare, evaluate: seconds in all, peak GB; the others: seconds before the first step + a step, peak GB."""
    if "failed" in row:
        return row["failed"]
    parts = ("whole",) if row["stage"] in WHOLE else ("start", "step")
    return f"{' + '.join(short(seconds(row, clock, part)) for part in parts)} s, {short(row['peak_gb'])} GB"


def short(value: float) -> str:
    """Two figures, without a 0 before the point: 0.0312 -> .031, 7.25 -> 7.2, 283.3 -> 283."""
    text = f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"
    return text.removeprefix("0") if value < 1 else text


def line_of(sweep: str, row: dict, clock: str) -> str:
    return f"{sweep}={row[sweep]:,}{' sampled' if row['sampled'] else ''} {row['stage']}: {cost(row, clock)}"


def table(records: list[dict], clock: str = "wall") -> str:
    """Markdown: a row for every point, and what each stage costs there."""
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


def figure(records: list[dict], path: Path, clock: str = "wall") -> None:
    """Seconds before the first step (prepare, evaluate: in all), seconds a step and peak memory against each size.
    Colours after Okabe and Ito, a marker for each stage; dashed: sampled softmax and lazy rows."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: pip install 'pagellm[report]'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    looks = dict(
        zip(
            STAGES,
            zip(
                ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#000000"),
                "os^Dv*",
                strict=True,
            ),
            strict=True,
        )
    )
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
        for stage, (colour, marker) in looks.items():
            for sampled in (False, True):
                some = sorted(
                    (
                        r
                        for r in records
                        if (r["sweep"], r["stage"], r["sampled"]) == (sweep, stage, sampled)
                        and "failed" not in r
                    ),
                    key=lambda r, sweep=sweep: r[sweep],
                )
                style = {
                    "color": colour,
                    "marker": marker,
                    "linestyle": "--" if sampled else "-",
                    "markersize": 5,
                    "markerfacecolor": "none" if sampled else colour,
                }
                for row, value in enumerate(measures):
                    kept = [r for r in some if value(r) is not None]
                    axes[row, column].plot(
                        [r[sweep] for r in kept], [value(r) for r in kept], **style
                    )
        axes[2, column].set_xlabel(
            {"page": "slots of a page", "history": "items in a prompt"}.get(sweep, sweep)
        )
        ticks = sorted({r[sweep] for r in records if r["sweep"] == sweep})
        axes[2, column].set_xscale("log")
        axes[2, column].set_xticks(
            ticks, [f"{t:,}" if t < 1e6 else f"{t / 1e6:g} M" for t in ticks]
        )
        axes[2, column].minorticks_off()
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
        pyplot.Line2D([], [], color=c, marker=m, label=stage) for stage, (c, m) in looks.items()
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
