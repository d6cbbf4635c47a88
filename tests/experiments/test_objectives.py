"""The study of objectives: what each row learns, from where, and how its pages are decoded."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from experiments import objectives
from pagellm.stage.config import Options, PageLLMError
from pagellm.stage.files import read_json


def small(served, tmp_path) -> objectives.Config:
    return objectives.Config(
        seeds=1,
        more=0.5,
        preset="none",
        data=str(served / "data"),
        runs=str(tmp_path),
        pretrain=Options("--size nano --steps 2 --words 300"),
        sft=Options("--epochs 1 --k 6 --eval_users 10 --max_history 8 --batch 16"),
        evaluate=Options("--k 6"),
    )


def test_every_row_learns_and_decodes_as_it_says(served, tmp_path, capsys):
    records = objectives.run(small(served, tmp_path))
    assert {r["variant"] for r in records} == set(objectives.ROWS)
    assert "processor seconds of SFT: likelihood" in capsys.readouterr().out

    def of(run: str, stage: str) -> dict:
        path = tmp_path / "objectives" / f"synthetic-s0{run}" / stage / "config.json"
        return read_json(path)["config"]

    more = of("-value--own-rows", "sft")
    assert more["objective"] == "value" and more["untie"] and more["epochs"] == 0.5
    assert more["start_run"] == "objectives/synthetic-s0"
    assert of("-likelihood--more-steps", "sft")["objective"] == "both"
    assert of("-value-alone", "sft")["start_run"] == ""
    assert of("-dropped-ids", "sft")["id_dropout"] == 0.2
    assert of("-hybrid", "evaluate")["mode"] == "hybrid"
    assert not (tmp_path / "objectives" / "synthetic-s0-hybrid" / "sft").exists()
    table = pq.read_table(tmp_path / "objectives" / "synthetic.parquet").to_pylist()
    took = {r["variant"]: r["seconds"] for r in table}
    assert took["hybrid"] == took["likelihood"] > 0
    assert took["value, more steps"] > took["likelihood"]
    # nothing is made twice
    stamp = {p: p.stat().st_mtime_ns for p in Path(tmp_path).glob("**/done")}
    assert repr(objectives.run(small(served, tmp_path))) == repr(records)  # NaN equals none
    assert all(p.stat().st_mtime_ns == at for p, at in stamp.items())


def test_what_the_study_sets_itself_is_refused():
    with pytest.raises(PageLLMError, match="--sft must not set objective"):
        objectives.run(objectives.Config(sft=Options("--objective value")))
