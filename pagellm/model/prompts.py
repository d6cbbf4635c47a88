"""All prompt templates. A template turns ids and text into an Example: token ids, and the mask of
those that count in the loss.

    contents      item_12 " title:"                          -> text
                  (brand, category and description likewise)
    first order   user_3 " on" item_12 ", opinion:"          -> review
    second order  "category Drums contains:"                 -> item_4 item_12 item_90
                  item_4 item_12 item_90 " share category:"  -> text
                  (brand likewise)
    interaction   user_3 " chose:"                           -> item tokens
    rating        user_3 item_12 " rating:"                  -> a number, read at the last token
    page          user_3 " history" item_5 <r5> item_9 <r4> <page>   -> the page, slot by slot
                  (with time tokens, <t7> before <page>: the period in which it is shown;
                  with facts, "category brand price" after every item of the history)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pagellm.model.vocab import Vocab

__all__ = ["Example", "Prompts", "left_pad", "pad_ids", "right_pad"]


@dataclass(frozen=True)
class Example:
    """One prompt with its target.

    ids, mask  (T,); the mask is True on the tokens to predict
    over       "words" or "items": what the softmax of these tokens runs over
    """

    ids: list[int]
    mask: list[bool]
    over: str

    @classmethod
    def of(cls, given: list[int], target: list[int], over: str, room: int) -> "Example":
        """Prompt and target. A target that is too long is cut at its end; a prompt never is."""
        target = target[: max(room - len(given), 0)]
        return cls(given + target, [False] * len(given) + [True] * len(target), over)


class Prompts:
    """The templates for one vocabulary.

    room         tokens that fit in the context
    max_history  items of history that the page prompt shows; the oldest are dropped first
    use_ratings  show the rating token after each item of the history
    now          period of a page whose moment is not given, if the vocabulary has time tokens
    """

    def __init__(
        self,
        vocab: Vocab,
        room: int,
        max_history: int = 32,
        use_ratings: bool = True,
        now: int | None = None,
    ):
        self.vocab, self.room, self.now = vocab, room, now
        self.max_history, self.use_ratings = max_history, use_ratings
        self.words = lru_cache(maxsize=4096)(lambda text: tuple(vocab.words(text)))

    def tokens(self, text: str | list[int]) -> list[int]:
        """Tokens of a text that follows a prompt. A list of tokens is returned as it is."""
        return self.vocab.words(f" {text}") if isinstance(text, str) else text

    def contents(self, item: int, field: str, text: str | list[int]) -> Example:
        """Item and field -> the text of the field."""
        given = [self.vocab.item(item), *self.words(f" {field}:")]
        return Example.of(given, self.tokens(text), "words", self.room)

    def first_order(self, user: int | None, item: int, review: str | list[int]) -> Example:
        """User and item -> the review."""
        given = [
            self.vocab.user(user),
            *self.words(" on"),
            self.vocab.item(item),
            *self.words(", opinion:"),
        ]
        return Example.of(given, self.tokens(review), "words", self.room)

    def second_order(self, field: str, name: str, items: list[int]) -> Example:
        """Field and name -> the items that have it."""
        given = self.vocab.words(f"{field} {name} contains:")
        return Example.of(given, [self.vocab.item(i) for i in items], "items", self.room)

    def second_order_reverse(self, field: str, name: str, items: list[int]) -> Example:
        """Items -> the name that they share in a field."""
        given = [*(self.vocab.item(i) for i in items), *self.words(f" share {field}:")]
        return Example.of(given, self.vocab.words(f" {name}"), "words", self.room)

    def interaction(self, user: int | None, items: list[int]) -> Example:
        """User -> the items that were chosen."""
        given = [self.vocab.user(user), *self.words(" chose:")]
        return Example.of(given, [self.vocab.item(i) for i in items], "items", self.room)

    def rating(self, user: int | None, item: int, review: str = "") -> list[int]:
        """Prompt of a rating. No rating token may stand in it: Eq. 2 predicts the rating."""
        text = self.vocab.words(f" {review}")[: self.room - 8] if review else []
        return [self.vocab.user(user), self.vocab.item(item), *text, *self.words(" rating:")]

    def page(self, user: int | None, items, ratings, period: int | None = None) -> list[int]:
        """Prompt of a page.

        items, ratings  the history, oldest first; ratings NaN where unknown
        period          which time token is shown, counted from 0; None: that of `now`, if any
        """
        ids = [self.vocab.user(user), *self.words(" history")]
        items, ratings = items[-self.max_history :], ratings[-self.max_history :]
        for item, rating in zip(items, ratings, strict=True):
            ids.append(self.vocab.item(item))
            if self.vocab.shown:
                ids += self.vocab.facts[item]
            if self.use_ratings:
                ids.append(self.vocab.rating(rating))
        period = self.now if period is None else period
        return [*ids, *([] if period is None else [self.vocab.time(period)]), self.vocab.page]

    @property
    def page_room(self) -> int:
        """Tokens of the longest page prompt."""
        facts = max(map(len, self.vocab.facts), default=0)
        return (
            2
            + len(self.words(" history"))
            + self.max_history * (1 + facts + self.use_ratings)
            + (self.vocab.times > 0)
        )


def pad_ids(
    rows: Sequence[Sequence[int] | np.ndarray], fill: int, width: int | None = None
) -> np.ndarray:
    """Ragged rows -> (B, width) int64, `fill` on the right.

    width  None: that of the longest row
    """
    width = max((len(row) for row in rows), default=0) if width is None else width
    out = np.full((len(rows), width), fill, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def right_pad(rows: list[list[int]], pad: int) -> Tensor:
    """Ragged rows -> (B, T) int64, padded on the right.

    This is for training, where the causal mask alone keeps padding out.
    """
    return torch.from_numpy(pad_ids(rows, pad))


def left_pad(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ragged rows -> ids (B, P), valid (B, P), padded on the left.

    All pages then start in the same column.
    """
    width = max((len(row) for row in rows), default=0)
    ids = np.full((len(rows), width), pad, dtype=np.int64)
    valid = np.zeros((len(rows), width), dtype=bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        valid[i, width - len(row) :] = True
    return torch.from_numpy(ids), torch.from_numpy(valid)
