"""Evaluation: pages of policies, the baselines beside them, and what stops it."""

import json
import shutil

import numpy as np
import pytest
import torch

from pagellm import evaluate, pretrain, sft
from pagellm.data import prepare
from pagellm.data.shop import Rows, load
from pagellm.model.policy import MODES, Policy
from pagellm.pages.ranked import top_items
from pagellm.stage.config import PageLLMError


@pytest.mark.parametrize("mode", ["greedy", "one_shot"])
def test_a_policy_that_scores_all_items_alike_ranks_them_by_the_same_shuffle(served, mode):
    """Slot by slot and behind the page, whatever the batch: never by id."""
    policy = Policy.load(served / "runs" / "base" / "sft")
    shop = load(served / "data" / "synthetic")
    with torch.no_grad():
        policy.model.item[:] = 0.0
    users, seen = np.arange(0, shop.n_users, 2), shop.csr("train", positive=None)
    ranked = policy.rank(users, shop.csr("train"), seen, 6, 20, mode, batch=7, seed=3)
    want, _ = top_items(torch.zeros(len(users), shop.n_items), users, seen, 20, seed=3)
    np.testing.assert_array_equal(ranked.item, want.numpy())
    other = policy.rank(users, shop.csr("train"), seen, 6, 20, mode, seed=4)
    assert (other.item != ranked.item).mean() > 0.5


@pytest.mark.parametrize("mode", MODES)
def test_a_shortlist_of_all_legal_items_ranks_as_the_catalogue_does(served, mode):
    """Everybody has seen an item, so one less than all are all legal ones."""
    policy = Policy.load(served / "runs" / "base" / "sft")
    shop = load(served / "data" / "synthetic")
    history, seen = shop.csr("train"), shop.csr("train", positive=None)
    users = np.flatnonzero(seen.counts() > 0)[:40]
    whole = policy.rank(users, history, seen, 5, 20, mode)
    for candidates in (shop.n_items - 1, 1):  # 1: as many as there are ranks
        short = policy.rank(users, history, seen, 5, 20, mode, candidates=candidates)
        if candidates > 1 or mode == "one_shot":
            np.testing.assert_array_equal(short.item, whole.item)
            np.testing.assert_allclose(short.score, whole.score, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(np.sort(short.slots), np.sort(whole.slots))
    with pytest.raises(PageLLMError, match="without variety"):
        evaluate.Config(candidates=50, variety="mmr")


def test_the_table_says_what_every_stage_took(served, tmp_path, capsys):
    kept = shutil.ignore_patterns("evaluate")  # another test may have made it
    shutil.copytree(served, tmp_path, dirs_exist_ok=True, ignore=kept)
    runs = tmp_path / "runs" / "base"
    for i, stage in enumerate(("pretrain", "sft", "reward", "ppo")):
        record = json.loads((runs / stage / "done").read_text())
        assert 0 < record["cpu_seconds"] < 600
        (runs / stage / "done").write_text(json.dumps(record | {"cpu_seconds": 10.0 + i}))
    # as an older version left it
    record.pop("cpu_seconds")
    (runs / "reward" / "done").write_text(json.dumps(record))
    where = {"run": "base", "data": str(tmp_path / "data"), "runs": str(tmp_path / "runs")}
    said = []
    for _ in range(2):  # the second time it is already done
        evaluate.run(evaluate.Config(**where, policies="popularity", n_boot=10, k=6))
        said.append(capsys.readouterr().out.strip().splitlines()[-1])
    own = json.loads((runs / "evaluate" / "done").read_text())["cpu_seconds"]
    want = (
        f"processor seconds: pretrain 10, sft 11, ppo 13, evaluate {own:.0f}; {34 + own:.0f} in all"
    )
    assert said == [want] * 2


def test_users_are_read_in_batches_of_like_history_and_come_back_in_their_order(served):
    policy = Policy.load(served / "runs" / "base" / "sft")
    shop = load(served / "data" / "synthetic")
    seen, users, rng = (
        shop.csr("train", positive=None),
        np.arange(0, shop.n_users, 2),
        np.random.default_rng(0),
    )
    start = np.append(0, np.cumsum(rng.integers(1, 9, shop.n_users)))
    history = Rows(
        start, rng.integers(shop.n_items, size=start[-1]), np.full(start[-1], 4.0, np.float32)
    )
    read = []
    hook = policy.model.register_forward_pre_hook(lambda _, args: read.append(args[0].shape))
    together = policy.rank(users, history, seen, 6, 20, batch=8)
    hook.remove()
    widths = [shape[1] for shape in read if shape[1] > 1]  # prompts; a slot is one token
    assert (
        widths == sorted(widths) and widths[0] < widths[-1] and len(widths) == -(-len(users) // 8)
    )
    alone = policy.rank(users, history, seen, 6, 20, batch=1)
    np.testing.assert_array_equal(together.item, alone.item)
    np.testing.assert_allclose(together.score, alone.score, atol=1e-4)
    np.testing.assert_array_equal(together.slots, alone.slots)


def test_evaluate_reads_the_baselines_beside_it_and_stops_at_a_leak(shop, tmp_path):
    folder = tmp_path / "synthetic" / "baselines"
    folder.mkdir(parents=True)
    config = evaluate.Config(
        data=str(shop.path.parent),
        runs=str(tmp_path),
        policies="popularity",
        k=5,
        depth=40,
        n_boot=20,
    )
    made = {
        "config": {"mask": "train+valid"},
        "inputs": {"data": evaluate.file_id(shop.path / "source.json")},
    }
    (folder / "config.json").write_text(json.dumps(made))
    (folder / "metrics.json").write_text(
        json.dumps({"EASE": {"Recall@20": {"mean": 1e-4, "low": 0, "high": 1}}})
    )
    assert evaluate.baselines_of(config).summary == {}  # not finished yet
    (folder / "done").write_text('{"rows": []}')
    with pytest.raises(
        PageLLMError, match="popularity: Recall@20 .* times EASE's 0.0001: suspected leak"
    ):
        evaluate.run(config)
    other = evaluate.Config(data=str(shop.path.parent), runs=str(tmp_path), mask="train")
    assert evaluate.baselines_of(other).summary == {}  # made under another mask


def test_pages_of_the_same_weights_are_written_once(tmp_path, monkeypatch):
    where = {"data": str(tmp_path / "data"), "runs": str(tmp_path / "runs")}
    prepare.run(prepare.Config(data=where["data"], users=60, items=40, k_core=3))
    pretrain.run(pretrain.Config(**where, size="nano", steps=2))
    sft.run(sft.Config(**where, epochs=1, k=5, batch=16))
    runs = tmp_path / "runs" / "synthetic"
    shutil.copytree(runs / "sft", runs / "ppo")
    asked, rank = [], Policy.rank
    monkeypatch.setattr(
        Policy, "rank", lambda self, *rest, **more: asked.append(1) or rank(self, *rest, **more)
    )
    found = evaluate.run(evaluate.Config(**where, k=5, depth=10, policies="sft,ppo", quiet=True))
    assert len(asked) == 1 and found["sft"] == found["ppo"]
    assert found[evaluate.DIFFERENCE]["Recall@20"]["mean"] == 0
    assert (runs / "evaluate/ppo/pages.parquet").read_bytes() == (
        runs / "evaluate/sft/pages.parquet"
    ).read_bytes()


def test_other_policies_are_evaluated_in_the_place_of_those_before(sft_alone, tmp_path, capsys):
    for part in ("data", "runs"):
        shutil.copytree(sft_alone / part, tmp_path / part)
    told = {"run": "base", "data": str(tmp_path / "data"), "runs": str(tmp_path / "runs")}
    told |= {"k": 6, "depth": 20, "n_boot": 2, "examples": 0, "quiet": True, "device": "cpu"}
    assert list(evaluate.run(evaluate.Config(policies="popularity", **told))) == ["popularity"]
    # auto: what is there, which is SFT alone
    assert list(evaluate.run(evaluate.Config(**told))) == ["popularity", "sft"]
    out = capsys.readouterr().out
    assert "held popularity; popularity,sft are evaluated in its place" in out
    assert list(evaluate.run(evaluate.Config(policies="sft", **told))) == ["sft"]
    folder = tmp_path / "runs" / "base" / "evaluate"
    assert not (folder / "popularity").exists()
    with pytest.raises(PageLLMError, match="was made with k=6, now k=5"):
        evaluate.run(evaluate.Config(policies="popularity", **told | {"k": 5}))
    assert (folder / "done").exists()
