"""The bench runs, and what it times is the same mathematics."""

import json

import pytest
import torch

from kernels import bench

ROW = {
    "kernel",
    "shape",
    "plain_ms",
    "ours_ms",
    "x",
    "floor_ms",
    "share",
    "plain_mb",
    "ours_mb",
    "max_diff",
}


@pytest.mark.parametrize(
    "case", list(bench.cases("cpu", quick=True)), ids=lambda x: x.kernel + x.shape
)
def test_plain_and_ours_agree_with_float64(case):
    for plain, ours, exact in zip(case.plain(), case.ours(), case.exact(), strict=True):
        assert plain.shape == ours.shape == exact.shape and exact.dtype == torch.float64
        size = max(exact.abs().max().item(), 1e-12)
        assert (ours - exact).abs().max().item() < 1e-5 * size
        assert (plain - exact).abs().max().item() < 1e-4 * size


def test_quick_run_prints_a_table_and_one_line_of_json(capsys):
    assert bench.main(["--quick", "--repeats", "1"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert {"cpu", "threads", "device", "torch", "commit", "rows"} == set(found)
    assert len(table) == len(found["rows"]) + 1
    for row, text in zip(found["rows"], table[1:], strict=True):
        assert set(row) == ROW and row["kernel"] in text and row["shape"] in text
        assert row["max_diff"] < 1e-5 and row["x"] == row["plain_ms"] / row["ours_ms"] > 0


def test_peak_memory_sees_what_a_function_holds_and_forgets_what_came_before():
    if bench.peak_megabytes(lambda: None, "cpu") is None:
        pytest.skip("this system keeps no resettable high-water mark")
    large = bench.peak_megabytes(lambda: torch.ones(10_000_000), "cpu")
    small = bench.peak_megabytes(lambda: torch.ones(1000), "cpu")
    assert 35 < large < 60 and small < 10


@pytest.mark.parametrize("argv", [["--device", "cuda"], ["--repeats", "0"], ["--shape", "3"]])
def test_wrong_options_stop_it(argv, capsys):
    if argv == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("cuda: there is a CUDA device here")
    with pytest.raises(SystemExit) as stop:
        bench.main(argv)
    assert stop.value.code == 2 and argv[0] in capsys.readouterr().err
