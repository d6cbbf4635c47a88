"""Early stopping: --patience of pretrain, sft and ppo, recorded, and the same after a cut."""

import json
import shutil

import pytest

from pagellm import ppo, pretrain, sft
from pagellm.stage.config import PageLLMError
from pagellm.stage.run import Run
from pagellm.stage.train import Best

BEFORE = {"pretrain": (), "sft": ("pretrain",), "ppo": ("sft", "reward")}
# Steps of a learning rate that moves no page: no validation is better than the start's.
SMALL = {
    "pretrain": {
        **{"size": "nano", "batch": 8, "rating_batch": 8, "words": 300, "lr": 1e-12},
        **{"steps": 12, "eval_every": 2, "eval_users": 20},
    },
    "sft": {"epochs": 3, "batch": 16, "eval_every": 2, "max_history": 8, "k": 6, "lr": 1e-12},
    "ppo": {
        **{"epochs": 2.0, "rollout": 16, "minibatch": 8, "inner_epochs": 1, "k": 6, "lr": 1e-12},
        **{"min_steps": 12, "eval_every": 2, "critic_warmup": 2, "force": True},
    },
}
STAGES = {"pretrain": pretrain, "sft": sft, "ppo": ppo}


class Unplugged(BaseException):
    pass


def begun(served, root, stage):
    """The Config of a stage that has what it reads, in a directory of its own."""
    for earlier in BEFORE[stage]:
        shutil.copytree(served / "runs" / "base" / earlier, root / "runs" / "base" / earlier)
    common = {"run": "base", "data": str(served / "data"), "runs": str(root / "runs")}
    return STAGES[stage].Config(**common, **SMALL[stage], save_every=1, patience=2, device="cpu")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_stops_after_so_many_validations_without_a_better_one(
    served, tmp_path, monkeypatch, stage
):
    """It stops behind step 4 of 12, says so, keeps the start, and a cut run ends with its bytes."""
    STAGES[stage].run(begun(served, tmp_path / "whole", stage))
    whole = tmp_path / "whole" / "runs" / "base" / stage
    done = json.loads((whole / "done").read_text())
    assert (done["steps"], done["step"]) == (4, 0)
    steps = [json.loads(line)["step"] for line in (whole / "log.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4]

    save = Run.save

    def save_and_die(self, state):
        save(self, state)
        if state["step"] == 3:
            raise Unplugged

    cut = begun(served, tmp_path / "cut", stage)
    monkeypatch.setattr(Run, "save", save_and_die)
    with pytest.raises(Unplugged):
        STAGES[stage].run(cut)
    monkeypatch.setattr(Run, "save", save)
    STAGES[stage].run(cut)
    for name in ("model.pt", "log.jsonl"):
        again = tmp_path / "cut" / "runs" / "base" / stage / name
        assert again.read_bytes() == (whole / name).read_bytes(), name


def test_only_validations_count_and_a_better_one_begins_anew():
    best = Best(score=0.3, step=10)
    assert not any(best.stale(step, 5, 2) for step in (10, 15, 19, 21))
    assert best.stale(20, 5, 2) and not best.stale(20, 5, 0)
    best.step = 15
    assert not best.stale(20, 5, 2) and best.stale(25, 5, 2)


def test_no_epoch_keeps_the_model_as_it_was(served, tmp_path):
    """sft --epochs 0: the pre-trained model as a policy, scored, without one step."""
    config = begun(served, tmp_path, "sft")
    sft.run(sft.Config(**vars(config) | {"epochs": 0, "patience": 0}))
    done = json.loads((tmp_path / "runs" / "base" / "sft" / "done").read_text())
    assert (done["steps"], done["step"]) == (0, 0) and done["valid_ndcg"] > 0


def test_patience_wants_validations_to_count():
    with pytest.raises(PageLLMError, match="eval_every"):
        pretrain.Config(patience=2)
    for stage in (sft, ppo):
        with pytest.raises(PageLLMError, match="select=last"):
            stage.Config(patience=2, select="last")
