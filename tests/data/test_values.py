"""What one value means: identifiers, numbers, times, ratings, prices, texts."""

import html
import math
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.data import values
from pagellm.data.values import (
    NO_TIME,
    Broken,
    PassedOver,
    clean,
    decimal_comma,
    id_column,
    identifier,
    is_missing,
    label,
    number,
    opinion,
    price,
    rating_in,
    time_form,
    time_in,
)

few = settings(deadline=None, max_examples=60)


@few
@given(st.text(min_size=1, max_size=20))
def test_an_identifier_is_kept_exactly_or_refused(text):
    control = any(
        ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u2028\u2029" or "\ud800" <= c <= "\udfff"
        for c in text
    )
    if control or is_missing(text):
        with pytest.raises(Broken):
            identifier(text, "user")
    else:
        assert identifier(text, "user") in (text, text.removesuffix(".0"))


@pytest.mark.parametrize(
    "value, reason",
    [
        (None, "no item$"),
        ("", "no item$"),
        ("   ", "no item$"),
        (math.nan, "no item$"),
        ("NULL", r"no item \(written NULL\)"),
        ("\\N", r"no item \(written \\N\)"),
        ("nan", "written nan"),
        (" None ", "written None"),
        (["a"], "item of a wrong type"),
        ({}, "item of a wrong type"),
        ("a\nb", "control characters in the item"),
        ("a\x1f", "control characters in the item"),
        ("x" * 257, "item longer than 256 characters"),
        (2.0**60, "float above 2"),
        (b"\xff\xfe", "binary that is not UTF-8"),
        (Decimal("NaN"), "item of a wrong type"),
    ],
)
def test_what_is_no_identifier(value, reason):
    with pytest.raises(Broken, match=reason) as caught:
        identifier(value, "item")
    assert isinstance(caught.value, PassedOver) == reason.startswith(("no", "written"))


@pytest.mark.parametrize(
    "value, text",
    [
        (12, "12"),
        ("007", "007"),
        ("007.0", "007.0"),
        ("17850.0", "17850"),
        (17850.0, "17850"),
        (-3.0, "-3"),
        ("v1.0", "v1.0"),
        (1.5, "1.5"),
        (2**62, str(2**62)),
        (Decimal(2**62), str(2**62)),
        (Decimal("1.50"), "1.50"),
        (b"caf\xc3\xa9", "café"),
        (True, "true"),
        ("x" * 256, "x" * 256),
    ],
)
def test_identifiers_are_text_whatever_their_type(value, text):
    assert identifier(value, "item") == text


@few
@given(st.lists(st.none() | st.integers(0, 2**53), min_size=1, max_size=6))
def test_a_column_with_gaps_gives_the_ids_that_it_would_without(ids):
    """One missing value turns a data frame's integers into floats.

    The identifiers stay the same.
    """
    expected = [None if n is None else str(n) for n in ids]
    for kind in (pa.int64(), pa.float64(), pa.string(), pa.decimal128(38, 0)):
        column = pa.array(ids, pa.int64()).cast(kind, safe=False)
        assert id_column(column, "user") == expected
        assert id_column(pa.chunked_array([column, column]), "user") == expected * 2
    floats = [n for n in ids if n is not None and n < 10**15]
    as_text = pa.array([str(float(n)) for n in floats], pa.string())
    assert id_column(as_text, "user") == [str(n) for n in floats]


@few
@given(
    st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(10**6), 10**6)),
    st.booleans(),
)
def test_numbers_read_back(value, as_text):
    assert number(repr(value) if as_text else value, "rating") == float(value)


@pytest.mark.parametrize("value", [None, "", math.nan, "nan", "NULL", " \\N "])
def test_missing_numbers_are_nan(value):
    assert math.isnan(number(value, "rating")) and math.isnan(rating_in(value))
    assert time_in(value) == time_in(value, "ms") == time_in(value, "iso") == NO_TIME


@pytest.mark.parametrize("value", [True, "five", [5], {}, math.inf, "-inf", "1e999", 10**400])
def test_what_is_no_number(value):
    with pytest.raises(Broken, match="rating"):
        number(value, "rating")


@few
@given(st.floats(-100, 100), st.floats(0.5, 100), st.floats(0, 1))
def test_a_rating_stays_on_its_own_scale(low, width, share):
    high = low + width
    inside = min(low + share * width, high)
    assert rating_in(inside, low, high) == inside
    for outside in (low - 0.01, high + 0.01):
        with pytest.raises(Broken, match="rating outside"):
            rating_in(outside, low, high)


@pytest.mark.parametrize("value", [0, 0.5, 5.5, -1, 1e9])
def test_absurd_ratings(value):
    with pytest.raises(Broken, match=r"rating outside 1\.\.5"):
        rating_in(value)


moments = st.integers((10**8 + 1) * 10**6, 4_102_444_799 * 10**6)  # microseconds, 1973 to 2099


@few
@given(st.lists(moments, min_size=1, max_size=5))
def test_one_moment_in_every_unit_and_spelling(micros):
    """The unit of a column changes nothing, to the microsecond."""
    exact = [n / 1e6 for n in micros]
    dates = [datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=n) for n in micros]
    spelled = {
        "us": micros,
        "ns": [n * 1000 + 499 for n in micros],
        "iso": [d.isoformat(" ").replace("+00:00", " UTC") for d in dates],
    }
    for form, column in spelled.items():
        for written in (column, list(map(str, column))):
            assert time_form(written) == form
            assert [time_in(value, form) for value in written] == pytest.approx(exact, abs=1e-6)
    for form, per_second in (("s", 1), ("ms", 1000)):
        whole = [n * per_second // 10**6 for n in micros]
        assert time_form(whole) == form
        assert [time_in(v, form) for v in whole] == [n / per_second for n in whole]
    days = [d.strftime("%Y%m%d") for d in dates]
    midnights = [datetime.strptime(d, "%Y%m%d").replace(tzinfo=UTC).timestamp() for d in days]
    for written in (days, list(map(int, days)), list(map(float, days))):
        assert time_form(written) == "yyyymmdd"
        assert [time_in(v, "yyyymmdd") for v in written] == midnights


@few
@given(st.integers(0, 10**8 - 1))
def test_one_value_does_not_change_the_unit_of_its_column(n):
    """Early numbers in a column of milliseconds are another unit's, and said to be."""
    assert time_in(n, "s") == n
    if n:
        with pytest.raises(Broken, match="not in the unit"):
            time_in(n, "ms")
    assert time_form([1_600_000_000_000, n]) == "ms" or n >= 10**8


@pytest.mark.parametrize(
    "column, form, first",
    [
        (["13/02/2020", "01/02/2020"], "%d/%m/%Y", 1_581_552_000),
        (["02/13/2020 10:30", "02/01/2020 9:00"], "%m/%d/%Y %H:%M", 1_581_589_800),
        (["10.07.2020"], "%d.%m.%Y", 1_594_339_200),
        (["06 17, 2018", "11 5, 2018"], "%m %d, %Y", 1_529_193_600),
        (["2020-07-10T00:00:00+02:00"], "iso", 1_594_332_000),
        ([5, 6, 7], "s", 5),
        ([], "s", None),
        (["", None], "s", None),
    ],
)
def test_the_form_of_a_column_is_told_from_its_values(column, form, first):
    assert time_form(column) == form
    assert first is None or time_in(column[0], form) == first


@pytest.mark.parametrize(
    "column", [["01/02/2020", "03/04/2020"], [1_600_000_000, 1_600_000_000_000]]
)
def test_what_cannot_be_told_is_not_guessed(column):
    assert time_form(column) is None


@pytest.mark.parametrize(
    "text, seconds",
    [("1970-01-02", 86_400), ("1970-01-01T00:01:00Z", 60), ("1970-01-01 01:00:00+01:00", 0)],
)
def test_dates(text, seconds):
    assert time_in(text, "iso") == seconds


@pytest.mark.parametrize(
    "value, form",
    [(-1, "s"), (1e22, "s"), ("1950-01-01", "iso"), ("2101-01-01", "iso")],
)
def test_absurd_times(value, form):
    with pytest.raises(Broken, match="absurd time"):
        time_in(value, form)


@pytest.mark.parametrize("form", ["s", "ms", "iso", "yyyymmdd", "%d/%m/%Y"])
@pytest.mark.parametrize("value", ["yesterday", True, [1], "99999999x"])
def test_what_is_no_time(value, form):
    with pytest.raises(Broken, match="time of a wrong type"):
        time_in(value, form)


@few
@given(st.text(max_size=30))
def test_clean_text_is_one_readable_line(text):
    out = clean(text)
    assert out == " ".join(out.split()) and not values.CONTROL.search(out)
    out.encode("utf-8")
    if "&" not in out and "<" not in out:
        assert clean(out) == out


@few
@given(st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=30))
def test_escaped_text_reads_back(text):
    assert clean(html.escape(text)) == values.LINE_BREAK.sub(" ", text).strip()


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


def test_names_in_tables():
    assert label(1984) == "1984" and label(12.0) == "12" and label(Decimal("3")) == "3"
    assert label("NULL") == label("nan") == label(None) == label(math.nan) == ""
    assert label("Null Island") == "Null Island" and label(" A &amp; B ") == "A & B"


@few
@given(st.integers(0, 10**8))
def test_prices_read_back(cents):
    """Dots or commas, a currency before or behind: the same price. 0 is one."""
    plain = f"{cents / 100:.2f}"
    grouped = f"{cents / 100:,.2f}"
    comma = grouped.translate(str.maketrans(",.", ".,"))
    for text in (f"${grouped}", f"$ {plain}", f"EUR {comma}", f"{comma} €", f"{plain}zł", plain):
        assert price(text) == price(text, comma=True) == pytest.approx(cents / 100)
    assert price(cents / 100) == cents / 100
    assert price(grouped.replace(",", " ").replace(".", ",")) == pytest.approx(cents / 100)


def test_three_digits_behind_a_mark_are_read_as_their_column_is():
    assert price("1,299") == 1299 and price("1.299") == 1.299
    assert price("1,299", comma=True) == 1.299 and price("1.299", comma=True) == 1299
    assert decimal_comma(["1.299", "9,50", "12"]) and not decimal_comma(["1,299", "9.50"])
    assert not decimal_comma(["1,299"]) and not decimal_comma([9.5, None, ""])


@pytest.mark.parametrize(
    "value",
    ["", None, "$5.00 - $9.00", ".a-box{color:red}", "free", -3, "-3", True, "1,2,3", "12 pieces"]
    + [math.nan, math.inf, 1e8, [4], "٣", "1,29,900"],
)
def test_what_is_no_price(value):
    assert math.isnan(price(value))
