"""The study of prompts: its rows, what each tells the network, and its table."""

from dataclasses import replace

import numpy as np
import pytest

from experiments import prompt_study
from pagellm import sft
from pagellm.data.shop import load
from pagellm.model.policy import Policy
from pagellm.pages.truth import PageMaker
from pagellm.stage.config import Options, PageLLMError
from pagellm.stage.files import slug


def test_rows_are_those_of_what_the_shop_knows(shop):
    rows = prompt_study.rows_of(shop)
    assert rows["items"] == {"use_user": False, "use_ratings": False}
    assert rows["all facts"]["show"] == "category,brand,price" and rows["all facts"]["use_ratings"]
    blank = ["" for _ in shop.catalogue.leaf]
    bare = replace(
        shop,
        rating=np.full_like(shop.rating, np.nan),
        time=np.zeros_like(shop.time),
        catalogue=replace(
            shop.catalogue, leaf=blank, brand=blank, price=np.full(shop.n_items, np.nan)
        ),
    )
    assert list(prompt_study.rows_of(bare)) == ["items", "last 6 items", "user"]


def test_every_row_is_trained_with_its_own_prompts(served, tmp_path, capsys, monkeypatch):
    wanted = ("items", "category", "cut by time", "cut by time, time")
    every = prompt_study.rows_of
    monkeypatch.setattr(
        prompt_study, "rows_of", lambda shop: {k: v for k, v in every(shop).items() if k in wanted}
    )
    config = prompt_study.Config(
        seeds=1,
        periods=4,
        preset="none",
        data=str(served / "data"),
        runs=str(tmp_path),
        pretrain=Options("--size nano --steps 2 --words 300"),
        sft=Options("--epochs 1 --k 6 --eval_users 10 --max_history 8"),
        evaluate=Options("--k 6"),
    )
    records = prompt_study.run(config)
    assert {r["variant"] for r in records} == set(wanted)
    assert "paired difference to 'items'" in capsys.readouterr().out

    def policy(name):
        return Policy.load(tmp_path / "prompts" / slug(name) / "synthetic-s0" / "sft")

    assert policy("items").vocab.shown == () and policy("category").vocab.shown == ("category",)
    assert not policy("items").style.use_user and policy("cut by time, time").vocab.times == 4


def test_a_history_is_as_long_as_the_context_holds(served, capsys):
    """The nano network has room for 24 bare items, and for fewer with all their facts."""
    data, before = served / "data", served / "runs" / "base" / "pretrain"
    shop = load(data / "synthetic")
    bare = sft.Config(data=str(data), max_page=40, max_history=24, use_ratings=False)
    assert prompt_study.fitting(bare, before, shop) == 24
    full = replace(bare, show="category,brand,price", use_ratings=True, max_history=2000)
    fits = prompt_study.fitting(full, before, shop)
    maker = PageMaker(shop, 0.0)
    policy = sft.new_policy(replace(full, max_history=fits), before, maker, shop, "cpu")
    with pytest.raises(PageLLMError, match=f"a history of {fits + 1} items"):
        sft.new_policy(replace(full, max_history=fits + 1), before, maker, shop, "cpu")
    assert policy.style.max_history == fits < 2000


def test_what_the_study_sets_itself_is_refused():
    with pytest.raises(PageLLMError, match="--sft must not set seed"):
        prompt_study.run(prompt_study.Config(sft=Options("--seed 3")))
