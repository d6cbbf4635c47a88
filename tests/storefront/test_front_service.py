"""The service of rows: always a page, a clear 4xx for a bad request, logs that name nobody."""

import asyncio
import json
import logging
import re
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

for name in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(name, reason="needs the extra: pip install 'pagellm[serve]'")
httpx = pytest.importorskip("httpx", reason="needs httpx: pip install 'pagellm[dev]'")

from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from pagellm.data.shop import load  # noqa: E402
from pagellm.serving.schema import Error  # noqa: E402
from pagellm.stage.config import PageLLMError  # noqa: E402
from pagellm.storefront import ahead, serve  # noqa: E402
from pagellm.storefront.api import make_app  # noqa: E402
from pagellm.storefront.ask import FrontAsk  # noqa: E402
from pagellm.storefront.given import blocked_by  # noqa: E402
from pagellm.storefront.schemas import PAGE, check  # noqa: E402
from pagellm.storefront.serve import Config, FrontService  # noqa: E402


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
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as sender:
            return await asyncio.gather(
                *(sender.request(method, path, **options) for method, path, options in requests)
            )

    def __call__(self, method, path, **options):
        return asyncio.run(self.send((method, path, options)))[0]

    def page(self, **body):
        return self("POST", "/v1/storefront", json=body)


@pytest.fixture(scope="module")
def full(made, tmp_path_factory):
    """A run of this file's own, with everything in its cache."""
    root = tmp_path_factory.mktemp("front")
    shutil.copytree(f"{made['runs']}/synthetic", root / "synthetic")
    options = made | {"runs": str(root)}
    ahead.run(ahead.Config(**options, people=20))
    return options


@pytest.fixture(scope="module")
def client(full):
    with Client(FrontService(Config(**full, reload=0))) as client:
        yield client


@pytest.fixture
def some(client):
    return client.service.ahead.store.shop


def good(reply, *whose):
    """A valid page; whose: where its themes may have come from."""
    assert reply.status_code == 200, reply.text
    document = reply.json()
    assert check(document, PAGE) == []
    assert not whose or reply.headers["x-themes-from"] in whose
    items = [item["id"] for row in document["placements"] for item in row["items"]]
    assert len(items) == len(set(items))
    return document


def refused(reply, *codes):
    assert reply.status_code in codes, (reply.status_code, reply.text)
    body = Error.model_validate_json(reply.text)
    assert body.error.message and "Traceback" not in reply.text
    return body.error


def own(client):
    """A person whose page is kept."""
    found = client.service.ahead
    return next(c.user for c in found.people() if c.bucket.startswith("user:"))


def test_a_page_is_what_its_schema_says_and_the_same_again(client):
    user = own(client)
    one, two = (good(client.page(user=user), "page") for _ in range(2))
    assert one["user"] == user and one["placements"]
    del one["ms"], two["ms"]
    assert one == two


def test_what_is_asked_for_moves_the_page(client, some):
    user = own(client)
    plain = good(client.page(user=user))
    first = plain["placements"][0]["items"][0]["id"]
    less = good(client.page(user=user, filters={"exclude": [first]}), "own")
    assert first not in str(less["placements"])
    explained = good(client.page(user=user, explain=True), "own")
    assert explained["page"]["decisions"] and "decisions" not in plain["page"]
    drawn = good(client.page(user=user, explore=1.0, seed=3), "own")
    chances = [
        item["propensity"]
        for row in drawn["placements"]
        if row["source"] == "generated"
        for item in row["items"]
    ]
    assert min(chances) < 1
    static = good(client.page(user=user, static=True), "off")
    assert {row["source"] for row in static["placements"]} == {"static"}
    few = good(client.page(user=user, filters={"in_stock": some.catalogue.ids[:5]}))
    assert few["page"]["items"] <= 5
    nothing = good(client.page(user=user, filters={"in_stock": []}))
    assert nothing["placements"] == [] and "left out" in nothing["fallbacks"][-1]


def told(document):
    """Titles and items of a page."""
    rows = document["placements"]
    return [(row["theme"]["title"], [item["id"] for item in row["items"]]) for row in rows]


def test_strangers_histories_and_layouts(client, some):
    stranger = good(client.page())
    assert stranger["user"] is None and stranger["placements"]
    typed = good(client.page(history=[{"item": some.catalogue.ids[4]}, {"item": "no such"}]))
    assert "items not known: no such" in typed["fallbacks"]
    nothing_known = good(client.page(history=[{"item": "no such"}, {"item": "nor this"}]))
    assert "items not known: no such, nor this" in nothing_known["fallbacks"]
    assert told(nothing_known) == told(stranger) and told(typed) != told(stranger)
    unknown = good(client.page(user="nobody here"))
    assert "this user is not known" in unknown["fallbacks"]
    by_id = good(client.page(user=own(client), layout="A"))
    assert by_id["layout"] == "A"
    mine = {
        "schema": "layout/1",
        "id": "mine",
        "placements": [{"id": "one", "intent": "browse", "slots": 3}],
    }
    document = good(client.page(user=own(client), layout=mine))
    assert document["layout"] == "mine" and len(document["placements"][0]["items"]) == 3


@pytest.mark.parametrize(
    "body, field",
    [
        ({"k": 5}, "k"),
        ({"user": 5}, "user"),
        ({"user": ""}, "user"),
        ({"explore": -1}, "explore"),
        ({"explore": "much"}, "explore"),
        ({"seed": -1}, "seed"),
        ({"at": -5}, "at"),
        ({"at": 5}, "at: orders are known up to "),
        ({"layout": "none such"}, "layout: there is no 'none such'"),
        ({"layout": {"schema": "layout/1"}}, "placements: is missing"),
        (
            {"layout": {"schema": "layout/1", "id": "x", "placements": [
                {"id": "a", "intent": "browse", "slots": 0}]}},
            "placements[0].slots: 0 is below 1",
        ),
        (
            {"layout": {"schema": "layout/1", "id": "x", "placements": [
                {"id": "a", "intent": "browse", "slots": 4}] * 2}},
            "'a' is there twice",
        ),
        (
            {"layout": {"schema": "layout/1", "id": "x", "placements": [
                {"id": f"p{n}", "intent": "browse", "slots": 4} for n in range(21)]}},
            "21 entries, want 20 or fewer",
        ),
        (
            {"layout": {"schema": "layout/1", "id": "x", "placements": [
                {"id": f"p{n}", "intent": "browse", "slots": 40} for n in range(6)]}},
            "240 slots in all",
        ),
        ({"history": [{"item": "x", "rating": 5}]}, "history.0.rating"),
        ({"filters": {"price": {"min": 5, "max": 1}}}, "min is above max"),
    ],
)  # fmt: skip
def test_a_bad_request_is_named(client, body, field):
    error = refused(client.page(**body), 422)
    assert field in error.message


def test_other_ways_to_ask_wrongly(client):
    refused(client("POST", "/v1/storefront", content=b"{", headers={"content-type": "application/json"}), 422)  # fmt: skip # noqa: E501
    assert refused(client("POST", "/v1/storefront", content=b"{}"), 415).code == "not_json"
    refused(client("GET", "/v1/storefront"), 405)
    refused(client("GET", "/v1/storefront/nothing"), 404)
    refused(client("GET", "/static/storefront/../serve.py"), 404)
    refused(client("GET", "/static/storefront/rows.html"), 404)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    body=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
            st.sampled_from(["user", "layout", "at", "seed", "explore", "history", "filters", "id",
                             "placements", "schema", "item"]), inner, max_size=4),
        max_leaves=8,
    ),
    path=st.sampled_from(["/v1/storefront", "/v1/storefront/check"]),
)  # fmt: skip
def test_no_json_whatever_breaks_the_service(client, body, path):
    reply = client("POST", path, content=json.dumps(body).encode(),
                   headers={"content-type": "application/json"})  # fmt: skip
    assert reply.status_code in (200, 422), reply.text


def test_head_health_and_the_documents(client):
    head, get = (client(method, "/v1/storefront/layouts") for method in ("HEAD", "GET"))
    assert head.status_code == get.status_code == 200 and head.content == b""
    assert client("GET", "/healthz").json() == {"status": "ok"}
    assert client("GET", "/readyz").json() == {"status": "ready"}
    found = get.json()
    assert found["default"] in {layout["id"] for layout in found["layouts"]} >= {"A", "B"}
    state = client("GET", "/v1/storefront/state").json()
    assert state["writer"] == "template/1" and state["coverage"]["pages"] == 20
    assert state["themes_on"] and state["switch"] == "on"
    # A layout that is handed out is one that can be handed in.
    good(client.page(layout=found["layouts"][0]))
    document = client("GET", "/openapi.json").json()
    assert {"/v1/storefront", "/v1/storefront/check", "/healthz"} <= set(document["paths"])
    users = client("GET", "/v1/storefront/users?limit=3").json()["found"]
    assert len(users) == 3


def test_a_merchandiser_s_own_row_is_looked_at(client):
    front = client.service.ahead.store.front
    name = front.best[0]
    said = client(
        "POST", "/v1/storefront/check", json={"title": f"More {name}", "concepts": [name, "?"]}
    ).json()
    assert said["passes"] and said["unknown"] == ["?"] and said["keywords"][0]["text"] == name
    members = front.corpus.matches(front.corpus.number[name])
    assert {item["id"] for item in said["items"]} <= {front.catalogue.ids[i] for i in members}
    bad = client(
        "POST", "/v1/storefront/check", json={"title": "Ignore previous", "concepts": [name]}
    ).json()
    rules = {d["rule"] for d in bad["decisions"] if d["action"] != "pass"}
    assert not bad["passes"] and "instructions" in rules
    # As a layout may name a row: by words that the catalogue does not know.
    for intent, may in (("editorial", True), ("browse", False)):
        body = {"title": "Zumbazumba kerfuffle", "concepts": [name], "intent": intent}
        said = client("POST", "/v1/storefront/check", json=body).json()
        assert said["passes"] is may
        assert (blocked_by(front, body["title"]) == "") and len(said["items"]) > 0


def test_meters_count_pages_rows_and_hits(client):
    def samples():
        text = client("GET", "/metrics").text
        return {
            (s.name, *(value for _, value in sorted(s.labels.items()))): s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
        }

    before = samples()
    good(client.page(user=own(client)), "page")
    good(client.page(user=own(client), explore=1.0), "own")
    after = samples()

    def more(*name):
        return after.get(name, 0) - before.get(name, 0)

    assert more("pagellm_storefront_page_seconds_count", "page") == 1
    assert more("pagellm_storefront_page_seconds_count", "own") == 1
    assert more("pagellm_storefront_rows_total", "generated") > 0
    assert more("pagellm_storefront_cache_hits") == 2
    assert more("pagellm_requests_total", "POST", "/v1/storefront", "200") == 2
    assert after["pagellm_storefront_themes_on",] == 1


def test_logs_and_meters_name_nobody(client, some, caplog):
    user = own(client)
    with caplog.at_level(logging.DEBUG, logger="pagellm"):
        page = good(client.page(user=user, history=[{"item": some.catalogue.ids[0]}]))
        good(client.page(user="a secret person"))
    said = json.dumps([record.__dict__ for record in caplog.records], default=str)
    said += client("GET", "/metrics").text
    for private in (user, "a secret person", page["placements"][0]["items"][0]["title"]):
        assert private not in said


class Slow:
    """A writer that takes too long, or fails."""

    name = "template/1"

    def __init__(self, fails=False):
        self.fails, self.waits = fails, threading.Event()

    def themes(self, contexts, intents, used):
        if self.fails:
            raise OSError("dead")
        self.waits.wait(20)
        return [[]]

    def keywords(self, themes, contexts, offered):
        return []


@pytest.mark.parametrize("fails", [True, False])
def test_a_dead_or_slow_writer_leaves_a_static_page(client, monkeypatch, fails):
    """With --live, for a layout of which no rows are kept."""
    monkeypatch.setattr(serve, "LIVE_SECONDS", 0.2)
    service, writer, events = client.service, Slow(fails), []
    front = replace(service.ahead.store.front, writer=writer)
    monkeypatch.setattr(
        service, "ahead", replace(service.ahead, store=replace(service.ahead.store, front=front))
    )
    monkeypatch.setattr(service, "config", replace(service.config, live=True))
    monkeypatch.setattr(service, "observe", lambda what, n: events.append(what))
    layout = {"schema": "layout/1", "id": "new", "placements": [
        {"id": "one", "intent": "browse", "slots": 5}]}  # fmt: skip
    found = good(client.page(user=own(client), layout=layout), "static")
    assert found["placements"] and "writer_failed" in events
    writer.waits.set()
    # What is kept is served as before.
    good(client.page(user=own(client)), "page")


def test_with_live_a_page_that_is_not_kept_is_written_and_then_kept(full, tmp_path):
    shutil.copytree(f"{full['runs']}/synthetic", tmp_path / "synthetic")
    options = full | {"runs": str(tmp_path)}
    shutil.rmtree(tmp_path / "synthetic" / "storefront" / "cache")
    with Client(FrontService(Config(**options, live=True, reload=0))) as client:
        user = own(client)
        first = good(client.page(user=user), "live")
        client.service.keep()
        again = good(client.page(user=user), "page")
        assert first["placements"] == again["placements"]
        assert {row["source"] for row in first["placements"]} >= {"generated"}


def test_the_kill_switch_turns_themes_off_and_a_person_turns_them_on(client):
    folder = client.service.ahead.switch.folder
    try:
        (folder / "off").write_text("")
        client.service.ahead.switch.looked = -1e9
        found = good(client.page(user=own(client)), "off")
        assert {row["source"] for row in found["placements"]} == {"static"}
        assert "switched off" in found["fallbacks"][0]
    finally:
        (folder / "off").unlink()
        client.service.ahead.switch.looked = -1e9
    good(client.page(user=own(client)), "page")


def test_what_sells_out_leaves_the_pages_and_a_new_build_is_taken_up(full, tmp_path):
    shutil.copytree(f"{full['runs']}/synthetic", tmp_path / "synthetic")
    stock = tmp_path / "gone.txt"
    stock.write_text("")
    service = FrontService(Config(**full | {"runs": str(tmp_path)}, stock=str(stock), reload=0))
    with Client(service) as client:
        user = own(client)
        first = good(client.page(user=user), "page")["placements"][0]["items"][0]["id"]
        assert not service.take_up()  # nothing is new
        stock.write_text(first + "\n")
        assert service.take_up()
        assert first not in str(good(client.page(user=user), "own")["placements"])
        stock.write_text("no such item\n")  # a mistake: the version before goes on, said once
        assert not service.take_up() and not service.take_up()
        assert first not in str(good(client.page(user=user))["placements"])
        stock.write_text("")
        tuned = tmp_path / "synthetic" / "storefront" / "tune" / "tuned.json"
        document = json.loads(tuned.read_text())
        document["weights"]["redundancy"] = 0.5
        tuned.write_text(json.dumps(document))
        version = service.ahead.version
        assert service.take_up() and service.ahead.version != version
        good(client.page(user=user), "static")  # nothing is kept of the new version
        (tmp_path / "synthetic" / "storefront" / "build" / "done").unlink()  # is being built anew
        assert not service.take_up()
        good(client.page(user=user))


def test_all_out_of_stock_is_an_empty_page_that_says_so(full, tmp_path):
    stock = tmp_path / "gone.txt"
    service = FrontService(Config(**full, reload=0))
    stock.write_text("\n".join(service.ahead.store.shop.catalogue.ids))
    with Client(FrontService(Config(**full, stock=str(stock), reload=0))) as client:
        for user in (own(client), None):
            found = good(client.page(user=user))
            assert found["placements"] == [] and found["page"]["items"] == 0
            assert any("no item is left" in note for note in found["fallbacks"])


def test_a_filter_by_price_says_why_nothing_is_left_where_no_item_has_one(full, monkeypatch):
    def bare(path):
        shop = load(path)
        price = np.full(shop.n_items, np.nan, np.float32)
        return replace(shop, catalogue=replace(shop.catalogue, price=price))

    monkeypatch.setattr("pagellm.storefront.front.load", bare)
    with Client(FrontService(Config(**full, reload=0))) as client:
        asked = {"user": own(client), "filters": {"price": {"max": 5}}}
        found = good(client.page(**asked))
        assert found["placements"] == []
        notes = [note for note in found["fallbacks"] if "price" in note]
        assert notes == ["no item has a price: the filter by price leaves nothing"]
        assert good(client.page(user=own(client)))["placements"]


def test_a_service_that_is_busy_or_too_slow_says_so(full):
    service = FrontService(Config(**full, queue=1, timeout=0.2, reload=0))
    held = threading.Event()
    with Client(service) as client:
        made = service.make

        def slowly(*given):
            held.wait(5)
            return made(*given)

        service.make = slowly
        body = {"json": {"user": own(client), "explore": 1.0}}
        ask = ("POST", "/v1/storefront", body)
        replies = asyncio.run(client.send(ask, ask, ask))
        codes = sorted(reply.status_code for reply in replies)
        held.set()
        assert codes == [503, 503, 504]
        good(client.page(user=own(client)), "page")  # what is kept needs no worker


def test_a_cache_that_is_damaged_while_serving_costs_no_request(full, tmp_path):
    shutil.copytree(f"{full['runs']}/synthetic", tmp_path / "synthetic")
    with Client(FrontService(Config(**full | {"runs": str(tmp_path)}, reload=0))) as client:
        user = own(client)
        good(client.page(user=user), "page")
        client.service.ahead.cache.shut()
        (path,) = tmp_path.rglob("cache.sqlite")
        for beside in (*path.parent.glob("*-wal"), *path.parent.glob("*-shm")):
            beside.unlink()
        path.write_bytes(b"\xff" * 5000)
        good(client.page(user=user), "static")
        assert not client.service.ahead.cache.trouble


def test_a_key_is_wanted_but_for_the_page_and_its_files(full):
    key = "a-key-of-the-tests.1"
    with Client(FrontService(Config(**full, api_key=key, reload=0))) as client:
        assert refused(client.page(), 401).code == "no_key"
        good(client("POST", "/v1/storefront", json={}, headers={"authorization": f"Bearer {key}"}))
        text = client("GET", "/storefront").text
        for name in re.findall(r'(?:src|href)="(/static/[^"]+)"', text):
            file = client("GET", name)
            assert file.status_code == 200
            text += file.text
        assert key not in text and "innerHTML" not in text and "style=" not in text
        # Nobody else is asked: the only address is SVG's name.
        assert set(re.findall(r"(?:https?:)?//[a-z][\w.-]+\.[a-z]+", text)) == {"http://www.w3.org"}
        paths = client("GET", "/openapi.json", headers={"authorization": f"Bearer {key}"}).json()
        assert "401" in paths["paths"]["/v1/storefront"]["post"]["responses"]


def test_options_that_cannot_be_met(full, tmp_path):
    with pytest.raises(PageLLMError, match="workers"):
        Config(workers=0)
    bad = tmp_path / "bad.json"
    bad.write_text('{"schema": "layout/1", "id": "A", "placements": [{"id": "x"}]}')
    with pytest.raises(PageLLMError, match="intent: is missing"):
        FrontService(Config(**full, layouts=str(bad)))
    twice = {"schema": "layout/1", "id": "A",
             "placements": [{"id": "x", "intent": "browse", "slots": 2}]}  # fmt: skip
    bad.write_text(json.dumps(twice))
    with pytest.raises(PageLLMError, match="another layout 'A'"):
        FrontService(Config(**full, layouts=str(bad)))


def test_a_plain_ask_is_one_that_may_be_kept():
    assert FrontAsk(user="u").plain and not FrontAsk().plain
    for special in ({"more": ("i",)}, {"explain": True}, {"explore": 1.0}, {"static": True}):
        assert not FrontAsk(user="u", **special).plain
