"""Plain baselines, scored by the same code as our policies: pages.parquet -> metrics.

    python -m experiments.baselines --dataset synthetic

Popularity and EASE (Steck, WWW 2019). EASE has one number to choose, the ridge; it is chosen on validation NDCG@100.
Writes runs/<run>/baselines/<name>/pages.parquet and per_user.parquet, and metrics.json. Seconds for 1,000 items; the
inverse of N x N takes about two minutes and 2 GB at 12,000 items.
"""

import sys
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pagellm import metrics
from pagellm.config import PageLLMError, check, main
from pagellm.data.shop import Rows, Shop, load
from pagellm.evaluate import COLUMNS, popularity_pages, read_pages, table, write_pages
from pagellm.policy import RankedPages, Scorer
from pagellm.run import Common, Run, atomic, file_id, write_json

__all__ = ["Config", "ease_weights", "rank_rows", "run"]


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Score popularity and EASE on the test split."""

    ridges: str = "50,100,200,500,1000"   # EASE's L2 penalties to try on validation, comma-separated
    k: int = 20                  # slots of a page
    depth: int = 100             # ranks in all
    n_boot: int = 1000           # bootstrap draws behind an interval

    def __post_init__(self):
        try:
            good = all(float(r) > 0 for r in self.ridges.split(","))
        except ValueError:
            good = False
        check(self, ridges=(good, "numbers above 0, comma-separated"), k=(self.k > 0, "1 or more"),
              depth=(self.depth >= self.k, f"k={self.k} or more"))


def ease_weights(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """Item-item weights B (N, N), zero diagonal: argmin |X - XB|^2 + ridge |B|^2, from the Gram matrix X'X (N, N)."""
    P = torch.linalg.inv(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
    B = -P / P.diagonal()
    return B.fill_diagonal_(0.0)


def history_matrix(rows: Rows, users: np.ndarray, n_items: int) -> torch.Tensor:
    """(len(users), N) float32: 1 where a user has the item."""
    padded = torch.from_numpy(rows.padded(users))
    X = torch.zeros(len(users), n_items + 1)
    X.scatter_(1, torch.where(padded < 0, n_items, padded), 1.0)
    return X[:, :n_items]


def rank_rows(shop: Shop, users: np.ndarray, B: torch.Tensor, seen: Rows, k: int, depth: int,
              block: int = 1024) -> RankedPages:
    """Top `depth` unseen items of every user by x_u B."""
    train, items, scores = shop.csr("train"), [], []
    for at in range(0, len(users), block):
        some = users[at: at + block]
        score = history_matrix(train, some, shop.n_items) @ B
        score[history_matrix(seen, some, shop.n_items).bool()] = -torch.inf
        top = score.topk(min(depth, shop.n_items), dim=1)
        items.append(torch.where(top.values.isfinite(), top.indices, -1))
        scores.append(top.values)
    item = torch.cat(items).numpy()
    return RankedPages(users, item, torch.cat(scores).numpy(), np.minimum((item >= 0).sum(1), k))


def run(config: Config) -> dict:
    shop = load(config.data_dir)
    with Run(config.stage("baselines"), config, {"data": file_id(config.data_dir / "source.json")}) as out:
        if out.done:
            print((out.path / "table.txt").read_text())
            return {}
        test, valid = Scorer(shop, "test"), Scorer(shop, "valid")
        if len(test.users) == 0 or len(valid.users) == 0:
            raise PageLLMError(f"{config.data_dir} has no held-out rows")
        gram = torch.zeros(shop.n_items, shop.n_items)
        for at in range(0, shop.n_users, 4096):
            X = history_matrix(shop.csr("train"), np.arange(at, min(at + 4096, shop.n_users)), shop.n_items)
            gram += X.T @ X
        best = (-1.0, 0.0)
        seen = shop.csr("train", positive=None)
        for ridge in map(float, config.ridges.split(",")):
            ranked = rank_rows(shop, valid.users, ease_weights(gram, ridge), seen, config.k, config.depth)
            best = max(best, (float(np.nanmean(valid(ranked, config.k)["NDCG@100"])), ridge))
        seen = shop.csr(("train", "valid"), positive=None)
        pages = {"popularity": popularity_pages(shop, test.users, seen, config.k, config.depth),
                 f"EASE, ridge {best[1]:g}": rank_rows(shop, test.users, ease_weights(gram, best[1]), seen, config.k,
                                                       config.depth)}
        results = {}
        for name, ranked in pages.items():
            folder = out.path / name.split(",")[0].lower()
            folder.mkdir(exist_ok=True)
            write_pages(folder / "pages.parquet", ranked)
            scores = test(read_pages(folder / "pages.parquet", shop), config.k)
            with atomic(folder / "per_user.parquet") as beside:
                pq.write_table(pa.table({"user": ranked.user, **scores}), beside)
            results[name] = {m: metrics.summary(v, config.seed, config.n_boot) for m, v in scores.items()
                             if not np.isnan(v).all()}
        write_json(out.path / "metrics.json", results)
        text = table(results, (*COLUMNS, "energy", "true_energy"))
        with atomic(out.path / "table.txt") as beside:
            beside.write_text(text + "\n")
        out.finish(ridge=best[1])
        print(text)
        return results


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.baselines"))
