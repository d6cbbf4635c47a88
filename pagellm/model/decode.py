"""Writing pages: sample, greedy, beam, one-shot, hybrid. Every item is legal, none is repeated.

The legal set of a slot depends only on the user's excluded items and on the slots before it:

    C(s_t) = catalogue \\ excluded \\ {a_<t}

Sampling and every log-probability use the same set; otherwise PPO's ratio would not start at 1.
Where fewer than K items are legal, the page has as many slots as there are items: `mask` says which
slots hold one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, from_numpy

from pagellm.kernels.logprob import linear_logp
from pagellm.kernels.parallel import Parts
from pagellm.model.backbone import Backbone, KVCache
from pagellm.model.sampled_softmax import Candidates, sampled_logp
from pagellm.pages.topk import Rank, argmax, top_k
from pagellm.pages.variety import Above, Variety

__all__ = [
    "Choices",
    "LegalItems",
    "Pages",
    "beam",
    "greedy",
    "hybrid",
    "inverse_cdf",
    "item_tokens",
    "one_shot",
    "page_logp",
    "prefill",
    "ranking",
    "sample",
    "share_prompts",
    "shared_start",
    "slot_states",
    "trim_padding",
]


# Devices that work through a queue. There, asking which slots are filled makes the host wait, which
# costs more than computing the empty slots too.
ASYNC_DEVICES = ("cuda",)
HEAD = 4  # slots that hybrid decoding fills one by one


@dataclass
class Pages:
    """A batch of pages.

    item   (B, K) int64, -1 off the mask
    logp   (B, K) log-probability of each item under its legal set
    mask   (B, K) bool, a prefix of each row
    first  (B, N) item logits before the first slot; of a shortlist (B, S)
    """

    item: Tensor
    logp: Tensor
    mask: Tensor
    first: Tensor


class Choices(Protocol):
    """Items that a page is made of, in place of the whole catalogue: shortlist.Shortlist."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, C) -> (B, S), a column for each of a row's S items."""

    def items(self, column: Tensor) -> Tensor:
        """Columns (B, E) -> item ids; -1 stays -1."""

    def columns(self, items: Tensor) -> Tensor:
        """Item ids (B, E) -> columns; -1 for what is not among them, and for -1."""

    def select(self, rows: Tensor) -> "Choices":
        """Those of these rows of the batch, in this order; a row may be repeated."""


class LegalItems:
    """The constraint of a page: the catalogue without excluded items and items already on the page.

    excluded  (B, E) int64 item ids, padded with -1
    allowed   (N,) or (B, N) bool, optional: a hard filter on top (stock, category, price)
    variety   of pages/variety.py, optional: what the items above change in the next slot's logits
    legal     (B, N) bool, the items that the next slot may hold
    """

    def __init__(
        self,
        excluded: Tensor,
        n_items: int,
        allowed: Tensor | None = None,
        variety: Variety | None = None,
    ):
        B = len(excluded)
        legal = torch.ones(B, n_items + 1, dtype=torch.bool, device=excluded.device)
        # the last column takes padding
        legal.scatter_(1, torch.where(excluded < 0, n_items, excluded), False)
        self.legal = legal[:, :n_items].contiguous()
        if allowed is not None:
            self.legal &= allowed
        self.illegal: Tensor | None = None  # flat indices of what is not legal; on a CPU only
        self.above: Above | None = None if variety is None else variety.begin(B)

    def varied(self, logits: Tensor) -> Tensor:
        """logits (B, N) with the change that variety makes; themselves without variety."""
        if self.above is None:
            return logits
        return logits + from_numpy(self.above.change).to(logits.device)

    def mask(self, logits: Tensor) -> Tensor:
        """logits (B, N), varied, with -inf where an item is not legal; changed in place on a CPU
        where there is no variety."""
        logits = self.varied(logits)
        if logits.device.type != "cpu":
            return torch.where(self.legal, logits, -torch.inf)
        # Few entries are illegal, as a rule, so writing these is faster than a selection.
        if self.illegal is None:
            self.illegal = from_numpy(np.flatnonzero(~self.legal.numpy()))
        logits.view(-1).index_fill_(0, self.illegal, -torch.inf)
        return logits

    def remove(self, item: Tensor) -> None:
        """item (B,) int64: no later slot may hold it. -1 removes nothing."""
        held = item >= 0
        index = item.clamp(min=0)[:, None]
        self.legal.scatter_(1, index, self.legal.gather(1, index) & ~held[:, None])
        if self.illegal is not None:
            flat = torch.arange(len(item)) * self.legal.shape[1] + item
            self.illegal = torch.cat([self.illegal, flat[held]])
        if self.above is not None:
            self.above.add(item.cpu().numpy())

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order; a row may be repeated."""
        self.legal, self.illegal = self.legal[rows], None
        if self.above is not None:
            self.above.select(rows.cpu().numpy())


def legal_logp(logits: Tensor, legal: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-softmax (B, N) over the legal items, -inf elsewhere; and which rows (B,) have one.

    A row without a legal item comes back as all -inf instead of NaN.
    """
    alive = legal.view(torch.uint8).amax(1) > 0  # bool.any() takes 20 times as long on a CPU
    masked = torch.where(legal, logits if temperature == 1 else logits / temperature, -torch.inf)
    if masked.device.type == "cpu" and alive.all():  # the usual case; asking a GPU would wait
        return F.log_softmax(masked, dim=1), alive
    logp = F.log_softmax(torch.where(alive[:, None], masked, 0.0), dim=1)
    return torch.where(legal, logp, -torch.inf), alive


@torch.no_grad()
def prefill(model: Backbone, prompt: Tensor, valid: Tensor, k: int) -> tuple[KVCache, Tensor]:
    """Read the prompts: a cache with room for k more columns, and the last states (B, C)."""
    cache = KVCache(model.shape, len(prompt), prompt.shape[1] + k, model.word)
    return cache, model(prompt, valid, cache)[:, -1]


@torch.no_grad()
def shared_start(
    model: Backbone, prompt: Tensor, valid: Tensor, k: int, group: Tensor
) -> tuple[KVCache, Tensor]:
    """Prompts that are read once for several pages each.

    prompt, valid  (U, P)
    group          (B,) int64, the prompt of each page
    returns        what `sample`, `greedy` and `slot_states` take as `start`
    """
    cache, hidden = prefill(model, prompt, valid, k)
    cache.select(group)
    return cache, hidden[group]


def share_prompts(
    prompt: Tensor, valid: Tensor, k: int, user: np.ndarray, model: Backbone
) -> tuple | None:
    """Read each user's prompt once for all of that user's pages (`shared_start`).

    user   (B,) which user each page is for; pages of one user are neighbours
    returns None if no user has two pages. Not where rows are cut: then another process may have
    such a user, and all must read their prompts alike
    """
    _, first, group = np.unique(user, return_index=True, return_inverse=True)
    if len(first) == len(user) and model.parts is None:
        return None
    row, of = (torch.from_numpy(x).to(prompt.device) for x in (first, group))
    return shared_start(model, prompt[row], valid[row], k, of)


def started(
    model: Backbone, prompt: Tensor, valid: Tensor, k: int, start
) -> tuple[KVCache, Tensor]:
    """`start` if it is given, else the prompts, read now."""
    return prefill(model, prompt, valid, k) if start is None else start


def item_tokens(model: Backbone, item: Tensor, pad: int) -> Tensor:
    """Token ids of dense item ids; `pad` where the item is -1."""
    return torch.where(item >= 0, item + model.n_words + model.n_users, pad)


@torch.no_grad()
def generate(
    model: Backbone,
    prompt: Tensor,
    valid: Tensor,
    constraint: LegalItems,
    k: int,
    pick: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    temperature: float = 1.0,
    start: tuple[KVCache, Tensor] | None = None,
    short: Choices | None = None,
) -> Pages:
    """Fill k slots one after another.

    pick   (logits (B, N) / temperature, -inf where illegal; slot) -> item (B,) and its
           log-probability (B,). What it returns for a row without a legal item is dropped
    start  prompts that were read before: a cache with room for k more columns, and the last hidden
           states (B, C); None: they are read here
    short  shortlists (shortlist.py): N is then their length, and `constraint` and `pick` speak of
           their columns; None: the whole catalogue
    """
    B, device = len(prompt), prompt.device
    item = torch.full((B, k), -1, dtype=torch.long, device=device)
    logp = torch.zeros(B, k, device=device)
    mask = torch.zeros(B, k, dtype=torch.bool, device=device)
    cache, hidden = started(model, prompt, valid, k, start)
    head = model.item_logits if short is None else short.logits
    first = head(hidden)
    logits = first.clone()
    for slot in range(k):
        scores = constraint.mask(logits if temperature == 1 else logits.div_(temperature))
        alive = scores.amax(1) != -torch.inf
        best, best_logp = pick(scores, slot)
        chosen = torch.where(alive, best, -1)
        constraint.remove(chosen)
        if short is not None:
            chosen = short.items(chosen[:, None])[:, 0]
        item[:, slot], mask[:, slot], logp[:, slot] = (
            chosen,
            alive,
            torch.where(alive, best_logp, 0.0),
        )
        if slot + 1 < k:
            valid = torch.cat([valid, alive[:, None]], 1)
            logits = head(
                model(item_tokens(model, chosen, 0)[:, None], valid, cache, placed=0)[:, -1]
            )
    return Pages(item, logp, mask, first)


def greedy(
    model: Backbone,
    prompt: Tensor,
    valid: Tensor,
    constraint: LegalItems,
    k: int,
    start: tuple[KVCache, Tensor] | None = None,
    ties: Rank | None = None,
    short: Choices | None = None,
) -> Pages:
    """The likeliest legal item in every slot.

    start  as in `generate`, and so is `short`
    ties   of equally likely items the one that is highest by `ties` is taken; None: the smallest id
    """

    def pick(logits: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        return likeliest(logits, ties)

    return generate(model, prompt, valid, constraint, k, pick, start=start, short=short)


def likeliest(logits: Tensor, ties: Rank | None) -> tuple[Tensor, Tensor]:
    """The largest of every row of logits (B, N): its column (B,), and its log-probability (B,)."""
    # On a CPU numpy's argmax takes a tenth of torch's time. Both take the first of equals.
    chosen = (
        logits.argmax(1)
        if logits.device.type != "cpu" and ties is None
        else from_numpy(argmax(logits.cpu().numpy(), ties)).to(logits.device)
    )
    return chosen, F.softmax(logits, dim=1).gather(1, chosen[:, None])[:, 0].log()


def sample(
    model: Backbone,
    prompt: Tensor,
    valid: Tensor,
    constraint: LegalItems,
    uniform: Tensor,
    temperature: float = 1.0,
    start: tuple[KVCache, Tensor] | None = None,
    short: Choices | None = None,
) -> Pages:
    """Draw every slot from its legal distribution: Plackett-Luce given the slots before it.

    uniform  (B, K) float64 in [0, 1): the number that turns a slot's distribution into a choice, by
             the inverse of its cumulative sum. So a page depends on its own numbers alone, not on
             its neighbours in the batch
    start    as in `generate`, and so is `short`
    """

    def pick(logits: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        p = F.softmax(logits, dim=1)
        best = inverse_cdf(p, uniform[:, slot])
        return best, p.gather(1, best[:, None])[:, 0].log()

    k = uniform.shape[1]
    return generate(model, prompt, valid, constraint, k, pick, temperature, start, short)


def inverse_cdf(p: Tensor, uniform: Tensor) -> Tensor:
    """The first column at which the running sum of p (B, N) exceeds uniform (B,) times the total.

    Returns (B,) int64. A row is cut into about sqrt(N) pieces: the piece is found first, then the
    column within it. Sums over more than a piece are float64. An entry of 0 is never drawn, since
    the running sum there is no larger than before it.
    """
    N = p.shape[1]
    size = max(1, math.isqrt(N))
    even = N - N % size
    whole = torch.cat(
        [p[:, :even].unflatten(1, (-1, size)).sum(2), p[:, even:].sum(1, keepdim=True)], 1
    )
    whole = whole.cumsum(1, dtype=torch.float64)
    piece, before = first_above(whole, uniform.to(torch.float64) * whole[:, -1])
    column = piece[:, None] * size + torch.arange(size, device=p.device)
    inside = torch.where(column < N, p.gather(1, column.clamp(max=N - 1)), 0.0).cumsum(
        1, dtype=torch.float64
    )
    return (piece * size + first_above(inside, before)[0]).clamp(max=N - 1)


def first_above(total: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """The first column of the running sums (B, M) that exceeds point (B,), and what remains.

    What remains is the point less the sum before that column. A point that rounding has lifted to
    the total counts as just below it.
    """
    last = total[:, -1]
    point = torch.minimum(point, torch.nextafter(last, torch.zeros_like(last)))
    column = torch.searchsorted(total, point[:, None], right=True).clamp(max=total.shape[1] - 1)
    before = F.pad(total, (1, 0)).gather(1, column)[:, 0]
    return column[:, 0], point - before


@torch.no_grad()
def beam(
    model: Backbone,
    prompt: Tensor,
    valid: Tensor,
    constraint: LegalItems,
    k: int,
    width: int = 4,
    start: tuple[KVCache, Tensor] | None = None,
    short: Choices | None = None,
) -> Pages:
    """The page of highest total log-probability that beam search finds.

    width  pages that are kept for each user
    start  as in `generate`; its cache must not be used afterwards
    short  as in `generate`
    """
    B, device = len(prompt), prompt.device
    cache, hidden = started(model, prompt, valid, k, start)
    head = model.item_logits if short is None else short.logits
    first = head(hidden)
    N = first.shape[1]
    rows = torch.arange(B, device=device).repeat_interleave(width)
    cache.select(rows)
    constraint.select(rows)
    if short is not None:
        short = short.select(rows)
        head = short.logits
    valid, logits = valid[rows], first[rows]
    item = torch.full((B * width, k), -1, dtype=torch.long, device=device)
    logp = torch.zeros(B * width, k, device=device)
    mask = torch.zeros(B * width, k, dtype=torch.bool, device=device)
    # All beams of a user are alike at first, so only the first of them may branch at slot 0.
    total = torch.full((B, width), -torch.inf, device=device)
    total[:, 0] = 0.0
    for slot in range(k):
        scores, alive = legal_logp(constraint.varied(logits), constraint.legal, 1.0)
        # A page without a legal item goes on through an extra column, whose log-probability is 0.
        stay = torch.where(alive, -torch.inf, 0.0)[:, None]
        options = (total.reshape(-1, 1) + torch.cat([scores, stay], 1)).view(B, -1)
        total, best = top_k(options, width)
        source = (torch.arange(B, device=device)[:, None] * width + best // (N + 1)).flatten()
        chosen = (best % (N + 1)).flatten()
        step_logp = torch.cat([scores, stay], 1)[source, chosen]
        live = (chosen < N) & total.flatten().isfinite()
        chosen = torch.where(live, chosen, -1)
        item, logp, mask, valid = item[source], logp[source], mask[source], valid[source]
        cache.select(source)
        constraint.select(source)
        constraint.remove(chosen)
        if short is not None:  # pages move within their user, whose shortlist they share
            chosen = short.items(chosen[:, None])[:, 0]
        item[:, slot], mask[:, slot] = chosen, live
        logp[:, slot] = torch.where(live, step_logp, 0.0)
        if slot + 1 < k:
            valid = torch.cat([valid, live[:, None]], 1)
            logits = head(
                model(item_tokens(model, chosen, 0)[:, None], valid, cache, placed=0)[:, -1]
            )
    top = torch.arange(B, device=device) * width
    return Pages(item[top], logp[top], mask[top], first)


@torch.no_grad()
def one_shot(
    model: Backbone,
    prompt: Tensor,
    valid: Tensor,
    constraint: LegalItems,
    k: int,
    start: tuple[KVCache, Tensor] | None = None,
    ties: Rank | None = None,
    short: Choices | None = None,
) -> Pages:
    """Rank by the first slot's distribution alone: one forward pass, no slot depends on another.

    With variety a slot depends on those above it, but no further state of the network is read.

    start, short  as in `generate`        ties  as in `greedy`
    """
    head = model.item_logits if short is None else short.logits
    first = head(model(prompt, valid)[:, -1] if start is None else start[1])
    if constraint.above is not None:
        return fill_varied(first, constraint, k, ties)
    logp, _ = legal_logp(first, constraint.legal, 1.0)
    value, column = top_k(logp, k, ties)
    mask = value.isfinite()
    pad = (0, k - mask.shape[1])
    chosen = torch.where(mask, column, -1)
    return Pages(
        F.pad(chosen if short is None else short.items(chosen), pad, value=-1),
        F.pad(torch.where(mask, value, 0.0), pad),
        F.pad(mask, pad),
        first,
    )


@torch.no_grad()
def hybrid(
    model: Backbone,
    prompt: Tensor,
    valid: Tensor,
    constraint: LegalItems,
    k: int,
    head: int = HEAD,
    start: tuple[KVCache, Tensor] | None = None,
    ties: Rank | None = None,
    short: Choices | None = None,
) -> Pages:
    """The first `head` slots one by one, as `greedy`, and the others in one pass after them.

    The order at the top of a page matters most, and it is there that a slot depends on the slots
    above. GenPage (arXiv 2606.31031) decodes its rows in this way.

    start, short  as in `generate`        ties  as in `greedy`
    """
    cache, hidden = started(model, prompt, valid, k, start)
    top = greedy(model, prompt, valid, constraint, min(head, k), (cache, hidden), ties, short)
    if k <= head:
        return top
    valid = torch.cat([valid, top.mask], 1)
    tokens = item_tokens(model, top.item[:, -1:], 0)
    score = model.item_logits if short is None else short.logits
    logits = score(model(tokens, valid, cache, placed=0)[:, -1])
    # A page that is full already has no legal item left, so what is read for it is dropped.
    if constraint.above is not None:
        rest = fill_varied(logits, constraint, k - top.item.shape[1], ties)
        return Pages(
            torch.cat([top.item, rest.item], 1),
            torch.cat([top.logp, rest.logp], 1),
            torch.cat([top.mask, rest.mask], 1),
            top.first,
        )
    logp, _ = legal_logp(logits, constraint.legal, 1.0)
    value, column = top_k(logp, k - top.item.shape[1], ties)
    mask = value.isfinite()
    pad = (0, k - top.item.shape[1] - mask.shape[1])
    chosen = torch.where(mask, column, -1)
    return Pages(
        torch.cat(
            [top.item, F.pad(chosen if short is None else short.items(chosen), pad, value=-1)], 1
        ),
        torch.cat([top.logp, F.pad(torch.where(mask, value, 0.0), pad)], 1),
        torch.cat([top.mask, F.pad(mask, pad)], 1),
        top.first,
    )


def fill_varied(first: Tensor, constraint: LegalItems, k: int, ties: Rank | None) -> Pages:
    """k slots one after another from the first slot's logits (B, N) and the change by variety."""
    columns = []
    for _ in range(k):
        scores = constraint.mask(first)
        alive = scores.amax(1) != -torch.inf
        chosen, logp = likeliest(scores, ties)
        chosen = torch.where(alive, chosen, -1)
        columns.append((chosen, torch.where(alive, logp, 0.0), alive))
        constraint.remove(chosen)
    item, logp, mask = (torch.stack(x, 1) for x in zip(*columns, strict=True))
    return Pages(item, logp, mask, first)


def ranking(
    pages: Pages,
    legal: Tensor,
    depth: int,
    ties: Rank | None = None,
    short: Choices | None = None,
) -> tuple[Tensor, Tensor]:
    """The page, then the remaining legal items by the first slot's logits.

    Metrics such as NDCG@100 need more ranks than a page has slots.

    legal    (B, N) bool, before any slot was filled; of a shortlist (B, S)
    ties     as in `greedy`
    short    as in `generate`: only its items are ranked
    returns  item (B, depth) int64, -1 past the end; score (B, depth) float32, falling in each row
    """
    B, K = pages.item.shape
    score = torch.where(legal, pages.first, -torch.inf)
    over = torch.where(legal, pages.first, torch.finfo(torch.float32).min).amax(1, keepdim=True)
    above = over + K - torch.arange(K, device=score.device, dtype=score.dtype)
    padded = F.pad(score, (0, 1))  # the last column takes the empty slots
    placed = pages.item if short is None else short.columns(pages.item)
    padded.scatter_(1, torch.where(pages.mask, placed, score.shape[1]), above)
    value, column = top_k(padded[:, :-1], depth, ties)
    kept = value.isfinite()
    pad = (0, depth - kept.shape[1])
    ranked = torch.where(kept, column, -1)
    return (
        F.pad(ranked if short is None else short.items(ranked), pad, value=-1),
        F.pad(torch.where(kept, value, -torch.inf), pad, value=-torch.inf),
    )


def trim_padding(prompt: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """prompt, valid (B, P) without the columns on the left that are padding in every row.

    They are returned as they are on devices where looking would make the host wait.
    """
    if prompt.device.type in ASYNC_DEVICES or not valid.numel():
        return prompt, valid
    first = int(valid.any(0).int().argmax())
    return prompt[:, first:], valid[:, first:]


def slot_states(
    model: Backbone,
    prompt: Tensor,
    valid: Tensor,
    item: Tensor,
    mask: Tensor,
    start: tuple[KVCache, Tensor] | None = None,
) -> Tensor:
    """Hidden states around the slots of given pages, in one pass: (B, K + 1, C).

    Column t is the state before slot t is drawn, column t + 1 the state after its item was read.

    start  as in `generate`: the prompt is not read again, and there is no gradient. Its cache must
           not be used afterwards
    """
    if start is not None:
        cache, hidden = start
        with torch.no_grad():
            after = model(item_tokens(model, item, 0), torch.cat([valid, mask], 1), cache, placed=0)
            return torch.cat([hidden[:, None], after], 1)
    prompt, valid = trim_padding(prompt, valid)
    P = prompt.shape[1]
    ids = torch.cat([prompt, item_tokens(model, item, 0)], 1)
    return model(ids, torch.cat([valid, mask], 1), placed=P, first=P - 1)


def page_logp(
    states: Tensor,
    rows: Tensor,
    item: Tensor,
    mask: Tensor,
    excluded: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
    candidates: Candidates | None = None,
    above: Tensor | None = None,
    parts: Parts | None = None,
):
    """Log-probability of every slot under its legal set, without a tensor of slots x items.

    states      (B, K or K + 1, C) from slot_states
    rows        (N, C) item rows
    item, mask  (B, K) as in Pages
    excluded    (B, E) int64, padded with -1
    candidates  items that stand for all in the softmax (sampled_softmax.py). `rows` (S, C) are then
                theirs, temperature has to be 1, and there is no entropy
    above       (B, K) the items that stand on the page, where `item` names others to be scored
                slot by slot after them; None: `item`
    parts       how item rows are divided among processes (Backbone.item_parts); `rows` are then
                this process's
    returns     logp (B, K) float32, 0 off the mask; with_entropy: and the entropy (B, K) of the
                legal distribution
    """
    B, K = item.shape
    # slot t sees slots < t
    before = torch.ones(K, K, dtype=torch.bool, device=item.device).tril(-1)
    placed = torch.where(before, (item if above is None else above)[:, None, :], -1)  # (B, K, K)
    illegal = torch.cat([excluded[:, None, :].expand(B, K, -1), placed], 2)  # (B, K, E + K)
    if candidates is not None:
        logp = sampled_logp(states[:, :K][mask], rows, candidates, item[mask], illegal[mask])
        return torch.zeros(B, K, device=item.device).masked_scatter(mask, logp)
    if mask.device.type in ASYNC_DEVICES:  # what is computed for empty slots is dropped
        out = linear_logp(
            states[:, :K].flatten(0, 1),
            rows,
            item.clamp(min=0).flatten(),
            torch.where(mask[..., None], illegal, -1).flatten(0, 1),
            temperature,
            return_entropy=with_entropy,
            parts=parts,
        )
        columns = out if isinstance(out, tuple) else (out,)
        spread = [torch.where(mask, x.view(B, K), 0.0) for x in columns]
    else:
        out = linear_logp(
            states[:, :K][mask],
            rows,
            item[mask],
            illegal[mask],
            temperature,
            return_entropy=with_entropy,
            parts=parts,
        )
        columns = out if isinstance(out, tuple) else (out,)
        spread = [
            torch.zeros(B, K, dtype=x.dtype, device=x.device).masked_scatter(mask, x)
            for x in columns
        ]
    return tuple(spread) if with_entropy else spread[0]
