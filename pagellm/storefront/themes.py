"""The template writer: themes out of missions, keywords out of their categories. It needs no model.

writer = Template(ranker, platt, missions, corpus, policy, stock)
offers = writer.themes([context], [["browse"] * 5], [[]])[0]        10 answers, best first

A theme is a mission, as one person would walk through it: its concepts are the eight categories in
which this person is expected to buy most. The title is one of six forms, drawn by a key of the
person and mission.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pagellm.stage import randomness
from pagellm.storefront.corpus import Corpus
from pagellm.storefront.fuse import SLOT_DECAY
from pagellm.storefront.gates import LONGEST, MOST_WORDS
from pagellm.storefront.missions import Missions, top_of_groups
from pagellm.storefront.parts import INTENTS, Answer, Context, Keyword, Theme
from pagellm.storefront.policy import Policy, bare
from pagellm.storefront.rankers import Platt, Ranker
from pagellm.storefront.text import stems, words

__all__ = ["FORMS", "Template", "forms_of", "row_title", "season_title"]

CONCEPTS = 8
LOOKED_AT = 10  # items of a category or mission that its value is counted over
FIRST, STEP = 0.9, 0.05  # score of the first keyword, and what each later one loses
FORMS = {
    "browse": (
        "{A} and {b}",
        "{A}, {b} and more",
        "{A} with {b}",
        "{A} and more",
        "Around {a}, {b}",
        "{A} and what goes with it",
    ),
    "discover": (
        "New to you, {a} and {b}",
        "Try {a} and {b}",
        "Discover {a}, {b}",
        "Explore {a} and more",
        "{A} and more to try",
        "New around {a}",
    ),
    "season": (
        "{Season}, {a} and more",
        "{Season} and {a}",
        "{Season} with {a}, {b}",
        "{Season}, {a}, {b}",
        "{Season}",
        "{Season} with {a}",
    ),
}


def in_a_sentence(name: str) -> str:
    """A category's name within a title: "Toys & Games" is toys & games, LEGO stays LEGO."""
    parts = name.split(" ")
    return " ".join(p.lower() if p[1:] == p[1:].lower() else p for p in parts)


def cut_at_word(text: str, most: int) -> str:
    """The first whole words that fit into `most` characters."""
    if len(text) <= most:
        return text
    return text[: most + 1].rsplit(" ", 1)[0].rstrip(" ,&-")[:most]


def row_title(forms: tuple[str, ...], draw: int, a: str, b: str, season: str = "") -> str:
    """The drawn form if it fits into 40 characters, else the next that does, else the first name
    alone.
    """
    first, second = (cut_at_word(name, LONGEST) for name in (a, b))
    shared = set(first.lower().split()) & set(second.lower().split()) - {"and"}
    for step in range(len(forms)):
        form = forms[(draw + step) % len(forms)]
        if ("{b}" in form and (not second or shared)) or ("eason}" in form and not season):
            continue
        text = form.format(
            A=first,
            a=in_a_sentence(first),
            b=in_a_sentence(second),
            Season=season,
            season=season.lower(),
        )
        if len(text) <= LONGEST and len(words(text)) <= MOST_WORDS:
            return text
    return " ".join(first.split()[:MOST_WORDS])


def forms_of(policy: Policy, intent: str) -> tuple[str, ...]:
    """A shop's own forms of titles, else the built-in ones, without those whose words its policy is
    against.
    """
    forms = policy.titles.get(intent) or FORMS.get(intent, FORMS["browse"])
    return tuple(form for form in forms if not policy.against(bare(form))) or forms


def season_title(policy: Policy, season: str, names: Sequence[str], draw: int) -> str:
    """A title for a row of a season and some of its categories, the person's first in front.

    No category is named that generated rows may not name, nor one of the season's own words.
    """
    forms, said = forms_of(policy, "season"), set(stems(season))
    named = [
        name
        for name in names
        if not policy.restricted.found(name) and not said.intersection(stems(name))
    ]
    if not named:
        forms = ("{Season}",)
    a, b = [*named, "", ""][:2]
    return row_title(forms, draw % len(forms), a, b, season)


@dataclass(frozen=True)
class Template:
    """See the module. stock (N,) bool."""

    ranker: Ranker
    platt: Platt
    missions: Missions
    corpus: Corpus
    policy: Policy
    stock: np.ndarray
    seed: int = 0
    name: str = "template/1"

    def themes(
        self, contexts: list[Context], intents: list[list[str]], used: list[list[str]]
    ) -> list[list[Answer[Theme]]]:
        """For each context twice as many themes as it has placements of an intent, best first.

        intents  of the open placements        used  titles that stand on the page already
        """
        found = []
        for context, wanted, titles in zip(contexts, intents, used, strict=True):
            offers = []
            for intent in dict.fromkeys(wanted):
                offers += self.offers(context, intent, 2 * wanted.count(intent), set(titles))
            found.append(offers)
        return found

    def offers(
        self, context: Context, intent: str, n: int, titles: set[str]
    ) -> list[Answer[Theme]]:
        logit = self.ranker(context)
        allowed = self.stock.copy()
        allowed[context.barred] = False
        if intent == "discover":
            allowed[context.item] = False
        # Only the front of each category and mission counts, so most of the shop need not be
        # sorted.
        order = np.flatnonzero(allowed)
        order = order[by_falling(logit[order])]
        best = top_of_groups(order, self.missions.category, len(self.missions.names), LOOKED_AT)
        clicks = np.where(best >= 0, self.platt(logit[best]), 0.0)  # (C, 10)
        parts = self.parts(clicks)
        worth = np.array([part_worth(clicks[categories]) for _, categories in parts])
        offers: list[Answer[Theme]] = []
        for at in np.lexsort((np.arange(len(worth)), -worth)).tolist():
            if len(offers) == n or worth[at] <= 0:
                break
            theme = self.theme(context, intent, *parts[at])
            if theme.title not in titles:
                titles.add(theme.title)
                offers.append(Answer(theme))
        return offers

    def parts(self, clicks: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """(mission, its categories, at most eight) of every theme that could be offered.

        The eight are those that hold most of the mission's ten best items. Two rows of eight
        categories each for a large mission were tried: 1.5% less recall, since they chase what is
        bought out of habit.
        """
        found = []
        total = clicks.sum(1)
        for m in range(self.missions.k):
            members = np.flatnonzero((self.missions.of_category == m) & (total > 0) & self.nameable)
            if not len(members):
                continue
            inside = clicks[members]
            cut = np.sort(inside, axis=None)[-min(LOOKED_AT, inside.size)]
            best = np.where(inside >= cut, inside, 0.0).sum(1)
            found.append((m, members[np.lexsort((members, -total[members], -best))][:CONCEPTS]))
        return found

    def theme(self, context: Context, intent: str, m: int, categories: np.ndarray) -> Theme:
        names = [self.missions.names[c] for c in categories.tolist()]
        forms = self.forms[intent]
        season = context.season[0] if context.season else ""
        draw = randomness.seed_of(self.seed, context.bucket, m, intent) % len(forms)
        title = row_title(forms, draw, names[0], names[1] if len(names) > 1 else "", season)
        return Theme(title, intent, tuple(names), mission=m, source=self.name)

    @cached_property
    def forms(self) -> dict[str, tuple[str, ...]]:
        """Forms of titles by intent."""
        return {intent: forms_of(self.policy, intent) for intent in INTENTS}

    @cached_property
    def nameable(self) -> np.ndarray:
        """(C,) bool: categories that are keywords and that the policy lets a row name."""
        return np.array([self.may_name(name) for name in self.missions.names], dtype=bool)

    def may_name(self, name: str) -> bool:
        return name in self.corpus.number and not self.policy.restricted.found(name)

    def keywords(
        self, themes: list[Theme], contexts: list[Context], offered: list[np.ndarray], m: int = 8
    ) -> list[Answer[list[Keyword]]]:
        """The offered keywords that are concepts of the theme, in its order, then the nearest
        others.
        """
        found = []
        for theme, numbers in zip(themes, offered, strict=True):
            own = [
                self.corpus.number[name] for name in theme.concepts if name in self.corpus.number
            ]
            named = set(own)
            nearest = [w for w in numbers.tolist() if w not in named] if len(own) < m else []
            chosen = [*own, *nearest][:m]
            written = [self.corpus.keyword(w, FIRST - STEP * k) for k, w in enumerate(chosen)]
            found.append(Answer(written) if written else Answer(None, "no keyword is near"))
        return found


def by_falling(logit: np.ndarray) -> np.ndarray:
    """Places of some logits, the largest first, equals in their order."""
    order = np.argsort(-logit)  # much faster than a stable sort
    ordered = logit[order]
    tied = (ordered[1:] == ordered[:-1]).any()
    return np.argsort(-logit, kind="stable") if tied else order


def part_worth(clicks: np.ndarray) -> float:
    """Expected clicks on the ten best items of some categories: clicks (c, 10)."""
    best = np.sort(clicks, axis=None)[::-1][:LOOKED_AT]
    return float(best @ SLOT_DECAY ** np.arange(len(best)))
