"""Leave-one-kind-out: which model scores whose pairs, and correlations with the truth."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from experiments.leaveout import LEFT, TAUGHT, Config, right_by_user, run, truth_records
from pagellm import reward
from pagellm.data.shop import load
from pagellm.model.policy import Policy
from pagellm.stage.config import PageLLMError

SMALL = {
    "pretrain": "--size nano --steps 6 --batch 8 --rating_batch 8 --words 300 --warmup 2",
    "sft": "--epochs 2 --batch 16 --eval_every 4 --max_history 8 --warmup 2 --k 6",
    "reward": "--per_kind 1 --batch 16 --warmup 2",
}


def test_a_user_counts_by_the_share_of_its_pairs(served):
    """Weighted by the users' numbers of pairs, the shares give the accuracy the stage recorded."""
    made = reward.Config(
        run="base", data=str(served / "data"), runs=str(served / "runs"), device="cpu"
    )
    shop = load(served / "data" / "synthetic")
    found = right_by_user(made, made, Policy.load(made.stage("sft")), shop.n_users)
    recorded = json.loads((made.stage("reward") / "done").read_text())["held_out"]
    table = pq.read_table(made.stage("reward") / "pairs.parquet")
    kind, user = np.array(table["kind"].to_pylist()), table["user"].to_numpy()
    assert found
    for name, right in found.items():
        count = np.bincount(user[kind == name], minlength=shop.n_users) * ~np.isnan(right)
        assert count.sum() == recorded[name]["pairs"] > 0
        assert np.nansum(right * count) / count.sum() == pytest.approx(
            recorded[name]["accuracy"], abs=1e-4
        )


def test_correlation_is_within_users_and_over_them():
    """`within` is 1 for pages in the truth's order and -1 in reverse; `over` correlates means.

    A user whose pages all have the same truth is left out.
    """
    truth = np.array([[1.0, 2.0, 3.0], [10.0, 11.0, 12.0], [5.0, 5.0, 5.0]])
    up, down = truth + 100.0, np.array([[3.0, 2.0, 1.0], [13.0, 12.0, 11.0], [6.0, 8.0, 7.0]])
    of = {
        name: truth_records([{"energy": {"reward": judged, "truth": truth}}])[0]
        for name, judged in (("up", up), ("down", down))
    }
    assert of["up"]["within"] == pytest.approx(1.0) and of["down"]["within"] == pytest.approx(-1.0)
    assert of["up"]["over"] == pytest.approx(1.0) and of["down"]["over"] == pytest.approx(1.0)


def test_every_kind_is_left_out_once(served, tmp_path):
    options = dict(
        SMALL,
        dataset="synthetic",
        data=str(served / "data"),
        runs=str(tmp_path),
        seeds=1,
        users=12,
        pages=3,
        k=6,
    )
    records = run(Config(**options))
    kinds = [r["metric"].removesuffix(" pairs") for r in records if r.get("variant") == LEFT]
    assert len(kinds) > 1 and all(r["direction"] == "up" for r in records if "direction" in r)
    for kind in kinds:
        config = json.loads(
            (
                tmp_path / "leaveout" / f"synthetic-s0-no-{kind}" / "reward" / "config.json"
            ).read_text()
        )
        assert config["config"]["leave_out"] == kind
    assert any(r["difference"] != 0 for r in records if r.get("variant") == LEFT)
    assert all(r["difference"] == 0 for r in records if r.get("variant") == TAUGHT)
    assert {r["truth"] for r in records if "truth" in r} == {"NDCG@100", "energy", "true_energy"}
    for name in ("leaveout", "truth"):
        assert pq.read_table(tmp_path / "leaveout" / f"synthetic-{name}.parquet").num_rows > 0
    with pytest.raises(PageLLMError, match="one kind"):
        run(Config(**options | {"study": "one", "reward": SMALL["reward"] + " --kinds preference"}))


def test_what_the_study_sets_is_refused():
    with pytest.raises(PageLLMError, match="must not set leave_out"):
        Config(reward="--leave_out ranked")
