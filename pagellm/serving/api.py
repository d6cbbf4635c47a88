"""The HTTP side of `pagellm serve`: routes, error answers and the OpenAPI document.

    app = make_app(service)          service is a serve.Service, or anything with its methods

No answer is a traceback. Whatever is wrong with a request comes back as 4xx with the body
{"error": {"code", "message", "fields": [{"field", "problem"}]}}. Logs name routes, never people
or items. Needs the extra [serve].
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Query, Request, Response
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from pagellm import __version__
from pagellm.serving.meters import Meters
from pagellm.serving.middleware import JSON, OPEN, Middleware, problem
from pagellm.serving.schema import (
    Error,
    FoundList,
    Item,
    Page,
    PageRequest,
    ScoreRequest,
    ShopFacts,
    Status,
    User,
)
from pagellm.stage.config import PageLLMError

__all__ = ["Busy", "TooSlow", "make_app"]


STATIC = Path(__file__).parent / "static"
FILES = {"page.css": "text/css", "page.js": "text/javascript"}


class Busy(Exception):
    """The queue of waiting requests is full."""


class TooSlow(Exception):
    """The answer was not ready within the time-out."""


def make_app(service) -> FastAPI:
    """The application. It starts `service` when it starts, and closes it after the last request."""
    meters = Meters(service)
    service.observe = meters.observe

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
        description="Whole recommendation pages, with and without the reward. "
        "Logs hold no personal data.",
    )
    limits = service.config
    app.add_middleware(
        Middleware,
        meters=meters,
        max_body=limits.max_body,
        body_timeout=limits.timeout,
        api_key=limits.api_key,
    )
    add_error_handlers(app, limits.timeout)
    add_page_routes(app, service, meters)
    add_catalogue_routes(app, service)
    add_shop_route(app, service)
    add_status_routes(app, service, meters)
    add_static_routes(app)
    complete_document(app, service)
    return app


def longest_page(service) -> int:
    """Slots of the longest page that this service writes, whatever the policy."""
    recommender = service.recommender
    return min(service.config.max_k, *map(recommender.slots, recommender.names))


# Errors.

MEANING = {
    400: "The body cannot be read",
    401: "The service has a key, which the header authorization did not hold",
    404: "No such user or item",
    408: "The body came too slowly",
    413: "The body is too large",
    415: "The body is not sent as JSON",
    422: "Something in the request is wrong; the body says what",
    503: "Too many requests wait, or not ready; try again",
    504: "No answer in time; try again",
}


def errors(*codes: int) -> dict:
    """Entries of the OpenAPI document for these status codes."""
    return {code: {"model": Error, "description": MEANING[code]} for code in codes}


def clean(text) -> str:
    """A field name of the client's, made safe to repeat in an answer: 120 characters at most."""
    return str(text).encode("utf-8", "backslashreplace").decode()[:120]


def add_error_handlers(app: FastAPI, timeout: float) -> None:
    """Turn every exception that a route may raise into an Error body. timeout is in seconds."""

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
            f"no answer within {timeout:g} s; try again, or ask for less",
            headers={"retry-after": "1"},
        )


# Routes. The functions' names are part of the OpenAPI document.


def add_page_routes(app: FastAPI, service, meters: Meters) -> None:
    """POST /v1/page writes a page, POST /v1/score scores a given one."""
    responses = {200: {"model": Page}, **errors(400, 408, 413, 415, 422, 503, 504)}

    async def answered(asked: PageRequest | ScoreRequest) -> JSON:
        started = time.perf_counter()
        ask = asked.ask()
        k_max = longest_page(service)
        if ask.page is None and ask.k > k_max:
            raise PageLLMError(f"k={ask.k}: this service writes pages of at most {k_max} slots")
        answer = await service.answer(ask)
        meters.count_page(answer, ask.k if ask.page is None else None)
        return JSON({**answer, "latency_ms": round(1000 * (time.perf_counter() - started), 2)})

    @app.post("/v1/page", responses=responses, summary="Write a page")
    async def page(asked: PageRequest):
        return await answered(asked)

    @app.post("/v1/score", responses=responses, summary="Score a page in a given order")
    async def score(asked: ScoreRequest):
        return await answered(asked)


Id = Annotated[str, InPath(max_length=256)]
Words = Annotated[str, Query(max_length=256)]
Limit = Annotated[int, Query(ge=1, le=100)]


def add_catalogue_routes(app: FastAPI, service) -> None:
    """GET /v1/users and /v1/items: one by its id, or those that hold some words."""

    @app.get(
        "/v1/users/{id:path}",
        responses={200: {"model": User}, **errors(404, 422)},
        summary="What is known",
    )
    def user(id: Id):
        r = service.recommender
        if id not in r.user_of:
            raise HTTPException(
                404, "no such user; strangers are served by POST /v1/page with a history"
            )
        items, ratings, _ = r.user_state(r.user_of[id])
        history = [
            {**r.cards[i], "rating": None if x != x else round(x, 2)}
            for i, x in zip(items.tolist(), ratings.tolist(), strict=True)
        ]
        return JSON({"id": id, "history": history})

    @app.get(
        "/v1/items/{id:path}",
        responses={200: {"model": Item}, **errors(404, 422)},
        summary="One item",
    )
    def item(id: Id):
        r = service.recommender
        if id not in r.item_of:
            raise HTTPException(404, "no such item")
        return JSON(r.cards[r.item_of[id]])

    @app.get(
        "/v1/users",
        responses={200: {"model": FoundList}, **errors(422)},
        summary="Find users by id",
    )
    def users(query: Words = "", limit: Limit = 20):
        ids = service.recommender.shop.user_ids
        return JSON({"found": find(query, limit, ((i, "") for i in ids))})

    @app.get(
        "/v1/items",
        responses={200: {"model": FoundList}, **errors(422)},
        summary="Find items by title or id",
    )
    def items(query: Words = "", limit: Limit = 20):
        c = service.recommender.shop.catalogue
        return JSON({"found": find(query, limit, zip(c.ids, c.title, strict=True))})


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


def add_shop_route(app: FastAPI, service) -> None:
    """GET /v1/shop: sizes, prices, categories, which policies are served, and their hashes."""

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
                "dataset": service.config.dataset,
                "users": r.shop.n_users,
                "items": r.shop.n_items,
                "price": price,
                "k_max": longest_page(service),
                "categories": [{"name": n, "items": len(i)} for n, i in r.members.items()],
                "models": r.hashes,
                "policies": list(r.names),
                "default": r.default,
                "why": r.why,
                "decoding": r.modes,
                "split": r.split,
                "version": __version__,
            }
        )


def add_status_routes(app: FastAPI, service, meters: Meters) -> None:
    """GET /healthz, /readyz and /metrics, for load balancers and monitors."""

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


def add_static_routes(app: FastAPI) -> None:
    """The page in the browser: its files are read once, here."""
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


def complete_document(app: FastAPI, service) -> None:
    """Put what depends on the service into the OpenAPI document.

    The longest page served now is the maximum of k; a service with a key says which routes need it.
    """
    plain: Callable[[], dict] = app.openapi

    def document() -> dict:
        whole = plain()
        properties = whole["components"]["schemas"]["PageRequest"]["properties"]
        properties["k"]["maximum"] = longest_page(service)
        if service.config.api_key:
            add_key(whole)
        return whole

    app.openapi = document  # type: ignore[method-assign]


def add_key(document: dict) -> None:
    """Say in an OpenAPI document which routes need the key, and that they answer 401 without it."""
    schemes = {"key": {"type": "http", "scheme": "bearer"}}
    document["components"]["securitySchemes"] = schemes
    answer = {
        "description": MEANING[401],
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    for path, methods in document["paths"].items():
        for operation in methods.values() if path not in OPEN else ():
            operation["security"] = [{"key": []}]
            operation["responses"]["401"] = answer
