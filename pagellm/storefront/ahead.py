"""Rows and pages of everybody, made ahead and kept, so that a request needs no writer.

Reads   data/<dataset>, runs/<run>/storefront/build and tune
Writes  runs/<run>/storefront/cache/cache.sqlite        see cache.py

    pagellm storefront cache --dataset complete_journey

Kept are: the rows (themes, keywords, candidates) of each bucket, that is of everybody with a long
history, of people alike, and of strangers; and everybody's whole page. The same command carries on
where it was stopped. A new build, new weights, another layout, policy, ranker or week are other
keys: what is stale is never served.
"""

import hashlib
import json
import struct
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, date, datetime
from functools import cached_property, lru_cache

import numpy as np
from tqdm import tqdm

from pagellm.data.shop import SPLITS
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import read_json
from pagellm.stage.hints import counted
from pagellm.stage.run import file_id
from pagellm.storefront.cache import Cache, key_of
from pagellm.storefront.context import week_of
from pagellm.storefront.front import Sources, Store, open_store
from pagellm.storefront.gates import KillSwitch
from pagellm.storefront.page import page, written_ahead
from pagellm.storefront.parts import (
    Candidates,
    Context,
    Decision,
    Keyword,
    Layout,
    Page,
    Theme,
    Written,
    page_json,
)

__all__ = ["Ahead", "Config", "Served", "open_ahead", "page_bytes", "run", "with_time"]

BATCH = 64  # people whose rows and pages are written in one transaction
POOLED = 200  # items of the history that stands for people alike


@dataclass(frozen=True, kw_only=True)
class Served(Sources):
    """Fields of what makes pages for a shop's visitors."""

    split: str = "none"  # orders that are held out. none, for a shop: histories hold every order.
    # test, for research: they hold train orders
    today: str = "data"  # the moment of a page: data, when the orders end; now; or a day as
    # 2017-12-01. Seasons and weeks go by it

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            split=(self.split in ("none", "test"), "none or test"),
            today=(self.today in ("data", "now") or is_day(self.today), "data, now or a day"),
        )


def is_day(text: str) -> bool:
    try:
        return bool(date.fromisoformat(text))
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class Config(Served):
    """Make everybody's rows and pages ahead, into the cache that `serve` reads."""

    people: int = 0  # only so many people, the first ones; 0: all
    micro: int = 1  # with writer=lm: people whose rows the network writes side by side. More are
    # faster and take more memory; the rows are the same

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            people=(self.people >= 0, "0 or more"),
            micro=(
                self.micro > 0 and (self.micro == 1 or self.writer == "lm"),
                "1 or more; above 1 with writer=lm alone",
            ),
        )


def rows_bytes(rows: Sequence[Written]) -> bytes:
    """Rows as bytes: a header of JSON, then the candidates' arrays, compressed."""
    head, arrays = [], []
    for row in rows:
        theme = asdict(row.theme)
        head.append(
            [theme, [asdict(keyword) for keyword in row.keywords], len(row.found.item), row.note]
        )
        found = row.found
        arrays += [found.item.astype("<i4"), found.ret.astype("<f8"), found.agree.astype("<f8")]
        arrays += [found.source.astype("<i1")]
    text = json.dumps(head).encode()
    whole = struct.pack("<I", len(text)) + text + b"".join(a.tobytes() for a in arrays)
    return zlib.compress(whole, 1)


def rows_of(value: bytes, n_items: int) -> list[Written] | None:
    """The inverse of rows_bytes; None for bytes that are no rows of a shop of n_items."""
    try:
        whole = zlib.decompress(value)
        (length,) = struct.unpack_from("<I", whole)
        at, rows = 4 + length, []
        for theme, keywords, n, note in json.loads(whole[4:at]):
            columns = []
            for kind in ("<i4", "<f8", "<f8", "<i1"):
                columns.append(np.frombuffer(whole, kind, n, at))
                at += columns[-1].nbytes
            item, ret, agree, source = columns
            if len(item) and not 0 <= item.min() <= item.max() < n_items:
                return None
            for name in ("concepts", "avoid"):
                theme[name] = tuple(theme[name])
            found = Candidates(item.astype(np.int64), ret, agree, source.astype(np.int64))
            named = tuple(Keyword(**k) for k in keywords)
            rows.append(Written(Theme(**theme), named, found, note))
        return rows if at == len(whole) else None
    except (zlib.error, struct.error, ValueError, TypeError, KeyError):
        return None


def page_bytes(store: Store, found: Page, explain: bool = False) -> bytes:
    """A page as JSON but for its last field, `ms`: see with_time."""
    document = page_json(found, store.front.catalogue.ids, store.front.catalogue.title, explain)
    del document["ms"]
    return json.dumps(document, allow_nan=False, separators=(",", ":")).encode()[:-1]


def with_time(value: bytes, ms: float) -> bytes:
    """The whole document: what page_bytes left, and how long the answer took."""
    return value + b',"ms":{"total":%.3f}}' % ms


def digest(*arrays: np.ndarray) -> str:
    return hashlib.blake2b(b"|".join(a.tobytes() for a in arrays), digest_size=16).hexdigest()


@lru_cache(maxsize=256)
def layout_digest(layout: Layout) -> str:
    return key_of(**asdict(layout))


@dataclass
class Ahead:
    """Pages of one version of a storefront, out of its cache as far as they are there.

    version  of build, weights, ranker, policy and writer; part of every key
    switch   turns themes off when the gates block too many
    at       the moment of a page of which none is asked for
    seed     of titles and draws
    notes    why rows made here were written by another writer than the one that was asked
    """

    store: Store
    cache: Cache
    version: str
    switch: KillSwitch
    at: int
    seed: int = 0
    notes: list[str] = field(default_factory=list)

    @cached_property
    def stock(self) -> str:
        """What is out of stock, as part of a key."""
        return digest(np.flatnonzero(~self.store.front.stock))

    def rows_key(self, bucket: str, layout: Layout, at: int) -> str:
        """A season may begin or end within a week, and titles may name it."""
        return key_of(
            stage="rows",
            version=self.version,
            layout=layout_digest(layout),
            bucket=bucket,
            week=week_of(at),
            season=self.store.known.seasons(at),
            seed=self.seed,
        )

    def page_key(self, context: Context, layout: Layout, seed: int = 0) -> str:
        """Of the page that takes the best item for each slot, and is not explained."""
        return key_of(
            stage="page",
            version=self.version,
            layout=layout_digest(layout),
            user=context.user,
            at=context.at,
            history=digest(context.item, context.count),
            barred=digest(context.barred),
            stock=self.stock,
            static=self.store.front.static,
            seed=seed,
        )

    def rows(self, context: Context, layout: Layout) -> tuple[list[Written] | None, str]:
        """Rows kept for this person, else for people alike, and which: own, segment; None, "".

        A stranger's rows are everybody's, and so are called segment too.
        """
        alike = self.store.known.segment(context.item, context.mission)
        for bucket in dict.fromkeys((context.bucket, alike)):
            value = self.cache.get(self.rows_key(bucket, layout, context.at))
            rows = None if value is None else rows_of(value, self.store.shop.n_items)
            if rows is not None:
                return rows, "own" if bucket.startswith("user:") else "segment"
        return None, ""

    def page(
        self, context: Context, layout: Layout, seed: int = 0, live=False, **drawn
    ) -> tuple[Page, str]:
        """A page, and what its themes came from: own, segment, live, static or off.

        live   where no rows are kept, a writer may be asked now
        drawn  explore, explore_themes and explore_all, as of page.page
        """
        front = self.store.front
        if front.static:
            return page(front, context, layout, seed, **drawn), "off"
        rows, whose = self.rows(context, layout)
        if rows is None and live:
            return page(front, context, layout, seed, **drawn), "live"
        source = "segment" if whose == "segment" else "generated"
        made = page(front, context, layout, seed, written=rows or [], source=source, **drawn)
        if rows is None:
            why = f"no rows are kept for {context.bucket.partition(':')[0]}; static ones instead"
            made = replace(made, fallbacks=(why, *made.fallbacks))
        return made, whose or "static"

    def people(self) -> list[Context]:
        """A context of everybody's."""
        known = self.store.known
        return [known.context(user, at=self.at) for user in known.number]

    def alike(self, people: Sequence[Context]) -> list[Context]:
        """A context for each set of people alike, and a stranger's."""
        known = self.store.known
        sets: dict[str, list[int]] = {}
        for number, context in enumerate(people):
            sets.setdefault(known.segment(context.item, context.mission), []).append(number)
        pooled = [
            self.pooled(name, some) for name, some in sorted(sets.items()) if "cold" not in name
        ]
        return [*pooled, known.context(None, at=self.at)]

    def pooled(self, segment: str, people: list[int]) -> Context:
        """One history that stands for some people: what most of them bought."""
        place, item = self.store.known.rows.flat(np.array(people))
        buyers = np.bincount(item, minlength=self.store.shop.n_items)
        best = np.lexsort((np.arange(len(buyers)), -buyers))[:POOLED]
        best = best[buyers[best] > 0]
        context = self.store.known.context(None, more=best[::-1], at=self.at)
        return replace(context, bucket=segment)

    def fill(self, layout: Layout, people: int = 0, micro: int = 1) -> tuple[int, int]:
        """Make what is missing. Returns how many sets of rows and pages were made.

        people  only so many, the first ones; 0: all
        micro   whose rows are written side by side, by a writer that can
        Raises PageLLMError where they cannot be kept, such as on a full disk.
        """
        everybody = self.people()
        some = everybody[:people] if people else everybody
        work = [*self.alike(everybody), *some]
        made = [0, 0]
        size = max(BATCH, micro)
        with tqdm(total=len(work), desc="rows and pages", unit="bucket", disable=None) as bar:
            for start in range(0, len(work), size):
                batch = work[start : start + size]
                if why := self.cache.put(self.missing(batch, layout, made, micro)):
                    raise PageLLMError(
                        f"{why}\n  What was kept before is whole; when there is room, the same "
                        "command carries on."
                    )
                bar.update(len(batch))
        return made[0], made[1]

    def missing(
        self, people: Sequence[Context], layout: Layout, made: list[int], micro: int = 1
    ) -> list[tuple[str, bytes]]:
        """The entries that buckets and people lack; counts them in made: rows, pages."""
        lack: list[tuple[Context, list[Written] | None, bool]] = []
        for context in people:
            key = self.rows_key(context.bucket, layout, context.at)
            page_key = self.page_key(context, layout, self.seed)
            has_rows, has_page = self.cache.holds([key, page_key])
            if has_rows and (has_page or context.user is None):
                continue
            value = self.cache.get(key) if has_rows else None
            rows = None if value is None else rows_of(value, self.store.shop.n_items)
            lack.append((context, rows, context.user is not None))
        unwritten = [context for context, rows, _ in lack if rows is None]
        written = iter(self.written(unwritten, layout, micro))
        entries = []
        for context, rows, person in lack:
            if rows is None:
                rows, decisions = next(written)
                for decision in decisions:
                    if decision.level == "theme":
                        self.switch.note(decision.action != "pass")
                self.notes += [row.note for row in rows if row.note]
                key = self.rows_key(context.bucket, layout, context.at)
                entries.append((key, rows_bytes(rows)))
                made[0] += 1
            if person:
                entries.append((self.page_key(context, layout, self.seed),
                                self.own_page(context, layout, rows)))  # fmt: skip
                made[1] += 1
        return entries

    def written(
        self, people: Sequence[Context], layout: Layout, micro: int
    ) -> list[tuple[list[Written], list[Decision]]]:
        """Rows of each, and what the gates decided; micro of them side by side."""
        front = self.store.front

        def job(context: Context) -> tuple[list[Written], list[Decision]]:
            return written_ahead(front, context, layout, self.seed)

        table = getattr(front.writer, "table", None)
        return list(map(job, people)) if table is None else table.each(job, people, micro)

    def own_page(self, context: Context, layout: Layout, rows: Sequence[Written]) -> bytes:
        source = "generated" if context.bucket.startswith("user:") else "segment"
        found = page(self.store.front, context, layout, self.seed, written=rows, source=source)
        return page_bytes(self.store, found)

    def coverage(self, layout: Layout) -> dict[str, int]:
        """How many people have a page that is kept, and sets of people alike their rows."""
        people = self.people()
        pages = self.cache.holds([self.page_key(c, layout, self.seed) for c in people])
        own = [c for c in people if c.bucket.startswith("user:")]
        segments = sorted({c.bucket for c in self.alike(people)})
        rows = self.cache.holds([self.rows_key(s, layout, self.at) for s in segments])
        return {
            "people": len(people),
            "with_own_rows": len(own),
            "pages": sum(pages),
            "segments": len(segments),
            "segments_kept": sum(rows),
        }


def moment(config: Served, store: Store) -> int:
    """Seconds since 1970 of the day that a page is made for.

    Raises PageLLMError for a day before the end of the orders: later orders would be known.
    """
    if config.today == "data":
        return store.known.at
    at = int(time.time())
    if config.today != "now":
        at = int(datetime.combine(date.fromisoformat(config.today), datetime.min.time(), UTC)
                 .timestamp())  # fmt: skip
    if at < store.known.at:
        end = datetime.fromtimestamp(store.known.at, UTC).date()
        raise PageLLMError(f"today={config.today}: orders are known up to {end}; want a later day")
    return at


def open_ahead(config: Served) -> Ahead:
    """Read a built storefront and its cache.

    Raises PageLLMError where there is no build, or the moment lies before the orders' end.
    """
    store = open_store(config, SPLITS if config.split == "none" else ("train",))
    front = store.front
    version = key_of(
        **front.models,
        ranker=[front.ranker.name, file_id(config.scores) if config.scores else ""],
        policy=front.policy.name,
        writer=front.writer.name,
        split=config.split,
        **({"nearness": True} if config.nearness else {}),
    )
    cache = Cache(config.stage("storefront/cache") / "cache.sqlite")
    tuned = config.stage("storefront/tune") / "tuned.json"
    usual = read_json(tuned).get("blocked", 0.0) if tuned.exists() else 0.0
    switch = KillSwitch(config.stage("storefront"), usual)
    return Ahead(store, cache, version, switch, moment(config, store), config.seed)


def run(config: Config) -> dict[str, int]:
    """Fill the cache; returns what is there of it."""
    ahead = open_ahead(config)
    try:
        started = time.perf_counter()
        rows, pages = ahead.fill(ahead.store.layout, config.people, config.micro)
        found = ahead.coverage(ahead.store.layout)
        entries, size = ahead.cache.size()
        print(
            f"{ahead.cache.path}: {counted(rows, 'set')} of rows and {counted(pages, 'page')} made "
            f"in {time.perf_counter() - started:.0f} s; {found['pages']:,} of "
            f"{counted(found['people'], 'person', 'people')} have a page, "
            f"{found['segments_kept']} of {counted(found['segments'], 'set')} of people alike have "
            f"rows; {counted(entries, 'entry', 'entries')}, {size / 1e6:.0f} MB",
            flush=True,
        )
        if ahead.notes:
            print(
                f"{counted(len(ahead.notes), 'row')} not written by "
                f"{ahead.store.front.writer.name}: "
                f"{ahead.notes[0]}\n  Kept like others. To have them written again, "
                f"remove {ahead.cache.path} and run this command again.",
                flush=True,
            )
        return found
    finally:
        ahead.cache.close()


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm storefront cache"))
