"""Llama by hand: equal to a published implementation, the same with cache and padding, and its
weights are read as they were written.
"""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from pagellm.kernels import bench
from pagellm.model import gpt2
from pagellm.model.backbone import KVCache
from pagellm.model.llama import LLAMA3, SIZES, Llama, RMSNorm, Shape, frequencies, rotate
from pagellm.model.networks import (
    build,
    from_state,
    load_published,
    save_published,
    to_state,
    trunk_of,
)
from pagellm.model.weights import read_safetensors, write_safetensors
from pagellm.stage.config import PageLLMError

# A context of 16 before scaling puts some waves below, some above and some between the two bounds.
SCALING = (32.0, 1.0, 4.0, 16)
SHAPE = Shape(
    n_layer=3, n_head=4, n_kv_head=2, n_embd=32, n_hidden=48, n_ctx=40, theta=500.0, scaling=SCALING
)
WORDS, USERS, ITEMS = 11, 4, 7
# From transformers 4.57.6: see the tests that use them.
GOLDEN_FREQUENCIES = [0.016560441, 0.00042955671, 9.4183065e-08]
GOLDEN_LOGITS = [
    [
        [-0.7014815, 0.4608661, 0.4893063, -0.6939335],
        [0.2053767, -0.2260841, -0.7572661, 0.8990457],
    ],
    [
        [-0.1233801, 0.02795422, 1.06257, -0.5423778],
        [-0.1139311, -0.01233459, 1.154517, -0.7598154],
    ],
]


def make(shape=SHAPE, seed=0, words=WORDS):
    model = Llama(shape, words, USERS, ITEMS, generator=torch.Generator().manual_seed(seed)).eval()
    with torch.no_grad():  # far from the start, where attention is nearly uniform and mistakes hide
        for at, weight in enumerate(model.parameters()):
            g = torch.Generator().manual_seed(seed + at)
            weight.normal_(0, 0.2, generator=g) if weight.ndim > 1 else weight.uniform_(
                0.5, 1.5, generator=g
            )
    return model


def all_logits(model, hidden):
    return hidden @ torch.cat([model.word, model.user, model.item]).T


def published(model: Llama, folder):
    """transformers' Llama, read from the files that we write.

    Our words, users and items are its words.
    """
    transformers = pytest.importorskip(
        "transformers", reason="compare with transformers: pip install -e '.[dev]'"
    )
    size = model.n_words + model.n_users + model.n_items
    whole = Llama(model.shape, size, 0, 0)
    with torch.no_grad():
        for name, weight in whole.named_parameters():
            if name == "word":
                weight.copy_(torch.cat([model.word, model.user, model.item]))
            elif name not in ("user", "item"):
                weight.copy_(dict(model.named_parameters())[name])
    save_published(whole, folder, size, shard_mb=0.01)
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("scaling", [None, SCALING, (8.0, 2.0, 5.0, 30)])
def test_logits_equal_transformers(tmp_path, scaling):
    model = make(Shape(3, 4, 2, 32, 48, 40, theta=500.0, scaling=scaling))
    other = published(model, tmp_path)
    ids = torch.randint(0, 22, (3, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = other(ids).logits
        assert_close(all_logits(model, model(ids)), want, atol=1e-4, rtol=1e-4)
        assert_close(model.item_logits(model(ids)), want[..., 15:], atol=1e-4, rtol=1e-4)
        assert_close(model.word_logits(model(ids)), want[..., :11], atol=1e-4, rtol=1e-4)


def test_logits_equal_transformers_with_left_padding_and_cache(tmp_path):
    model = make(seed=2)
    other = published(model, tmp_path)
    ids = torch.randint(0, 22, (3, 20), generator=torch.Generator().manual_seed(3))
    valid = torch.tensor([[0] * n + [1] * (20 - n) for n in (0, 13, 5)]).bool()
    position = (valid.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        want = other(ids, attention_mask=valid.long(), position_ids=position).logits[valid]
        assert_close(all_logits(model, model(ids, valid))[valid], want, atol=1e-4, rtol=1e-4)
        cache = KVCache(SHAPE, 3, 20, model.word)
        parts = [model(ids[:, :15], valid[:, :15], cache)]
        parts += [model(ids[:, t : t + 1], valid[:, : t + 1], cache) for t in range(15, 20)]
        assert_close(all_logits(model, torch.cat(parts, 1))[valid], want, atol=1e-4, rtol=1e-4)
    assert cache.keys[0].shape == (3, 2, 20, 8)  # two heads of keys, not four


def test_the_rotary_frequencies_are_llama_3s():
    """They equal transformers' table for Llama 3.2 1B.

    Where transformers is not installed: its first, middle and last numbers.
    """
    got = frequencies(64, LLAMA3["theta"], LLAMA3["scaling"])
    assert got[0] == 1.0
    assert_close(got[[10, 16, 31]], torch.tensor(GOLDEN_FREQUENCIES), rtol=1e-5, atol=0)
    transformers = pytest.importorskip(
        "transformers", reason="compare with transformers: pip install -e '.[dev]'"
    )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(**Llama.published_config(SIZES["llama-3.2-1b"]))
    want, scale = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    assert scale == 1.0
    assert_close(got, want, rtol=1e-6, atol=0)


def by_formula(model):
    """Weights that any machine makes alike: no generator."""
    with torch.no_grad():
        for at, weight in enumerate(model.parameters()):
            i = torch.arange(weight.numel(), dtype=torch.float64)
            wave = torch.sin(0.7 * i + at) + torch.cos(0.13 * i * (at + 1))
            weight.copy_((0.3 * wave if weight.ndim > 1 else 1 + 0.2 * wave).view(weight.shape))
    return model.eval()


def test_logits_equal_those_that_transformers_gave():
    """The logits that transformers 4.57 gave, for where it is not installed.

    Of the first four words, weights by a formula, one row left-padded by two.
    """
    model = by_formula(
        Llama(Shape(2, 4, 2, 16, 24, 32, theta=100.0, scaling=(4.0, 1.0, 3.0, 8)), 9, 0, 0)
    )
    ids = torch.tensor([[1, 5, 2, 8, 3, 7], [0, 0, 4, 6, 1, 2]])
    valid = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]]).bool()
    with torch.no_grad():
        got = model.word_logits(model(ids, valid))[:, [3, 5], :4]
    assert_close(got, torch.tensor(GOLDEN_LOGITS), rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 8), st.integers(0, 5), st.integers(0, 5), st.integers(0, 2**31))
def test_a_padded_row_equals_the_row_alone(length, left, right, seed):
    model = make(seed=5)
    g = torch.Generator().manual_seed(seed)
    row = torch.randint(0, 22, (1, length), generator=g)
    junk = torch.randint(0, 22, (1, left + right), generator=g)
    ids = torch.cat([junk[:, :left], row, junk[:, left:]], 1)
    valid = torch.zeros(1, left + length + right, dtype=torch.bool)
    valid[:, left : left + length] = True
    with torch.no_grad():
        assert_close(model(ids, valid)[:, left : left + length], model(row), atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2**31))
def test_rotated_products_know_distances_only(p, q, shift, seed):
    """<R_p x, R_q y> depends on p - q alone, and rotation keeps lengths."""
    x, y = torch.randn(
        2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    rate = frequencies(16, 500.0, SCALING).double()

    def turned(z, at):
        return rotate(z, (at * rate).cos()[None, None, None], (at * rate).sin()[None, None, None])

    assert_close(
        (turned(x, p) * turned(y, q)).sum(), (turned(x, p + shift) * turned(y, q + shift)).sum()
    )
    assert_close(turned(x, p).norm(), x.norm())


def test_the_norm_makes_the_mean_square_one_and_forgets_scale():
    norm = RMSNorm(16, 1e-12)
    x = torch.randn(5, 16)
    assert_close(norm(x).square().mean(-1), torch.ones(5))
    assert_close(norm(x * 7.0), norm(x))


def test_state_round_trip_initialisation_and_sizes():
    model = make(seed=11)
    again = from_state(to_state(model)).eval()
    ids = torch.arange(6)[None]
    assert torch.equal(model(ids), again(ids)) and isinstance(again, Llama)
    with pytest.raises(ValueError, match="41 tokens do not fit in a context of 40"):
        model(torch.zeros(1, 41, dtype=torch.long))
    with pytest.raises(PageLLMError, match="kind 'mamba'"):
        from_state({**to_state(model), "trunk": "mamba"})
    fresh = build("llama-small", 500, 20, 300)
    assert fresh.h[0].attn.o_proj.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert fresh.h[0].mlp.gate_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert fresh.ln_f.weight.min() == 1
    with pytest.raises(ValueError, match="multiple"):
        Shape(1, 3, 2, 12, 4, 8)
    # The published counts of parameters: 1.24 and 3.21 billion with 128,256 words.
    for size, billions in (("llama-3.2-1b", 1.2358), ("llama-3.2-3b", 3.2127)):
        with torch.device("meta"):
            counted = sum(p.numel() for p in Llama(SIZES[size], 128_256, 0, 0).parameters())
        assert counted / 1e9 == pytest.approx(billions, abs=1e-4)


def test_published_weights_load_from_one_file_and_from_shards(tmp_path):
    source = make(seed=3, words=9)
    for folder, shard_mb in (("whole", 0.0), ("shards", 0.01)):
        save_published(source, tmp_path / folder, 9, shard_mb)
        model = make(seed=13)  # 11 words: two special tokens behind the published 9
        mine = {name: w.clone() for name, w in model.named_parameters()}
        load_published(model, tmp_path / folder, n_words=9)
        ids = torch.randint(0, 9, (2, 7))
        with torch.no_grad():
            assert torch.equal(model(ids), source(ids))
        assert torch.equal(model.user, mine["user"]) and torch.equal(
            model.word[9:], mine["word"][9:]
        )
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_attention_heads": 2}, "num_attention_heads=2, this size 4"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
            "rope_scaling",
        ),
        ({"rope_scaling": None}, "rope_scaling=None"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps"),
        ({"model_type": "mistral"}, "mistral"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        (
            {
                "rope_scaling": None,
                "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            },
            "rope_scaling=None",
        ),
    ],
)
def test_a_config_that_is_not_this_size_is_refused(tmp_path, change, message):
    """Heads and rotary scaling leave no trace in the shapes of weights."""
    model = make()
    save_published(model, tmp_path, WORDS)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(PageLLMError, match=message):
        load_published(model, tmp_path)
    newer = {"rope_theta": 500.0, **config.pop("rope_scaling")}
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"rope_parameters": newer, "head_dim": None})
    )
    load_published(model, tmp_path)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    model, file = make(), tmp_path / "model.safetensors"
    save_published(model, tmp_path, WORDS)
    good = {name: w.clone() for name, w in read_safetensors(file).items()}
    write_safetensors(
        file,
        good
        | {
            "lm_head.weight": good["model.embed_tokens.weight"],
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        },
    )
    load_published(model, file)
    q = "model.layers.1.self_attn.q_proj.weight"
    for change, message in (
        ({"lm_head.weight": torch.zeros(WORDS, 32)}, "only tied"),
        ({"model.layers.3.mlp.up_proj.weight": good[q]}, "unknown .*layers.3"),
        ({q: torch.zeros(16, 32)}, r"q_proj.weight is \(16, 32\)"),
        ({q: torch.zeros(32, 32, dtype=torch.int32)}, "int32"),
    ):
        write_safetensors(file, good | change)
        with pytest.raises(PageLLMError, match=message):
            load_published(model, file)
    del good[q]
    write_safetensors(file, good)
    with pytest.raises(PageLLMError, match="missing .*layers.1.self_attn.q_proj"):
        load_published(model, file)


@pytest.mark.parametrize("size", ["tiny", "llama-tiny"])
@pytest.mark.parametrize("first", [1, 4, 6])
@pytest.mark.parametrize("padded, past", [(False, 0), (True, 0), (False, 3), (True, 3)])
def test_states_from_a_column_on_are_those_columns_of_all_states_and_so_are_their_gradients(
    size, first, padded, past
):
    # in float32 sums differ with the number of threads
    model = build(size, WORDS, USERS, ITEMS, 0.0).double()
    ids = torch.randint(0, 22, (2, past + 7), generator=torch.Generator().manual_seed(1))
    valid = (torch.arange(past + 7) >= torch.tensor([[0], [2]])) if padded else None

    def states(**options):
        cache = KVCache(model.shape, 2, past + 7, model.word) if past else None
        if past:
            with torch.no_grad():
                model(ids[:, :past], valid[:, :past] if padded else None, cache)
        return model(ids[:, past:], valid, cache, **options)

    found = []
    for hidden in (states()[:, first:], states(first=first)):
        grads = torch.autograd.grad(
            (hidden * hidden.detach().cos()).sum(),
            list(model.parameters()),
            allow_unused=True,
            materialize_grads=True,
        )
        found.append([hidden, *grads])
    assert found[1][0].shape == (2, 7 - first, model.shape.n_embd)
    for x, y in zip(*found, strict=True):
        assert_close(x, y, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("size", ["tiny", "llama-tiny"])
@pytest.mark.parametrize("anew", [False, True])
def test_the_last_block_computes_only_the_columns_asked_for(size, anew):
    model, rows = build(size, WORDS, USERS, ITEMS, 0.0), []
    model.checkpoint_blocks = anew
    for block in model.h:
        block.mlp.register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    model(torch.zeros(1, 9, dtype=torch.long), first=6).sum().backward()
    assert rows[: len(model.h)] == [9] * (len(model.h) - 1) + [3]


@pytest.mark.parametrize("size", ["tiny", "llama-tiny"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_blocks_give_the_same_gradients_to_the_bit(size, dropout):
    ids = torch.randint(0, 70, (4, 19), generator=torch.Generator().manual_seed(0))
    valid = torch.arange(19)[None] >= torch.tensor([0, 3, 7, 1])[:, None]
    torch.manual_seed(1)
    model = build(size, 40, 10, 20, dropout).train()
    found = []
    for model.checkpoint_blocks in (False, True):
        torch.manual_seed(2)
        model.zero_grad()
        model.item_logits(model(ids, valid))[valid].logsumexp(-1).sum().backward()
        found.append([p.grad.clone() for p in model.parameters()] + [torch.rand(1)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][0].abs().sum() > 0


def test_a_cache_is_filled_once_also_where_blocks_are_checkpointed():
    """Computing a block again would write its columns again, behind the first."""
    model = make()
    model.checkpoint_blocks = True
    ids = torch.randint(0, 22, (2, 6), generator=torch.Generator().manual_seed(0))
    cache = KVCache(SHAPE, 2, 6, model.word.detach())
    hidden = model(ids, None, cache)
    assert_close(hidden, model(ids), atol=1e-5, rtol=1e-5)
    hidden.sum().backward()
    assert cache.length == 6


@pytest.mark.parametrize("shape", [gpt2.Shape(6, 4, 128, 128), Shape(6, 4, 2, 128, 344, 128)])
def test_checkpointed_blocks_take_less_memory(shape):
    """Six layers keep their inputs and one layer's insides instead of six: well below half."""
    model = trunk_of(shape)(shape, 300, 0, 20, 0.1).train()
    ids = torch.randint(0, 300, (12, 128))
    peak = []
    for model.checkpoint_blocks in (False, True):
        model(ids).sum().backward()  # gradients have their memory before the measurement
        peak.append(bench.peak_megabytes(lambda: model(ids).sum().backward(), "cpu"))
    if None in peak:
        pytest.skip("this system keeps no resettable high-water mark")
    assert peak[1] < 0.5 * peak[0], peak
