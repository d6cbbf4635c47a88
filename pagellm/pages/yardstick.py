"""Baselines re-ranked for variety, and for each metric whether our pages are ahead of them.

    records = sweep("ALS", ranked, scorer, kin, k=20)      # a frontier: one record per strength
    strength = chosen(records, "ALS", "mmr")                # by validation scores
    print(verdict_table(verdicts(ours, {"ALS + MMR": scores})))

A frontier shows how much accuracy a baseline loses for variety. It is measured on validation rows,
where the strength is also chosen. Test rows are read once, at the chosen strength.
"""

from collections.abc import Callable, Sequence

import numpy as np

from pagellm.pages import rerank, stats
from pagellm.pages.metrics import DIRECTION
from pagellm.pages.ranked import RankedPages, Scorer

__all__ = [
    "ACCURACY",
    "JUDGED_BY",
    "SHARE",
    "VARIETY",
    "VERDICTS",
    "best_of",
    "chosen",
    "frontier_table",
    "means",
    "said_of_best",
    "sweep",
    "verdict",
    "verdict_grid",
    "verdict_table",
    "verdicts",
]

ACCURACY = ("Recall@20", "NDCG@100")
VARIETY = ("ILD", "entropy", "redundancy", "energy")
JUDGED_BY = (*ACCURACY, "ILD", "energy")  # what one is chosen by, out of several kinds of pages
VERDICTS = ("ahead", "level", "unclear", "behind")
SHARE = 0.01  # of a row's value: how far below it an interval may reach and still be level


def sweep(
    base: str,
    ranked: RankedPages,
    scorer: Scorer,
    kin: rerank.Kin,
    k: int,
    methods: Sequence[str] = tuple(rerank.METHODS),
    users: int = 1000,
) -> list[dict]:
    """Re-rank a base's pages at rising strengths; one record per method and strength.

    base     its name in the records
    ranked   its ranks of validation users
    users    the first so many users are measured; 0: all
    returns  records {"base", "method", "strength", <metric>: mean over users}; strength 0 is there
             once for each method. A method ends after the second strength in a row that `choose`
             would not take, since accuracy only falls from there.
    """
    if 0 < users < len(ranked.user):
        ranked = RankedPages(*(x[:users] for x in vars(ranked).values()))
    plain, records = means(scorer(ranked, k)), []
    for method in methods:
        tried, beyond = {0.0: plain}, 0
        for strength in rerank.STRENGTHS[method]:
            again = rerank.reranked(ranked, kin, k, method, strength)
            tried[strength] = means(scorer(again, k))
            beyond = 0 if rerank.choose(tried) == strength else beyond + 1
            if beyond == 2:
                break
        records += [
            {"base": base, "method": method, "strength": strength, **row}
            for strength, row in tried.items()
        ]
    return records


def means(scores: dict[str, np.ndarray]) -> dict[str, float]:
    """Metric -> mean over the users for whom it is defined; without metrics that nobody has."""
    return {m: float(np.nanmean(v)) for m, v in scores.items() if not np.isnan(v).all()}


def best_of(
    found: dict[str, dict[str, float]], measures: Sequence[str] = JUDGED_BY
) -> tuple[str, dict[str, float]]:
    """Of several kinds of pages the one whose worst relative difference to any other is best.

    A mean over measures would let a large gain in one pay for a loss in another. Of equals the
    first one counts.

    found    name -> mean of each measure, more is better; a measure that one lacks counts nowhere
    returns  the name, and every name's worst difference as a share of the other's value; 0 alone
    Raises ValueError if nothing is found.
    """
    if not found:
        raise ValueError("best_of: nothing to choose from")
    shared = [m for m in measures if all(m in row for row in found.values())]
    worst = {
        name: min(
            (
                (row[m] - other[m]) / max(abs(other[m]), 1e-9)
                for rival, other in found.items()
                if rival != name
                for m in shared
            ),
            default=0.0,
        )
        for name, row in found.items()
    }
    return max(worst, key=lambda name: worst[name]), worst


def said_of_best(best: str, worst: dict[str, float]) -> str:
    """Why `best_of` chose it, in words."""
    if len(worst) == 1:
        return "the only one there"
    each = ", ".join(f"{name} {value:+.1%}" for name, value in worst.items())
    return f"worst difference to another on validation: {each} ({', '.join(JUDGED_BY)})"


def chosen(records: list[dict], base: str, method: str) -> float:
    """The strength that `rerank.choose` takes from the records of one base and method."""
    tried = {r["strength"]: r for r in records if (r["base"], r["method"]) == (base, method)}
    return rerank.choose(tried)


def verdict(low: float, high: float, value: float) -> str:
    """One of VERDICTS from the 95% interval of a difference in which more is better.

    Ahead: the whole interval is above 0. Level: it reaches at most 1% of the row's value below 0.
    Unclear: it holds 0 and reaches further down, so that there are too few users to say. Behind:
    all of it is below 0.

    low, high  the interval      value  the mean of the row that is compared with
    """
    if low > 0:
        return "ahead"
    if low >= -SHARE * abs(value):
        return "level"
    return "unclear" if high >= 0 else "behind"


def verdicts(
    ours: list[dict[str, np.ndarray]],
    rows: dict[str, list[dict[str, np.ndarray]]],
    columns: Sequence[str],
    seed: int = 0,
    n_boot: int = 1000,
) -> list[dict]:
    """Ours against every row, metric by metric.

    ours, rows[name]  one {metric: (U,)} for each seed, the same users in the same order
    returns           records {"row", "metric", "difference", "low", "high", "p", "p_holm", "value",
                      "verdict"}; the difference is ours - row, turned so that more is better;
                      p_holm is corrected over the metrics of its row
    """
    records = []
    for name, theirs in rows.items():
        for metric in columns:
            if not all(metric in scores for scores in (*ours, *theirs)):
                continue
            mine, other = ([s[metric] for s in seeds] for seeds in (ours, theirs))
            if any(np.isnan(a - b).all() for a, b in zip(mine, other, strict=True)):
                continue
            mean, low, high, p = stats.interval(mine, other, seed, n_boot)
            if DIRECTION.get(metric, "up") == "down":
                mean, low, high = -mean, -high, -low
            value = float(np.mean([np.nanmean(b) for b in other]))
            records.append(
                {
                    "row": name,
                    "metric": metric,
                    "difference": mean,
                    "low": low,
                    "high": high,
                    "p": p,
                    "value": value,
                    "verdict": verdict(low, high, value),
                }
            )
    return stats.with_holm(records, "row")


def verdict_table(records: list[dict], ours: str = "PageLLM") -> str:
    """One line per row: how often ours is which of VERDICTS, and where it is behind."""
    heads = "".join(f"{what:>9}" for what in VERDICTS)
    lines = [f"{ours + ' against':<22}{heads}   (95% intervals; level: within 1%)"]
    for row in dict.fromkeys(r["row"] for r in records):
        some = [r for r in records if r["row"] == row]
        named = {what: [r["metric"] for r in some if r["verdict"] == what] for what in VERDICTS}
        behind = f"   behind: {', '.join(named['behind'])}" if named["behind"] else ""
        counts = "".join(f"{len(named[what]):>9}" for what in named)
        lines.append(f"{row:<22}{counts}{behind}")
    return "\n".join(lines)


def verdict_grid(records: list[dict], columns: Sequence[str], ours: str = "PageLLM") -> str:
    """One line per row, one column per metric: which of VERDICTS ours is, and by how much.

    The differences are turned so that more is better.
    """
    found = {(r["row"], r["metric"]): r for r in records}
    lines = [f"{ours + ' against':<18}" + "".join(f"{c:>15}" for c in columns)]
    for row in dict.fromkeys(r["row"] for r in records):
        cells = [found.get((row, column)) for column in columns]
        told = ["–" if r is None else f"{r['verdict']} {r['difference']:+.3f}" for r in cells]
        lines.append(f"{row:<18}" + "".join(f"{cell:>15}" for cell in told))
    return "\n".join(lines)


def frontier_table(
    records: list[dict], pick: Callable[[list[dict], str, str], float] = chosen
) -> str:
    """Every base and method at strength 0 and at the strength that validation allows."""
    columns = [m for m in (*ACCURACY, *VARIETY) if any(m in r for r in records)]
    lines = [
        f"{'validation rows':<18}{'method':<8}{'strength':>9}"
        + "".join(f"{c:>12}" for c in columns)
    ]
    for base in dict.fromkeys(r["base"] for r in records):
        methods = dict.fromkeys(r["method"] for r in records if r["base"] == base)
        shown = [("", 0.0, next(iter(methods)))]
        shown += [(m, s, m) for m in methods if (s := pick(records, base, m)) > 0]
        for label, strength, method in shown:
            key = (base, method, strength)
            r = next(r for r in records if (r["base"], r["method"], r["strength"]) == key)
            cells = "".join(f"{r[c]:>12.4f}" if c in r else f"{'–':>12}" for c in columns)
            lines.append(f"{base:<18}{label or 'as it is':<8} {strength:>8g}{cells}")
    return "\n".join(lines)
