"""Many raw files read by several processes at once; the records come out as if one had read them in order.

Each process parses one file into a temporary Parquet file; this one hands its tables on, file after file. What is
broken is counted per file and added up, so that nothing depends on the number of processes.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pagellm.config import PageLLMError
from pagellm.data.raw import Raw
from pagellm.data.records import BATCH_ROWS, COLUMNS, EXAMPLES, Tally

__all__ = ["batches"]

def batches(raw: Raw, tally: Tally, processes: int, folder: Path) -> Iterator[pa.Table]:
    """Every interaction of every file as tables of records.COLUMNS, by up to `processes` processes.

    processes  0: one a core. One file, or sequence files, whose users may go on in the next, are read here
    folder     for temporary files, which are gone afterwards
    Raises PageLLMError as a single process would, or if a process dies.
    """
    processes = min(processes or os.cpu_count() or 1, len(raw.review_files))
    if processes < 2 or any(file.kind == "sequences" for file in raw.review_files):
        yield from raw.batches(tally)
        return
    parts = [folder / f"part-{number}.parquet" for number in range(len(raw.review_files))]
    # Started afresh, not forked: a fork would take over locks that other threads hold.
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        jobs = [pool.submit(parse, raw, number, part) for number, part in enumerate(parts)]
        try:
            for job, part in zip(jobs, parts, strict=True):
                add(tally, job.result())
                for batch in pq.ParquetFile(part).iter_batches(BATCH_ROWS):
                    yield pa.Table.from_batches([batch])
                part.unlink()
        except BrokenProcessPool:
            raise PageLLMError("a process that read raw files died, perhaps of too little memory; "
                               "try again with fewer: --processes 1") from None
        finally:
            for job in jobs:
                job.cancel()


def parse(raw: Raw, number: int, path: Path) -> Tally:
    """Parse one of the files into a Parquet file of records, in a process of its own."""
    tally = Tally()
    one = Raw([raw.review_files[number]], [], [], raw.options)
    with pq.ParquetWriter(path, COLUMNS, compression="lz4") as writer:
        for table in one.batches(tally):
            writer.write_table(table)
    return tally


def add(total: Tally, part: Tally) -> None:
    total.read += part.read
    total.broken.update(part.broken)
    total.examples += part.examples[: EXAMPLES - len(total.examples)]
