"""What a published config.json says: the shape of a network, or why it cannot be built here.

    shape = shape_of(config, source)       # of gpt2.Shape or llama.Shape
    compare(shape, other, source)          # raise PageLLMError where two shapes differ

The fields of a config.json are an allow-list. Some give the shape, some must have the value that is
computed here, some change nothing in inference. Any other field may change the arithmetic without a
trace in the weights' shapes, so it is refused by name. A field that is left out has the value that
transformers gives it (tests/model/test_published.py compares).
"""

import math
from collections.abc import Callable
from typing import Any

from pagellm.model import gpt2, llama
from pagellm.stage.config import PageLLMError

__all__ = ["KINDS", "TOLERANCE", "compare", "shape_of", "trunk_of"]


TOLERANCE = 1e-6  # relative; a float32 of 1e-5 reads 9.999999747378752e-06

# Fields that change nothing in inference: names, tokens, dropout, training, other heads.
NEUTRAL = set(
    "model_type vocab_size architectures transformers_version torch_dtype dtype use_cache "
    "initializer_range bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id "
    "decoder_start_token_id attention_dropout attn_pdrop embd_pdrop resid_pdrop hidden_dropout "
    "attn_implementation reorder_and_upcast_attn pretraining_tp chunk_size_feed_forward "
    "output_hidden_states output_attentions output_past return_dict return_dict_in_generate "
    "output_scores torchscript use_bfloat16 tf_legacy_loss is_decoder is_llama_config "
    "gradient_checkpointing problem_type id2label label2id num_labels finetuning_task "
    "task_specific_params tokenizer_class prefix summary_type summary_use_proj "
    "summary_activation summary_proj_to_labels summary_first_dropout n_ctx max_window_layers "
    "transformers.js_config unsloth_fixed unsloth_version "
    # of generation, which older files keep here
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty "
    "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id "
    "forced_eos_token_id remove_invalid_values exponential_decay_length_penalty "
    "suppress_tokens begin_suppress_tokens".split()
)
# Field -> the values that are computed here. A field that is left out has the first.
FIXED: dict[str, tuple] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, []),
}
GPT2_FIXED: dict[str, tuple] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),  # one formula
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
}
LLAMA_FIXED: dict[str, tuple] = {
    "hidden_act": ("silu", "swish"),  # one formula
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
}
GPT2_SHAPE = {"n_layer", "n_head", "n_embd", "n_positions", "n_inner", "layer_norm_epsilon"}
LLAMA_SHAPE = set(
    "num_hidden_layers num_attention_heads num_key_value_heads hidden_size head_dim "
    "intermediate_size max_position_embeddings rope_theta rope_scaling rope_parameters "
    "rms_norm_eps attention_bias mlp_bias use_sliding_window sliding_window layer_types".split()
)
KINDS = ("gpt2", "llama", "qwen2", "qwen3")
# Kinds of rotary scaling -> the fields that llama.Shape.scaling holds, in order.
SCALINGS = {
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


class Reader:
    """The fields of one config.json, and errors that name the file, the field and its value."""

    def __init__(self, config: dict, source: Any):
        self.config, self.source = config, source

    def refuse(self, name: str, wanted: str, value: Any = None) -> PageLLMError:
        value = self.config.get(name) if value is None else value
        return PageLLMError(f"{self.source}: its config.json has {name}={value!r}{wanted}")

    def get(self, name: str, default: Any) -> Any:
        """A field; null counts as left out."""
        value = self.config.get(name)
        return default if value is None else value

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number above 0. Raises PageLLMError where it is none, or missing."""
        value = self.get(name, default)
        if value is None:
            raise PageLLMError(f"{self.source}: its config.json does not say {name}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refuse(name, "; want a whole number above 0")
        return value

    def number(self, name: str, default: float) -> float:
        """A finite number above 0."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(name, "; want a number")
        if not (math.isfinite(value) and value > 0):
            raise self.refuse(name, "; want a number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, "; want true or false")
        return value

    def check(self, fixed: dict[str, tuple], shape: set[str]) -> None:
        """Raise PageLLMError for a field outside the allow-list, or with a value not in it."""
        for name, value in self.config.items():
            if name in fixed and value is not None and not any(same(value, v) for v in fixed[name]):
                wanted = " or ".join(repr(v) for v in fixed[name])
                raise self.refuse(name, f"; this version computes {wanted} alone")
            known = name in fixed or name in shape or name in NEUTRAL or name.startswith("_")
            if not known and value is not None:
                raise self.refuse(
                    name,
                    ", a field that this version does not know\n  It may change the arithmetic "
                    "without a trace in the weights. If it does not, take it out of config.json.",
                )


def same(a: Any, b: Any) -> bool:
    """Whether two values of a config.json are one: floats to a relative 1e-6, the rest exactly."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=TOLERANCE)
    return a == b


def shape_of(config: dict, source: Any, kind: str = "", head: bool = False) -> Any:
    """The shape that a published config.json describes: a gpt2.Shape or a llama.Shape.

    source  named in errors
    kind    the model_type of a file that names none
    head    whether the weights hold a head of their own, for a file that does not say whether its
            head is tied to the word rows
    Raises PageLLMError for a model_type outside KINDS, for a field or value that is not computed
    here, and for sizes that are missing or make no network.
    """
    read = Reader(config, source)
    found = read.get("model_type", kind)
    if found not in KINDS:
        if not found:
            raise PageLLMError(f"{source}: no config.json that names its model_type; give --size")
        raise read.refuse("model_type", f"; want {', '.join(KINDS)}")
    if read.get("quantization_config", None) is not None:
        raise PageLLMError(
            f"{source}: its config.json has quantization_config: the weights are packed\n"
            "  Take the release in 16 or 32 bits (of a GGUF file: pagellm import-gguf)."
        )
    reader: Callable[[Reader, str, bool], Any] = gpt2_shape if found == "gpt2" else llama_shape
    try:
        return reader(read, found, head)
    except ValueError as error:
        raise PageLLMError(f"{source}: its config.json makes no network: {error}") from None


def gpt2_shape(read: Reader, kind: str, head: bool) -> gpt2.Shape:
    read.check(FIXED | GPT2_FIXED, GPT2_SHAPE | {"tie_word_embeddings"})
    context = read.count("n_positions", read.get("n_ctx", None))
    width = read.count("n_embd")
    inner = read.count("n_inner", 4 * width)
    return gpt2.Shape(
        n_layer=read.count("n_layer"),
        n_head=read.count("n_head"),
        n_embd=width,
        n_ctx=context,
        n_inner=0 if inner == 4 * width else inner,
        eps=read.number("layer_norm_epsilon", 1e-5),
        tied=read.flag("tie_word_embeddings", True),
    )


def llama_shape(read: Reader, kind: str, head: bool) -> llama.Shape:
    fixed = FIXED | LLAMA_FIXED
    if kind == "qwen2":  # its biases are not an option
        fixed |= {"attention_bias": (True,)}
    if kind != "llama":
        fixed |= {"mlp_bias": (False,)}
    read.check(fixed, LLAMA_SHAPE | {"tie_word_embeddings"})
    heads, width = read.count("num_attention_heads"), read.count("hidden_size")
    context = read.count("max_position_embeddings")
    check_window(read, kind, context)
    theta, scaling = rotary(read)
    bias = kind == "qwen2" or read.flag("attention_bias", False)
    narrow = 128 if kind == "qwen3" else width // heads
    each = read.count("head_dim", narrow)
    return llama.Shape(
        n_layer=read.count("num_hidden_layers"),
        n_head=heads,
        n_kv_head=read.count("num_key_value_heads", heads if kind == "llama" else 32),
        n_embd=width,
        n_hidden=read.count("intermediate_size"),
        n_ctx=context,
        theta=theta,
        scaling=scaling,
        eps=read.number("rms_norm_eps", 1e-6),
        n_head_dim=0 if each * heads == width else each,
        qkv_bias=bias,
        o_bias=bias and kind != "qwen2",
        mlp_bias=kind == "llama" and read.flag("mlp_bias", False),
        qk_norm=kind == "qwen3",
        tied=read.flag("tie_word_embeddings", not head),
    )


def check_window(read: Reader, kind: str, context: int) -> None:
    """Raise PageLLMError where a layer looks back over fewer tokens than the context has."""
    used = read.flag("use_sliding_window", False)
    windowed = "sliding_attention" in read.get("layer_types", [])
    window = read.get("sliding_window", None)
    if used or windowed or (kind == "llama" and window is not None):
        name = "sliding_window" if window is not None else "use_sliding_window"
        if window is None or read.count("sliding_window") < context:
            raise read.refuse(
                name,
                f", and a context of {context}; this version looks at the whole context alone",
            )
    for layer in read.get("layer_types", []):
        if layer not in ("full_attention", "sliding_attention"):
            raise read.refuse("layer_types", "; this version computes full attention alone", layer)


def rotary(read: Reader) -> tuple[float, tuple[float, ...] | None]:
    """Base and scaling of the rotary frequencies, from either spelling of a config.json.

    The older one has rope_theta and rope_scaling, the newer one has both in rope_parameters.
    """
    name = "rope_parameters" if read.get("rope_parameters", None) is not None else "rope_scaling"
    table = read.get(name, {})
    if not isinstance(table, dict):
        raise read.refuse(name, "; want a table or null")
    inside = Reader(table, f"{read.source}: {name}")
    theta = inside.number("rope_theta", read.number("rope_theta", 10_000.0))
    kind = inside.get("rope_type", inside.get("type", "default"))
    if kind != "default" and kind not in SCALINGS:
        raise read.refuse(name, f"; of rotary scaling this version computes {', '.join(SCALINGS)}")
    fields = SCALINGS.get(kind, ())
    for field, value in table.items():
        allowed = field in (*fields, "rope_theta", "rope_type", "type")
        neutral = field == "partial_rotary_factor" and same(value, 1.0)
        # of plain frequencies these say nothing; linear scaling does not look at it
        neutral |= field == "original_max_position_embeddings" or (not fields and field == "factor")
        if not (allowed or neutral or value is None):
            raise inside.refuse(field, "; this version does not compute it")
    if not fields:
        return theta, None
    for field in fields:
        if inside.get(field, None) is None:
            raise read.refuse(name, f"; a scaling of the kind {kind} needs {field}")
    values = [inside.number(field, 1.0) for field in fields]
    if kind == "llama3":
        return theta, (*values[:3], int(values[3]))
    return theta, tuple(values)


def trunk_of(shape: Any) -> Any:
    """The class of network that a shape belongs to."""
    return gpt2.GPT2 if isinstance(shape, gpt2.Shape) else llama.Llama


def compare(found: Any, wanted: Any, source: Any) -> None:
    """Raise PageLLMError where the shape of published weights is not the one that was built.

    The length of the context may differ where positions are not learnt.
    """
    theirs = trunk_of(found).published_config(found)
    ours = trunk_of(wanted).published_config(wanted)
    for name in dict.fromkeys([*ours, *theirs]):
        if name == "max_position_embeddings" or same(theirs.get(name), ours.get(name)):
            continue
        raise PageLLMError(
            f"{source}: its config.json has {name}={theirs.get(name)!r}, this size "
            f"{ours.get(name)!r}\n  Leave out --size: the shape is then read from config.json."
        )
