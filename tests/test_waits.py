"""A step of training asks the device for nothing: on a GPU every answer would be waited for.

What a GPU would do is done on a CPU here: the optimiser that steps in one launch, and positions not
picked by a mask.
"""

import copy
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pagellm import ppo, pretrain, reward, sft
from pagellm.data import prepare
from pagellm.model import decode
from pagellm.model.gpt2 import GPT2, Shape
from pagellm.stage import dist, train
from pagellm.stage.config import PageLLMError
from pagellm.stage.train import GuardedStep, optimiser, prefetch

ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "equal.default", "is_nonzero")


class Questions(TorchDispatchMode):
    """Every operation whose result, or its shape, the host must wait for."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masks = function is torch.ops.aten.index.Tensor and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if masks or any(name in str(function) for name in ASKING):
            self.asked.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("waits")
    prepare.run(prepare.Config(data=str(root / "data"), users=60, items=40, k_core=3))
    return root


def test_no_step_waits_for_the_device(root, monkeypatch):
    monkeypatch.setattr(train, "FUSED", ("cpu",))
    monkeypatch.setattr(decode, "ASYNC_DEVICES", ("cpu",))
    # asserts on the device on a GPU
    monkeypatch.setattr("pagellm.kernels.logprob.require", lambda ok, message: None)
    questions, steps = Questions(), []

    def watched(all_steps, total, make):
        for step, made in prefetch(all_steps, total, make):
            if step + 1 == total:  # the last one validates
                yield step, made
                continue
            steps.append(step)
            with questions:
                yield step, made

    common = {"data": str(root / "data"), "runs": str(root / "runs"), "save_every": 1000}
    for stage, more in (
        (pretrain, {"size": "nano", "steps": 12, "batch": 8, "rating_batch": 8}),
        (sft, {"epochs": 3, "batch": 16, "eval_every": 1000, "k": 5}),
        (reward, {"per_kind": 2, "batch": 16}),
    ):
        monkeypatch.setattr(stage, "prefetch", watched)
        before = len(steps)
        stage.run(stage.Config(**common, **more))
        assert len(steps) > before + 2, f"{stage.__name__}: nothing was watched"
        assert not questions.asked, f"{stage.__name__} asks: {set(questions.asked)}"


def test_ppo_asks_nothing_from_a_rollout_to_its_last_update(root, monkeypatch):
    """And where the KL stops it, what was learnt and logged is what a host that waits for every
    answer gets.
    """
    where = {"data": str(root / "data"), "runs": str(root / "runs")}
    common = {
        **where,
        "source_run": "ready",
        "min_steps": 6,
        "epochs": 0.1,
        "rollout": 16,
        "k": 5,
        "eval_every": 100,
        "critic_warmup": 1,
        "force": True,
        "minibatch": 4,
        "lr": 1e-2,
        "max_kl": 1e-4,
    }
    pretrain.run(pretrain.Config(**where, run="ready", size="nano", steps=2, batch=8))
    sft.run(sft.Config(**where, run="ready", epochs=1, k=5, batch=16))
    reward.run(reward.Config(**where, run="ready", per_kind=2, batch=16))
    plain, asked, fetches, waits = ppo.learn, [], [], []

    class Fetch(dist.AsyncScalars):
        """Numbers on their way; to read those sent last is to wait for all that the device has been
        told to do.
        """

        def __init__(self, scalars):
            super().__init__(scalars)
            if scalars:
                fetches.append(self)

        def read(self):
            if self in fetches:
                waits.append(self is fetches[-1])
            return super().read()

    def watched(*args):
        waits.clear()
        with Questions() as questions:
            row = plain(*args)
        asked.extend(questions.asked)
        assert sum(waits) == 1 and waits[-1], "one wait, for the log, after the last update"
        return row

    logs, weights = [], []
    for fused in ((), ("cpu",)):
        monkeypatch.setattr(train, "FUSED", fused)
        if fused:
            monkeypatch.setattr(decode, "ASYNC_DEVICES", ("cpu",))
            monkeypatch.setattr("pagellm.kernels.logprob.require", lambda ok, message: None)
            monkeypatch.setattr(ppo, "learn", watched)
            monkeypatch.setattr(dist, "AsyncScalars", Fetch)
        ppo.run(ppo.Config(**common, run=f"fused{len(fused)}", select="last"))
        folder = root / "runs" / f"fused{len(fused)}" / "ppo"
        logs.append([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()])
        weights.append(torch.load(folder / "model.pt", weights_only=True)["weights"])
    assert not asked, f"ppo asks: {set(asked)}"
    assert [row.get("inner_epochs") for row in logs[0]] == [
        row.get("inner_epochs") for row in logs[1]
    ]
    assert 1.0 in [row.get("stopped") for row in logs[0]] and 0.0 in [
        row.get("stopped") for row in logs[0]
    ]
    for row, other in zip(*logs, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            if isinstance(row[name], float):
                assert row[name] == pytest.approx(other[name], rel=2e-3, abs=2e-4), name
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-3, atol=1e-4)


def test_a_skipped_fused_step_leaves_weights_moments_counts_and_patience_as_they_are(monkeypatch):
    monkeypatch.setattr(train, "FUSED", ("cpu",))
    model = small_model()
    guard = GuardedStep(optimiser(model, 0.1), model.parameters(), 1.0, patience=3)

    def step(value, skip):
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        guard.step("here", skip=torch.tensor(skip))
        return copy.deepcopy(
            [[p.detach() for p in model.parameters()], guard.opt.state_dict()["state"]]
        )

    def same(a, b):
        return all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True)) and all(
            torch.equal(a[1][i][name], b[1][i][name]) for i in a[1] for name in a[1][i]
        )

    first = step(1.0, False)
    assert same(step(2.0, True), first) and same(step(float("nan"), True), first)
    assert not same(step(2.0, False), first)
    for _ in range(2):
        step(float("nan"), False)
        step(1.0, True)  # neither forgives nor counts
    step(float("nan"), False)
    with pytest.raises(PageLLMError, match="not finite 3 times in a row"):
        step(1.0, True)


def test_a_question_would_be_noticed():
    x = torch.arange(3.0)
    with Questions() as questions:
        x.sum().item()
        x[x > 1]
        bool(x.any())
    assert len(questions.asked) >= 3


def small_model():
    return GPT2(Shape(1, 1, 4, 8), 5, 2, 3, generator=torch.Generator().manual_seed(0))


def test_a_fused_step_leaves_a_bad_gradient_out_and_gives_up_one_step_later(monkeypatch):
    monkeypatch.setattr(train, "FUSED", ("cpu",))
    model = small_model()
    guard = GuardedStep(optimiser(model, 0.1), model.parameters(), 1.0, patience=3)
    assert guard.fused

    def step(value):
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        before = [p.detach().clone() for p in model.parameters()]
        norm = guard.step("here")
        return float(norm), any(
            not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)
        )

    assert step(1.0)[1]
    for _ in range(2):
        norm, moved = step(float("nan"))
        assert norm != norm and not moved
    assert step(1.0)[1]  # two in a row are forgiven
    for _ in range(3):
        assert not step(float("inf"))[1]
    with pytest.raises(PageLLMError, match="not finite 3 times in a row"):
        step(1.0)


def test_steps_in_one_pass_are_those_of_plain_adamw_whoever_asks_about_bad_gradients(monkeypatch):
    """On a CPU too one pass moves everything, but there the host asks first, as only a GPU need not
    be waited for.
    """
    moved = []
    for devices, fused in (((), True), (("cpu",), True), ((), False)):
        monkeypatch.setattr(train, "FUSED", devices)
        model = small_model()
        opt = optimiser(model, 0.01, weight_decay=0.1)
        assert opt.defaults["fused"]
        if not fused:
            opt = torch.optim.AdamW(opt.param_groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
            for group in opt.param_groups:
                group["fused"], group["foreach"] = False, False
        guard = GuardedStep(opt, model.parameters(), 1.0)
        assert bool(guard.fused) == bool(devices)
        for k in range(5):
            for i, p in enumerate(model.parameters()):
                p.grad = torch.full_like(p, 0.1 * (i - k))
            guard.step("here")
        moved.append([p.detach() for p in model.parameters()])
    for other in moved[:2]:
        for a, b in zip(other, moved[2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_batches_made_ahead_are_those_of_their_steps():
    made = []

    def make(step):
        made.append(step)
        if step == 6:
            raise PageLLMError("no batch 6")
        return step * step

    assert list(prefetch(range(2, 5), 5, make)) == [(2, 4), (3, 9), (4, 16)] and made == [2, 3, 4]
    with pytest.raises(PageLLMError, match="no batch 6"):
        list(prefetch(range(5, 9), 9, make))
    assert list(prefetch(range(0), 0, make)) == []
