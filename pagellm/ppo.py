"""PPO: pages sampled under the constraint, scored by the reward model, held to the SFT policy by KL (Eq. 9 to 11).

Reads   data/<dataset>, runs/<run>/sft, runs/<run>/reward
Writes  runs/<run>/ppo                      model.pt of the step with the best validation score, log.jsonl,
                                            samples.jsonl (pages at each validation)

    make ppo                                python -m pagellm.ppo --dataset synthetic --kl_coef 0.02

About two minutes for the synthetic shop on two CPU cores. One step:

    prompt (B, P) -> sample under the constraint -> item, logp (B, K); reference logp, value (B, K)
      -> token_reward (B, K), page_reward (B,) -> normalise
      -> r_k = w_token token_k / K - kl_coef (logp - ref_logp)_k, + w_page page at the last slot
      -> gae -> whiten -> inner epochs of minibatches -> clipped policy loss, clipped value loss -> step

No dropout anywhere in here: the ratio must be 1 before the first update.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pagellm.data.shop import load
from pagellm.kernels import masked
from pagellm.kernels.advantage import gae
from pagellm.model.backbone import Backbone
from pagellm.model.critic import Critic
from pagellm.model.decode import (
    LegalItems,
    page_logp,
    sample,
    shared_start,
    slot_states,
    trim_padding,
)
from pagellm.model.networks import from_state
from pagellm.model.page_loss import collate, sft_loss
from pagellm.model.policy import MODES, Policy, Validation
from pagellm.model.reward_model import RewardModel
from pagellm.pages import metrics
from pagellm.pages.truth import PageMaker
from pagellm.ppo_step import (
    AdaptiveKL,
    Rollout,
    RunningMoments,
    exact_kl,
    hit_reward,
    legal_logits,
    normalise_reward,
    policy_loss,
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
from pagellm.stage import dist, randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.run import Run, TrainingConfig, file_id, finished, load_model_file
from pagellm.stage.train import (
    GuardedStep,
    Objective,
    batch_at,
    lr_at,
    optimiser,
    prefetch,
    progress,
    set_lr,
)

__all__ = ["Config", "advantages", "run"]


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
            lam=(0 <= self.lam <= 1, "0 to 1"),
            gamma=(0 <= self.gamma <= 1, "0 to 1"),
            mode=(self.mode in MODES, ", ".join(MODES)),
            kl_coef=(self.kl_coef >= 0, "0 or more"),
            kl_target=(self.kl_target >= 0, "0 or more"),
            select=(self.select in ("energy", "ndcg", "last"), "energy, ndcg or last"),
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


def share_prompts(
    prompt: Tensor, valid: Tensor, k: int, user: np.ndarray, model: Backbone
) -> tuple | None:
    """decode.shared_start for pages of which neighbours may be of one user; None if all are of different ones."""
    _, first, group = np.unique(user, return_index=True, return_inverse=True)
    if len(first) == len(user):
        return None
    first, group = (torch.from_numpy(x).to(prompt.device) for x in (first, group))
    return shared_start(model, prompt[first], valid[first], k, group)


@torch.no_grad()
def roll_out(
    config: Config,
    policy: Policy,
    ref: Backbone,
    reward: RewardModel,
    critic: Critic,
    prompt: Tensor,
    valid: Tensor,
    excluded: Tensor,
    uniform: Tensor,
) -> Rollout:
    """Sample pages, then score them: one pass each of policy, reference, reward model and critic. Several processes
    deal the pages out and then share all results.

    old_logp comes from the same pass over the finished page that the updates make, not from the cached generation,
    so that the ratio starts at 1 to the last bit of that pass. Everything else reads a user's prompt once for all
    pages of that user.
    """
    parts = []
    mine, busy = dist.shard(np.arange(len(prompt)))
    for index in np.split(mine, range(config.micro, len(mine), config.micro)):
        rows = torch.from_numpy(index).to(prompt.device)
        (p, v), x = trim_padding(prompt[rows], valid[rows]), excluded[rows]
        start = partial(share_prompts, p, v, config.k, index // config.samples)
        pages = sample(
            policy.model,
            p,
            v,
            LegalItems(x, policy.model.n_items),
            uniform[rows],
            config.temperature,
            start(policy.model),
        )
        states = slot_states(policy.model, p, v, pages.item, pages.mask)
        ref_states = slot_states(ref, p, v, pages.item, pages.mask, start(ref))
        old, entropy = page_logp(
            states,
            policy.model.item,
            pages.item,
            pages.mask,
            x,
            config.temperature,
            with_entropy=True,
        )
        old_ref = page_logp(ref_states, ref.item, pages.item, pages.mask, x, config.temperature)
        exact = exact_kl(
            legal_logits(states, policy.model, pages.item, x) / config.temperature,
            legal_logits(ref_states, ref, pages.item, x) / config.temperature,
            pages.mask,
        )
        token, page = reward(p, v, pages.item, pages.mask, start(reward.trunk))
        value = critic(p, v, pages.item, pages.mask, start(critic.trunk))
        parts.append(
            (
                pages.item,
                pages.mask,
                old,
                old_ref,
                value,
                token,
                page,
                entropy,
                exact,
                (pages.logp - old).abs(),
            )
        )
    columns = [torch.cat(column)[: None if busy else 0] for column in zip(*parts, strict=True)]
    if dist.world() > 1:
        columns = [
            torch.from_numpy(dist.gather(column.cpu().numpy())).to(prompt.device)
            for column in columns
        ]
    *columns, drift = columns
    return Rollout(prompt, valid, excluded, *columns, drift=float(drift.max()))


def advantages(config: Config, r: Rollout, reward: Tensor) -> tuple[Tensor, Tensor]:
    """advantage, ret (B, K) from the slots' rewards (B, K).

    ppo        GAE with the critic, then masked whitening; the critic's target stays unwhitened
    reinforce  the whole page's reward minus the batch mean (Eq. 11 with a baseline)
    rloo       the whole page's reward minus the mean of the same user's other pages
    """
    if config.algo == "ppo":
        advantage, ret = gae(reward, r.value, r.mask, config.gamma, config.lam)
        return masked.whiten(advantage, r.mask), ret
    total = reward.sum(1)
    if config.algo == "reinforce":
        advantage = total - total.mean()
    else:
        group = total.view(-1, config.samples)
        others = (group.sum(1, keepdim=True) - group) / (config.samples - 1)
        advantage = (group - others).flatten()
    return torch.where(r.mask, advantage[:, None], 0.0), r.value


def minibatch_loss(
    learner: Objective,
    config: Config,
    r: Rollout,
    rows: Tensor,
    advantage: Tensor,
    ret: Tensor,
    learn_policy: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy and value loss over some pages of a rollout, each a mean over kept slots, and what to log of them."""
    x, mask, row = r.item[rows], r.mask[rows], {}
    value = learner.critic(r.prompt[rows], r.valid[rows], x, mask)
    v_loss, row["val/clipfrac"] = value_loss(
        value, r.value[rows], ret[rows], mask, config.value_clip
    )
    row["val/loss"] = v_loss.detach()
    loss = config.vf_coef * v_loss + (0.0 if learn_policy else dist.idle(learner.policy))
    if learn_policy:
        states = slot_states(learner.policy, r.prompt[rows], r.valid[rows], x, mask)
        logp, entropy = page_logp(
            states,
            learner.policy.item,
            x,
            mask,
            r.excluded[rows],
            config.temperature,
            with_entropy=True,
        )
        old, A = r.old_logp[rows], advantage[rows]
        p_loss, row["policy/clipfrac"] = policy_loss(logp, old, A, mask, config.clip)
        bonus = masked.mean(entropy, mask)
        loss = loss + p_loss - config.entropy_coef * bonus
        row |= policy_row(logp.detach(), old, A, mask, config.clip)
        row |= {"policy/loss": p_loss.detach(), "policy/entropy": bonus.detach()}
        if config.sft_coef:
            b = r.sft.part(rows)
            taught = sft_loss(learner.policy, b, "both") * b.mask.sum() / mask.sum().clamp(min=1)
            loss, row["policy/sft_loss"] = loss + config.sft_coef * taught, taught.detach()
    return loss, row


def passes(
    config: Config,
    learner: nn.Module,
    r: Rollout,
    mini: Tensor,
    advantage: Tensor,
    ret: Tensor,
    learn_policy: bool,
) -> list[dict]:
    """Forward and backward over one minibatch; what to log of its micro-batches, on the device.

    Each loss is a mean over the kept slots of the minibatch; a micro-batch adds its share of that mean, whichever
    process it is on (gradients are averaged over processes, hence the factor).
    """
    slots = r.mask[mini].sum().clamp(min=1)
    mine, busy = dist.shard(mini)
    parts, micros = [], mine.split(config.micro) if busy else ()
    most = math.ceil(len(mini) / dist.world())  # rows of the first process
    count = math.ceil(most / config.micro)  # everybody makes as many, if need be idle ones
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
    """All inner epochs over a rollout, each in its order; ended by the first minibatch that finds the policy moved
    further than max_kl, which updates nothing any more. -> what to log; "stopped" 1.0 if it came to that.

    Where optimisers step in one launch (a GPU), nobody waits for that KL: from the minibatch on that exceeds it the
    device leaves every step out by itself, and the host, which hears of it two minibatches later, ends the loop.
    """
    late, halt, heard, done = policy_step.fused and dist.world() == 1 and learn_policy, None, [], []
    minis = [
        (epoch, mini)
        for epoch, order in enumerate(orders)
        for mini in dist.send(torch.from_numpy(order), r.item.device).split(config.minibatch)
    ]
    for epoch, mini in minis:
        if len(heard) > 1 and heard[-2].read()[0]:
            break
        parts = passes(config, learner, r, mini, advantage, ret, learn_policy)
        entry = {"epoch": epoch, "parts": parts, "share": len(mini) / len(r), "halted": 0.0}
        done.append(entry)
        if late:
            share = torch.stack([row["share"] for row in parts])
            moved = (
                torch.stack([row["policy/approxkl_k3"] for row in parts]) * share
            ).sum() / share.sum()
            halt = moved > config.max_kl if halt is None else halt | (moved > config.max_kl)
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


def gate(config: Config, record: dict, where) -> None:
    """Warn about (strict: refuse) a reward model that is wrong too often on held-out pairs of some kind."""
    weak = {
        kind: row["accuracy"]
        for kind, row in record["held_out"].items()
        if isinstance(row, dict) and row["accuracy"] < config.min_accuracy
    }
    if not weak:
        return
    text = (
        ", ".join(f"{kind} {accuracy:.3f}" for kind, accuracy in weak.items())
        + f": the reward model's held-out accuracy is below {config.min_accuracy}. PPO will optimise its mistakes."
        f"\n  Look closer: the pairs are in {where / 'pairs.parquet'}, accuracies per head in {where / 'done'}."
        "\n  Usual causes: too few pairs (raise per_kind or epochs of reward), a weak SFT policy, no categories."
    )
    if config.strict:
        raise PageLLMError(text)
    if dist.is_main():
        tqdm.write(f"WARNING {text}", file=sys.stderr)


def run(config: Config) -> None:
    sft_dir = config.stage("sft", config.source_run)
    reward_dir = config.stage("reward", config.reward_run or config.source_run)
    sft = finished(sft_dir, "SFT policy", config.make("sft"))
    judged = finished(
        reward_dir, "reward model", config.make("reward") + "\n  PPO needs one to score pages."
    )
    shop = load(config.data_dir)
    device = dist.start(config.device)
    inputs = {
        "data": file_id(config.data_dir / "source.json"),
        "sft": sft["id"],
        "reward": judged["id"],
    }
    with Run(config.stage("ppo"), config, inputs, free=("micro",)) as out:
        if out.done:
            if dist.is_main():
                print(f"ppo: already done in {out.path}")
            return
        gate(config, judged, reward_dir)
        policy = Policy.load(sft_dir, device)
        policy.check_room(config.k)
        if dist.is_main():
            policy.vocab.save(out.path)
        ref = (
            from_state(load_model_file(sft_dir / "model.pt"))
            .to(device)
            .eval()
            .requires_grad_(False)
        )
        reward = RewardModel.load(reward_dir, device).requires_grad_(False)
        critic = Critic(from_state(load_model_file(reward_dir / "model.pt"))).to(device).eval()
        policy.model.checkpoint_blocks = critic.trunk.checkpoint_blocks = config.checkpoint_blocks

        history, seen = shop.csr("train"), shop.csr("train", positive=None)
        users, hides = np.flatnonzero(history.counts() > 0), config.w_hit > 0 or config.sft_coef > 0
        if hides:
            if policy.vocab.times:
                raise PageLLMError(
                    "w_hit and sft_coef hide train items at random, and a policy with time tokens has "
                    "learnt pages that come after their history: leave both at 0"
                )
            maker, disliked = PageMaker(shop), shop.csr("train", positive=False)
            users = maker.users
            longest = min(config.max_page, policy.model.shape.n_ctx - policy.prompts.page_room)
        per_step = config.rollout // config.samples
        total = max(config.min_steps, round(config.epochs * len(users) / per_step))
        frozen = -(
            -config.critic_warmup // (config.inner_epochs * (config.rollout // config.minibatch))
        )
        learner = dist.wrap(
            objective := Objective(minibatch_loss, policy=policy.model, critic=critic),
            config.parallel,
        )
        opt = optimiser(policy.model, config.lr, eps=1e-5, betas=(0.9, 0.999), row_lr=config.row_lr)
        critic_opt = optimiser(critic, config.critic_lr, eps=1e-5, betas=(0.9, 0.999))
        policy_step = GuardedStep(opt, policy.model.parameters(), config.grad_clip)
        critic_step = GuardedStep(critic_opt, critic.parameters(), config.grad_clip)
        moments, steer = RunningMoments(), None
        if config.kl_target:
            steer = AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)
        categories = metrics.described(shop.catalogue.categories)
        validation = Validation(
            shop, "valid", config.k, config.mode, config.eval_users, config.seed
        )

        # Reward model and critic only. In bfloat16 the policy's pass over a page leaves the log-probabilities the page
        # was sampled with by up to 0.04 nats a slot (float32: 1e-5): the ratio would not be the one that was drawn.
        low = out.precision(config.precision, device, policy.model.shape.n_embd) == "bfloat16"
        reward.trunk.bf16 = critic.trunk.bf16 = low

        start, best = 0, {"score": -math.inf, "step": 0, "weights": None}
        if state := out.load():
            start, best = state["step"], state["best"]
            dist.load_weights(policy.model, state["policy"])
            dist.load_weights(critic, state["critic"])
            dist.load_optimiser(policy.model, opt, state["opt"])
            dist.load_optimiser(critic, critic_opt, state["critic_opt"])
            moments.load_state_dict(state["moments"])
            if steer:
                steer.coef = state["kl_coef"]
        else:
            with dist.unsharded(objective):
                scores = validation(policy)
            out.log(0, **valid_row(scores))
            best = keep_best(config, best, scores, 0, policy)
        dist.barrier()
        log = out.read_log()
        raised = {text.split(":")[0] for row in log for text in row.get("alarms", [])}

        def state_at(step: int) -> dict:
            return {
                "step": step,
                "best": best,
                "policy": dist.weights(policy.model, frozen=False),
                "critic": dist.weights(critic, frozen=False),
                "opt": dist.optimiser_state(policy.model, opt),
                "critic_opt": dist.optimiser_state(critic, critic_opt),
                "moments": moments.state_dict(),
                "kl_coef": steer.coef if steer else config.kl_coef,
            }

        def questions(step: int) -> tuple:
            """Users, what SFT would teach of them, prompts, what no page may hold, and the numbers that draw pages."""
            some = users[batch_at(step, len(users), per_step, config.seed, "ppo")[1]]
            # Micro-batches of like length: little padding to read.
            some = some[np.argsort(history.counts()[some], kind="stable")].repeat(config.samples)
            taught = (
                collate(
                    policy,
                    some,
                    [
                        maker.example(
                            u,
                            config.label_share,
                            randomness.rng(config.seed, "ppo", "split", step, int(u)),
                        )
                        for u in some
                    ],
                )
                if hides
                else None
            )
            uniform = np.stack(
                [
                    randomness.rng(
                        config.seed, "ppo", "sample", step, int(u), i % config.samples
                    ).random(config.k)
                    for i, u in enumerate(some)
                ]
            )
            uniform = dist.send(torch.from_numpy(uniform), device)
            if config.w_hit:
                gone = torch.cat(
                    [taught.excluded, dist.send(torch.from_numpy(disliked.padded(some)), device)], 1
                )
                return some, taught, taught.prompt, taught.valid, gone, uniform
            return (
                some,
                taught,
                *policy.prompt(some, [history.of(u) for u in some]),
                dist.send(torch.from_numpy(seen.padded(some)), device),
                uniform,
            )

        bar = progress(start, total, "ppo")
        for step, (some, taught, *given) in prefetch(out.steps(bar), total, questions):
            began = time.time()
            with dist.unsharded(objective):
                r = roll_out(config, policy, ref, reward, critic, *given)
            if not torch.stack(
                [x.isfinite().all() for x in (r.old_logp, r.ref_logp, r.value, r.token, r.page)]
            ).all():
                kept = out.keep_for_replay(step, {**state_at(step), "rollout": r.state()})
                raise PageLLMError(
                    f"ppo step {step}: log-probabilities, values or rewards are not finite; lower the "
                    f"learning rate (RUN=another, or remove {out.path})\n"
                    f"  The rollout, weights and moments are in {kept} for a closer look."
                )
            kl_coef = steer.coef if steer else config.kl_coef
            if config.w_hit:
                r.hit = hit_reward(r.item, r.mask, taught.item)
            r.sft = taught.head(longest) if config.sft_coef else None
            token, page, hit = normalise_reward(
                r.token,
                r.page,
                r.mask,
                moments,
                config.w_token,
                config.w_page,
                hit=None if r.hit is None else config.w_hit * r.hit,
            )
            # The weights are inside the parts already: normalisation needs the weighted sum.
            rewards = step_reward(
                token, page, r.old_logp, r.ref_logp, r.mask, 1.0, 1.0, kl_coef, hit
            )
            advantage, ret = advantages(config, r, rewards)

            learning = step >= frozen
            for group, peak in ((opt, config.lr), (critic_opt, config.critic_lr)):
                set_lr(group, lr_at(step, total, peak, shape="linear"))
            row = {
                "learning": learning,
                "kl_coef": kl_coef,
                "lr": opt.param_groups[0]["lr"],
                **to_numbers([rollout_row(r, rewards, advantage, ret, moments)])[0],
                **page_row(r.item, categories),
            }
            orders = [
                np.arange(len(r))
                if config.minibatch >= len(r)
                else randomness.rng(config.seed, "ppo", "minibatches", step, epoch).permutation(
                    len(r)
                )
                for epoch in range(config.inner_epochs)
            ]
            row |= learn(
                config,
                learner,
                policy_step,
                critic_step,
                r,
                advantage,
                ret,
                orders,
                learning,
                f"ppo step {step}",
                lambda step=step, r=r: out.keep_for_replay(
                    step, {**state_at(step), "rollout": r.state()}
                ),
            )
            if steer:
                steer.update(row["objective/kl_seq_sum"], len(r))

            if (step + 1) % config.eval_every == 0 or step + 1 == total:
                with dist.unsharded(objective):
                    scores = validation(policy)
                row |= valid_row(scores)
                best = keep_best(config, best, scores, step + 1, policy)
                rows = range(0, len(r), config.samples)[:3]
                log_samples(
                    out,
                    step + 1,
                    shop,
                    {
                        i: (
                            int(some[i]),
                            taught.excluded[i] if config.w_hit else history.of(some[i])[0],
                        )
                        for i in rows
                    },
                    r,
                )
            out.log(
                step + 1,
                "timing",
                seconds=round(time.time() - began, 3),
                peak_mb=dist.peak_memory(),
            )
            log.append(
                {
                    "step": step + 1,
                    **{k: float(v) if isinstance(v, torch.Tensor) else v for k, v in row.items()},
                }
            )
            fresh = [
                text
                for text in alarms(log, frozen, config.kl_target)
                if text.split(":")[0] not in raised
            ]
            raised |= {text.split(":")[0] for text in fresh}
            for text in fresh if dist.is_main() else ():
                tqdm.write(f"ALARM at step {step + 1}: {text}", file=sys.stderr)
            out.log(step + 1, **row, alarms=fresh)
            if fresh and config.strict:
                raise PageLLMError(f"stopped at step {step + 1}: {fresh[0]}")
            bar.set_postfix_str(
                f"reward {log[-1]['objective/reward_total']:.3f}, KL "
                f"{log[-1]['objective/kl_seq_sum']:.2f}, best {config.select} {best['score']:.4f}",
                refresh=False,
            )
            if out.due(step + 1, total):
                out.save(state_at(step + 1))
        final = state_at(total)
        dist.load_weights(policy.model, best["weights"])
        out.finish(
            policy.state(),
            final,
            step=best["step"],
            score=best["score"],
            steps=total,
            alarms=sorted(raised),
        )
        if dist.is_main():
            print(
                f"ppo: {out.path}, step {best['step']} of {total}, validation {config.select} {best['score']:.4f}"
            )


def keep_best(
    config: Config, best: dict, scores: dict[str, float], step: int, policy: Policy
) -> dict:
    """The best validation so far, with its weights. The SFT policy itself (step 0) takes part."""
    score = {"energy": scores["energy"], "ndcg": scores["NDCG@100"], "last": float(step)}[
        config.select
    ]
    if not score > best["score"]:
        return best
    return {"score": score, "step": step, "weights": dist.weights(policy.model, frozen=False)}


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm.ppo"))
