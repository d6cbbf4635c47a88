"""What a user will pick: the chance that a candidate is among what somebody chooses and likes next.

    judges = Judges(shop.catalogue, History.of(shop, shop.rows("train", None)))      plain models
    outcome = learn(shop)                               a small network over what such models say
    item, x = judges.candidates(users, seen, 150)       (B, 150) items, (B, 150, F) features
    p = outcome(x)                                      (B, 150) chances

The network must not learn from answers that its inputs have seen. So each fold hides a share of
everybody's train rows and fits the judges to the others; the network learns which candidates were
among the hidden ones. Candidates come from one pool in training and in use, whatever the answers
are: a hidden item outside the pool is left out.

Source of the idea: stacking (Wolpert, Neural Networks 1992), cross-fitted. Seconds for 2,000 users
and 1,000 items.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pagellm.data.shop import Catalogue, Rows, Shop
from pagellm.model.als import Stars, add_pseudo_users, als, fit_stars, item_groups, rating_targets
from pagellm.model.plain import ease_weights, gram_matrix, knn_weights, sum_rows
from pagellm.pages.topk import largest
from pagellm.stage import randomness

__all__ = [
    "SETTINGS",
    "Calibration",
    "History",
    "Judges",
    "Outcome",
    "contents",
    "fit_network",
    "fold_rows",
    "hide",
    "learn",
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
DAY = 86_400
DENSE = 20_000  # items up to which EASE and ItemKNN (N x N) are fitted
WINDOW = 30  # days around a user's rows in which an item's rows count as of that time


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

    @property
    def user(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.rows.indptr) - 1), self.rows.counts())

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


def hide(shop: Shop, folds: int, share: float, seed: int) -> list[np.ndarray]:
    """For each fold (R,) bool: the train rows that it hides, `share` of every user's, liked or not.

    No row is hidden twice. Raises ValueError where folds * share is above 1.
    """
    if not 0 < folds * share <= 1 + 1e-9:
        raise ValueError(f"hide: {folds} folds of {share} each: want no more than all rows in all")
    train = np.flatnonzero(shop.rows("train", None))
    drawn = randomness.rng(seed, "outcome", "folds").random(len(train))
    train = train[np.lexsort((drawn, shop.user[train]))]
    user = shop.user[train]
    count = np.bincount(user, minlength=shop.n_users)
    first = np.cumsum(count) - count
    place = (np.arange(len(train)) - first[user] + 0.5) / count[user]
    out = []
    for fold in range(folds):
        hidden = np.zeros(len(shop.user), bool)
        hidden[train[(place >= fold * share) & (place < (fold + 1) * share)]] = True
        out.append(hidden)
    return out


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


def factors(
    rows: Rows,
    value: np.ndarray | None,
    facts: list[np.ndarray],
    n_items: int,
    settings: dict,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """X (U, d), Y (N, d) of als over `rows` and, as users more, the facts of the catalogue."""
    both = add_pseudo_users(rows, facts)
    if value is not None:
        more = len(both.items) - len(rows.items)
        value = np.concatenate([value, np.full(more, settings["facts"], np.float32)])
    width, alpha0, reg = min(settings["factors"], n_items), settings["alpha0"], settings["reg"]
    X, Y = als(both, len(both.indptr) - 1, n_items, width, alpha0, reg, 1.0, seed, target=value)
    return X[: len(rows.indptr) - 1], Y


class Judges:
    """Plain models of one shop, fitted to one history. What they say is `candidates`.

    Some rank the whole catalogue: `levels`, ALS over all that was chosen, with targets that tell
    how much it was liked; `liked` and `chosen`, plain ALS over the liked rows and over all; EASE
    and ItemKNN over the liked rows. Others know what stars to expect, how popular and how dear
    an item is, when it sold, and what it shares with a user's history.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        history: History,
        settings: dict | None = None,
        seed: int = 0,
        content: np.ndarray | None = None,
    ):
        """Fit every judge to `history`. content: of `contents`, where it is at hand."""
        s = SETTINGS | (settings or {})
        n, rows, facts = len(catalogue), history.rows, item_groups(catalogue)
        liked, disliked = history.part(True), history.part(False)
        value = rating_targets(
            rows.ratings, history.liked, s["levels"]["disliked"], s["levels"]["slope"]
        )
        self.catalogue, self.history = catalogue, history
        self.liked, self.disliked = liked, disliked
        fits = (("levels", rows, value), ("liked", liked, None), ("chosen", rows, None))
        self.factors = {
            name: factors(which, target, facts, n, s[name], seed) for name, which, target in fits
        }
        self.weights = {}
        if n <= DENSE:
            gram, near = gram_matrix(liked, n), s["ItemKNN"]
            self.weights = {
                "EASE": ease_weights(gram, s["EASE"]["ridge"]),
                "ItemKNN": knn_weights(gram, min(near["neighbours"], n), near["shrink"]),
            }
        self.stars: Stars = fit_stars(rows, self.factors["levels"][1])
        self.content = contents(catalogue) if content is None else content
        self.profile = [mean_rows(self.content, part) for part in (self.liked, self.disliked)]
        price = np.log(np.maximum(catalogue.price.astype(np.float64), 0.01))
        usual = 0.0 if np.isnan(price).all() else np.nanmedian(price)
        self.price = np.where(np.isnan(price), usual, price)
        self.paid = mean_rows(self.price[:, None], rows)[:, 0]
        many, good = (np.bincount(r.items, minlength=n) for r in (rows, liked))
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
        share = (liked.counts() + 1) / (rows.counts() + 2)
        self.of_user = np.stack(
            [np.log1p(rows.counts()), share, self.stars.user.numpy(), self.paid], 1
        )
        self.when(history, n)

    def when(self, history: History, n: int) -> None:
        """Days of every item's rows, sorted, and the days of every user's first and last row."""
        day = history.time // DAY
        day = day - day.min(initial=0)
        self.span = int(day.max(initial=0)) + 2 * WINDOW + 2
        self.days = np.sort(history.rows.items * self.span + day + WINDOW)
        self.first, self.last = (np.zeros(len(history.rows.indptr) - 1) for _ in range(2))
        known = history.rows.counts() > 0
        start = history.rows.indptr[:-1][known]
        if known.any():
            self.first[known] = np.minimum.reduceat(day, start)
            self.last[known] = np.maximum.reduceat(day, start)
        at = np.searchsorted(self.days, np.arange(n) * self.span)
        at = np.minimum(at, max(len(self.days) - 1, 0))
        self.born = (self.days[at] - WINDOW) % self.span if len(self.days) else np.zeros(n)

    def scores(self, users: np.ndarray) -> dict[str, np.ndarray]:
        """name -> (B, N) float32 of the judges that rank the whole catalogue."""
        at = torch.from_numpy(users)
        out = {name: (X[at] @ Y.T).numpy() for name, (X, Y) in self.factors.items()}
        return out | {
            name: sum_rows(W, self.liked, users).numpy() for name, W in self.weights.items()
        }

    def candidates(
        self, users: np.ndarray, seen: Rows, depth: int, more: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The pool of some users, and what the judges say of it.

        The pool takes the best of `levels`, EASE and `liked` by turns, without those in `seen`.
        more     (B, m) items, best first, -1 past the end: a policy's, for instance; by turns too
        returns  item (B, depth) int64, -1 past the end; features (B, depth, F) float32
        """
        scores = self.scores(users)
        row, gone = seen.flat(users)
        lists = [] if more is None else [more]
        for name in ("levels", "EASE", "liked"):
            if name in scores:
                free = scores[name].copy()
                free[row, gone] = -np.inf
                lists.append(largest(free, min(depth, free.shape[1]))[0])
        item = by_turns(lists, depth)
        return item, self.features(users, item, scores)

    def features(
        self, users: np.ndarray, item: np.ndarray, scores: dict[str, np.ndarray]
    ) -> np.ndarray:
        """(B, M, F) float32; rows of item -1 hold what is said of item 0."""
        at, B = np.maximum(item, 0), np.arange(len(users))[:, None]
        out = []
        for score in scores.values():
            mine = score[B, at]
            mean, std = score.mean(1, keepdims=True), score.std(1, keepdims=True) + 1e-9
            above = np.log1p((-mine).argsort(1).argsort(1))
            out += [mine, (mine - mean) / std, above]
        taste = torch.einsum("bd,bmd->bm", self.stars.taste[users], self.stars.place[at]).numpy()
        out += [taste, taste + self.of_item[at, 3]]
        out += [np.einsum("bd,bmd->bm", p[users], self.content[at]) for p in self.profile]
        for name in (self.catalogue.leaf_id, self.catalogue.brand_id):
            for part in (self.liked, self.disliked):
                count = counts(name, part, users)
                held = np.where(name[at] >= 0, count[B, name[at]], 0.0)
                out += [np.log1p(held), held / np.maximum(count[:, :-1].sum(1, keepdims=True), 1)]
        out += [np.abs(self.price[at] - self.paid[users][:, None])]
        out += list(np.moveaxis(self.of_item[at], 2, 0))
        out += [np.broadcast_to(x[:, None], at.shape) for x in self.of_user[users].T]
        first, last = self.first[users][:, None], self.last[users][:, None]
        around, before = self.sold(at, first, last + 1), self.sold(at, first * 0, last + 1)
        out += [
            np.log1p(around),
            np.log1p(around) - np.log(last - first + 1),
            np.log1p(before),
            np.maximum(self.born[at] - last, 0) / 365,
        ]
        return np.stack(out, 2).astype(np.float32)

    def sold(self, item: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """(B, M) rows of every item from WINDOW days before `start` to WINDOW days behind `end`."""
        base = item * self.span
        low = np.searchsorted(self.days, base + start)
        return np.searchsorted(self.days, base + np.minimum(end + 2 * WINDOW, self.span - 1)) - low


def mean_rows(table: np.ndarray, rows: Rows) -> np.ndarray:
    """(U, d) float64: the mean of the rows of table (N, d) that each user has; 0 without any."""
    out = np.zeros((len(rows.indptr) - 1, table.shape[1]))
    known = rows.counts() > 0
    if known.any():
        out[known] = np.add.reduceat(table[rows.items], rows.indptr[:-1][known], axis=0)
    return out / np.maximum(rows.counts(), 1)[:, None]


def counts(name: np.ndarray, rows: Rows, users: np.ndarray) -> np.ndarray:
    """(B, names + 1) how many items of each name these users have; last, those without a name."""
    row, item = rows.flat(users)
    width = int(name.max(initial=-1)) + 2
    code = row * width + np.where(name[item] >= 0, name[item], width - 1)
    return np.bincount(code, minlength=len(users) * width).reshape(len(users), width)


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


class Network(nn.Module):
    """Logit of a pick from F features: a linear part and two hidden layers beside it."""

    mean: Tensor  # (F,)
    std: Tensor  # (F,)

    def __init__(self, mean: Tensor, std: Tensor, width: int = 32):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.line = nn.Linear(len(mean), 1)
        self.body = nn.Sequential(
            nn.Linear(len(mean), width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, 1),
        )
        nn.init.zeros_(self.line.weight)

    def forward(self, x: Tensor) -> Tensor:
        z = ((x - self.mean) / self.std).clamp(-5.0, 5.0)
        return (self.line(z) + self.body(z))[..., 0]


class Outcome:
    """Chances of picks from features; the mean of some networks that began differently."""

    def __init__(self, networks: list[Network]):
        self.networks = networks

    @torch.no_grad()
    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(..., F) features -> (...) chance that the candidate is among the user's hidden picks."""
        z = torch.from_numpy(x)
        return torch.stack([torch.sigmoid(network(z)) for network in self.networks]).mean(0).numpy()


def fit_network(
    x: np.ndarray,
    picked: np.ndarray,
    seed: int,
    epochs: int = 3,
    batch: int = 1024,
    lr: float = 3e-3,
    width: int = 32,
    weight_decay: float = 0.01,
) -> Network:
    """x (R, F) float32, picked (R,) bool -> a network of small log loss on them.

    AdamW; the rate rises for 50 steps and then falls to 0 in a line.
    """
    torch.manual_seed(int(randomness.rng(seed, "outcome", "network").integers(2**31)))
    z, y = torch.from_numpy(x), torch.from_numpy(picked.astype(np.float32))
    network = Network(z.mean(0), z.std(0) + 1e-6, width)
    rate = float(y.mean().clamp(1e-6, 1 - 1e-6))
    nn.init.constant_(network.line.bias, float(np.log(rate / (1 - rate))))
    opt = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay)
    batch = min(batch, len(y))
    steps, step = epochs * (len(y) // batch), 0
    for _ in range(epochs):
        for at in torch.randperm(len(y))[: len(y) // batch * batch].split(batch):
            for group in opt.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / 50) * (1 - step / steps)
            loss = F.binary_cross_entropy_with_logits(network(z[at]), y[at])
            opt.zero_grad()
            loss.backward()
            opt.step()
            step += 1
    return network.eval()


def learn(
    shop: Shop,
    settings: dict | None = None,
    folds: int = 2,
    share: float = 0.2,
    depth: int = 150,
    networks: int = 1,
    seed: int = 0,
    users: int = 0,
    block: int = 256,
) -> Outcome:
    """Fit the judges to each fold's visible rows, and the networks to what they say of the hidden.

    users  of each fold, drawn anew; 0: all. 5,000 are plenty for some 30 features
    """
    x, y = fold_rows(shop, settings, folds, share, depth, seed, users, block)
    return Outcome([fit_network(x, y, seed + i) for i in range(networks)])


def fold_rows(
    shop: Shop,
    settings: dict | None,
    folds: int,
    share: float,
    depth: int,
    seed: int,
    users: int,
    block: int = 256,
) -> tuple[np.ndarray, np.ndarray]:
    """What `learn` learns from: features (R, F) of candidates; which were hidden and liked (R,).

    Arguments as in `learn`. The judges of a fold have not seen the rows that it hides.
    """
    xs, ys, content = [], [], contents(shop.catalogue)
    train = shop.rows("train", None)
    for fold, hidden in enumerate(hide(shop, folds, share, seed)):
        history = History.of(shop, train & ~hidden)
        judges = Judges(shop.catalogue, history, settings, seed, content)
        answer = hidden & shop.positive
        code = np.sort(shop.user[answer] * shop.n_items + shop.item[answer])
        asked = np.unique(shop.user[answer])
        if 0 < users < len(asked):
            asked = np.sort(
                randomness.rng(seed, "outcome", "users", fold).permutation(asked)[:users]
            )
        for some in (asked[at : at + block] for at in range(0, len(asked), block)):
            item, x = judges.candidates(some, history.rows, depth)
            there = item >= 0
            xs.append(x[there])
            ys.append(np.isin((some[:, None] * shop.n_items + item)[there], code))
    return np.concatenate(xs), np.concatenate(ys)


@dataclass
class Calibration:
    """Chances on the scale of a split: sigmoid(a + b logit p + c other), a logistic regression.

    other  a second opinion, in standard deviations of a user's candidates: a policy's
           log-probability, for instance. c says what it knows that the outcome does not.
    """

    a: float = 0.0
    b: float = 1.0
    c: float = 0.0

    @classmethod
    def fit(
        cls, p: np.ndarray, other: np.ndarray, picked: np.ndarray, ridge: float = 1.0
    ) -> "Calibration":
        """p, other, picked (R,). Newton's method; `ridge` draws b to 1 and c to 0."""
        x = np.stack([np.ones(len(p)), logit(p), other], 1)
        start, prior = np.array([0.0, 1.0, 0.0]), np.diag([0.0, ridge, ridge])

        def loss(w: np.ndarray) -> float:
            z, away = x @ w, w - start
            return float(np.logaddexp(0.0, z).sum() - z[picked].sum() + away @ prior @ away / 2)

        w = start
        for _ in range(25):
            q = 1 / (1 + np.exp(-np.clip(x @ w, -500, 500)))
            gradient = x.T @ (picked - q) - prior @ (w - start)
            curve = (x * (q * (1 - q))[:, None]).T @ x + prior + 1e-9 * np.eye(3)
            step, now = np.linalg.solve(curve, gradient), loss(w)
            # A whole step may overshoot where chances begin far off: it is halved until it gains.
            while np.abs(step).max() > 1e-9 and loss(w + step) > now:
                step = step / 2
            w = w + step
            if np.abs(step).max() < 1e-9:
                break
        return cls(*map(float, w))

    def __call__(self, p: np.ndarray, other: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(self.a + self.b * logit(p) + self.c * other)))


def logit(p: np.ndarray) -> np.ndarray:
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return np.log(p / (1 - p))
