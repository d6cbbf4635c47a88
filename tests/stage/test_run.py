"""Run directories: nothing half-written, nothing mixed up, the same command carries on."""

import json
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass

import pytest
import torch

from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError
from pagellm.stage.files import atomic
from pagellm.stage.run import Run, StageConfig, commit, digest, finished, load_model_file


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """A stage."""

    lr: float = 1.0  # rate


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
    with pytest.raises(PageLLMError, match="no directory .*; make it first"):
        with atomic(tmp_path / "nowhere" / "file"):
            raise AssertionError("the block ran")


def test_a_run_carries_on_from_its_last_checkpoint(tmp_path):
    with Run(tmp_path / "r", Config(), {"data": "a"}) as run:
        assert run.load() is None
        for step in (1, 2, 3):
            run.log(step, loss=torch.tensor(0.1) * step)
        run.save({"step": 2, "w": torch.ones(2)})
    with open(tmp_path / "r" / "log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # what a killed process leaves
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


def test_config_says_where_a_stage_began(tmp_path):
    def made():
        Run(tmp_path / "r", Config(), {"data": "a"}).close()
        return json.loads((tmp_path / "r" / "config.json").read_text())

    began = made()["versions"]
    assert (
        began["torch"] == torch.__version__
        and began["commit"] == commit()
        and " cores, " in began["machine"]
    )
    path = tmp_path / "r" / "config.json"
    elsewhere = json.loads(path.read_text()) | {
        "versions": {"torch": "1.0", "commit": "another", "machine": "old"}
    }
    path.write_text(json.dumps(elsewhere))
    assert made() == elsewhere  # carried on by other versions, and it still says where it began


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_tree_that_holds_the_code(tmp_path, monkeypatch):
    def git(*words):
        return subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words],
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    code = tmp_path / "code"
    code.mkdir()
    (code / "run.py").write_text("1")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit(code) is None  # no repository
    monkeypatch.delenv("GIT_CEILING_DIRECTORIES")
    git("init", "-q")
    (tmp_path / "theirs").write_text("1")
    git("add", "theirs")
    git("commit", "-q", "-m", "theirs")
    assert commit(code) is None  # a copy inside somebody else's
    git("add", "code")
    git("commit", "-q", "-m", "ours")
    assert commit(code) == git("rev-parse", "--short=12", "HEAD")
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as a hook of another repository sets it
    (code / "run.py").write_text("2")
    assert commit(code).endswith("-dirty")
    monkeypatch.setenv("PATH", "")
    assert commit(code) is None


def test_only_two_checkpoints_are_kept(tmp_path):
    with Run(tmp_path / "r", Config(), {}) as run:
        for step in range(5):
            run.save({"step": step})
        assert sorted(p.name for p in (tmp_path / "r").glob("step-*")) == [
            "step-00000003.pt",
            "step-00000004.pt",
        ]
        assert run.load()["step"] == 4


def test_a_changed_option_or_input_is_refused_by_name(tmp_path):
    Run(tmp_path / "r", Config(), {"sft": "a"}, free=("device",)).close()
    Run(tmp_path / "r", Config(device="cpu"), {"sft": "a"}, free=("device",)).close()
    with pytest.raises(PageLLMError, match="lr=1.0, now lr=2.0"):
        Run(tmp_path / "r", Config(lr=2.0), {"sft": "a"})
    with pytest.raises(PageLLMError, match="another sft"):
        Run(tmp_path / "r", Config(), {"sft": "b"}, free=("device",))


def test_a_run_may_be_named_in_another_way_or_moved(tmp_path, monkeypatch):
    """`make sft` names the run, `pagellm sft` need not: both mean the same directory."""
    monkeypatch.chdir(tmp_path)
    for own in (Config(), Config(run="synthetic"), Config(runs=str(tmp_path / "runs"))):
        with Run(own.stage("sft"), own, {"data": "a"}) as run:
            assert run.path.resolve() == tmp_path / "runs" / "synthetic" / "sft"
    (tmp_path / "runs" / "synthetic").rename(tmp_path / "runs" / "old")
    moved = Config(run="old", data=str(tmp_path / "data"))
    Run(moved.stage("sft"), moved, {"data": "a"}).close()
    with pytest.raises(PageLLMError, match="made from another data"):
        Run(moved.stage("sft"), moved, {"data": "b"})
    with pytest.raises(PageLLMError, match="dataset='synthetic', now dataset='toys'"):
        Run(moved.stage("sft"), Config(run="old", dataset="toys"), {"data": "a"})


def test_a_run_from_before_a_field_existed_goes_on_with_its_default(tmp_path):
    Run(tmp_path / "r", Config(), {}).close()
    path = tmp_path / "r" / "config.json"
    record = json.loads(path.read_text())
    del record["config"]["lr"]
    path.write_text(json.dumps(record))
    Run(tmp_path / "r", Config(), {}).close()
    with pytest.raises(PageLLMError, match="lr=1.0, now lr=2.0"):
        Run(tmp_path / "r", Config(lr=2.0), {})


def test_two_processes_cannot_share_a_run_and_a_stale_lock_is_no_obstacle(tmp_path):
    first = Run(tmp_path / "r", Config(), {})
    with pytest.raises(PageLLMError, match="another process"):
        Run(tmp_path / "r", Config(), {})
    first.close()
    assert (tmp_path / "r" / "lock").exists()
    Run(tmp_path / "r", Config(), {}).close()


def test_missing_stages_and_broken_files_say_what_to_do(tmp_path):
    with pytest.raises(
        PageLLMError, match="no reward model in .*\n  Make it with: make reward DATASET=toys"
    ):
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


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, capsys):
    with Run(tmp_path / "r", Config(), {}) as run:
        for step in (2, 4):
            run.log(step, loss=step)
            run.save({"step": step, "w": torch.full((50,), float(step))})
    newest = tmp_path / "r" / "step-00000004.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)
    with Run(tmp_path / "r", Config(), {}) as run:
        state = run.load()
        assert state["step"] == 2 and [row["step"] for row in run.read_log()] == [2]
        assert "step-00000004.pt is damaged" in capsys.readouterr().err
        run.save({"step": 4, "w": torch.zeros(1)})
        assert run.load()["step"] == 4  # written anew under the same name
        (tmp_path / "r" / "step-00000004.pt").write_bytes(b"")
        (tmp_path / "r" / "step-00000002.pt").unlink()
        assert run.load() is None and "is gone" in capsys.readouterr().err


def test_a_model_that_is_not_what_its_stage_wrote_is_refused(tmp_path):
    with Run(tmp_path / "r", Config(), {}) as run:
        run.finish({"w": torch.zeros(4)})
    path = tmp_path / "r" / "model.pt"
    assert torch.equal(load_model_file(path)["w"], torch.zeros(4))
    torch.save({"w": torch.ones(4)}, path)
    with pytest.raises(PageLLMError, match="not what its stage wrote"):
        load_model_file(path)


def test_a_finished_run_keeps_no_checkpoint_whenever_it_was_killed(tmp_path):
    with Run(tmp_path / "r", Config(), {}) as run:
        run.save({"step": 1})
        leftover = (tmp_path / "r" / "step-00000001.pt").read_bytes()
        run.finish({"w": torch.zeros(1)})
    # killed between `done` and the clearing up
    (tmp_path / "r" / "step-00000001.pt").write_bytes(leftover)
    (tmp_path / "r" / "LAST").write_text("step-00000001.pt 0\n")
    (tmp_path / "r" / "sub").mkdir()
    (tmp_path / "r" / "sub" / ".x.1.tmp").write_text("")
    Run(tmp_path / "r", Config(), {}).close()
    assert sorted(p.name for p in (tmp_path / "r").rglob("*")) == [
        "config.json",
        "done",
        "lock",
        "model.pt",
        "sub",
    ]


def test_due_is_every_so_often_and_never_at_the_end(tmp_path):
    with Run(tmp_path / "r", Config(save_every=3), {}) as run:
        assert [step for step in range(1, 10) if run.due(step, 9)] == [3, 6]


def test_a_waiting_signal_saves_and_stops(tmp_path):
    def stage(config):
        with Run(tmp_path / "r", config, {}) as run:
            for step in run.steps(range(5)):
                if step == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                if run.due(step + 1, 5):
                    run.save({"step": step + 1})

    assert main(Config, stage, "stage", ["--save_every", "100"]) == 143
    with Run(tmp_path / "r", Config(save_every=100), {}) as run:
        assert run.load()["step"] == 2


def test_digest_sees_every_bit():
    state = {"a": torch.tensor([1.0, 2.0]), "b": [1, {"c": torch.zeros(2, dtype=torch.bfloat16)}]}
    same = {"b": [1, {"c": torch.zeros(2, dtype=torch.bfloat16)}], "a": torch.tensor([1.0, 2.0])}
    assert digest(state) == digest(same)
    for other in (
        {**state, "a": torch.tensor([1.0, 2.0000002])},
        {**state, "a": torch.tensor([[1.0, 2.0]])},
        {**state, "b": [1, {"c": torch.zeros(2)}]},
        {**state, "b": [2, {"c": torch.zeros(2)}]},
    ):
        assert digest(other) != digest(state)
    assert digest({"a": torch.tensor(0.0)}) != digest({"a": torch.tensor(-0.0)})


def test_a_damaged_record_is_refused(tmp_path):
    (tmp_path / "done").write_text("{half")
    with pytest.raises(PageLLMError, match="damaged"):
        finished(tmp_path, "thing", "make thing")


def test_a_command_that_fails_before_it_learns_anything_leaves_nothing(tmp_path):
    """A mistyped option is not what the run was made with: the mended command begins there."""
    path = tmp_path / "r" / "stage"
    with pytest.raises(PageLLMError, match="no such file"), Run(path, Config(lr=9.0), {}) as run:
        run.log(0, score=0.5)
        raise PageLLMError("no such file")
    assert not path.parent.exists()
    (tmp_path / "r" / "other").mkdir(parents=True)
    with pytest.raises(KeyError), Run(path, Config(lr=8.0), {}):
        raise KeyError
    assert [one.name for one in path.parent.iterdir()] == ["other"]
    with Run(path, Config(lr=1.0), {}) as run:
        assert run.read_log() == []


@pytest.mark.parametrize("left", ["step", "file", "checkpoint", "done", "interrupt"])
def test_what_was_learnt_stays_whatever_ends_the_stage(tmp_path, left):
    ends = KeyboardInterrupt if left == "interrupt" else KeyError
    with pytest.raises(ends), Run(tmp_path / "r", Config(lr=9.0), {}) as run:
        run.log(0, score=0.5)
        if left == "step":
            run.log(1, score=0.5)
        if left == "file":
            (tmp_path / "r" / "pages.parquet").touch()
        if left == "checkpoint":
            run.save({"step": 0})
        if left == "done":
            run.finish({"w": torch.zeros(1)})
        raise ends
    with pytest.raises(PageLLMError, match="was made with lr=9.0, now lr=1.0"):
        Run(tmp_path / "r", Config(), {})
