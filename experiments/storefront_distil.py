"""Teacher, students and template writer side by side, on people whom no student was taught by.

Reads   data/<dataset>, runs/<run>/storefront/{build, tune, teach, student-*, prefer}
Writes  runs/<run>/storefront-distil/metrics.json, table.txt

    make storefront-distil DATASET=complete_journey
    python -m experiments.storefront_distil --dataset complete_journey --people 60

Rows of the table: `template`, as it is and with three keywords, since the teacher's objective likes
few; `search`, the teacher; a row for each student that is there, by
the labels it was taught (`clean`, `raw`, and both with 15% of the answers swapped); the student
after preference. Every writer is asked for the same people's rows, and what it cannot write is
the template's, as on a page. J is the teacher's objective (search.py), summed over a person's rows;
time is the writer's own CPU time. Costs are assumptions, and printed.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from experiments.storefront import keep
from experiments.storefront_study import Limited
from pagellm.pages import stats
from pagellm.stage import dist, randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.storefront.front import WAYS, Sources, Store, open_store
from pagellm.storefront.local import Local
from pagellm.storefront.making import Writer
from pagellm.storefront.offers import open_rows_of
from pagellm.storefront.page import page, written_ahead
from pagellm.storefront.parts import Answer, Context, Keyword, Theme
from pagellm.storefront.remote import Remote
from pagellm.storefront.search import Objective, Search
from pagellm.storefront.teach import part_of, template_of
from pagellm.storefront.tune import people_of

__all__ = ["Config", "Timed", "run", "usd"]

STUDENTS = {
    "student, clean labels": "student-clean",
    "student, raw labels": "student-raw",
    "student, 15% swapped, cleaned": "student-clean-swapped",
    "student, 15% swapped, raw": "student-raw-swapped",
    "student, clean, preference": "prefer",
}
TEACHER, PLAIN, FEW = "search (teacher)", "template", "template, 3 keywords"
FITTING = (5, 20)  # first candidates of a row whose fit is looked at
PRICE_IN, PRICE_OUT, CORE_HOUR = 0.15, 0.60, 0.04  # USD: a million tokens read, written; a core


@dataclass(frozen=True, kw_only=True)
class Config(Sources):
    """Ask every writer for the rows of the same test people, and print one table."""

    people: int = 60  # test people, drawn by seed; 0: all
    ways: str = "trie"  # how each student writes keywords, comma-separated: trie, prompt, free
    n_boot: int = 1000  # bootstrap draws behind an interval

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            ways=(set(self.ways.split(",")) <= set(WAYS), f"some of {','.join(WAYS)}"),
            people=(self.people >= 0, "0 or more"),
            n_boot=(self.n_boot > 1, "2 or more"),
            writer=(self.writer == "template", "no writer: all of them are compared"),
        )


def usd(calls: Sequence[tuple[int, int]], core_seconds: float = 0.0, pages: int = 1) -> float:
    """Cost of a page: tokens read and written by each call, and processor time, over the pages that
    one generation serves.

    calls  (prompt tokens, completion tokens) of each
    """
    tokens = sum(read * PRICE_IN + wrote * PRICE_OUT for read, wrote in calls) / 1e6
    return (tokens + core_seconds / 3600 * CORE_HOUR) / pages


@dataclass
class Timed:
    """A writer whose own processor time and tokens are counted."""

    writer: Writer
    seconds: float = 0.0
    calls: list[tuple[int, int]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.writer.name

    @property
    def chooses(self) -> bool:
        return getattr(self.writer, "chooses", False)

    def themes(
        self, contexts: list[Context], intents: list[list[str]], used: list[list[str]]
    ) -> list[list[Answer[Theme]]]:
        began = time.process_time()
        found = self.writer.themes(contexts, intents, used)
        self.count(began, [answer for answers in found for answer in answers])
        return found

    def keywords(
        self, themes: list[Theme], contexts: list[Context], offered: list[np.ndarray]
    ) -> list[Answer[list[Keyword]]]:
        began = time.process_time()
        found = self.writer.keywords(themes, contexts, offered)
        self.count(began, found)
        return found

    def count(self, began: float, answers: Sequence[Answer]) -> None:
        self.seconds += time.process_time() - began
        told = [(a.prompt_tokens, a.completion_tokens) for a in answers]
        self.calls += [one for one in told if one != (0, 0)]


def writers_of(config: Config, store: Store) -> dict[str, Writer]:
    """name -> writer: template, teacher, and every student that is there."""
    front, device = store.front, dist.start(config.device)
    template = template_of(front.writer)
    found: dict[str, Writer] = {PLAIN: template, FEW: Limited(template, 3), TEACHER: Search(front)}
    for name, stage in STUDENTS.items():
        folder = config.stage(f"storefront/{stage}")
        if (folder / "done").exists():
            for way in config.ways.split(","):
                local = Local.load(folder / "model", front.corpus, device, way)
                about = name if way == "trie" else f"{name}, {way}"
                found[about] = Remote(local, template, front.known)
    if len(found) == 3:
        raise PageLLMError("no student to compare\n  Teach one: pagellm storefront student")
    return found


def measured(store: Store, writer: Writer, users: list[int], labels) -> dict[str, np.ndarray]:
    """What one writer's rows are: name -> (U,) by person, NaN where undefined."""
    timed = Timed(writer)
    front = replace(store.front, writer=timed)
    popular = np.argsort(np.argsort(front.households, kind="stable"), kind="stable")
    rank = (popular + 0.5) / len(popular)
    rows: dict[str, list[float]] = {}
    for user in users:
        context = store.known.context(store.shop.user_ids[user])
        told, intents, _ = open_rows_of(front, context, store.layout)
        timed.seconds, timed.calls = 0.0, []
        written, _ = written_ahead(front, context, store.layout)
        seconds, calls = timed.seconds, timed.calls
        some = written[: len(intents)]
        worth = [Objective(front, told, row.theme) for row in some]
        keywords = [keyword for row in some for keyword in row.keywords]
        fits = {
            k: [fitting(w, row, k) for w, row in zip(worth, some, strict=True)] for k in FITTING
        }
        found = page(front, context, store.layout, written=written)
        items, label = found.items(), labels.of(user)[0]
        one = {
            "J": sum(w(list(row.keywords)) for w, row in zip(worth, some, strict=True)),
            **{f"TP@{k}": float(np.mean(fits[k])) if some else np.nan for k in FITTING},
            "recall": float(np.isin(label, items).mean()),
            "zero": float(np.mean([k.matches < 1 for k in keywords])) if keywords else np.nan,
            "matches": float(np.median([k.matches for k in keywords])) if keywords else np.nan,
            "keywords": len(keywords) / max(len(some), 1),
            "popular": float(rank[items].mean()) if len(items) else np.nan,
            "own": sum(row.theme.source == writer.name for row in some) / max(len(some), 1),
            "valid": sum(k.text in front.corpus.number for k in keywords) / max(len(keywords), 1),
            "tokens": float(sum(map(sum, calls))),
            "ms": 1e3 * seconds,
            "usd": usd(calls, seconds),
        }
        for name, value in one.items():
            rows.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in rows.items()}


def fitting(worth: Objective, row, k: int) -> float:
    """Share of a row's first k candidates that are of its theme's mission."""
    found = worth.candidates(list(row.keywords))
    item = found.item[worth.order(found, k)]
    return float((worth.front.missions.of_item[item] == row.theme.mission).mean())


def table(results: dict, config: Config, people: int) -> str:
    shown = ("J", "TP@5", "TP@20", "recall", "zero", "matches", "popular", "own", "tokens", "ms")
    lines = [
        f"{config.dataset}: {people} people by whom no writer was taught; means. J beside its "
        "ratio to the teacher's, with the paired 95% interval",
        "",
        f"{'':<32}{'J to the teacher':>26}"
        + "".join(f"{name:>9}" for name in shown)
        + f"{'USD/1000':>10}",
    ]
    for name, one in results.items():
        ratio = one["ratio"]
        share = f"{ratio['mean']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
        cells = "".join(f"{one['means'][column]:>9.3f}" for column in shown)
        lines.append(f"{name:<32}{share:>26}{cells}{1e3 * one['means']['usd']:>10.4f}")
    lines += [
        "",
        "zero: share of keywords that find nothing; matches: items a keyword finds (median);",
        "popular: mean percentile of shown items by popularity; own: rows that the writer wrote",
        "itself; tokens, ms: of a page, the writer alone. USD: "
        f"{PRICE_IN} and {PRICE_OUT} a million tokens, {CORE_HOUR} a core-hour, every page "
        "generated anew; assumptions.",
    ]
    return "\n".join(lines) + "\n"


def ratio_of(value: np.ndarray, teacher: np.ndarray, seed: int, n_boot: int) -> dict[str, float]:
    """Mean over mean, with a bootstrap interval over people, who are drawn together."""
    rng = randomness.rng(seed, "storefront", "distil")
    at = rng.integers(0, len(value), (n_boot, len(value)))
    drawn = value[at].mean(1) / teacher[at].mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"mean": float(value.mean() / teacher.mean()), "low": float(low), "high": float(high)}


def run(config: Config) -> dict:
    """Measure all writers, print the table; returns name -> means, ratio, differences."""
    store = open_store(config)
    users, labels = people_of(store, "test")
    ids = store.shop.user_ids
    order = randomness.rng(config.seed, "storefront", "tested").permutation(users).tolist()
    test = [user for user in order if part_of(ids[user]) == "test"]
    test = test[: config.people or None]
    if not test:
        raise PageLLMError(f"{config.data_dir} has no test orders of people who were kept apart")
    found = {
        name: measured(store, writer, test, labels)
        for name, writer in writers_of(config, store).items()
    }
    results: dict[str, dict] = {}
    for name, one in found.items():
        results[name] = {
            "means": {column: float(np.nanmean(values)) for column, values in one.items()},
            "ratio": ratio_of(one["J"], found[TEACHER]["J"], config.seed, config.n_boot),
            "less template": {
                column: stats.paired(one[column], found[PLAIN][column], config.seed, config.n_boot)
                for column in ("J", "recall")
            },
            "time": float(one["ms"].mean() / found[TEACHER]["ms"].mean()),
        }
    text = table(results, config, len(test))
    for name, about in results.items():
        gap, recall = about["less template"]["J"], about["less template"]["recall"]
        text += (
            f"{name}: J less template's {gap['mean']:+.4f} "
            f"[{gap['low']:+.4f}, {gap['high']:+.4f}]; "
            f"recall {recall['mean']:+.4f} [{recall['low']:+.4f}, {recall['high']:+.4f}]; "
            f"{about['time']:.3f} of the teacher's time\n"
        )
    out = config.stage("storefront-distil")
    keep(out, results, text)
    return results


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.storefront_distil"))
