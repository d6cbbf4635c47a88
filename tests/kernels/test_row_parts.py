"""Tables cut by rows over 2 and 4 processes against the whole table in one: values, gradients.

Process p has p positions of its own, so the first has none; the last processes may have no rows.
"""

import pytest
import torch
import torch.distributed as td
import torch.nn.functional as F
from torch.testing import assert_close

from pagellm.kernels import logprob
from pagellm.kernels.logprob import linear_logp
from pagellm.kernels.parallel import Parts, all_logits, averaged, lookup
from pagellm.model.shortlist import best_items
from tests.processes import in_processes

ROWS = (23, 8, 3)  # rows of a table: even shares or not, and fewer than processes
C = 5


def drawn(rows, world, seed=0):
    """The same table on every process, and everybody's states and ids: a list by process."""
    made = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, C, generator=made, dtype=torch.float64)
    states = [torch.randn(p, C, generator=made, dtype=torch.float64) for p in range(world)]
    ids = [torch.randint(rows, (p,), generator=made) for p in range(world)]
    return table, states, ids


def cut(table, parts):
    return table[parts.first : parts.last].clone().requires_grad_()


def mean_gradient(loss, table, parts):
    """The gradient of this process's rows, of the mean over the processes of their losses."""
    (whole,) = torch.autograd.grad(loss, table, retain_graph=True)
    return whole[parts.first : parts.last] / parts.world


def check_lookup(rank):
    for rows in ROWS:
        for sparse in (False, True):
            parts = Parts(rows)
            table, states, ids = drawn(rows, parts.world)
            own, whole = cut(table, parts), table.clone().requires_grad_()
            found = lookup(own, ids[rank], parts, sparse)
            assert torch.equal(found, F.embedding(ids[rank], table))
            (found * states[rank]).sum().backward()
            assert own.grad.is_sparse == sparse
            loss = sum((F.embedding(i, whole) * s).sum() for i, s in zip(ids, states, strict=True))
            assert_close(own.grad.to_dense(), mean_gradient(loss, whole, parts))


def check_logits(rank):
    for rows in ROWS:
        parts = Parts(rows)
        table, states, _ = drawn(rows, parts.world, seed=1)
        own, whole = cut(table, parts), table.clone().requires_grad_()
        hidden = states[rank].clone().requires_grad_()
        logits = all_logits(hidden, averaged(own, parts), parts)
        assert_close(logits, states[rank] @ table.T)
        logits.sin().sum().backward()
        other = states[rank].clone().requires_grad_()
        (other @ table.T).sin().sum().backward()
        assert_close(hidden.grad, other.grad)
        loss = sum((s @ whole.T).sin().sum() for s in states)
        assert_close(own.grad, mean_gradient(loss, whole, parts))


def check_logp(rank):
    for rows, temperature, entropies in ((23, 1.0, False), (8, 0.7, True), (3, 1.0, True)):
        parts = Parts(rows)
        table, states, ids = drawn(rows, parts.world, seed=2)
        # p columns in process p: rows 0 and 1 alternately, but never the target
        excluded = [
            torch.where(torch.arange(p) % 2 == i[:, None], -1, torch.arange(p) % 2)
            for p, i in enumerate(ids)
        ]
        own, whole = cut(table, parts), table.clone().requires_grad_()
        hidden = [s.clone().requires_grad_() for s in states]

        def loss_of(out, p):
            logp, spread = out if isinstance(out, tuple) else (out, torch.zeros_like(out))
            return (p + 1) * logp.sum() + 0.3 * spread.square().sum()

        more = {"temperature": temperature, "return_entropy": entropies}
        want = [
            linear_logp(h, whole, i, x, **more)
            for h, i, x in zip(hidden, ids, excluded, strict=True)
        ]
        loss = sum(loss_of(out, p) for p, out in enumerate(want))
        mine = states[rank].clone().requires_grad_()
        got = linear_logp(
            mine, averaged(own, parts), ids[rank], excluded[rank], **more, parts=parts
        )
        assert_close(got, want[rank])
        loss_of(got, rank).backward()
        assert_close(own.grad, mean_gradient(loss, whole, parts))
        assert_close(mine.grad, torch.autograd.grad(loss, hidden[rank])[0])


def check_best(rank):
    """Shortlists: the same items, whoever proposed them and whatever is excluded."""
    for rows, size in ((23, 6), (8, 8), (3, 2)):
        parts = Parts(rows)
        table, states, ids = drawn(rows, parts.world, seed=3)
        table, states = table.float(), states[rank].float()
        table[1] = table[0]  # equal scores
        excluded = ids[rank][:, None]
        proposed = torch.stack([(ids[rank] + 1) % rows, ids[rank], ids[rank] * 0 - 1], 1)
        own = table[parts.first : parts.last]
        for given in (None, proposed):
            want = best_items(states, table, excluded, size, given)
            assert torch.equal(best_items(states, own, excluded, size, given, parts=parts), want)


def check_all(rank):
    for check in (check_lookup, check_logits, check_logp, check_best):
        check(rank)


@pytest.mark.parametrize("world", [2, 4])
def test_a_cut_table_is_the_whole_table(tmp_path, monkeypatch, world):
    monkeypatch.setitem(logprob.TILE, "cpu", 7)  # several tiles, kept and computed again
    monkeypatch.setitem(logprob.KEEP, "cpu", 2)
    in_processes(check_all, world, tmp_path)


def test_every_row_has_one_place(monkeypatch):
    for whole in range(12):
        for world in range(1, 6):
            monkeypatch.setattr(td, "get_world_size", lambda world=world: world)
            monkeypatch.setattr(td, "get_rank", lambda: 0)
            parts = Parts(whole)
            held = [i for rank in range(world) for i in range(*parts.bounds(rank))]
            assert held == list(range(whole))
            assert max(parts.widths()) <= -(-whole // world) and sum(parts.widths()) == whole
