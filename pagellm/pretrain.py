"""Pre-training on the shop's data: next token (Eq. 3) on four kinds of prompt, ratings (Eq. 2).

Reads   data/<dataset>          the prepared shop, train rows only
Writes  runs/<run>/pretrain     model.pt, the vocabulary, log.jsonl

    make pretrain               pagellm pretrain --dataset synthetic

About a minute for the synthetic shop on two CPU cores.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pagellm.data.shop import Shop, load, source
from pagellm.kernels.logprob import linear_logp
from pagellm.model import gpt2, llama, lora, networks
from pagellm.model.backbone import Backbone
from pagellm.model.corpus import KINDS, Corpus, Tokens, texts
from pagellm.model.networks import SIZES, load_published, published_shape, to_state
from pagellm.model.policy import Policy, PromptStyle, Validation
from pagellm.model.prompts import Example, Prompts, right_pad
from pagellm.model.rows import als_rows, fit_rows, spectral_rows
from pagellm.model.sampled_softmax import Candidates, Proposal, sampled_logp
from pagellm.model.vocab import Vocab
from pagellm.model.weights import folder_of
from pagellm.stage import dist, randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.randomness import seed_torch
from pagellm.stage.run import Run, TrainingConfig, file_id
from pagellm.stage.train import (
    Best,
    GuardedStep,
    Objective,
    logged,
    lr_at,
    optimiser,
    prefetch,
    progress,
    seed_dropout,
    set_lr,
    shared_means,
)

__all__ = ["BUCKETS", "Config", "RatingHead", "next_token_loss", "run"]

# Split each batch by length into 4 sub-batches: padding falls from 55% to 20% of the tokens.
BUCKETS = 4


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """Pre-train the language model on the shop's items, reviews and purchases."""

    size: str = "auto"  # shape of the network: nano, tiny, mini, wide, wider, small,
    # gpt2, gpt2-medium, -large, -xl; Llama: llama-nano, -tiny, -mini, -small, llama-3.2-1b,
    # llama-3.2-3b; auto: that of the published weights, by their config.json; without them tiny
    weights: str = ""  # published weights of a GPT-2, Llama, Qwen2 or Qwen3: a directory (shards
    # too), a file or a name on the hub; empty: none
    bpe: str = ""  # tokeniser of the published weights: a tokenizer.json, or a directory with it or
    # with GPT-2's encoder.json and vocab.bpe; empty: the one beside the weights; without weights:
    # words learnt from the shop
    words: int = 2048  # words to learn when bpe is empty, at least 256
    times: int = 0  # number of periods into which the log is cut. A time token in each page prompt
    # then says which of them it is; 0: no time tokens
    rows: str = "spectral"  # start of user and item rows:
    # spectral (factors of the train matrix), als or random
    facts: float = 0.5  # spectral: weight of category and brand links against user links.
    # als: any value above 0 adds every category, brand and title word as a pseudo-user
    rated: bool = False  # als: learn from disliked items and from stars too; `facts` is then the
    # target of a category, brand or word (1: as good as a liked item)
    disliked: float = 0.35  # als with rated: target of a disliked item; a liked one has 1
    slope: float = 0.15  # als with rated: what every star above the average adds to the target
    alpha0: float = 0.01  # als: weight of a (user, item) pair that is not in the log; one in the
    # log has 1
    nu: float = 1.0  # als: exponent with which the penalty grows with the number of a user's or
    # item's rows; 0: the same penalty for all; 1: proportional (model/als.py)
    reg: float = 0.01  # als: size of the penalty on the factors (regularisation)
    row_scale: float = 0.1  # als: standard deviation of item rows; larger values make the first
    # pages more certain
    pool: bool = False  # begin as a network whose output is the mean of the history's item rows.
    # The mean is taken within a GPT-2 from scratch (gpt2.GPT2.pool), and beside the trunk of a
    # Llama or of published weights (backbone.Backbone.add_pool)
    steps: int = 240  # optimiser steps
    batch: int = 64  # examples of text or items in a step
    rating_batch: int = 128  # (user, item) pairs in a step whose rating is predicted
    max_tokens: int = 64  # longest example, in tokens; a longer one loses the end of its target
    lr: float = 2e-3  # peak learning rate
    row_lr: float = 1.0  # learning rate of rows (users, items, words, positions) as a share of lr
    warmup: int = 20  # steps of linear warm-up
    weight_decay: float = 0.01  # weight decay of the matrices (AdamW)
    dropout: float = 0.1  # dropout probability in embedding, attention and residual; a published
    # Llama or Qwen was trained without it and gets none
    lora_rank: int = 0  # rank of the adapters beside a frozen published trunk, in this and all
    # later stages; 0: no adapters, every weight learns
    lora_alpha: float = 16.0  # scale of the adapters: their output is multiplied by lora_alpha /
    # lora_rank
    lora_targets: str = "q,v"  # matrices of a block that get an adapter, comma-separated:
    # q,k,v,o,up,down; Llama also gate
    grad_clip: float = 1.0  # largest gradient norm; inf: no limit
    contents: float = 1.0  # weight of the text task "item -> title, brand, category, description"
    first_order: float = 1.0  # weight of the text task "user on item -> review"
    second_order: float = 1.0  # weight of the text task "category or brand <-> its items"
    interaction: float = 1.0  # weight of the text task "user -> items chosen"
    rating: float = 1.0  # weight of the rating loss beside the next-token loss
    sampled_items: int = 0  # items drawn for the softmax of a step, beside the items of the batch;
    # 0: the softmax is over all items, exactly
    lazy_rows: bool = False  # update user and item rows only in the steps that read them; saves
    # time in large catalogues
    use_review: bool = False  # show the review's text in the rating prompt. The model then learns
    # to read sentiment rather than the user's taste
    eval_every: int = 0  # steps between validations (NDCG@100 of one-shot pages after page
    # prompts); the weights of the best one are kept. 0: no validation, the last weights are kept
    eval_users: int = 500  # users in a validation; 0: all that have validation items
    patience: int = 0  # stop after so many validations in a row without a better one; 0: never

    PRESET_YIELDS: ClassVar[dict[str, tuple[str, ...]]] = {"weights": ("size",)}

    def __post_init__(self):
        super().__post_init__()
        if self.size == "auto" and not self.weights:
            object.__setattr__(self, "size", "tiny")  # what is recorded says what was built
        named = self.size in SIZES
        room = SIZES[self.size].n_ctx if named else math.inf
        check(
            self,
            size=(named or self.size == "auto", f"auto, or one of {', '.join(SIZES)}"),
            rows=(self.rows in ("spectral", "als", "random"), "spectral, als or random"),
            alpha0=(self.alpha0 > 0, "above 0"),
            reg=(self.reg > 0, "above 0"),
            disliked=(0 <= self.disliked <= 1, "0 to 1"),
            row_scale=(self.row_scale > 0, "above 0"),
            row_lr=(self.row_lr > 0, "above 0"),
            words=(self.words >= 256, "at least 256"),
            steps=(self.steps >= 0, "0 or more"),
            times=(self.times >= 0, "0 or more"),
            batch=(self.batch > 0, "1 or more"),
            rating_batch=(self.rating_batch > 0, "1 or more"),
            max_tokens=(
                16 <= self.max_tokens <= room,
                f"16 to {room}, the context of {self.size}" if named else "at least 16",
            ),
            lr=(self.lr > 0, "above 0"),
            lora_alpha=(self.lora_alpha > 0, "above 0"),
            lora_rank=(
                self.lora_rank >= 0 and (self.lora_rank == 0 or self.weights != ""),
                "0, or published weights beside it: adapters need a trunk that knows something",
            ),
            dropout=(0 <= self.dropout < 1, "0 or more, below 1"),
            patience=(
                self.patience == 0 or self.eval_every > 0,
                "0, or eval_every beside it: validations are what it counts",
            ),
            **{kind: (getattr(self, kind) >= 0, "0 or more") for kind in (*KINDS, "rating")},
        )
        known = gpt2.GPT2.TARGETS | llama.Llama.TARGETS
        if named:
            known = networks.trunk_of(SIZES[self.size]).TARGETS
        lora.parse_targets(self.lora_targets, known)


class RatingHead(nn.Module):
    """Eq. 2: r = 1 + 4 sigmoid(w.h + b), in stars; h is the state at the prompt's last token."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.out = nn.Linear(n_embd, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return 1.0 + 4.0 * torch.sigmoid(self.out(hidden)[..., 0])


def next_token_loss(
    model: Backbone,
    examples: list[Example],
    pad: int,
    n_words: int,
    draw: Callable[[Tensor], Candidates] | None = None,
    buckets: int = 1,
) -> Tensor:
    """Eq. 3: the mean of -log p over target tokens. Words compete with words, items with items.

    The state at t scores token t + 1.

    n_words   words in the softmax; special tokens come after them and stay out
    draw      target items -> a sample of items that stands for all in the softmax
              (sampled_softmax.py); None: all items
    buckets   the trunk reads the examples in so many parts, sorted by length, each padded to its
              own longest: less padding, the same loss
    """
    device, first = model.word.device, model.n_words + model.n_users
    order = np.argsort([len(e.ids) for e in examples], kind="stable")
    of_words, of_items, of_target, of_over = [], [], [], []
    for part in np.array_split(order, min(buckets, len(order))):
        ids = right_pad([examples[i].ids for i in part], pad)
        kept = right_pad([examples[i].mask for i in part], 0).numpy()[:, 1:] > 0
        # Find the positions that count on the CPU: asking a GPU for them would mean to wait.
        at = torch.from_numpy(np.flatnonzero(kept))
        here, at = dist.send(ids, device), dist.send(at, device)
        hidden = model(here, plain=True)
        of_words.append(hidden[:, :-1].flatten(0, 1)[at])
        if model.blend is not None:
            hidden = model.blended(hidden, here)
            of_items.append(hidden[:, :-1].flatten(0, 1)[at])
        of_target.append(ids[:, 1:].flatten()[at])
        of_over.append(np.repeat([examples[i].over == "items" for i in part], kept.sum(1)))
    states, target = torch.cat(of_words), torch.cat(of_target)
    of_history = torch.cat(of_items) if of_items else states
    over = np.concatenate(of_over)
    total = states.new_zeros((), dtype=torch.float32)
    scored = (model.word if model.word_out is None else model.word_out)[:n_words]
    for items, begin, chosen in ((False, 0, ~over), (True, first, over)):
        at = torch.from_numpy(np.flatnonzero(chosen))
        # Another process may have items here, and where rows are cut all must ask for them.
        parts = model.item_parts if items else None
        if not len(at) and parts is None:
            continue
        whose = of_history if items else states
        hidden, wanted = whose[dist.send(at, device)], dist.send(target[at] - begin, device)
        if items and draw:
            candidates = draw(wanted)
            logp = sampled_logp(hidden, model.item_rows(candidates[0]), candidates, wanted)
        else:
            rows = model.scored_items() if items else scored
            alone = linear_logp(hidden, rows, wanted, parts=parts)
            assert isinstance(alone, Tensor)  # no entropy was asked for
            logp = alone
        total = total - logp.sum()
    return total / max(len(target), 1)


def rating_rows(shop: Shop, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """User, item and stars (R,) of the rows of a split that have a rating."""
    keep = shop.rows(split, positive=None) & ~np.isnan(shop.rating)
    return shop.user[keep], shop.item[keep], shop.rating[keep]


def predict(
    model: Backbone, head: RatingHead, prompts: Prompts, users, items, reviews=None
) -> Tensor:
    """Predicted stars of (user, item) pairs: (R,) float32."""
    text = reviews or [""] * len(users)
    rows = [prompts.rating(int(u), int(i), t) for u, i, t in zip(users, items, text, strict=True)]
    ids = dist.send(right_pad(rows, prompts.vocab.pad), model.word.device)
    last = dist.send(torch.tensor([len(row) - 1 for row in rows]), ids.device)
    return head(model(ids)[torch.arange(len(rows), device=ids.device), last].float())


@torch.no_grad()
def rmse(
    model: Backbone, head: RatingHead, prompts: Prompts, rows, limit: int = 4096
) -> float | None:
    """Root mean squared error in stars over at most `limit` rows; None if there are none."""
    users, items, ratings = (column[:limit] for column in rows)
    if len(users) == 0:
        return None
    model.eval()
    error = torch.cat(
        [
            predict(model, head, prompts, users[i : i + 512], items[i : i + 512]).cpu()
            - torch.from_numpy(ratings[i : i + 512])
            for i in range(0, len(users), 512)
        ]
    )
    model.train()
    return float(error.square().mean().sqrt())


def pretrain_loss(
    both: Objective,
    prompts: Prompts,
    examples: list[Example],
    some_text: bool,
    rated: tuple | None,
    some_rated: bool,
    draw: Callable[[Tensor], Candidates] | None,
    buckets: int = 1,
) -> tuple[Tensor, Tensor]:
    """Eq. 3 and Eq. 2: this process's shares of the means over the batch (train.shared_means).

    rated       users, items, stars (R,) each, and their reviews or None; None: no rating loss
    some_text, some_rated   False: this process holds a stand-in row, which counts nothing
    buckets     as in next_token_loss; the same number on every process
    """
    vocab = prompts.vocab
    loss = next_token_loss(both.model, examples, vocab.pad, vocab.n_words, draw, buckets)
    if both.model.word_out is not None and dist.world() > 1:  # as dist.idle, in a step without text
        loss = loss + 0.0 * both.model.word_out.sum()
    (loss,) = shared_means([(loss, sum(sum(e.mask) for e in examples))], some_text)
    if rated is None:
        return loss, loss.new_zeros(()) + dist.idle(both.head)
    users, items, stars, reviews = rated
    error = F.mse_loss(predict(both.model, both.head, prompts, users, items, reviews), stars)
    return loss, shared_means([(error, len(stars))], some_rated)[0]


def build(config: Config, shop: Shop) -> tuple[Backbone, RatingHead, Vocab]:
    """The vocabulary and the network before its first step."""
    beside = folder_of(config.weights) if config.weights else None
    bpe = config.bpe or beside
    if bpe:
        vocab = Vocab.published(bpe, shop.n_users, shop.n_items, config.times)
    else:
        vocab = Vocab.train(texts(shop), shop.n_users, shop.n_items, config.words, config.times)
    size = config.size
    if size == "auto":
        size = published_shape(config.weights)
        say(f"{config.weights} is a {described(size)}")
        if config.max_tokens > size.n_ctx:
            say(f"examples are cut at {size.n_ctx} tokens, its context")
    seed_torch(config.seed, "pretrain", "start")
    n_words = vocab.n_words + vocab.n_specials
    shape = SIZES[size] if isinstance(size, str) else size
    bare = bool(config.weights) and networks.trunk_of(shape) is llama.Llama
    dropout = 0.0 if bare else config.dropout
    model = networks.build(size, n_words, shop.n_users, shop.n_items, dropout)
    model.without_dropout = bare
    if bare and config.dropout:
        say("the trunk was trained without dropout and gets none, here and in sft")
    model.checkpoint_blocks = config.checkpoint_blocks
    head = RatingHead(model.shape.n_embd)
    if config.rows != "random":
        users, items = (
            als_rows(
                shop,
                model.shape.n_embd,
                config.seed,
                config.facts,
                config.alpha0,
                config.reg,
                config.row_scale,
                (config.disliked, config.slope) if config.rated else None,
                config.nu,
            )
            if config.rows == "als"
            else spectral_rows(shop, model.shape.n_embd, config.seed, config.facts)
        )
        with torch.no_grad():
            model.user.copy_(users)
            model.item.copy_(items)
    if config.pool and isinstance(model, gpt2.GPT2) and not config.weights:
        model.pool()
    elif config.pool:
        model.add_pool()
    if config.weights:
        together = beside is not None and is_within(bpe, beside)
        if spare := load_published(model, config.weights, vocab.n_words, spare=together):
            say(f"{spare} word rows of {config.weights} have no word and were left out")
        fit_rows(model, vocab.n_words, config.seed, items=not config.pool)
    if config.lora_rank:
        lora.adapt(
            model, config.lora_rank, config.lora_alpha, config.lora_targets, vocab.n_specials
        )
    return model, head, vocab


def say(line: str) -> None:
    """Print what was decided for the user, once."""
    if dist.is_main():
        print(f"pretrain: {line}")


def described(shape) -> str:
    """A published shape in a few words."""
    kind = shape.kind if isinstance(shape, llama.Shape) else "gpt2"
    return (
        f"{kind}: {shape.n_layer} layers, {shape.n_embd} channels, {shape.n_head} heads "
        f"({shape.n_kv_head} of keys), a context of {shape.n_ctx}"
    )


def is_within(bpe: str | Path | None, folder: Path) -> bool:
    """Whether the words are those that lie beside the weights."""
    path = Path(bpe or "").resolve()
    return folder.resolve() in (path, path.parent)


class TextBatches:
    """The texts and the rated pairs of every step. A step depends on its number alone."""

    def __init__(self, config: Config, shop: Shop, corpus: Corpus, device):
        self.config, self.corpus, self.device = config, corpus, device
        self.weights = np.array(
            [getattr(config, kind) * (corpus.sizes[kind] > 0) for kind in KINDS]
        )
        if not self.weights.sum():
            raise PageLLMError(
                f"{config.data_dir} has nothing for the kinds of prompt that have a weight: "
                f"{corpus.sizes}"
            )
        self.users, self.items, self.ratings = rating_rows(shop, "train")
        self.rated = config.rating > 0 and len(self.users) > 0
        self.review_of = {}
        if config.use_review:
            user, item, text = shop.reviews()
            self.review_of = dict(zip(zip(user, item, strict=True), text, strict=True))
        self.proposal = Proposal(corpus.train.items, shop.n_items)

    def __call__(self, step: int) -> tuple[str, tuple]:
        """-> the kind of prompt, and what pretrain_loss takes after `prompts`."""
        config = self.config
        rng = randomness.rng(config.seed, "pretrain", step)
        kind = KINDS[rng.choice(len(KINDS), p=self.weights / self.weights.sum())]
        drawn = np.empty(config.batch, dtype=object)
        drawn[:] = [self.corpus.draw(kind, rng) for _ in range(config.batch)]
        examples, some_text = dist.shard(drawn)
        rated, some_rated = None, True
        if self.rated:
            rows, some_rated = dist.shard(rng.integers(len(self.users), size=config.rating_batch))
            users, items = self.users[rows], self.items[rows]
            reviews = None
            if self.review_of:
                reviews = [self.review_of.get(pair, "") for pair in zip(users, items, strict=True)]
            stars = dist.send(torch.from_numpy(self.ratings[rows]), self.device)
            rated = (users, items, stars, reviews)
        draw = None
        if config.sampled_items:
            rng = randomness.rng(config.seed, "pretrain", "items", step)
            draw = partial(self.proposal.draw, n=config.sampled_items, rng=rng)
        return kind, (examples.tolist(), some_text, rated, some_rated, draw)


def for_replay(batch: tuple) -> dict:
    """A batch as plain tensors and lists, for a file."""
    examples, _, rated, *_ = batch
    return {
        "examples": [[e.ids, e.mask, e.over] for e in examples],
        "rated": None if rated is None else [torch.as_tensor(x) for x in rated[:3]],
    }


def validated(
    validation: Validation, both: Objective, vocab: Vocab, best: Best, step: int
) -> dict[str, Any]:
    """Validate after page prompts; `best` keeps the best weights. Returns what to log."""
    with dist.unsharded(both):
        scores = validation(Policy(both.model, vocab, PromptStyle()))
    best.offer(scores["NDCG@100"], step, both)
    return {f"valid/{name}": value for name, value in scores.items()}


def run(config: Config) -> None:
    shop = load(config.data_dir)
    inputs = {"data": file_id(config.data_dir / "source.json")}
    device = dist.start(config.device)
    with Run(config.stage("pretrain"), config, inputs) as out:
        if out.already_done():
            return
        model, head, vocab = build(config, shop)
        if dist.is_main():
            vocab.save(out.path)
        # Counted from the whole batch: FSDP needs as many forward passes on every process.
        buckets = max(1, min(BUCKETS, config.batch // dist.world()))
        both = Objective(partial(pretrain_loss, buckets=buckets), model=model, head=head).to(device)
        prompts = Prompts(vocab, min(config.max_tokens, model.shape.n_ctx))
        ordered = source(config.data_dir)["config"].get("split") == "temporal"
        corpus = Corpus(shop, prompts, ordered=ordered, path=out.path / "tokens")
        batches = TextBatches(config, shop, corpus, device)
        learner = dist.wrap(both, config.parallel)
        opt = optimiser(
            both, config.lr, config.weight_decay, lazy=config.lazy_rows, row_lr=config.row_lr
        )
        guard = GuardedStep(opt, both.parameters(), config.grad_clip)

        start, best, validation = 0, Best(), None
        if config.eval_every:
            validation = Validation(shop, "valid", 20, "one_shot", config.eval_users, config.seed)

        if state := out.load():
            start, best = state["step"], Best(**state["best"]) if validation else best
            dist.load_weights(both, state["both"])
            dist.load_optimiser(both, opt, state["opt"])
        elif validation:  # the start itself takes part as step 0
            out.log(0, **validated(validation, both, vocab, best, 0))
        both.train()
        model.bf16 = out.precision(config.precision, device, model.shape.n_embd) == "bfloat16"

        def state_at(step: int) -> dict:
            return {
                "step": step,
                "both": dist.weights(both, frozen=False),
                "opt": dist.optimiser_state(both, opt),
                **({"best": best.state()} if validation else {}),
            }

        def kept(step: int, batch: tuple) -> Path:
            return out.keep_for_replay(step, {**state_at(step), **for_replay(batch)})

        stopped, bar = config.steps, progress(start, config.steps, "pretrain")
        for step, (kind, batch) in prefetch(out.steps(bar), config.steps, batches):
            seed_dropout(config.seed, "pretrain", step)
            set_lr(opt, lr_at(step, config.steps, config.lr, config.warmup))
            loss, rating_loss = learner(prompts, *batch)
            (loss + config.rating * rating_loss).backward()
            norm = guard.step(
                f"pretrain step {step}",
                partial(kept, step, batch),
            )
            loss, rating_loss = logged(loss, rating_loss)
            row: dict[str, Any] = {"loss": loss, "rating_loss": rating_loss, "grad_norm": norm}
            last = step + 1 == config.steps
            if validation and (last or (step + 1) % config.eval_every == 0):
                row |= validated(validation, both, vocab, best, step + 1)
            out.log(step + 1, kind=kind, **row, lr=opt.param_groups[0]["lr"])
            text = f"{kind} {out.last.get('loss', math.nan):.3f}"
            if batches.rated:
                text += f", rating {out.last.get('rating_loss', math.nan):.3f}"
            bar.set_postfix_str(text, refresh=False)
            if validation and best.stale(step + 1, config.eval_every, config.patience):
                stopped = step + 1
                break
            if out.due(step + 1, config.steps):
                out.save(state_at(step + 1))
        model.bf16 = False
        final = state_at(stopped)
        result = {"steps": stopped, "prompts": corpus.sizes, **lora.counts(model)}
        if validation:
            best.restore(both)
            result |= {"step": best.step, "valid_ndcg": best.score}
        if batches.rated:
            held = rating_rows(shop, "valid")
            with dist.unsharded(both):
                result["valid_rmse"] = rmse(model, head, prompts, held)
            result["valid_rmse_of_the_mean"] = (
                math.sqrt(np.mean((held[2] - batches.ratings.mean()) ** 2))
                if len(held[2])
                else None
            )
        dist.barrier()
        if dist.is_main():
            Tokens.remove(out.path / "tokens")
        weights = {**to_state(model), "rating_head": dist.weights(head)}
        out.finish(weights, final, **result)
        if dist.is_main():
            print(f"pretrain: {out.path} {result}")


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm pretrain"))
