"""What is held out moves no byte of what is trained, from the first stage to the last."""

import json

from tests.baselines.test_compare import permuted
from tests.conftest import train

LEARNED = (
    "pretrain/model.pt",
    "sft/model.pt",
    "reward/model.pt",
    "reward/pairs.parquet",
    "ppo/model.pt",
)


def trades(served, tmp_path, splits, last):
    """runs/base of the same stages over a shop whose rows of `splits` traded items and names."""
    permuted(served / "data" / "synthetic", tmp_path / "data" / "synthetic", splits)
    train(tmp_path / "data", tmp_path / "runs", last)
    return tmp_path / "runs" / "base"


def steps(folder):
    """The log's training numbers: all but validation scores and seconds."""
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [
        {name: value for name, value in row.items() if "loss" in name or name == "step"}
        for row in rows
    ]


def test_test_rows_move_no_byte_of_any_stage(served, tmp_path):
    """Validation chooses SFT's and PPO's step; the test rows choose nothing."""
    again = trades(served, tmp_path, ["test"], "ppo")
    for name in LEARNED:
        assert (again / name).read_bytes() == (served / "runs" / "base" / name).read_bytes(), name


def test_validation_and_test_rows_move_no_step_of_training(served, tmp_path):
    """With both traded, pre-training ends with the same bytes, and SFT has the same losses at every
    step.
    """
    again, before = trades(served, tmp_path, ["valid", "test"], "sft"), served / "runs" / "base"
    assert (again / "pretrain/model.pt").read_bytes() == (before / "pretrain/model.pt").read_bytes()
    assert steps(again / "sft") == steps(before / "sft") and any(
        "loss" in row for row in steps(before / "sft")
    )


def test_train_rows_move_them(served, tmp_path):
    again = trades(served, tmp_path, ["train"], "pretrain")
    assert (again / "pretrain/model.pt").read_bytes() != (
        served / "runs/base/pretrain/model.pt"
    ).read_bytes()
