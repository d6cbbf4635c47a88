"""An outside library's recommender, in a process and environment of its own: prepared data in, run file out.

    python -m venv outside && outside/bin/pip install cornac implicit pyarrow torch==2.13.0
    outside/bin/python experiments/outside.py --data data/toys --model multivae --out runs/toys/outside/multivae.parquet
    python -m experiments.runfile --dataset toys --name Multi-VAE --file runs/toys/outside/multivae.parquet

multivae   Multi-VAE (Liang et al., WWW 2018), Cornac's VAECF
bpr        BPR (Rendle et al., UAI 2009), implicit's

Imports nothing of ours, so that a library's pins never meet our environment. Settings are drawn from a small grid until
`minutes` are over and chosen on validation NDCG@100; --refit fits the chosen ones to train + validation. Beside the
run file (user, item, score: the best `depth` that are not train items) lies what was tried, as .json.
"""

import argparse
import itertools
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

__all__ = ["GRIDS", "main", "mean_ndcg", "read", "top"]

GRIDS = {"multivae": {"k": (50, 100, 200), "hidden": (200, 600), "beta": (0.01, 0.05, 0.2, 1.0),
                      "n_epochs": (20, 50, 100), "learning_rate": (1e-3,)},
         "bpr": {"factors": (32, 64, 128), "learning_rate": (0.02, 0.05, 0.1), "regularization": (0.01, 0.03, 0.1),
                 "iterations": (50, 100, 200)}}


def read(folder: Path) -> dict[str, sparse.csr_matrix]:
    """split -> (U, N) matrix of 1 where a user liked an item there."""
    rows = pq.read_table(folder / "interactions.parquet")
    user, item = rows["user"].to_numpy(), rows["item"].to_numpy()
    split, liked = np.array(rows["split"].to_pylist()), rows["positive"].to_numpy(zero_copy_only=False)
    shape = tuple(pq.read_metadata(folder / f"{name}.parquet").num_rows for name in ("users", "items"))
    return {name: sparse.csr_matrix((np.ones(keep.sum(), np.float32), (user[keep], item[keep])), shape)
            for name in ("train", "valid") for keep in [liked & (split == name)]}


def multivae(train: sparse.csr_matrix, seed: int, *, k, hidden, beta, n_epochs, learning_rate):
    """-> users (B,) -> scores (B, N)."""
    from cornac.data import Dataset
    from cornac.models import VAECF
    cells = train.tocoo()
    uir = Dataset.from_uir(zip(cells.row.tolist(), cells.col.tolist(), cells.data.tolist(), strict=True), seed=seed)
    model = VAECF(k=k, autoencoder_structure=[hidden], act_fn="tanh", likelihood="mult", n_epochs=n_epochs,
                  batch_size=256, learning_rate=learning_rate, beta=beta, seed=seed, verbose=False).fit(uir)
    column = np.fromiter(uir.iid_map, int)                # item of each of its columns; untrained items have none

    def score(users):
        full = np.full((len(users), train.shape[1]), -np.inf, np.float32)
        for row, user in enumerate(users):
            if user in uir.uid_map:
                full[row, column] = model.score(uir.uid_map[user])
        return full
    return score


def bpr(train: sparse.csr_matrix, seed: int, *, factors, learning_rate, regularization, iterations):
    """-> users (B,) -> scores (B, N)."""
    from implicit.bpr import BayesianPersonalizedRanking
    model = BayesianPersonalizedRanking(factors=factors, learning_rate=learning_rate, regularization=regularization,
                                        iterations=iterations, random_state=seed, num_threads=1)
    model.fit(train, show_progress=False)
    return lambda users: model.user_factors[users] @ model.item_factors.T


FIT = {"multivae": multivae, "bpr": bpr}


def top(score, train: sparse.csr_matrix, users: np.ndarray, depth: int, seed: int):
    """Yield user, items, scores: the best `depth` (or fewer) not in train; equal scores in a seeded random order."""
    shuffle = np.random.default_rng(seed)
    for at in range(0, len(users), 256):
        some = users[at: at + 256]
        for user, row in zip(some, score(some), strict=True):
            row = np.array(row, np.float32)
            row[train[user].indices] = -np.inf
            order = shuffle.permutation(len(row))
            best = order[np.argsort(-row[order], kind="stable")[:depth]]
            best = best[np.isfinite(row[best])]
            yield int(user), best, row[best]


def mean_ndcg(lists, held: sparse.csr_matrix, depth: int = 100) -> float:
    """Mean binary NDCG@depth, to choose settings by; what is reported, our own metrics count anew from the file."""
    gained = 1.0 / np.log2(np.arange(depth) + 2.0)
    return float(np.mean([gained[: len(items)][np.isin(items, held[user].indices)].sum()
                          / gained[: held[user].nnz].sum() for user, items, _ in lists]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="prepared data set, data/<dataset>")
    parser.add_argument("--model", choices=GRIDS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="run file to write, .parquet")
    parser.add_argument("--minutes", type=float, default=5.0, help="time for the search; at least one setting is tried")
    parser.add_argument("--depth", type=int, default=200, help="items of each user in the run file")
    parser.add_argument("--refit", action="store_true", help="fit the chosen settings to train + validation")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if not (options.data / "interactions.parquet").is_file():
        print(f"outside: no prepared data in {options.data}\n  Make it with: make prepare DATASET={options.data.name}",
              file=sys.stderr)
        return 2
    split, grid = read(options.data), GRIDS[options.model]
    held = np.flatnonzero(np.diff(split["valid"].indptr))
    drawn = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    random.Random(options.seed).shuffle(drawn)
    started, tried, best = time.monotonic(), [], (-1.0, {}, None)
    for settings in drawn:
        score = FIT[options.model](split["train"], options.seed, **settings)
        value = mean_ndcg(top(score, split["train"], held, 100, options.seed), split["valid"])
        tried.append({"settings": settings, "valid NDCG@100": value})
        print(f"  {settings}: {value:.5f}, {time.monotonic() - started:.0f} s", flush=True)
        if value > best[0]:
            best = (value, settings, score)
        if time.monotonic() - started > 60 * options.minutes:
            break
    score = (FIT[options.model](split["train"] + split["valid"], options.seed, **best[1]) if options.refit else best[2])
    users = np.arange(split["train"].shape[0])
    columns = zip(*((np.full(len(items), user, np.int32), items.astype(np.int32), scores)
                    for user, items, scores in top(score, split["train"], users, options.depth, options.seed)),
                  strict=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(zip(("user", "item", "score"), map(np.concatenate, columns), strict=True))),
                   options.out)
    about = {"model": options.model, "settings": best[1], "valid NDCG@100": best[0], "refit": options.refit,
             "seed": options.seed, "tried": tried}
    options.out.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    print(f"{options.model}: {best[1]}, validation NDCG@100 {best[0]:.4f}; {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
