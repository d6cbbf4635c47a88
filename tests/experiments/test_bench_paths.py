"""The bench of the hot paths: both versions give equal results, and slow-downs are named."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from experiments.cost import bench, bench_prepare, marks
from pagellm.stage.config import PageLLMError

ROOT = Path(__file__).parents[2]
ALONE = ("evaluate", "top", "reviews-2014", "reviews-2018", "reviews-2023", "histories", "tokens")


@pytest.mark.parametrize("name", bench.ROWS)
def test_both_versions_give_the_same(name):
    if name.startswith("orjson"):
        pytest.importorskip("orjson", reason="the peer of this row is in the extra [dev]")
    elif name not in ALONE:
        pytest.importorskip("transformers", reason="the peer of this row is in the extra [dev]")
    (case,) = bench.cases(bench.Config(only=name, quick=True))
    try:
        difference = case.differ(case.plain(), case.ours())
        # Losses and scores agree up to rounding; pages, tables, ids and tokens are equal.
        assert difference <= {"train": 1e-4, "train-page": 1e-4, "evaluate": 1e-9}.get(name, 0.0)
        if case.floor:
            case.floor()
    finally:
        case.close()


def test_a_quick_run_prints_a_table_and_one_line_of_json(capsys):
    bench.run(bench.Config(only="tokens,histories", quick=True, repeats=1))
    heading, *table, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["rows"]
    assert (
        [row["row"] for row in rows]
        == ["tokens", "histories"]
        == [text.split()[0] for text in table]
    )
    assert all(
        row["x"] == row["plain_ms"] / row["ours_ms"] > 0 and row["max_diff"] == 0 for row in rows
    )


def test_rows_without_their_peer_are_left_out_by_name(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "orjson", None)
    assert not list(bench.cases(bench.Config(only="orjson-2023", quick=True)))
    assert "orjson-2023: left out, orjson is not installed" in capsys.readouterr().err


def test_unknown_rows_are_refused():
    with pytest.raises(PageLLMError, match="only"):
        bench.Config(only="token")


def test_prepare_is_timed_with_what_its_first_process_does_alone(capsys):
    found = bench_prepare.run(bench_prepare.Config(lines=1000, characters=20))
    assert 0 < found["first_seconds"] <= found["processor_seconds"] + 0.1 and found["lines"] == 1000
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found


class Slow(torch.autograd.Function):
    """x + 0, after waiting for given seconds in the forward and in the backward pass."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward_seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.backward_seconds)
        return grad, None, None


class Trunk(torch.nn.Module):
    """Waits for given times before the blocks, in them and after the last norm, in both passes."""

    def __init__(self):
        super().__init__()
        self.h, self.ln_f = (
            torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]),
            torch.nn.LayerNorm(2),
        )

    def forward(self, x, waits):
        x = self.h[0](Slow.apply(x, *waits["rows"]))
        return Slow.apply(self.ln_f(Slow.apply(self.h[1](x), *waits["blocks"])), *waits["softmax"])


@pytest.mark.parametrize("slow", ["rows", "blocks", "softmax"])
@pytest.mark.parametrize("way", [0, 1])
def test_time_goes_to_the_part_it_was_spent_in_and_the_parts_are_the_whole(slow, way):
    trunk, x = Trunk(), torch.ones(1, 2, requires_grad=True)
    waits = {name: (0.0, 0.0) for name in ("rows", "blocks", "softmax")}
    waits[slow] = (0.05, 0.0) if way == 0 else (0.0, 0.05)
    trunk(x, waits).sum().backward()  # the first call of anything is slow
    watch, began = marks.Watch("cpu"), time.perf_counter()
    hooks = marks.borders(trunk, watch.mark)
    loss = trunk(x, waits).sum()
    watch.mark("softmax, forward")
    loss.backward()
    watch.mark("rows, gradient")
    whole = (time.perf_counter() - began) * 1e3
    for hook in hooks:
        hook.remove()
    where = {
        "rows": ("rows looked up", "rows, gradient"),
        "blocks": ("blocks, forward", "blocks, backward"),
        "softmax": ("softmax, forward", "softmax, backward"),
    }[slow][way]
    assert watch.spent[where] == max(watch.spent.values()) >= 50
    assert sum(watch.spent.values()) == pytest.approx(whole, abs=5)


@pytest.mark.parametrize("name", bench.PARTED)
def test_a_profile_names_the_parts_of_both_and_their_sum(name, capsys):
    if name not in ALONE:
        pytest.importorskip("transformers", reason="the peer of this row is in the extra [dev]")
    bench.run(bench.Config(only=name, quick=True, repeats=1, profile=True))
    *table, last = capsys.readouterr().out.splitlines()
    (row,) = json.loads(last)["rows"]
    assert table[0].startswith(name) and table[-1].split()[0] == "all"
    for version in ("plain", "ours"):
        assert sum(row[f"{version}_parts"].values()) == pytest.approx(row[f"{version}_ms"])
    wanted = (
        {"product", "top 100", "hits and metrics"}
        if name == "evaluate"
        else {
            "rows looked up",
            "blocks, forward",
            "softmax, forward",
            "softmax, backward",
            "blocks, backward",
            "AdamW",
        }
    )
    assert wanted <= set(row["plain_parts"]) & set(row["ours_parts"])


def test_processor_time_leaves_out_the_time_that_is_waited():
    spent = {}
    for clock in marks.CLOCKS:
        watch = marks.Watch("cpu", clock)
        time.sleep(0.05)
        watch.mark("sleep")
        spent[clock] = watch.spent["sleep"]
    assert spent["cpu"] < 20 < 50 <= spent["wall"]


def test_rows_without_marks_have_no_profile():
    with pytest.raises(PageLLMError, match="profile: tokens has no marks"):
        bench.Config(only="tokens", profile=True)
    with pytest.raises(PageLLMError, match="clock='cpu': want wall, or with --profile cpu"):
        bench.Config(clock="cpu")


@pytest.fixture
def here_and_there(monkeypatch):
    """Run compare() with these times of ours at the base and here, pair after pair."""
    if subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True
    ).returncode:
        pytest.skip("not a git checkout")

    def compare(base, here):
        times = {True: iter(here), False: iter(base)}
        monkeypatch.setattr(
            bench, "ours_at", lambda place, config, root: next(times[place == root])
        )
        return bench.compare(bench.Config(base="HEAD", repeats=len(base)))

    return compare


def test_a_row_that_became_slower_stops_with_its_name(here_and_there, capsys):
    with pytest.raises(PageLLMError, match=r"slower than at HEAD: tokens: 1.50 times$"):
        here_and_there([{"tokens": 10, "top": 10}] * 3, [{"tokens": 15, "top": 9}] * 3)
    assert "tokens" in capsys.readouterr().out


def test_noise_is_no_slow_down_and_a_new_row_is_no_row_to_compare(here_and_there, capsys):
    found = here_and_there(
        [{"top": 10}, {"top": 10}, {"top": 10}],
        [{"top": 30, "new": 1}, {"top": 9, "new": 1}, {"top": 12, "new": 1}],
    )
    assert [row["row"] for row in found["rows"]] == ["top"] and found["rows"][0]["ratio"] == 1.2
    assert "new" in capsys.readouterr().out


def test_an_unknown_commit_is_named():
    with pytest.raises(PageLLMError, match="base='no-such-commit'"):
        bench.run(bench.Config(base="no-such-commit"))
