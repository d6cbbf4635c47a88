"""The loss of SFT over a batch of pages (Eq. 4), which PPO may add to its own."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pagellm.model.backbone import Backbone
from pagellm.model.decode import LegalItems, page_logp, slot_states
from pagellm.model.policy import Policy
from pagellm.model.prompts import pad_ids
from pagellm.model.sampled_softmax import Candidates, locate, sampled_logits
from pagellm.stage import dist

__all__ = ["Batch", "page_batch", "sft_loss"]


@dataclass
class Batch:
    """Pages to learn from, with their prompts.

    prompt, valid  (B, P), left-padded
    item, mask     (B, K) item ids, -1 off the mask
    excluded       (B, E) item ids that no slot may hold, padded with -1
    candidates     items that stand for all in the softmax (sampled_softmax.py); None: all items
    """

    prompt: Tensor
    valid: Tensor
    item: Tensor
    mask: Tensor
    excluded: Tensor
    candidates: Candidates | None = None
    values: Any = None  # value_loss.Values, if values are learnt

    def state(self) -> dict:
        """Everything as plain tensors, for a file."""
        return vars(self) | {"values": self.values and vars(self.values)}

    def select(self, rows: Tensor) -> "Batch":
        """Some rows of the batch, with all items in the softmax."""
        return Batch(
            self.prompt[rows],
            self.valid[rows],
            self.item[rows],
            self.mask[rows],
            self.excluded[rows],
        )

    def head(self, slots: int) -> "Batch":
        """The same pages cut after `slots` slots, with all items in the softmax."""
        return Batch(
            self.prompt, self.valid, self.item[:, :slots], self.mask[:, :slots], self.excluded
        )


def page_batch(policy: Policy, users, examples, when=None) -> Batch:
    """A Batch of pages on the policy's device.

    examples  ((items, ratings) of the history, items of the page) of each user
    when      as in Policy.prompt
    """
    histories = [history for history, _ in examples]
    prompt, valid = policy.prompt(users, histories, when)
    item = dist.send(torch.from_numpy(pad_ids([page for _, page in examples], -1)), prompt.device)
    excluded = dist.send(
        torch.from_numpy(pad_ids([items for items, _ in histories], -1)), prompt.device
    )
    return Batch(prompt, valid, item, item >= 0, excluded)


def sft_loss(model: Backbone, b: Batch, objective: str = "list") -> Tensor:
    """Eq. 4 as the mean over the batch's slots: -log p(i_k | q, i_<k) over the legal items.

    objective  list: that loss. multinomial: the state before the first slot scores every label, and
               no label excludes another; this trains the ranks behind the page. both: their sum
    """
    states = slot_states(model, b.prompt, b.valid, b.item, b.mask)
    chosen = b.candidates
    rows = model.scored_items() if chosen is None else model.scored_rows(chosen[0])
    loss = states.new_zeros((), dtype=torch.float32)
    if objective in ("list", "both"):
        logp = page_logp(states, rows, b.item, b.mask, b.excluded, candidates=b.candidates)
        loss = loss - logp.sum() / b.mask.sum()
    if objective in ("multinomial", "both"):
        item, excluded = b.item, b.excluded
        if b.candidates is None:
            logits = model.item_logits(states[:, 0])  # (B, N)
        else:
            item, excluded = (locate(b.candidates, x) for x in (item, excluded))
            logits = sampled_logits(states[:, 0], rows, b.candidates)  # (B, S)
        legal = LegalItems(excluded, logits.shape[1]).legal
        logp = torch.where(legal, logits, -torch.inf).log_softmax(1)
        loss = (
            loss - torch.where(b.mask, logp.gather(1, item.clamp(min=0)), 0.0).sum() / b.mask.sum()
        )
    return loss
