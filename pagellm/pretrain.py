"""Pre-training on meta-information: next token (Eq. 3) on four kinds of prompt, and rating prediction (Eq. 2).

Reads   data/<dataset>                      the prepared shop, train rows only
Writes  runs/<run>/pretrain                 model.pt, the vocabulary, log.jsonl

    make pretrain                           python -m pagellm.pretrain --dataset synthetic

About a minute for the synthetic shop on two CPU cores.
"""

import math
import shutil
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.logprob import linear_logp
from pagellm import gpt2, lora, networks
from pagellm.als import als, facts_of, with_facts
from pagellm.backbone import Backbone
from pagellm.data.shop import Catalogue, Shop, load, source
from pagellm.networks import SIZES, load_published, to_state
from pagellm.prompts import Example, Prompts, right_pad
from pagellm.sampled import Candidates, Proposal, sampled_logp
from pagellm.stage import dist, randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import atomic
from pagellm.stage.randomness import seed_torch
from pagellm.stage.run import Run, TrainingConfig, file_id
from pagellm.stage.train import (
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
from pagellm.vocab import Vocab

__all__ = ["BUCKETS", "Config", "Corpus", "RatingHead", "next_token_loss", "run", "spectral_rows"]


KINDS = ("contents", "first_order", "second_order", "interaction")
BUCKETS = 4  # parts in which a batch is read: of 2.2 padded tokens a token, 1.25 remain


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """Pre-train the language model on what the shop knows about items, opinions and choices."""

    size: str = "tiny"  # shape of the network: nano, tiny, mini, wide, wider, small,
    # gpt2, gpt2-medium, -large, -xl; Llama: llama-nano, -tiny, -mini, -small, llama-3.2-1b,
    # llama-3.2-3b
    weights: str = ""  # published weights: a file, a directory (shards too) or a name on the hub;
    # empty: none
    bpe: str = ""  # the words published with them: a tokenizer.json, or a directory with it or with
    # GPT-2's encoder.json and vocab.bpe; empty: words learnt from the shop
    words: int = 2048  # words to learn when bpe is empty, at least 256
    times: int = 0  # time tokens: page prompts then show which of so many periods it is; 0: none
    rows: str = "spectral"  # start of user and item rows:
    # spectral (factors of the train matrix), als or random
    facts: float = 0.5  # weight of category and brand beside users in spectral rows; als:
    # above 0, they and the words of titles count as users of their items
    alpha0: float = 0.01  # als: weight of what nobody chose
    reg: float = 0.01  # als: regularisation
    row_scale: float = 0.1  # als: standard deviation of item rows;
    # more makes the first pages more certain
    pool: bool = False  # begin as the mean of the history's rows (gpt2.GPT2.pool)
    steps: int = 240  # optimiser steps
    batch: int = 64  # examples of text or items in a step
    rating_batch: int = 128  # (user, item) pairs in a step whose rating is predicted
    max_tokens: int = 64  # longest example; the end of an over-long target is cut
    lr: float = 2e-3  # peak learning rate
    row_lr: float = 1.0  # learning rate of rows (users, items, words, positions) as a share of lr
    warmup: int = 20  # steps of linear warm-up
    weight_decay: float = 0.01  # of the matrices
    dropout: float = 0.1  # in embedding, attention and residual
    lora_rank: int = 0  # rank of adapters beside a frozen published trunk, in all stages;
    # 0: everything learns
    lora_alpha: float = 16.0  # their scale is lora_alpha / lora_rank
    lora_targets: str = "q,v"  # which matrices of a block have one: q,k,v,o,up,down;
    # Llama also gate
    grad_clip: float = 1.0  # largest gradient norm; inf: no limit
    contents: float = 1.0  # weight of "item -> title, brand, category, description"
    first_order: float = 1.0  # weight of "user on item -> review"
    second_order: float = 1.0  # weight of "category or brand <-> its items"
    interaction: float = 1.0  # weight of "user -> items chosen"
    rating: float = 1.0  # weight of the rating loss beside the next-token loss
    sampled_items: int = 0  # items drawn for a step's softmax, beside the batch's own; 0:
    # all items, exactly
    lazy_rows: bool = False  # user and item rows move only in steps that read them;
    # for large catalogues
    use_review: bool = False  # show the review in the rating prompt; it then reads sentiment,
    # not taste

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            size=(self.size in SIZES, f"one of {', '.join(SIZES)}"),
            rows=(self.rows in ("spectral", "als", "random"), "spectral, als or random"),
            alpha0=(self.alpha0 > 0, "above 0"),
            reg=(self.reg > 0, "above 0"),
            row_scale=(self.row_scale > 0, "above 0"),
            row_lr=(self.row_lr > 0, "above 0"),
            pool=(
                not self.pool or (self.size in gpt2.SIZES and not self.weights),
                "off for Llama and for published weights",
            ),
            words=(self.words >= 256, "at least 256"),
            steps=(self.steps >= 0, "0 or more"),
            times=(self.times >= 0, "0 or more"),
            batch=(self.batch > 0, "1 or more"),
            rating_batch=(self.rating_batch > 0, "1 or more"),
            max_tokens=(
                16 <= self.max_tokens <= SIZES.get(self.size, SIZES["tiny"]).n_ctx,
                f"16 to {SIZES.get(self.size, SIZES['tiny']).n_ctx}, the context of {self.size}",
            ),
            lr=(self.lr > 0, "above 0"),
            lora_alpha=(self.lora_alpha > 0, "above 0"),
            lora_rank=(
                self.lora_rank >= 0 and (self.lora_rank == 0 or self.weights != ""),
                "0, or published weights beside it: adapters need a trunk that knows something",
            ),
            dropout=(0 <= self.dropout < 1, "0 or more, below 1"),
            **{kind: (getattr(self, kind) >= 0, "0 or more") for kind in (*KINDS, "rating")},
        )
        lora.parse_targets(self.lora_targets, networks.trunk_of(SIZES[self.size]).TARGETS)


def facts(c: Catalogue) -> Iterator[tuple[int, str, str]]:
    """(item, field, text) of all that the catalogue says."""
    for item in range(len(c)):
        for field, text in (
            ("title", c.title[item]),
            ("brand", c.brand[item]),
            ("category", ", ".join(c.categories[item])),
            ("description", c.description[item]),
        ):
            if text:
                yield item, field, text


def opinions(shop: Shop) -> Iterator[tuple[int, int, str]]:
    """(user, item, review) of the train rows that have one."""
    return ((user, item, text) for user, item, text in zip(*shop.reviews(), strict=True) if text)


def texts(shop: Shop) -> Iterator[str]:
    """Everything the words are learnt from."""
    yield from (text for _, _, text in facts(shop.catalogue))
    yield from (text for _, _, text in opinions(shop))
    yield from (
        f" {word}:" for word in ("title", "brand", "category", "description", "history", "rating")
    )


class Tokens:
    """Many texts as token ids in two files, which are mapped and not read: `ids` one after another, `start` of each."""

    def __init__(self, path: Path):
        self.ids, self.start = (
            np.load(path / f"{name}.npy", mmap_mode="r") for name in ("ids", "start")
        )

    def __getitem__(self, index: int) -> list[int]:
        return self.ids[self.start[index] : self.start[index + 1]].tolist()

    @staticmethod
    def write(path: Path, rows: Iterable[list[int]]) -> None:
        """`start` comes last: where it is, both are whole."""
        ids, start = array("i"), array("q", [0])
        for row in rows:
            ids.extend(row)
            start.append(len(ids))
        ids.append(0)  # an empty file cannot be mapped
        path.mkdir(parents=True, exist_ok=True)
        for name, values, kind in (("ids", ids, np.int32), ("start", start, np.int64)):
            with atomic(path / f"{name}.npy") as beside, open(beside, "wb") as file:
                # not np.save: on a full disk its error has no number
                table = np.frombuffer(values, kind)
                np.lib.format.write_array_header_1_0(
                    file, np.lib.format.header_data_from_array_1_0(table)
                )
                file.write(table.data)

    @staticmethod
    def remove(path: Path) -> None:
        (path / "start.npy").unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


class Corpus:
    """The four kinds of prompt over one shop; `draw` makes one example from (kind, generator).

    path   directory for the texts' tokens, read from there ever after; the main process fills it once
    """

    def __init__(self, shop: Shop, prompts: Prompts, ordered: bool, path: Path):
        self.shop, self.prompts, self.ordered = shop, prompts, ordered
        c = shop.catalogue
        said, heard = list(facts(c)), list(opinions(shop))
        if dist.is_main() and not (path / "start.npy").exists():
            Tokens.write(
                path, (prompts.tokens(text)[: prompts.room] for _, _, text in (*said, *heard))
            )
        dist.barrier()
        self.tokens = Tokens(path)
        self.facts = [(item, field) for item, field, _ in said]
        self.opinions = np.array([(user, item) for user, item, _ in heard], np.int64).reshape(-1, 2)
        groups: dict[tuple[str, str], list[int]] = {}
        for item in range(len(c)):
            for field, names in (("category", c.categories[item]), ("brand", (c.brand[item],))):
                for name in names:
                    if name:
                        groups.setdefault((field, name), []).append(item)
        self.groups = [
            (field, name, np.array(items))
            for (field, name), items in groups.items()
            if len(items) > 1
        ]
        self.train = shop.csr("train")
        self.choosers = np.flatnonzero(self.train.counts() > 1)
        self.sizes = {
            "contents": len(self.facts),
            "first_order": len(self.opinions),
            "second_order": len(self.groups),
            "interaction": len(self.choosers),
        }

    def draw(self, kind: str, rng: np.random.Generator) -> Example:
        index = int(rng.integers(self.sizes[kind]))
        if kind == "contents":
            return self.prompts.contents(*self.facts[index], self.tokens[index])
        if kind == "first_order":
            return self.prompts.first_order(
                *self.opinions[index].tolist(), self.tokens[len(self.facts) + index]
            )
        if kind == "second_order":
            field, name, items = self.groups[index]
            chunk = rng.permutation(items)[:32].tolist()
            backwards = rng.random() < 0.5
            return (
                self.prompts.second_order_reverse(field, name, chunk[:8])
                if backwards
                else self.prompts.second_order(field, name, chunk)
            )
        user = int(self.choosers[index])
        items, _ = self.train.of(user)
        return self.prompts.interaction(
            user, (items if self.ordered else rng.permutation(items)).tolist()
        )


class RatingHead(nn.Module):
    """Eq. 2: r = 1 + 4 sigmoid(w.h + b), h at the last token of the rating prompt. In stars."""

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
    """Eq. 3 as the mean over target tokens; words against words, items against items.

    The state at t scores token t + 1. `n_words` leaves the special tokens out of the word softmax. draw: target items
    -> the items that stand for all in the softmax (sampled.py); None: all do. buckets: the trunk reads the examples in
    so many parts of like length, each padded to its own longest: less to read, the same loss.
    """
    device, first = model.word.device, model.n_words + model.n_users
    order = np.argsort([len(e.ids) for e in examples], kind="stable")
    states, target, over = [], [], []
    for part in np.array_split(order, min(buckets, len(order))):
        ids = right_pad([examples[i].ids for i in part], pad)
        kept = right_pad([examples[i].mask for i in part], 0).numpy()[:, 1:] > 0
        # Which positions count is found on the host, which would have to wait for a GPU to tell.
        at = torch.from_numpy(np.flatnonzero(kept))
        states.append(model(dist.send(ids, device))[:, :-1].flatten(0, 1)[dist.send(at, device)])
        target.append(ids[:, 1:].flatten()[at])
        over.append(np.repeat([examples[i].over == "items" for i in part], kept.sum(1)))
    states, target, over = torch.cat(states), torch.cat(target), np.concatenate(over)
    total = states.new_zeros((), dtype=torch.float32)
    for rows, begin, chosen in ((model.word[:n_words], 0, ~over), (model.item, first, over)):
        at = torch.from_numpy(np.flatnonzero(chosen))
        if not len(at):
            continue
        hidden, wanted = states[dist.send(at, device)], dist.send(target[at] - begin, device)
        if rows is model.item and draw:
            candidates = draw(wanted)
            logp = sampled_logp(hidden, model.item_rows(candidates[0]), candidates, wanted)
        else:
            logp = linear_logp(hidden, rows, wanted)
        total = total - logp.sum()
    return total / max(len(target), 1)


def spectral_rows(shop: Shop, n_embd: int, seed: int, facts: float = 0.5) -> tuple[Tensor, Tensor]:
    """User and item rows from a truncated SVD of what the train rows and the catalogue link items to.

    Not in the paper. One sparse matrix: a row for every user, category and brand, a column for every item, each
    entry / sqrt(row count * column count), categories and brands times `facts`. Structure that second-order prompts
    would have to teach is there from the start. Scaled to GPT-2's 0.02; columns past the rank stay random.

    returns (U, n_embd), (N, n_embd) float32
    """
    c, train = shop.catalogue, shop.csr("train")
    leaf, brand = np.flatnonzero(c.leaf_id >= 0), np.flatnonzero(c.brand_id >= 0)
    links = [
        (np.repeat(np.arange(shop.n_users), train.counts()), train.items, 1.0),
        (c.leaf_id[leaf], leaf, facts),
        (c.brand_id[brand], brand, facts),
    ]
    rows, columns, values, first = [], [], [], 0
    for row, item, weight in links:
        n = int(row.max(initial=-1)) + 1 if rows else shop.n_users
        degree = (
            np.maximum(np.bincount(row, minlength=n), 1)[row]
            * np.maximum(np.bincount(item), 1)[item]
        )
        rows.append(row + first)
        columns.append(item)
        values.append(weight / np.sqrt(degree))
        first += n
    matrix = torch.sparse_coo_tensor(
        np.stack([np.concatenate(rows), np.concatenate(columns)]),
        torch.from_numpy(np.concatenate(values)).float(),
        (first, shop.n_items),
        check_invariants=True,
    ).coalesce()
    rank = min(n_embd, *matrix.shape)
    seed_torch(seed, "pretrain", "rows")
    u, s, v = torch.svd_lowrank(matrix, q=min(rank + 8, *matrix.shape), niter=4)
    users, items = torch.randn(shop.n_users, n_embd), torch.randn(shop.n_items, n_embd)
    for table, factor in ((users, u[: shop.n_users]), (items, v)):
        scaled = factor[:, :rank] * s[:rank].sqrt()
        table[:, :rank] = scaled / scaled.std().clamp(min=1e-12)
    return users * 0.02, items * 0.02


def als_rows(shop: Shop, n_embd: int, config: Config) -> tuple[Tensor, Tensor]:
    """User and item rows from implicit ALS (als.py) over the train rows and what the catalogue says.

    Not in the paper. With `facts` every category, brand and title word counts as one more user (als.facts_of): an
    item's row then also says what it is, and an item nobody bought has a row.

    returns (U, n_embd), (N, n_embd) float32, items with standard deviation row_scale; columns past the rank are 0
    """
    rows = shop.csr("train")
    rows = with_facts(rows, facts_of(shop.catalogue)) if config.facts > 0 else rows
    rank = min(n_embd, shop.n_items, len(rows.counts()))
    X, Y = als(
        rows, len(rows.counts()), shop.n_items, rank, config.alpha0, config.reg, 1.0, config.seed
    )
    scale = config.row_scale / Y.std().clamp(min=1e-12)
    return tuple(F.pad(factors * scale, (0, n_embd - rank)) for factors in (X[: shop.n_users], Y))


def rating_rows(shop: Shop, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    keep = shop.rows(split, positive=None) & ~np.isnan(shop.rating)
    return shop.user[keep], shop.item[keep], shop.rating[keep]


def predict(
    model: Backbone, head: RatingHead, prompts: Prompts, users, items, reviews=None
) -> Tensor:
    """Predicted stars of (user, item) pairs."""
    text = reviews or [""] * len(users)
    rows = [prompts.rating(int(u), int(i), t) for u, i, t in zip(users, items, text, strict=True)]
    ids = dist.send(right_pad(rows, prompts.vocab.pad), model.word.device)
    last = dist.send(torch.tensor([len(row) - 1 for row in rows]), ids.device)
    return head(model(ids)[torch.arange(len(rows), device=ids.device), last].float())


@torch.no_grad()
def rmse(
    model: Backbone, head: RatingHead, prompts: Prompts, rows, limit: int = 4096
) -> float | None:
    """Root mean squared error in stars over (at most `limit` of) these rows; None where there are none."""
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
    """Eq. 3 and Eq. 2 as this process's shares of the batch's means (train.shared_means).

    buckets as in next_token_loss, the same number on every process
    some_text, some_rated   False: the one row is a stand-in      rated   users, items, stars (R,), reviews or None
    """
    vocab = prompts.vocab
    loss = next_token_loss(both.model, examples, vocab.pad, vocab.n_words, draw, buckets)
    (loss,) = shared_means([(loss, sum(sum(e.mask) for e in examples))], some_text)
    if rated is None:
        return loss, loss.new_zeros(()) + dist.idle(both.head)
    users, items, stars, reviews = rated
    error = F.mse_loss(predict(both.model, both.head, prompts, users, items, reviews), stars)
    return loss, shared_means([(error, len(stars))], some_rated)[0]


def build(config: Config, shop: Shop) -> tuple[Backbone, RatingHead, Vocab]:
    """The vocabulary and the network before its first step."""
    if config.bpe:
        vocab = Vocab.published(config.bpe, shop.n_users, shop.n_items, config.times)
    else:
        vocab = Vocab.train(texts(shop), shop.n_users, shop.n_items, config.words, config.times)
    if config.weights and not config.bpe:
        raise PageLLMError(
            "published weights know their own words only: give --bpe <tokenizer.json or directory> with "
            "--weights"
        )
    seed_torch(config.seed, "pretrain", "start")
    model = networks.build(
        config.size, vocab.n_words + vocab.n_specials, shop.n_users, shop.n_items, config.dropout
    )
    model.checkpoint_blocks = config.checkpoint_blocks
    head = RatingHead(model.shape.n_embd)
    if config.rows != "random":
        users, items = (
            als_rows(shop, model.shape.n_embd, config)
            if config.rows == "als"
            else spectral_rows(shop, model.shape.n_embd, config.seed, config.facts)
        )
        with torch.no_grad():
            model.user.copy_(users)
            model.item.copy_(items)
    if config.pool:
        model.pool()
    if config.weights:
        load_published(model, config.weights, vocab.n_words)
    if config.lora_rank:
        lora.adapt(
            model, config.lora_rank, config.lora_alpha, config.lora_targets, vocab.n_specials
        )
    return model, head, vocab


def run(config: Config) -> None:
    shop = load(config.data_dir)
    inputs = {"data": file_id(config.data_dir / "source.json")}
    device = dist.start(config.device)
    with Run(config.stage("pretrain"), config, inputs) as out:
        if out.done:
            if dist.is_main():
                print(f"pretrain: already done in {out.path}")
            return
        model, head, vocab = build(config, shop)
        if dist.is_main():
            vocab.save(out.path)
        # From the whole batch: FSDP wants as many forward passes on every process.
        buckets = max(1, min(BUCKETS, config.batch // dist.world()))
        both = Objective(partial(pretrain_loss, buckets=buckets), model=model, head=head).to(device)
        prompts = Prompts(vocab, config.max_tokens)
        corpus = Corpus(
            shop,
            prompts,
            ordered=source(config.data_dir)["config"].get("split") == "temporal",
            path=out.path / "tokens",
        )
        weights = np.array([getattr(config, kind) * (corpus.sizes[kind] > 0) for kind in KINDS])
        if not weights.sum():
            raise PageLLMError(
                f"{config.data_dir} has nothing for the kinds of prompt that have a weight: "
                f"{corpus.sizes}"
            )
        users, items, ratings = rating_rows(shop, "train")
        text_of = (
            dict(zip(zip(*shop.reviews()[:2], strict=True), shop.reviews()[2], strict=True))
            if config.use_review
            else {}
        )
        with_rating = config.rating > 0 and len(users) > 0
        learner = dist.wrap(both, config.parallel)
        opt = optimiser(
            both, config.lr, config.weight_decay, lazy=config.lazy_rows, row_lr=config.row_lr
        )
        proposal = Proposal(corpus.train.items, shop.n_items)
        guard = GuardedStep(opt, both.parameters(), config.grad_clip)

        start = 0
        if state := out.load():
            start = state["step"]
            dist.load_weights(both, state["both"])
            dist.load_optimiser(both, opt, state["opt"])
        both.train()
        model.bf16 = out.precision(config.precision, device, model.shape.n_embd) == "bfloat16"

        def state_at(step: int) -> dict:
            return {
                "step": step,
                "both": dist.weights(both, frozen=False),
                "opt": dist.optimiser_state(both, opt),
            }

        def batch(step: int) -> tuple:
            rng = randomness.rng(config.seed, "pretrain", step)
            kind = KINDS[rng.choice(len(KINDS), p=weights / weights.sum())]
            drawn = np.empty(config.batch, dtype=object)
            drawn[:] = [corpus.draw(kind, rng) for _ in range(config.batch)]
            examples, some_text = dist.shard(drawn)
            rated, some_rated = None, True
            if with_rating:
                rows, some_rated = dist.shard(rng.integers(len(users), size=config.rating_batch))
                reviews = [text_of.get((users[r], items[r]), "") for r in rows] if text_of else None
                rated = (
                    users[rows],
                    items[rows],
                    dist.send(torch.from_numpy(ratings[rows]), device),
                    reviews,
                )
            return kind, examples.tolist(), some_text, rated, some_rated

        bar = progress(start, config.steps, "pretrain")
        for step, (kind, examples, some_text, rated, some_rated) in prefetch(
            out.steps(bar), config.steps, batch
        ):
            seed_dropout(config.seed, "pretrain", step)
            set_lr(opt, lr_at(step, config.steps, config.lr, config.warmup))
            draw = (
                partial(
                    proposal.draw,
                    n=config.sampled_items,
                    rng=randomness.rng(config.seed, "pretrain", "items", step),
                )
                if config.sampled_items
                else None
            )
            loss, rating_loss = learner(prompts, examples, some_text, rated, some_rated, draw)
            (loss + config.rating * rating_loss).backward()
            norm = guard.step(
                f"pretrain step {step}",
                lambda step=step, kept=examples, rows=rated: out.keep_for_replay(
                    step,
                    {
                        **state_at(step),
                        "examples": [[e.ids, e.mask, e.over] for e in kept],
                        "rated": None if rows is None else [torch.as_tensor(x) for x in rows[:3]],
                    },
                ),
            )
            loss, rating_loss = logged(loss, rating_loss)
            out.log(
                step + 1,
                kind=kind,
                loss=loss,
                rating_loss=rating_loss,
                grad_norm=norm,
                lr=opt.param_groups[0]["lr"],
            )
            shown = out.last.get("loss", math.nan), out.last.get("rating_loss", math.nan)
            bar.set_postfix_str(
                f"{kind} {shown[0]:.3f}" + (f", rating {shown[1]:.3f}" if with_rating else ""),
                refresh=False,
            )
            if out.due(step + 1, config.steps):
                out.save(state_at(step + 1))
        model.bf16 = False
        result = {"steps": config.steps, "prompts": corpus.sizes, **lora.counts(model)}
        if with_rating:
            held = rating_rows(shop, "valid")
            with dist.unsharded(both):
                result["valid_rmse"] = rmse(model, head, prompts, held)
            result["valid_rmse_of_the_mean"] = (
                math.sqrt(np.mean((held[2] - ratings.mean()) ** 2)) if len(held[2]) else None
            )
        dist.barrier()
        if dist.is_main():
            Tokens.remove(out.path / "tokens")
        out.finish(
            {**to_state(model), "rating_head": dist.weights(head)}, state_at(config.steps), **result
        )
        if dist.is_main():
            print(f"pretrain: {out.path} {result}")


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm.pretrain"))
