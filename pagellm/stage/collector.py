"""Python's collector of reference cycles, out of the way of work that makes many objects and no
cycles: importing modules, or lists of pairs."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["paused", "settle"]


@contextmanager
def paused() -> Iterator[None]:
    """No collection inside the block."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def settle() -> None:
    """Leave what is there now out of every later collection: modules, weights, a shop.

    A full collection looks at each object. With torch imported, that takes over a tenth of a second
    in which no page is written.
    """
    gc.freeze()
