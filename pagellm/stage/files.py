"""Reading and writing whole files: checksums, replacement in one go, JSON."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pagellm.stage.config import PageLLMError

__all__ = ["atomic", "atomic_folder", "file_id", "read_json", "sha256", "slug", "write_json"]


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def slug(name: str) -> str:
    """A row's name as spelled in a path: lower case, a dash for all but letters and digits."""
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def file_id(path: str | Path) -> str:
    """The first 16 hex digits of `sha256`: what configs and `done` records name a file by."""
    return sha256(path)[:16]


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Replace `path` in one go: nobody ever sees a half-written file under its name.

    Yields a temporary path in the same directory, for the block to write. If the block ends without
    an exception, that file is synced to disk and renamed to `path`; otherwise it is removed.

    Raises PageLLMError, before the block, if there is no such directory.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise PageLLMError(f"{path}: there is no directory {path.parent}; make it first")
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
        if os.name != "nt":  # Windows opens no directory, and needs no such sync
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Replace the directory `path` by one with all of its files, or leave it as it is.

    Yields an empty directory beside it, for the block to fill.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        shutil.rmtree(path, ignore_errors=True)
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises PageLLMError if the file is damaged, and FileNotFoundError if there is none.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise PageLLMError(
            f"{path} is damaged ({error}); remove {path.parent} and make it again"
        ) from None


def write_json(path: str | Path, value: Any) -> None:
    """Replace a file by `value` as indented JSON with sorted keys, see `atomic`."""
    with atomic(path) as beside:
        beside.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
