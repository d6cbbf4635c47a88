"""The HTTP side of `pagellm serve`: its routes and the OpenAPI document. frame.py has the rest.

    app = make_app(service)          service is a serve.Service, or anything with its methods

Logs name routes, never people or items. Needs the extra [serve].
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Query, Response
from fastapi import Path as InPath
from starlette.exceptions import HTTPException

from pagellm import __version__
from pagellm.data.shop import is_forgotten
from pagellm.serving.frame import add_key, add_status_routes, errors, make_frame
from pagellm.serving.interesting import Finder
from pagellm.serving.meters import Meters
from pagellm.serving.middleware import JSON
from pagellm.serving.schema import (
    FoundList,
    Interesting,
    Item,
    Page,
    PageRequest,
    ScoreRequest,
    ShopFacts,
    User,
)
from pagellm.stage.config import PageLLMError

__all__ = ["STATIC", "add_routes", "find", "make_app"]


STATIC = Path(__file__).parent / "static"
SCRIPTS = ("page.js", "cards.js", "common.js", "picture.js", "link.js")
FILES = {"page.css": "text/css", **dict.fromkeys(SCRIPTS, "text/javascript")}


def make_app(service) -> FastAPI:
    """The application. It starts `service` when it starts, and closes it after the last request."""
    meters = Meters(service)
    service.observe = meters.observe
    app = make_frame(
        [service],
        meters,
        service.config,
        "PageLLM",
        "Whole recommendation pages, with and without the reward. Logs hold no personal data.",
    )
    add_status_routes(app, [service], meters)
    add_routes(app, service, meters)
    return app


def add_routes(app: FastAPI, service, meters: Meters) -> None:
    """Everything of a service of pages but its health and meters."""
    add_page_routes(app, service, meters)
    add_catalogue_routes(app, service)
    add_interesting_route(app, service)
    add_shop_route(app, service)
    add_static_routes(app)
    complete_document(app, service)


def longest_page(service) -> int:
    """Slots of the longest page that this service writes, whatever the policy."""
    recommender = service.recommender
    return min(service.config.max_k, *map(recommender.slots, recommender.names))


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
        if id in r.user_of:
            items, ratings, _ = r.user_state(r.user_of[id])
        elif id in r.left_out.users:
            items, ratings, *_ = r.past(None, r.left_out.of(id))
        else:
            raise HTTPException(
                404, "no such user; strangers are served by POST /v1/page with a history"
            )
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
        r = service.recommender
        ids = (i for i in (*r.shop.user_ids, *r.left_out.users) if not is_forgotten(i))
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


def add_interesting_route(app: FastAPI, service) -> None:
    """GET /v1/interesting: users that are worth a look, for the page in the browser."""
    finder = Finder(service)

    @app.get(
        "/v1/interesting",
        responses={200: {"model": Interesting}, **errors(422, 503, 504)},
        summary="Users worth a look",
    )
    async def interesting(left: Words = "", right: Words = ""):
        best = service.recommender.default
        return JSON(await finder.find(left or best, right or best))


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
                "dataset": service.config.data_dir.name,
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
        if getattr(service.config, "api_key", ""):
            add_key(whole)
        return whole

    app.openapi = document  # type: ignore[method-assign]
