"""The HTTP side of `pagellm serve`: requests, answers, limits, logs and meters. Needs the extra [serve].

    app = make_app(service)          service is serve.Service; anything with its methods will do

No answer is a traceback: whatever is wrong with a request comes back as 4xx and
{"error": {"code", "message", "fields": [{"field", "problem"}]}}. Logs name routes, never people or items.
"""

import asyncio
import json
import logging
import sys
import time
import uuid
from collections.abc import Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Literal

import h11
from fastapi import FastAPI, Query, Request, Response
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from pagellm import __version__
from pagellm.recommender import Ask, Filters
from pagellm.stage.config import PageLLMError

__all__ = [
    "Busy",
    "Error",
    "Http",
    "Item",
    "Lines",
    "Meters",
    "Page",
    "ShopFacts",
    "TooSlow",
    "User",
    "json_logs",
    "make_app",
]


log = logging.getLogger("pagellm")
STATIC = Path(__file__).parent / "static"
FILES = {"page.css": "text/css", "page.js": "text/javascript"}
SAFE = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        b"img-src 'self' data:; base-uri 'none'; form-action 'none'",
    ),
)


class Busy(Exception):
    """More requests wait than the queue holds."""


class TooSlow(Exception):
    """No answer within the time-out."""


# Requests. Strict: "20" is no number and true is no 1; an unknown field is an error, not silence.

Id = Annotated[str, Field(min_length=1, max_length=256)]
IdList = Annotated[list[Id], Field(max_length=100_000)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Event(Strict):
    """An item of a history."""

    item: Id
    rating: Annotated[float, Field(ge=1, le=5, allow_inf_nan=False)] | None = Field(
        None,
        description="1 to 5; null: level unknown. Items rated low are kept off the page, not shown to the model",
    )


class PriceRange(Strict):
    """Bounds in the shop's currency, both included. An item of unknown price fails."""

    min: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    max: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def ordered(self):
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("min is above max")
        return self


class Allowed(Strict):
    """Hard constraints on every slot. Leave a field out for no filter; an empty list allows nothing."""

    exclude: IdList = Field(default_factory=list, description="item ids that no slot may hold")
    categories: Annotated[list[Id], Field(max_length=1000)] | None = Field(
        None, description="an item needs at least one of these"
    )
    in_stock: IdList | None = Field(None, description="only these item ids")
    price: PriceRange | None = None


class Person(Strict):
    """Who the page is for: a user, a history, or both (the history then follows what is stored)."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["user"], "properties": {"user": {"type": "string"}}},
                {"required": ["history"], "properties": {"history": {"type": "array"}}},
            ]
        }
    )

    user: Id | None = Field(
        None, description="the shop's id; a stranger is served from the history alone"
    )
    history: Annotated[list[Event], Field(max_length=1000)] | None = Field(
        None,
        description="oldest first; an empty list without a user asks for the page of a total stranger",
    )
    policy: Literal["ppo", "sft"] = Field(
        "ppo", description="ppo: with the reward; sft: without it"
    )
    explain: bool = Field(False, description="add to each slot the nearest items of the history")

    @model_validator(mode="after")
    def somebody(self):
        if self.user is None and self.history is None:
            raise ValueError("give user, history, or both")
        return self

    def asked(self, **more) -> Ask:
        history = tuple(
            (e.item, float("nan") if e.rating is None else e.rating) for e in self.history or ()
        )
        return Ask(
            user=self.user, history=history, policy=self.policy, explain=self.explain, **more
        )


class PageRequest(Person):
    k: int = Field(20, ge=1, le=1000, description="slots; at most what GET /v1/shop says")
    decoding: Literal["greedy", "beam", "one_shot"] = "greedy"
    filters: Allowed = Field(default_factory=Allowed)

    def ask(self) -> Ask:
        f = self.filters
        price = f.price or PriceRange()
        return self.asked(
            k=self.k,
            mode=self.decoding,
            filters=Filters(
                tuple(f.exclude),
                None if f.categories is None else tuple(f.categories),
                None if f.in_stock is None else tuple(f.in_stock),
                price.min,
                price.max,
            ),
        )


class ScoreRequest(Person):
    items: Annotated[list[Id], Field(max_length=1000)] = Field(
        description="the page in order, each item at most once",
        json_schema_extra={"uniqueItems": True},
    )

    @model_validator(mode="after")
    def distinct(self):
        if len(set(self.items)) < len(self.items):
            raise ValueError("items repeats an item; want each at most once")
        return self

    def ask(self) -> Ask:
        return self.asked(page=tuple(self.items))


# Answers: documented by these, built as plain values by recommender.Recommender.


class Item(BaseModel):
    item: str
    title: str
    category: str | None
    brand: str | None
    price: float | None


class Similar(BaseModel):
    item: str
    title: str
    similarity: float = Field(description="cosine of the two item rows, -1 to 1")


class Slot(Item):
    rank: int
    score: float | None = Field(
        description="log-probability of the item in this slot, in nats; null in /v1/score"
    )
    token_reward: float = Field(description="what the slot adds, in reward-model units")
    held_out: bool | None = Field(
        None, description="explain: the user chose it later, unseen by the model"
    )
    similar: list[Similar] | None = Field(None, description="explain: nearest items of the history")


class Served(BaseModel):
    id: str | None
    known: bool
    history: int = Field(description="items of history the page was made from")


class Unknown(BaseModel):
    user: bool
    items: list[str]
    categories: list[str]


class Page(BaseModel):
    user: Served
    items: list[Slot]
    page_reward: float | None = Field(
        description="reward-model units, 0 is the mean ground-truth page; null if empty"
    )
    energy: float = Field(
        description="page energy E; gains from the user's held-out ratings, 0 for all other items"
    )
    ild: float | None = Field(description="intra-list diversity, 0 to 1; null below two items")
    entropy: float | None = Field(description="of categories, in nats; null if empty")
    unknown: Unknown
    notes: list[str]
    policy: str
    model: str = Field(description="hash of the policy's weights")
    reward_model: str
    latency_ms: float


class Stored(Item):
    rating: float | None


class User(BaseModel):
    id: str
    history: list[Stored]


class Found(BaseModel):
    id: str
    title: str


class FoundList(BaseModel):
    found: list[Found]


class Category(BaseModel):
    name: str
    items: int


class ShopFacts(BaseModel):
    dataset: str
    users: int
    items: int
    k_max: int
    price: PriceRange | None
    categories: list[Category]
    models: dict[str, str]
    version: str


class Status(BaseModel):
    status: str


class Problem(BaseModel):
    field: str
    problem: str


class ErrorBody(BaseModel):
    code: str
    message: str
    fields: list[Problem] = []


class Error(BaseModel):
    error: ErrorBody


def errors(*codes: int) -> dict:
    why = {
        400: "The body cannot be read",
        404: "No such user or item",
        408: "The body came too slowly",
        413: "The body is too large",
        415: "The body is not sent as JSON",
        422: "Something in the request is wrong; the body says what",
        503: "Too many requests wait, or not ready; try again",
        504: "No answer in time; try again",
    }
    return {code: {"model": Error, "description": why[code]} for code in codes}


ASKED = errors(400, 408, 413, 415, 422, 503, 504)


class JSON(JSONResponse):
    """Plain ASCII JSON: no text a client sends can break the encoding of its own answer."""

    def render(self, content) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def problem(
    status: int, code: str, message: str, fields: Iterable[dict] = (), headers: dict | None = None
) -> JSON:
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
        """What Service reports: "batch" with its pages, a stage with its seconds, or one event."""
        if what == "batch":
            self.batch.observe(value)
        elif what in ("prompt", "decode", "reward", "metrics"):
            self.stages.labels(what).observe(value)
        else:
            self.events.labels(what).inc(value)

    def text(self) -> bytes:
        self.model.clear()
        for name, hash_ in self.service.recommender.hashes.items():
            self.model.labels(name, hash_).set(1)
        return generate_latest(self.registry)


class Http(H11Protocol):
    """uvicorn's HTTP/1.1, which waits for a request's head for ever: this one hangs up after `patience` seconds."""

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
        elif self.late is None:  # counts from the first byte: drips buy no time
            self.late = self.loop.call_later(self.patience, self.transport.close)

    def unexpect(self):
        if self.late is not None:
            self.late.cancel()
            self.late = None


class TooLarge(Exception):
    pass


class Gate:
    """Around every request: size and time of the body, headers, one log line, meters; a fault is a bare 500.

    max_body  bytes    body_timeout  seconds for the whole body
    """

    def __init__(self, app, meters: Meters, max_body: int, body_timeout: float):
        self.app, self.meters, self.max_body, self.body_timeout = (
            app,
            meters,
            max_body,
            body_timeout,
        )

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status, mark = time.perf_counter(), 0, uuid.uuid4().hex[:16]

        async def reply(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {
                    **message,
                    "headers": [*message["headers"], *SAFE, (b"x-request-id", mark.encode())],
                }
            await send(message)

        try:
            body = await self.body(scope, receive)
            await self.app(scope, again(body, receive), reply)
        except TooLarge:
            await problem(
                413,
                "too_large",
                f"the body is larger than {self.max_body:,} bytes",
                headers={"connection": "close"},
            )(scope, receive, reply)
        except TimeoutError:
            await problem(
                408,
                "slow_body",
                f"the body did not arrive within {self.body_timeout:g} s",
                headers={"connection": "close"},
            )(scope, receive, reply)
        except ConnectionError:
            status = 499  # the client left; nobody reads an answer
        except Exception as error:
            self.meters.observe("fault", 1)
            place = fault_place(error)
            log.error(
                "fault", extra={"fields": {"id": mark, "type": type(error).__name__, "at": place}}
            )
            if not status:
                await problem(500, "fault", f"a fault of the service; its log has it under {mark}")(
                    scope, receive, reply
                )
        route = getattr(scope.get("route"), "path", "unmatched")
        method = (
            scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS") else "other"
        )
        seconds = time.perf_counter() - started
        self.meters.requests.labels(route, method, str(status)).inc()
        self.meters.seconds.labels(route).observe(seconds)
        log.info(
            "request",
            extra={
                "fields": {
                    "id": mark,
                    "route": route,
                    "method": method,
                    "status": status,
                    "ms": round(1000 * seconds, 2),
                }
            },
        )

    async def body(self, scope, receive) -> bytes:
        """The whole body. Raises TooLarge, TimeoutError, or ConnectionError for a client that leaves."""
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


def again(body: bytes, receive):
    """A `receive` that gives the body read already, then what follows on the connection."""
    given = False

    async def read():
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return read


def fault_place(error: BaseException) -> str:
    """file:line where it was raised: enough to find it, nothing of what was being handled."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else ""


class Lines(logging.Formatter):
    """One JSON object a line; of an exception only its type."""

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
    """Send this program's logs and uvicorn's to stderr, a JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    for name in ("pagellm", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
    logging.getLogger("uvicorn.access").disabled = True  # its lines hold addresses and ids


def clean(text) -> str:
    """A field name of the client's, fit for an answer."""
    return str(text).encode("utf-8", "backslashreplace").decode()[:120]


def make_app(service) -> FastAPI:
    """The application. Starts `service` with its lifespan, and stops it after the last request."""
    meters = Meters(service)
    service.observe = meters.observe
    limits = service.config

    @asynccontextmanager
    async def lifespan(app):
        service.start()
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="PageLLM",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        default_response_class=JSON,
        description="Whole recommendation pages, with and without the reward. Logs hold no personal data.",
    )
    app.add_middleware(Gate, meters=meters, max_body=limits.max_body, body_timeout=limits.timeout)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError):
        if request.method == "POST" and "json" not in request.headers.get("content-type", ""):
            return problem(
                415,
                "not_json",
                "send a JSON object, with the header content-type: application/json",
            )
        fields = [
            {
                "field": "body"
                if e["type"] == "json_invalid"
                else ".".join(map(clean, e["loc"][1:])) or "body",
                "problem": clean(e["msg"].removeprefix("Value error, ")),
            }
            for e in error.errors()[:20]
        ]
        first = fields[0]
        return problem(422, "invalid", f"{first['field']}: {first['problem']}", fields)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException):
        code = {400: "unreadable", 404: "not_found", 405: "method_not_allowed"}.get(
            error.status_code, "refused"
        )
        return problem(error.status_code, code, clean(error.detail), headers=error.headers)

    @app.exception_handler(PageLLMError)
    async def cannot(request: Request, error: PageLLMError):
        return problem(422, "invalid", str(error))

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy):
        return problem(
            503,
            "busy",
            "too many requests wait; try again in a second",
            headers={"retry-after": "1"},
        )

    @app.exception_handler(TooSlow)
    async def slow(request: Request, error: TooSlow):
        return problem(
            504,
            "timeout",
            f"no answer within {limits.timeout:g} s; try again, or ask for less",
            headers={"retry-after": "1"},
        )

    def k_max() -> int:
        return min(limits.max_k, *map(service.recommender.slots, service.recommender.policies))

    async def answered(asked: PageRequest | ScoreRequest) -> JSON:
        started = time.perf_counter()
        ask = asked.ask()
        if ask.page is None and ask.k > k_max():
            raise PageLLMError(f"k={ask.k}: this service writes pages of at most {k_max()} slots")
        answer = await service.answer(ask)
        return JSON({**answer, "latency_ms": round(1000 * (time.perf_counter() - started), 2)})

    @app.post("/v1/page", responses={200: {"model": Page}, **ASKED}, summary="Write a page")
    async def page(asked: PageRequest):
        return await answered(asked)

    @app.post(
        "/v1/score",
        responses={200: {"model": Page}, **ASKED},
        summary="Score a page in a given order",
    )
    async def score(asked: ScoreRequest):
        return await answered(asked)

    @app.get(
        "/v1/users/{id:path}",
        responses={200: {"model": User}, **errors(404, 422)},
        summary="What is known",
    )
    def user(id: Annotated[str, InPath(max_length=256)]):
        r = service.recommender
        if id not in r.user_of:
            raise HTTPException(
                404, "no such user; strangers are served by POST /v1/page with a history"
            )
        items, ratings, _ = r.user_state(r.user_of[id])
        return JSON(
            {
                "id": id,
                "history": [
                    {**r.cards[i], "rating": None if x != x else round(x, 2)}
                    for i, x in zip(items.tolist(), ratings.tolist(), strict=True)
                ],
            }
        )

    @app.get(
        "/v1/items/{id:path}",
        responses={200: {"model": Item}, **errors(404, 422)},
        summary="One item",
    )
    def item(id: Annotated[str, InPath(max_length=256)]):
        r = service.recommender
        if id not in r.item_of:
            raise HTTPException(404, "no such item")
        return JSON(r.cards[r.item_of[id]])

    @app.get(
        "/v1/users",
        responses={200: {"model": FoundList}, **errors(422)},
        summary="Find users by id",
    )
    def users(
        query: Annotated[str, Query(max_length=256)] = "",
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ):
        r = service.recommender
        return JSON({"found": find(query, limit, ((i, "") for i in r.shop.user_ids))})

    @app.get(
        "/v1/items",
        responses={200: {"model": FoundList}, **errors(422)},
        summary="Find items by title or id",
    )
    def items(
        query: Annotated[str, Query(max_length=256)] = "",
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ):
        c = service.recommender.shop.catalogue
        return JSON({"found": find(query, limit, zip(c.ids, c.title, strict=True))})

    @app.get("/v1/shop", responses={200: {"model": ShopFacts}}, summary="What can be asked for")
    def shop():
        r = service.recommender
        known = r.price[~r.price.isnan()]
        price = (
            {"min": round(float(known.min()), 2), "max": round(float(known.max()), 2)}
            if len(known)
            else None
        )
        return JSON(
            {
                "dataset": limits.dataset,
                "users": r.shop.n_users,
                "items": r.shop.n_items,
                "price": price,
                "k_max": k_max(),
                "categories": [{"name": n, "items": len(i)} for n, i in r.members.items()],
                "models": r.hashes,
                "version": __version__,
            }
        )

    @app.get("/healthz", responses={200: {"model": Status}}, summary="The process runs")
    async def healthz():
        return JSON({"status": "ok"})

    @app.get(
        "/readyz",
        responses={200: {"model": Status}, **errors(503)},
        summary="Pages can be asked for",
    )
    async def readyz():
        if not service.ready():
            return problem(503, "not_ready", "starting or stopping", headers={"retry-after": "1"})
        return JSON({"status": "ready"})

    @app.get(
        "/metrics",
        response_class=Response,
        summary="Meters, in Prometheus' text format",
        responses={200: {"content": {"text/plain": {}}}},
    )
    def metrics():
        return Response(meters.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    plain = app.openapi

    def document():
        whole = plain()
        whole["components"]["schemas"]["PageRequest"]["properties"]["k"]["maximum"] = k_max()
        return whole

    app.openapi = document
    kept = {name: (STATIC / name).read_bytes() for name in ("index.html", *FILES)}

    @app.get("/", include_in_schema=False)
    async def index():
        return Response(
            kept["index.html"], media_type="text/html", headers={"cache-control": "no-cache"}
        )

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str):
        if name not in FILES:
            raise HTTPException(404, "no such file")
        return Response(kept[name], media_type=FILES[name], headers={"cache-control": "no-cache"})

    return app


def find(query: str, limit: int, rows: Iterable[tuple[str, str]]) -> list[dict]:
    """The first `limit` (id, title) that hold every word of the query, in any case."""
    words, found = query.casefold().split(), []
    for name, title in rows:
        text = f"{name} {title}".casefold()
        if all(word in text for word in words):
            found.append({"id": name, "title": title})
            if len(found) == limit:
                break
    return found
