"""Random numbers that are a function of a seed, names and numbers, and of nothing else.

    order = rng(seed, "sft", "order", epoch).permutation(n)

Each use makes a generator of its own, so no draw depends on what was drawn before it. A resumed run
therefore draws what the uninterrupted run would have drawn.
"""

import hashlib

import numpy as np
import torch

__all__ = ["rng", "seed_of", "seed_torch"]


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
