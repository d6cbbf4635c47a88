"""PageLLM's pages: the policy proposes, the outcome model judges, `compose` fills the slots.

    composer = Composer.load("runs/synthetic/compose", shop, policy)
    pages = composer.rank(users, seen, k=20, depth=100)             users as in training
    people = composer.judges.people(history)                        anybody's history
    written = composer.write(people, logp, legal, k=20)

1. The candidates of a user are the policy's best and the plain judges' best (model/judges.py).
2. The outcome network gives each candidate a chance of being picked. A calibration with four
   numbers puts it on the scale of validation rows. Beside the chance it weighs the policy's own
   log-probability and the score of ALS+facts.
3. `compose` (pages/compose.py) makes the page of chances, expected stars and variety.

The file model.pt of the stage `compose` holds all of this, the fitted judges too: loading fits
nothing, and gives the pages of the composer that was saved, bit by bit.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pagellm.data.shop import Rows, Shop
from pagellm.model.als import Space, one_by_one
from pagellm.model.judges import History, Judges, People, legal_items, vars_of
from pagellm.model.outcome import Calibration, Network, Outcome
from pagellm.model.policy import Policy
from pagellm.pages.compose import Opinion, Taste, compose
from pagellm.pages.energy import Near
from pagellm.pages.ranked import RankedPages
from pagellm.pages.rerank import Kin, mmr, placed, relevance
from pagellm.pages.topk import largest
from pagellm.pages.truth import item_scores
from pagellm.stage.config import PageLLMError
from pagellm.stage.files import read_json
from pagellm.stage.run import finished, load_model_file

__all__ = [
    "POOL",
    "Composed",
    "Composer",
    "Maker",
    "PlainRow",
    "load_composer",
    "picks",
    "standardised",
]

POOL = 150  # candidates of a user
WITHIN = 100  # of these, the best by value may stand on a page
BLOCK = 256  # users whose candidates are judged at once
SHRINK = 3.0  # ratings of average height that every item's mean stars begin with


def picks(users: np.ndarray, item: np.ndarray, held: Rows, n_items: int) -> np.ndarray:
    """(U, M) bool: which candidates (U, M) are among the user's held-out items."""
    code = np.repeat(np.arange(len(held.indptr) - 1), held.counts()) * n_items + held.items
    return (item >= 0) & np.isin(users[:, None] * n_items + item, code)


def standardised(score: np.ndarray, there: np.ndarray) -> np.ndarray:
    """score (B, M) where there (B, M) bool, in standard deviations of a user's; 0 elsewhere."""
    z = np.where(there | ~there.any(1, keepdims=True), score, np.nan)
    spread = np.maximum(np.nanstd(z, 1, keepdims=True), 1e-9)
    return np.where(there, (z - np.nanmean(z, 1, keepdims=True)) / spread, 0.0)


class Composed(NamedTuple):
    """Pages of B people. item (B, depth), -1 past the end; score falls; slots (B,) filled.

    chance  (B, depth) of a pick, by rank; 0 past the end
    """

    item: np.ndarray
    score: np.ndarray
    slots: np.ndarray
    chance: np.ndarray


@dataclass(frozen=True)
class PlainRow:
    """What a shop would ship without any of this: ALS with facts, re-ranked by MMR.

    space     item factors of plain.fit("ALS+facts")
    strength  of MMR, which validation chose; relevance is stretched to 0..1
    """

    space: Space
    strength: float

    def write(self, liked: Rows, legal: np.ndarray, kin: Kin, k: int, depth: int) -> Composed:
        """Pages from liked rows; chance is the score. An unknown person's items all score 0."""
        users = self.space.place(liked)
        score = one_by_one(self.space.items, users).numpy()
        score = np.where(legal, score, np.float32(-np.inf))
        item, value = largest(score, max(WITHIN, depth))
        rel = relevance(item[:, :WITHIN], value[:, :WITHIN])
        column = mmr(item[:, :WITHIN], rel, kin, k, self.strength)
        item, lifted = placed(item, value, column)
        slots = np.minimum((item >= 0).sum(1), k)
        kept = item[:, :depth]
        own = np.take_along_axis(score, np.maximum(kept, 0), 1)
        return Composed(kept, lifted[:, :depth], slots, np.where(kept >= 0, own, 0.0))


class Composer:
    """Makes pages of a policy's and the judges' candidates.

    judges   plain models, fitted to train rows
    outcome  the network that gives chances
    policy   whose prompts show the liked items of those same rows; None: the judges propose alone,
             and the policy's log-probability counts as 0
    scale    puts chances on the scale of validation rows, beside the policy and the judge `liked`
    taste    how a page is made of them        unit  the unit of its spread: what a slot is worth
    plain    the plain row that pages can be compared with; None: not kept
    near     of near_duplicates, where it is at hand
    plain_pages  whether the pages are those of the plain row: nothing better was found on
                 validation rows
    """

    def __init__(
        self,
        shop: Shop,
        policy: Policy | None,
        judges: Judges,
        outcome: Outcome,
        scale: Calibration | None = None,
        taste: Taste | None = None,
        unit: float | None = None,
        plain: PlainRow | None = None,
        near: Near | None = None,
        plain_pages: bool = False,
    ):
        self.shop, self.policy, self.judges, self.outcome = shop, policy, judges, outcome
        self.scale, self.taste = scale or Calibration(c=(0.0, 0.0)), taste or Taste()
        self.unit, self.plain, self.plain_pages = unit, plain, plain_pages
        self.made: Maker | None = None  # what it was made from, if a stage has kept it
        self.prompts, self.kin = shop.csr("train"), Kin.of(shop.catalogue, near)
        stars = np.nan_to_num(item_scores(shop, SHRINK), nan=judges.stars.mean)
        self.mean_stars = stars - judges.stars.mean

    def logp(self, users: np.ndarray) -> np.ndarray | None:
        """(B, N) float32 log-probability of every item in the first slot; None without a policy."""
        if self.policy is None:
            return None
        model = self.policy.model
        with torch.no_grad():
            prompt, valid = self.policy.prompt(users, [self.prompts.of(u) for u in users])
            logits = model.item_logits(model(prompt, valid)[:, -1])
            return logits.log_softmax(1).float().cpu().numpy()

    def opinion(self, users: np.ndarray, seen: Rows) -> tuple[Opinion, np.ndarray, np.ndarray]:
        """What is thought of the candidates of some users, none of them in `seen`.

        returns  the opinion, with calibrated chances; the chances before calibration (U, POOL); and
                 what the calibration weighs beside them (U, POOL, 2), in standard deviations of a
                 user's candidates: the policy's log-probability, the judge `liked`
        """
        parts = [
            self.judged(
                self.judges.known.select(some),
                self.logp(some),
                legal_items(seen, some, self.shop.n_items),
            )
            for some in (users[at : at + BLOCK] for at in range(0, len(users), BLOCK))
        ]
        item, raw, others, stars = (np.concatenate(x) for x in zip(*parts, strict=True))
        return self.weighed(users, item, raw, others, stars), raw, others

    def judged(
        self, people: People, logp: np.ndarray | None, legal: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Candidates, raw chances, two more opinions as in `opinion`, stars less their mean.

        people  B of them        logp (B, N) float32 and legal (B, N) bool: of every item
        """
        best = None
        if logp is not None:
            free = np.where(legal, logp, np.float32(-np.inf))
            best, _ = largest(free, min(POOL, free.shape[1]))
        item, x = self.judges.candidates(people, legal, POOL, best)
        at, there = np.maximum(item, 0), item >= 0
        asked = np.zeros(item.shape) if logp is None else np.take_along_axis(logp, at, 1)
        others = [standardised(score, there) for score in (asked, self.judges.score_in(x, "liked"))]
        found = self.judges.stars
        taste = np.einsum("bd,bmd->bm", people.taste.numpy(), found.place.numpy()[at])
        stars = people.bias.numpy()[:, None] + found.item.numpy()[at] + taste
        return item, self.outcome(x), np.stack(others, 2), stars

    def weighed(
        self,
        users: np.ndarray,
        item: np.ndarray,
        raw: np.ndarray,
        others: np.ndarray,
        stars: np.ndarray,
    ) -> Opinion:
        """An opinion, with calibrated chances, from what `judged` gives."""
        chance = np.where(item >= 0, self.scale(raw, others), 0.0)
        return Opinion(users, item, chance, stars, self.mean_stars[np.maximum(item, 0)])

    def page(self, opinion: Opinion, k: int, depth: int) -> tuple[np.ndarray, ...]:
        """item, score (U, depth), slots (U,) of pages made of an opinion."""
        return compose(opinion, self.kin, self.taste, k, depth, WITHIN, self.unit)

    def rank(self, users: np.ndarray, seen: Rows, k: int, depth: int) -> RankedPages:
        """Pages of k and the ranks after them, without items in `seen`."""
        if not self.plain_pages:
            opinion, _, _ = self.opinion(users, seen)
            return RankedPages(users, *self.page(opinion, k, depth))
        return self.rank_plain(users, seen, k, depth)

    def rank_plain(self, users: np.ndarray, seen: Rows, k: int, depth: int) -> RankedPages:
        """`rank` with the pages of `write`: the plain row's where validation chose it."""
        parts = []
        for some in (users[at : at + BLOCK] for at in range(0, len(users), BLOCK)):
            people = self.judges.known.select(some)
            legal = legal_items(seen, some, self.shop.n_items)
            logp = self.logp(some) if self.asks_policy(people) else None
            parts.append(self.write(people, logp, legal, k, depth))
        item, score, slots = (np.concatenate([part[i] for part in parts]) for i in range(3))
        return RankedPages(users, item, score, slots)

    def asks_policy(self, people: People) -> bool:
        """Whether `write` uses the policy's opinion of these people, where there is a policy."""
        return not self.plain_pages or not (people.liked.counts() > 0).all()

    def write(
        self, people: People, logp: np.ndarray | None, legal: np.ndarray, k: int, depth: int = 0
    ) -> Composed:
        """Pages of anybody.

        people   from `judges.people` or `judges.known`
        logp     (B, N) float32: the policy's log-probabilities, or logits, in the first slot; None
                 without a policy
        legal    (B, N) bool: the items that a page may hold
        depth    ranks in all, at most POOL; 0: k
        """
        if not self.plain_pages:
            return self.write_learnt(people, logp, legal, k, depth)
        assert self.plain is not None
        plain = self.plain.write(people.liked, legal, self.kin, k, depth or k)
        if not self.asks_policy(people):
            return plain
        known, learnt = people.liked.counts() > 0, self.write_learnt(people, logp, legal, k, depth)
        # The plain row knows nothing about who likes nothing: all its scores are 0.
        width = min(plain.item.shape[1], learnt.item.shape[1])
        slots = np.where(known, plain.slots, learnt.slots)
        item, score, chance = (
            np.where(known[:, None], getattr(plain, x)[:, :width], getattr(learnt, x)[:, :width])
            for x in ("item", "score", "chance")
        )
        return Composed(item, score, slots, chance)

    def write_learnt(
        self, people: People, logp: np.ndarray | None, legal: np.ndarray, k: int, depth: int = 0
    ) -> Composed:
        """`write` from what was learnt, also where validation chose the plain row."""
        made = self.judged(people, logp, legal)
        opinion = self.weighed(np.arange(len(people)), *made)
        item, score, slots = self.page(opinion, k, depth or k)
        order = np.argsort(opinion.item, axis=1)
        by_item = np.take_along_axis(opinion.item, order, 1)
        chance = np.zeros(item.shape)
        for row, mine in enumerate(item):
            place = np.searchsorted(by_item[row], np.maximum(mine, 0))
            at = order[row, np.minimum(place, order.shape[1] - 1)]
            chance[row] = np.where(mine >= 0, opinion.chance[row, at], 0.0)
        return Composed(item, score, slots, chance)

    def state(self) -> dict:
        """What `load` reads."""
        plain = self.plain
        return {
            "networks": [network.state_dict() for network in self.outcome.networks],
            "scale": asdict(self.scale),
            "taste": asdict(self.taste),
            "unit": self.unit,
            "judges": self.judges.state(),
            "plain": None
            if plain is None
            else {"space": vars_of(plain.space), "strength": plain.strength},
            "plain_pages": self.plain_pages,
        }

    @classmethod
    def load(
        cls, path: str | Path, shop: Shop, policy: Policy | None, near: Near | None = None
    ) -> "Composer":
        """Read model.pt. Matrices of items are mapped from the file, not copied into memory.

        Raises PageLLMError for a file that an earlier version wrote.
        """
        state = load_model_file(Path(path) / "model.pt", mapped=True)
        if "judges" not in state or isinstance(state["scale"]["c"], float):
            raise PageLLMError(
                f"{path} was made by an earlier version\n  Remove {path} and make it again."
            )
        networks = []
        for weights in state["networks"]:
            width = weights["body.0.weight"].shape[0]
            network = Network(weights["mean"], weights["std"], width)
            network.load_state_dict(weights)
            networks.append(network.eval())
        history = History.of(shop, shop.rows("train", None))
        judges = Judges(shop.catalogue, state["judges"], history)
        plain = state["plain"] and PlainRow(
            Space(**state["plain"]["space"]), state["plain"]["strength"]
        )
        scale, taste = Calibration(**state["scale"]), Taste(**state["taste"])
        return cls(
            shop,
            policy,
            judges,
            Outcome(networks),
            scale,
            taste,
            state["unit"],
            plain,
            near,
            state.get("plain_pages", False),
        )


class Maker(NamedTuple):
    """What a finished stage `compose` was made from.

    id      of its model.pt             inputs  name -> id of what it read
    policy  sft, ppo or none            run     the run that policy is of; empty: its own
    """

    id: str
    policy: str
    run: str
    inputs: dict[str, str]

    @classmethod
    def of(cls, path: Path, make: str) -> "Maker":
        """Read `done` and config.json. make: the command that makes the stage, for the error."""
        record = finished(path, "composed pages", make)
        made = read_json(path / "config.json")
        config = made["config"]
        return cls(record["id"], config["policy"], config["source_run"], made["inputs"])

    @property
    def proposer(self) -> str:
        """Id of the policy's weights; empty without one."""
        return self.inputs.get(self.policy, "")

    def stale(self, where: Callable[[str, str], Path], data: str) -> list[str]:
        """Names of what the stage read and is another now: data, sft or ppo.

        where  (sft or ppo, run) -> the directory of that policy    data  id of the data now
        """
        now = {"data": data}
        if self.policy != "none":
            done = where(self.policy, self.run) / "done"
            now[self.policy] = read_json(done)["id"] if done.exists() else "gone"
        return [name for name in now if self.inputs.get(name, now[name]) != now[name]]


def load_composer(
    path: Path,
    shop: Shop,
    where: Callable[[str, str], Path],
    device: torch.device | str,
    data: str,
    make: str,
    near: Near | None = None,
) -> Composer:
    """The composer of the stage in `path`, with the policy that it was made with.

    where, data  as in `Maker.stale`
    make         the command that makes the stage, for errors
    Raises PageLLMError where the policy or the data are others than those it was made from.
    """
    made = Maker.of(path, make)
    if changed := made.stale(where, data):
        raise PageLLMError(
            f"{path} was made from another {' and '.join(changed)}, which has changed since\n"
            f"  Remove {path} and make it again: {make}"
        )
    policy = None
    if made.policy != "none":
        policy = Policy.load(where(made.policy, made.run), device)
    composer = Composer.load(path, shop, policy, near)
    composer.made = made
    return composer
