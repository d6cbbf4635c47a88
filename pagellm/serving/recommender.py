"""Pages on request: each Ask in the shop's own ids gets an answer of plain values.

    recommender = Recommender.load(config)                          # config: a Sources
    answer, = recommender.answers([Ask(user="A1B2", k=20, filters=Filters(price_max=30.0))])

Many Asks are answered in one batch. Filters are applied during decoding, in every slot. A Cache
keeps the prompts and user states of earlier Asks. `pagellm recommend` prints the answers or writes
them to a file; `pagellm serve` sends them over HTTP.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pagellm.data.dropped import LeftOut
from pagellm.data.shop import Shop, liked_above, load
from pagellm.model import lora
from pagellm.model.backbone import KVCache
from pagellm.model.composer import POOL, Composed, Composer, load_composer
from pagellm.model.decode import LegalItems, Pages, beam, greedy, hybrid, one_shot
from pagellm.model.judges import History, People
from pagellm.model.policy import Policy
from pagellm.model.prompts import left_pad, pad_ids
from pagellm.model.reward_model import RewardModel
from pagellm.model.shortlist import Shortlist, best_items
from pagellm.pages import metrics
from pagellm.pages.energy import gain, page_energy
from pagellm.pages.rerank import Kin
from pagellm.pages.truth import item_scores
from pagellm.pages.variety import STRENGTH, Variety
from pagellm.serving.cache import Cache
from pagellm.serving.filters import Filters, allowed_items, category_members, look_up
from pagellm.serving.newcomers import NEW_DAYS, check_times, is_new, with_new
from pagellm.serving.sources import (
    NEED,
    PLAIN,
    POLICIES,
    WRITERS,
    Sources,
    known_rows,
    split_in_words,
)
from pagellm.stage.config import PageLLMError
from pagellm.stage.dist import pick_device
from pagellm.stage.run import file_id, finished

__all__ = ["Ask", "Recommender", "ResolvedAsk", "no_observer"]


@dataclass(frozen=True)
class Ask:
    """A request for one page, in the shop's own ids and names.

    user     the shop's id; None or an unknown id: a stranger, whose prompt begins with <user_unk>;
             so does that of a user whom the k-core left out
    history  (item id, rating 1..5 or NaN), oldest first; follows what is stored of a known user,
             or of one whom the k-core left out
    mode     of decoding, for ppo and sft: greedy, beam or one_shot; empty: what validation chose
    policy   compose, ppo, sft or plain; empty: the best on validation of those that are loaded
    variety  inside decoding, for ppo and sft: none, mmr or energy, at `strength` nats
    page     item ids of a page to be scored instead of written, in order
    new_items  slots that are kept for new items, at most k; None: as many as the Recommender keeps
    """

    user: str | None = None
    history: tuple[tuple[str, float], ...] = ()
    k: int = 20
    mode: str = ""
    policy: str = ""
    variety: str = "none"
    strength: float = STRENGTH
    filters: Filters = field(default_factory=Filters)
    page: tuple[str, ...] | None = None
    explain: bool = False
    new_items: int | None = None


@dataclass
class ResolvedAsk:
    """An Ask in dense ids.

    policy          the policy that writes the page
    mode            how it decodes; empty for composed pages and the plain row
    user            row of the user table; None: a stranger
    items, ratings  (H,) liked items of the prompt, oldest first
    seen            (E,) items that no slot may hold: all that the user has met, or of these only
                    the disliked where the filters allow what was seen; and those excluded
    allowed         (N,) bool; None: no filter
    page            (L,) items to be scored; None: a page is to be written
    """

    ask: Ask
    policy: str
    mode: str
    user: int | None
    items: np.ndarray
    ratings: np.ndarray
    seen: np.ndarray
    allowed: Tensor | None
    page: np.ndarray | None
    unknown_items: list[str]
    unknown_categories: list[str]


def no_observer(stage: str, seconds: float) -> None:
    """The default observer of a Recommender."""


class Recommender:
    """Policies, reward model and shop as they were at one moment; never changed, only replaced.

    policies  the networks: "ppo", "sft", both, or neither where there is a composer
    composer  writes the pages of "compose" and of "plain"; None: these are not there
    default   writes the page of an Ask that names no policy; empty: the first of WRITERS
    why       why it is the default, in words
    modes     policy -> the mode that an Ask without one is decoded in; greedy where it is missing
    reward    None: pages are written without rewards, which are then None in the answers
    hashes    policy or "reward" -> id of its weights
    split     of sources.SPLITS: which rows are held out
    cache     may be shared with an earlier Recommender, since its keys hold the hashes
    width     pages that a beam keeps
    positive_above  rating on 1..5 above which a row of a history is liked
    left_out  users whom the k-core left out, with their histories; None: nobody
    candidates  items of a shortlist: the best of the first slot, of which pages are then made;
              0: the whole catalogue
    new_items  slots of a page that are kept for new items, where an Ask says nothing
    new_days  an item is new if its first row lies within so many last days of the log
    seen      whether pages hide what a person has met, or allow it, where an Ask says nothing
    observe   called with (stage, seconds); the stages are prompt, decode, reward and metrics
    """

    def __init__(
        self,
        shop: Shop,
        policies: dict[str, Policy],
        reward: RewardModel | None,
        hashes: dict[str, str],
        split: str = "none",
        cache: Cache | None = None,
        positive_above: float = 3.0,
        width: int = 4,
        candidates: int = 0,
        observe: Callable[[str, float], None] = no_observer,
        composer: Composer | None = None,
        default: str = "",
        why: str = "",
        modes: dict[str, str] | None = None,
        left_out: LeftOut | None = None,
        new_items: int = 0,
        new_days: float = NEW_DAYS,
        seen: str = "hide",
    ):
        self.networks = dict(policies)
        if composer is not None and composer.policy is not None:
            self.networks["compose"] = composer.policy
        sizes = {name: (p.vocab.n_users, p.vocab.n_items) for name, p in self.networks.items()}
        if reward is not None:
            sizes["reward"] = (reward.trunk.n_users, reward.trunk.n_items)
        for name, have in sizes.items():
            if have != (shop.n_users, shop.n_items):
                raise PageLLMError(
                    f"{name} was made for {have[0]} users and {have[1]} items, the data have "
                    f"{shop.n_users} and {shop.n_items}; train on these data first"
                )
        self.shop, self.policies, self.reward, self.hashes = shop, policies, reward, hashes
        self.composer, self.modes, self.why = composer, modes or {}, why
        there = [name for name in WRITERS if name in policies or name == "compose" and composer]
        self.names = (*there, *([PLAIN] if composer is not None and composer.plain else []))
        self.default = default or self.names[0]
        self.split, self.width, self.positive_above = split, width, positive_above
        self.candidates, self.left_out = candidates, left_out or LeftOut.none()
        self.cache, self.observe = Cache(64 << 20) if cache is None else cache, observe
        # writes the reward model's prompts
        self.reader = next(
            (self.networks[n] for n in ("sft", "ppo", "compose") if n in self.networks), None
        )
        made = None if composer is None else composer.made
        self.prompt_key = {"compose": made.proposer if made else "compose"} | hashes_of(hashes)
        self.key = ":".join(hashes[name] for name in sorted(hashes))
        c = shop.catalogue
        self.user_of = {name: i for i, name in enumerate(shop.user_ids)}
        self.item_of = {name: i for i, name in enumerate(c.ids)}
        self.history, self.met, self.held = known_rows(shop, split)
        self.kin = Kin.of(c) if composer is None else composer.kin
        self.s, self.near = item_scores(shop), self.kin.near
        told = shop.rows(None if split == "none" else "train", None)
        self.told = None if composer is None else History.of(shop, told)
        self.price, self.members = torch.from_numpy(c.price), category_members(c)
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
        rows = {name: p.model.item.detach().float() for name, p in self.networks.items()}
        if composer is not None:
            rows = {"compose": composer.judges.spaces["levels"].items} | rows
            if composer.plain:
                rows[PLAIN] = composer.plain.space.items
        self.unit = {name: F.normalize(x, dim=1).cpu() for name, x in rows.items()}
        self.kinds: dict[tuple[str, float], Variety] = {}
        self.new_items, self.new, self.seen = new_items, is_new(shop, new_days), seen
        if new_items:
            check_times(shop)

    @classmethod
    def load(
        cls,
        config: Sources,
        policies: Sequence[str] | None = None,
        reward: bool | None = None,
        why: str = "asked for",
        **more,
    ) -> "Recommender":
        """Read what `config` names.

        policies  those that must be there, the default first; None: all that are finished, at
                  least one, the best on validation being the default
        reward    whether the reward model is read; None: if it is finished
        why       why the first of `policies` is the default
        more      further arguments of the constructor
        Raises PageLLMError for a stage that is missing, unfinished, or just changing.
        """
        names = list(config.policies_there() if policies is None else policies)
        chosen = config.default() if policies is None else None
        default, why = (chosen.policy, chosen.why) if chosen else (names[0], why)
        names = list(dict.fromkeys("compose" if name == PLAIN else name for name in names))
        if config.reward_there() if reward is None else reward:
            names.append("reward")
        hashes = {
            name: finished(config.where(name), NEED[name], config.make(name))["id"]
            for name in names
        }
        shop, device = load(config.data_dir), pick_device(config.device)
        data = file_id(config.data_dir / "source.json")
        loaded = {
            name: Policy.load(config.where(name), device) for name in names if name in POLICIES
        }
        composer = None
        if "compose" in names:
            make = config.make("compose")
            composer = load_composer(
                config.where("compose"), shop, config.proposer, device, data, make
            )
            same = [n for n in loaded if composer.made and hashes[n] == composer.made.proposer]
            composer.policy = loaded[same[0]] if same else composer.policy
        for policy in (*loaded.values(), composer and composer.policy):
            if policy:
                policy.model.requires_grad_(False)
                lora.merge(policy.model)
        rewards = (
            RewardModel.load(config.where("reward"), device).requires_grad_(False)
            if "reward" in names
            else None
        )
        # load_model_file has checked each file against its `done`. This checks that `done` is
        # still the one that was read above.
        for name in names:
            if finished(config.where(name), NEED[name], config.make(name))["id"] != hashes[name]:
                raise PageLLMError(f"{config.where(name)} changed while it was read; try again")
        return cls(
            shop,
            loaded,
            rewards,
            hashes | {"data": data},
            config.split,
            positive_above=liked_above(config.data_dir),
            left_out=LeftOut.read(shop),
            composer=composer,
            default=default,
            why=why,
            modes={name: config.mode_of(name) for name in loaded},
            **more,
        )

    def in_words(self) -> str:
        """What is loaded and which rows are held out, for the screen."""
        models = [f"{name} {self.hashes[name]}" for name in self.names if name in self.hashes]
        rewards = (
            "no reward model" if self.reward is None else f"reward model {self.hashes['reward']}"
        )
        return f"{', '.join(models)}, {rewards}; {split_in_words(self.split, self.seen)}"

    def choice_in_words(self) -> str:
        """Which policy writes where none is named, how it decodes, and why."""
        mode = f", decoded {self.modes[self.default]}" if self.default in self.modes else ""
        return f"{self.default}{mode}: {self.why}"

    def slots(self, policy: str) -> int:
        """The longest page that fits after the longest prompt; of composed pages, in the pool."""
        p = self.networks.get(policy, self.reader)
        room = POOL if p is None else p.model.shape.n_ctx - p.prompts.page_room
        return room if policy in POLICIES else min(room, POOL)

    def user_state(self, user: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """items, ratings (H,) of the prompt, and seen (E,); kept in the cache."""
        key = (self.key, "user", user)
        state = self.cache.get(key)
        if state is None:
            state = tuple(x.copy() for x in (*self.history.of(user), self.met.of(user)[0]))
            self.cache.put(key, state, sum(x.nbytes for x in state) + 200)
        return state

    def why_none(self, filters: Filters) -> str:
        """Why no item can pass these filters, in words; "" where some item can."""
        by_price = filters.price_min is not None or filters.price_max is not None
        if by_price and bool(self.price.isnan().all()):
            return "no item of this data set has a price, so none passes a price filter"
        return ""

    def resolve(self, ask: Ask) -> ResolvedAsk:
        """An Ask in dense ids. Unknown items and categories are named in it; they are no error.

        Raises PageLLMError for a policy that is not loaded, a page longer than the context has
        room for, and a page to score that repeats an item.
        """
        policy = ask.policy or self.default
        if policy not in self.names:
            raise PageLLMError(
                f"policy={policy}: not served here, there is {', '.join(self.names)}"
            )
        if ask.page is None and ask.k > self.slots(policy):
            raise PageLLMError(
                f"k={ask.k}: this model writes pages of at most {self.slots(policy)} slots"
            )
        if ask.page is None and (n := self.kept(ask)):
            check_times(self.shop)
            if n > ask.k:
                raise PageLLMError(f"new_items={n}: a page of k={ask.k} has not so many slots")
        user = self.user_of.get(ask.user) if ask.user is not None else None
        if user is None and (stored := self.left_out.of(ask.user)):
            ask = replace(ask, history=(*stored, *ask.history))
        items, ratings, seen, unknown = self.past(user, ask.history)
        f = ask.filters
        if (f.seen or self.seen) == "allow":
            seen = np.setdiff1d(seen, items)
        excluded, strange = look_up(f.exclude, self.item_of)
        unknown += strange + look_up(f.in_stock or (), self.item_of)[1]
        page = None
        if ask.page is not None:
            page, strange = self.given_page(ask.page)
            unknown += strange
        return ResolvedAsk(
            ask,
            policy,
            self.mode(ask, policy),
            user,
            items,
            ratings,
            np.concatenate([seen, np.array(excluded, np.int64)]),
            allowed_items(f, self.item_of, self.members, self.price),
            page,
            list(dict.fromkeys(unknown)),
            list(dict.fromkeys(n for n in f.categories or () if n not in self.members)),
        )

    def past(
        self, user: int | None, history: Sequence[tuple[str, float]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
        """items, ratings (H,) of the prompt, seen (E,), and the history's unknown ids.

        `history` follows what is stored of the user. Prompts show what was liked, as in training;
        what was not liked is only kept off the page.
        """
        nobody = np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.int64)
        items, ratings, seen = nobody if user is None else self.user_state(user)
        unknown: list[str] = []
        given: dict[int, float] = {}
        for name, rating in history:
            if name not in self.item_of:
                unknown.append(name)
                continue
            item = self.item_of[name]
            given.pop(item, None)  # named twice: the later place and rating count
            given[item] = rating
        if given:
            kept = ~np.isin(items, list(given))
            liked = [i for i, r in given.items() if np.isnan(r) or r > self.positive_above]
            new = np.array([given[i] for i in liked], np.float32)
            items = np.concatenate([items[kept], np.array(liked, np.int64)])
            ratings = np.concatenate([ratings[kept], new])
            seen = np.concatenate([seen, np.array(list(given), np.int64)])
        return items, ratings, seen, unknown

    def given_page(self, names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        """(L,) dense ids of a page to score, and its unknown ids. Errors as in `resolve`."""
        known, unknown = look_up(names, self.item_of)
        if len(set(known)) < len(known):
            raise PageLLMError("the page repeats an item; want each at most once")
        room = min(self.slots(name) for name in self.names)
        if len(known) > room:
            raise PageLLMError(f"a page of {len(known)} items; this model reads at most {room}")
        return np.array(known, np.int64), unknown

    def read_prompts(
        self, name: str, rows: list[list[int]], k: int
    ) -> tuple[Tensor, Tensor, tuple[KVCache, Tensor]]:
        """ids (B, P), valid (B, P), and the `start` that decoding takes: the prompts, already read.

        name  a policy, or "reward" for the reward model's trunk
        rows  token ids of each prompt; those that were read before come from the cache
        k     slots that the start has room for
        Keys and values do not depend on padding, since positions count valid tokens only.
        """
        if name == "reward":
            assert self.reward is not None
            assert self.reader is not None
            model, pad = self.reward.trunk, self.reader.vocab.pad
        else:
            model, pad = self.networks[name].model, self.networks[name].vocab.pad
        keys = [(self.prompt_key[name], "prompt", tuple(row)) for row in rows]
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
                    *(x[row].clone() for x in cache.pooled or ()),
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
        if model.blend is not None:
            total, count = (torch.stack([kept[key][part] for key in keys]) for part in (2, 3))
            cache.pooled = (total, count)
        return ids, valid, (cache, torch.stack([kept[key][1] for key in keys]))

    @torch.no_grad()
    def write(
        self,
        name: str,
        asks: list[ResolvedAsk],
        k: int,
        mode: str,
        depth: int = 0,
        variety: Variety | None = None,
    ) -> tuple[Pages, Tensor, Shortlist | None]:
        """Pages of k slots by sft or ppo, and the legal set (B, N) before any slot was filled.

        depth    ranks that shall be known of each user: shortlists are at least so long
        variety  inside decoding; it needs the whole catalogue, so no shortlist is made
        returns  and the shortlists, if pages are made of such; the legal set is then (B, S)
        """
        p = self.policies[name]
        started = time.perf_counter()
        ids, valid, start = self.read_prompts(name, prompt_rows(p, asks), k)
        self.observe("prompt", time.perf_counter() - started)
        started = time.perf_counter()
        width = max([1, *(len(a.seen) for a in asks)])
        excluded = torch.from_numpy(pad_ids([a.seen for a in asks], -1, width))
        allowed = None
        if any(a.allowed is not None for a in asks):
            every = torch.ones(self.shop.n_items, dtype=torch.bool)
            allowed = torch.stack([every if a.allowed is None else a.allowed for a in asks])
            allowed = allowed.to(ids.device)
        excluded, size, short = excluded.to(ids.device), max(self.candidates, k, depth), None
        if variety is None and 0 < self.candidates and size < p.model.n_items:
            found = best_items(start[1], p.model.scored_items(), excluded, size, allowed=allowed)
            short = Shortlist(p.model, found)
            constraint = short.constraint()
        else:
            constraint = LegalItems(excluded, p.model.n_items, allowed, variety)
        legal = constraint.legal.clone()
        if mode == "beam":
            pages = beam(p.model, ids, valid, constraint, k, self.width, start, short)
        elif mode == "greedy":
            pages = greedy(p.model, ids, valid, constraint, k, start, short=short)
        elif mode == "hybrid":
            pages = hybrid(p.model, ids, valid, constraint, k, start=start, short=short)
        else:
            pages = one_shot(p.model, ids, valid, constraint, k, start, short=short)
        self.observe("decode", time.perf_counter() - started)
        return pages, legal, short

    @torch.no_grad()
    def compose(self, name: str, asks: list[ResolvedAsk], k: int, depth: int = 0) -> Composed:
        """Composed pages of k slots (name: compose), or those of the plain row (plain).

        depth  ranks in all, at most composer.POOL; 0: k
        """
        composer, logp = self.composer, None
        assert composer is not None
        started = time.perf_counter()
        people = None if name == PLAIN else People.joined([self.person(asked) for asked in asks])
        folded = time.perf_counter() - started
        if people is not None and name in self.networks and composer.asks_policy(people):
            started = time.perf_counter()
            proposer = self.networks[name]
            _, _, (_, hidden) = self.read_prompts(name, prompt_rows(proposer, asks), 0)
            logp = proposer.model.item_logits(hidden).log_softmax(1).float().cpu().numpy()
            self.observe("prompt", time.perf_counter() - started)
        started = time.perf_counter()
        legal = np.ones((len(asks), self.shop.n_items), bool)
        for row, asked in enumerate(asks):
            legal[row, asked.seen] = False
            if asked.allowed is not None:
                legal[row] &= asked.allowed.numpy()
        if people is None:
            assert composer.plain is not None
            liked = History.joined([self.events(asked) for asked in asks]).part(True)
            found = composer.plain.write(liked, legal, self.kin, k, depth or k)
        else:
            found = composer.write(people, logp, legal, k, depth)
        self.observe("decode", folded + time.perf_counter() - started)
        return found

    def events(self, asked: ResolvedAsk) -> tuple[np.ndarray, ...]:
        """items, ratings, liked and time of a person: what is stored, then what was given.

        What was given has no time, and counts as of the last day that the judges know.
        """
        assert self.told is not None and self.composer is not None
        nobody = (np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, bool), np.zeros(0))
        stored: tuple[np.ndarray, ...] = nobody
        if asked.user is not None:
            stored = self.told.one(asked.user)
        given: dict[int, float] = {}
        for name, rating in asked.ask.history:
            if name in self.item_of:
                given.pop(self.item_of[name], None)  # as in `past`
                given[self.item_of[name]] = rating
        if not given:
            return stored
        items, ratings = np.array(list(given)), np.array(list(given.values()), np.float32)
        liked = np.isnan(ratings) | (ratings > self.positive_above)
        kept = ~np.isin(stored[0], items)
        new = (items, ratings, liked, np.full(len(items), self.composer.judges.now))
        return tuple(np.concatenate([a[kept], b]) for a, b in zip(stored, new, strict=True))

    def person(self, asked: ResolvedAsk) -> People:
        """What the judges know of a person; of a user without new events kept in the cache.

        Where rows are held out and nothing was given, that is what the judges were fitted to.
        """
        assert self.composer is not None
        judges = self.composer.judges
        if asked.user is None or asked.ask.history:
            return judges.people(History.joined([self.events(asked)]))
        key = (self.key, "person", asked.user)
        found: People | None = self.cache.get(key)
        if found is None:
            if self.split != "none":
                found = judges.known.select(np.array([asked.user]))
            else:
                found = judges.people(History.joined([self.events(asked)]))
            size = 4000 + sum(x.nbytes for x in found.factors.values())
            size += sum(x.nbytes for x in found.profile)
            self.cache.put(key, found, size)
        return found

    @torch.no_grad()
    def rewards(
        self, asks: list[ResolvedAsk], item: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """token_reward (B, K) and page_reward (B,) of given pages, on the CPU.

        item, mask  (B, K) as in decode.Pages
        None without a reward model, or without a policy whose prompts it reads.
        """
        if self.reward is None or self.reader is None:
            return None
        started = time.perf_counter()
        rows = prompt_rows(self.reader, asks)
        prompt, valid, start = self.read_prompts("reward", rows, item.shape[1])
        token, page = self.reward(
            prompt, valid, item.to(prompt.device), mask.to(prompt.device), start
        )
        self.observe("reward", time.perf_counter() - started)
        return token.cpu(), page.cpu()

    def mode(self, ask: Ask, policy: str) -> str:
        """How a policy decodes for an Ask; empty for composed pages and the plain row."""
        if policy not in POLICIES:
            return ""
        return ask.mode or self.modes.get(policy, "greedy")

    def variety(self, method: str, strength: float) -> Variety | None:
        """What varies pages inside decoding; None for none. What it has computed is kept."""
        if method == "none":
            return None
        if (method, strength) not in self.kinds:
            if len(self.kinds) > 8:
                self.kinds.clear()
            self.kinds[method, strength] = Variety(self.kin, method, strength)
        return self.kinds[method, strength]

    def group(self, ask: Ask) -> tuple:
        """Asks of one group go through the network together.

        A greedy page of 10 slots is the head of the page of 20, so those may have any k. That is
        not so of beams and of composed pages.
        """
        if ask.page is not None:
            return ("score",)
        policy = ask.policy or self.default
        mode = self.mode(ask, policy)
        whole = mode in ("", "beam")
        varied = (ask.variety, ask.strength) if mode and ask.variety != "none" else ("none", 0.0)
        return (policy, mode, ask.k if whole else 0, *varied, self.kept(ask))

    def kept(self, ask: Ask) -> int:
        """Slots of an Ask's page that are kept for new items."""
        return min(self.new_items, ask.k) if ask.new_items is None else ask.new_items

    def answers(self, asks: list[Ask]) -> list[dict | PageLLMError]:
        """One answer an ask, in order; for an ask that cannot be met, the error that says why."""
        out: list = [None] * len(asks)
        groups: dict[tuple, list[int]] = {}
        resolved: dict[int, ResolvedAsk] = {}
        for at, ask in enumerate(asks):
            try:
                resolved[at] = self.resolve(ask)
                groups.setdefault(self.group(ask), []).append(at)
            except PageLLMError as error:
                out[at] = error
        for group, places in groups.items():
            some = [resolved[at] for at in places]
            item, mask, logp = self.pages(group, some)
            if group[-1] and group != ("score",) and logp is not None:
                item, logp = self.with_newcomers(group, some, item, mask, logp)
            rewards = self.rewards(some, item, mask)
            started = time.perf_counter()
            for row, at in enumerate(places):
                n = int(mask[row].sum())
                out[at] = self.answer(
                    some[row],
                    item[row, :n].numpy(),
                    None if rewards is None else rewards[0][row, :n].tolist(),
                    None if rewards is None else float(rewards[1][row]),
                    None if logp is None else logp[row, :n].tolist(),
                )
            self.observe("metrics", time.perf_counter() - started)
        return out

    def pages(self, group: tuple, asks: list[ResolvedAsk]) -> tuple[Tensor, Tensor, Tensor | None]:
        """item, mask (B, K) of one group's pages on the CPU, and logp (B, K) if written here."""
        if group == ("score",):
            given = [a.page for a in asks if a.page is not None]
            item = torch.from_numpy(pad_ids(given, -1, max([1, *map(len, given)])))
            return item, item >= 0, None
        name, mode, _, method, strength, _ = group
        k = max(a.ask.k for a in asks)
        if not mode:
            made = self.compose(name, asks, k)
            item = torch.from_numpy(made.item)
            worth = made.chance if name == PLAIN else np.log(np.maximum(made.chance, 1e-12))
            there = (item >= 0) & (
                torch.arange(item.shape[1]) < torch.from_numpy(made.slots)[:, None]
            )
            return item, there, torch.from_numpy(worth)
        varied = self.variety(method, strength)
        written, _, _ = self.write(name, asks, k, mode, variety=varied)
        wanted = torch.tensor([a.ask.k for a in asks])
        mask = written.mask.cpu() & (torch.arange(written.item.shape[1]) < wanted[:, None])
        return written.item.cpu(), mask, written.logp.cpu()

    def with_newcomers(
        self, group: tuple, asks: list[ResolvedAsk], item: Tensor, mask: Tensor, worth: Tensor
    ) -> tuple[Tensor, Tensor]:
        """item, worth (B, K) of the pages, with the new items that the group's Asks want.

        item, mask, worth  as `pages` returns them. What a new item is worth is said among those.
        """
        lengths = mask.sum(1).tolist()
        pages = [row[:length] for row, length in zip(item.tolist(), lengths, strict=True)]
        item, worth = item.clone(), worth.clone()
        for row, fresh in enumerate(self.newcomers(group, asks, pages)):
            known = dict(zip(pages[row], worth[row].tolist(), strict=False)) | fresh
            page = with_new(pages[row], list(fresh), self.new, group[-1])
            item[row, : len(page)] = torch.tensor(page, dtype=item.dtype)
            worth[row, : len(page)] = torch.tensor([known[i] for i in page], dtype=worth.dtype)
        return item, worth

    def newcomers(
        self, group: tuple, asks: list[ResolvedAsk], pages: list[list[int]]
    ) -> list[dict[int, float]]:
        """For each page new items that are not on it, the best first, and what they are worth.

        {} for a page that has as many as the group's Asks want.
        """
        n, new = group[-1], torch.from_numpy(self.new)
        out: list[dict[int, float]] = [{} for _ in pages]
        lacking = [at for at, page in enumerate(pages) if page and int(self.new[page].sum()) < n]
        only = [
            replace(
                asks[at],
                ask=replace(asks[at].ask, k=n),
                allowed=new if (had := asks[at].allowed) is None else had & new,
                seen=np.concatenate([asks[at].seen, np.array(pages[at], np.int64)]),
            )
            for at in lacking
        ]
        if only:
            item, mask, worth = self.pages(group, only)
            assert worth is not None
            for row, at in enumerate(lacking):
                there = mask[row]
                found = zip(item[row][there].tolist(), worth[row][there].tolist(), strict=True)
                out[at] = dict(found)
        return out

    def answer(
        self,
        asked: ResolvedAsk,
        page: np.ndarray,
        token: list[float] | None,
        page_reward: float | None,
        logp: list[float] | None,
    ) -> dict:
        """Plain values of one page: what POST /v1/page documents.

        token, page_reward  None without a reward model        logp  None for a page that was given
        """
        ask, c = asked.ask, self.shop.catalogue
        held = self.held_out(asked.user)
        gains = [
            float(gain(np.asarray(held[i]), self.s[i])) if i in held else 0.0 for i in page.tolist()
        ]
        energy = page_energy(
            page[None], np.ones((1, len(page)), bool), np.array(gains)[None], c.leaf_id, self.near
        )
        slots = [
            {
                "rank": k + 1,
                **self.cards[i],
                "score": None if logp is None else round(logp[k], 6),
                "token_reward": None if token is None else round(token[k], 6),
            }
            for k, i in enumerate(page.tolist())
        ]
        if ask.explain:
            near = self.similar(asked.policy, page, asked.items)
            for slot, i, why in zip(slots, page.tolist(), near, strict=True):
                slot |= {"held_out": i in held, "similar": why}
        notes = []
        if ask.page is None and len(page) < ask.k:
            short = self.why_none(ask.filters) or "no more items pass the filters"
            notes.append(f"{len(page)} of {ask.k} slots: {short}")
        return {
            "user": {"id": ask.user, "known": asked.user is not None, "history": len(asked.items)},
            "items": slots,
            "page_reward": rounded(page_reward) if len(page) else None,
            "energy": rounded(float(energy[0])),
            "ild": rounded(metrics.ild(page.tolist(), c.categories)),
            "entropy": rounded(metrics.entropy(page.tolist(), c.categories)),
            "unknown": {
                "user": ask.user is not None and asked.user is None,
                "items": asked.unknown_items,
                "categories": asked.unknown_categories,
            },
            "notes": notes,
            "policy": asked.policy,
            "decoding": asked.mode or None,
            "model": self.hashes["compose" if asked.policy == PLAIN else asked.policy],
            "reward_model": self.hashes.get("reward"),
        }

    def held_out(self, user: int | None) -> dict[int, float]:
        """Dense item id -> rating of what was held out of a user; {} for a stranger."""
        if user is None:
            return {}
        items, ratings = self.held.of(user)
        return dict(zip(items.tolist(), ratings.tolist(), strict=True))

    def similar(
        self, policy: str, page: np.ndarray, history: np.ndarray, most: int = 2
    ) -> list[list[dict]]:
        """For each slot the items of the history that are nearest to its item.

        Near is the cosine of the policy's item rows. `most`: how many.
        """
        if not len(page) or not len(history):
            return [[] for _ in page]
        unit = self.unit[policy]
        cosine = unit[torch.from_numpy(page)] @ unit[torch.from_numpy(history)].T
        close = cosine.topk(min(most, len(history)), dim=1)
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


def prompt_rows(policy: Policy, asks: list[ResolvedAsk]) -> list[list[int]]:
    """The token ids of each page prompt, not padded."""
    return [
        policy.prompts.page(a.user if policy.style.use_user else None, a.items, a.ratings)
        for a in asks
    ]


def hashes_of(hashes: dict[str, str]) -> dict[str, str]:
    """Ids of what reads prompts: sft, ppo and the reward model."""
    return {name: hashes[name] for name in (*POLICIES, "reward") if name in hashes}


def rounded(value: float | None) -> float | None:
    """Six digits after the point; None stays None."""
    return None if value is None else round(value, 6)
