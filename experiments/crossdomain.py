"""Across domains (the paper's limitations): train on one category, write pages in an unseen one.

    make crossdomain                    python -m experiments.crossdomain
    python -m experiments.crossdomain --dataset gift_cards --target scientific

A policy is trained on the source (pretrain and sft, without user tokens). Ridge regression then
predicts item rows (embeddings) from words: it is fitted from the title, brand and category of the
source's items to their trained rows. The target's items get the rows that their words predict, and
the source's policy writes pages from the histories of the target's users. No row of the target is
trained on. Without --target the data set is cut in two: half of the departments and half of the
users on either side, drawn anew for each seed.

    popularity      of the target's train rows: knows the target
    content kNN     cosine between an item's words and those of the history
    rows: words     ridge from the words' TF-IDF
    rows: states    ridge from the policy's own mean states over the words, as `export` writes them
    rows: shuffled  the rows of `words` given to random items: the network without content
    trained there   the same two stages on the target's own train rows

Writes data/<dataset>-<side>-s<seed>/, runs/<study>/..., runs/<study>/<dataset>-to-<target>.parquet.
About a minute a seed for the synthetic shop on one core.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from experiments.study import overrides, prepared
from pagellm import pretrain, sft
from pagellm.data import prepare
from pagellm.data.shop import Shop, load
from pagellm.model.networks import from_state, to_state
from pagellm.model.policy import Policy, PromptStyle
from pagellm.model.vocab import Vocab
from pagellm.pages.ranked import Scorer, check_pages, popularity_pages, rank_all, seen_rows
from pagellm.pages.tables import compare, markdown, write_table
from pagellm.serving.export import item_content
from pagellm.stage import randomness
from pagellm.stage.command import main
from pagellm.stage.config import Options, PageLLMError, check
from pagellm.stage.run import file_id

__all__ = ["Config", "cut", "halves", "moved", "predict_rows", "ridge", "run", "words_of"]


SHOWN = ("Recall@20", "Recall@40", "NDCG@100", "ILD", "true_energy")
MASK, K, DEPTH = "train+valid", 20, 100
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
FIXED = {"dataset", "run", "data", "runs", "seed", "source_run"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write pages in a category that the policy has never seen, with item rows made from words."""

    dataset: str = "synthetic"  # name of the source
    target: str = ""  # name of the target; empty: cut the source into two halves of departments
    raw: str = ""  # directory of the source's raw files, if it is not prepared yet
    target_raw: str = ""  # directory of the target's raw files, if it is not prepared yet
    study: str = "crossdomain"  # name of the study: results lie in <runs>/<study>
    seeds: int = 3  # number of seeds: 0, 1, ...; each trains anew, and cuts anew without --target
    preset: str = "auto"  # auto: every stage begins with the data set's preset, if there is one;
    # none: with its defaults
    data: str = "data"  # directory of prepared data sets
    runs: str = "runs"  # directory of runs
    pretrain: Options = Options("--steps 160")  # options for that stage, as on its command line
    sft: Options = Options("--epochs 10")  # options for sft

    def __post_init__(self):
        check(
            self,
            seeds=(self.seeds > 0, "1 or more"),
            target=(self.target != self.dataset, "another than dataset"),
        )


def cut(source: Path, target: Path, users: np.ndarray, items: np.ndarray, note: dict) -> None:
    """Write a prepared data set with only these users (U,) and items (N,) bool, numbered anew.

    Also removes users without a train positive among the items, and items that no remaining user
    has. Splits do not change. Does nothing if the same cut exists; raises PageLLMError if there is
    another, or if nothing would be left.
    """
    record = {"from": file_id(source / "interactions.parquet"), **note}
    if (target / "source.json").exists():
        if json.loads((target / "source.json").read_text()).get("cut") != record:
            raise PageLLMError(f"{target} was cut differently\n  Remove it to make it anew.")
        return
    shop = load(source)
    keep = users[shop.user] & items[shop.item]
    known = np.bincount(shop.user[keep & shop.rows("train")], minlength=shop.n_users) > 0
    keep &= known[shop.user]
    who, what = np.unique(shop.user[keep]), np.unique(shop.item[keep])
    if not len(who):
        raise PageLLMError(f"nothing of {source} is left in {target}: no user has train rows there")
    at_user, at_item = (np.full(n, -1) for n in (shop.n_users, shop.n_items))
    at_user[who], at_item[what] = np.arange(len(who)), np.arange(len(what))

    def numbered(table: pa.Table) -> pa.Table:
        for name, at in (("user", at_user), ("item", at_item)):
            if name in table.column_names:
                place = table.column_names.index(name)
                table = table.set_column(
                    place, name, pa.array(at[table[name].to_numpy()].astype(np.int32))
                )
        return table

    with prepare.building(target) as folder:
        rows = pq.read_table(source / "interactions.parquet")
        tables = {
            "interactions": rows.filter(pa.array(keep)),
            "items": pq.read_table(source / "items.parquet").take(what),
            "users": pq.read_table(source / "users.parquet").take(who),
        }
        if (source / "reviews.parquet").exists():
            reviews = pq.read_table(source / "reviews.parquet")
            tables["reviews"] = reviews.filter(
                pa.array(
                    (at_user[reviews["user"].to_numpy()] >= 0)
                    & (at_item[reviews["item"].to_numpy()] >= 0)
                )
            )
        for name, table in tables.items():
            pq.write_table(numbered(table), folder / f"{name}.parquet", compression="zstd")
        if shop.truth is not None:
            np.save(folder / "truth.npy", shop.truth[np.ix_(who, what)], allow_pickle=False)
        written = {path.name: file_id(path) for path in sorted(folder.iterdir())}
        about = json.loads((source / "source.json").read_text()) | {
            "cut": record,
            "written": written,
        }
        (folder / "source.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")


def halves(
    shop: Shop, seed: int
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Masks (users, items) of source and target: each half of the departments and of the users."""
    top = np.array([names[0] if names else "" for names in shop.catalogue.categories])
    names = np.unique(top)
    if len(names) < 2:
        raise PageLLMError(
            f"all items of {shop.path} are of one department: nothing to cross\n  Give --target."
        )
    rng = randomness.rng(seed, "crossdomain")
    mine = np.isin(top, rng.permutation(names)[: len(names) // 2])
    first = np.isin(np.arange(shop.n_users), rng.permutation(shop.n_users)[: shop.n_users // 2])
    return (first, mine), (~first, ~mine)


def words_of(shop: Shop, vocab: Vocab) -> np.ndarray:
    """TF-IDF of the words in items' titles, brands and categories, (N, words) float32.

    Rows have length 1; they are zero for items without text.
    """
    c = shop.catalogue
    out = np.zeros((shop.n_items, vocab.n_words), np.float32)
    for i in range(shop.n_items):
        for word in vocab.words(" " + " ".join([c.title[i], c.brand[i], *c.categories[i]]).strip()):
            out[i, word] += 1
    out = np.log1p(out) * np.log((1 + shop.n_items) / (1 + (out > 0).sum(0)))
    return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-9)


def ridge(
    x: np.ndarray, y: np.ndarray, strength: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ridge regression: minimise |y - predicted|^2 + strength |weights|^2.

    x (n, F), y (n, d); returns the mean of x (F,), weights (F, d), the mean of y (d,)
    """
    mx, my = x.mean(0), y.mean(0)
    a, b = (x - mx).astype(np.float64), (y - my).astype(np.float64)
    gram = a @ a.T
    return mx, a.T @ np.linalg.solve(gram + strength * np.eye(len(a)), b), my


def predict_rows(
    x: np.ndarray, rows: np.ndarray, new: np.ndarray, seed: int
) -> tuple[np.ndarray, float]:
    """Predict rows of new items by ridge regression from known items.

    x (N, F), rows (N, d)   features and trained rows of known items
    new (M, F)              features of the new items
    returns                 rows (M, d), scaled to the mean length of the known rows; and the mean
                            cosine of centred rows on a fifth of the known items, which were held
                            back to choose the ridge's strength from STRENGTHS
    """
    drawn = randomness.rng(seed, "crossdomain", "rows").permutation(len(x))
    held, taught = drawn[: max(1, len(x) // 5)], drawn[max(1, len(x) // 5) :]

    def cosine(strength: float) -> float:
        mx, w, my = ridge(x[taught], rows[taught], strength)
        a, b = (x[held] - mx) @ w, rows[held] - my
        return float(
            np.mean(
                (a * b).sum(1)
                / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)
            )
        )

    found = {strength: cosine(strength) for strength in STRENGTHS}
    best = max(found, key=found.__getitem__)
    mx, w, my = ridge(x, rows, best)
    out = (new - mx) @ w
    scale = np.linalg.norm(rows - my, axis=1).mean() / max(
        np.linalg.norm(out, axis=1).mean(), 1e-12
    )
    return (my + scale * out).astype(np.float32), found[best]


def moved(policy: Policy, shop: Shop, rows: np.ndarray) -> Policy:
    """The policy for another shop: the same network and words, `rows` (N, C) as its item rows.

    Every user is <user_unk>.
    """
    state = to_state(policy.model)
    n_words = policy.model.n_words
    weights = state["weights"] | {
        "item": torch.from_numpy(rows),
        "user": torch.zeros(shop.n_users, rows.shape[1]),
    }
    model = from_state(
        {**state, "rows": [n_words, shop.n_users, shop.n_items], "weights": weights}
    ).eval()
    style = PromptStyle(policy.style.max_history, policy.style.use_ratings, use_user=False)
    return Policy(model, Vocab(policy.vocab.tokenizer, shop.n_users, shop.n_items), style)


def trained(config: Config, dataset: str, seed: int) -> Policy:
    """Run pretrain and sft on this data set, without user tokens, unless they are done."""
    common: dict[str, Any] = {
        "dataset": dataset,
        "run": f"{config.study}/{dataset}-t{seed}",
        "seed": seed,
        "data": config.data,
        "runs": config.runs,
    }
    pretrain.run(pretrain.Config(**common, **overrides(pretrain, config.pretrain)))
    made = sft.Config(**common, **overrides(sft, config.sft) | {"use_user": False})
    sft.run(made)
    return Policy.load(made.stage("sft"))


def scores(
    config: Config, source: str, target: str, seed: int
) -> tuple[dict[str, dict], dict[str, float], Shop]:
    """Score all rows of the table for one seed.

    Returns row -> per-user scores on the target's test rows; kind of feature -> cosine of predicted
    rows on held-back items; the target's Shop.
    """
    policy = trained(config, source, seed)
    known, shop = (load(Path(config.data) / name) for name in (source, target))
    scorer, train, seen = Scorer(shop, "test"), shop.csr("train"), seen_rows(shop, "test", MASK)
    users, rows = scorer.users, policy.model.item.detach().numpy()
    x, new = words_of(known, policy.vocab), words_of(shop, policy.vocab)
    by_words, fit_words = predict_rows(x, rows, new, seed)
    by_states, fit_states = predict_rows(
        item_content(policy, known), rows, item_content(policy, shop), seed
    )
    dealt = by_words[randomness.rng(seed, "crossdomain", "dealt").permutation(len(by_words))]

    def knn(some: np.ndarray) -> torch.Tensor:
        mean = np.stack([new[train.of(u)[0]].sum(0) for u in some])
        return torch.from_numpy(mean @ new.T)

    ranked = {
        "popularity": popularity_pages(shop, users, seen, K, DEPTH, seed),
        "content kNN": rank_all(knn, users, seen, K, DEPTH, seed),
    }
    for name, made in (
        ("rows: words", by_words),
        ("rows: states", by_states),
        ("rows: shuffled", dealt),
    ):
        ranked[name] = moved(policy, shop, made).rank(users, train, seen, K, DEPTH)
    ranked["trained there"] = trained(config, target, seed).rank(users, train, seen, K, DEPTH)
    for name, pages in ranked.items():
        check_pages(name, pages, users, seen)
    return (
        {name: {"user": users, **scorer(pages, K)} for name, pages in ranked.items()},
        {"words": fit_words, "states": fit_states},
        shop,
    )


def aligned(
    found: dict[str, np.ndarray], ids: list[str], everybody: dict[str, int]
) -> dict[str, np.ndarray]:
    """Spread the users' scores over all users (id -> place): NaN for those without a score."""
    at = np.array([everybody[ids[u]] for u in found["user"]])
    out = {}
    for name, values in found.items():
        if name != "user":
            out[name] = np.full(len(everybody), np.nan)
            out[name][at] = values
    return out


def run(config: Config) -> list[dict]:
    data = Path(config.data)
    for stage, module in (("pretrain", pretrain), ("sft", sft)):
        overrides(module, getattr(config, stage), FIXED)
    for name, raw in ((config.dataset, config.raw), (config.target, config.target_raw)):
        if name:
            prepared(name, raw, config.data, config.preset)
    whole = load(data / (config.target or config.dataset))
    if not any(whole.catalogue.title):
        raise PageLLMError(f"{whole.path} has no titles: rows cannot be made of words")
    everybody = {name: n for n, name in enumerate(whole.user_ids)}
    results: dict[str, list[dict]] = {}
    fits = []
    for seed in range(config.seeds):
        pair = (config.dataset, config.target)
        if not config.target:
            pair = (f"{config.dataset}-here-s{seed}", f"{config.dataset}-there-s{seed}")
            for name, (users, items) in zip(pair, halves(whole, seed), strict=True):
                cut(data / config.dataset, data / name, users, items, {"side": name, "seed": seed})
        found, fit, shop = scores(config, *pair, seed)
        fits.append(fit)
        for name, rows in found.items():
            results.setdefault(name, []).append(aligned(rows, shop.user_ids, everybody))
    records = compare(results, SHOWN, "rows: shuffled")
    path = (
        Path(config.runs)
        / config.study
        / f"{config.dataset}-to-{config.target or 'other-half'}.parquet"
    )
    write_table(path, records)
    kept = ", ".join(f"{name} {np.mean([f[name] for f in fits]):.2f}" for name in fits[0])
    print(
        f"{config.dataset} to {config.target or 'the other half of its departments'}, "
        f"{config.seeds} seeds; mean, and the difference to shuffled rows with its 95% interval "
        f"(bootstrap over seeds and users)\n\n{markdown(records)}\n\n"
        f"cosine of predicted and trained rows, items of the source held back: {kept}\n{path}"
    )
    return records


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.crossdomain"))
