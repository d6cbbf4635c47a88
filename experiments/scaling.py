"""Time and memory of every stage as a shop grows: users, items, page length, history length. Measured, not estimated.

    make scaling                            python -m experiments.scaling
    python -m experiments.scaling --sweeps items --most 1000000

Each measurement is a process of its own (so its peak memory is that stage's alone) that takes a few steps of the real
stage on a made-up shop of that size: median seconds of a step after the first, seconds before the first step, peak
resident memory. A row that is done is not measured again; remove <runs>/scaling to begin anew. A process beyond
--limit_gb or --minutes is ended, and the table says so: that is what breaks. With "sampled" the item softmax is drawn
(--sampled_items) and rows move only when read (--lazy_rows).

Writes <runs>/scaling/results.jsonl, scaling.json, scaling.md and, with matplotlib (extra [report]), --figure. What a
shop of millions would cost on GPUs is arithmetic from measured parts: experiments/extrapolate.py.
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
from pagellm.config import PageLLMError, check, check_numbers, main
from pagellm.data import prepare
from pagellm.gpt2 import SIZES
from pagellm.run import Run, atomic, file_id

__all__ = ["Config", "Point", "grid", "measure", "run", "table", "write_shop"]

STAGES = ("prepare", "pretrain", "sft", "reward", "ppo", "evaluate")
SWEEPS = {"users": (1_000, 10_000, 100_000), "items": (1_000, 10_000, 100_000, 1_000_000), "page": (5, 10, 20, 40),
          "history": (10, 20, 40, 80)}
LEAVES = 40
HELD = 128           # users with held-out items: what validation and evaluation look at
PAIRED = 200         # users of whom the reward stage makes pairs
WORDS = "red blue green soft hard quick calm bold small large plain fancy warm cold round square".split()


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure what each stage costs while one size grows and the others stay. A million items take 5 GB and most of
    the time; --most 100000 leaves them out."""

    sweeps: str = "users,items,page,history"    # what grows, comma-separated
    most: int = 1_000_000        # leave out users and items beyond
    least: int = 0               # leave out users and items below
    users: int = 2_000           # of the shop where something else grows
    items: int = 2_000           # likewise
    page: int = 10               # slots, likewise
    history: int = 20            # items in a prompt, likewise
    stages: str = "prepare,pretrain,sft,reward,ppo,evaluate"    # a stage needs those before it, prepare excepted
    size: str = "tiny"           # shape of the network
    sampled_items: int = 8192    # drawn items of the sampled rows
    steps: int = 5               # of a stage; the first and the last are not timed
    limit_gb: float = 20.0       # of private memory a measurement may take
    minutes: float = 15.0        # that a measurement may take
    data: str = "data"           # made-up shops lie in <data>/scaling while they are needed
    runs: str = "runs"           # results lie in <runs>/scaling
    figure: str = "docs/scaling.png"    # empty: none
    device: str = "cpu"          # of the stages

    def __post_init__(self):
        check_numbers(self)
        check(self, sweeps=(set(self.sweeps.split(",")) <= set(SWEEPS), f"some of {','.join(SWEEPS)}"),
              stages=(set(self.stages.split(",")) <= set(STAGES), f"some of {','.join(STAGES)}"),
              size=(self.size in SIZES, f"one of {', '.join(SIZES)}"), steps=(self.steps >= 3, "3 or more"),
              **{name: (getattr(self, name) > 0, "above 0") for name in
                 ("users", "items", "page", "history", "sampled_items", "limit_gb", "minutes")})


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
        return f"u{self.users}-i{self.items}-p{self.page}-h{self.history}" + ("-sampled" if self.sampled else "")


def grid(config: Config) -> list[tuple[str, Point, tuple[str, ...]]]:
    """(sweep, point, stages to measure). Sampled: pretrain, sft and reward; from 100,000 items what follows too."""
    base = {name: getattr(config, name) for name in ("users", "items", "page", "history")}
    wanted = config.stages.split(",")
    found = []
    for sweep in config.sweeps.split(","):
        for value in SWEEPS[sweep]:
            if sweep in ("users", "items") and not config.least <= value <= config.most:
                continue
            point, learnt = Point(**base | {sweep: value}), ("pretrain", "sft", "reward")
            large = sweep == "items" and value >= 100_000
            found.append((sweep, point, ("prepare", *learnt) if large else STAGES))
            if sweep == "items" and value >= 10_000:
                found.append((sweep, Point(**asdict(point) | {"sampled": True}),
                              (*learnt, "ppo", "evaluate") if large else learnt))
    return [(sweep, point, tuple(s for s in stages if s in wanted)) for sweep, point, stages in found]


def draw(point: Point, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """user, item, rating of the shop's rows, by user: history + page train items each, 4 more of the first HELD users.
    Seven in ten come from the user's own category; early items of a category are bought more often."""
    rng = np.random.default_rng([seed, point.users, point.items])
    want = np.full(point.users, point.history + point.page) + 4 * (np.arange(point.users) < HELD)
    user = np.repeat(np.arange(point.users), 3 * want)
    leaf = np.where(rng.random(len(user)) < 0.7, user % LEAVES, rng.integers(LEAVES, size=len(user)))
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
    return {"title": title, "brand": brand, "categories": [[f"Top {int(name[5:]) % 8}", name] for name in leaf],
            "leaf": leaf, "price": [1.0 + i % 50 for i in range(items)], "description": [""] * items}


def write_shop(folder: Path, point: Point) -> None:
    """<folder>/scaling as `prepare` would leave it, with every item bought or not. 15 s for a million items."""
    user, item, rating = draw(point)
    place = np.arange(len(user)) - np.searchsorted(user, np.arange(point.users))[user]
    split = np.where(user < HELD, np.select([place < 2, place < 4], [1, 2], 0), 0).astype(np.int8)
    table = prepare.Table(user.astype(np.int32), item.astype(np.int32), rating, place, rating > 3, split,
                          np.zeros(len(user), bool), np.arange(len(user)), [f"U{u}" for u in range(point.users)],
                          [f"B{i}" for i in range(point.items)])
    target = folder / "scaling"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    prepare.write_tables(target, table, describe(point.items))
    written = {path.name: file_id(path) for path in sorted(target.iterdir())}
    (target / "source.json").write_text(json.dumps({"config": {"split": "random"}, "written": written}))


def write_raw(folder: Path, point: Point) -> int:
    """The same shop as somebody's CSV files; -> rows in the log."""
    user, item, rating = draw(point)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "interactions.csv", "w", newline="") as file:
        file.write("user_id,item_id,rating,timestamp\n")
        file.writelines(f"U{u},B{i},{r:.0f},{1_300_000_000 + n}\n" for n, (u, i, r) in
                        enumerate(zip(user.tolist(), item.tolist(), rating.tolist(), strict=True)))
    columns = describe(point.items)
    with open(folder / "items.csv", "w", newline="") as file:
        write = csv.writer(file, lineterminator="\n")
        write.writerow(["item_id", "title", "brand", "categories", "price"])
        write.writerows([f"B{i}", title, brand, " > ".join(path), price] for i, (title, brand, path, price) in
                        enumerate(zip(*(columns[c] for c in ("title", "brand", "categories", "price")), strict=True)))
    return len(user)


class Clock:
    """Lets a stage take its first steps and its last, and keeps the time of each."""

    def __init__(self, steps: int):
        self.steps, self.marks, self.began = steps, [], time.perf_counter()

    def __call__(self, _run: Run, bar):
        total = bar.total
        for step in [*range(min(self.steps, total) - 1), total - 1]:
            self.marks.append(time.perf_counter())
            yield step

    def result(self) -> dict:
        """start_s before the first step; step_s the median of those between the first and the last, which validates."""
        if not self.marks:
            return {}
        return {"start_s": self.marks[0] - self.began, "step_s": float(np.median(np.diff(self.marks)[1:]))}


def stage_config(stage: str, config: Config, point: Point):
    """The stage's Config for this point: defaults but for sizes and what bounds a measurement."""
    common = {"dataset": "scaling", "run": f"scaling/{point.name}", "data": str(Path(config.data) / "scaling"),
              "runs": config.runs, "device": config.device}
    rows = {"lazy_rows": point.sampled}
    drawn = rows | {"sampled_items": config.sampled_items if point.sampled else 0}
    share = point.page / (point.page + point.history)
    if stage == "pretrain":         # every step one that scores items
        return pretrain.Config(size=config.size, steps=config.steps, words=512, contents=0.0, second_order=0.0, **drawn,
                               **common)
    if stage == "sft":
        return sft.Config(label_share=share, max_page=point.page, max_history=point.history, k=point.page, epochs=1,
                          eval_users=16, **drawn, **common)
    if stage == "reward":
        return reward.Config(per_kind=2, label_share=share, **rows, **common)
    if stage == "ppo":
        # What a micro-batch holds for the exact KL is micro x slots x items, several times over.
        micro = max(1, min(16, 2 ** 25 // (point.page * point.items)))
        return ppo.Config(rollout=16, minibatch=16, micro=micro, k=point.page, min_steps=config.steps, eval_users=16,
                          critic_warmup=0, min_accuracy=0.0, **common)
    return evaluate.Config(k=point.page, n_boot=10, quiet=True, examples=0, **common)


def work(stage: str, config: Config, point: Point, answer) -> None:
    """One measurement, in a process of its own: sends {start_s, step_s, seconds, peak_gb}, or {failed}."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(config.limit_gb * 2 ** 30),) * 2)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    clock, pairs = Clock(config.steps), []
    Run.steps = lambda self, bar: clock(self, bar)
    whole = reward.make_pairs

    def some_pairs(shop, *args, **kwargs):
        began = time.perf_counter()
        made = whole(shop, *args, users=range(min(PAIRED, shop.n_users)), **kwargs)
        pairs.append((time.perf_counter() - began) / min(PAIRED, shop.n_users))
        return made

    reward.make_pairs = some_pairs
    try:
        if stage == "prepare":
            raw = Path(config.data) / "scaling" / "raw"
            options = prepare.Config(dataset="prepared", raw=str(raw), data=str(raw.parent), k_core=0)
            clock.began = time.perf_counter()
            prepare.run(options)
        else:
            module = {"pretrain": pretrain, "sft": sft, "reward": reward, "ppo": ppo, "evaluate": evaluate}[stage]
            module.run(stage_config(stage, config, point))
    except (MemoryError, RuntimeError, PageLLMError) as error:
        short = "memory" in str(error).lower() or isinstance(error, MemoryError)
        answer.send({"failed": f"more than {config.limit_gb:g} GB" if short else f"{type(error).__name__}: {error}"})
        return
    more = {"pairs_s_per_1000_users": 1000 * pairs[0]} if pairs else {}
    answer.send({"seconds": time.perf_counter() - clock.began, "peak_gb": peak_gb(), **clock.result(), **more})


def peak_gb() -> float:
    """Largest resident memory of this process so far."""
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def measure(stage: str, config: Config, point: Point) -> dict:
    """Run `work` and wait for it, at most config.minutes."""
    shutil.rmtree(Path(config.runs) / "scaling" / point.name / stage, ignore_errors=True)
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=work, args=(stage, config, point, theirs))
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
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}


def run(config: Config) -> list[dict]:
    """-> one record for every measurement."""
    out = Path(config.runs) / "scaling"
    out.mkdir(parents=True, exist_ok=True)
    path, data = out / "results.jsonl", Path(config.data) / "scaling"
    rows = [json.loads(line) for line in open(path)] if path.exists() else []
    setting = {"size": config.size, "threads": torch.get_num_threads(), "device": config.device}

    def found(point: Point, stage: str) -> dict | None:
        key = {**asdict(point), "stage": stage, **setting}
        return next((row for row in rows if all(row[name] == value for name, value in key.items())), None)

    chosen = []
    for sweep, point, stages in grid(config):
        if all(found(point, stage) for stage in stages):
            chosen += [(sweep, found(point, stage)) for stage in stages]
            continue
        write_shop(data, point)
        broken = ""
        for stage in stages:
            row = found(point, stage)
            # A stage that is measured but whose output is gone must be made again for those behind it.
            there = stage in ("prepare", "evaluate") or (out / point.name / stage / "done").exists()
            if row is None or not (there or "failed" in row):
                if stage == "prepare":
                    write_raw(data / "raw", point)
                    shutil.rmtree(data / "prepared", ignore_errors=True)
                result = ({"failed": f"needs {broken}"} if broken and stage != "prepare" else
                          measure(stage, config, point))
                row = row or {**asdict(point), "stage": stage, **setting, **result}
                if found(point, stage) is None:
                    rows.append(row)
                    with open(path, "a") as file:
                        file.write(json.dumps(row) + "\n")
                shutil.rmtree(data / "raw", ignore_errors=True)
            if "failed" in row and stage != "prepare":
                broken = broken or stage
            chosen.append((sweep, row))
            print(line_of(sweep, row), flush=True)
        shutil.rmtree(out / point.name, ignore_errors=True)
        shutil.rmtree(data, ignore_errors=True)
    records = [{"sweep": sweep, **row} for sweep, row in chosen]
    text = table(records)
    for name, content in (("scaling.json", json.dumps(records, indent=1) + "\n"), ("scaling.md", text + "\n")):
        with atomic(out / name) as beside:
            beside.write_text(content)
    print(f"\n{text}\n\n{out / 'scaling.json'}")
    if config.figure:
        figure(records, Path(config.figure))
    return records


def line_of(sweep: str, row: dict) -> str:
    cost = row.get("failed") or (f"{row.get('step_s', row['seconds']):.3f} s "
                                 f"{'a step' if 'step_s' in row else 'in all'}, {row['peak_gb']:.2f} GB")
    return f"{sweep}={row[sweep]:,}{' sampled' if row['sampled'] else ''} {row['stage']}: {cost}"


def table(records: list[dict]) -> str:
    """Markdown: a row for every point, seconds a step (prepare, evaluate: in all) and peak GB of every stage."""
    lines = ["| | " + " | ".join(STAGES) + " |", "|---" * (len(STAGES) + 1) + "|"]
    points = list(dict.fromkeys((r["sweep"], r[r["sweep"]], r["sampled"]) for r in records))
    for sweep, value, sampled in points:
        cells = []
        for stage in STAGES:
            row = next((r for r in records if (r["sweep"], r[sweep], r["sampled"], r["stage"]) ==
                        (sweep, value, sampled, stage)), None)
            cells.append("" if row is None else row["failed"] if "failed" in row else
                         f"{row.get('step_s', row['seconds']):.3g} s, {row['peak_gb']:.2g} GB")
        lines.append(f"| {value:,} {sweep}{', sampled' if sampled else ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(records: list[dict], path: Path) -> None:
    """Seconds (above) and peak memory (below) against each size. Colours after Okabe and Ito, a marker for each stage;
    dashed: sampled softmax and lazy rows."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: pip install 'pagellm[report]'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    looks = dict(zip(STAGES, zip(("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#000000"), "os^Dv*",
                                 strict=True), strict=True))
    sweeps = list(dict.fromkeys(r["sweep"] for r in records))
    size = max(6.6, 3.3 * len(sweeps)), 6.4
    drawn, axes = pyplot.subplots(2, len(sweeps), figsize=size, squeeze=False, sharey="row")
    for column, sweep in enumerate(sweeps):
        for stage, (colour, marker) in looks.items():
            for sampled in (False, True):
                some = sorted((r for r in records if (r["sweep"], r["stage"], r["sampled"]) == (sweep, stage, sampled)
                               and "failed" not in r), key=lambda r, sweep=sweep: r[sweep])
                style = {"color": colour, "marker": marker, "linestyle": "--" if sampled else "-", "markersize": 5,
                         "markerfacecolor": "none" if sampled else colour}
                place = [r[sweep] for r in some]
                axes[0, column].plot(place, [r.get("step_s", r["seconds"]) for r in some], **style)
                axes[1, column].plot(place, [r["peak_gb"] for r in some], **style)
        axes[1, column].set_xlabel({"page": "slots of a page", "history": "items in a prompt"}.get(sweep, sweep))
    for axis in axes.flat:
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("seconds a step\n(prepare, evaluate: in all)")
    axes[1, 0].set_ylabel("peak memory, GB")
    handles = [pyplot.Line2D([], [], color=c, marker=m, label=stage) for stage, (c, m) in looks.items()]
    handles.append(pyplot.Line2D([], [], color="grey", linestyle="--", marker="o", markerfacecolor="none",
                                 label="sampled softmax, lazy rows"))
    drawn.legend(handles=handles, loc="upper center", ncol=4, frameon=False, fontsize=9)
    drawn.tight_layout(rect=(0, 0, 1, 0.9))
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=110)
    pyplot.close(drawn)
    print(path)


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.scaling"))
