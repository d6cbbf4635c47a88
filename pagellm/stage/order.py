"""Which stages a stage reads, and the order in which stages run.

    order = in_order("ppo,compose", lambda stage: reads(stage, configs[stage]))

What is read depends on the options: PPO that is paid by the outcome model reads the stage compose,
and needs no reward model.
"""

from collections.abc import Callable, Sequence
from typing import Any

from pagellm.stage.config import PageLLMError

__all__ = ["STAGES", "in_order", "reads"]

# All stages that learn something, in their usual order.
STAGES = ("pretrain", "sft", "reward", "ppo", "compose")


def reads(stage: str, config: Any) -> tuple[str, ...]:
    """The stages of the same run that a stage reads, given its options.

    config  the stage's Config. A stage that reads another run (source_run) reads none of this one
    """
    if stage == "pretrain" or bool(getattr(config, "source_run", None)):
        return ()
    if stage == "compose":
        return () if config.policy == "none" else (config.policy,)
    if stage == "ppo":
        pairs = config.reads_pairs and not config.reward_run
        outcome = config.reads_outcome and not config.compose_run
        return ("sft", *(["reward"] if pairs else []), *(["compose"] if outcome else []))
    return ("pretrain",) if stage == "sft" else ("sft",)


def in_order(stages: str | Sequence[str], needs: Callable[[str], tuple[str, ...]]) -> list[str]:
    """The stages named and those that they need: in the usual order, each behind what it needs.

    stages  names, in a list or with commas between them
    needs   the stages that a stage reads, as `reads` gives them
    Raises PageLLMError for an unknown name, and for stages that need each other.
    """
    names = stages.split(",") if isinstance(stages, str) else list(stages)
    found: list[str] = []

    def add(name: str, behind: tuple[str, ...]) -> None:
        if name in behind:
            raise PageLLMError(
                f"{' reads '.join([*behind, name])}: one of them has to come first\n  compose with "
                "policy=ppo reads PPO's policy, and PPO with item_reward=outcome reads compose's "
                "outcome model. Give one of the two a run of its own, and name the other's by "
                "source_run or compose_run."
            )
        if name not in found:
            for other in needs(name):
                add(other, (*behind, name))
            found.append(name)

    wanted = [name.strip() for name in names]
    for name in wanted:
        if name not in STAGES:
            raise PageLLMError(f"stages: no stage {name!r}; want some of {', '.join(STAGES)}")
    for name in sorted(wanted, key=STAGES.index):
        add(name, ())
    return found
