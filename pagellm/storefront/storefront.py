"""A shop page made of themed rows: built, scored and shown, in one command.

    pagellm storefront --dataset complete_journey                           all steps, and pages

Each step is a command of its own too: pagellm storefront build, tune, evaluate, page.

Reads   data/<dataset>, with orders.parquet where there is one
Writes  runs/<run>/storefront/{build,tune,evaluate}
"""

import sys
from dataclasses import dataclass, fields

from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.storefront import build, evaluate, show, tune

__all__ = ["Config", "run"]

STEPS = ("build", "tune", "evaluate", "page")


@dataclass(frozen=True, kw_only=True)
class Config(show.Config):
    """Build a storefront, choose its weights on validation, score it on test, show pages."""

    steps: str = ",".join(STEPS)  # which of build, tune, evaluate, page to take, comma-separated
    people: int = 200  # users on whose pages the weights are chosen
    missions: int = 20  # sets of categories that are bought together
    starts: int = 6  # of the clustering that finds them; the one whose rows hold most is kept
    policy: str = ""  # file of the shop's policy (JSON); empty: the built-in one
    out_of_stock: str = ""  # file with an item's id a line; empty: everything is in stock
    encoder: str = ""  # vectors of texts: minilm, out of a wheel, or the directory of another
    # sentence encoder; empty: of the shop's own words

    def __post_init__(self):
        super().__post_init__()
        names = self.steps.split(",")
        check(
            self,
            steps=(
                set(names) <= set(STEPS) and len(set(names)) == len(names),
                f"some of {','.join(STEPS)}",
            ),
        )


def for_stage(config: Config, cls, **more):
    """The same options as another stage's Config."""
    shared = {f.name: getattr(config, f.name) for f in fields(cls) if hasattr(config, f.name)}
    return cls(**shared | more)


def run(config: Config) -> None:
    """Take the steps asked for, in their order."""
    steps = config.steps.split(",")
    if "build" in steps:
        build.run(for_stage(config, build.Config))
    if "tune" in steps:
        try:
            tune.run(for_stage(config, tune.Config))
        except PageLLMError as error:
            if "no validation rows" not in str(error):
                raise
            print(f"weights stay at their defaults: {error}", flush=True)
    if "evaluate" in steps:
        evaluate.run(for_stage(config, evaluate.Config, people=0))
    if "page" in steps:
        show.run(config)


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm storefront"))
