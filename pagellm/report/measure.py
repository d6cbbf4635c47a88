"""What the report computes: hits of the pages' slots, and rewards of pages and of pairs."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from pagellm.model.policy import Policy
from pagellm.model.prompts import pad_ids
from pagellm.model.reward_model import RewardModel
from pagellm.pages.pairs import KINDS, Pair, from_table
from pagellm.pages.ranked import RankedPages, Scorer
from pagellm.report.findings import Found, Missing
from pagellm.report.options import Config
from pagellm.reward import is_held_out, score_pairs
from pagellm.serving.recommender import Ask, Recommender
from pagellm.serving.sources import Sources
from pagellm.stage import hints, randomness
from pagellm.stage.config import PageLLMError

__all__ = [
    "PageRewards",
    "bins_of",
    "brand_hits",
    "hits",
    "margins",
    "page_items",
    "page_rewards",
    "prompt_text",
    "rewards_of_rows",
    "shared",
    "trace",
]


def page_items(pages: RankedPages, k: int) -> np.ndarray:
    """Items in the pages' first k slots, (U, k); -1 past a page's end."""
    item = np.full((len(pages.user), k), -1, dtype=np.int64)
    width = min(k, pages.item.shape[1])
    item[:, :width] = np.where(np.arange(width) < pages.slots[:, None], pages.item[:, :width], -1)
    return item


def hits(pages: RankedPages, scorer: Scorer, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Which slots hit a held-out item of their user, and which hit only its category.

    returns exact     (U, k) bool  the slot holds a held-out item
            category  (U, k) bool  it does not, but its category is that of a held-out item
    """
    item, shop = page_items(pages, k), scorer.shop
    user = np.repeat(np.arange(shop.n_users), scorer.held.counts())
    exact = np.isin(
        pages.user[:, None] * shop.n_items + item, user * shop.n_items + scorer.held.items
    ) & (item >= 0)
    return exact, shared(pages.user, item, scorer, shop.catalogue.leaf_id) & ~exact


def brand_hits(pages: RankedPages, scorer: Scorer, k: int) -> np.ndarray:
    """(U, k) bool: the slot's item is not held out, but its brand is that of a held-out item."""
    item = page_items(pages, k)
    return (
        shared(pages.user, item, scorer, scorer.shop.catalogue.brand_id)
        & ~hits(pages, scorer, k)[0]
    )


def shared(users: np.ndarray, item: np.ndarray, scorer: Scorer, group: np.ndarray) -> np.ndarray:
    """(U, k) bool: the slot's item shares its group with a held-out item of its user.

    users (U,), item (U, k): -1 past the end; group (N,) of every item, -1 where it is unknown
    """
    n, owner = (
        int(group.max(initial=-1)) + 2,
        np.repeat(np.arange(scorer.shop.n_users), scorer.held.counts()),
    )
    held = group[scorer.held.items]
    have = np.where(item >= 0, group[np.maximum(item, 0)], -1)
    return (have >= 0) & np.isin(users[:, None] * n + have, (owner * n + held)[held >= 0])


@dataclass
class PageRewards:
    """What the reward model gives the pages of n users. The first axis is the policies'.

    names  of the P policies, in the order of findings.WRITERS: sft, ppo, compose
    user   (n,)       users
    row    (n,)       their rows in the pages
    token  (P, n, k)  token reward r_k of every slot; NaN past a page's end
    total  (P, n)     page reward plus mean token reward
    """

    names: list[str]
    user: np.ndarray
    row: np.ndarray
    token: np.ndarray
    total: np.ndarray


def sample_rewards(found: Found, config, limit: int, batch: int = 128) -> PageRewards:
    """Score the policies' pages of at most `limit` users, drawn at random. Raises Missing."""
    n = len(next(iter(found.written("scoring pages").values())).user)
    return rewards_of_rows(
        found,
        config,
        np.sort(randomness.rng(config.seed, "report", "judged").permutation(n)[:limit]),
        batch,
    )


@torch.no_grad()
def rewards_of_rows(found: Found, config, row: np.ndarray, batch: int = 128) -> PageRewards:
    """Score the policies' pages in these rows (n,) of the pages files. Raises Missing."""
    written = found.written("scoring pages")
    for name in ("sft", "reward"):
        if not found.stages[name].done:
            raise Missing(
                f"no {name} model in {found.stages[name].path}", found.stages[name].command
            )
    of = {name: found.stages[name].path.parent.name for name in ("sft", "reward")}
    rec = Recommender.load(
        Sources(
            dataset=found.dataset,
            run=found.run,
            data=config.data,
            runs=config.runs,
            source_run=of["sft"],
            reward_run=of["reward"],
            split=found.split,
            device=config.device,
        ),
        policies=("sft",),
        reward=True,
    )
    shape = len(written), len(row)
    token, total = np.full((*shape, found.k), np.nan), np.zeros(shape)
    for side, pages in enumerate(written.values()):
        items = page_items(pages, found.k)[row]
        for at in range(0, len(row), batch):
            some, users = items[at : at + batch], pages.user[row[at : at + batch]]
            asks = [rec.resolve(Ask(user=found.data.user_ids[u], policy="sft", k=1)) for u in users]
            item = torch.from_numpy(pad_ids([i[i >= 0] for i in some], -1, found.k))
            judged = rec.rewards(asks, item, item >= 0)
            assert judged is not None  # it was loaded with its reward model
            slots, page = judged
            kept = (item >= 0).numpy()
            token[side, at : at + batch] = np.where(kept, slots.numpy(), np.nan)
            total[side, at : at + batch] = page.numpy() + np.where(kept, slots.numpy(), 0).sum(
                1
            ) / kept.sum(1).clip(1)
    users = next(iter(written.values())).user[row]
    return PageRewards(list(written), users, row, token, total)


def page_rewards(found: Found, config: Config) -> PageRewards:
    """Rewards of config.judged users' pages, computed once for all sections. Raises Missing."""
    if "judged" not in found.kept:
        try:
            found.kept["judged"] = sample_rewards(found, config, config.judged)
        except Missing as missing:
            found.kept["judged"] = missing
        except PageLLMError as error:
            found.kept["judged"] = Missing(str(error))
    if isinstance(found.kept["judged"], Missing):
        raise found.kept["judged"]
    return found.kept["judged"]


def trace(token: np.ndarray) -> np.ndarray:
    """Running sum of Eq. 6: R_f as far as slot k, sum_{t <= k} r_t / T; the last one is R_f.

    token (..., K) rewards of slots, NaN past a page's end, as is the result
    """
    kept = ~np.isnan(token)
    total = np.cumsum(np.where(kept, token, 0.0), axis=-1) / np.maximum(
        kept.sum(-1, keepdims=True), 1
    )
    return np.where(kept, total, np.nan)


def prompt_text(policy: Policy, found: Found, user: int) -> str:
    """A user's prompt, token by token; users and items are shown by the shop's own ids."""
    history = found.data.csr("train").of(user)
    ids = policy.prompts.page(user if policy.style.use_user else None, *history)
    v, c = policy.vocab, found.data.catalogue
    parts = [
        f"<{found.data.user_ids[t - v.user0]}>"
        if v.user0 <= t < v.item0
        else f" <{c.ids[t - v.item0]}>"
        if t >= v.item0
        else v.decode([t])
        for t in ids
    ]
    return "".join(parts)


def margins(found: Found, config, per_kind: int) -> dict[str, np.ndarray]:
    """Reward margin (chosen minus rejected) and energy gap of held-out users' pairs.

    per_kind  largest number of pairs of each kind, drawn at random
    returns   kind -> (n, 2): margin, gap. Raises Missing.
    """
    stage = found.stages["reward"]
    if not stage.done or not (stage.path / "pairs.parquet").exists():
        raise Missing(f"no reward model in {stage.path}", stage.command)
    if found.shop is None:
        raise Missing(found.notes[0], hints.command("prepare", found.dataset))
    before: Any = SimpleNamespace(**stage.recorded["config"])
    table = pq.read_table(stage.path / "pairs.parquet")
    users, back = np.unique(table["user"].to_numpy(), return_inverse=True)
    held = np.array([is_held_out(int(u), before) for u in users])[back]
    kind = np.array(table["kind"].to_pylist())
    policy = Policy.load(found.stages["sft"].path, "cpu")
    model = RewardModel.load(stage.path, "cpu")
    out = {}
    for name in KINDS:
        rows = np.flatnonzero(held & (kind == name))
        if not len(rows):
            continue
        rows = np.sort(
            randomness.rng(config.seed, "report", "pairs", name).permutation(rows)[:per_kind]
        )
        pairs: list[Pair] = from_table(table.take(rows))
        scores = score_pairs(model, pairs, policy)
        total = scores["page"] + scores["token"]
        out[name] = np.stack([total[:, 0] - total[:, 1], [p.delta_E for p in pairs]], 1)
    return out


def bins_of(values: np.ndarray, n: int) -> list[np.ndarray]:
    """Split rows into at most n groups of rising values and similar size.

    Equal values stay in one group. Returns the row numbers of each group.
    """
    if not len(values):
        return []
    edges = np.unique(np.quantile(values, np.linspace(0, 1, n + 1)[1:-1], method="higher"))
    index = np.searchsorted(edges, values, side="right")
    return [rows for g in range(len(edges) + 1) if len(rows := np.flatnonzero(index == g))]
