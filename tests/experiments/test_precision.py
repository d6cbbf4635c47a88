"""bfloat16: chosen by capability and width, kept when resumed, float32 outside the trunk."""

import dataclasses
import json

import pytest
import torch

from experiments import precision
from pagellm import ppo, pretrain, reward, sft
from pagellm.data import prepare
from pagellm.model.decode import LegalItems, greedy, page_logp, slot_states
from pagellm.model.gpt2 import GPT2, Shape
from pagellm.stage import dist
from pagellm.stage.config import PageLLMError
from pagellm.stage.run import Run, TrainingConfig
from tests.test_pipeline import SMALL

CPU = torch.device("cpu")


@pytest.fixture
def can(monkeypatch):
    """Pretend that the processor multiplies bfloat16, or that it does not."""
    return lambda answer: monkeypatch.setattr(dist, "multiplies_bf16", lambda device: answer)


def test_auto_takes_bfloat16_where_it_is_faster_and_nowhere_else(can):
    can(True)
    assert dist.pick_precision("auto", CPU, dist.BF16_WIDTH) == "bfloat16"
    assert dist.pick_precision("auto", CPU, dist.BF16_WIDTH - 1) == "float32"
    assert dist.pick_precision("float32", CPU, 768) == "float32"
    can(False)
    assert dist.pick_precision("auto", CPU, 768) == "float32"
    assert dist.pick_precision("bfloat16", CPU, 8) == "bfloat16"
    with pytest.raises(PageLLMError, match="precision='half'"):
        TrainingConfig(precision="half")


def test_the_choice_is_kept_wherever_the_run_goes_on(tmp_path, can):
    can(True)
    with Run(tmp_path / "r", TrainingConfig(), {}) as run:
        assert run.precision("auto", CPU, 768) == "bfloat16"
        run.save({"step": 1})
    can(False)  # resumed on a machine without bfloat16
    for precision_given in ("auto", "bfloat16"):
        with Run(tmp_path / "r", TrainingConfig(precision=precision_given), {}) as run:
            assert run.precision(precision_given, CPU, 768) == "bfloat16"
    assert json.loads((tmp_path / "r" / "config.json").read_text())["precision"] == "bfloat16"
    with pytest.raises(
        PageLLMError, match="was made with precision='bfloat16', now precision='float32'"
    ):
        Run(tmp_path / "r", TrainingConfig(precision="float32"), {})


def test_a_run_from_before_there_was_a_choice_goes_on_in_float32(tmp_path, can):
    can(True)
    with Run(tmp_path / "r", TrainingConfig(), {}) as run:
        run.save({"step": 1})
    path = tmp_path / "r" / "config.json"
    record = json.loads(path.read_text())
    del record["config"]["precision"]
    path.write_text(json.dumps(record))
    with Run(tmp_path / "r", TrainingConfig(), {}) as run:
        assert run.precision("auto", CPU, 768) == "float32"
    with pytest.raises(PageLLMError, match="precision='float32', now precision='bfloat16'"):
        Run(tmp_path / "r", TrainingConfig(precision="bfloat16"), {})


def model():
    torch.manual_seed(0)
    return GPT2(Shape(2, 2, 32, 32), 11, 3, 20, dropout=0.0).eval()


def test_only_the_trunk_is_rounded():
    """States, gradients and log-probabilities are float32; states are close; decoding is equal."""
    one, two = model(), model()
    two.bf16 = True
    prompt = torch.randint(0, 34, (4, 6), generator=torch.Generator().manual_seed(1))
    valid, none = torch.ones_like(prompt, dtype=torch.bool), torch.full((4, 1), -1)
    pages = [greedy(m, prompt, valid, LegalItems(none, 20), 5) for m in (one, two)]
    assert torch.equal(pages[0].item, pages[1].item) and torch.equal(pages[0].logp, pages[1].logp)
    states = [slot_states(m, prompt, valid, pages[0].item, pages[0].mask) for m in (one, two)]
    assert states[1].dtype == torch.float32 and not torch.equal(*states)
    states_apart = (states[0] - states[1]).detach().abs().max()
    assert states_apart < 0.1 * states[0].detach().std()
    logp = page_logp(states[1], two.item, pages[0].item, pages[0].mask, none)
    assert logp.dtype == torch.float32
    logp.sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in two.parameters())
    full = torch.log_softmax(states[1][:, 0].detach() @ two.item.T, 1).gather(
        1, pages[0].item[:, :1]
    )[:, 0]
    torch.testing.assert_close(logp[:, 0], full, atol=1e-5, rtol=1e-5)


def test_a_bfloat16_run_resumes_to_the_same_bits_and_ppo_keeps_its_ratio(tmp_path):
    prepare.run(prepare.Config(data=str(tmp_path / "data"), users=40, items=30))
    common = {
        "data": str(tmp_path / "data"),
        "runs": str(tmp_path / "runs"),
        "device": "cpu",
        "precision": "bfloat16",
        "save_every": 1,
    }
    for module in (pretrain, sft, reward, ppo):
        name = module.__name__.rsplit(".", 1)[-1]
        config = module.Config(run="a", **common, **SMALL[name])
        module.run(config)
        done = tmp_path / "runs" / "a" / name / "done"
        whole = json.loads(done.read_text())["state"]
        other = dataclasses.replace(
            config, run="b", **({"source_run": "a"} if hasattr(config, "source_run") else {})
        )
        real, saves = Run.save, []

        def save(self, state, real=real, saves=saves):
            real(self, state)
            saves.append(state["step"])
            if len(saves) == 1:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "save", save)
            with pytest.raises(KeyboardInterrupt):
                module.run(other)
        module.run(dataclasses.replace(other, precision="auto"))
        assert (
            json.loads((tmp_path / "runs" / "b" / name / "done").read_text())["state"] == whole
        ), name
    rows = [json.loads(line) for line in open(tmp_path / "runs" / "a" / "ppo" / "log.jsonl")]
    assert max(row.get("rollout/gen_vs_train_logp_diff", 0.0) for row in rows) < 1e-4
    assert max(row.get("rollout/first_epoch_max_abs_logratio", 0.0) for row in rows) < 1e-5


def test_the_study_times_both_in_turn(capsys):
    (row,) = precision.run(precision.Config(sizes="nano", steps=1, device="cpu"))
    assert row["auto"] == "float32" and row["gain"] == row["float32"] / row["bfloat16"] > 0
    assert "nano" in capsys.readouterr().out


@pytest.mark.slow
def test_the_study_runs_each_precision_through_the_stages_it_needs(tmp_path, capsys):
    prepare.run(prepare.Config(data=str(tmp_path / "data"), users=40, items=30))
    small = {"steps": 3, "batch": 8, "words": 300}
    with pytest.MonkeyPatch.context() as patch:
        for module, options in ((pretrain, small), (sft, {"epochs": 1, "k": 6, "batch": 16})):
            real = module.Config
            patch.setattr(
                module,
                "Config",
                lambda real=real, options=options, **given: real(**options | given),
            )
        config = precision.Config(
            sizes="",
            seeds=1,
            size="nano",
            policies="sft",
            device="cpu",
            data=str(tmp_path / "data"),
            runs=str(tmp_path / "runs"),
        )
        assert precision.run(config) == []
        shown = capsys.readouterr().out
        assert (
            "| | float32 | bfloat16 |" in shown and "NDCG@100 ↑" in shown and "PageLLM" not in shown
        )
        runs = tmp_path / "runs" / "precision"
        made = {name: runs / f"nano-{name}" / "synthetic-s0" for name in precision.PRECISIONS}
        for name, folder in made.items():
            assert {path.name for path in folder.iterdir()} == {"pretrain", "sft", "evaluate"}
            for stage in ("pretrain", "sft"):
                assert json.loads((folder / stage / "config.json").read_text())["precision"] == name
        done = [(folder / "sft" / "done").read_bytes() for folder in made.values()]
        assert done[0] != done[1]
        records = precision.quality(config)
        assert [(folder / "sft" / "done").read_bytes() for folder in made.values()] == done
    assert {r["policy"] for r in records} == {"sft"}
    assert all(r["difference"] == 0 for r in records if r["variant"] == "float32")
    with pytest.raises(PageLLMError, match="policies='popularity'"):
        precision.Config(policies="popularity")
