"""The HTTP side of `pagellm serve`: requests, answers, limits, logs and meters. Needs the extra [serve].

    app = make_app(service)          service is serve.Service; anything with its methods will do

No answer is a traceback: whatever is wrong with a request comes back as 4xx and
{"error": {"code", "message", "fields": [{"field", "problem"}]}}. Logs name routes, never people or items.
"""

import asyncio
import time
from collections.abc import Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Query, Request, Response
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from pagellm import __version__
from pagellm.serving.gate import JSON, Gate, Meters, problem
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
    """More requests wait than the queue holds."""


class TooSlow(Exception):
    """No answer within the time-out."""


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
