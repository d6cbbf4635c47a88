"""Log-probability of chosen tokens and entropy of the choice, always in float32 or float64.

    token_logp, entropy   from logits that exist already, e.g. of one decoding step
    linear_logp           from hidden states and the rows of the output head, without a tensor of
                          all (N, V) logits: for training and scoring

The softmax may be restricted to a legal set of choices. A policy that cannot pick an item must not
be scored as if it could. token_logp takes the legal set as a bool mask beside the logits,
linear_logp as short lists of excluded ids. To choose among items only, not words, give linear_logp
only the head's item rows; other rows then cost nothing.
"""

from collections.abc import Sequence

import torch
import torch.distributed as td
from torch import Tensor

from .checks import compute_dtype, require, require_temperature
from .parallel import Parts, exchange, gathered, gathered_ids

__all__ = ["entropy", "linear_logp", "token_logp"]

# Entries of linear_logp's scratch tile. On a CPU 8 MB in float32: larger tiles were no faster at
# any shape tried. On a GPU 128 MB, because there kernel launches cost more than memory.
TILE = {"cpu": 2**21, "other": 2**25}
TILE_ROWS = 2048
# If all logits fit into KEEP tiles (256 MB on a CPU, 512 MB on a GPU), they are kept for the
# backward pass, which saves one of four matrix products; otherwise they are computed again. Hidden
# states narrower than KEEP_FROM channels keep at most one tile: for them a product is as cheap as
# storing its result.
KEEP, KEEP_FROM = {"cpu": 32, "other": 4}, 256
PITCH = 16  # entries: 64 bytes in float32

# exp(-60) = 9e-27 vanishes beside 1 even in float64 and is still a normal float32. Without this
# floor the tail of a peaked softmax is denormal, and denormals make a CPU's matrix product several
# times slower.
FLOOR = -60.0


def token_logp(
    logits: Tensor, ids: Tensor, legal: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """log softmax(logits / temperature) over the legal entries, at the chosen ids.

    logits       (..., V) float
    ids          (...)    integer, in [0, V)
    legal        (..., V) bool, or None for all; illegal logits may hold anything, also NaN
    temperature  positive; divides the logits
    returns      (...) float32 (float64 if logits are), in nats; an illegal id has -inf, gradient 0

    Raises ValueError on unequal shapes, an id out of range, a row without a legal entry (the
    message names the row), and a temperature that is not positive and finite.
    """
    logp = _log_softmax(logits, legal, temperature, "token_logp")
    if ids.shape != logits.shape[:-1]:
        raise ValueError(
            f"token_logp: ids {tuple(ids.shape)}, logits {tuple(logits.shape)}: want one a row"
        )
    V = logits.shape[-1]
    require((ids >= 0) & (ids < V), f"token_logp: id outside [0, {V}) in row {{row}}")
    index = ids.long()[..., None]
    chosen = logp.gather(-1, index)
    if legal is not None:
        chosen = torch.where(legal.gather(-1, index), chosen, -torch.inf)
    return chosen[..., 0]


def entropy(logits: Tensor, legal: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Entropy -sum_j p_j log p_j of softmax(logits / temperature) over the legal entries.

    Arguments and errors as for `token_logp`.
    returns  (...) float32 (float64 if logits are), from 0 to log V nats; gradients are finite even
             where a legal logit is -inf
    """
    logp = _log_softmax(logits, legal, temperature, "entropy")
    # 0 log 0 counts as 0. Fill before the product: -inf * 0 is NaN, forward and backward.
    return (logp.exp() * -logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)


def _log_softmax(logits: Tensor, legal: Tensor | None, temperature: float, where: str) -> Tensor:
    """(..., V) log-probabilities, -inf on illegal entries; `where` names the caller in errors."""
    require_temperature(temperature, where)
    logits = logits.to(compute_dtype(logits))
    if legal is not None:
        if legal.shape != logits.shape or legal.dtype != torch.bool:
            raise ValueError(
                f"{where}: legal {tuple(legal.shape)} {legal.dtype}, "
                f"logits {tuple(logits.shape)}: want a bool of the same shape"
            )
        require(legal.any(-1), f"{where}: row {{row}} has no legal entry")
        logits = torch.where(legal, logits, -torch.inf)
    elif logits.shape[-1] == 0 and logits.numel() != logits.shape[:-1].numel():
        raise ValueError(f"{where}: logits {tuple(logits.shape)} leave nothing to choose from")
    return torch.log_softmax(logits / temperature, -1)


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    excluded: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
    parts: Parts | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """token_logp(hidden @ weight.T, target) of N positions, without a tensor of all (N, V) logits.

    hidden       (N, C) float    hidden states, one a position
    weight       (V, C) float    rows of the output head, one a choice
    target       (N,)   integer  chosen ids, in [0, V)
    excluded     (N, E) integer  ids that row n may not choose, in any order, repeats allowed; -1 is
                                 padding
    temperature  positive; divides the logits
    parts        the head's rows are divided among processes (parallel.py), and `weight` holds this
                 process's, `averaged` where they learn; V is then parts.whole. Each process asks
                 about its own positions. Call it on all of them
    returns      logp (N,), with return_entropy also the entropy (N,) of the choice; in nats,
                 float32 (float64 if an input is). logp is -inf with gradient 0 where the target is
                 excluded.

    Differentiable once in hidden and weight, through either output. Second derivatives
    (create_graph) raise NotImplementedError.

    Memory beyond inputs and gradients: a few (N,) tensors and a scratch buffer of TILE entries, two
    buffers with entropy. If all logits fit into KEEP tiles, they are kept until the backward pass.

    Half precision is widened, so that logits and sums are float32. Only on CUDA do bf16 operands
    stay bf16; their products are still summed in float32.

    Raises ValueError on unequal shapes, ids out of range, a row with nothing left to choose (the
    message names the row), and a temperature that is not positive and finite.
    """
    require_temperature(temperature, "linear_logp")
    if (
        hidden.dim() != 2
        or weight.dim() != 2
        or hidden.shape[1] != weight.shape[1]
        or (target.shape != hidden.shape[:1])
    ):
        raise ValueError(
            f"linear_logp: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, target "
            f"{tuple(target.shape)}: want (N, C), (V, C), (N,)"
        )
    V = len(weight) if parts is None else parts.whole
    require((target >= 0) & (target < V), f"linear_logp: target outside [0, {V}) in row {{row}}")
    if excluded is not None:
        if excluded.dim() != 2 or len(excluded) != len(hidden):
            raise ValueError(
                f"linear_logp: excluded {tuple(excluded.shape)}, want ({len(hidden)}, E)"
            )
        require(
            ((excluded >= -1) & (excluded < V)).all(1),
            f"linear_logp: excluded id outside [0, {V}) and not -1 in row {{row}}",
        )
        excluded = excluded.long() if excluded.shape[1] else None
    # Autocast would round the logits to bf16.
    with torch.autocast(hidden.device.type, enabled=False):
        if parts is not None:
            counts = parts.counts(len(hidden), hidden.device)
            target = gathered_ids(target.long()[:, None], counts, parts)[:, 0]
            none = target.new_empty((len(hidden), 0))
            excluded = gathered_ids(none if excluded is None else excluded, counts, parts)
            hidden = gathered(hidden, counts, parts)
        logp, spread = LinearLogp.apply(
            hidden,
            weight,
            target.long(),
            excluded,
            temperature,
            return_entropy,
            torch.is_grad_enabled(),
            parts,
        )
        if parts is not None:  # of the positions of all processes, this one's
            logp = logp.split(counts)[parts.rank]
            spread = spread.split(counts)[parts.rank] if return_entropy else None
    return (logp, spread) if return_entropy else logp


def together(m: Tensor, s: Tensor, u: Tensor, chosen: Tensor, parts: Parts) -> tuple[Tensor, ...]:
    """The statistics of `LinearLogp` over all rows, from those over every process's rows.

    One exchange of four numbers a position and process.
    """
    mine, world = torch.stack([m, s, u, chosen]), parts.world
    parts_of = exchange(mine.repeat(world, 1), [4] * world, [4] * world).view(world, 4, -1)
    each_m, each_s, each_u, each_chosen = parts_of.unbind(1)
    m = each_m.amax(0)
    drop = (each_m - m).clamp(min=FLOOR)
    u = ((each_u + drop * each_s) * drop.exp()).sum(0)
    return m, (each_s * drop.exp()).sum(0), u, each_chosen.sum(0)


class LinearLogp(torch.autograd.Function):
    """Forward: online softmax over tiles. Backward: the tiles again, recomputed unless kept.

    For each row, with shifted logits L_j = z_j - m and e_j = exp(L_j):

        m = max_j z_j    s = sum_j e_j    u = sum_j e_j L_j / s          (p_j = e_j / s)
        logp = (z_target - m) - log s     entropy = log s - u
        d logp / d z_j = [j = target] - p_j      d entropy / d z_j = -p_j (L_j - u)

    m and log s are stored separately: at logits of 1e4, log s would lose three digits in the
    float32 sum m + log s.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        excluded: Tensor | None,
        temperature: float,
        with_entropy: bool,
        for_backward: bool,
        parts: Parts | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        tiles = Tiles(
            hidden,
            weight,
            excluded,
            temperature,
            keep=for_backward and any(ctx.needs_input_grad[:2]),
        )
        # Finite, so that a tile without a legal entry does not compute inf - inf.
        lowest = torch.finfo(tiles.dtype).min
        m = hidden.new_full((len(hidden),), lowest, dtype=tiles.dtype)
        s, u, chosen = (torch.zeros_like(m) for _ in range(3))

        for columns in tiles.columns:
            w = tiles.head_rows(columns)
            for rows in tiles.rows:
                z = tiles.logits(rows, columns, w)
                tiles.strike(-torch.inf)
                at, inside = position(target[rows], columns)
                chosen[rows] = torch.where(inside, z.gather(1, at)[:, 0], chosen[rows])

                peak = torch.maximum(m[rows], z.amax(1))
                shifted = tiles.shift(z, peak)
                # the sums so far are relative to the old maximum
                drop = (m[rows] - peak).clamp(min=FLOOR)
                if with_entropy:
                    e = torch.exp(shifted, out=tiles.second(z))
                    u[rows] = (u[rows] + drop * s[rows]) * drop.exp() + shifted.mul_(e).sum(1)
                else:
                    e = shifted.exp_()
                s[rows] = s[rows] * drop.exp() + e.sum(1)
                m[rows] = peak

        if parts is not None:
            m, s, u, chosen = together(m, s, u, chosen, parts)
        require(m != lowest, "linear_logp: row {row} has nothing left to choose")
        u /= s
        log_s = s.log()
        ctx.temperature, ctx.parts, ctx.with_entropy = temperature, parts, with_entropy
        ctx.save_for_backward(
            hidden, weight, target, excluded, m, s, u, chosen != -torch.inf, *tiles.kept
        )
        return chosen - m - log_s, log_s - u if with_entropy else None

    @staticmethod
    def backward(
        ctx, grad_logp: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None, None]:
        # Autograd's own once_differentiable raises only if the incoming gradient has a graph.
        # Without this check a gradient penalty would silently lose its term.
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "linear_logp has no second derivative: leave create_graph out, or use "
                "token_logp(hidden @ weight.T, target), which holds all the logits"
            )
        hidden, weight, target, excluded, m, s, u, legal, *kept = ctx.saved_tensors
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        tiles = Tiles(hidden, weight, excluded, ctx.temperature, kept=kept)
        if ctx.parts is not None:  # each process has the gradients of its own positions
            grad_logp, grad_entropy = summed(grad_logp, grad_entropy, s, ctx.with_entropy)
        # d loss / d(h . w_j) = hit [j = target] - e_j (flat + slope L_j)
        hit = torch.zeros_like(s)
        if grad_logp is not None:
            hit = torch.where(legal, grad_logp, 0.0) / ctx.temperature
        slope = None if grad_entropy is None else grad_entropy / ctx.temperature / s
        flat = hit / s if slope is None else hit / s - slope * u

        grad_hidden = torch.zeros_like(hidden, dtype=tiles.dtype) if want_hidden else None
        grad_weight = torch.empty_like(weight) if want_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            for columns in tiles.columns:
                w = tiles.head_rows(columns)
                # Summed in float32, tile by tile, even if the gradient itself is half precision.
                grad_w = torch.zeros_like(w, dtype=tiles.dtype)
                for rows in tiles.rows:
                    shifted = tiles.shift(tiles.logits(rows, columns, w), m[rows])
                    if slope is None:
                        dz = shifted.exp_().mul_(-flat[rows, None])
                    else:
                        e = torch.exp(shifted, out=tiles.second(shifted))
                        dz = shifted.mul_(-slope[rows, None]).sub_(flat[rows, None]).mul_(e)
                    at, inside = position(target[rows], columns)
                    dz.scatter_add_(1, at, torch.where(inside, hit[rows], 0.0)[:, None])
                    # Last, because exp of an excluded logit may overflow. Its gradient is 0.
                    tiles.strike(0.0)
                    dz = dz.to(tiles.operand)
                    if grad_hidden is not None:
                        add_product(grad_hidden[rows], dz, w)
                    if grad_weight is not None:
                        add_product(grad_w, dz.t(), tiles.hidden[rows])
                if grad_weight is not None:
                    grad_weight[columns] = grad_w
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def summed(
    grad_logp: Tensor | None, grad_entropy: Tensor | None, like: Tensor, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients summed over all processes, in one exchange; None counts as 0."""
    total = torch.zeros(1 + with_entropy, len(like), dtype=like.dtype, device=like.device)
    for row, grad in zip(total, (grad_logp, grad_entropy), strict=False):
        if grad is not None:
            row.copy_(grad)
    td.all_reduce(total)
    return total[0], total[1] if with_entropy else None


class Tiles:
    """The (N, V) logits cut into tiles, which are computed one at a time into a scratch buffer.

    Arguments as in `linear_logp`, and
    keep     keep the logits of all tiles, if KEEP allows, in `kept`: one buffer per tile
    kept     the buffers of the forward pass, for the backward pass: nothing is computed again

    dtype          of logits, statistics and sums
    operand        dtype of the inputs of matrix products
    rows, columns  slices that cut N and V into even parts; a tile has about TILE entries
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        excluded: Tensor | None,
        temperature: float,
        keep: bool = False,
        kept: Sequence[Tensor] = (),
    ):
        (N, _), V = hidden.shape, len(weight)
        self.dtype = compute_dtype(hidden, weight)
        # Tensor cores multiply bf16 exactly and add in float32; a CPU would round to bf16.
        in_bf16 = hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16
        self.operand = torch.bfloat16 if in_bf16 else self.dtype
        self.hidden, self.weight = hidden.to(self.operand), weight
        self.excluded, self.temperature = excluded, temperature
        self.rows = even_slices(N, TILE_ROWS)
        self.height = self.rows[0].stop if N else 0
        device = "cpu" if hidden.device.type == "cpu" else "other"
        self.columns = even_slices(V, max(1, TILE[device] // max(self.height, 1)))
        # At least one spare column: excluded ids that lie outside the tile are written there. Rows
        # begin at multiples of PITCH entries; without that a CPU's product takes 1.4 times as long.
        self.pitch = -(-((self.columns[0].stop if V else 0) + 1) // PITCH) * PITCH
        self.scratch = hidden.new_empty(self.height * self.pitch, dtype=self.dtype)
        self.spare: Tensor | None = None
        self.known, self.kept = bool(kept), list(kept)
        n_tiles = len(self.rows) * len(self.columns)
        if keep and n_tiles <= (KEEP[device] if hidden.shape[1] >= KEEP_FROM else 1):
            self.kept = [torch.empty_like(self.scratch) for _ in range(n_tiles)]

    def head_rows(self, columns: slice) -> Tensor:
        return self.weight[columns].to(self.operand)

    def logits(self, rows: slice, columns: slice, w: Tensor) -> Tensor:
        """hidden[rows] @ w.T / temperature, (n, v): a view of a buffer, valid until the next call.

        If the logits are kept, the view stays valid.
        """
        buffer = self.scratch
        if self.kept:
            column = columns.start // self.columns[0].stop
            buffer = self.kept[column * len(self.rows) + rows.start // self.height]
        self.tile, self.place = self._tile(buffer, rows, columns), (rows, columns)
        if self.known:
            return self.tile[:, :-1]
        return add_product(
            self.tile[:, :-1], self.hidden[rows], w.t(), scale=1 / self.temperature, keep=False
        )

    def shift(self, z: Tensor, peak: Tensor) -> Tensor:
        """max(z - peak, FLOOR) in the scratch buffer, (n, v); z (n, v) from `logits`, peak (n,)."""
        self.tile = self._tile(self.scratch, *self.place)
        return torch.sub(z, peak[:, None], out=self.tile[:, :-1]).clamp_(min=FLOOR)

    def strike(self, value: float) -> None:
        """Write `value` over the excluded entries of the last tile that was computed."""
        if self.excluded is not None:
            rows, columns = self.place
            width = columns.stop - columns.start
            at = self.excluded[rows] - columns.start
            self.tile.scatter_(1, torch.where((at >= 0) & (at < width), at, width), value)

    def second(self, like: Tensor) -> Tensor:
        """A second scratch tile, shaped like the tile `like`."""
        if self.spare is None:
            self.spare = torch.empty_like(self.scratch)
        return self.spare[: len(like) * self.pitch].view(len(like), self.pitch)[:, : like.shape[1]]

    def _tile(self, buffer: Tensor, rows: slice, columns: slice) -> Tensor:
        height, width = rows.stop - rows.start, columns.stop - columns.start + 1
        return buffer[: height * self.pitch].view(height, self.pitch)[:, :width]


def even_slices(n: int, most: int) -> list[slice]:
    """range(n) in as few slices of at most `most` as possible, of even length, longest first."""
    if n == 0:
        return []
    size = -(-n // -(-n // most))
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def position(target: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Where targets (n,) stand in a tile: (n, 1) column, 0 if outside; (n,) whether inside."""
    at = target - columns.start
    inside = (at >= 0) & (at < columns.stop - columns.start)
    return torch.where(inside, at, 0)[:, None], inside


def add_product(
    total: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, keep: bool = True
) -> Tensor:
    """total = keep * total + scale * a @ b in place, summed in total's dtype; returns total."""
    if a.dtype == total.dtype:
        return total.addmm_(a, b, beta=int(keep), alpha=scale)
    product = torch.mm(a, b, out_dtype=total.dtype)  # CUDA only
    return total.mul_(int(keep)).add_(product, alpha=scale)
