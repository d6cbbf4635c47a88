"""The service: a bad request gets a clear 4xx, swaps lose nothing, logs name nobody."""

import asyncio
import configparser
import http.client
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="needs the extra: pip install 'pagellm[serve]'")
pytest.importorskip("uvicorn", reason="needs the extra: pip install 'pagellm[serve]'")
parser = pytest.importorskip(
    "prometheus_client.parser", reason="needs the extra: pip install 'pagellm[serve]'"
)
pytest.importorskip("httpx", reason="needs httpx: pip install 'pagellm[dev]'")


import httpx  # noqa: E402

from pagellm.serving import api, serve  # noqa: E402
from pagellm.serving.api import make_app  # noqa: E402
from pagellm.serving.meters import LastPages  # noqa: E402
from pagellm.serving.middleware import JsonLines  # noqa: E402
from pagellm.serving.recommender import Ask  # noqa: E402
from pagellm.serving.schema import Error, Item, Page, ShopFacts, User  # noqa: E402
from pagellm.serving.serve import Config, Service  # noqa: E402
from pagellm.stage.config import PageLLMError  # noqa: E402
from pagellm.stage.run import file_id  # noqa: E402


def config(root, **more):
    return Config(
        run="base",
        data=str(root / "data"),
        runs=str(root / "runs"),
        device="cpu",
        **{"reload": 0} | more,
    )


class Client:
    """Requests against an application in this process, its service running."""

    def __init__(self, service):
        self.service, self.app = service, make_app(service)

    def __enter__(self):
        self.service.start()
        return self

    def __exit__(self, *_):
        self.service.close()

    async def send(self, *requests):
        """(method, path, options) of each, all at once."""
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as sender:
            return await asyncio.gather(
                *(sender.request(method, path, **options) for method, path, options in requests)
            )

    def __call__(self, method, path, **options):
        return asyncio.run(self.send((method, path, options)))[0]

    def page(self, **body):
        return self("POST", "/v1/page", json=body)


@pytest.fixture(scope="module")
def service(served):
    return Service(config(served))


@pytest.fixture(scope="module")
def client(service):
    with Client(service) as client:
        yield client


@pytest.fixture
def some(service):
    return service.recommender.shop


def refused(reply, *codes):
    assert reply.status_code in codes, (reply.status_code, reply.text)
    body = Error.model_validate_json(reply.text)
    assert body.error.message and "Traceback" not in reply.text
    return body.error


def test_a_page_is_what_the_documents_say(client, some):
    reply = client.page(
        user=some.user_ids[0], k=5, explain=True, filters={"exclude": [some.catalogue.ids[0], "?"]}
    )
    assert reply.status_code == 200
    page = Page.model_validate(reply.json(), strict=True)
    assert (
        [s.rank for s in page.items] == [1, 2, 3, 4, 5]
        and page.unknown.items == ["?"]
        and page.latency_ms > 0
    )
    assert page.model == client.service.recommender.hashes["ppo"]
    assert set(reply.json()["items"][0]) == {
        "rank",
        "item",
        "title",
        "category",
        "brand",
        "price",
        "score",
        "token_reward",
        "held_out",
        "similar",
    }
    shown = client(
        "POST", "/v1/score", json={"user": some.user_ids[0], "items": [s.item for s in page.items]}
    )
    assert Page.model_validate(shown.json()).page_reward == pytest.approx(
        page.page_reward, abs=1e-5
    )


def test_users_items_and_shop(client, some):
    user = User.model_validate(client("GET", f"/v1/users/{some.user_ids[1]}").json())
    items, ratings = some.csr(None).of(1)
    assert [e.item for e in user.history] == [some.catalogue.ids[i] for i in items]
    assert [e.rating for e in user.history] == pytest.approx(ratings.tolist())
    item = Item.model_validate(client("GET", f"/v1/items/{some.catalogue.ids[2]}").json())
    assert item.title == some.catalogue.title[2]
    facts = ShopFacts.model_validate(client("GET", "/v1/shop").json())
    assert facts.items == some.n_items and {c.name for c in facts.categories} == set(
        client.service.recommender.members
    )
    word = some.catalogue.title[2].split()[0].upper()
    found = client("GET", f"/v1/items?query={word}&limit=100").json()["found"]
    assert [f["id"] for f in found] == [
        i
        for i, title in zip(some.catalogue.ids, some.catalogue.title, strict=True)
        if word.lower() in title.lower()
    ]
    assert len(client("GET", "/v1/users?limit=3").json()["found"]) == 3
    for path in (
        "/v1/users/nobody",
        "/v1/items/nothing",
        "/v1/users/",
        "/v1/items/a%2Fb",
        "/v1/users/%ff",
        "/nope",
    ):
        assert refused(client("GET", path), 404).code == "not_found"


def test_users_below_the_k_core_are_found_with_their_history(served, some, tmp_path):
    shutil.copytree(served, tmp_path / "copy")
    items = some.catalogue.ids
    pq.write_table(
        pa.table({"user_id": ["new"] * 3, "item_id": [items[3], "gone", items[8]]}).append_column(
            "rating", pa.array([5.0, 5.0, None])
        ),
        tmp_path / "copy" / "data" / "synthetic" / "dropped.parquet",
    )
    with Client(Service(config(tmp_path / "copy"))) as client:
        user = User.model_validate(client("GET", "/v1/users/new").json())
        assert [(e.item, e.rating) for e in user.history] == [(items[3], 5.0), (items[8], None)]
        assert client("GET", "/v1/users?query=new").json()["found"] == [{"id": "new", "title": ""}]
        assert client.page(user="new", k=2).json()["user"]["history"] == len(user.history)


@pytest.mark.parametrize("body", [{"user": 7}, {"history": [{"item": 7.5}]}])
def test_an_id_that_is_sent_as_a_number_is_told_to_go_in_quotes(client, body):
    assert "goes in quotes" in refused(client.page(**body), 422).message


def test_head_is_get_without_the_body(client, some):
    """Load balancers and uptime monitors ask by HEAD: same status and headers (RFC 9110, 9.3.2)."""
    paths = [
        *("/healthz", "/readyz", "/metrics", "/openapi.json", "/", "/static/page.css"),
        *("/v1/shop", "/v1/users?limit=3", "/v1/items?query=a", f"/v1/users/{some.user_ids[1]}"),
        *(f"/v1/items/{some.catalogue.ids[2]}", "/v1/users/nobody", "/nope", "/v1/items?limit=x"),
    ]
    for path in paths:
        head, get = client("HEAD", path), client("GET", path)
        assert (head.status_code, head.content) == (get.status_code, b""), path
        assert head.headers["content-type"] == get.headers["content-type"]
        assert "content-length" in head.headers
    reply = client("HEAD", "/v1/page")
    assert reply.status_code == 405 and reply.headers["allow"] == "POST"


GOOD = {"user": "a", "k": 3}
BAD = [
    {},
    [],
    "text",
    5,
    {"k": 3},
    GOOD | {"k": 0},
    GOOD | {"k": -1},
    GOOD | {"k": 2.5},
    GOOD | {"k": "3"},
    GOOD | {"k": True},
    GOOD | {"k": 10**30},
    GOOD | {"k": 101},
    GOOD | {"k": None},
    GOOD | {"user": 5},
    GOOD | {"user": ""},
    GOOD | {"user": "x" * 257},
    GOOD | {"user": ["a"]},
    GOOD | {"decoding": "sample"},
    GOOD | {"policy": "best"},
    GOOD | {"extra": 1},
    GOOD | {"history": "a:5"},
    GOOD | {"history": [["a", 5]]},
    GOOD | {"history": [{"item": "a", "rating": 6}]},
    GOOD | {"history": [{"item": "a", "rating": 0.5}]},
    GOOD | {"history": [{"item": "a", "rating": "5"}]},
    GOOD | {"history": [{"rating": 5}]},
    GOOD | {"history": [{"item": "a"}] * 1001},
    GOOD | {"filters": {"price": {"min": 2, "max": 1}}},
    GOOD | {"filters": {"price": {"min": -1}}},
    GOOD | {"filters": {"price": [1, 2]}},
    GOOD | {"filters": {"exclude": "a"}},
    GOOD | {"filters": {"exclude": [1]}},
    GOOD | {"filters": {"colour": []}},
    GOOD | {"filters": {"in_stock": [None]}},
    GOOD | {"filters": {"categories": ["x"] * 1001}},
    GOOD | {"filters": None},
]


@pytest.mark.parametrize("body", BAD, ids=lambda b: json.dumps(b)[:60])
def test_a_bad_request_is_named(client, body):
    error = refused(client("POST", "/v1/page", json=body), 422)
    assert error.code == "invalid"


@pytest.mark.parametrize(
    "content, codes",
    [
        (b"", (422,)),
        (b"null", (422,)),
        (b"{", (422,)),
        (b"[" * 100_000, (400, 422)),
        (b'{"user": "\xff"}', (400,)),
        (b'{"user": "\\ud800"}', (422,)),
        (b'{"user": "a", "\\ud800": 1}', (422,)),
        (b'{"user":"a","k":NaN}', (422,)),
        (b'{"history": [{"item": "a", "rating": NaN}]}', (422,)),
        (b'{"history": [{"item": "a", "rating": Infinity}]}', (422,)),
        (b'{"user": "a", "k": ' + b"9" * 5000 + b"}", (400, 422)),
        (b'{"user": "a", "filters": {"price": {"min": 1e999}}}', (422,)),
        (b"\x00" * 100, (400, 422)),
        (b'{"user": "a", "k": 3} trailing', (422,)),
    ],
)
def test_a_body_that_is_no_json_is_named(client, content, codes):
    refused(
        client("POST", "/v1/page", content=content, headers={"content-type": "application/json"}),
        *codes,
    )


def test_other_ways_to_ask_wrongly(client, some):
    assert refused(client("POST", "/v1/page", content=b'{"user": "a"}'), 415).code == "not_json"
    assert refused(client("PUT", "/v1/page", json=GOOD), 405).code == "method_not_allowed"
    assert client("PUT", "/v1/page").headers["allow"] == "POST"
    for path in (
        "/v1/items?limit=0",
        "/v1/items?limit=x",
        "/v1/users?limit=101",
        f"/v1/items?query={'x' * 300}",
        f"/v1/users/{'x' * 300}",
    ):
        refused(client("GET", path), 422)
    item = some.catalogue.ids[0]
    assert (
        "repeats"
        in refused(
            client("POST", "/v1/score", json={"user": "a", "items": [item, item]}), 422
        ).message
    )
    assert (
        "at most"
        in refused(
            client("POST", "/v1/score", json={"user": "a", "items": some.catalogue.ids * 9}), 422
        ).message
    )


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "user",
                    "history",
                    "k",
                    "filters",
                    "item",
                    "rating",
                    "price",
                    "min",
                    "max",
                    "exclude",
                    "categories",
                    "in_stock",
                    "policy",
                    "decoding",
                    "x",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


def test_slots_are_kept_for_new_items_by_option_and_by_request(served):
    service = Service(config(served, new_items=2, new_days=1e5))  # every item is new
    shop = service.recommender.shop
    first = np.sort([shop.time[shop.item == i].min() for i in range(shop.n_items)])
    few = Service(config(served, new_days=float(shop.time.max() - first[-3]) / 86400 + 0.5))
    new = {name for name, new in zip(shop.catalogue.ids, few.recommender.new, strict=True) if new}
    assert service.recommender.new_items == 2 and 0 < len(new) < shop.n_items
    with Client(few) as client:
        for body, least in (({"history": []}, 0), ({"history": [], "new_items": 1}, 1)):
            page = client("POST", "/v1/page", json=body | {"k": 5}).json()
            assert sum(slot["item"] in new for slot in page["items"]) >= least
        error = refused(client("POST", "/v1/page", json=GOOD | {"k": 2, "new_items": 3}), 422)
        assert "new_items" in error.message
        refused(client("POST", "/v1/page", json=GOOD | {"new_items": -1}), 422)


@given(body=values, path=st.sampled_from(["/v1/page", "/v1/score"]))
@settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_json_whatever_breaks_the_service(client, body, path):
    if isinstance(body, dict):
        body.setdefault("user", "a")
    reply = client(
        "POST",
        path,
        content=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    assert reply.status_code in (200, 400, 422)
    (Page if reply.status_code == 200 else Error).model_validate_json(reply.text)


def test_size_limits(served, service):
    small = Client(Service(config(served, max_body=200)))
    with small:
        assert small.page(**GOOD).status_code == 200
        assert (
            refused(small.page(**GOOD, filters={"exclude": ["x" * 20] * 20}), 413).code
            == "too_large"
        )

        async def pieces():
            for _ in range(50):
                yield b" " * 10

        assert refused(small("POST", "/v1/page", content=pieces()), 413).code == "too_large"

        async def crawl():
            yield b"{"
            await asyncio.sleep(5)

    slow = Client(Service(config(served, timeout=0.1)))
    with slow:
        assert refused(slow("POST", "/v1/page", content=crawl()), 408).code == "slow_body"


def test_requests_that_wait_together_are_written_together(served, some):
    seen = []
    service = Service(config(served, batch=4))
    client = Client(service)
    service.observe = lambda what, value: seen.append(value) if what == "batch" else None
    bodies = [{"user": name, "k": 2 + i % 3} for i, name in enumerate(some.user_ids[:7])]
    bodies.insert(3, {"user": some.user_ids[0], "k": 4, "policy": "sft"})

    async def all_at_once():
        waiting = asyncio.ensure_future(
            client.send(*(("POST", "/v1/page", {"json": body}) for body in bodies))
        )
        while service.waiting() < len(bodies):
            await asyncio.sleep(0.01)
        service.start()
        return await waiting

    replies = asyncio.run(all_at_once())
    assert sorted(seen) == [1, 3, 4]  # seven of one policy, four at once, and one of the other
    for body, reply in zip(bodies, replies, strict=True):
        (page,) = service.recommender.answers(
            [Ask(user=body["user"], k=body["k"], policy=body.get("policy", "ppo"))]
        )
        assert [s["item"] for s in reply.json()["items"]] == [s["item"] for s in page["items"]]
    service.close()


def test_memory_is_given_back_between_batches(served, monkeypatch):
    given = []
    monkeypatch.setattr(serve, "TRIM_EVERY", 0.0)
    monkeypatch.setattr(serve, "trim_memory", lambda plain=serve.trim_memory: given.append(plain()))
    with Client(Service(config(served))) as client:
        assert [client.page(history=[], k=3).status_code for _ in range(3)] == [200] * 3
    assert len(given) == 3


def test_what_waits_is_answered_before_the_service_stops(served):
    service = Service(config(served))
    client = Client(service)

    async def stop_with_three_waiting():
        waiting = asyncio.ensure_future(
            client.send(*(("POST", "/v1/page", {"json": GOOD}) for _ in range(3)))
        )
        while service.waiting() < 3:
            await asyncio.sleep(0.01)
        service.start()
        await asyncio.to_thread(service.close)
        return await waiting

    assert [r.status_code for r in asyncio.run(stop_with_three_waiting())] == [200] * 3


def test_one_request_that_breaks_a_batch_breaks_alone(served, caplog):
    service = Service(config(served))
    client = Client(service)
    plain = service.recommender.answers

    def answers(asks):
        if any(ask.k == 3 for ask in asks):
            raise RuntimeError("secret of the user")
        return plain(asks)

    service.recommender.answers = answers

    async def all_at_once():
        waiting = asyncio.ensure_future(
            client.send(
                *(("POST", "/v1/page", {"json": {"user": "a", "k": k}}) for k in (1, 2, 3, 4))
            )
        )
        while service.waiting() < 4:
            await asyncio.sleep(0.01)
        service.start()
        return await waiting

    with caplog.at_level("INFO", "pagellm"):
        replies = asyncio.run(all_at_once())
    service.close()
    assert [r.status_code for r in replies] == [200, 200, 500, 200]
    assert "secret" not in replies[2].text and "Traceback" not in replies[2].text
    faults = [r for r in caplog.records if r.getMessage() == "fault"]
    assert (
        len(faults) == 1
        and faults[0].fields["type"] == "RuntimeError"
        and "secret" not in JsonLines().format(faults[0])
    )


def test_a_slow_batch_times_out_and_a_full_queue_refuses(served):
    service = Service(config(served, timeout=0.15, queue=2))
    client = Client(service)  # not started: nobody takes what waits
    refused(client("GET", "/readyz"), 503)

    async def three():
        return await client.send(*(("POST", "/v1/page", {"json": GOOD}) for _ in range(3)))

    replies = asyncio.run(three())
    assert sorted(r.status_code for r in replies) == [503, 504, 504]
    for reply in replies:
        assert (
            refused(reply, 503, 504).code in ("busy", "timeout")
            and reply.headers["retry-after"] == "1"
        )
    service.start()
    assert client("GET", "/readyz").status_code == 200
    text = client("GET", "/metrics").text
    assert (
        'pagellm_events_total{event="timeout"} 2.0' in text
        and 'pagellm_events_total{event="busy"} 1.0' in text
    )
    service.close()
    assert refused(client.page(**GOOD), 503).code == "busy"  # stopping: nothing new
    refused(client("GET", "/readyz"), 503)
    assert client("GET", "/healthz").status_code == 200


def other_weights(root):
    """The SFT weights in place of PPO's, `done` last, as a stage writes them."""
    stage = root / "runs" / "base" / "ppo"
    shutil.copy(root / "runs" / "base" / "sft" / "model.pt", stage / "new.pt")
    os.replace(stage / "new.pt", stage / "model.pt")
    (stage / "done").write_text(json.dumps({"id": file_id(stage / "model.pt")}))


def test_new_weights_are_taken_up_without_losing_a_request(served, some, tmp_path):
    shutil.copytree(served, tmp_path / "copy")
    root = tmp_path / "copy"
    service = Service(config(root))
    old = service.recommender
    replies, stop = [], threading.Event()
    with Client(service) as client:

        def ask():
            while not stop.is_set():
                replies.extend(
                    asyncio.run(
                        client.send(
                            *(
                                ("POST", "/v1/page", {"json": {"user": name, "k": 4}})
                                for name in some.user_ids[:5]
                            )
                        )
                    )
                )

        askers = [threading.Thread(target=ask) for _ in range(2)]
        for thread in askers:
            thread.start()
        while len(replies) < 20:
            time.sleep(0.01)
        assert not service.take_new_weights()  # nothing new
        other_weights(root)
        assert service.take_new_weights() and not service.take_new_weights()
        after = len(replies)
        while len(replies) < after + 30:
            time.sleep(0.01)
        stop.set()
        for thread in askers:
            thread.join()
        assert 'pagellm_events_total{event="swap"} 1.0' in client("GET", "/metrics").text
    new = service.recommender
    assert new.hashes["ppo"] != old.hashes["ppo"] and {r.status_code for r in replies} == {200}
    by_model = {
        r.hashes["ppo"]: {
            name: a
            for name, a in zip(
                some.user_ids[:5],
                r.answers([Ask(user=name, k=4) for name in some.user_ids[:5]]),
                strict=True,
            )
        }
        for r in (old, new)
    }
    assert {r.json()["model"] for r in replies} == set(by_model)
    for reply in replies:  # each page is that of the model it names
        body = reply.json()
        want = by_model[body["model"]][body["user"]["id"]]
        assert [(s["item"], s["score"]) for s in body["items"]] == [
            (s["item"], pytest.approx(s["score"], abs=1e-4)) for s in want["items"]
        ]


def test_weights_that_are_half_written_are_not_taken_up(served, tmp_path):
    shutil.copytree(served, tmp_path / "copy")
    root = tmp_path / "copy"
    service, events = Service(config(root)), []
    service.observe = lambda what, value: events.append(what)
    before = service.recommender
    stage = root / "runs" / "base" / "ppo"
    whole = (stage / "model.pt").read_bytes()
    (stage / "done").rename(stage / "kept")
    assert not service.take_new_weights() and events == []  # being trained anew: no done file
    (stage / "done").write_text(json.dumps({"id": "0" * 16}))
    assert not service.take_new_weights() and not service.take_new_weights()
    (stage / "model.pt").write_bytes(whole[: len(whole) // 2])
    assert not service.take_new_weights() and service.recommender is before
    assert events.count("swap_failed") == 1  # said once, tried at every look
    other_weights(root)
    assert service.take_new_weights() and service.recommender is not before


def test_sft_alone_is_served_and_what_comes_later_is_taken_up(sft_alone, served, some, tmp_path):
    """Rewards are null and PPO is refused by name, until PPO and a reward model are finished."""
    root = tmp_path / "copy"
    shutil.copytree(sft_alone, root)
    service = Service(config(root))
    with Client(service) as client:
        reply = client.page(user=some.user_ids[0], k=3, explain=True)
        page = Page.model_validate(reply.json(), strict=True)
        assert page.policy == "sft" and page.page_reward is None and page.reward_model is None
        assert len(page.items) == 3 and all(s.token_reward is None for s in page.items)
        items = [s.item for s in page.items][::-1]
        scored = client("POST", "/v1/score", json={"user": some.user_ids[0], "items": items})
        assert Page.model_validate(scored.json()).page_reward is None
        facts = ShopFacts.model_validate(client("GET", "/v1/shop").json())
        assert set(facts.models) == {"sft", "data"} and facts.split == "none"
        error = refused(client.page(user="a", policy="ppo"), 422)
        assert "not served here, there is sft" in error.message
        assert not service.take_new_weights()
        for stage in ("reward", "ppo"):
            shutil.copytree(
                served / "runs" / "base" / stage,
                root / "runs" / "base" / stage,
                ignore=shutil.ignore_patterns("done"),
            )
            assert not service.take_new_weights()  # begun, not finished
            shutil.copy(served / "runs" / "base" / stage / "done", root / "runs" / "base" / stage)
            assert service.take_new_weights()
        page = Page.model_validate(client.page(user=some.user_ids[0], k=3).json())
        assert page.policy == "ppo" and page.page_reward is not None


def test_the_watch_sees_new_weights_by_itself(served, tmp_path):
    shutil.copytree(served, tmp_path / "copy")
    service = Service(config(tmp_path / "copy", reload=0.05))
    before = service.recommender
    with Client(service):
        other_weights(tmp_path / "copy")
        for _ in range(200):
            if service.recommender is not before:
                break
            time.sleep(0.05)
    assert service.recommender is not before


def test_logs_are_json_and_name_nobody(client, some):
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("pagellm")
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        user, item = some.user_ids[2], some.catalogue.ids[3]
        client.page(user=user, history=[{"item": item, "rating": 5}], k=2)
        client.page(user=user, k="x" + item)
        client("GET", f"/v1/users/{user}")
        client("GET", f"/v1/items?query={item}")
        client("GET", f"/{user}")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [(x["route"], x["status"]) for x in lines] == [
        ("/v1/page", 200),
        ("/v1/page", 422),
        ("/v1/users/{id:path}", 200),
        ("/v1/items", 200),
        ("unmatched", 404),
    ]
    assert user not in out.getvalue() and item not in out.getvalue()
    assert all(
        set(x) == {"time", "level", "event", "id", "route", "method", "status", "ms"} for x in lines
    )


def test_meters_are_prometheus_text(client):
    client.page(**GOOD)
    reply = client("GET", "/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    families = {f.name: f for f in parser.text_string_to_metric_families(reply.text)}
    for name in (
        "pagellm_requests",
        "pagellm_request_seconds",
        "pagellm_stage_seconds",
        "pagellm_batch_pages",
        "pagellm_events",
        "pagellm_waiting",
        "pagellm_cache_bytes",
        "pagellm_cache_hits",
        "pagellm_model",
    ):
        assert name in families, name
    stages = {s.labels["stage"] for s in families["pagellm_stage_seconds"].samples}
    assert stages == {"prompt", "decode", "reward", "metrics"}
    assert {s.labels["hash"] for s in families["pagellm_model"].samples} == set(
        client.service.recommender.hashes.values()
    )


def samples(client):
    """(name, labels) -> value of every sample at /metrics."""
    families = parser.text_string_to_metric_families(client("GET", "/metrics").text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def test_meters_count_what_stands_on_the_pages(client, some):
    before = samples(client)

    def grown(name, **labels):
        key = (name, tuple(sorted(labels.items())))
        return samples(client).get(key, 0) - before.get(key, 0)

    first = some.catalogue.ids[0]
    page = client.page(user=some.user_ids[0], k=3).json()
    client.page(history=[{"item": "?", "rating": 5}], k=3, filters={"in_stock": [first, "!"]})
    client.page(user="nobody", history=[{"item": first, "rating": 5}], k=3)
    client("POST", "/v1/score", json={"user": some.user_ids[0], "items": [first]})
    policy = page["policy"]
    assert grown("pagellm_pages_total", policy=policy, user="known") == 1
    assert grown("pagellm_pages_total", policy=policy, user="stranger") == 2
    assert grown("pagellm_short_pages_total", policy=policy) == 1
    assert grown("pagellm_unknown_total", what="items") == 2
    assert grown("pagellm_unknown_total", what="user") == 1
    assert grown("pagellm_page_reward_count", policy=policy) == 3
    assert 0 < samples(client)["pagellm_top_item_share", ()] <= 1


def test_the_last_pages_are_counted_and_older_ones_forgotten():
    last = LastPages(room=2)
    assert (last.distinct(), last.top_share()) == (0, 0)
    last.add(["a", "b", "c"])
    last.add(["a", "d"])
    assert (last.distinct(), last.top_share()) == (4, 1.0)
    last.add(["d"])
    assert (last.distinct(), last.top_share()) == (2, 1.0)  # a and d, d on both
    last.add(["e"])
    assert (last.distinct(), last.top_share()) == (2, 0.5)


KEY = "a-key-of-the-tests.1"


def test_a_service_with_a_key_answers_who_sends_it(served):
    with Client(Service(config(served, api_key=KEY))) as client:
        sent = {"authorization": f"Bearer {KEY}"}
        for path in ("/healthz", "/readyz", "/metrics", "/", "/static/page.js", "/openapi.json"):
            assert client("GET", path).status_code == 200, path
        for headers in (
            {},
            {"authorization": "Bearer "},
            {"authorization": f"Bearer {KEY}x"},
            {"authorization": f"Basic {KEY}"},
            {"authorization": KEY},
        ):
            for method, path in (("GET", "/v1/shop"), ("POST", "/v1/page"), ("GET", "/v1/nothing")):
                reply = client(method, path, headers=headers)
                assert refused(reply, 401).code == "no_key"
                assert reply.headers["www-authenticate"] == "Bearer" and KEY not in reply.text
        assert client("GET", "/v1/shop", headers=sent).status_code == 200
        assert client("POST", "/v1/page", json=GOOD, headers=sent).status_code == 200
        lower = {"authorization": f"bearer {KEY}"}  # the scheme's case does not matter (RFC 9110)
        assert client("GET", "/v1/shop", headers=lower).status_code == 200
        document = client("GET", "/openapi.json", headers=sent).json()
        assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
        page = document["paths"]["/v1/page"]["post"]
        assert page["security"] == [{"key": []}] and "401" in page["responses"]
        assert "security" not in document["paths"]["/healthz"]["get"]


def test_health_is_answered_where_the_config_knows_no_key(service, monkeypatch):
    """`make_app` takes anything with a Service's methods; monitors ask by GET and by HEAD."""
    whole = vars(service.config)
    part = types.SimpleNamespace(**{n: v for n, v in whole.items() if n != "api_key"})
    monkeypatch.setattr(service, "config", part)
    client = Client(service)
    for path in ("/healthz", "/readyz"):
        codes = {client(method, path).status_code for method in ("GET", "HEAD")}
        assert len(codes) == 1 and codes <= {200, 503}, path
    assert client("HEAD", "/healthz").status_code == 200


def test_a_key_is_never_shown(served, capsys, monkeypatch):
    assert KEY not in repr(config(served, api_key=KEY))
    for wrong in ("short", "sixteen letters and blanks", "ünïcode-sixteen-letters"):
        with pytest.raises(PageLLMError, match="api_key: want 16 to 512") as error:
            config(served, api_key=wrong)
        assert wrong not in str(error.value)


def test_the_private_class_of_uvicorn_is_of_the_version_that_was_read():
    """HttpWithTimeout builds on uvicorn's own protocol class, which it calls no public interface.

    So setup.cfg admits only minor versions whose class these lines were tried with: it must call
    what HttpWithTimeout overrides, and have what it reads.
    """
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    for name in ("connection_made", "data_received", "connection_lost"):
        assert name in vars(H11Protocol)
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    (bound,) = re.findall(r"uvicorn>=0\.(\d+),<0\.(\d+)", setup["options.extras_require"]["serve"])
    minor = int(uvicorn.__version__.split(".")[1])
    assert int(bound[0]) <= minor < int(bound[1])


def test_the_open_api_document_names_every_route_and_error(client):
    document = client("GET", "/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/page",
        "/v1/score",
        "/v1/users",
        "/v1/users/{id}",
        "/v1/items",
        "/v1/items/{id}",
        "/v1/interesting",
        "/v1/shop",
        "/healthz",
        "/readyz",
        "/metrics",
    }
    answers = document["paths"]["/v1/page"]["post"]["responses"]
    assert set(answers) == {"200", "400", "408", "413", "415", "422", "503", "504"}
    for code, answer in answers.items():
        name = "Page" if code == "200" else "Error"
        assert answer["content"]["application/json"]["schema"] == {
            "$ref": f"#/components/schemas/{name}"
        }
    asked = document["components"]["schemas"]["PageRequest"]
    assert set(asked["properties"]) == {
        "new_items",
        "user",
        "history",
        "k",
        "decoding",
        "variety",
        "policy",
        "explain",
        "filters",
    }
    assert asked["additionalProperties"] is False
    assert asked["properties"]["k"]["maximum"] == client("GET", "/v1/shop").json()["k_max"] == 100


def test_the_browsers_page_asks_nobody_else(client):
    page = client("GET", "/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    text, names, seen = page.text, re.findall(r'(?:src|href)="(/static/[^"]+)"', page.text), set()
    while names:
        seen.add(name := names.pop())
        file = client("GET", name)
        assert file.status_code == 200 and file.headers["content-type"].startswith("text/")
        text += file.text
        found = {f"/static/{x}" for x in re.findall(r'^import .* from "\./(\S+)"', file.text, re.M)}
        names += found - seen - set(names)
    assert len(seen) == len(list((Path(api.__file__).parent / "static").iterdir())) - 1
    assert "page.js" in text and "page.css" in text
    # SVG's name
    assert set(re.findall(r"(?:https?:)?//[a-z][\w.-]+\.[a-z]+", text)) == {"http://www.w3.org"}
    assert "style=" not in page.text and "innerHTML" not in text
    for wrong in ("/static/../api.py", "/static/%2e%2e/api.py", "/static/api.py", "/static/"):
        refused(client("GET", wrong), 404)


def test_it_listens_on_loopback_unless_told():
    assert Config().host == "127.0.0.1"
    for wrong in (
        {"port": 70000},
        {"batch": 0},
        {"timeout": 0.0},
        {"timeout": math.inf},
        {"queue": 0},
        {"log": "all"},
        {"split": "x"},
    ):
        with pytest.raises(PageLLMError):
            Config(**wrong)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(PageLLMError, match=r"pagellm\[serve\]"):
        serve.run(Config())


def test_a_port_that_is_taken_and_a_host_that_is_not_ours_are_named():
    with serve.listen("127.0.0.1", 0) as sock:
        assert sock.proto == socket.IPPROTO_TCP  # or asyncio leaves Nagle's 40 ms in every answer
        with pytest.raises(PageLLMError, match="--port"):
            serve.listen("127.0.0.1", sock.getsockname()[1])
    with pytest.raises(PageLLMError, match="cannot listen"):
        serve.listen("no.such.host.invalid", 0)


@contextmanager
def running(root, *more):
    """A real process; yields it and its port."""
    arguments = [
        "--run",
        "base",
        "--data",
        str(root / "data"),
        "--runs",
        str(root / "runs"),
        "--device",
        "cpu",
        "--port",
        "0",
        *more,
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "pagellm", "serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        yield (
            process,
            int(re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline()).group(1)),
        )
    finally:
        process.kill()
        process.wait()


def test_the_real_process_answers_what_is_under_way_before_it_stops(served):
    with running(served) as (process, port):

        def post(body):
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/page",
                json.dumps(body).encode(),
                {"content-type": "application/json"},
            )
            try:
                with urllib.request.urlopen(request, timeout=30) as reply:
                    return reply.status, json.load(reply)
            except urllib.error.HTTPError as error:
                return error.code, json.load(error)

        assert post(GOOD)[0] == 200 and post({})[0] == 422
        kept = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        for method in ("HEAD", "GET", "HEAD", "GET"):  # a body after HEAD would be read as the next
            kept.request(method, "/v1/items?limit=2")
            reply = kept.getresponse()
            assert reply.status == 200 and bool(reply.read()) == (method == "GET")
        kept.close()
        results = []
        askers = [
            threading.Thread(
                target=lambda: results.append(post(GOOD | {"k": 60, "decoding": "beam"})[0])
            )
            for _ in range(4)
        ]
        for thread in askers:
            thread.start()
        time.sleep(0.15)
        process.send_signal(signal.SIGTERM)
        for thread in askers:
            thread.join()
        assert results == [200] * 4
        assert process.wait(timeout=30) == 0
        lines = [json.loads(line) for line in process.stderr.read().splitlines()]
        assert lines and not any("type" in line for line in lines)


def until_closed(sock, sent=b"", drip=b""):
    """Send, then read until the service hangs up: (seconds, what it said).

    drip  bytes that are sent again and again meanwhile
    """
    sock.settimeout(0.2)
    started, said = time.monotonic(), b""
    try:
        sock.sendall(sent)
        while time.monotonic() - started < 5:
            try:
                sock.sendall(drip)
                data = sock.recv(4096)
            except TimeoutError:
                continue
            if not data:
                break
            said += data
    except OSError:
        pass  # it hung up while we were sending
    return time.monotonic() - started, said


def test_who_sends_nothing_or_drips_or_raves_is_hung_up_on(served):
    """With timeout = 0.6 s: silence, heads and bodies that never end, a body that is far too large,
    and bytes that are no HTTP.
    """
    whole = b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n"
    post = (
        b"POST /v1/page HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: "
    )
    with running(served, "--timeout", "0.6") as (_, port):

        def connect():
            return socket.create_connection(("127.0.0.1", port))

        assert until_closed(connect())[0] < 3
        assert until_closed(connect(), whole[:-4] + b"\r\nx: ", drip=b"x")[0] < 3
        kept = connect()
        for _ in range(2):
            kept.sendall(whole)
            said = b""
            while not said.endswith(b'{"status":"ok"}'):
                said += kept.recv(4096)
            time.sleep(1)  # idle between two requests is allowed for longer than a head may take
        assert until_closed(kept, whole[:-4] + b"\r\nx: ", drip=b"x")[0] < 3
        seconds, said = until_closed(connect(), post + b"99\r\n\r\n{")
        assert seconds < 3 and b" 408 " in said and b"slow_body" in said
        assert b" 413 " in until_closed(connect(), post + b"99999999999\r\n\r\n")[1]
        assert b" 400 " in until_closed(connect(), b"nonsense\r\n\r\n")[1]
        assert b" 400 " in until_closed(connect(), whole[:-4] + b"\r\nx: " + b"a" * 200_000)[1]


def test_an_idle_connection_stays_open_for_as_long_as_it_is_said(served):
    with running(served, "--keep_alive", "1") as (_, port):
        seconds, said = until_closed(
            socket.create_connection(("127.0.0.1", port)),
            b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n",
        )
        assert b" 200 " in said and 0.7 < seconds < 4


def test_composed_pages_over_http_and_what_is_served_by_default(composed):
    """The shop says which policies there are; each writes; variety is checked."""
    with Client(Service(config(composed))) as client:
        shop = ShopFacts.model_validate(client("GET", "/v1/shop").json(), strict=True)
        assert set(shop.policies) == {"compose", "ppo", "sft", "plain"}
        assert shop.default in ("compose", "ppo", "sft") and "on validation" in shop.why
        assert shop.decoding.keys() == {"ppo", "sft"}
        user, found = client.service.recommender.shop.user_ids[0], {}
        for policy in (*shop.policies, None):
            reply = client.page(user=user, k=5, policy=policy)
            found[policy] = Page.model_validate(reply.json(), strict=True)
        assert [s.item for s in found[None].items] == [s.item for s in found[shop.default].items]
        assert found["compose"].decoding is None and found["sft"].decoding == shop.decoding["sft"]
        assert found["compose"].model == found["plain"].model == shop.models["compose"]
        varied = client.page(user=user, k=5, policy="sft", variety={"method": "mmr"})
        assert varied.status_code == 200
        refused(client.page(user=user, variety={"method": "dpp"}), 422)
        refused(client.page(user=user, variety={"method": "mmr", "strength": -1.0}), 422)
        assert client("GET", "/static/page.js").status_code == 200
        # What lies on disk is what is served, so nothing is loaded again.
        assert client.service.take_new_weights() is False


def test_composed_pages_of_a_policy_made_anew_are_left_out_and_not_loaded_again(
    composed, tmp_path, monkeypatch
):
    for part in ("data", "runs"):
        shutil.copytree(composed / part, tmp_path / part)
    base = tmp_path / "runs/base"
    shutil.rmtree(base / "sft")
    shutil.copytree(base / "ppo", base / "sft")
    service = Service(config(tmp_path))
    assert service.recommender.names == ("ppo", "sft")
    assert "left out: made from another sft" in service.recommender.why
    loads, load = [], service.load
    monkeypatch.setattr(service, "load", lambda: (loads.append(1), load())[1])
    assert [service.take_new_weights() for _ in range(3)] == [False] * 3 and len(loads) == 1
