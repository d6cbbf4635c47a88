"""Records to compact columns, their text to disk: memory does not grow with the text of the reviews.

While records are read, their texts go to a temporary Parquet file by row groups. When it is known which rows
stay and in what order, one pass deals them out into files of neighbouring rows, and each of those, small
enough to hold, is put in order and written.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

__all__ = ["REVIEWS", "SPLIT_CODES", "Columns", "Numbers", "Spool", "by_time", "collect", "write_reviews"]

SPLIT_CODES = {"": -1, "train": 0, "valid": 1, "test": 2, "unused": 3}
REVIEWS = pa.schema([("user", pa.int32()), ("item", pa.int32()), ("text", pa.string())])
DEALT = pa.schema([("position", pa.int64()), ("text", pa.string())])
GROUP_CHARACTERS = 16_000_000      # text held before a row group is written
GROUP_ROWS = 50_000
BUCKET_ROWS = 50_000               # rows put in order at once
BUCKETS = 200                      # files open at once


@dataclass(frozen=True)
class Columns:
    """R records in the order they were read. Users and items are ranks of their sorted identifiers."""

    user_ids: list[str]          # sorted
    item_ids: list[str]          # sorted
    user: np.ndarray             # (R,) int32, index into user_ids
    item: np.ndarray             # (R,) int32, index into item_ids
    rating: np.ndarray           # (R,) float32, NaN where unknown
    time: np.ndarray             # (R,) int64 seconds, NO_TIME where unknown
    tie: np.ndarray              # (R,) uint64, a digest of the text; 0 where there is none
    split: np.ndarray            # (R,) int8, a value of SPLIT_CODES


class Spool:
    """A temporary Parquet file of texts, in order of arrival."""

    def __init__(self, path: Path):
        self.path = path
        self._schema = pa.schema([("text", pa.string())])
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._texts: list[str] = []
        self._characters = 0

    def add(self, text: str) -> None:
        self._texts.append(text)
        self._characters += len(text)
        if self._characters >= GROUP_CHARACTERS or len(self._texts) >= GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._texts:
            self._writer.write_table(pa.table({"text": pa.array(self._texts, pa.string())}, self._schema))
        self._texts, self._characters = [], 0

    def close(self) -> None:
        self._flush()
        self._writer.close()


class Numbers:
    """Identifiers numbered in order of arrival, a column at once."""

    def __init__(self):
        self._number: dict[str, int] = {}

    def add(self, names: pa.StringArray) -> np.ndarray:
        """(n,) int32, the number of each name."""
        coded = names.dictionary_encode()
        number = self._number
        new = [number.setdefault(name, len(number)) for name in coded.dictionary.to_pylist()]
        return np.array(new, dtype=np.int32)[coded.indices.to_numpy()]

    def ranked(self) -> tuple[list[str], np.ndarray]:
        """Identifiers in order, and for each number its place in that order."""
        ordered = sorted(self._number)
        rank = np.empty(len(ordered), dtype=np.int32)
        rank[[self._number[name] for name in ordered]] = np.arange(len(ordered), dtype=np.int32)
        return ordered, rank


def collect(batches: Iterable[pa.Table], spool_path: Path, min_text: int = 1, max_text: int = 2000) -> Columns:
    """Read every record: numbers into columns, texts into a Spool at spool_path.

    batches             tables of records.COLUMNS
    min_text, max_text  characters: a shorter text is left out, a longer one cut
    """
    users, items = Numbers(), Numbers()
    parts: list[list[np.ndarray]] = []
    spool = Spool(spool_path)
    for batch in batches:
        user, item, rating, time, text, split = (batch[i].combine_chunks() for i in range(6))
        texts = [value[:max_text].rstrip() if len(value) >= min_text else "" for value in text.to_pylist()]
        code = split.dictionary_encode()
        codes = np.array([SPLIT_CODES[name] for name in code.dictionary.to_pylist()], dtype=np.int8)
        parts.append([users.add(user), items.add(item), rating.to_numpy(zero_copy_only=False).astype(np.float32),
                      time.to_numpy(), np.array([*map(digest, texts)], dtype=np.uint64),
                      codes[code.indices.to_numpy()]])
        for value in texts:
            spool.add(value)
    spool.close()
    kinds = (np.int32, np.int32, np.float32, np.int64, np.uint64, np.int8)
    user, item, rating, time, tie, split = ([np.concatenate(column) for column in zip(*parts, strict=True)] if parts
                                            else [np.zeros(0, kind) for kind in kinds])
    user_ids, user_rank = users.ranked()
    item_ids, item_rank = items.ranked()
    return Columns(user_ids, item_ids, user_rank[user], item_rank[item], rating, time, tie, split)


def by_time(user: np.ndarray, time: np.ndarray, item: np.ndarray) -> np.ndarray:
    """(R,) int64: the rows in the order of user, then time, then item, as np.lexsort((item, time, user)) has them.

    All three are integers. One sort of numbers that hold all three, where 63 bits are enough for that.
    """
    codes, room = [], 1
    for column in (user, time, item):
        low = int(column.min(initial=0))
        size = int(column.max(initial=0)) - low + 1
        codes.append((column.astype(np.int64) - low, size))
        room *= size
    if room >= 1 << 63:
        return np.lexsort((item, time, user))
    code = np.zeros(len(user), dtype=np.int64)
    for column, size in codes:
        code *= size
        code += column
    return np.argsort(code, kind="stable")


def digest(text: str) -> int:
    """64 bits of the text, to break ties without regard to the order of lines; 0 for no text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") | 1 if text else 0


def write_reviews(spool_path: Path, position: np.ndarray, user, item, path: Path) -> int:
    """Write reviews.parquet: texts of the spool's rows with position >= 0, in order of position.

    position (R,) int64   where each spooled row belongs, -1 for nowhere
    user, item (P,) int32 columns by position
    returns how many rows were written: those that have a text
    """
    width = max(BUCKET_ROWS, math.ceil(len(user) / BUCKETS))
    parts = [path.with_name(f"part-{n:03d}.arrow") for n in range(math.ceil(len(user) / width))]
    deal(spool_path, position, width, parts)
    written = 0
    with pq.ParquetWriter(path, REVIEWS, compression="zstd") as writer:
        for part in tqdm(parts, "  writing reviews", unit=f" x {width} rows", delay=2):
            with pa.OSFile(str(part)) as file:
                table = pa.ipc.open_stream(file).read_all().sort_by("position")
            part.unlink()
            at = table["position"].to_numpy()
            columns = [pa.array(user[at], pa.int32()), pa.array(item[at], pa.int32()), table["text"]]
            writer.write_table(pa.table(columns, schema=REVIEWS))
            written += len(at)
    return written


def deal(spool_path: Path, position: np.ndarray, width: int, parts: list[Path]) -> None:
    """One pass over the spool: the row that belongs at position p goes to parts[p // width]."""
    writers = [pa.ipc.new_stream(str(part), DEALT) for part in parts]
    start = 0
    bar = tqdm(total=len(position), desc="  sorting reviews", unit=" rows", unit_scale=True, delay=2)
    for batch in pq.ParquetFile(spool_path).iter_batches(batch_size=GROUP_ROWS):
        at = position[start:start + len(batch)]
        start += len(batch)
        keep = np.flatnonzero((at >= 0) & (pc.binary_length(batch["text"]).to_numpy() > 0))
        keep = keep[np.argsort(at[keep] // width, kind="stable")]
        bucket = at[keep] // width
        edges = np.flatnonzero(np.diff(bucket, prepend=-1, append=-1))
        for first, last in zip(edges[:-1], edges[1:], strict=True):
            rows = keep[first:last]
            writers[bucket[first]].write_batch(pa.record_batch(
                [pa.array(at[rows], pa.int64()), batch["text"].take(pa.array(rows))], schema=DEALT))
        bar.update(len(batch))
    bar.close()
    for writer in writers:
        writer.close()
