"""Raw files as bytes of UTF-8 lines, however they are packed, encoded or ended.

    gzip, bzip2, xz, Zstandard     unpacked while being read
    zip                            if it holds one file; those that macOS adds do not count
    UTF-16, UTF-32                 turned into UTF-8, UTF-16 even without a byte-order mark
    CR line ends                   turned into LF
    a JSON array of objects        one object a line

All of this is decided by a file's first bytes, because names of files can be wrong.
"""

import bz2
import codecs
import gzip
import io
import itertools
import json
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from pagellm.stage.config import PageLLMError

__all__ = ["Archive", "DAMAGED", "is_plain", "open_bytes", "packing", "what_else"]

MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
# Files that hold tables in a way that nothing here reads, or no table: first bytes -> their name.
OTHERS = {
    b"ARROW1": "an Arrow file (write it as Parquet)",
    b"FEA1": "a Feather file (write it as Parquet)",
    b"ORC": "an ORC file (write it as Parquet)",
    b"Obj\x01": "an Avro file (write it as Parquet)",
    b"SQLite format 3": "an SQLite database (export its table as CSV)",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file (save its sheet as CSV)",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"7z\xbc\xaf": "a 7z archive (unpack it)",
    b"Rar!": "a RAR archive (unpack it)",
    b"%PDF": "a PDF",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
}
LOOK = 1 << 16  # bytes that show the encoding and the line ends
PART = 1 << 18  # characters of a JSON array read at once
OBJECT_LIMIT = 50_000_000  # characters of one object of an array
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zipfile.BadZipFile)


class Archive(PageLLMError):
    """A file of several files, of which nobody says which is meant; `what` it is, in words."""

    def __init__(self, path: Path, what: str, todo: str):
        super().__init__(f"{path} is {what}: {todo}")
        self.what = f"{what}: {todo}"


def what_else(path: Path) -> str:
    """The name of a kind of file that nothing here reads, told from its first bytes; else ""."""
    with open(path, "rb") as file:
        start = file.read(16)
    text = all(byte >= 32 or byte in b"\t\r\n" for byte in start)
    for magic, name in OTHERS.items():
        if start.startswith(magic) and not (text and magic.isalnum()):
            return name  # ORCID,item_id is a heading
    return ""


def packing(path: Path) -> str:
    """gzip, bzip2, xz, zstd, zip, or "" for a file that is not packed."""
    with open(path, "rb") as file:
        start = file.read(8)
    return next((name for magic, name in MAGIC.items() if start.startswith(magic)), "")


def is_plain(path: Path) -> bool:
    """Whether the file's bytes are the lines themselves, so that it can be read from any place."""
    with open(path, "rb") as file:
        return not packing(path) and not recoding(file.read(LOOK))


def recoding(start: bytes) -> str:
    """What makes unpacked bytes UTF-8 lines: "" nothing, an encoding to read, cr or array."""
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if wide := without_mark(start[:1024]):
        return wide
    if b"\r" in start[:-1] and b"\n" not in start:
        return "cr"
    text = start.removeprefix(codecs.BOM_UTF8).lstrip()
    return "array" if text.startswith(b"[") and text[1:].lstrip().startswith(b"{") else ""


def without_mark(start: bytes) -> str:
    """UTF-16 without its mark, told from text in which every second byte is 0; else ""."""
    even, odd = start[0::2], start[1::2]
    if len(odd) > 7 and odd.count(0) > 0.9 * len(odd) and 0 not in even:
        return "utf-16-le"
    return "utf-16-be" if len(odd) > 7 and even.count(0) > 0.9 * len(even) and 0 not in odd else ""


def open_bytes(path: Path) -> io.BufferedIOBase:
    """The file's lines as UTF-8 bytes. Raises PageLLMError for a zip of several files."""
    form = packing(path)
    with unpacked(path, form) as file:
        start = file.read(LOOK)
    if start[257:262] == b"ustar":
        raise Archive(path, "a tar archive", "unpack it into a folder, for --raw")
    what = recoding(start)
    file = unpacked(path, form)
    if not what:
        return file
    if what == "cr":
        chunks = (block.replace(b"\r", b"\n") for block in iter(lambda: file.read(LOOK), b""))
    elif what.startswith("utf"):
        text = io.TextIOWrapper(file, what, errors="replace", newline="")
        start = text.read(LOOK)
        cr = "\r" in start[:-1] and "\n" not in start
        parts = itertools.chain([start], iter_text(text))
        chunks = ((p.replace("\r", "\n") if cr else p).encode("utf-8", "replace") for p in parts)
    else:
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape")
        chunks = (f"{line}\n".encode("utf-8", "surrogateescape") for line in array_items(text))
    return io.BufferedReader(Chunks(chunks), LOOK)


def iter_text(file: io.TextIOBase) -> Iterator[str]:
    return iter(lambda: file.read(LOOK), "")


def unpacked(path: Path, form: str):
    """A stream of the file's own bytes."""
    if form == "gzip":
        return gzip.open(path, "rb")
    if form == "bzip2":
        return bz2.open(path, "rb")
    if form == "xz":
        return lzma.open(path, "rb")
    if form == "zstd":
        stream = pa.input_stream(str(path), compression="zstd")
        return io.BufferedReader(Chunks(iter(lambda: stream.read(LOOK), b"")), LOOK)
    if form == "zip":
        archive = zipfile.ZipFile(path)
        names = [name for name in archive.namelist() if not name.endswith("/")]
        names = [name for name in names if not name.startswith("__MACOSX/")]
        if "[Content_Types].xml" in names:
            raise Archive(path, "an Excel or other Office file", "save its sheet as CSV (UTF-8)")
        if len(names) != 1:
            raise Archive(
                path,
                f"a zip archive of {len(names)} files ({', '.join(names[:3])} ...)",
                "unpack it into a folder, for --raw",
            )
        return archive.open(names[0])
    return open(path, "rb", buffering=1 << 20)


def array_items(file: io.TextIOBase) -> Iterator[str]:
    """The members of a JSON array, each as one line; what cannot be parsed ends the array."""
    decoder, text = json.JSONDecoder(), file.read(PART)
    at = text.index("[") + 1
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            if at < len(text) and text[at] == "]":
                return
            part = file.read(PART) if len(text) - at < OBJECT_LIMIT else ""
            if not part:
                # Cut short: a line that is no JSON, so that it is counted as broken.
                yield " ".join(text[at : at + LOOK].split()) or "an array without its end"
                return
            text, at = text[at:] + part, 0
            continue
        yield json.dumps(value)
        at = end
        if at > PART:
            text, at = text[at:], 0


class Chunks(io.RawIOBase):
    """A stream of bytes out of an iterator of byte strings."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks, self._rest, self._at = chunks, b"", 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._rest:
            if (chunk := next(self._chunks, None)) is None:
                return 0
            self._rest = chunk
        taken, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(taken)] = taken
        self._at += len(taken)
        return len(taken)

    def tell(self) -> int:
        return self._at
