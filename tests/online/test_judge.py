"""The judge: swapped pages swap the verdict, faulty servers are retried, counts add up."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm import evaluate
from pagellm.data.shop import load
from pagellm.online import judge
from pagellm.online import judge_backends as backends
from pagellm.stage.config import PageLLMError

WHO = backends.Context(3, np.array([0, 1, 2]), np.array([5.0, 4.0, np.nan], np.float32))


@pytest.fixture(scope="module")
def shop(served):
    return load(served / "data" / "synthetic")


@pytest.fixture(scope="module")
def common(served):
    common = {"run": "base", "data": str(served / "data"), "runs": str(served / "runs")}
    evaluate.run(
        evaluate.Config(**common, k=6, depth=20, policies="sft,ppo", quiet=True, n_boot=10)
    )
    return common


class Server:
    """A chat server on this machine.

    script  one entry for each request: a status, or an answer's content; `last` from then on
    """

    def __init__(
        self,
        script=(),
        last='{"winner": "first", "confidence": 0.9, "reasons": ["ok"]}',
        headers=(),
    ):
        self.script, self.last, self.seen, outer = list(script), last, [], self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append((self.path, self.headers.get("Authorization"), body))
                step = outer.script.pop(0) if outer.script else outer.last
                text = (
                    "no"
                    if isinstance(step, int)
                    else json.dumps({"choices": [{"message": {"content": step}}]})
                )
                self.send_response(step if isinstance(step, int) else 200)
                for name, value in headers:
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

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


class Stub:
    """A backend that decides by a function of the two pages."""

    name = "stub"

    def __init__(self, rule):
        self.rule, self.asked = rule, 0

    def ask(self, context, first, second):
        self.asked += 1
        return backends.Opinion(self.rule(first, second), 0.8, ("because",))


def test_both_orders_must_agree():
    larger = judge.Judge(Stub(lambda a, b: "first" if sum(a) > sum(b) else "second"))
    assert (
        larger.compare(WHO, [1], [2]).winner == "b" and larger.compare(WHO, [2], [1]).winner == "a"
    )
    assert larger.compare(WHO, [1], [2]).confidence == 0.8
    biased = judge.Judge(Stub(lambda a, b: "first")).compare(WHO, [1], [2])
    assert (biased.winner, biased.confidence, biased.consistent) == ("tie", 0.0, False)
    half = judge.Judge(Stub(lambda a, b: "tie" if a == [1] else "first")).compare(WHO, [1], [2])
    assert half.winner == "tie" and not half.consistent
    stub = Stub(lambda a, b: "first")
    assert judge.Judge(stub).compare(WHO, [4, 5], [4, 5]).consistent and stub.asked == 0


@given(st.data())
def test_swapping_the_pages_swaps_the_verdict(data):
    """compare(a, b) and compare(b, a) name the same page, for any backend."""
    taste = data.draw(
        st.dictionaries(
            st.tuples(st.integers(0, 3), st.integers(0, 3)), st.sampled_from(backends.WINNERS)
        )
    )
    j = judge.Judge(Stub(lambda a, b: taste.get((a[0], b[0]), "first")))
    a, b = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    one, other = j.compare(WHO, [a], [b]), j.compare(WHO, [b], [a])
    assert one.winner == {"a": "b", "b": "a", "tie": "tie"}[other.winner]
    assert one.consistent == other.consistent and one.confidence == other.confidence


def test_rules_prefer_what_they_say(shop):
    rules, c = backends.Rules(shop), shop.catalogue
    liked = np.flatnonzero(c.leaf_id == c.leaf_id[0])
    context = backends.Context(0, liked[:1], np.full(1, 5.0, np.float32))
    strange = np.flatnonzero((c.leaf_id != c.leaf_id[0]) & (c.brand_id != c.brand_id[0]))
    page = [int(liked[-1]), *strange[:3].tolist()]
    assert judge.Judge(rules).compare(context, page, page[1:] + page[:1]).winner == "a"  # order
    assert (
        rules.scores(context, page)["relevance"] > rules.scores(context, strange[:4])["relevance"]
    )
    double = next(i for i in range(shop.n_items) if len(rules.near.of(i)))
    twin = int(rules.near.of(double)[0])
    assert rules.scores(context, [double, twin])["redundancy"] == -0.5
    assert rules.scores(context, page)["redundancy"] == 0
    one_leaf, many = (
        liked[:2].tolist(),
        strange[np.unique(c.leaf_id[strange], return_index=True)[1]][:2].tolist(),
    )
    assert rules.scores(context, many)["diversity"] > rules.scores(context, one_leaf)["diversity"]
    assert rules.scores(context, [])["relevance"] == 0
    verdict = judge.Judge(rules).compare(context, page, strange[:4])
    assert verdict.consistent and verdict.reasons


def test_http_asks_as_documented_and_retries(shop):
    answer = '{"winner": "second", "confidence": 1, "reasons": []}'
    slept = []
    with Server([503, "not json", 503, 429, answer]) as server:
        backend = backends.Http(shop, server.url, "m", key="secret", sleep=slept.append)
        assert backend.ask(WHO, [1, 2], [3]) == backends.Opinion("second", 1.0)
        assert slept == [1, 2, 4, 8] and backend.sent == 5
        path, key, body = server.seen[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert (
        body["temperature"] == 0
        and body["response_format"]["json_schema"]["schema"] == backends.SCHEMA
    )
    question = json.loads(body["messages"][1]["content"])
    assert [x["title"] for x in question["first"]] == [shop.catalogue.title[i] for i in (1, 2)]
    assert question["liked"][0]["rating"] == 5 and "rating" not in question["liked"][2]


@pytest.mark.parametrize(
    "answer",
    [
        '{"winner": "first", "confidence": 0.9}',
        '{"winner": "first", "confidence": 2, "reasons": []}',
        '{"winner": "first", "confidence": "0.9", "reasons": []}',
        '{"winner": "first", "confidence": true, "reasons": []}',
        '["first"]',
        "null",
        '{"winner": "first", "confidence": NaN, "reasons": []}',
        '"first"',
        "",
        '{"winner": "first", "confidence": 0.9, "reasons": "because"}',
        '{"winner": "first", "confidence": 0.9, "reasons": [1]}',
        None,
    ],
)
def test_an_answer_that_does_not_fit_the_schema_is_asked_for_again(shop, answer):
    with Server([answer]) as server:
        backend = backends.Http(shop, server.url, "m", sleep=lambda seconds: None)
        assert (
            backend.ask(WHO, [1], [2]) == backends.Opinion("first", 0.9, ("ok",))
            and backend.sent == 2
        )


VERDICT = '{"winner": "second", "confidence": 0.7, "reasons": ["{braces}"]}'


@pytest.mark.parametrize(
    "text",
    [
        f"```json\n{VERDICT}\n```",
        f"<think>first? {{hm}} {{}} [1]</think>\n{VERDICT}",
        f"My verdict: {VERDICT} I hope that helps {{}}.",
        f'{{"verdict": {VERDICT}, "n": {{}}}}',
        f'Draft {{"winner": "first", "confidence": 1, "reasons": []}}, no: {VERDICT}',
    ],
)
def test_a_verdict_is_found_within_a_fence_reasoning_or_prose(shop, text):
    with Server([text]) as server:
        backend = backends.Http(shop, server.url, "m", sleep=lambda seconds: None)
        assert backend.ask(WHO, [1], [2]) == backends.Opinion("second", 0.7, ("{braces}",))
        assert backend.sent == 1


def test_useless_answers_cost_one_retry_and_are_counted_abstentions(shop):
    """A judgement goes on: the pair is left out of the win rate and counted."""
    sent = ["I cannot say.", '{"winner": "both", "confidence": 1, "reasons": []}'] * 2
    with Server(sent) as server:
        backend = backends.Http(shop, server.url, "m", sleep=lambda seconds: None)
        lost = judge.Judge(backend).compare(WHO, [1], [2])
        assert (lost.winner, backend.sent) == ("abstain", 4)
    won = judge.Verdict(
        "b", 1.0, (), backends.Opinion("second", 1.0), backends.Opinion("first", 1.0)
    )
    found, alone = judge.summarise([lost, won]), judge.summarise([won])
    assert found == alone | {"abstained": 1} and found["pairs"] == 1
    assert "no verdict" in judge.report(judge.Config(), "m", judge.summarise([lost]))


def test_the_key_is_not_taken_to_another_address(shop):
    with (
        Server() as other,
        Server(last=302, headers=[("Location", f"{other.url}/chat/completions")]) as server,
    ):
        with pytest.raises(PageLLMError, match="refuses: 302"):
            backends.Http(shop, server.url, "m", key="secret").ask(WHO, [1], [2])
        assert len(server.seen) == 1 and not other.seen


def test_http_honours_retry_after_and_gives_up_with_a_reason(shop):
    slept = []
    with Server([429], headers=[("Retry-After", "7")]) as server:
        backends.Http(shop, server.url, "m", sleep=slept.append).ask(WHO, [1], [2])
    assert slept == [7]
    with Server(last=500) as server:
        with pytest.raises(PageLLMError, match="no answer in 3 attempts; the last said: 500 no"):
            backends.Http(shop, server.url, "m", retries=2, sleep=slept.append).ask(WHO, [1], [2])
        assert len(server.seen) == 3
    with Server(last=401) as server, pytest.raises(PageLLMError, match="refuses: 401"):
        backends.Http(shop, server.url, "m", sleep=slept.append).ask(WHO, [1], [2])
    # the server is gone
    with pytest.raises(PageLLMError, match="no answer in 1 attempts"):
        backends.Http(shop, server.url, "m", retries=0, timeout=5).ask(WHO, [1], [2])
    with pytest.raises(PageLLMError, match="address of a chat server"):
        backends.Http(shop, "file:///etc", "m")


def test_http_keeps_answers_within_the_budget_and_carries_on(common, capsys):
    with Server() as server:
        config = {
            **common,
            "backend": "http",
            "url": server.url,
            "model": "m",
            "users": 6,
            "key_env": "NO_SUCH_KEY",
        }
        with pytest.raises(PageLLMError, match="budget of 5 requests is used up"):
            judge.run(judge.Config(**config, budget=5))
        found = judge.run(judge.Config(**config, budget=100))
        asked = len(server.seen)
        again = judge.run(judge.Config(**config, budget=0))
        assert len(server.seen) == asked and again == found  # every opinion came from the file
    assert asked == 2 * found["pairs"] - 2 * sum(
        x == "the pages are equal" for x in first_reasons(common, "http")
    )
    # this server always says "first"
    assert found["tie"] == found["pairs"] and found["win_rate"] == 0.5
    assert found["first_rate"] == 1.0 and found["inconsistent"] > 0
    opinions = f"{common['runs']}/base/judge-http/opinions.jsonl"
    replay = judge.Config(**common, backend="replay", opinions=opinions, users=6)
    assert judge.run(replay) == found
    assert "replay of http m" in capsys.readouterr().out
    with pytest.raises(PageLLMError, match="no opinion on these pages"):
        backends.Replay(opinions).ask(WHO, [1], [2])


def first_reasons(common, backend):
    reasons = pq.read_table(f"{common['runs']}/base/judge-{backend}/verdicts.parquet")[
        "reasons"
    ].to_pylist()
    return [r[0] if r else "" for r in reasons]


def test_a_line_half_written_is_asked_again(tmp_path):
    path, stub = tmp_path / "o.jsonl", Stub(lambda a, b: "first")
    kept = backends.Kept(stub, path)
    kept.ask(WHO, [1], [2])
    kept.ask(WHO, [1], [2])
    assert (stub.asked, kept.hits) == (1, 1)
    kept.ask(WHO, [2], [1])
    path.write_text(path.read_text()[:-20])
    kept = backends.Kept(stub, path)
    kept.ask(WHO, [1], [2])
    kept.ask(WHO, [2], [1])
    assert stub.asked == 3 and len(backends.read_opinions(path)) == 2
    (tmp_path / "empty").write_text("")
    for name, said in (
        ("empty", "holds opinions of nobody"),
        ("none", "no opinions"),
        ("", "no opinions"),
    ):
        with pytest.raises(PageLLMError, match=said):
            backends.Replay(tmp_path / name)


def test_the_reward_judge_says_where_it_is_circular(common, served, capsys):
    found = judge.run(judge.Config(**common, backend="reward", users=20))
    assert found["circular"] == ["ppo"] and "CIRCULAR: ppo" in capsys.readouterr().out
    assert (
        found["inconsistent"] == 0
        and found["a"] + found["b"] + found["tie"] == found["pairs"] == 20
    )
    assert found["equal"] == sum(
        r == "the pages are equal" for r in first_reasons(common, "reward")
    )
    rules = judge.run(judge.Config(**common, backend="rules", users=20))
    assert rules["circular"] == [] and "CIRCULAR" not in capsys.readouterr().out


def test_people(common, tmp_path, shop, capsys):
    judge.run(judge.Config(**common, users=20))
    verdicts = pq.read_table(f"{common['runs']}/base/judge-rules/verdicts.parquet").to_pylist()
    said = [
        {"user": v["user"], "winner": {"a": "sft", "b": "ppo", "tie": "tie"}[v["winner"]]}
        for v in verdicts
    ]
    unasked = next(u for u in shop.user_ids if u not in [v["user"] for v in verdicts])
    more = [{"user": unasked, "winner": "tie"}, {"user": "nobody", "winner": "sft"}]
    table = pa.Table.from_pylist(said + more).append_column("Winner", pa.nulls(22))
    pq.write_table(table, tmp_path / "people.parquet")
    found = judge.run(judge.Config(**common, users=20, labels=str(tmp_path / "people.parquet")))
    assert found["people"]["agreement"] == 1.0 and found["people"]["pairs"] == 20
    printed = capsys.readouterr().out
    assert "agreement with people on 20 pairs" in printed
    assert "20 of 80 users with pages of both are judged" in printed
    assert "people.parquet: 22 rows; columns user, winner; left over: Winner; look at" in printed
    assert "20 of 22 labels are compared; 1 are of users who were not judged" in printed
    assert unasked in printed and "1 are of users whom the shop does not have: nobody" in printed
    for rows, message in (
        ([{"user": "nobody", "winner": "sft"}], "names none"),
        ([{"user": "x", "winner": "neither"}], "want each user once"),
        ([{"user": "x"}], "columns"),
    ):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "wrong.parquet")
        with pytest.raises(PageLLMError, match=message):
            judge.run(judge.Config(**common, users=20, labels=str(tmp_path / "wrong.parquet")))
    (tmp_path / "numbers.csv").write_text("user,winner\n007,sft\n7,tie\n")
    assert judge.read_labels(tmp_path / "numbers.csv", ("sft", "ppo")) == {"007": "a", "7": "tie"}
    (tmp_path / "wrong.parquet").write_text("user")
    with pytest.raises(PageLLMError, match="cannot be read"):
        judge.read_labels(tmp_path / "wrong.parquet", ("sft", "ppo"))


def test_kappa():
    """1 for equal verdicts, 0 for agreement by chance, 0.4 for the table 20, 5, 10, 15."""
    ours = ["a"] * 25 + ["b"] * 25
    people = ["a"] * 20 + ["b"] * 5 + ["a"] * 10 + ["b"] * 15
    assert judge.agreement(ours, people)["kappa"] == pytest.approx(0.4)
    assert judge.agreement(ours, ours)["kappa"] == 1.0
    assert judge.agreement(["a", "a", "b", "b"], ["a", "b", "a", "b"])["kappa"] == 0.0
    assert (
        judge.agreement(["a"], ["a"])["kappa"] is None
        and judge.agreement([], [])["agreement"] is None
    )
    with pytest.raises(ValueError, match="against"):
        judge.agreement(["a"], [])


def test_position_bias_is_seen():
    j = judge.Judge(Stub(lambda a, b: "first" if sum(a) % 3 else "second"))
    verdicts = [j.compare(WHO, [a], [b]) for a in range(12) for b in range(a)]
    found = judge.summarise(verdicts)
    said = [o.winner for v in verdicts for o in (v.forward, v.backward)]
    assert found["first_rate"] == said.count("first") / len(said) != 0.5
    assert found["inconsistent"] == sum(not v.consistent for v in verdicts) / len(verdicts) > 0
    assert found["a"] + found["b"] + found["tie"] == found["pairs"] == 66
    assert judge.summarise([])["win_rate"] is None
