"""Exported embeddings on a machine without torch: this file needs numpy alone.

    rows = Embeddings("runs/toys/export-ppo")
    rows.matrix("item_token")                       # (N, d) float32, whatever the file's type
    rows.row("user_content", "A1B2")                # (d,)
    rows.dot("A1B2", ["B0001", "B0002"])            # (2,): the policy's logits of the first slot

`pagellm export` writes them; manifest.json there says what is in which file.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from pagellm.stage.config import PageLLMError

__all__ = ["Embeddings", "NAMES", "dequantise", "quantise"]


NAMES = ("item_token", "item_content", "user_token", "user_content")


def quantise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, d) float -> int8 (n, d) in -127..127 and float32 scale (n,).

    x = scale * int8, within scale / 2.
    """
    scale = (np.abs(x).max(axis=1, initial=0.0) / 127.0).astype(np.float32)
    safe = np.where(scale > 0, scale, 1.0).astype(np.float32)
    return np.clip(np.rint(x / safe[:, None]), -127, 127).astype(np.int8), scale


def dequantise(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The inverse of `quantise`: float32 (n, d)."""
    return x.astype(np.float32) * scale[:, None]


class Embeddings:
    """One export directory. A file is checked against the manifest when it is first read.

    Raises PageLLMError for a directory without a readable manifest.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._kept: dict[str, np.ndarray] = {}
        try:
            self.manifest = json.loads((self.path / "manifest.json").read_text())
        except (OSError, ValueError) as error:
            raise PageLLMError(
                f"no readable manifest.json in {self.path} ({type(error).__name__})\n"
                "  Make it with: pagellm export"
            ) from None

    def _file(self, name: str) -> Path:
        """Raises PageLLMError for a file that is gone or not what the manifest says."""
        path = self.path / name
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != self.manifest[
            "sha256"
        ].get(name):
            raise PageLLMError(f"{path} is gone or not what manifest.json says; export again")
        return path

    def matrix(self, name: str) -> np.ndarray:
        """(rows, d) float32. It is kept, so treat it as read-only.

        Raises PageLLMError for a name that was not exported.
        """
        if name not in self.manifest["matrices"]:
            raise PageLLMError(
                f"{self.path} has no {name}; it has {', '.join(self.manifest['matrices'])}"
            )
        if name not in self._kept:
            x = np.load(self._file(f"{name}.npy"), allow_pickle=False)
            if x.dtype == np.int8:
                x = dequantise(x, np.load(self._file(f"{name}.scale.npy"), allow_pickle=False))
            self._kept[name] = x.astype(np.float32)
        return self._kept[name]

    @cached_property
    def items(self) -> dict[str, int]:
        """The shop's item id -> row."""
        return {
            name: i for i, name in enumerate(json.loads(self._file("item_ids.json").read_text()))
        }

    @cached_property
    def users(self) -> dict[str, int]:
        """The shop's user id -> row."""
        return {
            name: i for i, name in enumerate(json.loads(self._file("user_ids.json").read_text()))
        }

    def row(self, name: str, key: str) -> np.ndarray:
        """(d,) of one item or user, by the shop's id.

        Raises PageLLMError for an id that was not exported.
        """
        ids = self.items if name.startswith("item") else self.users
        if key not in ids:
            raise PageLLMError(
                f"{self.path}: {name} has no row for {key!r}; it was not in the data exported"
            )
        return self.matrix(name)[ids[key]]

    def dot(self, user: str, items: Sequence[str]) -> np.ndarray:
        """(len(items),) h_u . e_i: the policy's logits of the first slot."""
        h = self.row("user_content", user)
        return np.array([self.row("item_token", i) @ h for i in items], dtype=np.float32)
