"""Published directories: what their config.json says is what is computed, or it is refused by name.

The peers are tiny random models that transformers makes and writes.
"""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer
from torch.testing import assert_close

from pagellm import pretrain, sft
from pagellm.model import gpt2, llama
from pagellm.model.backbone import KVCache
from pagellm.model.networks import (
    build,
    from_state,
    load_published,
    published_shape,
    save_published,
    to_state,
)
from pagellm.model.policy import Policy
from pagellm.model.published import shape_of
from pagellm.model.rows import fit_rows
from pagellm.model.vocab import Vocab
from pagellm.stage.config import PageLLMError, parse

WORDS = 96
GPT2 = {"vocab_size": WORDS, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "gpt2": ("GPT2", GPT2 | {"n_inner": 40, "layer_norm_epsilon": 1e-3}),
    "gpt2 untied": ("GPT2", GPT2 | {"tie_word_embeddings": False}),
    "llama": ("Llama", LLAMA | {"rope_parameters": {"rope_theta": 300.0, **LLAMA3}}),
    "llama tied, linear, biases": (
        "Llama",
        LLAMA
        | {
            "rope_parameters": {"rope_theta": 99.0, "rope_type": "linear", "factor": 4.0},
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "llama with wide heads": ("Llama", LLAMA | {"head_dim": 12}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen2 tied": ("Qwen2", LLAMA | {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 16}),
    "qwen3 with biases": ("Qwen3", LLAMA | {"head_dim": 8, "attention_bias": True}),
}


def transformers():
    return pytest.importorskip("transformers", reason="published models: pip install -e '.[dev]'")


def peer(folder, family, options, seed=0, **saving):
    """A random model of transformers, written to a folder."""
    package = transformers()
    torch.manual_seed(seed)
    config = getattr(package, f"{family}Config")(**options)
    model = getattr(package, {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM"))(
        config
    )
    with torch.no_grad():  # far from the start, where mistakes hide
        for weight in model.parameters():
            weight.normal_(0, 0.2) if weight.ndim > 1 else weight.uniform_(0.5, 1.5)
    model.eval().save_pretrained(folder, **saving)
    return model


def ours(folder, words=WORDS):
    """The same model by hand, from its directory alone, with three special tokens behind."""
    model = build(published_shape(folder), words + 3, 5, 7, dropout=0.0).eval()
    load_published(model, folder, words)
    return model


def change(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_from_the_directory_alone(tmp_path, case):
    """Also left-padded, with a cache, from shards, and after our own state was saved and loaded."""
    theirs = peer(tmp_path, *CASES[case], max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model = ours(tmp_path)
    ids = torch.randint(0, WORDS, (2, 20), generator=torch.Generator().manual_seed(1))
    valid = torch.tensor([[1] * 20, [0] * 6 + [1] * 14]).bool()
    position = (valid.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        want = theirs(ids, attention_mask=valid.long(), position_ids=position).logits[valid]
        got = model.word_logits(model(ids, valid))[..., :WORDS][valid]
        assert_close(got, want, atol=1e-4, rtol=1e-4)
        cache = KVCache(model.shape, 2, 20, model.word)
        parts = [model(ids[:, :15], valid[:, :15], cache), model(ids[:, 15:], valid, cache)]
        got = model.word_logits(torch.cat(parts, 1))[..., :WORDS][valid]
        assert_close(got, want, atol=1e-4, rtol=1e-4)
        again = from_state(to_state(model)).eval()
        assert torch.equal(again(ids, valid), model(ids, valid))


@pytest.mark.parametrize("case", CASES)
def test_what_we_publish_opens_in_transformers(tmp_path, case):
    theirs = peer(tmp_path / "theirs", *CASES[case])
    save_published(ours(tmp_path / "theirs"), tmp_path / "ours", WORDS)
    again = transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids = torch.arange(30)[None]
    assert type(again) is type(theirs)
    with torch.no_grad():
        assert_close(again(ids).logits, theirs(ids).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["GPT2", "Llama", "Qwen2", "Qwen3"])
def test_a_field_that_is_left_out_has_the_value_that_transformers_gives_it(family):
    """The sizes apart, which have to be said."""
    config = getattr(transformers(), f"{family}Config")
    sizes = GPT2 if family == "GPT2" else LLAMA
    said = {"model_type": family.lower(), **sizes}
    del said["num_key_value_heads" if family != "GPT2" else "vocab_size"]
    if family != "GPT2":
        said |= {"num_attention_heads": 32, "hidden_size": 128}
    whole = config(**{k: v for k, v in said.items() if k != "model_type"}).to_dict()
    assert shape_of(said, "x", head=family != "GPT2") == shape_of(whole, "x")


def test_floats_agree_to_a_relative_millionth(tmp_path):
    """A GGUF holds 1e-5 as a float32, which reads 9.999999747378752e-06."""
    theirs = peer(tmp_path, "Llama", LLAMA | {"rms_norm_eps": 1e-5, "tie_word_embeddings": True})
    change(tmp_path, rms_norm_eps=9.999999747378752e-06)
    shape = llama.Shape(2, 4, 2, 32, 56, 48, eps=1e-5)
    model = build(shape, WORDS, 0, 0, 0.0).eval()
    load_published(model, tmp_path)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert_close(model.word_logits(model(ids)), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    change(tmp_path, rms_norm_eps=1.001e-05)
    with pytest.raises(PageLLMError, match="rms_norm_eps=1.001e-05, this size 1e-05"):
        load_published(model, tmp_path)


@pytest.mark.parametrize(
    "family, fields, message",
    [
        ("GPT2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("GPT2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
        ("GPT2", {"activation_function": "relu"}, "activation_function='relu'"),
        ("GPT2", {"activation_function": "gelu"}, "activation_function='gelu'"),
        ("GPT2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("GPT2", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ("GPT2", {"n_head": 0}, "n_head=0; want a whole number above 0"),
        ("GPT2", {"n_embd": 33}, "makes no network"),
        ("GPT2", {"layer_norm_epsilon": "small"}, "layer_norm_epsilon='small'; want a number"),
        ("Llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
            "rope_parameters: its config.json has partial_rotary_factor=0.25",
        ),
        ("Llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "linear, llama3"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "'dynamic'"),
        ("Llama", {"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "beta_fast": 2}}, "beta_fast=2"),
        ("Llama", {"attention_bias": 1}, "attention_bias=1; want true or false"),
        ("Llama", {"quantization_config": {"bits": 4}}, "packed"),
        ("Llama", {"auto_map": {"AutoModel": "mine.Mine"}}, "auto_map.*does not know"),
        ("Llama", {"attention_multiplier": 2.0}, "attention_multiplier=2.0, a field that"),
        ("Llama", {"sliding_window": 8}, "sliding_window=8, and a context of 48"),
        ("Llama", {"model_type": "mistral"}, "model_type='mistral'; want gpt2, llama, qwen2"),
        ("Llama", {"model_type": None}, "names its model_type"),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window=8"),
        ("Qwen2", {"use_mrope": True}, "use_mrope=True"),
        ("Qwen2", {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ("Qwen3", {"layer_types": ["sliding_attention"] * 2}, "use_sliding_window"),
        ("Qwen3", {"num_attention_heads": None}, "does not say num_attention_heads"),
    ],
)
def test_what_would_change_the_arithmetic_is_refused_by_name(tmp_path, family, fields, message):
    peer(tmp_path, family, GPT2 if family == "GPT2" else LLAMA)
    model = ours(tmp_path)
    change(tmp_path, **fields)
    with pytest.raises(PageLLMError, match=message):
        published_shape(tmp_path)
    if "model_type" not in fields and fields != {"num_attention_heads": None}:
        with pytest.raises(PageLLMError, match=message):
            load_published(model, tmp_path)


@pytest.mark.parametrize(
    "family, fields",
    [
        ("GPT2", {"activation_function": "gelu_pytorch_tanh", "reorder_and_upcast_attn": True}),
        ("GPT2", {"task_specific_params": {"text-generation": {}}, "_num_labels": 1}),
        ("Llama", {"pretraining_tp": 2, "partial_rotary_factor": 1, "is_llama_config": True}),
        ("Llama", {"sliding_window": 48, "hidden_act": "swish", "torch_dtype": "bfloat16"}),
        ("Llama", {"some_newer_field": None}),
        ("Qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 48, "use_mrope": False}),
    ],
)
def test_what_changes_nothing_is_taken(tmp_path, family, fields):
    peer(tmp_path, family, GPT2 if family == "GPT2" else LLAMA)
    before = ours(tmp_path)
    change(tmp_path, **fields)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(ours(tmp_path)(ids), before(ids))


def test_heads_that_do_not_go_with_their_config_are_refused(tmp_path):
    peer(tmp_path, "Llama", LLAMA)
    change(tmp_path, tie_word_embeddings=True)
    with pytest.raises(PageLLMError, match="only tied rows were built"):
        ours(tmp_path)
    peer(tmp_path / "tied", "Llama", LLAMA | {"tie_word_embeddings": True})
    change(tmp_path / "tied", tie_word_embeddings=False)
    with pytest.raises(PageLLMError, match="has no lm_head.weight"):
        ours(tmp_path / "tied")
    model = build(gpt2.SIZES["nano"], WORDS, 0, 0)
    with pytest.raises(PageLLMError, match="model_type='llama', this size 'gpt2'\n  Leave out"):
        load_published(model, tmp_path)


@pytest.fixture(scope="module")
def words(served, tmp_path_factory):
    """A tokenizer.json of 300 words, with a control token behind them."""
    folder = tmp_path_factory.mktemp("words")
    table = json.loads(
        (served / "runs" / "base" / "pretrain" / "tokenizer.json").read_text(encoding="utf-8")
    )
    table["added_tokens"] = [
        {"id": len(table["model"]["vocab"]), "content": "<|end|>", "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(table), encoding="utf-8")
    return folder / "tokenizer.json"


def config(served, runs, **options):
    common = {"data": str(served / "data"), "runs": str(runs), "run": "x", "device": "cpu"}
    return pretrain.Config(**common, steps=1, batch=4, rating_batch=4, warmup=1, **options)


@pytest.mark.parametrize("family", ["GPT2", "Qwen2"])
def test_weights_alone_are_enough(served, words, tmp_path, family, capsys):
    """Shape and words come from the directory; rows that no word has are left out and counted."""
    n = Tokenizer.from_file(str(words)).get_vocab_size()
    options = {"vocab_size": n + 5, "tie_word_embeddings": False}
    theirs = peer(tmp_path / "model", family, (GPT2 if family == "GPT2" else LLAMA) | options)
    shutil.copy(words, tmp_path / "model")
    (tmp_path / "model" / "vocab.json").write_text("{}")  # the two files count only by themselves
    (tmp_path / "model" / "merges.txt").write_text("")
    pretrain.run(config(served, tmp_path, weights=str(tmp_path / "model"), lora_rank=2))
    printed = capsys.readouterr().out
    assert f"is a {family.lower()}: 2 layers, 32 channels, 4 heads" in printed
    assert "5 word rows" in printed and "cut at 48 tokens" in printed
    sft.run(
        sft.Config(
            data=str(served / "data"),
            runs=str(tmp_path),
            run="x",
            device="cpu",
            epochs=0.5,
            max_history=4,
            max_page=10,
            k=4,
        )
    )
    policy = Policy.load(tmp_path / "x" / "sft")
    assert policy.vocab.n_words == n
    # A Llama or Qwen was published without dropout, and gets none in training either.
    state, bare = to_state(policy.model), family != "GPT2"
    chances = {m.p for m in from_state(state, 0.3).modules() if isinstance(m, torch.nn.Dropout)}
    assert chances == ({0.0} if bare else {0.3})
    assert ("trained without dropout" in printed) == bare
    trained = Policy.load(tmp_path / "x" / "sft").model.state_dict()
    rows = theirs.get_output_embeddings().weight[:n]
    assert torch.equal(trained["word_out"][:n], rows)
    with pytest.raises(PageLLMError, match=r"(?s)[0-9]+ word rows.*Leave out --bpe"):
        pretrain.run(
            config(served, tmp_path / "y", weights=str(tmp_path / "model"), bpe=str(words))
        )


def test_words_without_a_tokenizer_json_are_gpt2s_alone(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(PageLLMError, match="is of a qwen2"):
        Vocab.published(tmp_path, 1, 1)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert Vocab.published(tmp_path, 1, 1).n_words == 1


def test_weights_of_ones_own_outdo_the_size_of_a_preset(tmp_path):
    (tmp_path / "preset").write_text("--size wider --steps 7")
    mine = ["--preset", str(tmp_path / "preset")]
    assert parse(pretrain.Config, mine, verb="pretrain").size == "wider"
    taken = parse(pretrain.Config, [*mine, "--weights", "models/x"], verb="pretrain")
    assert taken.size == "auto" and taken.steps == 7
    given = parse(
        pretrain.Config, [*mine, "--weights", "models/x", "--size", "mini"], verb="pretrain"
    )
    assert given.size == "mini"
    assert pretrain.Config().size == "tiny"


def test_new_rows_begin_where_the_words_are(tmp_path):
    """At the words' mean; specials and users with their spread, items with their own.

    The common part changes no distribution over items.
    """
    peer(tmp_path, "Llama", LLAMA)
    model = ours(tmp_path)
    with torch.no_grad():
        model.word[:WORDS].add_(1.0)  # published words share a large part
        model.item.normal_(0, 0.02)
    before = model.item.detach().clone()
    fit_rows(model, WORDS, seed=0)
    words = model.word[:WORDS].detach()
    spread = (words - words.mean(0)).std()
    for rows in (model.word[WORDS:], model.user):
        assert float(rows.detach().mean()) == pytest.approx(float(words.mean()), abs=0.1)
        own = (rows.detach() - words.mean(0)).std()
        assert float(own) == pytest.approx(float(spread), rel=0.3)
    assert_close(model.item.detach() - words.mean(0), before, atol=1e-6, rtol=0)
    hidden = torch.randn(3, 32)
    with torch.no_grad():
        got = model.item_logits(hidden).log_softmax(1)
    assert_close(got, (hidden @ before.T).log_softmax(1), atol=1e-4, rtol=1e-4)
