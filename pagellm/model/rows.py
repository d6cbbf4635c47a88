"""How user and item rows begin: from spectral factors or from implicit ALS."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pagellm.data.shop import Shop
from pagellm.model.als import add_pseudo_users, als, item_groups, rating_targets
from pagellm.model.backbone import Backbone
from pagellm.stage.randomness import seed_torch

__all__ = ["als_rows", "fit_rows", "spectral_rows"]


def spectral_rows(shop: Shop, n_embd: int, seed: int, weight: float = 0.5) -> tuple[Tensor, Tensor]:
    """User and item rows from a truncated SVD of the links of train rows and catalogue.

    Not in the paper. The SVD is of one sparse matrix with a row for every user, category and brand
    and a column for every item. An entry is 1 / sqrt(row count * column count); those of categories
    and brands are multiplied by `weight`. So items that go together begin close to each other; the
    second-order prompts alone would have to teach that otherwise. Rows are scaled to GPT-2's
    standard deviation of 0.02; columns past the rank of the matrix are random.

    returns (U, n_embd), (N, n_embd) float32
    """
    c, train = shop.catalogue, shop.csr("train")
    leaf, brand = np.flatnonzero(c.leaf_id >= 0), np.flatnonzero(c.brand_id >= 0)
    links = [
        (np.repeat(np.arange(shop.n_users), train.counts()), train.items, 1.0),
        (c.leaf_id[leaf], leaf, weight),
        (c.brand_id[brand], brand, weight),
    ]
    rows: list[np.ndarray] = []
    columns, values, first = [], [], 0
    for row, item, value in links:
        n = int(row.max(initial=-1)) + 1 if rows else shop.n_users
        degree = (
            np.maximum(np.bincount(row, minlength=n), 1)[row]
            * np.maximum(np.bincount(item), 1)[item]
        )
        rows.append(row + first)
        columns.append(item)
        values.append(value / np.sqrt(degree))
        first += n
    matrix = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([np.concatenate(rows), np.concatenate(columns)])),
        torch.from_numpy(np.concatenate(values)).float(),
        (first, shop.n_items),
        check_invariants=True,
    ).coalesce()
    rank = min(n_embd, *matrix.shape)
    seed_torch(seed, "pretrain", "rows")
    u, s, v = torch.svd_lowrank(matrix, q=min(rank + 8, *matrix.shape), niter=4)
    users, items = torch.randn(shop.n_users, n_embd), torch.randn(shop.n_items, n_embd)
    for table, factor in ((users, u[: shop.n_users]), (items, v)):
        scaled = factor[:, :rank] * s[:rank].sqrt()
        table[:, :rank] = scaled / scaled.std().clamp(min=1e-12)
    return users * 0.02, items * 0.02


def als_rows(
    shop: Shop,
    n_embd: int,
    seed: int,
    facts: float,
    alpha0: float,
    reg: float,
    row_scale: float,
    rated: tuple[float, float] | None = None,
    nu: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """User and item rows from implicit ALS over the train rows and what the catalogue says.

    Not in the paper. With facts above 0 every category, brand and title word counts as one more
    user (als.item_groups). So an item's row says what it is, and an item that nobody chose has a
    row.

    rated    (disliked, slope) of als.rating_targets: learn from disliked items and from stars too;
             a category, brand or word then has the target `facts`. None: liked items alone, with
             target 1 for everything
    nu       how penalties grow with the number of rows, as in als.als
    returns  (U, n_embd), (N, n_embd) float32. Item rows have standard deviation row_scale; columns
             past the rank are 0.
    """
    rows, target = shop.csr("train"), None
    if rated:
        rows = shop.csr("train", positive=None)
        liked = shop.positive[shop.rows("train", positive=None)]
        target = rating_targets(rows.ratings, liked, *rated)
    if facts > 0:
        rows = add_pseudo_users(rows, item_groups(shop.catalogue))
        if target is not None:
            more = np.full(len(rows.items) - len(target), facts, np.float32)
            target = np.concatenate([target, more])
    rank = min(n_embd, shop.n_items, len(rows.counts()))
    X, Y = als(rows, len(rows.counts()), shop.n_items, rank, alpha0, reg, nu, seed, target=target)
    scale = row_scale / Y.std().clamp(min=1e-12)
    pad = (0, n_embd - rank)
    return F.pad(X[: shop.n_users] * scale, pad), F.pad(Y * scale, pad)


@torch.no_grad()
def fit_rows(model: Backbone, n_words: int, seed: int, items: bool = True) -> None:
    """Move new rows to where a published model's word rows are: to their mean and their spread.

    Published word rows have a large part in common (of SmolLM2-135M's norm 3.2, it is 2.2), and
    the trunk has only met rows that have it. Special tokens begin as that part and random
    deviations of the words' spread, users as it and their own deviations, scaled to that spread.
    Items get the common part and keep their scale, since they are scored too: the common part moves
    all item logits alike, but at the words' spread the first pages would be as good as drawn at
    random and certain (loss 9.7 instead of 4.8, log N 4.0: experiments/LOG.md).

    n_words  the first rows of `word` are the published ones
    items    False: items stay as they are, for a pooled start, which averages their own parts
    """
    words = model.word[:n_words]
    mean = words.mean(0)
    spread = float((words - mean).std())
    seed_torch(seed, "pretrain", "specials")
    specials = model.word[n_words:]
    specials.copy_(mean + spread * torch.randn_like(specials))
    if model.word_out is not None:
        model.word_out[n_words:] = model.word_out[:n_words].mean(0)
    if model.user.numel():
        own = model.user - model.user.mean(0)
        scale = spread / float(own.std(correction=0).clamp(min=1e-12))
        model.user.copy_(mean + scale * own)
    if items:
        model.item.add_(mean)
