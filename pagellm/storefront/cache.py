"""Rows and pages that were made ahead: a SQLite file of key -> bytes.

kept = Cache(folder / "cache.sqlite")
kept.put([(key_of(stage="page", user="u1"), b"...")])        "" or why nothing was kept
kept.get(key)                                                bytes, or None

A key names everything that the value depends on, so a value of an old version is never found; it
is the first to be removed. The file may be damaged, full or removed at any time; then a new one is
begun, or reading gives None. Only `put` ever waits for another process.
"""

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

__all__ = ["Cache", "key_of"]

DAYS, ROOM = 7, 256 << 20  # how long an entry lasts, and bytes of all values together
FORMAT = 1  # PRAGMA user_version of a file that this module can read
SETTLE = 3600  # seconds that must have passed before a look-up counts as a later use
TABLE = (
    "CREATE TABLE IF NOT EXISTS kept (key TEXT PRIMARY KEY, made INTEGER, used INTEGER, "
    "size INTEGER, value BLOB)"
)


def key_of(**parts) -> str:
    """The key of what is made from these parts (anything JSON can hold): 32 hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Cache:
    """One SQLite file, written ahead (WAL), which several threads and processes may use.

    path   its directory is made
    room   bytes of all values; beyond them, what was not used for longest goes
    days   after which an entry is gone
    clock  seconds since 1970
    """

    def __init__(
        self,
        path: str | Path,
        room: int = ROOM,
        days: float = DAYS,
        clock: Callable[[], float] = time.time,
    ):
        self.path, self.room, self.days, self.clock = Path(path), room, days, clock
        self.hits = self.misses = 0
        self.trouble = ""  # why the file cannot be used now; "" where it can
        self.lock = threading.Lock()
        self.used: dict[str, int] = {}  # uses that are not noted in the file yet
        self.base: sqlite3.Connection | None = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.lock:
            self.open()

    def open(self) -> None:
        """Connect; a file that is no cache of this format is removed and begun anew."""
        for attempt in (0, 1):
            try:
                base = sqlite3.connect(self.path, timeout=10.0, check_same_thread=False)
                self.base = base
                found = base.execute("PRAGMA user_version").fetchone()[0]
                if found not in (0, FORMAT):
                    raise sqlite3.DatabaseError(f"format {found}, want {FORMAT}")
                base.execute("PRAGMA journal_mode=WAL")
                base.execute("PRAGMA synchronous=NORMAL")
                base.execute(TABLE)
                base.execute(f"PRAGMA user_version={FORMAT}")
                base.commit()
                self.trouble = ""
                return
            except sqlite3.Error as error:
                self.shut()
                self.trouble = f"{self.path}: {error}"
                if attempt or isinstance(error, sqlite3.OperationalError):
                    return  # locked, full or read-only: the cache is then left out
                self.remove()

    def remove(self) -> None:
        for end in ("", "-wal", "-shm"):
            Path(f"{self.path}{end}").unlink(missing_ok=True)

    def shut(self) -> None:
        base, self.base = self.base, None
        if base is not None:
            base.close()

    def close(self) -> None:
        """Note what was used, and let go of the file."""
        self.put([])
        with self.lock:
            self.shut()

    def get(self, key: str) -> bytes | None:
        """The value of a key; None where it is missing, too old, or the file cannot be read."""
        now = self.clock()
        with self.lock:
            row = self.ask("SELECT value, made, used FROM kept WHERE key = ?", (key,))
            if not row or row[0][1] < now - self.days * 86_400:
                self.misses += 1
                return None
            value, _, used = row[0]
            if now - used > SETTLE:
                self.used[key] = int(now)
            self.hits += 1
        return value

    def ask(self, sql: str, values: tuple = ()) -> list:
        """The rows of a query; [] where the file cannot be read. A damaged file is begun anew."""
        if self.base is None:
            self.open()
        if self.base is None:
            return []
        try:
            return self.base.execute(sql, values).fetchall()
        except sqlite3.OperationalError as error:
            self.trouble = f"{self.path}: {error}"
        except sqlite3.DatabaseError as error:
            self.trouble = f"{self.path}: {error}; begun anew"
            self.shut()
            self.remove()
        return []

    def put(self, entries: Iterable[tuple[str, bytes]]) -> str:
        """Keep some values, all or none of them. Returns "", or why nothing was kept."""
        now = int(self.clock())
        rows = [(key, now, now, len(value), value) for key, value in entries]
        with self.lock:
            if self.base is None:
                self.open()
            if self.base is None:
                return self.trouble
            try:
                with self.base:  # a transaction
                    noted = [(at, key) for key, at in self.used.items()]
                    self.base.executemany("UPDATE kept SET used = ? WHERE key = ?", noted)
                    self.base.executemany("REPLACE INTO kept VALUES (?, ?, ?, ?, ?)", rows)
                    self.make_room(now)
                self.used.clear()
                self.trouble = ""
            except sqlite3.Error as error:
                self.trouble = f"{self.path}: {error}"
                if not isinstance(error, sqlite3.OperationalError):
                    self.shut()
                    self.remove()
        return self.trouble

    def make_room(self, now: int) -> None:
        """Drop what is too old, then what was not used for longest, down to nine tenths of room."""
        assert self.base is not None
        self.base.execute("DELETE FROM kept WHERE made < ?", (now - int(self.days * 86_400),))
        total = self.base.execute("SELECT COALESCE(SUM(size), 0) FROM kept").fetchone()[0]
        if total <= self.room:
            return
        gone = []
        for key, size in self.base.execute("SELECT key, size FROM kept ORDER BY used, key"):
            gone.append((key,))
            total -= size
            if total <= 0.9 * self.room:
                break
        self.base.executemany("DELETE FROM kept WHERE key = ?", gone)

    def holds(self, keys: Iterable[str]) -> list[bool]:
        """Which of some keys are there and not too old, without counting as uses."""
        oldest = int(self.clock() - self.days * 86_400)
        with self.lock:
            sql = "SELECT 1 FROM kept WHERE key = ? AND made >= ?"
            return [bool(self.ask(sql, (key, oldest))) for key in keys]

    def size(self) -> tuple[int, int]:
        """Entries, and bytes of their values."""
        with self.lock:
            row = self.ask("SELECT COUNT(*), COALESCE(SUM(size), 0) FROM kept")
        return (row[0][0], row[0][1]) if row else (0, 0)
