"""Low-rank adapters by hand: the published trunk is frozen, small matrices beside it learn.

    adapt(model, rank=8, alpha=16.0, targets="q,v", n_specials=9)
    merge(model)            # for inference at the speed of the trunk alone
    unmerge(model)          # back to the same bits

W x becomes W x + (alpha / rank) B A x with A (rank, in) random and B (out, rank) zero, so a new
adapter changes nothing. Trunk and words are frozen. What no published model knows learns: special
tokens, user rows and item rows. Source: Hu et al., arXiv 2106.09685.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pagellm.model.backbone import Backbone
from pagellm.stage.config import PageLLMError
from pagellm.stage.hints import nearest

__all__ = [
    "LowRank",
    "adapt",
    "counts",
    "is_merged",
    "learns",
    "merge",
    "parse_targets",
    "unmerge",
]


class LowRank(nn.Module):
    """A linear layer with an adapter on some of the equal parts of its output.

    GPT-2 has queries, keys and values in one matrix; these are its parts.

    parts  which parts have an adapter      of  how many parts there are
    """

    def __init__(self, linear: nn.Linear, parts: tuple[int, ...], of: int, rank: int, alpha: float):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.of, self.scale = of, alpha / rank
        wide, narrow = self.weight.shape[1], self.weight.shape[0] // of
        like: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.lora_a = nn.Parameter(torch.randn(len(parts), rank, wide, **like) / math.sqrt(wide))
        self.lora_b = nn.Parameter(torch.zeros(len(parts), narrow, rank, **like))
        self.register_buffer(
            "parts", torch.tensor(parts, device=self.weight.device), persistent=False
        )
        self.kept: Tensor | None = None  # the weight without its adapter, while they are merged

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.kept is not None:
            return y
        # (..., parts, rank)
        low = F.linear(x, self.lora_a.flatten(0, 1)).unflatten(-1, self.lora_a.shape[:2])
        more = torch.einsum("...pr,por->...po", low, self.lora_b) * self.scale
        return (
            y.unflatten(-1, (self.of, -1)).index_add(-2, self.parts, more.to(y.dtype)).flatten(-2)
        )

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter to the matrix; a copy of the matrix is kept."""
        if self.kept is None:
            self.kept = self.weight.detach().clone()
            self.weight.unflatten(0, (self.of, -1)).index_add_(
                0, self.parts, self.lora_b @ self.lora_a * self.scale
            )

    @torch.no_grad()
    def unmerge(self) -> None:
        """The matrix as it was, to the last bit."""
        if self.kept is not None:
            self.weight.copy_(self.kept)  # subtracting would leave rounding behind
            self.kept = None


def learns(name: str) -> bool:
    """Whether a parameter or buffer of an adapted model learns, by its name in a saved state."""
    return ".lora_" in name or name in (
        "user",
        "item",
        "item_out",
        "special",
        "gate",
        "blend",
    )


def parse_targets(text: str, known: dict) -> list[str]:
    """ "q,v" -> ["q", "v"].

    Raises PageLLMError for a name that is not in `known`, a repeated name, and no name at all.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            near = nearest(name, known)
            hint = f"; did you mean {near}?" if near else ""
            raise PageLLMError(
                f"lora_targets={text!r}: no {name!r} in this backbone{hint} "
                f"(it has {','.join(known)})"
            )
    if not names or len(set(names)) < len(names):
        raise PageLLMError(f"lora_targets={text!r}: want some of {','.join(known)}, each once")
    return names


def adapt(model: Backbone, rank: int, alpha: float, targets: str, n_specials: int) -> None:
    """Freeze trunk and words of a model and put adapters beside `targets` in every block.

    targets     comma-separated names from model.TARGETS
    n_specials  the last rows of `word`; they become `special` and learn, as user and item rows do
    A is drawn from torch's global generator. Raises PageLLMError for an unknown target and for a
    rank that is not below both sides of a matrix that it adapts.
    """
    if model.lora is not None:
        raise ValueError("adapt: this model has adapters already")
    of: dict[str, list[str]] = {}
    for name in parse_targets(targets, model.TARGETS):
        of.setdefault(model.TARGETS[name][0], []).append(name)
    model.requires_grad_(False)
    word = model.word.detach()
    if n_specials:
        model.word = nn.Parameter(word[:-n_specials].clone(), requires_grad=False)
        model.special = nn.Parameter(word[-n_specials:].clone())
    for block in model.h:
        for path, names in of.items():
            folder, last = path.split(".")
            linear, pieces = getattr(getattr(block, folder), last), model.TARGETS[names[0]][2]
            if rank >= min(linear.in_features, linear.out_features // pieces):
                raise PageLLMError(
                    f"lora_rank={rank}: {path} is {linear.out_features // pieces} x "
                    f"{linear.in_features}; a low rank is below both"
                )
            parts = tuple(model.TARGETS[name][1] for name in names)
            setattr(getattr(block, folder), last, LowRank(linear, parts, pieces, rank, alpha))
    model.user.requires_grad_(True)
    model.item.requires_grad_(True)
    for more in (model.gate, model.blend, model.item_out):
        if more is not None:
            more.requires_grad_(True)
    model.lora = {"rank": rank, "alpha": alpha, "targets": targets, "n_specials": n_specials}


def adapters(model: nn.Module) -> list[LowRank]:
    """All adapted layers of a model."""
    return [module for module in model.modules() if isinstance(module, LowRank)]


def merge(model: nn.Module) -> None:
    """Add every adapter to its matrix, for inference; copies of the matrices are kept."""
    for module in adapters(model):
        module.merge()


def unmerge(model: nn.Module) -> None:
    """Every matrix as it was, to the last bit."""
    for module in adapters(model):
        module.unmerge()


def is_merged(model: nn.Module) -> bool:
    """Whether adapters are part of their matrices now."""
    return any(module.kept is not None for module in adapters(model))


def counts(model: nn.Module) -> dict[str, int]:
    """parameters: how many numbers a model has; trainable: how many of them learn."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {
        "parameters": sum(n for n, _ in sizes),
        "trainable": sum(n for n, learns in sizes if learns),
    }
