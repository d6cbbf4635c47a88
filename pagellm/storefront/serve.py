"""Serve: pages of rows over HTTP, and a page in the browser. Needs the extra [serve].

Reads   data/<dataset>, runs/<run>/storefront/build, tune and cache

    make storefront-serve       pagellm storefront cache, then pagellm storefront serve --port 8000
    curl -d '{"user": "U0001000"}' -H 'content-type: application/json' \\
         http://127.0.0.1:8000/v1/storefront

A page comes out of the cache, or is ranked from rows that were made ahead, for this person, people
alike or strangers; where none are kept it is static. No writer is asked in a request, unless with
--live. When the storefront is built or tuned anew, it is taken up between two requests. api.py has
the HTTP side.
"""

import asyncio
import dataclasses
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from pagellm.serving import serve as pages
from pagellm.serving.filters import Filters, allowed_items, category_members, look_up
from pagellm.serving.http_options import (
    HttpOptions,
    address,
    answer_until_stopped,
    listen,
    needs_web,
    warn_if_open,
)
from pagellm.serving.recommender import no_observer
from pagellm.stage import collector
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.hints import counted
from pagellm.stage.run import file_id
from pagellm.storefront import gates
from pagellm.storefront.ahead import Ahead, Served, open_ahead, page_bytes, with_time
from pagellm.storefront.ask import FrontAsk
from pagellm.storefront.build import read_items
from pagellm.storefront.front import check_layout, read_layout
from pagellm.storefront.making import default_layout
from pagellm.storefront.page import page
from pagellm.storefront.parts import Context, Keyword, Layout, Page, Theme
from pagellm.storefront.retrieve import members_first, retrieve
from pagellm.storefront.schemas import layout_of

__all__ = ["Config", "FrontService", "run"]

log = logging.getLogger("pagellm")
LIVE_SECONDS = 2.0  # a writer that is asked in a request has so long
KEEP_EVERY = 1.0  # seconds between two writes of pages that were made in requests
SHOWN = 10  # items that a merchandiser's own row is shown with


@dataclass(frozen=True, kw_only=True)
class Config(Served, HttpOptions):
    """Serve pages of rows over HTTP until stopped.

    Without --api_key there is no log-in: keep the service on loopback or behind a proxy.
    """

    layouts: str = ""  # more layout files (JSON), comma-separated; requests name them by their id
    stock: str = ""  # file with an item's id a line that is out of stock now; read again when it
    # changes
    live: bool = False  # where no rows are kept, ask the writer in a request, for two seconds at
    # most
    both: bool = False  # PageLLM's own pages too, where its stages are there: POST /v1/page, and /
    workers: int = 1  # threads that make pages which are not in the cache

    def __post_init__(self):
        super().__post_init__()
        check(self, workers=(self.workers > 0, "1 or more"))


class FrontService:
    """Asks in, pages out. A cached page is looked up at once; others are made by `workers` threads.

    observe  called with (event, value): "page:<where from>" and its seconds, "gate:<rule>:<action>"
             "row:<source>" and "fallbacks" and a number, "swap", "swap_failed", "timeout", "busy"
             and 1
    """

    def __init__(self, config: Config, observe: Callable[[str, float], None] = no_observer):
        self.config, self.observe = config, observe
        self.ahead = self.load()
        self.layouts = self.read_layouts()
        self.seen = self.on_disk()
        self.pool: ThreadPoolExecutor | None = None
        self.closed = threading.Event()
        self.waits = 0
        self.fresh: list[tuple[str, bytes]] = []  # pages made in requests, not kept yet
        self.watcher: threading.Thread | None = None
        self.reported: object = None
        self.looks: Counter[str] = Counter()  # of the gates since the start, by rule
        self.blocks: Counter[str] = Counter()  # those that were no pass

    def load(self) -> Ahead:
        """What is built and tuned now, without what is out of stock now."""
        ahead = open_ahead(self.config)
        if self.config.stock:
            front = ahead.store.front
            # That nothing is left is no mistake here: it is an empty page, which says so.
            stock = front.stock & ~read_items(self.config.stock, front.catalogue, "stock")
            front = replace(front, stock=stock)
            ahead = replace(ahead, store=replace(ahead.store, front=front))
        catalogue = ahead.store.front.catalogue
        self.item_of = {name: at for at, name in enumerate(catalogue.ids)}
        self.members = category_members(catalogue)
        self.price = torch.from_numpy(np.asarray(catalogue.price, dtype=np.float64))
        self.priced = bool(self.price.isfinite().any())
        return ahead

    def read_layouts(self) -> dict[str, Layout]:
        """Layouts by id. Raises PageLLMError for a file that is none, or an id there twice."""
        own = self.ahead.store.layout
        found = {own.id: own}
        for name in "AB":
            found.setdefault(name, default_layout(name))
        for path in filter(None, self.config.layouts.split(",")):
            layout = read_layout(path, True)
            check_layout(self.ahead.store.front, layout)
            if found.get(layout.id, layout) != layout:
                raise PageLLMError(f"{path}: there is another layout {layout.id!r}; rename one")
            found[layout.id] = layout
        return found

    def start(self) -> None:
        """Start the threads."""
        self.pool = ThreadPoolExecutor(self.config.workers, thread_name_prefix="storefront")
        self.watcher = threading.Thread(target=self.watch, name="watch", daemon=True)
        self.watcher.start()

    def close(self) -> None:
        """Answer the requests that wait, then stop."""
        self.closed.set()
        if self.pool is not None:
            self.pool.shutdown(wait=True)
        if self.watcher is not None:
            self.watcher.join()
        self.keep()
        self.ahead.cache.close()

    def ready(self) -> bool:
        """Whether pages can be asked for."""
        return self.pool is not None and not self.closed.is_set()

    def waiting(self) -> int:
        """Requests whose page is being made or waits for it."""
        return self.waits

    # Answers.

    async def answer(self, ask: FrontAsk) -> tuple[bytes, str]:
        """The page as JSON, and where it came from: page, own, segment, live, static or off.

        Raises PageLLMError for an ask that cannot be met, frame.Busy and frame.TooSlow.
        """
        from pagellm.serving.frame import Busy, TooSlow

        started = time.perf_counter()
        ahead = self.now(ask.static)
        context, layout, notes = self.resolve(ask, ahead)
        if ask.plain:
            value = ahead.cache.get(ahead.page_key(context, layout, self.seed_of(ask)))
            if value is not None:
                return self.done(value, "page", started)
        if self.closed.is_set() or self.pool is None or self.waits >= self.config.queue:
            self.observe("busy", 1)
            raise Busy
        self.waits += 1
        future: Future = self.pool.submit(self.make, ask, ahead, context, layout, notes)
        future.add_done_callback(lambda _: self.one_less())
        try:
            value, how = await asyncio.wait_for(asyncio.wrap_future(future), self.config.timeout)
        except TimeoutError:
            self.observe("timeout", 1)
            raise TooSlow from None
        return self.done(value, how, started)

    def one_less(self) -> None:
        self.waits -= 1

    def done(self, value: bytes, how: str, started: float) -> tuple[bytes, str]:
        seconds = time.perf_counter() - started
        self.observe(f"page:{how}", seconds)
        return with_time(value, 1000 * seconds), how

    def now(self, static: bool) -> Ahead:
        """The version served now; without themes where that was asked for, or is switched off."""
        ahead = self.ahead
        if static or (not ahead.store.front.static and ahead.switch.is_off()):
            front = replace(ahead.store.front, static=True)
            return replace(ahead, store=replace(ahead.store, front=front))
        return ahead

    def seed_of(self, ask: FrontAsk) -> int:
        return self.config.seed if ask.seed is None else ask.seed

    def resolve(self, ask: FrontAsk, ahead: Ahead) -> tuple[Context, Layout, list[str]]:
        """Whom the page is for and how it is laid out, and notes on what is not known."""
        at = ahead.at if ask.at is None else ask.at
        known = ahead.store.known
        if at < known.at:
            day = datetime.fromtimestamp(known.at, UTC).date()
            raise PageLLMError(
                f"at: orders are known up to {known.at} ({day}); want that second or later"
            )
        notes = []
        more, unknown = look_up(ask.more, self.item_of)
        if ask.user is not None and ask.user not in known.number:
            notes.append("this user is not known")
        if unknown:
            notes.append(f"items not known: {', '.join(name[:80] for name in unknown[:20])}")
        if {ask.filters.price_min, ask.filters.price_max} != {None} and not self.priced:
            notes.append("no item has a price: the filter by price leaves nothing")
        barred = self.barred(ask.filters)
        context = known.context(ask.user, barred, np.array(more, dtype=np.int64), at)
        if ask.layout is None:
            return context, ahead.store.layout, notes
        if isinstance(ask.layout, dict):
            return context, layout_of(ask.layout), notes
        if ask.layout not in self.layouts:
            raise PageLLMError(
                f"layout: there is no {ask.layout!r:.80}; there are {', '.join(self.layouts)}"
            )
        return context, self.layouts[ask.layout], notes

    def barred(self, filters: Filters) -> np.ndarray:
        """(E,) int64 items that the filters keep off the page, rising."""
        allowed = allowed_items(filters, self.item_of, self.members, self.price)
        gone = look_up(filters.exclude, self.item_of)[0]
        if allowed is None:
            return np.unique(np.array(gone, dtype=np.int64))
        mask = allowed.numpy().copy()
        mask[gone] = False
        return np.flatnonzero(~mask)

    def make(
        self, ask: FrontAsk, ahead: Ahead, context: Context, layout: Layout, notes: list[str]
    ) -> tuple[bytes, str]:
        """A page that is not in the cache."""
        seed = self.seed_of(ask)
        live = self.config.live and not ahead.store.front.static
        if live and ahead.rows(context, layout)[0] is None:
            made = self.within(LIVE_SECONDS, ahead, context, layout, seed, ask.drawn)
        else:
            made = None
        found, how = made or ahead.page(context, layout, seed, **ask.drawn)
        if how == "off" and not ask.static and ahead.switch.is_off():
            notes = [*notes, "themes are switched off; static rows instead"]
        self.count(found, how, ahead)
        found = dataclasses.replace(found, fallbacks=(*notes, *found.fallbacks))
        value = page_bytes(ahead.store, found, ask.explain)
        if ask.plain and how in ("own", "segment", "live"):
            self.fresh.append((ahead.page_key(context, layout, seed), value))
        return value, how

    def within(
        self, seconds: float, ahead: Ahead, context: Context, layout: Layout, seed, drawn: dict
    ) -> tuple[Page, str] | None:
        """The page that a writer makes now; None where it fails or takes longer."""
        box: list[tuple[Page, str]] = []

        def ask() -> None:
            try:
                box.append(ahead.page(context, layout, seed, live=True, **drawn))
            except Exception as error:  # a writer may fail in any way; the page is made without it
                log.error("writer", extra={"fields": {"type": type(error).__name__}})

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(seconds)
        if not box:
            self.observe("writer_failed", 1)
        return box[0] if box else None

    def count(self, found: Page, how: str, ahead: Ahead) -> None:
        """Meters of a page that was made, and the kill switch's look at live themes."""
        for row in found.rows:
            self.observe(f"row:{row.source}", 1)
        for decision in found.decisions:
            self.looks[decision.rule] += 1
            if decision.action != "pass":
                self.blocks[decision.rule] += 1
                self.observe(f"gate:{decision.rule}:{decision.action}", 1)
            if how == "live" and decision.level == "theme":
                ahead.switch.note(decision.action != "pass")
        self.observe("fallbacks", len(found.fallbacks))

    # A merchandiser's own row.

    def check(self, title: str, concepts: list[str], keywords: list[str], intent: str) -> dict:
        """What the gates say of a row, and the items that strangers would see in it."""
        front = self.ahead.store.front
        theme = Theme(title, intent, tuple(concepts))
        decisions = gates.check_text(title, "", front.policy, front.known)
        if intent == "editorial":  # a person may use words that the catalogue does not know
            decisions = [decision for decision in decisions if decision.rule != "known"]
        decisions += gates.check_theme(theme, (), None, front.policy)
        names = list(dict.fromkeys(keywords or concepts))
        corpus, context = front.corpus, self.ahead.store.known.context(None, at=self.ahead.at)
        wanted = [
            corpus.keyword(corpus.number[name], 0.9 - 0.05 * k)
            for k, name in enumerate(names)
            if name in corpus.number
        ]
        stay: list[Keyword] = []
        if wanted:
            stay, more = gates.check_keywords(
                wanted,
                corpus,
                context,
                front.policy.min_items,
                front.policy,
                generated=intent != "editorial",
            )
            decisions += more
        logit = front.ranker(context)
        found = retrieve(front.index, stay, context, logit, 50, front.stock)
        items = members_first(found.item, logit, SHOWN)
        catalogue = front.catalogue
        return {
            "passes": not gates.blocked(decisions) and bool(stay),
            "decisions": [dataclasses.asdict(d) for d in decisions],
            "keywords": [dataclasses.asdict(k) for k in stay],
            "unknown": [name for name in names if name not in corpus.number],
            "items": [{"id": catalogue.ids[i], "title": catalogue.title[i]} for i in items],
        }

    def state(self) -> dict:
        """What is served: versions, what is kept, whether themes are on."""
        ahead = self.ahead
        front = ahead.store.front
        folder = ahead.switch.folder
        entries, size = ahead.cache.size()
        return {
            "writer": front.writer.name,
            "ranker": front.ranker.name,
            "policy": front.policy.name,
            "models": dict(front.models),
            "version": ahead.version,
            "at": ahead.at,
            "split": self.config.split,
            "layout": ahead.store.layout.id,
            "live": self.config.live,
            "themes_on": not (front.static or ahead.switch.is_off()),
            "switch": "off" if ahead.switch.is_off() else "on",
            "how_to_turn_on": f"remove off and off.json in {folder.name}",
            "cache": {
                "entries": entries,
                "bytes": size,
                "hits": ahead.cache.hits,
                "misses": ahead.cache.misses,
                "trouble": bool(ahead.cache.trouble),
            },
            "coverage": ahead.coverage(ahead.store.layout),
            "looks": dict(self.looks),
            "blocked": {rule: n / self.looks[rule] for rule, n in self.blocks.items()},
        }

    # What changes on disk.

    def on_disk(self) -> tuple[Any, ...] | None:
        """Ids of what is read; None while a part of it is being made anew."""
        config, found = self.config, []
        try:
            found.append(file_id(config.stage("storefront/build") / "done"))
            found.append(file_id(config.data_dir / "source.json"))
            if config.ranker == "lightgbm":
                found.append(file_id(config.stage("storefront/trees") / "done"))
            others = (config.stock, config.deals, config.sponsored, config.rewards, config.scores)
            found += [file_id(path) for path in others if path]
        except OSError:
            return None
        tuned = config.stage("storefront/tune") / "tuned.json"
        return (*found, file_id(tuned) if tuned.exists() else "")

    def watch(self) -> None:
        """The thread that keeps fresh pages and looks for what was made anew."""
        looked = time.monotonic()
        while not self.closed.wait(KEEP_EVERY):
            self.keep()
            if self.config.reload and time.monotonic() - looked >= self.config.reload:
                looked = time.monotonic()
                self.take_up()

    def keep(self) -> None:
        """Write the pages that requests have left."""
        fresh, self.fresh = self.fresh, []
        if fresh and self.ahead.cache.put(fresh):
            self.observe("cache_trouble", 1)

    def take_up(self) -> bool:
        """Load what was made anew, try it, then swap. True if swapped."""
        found = self.on_disk()
        if found is None or found == self.seen:
            return False
        try:
            fresh = self.load()
            page(fresh.store.front, fresh.store.known.context(None), fresh.store.layout)
        except Exception as error:
            # Half-written or broken: the old version goes on. Said once, tried again at every look.
            if self.reported != found:
                self.reported = found
                self.observe("swap_failed", 1)
                fields = {"type": type(error).__name__, "why": str(error)[:300]}
                log.error("swap_failed", extra={"fields": fields})
            return False
        old, self.ahead, self.seen = self.ahead, fresh, found
        self.layouts[fresh.store.layout.id] = fresh.store.layout
        old.cache.close()
        self.observe("swap", 1)
        log.info("swap", extra={"fields": {"models": fresh.store.front.models}})
        return True


def page_service(config: Config) -> pages.Service | None:
    """PageLLM's own service, of the same run; None where its stages are not there."""
    names = {f.name for f in dataclasses.fields(HttpOptions)}
    same = {name: getattr(config, name) for name in names}
    try:
        return pages.Service(pages.Config(**same | {"split": config.split, "preset": "none"}))
    except PageLLMError as error:
        print(f"  without PageLLM's own pages: {error}", flush=True)
        return None


def run(config: Config) -> None:
    """Serve until SIGINT or SIGTERM; requests under way are answered first."""
    needs_web()
    with collector.paused():
        from pagellm.serving.middleware import json_logs
        from pagellm.storefront.api import make_app

        service = FrontService(config)
    sock = listen(config.host, config.port)
    json_logs(config.log)
    warn_if_open(config, sock)
    ahead = service.ahead
    kept = ahead.coverage(ahead.store.layout)
    print(f"Storefront: {address(sock)}storefront   (Ctrl+C stops)", flush=True)
    print(
        f"  layout {ahead.store.layout.id}, ranker {ahead.store.front.ranker.name}; "
        f"kept: {kept['pages']:,} pages of {counted(kept['people'], 'person', 'people')}, rows of "
        f"{kept['segments_kept']} of {counted(kept['segments'], 'set')} of people alike",
        flush=True,
    )
    if not kept["segments_kept"]:
        print(f"  pages are static until this has run: {config.make('storefront cache')}")
    both = page_service(config) if config.both else None
    answer_until_stopped(make_app(service, both), sock, config)


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm storefront serve"))
