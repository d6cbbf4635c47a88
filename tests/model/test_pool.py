"""The pooled start beside a trunk: pages of the history's mean row, whatever computes them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from pagellm import pretrain, sft
from pagellm.model import lora
from pagellm.model.backbone import KVCache
from pagellm.model.decode import LegalItems, beam, greedy, slot_states
from pagellm.model.gpt2 import Shape
from pagellm.model.llama import Shape as LlamaShape
from pagellm.model.networks import build, from_state, save_published, to_state
from pagellm.model.policy import Policy
from pagellm.model.vocab import Vocab
from pagellm.serving import export
from pagellm.serving.embeddings import Embeddings
from pagellm.serving.recommender import Ask, Recommender
from pagellm.serving.sources import Sources
from pagellm.stage.config import PageLLMError

SHAPES = (Shape(2, 2, 16, 40), LlamaShape(2, 4, 2, 16, 24, 40))
WORDS, USERS, ITEMS = 12, 4, 30
FIRST = WORDS + USERS


def make(shape, trunk=0.0):
    torch.manual_seed(0)
    model = build(shape, WORDS, USERS, ITEMS, 0.0).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    model.add_pool(trunk)
    return model


PROMPT = torch.tensor([[0, 1, FIRST + 3, 5, FIRST + 8, 5, 2], [1, FIRST + 9, 5, FIRST, 5, 6, 2]])
VALID = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1] * 7]).bool()
HISTORY = ([3, 8], [9, 0])


@pytest.mark.parametrize("shape", SHAPES)
def test_first_pages_are_those_of_the_mean_row(shape):
    """Item logits before every slot are the item rows times the mean of the history's rows."""
    model = make(shape)
    rows = F.normalize(model.item.detach(), dim=1)
    mean = torch.stack([F.normalize(rows[some].sum(0), dim=0) for some in HISTORY]) * 4.0
    pages = greedy(model, PROMPT, VALID, LegalItems(torch.full((2, 1), -1), ITEMS), 5)
    with torch.no_grad():
        states = slot_states(model, PROMPT, VALID, pages.item, pages.mask)
    assert_close(states, mean[:, None].expand(-1, 6, -1), atol=1e-5, rtol=1e-5)
    order = (mean @ model.item.detach().T).argsort(1, descending=True)[:, :5]
    assert torch.equal(pages.item, order)


@pytest.mark.parametrize("shape", SHAPES)
def test_cache_beams_and_padding_see_the_same_blend(shape):
    model = make(shape, trunk=0.7)
    with torch.no_grad():
        whole = model(PROMPT, VALID)
        cache = KVCache(shape, 2, 7, model.word)
        parts = [model(PROMPT[:, a:b], VALID[:, :b], cache) for a, b in ((0, 4), (4, 7))]
        assert_close(torch.cat(parts, 1)[VALID], whole[VALID], atol=1e-5, rtol=1e-5)
        assert_close(whole[0, 1:], model(PROMPT[:1, 1:])[0], atol=1e-5, rtol=1e-5)
        assert_close(model(PROMPT, VALID, first=4), whole[:, 4:], atol=1e-5, rtol=1e-5)
        plain = model(PROMPT, VALID, plain=True)
    assert torch.equal(whole[:, 0], plain[:, 0])  # no item was read yet
    assert (whole[:, -1] - plain[:, -1]).abs().max() > 0.1
    legal = [LegalItems(torch.full((2, 1), -1), ITEMS) for _ in range(2)]
    one = greedy(model, PROMPT, VALID, legal[0], 4)
    assert torch.equal(beam(model, PROMPT, VALID, legal[1], 4, width=1).item, one.item)
    again = from_state(to_state(model)).eval()
    with torch.no_grad():
        assert torch.equal(again(PROMPT, VALID), whole)


def test_the_trunk_gets_its_say_by_learning():
    model = make(SHAPES[1])
    lora.adapt(model, 2, 4.0, "q,v", 3)
    model.item_logits(model(PROMPT, VALID)[:, -1]).logsumexp(1).sum().backward()
    assert model.blend.grad[0].abs().sum() > 0 and model.item.grad.abs().sum() > 0
    assert lora.learns("blend") and to_state(model)["weights"]["blend"].shape == (2, 16)


def test_from_published_weights_to_pages_that_are_served(served, tmp_path):
    """Pretrain, SFT, and a page on request.

    Transformers has no network for it, which the command says before it reads the shop. Embeddings,
    which it then names, are the policy's own.
    """
    vocab = Vocab.load(served / "runs" / "base" / "sft")
    torch.manual_seed(3)
    save_published(build("llama-nano", vocab.n_words, 0, 0), tmp_path / "model", vocab.n_words)
    vocab.save(tmp_path / "model")
    common = {"data": str(served / "data"), "runs": str(tmp_path), "run": "x", "device": "cpu"}
    pretrain.run(
        pretrain.Config(
            **common,
            weights=str(tmp_path / "model"),
            pool=True,
            rows="als",
            steps=2,
            batch=4,
            rating_batch=4,
            lora_rank=2,
        )
    )
    sft.run(sft.Config(**common, epochs=0.2, max_history=8, k=4, max_page=10))
    policy = Policy.load(tmp_path / "x" / "sft")
    rec = Recommender.load(Sources(**common))
    shop, users = rec.shop, np.arange(3)
    pages, _ = policy.write(users, rec.history, shop.csr(None, positive=None), 4)
    for _ in range(2):  # read, then from the cache of prompts
        answers = rec.answers([Ask(user=shop.user_ids[u], k=4) for u in users])
        found = [[slot["item"] for slot in answer["items"]] for answer in answers]
        assert found == [[shop.catalogue.ids[i] for i in row] for row in pages.item.tolist()]
    unread = common | {"data": str(tmp_path / "nowhere")}
    with pytest.raises(PageLLMError, match="no network of transformers computes.*\n.*embeddings"):
        export.run(export.Config(**unread, format="transformers"))
    assert sorted(one.name for one in (tmp_path / "x").iterdir()) == ["pretrain", "sft"]
    export.run(export.Config(**common, dtype="float32"))
    read = Embeddings(tmp_path / "x" / "export-sft")
    prompt, valid = policy.prompt(users, [shop.csr(None).of(u) for u in users])
    with torch.no_grad():
        logits = policy.model.item_logits(policy.model(prompt, valid)[:, -1])
    got = read.matrix("user_content")[:3] @ read.matrix("item_token").T
    assert_close(torch.from_numpy(got), logits, atol=1e-4, rtol=1e-4)
