"""Amazon reviews and metadata in their three published spellings: a line -> Review or Item.

    2014  reviews: JSON, reviewerID asin overall reviewText summary unixReviewTime, helpful
          items:   Python literals, categories (list of paths), description a string, price a number
    2018  reviews: JSON, as 2014 with verified, vote, style; reviewText may be absent
          items:   JSON, category (one path), description (list), price "$40.00" or page script
    2023  reviews: JSON, user_id parent_asin rating title text, timestamp in milliseconds
          items:   JSON, parent_asin, store, categories (one path), description (list), a price

2014: R. He, J. McAuley, WWW 2016. 2018: J. Ni et al., EMNLP 2019.
2023: Y. Hou et al., arXiv 2403.03952.
"""

import ast
import json
import math
import re
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as paj

from pagellm.data.files import Options, RawFile
from pagellm.data.records import COLUMNS, Item, Review, Tally, parsed, parsed_batches
from pagellm.data.values import (
    EARLIEST,
    LATEST_TIME,
    NO_TIME,
    Broken,
    clean,
    identifier,
    opinion,
    price,
    rating_in,
    time_in,
)

__all__ = [
    "as_object",
    "as_review",
    "is_items",
    "is_reviews",
    "items",
    "json_object",
    "mapping",
    "parse_item",
    "parse_review",
    "recognise",
    "release",
    "review_table",
    "reviews",
]

# longest Python literal, in characters: parsing one takes a hundred times its memory
LITERAL_LIMIT = 1_000_000
NAME_LIMIT = 100  # characters of a category or brand; longer ones are pieces of the page
# A piece of page script: a call of "function" needs its brace, for titles speak of functions too.
SCRIPT = re.compile(
    r"\bfunction\s*\w*\([^)]*\)\s*\{|aPageStart|getTime\(|</?(script|span|div|a|style)\b",
    re.IGNORECASE,
)


def recognise(path: Path, first_lines: list[str], options: Options) -> RawFile | None:
    """Lines of Amazon's reviews or items, by their fields.

    None where columns are named by option: then the file is read as any other table.
    """
    named = [getattr(options, name) for name in vars(options) if name.endswith("_column")]
    objects = [as_object(text) for text in first_lines if text.startswith("{")]
    fields = {name for record in objects if record is not None for name in record}
    if not fields or any(named):
        return None
    if year := is_reviews(fields):
        return RawFile(path, "amazon", "interactions", year, "amazon reviews", by_line=True)
    if year := is_items(fields):
        return RawFile(path, "amazon", "items", year, "amazon items", by_line=True)
    return None


def release(file: RawFile) -> str:
    """What source.json calls interactions of this format."""
    return f"amazon{file.spelling}"


def reviews(files: list[RawFile], options: Options, tally: Tally) -> Iterator[pa.Table]:
    """The reviews as tables of records.COLUMNS, many lines at once where the lines are plain."""
    for file in files:
        quick = partial(review_table, spelling=file.spelling)
        for table in parsed_batches(file.path, parse_review, quick, tally, file.span):
            if file.split:
                split = pa.array([file.split] * len(table), pa.string())
                table = table.set_column(5, COLUMNS.field("split"), split)
            yield table


def items(files: list[RawFile], options: Options, tally: Tally) -> Iterator[Item]:
    """The lines of metadata."""
    for file in files:
        yield from parsed(file.path, partial(parse_item, tally=tally), tally)


def as_object(text: str) -> dict | None:
    """`mapping` of a line, None where it is none."""
    try:
        return mapping(text)
    except Broken:
        return None


def json_object(text: str) -> dict:
    """One JSON object. Raises Broken."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise Broken("nested too deeply") from None
    except ValueError:
        raise Broken("bad JSON") from None
    if not isinstance(value, dict):
        raise Broken("not an object")
    return value


def mapping(text: str) -> dict:
    """One object, in JSON or as a Python literal, which is never evaluated. Raises Broken."""
    if not text.startswith("{'"):
        return json_object(text)
    if len(text) > LITERAL_LIMIT:
        raise Broken("Python literal over 1 MB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes that escape nothing
            value = ast.literal_eval(text)
    except (RecursionError, MemoryError):
        raise Broken("nested too deeply") from None
    except (ValueError, SyntaxError, TypeError):
        raise Broken("bad Python literal") from None
    if not isinstance(value, dict):
        raise Broken("not an object")
    return value


def is_reviews(fields: set[str]) -> str:
    """ "2014", "2018" or "2023" if these fields are of a review, else ""."""
    if {"reviewerID", "asin"} <= fields:
        newer = fields & {"verified", "vote", "style", "image"} and "helpful" not in fields
        return "2018" if newer else "2014"
    return "2023" if {"user_id", "parent_asin", "timestamp"} <= fields else ""


def is_items(fields: set[str]) -> str:
    """ "2014", "2018" or "2023" if these fields are of an item, else ""."""
    if fields & {"reviewerID", "user_id"}:
        return ""
    if "parent_asin" in fields:
        return "2023"
    if "asin" in fields:
        return "2018" if "category" in fields else "2014"
    return ""


def parse_review(text: str) -> Review:
    """A line of reviews in any of the spellings. Raises Broken."""
    return as_review(mapping(text))


def as_review(record: dict) -> Review:
    """The same, from the object that a line holds."""
    if "reviewerID" in record or "overall" in record:
        return Review(
            identifier(record.get("reviewerID"), "user"),
            identifier(record.get("asin"), "item"),
            rating_in(record.get("overall")),
            time_in(record.get("unixReviewTime")),
            opinion(record.get("summary"), record.get("reviewText")),
        )
    return Review(
        identifier(record.get("user_id"), "user"),
        identifier(record.get("parent_asin") or record.get("asin"), "item"),
        rating_in(record.get("rating")),
        time_in(record.get("timestamp"), "ms"),
        opinion(record.get("title"), record.get("text")),
    )


TYPES = {
    "user": pa.string(),
    "item": pa.string(),
    "rating": pa.float64(),
    "time": pa.int64(),
    "summary": pa.string(),
    "body": pa.string(),
}
OLD_FIELDS = ("reviewerID", "asin", "overall", "unixReviewTime", "summary", "reviewText")
FIELDS = {
    "2014": OLD_FIELDS,
    "2018": OLD_FIELDS,
    "2023": ("user_id", "parent_asin", "rating", "timestamp", "title", "text"),
}
LETTER = re.compile(rb"\\u00[4-7]")  # of ASCII, written as an escape
PLAIN_ID = r"^[\x21-\x7e]{1,256}$"
ODD_ID = r"(?i)^(null|none|nan|nat|\\n|<na>|#n/a|-?[0-9]+\.0)$"  # what `identifier` changes
UNCLEAN = r"[^\x20-\x7e]|[&<]|  "  # what `clean` might change, beside spaces at both ends
QUOTES = {"&#34;": '"', "&#39;": "'", "&quot;": '"'}
DEEPEST = 500  # brackets in a line that json.loads is sure to follow


def review_table(data: bytes, spelling: str = "2014") -> pa.Table | None:
    """Many lines of reviews at once -> a table of COLUMNS, as `parse_review` reads each of them.

    data  lines with "\\n" between them

    Returns None if one line is written in an unusual way. The caller then gives the lines to
    `parse_review` one by one.
    """
    rows = separate_objects(data)
    newer = spelling == "2023"
    if not rows or (newer and may_be_older(data)):
        return None
    names = dict(zip(TYPES, FIELDS[spelling], strict=True))
    try:
        if not data.isascii():
            data.decode("utf-8")
        schema = pa.schema([(names[role], kind) for role, kind in TYPES.items()])
        options = paj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
        table = paj.read_json(
            pa.BufferReader(data),
            paj.ReadOptions(use_threads=False, block_size=len(data) + 1),
            options,
        )
        table.validate(full=True)
    except (UnicodeDecodeError, pa.ArrowException):
        return None
    user, item, rating, time, summary, body = (
        table[names[role]].combine_chunks() for role in TYPES
    )
    if len(user) != rows or user.null_count or item.null_count:
        return None
    stars, moments = rating.drop_null().to_numpy(), time.drop_null().to_numpy()
    if not (
        all(pc.all(pc.match_substring_regex(ids, PLAIN_ID)).as_py() for ids in (user, item))
        and not any(pc.any(pc.match_substring_regex(ids, ODD_ID)).as_py() for ids in (user, item))
        and not ((stars < 1) | (stars > 5)).any()
        and not ((moments < 0) | (moments > LATEST_TIME * (1000 if newer else 1))).any()
    ):
        return None
    time = pc.cast(time, pa.float64())
    if newer:
        if pc.any(pc.and_(pc.greater(time, 0), pc.less(time, EARLIEST * 1000))).as_py():
            return None
        time = pc.divide(time, 1000.0)
    there = faults(data)
    summary, body = cleaned(summary, there), cleaned(body, there)
    alone = pc.or_(pc.equal(summary, ""), pc.equal(body, ""))
    text = pc.if_else(
        alone,
        pc.binary_join_element_wise(summary, body, ""),
        pc.binary_join_element_wise(summary, body, "\n"),
    )
    return pa.table(
        [
            user,
            item,
            rating.fill_null(math.nan),
            time.fill_null(NO_TIME),
            text,
            pa.repeat(pa.scalar(""), rows),
        ],
        COLUMNS,
    )


def may_be_older(data: bytes) -> bool:
    """Whether a field name of the older reviews may be there, in plain letters or escaped."""
    code = np.frombuffer(data, np.uint8)
    # a tenth of what it takes bytes to find four in a row
    escaped = np.flatnonzero(code[:-1] == ord("\\")) + 1
    return (
        b'"reviewerID"' in data
        or b'"overall"' in data
        or bool((code[escaped] == ord("u")).any() and LETTER.search(data))
    )


def separate_objects(data: bytes) -> int:
    """The number of lines if each is one JSON object, not nested too deeply; else 0.

    An object that begins and ends its line cannot hold a line end. If it shared its line with
    another one, the number of rows would differ. Any other byte below 32 is an error that Arrow
    might not see.
    """
    code = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(code == ord("\n"))
    if (
        not data.startswith(b"{")
        or not data.endswith(b"}")
        or np.count_nonzero(code < 32) != len(ends)
        or (code[ends - 1] != ord("}")).any()
        or (code[ends + 1] != ord("{")).any()
    ):
        return 0
    opening = np.flatnonzero((code & 0xDF) == ord("["))  # [ and {
    opened = np.searchsorted(opening, ends)
    deepest = np.diff(opened, prepend=0, append=len(opening)).max()
    return len(ends) + 1 if deepest <= DEEPEST else 0


def faults(data: bytes) -> set[str]:
    """Which HTML entities the bytes hold, by first letter, and whether two spaces stand together.

    What is written with JSON's escapes, or ends in the last bytes of all, is not found.
    """
    code = np.frombuffer(data, np.uint8)
    space, at = code == ord(" "), np.flatnonzero(code == ord("&"))
    at = at[at < len(code) - max(map(len, QUOTES))]
    after = np.stack([code[at + place] for place in (1, 2, 3)])
    return {
        entity for entity in QUOTES if (after == [[x] for x in entity[1:4].encode()]).all(0).any()
    } | ({"  "} if (space[1:] & space[:-1]).any() else set())


def cleaned(text: pa.StringArray, there: set[str]) -> pa.StringArray:
    """`clean` of every text; "" for null. there: `faults` of the bytes that the texts come from."""
    text = plain = text.fill_null("")
    # One pass over all texts for each fault that occurs; UNCLEAN finds what these passes missed.
    for entity in QUOTES.keys() & there:
        plain = pc.replace_substring(plain, entity, QUOTES[entity])
    if "  " in there:
        plain = pc.replace_substring_regex(plain, "  +", " ")
    plain = pc.ascii_trim(plain, " ")
    unclean = pc.match_substring_regex(plain, UNCLEAN)
    return pc.replace_with_mask(
        plain, unclean, pa.array(map(clean, text.filter(unclean).to_pylist()), pa.string())
    )


def parse_item(text: str, tally: Tally | None = None) -> Item:
    """A line of metadata in any of the spellings. Raises Broken.

    A field that cannot be read is left empty, and counted in the tally if there is one: an odd
    category must not cost an item its title.
    """
    record = mapping(text)

    def kept(value, read, empty):
        try:
            return read(value)
        except Broken as broken:
            if tally:
                tally.drop(str(broken), value)
            return empty

    details = record.get("details")
    brand = record.get("brand") or record.get("store")
    if not brand and isinstance(details, dict):
        brand = details.get("Brand")
    return Item(
        identifier(record.get("parent_asin") or record.get("asin"), "item"),
        kept(record.get("title"), lambda v: unscripted(clean(v)), ""),
        kept(brand, lambda v: unscripted(clean(v), NAME_LIMIT), ""),
        kept(record.get("categories") or record.get("category"), category_paths, ()),
        price(record.get("price")),
        kept(record.get("description"), lambda v: unscripted(clean(v)), ""),
    )


def unscripted(text: str, limit: int | None = None) -> str:
    """The text; "" if it is longer than the limit, or is script of the page that it came from."""
    return "" if (limit and len(text) > limit) or SCRIPT.search(text) else text


def category_paths(value) -> tuple[tuple[str, ...], ...]:
    """A path or a list of paths -> paths of clean names. Raises Broken for anything else.

    Some 2018 paths run on into a product's features. They are cut where a name looks like page
    text.
    """
    if not value:
        return ()
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise Broken("categories of a wrong type")
    paths = value if all(isinstance(part, list) for part in value) else [value]
    return tuple(filter(None, map(category_path, paths)))


def category_path(names: list) -> tuple[str, ...]:
    path = []
    for name in map(clean, names):
        if not unscripted(name, NAME_LIMIT):
            break
        path.append(name)
    return tuple(path)
