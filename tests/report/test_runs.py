"""`pagellm runs` and `pagellm compare`: what they say is what the runs' files say."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pagellm.report import compare, runs
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError

rng = np.random.default_rng(0)
BASE = rng.random(200)


def evaluated(root, name, at, gain=0.0, noise=0.0, users=200, **options):
    """A run with a finished SFT policy and evaluation, `at` seconds after 1970."""
    made = {"dataset": "toys", "split": "test", "mask": "train+valid", "k": 20} | options
    scores = {
        "NDCG@100": BASE[:users] + gain,
        "WMRD": BASE[:users] - gain,
        "ILD": BASE[:users] + np.resize([noise, -noise], users),
    }
    for stage in ("sft", "evaluate"):
        folder = root / name / stage
        folder.mkdir(parents=True)
        record = {"config": made, "inputs": {"data": options.get("data", "same")}}
        (folder / "config.json").write_text(json.dumps(record))
        (folder / "done").write_text(json.dumps({"id": f"{name}-{stage}"}))
        for file in folder.iterdir():
            os.utime(file, (at, at))
    (folder / "sft").mkdir()
    table = pa.table({"user": np.arange(users), **scores})
    pq.write_table(table, folder / "sft" / "per_user.parquet")
    means = {m: {"mean": float(v.mean())} for m, v in scores.items()}
    (folder / "metrics.json").write_text(json.dumps({"sft": means}))


def test_runs_are_listed_newest_first_with_what_their_files_say(tmp_path, capsys):
    evaluated(tmp_path, "autumn", 1_700_000_000)
    evaluated(tmp_path, "winter", 1_800_000_000, gain=0.1)
    (tmp_path / "winter" / "ppo").mkdir()
    (tmp_path / "winter" / "ppo" / "config.json").write_text('{"config": {}, "inputs": {}}')
    os.utime(tmp_path / "winter" / "ppo" / "config.json", (1_800_000_000,) * 2)
    (tmp_path / "live").symlink_to("autumn")
    (tmp_path / "notes").mkdir()  # no run
    evaluated(tmp_path, "hurt", 1_600_000_000)
    (tmp_path / "hurt" / "sft" / "done").write_text("{")
    (tmp_path / "odd" / "sft").mkdir(parents=True)
    (tmp_path / "odd" / "sft" / "config.json").write_text("{}")
    first, second = runs.run(runs.Config(runs=str(tmp_path)))
    told = capsys.readouterr()
    said = told.out.splitlines()
    assert "hurt cannot be read: " in told.err and "done is damaged" in told.err
    assert "odd cannot be read: " in told.err
    assert (first["run"], second["run"]) == ("winter", "autumn") and len(said) == 3
    assert first["stages"] == ["sft", "evaluate"] and first["begun"] == ["ppo"]
    assert first["NDCG@100"] == pytest.approx(BASE.mean() + 0.1)
    assert (second["links"], second["hash"]) == (["live"], "autumn-sft")
    assert "autumn <- live" in said[2] and "(ppo begun)" in said[1] and "autumn-sft" in said[2]
    assert f"{BASE.mean():.4f}" in said[2]
    runs.run(runs.Config(runs=str(tmp_path), json=True))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [first, second]
    with pytest.raises(PageLLMError, match="no run of beauty in"):
        runs.run(runs.Config(runs=str(tmp_path), dataset="beauty"))
    with pytest.raises(PageLLMError, match="no run in"):
        runs.run(runs.Config(runs=str(tmp_path / "none")))


def test_compare_says_b_less_a_and_which_way_is_better(tmp_path, capsys):
    evaluated(tmp_path, "a", 1)
    evaluated(tmp_path, "b", 2, gain=0.1, noise=1.0)
    argv = ["a", "b", "--runs", str(tmp_path), "--n_boot", "200", "--decimals", "3"]
    assert main(compare.Config, compare.run, "pagellm compare", argv) == 0
    out = capsys.readouterr().out
    ndcg, wmrd, ild = (
        next(line for line in out.splitlines() if line.startswith(name))
        for name in ("NDCG@100", "WMRD", "ILD")
    )
    assert "+0.100†" in ndcg and ndcg.endswith("ahead")
    assert "-0.100†" in wmrd and wmrd.endswith("ahead")
    assert "†" not in ild and "ahead" not in ild and "behind" not in ild
    config = compare.Config(a="b", b="a", runs=str(tmp_path), n_boot=200)
    back = {r["metric"]: r for r in compare.run(config)}
    assert back["NDCG@100"]["difference"] == pytest.approx(-0.1)
    assert back["NDCG@100"]["p_holm"] == pytest.approx(3 * 2 / 201)
    assert back["NDCG@100"]["a"] - back["NDCG@100"]["b"] == pytest.approx(0.1)
    assert capsys.readouterr().out.count("behind") == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"k": 10}, "k 20 and 10"),
        ({"data": "other"}, "data 'same' and 'other'"),
        ({"users": 150}, "scored on other users"),
    ],
)
def test_runs_that_were_not_evaluated_alike_are_not_compared(tmp_path, options, said):
    evaluated(tmp_path, "a", 1)
    evaluated(tmp_path, "b", 2, **options)
    with pytest.raises(PageLLMError, match=said):
        compare.run(compare.Config(a="a", b="b", runs=str(tmp_path)))


def test_what_is_missing_is_named(tmp_path):
    evaluated(tmp_path, "a", 1)
    with pytest.raises(PageLLMError, match="no evaluation in .*none"):
        compare.run(compare.Config(a="a", b="none", runs=str(tmp_path)))
    with pytest.raises(PageLLMError, match="there are: a. Name one"):
        compare.run(compare.Config(a="a", b="none", runs=str(tmp_path)))
    with pytest.raises(PageLLMError, match="no pages of ppo; there are sft"):
        compare.run(compare.Config(a="a", b="a", policy="ppo", runs=str(tmp_path)))
    with pytest.raises(PageLLMError, match="want two runs"):
        compare.Config(a="a")
    (tmp_path / "a" / "evaluate" / "done").unlink()
    with pytest.raises(PageLLMError, match="evaluate .*toys .*a"):  # its data are named too
        compare.run(compare.Config(a="a", b="a", runs=str(tmp_path)))
