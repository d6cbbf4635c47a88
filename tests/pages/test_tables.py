"""Tables say what the arrays say: means, paired differences, which row is best."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from pagellm.pages.tables import (
    DAGGER,
    compare,
    compare_seeds,
    latex,
    markdown,
    rewrite,
    save,
    spread,
    text_table,
)
from pagellm.stage.config import PageLLMError

rng = np.random.default_rng(0)
BASE = rng.random(200)
ROWS = {
    "EASE": [{"Recall@20": BASE, "WMRD": BASE}],
    "A & B": [{"Recall@20": BASE + 0.1, "WMRD": BASE + 0.1}],
    "none": [
        {"Recall@20": np.where(np.arange(200) < 100, BASE, np.nan), "WMRD": np.full(200, np.nan)}
    ],
}


def at(records, row, metric):
    return next(r for r in records if (r["variant"], r["metric"]) == (row, metric))


def test_a_constant_gain_has_an_interval_of_no_width():
    record = at(compare(ROWS, ("Recall@20",), "EASE"), "A & B", "Recall@20")
    assert record["mean"] == pytest.approx(BASE.mean() + 0.1)
    assert [record[k] for k in ("difference", "low", "high")] == pytest.approx([0.1] * 3)


def test_the_effect_is_the_difference_over_its_spread_among_users():
    gap = rng.normal(0.3, 0.5, 200)
    record = at(compare({"a": [{"m": BASE}], "b": [{"m": BASE + gap}]}, ("m",), "a"), "b", "m")
    assert record["effect"] == pytest.approx(gap.mean() / gap.std())
    assert record["low"] < gap.mean() < record["high"]
    assert record["high"] - record["low"] == pytest.approx(2 * 1.96 * gap.std() / 200**0.5, rel=0.2)


def test_seeds_are_paired_with_seeds():
    a, b = [{"m": BASE + s} for s in (0, 5)], [{"m": BASE + s + 0.1} for s in (0, 5)]
    record = at(compare({"a": a, "b": b}, ("m",), "a"), "b", "m")
    assert record["seeds"] == 2 and [
        record[k] for k in ("difference", "low", "high")
    ] == pytest.approx([0.1] * 3)
    with pytest.raises(PageLLMError, match="a: 2, b: 1 seeds"):
        compare({"a": a, "b": b[:1]}, ("m",), "a")


def test_users_without_a_score_are_left_out_and_so_are_metrics_without_users():
    records = compare(ROWS, ("Recall@20", "WMRD", "absent"), "EASE")
    assert at(records, "none", "Recall@20")["difference"] == 0.0
    assert [at(records, row, "Recall@20")["users"] for row in ("EASE", "none")] == [200, 100]
    assert {r["metric"] for r in records if r["variant"] == "none"} == {"Recall@20"}
    assert {r["metric"] for r in records} == {"Recall@20", "WMRD"}


def test_best_is_bold_by_the_metrics_direction():
    records = compare(ROWS, ("Recall@20", "WMRD"), "EASE")
    best = f"{BASE.mean() + 0.1:.4f}", f"{BASE.mean():.4f}"
    text, tex = markdown(records), latex(records)
    assert text.count("**") == 4 and f"**{best[0]}**" in text and f"**{best[1]}**" in text
    assert rf"\textbf{{{best[0]}}}" in tex and tex.count(r"\textbf") == 2 and r"A \& B" in tex
    assert "Recall@20 ↑" in text and "WMRD ↓" in text and "d +" in text
    widths = {line.count("|") for line in text.splitlines()}
    assert widths == {4} and all(
        line.count(" & ") == 2 for line in tex.splitlines() if line.endswith(r"\\")
    )


def test_equal_bests_are_all_bold_and_equal_columns_not_at_all():
    same = {
        "a": [{"m": BASE, "n": BASE}],
        "b": [{"m": BASE, "n": BASE}],
        "c": [{"m": BASE - 1, "n": BASE}],
    }
    records = compare(same, ("m", "n"), "a")
    assert markdown(records).count("**") == 4 and latex(records).count(r"\textbf") == 2


def test_save_writes_all_three(tmp_path):
    records = compare(ROWS, ("Recall@20",), "EASE")
    text = save(tmp_path, records, "heading")
    assert (tmp_path / "table.md").read_text() == text and text.startswith("heading\n")
    assert (tmp_path / "table.tex").read_text() == (f"% heading\n% {DAGGER}\n{latex(records)}\n")
    assert pq.read_table(tmp_path / "table.parquet").to_pylist() == records


def test_an_unknown_reference_is_refused():
    with pytest.raises(PageLLMError, match="no row 'SLIM'"):
        compare(ROWS, ("Recall@20",), "SLIM")


def test_spread_over_seeds_stands_beside_the_mean_and_is_left_out_of_one_seed():
    a, b = [{"WMRD": BASE + s} for s in (0.0, 2.0)], [{"WMRD": BASE + s + 0.5} for s in (0.0, 4.0)]
    mean = BASE.mean()
    line = spread(compare_seeds({"float32": a, "bfloat16": b}, ("WMRD", "absent"))).splitlines()
    assert line[0] == "| | float32 | bfloat16 |" and len(line) == 3
    # Seeds are 2 and 4 apart: standard deviations 2 / sqrt 2 and 4 / sqrt 2. The differences are
    # 0.5 in one seed and 2.5 in the other.
    assert line[2] == (
        f"| WMRD ↓ | {mean + 1:.4f} ± 1.4142 "
        f"| {mean + 2.5:.4f} ± 2.8284, +1.5000 [+0.5000, +2.5000], d +inf |"
    )
    assert "±" not in spread(compare_seeds({"float32": a[:1], "bfloat16": b[:1]}, ("WMRD",)))


def test_a_dagger_marks_what_is_clear_after_correction_and_nothing_else():
    noise = np.random.default_rng(3).normal(0, 1, 200)
    rows = {
        "a": [{"m": BASE, "n": BASE}],
        "clear": [{"m": BASE + 0.1, "n": BASE + noise}],
    }
    records = compare(rows, ("m", "n"), "a", n_boot=200)
    clear, vague = at(records, "clear", "m"), at(records, "clear", "n")
    assert clear["p"] == pytest.approx(2 / 201) and clear["p_holm"] == pytest.approx(4 / 201)
    assert vague["p_holm"] == vague["p"] > 0.05
    assert at(records, "a", "m")["p"] is None
    for text, mark in ((markdown(records), "†"), (latex(records), r"^\dagger")):
        assert text.count(mark) == 1 and f"0.1000{mark}" in text
    row = {"a": {"m": {"mean": 0.5, "low": 0.4, "high": 0.6, "p_holm": 0.01}}}
    assert "0.5000†" in text_table(row, ("m",))
    assert "†" not in text_table({"a": {"m": row["a"]["m"] | {"p_holm": 0.06}}}, ("m",))


def test_decimals_are_the_reader_s_choice_also_afterwards(tmp_path):
    records = compare(ROWS, ("Recall@20",), "EASE")
    before = save(tmp_path, records, "of 200 users")
    assert DAGGER in before and "0.1000" in before
    again = rewrite(tmp_path, 2)
    assert "+0.10†" in again and "0.1000" not in again and again.count(DAGGER) == 1
    assert again.startswith("of 200 users\n")
    assert "0.1000" not in (tmp_path / "table.tex").read_text()
    assert rewrite(tmp_path, 4) == before
    row = {"a": {"m": {"mean": 0.51234, "low": 0.4, "high": 0.6}}}
    assert "0.51\n" in text_table(row, ("m",), decimals=2).replace(" ", "")
