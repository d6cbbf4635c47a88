"""The loss of SFT over a batch of pages (Eq. 4), which PPO may add to its own."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pagellm.model.backbone import Backbone
from pagellm.model.decode import LegalItems, page_logp, sample, slot_states
from pagellm.model.policy import Policy
from pagellm.model.prompts import pad_ids
from pagellm.model.sampled_softmax import Candidates, locate, sampled_logits
from pagellm.stage import dist

__all__ = ["Batch", "OwnPrefix", "draw_prefixes", "page_batch", "sft_loss"]


@dataclass
class OwnPrefix:
    """Slots to learn where the items above are the policy's own draws instead of labels.

    above   (B, K) the items that stand on the page, -1 past its end
    target  (B, K) the label that each slot learns, -1 where none is left
    """

    above: Tensor
    target: Tensor


@dataclass
class Batch:
    """Pages to learn from, with their prompts.

    prompt, valid  (B, P), left-padded
    item, mask     (B, K) item ids, -1 off the mask
    excluded       (B, E) item ids that no slot may hold, padded with -1
    candidates     items that stand for all in the softmax (sampled_softmax.py); None: all items
    draws          (B, 2, K) float64 in [0, 1): for pages that are learnt with the policy's own
                   items above each slot: these and the labels are drawn by them; NaN for the other
                   pages; None: there is no such page
    prefix         what `draw_prefixes` made of the draws; None: labels stand above every slot
    """

    prompt: Tensor
    valid: Tensor
    item: Tensor
    mask: Tensor
    excluded: Tensor
    candidates: Candidates | None = None
    values: Any = None  # value_loss.Values, if values are learnt
    draws: Tensor | None = None
    prefix: OwnPrefix | None = None

    def state(self) -> dict:
        """Everything as plain tensors, for a file."""
        parts = {name: getattr(self, name) for name in ("values", "prefix")}
        return vars(self) | {name: part and vars(part) for name, part in parts.items()}

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


@torch.no_grad()
def draw_prefixes(model: Backbone, b: Batch) -> OwnPrefix | None:
    """Pages that the policy draws itself, and for each slot a label that is not above it yet.

    A slot learns a label drawn from those that the slots above lack, each as likely as another. So
    its expected loss is the mean over all of them. When a page is written slot by slot, the items
    above a slot are the policy's own, hits and misses. In training on labels they are hits only.

    Source: Bengio et al., Scheduled sampling, NeurIPS 2015; Ross et al., DAgger, AISTATS 2011.

    returns  None where no page of the batch is drawn
    """
    if b.draws is None:
        return None
    rows = (~b.draws[:, 0, 0].isnan()).nonzero()[:, 0]
    busy = len(rows) > 0
    if not (dist.any_rank(busy) if model.parts is not None else busy):
        return None
    if not busy:  # another process draws, and where rows are cut all must read alike
        rows = rows.new_zeros(1)
    label, there, draws = b.item[rows], b.mask[rows], b.draws[rows]
    training = model.training
    model.eval()
    legal = LegalItems(b.excluded[rows], model.n_items)
    K = label.shape[1]
    uniform = draws[:, 0].nan_to_num()
    if model.parts is not None:  # and equally often: as the widest batch
        uniform = F.pad(uniform, (0, dist.largest(K) - K))
    own = sample(model, b.prompt[rows], b.valid[rows], legal, uniform).item[:, :K]
    model.train(training)
    if not busy:
        return None
    above, target = b.item.clone(), b.item.clone()
    above[rows] = torch.where(there, own, -1)
    target[rows] = torch.where(there, labels_left(label, own, draws[:, 1]), -1)
    return OwnPrefix(above, target)


def labels_left(label: Tensor, own: Tensor, uniform: Tensor) -> Tensor:
    """(R, K): for each slot one of the labels that no slot above holds; -1 where none is left.

    label    (R, K) item ids, -1 past the last        own  (R, K) the items of the slots
    uniform  (R, K) in [0, 1): which of the labels
    """
    K = label.shape[1]
    hit = (own[:, :, None] == label[:, None, :]) & (label >= 0)[:, None, :]  # (R, slot, label)
    taken = hit.cumsum(1) - hit.long()  # by slots above
    left = (taken == 0) & (label >= 0)[:, None, :]
    count = left.sum(2)
    nth = (uniform * count).long().clamp(max=K - 1)
    at = (left & (left.cumsum(2) == nth[..., None] + 1)).int().argmax(2)
    return torch.where(count > 0, label.gather(1, at), -1)


def sft_loss(model: Backbone, b: Batch, objective: str = "list") -> Tensor:
    """Eq. 4 as the mean over the batch's slots: -log p(i_k | q, i_<k) over the legal items.

    Where the batch has a `prefix`, its items stand above the slots instead of the labels.

    objective  list: that loss. multinomial: the state before the first slot scores every label, and
               no label excludes another; this trains the ranks after the page. both: their sum
    """
    above, target = (b.item, b.item) if b.prefix is None else (b.prefix.above, b.prefix.target)
    states = slot_states(model, b.prompt, b.valid, above, above >= 0)
    chosen = b.candidates
    rows = model.scored_items() if chosen is None else model.scored_rows(chosen[0])
    loss = states.new_zeros((), dtype=torch.float32)
    if objective in ("list", "both"):
        learnt = target >= 0
        logp = page_logp(
            states,
            rows,
            target,
            learnt,
            b.excluded,
            candidates=b.candidates,
            above=above,
            parts=model.item_parts,
        )
        loss = loss - logp.sum() / learnt.sum()
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
