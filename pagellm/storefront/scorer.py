"""How well an item fits a theme: a logistic regression over four plain features.

scorer = fit_scorer(features, fits)
agree = scorer(features)                                (n,) in 0..1

Features: BM25 of title and concepts against the item's text over the best of the shop, cosine of
their vectors, the share of the keywords' weight that matches the item, and whether the item's
category is among the concepts. Labels are made by rule, not by people: an item of a template
theme's mission fits; of the items that do not fit, half are drawn from the nearest other mission,
half from the whole shop.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pagellm.storefront.corpus import Corpus
from pagellm.storefront.missions import Missions
from pagellm.storefront.parts import Keyword, Theme
from pagellm.storefront.retrieve import Index
from pagellm.storefront.text import stems

__all__ = ["Agreement", "Matcher", "Scorer", "fit_scorer"]

RIDGE = 0.01


@dataclass(frozen=True)
class Matcher:
    """What the features are read from. place (N,): the text of each item, -1 out of stock."""

    index: Index
    corpus: Corpus
    missions: Missions
    vector: np.ndarray  # (n, d) float32 of the index's texts
    place: np.ndarray
    number: dict[str, int]  # name of a category -> its number

    @classmethod
    def of(cls, index: Index, missions: Missions, vector: np.ndarray) -> "Matcher":
        place = np.full(len(index.popularity), -1)
        place[index.live] = np.arange(len(index.live))
        number = {name: c for c, name in enumerate(missions.names)}
        return cls(index, index.corpus, missions, vector, place, number)

    def features(self, theme: Theme, keywords: list[Keyword], item: np.ndarray) -> np.ndarray:
        """(n, 4) float64 of some items in stock."""
        text, near, named = self.of_theme(theme, item)
        return np.stack([text, near, self.keyword_share(keywords, item), named], axis=1).astype(
            np.float64
        )

    def of_theme(self, theme: Theme, item: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The three features, (n,) each, in which a theme's keywords have no part."""
        at = self.place[item]
        score = self.index.bm25.dense(stems(" ".join((theme.title, *theme.concepts))))
        near = self.vector[at] @ self.corpus.theme_vector(theme).astype(np.float32)
        named = np.zeros(
            len(self.number) + 1, dtype=bool
        )  # the last is of items without a category
        named[[self.number[name] for name in theme.concepts if name in self.number]] = True
        text = score[at] / max(score.max(initial=0.0), 1e-12)
        return text, near, named[self.missions.category[item]]

    def keyword_share(self, keywords: list[Keyword], item: np.ndarray) -> np.ndarray:
        """(n,) the share of the keywords' weight exp(score - best) that matches each item."""
        share, total = np.zeros(len(item)), 0.0
        best = max((keyword.score for keyword in keywords), default=0.0)
        for keyword in keywords:
            weight = float(np.exp(keyword.score - best))
            total += weight
            if keyword.text in self.corpus.number:
                matches = self.corpus.matches(self.corpus.number[keyword.text])
                at = np.minimum(np.searchsorted(matches, item), len(matches) - 1)
                share += weight * (matches[at] == item)
        return share / max(total, 1e-12)


@dataclass(frozen=True)
class Scorer:
    """P(fits) = 1 / (1 + exp(-(intercept + weight . (x - mean) / scale)))."""

    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    intercept: float

    def __call__(self, features: np.ndarray) -> np.ndarray:
        z = self.intercept + (features - self.mean) / self.scale @ self.weight
        return 1 / (1 + np.exp(-np.clip(z, -500, 500)))


@dataclass(frozen=True)
class Agreement:
    """How well items fit a theme: agree(theme, keywords, item) -> (n,) in 0..1."""

    scorer: Scorer
    matcher: Matcher

    def __call__(self, theme: Theme, keywords: list[Keyword], item: np.ndarray) -> np.ndarray:
        return self.scorer(self.matcher.features(theme, keywords, item))

    def of_theme(self, theme: Theme) -> Callable[[list[Keyword], np.ndarray], np.ndarray]:
        """The same for one theme and many sets of keywords, as a function of the other two."""
        live = self.matcher.index.live
        columns = np.zeros((len(self.matcher.place), 4))
        columns[live[:, None], (0, 1, 3)] = np.stack(self.matcher.of_theme(theme, live), axis=1)

        def agree(keywords: list[Keyword], item: np.ndarray) -> np.ndarray:
            features = columns[item]
            features[:, 2] = self.matcher.keyword_share(keywords, item)
            return self.scorer(features)

        return agree


def fit_scorer(features: np.ndarray, fits: np.ndarray, rounds: int = 50) -> Scorer:
    """Newton's method with an L2 penalty of .01 a label on the weights. features (n, f), fits (n,)
    bool.

    Raises ValueError where all labels are alike.
    """
    if fits.all() or not fits.any():
        raise ValueError(
            f"fit_scorer: {int(fits.sum())} of {len(fits)} labels fit; want both kinds"
        )
    mean, scale = features.mean(0), features.std(0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    X = np.concatenate([np.ones((len(fits), 1)), (features - mean) / scale], axis=1)
    penalty = RIDGE * np.r_[0.0, np.ones(features.shape[1])]
    at = np.zeros(X.shape[1])
    for _ in range(rounds):
        p = 1 / (1 + np.exp(-X @ at))
        gradient = X.T @ (fits - p) / len(fits) - penalty * at
        curve = (X * (p * (1 - p))[:, None]).T @ X / len(fits) + np.diag(penalty + 1e-9)
        step = np.linalg.solve(curve, gradient)
        at = at + step
        if np.abs(step).max() < 1e-10:
            break
    return Scorer(mean, scale, at[1:], float(at[0]))
