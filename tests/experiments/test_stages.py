"""The study of stages: each row leaves one out, and what rows share is made once."""

from pathlib import Path

import pytest

from experiments import stages
from pagellm.stage.config import Options, PageLLMError
from pagellm.stage.files import read_json


def small(served, tmp_path, **more) -> stages.Config:
    return stages.Config(
        seeds=1,
        preset="none",
        data=str(served / "data"),
        runs=str(tmp_path),
        pretrain=Options("--size nano --steps 2 --words 300"),
        sft=Options("--epochs 1 --k 6 --eval_users 10 --max_history 8"),
        compose=Options("--folds 1 --networks 1 --k 6 --depth 40"),
        ppo=Options(
            "--epochs .3 --min_steps 2 --k 6 --rollout 16 --minibatch 8 --micro 4 "
            "--gate_users 10 --eval_users 10"
        ),
        evaluate=Options("--k 6"),
        **more,
    )


def test_every_row_leaves_out_its_stage(served, tmp_path, capsys):
    records = stages.run(small(served, tmp_path))
    assert {r["variant"] for r in records} == set(stages.ROWS)
    assert "paired difference to 'all stages'" in capsys.readouterr().out

    def of(run: str, stage: str) -> dict:
        return read_json(tmp_path / "stages" / run / stage / "config.json")

    assert of("synthetic-s0-ppo-composed", "compose")["config"]["policy"] == "ppo"
    assert of("synthetic-s0-none-composed", "compose")["config"]["policy"] == "none"
    assert of("synthetic-s0-alone", "evaluate")["config"]["policies"] == "sft"
    assert of("synthetic-s0-no-factorisation", "pretrain")["config"]["rows"] == "random"
    assert of("synthetic-s0-no-sft", "sft")["config"]["epochs"] == 0
    trained = {p.parent.parent.name for p in Path(tmp_path).glob("stages/*/pretrain/done")}
    assert trained == {
        "synthetic-s0",
        "synthetic-s0-no-factorisation",
        "synthetic-s0-no-sft",
    }
    # nothing is made twice
    stamp = {p: p.stat().st_mtime_ns for p in Path(tmp_path).glob("**/done")}
    stages.run(small(served, tmp_path))
    assert all(p.stat().st_mtime_ns == at for p, at in stamp.items())


def test_rows_can_be_chosen(served, tmp_path):
    records = stages.run(small(served, tmp_path, rows="no language model,SFT alone"))
    assert {r["variant"] for r in records} == {"no language model", "SFT alone"}
    assert not list(Path(tmp_path).glob("**/ppo/done"))


def test_rows_that_are_none_are_refused():
    with pytest.raises(PageLLMError, match="two or more of: all stages"):
        stages.Config(rows="all stages,no luck")
    with pytest.raises(PageLLMError, match="--compose must not set policy"):
        stages.run(stages.Config(compose=Options("--policy none")))
