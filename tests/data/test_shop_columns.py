"""Columns of a prepared table as numbers, without pandas."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm.data import prepare
from pagellm.data.shop import numbers

KINDS = {
    pa.int32(): (st.integers(-(2**31), 2**31 - 1), -1),
    pa.int64(): (st.integers(-(2**63), 2**63 - 1), 0),
    pa.float32(): (st.floats(width=32), np.nan),
    pa.bool_(): (st.booleans(), False),
}


@given(st.sampled_from(list(KINDS)), st.data())
def test_numbers_are_those_that_arrow_gives(kind, data):
    """Of any chunks, cut anywhere, with nulls or without."""
    values, fill = KINDS[kind]
    chunks = data.draw(st.lists(st.lists(st.none() | values, max_size=20), max_size=3))
    whole = pa.chunked_array([pa.array(chunk, kind) for chunk in chunks], kind)
    column = whole.slice(data.draw(st.integers(0, 12)))
    want = np.array([fill if x is None else x for x in column.to_pylist()], kind.to_pandas_dtype())
    found = numbers(column, fill)
    assert found.dtype == want.dtype and np.array_equal(found, want, equal_nan=kind == pa.float32())
    if column.null_count:
        with pytest.raises(ValueError, match="null"):
            numbers(column)
    else:
        assert np.array_equal(numbers(column), want, equal_nan=kind == pa.float32())


def test_a_shop_is_read_without_pandas(tmp_path):
    """Importing pandas took .4 s of every start where it is installed."""
    prepare.run(prepare.Config(data=str(tmp_path), users=40, items=30))
    code = (
        "import sys; from pagellm.data.shop import load; from pagellm.data.dropped import LeftOut; "
        f"LeftOut.read(load({str(tmp_path / 'synthetic')!r})); assert 'pandas' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
