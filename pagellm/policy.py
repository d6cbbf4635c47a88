"""A policy: the network, its vocabulary, and how its prompts are written. What sft and ppo save and all later
stages load; and how a policy writes and ranks pages for many users.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pagellm import metrics
from pagellm.config import PageLLMError
from pagellm.data.shop import Rows, Shop
from pagellm.decode import Pages, Unseen, beam, greedy, one_shot, ranking
from pagellm.gpt2 import GPT2, from_state, to_state
from pagellm.lists import item_scores
from pagellm.prompts import Prompts, left_pad
from pagellm.run import load_model_file
from pagellm.vocab import Vocab

__all__ = ["MODES", "Policy", "PromptStyle", "RankedPages", "references", "validate"]

MODES = ("greedy", "beam", "one_shot")


@dataclass(frozen=True)
class PromptStyle:
    """How a page prompt is written; saved with the weights, since a policy knows no other style."""

    max_history: int = 24      # items
    use_ratings: bool = True
    use_user: bool = True      # False: every prompt begins with <user_unk>


@dataclass
class RankedPages:
    """Ranked items of many users; the first `slots` of a row are its page.

    user (U,) int64    item (U, depth) int64, -1 past the end    score (U, depth) float32    slots (U,) int64
    """

    user: np.ndarray
    item: np.ndarray
    score: np.ndarray
    slots: np.ndarray


class Policy:
    def __init__(self, model: GPT2, vocab: Vocab, style: PromptStyle):
        self.model, self.vocab, self.style = model, vocab, style
        self.prompts = Prompts(vocab, model.shape.n_ctx, style.max_history, style.use_ratings)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu", dropout: float = 0.0) -> "Policy":
        """Read model.pt and the vocabulary from a stage's directory."""
        state = load_model_file(Path(path) / "model.pt")
        model = from_state(state, dropout).to(device).eval()
        return cls(model, Vocab.load(path), PromptStyle(**state["style"]))

    def state(self) -> dict:
        return {**to_state(self.model), "style": asdict(self.style)}

    def check_room(self, slots: int) -> None:
        """Raise PageLLMError unless the longest prompt and `slots` items fit in the context."""
        need, room = self.prompts.page_room + slots, self.model.shape.n_ctx
        if need > room:
            raise PageLLMError(f"a history of {self.style.max_history} items and a page of {slots} need {need} tokens, "
                               f"the context has {room}; lower max_history or k, or take a larger size")

    def prompt(self, users, histories) -> tuple[Tensor, Tensor]:
        """ids (B, P), valid (B, P), left-padded. histories: (items, ratings) of each user, oldest first."""
        rows = [self.prompts.page(int(u) if self.style.use_user and u is not None else None, *history)
                for u, history in zip(users, histories, strict=True)]
        ids, valid = left_pad(rows, self.vocab.pad)
        device = self.model.wpe.device
        return ids.to(device), valid.to(device)

    def write(self, users: np.ndarray, history: Rows, seen: Rows, k: int, mode: str = "greedy",
              width: int = 4) -> tuple[Pages, Tensor]:
        """Pages of one batch of users, and the legal set (B, N) they started from."""
        prompt, valid = self.prompt(users, [history.of(u) for u in users])
        constraint = Unseen(torch.from_numpy(seen.padded(users)).to(prompt.device), self.model.n_items)
        legal = constraint.legal.clone()
        if mode == "greedy":
            return greedy(self.model, prompt, valid, constraint, k), legal
        if mode == "beam":
            return beam(self.model, prompt, valid, constraint, k, width), legal
        if mode == "one_shot":
            return one_shot(self.model, prompt, valid, constraint, k), legal
        raise PageLLMError(f"mode={mode!r}: want one of {', '.join(MODES)}")

    def rank(self, users: np.ndarray, history: Rows, seen: Rows, k: int, depth: int, mode: str = "greedy",
             batch: int = 256, progress: str = "") -> RankedPages:
        """Page of k and the ranks behind it for every user, `batch` users at once.

        history  what the prompts show        seen  what no page may hold
        """
        self.check_room(k)
        was_training = self.model.training
        self.model.eval()
        items, scores, slots = [], [], []
        bar = tqdm(total=len(users), desc=progress, unit="page", disable=not progress)
        for start in range(0, len(users), batch):
            some = users[start: start + batch]
            pages, legal = self.write(some, history, seen, k, mode)
            item, score = ranking(pages, legal, max(depth, k))
            items.append(item.cpu())
            scores.append(score.cpu())
            slots.append(pages.mask.sum(1).cpu())
            bar.update(len(some))
        bar.close()
        self.model.train(was_training)
        return RankedPages(users, torch.cat(items).numpy(), torch.cat(scores).numpy(), torch.cat(slots).numpy())
