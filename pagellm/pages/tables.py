"""Tables of results with paired intervals: records -> Markdown, LaTeX.

    records = compare({"EASE": [per_user], "ALS": [per_user]}, ("Recall@20", "NDCG@100"), versus="EASE")
    print(markdown(records))

per_user is {metric: (U,) array} of one seed, users in the same order everywhere. A cell holds the mean, and in
brackets the paired difference to `versus`, its 95% interval and d, the difference over its standard deviation
among users. `spread` puts study.rows_of's records the other way round: metrics down, with the spread over seeds.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pagellm.pages import metrics, stats
from pagellm.pages.stats import difference, effect
from pagellm.stage.config import PageLLMError
from pagellm.stage.files import atomic

__all__ = ["compare", "latex", "markdown", "per_user", "save", "spread", "write_table"]


ARROW = {"up": "↑", "down": "↓"}


def compare(
    results: dict[str, list[dict[str, np.ndarray]]],
    columns: Sequence[str],
    versus: str,
    seed: int = 0,
    n_boot: int = 1000,
) -> list[dict]:
    """One record for each row and metric: mean, and the paired difference to the row `versus`.

    results  row -> one {metric: (U,)} a seed. One seed: bootstrap over users; several: over seeds, then users
    Raises PageLLMError if there is no row `versus` or the rows have other numbers of seeds.
    """
    if versus not in results:
        raise PageLLMError(f"no row {versus!r} to compare with; there are {', '.join(results)}")
    if len({len(seeds) for seeds in results.values()}) > 1:
        raise PageLLMError(
            f"rows have {', '.join(f'{name}: {len(s)}' for name, s in results.items())} seeds: "
            "want equally many"
        )
    records = []
    for name, seeds in results.items():
        for metric in columns:
            if not all(metric in scores and not np.isnan(scores[metric]).all() for scores in seeds):
                continue
            record = {
                "variant": name,
                "metric": metric,
                "direction": metrics.DIRECTION.get(metric, "up"),
                "seeds": len(seeds),
                "users": int((~np.isnan(seeds[0][metric])).sum()),
                "mean": float(np.mean([np.nanmean(s[metric]) for s in seeds])),
                "versus": versus,
                "difference": 0.0,
                "low": 0.0,
                "high": 0.0,
                "effect": 0.0,
            }
            first = [scores[metric] for scores in results[versus] if metric in scores]
            if name != versus and len(first) == len(seeds):
                mine = [scores[metric] for scores in seeds]
                if len(seeds) == 1:
                    found = [
                        stats.paired(mine[0], first[0], seed, n_boot)[k]
                        for k in ("mean", "low", "high")
                    ]
                else:
                    found = difference(mine, first, n_boot, seed)
                record |= dict(
                    zip(("difference", "low", "high"), found, strict=True),
                    effect=effect(mine, first),
                )
            records.append(record)
    return records


def grid(records: list[dict]) -> tuple[list[str], list[str], dict, dict]:
    """Row names, metrics, {(row, metric): record} and {metric: the best mean}; none where all rows are equal."""
    names, columns = (list(dict.fromkeys(r[key] for r in records)) for key in ("variant", "metric"))
    at = {(r["variant"], r["metric"]): r for r in records}
    best = {}
    for metric in columns:
        some = [r for r in records if r["metric"] == metric]
        low, high = (pick(r["mean"] for r in some) for pick in (min, max))
        best[metric] = None if low == high else high if some[0]["direction"] == "up" else low
    return names, columns, at, best


def markdown(records: list[dict]) -> str:
    """Rows down, metrics across; the best mean of a column is bold, and so is any that equals it."""
    names, columns, at, best = grid(records)
    direction = {r["metric"]: ARROW[r["direction"]] for r in records}
    lines = [
        "| | " + " | ".join(f"{c} {direction[c]}" for c in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name in names:
        cells = []
        for metric in columns:
            r = at.get((name, metric))
            value = "–" if r is None else f"{r['mean']:.4f}"
            cells.append(f"**{value}**" if r is not None and best[metric] == r["mean"] else value)
            if r is not None and name != r["versus"]:
                cells[-1] += (
                    f" ({r['difference']:+.4f} [{r['low']:+.4f}, {r['high']:+.4f}], d {r['effect']:+.2f})"
                )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(records: list[dict]) -> str:
    """Markdown of study.rows_of's records: metrics down; each variant's mean ± its standard deviation over seeds (none
    of one seed), then the paired difference to the first variant with its 95% interval and effect size d."""
    names, columns, at, _ = grid(records)
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for metric in columns:
        cells = []
        for name in names:
            r = at.get((name, metric))
            if r is None:
                cells.append("–")
                continue
            cell = f"{r['mean']:.4f}" + (
                "" if np.isnan(r["sd_over_seeds"]) else f" ± {r['sd_over_seeds']:.4f}"
            )
            cells.append(
                cell
                if name == r["versus"]
                else f"{cell}, {r['difference']:+.4f} [{r['low']:+.4f}, {r['high']:+.4f}], d {r['effect']:+.2f}"
            )
        direction = next(ARROW[r["direction"]] for r in records if r["metric"] == metric)
        lines.append(f"| {metric} {direction} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def latex(records: list[dict]) -> str:
    """The same as a booktabs table; differences stand in a small line under the means."""
    names, columns, at, best = grid(records)
    arrow = {
        r["metric"]: r"$\uparrow$" if r["direction"] == "up" else r"$\downarrow$" for r in records
    }
    lines = [
        r"\begin{tabular}{l" + "r" * len(columns) + "}",
        r"\toprule",
        " & ".join(["", *(f"{escape(c)} {arrow[c]}" for c in columns)]) + r" \\",
        r"\midrule",
    ]
    for name in names:
        means, under = [escape(name)], [""]
        for metric in columns:
            r = at.get((name, metric))
            value = "--" if r is None else f"{r['mean']:.4f}"
            means.append(
                rf"\textbf{{{value}}}" if r is not None and best[metric] == r["mean"] else value
            )
            under.append(
                ""
                if r is None or name == r["versus"]
                else rf"{{\scriptsize ${r['difference']:+.4f}$ [${r['low']:+.4f}$, ${r['high']:+.4f}$]}}"
            )
        lines.append(" & ".join(means) + r" \\")
        if any(under):
            lines.append(" & ".join(under) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def escape(text: str) -> str:
    return "".join("\\" + c if c in "&%$#_{}" else c for c in text)


def save(folder: Path, records: list[dict], heading: str) -> str:
    """Write table.parquet, table.md, table.tex into `folder`; returns the Markdown with its heading."""
    write_table(folder / "table.parquet", records)
    text = f"{heading}\n\n{markdown(records)}\n"
    comment = "".join(f"% {line}\n" for line in heading.splitlines())
    for name, content in (("table.md", text), ("table.tex", comment + latex(records) + "\n")):
        with atomic(folder / name) as beside:
            beside.write_text(content)
    return text


def per_user(path: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(path)
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


def write_table(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as beside:
        pq.write_table(pa.Table.from_pylist(records), beside)
