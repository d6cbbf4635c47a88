"""Time every hot path beside a plain version of it, or beside another library (a peer).

    make bench                          python -m experiments.cost.bench [--only row] [--quick]

    train         one step of AdamW, every position scored
                      peer: transformers' GPT2LMHeadModel
    train-page    one step of AdamW, page positions scored against item rows
                      peer: the same, with masked labels
    pretrain      the loss of 64 texts, in buckets of similar length
                      plain: all padded to the longest
    rollout       pages of 20 different items, 2 for each user
                      peer: transformers' generate with a logits processor
    rollout-8     the same, 8 for each user
    evaluate      top 100 of a catalogue, and every metric
                      plain: one user after another
    top           the ranking of `evaluate` alone
                      floor: matrix product and topk
    reviews-2018  review lines to Parquet, checked and cleaned; also -2014 and -2023
                      plain: json.loads, line by line
    orjson-2018   the same
                      peer: orjson.loads, line by line
    histories     identifiers to dense ids, rows ordered by user and time
                      plain: dicts and lists
    tokens        texts to tokens
                      plain: the tokeniser, text by text

A row shows the median times of both versions, which take turns, and their ratio; the floor, if
there is one; the peak memory of both beyond their inputs; and the largest difference between the
results: absolute for losses and scores, 0 if lists, tables and tokens are equal. One line of JSON
follows. The kernels have a bench of their own: python -m kernels.bench.

    python -m experiments.cost.bench --profile
        the time of each part of train, train-page and evaluate
    python -m experiments.cost.bench --base <commit>
        both benches here and at another commit, by turns; exit code 2 if one of our times became
        longer than its noise explains

Rows with a peer need the extra [dev]; without it they are left out and named. Compare ratios within
one run only.
"""

import contextlib
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from experiments.cost.bench_prepare import Config as Lines
from experiments.cost.bench_prepare import write_reviews
from experiments.cost.marks import CLOCKS, borders, measure_parts, parts_table, unmarked
from pagellm.data import amazon, records, text_store
from pagellm.data.shop import Rows
from pagellm.kernels.bench import machine, milliseconds, peak_megabytes
from pagellm.kernels.logprob import linear_logp
from pagellm.model.decode import LegalItems, greedy, page_logp, sample, shared_start, slot_states
from pagellm.model.gpt2 import GPT2, SIZES, Shape
from pagellm.model.prompts import Example
from pagellm.model.vocab import Vocab
from pagellm.pages import metrics
from pagellm.pages.ranked import rank_all
from pagellm.pretrain import BUCKETS, next_token_loss
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.dist import pick_device
from pagellm.stage.train import optimiser

__all__ = ["Case", "Config", "cases", "compare", "measure", "profile", "run"]


REVIEWS = tuple(
    f"{peer}-{spelling}" for spelling in ("2014", "2018", "2023") for peer in ("reviews", "orjson")
)
ROWS = (
    "train",
    "train-page",
    "pretrain",
    "rollout",
    "rollout-8",
    "evaluate",
    "top",
    *REVIEWS,
    "histories",
    "tokens",
)
PARTED = ("train", "train-page", "evaluate")  # rows whose code has marks, for --profile
BENCHES = (  # the benches of a commit: modules, the newest path first
    ("kernels.bench",),
    ("experiments.cost.bench", "experiments.bench"),
)
HEADER = (
    "row",
    "shape",
    "plain ms",
    "ours ms",
    "x",
    "floor ms",
    "share",
    "plain MB",
    "ours MB",
    "|diff|",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Time every hot path beside a plain version or a peer."""

    only: str = ""  # rows to time, comma-separated; empty: all
    size: str = "gpt2"  # network of the training rows: one of gpt2.SIZES; gpt2 has 124M parameters
    quick: bool = False  # tiny shapes: only shows that everything runs
    device: str = "cpu"  # cpu or cuda, for the rows that train, write pages or rank
    repeats: int = 3  # timed runs of each version
    profile: bool = False  # print the time of each part of train, train-page and evaluate instead
    clock: str = "wall"  # clock of the profile: wall, or cpu (processor time, for a busy machine)
    base: str = ""  # commit to compare with; empty: none
    slack: float = 0.1  # a row counts as slower if its time exceeds the base's by more than this
    # share, and by more than its noise

    def __post_init__(self):
        check(
            self,
            only=(
                set(filter(None, self.only.split(","))) <= set(ROWS),
                f"some of {','.join(ROWS)}",
            ),
            size=(self.size in SIZES, f"one of {', '.join(SIZES)}"),
            repeats=(self.repeats >= 1, "1 or more"),
            slack=(self.slack >= 0, "0 or more"),
            base=(not (self.base and self.profile), "empty with --profile"),
            clock=(
                self.clock in (CLOCKS if self.profile else ("wall",)),
                "wall, or with --profile cpu",
            ),
        )
        if self.profile and not set(self.rows) & set(PARTED):
            raise PageLLMError(
                f"profile: {self.only} has no marks inside; want some of {','.join(PARTED)}"
            )

    @property
    def rows(self) -> tuple[str, ...]:
        return tuple(self.only.split(",")) if self.only else ROWS


@dataclass(frozen=True)
class Case:
    """One row of the bench.

    plain, ours  the two versions; in the rows of PARTED they take an optional `mark` (marks.py)
    floor        what no version can do without, such as one matrix product; None: not timed
    differ       (result of plain, result of ours) -> largest difference
    scale        the size of ours' input over that of plain's: plain's time is multiplied by it
                 (its memory is not)
    close        called at the end, e.g. to remove files
    """

    name: str
    shape: str
    plain: Callable[..., Any]
    ours: Callable[..., Any]
    differ: Callable[[Any, Any], float]
    floor: Callable[[], Any] | None = None
    scale: float = 1.0
    close: Callable[[], None] = field(default=lambda: None)


def measure(case: Case, device: str, repeats: int) -> dict:
    """Time a case and return its row. The versions take turns, so that other work slows all."""
    difference = float(case.differ(case.plain(), case.ours()))
    times: dict[str, list[float]] = {"plain": [], "ours": [], "floor": []}
    for _ in range(repeats):
        for name, spent in times.items():
            if function := getattr(case, name):
                spent.append(milliseconds(function, device))
    plain, ours = statistics.median(times["plain"]) * case.scale, statistics.median(times["ours"])
    floor = statistics.median(times["floor"]) if times["floor"] else None
    return {
        "row": case.name,
        "shape": case.shape,
        "plain_ms": plain,
        "ours_ms": ours,
        "x": plain / ours,
        "floor_ms": floor,
        "share": floor and floor / ours,
        "max_diff": difference,
        "plain_mb": peak_megabytes(case.plain, device),
        "ours_mb": peak_megabytes(case.ours, device),
    }


def gpt2_peer(shape: Shape, rows: int, device: torch.device, **options):
    """transformers' GPT-2 of this shape with a vocabulary of `rows`; options as in GPT2Config."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=rows,
        n_positions=shape.n_ctx,
        n_embd=shape.n_embd,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        **options,
    )
    return GPT2LMHeadModel(config).to(device)


def train_case(config: Config, page_only: bool) -> Case:
    """A training step on 4 pages of 20 slots after prompts of 64 tokens; one vocabulary for all."""
    device, generator = torch.device(config.device), torch.Generator().manual_seed(0)
    shape = SIZES["nano" if config.quick else config.size]
    words, items, B, P, K = (500, 200, 2, 16, 5) if config.quick else (50_257, 12_000, 4, 64, 20)
    torch.manual_seed(0)
    peer = gpt2_peer(
        shape,
        words + items,
        device,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        tie_word_embeddings=True,
    )
    ours = GPT2(shape, words, 0, items, dropout=0.0).to(device)
    copy_weights(peer, ours)
    ids = torch.randint(0, words, (B, P + K), generator=generator)
    ids[:, P:] = words + torch.stack(
        [torch.randperm(items, generator=generator)[:K] for _ in range(B)]
    )
    ids = ids.to(device)
    label = ids.clone()
    if page_only:
        label[:, :P] = -100
    page, mask = ids[:, P:] - words, torch.ones(B, K, dtype=torch.bool, device=device)
    valid, none = (
        torch.ones(B, P, dtype=torch.bool, device=device),
        torch.full((B, 1), -1, device=device),
    )

    def our_loss(mark: Callable) -> torch.Tensor:
        if page_only:
            states = slot_states(ours, ids[:, :P], valid, page, mask)
            logp = page_logp(states, ours.item, page, mask, none)
            assert isinstance(logp, torch.Tensor)  # nothing beside it was asked for
            return -logp.mean()
        hidden = ours(ids)[:, :-1].flatten(0, 1)
        rows = torch.cat([ours.word, ours.item])
        mark("word and item rows joined")
        logp = linear_logp(hidden, rows, ids[:, 1:].flatten())
        assert isinstance(logp, torch.Tensor)
        return -logp.mean()

    def peer_loss(mark: Callable) -> torch.Tensor:
        if not page_only:
            return peer(input_ids=ids, labels=label).loss
        # The same loss as our page loss: items only, and no item twice on a page.
        logits = peer(input_ids=ids).logits[:, P - 1 : -1].float()
        legal = torch.ones_like(logits, dtype=torch.bool)
        legal[..., :words] = False
        for slot in range(1, K):
            legal[:, slot].scatter_(1, ids[:, P : P + slot], False)
        return F.cross_entropy(
            logits.masked_fill(~legal, -torch.inf).flatten(0, 1), ids[:, P:].flatten()
        )

    def stepper(
        model: torch.nn.Module, trunk: torch.nn.Module, loss_of: Callable
    ) -> Callable[..., torch.Tensor]:
        opt = optimiser(model, lr=1e-5)

        def step(mark: Callable = unmarked) -> torch.Tensor:
            hooks = [] if mark is unmarked else borders(trunk, mark)
            loss = loss_of(mark)
            mark("softmax, forward")
            loss.backward()
            mark("rows, gradient")
            opt.step()
            mark("AdamW")
            opt.zero_grad(set_to_none=True)
            for hook in hooks:
                hook.remove()
            return loss.detach()

        return step

    plain, mine = stepper(peer, peer.transformer, peer_loss), stepper(ours, ours, our_loss)
    size = sum(p.numel() for p in ours.parameters()) / 1e6
    return Case(
        "train-page" if page_only else "train",
        f"{B} x {P + K}, {size:.0f}M",
        plain,
        mine,
        lambda a, b: abs(float(a) - float(b)),
    )


def pretrain_case(config: Config) -> Case:
    """The loss of 64 texts and its gradients: many short ones and few long, as titles and
    descriptions are."""
    rng, words = np.random.default_rng(0), 300 if config.quick else 8_000
    model = GPT2(SIZES["nano" if config.quick else "wide"], words, 0, 1, dropout=0.0).to(
        config.device
    )
    length = np.sort(np.clip(4 + rng.exponential(20, size=64), None, 64).astype(int))
    texts = [
        Example(rng.integers(words, size=n).tolist(), [False] * 2 + [True] * (n - 2), "words")
        for n in length
    ]

    def loss(buckets: int) -> torch.Tensor:
        model.zero_grad()
        nats = next_token_loss(model, texts, 0, words, buckets=buckets)
        nats.backward()
        return nats.detach()

    return Case(
        "pretrain",
        f"64 texts, {length.mean():.0f} of {length.max()} tokens",
        partial(loss, 1),
        partial(loss, BUCKETS),
        lambda a, b: abs(float(a) - float(b)),
    )


@torch.no_grad()
def copy_weights(peer, ours: GPT2) -> None:
    """Copy our weights into transformers' model.

    Its linear layers hold (in, out); its vocabulary is our words, users and items, in this order.
    """
    for name, weight in ours.named_parameters():
        if name.startswith(("h.", "ln_f.")):
            other = peer.transformer.get_parameter(name)
            other.copy_(
                weight.T
                if weight.shape != other.shape
                or name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
                else weight
            )
    peer.transformer.wpe.weight.copy_(ours.wpe)
    peer.transformer.wte.weight.copy_(torch.cat([ours.word, ours.user, ours.item]))


def rollout_case(config: Config, name: str, G: int) -> Case:
    """G sampled pages of 20 different items for each of 32 users; greedy pages must be equal."""
    from transformers import LogitsProcessor, LogitsProcessorList

    device, generator = torch.device(config.device), torch.Generator().manual_seed(0)
    words, items, B, P, K = (100, 60, 3, 8, 5) if config.quick else (2_057, 12_000, 32, 48, 20)
    shape = SIZES["nano" if config.quick else "mini"]
    ours = GPT2(shape, words, 0, items, dropout=0.0).to(device).eval()
    peer = gpt2_peer(
        shape, words + items, device, bos_token_id=None, eos_token_id=None, pad_token_id=0
    ).eval()
    with torch.no_grad():
        ours.item.normal_(0, 0.3, generator=torch.Generator(device).manual_seed(1))
    copy_weights(peer, ours)
    ids = torch.randint(0, words + items, (B, P), generator=generator).to(device)
    length = torch.randint(P // 2, P + 1, (B, 1), generator=generator).to(device)
    valid = torch.arange(P, device=device) >= P - length
    excluded = torch.randint(0, items, (B, P // 2), generator=generator).to(device)

    class Distinct(LogitsProcessor):
        """Allows items only, none of the history, and none twice."""

        def __init__(self, copies: int):
            self.gone = torch.zeros(B * copies, words + items, dtype=torch.bool, device=device)
            self.gone[:, :words] = True
            self.gone.scatter_(1, words + excluded.repeat_interleave(copies, 0), True)

        def __call__(self, input_ids, scores):
            placed = input_ids[:, P:]
            return scores.masked_fill(self.gone.scatter(1, placed, True), -torch.inf)

    def generate(copies: int, **options) -> torch.Tensor:
        out = peer.generate(
            input_ids=ids,
            attention_mask=valid.long(),
            max_new_tokens=K,
            min_new_tokens=K,
            logits_processor=LogitsProcessorList([Distinct(copies)]),
            pad_token_id=0,
            **options,
        )
        return out[:, P:] - words

    def ours_greedy() -> torch.Tensor:
        return greedy(ours, ids, valid, LegalItems(excluded, items), K).item

    group = torch.arange(B, device=device).repeat_interleave(G)
    uniform = torch.rand(B * G, K, dtype=torch.float64, generator=generator).to(device)

    def write() -> torch.Tensor:
        start = shared_start(ours, ids, valid, K, group)
        return sample(
            ours, ids[group], valid[group], LegalItems(excluded[group], items), uniform, start=start
        ).item

    def differ(theirs: torch.Tensor, mine: torch.Tensor) -> float:
        """Number of slots in which greedy pages differ. Checks that sampled pages are legal."""
        for pages in (theirs, mine):
            assert all(len(set(page)) == K for page in pages.tolist()), "a page holds an item twice"
            assert not (pages[:, :, None] == excluded[group][:, None]).any(), (
                "a page holds an item of the history"
            )
        return float((generate(1, do_sample=False) != ours_greedy()).sum())

    return Case(
        name,
        f"{B} users x {G}, K {K}, N {items}",
        lambda: generate(G, do_sample=True, top_k=0, num_return_sequences=G),
        write,
        differ,
    )


@dataclass(frozen=True)
class Ranking:
    """A shop to rank: factors of users and items, seen and held-out items, categories."""

    user: torch.Tensor  # (U, C)
    item: torch.Tensor  # (N, C)
    seen: Rows
    refs: tuple  # (user, item, rank), as metrics.score_pages wants them
    categories: list


def make_ranking(U: int, N: int) -> Ranking:
    rng = np.random.default_rng(0)
    picked = np.stack([rng.permutation(N)[:20] for _ in range(U)])  # 15 seen, 5 held out
    seen = Rows(
        np.arange(0, 15 * U + 1, 15), picked[:, :15].reshape(-1), np.full(15 * U, 5.0, np.float32)
    )
    refs = np.repeat(np.arange(U), 5), picked[:, 15:].reshape(-1), np.tile(np.arange(1.0, 6.0), U)
    names = [f"category {n}" for n in range(60)]
    categories = [
        tuple(rng.choice(names, size=rng.integers(1, 4), replace=False)) for _ in range(N)
    ]
    generator = torch.Generator().manual_seed(0)
    return Ranking(
        torch.randn(U, 64, generator=generator),
        torch.randn(N, 64, generator=generator),
        seen,
        refs,
        categories,
    )


def evaluate_case(config: Config) -> Iterator[Case]:
    """The rows `evaluate` and `top`. The plain version is timed on a tenth of the users."""
    U, N = (60, 300) if config.quick else (4_000, 12_000)
    some = U // 10
    r = make_ranking(U, N)
    users = np.arange(U)

    def rank(mark: Callable = unmarked, **options):
        def score(rows: np.ndarray) -> torch.Tensor:
            mark("top 100")
            product = r.user[rows] @ r.item.T
            mark("product")
            return product

        ranked = rank_all(score, users, r.seen, 20, 100, **options)
        mark("top 100")
        return ranked

    def ours(mark: Callable = unmarked) -> dict[str, np.ndarray]:
        ranked = rank(mark)
        place = np.broadcast_to(np.arange(1, ranked.item.shape[1] + 1), ranked.item.shape)
        kept = ranked.item >= 0
        user = np.broadcast_to(users[:, None], kept.shape)
        scores = metrics.score_pages(
            users, (user[kept], place[kept], ranked.item[kept]), r.refs, r.categories
        )
        mark("hits and metrics")
        return scores

    def plain(mark: Callable = unmarked) -> dict[str, list]:
        scores: dict[str, list] = {}
        score_of = r.user[:some].numpy() @ r.item.T.numpy()
        mark("product")
        for u in range(some):
            score = score_of[u].copy()
            score[r.seen.of(u)[0]] = -np.inf
            top = np.argsort(-score, kind="stable")[:100].tolist()
            mark("top 100")
            ref, page = r.refs[1][5 * u : 5 * u + 5].tolist(), top[:20]
            row = {
                "Recall@20": metrics.recall(ref, top, 20),
                "Recall@40": metrics.recall(ref, top, 40),
                "NDCG@100": metrics.ndcg(ref, top, 100),
                "WAS": metrics.was(ref, page),
                "PWKT": metrics.pwkt(ref, page),
                "WMRD": metrics.wmrd(ref, page),
                "DPA": metrics.dpa(ref, page),
                "ILD": metrics.ild(page, r.categories),
                "entropy": metrics.entropy(page, r.categories),
                "redundancy": metrics.redundancy(page, r.categories, 60),
                "duplicate_rate": metrics.duplicate_rate(page),
                "unknown_rate": metrics.unknown_rate(page, r.categories),
            }
            for name, value in row.items():
                scores.setdefault(name, []).append(math.nan if value is None else value)
            mark("hits and metrics")
        return scores

    def differ(a: dict, b: dict) -> float:
        return max(
            float(np.nanmax(np.abs(np.array(a[name]) - b[name][:some]), initial=0.0)) for name in a
        )

    def floor(block: int = 512) -> list:
        return [
            (r.user[at : at + block] @ r.item.T).topk(min(100, N), dim=1)
            for at in range(0, U, block)
        ]

    if "evaluate" in config.rows:
        yield Case(
            "evaluate", f"{U} users x {N}, top 100", plain, ours, differ, floor, scale=U / some
        )
    if "top" in config.rows:

        def lists_differ(a, b) -> float:
            return float(np.abs(np.sort(a.score, 1) - np.sort(b.score, 1)).max())

        yield Case(
            "top", f"{U} users x {N}, top 100", lambda: rank(block=U), rank, lists_differ, floor
        )


def reviews_case(config: Config, spelling: str, loads: Callable) -> Case:
    """Review lines to Parquet. plain reads line by line with `loads`; the checks are the same."""
    lines = 1_000 if config.quick else 30_000
    folder = Path(tempfile.mkdtemp())
    raw = folder / "reviews.json"
    write_reviews(raw, Lines(lines=lines, spelling=spelling))

    def to_parquet(name: str, tables: Callable) -> Path:
        tally = records.Tally()
        with pq.ParquetWriter(folder / name, records.COLUMNS, compression="lz4") as writer:
            for table in tables(tally):
                writer.write_table(table)
        assert tally.kept == lines, tally.counts()
        return folder / name

    quick = partial(amazon.review_table, spelling=spelling)
    return Case(
        f"{'orjson' if loads is not json.loads else 'reviews'}-{spelling}",
        f"{lines} lines, {raw.stat().st_size / 1e6:.0f} MB",
        lambda: to_parquet(
            "plain",
            lambda tally: records.batched(
                records.parsed(raw, lambda text: amazon.as_review(loads(text)), tally)
            ),
        ),
        lambda: to_parquet(
            "ours", lambda tally: records.parsed_batches(raw, amazon.parse_review, quick, tally)
        ),
        lambda a, b: float(not pq.read_table(a).equals(pq.read_table(b))),
        close=lambda: shutil.rmtree(folder),
    )


def histories_case(config: Config) -> Case:
    """Rows of (user, item, time) -> dense ids in the identifiers' order, rows by user and time."""
    R = 2_000 if config.quick else 1_000_000
    draw = random.Random(0)
    user = [f"A{int(R / 10 * draw.random() ** 1.5):012d}" for _ in range(R)]
    item = [f"B{int(R / 50 * draw.random() ** 2):09d}" for _ in range(R)]
    time = [86_400 * draw.randint(12_000, 17_700) for _ in range(R)]
    columns = pa.array(user), pa.array(item), pa.array(time)

    def plain() -> list:
        user_id, item_id = (
            {name: n for n, name in enumerate(sorted(set(names)))} for names in (user, item)
        )
        rows: dict[int, list] = {}
        for u, i, t in zip(user, item, time, strict=True):
            rows.setdefault(user_id[u], []).append((t, item_id[i]))
        return [sorted(rows[u]) for u in range(len(rows))]

    def ours() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        dense = []
        for names in columns[:2]:
            column = text_store.Names()
            column.add(names)
            dense.append(column.ranked()[1])
        order = text_store.by_time(dense[0], columns[2].to_numpy(), dense[1])
        return dense[0][order], columns[2].to_numpy()[order], dense[1][order]

    def differ(lists: list, arrays: tuple) -> float:
        flat = [(u, t, i) for u, row in enumerate(lists) for t, i in row]
        return float((np.array(flat) != np.stack(arrays, 1)).any(1).sum())

    return Case("histories", f"{R} rows", plain, ours, differ)


def tokens_case(config: Config) -> Case:
    """Texts of 5 to 40 random words -> tokens."""
    draw = random.Random(0)
    stems = [
        "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9)))
        for _ in range(5_000)
    ]
    popular = [stems[int(len(stems) * draw.random() ** 3)] for _ in range(200_000)]
    at = iter(popular * 3)
    texts = [
        " ".join(next(at) for _ in range(draw.randint(5, 40))).capitalize()
        + draw.choice(". ! ?".split())
        for _ in range(200 if config.quick else 20_000)
    ]
    vocab = Vocab.train(texts[:2_000], 1, 1, 300 if config.quick else 8_000)

    def ours() -> list[list[int]]:
        return [fresh.words(text) for fresh in [Vocab(vocab.tokenizer, 1, 1)] for text in texts]

    return Case(
        "tokens",
        f"{len(texts)} texts",
        lambda: [vocab.tokenizer.encode(text).ids for text in texts],
        ours,
        lambda a, b: float(sum(x != y for x, y in zip(a, b, strict=True))),
    )


def cases(config: Config) -> Iterator[Case]:
    """Yield the cases asked for. Leaves out, and names on stderr, those without their peer."""
    try:
        import transformers

        transformers.logging.set_verbosity_error()
    except ImportError:
        transformers = None
    readers: dict[str, Callable] = {"reviews": json.loads}
    with contextlib.suppress(ImportError):
        import orjson

        readers["orjson"] = orjson.loads
    for name in config.rows:
        if name.split("-")[0] in ("train", "rollout") and transformers is None:
            print(
                f"{name}: left out, transformers is not installed (pip install 'pagellm[dev]')",
                file=sys.stderr,
            )
        elif name.startswith("orjson") and "orjson" not in readers:
            print(
                f"{name}: left out, orjson is not installed (pip install 'pagellm[dev]')",
                file=sys.stderr,
            )
        elif name in REVIEWS:
            peer, spelling = name.split("-")
            yield reviews_case(config, spelling, readers[peer])
        elif name.startswith("rollout"):
            yield rollout_case(config, name, 8 if name == "rollout-8" else 2)
        elif name == "pretrain":
            yield pretrain_case(config)
        elif name.startswith("train"):
            yield train_case(config, page_only=name == "train-page")
        elif name in ("histories", "tokens"):
            yield {"histories": histories_case, "tokens": tokens_case}[name](config)
        elif name == "evaluate" or "evaluate" not in config.rows:
            yield from evaluate_case(config)


def line(row: dict) -> str:
    """One row as text, in columns under HEADER."""

    def text(value, form: str) -> str:
        return "–" if value is None else format(value, form)

    numbers = [
        text(row["plain_ms"], ".1f"),
        text(row["ours_ms"], ".1f"),
        text(row["x"], ".2f"),
        text(row["floor_ms"], ".1f"),
        text(row["share"], ".0%"),
        text(row["plain_mb"], ".0f"),
        text(row["ours_mb"], ".0f"),
        text(row["max_diff"], ".1e"),
    ]
    return f"{row['row']:<13}{row['shape']:<30}" + "".join(f"{number:>11}" for number in numbers)


def run(config: Config) -> dict:
    """Print the table and the JSON line; return what the line holds.

    Raises PageLLMError if a row became slower than at --base.
    """
    pick_device(config.device)
    if config.base:
        return compare(config)
    if config.profile:
        return profile(config)
    print(
        f"{HEADER[0]:<13}{HEADER[1]:<30}" + "".join(f"{name:>11}" for name in HEADER[2:]),
        flush=True,
    )
    rows = []
    for case in cases(config):
        try:
            rows.append(measure(case, config.device, config.repeats))
        finally:
            case.close()
        print(line(rows[-1]), flush=True)
    found = {**machine(config.device), "rows": rows}
    print(json.dumps(found))
    return found


def profile(config: Config) -> dict:
    """Print the times of the parts of every row of PARTED that is asked for, and the JSON line."""
    rows = []
    for case in cases(
        replace(config, only=",".join(name for name in config.rows if name in PARTED))
    ):
        try:
            rows.append(measure_parts(case, config.device, config.repeats, config.clock))
        finally:
            case.close()
        print(parts_table(rows[-1]), flush=True)
    found = {**machine(config.device), "clock": config.clock, "rows": rows}
    print(json.dumps(found))
    return found


def compare(config: Config) -> dict:
    """Run both benches at --base and here, by turns; print the ratio of our times, row by row.

    Raises PageLLMError with the rows that became slower: by more than `slack` in the median, and in
    every pair of runs.
    """
    here = Path(__file__).parents[2]
    folder = Path(tempfile.mkdtemp()) / "base"
    git = ["git", "-C", str(here), "worktree"]
    made = subprocess.run(
        [*git, "add", "--detach", str(folder), config.base], capture_output=True, text=True
    )
    if made.returncode:
        raise PageLLMError(f"base={config.base!r}: {made.stderr.strip().splitlines()[-1]}")
    try:
        pairs = []
        # The order alternates, so that a machine that slows down favours neither.
        for turn in range(config.repeats):
            order = (folder, here) if turn % 2 == 0 else (here, folder)
            found = {place: ours_at(place, config, here) for place in order}
            pairs.append([found[folder], found[here]])
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], capture_output=True)
        shutil.rmtree(folder.parent, ignore_errors=True)
    slower, rows = [], []
    print(f"{'row':<60}{'base ms':>11}{'here ms':>11}{'here/base':>11}{'least':>9}{'most':>9}")
    for name in pairs[0][1]:
        ratios = sorted(new[name] / old[name] for old, new in pairs if name in old)
        if not ratios:
            print(f"{name:<60}{'new':>11}{pairs[0][1][name]:>11.1f}")
            continue
        old, new = (statistics.median(pair[i][name] for pair in pairs) for i in (0, 1))
        middle = statistics.median(ratios)
        rows.append(
            {"row": name, "base_ms": old, "here_ms": new, "ratio": middle, "ratios": ratios}
        )
        print(
            f"{name:<60}{old:>11.2f}{new:>11.2f}{middle:>11.2f}{ratios[0]:>9.2f}{ratios[-1]:>9.2f}",
            flush=True,
        )
        if middle > 1 + config.slack and ratios[0] > 1:
            slower.append(f"{name}: {middle:.2f} times")
    compared = {**machine(config.device), "base": config.base, "rows": rows}
    print(json.dumps(compared))
    if slower:
        raise PageLLMError(f"slower than at {config.base}: " + "; ".join(slower))
    return compared


def ours_at(place: Path, config: Config, here: Path) -> dict[str, float]:
    """Run both benches once with the code at `place`. Returns row -> ms of ours.

    A bench that the commit does not have is left out.
    """
    options = ["--device", config.device, "--repeats", "1", *(["--quick"] if config.quick else [])]
    extra = ["--size", config.size, *(["--only", config.only] if config.only else [])]
    found = {}
    for modules in BENCHES:
        module = next((m for m in modules if (place / f"{m.replace('.', '/')}.py").exists()), None)
        if module is None or (config.only and module == "kernels.bench"):
            continue
        more = [] if module == "kernels.bench" else extra
        done = subprocess.run(
            [sys.executable, "-m", module, *options, *more],
            cwd=place,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(place)},
        )
        if done.returncode:
            raise PageLLMError(
                f"{module} failed at {'the base' if place != here else 'this commit'}:\n  "
                + "\n  ".join(done.stderr.strip().splitlines()[-3:])
            )
        for row in json.loads(done.stdout.splitlines()[-1])["rows"]:
            found[f"{row.get('kernel') or row['row']} ({row['shape']})"] = row["ours_ms"]
    return found


if __name__ == "__main__":
    raise SystemExit(main(Config, run, "experiments.cost.bench"))
