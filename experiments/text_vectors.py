"""Texts of items as vectors: words counted, a sentence encoder, a language model of ours.

    words(catalogue)                       TF-IDF of title words, brands and categories
    sentences("models/minilm", texts)      mean state of a published encoder (extra: transformers)
    language("runs/x/pretrain", texts)     mean state of a network that `pretrain` wrote

All rows have length 1; an item without text has zeros. Networks multiply matrices in bfloat16.
`cached` keeps what was slow to make.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pagellm.data.shop import Catalogue
from pagellm.model.als import item_groups
from pagellm.model.networks import from_state
from pagellm.model.prompts import left_pad
from pagellm.model.vocab import Vocab
from pagellm.stage import dist
from pagellm.stage.files import atomic
from pagellm.stage.run import load_model_file

__all__ = ["cached", "language", "sentences", "texts_of", "words"]


def texts_of(c: Catalogue) -> list[str]:
    """Title, brand and categories of every item as one text; "" where none is known."""
    return [
        ". ".join(part for part in (title, brand, ", ".join(names)) if part)
        for title, brand, names in zip(c.title, c.brand, c.categories, strict=True)
    ]


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-9)


def words(c: Catalogue, directions: int) -> np.ndarray:
    """TF-IDF of what `als.item_groups` finds, the facts of ALS+facts: (N, d) float32.

    directions  d at most: with more facts and items than this, the rows are projected onto so many
                directions that keep most of their squared length, and not scaled again
    """
    n, groups = len(c), item_groups(c)
    if not groups:
        return np.zeros((n, 1), np.float32)
    item = torch.from_numpy(np.concatenate(groups))
    fact = torch.repeat_interleave(torch.tensor([len(items) for items in groups]))
    weight = torch.log(n / torch.tensor([len(items) for items in groups]).float())[fact]
    length = torch.zeros(n).index_add(0, item, weight.square()).sqrt().clamp_min(1e-9)
    table = torch.sparse_coo_tensor(
        torch.stack([item, fact]),
        weight / length[item],
        (n, len(groups)),
        check_invariants=False,
    ).coalesce()
    if len(groups) <= directions:
        return table.to_dense().numpy()
    if n <= directions:
        return rotated(table.to_dense()).numpy()
    torch.manual_seed(0)
    basis = torch.linalg.qr(table @ (table.T @ torch.randn(n, directions))).Q
    for _ in range(2):  # subspace iteration: Halko et al., SIAM Review 2011, algorithm 4.4
        basis = torch.linalg.qr(table @ (table.T @ basis)).Q
    _, _, v = torch.linalg.svd((table.T @ basis).T, full_matrices=False)
    return (table @ v.T).numpy()


def rotated(table: Tensor) -> Tensor:
    """(N, N) rows with the same dot products as those of `table` (N, F), F > N."""
    e, q = torch.linalg.eigh((table @ table.T).double())
    return (q * e.clamp_min(0.0).sqrt()).float()


def by_length(texts: list[str], batch: int) -> Iterator[list[int]]:
    """Numbers of the texts that are not empty, in batches of like length."""
    order = sorted((i for i, text in enumerate(texts) if text), key=lambda i: len(texts[i]))
    return (order[at : at + batch] for at in range(0, len(order), batch))


@torch.no_grad()
def sentences(folder: str | Path, texts: list[str], batch: int = 32, longest: int = 64):
    """(len(texts), C) float32: the mean of the last states of a published encoder, of length 1.

    folder   what transformers' AutoModel and AutoTokenizer read; nothing is fetched
    longest  tokens of a text that are read
    """
    from transformers import AutoModel, AutoTokenizer

    words_of = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).float().eval()
    low = dist.multiplies_bf16(torch.device("cpu"))
    out = torch.zeros(len(texts), model.config.hidden_size)
    for some in by_length(texts, batch):
        read = words_of(
            [texts[i] for i in some],
            padding=True,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        own = read["attention_mask"][..., None].float()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            hidden = model(**read).last_hidden_state.float()
        out[some] = (hidden * own).sum(1) / own.sum(1)
    return unit(out).numpy()


@torch.no_grad()
def language(stage: str | Path, texts: list[str], batch: int = 16, longest: int = 64):
    """(len(texts), C) float32: the mean of the last states of a network of ours, of length 1.

    stage  the directory in which pretrain or sft left model.pt and the vocabulary
    """
    state = load_model_file(Path(stage) / "model.pt")
    vocab, model = Vocab.load(stage), from_state(state).eval()
    low = dist.pick_precision("auto", torch.device("cpu"), model.shape.n_embd)
    model.bf16 = low == "bfloat16"
    out = torch.zeros(len(texts), model.shape.n_embd)
    for some in by_length(texts, batch):
        ids, own = left_pad([vocab.words(f" {texts[i]}")[:longest] for i in some], vocab.pad)
        hidden = torch.where(own[..., None], model(ids, own).float(), 0.0)
        out[some] = hidden.sum(1) / own.sum(1, keepdim=True)
    return unit(out).numpy()


def cached(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array in `path`, made and written first if there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        table = make()
        with atomic(path) as beside, open(beside, "wb") as file:
            np.save(file, table, allow_pickle=False)
    return np.load(path, allow_pickle=False)
