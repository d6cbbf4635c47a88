"""GPT-2: equal to a published implementation, causal, the same with cache and padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from pagellm.model.backbone import KVCache
from pagellm.model.gpt2 import GPT2, SIZES, Shape
from pagellm.model.networks import from_state, load_published, to_state
from pagellm.stage.config import PageLLMError

SHAPE = Shape(n_layer=3, n_head=2, n_embd=16, n_ctx=24)


def make(seed=0, words=11, users=4, items=7, scale=10.0):
    model = GPT2(SHAPE, words, users, items, generator=torch.Generator().manual_seed(seed)).eval()
    with torch.no_grad():  # far from the start, where attention is nearly uniform and mistakes hide
        for name, weight in model.named_parameters():
            if ".ln_" not in f".{name}":
                weight.normal_(
                    0, 0.02 * scale, generator=torch.Generator().manual_seed(seed + len(name))
                )
    return model


def published(model: GPT2):
    """transformers' GPT-2 with our random weights, over the whole id space."""
    transformers = pytest.importorskip(
        "transformers", reason="compare with transformers: pip install -e '.[dev]'"
    )
    size = model.n_words + model.n_users + model.n_items
    config = transformers.GPT2Config(
        vocab_size=size, n_positions=24, n_embd=16, n_layer=3, n_head=2
    )
    other = transformers.GPT2LMHeadModel(config).eval()
    weights = dict(other.named_parameters())
    with torch.no_grad():
        weights["transformer.wte.weight"].copy_(torch.cat([model.word, model.user, model.item]))
        weights["transformer.wpe.weight"].copy_(model.wpe)
        for name, weight in model.named_parameters():
            if name.startswith(("h.", "ln_f")):
                target = weights[f"transformer.{name}"]
                linear = weight.ndim == 2
                target.copy_(weight.T if linear else weight)
    return other


def all_logits(model, hidden):
    return hidden @ torch.cat([model.word, model.user, model.item]).T


def test_logits_equal_transformers():
    model = make()
    other = published(model)
    ids = torch.randint(0, 22, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_close(all_logits(model, model(ids)), other(ids).logits, atol=1e-4, rtol=1e-4)
        item = model.item_logits(model(ids))
        assert_close(item, other(ids).logits[..., 15:], atol=1e-4, rtol=1e-4)
        assert_close(
            model.word_logits(model(ids)), other(ids).logits[..., :11], atol=1e-4, rtol=1e-4
        )


def test_logits_equal_transformers_with_left_padding_and_cache():
    model = make(seed=2)
    other = published(model)
    ids = torch.randint(0, 22, (3, 9), generator=torch.Generator().manual_seed(3))
    valid = torch.tensor([[0] * n + [1] * (9 - n) for n in (0, 4, 2)]).bool()
    position = (valid.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        want = other(ids, attention_mask=valid.long(), position_ids=position).logits[valid]
        assert_close(all_logits(model, model(ids, valid))[valid], want, atol=1e-4, rtol=1e-4)
        cache = KVCache(SHAPE, 3, 9, model.wpe)
        parts = [model(ids[:, :5], valid[:, :5], cache)]
        parts += [model(ids[:, t : t + 1], valid[:, : t + 1], cache) for t in range(5, 9)]
        assert_close(all_logits(model, torch.cat(parts, 1))[valid], want, atol=1e-4, rtol=1e-4)


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


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 8), st.data())
def test_no_state_sees_a_later_token(length, data):
    model = make(seed=7)
    at = data.draw(st.integers(1, length - 1))
    ids = torch.randint(0, 22, (2, length), generator=torch.Generator().manual_seed(length))
    other = ids.clone()
    other[:, at] = (other[:, at] + 1) % 22
    with torch.no_grad():
        before, after = model(ids), model(other)
    assert torch.equal(before[:, :at], after[:, :at])
    assert not torch.allclose(before[:, at:], after[:, at:])


def test_every_id_reads_its_own_row():
    """Words, users and items are three tables, and an id reads exactly one row of one of them."""
    model = make(seed=9)
    table = torch.cat([model.word, model.user, model.item])
    assert torch.equal(model.embed(torch.arange(22)), table)
    model.zero_grad()
    model.embed(torch.tensor([3, 12, 20])).sum().backward()
    assert model.word.grad.abs().sum(1).nonzero().flatten().tolist() == [3]
    assert model.user.grad.abs().sum(1).nonzero().flatten().tolist() == [1]
    assert model.item.grad.abs().sum(1).nonzero().flatten().tolist() == [5]


def test_state_round_trip_and_context_limit():
    model = make(seed=11)
    again = from_state(to_state(model)).eval()
    ids = torch.arange(6)[None]
    assert torch.equal(model(ids), again(ids))
    with pytest.raises(ValueError, match="25 tokens do not fit in a context of 24"):
        model(torch.zeros(1, 25, dtype=torch.long))
    with pytest.raises(ValueError, match="do not fit"):
        model(ids, cache=KVCache(SHAPE, 1, 5, model.wpe))


def test_initialisation_follows_gpt2():
    model = GPT2(SIZES["small"], 500, 20, 300)
    assert model.word.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.h[0].attn.c_proj.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert model.h[0].mlp.c_fc.bias.abs().max() == 0
    assert model.ln_f.weight.min() == 1
    assert {SIZES["gpt2"].n_layer, SIZES["gpt2"].n_head} == {12} and SIZES["gpt2"].n_embd == 768


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_published_weights_load_from_a_local_path(tmp_path, form):
    transformers = pytest.importorskip(
        "transformers", reason="published weights: pip install -e '.[dev]'"
    )
    torch.manual_seed(0)
    other = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=9, n_positions=24, n_embd=16, n_layer=3, n_head=2)
    ).eval()
    other.save_pretrained(tmp_path, safe_serialization=form == "safetensors")
    if form == "bin" and not (tmp_path / "pytorch_model.bin").exists():
        torch.save(other.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    model = make(seed=13)
    users = model.user.clone()
    load_published(model, tmp_path)
    ids = torch.randint(0, 9, (2, 7))
    with torch.no_grad():
        assert_close(
            model.word_logits(model(ids))[..., :9], other(ids).logits, atol=1e-4, rtol=1e-4
        )
    assert torch.equal(model.user, users)
    with pytest.raises(PageLLMError, match="n_layer=3, this size 2"):
        load_published(GPT2(Shape(2, 2, 16, 24), 11, 1, 1), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(
        PageLLMError, match="not a gpt2 of this size: missing \\[\\], unknown .*h.2"
    ):
        load_published(GPT2(Shape(2, 2, 16, 24), 11, 1, 1), tmp_path)
    with pytest.raises(PageLLMError, match="9 word rows, the tokeniser knows 8"):
        load_published(model, tmp_path, n_words=8)
    with pytest.raises(PageLLMError, match="do not fit"):
        load_published(GPT2(SHAPE, 5, 1, 1), tmp_path)
    with pytest.raises(PageLLMError, match="no weights"):
        (tmp_path / "empty").mkdir()
        load_published(model, tmp_path / "empty")


def test_pool_starts_as_the_mean_of_the_history():
    """Item logits before every slot are item rows times the mean of the history's normalised rows.

    Items on the page do not change them.
    """
    model = GPT2(Shape(2, 2, 16, 24), 11, 4, 30, generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        model.item.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    model.pool()
    history, page = torch.tensor([[3, 8, 21]]), torch.tensor([[4, 9, 2]])
    prompt = torch.cat([torch.tensor([[1, 2]]), 15 + history, torch.tensor([[5]])], 1)
    with torch.no_grad():
        states = model(torch.cat([prompt, 15 + page], 1), placed=6)[0, 5:]
        mean = torch.nn.functional.layer_norm(model.item[history[0]], (16,)).mean(0)
        want = torch.nn.functional.layer_norm(mean, (16,))
    assert_close(states, want.expand(4, 16), atol=0.2, rtol=0)
    again = from_state(to_state(model))
    assert torch.equal(again.gate, model.gate)
    with torch.no_grad():
        model.gate.fill_(1.0)
        assert (model(torch.cat([prompt, 15 + page], 1), placed=6)[0, 6:] - want).abs().max() > 0.3
