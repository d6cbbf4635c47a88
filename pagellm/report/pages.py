"""Sections of the report: what SFT and PageLLM put on their pages, and for whom."""

import numpy as np

from pagellm.pages import stats
from pagellm.report.findings import PPO, SFT, Found, Missing
from pagellm.report.html import figure, figures, missing_note, span, story, table, verdict
from pagellm.report.measure import bins_of, hits, page_items, page_rewards
from pagellm.report.options import Config
from pagellm.report.plots import dots, lines
from pagellm.stage import randomness
from pagellm.stage.hints import counted

__all__ = ["energies", "history_length", "popularity", "positions"]


def positions(found: Found, config: Config) -> str:
    """Hits, the gain over SFT, and token reward, slot by slot."""
    pages = dict(zip((SFT, PPO), found.both("the position profile"), strict=True))
    slot = np.arange(1, found.k + 1)
    exact = {name: hits(p, found.scoring, found.k)[0].astype(float) for name, p in pages.items()}
    rate = {name: (slot, *band(x)) for name, x in exact.items()}
    parts = [
        figure(
            lines(rate, "slot", "share of pages", f"Hits by slot: {story(rate)}", markers=True),
            "Pages with a held-out item at this slot, 95% band.",
        )
    ]
    first, second = (p.user for p in pages.values())
    if np.array_equal(first, second):
        gain = {"PageLLM − SFT": (slot, *band(exact[PPO] - exact[SFT]))}
        best = int(slot[np.argmax(gain["PageLLM − SFT"][1])])
        parts.append(
            figure(
                lines(
                    gain,
                    "slot",
                    "share of pages",
                    f"Gain by slot, largest at {best}: {story(gain)}",
                    level=("no change", 0.0),
                    markers=True,
                ),
                "Which slot gains: the same users' difference, 95% band.",
            )
        )
    try:
        rewards = page_rewards(found, config)
    except Missing as missing:
        return figures(parts) + missing_note(missing)
    token = {name: (slot, *band(rewards.token[i])) for i, name in enumerate((SFT, PPO))}
    parts.append(
        figure(
            lines(
                token, "slot", "token reward", f"Token reward by slot: {story(token)}", markers=True
            ),
            "Mean token reward by slot, 95% band.",
        )
    )
    return figures(parts)


def band(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of each column with its normal 95% interval.

    x (n, K), NaN past a page's end, which is left out; returns mean, low, high: (K,)
    """
    n = np.maximum((~np.isnan(x)).sum(0), 1)
    mean = np.nansum(x, 0) / n
    half = 1.96 * np.sqrt(np.nansum((x - mean) ** 2, 0) / n / np.maximum(n - 1, 1))
    return mean, mean - half, mean + half


def popularity(found: Found, config: Config) -> str:
    """How popular the items on the pages are, and how slots are spread over categories."""
    pages = dict(zip((SFT, PPO), found.both("the distributions"), strict=True))
    shop = found.data
    train = shop.csr("train").items
    count = np.bincount(train, minlength=shop.n_items)
    shown = {name: page_items(p, found.k) for name, p in pages.items()}
    shown = {"train data": train, **{name: x[x >= 0] for name, x in shown.items()}}
    tenth = np.empty(shop.n_items, dtype=int)
    # Of equally popular items a draw decides, not their numbers, which tenth they fall into.
    drawn = randomness.rng(0, "report", "tenths").permutation(shop.n_items)
    tenth[np.lexsort((drawn, -count))] = np.arange(shop.n_items) * 10 // shop.n_items
    share = {
        name: (np.arange(1, 11), np.bincount(tenth[x], minlength=10) / max(1, len(x)))
        for name, x in shown.items()
    }
    rows = []
    for name, x in shown.items():
        times = np.bincount(x, minlength=shop.n_items)
        rows.append(
            [
                name,
                f"{(times > 0).sum():,} ({(times > 0).mean():.1%})",
                f"{share[name][1][0]:.1%}",
                f"{count[x].mean() if len(x) else 0:.1f}",
                f"{gini(times):.3f}",
            ]
        )
    out = table(
        [
            "",
            "different items",
            "slots held by the most popular tenth",
            "mean train count of a slot",
            "Gini",
        ],
        rows,
        f"{counted(shop.n_items, 'item')} in the catalogue",
    )
    parts = [
        figure(
            lines(
                share,
                "tenth of the catalogue, most popular first",
                "share of slots",
                f"Slots by popularity: {story(share)}",
            ),
            "Popularity of what stands on the pages.",
        )
    ]
    leaf, names = shop.catalogue.leaf_id, shop.catalogue.leaf_names
    if not (leaf >= 0).any():
        return out + figures(parts) + missing_note(Missing("categories: this data set has none"))
    parts.append(categories(shown, leaf, names))
    return out + figures(parts)


def gini(times: np.ndarray) -> float:
    """Gini coefficient of how often n items are shown: 0 all equally often, 1 - 1/n only one."""
    return float(1 - 2 * (np.cumsum(np.sort(times)) / max(1, times.sum())).mean() + 1 / len(times))


def categories(
    shown: dict[str, np.ndarray], leaf: np.ndarray, names: list[str], most: int = 14
) -> str:
    """Figure: share of slots of the `most` largest categories; the caption sums up the others."""
    share = {
        name: np.bincount(leaf[x][leaf[x] >= 0], minlength=len(names)) / max(1, len(x))
        for name, x in shown.items()
    }
    top = np.argsort(-sum(share.values()), kind="stable")[:most]
    series = {name: [(v, v, v) for v in s[top]] for name, s in share.items()}
    labels = [names[i] for i in top]
    rest = (
        ""
        if len(names) <= most
        else f" The {len(names) - most} others hold "
        + ", ".join(f"{s.sum() - s[top].sum():.1%} ({name})" for name, s in share.items())
        + "."
    )
    alt = "Share of slots by category: " + "; ".join(
        f"{label} " + ", ".join(f"{name} {series[name][i][0]:.1%}" for name in series)
        for i, label in enumerate(labels)
    )
    return figure(
        dots(labels, series, "share of slots", alt),
        "Categories of what stands on the pages." + rest,
    )


def history_length(found: Found, config: Config) -> str:
    """Metrics by the number of liked items in the user's history."""
    pages = found.both("users by history length")
    length = found.data.csr("train").counts()[pages[1].user]
    groups = bins_of(length, 6)
    names = [
        f"{length[g].min()}–{length[g].max()}"
        if length[g].min() < length[g].max()
        else f"{length[g].min()}"
        for g in groups
    ]
    parts, rows = [], [[n, f"{len(g):,}"] for n, g in zip(names, groups, strict=True)]
    for metric in ("NDCG@100", "Recall@20", "ILD", "energy"):
        curves, at = {}, np.arange(len(groups))
        for key, label in (("sft", SFT), ("ppo", PPO)):
            found_means = [
                stats.summary(found.per_user[key][metric][g], config.seed) for g in groups
            ]
            curves[label] = (
                at,
                *(
                    np.array([m[c] if m[c] is not None else np.nan for m in found_means])
                    for c in ("mean", "low", "high")
                ),
            )
        for g, row in enumerate(rows):
            row += [f"{mean[g]:.4f}" for _, mean, *_ in curves.values()]
        alt = f"{metric} by history length ({', '.join(names)}): {story(curves)}"
        parts.append(
            figure(
                lines(curves, "liked items in the history", metric, alt, x_names=names),
                f"{metric}, 95% intervals.",
            )
        )
    head = [
        "history",
        "users",
        *(
            f"{m}: {lb}"
            for m in ("NDCG@100", "Recall@20", "ILD", "energy")
            for lb in ("SFT", "PageLLM")
        ),
    ]
    return figures(parts) + table(head, rows)


def energies(found: Found, config: Config) -> str:
    """Distribution of the pages' energy over users, before and after PPO."""
    found.both("the energy")
    parts, rows = [], []
    for metric in ("energy", "true_energy"):
        if metric not in found.per_user["ppo"]:
            continue
        a, b = (found.per_user[key][metric] for key in ("sft", "ppo"))
        share = np.linspace(0, 1, 101)
        curves = {
            name: (np.quantile(x[~np.isnan(x)], share), share) for name, x in ((SFT, a), (PPO, b))
        }
        alt = f"Distribution of {metric} over users: " + "; ".join(
            f"{name} tenth {x[10]:.3g}, median {x[50]:.3g}, nine tenths {x[90]:.3g}"
            for name, (x, _) in curves.items()
        )
        parts.append(
            figure(
                lines(curves, metric, "share of users at or below", alt, markers=False),
                f"{metric} of a page, before and after PPO.",
            )
        )
        d = stats.paired(b, a, config.seed)
        rows.append(
            [
                metric,
                f"{np.nanmean(a):.4f}",
                f"{np.nanmean(b):.4f}",
                f"{d['mean']:+.4f} {span(d['low'], d['high'], '+')}",
                verdict(metric, d["low"], d["high"]),
                f"{np.mean(b > a):.1%}",
                f"{np.mean(b < a):.1%}",
            ]
        )
    return table(
        [
            "",
            "before (SFT)",
            "after (PageLLM)",
            "paired difference",
            "",
            "users higher",
            "users lower",
        ],
        rows,
    ) + figures(parts)
