"""Stages run behind what they read, and what they read depends on their options."""

import pytest

from pagellm import compose, ppo, pretrain, reward, sft
from pagellm.stage.config import PageLLMError
from pagellm.stage.order import STAGES, in_order, reads

MODULES = {"pretrain": pretrain, "sft": sft, "reward": reward, "ppo": ppo, "compose": compose}
OUTCOME = {"item_reward": "outcome"}


def needs(**options):
    """What stages read, given some of their options."""
    return lambda stage: reads(stage, MODULES[stage].Config(**options.get(stage, {})))


@pytest.mark.parametrize(
    ("stages", "options", "order"),
    [
        ("sft", {}, "pretrain sft"),
        ("ppo", {}, "pretrain sft reward ppo"),
        ("compose", {}, "pretrain sft compose"),
        ("ppo,compose", {}, "pretrain sft reward ppo compose"),
        ("compose, ppo", {}, "pretrain sft reward ppo compose"),
        ("ppo", {"ppo": OUTCOME}, "pretrain sft reward compose ppo"),
        ("ppo", {"ppo": OUTCOME | {"w_page": 0.0}}, "pretrain sft compose ppo"),
        ("ppo,compose", {"ppo": OUTCOME | {"w_page": 0.0}}, "pretrain sft compose ppo"),
        ("ppo", {"ppo": {"reward_run": "other"}}, "pretrain sft ppo"),
        ("ppo", {"ppo": OUTCOME | {"compose_run": "other"}}, "pretrain sft reward ppo"),
        ("ppo", {"ppo": {"source_run": "other"}}, "ppo"),
        ("compose", {"compose": {"policy": "none"}}, "compose"),
        ("compose", {"compose": {"policy": "ppo"}}, "pretrain sft reward ppo compose"),
        (
            "compose",
            {
                "compose": {"policy": "ppo"},
                "ppo": {"reward_fn": "mine:f", "w_token": 0.0, "w_page": 0.0},
            },
            "pretrain sft ppo compose",
        ),
    ],
)
def test_a_stage_runs_behind_what_it_reads(stages, options, order):
    assert in_order(stages, needs(**options)) == order.split()


def test_stages_that_read_each_other_are_refused_with_the_way_out():
    with pytest.raises(PageLLMError, match="compose reads ppo reads compose") as refused:
        in_order("compose", needs(ppo=OUTCOME, compose={"policy": "ppo"}))
    assert "compose_run" in str(refused.value)


def test_an_unknown_stage_is_named():
    with pytest.raises(PageLLMError, match=f"no stage 'sftt'; want some of {', '.join(STAGES)}"):
        in_order("sftt", needs())
