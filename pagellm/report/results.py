"""Sections of the report: the table of results, and what beats what."""

import numpy as np

from pagellm.evaluate import LABELS
from pagellm.pages import stats
from pagellm.pages.tables import ALL_COLUMNS, heading
from pagellm.report.findings import DIFFERENCE, PPO, SFT, Found, Missing
from pagellm.report.html import (
    Html,
    esc,
    figure,
    missing_note,
    span,
    table,
    text,
    up,
    verdict,
)
from pagellm.report.options import Config
from pagellm.report.plots import dots
from pagellm.stage import hints

__all__ = ["competitors", "results", "shown_metrics", "tiles"]


def shown_metrics(found: Found) -> list[str]:
    """Metrics that some row of the results has."""
    return [m for m in ALL_COLUMNS if any(m in s for s in found.results.values())]


def competitors(found: Found) -> list[str]:
    """Rows of the results table: others first, then SFT, then PageLLM."""
    names = [n for n in found.results if n not in (SFT, PPO, DIFFERENCE)]
    return sorted(names) + [n for n in (SFT, PPO) if n in found.results]


def tiles(found: Found) -> str:
    """The numbers that a reader wants first: PageLLM, and its difference to SFT."""
    out = []
    for metric in ("NDCG@100", "Recall@20", "ILD", "redundancy", "energy", "true_energy"):
        mean = found.results.get(PPO, {}).get(metric, {}).get("mean")
        if mean is None:
            continue
        d = found.results.get(DIFFERENCE, {}).get(metric)
        change = (
            f"{d['mean']:+.4f} {span(d['low'], d['high'], '+')} to SFT: "
            + verdict(metric, d["low"], d["high"])
            if d and d["mean"] is not None
            else ""
        )
        out.append(
            f"<div class=tile>{esc(heading(metric))}<b>{mean:.4f}</b>"
            f"<span class=quiet>{esc(change)}</span></div>"
        )
    return f"<div class=tiles>{''.join(out)}</div>"


def results(found: Found, config: Config) -> str:
    """Every policy's means with their intervals, and PageLLM's differences to the others."""
    evaluation = found.stages["evaluate"]
    out = (
        ""
        if evaluation.done
        else missing_note(
            Missing(
                f"no evaluation in {evaluation.path}: these policies' pages have not been scored",
                evaluation.command,
            )
        )
    )
    if not found.results:
        return out
    names, shown = competitors(found), shown_metrics(found)
    rows = []
    for metric in shown:
        cells = {n: found.results[n].get(metric, {"mean": None}) for n in names}
        means = [c["mean"] for c in cells.values() if c["mean"] is not None]
        best = (max if up(metric) else min)(means, default=None)
        rows.append(
            [heading(metric)]
            + [
                "–"
                if c["mean"] is None
                else Html(
                    f"<td{' class=best' if c['mean'] == best and len(set(means)) > 1 else ''}>"
                    f"{c['mean']:.4f}<small>{span(c['low'], c['high'])}</small></td>"
                )
                for c in cells.values()
            ]
        )
    out += table(
        ["", *names],
        rows,
        f"{found.split} split, pages of {found.k}: mean over users and its 95% bootstrap "
        "interval; bold: best mean of the row",
    )
    out += versus(found, names, shown)
    if not set(found.labels.values()) - set(LABELS.values()):
        out += missing_note(
            Missing("stronger baselines to stand beside", hints.command("baselines", found.dataset))
        )
    return out


def versus(found: Found, names: list[str], shown: list[str]) -> str:
    """Paired differences between each policy of the run and every other row of the same users.

    Composed pages come first, where they are; then PageLLM.
    """
    writers = [k for k in ("compose", "ppo") if k in found.per_user and LABELS[k] in names]
    return "".join(against(found, key, shown) for key in writers) + relative_gain(found, shown)


def against(found: Found, own: str, shown: list[str]) -> str:
    """Paired differences between one policy and every other row that has the same users."""
    mine, head = found.per_user[own], []
    rows: dict[str, list] = {m: [] for m in shown}
    for key, theirs in sorted(found.per_user.items(), key=lambda kv: (kv[0] == "sft", kv[0])):
        if key == own or not np.array_equal(theirs["user"], mine["user"]):
            continue
        head.append(found.labels[key])
        for metric in shown:
            d = (
                found.results.get(DIFFERENCE, {}).get(metric)
                if (own, key) == ("ppo", "sft")
                else None
            )
            if d is None and metric in mine and metric in theirs:
                d = stats.paired(mine[metric], theirs[metric])
            rows[metric].append(
                "–"
                if d is None or d["mean"] is None
                else Html(
                    f"<td>{d['mean']:+.4f} {verdict(metric, d['low'], d['high'])}"
                    f"<small>{span(d['low'], d['high'], '+')}</small></td>"
                )
            )
    if not head:
        return ""
    beaten = [
        f"{name} on {', '.join(lost)}"
        for i, name in enumerate(head)
        if (lost := [m for m in shown if "worse" in rows[m][i]])
    ]
    out = f"<h3>{esc(LABELS[own])} against each of them</h3>" + table(
        [f"{LABELS[own]} minus …", *head],
        [[heading(m), *rows[m]] for m in shown],
        "paired difference over the same users, 95% bootstrap interval; better and worse are about "
        f"{LABELS[own]}",
    )
    return out + text(
        f"What beats {LABELS[own]} beyond noise: "
        + ("; ".join(beaten) if beaten else "nothing listed here")
        + "."
    )


def relative_gain(found: Found, shown: list[str]) -> str:
    """Figure: PageLLM - SFT in percent of SFT, with the sign turned so that right is better."""
    if DIFFERENCE not in found.results or SFT not in found.results:
        return ""
    names, values = [], []
    for metric in shown:
        d, base = found.results[DIFFERENCE].get(metric), found.results[SFT].get(metric)
        if (
            not d
            or not base
            or d["mean"] is None
            or base["mean"] is None
            or base["low"] <= 0 <= base["high"]
        ):
            continue
        scale = (100 if up(metric) else -100) / abs(base["mean"])
        low, high = sorted((scale * d["low"], scale * d["high"]))
        names.append(heading(metric))
        values.append((scale * d["mean"], low, high))
    if not names:
        return ""
    alt = "PageLLM minus SFT in percent of SFT, positive is better: " + "; ".join(
        f"{n} {v[0]:+.1f} [{v[1]:+.1f}, {v[2]:+.1f}]" for n, v in zip(names, values, strict=True)
    )
    return figure(
        dots(names, {"PageLLM − SFT": values}, "change, % of SFT; right is better", alt, level=0.0),
        "What the reward changed, relative to SFT, with 95% intervals. Metrics whose SFT mean is "
        "not told apart from 0 are left out.",
    )
