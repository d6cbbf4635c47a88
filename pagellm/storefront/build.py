"""What is built before any request: keywords, missions, item factors, the scorer.

Reads   data/<dataset>, orders.parquet where there is one
Writes  runs/<run>/storefront/build                 model.pt: tensors and plain values

    pagellm storefront build --dataset complete_journey

Only the catalogue and train rows are read; held-out rows do not change the result. About a minute
for 15,182 items and 612,565 pairs on one core.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from pagellm.data.orders import Orders, load_orders, orders_of
from pagellm.data.shop import Catalogue, Shop, load
from pagellm.data.tables import id_list
from pagellm.stage import randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import read_json, write_json
from pagellm.stage.hints import counted, nearest
from pagellm.stage.run import Run, StageConfig, file_id
from pagellm.storefront.context import Known
from pagellm.storefront.corpus import LONGEST_TEXT, Corpus, Space, Vectors, build_corpus
from pagellm.storefront.encode import Encoder, encoder_folder
from pagellm.storefront.gates import check_text, choose_threshold
from pagellm.storefront.missions import SLOTS, Missions, Shelves, find_missions, refined
from pagellm.storefront.parts import Theme
from pagellm.storefront.policy import Policy, policy_of
from pagellm.storefront.rankers import Blend, Factors, Platt, fit_factors
from pagellm.storefront.retrieve import build_index
from pagellm.storefront.scorer import Matcher, Scorer, fit_scorer
from pagellm.storefront.text import BM25, best_first, index_texts, stems, words
from pagellm.storefront.themes import Template

__all__ = [
    "Config",
    "best_categories",
    "corpus_of",
    "encoder_of",
    "heard",
    "lacking",
    "read_document",
    "read_items",
    "read_policy",
    "read_stock",
    "run",
    "sold_in",
    "unshowable",
]

Made = TypeVar("Made")
LABEL_PEOPLE, LABEL_ITEMS = (
    200,
    5,
)  # people whose themes are labelled; items that fit, and that do not
SHELF_PEOPLE, SHELF_ITEMS = 300, 300  # whose best items the missions are refined by; how many
PRECISION = 0.95  # of the threshold on agreement
FILES = ("policy", "out_of_stock")  # options that name a file; a build is known by what is in them
# Of a shop whose items are all of one mission: nothing tells what does not fit.
EVERYTHING_FITS = Scorer(np.zeros(4), np.ones(4), np.zeros(4), 3.0)


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Build keywords, missions, item factors and the scorer from catalogue and train rows."""

    missions: int = 20  # number of missions, that is sets of categories that are bought together
    starts: int = 6  # of the clustering that finds them; the one whose rows hold most is kept
    policy: str = ""  # file of the shop's policy (JSON); empty: the built-in one
    out_of_stock: str = ""  # file with one item id a line; empty: everything is in stock
    encoder: str = ""  # vectors of texts: minilm, out of a wheel, or the directory of another
    # sentence encoder; empty: of the shop's own words

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            missions=(self.missions > 0, "1 or more"),
            starts=(self.starts > 0, "1 or more"),
        )


def read_policy(path: str) -> Policy:
    """The built-in policy, or the shop's on top of it.

    Raises PageLLMError for a file that is not there, is no JSON, or no policy.
    """
    if not path:
        return policy_of()
    return read_document(path, "policy", lambda document: policy_of(document, file_id(path)))


def read_document(path: str | Path, what: str, read: Callable[[dict], Made]) -> Made:
    """What `read` makes of a JSON file that a person wrote. what: policy or layout, for messages.

    Raises PageLLMError, which names the file.
    """
    how = "as in docs/how-to/storefront.md"
    try:
        # utf-8-sig: editors put a byte order mark in front
        text = Path(path).read_text(encoding="utf-8-sig")
        document = json.loads(text, parse_constant=no_number, object_pairs_hook=none_twice)
    except FileNotFoundError:
        raise PageLLMError(f"no {what} file {path}; write one {how}") from None
    except OSError as error:
        raise PageLLMError(f"{what} file {path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise PageLLMError(f"{path} is no JSON ({error}); write it {how}") from None
    try:
        return read(document)
    except PageLLMError as error:
        raise PageLLMError(f"{path}: {error}") from None


def no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def none_twice(pairs: list[tuple[str, object]]) -> dict:
    """An object of a document; of two fields of one name the first would be lost unseen."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


def read_items(path: str, catalogue: Catalogue, option: str) -> np.ndarray:
    """(N,) bool: the items of a file with one id a line. option: its name, for messages.

    Raises PageLLMError for ids that the shop has not.
    """
    number = {name: at for at, name in enumerate(catalogue.ids)}
    ids = id_list(f"@{path}", option)
    if unknown := [name for name in ids if name not in number]:
        raise PageLLMError(
            f"{path} names {counted(len(unknown), 'item')} that the shop has not: "
            f"{', '.join(unknown[:3])}\n  Take them out, or prepare the shop anew."
        )
    found = np.zeros(len(catalogue), dtype=bool)
    found[[number[name] for name in ids]] = True
    return found


def read_stock(path: str, catalogue: Catalogue) -> np.ndarray:
    """(N,) bool. Raises PageLLMError for ids that the shop has not, or where nothing is left."""
    gone = read_items(path, catalogue, "out_of_stock") if path else np.zeros(len(catalogue), bool)
    if gone.all():
        raise PageLLMError(f"{path} leaves no item in stock: there is nothing to show")
    return ~gone


def encoder_of(config: StageConfig, name: str) -> Vectors | None:
    """The sentence encoder of that name; None for the shop's own words."""
    if not name:
        return None
    return Encoder(encoder_folder(name, config.stage("storefront/encoder")))


def heard(catalogue: Catalogue, policy: Policy) -> Catalogue:
    """The catalogue as rows are written from it: titles that were written for a machine are empty.

    The items are shown under their own titles, but not one word of these is a keyword, finds the
    item, or counts among the shop's words.
    """
    titles = ["" if policy.planted(title) else title for title in catalogue.title]
    return catalogue if titles == catalogue.title else replace(catalogue, title=titles)


def best_categories(missions: Missions, train: Orders, policy: Policy, corpus: Corpus) -> list[str]:
    """Categories by train purchases, the best first, without restricted ones."""
    sold = missions.category[train.item]
    sales = np.bincount(sold[sold >= 0], minlength=len(missions.names))
    order = np.lexsort((np.arange(len(sales)), -sales))
    names = [missions.names[c] for c in order.tolist()]
    return [n for n in names if n in corpus.number and not policy.restricted.found(n)]


def shelves_of(
    shop: Shop, train: Orders, missions: Missions, corpus: Corpus, policy: Policy, ranker, seed: int
) -> Shelves:
    """The best items of some people behind those of a first row, from train orders alone.

    The first row is what they bought before, where the shop has repeat orders; where it has none,
    what they bought is not shown at all. Categories that no row may name are -1.
    """
    names = missions.names
    may = np.array(
        [n in corpus.number and not policy.restricted.found(n) for n in names], dtype=bool
    )
    known = Known.of(shop, train, missions.of_item, missions.k, train.end(), policy)
    repeats = bool((known.count > 1).any())
    people = randomness.rng(seed, "storefront", "shelves").permutation(shop.n_users)[:SHELF_PEOPLE]
    category = np.full((len(people), SHELF_ITEMS), -1, dtype=np.int64)
    clicks = np.zeros(category.shape)
    for row, user in enumerate(people.tolist()):
        context = known.context(shop.user_ids[user])
        logit = ranker(context)
        own = context.item
        first = own[best_first(logit[own], own, SLOTS)] if repeats else own
        order = best_first(logit, np.arange(len(logit)), min(len(logit), SHELF_ITEMS + len(first)))
        order = order[~np.isin(order, first)][:SHELF_ITEMS]
        found = missions.category[order]
        category[row, : len(order)] = np.where((found >= 0) & may[np.maximum(found, 0)], found, -1)
        clicks[row, : len(order)] = Platt()(logit[order])
    return Shelves(category, clicks)


def labels(shop: Shop, known: Known, writer: Template, matcher: Matcher, people, rng) -> tuple:
    """features (n, 4), fits (n,) by construction: see scorer.py; n is 0 where one mission holds
    all.
    """
    features, fits = [], []
    near = nearest_missions(writer.missions, writer.corpus)
    of_item, live = writer.missions.of_item, np.flatnonzero(writer.stock)
    for user in people.tolist():
        context = known.context(shop.user_ids[user])
        answers = writer.themes([context], [["browse"] * 2], [[]])[0]
        for theme in [answer.value for answer in answers if answer.value is not None]:
            keywords = writer.keywords([theme], [context], [np.zeros(0, np.int64)])[0].value
            inside = live[of_item[live] == theme.mission]
            beside = live[of_item[live] == near[theme.mission]]
            outside = live[of_item[live] != theme.mission]
            if not (keywords and len(inside) and len(beside) and len(outside)):
                continue
            half = LABEL_ITEMS // 2
            wrong = np.r_[rng.choice(beside, half), rng.choice(outside, LABEL_ITEMS - half)]
            for items, right in ((rng.choice(inside, LABEL_ITEMS), True), (wrong, False)):
                features.append(matcher.features(theme, keywords, items))
                fits.append(np.full(len(items), right))
    if not features:
        return np.zeros((0, 4)), np.zeros(0, dtype=bool)
    return np.concatenate(features), np.concatenate(fits)


def nearest_missions(missions: Missions, corpus: Corpus) -> np.ndarray:
    """(k,) the other mission whose categories' names lie nearest."""
    vectors = []
    for m in range(missions.k):
        names = [missions.names[c] for c in np.flatnonzero(missions.of_category == m)]
        vectors.append(corpus.theme_vector(Theme("", "browse", tuple(names))))
    near = np.array(vectors) @ np.array(vectors).T
    filled = np.bincount(missions.of_category, minlength=missions.k) > 0
    near[:, ~filled] = -np.inf
    np.fill_diagonal(near, -np.inf)
    return near.argmax(1)


def from_anywhere(config: Config) -> Config:
    """With whole paths: pages are made from other folders too, and read these files again."""
    whole = {name: getattr(config, name) for name in (*FILES, "encoder")}
    whole = {name: str(Path(path).absolute()) for name, path in whole.items() if path}
    if config.encoder == "minilm":
        whole["encoder"] = config.encoder
    return replace(config, **whole)


def found_again(config: Config, folder: Path) -> None:
    """Write where the files of a build are now; that they are the same, `Run` has seen."""
    kept = read_json(folder / "config.json")
    now = {name: getattr(config, name) for name in FILES}
    if any(kept["config"].get(name) != path for name, path in now.items()):
        write_json(folder / "config.json", kept | {"config": kept["config"] | now})


def run(config: Config) -> dict | None:
    """Build and write; returns what `done` says. Does nothing where the same build is there."""
    config = from_anywhere(config)
    shop = load(config.data_dir)
    orders = load_orders(shop)
    inputs = {"data": file_id(config.data_dir / "source.json")}
    inputs |= {name: file_id(path) for name in FILES if (path := getattr(config, name))}
    policy, stock = read_policy(config.policy), read_stock(config.out_of_stock, shop.catalogue)
    with Run(config.stage("storefront/build"), config, inputs, free=FILES) as out:
        found_again(config, out.path)
        if out.already_done():
            return read_json(out.path / "done")
        train = (orders_of(shop) if orders is None else orders).only("train")
        state, counts = built(config, shop, train, policy, stock)
        out.finish(model=state, **counts)
        kinds = ", ".join(f"{count:,} {name}" for name, count in counts["keywords"].items())
        print(f"{out.path}: keywords: {kinds}; "
              f"{counted(counts['categories'], 'category', 'categories')} in "
              f"{counted(counts['missions'], 'mission')}", flush=True)  # fmt: skip
        for sentence in lacking(shop, train):
            print(sentence, flush=True)
        if counts["titles_without_a_word"]:
            print(f"{counted(counts['titles_without_a_word'], 'title')} without a word: brand and "
                  "category alone find what has it", flush=True)  # fmt: skip
        if counts["titles_left_out"]:
            print(f"{counted(counts['titles_left_out'], 'title')} with commands or markup: what "
                  "has it is shown, and no keyword comes from it", flush=True)  # fmt: skip
        if not counts["labels"]:
            print("one mission holds all items: nothing tells what fits a theme, so that every "
                  "item counts as fitting", flush=True)  # fmt: skip
        return read_json(out.path / "done")


def lacking(shop: Shop, train: Orders) -> list[str]:
    """What a shop does not know of its items and orders, and what pages do without: a sentence
    each.
    """
    catalogue, found = shop.catalogue, []
    if not np.isfinite(catalogue.price).any():
        found.append(
            "no item has a price: a request that asks for one leaves nothing; what is on offer is "
            "known by --deals alone"
        )
    if not any(catalogue.categories):
        found.append("no item has a category: missions are made of words of titles")
    if not len(train.item):
        found.append("nobody has bought anything: every page is a stranger's")
    elif not (train.pairs()[2] > 1).any():
        found.append(
            "nobody has bought an item twice: without --layout a page has six rows of what is new "
            "to the person"
        )
    return found


def refuse_policy(missions: Missions, policy: Policy) -> None:
    """Raise PageLLMError where the policy lets no row name any category: term and count."""
    found = Counter(term for name in missions.names if (term := policy.against(name)))
    if missions.names and found.total() == len(missions.names):
        term, times = found.most_common(1)[0]
        raise PageLLMError(
            "the policy blocks the names of all "
            f"{counted(len(missions.names), 'category', 'categories')}, {times} of them by "
            f"{term!r}: no row could be named\n  Take that term out of the policy."
        )


def unshowable(
    name: str, catalogue: Catalogue, corpus: Corpus, stock: np.ndarray, policy: Policy
) -> str:
    """Why no row can ever show a category that a person named; "" where one can.

    What is sold out may come back: the row then says so by itself.
    """
    sold = sold_in(catalogue)
    if name not in sold:
        near = nearest(name, sold)
        return f"nobody sells {name!r}" + (f"; did you mean {near!r}?" if near else "")
    if name in corpus.number or not stock[sold[name]].any():
        return ""
    if len(name) > LONGEST_TEXT:
        return f"{name!r} has {len(name)} characters, and rows name {LONGEST_TEXT} at most"
    if policy.forbidden(name):
        return f"{name!r} is blocked by the policy"
    key = stems(name)
    if not key:
        return f"{name!r} holds no word"
    same = next((text for text in corpus.text if stems(text) == key), "")
    return f"{name!r} is one category with {same!r}, which has the same words; name that one"


def sold_in(catalogue: Catalogue) -> dict[str, list[int]]:
    """The items of every category, of those that are sold out too."""
    found: dict[str, list[int]] = {}
    for item, path in enumerate(catalogue.categories):
        for name in set(path):
            found.setdefault(name, []).append(item)
    return found


def refuse_policy_names(
    policy: Policy, catalogue: Catalogue, corpus: Corpus, stock: np.ndarray
) -> None:
    """Raise PageLLMError for seasons that no row could show as they are written: a name that the
    gates block, a category that nobody sells; and for caps of such categories.
    """
    problems = []
    for entry in policy.calendar:
        name = entry["name"]
        looks = check_text(name, "", policy, frozenset())
        # A person may use words that the catalogue does not know.
        rules = [d.rule for d in looks if d.action != "pass" and d.rule != "known"]
        if rules:
            problems.append(f"season {name!r}: the name is blocked by the rule {rules[0]}")
        for category in entry["categories"]:
            if why := unshowable(category, catalogue, corpus, stock, policy):
                problems.append(f"season {name!r}: {why}")
    sold = sold_in(catalogue) if policy.caps else {}
    for name in policy.caps:
        if name not in sold:
            why = unshowable(name, catalogue, corpus, stock, policy)
            problems.append(f"cap of {name!r}: {why}")
    if problems:
        raise PageLLMError("the policy cannot be kept\n  " + "\n  ".join(problems))


def built(
    config: Config, shop: Shop, train: Orders, policy: Policy, stock: np.ndarray
) -> tuple[dict, dict]:
    """What goes into model.pt, and counts of it."""
    catalogue = heard(shop.catalogue, policy)
    encoder = encoder_of(config, config.encoder)
    corpus = build_corpus(catalogue, stock, policy.forbidden, config.seed, encoder)
    refuse_policy_names(policy, catalogue, corpus, stock)
    missions = find_missions(catalogue, train, config.missions, config.seed)
    refuse_policy(missions, policy)
    rows, count = train.history()
    households = np.bincount(rows.items, minlength=shop.n_items)
    factors = fit_factors(rows, count, shop.n_items, config.seed)
    ranker = Blend(factors, households)
    if missions.names:
        shelves = shelves_of(shop, train, missions, corpus, policy, ranker, config.seed)
        missions = refined(missions, train, shelves, config.starts, config.seed)
    index = build_index(catalogue, stock, corpus, households)
    texts = index_texts(catalogue)
    vector = corpus.space.texts([texts[item] for item in index.live.tolist()])
    # Whether an item fits a theme needs no calibrated probability: the plain sigmoid of the
    # ranker's logit is enough.
    writer = Template(ranker, Platt(), missions, corpus, policy, stock, config.seed)
    matcher = Matcher.of(index, missions, vector)
    known = Known.of(shop, train, missions.of_item, missions.k, train.end(), policy)
    rng = randomness.rng(config.seed, "storefront", "labels")
    people = rng.permutation(shop.n_users)[: 2 * LABEL_PEOPLE]
    features, fits = labels(shop, known, writer, matcher, people[::2], rng)
    scorer = fit_scorer(features, fits) if len(fits) else EVERYTHING_FITS
    features, fits = labels(shop, known, writer, matcher, people[1::2], rng)
    cut = choose_threshold(scorer(features).round(3), fits, PRECISION)
    best = best_categories(missions, train, policy, corpus)
    state = {
        "corpus": corpus_state(corpus),
        "missions": {
            "category": torch.from_numpy(missions.category),
            "names": missions.names,
            "of_category": torch.from_numpy(missions.of_category),
            "k": missions.k,
        },
        "households": torch.from_numpy(households),
        "factors": torch.from_numpy(factors.item),
        "vector": torch.from_numpy(vector),
        "scorer": [
            scorer.mean.tolist(),
            scorer.scale.tolist(),
            scorer.weight.tolist(),
            scorer.intercept,
        ],
        "threshold": None if cut is None else [cut.value, cut.bound, cut.coverage, cut.blocked],
        "best": best,
    }
    kinds = Counter(corpus.type.tolist())
    names = ("category", "brand", "attribute", "query")
    counts = {
        "keywords": {name: kinds[at] for at, name in enumerate(names)},
        "categories": len(missions.names),
        "missions": int(missions.of_category.max(initial=-1)) + 1,
        "labels": len(fits),
        "titles_without_a_word": sum(not words(title) for title in shop.catalogue.title),
        "titles_left_out": sum(
            a != b for a, b in zip(catalogue.title, shop.catalogue.title, strict=True)
        ),
        "threshold": state["threshold"],
    }
    return state, counts


def corpus_state(corpus: Corpus) -> dict:
    return {
        "text": corpus.text,
        "type": torch.from_numpy(corpus.type),
        "indptr": torch.from_numpy(corpus.indptr),
        "item": torch.from_numpy(corpus.item),
        "vector": torch.from_numpy(corpus.vector),
        **space_state(corpus.space),
    }


def space_state(space: Vectors) -> dict:
    """What vectors of the shop's own words are made by; nothing of an encoder, which is a file."""
    if not isinstance(space, Space):
        return {}
    return {
        "terms": list(space.terms),
        "idf": torch.from_numpy(space.idf),
        "basis": torch.from_numpy(np.ascontiguousarray(space.basis)),
    }


def corpus_of(state: dict, encoder: Vectors | None = None) -> Corpus:
    """The inverse of what `built` keeps. encoder: that of the build, where it had one."""
    if encoder is None:
        terms = {term: at for at, term in enumerate(state["terms"])}
        space: Vectors = Space(terms, state["idf"].numpy(), state["basis"].numpy())
    else:
        space = encoder
    text = state["text"]
    return Corpus(
        text,
        state["type"].numpy(),
        state["indptr"].numpy(),
        state["item"].numpy(),
        state["vector"].numpy(),
        space,
        {name: w for w, name in enumerate(text)},
        BM25([stems(name) for name in text]),
    )


def scorer_of(state: list) -> Scorer:
    mean, scale, weight, intercept = state
    return Scorer(np.array(mean), np.array(scale), np.array(weight), intercept)


def factors_of(state: dict) -> Factors:
    return Factors.of(state["factors"].numpy())


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm storefront build"))
