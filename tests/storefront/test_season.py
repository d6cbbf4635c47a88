"""A season of the policy's calendar, from the day of a request to rows, titles and keys."""

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from pagellm.stage.config import PageLLMError
from pagellm.stage.files import read_json
from pagellm.storefront import ahead, build, evaluate, serve, show
from pagellm.storefront.ask import FrontAsk
from pagellm.storefront.context import Known, contexts
from pagellm.storefront.corpus import build_corpus
from pagellm.storefront.front import Sources, open_store
from pagellm.storefront.page import page
from pagellm.storefront.parts import Layout, Placement
from pagellm.storefront.policy import policy_of
from pagellm.storefront.serve import FrontService
from pagellm.storefront.themes import FORMS, forms_of, season_title
from tests.storefront.golden import AT, STOCK, catalogue, golden_orders, golden_shop
from tests.storefront.test_page import front
from tests.storefront.test_retrieve import u1

DAY = 86_400
# AT is midnight of 1 November 2017.
COFFEE = {"name": "Coffee week", "from": "2017-10-28", "to": "2017-11-02", "categories": ["Drinks"]}
AUTUMN = {
    "name": "Autumn",
    "from": "2017-09-01",
    "to": "2017-11-30",
    "categories": ["Milk", "Granola", "Butter"],
}
CALENDAR = policy_of({"calendar": [COFFEE, AUTUMN]})
ROW = Placement("s", "season", 3, min_items=1)
AGAIN = Placement("t", "season", 3, min_items=1)


def day(text):
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


def at(season=("Coffee week", "Autumn"), **changes):
    return replace(u1(), season=season, **changes)


def test_a_context_names_the_seasons_of_its_day():
    shop, orders = golden_shop(), golden_orders()
    (person,) = contexts(shop, orders, ["u1"], AT, policy=CALENDAR)
    assert person.season == ("Coffee week", "Autumn")
    known = Known.of(shop, orders, np.full(12, -1), 3, AT, CALENDAR)
    # The last day of a season counts to its last second.
    assert known.context("u1", at=day("2017-11-03") - 1).season == ("Coffee week", "Autumn")
    assert known.context("u1", at=day("2017-11-03")).season == ("Autumn",)
    assert known.context(None, at=day("2017-12-01")).season == ()
    assert contexts(shop, orders, ["u1"], AT)[0].season == ()


def test_a_row_of_a_season_shows_its_categories_in_the_person_s_order():
    found = page(front(policy=CALENDAR), at(("Autumn",)), Layout("l", (ROW,)))
    (row,) = found.rows
    assert row.item.tolist() == [0, 7, 3] and row.theme.intent == "season"  # milk, granola, butter
    assert row.theme.concepts == ("Milk", "Granola", "Butter")
    assert row.theme.title.startswith("Autumn") and not found.fallbacks
    assert page(front(policy=CALENDAR), at(()), Layout("l", (ROW,))).fallbacks[0] == (
        "s: no season in the policy's calendar; shown as browse"
    )


def test_two_rows_show_two_seasons_and_a_third_says_why_not():
    rows = (ROW, AGAIN, replace(ROW, id="u"))
    found = page(front(policy=CALENDAR), at(), Layout("l", rows))
    assert [row.theme.title[:6] for row in found.rows[:2]] == ["Coffee", "Autumn"]
    assert found.fallbacks[0] == "u: a row above shows the season; shown as browse"


def test_a_season_that_is_sold_out_leaves_its_row_to_the_next():
    stock = np.ones(12, bool)
    stock[[4, 5, 6]] = False
    found = page(front(policy=CALENDAR, stock=stock), at(), Layout("l", (ROW,)))
    assert found.rows[0].theme.title.startswith("Autumn")
    only = policy_of({"calendar": [COFFEE]})
    found = page(front(policy=only, stock=stock), at(), Layout("l", (ROW,)))
    assert found.fallbacks[0].startswith("s: ") and "in stock" in found.fallbacks[0]
    assert found.rows[0].source != "static" or found.rows[0].theme.intent == "browse"


def test_titles_of_a_season_come_from_its_forms():
    drawn = {season_title(CALENDAR, "Autumn", ["Milk", "Butter"], n) for n in range(6)}
    assert drawn == {
        "Autumn, milk and more",
        "Autumn and milk",
        "Autumn with milk, butter",
        "Autumn, milk, butter",
        "Autumn",
        "Autumn with milk",
    }
    # A category that says the season again, or that no generated row may name, is not named.
    for names in (["Autumn fruit"], ["Beer"], []):
        assert season_title(CALENDAR, "Autumn", names, 0) == "Autumn"
    own = policy_of({"calendar": [AUTUMN], "titles": {"season": ["{A} in {season}"]}})
    found = page(front(policy=own), at(("Autumn",)), Layout("l", (ROW,)))
    assert found.rows[0].theme.title == "Milk in autumn"
    assert forms_of(policy_of({"banned": ["with"]}), "season") == tuple(
        form for form in FORMS["season"] if "with" not in form
    )


def test_a_season_no_row_could_show_is_refused_at_build_by_name():
    wrong = [COFFEE | {"name": "Cheapest week"}, AUTUMN | {"categories": ["Milk", "Granolla"]}]
    given = catalogue(), build_corpus(catalogue(), STOCK), STOCK
    with pytest.raises(PageLLMError) as said:
        build.refuse_policy_names(policy_of({"calendar": wrong}), *given)
    assert "'Cheapest week': the name is blocked by the rule claims" in str(said.value)
    assert "'Autumn': nobody sells 'Granolla'; did you mean 'Granola'?" in str(said.value)
    assert "Milk" not in str(said.value).replace("'Milk", "")
    build.refuse_policy_names(CALENDAR, *given)


@pytest.fixture(scope="module")
def seasonal(made, tmp_path_factory):
    """A build with a calendar and titles that name the season, and its layout."""
    root = tmp_path_factory.mktemp("season")
    store = open_store(Sources(**made))
    name = store.front.best[0]
    today = datetime.fromtimestamp(store.known.at, UTC).date().isoformat()
    entry = {"name": "Zumba days", "from": "2000-01-01", "to": today, "categories": [name]}
    titles = {"browse": ["{Season}, {a}"], "discover": ["{Season}, {a}"]}
    (root / "policy.json").write_text(json.dumps({"calendar": [entry], "titles": titles}))
    rows = [
        {"id": "now", "intent": "season", "slots": 4},
        {"id": "a", "intent": "browse", "slots": 4},
        {"id": "b", "intent": "browse", "slots": 4},
    ]
    layout = {"schema": "layout/1", "id": "home", "placements": rows}
    (root / "home.json").write_text(json.dumps(layout))
    options = made | {"runs": str(root)}
    build.run(build.Config(**options, policy=str(root / "policy.json")))
    return options | {"layout": str(root / "home.json")}


def test_build_page_and_evaluate_show_the_season_of_the_day(seasonal, capsys):
    store = open_store(Sources(**seasonal))
    user = store.shop.user_ids[0]
    found = page(store.front, store.known.context(user), store.layout)
    assert found.rows[0].theme.title.startswith("Zumba days")
    # The word is not the catalogue's: that a person wrote it into the calendar is enough.
    assert [row.source for row in found.rows[1:]] == ["generated"] * 2
    assert all(row.theme.title.startswith("Zumba days, ") for row in found.rows[1:])
    show.run(show.Config(**seasonal, user=user))
    assert "Zumba days, " in capsys.readouterr().out
    evaluate.run(evaluate.Config(**seasonal, people=3, n_boot=5))
    shown = evaluate.pq.read_table(
        Path(seasonal["runs"]) / "synthetic/storefront/evaluate/placements.parquet"
    )
    assert all(title.startswith("Zumba days") for title in shown["title"].to_pylist())
    # Where the list finds nothing, rows have no price.
    assert evaluate.price_of(0.0, 0.0) is None and evaluate.price_of(0.3, 0.4) == pytest.approx(
        0.25
    )


def test_a_request_for_another_day_has_that_day_s_season(seasonal):
    service = FrontService(serve.Config(**seasonal, split="test"))
    try:
        known = service.ahead.store.known
        for moment, season in ((None, ("Zumba days",)), (known.at + DAY, ())):
            ask = FrontAsk(known.context(None).user, at=moment)
            assert service.resolve(ask, service.ahead)[0].season == season
            assert (
                "Zumba"
                in service.make(ask, service.ahead, *service.resolve(ask, service.ahead))[
                    0
                ].decode()
            ) == bool(season)
    finally:
        service.close()


def test_rows_that_were_kept_in_a_season_are_not_served_after_it(seasonal, tmp_path):
    """Though the week is the same."""
    options = seasonal | {"runs": str(tmp_path)}
    shutil.copytree(Path(seasonal["runs"]) / "synthetic", tmp_path / "synthetic")
    found = ahead.open_ahead(ahead.Config(**options, split="test"))
    try:
        known, layout = found.store.known, found.store.layout
        user, tomorrow = found.store.shop.user_ids[0], known.at + DAY
        context = known.context(user)
        found.fill(layout, people=1)
        made, whose = found.page(context, layout)
        assert whose != "static" and made.rows[1].theme.title.startswith("Zumba days, ")
        key = found.rows_key("b", layout, known.at)
        assert key != found.rows_key("b", layout, tomorrow)
        later = known.context(user, at=tomorrow)
        assert context.season == ("Zumba days",) and later.season == ()
        assert not any("Zumba" in row.theme.title for row in found.page(later, layout)[0].rows)
    finally:
        found.cache.close()


def test_a_build_finds_its_policy_from_another_folder_and_under_another_path(
    made, tmp_path, monkeypatch, capsys
):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    policy = tmp_path / "here" / "policy.json"
    policy.write_text(json.dumps({"banned": ["plinth"]}))
    options = made | {"runs": str(tmp_path)}
    kept = tmp_path / "synthetic/storefront/build/config.json"
    monkeypatch.chdir(policy.parent)
    build.run(build.Config(**options, policy="policy.json"))
    model = (kept.parent / "model.pt").read_bytes()
    monkeypatch.chdir(tmp_path / "there")
    assert open_store(Sources(**options)).front.policy.against("a plinth")
    # The same file under another spelling, and moved: the same build, which knows where it is.
    build.run(build.Config(**options, policy="../here/policy.json"))
    moved = policy.rename(tmp_path / "there" / "rules.json")
    build.run(build.Config(**options, policy="rules.json"))
    assert read_json(kept)["config"]["policy"] == str(moved)
    assert open_store(Sources(**options)).front.policy.against("a plinth")
    assert (kept.parent / "model.pt").read_bytes() == model
    # Another policy is another build, under whatever name.
    moved.write_text(json.dumps({"banned": ["cornice"]}))
    with pytest.raises(PageLLMError, match="another policy"):
        build.run(build.Config(**options, policy="rules.json"))
    with pytest.raises(PageLLMError, match="another policy"):
        build.run(build.Config(**options))
