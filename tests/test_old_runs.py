"""Data and runs written by the code of commit 6e52ce9 still load, count as done, and carry on to
the same end.

tests/old_run/write.py made them and says how.
"""

import dataclasses
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pagellm import evaluate, ppo, pretrain, reward, sft
from pagellm.data import prepare
from pagellm.data.shop import load
from pagellm.model import gpt2, networks
from pagellm.model.policy import Policy
from pagellm.model.reward_model import RewardModel
from pagellm.ppo_step import last_slot, page_total
from pagellm.stage.run import load_model_file, machine

HERE = Path(__file__).parent / "old_run"
STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward, "ppo": ppo, "evaluate": evaluate}
MADE = json.loads((HERE / "made.json").read_text())


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    """The old run is of a network smaller than any in SIZES."""
    torch.set_num_threads(1)
    for sizes in (gpt2.SIZES, networks.SIZES):
        monkeypatch.setitem(sizes, "nano", gpt2.Shape(*MADE["shape"]))


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A working directory: data/synthetic, runs/base with all stages, half/<stage> stopped at step
    2.
    """
    with tarfile.open(HERE / "old_run.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(stage):
    options = MADE["options"][stage]
    return STAGES[stage].Config(run="base", device="cpu", save_every=2, **options)


def snapshot(folder):
    """Every file that holds results, with its bytes and the time of its last change."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def test_prepared_data_load_and_are_not_prepared_again(old, capsys):
    before = snapshot(old / "data")
    prepare.run(prepare.Config(users=30, items=30))
    assert snapshot(old / "data") == before
    shop = load(old / "data" / "synthetic")
    table = pq.read_table(old / "data" / "synthetic" / "interactions.parquet")
    assert len(shop.user) == table.num_rows > 0


def test_finished_stages_are_recognised_and_left_alone(old, capsys):
    before = snapshot(old / "runs")
    for stage in ("pretrain", "sft", "reward", "ppo"):
        STAGES[stage].run(config(stage))
        assert f"{stage}: already done in" in capsys.readouterr().out
    assert snapshot(old / "runs") == before


def test_evaluating_an_old_run_again_gives_the_old_numbers(old):
    """pages.parquet has the old items in the old order; every number agrees to rounding."""
    there = old / "runs" / "base" / "evaluate"
    was = there.rename(old / "was")
    evaluate.run(config("evaluate"))
    for policy in ("popularity", "sft", "ppo"):
        for name, exact in (("pages", ["user", "item"]), ("per_user", ["user"])):
            a, b = (pq.read_table(folder / policy / f"{name}.parquet") for folder in (was, there))
            for column in a.column_names:
                x, y = (t[column].to_numpy(zero_copy_only=False) for t in (a, b))
                if column in exact:
                    np.testing.assert_array_equal(x, y)
                elif x.dtype.kind == "f":
                    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_models_of_an_old_run_load(old):
    base = old / "runs" / "base"
    for stage in ("pretrain", "sft", "ppo"):
        kept = load_model_file(base / stage / "model.pt")
        model = networks.from_state(kept)
        if stage != "pretrain":  # a pre-trained model has no page prompt yet
            model = Policy.load(base / stage).model
        now = model.state_dict()
        assert now.keys() == kept["weights"].keys()
        assert all(torch.equal(now[name], kept["weights"][name]) for name in now)
    assert sum(p.numel() for p in RewardModel.load(base / "reward").parameters()) > 0


def close(a, b, where=""):
    """Nested states agree to rounding; what is no floating-point number agrees exactly."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            close(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            close(*pair, f"{where}/{i}")
    elif isinstance(a, torch.Tensor) and a.is_floating_point():
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=where)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5), where
    else:
        assert a == b, where


def same_arithmetic():
    """Whether this processor and this torch round as those that made the old run did."""
    return (
        MADE["versions"]["torch"] == torch.__version__
        and MADE["capability"] == torch.backends.cpu.get_cpu_capability()
        and MADE["machine"].split(",")[0] == machine().split(",")[0]
    )


def limited_by_slot(terms, mask, moments, limit=5.0):
    """The old arithmetic of `ppo_step.normalise`: the limit held for each slot's token reward and
    for the page reward, and not for the page's whole reward as today."""
    moments.update(page_total(terms))
    sigma, slots = max(moments.std, 1e-6), mask.sum(1, keepdim=True)
    token = (terms["token"] * slots / sigma).clamp(-limit, limit) / slots
    page = ((terms["page"].sum(1, keepdim=True) - moments.mean) / sigma).clamp(-limit, limit)
    return {"token": token, "page": torch.where(last_slot(mask), page, 0.0).to(token.dtype)}


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "ppo"])
def test_a_half_finished_old_stage_carries_on_to_the_end_of_the_old_code(old, stage, monkeypatch):
    """Weights agree to rounding. On the processor that made the old run, every bit does.

    PPO's limit on large rewards is another one today; with that of then it ends as it did, but for
    the order of its sums.
    """
    monkeypatch.setattr(ppo, "normalise", limited_by_slot)
    there = old / "runs" / "base" / stage
    was = there.rename(old / "was")
    (old / "half" / stage).rename(there)
    assert (there / "LAST").exists() and not (there / "done").exists()
    STAGES[stage].run(config(stage))
    log, before = ((folder / "log.jsonl").read_text().splitlines() for folder in (there, was))
    assert len(log) == len(before)
    close(load_model_file(there / "model.pt"), load_model_file(was / "model.pt"))
    if stage != "ppo" and same_arithmetic():
        assert json.loads((there / "done").read_text())["state"] == MADE["state"][stage]


def test_an_old_run_still_refuses_another_option(old):
    """config.json of then is compared field by field with today's options."""
    changed = dataclasses.replace(config("sft"), lr=0.5)
    with pytest.raises(sft.PageLLMError, match="lr="):
        sft.run(changed)
