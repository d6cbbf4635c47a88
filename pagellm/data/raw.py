"""Which raw files there are, what each of them is, and one stream of Review and Item out of them.

Files are recognised by their content; where that leaves a choice, nothing is guessed: the error lists what
was found and names the option that decides.
"""

import csv
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pagellm.data import amazon, interactions, sequences
from pagellm.data.download import download, official
from pagellm.data.records import (
    COLUMNS,
    WHOLE,
    Broken,
    Item,
    Review,
    Span,
    Tally,
    batched,
    decoded,
    is_packed,
    lines,
    parsed,
    parsed_batches,
)
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import sha256

__all__ = ["Options", "Raw", "find"]


SNIFFED_LINES = 20
FORMS = """\
  Interactions are Amazon reviews (2014, 2018, 2023), sequence files (user item item ...), or a table with
  a user and an item column (CSV, Parquet, JSON lines); name these with --user_column and --item_column."""
KINDS = {"amazon reviews", "sequences", "log"}
SPLITS = {"train": r"train(ing)?", "valid": r"val(id|idation)?|dev", "test": r"test(ing)?"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where the raw files are and how to read them."""

    dataset: str = "synthetic"  # synthetic; toys, beauty, sports, instruments, luxury,
    # scientific, food,
    # gift_cards, all_beauty or an official category's name; any other name is a shop of your own
    raw: str = ""  # directory of the raw files; empty: <data>/raw/<dataset>
    data: str = "data"  # directory of prepared data sets
    release: str = ""  # 2014, 2018 or 2023: of the files to download; empty: the paper's
    review_files: str = ""  # interaction files within raw, with commas between; empty: recognised
    item_files: str = ""  # item tables within raw, with commas between, or none; empty: recognised
    split: str = "random"  # random (80/10/10 per user), temporal, leave_one_out or given
    train: str = ""  # split=given: file of the training rows; empty: recognised by name
    valid: str = ""  # split=given: file of the validation rows
    test: str = ""  # split=given: file of the test rows
    user_column: str = ""  # logs: column of the user; empty, here and below: common names are known
    item_column: str = ""  # logs: column of the item
    rating_column: str = ""  # logs: column of the rating
    event_column: str = ""  # logs: column of the event (view, cart, ...), graded by event_values
    time_column: str = ""  # logs: column of the time: seconds (or finer) since 1970,
    # or ISO 8601 dates
    summary_column: str = ""  # logs: column of the review's headline
    text_column: str = ""  # logs: column of the review's text
    split_column: str = ""  # split=given: column that says train, valid or test
    id_column: str = ""  # item tables: column of the item
    title_column: str = ""  # item tables: column of the title
    brand_column: str = ""  # item tables: column of the brand
    category_column: str = ""  # item tables: column of the category path
    price_column: str = ""  # item tables: column of the price
    description_column: str = ""  # item tables: column of the description
    event_values: str = "view=1,click=2,cart=4,purchase=5"  # grade of each event,
    # on the scale 1 to 5
    rating_min: float = 1.0  # logs: lowest rating of the shop's scale, which is brought to 1..5
    rating_max: float = 5.0  # logs: highest rating of the shop's scale
    min_text: int = 1  # characters; a shorter review text is left out
    max_text: int = 2000  # characters; a longer review text or description is cut

    def __post_init__(self):
        name = self.dataset
        check(
            self,
            dataset=(
                name not in ("", "raw") and not name.startswith(".") and name == Path(name).name,
                "a plain name, not raw, without slashes",
            ),
            split=(
                self.split in ("random", "temporal", "leave_one_out", "given"),
                "random, temporal, leave_one_out or given",
            ),
            release=(self.release in ("", "2014", "2018", "2023"), "2014, 2018 or 2023"),
            rating_max=(
                math.isfinite(self.rating_min)
                and math.isfinite(self.rating_max)
                and self.rating_min < self.rating_max,
                "more than rating_min",
            ),
            **{
                name: (not getattr(self, name) or self.split == "given", "no file, or split=given")
                for name in ("train", "valid", "test", "split_column")
            },
            min_text=(self.min_text >= 0, "0 or more"),
            max_text=(self.max_text >= 1, "1 or more"),
        )
        self.grades()

    @property
    def folder(self) -> Path:
        """Where the raw files are looked for."""
        return Path(self.raw).expanduser() if self.raw else Path(self.data) / "raw" / self.dataset

    def grades(self) -> dict[str, float]:
        """Event in small letters -> grade."""
        try:
            pairs = [part.split("=") for part in self.event_values.split(",")]
            values = {name.strip().lower(): float(value) for name, value in pairs}
        except ValueError:
            values = {}
        check(
            self,
            event_values=(
                bool(values) and all(1 <= value <= 5 for value in values.values()),
                "event=grade,event=grade,... with grades from 1 to 5",
            ),
        )
        return values

    def chosen(self, roles: dict) -> dict[str, str]:
        """Role -> column, of the columns named by option."""
        return {role: name for role in roles if (name := getattr(self, f"{role}_column"))}


class RawFile(NamedTuple):
    """A file and what it was recognised as."""

    path: Path
    kind: str  # amazon reviews, sequences, log, amazon items, item table, item words ...
    spelling: str  # 2014, 2018, 2023; csv, jsonl, parquet; or ""
    columns: dict[str, str]  # role -> column, of logs and item tables
    names: tuple[str, ...] = ()  # every column
    split: str = ""  # of all its rows, if the file is of one split
    span: Span = WHOLE  # the lines to read

    def __str__(self) -> str:
        roles = ", ".join(f"{role} = {column}" for role, column in self.columns.items())
        what = roles or ", ".join(self.names)
        form = f"{self.spelling} {self.kind}".strip()
        return f"{self.path.name}: {form} ({what})" if what else f"{self.path.name}: {form}"


@dataclass(frozen=True)
class Raw:
    """The files to read, chosen."""

    review_files: list[RawFile]
    item_files: list[RawFile]
    unused: list[str]  # names of files that were passed over
    options: Options
    _described: list[dict] = field(default_factory=list)

    @property
    def release(self) -> str:
        kinds = {file.kind: file.spelling for file in self.review_files}
        return (
            f"amazon{kinds['amazon reviews']}"
            if "amazon reviews" in kinds
            else "sequences"
            if "sequences" in kinds
            else "log"
        )

    @property
    def graded(self) -> bool:
        """Whether several events of one user and item are told apart by grade."""
        return any("event" in file.columns for file in self.review_files)

    def reviews(self, tally: Tally) -> Iterator[Review]:
        """Every interaction of every file; what is broken goes to the tally."""
        options, positions = self.options, {}
        for file in self.review_files:
            if file.kind == "sequences":
                yield from sequences.read_sequences(file.path, tally, positions, file.split)
            elif file.kind == "log":
                scale = (options.rating_min, options.rating_max)
                yield from interactions.read_log(
                    file.path,
                    file.spelling,
                    file.columns,
                    tally,
                    options.grades(),
                    scale,
                    file.split,
                    file.span,
                )
            else:
                for review in parsed(file.path, amazon.parse_review, tally, file.span):
                    yield review._replace(split=file.split) if file.split else review

    def batches(self, tally: Tally) -> Iterator[pa.Table]:
        """`reviews` as tables of records.COLUMNS; many lines at once where the format allows it."""
        # whose users go on in the next file
        if any(file.kind == "sequences" for file in self.review_files):
            yield from batched(self.reviews(tally))
            return
        for file in self.review_files:
            if file.kind == "amazon reviews":
                quick = partial(amazon.review_table, spelling=file.spelling)
                for table in parsed_batches(
                    file.path, amazon.parse_review, quick, tally, file.span
                ):
                    yield (
                        table.set_column(
                            5,
                            COLUMNS.field("split"),
                            pa.array([file.split] * len(table), pa.string()),
                        )
                        if file.split
                        else table
                    )
            else:
                yield from batched(Raw([file], [], [], self.options).reviews(tally))

    def pieces(self, size: int) -> list["Raw"]:
        """The same interactions, in order, in pieces that can be read apart: files, large ones cut.

        size  bytes of a piece, about
        Only a plain file of which every line is a record can be cut: neither gzip nor CSV nor Parquet. Sequence files
        are one piece, since a user may go on in the next.
        """
        if any(file.kind == "sequences" for file in self.review_files):
            return [self]
        return [
            Raw([file._replace(span=span)], [], [], self.options)
            for file in self.review_files
            for span in spans(file, size)
        ]

    def items(self, tally: Tally) -> Iterator[Item]:
        """Every line of every item table; what is broken goes to the tally."""
        for file in self.item_files:
            if file.kind == "item words":
                yield from sequences.item_words(file.path, tally)
            elif file.kind == "item table":
                yield from interactions.read_items(file.path, file.spelling, file.columns, tally)
            else:
                yield from parsed(file.path, amazon.parse_item, tally)

    def described(self) -> list[dict]:
        """name, role, bytes and sha256 of each file that is read."""
        if not self._described:
            for role, files in (("reviews", self.review_files), ("items", self.item_files)):
                for file in files:
                    self._described.append(
                        {
                            "name": file.path.name,
                            "role": file.split or role,
                            "bytes": file.path.stat().st_size,
                            "sha256": sha256(file.path),
                        }
                    )
        return self._described


def spans(file: RawFile, size: int) -> list[Span]:
    """A file in parts of about `size` bytes; as a whole if it cannot be cut."""
    by_line = file.kind == "amazon reviews" or file.spelling == "jsonl"
    length = file.path.stat().st_size
    parts = max(1, round(length / size)) if by_line and not is_packed(file.path) else 1
    edges = [length * n // parts for n in range(parts)]
    return [Span(a, b) for a, b in itertools.pairwise([*edges, None])]


def find(options: Options) -> Raw:
    """The raw files of a data set, downloaded if they are official ones and nothing lies there.

    Raises PageLLMError if there are none, or if it is not clear which to read.
    """
    folder = options.folder
    known = None if options.raw else official(options.dataset, options.release)
    if known is None and not folder.exists():
        raise PageLLMError(
            f"no raw files: {folder} does not exist\n"
            f"  Put the files of {options.dataset} there, or say where with --raw.\n{FORMS}"
        )
    files = recognised(folder, options)
    # Metadata come first and reviews last, so a download that stopped in between is gone on with here.
    if known and not options.review_files and not any(file.kind in KINDS for file in files):
        download(*known, folder)
        files = recognised(folder, options)
    review_files = choose_reviews(files, folder, options)
    item_files = choose_items(files, folder, options)
    check_columns(interactions.LOG_COLUMNS, review_files or files, options)
    check_columns(interactions.ITEM_COLUMNS, item_files, options)
    used = {file.path for file in review_files + item_files}
    return Raw(
        review_files,
        item_files,
        [file.path.name for file in files if file.path not in used],
        options,
    )


def recognised(folder: Path, options: Options) -> list[RawFile]:
    """Every file of the raw directory, or the one file that stands for it."""
    paths = [] if not folder.exists() else sorted(folder.iterdir()) if folder.is_dir() else [folder]
    return [
        recognise(path, options)
        for path in paths
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(".part")
    ]


def check_columns(roles: dict, files: list[RawFile], options: Options) -> None:
    """Raise PageLLMError for a column that is named by option and in none of the files."""
    for role, name in options.chosen(roles).items():
        if not any(name in file.names for file in files):
            there = "".join(
                f"\n    {file.path.name}: {', '.join(file.names) or 'no table'}" for file in files
            )
            raise PageLLMError(
                f"--{role}_column: no column {name!r} in{there or ' any item table'}"
            )


def choose_reviews(files: list[RawFile], folder: Path, options: Options) -> list[RawFile]:
    given = options.split == "given"
    if given and (by_split := choose_split(files, folder, options)):
        return by_split
    named = [located(name, folder, options) for name in options.review_files.split(",") if name]
    if wrong := [file for file in named if file.kind not in KINDS]:
        raise PageLLMError(f"--review_files: not interactions: {wrong[0]}\n{FORMS}")
    chosen = named or [file for file in files if file.kind in KINDS]
    if not chosen:
        check_columns(interactions.LOG_COLUMNS, [file for file in files if file.names], options)
        raise PageLLMError(f"no interactions among the files of {folder}:{listing(files)}\n{FORMS}")
    if not named and len({part_name(file) for file in chosen}) > 1:
        raise PageLLMError(
            f"several sets of interactions in {folder}:{listing(chosen)}\n"
            "  Say which to read: --review_files FILE[,FILE ...], and --item_files FILE.\n"
            "  If each is one split: --split given --train A --valid B --test C."
        )
    if given and not all("split" in file.columns for file in chosen):
        raise PageLLMError(
            f"split=given, but nothing says which rows are of which split:{listing(chosen)}\n"
            "  Name files with --train, --valid and --test, or a column with --split_column."
        )
    return chosen


def part_name(file: RawFile) -> tuple:
    """Files that differ only in numbers, as part-0001 and part-0002 do, are parts of one."""
    return re.sub(r"\d+", "0", file.path.name), file.kind, file.spelling


def choose_split(files: list[RawFile], folder: Path, options: Options) -> list[RawFile]:
    """The files of somebody else's split, by option or by name; [] if none of them is for training."""
    chosen = []
    for split, pattern in SPLITS.items():
        if name := getattr(options, split):
            found = [located(name, folder, options)]
        else:
            found = [
                file
                for file in files
                if file.kind in KINDS
                and re.search(rf"(^|[^a-z])({pattern})([^a-z]|$)", file.path.name.lower())
            ]
        if len(found) > 1:
            raise PageLLMError(
                f"several files look like the {split} rows:{listing(found)}\n"
                f"  Say which: --{split} FILE."
            )
        chosen += [file._replace(split=split) for file in found]
    if wrong := [file for file in chosen if file.kind not in KINDS]:
        raise PageLLMError(f"--{wrong[0].split}: not interactions: {wrong[0]}\n{FORMS}")
    return chosen if any(file.split == "train" for file in chosen) else []


def choose_items(files: list[RawFile], folder: Path, options: Options) -> list[RawFile]:
    if options.item_files == "none":
        return []
    named = [located(name, folder, options) for name in options.item_files.split(",") if name]
    named = [
        file if file.kind != "sequences" else file._replace(kind="item words") for file in named
    ]
    if wrong := [
        file for file in named if file.kind not in ("amazon items", "item table", "item words")
    ]:
        raise PageLLMError(
            f"--item_files: not an item table: {wrong[0]}\n"
            "  Name its columns with --id_column, --title_column and so on."
        )
    # Words that somebody made up for an item are no title: they are read only when asked for.
    chosen = named or [file for file in files if file.kind in ("amazon items", "item table")]
    if not named and len({part_name(file) for file in chosen}) > 1:
        raise PageLLMError(
            f"several item tables in {folder}:{listing(chosen)}\n"
            "  Say which to read: --item_files FILE[,FILE ...], or --item_files none."
        )
    return chosen


def located(name: str, folder: Path, options: Options) -> RawFile:
    """A file named by option: within the raw directory, or a path of its own."""
    for path in (folder / name, Path(name).expanduser()):
        if path.is_file():
            return recognise(path, options)
    raise PageLLMError(f"no file {name} in {folder}")


def listing(files: list[RawFile]) -> str:
    return "".join(f"\n    {file}" for file in files) or "\n    (no files)"


def recognise(path: Path, options: Options) -> RawFile:
    """What a file is, from its name and its first lines."""
    if path.stat().st_size and path.open("rb").read(4) == b"PAR1":
        try:
            return as_table(path, "parquet", pq.read_schema(path).names, options)
        except (pa.ArrowException, OSError) as error:
            raise PageLLMError(f"{path} cannot be read as Parquet: {error}") from error
    first = first_lines(path)
    objects = [
        record for text in first if text.startswith("{") and (record := as_object(text)) is not None
    ]
    if objects:
        fields = set().union(*objects)
        own_columns = options.chosen(interactions.LOG_COLUMNS) or options.chosen(
            interactions.ITEM_COLUMNS
        )
        if not own_columns and (year := amazon.is_reviews(fields)):
            return RawFile(path, "amazon reviews", year, {})
        if not own_columns and (year := amazon.is_items(fields)):
            return RawFile(path, "amazon items", year, {})
        names = list(dict.fromkeys(name for record in objects for name in record))
        return as_table(path, "jsonl", names, options)
    if first and not first[0].startswith(("{", "[")):
        mark = interactions.delimiter_of(first[0])
        if mark in first[0]:
            return as_table(path, "csv", next(csv.reader([first[0]], delimiter=mark)), options)
        if all(len(text.split()) > 1 for text in first):
            name = path.name.lower()
            if "sequen" not in name and re.search("item|phrase|title|meta", name):
                return RawFile(path, "item words", "", {})
            if re.search(r"\.(txt|seq|dat|sequences)(\.|$)", name):
                return RawFile(path, "sequences", "", {})
    return RawFile(path, "other", "", {})


def first_lines(path: Path) -> list[str]:
    """The first few lines that are text."""
    found = []
    for raw in islice(lines(path), SNIFFED_LINES):
        try:
            found.append(decoded(raw))
        except Broken:
            continue
    return found


def as_object(text: str) -> dict | None:
    try:
        return amazon.mapping(text)
    except Broken:
        return None


def as_table(path: Path, spelling: str, names: list[str], options: Options) -> RawFile:
    """A log if the columns hold a user and an item; an item table if they hold an item and more about it."""
    find_columns = partial(match_here, names=names)
    log = find_columns(interactions.LOG_COLUMNS, options.chosen(interactions.LOG_COLUMNS))
    if options.split != "given":
        log.pop("split", None)  # a column of somebody's split that was not asked for
    if {"user", "item"} <= log.keys():
        return RawFile(path, "log", spelling, log, tuple(names))
    table = find_columns(interactions.ITEM_COLUMNS, options.chosen(interactions.ITEM_COLUMNS))
    if "id" in table and len(table) > 1:
        return RawFile(path, "item table", spelling, table, tuple(names))
    return RawFile(path, "other", spelling, {}, tuple(names))


def match_here(roles: dict, chosen: dict[str, str], names: list[str]) -> dict[str, str]:
    """interactions.match for one of several files: a chosen column need not be in this one."""
    here = {role: name for role, name in chosen.items() if name in names}
    left = {
        role: spellings for role, spellings in roles.items() if role in here or role not in chosen
    }
    return interactions.match(names, left, here)
