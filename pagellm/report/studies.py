"""Section of the report: baselines, studies over several seeds, and the cold-start study."""

import numpy as np

from pagellm.evaluate import LABELS
from pagellm.pages.tables import heading
from pagellm.report.findings import PPO, Found, Missing
from pagellm.report.html import (
    Html,
    esc,
    figure,
    figures,
    missing_note,
    or_missing,
    span,
    table,
)
from pagellm.report.options import Config
from pagellm.report.plots import dots
from pagellm.report.results import competitors, shown_metrics
from pagellm.stage import hints

__all__ = ["studies"]


def studies(found: Found, config: Config) -> str:
    out = "<h3>Baselines (their table is under Results)</h3>" + or_missing(lambda: baselines(found))
    out += "".join(
        f"<h3>{esc(name)}</h3>" + one_study(records) for name, records in found.studies.items()
    )
    out += "".join(
        f"<h3>{esc(name)}</h3>" + cold_start(records) for name, records in found.cold.items()
    )
    if not found.studies:
        out += missing_note(
            Missing(
                f"no ablation of {found.dataset} below {config.runs}",
                hints.study("ablation", found.dataset, "--seeds 3"),
            )
        )
    if not found.cold:
        out += missing_note(
            Missing(
                f"no cold start study of {found.dataset} below {config.runs}",
                hints.study("coldstart", found.dataset),
            )
        )
    return out


def baselines(found: Found) -> str:
    """One figure for each metric: every row of the results as a dot with its interval."""
    names = competitors(found)
    if not set(names) - set(LABELS.values()):
        raise Missing(f"no baselines of {found.dataset}", hints.command("baselines", found.dataset))
    parts = []
    for metric in shown_metrics(found):
        values = [
            None
            if (c := found.results[n].get(metric)) is None or c["mean"] is None
            else (c["mean"], c["low"], c["high"])
            for n in names
        ]
        if len({v[0] for v in values if v}) < 2:
            continue  # nothing to compare
        alt = f"{metric}: " + "; ".join(
            f"{n} {v[0]:.4f} {span(v[1], v[2])}" for n, v in zip(names, values, strict=True) if v
        )
        level = values[-1][0] if names[-1] == PPO and values[-1] else None
        parts.append(
            figure(
                dots(names, {metric: values}, heading(metric), alt, level=level),
                f"{heading(metric)}: mean over users, 95% interval"
                + ("; the line is PageLLM." if level is not None else "."),
            )
        )
    return figures(parts)


def one_study(records: list[dict]) -> str:
    """Table with metrics down and variants across; figures of the differences to the first."""
    names = list(dict.fromkeys(r["variant"] for r in records))
    at = {(r["metric"], r["variant"]): r for r in records}
    shown = list(dict.fromkeys(r["metric"] for r in records))
    first, rows = records[0]["versus"], []
    for metric in shown:
        cells = []
        for name in names:
            r = at.get((metric, name))
            noise = (
                ""
                if r is None or not np.isfinite(r.get("sd_over_seeds") or np.nan)
                else (f" ± {r['sd_over_seeds']:.4f}")
            )
            under = (
                ""
                if r is None or name == first
                else (f"<small>{r['difference']:+.4f} {span(r['low'], r['high'], '+')}</small>")
            )
            cells.append("–" if r is None else Html(f"<td>{r['mean']:.4f}{noise}{under}</td>"))
        rows.append([heading(metric), *cells])
    parts = []
    for metric in shown:
        others = [n for n in names if n != first and (metric, n) in at]
        values = [tuple(at[metric, n][c] for c in ("difference", "low", "high")) for n in others]
        if not others or any(not np.isfinite(v).all() for v in values) or not np.any(values):
            continue
        alt = f"{metric}, difference to {first}: " + "; ".join(
            f"{n} {v[0]:+.4f} {span(v[1], v[2], '+')}" for n, v in zip(others, values, strict=True)
        )
        parts.append(
            figure(
                dots(
                    others,
                    {metric: values},
                    f"{heading(metric)}: difference to {first}",
                    alt,
                    level=0.0,
                ),
                f"{heading(metric)}: paired difference to {first}, 95% interval.",
            )
        )
    seeds = (
        max(r["seeds"] for r in records if "seeds" in r)
        if any("seeds" in r for r in records)
        else "?"
    )
    return table(
        ["", *names],
        rows,
        f"mean ± standard deviation over seeds ({seeds}); below it the paired difference to "
        f"{first} with its 95% interval",
    ) + figures(parts)


def cold_start(records: list[dict]) -> str:
    """What removing training data cost each recommender, by how many rows a user has."""
    shown, groups = (list(dict.fromkeys(r[c] for r in records)) for c in ("metric", "users"))
    names = list(dict.fromkeys(r["variant"] for r in records))
    at = {(r["variant"], r["users"], r["metric"]): r for r in records}
    count = {r["users"]: r["count"] for r in records}
    rows = [
        [f"{name}: {group} ({count[group]:,})"]
        + [
            "–"
            if (r := at.get((name, group, metric))) is None
            else Html(
                f"<td>{r['full']:.4f} → {r['thinned']:.4f}<small>{r['difference']:+.4f} "
                f"{span(r['low'], r['high'], '+')}</small></td>"
            )
            for metric in shown
        ]
        for name in names
        for group in groups
    ]
    parts = []
    for metric in shown:
        series = {
            name: [
                None
                if (r := at.get((name, group, metric))) is None or not np.isfinite(r["difference"])
                else (r["difference"], r["low"], r["high"])
                for group in groups
            ]
            for name in names[:6]
        }
        alt = f"{metric}, thinned minus full: " + "; ".join(
            f"{name} "
            + ", ".join(f"{g} {v[0]:+.4f}" for g, v in zip(groups, values, strict=True) if v)
            for name, values in series.items()
        )
        parts.append(
            figure(
                dots(
                    [f"{g} train rows" if g != "all" else "all users" for g in groups],
                    series,
                    f"{metric}: thinned minus full",
                    alt,
                    level=0.0,
                ),
                f"{metric}: what the thinned training data cost, 95% intervals.",
            )
        )
    return table(
        ["recommender: train rows (users)", *map(heading, shown)],
        rows,
        "mean on full → on thinned training data; below it the paired difference with its 95% "
        "interval",
    ) + figures(parts)
