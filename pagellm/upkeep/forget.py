"""Forget a person: take their rows out of a data set, and their traces out of the runs made of it.

    pagellm forget --user C00017 --dataset myshop            says what would go; nothing changes
    pagellm forget --user C00017 --dataset myshop --yes      takes it out

Reads and writes   data/<dataset>: interactions, reviews, orders, dropped rows, the identifier
                   runs/*: pages, scores and pairs of the person; exports and reports that name
                   them are removed as a whole

The person's number stays, with the identifier "<forgotten N>" and no row, so that every other row
of every model keeps its place. Runs that were made from the data go on: what they record of the
data is renewed. A killed command leaves `forgetting.json` in the data set; the same command ends
what was begun.

What stays: the weights have been fitted to the person's rows too. Training anew takes that out; the
person's own row also goes with `pagellm update` to data without them. Raw files are the shop's own.
"""

import csv
import html
import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pagellm.data.shop import forgotten, load, source
from pagellm.stage import hints
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import atomic, file_id, read_json, write_json
from pagellm.stage.run import StageConfig

__all__ = ["Config", "run"]

JOURNAL = "forgetting.json"
TABLES = ("interactions.parquet", "reviews.parquet", "orders.parquet", "dropped.parquet")
ROWS = ("user", "user_id", "customer", "visitor")  # columns that say whose a row is
LINES = (".csv", ".tsv", ".inter", ".user", ".jsonl", ".qrels", ".run", ".trec", ".txt")
WHOLE = (".json", ".html", ".md", ".tex", ".hnsw")
# Files of a stage that hold no person, whatever their identifier looks like.
OWN = {"config.json", "done", "LAST", "lock", "log.jsonl", "timing.jsonl", "vocab.json"}


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Forget a person. Without --yes it only says what would go."""

    run: str = ""  # only this run; empty: every run that was made from the data
    user: str = ""  # the shop's identifier of the person
    yes: bool = False  # take the person out; without it nothing changes

    def __post_init__(self):
        super().__post_init__()
        check(self, user=(bool(self.user), "the shop's identifier of the person"))


class Trace(NamedTuple):
    """A place where the person was found: a file, how many rows of it; 0: the whole file goes."""

    path: Path
    rows: int


def number_of(config: Config) -> int | None:
    """The person's number; None for one whom the k-core left out.

    Raises PageLLMError if the data do not know them.
    """
    folder = config.data_dir
    journal = folder / JOURNAL
    if journal.exists():
        begun = read_json(journal)
        if begun["user"] != config.user:
            raise PageLLMError(
                f"{folder}: forgetting another person was begun and not finished\n"
                f"  Give that command again first; {journal} names them."
            )
        return begun["number"]
    if not (folder / "source.json").exists():
        load(folder)  # raises, and says how to prepare them
    ids = pq.read_table(folder / "users.parquet")["id"].to_pylist()
    if config.user in ids:
        return ids.index(config.user)
    left = folder / "dropped.parquet"
    if left.exists() and config.user in pq.read_table(left)["user_id"].to_pylist():
        return None
    raise PageLLMError(
        f"{folder} knows no user {config.user!r}; identifiers are compared letter by letter"
    )


def theirs(table: pa.Table, user: str, number: int | None) -> pa.ChunkedArray | None:
    """(R,) bool: rows of the person; None if no column says whose a row is."""
    masks = []
    for name in (n for n in ROWS if n in table.column_names):
        column = table[name]
        if pa.types.is_integer(column.type):
            if number is not None:
                masks.append(pc.equal(column, pa.scalar(number, column.type)))
        else:
            masks.append(pc.equal(column.cast(pa.string()), user))
    if not masks:
        return None
    found = pc.fill_null(masks[0], False)
    for mask in masks[1:]:
        found = pc.or_(found, pc.fill_null(mask, False))
    return found


def plain(table: pa.Table) -> pa.Table:
    """The table with its dictionaries made anew: they may hold names that no row has any more."""
    for at, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            column = table[at].cast(field.type.value_type).dictionary_encode()
            table = table.set_column(at, field.name, column.cast(field.type))
    return table


def rewritten(path: Path, user: str, number: int | None, yes: bool) -> int:
    """Take the person's rows out of a Parquet file; returns how many there are."""
    table = pq.read_table(path)
    mask = theirs(table, user, number)
    n = int(pc.sum(mask).as_py() or 0) if mask is not None else 0
    if n and yes:
        with atomic(path) as beside:
            kept = plain(table.filter(pc.invert(mask)))
            pq.write_table(kept, beside, compression="zstd", write_page_checksum=True)
    return n


def names(value: Any, user: str) -> bool:
    """Whether a JSON value names the person: as a text of its own, or as a token <user_ID>."""
    if isinstance(value, dict):
        return any(names(k, user) or names(v, user) for k, v in value.items())
    if isinstance(value, list):
        return any(names(v, user) for v in value)
    return value in (user, f"<user_{user}>")


def spellings(user: str) -> set[str]:
    """The identifier as it stands in a text: plain, in JSON, in a quoted cell, in HTML."""
    quoted = user.replace('"', '""')
    return {user, json.dumps(user)[1:-1], quoted, html.escape(user), html.escape(user, False)}


def may_name(text: str, user: str) -> bool:
    """Whether the identifier stands anywhere in a text, perhaps within a longer word."""
    return any(name in text for name in spellings(user))


def whole_names(path: Path, user: str) -> bool:
    """Whether a file that cannot lose single lines names the person."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if not may_name(text, user):
        return False
    if path.suffix == ".json":
        try:
            return names(json.loads(text), user)
        except ValueError:
            return True
    return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) for name in spellings(user))


def lines_without(path: Path, user: str, number: int | None, yes: bool) -> int:
    """Take the person's records out of a file of lines; returns how many there are.

    Every byte of the other records stays.
    """
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    mark = "" if path.suffix == ".jsonl" else delimiter(text, path.suffix)
    kept, gone = [], 0
    for record in records(text, mark):
        if any(line_names(part, mark, user, number) for part in {record, *cut(record)}):
            gone += 1
        else:
            kept.append(record)
    if gone and yes:
        with atomic(path) as beside:
            beside.write_bytes("".join(kept).encode("utf-8", "surrogateescape"))
    return gone


def cut(text: str) -> list[str]:
    """The lines of a text with their ends; only \\n, \\r and \\r\\n end one."""
    return list(io.StringIO(text, newline=""))


def delimiter(text: str, suffix: str) -> str:
    """What stands between the cells of a table, by its first line."""
    first = text.partition("\n")[0]
    if suffix == ".csv":
        return max(",;\t|", key=first.count)
    return "\t" if "\t" in first else " "


def records(text: str, mark: str) -> Iterator[str]:
    """A file's records, each of its lines: a quoted cell of a table may hold line breaks.

    mark  between the cells; empty: JSON lines
    """
    lines, at = cut(text), 0
    if mark and '"' in text:
        reader = csv.reader(iter(lines), delimiter=mark)
        try:
            for _ in reader:
                yield "".join(lines[at : reader.line_num])
                at = reader.line_num
        except csv.Error:  # a cell beyond the reader's limit: what a quote left open has swallowed
            pass
    yield from lines[at:]


def line_names(record: str, mark: str, user: str, number: int | None = None) -> bool:
    """Whether a cell of a record is the person's identifier, or its field `user` their number.

    mark  between the cells; empty: JSON lines
    """
    if not mark:
        if not may_name(record, user) and '"user"' not in record:
            return False
        try:
            value = json.loads(record)
        except ValueError:
            return may_name(record, user)
        who = value.get("user") if isinstance(value, dict) else None
        return names(value, user) or (type(who) is int and who == number)
    if not may_name(record, user):
        return False
    try:
        return any(user in row for row in csv.reader(cut(record), delimiter=mark))
    except csv.Error:
        return True


def exports(run: Path) -> list[Path]:
    """Directories of the run that hold rows of all users in the order of a list of identifiers."""
    found = [p.parent for p in run.rglob("user_ids.json")]
    return sorted({*found, *(p.parent for p in run.rglob("pagellm.json"))})


def traces_in_run(run: Path, config: Config, number: int | None) -> Iterator[Trace]:
    """Where a run knows the person; with --yes it is taken out."""
    for folder in exports(run):
        if any(whole_names(p, config.user) for p in folder.glob("*.json")):
            if config.yes:
                shutil.rmtree(folder)
            yield Trace(folder, 0)
    for path in sorted(p for p in run.rglob("*") if p.is_file() and p.name not in OWN):
        if path.suffix == ".parquet":
            if n := rewritten(path, config.user, number, config.yes):
                yield Trace(path, n)
        elif path.suffix in LINES:
            if n := lines_without(path, config.user, number, config.yes):
                yield Trace(path, n)
        elif path.suffix in WHOLE and path.name != "tokenizer.json":
            if whole_names(path, config.user):
                if config.yes:
                    path.unlink()
                yield Trace(path, 0)
    # Of an interrupted pre-training; pages made ahead, under keys that name nobody.
    ahead = sorted(path.parent for path in run.rglob("cache.sqlite"))
    for folder in (run / "pretrain" / "tokens", *ahead):
        if folder.exists():
            if config.yes:
                shutil.rmtree(folder)
            yield Trace(folder, 0)


def runs_of(config: Config, ids: set[str]) -> list[Path]:
    """The run named, or every run of which a stage was made from the data."""
    runs = Path(config.runs)
    if config.run and not (runs / config.run).is_dir():
        raise PageLLMError(f"no run {config.run} in {runs}; see them with: pagellm runs")
    found: dict[Path, None] = {}
    for made in runs.rglob("config.json") if runs.is_dir() else ():
        if "inputs" in (about := read_json(made)) and about["inputs"].get("data") in ids:
            found[made.parent.parent.resolve()] = None
    if not config.run:
        return sorted(found)
    named = (runs / config.run).resolve()
    if not any(path == named or named in path.parents for path in found):
        raise PageLLMError(
            f"{runs / config.run} was not made from {config.data_dir}, so its numbers of users are "
            "others\n  Name its own --dataset, or leave --run out."
        )
    return [named]


def renew(runs: Path, before: str, after: str) -> None:
    """Let every stage that was made from the data go on: it names them by their hash."""
    if not runs.is_dir():
        return
    for made in runs.rglob("config.json"):
        about = read_json(made)
        if isinstance(about.get("inputs"), dict) and about["inputs"].get("data") == before:
            write_json(made, about | {"inputs": about["inputs"] | {"data": after}})


def traces_in_data(config: Config, number: int | None) -> Iterator[Trace]:
    """Where the data know the person; with --yes it is taken out, the identifier last."""
    folder = config.data_dir
    for path in (folder / name for name in TABLES):
        if path.exists() and (n := rewritten(path, config.user, number, config.yes)):
            yield Trace(path, n)
    path = folder / "users.parquet"
    table = pq.read_table(path)
    ids = table["id"].to_pylist()
    if number is not None and ids[number] == config.user:
        if config.yes:
            ids[number] = forgotten(number)
            at = table.schema.get_field_index("id")
            with atomic(path) as beside:
                pq.write_table(
                    table.set_column(at, "id", pa.array(ids, pa.string())),
                    beside,
                    compression="zstd",
                )
        yield Trace(path, 1)


def knows(folder: Path, user: str) -> bool:
    """Whether a prepared data set has the person, above the k-core or below it."""
    for name, column in (("users.parquet", "id"), ("dropped.parquet", "user_id")):
        path = folder / name
        if path.exists() and user in pq.read_table(path, columns=[column])[column].to_pylist():
            return True
    return False


def resealed(folder: Path) -> str:
    """Write the hashes of the files as they are now into source.json; returns its new id."""
    about = source(folder)
    written = {name: file_id(folder / name) for name in about["written"]}
    write_json(folder / "source.json", about | {"written": written})
    return file_id(folder / "source.json")


def tell(found: list[Trace], config: Config, raw: Path) -> None:
    """Print what went, or would go, and what stays."""
    verb = "went" if config.yes else "would go"
    for trace in found:
        what = hints.counted(trace.rows, "row") if trace.rows else "all of it"
        print(f"forget: {trace.path}: {what} {verb}")
    if not found:
        print("forget: nothing is left of this person here")
    stays = [
        "the weights: they were fitted to these rows too; training anew takes that out",
        f"raw files, which are yours: {raw} if it is there; without the person there, the next "
        "prepare has none of them",
        "answers in the memory of a running service: until its next look at the files (--reload)",
    ]
    print("forget: what stays:\n  " + "\n  ".join(stays))
    if not config.yes:
        print("forget: nothing was changed; --yes does it")


def run(config: Config) -> list[Trace]:
    """Say, or do, what is said above; returns where the person was found."""
    folder, number = config.data_dir, number_of(config)
    journal = folder / JOURNAL
    before = file_id(folder / "source.json")
    begun = journal.exists()
    runs = runs_of(config, {before, read_json(journal)["before"]} if begun else {before})
    if config.yes and not begun:
        load(folder)  # what was changed by others must not be sealed
        write_json(journal, {"user": config.user, "number": number, "before": before})
    found = []
    for path in runs:
        found += list(traces_in_run(path, config, number))
    found += list(traces_in_data(config, number))
    if config.yes:
        first, after = read_json(journal)["before"], resealed(folder)
        renew(Path(config.runs), first, after)
        journal.unlink()
    tell(found, config, Path(config.data) / "raw" / config.dataset)
    homes = sorted(path.parent for path in Path(config.data).glob("*/source.json"))
    if others := [home.name for home in homes if home != folder and knows(home, config.user)]:
        print(
            f"forget: other data sets know the person too: {', '.join(others)}; give the command "
            "for each, with its --dataset"
        )
    if config.yes and any((path / "compose").exists() for path in runs):
        again = hints.command("compose", config.dataset, config.run)
        print(f"forget: composed pages keep judges that were fitted to the rows; anew: {again}")
    return found


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm forget"))
