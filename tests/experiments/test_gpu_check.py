"""make gpu-check on a CPU: its parts run and end in JSON, and one that fails stops no other."""

import json
import subprocess
import sys

import pytest
import torch

from experiments.cost import gpu_check
from experiments.cost.gpu_check import Config, commands, counted_waits, learn_ppo, run
from pagellm import ppo
from pagellm.stage.config import PageLLMError


def test_kernels_and_tests_end_in_one_line_of_json(capsys):
    result = run(Config(device="cpu", quick=True, repeats=1, only="kernels,tests"))
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == result and result["device"] == "cpu" and result["quick"]
    assert "no GPU here" in lines[0] and [line.split(":")[0] for line in lines[1:]] == [
        "tests",
        "kernels",
    ]
    kernels = result["parts"]["kernels"]["found"]["rows"]
    assert {"gae", "whiten"} <= {row["kernel"] for row in kernels}
    said = result["parts"]["tests"]["found"]
    assert "skipped" in said or torch.cuda.is_available()


def test_ppo_tells_its_steps_and_waits(monkeypatch, capsys):
    monkeypatch.setattr(ppo, "learn", ppo.learn)  # put back afterwards
    found = learn_ppo("cpu", "tiny", quick=True)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert found["step_seconds"] > 0 and found["steps"] == 3 and found["pages"] == 8
    assert found["waits_of_a_step"] == []  # nothing to count on a CPU


def test_waits_are_what_the_device_warns_of(monkeypatch):
    """As on a GPU, with torch's warnings played to it."""
    modes, waits = [], []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def learn(times):
        for _ in range(times):
            gpu_check.warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        gpu_check.warnings.warn("something else", stacklevel=1)
        return {"row": times}

    monkeypatch.setattr(ppo, "learn", learn)
    counted = counted_waits(torch.device("cuda"), waits)
    assert [counted(n) for n in (1, 3)] == [{"row": 1}, {"row": 3}]
    assert waits == [1, 3] and modes == ["warn", "default"] * 2


def test_a_part_that_fails_or_takes_too_long_stops_no_other(monkeypatch, capsys):
    scripts = {
        "tests": "print('== 3 passed ==')",
        "kernels": "import sys; print('what was wrong'); sys.exit(3)",
        "steps": "import time; time.sleep(60)",
        "ppo": "print('words'); print('{\"a\": 1}')",
    }
    fake = {name: [sys.executable, "-c", script] for name, script in scripts.items()}
    monkeypatch.setattr(gpu_check, "commands", lambda config, device: fake)
    real = subprocess.run
    monkeypatch.setattr(
        gpu_check.subprocess,
        "run",
        lambda command, **more: real(
            command, **more | ({"timeout": 1.0} if "sleep" in command[-1] else {})
        ),
    )
    with pytest.raises(PageLLMError, match="(?s)kernels, steps failed.*what was wrong.*too long"):
        run(Config(device="cpu"))
    parts = json.loads(capsys.readouterr().out.splitlines()[-1])["parts"]
    assert parts["tests"]["found"] == "3 passed" and parts["ppo"]["found"] == {"a": 1}
    assert "what was wrong" in parts["kernels"]["failed"]


def test_every_part_has_its_command_and_options_are_checked():
    found = commands(Config(quick=True, size="small"), "cuda")
    assert set(found) == set(gpu_check.PARTS)
    assert "cuda" in found["kernels"] and "small" in found["steps"] and "--quick" in found["steps"]
    assert any("kernels/test_logprob.py" in word for word in found["tests"])
    assert "cuda" in found["tests"] and "'cuda', 'small', True" in found["ppo"][-1]
    for wrong in ({"only": "gpu"}, {"minutes": 0.0}, {"repeats": 0}):
        with pytest.raises(PageLLMError, match=next(iter(wrong))):
            Config(**wrong)
