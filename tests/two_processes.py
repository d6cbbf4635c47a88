"""All training stages by whatever number of processes started this file: run by tests/test_dist.py.

    python tests/two_processes.py FOLDER RUN MODE [OPTIONS]     torchrun --nproc_per_node 2 tests/two_processes.py ...

OPTIONS is a JSON table of pretrain's fields.
"""

import json
import sys

import torch

from pagellm import evaluate, ppo, pretrain, reward, sft

# Batches that two processes cannot halve, a last batch of one, rollouts of one page: every uneven case.
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
        "inner_epochs": 2,
    },
    evaluate: {"k": 6, "depth": 30, "n_boot": 20, "quiet": True},
}


def main(folder: str, run: str, mode: str, more: str = "{}") -> None:
    torch.set_num_threads(1)
    common = {
        "data": f"{folder}/data",
        "runs": f"{folder}/runs",
        "run": run,
        "device": "cpu",
        "parallel": mode,
        "save_every": 2,
    }
    for stage, options in SMALL.items():
        stage.run(
            stage.Config(**common, **options | (json.loads(more) if stage is pretrain else {}))
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
