"""Llama 3.2 by hand, with rows for users and items: the other backbone of the paper's Table 3.

    model = Llama(SIZES["llama-tiny"], n_words=2057, n_users=2000, n_items=1000)

It has root mean square norms, rotary positions with Llama 3's scaling, grouped-query attention,
SwiGLU, no biases, and tied embeddings. Options of its shape make it Qwen2 (biases of queries, keys
and values) or Qwen3 (norms of queries and keys). Its methods are those of backbone.Backbone, as
GPT-2's are. Published weights can be loaded from one file or from shards
(`networks.load_published`).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pagellm.model.backbone import Backbone, KVCache

__all__ = ["LLAMA3", "Llama", "RMSNorm", "SIZES", "Shape", "frequencies", "rotate"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama.

    n_head      heads of queries
    n_kv_head   heads of keys and values, each shared by n_head / n_kv_head heads of queries
    n_hidden    width inside the MLP
    theta       base of the rotary frequencies
    scaling     as in `frequencies`; None: no scaling
    eps         added to the mean square in the norms
    n_head_dim  width of a head; 0: n_embd / n_head
    qkv_bias, o_bias, mlp_bias   biases of queries, keys and values, of attention's output, of the
                MLP's three matrices
    qk_norm     norms of queries and keys, a head at a time, before they are rotated
    tied        words are scored against their input rows; False: against rows of their own
    """

    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    n_hidden: int
    n_ctx: int
    theta: float = 10_000.0
    scaling: tuple[float, ...] | None = None
    eps: float = 1e-5
    n_head_dim: int = 0
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = True

    def __post_init__(self):
        whole = bool(self.n_head_dim) or self.n_embd % self.n_head == 0
        if not whole or self.n_head % self.n_kv_head or self.head_dim % 2:
            raise ValueError(
                f"n_embd={self.n_embd}, n_head={self.n_head}, n_kv_head={self.n_kv_head}: want "
                "each a multiple of the next, and an even width of a head"
            )

    @property
    def head_dim(self) -> int:
        return self.n_head_dim or self.n_embd // self.n_head

    @property
    def kind(self) -> str:
        """The model_type under which such a network is published."""
        if self.qk_norm:
            return "qwen3"
        return "qwen2" if self.qkv_bias and not self.o_bias else "llama"


LLAMA3: dict[str, Any] = {"theta": 500_000.0, "scaling": (32.0, 1.0, 4.0, 8192)}

SIZES = {
    "llama-nano": Shape(2, 2, 1, 32, 88, 256),
    # n_hidden is about 8/3 C, so that the MLP has as many parameters as GPT-2's
    "llama-tiny": Shape(2, 4, 2, 64, 176, 256),
    "llama-mini": Shape(2, 4, 2, 128, 344, 512),
    "llama-small": Shape(4, 4, 2, 256, 688, 512),
    "llama-3.2-1b": Shape(16, 32, 8, 2048, 8192, 131_072, **LLAMA3),
    "llama-3.2-3b": Shape(28, 24, 8, 3072, 8192, 131_072, **LLAMA3),
}


def frequencies(head_dim: int, theta: float, scaling: tuple[float, ...] | None = None) -> Tensor:
    """Radians a position of each pair of channels, (D / 2,) float32: theta^(-2 i / D).

    scaling  (factor,): all waves are slowed by factor
             (factor, low, high, original): waves longer than original / low are slowed by factor,
             waves shorter than original / high stay, those between are blended

    Source: the Llama 3.1 release.
    """
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if scaling is None:
        return plain
    if len(scaling) == 1:
        return plain / scaling[0]
    factor, low, high, original = scaling
    turns = original * plain / (2 * math.pi)  # of each wave over the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * plain + (1 - keep) * plain / factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (i, i + D / 2) of x (B, H, T, D) by angles; cos, sin (B, 1, T, D / 2)."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, times a weight a channel."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (
            wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        ).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; several heads of queries share one of keys."""

    def __init__(self, shape: Shape, dropout: float):
        super().__init__()
        self.groups, self.head_dim, self.p = (
            shape.n_head // shape.n_kv_head,
            shape.head_dim,
            dropout,
        )
        C, D = shape.n_embd, shape.head_dim
        wide, narrow = shape.n_head * D, shape.n_kv_head * D
        self.q_proj = nn.Linear(C, wide, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(C, narrow, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(C, narrow, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(wide, C, bias=shape.o_bias)
        self.q_norm = RMSNorm(D, shape.eps) if shape.qk_norm else None
        self.k_norm = RMSNorm(D, shape.eps) if shape.qk_norm else None
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        allowed: Tensor | None,
        cache: KVCache | None,
        layer: int,
        cos: Tensor,
        sin: Tensor,
        first: int = 0,
    ) -> Tensor:
        """x (B, T, C) -> (B, T - first, C): what the columns from `first` on see."""
        B, T, _ = x.shape
        q, k, v = (
            of(z).view(B, z.shape[1], -1, self.head_dim).transpose(1, 2)
            for of, z in ((self.q_proj, x[:, first:]), (self.k_proj, x), (self.v_proj, x))
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos[:, :, first:], sin[:, :, first:]), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        # The fast attention kernels want a head of keys for each head of queries.
        k, v = (z.repeat_interleave(self.groups, dim=1) for z in (k, v))
        p = self.p if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, dropout_p=p, is_causal=allowed is None
        )
        return self.drop(self.o_proj(y.transpose(1, 2).reshape(B, T - first, -1)))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, shape: Shape, dropout: float):
        super().__init__()
        bias = shape.mlp_bias
        self.gate_proj = nn.Linear(shape.n_embd, shape.n_hidden, bias=bias)
        self.up_proj = nn.Linear(shape.n_embd, shape.n_hidden, bias=bias)
        self.down_proj = nn.Linear(shape.n_hidden, shape.n_embd, bias=bias)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: Shape, dropout: float):
        super().__init__()
        self.ln_1 = RMSNorm(shape.n_embd, shape.eps)
        self.attn = Attention(shape, dropout)
        self.ln_2 = RMSNorm(shape.n_embd, shape.eps)
        self.mlp = MLP(shape, dropout)

    def forward(
        self,
        x: Tensor,
        allowed: Tensor | None,
        cache: KVCache | None,
        layer: int,
        cos: Tensor,
        sin: Tensor,
        first: int = 0,
    ) -> Tensor:
        x = x[:, first:] + self.attn(self.ln_1(x), allowed, cache, layer, cos, sin, first)
        return x + self.mlp(self.ln_2(x))


PUBLISHED = {"word": "embed_tokens.weight", "ln_f.weight": "norm.weight"}
INSIDE = {"attn.": "self_attn.", "ln_1.": "input_layernorm.", "ln_2.": "post_attention_layernorm."}


class Llama(Backbone):
    """The published models were trained without dropout. Ours stands where GPT-2 has it."""

    KIND = "llama"
    RESIDUAL = ("o_proj", "down_proj")
    TARGETS = {name: (f"attn.{name}_proj", 0, 1) for name in ("q", "k", "v", "o")} | {
        name: (f"mlp.{name}_proj", 0, 1) for name in ("gate", "up", "down")
    }
    PREFIX = "model."
    UNUSED = ("rotary_emb.inv_freq",)

    frequency: Tensor

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
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(Block(shape, dropout) for _ in range(shape.n_layer))
        self.ln_f = RMSNorm(shape.n_embd, shape.eps)
        self.register_buffer(
            "frequency", frequencies(shape.head_dim, shape.theta, shape.scaling), persistent=False
        )
        self.reset(generator)

    def enter(self, rows: Tensor, position: Tensor) -> tuple[Tensor, tuple]:
        angle = position[:, None, :, None].float() * self.frequency.float()  # (B, 1, T, D / 2)
        return self.drop(rows), (angle.cos(), angle.sin())

    @staticmethod
    def published_name(name: str) -> str:
        name = PUBLISHED.get(name, name)
        if name.startswith("h."):
            name = "layers" + name[1:]
        for ours, theirs in INSIDE.items():
            name = name.replace(f".{ours}", f".{theirs}")
        return name

    @staticmethod
    def published_config(shape: Shape) -> dict:
        scaling: dict[str, Any] | None = None
        if shape.scaling is not None and len(shape.scaling) == 1:
            scaling = {"rope_type": "linear", "factor": shape.scaling[0]}
        elif shape.scaling is not None:
            names = (
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            )
            scaling = {"rope_type": "llama3", **dict(zip(names, shape.scaling, strict=True))}
        return {
            "model_type": shape.kind,
            "num_hidden_layers": shape.n_layer,
            "num_attention_heads": shape.n_head,
            "num_key_value_heads": shape.n_kv_head,
            "hidden_size": shape.n_embd,
            "head_dim": shape.head_dim,
            "intermediate_size": shape.n_hidden,
            "max_position_embeddings": shape.n_ctx,
            "rope_theta": shape.theta,
            "rope_scaling": scaling,
            "rms_norm_eps": shape.eps,
            "hidden_act": "silu",
            "attention_bias": shape.qkv_bias,
            "mlp_bias": shape.mlp_bias,
            "tie_word_embeddings": shape.tied,
        }
