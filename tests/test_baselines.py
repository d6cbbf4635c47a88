"""EASE: the closed form solves its own problem, and never recommends what was seen."""

import numpy as np
import pytest
import torch

from experiments import baselines
from pagellm.config import PageLLMError
from pagellm.data import prepare
from pagellm.data.shop import load


def test_the_closed_form_is_a_minimum_under_a_zero_diagonal():
    X = (torch.rand(30, 6, generator=torch.Generator().manual_seed(0)) < 0.4).double()
    B = baselines.ease_weights(X.T @ X, 2.0)
    assert torch.equal(B.diagonal(), torch.zeros(6, dtype=torch.float64))

    def cost(W):
        return (X - X @ W).square().sum() + 2.0 * W.square().sum()

    B = B.clone().requires_grad_()
    grad = torch.autograd.grad(cost(B), B)[0]
    assert grad[~torch.eye(6, dtype=torch.bool)].abs().max() < 1e-9


def test_baselines_run_and_leave_seen_items_out(tmp_path, capsys):
    prepare.run(prepare.Config(data=str(tmp_path / "data"), users=80, items=60))
    config = baselines.Config(data=str(tmp_path / "data"), runs=str(tmp_path / "runs"), ridges="10,100", n_boot=20)
    results = baselines.run(config)
    assert list(results)[0] == "popularity" and list(results)[1].startswith("EASE, ridge 10")
    shop = load(tmp_path / "data" / "synthetic")
    seen = shop.csr(("train", "valid"), positive=None)
    ranked = baselines.rank_rows(shop, np.arange(shop.n_users), torch.eye(shop.n_items), seen, 20, 30)
    for user, items in zip(ranked.user, ranked.item, strict=True):
        assert not set(items[items >= 0]) & set(seen.of(user)[0])
    baselines.run(config)
    assert "EASE" in capsys.readouterr().out
    with pytest.raises(PageLLMError, match="ridges="):
        baselines.Config(ridges="a")
