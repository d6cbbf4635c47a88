"""One process and two are the same job: shares of a batch, gradients, checkpoints, metrics."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from pagellm import sft
from pagellm.data import prepare
from pagellm.model.networks import build, save_published
from pagellm.model.weights import read_weights
from pagellm.stage import dist
from pagellm.stage.config import PageLLMError
from pagellm.stage.run import load_model_file
from pagellm.stage.train import shared_means
from tests import two_processes

ROOT = Path(__file__).parents[2]
STAGES = ("pretrain", "sft", "reward", "ppo")
CARRIED = ("fsdp", "rows")  # modes that divide weights


@pytest.fixture
def as_rank(monkeypatch):
    """Pretend to be one of several processes."""

    def pretend(rank, world, total=None):
        monkeypatch.setattr(dist, "rank", lambda: rank)
        monkeypatch.setattr(dist, "world", lambda: world)
        if total is not None:
            monkeypatch.setattr(dist, "all_reduce", total)

    return pretend


@given(st.integers(1, 20), st.integers(1, 6))
def test_parts_are_a_partition_and_an_idle_process_gets_a_stand_in(n, world):
    rows, seen = np.arange(n) + 100, []
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(world):
            patch.setattr(dist, "rank", lambda rank=rank: rank)
            patch.setattr(dist, "world", lambda: world)
            mine, busy = dist.shard(rows)
            assert len(mine) >= 1 and busy == (rank < n)
            seen += mine.tolist() if busy else []
    assert sorted(seen) == rows.tolist()


@given(
    st.lists(st.lists(st.floats(-5, 5), max_size=4), min_size=2, max_size=4).filter(
        lambda x: sum(map(len, x))
    )
)
def test_shared_means_average_to_the_mean_over_everybody(values):
    """Against the definition, with processes of any number of elements, none included."""
    sizes = torch.tensor([float(len(v)) for v in values], dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "world", lambda: len(values))
        patch.setattr(dist, "all_reduce", lambda counts: sizes.sum().expand_as(counts))
        parts = []
        for mine in values:
            mean = torch.tensor(mine or [123.0], dtype=torch.float64).mean()
            parts.append(shared_means([(mean, len(mine) or 1)], busy=bool(mine))[0])
    want = sum(map(sum, values)) / sum(map(len, values))
    assert_close(
        torch.stack(parts).mean(), torch.tensor(want, dtype=torch.float64), atol=1e-9, rtol=1e-9
    )


def test_alone_everything_is_a_plain_call(as_rank):
    x = torch.tensor([1.0, 2.0])
    assert (
        dist.is_main()
        and dist.all_reduce(x) is x
        and dist.all_gather(3) == [3]
        and dist.any_rank(True)
    )
    assert not dist.any_rank(False) and dist.idle(torch.nn.Linear(1, 1)) == 0.0
    assert shared_means([(x[0], 5)])[0] is not None and dist.gather(np.arange(3)).tolist() == [
        0,
        1,
        2,
    ]
    module = torch.nn.Linear(1, 1)
    assert dist.wrap(module, "ddp") is module
    with dist.sync_gradients(module, False), dist.unsharded(module):
        pass


def test_moments_and_weights_come_back_by_name():
    torch.manual_seed(0)
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    opt, second = (torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, other))
    model(torch.randn(4, 3)).square().sum().backward()
    opt.step()
    dist.load_weights(other, dist.weights(model))
    dist.load_optimiser(other, second, dist.optimiser_state(model, opt))
    for m, o in ((model, opt), (other, second)):
        o.zero_grad()
        m(torch.ones(1, 3)).sum().backward()
        o.step()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    assert dist.optimiser_state(model, torch.optim.AdamW(model.parameters())) == {}
    with pytest.raises(PageLLMError, match="not this model's"):
        dist.load_weights(other, {"weight": torch.zeros(2, 3)})


def lora(folder):
    """pretrain's fields for adapters beside a frozen published trunk, blocks computed anew."""
    return {
        "size": "llama-nano",
        "weights": str(folder / "llama"),
        "lora_rank": 2,
        "lora_targets": "q,down",
        "bpe": str(folder / "runs" / "alone" / "pretrain"),
        "checkpoint_blocks": True,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same stages by one process and by two, in each mode; again with adapters.

    runs/alone, runs/ddp, ...       runs/alone-lora, runs/ddp-lora, ...      each mode of dist.MODES
    runs/carried-fsdp/sft, runs/carried-rows/sft       begun by two processes, stopped at step 4
    """
    folder = tmp_path_factory.mktemp("dist")
    prepare.run(prepare.Config(data=str(folder / "data"), users=53, items=45))
    two_processes.main(folder, [{"run": "alone"}])
    save_published(build("llama-nano", 300, 0, 0), folder / "llama", 300)
    for mode in CARRIED:
        (folder / "runs" / f"carried-{mode}").mkdir()
        there = folder / "runs" / f"carried-{mode}" / "pretrain"
        os.symlink(folder / "runs" / "alone" / "pretrain", there)
    two_processes.main(folder, [{"run": "alone-lora", "more": lora(folder)}])
    jobs = [
        job
        for mode in dist.MODES
        for job in (
            {"run": mode, "mode": mode},
            {"run": f"{mode}-lora", "mode": mode, "more": lora(folder)},
        )
    ]
    jobs += [{"run": f"carried-{mode}", "mode": mode, "stop": ["sft", 4]} for mode in CARRIED]
    done = launch(folder, jobs)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "Warning" not in done.stdout, done.stdout
    return folder


def launch(folder, jobs, processes=2):
    """Start two_processes.py under torchrun; one start for many jobs, as starting takes longest."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = [ROOT / "tests" / "two_processes.py", folder, json.dumps(jobs)]
    return subprocess.run(
        [*command, "--nproc_per_node", str(processes), *map(str, script)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


def log_of(folder, run, stage):
    return [json.loads(line) for line in open(folder / "runs" / run / stage / "log.jsonl")]


@pytest.mark.parametrize("more", ["", "-lora"])
@pytest.mark.parametrize("mode", dist.MODES)
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_log_what_one_does(folder, mode, stage, more):
    """Also with "-lora": adapters beside a frozen trunk and words, blocks computed anew."""
    alone, both = log_of(folder, f"alone{more}", stage), log_of(folder, f"{mode}{more}", stage)
    assert len(alone) == len(both) > 3
    for one, two in zip(alone, both, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            # that one is rounding alone
            if isinstance(one[name], float) and name not in ("advantages/mean",):
                same = pytest.approx(one[name], rel=2e-3, abs=2e-5)
                assert two[name] == same, (stage, one["step"], name)


@pytest.mark.parametrize("mode", dist.MODES)
def test_two_processes_end_with_the_metrics_of_one(folder, mode):
    results = [
        json.loads((folder / "runs" / run / "evaluate" / "metrics.json").read_text())
        for run in ("alone", mode)
    ]
    for policy in results[0]:
        for metric, row in results[0][policy].items():
            assert results[1][policy][metric]["mean"] == pytest.approx(row["mean"], abs=1e-6), (
                policy,
                metric,
            )


@pytest.mark.parametrize("mode", dist.MODES)
def test_frozen_words_stay_as_they_were_published(folder, mode):
    published, _ = read_weights(folder / "llama")
    state = load_model_file(folder / "runs" / f"{mode}-lora" / "ppo" / "model.pt")
    assert torch.equal(state["weights"]["word"], published["model.embed_tokens.weight"])


def test_the_same_number_of_processes_gives_the_same_bytes(folder):
    before = (folder / "runs" / "ddp" / "ppo" / "log.jsonl").read_bytes()
    (folder / "runs" / "ddp").rename(folder / "runs" / "first")
    assert launch(folder, [{"run": "ddp", "mode": "ddp"}]).returncode == 0
    assert (folder / "runs" / "ddp" / "ppo" / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize("mode", CARRIED)
def test_what_two_processes_wrote_one_reads(folder, mode):
    """A model.pt holds plain names and whole tensors, whatever wrapped the model."""
    state = [
        torch.load(folder / "runs" / run / "ppo" / "model.pt", weights_only=True)
        for run in ("alone", mode)
    ]
    assert state[0]["weights"].keys() == state[1]["weights"].keys()
    for name, weight in state[0]["weights"].items():
        assert_close(state[1]["weights"][name], weight, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("mode", CARRIED)
def test_one_process_carries_on_what_two_began(folder, mode):
    """A checkpoint of divided weights goes on in one process: the same losses to the end."""
    run = f"carried-{mode}"
    last = folder / "runs" / run / "sft" / "LAST"
    assert last.read_text().startswith("step-00000004")
    sft.run(two_processes.stage_of(folder, sft, run, mode))
    got, want = (log_of(folder, name, "sft") for name in (run, "alone"))
    assert [row["step"] for row in got] == [row["step"] for row in want]
    assert all(
        a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        for a, b in zip(got[1:], want[1:], strict=True)
    )


def test_an_unknown_mode_is_refused():
    with pytest.raises(PageLLMError, match="ddp, fsdp, rows"):
        sft.Config(parallel="tensor")
