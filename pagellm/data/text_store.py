"""Keep records as compact columns and their texts on disk, so that texts take no memory.

Each part of the records is stored in two temporary files: one of numbers and identifiers, one of
texts. `gather` puts the numbers of all parts together. When it is known which rows stay and in what
order, one pass distributes the texts over files of neighbouring rows. Each of these is small enough
to be sorted in memory and written.
"""

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from pagellm.data.shop import SPLITS
from pagellm.data.values import NO_TIME

__all__ = [
    "Columns",
    "Names",
    "PART_BITS",
    "REVIEWS",
    "SPLIT_CODES",
    "by_time",
    "gather",
    "spool",
    "store",
    "time_array",
    "write_reviews",
]


SPLIT_CODES = {name: code for code, name in enumerate(("", *SPLITS), start=-1)}  # "": none given
REVIEWS = pa.schema([("user", pa.int32()), ("item", pa.int32()), ("text", pa.string())])
NAMES = pa.dictionary(pa.int32(), pa.string())
NUMBERS = pa.schema(
    [
        ("user", NAMES),
        ("item", NAMES),
        ("rating", pa.float64()),
        ("time", pa.float64()),
        ("tie", pa.uint64()),
        ("split", pa.int8()),
    ]
)
ROWS = pa.schema(
    [
        ("source", pa.int64()),
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("rating", pa.float64()),  # null where unknown
        ("seconds", pa.float64()),
        ("tie", pa.int64()),
        ("has_text", pa.bool_()),
        ("split", pa.int8()),
    ]
)
PART_BITS = 40  # of a row's number; the bits above them are the number of its part
SPOOLED = 500_000  # rows of a row group of ROWS
TEXTS = pa.schema([("text", pa.string())])
DEALT = pa.schema([("position", pa.int64()), ("text", pa.string())])
PACKED = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
LOOSE_NAMES = 1_000_000  # names held more than once, at least, before they are unified
BUCKET_ROWS = 50_000  # rows put in order at once
BUCKETS = 200  # files open at once


@dataclass(frozen=True)
class Columns:
    """R records in the order they were read. Users and items are ranks of sorted identifiers."""

    user_ids: list[str]  # sorted
    item_ids: list[str]  # sorted
    user: np.ndarray  # (R,) int32, index into user_ids
    item: np.ndarray  # (R,) int32, index into item_ids
    rating: np.ndarray  # (R,) float64, NaN where unknown
    time: np.ndarray  # (R,) float64 seconds, NO_TIME where unknown
    tie: np.ndarray  # (R,) uint64, a digest of the text; 0 where there is none
    split: np.ndarray  # (R,) int8, a value of SPLIT_CODES


class Names:
    """Identifiers of many rows, a column at once; each is kept about once."""

    def __init__(self):
        self._columns: list[pa.DictionaryArray] = []
        self._loose = 0

    def add(self, names: pa.StringArray | pa.DictionaryArray) -> None:
        column = (names if pa.types.is_dictionary(names.type) else names.dictionary_encode()).cast(
            NAMES
        )
        self._columns.append(column)
        self._loose += len(column.dictionary)
        if self._loose > max(LOOSE_NAMES, 2 * len(self._columns[0].dictionary)):
            self._columns, self._loose = [self.coded()], 0

    def coded(self) -> pa.DictionaryArray:
        """All rows so far over one dictionary, in order of arrival."""
        columns = pa.chunked_array(self._columns, NAMES).unify_dictionaries().chunks
        if len(columns) == 1:
            return columns[0]
        rows = np.concatenate(
            [column.indices.to_numpy() for column in columns] or [np.zeros(0, np.int32)]
        )
        return pa.DictionaryArray.from_arrays(
            rows, columns[0].dictionary if columns else pa.array([], pa.string())
        )

    def ranked(self) -> tuple[list[str], np.ndarray]:
        """The different identifiers in order, and (rows,) int32 the place of each row's own."""
        coded = self.coded()
        # of UTF-8 bytes, which is that of characters
        order = pc.array_sort_indices(coded.dictionary)
        rank = np.empty(len(order), dtype=np.int32)
        rank[order.to_numpy()] = np.arange(len(order), dtype=np.int32)
        return coded.dictionary.take(order).to_pylist(), rank[coded.indices.to_numpy()]


def store(batches: Iterable[pa.Table], stem: Path, min_text: int = 1, max_text: int = 2000) -> Path:
    """Store every record: numbers in <stem>.numbers, texts in <stem>.texts.

    batches             tables of records.COLUMNS, whose texts begin and end without spaces
    min_text, max_text  characters: a shorter text is left out, a longer one cut
    returns stem
    """
    users, items = Names(), Names()
    parts: list[list[np.ndarray]] = []
    for user, item, *numbers in without_texts(batches, stem, min_text, max_text):
        users.add(user)
        items.add(item)
        parts.append(numbers)
    columns = [users.coded(), items.coded(), *joined(parts, NUMBERS.types[2:])]
    with pa.ipc.new_file(f"{stem}.numbers", NUMBERS) as writer:
        writer.write_batch(
            pa.record_batch([pa.array(column) for column in columns], schema=NUMBERS)
        )
    return stem


def spool(
    batches: Iterable[pa.Table], stem: Path, number: int, min_text: int = 1, max_text: int = 2000
) -> Path:
    """As `store`, with the numbers in <stem>.rows: a Parquet file of ROWS, written as it is read.

    So a log of any length takes the memory of one batch. No digest of a text is 2^63 or more
    apart from another after the shift into a signed column: their order stays.

    number  of this part; `source` of its first row is number << PART_BITS
    """
    at = number << PART_BITS
    with pq.ParquetWriter(f"{stem}.rows", ROWS, compression="lz4") as writer:
        waiting: list[pa.RecordBatch] = []
        for user, item, rating, time, tie, split in without_texts(
            batches, stem, min_text, max_text
        ):
            source = np.arange(at, at + len(rating))
            signed = (tie ^ np.uint64(1 << 63)).view(np.int64)
            rating = pa.array(rating, mask=np.isnan(rating))
            columns = [source, user, item, rating, time, signed, tie > 0, split]
            waiting.append(pa.record_batch([pa.array(c) for c in columns], ROWS))
            at += len(source)
            if sum(map(len, waiting)) >= SPOOLED:
                writer.write_table(pa.Table.from_batches(waiting))
                waiting = []
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting))
    return stem


def without_texts(
    batches: Iterable[pa.Table], stem: Path, min_text: int, max_text: int
) -> Iterator[tuple]:
    """user, item (R,) arrays of identifiers; rating, time, tie, split (R,) as `Columns` has them.

    The texts go to <stem>.texts.
    """
    with pa.ipc.new_stream(f"{stem}.texts", TEXTS, options=PACKED) as writer:
        for batch in batches:
            user, item, rating, time, text, split = (batch[i].combine_chunks() for i in range(6))
            text = shortened(text, min_text, max_text)
            writer.write_batch(pa.record_batch([text], schema=TEXTS))
            code = split.dictionary_encode()
            codes = np.array(
                [SPLIT_CODES[name] for name in code.dictionary.to_pylist()], dtype=np.int8
            )
            yield (
                user,
                item,
                rating.to_numpy(zero_copy_only=False),
                time.to_numpy(),
                digests(text),
                codes[code.indices.to_numpy()],
            )


def joined(parts: list[list[np.ndarray]], kinds: list[pa.DataType]) -> Iterable[np.ndarray]:
    """Column by column, so that one at a time is held twice; the parts are used up."""
    for kind in kinds:
        empty = pa.array([], kind).to_numpy(zero_copy_only=False)
        yield np.concatenate([part.pop(0) for part in parts] or [empty])


def shortened(text: pa.StringArray, low: int, high: int) -> pa.StringArray:
    """Texts of `low` characters and more, cut after `high`; "" for the others."""
    length = pc.utf8_length(text)
    longer = pc.greater(length, high)
    if pc.any(longer).as_py():
        cut = [value[:high].rstrip() for value in text.filter(longer).to_pylist()]
        text = pc.replace_with_mask(text, longer, pa.array(cut, pa.string()))
    return pc.if_else(pc.less(length, low), "", text) if low > 1 else text


def digests(text: pa.StringArray) -> np.ndarray:
    """(R,) uint64: 64 bits of each text, 0 for no text: a tie-breaker independent of line order."""
    if not len(text):
        return np.zeros(0, np.uint64)
    if not pc.max(pc.binary_length(text)).as_py():
        return np.zeros(len(text), np.uint64)
    _, offsets, data = text.buffers()
    at = np.frombuffer(offsets, np.int32)[text.offset : text.offset + len(text) + 1]
    view, blake2b = memoryview(data or b""), hashlib.blake2b
    made = b"".join(
        [blake2b(view[a:b], digest_size=8).digest() for a, b in itertools.pairwise(at.tolist())]
    )
    return np.where(
        np.diff(at) > 0, np.frombuffer(made, ">u8").astype(np.uint64) | np.uint64(1), np.uint64(0)
    )


def gather(stems: list[Path]) -> Columns:
    """The numbers of all parts, one part after the other; their files are used up."""
    users, items = Names(), Names()
    parts: list[list[np.ndarray]] = []
    for stem in stems:
        path = stem.with_name(f"{stem.name}.numbers")
        with pa.memory_map(str(path)) as file:
            user, item, *numbers = pa.ipc.open_file(file).get_batch(0).columns
        path.unlink()
        users.add(user)
        items.add(item)
        parts.append([column.to_numpy() for column in numbers])
    user_ids, user = users.ranked()
    item_ids, item = items.ranked()
    return Columns(user_ids, item_ids, user, item, *joined(parts, NUMBERS.types[2:]))


def by_time(user: np.ndarray, time: np.ndarray, tie: np.ndarray) -> np.ndarray:
    """(R,) int64: the rows by user, then time, then tie, as np.lexsort((tie, time, user)) has them.

    user, tie (R,) int; time (R,) int or float. Where all times are whole and 63 bits can hold the
    three columns together, this is one sort of integers instead of three sorts.
    """
    if (time != np.floor(time)).any():
        return np.lexsort((tie, time, user))
    codes, room = [], 1
    for column in (user, time, tie):
        low = int(column.min(initial=0))
        size = int(column.max(initial=0)) - low + 1
        codes.append((column.astype(np.int64) - low, size))
        room *= size
    if room >= 1 << 63:
        return np.lexsort((tie, time, user))
    code = np.zeros(len(user), dtype=np.int64)
    for column, size in codes:
        code *= size
        code += column
    return np.argsort(code, kind="stable")


def time_array(time: np.ndarray) -> pa.Array:
    """(R,) float64 seconds as a column: int64, or float64 where some have a fraction.

    NO_TIME is null.
    """
    whole = (time == np.floor(time)).all()
    return pa.array(time.astype(np.int64) if whole else time, mask=time == NO_TIME)


def write_reviews(stems: list[Path], position: np.ndarray | None, user, item, path: Path) -> int:
    """Write reviews.parquet: the texts of rows with position >= 0, in order of position.

    The files of texts are deleted.

    position (R,) int64   where each row of the parts belongs, -1 for nowhere; None: no row has a
                          text
    user, item (P,) int32 columns by position
    returns how many rows were written: those that have a text
    """
    width = max(BUCKET_ROWS, math.ceil(len(user) / BUCKETS))
    parts = [path.with_name(f"reviews-{n:03d}.arrow") for n in range(math.ceil(len(user) / width))]
    deal(stems, position, width, parts)
    written = 0
    with pq.ParquetWriter(path, REVIEWS, compression="zstd") as writer:
        for part in tqdm(parts, "  writing reviews", unit=f" x {width} rows", delay=2):
            with pa.OSFile(str(part)) as file:
                table = pa.ipc.open_stream(file).read_all().sort_by("position")
            part.unlink()
            at = table["position"].to_numpy()
            columns = [
                pa.array(user[at], pa.int32()),
                pa.array(item[at], pa.int32()),
                table["text"],
            ]
            writer.write_table(pa.table(columns, schema=REVIEWS))
            written += len(at)
    return written


def deal(stems: list[Path], position: np.ndarray | None, width: int, parts: list[Path]) -> None:
    """One pass over the texts: the row that belongs at position p goes to parts[p // width]."""
    writers = [pa.ipc.new_stream(str(part), DEALT, options=PACKED) for part in parts]
    start = 0
    if position is None:
        for stem in stems:
            stem.with_name(f"{stem.name}.texts").unlink()
        for writer in writers:
            writer.close()
        return
    bar = tqdm(
        total=len(position), desc="  sorting reviews", unit=" rows", unit_scale=True, delay=2
    )
    for stem in stems:
        path = stem.with_name(f"{stem.name}.texts")
        with pa.OSFile(str(path)) as file:
            for batch in pa.ipc.open_stream(file):
                at = position[start : start + len(batch)]
                start += len(batch)
                keep = np.flatnonzero((at >= 0) & (pc.binary_length(batch["text"]).to_numpy() > 0))
                keep = keep[np.argsort(at[keep] // width, kind="stable")]
                bucket = at[keep] // width
                dealt = pa.record_batch(
                    [pa.array(at[keep], pa.int64()), batch["text"].take(pa.array(keep))],
                    schema=DEALT,
                )
                edges = np.flatnonzero(np.diff(bucket, prepend=-1, append=-1))
                for first, last in itertools.pairwise(edges.tolist()):
                    writers[bucket[first]].write_batch(dealt.slice(first, last - first))
                bar.update(len(batch))
        path.unlink()
    bar.close()
    for writer in writers:
        writer.close()
