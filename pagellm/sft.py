"""Supervised fine-tuning: from the prompt of a user to the ground-truth page (Eq. 4).

Reads   data/<dataset>, runs/<run>/pretrain
Writes  runs/<run>/sft      model.pt of the step with the best validation NDCG@100, log.jsonl

    make sft                pagellm sft --dataset synthetic

About a minute for the synthetic shop on two CPU cores.
"""

import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pagellm.data.shop import Shop, load
from pagellm.model.backbone import Backbone
from pagellm.model.choice import choose_mode
from pagellm.model.facts import FACTS
from pagellm.model.judges import contents
from pagellm.model.networks import from_state
from pagellm.model.page_loss import Batch, draw_prefixes, page_batch, sft_loss
from pagellm.model.policy import MODES, Policy, PromptStyle, Validation
from pagellm.model.sampled_softmax import Proposal
from pagellm.model.value_loss import Feedback, value_loss
from pagellm.model.vocab import Vocab
from pagellm.pages.truth import PageMaker
from pagellm.stage import dist, randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.run import Run, TrainingConfig, file_id, finished, load_model_file
from pagellm.stage.train import (
    Best,
    GuardedStep,
    Objective,
    batch_at,
    logged,
    lr_at,
    optimiser,
    prefetch,
    progress,
    seed_dropout,
    set_lr,
    shared_means,
)

__all__ = ["Config", "run"]


OBJECTIVES = ("list", "multinomial", "both", "value")
CUTS = ("random", "time")
SELECT = ("ndcg", "last")


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """Teach the pre-trained model to write the ground-truth page after a user's history."""

    label_share: float = 0.5  # share of a user's train items that become the page;
    # the rest is the history
    label_share_max: float = 0.0  # if above label_share, the share is drawn between the two for
    # every example
    cut: str = "random"  # how a user's train items are split into prompt and page: random (by
    # label_share), or time (at a moment drawn anew for every example; what comes after it is the
    # page)
    fresh_split: bool = True  # draw the split into prompt and page anew in each epoch; off: one
    # split for all epochs
    objective: str = "both"  # loss: list (Eq. 4, slot by slot), multinomial (all labels from the
    # first slot's distribution), both (their sum), or value (what every item is worth in every
    # slot: liked, disliked and unpicked items, weighted by rating)
    own: float = 0.0  # share of pages that are learnt with the policy's own draws on the slots
    # above, instead of the labels (scheduled sampling)
    unpicked: int = 64  # objective=value: items drawn for each page that the user has not picked
    unpicked_weight: float = 0.2  # objective=value: weight of such an item in the loss; an item
    # with a middling rating weighs 1
    untie: bool = False  # score items against output rows of their own; off: against the rows that
    # stand for them in prompts
    id_dropout: float = 0.0  # share of item ids that one fallback row replaces in training. The
    # item's contents (title, categories, brand) are then added to every item row, so that items
    # without training rows can be read too; 0: no contents
    cold_rows: int = 0  # with id_dropout: items with at most so many train rows are read by their
    # contents alone
    start_run: str = ""  # run whose SFT weights training starts from; empty: this run's pre-trained
    # weights
    updated: bool = False  # start from the weights that `pagellm update` has written in this run
    fresh: float = 0.0  # with updated: share of each batch that is drawn from users who have rows
    # newer than the weights; the rest is drawn from the other users. 0: all users are equally
    # likely
    max_page: int = 40  # longest page learnt, in slots; further items of very active users are left
    # out
    shrink: float = 0.0  # pull an item's mean rating (s_i, which orders a page) towards the mean of
    # all items, with the weight of so many ratings; 0: not at all
    max_history: int = 24  # items of history in the prompt
    use_ratings: bool = True  # show the rating after each item of the history
    show: str = ""  # what prompts say of each item of the history beside it: some of category,
    # brand, price, with commas between them; empty: nothing
    use_user: bool = True  # show the user's own token; off: the token <user_unk> stands for every
    # user
    epochs: float = 15.0  # passes over the users; a fraction ends before everybody was seen; 0:
    # keep the pre-trained model as it is
    batch: int = 64  # users in a step
    lr: float = 2e-3  # peak learning rate
    warmup: int = 20  # steps of linear warm-up
    weight_decay: float = 0.05  # weight decay of the matrices (AdamW)
    row_decay: float = 0.0  # weight decay of user and item rows
    row_lr: float = 1.0  # learning rate of rows (users, items, words, positions) as a share of lr
    sampled_items: int = 0  # items drawn for the softmax of a step, beside the items of the batch;
    # 0: the softmax is over all items, exactly
    lazy_rows: bool = False  # update user and item rows only in the steps that read them; saves
    # time in large catalogues, together with sampled_items
    dropout: float = 0.1  # dropout probability in embedding, attention and residual; a published
    # Llama or Qwen was trained without it and gets none
    grad_clip: float = 1.0  # largest gradient norm; inf: no limit
    k: int = 20  # slots of a page in validation
    mode: str = "greedy"  # decoding in validation: greedy, beam, one_shot or hybrid
    eval_every: int = 60  # steps between validations
    eval_users: int = 500  # users in a validation; 0: all that have validation items
    patience: int = 0  # stop after so many validations in a row without a better one; 0: never
    select: str = "ndcg"  # which weights are kept: ndcg, those with the best validation; last, the
    # last ones, which needs no validation rows (prepare --refit)

    @property
    def facts(self) -> tuple[str, ...]:
        """Names of the facts in `show`."""
        return tuple(name.strip() for name in self.show.split(",") if name.strip())

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            show=(set(self.facts) <= set(FACTS), f"some of {','.join(FACTS)}"),
            label_share=(0 < self.label_share < 1, "between 0 and 1"),
            label_share_max=(0 <= self.label_share_max < 1, "0 or more, below 1"),
            own=(0 <= self.own <= 1, "from 0 to 1"),
            objective=(self.objective in OBJECTIVES, ", ".join(OBJECTIVES)),
            unpicked=(self.unpicked > 0, "1 or more"),
            unpicked_weight=(self.unpicked_weight >= 0, "0 or more"),
            id_dropout=(0 <= self.id_dropout < 1, "0 or more, below 1"),
            cold_rows=(self.cold_rows >= 0, "0 or more"),
            cut=(self.cut in CUTS, " or ".join(CUTS)),
            max_history=(self.max_history > 0, "1 or more"),
            start_run=(not (self.updated and self.start_run), "empty with updated"),
            fresh=(
                0 <= self.fresh <= 1 and (self.fresh == 0 or self.updated),
                "from 0 to 1, and 0 without updated",
            ),
            patience=(
                self.patience >= 0 and (self.patience == 0 or self.select == "ndcg"),
                "0 or more, and 0 with select=last, which asks no validation",
            ),
            batch=(self.batch > 0, "1 or more"),
            lr=(self.lr > 0, "above 0"),
            k=(self.k > 0, "1 or more"),
            dropout=(0 <= self.dropout < 1, "0 or more, below 1"),
            select=(self.select in SELECT, " or ".join(SELECT)),
            mode=(self.mode in MODES, ", ".join(MODES)),
            eval_every=(self.eval_every > 0, "1 or more"),
            eval_users=(self.eval_users >= 0, "0 or more"),
        )
        if self.objective == "value" and self.sampled_items:
            raise PageLLMError(
                "objective=value draws the items it compares (unpicked): leave sampled_items at 0"
            )


def batch_loss(learner: Objective, b: Batch, objective: str, busy: bool) -> Tensor:
    """This process's share of the mean of `sft_loss` over the batch (train.shared_means)."""
    if objective == "value":
        weight = (b.values.weight.sum(1) * b.mask.sum(1)).sum()
        return shared_means([(value_loss(learner.model, b, b.values), weight)], busy)[0]
    return shared_means([(sft_loss(learner.model, b, objective), b.mask.sum())], busy)[0]


class PageBatches:
    """The users of every step, their prompts and their ground-truth pages (Eq. 4).

    A step depends on its number alone. Each process makes its own share of the batch.
    """

    def __init__(self, config: Config, policy: Policy, maker: PageMaker, shop: Shop):
        self.config, self.policy, self.maker = config, policy, maker
        self.feedback: Feedback | None = None
        if config.objective == "value":
            self.feedback = Feedback(shop, config.unpicked, config.unpicked_weight)
        self.lengths = tuple(maker.train.counts()[maker.users].tolist())
        self.proposal = Proposal(maker.train.items, shop.n_items)
        self.total = steps_of(config, len(maker.users))
        # places in maker.users of those with new rows, and of the others, for --fresh
        self.parts: tuple[np.ndarray, ...] = ()

    def __call__(self, step: int) -> tuple[Batch, bool]:
        """-> the batch, and False if this process has no user and holds a stand-in."""
        config, users = self.config, self.maker.users
        epoch, index = self.drawn_users(step)
        mine, busy = dist.shard(users[index])
        splits = [(u, *draw(config, epoch, int(u))) for u in mine]
        when = None
        if config.cut == "time":
            cuts = [self.maker.later(u, rng, config.max_page) for u, _, rng in splits]
            examples, when = [cut[:2] for cut in cuts], np.array([cut[2] for cut in cuts])
        else:
            examples = [
                self.maker.example(u, share, rng, config.max_page) for u, share, rng in splits
            ]
        batch = page_batch(self.policy, mine, examples, when)
        if self.feedback is not None:
            rngs = [randomness.rng(config.seed, "sft", "pool", step, int(u)) for u in mine]
            pages = [page for _, page in examples]
            batch.values = self.feedback.draw(mine, pages, rngs, batch.item.device)
        if config.own:
            batch.draws = own_draws(config, step, mine, batch.item)
        if config.sampled_items:
            rng = randomness.rng(config.seed, "sft", "items", step)
            batch.candidates = self.proposal.draw(batch.item, config.sampled_items, rng)
        return batch, busy

    def mix(self, before: Path) -> None:
        """With --fresh: fill a share of every batch with the users whom an update has named."""
        if not self.config.fresh:
            return
        fresh = load_model_file(before / "model.pt")["fresh"].numpy()
        isin = np.isin(self.maker.users, fresh)
        parts = np.flatnonzero(isin), np.flatnonzero(~isin)
        self.parts = parts if all(len(part) for part in parts) else ()

    def drawn_users(self, step: int) -> tuple[int, np.ndarray]:
        """-> the epoch of a step, and the places of its users in maker.users."""
        config, n = self.config, len(self.maker.users)
        if not self.parts:
            return batch_at(step, n, config.batch, config.seed, "sft", length=self.lengths)
        new = min(config.batch, max(1, round(config.fresh * config.batch)))
        found = [
            (epoch, part[index])
            for part, size, name in zip(
                self.parts, (new, config.batch - new), ("fresh", "known"), strict=True
            )
            if size
            for epoch, index in [batch_at(step, len(part), size, config.seed, f"sft {name}")]
        ]
        return max(epoch for epoch, _ in found), np.concatenate([index for _, index in found])


def steps_of(config: Config, users: int) -> int:
    """Steps of a whole run over so many users."""
    steps = round(config.epochs * math.ceil(users / config.batch))
    return max(1, steps) if config.epochs else 0


def own_draws(config: Config, step: int, users: np.ndarray, item: Tensor) -> Tensor:
    """What the policy's own items and their labels are drawn by: Batch.draws, by user and step."""
    width = item.shape[1]
    out = np.full((len(users), 2, width), np.nan)
    for row, user in enumerate(users):
        rng = randomness.rng(config.seed, "sft", "own", step, int(user))
        if rng.random() < config.own:
            out[row] = rng.random((2, config.max_page))[:, :width]
    return torch.from_numpy(out).to(item.device)


def new_policy(config: Config, before: Path, maker: PageMaker, shop: Shop, device) -> Policy:
    """The pre-trained model as a policy. Raises PageLLMError where it cannot learn pages."""
    vocab = Vocab.load(before)
    if vocab.times and config.cut != "time":
        raise PageLLMError(
            "page prompts that show when (pretrain --times) learn from pages that come after their "
            "history: give --cut time"
        )
    if len(maker.users) == 0:
        raise PageLLMError(
            f"no user of {config.data_dir} has two train items: there is no page to learn"
        )
    state = load_model_file(before / "model.pt")
    model = from_state(state, config.dropout).to(device)
    model.checkpoint_blocks = config.checkpoint_blocks
    style = PromptStyle(
        config.max_history, config.use_ratings, config.use_user, maker.clock(vocab.times)
    )
    if config.updated:  # periods stay where they were, or their tokens would change their meaning
        style = PromptStyle(**state["style"])
    else:
        vocab.show(config.facts, shop.catalogue)
    policy = Policy(model, vocab, style)
    longest = max(1, int(maker.train.counts().max()))
    policy.check_room(max(config.k, min(longest, config.max_page)))
    return policy


def validation_of(config: Config, shop: Shop) -> Validation | None:
    """Pages of validation users; None where there are none and none are needed."""
    if config.select != "ndcg" and not shop.rows("valid").any():
        return None
    return Validation(shop, "valid", config.k, config.mode, config.eval_users, config.seed)


def start_of(config: Config) -> tuple[Path, dict[str, str]]:
    """The directory of the weights that SFT begins with, and the ids of what is read."""
    stage = "update" if config.updated else "sft" if config.start_run else "pretrain"
    before = config.stage(stage, config.start_run)
    need = {"update": "updated rows", "sft": "SFT policy", "pretrain": "pre-trained model"}[stage]
    record = finished(before, need, config.make(stage, config.start_run))
    return before, {"data": file_id(config.data_dir / "source.json"), stage: record["id"]}


def widened(config: Config, model: Backbone, shop: Shop) -> Backbone:
    """The model, with output rows of their own and contents beside ids where options ask for it."""
    if config.untie and model.item_out is None:
        model.untie()
    if config.id_dropout:
        known = np.bincount(shop.item[shop.rows("train", None)], minlength=shop.n_items)
        content = torch.from_numpy(contents(shop.catalogue, seed=config.seed))
        # An update has given every new item a row.
        cold = torch.from_numpy((known <= config.cold_rows) & (not config.updated))
        model.fuse(content.to(model.item.device), cold.to(model.item.device), config.id_dropout)
    return model


def run(config: Config) -> None:
    before, inputs = start_of(config)
    shop = load(config.data_dir)
    validation = validation_of(config, shop)
    device = dist.start(config.device)
    with Run(config.stage("sft"), config, inputs) as out:
        if out.already_done():
            return
        maker = PageMaker(shop, config.shrink)
        policy = new_policy(config, before, maker, shop, device)
        model = widened(config, policy.model, shop)
        if dist.is_main():
            policy.vocab.save(out.path)
        batches = PageBatches(config, policy, maker, shop)
        batches.mix(before)
        stopped = total = batches.total
        learner = dist.wrap(objective := Objective(batch_loss, model=model), config.parallel)
        opt = optimiser(
            model,
            config.lr,
            config.weight_decay,
            config.row_decay,
            lazy=config.lazy_rows,
            row_lr=config.row_lr,
        )
        guard = GuardedStep(opt, model.parameters(), config.grad_clip)
        model.bf16 = out.precision(config.precision, device, model.shape.n_embd) == "bfloat16"

        def validate(validation: Validation, step: int) -> dict[str, Any]:
            with dist.unsharded(objective):
                scores = validation(policy)
            if config.select == "ndcg" or step == 0:
                best.offer(scores["NDCG@100"], step, model)
            return {f"valid/{name}": value for name, value in scores.items()}

        def state_at(step: int) -> dict:
            return {
                "step": step,
                "model": dist.weights(model, frozen=False),
                "best": best.state(),
                "opt": dist.optimiser_state(model, opt),
            }

        def kept(step: int, b: Batch) -> Path:
            return out.keep_for_replay(step, {**state_at(step), "batch": b.state()})

        start, best = 0, Best()
        if state := out.load():
            start, best = state["step"], Best(**state["best"])
            dist.load_weights(model, state["model"])
            dist.load_optimiser(model, opt, state["opt"])
        elif validation:  # the start itself takes part as step 0
            out.log(0, **validate(validation, 0))

        bar = progress(start, total, "sft")
        for step, (b, busy) in prefetch(out.steps(bar), total, batches):
            began = time.time()
            model.train()
            seed_dropout(config.seed, "sft", step)
            set_lr(opt, lr_at(step, total, config.lr, config.warmup))
            loss = learner(drawn(objective, model, b), config.objective, busy)
            loss.backward()
            norm = guard.step(
                f"sft step {step}",
                partial(kept, step, b),
            )
            row: dict[str, Any] = {
                "loss": logged(loss)[0],
                "grad_norm": norm,
                "lr": opt.param_groups[0]["lr"],
            }
            out.log(step + 1, "timing", seconds=round(time.time() - began, 4))
            last = step + 1 == total
            if validation and (last or (step + 1) % config.eval_every == 0):
                row |= validate(validation, step + 1)
            if last and config.select == "last":
                best.keep(row.get("valid/NDCG@100"), total, model)
            out.log(step + 1, **row)
            loss_now = out.last.get("loss", math.nan)
            bar.set_postfix_str(f"loss {loss_now:.3f}, {said(best)}", refresh=False)
            if best.stale(step + 1, config.eval_every, config.patience):
                stopped = step + 1
                break
            if out.due(step + 1, total):
                out.save(state_at(step + 1))
        if total == 0 and not validation:
            best.keep(None, 0, model)
        final = state_at(stopped)
        best.restore(model)
        model.bake()
        out.finish(
            policy.state(),
            final,
            decoding=chosen(objective, policy, shop, config.k),
            step=best.step,
            steps=stopped,
            valid_ndcg=best.score,
            single_level=maker.single_level_share(config.label_share, config.seed),
        )
        print_end(out, best, stopped)


def print_end(out: Run, best: Best, stopped: int) -> None:
    """The last line on the screen, by the main process."""
    if dist.is_main():
        print(f"sft: {out.path}, step {best.step} of {stopped}, {said(best)}")


def drawn(objective: Objective, model: Backbone, b: Batch) -> Batch:
    """The batch; where it has draws, the policy's own items stand above its slots."""
    if b.draws is not None:
        with dist.unsharded(objective):
            b.prefix = draw_prefixes(model, b)
    return b


def chosen(objective: Objective, policy: Policy, shop: Shop, k: int) -> dict:
    """What `choose_mode` says of the policy, with the whole model at hand."""
    with dist.unsharded(objective):
        return choose_mode(policy, shop, k)


def said(best: Best) -> str:
    """What validation says of the best weights so far."""
    if best.score is None or best.score == -math.inf:
        return "no validation rows"
    return f"validation NDCG@100 {best.score:.4f}"


def draw(config: Config, epoch: int, user: int) -> tuple[float, np.random.Generator]:
    """Label share and generator of one user's split in one epoch."""
    rng = randomness.rng(config.seed, "sft", "split", epoch if config.fresh_split else 0, user)
    share = config.label_share
    if config.label_share_max > share:
        share = rng.uniform(share, config.label_share_max)
    return share, rng


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm sft"))
