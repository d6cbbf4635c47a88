"""The plan of `pagellm tune`: from a few timed samples, what can be tried in the given minutes.

    seconds = measure(config, shop, run)        of a factorisation, a step, a page: here
    plan = make_plan(seconds, minutes, size_of(shop))

Only these samples are timed. The plan is written once, and all later steps read it. So a run that
is resumed, even on a slower machine, ends with the same bytes.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pagellm import pretrain, sft
from pagellm.data.shop import Shop
from pagellm.model.als import item_groups
from pagellm.model.judges import DENSE
from pagellm.model.networks import SIZES
from pagellm.model.plain import GRIDS, LARGEST, Fitted, fit
from pagellm.model.policy import Policy
from pagellm.stage.run import StageConfig

__all__ = ["Plan", "Seconds", "ShopSize", "epochs_for", "make_plan", "measure", "size_of"]

# Shares of the minutes. What is left covers reading, writing and estimates that are too low.
SHARES = {"plain": 0.35, "start": 0.05, "pretrain": 0.05, "sft": 0.1, "compose": 0.3, "ppo": 0.1}
FITS = 10  # fits that a search needs to find something: so many of the widest must be affordable
WIDTHS = ("tiny", "mini", "wide", "wider")  # sizes of the network, by width
BATCH = 64  # users in a step of SFT
LEAST = 30  # steps that a stage needs to show anything
# Costs in steps of SFT at the same width, and seconds of compose for each user. JUDGED_USER are the
# seconds of its outcome model alone; experiments/LOG.md has the others.
PPO_STEP = 5.0
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
class Plan:
    """What tune tries. 0 or empty: there is no time for it."""

    trials: dict[str, int]  # plain model -> settings tried at most
    factors: list[int]  # numbers of factors that a fit may have
    sizes: list[str]  # widths of the start
    judged: int  # validation users that candidates are compared on
    pretrain: int  # steps
    sft: list[float]  # learning rates, in the order in which they are tried
    sft_steps: int
    ppo: int  # steps
    fold_users: int  # of compose
    eval_users: int  # of compose
    seconds: dict  # what was measured

    def state(self) -> dict:
        return asdict(self)


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
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return min(time.perf_counter() - wall, time.process_time() - cpu)


def measure(config: StageConfig, shop: Shop, run: str) -> Seconds:
    """Time a fit, an inverse, some steps of a small network and some pages.

    run  the run whose directory the small network goes to
    """
    train, groups = shop.csr("train"), item_groups(shop.catalogue)
    als: dict[str, float] = {}
    models: dict[int, Fitted] = {}
    for factors in (32, 128):
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
    began = time.perf_counter()
    worked = timed(
        lambda: sft.run(sft.Config(epochs=few, eval_users=64, mode="one_shot", **common))
    )
    idle = min(1.0, worked / max(time.perf_counter() - began, 1e-9))
    where = config.stage("sft", run)
    lines = (where / "timing.jsonl").read_text().splitlines()
    steps = [json.loads(line)["seconds"] for line in lines]
    policy, some = Policy.load(where), asked[: min(64, len(asked))]
    seen, k = shop.csr("train", positive=None), min(20, shop.n_items)
    page = timed(lambda: policy.rank(some, train, seen, k, k, "one_shot"))
    return Seconds(
        als,
        rank * len(asked) / max(1, min(512, len(asked))),
        cube,
        vocab,
        idle * float(np.median(steps[1:] or steps)),
        page / len(some),
    )


def width_cost(size: str) -> float:
    """How much dearer a step or a page is than at size tiny: half of it grows with the width."""
    return 0.5 + 0.5 * SIZES[size].n_embd / SIZES["tiny"].n_embd


def als_seconds(seconds: Seconds, factors: int) -> float:
    """A power law through the two fits that were timed."""
    low, high = seconds.als["32"], max(seconds.als["128"], seconds.als["32"])
    return low * (factors / 32) ** min(2.5, max(0.5, math.log(high / max(low, 1e-6), 4)))


def make_plan(seconds: Seconds, minutes: float, shop: ShopSize) -> Plan:
    """What fits into the minutes."""
    share = {name: minutes * 60 * part for name, part in SHARES.items()}
    cap = [f for f in GRIDS["ALS"]["factors"] if f < shop.items] or [8]
    # Of a large shop few settings are tried, and not narrow ones alone: width is worth more.
    room = share["plain"] * 0.85
    factors = [f for f in cap if FITS * (als_seconds(seconds, f) + seconds.rank) <= room] or cap[:1]
    trial = als_seconds(seconds, factors[len(factors) // 2]) + seconds.rank
    n = max(1, int(room / trial))
    ratings = min(16, n // 4) if shop.rated else 0
    facts = min(12, n // 4) if shop.facts else 0
    trials = {"ALS": max(1, min(24, n - ratings - facts)), "ALS+facts": facts}
    trials["ALS+ratings"] = ratings
    ease = seconds.cube * (shop.items / 1000) ** 3
    few = int(share["plain"] * 0.15 / (ease + seconds.rank))
    trials["EASE"] = min(5, few) if shop.items <= LARGEST else 0
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
    step = seconds.step * width_cost(sizes[-1])
    rates = [1e-4, 5e-4, 2e-5]
    look = 500 * seconds.page * width_cost(sizes[-1])  # a validation
    most = max(4 * LEAST, 6 * math.ceil(shop.users / BATCH))
    steps = min(most, int((share["sft"] / len(rates) - 4 * look) / step))
    if steps < LEAST:
        rates = rates[:1]
        steps = min(most, int((share["sft"] - 4 * look) / step))
    texts = min(240, int(share["pretrain"] / step))
    # Composed twice, with the language model and without, by the same judges: three factorisations
    # and EASE, fitted three times.
    fits = 9 * als_seconds(seconds, best) + (3 * ease if shop.items <= DENSE else 0)
    each = (share["compose"] - fits) / 2
    # PPO fits these judges once more, and asks them about the users of its gate and of its steps.
    room = share["ppo"] - fits / 9 * 3 - min(GATE_USERS, shop.users) * JUDGED_USER
    every = (room - shop.users * JUDGED_USER) / (PPO_STEP * step)  # all users are asked about once,
    ppo = int(max(every, room / (PPO_STEP * step + BATCH * JUDGED_USER)))  # or those of the steps
    return Plan(
        trials=trials,
        factors=factors,
        sizes=sizes,
        judged=judged,
        pretrain=texts if texts >= LEAST else 0,
        sft=rates if steps >= LEAST else [],
        sft_steps=steps if steps >= LEAST else 0,
        ppo=min(60, ppo) if ppo >= LEAST else 0,
        fold_users=int(min(6000, max(500, each * 0.35 / FOLD_USER / 2))),
        eval_users=int(min(6000, max(2000, each * 0.65 / ASKED_USER))),
        seconds=asdict(seconds),
    )
