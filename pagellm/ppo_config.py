"""The options of PPO and their checks: `pagellm ppo --help` prints them."""

from dataclasses import dataclass

from pagellm.model.policy import MODES
from pagellm.model.reward_fn import check_name
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.run import TrainingConfig

__all__ = ["Config"]

GROUPED = ("rloo", "grpo", "dr_grpo")  # these compare the pages of one user
ALGOS = ("ppo", "reinforce", *GROUPED, "expert")
# Options that are read by a critic alone, and by an algorithm that draws pages.
OF_CRITIC = ("vf_coef", "value_clip", "critic_lr", "critic_warmup", "gamma", "lam")
OF_DRAWS = ("clip", "max_kl", "kl_coef", "kl_target", "samples", "relevance_gate", "reward_fn")


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """Train the SFT policy by PPO on the reward model, with a KL penalty to the SFT policy."""

    source_run: str = ""  # run whose sft is read; empty: this run (studies share one)
    reward_run: str = ""  # run whose reward model is read; empty: the same as source_run
    item_reward: str = "pairs"  # what a slot is paid: pairs, by the token head of the reward model;
    # or outcome, by the probability of a pick that the stage compose learnt
    compose_run: str = ""  # run whose outcome model is read; empty: the same as source_run
    gate_users: int = 1000  # validation users of the gate, the check before training; 0: all
    gate_pages: int = 16  # pages that the gate draws for each of its users
    force: bool = False  # train even if the gate is closed, that is if the reward predicts
    # validation hits no better than SFT's own logits do
    algo: str = "ppo"  # ppo; reinforce (Eq. 11 minus the batch mean); rloo, grpo or dr_grpo (a page
    # against the user's other pages); expert (likelihood of maximised pages)
    draw: str = "auto"  # how pages are drawn: slots, one slot after another; one_shot, all from the
    # first slot's distribution, without a critic; auto: slots for ppo and reinforce, else one_shot
    epochs: float = 1.5  # passes over the users (the paper: 5)
    min_steps: int = 45  # at least this many steps, however few the users
    rollout: int = 64  # pages sampled in a step, all processes together
    samples: int = 1  # pages of one user in a rollout; rloo, grpo and dr_grpo need 2 or more
    minibatch: int = 64  # pages in one optimiser update; divides rollout
    micro: int = 64  # pages in one forward pass on one device: a smaller number needs less memory
    # and gives the same gradient
    inner_epochs: int = 4  # passes over a rollout; 1 makes reinforce exactly Eq. 11
    k: int = 20  # slots of a page
    candidates: int = 0  # items of a user's shortlist, fixed before each rollout: pages are drawn
    # from it and every log-probability is over it; 0: all items. For large catalogues
    lazy_rows: bool = False  # update user and item rows only in steps that read them; saves time in
    # large catalogues
    temperature: float = 0.3  # divides the logits, in sampling and in every log-probability; a low
    # one keeps sampled pages near the greedy page that is shown
    lr: float = 2e-4  # peak learning rate of the policy, linear to 0 (the paper:
    # 1e-5 at 124M parameters)
    row_lr: float = 1.0  # learning rate of rows (users, items, words, positions) as a share of lr
    critic_lr: float = 3e-4  # peak learning rate of the critic, linear to 0
    clip: float = 0.2  # the ratio of new to old probability is clipped to 1 - clip .. 1 + clip
    # (epsilon of arXiv 1707.06347, Eq. 7)
    value_clip: float = 0.2  # how far a new value may leave the old one, in normalised reward
    vf_coef: float = 0.1  # weight of the critic's loss in the total loss
    entropy_coef: float = 0.0  # weight of the policy's entropy, in nats a slot; above 0 keeps pages
    # varied
    gamma: float = 1.0  # discount of rewards from slot to slot; 1: a page is judged whole
    lam: float = 0.95  # lambda of GAE: 1 trusts the rewards alone, 0 the critic's next value
    kl_coef: float = 0.1  # price of one nat of KL to the SFT policy, per slot, in normalised reward
    kl_target: float = 0.0  # KL to the SFT policy, in nats a page, that kl_coef is steered towards
    # (Ziegler et al. 2019); 0: kl_coef stays as it is
    kl_horizon: float = 10000.0  # pages over which kl_coef moves to reach kl_target
    reward_fn: str = ""  # a reward function of your own, module:function, beside what is learnt
    # (pagellm/model/reward_fn.py). With w_token and w_page 0 no reward model is needed
    w_fn: float = 1.0  # weight of reward_fn
    w_token: float = 1.0  # weight of the page's mean token reward; 0: the page reward alone
    w_page: float = 1.0  # weight of the page reward; 0: the token rewards alone
    w_hit: float = 0.0  # weight of the page's NDCG on train items that its prompt hides (0 to 1);
    # no learnt model is involved
    sft_coef: float = 0.0  # weight of SFT's loss on the users of a rollout, in nats per slot; above
    # 0 keeps the policy near the pages that SFT learnt
    relevance_gate: int = 0  # items outside SFT's best so many for the user earn no token reward
    # above 0; 0: every item earns its reward
    label_share: float = 0.2  # share of a user's train items that w_hit and sft_coef hide from the
    # prompt
    max_page: int = 40  # slots of the longest page that SFT's loss reads
    critic_warmup: int = 20  # critic updates before the policy's first
    max_kl: float = 0.03  # stop the inner epochs of a step once the new policy is further than this
    # from the one that drew the pages (estimator k3, nats a slot)
    grad_clip: float = 1.0  # largest gradient norm, policy and critic apart
    eval_every: int = 10  # steps between validations
    eval_users: int = 500  # users in a validation; 0: all that have validation items
    patience: int = 0  # stop after so many validations in a row without a better one; 0: never
    mode: str = "greedy"  # decoding in validation: greedy, beam, one_shot or hybrid
    select: str = "energy"  # validation score that decides the weights kept: energy, ndcg or last
    min_accuracy: float = 0.9  # warn of a kind of pair that the reward model orders rightly less
    # often than this, on held-out pairs (0 to 1)
    strict: bool = False  # stop at any alarm

    def __post_init__(self):
        super().__post_init__()
        positive = (
            "epochs rollout samples minibatch micro inner_epochs k max_page temperature lr "
            "critic_lr grad_clip max_kl value_clip eval_every kl_horizon gate_pages"
        )
        check(
            self,
            **{name: (getattr(self, name) > 0, "above 0") for name in positive.split()},
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
        self.check_unread()
        if self.w_token == self.w_page == self.w_hit == 0 and not (self.reward_fn and self.w_fn):
            raise PageLLMError("w_token, w_page and w_hit are all 0: nothing to optimise")
        if self.item_reward == "outcome" and self.w_hit > 0:
            raise PageLLMError(
                "w_hit pays for train items, and the outcome model has learnt from them: take "
                "--w_hit 0 with --item_reward outcome, or --item_reward pairs"
            )

    def check_unread(self) -> None:
        """Raises PageLLMError for an option that was changed and that `algo` does not read."""
        unread: tuple[str, ...] = OF_CRITIC if self.once else ()
        why, other = "it has no critic", "--algo ppo"
        if self.algo == "expert":
            unread = (*OF_CRITIC, *OF_DRAWS)
            why = "it learns the pages that maximise the outcome reward, and draws none"
            other += " --item_reward pairs --w_page 1, which the reward model of pairs pays"
        default = self.__dataclass_fields__
        if changed := [name for name in unread if getattr(self, name) != default[name].default]:
            plain = " ".join(f"--{name}={default[name].default}" for name in changed)
            raise PageLLMError(
                f"algo={self.algo} does not read {', '.join(changed)}: {why}\n"
                f"  Leave it out (where a preset says it: {plain}), or take PPO itself: {other}"
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
