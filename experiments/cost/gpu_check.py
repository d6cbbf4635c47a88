"""Everything that wants a GPU to be seen, in one run of under 8 minutes that ends in JSON.

    make gpu-check                      python -m experiments.cost.gpu_check [--device cuda]

    tests     pytest's tests with the mark cuda
    kernels   python -m kernels.bench: every kernel beside its plain version
    steps     python -m experiments.cost.bench: a training step and rollouts beside transformers
    ppo       a small run of every training stage; seconds of a PPO step, and how often its updates
              made the host wait for the device

Each part is a process of its own and may take --minutes of all parts together; one that fails or
takes longer is named, and the others go on. --quick takes tiny shapes and shows that it runs; on a
CPU the numbers are those of the CPU, and nothing there counts waits. Exit code 1 if a part failed.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pagellm import ppo, pretrain, reward, sft
from pagellm.data import prepare
from pagellm.kernels.bench import machine
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.dist import pick_device

__all__ = ["Config", "PARTS", "commands", "counted_waits", "learn_ppo", "run"]


PARTS = ("tests", "kernels", "steps", "ppo")
ROOT = Path(__file__).parents[2]
MARK = "@pytest.mark." + "cuda"
SHOWN = 4000  # characters of a part's last output that a failure shows


@dataclass(frozen=True, kw_only=True)
class Config:
    """Run what wants a GPU: its tests, the benches, PPO without host waits; print JSON."""

    device: str = "auto"  # auto, cuda or cpu
    only: str = ""  # parts to run, comma-separated: tests, kernels, steps, ppo; empty: all
    minutes: float = 8.0  # minutes that all parts together may take
    repeats: int = 5  # timed runs of each version in the benches
    size: str = "gpt2"  # network of the training rows, and of PPO's
    quick: bool = False  # tiny shapes: only shows that everything runs

    def __post_init__(self):
        check(
            self,
            only=(set(filter(None, self.only.split(","))) <= set(PARTS), f"some of {PARTS}"),
            minutes=(self.minutes > 0, "above 0"),
            repeats=(self.repeats > 0, "1 or more"),
        )

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(name for name in PARTS if name in (self.only or ",".join(PARTS)).split(","))


def commands(config: Config, device: str) -> dict[str, list[str]]:
    """Part -> the command that runs it; the last line that it prints is JSON, but for tests."""
    python, quick = [sys.executable, "-m"], ["--quick"] if config.quick else []
    times = ["--device", device, "--repeats", str(config.repeats), *quick]
    rows = ["--only", "train,train-page,rollout,rollout-8", "--size", config.size]
    inside = f"from experiments.cost.gpu_check import learn_ppo; learn_ppo({device!r}, "
    inside += f"{config.size!r}, {config.quick!r})"
    # Named one by one, so that no other file is read in.
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if MARK in path.read_text()]
    return {
        "tests": [*python, "pytest", "-m", "cuda", "-p", "no:cacheprovider", *map(str, files)],
        "kernels": [*python, "kernels.bench", *times],
        "steps": [*python, "experiments.cost.bench", *times, *rows],
        "ppo": [sys.executable, "-c", inside],
    }


def run_part(name: str, command: list[str], seconds: float) -> dict:
    """Run one part. Returns {"seconds", "found"}, or {"seconds", "failed": its last output}."""
    began = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=max(seconds, 1.0),
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    except subprocess.TimeoutExpired:
        return {"seconds": round(time.monotonic() - began, 1), "failed": "it took too long"}
    took = {"seconds": round(time.monotonic() - began, 1)}
    lines = done.stdout.strip().splitlines() or [""]
    if name == "tests" and done.returncode in (0, 5):  # 5: there is no such test
        return took | {"found": lines[-1].strip("= ")}
    if done.returncode:
        return took | {"failed": (done.stdout + done.stderr).strip()[-SHOWN:]}
    return took | {"found": json.loads(lines[-1])}


def counted_waits(device: torch.device, waits: list[int]):
    """PPO's `learn`, which adds to `waits` how often the host waited for the device in a call.

    One wait is for the log, after the last update. On a CPU nothing is counted.
    """
    plain = ppo.learn

    def learn(*args, **kwargs):
        if device.type != "cuda":
            return plain(*args, **kwargs)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                row = plain(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchroniz" in str(w.message) for w in heard))
        return row

    return learn


def learn_ppo(device: str, size: str, quick: bool) -> dict:
    """Train every stage in a small way and print what PPO's steps cost, as a line of JSON."""
    waits: list[int] = []
    steps = 3 if quick else 20
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {"data": f"{folder}/data", "runs": f"{folder}/runs"}
        users, items = (60, 40) if quick else (1000, 2000)
        prepare.run(prepare.Config(data=common["data"], users=users, items=items, k_core=3))
        stage: dict[str, Any] = {**common, "device": device, "run": "check"}
        shape = "nano" if quick else size
        pretrain.run(pretrain.Config(**stage, size=shape, steps=2 if quick else 20, batch=8))
        slots, batch = (5, 16) if quick else (20, 64)
        sft.run(sft.Config(**stage, epochs=1, k=slots, batch=batch, eval_users=64))
        reward.run(reward.Config(**stage, per_kind=1, batch=batch))
        ppo.learn = counted_waits(torch.device(device), waits)
        pages = 8 if quick else 64
        ppo.run(
            ppo.Config(
                **stage,
                rollout=pages,
                minibatch=pages,
                k=slots,
                epochs=1e-6,
                min_steps=steps,
                critic_warmup=0,
                eval_every=1000,
                eval_users=16,
                min_accuracy=0.0,
                force=True,
            )
        )
        timing = [json.loads(x) for x in open(f"{folder}/runs/check/ppo/timing.jsonl")]
    spent = sorted(row["seconds"] for row in timing[:-1])  # the last step validates
    found = {
        "size": shape,
        "pages": pages,
        "steps": steps,
        "step_seconds": spent[len(spent) // 2],
        "peak_mb": max(row["peak_mb"] for row in timing),
        "waits_of_a_step": waits and [min(waits), max(waits)],
    }
    print(json.dumps(found))
    return found


def run(config: Config) -> dict:
    """Run the parts, print a line for each and the JSON; raise PageLLMError if one failed."""
    device = str(pick_device(config.device))
    if device == "cpu":
        print("gpu-check: no GPU here: the numbers are the CPU's, and no wait is counted")
    ends, found = time.monotonic() + 60 * config.minutes, {}
    for name, command in commands(config, device).items():
        if name not in config.parts:
            continue
        found[name] = run_part(name, command, ends - time.monotonic())
        state = "failed" if "failed" in found[name] else "done"
        print(f"{name}: {state} in {found[name]['seconds']} s", flush=True)
    result = {**machine(device), "quick": config.quick, "parts": found}
    print(json.dumps(result))
    if bad := [name for name, part in found.items() if "failed" in part]:
        raise PageLLMError(
            f"gpu-check: {', '.join(bad)} failed\n"
            + "\n".join(f"  {name}: {found[name]['failed']}" for name in bad)
        )
    return result


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.cost.gpu_check"))
