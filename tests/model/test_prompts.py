"""Templates: the loss falls on the target alone, and only the target is ever cut."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.model.prompts import Prompts, left_pad, pad_ids, right_pad
from pagellm.model.vocab import Vocab

VOCAB = Vocab.train(
    ["title brand category history rating opinion chose contains share on"] * 2, 5, 9, 300
)
PROMPTS = Prompts(VOCAB, room=40, max_history=4)


def target(example):
    return [i for i, m in zip(example.ids, example.mask, strict=True) if m]


def test_targets_of_each_kind():
    assert VOCAB.decode(target(PROMPTS.contents(3, "title", "Red drum"))) == " Red drum"
    assert VOCAB.decode(target(PROMPTS.first_order(1, 3, "good"))) == " good"
    assert PROMPTS.first_order(1, 3, PROMPTS.tokens("good")) == PROMPTS.first_order(1, 3, "good")
    assert target(PROMPTS.second_order("brand", "Acme", [4, 2])) == [VOCAB.item(4), VOCAB.item(2)]
    assert VOCAB.decode(target(PROMPTS.second_order_reverse("brand", "Acme", [4, 2]))) == " Acme"
    assert target(PROMPTS.interaction(1, [8, 0])) == [VOCAB.item(8), VOCAB.item(0)]
    assert [
        PROMPTS.contents(0, "title", "x").over,
        PROMPTS.first_order(0, 0, "x").over,
        PROMPTS.second_order("a", "b", [1]).over,
        PROMPTS.interaction(0, [1]).over,
    ] == ["words", "words", "items", "items"]


@settings(deadline=None)
@given(st.text(max_size=20), st.text(max_size=200))
def test_the_prompt_does_not_move_the_target_and_is_never_cut(name, text):
    example = PROMPTS.contents(3, "title", text)
    assert len(example.ids) <= 40
    given_ids = [i for i, m in zip(example.ids, example.mask, strict=True) if not m]
    assert given_ids == [VOCAB.item(3), *VOCAB.words(" title:")]
    assert target(example) == VOCAB.words(f" {text}")[: 40 - len(given_ids)]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 8), st.sampled_from([1.0, 3.0, 5.0, float("nan")])), max_size=9
    ),
    st.booleans(),
)
def test_page_prompts_drop_the_oldest_history_and_keep_user_and_page(history, use_ratings):
    prompts = Prompts(VOCAB, 40, max_history=4, use_ratings=use_ratings)
    items = np.array([i for i, _ in history], dtype=np.int64)
    ratings = np.array([r for _, r in history])
    ids = prompts.page(2, items, ratings)
    assert ids[0] == VOCAB.user(2) and ids[-1] == VOCAB.page
    assert [i - VOCAB.item0 for i in ids if i >= VOCAB.item0] == items[-4:].tolist()
    assert len(ids) <= prompts.page_room
    assert (VOCAB.rating(5.0) in ids) == (use_ratings and 5.0 in ratings[-4:])
    if len(history) >= 4:
        assert len(ids) == prompts.page_room


def test_the_rating_prompt_holds_no_rating():
    ids = PROMPTS.rating(1, 2)
    assert ids[:2] == [VOCAB.user(1), VOCAB.item(2)]
    assert not set(ids) & {VOCAB.rating(r) for r in (1, 2, 3, 4, 5, float("nan"))}
    assert (
        PROMPTS.rating(1, 2, "good")[-len(ids[2:]) :] == ids[2:]
        and len(PROMPTS.rating(1, 2, "good " * 200)) <= 40
    )


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=4))
def test_padding_keeps_every_row(rows):
    ids, valid = left_pad(rows, 7)
    right = right_pad(rows, 7)
    assert ids.shape == valid.shape == right.shape == (len(rows), max(map(len, rows), default=0))
    for i, row in enumerate(rows):
        assert ids[i][valid[i]].tolist() == row and right[i, : len(row)].tolist() == row
        assert (right[i, len(row) :] == 7).all() and (ids[i][~valid[i]] == 7).all()
        assert valid[i].tolist() == sorted(valid[i].tolist())
    assert pad_ids(rows, -1, width=6).shape == (len(rows), 6)
