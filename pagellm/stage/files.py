"""Whole files: what identifies one."""

import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path

from pagellm.stage.config import PageLLMError

__all__ = ["atomic", "file_id", "read_json", "sha256", "slug", "write_json"]


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def slug(name: str) -> str:
    """A row's name as spelled in a path: lower case, a dash for all but letters and digits."""
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def file_id(path: str | Path) -> str:
    """The first 16 hex digits of it."""
    return sha256(path)[:16]


@contextmanager
def atomic(path: str | Path):
    """Yield a temporary path beside `path`; on success sync it and rename it into place, else remove it."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    finally:
        beside.unlink(missing_ok=True)


def read_json(path: Path) -> dict:
    """Raises PageLLMError if the file is damaged; FileNotFoundError if there is none."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise PageLLMError(
            f"{path} is damaged ({error}); remove {path.parent} and make it again"
        ) from None


def write_json(path: str | Path, value) -> None:
    with atomic(path) as beside:
        beside.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
