"""Sections of the report: accuracy and calibration of the reward model; reward against truth."""

import numpy as np

from pagellm.pages.stats import spearman, wilson
from pagellm.report.findings import PPO, SFT, Found, Missing
from pagellm.report.html import figure, figures, or_missing, story, table, text
from pagellm.report.measure import bins_of, margins, page_rewards
from pagellm.report.options import Config
from pagellm.report.plots import dots, lines

__all__ = ["against_truth", "reward_model"]


def reward_model(found: Found, config: Config) -> str:
    """Accuracy on held-out users' pairs by kind and head; calibration."""
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
            "Accuracy on held-out users by kind of pair, 95% Wilson intervals; the line is the 0.9 "
            "asked for.",
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
                f"Over all held-out pairs: {', '.join(note)} (Spearman, with the pair's energy "
                "gap)."
            )
            if note
            else ""
        )
        + figures(parts)
    )


def reliability(found: Found, config: Config) -> str:
    """Figures: share of pairs ranked rightly by confidence; reward margin by energy gap."""
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
        f"Calibration on {len(both):,} held-out pairs, with Wilson intervals. Above the line: "
        "right more often than it says.",
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
    """Pages' rewards against metrics on held-out items, which the reward model never saw."""
    found.both("rewards against the truth")
    rewards = page_rewards(found, config)
    truth = "true_energy" if "true_energy" in found.per_user["ppo"] else "energy"
    parts, said = [], []
    for metric in dict.fromkeys([truth, "NDCG@100"]):
        curves = {}
        for name, side, label in (("sft", 0, SFT), ("ppo", 1, PPO)):
            y = found.per_user[name][metric][rewards.row]
            groups = bins_of(rewards.total[side], 10)
            mean = np.array(
                [
                    (
                        rewards.total[side][g].mean(),
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
            rho = spearman(rewards.total[side], np.nan_to_num(y))
            said.append(f"{label}, {metric}: {'undefined' if rho is None else f'{rho:.3f}'}")
        parts.append(
            figure(
                lines(curves, "reward of the page", metric, f"{metric} by reward: {story(curves)}"),
                f"{metric} by reward: tenths of the users, 95% intervals.",
            )
        )
    dr = rewards.total[1] - rewards.total[0]
    dt = found.per_user["ppo"][truth][rewards.row] - found.per_user["sft"][truth][rewards.row]
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
            "Held-out items never reach the reward model. Rank correlation over users of the "
            "page's reward (page + mean token reward) with the truth: " + "; ".join(said) + "."
        )
        + figures(parts)
        + table(["PageLLM beside SFT, the same user", ""], rows)
    )
