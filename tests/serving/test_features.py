"""Features of pairs: against rewards computed one page at a time, and through the command."""

import copy

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pagellm.model.reward_model import mean_reward
from pagellm.serving import features
from pagellm.stage.config import PageLLMError


@pytest.fixture(scope="module")
def parts(rec):
    """policy, reward model, prompts of 6 users, and their pages of 6 slots.

    One page is cut short, one is empty.
    """
    policy, users = rec.policies["ppo"], np.arange(6)
    prompt, valid = policy.prompt(users, [rec.history.of(u) for u in users])
    page, _ = policy.write(users, rec.history, rec.met, 6)
    mask = page.mask.clone()
    mask[1, 3:], mask[2] = False, False
    return policy, rec.reward, prompt, valid, page.item, mask


def total(reward, prompt, valid, page: list[int]) -> float:
    item = torch.tensor([page or [-1]])
    with torch.no_grad():
        token, whole = reward(prompt, valid, item, item >= 0)
    return float(whole + mean_reward(token, item >= 0))


@pytest.mark.parametrize("batch, gated", [(1, False), (7, False), (512, False), (7, True)])
def test_marginal_reward_is_the_difference_of_two_whole_pages(parts, batch, gated):
    _, reward, prompt, valid, page, mask = parts
    if gated:
        reward = copy.deepcopy(reward)
        reward.trunk.add_gate(0.3)
    N = reward.trunk.n_items
    item = torch.cat(
        [
            page,
            torch.from_numpy(np.random.default_rng(0).integers(N, size=(6, 8))),
            torch.full((6, 1), -1),
        ],
        1,
    )
    got = features.marginal_reward(reward, prompt, valid, page, mask, item, batch)
    assert got.shape == item.shape and torch.isnan(got[:, -1]).all()
    changed = 0.0
    for b in range(6):
        shown = page[b][mask[b]].tolist()
        for m, i in enumerate(item[b, :-1].tolist()):
            one = prompt[b : b + 1], valid[b : b + 1]
            want = (
                total(reward, *one, shown) - total(reward, *one, [j for j in shown if j != i])
                if i in shown
                else total(reward, *one, [*shown, i]) - total(reward, *one, shown)
            )
            assert float(got[b, m]) == pytest.approx(want, abs=2e-5)
            changed = max(changed, abs(want))
    assert changed > 1e-3


def test_the_command_adds_both_columns_to_the_pairs_in_their_order(served, rec, tmp_path, parts):
    rng = np.random.default_rng(1)
    user, item = rng.integers(rec.shop.n_users, size=40), rng.integers(rec.shop.n_items, size=40)
    c = rec.shop.catalogue
    pq.write_table(
        pa.table(
            {
                "user_id": [rec.shop.user_ids[u] for u in user],
                "item_id": [c.ids[i] for i in item],
                "kept": np.arange(40),
            }
        ),
        tmp_path / "pairs.parquet",
    )
    base = {
        "run": "base",
        "data": str(served / "data"),
        "runs": str(served / "runs"),
        "device": "cpu",
    }
    features.run(
        features.Config(
            **base, pairs=str(tmp_path / "pairs.parquet"), out=str(tmp_path / "out.parquet"), k=6
        )
    )
    out = pq.read_table(tmp_path / "out.parquet").to_pydict()
    assert out["kept"] == list(range(40))
    policy = rec.policies["ppo"]
    for n in (0, 13, 39):
        prompt, valid = policy.prompt([user[n]], [rec.history.of(user[n])])
        page, _ = policy.write(user[n : n + 1], rec.history, rec.met, 6)
        with torch.no_grad():
            h = policy.model(prompt, valid)[0, -1]
        assert out["dot"][n] == pytest.approx(float(h @ policy.model.item[item[n]]), abs=1e-4)
        want = features.marginal_reward(
            rec.reward, prompt, valid, page.item, page.mask, torch.tensor([[item[n]]])
        )
        assert out["marginal"][n] == pytest.approx(float(want), abs=1e-4)


def test_without_a_reward_model_there_is_no_marginal(sft_alone, rec, tmp_path, capsys):
    """SFT alone: the same dot as beside the other models."""
    ids = {"user_id": rec.shop.user_ids[:5], "item_id": rec.shop.catalogue.ids[:5]}
    pq.write_table(pa.table(ids | {"label": [1] * 5}), tmp_path / "pairs.parquet")
    base = {
        "run": "base",
        "data": str(sft_alone / "data"),
        "runs": str(sft_alone / "runs"),
        "device": "cpu",
    }
    out = tmp_path / "out.parquet"
    features.run(features.Config(**base, pairs=str(tmp_path / "pairs.parquet"), out=str(out), k=6))
    table = pq.read_table(out)
    assert table.column_names == ["user_id", "item_id", "label", "dot"]
    said = capsys.readouterr().out
    assert "no reward model, so no column marginal" in said
    assert "5 rows; columns user_id, item_id; left over: label and kept" in said
    want, none = features.pair_features(
        rec.policies["sft"], None, rec.history, rec.met, np.arange(5), np.arange(5)[:, None], 6
    )
    assert none is None and table["dot"].to_numpy() == pytest.approx(want[:, 0], abs=1e-4)


def test_whole_numbers_are_ids_as_their_digits():
    """An id column that a tool has turned into integers still names the shop's text ids."""
    table = pa.table({"item_id": pa.array([12, 7])})
    config = features.Config(pairs="x", out="y")
    assert features.dense_ids(config, table, "item_id", {"7": 0, "12": 3}).tolist() == [3, 0]
    with pytest.raises(PageLLMError, match="first '12'; below the k-core: 1 of them"):
        features.dense_ids(config, table, "item_id", {"7": 0}, {"12"})


def test_bad_pairs_are_named(served, tmp_path):
    base = {
        "run": "base",
        "data": str(served / "data"),
        "runs": str(served / "runs"),
        "device": "cpu",
        "out": str(tmp_path / "out.parquet"),
    }
    pq.write_table(pa.table({"user_id": ["x"], "item_id": ["y"]}), tmp_path / "strange.parquet")
    pq.write_table(pa.table({"user": [1]}), tmp_path / "columns.parquet")
    pq.write_table(
        pa.table({"user_id": ["x"], "item_id": ["y"], "dot": [1.0]}), tmp_path / "twice.parquet"
    )
    pq.write_table(
        pa.table({"user_id": pa.array([], pa.string()), "item_id": pa.array([], pa.string())}),
        tmp_path / "none.parquet",
    )
    for name, said in (
        ("twice", "has a column dot already"),
        ("none", "has no rows"),
        ("strange", "1 row of column user_id, first"),
        ("columns", "no column user_id"),
        ("gone", "cannot be read"),
    ):
        with pytest.raises(PageLLMError, match=said):
            features.run(features.Config(**base, pairs=str(tmp_path / f"{name}.parquet")))
    with pytest.raises(PageLLMError, match="want --pairs"):
        features.Config()
