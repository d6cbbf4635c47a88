"""The Optuna script of docs/how-to/sweep.md: a trial ends with its score, a bad one is stopped."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRUNER = re.compile(r"optuna\.pruners\.MedianPruner\(.*?\)")
SMALL = (
    *("--epochs=0.01", "--min_steps=6", "--rollout=16", "--minibatch=8", "--micro=8", "--k=4"),
    *(
        "--eval_every=2",
        "--critic_warmup=0",
        "--preset=none",
        "--w_token=0",
        "--w_page=0",
        "--w_hit=1",
        "--device=cpu",
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize("pruner", ["NopPruner()", "ThresholdPruner(lower=1e9)"])
def test_a_trial_ends_with_its_score_or_is_stopped(served, tmp_path, pruner):
    optuna = pytest.importorskip("optuna", reason="needs the extra [sweep]")
    text = (ROOT / "docs" / "how-to" / "sweep.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    code, found = PRUNER.subn(f"optuna.pruners.{pruner}", code)
    code = code.replace('SOURCE, METRIC = "synthetic"', 'SOURCE, METRIC = "base"')
    more = []
    if pruner != "NopPruner()":  # long enough to be stopped; and no trial is left to be the best
        more = ["--min_steps=2000"]
        code = code.replace("print(study.best_params, study.best_value)", "")
    assert found == 1
    (tmp_path / "sweep.py").write_text(code)
    for name in ("data", "runs"):
        (tmp_path / name).mkdir()
        for path in (served / name).iterdir():
            (tmp_path / name / path.name).symlink_to(path)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "sweep.py", "1", *SMALL[:1], *(more or SMALL[1:2]), *SMALL[2:]],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    study = optuna.load_study(study_name="ppo", storage=f"sqlite:///{tmp_path}/optuna.db")
    (trial,) = study.trials
    folder = tmp_path / "runs" / "trial-0" / "ppo"
    if pruner == "NopPruner()":
        assert trial.value == json.loads((folder / "done").read_text())["score"]
        made = json.loads((folder / "config.json").read_text())["config"]
        assert made["sft_coef"] == trial.params["sft_coef"] and made["lr"] == trial.params["lr"]
        assert max(trial.intermediate_values.values()) == trial.value
    else:
        assert trial.state == optuna.trial.TrialState.PRUNED
        assert not (folder / "done").exists()
