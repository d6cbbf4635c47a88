"""PPO's step for pages whose slots are all drawn at once, from the first slot's distribution.

rloo, grpo and dr_grpo draw so, and expert iteration learns pages that are not drawn at all: those
that maximise the outcome reward. There is no critic. A prompt is read once for all of its pages.
"""

import numpy as np
import torch
from torch import Tensor

from pagellm.kernels import masked
from pagellm.model.decode import trim_padding
from pagellm.model.draws import draw, drawn_logp, first_kl, first_logits
from pagellm.ppo_config import Config
from pagellm.ppo_setup import Networks, StepInput
from pagellm.ppo_step import Rollout, add_sft_loss, gated, policy_loss
from pagellm.ppo_watch import policy_row
from pagellm.stage import dist
from pagellm.stage.train import Objective

__all__ = ["drawn_at_once", "once_loss"]


def drawn_at_once(
    config: Config, nets: Networks, batch: StepInput, index: np.ndarray
) -> dict[str, Tensor]:
    """Draw some pages at once (draws.py) and measure them. Returns fields of Rollout; values are 0.

    With algo=expert the pages are not drawn: they are those that maximise the outcome reward.

    index   which pages of the step these are
    """
    rows, users = torch.from_numpy(index).to(batch.prompt.device), batch.users[index]
    first, at = distinct(index // config.samples, rows.device)
    p, v, x = (x[rows][first] for x in (batch.prompt, batch.valid, batch.excluded))
    logits, ref_logits = (first_logits(m, p, v, x) for m in (nets.policy.model, nets.ref))
    z, ref = logits / config.temperature, ref_logits / config.temperature
    if config.algo == "expert" and nets.outcome is not None:
        item = dist.send(torch.from_numpy(nets.outcome.maximise(users, config.k)), rows.device)
        mask = item >= 0
    else:
        pages = draw(z[at], batch.uniform[rows], config.k)
        item, mask = pages.item, pages.mask
    old, entropy = drawn_logp(z, item, mask, at)
    old_ref, _ = drawn_logp(ref, item, mask, at)
    token, page = nets.judge(users, index // config.samples, p[at], v[at], item, mask)
    token = gated(token, ref_logits[at], item, config.relevance_gate)
    return {
        "item": item,
        "mask": mask,
        "old_logp": old,
        "ref_logp": old_ref,
        "value": torch.zeros_like(old),
        "token": token,
        "page": page,
        "entropy": entropy,
        "kl_exact": first_kl(z[at], ref[at], mask),
        "drift": torch.zeros_like(old),
    }


def once_loss(
    learner: Objective,
    config: Config,
    r: Rollout,
    rows: Tensor,
    advantage: Tensor,
    ret: Tensor,
    learn_policy: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss over some pages of a rollout, and what to log of it: `ppo.minibatch_loss` without a
    critic.

    policy_loss - entropy_coef entropy + sft_coef SFT's loss, each a mean over the kept slots. With
    algo=expert minus the mean log-probability of a slot stands for policy_loss.
    """
    x, mask, policy = r.item[rows], r.mask[rows], learner.policy
    first, at = distinct((rows // config.samples).cpu().numpy(), rows.device)
    p, v, gone = (t[rows[first]] for t in (r.prompt, r.valid, r.excluded))
    logits = first_logits(policy, *trim_padding(p, v), gone) / config.temperature
    logp, entropy = drawn_logp(logits, x, mask, at)
    old, A = r.old_logp[rows], advantage[rows]
    row: dict[str, Tensor] = {}
    loss, clipped = policy_loss(logp, old, A, mask, config.clip)
    bonus = masked.mean(entropy, mask)
    row |= policy_row(logp.detach(), old, A, mask, config.clip) | {"policy/clipfrac": clipped}
    if config.algo == "expert":  # nothing is clipped: the old policy did not draw them
        loss = -masked.mean(logp, mask)
        row = {name: value for name, value in row.items() if "clipfrac" not in name}
    row |= {"policy/loss": loss.detach(), "policy/entropy": bonus.detach()}
    loss = loss - config.entropy_coef * bonus
    return add_sft_loss(policy, r, rows, loss, row, config.sft_coef, "multinomial")


def distinct(group: np.ndarray, device) -> tuple[Tensor, Tensor]:
    """The first row of every group; and for each row the index of its group among these."""
    _, first, at = np.unique(group, return_index=True, return_inverse=True)
    return torch.from_numpy(first).to(device), torch.from_numpy(at).to(device)
