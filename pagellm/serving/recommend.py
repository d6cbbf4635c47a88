"""Recommend: one person's page in the terminal, or everybody's in one file.

Reads   data/<dataset>, runs/<run>/sft | ppo, runs/<run>/reward
Prints  a page                              pagellm recommend --user A1B2 --k 20
                                            pagellm recommend --history B0001000:5,B0001007:4 --categories "Office"
Writes  pages.parquet                       pagellm recommend --all --out pages.parquet
                                            torchrun --nproc_per_node 2 -m pagellm.serving.recommend --all --out pages.parquet

The same command again carries on where an interrupted `--all` stopped. Seconds for the synthetic shop.
"""

import fcntl
import hashlib
import json
import math
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pagellm.model.decode import ranking
from pagellm.model.policy import MODES
from pagellm.serving.recommender import POLICIES, Ask, Cache, Filters, Recommender, Sources
from pagellm.stage import dist
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import atomic, write_json

__all__ = ["Config", "parse_history", "run"]


@dataclass(frozen=True, kw_only=True)
class Config(Sources):
    """Print one person's page (--user, --history), or write everybody's to a file (--all --out pages.parquet)."""

    INFINITE: ClassVar[tuple[str, ...]] = ("price_max",)

    user: str = ""  # whose page, by the shop's own id; a stranger is served from the history alone
    history: str = ""  # items and ratings 1 to 5, oldest first: id:rating,id:rating;
    # a bare id has no rating
    k: int = 20  # slots of a page
    policy: str = "ppo"  # ppo: with the reward; sft: without it
    mode: str = "greedy"  # greedy, beam, or one_shot
    exclude: str = ""  # item ids that no page may hold, comma-separated
    categories: str = ""  # only items of these categories, separated by |; empty: all
    in_stock: str = ""  # only these item ids, comma-separated; @path: a file of them,
    # one a line; empty: all
    price_min: float = 0.0  # only items at this price or above;
    # items of unknown price fail any price filter
    price_max: float = math.inf  # only items at this price or below
    all: bool = False  # every user of the data set, to --out
    out: str = ""  # Parquet file: user, rank, item, score, page, user_id, item_id
    depth: int = 0  # ranks a user in the file; past the page by the first slot's logits; 0: k
    batch: int = 256  # users decoded at once
    part: int = 512  # users in a part: what an interrupted --all repeats at most

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            k=(self.k > 0, "1 or more"),
            policy=(self.policy in POLICIES, " or ".join(POLICIES)),
            mode=(self.mode in MODES, ", ".join(MODES)),
            price_min=(0 <= self.price_min < math.inf, "a price"),
            price_max=(self.price_max >= self.price_min, f"price_min={self.price_min} or more"),
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
        if not (self.all or self.user or self.history):
            raise PageLLMError(
                "whose page? Give --user ID, --history id:rating,... or --all --out pages.parquet"
            )


def parse_history(text: str, known: dict[str, int] | None = None) -> tuple[tuple[str, float], ...]:
    """ "id:rating,id" -> ((id, rating), (id, NaN)); an id that itself holds a colon is one if `known` has it.

    Raises PageLLMError for a rating that is not a number from 1 to 5, or an empty id.
    """
    out = []
    for word in text.split(","):
        word = word.strip()
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
        out.append((item, value))
    return tuple(out)


def id_list(text: str) -> tuple[str, ...]:
    """Comma-separated ids, or @path of a file with one a line."""
    if not text.startswith("@"):
        return tuple(word.strip() for word in text.split(",") if word.strip())
    try:
        return tuple(
            line.strip()
            for line in Path(text[1:]).read_text(encoding="utf-8").splitlines()
            if line.strip()
        )
    except (OSError, UnicodeDecodeError) as error:
        raise PageLLMError(
            f"--in_stock {text}: cannot be read ({error}); want a text file, one id a line"
        ) from None


def filters_of(config: Config) -> Filters:
    return Filters(
        exclude=id_list(config.exclude),
        categories=tuple(w.strip() for w in config.categories.split("|"))
        if config.categories
        else None,
        in_stock=id_list(config.in_stock) if config.in_stock else None,
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
        f"{s['rank']:3d}  {(s['title'] or s['item'])[:wide]:<{wide}}  {s['item']}  {s['token_reward']:+.3f}"
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


def show(config: Config) -> None:
    recommender = Recommender.load(config, (config.policy,))
    ask = Ask(
        config.user or None,
        parse_history(config.history, recommender.item_of) if config.history else (),
        config.k,
        config.mode,
        config.policy,
        filters_of(config),
    )
    (answer,) = recommender.answers([ask])
    if isinstance(answer, PageLLMError):
        raise answer
    case = recommender.case(ask)
    print(
        page_text(
            answer,
            [
                recommender.cards[i]["title"] or recommender.cards[i]["item"]
                for i in case.items[-6:].tolist()
            ],
        )
    )


def file_rows(recommender: Recommender, config: Config, users: range) -> pa.Table:
    """Rows of pages.parquet for some users, `config.batch` of them at once."""
    shop, tables = recommender.shop, []
    blank = Ask(None, (), config.k, config.mode, config.policy, filters_of(config))
    depth = max(config.depth, config.k)
    for start in range(users.start, users.stop, config.batch):
        some = range(start, min(start + config.batch, users.stop))
        cases = [recommender.case(replace(blank, user=shop.user_ids[u])) for u in some]
        pages, legal = recommender.write(config.policy, cases, config.k, config.mode)
        item, score = (x.cpu().numpy() for x in ranking(pages, legal, depth))
        slots = pages.mask.sum(1).cpu().numpy()
        row, place = np.nonzero(item >= 0)
        user, item, score = np.asarray(some)[row], item[row, place], score[row, place]
        names = [
            pa.array(ids, pa.string()).take(pa.array(index))
            for ids, index in ((shop.user_ids, user), (shop.catalogue.ids, item))
        ]
        tables.append(
            pa.table(
                {
                    "user": user.astype(np.int32),
                    "rank": (place + 1).astype(np.int32),
                    "item": item.astype(np.int32),
                    "score": score,
                    "page": place < slots[row],
                    "user_id": names[0],
                    "item_id": names[1],
                }
            )
        )
    return pa.concat_tables(tables)


def write_all(config: Config) -> None:
    """Everybody's page, in parts of `config.part` users; process r of torchrun's n writes every n-th part.

    Whoever finds all parts there joins them, so a rerun with another number of processes carries on as well.
    """
    out = Path(config.out)
    if not out.parent.is_dir():
        raise PageLLMError(f"--out {out}: there is no directory {out.parent}; make it first")
    config = replace(config, device=str(dist.start(config.device)))
    rank, world = dist.rank(), dist.world()
    recommender = Recommender.load(config, (config.policy,), reward=False, cache=Cache(0))
    recommender.policies[config.policy].check_room(config.k)
    names = (
        "k",
        "depth",
        "mode",
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
    made_from["in_stock"] = str(hash_of(filters_of(config).in_stock))
    if out.exists():
        refuse_other(
            out, json.loads((pq.read_schema(out).metadata or {}).get(b"pagellm", b"{}")), made_from
        )
        print(f"recommend: {out} is already there")
        return
    folder = out.with_name(out.name + ".parts")
    folder.mkdir(exist_ok=True)
    note = folder / "made_from.json"
    if note.exists():
        refuse_other(folder, json.loads(note.read_text()), made_from)
    else:
        write_json(note, made_from)
    n_users = recommender.shop.n_users
    parts = [
        range(start, min(start + config.part, n_users)) for start in range(0, n_users, config.part)
    ]
    files = [folder / f"part-{start:06d}.parquet" for start in range(len(parts))]
    mine = list(zip(files, parts, strict=True))[rank::world]
    kept = sum(len(users) for file, users in mine if file.exists())
    started = time.perf_counter()
    bar = tqdm(
        total=sum(len(users) for _, users in mine),
        initial=kept,
        desc="pages",
        unit="page",
        disable=rank > 0,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
    )
    for file, users in mine:
        if not file.exists():
            rows = file_rows(recommender, config, users)
            with atomic(file) as beside:
                pq.write_table(rows, beside)
            bar.update(len(users))
    bar.close()
    seconds, wrote = time.perf_counter() - started, sum(len(users) for _, users in mine) - kept
    rate = (
        f"{wrote:,} pages in {seconds:.1f} s, {wrote / max(seconds, 1e-9):,.0f} pages/s"
        if wrote
        else "no page left"
    )
    print(f"recommend: {f'process {rank} of {world}: ' if world > 1 else ''}{rate}")
    join(out, folder, files, made_from)


def hash_of(names: tuple[str, ...] | None) -> str | None:
    return None if names is None else hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def refuse_other(path: Path, before: dict, now: dict) -> None:
    changed = [name for name in sorted(now) if before.get(name) != now[name]]
    if changed:
        raise PageLLMError(
            f"{path} was made with another {', '.join(changed)}\n"
            f"  Remove {path}, or name another --out."
        )


def join(out: Path, folder: Path, files: list[Path], made_from: dict) -> None:
    """All parts -> one file, a part in memory at a time; nothing while a part is missing."""
    try:
        lock = open(folder / "lock", "w")
    except FileNotFoundError:
        return  # another process has joined them and cleared up
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of processes that end together one joins
        if out.exists():
            shutil.rmtree(folder, ignore_errors=True)
            return
        if not all(file.exists() for file in files):
            return
        schema = pq.read_schema(files[0]).with_metadata({"pagellm": json.dumps(made_from)})
        with atomic(out) as beside, pq.ParquetWriter(beside, schema) as writer:
            for file in files:
                writer.write_table(pq.read_table(file).cast(schema))
        shutil.rmtree(folder)
        print(f"recommend: wrote {out}")


def run(config: Config) -> None:
    """Print a page, or write everybody's."""
    if config.all:
        write_all(config)
    else:
        show(config)


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm.serving.recommend"))
