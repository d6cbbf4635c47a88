"""A synthetic shop with its storefront built, tuned and evaluated: slow to make, so made once."""

import pytest

from pagellm.data import prepare
from pagellm.storefront import build, evaluate, tune


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Options that name the shop and its storefront; tests write nothing there."""
    root = tmp_path_factory.mktemp("storefront")
    common = {"data": str(root / "data"), "runs": str(root / "runs"), "device": "cpu"}
    prepare.run(prepare.Config(data=common["data"], users=120, items=200))
    build.run(build.Config(**common))
    tune.run(tune.Config(people=10, **common))
    evaluate.run(evaluate.Config(n_boot=20, **common))
    return common
