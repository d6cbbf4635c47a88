"""What every reader yields, one record at a time, and how broken input is counted.

A reader is a generator of Review or Item. A record that cannot be understood raises Broken inside the
reader, which counts it in a Tally and goes on: so read = kept + broken, by reason, always.
"""

import gzip
import html
import io
import itertools
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing import parent_process
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from tqdm import tqdm

from pagellm.stage.config import PageLLMError

__all__ = [
    "Broken",
    "COLUMNS",
    "Item",
    "LATEST_TIME",
    "NO_TIME",
    "Review",
    "Span",
    "Tally",
    "WHOLE",
    "batched",
    "blocks",
    "clean",
    "decoded",
    "identifier",
    "is_packed",
    "lines",
    "number",
    "opinion",
    "parsed",
    "parsed_batches",
    "price",
    "progress",
    "rating_in",
    "text_lines",
    "time_seconds",
]


NO_TIME = -1  # an unknown time; real ones are never negative
LINE_LIMIT = 10_000_000  # bytes; a longer line is broken, and read in pieces of this size
ID_LIMIT = 256  # characters
LATEST_TIME = 4_102_444_800  # 1 January 2100, in seconds: later dates are mistakes
PRICE_LIMIT = 1e7
CHUNK = 4_000_000  # bytes of lines read and parsed at once; of the first ones:
FIRST_READ = 1 << 16
MARK = b"\xef\xbb\xbf"  # of byte order, at the start of a file
PIECES = 16  # that a chunk is cut into where not all of its lines are plain
EXAMPLES = 5  # broken records shown with file and line

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
LINE_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
PRICE = re.compile(r"\$?\s*(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?\s*", re.ASCII)


class Review(NamedTuple):
    """One user's dealing with one item."""

    user: str  # identifiers exactly as in the file
    item: str
    rating: float = math.nan  # NaN where there is none
    time: int = NO_TIME  # seconds since 1970; in sequence files the position 0, 1, 2 ...
    text: str = ""  # summary, newline, text; entities unescaped
    split: str = ""  # train, valid, test or unused where somebody else made the split


COLUMNS = pa.schema(
    [
        ("user", pa.string()),
        ("item", pa.string()),
        ("rating", pa.float64()),
        ("time", pa.int64()),
        ("text", pa.string()),
        ("split", pa.string()),
    ]
)  # a batch of Review
BATCH_ROWS = 20_000  # records in a batch, at most
BATCH_CHARACTERS = 16_000_000  # characters of text after which a batch ends


class Item(NamedTuple):
    """One line of an item table. Unknown text is "", unknown price NaN."""

    id: str
    title: str = ""
    brand: str = ""
    paths: tuple[tuple[str, ...], ...] = ()  # category paths, root first
    price: float = math.nan
    description: str = ""


class Broken(ValueError):
    """A record that cannot be understood; the message is the reason it is counted under."""


@dataclass
class Tally:
    """How many records were read, and why some were left out."""

    read: int = 0
    broken: Counter = field(default_factory=Counter)  # reason -> records
    noted: list[tuple[str, int, str]] = field(default_factory=list)  # the first few: file,
    # line, reason

    def note(self, reason: str, path: Path, line: int) -> None:
        self.broken[reason] += 1
        if len(self.noted) < EXAMPLES:
            self.noted.append((path.name, line, reason))

    def add(self, other: "Tally", lines_before: int = 0) -> None:
        """Count what another one has counted, further down, in a file of which `lines_before` lines came before."""
        self.read += other.read
        self.broken.update(other.broken)
        self.noted += [
            (name, line + lines_before, reason)
            for name, line, reason in other.noted[: EXAMPLES - len(self.noted)]
        ]

    @property
    def examples(self) -> list[str]:
        return [f"{name}:{line}: {reason}" for name, line, reason in self.noted]

    @property
    def kept(self) -> int:
        return self.read - self.broken.total()

    def counts(self) -> dict:
        return {"read": self.read, "kept": self.kept, "broken": dict(sorted(self.broken.items()))}

    def check(self, what: str, max_broken: float) -> None:
        """Print what was left out. Raises PageLLMError when its share is above max_broken."""
        if not self.broken:
            return
        total = self.broken.total()
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(self.broken.items()))
        shown = "".join(f"\n    {example}" for example in self.examples)
        message = (
            f"{total:,} of {self.read:,} {what} lines are broken ({reasons}); the first:{shown}"
        )
        if total > max_broken * self.read:
            raise PageLLMError(
                f"{message}\n  That is more than --max_broken {max_broken:g}. If the file is\n"
                "  whole and its columns are the right ones, raise --max_broken."
            )
        print(f"  {message}", flush=True)


class Span(NamedTuple):
    """A part of a plain file: the lines whose first byte is one of start ... end - 1."""

    start: int = 0
    end: int | None = None  # None: the end of the file, as for every packed file


WHOLE = Span()


def lines(path: Path, span: Span = WHOLE) -> Iterator[bytes | None]:
    """The lines of a plain or gzip file without their ends; None for one of more than LINE_LIMIT bytes.

    Memory is bounded by LINE_LIMIT whatever the file holds. Raises PageLLMError for a damaged gzip file:
    a file that is cut short must never pass for a small data set.
    """
    for block in blocks(path, span):
        yield from split_lines(block)


def split_lines(block: bytes | None) -> list[bytes | None]:
    """The lines of a block without their ends."""
    return (
        [None]
        if block is None
        else [line.rstrip(b"\r\n") for line in block.removesuffix(b"\n").split(b"\n")]
    )


def blocks(path: Path, span: Span = WHOLE) -> Iterator[bytes | None]:
    """The same lines with their ends, a few MB at once; None for one that is too long. Errors as in `lines`."""
    try:
        with open_bytes(path) as file:
            at = first_line(file, span.start) if span.start else 0
            first, size = at == 0, FIRST_READ
            while data := file.read(size if span.end is None else max(0, min(size, span.end - at))):
                if not data.endswith(b"\n"):
                    rest = file.readline(LINE_LIMIT + len(MARK) + 1)
                    data += rest
                    while rest and not rest.endswith(b"\n"):
                        rest = file.readline(LINE_LIMIT)
                if first:
                    data, first = data.removeprefix(MARK), False
                if len(data) <= LINE_LIMIT:
                    yield data
                else:
                    for line in io.BytesIO(data):
                        yield line if len(line.removesuffix(b"\n")) <= LINE_LIMIT else None
                at, size = file.tell(), min(2 * size, CHUNK)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise PageLLMError(
            f"{path} is damaged or cut short ({error})\n  Fetch it again."
        ) from error
    except OSError as error:
        raise PageLLMError(f"{path} cannot be read: {error.strerror or error}") from error


def first_line(file, start: int) -> int:
    """Go to where the first line begins that begins at byte `start` or after it; returns that place."""
    file.seek(start - 1)
    while (rest := file.readline(LINE_LIMIT)) and not rest.endswith(b"\n"):
        pass
    return file.tell()


def is_packed(path: Path) -> bool:
    """Whether a file is gzip, by content: names lie."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def open_bytes(path: Path):
    return gzip.open(path, "rb") if is_packed(path) else open(path, "rb", buffering=1 << 20)


def progress(stream: Iterable | None, path: Path) -> tqdm:
    """The same stream with a bar that shows lines a second, once it has taken more than a second.

    No bar in a process of its own: who started it shows one for all.
    """
    return tqdm(
        stream,
        desc=f"  {path.name}",
        unit=" lines",
        unit_scale=True,
        delay=1,
        mininterval=0.5,
        disable=parent_process() is not None,
    )


def text_lines(path: Path, tally: Tally, keep_empty: bool = False) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of every line that is text; the others are counted. Counts what is read.

    keep_empty  yield "" for an empty line instead of counting it as broken
    """
    return texts(enumerate(progress(lines(path), path), 1), path, tally, keep_empty)


def texts(
    numbered: Iterable[tuple[int, bytes | None]], path: Path, tally: Tally, keep_empty: bool = False
) -> Iterator[tuple[int, str]]:
    for at, raw in numbered:
        tally.read += 1
        try:
            text = "" if keep_empty and raw == b"" else decoded(raw)
        except Broken as broken:
            tally.note(str(broken), path, at)
        else:
            yield at, text


def decoded(raw: bytes | None) -> str:
    if raw is None:
        raise Broken("line over 10 MB")
    if not raw or raw.isspace():
        raise Broken("empty line")
    if b"\0" in raw:
        raise Broken("NUL byte")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Broken("not UTF-8") from None
    if text.isspace():  # spaces that only text knows, such as U+001F or U+3000
        raise Broken("empty line")
    return text


def parsed(path: Path, parse, tally: Tally, span: Span = WHOLE) -> Iterator:
    """parse(text) of every line; lines for which it raises Broken are counted and left out."""
    return parsed_lines(enumerate(progress(lines(path, span), path), 1), path, parse, tally)


def parsed_lines(
    numbered: Iterable[tuple[int, bytes | None]], path: Path, parse, tally: Tally
) -> Iterator:
    for at, text in texts(numbered, path, tally):
        try:
            record = parse(text)
        except Broken as broken:
            tally.note(str(broken), path, at)
        else:
            yield record


def batched(reviews: Iterable[Review]) -> Iterator[pa.Table]:
    """The same records as tables of COLUMNS, as many at once as memory bears."""
    rows, characters = [], 0
    for review in reviews:
        rows.append(review)
        characters += len(review.text)
        if len(rows) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield as_table(rows)
            rows, characters = [], 0
    if rows:
        yield as_table(rows)


def as_table(rows: list[Review]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [()] * len(COLUMNS)
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, COLUMNS, strict=True)],
        COLUMNS,
    )


def parsed_batches(
    path: Path, parse, quick, tally: Tally, span: Span = WHOLE
) -> Iterator[pa.Table]:
    """`parsed`, with many lines at once where all of them are plain.

    quick   bytes of lines, "\\n" between them -> a table of COLUMNS with one row a line, equal to what `parse`
            makes of them; None for lines that `parse` must look at one by one
    """
    first = 1
    with progress(None, path) as bar:
        for block in blocks(path, span):
            for part, table in quick_tables(block, quick):
                raw = split_lines(part) if table is None else ()
                rows = len(raw) if table is None else len(table)
                if table is None:
                    yield from batched(parsed_lines(enumerate(raw, first), path, parse, tally))
                else:
                    tally.read += rows
                    yield table
                first += rows
                bar.update(rows)


def quick_tables(block: bytes | None, quick) -> Iterator[tuple[bytes | None, pa.Table | None]]:
    """(lines, quick's table of them) of a block; in pieces if quick will not have it whole."""
    if (table := quick_table(block, quick)) is not None:
        yield block, table
    else:
        for piece in cut(block):
            yield piece, quick_table(piece, quick)


def quick_table(block: bytes | None, quick) -> pa.Table | None:
    if block is None:
        return None
    return quick(b"\n".join(split_lines(block)) if b"\r" in block else block.removesuffix(b"\n"))


def cut(block: bytes | None) -> list[bytes | None]:
    """A block in PIECES of whole lines: a line that is not plain makes few others slow."""
    if block is None:
        return [None]
    edges = [0]
    while edges[-1] < len(block):
        end = block.find(b"\n", min(edges[-1] + len(block) // PIECES, len(block) - 1))
        edges.append(end + 1 if end >= 0 else len(block))
    return [block[a:b] for a, b in itertools.pairwise(edges)]


def identifier(value, role: str) -> str:
    """A user's or item's id, exactly as written. role: "user" or "item". Raises Broken."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value is None or value == "":
        raise Broken(f"no {role}")
    if not isinstance(value, str):
        raise Broken(f"{role} of a wrong type")
    if not value.isprintable() and CONTROL.search(value):
        raise Broken(f"control characters in the {role}")
    if len(value) > ID_LIMIT:
        raise Broken(f"{role} longer than {ID_LIMIT} characters")
    if value.isspace():
        raise Broken(f"no {role}")
    return value


def number(value, what: str) -> float:
    """A finite number, or NaN where the value is missing (None, "", NaN). Raises Broken."""
    if value is None or value == "":
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise Broken(f"{what} of a wrong type")
    try:
        value = float(value)
    except (ValueError, OverflowError):
        raise Broken(f"{what} of a wrong type") from None
    if math.isinf(value):
        raise Broken(f"absurd {what}")
    return value


def time_seconds(value, milliseconds: bool = False) -> int:
    """Seconds since 1970, NO_TIME where missing. Raises Broken for what lies before 1970 or after 2100.

    value         a number of seconds, or a date in ISO 8601 (UTC unless it says otherwise)
    milliseconds  the number counts milliseconds. Without it, numbers too large for seconds are taken for
                  milli-, micro- or nanoseconds: 1e11 seconds is the year 5138.
    """
    if isinstance(value, str) and not is_number(value):
        if not value.strip():
            return NO_TIME
        try:
            moment = datetime.fromisoformat(value.strip())
        except ValueError:
            raise Broken("time of a wrong type") from None
        value = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    seconds = number(value, "time")
    if math.isnan(seconds):
        return NO_TIME
    if milliseconds:
        seconds /= 1000
    else:
        for _ in range(3):
            if seconds > 1e11:
                seconds /= 1000
    if not 0 <= seconds <= LATEST_TIME:
        raise Broken("absurd time")
    return int(seconds)


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def clean(value) -> str:
    """One line of readable text: entities unescaped; line breaks, controls, runs of space one space.

    value  a string, None, or a list of strings (joined). Raises Broken for anything else.
    """
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(filter(None, map(clean, value)))
    if not isinstance(value, str):
        raise Broken("text of a wrong type")
    if "&" in value:
        # nearly all there are
        quoted = value.replace("&#34;", '"').replace("&#39;", "'").replace("&quot;", '"')
        value = html.unescape(value) if "&" in quoted else quoted
    if "<" in value:
        value = LINE_BREAK.sub(" ", value)
    if not value.isprintable():
        value = CONTROL.sub(" ", value)
    return " ".join(value.split())


def opinion(summary, text) -> str:
    """The text of a review: its summary and its body, each cleaned, on lines of their own."""
    return "\n".join(filter(None, (clean(summary), clean(text))))


def rating_in(value, low: float = 1.0, high: float = 5.0) -> float:
    """A rating on the scale low..high, brought to 1..5; NaN where missing. Raises Broken off the scale."""
    rating = number(value, "rating")
    if rating < low or rating > high:
        raise Broken(f"rating outside {low:g}..{high:g}")
    return rating if (low, high) == (1, 5) else 1 + 4 * (rating - low) / (high - low)


def price(value) -> float:
    """ "$40.00", "1,299.5", 40.0 -> a number above 0; NaN for all else: ranges, page script, nothing."""
    if isinstance(value, str):
        match = PRICE.fullmatch(value.strip()[:40])
        value = float("".join(match.groups("")).replace(",", "")) if match else math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if 0 < value < PRICE_LIMIT else math.nan
