"""Writer `lm`: a language model of our own blocks names rows and chooses keywords, on this machine.

local = Local.load("models/smollm2", corpus)       a directory that `pagellm import-gguf` made
writer = Remote(local, template, known)

A title is written token by token under a mask of characters, a keyword under the trie of those on
offer: whatever the network holds, a title has at most 40 plain characters, and every keyword is in
the corpus. Nothing is drawn, so the same question has the same answer.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pagellm.model.backbone import Backbone, KVCache
from pagellm.model.networks import build, load_published, published_shape
from pagellm.model.vocab import Vocab
from pagellm.stage.config import PageLLMError
from pagellm.stage.files import read_json
from pagellm.stage.run import file_id
from pagellm.storefront.corpus import Corpus
from pagellm.storefront.gates import LONGEST, MOST_WORDS, SHORTEST
from pagellm.storefront.parts import Answer, Theme
from pagellm.storefront.prompts import VERSION, Question, line_messages, tagged_line
from pagellm.storefront.remote import TAUGHT as SAYS_SO
from pagellm.storefront.remote import Read
from pagellm.storefront.trie import MOST, Trie, drawn_under, keywords_under

__all__ = ["Local", "Next", "Pieces", "TAUGHT", "Together"]

Made = TypeVar("Made")
TAUGHT = "storefront.json"  # beside the weights of a model that was taught these tasks
GAMMA = 2.0  # weight of the cosine between theme and keyword, beside nats a token
PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 &',-")


@dataclass(frozen=True)
class Pieces:
    """What each word token may do in a title.

    plain (V,) bool: of plain characters alone    opens (V,) bool: it begins with a space
    """

    plain: np.ndarray
    opens: np.ndarray

    @classmethod
    def of(cls, vocab: Vocab) -> "Pieces":
        texts = vocab.tokenizer.decode_batch(
            [[token] for token in range(vocab.n_words)], skip_special_tokens=False
        )
        special = vocab.tokenizer.get_added_tokens_decoder()
        plain = [
            bool(text) and set(text) <= PLAIN and token not in special
            for token, text in enumerate(texts)
        ]
        return cls(np.array(plain), np.array([text.startswith(" ") for text in texts]))


class Together:
    """Questions that are answered side by side: the next words of all of them in one pass.

    Each of some jobs sits at a table and asks one question after the other. A pass is made when all
    who sit there have asked, so that what is put together hangs on no clock.
    """

    def __init__(self, model: Backbone):
        self.model, self.turn = model, threading.Condition()
        self.seats: dict[int, int] = {}  # thread -> place of its job, of those that still work
        self.asked: dict[int, tuple[Next, np.ndarray]] = {}
        self.said: dict[int, np.ndarray | BaseException] = {}
        self.stopped: BaseException | None = None  # why all end: one failed, or a signal came

    def each(self, job: Callable[..., Made], given: Sequence, micro: int) -> list[Made]:
        """job(one) of each, in order; micro of them side by side. Where one fails, all end."""
        if micro < 2:
            return [job(one) for one in given]
        found: list[Made] = []
        self.stopped = None
        for start in range(0, len(given), micro):
            some = given[start : start + micro]
            ready = threading.Barrier(len(some))
            with ThreadPoolExecutor(len(some)) as pool:
                works = [pool.submit(self.work, job, n, one, ready) for n, one in enumerate(some)]
                try:
                    found += [work.result() for work in works]
                except BaseException as error:  # a signal too: nobody is to wait for the rest
                    self.stop(error)
                    raise
        return found

    def work(self, job: Callable[..., Made], place: int, one, ready: threading.Barrier) -> Made:
        me = threading.get_ident()
        with self.turn:
            self.seats[me] = place
        ready.wait()
        try:
            return job(one)
        except BaseException as error:
            self.stop(error)
            raise
        finally:
            with self.turn:
                del self.seats[me]
                self.serve()

    def stop(self, error: BaseException) -> None:
        with self.turn:
            self.stopped = self.stopped or error
            self.turn.notify_all()

    def sits(self) -> bool:
        """Whether the thread that asks is one of the jobs."""
        return threading.get_ident() in self.seats

    def after(self, follow: "Next", new: np.ndarray) -> np.ndarray:
        """What `follow` says after its columns and new (n, t) tokens; waits for the others."""
        me = threading.get_ident()
        with self.turn:
            self.asked[me] = follow, new
            self.serve()
            self.turn.wait_for(lambda: me in self.said or self.stopped is not None)
            self.asked.pop(me, None)
            said = self.said.pop(me, self.stopped)
        if not isinstance(said, np.ndarray):
            assert said is not None
            raise said
        return said

    def serve(self) -> None:
        """One pass for all, where nobody is missing."""
        if self.stopped is not None or not self.asked or len(self.asked) < len(self.seats):
            return
        order = sorted(self.asked, key=lambda thread: self.seats[thread])
        try:
            every: list = passed(self.model, [self.asked[thread] for thread in order])
        except BaseException as error:  # everybody's: none of them may wait for ever
            every = [error] * len(order)
        self.said.update(zip(order, every, strict=True))
        self.asked.clear()
        self.turn.notify_all()


@torch.no_grad()
def passed(model: Backbone, asked: Sequence[tuple["Next", np.ndarray]]) -> list[np.ndarray]:
    """(n, V) log-probabilities for each who asked, after its columns and new (n, t) tokens.

    Columns end where the new tokens begin: what is shorter is padded on both sides. New columns in
    which all n rows are alike are kept by who asked (`Next.keep`).
    """
    past = [follow.cache.length for follow, _ in asked]
    S, T = max(past), max(new.shape[1] for _, new in asked)
    if len(asked) > 1 and S + T > model.shape.n_ctx:  # padding does not fit, each by itself does
        return [passed(model, [one])[0] for one in asked]
    device, n_rows = model.word.device, sum(len(new) for _, new in asked)
    cache = KVCache(model.shape, n_rows, S + T, model.word)
    cache.length = S
    ids = torch.zeros((n_rows, T), dtype=torch.long, device=device)
    valid = torch.zeros((n_rows, S + T), dtype=torch.bool, device=device)
    last: list[int] = []
    spans: list[slice] = []
    for (follow, new), p in zip(asked, past, strict=True):
        n, t = new.shape
        span = slice(len(last), len(last) + n)
        # Padding is never looked at, and must be a number all the same: zero times NaN is NaN.
        for mine, theirs in ((cache.keys, follow.cache.keys), (cache.values, follow.cache.values)):
            for layer, columns in enumerate(theirs):
                mine[layer][span, :, : S - p] = 0.0
                mine[layer][span, :, S - p : S] = columns[:, :, :p]
        ids[span, :t] = torch.from_numpy(new).to(device)
        valid[span, S - p : S + t] = True
        last += [t - 1] * n
        spans.append(span)
    hidden = model(ids, None if len(asked) == 1 else valid, cache)
    for (follow, new), span in zip(asked, spans, strict=True):
        follow.keep(cache, span.start, S, new)
    scores = log_softmax(model.word_logits(hidden[torch.arange(n_rows), last]))
    return [scores[span] for span in spans]


class Next:
    """Log-probabilities of the next word after a prompt and paths of equal length.

    Columns that all paths share with what was read before are read once. There is no pass but the
    one that answers, so that whoever sits at a table never reads alone.
    room   columns that fit behind the prompt
    table  where others ask too; None: nobody does
    """

    def __init__(
        self, model: Backbone, prompt: Sequence[int], room: int, table: Together | None = None
    ):
        self.model, self.prompt, self.table = model, tuple(prompt), table
        self.cache = KVCache(model.shape, 1, len(prompt) + room, model.word)
        self.read = np.zeros(0, np.int64)
        self.tokens = 0  # that the model was asked to follow

    @torch.no_grad()
    def __call__(self, paths: Sequence[tuple[int, ...]]) -> np.ndarray:
        """(n, V) float64 under the full softmax. paths: n of one length."""
        rows = np.array([(*self.prompt, *path) for path in paths], dtype=np.int64)
        n = min(alike(rows[:, :-1], rows[:1, :-1]), len(self.read))
        known = self.cache.length = alike(self.read[None, :n], rows[:1, :n])
        self.read = self.read[:known]
        self.tokens += len(rows)
        if self.table is not None and self.table.sits():
            return self.table.after(self, rows[:, known:])
        return passed(self.model, [(self, rows[:, known:])])[0]

    def keep(self, cache: KVCache, row: int, start: int, new: np.ndarray) -> None:
        """Keep the columns of new (n, t) tokens in which all rows are alike.

        They stand in a row of the cache, from column `start` on.
        """
        n, p = alike(new, new[:1]), self.cache.length
        for mine, theirs in ((self.cache.keys, cache.keys), (self.cache.values, cache.values)):
            for layer, columns in enumerate(theirs):
                mine[layer][:, :, p : p + n] = columns[row : row + 1, :, start : start + n]
        self.cache.length = p + n
        self.read = np.concatenate([self.read, new[0, :n]])


def log_softmax(logits: Tensor) -> np.ndarray:
    return torch.log_softmax(logits.double(), dim=-1).cpu().numpy()


def alike(rows: np.ndarray, one: np.ndarray) -> int:
    """Columns at the front in which all rows (n, L) are what one (1, L) is."""
    differs = (rows != one).any(0)
    return int(differs.argmax()) if differs.any() else len(differs)


@dataclass(frozen=True)
class Local:
    """Answers of a network in this process; `ask` as in remote.Asked.

    ends    word tokens that end a line: the newline first, which also ends a keyword
    gamma   weight of the cosine between theme and keyword
    taught  the model was taught these two questions (student.py): it is asked in their short form
    way     how keywords are written: trie, under the trie; prompt, the same by a model that is told
            those on offer; free, under no mask, so that what is no keyword on offer is lost
    """

    model: Backbone
    vocab: Vocab
    corpus: Corpus
    pieces: Pieces
    ends: tuple[int, ...]
    name: str
    gamma: float = GAMMA
    taught: bool = False
    way: str = "trie"
    table: Together = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "table", Together(self.model))

    @classmethod
    def of(
        cls,
        model: Backbone,
        vocab: Vocab,
        corpus: Corpus,
        name: str,
        gamma: float = GAMMA,
        taught: bool = False,
        way: str = "trie",
    ) -> "Local":
        newline = vocab.words("\n")
        if len(newline) != 1:
            raise PageLLMError("the model's tokenizer has no token for a new line; take another")
        special = vocab.tokenizer.get_added_tokens_decoder()
        ends = (newline[0], *(token for token in sorted(special) if token < vocab.n_words))
        return cls(model.eval(), vocab, corpus, Pieces.of(vocab), ends, name, gamma, taught, way)

    @classmethod
    def load(
        cls,
        path: str | Path,
        corpus: Corpus,
        device: torch.device | str = "cpu",
        way: str = "trie",
    ) -> "Local":
        """From a published model's directory. Raises PageLLMError for one that cannot be read."""
        path = Path(path)
        if not path.is_dir():
            raise PageLLMError(
                f"no model directory {str(path)!r}\n"
                "  Make one of a GGUF file: pagellm import-gguf FILE --out DIRECTORY"
            )
        vocab = Vocab.published(path, 0, 0)
        model = build(published_shape(path), vocab.n_words, 0, 0, 0.0)
        load_published(model, path, vocab.n_words, spare=True)
        ids = "-".join(file_id(file) for file in sorted(path.glob("*.safetensors")))
        about = read_json(path / TAUGHT) if (path / TAUGHT).exists() else {}
        gamma = float(about.get("gamma", GAMMA))
        name = f"lm {path.name} {ids[:40]} {VERSION} gamma {gamma:g}"
        name += (f" {way}" if way != "trie" else "") + (SAYS_SO if about else "")
        return cls.of(model.to(device), vocab, corpus, name, gamma, bool(about), way)

    def ask(self, question: Question, read: Read) -> Answer[dict]:
        """One answer; for a title that will not do, one more, which begins otherwise."""
        started, problem = time.perf_counter(), ""
        prompt, room = self.prompt(question), self.room(question)
        if len(prompt) + room > self.model.shape.n_ctx:
            why = f"{len(prompt)} tokens of a question, and {room} of an answer, do not fit"
            return Answer(None, f"{why} into the model's {self.model.shape.n_ctx}")
        follow = Next(self.model, prompt, room, self.table)
        barred: tuple[int, ...] = ()
        for _ in (0, 1):
            if question.kind == "theme":
                path, title = self.title(follow, barred)
                value: dict = {"title": title, "concepts": question.data["categories"][:MOST]}
                barred = path[:1]
            elif self.way == "free":
                value = {"keywords": self.lines(follow, room)}
            else:
                value = {"keywords": self.keywords(follow, question)}
            try:
                found = read(value)
            except ValueError as error:
                problem = str(error)
                continue
            seconds = time.perf_counter() - started
            return Answer(found, "", len(prompt), follow.tokens, seconds)
        seconds = time.perf_counter() - started
        return Answer(None, problem, len(prompt), follow.tokens, seconds)

    def prompt(self, question: Question) -> list[int]:
        """Tokens of the question, up to where the answer begins."""
        if self.taught:
            line = tagged_line(question, self.way == "prompt")
            return [*self.vocab.words(line), self.ends[0]]
        messages = line_messages(question, self.way == "prompt")
        if self.vocab.template is not None:
            return self.vocab.chat(messages)
        return self.vocab.words("\n".join(message["content"] for message in messages) + "\n")

    def room(self, question: Question) -> int:
        """Most tokens of an answer."""
        if question.kind == "theme":
            return LONGEST + 1
        longest = max(map(len, self.vocab.words_batch(question.data["offered"])), default=0)
        return (MOST + 1) * (longest + 1)

    def title(self, follow: Next, barred: tuple[int, ...] = ()) -> tuple[tuple[int, ...], str]:
        """The likeliest token at each step, among plain ones, up to 40 characters and 7 words.

        barred  tokens that it must not begin with
        """
        path: tuple[int, ...] = ()
        text, whole = "", False
        while True:
            scores = follow([path])[0][: self.vocab.n_words]
            allowed = self.pieces.plain.copy()
            if not path:
                allowed[list(barred)] = False
            allowed[list(self.ends)] = len(text.strip()) >= SHORTEST
            best = int(np.where(allowed, scores, -np.inf).argmax())
            longer = self.vocab.tokenizer.decode([*path, best], skip_special_tokens=False)
            fits = len(longer) <= LONGEST and len(longer.split()) <= MOST_WORDS
            if best in self.ends or not fits:
                whole = best in self.ends or self.pieces.opens[best]
                break
            path, text = (*path, best), longer
        text = " ".join(text.split())
        # Where there was no room to end it, the last word may be half a word.
        text = text if whole or " " not in text else text.rsplit(" ", 1)[0]
        return path, text.strip(" ,&'-")

    def keywords(self, follow: Next, question: Question) -> list[str]:
        """Up to eight of those on offer, by log-probability and nearness to the theme."""
        offered = question.data["offered"]
        trie = Trie.of(self.vocab.words_batch(offered), self.ends[0])
        bonus = self.bonus(question)
        chosen = keywords_under(trie, follow, bonus, stops=self.taught)
        return [offered[one.number] for one in chosen]

    def lines(self, follow: Next, room: int) -> list[str]:
        """Lines as the network likes them best, under no mask, up to an empty one."""
        path: tuple[int, ...] = ()
        said: list[list[int]] = [[]]
        while len(path) < room and len(said) <= MOST:
            best = int(follow([path])[0][: self.vocab.n_words].argmax())
            path = (*path, best)
            if best not in self.ends:
                said[-1].append(best)
            elif best == self.ends[0] and said[-1]:
                said.append([])
            else:
                break
        decode = self.vocab.tokenizer.decode
        texts = [decode(line, skip_special_tokens=False).strip() for line in said if line]
        return texts[:MOST]

    def drawn(
        self, question: Question, rng: np.random.Generator, times: int, temperature: float
    ) -> list[list[str]]:
        """Keywords of so many answers, each drawn; [] where the question is too long."""
        offered, prompt = question.data["offered"], self.prompt(question)
        room = self.room(question)
        if len(prompt) + room > self.model.shape.n_ctx:
            return []
        follow = Next(self.model, prompt, room, self.table)
        trie = Trie.of(self.vocab.words_batch(offered), self.ends[0])
        return [
            [offered[n] for n in drawn_under(trie, follow, rng, temperature)] for _ in range(times)
        ]

    def bonus(self, question: Question) -> np.ndarray:
        theme = Theme(question.data["title"], "", tuple(question.data["concepts"]))
        vector = self.corpus.theme_vector(theme)
        number = [self.corpus.number.get(text, -1) for text in question.data["offered"]]
        near = self.corpus.vector[np.maximum(number, 0)] @ vector
        return self.gamma * np.where(np.array(number) >= 0, near, 0.0)
