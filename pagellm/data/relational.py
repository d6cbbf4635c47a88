"""The relational part of `prepare` as SQL, for logs larger than memory.

Remove duplicates, take the k-core to its fixed point, number users and items, split, order: what
`prepare.filtered` does on columns in memory, as statements that a query engine runs on tables on
its disk. The data set is the same, byte by byte: every number and every order follows from a rule
(the order of identifiers, times, and draws of SHA-256), and none from the order in which an engine
happens to return rows.

    u, i      numbers of user and item: the rank of the identifier among all of the log; after the
              k-core among those that stay
    seconds   time, NO_TIME where unknown; rating is null where unknown
    tie       draw that orders rows of one user at one time; null where there are no such rows
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pagellm.data import dropped, filters, text_store
from pagellm.data.account import DAY, Seen
from pagellm.data.engines import Engine, quoted
from pagellm.data.shop import SPLITS
from pagellm.data.values import NO_TIME
from pagellm.stage.config import PageLLMError

__all__ = ["Made", "Rules", "made", "nothing_left", "without_times"]

GROUP = 1 << 20  # rows of a row group, as pyarrow writes a table at once


class Rules(Protocol):
    """Options of `prepare` that the statements depend on."""

    @property
    def k_core(self) -> int: ...

    @property
    def positive_above(self) -> float: ...

    @property
    def split(self) -> str: ...

    @property
    def seed(self) -> int: ...

    @property
    def refit(self) -> bool: ...

    @property
    def repeat(self) -> bool: ...


@dataclass(frozen=True)
class Made:
    """What a log became, in numbers. The rows themselves are in files."""

    counts: dict  # of each step, as source.json has them
    item_ids: list[str]
    seen: Seen
    missing: dict[str, float]  # share of rows without rating, time, text
    gone_rows: int  # that the k-core took out
    gone_users: int  # who have no other rows
    gone_items: list[str]  # that have no other rows, in order


def made(
    engine: Engine,
    stems: list[Path],
    rules: Rules,
    graded: bool,
    scale: tuple[float, float],
    folder: Path,
) -> Made:
    """Write interactions, users, reviews and dropped.parquet of a spooled log into a folder.

    stems   of `text_store.spool`, whose files are used up
    graded  whether rows are events, of which the best one counts
    scale   lowest and highest rating
    Raises PageLLMError where no row is left, or a split by time has no times.
    """
    files = [stem.with_name(f"{stem.name}.rows") for stem in stems]
    lengths = [pq.read_metadata(file).num_rows for file in files]
    engine.read("records", files)
    number(engine)
    seen = look(engine)
    for file in files:
        file.unlink()
    counts: dict = {"records": seen.rows}
    if rules.repeat:
        if seen.rated:
            raise rated_already()
        count_repeats(engine)
    distinct(engine, rules, graded, scale)
    n, positives = engine.one(
        "SELECT count(*), coalesce(sum(CASE WHEN positive THEN 1 ELSE 0 END), 0) FROM pairs"
    )
    counts |= {"duplicates": seen.rows - n, "distinct": n, "positives": int(positives)}
    if rules.repeat:
        counts["repeated"] = rate_repeats(engine)
    if rules.split != "given" and rules.k_core > 0:
        counts["k_core"] = k_core(engine, rules.k_core)
    keep(engine, "k_core" in counts)
    if not engine.one("SELECT count(*) FROM kept")[0]:
        raise nothing_left(rules, n, counts["positives"])
    gone = write_gone(engine, rules, folder)
    divide(engine, rules)
    counts |= totals(engine)
    counts["reviews"] = write_rows(engine, stems, lengths, seen.texts > 0, folder)
    write_users(engine, folder)
    rated, timed, texts = engine.one(
        "SELECT count(rating), sum(CASE WHEN seconds <> -1 THEN 1 ELSE 0 END), "
        "sum(CASE WHEN has_text THEN 1 ELSE 0 END) FROM divided"
    )
    total = counts["interactions"]
    return Made(
        counts,
        names(engine, "SELECT id FROM kept_items ORDER BY number"),
        seen,
        {
            name: round((total - int(known)) / total, 6)
            for name, known in (("rating", rated), ("time", timed), ("text", texts))
        },
        *gone,
    )


def number(engine: Engine) -> None:
    """Tables `users` and `items` (id, number, n rows), and `numbered`, the log by numbers."""
    for what in ("user", "item"):
        engine.keep(
            f"{what}s",
            "SELECT id, n, CAST(row_number() OVER (ORDER BY id) - 1 AS INT) AS number FROM "
            f"(SELECT {what}_id AS id, count(*) AS n FROM records GROUP BY {what}_id) AS named",
        )
    engine.keep(
        "numbered",
        "SELECT a.number AS u, b.number AS i, r.rating, r.seconds, r.tie, r.has_text, r.split, "
        "r.source FROM records AS r JOIN users AS a ON a.id = r.user_id "
        "JOIN items AS b ON b.id = r.item_id",
    )


def look(engine: Engine) -> Seen:
    """What the account tells of the log."""
    timed = f"seconds <> {NO_TIME}"
    rows, rated, known, texts, first, last, clocks = engine.one(
        f"SELECT count(*), count(rating), sum(CASE WHEN {timed} THEN 1 ELSE 0 END), "
        "sum(CASE WHEN has_text THEN 1 ELSE 0 END), "
        f"min(CASE WHEN {timed} THEN seconds END), max(CASE WHEN {timed} THEN seconds END), "
        f"sum(CASE WHEN {timed} AND seconds <> {DAY} * floor(seconds / {DAY}) THEN 1 ELSE 0 END) "
        "FROM numbered"
    )

    def rows_of(table: str):
        def counted(some: list[str]) -> int:
            words = ", ".join(map(quoted, some))
            return int(engine.one(f"SELECT sum(n) FROM {table} WHERE id IN ({words})")[0])

        return counted

    return Seen(
        rows=rows,
        rated=rated,
        timed=int(known or 0),
        texts=int(texts or 0),
        first=first or 0.0,
        last=last or 0.0,
        whole_days=not clocks,
        user_ids=Names(engine, "SELECT id FROM users ORDER BY number"),
        item_ids=Names(engine, "SELECT id FROM items ORDER BY number"),
        rows_of_users=rows_of("users"),
        rows_of_items=rows_of("items"),
    )


class Names:
    """The identifiers of a query, to be gone through as often as needed."""

    def __init__(self, engine: Engine, query: str):
        self._engine, self._query = engine, query

    def __iter__(self) -> Iterator[str]:
        for batch in self._engine.batches(self._query):
            yield from batch.column(0).to_pylist()


def distinct(engine: Engine, rules: Rules, graded: bool, scale: tuple[float, float]) -> None:
    """Table `pairs`: one row of each user and item, by the rules of filters.latest and .highest."""
    rated = "rating DESC NULLS LAST"
    order = f"seconds DESC, {rated}, greatest(split, 0) DESC, tie >> 2 DESC, source DESC"
    seconds = "seconds"
    if graded:
        order = f"{rated}, seconds DESC, tie DESC, source DESC"
        seconds = "max(seconds) OVER (PARTITION BY u, i) AS seconds"
    low, high = scale
    on_five = "rating"
    if scale != (1, 5):
        on_five = f"1 + 4 * (rating - {double(low)}) / {double(high - low)}"
    engine.keep(
        "pairs",
        f"SELECT u, i, CAST({on_five} AS FLOAT) AS rating, "
        f"(rating IS NULL OR rating > {double(rules.positive_above)}) AS positive, "
        "seconds, has_text, split, source FROM ("
        f"SELECT u, i, rating, {seconds}, has_text, split, source, "
        f"row_number() OVER (PARTITION BY u, i ORDER BY {order}) AS place FROM numbered"
        ") AS placed WHERE place = 1",
    )
    engine.drop("numbered")


def count_repeats(engine: Engine) -> None:
    """Table `repeats` (u, i, times) of `numbered`, as filters.repeats counts them."""
    timed = f"seconds <> {NO_TIME}"
    engine.keep(
        "repeats",
        f"SELECT u, i, count(DISTINCT CASE WHEN {timed} THEN seconds END) + "
        f"sum(CASE WHEN {timed} THEN 0 ELSE 1 END) AS times FROM numbered GROUP BY u, i",
    )


def rate_repeats(engine: Engine) -> dict[str, int]:
    """Rate `pairs` by filters.strength; -> how many were met more than once, and the most times."""
    pairs, most = engine.one(
        "SELECT coalesce(sum(CASE WHEN times > 1 THEN 1 ELSE 0 END), 0), coalesce(max(times), 0) "
        "FROM repeats"
    )
    rating = f"CAST({double(5)} - {double(1)} / CAST(r.times AS DOUBLE) AS FLOAT)"
    engine.keep(
        "pairs",
        f"SELECT p.u, p.i, {rating} AS rating, positive, seconds, has_text, split, source "
        "FROM pairs AS p JOIN repeats AS r ON r.u = p.u AND r.i = p.i",
    )
    engine.drop("repeats")
    return {"pairs": int(pairs), "most": int(most)}


def double(number: float) -> str:
    """A number with all its digits, which no engine reads as a decimal of fewer."""
    return f"CAST('{float(number)!r}' AS DOUBLE)"


def k_core(engine: Engine, k: int) -> list[dict]:
    """Table `core` (u, i), the k-core of the positive pairs; what each round left, as
    filters.k_core says it."""
    engine.keep("core", "SELECT u, i FROM pairs WHERE positive")
    rounds: list[dict] = []
    while True:
        found = []
        for what in "ui":
            engine.keep(f"per_{what}", f"SELECT {what}, count(*) AS n FROM core GROUP BY {what}")
            found.append(engine.one(f"SELECT count(*), min(n), sum(n) FROM per_{what}"))
        (users, least_user, rows), (items, least_item, _) = found
        rounds.append({"users": users, "items": items, "rows": int(rows or 0)})
        if len(rounds) > 1 and rounds[-1] == rounds[-2]:
            break
        if not rows or min(least_user, least_item) >= k:
            rounds.append(rounds[-1])
            break
        engine.keep(
            "core",
            f"SELECT u, i FROM core WHERE u IN (SELECT u FROM per_u WHERE n >= {k}) "
            f"AND i IN (SELECT i FROM per_i WHERE n >= {k})",
        )
    return rounds


def keep(engine: Engine, some: bool) -> None:
    """Tables `kept` and `gone` of `pairs`; kept_users, kept_items (old number, number, id).

    some  whether there is a `core` that not all pairs belong to
    """
    table = "core" if some else "pairs"
    for what, names in (("u", "users"), ("i", "items")):
        engine.keep(
            f"kept_{names}",
            "SELECT c.old, CAST(row_number() OVER (ORDER BY c.old) - 1 AS INT) AS number, a.id "
            f"FROM (SELECT DISTINCT {what} AS old FROM {table}) AS c JOIN {names} AS a "
            "ON a.number = c.old",
        )
    engine.keep(
        "kept",
        "SELECT a.number AS u, b.number AS i, rating, seconds, positive, has_text, split, source "
        "FROM pairs AS p JOIN kept_users AS a ON a.old = p.u JOIN kept_items AS b ON b.old = p.i",
    )
    engine.keep(
        "gone",
        "SELECT u, i, rating, seconds, positive, source FROM pairs "
        "WHERE u NOT IN (SELECT old FROM kept_users) OR i NOT IN (SELECT old FROM kept_items)",
    )
    engine.drop("pairs", "core", "per_u", "per_i")


def tied(engine: Engine, table: str, seed: int, users: str, items: str) -> None:
    """Add `tie` to a table: the draw of filters.tie_ranks where a user has a time twice.

    users, items  tables of number and id
    """
    engine.keep("timed", f"SELECT *, count(*) OVER (PARTITION BY u, seconds) AS alike FROM {table}")
    draw = engine.draw(f"{seed} order", "a.id", "b.id")
    engine.keep(
        table,
        f"SELECT t.*, {draw} AS tie FROM timed AS t JOIN {users} AS a ON a.number = t.u "
        f"JOIN {items} AS b ON b.number = t.i WHERE t.alike > 1 "
        f"UNION ALL SELECT t.*, {nothing(draw)} AS tie FROM timed AS t WHERE t.alike = 1",
    )
    engine.drop("timed")


def nothing(draw: str) -> str:
    """Null of the kind that a draw is."""
    return "CAST(NULL AS UBIGINT)" if "UBIGINT" in draw else "CAST(NULL AS STRING)"


def divide(engine: Engine, rules: Rules) -> None:
    """Table `divided`: `kept` with `part`, an index into SPLITS."""
    tied(engine, "kept", rules.seed, "kept_users", "kept_items")
    columns = "u, i, rating, seconds, positive, has_text, source, tie"
    train, valid, test, unused = (
        filters.TRAIN,
        filters.VALID,
        filters.TEST,
        filters.UNUSED,
    )
    held = "CASE WHEN size >= 3 THEN greatest(1, floor(size / 10)) ELSE 0 END"
    group = "PARTITION BY u, positive"
    if rules.split == "given":
        part = f"CASE WHEN split < 0 THEN {unused} ELSE split END"
        query = f"SELECT {columns}, {part} AS part FROM kept"
    elif rules.split == "random":
        key = engine.draw(str(rules.seed), "a.id", "b.id")
        ranked = (
            f"SELECT {columns}, row_number() OVER ({group} ORDER BY key, i) - 1 AS place, "
            f"count(*) OVER ({group}) AS size FROM (SELECT k.*, {key} AS key FROM kept AS k "
            "JOIN kept_users AS a ON a.number = k.u JOIN kept_items AS b ON b.number = k.i) AS d"
        )
        some = f"CASE WHEN positive THEN {held} ELSE floor(size / 10) END"
        part = (
            f"CASE WHEN place < {some} THEN {test} WHEN place < 2 * ({some}) THEN {valid} "
            f"ELSE {train} END"
        )
        query = f"SELECT {columns}, {part} AS part FROM ({ranked}) AS ranked"
    else:
        if not engine.one(f"SELECT count(*) FROM kept WHERE seconds <> {NO_TIME}")[0]:
            raise without_times(rules.split)
        if rules.split == "leave_one_out":
            held = "CASE WHEN size >= 3 THEN 1 ELSE 0 END"
        engine.keep("ranked", by_time(columns, group, held))
        engine.keep(
            "firsts",
            f"SELECT u, min(CASE WHEN part = {valid} THEN seconds END) AS first_valid, "
            f"min(CASE WHEN part = {test} THEN seconds END) AS first_test "
            "FROM ranked WHERE positive GROUP BY u",
        )

        def reached(name: str) -> str:
            return f"({name} IS NOT NULL AND seconds >= greatest({name}, 0))"

        part = (
            f"CASE WHEN positive THEN part WHEN {reached('first_test')} THEN {test} "
            f"WHEN {reached('first_valid')} THEN {valid} ELSE {train} END"
        )
        query = (
            f"SELECT {', '.join('r.' + name for name in columns.split(', '))}, {part} AS part "
            "FROM ranked AS r LEFT JOIN firsts AS f ON f.u = r.u"
        )
    last = f"CASE WHEN part = {valid} THEN {train} ELSE part END" if rules.refit else "part"
    engine.keep("divided", f"SELECT {columns}, CAST({last} AS TINYINT) AS part FROM ({query}) AS d")
    engine.drop("kept", "ranked", "firsts")


def by_time(columns: str, group: str, held: str) -> str:
    """`kept` with the part of each positive row, and train for the others."""
    return (
        f"SELECT {columns}, CASE WHEN NOT positive THEN {filters.TRAIN} "
        f"WHEN place >= size - {held} THEN {filters.TEST} "
        f"WHEN place >= size - 2 * ({held}) THEN {filters.VALID} ELSE {filters.TRAIN} END AS part "
        f"FROM (SELECT {columns}, "
        f"row_number() OVER ({group} ORDER BY seconds, tie, i) - 1 AS place, "
        f"count(*) OVER ({group}) AS size FROM kept) AS placed"
    )


def totals(engine: Engine) -> dict:
    """users, items, interactions, and rows of each split."""
    rows = {name: {"positive": 0, "other": 0} for name in SPLITS}
    for batch in engine.batches(
        "SELECT CAST(part AS INT) AS part, positive, count(*) AS n FROM divided "
        "GROUP BY part, positive"
    ):
        for row in batch.to_pylist():
            rows[SPLITS[row["part"]]]["positive" if row["positive"] else "other"] = row["n"]
    return {
        "users": engine.one("SELECT count(*) FROM kept_users")[0],
        "items": engine.one("SELECT count(*) FROM kept_items")[0],
        "interactions": sum(n for part in rows.values() for n in part.values()),
        "rows": rows,
    }


def write_rows(
    engine: Engine, stems: list[Path], lengths: list[int], texts: bool, folder: Path
) -> int:
    """Write interactions.parquet and reviews.parquet; -> rows of the second."""
    starts = np.cumsum([0, *lengths])
    position = np.full(starts[-1], -1, dtype=np.int64) if texts else None
    trained, at = [], 0
    schema = pa.schema(
        [
            ("user", pa.int32()),
            ("item", pa.int32()),
            ("rating", pa.float32()),
            ("time", kind_of_time(engine, "divided")),
            ("positive", pa.bool_()),
            ("split", pa.dictionary(pa.int32(), pa.string())),
        ]
    )
    query = (
        "SELECT u, i, rating, seconds, positive, CAST(part AS INT) AS part, source FROM divided "
        "ORDER BY u, seconds, tie, i"
    )
    path = folder / "interactions.parquet"
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for rows in groups(engine.batches(query)):
            user, item, rating, seconds, positive, part, source = rows.columns
            split = pa.DictionaryArray.from_arrays(part, pa.array(SPLITS))
            time = times(seconds, schema.field("time").type)
            columns = [user, item, rating, time, positive, split]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=GROUP)
            train = part.to_numpy() == filters.TRAIN
            if position is not None:
                of = source.to_numpy()[train]
                row = starts[of >> text_store.PART_BITS] + (of & (1 << text_store.PART_BITS) - 1)
                position[row] = np.arange(at, at + len(of))
                trained.append([x.to_numpy()[train] for x in (user, item)])
            at += int(train.sum())
    users, items = (
        (np.concatenate(column) for column in zip(*trained, strict=True))
        if trained
        else [np.zeros(at, np.int32)] * 2
    )
    return text_store.write_reviews(stems, position, users, items, folder / "reviews.parquet")


def kind_of_time(engine: Engine, table: str) -> pa.DataType:
    """int64 where all times are whole, else float64, as text_store.time_array has it."""
    broken = engine.one(f"SELECT count(*) FROM {table} WHERE seconds <> floor(seconds)")[0]
    return pa.float64() if broken else pa.int64()


def times(seconds: pa.Array, kind: pa.DataType) -> pa.Array:
    known = seconds.to_numpy()
    whole = known.astype(np.int64) if pa.types.is_integer(kind) else known
    return pa.array(whole, kind, mask=known == NO_TIME)


def groups(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of GROUP, the last one shorter: as many as a row group has."""
    waiting: list[pa.RecordBatch] = []
    held = 0
    for batch in batches:
        waiting.append(batch)
        held += len(batch)
        while held >= GROUP:
            whole = together(waiting)
            yield whole.slice(0, GROUP)
            waiting, held = [whole.slice(GROUP)], held - GROUP
    if held:
        yield together(waiting)


def together(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    table = pa.Table.from_batches(batches).combine_chunks()
    return table.to_batches()[0] if len(table) else batches[0]


def write_users(engine: Engine, folder: Path) -> None:
    """Write users.parquet."""
    schema = pa.schema([("user", pa.int32()), ("id", pa.string())])
    query = "SELECT number, id FROM kept_users ORDER BY number"
    with pq.ParquetWriter(folder / "users.parquet", schema, compression="zstd") as writer:
        for rows in groups(engine.batches(query)):
            columns = [rows.column(0), rows.column(1).cast(pa.string())]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=GROUP)


def write_gone(engine: Engine, rules: Rules, folder: Path) -> tuple[int, int, list[str]]:
    """Write dropped.parquet, if there is a row for it; -> rows, users, items of Made."""
    rows = engine.one("SELECT count(*) FROM gone")[0]
    if not rows:
        return 0, 0, []
    users = "SELECT count(DISTINCT u) FROM gone WHERE u NOT IN (SELECT old FROM kept_users)"
    items = (
        "SELECT DISTINCT id FROM gone JOIN items ON number = i "
        "WHERE i NOT IN (SELECT old FROM kept_items) ORDER BY id"
    )
    found = (rows, engine.one(users)[0], names(engine, items))
    tied(engine, "gone", rules.seed, "users", "items")
    schema = dropped.schema(kind_of_time(engine, "gone"))
    query = (
        "SELECT a.id AS user_id, b.id AS item_id, rating, seconds, positive FROM gone AS g "
        "JOIN users AS a ON a.number = g.u JOIN items AS b ON b.number = g.i "
        "ORDER BY u, seconds, tie, i"
    )
    with dropped.writer(folder, schema) as writer:
        for batch in groups(engine.batches(query)):
            user, item, rating, seconds, positive = batch.columns
            columns = [
                user.cast(pa.string()),
                item.cast(pa.string()),
                rating,
                times(seconds, schema.field("time").type),
                positive,
            ]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=GROUP)
    engine.drop("gone")
    return found


def names(engine: Engine, query: str) -> list[str]:
    """All identifiers of a query, in its order."""
    return [name for batch in engine.batches(query) for name in batch.column(0).to_pylist()]


def nothing_left(rules: Rules, rows: int, positives: int) -> PageLLMError:
    """The error of a k-core that is empty."""
    return PageLLMError(
        f"none is left of {rows:,} rows, {positives:,} of them positive:\n"
        f"  no users and items have {rules.k_core} positives each among themselves.\n"
        "  Lower --k_core or --positive_above."
    )


def without_times(split: str) -> PageLLMError:
    """The error of a split by time of rows that have none."""
    return PageLLMError(
        f"split={split} needs times, and no row has one\n"
        "  Name their column with --time_column, or use --split random."
    )


def rated_already() -> PageLLMError:
    """The error of --repeat for a log whose rows have ratings."""
    return PageLLMError(
        "--repeat rates an item by how often a person met it, and this log has ratings or events "
        "that say already how much it is liked\n"
        "  Leave --repeat out."
    )
