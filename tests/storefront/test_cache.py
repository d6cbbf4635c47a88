"""What is kept comes back; what is old, damaged, full or locked harms nobody."""

import sqlite3
import threading

import pytest

from pagellm.storefront.cache import Cache, key_of


class Clock:
    now = 1_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def kept(tmp_path, clock):
    found = Cache(tmp_path / "deep" / "cache.sqlite", room=1000, days=7, clock=clock)
    yield found
    found.close()


def test_a_key_names_its_parts_in_any_order_and_no_others():
    assert key_of(a=1, b=[2]) == key_of(b=[2], a=1) and len(key_of(a=1)) == 32
    assert len({key_of(a=1), key_of(a="1"), key_of(a=1, b=None), key_of(b=1)}) == 4


def test_what_is_put_comes_back_from_another_process_too(kept, clock):
    assert kept.put([("a", b"1"), ("b", b"\x00" * 5)]) == ""
    again = Cache(kept.path, clock=clock)
    assert (again.get("a"), again.get("b"), again.get("c")) == (b"1", b"\x00" * 5, None)
    assert again.holds(["a", "c"]) == [True, False] and again.size() == (2, 6)
    assert (again.hits, again.misses) == (2, 1)
    again.close()


def test_an_entry_lasts_seven_days(kept, clock):
    kept.put([("a", b"1")])
    clock.now += 7 * 86_400 - 1
    assert kept.get("a") == b"1"
    clock.now += 2
    assert kept.get("a") is None and kept.holds(["a"]) == [False]
    kept.put([])
    assert kept.size() == (0, 0)


def test_what_was_not_used_for_longest_goes_first(kept, clock):
    for name in "abc":
        kept.put([(name, b"x" * 300)])
        clock.now += 5000
    assert kept.get("a")
    kept.put([("d", b"x" * 300)])
    assert [kept.get(name) is not None for name in "abcd"] == [True, False, True, True]


def test_a_damaged_file_is_begun_anew(kept, clock):
    kept.put([("a", b"1")])
    kept.close()
    kept.path.write_bytes(b"no database at all, " * 500)
    again = Cache(kept.path, clock=clock)
    assert again.get("a") is None and again.put([("a", b"2")]) == "" and again.get("a") == b"2"
    # Damaged while it is open: pages of the file are overwritten.
    again.put([(f"k{n}", bytes(90)) for n in range(9)])
    again.base.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with open(again.path, "r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 8000)
    fresh = Cache(kept.path, clock=clock)
    assert fresh.get("k1") is None and fresh.put([("k1", b"3")]) == "" and fresh.get("k1") == b"3"
    fresh.close()
    again.close()


def test_a_file_of_another_format_is_begun_anew(kept, clock):
    kept.put([("a", b"1")])
    kept.close()
    with sqlite3.connect(kept.path) as base:
        base.execute("PRAGMA user_version=99")
    base.close()
    again = Cache(kept.path, clock=clock)
    assert again.get("a") is None and again.trouble == ""
    again.close()


def test_a_full_disk_keeps_what_was_there_and_says_why(kept):
    kept.put([("a", b"1")])
    kept.base.execute("PRAGMA max_page_count=1")  # SQLite never goes below what is there
    why = kept.put([("b", b"x"), ("c", bytes(100_000))])
    assert "full" in why and kept.trouble == why
    assert kept.get("a") == b"1" and kept.get("b") is None  # all or nothing


def test_a_file_that_is_taken_away_or_may_not_be_written_gives_nothing(tmp_path, clock):
    (tmp_path / "cache.sqlite").mkdir()
    kept = Cache(tmp_path / "cache.sqlite", clock=clock)
    assert kept.get("a") is None and "unable to open" in kept.put([("a", b"1")])


def test_two_builders_write_at_once_and_nothing_is_lost(kept, clock):
    """Each has its own connection; SQLite's lock makes them wait for each other."""

    def write(first):
        mine = Cache(kept.path, room=1000, clock=clock)
        for n in range(first, 40, 2):
            assert mine.put([(f"k{n}", b"v")]) == ""
        mine.close()

    threads = [threading.Thread(target=write, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept.size()[0] == 40


def test_reading_does_not_wait_for_a_writer(kept, clock):
    kept.put([("a", b"1")])
    other = sqlite3.connect(kept.path)
    other.execute("BEGIN IMMEDIATE")
    assert kept.get("a") == b"1"
    other.rollback()
    other.close()
