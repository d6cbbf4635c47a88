"""A random generator for every (seed, names, numbers): no draw depends on what was drawn before."""

import hashlib

import numpy as np
import torch

__all__ = ["rng", "seed_of", "seed_torch"]


def seed_of(*parts) -> int:
    """128 bits from a tuple of names and numbers; the same on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def rng(*parts) -> np.random.Generator:
    """A generator of its own for (seed, verb, step, example ...)."""
    return np.random.Generator(np.random.Philox(key=seed_of(*parts)))


def seed_torch(*parts) -> None:
    """Dropout and initialisation: torch's global generator, seeded anew (once a step, so resume needs no state)."""
    torch.manual_seed(seed_of(*parts) % (1 << 63))
