"""The study of pre-training steps: what each row changes, and that frozen rows stay."""

import pytest
import torch

from experiments import pretraining
from experiments.pretraining import ARMS, Config
from pagellm.stage.config import Options, PageLLMError
from pagellm.stage.run import load_model_file


def test_rows_differ_in_their_steps_alone_and_frozen_rows_stay(served, tmp_path):
    config = Config(
        dataset="synthetic",
        data=str(served / "data"),
        runs=str(tmp_path),
        seeds=1,
        steps=3,
        lr=1e-2,
        row_lr=1.0,
        preset="none",
        pretrain=Options("--size nano --rows als --batch 8 --words 300 --warmup 0"),
        sft=Options("--epochs 1 --batch 32 --eval_every 2"),
    )
    records = pretraining.run(config)
    assert list(dict.fromkeys(r["variant"] for r in records)) == list(ARMS)
    start, gentle, frozen, alone = (
        load_model_file(tmp_path / "pretraining" / arm / "synthetic-s0" / "pretrain" / "model.pt")[
            "weights"
        ]
        for arm in ("no-steps", "gentle", "frozen-rows", "items-alone")
    )
    for name in ("item", "user"):
        assert torch.allclose(frozen[name], start[name], atol=1e-6)
        assert (gentle[name] - start[name]).abs().max() > 1e-3
    assert torch.allclose(alone["user"], start["user"], atol=1e-3)
    assert any(not torch.equal(frozen[name], start[name]) for name in start)
    assert (tmp_path / "pretraining" / "synthetic.md").exists()


def test_wrong_options_are_refused():
    with pytest.raises(PageLLMError, match="some of"):
        Config(arms="nobody")
    with pytest.raises(PageLLMError, match="must not set dataset"):
        pretraining.run(Config(dataset="instruments", sft=Options("--dataset toys")))
