"""What one value of a raw file means: identifiers, numbers, times, ratings, prices, texts.

Every reader of the package takes identifiers from here, so that CSV, JSON and Parquet files give
the same ones. A value that cannot be understood raises Broken, whose message is the reason to
count.
"""

import calendar
import html
import math
import re
from datetime import UTC, datetime
from decimal import Decimal

import numpy as np
import pyarrow as pa

__all__ = [
    "Broken",
    "CONTROL",
    "EARLIEST",
    "EXACT",
    "ID_LIMIT",
    "LATEST_TIME",
    "LINE_BREAK",
    "MISSING",
    "NO_TIME",
    "PassedOver",
    "TIME_UNITS",
    "clean",
    "decimal_comma",
    "id_column",
    "identifier",
    "is_missing",
    "is_number",
    "label",
    "number",
    "opinion",
    "price",
    "rating_in",
    "time_form",
    "time_in",
]

NO_TIME = -1.0  # an unknown time; real ones are never negative
LATEST_TIME = 4_102_444_800  # 1 January 2100, in seconds: later dates are mistakes
EARLIEST = 1e8  # seconds; smaller numbers in a column of finer units count something else
ID_LIMIT = 256  # characters
EXACT = 2**53  # above this, float64 cannot represent every integer
PRICE_LIMIT = 1e7
TIME_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}  # unit -> how many make a second
DATE_PATTERNS = {"yyyymmdd": "%Y%m%d", "yyyymmddhhmmss": "%Y%m%d%H%M%S"}
DAYS = (
    "%d/%m/%Y %m/%d/%Y %d.%m.%Y %d-%m-%Y %m-%d-%Y %Y/%m/%d %d/%m/%y %m/%d/%y"
    "|%m %d, %Y|%b %d, %Y|%B %d, %Y|%d %b %Y|%d %B %Y|%d-%b-%Y"
)
CLOCKS = ("", " %H:%M", " %H:%M:%S", " %H:%M:%S.%f", " %I:%M %p", " %I:%M:%S %p")
PATTERNS = tuple(day + clock for day in re.split(r"\||(?<=%[Yyd]) ", DAYS) for clock in CLOCKS)

# How databases, spreadsheets and data frames write "no value", in small letters.
MISSING = frozenset({"", "null", "none", "nan", "nat", "\\n", "<na>", "#n/a"})
WHOLE_FLOAT = re.compile(r"-?(0|[1-9][0-9]*)\.0")
COMMA_NUMBER = re.compile(r"\s*-?[0-9]+,[0-9]{1,2}\s*")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
LINE_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
UTC_MARK = re.compile(r"\s*(UTC|GMT|Z)$", re.IGNORECASE)
SPACE = "[\\s\u00a0\u202f]*"
CURRENCY = r"(?:[a-z]{2,3}\$?|[a-z]?[^\w\s.,'+-]{1,3}|kr\.)?"  # its sign or its code
PRICE = re.compile(
    CURRENCY + SPACE + "([0-9](?:[0-9.,'’\\s\u00a0\u202f]*[0-9])?|\\.[0-9]+)" + SPACE + CURRENCY,
    re.ASCII | re.IGNORECASE,
)


class Broken(ValueError):
    """A record that cannot be understood; the message is the reason it is counted under."""


class PassedOver(Broken):
    """A record that is whole but not wanted: it names no user or item, or --where excludes it."""


def is_missing(value) -> bool:
    """Whether a value stands for none: None, NaN, or one of the words of MISSING."""
    if isinstance(value, str):
        return len(value) < 9 and value.strip().lower() in MISSING
    return value is None or isinstance(value, float) and math.isnan(value)


def identifier(value, role: str) -> str:
    """A user's or item's identifier as text, the same from CSV, JSON and Parquet.

    value  text, which is kept exactly, leading zeros included; or a number, boolean or bytes. A
           whole float, 17850.0, is written 17850 and so is the text "17850.0": a column of integers
           becomes one of floats as soon as one value is missing.
    role   "user" or "item", for messages

    Raises PassedOver where there is none (see `is_missing`), Broken for what cannot be one.
    """
    if isinstance(value, str):
        if value.endswith(".0") and WHOLE_FLOAT.fullmatch(value):
            value = value[:-2]
    elif not is_missing(value):
        value = id_text(value, role)
    if is_missing(value):
        mark = value.strip() if isinstance(value, str) else ""
        raise PassedOver(f"no {role}" + (f" (written {mark})" if mark else ""))
    if not value.isprintable() and CONTROL.search(value):
        raise Broken(f"control characters in the {role}")
    if len(value) > ID_LIMIT:
        raise Broken(f"{role} longer than {ID_LIMIT} characters")
    return value


def id_text(value, role: str) -> str:
    """The identifier as text, where the file holds a number, boolean or bytes. Raises Broken."""
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, int | np.integer):
        return str(int(value))
    if isinstance(value, float | np.floating):
        value = float(value)
        if abs(value) > EXACT:
            raise Broken(f"{role} is a float above 2^53, which no longer holds all digits")
        return str(int(value)) if value == int(value) else repr(value)
    if isinstance(value, Decimal) and value.is_finite():
        return str(int(value)) if value == int(value) else format(value, "f")
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise Broken(f"{role} is binary that is not UTF-8 text") from None
    raise Broken(f"{role} of a wrong type")


def id_column(column: pa.ChunkedArray | pa.Array, role: str) -> list[str | None]:
    """`identifier` of every row, None where there is none. Raises Broken.

    Each different value is looked at once, so that millions of rows cost no more than their
    different identifiers.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    names = [id_or_none(value, role) for value in column.dictionary.to_pylist()]
    return [None if at is None else names[at] for at in column.indices.to_pylist()]


def id_or_none(value, role: str) -> str | None:
    try:
        return identifier(value, role)
    except PassedOver:
        return None


def number(value, what: str) -> float:
    """A finite number, or NaN where the value is missing. Raises Broken."""
    if is_missing(value):
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        raise Broken(f"{what} of a wrong type")
    try:
        found = float(value)
    except (ValueError, OverflowError):
        raise Broken(f"{what} of a wrong type") from None
    if math.isinf(found):
        raise Broken(f"absurd {what}")
    return found


def is_number(value) -> bool:
    """Whether a value is a number or the text of one."""
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (ValueError, TypeError, OverflowError):
        return False


def time_in(value, form: str = "s") -> float:
    """Seconds since 1970 with their fraction, NO_TIME where missing.

    form  what the column counts: see `time_form`. Text without a time zone is UTC.

    Raises Broken for what lies before 1970 or after 2100, or is not of this form.
    """
    if is_missing(value):
        return NO_TIME
    if isinstance(value, datetime):
        seconds = moment(value)
    elif form in TIME_UNITS:
        whole = isinstance(value, int) or isinstance(value, str) and value.strip().isdecimal()
        # Digits are read as an integer: a float has too few of them for nanoseconds.
        exact = whole and not isinstance(value, bool) and len(str(value)) < 30
        count = int(value) if exact else number(value, "time")
        if count != count:
            return NO_TIME
        seconds = count / TIME_UNITS[form]
        if form != "s" and 0 < seconds < EARLIEST:
            raise Broken(f"time not in the unit of its column ({form})")
    else:
        seconds = date_in(value, form)
    if not 0 <= seconds <= LATEST_TIME:
        raise Broken("absurd time")
    return seconds


def date_in(value, form: str) -> float:
    """Seconds since 1970 of a date in words or digits. Raises Broken."""
    text = str(int(value)) if isinstance(value, int | float | Decimal) else value
    if isinstance(value, bool) or not isinstance(text, str):
        raise Broken("time of a wrong type")
    text = text.strip().removesuffix(".0")
    try:
        if form == "iso":
            return moment(datetime.fromisoformat(UTC_MARK.sub("", text)))
        return moment(datetime.strptime(text, DATE_PATTERNS.get(form, form)))
    except (ValueError, OverflowError):
        raise Broken("time of a wrong type") from None


def moment(when: datetime) -> float:
    """Seconds since 1970, exact to the microsecond; UTC unless it says otherwise."""
    when = when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
    return calendar.timegm(when.timetuple()) + when.microsecond / 1e6


def time_form(values: list) -> str | None:
    """What a column of times counts, from a sample of its values; None where that cannot be told.

    s, ms, us, ns                 a number, counted from 1970
    yyyymmdd, yyyymmddhhmmss      the digits of a date: 20200710
    iso                           2020-07-10, with or without a clock and a zone
    %d/%m/%Y ...                  any other spelling, as datetime.strptime has it

    One form holds for the whole column: a unit guessed for each value would put early milliseconds
    into another decade. None means that units are mixed, or that a day and a month could be
    exchanged in every value.
    """
    values = [v for v in values if not is_missing(v)]
    if not values or isinstance(values[0], datetime):
        return "s"
    numbers = [float(v) for v in values if is_number(v)]
    if 2 * len(numbers) > len(values):
        digits = {f"{n:.0f}" for n in numbers if n == int(n)}
        for name, length in (("yyyymmdd", 8), ("yyyymmddhhmmss", 14)):
            if {len(text) for text in digits} == {length} and all(map(is_date, numbers)):
                return name
        units = {unit_of(n) for n in numbers if n >= EARLIEST}
        return min(units) if len(units) == 1 else None if units else "s"
    texts = [v for v in values if isinstance(v, str)]
    if all(understood(text, "iso") for text in texts):
        return "iso"
    fits = [p for p in PATTERNS if all(understood(text, p) for text in texts)]
    different = {tuple(date_in(text, p) for text in texts): p for p in fits}
    if len(different) == 1:
        return fits[0]
    return None if different else "iso"  # whatever does not fit is counted line by line


def unit_of(n: float) -> str:
    """The coarsest unit in which a number lies before the year 5138."""
    return next((unit for unit, size in TIME_UNITS.items() if n <= 1e11 * size), "ns")


def is_date(n: float) -> bool:
    """Whether the digits of a number are a date from 1970 on."""
    text = f"{n:.0f}"
    return text[:2] in ("19", "20") and (
        understood(text, "yyyymmdd") or understood(text, "yyyymmddhhmmss")
    )


def understood(text, form: str) -> bool:
    try:
        date_in(text, form)
    except Broken:
        return False
    return True


def rating_in(value, low: float = 1.0, high: float = 5.0) -> float:
    """A rating on the file's own scale, NaN where missing. Raises Broken outside low..high.

    "4,5" is four and a half: between thousands a comma has three digits after it.
    """
    if isinstance(value, str) and COMMA_NUMBER.fullmatch(value):
        value = value.replace(",", ".")
    rating = number(value, "rating")
    if rating < low or rating > high:
        raise Broken(f"rating outside {low:g}..{high:g}")
    return rating


def price(value, comma: bool = False) -> float:
    """A price, 0 included, with or without a currency's sign or code; NaN for all else.

    comma  the column writes decimals after a comma, so that 1.299 is more than a thousand. Where a
           value has both marks, or digits that can be decimals only, it decides for itself.
    """
    if isinstance(value, str):
        match = PRICE.fullmatch(value.strip()[:40])
        value = amount(re.sub(r"['’\s]", "", match[1]), comma) if match else math.nan
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return math.nan
    return float(value) if 0 <= value < PRICE_LIMIT else math.nan


def amount(digits: str, comma: bool) -> float:
    """The number that digits, dots and commas write; NaN where they write none."""
    marks = [c for c in digits if c in ".,"]
    mark = marks[-1] if marks else ""
    other = "." if mark == "," else ","
    whole, _, tail = digits.rpartition(mark) if mark else (digits, "", "")
    grouping = (mark == ",") != comma  # the mark that stands between thousands in this column
    if mark and (marks.count(mark) > 1 or grouping and len(tail) == 3 and len(set(marks)) == 1):
        whole, tail, other = digits, "", mark
    if not re.fullmatch(rf"\d*|\d{{1,3}}({re.escape(other)}\d{{3}})+", whole):
        return math.nan
    return float(f"{whole.replace(other, '') or 0}.{tail or 0}")


def decimal_comma(values: list) -> bool:
    """Whether a sample of a column's prices writes decimals after a comma."""
    texts = [v.strip()[:40] for v in values if isinstance(v, str)]
    found = [match[1] for text in texts if (match := PRICE.fullmatch(text))]
    ends = [re.search(r"([.,])\d+$", text) for text in found]
    decimals = [end[1] for end in ends if end and len(end[0]) != 4]
    return decimals.count(",") > decimals.count(".")


def clean(value) -> str:
    """One line of readable text: entities unescaped, every run of blanks or controls one space.

    value  a string, None, or a list of strings, which are joined. Raises Broken for anything else.
    """
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(filter(None, map(clean, value)))
    if not isinstance(value, str):
        raise Broken("text of a wrong type")
    if "&" in value:
        # These three are nearly all there are, and much faster than html.unescape.
        quoted = value.replace("&#34;", '"').replace("&#39;", "'").replace("&quot;", '"')
        value = html.unescape(value) if "&" in quoted else quoted
    if "<" in value:
        value = LINE_BREAK.sub(" ", value)
    if not value.isprintable():
        value = CONTROL.sub(" ", value)
    return " ".join(value.split())


def label(value) -> str:
    """`clean` of a name in a table: a number is its digits, and NULL, nan and so on are no name."""
    if is_missing(value):
        return ""
    if isinstance(value, int | float | Decimal | bytes):
        value = id_text(value, "text")
    return clean(value)


def opinion(summary, text) -> str:
    """The text of a review: its summary and its body, each cleaned, on lines of their own."""
    return "\n".join(filter(None, (clean(summary), clean(text))))
