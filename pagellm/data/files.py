"""What the user says about raw files (`Options`), and what one file was found to be (`RawFile`)."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pagellm.data.records import WHOLE, Span
from pagellm.data.values import DATE_PATTERNS, TIME_UNITS
from pagellm.data.where import Where
from pagellm.stage.config import check

__all__ = ["Options", "RawFile", "Reading", "listing"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where the raw files are and how to read them."""

    dataset: str = "synthetic"  # synthetic; toys, beauty, sports, instruments, luxury,
    # scientific, food,
    # gift_cards, all_beauty or an official category's name; any other name is a shop of your own
    raw: str = ""  # directory of the raw files, or an address such as s3://bucket/exports, from
    # which they are fetched; empty: <data>/raw/<dataset>
    data: str = "data"  # directory of prepared data sets
    release: str = ""  # 2014, 2018 or 2023: of the files to download; empty: the paper's
    review_files: str = ""  # interaction files within raw, with commas between; empty: recognised
    item_files: str = ""  # item tables within raw, with commas between, or none; empty: recognised
    split: str = "random"  # random (80/10/10 per user), temporal, leave_one_out or given
    train: str = ""  # split=given: file of the training rows; empty: recognised by name
    valid: str = ""  # split=given: file of the validation rows
    test: str = ""  # split=given: file of the test rows
    columns: str = ""  # logs without a heading: the names of their columns, e.g.
    # user,item,rating,time
    item_columns: str = ""  # item tables without a heading: the names of their columns, e.g.
    # item,title,categories
    user_column: str = ""  # logs: column of the user, or several joined by +;
    # empty, here and below: common names are known
    item_column: str = ""  # logs, and item tables without id_column: column of the item
    rating_column: str = ""  # logs: column of the rating
    event_column: str = ""  # logs: column of the event (view, cart, ...), graded by event_values
    time_column: str = ""  # logs: column of the time
    time_form: str = ""  # logs: s, ms, us or ns since 1970; yyyymmdd; iso; or a pattern such as
    # %d/%m/%Y; empty: told from the column, once for all its values
    where: str = ""  # logs: rows to keep, e.g. "quantity > 0 and status != cancelled"
    summary_column: str = ""  # logs: column of the review's headline
    text_column: str = ""  # logs: column of the review's text
    split_column: str = ""  # split=given: column that says train, valid or test
    id_column: str = ""  # item tables: column of the item
    title_column: str = ""  # item tables: column of the title
    brand_column: str = ""  # item tables: column of the brand
    category_column: str = ""  # item tables: column of the categories
    categories: str = ""  # item tables: path (Music > Drums), set (Comedy|Drama) or name (one
    # category a cell); empty: told from the column
    price_column: str = ""  # item tables: column of the price
    description_column: str = ""  # item tables: column of the description
    event_values: str = "view=1,click=2,cart=4,purchase=5"  # grade of each event,
    # on the scale 1 to 5
    rating_min: float = 1.0  # logs: lowest rating of the shop's scale, which is brought to 1..5
    rating_max: float = 5.0  # logs: highest rating of the shop's scale
    min_text: int = 1  # shortest review text that is kept, in characters
    max_text: int = 2000  # longest review text or description, in characters; the rest is cut off

    def __post_init__(self):
        name, form = self.dataset, self.time_form
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
            time_form=(
                form in ("", "iso", *TIME_UNITS, *DATE_PATTERNS) or "%" in form,
                f"{', '.join((*TIME_UNITS, *DATE_PATTERNS))}, iso or a pattern with %",
            ),
            categories=(self.categories in ("", "path", "set", "name"), "path, set or name"),
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
        Where.parse(self.where)

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


class Reading(NamedTuple):
    """What is decided once for a whole column, from a sample of its values."""

    time: str = "s"  # a form of values.time_form
    comma: bool = False  # prices: decimals after a comma
    categories: str = "path"  # path, set or name
    mark: str = ""  # what stands between the categories of a cell


class RawFile(NamedTuple):
    """A file and what it was recognised as."""

    path: Path
    format: str = ""  # a key of raw.FORMATS; "" for a file that nothing can be read from
    role: str = ""  # interactions or items; "": passed over
    spelling: str = ""  # 2014, 2018, 2023; csv, jsonl, parquet; or ""
    kind: str = "other"  # in words: amazon reviews, sequences, log, item table ...
    columns: dict[str, str] = {}  # role of LOG_COLUMNS -> column
    item_columns: dict[str, str] = {}  # role of ITEM_COLUMNS -> column
    names: tuple[str, ...] = ()  # every column
    also: str = ""  # a second role that it can be read in when asked for by option
    split: str = ""  # of all its rows, if the file is of one split
    heading: bool = True  # tables: whether the first line holds the names
    by_line: bool = False  # whether every line is a record, so that the file can be cut
    joined: bool = False  # whether a user may go on in the next file of this format
    span: Span = WHOLE  # the lines to read
    reading: Reading | None = None  # tables: how; None: to be told from the first values

    def __str__(self) -> str:
        taken = self.item_columns if self.role == "items" else self.columns
        roles = ", ".join(f"{role} = {column}" for role, column in taken.items())
        what = roles or ", ".join(self.names)
        form = f"{self.spelling} {self.kind}".strip()
        return f"{self.path.name}: {form} ({what})" if what else f"{self.path.name}: {form}"


def listing(files: list[RawFile]) -> str:
    """One line a file, for messages."""
    return "".join(f"\n    {file}" for file in files) or "\n    (no files)"
