"""A page of rows in the terminal, or as JSON.

Reads   data/<dataset>, runs/<run>/storefront/build and tune

    pagellm storefront page --dataset complete_journey --user 000001
    pagellm storefront page --user 000001 --json --explain
"""

import json
import sys
from dataclasses import dataclass

from pagellm.stage.command import main
from pagellm.storefront.front import Explored, Store, open_store
from pagellm.storefront.page import page
from pagellm.storefront.parts import Page, page_json

__all__ = ["Config", "page_text", "run"]


@dataclass(frozen=True, kw_only=True)
class Config(Explored):
    """Make pages of rows and print them."""

    user: str = ""  # whose page is shown; empty: pages of three users and of an unknown one
    json: bool = False  # print pages as JSON, one a line
    explain: bool = False  # with --json: add every decision of the gates


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


def run(config: Config) -> None:
    """Print the page of one person, or of four.

    Raises PageLLMError where no storefront is built.
    """
    store = open_store(config)
    if config.user:
        if config.user not in store.known.number:
            print(
                f"user {config.user} is unknown: a page for somebody without a history",
                file=sys.stderr,
            )
        people: list[str | None] = [config.user]
    else:
        ids = list(store.known.number)
        people = [*ids[:: max(1, len(ids) // 3)][:3], None]
    for user in people:
        context = store.known.context(user)
        found = page(store.front, context, store.layout, config.seed, **config.drawn)
        if config.json or config.explain:
            catalogue = store.front.catalogue
            print(json.dumps(page_json(found, catalogue.ids, catalogue.title, config.explain)))
        else:
            print(page_text(store, found))


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm storefront page"))
