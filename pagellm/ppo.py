"""PPO: sample pages, score them, and update the policy, with a KL penalty to the SFT policy.

Reads   data/<dataset>, runs/<run>/sft, runs/<run>/reward; --item_reward outcome: runs/<run>/compose
Writes  runs/<run>/ppo      model.pt of the step with the best validation score, log.jsonl,
                            samples.jsonl (some pages at each validation), gate.json

    make ppo                pagellm ppo --dataset synthetic --sft_coef 3

Under a minute for the synthetic shop, whose preset is expert iteration. One step (Eq. 9 to 11 of
arXiv 2506.09084; arithmetic in ppo_step.py, what is logged in ppo_watch.py):

    prompt (B, P) -> sample under the constraint -> item, logp (B, K); ref_logp, value (B, K)
      -> token_reward (B, K), page_reward (B,) -> terms, name -> (B, K) -> normalise
      -> r_k = sum of terms_k - kl_coef (logp - ref_logp)_k
      -> gae -> whiten -> inner epochs of minibatches -> clipped policy and value loss -> step

No dropout is used: the ratio of new and old probabilities must be 1 before the first update.

Before the first step a check, the gate, measures whether the reward predicts validation hits better
than SFT's own logits do (ppo_gate.py). If it does not, the SFT policy is kept, and the stage ends
without an error.
"""

import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pagellm.data.shop import Shop, load
from pagellm.kernels import masked
from pagellm.model.choice import choose_mode
from pagellm.model.decode import (
    LegalItems,
    page_logp,
    sample,
    share_prompts,
    slot_states,
    trim_padding,
)
from pagellm.model.outcome_reward import OutcomeReward
from pagellm.model.policy import Validation
from pagellm.model.reward_fn import RewardFunction
from pagellm.model.shortlist import Shortlist, draw_shortlists
from pagellm.pages import metrics
from pagellm.ppo_config import Config
from pagellm.ppo_gate import CLOSED, ask_gate, refuse_to_force
from pagellm.ppo_once import drawn_at_once, once_loss
from pagellm.ppo_setup import Networks, Prompts, StepInput, load_composer, sources
from pagellm.ppo_step import (
    AdaptiveKL,
    Rollout,
    RunningMoments,
    add_sft_loss,
    advantages,
    exact_kl,
    gated,
    legal_logits,
    normalise,
    policy_loss,
    reward_terms,
    step_reward,
    value_loss,
)
from pagellm.ppo_watch import (
    Watch,
    log_samples,
    page_row,
    policy_row,
    rollout_row,
    shown,
    summarise,
    to_numbers,
    valid_row,
    weighted_mean,
)
from pagellm.stage import dist, hints, randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError
from pagellm.stage.run import Run
from pagellm.stage.train import (
    Best,
    GuardedStep,
    Objective,
    lr_at,
    optimiser,
    prefetch,
    progress,
    set_lr,
)

__all__ = ["Config", "run"]


def drawn_by_slot(
    config: Config, nets: Networks, batch: StepInput, index: np.ndarray
) -> dict[str, Tensor]:
    """Sample pages slot by slot and measure them. Returns fields of Rollout.

    old_logp comes from a pass over the finished page, the same pass that the updates make, and not
    from the cached generation. So the ratio starts at 1 to the last bit.
    """
    policy, tau = nets.policy.model, config.temperature
    rows = torch.from_numpy(index).to(batch.prompt.device)
    (p, v), x = trim_padding(batch.prompt[rows], batch.valid[rows]), batch.excluded[rows]
    group = index // config.samples
    start = partial(share_prompts, p, v, config.k, group)
    short = ref_short = None
    if batch.proposed is None:
        legal, begun = LegalItems(x, policy.n_items), start(policy)
    else:
        proposed, size = batch.proposed[rows], config.candidates
        short, begun = draw_shortlists(policy, p, v, x, proposed, group, size, config.k)
        ref_short, legal = Shortlist(nets.ref, short.candidates), short.constraint()
    pages = sample(policy, p, v, legal, batch.uniform[rows], tau, begun, short)
    item, mask = pages.item, pages.mask
    states = slot_states(policy, p, v, item, mask)
    ref_states = slot_states(nets.ref, p, v, item, mask, start(nets.ref))
    token, page = nets.judge(batch.users[index], group, p, v, item, mask)
    if short is None or ref_short is None:
        head, ref_head = policy.scored_items(), nets.ref.scored_items()
        cut = policy.item_parts
        old, entropy = page_logp(states, head, item, mask, x, tau, with_entropy=True, parts=cut)
        old_ref = page_logp(ref_states, ref_head, item, mask, x, tau, parts=cut)
        logits = legal_logits(states, policy, item, x)
        ref_logits = legal_logits(ref_states, nets.ref, item, x)
        token = gated(token, ref_logits[:, 0], item, config.relevance_gate)
    else:
        old, entropy = short.logp(states, item, mask, tau)
        old_ref, _ = ref_short.logp(ref_states, item, mask, tau)
        logits = short.legal_logits(states, item, mask)
        ref_logits = ref_short.legal_logits(ref_states, item, mask)
    exact = exact_kl(logits / tau, ref_logits / tau, mask)
    value = nets.critic(p, v, item, mask, start(nets.critic.trunk))
    return {
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
        **({} if short is None else {"candidates": short.candidates}),
    }


@torch.no_grad()
def roll_out(config: Config, nets: Networks, batch: StepInput) -> Rollout:
    """Draw pages, then score them with the policy, the reference, the reward models and the critic.

    Several processes share the pages and then exchange all results.
    """
    measure, parts = drawn_at_once if config.once else drawn_by_slot, []
    mine, busy = dist.shard(np.arange(len(batch.prompt)))
    for index, real in dist.pieces(mine, config.micro, nets.policy.model.parts is not None):
        measured = measure(config, nets, batch, index)
        parts += [measured] if real else []
    found: dict[str, Any] = {
        name: torch.cat([part[name] for part in parts])[: None if busy else 0] for name in parts[0]
    }
    if dist.world() > 1:
        found = {
            name: torch.from_numpy(dist.gather(x.cpu().numpy())).to(batch.prompt.device)
            for name, x in found.items()
        }
    found["drift"] = float(found["drift"].max())
    return Rollout(batch.prompt, batch.valid, batch.excluded, **found)


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
            head, gone = learner.policy.scored_items(), r.excluded[rows]
            parts = learner.policy.item_parts
            logp, entropy = page_logp(
                states, head, x, mask, gone, tau, with_entropy=True, parts=parts
            )
        old, A = r.old_logp[rows], advantage[rows]
        p_loss, row["policy/clipfrac"] = policy_loss(logp, old, A, mask, config.clip)
        bonus = masked.mean(entropy, mask)
        loss = loss + p_loss - config.entropy_coef * bonus
        row |= policy_row(logp.detach(), old, A, mask, config.clip)
        row |= {"policy/loss": p_loss.detach(), "policy/entropy": bonus.detach()}
        return add_sft_loss(learner.policy, r, rows, loss, row, config.sft_coef, "both")
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
    critic_step: GuardedStep | None,
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

    critic_step  None where there is no critic
    orders       one permutation of the rollout's pages for each inner epoch
    """
    # Maximised pages were not drawn from the old policy, so their KL says nothing of the step.
    max_kl = math.inf if config.algo == "expert" else config.max_kl
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
            too_far = (k3 * share).sum() / share.sum() > max_kl
            halt = too_far if halt is None else halt | too_far
            entry["halted"] = halt.double()
            heard.append(dist.AsyncScalars([entry["halted"]]))
        elif learn_policy:
            entry["parts"] = to_numbers(parts)
            if weighted_mean(entry["parts"])["policy/approxkl_k3"] > max_kl:
                entry["halted"] = 1.0
                for guard in filter(None, (policy_step, critic_step)):
                    guard.opt.zero_grad(set_to_none=True)
                break
        if critic_step is not None:
            entry["val/grad_norm"] = critic_step.step(where, keep, halt)
        if learn_policy:
            entry["policy/grad_norm"] = policy_step.step(where, keep, halt)
    return summarise(done, learn_policy)


def keep_sft(
    config: Config,
    shop: Shop,
    training: "Training",
    validation: Validation,
    gate: dict,
    out: Run,
) -> None:
    """The gate is closed: finish the stage without a step, with the SFT policy as its result."""
    out.log(0, **training.validate(validation, 0))
    best, policy = training.best, training.nets.policy
    with dist.unsharded(training.objective):
        decoding = choose_mode(policy, shop, config.k)
    out.finish(
        policy.state(),
        training.state(0),
        decoding=decoding,
        step=0,
        score=best.score,
        steps=0,
        alarms=[],
        gate=gate,
    )
    if dist.is_main():
        print(
            f"ppo: {CLOSED}. The SFT policy is kept in {out.path}.\n"
            "  --force (in another run) trains all the same."
        )


class Training:
    """Everything that changes from step to step; a checkpoint holds all of it."""

    def __init__(self, config: Config, nets: Networks, total: int):
        self.config, self.nets, self.total = config, nets, total
        policy, critic = nets.policy.model, nets.critic
        # What reward_fn pays of pages, mask (B, K) and users (B,): (B, K).
        self.own: Callable[[Tensor, Tensor, np.ndarray], Tensor] | None = None
        self.objective = (
            Objective(once_loss, policy=policy)
            if config.once
            else Objective(minibatch_loss, policy=policy, critic=critic)
        )
        # FSDP replaces the parameters, so the optimisers come after it.
        self.learner = dist.wrap(self.objective, config.parallel)
        adam = partial(optimiser, eps=1e-5, betas=(0.9, 0.999), lazy=config.lazy_rows)
        self.opt = adam(policy, config.lr, row_lr=config.row_lr)
        self.policy_step = GuardedStep(self.opt, policy.parameters(), config.grad_clip)
        self.critic_opt: torch.optim.Optimizer | None = None
        self.critic_step: GuardedStep | None = None
        self.warmup = 0  # steps of the critic alone
        if not config.once:
            updates = config.inner_epochs * (config.rollout // config.minibatch)
            self.warmup = math.ceil(config.critic_warmup / updates)
            self.critic_opt = adam(critic, config.critic_lr)
            self.critic_step = GuardedStep(self.critic_opt, critic.parameters(), config.grad_clip)
        self.moments, self.best = RunningMoments(), Best()
        self.steer: AdaptiveKL | None = None
        if config.kl_target:
            self.steer = AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)

    @property
    def kl_coef(self) -> float:
        return self.steer.coef if self.steer else self.config.kl_coef

    def state(self, step: int) -> dict:
        """What a checkpoint holds. Call it on every process."""
        policy, critic = self.nets.policy.model, self.nets.critic
        state = {
            "step": step,
            "best": self.best.state(),
            "policy": dist.weights(policy, frozen=False),
            "opt": dist.optimiser_state(policy, self.opt),
            "moments": self.moments.state_dict(),
            "kl_coef": self.kl_coef,
        }
        if self.critic_opt is None:
            return state
        return state | {
            "critic": dist.weights(critic, frozen=False),
            "critic_opt": dist.optimiser_state(critic, self.critic_opt),
        }

    def load(self, state: dict) -> None:
        policy, critic = self.nets.policy.model, self.nets.critic
        self.best = Best(**state["best"])
        dist.load_weights(policy, state["policy"])
        dist.load_optimiser(policy, self.opt, state["opt"])
        if self.critic_opt is not None:
            dist.load_weights(critic, state["critic"])
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

    def step(self, step: int, r: Rollout, batch: StepInput, out: Run) -> dict[str, Any]:
        """Rewards, advantages and all updates of one rollout -> what to log."""
        config = self.config
        label = batch.taught.item if batch.taught and config.w_hit else None
        r.terms = reward_terms(r, config.w_token, config.w_page, config.w_hit, label)
        if self.own is not None:
            r.terms["fn"] = config.w_fn * self.own(r.item, r.mask, batch.users)
        paid = normalise(r.terms, r.mask, self.moments)
        reward = step_reward(paid, r.old_logp, r.ref_logp, r.mask, self.kl_coef)
        advantage, ret = advantages(
            config.algo, reward, r.value, r.mask, config.gamma, config.lam, config.samples
        )
        learning = step >= self.warmup
        for opt, peak in ((self.opt, config.lr), (self.critic_opt, config.critic_lr)):
            if opt is not None:
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
    """Raise PageLLMError if a network's output is not finite. The rollout is kept in a file."""
    values = (r.old_logp, r.ref_logp, r.value, r.token, r.page)
    if torch.stack([x.isfinite().all() for x in values]).all():
        return
    kept = out.keep_for_replay(step, {**training.state(step), "rollout": r.state()})
    raise PageLLMError(
        f"ppo step {step}: log-probabilities, values or rewards are not finite; lower the learning "
        f"rate ({hints.another_run()}, or remove {out.path})\n"
        f"  The rollout, weights and moments are in {kept} for a closer look."
    )


def run(config: Config) -> None:
    sft_dir, reward_dir, compose_dir, inputs = sources(config)
    shop = load(config.data_dir)
    device = dist.start(config.device)
    with Run(config.stage("ppo"), config, inputs, free=("micro", "force")) as out:
        if out.already_done():
            refuse_to_force(config, out)
            return
        nets = Networks.load(config, sft_dir, reward_dir, device)
        policy = nets.policy
        if dist.is_main():
            policy.vocab.save(out.path)
        prompts = Prompts(config, shop, policy)
        composer = load_composer(config, shop, nets, compose_dir)
        gate = ask_gate(config, shop, nets, composer, out)
        steps = round(config.epochs * len(prompts.users) / prompts.per_step)
        total = max(config.min_steps, steps)
        training = Training(config, nets, total)
        if config.reward_fn:
            training.own = RewardFunction.load(config.reward_fn).over(shop)
        categories = metrics.described(shop.catalogue.categories)
        validation = Validation(
            shop, "valid", config.k, config.mode, config.eval_users, config.seed
        )
        longest = min(config.max_page, policy.model.shape.n_ctx - policy.prompts.page_room)
        if not gate["open"] and not config.force:
            keep_sft(config, shop, training, validation, gate, out)
            return
        if composer is not None:
            seen = shop.csr("train", positive=None)
            nets.outcome = OutcomeReward.of(composer, prompts.visited(total), seen, config.k)
        # Reward model and critic only. In bfloat16 the policy's pass over a page leaves the
        # log-probabilities the page was sampled with by up to 0.04 nats a slot (float32: 1e-5),
        # so the ratio would not be that of the draw.
        low = out.precision(config.precision, device, policy.model.shape.n_embd) == "bfloat16"
        for judge in (nets.critic, nets.reward):
            if judge is not None:
                judge.trunk.bf16 = low

        start = 0
        if state := out.load():
            start = state["step"]
            training.load(state)
        else:  # the SFT policy itself takes part as step 0
            out.log(0, **training.validate(validation, 0))
        dist.barrier()
        watch = Watch(config, out, training.warmup)

        stopped, bar = total, progress(start, total, "ppo")
        for step, batch in prefetch(out.steps(bar), total, prompts):
            began, busy = time.time(), time.process_time()
            with dist.unsharded(training.objective):
                r = roll_out(config, nets, batch)
            check_finite(r, step, training, out)
            r.sft = batch.taught.head(longest) if batch.taught and config.sft_coef else None
            row = training.step(step, r, batch, out) | page_row(r.item, categories)
            cpu = round(time.process_time() - busy, 4)
            if (step + 1) % config.eval_every == 0 or step + 1 == total:
                row |= training.validate(validation, step + 1)
                log_samples(out, step + 1, shop, shown(config, prompts, batch), r)
            seconds = round(time.time() - began, 3)
            out.log(step + 1, "timing", seconds=seconds, cpu=cpu, peak_mb=dist.peak_memory())
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
        with dist.unsharded(training.objective):
            decoding = choose_mode(policy, shop, config.k)
        out.finish(
            policy.state(),
            final,
            decoding=decoding,
            step=best.step,
            score=best.score,
            steps=stopped,
            alarms=sorted(watch.raised),
            gate=gate,
        )
        if dist.is_main():
            early = f", stopped after {stopped}" if stopped < total else ""
            print(
                f"ppo: {out.path}, step {best.step} of {total}{early}, "
                f"validation {config.select} {best.score:.4f}"
            )


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm ppo"))
