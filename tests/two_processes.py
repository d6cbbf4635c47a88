"""Training stages by whatever number of processes started this file, for tests/stage/test_dist.py.

    torchrun --nproc_per_node 2 tests/two_processes.py FOLDER JOBS

JOBS is a JSON list of tables with these keys, all optional but "run":

    run    name of the run
    mode   one of dist.MODES
    more   fields of pretrain
    stop   [stage, step]: only this stage, until its checkpoint of that step is written
"""

import json
import sys

import torch

from pagellm import evaluate, ppo, pretrain, reward, sft
from pagellm.stage.run import Run

# Every uneven case: batches that two processes cannot halve, a last batch of one, rollouts of one
# page.
SMALL = {
    pretrain: {
        "size": "nano",
        "steps": 4,
        "batch": 7,
        "rating_batch": 5,
        "words": 300,
        "dropout": 0.0,
    },
    sft: {"epochs": 2, "batch": 17, "dropout": 0.0, "eval_every": 3, "k": 6, "max_history": 8},
    reward: {"per_kind": 1, "batch": 33},
    ppo: {
        "epochs": 0.01,
        "min_steps": 4,
        "rollout": 9,
        "minibatch": 3,
        "micro": 1,
        "k": 6,
        "eval_every": 2,
        "critic_warmup": 4,
        "force": True,
        "gate_users": 8,
        "inner_epochs": 2,
    },
    evaluate: {"k": 6, "depth": 30, "n_boot": 20, "quiet": True},
}


class Stopped(Exception):
    pass


def stage_of(folder, stage, run, mode="ddp", more=None):
    """The stage's Config."""
    return stage.Config(
        data=f"{folder}/data",
        runs=f"{folder}/runs",
        run=run,
        device="cpu",
        parallel=mode,
        save_every=2,
        **SMALL[stage] | ((more or {}) if stage is pretrain else {}),
    )


def until(step, stage, config):
    """Run a stage until the checkpoint of a step is written."""
    save = Run.save

    def stop(self, state):
        save(self, state)
        if state["step"] == step:
            raise Stopped

    Run.save = stop
    try:
        stage.run(config)
    except Stopped:
        return
    finally:
        Run.save = save
    raise AssertionError(f"no checkpoint of step {step} was written")


def main(folder, jobs):
    torch.set_num_threads(1)
    for job in jobs:
        job = dict(job)
        name, step = job.pop("stop", (None, None))
        for stage in SMALL:
            config = stage_of(folder, stage, **job)
            if name is None:
                stage.run(config)
            elif stage.__name__ == f"pagellm.{name}":
                until(step, stage, config)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
