"""The arithmetic behind the estimate for large shops, and that its parts are what the code really does."""

import pytest

from experiments.cost.extrapolate import Config, Parts, estimate, measure
from pagellm.stage.config import PageLLMError


def test_the_parts_are_those_of_the_code():
    """A matrix is used once forward and twice backward; the head's forward is made again in the backward pass; AdamW
    keeps weight, gradient and two moments in float32."""
    parts = measure()
    assert parts.trunk == pytest.approx(6.0, rel=0.01)
    assert parts.head == pytest.approx(8.0, rel=0.01)
    assert parts.state == 16.0


def test_what_grows_and_what_is_shared():
    config, parts = Config(users=1000, items=500, batch=4), Parts(6.0, 8.0, 16.0)
    one, eight = estimate(config, parts, 1), estimate(config, parts, 8)
    assert one["ddp_gb"] == eight["ddp_gb"] == one["fsdp_gb"] and one["fsdp_wire_hours"] == 0
    assert eight["cut_gb"] == pytest.approx(one["cut_gb"] / 8)
    assert eight["compute_hours"] == pytest.approx(one["compute_hours"] / 8)
    more = estimate(Config(users=1000, items=1000, batch=4), parts, 1)
    head = one["compute_hours"] * (1 - one["trunk_share"])
    assert more["compute_hours"] == pytest.approx(one["compute_hours"] + head)
    with pytest.raises(PageLLMError, match="tflops"):
        Config(tflops=0)
