"""What a user will pick: the chance that a candidate is among what somebody chooses and likes next.

    outcome = learn(shop)                               a small network over what judges say
    item, x = judges.candidates(people, legal, 150)     (B, 150) items, (B, 150, F) features
    p = outcome(x)                                      (B, 150) chances

The network must not learn from answers that its inputs have seen. So each fold hides a share of
everybody's train rows and fits the judges (judges.py) to the others; the network learns which
candidates were among the hidden ones. Candidates come from one pool in training and in use,
whatever the answers are: a hidden item outside the pool is left out.

Source of the idea: stacking (Wolpert, Neural Networks 1992), cross-fitted. Seconds for 2,000 users
and 1,000 items.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pagellm.data.shop import Shop
from pagellm.model.judges import History, Judges, contents, legal_items
from pagellm.stage import randomness

KNOTS = (0.3, 0.7)  # quantiles of candidates at which a calibration bends

__all__ = [
    "Calibration",
    "Network",
    "Outcome",
    "fit_network",
    "fold_rows",
    "hide",
    "learn",
]


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
        return self.logit(((x - self.mean) / self.std).clamp(-5.0, 5.0))

    def logit(self, z: Tensor) -> Tensor:
        """Of features that are standardised already."""
        return (self.line(z) + self.body(z))[..., 0]


class AdamW:
    """AdamW of few small weights, in one vector: to the last bit what torch.optim.AdamW does.

    That one calls nine operations for each tensor, and imports torch's compiler for 1.8 s.
    """

    def __init__(self, network: nn.Module, weight_decay: float):
        self.of, self.decay, self.steps = list(network.parameters()), weight_decay, 0
        self.all = torch.cat([p.detach().reshape(-1) for p in self.of])
        for p, part in zip(self.of, self.all.split([p.numel() for p in self.of]), strict=True):
            p.data = part.view_as(p)
        self.mean, self.square = torch.zeros_like(self.all), torch.zeros_like(self.all)

    def step(self, loss: Tensor, lr: float) -> None:
        """One step down the gradient of `loss`."""
        g = torch.cat([x.reshape(-1) for x in torch.autograd.grad(loss, self.of)])
        self.steps += 1
        first, second = 1 - 0.9**self.steps, (1 - 0.999**self.steps) ** 0.5
        self.all.mul_(1 - lr * self.decay)
        self.mean.lerp_(g, 1 - 0.9)
        self.square.mul_(0.999).addcmul_(g, g, value=1 - 0.999)
        self.all.addcdiv_(self.mean, (self.square.sqrt() / second).add_(1e-8), value=-(lr / first))

    def release(self) -> None:
        """Give every weight memory of its own again."""
        for p in self.of:
            p.data = p.data.clone()


class Outcome:
    """Chances of picks from features; the mean of some networks that began differently."""

    def __init__(self, networks: list[Network]):
        self.networks = networks

    @torch.no_grad()
    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(..., F) features -> (...) chance that the candidate is among the user's hidden picks.

        Each user's candidates go through alone: the same user has the same chances in any batch.
        """
        rows = torch.from_numpy(x).view(-1, *x.shape[-2:])
        out = [
            torch.stack([torch.sigmoid(network(z)) for network in self.networks]).mean(0)
            for z in rows
        ]
        return torch.stack(out).view(x.shape[:-1]).numpy() if out else np.zeros(x.shape[:-1])


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
    z = (z - network.mean).div_(network.std).clamp_(-5.0, 5.0)
    rate = float(y.mean().clamp(1e-6, 1 - 1e-6))
    nn.init.constant_(network.line.bias, float(np.log(rate / (1 - rate))))
    opt = AdamW(network, weight_decay)
    batch = min(batch, len(y))
    steps, step = epochs * (len(y) // batch), 0
    for _ in range(epochs):
        for at in torch.randperm(len(y))[: len(y) // batch * batch].split(batch):
            rate = lr * min(1.0, (step + 1) / 50) * (1 - step / steps)
            loss = F.binary_cross_entropy_with_logits(network.logit(z[at]), y[at])
            opt.step(loss, rate)
            step += 1
    opt.release()
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
    content: np.ndarray | None = None,
) -> Outcome:
    """Fit the judges to each fold's visible rows, and the networks to what they say of the hidden.

    users    of each fold, drawn anew; 0: all. 5,000 are plenty for some 30 features
    content  of judges.contents, where it is at hand
    """
    x, y, _ = fold_rows(shop, settings, folds, share, depth, seed, users, block, content)
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
    content: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `learn` learns from: features (R, F) of candidates; which were hidden and liked (R,).

    Arguments as in `learn`. The judges of a fold have not seen the rows that it hides.
    returns  third, how many of the rows belong to each user, one user after the other
    """
    xs, ys, sizes = [], [], []
    content = contents(shop.catalogue) if content is None else content
    train = shop.rows("train", None)
    for fold, hidden in enumerate(hide(shop, folds, share, seed)):
        history = History.of(shop, train & ~hidden)
        judges = Judges.fit(shop.catalogue, history, settings, seed, content)
        answer = hidden & shop.positive
        code = np.sort(shop.user[answer] * shop.n_items + shop.item[answer])
        asked = np.unique(shop.user[answer])
        if 0 < users < len(asked):
            asked = np.sort(
                randomness.rng(seed, "outcome", "users", fold).permutation(asked)[:users]
            )
        for some in (asked[at : at + block] for at in range(0, len(asked), block)):
            legal = legal_items(history.rows, some, shop.n_items)
            item, x = judges.candidates(judges.known.select(some), legal, depth)
            there = item >= 0
            xs.append(x[there])
            sizes.append(there.sum(1))
            ys.append(np.isin((some[:, None] * shop.n_items + item)[there], code))
    return np.concatenate(xs), np.concatenate(ys), np.concatenate(sizes)


@dataclass
class Calibration:
    """Chances on the scale of a split: sigmoid(bent(a + b logit p + c @ others)).

    others  (..., len(c)) further opinions, each in standard deviations of a user's candidates: a
            policy's log-probability, for instance. c says what they know that the outcome does not
    line    above the last knot, bent(z) = line[0] + line[1] z
    knots   below each of them the line has another slope, so that rare picks come out right too
    bends   what the slope gains below each knot. It stays above 0: the order of chances is that
            of the sum
    """

    a: float = 0.0
    b: float = 1.0
    c: tuple[float, ...] = ()
    line: tuple[float, ...] = (0.0, 1.0)
    knots: tuple[float, ...] = ()
    bends: tuple[float, ...] = ()

    @classmethod
    def fit(
        cls, p: np.ndarray, others: np.ndarray, picked: np.ndarray, ridge: float = 1.0
    ) -> "Calibration":
        """p, picked (R,), others (R, n): two logistic regressions, of the sum and of its bends.

        `ridge` draws both to chances that stay as they are. Knots are the KNOTS quantiles.
        """
        x = np.concatenate([np.ones((len(p), 1)), logit(p)[:, None], others], 1)
        start = np.eye(x.shape[1])[1]
        a, b, *c = logistic(x, picked, start, ridge)
        out = cls(float(a), float(b), tuple(map(float, c)))
        z = out.sum(p, others)
        knots = tuple(map(float, np.unique(np.quantile(z, KNOTS)))) if len(z) else ()
        bent = basis(z, knots)
        w = logistic(bent, picked, np.eye(bent.shape[1])[1], ridge)
        if (w[1] + np.cumsum(np.append(0.0, w[:1:-1])) <= 0).any():
            return out
        line, bends = tuple(map(float, w[:2])), tuple(map(float, w[2:]))
        return cls(out.a, out.b, out.c, line, knots, bends)

    def sum(self, p: np.ndarray, others: np.ndarray) -> np.ndarray:
        """(...) what the chances are made of, before its bends."""
        return self.a + self.b * logit(p) + others @ np.array(self.c)

    def __call__(self, p: np.ndarray, others: np.ndarray) -> np.ndarray:
        w = np.array([*self.line, *self.bends])
        return 1 / (1 + np.exp(-basis(self.sum(p, others), self.knots) @ w))


def basis(z: np.ndarray, knots: tuple[float, ...]) -> np.ndarray:
    """(..., 2 + knots): 1, z, and how far z is below each knot, as a negative number."""
    below = [np.minimum(z - knot, 0.0) for knot in knots]
    return np.stack([np.ones_like(z), z, *below], -1)


def logistic(x: np.ndarray, picked: np.ndarray, start: np.ndarray, ridge: float) -> np.ndarray:
    """Weights (n,) of a logistic regression of picked (R,) on x (R, n), by Newton's method.

    ridge  draws all but the first weight to `start` (n,)
    """
    prior = np.full(x.shape[1], ridge)
    prior[0] = 0.0

    def loss(w: np.ndarray) -> float:
        z, away = x @ w, w - start
        return float(np.logaddexp(0.0, z).sum() - z[picked].sum() + prior @ away**2 / 2)

    w = start
    for _ in range(25):
        q = 1 / (1 + np.exp(-np.clip(x @ w, -500, 500)))
        gradient = x.T @ (picked - q) - prior * (w - start)
        curve = (x * (q * (1 - q))[:, None]).T @ x + np.diag(prior + 1e-9)
        step, now = np.linalg.solve(curve, gradient), loss(w)
        # A whole step may overshoot where chances begin far off: it is halved until it gains.
        while np.abs(step).max() > 1e-9 and loss(w + step) > now:
            step = step / 2
        w = w + step
        if np.abs(step).max() < 1e-9:
            break
    return w


def logit(p: np.ndarray) -> np.ndarray:
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return np.log(p / (1 - p))
