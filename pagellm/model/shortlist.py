"""Shortlists: the items that a user's page may hold, where the whole catalogue is too many.

    proposals = Proposals(shop, candidates, seed)(users)                      # (U, M), no network
    candidates = best_items(hidden, model.item, excluded, size, proposals)    # (U, S)
    short = Shortlist(model, candidates)
    pages = sample(model, prompt, valid, short.constraint(), uniform, tau, start, short)
    logp, entropy = short.logp(slot_states(...), pages.item, pages.mask, tau)

One set serves for everything that is asked about a page: sampling, the old, the new and the
reference log-probabilities, entropy and KL. So the ratio of PPO begins at 1, and the cost of a slot
follows the shortlist. A shortlist of all legal items gives what the whole catalogue gives.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pagellm.data.shop import Rows, Shop
from pagellm.kernels.logprob import entropy, token_logp
from pagellm.kernels.parallel import Parts, gathered, gathered_ids, turned
from pagellm.model.als import als, transpose
from pagellm.model.backbone import Backbone
from pagellm.model.decode import LegalItems, shared_start
from pagellm.pages.ranked import BLOCK
from pagellm.pages.topk import largest, top_k

__all__ = [
    "READ",
    "Proposals",
    "Shortlist",
    "best_items",
    "columns_of",
    "draw_shortlists",
    "neighbours",
]


# A neighbour's neighbours are read from so many users of an item, spread over all that have it.
READ = 32
# Implicit ALS as `pretrain --rows als` fits it by default.
FACTORS, ALPHA0, REG = 64, 0.01, 0.01


class Proposals:
    """What others than the policy would put on a user's shortlist.

    Half comes from implicit ALS, half from neighbours: items of users who share an item of the
    history. Both read train rows only.

    candidates  size of the shortlists; half of it is proposed
    """

    def __init__(self, shop: Shop, candidates: int, seed: int):
        self.rows, self.size = shop.csr("train"), candidates // 4
        self.by_item = transpose(self.rows, shop.n_items)
        factors = min(FACTORS, shop.n_users, shop.n_items)
        self.users, self.items = als(
            self.rows, shop.n_users, shop.n_items, factors, ALPHA0, REG, 1.0, seed
        )

    def __call__(self, users: np.ndarray) -> np.ndarray:
        """(B, 2 * size) int64 item ids, an item maybe twice, padded with -1."""
        found = []
        for at in range(0, len(users), step := max(1, BLOCK // max(1, len(self.items)))):
            some = torch.from_numpy(users[at : at + step])
            found.append(largest((self.users[some] @ self.items.T).numpy(), self.size)[0])
        near = neighbours(self.rows, self.by_item, users, self.size)
        return np.concatenate([np.concatenate(found), near], 1)


def neighbours(rows: Rows, by_item: Rows, users: np.ndarray, size: int) -> np.ndarray:
    """The items that stand most often beside those of a user's history: (B, size), padded with -1.

    An item i scores the sum, over the items h of the history and the users who have both, of
    1 / sqrt(n_h n_i), with n the number of users of an item. Of an item READ users are read at
    most.

    rows     items of every user        by_item  users of every item
    """
    n_items = len(by_item.indptr) - 1
    count = np.maximum(by_item.counts(), 1)
    place, item = rows.flat(users)
    have = by_item.counts()[item]
    read = np.minimum(have, READ)
    within = np.arange(read.sum()) - np.repeat(np.cumsum(read) - read, read)
    spread = within * np.repeat(have, read) // np.repeat(read, read)
    other = by_item.items[np.repeat(by_item.indptr[item], read) + spread]
    at, theirs = rows.flat(other)
    weight = np.repeat(have / np.maximum(read, 1) / np.sqrt(count[item]), read)[at]
    code = np.repeat(place, read)[at] * n_items + theirs
    code, first = np.unique(code, return_inverse=True)
    score = np.bincount(first, weight, len(code)) / np.sqrt(count[code % n_items])
    order = np.lexsort((code, -score, code // n_items))
    place, theirs = code[order] // n_items, code[order] % n_items
    number = np.arange(len(place)) - np.searchsorted(place, np.arange(len(users)))[place]
    out = np.full((len(users), size), -1)
    kept = number < size
    out[place[kept], number[kept]] = theirs[kept]
    return out


@torch.no_grad()
def best_items(
    hidden: Tensor,
    rows: Tensor,
    excluded: Tensor,
    size: int,
    proposed: Tensor | None = None,
    allowed: Tensor | None = None,
    parts: Parts | None = None,
) -> Tensor:
    """Shortlists: what is proposed, and the items of the largest logits that fill it up.

    The logits of a few users at a time are made and dropped again, at most BLOCK numbers.

    hidden    (U, C) states before the first slot      rows  (N, C) item rows
    excluded  (U, E) item ids, padded with -1, that no shortlist may hold
    proposed  (U, M) item ids, padded with -1, also twice; the first `size` of them are kept
    allowed   (N,) or (U, N) bool: a hard filter on top, as in decode.LegalItems
    parts     how item rows are divided among processes, and `rows` are then this process's. Each
              finds the best of its rows for everybody; the lists are then merged. Call it on all,
              without `allowed`
    returns   (U, min(size, N)) int64, rising in each row; -1, at the left, where fewer are legal
    """
    if parts is None:
        value, column = best_of(hidden, rows, excluded, size, proposed, allowed)
    else:
        counts = parts.counts(len(hidden), hidden.device)
        ids = [None if x is None else gathered_ids(x, counts, parts) for x in (excluded, proposed)]
        assert ids[0] is not None
        found = best_of(gathered(hidden, counts, parts), rows, ids[0], size, ids[1], None, parts)
        widths = [min(size, width) for width in parts.widths()]
        value, column = (turned(x, counts, widths, parts) for x in found)
        value, place = top_k(value, min(size, parts.whole))
        column = column.gather(1, place)
    return torch.where(value == -torch.inf, -1, column).sort(1).values


def best_of(
    hidden: Tensor,
    rows: Tensor,
    excluded: Tensor,
    size: int,
    proposed: Tensor | None,
    allowed: Tensor | None,
    parts: Parts | None = None,
) -> tuple[Tensor, Tensor]:
    """Of `best_items`: score and item (U, min(size, rows)), the largest score first.

    Ids are counted from this process's rows on; items that come back from the first of all rows on.
    """
    (U, _), N = hidden.shape, len(rows)
    size = min(size, N)
    values, items = hidden.new_empty((U, size)).float(), hidden.new_empty((U, size)).long()
    step = max(1, BLOCK // max(1, N if parts is None else parts.size))
    for at in range(0, U, step):
        some = slice(at, at + step)
        scores = hidden[some].float() @ rows.float().T
        legal = LegalItems(
            excluded[some], N, allowed if allowed is None or allowed.dim() == 1 else allowed[some]
        )
        if proposed is not None:
            # In front of all logits; among themselves in their own order.
            ids = proposed[some]
            first = torch.where(ids >= 0, torch.arange(ids.shape[1], 0, -1, device=ids.device), 0)
            padded = torch.zeros(len(ids), N + 1, device=ids.device)
            padded.scatter_reduce_(1, torch.where(ids < 0, N, ids), first.to(padded.dtype), "amax")
            over = F.pad(scores, (0, 1)).amax(1, keepdim=True) + 1  # the padding is 0
            over = over if parts is None else parts.largest(over)
            scores = torch.where(padded[:, :N] > 0, over + padded[:, :N], scores)
        values[some], items[some] = top_k(legal.mask(scores), size)
    return values, items if parts is None else items + parts.first


def columns_of(candidates: Tensor, items: Tensor) -> Tensor:
    """Where items (B, E) stand among candidates (B, S), rising; -1 where they do not, and for -1.

    An item may stand several times in `items`.
    """
    items = items.contiguous()
    at = torch.searchsorted(candidates, items).clamp(max=candidates.shape[1] - 1)
    return torch.where((candidates.gather(1, at) == items) & (items >= 0), at, -1)


class Shortlist:
    """A network's item rows of shortlists, read once: decode.generate draws from them.

    candidates  (B, S) int64 as `best_items` gives them: legal items, rising, -1 at the left
    rows        (B, S, C); with the gradient of the network's rows
    """

    def __init__(self, model: Backbone, candidates: Tensor, rows: Tensor | None = None):
        self.model, self.candidates = model, candidates
        self.rows = model.scored_rows(candidates.clamp(min=0)) if rows is None else rows

    def select(self, rows: Tensor) -> "Shortlist":
        """The shortlists of these rows of the batch, in this order; a row may be repeated."""
        return Shortlist(self.model, self.candidates[rows], self.rows[rows])

    def constraint(self) -> LegalItems:
        """What a page may hold, in columns of the shortlist."""
        nothing = self.candidates.new_full((len(self.candidates), 1), -1)
        return LegalItems(nothing, self.candidates.shape[1], self.candidates >= 0)

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, C) or (B, K, C) -> (B, S) or (B, K, S) in float32."""
        wide = hidden if hidden.dim() == 3 else hidden[:, None]
        found = wide.float() @ self.rows.float().mT
        return found if hidden.dim() == 3 else found[:, 0]

    def columns(self, items: Tensor) -> Tensor:
        """Item ids (B, E) -> columns; -1 for an item that is not on the shortlist, and for -1."""
        return columns_of(self.candidates, items)

    def items(self, column: Tensor) -> Tensor:
        """Columns (B, E) -> item ids; -1 stays -1."""
        return torch.where(column >= 0, self.candidates.gather(1, column.clamp(min=0)), -1)

    def open(self, item: Tensor, mask: Tensor) -> Tensor:
        """(B, K, S) bool: what each slot of a page (B, K) may hold. All, for slots off the mask."""
        K, S = item.shape[1], self.candidates.shape[1]
        before = torch.ones(K, K, dtype=torch.bool, device=item.device).tril(-1)
        column = self.columns(item)[:, None].expand(-1, K, -1)
        taken = torch.where(before & (column >= 0), column, S)
        held = torch.zeros(len(item), K, S + 1, dtype=torch.bool, device=item.device)
        held.scatter_(2, taken, True)
        return (self.candidates >= 0)[:, None] & ~held[..., :S] | ~mask[..., None]

    def logp(
        self, states: Tensor, item: Tensor, mask: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy (B, K) float32 of every slot over its shortlist, 0 off mask.

        states  (B, K or K + 1, C) from decode.slot_states; item, mask (B, K) as in decode.Pages
        """
        logits, legal = self.logits(states[:, : item.shape[1]]), self.open(item, mask)
        column = self.columns(item).clamp(min=0)
        logp = token_logp(logits, column, legal, temperature)
        return (
            torch.where(mask, logp, 0.0),
            torch.where(mask, entropy(logits, legal, temperature), 0.0),
        )

    def legal_logits(self, states: Tensor, item: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, K, S) of every slot, -inf on what it may not hold."""
        return self.logits(states[:, : item.shape[1]]).masked_fill(
            ~self.open(item, mask), -torch.inf
        )


def draw_shortlists(
    policy: Backbone,
    prompt: Tensor,
    valid: Tensor,
    excluded: Tensor,
    proposed: Tensor,
    user: np.ndarray,
    size: int,
    k: int,
) -> tuple[Shortlist, tuple]:
    """Shortlists for some pages; and their prompts, already read, to pass to decode as `start`.

    All pages of a user share one shortlist. It holds the proposed items; the rest are the best
    items by the current policy's logits of the first slot.

    excluded  (B, E) items that no page may hold, proposed (B, M) items; both padded with -1
    user      (B,) which user each page is for; pages of one user are neighbours
    size, k   items of a shortlist, slots of a page
    """
    _, *places = np.unique(user, return_index=True, return_inverse=True)
    first, group = (torch.from_numpy(x).to(prompt.device) for x in places)
    begun = shared_start(policy, prompt[first], valid[first], k, group)
    # `first` are the first pages of their users, so the state of each is that user's.
    hidden = begun[1][first]
    rows, parts = policy.scored_items(), policy.item_parts
    found = best_items(hidden, rows, excluded[first], size, proposed[first], parts=parts)
    return Shortlist(policy, found[group]), begun
