"""The comparison of the outcome network with trees: what it measures, and that it runs."""

import numpy as np
import pytest

from experiments import outcome_trees
from pagellm.stage.config import PageLLMError


def test_a_model_that_knows_is_ahead_of_one_that_guesses():
    rng = np.random.default_rng(0)
    picked = rng.random((60, 30)) < 0.2
    there = rng.random((60, 30)) < 0.9
    knows = np.where(picked, 0.7, 0.1) * rng.uniform(0.5, 1.0, picked.shape)
    found = outcome_trees.compare(
        {"network": rng.random(picked.shape), "trees": knows}, picked & there, there
    )
    assert found["trees"]["difference"]["low"] > 0.3
    assert found["trees"]["log loss"] < found["network"]["log loss"]
    assert len(found["trees"]["reliability"]) == 10


def test_it_runs_and_says_which_extra_it_needs(served, tmp_path):
    pytest.importorskip("lightgbm", reason="extra: no LightGBM")
    found = outcome_trees.run(
        outcome_trees.Config(
            data=str(served / "data"), runs=str(tmp_path), networks=1, trees=5, fold_users=40
        )
    )
    assert set(found) == {"network", "trees"}
    assert (tmp_path / "outcome-trees" / "synthetic.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "lightgbm", None)
        with pytest.raises(PageLLMError, match="LightGBM"):
            outcome_trees.grow(np.zeros((2, 1)), np.zeros(2), 1, 0, {})
