"""The rows that the k-core removed from a log. They are kept, so that no user of it is lost.

`prepare` writes them to data/<dataset>/dropped.parquet, by user and time. Nothing is trained on
them. They are the history of a user without a row in the data: `LeftOut.read(shop).of(user)`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pagellm.data.filters import tie_ranks
from pagellm.data.shop import Shop, numbers, read_parquet
from pagellm.data.text_store import by_time, time_array
from pagellm.stage.config import PageLLMError

__all__ = ["LeftOut", "NAME", "schema", "table", "write", "writer"]

NAME = "dropped.parquet"


def table(
    seed: int, rows: tuple[np.ndarray, ...], user_ids: list[str], item_ids: list[str]
) -> pa.Table:
    """Rows as a table with the shop's own ids: by user, oldest first; equal times by `tie_ranks`.

    rows  user, item (R,) int, index into user_ids and item_ids; rating (R,) float32 on 1..5, NaN
          where unknown; time (R,) float64 seconds, NO_TIME where unknown; positive (R,) bool
    """
    user, item, rating, time, positive = rows
    order = by_time(user, time, tie_ranks(seed, user, item, time, user_ids, item_ids))
    user, item, rating, time, positive = (x[order] for x in (user, item, rating, time, positive))

    def names(numbers, of: list[str]) -> pa.Array:
        some, at = np.unique(numbers, return_inverse=True)
        return pa.array([of[n] for n in some.tolist()], pa.string()).take(pa.array(at.ravel()))

    columns = {
        "user_id": names(user, user_ids),
        "item_id": names(item, item_ids),
        "rating": pa.array(rating, mask=np.isnan(rating)),
        "time": time_array(time),
        "positive": pa.array(positive),
    }
    return pa.table(columns)


def schema(time: pa.DataType) -> pa.Schema:
    """The columns of the file. time: int64, or float64 where some times have a fraction."""
    kinds = (pa.string(), pa.string(), pa.float32(), time, pa.bool_())
    names = ("user_id", "item_id", "rating", "time", "positive")
    return pa.schema(list(zip(names, kinds, strict=True)))


def writer(folder: Path, columns: pa.Schema) -> pq.ParquetWriter:
    """To write the file a group of rows at a time, as `write` writes it at once."""
    return pq.ParquetWriter(folder / NAME, columns, compression="zstd", write_page_checksum=True)


def write(rows: pa.Table, folder: Path) -> None:
    """Write the rows into a folder, with checksums, since source.json holds no hash of them."""
    if len(rows):
        pq.write_table(rows, folder / NAME, compression="zstd", write_page_checksum=True)


class LeftOut(NamedTuple):
    """Users of the log who have no row in the data, and their rows in the log.

    users     the shop's own ids, in their order -> place in indptr
    indptr    (users + 1,) int64; item (E,) int64, dense ids; rating (E,) float32, NaN: none; of
              items that the data have, oldest first
    items     ids of items of the log that the data do not have, in their order
    """

    users: dict[str, int]
    indptr: np.ndarray
    item: np.ndarray
    rating: np.ndarray
    items: list[str]
    item_ids: list[str]

    @classmethod
    def none(cls) -> "LeftOut":
        """Nobody is left out."""
        nothing = np.zeros(0, np.int64)
        return cls({}, np.zeros(1, np.int64), nothing, nothing.astype(np.float32), [], [])

    @classmethod
    def read(cls, shop: Shop) -> "LeftOut":
        """Those of shop.path; none where `prepare` wrote no file.

        Raises PageLLMError for a file that is damaged.
        """
        if shop.path is None or not (shop.path / NAME).exists():
            return cls.none()
        try:
            columns = ["user_id", "item_id", "rating"]
            rows = read_parquet(shop.path / NAME, columns, checked=True)
        except (pa.ArrowException, OSError) as error:
            raise PageLLMError(
                f"{shop.path / NAME} cannot be read: {error}\n  Remove {shop.path} and prepare it "
                "again."
            ) from error
        # From the files: pa.array imports pandas where it is installed, as `numbers` says.
        known, users = (
            read_parquet(shop.path / f"{name}.parquet", ["id"])["id"].combine_chunks()
            for name in ("items", "users")
        )
        items = pc.unique(rows["item_id"])
        items = items.filter(pc.invert(pc.is_in(items, known)))
        rows = rows.filter(pc.invert(pc.is_in(rows["user_id"], users)))
        user = rows["user_id"].combine_chunks().dictionary_encode()
        item = pc.index_in(rows["item_id"], known).combine_chunks()
        place, at = numbers(user.indices), numbers(item, -1)
        there = np.flatnonzero(at >= 0)
        there = there[np.argsort(place[there], kind="stable")]  # a user's rows side by side
        count = np.bincount(place[there], minlength=len(user.dictionary))
        return cls(
            {name: at for at, name in enumerate(user.dictionary.to_pylist())},
            np.concatenate([[0], np.cumsum(count)]).astype(np.int64),
            at[there].astype(np.int64),
            numbers(rows["rating"], np.nan).astype(np.float32)[there],
            sorted(items.to_pylist()),
            shop.catalogue.ids,
        )

    def of(self, user: str | None) -> tuple[tuple[str, float], ...]:
        """(item id, rating or NaN) of a user, oldest first; () for anybody who is not left out."""
        if user is None or user not in self.users:
            return ()
        return tuple(self.events(self.users[user]))

    def events(self, at: int) -> Iterator[tuple[str, float]]:
        """The same for the user at a place."""
        for e in range(self.indptr[at], self.indptr[at + 1]):
            yield self.item_ids[self.item[e]], float(self.rating[e])
