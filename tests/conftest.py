"""What all test files share: marks, skips that may be, and a small run, which is slow to make."""

import os
import re
import shutil
from pathlib import Path

import hypothesis
import pytest
import torch

from pagellm import compose, ppo, pretrain, reward, sft
from pagellm.data import prepare
from pagellm.data.shop import load
from pagellm.serving.recommender import Recommender
from pagellm.serving.sources import Sources
from pagellm.stage.files import read_json, write_json
from tests.only_skips import (  # noqa: F401  pytest finds its hooks here
    pytest_addoption,
    pytest_make_collect_report,
    pytest_runtest_makereport,
)

TESTS = Path(__file__).parent
# The first call of a test may import what others have imported already, or wait for a busy machine.
hypothesis.settings.register_profile("pagellm", deadline=None)
hypothesis.settings.load_profile("pagellm")
# `make test ARGS=...` hands its variables down to every `make` below it; tests want none of them.
for name in (
    "MAKEFLAGS",
    "MFLAGS",
    "MAKELEVEL",
    "MAKEOVERRIDES",
    *re.findall(
        r"^([A-Z]+) \?=",
        (TESTS.parent / "Makefile").read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    ),
):
    os.environ.pop(name, None)
# `make check` runs these (pytest -m quick): a minute at most.
QUICK = ("kernels/", "pages/", "stage/test_config.py", "test_structure.py")
# `make test` leaves these to `make stress`: they start many processes, kill them, or wait for them.
STRESS = (
    "baselines/test_outside.py",
    "data/test_spark.py",
    "experiments/test_backbones.py",
    "experiments/test_gpu_check.py",
    "experiments/test_load.py",
    "experiments/test_scaling.py",
    "experiments/test_torture.py",
    "stage/test_dist.py",
    "storefront/test_kills.py",
    "test_notebooks.py",
    "test_sweep.py",
    "test_wheel.py",
)
# The longest files come first, so that none of several workers is left with one of them at the end.
LONGEST = ("experiments/test_torture.py", "stage/test_dist.py", "experiments/test_load.py")


def pytest_ignore_collect(collection_path, config):
    """With -m quick other files are not even imported."""
    if config.option.markexpr == "quick" and collection_path.name.startswith("test_"):
        where = collection_path.relative_to(TESTS).as_posix()
        return None if where.startswith(QUICK) else True
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(LONGEST)}
    where = {item: item.path.relative_to(TESTS).as_posix() for item in items}
    for item in items:
        if where[item].startswith(QUICK) and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.quick)
        if where[item] in STRESS:
            item.add_marker(pytest.mark.stress)
    items.sort(key=lambda item: place.get(where[item], len(LONGEST)))


def train(data, runs, last="ppo"):
    """Every stage up to `last` over data/synthetic, in a small way, under runs/base."""
    torch.set_num_threads(1)
    common = {"run": "base", "data": str(data), "runs": str(runs), "device": "cpu"}
    pretrain.run(
        pretrain.Config(
            size="nano", steps=6, batch=8, rating_batch=8, words=300, warmup=2, **common
        )
    )
    if last == "pretrain":
        return
    sft.run(sft.Config(epochs=2, batch=16, eval_every=4, max_history=8, warmup=2, k=6, **common))
    if last == "sft":
        return
    reward.run(reward.Config(per_kind=1, epochs=1, batch=32, warmup=2, **common))
    ppo.run(
        ppo.Config(
            epochs=1.0,
            rollout=16,
            minibatch=8,
            micro=4,
            inner_epochs=2,
            k=6,
            eval_every=2,
            min_steps=1,
            critic_warmup=4,
            lr=1e-3,
            force=True,
            gate_users=10,
            **common,
        )
    )


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """A directory with a small shop in data/ and, in runs/base, the stages that a page needs."""
    root = tmp_path_factory.mktemp("served")
    prepare.run(prepare.Config(data=str(root / "data"), users=80, items=60))
    train(root / "data", root / "runs")
    for stage in ("sft", "ppo"):
        forget_choice(root / "runs" / "base" / stage)
    return root


def forget_choice(stage):
    """Take what validation chose out of `done`, as in runs of before: so PPO is the default in all
    tests, and decoding is greedy. `recall_choice` puts it back."""
    done = stage / "done"
    shutil.copy(done, stage.parents[2] / f"{stage.name}.whole")
    write_json(done, {k: v for k, v in read_json(done).items() if k != "decoding"})


def recall_choice(stage, kept):
    """kept: the directory of `served`, in which `forget_choice` left the whole record."""
    shutil.copy(kept / f"{stage.name}.whole", stage / "done")


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    """A small synthetic shop, made by prepare; only to be read."""
    root = tmp_path_factory.mktemp("shop")
    prepare.run(prepare.Config(data=str(root), users=80, items=60))
    return load(root / "synthetic")


@pytest.fixture(scope="session")
def sft_alone(served, tmp_path_factory):
    """The shop of `served` and its SFT policy, without PPO and without a reward model."""
    root = tmp_path_factory.mktemp("sft-alone")
    shutil.copytree(served / "data", root / "data")
    shutil.copytree(served / "runs" / "base" / "sft", root / "runs" / "base" / "sft")
    return root


@pytest.fixture(scope="session")
def composed(served, tmp_path_factory):
    """The shop of `served` with its stages, and composed pages beside them."""
    root = tmp_path_factory.mktemp("composed")
    for part in ("data", "runs"):
        shutil.copytree(served / part, root / part, ignore=shutil.ignore_patterns("evaluate"))
    for stage in ("sft", "ppo"):
        recall_choice(root / "runs" / "base" / stage, served)
    compose.run(
        compose.Config(
            run="base",
            data=str(root / "data"),
            runs=str(root / "runs"),
            k=6,
            networks=1,
            fallback=False,
        )
    )
    return root


@pytest.fixture(scope="session")
def rec(served):
    """A Recommender over `served`, test rows held out as in evaluate."""
    return Recommender.load(
        Sources(
            run="base",
            data=str(served / "data"),
            runs=str(served / "runs"),
            device="cpu",
            split="test",
        )
    )
