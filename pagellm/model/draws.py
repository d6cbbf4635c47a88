"""Pages drawn at once: all slots from the first slot's distribution, without replacement.

    logits = first_logits(model, prompt, valid, excluded)        one pass for each user
    pages = draw(logits / temperature, uniform)                  many pages for each of them
    logp, entropy = drawn_logp(logits / temperature, pages.item, pages.mask)

This is the Plackett-Luce distribution: slot k holds item i with probability

    p_i / (1 - sum of p over the slots above),   p = softmax(logits)

Ranking by the logits (decode.one_shot) is its mode. Drawing takes one pass over a prompt, however
many pages are drawn, where decode.sample takes one for each slot of each page.

Source of the draw: Gumbel top-k, Kool et al., ICML 2019, arXiv 1903.06059.
"""

import torch
from torch import Tensor

from pagellm.model.backbone import Backbone
from pagellm.model.decode import LegalItems, Pages

__all__ = ["draw", "drawn_logp", "first_kl", "first_logits"]


def first_logits(model: Backbone, prompt: Tensor, valid: Tensor, excluded: Tensor) -> Tensor:
    """Logits of the first slot (U, N) float64, -inf on excluded items; one pass over the prompts.

    prompt, valid  (U, P)    excluded (U, E) item ids, padded with -1
    """
    logits = model.item_logits(model(prompt, valid)[:, -1])
    legal = LegalItems(excluded, model.n_items).legal
    # In float32 what is left of the mass after the likeliest items have gone would be rounding.
    return logits.double().masked_fill(~legal, -torch.inf)


@torch.no_grad()
def draw(logits: Tensor, uniform: Tensor, k: int) -> Pages:
    """A page of k for every row of numbers: item, logp, mask (B, K); first is `logits`.

    logits   (B, N) float64, -inf where illegal
    uniform  (B, N) in [0, 1): a page depends on its own numbers alone

    Where fewer than k items are legal the page has as many slots as there are.
    """
    gumbel = -torch.log(-torch.log(uniform.double().clamp(min=1e-300)))
    value, item = (logits + gumbel).topk(min(k, logits.shape[1]), dim=1)
    mask = value > -torch.inf
    item = torch.where(mask, item, -1)
    return Pages(item, drawn_logp(logits, item, mask)[0], mask, logits)


def drawn_logp(
    logits: Tensor, item: Tensor, mask: Tensor, at: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of every slot given those above, and the entropy of the first slot.

    logits      (U, N) float64, divided by the temperature, -inf where illegal
    item, mask  (B, K), the kept slots a prefix of each row
    at          (B,) the row of logits that each page was drawn from; None: its own
    returns     logp (B, K) float32, 0 off the mask; entropy (B, K) float32 in nats: the first
                slot's, repeated on the kept slots
    """
    at = torch.arange(len(item), device=item.device) if at is None else at
    logp = logits.log_softmax(1)
    own = torch.where(mask, logp[at[:, None], item.clamp(min=0)], 0.0)
    p = torch.where(mask, own.exp(), 0.0)
    left = 1.0 - (p.cumsum(1) - p)
    # What is left holds the item itself; rounding must not say less.
    slot = own - torch.maximum(left, p).clamp(min=1e-300).log()
    plogp = torch.where(logp.isfinite(), logp.exp() * logp.clamp(min=-1e4), 0.0)
    entropy = -plogp.sum(1)[at][:, None].expand_as(own)
    return torch.where(mask, slot, 0.0).float(), torch.where(mask, entropy, 0.0).float()


def first_kl(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    """KL(pi || ref) of the first slot in nats, repeated on the kept slots: (B, K) float32.

    logits, ref_logits  (B, N), -inf on the same items    mask (B, K)
    """
    logp, ref = logits.log_softmax(1), ref_logits.log_softmax(1)
    kl = torch.where(logp.isfinite(), logp.exp() * (logp - ref), 0.0).sum(1, keepdim=True)
    return torch.where(mask, kl, 0.0).float()
