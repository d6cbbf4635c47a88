"""Training with cut rows: the memory they take, lazy rows on their share, states that fit anywhere.

tests/stage/test_dist.py runs whole stages so (mode "rows").
"""

import pytest
import torch
from torch.testing import assert_close

from pagellm.model.lora import adapt, learns
from pagellm.model.networks import build
from pagellm.model.page_loss import Batch, sft_loss
from pagellm.stage import dist
from pagellm.stage.config import PageLLMError
from pagellm.stage.train import GuardedStep, Objective, optimiser, shared_means
from tests.processes import in_processes

USERS, ITEMS, TABLES = 11, 19, ("user", "item", "item_out")


def learner_of(mode, adapters=False):
    torch.manual_seed(0)
    model = build("nano", 20, USERS, ITEMS, dropout=0.0)
    model.untie()
    if adapters:
        adapt(model, 2, 4.0, "q,down", 3)
    objective = Objective(lambda this, b: sft_loss(this.model, b, "both"), model=model)
    return model, objective, dist.wrap(objective, mode)


def batch(step):
    """Pages of six users in one step, two of them with a padded page."""
    made = torch.Generator().manual_seed(step)
    item = torch.stack([torch.randperm(ITEMS, generator=made)[:4] for _ in range(6)])
    item[1, 3] = item[4, 3] = -1
    first = torch.randint(20, 20 + USERS, (6, 1), generator=made)
    read = torch.randint(20 + USERS, 20 + USERS + ITEMS, (6, 3), generator=made)
    prompt = torch.cat([first, read], 1)
    return Batch(prompt, torch.ones_like(prompt, dtype=torch.bool), item, item >= 0, item[:, :0])


def trained(mode, lazy, steps, state=None, adapters=False):
    """Weights and moments after some steps, and the bytes that this process holds of the rows."""
    model, objective, learner = learner_of(mode, adapters)
    opt = optimiser(model, 1e-2, 0.01, 0.1, lazy=lazy)
    guard = GuardedStep(opt, model.parameters(), 1.0)
    if state:
        dist.load_weights(model, state[0])
        dist.load_optimiser(model, opt, state[1])
    for step in steps:
        mine, busy = dist.shard(torch.arange(6))
        b = batch(step).select(mine)
        loss = shared_means([(learner(b), b.mask.sum())], busy)[0]
        loss.backward()
        tables = [p for name, p in model.named_parameters() if name in TABLES]
        held = sum(size(p) + size(p.grad) for p in tables)
        guard.step("a step")
        held += sum(size(x) for p in tables for x in opt.state[p].values())
    found = dist.weights(model), dist.optimiser_state(model, opt)
    return *found, held


def size(x):
    return x.element_size() * (x._values().numel() if x.is_sparse else x.numel())


def check(rank, world, lazy, alone):
    *state, held = trained("rows", lazy, [0, 1])
    # the last processes have fewer rows; beside them are counts of steps
    assert held <= (alone[2] - 100) / world * (world * -(-USERS // world) / USERS) + 1000
    if rank == 0:
        assert_same(state, alone[:2])
    else:
        assert all(not len(state[0][name]) for name in TABLES)
    again = trained("rows", lazy, [1], trained("rows", lazy, [0])[:2])
    if rank == 0:
        assert_same(again[:2], alone[:2])
        torch.save(state, "state.pt")


def assert_same(found, want):
    for one, other in zip(found, want, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            # Adam makes whole steps of rounding where a gradient is 0, as that of a key's bias is.
            atol = 1e-5 if name in TABLES else 2e-2
            assert_close(one[name], other[name], atol=atol, rtol=1e-4)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("world", [2, 4])
def test_rows_take_their_share_of_memory_and_learn_as_in_one_process(
    tmp_path, monkeypatch, world, lazy
):
    monkeypatch.chdir(tmp_path)
    in_processes(check, world, tmp_path, world, lazy, trained("ddp", lazy, [0, 1]))
    written = torch.load("state.pt", weights_only=True)
    assert_same(trained("ddp", lazy, [2], written)[:2], trained("ddp", lazy, [0, 1, 2])[:2])


def begin(rank, lazy):
    state = trained("rows", lazy, [0, 1])[:2]
    if rank == 0:
        torch.save(state, "two.pt")


def carry_on(rank, lazy):
    state = trained("rows", lazy, [2], torch.load("two.pt", weights_only=True))[:2]
    if rank == 0:
        torch.save(state, "four.pt")


@pytest.mark.parametrize("lazy", [False, True])
def test_four_processes_carry_on_what_two_began(tmp_path, monkeypatch, lazy):
    monkeypatch.chdir(tmp_path)
    for name, check_of, world in (("a", begin, 2), ("b", carry_on, 4)):
        (tmp_path / name).mkdir()
        in_processes(check_of, world, tmp_path / name, lazy)
    found = torch.load("four.pt", weights_only=True)
    assert_same(found, trained("ddp", lazy, [0, 1, 2])[:2])


def check_adapters(rank, alone):
    state = trained("rows", False, [0, 1], adapters=True)[:2]
    if rank == 0:
        assert_same(state, alone)
        torch.save(state, "adapters.pt")


def test_adapters_beside_cut_rows_learn_as_in_one_process(tmp_path, monkeypatch):
    """Frozen trunk, cut rows: what is written holds whole rows, and one process loads it."""
    monkeypatch.chdir(tmp_path)
    alone = trained("ddp", False, [0, 1], adapters=True)[:2]
    in_processes(check_adapters, 4, tmp_path, alone)
    whole = learner_of("ddp", True)[0]
    began = {name: weight.clone() for name, weight in whole.state_dict().items()}
    dist.load_weights(whole, torch.load("adapters.pt", weights_only=True)[0])
    for name, weight in whole.named_parameters():
        moved = learns(name) and name != "special"  # of which no batch here reads any
        assert moved != torch.equal(weight, began[name]), name


def test_lazy_rows_of_several_processes_must_be_cut(monkeypatch):
    monkeypatch.setattr(dist, "world", lambda: 2)
    with pytest.raises(PageLLMError, match="--parallel rows"):
        optimiser(build("nano", 20, USERS, ITEMS), 1e-2, lazy=True)
