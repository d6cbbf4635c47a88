"""How the files beside this one were made: a tiny shop and run, written by the code of commit
6e52ce9.

    git worktree add ../old 6e52ce9 && cd ../old && make install
    OMP_NUM_THREADS=1 PYTHONPATH=. .venv/bin/python path/to/tests/old_run/write.py

old_run.tar.xz
    data/synthetic     the prepared shop
    runs/base          all five stages, finished
    half/<stage>       a stage of the same run, stopped after the checkpoint of step 2
made.json              each stage's options; versions and machine; the digest that each stage ended
with

tests/test_old_runs.py reads them. This script knows the modules of that commit only, and need not
run today.
"""

import json
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

import torch
from pagellm.run import Run, machine, versions

from pagellm import evaluate, gpt2, networks, ppo, pretrain, reward, sft
from pagellm.data import prepare

HERE = Path(__file__).parent
STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward, "ppo": ppo, "evaluate": evaluate}
SHAPE = (1, 2, 4, 64)  # layers, heads, columns, context of "nano" here: the files must stay small
OPTIONS = {
    "pretrain": {
        "size": "nano",
        "steps": 6,
        "batch": 8,
        "rating_batch": 8,
        "words": 256,
        "warmup": 2,
    },
    "sft": {"epochs": 2, "batch": 8, "eval_every": 4, "max_history": 8, "warmup": 2, "k": 5},
    "reward": {"per_kind": 1, "epochs": 1, "batch": 16, "warmup": 2},
    "ppo": {
        "epochs": 1.0,
        "rollout": 8,
        "minibatch": 4,
        "micro": 4,
        "inner_epochs": 2,
        "k": 5,
        "eval_every": 2,
        "critic_warmup": 4,
        "lr": 1e-3,
        "min_steps": 4,
    },
    "evaluate": {"k": 5, "depth": 20, "n_boot": 20, "examples": 1},
}


class Stopped(Exception):
    pass


def half_way(module, config) -> None:
    """Run a stage until its first checkpoint is written."""
    save = Run.save

    def stop(self, state):
        save(self, state)
        raise Stopped

    Run.save = stop
    try:
        module.run(config)
    except Stopped:
        return
    finally:
        Run.save = save
    raise AssertionError("no checkpoint was written")


def main() -> None:
    torch.set_num_threads(1)
    gpt2.SIZES["nano"] = networks.SIZES["nano"] = gpt2.Shape(*SHAPE)
    made = {
        "shape": SHAPE,
        "options": OPTIONS,
        "versions": versions(),
        "machine": machine(),
        "state": {},
    }
    made["capability"] = torch.backends.cpu.get_cpu_capability()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.chdir(root)
        prepare.run(prepare.Config(users=30, items=30))
        for stage, module in STAGES.items():
            there = root / "runs" / "base" / stage
            config = module.Config(run="base", device="cpu", save_every=2, **OPTIONS[stage])
            if stage != "evaluate":
                half_way(module, config)
                (root / "half").mkdir(exist_ok=True)
                shutil.move(there, root / "half" / stage)
            module.run(config)
            made["state"][stage] = json.loads((there / "done").read_text()).get("state")
        with tarfile.open(HERE / "old_run.tar.xz", "w:xz") as tar:
            for name in ("data", "runs", "half"):
                tar.add(root / name, name)
    (HERE / "made.json").write_text(json.dumps(made) + "\n")


main()
