"""What PPO logs of a step, and the alarms that are read from that log.

An alarm is a sign that the reward is being hacked, that the policy collapses, or that the maths is
broken.
"""

import sys

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pagellm.data.shop import Shop
from pagellm.kernels import masked
from pagellm.pages import metrics
from pagellm.ppo_config import Config
from pagellm.ppo_setup import Prompts, StepInput
from pagellm.ppo_step import Rollout, RunningMoments, kl_k1, kl_k2, kl_k3, page_total
from pagellm.stage import dist
from pagellm.stage.config import PageLLMError
from pagellm.stage.run import Run

__all__ = [
    "Watch",
    "alarms",
    "log_samples",
    "page_row",
    "policy_row",
    "rollout_row",
    "shown",
    "summarise",
    "to_numbers",
    "valid_row",
    "weighted_mean",
]


def alarms(log: list[dict], warmup: int, kl_target: float = 0.0) -> list[str]:
    """Signs of reward hacking, collapse or broken maths in a log whose newest line is last.

    Each alarm says what was seen and where to look. The thresholds are judgements.
    """
    rollouts = [row for row in log if "objective/entropy" in row]  # step 0 is a validation alone
    if not rollouts:
        return []
    now, start, found = rollouts[-1], rollouts[0], []
    learning = [row for row in log if row.get("learning")]
    if now.get("rollout/first_epoch_max_abs_logratio", 0.0) > 1e-3:
        found.append(
            f"ratio is not 1 before the first update: |log ratio| "
            f"{now['rollout/first_epoch_max_abs_logratio']:.1e}; old and new log-probs differ in "
            "mask, temperature or dropout"
        )
    if now["rollout/gen_vs_train_logp_diff"] > 1e-3:
        found.append(
            f"generation and update log-probs differ by {now['rollout/gen_vs_train_logp_diff']:.1e}"
        )
    last = [row["objective/kl_seq_sum"] for row in learning[-3:]]
    if len(last) == 3 and max(last) < 0:
        found.append(
            f"KL was negative three times in a row ({last[-1]:.3f}): policy and reference do not "
            "share a legal set or temperature"
        )
    if kl_target and now["objective/kl_seq_sum"] > 2 * kl_target:
        found.append(
            f"KL {now['objective/kl_seq_sum']:.2f} nats a page is over twice the target "
            f"{kl_target:.2f}"
        )
    if now["objective/entropy"] < 0.3 * start["objective/entropy"]:
        found.append(
            f"entropy fell to {now['objective/entropy']:.2f} from "
            f"{start['objective/entropy']:.2f} nats a slot: the policy collapses"
        )
    if now.get("policy/clipfrac", 0.0) > 0.3:
        found.append(f"clip fraction {now['policy/clipfrac']:.2f}: the steps are too large")
    if len(rollouts) > warmup + 5 and max(row["val/explained_var"] for row in rollouts[-5:]) < 0:
        found.append(
            "explained variance was negative five times in a row after warm-up: the critic does "
            "not help"
        )
    for name in ("list/coverage", "list/distinct"):
        if now[name] < 0.5 * start[name]:
            found.append(f"{name} halved: {start[name]:.3g} to {now[name]:.3g}")
    if len(learning) >= 20 and abs(now["objective/kl_seq_sum"]) < 1e-4:
        found.append(
            "KL is still 0 after 20 updates: learning rate too small, kl_coef too large, or the "
            "reference is the policy itself"
        )
    return found + hacking(log, start["objective/reward_total"])


def hacking(log: list[dict], reward_before: float) -> list[str]:
    """The reward has risen since the first validation, but a score that should rise has fallen."""
    evals = [row for row in log if "valid/NDCG@100" in row]
    if len(evals) < 2 or evals[-1] is not log[-1]:
        return []
    first, now = evals[0], evals[-1]
    if now["objective/reward_total"] <= reward_before:
        return []
    found = []
    for name in ("energy", "NDCG@100", "ILD", "entropy"):
        old, new = first.get(f"valid/{name}"), now.get(f"valid/{name}")
        if old is not None and new is not None and new < old - 0.05 * abs(old):
            found.append(
                f"reward rose from {reward_before:.3f} to {now['objective/reward_total']:.3f} "
                f"while validation {name} fell from {old:.4f} to {new:.4f}"
            )
    return found


def summarise(done: list[dict], learn_policy: bool) -> dict[str, float]:
    """What to log of the minibatches that `learn` went through: means over the last inner epoch."""
    rows = iter(to_numbers([row for entry in done for row in (entry, *entry["parts"])]))
    row: dict = {}
    seen: list[dict] = []
    epoch = -1
    for entry in rows:
        total = weighted_mean([next(rows) for _ in entry["parts"]])
        moved = total.pop("max_logratio", 0.0)
        if entry["epoch"] != epoch:
            epoch, seen = entry["epoch"], []
            if epoch == 0:  # before the first update of the step: the ratio must still be 1
                row["rollout/first_epoch_max_abs_logratio"] = moved
        if learn_policy:
            total["policy/ratio_var"] = total.pop("ratio_sq") - total["policy/ratio_mean"] ** 2
        if entry["halted"]:
            row |= (weighted_mean(seen) if seen else total) | {
                "stopped": 1.0,
                "inner_epochs": epoch + 1,
            }
            break
        seen.append(
            total | {name: value for name, value in entry.items() if "/" in name or name == "share"}
        )
        row |= weighted_mean(seen) | {"stopped": 0.0, "inner_epochs": epoch + 1}
    return row


def policy_row(
    logp: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, clip: float
) -> dict[str, Tensor]:
    """The policy/* numbers of one micro-batch. Pages came from `old`, so KL is KL(old || new)."""
    ratio = torch.exp(torch.where(mask, logp - old, 0.0))
    low, high = (ratio < 1 - clip) & (advantage < 0), (ratio > 1 + clip) & (advantage > 0)
    return {
        "policy/approxkl_k1": masked.mean(kl_k1(old, logp), mask),
        "policy/approxkl_k2": masked.mean(kl_k2(old, logp), mask),
        "policy/approxkl_k3": masked.mean(kl_k3(old, logp), mask),
        "policy/clipfrac_low": masked.mean(low.float(), mask),
        "policy/clipfrac_high": masked.mean(high.float(), mask),
        "policy/ratio_mean": masked.mean(ratio, mask),
        "ratio_sq": masked.mean(ratio.square(), mask),
        "policy/ratio_max": ratio.max(),
        "max_logratio": (ratio.log()).abs().max(),
    }


def weighted_mean(rows: list[dict], weight: str = "share") -> dict[str, float]:
    """Means of rows weighted by their share; a name with "max" in it takes the maximum."""
    if not rows:
        return {}
    rows = to_numbers(rows)
    total = sum(row[weight] for row in rows) or 1.0
    return {
        name: max(row[name] for row in rows)
        if "max" in name
        else sum(row[name] * row[weight] for row in rows) / total
        for name in rows[0]
        if name != weight
    }


def to_numbers(rows: list[dict]) -> list[dict]:
    """The same rows with numbers for scalar tensors, all fetched from the device at once."""
    at = [
        (i, name)
        for i, row in enumerate(rows)
        for name, value in row.items()
        if isinstance(value, Tensor)
    ]
    rows = [dict(row) for row in rows]
    for (i, name), value in zip(
        at, dist.AsyncScalars([rows[i][name] for i, name in at]).read(), strict=True
    ):
        rows[i][name] = value
    return rows


def describe(values: Tensor, mask: Tensor, name: str) -> dict[str, Tensor]:
    kept = values[mask]
    if kept.numel() == 0:
        return {}
    return {
        f"{name}/mean": kept.mean(),
        f"{name}/std": masked.variance(values, mask).sqrt(),
        f"{name}/min": kept.min(),
        f"{name}/max": kept.max(),
    }


def rollout_row(
    r: Rollout, reward: Tensor, advantage: Tensor, ret: Tensor, moments: RunningMoments
) -> dict:
    """What to log of a rollout before its first update.

    objective/reward_page, reward_token   the reward model's means, unweighted
    objective/paid_<term>                 mean over pages of what each term pays, weights included
    objective/reward_total                their sum: what the policy is paid, before the KL price
    objective/rlhf_reward                 the same, normalised, after the KL price
    objective/kl_seq_sum                  mean over pages of the sum over slots of k1, in nats
    """
    kl = (r.old_logp - r.ref_logp).masked_fill(~r.mask, 0.0)
    token = torch.where(r.mask, r.token, 0.0).sum(1) / r.mask.sum(1).clamp(min=1)
    pages = r.item.tolist()
    flat = r.item[r.mask]
    top = flat.bincount().max().item() / max(1, flat.numel()) if flat.numel() else 0.0
    spread = masked.variance(ret, r.mask)
    unexplained = masked.variance(ret - r.value, r.mask)
    duplicates = sum(len(p) - len(set(p)) for p in ([i for i in page if i >= 0] for page in pages))
    illegal = (r.item[:, :, None] == r.excluded[:, None, :]) & r.mask[:, :, None]
    assert duplicates == 0 and not illegal.any(), "a page holds an item that its constraint forbids"
    return {
        "objective/kl_seq_sum": kl.sum(1).mean(),
        "objective/kl_exact_per_item": masked.mean(r.kl_exact, r.mask),
        "objective/entropy": masked.mean(r.entropy, r.mask),
        "objective/reward_page": r.page.mean(),
        "objective/reward_token": token.mean(),
        "objective/reward_total": page_total(r.terms).mean(),
        "objective/rlhf_reward": reward.sum(1).mean(),
        **{f"objective/paid_{name}": term.sum(1).mean() for name, term in r.terms.items()},
        "val/explained_var": 1.0 - (unexplained / spread).item() if spread > 0 else 0.0,
        "val/mean": masked.mean(r.value, r.mask),
        **describe(ret, r.mask, "returns"),
        **describe(advantage, r.mask, "advantages"),
        "rnorm/mean": moments.mean,
        "rnorm/std": moments.std,
        "rnorm/count": moments.count,
        "rollout/invalid": int(illegal.sum()),
        "rollout/duplicate": duplicates,
        "rollout/short": int((~r.mask).any(1).sum()),
        "rollout/gen_vs_train_logp_diff": r.drift,
        "list/coverage": len(set(flat.tolist())),
        "list/top1_item_share": top,
        "list/distinct": len({tuple(page) for page in pages}) / len(pages),
    }


def page_row(pages: Tensor, categories: metrics.Described) -> dict[str, float]:
    """Mean ILD and category entropy of sampled pages (B, K)."""
    page, slot = np.nonzero(pages.cpu().numpy() >= 0)
    none = np.zeros(0, dtype=np.int64)
    scores = metrics.score_pages(
        np.arange(len(pages)),
        (page, slot + 1, pages.cpu().numpy()[page, slot]),
        (none, none, none),
        categories,
        page_k=pages.shape[1],
    )
    return {
        name: float(np.nanmean(scores[key]))
        for name, key in (("list/ILD", "ILD"), ("list/category_entropy", "entropy"))
        if not np.isnan(scores[key]).all()
    }


def valid_row(scores: dict[str, float]) -> dict[str, float]:
    return {f"valid/{name}": value for name, value in scores.items()}


def log_samples(out: Run, step: int, shop: Shop, shown: dict, r: Rollout) -> None:
    """Write pages of a rollout for people to read: history, gold, page, rewards and KL by slot.

    shown   row of the rollout -> its user and the items of its prompt
    """
    if not dist.is_main():
        return
    title, held = shop.catalogue.title, shop.csr("valid")
    for i, (user, history) in shown.items():
        kept = r.mask[i]
        out.log(
            step,
            "samples",
            user=shop.user_ids[user],
            history=[title[j] for j in history.tolist() if j >= 0],
            gold=[title[j] for j in held.of(user)[0]],
            page=[title[j] for j in r.item[i][kept].tolist()],
            page_reward=r.page[i],
            token_reward=[round(x, 4) for x in r.token[i][kept].tolist()],
            kl=[round(x, 4) for x in (r.old_logp - r.ref_logp)[i][kept].tolist()],
        )


def shown(config: Config, prompts: Prompts, batch: StepInput) -> dict[int, tuple]:
    """The first three users' row, number, and the items that their prompt shows."""
    return {
        i: (
            int(batch.users[i]),
            batch.taught.excluded[i]
            if batch.taught and config.w_hit
            else prompts.history.of(batch.users[i])[0],
        )
        for i in range(0, len(batch.users), config.samples)[:3]
    }


class Watch:
    """Writes the log and raises alarms, each kind once."""

    def __init__(self, config: Config, out: Run, warmup: int):
        self.config, self.out, self.warmup = config, out, warmup
        self.log = out.read_log()
        self.raised = {text.split(":")[0] for row in self.log for text in row.get("alarms", [])}

    def __call__(self, step: int, row: dict) -> None:
        """Log a step. Raises PageLLMError for an alarm if the config is strict."""
        numbers = {k: float(v) if isinstance(v, Tensor) else v for k, v in row.items()}
        self.log.append({"step": step, **numbers})
        found = alarms(self.log, self.warmup, self.config.kl_target)
        fresh = [text for text in found if text.split(":")[0] not in self.raised]
        self.raised |= {text.split(":")[0] for text in fresh}
        for text in fresh if dist.is_main() else ():
            tqdm.write(f"ALARM at step {step}: {text}", file=sys.stderr)
        self.out.log(step, **row, alarms=fresh)
        if fresh and self.config.strict:
            raise PageLLMError(f"stopped at step {step}: {fresh[0]}")
