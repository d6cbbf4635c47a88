"""pagellm tune and pagellm fit, with a plan of a few steps: what is kept, and carried on."""

import importlib
import json
import shutil
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pagellm import pipeline, ppo, pretrain, sft, tune
from pagellm.__main__ import VERBS
from pagellm.data import prepare
from pagellm.data.shop import load
from pagellm.model.networks import SIZES, from_state
from pagellm.pages.truth import PageMaker
from pagellm.pages.yardstick import VERDICTS
from pagellm.stage import presets
from pagellm.stage.config import PageLLMError, parse
from pagellm.stage.files import write_json
from pagellm.stage.order import reads
from pagellm.stage.run import load_model_file
from pagellm.tuning import plan as planning
from pagellm.tuning.plan import (
    Costs,
    Facts,
    Plain,
    Seconds,
    ShopSize,
    Steps,
    Written,
    als_seconds,
    epochs_for,
    plan_facts,
    plan_plain,
    plan_steps,
)
from pagellm.tuning.trials import Bench, better, compared, pays

SECONDS = Seconds({"32": 0.2, "128": 0.8}, 0.1, 0.02, 1.0, 0.1, 0.002)
COSTS = Costs(fit=0.8, text=0.1, step=0.1, look=1.0)
FEW = {
    "plain": asdict(Plain({"EASE": 1, "ALS": 2}, [8], ["nano"], 0, asdict(SECONDS))),
    "facts": asdict(Facts({"ALS+facts": 1, "ALS+ratings": 1}, 0.1)),
    "steps": asdict(Steps(2, [1e-3], 2, 2, 30, 30, {})),
}
SIZE = ShopSize(users=10_000, items=1000, rated=True, facts=True, history=15)


class Unplugged(BaseException):
    pass


def config(root: Path, **more) -> pipeline.Config:
    """`pagellm fit` for a small synthetic shop under `root`."""
    where = {"data": str(root / "data"), "runs": str(root / "runs"), "device": "cpu"}
    said = {"run": "all", "tune": "always", "prepare": "--users 50 --items 40"}
    return pipeline.Config(**where | said | more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A shop that went through all of fit, by the plan FEW."""
    root = tmp_path_factory.mktemp("whole")
    (root / "runs/all/tune").mkdir(parents=True)
    write_json(root / "runs/all/tune/plan.json", FEW)
    pipeline.run(config(root))
    return root


def choice_of(root: Path) -> dict:
    return json.loads((root / "runs/all/tune/choice.json").read_text())


def test_fit_goes_from_nothing_to_a_table(whole):
    """The table names rows, verdicts, stages and minutes, and its means are evaluate's."""
    text = (whole / "runs/all/fit/summary.txt").read_text()
    for word in ("popularity", "EASE", "ALS+facts + MMR", "stages of the run: pretrain, sft"):
        assert word in text
    assert any(f"{word} +" in text or f"{word} -" in text for word in VERDICTS)
    choice = choice_of(whole)
    for part in choice["left_out"]:
        assert part in text
    found = json.loads((whole / "runs/all/evaluate/metrics.json").read_text())
    last = [name for name in ("sft", "ppo", "compose") if name in found][-1]
    assert f"{found[last]['NDCG@100']['mean']:.4f}" in text.split("PageLLM against")[0]
    minutes = json.loads((whole / "runs/all/fit/minutes.json").read_text())
    assert {"prepare", "tune", "baselines", "evaluate", *choice["stages"]} == set(minutes)


def test_every_stage_kept_is_there_and_done_with_the_preset_of_the_run(whole):
    choice = choice_of(whole)
    for stage in choice["stages"]:
        assert (whole / "runs/all" / stage / "done").exists()
        record = json.loads((whole / "runs/all" / stage / "config.json").read_text())["config"]
        assert record["run"] == "all" and record["preset"].endswith(f"runs/all/preset/{stage}")
    words = [f"--data={whole}/data", f"--runs={whole}/runs", "--run=all"]
    made = parse(pretrain.Config, words, "pagellm pretrain", "pretrain")
    assert made.preset == str(whole / "runs/all/preset/pretrain")
    assert (made.rows, made.pool, made.size) == ("als", True, "nano")
    # another run of the same shop has the data set's preset
    other = parse(pretrain.Config, [*words[:2], "--run=other"], "pagellm pretrain", "pretrain")
    assert other.preset == "synthetic/pretrain"


def test_every_preset_of_the_run_is_read_by_its_command(whole):
    words = [f"--data={whole}/data", f"--runs={whole}/runs", "--run=all"]
    found = [p.name for p in (whole / "runs/all/preset").iterdir() if p.suffix != ".json"]
    assert {"pretrain", "sft", "baselines", "evaluate"} <= set(found)
    for verb in found:
        made = parse(importlib.import_module(VERBS[verb]).Config, words, f"pagellm {verb}", verb)
        assert made.preset == str(whole / "runs/all/preset" / verb)


def test_a_stage_asked_again_says_that_it_is_done(whole, capsys):
    words = [f"--data={whole}/data", f"--runs={whole}/runs", "--run=all", "--device=cpu"]
    sft.run(parse(sft.Config, words, "pagellm sft", "sft"))
    assert "already done" in capsys.readouterr().out


def test_what_is_left_out_added_nothing_and_what_is_kept_did(whole):
    """The differences in choice.json decide: no stage is kept that costs accuracy."""
    rows = [row for row in choice_of(whole)["added"] if row["added"] and row["decides"]]
    assert rows
    for row in rows:
        found = row["added"].items()
        ahead = [m for m, x in found if x["low"] > 0]
        lost = [
            m
            for m, x in found
            if m in ("Recall@20", "NDCG@100") and x["difference"] < -0.01 * x["value"]
        ]
        if row["instead"]:
            worst = min(x["difference"] / x["value"] for _, x in found)
            other = min(-x["difference"] / (x["value"] + x["difference"]) for _, x in found)
            assert row["kept"] == (worst > other)
        else:
            assert not row["kept"] or (ahead and not lost)


def moved(whole: Path, root: Path) -> tuple[Path, tune.Config]:
    """A copy of the run at `root`: all trials but composed ones and PPO, and nothing chosen."""
    shutil.copytree(whole, root)
    base = root / "runs" / "all"
    for gone in ("pretrain", "sft", "reward", "ppo", "compose", "preset", "evaluate", "baselines"):
        shutil.rmtree(base / gone, ignore_errors=True)
    for path in (base / "tune").iterdir():
        if path.name in ("done", "choice.json", "table.txt"):
            path.unlink()
    for path in (base / "tune").rglob("config.json"):
        path.write_text(path.read_text().replace(str(whole), str(root)))
    words = [f"--data={root}/data", f"--runs={root}/runs", "--run=all", "--device=cpu"]
    return base, parse(tune.Config, words)


def test_a_tuning_that_was_cut_short_ends_with_the_same_bytes(whole, tmp_path, monkeypatch):
    """Killed behind SFT, and again when its pages are composed; plan.json is followed as it is."""
    root = tmp_path / "again"
    base, again = moved(whole, root)
    for path in (base / "tune").iterdir():
        if path.name.startswith(("composed", "ppo", "sft-0.001")):
            shutil.rmtree(path)
    for path in (base / "tune" / "scores").glob("composed*"):
        path.unlink()
    composed = Bench.composed

    def die(self, trial, policy):
        raise Unplugged

    monkeypatch.setattr(Bench, "composed", die)
    with pytest.raises(Unplugged):
        tune.run(again)
    assert not (base / "tune" / "done").exists() and not (base / "preset/stages.json").exists()
    monkeypatch.setattr(Bench, "composed", composed)
    tune.run(again)
    first = (whole / "runs/all/tune/choice.json").read_text().replace(str(whole), str(root))
    assert (base / "tune/choice.json").read_text() == first
    for stage in choice_of(whole)["stages"]:
        ids = [json.loads((r / "runs/all" / stage / "done").read_text()) for r in (whole, root)]
        assert ids[0]["id"] == ids[1]["id"]
        options = [(r / "runs/all/preset" / stage).read_text() for r in (whole, root)]
        assert options[0].replace(str(whole), str(root)) == options[1]


def test_ppo_is_paid_by_the_outcome_model_of_the_composed_pages(whole, tmp_path, monkeypatch):
    """And where it is kept, the run's own PPO reads the run's own SFT and compose."""
    base, again = moved(whole, tmp_path / "kept")
    shutil.rmtree(base / "tune" / "ppo")  # its gate may have been closed
    (base / "tune" / "scores" / "ppo-ppo-one_shot.parquet").unlink(missing_ok=True)
    (base / "tune" / "scores" / "ppo-ppo-greedy.parquet").unlink(missing_ok=True)
    monkeypatch.setattr(ppo, "ask_gate", lambda *a: {"open": True, "skipped": "asked to"})
    judge = tune.Tuning.judge
    monkeypatch.setattr(
        tune.Tuning, "judge", lambda t, stage, *a, **m: judge(t, stage, *a, **m) or stage == "PPO"
    )
    kept = tune.run(again)["stages"]
    assert kept == ["pretrain", "sft", "ppo", "compose"]
    trial = json.loads((base / "tune/ppo/ppo/config.json").read_text())["config"]
    assert (trial["algo"], trial["item_reward"], trial["w_page"]) == ("expert", "outcome", 0)
    assert trial["compose_run"] in ("all/tune/composed-none", "all/tune/composed-sft")
    words = [f"--data={again.data}", f"--runs={again.runs}", "--run=all", "--device=cpu"]
    own = parse(ppo.Config, words, "pagellm ppo", "ppo")
    assert own.preset == str(base / "preset" / "ppo") and own.compose_run == own.source_run == ""
    assert reads("ppo", own) == ("sft", "compose")
    before = (base / "ppo" / "done").read_bytes()
    ppo.run(own)  # the same options and inputs: nothing is done anew
    assert (base / "ppo" / "done").read_bytes() == before


def test_behind_a_closed_gate_ppo_counts_as_not_tried(whole, tmp_path, monkeypatch, capsys):
    base, again = moved(whole, tmp_path / "closed")
    shutil.rmtree(base / "tune" / "ppo")
    gate = {"open": False, "reward": {}, "logits": {}, "difference": {}}
    monkeypatch.setattr(ppo, "ask_gate", lambda *a: gate)
    assert "ppo" not in tune.run(again)["stages"]
    assert f"PPO: not tried: {ppo.CLOSED}" in capsys.readouterr().out
    assert "PPO" in json.loads((base / "preset" / "stages.json").read_text())["left_out"]


def test_fit_again_runs_nothing_again(whole, capsys):
    before = {p: p.stat().st_mtime_ns for p in (whole / "runs/all").rglob("done")}
    pipeline.run(config(whole))
    assert {p: p.stat().st_mtime_ns for p in (whole / "runs/all").rglob("done")} == before
    assert "stages of the run" in capsys.readouterr().out


def test_fit_never_tunes_where_that_is_said_or_a_preset_is_there(tmp_path, monkeypatch):
    """The data set synthetic has a preset; a set without one is tuned."""
    asked = []
    monkeypatch.setattr(tune, "run", lambda c: asked.append(c.dataset))
    pipeline.tuned(config(tmp_path, tune="auto"))
    pipeline.tuned(config(tmp_path, tune="never", dataset="mine"))
    assert asked == []
    pipeline.tuned(config(tmp_path, tune="auto", dataset="mine"))
    pipeline.tuned(config(tmp_path, tune="always"))
    assert asked == ["mine", "synthetic"]


def test_a_log_is_a_file_or_a_directory_and_its_options_are_prepare_s(tmp_path):
    rows = [f"u{u},i{(u + j) % 9}" for u in range(12) for j in range(6)]
    (tmp_path / "log.csv").write_text("customer,sku\n" + "\n".join(rows) + "\n")
    told = "--user_column customer --item_column sku --k_core 3"
    made = config(tmp_path, dataset="mine", raw=str(tmp_path / "log.csv"))
    pipeline.prepared(replace(made, prepare=told))
    source = json.loads((tmp_path / "data/mine/source.json").read_text())
    assert source["counts"]["users"] == 12 and source["config"]["k_core"] == 3


def test_more_minutes_never_try_less():
    minutes = (0.5, 2, 5, 15, 60)
    plans = [plan_plain(SECONDS, m, SIZE) for m in minutes]
    for few, many in pairwise(plans):
        assert few.judged <= many.judged and len(few.sizes) <= len(many.sizes)
        assert few.trials["ALS"] <= many.trials["ALS"] or few.factors < many.factors
    later = [plan_facts(0.8, 0.1, m * 10, SIZE).trials for m in minutes]
    for few, many in pairwise(later):
        assert all(few[name] <= many[name] for name in few)
    steps = [plan_steps(COSTS, 0.02, m * 40, SIZE) for m in minutes]
    for few, many in pairwise(steps):
        assert few.eval_users <= many.eval_users and few.ppo <= many.ppo
        assert len(few.sft) <= len(many.sft) and few.pretrain <= many.pretrain
    assert steps[0].sft == [] and steps[0].ppo == 0 and steps[-1].sft and steps[-1].ppo
    nothing = plan_steps(COSTS, 0.02, -100.0, SIZE)  # more was spent than there was
    assert (nothing.sft, nothing.ppo, nothing.pretrain) == ([], 0, 0) and nothing.fold_users > 0
    assert plan_facts(0.8, 0.1, -5.0, SIZE).trials == {"ALS+facts": 0, "ALS+ratings": 0}


def test_what_is_planned_costs_no_more_than_there_is():
    """By the costs that were measured; one more setting or step would not fit."""
    fit, rank, room = 2.0, 0.5, 60.0
    trials = plan_facts(fit, rank, room, SIZE).trials
    spent = trials["ALS+facts"] * (fit + rank) + trials["ALS+ratings"] * (2 * fit + rank)
    assert room - (3 * fit + 2 * rank) < spent <= room
    # what a validation takes counts too: nine for each learning rate
    costs, left = Costs(fit=0.1, text=1e9, step=0.05, look=2.0), 600.0
    steps = plan_steps(costs, 0.0, left, SIZE)
    spent = len(steps.sft) * (steps.sft_steps * 0.05 + 9 * 2.0)
    assert left / 6 - 3 * 0.05 < spent <= left / 6
    # slot by slot PPO draws its pages token by token: fewer steps of it fit
    fast, slow = (plan_steps(COSTS, 0.0, 1500.0, SIZE, mode) for mode in ("one_shot", "greedy"))
    assert 0 < slow.ppo < fast.ppo and slow.sft_steps == fast.sft_steps


def test_every_part_of_the_plan_is_made_once_from_the_seconds_that_are_left(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(planning, "clocks", lambda: (now[0], now[0] * 2))
    path, asked = tmp_path / "plan.json", []

    def make(left: float) -> Facts:
        asked.append(left)
        now[0] += 5
        return Facts({}, left)

    written = Written(path, minutes=1)
    now[0] += 10
    assert written.part("a", Facts, make).fit == 50.0
    now[0] += 7
    assert written.part("a", Facts, make).fit == 50.0 and written.spent() == 22.0
    # a later run goes on from what is written: what was spent behind it does not count
    now[0] += 1000
    again = Written(path, minutes=1)
    now[0] += 20
    assert again.part("a", Facts, make).fit == 50.0
    assert again.part("b", Facts, make).fit == 60.0 - 15 - 20
    assert asked == [50.0, 25.0] and again.spent() == 40.0


def test_a_plan_fits_the_shop():
    """No ratings and no facts: no model of them; a huge catalogue: no EASE, few factors.

    Of a large shop the search tries few settings rather than narrow ones: as Toys, 19,412 users and
    11,924 items, where 8 factors have a fifth of the NDCG of 512.
    """
    toys = replace(SECONDS, als={"32": 4.6, "128": 8.7}, rank=2.6)
    size = ShopSize(19_412, 11_924, False, True, 13)
    plan = plan_plain(toys, 8, size)
    assert max(plan.factors) >= 128 and plan.trials["ALS"] >= 8
    room = 8 * 60 * 0.35 * 0.85 - plan.trials["ALS"] * 8.1
    assert plan_facts(8.7, 2.6, room, size).trials["ALS+facts"] >= 2
    bare = replace(SIZE, rated=False, facts=False)
    assert set(plan_facts(0.8, 0.1, 500, bare).trials.values()) == {0}
    # a small shop has few steps an epoch, and time for many epochs
    assert plan_steps(COSTS, 0.02, 600, replace(SIZE, users=154)).sft_steps >= 30
    slow = replace(SECONDS, als={"32": 20.0, "128": 200.0})
    assert max(plan_plain(slow, 15, SIZE).factors) < max(plan_plain(SECONDS, 15, SIZE).factors)
    assert als_seconds(SECONDS, 32) == 0.2 and round(als_seconds(SECONDS, 64), 9) == 0.4
    # a wide fit that was timed counts, not what the narrow ones promise
    steep = replace(SECONDS, als=SECONDS.als | {"256": 40.0})
    assert max(plan_plain(steep, 15, SIZE).factors) == 128
    assert max(plan_plain(SECONDS, 15, SIZE).factors) == 512
    assert plan_plain(SECONDS, 15, replace(SIZE, items=60_000)).trials["EASE"] == 0
    # compose fits EASE too, of up to DENSE items: what that takes is not there for its users
    few, many = (plan_steps(COSTS, cube, 700, replace(SIZE, items=6000)) for cube in (0.2, 0.02))
    assert few.fold_users < many.fold_users and few.eval_users < many.eval_users
    few, many = (plan_steps(COSTS, cube, 700, replace(SIZE, items=60_000)) for cube in (0.2, 0.02))
    assert few == many


def test_long_histories_leave_room_for_the_longest_page_of_sft(served, monkeypatch):
    """A shop whose users have chosen hundreds of items: each prompt tried fits beside a page."""
    before, shop = served / "runs" / "base" / "pretrain", load(served / "data" / "synthetic")
    size = from_state(load_model_file(before / "model.pt")).shape
    monkeypatch.setattr(tune, "size_of", lambda shop: ShopSize(80, 54, True, True, 10_000))
    size_there = ShopSize(80, 54, True, True, 10_000)
    asked = SimpleNamespace(size=size_there, shop=shop, config=SimpleNamespace(k=20))
    found = tune.styles(asked, "nano")
    assert SIZES["nano"].n_ctx == size.n_ctx and max(s.max_history for s in found) > 100
    for style in found:
        own = sft.Config(
            dataset="synthetic",
            data=str(served / "data"),
            max_history=style.max_history,
            use_ratings=style.use_ratings,
        )
        policy = sft.new_policy(own, before, PageMaker(shop, 0.0), shop, "cpu")
        policy.check_room(own.max_page)


def test_the_search_with_facts_begins_with_as_few_factors_as_are_nearly_as_good():
    best = {"factors": 512, "alpha0": 0.1, "reg": 0.03, "nu": 0.5}

    def tried(**values: float) -> dict[str, float]:
        at = {f"ALS {json.dumps(best | {'factors': int(f[1:])})}": v for f, v in values.items()}
        other = f"ALS {json.dumps(best | {'factors': 8, 'nu': 1.0})}"
        return at | {other: 0.4, "EASE {}": 0.4}

    found = tried(_512=0.4, _256=0.399, _128=0.3981, _64=0.3979)
    assert tune.narrowed(found, best) == best | {"factors": 128}
    assert tune.narrowed(tried(_512=0.4, _128=0.39), best) == best


def test_epochs_for_so_many_steps():
    assert round(float(epochs_for(7, 130)) * 3) == 7


def test_a_stage_pays_where_it_is_ahead_and_no_accuracy_is_lost():
    rng = np.random.default_rng(0)
    base = {m: rng.random(400) for m in ("Recall@20", "NDCG@100", "ILD", "energy")}
    same = {m: x.copy() for m, x in base.items()}
    assert not pays(compared(same, base))
    assert pays(compared(same | {"ILD": base["ILD"] + 0.1}, base))
    assert not pays(compared(same | {"ILD": base["ILD"] + 0.1}, base), ("NDCG@100",))
    more = same | {"ILD": base["ILD"] + 0.1}
    worse = more | {"Recall@20": base["Recall@20"] - 0.1}
    assert not pays(compared(worse, base)) and not better(worse, base)
    # half a percent lower in the mean is no loss, though with 400 users it may well be one
    noisy = base["Recall@20"] + rng.normal(0, 0.5, 400)
    noisy += base["Recall@20"].mean() * 0.995 - noisy.mean()
    found = compared(more | {"Recall@20": noisy}, base)
    assert found["Recall@20"]["verdict"] == "unclear" and pays(found)


def test_of_two_ways_to_make_pages_the_one_with_the_smaller_worst_loss_is_taken():
    def of(**means):
        row = {"Recall@20": 0.3, "NDCG@100": 0.3, "ILD": 0.7, "energy": 2.0} | means
        return {m: np.full(50, value) for m, value in row.items()}

    plain = of()
    assert not better(plain, plain)
    assert better(of(ILD=0.8, **{"Recall@20": 0.29}), plain)
    assert not better(of(ILD=0.71, **{"Recall@20": 0.29}), plain)
    assert not better(plain, of(ILD=0.8, **{"Recall@20": 0.29}))


def test_what_is_wrong_is_said():
    with pytest.raises(PageLLMError, match="minutes"):
        tune.Config(minutes=0)
    with pytest.raises(PageLLMError, match="gone.csv: no such file"):
        pipeline.prepared(pipeline.Config(dataset="mine", raw="gone.csv"))
    with pytest.raises(PageLLMError, match="auto, always, never"):
        pipeline.Config(tune="often")
    assert not presets.has_one("mine") and presets.has_one("toys")


def test_fit_says_where_prepares_options_go(tmp_path):
    (tmp_path / "log.csv").write_text("who,what\na,b\n")
    config = pipeline.Config(
        dataset="mine", raw=str(tmp_path), data=str(tmp_path / "d"), runs=str(tmp_path / "r")
    )
    with pytest.raises(PageLLMError, match='(?s)--user_column.*--prepare "--item_column sku"'):
        pipeline.prepared(config)


@pytest.mark.parametrize("more", [{"raw": "log.csv"}, {"where": "n > 0"}, {"item_column": "sku"}])
def test_the_made_up_shop_refuses_options_that_it_would_pass_over(more):
    with pytest.raises(PageLLMError, match="made up; name yours, --dataset NAME"):
        prepare.Config(**more)
    if "raw" in more:
        with pytest.raises(PageLLMError, match="made up"):
            pipeline.Config(**more)
