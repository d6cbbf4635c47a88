"""The study of backbones: its table equals what its runs recorded, and it can be resumed."""

import json
import os
import subprocess

import numpy as np
import pytest
import torch

from experiments import backbones
from experiments.backbones import ROWS, Config, costs, markdown, summary
from pagellm.pages.tables import per_user
from pagellm.stage.config import PageLLMError
from pagellm.stage.run import load_model_file

SMALL = {
    "pretrain": "--steps 4 --batch 8 --rating_batch 8 --warmup 2",
    "sft": "--epochs 2 --batch 64 --eval_every 9 --max_history 8 --warmup 2 --k 6",
    "evaluate": "--k 6 --depth 40 --n_boot 20",
}


def forked(module, **options):
    """`backbones.alone` without the start of Python: a stage in a fork of this process."""
    config = module.Config(**options)
    if (config.stage(module.__name__.rsplit(".", 1)[-1]) / "done").exists():
        return module.run(config)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            module.run(config)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0, (module, options)


@pytest.fixture(scope="module")
def study(served, tmp_path_factory):
    """One seed on the shop of `served`, with nano sizes and stand-ins that took no step."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("backbones")
    (root / "data").symlink_to(served / "data")
    (root / "runs" / "backbones" / "other").mkdir(parents=True)
    (root / "runs" / "backbones" / "other" / "data").symlink_to(served / "data")
    config = Config(
        data=str(root / "data"),
        runs=str(root / "runs"),
        seeds=1,
        gpt2="nano",
        llama="llama-nano",
        device="cpu",
        lora_rank=2,
        **SMALL,
    )
    real, calls, records = backbones.alone, [], None

    def shorter(module, **options):
        if "/other" in options["runs"]:
            options |= {"steps": 2, "batch": 8, "rating_batch": 8, "words": 300}
        # The first call really starts a process, and so would all of the second run.
        (forked if calls and records is None else real)(module, **options)
        calls.append(module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "alone", shorter)
        # each stage is a process: with several threads each they would wait for one another
        patch.setenv("OMP_NUM_THREADS", "1")
        records = backbones.run(config)
        started = []
        patch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a))
        assert backbones.run(config) == records and not started  # all done: starts no process
    return root, config, records


def test_the_table_says_what_the_runs_left_behind(study):
    root, config, records = study
    at = {(r["row"], r["quantity"]): r for r in records}
    for row in ROWS:
        folder = root / "runs" / "backbones" / f"synthetic-{backbones.slug(row)}-s0"
        scores = per_user(folder / "evaluate" / "sft" / "per_user.parquet")
        assert at[row, "Recall@20"]["mean"] == pytest.approx(np.nanmean(scores["Recall@20"]))
        assert (
            at[row, "Recall@20"]["low"]
            <= at[row, "Recall@20"]["mean"]
            <= at[row, "Recall@20"]["high"]
        )
        done = json.loads((folder / "pretrain" / "done").read_text())
        assert at[row, "of these trained"]["mean"] == done["trainable"]
        assert (
            at[row, "sft, s"]["mean"]
            == json.loads((folder / "sft" / "done").read_text())["seconds"]
        )
        assert at[row, "peak memory, MB"]["mean"] >= done["peak_mb"] > 10
        assert 0 < at[row, "epoch of SFT, s"]["mean"] * 2 < at[row, "sft, s"]["mean"] + 1
    llama, adapted = at["Llama", "of these trained"], at["Llama + LoRA", "of these trained"]
    assert at["Llama", "parameters"]["mean"] == llama["mean"] > adapted["mean"]
    assert at["Llama + LoRA", "parameters"]["mean"] > llama["mean"]
    text = (root / "runs" / "backbones" / "synthetic.md").read_text()
    assert (
        all(row in text for row in ROWS)
        and "Recall@40" in text
        and "pre-trained on another shop" in text
    )


def test_all_rows_begin_from_published_words_and_trunks(study):
    """GPT-2 and Llama start from their own weights; adapters leave Llama's trunk as it was."""
    root, _, _ = study
    runs = root / "runs" / "backbones"
    published = torch.load(
        runs / "other" / "llama-nano" / "pretrain" / "model.pt", weights_only=True
    )["weights"]
    ends = {
        row: load_model_file(runs / f"synthetic-{backbones.slug(row)}-s0" / "sft" / "model.pt")
        for row in ROWS
    }
    name = "h.0.mlp.up_proj.weight"
    assert torch.equal(ends["Llama + LoRA"]["weights"][name], published[name])
    assert not torch.equal(ends["Llama"]["weights"][name], published[name])
    assert "trunk" not in ends["GPT-2"] and ends["Llama"]["trunk"] == "llama"
    assert ends["Llama + LoRA"]["lora"]["rank"] == 2


def test_a_stage_that_fails_is_named(study, tmp_path):
    root, config, _ = study
    with pytest.raises(PageLLMError, match="pagellm.sft .* ended with code 2"):
        backbones.alone(
            backbones.sft, dataset="synthetic", run="none", data=config.data, runs=str(tmp_path)
        )


def test_wrong_options_are_refused():
    for options, message in (
        ({"gpt2": "llama-tiny"}, "a size of GPT-2"),
        ({"llama": "tiny"}, "a size of Llama"),
        ({"policy": "popularity"}, "sft or ppo"),
        ({"llama_weights": "x"}, "go together"),
        ({"lora_rank": 0}, "1 or more"),
    ):
        with pytest.raises(PageLLMError, match=message):
            Config(**options)
    with pytest.raises(PageLLMError, match="must not set size"):
        Config(pretrain="--size nano").options("pretrain")


def test_differences_are_paired_and_costs_have_ranges():
    rng = np.random.default_rng(0)
    base = [{m: rng.random(50) for m in backbones.RANKING} for _ in range(2)]
    scores = {"a": base, "b": [{m: x + 0.25 for m, x in seed.items()} for seed in base]}
    spent = {"a": [{"s": 1.0}, {"s": 3.0}], "b": [{"s": 5.0}, {"s": 5.0}]}
    records = summary(scores, spent)
    shifted = next(r for r in records if r["row"] == "b" and r["quantity"] == "Recall@20")
    assert [
        shifted[k] for k in ("difference", "difference_low", "difference_high")
    ] == pytest.approx([0.25] * 3)
    assert shifted["high"] - shifted["low"] > 0.05
    text = markdown(records)
    assert "| s | 2.00 (1.00–3.00) | 5.00 |" in text and "+0.2500 [+0.2500, +0.2500]" in text


def test_an_epoch_is_what_its_steps_took(study):
    root, _, _ = study
    folder = root / "runs" / "backbones" / "synthetic-gpt-2-s0"
    steps = [json.loads(line)["seconds"] for line in open(folder / "sft" / "timing.jsonl")]
    assert costs(folder)["epoch of SFT, s"] == pytest.approx(sum(steps) / 2)
