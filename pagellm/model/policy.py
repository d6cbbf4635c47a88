"""A policy: a network, its vocabulary, and the style of its prompts.

It is what sft and ppo save and what all later stages load. It also writes and ranks pages for many
users, and scores them on validation rows.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pagellm.data.shop import Rows, Shop
from pagellm.model.backbone import Backbone
from pagellm.model.decode import (
    LegalItems,
    Pages,
    beam,
    greedy,
    hybrid,
    one_shot,
    prefill,
    ranking,
)
from pagellm.model.networks import from_state, to_state
from pagellm.model.prompts import Prompts, left_pad
from pagellm.model.shortlist import Shortlist, best_items
from pagellm.model.vocab import Vocab
from pagellm.pages.ranked import BLOCK, RankedPages, Scorer, tie_breaker
from pagellm.pages.topk import Rank
from pagellm.pages.variety import Variety
from pagellm.stage import dist, randomness
from pagellm.stage.config import PageLLMError
from pagellm.stage.run import load_model_file

__all__ = ["MODES", "Policy", "PromptStyle", "Validation"]


MODES = ("greedy", "beam", "one_shot", "hybrid")


@dataclass(frozen=True)
class PromptStyle:
    """How a page prompt is written. It is saved with the weights, which know no other style."""

    max_history: int = 24  # items
    use_ratings: bool = True
    use_user: bool = True  # False: every prompt begins with <user_unk>
    clock: tuple[int, ...] = ()  # rising moments, in seconds, at which the periods of the time
    # tokens end; (): prompts show no time


class Policy:
    """A network with its vocabulary and prompt style."""

    def __init__(self, model: Backbone, vocab: Vocab, style: PromptStyle):
        self.model, self.vocab, self.style = model, vocab, style
        self.prompts = Prompts(
            vocab,
            model.shape.n_ctx,
            style.max_history,
            style.use_ratings,
            len(style.clock) if vocab.times else None,
        )

    @classmethod
    def load(
        cls, path: str | Path, device: torch.device | str = "cpu", dropout: float = 0.0
    ) -> "Policy":
        """Read model.pt and the vocabulary from a stage's directory."""
        state = load_model_file(Path(path) / "model.pt")
        model = from_state(state, dropout).to(device).eval()
        return cls(model, Vocab.load(path), PromptStyle(**state["style"]))

    def state(self) -> dict:
        """What `load` reads, the vocabulary aside. Call it on every process."""
        style = {
            name: value for name, value in asdict(self.style).items() if name != "clock" or value
        }
        return {**to_state(self.model), "style": style}

    def periods(self, when: np.ndarray | None, n: int) -> list[int | None]:
        """Time period of each of n moments (seconds), counted from 0.

        n times None where no moments are given or the vocabulary has no time tokens.
        """
        if when is None or not self.vocab.times:
            return [None] * n
        return np.searchsorted(np.array(self.style.clock), when, side="right").tolist()

    def check_room(self, slots: int) -> None:
        """Raise PageLLMError unless the longest prompt and `slots` items fit in the context."""
        need, room = self.prompts.page_room + slots, self.model.shape.n_ctx
        if need > room:
            raise PageLLMError(
                f"a history of {self.style.max_history} items and a page of {slots} need {need} "
                f"tokens, the context has {room}; lower max_history or k, or take a larger size"
            )

    def prompt(self, users, histories, when: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """ids (B, P), valid (B, P), left-padded.

        histories  (items, ratings) of each user, oldest first
        when       (B,) seconds: the moment of each page, if the policy has time tokens; None: now,
                   the last period
        """
        rows = [
            self.prompts.page(
                int(u) if self.style.use_user and u is not None else None, items, ratings, period
            )
            for u, (items, ratings), period in zip(
                users, histories, self.periods(when, len(users)), strict=True
            )
        ]
        ids, valid = left_pad(rows, self.vocab.pad)
        device = self.model.word.device
        return dist.send(ids, device), dist.send(valid, device)

    def write(
        self,
        users: np.ndarray,
        history: Rows,
        seen: Rows,
        k: int,
        mode: str = "greedy",
        width: int = 4,
        when: np.ndarray | None = None,
        ties: Rank | None = None,
        variety: Variety | None = None,
    ) -> tuple[Pages, Tensor]:
        """Pages of one batch of users, and the legal set (B, N) before any slot was filled.

        when     as in `prompt`        ties  as in decode.greedy; beam ignores it
        variety  of pages/variety.py, inside decoding; None: none
        Raises PageLLMError for an unknown mode.
        """
        prompt, valid = self.prompt(users, [history.of(u) for u in users], when)
        excluded = torch.from_numpy(seen.padded(users)).to(prompt.device)
        constraint = LegalItems(excluded, self.model.n_items, variety=variety)
        legal = constraint.legal.clone()
        return self.decode(prompt, valid, constraint, k, mode, width, ties), legal

    @torch.no_grad()
    def write_short(
        self,
        users: np.ndarray,
        history: Rows,
        seen: Rows,
        k: int,
        candidates: int,
        mode: str = "greedy",
        width: int = 4,
        when: np.ndarray | None = None,
        ties: Rank | None = None,
    ) -> tuple[Pages, Shortlist]:
        """`write` with shortlists: each user's best items for the first slot, `candidates` of them.

        returns  the pages and the shortlists, whose columns Pages.first has
        """
        prompt, valid = self.prompt(users, [history.of(u) for u in users], when)
        excluded, model = torch.from_numpy(seen.padded(users)).to(prompt.device), self.model
        start = prefill(model, prompt, valid, k)
        rows, parts = model.scored_items(), model.item_parts
        short = Shortlist(model, best_items(start[1], rows, excluded, candidates, parts=parts))
        ties = ties and among(ties, short)
        pages = self.decode(
            prompt, valid, short.constraint(), k, mode, width, ties, start=start, short=short
        )
        return pages, short

    def decode(
        self,
        prompt: Tensor,
        valid: Tensor,
        constraint: LegalItems,
        k: int,
        mode: str,
        width: int,
        ties: Rank | None,
        **more: Any,
    ) -> Pages:
        """Pages in one of MODES. more: `start` and `short` of decode.generate"""
        ways: dict[str, Callable[..., Pages]] = {
            "greedy": partial(greedy, ties=ties),
            "beam": partial(beam, width=width),
            "one_shot": partial(one_shot, ties=ties),
            "hybrid": partial(hybrid, ties=ties),
        }
        if mode not in ways:
            raise PageLLMError(f"mode={mode!r}: want one of {', '.join(MODES)}")
        return ways[mode](self.model, prompt, valid, constraint, k, **more)

    def rank(
        self,
        users: np.ndarray,
        history: Rows,
        seen: Rows,
        k: int,
        depth: int,
        mode: str = "greedy",
        batch: int = 256,
        progress: str = "",
        when: np.ndarray | None = None,
        seed: int = 0,
        variety: Variety | None = None,
        candidates: int = 0,
    ) -> RankedPages:
        """The page of k slots and the ranks after it, for every user.

        history  what the prompts show        seen  what no page may hold
        batch    users at once; fewer where the catalogue is so large that their logits would be
                 more than BLOCK numbers. Several processes share the users
        when     (all users of the shop,) seconds: the moment of each one's page, as in `prompt`
        seed     of the random order among equal scores (`tie_breaker`)
        variety  as in `write`
        candidates  items of a shortlist (`write_short`), at least as many as there are ranks; 0:
                 the whole catalogue
        """
        self.check_room(k)
        candidates = candidates and max(candidates, depth, k)
        width = min(candidates or self.model.n_items, self.model.n_items)
        batch = max(1, min(batch, BLOCK // max(1, width)))
        was_training, bf16 = self.model.training, self.model.bf16
        self.model.bf16 = False
        self.model.eval()
        items, scores, slots = [], [], []
        mine, busy = dist.shard(users)
        # Users with histories of similar length share a batch, so that there is little padding.
        order = np.argsort(history.counts()[mine], kind="stable")
        bar = tqdm(
            total=len(mine),
            desc=progress,
            unit="page",
            disable=not progress or not dist.is_main(),
            mininterval=1.0,
        )
        for at, real in dist.pieces(order, batch, self.model.parts is not None):
            some = mine[at]
            ties = tie_breaker(seed, some, len(seen.indptr) - 1, self.model.n_items)
            moment = None if when is None else when[some]
            short = None
            if 0 < candidates < self.model.n_items:
                pages, short = self.write_short(
                    some, history, seen, k, candidates, mode, when=moment, ties=ties
                )
                legal, ties = short.candidates >= 0, among(ties, short)
            else:
                pages, legal = self.write(
                    some, history, seen, k, mode, when=moment, ties=ties, variety=variety
                )
            if not real:
                continue
            item, score = ranking(pages, legal, max(depth, k), ties, short)
            items.append(item.cpu())
            scores.append(score.cpu())
            slots.append(pages.mask.sum(1).cpu())
            bar.update(len(some))
        bar.close()
        self.model.train(was_training)
        self.model.bf16 = bf16
        back = np.argsort(order)[: None if busy else 0]
        return RankedPages(
            users,
            *(dist.gather(torch.cat(column).numpy()[back]) for column in (items, scores, slots)),
        )


def among(ties: Rank, short: Shortlist) -> Rank:
    """`ties` for the columns of shortlists: an item ranks as it does in the catalogue."""
    ids = short.candidates.clamp(min=0).cpu().numpy()
    return lambda row, column: ties(row, ids[row, column])


class Validation:
    """Pages of the same users, written and scored again and again while a policy learns.

    limit  users, drawn once from those with held-out items; 0: all
    """

    def __init__(
        self, shop: Shop, split: str, k: int, mode: str, limit: int, seed: int, depth: int = 100
    ):
        self.scorer, self.k, self.mode = Scorer(shop, split), k, mode
        self.depth = max(depth, k)
        self.history, self.seen = shop.csr("train"), shop.csr("train", positive=None)
        users = self.scorer.users[self.history.counts()[self.scorer.users] > 0]
        if len(users) == 0:
            raise PageLLMError(
                f"no user has both train and {split} items: nothing to validate on\n"
                "  A last fit to all rows (prepare --refit) goes without: sft --select last"
            )
        if 0 < limit < len(users):
            users = np.sort(randomness.rng(seed, "validation", split).permutation(users)[:limit])
        self.users, self.when = users, shop.moments(split)

    def __call__(self, policy: Policy) -> dict[str, float]:
        """name -> mean over the users for whom the score is defined.

        A score that is defined for nobody is left out.
        """
        ranked = policy.rank(
            self.users, self.history, self.seen, self.k, self.depth, self.mode, when=self.when
        )
        scores = self.scorer(ranked, self.k)
        return {name: float(np.nanmean(v)) for name, v in scores.items() if not np.isnan(v).all()}
