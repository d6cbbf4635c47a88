"""The estimate for large shops: its arithmetic, and its parts against the theory."""

import pytest

from experiments.cost.extrapolate import Config, Measured, estimate, measure, trunk_parameters
from pagellm.model.gpt2 import SIZES
from pagellm.stage.config import PageLLMError


def test_the_parts_are_those_of_the_code():
    """A step's costs: 6 FLOP per parameter and token, 8 in the head, 16 bytes per weight.

    A matrix is used once forward and twice backward; the head recomputes its forward in the
    backward pass; AdamW keeps weight, gradient and two moments in float32.
    """
    parts = measure()
    assert parts.trunk == pytest.approx(6.0, rel=0.01)
    assert parts.head == pytest.approx(8.0, rel=0.01)
    assert parts.state == 16.0


def test_what_grows_and_what_is_shared():
    config, parts = Config(users=1000, items=500, batch=4), Measured(6.0, 8.0, 16.0)
    one, eight = estimate(config, parts, 1), estimate(config, parts, 8)
    assert one["ddp_gb"] == eight["ddp_gb"] == one["fsdp_gb"] and one["fsdp_wire_hours"] == 0
    trunk = 8 * trunk_parameters(SIZES[config.size]) / 1e9  # fetched weights, their gradient
    assert eight["cut_gb"] == pytest.approx(one["cut_gb"] / 8 + trunk)
    assert eight["cut_wire_hours"] > one["cut_wire_hours"] == one["drawn_wire_hours"] == 0
    less = estimate(Config(users=1000, items=500, batch=4, candidates=500), parts, 8)
    assert less["drawn_hours"] == less["compute_hours"]
    assert eight["compute_hours"] == pytest.approx(one["compute_hours"] / 8)
    more = estimate(Config(users=1000, items=1000, batch=4), parts, 1)
    head = one["compute_hours"] * (1 - one["trunk_share"])
    assert more["compute_hours"] == pytest.approx(one["compute_hours"] + head)
    with pytest.raises(PageLLMError, match="tflops"):
        Config(tflops=0)
