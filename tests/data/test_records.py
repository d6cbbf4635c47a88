"""Laws of reading lines and of counting what is broken."""

import gzip

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.data import records
from pagellm.data.packed import packing, recoding
from pagellm.data.records import Tally, lines, parsed
from pagellm.data.values import Broken, PassedOver
from pagellm.stage.config import PageLLMError

line_bytes = st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"").replace(b"\r", b""))
few = settings(deadline=None, max_examples=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


@few
@given(st.lists(line_bytes, max_size=6), st.booleans(), st.sampled_from([b"\n", b"\r\n"]))
def test_lines_are_what_was_written(folder, content, packed, end):
    path = folder / "x"
    data = b"".join(line + end for line in content)
    path.write_bytes(gzip.compress(data) if packed else data)
    expected = [
        line.removeprefix(b"\xef\xbb\xbf") if n == 0 else line for n, line in enumerate(content)
    ]
    if not packed and (packing(path) or recoding(data)):
        return  # that is what a packed file, or one of UTF-16, looks like
    assert list(lines(path)) == expected


@pytest.mark.parametrize("end", [b"", b"\n"])
@pytest.mark.parametrize("size", [9, 10, 11, 25, 31])
def test_an_overlong_line_is_none_and_the_next_is_whole(folder, monkeypatch, size, end):
    monkeypatch.setattr(records, "LINE_LIMIT", 10)
    path = folder / "long"
    path.write_bytes(b"first\n" + b"x" * size + b"\nlast" + end)
    assert list(lines(path)) == [b"first", b"x" * size if size <= 10 else None, b"last"]


def test_a_last_line_without_an_end_may_be_as_long_as_the_limit(folder, monkeypatch):
    monkeypatch.setattr(records, "LINE_LIMIT", 10)
    for size in (9, 10, 11):
        (folder / "long").write_bytes(b"x" * size)
        assert list(lines(folder / "long")) == [b"x" * size if size <= 10 else None]


def test_a_mark_at_the_start_of_a_file_is_no_part_of_it(folder):
    path = folder / "bom"
    path.write_bytes(b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n")
    assert list(lines(path)) == [b"a", b"\xef\xbb\xbfb"]


@pytest.mark.parametrize("damage", ["cut", "flip", "tail"])
def test_a_damaged_gzip_file_is_an_error_and_no_small_data_set(folder, damage):
    packed = bytearray(gzip.compress(b"".join(b"line %d\n" % n for n in range(3000))))
    if damage == "cut":
        packed = packed[: len(packed) // 2]
    else:
        packed[len(packed) // 2 if damage == "flip" else -6] ^= 0x55
    (folder / "bad.gz").write_bytes(packed)
    with pytest.raises(PageLLMError, match=r"bad\.gz"):
        list(lines(folder / "bad.gz"))


def test_a_missing_file_is_a_plain_message(folder):
    with pytest.raises(PageLLMError, match="gone"):
        list(lines(folder / "gone"))


@few
@given(
    st.lists(
        st.sampled_from([b"7", b"12", b"", b"  ", b"\xff", b"1\x002", b"x", b"4" * 40]), max_size=12
    )
)
def test_read_is_kept_plus_broken_by_reason(folder, content):
    path = folder / "mixed"
    path.write_bytes(b"".join(line + b"\n" for line in content))

    def parse(text):
        if text == "x":
            raise Broken("not a number")
        return int(text)

    tally = Tally()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "LINE_LIMIT", 20)
        kept = list(parsed(path, parse, tally))
    assert kept == [int(line) for line in content if line in (b"7", b"12")]
    assert tally.read == len(content) and tally.kept == len(kept)
    reasons = {
        "empty line": 0,
        "not UTF-8": 0,
        "NUL byte": 0,
        "not a number": 0,
        "line over 10 MB": 0,
    }
    for line in content:
        for reason, those in (
            ("empty line", (b"", b"  ", b"\x1f", "\u3000\x85".encode())),
            ("not UTF-8", (b"\xff",)),
            ("NUL byte", (b"1\x002",)),
            ("not a number", (b"x",)),
            ("line over 10 MB", (b"4" * 40,)),
        ):
            reasons[reason] += line in those
    assert tally.counts() == {
        "read": len(content),
        "kept": len(kept),
        "broken": {r: n for r, n in sorted(reasons.items()) if n},
    }
    broken_at = [n for n, line in enumerate(content, 1) if line not in (b"7", b"12")]
    assert [example.split(":")[:2] for example in tally.examples] == [
        ["mixed", str(n)] for n in broken_at[:5]
    ]


def test_more_broken_lines_than_allowed_stop(folder, capsys):
    tally = Tally(read=100)
    tally.check("review", 0.0)
    assert capsys.readouterr().out == ""
    tally.note("bad JSON", folder / "a.json", 17)
    tally.check("review", 0.01)
    assert "a.json:17: bad JSON" in capsys.readouterr().out
    tally.note(PassedOver("no user"), folder / "a.json", 17)  # whole, but not wanted
    tally.note("no user", folder / "a.json", 18)
    with pytest.raises(
        PageLLMError, match=r"(?s)2 of 100 .*1 bad JSON, 1 no user.*a.json:18: no user.*max_broken"
    ):
        tally.check("review", 0.01)
