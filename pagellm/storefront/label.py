"""Rows for people to judge, and what their judgements say of the scorer.

Reads   data/<dataset>, runs/<run>/storefront/build and tune; with --labels a file that was filled
Writes  runs/<run>/storefront/label/labels.csv, scores.json

    pagellm storefront label                                     200 pairs of a title and an item
    pagellm storefront label --labels labels.csv                 what the filled-in file says

A line is a row's title, what the row is about, and an item. People write 1 or 0 into `fits` and
their name into `rater`; a file may hold lines of several people. The scorer's own opinion lies in
scores.json, so that nobody sees it. The labels that the scorer learnt from are made by rule: none
is a person's.
"""

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pagellm.stage import randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import atomic, read_json, write_json
from pagellm.stage.hints import counted
from pagellm.stage.run import finished
from pagellm.storefront.front import Sources, Store, open_store
from pagellm.storefront.gates import choose_threshold, clopper_pearson, kappa
from pagellm.storefront.page import written_ahead
from pagellm.storefront.parts import Written

__all__ = ["Config", "drawn_pairs", "read_labels", "report", "run"]

COLUMNS = ("title", "about", "item", "name", "fits", "rater")
PRECISION = 0.95  # that a threshold must be sure of
YES, NO = ("1", "yes", "y", "true"), ("0", "no", "n", "false")


@dataclass(frozen=True, kw_only=True)
class Config(Sources):
    """Write pairs of a row's title and an item for people to judge, or read their judgements."""

    pairs: int = 200  # pairs to judge; half of them are items of the row, half are others
    labels: str = ""  # a file that people filled in; empty: write one

    def __post_init__(self):
        super().__post_init__()
        check(self, pairs=(self.pairs > 1, "2 or more"))


def drawn_pairs(store: Store, pairs: int, seed: int) -> list[dict]:
    """Pairs in an order that tells nothing: title, about, item, name, score (the scorer's)."""
    front, shop = store.front, store.shop
    rng = randomness.rng(seed, "storefront", "label")
    found: list[dict] = []
    seen: set[tuple[str, str]] = set()
    for user in rng.permutation(shop.n_users).tolist():
        if shop.user_ids[user] not in store.known.number:
            continue  # was forgotten
        context = store.known.context(shop.user_ids[user])
        for row in written_ahead(front, context, store.layout)[0]:
            for item in pair_of(row, np.flatnonzero(front.stock), rng):
                key = row.theme.title, shop.catalogue.ids[item]
                if key in seen:
                    continue
                seen.add(key)
                score = front.agree(row.theme, list(row.keywords), np.array([item]))[0]
                about = {"title": key[0], "about": ", ".join(row.theme.concepts), "item": key[1]}
                about |= {"name": shop.catalogue.title[item], "fits": "", "rater": ""}
                found.append(about | {"score": float(score)})
        if len(found) >= pairs:
            break
    return [found[at] for at in rng.permutation(min(len(found), pairs)).tolist()]


def pair_of(row: Written, live: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """An item that the row may show, and one of the shop."""
    return int(rng.choice(row.found.item)), int(rng.choice(live))


def read_labels(path: Path, known: set[tuple[str, str]]) -> list[dict]:
    """The lines that people judged: title, item, fits (bool), rater.

    known  (title, item) of every pair that was written
    Raises PageLLMError for a file that is not there, lacks columns, or holds other pairs or words.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            lines, names = list(reader), reader.fieldnames or ()
    except OSError as error:
        raise PageLLMError(f"no labels in {path} ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise PageLLMError(
            f"{path} is no CSV in UTF-8 ({error})\n"
            '  A spreadsheet writes one as "CSV UTF-8, comma separated".'
        ) from None
    if missing := {"title", "item", "fits"} - set(names):
        raise PageLLMError(f"{path} has no column {', '.join(sorted(missing))}")
    found = []
    for number, line in enumerate(lines, 2):
        said = (line["fits"] or "").strip().lower()
        if not said:
            continue
        if said not in (*YES, *NO):
            raise PageLLMError(f"{path}, line {number}: fits is {said!r}; want 1 or 0")
        pair = line["title"], line["item"]
        if pair not in known:
            raise PageLLMError(
                f"{path}, line {number}: {pair[0]!r} with item {pair[1]!r} was not asked; fill in "
                "the file that this command wrote, and leave titles and items as they are"
            )
        rater = (line.get("rater") or "").strip()
        found.append({"pair": pair, "fits": said in YES, "rater": rater})
    if not found:
        raise PageLLMError(f"{path}: nobody has judged a line yet; write 1 or 0 into `fits`")
    return found


def agreement_of(labels: Sequence[dict]) -> tuple[int, float | None]:
    """Pairs that two people judged, and Cohen's kappa of these; None without any."""
    first: dict[tuple[str, str], dict] = {}
    table = np.zeros((2, 2))
    for label in labels:
        before = first.setdefault(label["pair"], label)
        if before["rater"] != label["rater"]:
            table[int(before["fits"]), int(label["fits"])] += 1
    n = int(table.sum())
    even = n and (table.sum(0) == n).any() and (table.sum(1) == n).any()
    return n, (1.0 if even else kappa(table)) if n else None


def report(labels: Sequence[dict], score: dict[tuple[str, str], float]) -> tuple[dict, str]:
    """What people's labels say of the scorer: numbers, and lines of text."""
    fits = np.array([label["fits"] for label in labels])
    scores = np.array([score[label["pair"]] for label in labels])
    both, k = agreement_of(labels)
    cut = choose_threshold(scores.round(3), fits, PRECISION)
    agreed = float(((scores >= 0.5) == fits).mean())
    lines = [
        f"{counted(len(labels), 'label')}, {fits.mean():.1%} fit; the scorer agrees with "
        f"{agreed:.1%}"
    ]
    if k is not None:
        lines.append(f"{counted(both, 'pair')} that two people judged: kappa {k:.3f}; a judge may "
                     "gate from 200 labels and .6 on")  # fmt: skip
    if cut is None:
        n = lacking(scores, fits)
        lines.append(f"no threshold is surely right in {PRECISION:.0%}: the gate would stay shut; "
                     f"what it needs: at least {counted(n, 'more label')} that fit")  # fmt: skip
    else:
        lines.append(
            f"threshold {cut.value:.3f}: surely right in {cut.bound:.1%}, lets "
            f"{cut.coverage:.1%} pass and blocks {cut.blocked:.1%} of what fits"
        )
    threshold = None if cut is None else [cut.value, cut.bound, cut.coverage, cut.blocked]
    numbers = {"labels": len(labels), "agreed": agreed, "kappa": k, "threshold": threshold}
    return numbers, "\n".join(lines)


def lacking(score: np.ndarray, fits: np.ndarray) -> int:
    """How many more labels, all of which fit, would let the best cut be sure enough."""
    best = 10**9
    for value in np.unique(score):
        kept = fits[score >= value]
        for more in range(1, 2000):
            if more >= best:
                break
            n = len(kept) + more
            if clopper_pearson(int(kept.sum()) + more, n) >= PRECISION:
                best = more
    return best


def run(config: Config) -> dict:
    """Write pairs, or report on those that people judged."""
    make = config.make("storefront build")
    finished(config.stage("storefront/build"), "storefront", make)
    folder = config.stage("storefront/label")
    path, key = folder / "labels.csv", folder / "scores.json"
    if config.labels:
        if not key.exists():
            raise PageLLMError(f"no {key}: write pairs first with: pagellm storefront label")
        score = {(title, item): value for title, item, value in read_json(key)["scores"]}
        numbers, text = report(read_labels(Path(config.labels), set(score)), score)
        print(text, flush=True)
        return numbers
    if path.exists():
        raise PageLLMError(f"{path} is there; it may hold people's work: move it away first")
    found = drawn_pairs(open_store(config), config.pairs, config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(key, {"scores": [[one["title"], one["item"], one["score"]] for one in found]})
    with atomic(path) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(found)
    print(f"{path}: {counted(len(found), 'pair')}; write 1 or 0 into `fits` and a name into "
          f"`rater`, then: pagellm storefront label --labels {path}", flush=True)  # fmt: skip
    return {"pairs": len(found)}


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm storefront label"))
