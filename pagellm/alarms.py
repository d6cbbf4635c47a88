"""Signs in a PPO log that something is wrong: the reward is being hacked, the policy collapses, the maths is broken."""

__all__ = ["alarms"]


def alarms(log: list[dict], warmup: int, kl_target: float = 0.0) -> list[str]:
    """What RECIPE section 3 calls reward hacking or collapse, read off the log; newest line last.

    Each alarm says what was seen and where to look. Thresholds are judgements, not theorems.
    """
    rollouts = [row for row in log if "objective/entropy" in row]  # step 0 is a validation alone
    if not rollouts:
        return []
    now, start, found = rollouts[-1], rollouts[0], []
    learning = [row for row in log if row.get("learning")]
    if now.get("rollout/first_epoch_max_abs_logratio", 0.0) > 1e-3:
        found.append(
            f"ratio is not 1 before the first update: |log ratio| "
            f"{now['rollout/first_epoch_max_abs_logratio']:.1e}; old and new log-probs differ in mask, "
            "temperature or dropout"
        )
    if now["rollout/gen_vs_train_logp_diff"] > 1e-3:
        found.append(
            f"generation and update log-probs differ by {now['rollout/gen_vs_train_logp_diff']:.1e}"
        )
    last = [row["objective/kl_seq_sum"] for row in learning[-3:]]
    if len(last) == 3 and max(last) < 0:
        found.append(
            f"KL was negative three times in a row ({last[-1]:.3f}): policy and reference do not share a "
            "legal set or temperature"
        )
    if kl_target and now["objective/kl_seq_sum"] > 2 * kl_target:
        found.append(
            f"KL {now['objective/kl_seq_sum']:.2f} nats a page is over twice the target {kl_target:.2f}"
        )
    if now["objective/entropy"] < 0.3 * start["objective/entropy"]:
        found.append(
            f"entropy fell to {now['objective/entropy']:.2f} from {start['objective/entropy']:.2f} nats a "
            "slot: the policy collapses"
        )
    if now.get("policy/clipfrac", 0.0) > 0.3:
        found.append(f"clip fraction {now['policy/clipfrac']:.2f}: the steps are too large")
    if len(rollouts) > warmup + 5 and max(row["val/explained_var"] for row in rollouts[-5:]) < 0:
        found.append(
            "explained variance was negative five times in a row after warm-up: the critic does not help"
        )
    for name in ("list/coverage", "list/distinct"):
        if now[name] < 0.5 * start[name]:
            found.append(f"{name} halved: {start[name]:.3g} to {now[name]:.3g}")
    if len(learning) >= 20 and abs(now["objective/kl_seq_sum"]) < 1e-4:
        found.append(
            "KL is still 0 after 20 updates: learning rate too small, kl_coef too large, or the reference "
            "aliases the policy"
        )
    return found + hacking(log, start["objective/reward_total"])


def hacking(log: list[dict], reward_before: float) -> list[str]:
    """Reward up while something that should rise with it falls, from the first validation to the newest."""
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
                f"reward rose from {reward_before:.3f} to {now['objective/reward_total']:.3f} while "
                f"validation {name} fell from {old:.4f} to {new:.4f}"
            )
    return found
