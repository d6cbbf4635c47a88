"""GPT-2 by hand, with rows for users and items beside the words (SPEC 3).

    model = GPT2(SIZES["tiny"], n_words=2057, n_users=2000, n_items=1000)
    hidden = model(ids)                              # (B, T, C), after the last layer norm
    logits = model.item_logits(hidden)               # (B, T, N): item rows only, tied to the item embedding

Published GPT-2 weights drop into the trunk and the word rows (`load_published`); user and item rows are ours.
"""

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pagellm import dist
from pagellm.config import PageLLMError
from pagellm.run import load_model_file

__all__ = ["GPT2", "SIZES", "KVCache", "Shape", "from_state", "load_published", "to_state"]


@dataclass(frozen=True)
class Shape:
    n_layer: int
    n_head: int
    n_embd: int
    n_ctx: int

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")


SIZES = {
    "nano": Shape(2, 2, 32, 256),
    "tiny": Shape(2, 4, 64, 256),
    "mini": Shape(2, 4, 128, 512),
    "small": Shape(4, 4, 256, 512),
    "gpt2": Shape(12, 12, 768, 1024),
    "gpt2-medium": Shape(24, 16, 1024, 1024),
    "gpt2-large": Shape(36, 20, 1280, 1024),
    "gpt2-xl": Shape(48, 25, 1600, 1024),
}


class KVCache:
    """Keys and values of every layer, in buffers made once: (B, H, room, D). Only for inference."""

    def __init__(self, shape: Shape, batch: int, room: int, like: Tensor):
        size = (batch, shape.n_head, room, shape.n_embd // shape.n_head)
        self.keys = [like.new_empty(size) for _ in range(shape.n_layer)]
        self.values = [like.new_empty(size) for _ in range(shape.n_layer)]
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new columns of one layer; return all columns so far. k, v (B, H, T, D)."""
        end = self.length + k.shape[2]
        if end > self.keys[layer].shape[2]:
            raise ValueError(f"KVCache: {end} columns do not fit in {self.keys[layer].shape[2]}")
        self.keys[layer][:, :, self.length:end] = k
        self.values[layer][:, :, self.length:end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep (and repeat) these rows of the batch: beams move, samples of one prompt share its columns."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]


class Attention(nn.Module):
    def __init__(self, shape: Shape, dropout: float):
        super().__init__()
        self.n_head, self.p = shape.n_head, dropout
        self.c_attn = nn.Linear(shape.n_embd, 3 * shape.n_embd)
        self.c_proj = nn.Linear(shape.n_embd, shape.n_embd)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, allowed: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)   # each (B, H, T, D)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        p = self.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=p, is_causal=allowed is None)
        return self.drop(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, shape: Shape, dropout: float):
        super().__init__()
        self.c_fc = nn.Linear(shape.n_embd, 4 * shape.n_embd)
        self.c_proj = nn.Linear(4 * shape.n_embd, shape.n_embd)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: Shape, dropout: float):
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.n_embd, eps=1e-5)
        self.attn = Attention(shape, dropout)
        self.ln_2 = nn.LayerNorm(shape.n_embd, eps=1e-5)
        self.mlp = MLP(shape, dropout)

    def forward(self, x: Tensor, allowed: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        x = x + self.attn(self.ln_1(x), allowed, cache, layer)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """The trunk and three tables of rows: words and specials, users, items, in one id space.

    n_words counts words and specials together; ids n_words.. are users, then items (vocab.Vocab has the map).
    bf16 (attribute, False)  the blocks' matrix products and attention read bfloat16 and sum in float32. Weights, what
    is added up along the blocks, the norms and both softmax heads stay float32, and so does decoding with a cache.
    lazy (attribute, False)  gradients of user and item rows are sparse: only the rows that were read (train.RowAdamW)
    """

    bf16 = lazy = False

    def __init__(self, shape: Shape, n_words: int, n_users: int, n_items: int, dropout: float = 0.1,
                 generator: torch.Generator | None = None):
        super().__init__()
        self.shape = shape
        self.n_words, self.n_users, self.n_items = n_words, n_users, n_items
        C = shape.n_embd
        self.word = nn.Parameter(torch.empty(n_words, C))
        self.user = nn.Parameter(torch.empty(n_users, C))
        self.item = nn.Parameter(torch.empty(n_items, C))
        self.wpe = nn.Parameter(torch.empty(shape.n_ctx, C))
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(Block(shape, dropout) for _ in range(shape.n_layer))
        self.ln_f = nn.LayerNorm(C, eps=1e-5)
        self.reset(generator)

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """GPT-2's initialisation: normal 0.02; projections back into the residual scaled by 1/sqrt(2 layers)."""
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
            elif ".ln_" in f".{name}":
                weight.fill_(1.0)
            else:
                std = 0.02 / math.sqrt(2 * self.shape.n_layer) if "c_proj" in name else 0.02
                weight.normal_(0.0, std, generator=generator)

    def embed(self, ids: Tensor) -> Tensor:
        """ids (...) -> rows (..., C). Three gathers and two selections: the tables are never joined in memory."""
        user, item = ids - self.n_words, ids - self.n_words - self.n_users
        rows = F.embedding(ids.clamp(max=self.n_words - 1), self.word)
        if self.n_users:
            known = F.embedding(user.clamp(0, self.n_users - 1), self.user, sparse=self.lazy)
            rows = torch.where((user >= 0)[..., None], known, rows)
        if self.n_items:
            known = self.item_rows(item.clamp(0, self.n_items - 1))
            rows = torch.where((item >= 0)[..., None], known, rows)
        return rows

    def item_rows(self, item: Tensor) -> Tensor:
        """Dense item ids (...) in 0..N-1 -> their rows (..., C)."""
        return F.embedding(item, self.item, sparse=self.lazy)

    def forward(self, ids: Tensor, valid: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Hidden states after the last layer norm.

        ids     (B, T) int64
        valid   (B, S) bool, S = cache.length + T: False on padding, left or right; None: no padding on the left.
                Positions count valid tokens only, so a left-padded row equals the row alone.
        cache   columns already computed; the new ones are added
        returns (B, T, C)

        Without `valid` and cache the causal mask alone is used, and padding on the right is harmless: no kept
        token can see it.
        """
        B, T = ids.shape
        past = cache.length if cache is not None else 0
        if past + T > self.shape.n_ctx:
            raise ValueError(f"{past + T} tokens do not fit in a context of {self.shape.n_ctx}")
        if valid is None:
            position = torch.arange(past, past + T, device=ids.device).expand(B, T)
        else:
            position = (valid.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        x = self.drop(self.embed(ids) + F.embedding(position, self.wpe))
        allowed = attention_mask(valid, past, T, ids.device)
        low = self.bf16 and cache is None
        with torch.autocast(x.device.type, torch.bfloat16) if low else nullcontext():
            for layer, block in enumerate(self.h):
                x = block(x, allowed, cache, layer)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def item_logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., N) in float32, against the item rows only."""
        return hidden.float() @ self.item.float().T

    def word_logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., n_words) in float32, against words and specials."""
        return hidden.float() @ self.word.float().T


def attention_mask(valid: Tensor | None, past: int, T: int, device) -> Tensor | None:
    """(B or 1, 1, T, S) bool, True where a query may look; None where plain causal attention does."""
    if valid is None and past == 0:
        return None
    S = past + T
    query = torch.arange(past, S, device=device)[:, None]
    key = torch.arange(S, device=device)[None, :]
    allowed = (key <= query)[None, None]
    if valid is None:
        return allowed
    # A padding query sees itself, so that its softmax is not empty; nobody reads its output.
    return allowed & (valid[:, None, None, :] | (key == query)[None, None])


def to_state(model: GPT2) -> dict:
    """Plain values and whole tensors that `from_state` turns back into the model. Ask on every process."""
    return {"shape": asdict(model.shape), "rows": [model.n_words, model.n_users, model.n_items],
            "weights": dist.weights(model)}


def from_state(state: dict, dropout: float = 0.0) -> GPT2:
    model = GPT2(Shape(**state["shape"]), *state["rows"], dropout=dropout)
    model.load_state_dict(state["weights"])
    return model


TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def read_weights(source: str | Path) -> dict[str, Tensor]:
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).exists()]
        if not found:
            raise PageLLMError(f"no GPT-2 weights in {path}; want model.safetensors or pytorch_model.bin")
        path = found[0]
    if not path.exists():
        try:
            from huggingface_hub import hf_hub_download
        except ImportError:
            raise PageLLMError(f"{source} is no file here; to fetch it from the hub: pip install 'pagellm[hub]'"
                               ) from None
        try:
            path = Path(hf_hub_download(str(source), "model.safetensors"))
        except Exception as error:
            raise PageLLMError(f"could not fetch {source} from the hub ({type(error).__name__}); put "
                               "model.safetensors somewhere and name its path") from error
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise PageLLMError(f"reading {path} needs: pip install 'pagellm[hub]'") from None
        return load_file(path)
    return load_model_file(path)


@torch.no_grad()
def load_published(model: GPT2, source: str | Path) -> None:
    """Copy published GPT-2 weights into the trunk and the first word rows; specials, users, items stay.

    source  a directory or file (.safetensors, .bin) or a name on the hub, e.g. "gpt2"
    Raises PageLLMError if a weight is missing, unknown, or of another shape.
    """
    weights = {name.removeprefix("transformer."): w for name, w in read_weights(source).items()}
    weights = {name: w for name, w in weights.items()
               if not name.endswith((".attn.bias", ".attn.masked_bias")) and name != "lm_head.weight"}
    ours = {"wpe.weight": model.wpe, **{name: p for name, p in model.named_parameters()
                                        if name.startswith(("h.", "ln_f."))}}
    words = weights.pop("wte.weight", None)
    if words is None or words.shape[1] != model.shape.n_embd or len(words) > model.n_words:
        shape = None if words is None else tuple(words.shape)
        raise PageLLMError(f"{source}: word rows {shape} do not fit {model.n_words} x {model.shape.n_embd}")
    missing, extra = sorted(set(ours) - set(weights)), sorted(set(weights) - set(ours))
    if missing or extra:
        raise PageLLMError(f"{source} is not a GPT-2 of this size: missing {missing[:3]}, unknown {extra[:3]}")
    for name, weight in weights.items():
        # The published layers store (in, out); nn.Linear stores (out, in).
        weight = weight.T if name.endswith(TRANSPOSED) else weight
        if weight.shape != ours[name].shape:
            raise PageLLMError(f"{source}: {name} is {tuple(weight.shape)}, want {tuple(ours[name].shape)}")
        ours[name].copy_(weight)
    model.word[: len(words)].copy_(words)
