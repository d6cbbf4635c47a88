"""The opening of the report: one sentence in plain words, and three figures."""

from functools import partial

import numpy as np

from pagellm.evaluate import LABELS
from pagellm.pages.tables import heading
from pagellm.report.findings import COMPOSED, DIFFERENCE, PPO, SFT, Found, Missing
from pagellm.report.html import figure, figures, or_missing, story, thin, up, verdict
from pagellm.report.options import Config
from pagellm.report.plots import Curve, ladder, lines, places, short
from pagellm.report.results import competitors, shown_metrics, tiles
from pagellm.stage.hints import counted

__all__ = ["frontier", "opening", "overview"]

OWN = (PPO, SFT, COMPOSED)  # policies of the run, in the order of their colours
ACCURACY, VARIETY = ("NDCG@100", "Recall@20"), ("ILD", "entropy")  # the first that is there
# Rows of the first figure, where they are there.
LADDER = ("Recall@20", "NDCG@100", "PWKT", "ILD", "entropy", "redundancy", "energy", "true_energy")


def named(label: str) -> str:
    """A label in short: SFT for SFT = "w/o reward", composed for PageLLM, composed."""
    return label.split(" = ")[0].removeprefix(f"{PPO}, ")


def spoken(name: str) -> str:
    """A short name as a sentence says it."""
    return f"{PPO} ({name})" if name == named(COMPOSED) else name


def means(found: Found, metric: str) -> dict[str, float]:
    """Name of a row of the results -> its mean of the metric, where it has one."""
    cells = {name: found.results[name].get(metric, {}).get("mean") for name in competitors(found)}
    return {named(name): mean for name, mean in cells.items() if mean is not None}


def first(found: Found, metrics: tuple[str, ...]) -> str:
    """The first of these metrics that some row has; "" if none has."""
    return next((m for m in metrics if means(found, m)), "")


def ranked(metric: str, row: dict[str, float]) -> list[str]:
    """Names, the best first."""
    return sorted(row, key=lambda name: -row[name] if up(metric) else row[name])


def opening(found: Found) -> str:
    """What the run has come to, in one sentence."""
    metric = first(found, ACCURACY)
    row = means(found, metric) if metric else {}
    if not row:
        made = [name for name, stage in found.stages.items() if stage.done]
        return (
            f"This run has finished {', '.join(made) or 'no stage'}; its pages have not been "
            "scored yet, so nothing can be said of who is best."
        )
    best, *_ = order = ranked(metric, row)
    own = [name for name in order if name in map(named, OWN)]
    users = max(found.results[name].get(metric, {}).get("count", 0) or 0 for name in found.results)
    said = f"On the held-out items of {users:,} users, "
    said += (
        f"{spoken(best)} ranks best of {len(order)} policies ({metric} {row[best]:.4f})"
        if len(order) > 1
        else f"{spoken(best)} reaches {metric} {row[best]:.4f}; no other policy was scored with it"
    )
    if own and own[0] != best:
        said += f"; of this run's own policies {spoken(own[0])} comes closest ({row[own[0]]:.4f})"
    change = [effect(found, m, *pair) for m, pair in changes(found)]
    if change:
        said += f"; the reward made SFT's pages {' and '.join(change)}"
    return said + "."


def changes(found: Found) -> list[tuple[str, tuple[str, str, str]]]:
    """The metrics that the sentence tells of the reward, and how it tells them."""
    d = found.results.get(DIFFERENCE, {})
    pairs = (
        (VARIETY, ("more varied", "less varied", "as varied as before, within noise")),
        (ACCURACY, ("more accurate", "less accurate", "as accurate as before, within noise")),
    )
    out = []
    for metrics, words in pairs:
        metric = next((m for m in metrics if d.get(m, {}).get("mean") is not None), "")
        if metric:
            out.append((metric, words))
    return out


def effect(found: Found, metric: str, more: str, less: str, same: str) -> str:
    """How the reward changed a metric, in words."""
    d = found.results[DIFFERENCE][metric]
    word = {"better": more, "worse": less}.get(verdict(metric, d["low"], d["high"]), same)
    return f"{word} ({metric} {d['mean']:+.4f})".replace("-0", "−0")


def overview(found: Found, config: Config) -> str:
    """Who wins where, accuracy against variety, and learning curves; then PageLLM's numbers."""
    parts = [or_missing(partial(make, found)) for make in (who_wins, against_variety, curves)]
    return figures(parts) + tiles(found)


def who_wins(found: Found) -> str:
    """Figure: where each policy stands between the worst and the best, metric by metric."""
    rows, said = [], []
    for metric in (m for m in LADDER if m in shown_metrics(found)):
        row = means(found, metric)
        low, high = min(row.values(), default=0.0), max(row.values(), default=0.0)
        if low == high:
            continue
        worst, best = (low, high) if up(metric) else (high, low)
        winner = ranked(metric, row)[0]
        stands = {name: (mean - worst) / (best - worst) for name, mean in row.items()}
        rows.append((heading(metric), stands, f"{short(winner, 15)} {best:.3g}"))
        said.append(f"{metric} {winner} {best:.4f}")
    if not rows:
        raise Missing("a second policy to compare", found.stages["evaluate"].command)
    bold = [name for name in map(named, OWN) if any(name in stands for _, stands, _ in rows)]
    alt = "Who wins where, the best of each metric: " + "; ".join(said)
    others = len({name for _, stands, _ in rows for name in stands} - set(bold))
    return figure(
        ladder(rows, alt, bold),
        "Who wins where: each metric from its worst policy to its best, which is named."
        + (f" Gray: {counted(others, 'policy', 'policies')} from elsewhere." if others else ""),
    )


def frontier(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of the points that no other reaches in both numbers and exceeds in one, by x."""

    def beaten(name: str) -> bool:
        a = points[name]
        return any(b != a and b[0] >= a[0] and b[1] >= a[1] for b in points.values())

    return sorted((name for name in points if not beaten(name)), key=lambda name: points[name])


def against_variety(found: Found) -> str:
    """Figure: accuracy against variety, a point a policy, with the frontier."""
    accuracy, variety = first(found, ACCURACY), first(found, VARIETY)
    if not accuracy or not variety:
        raise Missing(
            "scored pages, for accuracy against variety", found.stages["evaluate"].command
        )
    x, y = means(found, variety), means(found, accuracy)
    points = {name: (x[name], y[name]) for name in y if name in x}
    if not points:
        raise Missing(f"a policy with both {accuracy} and {variety}")
    edge = frontier(points)
    alt = f"{accuracy} against {variety}: " + "; ".join(
        f"{name} {b:.4f} at {a:.4f}" for name, (a, b) in points.items()
    )
    bold = [name for name in map(named, OWN) if name in points]
    return figure(
        places(points, f"variety: {variety}", f"accuracy: {accuracy}", alt, bold, edge),
        f"Accuracy against variety, top right is best. On the frontier: {', '.join(edge)}"
        + (
            "; every other policy is beaten on both by one of these."
            if len(edge) < len(points)
            else "."
        ),
    )


def curves(found: Found) -> str:
    """Figure: validation accuracy of the training stages, each over its own length.

    Where no stage was validated: the losses, each as a share of its first value.
    """
    drawn: dict[str, Curve] = {}
    names = {"sft": named(LABELS["sft"]), "ppo": named(LABELS["ppo"])}
    metric = next(
        (m for m in ACCURACY if any(len(found.stages[s].column(f"valid/{m}")[0]) for s in names)),
        "",
    )
    for stage, name in names.items() if metric else ():
        step, value = found.stages[stage].column(f"valid/{metric}")
        if len(step):
            last = max(row["step"] for row in found.stages[stage].log)
            drawn[name] = thin(100.0 * step / max(1, last), value)
    label, caption = metric, f"Learning curves: validation {metric} as each stage goes on."
    if not drawn:
        label, caption = "loss, % of its first value", "Learning curves: the training losses."
        for stage in ("pretrain", "sft", "reward"):
            step, value = found.stages[stage].column("loss")
            if len(step) and value[0]:
                last = max(1, int(step[-1]))
                drawn[stage] = thin(100.0 * step / last, 100.0 * value / np.abs(value[0]))
    if not drawn:
        raise Missing("a training log, for learning curves", found.stages["sft"].command)
    return figure(
        lines(drawn, "share of the stage, %", label, f"{caption} {story(drawn, 4)}", height=230.0),
        caption,
    )
