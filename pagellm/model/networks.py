"""A backbone from the name of its size, from a saved state, and with published weights in it.

model = build("llama-tiny", n_words=2057, n_users=2000, n_items=1000)
model = build(published_shape("models/Llama-3.2-1B"), n_words=128_265, n_users=2000, n_items=1000)
load_published(model, "models/Llama-3.2-1B", n_words=128_256)
model = from_state(to_state(model))
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagellm.model import gpt2, llama
from pagellm.model.backbone import Backbone
from pagellm.model.lora import adapt, is_merged, learns
from pagellm.model.published import compare, shape_of, trunk_of
from pagellm.model.weights import read_weights, write_weights
from pagellm.stage import dist
from pagellm.stage.config import PageLLMError

__all__ = [
    "ARCHITECTURES",
    "SIZES",
    "build",
    "from_state",
    "load_published",
    "published",
    "published_shape",
    "save_published",
    "to_state",
    "trunk_of",
]


SIZES = gpt2.SIZES | llama.SIZES
ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
TRUNKS: dict[str, tuple[Any, Any]] = {
    "gpt2": (gpt2.GPT2, gpt2.Shape),
    "llama": (llama.Llama, llama.Shape),
}


def build(size: Any, n_words: int, n_users: int, n_items: int, dropout: float = 0.1) -> Backbone:
    """A new network, randomly initialised. size: a name in SIZES, or a shape."""
    shape = SIZES[size] if isinstance(size, str) else size
    return trunk_of(shape)(shape, n_words, n_users, n_items, dropout)


def published_shape(source: str | Path) -> Any:
    """The shape of published weights, from their config.json.

    Raises PageLLMError as `shape_of` and `read_weights` do.
    """
    weights, config = read_weights(source)
    return shape_of(config, source, head="lm_head.weight" in weights)


def plain_shape(shape: Any) -> dict[str, Any]:
    """The fields of a shape that differ from their defaults, or have none.

    So a file does not change when a shape gets a further field.
    """
    values = {f.name: getattr(shape, f.name) for f in fields(shape)}
    return {f.name: values[f.name] for f in fields(shape) if values[f.name] != f.default}


def to_state(model: Backbone) -> dict:
    """Plain values and whole tensors that `from_state` turns back into the model.

    Of an adapted model, what is frozen stands apart in "frozen": a run keeps it once, in a file
    that is named by its hash (stage/run.py).

    Call it on every process. Raises ValueError while adapters are merged: the matrices are then not
    the ones to save.
    """
    if is_merged(model):
        raise ValueError("to_state: unmerge the adapters first")
    state: dict[str, Any] = {
        "shape": plain_shape(model.shape),
        "rows": [model.n_words, model.n_users, model.n_items],
        "weights": dist.weights(model),
    }
    if model.KIND != "gpt2":  # states of before there were two backbones name none
        state["trunk"] = model.KIND
    if model.gate is not None:
        state["gated"] = True
    if model.item_out is not None:
        state["untied"] = True
    if model.blend is not None:
        state["pooled"] = True
    if model.without_dropout:
        state["without_dropout"] = True
    if model.lora is None:
        return state
    whole = state["weights"]
    state["weights"] = {name: w for name, w in whole.items() if learns(name)}
    state["frozen"] = {name: w for name, w in whole.items() if not learns(name)}
    return {**state, "lora": dict(model.lora)}


def from_state(state: dict, dropout: float = 0.0) -> Backbone:
    """The model of a saved state, with its adapters and what they freeze.

    Raises PageLLMError for an unknown kind of trunk.
    """
    kind = state.get("trunk", "gpt2")
    if kind not in TRUNKS:
        raise PageLLMError(f"a model of the kind {kind!r}; this version knows {', '.join(TRUNKS)}")
    trunk, shape = TRUNKS[kind]
    none = state.get("without_dropout", False)
    model = trunk(shape(**state["shape"]), *state["rows"], dropout=0.0 if none else dropout)
    model.without_dropout = none
    if state.get("pooled"):
        model.add_pool()
    elif state.get("gated"):
        model.add_gate()
    if state.get("untied"):
        model.untie()
    if "lora" in state:
        adapt(model, **state["lora"])
    if model.word_out is not None:  # no stage after pre-training scores words
        model.word_out.requires_grad_(False)
    model.load_state_dict(state["weights"] | state.get("frozen", {}))
    return model


def published(model: Backbone) -> dict[str, Tensor]:
    """Published name -> parameter, of trunk and words."""
    return {
        "lm_head.weight"
        if name == "word_out"
        else model.PREFIX + model.published_name(name): weight
        for name, weight in model.named_parameters()
        if name not in ("user", "item", "item_out", "special", "gate", "blend")
        and ".lora_" not in name
    }


@torch.no_grad()
def load_published(
    model: Backbone, source: str | Path, n_words: int | None = None, spare: bool = False
) -> int:
    """Copy published weights into the trunk and the first word rows.

    Special tokens, users and items keep their rows.

    source   as for weights.read_weights
    n_words  words that the tokeniser knows; None: as many rows as the file has
    spare    the file may have more rows than n_words: many models round their number up. Right
             where tokeniser and weights were published together
    returns  rows of the file without a word, which were left out
    Raises PageLLMError if a weight is missing, unknown, or of another shape, if config.json states
    another shape or arithmetic, or if the output rows do not go with it.
    """
    if model.lora is not None:
        raise ValueError("load_published: load first, then adapt")
    weights, config = read_weights(source)
    if config:
        kind = trunk_of(model.shape).published_config(model.shape)["model_type"]
        compare(
            shape_of(said(config, model.shape), source, kind, not model.shape.tied),
            model.shape,
            source,
        )
    prefix = model.PREFIX
    weights = {
        name if name.startswith(("lm_head.", prefix)) else prefix + name: w
        for name, w in weights.items()
        if not name.endswith(model.UNUSED)
    }
    rows = prefix + model.published_name("word")
    words = weights.get(rows)
    if words is None or words.ndim != 2 or words.shape[1] != model.shape.n_embd:
        shape = None if words is None else tuple(words.shape)
        raise PageLLMError(
            f"{source}: word rows {shape} do not fit {model.n_words} x {model.shape.n_embd}"
        )
    taken = len(words) if n_words is None else n_words
    if taken > len(words) or taken > model.n_words or (taken < len(words) and not spare):
        raise PageLLMError(
            f"{source} has {len(words)} word rows, the tokeniser knows {taken} words, "
            f"{model.n_words} rows were built: these do not fit\n  Leave out --bpe, so that the "
            "tokenizer.json beside the weights is taken."
        )
    head = weights.pop("lm_head.weight", None)
    check_head(model, head, words, source)
    ours = published(model)
    ours.pop("lm_head.weight", None)
    copy_weights(model, {n: w for n, w in weights.items() if n != rows}, ours, source)
    model.word[:taken].copy_(words[:taken])
    if model.word_out is not None and head is not None:
        model.word_out[:taken].copy_(head[:taken])
    return len(words) - taken


def said(config: dict, shape: Any) -> dict:
    """A config.json, completed by the fields of a shape that leave a trace in the weights.

    Files written by hand may leave them out: a weight of another size is refused by itself.
    """
    traced = ("n_layer", "n_embd", "n_positions", "num_hidden_layers", "hidden_size")
    more = ("intermediate_size", "max_position_embeddings", "n_head", "num_attention_heads")
    own = trunk_of(shape).published_config(shape)
    if (config.get("model_type", own["model_type"]) == "gpt2") != (own["model_type"] == "gpt2"):
        return config
    return {name: own[name] for name in (*traced, *more) if name in own} | config


def check_head(model: Backbone, head: Tensor | None, words: Tensor, source: str | Path) -> None:
    """Raise PageLLMError where the rows that words are scored against are not those to expect."""
    if model.word_out is None:
        if head is not None and not (head.shape == words.shape and torch.equal(head, words)):
            raise PageLLMError(
                f"{source}: lm_head.weight is not the embedding, but only tied rows were built: "
                "its config.json does not say tie_word_embeddings=false"
            )
    elif head is None:
        raise PageLLMError(
            f"{source} has no lm_head.weight, and its config.json says that words are scored "
            "against rows of their own (tie_word_embeddings=false)"
        )
    elif head.shape != words.shape or not head.is_floating_point():
        raise PageLLMError(
            f"{source}: lm_head.weight is {tuple(head.shape)}, want {tuple(words.shape)}"
        )


def copy_weights(
    model: Backbone, weights: dict[str, Tensor], ours: dict[str, Tensor], source: str | Path
) -> None:
    """Copy named weights of a published file into the trunk. Raises PageLLMError as above."""
    ours = {n: w for n, w in ours.items() if n != model.PREFIX + model.published_name("word")}
    missing, extra = sorted(set(ours) - set(weights)), sorted(set(weights) - set(ours))
    if missing or extra:
        raise PageLLMError(
            f"{source} is not a {model.KIND} of this size: missing {missing[:3]}, "
            f"unknown {extra[:3]}"
        )
    for name, weight in weights.items():
        # GPT-2's published layers store (in, out); nn.Linear stores (out, in).
        weight = weight.T if name.endswith(model.TRANSPOSED) and weight.ndim == 2 else weight
        if weight.shape != ours[name].shape or not weight.is_floating_point():
            raise PageLLMError(
                f"{source}: {name} is {tuple(weight.shape)} {weight.dtype}, want "
                f"{tuple(ours[name].shape)} of floating point"
            )
        ours[name].copy_(weight)


def save_published(
    model: Backbone, folder: str | Path, n_words: int, shard_mb: float = 0.0
) -> None:
    """Write trunk and the first n_words word rows in the form of a published model.

    `load_published` and transformers read it. Merged adapters are part of the matrices.
    """
    weights = {
        name: w.T if name.endswith(model.TRANSPOSED) else w for name, w in published(model).items()
    }
    for rows in (model.PREFIX + model.published_name("word"), "lm_head.weight"):
        if rows in weights:
            weights[rows] = weights[rows][:n_words]
    config = model.published_config(model.shape)
    write_weights(
        folder,
        weights,
        {
            "architectures": [ARCHITECTURES[config["model_type"]]],
            "vocab_size": n_words,
            **config,
        },
        shard_mb,
    )
