"""What PPO needs before its first step: directories, networks, and the users of each step."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pagellm.data.shop import Shop
from pagellm.model.backbone import Backbone
from pagellm.model.composer import Composer
from pagellm.model.decode import share_prompts
from pagellm.model.networks import from_state
from pagellm.model.outcome_reward import OutcomeReward
from pagellm.model.page_loss import Batch, page_batch
from pagellm.model.policy import Policy
from pagellm.model.reward_fn import RewardFunction
from pagellm.model.reward_model import Critic, RewardModel
from pagellm.model.shortlist import Proposals
from pagellm.pages.truth import PageMaker
from pagellm.ppo_config import Config
from pagellm.stage import dist, randomness
from pagellm.stage.config import PageLLMError
from pagellm.stage.files import read_json
from pagellm.stage.run import file_id, finished, load_model_file
from pagellm.stage.train import batch_at

__all__ = ["StepInput", "Networks", "Prompts", "load_composer", "sources"]


def sources(config: Config) -> tuple[Path, Path, Path, dict[str, str]]:
    """The directories of SFT, reward and compose, and the ids of what is read of them.

    Raises PageLLMError where one that is needed is not finished, or does not fit the others.
    """
    sft_dir = config.stage("sft", config.source_run)
    reward_dir = config.stage("reward", config.reward_run or config.source_run)
    compose_dir = config.stage("compose", config.compose_run or config.source_run)
    sft = finished(sft_dir, "SFT policy", config.make("sft", config.source_run))
    inputs = {"data": file_id(config.data_dir / "source.json"), "sft": sft["id"]}
    if config.reward_fn:
        inputs["reward_fn"] = RewardFunction.load(config.reward_fn).source
    if config.reads_pairs:
        need = config.make("reward", config.reward_run or config.source_run)
        need += "\n  PPO needs one to score pages."
        judged = finished(reward_dir, "reward model", need)
        warn_of_weak_pairs(config, judged, reward_dir)
        inputs["reward"] = judged["id"]
    if config.reads_outcome:
        make = config.make("compose", config.compose_run or config.source_run)
        need = make + "\n  --item_reward outcome pays by it."
        inputs["compose"] = finished(compose_dir, "outcome model", need)["id"]
        read = read_json(compose_dir / "config.json")["inputs"]
        if "ppo" in read or read.get("sft", sft["id"]) != sft["id"]:
            raise PageLLMError(
                f"{compose_dir} was made for another policy than {sft_dir}: its chances are "
                "calibrated beside that one\n  Remove it and make it again with --policy sft: "
                + make
            )
    return sft_dir, reward_dir, compose_dir, inputs


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
        for network in (policy.model, ref, reward, critic):
            if network is not None:
                dist.cut(network, config.parallel)
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


def load_composer(config: Config, shop: Shop, nets: Networks, compose_dir: Path) -> Composer | None:
    """The outcome model of the stage compose, where it pays the slots."""
    if not config.reads_outcome:
        return None
    frozen = Policy(nets.ref, nets.policy.vocab, nets.policy.style)
    read = read_json(compose_dir / "config.json")["inputs"]  # without SFT: --policy none
    return Composer.load(compose_dir, shop, frozen if "sft" in read else None)


@dataclass
class StepInput:
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

    def drawn(self, step: int) -> np.ndarray:
        """The users of a step, (B,), in the order in which they were drawn."""
        return self.users[
            batch_at(step, len(self.users), self.per_step, self.config.seed, "ppo")[1]
        ]

    def visited(self, steps: int) -> np.ndarray:
        """The users of the first `steps` steps, rising."""
        if steps * self.per_step >= 2 * len(self.users):  # all of them, in whole epochs
            return self.users
        return np.unique(np.concatenate([self.drawn(step) for step in range(steps)]))

    def __call__(self, step: int) -> StepInput:
        config, seed, users = self.config, self.config.seed, self.drawn(step)
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
            return StepInput(
                users, taught.prompt, taught.valid, excluded, uniform, taught, proposed
            )
        prompt, valid = self.policy.prompt(users, [self.history.of(u) for u in users])
        excluded = dist.send(torch.from_numpy(self.seen.padded(users)), self.device)
        return StepInput(users, prompt, valid, excluded, uniform, taught, proposed)

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
