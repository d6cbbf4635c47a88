"""Sequence files: one user a line, then the items in order, `user item item ...`."""

from collections.abc import Iterator
from pathlib import Path

from pagellm.data.records import Broken, Item, Review, Tally, clean, identifier, parsed

__all__ = ["item_words", "read_sequences"]


def read_sequences(
    path: Path, tally: Tally, start: dict[str, int], split: str = ""
) -> Iterator[Review]:
    """`user item item ...`, oldest first; the time is the position in the sequence.

    start  user -> position of the first item; grown by what is read, so that one split's file can go on
           where another's stopped
    """
    seen: set[str] = set()

    def parse(text: str) -> tuple[str, list[str]]:
        user, *items = text.split()
        if not items:
            raise Broken("no item")
        if identifier(user, "user") in seen:
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
