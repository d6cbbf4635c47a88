"""A built storefront, read back: the one way from a run's directory to pages.

store = open_store(config)
page(store.front, store.known.context("u1"), default_layout())
"""

import os
import sys
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np

from pagellm.data.orders import Orders, load_orders, orders_of
from pagellm.data.shop import Catalogue, Rows, Shop, load
from pagellm.data.tables import ids_of, read_table
from pagellm.model.composer import POOL, load_composer
from pagellm.model.policy import Policy
from pagellm.online.chat import Chat
from pagellm.pages.energy import near_duplicates
from pagellm.serving.sources import pick_policy
from pagellm.stage import dist
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import read_json
from pagellm.stage.hints import counted
from pagellm.stage.run import StageConfig, file_id, finished, load_model_file
from pagellm.storefront.build import (
    corpus_of,
    encoder_of,
    factors_of,
    heard,
    read_document,
    read_items,
    read_policy,
    read_stock,
    scorer_of,
    sold_in,
    unshowable,
)
from pagellm.storefront.context import Known
from pagellm.storefront.corpus import Vectors
from pagellm.storefront.fuse import SameLeaf
from pagellm.storefront.gates import known_words
from pagellm.storefront.given import blocked_by
from pagellm.storefront.local import Local
from pagellm.storefront.making import Deals, Front, default_layout
from pagellm.storefront.missions import Missions
from pagellm.storefront.parts import Layout, Weights
from pagellm.storefront.rankers import NAMES, File, Platt, Ranker, make_ranker
from pagellm.storefront.remote import Asked, Kept, Remote, Replay, Server
from pagellm.storefront.retrieve import build_index
from pagellm.storefront.schemas import layout_of
from pagellm.storefront.scorer import Agreement, Matcher
from pagellm.storefront.search import Search
from pagellm.storefront.text import index_texts, parents
from pagellm.storefront.themes import Template
from pagellm.storefront.trees import read_trees

__all__ = [
    "Explored",
    "Sources",
    "Store",
    "WAYS",
    "caps_of",
    "check_layout",
    "front_of",
    "open_store",
    "page_ranker",
    "read_deals",
    "read_layout",
    "read_rewards",
    "with_tuning",
]

WRITERS = ("template", "search", "lm", "http", "replay")
WAYS = ("trie", "prompt", "free")
EPOCH = date(1970, 1, 1).toordinal()
MOST_SCORED = 2000  # items of a user that PageLLM's policy scores


@dataclass(frozen=True, kw_only=True)
class Sources(StageConfig):
    """Fields of everything that makes pages."""

    layout: str = ""  # rows of the page: A, B, or a layout file (JSON); empty: A where people buy
    # again, else B
    ranker: str = "blend"  # what orders items for a person: popularity, frequency, als, blend,
    # file, or lightgbm (`pagellm storefront trees`); or PageLLM of this run: policy (ppo, or sft),
    # or compose for rows of new items
    scores: str = ""  # with ranker=file: Parquet file of user, item, score
    rewards: str = ""  # table of item and reward (a number): what the shop wants shown, such as a
    # margin. Of two items that a person likes alike, a generated row shows the one with more
    reward_weight: float = 0.25  # with rewards: what one standard deviation of them adds to the
    # score, in the ranker's units
    nearness: bool = False  # keywords that are queries find items whose vectors are near, beside
    # those that hold their words
    static: bool = False  # switch themes off: rows are the best-selling categories, each in the
    # ranker's own order
    deals: str = ""  # table of item, from and to (days): what is on offer, for rows of intent deal
    sponsored: str = ""  # file with one item id a line that somebody pays for: a row shows as many
    # as its layout says, a page a fifth of its slots
    writer: str = "template"  # what writes themes and keywords: template; search, which tries many
    # keywords; lm, a language model of our own blocks; http, one on a server; or replay, answers
    # out of a file
    weights: str = ""  # lm: directory of a published model, such as `pagellm import-gguf` makes
    keywords: str = "trie"  # lm: how keywords are written: trie, so that none but those on offer
    # can be; prompt, the model is told them too; free, under no mask
    answers: str = ""  # lm, http: file (JSON lines) that keeps answers, so that no question is
    # asked twice; replay: the file
    url: str = ""  # http: address up to /chat/completions, e.g. http://127.0.0.1:8080/v1
    model: str = ""  # http: name of the model
    key_env: str = "OPENAI_API_KEY"  # http: environment variable that holds the key, which is
    # written nowhere, and goes over https:// or to this machine only
    budget: int = 10000  # http: most requests of this command, repeats included
    retries: int = 1  # http: most repeats of one question to a server that gives no answer
    patience: float = 20.0  # http: seconds to wait for an answer

    def __post_init__(self):
        super().__post_init__()
        served = self.writer == "http"
        check(
            self,
            ranker=(self.ranker in NAMES, ", ".join(NAMES)),
            scores=(
                (self.ranker == "file") == bool(self.scores),
                "a file with ranker=file, else none",
            ),
            reward_weight=(0 <= self.reward_weight < np.inf, "0 or more"),
            writer=(self.writer in WRITERS, ", ".join(WRITERS)),
            answers=(
                self.writer != "replay" or bool(self.answers),
                "with writer=replay, the file of answers that --writer http --answers FILE made",
            ),
            weights=(
                (self.writer == "lm") == bool(self.weights),
                "a published model's directory with writer=lm, else none",
            ),
            keywords=(self.keywords in WAYS, ", ".join(WAYS)),
            url=(
                served == bool(self.url),
                "an address with writer=http, else none",
            ),
            model=(
                served == bool(self.model),
                "a name with writer=http, else none",
            ),
            budget=(self.budget > 0, "1 or more"),
            retries=(self.retries >= 0, "0 or more"),
            patience=(self.patience > 0, "above 0"),
        )


@dataclass(frozen=True, kw_only=True)
class Explored(Sources):
    """Fields of what may draw a page instead of taking its best."""

    explore: float = 0.0  # temperature at which each slot is drawn, by softmax(score / this); 0:
    # the best item is taken
    explore_themes: bool = False  # with explore: draw each row's theme too, by softmax(its value
    # over the best theme's / temperature)
    explore_all: bool = False  # with explore: draw the items of static, editorial and bought-before
    # rows too

    def __post_init__(self):
        super().__post_init__()
        more = self.explore_themes or self.explore_all
        check(
            self,
            explore=(
                self.explore >= 0 and (self.explore > 0 or not more),
                "0 or more; above 0 with explore_themes or explore_all",
            ),
        )

    @property
    def drawn(self) -> dict:
        """What of a page is drawn, as options of page.page."""
        names = ("explore", "explore_themes", "explore_all")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Store:
    """A front with its shop and what is known of people."""

    front: Front
    shop: Shop
    orders: Orders
    known: Known
    layout: Layout


def read_layout(name: str, repeats: bool) -> Layout:
    """A or B by name, or a file.

    Raises PageLLMError for a file that is not there or not a layout.
    """
    if name in ("", "A", "B"):
        return default_layout(name or ("A" if repeats else "B"))
    if not Path(name).exists():
        raise PageLLMError(
            f"no layout {name}; want A, B or a JSON file as in docs/how-to/storefront.md"
        )
    return read_document(name, "layout", layout_of)


def check_layout(front: Front, layout: Layout) -> None:
    """Raise PageLLMError for locked titles that the gates block, and for categories that nobody
    sells or that no row could name.
    """
    problems = []
    for at, row in enumerate(layout.placements):
        if row.title and (rule := blocked_by(front, row.title)):
            problems.append(f"placements[{at}].title: {row.title!r} is blocked by the rule {rule}")
        for name in row.categories:
            if why := unshowable(name, front.catalogue, front.corpus, front.stock, front.policy):
                problems.append(f"placements[{at}].categories: {why}")
    if problems:
        raise PageLLMError(
            f"layout {layout.id!r} cannot be shown as it is written\n  " + "\n  ".join(problems)
        )


def open_store(config: Sources, splits: tuple[str, ...] = ("train",)) -> Store:
    """Read shop, build and, where it is there, what was chosen on validation.

    splits  whose orders histories hold; the build itself knows train alone
    Raises PageLLMError.
    """
    shop = load(config.data_dir)
    folder = config.stage("storefront/build")
    made = config.make("storefront build")
    done = finished(folder, "storefront", made)
    options = read_json(folder / "config.json")
    if options["inputs"]["data"] != file_id(config.data_dir / "source.json"):
        raise PageLLMError(
            f"{folder} was built from other data\n  Remove it and build again: {made}"
        )
    state = load_model_file(folder / "model.pt")
    chosen = options["config"]
    policy = read_policy(chosen["policy"])
    stock = read_stock(chosen["out_of_stock"], shop.catalogue)
    orders = load_orders(shop)
    orders = orders_of(shop) if orders is None else orders
    seen = orders.only(*splits)
    encoder = encoder_of(config, chosen.get("encoder", ""))
    front = front_of(config, shop, state, policy, stock, chosen["seed"], encoder)
    models = {"catalogue": done["id"]}
    if config.rewards:
        rewards = read_rewards(config.rewards, shop.catalogue)
        weights = replace(front.weights, reward=config.reward_weight)
        front = replace(front, rewards=rewards, weights=weights)
        models["rewards"] = f"{file_id(config.rewards)} {config.reward_weight:g}"
    front = with_writer(config, front)
    tuned = config.stage("storefront/tune") / "tuned.json"
    threshold = state["threshold"]
    if config.deals:
        front = replace(front, deals=read_deals(config.deals, shop.catalogue))
        models["deals"] = file_id(config.deals)
    if config.sponsored:
        front = replace(front, sponsored=read_items(config.sponsored, shop.catalogue, "sponsored"))
        models["sponsored"] = file_id(config.sponsored)
    front = replace(front, threshold=threshold[0] if threshold else 0.0)
    if tuned.exists():
        told_if_stale(tuned, done["id"], config.make("storefront tune"))
        front = with_tuning(front, read_json(tuned))
        models["weights"] = file_id(tuned)
    front = replace(front, models=models)
    k = front.missions.k
    known = Known.of(shop, seen, front.missions.of_item, k, seen.end(), policy)
    repeats = bool((orders.only("train").pairs()[2] > 1).any())
    layout = read_layout(config.layout, repeats)
    check_layout(front, layout)
    return Store(front, shop, orders, known, layout)


def told_if_stale(tuned: Path, build: str, make: str) -> None:
    """Say so where weights and calibration were chosen for another build than the one there is."""
    about = tuned.parent / "config.json"
    if about.exists() and read_json(about).get("inputs", {}).get("build") != build:
        print(
            f"{tuned}: weights and calibration were chosen for another build; they are used\n"
            f"  Remove {tuned.parent} and choose them anew: {make}",
            file=sys.stderr,
            flush=True,
        )


def front_of(
    config: Sources,
    shop: Shop,
    state: dict,
    policy,
    stock: np.ndarray,
    seed: int,
    encoder: Vectors | None = None,
) -> Front:
    corpus, households = corpus_of(state["corpus"], encoder), state["households"].numpy()
    kept = state["missions"]
    category, of_category = kept["category"].numpy(), kept["of_category"].numpy()
    of_item = np.where(category >= 0, of_category[category] if len(of_category) else -1, -1)
    missions = Missions(category, kept["names"], of_category, of_item, kept["k"])
    catalogue = heard(shop.catalogue, policy)
    index = build_index(catalogue, stock, corpus, households, config.nearness)
    if config.ranker == "file":
        ranker: Ranker = File.read(config.scores, shop.user_ids, shop.catalogue.ids, households)
    elif config.ranker == "lightgbm":
        folder, make = config.stage("storefront/trees"), config.make("storefront trees")
        ranker = read_trees(folder, shop, factors_of(state), households, make)
    elif config.ranker in ("policy", "compose"):
        ranker = page_ranker(config, shop, households)
    else:
        ranker = make_ranker(config.ranker, households, factors_of(state))
    matcher, scorer = (
        Matcher.of(index, missions, state["vector"].numpy()),
        scorer_of(state["scorer"]),
    )
    above = parents(catalogue)
    number = {name: at for at, name in enumerate(sorted(set(above) - {""}))}
    parent = np.array([number.get(name, -1) for name in above], dtype=np.int64)
    return Front(
        catalogue=shop.catalogue,
        stock=stock,
        households=households,
        corpus=corpus,
        index=index,
        missions=missions,
        ranker=ranker,
        platt=Platt(),
        writer=Template(ranker, Platt(), missions, corpus, policy, stock, seed),
        agree=Agreement(scorer, matcher),
        policy=policy,
        similar=SameLeaf(shop.catalogue.leaf_id, parent, near_duplicates(catalogue)),
        best=state["best"],
        known=known_words([*index_texts(catalogue), *policy.texts]),
        static=config.static,
        caps=caps_of(policy.caps, catalogue),
    )


def caps_of(caps: dict[str, int], catalogue: Catalogue) -> tuple[tuple[np.ndarray, int], ...]:
    """A policy's caps as items of a category (N,) bool and how many of them a page may show."""
    sold = sold_in(catalogue) if caps else {}
    found = []
    for name, most in caps.items():
        group = np.zeros(len(catalogue), dtype=bool)
        group[sold.get(name, [])] = True
        found.append((group, most))
    return tuple(found)


def read_deals(path: str, catalogue: Catalogue) -> Deals:
    """Items on offer from a table of item, from, to; lines of unknown items are counted.

    Raises PageLLMError for a file that cannot be read, and for a line whose days are none.
    """
    table = read_table(Path(path), ("item", "from", "to"))
    if missing := [name for name in ("item", "from", "to") if name not in table.column_names]:
        raise PageLLMError(f"{path}: no column {missing[0]}; want item, from, to")
    number = {name: at for at, name in enumerate(catalogue.ids)}
    names = ids_of(table, "item", path)
    item, days = np.array([number.get(name, -1) for name in names], dtype=np.int64), []
    for line, ends in enumerate(
        zip(table["from"].to_pylist(), table["to"].to_pylist(), strict=True), 2
    ):
        try:
            first, last = (date.fromisoformat(str(end)[:10]).toordinal() - EPOCH for end in ends)
        except ValueError:
            raise PageLLMError(f"{path}, line {line}: want days like 2017-12-01") from None
        if first > last:
            raise PageLLMError(f"{path}, line {line}: the offer ends before it begins")
        days.append((first, last))
    known, ends_of = item >= 0, np.array(days, dtype=np.int64).reshape(-1, 2)
    if not known.all():
        print(f"{path}: of {counted(len(known), 'line')} {int((~known).sum()):,} with an item "
              f"that the shop has not; the first: {names[int((~known).argmax())]}",
              flush=True)  # fmt: skip
    return Deals(item[known], ends_of[known, 0], ends_of[known, 1])


def read_rewards(path: str, catalogue: Catalogue) -> np.ndarray:
    """(N,) float64 from a table of item and reward; items without one have the others' mean.

    Raises PageLLMError for a file that cannot be read, for a line without a number, and where no
    line names an item of the shop.
    """
    table = read_table(Path(path), ("item", "reward"))
    if missing := [name for name in ("item", "reward") if name not in table.column_names]:
        raise PageLLMError(f"{path}: no column {missing[0]}; want item, reward")
    number = {name: at for at, name in enumerate(catalogue.ids)}
    found: dict[int, float] = {}
    names, unknown = ids_of(table, "item", path), 0
    for line, (name, value) in enumerate(zip(names, table["reward"].to_pylist(), strict=True), 2):
        try:
            reward = float(value)
        except (TypeError, ValueError):
            reward = np.nan
        if not np.isfinite(reward):
            raise PageLLMError(f"{path}, line {line}: {value!r} is no number")
        unknown += name not in number
        if name in number:
            found[number[name]] = reward
    if not found:
        raise PageLLMError(f"{path}: no line names an item of the shop")
    if unknown:
        print(f"{path}: {counted(unknown, 'line')} of items that the shop has not", flush=True)
    rewards = np.full(len(catalogue), np.mean(list(found.values())))
    rewards[list(found)] = list(found.values())
    return rewards


def page_ranker(config: Sources, shop: Shop, households: np.ndarray) -> File:
    """PageLLM as a ranker: its scores of each user's best items; all others come last.

    policy   the logits of ppo, or of sft, for the first slot of a page, of 2,000 items
    compose  what composed pages think of the items that a page may hold: none that the user has
    Prompts show train rows. Somebody whom the shop does not know has no scores: items come by
    popularity, households (N,).
    Raises PageLLMError where the stage is not finished.
    """
    name = "compose" if config.ranker == "compose" else pick_policy("", config.stage, config.make)
    folder, device = config.stage(name), dist.start(config.device)
    done = finished(folder, name, config.make(name))
    users = np.arange(shop.n_users)
    if name == "compose":
        data = file_id(config.data_dir / "source.json")
        composer = load_composer(folder, shop, config.stage, device, data, config.make(name))
        ranked = composer.rank(users, shop.csr("train", positive=None), 1, POOL)
    else:
        nobody = Rows(np.zeros(shop.n_users + 1, np.int64), np.zeros(0, np.int64), np.zeros(0))
        depth = min(shop.n_items, MOST_SCORED)
        ranked = Policy.load(folder, device).rank(
            users, shop.csr("train"), nobody, 1, depth, "one_shot", progress=f"scores of {name}"
        )
    there = ranked.item >= 0
    indptr = np.r_[0, np.cumsum(there.sum(1))]
    rows = Rows(indptr, ranked.item[there], ranked.score[there].astype(np.float64))
    number = {user: at for at, user in enumerate(shop.user_ids)}
    return File(number, rows, households, f"{name}/{done['id']}")


def with_writer(config: Sources, front: Front) -> Front:
    """The front with the writer asked for; the template writer, which it has, stands in."""
    if config.writer == "template" or not isinstance(front.writer, Template):
        return front
    if config.writer == "search":
        return replace(front, writer=Search(front))
    if config.writer == "replay":
        asked: Asked = Replay(config.answers)
    elif config.writer == "lm":
        device = dist.pick_device(config.device)
        asked = Local.load(config.weights, front.corpus, device, config.keywords)
    else:
        key = os.environ.get(config.key_env, "")
        chat = Chat(config.url, config.model, key, config.budget, config.retries, config.patience)
        asked = Server(chat)
    if config.answers and config.writer != "replay":
        asked = Kept(asked, config.answers)
    return replace(front, writer=Remote(asked, front.writer, front.known))


def with_tuning(front: Front, tuned: dict) -> Front:
    """The front with what tune.py chose: calibration of this ranker, weights of the score."""
    platt, writer = front.platt, front.writer
    if tuned["ranker"] == front.ranker.name:
        platt = Platt(*tuned["platt"])
    if isinstance(writer, Template):
        writer = replace(writer, platt=platt)
    elif isinstance(writer, Remote):
        writer = replace(writer, template=replace(writer.template, platt=platt))
    elif isinstance(writer, Search):
        writer = Search(with_tuning(writer.front, tuned))
    # How much rewards count is the shop's wish: recall has nothing to say of it.
    weights = replace(Weights(**tuned["weights"]), reward=front.weights.reward)
    return replace(front, platt=platt, writer=writer, weights=weights)
