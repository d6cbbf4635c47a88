"""Any shop's own log, and item tables: CSV, Parquet or JSON lines.

A log has a user and an item column, and perhaps a rating or an event, a time, a text, a split.
Columns are named by an option or recognised by the common spellings below. What holds for a whole
column, such as the unit of its times, is decided from a sample of its values: see `settled`.
"""

import contextlib
import csv
import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pagellm.data.amazon import as_object, json_object
from pagellm.data.evidence import category_form, paths_in, steady
from pagellm.data.files import Options, RawFile, Reading
from pagellm.data.records import (
    COLUMNS,
    LINE_LIMIT,
    WHOLE,
    Item,
    Review,
    Span,
    Tally,
    batched,
    parsed,
    progress,
    text_lines,
)
from pagellm.data.values import (
    EARLIEST,
    EXACT,
    ID_LIMIT,
    LATEST_TIME,
    MISSING,
    NO_TIME,
    TIME_UNITS,
    Broken,
    PassedOver,
    clean,
    decimal_comma,
    identifier,
    is_missing,
    is_number,
    label,
    opinion,
    price,
    rating_in,
    time_form,
    time_in,
)
from pagellm.data.where import Where
from pagellm.stage.config import PageLLMError

__all__ = [
    "ITEM_COLUMNS",
    "LOG_COLUMNS",
    "delimiter_of",
    "items",
    "match",
    "read_items",
    "read_log",
    "recognise",
    "release",
    "reviews",
    "rivals",
    "sample",
    "settled",
    "spelling",
    "with_later_keys",
]


# Role -> names of its column; the first that is there is taken. Names are compared without case,
# spaces, punctuation and text in brackets. An id comes before the plain word: that often holds a
# name.
LOG_COLUMNS = {
    "user": (
        *("userid", "reviewerid", "uid", "customerid", "visitorid", "memberid", "accountid"),
        *("buyerid", "clientid", "householdid", "user", "customer", "household", "username"),
    ),
    "item": (
        *("itemid", "parentasin", "asin", "productid", "iid", "sku", "stockcode", "movieid"),
        *("articleid", "goodsid", "listingid", "item", "product"),
    ),
    "rating": ("rating", "overall", "stars", "starrating", "score", "userrating"),
    "event": ("event", "eventtype", "action", "behavior", "behaviour", "interactiontype"),
    "time": (
        *("timestamp", "time", "unixreviewtime", "eventtime", "datetime", "date", "createdat"),
        *("ts", "transactiontimestamp", "invoicedate", "orderdate", "purchasedate"),
    ),
    "summary": ("summary", "headline", "reviewtitle", "reviewheadline"),
    "text": ("text", "review", "reviewtext", "reviewbody", "comment", "body"),
    "split": ("split", "fold", "subset", "partition"),
}
ITEM_COLUMNS = {
    "id": (*LOG_COLUMNS["item"], "id"),
    "title": ("title", "name", "itemname", "productname", "producttitle", "itemtitle"),
    "brand": ("brand", "manufacturer", "store", "vendor", "brandname", "wineryname"),
    "category": (
        *("categories", "category", "categorypath", "genres", "genre", "productcategory"),
        *("department", "type"),
    ),
    "price": ("price", "unitprice"),
    "description": ("description", "desc", "about"),
}
SPLIT_NAMES = {
    **{"train": "train", "training": "train"},
    **{"valid": "valid", "val": "valid", "validation": "valid", "dev": "valid"},
    **{"test": "test", "testing": "test", "unused": "unused", "": ""},
}
RECORD_LINES = 200  # most lines that one quoted CSV record may span
BATCH = 16_384  # rows of a Parquet file held at once
SAMPLE = 20_000  # rows of the sample that decides how a column is to be read
csv.field_size_limit(LINE_LIMIT)


def recognise(path: Path, first_lines: list[str], options: Options) -> RawFile | None:
    """A table by its first lines: a log if it has a user and an item, an item table if it has an
    item and more about it, "other" for any other table; None if it is no table."""
    try:
        if path.open("rb").read(4) == b"PAR1":
            return as_table(path, "parquet", pq.read_schema(path).names, options)
    except (pa.ArrowException, OSError) as error:
        raise PageLLMError(f"{path} cannot be read as Parquet: {error}") from error
    objects = [as_object(text) for text in first_lines if text.startswith("{")]
    if objects := [record for record in objects if record is not None]:
        names = list(dict.fromkeys(name for record in objects for name in record))
        return as_table(path, "jsonl", names, options)
    if first_lines and re.fullmatch(r"sep=.\s*", first_lines[0]):
        first_lines = first_lines[1:]
    if not first_lines or first_lines[0].startswith(("{", "[")):
        return None
    mark = delimiter_of(first_lines[0])
    fields = csv_fields(first_lines[:1], mark) if mark in first_lines[0] else None
    if not fields:
        return None
    for option in ("columns", "item_columns"):
        names = [name.strip() for name in getattr(options, option).split(",")]
        if names != [""] and len(names) == len(fields) and names != fields:
            if "\n".join(fields).lower() != "\n".join(names).lower():
                return as_table(path, "csv", names, options, heading=False)
    found = as_table(path, "csv", fields, options)
    if not found.role and any(map(is_number, fields)):
        return found._replace(kind="table without a heading", heading=False)
    return found


def with_later_keys(file: RawFile, options: Options) -> RawFile:
    """A file of JSON lines with all the keys of its first SAMPLE lines: some may begin late."""
    names = dict.fromkeys(file.names)
    with contextlib.suppress(PageLLMError):  # a damaged file is told of where it is read
        for _, row in islice(records(file, [], Tally()), SAMPLE):
            names |= dict.fromkeys(row)
    return (
        file
        if len(names) == len(file.names)
        else as_table(file.path, "jsonl", list(names), options)
    )


def as_table(path: Path, form: str, names: list[str], options: Options, heading=True) -> RawFile:
    log = match_here(names, LOG_COLUMNS, options.chosen(LOG_COLUMNS))
    if options.split != "given":
        log.pop("split", None)  # a column of somebody's split that was not asked for
    found = RawFile(path, "logs", spelling=form, names=tuple(names), heading=heading)
    found = found._replace(by_line=form == "jsonl")
    chosen = options.chosen(ITEM_COLUMNS)
    if "id" not in chosen and options.item_column in names:
        chosen["id"] = options.item_column
    if {"user", "item"} <= log.keys():
        own = match_here(names, ITEM_COLUMNS, chosen | {"id": log["item"]})
        about = {role: name for role, name in own.items() if name not in log.values()}
        return found._replace(
            role="interactions",
            kind="log",
            columns=log,
            item_columns={"id": log["item"], **about},
            also="items" if about else "",
        )
    table = match_here(names, ITEM_COLUMNS, chosen)
    if "id" in table and "title" not in table and "title" not in chosen:
        stem = spelling(table["id"]).removesuffix("id")  # WineID and WineName
        titles = [name for name in names if spelling(name) in (f"{stem}name", f"{stem}title")]
        table |= {"title": titles[0]} if titles and stem else {}
    if "id" in table and len(table) > 1:
        return found._replace(role="items", kind="item table", item_columns=table)
    return found


def release(file: RawFile) -> str:
    """What source.json calls interactions of this format."""
    return "log"


def reviews(files: list[RawFile], options: Options, tally: Tally) -> Iterator[pa.Table]:
    """The rows of logs as tables of records.COLUMNS."""
    scale, where = (options.rating_min, options.rating_max), Where.parse(options.where)
    for file in files:
        make = reader(file, options.grades(), scale, where)
        if file.spelling != "parquet":
            yield from batched(read_rows(file, file.columns, make, tally, make.where.columns))
            continue
        wanted = wanted_columns(file, file.columns, make.where.columns)
        for first, batch in parquet_batches(file.path, wanted):
            if (table := make.many(batch)) is not None:
                tally.read += len(table)
                yield table
            else:
                rows = numbered(batch, wanted, tally, first)
                yield from batched(made(rows, make, tally, file.path))


def items(files: list[RawFile], options: Options, tally: Tally) -> Iterator[Item]:
    """The rows of item tables; of a log that is its own catalogue one Item for each item."""
    where = Where.parse(options.where)
    for file in files:
        if file.columns:
            yield from catalogue_of_log(file, tally, where)
        else:
            yield from table_items(file, tally)


def spelling(column: str) -> str:
    """A column's name for comparison: "User ID", "user_id:token" and "USER-ID" are "userid"."""
    bare = re.sub(r"[(\[{].*?[)\]}]", "", column.split(":")[0])
    return re.sub(r"[^a-z0-9]", "", (bare.strip() or column).lower())


def match(
    columns: list[str], roles: dict[str, tuple[str, ...]], chosen: dict[str, str]
) -> dict[str, str]:
    """Role -> column for every role that is named in `chosen` or recognised.

    Raises PageLLMError for a chosen column that is not there.
    """
    found = {}
    by_spelling = {spelling(column): column for column in reversed(columns)}
    for role, spellings in roles.items():
        if name := chosen.get(role):
            if not is_there(name, columns):
                raise PageLLMError(f"no column {name!r} for {role}; there are {', '.join(columns)}")
            found[role] = name
        elif hits := [by_spelling[s] for s in spellings if s in by_spelling]:
            found[role] = hits[0]
    return found


def is_there(name: str, columns) -> bool:
    """Whether a column, or each of several that are joined by +, is among these."""
    return name in columns or "+" in name and all(part in columns for part in name.split("+"))


def match_here(names: list[str], roles: dict, chosen: dict[str, str]) -> dict[str, str]:
    """`match` for one of several files: a chosen column need not be in this one."""
    here = {role: name for role, name in chosen.items() if is_there(name, names)}
    left = {
        role: spellings for role, spellings in roles.items() if role in here or role not in chosen
    }
    return match(names, left, here)


def rivals(file: RawFile, chosen: dict[str, str]) -> dict[str, list[str]]:
    """Role -> other columns that are spelled like it as well, where no option decides."""
    roles = ITEM_COLUMNS if file.role == "items" else LOG_COLUMNS
    taken = file.item_columns if file.role == "items" else file.columns
    found: dict[str, list[str]] = {}
    for role in taken:
        others = [n for n in file.names if n not in taken.values() and spelling(n) in roles[role]]
        if others and role not in chosen and role != "split":
            found[role] = others
    return found


def sample(file: RawFile, rows: int = SAMPLE) -> dict[str, list]:
    """Column -> its first values; of a damaged file those before the damage."""
    found: dict[str, list] = {name: [] for name in file.names}
    with contextlib.suppress(PageLLMError):
        for _, row in islice(records(file, list(found), Tally()), rows):
            for name, values in found.items():
                values.append(row.get(name))
    return found


def settled(file: RawFile, options: Options, values: dict[str, list]) -> Reading:
    """How the columns are to be read. values: a `sample` over all parts of the log together.

    Raises PageLLMError for times whose unit or form the values do not show.
    """
    time = file.columns.get("time", "")
    form = options.time_form or time_form(values.get(time, [])) if time else "s"
    if form is None:
        seen = ", ".join(str(v) for v in [v for v in values[time] if not is_missing(v)][:3])
        raise PageLLMError(
            f"{file.path.name}: column {time} ({seen}, ...) mixes units, or could have day and "
            "month exchanged\n  Say which with --time_form s, ms, us, ns, yyyymmdd, iso, or a "
            "pattern such as %d/%m/%Y."
        )
    cells = values.get(file.item_columns.get("category", ""), [])
    comma = decimal_comma(values.get(file.item_columns.get("price", ""), []))
    return Reading(form, comma, *category_form(cells, options.categories))


def catalogue_columns(file: RawFile, values: dict[str, list]) -> dict[str, str]:
    """ITEM_COLUMNS role -> column of a log, for those that stay the same with each item.

    Without a title a description is taken for one, as in lists of order lines.
    """
    ids = [id_or_blank(value) for value in values.get(file.item_columns["id"], [])]
    found = {
        role: name
        for role, name in file.item_columns.items()
        if role in ("id", "price") or steady(ids, values.get(name, []))
    }
    if "title" not in found and "description" in found:
        found["title"] = found.pop("description")
    return found if "title" in found or "category" in found else {}


def id_or_blank(value) -> str:
    try:
        return identifier(value, "item")
    except Broken:
        return ""


def read_log(
    path: Path,
    form: str,
    columns: dict[str, str],
    tally: Tally,
    grades: dict[str, float],
    scale: tuple[float, float],
    split: str = "",
    span: Span = WHOLE,
    reading: Reading | None = None,
    where: str = "",
) -> Iterator[Review]:
    """The rows of a log.

    form     "csv", "jsonl" or "parquet"
    columns  role of LOG_COLUMNS -> column, at least user and item
    grades   event, in small letters -> 1..5, used where there is an event column and no rating
    scale    lowest and highest rating of the file; ratings are returned as they are
    split    of every row, where the file is of one split
    span     of JSON lines: which of them
    reading  how times are written; None: told from the file's first values
    where    a row filter, see pagellm.data.where
    """
    names = tuple(dict.fromkeys(columns.values()))
    file = RawFile(
        *(path, "logs", "interactions", form),
        columns=columns,
        names=names,
        split=split,
        span=span,
        reading=reading,
    )
    return log_rows(file, tally, grades, scale, Where.parse(where))


def log_rows(
    file: RawFile, tally: Tally, grades: dict, scale: tuple[float, float], where: Where
) -> Iterator[Review]:
    make = reader(file, grades, scale, where)
    return read_rows(file, file.columns, make, tally, make.where.columns)


def reader(file: RawFile, grades: dict, scale: tuple[float, float], where: Where) -> "Reader":
    form = (file.reading or settled(file, Options(), sample(file))).time
    return Reader(file, form, grades, scale, where.of(file.names))


class Reader(NamedTuple):
    """How a log's rows become reviews: one by one, or many plain ones at once.

    form           what the times count, a form of values.time_form
    grades, scale  as `read_log` has them
    """

    file: RawFile
    form: str
    grades: dict[str, float]
    scale: tuple[float, float]
    where: Where

    def __call__(self, row: dict) -> Review:
        """The review of one row, column -> value. Raises Broken."""
        if not self.where.keeps(row):
            raise PassedOver(f"not {self.where.text}")
        row = by_role(row, self.file.columns)
        low, high = self.scale
        user, item = identifier(row.get("user"), "user"), identifier(row.get("item"), "item")
        rating = rating_in(row.get("rating"), low, high)
        if "event" in self.file.columns and rating != rating:
            rating = grade(row.get("event"), self.grades)
            if self.scale != (1, 5):  # a grade is on 1..5, ratings are on the scale of the file
                rating = low + (rating - 1) / 4 * (high - low)
        return Review(
            user,
            item,
            rating,
            time_in(row.get("time"), self.form),
            opinion(row.get("summary"), row.get("text")),
            self.file.split or split_name(row.get("split")),
        )

    def many(self, batch: pa.RecordBatch) -> pa.Table | None:
        """The same of all rows of a batch as a table of records.COLUMNS.

        None where a row is not plain, or a column is of a kind that is read one by one: events,
        texts, dates in words. Plain rows have printable ASCII identifiers or whole numbers.
        """
        columns = self.file.columns
        if self.where.text or columns.keys() & {"event", "summary", "text", "split"}:
            return None
        if any(name not in batch.schema.names for name in columns.values()):  # a + b
            return None
        user, item = (plain_ids(batch[columns[role]]) for role in ("user", "item"))
        rating: np.ndarray | None = np.full(len(batch), np.nan)
        if "rating" in columns:
            rating = plain_ratings(batch[columns["rating"]], *self.scale)
        time: np.ndarray | None = np.full(len(batch), NO_TIME)
        if "time" in columns:
            time = plain_times(batch[columns["time"]], self.form)
        if user is None or item is None or rating is None or time is None:
            return None
        empty = pa.array([""], pa.string()).take(pa.array(np.zeros(len(batch), np.int32)))
        split = pa.array([self.file.split], pa.string()).take(
            pa.array(np.zeros(len(batch), np.int32))
        )
        return pa.table([user, item, rating, time, empty, split], COLUMNS)


def plain_ids(column: pa.Array) -> pa.Array | None:
    """Identifiers as text where `values.identifier` would keep each as it is; else None."""
    if column.null_count or pa.types.is_dictionary(column.type):
        return None
    if pa.types.is_integer(column.type):
        return column.cast(pa.string())
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return None
    text = column.cast(pa.string())
    plain = pc.match_substring_regex(text, f"^[!-~]{{1,{ID_LIMIT}}}$")
    odd = pc.or_(
        pc.ends_with(text, ".0"), pc.is_in(pc.ascii_lower(text), pa.array(sorted(MISSING)))
    )
    return text if pc.all(plain).as_py() and not pc.any(odd).as_py() else None


def plain_ratings(column: pa.Array, low: float, high: float) -> np.ndarray | None:
    """(R,) float64, NaN where there is none; None unless all are numbers from low to high."""
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        return None
    rating = floats(column)
    known = rating[~np.isnan(rating)]
    return None if ((known < low) | (known > high)).any() else rating


def plain_times(column: pa.Array, form: str) -> np.ndarray | None:
    """(R,) float64 seconds, NO_TIME where there is none; None unless all are such numbers."""
    kind = column.type
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        count = floats(column.cast(pa.timestamp("us"), safe=False).cast(pa.int64())) / 1e6
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        count = floats(column)
    else:
        return None
    known = count[~np.isnan(count)]
    if form not in TIME_UNITS or (np.abs(known) > EXACT).any():
        return None
    seconds = known / TIME_UNITS[form]
    if ((seconds < 0) | (seconds > LATEST_TIME)).any():
        return None
    if form != "s" and ((seconds > 0) & (seconds < EARLIEST)).any():
        return None
    return np.where(np.isnan(count), NO_TIME, count / TIME_UNITS[form])


def floats(column: pa.Array) -> np.ndarray:
    """(R,) float64 of a column of numbers, NaN for null."""
    return column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)


def grade(event, grades: dict[str, float]) -> float:
    if is_missing(event):
        raise Broken("no event")
    if not isinstance(event, str) or event.strip().lower() not in grades:
        raise Broken(f"unknown event {str(event)[:20]!r}")
    return grades[event.strip().lower()]


def split_name(value) -> str:
    if is_missing(value):
        return ""
    if not isinstance(value, str) or value.strip().lower() not in SPLIT_NAMES:
        raise Broken("unknown split")
    return SPLIT_NAMES[value.strip().lower()]


def read_items(
    path: Path, form: str, columns: dict[str, str], tally: Tally, reading: Reading | None = None
) -> Iterator[Item]:
    """The rows of an item table; columns: role of ITEM_COLUMNS -> column, at least id.

    A category is a list of names, a list of such lists, or text: "Music > Drums", "Comedy|Drama", a
    list as JSON or Python writes it. reading: how prices and categories are written; None: told
    from the file's first values. A field that cannot be read is counted and left empty; the line
    stays.
    """
    names = tuple(dict.fromkeys(columns.values()))
    file = RawFile(path, "logs", "items", form, item_columns=columns, names=names, reading=reading)
    return table_items(file, tally)


def table_items(file: RawFile, tally: Tally) -> Iterator[Item]:
    reading = file.reading or settled(file, Options(), sample(file))
    return read_rows(
        file,
        file.item_columns,
        lambda row: item_of(by_role(row, file.item_columns), reading, tally),
        tally,
    )


def item_of(row: dict, reading: Reading, tally: Tally) -> Item:
    """One line of an item table, role -> value."""

    def kept(role: str, read, empty):
        """read(value), or `empty` for a value that cannot be read, which is counted."""
        try:
            return read(row.get(role))
        except Broken as broken:
            tally.drop(str(broken).replace("text", role), row.get(role))
            return empty

    name = identifier(row.get("id"), "item")
    cost = price(row.get("price"), reading.comma)
    if cost != cost and not is_missing(row.get("price")):
        tally.drop("price not read", row["price"])
    return Item(
        name,
        kept("title", label, ""),
        kept("brand", label, ""),
        kept("category", lambda v: paths_in(v, reading.categories, reading.mark), ()),
        cost,
        kept("description", lambda v: clean(v) if isinstance(v, list) else label(v), ""),
    )


def catalogue_of_log(file: RawFile, tally: Tally, where: Where) -> Iterator[Item]:
    """One Item for each item of a log that holds its title in every line.

    If the lines disagree, the most frequent title, brand and so on counts; of equally frequent ones
    the first in alphabetical order; of prices the median. So the order of lines changes nothing.
    """
    where = where.of(file.names)
    fields: dict[str, list[Counter]] = defaultdict(lambda: [Counter() for _ in Item._fields[1:]])

    def collect(row: dict) -> None:
        if not where.keeps(row):
            raise PassedOver(f"not {where.text}")
        found = item_of(by_role(row, file.item_columns), file.reading or Reading(), tally)
        for counter, value in zip(fields[found.id], found[1:], strict=True):
            if value == value and value not in ("", ()):
                counter[value] += 1

    for _ in read_rows(file, file.item_columns, collect, tally, where.columns):
        pass
    for name, counters in sorted(fields.items()):
        found = [common(counter) for counter in counters]
        costs = sorted(counters[3].elements())
        found[3] = costs[len(costs) // 2] if costs else Item(name).price
        empty = Item(name)[1:]
        yield Item._make(
            (name, *(e if v is None else v for v, e in zip(found, empty, strict=True)))
        )


def common(counter: Counter):
    """The most frequent value, of equally frequent ones the smallest; None if there is none."""
    return min(counter, key=lambda value: (-counter[value], value), default=None)


def read_rows(
    file: RawFile, columns: dict[str, str], make, tally: Tally, more: list[str] | None = None
) -> Iterator:
    """make(column -> value) of every row; rows for which it raises Broken are counted and left out.

    columns, more  whose values are wanted
    """
    wanted = wanted_columns(file, columns, more)
    if file.spelling == "jsonl":
        known = set(file.names)

        def read(text: str):
            row = json_object(text)
            if not known >= row.keys():
                tally.later.update(row.keys() - known)
            return make(row)

        yield from parsed(file.path, read, tally, file.span)
        return
    yield from made(records(file, wanted, tally), make, tally, file.path)


def made(rows: Iterable[tuple[int, dict]], make, tally: Tally, path: Path) -> Iterator:
    """make(row) of every (number, row); rows for which it raises Broken are counted."""
    for at, row in rows:
        try:
            record = make(row)
        except Broken as broken:
            tally.note(broken, path, at)
        else:
            yield record


def wanted_columns(
    file: RawFile, columns: dict[str, str], more: list[str] | None = None
) -> list[str]:
    """The columns of a file that these roles need, each once."""
    wanted = [part for name in columns.values() for part in parts_of(name, file.names)]
    return list(dict.fromkeys([*wanted, *(more or ())]))


def parts_of(name: str, names) -> list[str]:
    return [name] if name in names or "+" not in name else name.split("+")


def by_role(row: dict, columns: dict[str, str]) -> dict:
    """Role -> value; of columns joined by + the identifiers, with + between."""
    return {
        role: row.get(name)
        if name in row or "+" not in name
        else "+".join(identifier(row.get(part), role) for part in name.split("+"))
        for role, name in columns.items()
    }


def records(file: RawFile, wanted: list[str], tally: Tally) -> Iterator[tuple[int, dict]]:
    """(line or row from 1, column -> value) of a table's records."""
    if file.spelling == "parquet":
        return parquet_rows(file.path, wanted, tally)
    if file.spelling == "csv":
        return csv_rows(file.path, wanted, tally, () if file.heading else file.names)
    rows = parsed(file.path, json_object, tally, file.span)
    return enumerate(rows, 1)


def delimiter_of(header: str) -> str:
    """The mark between the columns of a CSV file: the most frequent of tab , ; | in its heading.

    `::` where it is there and no tab is, as in the files of MovieLens.
    """
    if "::" in header and "\t" not in header:
        return "::"
    return max("\t,;|", key=header.count)


def csv_rows(
    path: Path, wanted: list[str], tally: Tally, names: tuple[str, ...] = ()
) -> Iterator[tuple[int, dict]]:
    """(line, column -> text) of a CSV file. A record may span lines inside quotes.

    names  of the columns, where the file has no heading

    A quote that never closes costs its own line at most, not the rest of the file. A heading that
    is repeated, as in files that were joined, is passed over.
    """
    stream = text_lines(path, tally, keep_empty=True)
    waiting: deque[tuple[int, str]] = deque()  # lines to look at before the stream goes on
    header = next(stream, (0, ""))
    tally.read -= 1  # neither the heading nor a line `sep=;` is a record
    if re.fullmatch(r"sep=.\s*", header[1]):
        header = next(stream, (0, ""))
        tally.read -= 1
    mark = delimiter_of(header[1])
    heading = csv_fields([header[1]], mark) or []
    if names and header[0]:
        waiting.append(header)
        tally.read += 1
    there = list(names or heading)
    places = {name: there.index(name) for name in wanted if name in there}
    if missing := [name for name in wanted if name not in places]:
        raise PageLLMError(f"{path.name}: no column {missing[0]!r}; there are {', '.join(there)}")
    while entry := (waiting.popleft() if waiting else next(stream, None)):
        span, fields = [entry], csv_fields([entry[1]], mark)
        while fields is None and len(span) < RECORD_LINES:
            following = waiting.popleft() if waiting else next(stream, None)
            if following is None:
                break
            span.append(following)
            if '"' in following[1]:
                fields = csv_fields([line for _, line in span], mark)
        if fields is None or len(fields) != len(there):
            waiting.extendleft(reversed(span[1:]))
            span, fields = [entry], entry[1].split(mark)  # quotes of this file are plain text
        tally.read -= len(span) - 1  # several lines, one record
        if fields == there:
            tally.note(PassedOver("heading repeated"), path, entry[0])
        elif len(fields) == len(there):
            yield entry[0], {name: fields[place] for name, place in places.items()}
        else:
            tally.note("wrong number of fields" if entry[1] else "empty line", path, entry[0])


def csv_fields(record: list[str], mark: str) -> list[str] | None:
    """The fields of a record of some lines; None if it ends inside quotes; [] if it is no CSV."""
    if len(mark) > 1:
        return "\n".join(record).split(mark)
    try:
        return next(csv.reader((line + "\n" for line in record), delimiter=mark, strict=True), [])
    except csv.Error as error:
        return None if "unexpected end" in str(error) else []


def parquet_rows(path: Path, wanted: list[str], tally: Tally) -> Iterator[tuple[int, dict]]:
    """(row from 1, column -> value) of a Parquet file, a batch at a time."""
    for first, batch in parquet_batches(path, wanted):
        yield from numbered(batch, wanted, tally, first)


def parquet_batches(path: Path, wanted: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(number of its first row, from 1, and a batch) of a Parquet file's wanted columns."""
    try:
        file = pq.ParquetFile(path)
        if missing := [name for name in wanted if name not in file.schema_arrow.names]:
            there = ", ".join(file.schema_arrow.names)
            raise PageLLMError(f"{path.name}: no column {missing[0]!r}; there are {there}")
        with progress(range(file.metadata.num_rows), path) as bar:
            first = 1
            for batch in file.iter_batches(batch_size=BATCH, columns=wanted):
                yield first, batch
                first += len(batch)
                bar.update(len(batch))
    except (pa.ArrowException, OSError) as error:
        raise PageLLMError(f"{path} cannot be read as Parquet: {error}") from error


def numbered(
    batch: pa.RecordBatch, wanted: list[str], tally: Tally, first: int
) -> Iterator[tuple[int, dict]]:
    """(number, column -> value) of a batch's rows, the first of which has number `first`."""
    values = [plain(batch[name]) for name in wanted]
    for at, row in enumerate(zip(*values, strict=True), first):
        tally.read += 1
        yield at, dict(zip(wanted, row, strict=True))


def plain(column: pa.Array) -> list:
    """Python values; dates and timestamps as seconds since 1970, exact to the microsecond."""
    if pa.types.is_date(column.type) or pa.types.is_timestamp(column.type):
        micros = column.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
        return [None if value is None else value / 1e6 for value in micros.to_pylist()]
    return column.to_pylist()
