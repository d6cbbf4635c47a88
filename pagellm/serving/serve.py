"""Serve: pages over HTTP, and a page in the browser to look at them. Needs the extra [serve].

Reads   data/<dataset>, runs/<run>/compose, ppo and sft, runs/<run>/reward; what is there of these,
        at least one policy

    make serve          pagellm serve --dataset synthetic --port 8000
    curl -d '{"user": "U0001000", "k": 5}' -H 'content-type: application/json' \\
         http://127.0.0.1:8000/v1/page

Requests that wait together are written together. When a stage is trained anew, or for the first
time, its weights are taken up between two batches, so every answer comes from one model: the one
whose hash it names. api.py has the HTTP side.
"""

import asyncio
import ctypes
import json
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from pagellm.serving.cache import Cache
from pagellm.serving.filters import SEEN
from pagellm.serving.http_options import (
    HttpOptions,
    address,
    answer_until_stopped,
    listen,
    needs_web,
    warn_if_open,
)
from pagellm.serving.newcomers import NEW_DAYS, check_new
from pagellm.serving.recommender import Ask, Recommender, no_observer
from pagellm.serving.sources import WRITERS, Sources
from pagellm.stage import collector
from pagellm.stage.command import main
from pagellm.stage.config import check
from pagellm.stage.run import file_id

__all__ = ["Config", "Service", "run"]


log = logging.getLogger("pagellm")


@dataclass(frozen=True, kw_only=True)
class Config(Sources, HttpOptions):
    """Serve pages over HTTP until stopped.

    Without --api_key there is no log-in: keep the service on loopback or behind a proxy.
    """

    batch: int = 32  # pages written in one batch, at most
    max_k: int = 100  # most slots that a request may ask for; the model's context may allow fewer
    width: int = 4  # pages that a beam search keeps
    candidates: int = 0  # size of the shortlist that pages are made of: the best items for the
    # first slot, found once for each page; 0: all items. For large catalogues
    seen: str = "hide"  # items that a person has met: hide, no page holds them; allow, a page may
    # hold them again, unless the person disliked them; a request may say the other
    new_items: int = 0  # slots of a page that are kept for new items, the best of them for its
    # user; a request may say another number
    new_days: float = NEW_DAYS  # an item is new if its first row lies within so many last days of
    # the log
    cache_mb: int = 128  # memory for cached prompts and user states, in MiB
    threads: int = 0  # CPU threads that write a batch; 0: torch's choice

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            batch=(self.batch > 0, "1 or more"),
            max_k=(self.max_k > 0, "1 or more"),
            width=(self.width > 0, "1 or more"),
            candidates=(self.candidates >= 0, "0 or more"),
            seen=(self.seen in SEEN, " or ".join(SEEN)),
            **check_new(self.new_items, self.new_days, self.max_k),
            cache_mb=(self.cache_mb >= 0, "0 or more"),
            threads=(self.threads >= 0, "0 or more"),
        )


TRIM_EVERY = 10.0  # seconds between two calls of trim_memory


def trim_memory() -> None:
    """Hand free memory back to the system (with glibc; elsewhere nothing happens).

    A full cache replaces prompts by others of other lengths, which leaves growing gaps in memory.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


@dataclass
class Job:
    """An Ask that waits, and the future that its answer is set on."""

    ask: Ask
    future: Future


class Service:
    """Asks in, answers out: one thread writes batches, another looks for new weights.

    observe  called with (event, value): "batch" and its number of pages, a stage of the Recommender
             and its seconds, or "swap", "swap_failed", "timeout", "busy" and 1
    """

    def __init__(self, config: Config, observe: Callable[[str, float], None] = no_observer):
        self.config, self.observe = config, observe
        self.cache = Cache(config.cache_mb << 20)
        self.recommender = self.load()
        self.jobs: deque[Job] = deque()
        self.change = threading.Condition()
        self.closed = threading.Event()
        self.threads: list[threading.Thread] = []
        self.passed_over: dict[str, str] | None = None
        self.reported: str | None = None  # the state on disk whose failed swap has been logged

    def load(self) -> Recommender:
        """Everything that is finished now."""
        return Recommender.load(
            self.config,
            cache=self.cache,
            width=self.config.width,
            candidates=self.config.candidates,
            seen=self.config.seen,
            new_items=self.config.new_items,
            new_days=self.config.new_days,
            observe=lambda stage, seconds: self.observe(stage, seconds),
        )

    def start(self) -> None:
        """Start the threads."""
        work = [self.run_batches] + ([self.watch] if self.config.reload else [])
        self.threads = [threading.Thread(target=f, name=f.__name__, daemon=True) for f in work]
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        """Answer the requests that wait, then stop."""
        self.closed.set()
        with self.change:
            self.change.notify_all()
        for thread in self.threads:
            thread.join()

    def ready(self) -> bool:
        """Whether pages can be asked for."""
        return bool(self.threads) and self.threads[0].is_alive() and not self.closed.is_set()

    def waiting(self) -> int:
        """Requests that wait for a batch."""
        return len(self.jobs)

    async def answer(self, ask: Ask) -> dict:
        """What Recommender.answers gives for it.

        Raises PageLLMError for an ask that cannot be met, frame.Busy and frame.TooSlow.
        """
        from pagellm.serving.frame import Busy, TooSlow

        future: Future = Future()
        with self.change:
            if self.closed.is_set() or len(self.jobs) >= self.config.queue:
                self.observe("busy", 1)
                raise Busy
            self.jobs.append(Job(ask, future))
            self.change.notify()
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self.config.timeout)
        except TimeoutError:
            self.observe("timeout", 1)
            raise TooSlow from None

    def next_batch(self) -> list[Job]:
        """Wait for a job; return it and those that can go with it, oldest first.

        [] when the service is closed and no job waits.
        """
        with self.change:
            while not self.jobs and not self.closed.is_set():
                self.change.wait()
            if not self.jobs:
                return []
            group = self.recommender.group(self.jobs[0].ask)
            taken: list[Job] = []
            left: deque[Job] = deque()
            for job in self.jobs:
                fits = len(taken) < self.config.batch and self.recommender.group(job.ask) == group
                (taken if fits else left).append(job)
            self.jobs = left
            return taken

    def run_batches(self) -> None:
        """The thread that writes: batch after batch until the service is closed."""
        trimmed = time.monotonic()
        while jobs := self.next_batch():
            # False: the client has timed out or left, and its future was cancelled.
            jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            if jobs:
                self.observe("batch", len(jobs))
                self.answer_jobs(self.recommender, jobs)
            if time.monotonic() - trimmed > TRIM_EVERY:
                trim_memory()
                trimmed = time.monotonic()

    def answer_jobs(self, recommender: Recommender, jobs: list[Job]) -> None:
        """Answer all jobs from one model.

        If the batch fails, its jobs are tried one by one, so that one job cannot fail the others.
        """
        answers: Sequence[dict | Exception]
        try:
            answers = recommender.answers([job.ask for job in jobs])
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self.answer_jobs(recommender, [job])
                return
            answers = [error]
        for job, answer in zip(jobs, answers, strict=True):
            if isinstance(answer, Exception):
                job.future.set_exception(answer)
            else:
                job.future.set_result(answer)

    def on_disk(self) -> dict[str, str] | None:
        """Ids of all that is finished on disk; None while a stage that is served is not."""
        served, found = self.recommender.hashes, {}
        for name in (*WRITERS, "reward"):
            try:
                found[name] = json.loads((self.config.where(name) / "done").read_text())["id"]
            except (OSError, ValueError, KeyError, TypeError):
                if name in served:
                    return None
        try:
            return found | {"data": file_id(self.config.data_dir / "source.json")}
        except OSError:
            return None

    def watch(self) -> None:
        """The thread that looks for new weights."""
        while not self.closed.wait(self.config.reload):
            self.take_new_weights()

    def take_new_weights(self) -> bool:
        """Load new weights if there are any, try them here, then swap. True if swapped."""
        found = self.on_disk()
        if found is None or found in (self.recommender.hashes, self.passed_over):
            return False
        try:
            fresh = self.load()
            for name in fresh.names:
                fresh.answers([Ask(k=1, policy=name)])
        except Exception as error:
            # The files are still being copied, or broken: the old model goes on. The swap is tried
            # again at every look, and its failure is logged once.
            if self.reported != str(found):
                self.reported = str(found)
                self.observe("swap_failed", 1)
                fields = {"type": type(error).__name__, "why": str(error)[:300]}
                log.error("swap_failed", extra={"fields": fields})
            return False
        # What is on disk and was left out, such as composed pages of an earlier policy.
        self.passed_over = found if found != fresh.hashes else None
        if fresh.hashes == self.recommender.hashes:
            return False
        self.recommender = fresh
        self.observe("swap", 1)
        said = {"models": fresh.hashes, "policy": fresh.choice_in_words()}
        log.info("swap", extra={"fields": said})
        return True


def run(config: Config) -> None:
    """Serve until SIGINT or SIGTERM; requests under way are answered first."""
    needs_web()
    started = time.perf_counter()
    with collector.paused():
        from pagellm.serving.api import make_app
        from pagellm.serving.middleware import json_logs

        if config.threads:
            torch.set_num_threads(config.threads)
        service = Service(config)
    sock = listen(config.host, config.port)
    json_logs(config.log)
    warn_if_open(config, sock)
    log.info(
        "serve",
        extra={
            "fields": {
                "models": service.recommender.hashes,
                "policy": service.recommender.choice_in_words(),
                "split": config.split,
                "seconds": round(time.perf_counter() - started, 2),
            }
        },
    )
    print(f"PageLLM: {address(sock)}   (Ctrl+C stops)", flush=True)
    print(f"  {service.recommender.in_words()}", flush=True)
    print(f"  default policy {service.recommender.choice_in_words()}", flush=True)
    answer_until_stopped(make_app(service), sock, config)


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm serve"))
