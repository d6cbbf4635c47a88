"""The account: what `prepare` decided, in a short paragraph on the screen and in source.json.

It names the files and folders that were read and passed over, and the columns taken for each role
and left over. It counts rows with and without rating and time, items that the item table knows,
prices that could not be read, and what the k-core removed. It states the scale of the ratings.
Whatever changes the meaning of the data is a warning.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

import numpy as np

from pagellm.data import logs
from pagellm.data.evidence import is_numeric
from pagellm.data.files import Options, RawFile
from pagellm.data.packed import is_plain
from pagellm.data.raw import Raw
from pagellm.data.records import Item, Tally
from pagellm.data.text_store import Columns
from pagellm.data.values import NO_TIME
from pagellm.data.where import Where
from pagellm.stage.hints import counted

__all__ = ["DAY", "Account", "Join", "RowsOf", "Seen", "account_of", "is_unknown", "several"]

RowsOf = Callable[[list[str]], int]
SHOWN = 6  # names shown of a longer list
MOST_LINES = 23  # lines of the paragraph; two more follow, what was written and what was left out
JOINED = 0.1  # if an item table knows fewer of the log's items, it is of something else
# Role -> what a column's name holds if it may be meant for it.
NEAR = {
    "user": ("user", "customer", "visitor", "client", "member"),
    "item": ("item", "product", "article"),
    "rating": ("rating", "score", "stars", "grade"),
    "time": ("time", "date"),
    "title": ("title", "name"),
    "price": ("price", "cost"),
    "category": ("categor", "genre"),
}
# Words that stand for no value in some shops, and for themselves in others.
NOBODY = {"na", "n/a", "(null)", "(none)", "undefined", "unknown", "anonymous", "guest", "-", "?"}
NOBODY |= {"-1", "missing", "(blank)", "not set", "(not set)"}
MOST_GRADES = 1000  # different values in a sample, above which a column does not grade anything
# Roles that most shops have: the account says so where a file has no column for one of them.
COMMON = {"interactions": ("rating", "time"), "items": tuple(logs.ITEM_COLUMNS)}
DAY = 86_400  # seconds
NUMBERING = re.compile(r"(id|no|number|code|index)$")
NAMES = {"paths": "category"}  # field of an Item -> what a reader calls it
UNITS = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}


@dataclass
class Join:
    """How the item table met the items of the log."""

    lines: int = 0
    items: int = 0  # of the log, after the k-core
    known: set = field(default_factory=set)  # those of them that the table has
    repeated: int = 0  # lines of the table about an item that an earlier line was about
    fields: dict = field(default_factory=dict)  # title, brand ... -> items that have one
    prices: tuple = ()  # lowest and highest
    stranger: str = ""  # the first of the table that the log does not have
    missing: str = ""  # the first of the log that the table does not have

    def fill(self, rows: list[Item], known: set[str]) -> None:
        """rows: one for each item, in order, empty where the table says nothing."""
        self.items, self.known = len(rows), known
        self.missing = next((row.id for row in rows if row.id not in known), "")
        self.fields = {
            NAMES.get(name, name): sum(not is_unknown(row[at]) for row in rows)
            for at, name in enumerate(Item._fields)
            if at
        }
        prices = [row.price for row in rows if not is_unknown(row.price)]
        self.prices = (min(prices), max(prices)) if prices else ()


@dataclass
class Account:
    """Lines for the screen, warnings, and the same as values for source.json."""

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: dict = field(default_factory=dict)

    def say(self, what: str, text: str) -> None:
        self.lines.append(f"  {what:<10} {text}")

    def text(self, before: int = 0) -> str:
        """At most MOST_LINES lines with those that were printed before, warnings last and whole."""
        warned = [f"  WARNING    {text}" for text in self.warnings]
        room = max(1, MOST_LINES - before - len(warned))
        shown = self.lines if len(self.lines) <= room else self.lines[: room - 1]
        more = len(self.lines) - len(shown)
        left = [f"  and {more} more lines: see `read` in source.json"] if more else []
        return "\n".join(shown + left + warned)


def is_unknown(value) -> bool:
    """Whether a field of an Item is empty: "", (), NaN."""
    return math.isnan(value) if isinstance(value, float) else not value


def several(names: list[str]) -> str:
    """The first few names, and the number of the others."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def share(part: int, whole: int) -> str:
    """ "9 of 10 (90.0%)"; only all are 100.0%, and only none are 0.0%."""
    if not whole:
        return f"{part:,} of {whole:,}"
    rounded = part / whole if part in (0, whole) else min(max(part / whole, 0.001), 0.999)
    return f"{part:,} of {whole:,} ({rounded:.1%})"


@dataclass(frozen=True)
class Seen:
    """What the account tells of the rows that were kept, whoever counted them."""

    rows: int
    rated: int  # rows with a rating
    timed: int  # rows with a time
    texts: int  # rows with a text
    first: float  # earliest time, seconds since 1970
    last: float
    whole_days: bool  # no time has a clock
    user_ids: Iterable[str]  # in order, to be gone through more than once
    item_ids: Iterable[str]
    rows_of_users: RowsOf  # some identifiers -> how many rows they have
    rows_of_items: RowsOf

    @classmethod
    def of(cls, columns: Columns) -> "Seen":
        """Counted in memory."""
        known = columns.time[columns.time != NO_TIME]

        def rows_of(numbers: np.ndarray, ids: list[str]) -> RowsOf:
            return lambda names: int(np.isin(numbers, [ids.index(name) for name in names]).sum())

        return cls(
            rows=len(columns.user),
            rated=int((~np.isnan(columns.rating)).sum()),
            timed=len(known),
            texts=int((columns.tie > 0).sum()),
            first=float(known.min()) if len(known) else 0.0,
            last=float(known.max()) if len(known) else 0.0,
            whole_days=not (known % DAY).any(),
            user_ids=columns.user_ids,
            item_ids=columns.item_ids,
            rows_of_users=rows_of(columns.user, columns.user_ids),
            rows_of_items=rows_of(columns.item, columns.item_ids),
        )


class Rules(Protocol):
    """Options of `prepare` that the account names, beside those of the raw files."""

    @property
    def positive_above(self) -> float: ...

    @property
    def k_core(self) -> int: ...


def account_of(
    raw: Raw, rules: Rules, tally: Tally, item_tally: Tally, seen: Seen, counts: dict, join: Join
) -> Account:
    """seen: what was kept; counts: of prepare.filtered."""
    account = Account(warnings=list(raw.warnings))
    files(account, raw, raw.options)
    for key, n in (tally.later + item_tally.later).most_common(SHOWN):
        account.warnings.append(
            f"{key!r} begins after the first {logs.SAMPLE:,} lines, is in {counted(n, 'line')}, "
            "and is not "
            "read; move such a line to the front"
        )
    rows(account, raw, rules, tally, seen, counts)
    for what, ids, rows_of in (
        ("users", seen.user_ids, seen.rows_of_users),
        ("items", seen.item_ids, seen.rows_of_items),
    ):
        alike(account, what, ids)
        nobody(account, what, ids, rows_of)
    if raw.item_files:
        items(account, raw, item_tally, join)
    if counts.get("k_core"):
        core(account, rules, counts["k_core"])
    account.facts["warnings"] = account.warnings
    return account


def alike(account: Account, what: str, ids: Iterable[str]) -> None:
    """Identifiers that differ in what a program may have changed underway: zeros in front, blanks,
    capitals. One user who is written in two ways counts as two.

    ids  is gone through twice: first for a hash of each, so that millions of them fit in memory
    """
    codes = np.fromiter((hash(bare(name).casefold()) for name in ids), np.int64)
    codes.sort()
    repeated = set(codes[1:][codes[1:] == codes[:-1]].tolist())
    of: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in ids if repeated else ():
        short = bare(name)
        if hash(short.casefold()) in repeated:
            of[short.casefold()][short].append(name)
    several_ways = [
        (same, [name for names in same.values() for name in names])
        for same in of.values()
        if sum(map(len, same.values())) > 1
    ]
    if not several_ways:
        return
    same, names = several_ways[0]
    zeros = any(len(names) > 1 for same, _ in several_ways for names in same.values())
    text = (
        f"{counted(len(several_ways), what[:-1])} {'is' if len(several_ways) == 1 else 'are'} "
        "written in several ways, such as "
        f"{' and '.join(map(repr, sorted(names)[:2]))}; each way counts as one of its own"
    )
    account.facts[f"{what}_written_in_several_ways"] = len(several_ways)
    if zeros:  # many shops tell ids apart by capitals, and few by zeros or blanks
        account.warnings.append(text)
    else:
        account.say("", text)


def bare(name: str) -> str:
    """An identifier without blanks around it and zeros before it."""
    return name.strip().lstrip("0")


def nobody(account: Account, what: str, ids: Iterable[str], rows_of: RowsOf) -> None:
    """Identifiers that may stand for none: they are kept, since a shop may name somebody so."""
    found = [name for name in ids if name.strip().casefold() in NOBODY]
    if found:
        account.say(
            "",
            f"{what} named {several([repr(name) for name in found])} have "
            f"{counted(rows_of(found), 'row')}; if they stand for none, leave them out by --where",
        )
        account.facts[f"{what}_that_may_be_none"] = found


def files(account: Account, raw: Raw, options: Options) -> None:
    """Files read, passed over, and their columns."""
    names = [f"{f.path.name} ({f.spelling} {f.kind})".replace("( ", "(") for f in raw.review_files]
    names += [f"{f.path.name} (items)" for f in raw.item_files]
    account.say("read", several(names))
    if raw.passed:
        account.say("not read", several(raw.passed))
    account.facts["passed_over"], account.facts["columns"] = raw.passed, {}
    where, said = Where.parse(options.where), set()
    for file in raw.review_files + raw.item_files:
        if not file.names or (file.role, file.names) in said:
            continue
        said.add((file.role, file.names))
        taken = file.item_columns if file.role == "items" else file.columns
        also = [f.item_columns.values() for f in raw.item_files if f.path == file.path]
        also += [f.columns.values() for f in raw.review_files if f.path == file.path]
        used = {
            *taken.values(),
            *where.of(file.names).columns,
            *(name for names in also for name in names),
        }
        used |= {part for name in used for part in name.split("+")}
        left = [name for name in file.names if name and name not in used]
        form = file.reading.time if file.reading else "s"
        absent = [role for role in COMMON[file.role] if role not in taken]
        if "event" in taken and "rating" in absent:
            absent.remove("rating")
        shown = ", ".join(
            f"{role} = {name}" + (f" ({UNITS.get(form, form)})" if role == "time" else "")
            for role, name in taken.items()
        )
        shown += f"; no {', no '.join(absent)}" if absent else ""
        account.say(file.path.name, shown + (f"; left over: {several(left)}" if left else ""))
        account.facts["columns"][f"{file.path.name} {file.role}"] = {"taken": taken, "left": left}
        if len(set(file.names)) < len(file.names):
            twice = sorted({name for name in file.names if file.names.count(name) > 1})
            account.warnings.append(
                f"{file.path.name}: column {several(twice)} stands there twice; the first is read"
            )
        near_misses(account, raw, file, options, taken, left)
    cut = [f.path.name for f in raw.review_files + raw.item_files if ends_open(f)]
    if cut:
        account.say("", f"the last line of {several(cut)} has no end: was the file cut short?")


def ends_open(file: RawFile) -> bool:
    """Whether a text file's last line has no line end, as where a copy was broken off."""
    if file.spelling == "parquet" or not file.path.stat().st_size or not is_plain(file.path):
        return False
    with open(file.path, "rb") as data:
        data.seek(-1, 2)
        return data.read(1) != b"\n"


def near_misses(
    account: Account, raw: Raw, file: RawFile, options: Options, taken: dict, left: list[str]
) -> None:
    """Columns that were not used, but whose names look like a role that was not found."""
    roles = logs.ITEM_COLUMNS if file.role == "items" else logs.LOG_COLUMNS
    name = file.path.name
    for role, others in logs.rivals(file, options.chosen(roles)).items():
        text = f"{name}: {taken[role]} is taken for the {role}, {' and '.join(others)} is not"
        if role in ("user", "item"):
            account.warnings.append(f"{text}; --{role}_column decides")
        else:
            account.say("", f"{text} (--{role}_column)")
    for role in roles:
        close = [c for c in left if any(word in logs.spelling(c) for word in NEAR.get(role, ()))]
        if role not in taken and close:
            account.say("", f"{name}: no {role}; is it {several(close)}? (--{role}_column)")
    if file.role == "interactions" and not {"rating", "event"} & taken.keys():
        values = raw.samples.get(name, {})
        numeric = [c for c in left if is_numeric(values.get(c, [])) and may_rate(c, values[c])]
        if numeric:
            account.warnings.append(
                f"{name}: no rating is read, so every row counts as liked; columns of numbers left "
                f"over: {several(numeric)} (--rating_column, or --event_column)"
            )


def may_rate(column: str, values: list) -> bool:
    """Whether a column of numbers may hold ratings or counts, rather than number what it lists."""
    grades = len(set(map(str, values))) <= MOST_GRADES
    return grades and not NUMBERING.search(logs.spelling(column))


def rows(account: Account, raw: Raw, rules: Rules, tally: Tally, seen: Seen, counts: dict) -> None:
    """Rows kept and not, with and without rating and time; the scale and what is liked on it."""
    out = [f"{n:,} {why}" for why, n in (tally.passed + tally.broken).most_common(SHOWN)]
    kept = seen.rows
    text = f"{counted(tally.read, 'line')} read, {counted(kept, 'row')} kept"
    account.say("rows", text + (f"; left out: {'; '.join(out)}" if out else ""))
    low, high = raw.scale
    liked = f"liked above {rules.positive_above:g}"
    scale = f" on the scale {low:g}..{high:g}" if seen.rated else ""
    if raw.graded:
        scale += ", events graded by --event_values"
    account.say(
        "",
        f"rating in {share(seen.rated, kept)}{scale}; {liked}, or without a rating: "
        f"{share(counts['positives'], counts['distinct'])} of different rows",
    )
    account.say(
        "",
        f"time in {share(seen.timed, kept)}{between(seen)}; review text in "
        f"{share(seen.texts, kept)}",
    )
    account.facts["rows"] = {
        "with_rating": seen.rated,
        "with_time": seen.timed,
        "with_text": seen.texts,
        "scale": [low, high],
    }
    if rules.positive_above < (low + high) / 2 and (low, high) != (1, 5) and seen.rated:
        account.warnings.append(
            f"liked is what is rated above {rules.positive_above:g} on the scale "
            f"{low:g}..{high:g}, which is below its middle; --positive_above decides"
        )


def between(seen: Seen) -> str:
    """The days of the first and the last time, and whether they are days without a clock, or
    positions as in sequences."""
    if not seen.timed:
        return ""
    if seen.last < 1e7:
        return ", no dates but positions"
    first, last = (datetime.fromtimestamp(t, UTC).date() for t in (seen.first, seen.last))
    return f", {first} to {last}" + (", whole days" if seen.whole_days else "")


def items(account: Account, raw: Raw, tally: Tally, join: Join) -> None:
    """What the item table knows of the log's items, and what could not be read in it."""
    names = several(sorted({file.path.name for file in raw.item_files}))
    known = len(join.known)
    out = [f"{n:,} {why}" for why, n in tally.passed.most_common(SHOWN)]
    account.say(
        "items",
        f"{share(known, join.items)} of the log's items are in {names}"
        + (f"; lines left out: {'; '.join(out)}" if out else ""),
    )
    filled = ", ".join(f"{name} {n:,}" for name, n in join.fields.items())
    prices = f"; prices from {join.prices[0]:g} to {join.prices[1]:g}" if join.prices else ""
    account.say("", f"known of {join.items:,} items: {filled}{prices}")
    if join.repeated:
        account.say(
            "",
            f"{join.repeated:,} further lines of {names} are about items that had one already; "
            "they fill what it leaves empty",
        )
    account.facts["items"] = {
        "in_log": join.items,
        "in_table": known,
        "further_lines": join.repeated,
        "with": join.fields,
        "prices": list(join.prices),
    }
    if join.items and known < JOINED * join.items:
        account.warnings.append(
            f"{names} knows {known:,} of {join.items:,} items of the log: it has "
            f"{join.stranger!r}, the log has {join.missing!r}"
        )
    forms = {(f.reading.categories, f.reading.mark) for f in raw.item_files if f.reading}
    with_category = any("category" in file.item_columns for file in raw.item_files)
    for form, mark in sorted(forms) if with_category else ():
        account.say(
            "",
            f"a category is read as a {form}"
            + (f", names parted by {mark.strip()!r}" if mark else "")
            + " (--categories)",
        )
        account.facts["categories"] = form
    for why, n in tally.fields.most_common(SHOWN):
        account.say("", f"{why}: {n:,} of {tally.kept:,} lines, e.g. {tally.odd[why]!r}")
        if n > 0.5 * tally.kept:
            account.warnings.append(f"{names}: {why} in {n:,} of {tally.kept:,} lines")


def core(account: Account, rules: Rules, rounds: list[dict]) -> None:
    """Users and items that the k-core took away."""
    k, before, after = rules.k_core, rounds[0], rounds[-1]
    users, things = (before[name] - after[name] for name in ("users", "items"))
    lost = users / max(1, before["users"])
    text = (
        f"{k} liked rows each: {share(after['users'], before['users'])} users and "
        f"{share(after['items'], before['items'])} items stay"
    )
    hint = f"; --k_core {max(1, math.ceil(k / 2))} keeps more" if users or things else ""
    account.say("k-core", text + hint)
    if lost > 0.5:
        account.warnings.append(
            f"the k-core of {k} leaves out {users:,} of {before['users']:,} users; --k_core decides"
        )
