"""What every backbone offers: rows for words, users and items, one forward pass, item logits.

    hidden = model(ids, valid, cache)                # (B, T, C), after the last norm
    logits = model.item_logits(hidden)               # (B, T, N): against the item rows alone

The item rows are both the input embedding and the output matrix (tied), unless `untie` has made
output rows beside them. While SFT trains, item rows may be fused with contents (`fuse`).
`gpt2.GPT2` and `llama.Llama` are the two backbones; `networks` makes either from the name of a
size, from a saved state, or from published weights.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pagellm.kernels.parallel import Parts, all_logits, averaged, lookup

__all__ = ["Backbone", "KVCache", "attention_mask"]


class KVCache:
    """Keys and values of every layer, for inference: (B, H, room, D), H heads of keys.

    shape  of the backbone        like  a tensor whose type and device the buffers have
    room   columns that fit       length  columns that are filled
    """

    def __init__(self, shape, batch: int, room: int, like: Tensor):
        size = (batch, shape.n_kv_head, room, shape.head_dim)
        self.keys = [like.new_empty(size) for _ in range(shape.n_layer)]
        self.values = [like.new_empty(size) for _ in range(shape.n_layer)]
        self.length = 0
        # sum (B, C) and number (B, 1) of the history's rows so far, for Backbone.add_pool
        self.pooled: tuple[Tensor, Tensor] | None = None

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new columns k, v (B, H, T, D) of one layer; return all columns so far.

        Raises ValueError if they do not fit.
        """
        end = self.length + k.shape[2]
        if end > self.keys[layer].shape[2]:
            raise ValueError(f"KVCache: {end} columns do not fit in {self.keys[layer].shape[2]}")
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order; a row may be repeated.

        Beams need that when they move, and several pages of one prompt when they share its columns.
        """
        if self.pooled is not None:
            self.pooled = (self.pooled[0][rows], self.pooled[1][rows])
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]


class Backbone(nn.Module):
    """Tables of word, user and item rows in one id space, and the transformer blocks `h`.

    n_words counts words and special tokens together; ids from n_words on are users, then items
    (vocab.Vocab). A trunk (GPT2, Llama) sets the constants below, makes `drop`, `h` and `ln_f`,
    calls `reset`, and defines `enter`.

    bf16  (attribute, False) the blocks' matrix products and attention take bfloat16 and sum in
          float32. Weights, the residual stream, norms and both softmax heads stay float32, and so
          does decoding with a cache
    lazy  (attribute, False) gradients of user and item rows are sparse: they hold only the rows
          that were read (train.RowAdamW)
    """

    bf16 = lazy = False

    KIND = ""  # name in a saved state
    RESIDUAL: tuple[str, ...] = ()  # names of the projections back into the residual stream
    # LoRA target -> module in a block, which of its equal parts, how many parts it has
    TARGETS: dict[str, tuple[str, int, int]] = {}
    PREFIX = ""  # of all names in a published file but lm_head
    TRANSPOSED: tuple[str, ...] = ()  # ends of names that published files store as (in, out)
    UNUSED: tuple[str, ...] = ()  # ends of names in published files that are no weights

    h: nn.ModuleList
    ln_f: nn.Module
    word_out: nn.Parameter | None
    special: nn.Parameter | None
    gate: nn.Parameter | None
    blend: nn.Parameter | None
    item_out: nn.Parameter | None
    content_map: nn.Parameter | None
    fallback: nn.Parameter | None
    content: Tensor | None
    cold: Tensor | None
    id_dropout = 0.0
    # Whether the trunk was published, and trained without dropout: it then never has any.
    without_dropout = False

    def __init__(self, shape, n_words: int, n_users: int, n_items: int):
        super().__init__()
        self.shape = shape
        self.n_words, self.n_users, self.n_items = n_words, n_users, n_items
        self.word = nn.Parameter(torch.empty(n_words, shape.n_embd))
        # rows that words and special tokens are scored against; None: `word` itself
        self.register_parameter(
            "word_out", None if shape.tied else nn.Parameter(torch.empty(n_words, shape.n_embd))
        )
        # the last rows of `word`, once these are frozen (lora.adapt)
        self.register_parameter("special", None)
        self.user = nn.Parameter(torch.empty(n_users, shape.n_embd))
        self.item = nn.Parameter(torch.empty(n_items, shape.n_embd))
        # rows that items are scored against (`untie`); None: `item` itself
        self.register_parameter("item_out", None)
        # map of contents to rows, and the row for a missing id (`fuse`); None: ids alone
        self.register_parameter("content_map", None)
        self.register_parameter("fallback", None)
        self.register_buffer("content", None, persistent=False)
        self.register_buffer("cold", None, persistent=False)
        # factor on the rows of items on the page (`add_gate`); None: 1
        self.register_parameter("gate", None)
        # shares of the trunk's state and of the pooled history (`add_pool`); None: the state alone
        self.register_parameter("blend", None)
        self.lora: dict | None = None  # what lora.adapt was called with
        # how user and item rows are divided among processes (`cut`); None: all are here
        self.parts: tuple[Parts, Parts] | None = None
        # the backward pass computes each block again instead of keeping its activations
        self.checkpoint_blocks = False

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """GPT-2's initialisation: normal with standard deviation 0.02.

        Projections back into the residual stream are scaled by 1 / sqrt(2 layers).
        """
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
            elif weight.ndim == 1:  # norms
                weight.fill_(1.0)
            else:
                residual = any(part in name for part in self.RESIDUAL)
                std = 0.02 / math.sqrt(2 * self.shape.n_layer) if residual else 0.02
                weight.normal_(0.0, std, generator=generator)

    def embed(self, ids: Tensor) -> Tensor:
        """ids (...) -> rows (..., C).

        Each table is read by itself, so that the tables are never joined in memory.
        """
        user, item = ids - self.n_words, ids - self.n_words - self.n_users
        rows = F.embedding(ids.clamp(max=len(self.word) - 1), self.word)
        if self.special is not None:
            special = ids - len(self.word)
            known = F.embedding(special.clamp(0, len(self.special) - 1), self.special)
            rows = torch.where((special >= 0)[..., None], known, rows)
        if self.n_users:
            known = self.look_up(self.user, user.clamp(0, self.n_users - 1))
            rows = torch.where((user >= 0)[..., None], known, rows)
        if self.n_items:
            known = self.item_rows(item.clamp(0, self.n_items - 1))
            rows = torch.where((item >= 0)[..., None], known, rows)
        return rows

    @torch.no_grad()
    def cut(self) -> None:
        """Keep this process's user and item rows only, for good (kernels/parallel.py).

        All processes must then make the same calls, in the same order. Call it once the network is
        whole and before its optimiser is made.
        """
        self.parts = Parts(self.n_users), Parts(self.n_items)
        for name in ("user", "item", "item_out"):
            if (whole := getattr(self, name)) is not None:
                parts = self.parts[name != "user"]
                own = nn.Parameter(whole[parts.first : parts.last].clone(), whole.requires_grad)
                own.parts = parts  # type: ignore[attr-defined]  # for stage/dist.py
                setattr(self, name, own)

    @property
    def item_parts(self) -> Parts | None:
        """How item rows are divided among processes; None: all are here."""
        return self.parts and self.parts[1]

    def look_up(self, table: Tensor, ids: Tensor) -> Tensor:
        """Rows (..., C) of dense ids (...) in a table of users or items, wherever they are."""
        if self.parts is None:
            return F.embedding(ids, table, sparse=self.lazy)
        return lookup(table, ids, self.parts[table is not self.user], self.lazy)

    def item_rows(self, item: Tensor) -> Tensor:
        """Dense item ids (...) in 0..N-1 -> their rows (..., C)."""
        return self.fused(self.look_up(self.item, item), item)

    def fused(self, rows: Tensor, item: Tensor) -> Tensor:
        """Id rows (..., C) of items (...), with their contents where these are read (`fuse`)."""
        if (
            self.content_map is None
            or self.content is None
            or self.fallback is None
            or self.cold is None
        ):
            return rows
        gone = self.cold[item]
        if self.training and self.id_dropout:
            gone = gone | (torch.rand(item.shape, device=item.device) < self.id_dropout)
        return torch.where(gone[..., None], self.fallback, rows) + (
            F.embedding(item, self.content) @ self.content_map
        )

    def scored_items(self) -> Tensor:
        """Rows (N, C) that items are scored against; where they are `cut`, this process's."""
        rows: Tensor = self.item if self.item_out is None else self.item_out
        if (parts := self.item_parts) is not None:
            rows = averaged(rows, parts)
        if self.item_out is not None or self.content_map is None:
            return rows
        return self.fused(rows, self.own_items())

    def own_items(self) -> Tensor:
        """Ids of the items whose rows this process holds."""
        first, last = (0, self.n_items) if (p := self.item_parts) is None else (p.first, p.last)
        return torch.arange(first, last, device=self.item.device)

    def scored_rows(self, item: Tensor) -> Tensor:
        """Dense item ids (...) in 0..N-1 -> the rows (..., C) that they are scored against."""
        if self.item_out is None:
            return self.item_rows(item)
        return self.look_up(self.item_out, item)

    def untie(self) -> None:
        """Give the output rows of its own, which begin as the item rows are now.

        What an item says of its buyer and what it is worth to somebody are then two rows, as in
        GenPage (arXiv 2606.31031).
        """
        self.item_out = nn.Parameter(self.scored_items().detach().clone())

    def fuse(self, content: Tensor, cold: Tensor, id_dropout: float) -> None:
        """Read an item as its id row plus a linear map of its contents.

        In training the id row is replaced by one row for all, `fallback`, with probability
        id_dropout, and always where `cold`. So the contents learn to stand alone. `bake` ends it.

        content (N, F) float    cold (N,) bool: items that are known by their contents alone
        """
        width = self.item.shape[1]
        self.content, self.cold, self.id_dropout = content.float(), cold, id_dropout
        self.content_map = nn.Parameter(self.item.new_zeros(content.shape[1], width))
        self.fallback = nn.Parameter(self.item.detach().mean(0))

    @torch.no_grad()
    def bake(self) -> None:
        """Write what `item_rows` reads into the item rows, and forget the contents."""
        if self.content_map is None:
            return
        was, self.training = self.training, False
        rows = self.fused(self.item, self.own_items())
        self.training = was
        self.item.copy_(rows)
        self.content = self.cold = self.content_map = self.fallback = None

    def add_gate(self, value: float = 0.0) -> None:
        """Multiply the rows of items on the page by a learnt vector `gate` (C,) when they are read.

        At 0 the states of a page do not depend on the items placed on it.
        """
        self.gate = nn.Parameter(
            torch.full_like(self.item[0], value)
            if self.n_items
            else torch.full((self.shape.n_embd,), value)
        )

    def add_pool(self, trunk: float = 0.0) -> None:
        """Let states be a learnt blend of the trunk's and of the history's mean item row.

        For a trunk that must stay what it is: published, or with fewer keys than channels. It
        begins as the factorisation that the item rows come from, as GPT2.pool does: at a share of 0
        (`trunk`) the first pages are those of the mean row. Training gives the trunk its say.
        """
        like = self.item if self.n_items else self.word
        share = torch.ones_like(like[:1]).repeat(2, 1)
        share[0] = trunk
        self.blend = nn.Parameter(share.detach())
        self.add_gate()

    def blended(
        self,
        hidden: Tensor,
        ids: Tensor,
        valid: Tensor | None = None,
        cache: KVCache | None = None,
        placed: int | None = None,
        first: int = 0,
    ) -> Tensor:
        """blend[0] times the state, plus blend[1] times the mean of the item rows read so far.

        Rows and their mean are scaled to a mean square of 1. Items of the page do not count. A
        state before the first item is the trunk's alone. hidden (B, T - first, C), the rest as in
        `forward`; without `add_pool` the states come back as they are.
        """
        if self.blend is None:
            return hidden
        T, C = ids.shape[1], hidden.shape[-1]
        item = ids - self.n_words - self.n_users
        read = item >= 0
        if placed is not None:
            read = read & (torch.arange(T, device=ids.device) < placed)
        if valid is not None:
            read = read & valid[:, valid.shape[1] - T :]
        rows = F.normalize(self.item_rows(item.clamp(0, max(0, self.n_items - 1))).float(), dim=-1)
        total = torch.where(read[..., None], rows, 0.0).cumsum(1)
        count = read.cumsum(1)[..., None]
        if cache is not None:
            if cache.pooled is not None:
                total = total + cache.pooled[0][:, None]
                count = count + cache.pooled[1][:, None]
            cache.pooled = (total[:, -1], count[:, -1])
        total, count = total[:, first:], count[:, first:]
        pooled = F.normalize(total, dim=-1) * math.sqrt(C)
        return torch.where(count > 0, self.blend[0] * hidden + self.blend[1] * pooled, hidden)

    def read(self, ids: Tensor, placed: int | None) -> Tensor:
        """Rows (B, T, C) of ids (B, T). From column `placed` on they are items of the page."""
        rows = self.embed(ids)
        if placed is None or self.gate is None:
            return rows
        return torch.cat([rows[:, :placed], rows[:, placed:] * self.gate], 1)

    def enter(self, rows: Tensor, position: Tensor) -> tuple[Tensor, tuple]:
        """The input (B, T, C) of the first block, and further arguments for every block.

        rows (B, T, C), position (B, T).
        """
        raise NotImplementedError

    def forward(
        self,
        ids: Tensor,
        valid: Tensor | None = None,
        cache: KVCache | None = None,
        placed: int | None = None,
        first: int = 0,
        plain: bool = False,
    ) -> Tensor:
        """Hidden states after the last norm, blended with the pooled history (`add_pool`).

        ids     (B, T) int64
        valid   (B, S) bool, S = cache.length + T: False on padding, left or right. Positions count
                valid tokens only, so a left-padded row equals the row alone. None: no padding on
                the left; padding on the right is then harmless, since no kept token can see it
        cache   columns already computed; the new ones are added
        placed  column of ids from which on they are items of the page, for `gate`; None: none are
        first   column from which on states are wanted; the last block computes no others
        plain   the trunk's states alone, which words are scored by
        returns (B, T - first, C)

        Raises ValueError if the tokens do not fit in the context.
        """
        B, T = ids.shape
        past = cache.length if cache is not None else 0
        if past + T > self.shape.n_ctx:
            raise ValueError(f"{past + T} tokens do not fit in a context of {self.shape.n_ctx}")
        if valid is None:
            position = torch.arange(past, past + T, device=ids.device).expand(B, T)
        else:
            position = (valid.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        x, more = self.enter(self.read(ids, placed), position)
        allowed = attention_mask(valid, past, T, ids.device)
        recompute = self.checkpoint_blocks and cache is None and torch.is_grad_enabled()
        bf16 = self.bf16 and cache is None
        with torch.autocast(x.device.type, torch.bfloat16) if bf16 else nullcontext():
            for layer, block in enumerate(self.h):
                wanted: dict[str, Any] = {}
                if first and layer == len(self.h) - 1:
                    wanted, allowed = (
                        {"first": first},
                        attention_mask(valid, past, T, ids.device, first),
                    )
                args = (x, allowed, cache, layer, *more)
                # Dropout is drawn again from the same state, so gradients keep every bit.
                x = (
                    checkpoint(block, *args, use_reentrant=False, **wanted)
                    if recompute
                    else block(*args, **wanted)
                )
        if cache is not None:
            cache.length += T
        hidden = self.ln_f(x)
        return hidden if plain else self.blended(hidden, ids, valid, cache, placed, first)

    def item_logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., N) in float32, against the item rows only."""
        if (parts := self.item_parts) is not None:
            return all_logits(hidden.float(), self.scored_items().float(), parts)
        return hidden.float() @ self.scored_items().float().T

    def word_logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., n_words) in float32, against words and special tokens."""
        return hidden.float() @ self.scored_words().float().T

    def scored_words(self) -> Tensor:
        """Rows (n_words, C) that words and special tokens are scored against."""
        if self.word_out is not None:
            return self.word_out
        return self.word if self.special is None else torch.cat([self.word, self.special])

    @staticmethod
    def published_name(name: str) -> str:
        """What a published file calls a parameter of ours, without PREFIX."""
        raise NotImplementedError

    @staticmethod
    def published_config(shape) -> dict:
        """Fields of a published config.json and the values they must have for this shape."""
        raise NotImplementedError


def attention_mask(
    valid: Tensor | None, past: int, T: int, device, first: int = 0
) -> Tensor | None:
    """(B or 1, 1, T - first, S) bool, True where a query may look.

    None where the plain causal mask is enough.
    """
    if valid is None and past == first == 0:
        return None
    S = past + T
    query = torch.arange(past + first, S, device=device)[:, None]
    key = torch.arange(S, device=device)[None, :]
    allowed = (key <= query)[None, None]
    if valid is None:
        return allowed
    # A padding query sees itself, so that its softmax is not empty; nobody reads its output.
    return allowed & (valid[:, None, None, :] | (key == query)[None, None])
