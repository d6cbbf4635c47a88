"""Cold items: can a text say where an item belongs that nobody, or hardly anybody, has chosen?

    python -m experiments.text_rows --dataset scientific --minilm models/minilm \\
        --language SmolLM2=runs/smol/pretrain
    python -m experiments.text_rows --dataset scientific --source toys --minilm models/minilm

Each draw takes a tenth of the items. These cold items lose their train rows (they become `unused`,
and no page may hold them), in `none` all of them, in `few` all but 1 to 5. ALS is fitted to the
rows of the other items. A ridge regression from an item's text to its ALS factors then gives cold
items a row; those with a few buyers are folded in, the text's row being where they begin. Scored
are users who picked cold items in the test split, for these picks: ranked among the cold items,
and among all.

    popularity          train rows that are left; in `none` the order is random
    no text             the mean row of all items: what a fold-in can do alone
    words               TF-IDF of title words, brands and categories
    MiniLM, ...         mean states of encoders (--minilm, --language)
    words + MiniLM      both side by side
    update's fold-in    rows that `pagellm update` gives new items (model/fold.py), without training
    cosine: ...         no factors: cosine to the mean of the history
    ALS+facts           as the product fits it: words, brands, categories are users of their items
    ceiling: ...        nothing removed

The strength of the ridge, of the fold-in and the length of cold rows are chosen on validation picks
of warm items (text_map.py). With --source the map from texts to factors
comes from another data set, and every item is new.

Writes runs/<study>/<dataset>/, runs/<study>/<dataset>.{parquet,md}. What is there is not made anew.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from experiments.text_map import Practice, Ridge, World, fold_in, subset, without
from experiments.text_vectors import cached, language, sentences, texts_of, words
from pagellm.data.filters import group_rank
from pagellm.data.shop import SPLITS, Catalogue, Rows, Shop, load
from pagellm.model import plain
from pagellm.model.als import als_side, item_groups, transpose
from pagellm.model.fold import fold_items
from pagellm.pages.ranked import Scorer, rank_all, seen_rows
from pagellm.pages.stats import difference
from pagellm.pages.tables import per_user, write_table
from pagellm.stage import randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check, check_numbers
from pagellm.stage.files import atomic, file_id, read_json, slug, write_json

__all__ = ["Config", "Draw", "cold_items", "run", "taken_out"]


MASK, K, DEPTH = "train+valid+unused", 20, 100
SHOWN = ("Recall@20", "NDCG@100")
VIEWS = ("cold", "all")  # what a cold pick is ranked among
MODES = ("none", "few")
VERSUS = "words"
UPDATE = "update's fold-in"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What texts say about items with no train row, and with one to five."""

    dataset: str = "scientific"  # name of the data set
    study: str = "text_rows"  # name of the study: results lie in <runs>/<study>
    draws: int = 3  # number of draws of cold items
    share: float = 0.1  # share of the items that a draw takes
    most: int = 5  # train rows that a cold item keeps at most, in `few`
    minilm: str = ""  # directory of a sentence encoder for transformers; empty: no such rows
    language: str = ""  # language models: NAME=STAGE, comma-separated, where STAGE is the directory
    # that pretrain or sft wrote; empty: no such rows
    source: str = ""  # another data set, whose map from texts to factors is used; empty: its own
    settings: str = ""  # baselines' settings.json; empty: those of the data set's preset
    directions: int = 2048  # directions of the word counts that are kept
    users: int = 2000  # validation users that strengths and lengths are chosen on; 0: all
    modes: str = ",".join(MODES)  # none, few or both
    data: str = "data"  # directory of prepared data sets
    runs: str = "runs"  # directory of runs

    def __post_init__(self):
        check_numbers(self)
        check(
            self,
            draws=(self.draws > 0, "1 or more"),
            share=(0 < self.share < 1, "between 0 and 1"),
            most=(self.most > 0, "1 or more"),
            directions=(self.directions > 0, "1 or more"),
            source=(self.source != self.dataset, "another than dataset"),
            language=(
                all(name and stage for name, stage in self.models().items()),
                "NAME=STAGE, comma-separated",
            ),
            modes=(set(self.modes.split(",")) <= set(MODES), "none, few or both"),
        )

    def models(self) -> dict[str, str]:
        pairs = (text.partition("=") for text in filter(None, self.language.split(",")))
        return {name: stage for name, _, stage in pairs}

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.study / self.dataset

    def tuned(self, dataset: str) -> dict[str, dict]:
        """Model -> its settings on this data set; ALS+facts has those of ALS where it has none."""
        path = Path(self.settings) if self.settings else None
        if path is None:
            path = Path(str(resources.files("pagellm"))) / "presets" / dataset / "baselines.json"
        found = read_json(path) if path.is_file() else {}
        if "ALS" not in found:
            raise PageLLMError(
                f"no settings of ALS in {path}\n"
                f"  Make them with `pagellm baselines --dataset {dataset}`, and name --settings."
            )
        chosen = {name: entry["settings"] for name, entry in found.items()}
        return {"popularity": {}, "ALS+facts": chosen["ALS"]} | chosen


def cold_items(shop: Shop, share: float, draw: int) -> np.ndarray:
    """(N,) bool: a random share of the items that have train positives."""
    some = np.flatnonzero(np.bincount(shop.csr("train").items, minlength=shop.n_items) > 0)
    chosen = randomness.rng(draw, "text rows", "cold").permutation(some)
    out = np.zeros(shop.n_items, bool)
    out[chosen[: max(1, round(share * len(some)))]] = True
    return out


def taken_out(shop: Shop, cold: np.ndarray, most: int, draw: int) -> Shop:
    """The shop in which cold items keep `most` train positives or fewer, drawn; 0: none.

    An item keeps 1 to `most` of them, each number equally likely. Its other train rows become
    `unused`.
    """
    train = np.flatnonzero(shop.rows("train", None) & cold[shop.item])
    rng = randomness.rng(draw, "text rows", "kept")
    keep = rng.integers(1, most + 1, shop.n_items) if most else np.zeros(shop.n_items, np.int64)
    rank, _ = group_rank(shop.item[train] * 2 + shop.positive[train], rng.random(len(train)))
    gone = train[~shop.positive[train] | (rank >= keep[shop.item[train]])]
    split = shop.split.copy()
    split[gone] = SPLITS.index("unused")
    return replace(shop, split=split)


def vectors(config: Config, shop: Shop, name: str = "") -> dict[str, tuple[Tensor, str]]:
    """Encoder -> its vectors (N, C) of the shop's items, and the id of its weights.

    name  of the data set, where it is not the config's
    """
    texts, folder = texts_of(shop.catalogue), config.folder.parent / (name or config.dataset)
    encoders: dict[str, tuple[Path, Callable]] = {}
    if config.minilm:
        weights = Path(config.minilm) / "model.safetensors"
        encoders["MiniLM"] = (weights, partial(sentences, config.minilm, texts))
    for model, stage in config.models().items():
        encoders[model] = (Path(stage) / "model.pt", partial(language, stage, texts))
    out = {}
    for model, (weights, make) in encoders.items():
        if not weights.is_file():
            raise PageLLMError(f"no {weights} for {model}")
        known = file_id(weights)
        table = cached(folder / "vectors" / f"{slug(model)}-{known}.npy", make)
        out[model] = (torch.from_numpy(table), known)
    return out


def features_of(counted: Tensor, encoded: dict[str, Tensor]) -> dict[str, Tensor]:
    """Row -> features (N, F) that a ridge reads."""
    found = {"no text": counted.new_zeros(len(counted), 1), VERSUS: counted} | encoded
    return found | {f"words + {name}": torch.cat([counted, x], 1) for name, x in encoded.items()}


def cosine(x: Tensor, rows: Rows) -> Callable[[np.ndarray], Tensor]:
    """Score of an item: the cosine of its features and the mean of those of a user's items."""

    def score(users: np.ndarray) -> Tensor:
        place, item = rows.flat(users)
        table = torch.zeros(len(users), x.shape[1])
        return table.index_add(0, torch.from_numpy(place), x[torch.from_numpy(item)]) @ x.T

    return score


def dot(users: Tensor, items: Tensor) -> Callable[[np.ndarray], Tensor]:
    return lambda some: users[torch.from_numpy(some)] @ items.T


def blend(first: Callable, second: Callable, cold: np.ndarray) -> Callable[[np.ndarray], Tensor]:
    """The first's scores; those of cold items (N,) bool are the mean of both's standard scores, at
    the first's level and spread."""

    def score(users: np.ndarray) -> Tensor:
        a, b = first(users).clone(), second(users)[:, cold]
        mine = a[:, cold]
        level, spread = mine.mean(1, keepdim=True), mine.std(1, keepdim=True).clamp_min(1e-9)
        other = (b - b.mean(1, keepdim=True)) / b.std(1, keepdim=True).clamp_min(1e-9)
        a[:, cold] = level + spread * ((mine - level) / spread + other) / 2
        return a

    return score


@dataclass(frozen=True)
class Draw:
    """What one draw of cold items leaves, and how to score on it."""

    shop: Shop
    cold: np.ndarray
    thin: Shop  # cold items have lost their rows
    few: int  # train rows that a cold item may keep
    number: int

    @classmethod
    def of(cls, shop: Shop, config: Config, number: int, mode: str) -> "Draw":
        cold, few = cold_items(shop, config.share, number), config.most if mode == "few" else 0
        return cls(shop, cold, taken_out(shop, cold, few, number), few, number)

    @cached_property
    def scorer(self) -> Scorer:
        """Judges picks of cold items in the test split."""
        split = self.shop.split.copy()
        split[self.shop.rows("test", None) & ~self.cold[self.shop.item]] = SPLITS.index("unused")
        return Scorer(replace(self.shop, split=split), "test")

    def judge(self, score: Callable[[np.ndarray], Tensor]) -> dict[str, np.ndarray]:
        """ "metric, view" -> (U,) scores; and the users."""
        users, seen = self.scorer.users, seen_rows(self.thin, "test", MASK)
        out = {"user": users}

        def among(some: np.ndarray) -> Tensor:
            return torch.where(torch.from_numpy(self.cold), score(some), -torch.inf)

        for view, mine in zip(VIEWS, (among, score), strict=True):
            found = self.scorer(rank_all(mine, users, seen, K, DEPTH, self.number), K)
            out |= {f"{metric}, {view}": found[metric] for metric in SHOWN}
        return out


def text_rows(
    draw: Draw, world: World, practice: Practice, features: dict[str, Tensor]
) -> dict[str, Callable[[], Callable]]:
    """Row -> what makes its score function: rows from features, and from where they begin."""
    new = np.flatnonzero(~world.warm)
    buyers = subset(transpose(draw.thin.csr("train"), draw.shop.n_items), new)

    def made(name: str) -> Callable:
        x = features[name]
        strength, hold, length = practice.choose(x)
        begin = Ridge(x[world.warm], world.items[world.warm])(x[new], strength)
        table = world.items.clone()
        table[new] = length * fold_in(world, world.everybody, begin, buyers, hold)
        print(f"  {name}: strength {strength:g}, hold {hold:g}, length {length:g}", flush=True)
        return dot(world.everybody, table)

    def as_update() -> Callable:
        warm = torch.from_numpy(world.warm)
        old = np.where(world.warm, np.cumsum(world.warm) - 1, -1)
        groups = item_groups(draw.shop.catalogue)
        known = draw.thin.csr("train")
        found = fold_items([world.items[warm]], old, known, groups, draw.number)
        return dot(world.everybody, found.tables[0])

    return {name: partial(made, name) for name in features} | {UPDATE: as_update}


def plain_rows(
    draw: Draw, tuned: dict[str, dict], features: dict[str, Tensor], factors: Path
) -> dict[str, Callable[[], Callable]]:
    """Row -> what makes its score function: rows without a map from texts to factors.

    factors  directory in which fitted factors are kept
    """
    shop, thin = draw.shop, draw.thin
    groups = item_groups(shop.catalogue)

    def fitted(name: str, rows: Rows, beside: str) -> Callable:
        def both_sides() -> np.ndarray:
            model = plain.fit(name, rows, shop.n_users, shop.n_items, tuned[name], groups=groups)
            return torch.cat([model.learned["users"], model.learned["items"]]).numpy()

        table = torch.from_numpy(cached(factors / f"{slug(name)}-{beside}.npy", both_sides))
        return dot(table[: shop.n_users], table[shop.n_users :])

    def popular() -> Callable:
        return plain.fit("popularity", thin.csr("train"), shop.n_users, shop.n_items, {}).score

    left, whole, mine = thin.csr("train"), shop.csr("train"), f"d{draw.number}-{draw.few}"
    out: dict[str, Callable] = {
        "popularity": popular,
        "ALS+facts": partial(fitted, "ALS+facts", left, mine),
        "ceiling: ALS": partial(fitted, "ALS", whole, "whole"),
        "ceiling: ALS+facts": partial(fitted, "ALS+facts", whole, "whole"),
    }
    if draw.few:
        out["ALS"] = partial(fitted, "ALS", left, mine)
    for name, x in features.items():
        out[f"cosine: {name}"] = partial(cosine, x, thin.csr("train"))
    return out


def remembered(config: Config, ids: dict[str, str]) -> None:
    """Note what the rows were made with; raise PageLLMError if others lie there."""
    made_by = ("share", "most", "directions", "users", "source", "settings")
    now = {name: asdict(config)[name] for name in made_by}
    now |= {"data": file_id(Path(config.data) / config.dataset / "source.json")}
    path = config.folder / "config.json"
    before = read_json(path) if path.exists() else {"encoders": {}}
    encoders = before.pop("encoders")
    changed = {name for name in ids if encoders.get(name, ids[name]) != ids[name]}
    if before and before != now or changed:
        raise PageLLMError(
            f"{config.folder} holds rows made otherwise\n  Name another --study, or remove it."
        )
    config.folder.mkdir(parents=True, exist_ok=True)
    write_json(path, now | {"encoders": encoders | ids})


def scored(
    config: Config, shop: Shop, number: int, mode: str, counted: Tensor, encoded: dict[str, Tensor]
) -> dict[str, dict]:
    """Row -> per-user scores of one draw; those that are written already are read."""
    draw = Draw.of(shop, config, number, mode)
    tuned, folder = config.tuned(config.dataset), config.folder / f"d{number}-{mode}"
    folder.mkdir(exist_ok=True)
    features = features_of(counted, encoded)
    plainly = plain_rows(draw, tuned, {VERSUS: counted} | encoded, config.folder / "factors")
    blended = [f"ALS+facts, {name}" for name in features if name != "no text"]
    wanted = [*features, UPDATE, *plainly, *blended]
    missing = [name for name in wanted if not (folder / f"{slug(name)}.parquet").exists()]
    made = plainly
    if set(missing) - set(plainly):
        rows = without(shop.csr("train"), draw.cold)
        path = config.folder / "factors" / f"warm-d{number}.npy"
        world = World.fit(rows, shop.n_items, tuned["ALS"], path)
        practice = Practice(world, draw.thin, draw.few, config.users, number)
        made = made | text_rows(draw, world, practice, features)
    made = {name: cache(make) for name, make in made.items()}
    for name in missing:
        if name in made:
            score = made[name]()
        else:
            score = blend(made["ALS+facts"](), made[name.removeprefix("ALS+facts, ")](), draw.cold)
        with atomic(folder / f"{slug(name)}.parquet") as beside:
            pq.write_table(pa.table(draw.judge(score)), beside)
        print(f"{config.dataset}, draw {number}, {mode}: {name}", flush=True)
    return {name: per_user(folder / f"{slug(name)}.parquet") for name in wanted}


def compared(draws: list[dict[str, dict]], n_users: int, versus: str = VERSUS) -> list[dict]:
    """Records of rows and metrics over the draws: mean, difference to `versus`, both with their
    95% interval (bootstrap over draws and users)."""

    def spread(found: dict, metric: str) -> np.ndarray:
        out = np.full(n_users, np.nan)
        out[found["user"]] = found[metric]
        return out

    records = []
    for name in draws[0]:
        for metric in draws[0][name]:
            if metric == "user":
                continue
            mine, other = ([spread(draw[row], metric) for draw in draws] for row in (name, versus))
            zero = [np.zeros(n_users)] * len(draws)
            mean = difference(mine, zero, draws=1000)
            gap = difference(mine, other, draws=1000)
            records.append(
                {"variant": name, "metric": metric}
                | dict(zip(("mean", "low", "high"), mean, strict=True))
                | dict(zip(("difference", "gap_low", "gap_high"), gap, strict=True))
            )
    return records


def show(records: list[dict]) -> str:
    """Markdown: rows down, metrics across; a difference that excludes 0 is bold."""
    metrics = list(dict.fromkeys(r["metric"] for r in records))
    lines = ["| | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for name in dict.fromkeys(r["variant"] for r in records):
        cells = []
        for r in (r for r in records if r["variant"] == name):
            cell = f"{r['mean']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"
            gap = f"{r['difference']:+.3f} [{r['gap_low']:+.3f}, {r['gap_high']:+.3f}]"
            sure = r["gap_low"] > 0 or r["gap_high"] < 0
            cells.append(f"{cell}, {f'**{gap}**' if sure else gap}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def both(a: Catalogue, b: Catalogue) -> Catalogue:
    """The items of two catalogues, one after the other."""
    columns = ("ids", "title", "brand", "categories", "leaf", "description")
    joint = {name: [*getattr(a, name), *getattr(b, name)] for name in columns}
    return Catalogue.of(**joint, price=np.concatenate([a.price, b.price]))


def crossed_table(config: Config, shop: Shop) -> tuple[list[dict], str]:
    """Rows of all items from the source's map: no item of this shop has met a user of the map."""
    origin = load(Path(config.data) / config.source)
    counted = torch.from_numpy(words(both(origin.catalogue, shop.catalogue), config.directions))
    encoded = {
        name: torch.cat([there[0], here[0]])
        for (name, there), here in zip(
            vectors(config, origin, config.source).items(),
            vectors(config, shop).values(),
            strict=True,
        )
    }
    world = World.fit(
        origin.csr("train"),
        origin.n_items,
        config.tuned(config.source)["ALS"],
        config.folder.parent / config.source / "factors" / "warm-whole.npy",
    )
    practice = Practice(world, origin, 0, config.users, 0)
    history, n = shop.csr("train"), origin.n_items
    scorer, seen = Scorer(shop, "test"), seen_rows(shop, "test", "train+valid")

    def carried(name: str, x: Tensor) -> Callable:
        def rows() -> np.ndarray:
            strength, _, _ = practice.choose(x[:n])
            return Ridge(x[:n][world.warm], world.items[world.warm])(x[n:], strength).numpy()

        kept = config.folder / "factors" / f"{config.source}-{slug(name)}.npy"
        begin = torch.from_numpy(cached(kept, rows))
        users = als_side(
            begin, history, world.settings["alpha0"], world.ridge(history, shop.n_items)
        )
        return dot(users, begin)

    made: dict[str, Callable] = {
        f"map: {name}": partial(carried, name, x)
        for name, x in features_of(counted, encoded).items()
        if name != "no text"
    }
    alone = torch.from_numpy(words(shop.catalogue, config.directions))  # rarity in this shop
    for name, x in ({VERSUS: alone} | {name: x[n:] for name, x in encoded.items()}).items():
        made[f"cosine: {name}"] = partial(cosine, x, history)
    for name in ("popularity", "ALS", "ALS+facts"):
        settings = config.tuned(config.dataset)[name]
        made[f"knows this shop: {name}"] = lambda name=name, settings=settings: (
            plain.fit(
                name,
                history,
                shop.n_users,
                shop.n_items,
                settings,
                groups=item_groups(shop.catalogue),
            ).score
        )
    draw = {}
    for name, make in made.items():
        found = scorer(rank_all(make(), scorer.users, seen, K, DEPTH), K)
        draw[name] = {"user": scorer.users} | {metric: found[metric] for metric in SHOWN}
    records = compared([draw], shop.n_users, f"cosine: {VERSUS}")
    text = (
        f"{config.source} to {config.dataset}, {len(scorer.users)} users; mean and difference to "
        f"cosine: {VERSUS}, each with its 95% interval (bootstrap over users)\n\n{show(records)}\n"
    )
    return records, text


def cold_tables(config: Config, shop: Shop) -> tuple[list[dict], str]:
    """The records and the text of all draws and modes."""
    counted = torch.from_numpy(
        cached(
            config.folder / "vectors" / f"words-{config.directions}.npy",
            partial(words, shop.catalogue, config.directions),
        )
    )
    found = vectors(config, shop)
    remembered(config, {name: known for name, (_, known) in found.items()})
    encoded = {name: x for name, (x, _) in found.items()}
    records, parts = [], []
    for mode in config.modes.split(","):
        draws = [
            scored(config, shop, number, mode, counted, encoded) for number in range(config.draws)
        ]
        some = compared(draws, shop.n_users)
        records += [{"mode": mode} | record for record in some]
        users = [len(draw[VERSUS]["user"]) for draw in draws]
        kept = "none" if mode == "none" else f"1 to {config.most}"
        parts.append(
            f"{config.dataset}: {config.share:g} of the items keep {kept} of their train rows, "
            f"{config.draws} draws, users who picked such items: {users}; mean and difference "
            f"to {VERSUS}, each with its 95% interval (bootstrap over draws and users)\n\n"
            f"{show(some)}\n"
        )
    return records, "\n".join(parts)


def run(config: Config) -> list[dict]:
    shop = load(Path(config.data) / config.dataset)
    if not any(texts_of(shop.catalogue)):
        raise PageLLMError(f"{shop.path} has no titles, brands or categories")
    absent = [name for name in ("minilm", "language") if not getattr(config, name)]
    if absent:
        print(f"no rows of {', '.join(f'--{name}' for name in absent)}: not given")
    if config.source:
        records, text = crossed_table(config, shop)
    else:
        records, text = cold_tables(config, shop)
    path = config.folder.with_name(f"{config.folder.name}.parquet")
    if config.source:
        path = path.with_name(f"{config.source}-to-{config.dataset}.parquet")
    write_table(path, records)
    with atomic(path.with_suffix(".md")) as beside:
        beside.write_text(text)
    print(text)
    return records


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.text_rows"))
