"""SFT's loss over a batch of pages (Eq. 4), which PPO may keep beside its own."""

from dataclasses import dataclass

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
    """prompt, valid (B, P); page item ids and mask (B, K); excluded (B, E), padded with -1; candidates: items that
    stand for all in the softmax (sampled.py)."""

    prompt: Tensor
    valid: Tensor
    item: Tensor
    mask: Tensor
    excluded: Tensor
    candidates: Candidates | None = None

    def select(self, rows: Tensor) -> "Batch":
        """Some rows of it, all items in the softmax."""
        return Batch(
            self.prompt[rows],
            self.valid[rows],
            self.item[rows],
            self.mask[rows],
            self.excluded[rows],
        )

    def head(self, slots: int) -> "Batch":
        """The same with no page longer than `slots`."""
        return Batch(
            self.prompt, self.valid, self.item[:, :slots], self.mask[:, :slots], self.excluded
        )


def page_batch(policy: Policy, users, examples, when=None) -> Batch:
    histories = [history for history, _ in examples]
    prompt, valid = policy.prompt(users, histories, when)
    item = dist.send(torch.from_numpy(pad_ids([page for _, page in examples], -1)), prompt.device)
    excluded = dist.send(
        torch.from_numpy(pad_ids([items for items, _ in histories], -1)), prompt.device
    )
    return Batch(prompt, valid, item, item >= 0, excluded)


def sft_loss(model: Backbone, b: Batch, objective: str = "list") -> Tensor:
    """Eq. 4 as the mean over the batch's slots: -log p(i_k | q, i_<k) over the legal items.

    multinomial  every label is scored by the state before the first slot, none excludes another: what the ranks
                 behind the page are read from
    both         the sum of the two
    """
    states = slot_states(model, b.prompt, b.valid, b.item, b.mask)
    rows = model.item if b.candidates is None else model.item_rows(b.candidates[0])
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
