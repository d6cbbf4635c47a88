"""Fit the reward model, which scores each slot and the page, to preference pairs (Eq. 5 to 8).

Reads   data/<dataset>, runs/<run>/sft
Writes  runs/<run>/reward   model.pt, pairs.parquet, log.jsonl; accuracy for each kind in `done`

    make reward             pagellm reward --dataset synthetic

About a minute for the synthetic shop on two CPU cores.
"""

import math
import sys
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pagellm.data.shop import load
from pagellm.model.networks import from_state
from pagellm.model.policy import Policy
from pagellm.model.prompts import pad_ids
from pagellm.model.reward_model import RewardModel, mean_reward
from pagellm.pages.pairs import KINDS, Pair, make_pairs, to_table
from pagellm.pages.stats import calibration, spearman
from pagellm.stage import dist, randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import atomic
from pagellm.stage.run import Run, TrainingConfig, file_id, finished, load_model_file
from pagellm.stage.train import (
    GuardedStep,
    Objective,
    batch_at,
    logged,
    lr_at,
    optimiser,
    prefetch,
    progress,
    set_lr,
    shared_means,
)

__all__ = [
    "Config",
    "PairBatch",
    "is_held_out",
    "page_loss",
    "pair_loss",
    "run",
    "score_pairs",
    "sequence_loss",
    "swapped",
    "token_loss",
]


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """Fit the two-headed reward model to preference pairs made from ratings."""

    source_run: str = ""  # run whose sft is read; empty: this run (studies share one)
    kinds: str = "preference,ranked,diversity,redundancy"  # kinds of pair to learn from,
    # comma-separated
    leave_out: str = ""  # a kind of pair kept out of training; the accuracy on it is still measured
    shuffle_labels: bool = False  # control experiment: swap better and worse page at random in all
    # pairs, held-out ones too. Accuracy must then be near 0.5; anything else means that labels leak
    compare: bool = True  # let the heads see how similar a slot's item is to those above it; off:
    # as in the paper
    per_kind: int = 10  # pairs of each kind that are tried for each user
    label_share: float = 0.5  # share of a user's train items that make the better page; the rest is
    # the prompt
    ranked_margin: float = 0.2  # smallest energy difference between the pages of a ranked pair;
    # smaller differences are within the noise of ratings
    literal_swaps: bool = False  # make diversity and redundancy pairs as the paper does, by
    # swapping slots; off: by replacing items
    soften: float = 0.5  # soft labels: the better page wins with probability sigma(energy
    # difference / soften), which keeps rewards on the scale of the energy; 0: hard labels
    held_out: float = 0.15  # share of users whose pairs are kept out of training, to measure
    # accuracy
    epochs: float = 1.0  # passes over the training pairs
    batch: int = 64  # pairs in a step
    lr: float = 2e-3  # peak learning rate
    warmup: int = 20  # steps of linear warm-up
    weight_decay: float = 0.01  # weight decay of the matrices (AdamW)
    lazy_rows: bool = False  # update user and item rows only in the steps that read them; saves
    # time in large catalogues
    grad_clip: float = 1.0  # largest gradient norm; inf: no limit
    page: float = 1.0  # weight of the page head's loss (Eq. 7)
    sequence: float = 1.0  # weight of the loss on a page's mean token reward (Eq. 8); preference
    # pairs do not count in it
    token: float = 0.5  # weight of the loss on the token rewards of edited slots; preference pairs
    # do not count in it
    shrink: float = 1e-3  # weight of the mean squared reward in the loss, which keeps rewards near
    # 0

    def __post_init__(self):
        super().__post_init__()
        kinds = self.kinds.split(",")
        check(
            self,
            kinds=(set(kinds) <= set(KINDS), f"some of {','.join(KINDS)}"),
            leave_out=(self.leave_out in ("", *kinds), f"empty or one of {self.kinds}"),
            per_kind=(self.per_kind > 0, "1 or more"),
            label_share=(0 < self.label_share < 1, "between 0 and 1"),
            ranked_margin=(self.ranked_margin >= 0, "0 or more"),
            soften=(self.soften >= 0, "0 or more"),
            held_out=(0 < self.held_out < 1, "between 0 and 1"),
            epochs=(self.epochs > 0, "above 0"),
            batch=(self.batch > 0, "1 or more"),
            lr=(self.lr > 0, "above 0"),
            **{
                w: (getattr(self, w) >= 0, "0 or more")
                for w in ("page", "sequence", "token", "shrink")
            },
        )


def page_loss(chosen: Tensor, rejected: Tensor, target: Tensor | None = None) -> Tensor:
    """Eq. 7 on page rewards: -mean(t log sigma(g+ - g-) + (1 - t) log sigma(g- - g+)).

    chosen, rejected  (B,) rewards g+ and g- of the two pages of every pair
    target            (B,) t, the probability that the chosen page is better; None: 1, as the paper
    returns a scalar, finite for any margin
    """
    margin = chosen - rejected
    if target is None:
        return -F.logsigmoid(margin).mean()
    return -(target * F.logsigmoid(margin) + (1 - target) * F.logsigmoid(-margin)).mean()


def sequence_loss(
    chosen: Tensor,
    chosen_mask: Tensor,
    rejected: Tensor,
    rejected_mask: Tensor,
    target: Tensor | None = None,
) -> Tensor:
    """Eq. 8: `page_loss` on R_f, the mean token reward of each page.

    chosen, rejected (B, T) token rewards with their masks (B, T) bool. The two T may differ.
    target as in page_loss. Returns a scalar. Raises ValueError on unequal shapes.
    """
    if (
        chosen.shape != chosen_mask.shape
        or rejected.shape != rejected_mask.shape
        or len(chosen) != len(rejected)
    ):
        raise ValueError(
            f"sequence_loss: chosen {tuple(chosen.shape)} mask {tuple(chosen_mask.shape)}, "
            f"rejected {tuple(rejected.shape)} mask {tuple(rejected_mask.shape)}: "
            "want (B, T) and its mask for both"
        )
    return page_loss(mean_reward(chosen, chosen_mask), mean_reward(rejected, rejected_mask), target)


def token_loss(chosen: Tensor, rejected: Tensor, edit_mask: Tensor) -> Tensor:
    """-(1/|M|) sum over t in M of log sigma(r_t+ - r_t-), M the slots where the two pages differ.

    Beside the paper's losses: it tells the token head which slots make one page the better one.

    chosen, rejected (B, T) token rewards; edit_mask (B, T) bool, True on M, over the whole batch
    Returns a scalar, 0 if M is empty. Raises ValueError on unequal shapes.
    """
    if not chosen.shape == rejected.shape == edit_mask.shape:
        raise ValueError(
            f"token_loss: chosen {tuple(chosen.shape)}, rejected {tuple(rejected.shape)}, "
            f"edit_mask {tuple(edit_mask.shape)}: want one (B, T) for all three"
        )
    margin = torch.where(edit_mask, chosen - rejected, 0.0)
    return -torch.where(edit_mask, F.logsigmoid(margin), 0.0).sum() / edit_mask.sum().clamp(min=1)


@dataclass
class PairBatch:
    """Pairs of pages as tensors."""

    prompt: Tensor  # (B, P)
    valid: Tensor  # (B, P) bool, False on padding
    chosen: Tensor  # (B, K) item ids of the better page, -1 past its end
    rejected: Tensor  # (B, K)
    mask: Tensor  # (B, K) bool, True on the slots of both pages
    edited: Tensor  # (B, K) bool, True where the pages differ
    detail: Tensor  # (n,) int64: the rows that are not preference pairs
    gap: Tensor  # (B,) E(chosen) - E(rejected), the difference of page energies


def tokens_of(pair: Pair) -> int:
    """Roughly how many tokens the prompt and one page of a pair have."""
    return 2 * len(pair.history) + len(pair.chosen)


def collate(pairs: list[Pair], policy: Policy, device) -> PairBatch:
    prompt, valid = policy.prompt(
        [p.user for p in pairs], [(p.history, p.history_rating) for p in pairs]
    )
    chosen, rejected, edited = (
        dist.send(torch.from_numpy(pad_ids(rows, fill)), device)
        for rows, fill in (
            ([p.chosen for p in pairs], -1),
            ([p.rejected for p in pairs], -1),
            ([p.mask for p in pairs], 0),
        )
    )
    edited = edited.bool()
    detail = dist.send(
        torch.tensor([i for i, p in enumerate(pairs) if p.kind != "preference"], dtype=torch.long),
        device,
    )
    gap = dist.send(torch.tensor([p.delta_E for p in pairs], dtype=torch.float32), device)
    return PairBatch(prompt, valid, chosen, rejected, chosen >= 0, edited, detail, gap)


def rewards_of(model: RewardModel, b: PairBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards of both pages of every pair, in one pass.

    returns token (B, K) of the chosen and of the rejected pages, then page (B,) of both
    """
    token, page = model(
        torch.cat([b.prompt, b.prompt]),
        torch.cat([b.valid, b.valid]),
        torch.cat([b.chosen, b.rejected]),
        torch.cat([b.mask, b.mask]),
    )
    n = len(b.prompt)
    return token[:n], token[n:], page[:n], page[n:]


def pair_loss(
    config: Config,
    b: PairBatch,
    token_chosen: Tensor,
    token_rejected: Tensor,
    page_chosen: Tensor,
    page_rejected: Tensor,
    busy: bool = True,
) -> Tensor:
    """The weighted sum of all losses, or this process's share of it (train.shared_means).

        page page_loss + sequence sequence_loss + token token_loss
        + shrink / 2 (mean of both pages' g^2 + mean of their slots' r^2)

    Labels are soft: sigma(gap / soften). Preference pairs teach the page head alone, since they do
    not say which slot is better.

    busy   False: this process holds a stand-in row, which counts nothing
    """
    target = torch.sigmoid(b.gap / config.soften) if config.soften else None
    d, slots = b.detail, b.mask.sum()
    terms: list[tuple[Tensor, Tensor | float]] = [
        (page_loss(page_chosen, page_rejected, target), len(b.gap)),
        (page_chosen.square().mean() + page_rejected.square().mean(), len(b.gap)),
        ((token_chosen.square().sum() + token_rejected.square().sum()) / slots.clamp(min=1), slots),
    ]
    weights = [config.page, 0.5 * config.shrink, 0.5 * config.shrink]
    if len(d):
        terms += [
            (
                sequence_loss(
                    token_chosen[d],
                    b.mask[d],
                    token_rejected[d],
                    b.mask[d],
                    None if target is None else target[d],
                ),
                len(d),
            ),
            (token_loss(token_chosen[d], token_rejected[d], b.edited[d]), b.edited[d].sum()),
        ]
    else:
        # No such pairs here; another process may have some, and all must add the same terms.
        terms += [(0.0 * token_chosen.sum(), 0)] * 2
    weights += [config.sequence, config.token]
    parts = [w * mean for w, mean in zip(weights, shared_means(terms, busy), strict=True)]
    return reduce(torch.add, parts)


def learn_pairs(
    learner: Objective, config: Config, b: PairBatch, busy: bool
) -> tuple[Tensor, Tensor]:
    """The loss, and how often the better page scores higher: this process's shares of both."""
    scores = rewards_of(learner.model, b)
    with torch.no_grad():
        right = scores[2] + mean_reward(scores[0], b.mask) > scores[3] + mean_reward(
            scores[1], b.mask
        )
    return pair_loss(config, b, *scores, busy), shared_means(
        [(right.float().mean(), len(right))], busy
    )[0]


@torch.no_grad()
def score_pairs(
    model: RewardModel, pairs: list[Pair], policy: Policy, batch: int = 256, rejected: bool = True
) -> dict[str, np.ndarray]:
    """ "page": page rewards, "token": mean token rewards; (n, 2) each, column 0 the chosen page.

    rejected   False: score the chosen pages only, (n, 1) each
    """
    mine, busy = dist.shard(np.arange(len(pairs)))
    some = [pairs[i] for i in mine]
    # Batches of like length need little padding.
    order = np.argsort([tokens_of(p) for p in some], kind="stable")
    found = [np.zeros((0, 2, 2 if rejected else 1))]
    for at, real in dist.pieces(order, batch, model.trunk.parts is not None):
        b = collate([some[i] for i in at], policy, model.token_mean.device)
        if rejected:
            *token, chosen, other = rewards_of(model, b)
            page = [chosen, other]
        else:
            token, page = ([x] for x in model(b.prompt, b.valid, b.chosen, b.mask))
        both = torch.stack(
            [torch.stack(page, 1), torch.stack([mean_reward(x, b.mask) for x in token], 1)], 1
        )
        if real and busy:
            found.append(both.cpu().double().numpy())
    scores = dist.gather(np.concatenate(found)[np.argsort(order) if busy else []])
    return {"page": scores[:, 0], "token": scores[:, 1]}


def report(model: RewardModel, pairs: list[Pair], policy: Policy) -> dict:
    """Accuracy for each kind of pair, calibration error, correlation with the page energy.

    Accuracies are of both heads' sum, and of each head alone.
    """
    if not pairs:
        return {}
    scores = score_pairs(model, pairs, policy)
    both = scores["page"] + scores["token"]
    kind = np.array([p.kind for p in pairs])
    delta = np.array([p.delta_E for p in pairs])
    out: dict = {"pairs": len(pairs)}
    for name in KINDS:
        rows = kind == name
        if rows.any():
            right = {
                head: (s[rows, 0] > s[rows, 1]) + 0.5 * (s[rows, 0] == s[rows, 1])
                for head, s in (
                    ("accuracy", both),
                    ("page_accuracy", scores["page"]),
                    ("token_accuracy", scores["token"]),
                )
            }
            out[name] = {head: round(float(r.mean()), 4) for head, r in right.items()} | {
                "pairs": int(rows.sum())
            }
    margin = both[:, 0] - both[:, 1]
    out["calibration_error"] = calibration(margin)
    out["energy_correlation"] = spearman(margin, delta)
    return out


def swapped(pair: Pair, seed: int) -> Pair:
    """The control: swap chosen and rejected for half of the pairs, drawn once.

    Held-out pairs are swapped as well. All pairs of a kind differ in the same way, so even a model
    that learnt nothing prefers one side of them: against true labels it would be right on nearly
    all pairs of a kind, or on nearly none.
    """
    if randomness.rng(seed, "reward", "shuffle", pair.seed).random() < 0.5:
        return pair
    return replace(pair, chosen=pair.rejected, rejected=pair.chosen)


def is_held_out(user: int, config: Config) -> bool:
    return (
        randomness.seed_of(config.seed, "reward", "held out", user) % 10_000
        < config.held_out * 10_000
    )


@torch.no_grad()
def centre(model: RewardModel, pairs: list[Pair], policy: Policy) -> None:
    """Shift both heads so that the better pages of these pairs score 0 on average."""
    scores = score_pairs(model, pairs, policy, rejected=False)
    model.page_mean += float(scores["page"][:, 0].mean())
    model.token_mean += float(scores["token"][:, 0].mean())


def split_pairs(config: Config, pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """-> the pairs to learn from, and those of held-out users."""
    held = [p for p in pairs if is_held_out(p.user, config)]
    train = [p for p in pairs if not is_held_out(p.user, config) and p.kind != config.leave_out]
    if config.shuffle_labels:
        held, train = ([swapped(p, config.seed) for p in some] for some in (held, train))
    if not train:
        raise PageLLMError(
            f"all {len(pairs)} pairs are held out; lower held_out or take more users"
        )
    return train, held


def new_model(config: Config, before: Path, device) -> RewardModel:
    """The SFT policy's trunk with two new heads."""
    randomness.seed_torch(config.seed, "reward", "heads")
    trunk = from_state(load_model_file(before / "model.pt"))
    model = RewardModel(trunk, config.compare).to(device)
    if trunk.gate is not None:
        nn.init.ones_(trunk.gate)  # the items of the page must be seen to be judged
    if trunk.blend is not None:
        with torch.no_grad():  # and the pooled history does not see them
            trunk.blend[0], trunk.blend[1] = 1.0, 0.0
    trunk.checkpoint_blocks = config.checkpoint_blocks
    return model


def run(config: Config) -> None:
    before = config.stage("sft", config.source_run)
    record = finished(before, "SFT policy", config.make("sft", config.source_run))
    shop = load(config.data_dir)
    inputs = {"data": file_id(config.data_dir / "source.json"), "sft": record["id"]}
    device = dist.start(config.device)
    with Run(config.stage("reward"), config, inputs) as out:
        if out.already_done():
            return
        policy = Policy.load(before, device)
        if dist.is_main():
            policy.vocab.save(out.path)
        pairs, counts = make_pairs(
            shop,
            config.seed,
            config.kinds.split(","),
            config.per_kind,
            config.label_share,
            ranked_margin=config.ranked_margin,
            literal_swaps=config.literal_swaps,
            progress=dist.is_main(),
        )
        if not pairs:
            raise PageLLMError(f"no pairs could be made from {config.data_dir}: {counts}")
        if dist.is_main():
            with atomic(out.path / "pairs.parquet") as beside:
                pq.write_table(to_table(pairs), beside)
        train, held = split_pairs(config, pairs)
        model = new_model(config, before, device)
        width, lengths = model.trunk.shape.n_embd, tuple(map(tokens_of, train))
        total = max(1, round(config.epochs * math.ceil(len(train) / config.batch)))
        learner = dist.wrap(objective := Objective(learn_pairs, model=model), config.parallel)
        opt = optimiser(model, config.lr, config.weight_decay, lazy=config.lazy_rows)
        guard = GuardedStep(opt, model.parameters(), config.grad_clip)
        model.trunk.bf16 = out.precision(config.precision, device, width) == "bfloat16"
        start = 0
        if state := out.load():
            start = state["step"]
            dist.load_weights(model, state["model"])
            dist.load_optimiser(model, opt, state["opt"])

        def state_at(step: int) -> dict:
            return {
                "step": step,
                "model": dist.weights(model, frozen=False),
                "opt": dist.optimiser_state(model, opt),
            }

        def kept(step: int, b: PairBatch) -> Path:
            return out.keep_for_replay(step, {**state_at(step), "batch": vars(b)})

        def batch(step: int) -> tuple[PairBatch, bool]:
            at = batch_at(step, len(train), config.batch, config.seed, "reward", length=lengths)
            mine, busy = dist.shard(at[1])
            return collate([train[i] for i in mine], policy, device), busy

        bar = progress(start, total, "reward")
        for step, (b, busy) in prefetch(out.steps(bar), total, batch):
            set_lr(opt, lr_at(step, total, config.lr, config.warmup))
            loss, right = learner(config, b, busy)
            loss.backward()
            norm = guard.step(
                f"reward step {step}",
                partial(kept, step, b),
            )
            loss, right = logged(loss, right)
            lr = opt.param_groups[0]["lr"]
            out.log(step + 1, loss=loss, accuracy=right, grad_norm=norm, lr=lr)
            shown = (out.last.get(name, math.nan) for name in ("loss", "accuracy"))
            bar.set_postfix_str("loss {:.3f}, accuracy {:.2f}".format(*shown), refresh=False)
            if out.due(step + 1, total):
                out.save(state_at(step + 1))
        model.eval()
        model.trunk.bf16 = False
        final = state_at(total)
        with dist.unsharded(objective):
            centre(model, train, policy)
            result = {"held_out": report(model, held, policy), "made": counts}
        out.finish(model.state(), final, **result)
        if dist.is_main():
            accuracy = ", ".join(
                f"{kind} {row['accuracy']:.3f}"
                for kind, row in result["held_out"].items()
                if kind in KINDS
            )
            print(f"reward: {out.path}, held-out accuracy {accuracy}")


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm reward"))
