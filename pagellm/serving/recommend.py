"""Recommend: one person's page in the terminal, or everybody's in one file.

Reads   data/<dataset>, runs/<run>/compose, ppo or sft, runs/<run>/reward where it is there
Prints  a page      pagellm recommend --user A1B2 --k 20
                    pagellm recommend --history B0001000:5,B0001007:4 --categories "Office"
Writes  a file      pagellm recommend --all --out pages.parquet
                    torchrun --nproc_per_node 2 -m pagellm.serving.recommend --all --out FILE

Nothing is held out unless --split says so: prompts show all that is known of a user, and no page
holds an item that its user has. Where --policy names none, the policy is the best on validation of
those that are there; a line says which, and why. The same command again carries on where an
interrupted --all stopped. It takes seconds for the synthetic shop.
"""

import hashlib
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock
from tqdm import tqdm

from pagellm.data.account import several
from pagellm.data.dropped import NAME
from pagellm.data.shop import is_forgotten, source
from pagellm.data.stores import is_remote, partition_of, safe, send
from pagellm.data.tables import id_list, plain_id, words_in
from pagellm.model.composer import POOL
from pagellm.model.decode import ranking
from pagellm.model.policy import MODES
from pagellm.pages.variety import STRENGTH
from pagellm.serving.cache import Cache
from pagellm.serving.filters import SEEN, Filters, look_up
from pagellm.serving.newcomers import NEW_DAYS, check_new, ranks_with_new
from pagellm.serving.recommender import Ask, Recommender, ResolvedAsk
from pagellm.serving.sources import (
    PLAIN,
    POLICIES,
    WRITERS,
    Sources,
    check_variety,
    check_writer,
    split_in_words,
)
from pagellm.stage import dist
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import atomic, write_json
from pagellm.stage.hints import counted
from pagellm.stage.outputs import check_above

__all__ = ["Config", "id_list", "parse_history", "run"]

OTHER_TABLES = {".csv", ".tsv", ".txt", ".json", ".jsonl", ".xlsx", ".gz", ".zip"}  # not Parquet
SUCCESS = "_SUCCESS"  # in a folder of pieces that are all there, as Spark and others write it


@dataclass(frozen=True, kw_only=True)
class Config(Sources):
    """Print one person's page (--user, --history), or write everybody's to a file (--all --out)."""

    INFINITE: ClassVar[tuple[str, ...]] = ("price_max",)
    ENVIRONMENT: ClassVar[str] = "PAGELLM_"

    user: str = ""  # whose page, by the shop's own id; a stranger is served from the history alone
    history: str = ""  # items and ratings 1 to 5, oldest first: id:rating,id:rating;
    # a bare id has no rating
    k: int = 20  # slots of a page
    policy: str = ""  # who writes the pages: compose, composed pages; ppo, the policy trained on
    # the reward; sft, the one before that; plain, ALS with facts and MMR, which comes with compose;
    # empty: the best on validation of those that are there
    mode: str = "auto"  # decoding of sft and ppo: greedy, beam, one_shot or hybrid; auto: what
    # validation chose when the policy was trained
    variety: str = "none"  # method that makes the pages of sft and ppo more varied while they are
    # decoded: none, mmr or energy
    strength: float = STRENGTH  # strength of variety: with mmr, an item identical to one above
    # loses so many nats of log-probability
    candidates: int = 0  # size of the shortlist that pages are made of: the best items for the
    # first slot, found once for each user; 0: all items. For large catalogues
    exclude: str = ""  # item ids that no page may hold, comma-separated, in quotes where one holds
    # a comma; @path: a file of them, one a line
    categories: str = ""  # only items of these categories, separated by |; empty: all
    in_stock: str = ""  # only these item ids, written as for exclude; empty: all
    price_min: float = 0.0  # only items at this price or above;
    # items of unknown price fail any price filter
    price_max: float = math.inf  # only items at this price or below
    seen: str = "hide"  # items that a person has met: hide, no page holds them; allow, a page may
    # hold them again, unless the person disliked them. For shops where people buy things again
    new_items: int = 0  # slots of a page that are kept for new items, the best of them for its user
    new_days: float = NEW_DAYS  # an item is new if its first row lies within so many last days of
    # the log
    all: bool = False  # write a page for every user, to --out
    out: str = ""  # Parquet file to write: user, rank, item, score, page, user_id, item_id, known.
    # A name that ends in /: a directory, in which each day has a folder (date=2026-11-30). An
    # address (s3://bucket/pages/): the file is sent there when it is whole
    pieces: bool = False  # --out names a directory: it gets the parts as files, part-000000.parquet
    # and so on, and an empty _SUCCESS when all are there. For more pages than one file should hold
    depth: int = 0  # ranks of each user in the file; those after the page are ordered by the first
    # slot's logits; 0: as many as k
    batch: int = 256  # users decoded at once
    part: int = 512  # users in a part of the file; an interrupted --all repeats one part at most

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            k=(self.k > 0, "1 or more"),
            policy=check_writer(self.policy),
            mode=(self.mode in ("auto", *MODES), f"auto, {', '.join(MODES)}"),
            **check_variety(self.variety, self.strength),
            **check_new(self.new_items, self.new_days, self.k),
            price_min=(0 <= self.price_min < math.inf, "a price"),
            seen=(self.seen in SEEN, " or ".join(SEEN)),
            price_max=(self.price_max >= self.price_min, f"price_min={self.price_min} or more"),
            candidates=(self.candidates >= 0, "0 or more"),
            depth=(self.depth == 0 or self.depth >= self.k, f"0, or k={self.k} or more"),
            batch=(self.batch > 0, "1 or more"),
            part=(self.part > 0, "1 or more"),
        )
        if self.all and (self.user or self.history):
            raise PageLLMError("--all writes everybody's page; leave out --user and --history")
        if self.all != bool(self.out):
            raise PageLLMError(
                "--all and --out go together: pagellm recommend --all --out pages.parquet"
            )
        if (kind := Path(self.out.partition("?")[0]).suffix.lower()) in OTHER_TABLES:
            raise PageLLMError(
                f"--out {self.out}: pages are written as Parquet, not as {kind}\n"
                '  Name it pages.parquet. For a CSV of it: python -c "import pyarrow.csv as c, '
                "pyarrow.parquet as p; c.write_csv(p.read_table('pages.parquet'), 'pages.csv')\""
            )
        if self.pieces and not self.all:
            raise PageLLMError("--pieces is about everybody's pages: it goes with --all and --out")
        if not (self.all or self.user or self.history):
            raise PageLLMError(
                "whose page? Give --user ID, --history id:rating,... or --all --out pages.parquet"
            )


def parse_history(text: str, known: dict[str, int] | None = None) -> tuple[tuple[str, float], ...]:
    """ "id:rating,id" -> ((id, rating), (id, NaN)). An id with a comma stands in quotes.

    known  ids of the shop; a word that is one of them is an id, even if it holds a colon
    Raises PageLLMError for a rating that is not a number from 1 to 5, or an empty id.
    """
    out = []
    for word in words_in(text):
        item, colon, rating = word.rpartition(":")
        if not colon or (known and word in known):
            item, rating = word, "nan"
        try:
            value = float(rating)
        except ValueError:
            value = math.inf
        if not item or not (1 <= value <= 5 or rating == "nan"):
            raise PageLLMError(
                f"--history {word!r}: want id:rating with a rating from 1 to 5, or a bare id"
            )
        out.append((plain_id(item), value))
    return tuple(out)


def filters_of(config: Config) -> Filters:
    """The options as Filters. Reads the files that --exclude and --in_stock name."""
    return Filters(
        exclude=id_list(config.exclude, "exclude"),
        categories=tuple(words_in(config.categories, "|")) if config.categories else None,
        in_stock=id_list(config.in_stock, "in_stock") if config.in_stock else None,
        price_min=config.price_min or None,
        price_max=config.price_max if config.price_max < math.inf else None,
    )


def page_text(answer: dict, history: list[str]) -> str:
    """An answer as people read it in a terminal."""
    user = answer["user"]
    who = (
        "no user"
        if user["id"] is None
        else f"user {user['id']}"
        if user["known"]
        else f"user {user['id']}, whom the model has not met"
    )
    lines = [
        f"{who} · {answer['policy']} {answer['model']}",
        "history   " + ("; ".join(history) or "none"),
        "",
    ]
    wide = min(60, max([len(s["title"] or s["item"]) for s in answer["items"]], default=0))
    lines += [
        f"{s['rank']:3d}  {(s['title'] or s['item'])[:wide]:<{wide}}  {s['item']}"
        + (f"  {s['token_reward']:+.3f}" if s["token_reward"] is not None else "")
        + (f"  [{s['category']}]" if s["category"] else "")
        + (f"  {s['price']:.2f}" if s["price"] is not None else "")
        for s in answer["items"]
    ]
    number = [
        f"{name} {answer[key]:.3f}"
        for name, key in (
            ("page reward", "page_reward"),
            ("energy", "energy"),
            ("ILD", "ild"),
            ("entropy", "entropy"),
        )
        if answer[key] is not None
    ]
    lines += ["", " · ".join(number), *answer["notes"]]
    for what in ("items", "categories"):
        if answer["unknown"][what]:
            lines.append(f"unknown {what}: {', '.join(answer['unknown'][what])}")
    return "\n".join(lines)


def how(config: Config) -> dict:
    """The options of an Ask that say how its page is written."""
    mode = "" if config.mode == "auto" else config.mode
    return {
        "k": config.k,
        "mode": mode,
        "variety": config.variety,
        "strength": config.strength,
        "new_items": config.new_items,
    }


def show(config: Config) -> None:
    """Print one page."""
    chosen = config.default(config.policy)
    recommender = Recommender.load(
        config,
        (chosen.policy,),
        why=chosen.why,
        candidates=config.candidates,
        new_days=config.new_days,
        seen=config.seen,
    )
    ask = Ask(
        user=plain_id(config.user) if config.user else None,
        history=parse_history(config.history, recommender.item_of) if config.history else (),
        filters=filters_of(config),
        **how(config),
    )
    (answer,) = recommender.answers([ask])
    if isinstance(answer, PageLLMError):
        raise answer
    shown = [recommender.cards[i] for i in recommender.resolve(ask).items[-6:].tolist()]
    print(f"recommend: {recommender.in_words()}")
    print(f"recommend: policy {recommender.choice_in_words()}")
    if ask.user in recommender.left_out.users:
        n = len(recommender.left_out.of(ask.user))
        print(
            f"recommend: {ask.user} is below the k-core, so that the model has no row for them; "
            f"their page follows from {counted(n, 'row')} in {config.data_dir / NAME}"
        )
    print(page_text(answer, [card["title"] or card["item"] for card in shown]))


def everybody(recommender: Recommender, config: Config) -> list[Ask]:
    """An Ask for every user of the data, then for those whom the k-core left out."""
    blank = Ask(None, filters=filters_of(config), **how(config))
    names = (*recommender.shop.user_ids, *recommender.left_out.users)
    return [replace(blank, user=name) for name in names if not is_forgotten(name)]


def ranks(
    recommender: Recommender, config: Config, some: list[ResolvedAsk], depth: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """item, score (B, depth) and filled slots (B,) of some people's pages."""
    name, mode = some[0].policy, some[0].mode
    if not mode:
        made = recommender.compose(name, some, config.k, depth)
        found = made.item, made.score.astype(np.float32), made.slots
        return with_newcomers(recommender, some, *found)
    variety = recommender.variety(config.variety, config.strength)
    pages, legal, short = recommender.write(name, some, config.k, mode, depth, variety)
    item, score = (x.cpu().numpy() for x in ranking(pages, legal, depth, short=short))
    return with_newcomers(recommender, some, item, score, pages.mask.sum(1).cpu().numpy())


def with_newcomers(
    recommender: Recommender,
    some: list[ResolvedAsk],
    item: np.ndarray,
    score: np.ndarray,
    slots: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """item, score (B, depth) and slots (B,), with the new items that --new_items keeps slots for.

    Scores stay with the ranks, whose order they say.
    """
    group = recommender.group(some[0].ask)
    if not group[-1]:
        return item, score, slots
    pages = [row[:n].tolist() for row, n in zip(item, slots, strict=True)]
    fresh = recommender.newcomers(group, some, pages)
    return ranks_with_new(item, slots, fresh, recommender.new, group[-1]), score, slots


def file_rows(recommender: Recommender, config: Config, asks: list[Ask]) -> pa.Table:
    """Rows of the file for some Asks, `config.batch` of them at once."""
    depth, tables = max(config.depth, config.k), []
    for start in range(0, len(asks), config.batch):
        some = [recommender.resolve(ask) for ask in asks[start : start + config.batch]]
        item, score, slots = ranks(recommender, config, some, depth)
        row, place = np.nonzero(item >= 0)
        item, score = item[row, place], score[row, place]
        user = pa.array([a.user for a in some], pa.int32())
        name = pa.array([a.ask.user for a in some], pa.string())
        ids = pa.array(recommender.shop.catalogue.ids, pa.string())
        tables.append(
            pa.table(
                {
                    "user": user.take(pa.array(row)),
                    "rank": (place + 1).astype(np.int32),
                    "item": item.astype(np.int32),
                    "score": score,
                    "page": place < slots[row],
                    "user_id": name.take(pa.array(row)),
                    "item_id": ids.take(pa.array(item)),
                    "known": user.is_valid().take(pa.array(row)),
                }
            )
        )
    return pa.concat_tables(tables)


def remarks(recommender: Recommender, config: Config) -> list[str]:
    """Remarks to print before the file is written.

    Ids and categories of the options that the data do not have, and how many users and items
    of the log have no row in the data.
    """
    found, f = [], filters_of(config)
    for option, names in (("exclude", f.exclude), ("in_stock", f.in_stock or ())):
        if unknown := look_up(names, recommender.item_of)[1]:
            found.append(unknown_names("items", option, unknown, len(names)))
    categories = f.categories or ()
    if unknown := [name for name in categories if name not in recommender.members]:
        found.append(unknown_names("categories", "categories", unknown, len(categories)))
    if why := recommender.why_none(f):
        found.append(why)
    return found + below_the_core(recommender, config.data_dir)


def below_the_core(recommender: Recommender, data_dir: Path) -> list[str]:
    """Lines that count the users and items of the log whom the k-core left out.

    Data that were prepared before their rows were kept have nothing to write their pages from.
    """
    shop, left = recommender.shop, recommender.left_out
    if not (data_dir / NAME).exists():
        rounds = source(data_dir).get("counts", {}).get("k_core") or [{}]
        gone = [
            f"{rounds[0].get(what, have) - have:,} of {rounds[0].get(what, have):,} {what}"
            for what, have in (("users", shop.n_users), ("items", shop.n_items))
            if rounds[0].get(what, have) > have
        ]
        if not gone:
            return []
        return [
            f"{' and '.join(gone)} of the log are below the k-core and have no page: {data_dir} "
            "was prepared by a version that kept no rows of theirs. Remove it and prepare it again"
        ]
    found = []
    if n := len(left.users):
        blank = int((np.diff(left.indptr) == 0).sum())
        found.append(
            f"{n:,} of {n + shop.n_users:,} users of the log are below the k-core: their pages "
            f"follow from their rows in {NAME}, and `known` is false"
            + (f"; {blank:,} of them have no item that the model knows" if blank else "")
        )
    if n := len(left.items):
        found.append(
            f"{n:,} of {n + shop.n_items:,} items of the log are below the k-core and stand on no "
            f"page: {several(left.items)}"
        )
    return found


def unknown_names(what: str, option: str, names: list[str], of: int) -> str:
    """ "unknown items: 2 of the 2 of --exclude, a, b" """
    more = ", ..." if len(names) > 10 else ""
    return (
        f"unknown {what}: {len(names):,} of the {of:,} of --{option}, {', '.join(names[:10])}{more}"
    )


def write_all(config: Config) -> None:
    """Everybody's page, in parts of `config.part` users.

    Process r of torchrun's n writes every n-th part. Whichever process finds all parts there joins
    them, so a run may be carried on with another number of processes.
    """
    target = partition_of(config.out, "" if config.pieces else "pages.parquet")
    if is_remote(config.out):
        home = config.stage("recommend")
        name = safe(target).rpartition("://")[2].lstrip("/")
        # What is on its way lies under the hash of what it is made from: pages of another model
        # are no hindrance.
        out = write_file(config, lambda made_from: home / made_from / name)
        if out is not None:
            for path in [*sorted(out.glob("part-*")), out / SUCCESS] if config.pieces else [out]:
                send(path, beside(target, path.name) if config.pieces else target)
            print(f"recommend: {out} is at {safe(target)}")
            for before in home.glob(f"*/{name}"):
                if before.is_dir() and before != out:
                    shutil.rmtree(before, ignore_errors=True)
                elif before != out:
                    before.unlink(missing_ok=True)
        return
    out = Path(target)
    check_above(out)
    if target != config.out:
        out.parent.mkdir(parents=True, exist_ok=True)
    if not out.parent.is_dir():
        raise PageLLMError(f"--out {out}: there is no directory {out.parent}; make it first")
    write_file(config, lambda made_from: out)


def beside(directory: str, name: str) -> str:
    """The address of a file in a directory at an address, which may have options."""
    path, mark, options = directory.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{options}"


def write_file(config: Config, place: Callable[[str], Path]) -> Path | None:
    """As `write_all`, to the file that `place` names for the hash of what the pages are made from.

    Returns the file if it is whole and this process is the one that has to pass it on, else None.
    """
    config = replace(config, device=str(dist.start(config.device)))
    chosen = config.default(config.policy)
    config = replace(config, policy=chosen.policy)
    recommender = Recommender.load(
        config,
        (config.policy,),
        reward=False,
        why=chosen.why,
        cache=Cache(0),
        candidates=config.candidates,
        new_days=config.new_days,
        seen=config.seen,
    )
    check_size(recommender, config)
    mode = config.mode if config.mode != "auto" else recommender.modes.get(config.policy, "greedy")
    config = replace(config, mode=mode if config.policy in POLICIES else "auto")
    if dist.is_main():
        made_by = recommender.hashes["compose" if config.policy == PLAIN else config.policy]
        print(f"recommend: {config.policy} {made_by}; {split_in_words(config.split, config.seen)}")
        print(f"recommend: policy {recommender.choice_in_words()}")
        for line in remarks(recommender, config):
            print(f"recommend: {line}")
    made_from = identity(recommender, config) | {"why": recommender.why}
    if recommender.left_out.users:  # files of earlier versions have no pages of these users
        made_from["users below the k-core"] = str(len(recommender.left_out.users))
    out = place(
        str(hash_of(tuple(f"{name}={value}" for name, value in made_from.items() if name != "why")))
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(out.name + ".parts")
    note = folder / "made_from.json"
    if config.pieces:  # programs that read a folder of tables pass over names that begin with _
        folder, note = out, out / "_made_from.json"
        refuse_strangers(out)
    elif out.is_dir():
        raise PageLLMError(f"--out {out} is a directory\n  Name a file in it, or add --pieces.")
    if out.exists() and (not config.pieces or (out / SUCCESS).exists()):
        refuse_other(out, made_before(out, note.name), made_from)
        print(f"recommend: {out} is already there")
        return out if dist.is_main() else None
    folder.mkdir(exist_ok=True)
    if note.exists():
        refuse_other(folder, json.loads(note.read_text()), made_from)
    else:
        write_json(note, made_from)
    asks = everybody(recommender, config)
    parts = [asks[at : at + config.part] for at in range(0, len(asks), config.part)]
    files = [folder / f"part-{n:06d}.parquet" for n in range(len(parts))]
    write_parts(
        recommender,
        config,
        list(zip(files, parts, strict=True))[dist.rank() :: dist.world()],
        {"pagellm": json.dumps(made_from)} if config.pieces else {},
    )
    if config.pieces:
        whole = finish(out, files, int(made_from["k"]), len(asks))
    else:
        whole = join(out, folder, files, made_from, len(asks))
    return out if whole else None


def made_before(out: Path, note: str) -> dict:
    """What finished pages, a file or a folder of pieces, were made from."""
    if out.is_dir():
        return json.loads((out / note).read_text())
    try:
        return json.loads((pq.read_schema(out).metadata or {}).get(b"pagellm", b"{}"))
    except pa.ArrowInvalid:  # a file of something else
        return {}


def refuse_strangers(out: Path) -> None:
    """Raise PageLLMError if a folder for pieces is a file, or holds files of something else."""
    if out.exists() and not out.is_dir():
        raise PageLLMError(f"--out {out} is a file\n  With --pieces it names a directory.")
    others = [
        path.name
        for path in (sorted(out.iterdir()) if out.exists() else ())
        if not re.match(r"part-\d{6}\.parquet|[._]", path.name)
    ]
    if others:
        raise PageLLMError(
            f"--out {out} holds files that are no parts of pages: {several(others)}\n"
            "  Name a directory that is empty or not there."
        )


def finish(out: Path, files: list[Path], k: int, pages: int) -> bool:
    """Say that all pieces are there, if they are; -> whether this process was the one to say so."""
    if not all(file.exists() for file in files):
        return False
    with FileLock(out / ".lock"):  # of processes that end together one says so
        if (out / SUCCESS).exists():
            return False
        short = pages - sum(full_pages(pq.read_table(file), k) for file in files)
        (out / SUCCESS).touch()
        print(f"recommend: wrote {out}, {counted(len(files), 'part')}")
        say_short(short, pages, k)
    return True


def check_size(recommender: Recommender, config: Config) -> None:
    """Raise PageLLMError for pages or ranks that the policy cannot write."""
    if config.policy in POLICIES:
        recommender.policies[config.policy].check_room(config.k)
    elif max(config.k, config.depth) > POOL:
        raise PageLLMError(
            f"k={config.k}, depth={config.depth}: {config.policy} ranks {POOL} candidates of a "
            f"user; want at most {POOL}, or --policy sft"
        )


def write_parts(
    recommender: Recommender,
    config: Config,
    parts: list[tuple[Path, list[Ask]]],
    metadata: dict[str, str],
) -> None:
    """Write this process's parts, apart from those that exist already.

    metadata  of each file
    """
    rank, world = dist.rank(), dist.world()
    kept = sum(len(asks) for file, asks in parts if file.exists())
    started = time.perf_counter()
    bar = tqdm(
        total=sum(len(asks) for _, asks in parts),
        initial=kept,
        desc="pages",
        unit="page",
        disable=rank > 0,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
    )
    for file, asks in parts:
        if not file.exists():
            rows = file_rows(recommender, config, asks)
            with atomic(file) as temporary:
                pq.write_table(rows.replace_schema_metadata(metadata or None), temporary)
            bar.update(len(asks))
    bar.close()
    seconds, wrote = time.perf_counter() - started, sum(len(asks) for _, asks in parts) - kept
    rate = (
        f"{counted(wrote, 'page')} in {seconds:.1f} s, {wrote / max(seconds, 1e-9):,.0f} pages/s"
        if wrote
        else "no page left"
    )
    print(f"recommend: {f'process {rank} of {world}: ' if world > 1 else ''}{rate}")


def identity(recommender: Recommender, config: Config) -> dict[str, str]:
    """What the file depends on. Kept in its metadata, so that parts of two files never mix."""
    names = (
        "k",
        "depth",
        "mode",
        "candidates",
        "variety",
        "strength",
        "policy",
        "split",
        "exclude",
        "categories",
        "in_stock",
        "price_min",
        "price_max",
        "part",
    )
    made_from = {name: str(getattr(config, name)) for name in names} | recommender.hashes
    if config.seen != "hide":
        made_from["seen"] = config.seen
    if config.new_items:
        made_from |= {"new_items": str(config.new_items), "new_days": str(config.new_days)}
    filters = filters_of(config)
    for name in ("exclude", "in_stock"):  # their files may change
        made_from[name] = str(hash_of(getattr(filters, name)))
    return made_from


def hash_of(names: tuple[str, ...] | None) -> str | None:
    """16 hex digits of some ids in their order."""
    return None if names is None else hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def refuse_other(path: Path, before: dict, now: dict) -> None:
    """Raise PageLLMError if what is at `path` was made from something else."""
    names = sorted((before.keys() | now.keys()) - {"why"})
    changed = [name for name in names if before.get(name) != now.get(name)]
    if not before:
        raise PageLLMError(
            f"{path} is there, and does not say what it was made from\n"
            f"  Move it away, or name another --out."
        )
    made_of = (*WRITERS, "reward", "data")
    models = [name for name in changed if name in made_of]
    others = [name for name in changed if name not in made_of]
    if changed:
        said = [f"by another model ({', '.join(models)})"] if models else []
        said += [f"with another {', '.join(others)}"] if others else []
        raise PageLLMError(
            f"{path} was made {', '.join(said)}; it was left as it is\n"
            f"  Remove {path}, or name another --out. --out DIRECTORY/ gives each day a folder."
        )


def join(out: Path, folder: Path, files: list[Path], made_from: dict, pages: int) -> bool:
    """All parts -> one file, with one part in memory at a time; nothing if a part is missing.

    Says how many pages are shorter than was asked for; returns whether this process joined them.
    """
    try:
        held = FileLock(folder / "lock").acquire()  # of processes that end together one joins
    except OSError:
        if out.exists():
            return False  # another process has joined them and cleared up
        raise
    with held:
        if joined := not out.exists():
            if not all(file.exists() for file in files):
                return False
            full = write_joined(out, files, made_from)
            print(f"recommend: wrote {out}")
            say_short(pages - full, pages, int(made_from["k"]))
    shutil.rmtree(folder, ignore_errors=True)
    return joined


def say_short(short: int, pages: int, k: int) -> None:
    if short:
        print(
            f"recommend: {short:,} of {pages:,} pages have fewer than {k} "
            "slots: no more items pass the filters"
        )


def full_pages(table: pa.Table, k: int) -> int:
    """How many pages of a table have all their k slots."""
    return pc.sum(pc.and_(pc.equal(table["rank"], k), table["page"])).as_py() or 0


def write_joined(out: Path, files: list[Path], made_from: dict) -> int:
    """Write the parts into one file; -> how many pages in it have all their slots."""
    schema = pq.read_schema(files[0]).with_metadata({"pagellm": json.dumps(made_from)})
    k, full = int(made_from["k"]), 0
    with atomic(out) as beside, pq.ParquetWriter(beside, schema) as writer:
        for file in files:
            table = pq.read_table(file).cast(schema)
            full += full_pages(table, k)
            writer.write_table(table)
    return full


def run(config: Config) -> None:
    """Print a page, or write everybody's."""
    if config.all:
        write_all(config)
    else:
        show(config)


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm recommend"))
