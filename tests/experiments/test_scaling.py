"""The scaling study: generated shops have the stated sizes, real stages are timed, it resumes."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from experiments import sampled_softmax, shortlists
from experiments.cost import scaling
from experiments.cost.scaling import (
    STAGES,
    Clock,
    Config,
    Point,
    Results,
    cost,
    draw,
    figure,
    grid,
    held,
    key_of,
    measure,
    table,
    took,
    write_shop,
)
from pagellm.data.shop import load
from pagellm.stage.config import PageLLMError


def small(tmp_path, **more):
    return Config(
        data=str(tmp_path / "data"),
        runs=str(tmp_path / "runs"),
        size="nano",
        steps=4,
        users=150,
        items=120,
        page=4,
        history=6,
        sampled_items=16,
        figure="",
        **more,
    )


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
        rows = shop.csr(split, positive=None).counts()
        assert (
            (rows[: held(point)] == 2).all() and not rows[held(point) :].any() and held(point) == 15
        )
    # Purchases have structure: most of a user's are of one category.
    assert np.mean(item % scaling.LEAVES == user % scaling.LEAVES) > 0.3


def test_the_grid_moves_one_size_at_a_time():
    config = Config()
    base = {name: getattr(config, name) for name in scaling.SWEEPS}
    for sweep, point, stages in grid(config):
        others = {
            name: value for name, value in asdict(point).items() if name not in (sweep, "sampled")
        }
        assert others.items() <= base.items() and stages
    assert max(p.items for _, p, _ in grid(config)) == 1_000_000
    assert all(p.items <= 10_000 for s, p, _ in grid(Config(most=10_000)) if s == "items")
    for wrong in (
        {"sweeps": "width"},
        {"users": 100},
        {"items": 60},
        {"minutes": 0.0},
        {"steps": 2},
    ):
        with pytest.raises(PageLLMError, match=next(iter(wrong))):
            Config(**wrong)


def test_every_cell_is_in_the_table_once_and_ppo_at_a_million_items_only_over_shortlists():
    cells = [(sweep, point, stage) for sweep, point, stages in grid(Config()) for stage in stages]
    assert len(set(cells)) == len(cells)
    for sweep, values in scaling.SWEEPS.items():
        for value in values:
            mine = {
                (stage, p.sampled)
                for s, p, stage in cells
                if s == sweep and getattr(p, sweep) == value
            }
            assert {stage for stage, _ in mine} == set(STAGES)
            for stage in ("sft", "ppo"):
                assert ((stage, True) in mine) == (sweep == "items" and value >= 10_000)
            assert (("ppo", False) in mine) == (sweep != "items" or value < 1_000_000)


def row_of(config, point, stage="sft", **more):
    return {
        **key_of(stage, config, point),
        "whole_s": 1.0,
        "whole_cpu_s": 20.0,
        "start_s": 0.5,
        "step_s": 0.25,
        "start_cpu_s": 0.4,
        "step_cpu_s": 0.0312,
        "peak_gb": 0.5,
        "took_s": 60.0,
    } | more


def test_a_result_is_kept_for_its_own_settings_and_a_failure_for_its_own_limits(tmp_path):
    point, path = Point(150, 120, 4, 6, sampled=True), tmp_path / "results.jsonl"
    config = small(tmp_path)
    results = Results(path)
    for stage, why in (("sft", "more than 2 minutes"), ("reward", "ValueError: nothing there")):
        results.add(
            {**key_of(stage, config, point), "failed": why, "limit_gb": 20.0, "minutes": 2.0}
        )

    def find(stage="sft", **more):
        other = small(tmp_path, **more)
        return Results(path).find(key_of(stage, other, point), other)

    assert (
        find(minutes=2.0)["failed"]
        and find(minutes=1.0)["failed"]
        and find(minutes=2.0, limit_gb=10.0)["failed"]
    )
    assert find(minutes=3.0) is None and find(minutes=2.0, limit_gb=21.0) is None
    assert find("reward", minutes=2.0) is None  # an error may have been fixed since
    results.add(row_of(config, point))
    assert "failed" not in find(minutes=3.0)
    for other in ({"sampled_items": 17}, {"steps": 5}, {"size": "tiny"}):
        assert (
            Results(path).find(
                key_of(
                    "sft",
                    Config(**{"size": "nano", "steps": 4, "sampled_items": 16} | other),
                    point,
                ),
                config,
            )
            is None
        )
    assert Results(path).rows == results.rows
    path.write_text(path.read_text() + '{"users": 1')
    with pytest.raises(PageLLMError, match="results.jsonl, line 4 is not JSON"):
        Results(path)


def test_a_million_rows_are_not_put_where_somebody_keeps_data(tmp_path):
    folder = tmp_path / "data" / "scaling"
    folder.mkdir(parents=True)
    (folder / "source.json").write_text("{}")
    with pytest.raises(PageLLMError, match="holds a data set"):
        scaling.run(small(tmp_path, sweeps="page"))
    assert (folder / "source.json").exists()


def test_cells_say_what_was_measured(tmp_path):
    config, point = Config(), Point(1000, 1000, 10, 20)
    rows = [
        row_of(config, point),
        row_of(config, point, "ppo", failed="more than 15 minutes"),
        {
            k: v
            for k, v in row_of(config, point, "evaluate", whole_s=283.2).items()
            if k[:4] != "took"
        },
    ]
    assert [cost(row) for row in rows] == [
        ".5 + .25 s, .5 GB",
        "more than 15 minutes",
        "283 s, .5 GB",
    ]
    assert cost(rows[0], "cpu") == ".4 + .031 s, .5 GB"
    records = [{"sweep": sweep, **row} for sweep in ("users", "page") for row in rows]
    # A point that two sweeps share is measured once; evaluate's row here has no times.
    assert took(records) == (2.0, 1.0)
    assert table(records).splitlines()[2:] == [
        "| 1,000 users |  |  | .5 + .25 s, .5 GB |  | more than 15 minutes | 283 s, .5 GB |",
        "| 10 slots |  |  | .5 + .25 s, .5 GB |  | more than 15 minutes | 283 s, .5 GB |",
    ]
    pytest.importorskip("matplotlib", reason="the figure needs the extra [report]")
    figure(records, tmp_path / "deep" / "f.png")
    assert (tmp_path / "deep" / "f.png").read_bytes()[:4] == b"\x89PNG"


def test_a_clock_takes_the_first_steps_and_the_last():
    class Bar:
        total = 50

    clock = Clock(4)
    assert list(clock(None, Bar)) == [0, 1, 2, 49]
    assert set(clock.result()) == {"start_s", "step_s", "start_cpu_s", "step_cpu_s"}
    assert Clock(4).result() == {}
    Bar.total = 2
    short = Clock(4)
    assert list(short(None, Bar)) == [0, 1]
    with pytest.raises(RuntimeError, match="2 steps in all"):
        short.result()


def test_a_measurement_is_the_stage_itself_and_breaks_by_name(tmp_path):
    config = small(tmp_path, candidates=16)
    point = Point(150, 120, 4, 6, sampled=True)
    assert scaling.stage_config("ppo", config, point).candidates == 16
    assert scaling.stage_config("ppo", config, Point(150, 120, 4, 6)).candidates == 0
    assert key_of("ppo", config, point) != key_of("ppo", small(tmp_path), point)
    assert key_of("sft", config, point) == key_of("sft", small(tmp_path), point)
    write_shop(tmp_path / "data" / "scaling", point)
    row = measure("pretrain", config, point)
    done = json.loads(
        (tmp_path / "runs" / "scaling" / point.name / "pretrain" / "done").read_text()
    )
    assert done["steps"] == 4 and 0.05 < row["peak_gb"] < 4
    assert all(0 < row[f"step{clock}"] < row[f"whole{clock}"] for clock in ("_s", "_cpu_s"))
    made = json.loads(
        (tmp_path / "runs" / "scaling" / point.name / "pretrain" / "config.json").read_text()
    )["config"]
    assert made["sampled_items"] == 16 and made["lazy_rows"]
    assert measure("ppo", config, point)["failed"].startswith("PageLLMError: no SFT policy")
    assert (
        measure("pretrain", small(tmp_path, minutes=1e-4), point)["failed"]
        == "more than 0.0001 minutes"
    )
    assert measure("pretrain", small(tmp_path, limit_gb=0.2), point)["failed"] == "more than 0.2 GB"


@pytest.mark.slow
def test_a_study_measures_once_and_writes_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "SWEEPS", {**scaling.SWEEPS, "page": (3, 4), "history": (6,)})
    config = small(tmp_path, sweeps="page,history", stages="prepare,pretrain,sft,reward")
    out, real = tmp_path / "runs" / "scaling", scaling.measure

    def killed(stage, config, point):
        if (stage, point.page) == ("sft", 4):
            raise KeyboardInterrupt
        return real(stage, config, point)

    monkeypatch.setattr(scaling, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        scaling.run(config)
    before = (out / "results.jsonl").read_text().splitlines()
    assert len(before) == 6
    monkeypatch.setattr(scaling, "measure", real)
    records = scaling.run(config)
    assert [r["stage"] for r in records] == ["prepare", "pretrain", "sft", "reward"] * 3
    assert not any("failed" in r for r in records)
    rows = (out / "results.jsonl").read_text().splitlines()
    # Page 4 and history 6 are the same shop, measured once; rows from before the kill are kept.
    assert rows[:6] == before and len(rows) == 8
    assert all(r["pairs_s_per_1000_users"] > 0 for r in records if r["stage"] == "reward")
    text = (out / "scaling.md").read_text()
    assert text.startswith(table(records)) and "| 4 slots |" in text and 0 < took(records)[1]
    monkeypatch.setattr(scaling, "measure", None)
    assert scaling.run(config) == records
    assert (out / "results.jsonl").read_text().splitlines() == rows
    assert not (tmp_path / "data" / "scaling").exists()


@pytest.mark.slow
def test_what_breaks_takes_along_what_needs_it_and_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "SWEEPS", {**scaling.SWEEPS, "page": (4,)})
    config = small(tmp_path, sweeps="page", stages="prepare,pretrain,sft,reward")
    real = scaling.measure
    monkeypatch.setattr(
        scaling,
        "measure",
        lambda stage, *rest: (
            {"failed": "more than 15 minutes", "took_s": 900.0}
            if stage == "sft"
            else real(stage, *rest)
        ),
    )
    failed = [row.get("failed") for row in scaling.run(config)]
    assert failed == [None, None, "more than 15 minutes", "needs sft"]
    assert [row.get("failed") for row in scaling.run(config)] == failed
    monkeypatch.setattr(scaling, "measure", real)
    assert not any(
        "failed" in row
        for row in scaling.run(
            small(tmp_path, sweeps="page", minutes=20.0, stages="prepare,pretrain,sft,reward")
        )
    )


@pytest.mark.slow
def test_the_study_of_drawn_items_pairs_three_rows(tmp_path):
    from pagellm.data import prepare

    prepare.run(prepare.Config(data=str(tmp_path / "data"), users=40, items=40))
    records = sampled_softmax.run(
        sampled_softmax.Config(
            data=str(tmp_path / "data"),
            runs=str(tmp_path / "runs"),
            seeds=1,
            sampled_items=8,
            pretrain="--size nano --steps 3 --batch 8 --words 300",
            sft="--epochs 1 --k 6 --batch 16",
        )
    )
    names = {r["variant"] for r in records}
    assert names == {"full", "8 drawn", "8 drawn, lazy rows"}
    made = {
        name: [
            json.loads(
                (
                    tmp_path / "runs" / "sampled" / folder / "synthetic-s0" / stage / "config.json"
                ).read_text()
            )["config"]
            for stage in ("pretrain", "sft")
        ]
        for name, folder in (
            ("full", "full"),
            ("8 drawn", "drawn-8"),
            ("8 drawn, lazy rows", "lazy-8"),
        )
    }
    assert {
        name: [(c["sampled_items"], c["lazy_rows"]) for c in configs]
        for name, configs in made.items()
    } == {
        "full": [(0, False)] * 2,
        "8 drawn": [(8, False)] * 2,
        "8 drawn, lazy rows": [(8, True)] * 2,
    }
    assert made["full"][1]["k"] == 6 and all(
        r["difference"] == 0 for r in records if r["variant"] == "full"
    )
    assert any(r["difference"] != 0 for r in records if r["variant"] == "8 drawn")
    for wrong in ({"sft": "--sampled_items 3"}, {"pretrain": "--seed 1"}):
        with pytest.raises(PageLLMError, match="must not set"):
            sampled_softmax.Config(**wrong)


@pytest.mark.slow
def test_the_study_of_shortlists_draws_from_them(tmp_path):
    from pagellm.data import prepare

    prepare.run(prepare.Config(data=str(tmp_path / "data"), users=40, items=40))
    records = shortlists.run(
        shortlists.Config(
            data=str(tmp_path / "data"),
            runs=str(tmp_path / "runs"),
            seeds=1,
            candidates=8,
            pretrain="--size nano --steps 3 --batch 8 --words 300",
            sft="--epochs 1 --k 6 --batch 16",
            reward="--per_kind 1 --epochs 1",
            ppo="--k 6 --min_steps 2 --epochs 0.1 --gate_users 8 --gate_pages 2",
        )
    )
    rows = ["all items", "8 of a user", "8 of a user, lazy rows", "without reward"]
    assert list(dict.fromkeys(r["variant"] for r in records)) == rows
    at = tmp_path / "runs" / "shortlists"
    rows_made = ("all-items", "8-of-a-user", "8-of-a-user--lazy-rows")
    made = [
        json.loads((at / f"synthetic-s0-{row}" / "ppo" / "config.json").read_text())["config"]
        for row in rows_made
    ]
    assert [(c["candidates"], c["lazy_rows"]) for c in made] == [(0, False), (8, False), (8, True)]
    logs = [at / f"synthetic-s0-{row}" / "ppo" / "log.jsonl" for row in rows_made]
    entropy = [
        json.loads(log.read_text().splitlines()[1])["objective/entropy"] for log in logs
    ]  # of eight items it is lower than of all
    assert entropy[1] == entropy[2] < min(math.log(8), entropy[0])
    with pytest.raises(PageLLMError, match="must not set candidates"):
        shortlists.run(shortlists.Config(ppo="--candidates 30"))
    with pytest.raises(PageLLMError, match="candidates"):
        shortlists.Config(candidates=2)
