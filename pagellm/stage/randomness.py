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

__all__ = ["Streams", "generators", "rng", "seed_of", "seed_torch", "seeds"]


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


MULTIPLIER = np.uint64(2549297995355413924), np.uint64(4865540595714422341)  # upper, lower 64 bits
HALF, LOW = np.uint64(32), np.uint64(0xFFFFFFFF)


class Streams:
    """Generator(PCG64(s)) for every s of seed, all at once: row i draws what the i-th would.

    Only for bounded integers and permutations, which take words of 32 bits one after another.

    seed  (rows,) uint64
    Source: M. E. O'Neill, "PCG: a family of simple fast space-efficient statistically good
    algorithms for random number generation", 2014 (PCG XSL RR 128/64); NumPy's PCG64.
    """

    def __init__(self, seed: np.ndarray):
        first = seeds([seed & LOW, seed >> HALF], 4)
        high, low, step_high, step_low = first.T.copy()
        one = np.uint64(1)
        self.step = step_high << one | step_low >> np.uint64(63), step_low << one | one
        self.low = self.step[1] + low
        self.high = self.step[0] + high + (self.low < low)
        self.move()
        self.word = np.empty((0, len(seed)), dtype=np.uint32)  # the i-th word of each stream
        self.at = np.zeros(len(seed), dtype=np.int64)  # words that are spent

    def move(self) -> None:
        """state = state * MULTIPLIER + step, in 128 bits."""
        upper, lower = MULTIPLIER
        a, b, c, d = lower >> HALF, lower & LOW, self.low >> HALF, self.low & LOW
        ad, bc = a * d, b * c
        carry = (b * d >> HALF) + (ad & LOW) + (bc & LOW)
        self.high = self.high * lower + self.low * upper + a * c
        self.high += (ad >> HALF) + (bc >> HALF) + (carry >> HALF) + self.step[0]
        self.low = self.low * lower + self.step[1]
        self.high += self.low < self.step[1]

    def have(self, n: int) -> None:
        """Draw ahead, so that every stream has n words or more."""
        found = [self.word]
        for _ in range(-(-(n - len(self.word)) // 2)):
            self.move()
            turn, mixed = self.high >> np.uint64(58), self.high ^ self.low
            mixed = mixed >> turn | mixed << (-turn & np.uint64(63))
            found.append(np.stack([mixed & LOW, mixed >> HALF]).astype(np.uint32))
        self.word = np.concatenate(found)

    def of(self, rows: np.ndarray) -> "Streams":
        """Some of the streams, by number, from where they are; drawing moves the copy alone."""
        some = object.__new__(Streams)
        some.high, some.low = self.high[rows], self.low[rows]
        some.step = self.step[0][rows], self.step[1][rows]
        some.word, some.at = self.word[:, rows], self.at[rows]
        return some

    def integers(self, n: np.ndarray) -> np.ndarray:
        """(rows,) int64, each from 0 to its n - 1; n (rows,), 1 to 2^32 - 1. 1 spends no word.

        Source: Lemire, "Fast random integer generation in an interval", 2019.
        """
        n = np.asarray(n, dtype=np.uint64)
        drawn, todo = np.zeros(len(n), dtype=np.int64), np.flatnonzero(n > 1)
        while len(todo):
            self.have(int(self.at[todo].max()) + 1)
            both = self.word[self.at[todo], todo] * n[todo]
            self.at[todo] += 1
            drawn[todo] = both >> HALF
            todo = todo[(both & LOW) < (np.uint64(1 << 32) - n[todo]) % n[todo]]
        return drawn

    def permutation(self, table: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Each row's first `count` entries in random order; what stands to their right stays.

        table  (rows, M)
        count  (rows,) int64, from 0 to M
        """
        rows, M = table.shape
        last, begin = np.maximum(count - 1, 0).astype(np.uint32), self.at.copy()
        # A word, cut to as many bits as `last` has, is the place that `last` changes with; one
        # that is larger than `last` is thrown away.
        bits = np.array([(1 << place.bit_length()) - 1 for place in range(M + 1)], dtype=np.uint32)
        places: list[np.ndarray] = []
        lasts: list[np.ndarray] = []
        every = np.arange(rows)
        while last.any():
            if len(places) + int(begin.max()) >= len(self.word):
                self.have(len(self.word) + M + 8)
            place = self.word[begin + len(places), every] & bits[last]
            places.append(place)
            lasts.append(last)
            last = last - ((place <= last) & (last > 0))
        order = np.argsort(-count, kind="stable")  # rows that take a step stand together
        table, swap = table[order], np.zeros((M, rows), dtype=np.int64)
        if places:
            place, before = np.stack(places), np.stack(lasts)
            self.at += (before > 0).sum(0)
            step, row = np.nonzero((place <= before) & (before > 0))
            swap[before[step, row], row] = place[step, row]
        swap = swap[:, order] + every * M
        flat, active = table.reshape(-1), np.searchsorted(-count[order], -np.arange(M))
        for i in range(M - 1, 0, -1):
            if active[i]:
                j, own = swap[i, : active[i]], table[: active[i], i].copy()
                table[: active[i], i] = flat[j]
                flat[j] = own
        mixed = np.empty_like(table)
        mixed[order] = table
        return mixed
