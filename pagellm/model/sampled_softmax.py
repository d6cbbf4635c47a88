"""The softmax over items, estimated from some of them, for catalogues whose full softmax costs too
much.

    proposal = Proposal(train.items, n_items)
    candidates = proposal.draw(target, 8192, rng)                       # shared by the whole batch
    logp = sampled_logp(states, model.item_rows(candidates[0]), candidates, target, illegal)

The sum over a row's legal items is replaced by

    Z^ = sum_{j in T} e^{z_j} + sum_{draws s not in T} e^{z_s} / (n q_s)

with illegal items left out of both sums. T holds the batch's own targets, each counted once and
exactly. The n draws come from q with replacement. Dividing by n q_s (the logQ correction,
z_s - log(n q_s)) makes E[Z^] = Z for any states. By Jensen's inequality the loss -z_t + log Z^ is
too small on average, by about Var(Z^) / (2 Z^2); this bias and that of the gradient vanish as 1/n.

Source: Bengio and Senecal, IEEE TNN 2008; Jean et al., arXiv 1412.2007. Counting the batch's
targets exactly is ours.
"""

import numpy as np
import torch
from torch import Tensor

from pagellm.kernels.logprob import linear_logp

__all__ = ["Candidates", "Proposal", "locate", "sampled_logits", "sampled_logp"]


# item (S,) int64, rising, distinct; log_weight (S,) float32, 0 for the targets
Candidates = tuple[Tensor, Tensor]


class Proposal:
    """The distribution q over items: a share by popularity in the train rows, the rest uniform.

    The uniform part gives every item a chance.

    items  (R,) int64, one entry a train row
    share  weight of popularity; 0 where there are no train rows
    """

    def __init__(self, items: np.ndarray, n_items: int, share: float = 0.5):
        self.items, self.n_items = items, n_items
        self.share = share if len(items) else 0.0
        self.q = np.full(n_items, (1.0 - self.share) / n_items)
        if self.share:
            self.q += self.share / len(items) * np.bincount(items, minlength=n_items)

    def draw(self, target: Tensor, n: int, rng: np.random.Generator) -> Candidates:
        """Candidates of one step, on target's device: every item in `target`, and n draws.

        target  any shape; -1 is no item
        """
        popular = rng.random(n) < self.share
        drawn = rng.integers(self.n_items, size=n)
        if popular.any():
            drawn[popular] = self.items[rng.integers(len(self.items), size=int(popular.sum()))]
        own = np.unique(target.cpu().numpy())
        own = own[own >= 0]
        drawn, count = np.unique(drawn, return_counts=True)
        extra = ~np.isin(drawn, own)
        item = np.concatenate([own, drawn[extra]])
        log_weight = np.concatenate(
            [np.zeros(len(own)), np.log(count[extra] / (n * self.q[drawn[extra]]))]
        )
        order = np.argsort(item)
        return (
            torch.from_numpy(item[order]).to(target.device),
            torch.from_numpy(log_weight[order].astype(np.float32)).to(target.device),
        )


def locate(candidates: Candidates, items: Tensor) -> Tensor:
    """Where each item stands among the candidates; -1 for an item that does not, and for -1."""
    known = candidates[0]
    at = torch.searchsorted(known, items.contiguous()).clamp(max=len(known) - 1)
    return torch.where(known[at] == items, at, -1)


def sampled_logits(hidden: Tensor, rows: Tensor, candidates: Candidates) -> Tensor:
    """(..., S) float32: logits of the candidates, corrected so that their exponentials sum to Z^.

    hidden (..., C); rows (S, C), those of the candidates.
    """
    return hidden.float() @ rows.float().T + candidates[1]


def sampled_logp(
    hidden: Tensor,
    rows: Tensor,
    candidates: Candidates,
    target: Tensor,
    illegal: Tensor | None = None,
) -> Tensor:
    """z_target - log Z^ of every row, (n,) float32: estimates the full softmax's log-probability.

    hidden   (n, C)
    rows     (S, C), those of the candidates
    target   (n,) item ids, each among the candidates
    illegal  (n, E) item ids that row n may not choose, padded with -1
    """
    # One more channel, 1 in the states and log(1 / (n q)) in the rows: so the kernel adds the
    # correction to every logit.
    state = torch.cat([hidden.float(), hidden.new_ones(len(hidden), 1, dtype=torch.float32)], 1)
    head = torch.cat([rows.float(), candidates[1][:, None]], 1)
    logp = linear_logp(
        state,
        head,
        locate(candidates, target),
        None if illegal is None else locate(candidates, illegal),
    )
    assert isinstance(logp, Tensor)
    return logp
