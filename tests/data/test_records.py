"""Laws of the smallest pieces of reading: lines, identifiers, numbers, times, texts, prices."""

import gzip
import html
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.data import records
from pagellm.data.records import (
    NO_TIME,
    Broken,
    Tally,
    clean,
    identifier,
    lines,
    number,
    opinion,
    parsed,
    price,
    rating_in,
    time_seconds,
)
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
    if not packed and data[:2] == b"\x1f\x8b":
        return  # that is what a gzip file looks like
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
    tally.note("no user", folder / "a.json", 18)
    with pytest.raises(
        PageLLMError, match=r"(?s)2 of 100 .*1 bad JSON, 1 no user.*a.json:18: no user.*max_broken"
    ):
        tally.check("review", 0.01)


@few
@given(st.text(min_size=1, max_size=20))
def test_an_identifier_is_kept_exactly_or_refused(text):
    control = any(
        ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u2028\u2029" or "\ud800" <= c <= "\udfff"
        for c in text
    )
    if control or text.isspace():
        with pytest.raises(Broken):
            identifier(text, "user")
    else:
        assert identifier(text, "user") == text


@pytest.mark.parametrize(
    "value, reason",
    [
        (None, "no item"),
        ("", "no item"),
        ("   ", "no item"),
        (1.5, "item of a wrong type"),
        (True, "item of a wrong type"),
        (["a"], "item of a wrong type"),
        ({}, "item of a wrong type"),
        ("a\nb", "control characters in the item"),
        ("a\x1f", "control characters in the item"),
        ("x" * 257, "item longer than 256 characters"),
    ],
)
def test_what_is_no_identifier(value, reason):
    with pytest.raises(Broken, match=reason):
        identifier(value, "item")


def test_numbers_may_be_identifiers():
    assert identifier(12, "item") == "12" and identifier("007", "item") == "007"
    assert identifier("x" * 256, "item") == "x" * 256


@few
@given(
    st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(10**6), 10**6)),
    st.booleans(),
)
def test_numbers_read_back(value, as_text):
    assert number(repr(value) if as_text else value, "rating") == float(value)


@pytest.mark.parametrize("value", [None, "", math.nan, "nan"])
def test_missing_numbers_are_nan(value):
    assert (
        math.isnan(number(value, "rating"))
        and math.isnan(rating_in(value))
        and time_seconds(value) == NO_TIME
    )


@pytest.mark.parametrize("value", [True, "five", [5], {}, math.inf, "-inf", "1e999", 10**400])
def test_what_is_no_number(value):
    with pytest.raises(Broken, match="rating"):
        number(value, "rating")


@few
@given(st.floats(-100, 100), st.floats(0.5, 100), st.floats(0, 1))
def test_another_scale_of_ratings_is_brought_to_one_to_five(low, width, share):
    high = low + width
    assert rating_in(low, low, high) == pytest.approx(1) and rating_in(
        high, low, high
    ) == pytest.approx(5)
    inside = min(low + share * width, high)
    assert rating_in(inside, low, high) == pytest.approx(1 + 4 * (inside - low) / width, abs=1e-9)
    for outside in (low - 0.01, high + 0.01):
        with pytest.raises(Broken, match="rating outside"):
            rating_in(outside, low, high)


@pytest.mark.parametrize("value", [0, 0.5, 5.5, -1, 1e9])
def test_absurd_ratings(value):
    with pytest.raises(Broken, match=r"rating outside 1\.\.5"):
        rating_in(value)


@few
@given(st.integers(200_000_000, 4_102_444_800))
def test_one_moment_in_every_unit(seconds):
    for unit in (1, 10**3, 10**6, 10**9):
        assert time_seconds(seconds * unit) == time_seconds(str(seconds * unit)) == seconds
    assert time_seconds(seconds * 1000, milliseconds=True) == seconds


@few
@given(st.integers(0, 10**8))
def test_early_milliseconds_are_told_by_the_caller(seconds):
    assert time_seconds(seconds * 1000 + 999, milliseconds=True) == seconds
    assert time_seconds(seconds) == seconds


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("1970-01-02", 86_400),
        ("1970-01-01T00:01:00Z", 60),
        ("1970-01-01 01:00:00+01:00", 0),
        ("  ", NO_TIME),
    ],
)
def test_dates(text, seconds):
    assert time_seconds(text) == seconds


@pytest.mark.parametrize(
    "value", [-1, 1e22, 1e21, "1950-01-01", "2101-01-01", 4_102_444_801, math.inf]
)
def test_absurd_times(value):
    with pytest.raises(Broken, match="absurd time"):
        time_seconds(value)


@pytest.mark.parametrize("value", ["yesterday", True, [1], "06 17, 2018"])
def test_what_is_no_time(value):
    with pytest.raises(Broken, match="time of a wrong type"):
        time_seconds(value)


@few
@given(st.text(max_size=30))
def test_clean_text_is_one_readable_line(text):
    out = clean(text)
    assert out == " ".join(out.split()) and not records.CONTROL.search(out)
    out.encode("utf-8")
    if "&" not in out and "<" not in out:
        assert clean(out) == out


@few
@given(st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=30))
def test_escaped_text_reads_back(text):
    assert clean(html.escape(text)) == records.LINE_BREAK.sub(" ", text).strip()


def test_clean_examples():
    assert clean("a &amp; b&#34;c&quot;") == 'a & b"c"'
    assert clean(" two<br />lines<BR>\tand\x00more ") == "two lines and more"
    assert clean(["one", "", " two "]) == "one two" and clean(None) == "" and clean([]) == ""
    for wrong in (5, {}, [5], True):
        with pytest.raises(Broken, match="text of a wrong type"):
            clean(wrong)


def test_an_opinion_is_a_summary_and_a_text():
    assert opinion("Good", "Very &amp; so") == "Good\nVery & so"
    assert opinion(None, "b") == "b" and opinion("a", "") == "a" and opinion(None, None) == ""


@few
@given(st.integers(1, 10**8))
def test_prices_read_back(cents):
    for text in (f"${cents / 100:,.2f}", f"$ {cents / 100:.2f}", f"{cents / 100:.2f}", cents / 100):
        assert price(text) == pytest.approx(cents / 100)


@pytest.mark.parametrize(
    "value",
    [
        "",
        None,
        "$5.00 - $9.00",
        ".a-box{color:red}",
        "free",
        0,
        -3,
        True,
        "1,2",
        "$0.00",
        math.nan,
        math.inf,
        1e8,
        [4],
        "٣",
    ],
)
def test_what_is_no_price(value):
    assert math.isnan(price(value))
