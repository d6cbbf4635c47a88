"""Prepare a made-up log of many rows in memory and by DuckDB or Spark: seconds, memory, same bytes.

    python -m experiments.cost.large_logs --rows 10000000
    python -m experiments.cost.large_logs --rows 100000000 --engines duckdb --memory 4GB

The log is a partitioned table, day=000/part-0.parquet and so on, of a million rows each, with a
user, an item, a rating and a time. Users and items are drawn unevenly, and half of the users are
below the k-core. Each engine prepares it in a process of its own.
"""

import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pagellm.data.engines import quoted
from pagellm.stage.command import main
from pagellm.stage.config import check
from pagellm.stage.files import read_json

__all__ = ["Config", "make_log", "run"]

DAY_ROWS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Config:
    """How long a large log takes to prepare, and how much memory."""

    rows: int = 10_000_000  # rows of the log
    users: int = 0  # users that rows are drawn from; 0: a twentieth of the rows
    items: int = 0  # items; 0: a hundredth of the rows
    engines: str = "memory,duckdb"  # memory, duckdb, spark: what prepares it, with commas between
    memory: str = "4GB"  # of duckdb or spark
    split: str = "temporal"  # random, temporal or leave_one_out
    processes: int = 2  # processes that read, threads of an engine
    folder: str = "data/large_logs"  # where the log and the data sets are written; removed first

    def __post_init__(self):
        check(self, rows=(self.rows > 0, "1 or more"))


def make_log(folder: Path, rows: int, users: int, items: int, seed: int = 0) -> None:
    """Write the log by DuckDB: rows // DAY_ROWS folders of Parquet, one at least.

    Each number of a row is drawn by a hash of the row's number, so the log is the same each time.
    """
    import duckdb

    def drawn(what: int) -> str:  # from 0 to 1, another one for each number of a row
        # One number is hashed. Hashes of several are xors of theirs, so draws would go together.
        return f"(hash({(seed << 48) + what} + 4 * row) >> 11) * pow(2.0, -53)"

    base = duckdb.connect()
    for day, start in enumerate(range(0, rows, DAY_ROWS)):
        target = folder / f"day={day:04d}" / "part-0.parquet"
        target.parent.mkdir(parents=True)
        base.execute(
            f"""COPY (SELECT
                'u' || CAST(floor({users} * pow({drawn(0)}, 1.5)) AS BIGINT) AS user_id,
                'i' || CAST(floor({items} * pow({drawn(1)}, 2)) AS BIGINT) AS item_id,
                1 + floor(5 * {drawn(2)}) AS rating,
                1500000000 + CAST(floor(1e8 * {drawn(3)}) AS BIGINT) AS timestamp
            FROM range({start}, {min(rows, start + DAY_ROWS)}) AS log(row))
            TO {quoted(str(target))} (FORMAT parquet)"""
        )
    base.close()


def prepared(config: Config, engine: str, raw: Path) -> dict:
    """Prepare the log in a process of its own: clock, processor seconds, peak memory."""
    data = Path(config.folder) / engine
    more = ["--memory", config.memory] if engine != "memory" else []
    command = [sys.executable, "-m", "pagellm", "prepare", "--dataset", "large", "--raw", str(raw)]
    command += ["--data", str(data), "--engine", engine, "--split", config.split, *more]
    command += ["--processes", str(config.processes)]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while child.poll() is None:
        peak = max(peak, tree_memory(child.pid))
        time.sleep(0.2)
    if child.returncode:
        raise SystemExit(child.returncode)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": time.perf_counter() - started,
        "processor": spent,
        "gigabytes": peak / 1e9,
        "source": read_json(data / "large" / "source.json"),
    }


def tree_memory(pid: int) -> int:
    """Bytes that a process and those that it started hold, shared pages counted once a process."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total = 1024 * int(line.split()[1])
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                total += tree_memory(int(child))
    except OSError:  # it has just ended
        pass
    return total


def run(config: Config) -> None:
    """Make the log, prepare it by each engine, print one row each."""
    folder = Path(config.folder)
    shutil.rmtree(folder, ignore_errors=True)
    raw = folder / "log"
    make_log(
        raw, config.rows, config.users or config.rows // 20, config.items or config.rows // 100
    )
    size = sum(path.stat().st_size for path in raw.rglob("*.parquet"))
    print(f"{config.rows:,} rows, {size / 1e9:.2f} GB of Parquet, {os.cpu_count()} cores")
    print("| engine | seconds | processor s | rows a second | GB held at most | rows kept |")
    print("|---|---|---|---|---|---|")
    written = []
    for engine in config.engines.split(","):
        found = prepared(config, engine, raw)
        written.append(found["source"]["written"])
        print(
            f"| {engine} | {found['seconds']:.0f} | {found['processor']:.0f} | "
            f"{config.rows / found['seconds']:,.0f} | {found['gigabytes']:.2f} | "
            f"{found['source']['counts']['interactions']:,} |",
            flush=True,
        )
    print("same bytes" if all(w == written[0] for w in written) else "DIFFERENT BYTES")


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.cost.large_logs"))
