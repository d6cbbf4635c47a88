"""What validation says of a finished policy's pages, and which mode of decoding it is to use.

    record = choose_mode(policy, shop, k=20)        # {"mode": "one_shot", "valid": {...}, ...}
    record["valid"]                                 # {"users": 1000, "k": 20, "means": {...}}

sft, ppo and compose keep such a record in `done`. It is of the same validation users in each, drawn
by the data alone, so that policies can be compared: serving takes the best for its default.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pagellm.data.shop import Rows, Shop
from pagellm.model.policy import Policy, Validation
from pagellm.pages.ranked import RankedPages
from pagellm.pages.yardstick import JUDGED_BY, best_of, means, said_of_best
from pagellm.stage.files import read_json

__all__ = ["USERS", "choose_mode", "recorded_mode", "standing"]

USERS = 1000  # validation users whose pages decide; all where there are fewer
TRIED = ("one_shot", "greedy")  # modes; beam takes a multiple of their time, and is asked for


def standing(
    shop: Shop, k: int, write: Callable[[np.ndarray, Rows, Validation], RankedPages]
) -> dict:
    """What validation says of some pages: {"users", "who", "k", "means"}.

    write    (users, what no page may hold, the Validation) -> pages of k
    returns  who: a hash of the users; means: metric -> mean over those for whom it is defined
    Raises PageLLMError where no user has both train and validation items.
    """
    there = Validation(shop, "valid", k, "greedy", USERS, seed=0)
    scores = there.scorer(write(there.users, there.seen, there), k)
    who = hashlib.sha256(there.users.astype(np.int64).tobytes()).hexdigest()[:16]
    return {"users": len(there.users), "who": who, "k": k, "means": means(scores)}


def recorded_mode(stage: Path) -> str:
    """The mode that `choose_mode` recorded for the policy in this directory; greedy if none was."""
    done = stage / "done"
    found = read_json(done) if done.exists() else {}
    return found.get("decoding", {}).get("mode", "greedy")


def choose_mode(policy: Policy, shop: Shop, k: int) -> dict:
    """The mode of TRIED whose pages of k are best on validation; call it on every process.

    returns  {"mode", "why", "valid": `standing` of its pages, "tried": mode -> measures}. Without
             validation rows: {"mode": "greedy", "why"}
    """
    if not (shop.csr("valid").counts() * shop.csr("train").counts()).any():
        return {"mode": "greedy", "why": "no validation rows to choose on"}

    def of(mode: str) -> dict:
        return standing(
            shop,
            k,
            lambda users, seen, there: policy.rank(
                users, there.history, seen, k, there.depth, mode, when=there.when
            ),
        )

    found = {mode: of(mode) for mode in TRIED}
    best, margins = best_of({mode: row["means"] for mode, row in found.items()})
    return {
        "mode": best,
        "why": said_of_best(best, margins),
        "valid": found[best],
        "tried": {
            mode: {m: row["means"][m] for m in JUDGED_BY if m in row["means"]}
            for mode, row in found.items()
        },
    }
