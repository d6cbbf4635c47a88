"""Sequence files: one user a line, then the items in order, `user item item ...`."""

import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from pagellm.data.files import Options, RawFile
from pagellm.data.records import Item, Review, Tally, batched, parsed
from pagellm.data.values import Broken, clean, identifier

__all__ = ["item_words", "items", "read_sequences", "recognise", "release", "reviews"]

NAMED = re.compile(r"sequen|\.seq(\.|$)")
WORDS = re.compile("item|phrase|title|meta")
IDENTIFIERS = 0.9  # share of words with a digit in them above which lines are identifiers
PROSE = re.compile(r"[.,;!?)\"](\s|$)|::|[|\t]")


def recognise(path: Path, first_lines: list[str], options: Options) -> RawFile | None:
    """By content: lines of identifiers, each user on one line. A name alone, .dat or .txt, does not
    make sequences of a file of titles; one with "sequence" in it does, unless the lines are prose.
    """
    split = [text.split() for text in first_lines]
    if not split or any(len(words) < 2 for words in split):
        return None
    name = path.name.lower()
    if not NAMED.search(name) and WORDS.search(name):
        return RawFile(path, "sequences", kind="item words", also="words")
    words = [word for line in split for word in line]
    digits = sum(any(c.isdigit() for c in word) for word in words) / len(words)
    once = len({line[0] for line in split}) == len(split)
    prose = any(PROSE.search(text) for text in first_lines)
    if prose or not once and not NAMED.search(name):
        return None
    if digits >= IDENTIFIERS or NAMED.search(name):
        return RawFile(
            path, "sequences", "interactions", kind="sequences", also="words", joined=True
        )
    return None


def release(file: RawFile) -> str:
    """What source.json calls interactions of this format."""
    return "sequences"


def reviews(files: list[RawFile], options: Options, tally: Tally) -> Iterator[pa.Table]:
    """The interactions as tables of records.COLUMNS; a user may go on in the next file."""
    positions: dict[str, int] = {}
    for file in files:
        yield from batched(read_sequences(file.path, tally, positions, file.split))


def items(files: list[RawFile], options: Options, tally: Tally) -> Iterator[Item]:
    """Files of words about items, read only when they are named by option."""
    for file in files:
        yield from item_words(file.path, tally)


def read_sequences(
    path: Path, tally: Tally, start: dict[str, int], split: str = ""
) -> Iterator[Review]:
    """`user item item ...`, oldest first; the time is the position in the sequence.

    start  user -> position of the first item; grown by what is read, so that one split's file can
           go on where another's stopped
    """
    seen: set[str] = set()

    def parse(text: str) -> tuple[str, list[str]]:
        user, *items = text.split()
        if not items:
            raise Broken("no item")
        user = identifier(user, "user")
        if user in seen:
            raise Broken("user on two lines")
        seen.add(user)
        return user, [identifier(item, "item") for item in items]

    for user, items in parsed(path, parse, tally):
        first = start.get(user, 0)
        start[user] = first + len(items)
        for position, item in enumerate(items, first):
            yield Review(user, item, time=position, split=split)


def item_words(path: Path, tally: Tally) -> Iterator[Item]:
    """`item word word ...`: the words are taken for the title."""

    def parse(text: str) -> Item:
        name, _, words = text.strip().partition(" ")
        return Item(identifier(name, "item"), clean(words))

    return parsed(path, parse, tally)
