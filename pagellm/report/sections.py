"""The sections of the report, one function each."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pagellm.evaluate import LABELS
from pagellm.model.policy import Policy
from pagellm.pages import stats
from pagellm.pages.stats import spearman, wilson
from pagellm.pages.tables import ALL_COLUMNS, heading
from pagellm.report.findings import (
    STAGES,
    Found,
    Judged,
    Missing,
    bins_of,
    brand_hits,
    hits,
    judge,
    margins,
    page_items,
    prompt_text,
    trace,
)
from pagellm.report.html import (
    POINTS,
    Html,
    esc,
    figure,
    figures,
    span,
    story,
    table,
    text,
    thin,
    up,
    verdict,
)
from pagellm.report.plots import dots, lines
from pagellm.stage import hints, randomness
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.run import StageConfig, commit

__all__ = ["Config", "SECTIONS", "or_missing", "tiles"]


SFT, PPO = LABELS["sft"], LABELS["ppo"]
DIFFERENCE = "PageLLM - SFT"


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Write runs/<run>/report.html from whatever the run has left on disk."""

    dataset: str = ""  # name of the data set; empty: the one the run's stages name
    out: str = ""  # file to write; empty: <runs>/<run>/report.html
    examples: int = 20  # users whose pages are shown
    judged: int = 1000  # users whose pages the reward model scores, at most
    pairs: int = 1000  # held-out pairs of each kind that calibration is measured on, at most

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            examples=(self.examples >= 0, "0 or more"),
            judged=(self.judged > 1, "2 or more"),
            pairs=(self.pairs > 0, "1 or more"),
        )


def shown_metrics(found: Found) -> list[str]:
    return [m for m in ALL_COLUMNS if any(m in s for s in found.results.values())]


def competitors(found: Found) -> list[str]:
    """Rows of the results table: others first, then SFT, then PageLLM."""
    names = [n for n in found.results if n not in (SFT, PPO, DIFFERENCE)]
    return sorted(names) + [n for n in (SFT, PPO) if n in found.results]


# ---- sections: each takes (found, config) and returns HTML, or raises Missing


def results(found: Found, config: Config) -> str:
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
                    f"<td{' class=best' if c['mean'] == best and len(set(means)) > 1 else ''}>{c['mean']:.4f}"
                    f"<small>{span(c['low'], c['high'])}</small></td>"
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
    """PageLLM against every other row, user by user."""
    if PPO not in names or "ppo" not in found.per_user:
        return ""
    mine, head, rows = found.per_user["ppo"], [], {m: [] for m in shown}
    for key, theirs in sorted(found.per_user.items(), key=lambda kv: (kv[0] == "sft", kv[0])):
        if key == "ppo" or not np.array_equal(theirs["user"], mine["user"]):
            continue
        head.append(found.labels[key])
        for metric in shown:
            d = found.results.get(DIFFERENCE, {}).get(metric) if key == "sft" else None
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
    out = "<h3>PageLLM against each of them</h3>" + table(
        ["PageLLM minus …", *head],
        [[heading(m), *rows[m]] for m in shown],
        "paired difference over the same users, 95% bootstrap interval; better and worse are about PageLLM",
    )
    out += text(
        "What beats PageLLM beyond noise: "
        + ("; ".join(beaten) if beaten else "nothing listed here")
        + "."
    )
    return out + relative_gain(found, shown)


def relative_gain(found: Found, shown: list[str]) -> str:
    """PageLLM - SFT as a percentage of SFT, turned so that right is better."""
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
        "What the reward changed, relative to SFT, with 95% intervals. Metrics whose SFT mean is not told "
        "apart from 0 are left out.",
    )


def curve(found: Found, stage: str, columns: dict[str, str], y_label: str, caption: str) -> str:
    """One panel: the log's columns (name -> field) over the steps; "" where none was logged."""
    curves = {
        name: thin(x, y)
        for name, field in columns.items()
        if len((data := found.stages[stage].column(field))[0])
        for x, y in [data]
    }
    if not curves:
        return ""
    return figure(lines(curves, "step", y_label, f"{caption}: {story(curves)}"), caption)


def or_missing(make: Callable[[], str]) -> str:
    """What `make` returns; where something is missing or damaged, what it is and what to do."""
    try:
        return make()
    except Missing as missing:
        return missing_note(missing)
    except PageLLMError as error:
        return missing_note(Missing(str(error)))


def missing_note(missing: Missing) -> str:
    command = f"<br>Make it with: <code>{esc(missing.command)}</code>" if missing.command else ""
    return f'<p class="missing">Missing: {esc(missing.what)}{command}</p>'


def valid(*names: str) -> dict[str, str]:
    return {name: f"valid/{name}" for name in names}


def curves_pretrain(found: Found) -> str:
    log = found.stages["pretrain"].need("loss")
    curves = {}
    for kind in sorted({row.get("kind", "loss") for row in log}):
        rows = [
            r for r in log if r.get("kind", "loss") == kind and np.isfinite(r.get("loss", np.nan))
        ]
        if rows:
            curves[kind.replace("_", " ")] = thin(
                np.array([r["step"] for r in rows]), np.array([r["loss"] for r in rows])
            )
    name = "Next-token loss by kind of prompt"
    return figures(
        [
            figure(
                lines(curves, "step", "nats a token", f"{name}: {story(curves)}", markers=False),
                name,
            ),
            curve(found, "pretrain", {"rating": "rating_loss"}, "loss", "Rating prediction loss"),
        ]
    )


def curves_sft(found: Found) -> str:
    found.stages["sft"].need("loss")
    return figures(
        [
            curve(found, "sft", {"loss": "loss"}, "loss", "Ranking loss"),
            curve(found, "sft", valid("NDCG@100", "Recall@20"), "score", "Validation accuracy"),
            curve(found, "sft", valid("ILD"), "ILD", "Validation diversity"),
        ]
    )


def curves_reward(found: Found) -> str:
    found.stages["reward"].need("loss")
    return figures(
        [
            curve(found, "reward", {"loss": "loss"}, "loss", "Pair loss"),
            curve(
                found,
                "reward",
                {"accuracy": "accuracy"},
                "share right",
                "Training accuracy, all kinds",
            ),
        ]
    )


def curves_ppo(found: Found) -> str:
    stage = found.stages["ppo"]
    stage.need("objective/reward_total")
    kept = f" Weights kept: step {stage.done['step']}." if "step" in stage.done else ""
    return figures(
        [
            curve(
                found,
                "ppo",
                {
                    "total": "objective/reward_total",
                    "page": "objective/reward_page",
                    "token": "objective/reward_token",
                },
                "reward",
                "Reward of sampled pages and its parts",
            ),
            curve(
                found, "ppo", {"KL": "objective/kl_seq_sum"}, "nats a page", "KL to the SFT policy"
            ),
            curve(
                found,
                "ppo",
                {"entropy": "objective/entropy"},
                "nats a slot",
                "Entropy of the policy",
            ),
            curve(found, "ppo", {"clipped": "policy/clipfrac"}, "share of slots", "Clip fraction"),
            curve(found, "ppo", {"policy": "policy/loss", "value": "val/loss"}, "loss", "Losses"),
            curve(
                found,
                "ppo",
                {"explained": "val/explained_var"},
                "share",
                "Variance of the return the critic explains",
            ),
            curve(
                found, "ppo", valid("NDCG@100", "Recall@20"), "score", f"Validation accuracy.{kept}"
            ),
            curve(found, "ppo", valid("ILD"), "ILD", "Validation diversity"),
            curve(found, "ppo", valid("energy"), "energy", "Validation energy"),
            curve(found, "ppo", valid("true_energy"), "true energy", "Validation true energy"),
        ]
    )


def learning(found: Found, config: Config) -> str:
    parts = {
        "Pretraining": curves_pretrain,
        "Supervised fine-tuning": curves_sft,
        "Reward model": curves_reward,
        "PPO": curves_ppo,
    }
    return text(
        f"Logs of more than {POINTS} lines are drawn as means of neighbouring steps."
    ) + "".join(
        f"<h3>{name}</h3>" + or_missing(lambda make=make: make(found))
        for name, make in parts.items()
    )


def reward_model(found: Found, config: Config) -> str:
    stage = found.stages["reward"]
    held = stage.done.get("held_out")
    if not held:
        raise Missing(f"no reward model in {stage.path}", stage.command)
    kinds = [k for k, v in held.items() if isinstance(v, dict)]
    heads = {"both heads": "accuracy", "page head": "page_accuracy", "token head": "token_accuracy"}
    series = {
        name: [wilson(held[k][head] * held[k]["pairs"], held[k]["pairs"]) for k in kinds]
        for name, head in heads.items()
    }
    alt = "Accuracy on held-out users' pairs: " + "; ".join(
        f"{k} {held[k]['accuracy']:.3f}" for k in kinds
    )
    parts = [
        figure(
            dots(kinds, series, "share right", alt, level=0.9),
            "Accuracy on held-out users by kind of pair, 95% Wilson intervals; the line is the 0.9 asked for.",
        )
    ]
    parts.append(or_missing(lambda: reliability(found, config)))
    rows = [
        [k, held[k]["pairs"], *(f"{held[k][head]:.4f}" for head in heads.values())] for k in kinds
    ]
    note = [
        f"{name.replace('_', ' ')} {held[name]:.4f}"
        for name in ("calibration_error", "energy_correlation")
        if held.get(name) is not None
    ]
    return (
        table(
            ["kind of pair", "held-out pairs", *heads],
            rows,
            "measured when the reward model was fitted",
        )
        + (
            text(
                f"Over all held-out pairs: {', '.join(note)} (Spearman, with the pair's energy gap)."
            )
            if note
            else ""
        )
        + figures(parts)
    )


def reliability(found: Found, config: Config) -> str:
    """How often the reward is right, against how sure it is; and the margin against the energy gap."""
    both = np.concatenate(list(margins(found, config, config.pairs).values()) or [np.zeros((0, 2))])
    if not len(both):
        raise Missing("no held-out pairs", found.stages["reward"].command)
    sure = 1 / (1 + np.exp(-np.clip(np.abs(both[:, 0]), 0, 60)))
    right = (both[:, 0] > 0) + 0.5 * (both[:, 0] == 0)
    cells = [
        rows
        for at in range(10)
        if len(rows := np.flatnonzero(np.minimum(((sure - 0.5) * 20).astype(int), 9) == at))
    ]
    share = np.array([wilson(right[rows].sum(), len(rows)) for rows in cells])
    x = np.array([sure[rows].mean() for rows in cells])
    curves = {"share right": (x, share[:, 0], share[:, 1], share[:, 2])}
    gap = [
        (
            both[rows, 1].mean(),
            both[rows, 0].mean(),
            1.96 * both[rows, 0].std() / np.sqrt(len(rows)),
        )
        for rows in bins_of(both[:, 1], 10)
    ]
    e, m, half = (np.array(column) for column in zip(*gap, strict=True))
    other = {"margin": (e, m, m - half, m + half)}
    return figure(
        lines(
            curves,
            "confidence, σ(|margin|)",
            "share right",
            f"Calibration: {story(curves)}",
            diagonal=True,
            markers=True,
        ),
        f"Calibration on {len(both):,} held-out pairs, with Wilson intervals. Above the line: right "
        "more often than it says.",
    ) + figure(
        lines(
            other,
            "energy gap of the pair",
            "margin of the reward",
            f"Reward margin by energy gap: {story(other)}",
            markers=True,
        ),
        "Does the margin grow with the energy gap? Tenths of the pairs, 95% intervals.",
    )


def against_truth(found: Found, config: Config) -> str:
    judged = the_judged(found, config)
    truth = "true_energy" if "true_energy" in found.per_user["ppo"] else "energy"
    parts, said = [], []
    for metric in dict.fromkeys([truth, "NDCG@100"]):
        curves = {}
        for name, side, label in (("sft", 0, SFT), ("ppo", 1, PPO)):
            y = found.per_user[name][metric][judged.row]
            groups = bins_of(judged.total[side], 10)
            mean = np.array(
                [
                    (
                        judged.total[side][g].mean(),
                        np.nanmean(y[g]),
                        1.96 * np.nanstd(y[g]) / np.sqrt(len(g)),
                    )
                    for g in groups
                ]
            )
            curves[label] = (
                mean[:, 0],
                mean[:, 1],
                mean[:, 1] - mean[:, 2],
                mean[:, 1] + mean[:, 2],
            )
            rho = spearman(judged.total[side], np.nan_to_num(y))
            said.append(f"{label}, {metric}: {'undefined' if rho is None else f'{rho:.3f}'}")
        parts.append(
            figure(
                lines(curves, "reward of the page", metric, f"{metric} by reward: {story(curves)}"),
                f"{metric} by reward: tenths of the users, 95% intervals.",
            )
        )
    dr = judged.total[1] - judged.total[0]
    dt = found.per_user["ppo"][truth][judged.row] - found.per_user["sft"][truth][judged.row]
    moved = (dr != 0) & (dt != 0) & ~np.isnan(dt)
    agree = wilson(float(((dr > 0) == (dt > 0))[moved].sum()), int(moved.sum()))
    rows = [
        ["users scored", f"{len(dr):,}"],
        ["reward: PageLLM's page better", f"{(dr > 0).mean():.1%}"],
        ["reward: equal", f"{(dr == 0).mean():.1%}"],
        [f"{truth}: PageLLM's page better", f"{(dt > 0).mean():.1%}"],
        [f"{truth}: equal", f"{(dt == 0).mean():.1%}"],
        [
            f"reward and {truth} agree, where both moved",
            f"{agree[0]:.1%} [{agree[1]:.1%}, {agree[2]:.1%}]" if moved.any() else "–",
        ],
    ]
    return (
        text(
            "Held-out items never reach the reward model. Rank correlation over users of the page's reward "
            "(page + mean token reward) with the truth: " + "; ".join(said) + "."
        )
        + figures(parts)
        + table(["PageLLM beside SFT, the same user", ""], rows)
    )


def positions(found: Found, config: Config) -> str:
    pages = dict(zip((SFT, PPO), found.both("the position profile"), strict=True))
    slot = np.arange(1, found.k + 1)
    exact = {name: hits(p, found.scorer, found.k)[0].astype(float) for name, p in pages.items()}
    rate = {name: (slot, *band(x)) for name, x in exact.items()}
    parts = [
        figure(
            lines(rate, "slot", "share of pages", f"Hits by slot: {story(rate)}", markers=True),
            "Pages with a held-out item at this slot, 95% band.",
        )
    ]
    if np.array_equal(*(p.user for p in pages.values())):
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
        judged = the_judged(found, config)
    except Missing as missing:
        return figures(parts) + missing_note(missing)
    token = {name: (slot, *band(judged.token[i])) for i, name in enumerate((SFT, PPO))}
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
    """(n, K), NaN past a page's end -> mean, low, high (K,): the normal 95% interval of the mean."""
    n = np.maximum((~np.isnan(x)).sum(0), 1)
    mean = np.nansum(x, 0) / n
    half = 1.96 * np.sqrt(np.nansum((x - mean) ** 2, 0) / n / np.maximum(n - 1, 1))
    return mean, mean - half, mean + half


def popularity(found: Found, config: Config) -> str:
    pages = dict(zip((SFT, PPO), found.both("the distributions"), strict=True))
    shop = found.shop
    train = shop.csr("train").items
    count = np.bincount(train, minlength=shop.n_items)
    shown = {name: page_items(p, found.k) for name, p in pages.items()}
    shown = {"train data": train, **{name: x[x >= 0] for name, x in shown.items()}}
    tenth = np.empty(shop.n_items, dtype=int)
    tenth[np.lexsort((np.arange(shop.n_items), -count))] = (
        np.arange(shop.n_items) * 10 // shop.n_items
    )
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
        f"{shop.n_items:,} items in the catalogue",
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
    """How unequally n items are shown: 0 all alike, 1 - 1/n one alone."""
    return float(1 - 2 * (np.cumsum(np.sort(times)) / max(1, times.sum())).mean() + 1 / len(times))


def categories(
    shown: dict[str, np.ndarray], leaf: np.ndarray, names: list[str], most: int = 14
) -> str:
    """Share of slots of the largest categories; in the caption what the others hold together."""
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
    pages = found.both("users by history length")
    length = found.shop.csr("train").counts()[pages[1].user]
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


def alarms(found: Found, config: Config) -> str:
    stage = found.stages["ppo"]
    stage.need("objective/reward_total")
    first: dict[str, list] = {}
    for row in stage.log:
        for alarm in row.get("alarms", ()):
            kind = "".join("#" if c.isdigit() else c for c in alarm)
            first.setdefault(kind, [row["step"], alarm, 0])[2] += 1
    said = [a for a in stage.done.get("alarms", ()) if a]
    if not first and not said:
        return text("None fired.")
    out = (
        table(
            ["step", "alarm, as it was first said", "times"],
            [[step, alarm, times] for step, alarm, times in first.values()],
        )
        if first
        else ""
    )
    return out + (text("In the final record: " + "; ".join(said) + ".") if said else "")


def baselines(found: Found) -> str:
    """Every row of the results table as a dot with its interval, a figure a metric."""
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


def one_study(records: list[dict]) -> str:
    """Metrics down, variants across; then a figure of every variant's difference to the first."""
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
        f"mean ± standard deviation over {seeds} seeds; below it the paired difference to "
        f"{first} with its 95% interval",
    ) + figures(parts)


def cold_start(records: list[dict]) -> str:
    """What thinned training data cost each recommender, for users with few and with many rows."""
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
                f"<td>{r['full']:.4f} → {r['thinned']:.4f}<small>{r['difference']:+.4f} {span(r['low'], r['high'], '+')}"
                "</small></td>"
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
        "mean on full → on thinned training data; below it the paired difference with its 95% interval",
    ) + figures(parts)


def examples(found: Found, config: Config) -> str:
    sft, ppo = found.both("example users")
    if not config.examples:
        return text("None asked for (--examples 0).")
    note, judged = "", None
    try:
        judged = the_judged(found, config)
        among = judged.row
    except Missing as missing:
        note, among = missing_note(missing), np.arange(len(ppo.user))
    chosen = np.sort(
        randomness.rng(config.seed, "report", "examples").permutation(among)[: config.examples]
    )
    marks = [
        (*hits(p, found.scorer, found.k), brand_hits(p, found.scorer, found.k)) for p in (sft, ppo)
    ]
    items = [page_items(p, found.k) for p in (sft, ppo)]
    token = None
    if judged is not None:
        token = judged.token[:, np.searchsorted(judged.row, chosen)]
        low, high = (f(token, axis=(0, 2), keepdims=True) for f in (np.nanmin, np.nanmax))
        heat = 100 * (token - low) / np.maximum(high - low, 1e-9)
        note += text(
            "Heat: token reward r_k, from the lowest (palest) to the highest (strongest) of a user's two "
            "pages; after it the sum down to this slot over T (Eq. 6), whose last is R_f. R_c: page "
            "reward (Eq. 5)."
        )
    out = [
        text(
            "Drawn at random, not picked. ✓ a held-out item; ≈ not held out, but of a held-out item's category; "
            "◇ of a held-out item's brand."
        ),
        note,
    ]
    policy = None
    if judged is not None:
        policy = Policy.load(found.stages["ppo" if found.stages["ppo"].done else "sft"].path)
    for at, row in enumerate(chosen):
        user = int(ppo.user[row])
        pages = [
            example_page(
                found,
                name,
                items[side][row],
                *(m[row] for m in marks[side]),
                None if token is None else token[side, at],
                None if token is None else heat[side, at],
                None if token is None else judged.total[side, np.searchsorted(judged.row, row)],
            )
            for side, name in enumerate((f"without reward: {SFT}", f"with reward: {PPO}"))
        ]
        found_of = [f"{int(marks[side][0][row].sum())}" for side in (0, 1)]
        out.append(
            f"<details{' open' if at < 2 else ''}><summary>user {esc(found.shop.user_ids[user])}: "
            f"{found_of[0]} held-out items found without reward, {found_of[1]} with</summary>"
            + ("" if policy is None else text(f"Prompt: {prompt_text(policy, found, user)}"))
            + f"{known(found, user)}<div class=pages>{''.join(pages)}</div></details>"
        )
    return "".join(out)


def title_of(found: Found, item: int) -> str:
    c = found.shop.catalogue
    return c.title[item] or c.ids[item]


def known(found: Found, user: int, most: int = 12) -> str:
    """History and held-out items of one user, with ratings."""

    def listing(items, ratings) -> str:
        leaf = found.shop.catalogue.leaf
        return (
            "<ul class=plain>"
            + "".join(
                f"<li>{esc(title_of(found, i))}{'' if np.isnan(r) else f' ({r:g}★)'}"
                + (f" <span class=quiet>{esc(leaf[i])}</span>" if leaf[i] else "")
                + "</li>"
                for i, r in zip(items.tolist(), ratings.tolist(), strict=True)
            )
            + "</ul>"
        )

    items, ratings = found.shop.csr("train").of(user)
    before = f" (the last {most} of {len(items)})" if len(items) > most else ""
    return (
        f"<div class=pages><div><h3>History{before}</h3>{listing(items[-most:], ratings[-most:])}</div>"
        f"<div><h3>Ground truth: held out</h3>{listing(*found.scorer.held.of(user))}</div></div>"
    )


def example_page(found: Found, name: str, items, exact, same, brand, token, heat, total) -> str:
    kept = np.flatnonzero(items >= 0)
    mark = ["✓" if exact[j] else "≈" * int(same[j]) + "◇" * int(brand[j]) for j in kept]
    strip = ""
    if token is not None:
        said = ", ".join(
            f"{j + 1}: {token[j]:.2f}{' ' + m if m else ''}"
            for j, m in zip(kept, mark, strict=True)
        )
        strip = (
            f'<div class=strip role=img aria-label="Token reward by slot: {said}">'
            + "".join(
                f'<span style="--v:{heat[j]:.0f}">{m}</span>'
                for j, m in zip(kept, mark, strict=True)
            )
            + "</div>"
        )
    leaf, rows = found.shop.catalogue.leaf, []
    so_far = None if token is None else trace(token)
    for j, m in zip(kept, mark, strict=True):
        i = int(items[j])
        value = (
            ""
            if token is None
            else (
                f'<span class=value style="--v:{heat[j]:.0f}">{token[j]:+.2f}</span> '
                f"<span class=quiet>{so_far[j]:+.2f}</span> "
            )
        )
        hit = "".join(
            {
                "✓": '<span class=exact title="held out">✓</span> ',
                "≈": '<span class=same title="same category">≈</span> ',
                "◇": '<span class=same title="same brand">◇</span> ',
            }[one]
            for one in m
        )
        rows.append(
            f"<li{' class=exact' if exact[j] else ''}>{value}{hit}{esc(title_of(found, i))}"
            + (f" <span class=quiet>{esc(leaf[i])}</span>" if leaf[i] else "")
            + "</li>"
        )
    sums = (
        f"{int(exact.sum())} exact, {int(same.sum())} same category, {int(brand.sum())} same brand"
    )
    if token is not None and len(kept):
        sums += f"; R_f {so_far[kept[-1]]:+.3f}, R_c {total - so_far[kept[-1]]:+.3f}"
    return (
        f"<div><h3>Page {esc(name)}</h3>{strip}<ol class=page>{''.join(rows)}</ol>"
        f"<p class=quiet>{sums}</p></div>"
    )


def data_card(found: Found, config: Config) -> str:
    if not found.source:
        raise Missing(f"no source.json of {found.dataset}", hints.command("prepare", found.dataset))
    s, counts = found.source, found.source.get("counts", {})
    plain = [
        [name, f"{value:,}" if isinstance(value, int) else value]
        for name, value in sorted(counts.items())
        if isinstance(value, int | float | str)
    ]
    out = table(
        [f"data set {found.dataset}", "count"], [["release", s.get("release", "unknown")], *plain]
    )
    if counts.get("rows"):
        out += table(
            ["split", "positive rows", "other rows"],
            [[n, f"{v['positive']:,}", f"{v['other']:,}"] for n, v in counts["rows"].items()],
        )
    if counts.get("k_core"):
        steps = counts["k_core"]
        out += text(
            f"k-core filter, {len(steps)} rounds: from {steps[0]['users']:,} users, "
            f"{steps[0]['items']:,} items, {steps[0]['rows']:,} rows to {steps[-1]['users']:,}, "
            f"{steps[-1]['items']:,}, {steps[-1]['rows']:,}."
        )
    if read := s.get("read"):
        said = read.get("lines", []) + [f"Warning: {w}" for w in read.get("warnings", [])]
        out += table(["what was read, and how"], [[line] for line in said]) if said else ""
    if s.get("missing"):
        out += table(
            ["field", "share missing"], [[n, f"{v:.1%}"] for n, v in sorted(s["missing"].items())]
        )
    if s.get("files"):
        out += table(
            ["file", "role", "bytes", "SHA-256"],
            [
                [
                    f["name"],
                    f.get("role", ""),
                    f"{f['bytes']:,}",
                    Html(f"<code>{esc(f['sha256'])}</code>"),
                ]
                for f in s["files"]
            ],
        )
    else:
        out += text(
            "No raw files: the data set is made from its seed."
            if s.get("release") == "synthetic"
            else "No raw files are recorded."
        )
    return out + options("options of prepare", s.get("config", {}))


def options(name: str, config: dict) -> str:
    rows = [[k, Html(f"<code>{esc(repr(v))}</code>")] for k, v in sorted(config.items())]
    return f"<details><summary>{esc(name)}</summary>{table(['option', 'value'], rows)}</details>"


def provenance(found: Found, config: Config) -> str:
    rows, opened = [], []
    for name in STAGES:
        stage = found.stages[name]
        if not stage.recorded:
            rows.append(
                [name, Html(f'<td colspan="5">missing: <code>{esc(stage.command)}</code></td>')]
            )
            continue
        v = stage.recorded.get("versions", {})
        seconds = stage.done.get("seconds")
        rows.append(
            [
                name,
                stage.path,
                "not finished" if seconds is None else f"{seconds / 60:.1f}",
                stage.done.get("id") or "–",
                ", ".join(f"{k} {v[k]}" for k in sorted(v) if k not in ("machine", "commit")),
                v.get("machine", "unknown"),
            ]
        )
        opened.append(options(f"options of {name}", stage.recorded["config"]))
    recorded = {s.recorded.get("versions", {}).get("commit") for s in found.stages.values()} - {
        None
    }
    began = ", ".join(sorted(recorded)) or "unknown"
    total = sum(s.done.get("seconds", 0) for s in found.stages.values()) / 60
    notes = "".join(f'<p class="missing">{esc(note)}</p>' for note in found.notes)
    return (
        table(
            ["stage", "directory", "minutes", "weights", "versions", "machine"],
            rows,
            "minutes: the stage's last start to its end; one that was interrupted took longer",
        )
        + text(
            f"{total:.1f} minutes in all; commit of the run: {began}; report made by commit "
            f"{commit() or 'unknown'}."
        )
        + notes
        + "".join(opened)
    )


SECTIONS: dict[str, tuple[str, Callable[[Found, Config], str]]] = {
    "results": ("Results", results),
    "learning": ("Learning curves", learning),
    "reward": ("Reward model: accuracy and calibration", reward_model),
    "truth": ("Reward against held-out truth", against_truth),
    "positions": ("Position profile", positions),
    "popularity": ("Popularity and categories, before and after", popularity),
    "history": ("Users by history length", history_length),
    "energy": ("Energy, before and after", energies),
    "alarms": ("Alarms", alarms),
    "studies": ("Studies", studies),
    "examples": ("Example users", examples),
    "data": ("Data card", data_card),
    "provenance": ("Options, versions, minutes", provenance),
}


def the_judged(found: Found, config: Config) -> Judged:
    """`judge`, once for all sections."""
    if "judged" not in found.kept:
        try:
            found.kept["judged"] = judge(found, config, config.judged)
        except Missing as missing:
            found.kept["judged"] = missing
        except PageLLMError as error:
            found.kept["judged"] = Missing(str(error))
    if isinstance(found.kept["judged"], Missing):
        raise found.kept["judged"]
    return found.kept["judged"]


def tiles(found: Found) -> str:
    """The numbers that a reader wants first: PageLLM, and its difference to SFT."""
    out = []
    for metric in ("NDCG@100", "Recall@20", "ILD", "redundancy", "energy", "true_energy"):
        mean = found.results.get(PPO, {}).get(metric, {}).get("mean")
        if mean is None:
            continue
        d = found.results.get(DIFFERENCE, {}).get(metric)
        change = (
            f"{d['mean']:+.4f} {span(d['low'], d['high'], '+')} to SFT: {verdict(metric, d['low'], d['high'])}"
            if d and d["mean"] is not None
            else ""
        )
        out.append(
            f"<div class=tile>{esc(heading(metric))}<b>{mean:.4f}</b>"
            f"<span class=quiet>{esc(change)}</span></div>"
        )
    return f"<div class=tiles>{''.join(out)}</div>"
