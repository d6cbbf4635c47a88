"""Keywords as token rows: which token may come next, so that a model can write nothing else.

trie = Trie.of(tokens, separator)           tokens: one list of ids a keyword
token, low, high = trie.children(trie.root)
found = keywords_under(trie, logp)          numbers and scores of the keywords a model prefers

The rows, each ended by the separator, are sorted once. A node is an interval of rows that begin
alike, and its children are the distinct tokens of the next column. 300,000 rows of 8 tokens are
9.6 MB, without a dictionary. Every walk ends at a keyword, whatever the logits are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pagellm.stage.config import PageLLMError

__all__ = ["Chosen", "Node", "Trie", "drawn_under", "keywords_under", "walk"]

MOST, LEAST = 8, 3  # keywords of a theme
BEAM = 4  # unfinished keywords that are followed at a time
DROP = 3.0  # a keyword so far below the first ends the list
ENDS = float(np.log(0.5))  # a list ends where an empty line is likelier than all else together
PAD = -1

# Paths of tokens -> (n, V) float64: log-probability of each next token, under the full softmax.
NextLogp = Callable[[Sequence[tuple[int, ...]]], np.ndarray]


class Node(NamedTuple):
    """Rows low..high - 1 of a trie, which share their first `depth` tokens."""

    low: int
    high: int
    depth: int


class Chosen(NamedTuple):
    """A keyword that was written: its number, its score and its tokens, the separator last."""

    number: int
    score: float
    path: tuple[int, ...]


@dataclass(frozen=True)
class Trie:
    """Sorted token rows: see the module.

    rows       (R, D) int32, rising from the first column on; after the separator -1
    number     (R,) int64 keyword of each row
    separator  the token that ends a keyword
    """

    rows: np.ndarray
    number: np.ndarray
    separator: int

    @classmethod
    def of(cls, tokens: Sequence[Sequence[int]], separator: int) -> "Trie":
        """From the tokens of each keyword, without the separator.

        Of keywords with the same tokens the first is kept.
        Raises PageLLMError where there is no keyword; ValueError for a keyword without tokens, or
        with the separator or a negative id among them.
        """
        if not len(tokens):
            raise PageLLMError(
                "no keywords: nothing could be written\n"
                "  Give the storefront items in stock that have titles or categories."
            )
        size = np.array([len(row) for row in tokens])
        flat = np.fromiter((t for row in tokens for t in row), dtype=np.int64, count=size.sum())
        if size.min() == 0:
            raise ValueError(f"keyword {int(size.argmin())} has no tokens")
        if (wrong := (flat == separator) | (flat < 0)).any():
            at = int(np.searchsorted(np.cumsum(size), int(wrong.argmax()), side="right"))
            raise ValueError(f"keyword {at} holds the separator {separator} or a negative id")
        rows = np.full((len(size), int(size.max()) + 1), PAD, dtype=np.int32)
        place = np.repeat(np.arange(len(size)), size)
        column = np.arange(len(flat)) - np.repeat(np.cumsum(size) - size, size)
        rows[place, column] = flat
        rows[np.arange(len(size)), size] = separator
        order = np.lexsort(rows.T[::-1])  # stable: equal rows stay in their order
        rows = rows[order]
        new = np.r_[True, (rows[1:] != rows[:-1]).any(1)]
        return cls(rows[new], order[new].astype(np.int64), separator)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def root(self) -> Node:
        return Node(0, len(self.rows), 0)

    def only(self, numbers: np.ndarray) -> "Trie":
        """The trie of some keywords alone. Raises PageLLMError where none of them is in it."""
        stays = np.isin(self.number, numbers)
        if not stays.any():
            raise PageLLMError("none of the keywords on offer can be written: their list is empty")
        return Trie(self.rows[stays], self.number[stays], self.separator)

    def children(
        self, node: Node, gone: Sequence[int] = ()
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """token (C,) rising, and low (C,), high (C,) of each child's rows.

        gone  rows that were written already; a child that holds no other is left out
        """
        column = self.rows[node.low : node.high, node.depth]
        first = np.flatnonzero(np.r_[True, column[1:] != column[:-1]][: len(column)])
        low = first + node.low
        high = np.r_[low[1:], node.high] if len(low) else low
        if len(gone):
            written = np.sort(np.asarray(gone))
            left = high - low - (np.searchsorted(written, high) - np.searchsorted(written, low))
            first, low, high = first[left > 0], low[left > 0], high[left > 0]
        return column[first].astype(np.int64), low, high

    def node(self, prefix: Sequence[int]) -> Node | None:
        """The rows that begin with a prefix; None where no keyword does."""
        low, high = 0, len(self.rows)
        if len(prefix) > self.rows.shape[1]:
            return None
        for depth, token in enumerate(prefix):
            column = self.rows[low:high, depth]
            left = np.searchsorted(column, token, "left")
            low, high = low + int(left), low + int(np.searchsorted(column, token, "right"))
            if low == high:
                return None
        return Node(low, high, len(prefix))


class Step(NamedTuple):
    """An unfinished keyword: its rows, its tokens, sums of log-probabilities."""

    node: Node
    path: tuple[int, ...]
    full: float
    masked: float


def walk(
    trie: Trie,
    logp: NextLogp,
    gone: Sequence[int] = (),
    width: int | None = BEAM,
    start: tuple[int, ...] = (),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """row, mean, masked of the keywords that a beam reaches, all (n,), by rising row.

    mean    log-probability per token under the full softmax, the separator included
    masked  probability of the walk when each step is renormalised over what is allowed
    gone    rows that are not to be written again
    width   of the beam, by `masked`; None: every keyword is reached
    start   tokens that stand before the keyword
    The masked probability only leads the walk: by it, a keyword whose tokens are forced would be
    free, and long keywords would win.
    """
    found: list[tuple[int, float, float]] = []
    level = [Step(trie.root, (), 0.0, 0.0)]
    while level:
        every = logp([start + step.path for step in level])
        following: list[Step] = []
        for step, scores in zip(level, every, strict=True):
            token, low, high = trie.children(step.node, gone)
            if not len(token):
                continue  # nothing is left: end, never a step off the trie
            full = scores[token]
            masked = full - np.logaddexp.reduce(full)
            depth = step.node.depth + 1
            for t, a, b, f, m in zip(
                *(x.tolist() for x in (token, low, high, full, masked)), strict=True
            ):
                total, led = step.full + f, step.masked + m
                if t == trie.separator:
                    found.append((a, total / depth, led))
                else:
                    following.append(Step(Node(a, b, depth), (*step.path, t), total, led))
        following.sort(key=lambda step: (-step.masked, step.node.low))
        level = following if width is None else following[:width]
    found.sort()
    row, mean, led = (np.array(column) for column in zip(*found, strict=True)) if found else EMPTY
    return row.astype(np.int64), mean, np.exp(led)


EMPTY = (np.zeros(0), np.zeros(0), np.zeros(0))


def keywords_under(
    trie: Trie,
    logp: NextLogp,
    bonus: np.ndarray | None = None,
    m: int = MOST,
    least: int = LEAST,
    width: int | None = BEAM,
    stops: bool = False,
) -> list[Chosen]:
    """Up to m keywords, one after the other, each the best that the beam finds; none twice.

    bonus  (W,) float64 by keyword number, added to its mean log-probability; None: nothing
    least  keywords that are written however low their scores; later ones more than 3.0 below the
           first end the list
    stops  the model was taught to end a list by an empty line: after `least` keywords it may do so
    """
    chosen: list[Chosen] = []
    gone: list[int] = []
    start: tuple[int, ...] = ()
    while len(chosen) < m:
        if stops and len(chosen) >= least and logp([start])[0][trie.separator] > ENDS:
            break
        row, mean, _ = walk(trie, logp, gone, width, start)
        if not len(row):
            break
        number = trie.number[row]
        score = mean if bonus is None else mean + bonus[number]
        best = int(np.lexsort((number, -score))[0])
        if len(chosen) >= least and score[best] < chosen[0].score - DROP:
            break
        tokens = trie.rows[row[best]]
        path = tuple(tokens[tokens != PAD].tolist())
        chosen.append(Chosen(int(number[best]), float(score[best]), path))
        gone.append(int(row[best]))
        start += path
    return chosen


def drawn_under(
    trie: Trie,
    logp: NextLogp,
    rng: np.random.Generator,
    temperature: float,
    m: int = MOST,
    least: int = LEAST,
) -> list[int]:
    """Numbers of up to m keywords, drawn token by token by softmax(log p / temperature).

    Only tokens that lead to a keyword are drawn, none twice; after `least` keywords the empty line
    that ends a list is one of them.
    """
    chosen: list[int] = []
    gone: list[int] = []
    start: tuple[int, ...] = ()
    while len(chosen) < m:
        node, path = trie.root, start
        while True:
            token, low, high = trie.children(node, gone)
            if not len(token):
                return chosen
            ends = len(path) == len(start) and len(chosen) >= least
            every = np.append(token, trie.separator) if ends else token
            scores = logp([path])[0][every] / temperature
            weight = np.exp(scores - scores.max())
            at = int(rng.choice(len(every), p=weight / weight.sum()))
            if at == len(token):
                return chosen
            path = (*path, int(token[at]))
            if token[at] == trie.separator:
                break
            node = Node(int(low[at]), int(high[at]), node.depth + 1)
        chosen.append(int(trie.number[low[at]]))
        gone.append(int(low[at]))
        start = path
    return chosen
