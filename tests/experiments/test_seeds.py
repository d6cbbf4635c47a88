"""Runs of several seeds in one table: means, paired differences, refusal of runs that differ."""

import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments import seeds
from pagellm import evaluate
from pagellm.baselines import compare
from pagellm.pages.tables import per_user
from pagellm.stage.config import PageLLMError


@pytest.fixture(scope="module")
def runs(served, tmp_path_factory):
    """The run of `served` as seeds 0 and 1; seed 1's PageLLM scores a quarter higher."""
    root = tmp_path_factory.mktemp("seeds")
    (root / "data").symlink_to(served / "data")
    shutil.copytree(
        served / "runs" / "base", root / "runs" / "base", ignore=shutil.ignore_patterns("evaluate")
    )
    evaluate.run(
        evaluate.Config(
            run="base",
            data=str(root / "data"),
            runs=str(root / "runs"),
            device="cpu",
            k=6,
            depth=40,
            n_boot=20,
            examples=1,
        )
    )
    for seed in (0, 1):
        folder = root / "runs" / f"synthetic-s{seed}" / "evaluate"
        shutil.copytree(root / "runs" / "base" / "evaluate", folder)
        made = json.loads((folder / "config.json").read_text())
        made["config"]["seed"] = seed
        (folder / "config.json").write_text(json.dumps(made))
    path = folder / "ppo" / "per_user.parquet"
    scores = pq.read_table(path).to_pydict()
    pq.write_table(
        pa.table(
            {name: x if name == "user" else np.array(x, float) + 0.25 for name, x in scores.items()}
        ),
        path,
    )
    compare.run(
        compare.Config(
            ranker="never",
            dataset="synthetic",
            data=str(root / "data"),
            runs=str(root / "runs"),
            trials=1,
            models="popularity,EASE",
            k=6,
            depth=40,
            n_boot=20,
        )
    )
    return root / "runs"


def test_rows_are_means_over_seeds_and_users(runs, capsys):
    records = {
        (r["variant"], r["metric"]): r
        for r in seeds.run(seeds.Config(runs=str(runs), seeds="0 1", n_boot=50))
    }
    assert "PageLLM, composed" not in {row for row, _ in records}  # no seed has composed pages
    for policy, row in list(seeds.OURS.items())[:2]:
        both = [
            per_user(runs / f"synthetic-s{s}" / "evaluate" / policy / "per_user.parquet")
            for s in (0, 1)
        ]
        assert records[row, "Recall@20"]["mean"] == pytest.approx(
            np.mean([s["Recall@20"].mean() for s in both])
        )
    ours, plain = (records[row, "Recall@20"] for row in ("PageLLM", seeds.OURS["sft"]))
    assert ours["difference"] == pytest.approx(ours["mean"] - plain["mean"])
    assert records["EASE", "Recall@20"]["seeds"] == 2
    printed = capsys.readouterr().out
    assert "2 seeds (0,1)" in printed and "popularity" in printed
    assert {p.name for p in (runs / "synthetic-seeds").iterdir()} == {
        "table.md",
        "table.tex",
        "table.parquet",
        "versus.json",
    }
    assert re.search(r"^PageLLM against +ahead", printed, re.MULTILINE)
    against = json.loads((runs / "synthetic-seeds" / "versus.json").read_text())
    best = next(r for r in against if (r["row"], r["metric"]) == ("popularity", "Recall@20"))
    gap = ours["mean"] - records["popularity", "Recall@20"]["mean"]
    assert best["difference"] == pytest.approx(gap)


def test_what_does_not_belong_together_is_refused(runs, tmp_path):
    with pytest.raises(PageLLMError, match="RUN=synthetic-s7 SEED=7"):
        seeds.run(seeds.Config(runs=str(runs), seeds="0,7"))
    with pytest.raises(PageLLMError, match="each once"):
        seeds.Config(seeds="0,0")
    with pytest.raises(PageLLMError, match="no row 'SASRec'"):
        seeds.run(seeds.Config(runs=str(runs), seeds="0,1", versus="SASRec"))
    shutil.copytree(runs, tmp_path / "runs")
    path = tmp_path / "runs" / "synthetic-s1" / "evaluate" / "config.json"
    made = json.loads(path.read_text())
    path.write_text(json.dumps(made | {"inputs": made["inputs"] | {"data": "another"}}))
    with pytest.raises(PageLLMError, match="different data"):
        seeds.run(seeds.Config(runs=str(tmp_path / "runs"), seeds="0,1"))
    path.write_text(json.dumps(made | {"config": made["config"] | {"seed": 5}}))
    with pytest.raises(PageLLMError, match="made with seed 5, not 1"):
        seeds.run(seeds.Config(runs=str(tmp_path / "runs"), seeds="0,1"))
