"""Raw files -> data/<dataset>/: remove duplicates, k-core, number, split. The first stage.

    pagellm prepare                                                   the synthetic shop, seconds
    pagellm prepare --dataset toys                                    data/raw/toys, or downloaded
    pagellm prepare --dataset myshop --raw ~/exports                  any shop's own log
    pagellm prepare --dataset small --raw data/raw/toys --thin_users 5000

Writes, all or nothing:

    interactions.parquet  user, item int32; rating float32 on 1..5 (null = none); time int64 seconds
                          or, where some have a fraction, float64 (null = none); positive bool;
                          split train | valid | test | unused. One row per (user, item), by user
                          and time; rows of one user at one time in an order drawn from `seed`.
                          Positive: rated above positive_above, or not rated at all.
    reviews.parquet       user, item, text of train rows. Text of held-out rows is stored nowhere.
    items.parquet         item, id, title, brand, categories, leaf, price, description
    users.parquet         user, id
    truth.npy             synthetic only: (U, N) float32 expected ratings
    dropped.parquet       rows that the k-core took out: see pagellm.data.dropped; absent if none
    source.json           release, files with sha256, what was decided while reading, counts before
                          and after each filter, this Config, and the hashes of what was written:
                          `load` refuses anything else

After reading, it prints a paragraph: what was read and passed over, which columns were taken and
left, and what was lost. --strict stops at a warning. See pagellm.data.account.

Dense ids are ranks of the sorted identifiers. The bytes depend on the raw files and Config alone.
"""

import glob
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pagellm.data import dropped, filters, parallel, relational, stores, synthetic, text_store
from pagellm.data.account import Account, Join, Seen, account_of, is_unknown, several
from pagellm.data.engines import ENGINES, is_size, opened
from pagellm.data.files import Options
from pagellm.data.raw import Raw, find
from pagellm.data.records import Item, Tally, batched
from pagellm.data.shop import SPLITS
from pagellm.data.values import NO_TIME
from pagellm.stage import hints
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check, check_numbers
from pagellm.stage.files import file_id

__all__ = ["Config", "Table", "building", "catalogue", "run", "write_tables"]


# Options that change no byte of the output: where files lie, and how they are read. (The files
# themselves are known by their sha256.)
PLACES = (
    *("raw", "data", "review_files", "item_files", "train", "valid", "test"),
    *("processes", "strict", "preset"),
    *("engine", "memory", "spark_master"),
)
# Newer options. Data prepared before an option existed count as prepared with its default.
LATER = (
    "thin_users",
    "refit",
    "repeat",
    "columns",
    "item_columns",
    "where",
    "time_form",
    "categories",
)
SYNTHETIC_ONLY = ("users", "items")
# Options that the synthetic shop would pass over, since it is made up: files and their columns.
OF_FILES = tuple(
    field.name
    for field in fields(Options)
    if field.default == "" and field.name not in ("release", "split")
)
MADE_UP = "nothing: the data set 'synthetic' is made up; name yours, --dataset NAME"


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Read raw files, filter, split, and write data/<dataset>/."""

    k_core: int = 5  # positive rows that every user and every item must have; those with fewer are
    # removed until all have them. split=given filters nothing
    positive_above: float = 3.0  # rating above which a row is positive, on the shop's own scale;
    # rows without a rating are positive
    thin_users: int = 0  # rows are left out at random until the k-core keeps this many users;
    # 0: all rows stay
    preset: str = "auto"  # options found to fit the data set; others on the command line override
    # them. auto: <dataset>/prepare in ./presets or in the package, if it is there; none; or a path
    seed: int = 0  # seed of the random split, of thinning, and of the synthetic shop
    refit: bool = False  # add the validation rows to the training rows: for a last fit with
    # settings that are already chosen
    repeat: bool = False  # how often a person met an item is its rating: 4 for once, 4.5 for twice,
    # up to 5. For shops where people buy the same things again, whose log has no ratings
    max_broken: float = 0.01  # share of broken lines above which reading stops with an error
    users: int = 2000  # users of the synthetic shop
    items: int = 1000  # items of the synthetic shop
    strict: bool = False  # stop at a warning, such as an item table that knows none of the items
    processes: int = 1  # processes that read several files, or pieces of large plain ones, at the
    # same time, and threads of an engine; 0: one for each core
    engine: str = "memory"  # what removes duplicates, takes the k-core, splits and sorts: memory,
    # in this process; duckdb or spark, for a log larger than memory. The data set is the same
    memory: str = ""  # memory of the engine, such as 4GB; the process itself takes more;
    # empty: the engine's own default
    spark_master: str = ""  # engine=spark: its cluster (yarn, spark://host:7077); empty: this
    # machine

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, negative=("rating_min", "rating_max", "positive_above"))
        check(
            self,
            k_core=(self.k_core >= 0, "0 or more"),
            thin_users=(
                self.thin_users == 0 or self.thin_users > 0 and self.split != "given",
                "0 or more, and 0 with split=given, which filters nothing",
            ),
            positive_above=(math.isfinite(self.positive_above), "a finite number"),
            engine=(
                self.engine == "memory"
                or self.engine in ENGINES
                and self.dataset != "synthetic"
                and not self.thin_users,
                f"memory, or without --thin_users and for files of your own {' or '.join(ENGINES)}",
            ),
            memory=(
                not self.memory or self.engine != "memory" and is_size(self.memory),
                "nothing, or a size such as 4GB with an engine",
            ),
            spark_master=(
                not self.spark_master or self.engine == "spark",
                "nothing, or engine=spark",
            ),
            max_broken=(0 <= self.max_broken <= 1, "a share between 0 and 1"),
            users=(
                self.dataset == "synthetic" or self.users == 2000,
                "no number: the raw files decide",
            ),
            items=(
                self.dataset == "synthetic" or self.items == 1000,
                "no number: the raw files decide",
            ),
            **{
                name: (self.dataset != "synthetic" or not getattr(self, name), MADE_UP)
                for name in OF_FILES
            },
        )

    @property
    def target(self) -> Path:
        return Path(self.data) / self.dataset


class Table(NamedTuple):
    """Rows that stay, by user, time and item; users and items are dense."""

    user: np.ndarray  # (R,) int32
    item: np.ndarray  # (R,) int32
    rating: np.ndarray  # (R,) float32, NaN where unknown
    time: np.ndarray  # (R,) float64 seconds, NO_TIME where unknown
    positive: np.ndarray  # (R,) bool
    split: np.ndarray  # (R,) int8, index into SPLITS
    has_text: np.ndarray  # (R,) bool
    source: np.ndarray  # (R,) int64, number of the record it was read from
    user_ids: list[str]
    item_ids: list[str]


def recorded(config: Config) -> dict:
    """The Config as source.json keeps it: all options that can change the output."""
    left_out: tuple[str, ...] = PLACES if config.dataset == "synthetic" else PLACES + SYNTHETIC_ONLY
    left_out += tuple(name for name in LATER if not getattr(config, name))
    return {name: value for name, value in asdict(config).items() if name not in left_out}


# What somebody wants who prepares today's log under yesterday's name.
NEWER = """
  If these are newer rows of the same shop: prepare them under another name, and bring your run to
  them, without training it anew, with: pagellm update --from RUN --data NAME"""


def already(config: Config, raw: Raw | None) -> bool:
    """Whether the target holds the same data already.

    Raises PageLLMError if it holds something else.
    """
    path = config.target / "source.json"
    if not path.exists():
        if config.target.exists() and any(config.target.iterdir()):
            raise PageLLMError(
                f"{config.target} holds files but no source.json, so no prepared data.\n"
                "  Move it away, or choose another --dataset name."
            )
        return False
    try:
        before = json.loads(path.read_text())
        then, files = before["config"], before["files"]
    except (ValueError, KeyError) as error:
        raise PageLLMError(
            f"{path} cannot be read ({error})\n  Delete {config.target} and prepare again."
        ) from error
    now = recorded(config)
    options = [
        f"{name} was {then.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    changed = []
    if raw is not None:
        old = {(entry["role"], entry["name"]): entry["sha256"] for entry in files}
        new = {(entry["role"], entry["name"]): entry["sha256"] for entry in raw.described()}
        changed = [
            f"{key[0]} file {key[1]} "
            + ("is new" if key not in old else "is gone" if key not in new else "has other bytes")
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
    if options or changed:
        more = f"; and {len(changed) - 5:,} files more" if len(changed) > 5 else ""
        raise PageLLMError(
            f"{config.target} was prepared differently: {'; '.join(options + changed[:5])}{more}.\n"
            f"  Delete {config.target} to prepare again, or choose another --dataset name."
            + ("" if options else NEWER)
        )
    return True


def fetched(config: Config) -> Config:
    """The Config, with raw files that are elsewhere, or parts of a table, brought together here."""
    source = config.raw or str(config.folder)
    if not stores.wants_fetching(source):
        return config
    kept = Path(config.data) / "raw" / config.dataset
    if not stores.is_remote(source) and Path(source).expanduser().resolve() == kept.resolve():
        kept = kept.with_name(f"{kept.name}-joined")  # the parts lie where the files would
    return replace(config, raw=str(stores.fetch(source, kept)))


def moved_away(config: Config) -> bool:
    """Whether the raw files are gone, while the data set made from them is there."""
    return (
        not config.raw and not config.folder.exists() and (config.target / "source.json").exists()
    )


def filtered(
    columns: text_store.Columns,
    config: Config,
    graded: bool,
    scale: tuple[float, float] = (1.0, 5.0),
) -> tuple[Table, dict, pa.Table]:
    """Remove duplicates, take the k-core of the positive rows, split.

    Returns the table, counts of each step, and the rows that the k-core took out: `dropped.table`.

    scale  lowest and highest rating; positive is decided on it, then ratings are brought to 1..5
    """
    c = columns
    counts: dict = {"records": len(c.user)}
    if graded:
        rows, time = filters.highest(c.user, c.item, c.time, c.rating, c.tie)
    else:
        # If a pair is in two given splits and no time decides, it goes to the later split.
        tie = (c.tie >> np.uint64(2)) | (np.maximum(c.split, 0).astype(np.uint64) << np.uint64(62))
        rows = filters.latest(c.user, c.item, c.time, c.rating, tie)
        time = c.time[rows]
    user, item, rating = c.user[rows], c.item[rows], c.rating[rows]
    positive = np.isnan(rating) | (rating > config.positive_above)
    if scale != (1, 5):
        rating = 1 + 4 * (rating - scale[0]) / (scale[1] - scale[0])
    rating = rating.astype(np.float32)
    counts |= {
        "duplicates": len(c.user) - len(rows),
        "distinct": len(rows),
        "positives": int(positive.sum()),
    }
    if config.repeat:
        if not np.isnan(rating).all():
            raise relational.rated_already()
        times = filters.repeats(c.user, c.item, c.time)
        rating = filters.strength(times).astype(np.float32)
        counts["repeated"] = {"pairs": int((times > 1).sum()), "most": int(times.max(initial=0))}

    if config.thin_users:
        keys = filters.random_keys(f"{config.seed} thin", user, item, c.user_ids, c.item_ids)
        try:
            keep = filters.thin(user, item, positive, keys, config.k_core, config.thin_users)
        except ValueError as error:
            raise PageLLMError(
                f"thin_users={config.thin_users}: {error}\n  Choose at most as many."
            ) from error
        user, item, rating, time, positive, rows = (
            x[keep] for x in (user, item, rating, time, positive, rows)
        )
        counts["thinned"] = {
            "left_out": int((~keep).sum()),
            "kept": len(rows),
            "positives": int(positive.sum()),
        }

    keep = np.ones(len(rows), dtype=bool)
    if config.split != "given" and config.k_core > 0:
        core, counts["k_core"] = filters.k_core(user[positive], item[positive], config.k_core)
        keep = np.isin(user, user[positive][core]) & np.isin(item, item[positive][core])
    if not keep.any():
        raise relational.nothing_left(config, len(rows), counts["positives"])
    out = tuple(x[~keep] for x in (user, item, rating, time, positive))
    gone = dropped.table(config.seed, out, c.user_ids, c.item_ids)
    user_numbers, user = np.unique(user[keep], return_inverse=True)
    item_numbers, item = np.unique(item[keep], return_inverse=True)
    user_ids, item_ids = (
        [c.user_ids[n] for n in user_numbers],
        [c.item_ids[n] for n in item_numbers],
    )
    rating, time, positive, rows = rating[keep], time[keep], positive[keep], rows[keep]

    tie = filters.tie_ranks(config.seed, user, item, time, user_ids, item_ids)
    order = text_store.by_time(user, time, tie)
    user, item, rating, time, positive, rows, tie = (
        x[order] for x in (user, item, rating, time, positive, rows, tie)
    )
    if config.split == "given":
        split = np.where(c.split[rows] < 0, filters.UNUSED, c.split[rows]).astype(np.int8)
    else:
        split = split_of(config, user, item, time, tie, positive, user_ids, item_ids)
    if config.refit:
        split = np.where(split == filters.VALID, filters.TRAIN, split).astype(np.int8)
    table = Table(
        user.astype(np.int32),
        item.astype(np.int32),
        rating,
        time,
        positive,
        split,
        c.tie[rows] > 0,
        rows,
        user_ids,
        item_ids,
    )
    counts |= {"users": len(user_ids), "items": len(item_ids), "interactions": len(user)}
    return table, counts | {"rows": rows_of_splits(positive, split)}, gone


def rows_of_splits(positive: np.ndarray, split: np.ndarray) -> dict[str, dict[str, int]]:
    """Split -> how many of its rows are positive, and how many are not."""
    return {
        name: {
            "positive": int((positive & (split == code)).sum()),
            "other": int((~positive & (split == code)).sum()),
        }
        for code, name in enumerate(SPLITS)
    }


def split_of(config: Config, user, item, time, tie, positive, user_ids, item_ids) -> np.ndarray:
    """(R,) int8 index into SPLITS. Raises PageLLMError for a split by time without times."""
    if config.split == "random":
        keys = filters.random_keys(config.seed, user, item, user_ids, item_ids)
        return filters.split_random(user, item, positive, keys)
    if (time == NO_TIME).all():
        raise relational.without_times(config.split)
    return filters.split_by_time(user, tie, time, positive, config.split == "leave_one_out")


def catalogue(
    items: Iterator[Item], item_ids: list[str], max_text: int, join: Join | None = None
) -> dict[str, list]:
    """Columns of items.parquet for these identifiers; "" and NaN where the item table says nothing.

    max_text  most characters of a description
    join      is filled with how the table met the items, if given

    If several lines are about one item, the first line with a value for a field counts.
    """
    number = {name: n for n, name in enumerate(item_ids)}
    found: dict[int, Item] = {}
    for item in items:
        at = number.get(item.id)
        if join is not None:
            join.lines += 1
            if at is None:
                join.stranger = join.stranger or item.id
        if at is None:
            continue
        before = found.get(at, item)
        if join is not None and at in found:
            join.repeated += 1
        found[at] = Item._make(
            new if is_unknown(old) else old for old, new in zip(before, item, strict=True)
        )
    rows = [found.get(n, Item(name)) for n, name in enumerate(item_ids)]
    if join is not None:
        join.fill(rows, {item_ids[n] for n in found})
    root = common_root(row.paths for row in rows)
    below = [[path[path[:1] == (root,) :] for path in row.paths] for row in rows]
    return {
        "title": [row.title for row in rows],
        "brand": [row.brand for row in rows],
        "categories": [
            list(dict.fromkeys(name for path in paths for name in path)) for paths in below
        ],
        "leaf": [next((path[-1] for path in paths if path), "") for paths in below],
        "price": [row.price for row in rows],
        "description": [row.description[:max_text].rstrip() for row in rows],
    }


def common_root(all_paths) -> str | None:
    """The root category shared by all items with a path, if some path is longer than it."""
    shared, deep = None, False
    for paths in all_paths:
        if paths:
            firsts = {path[0] for path in paths}
            shared = firsts if shared is None else shared & firsts
            deep = deep or any(len(path) > 1 for path in paths)
    return min(shared) if shared and deep else None


def share(absent) -> float:
    return round(float(np.mean(absent)), 6)


def missing_of_rows(table: Table) -> dict[str, float]:
    """Share of rows without rating, time or text."""
    return {
        "rating": share(np.isnan(table.rating)),
        "time": share(table.time == NO_TIME),
        "text": share(~table.has_text),
    }


def missing_of_items(items: dict[str, list]) -> dict[str, float]:
    """Share of items without each field."""
    return {
        name: share([is_unknown(value) for value in items[name]])
        for name in ("title", "brand", "categories", "price", "description")
    }


def write_tables(folder: Path, table: Table, items: dict[str, list]) -> None:
    split = pa.DictionaryArray.from_arrays(pa.array(table.split, pa.int32()), pa.array(SPLITS))
    columns = {
        "user": pa.array(table.user),
        "item": pa.array(table.item),
        "rating": pa.array(table.rating, mask=np.isnan(table.rating)),
        "time": text_store.time_array(table.time),
        "positive": pa.array(table.positive),
        "split": split,
    }
    pq.write_table(pa.table(columns), folder / "interactions.parquet", compression="zstd")
    write_items(folder, table.item_ids, items)
    columns = {
        "user": pa.array(np.arange(len(table.user_ids), dtype=np.int32)),
        "id": pa.array(table.user_ids, pa.string()),
    }
    pq.write_table(pa.table(columns), folder / "users.parquet", compression="zstd")


def write_items(folder: Path, item_ids: list[str], items: dict[str, list]) -> None:
    """Write items.parquet. items: columns of `catalogue`."""
    price = np.array(items["price"], dtype=np.float32)
    columns = {
        "item": pa.array(np.arange(len(item_ids), dtype=np.int32)),
        "id": pa.array(item_ids, pa.string()),
        "title": pa.array(items["title"], pa.string()),
        "brand": pa.array(items["brand"], pa.string()),
        "categories": pa.array(items["categories"], pa.list_(pa.string())),
        "leaf": pa.array(items["leaf"], pa.string()),
        "price": pa.array(price, mask=np.isnan(price)),
        "description": pa.array(items["description"], pa.string()),
    }
    pq.write_table(pa.table(columns), folder / "items.parquet", compression="zstd")


def write_truth(folder: Path, shop: synthetic.SyntheticShop, table: Table) -> None:
    """The shop's truth, rows and columns in dense order."""
    users = {name: n for n, name in enumerate(shop.user_ids)}
    items = {item.id: n for n, item in enumerate(shop.items)}
    rows, columns = (
        [users[name] for name in table.user_ids],
        [items[name] for name in table.item_ids],
    )
    np.save(folder / "truth.npy", shop.truth[np.ix_(rows, columns)], allow_pickle=False)


def is_running(pid: str) -> bool:
    """Whether a process of this number is alive; what a dead one left behind is nobody's."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def building(target: Path):
    """Yield a temporary directory that becomes target if all goes well, and is removed if not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        if not is_running(left.name.split(".")[-2]):
            shutil.rmtree(left, ignore_errors=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        for path in beside.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        try:
            if target.exists():
                # empty, or `already` would have spoken; a full one is never replaced
                target.rmdir()
            os.replace(beside, target)
        except OSError as error:
            raise PageLLMError(
                f"{target} appeared while it was being prepared ({error.strerror}); "
                "it was left as it is"
            ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def run(config: Config) -> Path:
    """Prepare a data set; returns its directory. Does nothing if the same one is there.

    Raises PageLLMError if the directory holds another one, if raw files are missing, ambiguous or
    broken, and with strict at a warning.
    """
    made_up = config.dataset == "synthetic"
    if not made_up:
        config = fetched(config)
    raw = None if made_up or moved_away(config) else find(config)
    if already(config, raw):
        print(f"{config.target} is already prepared", flush=True)
        return config.target
    source = raw or synthetic.make(config.users, config.items, config.seed)
    tally, item_tally, join = Tally(), Tally(), Join()
    with building(config.target) as folder, ExitStack() as held:
        engine = None
        if config.engine != "memory":
            place, threads = folder / "engine", config.processes
            engine = opened(config.engine, place, config.memory, threads, config.spark_master)
            held.callback(engine.close)
        texts = (config.min_text, config.max_text)
        stems = (
            parallel.store(source, tally, config.processes, folder, *texts, engine is not None)
            if isinstance(source, Raw)
            else [
                text_store.store(batched(counted(source.reviews(), tally)), folder / "part", *texts)
            ]
        )
        rules = (config, bool(raw and raw.graded), raw.scale if raw else (1.0, 5.0), folder)
        if engine:
            printed = tally.check("review", config.max_broken)
            made, table, gone = relational.made(engine, stems, *rules), None, None
        else:
            columns = text_store.gather(stems)
            printed = tally.check("review", config.max_broken)
            made, table, gone = in_memory(columns, stems, *rules)
        items = catalogue(
            source.items(item_tally)
            if isinstance(source, Raw)
            else counted(source.items, item_tally),
            made.item_ids,
            config.max_text,
            join,
        )
        printed += item_tally.check("item", config.max_broken)
        account = (
            account_of(raw, config, tally, item_tally, made.seen, made.counts, join)
            if raw
            else Account()
        )
        held.close()
        shutil.rmtree(folder / "engine", ignore_errors=True)
        if config.strict and account.warnings:
            raise PageLLMError(
                f"{account.text()}\n  --strict: nothing was written, for the warnings above."
            )
        if table is None:
            write_items(folder, made.item_ids, items)
        else:
            write_tables(folder, table, items)
            if not isinstance(source, Raw):
                write_truth(folder, source, table)
        record = {
            "dataset": config.dataset,
            "release": raw.release if raw else "synthetic",
            "files": raw.described() if raw else [],
            "unused_files": raw.unused if raw else [],
            "config": recorded(config),
            "read": account.facts | {"lines": [line.strip() for line in account.lines]},
            "missing": made.missing | missing_of_items(items),
            "written": {
                path.name: file_id(path)
                for path in sorted(folder.iterdir())
                if path.name != dropped.NAME
            },
            "counts": {"lines": tally.counts(), "item_lines": item_tally.counts(), **made.counts},
        }
        (folder / "source.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        if gone is not None:
            dropped.write(gone, folder)
    said = (account.text(printed), summary(config, made.counts), left_out(config, made))
    print("\n".join(filter(None, said)), flush=True)
    return config.target


def in_memory(
    columns: text_store.Columns,
    stems: list[Path],
    config: Config,
    graded: bool,
    scale: tuple[float, float],
    folder: Path,
) -> tuple[relational.Made, Table, pa.Table]:
    """`filtered`, with the reviews written; -> also what relational.made says of it."""
    table, counts, gone = filtered(columns, config, graded, scale)
    position = np.full(len(columns.user), -1, dtype=np.int64)
    train = np.flatnonzero(table.split == filters.TRAIN)
    position[table.source[train]] = np.arange(len(train))
    counts["reviews"] = text_store.write_reviews(
        stems, position, table.user[train], table.item[train], folder / "reviews.parquet"
    )
    users, items = (
        sorted(set(pc.unique(gone[name]).to_pylist()) - set(kept))
        for name, kept in (("user_id", table.user_ids), ("item_id", table.item_ids))
    )
    made = relational.Made(
        counts,
        table.item_ids,
        Seen.of(columns),
        missing_of_rows(table),
        len(gone),
        len(users),
        items,
    )
    return made, table, gone


def counted(records, tally: Tally) -> Iterator:
    for record in records:
        tally.read += 1
        yield record


def summary(config: Config, counts: dict) -> str:
    rows = {name: parts["positive"] for name, parts in counts["rows"].items()}
    thinned = (
        f"; thinned at random to {counts['thinned']['kept']:,} of {counts['distinct']:,} rows for "
        f"{hints.counted(config.thin_users, 'user')}"
        if config.thin_users
        else ""
    )
    if config.repeat:
        thinned += (
            f"; {hints.counted(counts['repeated']['pairs'], 'pair')} met more than once, at most "
            f"{counts['repeated']['most']:,} times, which is their rating"
        )
    return (
        f"{config.target}: {hints.counted(counts['users'], 'user')}, "
        f"{hints.counted(counts['items'], 'item')}, "
        f"{hints.counted(counts['interactions'], 'row')}; positives {rows['train']:,} train, "
        f"{rows['valid']:,} valid, "
        f"{rows['test']:,} test "
        f"({hints.counted(counts['duplicates'], 'duplicate')} out of {counts['records']:,} "
        f"records{thinned})"
    )


def left_out(config: Config, made: relational.Made) -> str:
    """One line about what the k-core took out; "" if nothing."""
    if not made.gone_rows:
        return ""
    items = made.gone_items
    names = f" ({several(items)})" if items else ""
    served = "; recommend writes these users' pages from them" if made.gone_users else ""
    return (
        f"{config.target / dropped.NAME}: {hints.counted(made.gone_rows, 'row')} of "
        f"{hints.counted(made.gone_users, 'user')} and "
        f"{hints.counted(len(items), 'item')}{names} below the k-core{served}"
    )


if __name__ == "__main__":
    raise SystemExit(main(Config, run, "pagellm prepare"))
