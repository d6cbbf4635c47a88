"""PageLLM's pages: the policy proposes, the outcome model judges, `compose` fills the slots.

    composer = Composer.load("runs/synthetic/compose", shop, policy)
    pages = composer.rank(users, seen, k=20, depth=100)

1. The candidates of a user are the policy's best and the plain judges' best (model/outcome.py).
2. The outcome network gives each candidate a chance of being picked. A calibration with three
   numbers puts it on the scale of validation rows, beside the policy's own log-probability.
3. `compose` (pages/compose.py) makes the page of chances, expected stars and variety.

The judges are fitted again when a composer is loaded: seconds on a small shop. Everything else is
in the file model.pt of the stage `compose`.
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from pagellm.data.shop import Rows, Shop
from pagellm.model.outcome import Calibration, History, Judges, Network, Outcome
from pagellm.model.policy import Policy
from pagellm.pages.compose import Opinion, Taste, compose
from pagellm.pages.ranked import RankedPages
from pagellm.pages.rerank import Kin
from pagellm.pages.truth import item_scores
from pagellm.stage.run import load_model_file

__all__ = ["POOL", "Composer", "picks", "standardised"]

POOL = 150  # candidates of a user
BLOCK = 256  # users whose candidates are judged at once
SHRINK = 3.0  # ratings of average height that every item's mean stars begin with


def picks(users: np.ndarray, item: np.ndarray, held: Rows, n_items: int) -> np.ndarray:
    """(U, M) bool: which candidates (U, M) are among the user's held-out items."""
    code = np.repeat(np.arange(len(held.indptr) - 1), held.counts()) * n_items + held.items
    return (item >= 0) & np.isin(users[:, None] * n_items + item, code)


def standardised(logp: np.ndarray, item: np.ndarray) -> np.ndarray:
    """logp (B, N) of the candidates (B, M), in standard deviations of a user's; 0 where none is."""
    at, there = np.maximum(item, 0), (item >= 0).any(1, keepdims=True)
    z = np.where(item >= 0, np.take_along_axis(logp, at, 1), np.nan)
    z = np.where(there, z, 0.0)
    spread = np.maximum(np.nanstd(z, 1, keepdims=True), 1e-9)
    return np.nan_to_num((z - np.nanmean(z, 1, keepdims=True)) / spread)


class Composer:
    """Makes pages of a policy's and the judges' candidates.

    outcome  the network that gives chances
    judges   plain models, fitted to the rows that may be known when pages are made
    policy   whose prompts show the liked items of those same rows; None: the judges propose alone,
             and the policy's log-probability counts as 0
    scale    puts chances on the scale of validation rows
    taste    how a page is made of them
    """

    def __init__(
        self,
        shop: Shop,
        policy: Policy | None,
        outcome: Outcome,
        settings: dict,
        scale: Calibration | None = None,
        taste: Taste | None = None,
        splits: tuple[str, ...] = ("train",),
        seed: int = 0,
    ):
        self.shop, self.policy, self.outcome = shop, policy, outcome
        self.settings, self.seed = settings, seed
        self.scale, self.taste = scale or Calibration(), taste or Taste()
        history = History.of(shop, shop.rows(splits, None))
        self.judges = Judges(shop.catalogue, history, settings, seed)
        self.prompts, self.kin = shop.csr(splits), Kin.of(shop.catalogue)
        stars = np.nan_to_num(item_scores(shop, SHRINK), nan=self.judges.stars.mean)
        self.mean_stars = stars - self.judges.stars.mean

    def logp(self, policy: Policy, users: np.ndarray) -> np.ndarray:
        """Log-probability of every item in the first slot: (B, N) float32."""
        model = policy.model
        with torch.no_grad():
            prompt, valid = policy.prompt(users, [self.prompts.of(u) for u in users])
            logits = model.item_logits(model(prompt, valid)[:, -1])
            return logits.log_softmax(1).float().cpu().numpy()

    def opinion(self, users: np.ndarray, seen: Rows) -> tuple[Opinion, np.ndarray, np.ndarray]:
        """What is thought of the candidates of some users, none of them in `seen`.

        returns  the opinion, with calibrated chances; the chances before calibration; the policy's
                 log-probability, in standard deviations of a user's candidates: (U, POOL) each
        """
        parts = [
            self.some_opinion(users[at : at + BLOCK], seen) for at in range(0, len(users), BLOCK)
        ]
        item, raw, other, stars = (np.concatenate(x) for x in zip(*parts, strict=True))
        chance = np.where(item >= 0, self.scale(raw, other), 0.0)
        mean = self.mean_stars[np.maximum(item, 0)]
        return Opinion(users, item, chance, stars, mean), raw, other

    def some_opinion(self, users: np.ndarray, seen: Rows) -> tuple[np.ndarray, ...]:
        """Candidates, raw chances, the policy's opinion, expected stars less their mean."""
        logp, best = None, None
        if self.policy is not None:
            logp = self.logp(self.policy, users)
            row, gone = seen.flat(users)
            logp[row, gone] = -np.inf
            best = np.argsort(-logp, axis=1, kind="stable")[:, :POOL]
            best = np.where(np.take_along_axis(logp, best, 1) > -np.inf, best, -1)
        item, x = self.judges.candidates(users, seen, POOL, best)
        at = np.maximum(item, 0)
        other = np.zeros(item.shape) if logp is None else standardised(logp, item)
        found = self.judges.stars
        taste = np.einsum("bd,bmd->bm", found.taste.numpy()[users], found.place.numpy()[at])
        stars = found.user.numpy()[users][:, None] + found.item.numpy()[at] + taste
        return item, self.outcome(x), other, stars

    def rank(self, users: np.ndarray, seen: Rows, k: int, depth: int) -> RankedPages:
        """Pages of k and the ranks behind them, without items in `seen`."""
        opinion, _, _ = self.opinion(users, seen)
        return RankedPages(users, *compose(opinion, self.kin, self.taste, k, depth))

    def state(self) -> dict:
        """What `load` reads."""
        return {
            "networks": [network.state_dict() for network in self.outcome.networks],
            "scale": asdict(self.scale),
            "taste": asdict(self.taste),
            "settings": self.settings,
            "seed": self.seed,
        }

    @classmethod
    def load(
        cls,
        path: str | Path,
        shop: Shop,
        policy: Policy | None,
        splits: tuple[str, ...] = ("train",),
    ) -> "Composer":
        """Read model.pt and fit the judges to the rows of `splits`."""
        state = load_model_file(Path(path) / "model.pt")
        networks = []
        for weights in state["networks"]:
            width = weights["body.0.weight"].shape[0]
            network = Network(weights["mean"], weights["std"], width)
            network.load_state_dict(weights)
            networks.append(network.eval())
        scale, taste = Calibration(**state["scale"]), Taste(**state["taste"])
        outcome = Outcome(networks)
        return cls(shop, policy, outcome, state["settings"], scale, taste, splits, state["seed"])
