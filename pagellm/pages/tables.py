"""Tables of results: scores of users -> records with paired differences -> text, Markdown, LaTeX.

    records = compare({"EASE": [scores], "ALS": [scores]}, ("Recall@20", "NDCG@100"), versus="EASE")
    print(markdown(records))

`scores` is {metric: (U,) array} of one seed, with the users in the same order in every row. A
record is a dict about one row and one metric: its mean, and its paired difference to the row
`versus` with a 95% interval, a p-value from the same draws (corrected by Holm over the metrics of
the row), and effect size d (the mean difference over its standard deviation among users). A dagger
marks a difference whose corrected p is below .05.

    text_table        means and intervals of single rows, for a terminal
    compare           records, each row against `versus`
    compare_seeds     records, each row against the first, with the standard deviation over seeds
    markdown, latex   records as a table, metrics across
    spread            records of compare_seeds as a table, metrics down
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pagellm.pages import metrics, stats
from pagellm.stage.config import PageLLMError
from pagellm.stage.files import atomic

__all__ = [
    "ALL_COLUMNS",
    "COLUMNS",
    "DAGGER",
    "check_decimals",
    "compare",
    "compare_seeds",
    "dagger",
    "heading",
    "latex",
    "markdown",
    "per_user",
    "rewrite",
    "save",
    "spread",
    "text_table",
    "write_table",
]


# The metrics of a results table, in its order; on the right, with what only the energy knows.
COLUMNS = (
    "Recall@20",
    "Recall@40",
    "NDCG@100",
    "WAS",
    "PWKT",
    "WMRD",
    "DPA",
    "ILD",
    "entropy",
    "redundancy",
    "duplicate_rate",
)
ALL_COLUMNS = (*COLUMNS, "energy", "true_energy")
ARROW = {"up": "↑", "down": "↓"}

Scores = Mapping[str, np.ndarray]  # metric -> (U,) of one seed, NaN where undefined
Interval = tuple[float, ...]  # mean, low, high, and p where there is one
LEVEL = 0.05
DAGGER = "† p < .05 by the paired bootstrap, corrected over the metrics of a row (Holm)"


def check_decimals(decimals: int) -> tuple[bool, str]:
    """A rule for config.check: whether so many digits after the decimal point can be shown."""
    return 0 <= decimals <= 12, "0 to 12"


def dagger(record: Mapping) -> str:
    """† for a difference whose p, corrected by Holm, is below LEVEL; else ""."""
    p = record.get("p_holm")
    return "†" if p is not None and p < LEVEL else ""


def heading(metric: str) -> str:
    """A column's heading: the metric's name and an arrow in the direction that is better."""
    return f"{metric} {ARROW[metrics.DIRECTION.get(metric, 'up')]}"


def text_table(
    results: Mapping[str, Mapping[str, Mapping]],
    columns: Sequence[str],
    labels: Mapping[str, str] | None = None,
    signed: Collection[str] = (),
    per_block: int = 6,
    decimals: int = 4,
) -> str:
    """A table for a terminal: rows down, metrics across in blocks; each mean over its 95% interval.

    results    row -> metric -> {mean, low, high} as stats.summary gives; with p_holm, a dagger
               where that is below .05
    columns    metrics to show, in order; one that no row has is left out
    labels     row -> what to call it, where that is not its own name
    signed     rows whose numbers carry a sign: differences
    per_block  metrics side by side; more go into the next block of lines
    decimals   digits after the decimal point
    """
    labels = labels or {}
    columns = [c for c in columns if any(c in scores for scores in results.values())]
    width = max([20, *(len(labels.get(name, name)) + 2 for name in results)])
    lines = []
    for start in range(0, len(columns), per_block):
        block = columns[start : start + per_block]
        lines.append(" " * width + "".join(f"{heading(c):>20}" for c in block))
        for name, scores in results.items():
            cells = [scores.get(c, {"mean": None}) for c in block]
            form = f"{'+' if name in signed else ''}.{decimals}f"
            means = ["–" if c["mean"] is None else f"{c['mean']:{form}}{dagger(c)}" for c in cells]
            spans = [
                "" if c["mean"] is None else f"[{c['low']:{form}}, {c['high']:{form}}]"
                for c in cells
            ]
            lines.append(
                f"{labels.get(name, name):<{width}}" + "".join(f"{cell:>20}" for cell in means)
            )
            lines.append(" " * width + "".join(f"{cell:>20}" for cell in spans))
        lines.append("")
    return "\n".join(lines[:-1])


def compare(
    results: Mapping[str, Sequence[Scores]],
    columns: Sequence[str],
    versus: str,
    seed: int = 0,
    n_boot: int = 1000,
) -> list[dict]:
    """One record for each row and metric: mean, and the paired difference to the row `versus`.

    results  row -> scores of each seed. Intervals come from stats.interval: a bootstrap over users
             for one seed, over seeds and users for several
    columns  metrics, in order; one that a row lacks, or that is NaN for all of its users, is left
             out
    seed     of the bootstrap; n_boot is its number of draws
    Raises PageLLMError if there is no row `versus` or rows have different numbers of seeds.
    """
    if versus not in results:
        raise PageLLMError(f"no row {versus!r} to compare with; there are {', '.join(results)}")
    if len({len(seeds) for seeds in results.values()}) > 1:
        raise PageLLMError(
            f"rows have {', '.join(f'{name}: {len(s)}' for name, s in results.items())} seeds: "
            "want equally many"
        )

    def interval(mine: list[np.ndarray], other: list[np.ndarray]) -> Interval:
        return stats.interval(mine, other, seed, n_boot)

    return _records(results, columns, versus, interval, leave_out="sd_over_seeds")


def compare_seeds(results: Mapping[str, Sequence[Scores]], columns: Sequence[str]) -> list[dict]:
    """`compare` against the first row for studies of several seeds.

    A record holds `sd_over_seeds`, the standard deviation of the seeds' means (NaN for one seed),
    and no number of users. Intervals always come from stats.difference.
    """
    return _records(results, columns, next(iter(results)), stats.difference, leave_out="users")


def _records(
    results: Mapping[str, Sequence[Scores]],
    columns: Sequence[str],
    versus: str,
    interval: Callable[[list[np.ndarray], list[np.ndarray]], Interval],
    leave_out: str,
) -> list[dict]:
    """The records of `compare` and `compare_seeds`, without the key `leave_out`."""
    records = []
    for name, seeds in results.items():
        for metric in columns:
            if not all(metric in scores and not np.isnan(scores[metric]).all() for scores in seeds):
                continue
            mine = [scores[metric] for scores in seeds]
            means = [float(np.nanmean(values)) for values in mine]
            record = {
                "variant": name,
                "metric": metric,
                "direction": metrics.DIRECTION.get(metric, "up"),
                "seeds": len(seeds),
                "users": int((~np.isnan(mine[0])).sum()),
                "mean": float(np.mean(means)),
                "sd_over_seeds": float(np.std(means, ddof=1)) if len(means) > 1 else float("nan"),
                "versus": versus,
                "difference": 0.0,
                "low": 0.0,
                "high": 0.0,
                "p": None,
                "p_holm": None,
                "effect": 0.0,
            }
            other = [scores[metric] for scores in results[versus] if metric in scores]
            if name != versus and len(other) == len(mine):
                found = interval(mine, other)
                record |= zip(("difference", "low", "high", "p"), found, strict=False)
                record["effect"] = stats.effect(mine, other)
            del record[leave_out]
            records.append(record)
    return stats.with_holm(records, "variant")


def grid(records: list[dict]) -> tuple[list[str], list[str], dict, dict]:
    """Records by row and metric.

    returns  row names, metrics, {(row, metric): record}, and {metric: best mean}, which is None
             where all rows have the same mean
    """
    names, columns = (list(dict.fromkeys(r[key] for r in records)) for key in ("variant", "metric"))
    at = {(r["variant"], r["metric"]): r for r in records}
    best = {}
    for metric in columns:
        some = [r for r in records if r["metric"] == metric]
        low, high = (pick(r["mean"] for r in some) for pick in (min, max))
        best[metric] = None if low == high else high if some[0]["direction"] == "up" else low
    return names, columns, at, best


def change(record: dict, decimals: int = 4) -> str:
    """The paired difference of a record, its 95% interval and effect size d, as text."""
    gap, low, high = (f"{record[key]:+.{decimals}f}" for key in ("difference", "low", "high"))
    return f"{gap}{dagger(record)} [{low}, {high}], d {record['effect']:+.2f}"


def markdown(records: list[dict], decimals: int = 4) -> str:
    """Markdown with rows down and metrics across; the best means of a column are bold."""
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
            value = "–" if r is None else f"{r['mean']:.{decimals}f}"
            cells.append(f"**{value}**" if r is not None and best[metric] == r["mean"] else value)
            if r is not None and name != r["versus"]:
                cells[-1] += f" ({change(r, decimals)})"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(records: list[dict]) -> str:
    """Markdown of compare_seeds' records: metrics down, rows of the study across.

    A cell is the mean ± its standard deviation over seeds (left out for one seed), then the paired
    difference to the first row of the study with its 95% interval and effect size d.
    """
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
            cells.append(cell if name == r["versus"] else f"{cell}, {change(r)}")
        direction = next(ARROW[r["direction"]] for r in records if r["metric"] == metric)
        lines.append(f"| {metric} {direction} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def latex(records: list[dict], decimals: int = 4) -> str:
    """`markdown` as a LaTeX (booktabs) table; differences stand in a small line under the means."""
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
            value = "--" if r is None else f"{r['mean']:.{decimals}f}"
            means.append(
                rf"\textbf{{{value}}}" if r is not None and best[metric] == r["mean"] else value
            )
            if r is None or name == r["versus"]:
                under.append("")
            else:
                gap, low, high = (
                    f"{r[key]:+.{decimals}f}" for key in ("difference", "low", "high")
                )
                mark = r"^\dagger" if dagger(r) else ""
                under.append(rf"{{\scriptsize ${gap}{mark}$ [${low}$, ${high}$]}}")
        lines.append(" & ".join(means) + r" \\")
        if any(under):
            lines.append(" & ".join(under) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def escape(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return "".join("\\" + c if c in "&%$#_{}" else c for c in text)


def save(folder: Path, records: list[dict], heading: str, decimals: int = 4) -> str:
    """Write table.parquet, table.md and table.tex into `folder`; return the text of table.md.

    heading   lines above the table; in table.tex they are comments
    decimals  digits after the decimal point, in the two texts
    """
    write_table(folder / "table.parquet", records)
    if any(map(dagger, records)):
        heading += f"\n{DAGGER}"
    text = f"{heading}\n\n{markdown(records, decimals)}\n"
    comment = "".join(f"% {line}\n" for line in heading.splitlines())
    tex = f"{comment}{latex(records, decimals)}\n"
    for name, content in (("table.md", text), ("table.tex", tex)):
        with atomic(folder / name) as beside:
            beside.write_text(content)
    return text


def rewrite(folder: Path, decimals: int) -> str:
    """Write table.md and table.tex of `save` with other digits; return the text of table.md."""
    heading = (folder / "table.md").read_text().partition("\n\n")[0].partition(f"\n{DAGGER}")[0]
    return save(folder, pq.read_table(folder / "table.parquet").to_pylist(), heading, decimals)


def per_user(path: Path) -> dict[str, np.ndarray]:
    """Read per_user.parquet: metric -> (U,), and "user" -> (U,) ids."""
    table = pq.read_table(path)
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


def write_table(path: Path, records: list[dict]) -> None:
    """Write records as a Parquet table, one row a record, and its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as beside:
        pq.write_table(pa.Table.from_pylist(records), beside)
