"""Values: which items a page teaches, with which weights, and what the loss is."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from pagellm import evaluate, sft
from pagellm.data.shop import load
from pagellm.model.decode import slot_states
from pagellm.model.gpt2 import GPT2, Shape
from pagellm.model.networks import from_state, to_state
from pagellm.model.page_loss import Batch
from pagellm.model.policy import Policy
from pagellm.model.value_loss import Feedback, Values, value_loss
from pagellm.stage.config import PageLLMError

N = 6


def small(seed=0) -> GPT2:
    torch.manual_seed(seed)
    return GPT2(Shape(1, 2, 8, 32), 5, 2, N, dropout=0.0).eval()


def batch() -> Batch:
    prompt = torch.tensor([[0, 1], [2, 3]])
    item = torch.tensor([[0, 1, 2], [3, -1, -1]])
    return Batch(prompt, torch.ones(2, 2).bool(), item, item >= 0, torch.full((2, 1), -1))


VALUES = Values(
    torch.tensor([[0, 1, 2, 4], [3, 5, -1, -1]]),
    torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]),
    torch.tensor([[2.0, 1.0, 0.5, 0.3], [1.0, 0.3, 0.0, 0.0]]),
)


def test_the_loss_is_its_formula_slot_by_slot():
    """Written out in Python: an item above the slot counts no more, an empty slot never."""
    model, b = small(), batch()
    states = slot_states(model, b.prompt, b.valid, b.item, b.mask)
    share = float((VALUES.weight * VALUES.label).sum() / VALUES.weight.sum())
    total = weights = 0.0
    for row in range(2):
        for k in range(3):
            if not b.mask[row, k]:
                continue
            above = b.item[row, :k].tolist()
            for m in range(4):
                i, y = int(VALUES.item[row, m]), float(VALUES.label[row, m])
                w = float(VALUES.weight[row, m])
                if i < 0 or i in above:
                    continue
                z = float(model.item_logits(states[row, k])[i]) + math.log(share / (1 - share))
                p = 1 / (1 + math.exp(-z))
                total -= w * (y * math.log(p) + (1 - y) * math.log(1 - p))
                weights += w
    assert value_loss(model, b, VALUES).item() == pytest.approx(total / weights, rel=1e-5)


def test_a_pool_holds_the_page_all_disliked_and_strangers(shop):
    feedback = Feedback(shop, 20, 0.2)
    users = np.flatnonzero(shop.csr("train").counts() > 2)[:5]
    pages = [shop.csr("train").of(u)[0][1:] for u in users]
    rngs = [np.random.default_rng(int(u)) for u in users]
    values = feedback.draw(users, pages, rngs, "cpu")
    for row, (user, page) in enumerate(zip(users, pages, strict=True)):
        item = values.item[row].numpy()
        liked = item[values.label[row].numpy() > 0]
        assert sorted(liked) == sorted(page)
        rest = item[(item >= 0) & (values.label[row].numpy() == 0)]
        disliked, own = shop.csr("train", positive=False).of(user)[0], feedback.chosen.of(user)[0]
        assert set(disliked) <= set(rest)
        strangers = set(rest) - set(disliked)
        assert strangers and not strangers & set(own) and len(set(rest)) == len(rest)
        weight = values.weight[row].numpy()
        assert (weight[item < 0] == 0).all() and (weight[item >= 0] > 0).all()
        assert np.allclose(weight[np.isin(item, list(strangers))], 0.2)


def test_far_ratings_weigh_more_and_unknown_ones_one(shop):
    feedback = Feedback(shop, 1, 0.2)
    weight = feedback.size(np.array([1.0, 2.0, 3.0, 4.0, 5.0, np.nan]))
    assert weight[0] > weight[1] and weight[4] > weight[3] and weight[5] == 1.0
    assert weight.min() >= 0.25 and weight.max() <= 4.0


def test_untied_rows_begin_alike_learn_apart_and_are_saved():
    model = small()
    before = model.item_logits(torch.ones(1, 8))
    model.untie()
    assert torch.equal(model.item_logits(torch.ones(1, 8)), before)
    with torch.no_grad():
        model.item_out += 1.0
    assert not torch.equal(model.item_logits(torch.ones(1, 8)), before)
    again = from_state(to_state(model))
    assert torch.equal(again.item_out, model.item_out) and torch.equal(again.item, model.item)


def test_fused_rows_are_ids_and_contents_and_bake_keeps_what_is_read():
    model = small()
    ids, plain = torch.arange(N), model.item.detach().clone()
    cold = torch.tensor([False] * 5 + [True])
    content = torch.randn(N, 3)
    model.fuse(content, cold, 0.5)
    fallback = plain.mean(0)
    assert_close(model.item_rows(ids)[:5], plain[:5])  # the map begins at 0
    assert_close(model.item_rows(ids)[5], fallback)
    with torch.no_grad():
        model.content_map += 0.3
    want = torch.where(cold[:, None], fallback, plain) + content @ model.content_map
    assert_close(model.item_rows(ids), want)
    model.train()
    torch.manual_seed(0)
    drawn = model.item_rows(torch.zeros(4000, dtype=torch.long)) - content[0] @ model.content_map
    away = (drawn - fallback).abs().amax(1) < 1e-6
    assert 0.45 < away.float().mean() < 0.55 and assert_close(drawn[~away][0], plain[0]) is None
    model.eval()
    logits = model.item_logits(torch.ones(1, 8))
    model.bake()
    assert model.content_map is None and torch.equal(model.item_rows(ids), model.item)
    assert_close(model.item_logits(torch.ones(1, 8)), logits)
    assert "content_map" not in to_state(model)["weights"]


def test_sft_learns_values_untied_and_fused_and_evaluates(served, tmp_path):
    where = {"data": str(served / "data"), "runs": str(tmp_path), "device": "cpu"}
    tmp_path.joinpath("base").symlink_to(served / "runs" / "base")
    options = {"objective": "value", "untie": True, "id_dropout": 0.2, "start_run": "base"}
    small = {"epochs": 1, "batch": 16, "eval_every": 2, "max_history": 8, "warmup": 1, "k": 6}
    sft.run(sft.Config(run="v", mode="hybrid", **options, **small, **where))
    policy = Policy.load(tmp_path / "v" / "sft")
    assert policy.model.item_out is not None and policy.model.content_map is None
    shop = load(served / "data" / "synthetic")
    users = np.arange(5)
    pages = policy.rank(users, shop.csr("train"), shop.csr("train"), 6, 20, "hybrid")
    assert (pages.item[:, :6] >= 0).all()
    assert evaluate.Config(mode="hybrid").mode == "hybrid"
    with pytest.raises(PageLLMError, match="sampled_items at 0"):
        sft.Config(objective="value", sampled_items=8)
