"""The HTTP side of `pagellm storefront serve`: routes, bodies and meters. serving/frame.py has the
limits and errors around them.

    app = make_app(service)          service is a serve.FrontService

Logs and meters name routes, rules and sources; never people, items or titles. Needs the extra
[serve].
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse

from pagellm.serving.api import STATIC as PAGE_STATIC
from pagellm.serving.api import add_routes as add_page_service
from pagellm.serving.api import find
from pagellm.serving.filters import Filters
from pagellm.serving.frame import add_status_routes, errors, make_frame, open_document
from pagellm.serving.meters import FINE, FrameMeters, Meters
from pagellm.serving.middleware import JSON, OPEN
from pagellm.serving.schema import Allowed, FoundList, Id, Strict
from pagellm.storefront.ask import FrontAsk
from pagellm.storefront.parts import INTENTS
from pagellm.storefront.schemas import LAYOUT, PAGE

__all__ = ["FrontMeters", "make_app"]

STATIC = Path(__file__).parent / "static"
# File -> its folder and type. common.js is the one of the page of `pagellm serve`.
FILES = {
    "rows.css": (STATIC, "text/css"),
    "rows.js": (STATIC, "text/javascript"),
    "common.js": (PAGE_STATIC, "text/javascript"),
}
DESCRIPTION = "Pages of themed rows. Logs hold no personal data."


class Bought(Strict):
    """An item of a history."""

    item: Id


class FrontRequest(Strict):
    """Whose page of rows, and how. Without user and history it is a stranger's."""

    user: Id | None = Field(None, description="the shop's id; null: nobody known")
    history: Annotated[list[Bought], Field(max_length=1000)] = Field(
        default_factory=list, description="items bought since the stored orders, oldest first"
    )
    layout: Annotated[str, Field(min_length=1, max_length=64)] | dict[str, Any] | None = Field(
        None, description="an id of GET /v1/storefront/layouts, or a whole layout/1; null: default"
    )
    at: int | None = Field(
        None,
        ge=0,
        le=253_402_300_799,
        description="seconds since 1970: the moment of the page, for seasons; not before the "
        "stored orders end; null: as served",
    )
    explain: bool = Field(False, description="add the gates' decisions, under `page`")
    explore: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = Field(
        0.0, description="draw each slot by softmax(score / this); 0: the best item"
    )
    explore_themes: bool = Field(False, description="with explore: draw each row's theme too")
    explore_all: bool = Field(
        False, description="with explore: draw static, editorial and bought-before rows too"
    )
    seed: int | None = Field(None, ge=0, lt=2**63, description="of the draws; null: as served")
    static: bool = Field(False, description="the same layout without themes, to stand beside")
    filters: Allowed | None = None

    def ask(self) -> FrontAsk:
        limits = Filters()
        if (f := self.filters) is not None:
            low, high = (f.price.min, f.price.max) if f.price else (None, None)
            categories = None if f.categories is None else tuple(f.categories)
            in_stock = None if f.in_stock is None else tuple(f.in_stock)
            limits = Filters(tuple(f.exclude), categories, in_stock, low, high)
        more = tuple(bought.item for bought in self.history)
        return FrontAsk(
            self.user,
            more,
            self.layout,
            self.at,
            self.explain,
            self.explore,
            self.explore_themes,
            self.explore_all,
            self.seed,
            self.static,
            limits,
        )


Text = Annotated[str, Field(min_length=1, max_length=200)]


class CheckRequest(Strict):
    """A row as a merchandiser would write it."""

    title: Text
    concepts: Annotated[list[Text], Field(max_length=50)] = Field(
        default_factory=list, description="names of categories"
    )
    keywords: Annotated[list[Text], Field(max_length=50)] = Field(
        default_factory=list, description="texts of the corpus; empty: the concepts"
    )
    intent: Literal[INTENTS] = Field(  # type: ignore[valid-type]
        "editorial", description="an editorial row may name restricted categories, others may not"
    )


class FrontMeters:
    """Prometheus meters of pages of rows, in a frame's registry.

    frame  the meters around them, which count whatever is none of theirs
    """

    def __init__(self, frame: FrameMeters, service):
        self.frame = frame
        registry: CollectorRegistry = frame.registry
        self.pages = Histogram(
            "pagellm_storefront_page_seconds",
            "Pages of rows by where their themes came from, and the time each took",
            ("source",),
            buckets=FINE,
            registry=registry,
        )
        self.rows = Counter(
            "pagellm_storefront_rows", "Rows by source, but for cached pages", ("source",),
            registry=registry,
        )  # fmt: skip
        self.gates = Counter(
            "pagellm_storefront_gates",
            "Decisions of the gates that are no pass",
            ("rule", "action"),
            registry=registry,
        )
        self.fallbacks = Counter(
            "pagellm_storefront_fallbacks", "Steps down, over all pages", registry=registry
        )
        for name, what, read in (
            ("cache_hits", "Look-ups of rows and pages answered", lambda: service.ahead.cache.hits),
            ("cache_misses", "Look-ups not answered", lambda: service.ahead.cache.misses),
            ("waiting", "Pages being made or waiting for it", service.waiting),
            ("themes_on", "1 while the kill switch is on", lambda: not service.ahead.switch.state),
        ):
            gauge = Gauge(f"pagellm_storefront_{name}", what, registry=registry)
            gauge.set_function(read)

    def observe(self, what: str, value: float) -> None:
        """Count a report of FrontService."""
        kind, _, rest = what.partition(":")
        if kind == "page":
            self.pages.labels(rest).observe(value)
        elif kind == "row":
            self.rows.labels(rest).inc(value)
        elif kind == "gate":
            self.gates.labels(*rest.split(":")).inc(value)
        elif kind == "fallbacks":
            self.fallbacks.inc(value)
        else:
            self.frame.observe(what, value)


def make_app(service, pages=None) -> FastAPI:
    """The application. pages: PageLLM's own serving.serve.Service, to be served beside it."""
    frame: FrameMeters
    events = ("swap", "swap_failed", "timeout", "busy", "fault", "writer_failed", "cache_trouble")
    services = [service]
    if pages is None:
        frame = FrameMeters(events)
    else:
        frame = whole = Meters(pages)
        services.append(pages)
    service.observe = FrontMeters(frame, service).observe
    open_paths = (*OPEN, "/storefront")
    app = make_frame(services, frame, service.config, "Storefront", DESCRIPTION, open_paths)
    add_front_routes(app, service)
    add_shop_routes(app, service)
    add_front_files(app, alone=pages is None)
    add_status_routes(app, services, frame)
    if pages is None:
        open_document(app, service.config.api_key, open_paths)
    else:
        pages.observe = whole.observe
        add_page_service(app, pages, whole)
    return app


def add_front_routes(app: FastAPI, service) -> None:
    """POST /v1/storefront makes a page; POST /v1/storefront/check looks at a row."""
    schema = {name: value for name, value in PAGE.items() if name != "$id"}
    document = {"application/json": {"schema": schema}}
    answers = {200: {"content": document}, **errors(400, 408, 413, 415, 422, 503, 504)}

    @app.post("/v1/storefront", responses=answers, summary="A page of rows", response_model=None)
    async def storefront(asked: FrontRequest):
        value, how = await service.answer(asked.ask())
        return Response(value, media_type="application/json", headers={"x-themes-from": how})

    @app.post(
        "/v1/storefront/check",
        responses=errors(400, 408, 413, 415, 422),
        summary="What the gates say of a row, and its items",
    )
    def check(asked: CheckRequest):
        return JSON(service.check(asked.title, asked.concepts, asked.keywords, asked.intent))


def add_shop_routes(app: FastAPI, service) -> None:
    """What can be asked for, and what is served."""

    @app.get("/v1/storefront/layouts", summary="Layouts by id", responses={200: {}})
    def layouts():
        found = []
        for layout in service.layouts.values():
            rows = []
            for row in layout.placements:
                given = {name: getattr(row, name) for name in LAYOUT_FIELDS}
                rows.append({name: value for name, value in given.items() if value not in ("", ())})
            found.append({"schema": "layout/1", "id": layout.id, "placements": rows})
        return JSON({"default": service.ahead.store.layout.id, "layouts": found})

    @app.get("/v1/storefront/state", summary="Versions, what is kept, the kill switch")
    def state():
        return JSON(service.state())

    @app.get(
        "/v1/storefront/users",
        responses={200: {"model": FoundList}, **errors(422)},
        summary="Find users by id",
    )
    def users(
        query: Annotated[str, Query(max_length=256)] = "",
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ):
        ids = service.ahead.store.known.number
        return JSON({"found": find(query, limit, ((i, "") for i in ids))})


LAYOUT_FIELDS = tuple(LAYOUT["properties"]["placements"]["items"]["properties"])


def add_front_files(app: FastAPI, alone: bool) -> None:
    """The page in the browser: its files are read once, here."""
    page = (STATIC / "rows.html").read_bytes()
    kept = {name: (folder / name).read_bytes() for name, (folder, _) in FILES.items()}
    fresh = {"cache-control": "no-cache"}

    @app.get("/storefront", include_in_schema=False)
    async def rows():
        return Response(page, media_type="text/html", headers=fresh)

    @app.get("/static/storefront/{name}", include_in_schema=False)
    async def front_file(name: str):
        if name not in FILES:
            raise HTTPException(404, "no such file")
        return Response(kept[name], media_type=FILES[name][1], headers=fresh)

    if alone:

        @app.get("/", include_in_schema=False)
        async def first():
            return RedirectResponse("/storefront")
