"""The bench of the hot paths: what it times gives the same results, and a slow-down is found and named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import bench
from pagellm.config import PageLLMError

ROOT = Path(__file__).parent.parent
ALONE = ("evaluate", "top", "reviews-2014", "reviews-2018", "reviews-2023", "histories", "tokens")


@pytest.mark.parametrize("name", bench.ROWS)
def test_both_versions_give_the_same(name):
    if name.startswith("orjson"):
        pytest.importorskip("orjson", reason="the peer of this row is in the extra [dev]")
    elif name not in ALONE:
        pytest.importorskip("transformers", reason="the peer of this row is in the extra [dev]")
    case, = bench.cases(bench.Config(only=name, quick=True))
    try:
        difference = case.differ(case.plain(), case.ours())
        # Losses and scores to rounding; pages, tables, ids and tokens exactly.
        assert difference <= {"train": 1e-4, "train-page": 1e-4, "evaluate": 1e-9}.get(name, 0.0)
        if case.floor:
            case.floor()
    finally:
        case.close()


def test_a_quick_run_prints_a_table_and_one_line_of_json(capsys):
    bench.run(bench.Config(only="tokens,histories", quick=True, repeats=1))
    heading, *table, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["rows"]
    assert [row["row"] for row in rows] == ["tokens", "histories"] == [text.split()[0] for text in table]
    assert all(row["x"] == row["plain_ms"] / row["ours_ms"] > 0 and row["max_diff"] == 0 for row in rows)


def test_rows_without_their_peer_are_left_out_by_name(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "orjson", None)
    assert not list(bench.cases(bench.Config(only="orjson-2023", quick=True)))
    assert "orjson-2023: left out, orjson is not installed" in capsys.readouterr().err


def test_unknown_rows_are_refused():
    with pytest.raises(PageLLMError, match="only"):
        bench.Config(only="token")


@pytest.fixture
def here_and_there(monkeypatch):
    """compare() with these times of ours at the base and here, pair after pair."""
    if subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("not a git checkout")

    def compare(base, here):
        times = {True: iter(here), False: iter(base)}
        monkeypatch.setattr(bench, "ours_at", lambda place, config, root: next(times[place == root]))
        return bench.compare(bench.Config(base="HEAD", repeats=len(base)))

    return compare


def test_a_row_that_became_slower_stops_with_its_name(here_and_there, capsys):
    with pytest.raises(PageLLMError, match=r"slower than at HEAD: tokens: 1.50 times$"):
        here_and_there([{"tokens": 10, "top": 10}] * 3, [{"tokens": 15, "top": 9}] * 3)
    assert "tokens" in capsys.readouterr().out


def test_noise_is_no_slow_down_and_a_new_row_is_no_row_to_compare(here_and_there, capsys):
    found = here_and_there([{"top": 10}, {"top": 10}, {"top": 10}],
                           [{"top": 30, "new": 1}, {"top": 9, "new": 1}, {"top": 12, "new": 1}])
    assert [row["row"] for row in found["rows"]] == ["top"] and found["rows"][0]["ratio"] == 1.2
    assert "new" in capsys.readouterr().out


def test_an_unknown_commit_is_named():
    with pytest.raises(PageLLMError, match="base='no-such-commit'"):
        bench.run(bench.Config(base="no-such-commit"))
