"""Judges: plain models of one shop, and what they say of a candidate. The first step of compose.

    judges = Judges.fit(shop.catalogue, History.of(shop, shop.rows("train", None)))
    people = judges.known.select(users)             users as the judges were fitted to them
    people = judges.people(history)                 anybody else, or the same people later
    item, x = judges.candidates(people, legal, 150) (B, 150) items, (B, 150, F) features

A judge has two sides. What it learnt of items is kept as it is. What it says of a person follows
from that person's history in closed form: the last half step of ALS, a sum of rows of EASE, biases
and a ridge for stars. So a visitor needs no fit, and a user who has come back needs none either.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagellm.data.shop import Catalogue, Rows, Shop
from pagellm.model.als import (
    Space,
    Stars,
    add_pseudo_users,
    als,
    fit_stars,
    item_groups,
    liked_means,
    one_by_one,
    penalty_scale,
    rating_targets,
)
from pagellm.model.plain import (
    Fitted,
    by_factors,
    by_ratings,
    by_weights,
    ease_weights,
    gram_matrix,
    knn_weights,
    sum_rows,
)
from pagellm.pages.topk import largest
from pagellm.stage import randomness

__all__ = [
    "DENSE",
    "History",
    "Judges",
    "People",
    "SETTINGS",
    "contents",
    "legal_items",
    "rows_of",
    "tuned",
    "vars_of",
]

# Of the judges. factors, alpha0, reg: of als; disliked, slope: of levels; facts: target of a
# category, brand or word.
SETTINGS = {
    "levels": {
        "factors": 64,
        "alpha0": 0.03,
        "reg": 0.03,
        "disliked": 0.35,
        "slope": 0.15,
        "facts": 0.5,
    },
    "liked": {"factors": 64, "alpha0": 0.1, "reg": 0.03},
    "chosen": {"factors": 64, "alpha0": 0.1, "reg": 0.03},
    "EASE": {"ridge": 200.0},
    "ItemKNN": {"neighbours": 500, "shrink": 0.0},
}
SIZED_FOR = 1_600  # items of a shop up to which alpha0 of SETTINGS is right (`tuned`)
DAY = 86_400
DENSE = 20_000  # items up to which EASE and ItemKNN (N x N) are fitted
WINDOW = 30  # days around a user's rows in which an item's rows count as of that time


RIDGE = 0.5  # of a user's taste in stars, in ratings (als.fit_stars)


def tuned(plain: dict[str, dict], shop: Shop) -> dict[str, dict]:
    """Settings of the judges: those that validation chose for the plain models of their kind.

    plain  name of a plain model -> its settings. A judge whose model is missing keeps SETTINGS

    Where all that was chosen was liked, the judges `liked` and `chosen` read the same rows. Then
    `chosen` keeps settings of its own, so that it is another opinion. Without ratings `levels` does
    so too.

    Settings of their own follow the size of the shop: alpha0 is the weight of every item that was
    not chosen, so that their sum grows with the catalogue and drowns what was. Above SIZED_FOR
    items alpha0 falls, and the sum stays.
    """
    rated, own = plain.get("ALS+ratings"), plain.get("ALS+facts")
    fewer = min(1.0, SIZED_FOR / max(shop.n_items, 1))
    out: dict[str, dict] = {
        name: s | {"alpha0": s["alpha0"] * fewer} for name, s in SETTINGS.items() if "alpha0" in s
    }
    out |= {n: plain[n] for n in ("EASE", "ItemKNN") if n in plain}
    if rated and shop.rated:
        out["levels"] = {name: rated[name] for name in SETTINGS["levels"]}
    if own:
        out["liked"] = own
        if not shop.positive[shop.rows("train", None)].all():
            out["chosen"] = own
    return SETTINGS | out


@dataclass(frozen=True)
class History:
    """What users chose: rows by user; liked (R,) bool; time (R,) seconds, 0 where unknown."""

    rows: Rows
    liked: np.ndarray
    time: np.ndarray

    @classmethod
    def of(cls, shop: Shop, keep: np.ndarray) -> "History":
        """The shop's rows where keep (R,) bool."""
        rows = by_user(shop.user[keep], shop.item[keep], shop.rating[keep], shop.n_users)
        return cls(rows, shop.positive[keep], shop.time[keep])

    @classmethod
    def joined(cls, parts: Sequence[tuple[np.ndarray, ...]]) -> "History":
        """(items, ratings, liked, time) of each user, one after another."""
        user = np.repeat(np.arange(len(parts)), [len(part[0]) for part in parts])
        kinds = (np.int64, np.float32, bool, np.int64)
        items, ratings, liked, time = (
            np.concatenate([np.zeros(0, kind), *(part[i] for part in parts)]).astype(kind)
            for i, kind in enumerate(kinds)
        )
        return cls(by_user(user, items, ratings, len(parts)), liked, time)

    @property
    def user(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.rows.indptr) - 1), self.rows.counts())

    def one(self, user: int) -> tuple[np.ndarray, ...]:
        """items, ratings, liked, time of one user, as `joined` takes them."""
        span = slice(self.rows.indptr[user], self.rows.indptr[user + 1])
        return self.rows.items[span], self.rows.ratings[span], self.liked[span], self.time[span]

    def part(self, liked: bool) -> Rows:
        """The liked rows alone, or the disliked."""
        keep = self.liked == liked
        return by_user(
            self.user[keep],
            self.rows.items[keep],
            self.rows.ratings[keep],
            len(self.rows.indptr) - 1,
        )


def by_user(user: np.ndarray, item: np.ndarray, rating: np.ndarray, n_users: int) -> Rows:
    """Rows from columns that are sorted by user."""
    indptr = np.zeros(n_users + 1, np.int64)
    np.cumsum(np.bincount(user, minlength=n_users), out=indptr[1:])
    return Rows(indptr, item, rating)


def rows_of(rows: Rows, users: np.ndarray) -> Rows:
    """The rows of these users, in their order."""
    place, _ = rows.flat(users)
    counts = rows.counts()[users]
    within = np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
    at = rows.indptr[users][place] + within
    return by_user(place, rows.items[at], rows.ratings[at], len(users))


def legal_items(seen: Rows, users: np.ndarray, n_items: int) -> np.ndarray:
    """(B, N) bool: the items that are not among the `seen` ones of each user."""
    legal = np.ones((len(users), n_items), bool)
    legal[seen.flat(users)] = False
    return legal


@dataclass(frozen=True)
class People:
    """What the judges know of B people.

    liked, disliked  their rows            factors       name of an ALS judge -> (B, d)
    bias, taste      of stars: (B,) (B, d) profile       mean content of liked, disliked: (B, w)
    paid             (B,) mean log price   about         (B, 4) features of the person alone
    first, last      (B,) day of the first and of the last row, counted as the judges count days
    """

    liked: Rows
    disliked: Rows
    factors: dict[str, Tensor]
    bias: Tensor
    taste: Tensor
    profile: tuple[np.ndarray, np.ndarray]
    paid: np.ndarray
    about: np.ndarray
    first: np.ndarray
    last: np.ndarray

    def __len__(self) -> int:
        return len(self.paid)

    @classmethod
    def joined(cls, parts: Sequence["People"]) -> "People":
        """Several groups of people as one."""
        if len(parts) == 1:
            return parts[0]

        def together(name: str) -> np.ndarray:
            return np.concatenate([getattr(part, name) for part in parts])

        def rows(name: str) -> Rows:
            found = [getattr(part, name) for part in parts]
            indptr = np.concatenate([[0], np.cumsum(np.concatenate([r.counts() for r in found]))])
            return Rows(
                indptr, *(np.concatenate(x) for x in zip(*(r[1:] for r in found), strict=True))
            )

        return cls(
            rows("liked"),
            rows("disliked"),
            {name: torch.cat([p.factors[name] for p in parts]) for name in parts[0].factors},
            torch.cat([part.bias for part in parts]),
            torch.cat([part.taste for part in parts]),
            (
                np.concatenate([part.profile[0] for part in parts]),
                np.concatenate([part.profile[1] for part in parts]),
            ),
            together("paid"),
            together("about"),
            together("first"),
            together("last"),
        )

    def select(self, users: np.ndarray) -> "People":
        """Some of these people, in this order."""
        at = torch.from_numpy(users)
        return People(
            rows_of(self.liked, users),
            rows_of(self.disliked, users),
            {name: x[at] for name, x in self.factors.items()},
            self.bias[at],
            self.taste[at],
            (self.profile[0][users], self.profile[1][users]),
            self.paid[users],
            self.about[users],
            self.first[users],
            self.last[users],
        )


def contents(catalogue: Catalogue, width: int = 64, seed: int = 0) -> np.ndarray:
    """(N, width) float32 unit rows: TF-IDF of title words, categories, brands by a truncated SVD;
    0 where unknown."""
    facts, n = item_groups(catalogue), len(catalogue)
    if not facts:
        return np.zeros((n, 1), np.float32)
    size = np.array([len(items) for items in facts])
    weight = np.repeat(np.log(n / size), size)
    item, word = np.concatenate(facts), np.repeat(np.arange(len(facts)), size)
    length = np.sqrt(np.bincount(item, weight**2, n))
    value = torch.from_numpy(weight / length[item]).float()
    matrix = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([item, word])), value, (n, len(facts)), check_invariants=True
    ).coalesce()
    torch.manual_seed(int(randomness.rng(seed, "outcome", "contents").integers(2**31)))
    u, s, _ = torch.svd_lowrank(matrix, q=min(width, n, len(facts)), niter=3)
    rows = (u * s).numpy()
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 1e-6)


def targets_of(history: History, s: dict, means: tuple[float, float] | None = None) -> np.ndarray:
    """Targets of the judge `levels` for the rows of a history. s: its settings; means: as in als"""
    return rating_targets(history.rows.ratings, history.liked, s["disliked"], s["slope"], means)


def factors(
    rows: Rows,
    value: np.ndarray | None,
    facts: list[np.ndarray],
    n_items: int,
    settings: dict,
    seed: int,
) -> tuple[Tensor, Space]:
    """X (U, d) and the space of Y (N, d): als over `rows` and, as users more, the facts."""
    both = add_pseudo_users(rows, facts)
    if value is not None:
        more = len(both.items) - len(rows.items)
        value = np.concatenate([value, np.full(more, settings["facts"], np.float32)])
    width, alpha0, reg = min(settings["factors"], n_items), settings["alpha0"], settings["reg"]
    nu, n_users = settings.get("nu", 1.0), len(both.indptr) - 1
    X, Y = als(both, n_users, n_items, width, alpha0, reg, nu, seed, target=value)
    penalty = penalty_scale(both, n_users, n_items, alpha0, reg, nu)
    return X[: len(rows.indptr) - 1].clone(), Space(Y, alpha0, penalty, nu)


class Judges:
    """Plain models of one shop. What they say is `candidates`.

    Some rank the whole catalogue: `levels`, ALS over all that was chosen, with targets that tell
    how much it was liked; `liked` and `chosen`, plain ALS over the liked rows and over all; EASE
    and ItemKNN over the liked rows. Others know what stars to expect, how popular and how dear
    an item is, when it sold, and what it shares with a person's history.
    """

    def __init__(self, catalogue: Catalogue, state: dict, history: History):
        """state: what `state` gives; history: the rows that the judges were fitted to."""
        self.catalogue, self.history, self.fitted = catalogue, history, state
        self.settings, self.means = state["settings"], tuple(state["means"])
        self.spaces = {
            name: Space(part["items"], part["alpha0"], part["penalty"], part["nu"])
            for name, part in state["spaces"].items()
        }
        self.weights, self.content = state["weights"], state["content"].numpy()
        self.stars = Stars(**state["stars"])
        self.rating = Space(self.stars.place, 0.0, RIDGE, 0.0)
        price = np.log(np.maximum(catalogue.price.astype(np.float64), 0.01))
        usual = 0.0 if np.isnan(price).all() else np.nanmedian(price)
        self.price, n = np.where(np.isnan(price), usual, price), len(catalogue)
        many, good = (np.bincount(r.items, minlength=n) for r in (history.rows, history.part(True)))
        self.of_item = np.stack(
            [
                np.log1p(good),
                np.log1p(many),
                (good + 2) / (many + 3),
                self.stars.item.numpy(),
                self.price,
            ],
            1,
        )
        self.count_days(history, n)
        self._known: People | None = None

    @classmethod
    def fit(
        cls,
        catalogue: Catalogue,
        history: History,
        settings: dict | None = None,
        seed: int = 0,
        content: np.ndarray | None = None,
    ) -> "Judges":
        """Fit every judge to `history`. content: of `contents`, where it is at hand."""
        s = SETTINGS | (settings or {})
        n, rows, facts = len(catalogue), history.rows, item_groups(catalogue)
        liked, value = history.part(True), targets_of(history, s["levels"])
        fits = (("levels", rows, value), ("liked", liked, None), ("chosen", rows, None))
        found = {
            name: factors(which, target, facts, n, s[name], seed) for name, which, target in fits
        }
        weights = {}
        if n <= DENSE:
            gram, near = gram_matrix(liked, n), s["ItemKNN"]
            weights = {
                "EASE": ease_weights(gram, s["EASE"]["ridge"]),
                "ItemKNN": knn_weights(gram, min(near["neighbours"], n), near["shrink"]),
            }
        content = contents(catalogue) if content is None else content
        state = {
            "settings": s,
            "means": liked_means(rows.ratings, history.liked),
            "spaces": {name: vars_of(space) for name, (_, space) in found.items()},
            "users": {name: X for name, (X, _) in found.items()},
            "weights": weights,
            "stars": fit_stars(rows, found["levels"][1].items, reg=RIDGE)._asdict(),
            "content": torch.from_numpy(content),
        }
        return cls(catalogue, state, history)

    def state(self) -> dict:
        """What the constructor takes: tensors and plain values."""
        return self.fitted

    def plain(self, name: str, settings: dict) -> Fitted | None:
        """A plain model (plain.fit) of these settings and of the judges' own rows, to the last bit.

        None where no judge is that model: it has to be fitted.
        """
        judge = {"ALS+facts": "liked", "ALS+ratings": "levels"}.get(name, name)
        mine = self.settings.get(judge)
        if mine is None or name not in ("EASE", "ALS+facts", "ALS+ratings"):
            return None
        both = {"nu": 1.0, **mine}
        if any(both.get(key) != settings[key] for key in settings if key != "stars"):
            return None
        if name == "EASE":
            found = self.weights.get("EASE")
            return None if found is None else by_weights(found, self.history.part(True))
        if settings["factors"] > len(self.catalogue):
            return None
        X, Y = self.fitted["users"][judge], self.spaces[judge].items
        if name == "ALS+facts":
            return by_factors(X, Y)
        return by_ratings(X, Y, self.stars, settings["stars"])

    def count_days(self, history: History, n: int) -> None:
        """Count days from the first row; sort the days of every item's rows."""
        day = history.time // DAY
        self.day0 = int(day.min(initial=np.iinfo(np.int64).max)) if len(day) else 0
        day = day - self.day0
        self.today = int(day.max(initial=0))
        self.now = int(history.time.max(initial=0))
        self.span = self.today + 2 * WINDOW + 2
        self.days = np.sort(history.rows.items * self.span + day + WINDOW)
        at = np.searchsorted(self.days, np.arange(n) * self.span)
        at = np.minimum(at, max(len(self.days) - 1, 0))
        self.born = (self.days[at] - WINDOW) % self.span if len(self.days) else np.zeros(n)

    @property
    def known(self) -> People:
        """Everybody, as the judges were fitted to them."""
        if self._known is None:
            self._known = self.about(self.history, self.fitted["users"], self.stars[1:4:2])
        return self._known

    def people(self, history: History) -> People:
        """Other people, or the same ones later: what the judges make of their rows.

        Items stay as they were fitted. Nobody's numbers depend on who else is asked about. A day
        after the last one of the judges' rows counts as that last day.
        """
        value = targets_of(history, self.settings["levels"], self.means)
        liked = history.part(True)
        placed = {
            "levels": self.spaces["levels"].place(history.rows, value),
            "liked": self.spaces["liked"].place(liked),
            "chosen": self.spaces["chosen"].place(history.rows),
        }
        return self.about(history, placed, self.stars.of(history.rows, self.rating))

    def about(
        self, history: History, placed: dict[str, Tensor], stars: tuple[Tensor, Tensor]
    ) -> People:
        """People from their rows, their ALS factors, and their bias and taste in stars."""
        rows, liked, disliked = history.rows, history.part(True), history.part(False)
        paid = mean_rows(self.price[:, None], rows)[:, 0]
        share = (liked.counts() + 1) / (rows.counts() + 2)
        day = np.clip(history.time // DAY - self.day0, 0, self.today)
        first, last = (np.full(len(rows.counts()), float(self.today)) for _ in range(2))
        known = rows.counts() > 0
        start = rows.indptr[:-1][known]
        if known.any():
            first[known] = np.minimum.reduceat(day, start)
            last[known] = np.maximum.reduceat(day, start)
        about = np.stack([np.log1p(rows.counts()), share, stars[0].numpy(), paid], 1)
        profile = mean_rows(self.content, liked), mean_rows(self.content, disliked)
        return People(liked, disliked, placed, *stars, profile, paid, about, first, last)

    def scores(self, people: People) -> dict[str, np.ndarray]:
        """name -> (B, N) float32 of the judges that rank the whole catalogue."""
        out = {
            name: one_by_one(space.items, people.factors[name]).numpy()
            for name, space in self.spaces.items()
        }
        return out | {
            name: sum_rows(W, people.liked, np.arange(len(people))).numpy()
            for name, W in self.weights.items()
        }

    def candidates(
        self, people: People, legal: np.ndarray, depth: int, more: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The pool of some people, and what the judges say of it.

        The pool takes the best of `levels`, EASE and `liked` by turns. A judge that knows nothing
        of a person names the most liked items.

        legal    (B, N) bool: what may be in the pool
        more     (B, m) items, best first, -1 past the end: a policy's, for instance; by turns too
        returns  item (B, depth) int64, -1 past the end; features (B, depth, F) float32
        """
        scores = self.scores(people)
        lists = [] if more is None else [more]
        for name in ("levels", "EASE", "liked"):
            if name in scores:
                blank = ~scores[name].any(1, keepdims=True)
                free = np.where(blank, self.of_item[:, 0].astype(np.float32), scores[name])
                free = np.where(legal, free, np.float32(-np.inf))
                lists.append(largest(free, min(depth, free.shape[1]))[0])
        item = by_turns(lists, depth)
        return item, self.features(people, item, scores)

    def features(
        self, people: People, item: np.ndarray, scores: dict[str, np.ndarray]
    ) -> np.ndarray:
        """(B, M, F) float32; rows of item -1 hold what is said of item 0."""
        at, B = np.maximum(item, 0), np.arange(len(people))[:, None]
        out = []
        for score in scores.values():
            mine = score[B, at]
            mean, std = score.mean(1, keepdims=True), score.std(1, keepdims=True) + 1e-9
            above = np.log1p((-mine).argsort(1).argsort(1))
            out += [mine, (mine - mean) / std, above]
        taste = np.einsum("bd,bmd->bm", people.taste.numpy(), self.stars.place.numpy()[at])
        out += [taste, taste + self.of_item[at, 3]]
        out += [np.einsum("bd,bmd->bm", p, self.content[at]) for p in people.profile]
        for name in (self.catalogue.leaf_id, self.catalogue.brand_id):
            for part in (people.liked, people.disliked):
                count = counts(name, part)
                held = np.where(name[at] >= 0, count[B, name[at]], 0.0)
                out += [np.log1p(held), held / np.maximum(count[:, :-1].sum(1, keepdims=True), 1)]
        out += [np.abs(self.price[at] - people.paid[:, None])]
        out += list(np.moveaxis(self.of_item[at], 2, 0))
        out += [np.broadcast_to(x[:, None], at.shape) for x in people.about.T]
        first, last = people.first[:, None], people.last[:, None]
        around, before = self.sold(at, first, last + 1), self.sold(at, first * 0, last + 1)
        out += [
            np.log1p(around),
            np.log1p(around) - np.log(last - first + 1),
            np.log1p(before),
            np.maximum(self.born[at] - last, 0) / 365,
        ]
        return np.stack(out, 2).astype(np.float32)

    def score_in(self, x: np.ndarray, name: str) -> np.ndarray:
        """(..., ) the score of one of the judges of `self.spaces`, read from features (..., F)."""
        return x[..., 3 * list(self.spaces).index(name)]

    def sold(self, item: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """(B, M) rows of every item from WINDOW days before `start` to WINDOW days after `end`."""
        base = item * self.span
        low = np.searchsorted(self.days, base + start)
        return np.searchsorted(self.days, base + np.minimum(end + 2 * WINDOW, self.span - 1)) - low


def vars_of(space: Space) -> dict:
    """The fields of a space as the state keeps them."""
    return {name: getattr(space, name) for name in ("items", "alpha0", "penalty", "nu")}


def mean_rows(table: np.ndarray, rows: Rows) -> np.ndarray:
    """(U, d) float64: the mean of the rows of table (N, d) that each user has; 0 without any."""
    out = np.zeros((len(rows.indptr) - 1, table.shape[1]))
    known = rows.counts() > 0
    if known.any():
        out[known] = np.add.reduceat(table[rows.items], rows.indptr[:-1][known], axis=0)
    return out / np.maximum(rows.counts(), 1)[:, None]


def counts(name: np.ndarray, rows: Rows) -> np.ndarray:
    """(B, names + 1) how many items of each name these users have; last, those without a name."""
    item, B, width = rows.items, len(rows.indptr) - 1, int(name.max(initial=-1)) + 2
    code = np.repeat(np.arange(B), rows.counts()) * width
    code = code + np.where(name[item] >= 0, name[item], width - 1)
    return np.bincount(code, minlength=B * width).reshape(B, width)


def by_turns(lists: list[np.ndarray], depth: int) -> np.ndarray:
    """(B, depth) the first different items, read off the lists (B, m) by turns; -1 past the end."""
    width = max(x.shape[1] for x in lists)
    padded = [np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=-1) for x in lists]
    line = np.stack(padded, 2).reshape(len(lists[0]), -1)
    order = np.argsort(line, axis=1, kind="stable")
    sorted_line = np.take_along_axis(line, order, 1)
    again = np.zeros(line.shape, bool)
    np.put_along_axis(again, order[:, 1:], sorted_line[:, 1:] == sorted_line[:, :-1], 1)
    keep = ~again & (line >= 0)
    first = np.argsort(~keep, axis=1, kind="stable")[:, :depth]
    return np.where(np.take_along_axis(keep, first, 1), np.take_along_axis(line, first, 1), -1)
