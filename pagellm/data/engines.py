"""Query engines that `pagellm.data.relational` is run by: DuckDB and Spark SQL.

Both take the same statements. A `Draw` is the one thing that they write differently: the first 64
bits of a SHA-256 digest, in an order that is the same everywhere. A table that is kept lies on the
disk, so that no step holds a log in memory. `batches` reads a query in its own order, which
the query gives: an engine's order of rows decides nothing.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pagellm.stage import hints
from pagellm.stage.config import PageLLMError

__all__ = ["ENGINES", "DuckDB", "Engine", "Spark", "is_size", "opened", "quoted"]

BATCH = 131_072  # rows that are taken out of an engine at once
MEMORY = re.compile(r"[1-9][0-9]*\s?(KB|MB|GB|TB)", re.IGNORECASE)


class Engine(Protocol):
    """What a query engine must do. A statement is text of SQL."""

    def read(self, name: str, files: list[Path]) -> None:
        """Call the rows of some Parquet files `name`."""

    def keep(self, name: str, query: str) -> None:
        """Store what a query gives as table `name`, in the place of one of that name."""

    def drop(self, *names: str) -> None:
        """Give up tables whose rows are needed no more."""

    def one(self, query: str) -> tuple:
        """The one row of a query."""

    def batches(self, query: str) -> Iterator[pa.RecordBatch]:
        """The rows of a query in its order, a batch at a time."""

    def draw(self, seed: str, user: str, item: str) -> str:
        """An expression: the draw that `filters.random_keys` makes of these expressions."""

    def close(self) -> None:
        """Stop; what was kept is gone."""


class DuckDB:
    """DuckDB within this process. Tables lie in a database file, sorts go to the disk.

    folder   empty, for the files
    memory   that DuckDB itself takes at most, such as 4GB; "": DuckDB's own default
    threads  at once
    """

    def __init__(self, folder: Path, memory: str, threads: int):
        try:
            import duckdb
        except ImportError:
            raise missing("duckdb") from None
        self._base = duckdb.connect(str(folder / "tables.duckdb"))
        limit = {"memory_limit": memory.replace(" ", "")} if memory else {}
        settings: dict[str, Any] = {
            "threads": threads,
            "temp_directory": str(folder / "spilled"),
            "preserve_insertion_order": False,
            **limit,
        }
        for name, value in settings.items():
            self._do(f"SET {name} = {value!r}")

    def _do(self, statement: str) -> list[tuple]:
        return self._base.execute(statement).fetchall()

    def read(self, name: str, files: list[Path]) -> None:
        paths = ", ".join(quoted(str(file)) for file in files)
        self._do(f"CREATE VIEW {name} AS SELECT * FROM read_parquet([{paths}])")

    def keep(self, name: str, query: str) -> None:
        self._do(f"CREATE TABLE {name}_new AS {query}")
        self.drop(name)
        self._do(f"ALTER TABLE {name}_new RENAME TO {name}")

    def drop(self, *names: str) -> None:
        for name in names:
            self._do(f"DROP TABLE IF EXISTS {name}")

    def one(self, query: str) -> tuple:
        return self._do(query)[0]

    def batches(self, query: str) -> Iterator[pa.RecordBatch]:
        # A cursor of its own: rows may be taken while other statements run.
        cursor = self._base.cursor()
        found = cursor.sql(query)
        # The newer of two names for the same.
        reader = getattr(found, "to_arrow_reader", None) or found.fetch_arrow_reader
        yield from reader(BATCH)

    def draw(self, seed: str, user: str, item: str) -> str:
        text = f"{quoted(seed)} || chr(0) || {user} || chr(0) || {item}"
        return f"CAST('0x' || substr(sha256({text}), 1, 16) AS UBIGINT)"

    def close(self) -> None:
        self._base.close()


class Spark:
    """Spark SQL, on this machine or a cluster. Each table that is kept is a folder of Parquet.

    folder  empty; where a cluster does the work, a folder that all of its machines see
    memory  of the process that drives the work, such as 8GB; "": Spark's own default
    threads at once, where no cluster is named
    master  Spark's address of a cluster (yarn, spark://host:7077); "": this machine
    """

    def __init__(self, folder: Path, memory: str, threads: int, master: str = ""):
        try:
            from pyspark.sql import SparkSession
        except ImportError:
            raise missing("spark") from None
        self._folder, self._made = folder.absolute(), 0
        settings = {
            "spark.ui.enabled": "false",
            "spark.sql.session.timeZone": "UTC",
            "spark.log.level": "ERROR",
        }
        if memory:
            settings["spark.driver.memory"] = memory.replace(" ", "").lower().removesuffix("b")
        if not master:  # a few partitions for each thread: hundreds are for a cluster
            settings["spark.sql.shuffle.partitions"] = str(4 * threads)
            settings["spark.driver.host"] = "127.0.0.1"
            settings["spark.driver.bindAddress"] = "127.0.0.1"
        builder = SparkSession.builder.appName("pagellm prepare")
        builder = builder.master(master or f"local[{threads}]")
        for name, value in settings.items():
            builder = builder.config(name, value)
        try:
            self._session = builder.getOrCreate()
        except Exception as error:  # of several libraries' own kinds
            raise PageLLMError(
                f"Spark does not start: {str(error).splitlines()[0]}\n"
                "  It needs Java 17 or newer: JAVA_HOME says where. --spark_master names a cluster."
            ) from error

    def read(self, name: str, files: list[Path]) -> None:
        paths = [str(file.absolute()) for file in files]
        self._session.read.parquet(*paths).createOrReplaceTempView(name)

    def keep(self, name: str, query: str) -> None:
        target = self._written(query)
        self._session.read.parquet(str(target)).createOrReplaceTempView(name)
        for old in self._folder.glob(f"{name}.*"):
            shutil.rmtree(old)
        kept = target.with_name(f"{name}.{target.name}")
        target.rename(kept)
        self._session.read.parquet(str(kept)).createOrReplaceTempView(name)

    def _written(self, query: str) -> Path:
        self._made += 1
        target = self._folder / f"query-{self._made}"
        self._session.sql(query).write.option("compression", "lz4").parquet(str(target))
        return target

    def drop(self, *names: str) -> None:
        for name in names:
            self._session.catalog.dropTempView(name)
            for old in self._folder.glob(f"{name}.*"):
                shutil.rmtree(old)

    def one(self, query: str) -> tuple:
        return tuple(self._session.sql(query).collect()[0])

    def batches(self, query: str) -> Iterator[pa.RecordBatch]:
        target = self._written(query)
        # A sorted result is cut into parts by its order, and their names count upwards.
        for part in sorted(target.glob("part-*.parquet")):
            yield from pq.ParquetFile(part).iter_batches(batch_size=BATCH)
        shutil.rmtree(target)

    def draw(self, seed: str, user: str, item: str) -> str:
        text = f"concat({quoted(seed)}, chr(0), {user}, chr(0), {item})"
        return f"substr(sha2({text}, 256), 1, 16)"

    def close(self) -> None:
        self._session.stop()


ENGINES = ("duckdb", "spark")


def opened(name: str, folder: Path, memory: str, threads: int, master: str) -> Engine:
    """An engine by its name. threads: 0 for one for each core.

    Raises PageLLMError where its extra is not installed, or it does not start.
    """
    threads = threads or os.cpu_count() or 1
    folder.mkdir()
    if name == "spark":
        return Spark(folder, memory, threads, master)
    return DuckDB(folder, memory, threads)


def is_size(text: str) -> bool:
    """Whether text is a size of memory: a whole number and KB, MB, GB or TB."""
    return bool(MEMORY.fullmatch(text))


def missing(extra: str) -> PageLLMError:
    """The error of an engine that is not installed."""
    return PageLLMError(
        f"--engine {extra} needs a package that is not installed\n"
        f"  Install it with: {hints.install(extra)}"
    )


def quoted(text: str) -> str:
    """Text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"
