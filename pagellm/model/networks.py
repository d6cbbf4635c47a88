"""A backbone from the name of its size, from a saved state, and with published weights in it.

model = build("llama-tiny", n_words=2057, n_users=2000, n_items=1000)
load_published(model, "models/Llama-3.2-1B", n_words=128_256)
model = from_state(to_state(model))
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagellm.model import gpt2, llama
from pagellm.model.backbone import Backbone
from pagellm.model.lora import adapt, is_merged
from pagellm.model.weights import read_weights, write_weights
from pagellm.stage import dist
from pagellm.stage.config import PageLLMError

__all__ = [
    "SIZES",
    "build",
    "from_state",
    "load_published",
    "save_published",
    "to_state",
    "trunk_of",
]


SIZES = gpt2.SIZES | llama.SIZES
TRUNKS: dict[str, tuple[Any, Any]] = {
    "gpt2": (gpt2.GPT2, gpt2.Shape),
    "llama": (llama.Llama, llama.Shape),
}


def trunk_of(shape) -> type[Backbone]:
    """The class of network that a shape belongs to."""
    return next(trunk for trunk, kind in TRUNKS.values() if type(shape) is kind)


def build(size: str, n_words: int, n_users: int, n_items: int, dropout: float = 0.1) -> Backbone:
    """A new network of a size in SIZES, randomly initialised."""
    trunk = trunk_of(SIZES[size])
    return trunk(SIZES[size], n_words, n_users, n_items, dropout)  # type: ignore[call-arg]


def to_state(model: Backbone) -> dict:
    """Plain values and whole tensors that `from_state` turns back into the model.

    Call it on every process. Raises ValueError while adapters are merged: the matrices are then not
    the ones to save.
    """
    if is_merged(model):
        raise ValueError("to_state: unmerge the adapters first")
    state: dict[str, Any] = {
        "shape": asdict(model.shape),
        "rows": [model.n_words, model.n_users, model.n_items],
        "weights": dist.weights(model),
    }
    if model.KIND != "gpt2":  # states of before there were two backbones name none
        state["trunk"] = model.KIND
    if model.gate is not None:
        state["gated"] = True
    return state if model.lora is None else {**state, "lora": dict(model.lora)}


def from_state(state: dict, dropout: float = 0.0) -> Backbone:
    """The model of a saved state, with its adapters and what they freeze.

    Raises PageLLMError for an unknown kind of trunk.
    """
    kind = state.get("trunk", "gpt2")
    if kind not in TRUNKS:
        raise PageLLMError(f"a model of the kind {kind!r}; this version knows {', '.join(TRUNKS)}")
    trunk, shape = TRUNKS[kind]
    model = trunk(shape(**state["shape"]), *state["rows"], dropout=dropout)
    if state.get("gated"):
        model.add_gate()
    if "lora" in state:
        adapt(model, **state["lora"])
    model.load_state_dict(state["weights"])
    return model


def published(model: Backbone) -> dict[str, Tensor]:
    """Published name -> parameter, of trunk and words."""
    return {
        model.PREFIX + model.published_name(name): weight
        for name, weight in model.named_parameters()
        if name not in ("user", "item", "special", "gate") and ".lora_" not in name
    }


@torch.no_grad()
def load_published(model: Backbone, source: str | Path, n_words: int | None = None) -> None:
    """Copy published weights into the trunk and the first word rows.

    Special tokens, users and items keep their rows.

    source   as for weights.read_weights
    n_words  words that the tokeniser knows; None: as many rows as the file has
    Raises PageLLMError if a weight is missing, unknown, or of another shape, if config.json states
    another shape or arithmetic, or if the output rows are not the input rows.
    """
    if model.lora is not None:
        raise ValueError("load_published: load first, then adapt")
    weights, config = read_weights(source)
    check_config(model, config, source)
    prefix = model.PREFIX
    weights = {
        name if name.startswith(("lm_head.", prefix)) else prefix + name: w
        for name, w in weights.items()
        if not name.endswith(model.UNUSED)
    }
    ours = published(model)
    rows = prefix + model.published_name("word")
    head, words = weights.pop("lm_head.weight", None), weights.get(rows)
    if (
        words is None
        or words.ndim != 2
        or words.shape[1] != model.shape.n_embd
        or len(words) > model.n_words
    ):
        shape = None if words is None else tuple(words.shape)
        raise PageLLMError(
            f"{source}: word rows {shape} do not fit {model.n_words} x {model.shape.n_embd}"
        )
    if n_words is not None and len(words) != n_words:
        raise PageLLMError(
            f"{source} has {len(words)} word rows, the tokeniser knows {n_words} words: these are "
            "not of one model; give --bpe the files published with these weights"
        )
    if head is not None and not (head.shape == words.shape and torch.equal(head, words)):
        raise PageLLMError(
            f"{source}: lm_head.weight is not the embedding; only tied embeddings are built here"
        )
    missing, extra = sorted(set(ours) - set(weights)), sorted(set(weights) - set(ours))
    if missing or extra:
        raise PageLLMError(
            f"{source} is not a {model.KIND} of this size: missing {missing[:3]}, "
            f"unknown {extra[:3]}"
        )
    for name, weight in weights.items():
        if name == rows:
            continue
        # GPT-2's published layers store (in, out); nn.Linear stores (out, in).
        weight = weight.T if name.endswith(model.TRANSPOSED) and weight.ndim == 2 else weight
        if weight.shape != ours[name].shape or not weight.is_floating_point():
            raise PageLLMError(
                f"{source}: {name} is {tuple(weight.shape)} {weight.dtype}, want "
                f"{tuple(ours[name].shape)} of floating point"
            )
        ours[name].copy_(weight)
    model.word[: len(words)].copy_(words)


def check_config(model: Backbone, config: dict, source: str | Path) -> None:
    """Raise PageLLMError where a published config.json does not describe this model.

    Numbers of heads and rotary scaling leave no trace in the weights' shapes. A field that the file
    leaves out is not checked.
    """
    rope = config.get("rope_parameters")  # the newer spelling has all of it in one table
    if isinstance(rope, dict):
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        plain = rope.get("rope_type", "default") == "default"
        config = {
            **config,
            "rope_theta": rope.get("rope_theta"),
            "rope_scaling": None if plain else scaling,
        }
    for name, want in model.published_config(model.shape).items():
        said = name in config and (config[name] is not None or name == "rope_scaling")
        if said and name != "max_position_embeddings" and config[name] != want:
            raise PageLLMError(
                f"{source}: its config.json has {name}={config[name]!r}, this size {want!r}; take "
                "the size that is published with these weights"
            )


def save_published(
    model: Backbone, folder: str | Path, n_words: int, shard_mb: float = 0.0
) -> None:
    """Write trunk and the first n_words word rows in the form of a published model.

    `load_published` and transformers read it. Merged adapters are part of the matrices.
    """
    weights = {
        name: w.T if name.endswith(model.TRANSPOSED) else w for name, w in published(model).items()
    }
    rows = model.PREFIX + model.published_name("word")
    architecture = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[model.KIND]
    write_weights(
        folder,
        {**weights, rows: weights[rows][:n_words]},
        {
            "architectures": [architecture],
            "vocab_size": n_words,
            **model.published_config(model.shape),
        },
        shard_mb,
    )
