"""The HTTP frame around any routes of this project: limits, errors, health, meters.

    app = make_frame([service], meters, config, "PageLLM", "Whole recommendation pages")

A service has start, close, ready and waiting; config is an HttpOptions. No answer is a traceback.
Whatever is wrong with a request comes back as 4xx with the body
{"error": {"code", "message", "fields": [{"field", "problem"}]}}. Needs the extra [serve].
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from pagellm import __version__
from pagellm.serving.http_options import HttpOptions
from pagellm.serving.meters import FrameMeters
from pagellm.serving.middleware import JSON, OPEN, Middleware, problem
from pagellm.serving.schema import Error, Status
from pagellm.stage.config import PageLLMError

__all__ = [
    "Busy",
    "TooSlow",
    "add_key",
    "add_status_routes",
    "clean",
    "errors",
    "make_frame",
    "open_document",
]


NUMBER_FOR_TEXT = 'want text; an id that is a number goes in quotes: "1024"'


class Busy(Exception):
    """The queue of waiting requests is full."""


class TooSlow(Exception):
    """The answer was not ready within the time-out."""


def make_frame(
    services: Sequence,
    meters: FrameMeters,
    limits: HttpOptions,
    title: str,
    description: str,
    open_paths: Sequence[str] = OPEN,
) -> FastAPI:
    """An application without routes. It starts the services when it starts, and closes them after
    the last request, the first one last.

    open_paths  need no key
    """

    @asynccontextmanager
    async def lifespan(app):
        for service in services:
            service.start()
        yield
        for service in reversed(services):
            await asyncio.to_thread(service.close)

    app = FastAPI(
        title=title,
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        default_response_class=JSON,
        description=description,
    )
    app.add_middleware(
        Middleware,
        meters=meters,
        max_body=limits.max_body,
        body_timeout=limits.timeout,
        api_key=getattr(limits, "api_key", ""),  # limits may be anything with the fields it has
        open_paths=open_paths,
    )
    add_error_handlers(app, limits.timeout)
    return app


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
                "problem": NUMBER_FOR_TEXT
                if e["type"] == "string_type" and type(e["input"]) in (int, float)
                else clean(e["msg"].removeprefix("Value error, ")),
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


def add_status_routes(app: FastAPI, services: Sequence, meters: FrameMeters) -> None:
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
        if not all(service.ready() for service in services):
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


def open_document(app: FastAPI, api_key: str, open_paths: Sequence[str] = OPEN) -> None:
    """Say in the OpenAPI document which routes need the service's key, where it has one."""
    plain: Callable[[], dict] = app.openapi

    def document() -> dict:
        whole = plain()
        if api_key:
            add_key(whole, open_paths)
        return whole

    app.openapi = document  # type: ignore[method-assign]


def add_key(document: dict, open_paths: Sequence[str] = OPEN) -> None:
    """Say in an OpenAPI document which routes need the key, and that they answer 401 without it."""
    schemes = {"key": {"type": "http", "scheme": "bearer"}}
    document["components"]["securitySchemes"] = schemes
    answer = {
        "description": MEANING[401],
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    for path, methods in document["paths"].items():
        for operation in methods.values() if path not in open_paths else ():
            operation["security"] = [{"key": []}]
            operation["responses"]["401"] = answer
