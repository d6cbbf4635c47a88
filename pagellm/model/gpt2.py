"""GPT-2 by hand, with rows for users and items beside the words.

    model = GPT2(SIZES["tiny"], n_words=2057, n_users=2000, n_items=1000)
    hidden = model(ids)                              # (B, T, C), after the last layer norm
    logits = model.item_logits(hidden)               # (B, T, N): against the item rows alone

Published weights can be loaded into the trunk and the word rows (`networks.load_published`); user
and item rows are not part of any published model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pagellm.model.backbone import Backbone, KVCache

__all__ = ["GPT2", "SIZES", "Shape"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a GPT-2: layers, heads, channels, and tokens of the context.

    n_inner  width inside the MLP; 0: 4 n_embd
    eps      added to the variance in the norms
    tied     words are scored against their input rows; False: against rows of their own
    """

    n_layer: int
    n_head: int
    n_embd: int
    n_ctx: int
    n_inner: int = 0
    eps: float = 1e-5
    tied: bool = True

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")

    @property
    def n_kv_head(self) -> int:
        return self.n_head

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


SIZES = {
    "nano": Shape(2, 2, 32, 256),
    "tiny": Shape(2, 4, 64, 256),
    "mini": Shape(2, 4, 128, 512),
    "wide": Shape(2, 4, 256, 512),
    "wider": Shape(2, 8, 512, 512),
    "small": Shape(4, 4, 256, 512),
    "gpt2": Shape(12, 12, 768, 1024),
    "gpt2-medium": Shape(24, 16, 1024, 1024),
    "gpt2-large": Shape(36, 20, 1280, 1024),
    "gpt2-xl": Shape(48, 25, 1600, 1024),
}


class Attention(nn.Module):
    """Causal self-attention; one matrix makes queries, keys and values."""

    def __init__(self, shape: Shape, dropout: float):
        super().__init__()
        self.n_head, self.p = shape.n_head, dropout
        self.c_attn = nn.Linear(shape.n_embd, 3 * shape.n_embd)
        self.c_proj = nn.Linear(shape.n_embd, shape.n_embd)
        self.drop = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, allowed: Tensor | None, cache: KVCache | None, layer: int, first: int = 0
    ) -> Tensor:
        """x (B, T, C) -> (B, T - first, C): what the columns from `first` on see."""
        B, T, C = x.shape
        # each (B, H, T, D)
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        p = self.p if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q[:, :, first:], k, v, attn_mask=allowed, dropout_p=p, is_causal=allowed is None
        )
        return self.drop(self.c_proj(y.transpose(1, 2).reshape(B, T - first, C)))


class MLP(nn.Module):
    """Two layers with GELU, as a rule four times as wide inside."""

    def __init__(self, shape: Shape, dropout: float):
        super().__init__()
        inner = shape.n_inner or 4 * shape.n_embd
        self.c_fc = nn.Linear(shape.n_embd, inner)
        self.c_proj = nn.Linear(inner, shape.n_embd)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: Shape, dropout: float):
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.n_embd, eps=shape.eps)
        self.attn = Attention(shape, dropout)
        self.ln_2 = nn.LayerNorm(shape.n_embd, eps=shape.eps)
        self.mlp = MLP(shape, dropout)

    def forward(
        self, x: Tensor, allowed: Tensor | None, cache: KVCache | None, layer: int, first: int = 0
    ) -> Tensor:
        x = x[:, first:] + self.attn(self.ln_1(x), allowed, cache, layer, first)
        return x + self.mlp(self.ln_2(x))


class GPT2(Backbone):
    """Learnt positions, layer norm, one matrix for queries, keys and values.

    Source: Radford et al., 2019.
    """

    KIND = "gpt2"
    RESIDUAL = ("c_proj",)
    TARGETS = {
        "q": ("attn.c_attn", 0, 3),
        "k": ("attn.c_attn", 1, 3),
        "v": ("attn.c_attn", 2, 3),
        "o": ("attn.c_proj", 0, 1),
        "up": ("mlp.c_fc", 0, 1),
        "down": ("mlp.c_proj", 0, 1),
    }
    PREFIX = "transformer."
    TRANSPOSED = (
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    )
    UNUSED = (".attn.bias", ".attn.masked_bias")

    def __init__(
        self,
        shape: Shape,
        n_words: int,
        n_users: int,
        n_items: int,
        dropout: float = 0.1,
        generator: torch.Generator | None = None,
    ):
        super().__init__(shape, n_words, n_users, n_items)
        self.wpe = nn.Parameter(torch.empty(shape.n_ctx, shape.n_embd))
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(Block(shape, dropout) for _ in range(shape.n_layer))
        self.ln_f = nn.LayerNorm(shape.n_embd, eps=shape.eps)
        self.reset(generator)

    def enter(self, rows: Tensor, position: Tensor) -> tuple[Tensor, tuple]:
        return self.drop(rows + F.embedding(position, self.wpe)), ()

    @torch.no_grad()
    def pool(self, loud: float = 1e-4) -> None:
        """Start from a network whose state before every slot is nearly the history's mean item row.

        In the first block, values and their projection are the identity, and queries and keys are
        random, so that attention averages its inputs. All later projections into the residual
        stream are 0. Words, special tokens and positions are scaled to a standard deviation of
        `loud`, far below that of the items. Items placed on the page are gated off (`add_gate`).
        Item logits are then the history's mean row times the item rows: the scores of the
        factorisation that the rows come from. Training goes on from there.
        """
        C = self.shape.n_embd
        blocks = [block for block in self.h if isinstance(block, Block)]
        first = blocks[0].attn
        for block in blocks:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
        first.c_attn.weight[2 * C :] = torch.eye(C)
        first.c_proj.weight.copy_(torch.eye(C))
        for rows in (self.word, self.wpe):
            rows.mul_(loud / rows.std())
        self.add_gate()

    @staticmethod
    def published_name(name: str) -> str:
        return {"word": "wte.weight", "wpe": "wpe.weight"}.get(name, name)

    @staticmethod
    def published_config(shape: Shape) -> dict:
        return {
            "model_type": "gpt2",
            "n_layer": shape.n_layer,
            "n_head": shape.n_head,
            "n_embd": shape.n_embd,
            "n_positions": shape.n_ctx,
            "n_inner": shape.n_inner or None,
            "layer_norm_epsilon": shape.eps,
            "activation_function": "gelu_new",
            "tie_word_embeddings": shape.tied,
        }
