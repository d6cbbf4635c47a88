"""Off-policy evaluation: what a target policy would have earned, from another policy's log.

Reads   a Parquet log with one line for each session (columns below); without --log, simulates one
        on the synthetic shop
Writes  ope.json beside the log, or under runs/<run>/ope; of --bandit runs/<run>/ope/bandit.json

    pagellm ope                           pagellm ope --log sessions.parquet
    pagellm ope --bandit bts/men/men.csv.gz          a log of single slots, as Open Bandit has it

    user                 who saw the page; standard errors are clustered by user
    page                 list of K items (numbers or names), first slot first
    reward               list of K numbers: clicks, money, ... of each slot
    propensity           list of K: P(item | items above) under the logging policy; above 0
    target_propensity    list of K: the same under the target policy
    candidates           optional: list of M items that the page was drawn from, without repeats
    logging_score, target_score     optional: lists of M, Plackett-Luce scores of both policies

    IPS             rewards weighted by the ratio of the two policies' page probabilities
    SNIPS           the same, divided by the sum of the weights: biased, but less variable
    cascade IPS     slot k is weighted by the slots down to k only; valid if the slots below do not
                    influence a slot's reward
    cascade DR      cascade IPS, with fitted values of the slots to come as a control variate
    pseudo-inverse  page weights, valid if rewards add up over slots and each depends on its item
                    and place alone
    direct          the fitted values alone: biased, and the interval does not include the bias;
                    refused whenever IPS is

The last three need the optional columns. An estimate that rests on few sessions is refused: see
`effective`. Sources: Swaminathan et al., NeurIPS 2017 (pseudo-inverse); McInerney et al., KDD 2020
(cascade IPS); Kiyohara et al., WSDM 2022 (cascade DR). Takes seconds.
"""

import csv
import hashlib
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pagellm.data.packed import open_bytes
from pagellm.data.shop import load
from pagellm.data.tables import ids_of, read_table, told
from pagellm.data.values import Broken, identifier
from pagellm.online import abtest, simulator
from pagellm.pages.ranked import read_pages
from pagellm.stage import randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import atomic, write_json
from pagellm.stage.hints import counted
from pagellm.stage.run import Run, StageConfig, file_id

__all__ = [
    "Config",
    "Log",
    "Value",
    "cascade_dr",
    "draw_pages",
    "effective",
    "estimates",
    "page_moments",
    "pl_propensity",
    "pseudo_inverse_weights",
    "read_bandit",
    "read_log",
    "run",
    "simulated_log",
    "true_value",
    "values",
]


MOST_PAGES = 5040  # most pages that the pseudo-inverse enumerates: 7 candidates in any order


@dataclass
class Log:
    """S logged sessions with pages of K slots.

    user                 (S,)
    page, reward         (S, K)
    propensity, target   (S, K) probability of each slot's item, given the slots above, under the
                         logging and the target policy
    candidates, logging_score, target_score    (S, M), for Plackett-Luce policies; else None
    """

    user: np.ndarray
    page: np.ndarray
    reward: np.ndarray
    propensity: np.ndarray
    target: np.ndarray
    candidates: np.ndarray | None = None
    logging_score: np.ndarray | None = None
    target_score: np.ndarray | None = None

    def weights(self) -> np.ndarray:
        """(S, K): target's over logging policy's probability of the first k slots, k = 1..K."""
        return np.cumprod(self.target / self.propensity, axis=1)

    def place(self) -> np.ndarray:
        """(S, K): index of every slot's item among its session's candidates."""
        assert self.candidates is not None
        return (self.page[:, :, None] == self.candidates[:, None, :]).argmax(2)


@dataclass(frozen=True)
class Value:
    """Estimated reward of a session under the target policy.

    se       standard error, clustered by user
    ess      effective number of sessions behind the estimate
    refused  why there is no estimate; "" if there is one
    """

    value: float
    se: float
    ess: float
    refused: str = ""


def effective(weight: np.ndarray) -> float:
    """Effective sample size (sum w)^2 / sum w^2 of weights (S,); 0 if all are 0 (Kish, 1965)."""
    square = float((weight**2).sum())
    return float(weight.sum()) ** 2 / square if square else 0.0


def softmax(score: np.ndarray) -> np.ndarray:
    e = np.exp(score - score.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rest_of(score: np.ndarray, place: np.ndarray, k: int) -> np.ndarray:
    """(S, M) P(candidate | slots above k): softmax of score (S, M) over those not yet placed."""
    left = score.copy()
    np.put_along_axis(left, place[:, :k], -np.inf, axis=1)
    return softmax(left)


def pl_propensity(score: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Plackett-Luce probabilities, (S, K), of each slot's candidate given the slots above.

    score (S, M); place (S, K): index of each slot's candidate
    """
    return np.stack(
        [
            np.take_along_axis(rest_of(score, place, k), place[:, k : k + 1], 1)[:, 0]
            for k in range(place.shape[1])
        ],
        axis=1,
    )


def draw_pages(score: np.ndarray, K: int, rng: np.random.Generator) -> np.ndarray:
    """Draw one Plackett-Luce page for each row of score (S, M).

    Takes the K candidates with the largest score + Gumbel noise; returns their places, (S, K).
    """
    return np.argsort(-(score + rng.gumbel(size=score.shape)), axis=1)[:, :K]


def all_pages(M: int, K: int) -> np.ndarray:
    """Every page of K out of M candidates, (pages, K). Raises PageLLMError above MOST_PAGES."""
    if math.perm(M, K) > MOST_PAGES:
        raise PageLLMError(
            f"{math.perm(M, K):,} pages of {K} slots from {M} candidates; the pseudo-inverse lists "
            f"at most {MOST_PAGES:,}: log shorter pages or fewer candidates"
        )
    return np.array(list(itertools.permutations(range(M), K)))


def page_moments(score: np.ndarray, K: int) -> tuple[np.ndarray, np.ndarray]:
    """First and second moments of Plackett-Luce pages.

    score (C, M). A page is the 0/1 vector 1_A over its (slot, candidate) pairs, (K M,). Returns
    E 1_A, (C, K M), and E 1_A 1_A', (C, K M, K M).
    """
    C, M = score.shape
    pages = all_pages(M, K)
    mark = np.zeros((len(pages), K * M))
    mark[np.arange(len(pages))[:, None], np.arange(K) * M + pages] = 1.0
    left = np.repeat(np.exp(score - score.max(1, keepdims=True))[:, None], len(pages), 1)
    p = np.ones((C, len(pages)))
    for k in range(K):
        p = p * left[:, np.arange(len(pages)), pages[:, k]] / left.sum(2)
        left[:, np.arange(len(pages)), pages[:, k]] = 0.0
    second = np.stack([mark.T @ (row[:, None] * mark) for row in p])
    return p @ mark, second


def pseudo_inverse_weights(log: Log, block: int = 256) -> np.ndarray:
    """Weights of the sessions, (S,):  q' G^+ 1_A.

    q is the target's E 1_A, G the logging policy's E 1_A 1_A' (see page_moments), 1_A the logged
    page. Computes `block` different contexts at a time.

    Raises PageLLMError if the target shows items where the logging policy never does (q outside the
    range of G).
    """
    assert log.candidates is not None
    assert log.logging_score is not None and log.target_score is not None
    K, M = log.page.shape[1], log.candidates.shape[1]
    context, inverse = np.unique(
        np.hstack([log.logging_score, log.target_score]), axis=0, return_inverse=True
    )
    inverse = inverse.ravel()
    weight = np.empty((len(context), K * M))
    for at in range(0, len(context), block):
        some = context[at : at + block]
        _, G = page_moments(some[:, :M], K)
        q, _ = page_moments(some[:, M:], K)
        weight[at : at + block] = (np.linalg.pinv(G, rcond=1e-9, hermitian=True) @ q[..., None])[
            ..., 0
        ]
        off = np.abs((G @ weight[at : at + block, :, None])[..., 0] - q).max()
        if off > 1e-6:
            raise PageLLMError(
                f"the target shows items where the logging policy never did (off by {off:.2g}); "
                "log with a higher temperature"
            )
    return np.take_along_axis(weight[inverse], np.arange(K) * M + log.place(), axis=1).sum(1)


def cascade_dr(log: Log, prior: float = 20.0, seed: int = 0) -> np.ndarray:
    """The term of each session in the cascade doubly robust estimator, (S,).

    Their mean is unbiased whatever the fitted values are.
    """
    return values(log, prior, seed)[1]


def halves(user: np.ndarray, seed: int = 0) -> np.ndarray:
    """(S,) 0 or 1: the half that each session's user (S,) belongs to.

    Users are dealt out in turn, in the order of a hash of seed and id. An id is its text, whether
    it came as a number or not. So the halves are equally large, and neither the order of lines nor
    any order among ids decides.
    """
    names, back = np.unique(user, return_inverse=True)
    draws = [
        hashlib.sha256(f"{seed} ope halves\0{identifier(name, 'user')}".encode()).digest()
        for name in names.tolist()
    ]
    half = np.empty(len(names), dtype=np.int64)
    half[sorted(range(len(names)), key=draws.__getitem__)] = np.arange(len(names)) % 2
    return half[back.ravel()]


def values(log: Log, prior: float = 20.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Direct and cascade doubly robust estimates of every session, (S,) each.

        direct          E_target[Q_1]
        doubly robust   sum_k  w_{1:k-1} E_target[Q_k | slots above] + w_{1:k} (r_k - Q_k)

    Q_k is the mean reward from slot k on, by the item in slot k. It is shrunk towards the slot's
    mean with the weight of `prior` sessions, fitted from the last slot backwards on one half of the
    users, and used on the other half. See `halves`.
    """
    assert log.candidates is not None and log.target_score is not None
    S, K = log.page.shape
    names, candidates = np.unique(log.candidates, return_inverse=True)
    place, items, candidates = log.place(), len(names), candidates.reshape(S, -1)
    page = np.take_along_axis(candidates, place, 1)
    w = np.hstack([np.ones((S, 1)), log.weights()])
    fold = halves(log.user, seed)
    out, direct = np.zeros(S), np.zeros(S)
    target = [rest_of(log.target_score, place, k) for k in range(K)]
    for half in (0, 1):
        fit, use = fold != half, fold == half
        ahead = np.zeros(S)  # E_target[Q_{k+1}] given the slots down to k
        for k in reversed(range(K)):
            y = log.reward[:, k] + ahead
            mean = y[fit].mean() if fit.any() else 0.0
            count, total = (np.bincount(page[fit, k], v, items) for v in (None, y[fit]))
            Q = (total + prior * mean) / (count + prior)
            ahead = (target[k] * Q[candidates]).sum(1)
            out[use] += (w[:, k] * ahead + w[:, k + 1] * (log.reward[:, k] - Q[page[:, k]]))[use]
        direct[use] = ahead[use]
    return direct, out


def estimates(log: Log, min_ess: float = 100.0, seed: int = 0) -> dict[str, Value]:
    """Estimator -> Value.

    With fewer than min_ess effective sessions there is no value, and `refused` says why. seed is of
    the halves of users on which values are fitted.
    Raises PageLLMError for a propensity that is not in (0, 1] or that the scores contradict, and if
    all sessions are of one user.
    """
    check_log(log)
    if len(np.unique(log.user)) < 2:
        raise PageLLMError(
            f"all {len(log.user):,} sessions are one user's; errors are clustered by user, so that "
            "two or more are wanted"
        )
    w, total = log.weights(), log.reward.sum(1)
    ones, whole, found = np.ones(len(total)), w[:, -1], {}
    parts = {
        "IPS": (whole * total, ones, whole),
        "SNIPS": (whole * total, whole, whole),
        "cascade IPS": ((w * log.reward).sum(1), ones, whole),
    }
    if log.candidates is not None:
        direct, robust = values(log, seed=seed)
        parts["cascade DR"] = robust, ones, whole
        try:
            pi = pseudo_inverse_weights(log)
            parts["pseudo-inverse"] = pi * total, ones, pi
        except PageLLMError as error:
            found["pseudo-inverse"] = Value(math.nan, math.nan, 0.0, str(error))
        parts["direct"] = direct, ones, whole
    _, user = np.unique(log.user, return_inverse=True)
    for name, (x, y, weight) in parts.items():
        ess = effective(weight)
        if ess < min_ess or ess == 0:
            found[name] = Value(
                math.nan,
                math.nan,
                ess,
                f"{ess:.1f} effective sessions of {len(x):,}, under "
                f"{min_ess:g}: the policies differ too much for this log",
            )
            continue
        e = abtest.estimate(np.bincount(user.ravel(), x), np.bincount(user.ravel(), y))
        found[name] = Value(e.value, math.sqrt(e.var), ess)
    return found


def check_log(log: Log) -> None:
    """Raise PageLLMError for values that no session can have, naming the session."""
    for name, p, low in (
        ("propensity", log.propensity, "above 0"),
        ("target_propensity", log.target, "0 or more"),
    ):
        bad = ~np.isfinite(p) | (p > 1 + 1e-6) | ((p <= 0) if low == "above 0" else (p < 0))
        if bad.any():
            raise PageLLMError(
                f"{name} of session {int(np.argwhere(bad)[0, 0])} is {p[bad][0]:g}; want {low}, at "
                "most 1, as it was when the page was drawn"
            )
    if not np.isfinite(log.reward).all():
        raise PageLLMError("a reward is missing or not finite; mend the log")
    for name, items in (("page", log.page), ("candidates", log.candidates)):
        if items is None:
            continue
        items = np.sort(items, axis=1)
        if (twice := (items[:, 1:] == items[:, :-1]).any(1)).any():
            raise PageLLMError(
                f"{name} of session {int(twice.argmax())} names an item twice; want each once"
            )
    if log.candidates is None or log.logging_score is None or log.target_score is None:
        return
    if not np.isfinite(log.logging_score).all() or not np.isfinite(log.target_score).all():
        raise PageLLMError(
            "a score is missing or not finite; mend the log, or leave the score columns out"
        )
    if not (log.page[:, :, None] == log.candidates[:, None, :]).any(2).all():
        raise PageLLMError("a page holds an item that is not among its candidates; mend the log")
    for name, p, score in (
        ("propensity", log.propensity, log.logging_score),
        ("target_propensity", log.target, log.target_score),
    ):
        off = np.abs(pl_propensity(score, log.place()) - p).max(1)
        if off.max() > 1e-4:
            raise PageLLMError(
                f"{name} of session {off.argmax()} is off by {off.max():.2g} from what its scores "
                "give; log the scores that the page was drawn from, or leave the score columns out"
            )


def read_log(path: str | Path, said: list[str] | None = None) -> Log:
    """Read a log. Raises PageLLMError for missing columns or lists of unequal length.

    said  is filled with lines about what was read and what was left over, if given
    """
    given, path = str(path), Path(path)
    if not path.is_file():
        raise PageLLMError(
            f"no log {given!r}; see python -m pydoc pagellm.online.ope for its columns"
        )
    table = read_table(path, ("user",))
    need, more = (
        ("page", "reward", "propensity", "target_propensity"),
        ("candidates", "logging_score", "target_score"),
    )
    names = need + more if all(c in table.column_names for c in more) else need
    missing = {"user", *need} - set(table.column_names)
    if missing:
        raise PageLLMError(
            f"{path} has no column {', '.join(sorted(missing))}; there are "
            f"{', '.join(table.column_names)}"
        )
    if not len(table) or table["user"].null_count:
        raise PageLLMError(
            f"{path} has {counted(len(table), 'session')}, {table['user'].null_count:,} of them "
            "of nobody; "
            "want a user in each, and some sessions"
        )
    if said is not None:
        said += read_words(path, table, ("user", *names), more)
    columns = []
    for name in names:
        rows = table[name].to_pylist()
        width = len(rows[0]) if isinstance(rows[0], list) else 0
        if not width or any(row is None or len(row) != width or None in row for row in rows):
            raise PageLLMError(
                f"{path}: column {name} wants lists of one length above 0, without gaps"
            )
        try:
            if name in ("page", "candidates"):
                columns.append(
                    np.array([[identifier(item, "item") for item in row] for row in rows])
                )
            else:
                columns.append(np.array(rows, np.float64))
        except Broken as broken:
            raise PageLLMError(f"{path}: column {name}: {broken}") from None
        except (ValueError, TypeError):
            raise PageLLMError(f"{path}: column {name} wants lists of numbers") from None
    for some, what in (
        (columns[:4], "page, reward and propensities"),
        (columns[4:], "candidates and scores"),
    ):
        if len({c.shape for c in some}) > 1:
            raise PageLLMError(f"{path}: {what} want lists of one length")
    return Log(np.array(ids_of(table, "user", path)), *columns)


def read_words(path: Path, table: pa.Table, taken: Sequence[str], more: Sequence[str]) -> list:
    """What was read of a log, and which estimators its optional columns `more` allow."""
    absent = [name for name in more if name not in table.column_names]
    lines = [told(path, table, taken, absent)]
    if absent:
        some = [name for name in more if name in table.column_names]
        why = f"; {' and '.join(some)} alone is not used: all three are wanted" if some else ""
        lines.append(f"without {', '.join(absent)} no cascade DR, pseudo-inverse or direct{why}")
    return lines


BANDIT = ("item_id", "position", "click", "propensity_score")


def read_bandit(path: str | Path, said: list[str] | None = None) -> Log:
    """A log of single slots as Open Bandit has it, with the uniform policy as the target.

    One line is one slot that was shown: the columns of BANDIT, and user_feature_0, 1, ...; other
    columns are not read. What is known of a user is only these features, so standard errors are
    clustered by their combination. The uniform policy shows each of the log's items equally often.

    said  is filled with a line about what was read and what was left over, if given
    Raises PageLLMError for a missing column, and for values that are not numbers or propensities.
    Source: Saito et al., NeurIPS 2021, arXiv 2008.07146.
    """
    path = Path(path)
    if not path.is_file():
        raise PageLLMError(f"no log {str(path)!r}: want a .csv or .csv.gz of Open Bandit's form")
    table = read_table(path, tuple(bandit_columns(path)))
    names = table.column_names
    if missing := [name for name in BANDIT if name not in names]:
        raise PageLLMError(
            f"{path} has no column {', '.join(missing)}; there are {', '.join(names)}"
        )
    if not len(table):
        raise PageLLMError(f"{path} has no lines; want one a slot that was shown")
    groups = [name for name in names if name.startswith("user_feature_")]
    if said is not None:
        said.append(told(path, table, (*BANDIT, *groups)))
    try:
        numbers = [table[name].cast(pa.float64()).to_numpy() for name in BANDIT[1:]]
    except pa.ArrowException:
        numbers = [np.array([np.nan])]
    if any(np.isnan(column).any() for column in numbers):
        raise PageLLMError(f"{path}: {', '.join(BANDIT[1:])} want numbers in every line") from None
    _, click, propensity = numbers
    bad = ~((propensity > 0) & (propensity <= 1)) | ~np.isin(click, (0, 1))
    if bad.any():
        raise PageLLMError(
            f"{path}: line {int(np.flatnonzero(bad)[0]) + 2}: want a click of 0 or 1 and a "
            "propensity above 0, at most 1"
        )
    item = np.array(ids_of(table, "item_id", path))
    kinds = zip(*([v or "" for v in table[name].to_pylist()] for name in groups), strict=True)
    user = np.array(["|".join(kind) for kind in kinds] if groups else [""] * len(item))
    target = np.full(len(item), 1.0 / len(np.unique(item)))
    return Log(user, *(column[:, None] for column in (item, click, propensity, target)))


def bandit_columns(path: Path) -> list[str]:
    """Columns of the heading that are read as text: ids and users' features."""
    with open_bytes(path) as file:
        names = next(csv.reader([file.readline().decode("utf-8-sig", "replace")]), [])
    return [name for name in names if name == "item_id" or name.startswith("user_feature_")]


def rank_scores(candidates: np.ndarray, ranked: np.ndarray, temperature: float) -> np.ndarray:
    """Plackett-Luce scores (U, M): minus the rank a policy gives a candidate, over temperature.

    candidates (U, M); ranked (U, depth), the policy's list. Candidates not in the list rank last.
    """
    same = candidates[:, :, None] == ranked[:, None, :]
    return -np.where(same.any(2), same.argmax(2), ranked.shape[1]) / temperature


def simulated_log(
    world: simulator.World,
    users: np.ndarray,
    candidates: np.ndarray,
    logging: np.ndarray,
    target: np.ndarray,
    K: int,
    sessions: int,
    seed: int = 0,
) -> Log:
    """Simulate visitors who see pages drawn by the logging policy. The reward is clicks.

    users            (U,) rows of the world
    candidates       (U, M) items of each user's pages
    logging, target  (U, M) Plackett-Luce scores of both policies
    """
    rng = randomness.rng(seed, "ope", "log")
    row = rng.integers(len(users), size=sessions)
    place = draw_pages(logging[row], K, rng)
    page = np.take_along_axis(candidates[row], place, 1)
    reward = simulator.visit(world, users[row], page, rng).clicked.astype(np.float64)
    return Log(
        users[row],
        page,
        reward,
        pl_propensity(logging[row], place),
        pl_propensity(target[row], place),
        candidates[row],
        logging[row],
        target[row],
    )


def true_value(
    world: simulator.World, users: np.ndarray, candidates: np.ndarray, score: np.ndarray, K: int
) -> float:
    """Exact mean of clicks in a session under a Plackett-Luce policy, over users and all pages."""
    pages, total = all_pages(candidates.shape[1], K), 0.0
    for place in pages:
        p = pl_propensity(score, np.broadcast_to(place, (len(users), K))).prod(1)
        total += float(
            (p * simulator.expected(world, users, candidates[:, place])["clicks"]).mean()
        )
    return total


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Estimate a target policy's value from another policy's log, or from a simulated one."""

    log: str = ""  # Parquet log of sessions; empty: simulate one on the synthetic shop
    bandit: str = ""  # log of single slots in the format of Open Bandit, .csv or .csv.gz; estimates
    # what showing all its items equally often would have earned
    logging: str = "sft"  # simulation: policy that writes the logged pages, from the first items of
    # its list
    target: str = "ppo"  # simulation: policy whose value is estimated
    candidates: int = 6  # simulation: number of items that a page is drawn from
    k: int = 3  # simulation: slots on a page
    sessions: int = 20000  # simulation: number of sessions
    logging_temperature: float = 3.0  # simulation: each rank lower costs a score of 1 / this; a
    # higher number explores more
    target_temperature: float = 1.5  # simulation: the same for the target policy
    min_ess: float = 100.0  # an estimate with fewer effective sessions (Kish) is refused

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            k=(self.k > 0, "1 or more"),
            bandit=(not (self.bandit and self.log), "empty where log is given"),
            candidates=(self.candidates >= self.k, f"k={self.k} or more"),
            sessions=(self.sessions >= 2, "2 or more"),
            logging_temperature=(self.logging_temperature > 0, "above 0"),
            target_temperature=(self.target_temperature > 0, "above 0"),
        )


def simulate(config: Config) -> tuple[Log, float, dict[str, str]]:
    """Simulate a log. Returns it, the target's true value, and the ids of the files read."""
    shop, ranked, inputs = (
        load(config.data_dir),
        [],
        {"data": file_id(config.data_dir / "source.json")},
    )
    # The pseudo-inverse needs rewards that add up over slots: a purchase must not end a session.
    world = simulator.world_of(shop, simulator.Behaviour(leave_on_purchase=False))
    for name in dict.fromkeys((config.logging, config.target)):
        path = config.stage("evaluate") / name / "pages.parquet"
        if not path.exists():
            raise PageLLMError(
                f"no pages of {name} in {path}\n  Make them with: {config.make('evaluate')}"
            )
        inputs[name] = file_id(path)
        ranked.append(read_pages(path, shop))
    first, second = ranked[0], ranked[-1]
    keep = np.isin(first.user, second.user) & (first.item[:, : config.candidates] >= 0).all(1)
    if not keep.any():
        raise PageLLMError(
            f"nobody has {config.candidates} ranked items in both; lower --candidates"
        )
    users, items = first.user[keep], first.item[keep, : config.candidates]
    other = second.item[np.searchsorted(second.user, users)]
    scores = (
        rank_scores(items, items, config.logging_temperature),
        rank_scores(items, other, config.target_temperature),
    )
    log = simulated_log(world, users, items, *scores, config.k, config.sessions, config.seed)
    return log, true_value(world, users, items, scores[1], config.k), inputs


def report(log: Log, found: dict[str, Value], truth: float | None) -> str:
    lines = [
        f"{counted(len(log.user), 'session')} of {counted(len(np.unique(log.user)), 'user')}, "
        "pages of "
        f"{log.page.shape[1]}; logged reward a session {log.reward.sum(1).mean():.4f}"
    ]
    if truth is not None:
        lines = [
            "SIMULATED visitors: assumptions, not people (pagellm/online/simulator.py)",
            *lines,
            f"target's true value {truth:.4f}",
        ]
    lines += ["", f"{'estimator':<16}{'value':>9}{'95% interval':>20}{'effective sessions':>20}"]
    for name, v in found.items():
        span = f"[{v.value - 1.96 * v.se:.4f}, {v.value + 1.96 * v.se:.4f}]"
        lines.append(
            f"{name:<16}"
            + (
                f"  refused: {v.refused}"
                if v.refused
                else f"{v.value:>9.4f}{span:>20}{v.ess:>20,.0f}"
            )
        )
    return "\n".join(lines)


def run(config: Config) -> dict[str, Value]:
    """Print and write all estimates. Raises PageLLMError if every one is refused."""
    truth, said = None, list[str]()
    if config.bandit:
        log, out = read_bandit(config.bandit, said), config.stage("ope") / "bandit.json"
        out.parent.mkdir(parents=True, exist_ok=True)
    elif config.log:
        log, out = read_log(config.log, said), Path(config.log).with_name("ope.json")
    else:
        log, truth, inputs = simulate(config)
        with Run(config.stage("ope"), config, inputs) as made:
            columns = {
                "user": log.user,
                "page": log.page,
                "reward": log.reward,
                "propensity": log.propensity,
                "target_propensity": log.target,
                "candidates": log.candidates,
                "logging_score": log.logging_score,
                "target_score": log.target_score,
            }
            with atomic(made.path / "log.parquet") as beside:
                pq.write_table(
                    pa.table({n: c.tolist() for n, c in columns.items() if c is not None}), beside
                )
            out = made.path / "ope.json"
    for line in said:
        print(f"ope: {line}", flush=True)
    found = estimates(log, config.min_ess, config.seed)
    print(report(log, found, truth))
    if all(v.refused for v in found.values()):
        raise PageLLMError(
            f"every estimate is refused, the best with {max(v.ess for v in found.values()):.1f} "
            f"effective sessions of {len(log.user):,}; log more, explore more, or take a nearer "
            "target"
        )
    write_json(
        out,
        abtest.finite(
            {"read": said, "truth": truth, "estimates": {n: vars(v) for n, v in found.items()}}
        ),
    )
    print(out)
    return found


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm ope"))
