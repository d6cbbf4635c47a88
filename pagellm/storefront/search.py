"""Writer `search`, the teacher: it tries sets of keywords and keeps the one that is worth most.

teacher = Search(front)
teacher.keywords([theme], [context], [offered])

    J(K) = (1 - .02 |K|) sum over the row's first ten items of p(bought) x agreement

Keywords are added one at a time, each the one that raises J most: three in any case, at most
eight, and no further one that adds less than half a percent. Where the template's own keywords are
worth more, they are kept. A title is tried in each of its forms. It knows train orders alone and
needs no model; what it finds is what a small model is taught (teach.py, student.py).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from pagellm.storefront import gates
from pagellm.storefront.making import Front
from pagellm.storefront.offers import MOST_KEPT, kept, scored, text_decisions
from pagellm.storefront.parts import Answer, Candidates, Context, Keyword, Theme
from pagellm.storefront.retrieve import found_by, merged, reached
from pagellm.storefront.text import best_first
from pagellm.storefront.themes import FIRST, STEP, Template, row_title

__all__ = ["Objective", "Search", "grown", "objective", "passes"]

# What a keyword costs, as a share: calibrated p differ between shops by a factor of 100. And the
# share of J that one more must add.
COST, LEAST_GAIN = 0.02, 0.005
SHOWN = 10  # items of a row that count
LEAST, MOST = 3, 8  # keywords of a theme

Agree = Callable[[list[Keyword], np.ndarray], np.ndarray]


class Objective:
    """J of sets of keywords for one theme and person. What each keyword finds is kept.

    context  `barred` holds what the rows above show
    """

    def __init__(self, front: Front, context: Context, theme: Theme):
        self.front, self.context, self.theme = front, context, theme
        self.logit = front.ranker(context)
        allowed = front.stock.copy()
        if theme.intent == "discover":
            allowed[context.item] = False
        self.live, self.score = reached(front.index, context, allowed, self.logit)
        self.agree = partial(front.agree, theme)
        self.lists: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def about(self, theme: Theme) -> None:
        """Another title for the same row: what keywords find stays."""
        self.theme, self.agree = theme, partial(self.front.agree, theme)

    def often(self) -> None:
        """Many sets will be tried: what of the agreement hangs on the theme is computed once."""
        of_theme = getattr(self.front.agree, "of_theme", None)
        if of_theme is not None:
            self.agree = of_theme(self.theme)

    def candidates(self, keywords: list[Keyword]) -> Candidates:
        """What the page would have of these keywords: items, and how well each fits."""
        for keyword in keywords:
            if keyword.text not in self.lists:
                self.lists[keyword.text] = found_by(
                    self.front.index, keyword, self.live, self.score, self.front.depth
                )
        weight = np.array([keyword.score for keyword in keywords])
        weight = np.exp(weight - weight.max(initial=-np.inf))
        found = merged([self.lists[keyword.text] for keyword in keywords], weight)
        best = np.sort(best_first(self.logit[found.item], found.item, MOST_KEPT))
        found = kept(found, best)
        return replace(found, agree=self.agree(keywords, found.item))

    def order(self, found: Candidates, most: int = SHOWN) -> np.ndarray:
        """Places of the row's first candidates, best first."""
        score, _ = scored(self.front, self.logit[found.item], found)
        return best_first(score, found.item, most)

    def __call__(self, keywords: list[Keyword]) -> float:
        """J; 0 without keywords."""
        if not keywords:
            return 0.0
        found = self.candidates(keywords)
        first = self.order(found)
        p = self.front.platt(self.logit[found.item[first]])
        return (1 - COST * len(keywords)) * float(p @ found.agree[first])


def objective(front: Front, context: Context, theme: Theme, keywords: list[Keyword]) -> float:
    """J of one set: see the module."""
    return Objective(front, context, theme)(keywords)


def grown(worth: Objective, numbers: np.ndarray, m: int = MOST) -> list[Keyword]:
    """Keywords added one by one, each the best of those offered that the gates let pass.

    The first three are taken however little they add: fewer are no valid answer.
    """
    corpus = worth.front.corpus
    chosen: list[Keyword] = []
    best, left = 0.0, numbers.tolist()
    while left and len(chosen) < m:
        score = FIRST - STEP * len(chosen)

        def named(w: int, score: float = score) -> Keyword:
            return corpus.keyword(w, score)

        tried = [(worth([*chosen, named(w)]), w) for w in left]
        tried.sort(key=lambda pair: (-pair[0], pair[1]))
        taken = next((one for one in tried if passes(worth, [*chosen, named(one[1])])), None)
        if taken is None or (len(chosen) >= LEAST and taken[0] < best * (1 + LEAST_GAIN)):
            break
        best, w = taken
        chosen.append(named(w))
        # Those that were worth more overlap what is chosen, and will do so later too.
        gone = {other for _, other in tried[: tried.index(taken) + 1]}
        left = [other for other in left if other not in gone]
    return chosen


def passes(worth: Objective, keywords: list[Keyword]) -> bool:
    """Whether the gates let every one of the keywords pass."""
    front = worth.front
    policy = front.policy
    stay, _ = gates.check_keywords(keywords, front.corpus, worth.context, policy.min_items, policy)
    return len(stay) == len(keywords)


@dataclass(frozen=True)
class Search:
    """See the module. front: with the template writer, which drafts the rows."""

    front: Front
    name: str = "search/1"
    chooses: bool = True  # keywords are chosen from all that are offered

    @property
    def template(self) -> Template:
        writer = self.front.writer
        assert isinstance(writer, Template)
        return writer

    def themes(
        self, contexts: list[Context], intents: list[list[str]], used: list[list[str]]
    ) -> list[list[Answer[Theme]]]:
        """For each context a theme for each of its placements, best first, in its best form."""
        drafts = self.template.themes(contexts, intents, used)
        found = []
        for context, wanted, titles, offers in zip(contexts, intents, used, drafts, strict=True):
            left, answers, taken = list(wanted), [], set(titles)
            for draft in [answer.value for answer in offers if answer.value is not None]:
                if draft.intent in left:
                    left.remove(draft.intent)
                    answers.append(self.titled(context, draft, taken))
            found.append(answers)
        return found

    def titled(self, context: Context, draft: Theme, taken: set[str]) -> Answer[Theme]:
        """The draft under the title that makes its row worth most; the title joins `taken`."""
        started = time.perf_counter()
        forms = self.template.forms[draft.intent]
        a, b = [*draft.concepts, "", ""][:2]
        season = context.season[0] if context.season else ""
        titles = [row_title(forms, n, a, b, season) for n in range(len(forms))]
        (answer,) = self.template.keywords([draft], [context], [np.zeros(0, np.int64)])
        worth, best = Objective(self.front, context, draft), (-np.inf, draft)
        for title in dict.fromkeys([draft.title, *titles]):
            theme = replace(draft, title=title, source=self.name)
            if title in taken or gates.blocked(text_decisions(self.front, theme)):
                continue
            worth.about(theme)
            value = worth(answer.value or [])
            if value > best[0]:
                best = value, theme
        taken.add(best[1].title)
        return Answer(replace(best[1], source=self.name), seconds=time.perf_counter() - started)

    def keywords(
        self, themes: list[Theme], contexts: list[Context], offered: list[np.ndarray], m: int = MOST
    ) -> list[Answer[list[Keyword]]]:
        """For each theme the set that was grown, or the template's where that is worth more."""
        drafts = self.template.keywords(themes, contexts, offered, m)
        found = []
        for theme, context, numbers, draft in zip(themes, contexts, offered, drafts, strict=True):
            started = time.perf_counter()
            worth = Objective(self.front, context, theme)
            worth.often()
            chosen, plain = grown(worth, numbers, m), draft.value or []
            best = max((chosen, plain), key=worth)
            problem = "" if best else "no keyword is near"
            seconds = time.perf_counter() - started
            found.append(Answer(best or None, problem, seconds=seconds))
        return found
