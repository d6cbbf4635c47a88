"""Random numbers that are a function of a seed, names and numbers, and of nothing else.

    order = rng(seed, "sft", "order", epoch).permutation(n)

Each use makes a generator of its own, so no draw depends on what was drawn before it. A resumed run
therefore draws what the uninterrupted run would have drawn.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence

__all__ = ["generators", "rng", "seed_of", "seed_torch", "seeds"]


def seed_of(*parts: object) -> int:
    """A 128-bit seed made from names and numbers; the same on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def rng(*parts: object) -> np.random.Generator:
    """NumPy's generator for this tuple of names and numbers, e.g. (seed, stage, step, example)."""
    return np.random.Generator(np.random.Philox(key=seed_of(*parts)))


def seed_torch(*parts: object) -> None:
    """Seed torch's global generator, which dropout and initialisation draw from.

    The stages do so in every step. A checkpoint therefore need not hold the generator's state.
    """
    torch.manual_seed(seed_of(*parts) % (1 << 63))


# Constants of NumPy's SeedSequence (M. E. O'Neill, "Developing a seed_seq alternative", 2015).
HASH_A, HASH_B = (0x43B0D7E5, 0x931E8875), (0x8B51F9DD, 0x58F38DED)  # first, and times this each
MIX = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
POOL = 4  # words


class Hash:
    """Hashes words (n,) uint32; every call differs from the one before."""

    def __init__(self, first: int, times: int):
        self.now, self.times = first, times

    def __call__(self, word: np.ndarray) -> np.ndarray:
        word = word ^ np.uint32(self.now)
        self.now = self.now * self.times & 0xFFFFFFFF
        word = word * np.uint32(self.now)
        return word ^ (word >> np.uint32(16))


def seeds(words: Sequence[np.ndarray], n: int) -> np.ndarray:
    """SeedSequence(entropy).generate_state(n, uint64) of many rows at once: (rows, n) uint64.

    words  (rows,) unsigned 32 bits each: the entropy of every row. A number above 32 bits is two
           words, the lower first
    """
    given = [np.asarray(word, dtype=np.uint32) for word in words]
    given += [np.zeros_like(given[0])] * (POOL - len(given))
    mixed = Hash(*HASH_A)
    pool = [mixed(word) for word in given[:POOL]]

    def mix(at: int, word: np.ndarray) -> None:
        both: np.ndarray = MIX[0] * pool[at] - MIX[1] * mixed(word)
        pool[at] = both ^ (both >> np.uint32(16))

    for source in range(POOL):
        for at in range(POOL):
            if at != source:
                mix(at, pool[source])
    for word in given[POOL:]:
        for at in range(POOL):
            mix(at, word)
    spread = Hash(*HASH_B)
    low_high = np.stack([spread(pool[at % POOL]) for at in range(2 * n)], 1).astype(np.uint64)
    return low_high[:, ::2] | low_high[:, 1::2] << np.uint64(32)


class State(ISeedSequence):
    """What a bit generator begins from, where it is known already."""

    def __init__(self, state: np.ndarray):
        self.state = state

    def generate_state(self, n_words, dtype=np.uint32) -> np.ndarray:
        return self.state


def generators(seed: np.ndarray) -> Iterator[np.random.Generator]:
    """Generator(PCG64(s)) for every s of seed (n,) uint64: the same draws, ten times as fast."""
    low, high = seed & np.uint64(0xFFFFFFFF), seed >> np.uint64(32)
    for state in seeds([low, high], 4):
        yield np.random.Generator(np.random.PCG64(State(state)))  # type: ignore[arg-type]
