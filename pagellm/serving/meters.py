"""What a monitor reads at /metrics: requests, batches, caches, and what stands on the pages.

No meter names a person or an item. Needs the extra [serve].
"""

import threading
from collections import Counter as Tally
from collections import deque
from collections.abc import Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    Summary,
    disable_created_metrics,
    generate_latest,
)

__all__ = ["FINE", "FrameMeters", "LastPages", "Meters"]


class LastPages:
    """How varied the last pages are, by counts of their items.

    room  pages that are remembered; an older page is forgotten
    """

    def __init__(self, room: int = 1000):
        self.room = room
        self.pages: deque[tuple[str, ...]] = deque()
        self.shown: Tally[str] = Tally()
        self.lock = threading.Lock()  # /metrics is read by another thread than answers are written

    def add(self, items: Sequence[str]) -> None:
        """Remember a page's items."""
        with self.lock:
            self.pages.append(tuple(items))
            self.shown.update(items)
            while len(self.pages) > self.room:
                for item in self.pages.popleft():
                    self.shown[item] -= 1
                    if not self.shown[item]:
                        del self.shown[item]

    def distinct(self) -> int:
        """Items that stand on at least one of the pages."""
        with self.lock:
            return len(self.shown)

    def top_share(self) -> float:
        """The share of the pages that hold the item which most of them hold; 0 without pages."""
        with self.lock:
            return max(self.shown.values(), default=0) / max(len(self.pages), 1)


FINE = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class FrameMeters:
    """Prometheus meters of any service: its requests, the time they take, events.

    events  names that are counted from 0 on
    """

    def __init__(self, events: Sequence[str] = ("timeout", "busy", "fault")):
        disable_created_metrics()
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.requests = Counter(
            "pagellm_requests",
            "Answered requests",
            ("route", "method", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "pagellm_request_seconds",
            "From the first byte read to the last byte sent",
            ("route",),
            buckets=FINE,
            registry=self.registry,
        )
        self.events = Counter(
            "pagellm_events",
            "Swaps, failed swaps, time-outs, refusals",
            ("event",),
            registry=self.registry,
        )
        for event in events:
            self.events.labels(event)

    def observe(self, what: str, value: float) -> None:
        """Count an event."""
        self.events.labels(what).inc(value)

    def text(self) -> bytes:
        """All meters in Prometheus' text format."""
        return generate_latest(self.registry)


class Meters(FrameMeters):
    """Meters of the service of pages (serve.Service) beside those of any service."""

    def __init__(self, service):
        super().__init__(("swap", "swap_failed", "timeout", "busy", "fault"))
        self.stages = Histogram(
            "pagellm_stage_seconds",
            "Cost of the parts of a batch",
            ("stage",),
            buckets=FINE,
            registry=self.registry,
        )
        self.batch = Histogram(
            "pagellm_batch_pages",
            "Pages written at once",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=self.registry,
        )
        for name, what, read in (
            ("waiting", "Requests that wait for a batch", service.waiting),
            ("cache_bytes", "Prompt columns and user states kept", lambda: service.cache.size),
            ("cache_entries", "The same, counted", lambda: len(service.cache)),
            ("cache_hits", "Look-ups answered", lambda: service.cache.hits),
            ("cache_misses", "Look-ups not answered", lambda: service.cache.misses),
        ):
            Gauge(f"pagellm_{name}", what, registry=self.registry).set_function(read)
        self.model = Gauge(
            "pagellm_model",
            "1 for the weights being served",
            ("policy", "hash"),
            registry=self.registry,
        )
        self.add_page_meters()
        self.service = service

    def add_page_meters(self) -> None:
        """Meters of what is written: their alarms tell a shop that its pages have gone bad."""
        self.pages = Counter(
            "pagellm_pages",
            "Pages written; user: known, or a stranger",
            ("policy", "user"),
            registry=self.registry,
        )
        self.short = Counter(
            "pagellm_short_pages",
            "Pages with fewer slots than were asked for",
            ("policy",),
            registry=self.registry,
        )
        self.unknown = Counter(
            "pagellm_unknown",
            "Names in requests that the model does not know",
            ("what",),
            registry=self.registry,
        )
        for what in ("user", "items", "categories"):
            self.unknown.labels(what)
        # A Summary: a Histogram with buckets below 0 would give no sum.
        self.reward = Summary(
            "pagellm_page_reward",
            "Rewards of the pages, in reward-model units; sum over count is their mean",
            ("policy",),
            registry=self.registry,
        )
        self.last = LastPages()
        for name, what, read in (
            ("distinct_items", "Items on the last 1,000 pages", self.last.distinct),
            (
                "top_item_share",
                "Share of the last 1,000 pages that hold the commonest item",
                self.last.top_share,
            ),
        ):
            Gauge(f"pagellm_{name}", what, registry=self.registry).set_function(read)

    def count_page(self, answer: dict, k: int | None) -> None:
        """Count a page that was answered.

        answer  what Recommender.answers gives
        k       the slots that were asked for; None: the page was given, and only scored
        """
        unknown = answer["unknown"]
        self.unknown.labels("user").inc(unknown["user"])
        for what in ("items", "categories"):
            self.unknown.labels(what).inc(len(unknown[what]))
        if k is None:
            return
        policy = answer["policy"]
        self.pages.labels(policy, "known" if answer["user"]["known"] else "stranger").inc()
        self.short.labels(policy).inc(len(answer["items"]) < k)
        if answer["page_reward"] is not None:
            self.reward.labels(policy).observe(answer["page_reward"])
        self.last.add([slot["item"] for slot in answer["items"]])

    def observe(self, what: str, value: float) -> None:
        """Count a report of Service: a batch's pages, a stage's seconds, or an event."""
        if what == "batch":
            self.batch.observe(value)
        elif what in ("prompt", "decode", "reward", "metrics"):
            self.stages.labels(what).observe(value)
        else:
            super().observe(what, value)

    def text(self) -> bytes:
        """All meters in Prometheus' text format."""
        self.model.clear()
        for name, hash_ in self.service.recommender.hashes.items():
            self.model.labels(name, hash_).set(1)
        return super().text()
