"""Writers that ask a model elsewhere: a page is made, whatever the server does."""

import json
import threading
import time
from dataclasses import dataclass, replace
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from pagellm.online.chat import Chat
from pagellm.stage.config import PageLLMError
from pagellm.storefront import show
from pagellm.storefront.corpus import build_corpus
from pagellm.storefront.front import Sources
from pagellm.storefront.gates import known_words
from pagellm.storefront.missions import Missions
from pagellm.storefront.page import page
from pagellm.storefront.parts import Answer, Theme, page_json
from pagellm.storefront.policy import policy_of
from pagellm.storefront.prompts import keywords_question, tagged_line, theme_question
from pagellm.storefront.rankers import Frequency, Platt
from pagellm.storefront.remote import PAUSE, Kept, Remote, Replay, Server
from pagellm.storefront.themes import Template
from tests.storefront.golden import HOUSEHOLDS, STOCK, catalogue
from tests.storefront.test_page import TINY, front
from tests.storefront.test_retrieve import u1

KEY = "sk-not-for-files"
TITLE = "Easy weekday breakfasts"
KNOWN = known_words([TITLE, "Milk Plant Coffee Granola Cereal Bread"])


def said(content, finish="stop", **usage):
    """A chat completion, as bytes."""
    choice = {"message": {"content": content}, "finish_reason": finish}
    return json.dumps({"choices": [choice], "usage": usage}).encode()


def asked_for(body):
    """theme or keywords, and the data of the question."""
    data = json.loads(body["messages"][1]["content"])
    return ("keywords" if "offered" in data else "theme"), data


def form_of(body):
    return body.get("response_format", {}).get("type")


def good(body):
    """What a model should say."""
    kind, data = asked_for(body)
    if kind == "theme":
        value = {"title": TITLE, "concepts": data["categories"][:6]}
    else:
        value = {"keywords": data["offered"][:6]}
    return said(json.dumps(value), prompt_tokens=100, completion_tokens=10)


class Model:
    """A chat server on this machine. answer: body -> a status, bytes, or (status, headers)."""

    def __init__(self, answer=good):
        self.seen, self.keys, outer = [], set(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append(body)
                outer.keys.add(self.headers["Authorization"])
                step = answer(body)
                status, headers = (step, {}) if isinstance(step, int) else (200, {})
                if isinstance(step, tuple):
                    status, headers = step
                text = step if isinstance(step, bytes) else f"no, {KEY}".encode()
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(text)
                except OSError:  # the client is gone
                    pass

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def __enter__(self):
        self.thread = threading.Thread(
            target=self.http.serve_forever, kwargs={"poll_interval": 0.01}
        )
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    def server(self, **options):
        options = {"retries": 0, "timeout": 5.0, "sleep": lambda seconds: None} | options
        return Server(Chat(self.url, "m", KEY, **options))


@cache
def template():
    """Two missions of the golden shop: breakfast, and the rest."""
    shop = catalogue()
    names = sorted(set(shop.leaf))
    category = np.array([names.index(leaf) for leaf in shop.leaf])
    breakfast = {"Milk", "Plant milk", "Coffee", "Granola", "Cereal", "Bread"}
    of_category = np.array([int(name not in breakfast) for name in names])
    missions = Missions(category, names, of_category, of_category[category], 2)
    corpus = build_corpus(shop, STOCK)
    return Template(Frequency(HOUSEHOLDS), Platt(), missions, corpus, policy_of(), STOCK)


@cache
def whole():
    return front(template(), known=KNOWN)


def shop_front(writer):
    return replace(whole(), writer=writer)


def made_by(asked):
    """The golden page, its generated row written by `asked`."""
    return page(shop_front(Remote(asked, template(), KNOWN)), u1(), TINY)


def as_json(found):
    shop = catalogue()
    return page_json(replace(found, ms={}), shop.ids, shop.title, explain=True)


def once(bad):
    """A model that is bad at its first answer."""
    left = [bad]
    return lambda body: left.pop()(body) if left else good(body)


def only(kind, bad):
    """A model that is bad at one kind of question."""
    return lambda body: bad(body) if asked_for(body)[0] == kind else good(body)


def words_of(title="Milk and bread", **more):
    def answer(body):
        return said(
            json.dumps({"title": title, "concepts": asked_for(body)[1]["categories"]} | more)
        )

    return answer


def some(choose):
    """A model whose keywords are choose(offered)."""
    return only("keywords", lambda body: said(json.dumps(choose(asked_for(body)[1]["offered"]))))


def slow(body):
    time.sleep(0.2)
    return good(body)


ENDLESS = '{"keywords": [' + '"Milk", ' * 90_000  # and no end

USELESS = {
    "half an object": (lambda body: said('{"title": "Easy wee', "length"), "cut off after 400"),
    "half JSON": (lambda body: said('{"title": "Easy wee'), "no object in"),
    "another schema": (lambda body: said('{"name": "Breakfast"}'), "no object in"),
    "a field missing": (lambda body: said('{"title": "Breakfast"}'), "concepts: is missing"),
    "a number for a title": (words_of(7), "title: 7 is not of type string"),
    "a title that is NaN": (words_of(float("nan")), "title: nan is not of type string"),
    "foreign concepts": (words_of(concepts=["Firearms"]), "concepts: 0 entries"),
    "HTML": (words_of("<b>Milk</b> and bread"), "blocked by the rule characters"),
    "a claim": (words_of("Milk that heals"), "blocked by the rule claims"),
    "a cut word": (words_of("Milk, bread, cereal, coffee and more gra"), "cut inside a word"),
    "the prompt": (words_of("You name one row of a shop's page"), "blocked by the rule"),
    "no content": (lambda body: said(None), "no chat completion"),
    "nothing": (lambda body: b"", "no chat completion"),
    "no encoding": (lambda body: b'{"choices": "\xff\xfe"}', "no chat completion"),
    "an endless list": (lambda body: said(ENDLESS), "no object in"),
    "a list cut off": (lambda body: said(ENDLESS, "length"), "cut off after 400 tokens"),
    "lists without an end": (lambda body: said('{"title": ' * 50_000), "no object in"),
    "endless keywords": (only("keywords", lambda body: said(ENDLESS)), "no object in"),
    "ten megabytes": (lambda body: b"[" * (10 << 20), "more than 1,048,576 bytes"),
    "an error": (lambda body: 500, "no answer in 1 attempts; the last said: 500 no, ***"),
    "too many requests": (lambda body: 429, "no answer in 1 attempts; the last said: 429"),
    "no such page": (lambda body: 404, "the server refuses: 404 no, ***"),
    "a redirect": (lambda body: (302, {"Location": "/v1/other"}), "the server refuses: 302"),
    "foreign keywords": (some(lambda offered: {"keywords": ["guns"] * 5}), "0 entries, want 3"),
    "no keywords": (some(lambda offered: {"keywords": "milk"}), "is not of type array"),
}  # fmt: skip


@pytest.mark.parametrize("name", USELESS)
def test_a_page_is_made_and_says_why_the_model_did_not_write_it(name):
    answer, why = USELESS[name]
    with Model(answer) as model:
        found = made_by(model.server())
    (note,) = found.fallbacks
    assert note.startswith("p2: http m ") and note.endswith("; template/1 instead")
    assert why in note and KEY not in note and model.url not in note
    assert len(found.rows[1].item) == 3 and found.rows[1].source == "generated"
    if "keywords" not in name:
        assert found.rows[1].theme.source == "template/1"
        plain = page(whole(), u1(), TINY)
        assert found.rows[1].item.tolist() == plain.rows[1].item.tolist()


def test_a_slow_server_is_not_waited_for():
    with Model(slow) as model:
        found = made_by(model.server(timeout=0.05))
    assert "TimeoutError" in found.fallbacks[0] or "timed out" in found.fallbacks[0]


def test_a_good_model_writes_the_row_and_its_cost_is_told():
    with Model() as model:
        found = made_by(model.server())
    row = found.rows[1]
    assert row.theme.title == TITLE and row.theme.source.startswith("http m ")
    assert found.fallbacks == () and found.models["themes"] == row.theme.source
    assert found.cost["prompt_tokens"] == 200 and found.cost["completion_tokens"] == 20
    assert model.keys == {f"Bearer {KEY}"} and len(model.seen) == 2
    form = model.seen[1]["response_format"]["json_schema"]["schema"]["properties"]["keywords"]
    assert form["items"]["enum"] == asked_for(model.seen[1])[1]["offered"]


@pytest.mark.parametrize("name", ["half an object", "another schema", "HTML", "no content"])
def test_one_repair_names_the_problem(name):
    answer, why = USELESS[name]
    with Model(once(answer)) as model:
        found = made_by(model.server())
    assert found.rows[1].theme.title == TITLE and found.fallbacks == ()
    again = model.seen[1]
    assert why.partition(" in")[0] in again["messages"][-1]["content"]
    # Servers that pass over json_schema without a word want this form.
    assert again["response_format"]["type"] == "json_object"
    assert again["max_tokens"] == (800 if name == "half an object" else 400)


@dataclass
class Untitled:
    """Answers of a model that cannot write titles."""

    name: str
    kinds: list

    def ask(self, question, read):
        self.kinds.append(question.kind)
        if question.kind == "theme":
            return Answer(None, "the title is cut inside a word")
        return Answer(read({"keywords": question.data["offered"][-3:]}))


def test_a_taught_model_chooses_keywords_for_a_row_that_the_template_named():
    """Its keywords may be good where its title was not; any other model costs no question more."""
    offered = np.arange(len(template().corpus))
    for name, theirs in (("lm m taught", True), ("http m", False)):
        asked = Untitled(name, [])
        remote = Remote(asked, template(), KNOWN)
        (answers,) = remote.themes([u1()], [["browse"]], [[]])
        theme = answers[0].value
        assert theme.source == template().name and "instead" in answers[0].problem
        (found,) = remote.keywords([theme], [u1()], [offered])
        texts = [keyword.text for keyword in found.value]
        assert (texts == template().corpus.text[-3:]) == theirs
        assert asked.kinds == ["theme", "keywords"][: 1 + theirs]


@pytest.mark.parametrize(
    "choose",
    [
        lambda offered: {"keywords": [offered[0]] * 3 + offered[1:4]},
        lambda offered: {"keywords": ["guns", offered[0], 7, *offered[1:4], None]},
        lambda offered: {"keywords": offered[:4], "note": "as asked"},
        lambda offered: {"keywords": offered[:4] + offered[:1] * 5000},
    ],
)
def test_keywords_are_those_on_offer_and_none_comes_twice(choose):
    with Model(some(choose)) as model:
        writer = Remote(model.server(), template(), KNOWN)
        theme = Theme(TITLE, "browse", ("Milk",), source=writer.name)
        (answer,) = writer.keywords([theme], [u1()], [np.arange(10)])
    assert [k.text for k in answer.value] == [template().corpus.text[w] for w in range(4)]
    assert answer.problem == "" and len(model.seen) == 1


def test_of_endless_lists_that_end_the_first_eight_are_taken():
    """Concepts and keywords, thousands of them: none is an error, and the page says nothing."""

    def answer(body):
        kind, data = asked_for(body)
        if kind == "keywords":
            return said(json.dumps({"keywords": data["offered"] * 500}))
        own = data["categories"]
        names = [name for k in range(5000) for name in (own[k % len(own)], f"more {k}")]
        return said(json.dumps({"title": TITLE, "concepts": names}))

    with Model(answer) as model:
        writer = Remote(model.server(), template(), KNOWN)
        (answers,) = writer.themes([u1()], [["browse"]], [[]])
        offered = np.arange(len(template().corpus))
        (chosen,) = writer.keywords([answers[0].value], [u1()], [offered])
        page_of = made_by(model.server())
    assert answers[0].problem == chosen.problem == "" and len(offered) > 8
    assert 1 <= len(answers[0].value.concepts) <= 8
    assert [k.text for k in chosen.value] == template().corpus.text[:8]
    assert page_of.fallbacks == () and len(page_of.rows[1].keywords) <= 8


@pytest.mark.parametrize("around", ["Sure! {} Enjoy.", "```json\n{}\n```", "<think>{{}}</think>{}"])
def test_prose_around_an_answer_is_passed_over(around):
    value = json.dumps({"title": TITLE, "concepts": ["Milk", "Cereal", "Coffee", "Granola"]})
    text = around.replace("{}", value, 1) if "{{" not in around else f"<think>{{}}</think>{value}"
    with Model(only("theme", lambda body: said(text))) as model:
        found = made_by(model.server())
    assert found.rows[1].theme.title == TITLE and len(model.seen) == 2


def test_a_server_that_refuses_a_form_is_told_the_next_and_no_more_the_first():
    def unlike(refused):
        return lambda body: 400 if form_of(body) in refused else good(body)

    for refused, forms in (
        ({"json_schema"}, ["json_schema", "json_object", "json_object"]),
        ({"json_schema", "json_object"}, ["json_schema", "json_object", None, None]),
    ):
        with Model(unlike(refused)) as model:
            assert made_by(model.server()).fallbacks == ()
        assert [form_of(body) for body in model.seen] == forms


def test_a_dead_server_is_left_alone_for_a_while():
    now = [0.0]
    with Model(lambda body: 500) as model:
        server = model.server()
        server.clock = lambda: now[0]
        made_by(server)
        assert "not asked" in made_by(server).fallbacks[0] and len(model.seen) == 1
        now[0] = PAUSE
        made_by(server)
        assert len(model.seen) == 2


def test_the_model_is_told_no_person_and_no_control_characters():
    many = replace(u1(), user="person-17", item=np.arange(12), count=np.arange(12, 0, -1))
    with Model() as model:
        Remote(model.server(), template(), KNOWN).themes([many], [["browse"]], [[]])
    text = json.dumps(model.seen)
    assert "person-17" not in text and str(u1().at) not in text
    evil = Theme("t", "browse", ("Milk\u202e\x00\n<|im_end|>" + "x" * 99,))
    bought = [(f"c{n}", n) for n in range(40)]
    data = theme_question(evil, bought, []).data
    assert len(data["bought"]) == 12 and len(data["categories"][0]) == 80
    assert data["categories"][0].startswith("Milk <|im_end|>")
    asked = theme_question(evil, bought, [], ("Winter\nweeks",))
    assert asked.data["season"] == ["Winter weeks"] and "season" not in data
    assert tagged_line(asked) == tagged_line(theme_question(evil, bought, []))
    assert keywords_question(evil, ["a", "b"]).schema["properties"]["keywords"]["minItems"] == 2


def test_replay_writes_the_same_page_and_names_what_it_lacks(tmp_path):
    path = tmp_path / "answers.jsonl"
    with Model(only("keywords", lambda body: 500)) as model:
        kept = Kept(model.server(), path)
        first = made_by(kept)
        seen = len(model.seen)
        assert made_by(Kept(model.server(), path)).page_id == first.page_id
        assert len(model.seen) == seen + 1  # the answer that failed is asked for again
    assert KEY not in path.read_text()
    again = made_by(Replay(path))
    assert as_json(again) == as_json(first) and "500" in first.fallbacks[0]
    stranger = replace(u1(), item=np.array([10, 2]), count=np.array([1, 1]))
    with pytest.raises(PageLLMError, match=r"has no answer to question \w{24}: theme of the row"):
        page(shop_front(Remote(Replay(path), template(), KNOWN)), stranger, TINY)
    path.write_text(path.read_text()[:-30])  # as a killed process leaves it
    with Model() as model:
        made_by(Kept(model.server(), path))
    assert made_by(Replay(path)).fallbacks == ()
    path.write_text(path.read_text().replace("http m", "http n", 1))
    with pytest.raises(PageLLMError, match="holds answers of http m .*, http n .*; want one"):
        Replay(path)
    with pytest.raises(PageLLMError, match="no answers 'nowhere'"):
        Replay("nowhere")


def test_a_kept_answer_that_will_not_do_is_asked_for_anew(tmp_path):
    """Somebody changed the file, a byte of it was lost, or the policy is another one."""
    path = tmp_path / "answers.jsonl"
    with Model() as model:
        first = as_json(made_by(Kept(model.server(), path)))
        kept = path.read_bytes()
        made_by(Kept(model.server(), path))
        assert len(model.seen) == 2 and path.read_bytes() == kept
        said = json.dumps(json.loads(kept.splitlines()[1])["value"]["keywords"]).encode()
        for old, new in (
            (said, b'["guns", "knives", "drugs"]'),
            (TITLE.encode(), b"Cheapest weight loss"),
            (TITLE.encode(), b"Easy weekday br\xffakfasts"),
        ):
            path.write_bytes(kept.replace(old, new))
            assert path.read_bytes() != kept
            asked = len(model.seen)
            assert as_json(made_by(Kept(model.server(), path))) == first
            assert len(model.seen) == asked + 1


def test_a_changed_answer_is_not_believed(tmp_path):
    path = tmp_path / "answers.jsonl"
    with Model() as model:
        made_by(Kept(model.server(), path))
    path.write_text(path.read_text().replace(TITLE, "Milk that heals"))
    with pytest.raises(PageLLMError, match="blocked by the rule claims"):
        made_by(Replay(path))


def test_wrong_options_are_refused():
    for options, why in (
        ({"writer": "gpt"}, "template, search, lm, http, replay"),
        ({"writer": "replay"}, "answers"),
        ({"writer": "lm"}, "weights"),
        ({"writer": "http", "model": "m"}, "url"),
        ({"url": "http://x/v1"}, "url"),
        ({"writer": "http", "url": "http://x/v1", "model": "m", "patience": 0}, "patience"),
    ):
        with pytest.raises(PageLLMError, match=why):
            Sources(**options)
    with pytest.raises(PageLLMError, match="password") as caught:
        Chat("http://me:secret@x/v1", "m")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("host", ["host", "10.0.0.5:8080", "[fe80::1]", "127.0.0.1.example.com"])
def test_a_key_goes_to_another_machine_over_https_only(host):
    with pytest.raises(PageLLMError, match="unencrypted.*\n.*https://") as caught:
        Chat(f"http://{host}/v1", "m", KEY)
    assert KEY not in str(caught.value)
    assert Chat(f"https://{host}/v1", "m", KEY).key == KEY
    assert Chat(f"http://{host}/v1", "m").key == ""


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8080", "127.3.2.1", "[::1]:8080"])
def test_a_key_may_go_to_this_machine_over_http(host):
    assert Chat(f"http://{host}/v1", "m", KEY + "\r\n").key == KEY


@pytest.mark.parametrize("url", ["http://", "http://[::1/v1", "http://h:99999/v1", "h/v1", ""])
def test_what_is_no_address_is_refused_at_once(url):
    with pytest.raises(PageLLMError, match="want the address of a chat server"):
        Chat(url, "m")


def test_a_key_that_no_header_can_carry_is_told_without_it():
    with pytest.raises(PageLLMError, match="no header can carry") as caught:
        Chat("https://h/v1", "m", "first\nsecond")
    assert "second" not in str(caught.value)


def test_pages_of_the_command_line_are_kept_and_replayed(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("STOREFRONT_TEST_KEY", KEY)
    answers, user = str(tmp_path / "answers.jsonl"), "U0001000"

    def shown(**options):
        show.run(show.Config(user=user, json=True, **made, **options))
        document = json.loads(capsys.readouterr().out)
        return document | {"ms": None}

    with Model(words_or_keywords) as model:
        first = shown(
            writer="http", url=model.url, model="m", answers=answers, key_env="STOREFRONT_TEST_KEY"
        )
    assert model.keys == {f"Bearer {KEY}"} and KEY not in json.dumps(first)
    assert any(row["theme"].get("writer", "").startswith("http m") for row in first["placements"])
    assert shown(writer="replay", answers=answers) == first


def words_or_keywords(body):
    """Titles unlike each other, made of the first category."""
    kind, data = asked_for(body)
    if kind == "keywords":
        return good(body)
    title = f"{data['categories'][0]} and more"[-40:]
    return said(json.dumps({"title": title, "concepts": data["categories"]}))
