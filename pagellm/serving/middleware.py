"""What stands around every request: limits, time-outs, error bodies, meters, logs."""

import asyncio
import json
import logging
import sys
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

import h11
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = [
    "HttpWithTimeout",
    "JSON",
    "JsonLines",
    "Meters",
    "Middleware",
    "json_logs",
    "log",
    "problem",
]

log = logging.getLogger("pagellm")

SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        b"img-src 'self' data:; base-uri 'none'; form-action 'none'",
    ),
)


class JSON(JSONResponse):
    """JSON in plain ASCII, so that no text which a client sends can break the answer's encoding."""

    def render(self, content) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def problem(
    status: int,
    code: str,
    message: str,
    fields: Iterable[dict] = (),
    headers: Mapping[str, str] | None = None,
) -> JSON:
    """An error answer. fields: {"field", "problem"} of each part of the request that is wrong."""
    return JSON(
        {"error": {"code": code, "message": message, "fields": list(fields)}}, status, headers
    )


class Meters:
    """Prometheus meters of one service."""

    def __init__(self, service):
        disable_created_metrics()
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        fine = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
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
            buckets=fine,
            registry=self.registry,
        )
        self.stages = Histogram(
            "pagellm_stage_seconds",
            "Cost of the parts of a batch",
            ("stage",),
            buckets=fine,
            registry=self.registry,
        )
        self.batch = Histogram(
            "pagellm_batch_pages",
            "Pages written at once",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=self.registry,
        )
        self.events = Counter(
            "pagellm_events",
            "Swaps, failed swaps, time-outs, refusals",
            ("event",),
            registry=self.registry,
        )
        for event in ("swap", "swap_failed", "timeout", "busy", "fault"):
            self.events.labels(event)
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
        self.service = service

    def observe(self, what: str, value: float) -> None:
        """Count a report of Service: a batch's pages, a stage's seconds, or an event."""
        if what == "batch":
            self.batch.observe(value)
        elif what in ("prompt", "decode", "reward", "metrics"):
            self.stages.labels(what).observe(value)
        else:
            self.events.labels(what).inc(value)

    def text(self) -> bytes:
        """All meters in Prometheus' text format."""
        self.model.clear()
        for name, hash_ in self.service.recommender.hashes.items():
            self.model.labels(name, hash_).set(1)
        return generate_latest(self.registry)


class HttpWithTimeout(H11Protocol):
    """uvicorn's HTTP/1.1 with a limit on the time that the head of a request may take.

    patience  seconds; the connection is then closed. uvicorn itself waits for ever.
    """

    patience = 10.0
    late: asyncio.TimerHandle | None = None

    def connection_made(self, transport):
        super().connection_made(transport)
        self.expect_head()

    def data_received(self, data):
        super().data_received(data)
        self.expect_head()

    def connection_lost(self, exc):
        self.unexpect()
        super().connection_lost(exc)

    def expect_head(self):
        if self.conn.their_state is not h11.IDLE:
            self.unexpect()
        elif self.late is None:  # time runs from the first byte, so that sending slowly gains none
            self.late = self.loop.call_later(self.patience, self.transport.close)

    def unexpect(self):
        if self.late is not None:
            self.late.cancel()
            self.late = None


class TooLarge(Exception):
    """The body holds more bytes than the service takes."""


class Middleware:
    """Wraps the application: limits the body, adds headers, writes one log line, counts.

    max_body      bytes of a body
    body_timeout  seconds for the whole body
    A fault of the application becomes a 500 that says nothing about it. HEAD is answered as GET,
    without the body (RFC 9110, 9.3.2).
    """

    def __init__(self, app, meters: Meters, max_body: int, body_timeout: float):
        self.app, self.meters = app, meters
        self.max_body, self.body_timeout = max_body, body_timeout

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status, mark = time.perf_counter(), 0, uuid.uuid4().hex[:16]
        head = scope["method"] == "HEAD"
        inner = {**scope, "method": "GET"} if head else scope

        async def reply(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [*SECURITY_HEADERS, (b"x-request-id", mark.encode())]
                message = {**message, "headers": [*message["headers"], *more]}
            elif head:
                message = {**message, "body": b""}
            await send(message)

        try:
            body = await self.body(scope, receive)
            await self.app(inner, replay(body, receive), reply)
        except ConnectionError:
            status = 499  # the client left; nobody reads an answer
        except Exception as error:
            answer = self.refusal(error, mark)
            if not status:
                await answer(inner, receive, reply)
        self.record(inner, scope["method"], mark, status, time.perf_counter() - started)

    def refusal(self, error: Exception, mark: str) -> JSON:
        """The answer to a body over a limit, or to a fault, which is logged under `mark`."""
        close = {"connection": "close"}
        if isinstance(error, TooLarge):
            text = f"the body is larger than {self.max_body:,} bytes"
            return problem(413, "too_large", text, headers=close)
        if isinstance(error, TimeoutError):
            text = f"the body did not arrive within {self.body_timeout:g} s"
            return problem(408, "slow_body", text, headers=close)
        self.meters.observe("fault", 1)
        fields = {"id": mark, "type": type(error).__name__, "at": fault_place(error)}
        log.error("fault", extra={"fields": fields})
        return problem(500, "fault", f"a fault of the service; its log has it under {mark}")

    def record(self, scope, method: str, mark: str, status: int, seconds: float) -> None:
        """One log line and the meters of a request that has ended. scope: with its route."""
        route = getattr(scope.get("route"), "path", "unmatched")
        method = method if method in ("GET", "POST", "HEAD", "OPTIONS") else "other"
        self.meters.requests.labels(route, method, str(status)).inc()
        self.meters.seconds.labels(route).observe(seconds)
        fields = {
            "id": mark,
            "route": route,
            "method": method,
            "status": status,
            "ms": round(1000 * seconds, 2),
        }
        log.info("request", extra={"fields": fields})

    async def body(self, scope, receive) -> bytes:
        """The whole body.

        Raises TooLarge, TimeoutError, or ConnectionError if the client leaves.
        """
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return b""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body:
            raise TooLarge
        parts, size, more = [], 0, True
        async with asyncio.timeout(self.body_timeout):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ConnectionError
                parts.append(message.get("body", b""))
                size, more = size + len(parts[-1]), message.get("more_body", False)
                if size > self.max_body:
                    raise TooLarge
        return b"".join(parts)


def replay(body: bytes, receive):
    """A `receive` that first gives the body, which was read already, then what follows it."""
    given = False

    async def read():
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return read


def fault_place(error: BaseException) -> str:
    """file:line where an error was raised: enough to find it, without the request's content."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else ""


class JsonLines(logging.Formatter):
    """One JSON object a line. Of an exception only the type: its text may hold a person's data."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage()[:500],
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0]:
            line["type"] = record.exc_info[0].__name__
        return json.dumps(line)


def json_logs(level: str = "info") -> None:
    """Send the logs of this program and of uvicorn to stderr, one JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("pagellm", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
    logging.getLogger("uvicorn.access").disabled = True  # its lines hold addresses and ids
