"""Row filters: `quantity > 0 and status != cancelled`, read as conditions, never run as code.

    condition   column operator value        operators: > >= < <= == != in
    value       a number, a word, or text in quotes; for `in` a list: (a, b)
    several     joined by `and`, or by `or`; `and` binds closer

A column whose name holds spaces or marks stands in quotes: "unit price" > 0. Case, blanks and marks
of a name do not matter if only one column can be meant. Where the value is a number, cells are
compared as numbers, with all their digits. A cell that is no number makes the condition false,
except with `!=`. A value with leading zeros, such as 007, is text.
"""

import operator
import re
from decimal import Decimal
from typing import NamedTuple

from pagellm.data.values import identifier, is_missing, is_number
from pagellm.stage.config import PageLLMError

__all__ = ["Where"]

OPERATORS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
TOKEN = re.compile(
    r"""\s*("[^"]*"|'[^']*'|>=|<=|==|!=|=|>|<|\(|\)|,|[^\s"'()<>=!,]+)""", re.VERBOSE
)


class Condition(NamedTuple):
    """column operator value; `in` has several values."""

    column: str
    sign: str
    values: tuple[str, ...]

    def holds(self, cell) -> bool:
        if self.sign == "in":
            return any(Condition(self.column, "==", (v,)).holds(cell) for v in self.values)
        value = self.values[0]
        if is_missing(cell):
            return self.sign == "!=" and value != ""
        padded = self.sign in ("==", "!=") and re.fullmatch(r"0[0-9]+", value)
        if is_number(value) and is_number(cell) and not padded:
            return OPERATORS[self.sign](exact(cell), exact(value))
        if self.sign in ("==", "!="):
            return OPERATORS[self.sign](identifier(cell, "value").strip(), value)
        return False


def exact(number) -> Decimal:
    """A number with all its digits: as floats, neighbouring ids of 17 digits are equal."""
    return Decimal(str(number).strip().replace("_", ""))


class Where(NamedTuple):
    """Alternatives of conditions that must all hold; no alternatives: every row is kept."""

    text: str
    any_of: tuple[tuple[Condition, ...], ...]

    @classmethod
    def parse(cls, text: str) -> "Where":
        """Raises PageLLMError for text that is not of the form above."""
        if not text.strip():
            return cls("", ())
        found: list[list[Condition]] = [[]]
        tokens, at = tokens_of(text), 0
        while at < len(tokens):
            condition, at = take(tokens, at)
            if condition is None or at < len(tokens) and tokens[at].lower() not in ("and", "or"):
                break
            found[-1].append(condition)
            if at < len(tokens) and tokens[at].lower() == "or":
                found.append([])
            at += 1
        if at <= len(tokens) or not all(found):
            raise PageLLMError(
                f"--where {text!r}: want conditions such as quantity > 0 and status != cancelled, "
                "or country in (UK, France)"
            )
        return cls(text.strip(), tuple(map(tuple, found)))

    @property
    def columns(self) -> list[str]:
        """The columns that the conditions look at."""
        return list(dict.fromkeys(c.column for group in self.any_of for c in group))

    def of(self, names) -> "Where":
        """The same conditions on a file's columns: `quantity` is its column Quantity.

        names  of the file's columns. A name that none or several of them are like stays as it is
        """

        def own(column: str) -> str:
            alike = [name for name in names if plain_name(name) == plain_name(column)]
            return alike[0] if column not in names and len(alike) == 1 else column

        groups = (tuple(c._replace(column=own(c.column)) for c in group) for group in self.any_of)
        return Where(self.text, tuple(groups))

    def keeps(self, row: dict) -> bool:
        """Whether a row, column -> value, is to be kept."""
        return not self.any_of or any(
            all(condition.holds(row.get(condition.column)) for condition in group)
            for group in self.any_of
        )


def plain_name(column: str) -> str:
    """A column's name without case, blanks and marks."""
    return re.sub(r"[\W_]", "", column.lower())


def tokens_of(text: str) -> list[str]:
    """Words, signs and quoted texts in order; [] if something else is among them."""
    tokens, at, text = [], 0, text.strip()
    while at < len(text):
        if not (match := TOKEN.match(text, at)):
            return []
        tokens.append(match[1])
        at = match.end()
    return tokens


def take(tokens: list[str], at: int) -> tuple[Condition | None, int]:
    """The condition that begins at a token (None if none does), and where the next begins."""
    words = tokens[at : at + 3]
    if len(words) < 3 or words[0][0] in "<>=!(),":
        return None, at
    column, sign = words[0].strip("\"'"), "==" if words[1] == "=" else words[1].lower()
    if sign != "in":
        ok = sign in OPERATORS and words[2][0] not in "<>=!(),"
        return (Condition(column, sign, (words[2].strip("\"'"),)), at + 3) if ok else (None, at)
    if words[2] != "(" or ")" not in tokens[at:]:
        return None, at
    end = tokens.index(")", at)
    values = tuple(word.strip("\"'") for word in tokens[at + 3 : end] if word != ",")
    return (Condition(column, "in", values), end + 1) if values else (None, at)
