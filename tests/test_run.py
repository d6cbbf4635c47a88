"""Run directories: nothing half-written, nothing mixed up, the same command carries on."""

import json
from dataclasses import dataclass

import pytest
import torch

from pagellm.config import PageLLMError
from pagellm.run import Common, Run, atomic, finished, load_model_file


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """A stage."""

    lr: float = 1.0   # rate


def test_atomic_leaves_old_or_new_never_a_piece(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with atomic(path) as beside:
        beside.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_run_carries_on_from_its_last_checkpoint(tmp_path):
    with Run(tmp_path / "r", Config(), {"data": "a"}) as run:
        assert run.load() is None
        for step in (1, 2, 3):
            run.log(step, loss=torch.tensor(0.1) * step)
        run.save({"step": 2, "w": torch.ones(2)})
    with open(tmp_path / "r" / "log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')        # what a killed process leaves
    with Run(tmp_path / "r", Config(), {"data": "a"}) as run:
        state = run.load()
        assert state["step"] == 2 and torch.equal(state["w"], torch.ones(2))
        assert [row["step"] for row in run.read_log()] == [1, 2]
        run.log(3, loss=0.5)
        run.finish({"w": torch.zeros(1)}, score=1.5)
        assert run.done
    assert finished(tmp_path / "r", "thing", "make thing")["score"] == 1.5
    assert [row["step"] for row in map(json.loads, open(tmp_path / "r" / "log.jsonl"))] == [1, 2, 3]
    assert not list((tmp_path / "r").glob("step-*")) and not list((tmp_path / "r").glob(".*"))


def test_only_two_checkpoints_are_kept(tmp_path):
    with Run(tmp_path / "r", Config(), {}) as run:
        for step in range(5):
            run.save({"step": step})
        assert sorted(p.name for p in (tmp_path / "r").glob("step-*")) == ["step-00000003.pt", "step-00000004.pt"]
        assert run.load()["step"] == 4


def test_a_changed_option_or_input_is_refused_by_name(tmp_path):
    Run(tmp_path / "r", Config(), {"sft": "a"}, free=("device",)).close()
    Run(tmp_path / "r", Config(device="cpu"), {"sft": "a"}, free=("device",)).close()
    with pytest.raises(PageLLMError, match="lr=1.0, now lr=2.0"):
        Run(tmp_path / "r", Config(lr=2.0), {"sft": "a"})
    with pytest.raises(PageLLMError, match="another sft"):
        Run(tmp_path / "r", Config(), {"sft": "b"}, free=("device",))


def test_two_processes_cannot_share_a_run_and_a_stale_lock_is_no_obstacle(tmp_path):
    first = Run(tmp_path / "r", Config(), {})
    with pytest.raises(PageLLMError, match="another process"):
        Run(tmp_path / "r", Config(), {})
    first.close()
    assert (tmp_path / "r" / "lock").exists()
    Run(tmp_path / "r", Config(), {}).close()


def test_missing_stages_and_broken_files_say_what_to_do(tmp_path):
    with pytest.raises(PageLLMError, match="no reward model in .*\n  Make it with: make reward DATASET=toys"):
        finished(tmp_path / "x", "reward model", Config(dataset="toys").make("reward"))
    bad = tmp_path / "model.pt"
    bad.write_bytes(b"junk")
    with pytest.raises(PageLLMError, match="cannot be read"):
        load_model_file(bad)
    with pytest.raises(PageLLMError, match="is gone"):
        load_model_file(tmp_path / "none.pt")


def test_a_pickle_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(PageLLMError):
        load_model_file(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_paths_of_stages():
    assert str(Config(dataset="toys").stage("ppo")) == "runs/toys/ppo"
    assert str(Config(dataset="toys", run="a").stage("sft", "b")) == "runs/b/sft"
    assert str(Config(run="a").stage("sft")) == "runs/a/sft"
