"""One id space in four runs: words | special tokens | users | items.

Words are the byte-level BPE of a published model (GPT-2's two files, or a tokenizer.json such as
Llama's), or the same kind of tokeniser trained on the shop's own text. Byte-level means that no
text is unknown: every byte has a token.

    vocab = Vocab.train(texts, n_users=2000, n_items=1000, size=2048)
    vocab = Vocab.published("data/gpt2", n_users=2000, n_items=1000)
    vocab.words("Blue drum"), vocab.item(12), vocab.rating(4.0), vocab.page
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pagellm.data.shop import Catalogue
from pagellm.model.chat import Message, guarded, read_template, render
from pagellm.model.facts import item_facts
from pagellm.stage.config import PageLLMError
from pagellm.stage.files import atomic, read_json

__all__ = ["SPECIALS", "Vocab"]


# <r?> means "liked, level unknown": implicit feedback has no rating, and none is invented.
SPECIALS = ("<pad>", "<page>", "<user_unk>", "<r?>", "<r1>", "<r2>", "<r3>", "<r4>", "<r5>")
TWO_FILES = ("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")

# How a byte-level BPE cuts ASCII text into words before it merges: GPT-2's pattern, with letters
# and digits written as ranges.
WORD = re.compile(
    r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII
)
CACHED_WORDS = 100_000  # words whose tokens are remembered
LONGEST_WORD = 64  # characters of a word worth remembering

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def plain_words(tokenizer: Tokenizer) -> bool:
    """Whether a tokeniser cuts text as GPT-2 does and merges within words alone.

    The tokens of each word may then be looked up.
    """
    form = json.loads(tokenizer.to_str())
    cut = form["pre_tokenizer"] or {}
    return (
        cut.get("type") == "ByteLevel"
        and cut.get("use_regex", True)
        and not cut.get("add_prefix_space")
        and form["normalizer"] is None
        and not form["added_tokens"]
    )


class Vocab:
    """words 0..W-1 | special tokens W..W+S-1 | users | items.

    times  time tokens <t1>..<t{times}> after the other special tokens, for prompts that show the
           time; 0: none
    shown  names of the facts that page prompts show of items (facts.py); (): none
    facts  their tokens, by item
    """

    def __init__(self, tokenizer: Tokenizer, n_users: int, n_items: int, times: int = 0):
        self.tokenizer = tokenizer
        # a review that says "<|end_of_text|>" is text like any other
        tokenizer.encode_special_tokens = True
        # tokens of words that were met before
        self._tokens: dict[str, list[int]] | None = {} if plain_words(tokenizer) else None
        # how a chat is written, if the words are of a model that chats (chat.read_template)
        self.template: dict[str, str] | None = None
        self.n_words = tokenizer.get_vocab_size()
        self.times = times
        self.shown: tuple[str, ...] = ()
        self.facts: tuple[tuple[int, ...], ...] = ()
        self.n_specials = len(SPECIALS) + times
        self.n_users, self.n_items = n_users, n_items
        self.user0 = self.n_words + self.n_specials
        self.item0 = self.user0 + n_users
        self.size = self.item0 + n_items
        self.pad = self.special("<pad>")
        self.page = self.special("<page>")
        self.user_unk = self.special("<user_unk>")

    @classmethod
    def train(
        cls, texts: Iterable[str], n_users: int, n_items: int, size: int = 2048, times: int = 0
    ) -> "Vocab":
        """Byte-level BPE of at most `size` words from `texts`; without any text, the 256 bytes.

        Raises PageLLMError for a size below 256.
        """
        if size < 256:
            raise PageLLMError(f"words={size}: want at least 256, one for each byte")
        tokenizer = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        byte_level(tokenizer)
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer, n_users, n_items, times)

    @classmethod
    def gpt2(cls, path: str | Path, n_users: int, n_items: int, times: int = 0) -> "Vocab":
        """GPT-2's words from encoder.json and vocab.bpe (or vocab.json and merges.txt) in `path`.

        Raises PageLLMError if the files are not there, or are another model's: a config.json
        beside them says so.
        """
        path = Path(path)
        about = read_json(path / "config.json") if (path / "config.json").exists() else {}
        if (kind := about.get("model_type", "gpt2")) != "gpt2":
            raise PageLLMError(
                f"no tokenizer.json in {path}, whose config.json is of a {kind}\n  Two files of "
                "words and merges do not say how it cuts text; fetch its tokenizer.json too."
            )
        for words, merges in TWO_FILES:
            if (path / words).exists() and (path / merges).exists():
                index = json.loads((path / words).read_text(encoding="utf-8"))
                lines = (path / merges).read_text(encoding="utf-8").split("\n")
                pairs = [
                    (line.split(" ")[0], line.split(" ")[1])
                    for line in lines
                    if line and not line.startswith("#version")
                ]
                tokenizer = Tokenizer(models.BPE(vocab=index, merges=pairs))
                byte_level(tokenizer)
                return cls(tokenizer, n_users, n_items, times)
        raise PageLLMError(
            f"no GPT-2 word files in {path}\n  Want encoder.json and vocab.bpe "
            "(or vocab.json and merges.txt), as published with GPT-2."
        )

    @classmethod
    def published(cls, path: str | Path, n_users: int, n_items: int, times: int = 0) -> "Vocab":
        """The words of a published model.

        path  a tokenizer.json, or a directory with it or, of a GPT-2, with its two files
        The model's own special tokens stay words, and no token is added before or after a text.
        Raises PageLLMError for files that are missing or cannot be read, and for ids with gaps.
        """
        path = Path(path)
        # The two files say nothing about how text is cut before it is merged: Qwen has them too.
        if path.is_dir() and not (path / "tokenizer.json").exists():
            return cls.gpt2(path, n_users, n_items, times)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.exists():
            raise PageLLMError(
                f"no {path}\n  Want a model's tokenizer.json, or a directory with it or with "
                "GPT-2's encoder.json and vocab.bpe."
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the reader raises plain Exception
            raise PageLLMError(
                f"{path} is no tokenizer.json of the tokenizers package ({error})"
            ) from None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if tokenizer.get_vocab_size() != max(tokenizer.get_vocab().values(), default=-1) + 1:
            raise PageLLMError(
                f"{path}: {tokenizer.get_vocab_size()} words, but ids up to "
                f"{max(tokenizer.get_vocab().values(), default=-1)}; want ids without gaps"
            )
        vocab = cls(tokenizer, n_users, n_items, times)
        vocab.template = read_template(path.parent)
        return vocab

    def show(self, names: tuple[str, ...], catalogue: Catalogue) -> None:
        """Let page prompts show these facts of the items of a catalogue."""
        found = item_facts(self.words, catalogue, names) if names else []
        self.shown, self.facts = tuple(names), tuple(map(tuple, found))

    def special(self, name: str) -> int:
        """Token of one of SPECIALS."""
        return self.n_words + SPECIALS.index(name)

    def user(self, user) -> int:
        """Token of a dense user id; <user_unk> for None and for an id outside the table."""
        return (
            self.user_unk
            if user is None or not 0 <= user < self.n_users
            else self.user0 + int(user)
        )

    def item(self, item: int) -> int:
        """Token of a dense item id. Raises ValueError for an id outside the table."""
        if not 0 <= item < self.n_items:
            raise ValueError(f"item {item} is outside 0..{self.n_items - 1}")
        return self.item0 + int(item)

    def rating(self, rating: float) -> int:
        """<r1>..<r5> by the nearest whole star; <r?> for NaN."""
        if np.isnan(rating):
            return self.special("<r?>")
        return self.special(f"<r{min(5, max(1, round(float(rating))))}>")

    def time(self, period: int) -> int:
        """Token <t1>.. of a period counted from 0. Raises ValueError for one outside the table."""
        if not 0 <= period < self.times:
            raise ValueError(f"period {period} is outside 0..{self.times - 1}")
        return self.n_words + len(SPECIALS) + int(period)

    def words(self, text: str) -> list[int]:
        """Token ids of a text.

        GPT-2's tokeniser merges nothing across words, so words of ASCII text are looked up.
        """
        if self._tokens is None or not text.isascii():
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        tokens, known = [], self._tokens
        for word in WORD.findall(text):
            found = known.get(word)
            if found is None:
                found = self.tokenizer.encode(word, add_special_tokens=False).ids
                if len(word) <= LONGEST_WORD and len(known) < CACHED_WORDS:
                    known[word] = found
            tokens += found
        return tokens

    def words_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of several texts."""
        return [
            encoding.ids
            for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False)
        ]

    def chat(self, messages: Sequence[Message], more: bool = True) -> list[int]:
        """Token ids of a chat, written by the template of the published model.

        messages  {"role": "system", "user" or "assistant", "content": text}, in order
        more      end with what begins an answer
        Control tokens come from the template alone: one that a message spells is text like any
        other. Raises PageLLMError where the model has no template, or it refuses the messages.
        """
        if self.template is None:
            raise PageLLMError(
                "these words have no chat template; take those of a model that was taught to chat "
                "(tokenizer_config.json beside its tokenizer.json)"
            )
        added = self.tokenizer.get_added_tokens_decoder()
        control = {token.content: at for at, token in added.items() if token.special}
        safe, mark = guarded(messages, list(control))
        text = render(self.template, safe, more)
        names = sorted(control, key=len, reverse=True)
        pattern = "(" + "|".join(map(re.escape, names)) + ")"
        tokens: list[int] = []
        for part in re.split(pattern, text) if names else [text]:
            tokens += [control[part]] if part in control else self.words(part.replace(mark, ""))
        return tokens

    def decode(self, ids: Iterable[int]) -> str:
        """Readable text of any ids: words as they were, the rest as <user 3>, <item 12>, <page>."""
        parts, run = [], []
        for token in [*map(int, ids), None]:
            if token is not None and token < self.n_words:
                run.append(token)
                continue
            if run:
                parts.append(self.tokenizer.decode(run, skip_special_tokens=False))
                run = []
            if token is None:
                break
            if token < self.user0:
                place = token - self.n_words
                parts.append(
                    SPECIALS[place] if place < len(SPECIALS) else f"<t{place - len(SPECIALS) + 1}>"
                )
            elif token < self.item0:
                parts.append(f"<user {token - self.user0}>")
            elif token < self.size:
                parts.append(f"<item {token - self.item0}>")
            else:
                raise ValueError(f"token {token} is outside the vocabulary of {self.size}")
        return "".join(parts)

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json and vocab.json into directory `path`."""
        path = Path(path)
        with atomic(path / "tokenizer.json") as beside:
            self.tokenizer.save(str(beside))
        with atomic(path / "vocab.json") as beside:
            beside.write_text(
                json.dumps(
                    {"n_users": self.n_users, "n_items": self.n_items}
                    | ({"times": self.times} if self.times else {})
                    | ({"chat": self.template} if self.template else {})
                    | ({"shown": self.shown, "facts": self.facts} if self.shown else {})
                )
                + "\n"
            )

    @classmethod
    def load(cls, path: str | Path) -> "Vocab":
        """Read what `save` wrote. Raises PageLLMError if it is not there."""
        path = Path(path)
        try:
            sizes = json.loads((path / "vocab.json").read_text())
            vocab = cls(
                Tokenizer.from_file(str(path / "tokenizer.json")),
                sizes["n_users"],
                sizes["n_items"],
                sizes.get("times", 0),
            )
            vocab.template = sizes.get("chat")
            vocab.shown = tuple(sizes.get("shown", ()))
            vocab.facts = tuple(map(tuple, sizes.get("facts", ())))
            return vocab
        except FileNotFoundError as error:
            missing = Path(error.filename or "tokenizer.json").name
            raise PageLLMError(f"no vocabulary in {path} ({missing} is missing)") from None


def byte_level(tokenizer: Tokenizer) -> None:
    """Let a tokeniser cut and join text by bytes, as GPT-2 does."""
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
