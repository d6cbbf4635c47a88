"""What happens around every request: the key, limits, time-outs, error bodies, logs."""

import asyncio
import hashlib
import hmac
import json
import logging
import sys
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import h11
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from pagellm.serving.meters import FrameMeters

__all__ = [
    "HttpWithTimeout",
    "JSON",
    "JsonLines",
    "OPEN",
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


# Paths that need no key: load balancers and monitors ask for them, and the browser's page holds
# nothing of the shop until it has sent the key. It links to the document, and a link sends no key.
OPEN = ("/", "/healthz", "/readyz", "/metrics", "/openapi.json")


def digest(key: bytes) -> bytes:
    """A hash of a key: keys of any length become equally long."""
    return hashlib.sha256(key).digest()


class Unauthorized(Exception):
    """The service has a key, and the caller did not send it."""


class TooLarge(Exception):
    """The body holds more bytes than the service takes."""


class Middleware:
    """Wraps the application: limits the body, adds headers, writes one log line, counts.

    max_body      bytes of a body
    body_timeout  seconds for the whole body
    api_key       what a caller must send as `Authorization: Bearer KEY` (RFC 6750), except for
                  open_paths; empty: nothing
    A fault of the application becomes a 500 that says nothing about it. HEAD is answered as GET,
    without the body (RFC 9110, 9.3.2).
    """

    def __init__(
        self,
        app,
        meters: FrameMeters,
        max_body: int,
        body_timeout: float,
        api_key: str = "",
        open_paths: Sequence[str] = OPEN,
    ):
        self.app, self.meters, self.open = app, meters, frozenset(open_paths)
        self.key = digest(api_key.encode()) if api_key else b""
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
            if not self.may(scope):
                raise Unauthorized
            body = await self.body(scope, receive)
            await self.app(inner, replay(body, receive), reply)
        except ConnectionError:
            status = 499  # the client left; nobody reads an answer
        except Exception as error:
            answer = self.refusal(error, mark)
            if not status:
                await answer(inner, receive, reply)
        self.record(inner, scope["method"], mark, status, time.perf_counter() - started)

    def may(self, scope) -> bool:
        """Whether the caller may go on: it has sent the key, or the path needs none.

        Digests are compared, in a time that tells nothing about the key.
        """
        if not self.key or scope["path"] in self.open or scope["path"].startswith("/static/"):
            return True
        scheme, _, sent = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        right = hmac.compare_digest(digest(sent.strip()), self.key)
        return right and scheme.lower() == b"bearer"

    def refusal(self, error: Exception, mark: str) -> JSON:
        """The answer to a body over a limit, or to a fault, which is logged under `mark`."""
        close = {"connection": "close"}
        if isinstance(error, Unauthorized):
            text = "send the service's key in the header authorization: Bearer KEY"
            return problem(401, "no_key", text, headers=close | {"www-authenticate": "Bearer"})
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
