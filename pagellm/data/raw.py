"""Which raw files there are, what each of them is, and one stream of records out of them.

Files are recognised by their content, by the formats of FORMATS in turn. Where that leaves a
choice, nothing is guessed: the error lists what was found and names the option that decides.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pyarrow as pa

from pagellm.data import amazon, logs, sequences
from pagellm.data.download import download, official
from pagellm.data.files import Options, RawFile, listing
from pagellm.data.packed import Archive, packing, what_else
from pagellm.data.records import Item, Tally, decoded, lines, spans
from pagellm.data.values import Broken
from pagellm.stage.config import PageLLMError
from pagellm.stage.files import sha256

__all__ = ["FORMATS", "Raw", "find"]


# Each module has the same four functions:
#   recognise(path, first_lines, options) -> RawFile or None       is this file of the format?
#   reviews(files, options, tally) -> tables of records.COLUMNS    the interactions of such files
#   items(files, options, tally) -> Item, Item, ...                the lines of such item tables
#   release(file) -> str                                           its name in source.json
# The formats are asked in this order, and the first that recognises a file reads it. A format that
# finds no role in a file leaves it to the next one.
FORMATS = {"amazon": amazon, "logs": logs, "sequences": sequences}

SNIFFED_LINES = 20
FORMS = """\
  Interactions are Amazon reviews (2014, 2018, 2023), sequence files (user item item ...), or a
  table with a user and an item column (CSV, Parquet, JSON lines); name these with --user_column
  and --item_column, and the columns of a table without a heading with
  --columns user,item,rating,time."""
SPLITS = {"train": r"train(ing)?", "valid": r"val(id|idation)?|dev", "test": r"test(ing)?"}


@dataclass(frozen=True)
class Raw:
    """The files to read, chosen."""

    review_files: list[RawFile]
    item_files: list[RawFile]
    unused: list[str]  # names of files that were passed over
    options: Options
    passed: list[str] = field(default_factory=list)  # the same and folders, each with why
    warnings: list[str] = field(default_factory=list)  # what changes the meaning of the data
    samples: dict = field(default_factory=dict)  # name of a log -> column -> first values
    _described: list[dict] = field(default_factory=list)

    @property
    def release(self) -> str:
        """The format of the interactions, as source.json names it."""
        return FORMATS[self.review_files[0].format].release(self.review_files[0])

    @property
    def graded(self) -> bool:
        """Whether several events of one user and item are told apart by grade."""
        return any("event" in file.columns for file in self.review_files)

    @property
    def scale(self) -> tuple[float, float]:
        """Lowest and highest rating of the files; formats without columns have 1 to 5."""
        if any(file.columns for file in self.review_files):
            return self.options.rating_min, self.options.rating_max
        return 1.0, 5.0

    def reviews(self, tally: Tally) -> Iterator[pa.Table]:
        """Every interaction, in tables of records.COLUMNS; what is broken goes to the tally."""
        for name, files in itertools.groupby(self.review_files, key=lambda file: file.format):
            yield from FORMATS[name].reviews(list(files), self.options, tally)

    def items(self, tally: Tally) -> Iterator[Item]:
        """Every line of every item table; what is broken goes to the tally."""
        for name, files in itertools.groupby(self.item_files, key=lambda file: file.format):
            yield from FORMATS[name].items(list(files), self.options, tally)

    def pieces(self, size: int) -> list["Raw"]:
        """The same interactions, in order, in pieces that can be read apart.

        size  bytes of a piece, about

        Only a plain file of which every line is a record can be cut. Files in which a user may go
        on from one to the next stay together.
        """
        if any(file.joined for file in self.review_files):
            return [self]
        return [
            Raw([file._replace(span=span)], [], [], self.options)
            for file in self.review_files
            for span in spans(file.path, size, file.by_line)
        ]

    def described(self) -> list[dict]:
        """name, role, bytes and sha256 of each file that is read."""
        if not self._described:
            for role, files in (("reviews", self.review_files), ("items", self.item_files)):
                for file in files:
                    entry = {
                        "name": file.path.name,
                        "role": file.split or role,
                        "bytes": file.path.stat().st_size,
                        "sha256": sha256(file.path),
                    }
                    # a log that is its own catalogue is one file
                    if entry["name"] not in [e["name"] for e in self._described]:
                        self._described.append(entry)
        return self._described


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
    # Metadata come first and reviews last, so this resumes a download that stopped in between.
    if known and not options.review_files and not any(f.role == "interactions" for f in files):
        download(*known, folder)
        files = recognised(folder, options)
    warnings: list[str] = []
    files = parts_without_heading(files, warnings)
    review_files = choose_reviews(files, folder, options)
    item_files = choose_items(files, folder, options)
    check_columns(logs.LOG_COLUMNS, review_files or files, options)
    check_columns(logs.ITEM_COLUMNS, item_files or review_files, options)
    check_times(review_files, options)
    review_files, item_files, samples = settled(review_files, item_files, options)
    used = {file.path for file in review_files + item_files}
    left = [file for file in files if file.path not in used]
    passed = [f"{file.path.name} ({reason(file)})" for file in left] + folders(folder)
    warnings += differing_parts(left, review_files) + missing_parts(review_files)
    return Raw(
        review_files,
        item_files,
        [file.path.name for file in left],
        options,
        passed,
        warnings,
        samples,
    )


def check_times(review_files: list[RawFile], options: Options) -> None:
    """Raise PageLLMError for a split by time of logs of which none has a column of times."""
    by_time = options.split in ("temporal", "leave_one_out")
    if by_time and all(file.names and "time" not in file.columns for file in review_files):
        file = review_files[0]
        left = [name for name in file.names if name not in file.columns.values()]
        raise PageLLMError(
            f"split={options.split} needs times, and {file.path.name} has no column of times\n"
            f"  Name it with --time_column (left over: {', '.join(left) or 'none'}), or use "
            "--split random."
        )


def settled(review_files: list[RawFile], item_files: list[RawFile], options: Options):
    """The same files, with the way to read their columns; a log as its own catalogue; samples.

    All parts of a log are decided together, so that all are read in the same units.
    """
    samples = {file.path.name: logs.sample(file) for file in review_files if file.columns}
    if not item_files and options.item_files != "none":
        for file in review_files:
            if file.also == "items":
                own = logs.catalogue_columns(file, samples[file.path.name])
                item_files += [file._replace(role="items", item_columns=own)] if own else []

    def reading(file: RawFile) -> RawFile:
        if not file.names:
            return file
        if file.role == "items" and file.columns:
            own = logs.catalogue_columns(file, logs.sample(file))
            file = file._replace(item_columns=own or file.item_columns)
        alike = [f for f in review_files if f.names == file.names]
        if file.role == "items" and not file.columns or not alike:
            return file._replace(reading=logs.settled(file, options, logs.sample(file)))
        together = {
            name: [value for f in alike for value in samples[f.path.name].get(name, [])]
            for name in file.names
        }
        return file._replace(reading=logs.settled(file, options, together))

    return [reading(f) for f in review_files], [reading(f) for f in item_files], samples


def reason(file: RawFile) -> str:
    """Why a file was passed over."""
    if file.role == "interactions":
        return "interactions, but other files were named"
    if file.role == "items":
        return "an item table, but others were named"
    if file.kind != "other":
        return file.kind
    if packed := packing(file.path) if file.path.stat().st_size else "":
        return f"{packed}, holds no table that is known"
    return "no table of users and items" if file.names else "not known"


def folders(folder: Path) -> list[str]:
    """Folders, hidden and half-fetched files of the raw directory, none of which is read."""
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    return [f"{path.name}/ (a folder)" for path in there if path.is_dir()] + [
        f"{path.name} (hidden or half fetched)"
        for path in there
        if path.is_file() and (path.name.startswith(".") or path.name.endswith(".part"))
    ]


def recognised(folder: Path, options: Options) -> list[RawFile]:
    """Every file of the raw directory, or the one file that stands for it."""
    paths = [] if not folder.exists() else sorted(folder.iterdir()) if folder.is_dir() else [folder]
    return [
        recognise(path, options)
        for path in paths
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(".part")
    ]


def recognise(path: Path, options: Options) -> RawFile:
    """What a file is: the first format that finds a role for it decides.

    An archive of several files, or a file of a kind that nothing here reads, is named and left.
    """
    if other := what_else(path):
        return RawFile(path, kind=other)
    try:
        with path.open("rb") as file:
            first = [] if file.read(4) == b"PAR1" else first_lines(path)
    except Archive as archive:
        return RawFile(path, kind=archive.what)
    found = [f for form in FORMATS.values() if (f := form.recognise(path, first, options))]
    chosen = next((f for f in found if f.role), found[0] if found else RawFile(path))
    late = chosen.format == "logs" and chosen.spelling == "jsonl"
    return logs.with_later_keys(chosen, options) if late else chosen


def first_lines(path: Path) -> list[str]:
    """The first few lines that are text."""
    found = []
    for raw in islice(lines(path), SNIFFED_LINES):
        try:
            found.append(decoded(raw))
        except Broken:
            continue
    return found


def parts_without_heading(files: list[RawFile], warnings: list[str]) -> list[RawFile]:
    """Tables without a heading whose names continue a log's name: they are the log's next parts."""
    found = []
    for file in files:
        whole = [
            other
            for other in files
            if other.role and part_name(other)[0] == part_name(file)[0] and other.names
            if not file.role and file.spelling == other.spelling == "csv"
            if len(file.names) == len(other.names) and looks_like_data(file)
        ]
        if whole:
            warnings.append(
                f"{file.path.name} has no heading; it is read with that of {whole[0].path.name}"
            )
            file = whole[0]._replace(path=file.path, heading=False)
        found.append(file)
    return found


def looks_like_data(file: RawFile) -> bool:
    """Whether the first line of a CSV file is like the next ones, and so no heading."""
    mark = logs.delimiter_of(first_lines(file.path)[0])
    rows = [[shape(field) for field in line.split(mark)] for line in first_lines(file.path)]
    return all(row == rows[0] for row in rows[1:2]) or rows[0] in rows[1:]


def shape(text: str) -> str:
    """a for a run of letters, 0 for a run of digits: two ids of one shop have the same shape."""
    return re.sub(r"[0-9]+", "0", re.sub(r"[^\W\d_]+", "a", text))


def differing_parts(left: list[RawFile], chosen: list[RawFile]) -> list[str]:
    """A remark on files whose names continue the name of a chosen one, but whose columns differ."""
    said = []
    for file in left:
        if any(part_name(file)[0] == part_name(other)[0] for other in chosen):
            said.append(
                f"{file.path.name} looks like a part of {chosen[0].path.name}, but its columns "
                f"({', '.join(file.names[:4]) or file.kind}) are others: it is passed over"
            )
    for file in chosen[1:]:
        if file.names and (differ := set(file.columns) ^ set(chosen[0].columns)):
            said.append(
                f"{file.path.name} and {chosen[0].path.name} differ in: {', '.join(sorted(differ))}"
            )
    return said


def missing_parts(chosen: list[RawFile]) -> list[str]:
    """A remark on numbers that are missing in the names of a log's parts: log-00, log-02."""
    of: dict[tuple, list[tuple[int, ...]]] = {}
    for file in chosen:
        numbers = tuple(map(int, re.findall(r"\d+", file.path.name)))
        of.setdefault(part_name(file), []).append(numbers)
    said = []
    for parts in of.values():
        changing = [column for column in zip(*parts, strict=True) if len(set(column)) > 1]
        if len(changing) != 1:
            continue
        there = set(changing[0])
        gap = sorted(set(range(min(there), min(max(there), min(there) + 10_000))) - there)
        if gap and len(gap) < len(there):  # names that hold dates leave out most numbers
            said.append(
                f"the parts of {chosen[0].path.name} are numbered {min(there)} to {max(there)}, "
                f"and number {', '.join(map(str, gap[:5]))} is not there"
            )
    return said


def check_columns(roles: dict, files: list[RawFile], options: Options) -> None:
    """Raise PageLLMError for a column that is named by option and in none of the files."""
    for role, name in options.chosen(roles).items():
        if not any(logs.is_there(name, file.names) for file in files):
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
    if wrong := [file for file in named if file.role != "interactions"]:
        raise PageLLMError(f"--review_files: not interactions: {wrong[0]}\n{FORMS}")
    chosen = named or [file for file in files if file.role == "interactions"]
    if not chosen:
        check_columns(logs.LOG_COLUMNS, [file for file in files if file.names], options)
        below = "".join(f"\n    {name}" for name in folders(folder))
        raise PageLLMError(
            f"no interactions among the files of {folder}:{listing(files)}{below}{nearly(files)}\n"
            f"{FORMS}"
        )
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


def nearly(files: list[RawFile]) -> str:
    """What a table lacks that has one of the user and the item column, and which may be the other.

    An item column stands in a log and in the item table: it is one that two files share.
    """
    said = []
    for file in files:
        found = logs.match(list(file.names), logs.LOG_COLUMNS, {})
        if len({"user", "item"} & found.keys()) != 1:
            continue
        has, lacks = ("user", "item") if "user" in found else ("item", "user")
        others = {name for other in files if other is not file for name in other.names}
        left = [name for name in file.names if name not in found.values()]
        shared = [name for name in left if name in others]
        ids = [name for name in left if logs.spelling(name).endswith(("id", "code", "no"))]
        if likely := (shared if lacks == "item" else []) or ids:
            said.append(
                f"\n  {file.path.name}: {found[has]} is its {has} column, none is known for its "
                f"{lacks} column; perhaps --{lacks}_column {likely[0]}"
            )
    return "".join(said)


def part_name(file: RawFile) -> tuple:
    """Files that differ only in numbers, as part-0001 and part-0002 do, are parts of one."""
    return re.sub(r"\d+", "0", file.path.name), file.kind, file.spelling


def choose_split(files: list[RawFile], folder: Path, options: Options) -> list[RawFile]:
    """The files of somebody else's split, by option or by name; [] if none is for training."""
    chosen = []
    for split, pattern in SPLITS.items():
        if name := getattr(options, split):
            found = [located(name, folder, options)]
        else:
            found = [
                file
                for file in files
                if file.role == "interactions"
                and re.search(rf"(^|[^a-z])({pattern})([^a-z]|$)", file.path.name.lower())
            ]
        if len(found) > 1:
            raise PageLLMError(
                f"several files look like the {split} rows:{listing(found)}\n"
                f"  Say which: --{split} FILE."
            )
        chosen += [file._replace(split=split) for file in found]
    if wrong := [file for file in chosen if file.role != "interactions"]:
        raise PageLLMError(f"--{wrong[0].split}: not interactions: {wrong[0]}\n{FORMS}")
    return chosen if any(file.split == "train" for file in chosen) else []


def choose_items(files: list[RawFile], folder: Path, options: Options) -> list[RawFile]:
    if options.item_files == "none":
        return []
    named = [located(name, folder, options) for name in options.item_files.split(",") if name]
    # Files of words about items, and a log's own columns, are read only if an option names them.
    named = [file if file.role == "items" else file._replace(role=file.also) for file in named]
    if wrong := [file for file in named if not file.role]:
        raise PageLLMError(
            f"--item_files: not an item table: {wrong[0]}\n"
            "  Name its columns with --id_column, --title_column and so on."
        )
    chosen = named or [file for file in files if file.role == "items"]
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
