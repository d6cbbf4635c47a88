"""PPO: sample pages, score them with the reward model, and learn, held near the SFT policy by KL.

Reads   data/<dataset>, runs/<run>/sft, runs/<run>/reward
Writes  runs/<run>/ppo      model.pt of the step with the best validation score, log.jsonl,
                            samples.jsonl (some pages at each validation)

    make ppo                pagellm ppo --dataset synthetic --kl_coef 0.02

About two minutes for the synthetic shop on two CPU cores. One step (Eq. 9 to 11 of arXiv
2506.09084; arithmetic in ppo_step.py, what is logged in ppo_watch.py):

    prompt (B, P) -> sample under the constraint -> item, logp (B, K); ref_logp, value (B, K)
      -> token_reward (B, K), page_reward (B,) -> terms, name -> (B, K) -> normalise
      -> r_k = sum of terms_k - kl_coef (logp - ref_logp)_k
      -> gae -> whiten -> inner epochs of minibatches -> clipped policy and value loss -> step

There is no dropout anywhere in here: the ratio must be 1 before the first update.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pagellm.data.shop import Shop, load
from pagellm.kernels import masked
from pagellm.model.backbone import Backbone
from pagellm.model.decode import (
    LegalItems,
    page_logp,
    sample,
    shared_start,
    slot_states,
    trim_padding,
)
from pagellm.model.networks import from_state
from pagellm.model.page_loss import Batch, page_batch, sft_loss
from pagellm.model.policy import MODES, Policy, Validation
from pagellm.model.reward_model import Critic, RewardModel
from pagellm.model.shortlist import Proposals, Shortlist, best_items
from pagellm.pages import metrics
from pagellm.pages.truth import PageMaker
from pagellm.ppo_step import (
    AdaptiveKL,
    Rollout,
    RunningMoments,
    advantages,
    exact_kl,
    legal_logits,
    normalise,
    policy_loss,
    reward_terms,
    step_reward,
    value_loss,
)
from pagellm.ppo_watch import (
    alarms,
    log_samples,
    page_row,
    policy_row,
    rollout_row,
    summarise,
    to_numbers,
    valid_row,
    weighted_mean,
)
from pagellm.stage import dist, hints, randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.run import Run, TrainingConfig, file_id, finished, load_model_file
from pagellm.stage.train import (
    Best,
    GuardedStep,
    Objective,
    batch_at,
    lr_at,
    optimiser,
    prefetch,
    progress,
    set_lr,
)

__all__ = ["Config", "run"]


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """Improve the SFT policy by PPO against the reward model, at a price per nat of drift."""

    source_run: str = ""  # run whose sft is read; empty: this run (studies share one)
    reward_run: str = ""  # run whose reward model is read; empty: the same as source_run
    algo: str = "ppo"  # ppo, reinforce (Eq. 11 minus the batch mean),
    # rloo (minus the user's other pages)
    epochs: float = 1.5  # passes over the users (the paper: 5)
    min_steps: int = 45  # at least this many steps, however few the users
    rollout: int = 64  # pages sampled in a step
    samples: int = 1  # pages of one user among them; rloo wants 2 or more
    minibatch: int = 64  # pages in one optimiser update; divides rollout
    micro: int = 64  # pages in one forward pass: buys memory, moves no gradient
    inner_epochs: int = 4  # passes over a rollout; 1 makes reinforce exactly Eq. 11
    k: int = 20  # slots of a page
    candidates: int = 0  # items of a user's shortlist, fixed before each rollout: pages are drawn
    # from it and every log-probability is over it; 0: all items. For large catalogues
    lazy_rows: bool = False  # user and item rows move only in steps that read them;
    # for large catalogues
    temperature: float = 0.3  # of sampling and of every log-probability alike; low:
    # near the greedy page shown
    lr: float = 2e-4  # peak learning rate of the policy, linear to 0 (the paper:
    # 1e-5 at 124M parameters)
    row_lr: float = 1.0  # learning rate of rows (users, items, words, positions) as a share of lr
    critic_lr: float = 3e-4  # peak learning rate of the critic, linear to 0
    clip: float = 0.2  # epsilon of the ratio, arXiv 1707.06347 eq. 7
    value_clip: float = 0.2  # how far a new value may leave the old one,
    # in units of normalised reward
    vf_coef: float = 0.1  # weight of the value loss
    entropy_coef: float = 0.0  # bonus for a nat of entropy of a slot
    gamma: float = 1.0  # discount; a page is judged whole, so 1
    lam: float = 0.95  # lambda of GAE
    kl_coef: float = 0.1  # price of one nat of KL to the SFT policy, per slot, in normalised reward
    kl_target: float = 0.0  # nats a page; above 0 kl_coef adapts towards it (Ziegler et al. 2019)
    kl_horizon: float = 10000.0  # pages over which the adaptive coefficient moves
    w_token: float = 1.0  # weight of the mean token reward; 0: page-only
    w_page: float = 1.0  # weight of the page reward; 0: item-only
    w_hit: float = 0.0  # weight of the page's NDCG on train items that its prompt hides;
    # nothing learnt judges
    sft_coef: float = 0.0  # weight of SFT's loss on the users of a rollout,
    # nats per slot of their pages
    label_share: float = 0.2  # share of a user's train items that w_hit and sft_coef hide from the
    # prompt
    max_page: int = 40  # longest page that SFT's loss reads
    critic_warmup: int = 20  # critic updates before the policy's first
    max_kl: float = 0.03  # stop the inner epochs when the new policy is further than this (k3,
    # nats a slot)
    grad_clip: float = 1.0  # largest gradient norm, policy and critic apart
    eval_every: int = 10  # steps between validations
    eval_users: int = 500  # users in a validation; 0: all that have validation items
    patience: int = 0  # stop after so many validations in a row without a better one; 0: never
    mode: str = "greedy"  # decoding in validation: greedy, beam or one_shot
    select: str = "energy"  # validation score that decides the weights kept: energy, ndcg or last
    min_accuracy: float = 0.9  # a kind of pair below this accuracy draws a warning
    strict: bool = False  # stop instead of warning: low reward accuracy, any alarm

    def __post_init__(self):
        super().__post_init__()
        positive = {
            f: (getattr(self, f) > 0, "above 0")
            for f in (
                "epochs",
                "rollout",
                "samples",
                "minibatch",
                "micro",
                "inner_epochs",
                "k",
                "max_page",
                "temperature",
                "lr",
                "critic_lr",
                "grad_clip",
                "max_kl",
                "value_clip",
                "eval_every",
                "kl_horizon",
            )
        }
        check(
            self,
            **positive,
            algo=(self.algo in ("ppo", "reinforce", "rloo"), "ppo, reinforce or rloo"),
            clip=(0 < self.clip < 1, "between 0 and 1"),
            candidates=(
                self.candidates == 0 or self.candidates >= max(4, self.k),
                f"0 (all items), or k={self.k} and 4 or more",
            ),
            lam=(0 <= self.lam <= 1, "0 to 1"),
            gamma=(0 <= self.gamma <= 1, "0 to 1"),
            mode=(self.mode in MODES, ", ".join(MODES)),
            kl_coef=(self.kl_coef >= 0, "0 or more"),
            kl_target=(self.kl_target >= 0, "0 or more"),
            select=(self.select in ("energy", "ndcg", "last"), "energy, ndcg or last"),
            patience=(
                self.patience >= 0 and (self.patience == 0 or self.select != "last"),
                "0 or more, and 0 with select=last, which takes the last step",
            ),
            label_share=(0 < self.label_share < 1, "between 0 and 1"),
            **{
                w: (getattr(self, w) >= 0, "0 or more")
                for w in ("w_token", "w_page", "w_hit", "sft_coef")
            },
        )
        if self.rollout % self.minibatch:
            raise PageLLMError(
                f"rollout={self.rollout} is not a multiple of minibatch={self.minibatch}"
            )
        if self.rollout % self.samples:
            raise PageLLMError(
                f"rollout={self.rollout} is not a multiple of samples={self.samples}"
            )
        if self.algo == "rloo" and self.samples < 2:
            raise PageLLMError(
                "algo=rloo compares pages of one user: want samples of 2 or more, e.g. --samples 4"
            )
        if self.w_token == self.w_page == self.w_hit == 0:
            raise PageLLMError("w_token, w_page and w_hit are all 0: nothing to optimise")


@dataclass
class Networks:
    """The policy that learns, the SFT policy it is held to, the reward model, and the critic."""

    policy: Policy
    ref: Backbone
    reward: RewardModel
    critic: Critic

    @classmethod
    def load(cls, config: Config, sft_dir: Path, reward_dir: Path, device) -> "Networks":
        """The critic's trunk begins as the reward model's. Reference and reward are frozen."""
        policy = Policy.load(sft_dir, device)
        policy.check_room(config.k)
        ref = from_state(load_model_file(sft_dir / "model.pt")).to(device).eval()
        reward = RewardModel.load(reward_dir, device).requires_grad_(False)
        critic = Critic(from_state(load_model_file(reward_dir / "model.pt"))).to(device).eval()
        for trunk in (policy.model, critic.trunk):
            trunk.checkpoint_blocks = config.checkpoint_blocks
        return cls(policy, ref.requires_grad_(False), reward, critic)


@dataclass
class Asked:
    """What one step samples pages for."""

    users: np.ndarray  # (B,)
    prompt: Tensor  # (B, P)
    valid: Tensor  # (B, P)
    excluded: Tensor  # (B, E) items that no page may hold, padded with -1
    uniform: Tensor  # (B, K) float64 in [0, 1): the numbers that draw the pages
    taught: Batch | None  # the hidden train items as pages, if w_hit or sft_coef needs them
    proposed: Tensor | None = None  # (B, M) items proposed for shortlists, padded with -1


class Prompts:
    """Which users each step asks, and their prompts. A step depends on its number alone."""

    def __init__(self, config: Config, shop: Shop, policy: Policy):
        self.config, self.policy = config, policy
        self.device = policy.model.word.device
        self.history, self.seen = shop.csr("train"), shop.csr("train", positive=None)
        self.hides = config.w_hit > 0 or config.sft_coef > 0
        self.users = np.flatnonzero(self.history.counts() > 0)
        if self.hides:
            if policy.vocab.times:
                raise PageLLMError(
                    "w_hit and sft_coef hide train items at random, and a policy with time tokens "
                    "has learnt pages that come after their history: leave both at 0"
                )
            self.maker, self.disliked = PageMaker(shop), shop.csr("train", positive=False)
            self.users = self.maker.users
        self.per_step = config.rollout // config.samples
        self.proposals = None
        if 0 < config.candidates < shop.n_items:
            self.proposals = Proposals(shop, config.candidates, config.seed)

    def __call__(self, step: int) -> Asked:
        config, seed = self.config, self.config.seed
        index = batch_at(step, len(self.users), self.per_step, seed, "ppo")[1]
        users = self.users[index]
        # Micro-batches of like length need little padding.
        order = np.argsort(self.history.counts()[users], kind="stable")
        users = users[order].repeat(config.samples)
        draws = [
            randomness.rng(seed, "ppo", "sample", step, int(u), i % config.samples).random(config.k)
            for i, u in enumerate(users)
        ]
        uniform = dist.send(torch.from_numpy(np.stack(draws)), self.device)
        taught = self.teach(step, users) if self.hides else None
        proposed = None
        if self.proposals is not None:
            proposed = dist.send(torch.from_numpy(self.proposals(users)), self.device)
        if taught is not None and config.w_hit:
            disliked = dist.send(torch.from_numpy(self.disliked.padded(users)), self.device)
            excluded = torch.cat([taught.excluded, disliked], 1)
            return Asked(users, taught.prompt, taught.valid, excluded, uniform, taught, proposed)
        prompt, valid = self.policy.prompt(users, [self.history.of(u) for u in users])
        excluded = dist.send(torch.from_numpy(self.seen.padded(users)), self.device)
        return Asked(users, prompt, valid, excluded, uniform, taught, proposed)

    def teach(self, step: int, users: np.ndarray) -> Batch:
        """Pages of train items that are hidden from the prompt, drawn anew for every step."""
        examples = [
            self.maker.example(
                u,
                self.config.label_share,
                randomness.rng(self.config.seed, "ppo", "split", step, int(u)),
            )
            for u in users
        ]
        return page_batch(self.policy, users, examples)


def share_prompts(
    prompt: Tensor, valid: Tensor, k: int, user: np.ndarray, model: Backbone
) -> tuple | None:
    """Read each user's prompt once for all of that user's pages (decode.shared_start).

    user   (B,) which user each page is for; pages of one user are neighbours
    returns None if no user has two pages
    """
    _, first, group = np.unique(user, return_index=True, return_inverse=True)
    if len(first) == len(user):
        return None
    row, of = (torch.from_numpy(x).to(prompt.device) for x in (first, group))
    return shared_start(model, prompt[row], valid[row], k, of)


def draw_shortlists(
    config: Config,
    policy: Backbone,
    prompt: Tensor,
    valid: Tensor,
    excluded: Tensor,
    proposed: Tensor,
    index: np.ndarray,
) -> tuple[Shortlist, tuple]:
    """The shortlists of some pages, and their prompts, already read, as decode's `start`.

    A user's pages share one: what is proposed, filled up by the policy's first slot as it is now.

    index   which pages of the step these are; pages of one user are neighbours
    """
    _, *places = np.unique(index // config.samples, return_index=True, return_inverse=True)
    first, group = (torch.from_numpy(x).to(prompt.device) for x in places)
    begun = shared_start(policy, prompt[first], valid[first], config.k, group)
    # `first` are the first pages of their users, so the state of each is that user's.
    hidden = begun[1][first]
    found = best_items(hidden, policy.item, excluded[first], config.candidates, proposed[first])
    return Shortlist(policy, found[group]), begun


@torch.no_grad()
def roll_out(config: Config, nets: Networks, asked: Asked) -> Rollout:
    """Sample pages, then score them: one pass each of policy, reference, reward model and critic.

    Several processes share the pages and then exchange all results.

    old_logp comes from a pass over the finished page, the same pass that the updates make, and not
    from the cached generation. So the ratio starts at 1 to the last bit.
    """
    policy, tau, parts = nets.policy.model, config.temperature, []
    mine, busy = dist.shard(np.arange(len(asked.prompt)))
    for index in np.split(mine, range(config.micro, len(mine), config.micro)):
        rows = torch.from_numpy(index).to(asked.prompt.device)
        (p, v), x = trim_padding(asked.prompt[rows], asked.valid[rows]), asked.excluded[rows]
        start = partial(share_prompts, p, v, config.k, index // config.samples)
        short = ref_short = None
        if asked.proposed is None:
            legal, begun = LegalItems(x, policy.n_items), start(policy)
        else:
            short, begun = draw_shortlists(config, policy, p, v, x, asked.proposed[rows], index)
            ref_short, legal = Shortlist(nets.ref, short.candidates), short.constraint()
        pages = sample(policy, p, v, legal, asked.uniform[rows], tau, begun, short)
        item, mask = pages.item, pages.mask
        states = slot_states(policy, p, v, item, mask)
        ref_states = slot_states(nets.ref, p, v, item, mask, start(nets.ref))
        if short is None or ref_short is None:
            old, entropy = page_logp(states, policy.item, item, mask, x, tau, with_entropy=True)
            old_ref = page_logp(ref_states, nets.ref.item, item, mask, x, tau)
            logits = legal_logits(states, policy, item, x)
            ref_logits = legal_logits(ref_states, nets.ref, item, x)
        else:
            old, entropy = short.logp(states, item, mask, tau)
            old_ref, _ = ref_short.logp(ref_states, item, mask, tau)
            logits = short.legal_logits(states, item, mask)
            ref_logits = ref_short.legal_logits(ref_states, item, mask)
        exact = exact_kl(logits / tau, ref_logits / tau, mask)
        token, page = nets.reward(p, v, item, mask, start(nets.reward.trunk))
        value = nets.critic(p, v, item, mask, start(nets.critic.trunk))
        parts.append(
            {
                "item": item,
                "mask": mask,
                "old_logp": old,
                "ref_logp": old_ref,
                "value": value,
                "token": token,
                "page": page,
                "entropy": entropy,
                "kl_exact": exact,
                "drift": (pages.logp - old).abs(),
            }
            | ({} if short is None else {"candidates": short.candidates})
        )
    found: dict[str, Any] = {
        name: torch.cat([part[name] for part in parts])[: None if busy else 0] for name in parts[0]
    }
    if dist.world() > 1:
        found = {
            name: torch.from_numpy(dist.gather(x.cpu().numpy())).to(asked.prompt.device)
            for name, x in found.items()
        }
    found["drift"] = float(found["drift"].max())
    return Rollout(asked.prompt, asked.valid, asked.excluded, **found)


def minibatch_loss(
    learner: Objective,
    config: Config,
    r: Rollout,
    rows: Tensor,
    advantage: Tensor,
    ret: Tensor,
    learn_policy: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss over some pages of a rollout, and what to log of it.

    vf_coef value_loss + policy_loss - entropy_coef entropy + sft_coef SFT's loss, each a mean over
    the kept slots. Without `learn_policy` only the critic's part.
    """
    x, mask, row = r.item[rows], r.mask[rows], {}
    value = learner.critic(r.prompt[rows], r.valid[rows], x, mask)
    v_loss, row["val/clipfrac"] = value_loss(
        value, r.value[rows], ret[rows], mask, config.value_clip
    )
    row["val/loss"] = v_loss.detach()
    loss = config.vf_coef * v_loss + (0.0 if learn_policy else dist.idle(learner.policy))
    if learn_policy:
        states = slot_states(learner.policy, r.prompt[rows], r.valid[rows], x, mask)
        tau = config.temperature
        if r.candidates is not None:
            short = Shortlist(learner.policy, r.candidates[rows])
            logp, entropy = short.logp(states, x, mask, tau)
        else:
            head, gone = learner.policy.item, r.excluded[rows]
            logp, entropy = page_logp(states, head, x, mask, gone, tau, with_entropy=True)
        old, A = r.old_logp[rows], advantage[rows]
        p_loss, row["policy/clipfrac"] = policy_loss(logp, old, A, mask, config.clip)
        bonus = masked.mean(entropy, mask)
        loss = loss + p_loss - config.entropy_coef * bonus
        row |= policy_row(logp.detach(), old, A, mask, config.clip)
        row |= {"policy/loss": p_loss.detach(), "policy/entropy": bonus.detach()}
        if r.sft is not None:
            b = r.sft.select(rows)
            taught = sft_loss(learner.policy, b, "both") * b.mask.sum() / mask.sum().clamp(min=1)
            loss, row["policy/sft_loss"] = loss + config.sft_coef * taught, taught.detach()
    return loss, row


def backward_minibatch(
    config: Config,
    learner: nn.Module,
    r: Rollout,
    mini: Tensor,
    advantage: Tensor,
    ret: Tensor,
    learn_policy: bool,
) -> list[dict]:
    """Forward and backward over one minibatch, in micro-batches; what to log of each.

    The loss is a mean over the kept slots of the whole minibatch. A micro-batch contributes its
    share of that mean, on whichever process it is. Gradients are averaged over the processes,
    hence the factor `world`.
    """
    slots = r.mask[mini].sum().clamp(min=1)
    mine, busy = dist.shard(mini)
    parts, micros = [], mine.split(config.micro) if busy else ()
    # Every process makes as many passes as the first one, which has most rows; surplus passes
    # have weight 0.
    count = math.ceil(math.ceil(len(mini) / dist.world()) / config.micro)
    for at in range(count):
        rows, weight = (micros[at], 1.0) if at < len(micros) else (mine[:1], 0.0)
        share = weight * r.mask[rows].sum() / slots
        with dist.sync_gradients(learner, at + 1 == count):
            loss, row = learner(config, r, rows, advantage, ret, learn_policy)
            (loss * share * dist.world()).backward()
        if weight:
            parts.append(row | {"share": share})
    if dist.world() > 1:
        parts = [row for rows in dist.all_gather(to_numbers(parts)) for row in rows]
    return parts


def learn(
    config: Config,
    learner: nn.Module,
    policy_step: GuardedStep,
    critic_step: GuardedStep,
    r: Rollout,
    advantage: Tensor,
    ret: Tensor,
    orders: list[np.ndarray],
    learn_policy: bool,
    where: str,
    keep: Callable[[], Path] | None = None,
) -> dict[str, float]:
    """All inner epochs over a rollout. Returns what to log; "stopped" is 1.0 if it stopped early.

    Stops early: once a minibatch measures a KL above max_kl, it and all later ones make no update.

    On a GPU this check runs on the device, without a sync: the device skips the steps at once, and
    the CPU leaves the loop two minibatches later.

    orders   one permutation of the rollout's pages for each inner epoch
    """
    on_device = policy_step.fused and dist.world() == 1 and learn_policy
    halt: Tensor | None = None
    heard: list[dist.AsyncScalars] = []
    done: list[dict] = []
    minis = [
        (epoch, mini)
        for epoch, order in enumerate(orders)
        for mini in dist.send(torch.from_numpy(order), r.item.device).split(config.minibatch)
    ]
    for epoch, mini in minis:
        if len(heard) > 1 and heard[-2].read()[0]:
            break
        parts = backward_minibatch(config, learner, r, mini, advantage, ret, learn_policy)
        entry: dict[str, Any] = {
            "epoch": epoch,
            "parts": parts,
            "share": len(mini) / len(r),
            "halted": 0.0,
        }
        done.append(entry)
        if on_device:
            share = torch.stack([row["share"] for row in parts])
            k3 = torch.stack([row["policy/approxkl_k3"] for row in parts])
            too_far = (k3 * share).sum() / share.sum() > config.max_kl
            halt = too_far if halt is None else halt | too_far
            entry["halted"] = halt.double()
            heard.append(dist.AsyncScalars([entry["halted"]]))
        elif learn_policy:
            entry["parts"] = to_numbers(parts)
            if weighted_mean(entry["parts"])["policy/approxkl_k3"] > config.max_kl:
                entry["halted"] = 1.0
                for guard in (policy_step, critic_step):
                    guard.opt.zero_grad(set_to_none=True)
                break
        entry["val/grad_norm"] = critic_step.step(where, keep, halt)
        if learn_policy:
            entry["policy/grad_norm"] = policy_step.step(where, keep, halt)
    return summarise(done, learn_policy)


def check_reward_model(config: Config, record: dict, where: Path) -> None:
    """Warn of a reward model that is often wrong on held-out pairs (strict: refuse it)."""
    weak = {
        kind: row["accuracy"]
        for kind, row in record["held_out"].items()
        if isinstance(row, dict) and row["accuracy"] < config.min_accuracy
    }
    if not weak:
        return
    text = (
        ", ".join(f"{kind} {accuracy:.3f}" for kind, accuracy in weak.items())
        + f": the reward model's held-out accuracy is below {config.min_accuracy}. PPO will "
        f"optimise its mistakes.\n  Look closer: the pairs are in {where / 'pairs.parquet'}, "
        f"accuracies per head in {where / 'done'}.\n  Usual causes: too few pairs (raise per_kind "
        "or epochs of reward), a weak SFT policy, no categories."
    )
    if config.strict:
        raise PageLLMError(text)
    if dist.is_main():
        tqdm.write(f"WARNING {text}", file=sys.stderr)


class Training:
    """Everything that changes from step to step, and that a checkpoint therefore holds."""

    def __init__(self, config: Config, nets: Networks, total: int):
        self.config, self.nets, self.total = config, nets, total
        policy, critic = nets.policy.model, nets.critic
        updates = config.inner_epochs * (config.rollout // config.minibatch)
        self.warmup = math.ceil(config.critic_warmup / updates)  # steps of the critic alone
        self.objective = Objective(minibatch_loss, policy=policy, critic=critic)
        self.learner = dist.wrap(self.objective, config.parallel)
        adam = partial(optimiser, eps=1e-5, betas=(0.9, 0.999), lazy=config.lazy_rows)
        self.opt = adam(policy, config.lr, row_lr=config.row_lr)
        self.critic_opt = adam(critic, config.critic_lr)
        self.policy_step = GuardedStep(self.opt, policy.parameters(), config.grad_clip)
        self.critic_step = GuardedStep(self.critic_opt, critic.parameters(), config.grad_clip)
        self.moments, self.best = RunningMoments(), Best()
        self.steer: AdaptiveKL | None = None
        if config.kl_target:
            self.steer = AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)

    @property
    def kl_coef(self) -> float:
        return self.steer.coef if self.steer else self.config.kl_coef

    def state(self, step: int) -> dict:
        """Ask on every process."""
        policy, critic = self.nets.policy.model, self.nets.critic
        return {
            "step": step,
            "best": self.best.state(),
            "policy": dist.weights(policy, frozen=False),
            "critic": dist.weights(critic, frozen=False),
            "opt": dist.optimiser_state(policy, self.opt),
            "critic_opt": dist.optimiser_state(critic, self.critic_opt),
            "moments": self.moments.state_dict(),
            "kl_coef": self.kl_coef,
        }

    def load(self, state: dict) -> None:
        policy, critic = self.nets.policy.model, self.nets.critic
        self.best = Best(**state["best"])
        dist.load_weights(policy, state["policy"])
        dist.load_weights(critic, state["critic"])
        dist.load_optimiser(policy, self.opt, state["opt"])
        dist.load_optimiser(critic, self.critic_opt, state["critic_opt"])
        self.moments.load_state_dict(state["moments"])
        if self.steer:
            self.steer.coef = state["kl_coef"]

    def validate(self, validation: Validation, step: int) -> dict[str, Any]:
        """Score the policy on held-out items and keep its weights if they are the best so far."""
        with dist.unsharded(self.objective):
            scores = validation(self.nets.policy)
        by = {"energy": scores["energy"], "ndcg": scores["NDCG@100"], "last": float(step)}
        self.best.offer(by[self.config.select], step, self.nets.policy.model)
        return valid_row(scores)

    def step(self, step: int, r: Rollout, asked: Asked, out: Run) -> dict[str, Any]:
        """Rewards, advantages and all updates of one rollout -> what to log."""
        config = self.config
        label = asked.taught.item if asked.taught and config.w_hit else None
        r.terms = reward_terms(r, config.w_token, config.w_page, config.w_hit, label)
        paid = normalise(r.terms, r.mask, self.moments)
        reward = step_reward(paid, r.old_logp, r.ref_logp, r.mask, self.kl_coef)
        advantage, ret = advantages(
            config.algo, reward, r.value, r.mask, config.gamma, config.lam, config.samples
        )
        learning = step >= self.warmup
        for opt, peak in ((self.opt, config.lr), (self.critic_opt, config.critic_lr)):
            set_lr(opt, lr_at(step, self.total, peak, shape="linear"))
        row = {
            "learning": learning,
            "kl_coef": self.kl_coef,
            "lr": self.opt.param_groups[0]["lr"],
            **to_numbers([rollout_row(r, reward, advantage, ret, self.moments)])[0],
        }
        orders = [
            np.arange(len(r))
            if config.minibatch >= len(r)
            else randomness.rng(config.seed, "ppo", "minibatches", step, epoch).permutation(len(r))
            for epoch in range(config.inner_epochs)
        ]
        row |= learn(
            config,
            self.learner,
            self.policy_step,
            self.critic_step,
            r,
            advantage,
            ret,
            orders,
            learning,
            f"ppo step {step}",
            lambda: out.keep_for_replay(step, {**self.state(step), "rollout": r.state()}),
        )
        if self.steer:
            self.steer.update(row["objective/kl_seq_sum"], len(r))
        return row


def check_finite(r: Rollout, step: int, training: Training, out: Run) -> None:
    """Stop, with the rollout kept in a file, where a network gave a number that is not finite."""
    values = (r.old_logp, r.ref_logp, r.value, r.token, r.page)
    if torch.stack([x.isfinite().all() for x in values]).all():
        return
    kept = out.keep_for_replay(step, {**training.state(step), "rollout": r.state()})
    raise PageLLMError(
        f"ppo step {step}: log-probabilities, values or rewards are not finite; lower the learning "
        f"rate ({hints.another_run()}, or remove {out.path})\n"
        f"  The rollout, weights and moments are in {kept} for a closer look."
    )


class Watch:
    """The log as it grows, and the alarms that have been raised; each kind is raised once."""

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


def run(config: Config) -> None:
    sft_dir = config.stage("sft", config.source_run)
    reward_dir = config.stage("reward", config.reward_run or config.source_run)
    sft = finished(sft_dir, "SFT policy", config.make("sft"))
    need = config.make("reward") + "\n  PPO needs one to score pages."
    judged = finished(reward_dir, "reward model", need)
    shop = load(config.data_dir)
    device = dist.start(config.device)
    data = file_id(config.data_dir / "source.json")
    inputs = {"data": data, "sft": sft["id"], "reward": judged["id"]}
    with Run(config.stage("ppo"), config, inputs, free=("micro",)) as out:
        if out.already_done():
            return
        check_reward_model(config, judged, reward_dir)
        nets = Networks.load(config, sft_dir, reward_dir, device)
        policy = nets.policy
        if dist.is_main():
            policy.vocab.save(out.path)
        prompts = Prompts(config, shop, policy)
        steps = round(config.epochs * len(prompts.users) / prompts.per_step)
        total = max(config.min_steps, steps)
        training = Training(config, nets, total)
        categories = metrics.described(shop.catalogue.categories)
        validation = Validation(
            shop, "valid", config.k, config.mode, config.eval_users, config.seed
        )
        longest = min(config.max_page, policy.model.shape.n_ctx - policy.prompts.page_room)
        # Reward model and critic only. In bfloat16 the policy's pass over a page leaves the
        # log-probabilities the page was sampled with by up to 0.04 nats a slot (float32: 1e-5),
        # so the ratio would not be that of the draw.
        low = out.precision(config.precision, device, policy.model.shape.n_embd) == "bfloat16"
        nets.reward.trunk.bf16 = nets.critic.trunk.bf16 = low

        start = 0
        if state := out.load():
            start = state["step"]
            training.load(state)
        else:  # the SFT policy itself takes part as step 0
            out.log(0, **training.validate(validation, 0))
        dist.barrier()
        watch = Watch(config, out, training.warmup)

        stopped, bar = total, progress(start, total, "ppo")
        for step, asked in prefetch(out.steps(bar), total, prompts):
            began = time.time()
            with dist.unsharded(training.objective):
                r = roll_out(config, nets, asked)
            check_finite(r, step, training, out)
            r.sft = asked.taught.head(longest) if asked.taught and config.sft_coef else None
            row = training.step(step, r, asked, out) | page_row(r.item, categories)
            if (step + 1) % config.eval_every == 0 or step + 1 == total:
                row |= training.validate(validation, step + 1)
                log_samples(out, step + 1, shop, shown(config, prompts, asked), r)
            seconds = round(time.time() - began, 3)
            out.log(step + 1, "timing", seconds=seconds, peak_mb=dist.peak_memory())
            watch(step + 1, row)
            last, best = watch.log[-1], training.best
            bar.set_postfix_str(
                f"reward {last['objective/reward_total']:.3f}, KL "
                f"{last['objective/kl_seq_sum']:.2f}, best {config.select} {best.score:.4f}",
                refresh=False,
            )
            if best.stale(step + 1, config.eval_every, config.patience):
                stopped = step + 1
                break
            if out.due(step + 1, total):
                out.save(training.state(step + 1))
        final, best = training.state(stopped), training.best
        best.restore(policy.model)
        out.finish(
            policy.state(),
            final,
            step=best.step,
            score=best.score,
            steps=stopped,
            alarms=sorted(watch.raised),
        )
        if dist.is_main():
            early = f", stopped after {stopped}" if stopped < total else ""
            print(
                f"ppo: {out.path}, step {best.step} of {total}{early}, "
                f"validation {config.select} {best.score:.4f}"
            )


def shown(config: Config, prompts: Prompts, asked: Asked) -> dict[int, tuple]:
    """The first three users' row, number, and the items that their prompt shows."""
    return {
        i: (
            int(asked.users[i]),
            asked.taught.excluded[i]
            if asked.taught and config.w_hit
            else prompts.history.of(asked.users[i])[0],
        )
        for i in range(0, len(asked.users), config.samples)[:3]
    }


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm ppo"))
