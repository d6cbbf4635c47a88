"""Facts of items in page prompts: which words, for whom, and that every stage writes the same."""

import numpy as np
import pytest

from pagellm import sft
from pagellm.data.shop import Catalogue, load
from pagellm.model.facts import LEVELS, LONGEST, item_facts, price_levels
from pagellm.model.policy import Policy
from pagellm.model.prompts import Prompts
from pagellm.model.vocab import Vocab
from pagellm.stage.config import PageLLMError

PRICES = [1.0, np.nan, 3.0, 4.0, 5.0, 2.0]
CATALOGUE = Catalogue.of(
    ids=list("abcdef"),
    title=["x"] * 6,
    brand=["Acme", "", "Acme", "Borealis and Daughters of the North", "", ""],
    categories=[("Drums",)] * 6,
    leaf=["Drums", "Drums", "Flutes", "", "Drums", "Drums"],
    description=[""] * 6,
    price=PRICES,
)


def vocab(names=()) -> Vocab:
    made = Vocab.train(["Drums Flutes Acme Borealis history " + " ".join(LEVELS)] * 3, 5, 6, 400)
    made.show(names, CATALOGUE)
    return made


def test_price_levels_are_fifths_of_the_known_prices():
    assert price_levels(np.array(PRICES)).tolist() == [0, -1, 2, 3, 4, 1]
    assert price_levels(np.full(3, np.nan)).tolist() == [-1, -1, -1]


def test_facts_are_words_in_the_order_asked_for_and_unknown_ones_are_left_out():
    words = vocab()
    said = [words.decode(x) for x in item_facts(words.words, CATALOGUE, ("price", "category"))]
    assert said[0] == " cheapest Drums" and said[1] == " Drums" and said[3] == " dear"
    long = item_facts(words.words, CATALOGUE, ("brand",))[3]
    assert len(long) == LONGEST and words.decode(long).startswith(" Borealis"[:4])
    assert item_facts(words.words, CATALOGUE, ("brand",))[4] == []


def test_a_prompt_shows_the_facts_of_each_item_before_its_rating():
    names = ("category", "price")
    prompts = Prompts(vocab(names), room=60, max_history=3)
    history = np.array([0, 3, 1]), np.array([5.0, np.nan, 2.0])
    ids = prompts.page(2, *history)
    assert prompts.vocab.decode(ids) == (
        "<user 2> history<item 0> Drums cheapest<r5><item 3> dear<r?><item 1> Drums<r2><page>"
    )
    assert len(ids) <= prompts.page_room
    assert Prompts(vocab(), room=60).page(2, *history) == [x for x in ids if x not in words(names)]


def words(names) -> set[int]:
    return {token for some in item_facts(vocab().words, CATALOGUE, names) for token in some}


def test_a_vocabulary_keeps_them(tmp_path):
    vocab(("brand", "price")).save(tmp_path)
    again = Vocab.load(tmp_path)
    assert again.shown == ("brand", "price") and again.facts == vocab(("brand", "price")).facts
    vocab().save(tmp_path)
    assert Vocab.load(tmp_path).facts == () and "shown" not in (tmp_path / "vocab.json").read_text()


def test_sft_learns_from_such_prompts_and_its_policy_writes_them(served, tmp_path):
    where = {"data": str(served / "data"), "runs": str(tmp_path), "run": "facts", "k": 6}
    (tmp_path / "facts").mkdir()
    (tmp_path / "facts" / "pretrain").symlink_to(served / "runs" / "base" / "pretrain")
    sft.run(sft.Config(show="category, brand", epochs=1.0, eval_users=20, preset="none", **where))
    policy = Policy.load(tmp_path / "facts" / "sft")
    shop = load(served / "data" / "synthetic")
    assert policy.vocab.shown == ("category", "brand")
    prompt = policy.vocab.decode(policy.prompts.page(0, [3], [4.0]))
    first = policy.vocab.decode(policy.vocab.words(f" {shop.catalogue.leaf[3]}")[:LONGEST])
    assert f"<item 3>{first}" in prompt and prompt.endswith("<r4><page>")


def test_what_is_no_fact_is_refused():
    with pytest.raises(PageLLMError, match="some of category,brand,price"):
        sft.Config(show="category,colour")
