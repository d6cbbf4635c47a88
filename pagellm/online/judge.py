"""Judge two policies' pages in pairs (the paper's RQ3): which of the two would a user prefer?

Reads   data/<dataset>, runs/<run>/evaluate/<policy>/pages.parquet of two policies; optionally
        people's verdicts
Writes  runs/<run>/judge-<backend>      verdicts.parquet, done, and opinions.jsonl: the cache of
                                        answers, which `replay` reads

    pagellm judge --backend rules
    OPENAI_API_KEY=... pagellm judge --backend http --url https://host/v1 \\
        --model name --budget 400

    rules    relevance to the history, diversity, redundancy and order, by formula
    reward   the reward model; the result is marked as circular if a policy was trained on it
    http     any server that answers POST <url>/chat/completions with a JSON schema
    replay   opinions that one of these wrote earlier; asks nothing

Every pair is shown in both orders. If the two answers name different pages, the pair is a tie; the
share of such pairs measures the judge's position bias.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pagellm.data.shop import Shop, load
from pagellm.data.tables import ids_of, read_table, told
from pagellm.model.policy import Policy
from pagellm.model.reward_model import RewardModel
from pagellm.online.judge_backends import (
    ABSTAINED,
    Context,
    Http,
    Kept,
    Opinion,
    Replay,
    Reward,
    Rules,
)
from pagellm.pages.ranked import last_evaluated, read_pages
from pagellm.pages.stats import wilson
from pagellm.stage import randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.dist import pick_device
from pagellm.stage.files import atomic, read_json
from pagellm.stage.run import Run, StageConfig, file_id, finished

__all__ = ["Config", "Judge", "Verdict", "agreement", "read_labels", "run", "summarise"]


SAME = ("the pages are equal",)
Z95 = NormalDist().inv_cdf(0.975)  # standard errors on either side of a 95% interval


@dataclass(frozen=True)
class Verdict:
    """The answers to both orders, and what they add up to.

    winner    a, b, tie, or abstain if an order has no answer
    forward   the opinion with a shown first
    backward  the opinion with b shown first
    """

    winner: str
    confidence: float
    reasons: tuple[str, ...]
    forward: Opinion
    backward: Opinion

    @property
    def consistent(self) -> bool:
        """Whether both orders gave the same winner."""
        return (self.forward.winner, self.backward.winner) in (
            ("first", "second"),
            ("second", "first"),
            ("tie", "tie"),
        )


class Judge:
    """Compares pages by asking a backend in both orders.

    backend  anything with ask(context, first, second) -> Opinion; pages are item ids (K,), the
             first slot first
    """

    def __init__(self, backend):
        self.backend = backend

    def compare(self, context: Context, page_a: Sequence[int], page_b: Sequence[int]) -> Verdict:
        """Ask in both orders. A page wins if it wins both times, else it is a tie.

        Equal pages are a tie without asking.
        """
        a, b = [int(i) for i in page_a], [int(i) for i in page_b]
        if a == b:
            same = Opinion("tie", 1.0, SAME)
            return Verdict("tie", 1.0, same.reasons, same, same)
        forward, backward = self.backend.ask(context, a, b), self.backend.ask(context, b, a)
        winner = {("first", "second"): "a", ("second", "first"): "b"}.get(
            (forward.winner, backward.winner), "tie"
        )
        if ABSTAINED in (forward.winner, backward.winner):
            winner = ABSTAINED
        agreed = winner != "tie" or forward.winner == backward.winner == "tie"
        return Verdict(
            winner,
            min(forward.confidence, backward.confidence) if agreed else 0.0,
            (*forward.reasons, *backward.reasons),
            forward,
            backward,
        )


def summarise(verdicts: Sequence[Verdict]) -> dict:
    """Numbers about all verdicts.

    abstained     pairs without a verdict, which are left out
    a, b, tie     how often each was the verdict
    win_rate      of b, with ties counted as a half; interval: Wilson's
    inconsistent  share of pairs on which the two orders disagree
    first_rate    share of the decisive answers that named the page shown first, with
                  first_interval; 0.5 means no position bias
    """
    abstained = sum(v.winner == ABSTAINED for v in verdicts)
    verdicts = [v for v in verdicts if v.winner != ABSTAINED]
    n = len(verdicts)
    wins = {name: sum(v.winner == name for v in verdicts) for name in ("a", "b", "tie")}
    said = [o.winner for v in verdicts for o in (v.forward, v.backward) if o.winner != "tie"]
    half = wins["b"] + wins["tie"] / 2
    first = said.count("first")
    return {
        "pairs": n,
        "abstained": abstained,
        **wins,
        "win_rate": half / n if n else None,
        "interval": wilson(half, n, Z95)[1:],
        "inconsistent": sum(not v.consistent for v in verdicts) / n if n else None,
        "first_rate": first / len(said) if said else None,
        "first_interval": wilson(first, len(said), Z95)[1:],
    }


def agreement(ours: Sequence[str], people: Sequence[str]) -> dict:
    """Share of equal verdicts (a, b, tie) with its Wilson interval, and Cohen's kappa.

    kappa is None if chance alone would make all verdicts agree.
    Source: Cohen, Educational and Psychological Measurement 20, 1960.
    """
    if len(ours) != len(people):
        raise ValueError(f"agreement: {len(ours)} verdicts against {len(people)}")
    n, same = len(ours), sum(a == b for a, b in zip(ours, people, strict=True))
    chance = (
        sum(list(ours).count(w) * list(people).count(w) for w in ("a", "b", "tie")) / n**2
        if n
        else 1.0
    )
    return {
        "pairs": n,
        "agreement": same / n if n else None,
        "interval": wilson(same, n, Z95)[1:],
        "kappa": (same / n - chance) / (1 - chance) if chance < 1 else None,
    }


def read_labels(
    path: str | Path, policies: tuple[str, str], said: list[str] | None = None
) -> dict[str, str]:
    """Read people's verdicts: user id -> a, b or tie.

    The file is CSV or Parquet, with columns user and winner (a policy's name, or tie).
    said  is filled with a line about what was read and what was left over, if given
    """
    path = Path(path)
    if not path.is_file():
        raise PageLLMError(
            f"no labels {str(path)!r}; want a CSV or Parquet file with columns user, winner"
        )
    table = read_table(path, ("user", "winner"))
    if not {"user", "winner"} <= set(table.column_names):
        raise PageLLMError(f"{path} has {', '.join(table.column_names)}; want columns user, winner")
    if said is not None:
        said.append(told(path, table, ("user", "winner")))
    name = {policies[0]: "a", policies[1]: "b", "tie": "tie"}
    found = {}
    for user, winner in zip(ids_of(table, "user", path), table["winner"].to_pylist(), strict=True):
        if winner not in name or user in found:
            raise PageLLMError(
                f"{path}: user {user}, winner {winner!r}: want each user once, and one of "
                f"{', '.join(name)}"
            )
        found[user] = name[winner]
    return found


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Judge the pages of two policies for a sample of users."""

    a: str = "sft"  # policy that b is compared with; its pages lie in <runs>/<run>/evaluate/<a>
    b: str = ""  # policy whose win rate is reported; empty: compose if its pages are there,
    # else ppo
    backend: str = "rules"  # what judges: rules, reward, http, replay
    users: int = 200  # number of users whose pages are judged; 0: all
    k: int = 20  # slots of a page that are shown
    history: int = 20  # number of liked items that are shown, the latest
    reward_run: str = ""  # run whose reward model judges; empty: this run
    labels: str = ""  # people's verdicts: CSV or Parquet with columns user (the shop's id), winner
    opinions: str = ""  # replay: opinions.jsonl of an earlier run of the judge
    url: str = ""  # http: address up to /chat/completions, e.g. http://127.0.0.1:8080/v1
    model: str = ""  # http: name of the model
    key_env: str = "OPENAI_API_KEY"  # http: environment variable that holds the key, which is
    # written nowhere, and goes over https:// or to this machine only
    budget: int = 1000  # http: most requests of this command, repeats included
    retries: int = 4  # http: most repeats of one question
    timeout: float = 60.0  # http: seconds to wait for an answer

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            backend=(
                self.backend in ("rules", "reward", "http", "replay"),
                "rules, reward, http or replay",
            ),
            k=(self.k > 0, "1 or more"),
            history=(self.history > 0, "1 or more"),
            a=(self.a != self.b, "unlike b"),
            timeout=(self.timeout > 0, "above 0"),
        )


def backend_of(config: Config, shop: Shop):
    if config.backend == "rules":
        return Rules(shop)
    if config.backend == "http":
        return Http(
            shop,
            config.url,
            config.model,
            os.environ.get(config.key_env, ""),
            config.budget,
            config.retries,
            config.timeout,
        )
    if config.backend == "replay":
        return Replay(config.opinions)
    where, device = config.stage("reward", config.reward_run), pick_device(config.device)
    finished(where, "reward model", config.make("reward", config.reward_run))
    reader = config.stage(
        "sft", read_json(where / "config.json")["config"]["source_run"] or config.reward_run
    )
    return Reward(RewardModel.load(where, device), Policy.load(reader, device))


def circular(config: Config) -> list[str]:
    """Those of the two policies that were trained on the reward model that judges."""
    if config.backend != "reward":
        return []
    judge = finished(
        config.stage("reward", config.reward_run),
        "reward model",
        config.make("reward", config.reward_run),
    )["id"]
    return [
        name
        for name in (config.a, config.b)
        if (path := config.stage(name) / "config.json").exists()
        and judge in read_json(path)["inputs"].values()
    ]


def report(config: Config, name: str, found: dict) -> str:
    if not found["pairs"]:
        return f"judge: {name}; no verdict on any of {found['abstained']} pairs"
    low, high = found["interval"]
    same = f"; {found['equal']} of them have equal pages, a tie unasked" if found["equal"] else ""
    lines = [
        f"judge: {name}; {found['pairs']} users, each asked in both orders{same}",
        f"{config.b} wins {found['b']}, {config.a} wins {found['a']}, ties {found['tie']}",
        f"win rate of {config.b}, ties a half: {found['win_rate']:.3f} [{low:.3f}, {high:.3f}] "
        "(Wilson, 95%)",
        f"the orders disagree on {found['inconsistent']:.1%}",
    ]
    if found["abstained"]:
        lines.append(f"no verdict on {found['abstained']} further pairs, which are left out")
    if found["first_rate"] is not None:
        low, high = found["first_interval"]
        lines[-1] += (
            f"; the page shown first is named in {found['first_rate']:.3f} [{low:.3f}, {high:.3f}]"
        )
    if found["circular"]:
        lines.append(
            f"CIRCULAR: {' and '.join(found['circular'])} was trained on this reward model; its "
            "win proves nothing but that training worked"
        )
    if people := found.get("people"):
        low, high = people["interval"]
        kappa = "–" if people["kappa"] is None else f"{people['kappa']:.3f}"
        lines.append(
            f"agreement with people on {people['pairs']} pairs: {people['agreement']:.3f} "
            f"[{low:.3f}, {high:.3f}], kappa {kappa}"
        )
    return "\n".join(lines)


def labels_used(
    labels: dict[str, str], judged: Sequence[str], verdicts: Sequence[Verdict], shop: Shop
) -> str:
    """How many of people's verdicts are compared, and why the others are not."""
    said = dict(zip(judged, verdicts, strict=True))
    known = set(shop.user_ids)
    strange = [user for user in labels if user not in known]
    unasked = [user for user in labels if user in known and user not in said]
    silent = [user for user in labels if user in said and said[user].winner == ABSTAINED]
    used = len(labels) - len(strange) - len(unasked) - len(silent)
    parts = [f"{used:,} of {len(labels):,} labels are compared"]
    for users, why in (
        (unasked, "are of users who were not judged (--users 0 judges all that have pages)"),
        (silent, "are of pairs without a verdict"),
        (strange, "are of users whom the shop does not have"),
    ):
        if users:
            more = ", ..." if len(users) > 3 else ""
            parts.append(f"{len(users):,} {why}: {', '.join(users[:3])}{more}")
    return "; ".join(parts)


@dataclass
class Pairs:
    """users (U,), both policies' pages (U, k), -1 past the end; inputs: ids of the files read.

    said  in words, how many users have pages and how many of these are judged
    """

    user: np.ndarray
    a: np.ndarray
    b: np.ndarray
    inputs: dict[str, str] = field(default_factory=dict)
    said: str = ""


def read_pairs(config: Config, shop: Shop) -> Pairs:
    ranked, inputs = [], {"data": file_id(config.data_dir / "source.json")}
    for name in (config.a, config.b):
        path = config.stage("evaluate") / name / "pages.parquet"
        if not path.exists():
            raise PageLLMError(
                f"no pages of {name} in {path}\n  Make them with: {config.make('evaluate')}"
            )
        inputs[name] = file_id(path)
        ranked.append(read_pages(path, shop))
    users = np.intersect1d(ranked[0].user, ranked[1].user)
    alone = [len(r.user) - len(users) for r in ranked]
    both = len(users)
    if config.users:
        users = np.sort(
            randomness.rng(config.seed, "judge", "users").permutation(users)[: config.users]
        )
    if len(users) == 0:
        raise PageLLMError(f"no user has pages of both {config.a} and {config.b}")
    pages = []
    for r in ranked:
        on_page = np.arange(r.item.shape[1]) < np.minimum(r.slots, config.k)[:, None]
        pages.append(np.where(on_page, r.item, -1)[np.searchsorted(r.user, users), : config.k])
    said = f"{len(users):,} of {both:,} users with pages of both are judged"
    for name, n in zip((config.a, config.b), alone, strict=True):
        said += f"; {n:,} users have a page of {name} alone" if n else ""
    return Pairs(users, pages[0], pages[1], inputs, said)


def run(config: Config) -> dict:
    """Judge the pages. Returns what `summarise` gives, with equal, circular, and people if asked.

    equal     number of users whose two pages are equal
    circular  policies that were trained on the reward model that judges
    people    `agreement` with the labels, if labels are given
    """
    if not config.b:
        config = replace(config, b=last_evaluated(config.stage("evaluate")))
    shop = load(config.data_dir)
    pairs = read_pairs(config, shop)
    said = [pairs.said]
    labels = read_labels(config.labels, (config.a, config.b), said) if config.labels else {}
    print("\n".join(f"judge: {line}" for line in said), flush=True)
    backend, history = backend_of(config, shop), shop.csr("train")
    free = ("users", "labels", "budget", "retries", "timeout", "key_env")
    if config.backend == "reward":
        pairs.inputs["reward"] = finished(
            config.stage("reward", config.reward_run),
            "reward model",
            config.make("reward", config.reward_run),
        )["id"]
    if config.backend == "replay":
        pairs.inputs["opinions"] = file_id(config.opinions)
    with Run(config.stage(f"judge-{config.backend}"), config, pairs.inputs, free) as out:
        if config.backend != "replay":
            backend = Kept(backend, out.path / "opinions.jsonl")
        judge, verdicts = Judge(backend), []
        for user, a, b in zip(pairs.user, pairs.a, pairs.b, strict=True):
            items, ratings = (x[-config.history :] for x in history.of(user))
            verdicts.append(judge.compare(Context(int(user), items, ratings), a[a >= 0], b[b >= 0]))
        found = {
            **summarise(verdicts),
            "equal": sum(v.reasons == SAME for v in verdicts),
            "circular": circular(config),
        }
        ids = [shop.user_ids[u] for u in pairs.user]
        both = [
            (v.winner, labels[u])
            for u, v in zip(ids, verdicts, strict=True)
            if u in labels and v.winner != ABSTAINED
        ]
        if labels:
            found["people"] = agreement([v for v, _ in both], [p for _, p in both])
            print(f"judge: {labels_used(labels, ids, verdicts, shop)}", flush=True)
            if not both:
                raise PageLLMError(
                    f"{config.labels} names none of the {len(ids)} users judged; want the shop's "
                    f"ids, e.g. {ids[0]}"
                )
        with atomic(out.path / "verdicts.parquet") as beside:
            pq.write_table(
                pa.table(
                    {
                        "user": ids,
                        "winner": [v.winner for v in verdicts],
                        "confidence": [v.confidence for v in verdicts],
                        "forward": [v.forward.winner for v in verdicts],
                        "backward": [v.backward.winner for v in verdicts],
                        "reasons": pa.array(
                            [list(v.reasons) for v in verdicts], pa.list_(pa.string())
                        ),
                    }
                ),
                beside,
            )
        out.finish(backend=backend.name, **found)
        print(f"{report(config, backend.name, found)}\n{out.path}")
    return found


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm judge"))
