"""Records to columns and texts to disk and back, for every size of the pieces in between."""

import hashlib
import itertools
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.data import text_store
from pagellm.data.records import Review, batched
from pagellm.data.values import NO_TIME

few = settings(deadline=None, max_examples=50)
reviews = st.lists(
    st.builds(
        Review,
        st.sampled_from("cab"),
        st.sampled_from("yxz"),
        st.sampled_from([math.nan, 1.0, 5.0]),
        st.sampled_from([NO_TIME, 3.0, 1e9, 1e9 + 0.125]),
        st.sampled_from(["", "a", "ab", "long text é"]),
        st.sampled_from(["", "train", "valid", "test", "unused"]),
    ),
    max_size=12,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("spool")


def stored(folder, records, pieces=1, **options):
    """The records in so many parts, each of them in batches of one or two."""
    edges = [len(records) * n // pieces for n in range(pieces + 1)]
    stems = []
    for n, (a, b) in enumerate(itertools.pairwise(edges)):
        batches = [
            batch for at in range(a, b, 2) for batch in batched(records[at : min(b, at + 2)])
        ]
        stems.append(text_store.store(batches, folder / f"part-{n}", **options))
    return stems


def texts_of(stems):
    return [
        text
        for stem in stems
        for text in pa.ipc.open_stream(f"{stem}.texts").read_all()["text"].to_pylist()
    ]


@few
@given(reviews, st.integers(1, 4))
def test_columns_hold_every_record_in_order(folder, records, pieces):
    stems = stored(folder, records, pieces)
    columns = text_store.gather(stems)
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
    wanted = [r._replace(text="", split=text_store.SPLIT_CODES[r.split]) for r in records]
    assert repr(back) == repr(wanted)
    for a, b, tie_a, tie_b in (
        (a, b, columns.tie[n], columns.tie[m])
        for n, a in enumerate(records)
        for m, b in enumerate(records)
    ):
        assert (tie_a == tie_b) == (a.text == b.text) and (tie_a == 0) == (a.text == "")
    assert texts_of(stems) == [r.text for r in records]
    assert columns.user_ids == sorted(columns.user_ids) and not list(folder.glob("*.numbers"))


@few
@given(
    st.lists(
        st.lists(st.sampled_from(["é", "e", "z", "Z", "\U0001f600", "\uffee", "9"]), max_size=5),
        max_size=5,
    ),
    st.sampled_from([0, 3, 1_000]),
    st.booleans(),
)
def test_names_are_ranked_as_python_sorts_them(columns, loose, coded):
    """However often they are unified in between, and whether they come as text or coded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_store, "LOOSE_NAMES", loose)
        names = text_store.Names()
        for column in columns:
            array = pa.array(column, pa.string())
            names.add(array.dictionary_encode() if coded else array)
        ordered, rank = names.ranked()
    rows = [name for column in columns for name in column]
    assert ordered == sorted(set(rows)) and [ordered[n] for n in rank] == rows


@few
@given(st.lists(st.sampled_from(["", "a", "é", "long text"]), max_size=6), st.integers(0, 3))
def test_a_digest_is_that_of_the_text_alone(texts, start):
    array = pa.array(texts, pa.string())
    expected = [
        int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") | 1
        if text
        else 0
        for text in texts
    ]
    assert text_store.digests(array).tolist() == expected
    assert text_store.digests(array[start:]).tolist() == expected[start:]


def test_texts_are_cut_and_short_ones_left_out(folder):
    records = [Review("u", "i", text=text) for text in ("ab", "abc", "abc defgh", "abc d")]
    assert texts_of(stored(folder, records, min_text=3, max_text=4)) == ["", "abc", "abc", "abc"]
    assert texts_of(
        stored(folder, [Review("u", "i", text=t) for t in ("éé", "é", "")], max_text=1)
    ) == ["é", "é", ""]


@few
@given(st.data(), reviews, st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_reviews_come_out_in_the_order_asked_for(folder, data, records, bucket, buckets, pieces):
    """Only rows with a position and a text are written, in order of position.

    The number of parts and the size of the buckets change nothing.
    """
    keep = data.draw(
        st.lists(st.sampled_from(range(len(records))), unique=True) if records else st.just([])
    )
    position = text_store.np.full(len(records), -1, dtype=text_store.np.int64)
    position[keep] = range(len(keep))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_store, "BUCKET_ROWS", bucket)
        patch.setattr(text_store, "BUCKETS", buckets)
        stems = stored(folder, records, pieces)
        columns = text_store.gather(stems)
        written = text_store.write_reviews(
            stems,
            position,
            columns.user[keep],
            columns.item[keep],
            folder / "reviews.parquet",
        )
    table = pq.read_table(folder / "reviews.parquet")
    assert table.schema.equals(text_store.REVIEWS)
    wanted = [(columns.user[n], columns.item[n], records[n].text) for n in keep if records[n].text]
    assert (
        list(zip(*(table[name].to_pylist() for name in ("user", "item", "text")), strict=True))
        == wanted
    )
    left = [
        *folder.glob("reviews-*"),
        *(path for stem in stems for path in folder.glob(f"{stem.name}.*")),
    ]
    assert written == len(wanted) and not left
