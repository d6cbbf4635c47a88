"""A cache of prompt columns and user states: least recently used goes first, bounded in bytes."""

import threading
from collections import OrderedDict
from collections.abc import Hashable

__all__ = ["Cache"]


class Cache:
    """Least recently used values, at most `room` bytes of them. Safe between threads.

    Keys begin with the hash of a model, so that new weights never meet values of the old ones.
    """

    def __init__(self, room: int):
        self.room, self.size, self.hits, self.misses = room, 0, 0, 0
        self._kept: OrderedDict[Hashable, tuple[object, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable):
        """The value, or None."""
        with self._lock:
            if key not in self._kept:
                self.misses += 1
                return None
            self.hits += 1
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: Hashable, value, size: int) -> None:
        """Keep a value of `size` bytes. One that is larger than the whole room is not kept."""
        with self._lock:
            if key in self._kept or size > self.room:
                return
            self._kept[key] = (value, size)
            self.size += size
            while self.size > self.room:
                self.size -= self._kept.popitem(last=False)[1][1]

    def __len__(self) -> int:
        return len(self._kept)
