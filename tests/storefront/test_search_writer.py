"""The teacher `search`: its objective, its sets of keywords, and its page."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from pagellm.pages import stats
from pagellm.storefront import show
from pagellm.storefront.corpus import prune
from pagellm.storefront.front import open_store
from pagellm.storefront.gates import check_keywords
from pagellm.storefront.offers import open_rows_of
from pagellm.storefront.page import page, written_ahead
from pagellm.storefront.parts import page_json
from pagellm.storefront.schemas import PAGE, check
from pagellm.storefront.search import Objective, Search, grown, objective


@pytest.fixture(scope="module")
def store(made):
    return open_store(show.Config(**made))


def drafts_of(store, user):
    """The person as a writer is told of them, and their five best template themes."""
    context = store.known.context(store.shop.user_ids[user])
    told, intents, used = open_rows_of(store.front, context, store.layout)
    answers = store.front.writer.themes([told], [intents], [used])[0]
    return told, [answer.value for answer in answers][: len(intents)]


def test_the_objective_is_what_the_page_would_show(store):
    """J is worked out anew from the candidates that written_ahead keeps for the page."""
    front, user = store.front, store.shop.user_ids[3]
    context = store.known.context(user)
    told, _, _ = open_rows_of(front, context, store.layout)
    rows, _ = written_ahead(front, context, store.layout)
    assert rows
    for row in rows:
        logit = front.ranker(told)
        legal = ~np.isin(row.found.item, told.barred)
        item, agree = row.found.item[legal], row.found.agree[legal]
        best = np.lexsort((item, -logit[item]))[:10]  # the weights of the score are 0 here
        expected = (1 - 0.02 * len(row.keywords)) * (front.platt(logit[item[best]]) @ agree[best])
        weightless = replace(front, weights=replace(front.weights, ret=0.0, agree=0.0))
        found = objective(weightless, told, row.theme, list(row.keywords))
        assert found == pytest.approx(expected, rel=1e-6)


def test_what_is_computed_once_for_a_theme_changes_nothing(store):
    told, (theme, *_) = drafts_of(store, 5)
    keywords = store.front.writer.keywords([theme], [told], [prune(store.front.corpus, theme)])
    plain, often = (Objective(store.front, told, theme) for _ in range(2))
    often.often()
    for n in range(1, len(keywords[0].value) + 1):
        some = keywords[0].value[:n]
        assert often(some) == pytest.approx(plain(some), rel=1e-9)


def test_three_keywords_are_the_best_that_greedy_growth_can_find(store):
    """The first is the best single one, and each later one the best to add."""
    front = store.front
    told, (theme, *_) = drafts_of(store, 7)
    numbers = prune(front.corpus, theme)[:12]
    worth = Objective(front, told, theme)
    chosen = grown(worth, numbers, 3)
    assert 1 <= len(chosen) <= 3
    for n in range(len(chosen)):
        before = chosen[:n]
        for w in numbers.tolist():
            more = [*before, front.corpus.keyword(w, 0.9 - 0.05 * n)]
            texts = [keyword.text for keyword in more]
            stay, _ = check_keywords(more, front.corpus, told, front.policy.min_items, front.policy)
            if len(set(texts)) == len(texts) and len(stay) == len(more):
                assert worth(more) <= worth(chosen[: n + 1]) + 1e-12


def test_the_teacher_beats_the_template_on_its_own_objective(store):
    """The paired interval over people lies above 0; no single row is worth less."""
    search, more = Search(store.front), []
    for user in range(0, 60, 3):
        told, themes = drafts_of(store, user)
        offered = [prune(store.front.corpus, theme) for theme in themes]
        people = [told] * len(themes)
        own, plain = (
            [
                objective(store.front, told, theme, answer.value)
                for theme, answer in zip(
                    themes, writer.keywords(themes, people, offered), strict=True
                )
            ]
            for writer in (search, store.front.writer)
        )
        assert all(a >= b - 1e-12 for a, b in zip(own, plain, strict=True))
        more.append(sum(own) - sum(plain))
    assert stats.summary(np.array(more), 0, 500)["low"] > 0


def test_its_keywords_pass_the_gates_and_its_titles_are_forms_of_the_template(store):
    search, front = Search(store.front), store.front
    context = store.known.context(store.shop.user_ids[11])
    told, intents, used = open_rows_of(front, context, store.layout)
    answers = search.themes([told], [intents], [used])[0]
    drafts = search.template.themes([told], [intents], [used])[0]
    # A small shop runs out of themes: then rows are left to their fallback.
    assert len(answers) == sum(draft.value is not None for draft in drafts) >= len(intents) - 1
    assert all(answer.seconds > 0 for answer in answers)
    titles = [answer.value.title for answer in answers]
    assert len(set(titles)) == len(titles)
    themes = [answer.value for answer in answers]
    offered = [prune(front.corpus, theme) for theme in themes]
    for numbers, answer in zip(
        offered, search.keywords(themes, [told] * len(themes), offered), strict=True
    ):
        assert 3 <= len(answer.value) <= 8
        assert {k.text for k in answer.value} <= {front.corpus.text[w] for w in numbers} | set(
            itertools.chain(*(theme.concepts for theme in themes))
        )


def test_a_page_by_the_teacher(made):
    store = open_store(show.Config(**made, writer="search"))
    template = open_store(show.Config(**made))
    assert store.front.writer.front.weights == template.front.weights
    assert store.front.writer.front.platt == template.front.platt
    found = page(store.front, store.known.context(store.shop.user_ids[0]), store.layout)
    again = page(store.front, store.known.context(store.shop.user_ids[0]), store.layout)
    assert found.models["themes"] == "search/1" and found.page_id == again.page_id
    assert any(row.theme.source == "search/1" for row in found.rows)
    shop = store.shop.catalogue
    assert check(page_json(found, shop.ids, shop.title), PAGE) == []
