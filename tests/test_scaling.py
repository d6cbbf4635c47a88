"""The scaling study: its made-up shops are what they say, its measurements are of the real stages, it carries on."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from experiments import sampled, scaling
from experiments.scaling import HELD, Clock, Config, Point, draw, grid, measure, table, write_shop
from pagellm.config import PageLLMError
from pagellm.data.shop import load


def small(tmp_path, **more):
    return Config(data=str(tmp_path / "data"), runs=str(tmp_path / "runs"), size="nano", steps=4, users=150, items=120,
                  page=4, history=6, sampled_items=16, figure="", **more)


def test_a_made_up_shop_has_the_sizes_asked_for(tmp_path):
    point = Point(150, 400, 4, 6)
    user, item, rating = draw(point)
    assert len(np.unique(user * point.items + item)) == len(user) and item.max() < point.items
    assert set(rating.tolist()) <= {1.0, 2.0, 3.0, 4.0, 5.0} and (np.diff(user) >= 0).all()
    write_shop(tmp_path, point)
    shop = load(tmp_path / "scaling")
    assert (shop.n_users, shop.n_items) == (150, 400)
    counts = shop.csr("train", positive=None).counts()
    assert counts.max() == point.history + point.page and counts.mean() > 0.95 * counts.max()
    for split in ("valid", "test"):
        held = shop.csr(split, positive=None).counts()
        assert (held[:HELD] == 2).all() and not held[HELD:].any()
    # What users buy is not noise: most of it is of one category.
    assert np.mean(item % scaling.LEAVES == user % scaling.LEAVES) > 0.3


def test_the_grid_moves_one_size_at_a_time():
    config = Config()
    base = {name: getattr(config, name) for name in scaling.SWEEPS}
    for sweep, point, stages in grid(config):
        others = {name: value for name, value in asdict(point).items() if name not in (sweep, "sampled")}
        assert others.items() <= base.items() and stages
    assert max(p.items for _, p, _ in grid(config)) == 1_000_000
    assert all(p.items <= 10_000 for s, p, _ in grid(Config(most=10_000)) if s == "items")
    with pytest.raises(PageLLMError, match="sweeps='width'"):
        Config(sweeps="width")


def test_a_clock_takes_the_first_steps_and_the_last():
    class Bar:
        total = 50

    clock = Clock(4)
    assert list(clock(None, Bar)) == [0, 1, 2, 49] and set(clock.result()) == {"start_s", "step_s"}
    assert Clock(4).result() == {}


def test_a_measurement_is_the_stage_itself_and_breaks_by_name(tmp_path):
    config = small(tmp_path)
    point = Point(150, 120, 4, 6, sampled=True)
    write_shop(tmp_path / "data" / "scaling", point)
    row = measure("pretrain", config, point)
    done = json.loads((tmp_path / "runs" / "scaling" / point.name / "pretrain" / "done").read_text())
    assert done["steps"] == 4 and 0 < row["step_s"] < row["seconds"] and 0.05 < row["peak_gb"] < 4
    made = json.loads((tmp_path / "runs" / "scaling" / point.name / "pretrain" / "config.json").read_text())["config"]
    assert made["sampled_items"] == 16 and made["lazy_rows"]
    assert measure("ppo", config, point)["failed"].startswith("PageLLMError: no SFT policy")
    assert measure("pretrain", small(tmp_path, minutes=1e-4), point) == {"failed": "more than 0.0001 minutes"}


@pytest.mark.slow
def test_a_study_measures_once_and_writes_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "SWEEPS", {**scaling.SWEEPS, "page": (3, 5)})
    config = small(tmp_path, sweeps="page", stages="prepare,pretrain,sft")
    records = scaling.run(config)
    assert [r["stage"] for r in records] == ["prepare", "pretrain", "sft"] * 2
    assert not any("failed" in r for r in records)
    text = (tmp_path / "runs" / "scaling" / "scaling.md").read_text()
    assert text.strip() == table(records) and "| 5 page |" in text
    before = (tmp_path / "runs" / "scaling" / "results.jsonl").read_bytes()
    assert scaling.run(config) == records
    assert (tmp_path / "runs" / "scaling" / "results.jsonl").read_bytes() == before
    assert not (tmp_path / "data" / "scaling").exists()


@pytest.mark.slow
def test_the_study_of_drawn_items_pairs_three_rows(tmp_path):
    from pagellm.data import prepare
    prepare.run(prepare.Config(data=str(tmp_path / "data"), users=40, items=40))
    records = sampled.run(sampled.Config(
        data=str(tmp_path / "data"), runs=str(tmp_path / "runs"), seeds=1, sampled_items=8,
        pretrain="--size nano --steps 3 --batch 8 --words 300", sft="--epochs 1 --k 6 --batch 16"))
    names = {r["variant"] for r in records}
    assert names == {"full", "8 drawn", "8 drawn, lazy rows"}
    first = [r for r in records if r["variant"] == "full" and r["metric"] == "NDCG@100"]
    assert first[0]["difference"] == 0
