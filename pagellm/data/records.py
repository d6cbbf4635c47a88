"""What every reader yields, one record at a time, and how broken input is counted.

A reader is a generator of Review or Item. A record that cannot be understood raises Broken inside
the reader, which counts it in a Tally and goes on. So read = kept + passed + broken, by reason.
"""

import io
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import parent_process
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from tqdm import tqdm

from pagellm.data.packed import DAMAGED, is_plain, open_bytes
from pagellm.data.values import NO_TIME, Broken, PassedOver
from pagellm.stage.config import PageLLMError

__all__ = [
    "COLUMNS",
    "Item",
    "Review",
    "Span",
    "Tally",
    "WHOLE",
    "batched",
    "blocks",
    "decoded",
    "lines",
    "parsed",
    "parsed_batches",
    "progress",
    "spans",
    "text_lines",
]


LINE_LIMIT = 10_000_000  # bytes; a longer line is broken, and read in pieces of this size
CHUNK = 4_000_000  # bytes of lines read and parsed at once; of the first ones:
FIRST_READ = 1 << 16
MARK = b"\xef\xbb\xbf"  # of byte order, at the start of a file
PIECES = 16  # that a chunk is cut into where not all of its lines are plain
HINTS = {  # what a reason of broken lines holds -> what to do about it
    "rating outside": "--rating_min and --rating_max say what the scale of the ratings is.",
    "rating of a wrong type": "Grades in words are events: --event_column and --event_values.",
    "unknown event": "--event_values says what events there are.",
    "not UTF-8": "Write the file in UTF-8 (iconv -f latin1 -t utf-8) or UTF-16.",
}
EXAMPLES = 5  # broken records shown with file and line


class Review(NamedTuple):
    """One interaction of a user with an item."""

    user: str  # identifiers exactly as in the file
    item: str
    rating: float = math.nan  # on the file's own scale; NaN where there is none
    time: float = NO_TIME  # seconds since 1970; in sequence files the position 0, 1, 2 ...
    text: str = ""  # summary, newline, text; entities unescaped
    split: str = ""  # train, valid, test or unused where somebody else made the split


COLUMNS = pa.schema(
    [
        ("user", pa.string()),
        ("item", pa.string()),
        ("rating", pa.float64()),
        ("time", pa.float64()),
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


@dataclass
class Tally:
    """How many records were read, and why some were left out: read = kept + passed + broken."""

    read: int = 0
    broken: Counter = field(default_factory=Counter)  # reason -> records that are damaged
    passed: Counter = field(default_factory=Counter)  # reason -> whole records, not wanted
    fields: Counter = field(default_factory=Counter)  # reason -> values dropped from kept records
    later: Counter = field(default_factory=Counter)  # key of JSON that begins late -> lines with it
    noted: list[tuple[str, int, str]] = field(default_factory=list)  # first broken: file, line, why
    odd: dict[str, str] = field(default_factory=dict)  # reason of `fields` -> the first such value

    def note(self, reason: Broken | str, path: Path, line: int) -> None:
        """Count a record that is left out; only broken ones count towards --max_broken."""
        if isinstance(reason, PassedOver):
            self.passed[str(reason)] += 1
            return
        self.broken[str(reason)] += 1
        if len(self.noted) < EXAMPLES:
            self.noted.append((path.name, line, str(reason)))

    def drop(self, reason: str, value) -> None:
        """Count a value that is taken for unknown, in a record that is kept."""
        self.fields[reason] += 1
        self.odd.setdefault(reason, str(value)[:40])

    def add(self, other: "Tally", lines_before: int = 0) -> None:
        """Add the counts of another part of the file, before which `lines_before` lines came."""
        self.read += other.read
        self.broken.update(other.broken)
        self.passed.update(other.passed)
        self.fields.update(other.fields)
        self.later.update(other.later)
        self.odd = other.odd | self.odd
        self.noted += [
            (name, line + lines_before, reason)
            for name, line, reason in other.noted[: EXAMPLES - len(self.noted)]
        ]

    @property
    def examples(self) -> list[str]:
        return [f"{name}:{line}: {reason}" for name, line, reason in self.noted]

    @property
    def kept(self) -> int:
        return self.read - self.broken.total() - self.passed.total()

    def counts(self) -> dict:
        """read, kept and broken; passed and fields where there are any."""
        found = {"read": self.read, "kept": self.kept, "broken": dict(sorted(self.broken.items()))}
        for name in ("passed", "fields"):
            if counter := getattr(self, name):
                found[name] = dict(sorted(counter.items()))
        return found

    def check(self, what: str, max_broken: float) -> int:
        """Print what is broken; returns how many lines that took.

        Raises PageLLMError when the share of broken lines is above max_broken.
        """
        if not self.broken:
            return 0
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
                + "".join(f"\n  {hint}" for word, hint in HINTS.items() if word in reasons)
            )
        print(f"  {message}", flush=True)
        return 1 + len(self.examples)


class Span(NamedTuple):
    """A part of a plain file: the lines whose first byte is one of start ... end - 1."""

    start: int = 0
    end: int | None = None  # None: the end of the file, as for every packed file


WHOLE = Span()


def lines(path: Path, span: Span = WHOLE) -> Iterator[bytes | None]:
    """The lines of a file, plain or packed, without their ends; None for an overlong one.

    Memory is bounded by LINE_LIMIT bytes, whatever the file holds. Raises PageLLMError for a
    damaged packed file: a file that is cut short must never pass for a small data set.
    """
    for block in blocks(path, span):
        yield from split_lines(block)


def plain_lines(block: bytes) -> list[bytes]:
    return [line.rstrip(b"\r\n") for line in block.removesuffix(b"\n").split(b"\n")]


def split_lines(block: bytes | None) -> list[bytes] | list[None]:
    """The lines of a block without their ends."""
    return [None] if block is None else plain_lines(block)


def blocks(path: Path, span: Span = WHOLE) -> Iterator[bytes | None]:
    """The same lines with their ends, a few MB at once; None for an overlong one."""
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
    except DAMAGED as error:
        raise PageLLMError(
            f"{path} is damaged or cut short ({error})\n  Fetch it again."
        ) from error
    except OSError as error:
        raise PageLLMError(f"{path} cannot be read: {error.strerror or error}") from error


def first_line(file, start: int) -> int:
    """Go to the first line that begins at byte `start` or later; returns its place."""
    file.seek(start - 1)
    while (rest := file.readline(LINE_LIMIT)) and not rest.endswith(b"\n"):
        pass
    return file.tell()


def spans(path: Path, size: int, by_line: bool) -> list[Span]:
    """A file in parts of about `size` bytes; in one part if it cannot be read from any line on."""
    length = path.stat().st_size
    parts = max(1, round(length / size)) if by_line and is_plain(path) else 1
    edges = [length * n // parts for n in range(parts)]
    return [Span(a, b) for a, b in zip(edges, [*edges[1:], None], strict=True)]


def progress(stream: Iterable | None, path: Path) -> tqdm:
    """The same stream with a bar of lines a second, shown once it has taken more than a second.

    A process that reads a part of the files shows no bar: who started it shows one for all.
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
    """(line number from 1, text) of every line that is text; the others are counted as broken.

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
            tally.note(broken, path, at)
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
            tally.note(broken, path, at)
        else:
            yield record


def batched(reviews: Iterable[Review]) -> Iterator[pa.Table]:
    """The same records as tables of COLUMNS, in batches that fit in memory."""
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

    quick   bytes of lines, "\\n" between them -> a table of COLUMNS with one row a line, equal to
            what `parse` makes of them; None for lines that `parse` must look at one by one
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
    """(lines, their table by `quick`) of a block, or of its pieces if quick refuses the whole."""
    if (table := quick_table(block, quick)) is not None:
        yield block, table
    else:
        for piece in cut(block):
            yield piece, quick_table(piece, quick)


def quick_table(block: bytes | None, quick) -> pa.Table | None:
    if block is None:
        return None
    return quick(b"\n".join(plain_lines(block)) if b"\r" in block else block.removesuffix(b"\n"))


def cut(block: bytes | None) -> list[bytes] | list[None]:
    """A block in PIECES of whole lines: a line that is not plain makes few others slow."""
    if block is None:
        return [None]
    edges = [0]
    while edges[-1] < len(block):
        end = block.find(b"\n", min(edges[-1] + len(block) // PIECES, len(block) - 1))
        edges.append(end + 1 if end >= 0 else len(block))
    return [block[a:b] for a, b in itertools.pairwise(edges)]
