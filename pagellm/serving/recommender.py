"""Pages on request: an Ask in the shop's own ids -> an answer of plain values, many at once.

    recommender = Recommender.load(config)                          # a Sources: which data, which runs
    answer, = recommender.answers([Ask(user="A1B2", k=20, filters=Filters(price_max=30.0))])

Filters hold in every slot, inside decoding. Prompts and users met before come from a Cache under the model's hash.
`pagellm recommend` prints and files the answers; `pagellm serve` puts them on HTTP.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pagellm.data.shop import Rows, Shop, load, source
from pagellm.model import lora
from pagellm.model.backbone import KVCache
from pagellm.model.decode import LegalItems, Pages, beam, greedy, one_shot
from pagellm.model.policy import Policy
from pagellm.model.prompts import left_pad, pad_ids
from pagellm.model.reward_model import RewardModel
from pagellm.pages import metrics
from pagellm.pages.energy import gain, near_duplicates, page_energy
from pagellm.pages.truth import item_scores
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.dist import pick_device
from pagellm.stage.run import StageConfig, file_id, finished

__all__ = [
    "Ask",
    "Cache",
    "Case",
    "Filters",
    "POLICIES",
    "Recommender",
    "SPLITS",
    "Sources",
    "nothing",
]


POLICIES = ("ppo", "sft")  # with the reward, and without it
SPLITS = ("test", "valid", "none")


@dataclass(frozen=True, kw_only=True)
class Sources(StageConfig):
    """Where a page's models and data come from."""

    source_run: str = ""  # run whose sft is read; empty: this run (studies share one)
    reward_run: str = ""  # run whose reward model is read; empty: source_run
    split: str = "test"  # held-out rows kept from the prompts, as in evaluate: test, valid,
    # or none. none: a real shop's choice, prompts show all that is known and no page repeats it

    def __post_init__(self):
        super().__post_init__()
        check(self, split=(self.split in SPLITS, ", ".join(SPLITS)))

    def where(self, verb: str) -> Path:
        """Directory of sft, ppo or reward."""
        return self.stage(
            verb,
            {"sft": self.source_run, "reward": self.reward_run or self.source_run}.get(verb, ""),
        )


@dataclass(frozen=True)
class Filters:
    """Hard constraints on every slot. None is no filter; an empty list of what is allowed allows nothing."""

    exclude: tuple[str, ...] = ()
    categories: tuple[str, ...] | None = None  # an item needs one of these
    in_stock: tuple[str, ...] | None = None  # item ids
    price_min: float | None = None  # an item of unknown price fails either bound
    price_max: float | None = None


@dataclass(frozen=True)
class Ask:
    """One page wanted, in the shop's own words.

    user     the shop's id; None or a stranger: <user_unk>
    history  (item id, rating 1..5 or NaN), oldest first; comes after what is stored of a known user
    page     item ids of a page to be scored instead of written, in order
    """

    user: str | None = None
    history: tuple[tuple[str, float], ...] = ()
    k: int = 20
    mode: str = "greedy"
    policy: str = "ppo"
    filters: Filters = field(default_factory=Filters)
    page: tuple[str, ...] | None = None
    explain: bool = False


@dataclass
class Case:
    """An Ask in dense ids.

    user            row of the user table; None: a stranger
    items, ratings  (H,) liked items of the prompt, oldest first
    seen            (E,) items that no slot may hold: all that the user has met, and those excluded
    allowed         (N,) bool or None
    page            (L,) items to be scored; None: a page is to be written
    """

    ask: Ask
    user: int | None
    items: np.ndarray
    ratings: np.ndarray
    seen: np.ndarray
    allowed: Tensor | None
    page: np.ndarray | None
    unknown_items: list[str]
    unknown_categories: list[str]


class Cache:
    """Least recently used values under keys that begin with a model hash, bounded in bytes; safe between threads."""

    def __init__(self, room: int):
        self.room, self.size, self.hits, self.misses = room, 0, 0, 0
        self._kept: OrderedDict[Hashable, tuple[object, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable):
        with self._lock:
            if key not in self._kept:
                self.misses += 1
                return None
            self.hits += 1
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: Hashable, value, size: int) -> None:
        """size in bytes; what is larger than the whole room is not kept."""
        with self._lock:
            if key in self._kept or size > self.room:
                return
            self._kept[key] = (value, size)
            self.size += size
            while self.size > self.room:
                self.size -= self._kept.popitem(last=False)[1][1]

    def __len__(self) -> int:
        return len(self._kept)


def nothing(stage: str, seconds: float) -> None:
    """The default observer of a Recommender."""


class Recommender:
    """Policies, reward model and shop as they were at one moment; never changed, only replaced as a whole.

    hashes   policy or "reward" -> id of its weights
    cache    prompt columns and user states; may be shared with an earlier Recommender, since keys hold the hash
    observe  called with (stage, seconds) for the stages prompt, decode, reward and metrics
    """

    def __init__(
        self,
        shop: Shop,
        policies: dict[str, Policy],
        reward: RewardModel | None,
        hashes: dict[str, str],
        split: str = "test",
        cache: Cache | None = None,
        positive_above: float = 3.0,
        width: int = 4,
        observe: Callable[[str, float], None] = nothing,
    ):
        for name, policy in policies.items():
            have = (policy.vocab.n_users, policy.vocab.n_items)
            if have != (shop.n_users, shop.n_items):
                raise PageLLMError(
                    f"{name} was made for {have[0]} users and {have[1]} items, the data have "
                    f"{shop.n_users} and {shop.n_items}; train on these data first"
                )
        self.shop, self.policies, self.reward, self.hashes = shop, policies, reward, hashes
        self.split, self.width, self.positive_above = split, width, positive_above
        self.cache, self.observe = Cache(64 << 20) if cache is None else cache, observe
        # writes the reward model's prompts
        self.reader = policies.get("sft") or next(iter(policies.values()))
        self.key = ":".join(hashes[name] for name in sorted(hashes))
        c = shop.catalogue
        self.user_of = {name: i for i, name in enumerate(shop.user_ids)}
        self.item_of = {name: i for i, name in enumerate(c.ids)}
        told, met = {
            "test": ("train", ("train", "valid")),
            "valid": ("train", "train"),
            "none": (None, None),
        }[split]
        self.history, self.met = shop.csr(told), shop.csr(met, positive=None)
        self.held = (
            shop.csr(split)
            if split != "none"
            else Rows(
                np.zeros(shop.n_users + 1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
            )
        )
        self.s, self.near = item_scores(shop), near_duplicates(c)
        self.price = torch.from_numpy(c.price)
        members: dict[str, list[int]] = {}
        for i, (names, leaf) in enumerate(zip(c.categories, c.leaf, strict=True)):
            for name in {*names, leaf} - {""}:
                members.setdefault(name, []).append(i)
        self.members = {name: np.array(items) for name, items in sorted(members.items())}
        self.cards = [
            {
                "item": c.ids[i],
                "title": c.title[i],
                "category": c.leaf[i] or None,
                "brand": c.brand[i] or None,
                "price": None if np.isnan(c.price[i]) else round(float(c.price[i]), 2),
            }
            for i in range(shop.n_items)
        ]
        self.unit = {
            name: F.normalize(p.model.item.detach().float(), dim=1).cpu()
            for name, p in policies.items()
        }

    @classmethod
    def load(
        cls, config: Sources, policies: Sequence[str] = POLICIES, reward: bool = True, **more
    ) -> "Recommender":
        """Read what `config` names. Raises PageLLMError for a stage that is missing, unfinished, or just changing."""
        need = {"sft": "SFT policy", "ppo": "PageLLM policy", "reward": "reward model"}
        names = [*policies, "reward"] if reward else list(policies)
        hashes = {
            name: finished(config.where(name), need[name], config.make(name))["id"]
            for name in names
        }
        shop, device = load(config.data_dir), pick_device(config.device)
        positive_above = source(config.data_dir).get("config", {}).get("positive_above", 3.0)
        loaded = {name: Policy.load(config.where(name), device) for name in policies}
        for policy in loaded.values():
            policy.model.requires_grad_(False)
            lora.merge(policy.model)
        judge = (
            RewardModel.load(config.where("reward"), device).requires_grad_(False)
            if reward
            else None
        )
        # load_model_file has checked each file against its `done`; this, that it is still the `done` read above.
        for name in names:
            if finished(config.where(name), need[name], config.make(name))["id"] != hashes[name]:
                raise PageLLMError(f"{config.where(name)} changed while it was read; try again")
        hashes["data"] = file_id(config.data_dir / "source.json")
        return cls(shop, loaded, judge, hashes, config.split, positive_above=positive_above, **more)

    def slots(self, policy: str) -> int:
        """The longest page that fits behind the longest prompt."""
        p = self.policies[policy]
        return p.model.shape.n_ctx - p.prompts.page_room

    def user_state(self, user: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """items, ratings (H,) of the prompt, seen (E,); kept under the model hash."""
        key = (self.key, "user", user)
        state = self.cache.get(key)
        if state is None:
            state = tuple(x.copy() for x in (*self.history.of(user), self.met.of(user)[0]))
            self.cache.put(key, state, sum(x.nbytes for x in state) + 200)
        return state

    def case(self, ask: Ask) -> Case:
        """An Ask in dense ids. Unknown items and categories are named in it; they are no error.

        Raises PageLLMError for a page longer than the context has room for, or a page to score that repeats an item.
        """
        if ask.page is None and ask.k > self.slots(ask.policy):
            raise PageLLMError(
                f"k={ask.k}: this model writes pages of at most {self.slots(ask.policy)} slots"
            )
        unknown: dict[str, None] = {}

        def dense(ids) -> list[int]:
            known = []
            for name in ids:
                if name in self.item_of:
                    known.append(self.item_of[name])
                else:
                    unknown[name] = None
            return known

        user = self.user_of.get(ask.user) if ask.user is not None else None
        nobody = np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.int64)
        items, ratings, seen = nobody if user is None else self.user_state(user)
        given: dict[int, float] = {}
        for name, rating in ask.history:
            for item in dense([name]):
                given.pop(item, None)  # said twice: the later place and rating count
                given[item] = rating
        if given:
            kept = ~np.isin(items, list(given))
            # Prompts show what was liked, as in training; what was not is only kept off the page.
            liked = [i for i, r in given.items() if np.isnan(r) or r > self.positive_above]
            items = np.concatenate([items[kept], np.array(liked, np.int64)])
            ratings = np.concatenate(
                [ratings[kept], np.array([given[i] for i in liked], np.float32)]
            )
            seen = np.concatenate([seen, np.array(list(given), np.int64)])
        f = ask.filters
        seen = np.concatenate([seen, np.array(dense(f.exclude), np.int64)])
        allowed, strange = None, []
        if any(x is not None for x in (f.categories, f.in_stock, f.price_min, f.price_max)):
            allowed = torch.ones(self.shop.n_items, dtype=torch.bool)
            if f.categories is not None:
                strange = list(
                    dict.fromkeys(name for name in f.categories if name not in self.members)
                )
                allowed &= self.only(i for name in f.categories for i in self.members.get(name, ()))
            if f.in_stock is not None:
                allowed &= self.only(dense(f.in_stock))
            if f.price_min is not None:  # NaN compares false: an unknown price fails
                allowed &= self.price >= f.price_min
            if f.price_max is not None:
                allowed &= self.price <= f.price_max
        page = None
        if ask.page is not None:
            page = np.array(dense(ask.page), np.int64)
            if len(np.unique(page)) < len(page):
                raise PageLLMError("the page repeats an item; want each at most once")
            if len(page) > min(self.slots(name) for name in self.policies):
                raise PageLLMError(
                    f"a page of {len(page)} items; this model reads at most "
                    f"{min(self.slots(name) for name in self.policies)}"
                )
        return Case(ask, user, items, ratings, seen, allowed, page, list(unknown), strange)

    def only(self, items) -> Tensor:
        mask = torch.zeros(self.shop.n_items, dtype=torch.bool)
        mask[torch.as_tensor(list(items), dtype=torch.long)] = True
        return mask

    def read_prompts(
        self, name: str, rows: list[list[int]], k: int
    ) -> tuple[Tensor, Tensor, tuple[KVCache, Tensor]]:
        """ids (B, P), valid (B, P), and what `decode` starts from; prompts read before come from the cache.

        name  a policy, or "reward" for the reward model's trunk
        Keys and values do not depend on the padding, since positions count valid tokens only.
        """
        model, pad = (
            (self.reward.trunk, self.reader.vocab.pad)
            if name == "reward"
            else (self.policies[name].model, self.policies[name].vocab.pad)
        )
        keys = [(self.hashes[name], "prompt", tuple(row)) for row in rows]
        kept = {key: self.cache.get(key) for key in dict.fromkeys(keys)}
        fresh = [key for key, columns in kept.items() if columns is None]
        if fresh:
            ids, valid = left_pad([list(key[2]) for key in fresh], pad)
            ids, valid = ids.to(model.word.device), valid.to(model.word.device)
            cache = KVCache(model.shape, len(fresh), ids.shape[1], model.word)
            hidden = model(ids, valid, cache)[:, -1]
            # (2, L, B, H, P, D)
            kv = torch.stack([torch.stack(cache.keys), torch.stack(cache.values)])
            for row, key in enumerate(fresh):
                columns = (
                    kv[:, :, row, :, ids.shape[1] - len(key[2]) :].clone(),
                    hidden[row].clone(),
                )
                kept[key] = columns
                self.cache.put(
                    key, columns, sum(x.nbytes for x in columns) + 16 * len(key[2]) + 400
                )
        ids, valid = left_pad(rows, pad)
        ids, valid = ids.to(model.word.device), valid.to(model.word.device)
        P, shape = ids.shape[1], model.shape
        # Zeros, not empty: attention multiplies padding by a weight of 0, and 0 times NaN is NaN.
        kv = model.word.new_zeros(
            2, shape.n_layer, len(rows), shape.n_kv_head, P + k, shape.head_dim
        )
        for row, key in enumerate(keys):
            kv[:, :, row, :, P - len(key[2]) : P] = kept[key][0]
        cache = KVCache(shape, 0, 0, model.word)
        cache.keys, cache.values, cache.length = list(kv[0]), list(kv[1]), P
        return ids, valid, (cache, torch.stack([kept[key][1] for key in keys]))

    @torch.no_grad()
    def write(self, name: str, cases: list[Case], k: int, mode: str) -> tuple[Pages, Tensor]:
        """Pages of k slots by one policy, and the legal set (B, N) they started from. Filters hold in every slot."""
        p = self.policies[name]
        started = time.perf_counter()
        ids, valid, start = self.read_prompts(name, prompt_rows(p, cases), k)
        self.observe("prompt", time.perf_counter() - started)
        started = time.perf_counter()
        excluded = torch.from_numpy(
            pad_ids([c.seen for c in cases], -1, max([1, *(len(c.seen) for c in cases)]))
        )
        allowed = None
        if any(c.allowed is not None for c in cases):
            every = torch.ones(self.shop.n_items, dtype=torch.bool)
            allowed = torch.stack([every if c.allowed is None else c.allowed for c in cases]).to(
                ids.device
            )
        constraint = LegalItems(excluded.to(ids.device), p.model.n_items, allowed)
        legal = constraint.legal.clone()
        if mode == "beam":
            pages = beam(p.model, ids, valid, constraint, k, self.width, start)
        else:
            pages = {"greedy": greedy, "one_shot": one_shot}[mode](
                p.model, ids, valid, constraint, k, start
            )
        self.observe("decode", time.perf_counter() - started)
        return pages, legal

    @torch.no_grad()
    def judge(self, cases: list[Case], item: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """token_reward (B, K), page_reward (B,) of given pages, on the CPU."""
        started = time.perf_counter()
        prompt, valid, start = self.read_prompts(
            "reward", prompt_rows(self.reader, cases), item.shape[1]
        )
        token, page = self.reward(
            prompt, valid, item.to(prompt.device), mask.to(prompt.device), start
        )
        self.observe("reward", time.perf_counter() - started)
        return token.cpu(), page.cpu()

    def group(self, ask: Ask) -> tuple:
        """Asks of one group go through the network together. A greedy page of 10 is the head of the page of 20."""
        if ask.page is not None:
            return ("score",)
        return (ask.policy, ask.mode, ask.k if ask.mode == "beam" else 0)

    def answers(self, asks: list[Ask]) -> list[dict | PageLLMError]:
        """One answer an ask, in order; where an ask cannot be met, the PageLLMError that says why."""
        out: list = [None] * len(asks)
        groups: dict[tuple, list[int]] = {}
        cases: dict[int, Case] = {}
        for at, ask in enumerate(asks):
            try:
                cases[at] = self.case(ask)
                groups.setdefault(self.group(ask), []).append(at)
            except PageLLMError as error:
                out[at] = error
        for group, places in groups.items():
            some = [cases[at] for at in places]
            if group == ("score",):
                item = torch.from_numpy(
                    pad_ids([c.page for c in some], -1, max([1, *(len(c.page) for c in some)]))
                )
                mask, logp = item >= 0, None
            else:
                pages, _ = self.write(group[0], some, max(c.ask.k for c in some), group[1])
                item, logp = pages.item.cpu(), pages.logp.cpu()
                wanted = torch.tensor([c.ask.k for c in some])
                mask = pages.mask.cpu() & (torch.arange(item.shape[1]) < wanted[:, None])
            token, page = self.judge(some, item, mask)
            started = time.perf_counter()
            for row, (at, case) in enumerate(zip(places, some, strict=True)):
                n = int(mask[row].sum())
                out[at] = self.answer(
                    case,
                    item[row, :n].numpy(),
                    token[row, :n].tolist(),
                    float(page[row]),
                    None if logp is None else logp[row, :n].tolist(),
                )
            self.observe("metrics", time.perf_counter() - started)
        return out

    def answer(
        self,
        case: Case,
        page: np.ndarray,
        token: list[float],
        page_reward: float,
        logp: list[float] | None,
    ) -> dict:
        """Plain values of one page: what POST /v1/page documents."""
        ask, c = case.ask, self.shop.catalogue
        held = (
            dict(zip(*(x.tolist() for x in self.held.of(case.user)), strict=True))
            if case.user is not None
            else {}
        )
        worth = np.array(
            [float(gain(held[i], self.s[i])) if i in held else 0.0 for i in page.tolist()]
        )
        slots = [
            {
                "rank": k + 1,
                **self.cards[i],
                "score": None if logp is None else round(logp[k], 6),
                "token_reward": round(token[k], 6),
            }
            for k, i in enumerate(page.tolist())
        ]
        if ask.explain:
            for slot, i, why in zip(
                slots, page.tolist(), self.similar(ask.policy, page, case.items), strict=True
            ):
                slot |= {"held_out": i in held, "similar": why}
        notes = []
        if ask.page is None and len(page) < ask.k:
            notes.append(f"{len(page)} of {ask.k} slots: no more items pass the filters")
        return {
            "user": {"id": ask.user, "known": case.user is not None, "history": len(case.items)},
            "items": slots,
            "page_reward": round(page_reward, 6) if len(page) else None,
            "energy": round(
                float(
                    page_energy(
                        page[None], np.ones((1, len(page)), bool), worth[None], c.leaf_id, self.near
                    )[0]
                ),
                6,
            ),
            "ild": rounded(metrics.ild(page.tolist(), c.categories)),
            "entropy": rounded(metrics.entropy(page.tolist(), c.categories)),
            "unknown": {
                "user": ask.user is not None and case.user is None,
                "items": case.unknown_items,
                "categories": case.unknown_categories,
            },
            "notes": notes,
            "policy": ask.policy,
            "model": self.hashes[ask.policy],
            "reward_model": self.hashes["reward"],
        }

    def similar(
        self, policy: str, page: np.ndarray, history: np.ndarray, most: int = 2
    ) -> list[list[dict]]:
        """For each slot the items of the history nearest to its item, by cosine of the policy's item rows."""
        if not len(page) or not len(history):
            return [[] for _ in page]
        unit = self.unit[policy]
        close = (unit[torch.from_numpy(page)] @ unit[torch.from_numpy(history)].T).topk(
            min(most, len(history)), dim=1
        )
        return [
            [
                {
                    "item": self.cards[history[j]]["item"],
                    "title": self.cards[history[j]]["title"],
                    "similarity": round(v, 4),
                }
                for v, j in zip(value, index, strict=True)
            ]
            for value, index in zip(close.values.tolist(), close.indices.tolist(), strict=True)
        ]


def prompt_rows(policy: Policy, cases: list[Case]) -> list[list[int]]:
    """The token ids of each case's page prompt, unpadded."""
    return [
        policy.prompts.page(c.user if policy.style.use_user else None, c.items, c.ratings)
        for c in cases
    ]


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
