"""Records to columns and texts to disk and back, for every size of the pieces in between."""

import math

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.data import spool
from pagellm.data.records import NO_TIME, Review, batched

few = settings(deadline=None, max_examples=50)
reviews = st.lists(
    st.builds(
        Review,
        st.sampled_from("cab"),
        st.sampled_from("yxz"),
        st.sampled_from([math.nan, 1.0, 5.0]),
        st.sampled_from([NO_TIME, 3, 10**9]),
        st.sampled_from(["", "a", "ab", "long text é"]),
        st.sampled_from(["", "train", "valid", "test", "unused"]),
    ),
    max_size=12,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("spool")


@few
@given(reviews)
def test_columns_hold_every_record_in_order(folder, records):
    columns = spool.collect(batched(records), folder / "texts.parquet")
    assert columns.user_ids == sorted({r.user for r in records}) and columns.item_ids == sorted(
        {r.item for r in records}
    )
    back = [
        Review(columns.user_ids[u], columns.item_ids[i], r, t, "", s)
        for u, i, r, t, s in zip(
            columns.user,
            columns.item,
            columns.rating.tolist(),
            columns.time.tolist(),
            columns.split.tolist(),
            strict=True,
        )
    ]
    wanted = [r._replace(text="", split=spool.SPLIT_CODES[r.split]) for r in records]
    assert repr(back) == repr(wanted)
    for a, b, tie_a, tie_b in (
        (a, b, columns.tie[n], columns.tie[m]) for n, a in enumerate(records) for m, b in enumerate(records)
    ):
        assert (tie_a == tie_b) == (a.text == b.text) and (tie_a == 0) == (a.text == "")
    assert pq.read_table(folder / "texts.parquet")["text"].to_pylist() == [r.text for r in records]


def test_texts_are_cut_and_short_ones_left_out(folder):
    records = [Review("u", "i", text=text) for text in ("ab", "abc", "abc defgh", "abc d")]
    spool.collect(batched(records), folder / "texts.parquet", min_text=3, max_text=4)
    assert pq.read_table(folder / "texts.parquet")["text"].to_pylist() == ["", "abc", "abc", "abc"]


def test_no_more_text_is_held_than_a_group(folder, monkeypatch):
    """Groups end after GROUP_CHARACTERS characters or GROUP_ROWS rows, whichever comes first."""
    def groups(texts):
        spool.collect(batched(Review("u", "i", text=text) for text in texts), folder / "texts.parquet")
        file = pq.ParquetFile(folder / "texts.parquet")
        return [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]

    monkeypatch.setattr(spool, "GROUP_CHARACTERS", 20)
    monkeypatch.setattr(spool, "GROUP_ROWS", 5)
    assert groups(["x" * 10] * 6) == [2, 2, 2] and groups(["x" * 30] * 3) == [1, 1, 1]
    assert groups(["x" * 19, "x", "x" * 19, "x"]) == [2, 2] and groups(["x"] * 12) == [5, 5, 2]


@few
@given(st.data(), reviews, st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(1, 30))
def test_reviews_come_out_in_the_order_asked_for(folder, data, records, bucket, group, buckets, characters):
    """Whatever the sizes of groups and buckets: rows with a position and a text, by position, only."""
    keep = data.draw(st.lists(st.sampled_from(range(len(records))), unique=True) if records else st.just([]))
    position = spool.np.full(len(records), -1, dtype=spool.np.int64)
    position[keep] = range(len(keep))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("BUCKET_ROWS", bucket),
            ("GROUP_ROWS", group),
            ("BUCKETS", buckets),
            ("GROUP_CHARACTERS", characters),
        ):
            patch.setattr(spool, name, value)
        columns = spool.collect(batched(records), folder / "texts.parquet")
        assert pq.ParquetFile(folder / "texts.parquet").num_row_groups >= math.ceil(len(records) / group)
        written = spool.write_reviews(
            folder / "texts.parquet",
            position,
            columns.user[keep],
            columns.item[keep],
            folder / "reviews.parquet",
        )
    table = pq.read_table(folder / "reviews.parquet")
    assert table.schema.equals(spool.REVIEWS)
    wanted = [(columns.user[n], columns.item[n], records[n].text) for n in keep if records[n].text]
    assert list(zip(*(table[name].to_pylist() for name in ("user", "item", "text")), strict=True)) == wanted
    assert written == len(wanted) and not list(folder.glob("part-*"))
