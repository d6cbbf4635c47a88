"""Any shop's own log, and item tables: CSV, Parquet or JSON lines; sequence files.

A log has a user and an item column, and perhaps a rating or an event, a time, a text, a split. Columns are
named by option or recognised by the common spellings below. A sequence file has one user a line and the items
in order: `user item item ...`.
"""

import csv
import json
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pagellm.data.amazon import category_paths, json_object
from pagellm.data.records import (
    WHOLE,
    Broken,
    Item,
    Review,
    Span,
    Tally,
    clean,
    identifier,
    opinion,
    parsed,
    price,
    progress,
    rating_in,
    text_lines,
    time_seconds,
)
from pagellm.stage.config import PageLLMError

__all__ = [
    "ITEM_COLUMNS",
    "LOG_COLUMNS",
    "delimiter_of",
    "match",
    "read_items",
    "read_log",
    "spelling",
]


# Role -> spellings, the first that is there is taken. Compared without case, spaces and punctuation.
LOG_COLUMNS = {
    "user": (
        "user",
        "userid",
        "reviewerid",
        "uid",
        "customerid",
        "customer",
        "visitorid",
        "memberid",
        "accountid",
        "buyerid",
        "clientid",
        "username",
    ),
    "item": (
        "item",
        "itemid",
        "parentasin",
        "asin",
        "productid",
        "product",
        "iid",
        "sku",
        "movieid",
        "articleid",
        "goodsid",
        "listingid",
    ),
    "rating": ("rating", "overall", "stars", "starrating", "score"),
    "event": ("event", "eventtype", "action", "behavior", "behaviour", "interactiontype"),
    "time": (
        "timestamp",
        "time",
        "unixreviewtime",
        "eventtime",
        "datetime",
        "date",
        "createdat",
        "ts",
    ),
    "summary": ("summary", "headline", "reviewtitle", "reviewheadline"),
    "text": ("text", "review", "reviewtext", "reviewbody", "comment", "body"),
    "split": ("split", "fold", "subset", "partition"),
}
ITEM_COLUMNS = {
    "id": (*LOG_COLUMNS["item"], "id"),
    "title": ("title", "name", "itemname", "productname", "producttitle", "itemtitle"),
    "brand": ("brand", "manufacturer", "store", "vendor"),
    "category": ("categories", "category", "categorypath", "genres", "genre"),
    "price": ("price", "unitprice"),
    "description": ("description", "desc", "about"),
}
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "dev": "valid",
    "test": "test",
    "testing": "test",
    "unused": "unused",
    "": "",
}
PATH_MARK = re.compile(r"\s*[>|]\s*")  # between the names of a category path in a text column
RECORD_LINES = 200  # most lines that one quoted CSV record may span
BATCH = 16_384  # rows of a Parquet file held at once


def spelling(column: str) -> str:
    """A column's name for comparison; "user_id:token", as some libraries write it, is "userid"."""
    return re.sub(r"[^a-z0-9]", "", column.split(":")[0].lower())


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
            if name not in columns:
                raise PageLLMError(f"no column {name!r} for {role}; there are {', '.join(columns)}")
            found[role] = name
        elif hits := [by_spelling[s] for s in spellings if s in by_spelling]:
            found[role] = hits[0]
    return found


def read_log(
    path: Path,
    kind: str,
    columns: dict[str, str],
    tally: Tally,
    grades: dict[str, float],
    scale: tuple[float, float],
    split: str = "",
    span: Span = WHOLE,
) -> Iterator[Review]:
    """The rows of a log.

    kind     "csv", "jsonl" or "parquet"
    columns  role of LOG_COLUMNS -> column, at least user and item
    grades   event, in small letters -> rating 1..5, used where there is an event column and no rating
    scale    lowest and highest rating in the file, brought to 1..5
    split    of every row, where the file is of one split
    span     of JSON lines: which of them
    """

    def review(row: dict) -> Review:
        rating = rating_in(row.get("rating"), *scale)
        if "event" in columns and rating != rating:
            rating = grade(row.get("event"), grades)
        return Review(
            identifier(row.get("user"), "user"),
            identifier(row.get("item"), "item"),
            rating,
            time_seconds(row.get("time")),
            opinion(row.get("summary"), row.get("text")),
            split or split_name(row.get("split")),
        )

    return read_rows(path, kind, columns, review, tally, span)


def grade(event, grades: dict[str, float]) -> float:
    if event is None or event == "":
        raise Broken("no event")
    if not isinstance(event, str) or event.strip().lower() not in grades:
        raise Broken("unknown event")
    return grades[event.strip().lower()]


def split_name(value) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or value.strip().lower() not in SPLIT_NAMES:
        raise Broken("unknown split")
    return SPLIT_NAMES[value.strip().lower()]


def read_items(path: Path, kind: str, columns: dict[str, str], tally: Tally) -> Iterator[Item]:
    """The rows of an item table; columns: role of ITEM_COLUMNS -> column, at least id.

    A category is a list of names, a list of such lists, or text: "Music > Drums" or a JSON list.
    """

    def item(row: dict) -> Item:
        return Item(
            identifier(row.get("id"), "item"),
            clean(row.get("title")),
            clean(row.get("brand")),
            category_paths(category_list(row.get("category"))),
            price(row.get("price")),
            clean(row.get("description")),
        )

    return read_rows(path, kind, columns, item, tally)


def category_list(value):
    """The lists within a category column's text; anything that is not text as it is."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise Broken("categories of a wrong type") from None
    return [name for name in PATH_MARK.split(value.strip()) if name]


def read_rows(
    path: Path, kind: str, columns: dict[str, str], make, tally: Tally, span: Span = WHOLE
) -> Iterator:
    """make(role -> value) of every row; rows for which it raises Broken are counted and left out."""
    if kind == "jsonl":
        yield from parsed(
            path, lambda text: make(chosen_values(json_object(text), columns)), tally, span
        )
        return
    rows = csv_rows(path, columns, tally) if kind == "csv" else parquet_rows(path, columns, tally)
    for at, row in rows:
        try:
            record = make(row)
        except Broken as broken:
            tally.note(str(broken), path, at)
        else:
            yield record


def chosen_values(record: dict, columns: dict[str, str]) -> dict:
    return {role: record.get(column) for role, column in columns.items()}


def delimiter_of(header: str) -> str:
    """The mark between the columns of a CSV file: the commonest of tab comma ; | in its header."""
    return max("\t,;|", key=header.count)


def csv_rows(path: Path, columns: dict[str, str], tally: Tally) -> Iterator[tuple[int, dict]]:
    """(line, role -> text) of a CSV file with a header. A record may span lines inside quotes.

    A quote that never closes costs its own line at most, not the rest of the file.
    """
    stream = text_lines(path, tally, keep_empty=True)
    header = next(stream, (0, ""))[1]
    tally.read -= 1  # the header is no record
    mark = delimiter_of(header)
    names = next(csv.reader([header], delimiter=mark), [])
    places = {role: names.index(column) for role, column in columns.items()}
    waiting: deque[tuple[int, str]] = deque()  # lines to look at before the stream goes on
    while entry := (waiting.popleft() if waiting else next(stream, None)):
        span, fields = [entry], csv_fields([entry[1]], mark)
        while fields is None and len(span) < RECORD_LINES:
            following = waiting.popleft() if waiting else next(stream, None)
            if following is None:
                break
            span.append(following)
            if '"' in following[1]:
                fields = csv_fields([line for _, line in span], mark)
        if fields is None or len(fields) != len(names):
            waiting.extendleft(reversed(span[1:]))
            span, fields = [entry], entry[1].split(mark)  # a file that never meant its quotes
        tally.read -= len(span) - 1  # several lines, one record
        if len(fields) == len(names):
            yield entry[0], {role: fields[place] for role, place in places.items()}
        else:
            tally.note("wrong number of fields" if entry[1] else "empty line", path, entry[0])


def csv_fields(record: list[str], mark: str) -> list[str] | None:
    """The fields of one record of some lines; None if it ends inside quotes; [] if the quoting is wrong."""
    try:
        return next(csv.reader((line + "\n" for line in record), delimiter=mark, strict=True))
    except csv.Error as error:
        return None if "unexpected end" in str(error) else []


def parquet_rows(path: Path, columns: dict[str, str], tally: Tally) -> Iterator[tuple[int, dict]]:
    """(row from 1, role -> value) of a Parquet file, a batch at a time."""
    try:
        file = pq.ParquetFile(path)
        with progress(range(file.metadata.num_rows), path) as bar:
            at = 0
            for batch in file.iter_batches(batch_size=BATCH, columns=sorted(set(columns.values()))):
                values = {role: plain(batch[column]) for role, column in columns.items()}
                for row in zip(*values.values(), strict=True):
                    tally.read += 1
                    at += 1
                    yield at, dict(zip(values, row, strict=True))
                bar.update(len(batch))
    except (pa.ArrowException, OSError) as error:
        raise PageLLMError(f"{path} cannot be read as Parquet: {error}") from error


def plain(column: pa.Array) -> list:
    """Python values; dates and timestamps as seconds since 1970, decimals as floats."""
    if pa.types.is_date(column.type) or pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("s"), safe=False).cast(pa.int64())
    elif pa.types.is_decimal(column.type):
        column = column.cast(pa.float64())
    return column.to_pylist()
