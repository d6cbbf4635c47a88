"""A shop page made of themed rows: built, scored and shown, in one command.

    pagellm storefront --dataset complete_journey                           all steps, and pages
    pagellm storefront --steps page --user 000001                           one page in the terminal
    pagellm storefront --steps page --user 000001 --json

Reads   data/<dataset>, with orders.parquet where there is one
Writes  runs/<run>/storefront/{build,tune,evaluate}
"""

import json
import sys
from dataclasses import dataclass, fields

from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.storefront import build, evaluate, tune
from pagellm.storefront.front import Sources, Store, open_store
from pagellm.storefront.page import page
from pagellm.storefront.parts import Page, page_json

__all__ = ["Config", "page_text", "run"]

STEPS = ("build", "tune", "evaluate", "page")


@dataclass(frozen=True, kw_only=True)
class Config(Sources):
    """Build a storefront, choose its weights on validation, score it on test, show pages."""

    steps: str = ",".join(STEPS)  # which of build, tune, evaluate, page to take, comma-separated
    user: str = ""  # whose page is shown; empty: three people's, and a stranger's
    json: bool = False  # pages as JSON, a line each
    explain: bool = False  # JSON pages with every decision of the gates
    explore: float = 0.0  # draw each slot by softmax(score / this); 0: the best item
    people: int = 200  # users on whose pages the weights are chosen
    missions: int = 20  # sets of categories that are bought together
    policy: str = ""  # file of the shop's policy (JSON); empty: the built-in one
    out_of_stock: str = ""  # file with an item's id a line; empty: everything is in stock

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


def page_text(store: Store, found: Page) -> str:
    """A page as people read it in a terminal."""
    titles, ids = store.front.catalogue.title, store.front.catalogue.ids
    lines = [f"user {found.user or 'unknown'}   layout {found.layout}   {found.ms['total']:.0f} ms"]
    for row in found.rows:
        lines += ["", f"  {row.theme.title}   ({row.placement.intent}, {row.source})"]
        if row.keywords:
            lines.append("    " + ", ".join(f"{k.text} ({k.matches})" for k in row.keywords))
        for rank, item in enumerate(row.item.tolist(), 1):
            score = row.score[rank - 1]
            lines.append(f"    {rank:2d}  {titles[item] or ids[item]:<56} {score:8.3f}")
    lines += [f"  note: {text}" for text in found.fallbacks]
    return "\n".join(lines) + "\n"


def show(config: Config) -> None:
    store = open_store(for_stage(config, Sources))
    if config.user:
        if config.user not in store.known.number:
            print(
                f"user {config.user} is unknown: a page for somebody without a history",
                file=sys.stderr,
            )
        people: list[str | None] = [config.user]
    else:
        people = [*store.shop.user_ids[:: max(1, store.shop.n_users // 3)][:3], None]
    for user in people:
        context = store.known.context(user)
        found = page(store.front, context, store.layout, config.seed, config.explore)
        if config.json or config.explain:
            catalogue = store.front.catalogue
            print(json.dumps(page_json(found, catalogue.ids, catalogue.title, config.explain)))
        else:
            print(page_text(store, found))


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
        show(config)


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm.storefront.storefront"))
