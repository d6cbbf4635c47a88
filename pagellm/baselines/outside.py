"""Recommenders of other libraries, each in an environment of its own: prepared data -> run file.

    python -m venv outside && outside/bin/pip install PACKAGES      (see below)
    outside/bin/python pagellm/baselines/outside.py --data data/toys --model sasrec \\
        --out runs/toys/outside/sasrec.parquet
    pagellm runfile --dataset toys --name SASRec \\
        --file runs/toys/outside/sasrec.parquet

model                                                              pip install
%(models)s

The packages exclude one another, so each library needs its own environment. This file imports
nothing of PageLLM, and runs in any of them.

Search. The middle of each grid is tried first, then settings drawn at random, until `minutes` of
processor time are over. The best validation NDCG@100 wins, ranked over the full catalogue without
train items. Networks that learn in epochs are scored while they learn, keep their best epoch, and
stop when they no longer improve. When they are scored depends on the clock, so two searches may end
with different settings. --fix holds some settings and leaves the time to the others, or sets one
that the grids leave out. Example: on Toys an epoch of SASRec takes 52 s of a core with the full
softmax, and 10 s with --fix loss=sampled_softmax n_negatives=64 session_max_len=12. --settings
takes the settings and epochs of an earlier search (pagellm/presets/<dataset>/baselines.json)
instead of searching; --refit then fits them to train + validation.

SASRec, BERT4Rec and HSTU read each user's train items in the order of `time`: the reviews' dates
(items of one day by their number), or the place in the sequence if the shop's files have no dates.
A random split takes items out of the middle of these sequences, as it does in the paper. HSTU runs
without its attention to time, because such a split has no moment at which a page would be asked
for. Its cosines are divided by logits_t; otherwise the softmax could hardly tell them apart.

Writes the run file: user, item and score of the best `depth` items of the full catalogue without
those that the model was fitted to; equal scores in a seeded random order. A .json beside it records
what was chosen and what was tried.
"""

import argparse
import ast
import itertools
import json
import logging
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

__all__ = ["GRIDS", "Likes", "Watch", "draws", "main", "mean_ndcg", "read", "top"]


TRANSFORMER: dict[str, tuple] = {
    "n_blocks": (1, 2, 3),
    "n_heads": (2,),
    "n_factors": (32, 64, 128),
    "dropout_rate": (0.1, 0.3, 0.5),
    "lr": (5e-4, 1e-3, 2e-3),
    "loss": ("softmax",),
    "batch_size": (128,),
    "session_max_len": (20,),
}
GRIDS: dict[str, dict[str, tuple]] = {
    "multivae": {
        "k": (50, 100, 200),
        "hidden": (200, 600),
        "beta": (0.01, 0.05, 0.2, 1.0),
        "n_epochs": (20, 50, 100),
        "learning_rate": (1e-3,),
    },
    "bpr": {
        "factors": (32, 64, 128),
        "learning_rate": (0.02, 0.05, 0.1),
        "regularization": (0.01, 0.03, 0.1),
        "iterations": (50, 100, 200),
    },
    "lightgcn": {
        "embedding_dim": (32, 64, 128),
        "num_layers": (1, 2, 3),
        "lr": (2e-3, 5e-3, 1e-2),
        "lambda_reg": (1e-5, 1e-4, 1e-3),
        "batch_size": (4096,),
    },
    "sasrec": TRANSFORMER,
    "bert4rec": TRANSFORMER | {"mask_prob": (0.15, 0.3, 0.5)},
    "hstu": TRANSFORMER | {"logits_t": (0.03, 0.05, 0.1)},
}
RECTOOLS = '"rectools[torch]==0.19.*" "numpy<2" "pyarrow<25" torch==2.13.0'
# model -> name of its row, source, packages to install
LIBRARY = {
    "multivae": (
        "Multi-VAE",
        "Liang et al., WWW 2018; Cornac's VAECF",
        "cornac pyarrow torch==2.13.0",
    ),
    "bpr": ("BPR", "Rendle et al., UAI 2009; implicit's", "implicit pyarrow"),
    "lightgcn": (
        "LightGCN",
        "He et al., SIGIR 2020; PyTorch Geometric's module and loss, our loop",
        "torch_geometric scipy pyarrow torch==2.13.0",
    ),
    "sasrec": ("SASRec", "Kang and McAuley, ICDM 2018; RecTools'", RECTOOLS),
    "bert4rec": ("BERT4Rec", "Sun et al., CIKM 2019; RecTools'", RECTOOLS),
    "hstu": ("HSTU", "Zhai et al., ICML 2024; RecTools'", RECTOOLS),
}
__doc__ %= {
    "models": "\n".join(
        f"{model:<9}  {row}: {source}\n" + " " * 11 + packages
        for model, (row, source, packages) in LIBRARY.items()
    )
}


class Likes(NamedTuple):
    """Positive interactions, as a matrix and one by one, ordered by user and time."""

    matrix: sparse.csr_matrix  # (U, N) float32, 1 where a user liked an item
    user: np.ndarray  # (R,) int32
    item: np.ndarray  # (R,) int32
    time: np.ndarray  # (R,) int64: seconds, or places in a sequence


def read(folder: Path) -> dict[str, Likes]:
    """Read prepared data: "train", "valid" and "train+valid" -> the positives of those splits."""
    rows = pq.read_table(folder / "interactions.parquet")
    user, item, when = (rows[name].to_numpy() for name in ("user", "item", "time"))
    when = np.nan_to_num(when).astype(np.int64)
    split, liked = (
        np.array(rows["split"].to_pylist()),
        rows["positive"].to_numpy(zero_copy_only=False),
    )
    shape = tuple(
        pq.read_metadata(folder / f"{name}.parquet").num_rows for name in ("users", "items")
    )
    return {
        name: Likes(
            sparse.csr_matrix((np.ones(keep.sum(), np.float32), (user[keep], item[keep])), shape),
            user[keep],
            item[keep],
            when[keep],
        )
        for name in ("train", "valid", "train+valid")
        for keep in [liked & np.isin(split, name.split("+"))]
    }


# Every model is a function of (train, seed, depth, after, settings) that returns nothing. After
# each epoch, or at the end if the library allows no look before, it calls after(epochs, scorer)
# and stops if the answer is true. scorer() returns a function users (B,) -> scores (B, N).


def multivae(
    train: Likes,
    seed: int,
    depth: int,
    after: Callable,
    *,
    k,
    hidden,
    beta,
    n_epochs,
    learning_rate,
):
    from cornac.data import Dataset
    from cornac.models import VAECF

    uir = Dataset.from_uir(
        zip(train.user.tolist(), train.item.tolist(), [1.0] * len(train.user), strict=True),
        seed=seed,
    )
    model = VAECF(
        k=k,
        autoencoder_structure=[hidden],
        act_fn="tanh",
        likelihood="mult",
        n_epochs=n_epochs,
        batch_size=256,
        learning_rate=learning_rate,
        beta=beta,
        seed=seed,
        verbose=False,
    ).fit(uir)
    column = np.fromiter(uir.iid_map, int)  # column of the model -> item; untrained items have none

    def score(users):
        full = np.full((len(users), train.matrix.shape[1]), -np.inf, np.float32)
        for row, user in enumerate(users):
            if user in uir.uid_map:
                full[row, column] = model.score(uir.uid_map[user])
        return full

    after(n_epochs, lambda: score)


def bpr(
    train: Likes,
    seed: int,
    depth: int,
    after: Callable,
    *,
    factors,
    learning_rate,
    regularization,
    iterations,
):
    from implicit.bpr import BayesianPersonalizedRanking

    model = BayesianPersonalizedRanking(
        factors=factors,
        learning_rate=learning_rate,
        regularization=regularization,
        iterations=iterations,
        random_state=seed,
        num_threads=1,
    )
    model.fit(train.matrix, show_progress=False)
    after(iterations, lambda: lambda users: model.user_factors[users] @ model.item_factors.T)


def lightgcn(
    train: Likes,
    seed: int,
    depth: int,
    after: Callable,
    *,
    embedding_dim,
    num_layers,
    lr,
    lambda_reg,
    batch_size,
):
    import torch
    from torch_geometric.nn.conv.gcn_conv import gcn_norm
    from torch_geometric.nn.models import LightGCN

    torch.manual_seed(seed)
    draw = np.random.default_rng(seed)
    U, N = train.matrix.shape
    ends = torch.tensor(np.stack([train.user, U + train.item.astype(np.int64)]))
    edges, weight = gcn_norm(
        torch.cat([ends, ends.flip(0)], 1), num_nodes=U + N, add_self_loops=False
    )
    warnings.simplefilter("ignore")  # PyTorch warns that sparse tensors are in beta
    graph = torch.sparse_coo_tensor(edges, weight, (U + N, U + N)).coalesce().to_sparse_csr()
    model = LightGCN(U + N, embedding_dim, num_layers, normalize=False)
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    code = np.sort(train.user.astype(np.int64) * N + train.item)

    def not_liked(users):
        """One random item for each of users (B,), among those that the user has not liked."""
        items, bad = np.empty(len(users), np.int64), np.ones(len(users), bool)
        while bad.any():
            items[bad] = draw.integers(N, size=bad.sum())
            wanted = users * N + items
            bad = code[np.minimum(np.searchsorted(code, wanted), len(code) - 1)] == wanted
        return items

    def scorer():
        with torch.no_grad():
            rows = model.get_embedding(graph).numpy()
        return lambda users: rows[users] @ rows[U:].T

    for epoch in itertools.count(1):
        order = draw.permutation(len(train.user))
        for at in range(0, len(order), batch_size):
            some = order[at : at + batch_size]
            users = train.user[some].astype(np.int64)
            nodes = torch.from_numpy(
                np.stack([users, U + train.item[some].astype(np.int64), U + not_liked(users)])
            )
            rows = model.get_embedding(graph)
            mine, liked, other = rows[nodes]
            loss = model.recommendation_loss(
                (mine * liked).sum(1), (mine * other).sum(1), nodes.flatten(), lambda_reg
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if after(epoch, scorer):
            return


def transformer(name: str, **more):
    """RecTools' model of this name, as a function with the arguments of the others."""

    def fit(train: Likes, seed: int, depth: int, after: Callable, logits_t=1.0, **settings):
        import pandas as pd
        import pytorch_lightning as lightning
        from rectools import Columns, models
        from rectools.dataset import Dataset

        logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        # Rows of one day have equal times: microseconds keep their order.
        moment = pd.to_datetime(train.time * 1_000_000_000 + 1000 * np.arange(len(train.time)))
        rows = pd.DataFrame(
            {
                Columns.User: train.user,
                Columns.Item: train.item,
                Columns.Weight: 1.0,
                Columns.Datetime: moment,
            }
        )
        data, users = Dataset.construct(rows), np.unique(train.user)

        def scorer():
            model.is_fitted = True  # the library sets this at the end of training; we ask before
            lists = model.recommend(
                users, data, k=min(depth, len(np.unique(train.item))), filter_viewed=True
            )
            model.torch_model.train()
            order = np.argsort(lists[Columns.User].to_numpy(), kind="stable")
            item, value = (
                lists[Columns.Item].to_numpy()[order],
                lists[Columns.Score].to_numpy(np.float32)[order],
            )
            start = np.searchsorted(
                lists[Columns.User].to_numpy()[order], np.arange(train.matrix.shape[0] + 1)
            )

            def score(some):
                full = np.full((len(some), train.matrix.shape[1]), -np.inf, np.float32)
                for row, user in enumerate(some):
                    span = slice(start[user], start[user + 1])
                    full[row, item[span]] = value[span]
                return full

            return score

        def trainer():
            told = lightning.callbacks.LambdaCallback(
                on_train_epoch_end=lambda trainer, module: setattr(
                    trainer, "should_stop", bool(after(trainer.current_epoch + 1, scorer))
                )
            )
            return lightning.Trainer(
                max_epochs=10_000,
                min_epochs=1,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[told],
            )

        lightning.seed_everything(seed, verbose=False)
        model = getattr(models, name)(
            **settings,
            **more,
            get_trainer_func=trainer,
            lightning_module_kwargs={"logits_t": logits_t},
        )
        model.fit(data)

    return fit


FIT = {
    "multivae": multivae,
    "bpr": bpr,
    "lightgcn": lightgcn,
    "sasrec": transformer("SASRecModel"),
    "bert4rec": transformer("BERT4RecModel"),
    "hstu": transformer("HSTUModel", relative_time_attention=False),
}


def top(
    score, train: sparse.csr_matrix, users: np.ndarray, depth: int, seed: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield user, items, scores: the best items that are not in train, at most `depth`.

    Equal scores are ranked in a seeded random order.
    """
    shuffle = np.random.default_rng(seed)
    for at in range(0, len(users), 256):
        some = users[at : at + 256]
        for user, row in zip(some, score(some), strict=True):
            row = np.array(row, np.float32)
            row[train[user].indices] = -np.inf
            at_least = np.partition(row, -depth)[-depth] if depth < len(row) else -np.inf
            order = shuffle.permutation(np.flatnonzero((row >= at_least) & np.isfinite(row)))
            best = order[np.argsort(-row[order], kind="stable")[:depth]]
            yield int(user), best, row[best]


def mean_ndcg(lists, held: sparse.csr_matrix, depth: int = 100) -> float:
    """Mean binary NDCG@depth of the users with held-out items.

    Used only to choose settings: the reported metrics are computed later, from the run file.
    """
    gained = 1.0 / np.log2(np.arange(depth) + 2.0)
    values = [
        gained[: len(items[:depth])][np.isin(items[:depth], held[user].indices)].sum()
        / gained[: held[user].nnz].sum()
        for user, items, _ in lists
        if held[user].nnz
    ]
    return float(np.mean(values))


def draws(grid: dict[str, tuple], seed: int) -> list[dict]:
    """All settings of a grid: the middle of each range, then the others in a seeded order."""
    middle = {name: values[len(values) // 2] for name, values in grid.items()}
    others = [
        drawn
        for values in itertools.product(*grid.values())
        if (drawn := dict(zip(grid, values, strict=True))) != middle
    ]
    random.Random(seed).shuffle(others)
    return [middle, *others]


class Watch:
    """Score a model while it learns: keep the lists of its best epoch, and say when to stop.

    Scores only when that costs at most a tenth of the time since the last scoring. Stops after the
    deadline (seconds of time.process_time); or after three scores without a gain, once the model
    has had half as many epochs again as its best. If `epochs` is given, scores once, at that epoch,
    and stops.
    """

    def __init__(
        self,
        train: Likes,
        held: sparse.csr_matrix,
        depth: int,
        seed: int,
        deadline: float,
        epochs: int | None = None,
    ):
        self.train, self.held, self.depth, self.seed = train.matrix, held, depth, seed
        self.deadline, self.wanted = deadline, epochs
        self.value, self.epochs, self.stale, self.again = -1.0, 0, 0, 0.0
        self.lists: list[tuple[int, np.ndarray, np.ndarray]] = []

    def __call__(self, epochs: int, scorer: Callable) -> bool:
        now = time.process_time()
        if epochs < self.wanted if self.wanted else now < min(self.again, self.deadline):
            return False
        lists = list(
            top(scorer(), self.train, np.arange(self.train.shape[0]), self.depth, self.seed)
        )
        value, self.stale = mean_ndcg(lists, self.held), self.stale + 1
        if value > self.value:
            self.value, self.epochs, self.lists, self.stale = value, epochs, lists, 0
        self.again = time.process_time() + 9 * (time.process_time() - now)
        return (
            bool(self.wanted)
            or now >= self.deadline
            or self.stale >= 3
            and epochs >= 1.5 * self.epochs
        )


def stored(path: Path, row: str) -> tuple[dict, int]:
    """Settings and epochs that an earlier search chose. Raises ValueError if there are none."""
    try:
        found = json.loads(path.read_text())[row]
        return found["settings"], found["epochs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} has no settings of {row} ({error})\n"
            "  Take a file that this command wrote, or leave --settings out."
        ) from error


def fixed(text: str) -> tuple[str, object]:
    """Parse "lr=1e-3" into ("lr", 0.001).

    Raises argparse.ArgumentTypeError if the name or the value is missing.
    """
    name, _, value = text.partition("=")
    if not (name.isidentifier() and value):
        raise argparse.ArgumentTypeError(f"{text!r}: want NAME=VALUE, as in lr=1e-3")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def options_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="prepared data set, data/<dataset>"
    )
    parser.add_argument("--model", choices=GRIDS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="run file to write, .parquet")
    parser.add_argument(
        "--minutes",
        type=float,
        default=5.0,
        help="processor time of the search, so that a busy "
        "machine costs no tries; at least one setting is tried",
    )
    parser.add_argument(
        "--fix",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        type=fixed,
        help="settings held in the search, not drawn from the grid; also others of the library's",
    )
    parser.add_argument(
        "--settings",
        type=Path,
        help="settings and epochs of an earlier search, instead of searching",
    )
    parser.add_argument("--depth", type=int, default=200, help="items of each user in the run file")
    parser.add_argument(
        "--refit", action="store_true", help="fit the chosen settings to train + validation"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.fix and options.settings:
        parser.error(
            "--fix holds settings in a search, and --settings takes the place of the search: leave "
            "one out"
        )
    return options


def search(
    options: argparse.Namespace, split: dict[str, Likes], given: tuple[dict, int] | None
) -> tuple[dict, Watch]:
    """Search settings, or fit the given ones.

    given    (settings, epochs) of an earlier search; None: search
    returns  the record written beside the run file, and the Watch that holds its lists
    """
    row, grid, train, held = (
        LIBRARY[options.model][0],
        GRIDS[options.model],
        split["train"],
        split["valid"].matrix,
    )
    grid = grid | {name: (value,) for name, value in options.fix}
    fit, started, tried = FIT[options.model], time.process_time(), []
    best: tuple[Watch, dict] | None = None
    deadline = started + 60 * options.minutes
    for settings in [given[0]] if given else draws(grid, options.seed):
        watch = Watch(
            train, held, options.depth, options.seed, deadline, given[1] if given else None
        )
        fit(train, options.seed, options.depth, watch, **settings)
        tried.append({"settings": settings, "epochs": watch.epochs, "valid NDCG@100": watch.value})
        print(
            f"  {settings}: {watch.value:.5f}, {watch.epochs} epochs, "
            f"{time.process_time() - started:.0f} s",
            flush=True,
        )
        if best is None or watch.value > best[0].value:
            best = watch, settings
        if time.process_time() > deadline:
            break
    assert best is not None  # at least one setting is tried
    watch, settings = best
    chosen = {
        "settings": settings,
        "epochs": watch.epochs,
        "valid NDCG@100": watch.value,
        "tried": len(tried),
    }
    if options.refit:
        again = Watch(
            split["train+valid"], held, options.depth, options.seed, deadline, watch.epochs
        )
        fit(split["train+valid"], options.seed, options.depth, again, **settings)
        watch = again
    limit = (
        {"from": options.settings.name}
        if options.settings
        else {
            "minutes": options.minutes,
            "grid": {what: " ".join(map(str, values)) for what, values in grid.items()},
        }
    )
    return {
        row: chosen | limit,
        "refit": options.refit,
        "seed": options.seed,
        "trials": tried,
    }, watch


def main(argv: list[str] | None = None) -> int:
    options = options_of(argv)
    if not (options.data / "interactions.parquet").is_file():
        print(
            f"outside: no prepared data in {options.data}\n"
            f"  Make it with: pagellm prepare --dataset {options.data.name}   "
            f"(in a checkout: make prepare DATASET={options.data.name})",
            file=sys.stderr,
        )
        return 2
    try:
        given = stored(options.settings, LIBRARY[options.model][0]) if options.settings else None
    except ValueError as error:
        print(f"outside: {error}", file=sys.stderr)
        return 2
    try:
        about, watch = search(options, read(options.data), given)
    except TypeError as error:
        if not options.fix or "unexpected keyword" not in str(error):
            raise
        print(
            f"outside: {options.model} has no setting that --fix names ({error})\n  Its own: "
            f"{', '.join(GRIDS[options.model])}; others of the library's are in its documentation",
            file=sys.stderr,
        )
        return 2
    except ImportError as error:
        print(
            f"outside: {options.model} cannot be loaded here ({error})\n"
            "  Give it an environment of its own:\n"
            f"  python -m venv outside && outside/bin/pip install {LIBRARY[options.model][2]}",
            file=sys.stderr,
        )
        return 2
    columns = zip(
        *(
            (np.full(len(items), user, np.int32), items.astype(np.int32), scores)
            for user, items, scores in watch.lists
        ),
        strict=True,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table(dict(zip(("user", "item", "score"), map(np.concatenate, columns), strict=True))),
        options.out,
    )
    options.out.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    row, chosen = next(iter(about.items()))
    print(
        f"{row}: {chosen['settings']}, {chosen['epochs']} epochs, validation NDCG@100 "
        f"{chosen['valid NDCG@100']:.4f}; {options.out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
