"""Whole files: what identifies one."""

import hashlib
from pathlib import Path

__all__ = ["file_id", "sha256"]


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_id(path: str | Path) -> str:
    """The first 16 hex digits of it."""
    return sha256(path)[:16]
