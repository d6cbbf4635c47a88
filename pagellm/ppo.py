"""PPO: sample pages, score them, and update the policy, with a KL penalty to the SFT policy.

Reads   data/<dataset>, runs/<run>/sft, runs/<run>/reward; --item_reward outcome: runs/<run>/compose
Writes  runs/<run>/ppo      model.pt of the step with the best validation score, log.jsonl,
                            samples.jsonl (some pages at each validation), gate.json

    make ppo                pagellm ppo --dataset synthetic --kl_coef 0.02

About two minutes for the synthetic shop on two CPU cores. One step (Eq. 9 to 11 of arXiv
2506.09084; arithmetic in ppo_step.py, what is logged in ppo_watch.py):

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
from dataclasses import dataclass, replace
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
from pagellm.model.choice import choose_mode
from pagellm.model.composer import Composer
from pagellm.model.decode import (
    LegalItems,
    page_logp,
    sample,
    shared_start,
    slot_states,
    trim_padding,
)
from pagellm.model.draws import draw, drawn_logp, first_kl, first_logits
from pagellm.model.networks import from_state
from pagellm.model.outcome_reward import OutcomeReward
from pagellm.model.page_loss import Batch, page_batch, sft_loss
from pagellm.model.policy import MODES, Policy, Validation
from pagellm.model.reward_fn import RewardFunction, check_name
from pagellm.model.reward_model import Critic, RewardModel
from pagellm.model.shortlist import Proposals, Shortlist, best_items
from pagellm.pages import metrics
from pagellm.pages.truth import PageMaker
from pagellm.ppo_gate import CLOSED, crossed_calibration, knowledge, said, validation_users
from pagellm.ppo_step import (
    AdaptiveKL,
    Rollout,
    RunningMoments,
    advantages,
    exact_kl,
    gated,
    legal_logits,
    normalise,
    page_pay,
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
from pagellm.stage.files import read_json, write_json
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

GROUPED = ("rloo", "grpo", "dr_grpo")  # these compare the pages of one user
ALGOS = ("ppo", "reinforce", *GROUPED, "expert")


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """Train the SFT policy by PPO on the reward model, with a KL penalty to the SFT policy."""

    source_run: str = ""  # run whose sft is read; empty: this run (studies share one)
    reward_run: str = ""  # run whose reward model is read; empty: the same as source_run
    item_reward: str = "pairs"  # reward of a slot: pairs, the token head of the reward model; or
    # outcome, the probability of a pick by the outcome model of the stage compose
    compose_run: str = ""  # run whose outcome model is read; empty: the same as source_run
    gate_users: int = 1000  # validation users of the gate before training; 0: all
    gate_pages: int = 16  # pages drawn for each of them
    force: bool = False  # train even if the reward knows nothing that the policy does not
    algo: str = "ppo"  # ppo; reinforce (Eq. 11 minus the batch mean); rloo, grpo or dr_grpo (a page
    # against the user's other pages); expert (likelihood of maximised pages)
    draw: str = "auto"  # how pages are drawn: slots, one slot after another; one_shot, all from the
    # first slot's distribution, without a critic; auto: slots for ppo and reinforce
    epochs: float = 1.5  # passes over the users (the paper: 5)
    min_steps: int = 45  # at least this many steps, however few the users
    rollout: int = 64  # pages sampled in a step
    samples: int = 1  # pages of one user among them; rloo, grpo and dr_grpo want 2 or more
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
    reward_fn: str = ""  # a reward function of your own, module:function, beside what is learnt
    # (pagellm/model/reward_fn.py). With w_token and w_page 0 no reward model is needed
    w_fn: float = 1.0  # weight of reward_fn
    w_token: float = 1.0  # weight of the mean token reward; 0: page-only
    w_page: float = 1.0  # weight of the page reward; 0: item-only
    w_hit: float = 0.0  # weight of the page's NDCG on train items that its prompt hides;
    # nothing learnt judges
    sft_coef: float = 0.0  # weight of SFT's loss on the users of a rollout,
    # nats per slot of their pages
    relevance_gate: int = 0  # an item beyond SFT's best so many for the user earns no item reward
    # above 0; 0: no such gate
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
    mode: str = "greedy"  # decoding in validation: greedy, beam, one_shot or hybrid
    select: str = "energy"  # validation score that decides the weights kept: energy, ndcg or last
    min_accuracy: float = 0.9  # a kind of pair below this accuracy draws a warning
    strict: bool = False  # stop at any alarm

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
                "gate_pages",
            )
        }
        check(
            self,
            **positive,
            algo=(self.algo in ALGOS, ", ".join(ALGOS)),
            draw=(self.draw in ("auto", "slots", "one_shot"), "auto, slots or one_shot"),
            relevance_gate=(self.relevance_gate >= 0, "0 or more"),
            item_reward=(self.item_reward in ("pairs", "outcome"), "pairs or outcome"),
            gate_users=(self.gate_users >= 0, "0 or more"),
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
            reward_fn=check_name(self.reward_fn),
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
        if self.algo in GROUPED and self.samples < 2:
            raise PageLLMError(
                f"algo={self.algo} compares pages of one user: want samples of 2 or more, e.g. "
                "--samples 8 --rollout 512 --minibatch 512"
            )
        if self.candidates and (self.once or self.relevance_gate):
            raise PageLLMError(
                "candidates shorten pages that are drawn slot by slot: leave it at 0 with pages "
                "drawn at once (one pass scores all items there) and with relevance_gate"
            )
        if self.algo in ("ppo", "reinforce") and self.draw == "one_shot":
            raise PageLLMError(
                f"algo={self.algo} has a critic, which reads a page slot by slot: want draw=slots, "
                "or one of " + ", ".join(GROUPED)
            )
        if self.algo == "expert" and (not self.reads_outcome or self.draw == "slots"):
            raise PageLLMError(
                "algo=expert learns the pages that maximise the outcome reward, all slots at once: "
                "want --item_reward outcome and w_token above 0, and no --draw slots"
            )
        if self.w_token == self.w_page == self.w_hit == 0 and not (self.reward_fn and self.w_fn):
            raise PageLLMError("w_token, w_page and w_hit are all 0: nothing to optimise")
        if self.item_reward == "outcome" and self.w_hit > 0:
            raise PageLLMError(
                "w_hit pays for train items, and the outcome model has learnt from them: take "
                "--w_hit 0 with --item_reward outcome, or --item_reward pairs"
            )

    @property
    def once(self) -> bool:
        """Whether all slots of a page come from the first slot's distribution, without a critic."""
        return self.draw == "one_shot" or (
            self.draw == "auto" and self.algo in (*GROUPED, "expert")
        )

    @property
    def reads_pairs(self) -> bool:
        """Whether the reward model trained on pairs has a weight above 0."""
        return self.w_page > 0 or (self.w_token > 0 and self.item_reward == "pairs")

    @property
    def reads_outcome(self) -> bool:
        """Whether the outcome model has a weight above 0."""
        return self.w_token > 0 and self.item_reward == "outcome"


@dataclass
class Networks:
    """The policy that learns, the SFT policy of the KL penalty, the reward models, and the critic.

    reward    the reward model trained on pairs; None if its weights are 0
    outcome   if given, scores the slots instead of the reward model's token head
    """

    policy: Policy
    ref: Backbone
    reward: RewardModel | None
    critic: Critic
    outcome: OutcomeReward | None = None

    @classmethod
    def load(cls, config: Config, sft_dir: Path, reward_dir: Path, device) -> "Networks":
        """The critic's trunk is copied from the reward model or SFT. Reward models are frozen."""
        policy = Policy.load(sft_dir, device)
        policy.check_room(config.k)
        ref = from_state(load_model_file(sft_dir / "model.pt")).to(device).eval()
        reward = None
        if config.reads_pairs:
            reward = RewardModel.load(reward_dir, device).requires_grad_(False)
        trunk_dir = reward_dir if config.reads_pairs else sft_dir
        critic = Critic(from_state(load_model_file(trunk_dir / "model.pt"))).to(device).eval()
        for trunk in (policy.model, critic.trunk):
            trunk.checkpoint_blocks = config.checkpoint_blocks
        return cls(policy, ref.requires_grad_(False), reward, critic)

    def judge(
        self,
        user: np.ndarray,
        group: np.ndarray,
        prompt: Tensor,
        valid: Tensor,
        item: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Rewards of pages before weighting: token (B, K), page (B,).

        user, group  (B,) the user of each page; pages with equal `group` share a prompt
        """
        token, page = torch.zeros(mask.shape, device=mask.device), mask.new_zeros(len(mask)).float()
        if self.reward is not None:
            start = share_prompts(prompt, valid, item.shape[1], group, self.reward.trunk)
            token, page = self.reward(prompt, valid, item, mask, start)
        if self.outcome is not None:
            token = self.outcome(user, item, mask)
        return token, page


@dataclass
class Asked:
    """The input of one step: users, prompts, and the random numbers that draw the pages."""

    users: np.ndarray  # (B,)
    prompt: Tensor  # (B, P)
    valid: Tensor  # (B, P)
    excluded: Tensor  # (B, E) items that no page may hold, padded with -1
    uniform: Tensor  # (B, K) in [0, 1): the numbers that draw the pages; one-shot: (B, N)
    taught: Batch | None  # the hidden train items as pages, if w_hit or sft_coef needs them
    proposed: Tensor | None = None  # (B, M) items proposed for shortlists, padded with -1


class Prompts:
    """The users of each step and their prompts. They depend on the step's number alone."""

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
        width = self.policy.model.n_items if config.once else config.k
        draws = [
            randomness.rng(seed, "ppo", "sample", step, int(u), i % config.samples).random(width)
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
    """Shortlists for some pages; and their prompts, already read, to pass to decode as `start`.

    All pages of a user share one shortlist. It holds the proposed items; the rest are the best
    items by the current policy's logits of the first slot.

    index   which pages of the step these are; pages of one user are neighbours
    """
    _, *places = np.unique(index // config.samples, return_index=True, return_inverse=True)
    first, group = (torch.from_numpy(x).to(prompt.device) for x in places)
    begun = shared_start(policy, prompt[first], valid[first], config.k, group)
    # `first` are the first pages of their users, so the state of each is that user's.
    hidden = begun[1][first]
    found = best_items(
        hidden, policy.scored_items(), excluded[first], config.candidates, proposed[first]
    )
    return Shortlist(policy, found[group]), begun


def drawn_by_slot(
    config: Config, nets: Networks, asked: Asked, index: np.ndarray
) -> dict[str, Tensor]:
    """Sample pages slot by slot and measure them. Returns fields of Rollout.

    old_logp comes from a pass over the finished page, the same pass that the updates make, and not
    from the cached generation. So the ratio starts at 1 to the last bit.
    """
    policy, tau, rows = nets.policy.model, config.temperature, at_rows(asked, index)
    (p, v), x = trim_padding(asked.prompt[rows], asked.valid[rows]), asked.excluded[rows]
    group = index // config.samples
    start = partial(share_prompts, p, v, config.k, group)
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
    token, page = nets.judge(asked.users[index], group, p, v, item, mask)
    if short is None or ref_short is None:
        head, ref_head = policy.scored_items(), nets.ref.scored_items()
        old, entropy = page_logp(states, head, item, mask, x, tau, with_entropy=True)
        old_ref = page_logp(ref_states, ref_head, item, mask, x, tau)
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


def drawn_at_once(
    config: Config, nets: Networks, asked: Asked, index: np.ndarray
) -> dict[str, Tensor]:
    """The same for pages whose slots all come from the first slot's distribution (draws.py).

    With algo=expert the pages are not drawn: they are those that maximise the outcome reward.

    A prompt is read once, however many pages are drawn for it. There is no critic: values are 0.
    """
    rows, users = at_rows(asked, index), asked.users[index]
    first, at = distinct(index // config.samples, rows.device)
    p, v, x = (x[rows][first] for x in (asked.prompt, asked.valid, asked.excluded))
    logits, ref_logits = (first_logits(m, p, v, x) for m in (nets.policy.model, nets.ref))
    z, ref = logits / config.temperature, ref_logits / config.temperature
    if config.algo == "expert" and nets.outcome is not None:
        item = dist.send(torch.from_numpy(nets.outcome.maximise(users, config.k)), rows.device)
        mask = item >= 0
    else:
        pages = draw(z[at], asked.uniform[rows], config.k)
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


def at_rows(asked: Asked, index: np.ndarray) -> Tensor:
    return torch.from_numpy(index).to(asked.prompt.device)


def distinct(group: np.ndarray, device) -> tuple[Tensor, Tensor]:
    """The first row of every group; and for each row the index of its group among these."""
    _, first, at = np.unique(group, return_index=True, return_inverse=True)
    return torch.from_numpy(first).to(device), torch.from_numpy(at).to(device)


@torch.no_grad()
def roll_out(config: Config, nets: Networks, asked: Asked) -> Rollout:
    """Draw pages, then score them with the policy, the reference, the reward models and the critic.

    Several processes share the pages and then exchange all results.
    """
    measure, parts = drawn_at_once if config.once else drawn_by_slot, []
    mine, busy = dist.shard(np.arange(len(asked.prompt)))
    for index in np.split(mine, range(config.micro, len(mine), config.micro)):
        parts.append(measure(config, nets, asked, index))
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


def once_loss(
    learner: Objective,
    config: Config,
    r: Rollout,
    rows: Tensor,
    advantage: Tensor,
    ret: Tensor,
    learn_policy: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`minibatch_loss` for pages drawn from the first slot: no critic, one pass for each prompt.

    With algo=expert the loss is minus the mean log-probability of a slot instead of the clipped
    objective.
    """
    x, mask, policy = r.item[rows], r.mask[rows], learner.policy
    first, at = distinct((rows // config.samples).cpu().numpy(), rows.device)
    p, v, gone = (t[rows[first]] for t in (r.prompt, r.valid, r.excluded))
    logits = first_logits(policy, *trim_padding(p, v), gone) / config.temperature
    logp, entropy = drawn_logp(logits, x, mask, at)
    old, A, row = r.old_logp[rows], advantage[rows], {}
    loss, row["policy/clipfrac"] = policy_loss(logp, old, A, mask, config.clip)
    if config.algo == "expert":
        loss = -masked.mean(logp, mask)
    bonus = masked.mean(entropy, mask)
    row |= policy_row(logp.detach(), old, A, mask, config.clip)
    row |= {"policy/loss": loss.detach(), "policy/entropy": bonus.detach()}
    loss = loss - config.entropy_coef * bonus
    return kept_likelihood(config, policy, r, rows, loss, row, "multinomial")


def kept_likelihood(
    config: Config,
    policy: Backbone,
    r: Rollout,
    rows: Tensor,
    loss: Tensor,
    row: dict[str, Tensor],
    objective: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add sft_coef times SFT's loss, weighted by slots, if sft_coef is above 0."""
    if r.sft is not None:
        b, slots = r.sft.select(rows), r.mask[rows].sum().clamp(min=1)
        taught = sft_loss(policy, b, objective) * b.mask.sum() / slots
        loss, row["policy/sft_loss"] = loss + config.sft_coef * taught, taught.detach()
    return loss, row


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
            logp, entropy = page_logp(states, head, x, mask, gone, tau, with_entropy=True)
        old, A = r.old_logp[rows], advantage[rows]
        p_loss, row["policy/clipfrac"] = policy_loss(logp, old, A, mask, config.clip)
        bonus = masked.mean(entropy, mask)
        loss = loss + p_loss - config.entropy_coef * bonus
        row |= policy_row(logp.detach(), old, A, mask, config.clip)
        row |= {"policy/loss": p_loss.detach(), "policy/entropy": bonus.detach()}
        return kept_likelihood(config, learner.policy, r, rows, loss, row, "both")
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


def warn_of_weak_pairs(config: Config, record: dict, where: Path) -> None:
    """Warn if the reward model is often wrong on held-out pairs. The run goes on all the same."""
    weak = {
        kind: row["accuracy"]
        for kind, row in record["held_out"].items()
        if isinstance(row, dict) and row["accuracy"] < config.min_accuracy
    }
    if weak and dist.is_main():
        shown = ", ".join(f"{kind} {accuracy:.3f}" for kind, accuracy in weak.items())
        tqdm.write(
            f"WARNING {shown}: the reward model's held-out accuracy is below "
            f"{config.min_accuracy}.\n  Look closer: the pairs are in {where / 'pairs.parquet'}, "
            f"accuracies per head in {where / 'done'}.\n  Usual causes: too few pairs (raise "
            "per_kind or epochs of reward), a weak SFT policy, no categories.",
            file=sys.stderr,
        )


def ask_gate(
    config: Config, shop: Shop, nets: Networks, composer: Composer | None, out: Run
) -> dict:
    """Measure how well reward and SFT predict validation hits (ppo_gate.py): gate.json."""
    path = out.path / "gate.json"
    if path.exists():
        return read_json(path)
    if (out.path / "LAST").exists():
        return {"open": True, "skipped": "the run was begun before there was a gate"}
    users, gate = validation_users(shop, config.gate_users, config.seed), {}
    own = bool(config.reward_fn and config.w_fn)
    if own or config.w_token == config.w_page == 0 or len(users) == 0:
        why = "no user has validation items" if len(users) == 0 else "w_hit alone pays: known hits"
        why = f"{config.reward_fn} pays, which is yours to judge" if own else why
        gate = {"open": True, "skipped": why}
    else:
        judges = nets
        if composer is not None:
            seen = shop.csr("train", positive=None)
            opinion = composer.opinion(users, seen)
            crossed, bins = crossed_calibration(*opinion, shop.csr("valid"), shop.n_items)
            taste = composer.taste
            outcome = OutcomeReward.from_opinion(
                crossed, composer.kin, taste.worth, taste.spread, config.k
            )
            judges, gate = replace(nets, outcome=outcome), {"reliability": bins}

        def pay(user, prompt, valid, item, mask):
            group = np.unique(user, return_inverse=True)[1]
            token, page = judges.judge(user, group, prompt, valid, item, mask)
            return page_pay(token, page, mask, config.w_token, config.w_page)

        policy = Policy(nets.ref, nets.policy.vocab, nets.policy.style)
        gate |= knowledge(
            shop, policy, pay, users, config.k, config.gate_pages, config.temperature, config.seed
        )
    if dist.is_main():
        write_json(path, gate)
        print("ppo: " + (f"no gate: {gate['skipped']}" if "skipped" in gate else said(gate)))
        if not gate["open"] and config.force:
            print(f"ppo: {CLOSED}; --force trains all the same")
    return gate


def sources(config: Config) -> tuple[Path, Path, Path, dict[str, str]]:
    """The directories of SFT, reward and compose, and the ids of what is read of them.

    Raises PageLLMError where one that is needed is not finished, or does not fit the others.
    """
    sft_dir = config.stage("sft", config.source_run)
    reward_dir = config.stage("reward", config.reward_run or config.source_run)
    compose_dir = config.stage("compose", config.compose_run or config.source_run)
    sft = finished(sft_dir, "SFT policy", config.make("sft"))
    inputs = {"data": file_id(config.data_dir / "source.json"), "sft": sft["id"]}
    if config.reward_fn:
        inputs["reward_fn"] = RewardFunction.load(config.reward_fn).source
    if config.reads_pairs:
        need = config.make("reward") + "\n  PPO needs one to score pages."
        judged = finished(reward_dir, "reward model", need)
        warn_of_weak_pairs(config, judged, reward_dir)
        inputs["reward"] = judged["id"]
    if config.reads_outcome:
        need = config.make("compose") + "\n  --item_reward outcome pays by it."
        inputs["compose"] = finished(compose_dir, "outcome model", need)["id"]
        read = read_json(compose_dir / "config.json")["inputs"]
        if "ppo" in read or read.get("sft", sft["id"]) != sft["id"]:
            raise PageLLMError(
                f"{compose_dir} was made for another policy than {sft_dir}: its chances are "
                "calibrated beside that one\n  Remove it and make it again with --policy sft: "
                + config.make("compose")
            )
    return sft_dir, reward_dir, compose_dir, inputs


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


def refuse_to_force(config: Config, out: Run) -> None:
    """Raise PageLLMError where --force is given to a run that has ended at the gate."""
    done = read_json(out.path / "done")
    if config.force and not done["steps"] and not done.get("gate", {}).get("open", True):
        raise PageLLMError(
            f"{out.path} ended at the gate: {CLOSED}\n"
            f"  To train all the same: {hints.another_run()}, or remove {out.path}"
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

    def step(self, step: int, r: Rollout, asked: Asked, out: Run) -> dict[str, Any]:
        """Rewards, advantages and all updates of one rollout -> what to log."""
        config = self.config
        label = asked.taught.item if asked.taught and config.w_hit else None
        r.terms = reward_terms(r, config.w_token, config.w_page, config.w_hit, label)
        if self.own is not None:
            r.terms["fn"] = config.w_fn * self.own(r.item, r.mask, asked.users)
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
        composer = None
        if config.reads_outcome:
            frozen = Policy(nets.ref, policy.vocab, policy.style)
            read = read_json(compose_dir / "config.json")["inputs"]  # without SFT: --policy none
            composer = Composer.load(compose_dir, shop, frozen if "sft" in read else None)
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
            nets.outcome = OutcomeReward.of(composer, prompts.users, seen, config.k)
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
        for step, asked in prefetch(out.steps(bar), total, prompts):
            began, busy = time.time(), time.process_time()
            with dist.unsharded(training.objective):
                r = roll_out(config, nets, asked)
            check_finite(r, step, training, out)
            r.sft = asked.taught.head(longest) if asked.taught and config.sft_coef else None
            row = training.step(step, r, asked, out) | page_row(r.item, categories)
            cpu = round(time.process_time() - busy, 4)
            if (step + 1) % config.eval_every == 0 or step + 1 == total:
                row |= training.validate(validation, step + 1)
                log_samples(out, step + 1, shop, shown(config, prompts, asked), r)
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
