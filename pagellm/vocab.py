"""One id space in four runs: words | specials | users | items (SPEC 3).

Words are GPT-2's byte-level BPE, from its two published files, or the same kind of tokeniser trained on the
shop's own text. Byte-level means that no text is unknown: every byte has a token.

    vocab = Vocab.train(texts, n_users=2000, n_items=1000, size=2048)
    vocab = Vocab.gpt2("data/gpt2", n_users=2000, n_items=1000)     # encoder.json, vocab.bpe
    vocab.words("Blue drum"), vocab.item(12), vocab.rating(4.0), vocab.page
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pagellm.config import PageLLMError
from pagellm.run import atomic

__all__ = ["SPECIALS", "Vocab"]

# <r?> is "liked, level unknown": implicit feedback has no rating and none is invented for it.
SPECIALS = ("<pad>", "<page>", "<user_unk>", "<r?>", "<r1>", "<r2>", "<r3>", "<r4>", "<r5>")

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Vocab:
    """words 0..W-1 | specials W..W+S-1 | users | items; every id has one meaning, every meaning one id.

    times  time tokens <t1>..<t{times}> behind the other specials, for prompts that show when; 0: none
    """

    def __init__(self, tokenizer: Tokenizer, n_users: int, n_items: int, times: int = 0):
        self.tokenizer = tokenizer
        self.n_words = tokenizer.get_vocab_size()
        self.times = times
        self.n_specials = len(SPECIALS) + times
        self.n_users, self.n_items = n_users, n_items
        self.user0 = self.n_words + self.n_specials
        self.item0 = self.user0 + n_users
        self.size = self.item0 + n_items
        self.pad = self.special("<pad>")
        self.page = self.special("<page>")
        self.user_unk = self.special("<user_unk>")

    @classmethod
    def train(cls, texts: Iterable[str], n_users: int, n_items: int, size: int = 2048,
              times: int = 0) -> "Vocab":
        """Byte-level BPE of at most `size` words from `texts`; with no text at all it is the 256 bytes."""
        if size < 256:
            raise PageLLMError(f"words={size}: want at least 256, one for each byte")
        tokenizer = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                      show_progress=False)
        byte_level(tokenizer)
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer, n_users, n_items, times)

    @classmethod
    def gpt2(cls, path: str | Path, n_users: int, n_items: int, times: int = 0) -> "Vocab":
        """GPT-2's words from encoder.json and vocab.bpe (or vocab.json and merges.txt) in `path`."""
        path = Path(path)
        for words, merges in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
            if (path / words).exists() and (path / merges).exists():
                index = json.loads((path / words).read_text(encoding="utf-8"))
                lines = (path / merges).read_text(encoding="utf-8").split("\n")
                pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
                tokenizer = Tokenizer(models.BPE(vocab=index, merges=pairs))
                byte_level(tokenizer)
                return cls(tokenizer, n_users, n_items, times)
        raise PageLLMError(f"no GPT-2 word files in {path}\n  Want encoder.json and vocab.bpe "
                           "(or vocab.json and merges.txt), as published with GPT-2.")

    def special(self, name: str) -> int:
        return self.n_words + SPECIALS.index(name)

    def user(self, user) -> int:
        """Token of a dense user id; None or an id outside the table is <user_unk>."""
        return self.user_unk if user is None or not 0 <= user < self.n_users else self.user0 + int(user)

    def item(self, item: int) -> int:
        if not 0 <= item < self.n_items:
            raise ValueError(f"item {item} is outside 0..{self.n_items - 1}")
        return self.item0 + int(item)

    def rating(self, rating: float) -> int:
        """<r1>..<r5> by the nearest whole star; NaN is <r?>."""
        if np.isnan(rating):
            return self.special("<r?>")
        return self.special(f"<r{min(5, max(1, round(float(rating))))}>")

    def time(self, period: int) -> int:
        """<t1>.. of a period counted from 0."""
        if not 0 <= period < self.times:
            raise ValueError(f"period {period} is outside 0..{self.times - 1}")
        return self.n_words + len(SPECIALS) + int(period)

    def words(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def words_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]

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
                parts.append(SPECIALS[place] if place < len(SPECIALS) else f"<t{place - len(SPECIALS) + 1}>")
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
            beside.write_text(json.dumps({"n_users": self.n_users, "n_items": self.n_items}
                                         | ({"times": self.times} if self.times else {})) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Vocab":
        path = Path(path)
        try:
            sizes = json.loads((path / "vocab.json").read_text())
            return cls(Tokenizer.from_file(str(path / "tokenizer.json")), sizes["n_users"], sizes["n_items"],
                       sizes.get("times", 0))
        except FileNotFoundError as error:
            raise PageLLMError(f"no vocabulary in {path} ({Path(error.filename or 'tokenizer.json').name} is missing)"
                               ) from None


def byte_level(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
