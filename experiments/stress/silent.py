"""Silent faults: a clean shop's files are changed, one change at a time, and `prepare` must notice.

    python -m experiments.stress.torture --suites silent --mutations 500

Each trial writes a small clean shop (CSV, JSON lines or Parquet, in one part or two, ids of three
kinds), prepares it, changes its files, and prepares it again. Of three ends one is right:

    nothing    the prepared tables are the same
    named      they differ, and a line that the clean shop's account does not have names the change
    refused    exit by a message, without a traceback, that names it

A change that moves a table without a word is silent, which is a failure.
"""

import contextlib
import io
import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pagellm.data import prepare
from pagellm.stage.config import PageLLMError

__all__ = ["MUTATIONS", "Files", "Result", "Shops", "clean", "judge", "prepared"]

START, DAY = 1_400_000_000, 86_400
Row = dict[str, Any]


@dataclass
class Files:
    """A shop as rows, and how they are to be written."""

    log: list[list[Row]]  # the rows of every part
    items: list[Row]
    form: str = "csv"  # csv, jsonl or parquet
    mark: str = ","  # between the columns of a CSV file
    encoding: str = "utf-8"
    ends: str = "\n"
    headings: list[bool] = field(default_factory=lambda: [True] * 9)  # of each part
    names: list[str] = field(default_factory=lambda: [f"log-{n:02d}" for n in range(9)])
    after: list[Callable[[Path], None]] = field(default_factory=list)  # done to the folder written

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        for n, rows in enumerate(self.log):
            self.write_one(folder / f"{self.names[n]}.{self.form}", rows, self.headings[n])
        self.write_one(folder / f"items.{self.form}", self.items)
        for act in self.after:
            act(folder)

    def write_one(self, path: Path, rows: list[Row], heading: bool = True) -> None:
        names = list(rows[0])
        if self.form == "parquet":
            pq.write_table(pa.table({n: [row.get(n) for row in rows] for n in names}), path)
            return
        if self.form == "jsonl":
            lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        else:
            lines = [self.mark.join(names)] if heading else []
            lines += [self.mark.join(self.cell(row.get(n)) for n in names) for row in rows]
        path.write_bytes((self.ends.join(lines) + self.ends).encode(self.encoding))

    def cell(self, value) -> str:
        text = "" if value is None else str(value)
        return f'"{text}"' if self.mark in text else text


def clean(draw: random.Random) -> Files:
    """A shop without a fault: 12 users, 10 items, ids of one of three kinds."""
    kind = draw.choice(["text", "padded", "numbers"])
    name = {
        "text": lambda n: f"K{n:03d}",
        "padded": lambda n: f"{n:05d}",
        "numbers": lambda n: 100 + n,
    }[kind]
    rows: list[Row] = [
        {
            "user_id": name(u),
            "item_id": name(500 + i),
            "rating": 1 + (3 * u + 2 * i) % 5,
            "timestamp": START + 7 * DAY * ((u * 7 + i * 3) % 11) + 60 * (u * 10 + i),
            "text": f"was {'good' if (u + i) % 2 else 'not good'} enough for u{u} of i{i}",
        }
        for u in range(12)
        for i in range(10)
        if (u * i) % 4 != 3
    ]
    items: list[Row] = [
        {
            "item_id": name(500 + i),
            "title": f"Lamp {'red' if i % 2 else 'blue'} {i}",
            "brand": f"Brand {i % 3}",
            "category": f"Home > {'Light' if i % 2 else 'Kitchen'} > Kind {i % 4}",
            "price": round(5.25 + 3.5 * i, 2),
            "description": f"A lamp of {i} parts, made at home",
        }
        for i in range(10)
    ]
    parts = draw.choice([1, 2, 3])
    form = draw.choice(["csv", "csv", "jsonl", "parquet"])
    return Files([rows[n::parts] for n in range(parts)], items, form)


# A mutation changes Files and returns patterns, one of which a new line on the screen must show
# where the tables have changed. None: it does not apply to this shop.
Mutation = Callable[[Files, random.Random], "tuple[str, ...] | None"]
MUTATIONS: dict[str, Mutation] = {}


def mutation(do: Mutation) -> Mutation:
    MUTATIONS[do.__name__] = do
    return do


def every_row(f: Files) -> list[Row]:
    return [row for part in f.log for row in part]


def some_rows(f: Files, draw: random.Random, share: float) -> list[Row]:
    rows = every_row(f)
    return draw.sample(rows, max(1, round(share * len(rows))))


def renamed(rows: list[Row], old: str, new: str) -> None:
    for row in rows:
        for name in list(row):  # the order of the columns stays
            row[new if name == old else name] = row.pop(name)


LOG, TABLE = ("rating", "timestamp", "text"), ("title", "brand", "category", "price", "description")


@mutation
def drop_a_column_of_the_log(f, draw):
    name = draw.choice(["user_id", "item_id", *LOG])
    for row in every_row(f):
        del row[name]
    return {"timestamp": ("no .*time",), "text": ("review text in 0 of",)}.get(
        name, (name.removesuffix("_id"),)
    )


@mutation
def drop_a_column_of_the_item_table(f, draw):
    name = draw.choice(["item_id", *TABLE])
    for row in f.items:
        del row[name]
    return (f"no {name}", r"items\.\w+ \(", "item table")


@mutation
def drop_a_column_of_one_part(f, draw):
    if len(f.log) < 2:
        return None
    name = draw.choice(LOG)
    for row in f.log[-1]:
        del row[name]
    return (name.replace("timestamp", "time"), f.names[len(f.log) - 1])


@mutation
def rename_a_column(f, draw):
    old = draw.choice(LOG)
    new = draw.choice(["x17", "points_given", "when", "opinion 2", "my_score", "seen_at"])
    renamed(every_row(f), old, new)
    return (re.escape(new),)


@mutation
def rename_a_column_of_the_item_table(f, draw):
    new = draw.choice(["x17", "sales cost", "label", "kind_of"])
    renamed(f.items, draw.choice(TABLE), new)
    return (re.escape(new),)


@mutation
def spell_a_column_in_another_known_way(f, draw):
    old, ways = draw.choice(
        [
            ("user_id", ["User ID", "userId", "customer_id", "uid"]),
            ("item_id", ["ItemID", "product_id", "sku", "item"]),
            ("timestamp", ["time", "Date", "createdAt", "event_time"]),
            ("rating", ["Stars", "Rating (1-5)", "overall"]),
        ]
    )
    renamed(every_row(f), old, draw.choice(ways))
    return ()


@mutation
def exchange_two_headings(f, draw):
    a, b = draw.choice([("rating", "timestamp"), ("user_id", "item_id"), ("user_id", "rating")])
    for part in f.log:
        names = list(part[0])
        swapped = [b if n == a else a if n == b else n for n in names]
        part[:] = [dict(zip(swapped, (row[n] for n in names), strict=True)) for row in part]
    return (r"rating outside", "WARNING", "broken")


@mutation
def shift_the_unit_of_all_times(f, draw):
    factor = draw.choice([1000, 10**6, 1 / 60, 1 / DAY])
    told = ("time in",) if factor < 1 else ()
    for row in every_row(f):
        row["timestamp"] = int(row["timestamp"] * factor)
    return told


@mutation
def shift_the_unit_of_some_times(f, draw):
    for row in some_rows(f, draw, draw.choice([0.01, 0.1, 0.5])):
        row["timestamp"] = row["timestamp"] * 1000
    return ("mixes units", "absurd time", "time")


@mutation
def cut_the_clock_from_the_times(f, draw):
    for row in every_row(f):
        row["timestamp"] -= row["timestamp"] % DAY
    return ("whole days",)


@mutation
def shift_the_scale_of_ratings(f, draw):
    factor, more = draw.choice([(2, 0), (20, 0), (0.2, 0), (1, -1), (1, 1)])
    for row in every_row(f):
        row["rating"] = row["rating"] * factor + more
    return ("rating outside", "broken")


@mutation
def shift_the_scale_of_one_rating(f, draw):
    draw.choice(every_row(f))["rating"] = draw.choice([0, 6, 50, -1])
    return ("rating outside", "broken")


@mutation
def write_ratings_in_words(f, draw):
    if f.form == "parquet":
        return None
    for row in some_rows(f, draw, draw.choice([0.005, 0.2, 1.0])):
        row["rating"] = f"{row['rating']} stars"
    return ("rating",)


@mutation
def take_ratings_away(f, draw):
    for row in some_rows(f, draw, draw.choice([0.05, 0.5, 1.0])):
        row["rating"] = None
    return ("rating in",)


@mutation
def take_times_away(f, draw):
    for row in some_rows(f, draw, draw.choice([0.05, 0.5, 1.0])):
        row["timestamp"] = None
    return ("time in", "needs times")


@mutation
def pad_the_users_of_some_rows(f, draw):
    if f.form == "parquet" and isinstance(every_row(f)[0]["user_id"], int):
        return None
    for row in (
        draw.choice([f.log[-1], some_rows(f, draw, 0.2)]) if len(f.log) > 1 else f.log[0][:9]
    ):
        row["user_id"] = f"00{row['user_id']}"
    return (r"users? (is|are) written in several ways",)


@mutation
def unpad_the_items_of_some_rows(f, draw):
    name = str(every_row(f)[0]["item_id"])
    if not name.startswith("0"):
        return None
    for row in some_rows(f, draw, 0.3):
        row["item_id"] = str(row["item_id"]).lstrip("0")
    return (r"items? (is|are) written in several ways",)


@mutation
def unpad_the_ids_of_the_item_table(f, draw):
    if not str(f.items[0]["item_id"]).startswith("0"):
        return None
    for row in f.items:
        row["item_id"] = str(row["item_id"]).lstrip("0")
    return ("0 of 10 items",)


@mutation
def put_blanks_behind_some_ids(f, draw):
    if f.form == "parquet" and isinstance(every_row(f)[0]["user_id"], int):
        return None
    for row in some_rows(f, draw, 0.2):
        row["user_id"] = f"{row['user_id']} "
    return (r"users? (is|are) written in several ways",)


@mutation
def write_some_ids_in_small_letters(f, draw):
    for row in some_rows(f, draw, 0.3):
        row["user_id"] = (
            row["user_id"].lower() if isinstance(row["user_id"], str) else row["user_id"]
        )
    return (r"users? (is|are) written in several ways",)


@mutation
def write_ids_as_floats(f, draw):
    if not isinstance(every_row(f)[0]["user_id"], int):
        return None
    for row in every_row(f):
        row["user_id"] = float(row["user_id"])
    return ()


@mutation
def write_no_user_in_some_rows(f, draw):
    word = draw.choice(["NULL", "nan", "", "None", "\\N"])
    for row in some_rows(f, draw, draw.choice([0.05, 0.3])):
        row["user_id"] = None if f.form == "parquet" else word
    return ("no user",)


@mutation
def duplicate_a_part(f, draw):
    f.log.append([dict(row) for row in draw.choice(f.log)])
    return ()


@mutation
def duplicate_some_rows(f, draw):
    f.log[0] += [dict(row) for row in some_rows(f, draw, 0.2)]
    return ()


@mutation
def contradict_some_rows(f, draw):
    rows = [dict(row, rating=6 - row["rating"]) for row in some_rows(f, draw, 0.2)]
    f.log[0] += rows
    return ("duplicates",)


@mutation
def lose_a_part(f, draw):
    if len(f.log) < 3:
        return None
    del f.log[1]
    f.names = [f.names[0], *f.names[2:]]
    return ("number 1 is not there",)


@mutation
def lose_some_rows(f, draw):
    f.log[0] = draw.sample(f.log[0], len(f.log[0]) * 2 // 3)
    return (r"lines read",)


@mutation
def drop_a_heading(f, draw):
    if f.form != "csv":
        return None
    f.headings[draw.randrange(len(f.log))] = False
    return ("no heading", "without a heading", "passed over")


@mutation
def drop_the_heading_of_the_item_table(f, draw):
    if f.form != "csv":
        return None

    def act(folder):
        path = folder / "items.csv"
        path.write_text(path.read_text().split("\n", 1)[1])

    f.after.append(act)
    return (r"items\.csv",)


@mutation
def put_a_note_above_the_heading(f, draw):
    if f.form != "csv":
        return None

    def act(folder):
        for path in folder.glob("log*"):
            path.write_text("exported on Monday\n" + path.read_text())

    f.after.append(act)
    return (r"log-\d\d",)


@mutation
def break_a_file_off(f, draw):
    if f.form == "parquet":
        return None
    share = draw.uniform(0.3, 0.99)

    def act(folder):
        path = sorted(folder.glob("log*"))[0]
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    f.after.append(act)
    return ("has no end", "broken", r"lines read")


@mutation
def shuffle_lines(f, draw):
    for part in f.log:
        draw.shuffle(part)
    draw.shuffle(f.items)
    return ()


@mutation
def split_a_part(f, draw):
    part = f.log.pop()
    cut = draw.randrange(1, len(part))
    f.log += [part[:cut], part[cut:]]
    return ()


@mutation
def order_columns_anew(f, draw):
    names = list(f.log[0][0])
    draw.shuffle(names)
    f.log = [[{n: row[n] for n in names} for row in part] for part in f.log]
    return ()


@mutation
def write_in_another_dialect(f, draw):
    if f.form != "csv":
        return None
    f.mark = draw.choice([";", "\t", "|", ","])
    f.encoding = draw.choice(["utf-8", "utf-8-sig", "utf-16"])
    f.ends = draw.choice(["\n", "\r\n", "\r"])
    return ()


@mutation
def write_in_another_form(f, draw):
    f.form = draw.choice(["csv", "jsonl", "parquet"])
    return ()


@mutation
def add_an_unknown_column(f, draw):
    for row in every_row(f):
        row["batch"] = "A"
    return ()


@mutation
def add_a_column_of_numbers(f, draw):
    name = draw.choice(["quantity", "helpful_votes"])
    for n, row in enumerate(every_row(f)):
        row[name] = n % 7
    return ()


@mutation
def add_a_rival_column(f, draw):
    name = draw.choice(["user", "customer_id"])
    for n, row in enumerate(every_row(f)):
        row[name] = n
    return (" is not",)


@mutation
def put_other_files_beside(f, draw):
    def act(folder):
        (folder / "README.txt").write_text("about these files, written by hand\n")
        (folder / "old").mkdir()
        (folder / "photo.bin").write_bytes(bytes(range(256)) * 9)

    f.after.append(act)
    return ()


@mutation
def put_a_second_log_beside(f, draw):
    def act(folder):
        first = sorted(folder.glob("log*"))[0]
        shutil.copy(first, folder / f"sessions{first.suffix}")

    f.after.append(act)
    return ("several sets",)


@mutation
def lose_rows_of_the_item_table(f, draw):
    f.items = draw.sample(f.items, draw.choice([1, 5, 9]))
    return ("of 10",)


@mutation
def lose_the_item_table(f, draw):
    f.after.append(lambda folder: next(folder.glob("items*")).unlink())
    return (r"read +log",)


@mutation
def repeat_rows_of_the_item_table(f, draw):
    some = draw.sample(f.items, 3)
    f.items = [dict(row, title=f"Another {n}") for n, row in enumerate(some)] + f.items
    return ("further lines",)


@mutation
def empty_a_field_of_the_item_table(f, draw):
    name = draw.choice(TABLE)
    n = draw.choice([1, 5, 10])
    for row in draw.sample(f.items, n):
        row[name] = None
    return (rf"{name} {10 - n}\b",)


@mutation
def write_prices_in_cents(f, draw):
    for row in f.items:
        row["price"] = round(row["price"] * 100)
    return ("prices",)


@mutation
def write_prices_with_marks(f, draw):
    if f.form == "parquet":
        return None
    form = draw.choice(["${:.2f}", "{:.2f} EUR", "£ {:.2f}"])
    for row in f.items:
        row["price"] = form.format(row["price"])
    return ()


@mutation
def write_prices_that_cannot_be_read(f, draw):
    if f.form == "parquet":
        return None
    for row in draw.sample(f.items, draw.choice([1, 5, 10])):
        row["price"] = "ask us"
    return ("price",)


@mutation
def part_categories_otherwise(f, draw):
    mark = draw.choice(["|", ";", "/", " "])
    for row in f.items:
        row["category"] = str(row["category"]).replace(" > ", mark)
    return ("category is read",)


@mutation
def write_times_as_text(f, draw):
    form = draw.choice(["%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S", "%Y/%m/%d %H:%M:%S"])
    for row in every_row(f):
        row["timestamp"] = datetime.fromtimestamp(row["timestamp"], UTC).strftime(form)
    return ()


@mutation
def write_one_odd_time(f, draw):
    draw.choice(every_row(f))["timestamp"] = draw.choice([-5, 9_999_999_999, 5])
    return ("time",)


@mutation
def write_letters_of_another_encoding(f, draw):
    if f.form != "csv":
        return None
    for row in every_row(f)[:4]:
        row["text"] = "très bien, très cher"
    f.encoding = "latin-1"
    return ("not UTF-8",)


@dataclass
class Result:
    """How a shop was prepared: the tables by the shop's own ids, and the words on the screen."""

    tables: object
    said: str
    refused: bool = False


def prepared(files: Files, folder: Path) -> Result:
    """Prepare the files. A fault other than a message is raised."""
    shutil.rmtree(folder, ignore_errors=True)
    files.write(folder / "raw")
    out = io.StringIO()
    options: dict[str, Any] = {
        "dataset": "shop",
        "raw": str(folder / "raw"),
        "data": str(folder / "data"),
    }
    try:
        with contextlib.redirect_stdout(out):
            path = prepare.run(prepare.Config(**options, k_core=1, split="leave_one_out"))
    except PageLLMError as error:
        return Result(None, f"{out.getvalue()}{error}", True)
    users, items = (
        pq.read_table(path / f"{name}.parquet").to_pylist() for name in ("users", "items")
    )
    rows = pq.read_table(path / "interactions.parquet").to_pylist()
    own = [dict(r, user=users[r["user"]]["id"], item=items[r["item"]]["id"]) for r in rows]
    texts = pq.read_table(path / "reviews.parquet").to_pylist()
    tables = (own, items, users, sorted(texts, key=str))
    return Result(tables, out.getvalue())


def judge(before: Result, after: Result, patterns: tuple[str, ...]) -> str:
    """nothing, named, refused, or silent."""
    if not after.refused and after.tables == before.tables:
        return "nothing"
    old = set(before.said.splitlines())
    new = "\n".join(line for line in after.said.splitlines() if line not in old)
    if any(re.search(pattern, new, re.IGNORECASE) for pattern in patterns):
        return "refused" if after.refused else "named"
    return "silent"


class Shops:
    """Clean shops, each prepared once."""

    def __init__(self, folder: Path, n: int = 40):
        self.folder, self.n = folder, n
        self.results: dict[int, Result] = {}

    def result(self, number: int) -> Result:
        if number not in self.results:
            result = prepared(clean(random.Random(number)), self.folder / "clean")
            if result.refused:
                raise RuntimeError(f"the clean shop {number} is refused: {result.said}")
            self.results[number] = result
        return self.results[number]

    def trial(self, draw: random.Random, name: str) -> tuple[str, str]:
        """(how it ended, what was said) of one mutation of a shop to which it applies."""
        while True:
            number = draw.randrange(self.n)
            changed = clean(random.Random(number))
            patterns = MUTATIONS[name](changed, draw)
            if patterns is not None:
                break
        after = prepared(changed, self.folder / "changed")
        return judge(self.result(number), after, patterns), after.said
