"""A reward model fitted to logged pages, and a policy trained on it, for slots that interact.

    reward = fit_reward(catalogue, log)                 a small network over slots of logged pages
    reward.value(z, item, place)                        (B,) expected purchases of pages
    reward.maximise(z, item, k)                         slot by slot, what adds most
    policy = teach(reward, z, item, k)                  RLOO against the value of whole pages

What the network reads of a slot: how well the logging policy's model ranks the item, its price,
its place in the grid, and what stands above: how many of its kind, and how good and dear they are.
It is fitted to purchases of logged slots alone; nothing here knows how shoppers behave. Without
the columns of what stands above it is the pointwise model (`above=False`), fitted in the same way.

Greedy maximisation takes the best item for each slot. It ignores that a slot changes what the slots
below it earn; RLOO learns from whole pages, so it does not. The policy begins as a softened greedy
maximiser. What it gains over that is the gain from looking ahead. Source of RLOO: Ahmadian et al.,
arXiv 2402.14740.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pagellm.data.shop import Catalogue
from pagellm.kernels.advantage import group_advantage
from pagellm.model.outcome import Network, fit_network
from pagellm.online.simulate import PageLog
from pagellm.stage import randomness

__all__ = ["PagePolicy", "PageReward", "fit_reward", "places", "standard", "teach"]

PLAIN = 6  # features that do not depend on the slots above


def standard(score: np.ndarray) -> np.ndarray:
    """Scores (B, M) in standard deviations of a row."""
    spread = np.maximum(score.std(1, keepdims=True), 1e-9)
    return (score - score.mean(1, keepdims=True)) / spread


@dataclass
class Reader:
    """Features of candidates for a slot.

    leaf (N,) kind of every item, -1 unknown    dear (N,) log price over the median, 0 unknown
    columns  slots in a row of the grid         above  whether to read what stands above
    """

    leaf: np.ndarray
    dear: np.ndarray
    columns: int
    above: bool

    @classmethod
    def of(cls, catalogue: Catalogue, columns: int, above: bool) -> "Reader":
        price = np.log(np.maximum(catalogue.price.astype(np.float64), 0.01))
        usual = 0.0 if np.isnan(price).all() else float(np.nanmedian(price))
        return cls(catalogue.leaf_id, np.nan_to_num(price - usual), columns, above)

    def __call__(
        self, z: np.ndarray, item: np.ndarray, place: np.ndarray, k: int, asked: np.ndarray
    ) -> np.ndarray:
        """(B, m, F) float32 of some candidates for slot k.

        z, item (B, M)    place (B, K) columns of the slots filled so far; those from k on are not
        read    asked (B, m) columns of the candidates that are asked about
        """

        def of(table: np.ndarray, at: np.ndarray) -> np.ndarray:
            return np.take_along_axis(table, at, 1)

        own, dear, kind = (of(t, asked) for t in (z, self.dear[item], self.leaf[item]))
        rank = asked / max(1, z.shape[1] - 1)
        row, column = divmod(k, self.columns)
        out = [own, rank, dear, own * dear, np.full(own.shape, row), np.full(own.shape, column)]
        if self.above:
            over = place[:, :k]
            same = (of(self.leaf[item], over)[:, None] == kind[:, :, None]) & (kind >= 0)[
                :, :, None
            ]
            mean = [
                of(t, over).mean(1, keepdims=True) if k else np.zeros((len(z), 1))
                for t in (z, self.dear[item])
            ]
            count = same.sum(2)
            out += [count, count > 0, count * own, *(np.broadcast_to(m, own.shape) for m in mean)]
        return np.stack(out, 2).astype(np.float32)


@dataclass
class PageReward:
    """Chance of a purchase of every slot, given the slots above."""

    reader: Reader
    network: Network

    @torch.no_grad()
    def chance(self, x: np.ndarray) -> np.ndarray:
        """Features (B, m, F) -> chances (B, m)."""
        return torch.sigmoid(self.network(torch.from_numpy(x))).double().numpy()

    def slots(self, z: np.ndarray, item: np.ndarray, place: np.ndarray) -> np.ndarray:
        """(B, K) chance of every slot of pages; arguments as in `Reader`."""
        found = [
            self.chance(self.reader(z, item, place, k, place[:, k : k + 1]))[:, 0]
            for k in range(place.shape[1])
        ]
        return np.stack(found, 1)

    def value(self, z: np.ndarray, item: np.ndarray, place: np.ndarray) -> np.ndarray:
        """(B,) expected purchases of pages."""
        return self.slots(z, item, place).sum(1)

    def maximise(self, z: np.ndarray, item: np.ndarray, k: int) -> np.ndarray:
        """(B, k) columns: every slot takes the candidate of largest chance given those above."""
        place = np.zeros((len(z), k), np.int64)
        every = np.broadcast_to(np.arange(z.shape[1]), z.shape)
        gone = np.zeros(z.shape, bool)
        for slot in range(k):
            chance = self.chance(self.reader(z, item, place, slot, every))
            place[:, slot] = np.where(gone, -np.inf, chance).argmax(1)
            np.put_along_axis(gone, place[:, slot : slot + 1], True, 1)
        return place


def places(candidates: np.ndarray, page: np.ndarray) -> np.ndarray:
    """(S, K): the column of every slot's item among its session's candidates."""
    return (page[:, :, None] == candidates[:, None, :]).argmax(2)


def fit_reward(
    catalogue: Catalogue, log: PageLog, columns: int = 5, above: bool = True, seed: int = 0
) -> PageReward:
    """Fit the chance of a purchase to every slot of the logged pages.

    columns  slots in a row    above  off: the pointwise model, which reads item and place alone

    The log's pages are drawn at random, so what stands above an item does not depend on how much
    the user wants it beyond the scores, which are read.
    """
    reader = Reader.of(catalogue, columns, above)
    z, place = standard(log.score), places(log.candidates, log.page)
    xs = [
        reader(z, log.candidates, place, k, place[:, k : k + 1])[:, 0]
        for k in range(place.shape[1])
    ]
    network = fit_network(np.concatenate(xs), log.bought.T.reshape(-1), seed)
    return PageReward(reader, network)


class PagePolicy(nn.Module):
    """Logits of candidates for a slot: the reward's log-chance over `temperature`, and a network
    that begins at 0.
    """

    def __init__(self, reward: PageReward, temperature: float = 0.3, seed: int = 0):
        super().__init__()
        self.reward, self.temperature = reward, temperature
        like = reward.network
        torch.manual_seed(int(randomness.rng(seed, "page policy").integers(2**31)))
        self.more = Network(like.mean.clone(), like.std.clone())
        last = self.more.body[-1]
        assert isinstance(last, nn.Linear)
        for layer in (last, self.more.line):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def logits(self, x: np.ndarray) -> Tensor:
        """Features (B, M, F) -> (B, M)."""
        z = torch.from_numpy(x)
        with torch.no_grad():
            chance = nn.functional.logsigmoid(self.reward.network(z)) / self.temperature
        return chance + self.more(z)

    def write(
        self, z: np.ndarray, item: np.ndarray, k: int, uniform: np.ndarray | None = None
    ) -> tuple[np.ndarray, Tensor]:
        """Pages (B, k) of columns and their log-probability (B,).

        uniform  (B, k) in [0, 1) draws every slot; None: the likeliest candidate
        """
        place = np.zeros((len(z), k), np.int64)
        every = np.broadcast_to(np.arange(z.shape[1]), z.shape)
        gone = torch.zeros(z.shape, dtype=torch.bool)
        total = torch.zeros(len(z))
        for slot in range(k):
            x = self.reward.reader(z, item, place, slot, every)
            logp = self.logits(x).masked_fill(gone, -torch.inf).log_softmax(1)
            if uniform is None:
                chosen = logp.argmax(1)
            else:
                p = logp.detach().exp().double().cumsum(1)
                point = torch.from_numpy(uniform[:, slot : slot + 1]) * p[:, -1:]
                chosen = torch.searchsorted(p, point, right=True).clamp(max=z.shape[1] - 1)[:, 0]
            total = total + logp.gather(1, chosen[:, None])[:, 0]
            gone = gone.scatter(1, chosen[:, None], True)
            place[:, slot] = chosen.numpy()
        return place, total


def teach(
    reward: PageReward,
    z: np.ndarray,
    item: np.ndarray,
    k: int,
    steps: int = 100,
    users: int = 32,
    samples: int = 8,
    lr: float = 3e-3,
    temperature: float = 0.3,
    seed: int = 0,
) -> PagePolicy:
    """RLOO: pages of the same user against each other, by the reward's value of whole pages.

    z, item  (U, M) candidates of the users that it learns from
    users    of a step    samples  pages of each
    """
    policy = PagePolicy(reward, temperature, seed)
    opt = torch.optim.Adam(policy.more.parameters(), lr=lr)
    for step in range(steps):
        rng = randomness.rng(seed, "page policy", step)
        row = rng.integers(len(z), size=users).repeat(samples)
        place, logp = policy.write(z[row], item[row], k, rng.random((len(row), k)))
        value = torch.from_numpy(reward.value(z[row], item[row], place)).float()
        spread = value.std().clamp(min=1e-6)
        loss = -(group_advantage(value / spread, samples, "rloo") * logp).mean()
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.more.parameters(), 1.0)
        opt.step()
    return policy.eval()
