"""Small tables that users hand to a command: run files, logs of tests, pairs, people's verdicts.

CSV (with any of the usual marks), JSON lines and Parquet, packed or not, told from the content.
Columns of identifiers are read as text; see `pagellm.data.values.identifier`.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from pagellm.data.logs import delimiter_of
from pagellm.data.packed import DAMAGED, open_bytes
from pagellm.data.values import Broken, id_column
from pagellm.stage.config import PageLLMError

__all__ = ["ids_of", "read_table"]

NONE = ["", "NULL", "null", "NaN", "nan", "None", "none", "\\N", "NA", "N/A", "#N/A", "<NA>"]


def read_table(path: Path, text: tuple[str, ...]) -> pa.Table:
    """A table with a heading. text: columns whose cells must not be taken for numbers.

    Raises PageLLMError for a file that cannot be read.
    """
    kind = "a table"
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        kind = "Parquet" if start == b"PAR1" or path.suffix == ".parquet" else "CSV"
        if kind == "Parquet":
            return pq.read_table(path)
        with open_bytes(path) as file:
            data = file.read().removeprefix(b"\xef\xbb\xbf")
        if data.lstrip().startswith(b"{"):
            kind = "JSON lines"
            return pyarrow.json.read_json(pa.BufferReader(data))
        heading = data.split(b"\n", 1)[0].decode("utf-8", "replace")
        return pyarrow.csv.read_csv(
            pa.BufferReader(data),
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter_of(heading)[0]),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(text, pa.string()), null_values=NONE
            ),
        )
    except (OSError, pa.ArrowException, *DAMAGED) as error:
        raise PageLLMError(
            f"{path} cannot be read as {kind}: {error}\n  Want .parquet, .csv, .tsv or .jsonl."
        ) from error


def ids_of(table: pa.Table, column: str, path) -> list[str]:
    """The identifiers of a column, one in every row. Raises PageLLMError naming the column."""
    try:
        found = id_column(table[column], column)
    except Broken as broken:
        raise PageLLMError(f"{path}: column {column}: {broken}") from None
    if None in found:
        raise PageLLMError(
            f"{path}: column {column} is empty in {found.count(None):,} lines; want one in each"
        )
    return [name for name in found if name is not None]
