"""Tables whose rows are divided among processes for good, and what is read of them.

    parts = Parts(n_items)                      this process holds rows parts.first to parts.last
    rows = lookup(table, ids, parts)            the rows of ids, from whichever process has them
    logits = all_logits(hidden, table, parts)   against all rows, for this process's positions
    logp = linear_logp(hidden, table, target, parts=parts)      logprob.py, vocabulary-parallel

A process asks for other rows and scores other positions than the next one. No table is ever put
together: ids, states and logits travel instead, and gradients travel back the same way. All
processes must make the same calls in the same order, with whatever numbers of ids or positions,
also none.

A gradient that arrives at a table is complete, and divided by the number of processes: so it is
the mean over the processes, as distributed training averages the gradients of all else.

Source: Shoeybi et al., Megatron-LM, arXiv 1909.08053, for the softmax over a divided vocabulary.
"""

from typing import Any

import torch
import torch.distributed as td
from torch import Tensor

__all__ = ["Parts", "all_logits", "averaged", "gathered", "gathered_ids", "lookup", "turned"]


class Parts:
    """Which rows of a table each process holds: process r those from r * size to (r + 1) * size.

    The last processes hold fewer rows, or none.

    whole        rows of the whole table
    first, last  this process's rows
    """

    def __init__(self, whole: int):
        self.whole, self.rank, self.world = whole, td.get_rank(), td.get_world_size()
        self.size = max(1, -(-whole // self.world))
        self.first, self.last = self.bounds(self.rank)

    def bounds(self, rank: int) -> tuple[int, int]:
        """The rows of a process, as a range."""
        return min(rank * self.size, self.whole), min((rank + 1) * self.size, self.whole)

    def widths(self) -> list[int]:
        """How many rows each process holds."""
        return [last - first for first, last in map(self.bounds, range(self.world))]

    def largest(self, x: Tensor) -> Tensor:
        """The largest x over all processes, element by element."""
        td.all_reduce(x, td.ReduceOp.MAX)
        return x

    def counts(self, n: int, device: torch.device) -> list[int]:
        """The numbers that all processes pass."""
        mine = torch.full((self.world,), n, dtype=torch.long, device=device)
        return exchange(mine, [1] * self.world, [1] * self.world).tolist()


def exchange(x: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """x (sum of sent, ...): its first sent[0] rows go to process 0, and so on.

    returns  (sum of received, ...): the rows that came, in order of the processes
    """
    out = x.new_empty((sum(received), *x.shape[1:]))
    td.all_to_all_single(out, x.contiguous(), received, sent)
    return out


class Lookup(torch.autograd.Function):
    """See `lookup`."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, parts: Parts, sparse: bool) -> Tensor:
        found, place = ids.reshape(-1).unique(return_inverse=True)  # rising, so by process
        count = torch.bincount(found // parts.size, minlength=parts.world)
        came = exchange(count, [1] * parts.world, [1] * parts.world)
        sent, received = torch.stack([count, came]).tolist()
        asked = exchange(found, sent, received) - parts.first
        rows = exchange(table[asked], received, sent)
        ctx.save_for_backward(place, asked)
        ctx.parts, ctx.sparse, ctx.routes, ctx.shape = parts, sparse, (sent, received), table.shape
        return rows[place].view(*ids.shape, table.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        place, asked = ctx.saved_tensors
        sent, received = ctx.routes
        own = grad.new_zeros((sum(sent), ctx.shape[1]))
        own.index_add_(0, place, grad.reshape(-1, ctx.shape[1]))
        back = exchange(own, sent, received) / ctx.parts.world
        if ctx.sparse:
            whole = torch.sparse_coo_tensor(asked[None], back, ctx.shape, check_invariants=False)
        else:
            whole = back.new_zeros(ctx.shape).index_add_(0, asked, back)
        return whole, None, None, None


def lookup(table: Tensor, ids: Tensor, parts: Parts, sparse: bool = False) -> Tensor:
    """Rows (..., C) of ids (...), each from 0 to parts.whole - 1; every row is fetched once.

    table   (last - first, C): this process's rows
    sparse  give the table a sparse gradient
    """
    return Lookup.apply(table, ids, parts, sparse)  # type: ignore[no-any-return]


class Averaged(torch.autograd.Function):
    """See `averaged`."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, world: int) -> Tensor:
        ctx.world = world
        return table.view_as(table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad / ctx.world, None


def averaged(table: Tensor, parts: Parts) -> Tensor:
    """This process's rows, for a product with the states of all processes.

    Their gradient is then the sum over all processes; the table gets the mean.
    """
    return Averaged.apply(table, parts.world)  # type: ignore[no-any-return]


class Gathered(torch.autograd.Function):
    """See `gathered`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], rank: int) -> Tensor:
        ctx.counts, ctx.rank = counts, rank
        return exchange(torch.cat([x] * len(counts)), [len(x)] * len(counts), counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        n, world = ctx.counts[ctx.rank], len(ctx.counts)
        return exchange(grad, ctx.counts, [n] * world).unflatten(0, (world, n)).sum(0), None, None


def gathered(x: Tensor, counts: list[int], parts: Parts) -> Tensor:
    """The rows that all processes pass, in order of the processes: (sum of counts, ...).

    counts  how many each of them passes (`Parts.counts`)
    """
    return Gathered.apply(x, counts, parts.rank)  # type: ignore[no-any-return]


class Turned(torch.autograd.Function):
    """See `turned`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], widths: list[int], rank: int) -> Tensor:
        ctx.counts, ctx.widths, ctx.rank = counts, widths, rank
        sent = [count * widths[rank] for count in counts]
        received = [counts[rank] * width for width in widths]
        pieces = exchange(x.reshape(-1), sent, received).split(received)
        return torch.cat([p.view(counts[rank], w) for p, w in zip(pieces, widths, strict=True)], 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        counts, widths, rank = ctx.counts, ctx.widths, ctx.rank
        flat = torch.cat([piece.reshape(-1) for piece in grad.split(widths, 1)])
        sent = [counts[rank] * width for width in widths]
        back = exchange(flat, sent, [count * widths[rank] for count in counts])
        return back.view(sum(counts), widths[rank]), None, None, None


def turned(x: Tensor, counts: list[int], widths: list[int], parts: Parts) -> Tensor:
    """What each process found for everybody's positions, sorted by whose they are.

    x        (sum of counts, widths[rank]): a row for each position of all processes
    returns  (counts[rank], sum of widths): a row for each position of this process
    """
    return Turned.apply(x, counts, widths, parts.rank)  # type: ignore[no-any-return]


def all_logits(hidden: Tensor, table: Tensor, parts: Parts) -> Tensor:
    """hidden (..., C) against all rows of the table: (..., parts.whole) in hidden's type.

    Every process multiplies the states of all processes with its own rows.

    table  this process's rows, `averaged` where they learn
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    counts = parts.counts(len(flat), flat.device)
    own = gathered(flat, counts, parts) @ table.to(flat.dtype).T
    return turned(own, counts, parts.widths(), parts).view(*hidden.shape[:-1], parts.whole)


def gathered_ids(ids: Tensor, counts: list[int], parts: Parts) -> Tensor:
    """Ids (n, E) of all processes' positions, counted from this process's rows on.

    E may differ between processes. What is no row of this process is -1, and so is padding.

    returns  (sum of counts, largest E)
    """
    widest = max(parts.counts(ids.shape[1], ids.device))
    padded = torch.nn.functional.pad(ids, (0, widest - ids.shape[1]), value=-1)
    found = gathered(padded, counts, parts)
    return torch.where((found >= parts.first) & (found < parts.last), found - parts.first, -1)
