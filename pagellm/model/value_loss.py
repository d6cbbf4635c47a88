"""The value of every item for the next slot: weighted binary classification (GenPage).

    values = judged(shop, users, histories, rng, unpicked=64)     pools with labels and weights
    loss = value_loss(model, batch, values)

The logit of an item, given the history and the slots above, is trained as its value: 1 for what the
user liked, 0 for what the user disliked, and 0, at a small weight, for items that the user has not
picked. A page that takes the largest value in every slot then maximises value, where the softmax of
Eq. 4 asks which item is likeliest to stand there.

Source: GenPage, arXiv 2606.31031: label, the sign of the feedback; weight, its size.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pagellm.data.shop import Shop
from pagellm.model.backbone import Backbone
from pagellm.model.decode import slot_states
from pagellm.model.page_loss import Batch
from pagellm.model.prompts import pad_ids
from pagellm.model.sampled_softmax import Proposal

__all__ = ["Feedback", "Values", "value_loss"]


@dataclass
class Values:
    """What every user of a batch said of some items.

    item    (B, M) ids, -1 where there is none
    label   (B, M) float: 1 liked, 0 not
    weight  (B, M) float: 0 where there is no item
    """

    item: Tensor
    label: Tensor
    weight: Tensor


class Feedback:
    """Draws the items whose value a page teaches, from a shop's train rows.

    unpicked  items that the user has not chosen, drawn for each page, half of them by popularity:
              liked items come by popularity too, so it must not tell them apart
    light     weight of an unpicked item; a rating of middling size weighs 1
    """

    def __init__(self, shop: Shop, unpicked: int, light: float):
        self.chosen = shop.csr("train", positive=None)
        self.disliked = shop.csr("train", positive=False)
        liked = shop.csr("train")
        self.proposal = Proposal(self.chosen.items, shop.n_items)
        self.n_items, self.unpicked, self.light = shop.n_items, unpicked, light
        good, bad = (r.ratings[~np.isnan(r.ratings)] for r in (liked, self.disliked))
        every = np.concatenate([good, bad])
        self.spread = float(every.std()) if len(every) > 1 and every.std() > 0 else 1.0
        low = float(good.min()) if len(good) else 0.0
        high = float(bad.max()) if len(bad) else low - self.spread
        self.middle = (low + high) / 2

    def size(self, rating: np.ndarray) -> np.ndarray:
        """Weight of ratings (n,): their distance from the border of liking in standard deviations.

        Between 1/4 and 4; 1 where a rating is unknown.
        """
        away = np.abs(rating - self.middle) / self.spread
        return np.where(np.isnan(rating), 1.0, np.clip(away, 0.25, 4.0))

    def draw(
        self, users: np.ndarray, pages: list[np.ndarray], rngs: list[np.random.Generator], device
    ) -> Values:
        """Each user's pool: the items of the page, all disliked ones, and unpicked ones.

        pages  liked items that the prompt hides
        """
        items, labels, weights = [], [], []
        for user, page, rng in zip(users, pages, rngs, strict=True):
            own, rating = self.chosen.of(user)
            away, hated = self.disliked.of(user)
            order = np.argsort(own)
            at = order[np.searchsorted(own[order], page)]
            drawn = self.drawn(rng)
            drawn = drawn[~np.isin(drawn, own)]
            items.append(np.concatenate([page, away, drawn]))
            labels.append(np.repeat([1.0, 0.0, 0.0], [len(page), len(away), len(drawn)]))
            weights.append(
                np.concatenate(
                    [self.size(rating[at]), self.size(hated), np.full(len(drawn), self.light)]
                )
            )
        width = max(map(len, items))
        grid = np.zeros((2, len(items), width), np.float32)
        for row, (label, weight) in enumerate(zip(labels, weights, strict=True)):
            grid[0, row, : len(label)], grid[1, row, : len(weight)] = label, weight
        label, weight = torch.from_numpy(grid).to(device)
        return Values(torch.from_numpy(pad_ids(items, -1)).to(device), label, weight)

    def drawn(self, rng: np.random.Generator) -> np.ndarray:
        """`unpicked` or fewer different items: half by popularity, half by chance."""
        popular = rng.random(self.unpicked) < self.proposal.share
        found = rng.integers(self.n_items, size=self.unpicked)
        if popular.any():
            at = rng.integers(len(self.proposal.items), size=int(popular.sum()))
            found[popular] = self.proposal.items[at]
        return np.unique(found)


def value_loss(model: Backbone, b: Batch, values: Values) -> Tensor:
    """Weighted log loss of the values, over every slot of the pages and every item of the pools.

        sum w_i [-y_i log sigma(z_ki) - (1 - y_i) log(1 - sigma(z_ki))] / sum w_i

    z_ki is item i's logit before slot k, plus the log-odds of the batch's weighted labels: logits
    then need only tell items apart. Slot k counts the items that stand on no slot above it.
    returns a scalar
    """
    states = slot_states(model, b.prompt, b.valid, b.item, b.mask)[:, : b.item.shape[1]]
    rows = model.scored_rows(values.item.clamp(min=0))
    share = (values.weight * values.label).sum() / values.weight.sum().clamp(min=1e-9)
    logits = torch.einsum("bkc,bmc->bkm", states.float(), rows.float())
    logits = logits + torch.logit(share.clamp(1e-4, 1 - 1e-4))
    same = (b.item[:, :, None] == values.item[:, None]) & b.mask[:, :, None]
    above = same.long().cumsum(1) - same.long() > 0
    weight = values.weight[:, None] * b.mask[:, :, None] * ~above
    loss = F.binary_cross_entropy_with_logits(
        logits, values.label[:, None].expand_as(logits), reduction="none"
    )
    return (weight * loss).sum() / weight.sum().clamp(min=1e-9)
