"""Small tables that users hand to a command: run files, logs of tests, pairs, people's verdicts.

CSV (with any usual separator), JSON lines and Parquet, packed or not, recognised by content.
Columns of identifiers are read as text; see `pagellm.data.values.identifier`. Lists of identifiers
stand in an option itself, or in a file that it names.
"""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from pagellm.data.logs import delimiter_of, spelling
from pagellm.data.packed import DAMAGED, open_bytes
from pagellm.data.values import Broken, id_column, identifier
from pagellm.stage.config import PageLLMError
from pagellm.stage.hints import counted

__all__ = ["id_list", "ids_of", "plain_id", "read_table", "told", "words_in"]

SHOWN = 8  # columns left over that are named
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
            return json_table(data, text)
        table = csv_table(data, text)
    except (OSError, pa.ArrowException, *DAMAGED) as error:
        raise PageLLMError(
            f"{path} cannot be read as {kind}: {error}\n  Want .parquet, .csv, .tsv or .jsonl."
        ) from error
    if twice := [name for name, n in Counter(table.column_names).items() if n > 1]:
        raise PageLLMError(f"{path}: column {twice[0]} stands there twice; want each once")
    return table


def csv_table(data: bytes, text: tuple[str, ...]) -> pa.Table:
    """A CSV file with a heading, below a line `sep=;` as spreadsheets write it."""
    if sep := re.match(rb"sep=.[ \t]*\r?\n", data):
        data = data[sep.end() :]
    heading = data.split(b"\n", 1)[0].decode("utf-8", "replace")
    return pyarrow.csv.read_csv(
        pa.BufferReader(data),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=delimiter_of(heading)[0], newlines_in_values=True
        ),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(text, pa.string()), null_values=NONE
        ),
    )


def json_table(data: bytes, text: tuple[str, ...]) -> pa.Table:
    """JSON lines. Identifiers that look like dates stay text; those that are numbers stay numbers,
    as exact as the file."""
    texts = pa.schema([(name, pa.string()) for name in text])
    try:
        options = pyarrow.json.ParseOptions(explicit_schema=texts)
        table = pyarrow.json.read_json(pa.BufferReader(data), parse_options=options)
    except pa.ArrowInvalid:
        return pyarrow.json.read_json(pa.BufferReader(data))
    # A column of the schema that the file lacks comes back without a value.
    absent = [n for n in text if n in table.column_names and f'"{n}"'.encode() not in data]
    return table.drop_columns(absent)


def told(path, table: pa.Table, taken: Sequence[str], absent: Sequence[str] = ()) -> str:
    """One line for the screen: the rows and columns that were read of a table, and all others.

    taken   columns that are read
    absent  optional columns that are not there
    A column left over that is spelled like one of these but for case, blanks and marks is named as
    perhaps meant.
    """
    left = [name for name in table.column_names if name not in taken]
    meant = [
        f"{name} (is {role} meant?)"
        for name in left
        for role in (*taken, *absent)
        if spelling(name) == spelling(role)
    ]
    parts = [f"{Path(path).name}: {counted(len(table), 'row')}; columns {', '.join(taken)}"]
    parts += [f"not there: {', '.join(absent)}"] if absent else []
    more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
    shown = ", ".join(name or "one without a name" for name in left[:SHOWN])
    parts += [f"left over: {shown}{more}"] if left else ["none left over"]
    parts += [f"look at {', '.join(meant)}"] if meant else []
    return "; ".join(parts)


def ids_of(table: pa.Table, column: str, path) -> list[str]:
    """The identifiers of a column, one in every row. Raises PageLLMError naming the column."""
    try:
        found = id_column(table[column], column)
    except Broken as broken:
        raise PageLLMError(f"{path}: column {column}: {broken}") from None
    if None in found:
        raise PageLLMError(
            f"{path}: column {column} is empty in {counted(found.count(None), 'line')}; want one "
            "in each"
        )
    return [name for name in found if name is not None]


def id_list(text: str, option: str = "") -> tuple[str, ...]:
    """The identifiers of an option: `a,b`, in quotes where one holds a comma (`"a,b",c`), or @path
    of a text file with one a line.

    option  its name, for messages. Raises PageLLMError for a file that cannot be read.
    """
    if not text.startswith("@"):
        return tuple(plain_id(word) for word in words_in(text) if word)
    try:
        with open_bytes(Path(text[1:])) as file:
            lines = file.read().decode("utf-8-sig").splitlines()  # a mark is no part of an id
    except (OSError, UnicodeDecodeError, *DAMAGED) as error:
        raise PageLLMError(
            f"--{option} {text}: cannot be read ({error}); want a text file, one id a line"
        ) from None
    return tuple(plain_id(line.strip()) for line in lines if line.strip())


def words_in(text: str, mark: str = ",") -> list[str]:
    """The words of an option with `mark` between them. One that holds the mark stands in quotes."""
    words = next(csv.reader([text], delimiter=mark, skipinitialspace=True), []) or [""]
    return [word.strip() for word in words]


def plain_id(word: str) -> str:
    """The identifier as `prepare` keeps it; a word that is none, as it stands."""
    try:
        return identifier(word, "item")
    except Broken:
        return word
