"""Tables of other libraries as raw files: pandas, polars, DuckDB or Arrow -> data/raw/<dataset>/.

Every library that offers Arrow's stream interface (`__arrow_c_stream__`) can hand a table over.
What is read is kept as a Parquet file, so that `pagellm prepare --dataset <dataset>` finds it too.
"""

from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pagellm.stage.config import PageLLMError
from pagellm.stage.files import atomic

__all__ = ["ArrowStream", "is_kept", "keep", "storable", "table_of"]


MARK = {"pagellm": "a table handed to pagellm.prepare"}  # in the metadata of what `keep` writes


class ArrowStream(Protocol):
    """A table that Arrow can read: of pandas 2.2+, polars, DuckDB, Arrow and others."""

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any: ...


def table_of(source: Any, what: str) -> pa.Table:
    """An Arrow table from a table of any library, or from a dict of columns.

    what  the argument's name, for the error
    Raises PageLLMError for anything else.
    """
    if isinstance(source, pa.RecordBatch):
        return pa.Table.from_batches([source])
    if not (hasattr(source, "__arrow_c_stream__") or isinstance(source, dict)):
        raise PageLLMError(
            f"{what}: {type(source).__name__} is no table that Arrow can read\n"
            "  Want one of pandas (2.2 or newer), polars, DuckDB or Arrow, or a dict of columns."
        )
    try:
        return pa.table(source)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise PageLLMError(f"{what}: Arrow cannot read this table: {error}") from error


def storable(table: pa.Table) -> pa.Table:
    """The same values in types that every Parquet file may have; NaN becomes null.

    Raises PageLLMError for two columns of one name.
    """
    names = table.column_names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise PageLLMError(f"two columns are named {', '.join(twice)}; rename one of them")
    return pa.table({name: plain_column(table[name]) for name in names})


def plain_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column without dictionary, in the type that `plain_type` says; NaN becomes null."""
    if pa.types.is_dictionary(column.type):
        kind = plain_type(column.type.value_type)
        parts = [chunk.dictionary.cast(kind).take(chunk.indices) for chunk in column.chunks]
        column = pa.chunked_array(parts, kind)
    kind = plain_type(column.type)
    column = column if kind == column.type else column.cast(kind)
    if pa.types.is_floating(kind):
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, kind), column)
    return column


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Views and large strings as strings, decimals of one width; so also inside of lists.

    Decimals stay decimals: ids of 20 digits are written so, and a float has 16.
    """
    t = pa.types
    if t.is_string_view(kind) or t.is_large_string(kind):
        return pa.string()
    if t.is_decimal(kind) and kind.precision <= 38:
        return pa.decimal128(kind.precision, kind.scale)
    if t.is_decimal(kind) or t.is_float16(kind):
        return pa.float64()
    if t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind):
        return pa.list_(plain_type(kind.value_type))
    return kind


def keep(table: pa.Table, path: Path, replace: bool) -> None:
    """Write a table to a Parquet file. Where the same table lies there already, leave it.

    replace  whether another table, which an earlier call has kept there, may be replaced
    Raises PageLLMError where another table lies there, and for a column that cannot be written.
    """
    try:
        table = storable(table)
    except pa.ArrowException as error:
        raise PageLLMError(f"{path.name}: a column cannot be read: {error}") from error
    if path.exists():
        if pq.read_table(path).equals(table):
            return
        if not (replace and is_kept(path)):
            raise PageLLMError(
                f"{path} holds another table than this one\n"
                f"  Choose another dataset=, or remove {path.parent} to begin again."
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic(path) as beside:
            pq.write_table(table.replace_schema_metadata(MARK), beside)
    except pa.ArrowException as error:
        raise PageLLMError(f"{path.name}: a column cannot be written: {error}") from error


def is_kept(path: Path) -> bool:
    """Whether `keep` has written this Parquet file."""
    return (pq.read_schema(path).metadata or {}).get(b"pagellm") == MARK["pagellm"].encode()
