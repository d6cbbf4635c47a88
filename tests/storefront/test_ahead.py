"""What is made ahead gives the same pages as making them now; what is missing harms nobody."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pagellm.stage.config import PageLLMError
from pagellm.storefront import ahead as module
from pagellm.storefront.ahead import Config, open_ahead, page_bytes, rows_bytes, rows_of
from pagellm.storefront.making import default_layout
from pagellm.storefront.page import page, written_ahead
from pagellm.storefront.parts import Answer


@pytest.fixture(scope="module")
def full(made, tmp_path_factory):
    """Everything of the shop is in the cache."""
    root = tmp_path_factory.mktemp("ahead")
    shutil.copytree(f"{made['runs']}/synthetic", root / "synthetic")
    options = made | {"runs": str(root)}
    module.run(Config(**options))
    return options


@pytest.fixture
def ahead(full):
    found = open_ahead(Config(**full))
    yield found
    found.cache.close()


class Dead:
    """A writer that fails whenever it is asked."""

    name = "template/1"  # as the one that wrote ahead: the keys are the same

    def themes(self, contexts, intents, used):
        raise OSError("the model server does not answer")

    def keywords(self, themes, contexts, offered):
        raise OSError("the model server does not answer")


def with_writer(ahead, writer):
    return replace(
        ahead, store=replace(ahead.store, front=replace(ahead.store.front, writer=writer))
    )


def shown(found):
    return [(row.theme.title, row.item.tolist(), row.score.tolist()) for row in found.rows]


def test_everybody_s_page_out_of_the_cache_is_the_page_made_now_and_no_writer_is_asked(ahead):
    store, dead = ahead.store, with_writer(ahead, Dead())
    own = 0
    for user in store.shop.user_ids[::3]:
        context = store.known.context(user)
        found, whose = dead.page(context, store.layout)
        if whose == "own":
            own += 1
            assert shown(found) == shown(page(store.front, context, store.layout))
        else:
            assert whose == "segment" and found.rows
            assert {row.source for row in found.rows} <= {"segment", "static"}
    assert own > 10


def test_a_whole_page_is_kept_for_everybody(ahead):
    store = ahead.store
    keys = [ahead.page_key(context, store.layout) for context in ahead.people()]
    assert all(ahead.cache.holds(keys))
    context = next(c for c in ahead.people() if c.bucket.startswith("user:"))
    value = ahead.cache.get(ahead.page_key(context, store.layout))
    made_now = page(store.front, context, store.layout)
    assert json.loads(value + b"}") == json.loads(page_bytes(store, made_now) + b"}")


def test_strangers_and_people_alike_have_rows_too(ahead):
    store, dead = ahead.store, with_writer(ahead, Dead())
    for more in ([], [3], [3, 5, 3]):
        context = store.known.context(None, more=np.array(more, dtype=np.int64))
        found, _ = dead.page(context, store.layout)
        assert len(found.rows) == len(store.layout.placements)
        assert context.item.tolist() == list(dict.fromkeys(more[::-1]))
        assert context.count.tolist() == [more.count(i) for i in context.item.tolist()]


def test_without_rows_the_page_is_static_and_says_why(ahead):
    layout = replace(default_layout("A"), id="another")
    context = ahead.store.known.context(ahead.store.shop.user_ids[0])
    found, whose = with_writer(ahead, Dead()).page(context, layout)
    assert whose == "static" and {row.source for row in found.rows} == {"static"}
    assert "no rows are kept" in found.fallbacks[0]


@pytest.mark.parametrize(
    "change", ["layout", "week", "seed", "version", "stock", "history", "barred", "static"]
)
def test_what_is_stale_is_never_asked_for(ahead, change):
    """Every part that moves a page moves its key."""
    store, layout = ahead.store, ahead.store.layout
    context = store.known.context(store.shop.user_ids[0])
    before = ahead.page_key(context, layout)
    assert ahead.page_key(context, layout) == before
    other, seed = ahead, 0
    if change == "layout":
        layout = replace(layout, placements=layout.placements[:2])
    elif change == "week":
        context = store.known.context(context.user, at=store.known.at + 7 * 86_400)
    elif change == "seed":
        seed = 1
    elif change == "version":
        other = replace(ahead, version="another")
    elif change == "stock":
        stock = store.front.stock.copy()
        stock[0] = False
        other = replace(ahead, store=replace(store, front=replace(store.front, stock=stock)))
    elif change == "history":
        context = store.known.context(context.user, more=np.array([1]))
    elif change == "barred":
        context = replace(context, barred=np.array([1]))
    else:
        other = replace(ahead, store=replace(store, front=replace(store.front, static=True)))
    assert other.page_key(context, layout, seed) != before


def test_the_same_command_carries_on_and_makes_nothing_twice(full, ahead, capsys):
    before = ahead.cache.size()
    assert ahead.fill(ahead.store.layout) == (0, 0)
    context = next(c for c in ahead.people() if c.bucket.startswith("user:"))
    key = ahead.rows_key(context.bucket, ahead.store.layout, context.at)
    value = ahead.cache.get(key)
    with ahead.cache.base as base:  # as if the command had been killed before this one
        base.execute("DELETE FROM kept WHERE key = ?", (key,))
    assert ahead.fill(ahead.store.layout)[0] == 1
    assert ahead.cache.get(key) == value and ahead.cache.size() == before  # the same bytes


def test_rows_come_back_as_they_were_and_rubbish_is_no_rows(ahead):
    store = ahead.store
    rows, _ = written_ahead(store.front, store.known.context(store.shop.user_ids[0]), store.layout)
    value = rows_bytes(rows)
    back = rows_of(value, store.shop.n_items)
    assert [r.theme for r in back] == [r.theme for r in rows]
    assert [r.keywords for r in back] == [r.keywords for r in rows]
    for one, two in zip(back, rows, strict=True):
        for name in ("item", "ret", "agree", "source"):
            assert getattr(one.found, name).tolist() == getattr(two.found, name).tolist()
    for wrong in (b"", b"x" * 99, value[:-9], value[: len(value) // 2]):
        assert rows_of(wrong, store.shop.n_items) is None
    assert rows_of(value, 3) is None  # of a larger shop


def test_a_damaged_entry_is_passed_over(ahead):
    store = ahead.store
    context = next(c for c in ahead.people() if c.bucket.startswith("user:"))
    key = ahead.rows_key(context.bucket, store.layout, context.at)
    value = ahead.cache.get(key)
    ahead.cache.put([(key, value[:50])])
    found, whose = with_writer(ahead, Dead()).page(context, store.layout)
    assert whose == "segment" and found.rows
    ahead.cache.put([(key, value)])


def test_a_full_disk_ends_with_a_message_and_what_was_kept_stays(full, ahead, monkeypatch):
    monkeypatch.setattr(
        type(ahead.cache), "put", lambda self, entries: "cache.sqlite: disk is full"
    )
    with pytest.raises(PageLLMError, match="full\n.*carries on"):
        ahead.fill(replace(ahead.store.layout, id="other"), people=1)


def test_people_with_rows_and_pages_are_counted(ahead):
    found = ahead.coverage(ahead.store.layout)
    assert (
        found["people"] == ahead.store.shop.n_users
        and found["pages"] == found["people"] > found["with_own_rows"] > 0
    )
    assert found["segments_kept"] == found["segments"] > 0
    nothing = ahead.coverage(replace(ahead.store.layout, id="other"))
    assert nothing["pages"] == nothing["segments_kept"] == 0


def test_too_many_blocked_themes_turn_themes_off_while_they_are_made_ahead(ahead, tmp_path):
    """The switch of the run is left alone: this one has a directory of its own."""

    class Rude(Dead):
        def themes(self, contexts, intents, used):
            from pagellm.storefront.parts import Theme

            return [[Answer(Theme("Wine and beer", "browse", ("Wine",)))] * 40]

        def keywords(self, themes, contexts, offered):
            return [Answer(None, "nothing") for _ in themes]

    switch = type(ahead.switch)(tmp_path, 0.0)
    rude = replace(with_writer(ahead, Rude()), switch=switch)
    rude.fill(replace(ahead.store.layout, id="rude"), people=20)
    assert json.loads((tmp_path / "off.json").read_text())["how to turn on"] == "remove this file"
    assert not (Path(ahead.switch.folder) / "off.json").exists()


def test_a_moment_before_the_orders_end_is_refused(made):
    assert open_ahead(Config(**made)).at == open_ahead(Config(**made)).store.known.at
    with pytest.raises(PageLLMError, match="want a later day"):
        open_ahead(Config(**made, today="1999-01-01"))
    with pytest.raises(PageLLMError, match="today"):
        Config(**made, today="soon")
    later = open_ahead(Config(**made, today="2100-01-01"))
    assert later.at == 4102444800


def test_histories_hold_every_order_unless_some_are_held_out(made):
    every, train = (open_ahead(Config(**made, split=split)) for split in ("none", "test"))
    sizes = [int(one.store.known.rows.counts().sum()) for one in (every, train)]
    assert sizes[0] > sizes[1] and every.version != train.version
