"""Sections of the report: learning curves of the four training stages, and PPO's alarms."""

from functools import partial

import numpy as np

from pagellm.report.findings import Found
from pagellm.report.html import POINTS, figure, figures, or_missing, story, table, text, thin
from pagellm.report.options import Config
from pagellm.report.plots import lines

__all__ = ["alarms", "learning"]


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
        f"<h3>{name}</h3>" + or_missing(partial(make, found)) for name, make in parts.items()
    )


def curve(found: Found, stage: str, columns: dict[str, str], y_label: str, caption: str) -> str:
    """One figure: fields of a stage's log over the steps. "" if none of them was logged.

    columns  name of the curve -> field of the log
    """
    curves = {
        name: thin(x, y)
        for name, field in columns.items()
        if len((data := found.stages[stage].column(field))[0])
        for x, y in [data]
    }
    if not curves:
        return ""
    return figure(lines(curves, "step", y_label, f"{caption}: {story(curves)}"), caption)


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
