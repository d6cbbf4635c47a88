"""A request for a page of rows, as the service takes it."""

from dataclasses import dataclass, field

from pagellm.serving.filters import Filters

__all__ = ["FrontAsk"]


@dataclass(frozen=True)
class FrontAsk:
    """A request for a page of rows.

    more     ids of items bought since, oldest first        layout  an id, or a whole layout
    static   the page without themes, to stand beside
    explore, explore_themes, explore_all    what is drawn: see page.page
    """

    user: str | None = None
    more: tuple[str, ...] = ()
    layout: str | dict | None = None
    at: int | None = None
    explain: bool = False
    explore: float = 0.0
    explore_themes: bool = False
    explore_all: bool = False
    seed: int | None = None
    static: bool = False
    filters: Filters = field(default_factory=Filters)

    @property
    def drawn(self) -> dict:
        """What of the page is drawn, as options of page.page."""
        names = ("explore", "explore_themes", "explore_all")
        return {name: getattr(self, name) for name in names}

    @property
    def plain(self) -> bool:
        """Whether the page may be kept: a person's own, as it is without special wishes."""
        special = self.more or self.explain or self.explore or self.static or self.at is not None
        return not special and self.user is not None and self.filters == Filters()
