"""A GGUF file -> the directory that `pretrain --weights` and transformers read.

Reads   one .gguf file of a GPT-2, Llama, Qwen2 or Qwen3 with byte-level words (extra [gguf])
Writes  <out>   config.json, model.safetensors, tokenizer.json; tokenizer_config.json, which has
                the chat template

    pagellm import-gguf SmolLM2-135M-Instruct.Q4_1.gguf --out models/smollm2

Quantised numbers are turned into plain ones by the package gguf; what quantising lost stays lost.
llama.cpp turns neighbouring channels (2 i, 2 i + 1) of a head by one angle, published Llama weights
channels (i, i + D / 2): rows of queries and keys are put back into that order. Keys of the file
that change the arithmetic and are not known here are refused by name, as in published.py.
"""

import json
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pagellm.model.llama import frequencies
from pagellm.model.networks import ARCHITECTURES
from pagellm.model.published import shape_of
from pagellm.model.weights import DTYPES, write_weights
from pagellm.stage import hints
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import write_json
from pagellm.stage.outputs import check_folder

__all__ = ["Config", "File", "config_of", "run", "tokenizer_of", "weights_of"]


TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# ggml's name of a tensor -> the published one, within a layer
LLAMA_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GPT2_LAYER = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
LLAMA_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
GPT2_WHOLE = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
# Keys below the architecture's name that are read or checked here.
KEYS = set(
    "vocab_size context_length embedding_length block_count feed_forward_length "
    "attention.head_count attention.head_count_kv attention.key_length attention.value_length "
    "attention.layer_norm_rms_epsilon attention.layer_norm_epsilon attention.causal "
    "attention.sliding_window rope.dimension_count rope.freq_base rope.scaling.type "
    "rope.scaling.factor rope.scaling.original_context_length rope.scaling.finetuned "
    "expert_count tensor_data_layout".split()
)
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf's kinds of words
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# gguf's name of a way to cut text -> a pattern that cuts it, "" for GPT-2's own; single digits
CUTS: dict[str, tuple[str, bool]] = {
    "gpt-2": ("", False),
    "smollm": ("", True),
    "llama-bpe": (rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}", False),
    "qwen2": (rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}", False),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Unpack a GGUF file into the directory that pretrain --weights and transformers read."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("file",)

    file: str = ""  # the .gguf file; it may be given without --file
    out: str = ""  # directory to write; it must not be there yet
    dtype: str = "float32"  # type of the weights written: float32, float16 or bfloat16

    def __post_init__(self):
        check(
            self,
            file=(self.file != "", "a .gguf file: pagellm import-gguf FILE --out DIR"),
            out=(self.out != "", "a directory to write: pagellm import-gguf FILE --out DIR"),
            dtype=(self.dtype in TYPES, ", ".join(TYPES)),
        )


class File:
    """A GGUF file, opened: its keys and tensors.

    Raises PageLLMError for a file that is none, or one part of several.
    """

    def __init__(self, path: str | Path):
        try:
            import gguf
            from gguf.quants import dequantize
        except ImportError:
            raise PageLLMError(
                f"reading a GGUF file needs the package gguf: {hints.install('gguf')}"
            ) from None
        self.path, self.dequantize = Path(path), dequantize
        if not self.path.is_file():
            raise PageLLMError(f"no file {path}")
        try:
            self.reader = gguf.GGUFReader(self.path)
        except Exception as error:  # the reader raises whatever a damaged file leads to
            raise PageLLMError(
                f"{path} is no whole GGUF file ({type(error).__name__}: {error}); fetch it again"
            ) from None
        if self.get("split.count", 1) > 1:
            raise PageLLMError(
                f"{path} is one part of {self.get('split.count')}; join them first "
                "(llama.cpp's llama-gguf-split --merge)"
            )
        self.kind = self.get("general.architecture")
        if self.kind not in ARCHITECTURES:
            raise PageLLMError(
                f"{path} holds a {self.kind}; want one of {', '.join(ARCHITECTURES)}"
            )

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key."""
        found = self.reader.get_field(name)
        return default if found is None else found.contents()

    def need(self, name: str) -> Any:
        """The value of a key that must be there."""
        if (value := self.get(name)) is None:
            raise PageLLMError(f"{self.path} has no {name}: it is not whole, or not of this kind")
        return value

    def own(self, name: str, default: Any = None) -> Any:
        """The value of a key of this architecture."""
        return self.get(f"{self.kind}.{name}", default)

    def tensors(self) -> dict[str, np.ndarray]:
        """Name -> float32 array, quantised ones turned into plain numbers."""
        found = {}
        for tensor in self.reader.tensors:
            shape = [int(n) for n in tensor.shape][::-1]  # ggml counts dimensions from the last
            plain = self.dequantize(tensor.data, tensor.tensor_type)
            found[tensor.name] = plain.astype(np.float32).reshape(shape)
        return found

    def kinds(self) -> dict[str, int]:
        """Type of number -> how many tensors have it."""
        return dict(Counter(tensor.tensor_type.name for tensor in self.reader.tensors))


def config_of(file: File) -> dict[str, Any]:
    """config.json without the head and the frequencies, which the tensors decide.

    Raises PageLLMError for a key that changes the arithmetic and is not computed here.
    """
    prefix = f"{file.kind}."
    for name in file.reader.fields:
        if name.startswith(prefix) and name.removeprefix(prefix) not in KEYS:
            raise PageLLMError(
                f"{file.path}: {name}={file.get(name)!r}, a key that this version does not know; "
                "it may change the arithmetic"
            )

    def need(name: str) -> int:
        return file.need(prefix + name)

    heads, width, context = (
        need("attention.head_count"),
        need("embedding_length"),
        need("context_length"),
    )
    head_dim = file.own("attention.key_length", width // heads)
    for name, fine, wanted in (
        ("expert_count", file.own("expert_count", 0) == 0, "none"),
        ("attention.causal", file.own("attention.causal", True), "true"),
        ("attention.value_length", file.own("attention.value_length", head_dim) == head_dim, ""),
        ("rope.dimension_count", file.own("rope.dimension_count", head_dim) == head_dim, head_dim),
        (
            "attention.sliding_window",
            file.own("attention.sliding_window", context) >= context,
            f"the context, {context}",
        ),
    ):
        if not fine:
            raise PageLLMError(
                f"{file.path}: {prefix}{name}={file.own(name)!r}; this version computes {wanted}"
            )
    common = {
        "architectures": [ARCHITECTURES[file.kind]],
        "model_type": file.kind,
        "vocab_size": len(file.need("tokenizer.ggml.tokens")),
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.get("tokenizer.ggml.eos_token_id"),
    }
    if file.kind == "gpt2":
        return common | {
            "n_layer": need("block_count"),
            "n_head": heads,
            "n_embd": width,
            "n_positions": context,
            "n_inner": file.own("feed_forward_length"),
            "layer_norm_epsilon": rounded(need("attention.layer_norm_epsilon")),
            "activation_function": "gelu_new",
        }
    return common | {
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.own("attention.head_count_kv", heads),
        "hidden_size": width,
        "head_dim": head_dim,
        "intermediate_size": need("feed_forward_length"),
        "max_position_embeddings": context,
        "rms_norm_eps": rounded(need("attention.layer_norm_rms_epsilon")),
        "rope_theta": float(file.own("rope.freq_base", 10_000.0)),
        "rope_scaling": linear_scaling(file),
        "hidden_act": "silu",
    }


def rounded(value: float) -> float:
    """A float32 as it was written: 9.999999747378752e-06 is 1e-5."""
    return float(f"{value:.6g}")


def linear_scaling(file: File) -> dict[str, Any] | None:
    """rope_scaling from the file's keys. Raises PageLLMError for a kind not computed here."""
    kind = file.own("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise PageLLMError(
            f"{file.path}: {file.kind}.rope.scaling.type={kind!r}; this version computes none, "
            "linear, and Llama 3's, which has a tensor rope_freqs"
        )
    factor = float(file.own("rope.scaling.factor", 1.0))
    return None if kind == "none" or factor == 1 else {"rope_type": "linear", "factor": factor}


def llama3_scaling(file: File, config: dict, factors: np.ndarray) -> dict[str, Any]:
    """rope_scaling that divides frequencies by the factors of a tensor rope_freqs.

    Raises PageLLMError where Llama 3's formula does not give them.
    """
    top = float(factors.max())
    plain = frequencies(config["head_dim"], config["rope_theta"])
    original = file.own("rope.scaling.original_context_length", 8192)
    ours = plain / frequencies(
        config["head_dim"], config["rope_theta"], (top, 1.0, 4.0, int(original))
    )
    if factors.shape != tuple(ours.shape) or not np.allclose(factors, ours, rtol=1e-4):
        raise PageLLMError(
            f"{file.path}: its rope_freqs are not Llama 3's scaling with low_freq_factor 1, "
            f"high_freq_factor 4 and a first context of {original}"
        )
    return {
        "rope_type": "llama3",
        "factor": rounded(top),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": int(original),
    }


def unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows (H D, ...) in llama.cpp's order, channel pairs side by side -> first halves, then
    second halves."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def published_name(file: File, name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    gpt2 = file.kind == "gpt2"
    whole, layer = (GPT2_WHOLE, GPT2_LAYER) if gpt2 else (LLAMA_WHOLE, LLAMA_LAYER)
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in whole:
        return f"{whole[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in layer:
        stem = "transformer.h" if gpt2 else "model.layers"
        return f"{stem}.{parts[1]}.{layer[parts[2]]}.{parts[3]}"
    raise PageLLMError(f"{file.path} holds a tensor {name}, which a {file.kind} here does not have")


def weights_of(file: File, config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under their published names, in float32, and config.json, completed."""
    weights, config = {}, dict(config)
    tensors = file.tensors()
    if (factors := tensors.pop("rope_freqs.weight", None)) is not None:
        config["rope_scaling"] = llama3_scaling(file, config, factors.reshape(-1))
    for name, array in tensors.items():
        part = name.split(".")[2] if name.startswith("blk.") else name
        if file.kind == "llama" and part in ("attn_q", "attn_k"):
            kind = "num_attention_heads" if part == "attn_q" else "num_key_value_heads"
            array = unpermuted(array, config[kind])
        name = published_name(file, name)
        if file.kind == "gpt2" and ".c_" in name and array.ndim == 2:
            array = array.T  # GPT-2 is published with matrices (in, out)
        weights[name] = torch.from_numpy(np.ascontiguousarray(array))
    words = next(w for n, w in weights.items() if n.endswith(("embed_tokens.weight", "wte.weight")))
    head = weights.get("lm_head.weight")
    if head is not None and torch.equal(head, words):
        del weights["lm_head.weight"]
        head = None
    config["tie_word_embeddings"] = head is None
    config["vocab_size"] = len(words)
    if file.kind == "llama":
        config["attention_bias"] = any(n.endswith("q_proj.bias") for n in weights)
        config["mlp_bias"] = any(n.endswith("up_proj.bias") for n in weights)
    return weights, config


def tokenizer_of(file: File) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json.

    Raises PageLLMError for words that are not byte-level, and for an unknown way to cut text.
    """
    model, pre = file.need("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2" or pre not in CUTS:
        raise PageLLMError(
            f"{file.path}: words of the kind {model!r}, cut as {pre!r}; want gpt2 (byte-level), "
            f"cut as one of {', '.join(CUTS)}\n  Take the published tokenizer.json with --bpe."
        )
    words = [str(word) for word in file.need("tokenizer.ggml.tokens")]
    kinds = [int(kind) for kind in file.need("tokenizer.ggml.token_type")]
    while kinds and kinds[-1] == UNUSED:  # rows that round a number up have no word
        words.pop(), kinds.pop()
    pattern, digits = CUTS[pre]
    cut: list[dict[str, Any]] = []
    if digits:  # every digit is a word of its own
        cut.append({"type": "Digits", "individual_digits": True})
    if pattern:
        cut.append(
            {
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": False,
            }
        )
    level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": not pattern}
    cut.append({"type": "ByteLevel", **level})
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": i, "content": word, "special": kind == CONTROL, **plain}
        for i, (word, kind) in enumerate(zip(words, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    bos = file.get("tokenizer.ggml.bos_token_id")
    adds = file.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe") and bos is not None
    table = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cut},
        "post_processor": puts_before(words[bos], bos) if adds else None,
        "decoder": {"type": "ByteLevel", **level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": {word: i for i, word in enumerate(words)},
            "merges": [str(pair) for pair in file.need("tokenizer.ggml.merges")],
        },
    }
    return table, about_words(file, words)


def puts_before(word: str, token: int) -> dict[str, Any]:
    """A post-processor that puts one token before every text."""
    one, text = (
        {"SpecialToken": {"id": word, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    )
    return {
        "type": "TemplateProcessing",
        "single": [one, text],
        "pair": [one, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {word: {"id": word, "ids": [token], "tokens": [word]}},
    }


def about_words(file: File, words: list[str]) -> dict[str, Any]:
    """tokenizer_config.json: the names of special tokens, and the chat template."""
    about: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": file.own("context_length"),
        "clean_up_tokenization_spaces": False,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token = file.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None and token < len(words):
            about[f"{name}_token"] = words[token]
    if template := file.get("tokenizer.chat_template"):
        about["chat_template"] = template
    return about


def run(config: Config) -> None:
    """Write the directory, in one go. Raises PageLLMError if it is there already."""
    out = Path(config.out)
    if out.exists():
        raise PageLLMError(f"{out} is there already; remove it or choose another --out")
    check_folder(out, lambda folder: False)
    file = File(config.file)
    weights, described = weights_of(file, config_of(file))
    shape_of(described, config.file)  # what cannot be computed is said now, not when it is loaded
    table, about = tokenizer_of(file)
    if len(table["model"]["vocab"]) > described["vocab_size"]:
        raise PageLLMError(f"{config.file} has more words than rows of words: it is damaged")
    kind = DTYPES[TYPES[config.dtype]]
    beside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    described["torch_dtype"] = config.dtype
    write_weights(beside, {name: w.to(kind) for name, w in weights.items()}, described)
    text = json.dumps(table, ensure_ascii=False)
    (beside / "tokenizer.json").write_text(text, encoding="utf-8")
    write_json(beside / "tokenizer_config.json", about)
    beside.rename(out)
    packed = ", ".join(f"{n} {name}" for name, n in file.kinds().items())
    numbers = sum(w.numel() for w in weights.values())
    print(f"import-gguf: {out}, a {file.kind}: {numbers:,} numbers in {len(weights)} tensors")
    print(f"import-gguf: they were {packed}; now {config.dtype}")
    licence = file.get("general.license", "not said in the file")
    print(
        f"import-gguf: {len(table['model']['vocab']):,} words, "
        f"{'a' if 'chat_template' in about else 'no'} chat template; licence: {licence}"
    )


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm import-gguf"))
