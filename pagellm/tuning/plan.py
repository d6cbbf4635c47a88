"""The plan of `pagellm tune`: from a few timed samples, what can be tried in the given minutes.

    written = Written(path, minutes)                    plan.json
    plain = written.part("plain", Plain, make)          made once from the seconds left, then read

A part is made where it is needed, when what its samples depend on is known: `plain` at the
beginning; `facts` when ALS was searched; `steps` when the start of the network was chosen. Only
these samples are timed. What was written is never changed. So a run that is resumed, even on a
slower machine, ends with the same bytes.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pagellm import pretrain, sft
from pagellm.data.shop import Shop
from pagellm.model.als import item_groups
from pagellm.model.judges import DENSE
from pagellm.model.networks import SIZES
from pagellm.model.plain import GRIDS, LARGEST, Fitted, fit
from pagellm.model.policy import Policy
from pagellm.stage.files import read_json, write_json
from pagellm.stage.run import StageConfig

__all__ = [
    "LOOKS",
    "Costs",
    "Facts",
    "Plain",
    "Seconds",
    "ShopSize",
    "Steps",
    "Written",
    "als_seconds",
    "epochs_for",
    "measure",
    "plan_facts",
    "plan_plain",
    "plan_steps",
    "size_of",
    "step_seconds",
    "timed",
]

# Shares of the minutes. What is left covers reading, writing and estimates that are too low.
SHARES = {"plain": 0.35, "start": 0.05, "pretrain": 0.05, "sft": 0.1, "compose": 0.3, "ppo": 0.1}
FITS = 10  # fits that a search needs to find something: so many of the widest must be affordable
WIDTHS = ("tiny", "mini", "wide", "wider")  # sizes of the network, by width
BATCH = 64  # users in a step of SFT
LEAST = 30  # steps that a stage needs to show anything
# Of the seconds for plain models: ALS, where ALS+facts or ALS+ratings come after it, or both.
ALS_SHARE = (1.0, 0.6, 0.45)
RATED_FIT = 2.0  # fits of ALS+facts that one of ALS+ratings takes: it reads what was disliked too
WIDE_SAMPLE = 0.6  # seconds that a fit of 128 factors may take for each minute, to time 256 too
LOOKS = 8  # validations of SFT behind the first
LOOKED = 500  # users of a validation
# Costs in steps of SFT with the same prompts, by decoding, and seconds of compose for each user.
# JUDGED_USER are the seconds of its outcome model alone; experiments/LOG.md has the others.
PPO_STEP = {"one_shot": 5.0, "greedy": 50.0}
FOLD_USER, ASKED_USER, JUDGED_USER = 0.006, 0.015, 0.005
GATE_USERS = 500


@dataclass(frozen=True)
class ShopSize:
    """What the plan needs to know about a shop."""

    users: int
    items: int
    rated: bool  # whether train rows have ratings
    facts: bool  # whether the catalogue names categories, brands or words that items share
    history: int  # train items of a user, 90th percentile


@dataclass(frozen=True)
class Seconds:
    """What was measured: one of each."""

    als: dict[str, float]  # factors -> a fit of ALS+facts
    rank: float  # ranking all validation users by a factorisation
    cube: float  # an inverse of 1,000 x 1,000, of which EASE needs one of the catalogue's size
    vocab: float  # from the prepared data to a network of size tiny that has taken no step
    step: float  # a step of SFT at size tiny
    page: float  # a page of the first slot's logits at size tiny


@dataclass(frozen=True)
class Costs:
    """What was measured once the start was chosen, with its width, prompts and decoding."""

    fit: float  # of ALS+facts, with the settings of ALS
    text: float  # a step of pre-training
    step: float  # a step of SFT
    look: float  # a validation of LOOKED users


@dataclass(frozen=True)
class Plain:
    """What tune tries first."""

    trials: dict[str, int]  # EASE, ALS -> settings tried at most; 0: there is no time for it
    factors: list[int]  # numbers of factors that a fit may have
    sizes: list[str]  # widths of the start
    judged: int  # validation users that candidates are compared on
    seconds: dict  # what was measured


@dataclass(frozen=True)
class Facts:
    """What tune tries once ALS was searched."""

    trials: dict[str, int]  # ALS+facts, ALS+ratings -> settings tried at most
    fit: float  # seconds of a fit of ALS+facts, with the settings of ALS


@dataclass(frozen=True)
class Steps:
    """What tune tries once the start was chosen. 0 or empty: there is no time for it."""

    pretrain: int  # steps
    sft: list[float]  # learning rates, in the order in which they are tried
    sft_steps: int
    ppo: int  # steps
    fold_users: int  # of compose
    eval_users: int  # of compose
    seconds: dict  # what was measured


class Written:
    """plan.json: every part of the plan is made once, from the seconds that are left, and kept.

    Seconds are those of the clock, or the processor's where others keep it busy. What an
    interrupted run spent behind the last part it wrote is not counted.
    """

    def __init__(self, path: Path, minutes: float):
        self.path, self.minutes = path, minutes
        self.parts: dict[str, Any] = read_json(path) if path.exists() else {}
        self.began = clocks()

    def spent(self) -> float:
        """Seconds spent so far, by runs before this one too."""
        return self.parts.get("spent", 0.0) + least(self.began)

    def part(self, name: str, cls: type, make: Callable[[float], Any]) -> Any:
        """The part of that name, a `cls`; `make` is given the seconds that are left."""
        if name not in self.parts:
            self.parts[name] = asdict(make(self.minutes * 60 - self.spent()))
            self.parts["spent"], self.began = self.spent(), clocks()
            write_json(self.path, self.parts)
        return cls(**self.parts[name])


def clocks() -> tuple[float, float]:
    """Seconds of the clock and of the processor."""
    return time.perf_counter(), time.process_time()


def least(began: tuple[float, float]) -> float:
    """Seconds since then, by the clock that shows fewer."""
    return min(now - before for now, before in zip(clocks(), began, strict=True))


def size_of(shop: Shop) -> ShopSize:
    """The numbers of a shop that decide what there is to try."""
    counts = shop.csr("train").counts()
    return ShopSize(
        shop.n_users,
        shop.n_items,
        shop.rated,
        bool(item_groups(shop.catalogue)),
        int(np.quantile(counts[counts > 0], 0.9)) if counts.any() else 0,
    )


def epochs_for(steps: int, users: int, batch: int = BATCH) -> str:
    """The option --epochs that makes so many steps."""
    return f"{steps / math.ceil(max(users, 1) / batch):.6g}"


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes on this machine while it does nothing else.

    That is the clock's time, or the processor's where others keep the processor busy.
    """
    began = clocks()
    call()
    return least(began)


def measure(config: StageConfig, shop: Shop, run: str, minutes: float) -> Seconds:
    """Time some fits, an inverse, some steps of a small network and some pages.

    run      the run whose directory the small network goes to
    minutes  that the plan is for: with few, the widest fit is not timed
    """
    train, groups = shop.csr("train"), item_groups(shop.catalogue)
    als: dict[str, float] = {}
    models: dict[int, Fitted] = {}
    for factors in (32, 128, 256):
        narrow = factors >= min(shop.n_items, shop.n_users)
        if factors == 256 and (narrow or als["128"] > minutes * WIDE_SAMPLE):
            break  # so wide a fit will hardly be in the plan
        settings = {"factors": factors, "alpha0": 0.01, "reg": 0.03, "nu": 1.0}

        def one(settings=settings, factors=factors):
            models[factors] = fit(
                "ALS+facts", train, shop.n_users, shop.n_items, settings, config.seed, None, groups
            )

        als[str(factors)] = timed(one)
    asked = np.flatnonzero(shop.csr("valid").counts() > 0)
    rank = timed(lambda: models[32].score(asked[:512]).topk(min(100, shop.n_items)))
    matrix = np.eye(1000, dtype=np.float32) * 2 + 0.001
    cube = timed(lambda: np.linalg.inv(matrix))
    common: dict[str, Any] = {
        "run": run,
        "data": config.data,
        "runs": config.runs,
        "dataset": config.dataset,
    }
    common |= {"seed": config.seed, "device": config.device}
    vocab = timed(
        lambda: pretrain.run(pretrain.Config(size="tiny", rows="random", steps=0, **common))
    )
    users = int((train.counts() > 1).sum())
    few = float(epochs_for(4, users))
    step = step_seconds(
        config.stage("sft", run),
        lambda: sft.run(sft.Config(epochs=few, eval_users=64, mode="one_shot", **common)),
    )
    where = config.stage("sft", run)
    policy, some = Policy.load(where), asked[: min(64, len(asked))]
    seen, k = shop.csr("train", positive=None), min(20, shop.n_items)
    page = timed(lambda: policy.rank(some, train, seen, k, k, "one_shot"))
    return Seconds(
        als,
        rank * len(asked) / max(1, min(512, len(asked))),
        cube,
        vocab,
        step,
        page / len(some),
    )


def step_seconds(where: Path, call: Callable[[], object]) -> float:
    """Seconds of a step of the stage at `where`, which `call` runs: the median, as `timed`."""
    began = time.perf_counter()
    worked = timed(call)
    idle = min(1.0, worked / max(time.perf_counter() - began, 1e-9))
    lines = (where / "timing.jsonl").read_text().splitlines()
    steps = [json.loads(line)["seconds"] for line in lines]
    return idle * float(np.median(steps[1:] or steps))


def width_cost(size: str) -> float:
    """How much dearer a step or a page is than at size tiny: half of it grows with the width."""
    return 0.5 + 0.5 * SIZES[size].n_embd / SIZES["tiny"].n_embd


def als_seconds(seconds: Seconds, factors: int) -> float:
    """A power law through the two timed fits nearest to it; beyond them, one that is not steep."""
    known = sorted((int(f), t) for f, t in seconds.als.items())
    at = sum(f <= factors for f, _ in known)  # timed fits that are no wider
    (narrow, low), (wide, high) = known[max(0, min(at, len(known) - 1) - 1) :][:2]
    rise = math.log(max(high, low) / max(low, 1e-6), wide / narrow)
    if 0 < at < len(known):
        return low * (factors / narrow) ** rise
    near, there = known[0] if at == 0 else known[-1]
    return there * (factors / near) ** min(2.5, max(0.5, rise))


def ease_seconds(cube: float, items: int) -> float:
    """A fit of EASE, which inverts items x items; cube: seconds for 1,000 of them."""
    return cube * (items / 1000) ** 3


def plan_plain(seconds: Seconds, minutes: float, shop: ShopSize) -> Plain:
    """What fits into the first share of the minutes."""
    share = {name: minutes * 60 * part for name, part in SHARES.items()}
    cap = [f for f in GRIDS["ALS"]["factors"] if f < shop.items] or [8]
    # Of a large shop few settings are tried, and not narrow ones alone: width is worth more.
    room = share["plain"] * 0.85
    factors = [f for f in cap if FITS * (als_seconds(seconds, f) + seconds.rank) <= room] or cap[:1]
    trial = float(np.mean([als_seconds(seconds, f) for f in factors])) + seconds.rank
    n = int(room * ALS_SHARE[shop.facts + shop.rated] / trial)
    ease = ease_seconds(seconds.cube, shop.items)
    few = int(share["plain"] * 0.15 / (ease + seconds.rank))
    trials = {"EASE": min(5, few) if shop.items <= LARGEST else 0, "ALS": max(1, min(24, n))}
    # Starts are pages of validation users alone: a vocabulary, a factorisation, four looks each.
    judged = int(min(2000, max(200, share["start"] / 3 / (4 * seconds.page))))
    best = max(factors)
    sizes = [
        size
        for size in WIDTHS
        if seconds.vocab + als_seconds(seconds, min(SIZES[size].n_embd, shop.items))
        <= share["start"] * 2
        and SIZES[size].n_embd <= 2 * max(best, 64)
    ][:3] or ["tiny"]
    return Plain(trials, factors, sizes, judged, asdict(seconds))


def plan_facts(fit: float, rank: float, room: float, shop: ShopSize) -> Facts:
    """How many settings of ALS+facts and ALS+ratings fit into the rest of the first share.

    fit   seconds of a fit of ALS+facts, with the settings of ALS
    rank  of ranking all validation users
    room  seconds
    """
    each = room / max(1, shop.facts + shop.rated)
    facts = int(each / (fit + rank)) if shop.facts else 0
    ratings = int(each / (RATED_FIT * fit + rank)) if shop.rated else 0
    trials = {"ALS+facts": max(0, min(12, facts)), "ALS+ratings": max(0, min(16, ratings))}
    return Facts(trials, fit)


def plan_steps(
    costs: Costs, cube: float, left: float, shop: ShopSize, mode: str = "one_shot"
) -> Steps:
    """What fits into the seconds that are left behind the start.

    cube  seconds of an inverse of 1,000 x 1,000
    mode  how pages are decoded: one_shot or greedy
    """
    parts = {name: SHARES[name] for name in ("pretrain", "sft", "compose", "ppo")}
    slack = 1 - sum(SHARES.values())
    share = {name: left * part / (sum(parts.values()) + slack) for name, part in parts.items()}
    rates, looks = [1e-4, 5e-4, 2e-5], (1 + LOOKS) * costs.look
    most = max(4 * LEAST, 6 * math.ceil(shop.users / BATCH))
    steps = min(most, int((share["sft"] / len(rates) - looks) / costs.step))
    if steps < LEAST:
        rates = rates[:1]
        steps = min(most, int((share["sft"] - looks) / costs.step))
    texts = min(240, int(share["pretrain"] / costs.text))
    # Composed twice, with the language model and without, by the same judges: three factorisations
    # and EASE, fitted three times.
    ease = ease_seconds(cube, shop.items) if shop.items <= DENSE else 0.0
    fits = 9 * costs.fit + 3 * ease
    each = (share["compose"] - fits) / 2
    # PPO fits these judges once more, and asks them about the users of its gate and of its steps.
    room = share["ppo"] - fits / 3 - min(GATE_USERS, shop.users) * JUDGED_USER
    step = PPO_STEP[mode] * costs.step
    every = (room - shop.users * JUDGED_USER) / step  # all users are asked about once,
    ppo = int(max(every, room / (step + BATCH * JUDGED_USER)))  # or those of the steps
    return Steps(
        pretrain=texts if texts >= LEAST else 0,
        sft=rates if steps >= LEAST else [],
        sft_steps=steps if steps >= LEAST else 0,
        ppo=min(60, ppo) if ppo >= LEAST else 0,
        fold_users=int(min(6000, max(500, each * 0.35 / FOLD_USER / 2))),
        eval_users=int(min(6000, max(2000, each * 0.65 / ASKED_USER))),
        seconds=asdict(costs),
    )
