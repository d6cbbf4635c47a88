"""Orders beside a prepared shop: who bought what together, and how often.

A shop keeps one row per (user, item). Orders keep every line of every basket, and so they show
what a user buys again and again.

orders = load_orders(shop)                  None where the shop has none
items, count = orders.history(users)        see Orders.history

data/<dataset>/orders.parquet   user, item int32 (dense ids); basket, time int64; quantity int32;
                                paid float32 (of the line, null = unknown); split int8, index into
                                SPLITS
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pagellm.data.shop import SPLITS, Rows, Shop, read_parquet
from pagellm.stage.config import PageLLMError
from pagellm.stage.files import atomic, file_id

__all__ = ["Orders", "load_orders", "orders_of", "write_orders"]

FILE = "orders.parquet"
COLUMNS = ("user", "item", "basket", "time", "quantity", "paid", "split")
TYPES = {
    "user": pa.int32(),
    "item": pa.int32(),
    "basket": pa.int64(),
    "time": pa.int64(),
    "quantity": pa.int32(),
    "paid": pa.float32(),
    "split": pa.int8(),
}


@dataclass(frozen=True)
class Orders:
    """Lines of baskets, all arrays (L,). A basket belongs to one user and one split."""

    user: np.ndarray  # int64 dense
    item: np.ndarray  # int64 dense
    basket: np.ndarray  # int64
    time: np.ndarray  # int64 seconds
    quantity: np.ndarray  # int64
    paid: np.ndarray  # float32, NaN where unknown
    split: np.ndarray  # int8, index into SPLITS
    n_users: int
    n_items: int

    def only(self, *splits: str) -> "Orders":
        """The lines of some splits."""
        return self.where(np.isin(self.split, [SPLITS.index(name) for name in splits]))

    def where(self, keep: np.ndarray) -> "Orders":
        """The lines where keep (L,) bool is True."""
        columns = {name: getattr(self, name)[keep] for name in COLUMNS}
        return replace(self, **columns)

    def end(self) -> int:
        """The second after the last line: 0 without lines."""
        return int(self.time.max(initial=-1)) + 1

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """user, item, count, last (P,): each (user, item) once, by user, newest first, then item.

        count  baskets that hold it, 1 or more        last  time of the newest of them
        """
        key = self.user * max(self.n_items, 1) + self.item
        order = np.lexsort((self.basket, key))
        key, basket, time = key[order], self.basket[order], self.time[order]
        new_pair = np.ones(len(key), dtype=bool)
        new_pair[1:] = key[1:] != key[:-1]
        new_basket = new_pair.copy()
        new_basket[1:] |= basket[1:] != basket[:-1]
        start = np.flatnonzero(new_pair)
        if not len(start):
            empty = np.zeros(0, dtype=np.int64)
            return empty, empty, empty, empty
        count = np.add.reduceat(new_basket.astype(np.int64), start)
        last = np.maximum.reduceat(time, start)
        user, item = np.divmod(key[start], max(self.n_items, 1))
        order = np.lexsort((item, -last, user))
        return user[order], item[order], count[order], last[order]

    def history(self) -> tuple[Rows, np.ndarray]:
        """Items of every user, newest first, and how many of the user's baskets hold each.

        returns rows, count: rows.of(u) are the items of user u, count lies beside rows.items
        """
        user, item, count, _ = self.pairs()
        indptr = np.zeros(self.n_users + 1, dtype=np.int64)
        np.cumsum(np.bincount(user, minlength=self.n_users), out=indptr[1:])
        return Rows(indptr, item, np.full(len(item), np.nan, np.float32)), count

    def baskets(self) -> Rows:
        """The different items of every basket, by rising basket number."""
        both = np.unique(np.stack([self.basket, self.item], axis=1), axis=0)
        _, start = np.unique(both[:, 0], return_index=True)
        indptr = np.concatenate([start, [len(both)]]).astype(np.int64)
        return Rows(indptr, both[:, 1].copy(), np.full(len(both), np.nan, np.float32))


def orders_of(shop: Shop) -> Orders:
    """Orders made from a shop without any: all train rows of a user count as one basket.

    Held-out rows are baskets of their own, one a user and split.
    """
    keep = shop.rows(None)
    user, split = shop.user[keep], shop.split[keep]
    n = int(keep.sum())
    return Orders(
        user,
        shop.item[keep],
        user * len(SPLITS) + split,
        shop.time[keep],
        np.ones(n, dtype=np.int64),
        np.full(n, np.nan, np.float32),
        split,
        shop.n_users,
        shop.n_items,
    )


def write_orders(folder: str | Path, columns: dict[str, np.ndarray]) -> Path:
    """Write orders.parquet beside prepared tables; it remembers which ones.

    columns: see the module.
    """
    folder = Path(folder)
    order = np.lexsort((columns["item"], columns["basket"], columns["time"], columns["user"]))
    arrays = {
        name: pa.array(columns[name][order], TYPES[name], from_pandas=True) for name in COLUMNS
    }
    table = pa.table(arrays).replace_schema_metadata({"shop": file_id(folder / "source.json")})
    with atomic(folder / FILE) as beside:
        pq.write_table(table, beside, compression="zstd")
    return folder / FILE


def load_orders(shop: Shop) -> Orders | None:
    """The orders beside a shop, or None. Raises PageLLMError if they belong to other tables."""
    if shop.path is None or not (shop.path / FILE).exists():
        return None
    path = shop.path / FILE
    table = read_parquet(path)
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise PageLLMError(
            f"{path} has no column {', '.join(missing)}; want {', '.join(COLUMNS)}\n"
            "  Write it with pagellm.data.orders.write_orders."
        )
    made_for = (table.schema.metadata or {}).get(b"shop", b"").decode()
    if made_for != file_id(shop.path / "source.json"):
        raise PageLLMError(
            f"{path} was written for another preparation of {shop.path}\n"
            f"  Remove {path} and write it again, so that its dense ids are those of the shop."
        )
    columns = {name: table[name].to_numpy(zero_copy_only=False) for name in COLUMNS}
    whole = {name: columns[name].astype(np.int64) for name in COLUMNS[:5]}
    for name, n in (("user", shop.n_users), ("item", shop.n_items)):
        if len(table) and not 0 <= whole[name].min() <= whole[name].max() < n:
            raise PageLLMError(f"{path}: column {name} goes outside 0..{n - 1}; write it again")
    return Orders(
        **whole,
        paid=columns["paid"].astype(np.float32),
        split=columns["split"].astype(np.int8),
        n_users=shop.n_users,
        n_items=shop.n_items,
    )
