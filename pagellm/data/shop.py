"""The prepared tables in memory: what every stage after `prepare` reads.

shop = load("data/toys")
shop.n_users, shop.n_items
shop.catalogue.title[12]
indptr, items, ratings = shop.csr("train")   # positives of u: items[indptr[u]:indptr[u + 1]]
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pagellm.stage import hints
from pagellm.stage.config import PageLLMError
from pagellm.stage.files import file_id, read_json

__all__ = [
    "Catalogue",
    "Rows",
    "SPLITS",
    "Shop",
    "liked_above",
    "load",
    "numbers",
    "read_parquet",
    "source",
]


SPLITS = ("train", "valid", "test", "unused")
THREADS_FROM = 16 << 20  # bytes of a Parquet file from which Arrow's threads pay


def read_parquet(path: Path, columns: list[str] | None = None, checked: bool = False) -> pa.Table:
    """A table that a stage has written, or some columns of it; checked by its own checksums.

    A small file is read without threads. It is as quick, and where memory is limited (`ulimit -v`)
    so that no thread can be started, Arrow would wait for its threads without end. A single file
    is not read by `pq.read_table`, which imports pandas where it is installed (.5 s).
    """
    large = path.stat().st_size >= THREADS_FROM
    if path.is_dir():
        return pq.read_table(path, columns=columns, page_checksum_verification=checked)
    with pq.ParquetFile(path, pre_buffer=large, page_checksum_verification=checked) as file:
        return file.read(columns=columns, use_threads=large)


def numbers(column: pa.ChunkedArray | pa.Array, fill: float | None = None) -> np.ndarray:
    """A column of numbers, or of truth values as bool, `fill` where it is null.

    Read from Arrow's memory, since `to_numpy`, `pa.array` and `pa.scalar` import pandas where it is
    installed (.4 s). Raises ValueError for null without `fill`.
    """
    if column.null_count and fill is None:
        raise ValueError(f"{column.null_count:,} of the numbers are null")
    truth = pa.types.is_boolean(column.type)
    kind = "f" if pa.types.is_floating(column.type) else "i"
    dtype = np.dtype(bool if truth else f"{kind}{column.type.bit_width // 8}")
    parts = [np.zeros(0, dtype)]
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        n, at = len(chunk), chunk.offset
        valid, data = chunk.buffers()
        if n:
            value = (
                bits(data, at, n) if truth else np.frombuffer(data, dtype, n, at * dtype.itemsize)
            )
            if chunk.null_count:
                value = np.where(bits(valid, at, n), value, dtype.type(fill))
            parts.append(value)
    return np.concatenate(parts)


def bits(buffer: pa.Buffer, at: int, n: int) -> np.ndarray:
    """(n,) bool from bit `at` on."""
    whole = np.unpackbits(np.frombuffer(buffer, np.uint8), count=at + n, bitorder="little")
    return whole[at:].astype(bool)


@dataclass(frozen=True)
class Catalogue:
    """The items by dense id 0..N-1. Unknown text is "", unknown numbers are NaN."""

    ids: list[str]  # the shop's own identifiers
    title: list[str]
    brand: list[str]
    categories: list[tuple[str, ...]]  # names below the common root; () where unknown
    leaf: list[str]  # the deepest category of the path; "" where unknown
    description: list[str]
    price: np.ndarray  # (N,) float32
    leaf_id: np.ndarray  # (N,) int64, index into leaf_names; -1 where unknown
    brand_id: np.ndarray  # (N,) int64, index into brand_names; -1 where unknown
    leaf_names: list[str]
    brand_names: list[str]

    @classmethod
    def of(cls, ids, title, brand, categories, leaf, description, price) -> "Catalogue":
        """Build one from its columns; the id columns are derived."""
        leaf_id, leaf_names = dense_names(leaf)
        brand_id, brand_names = dense_names(brand)
        return cls(
            list(ids),
            list(title),
            list(brand),
            [tuple(c) for c in categories],
            list(leaf),
            list(description),
            np.asarray(price, np.float32),
            leaf_id,
            brand_id,
            leaf_names,
            brand_names,
        )

    def __len__(self) -> int:
        return len(self.ids)


def dense_names(names: list[str]) -> tuple[np.ndarray, list[str]]:
    known = sorted(set(names) - {""})
    index = {name: i for i, name in enumerate(known)}
    return np.array([index.get(name, -1) for name in names], dtype=np.int64), known


class Rows(NamedTuple):
    """Items of every user, one after another: user u has items[indptr[u]:indptr[u + 1]]."""

    indptr: np.ndarray  # (U+1,) int64
    items: np.ndarray  # (R,) int64
    ratings: np.ndarray  # (R,) float32, NaN where unknown

    def of(self, user: int) -> tuple[np.ndarray, np.ndarray]:
        """items, ratings of one user."""
        span = slice(self.indptr[user], self.indptr[user + 1])
        return self.items[span], self.ratings[span]

    def counts(self) -> np.ndarray:
        return np.diff(self.indptr)

    def padded(self, users: np.ndarray, fill: int = -1) -> np.ndarray:
        """(B, longest of these) int64 items, `fill` on the right; at least one column."""
        counts = self.counts()[users]
        width = max(1, counts.max(initial=0))
        column = np.arange(width)
        index = np.minimum(self.indptr[users][:, None] + column, max(len(self.items) - 1, 0))
        items = self.items[index] if len(self.items) else np.full(index.shape, fill, np.int64)
        return np.where(column < counts[:, None], items, fill)

    def flat(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """place, item (E,) of all items of these users: an item of users[place]."""
        counts = self.counts()[users]
        place = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
        return place, self.items[self.indptr[users][place] + within]


@dataclass(frozen=True)
class Shop:
    """Interactions by user and time, one per (user, item), and the catalogue.

    Rows of one user at one time stand in an order drawn by `prepare`.
    """

    n_users: int
    n_items: int
    user: np.ndarray  # (R,) int64
    item: np.ndarray  # (R,) int64
    rating: np.ndarray  # (R,) float32, NaN where the shop has none (implicit feedback)
    time: np.ndarray  # (R,) int64 seconds; 0 where unknown
    positive: np.ndarray  # (R,) bool: liked, or implicit
    split: np.ndarray  # (R,) int8, index into SPLITS
    catalogue: Catalogue
    user_ids: list[str]
    truth: np.ndarray | None = None  # (U, N) float32: expected ratings;
    # known on the synthetic shop only
    path: Path | None = None

    def rows(
        self, split: str | tuple[str, ...] | None = None, positive: bool | None = True
    ) -> np.ndarray:
        """(R,) bool: rows of one split, several or all (None); positive None: both kinds."""
        names = SPLITS if split is None else (split,) if isinstance(split, str) else split
        keep = np.isin(self.split, [SPLITS.index(name) for name in names])
        return keep if positive is None else keep & (self.positive == positive)

    @property
    def rated(self) -> bool:
        """Whether any train row has stars."""
        return not bool(np.isnan(self.rating[self.rows("train", None)]).all())

    def csr(self, split: str | tuple[str, ...] | None, positive: bool | None = True) -> Rows:
        """The chosen rows by user: (indptr, items, ratings). Within a user: by time."""
        keep = self.rows(split, positive)
        indptr = np.zeros(self.n_users + 1, dtype=np.int64)
        np.cumsum(np.bincount(self.user[keep], minlength=self.n_users), out=indptr[1:])
        return Rows(indptr, self.item[keep], self.rating[keep])

    def moments(self, split: str) -> np.ndarray:
        """(U,) int64 seconds: when each user would have asked for a page.

        That is the time of the user's first positive of the split; for users without one, the last
        time of all train rows.
        """
        keep = self.rows(split)
        first = np.full(self.n_users, np.iinfo(np.int64).max)
        np.minimum.at(first, self.user[keep], self.time[keep])
        return np.where(
            first < np.iinfo(np.int64).max,
            first,
            self.time[self.rows("train", None)].max(initial=0),
        )

    def reviews(self) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """user, item, text of the train rows that have a review."""
        if self.path is None or not (self.path / "reviews.parquet").exists():
            return np.zeros(0, np.int64), np.zeros(0, np.int64), []
        table = read_parquet(self.path / "reviews.parquet")
        return (
            numbers(table["user"]).astype(np.int64),
            numbers(table["item"]).astype(np.int64),
            table["text"].to_pylist(),
        )


def load(path: str | Path) -> Shop:
    """Read a directory that `prepare` wrote.

    Raises PageLLMError if it is not there, or has changed since.
    """
    path = Path(path)
    if not (path / "source.json").exists():
        raise PageLLMError(
            f"no prepared data in {path}\n"
            f"  Make it with: {hints.prepare(path.name, str(path.parent))}{hints.other_data(path)}"
        )
    for name, written in source(path).get("written", {}).items():
        if not (path / name).exists() or file_id(path / name) != written:
            state = "is gone" if not (path / name).exists() else "has changed since it was written"
            raise PageLLMError(
                f"{path / name} {state}\n  Remove {path} and prepare it again: "
                f"{hints.prepare(path.name, str(path.parent))}"
            )
    rows = read_parquet(path / "interactions.parquet")
    items = read_parquet(path / "items.parquet").to_pydict()
    users = read_parquet(path / "users.parquet", ["id"])["id"].to_pylist()
    price = np.array([np.nan if p is None else p for p in items["price"]], dtype=np.float32)
    catalogue = Catalogue.of(
        items["id"],
        items["title"],
        items["brand"],
        items["categories"],
        items["leaf"],
        items["description"],
        price,
    )
    split = rows["split"].cast("string").combine_chunks().dictionary_encode()
    code = np.array([SPLITS.index(name) for name in split.dictionary.to_pylist()], dtype=np.int8)
    truth = path / "truth.npy"
    return Shop(
        n_users=len(users),
        n_items=len(catalogue),
        user=numbers(rows["user"]).astype(np.int64),
        item=numbers(rows["item"]).astype(np.int64),
        rating=numbers(rows["rating"], np.nan).astype(np.float32),
        time=numbers(rows["time"], 0).astype(np.int64),
        positive=numbers(rows["positive"]),
        split=code[numbers(split.indices)],
        catalogue=catalogue,
        user_ids=users,
        truth=np.load(truth, allow_pickle=False) if truth.exists() else None,
        path=path,
    )


def forgotten(user: int) -> str:
    """What stands for the identifier of a person whom `pagellm forget` took out."""
    return f"<forgotten {user}>"


def is_forgotten(name: str) -> bool:
    """Whether an identifier is such a stand-in."""
    return name.startswith("<forgotten ")


def source(path: str | Path) -> dict:
    """What prepare noted about the raw files and the counts before and after each filter."""
    return read_json(Path(path) / "source.json")


def liked_above(path: str | Path) -> float:
    """The rating on 1..5, as float32 has it, above which `prepare` took a row for liked.

    --positive_above is on the shop's own scale; stored ratings and those of a history are on 1..5.
    """
    noted = source(path)
    config = noted.get("config", {})
    above = float(config.get("positive_above", 3.0))
    told = config.get("rating_min", 1.0), config.get("rating_max", 5.0)
    low, high = noted.get("read", {}).get("rows", {}).get("scale", told)
    return float(np.float32(1 + 4 * (above - low) / (high - low)))
