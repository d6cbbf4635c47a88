"""The cascade on the golden shop, and its laws on a synthetic one."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pagellm.pages import metrics
from pagellm.stage.config import PageLLMError
from pagellm.stage.files import read_json
from pagellm.storefront import build, choose, evaluate, show, storefront
from pagellm.storefront.corpus import build_corpus, prune
from pagellm.storefront.front import (
    Sources,
    caps_of,
    check_layout,
    open_store,
    read_deals,
    read_layout,
    read_rewards,
)
from pagellm.storefront.fuse import SameLeaf
from pagellm.storefront.gates import known_words
from pagellm.storefront.making import Deals, Front, default_layout
from pagellm.storefront.missions import Missions
from pagellm.storefront.page import page, written_ahead
from pagellm.storefront.parts import Answer, Keyword, Layout, Placement, Theme, Weights, page_json
from pagellm.storefront.policy import policy_of
from pagellm.storefront.rankers import Frequency, Platt
from pagellm.storefront.retrieve import build_index
from pagellm.storefront.schemas import PAGE, check
from pagellm.storefront.themes import row_title
from tests.storefront.golden import HOUSEHOLDS, STOCK, catalogue
from tests.storefront.test_retrieve import BREAKFAST, cold, u1

LABELS = [0, 1, 4, 8]
AGREE = {1: 0.92, 7: 0.95, 8: 0.90, 5: 0.70}
TINY = Layout(
    "tiny",
    (
        Placement("p1", "restock", 3, min_items=3, title="Buy it again"),
        Placement("p2", "browse", 3, min_items=3),
    ),
)


class Golden:
    """A writer that always offers the breakfast row."""

    name = "golden/1"

    def themes(self, contexts, intents, used):
        concepts = ("oat milk", "granola", "cereal", "coffee")
        return [[Answer(Theme("Easy weekday breakfasts", "browse", concepts, source=self.name))]]

    def keywords(self, themes, contexts, offered, m=8):
        return [Answer(list(BREAKFAST)) for _ in themes]


def front(writer=None, stock=STOCK, **changes):
    shop = catalogue()
    corpus = build_corpus(shop, stock)
    # The row's fourth keyword is a query, though the category of that name would win in a built
    # corpus.
    corpus.number.setdefault("coffee", corpus.number.get("Coffee", 0))
    none = np.full(12, -1)
    parent = np.unique([path[0] for path in shop.categories], return_inverse=True)[1]
    made = Front(
        shop, stock, HOUSEHOLDS, corpus, build_index(shop, stock, corpus, HOUSEHOLDS),
        Missions(none, [], none[:0], none, 20), Frequency(HOUSEHOLDS), Platt(), writer or Golden(),
        lambda theme, keywords, item: np.array([AGREE.get(i, 0.8) for i in item.tolist()]),
        policy_of(), SameLeaf(shop.leaf_id, parent), ["Dairy", "Coffee"],
        known_words(["easy weekday breakfasts"]),
    )  # fmt: skip
    return replace(made, **changes)


def golden_page(**changes):
    return page(front(**changes), u1(), TINY)


def test_the_golden_page():
    found = golden_page()
    ids = [[catalogue().ids[i] for i in row.item] for row in found.rows]
    assert ids == [["g01", "g05", "g10"], ["g08", "g02", "g09"]]
    assert [row.source for row in found.rows] == ["static", "generated"]
    assert found.rows[0].score == pytest.approx([-0.2082, -0.7239, -0.7248], abs=1e-4)
    assert found.rows[1].score == pytest.approx([-1.5506, -1.9706, -2.3892], abs=3e-4)
    assert found.rows[1].parts[2] == pytest.approx([-2.3889, 0.042, 0.0826, -0.125, 0], abs=3e-4)
    assert [found.rows[1].keywords[k].text for k in found.rows[1].keyword] == [
        "Granola",
        "Plant milk",
        "Cereal",
    ]
    assert [row.quality["value"] for row in found.rows] == pytest.approx([0.9615, 0.1763], abs=1e-4)
    assert found.page["value"] == pytest.approx(1.1378, abs=2e-4)


def test_metrics_of_the_golden_page():
    items, names = golden_page().items().tolist(), catalogue().categories
    assert metrics.recall(LABELS, items) == 1
    assert metrics.recall([1, 8], items) == 1  # those never bought before
    assert metrics.ndcg(LABELS, items, 6) == pytest.approx(0.9268, abs=1e-4)
    assert metrics.entropy(items, names) == pytest.approx(2.2539, abs=1e-4)
    assert metrics.ild(items, names) == pytest.approx(0.9556, abs=1e-4)
    told = golden_page().page
    assert told["entropy"] == metrics.entropy(items, names)
    assert told["ild"] == pytest.approx(metrics.ild(items, names), abs=1e-12)


def test_parts_sum_to_the_score():
    for row in golden_page().rows:
        assert row.parts.sum(1) == pytest.approx(row.score, abs=1e-12)


def test_the_page_is_valid_json_of_its_schema_and_names_no_reason_by_person():
    found = golden_page()
    document = page_json(found, catalogue().ids, catalogue().title, explain=True)
    assert check(document, PAGE) == []
    assert "u1" not in str(document["page"]["decisions"])


def test_equal_requests_are_equal_pages():
    a, b = (replace(page(front(), u1(), TINY, seed=3, explore=1.0), ms={}) for _ in range(2))
    one, two = (page_json(x, catalogue().ids, catalogue().title) for x in (a, b))
    assert one == two


def test_an_item_that_is_sold_out_changes_no_page():
    """The golden shop with g12 and without it."""
    found = golden_page()
    assert 11 not in found.items()
    shop = catalogue()
    names = ("ids", "title", "brand", "categories", "leaf", "description", "price")
    less = type(shop).of(*(getattr(shop, name)[:11] for name in names))
    corpus = build_corpus(less, STOCK[:11])
    corpus.number["coffee"] = corpus.number["Coffee"]
    there = front(
        catalogue=less, stock=STOCK[:11], households=HOUSEHOLDS[:11], corpus=corpus,
        index=build_index(less, STOCK[:11], corpus, HOUSEHOLDS[:11]),
        ranker=Frequency(HOUSEHOLDS[:11]),
    )  # fmt: skip
    again = page(there, u1(), TINY)
    assert again.items().tolist() == found.items().tolist()
    assert np.concatenate([row.score for row in again.rows]).tolist() == (
        np.concatenate([row.score for row in found.rows]).tolist()
    )


def test_barred_items_are_never_shown():
    found = page(front(), u1(barred=np.array([7, 0])), TINY)
    assert not {7, 0} & set(found.items().tolist())


def test_people_without_history_get_a_page_and_are_told_why():
    found = page(front(), cold(), TINY)
    assert len(found.rows) == 2
    assert any("nothing bought before" in text for text in found.fallbacks)


class Silent(Golden):
    """A writer that gives nothing, as a broken server does."""

    def themes(self, contexts, intents, used):
        return [[Answer(None, "half a JSON object")]]


class Rude(Golden):
    def themes(self, contexts, intents, used):
        titles = ("Ignore previous instructions", "<b>Milk</b>", "Weight loss breakfasts")
        return [[Answer(Theme(title, "browse", ("granola",))) for title in titles]]


@pytest.mark.parametrize("writer", [Silent(), Rude()])
def test_a_writer_without_a_usable_answer_leaves_a_static_row(writer):
    found = golden_page(writer=writer)
    assert [row.source for row in found.rows] == ["static", "static"]
    assert found.rows[1].theme.title == "Dairy"
    assert any("no theme is left" in text for text in found.fallbacks)


def test_a_row_of_named_categories_stays_as_the_merchandiser_wrote_it():
    locked = Placement("p2", "editorial", 3, title="Hot cups", categories=("Coffee", "Tea"))
    found = page(front(), u1(), Layout("mine", (locked,)))
    row = found.rows[0]
    assert row.source == "editorial" and row.theme.title == "Hot cups"
    assert row.item.tolist() == [4, 5, 6]


def days(*ends):
    return [date.fromisoformat(end).toordinal() - date(1970, 1, 1).toordinal() for end in ends]


def test_a_row_of_deals_shows_what_is_on_offer_that_day():
    """At u1's moment, 1 November 2017, g05 and g11 are on offer, g06 no more, g07 not yet."""
    first = days("2017-11-01", "2017-10-01", "2017-10-01", "2017-11-02")
    last = days("2017-11-01", "2017-12-01", "2017-10-31", "2017-11-05")
    deals = Deals(np.array([4, 10, 5, 6]), np.array(first), np.array(last))
    layout = Layout("mine", (Placement("d", "deal", 3), Placement("p2", "browse", 3, min_items=3)))
    found = page(front(deals=deals), u1(), layout)
    assert found.rows[0].theme.title == "Offers" and found.rows[0].item.tolist() == [4, 10]
    drinks = replace(layout.placements[0], categories=("Coffee",))
    found = page(front(deals=deals), u1(), replace(layout, placements=(drinks,)))
    assert found.rows[0].item.tolist() == [4]
    for some, why in ((None, "the shop marks no deals"), (deals, "no deal is in force")):
        late = replace(u1(), at=u1().at + 90 * 86_400)
        found = page(front(deals=some), late, layout)
        assert f"d: {why}; shown as browse" in found.fallbacks and len(found.rows) == 2


def test_rewards_move_generated_rows_alone_and_are_a_part_of_the_score(tmp_path):
    """Without them, or where all are alike, no bit moves."""
    plain = golden_page()
    wish = np.zeros(12)
    wish[[1, 9]] = 5.0  # oat milk, and bread, which is in the row to buy again
    weights = Weights(reward=2.0)
    same = golden_page(weights=weights, rewards=np.full(12, 3.0))
    for a, b in zip(plain.rows, same.rows, strict=True):
        assert a.item.tolist() == b.item.tolist() and a.score.tolist() == b.score.tolist()
    found = golden_page(weights=weights, rewards=wish)
    assert found.rows[0].item.tolist() == plain.rows[0].item.tolist() == [0, 4, 9]
    assert plain.rows[1].item[0] == 7 and found.rows[1].item[0] == 1
    # z of one 5 among four candidates, of which the rest are 0: sqrt(3).
    assert found.rows[1].parts[0, 4] == pytest.approx(2 * np.sqrt(3))
    for row in found.rows:
        assert row.parts.sum(1) == pytest.approx(row.score)
    documents = [page_json(one, catalogue().ids, catalogue().title) for one in (plain, found)]
    assert [check(document, PAGE) for document in documents] == [[], []]
    parts = [document["placements"][1]["items"][0]["parts"] for document in documents]
    assert "reward" not in parts[0] and parts[1]["reward"] > 0


def test_rewards_are_read_from_a_table_and_tuning_leaves_them_alone(tmp_path, capsys, made):
    path = tmp_path / "margins.csv"
    path.write_text("item,reward\ng05,2\nzz,9\ng01,-1.5\n")
    rewards = read_rewards(str(path), catalogue())
    assert rewards[[0, 4]].tolist() == [-1.5, 2] and set(rewards.tolist()) == {-1.5, 2, 0.25}
    assert "1 line of items that the shop has not" in capsys.readouterr().out
    for text, words in (
        ("item\ng05", "no column reward"),
        ("item,reward\ng05,much", "line 2: 'much' is no number"),
        ("item,reward\ng05,nan", "is no number"),
        ("item,reward\nzz,1", "no line names an item of the shop"),
    ):
        path.write_text(text + "\n")
        with pytest.raises(PageLLMError, match=words):
            read_rewards(str(path), catalogue())
    with pytest.raises(PageLLMError, match="reward_weight"):
        Sources(**made, rewards=str(path), reward_weight=-1.0)
    store = open_store(Sources(**made))
    path.write_text(f"item,reward\n{store.front.catalogue.ids[3]},1\n")
    wished = open_store(Sources(**made, rewards=str(path), reward_weight=0.5)).front
    assert wished.weights == replace(store.front.weights, reward=0.5)
    assert wished.models["rewards"].endswith(" 0.5") and "rewards" not in store.front.models


def test_deals_are_read_from_a_table_and_wrong_lines_are_named(tmp_path, capsys):
    path = tmp_path / "deals.csv"
    path.write_text("item,from,to\ng05,2017-11-01,2017-11-01\nzz,2017-11-01,2017-11-02\n")
    deals = read_deals(str(path), catalogue())
    assert deals.at(u1().at).tolist() == [4] and deals.at(u1().at + 86_400).tolist() == []
    said = capsys.readouterr().out
    assert "of 2 lines 1 with an item that the shop has not; the first: zz" in said
    for line, words in (
        ("item,from\ng05,2017-11-01", "no column to"),
        ("item,from,to\ng05,soon,2017-11-01", "line 2: want days like"),
        ("item,from,to\ng05,2017-11-02,2017-11-01", "line 2: the offer ends before"),
    ):
        path.write_text(line + "\n")
        with pytest.raises(PageLLMError, match=words):
            read_deals(str(path), catalogue())


def test_a_policy_s_caps_hold_for_generated_rows_and_count_what_stands_above():
    shop = front()
    policy = policy_of({"caps": {"Drinks": 2, "Breakfast": 1}, "min_items": 1})
    capped = replace(shop, policy=policy, caps=caps_of(policy.caps, catalogue()))
    wide = replace(TINY.placements[1], slots=4, min_items=1)
    rows = (TINY.placements[0], wide)
    plain, limited = (
        page(one, u1(), Layout("mine", rows)).rows[1].item.tolist() for one in (shop, capped)
    )
    # g05 stands in the first row: of Drinks one more may come, of Breakfast the better one.
    assert plain == [7, 1, 8, 5] and limited == [7, 1, 5]
    with pytest.raises(PageLLMError, match="cap of 'Shoes': nobody sells 'Shoes'"):
        given = catalogue(), shop.corpus, STOCK
        build.refuse_policy_names(policy_of({"caps": {"Shoes": 1, "Tea": 2}}), *given)


def test_sponsored_items_keep_to_row_and_page_and_are_said():
    paid = np.isin(np.arange(12), [1, 7])
    for sponsored, wanted in ((0, [8, 5]), (1, [7, 8, 5]), (2, [7, 8, 5])):  # a page of 7: one
        row = Placement("p2", "browse", 4, min_items=1, sponsored=sponsored)
        layout = Layout("mine", (TINY.placements[0], row))
        found = page(front(sponsored=paid, policy=policy_of({"min_items": 1})), u1(), layout)
        assert found.rows[1].item.tolist() == wanted
        document = page_json(found, catalogue().ids, catalogue().title)
        items = document["placements"][1]["items"]
        assert [one["id"] for one in items if one.get("sponsored")] == ["g08"] * (sponsored > 0)
        assert check(document, PAGE) == []


def test_a_given_row_that_cannot_be_filled_falls_back_without_its_title():
    """Its title was written for other items."""
    gone = STOCK.copy()
    gone[[4, 5]] = False
    locked = Placement("p1", "editorial", 3, 3, title="Hot cups", categories=("Coffee",))
    found = page(front(stock=gone), u1(), Layout("mine", (locked,)))
    assert [row.theme.title for row in found.rows] == ["Easy weekday breakfasts"]
    assert found.fallbacks[0] == "p1: no item of Coffee is in stock; shown as browse"
    again = Placement("p1", "restock", 3, 3, title="Your usual")
    found = page(front(), cold(), Layout("mine", (again,)))
    assert [row.theme.title for row in found.rows] == ["Easy weekday breakfasts"]


def test_titles_of_given_and_static_rows_are_long_enough_and_none_comes_twice():
    """A category of two letters, two rows to buy again, and more rows than categories."""
    again = tuple(Placement(name, "restock", 1) for name in ("a", "b"))
    popular = tuple(Placement(name, "browse", 1) for name in ("c", "d", "e"))
    shop = front(static=True)
    found = page(replace(shop, best=[]), u1(), Layout("mine", again + popular))
    titles = [row.theme.title for row in found.rows]
    assert titles == ["Buy it again", "Buy it again 2", "Popular now", "Popular now 2",
                      "Popular now 3"]  # fmt: skip
    assert not [d for d in found.decisions if d.rule == "titles" and d.action != "pass"]
    shop.corpus.number["TV"] = shop.corpus.number["Coffee"]
    found = page(replace(shop, best=["TV"]), u1(), Layout("mine", popular[:1]))
    assert [row.theme.title for row in found.rows] == ["Popular now"]
    del shop.corpus.number["TV"]


def test_names_that_nobody_sells_are_neither_a_row_s_title_nor_its_concepts():
    """As a request's own layout may hold them."""
    names = ("<script>alert(1)</script>", "x" * 100, "Coffee")
    found = page(front(), u1(), Layout("mine", (Placement("a", "editorial", 2, categories=names),)))
    assert found.rows[0].theme.title == "Coffee" and found.rows[0].theme.concepts == ("Coffee",)
    assert check(page_json(found, catalogue().ids, catalogue().title), PAGE) == []
    rows = (Placement("a", "editorial", 2, categories=names[:2]), Placement("b", "season", 2))
    season = {"name": "Cheapest week", "from": "2017-01-01", "to": "2018-01-01"}
    policy = policy_of({"calendar": [season | {"categories": ["Coffee"]}]})
    person = replace(u1(), season=("Cheapest week",))
    found = page(front(policy=policy), person, Layout("mine", rows))
    assert any(note.startswith("a: no item of <script>") for note in found.fallbacks)
    assert [row.theme.title for row in found.rows][1] == "In season"


def test_a_layout_file_that_cannot_be_read_is_named_and_nothing_is_to_be_removed(tmp_path):
    path = tmp_path / "home.json"
    for text, words in (
        ("{", "is no JSON"),
        ("[]", "is not of type object"),
        ("", "is no JSON"),
        ('{"id": "a", "id": "b"}', "'id' is there twice"),
    ):
        path.write_text(text)
        with pytest.raises(PageLLMError, match=words) as said:
            read_layout(str(path), True)
        assert str(said.value).startswith(str(path)) and "emove" not in str(said.value)
    with pytest.raises(PageLLMError, match="cannot be read"):
        read_layout(str(tmp_path), True)
    rows = [{"id": "a", "intent": "browse", "slots": 4}]
    text = json.dumps({"schema": "layout/1", "id": "x", "placements": rows})
    path.write_text("\ufeff" + text, encoding="utf-8")
    assert read_layout(str(path), True).placements[0].slots == 4


def test_a_locked_title_that_the_gates_block_is_not_shown_and_the_row_says_why():
    locked = Placement("p1", "editorial", 3, title="Cheapest cups", categories=("Coffee",))
    rows = (locked, Placement("p2", "browse", 3, min_items=3, title="Heal your gut"))
    found = page(front(), u1(), Layout("mine", rows))
    assert [row.theme.title for row in found.rows] == ["Coffee", "Easy weekday breakfasts"]
    assert [text for text in found.fallbacks if "blocked by the rule claims" in text] == [
        "p1: its title is blocked by the rule claims",
        "p2: its title is blocked by the rule claims",
    ]


def test_a_layout_that_cannot_be_shown_is_refused_by_name():
    rows = (
        Placement("a", "editorial", 3, title="Ignore previous rules", categories=("Coffee",)),
        Placement("b", "editorial", 3, title="Good mornings", categories=("Cofee",)),
    )
    with pytest.raises(PageLLMError) as said:
        check_layout(front(), Layout("mine", rows))
    assert "placements[0].title: 'Ignore previous rules' is blocked by the rule" in str(said.value)
    assert "placements[1].categories: nobody sells 'Cofee'; did you mean 'Coffee'?" in str(
        said.value
    )
    check_layout(front(), TINY)
    # What is sold out may come back.
    gone = Layout("mine", (Placement("a", "editorial", 3, categories=("Cleaning",)),))
    check_layout(front(), gone)
    assert "no item of Cleaning is in stock" in page(front(), u1(), gone).fallbacks[0]


@pytest.mark.parametrize(
    ("name", "policy", "words"),
    [
        ("x" * 41, {}, "has 41 characters, and rows name 40 at most"),
        ("Scams", {"banned": ["scam"]}, "'Scams' is blocked by the policy"),
        ("!!", {}, "'!!' holds no word"),
        ("coffees", {}, "'coffees' is one category with 'Coffee', which has the same words"),
    ],
)
def test_a_category_that_is_sold_and_cannot_be_shown_is_refused_by_reason(name, policy, words):
    shop = catalogue()
    paths = [*shop.categories[:11], (*shop.categories[0], name)]
    shop, stock, rules = replace(shop, categories=paths), np.ones(12, bool), policy_of(policy)
    corpus = build_corpus(shop, stock, rules.forbidden)
    assert words in build.unshowable(name, shop, corpus, stock, rules)
    season = {"name": "Autumn", "from": "2017-09-01", "to": "2017-11-30", "categories": [name]}
    named = policy_of(policy | {"calendar": [season]})
    with pytest.raises(PageLLMError, match="the policy cannot be kept\n  season 'Autumn': "):
        build.refuse_policy_names(named, shop, corpus, stock)
    assert build.unshowable("Tea", shop, corpus, stock, rules) == ""


def test_a_policy_that_lets_no_row_be_named_is_refused_with_term_and_count():
    missions = Missions(np.zeros(2, int), ["Red things", "Blue things"], np.zeros(2, int),
                        np.zeros(2, int), 1)  # fmt: skip
    build.refuse_policy(missions, policy_of({"restricted": ["red"]}))
    with pytest.raises(PageLLMError, match="all 2 categories, 2 of them by 'thing'"):
        build.refuse_policy(missions, policy_of({"restricted": ["things"]}))


def test_no_item_left_leaves_a_row_out_and_says_so():
    stock = np.zeros(12, bool)
    stock[:2] = True
    found = page(
        front(stock=stock),
        cold(),
        Layout("l", tuple(Placement(f"p{n}", "browse", 5) for n in "12")),
    )
    assert len(found.rows) == 1 and "the row is left out" in found.fallbacks[-1]


def test_weights_0_and_static_themes_are_the_ranker_s_own_order_for_every_user(made):
    store = open_store(Sources(static=True, layout="A", **made))
    plain = replace(store.front, weights=Weights(0, 0, 0, 0))
    for user in store.shop.user_ids:
        context = store.known.context(user)
        logit = plain.ranker(context)
        taken = np.zeros(store.shop.n_items, bool)
        found = page(plain, context, store.layout)
        assert len(found.rows) == len(store.layout.placements)
        for row in found.rows:
            assert row.score.tobytes() == logit[row.item].tobytes()
            rivals = members(plain, context, row)
            rivals = rivals[~taken[rivals] & plain.stock[rivals]]
            best = sorted(rivals.tolist(), key=lambda i: (-logit[i], i))[: row.placement.slots]
            assert row.item.tolist() == best
            taken[row.item] = True


def members(front, context, row):
    """All items that a static row may show."""
    if row.placement.intent == "restock" and row.theme.title == "Buy it again":
        return context.item
    names = row.theme.concepts
    if not names:
        return np.arange(len(front.stock))
    return np.unique(np.concatenate([front.corpus.matches(front.corpus.number[n]) for n in names]))


@pytest.mark.parametrize("layout", ["A", "B"])
def test_every_user_gets_a_full_page_without_a_repeat_of_valid_keywords(made, layout):
    store = open_store(Sources(layout=layout, **made))
    for user in [*store.shop.user_ids, None, "nobody"]:
        found = page(store.front, store.known.context(user), store.layout)
        items = found.items()
        assert len(items) == len(set(items.tolist())) > 0
        document = page_json(found, store.shop.catalogue.ids, store.shop.catalogue.title)
        assert check(document, PAGE) == []
        for row in found.rows:
            assert all(k.text in store.front.corpus.number and k.matches > 0 for k in row.keywords)
        if layout == "B" and user in store.known.number:
            assert not np.isin(items, store.known.context(user).item).any()


def test_template_titles_pass_the_gates(made):
    store = open_store(Sources(**made))
    blocked = total = 0
    for user in store.shop.user_ids:
        context = store.known.context(user)
        found = page(store.front, context, store.layout)
        texts = [d for d in found.decisions if d.level == "text"]
        total += len(texts)
        blocked += sum(d.action != "pass" for d in texts)
    assert total and blocked <= 0.01 * total


def test_a_writer_answers_many_contexts_as_it_answers_one(made):
    store = open_store(Sources(**made))
    writer, wanted = store.front.writer, ["browse"] * 3
    people = [store.known.context(user) for user in [*store.shop.user_ids[:8], None]]
    together = writer.themes(people, [wanted] * 9, [[]] * 9)
    alone = [writer.themes([person], [wanted], [[]])[0] for person in people]
    assert together == alone and all(together)
    themes = [answers[0].value for answers in together]
    offered = [prune(store.front.corpus, theme) for theme in themes]
    each = zip(themes, people, offered, strict=True)
    assert writer.keywords(themes, people, offered) == [
        writer.keywords([theme], [person], [numbers])[0] for theme, person, numbers in each
    ]


def test_exploring_writes_propensities_below_one_and_taking_the_best_writes_one(made):
    store = open_store(Sources(**made))
    context = store.known.context(store.shop.user_ids[0])
    best, drawn = (page(store.front, context, store.layout, 1, tau) for tau in (0.0, 1.0))
    assert all((row.propensity == 1).all() for row in best.rows)
    chances = np.concatenate([row.propensity for row in drawn.rows if row.source == "generated"])
    assert ((chances > 0) & (chances <= 1)).all() and (chances < 1).any()


def test_a_category_within_a_title_is_written_as_in_a_sentence():
    form = ("Try {a} and {b}",)
    assert row_title(form, 0, "Beauty", "Toys & Games") == "Try beauty and toys & games"
    assert row_title(form, 0, "LEGO Sets", "iPad cases") == "Try LEGO sets and iPad cases"


class Writes:
    """A writer that always offers one theme with these keywords."""

    name = "one/1"

    def __init__(self, theme, *names):
        self.theme, self.names = theme, names

    def themes(self, contexts, intents, used):
        return [[Answer(self.theme)]]

    def keywords(self, themes, contexts, offered, m=8):
        words = [Keyword(name, "category", -0.1 * k, 2) for k, name in enumerate(self.names)]
        return [Answer(words) for _ in themes]


SHORT = Layout("short", (Placement("p", "discover", 5, min_items=2),))


def short_page(*names, **policy):
    """u1 bought g05, one of two coffees, so that a row of new coffee is too short."""
    theme = Theme("Coffee break", "discover", ("Coffee",), source="one/1")
    known = known_words(["coffee break"])
    rules = policy_of({"min_items": 2} | policy)
    made = front(Writes(theme, *names), policy=rules, known=known)
    return page(made, u1(), SHORT)


def test_a_short_row_takes_the_category_above_and_names_it():
    found = short_page("Coffee")
    (row,) = found.rows
    assert row.source == "generated" and set(row.item.tolist()) == {5, 6}
    assert [keyword.text for keyword in row.keywords] == ["Coffee", "Drinks"]
    document = page_json(found, catalogue().ids, catalogue().title)
    assert check(document, PAGE) == []
    said = {item["id"]: item["keyword"] for item in document["placements"][0]["items"]}
    assert said == {"g06": "Coffee", "g07": "Drinks"}


def test_a_short_row_takes_no_category_that_the_policy_keeps_out():
    """Neither the one above nor any that is near; then the row is static."""
    for row in short_page("Coffee", restricted=["drinks", "tea"]).rows:
        assert 6 not in row.item or row.source == "static"
        assert "Drinks" not in [keyword.text for keyword in row.keywords]


def test_a_writer_s_keyword_names_no_restricted_category():
    found = short_page("Coffee", "Milk", restricted=["milk"])
    assert any(d.rule == "restricted" and d.level == "keyword" for d in found.decisions)
    assert all("Milk" not in [k.text for k in row.keywords] for row in found.rows)


def test_with_explore_all_a_row_to_buy_again_is_drawn_by_its_logits():
    """Every draw has the chance that the softmax over what is left gives it."""
    plain = page(front(), u1(), TINY, 5, 1.0).rows[0]
    assert plain.propensity.tolist() == [1.0] * 3
    logit = front().ranker(u1())
    firsts = set()
    for seed in range(20):
        row = page(front(), u1(), TINY, seed, 1.0, explore_all=True).rows[0]
        left = u1().item.tolist()
        for item, chance in zip(row.item.tolist(), row.propensity.tolist(), strict=True):
            weight = np.exp(logit[left])
            assert chance == pytest.approx(weight[left.index(item)] / weight.sum())
            left.remove(item)
        firsts.add(int(row.item[0]))
        assert row.parts.sum(1) == pytest.approx(row.score)
    assert len(firsts) > 1
    same = page(front(), u1(), TINY, 5, 0.0, explore_all=True).rows[0]
    assert same.item.tolist() == golden_page().rows[0].item.tolist()


def test_themes_are_drawn_as_often_as_they_say(made):
    """Shares over many seeds are the propensities; later rows clash with none above."""
    store = open_store(Sources(**made))
    context = next(c for u in store.shop.user_ids if len((c := store.known.context(u)).item) > 25)
    layout, seeds = Layout("two", default_layout("B").placements[:2]), 300
    written, _ = written_ahead(store.front, context, layout)
    chance, seen = {}, Counter()
    for seed in range(seeds):
        found = page(store.front, context, layout, seed, 0.5, written=written, explore_themes=True)
        first, second = found.rows
        assert first.theme.title != second.theme.title
        assert chance.setdefault(first.theme.title, first.theme_propensity) == pytest.approx(
            first.theme_propensity
        )
        seen[first.theme.title] += 1
        assert found.page["explore_themes"] is True
    assert len(chance) > 1 and sum(chance.values()) <= 1 + 1e-9
    for title, p in chance.items():
        assert abs(seen[title] / seeds - p) < 4 * np.sqrt(p * (1 - p) / seeds) + 1e-9
    best = page(store.front, context, layout, written=written)
    assert {row.theme_propensity for row in best.rows} == {1.0}
    document = page_json(found, store.front.catalogue.ids, store.front.catalogue.title)
    assert check(document, PAGE) == [] and document["placements"][0]["propensity"] < 1


def test_without_explore_all_themes_are_drawn_and_given_rows_are_not(made):
    """Bought before, editorial and static rows are the best ones whatever is drawn beside them."""
    store = open_store(Sources(**made))
    front = replace(store.front, best=store.front.best[:1])
    context = next(c for u in store.shop.user_ids if len((c := store.known.context(u)).item) > 25)
    rows = (Placement("again", "restock", 4), Placement("one", "browse", 6, 6),
            Placement("own", "editorial", 4, categories=(store.front.best[0],)),
            *(Placement(f"more{n}", "browse", 6, 6) for n in range(4)))  # fmt: skip
    layout = Layout("mixed", rows)
    written = written_ahead(front, context, layout)[0][:3]
    best, drawn_themes, drawn_items, given = page(front, context, layout, written=written), 0, 0, 0
    for seed in range(40):
        found = page(front, context, layout, seed, 0.5, written=written, explore_themes=True)
        for row in found.rows:
            if row.source == "generated":
                drawn_themes += row.theme_propensity < 1
                drawn_items += int((row.propensity < 1).sum())
                continue
            given += row.source == "static" and row.placement.intent == "browse"
            assert row.theme_propensity == 1.0 and set(row.propensity.tolist()) == {1.0}
            assert row.score.tolist() == sorted(row.score.tolist(), reverse=True)
        for at in (0, 2):
            assert found.rows[at].item.tolist() == best.rows[at].item.tolist()
    assert drawn_themes > 20 and drawn_items > 100 and given > 20
    more = [page(front, context, layout, seed, 0.5, written=written, explore_all=True)
            for seed in range(20)]  # fmt: skip
    assert all({row.theme_propensity for row in one.rows} == {1.0} for one in more)
    assert len({tuple(one.rows[2].item.tolist()) for one in more}) > 1


def test_a_theme_s_best_row_is_made_once_whether_it_is_looked_at_drawn_or_shown(made, monkeypatch):
    store, asked = open_store(Sources(**made)), Counter()
    real = choose.best_row

    def counted(making, position, offer):
        asked[position, offer.theme.title] += 1
        return real(making, position, offer)

    monkeypatch.setattr(choose, "best_row", counted)
    context = store.known.context(store.shop.user_ids[0])
    for themes in (True, False):
        asked.clear()
        page(store.front, context, store.layout, 3, 0.5, explore_themes=themes)
        assert asked and set(asked.values()) == {1}


def test_a_drawn_row_is_shown_wherever_its_best_row_is(made):
    """Else the chance of what is shown would hang on what its draws would have been."""
    store = open_store(Sources(**made))
    for user in store.shop.user_ids[:10]:
        context = store.known.context(user)
        best, drawn = (page(store.front, context, store.layout, 1, tau) for tau in (0.0, 5.0))
        assert [r.source for r in best.rows][:2] == [r.source for r in drawn.rows][:2]


def test_what_is_drawn_needs_a_temperature():
    for endless in (np.inf, np.nan):
        with pytest.raises(PageLLMError, match="explore"):
            show.Config(explore=endless)
        with pytest.raises(PageLLMError, match="patience"):
            show.Config(patience=endless)
    with pytest.raises(PageLLMError, match="explore"):
        show.Config(explore_themes=True)
    with pytest.raises(PageLLMError, match="explore"):
        show.Config(explore=-1.0)


def test_held_out_rows_move_no_byte_of_the_build(made, tmp_path):
    """The same build from a shop whose validation and test rows are gone."""
    store = open_store(Sources(**made))
    config = build.Config(**made)
    train = store.orders.only("train")
    policy, stock = build.read_policy(""), store.front.stock
    whole, _ = build.built(config, store.shop, train, policy, stock)
    keep = store.shop.rows("train", None)
    names = ("user", "item", "rating", "time", "positive", "split")
    less = replace(store.shop, **{name: getattr(store.shop, name)[keep] for name in names})
    part, _ = build.built(config, less, train, policy, stock)
    assert str(whole) == str(part)
    for name in ("households", "factors", "vector"):
        assert whole[name].numpy().tobytes() == part[name].numpy().tobytes()


def test_the_table_has_a_row_for_every_baseline_and_the_ceiling_is_flat(made, capsys):
    results = evaluate.run(evaluate.Config(n_boot=20, **made))
    assert set(results) == {
        "storefront", "static", "static popular", "own popular", "own ranked", "flat", "popularity"
    }  # fmt: skip
    assert all(0 <= scores["recall"]["mean"] <= 1 for scores in results.values())
    said = capsys.readouterr().out
    assert "price of theming" in said and "own page better than that of somebody as active" in said
    folder = Path(made["runs"]) / "synthetic/storefront/evaluate"
    about = read_json(folder / "metrics.json")["about"]
    assert 0.5 < about["personal"] <= 1 and 0 < about["keyword_fit"] <= 1
    assert 0 <= about["overlap"] <= 0.6 and about["density"] >= 1
    looks = pq.read_table(folder / "decisions.parquet")
    assert looks.column_names == [
        "page_id", "stage", "level", "rule", "action", "value", "threshold", "version",
    ]  # fmt: skip
    assert {"text", "theme", "keyword", "placement", "page"} <= set(looks["level"].to_pylist())


def test_pages_are_read_by_the_code_that_scores_all_pages(made):
    from pagellm.data.shop import load
    from pagellm.pages.ranked import read_pages

    shop = load(f"{made['data']}/synthetic")
    ranked = read_pages(f"{made['runs']}/synthetic/storefront/evaluate/pages.parquet", shop)
    assert (ranked.slots <= 60).all() and (ranked.slots > 50).all()


def test_a_run_says_how_to_make_what_is_missing(tmp_path, made):
    with pytest.raises(PageLLMError, match="make storefront-build DATASET=synthetic"):
        open_store(Sources(**made | {"runs": str(tmp_path)}))
    with pytest.raises(PageLLMError, match="no layout nowhere.json"):
        open_store(Sources(**made, layout="nowhere.json"))


def test_weights_of_another_build_are_used_and_said(made, tmp_path, capsys):
    for name in ("build", "tune"):
        source = Path(made["runs"]) / "synthetic/storefront" / name
        shutil.copytree(source, tmp_path / "synthetic/storefront" / name)
    options, said = made | {"runs": str(tmp_path)}, "were chosen for another build"
    first = open_store(Sources(**options)).front
    assert said not in capsys.readouterr().err
    path = tmp_path / "synthetic/storefront/tune/config.json"
    about = read_json(path)
    about["inputs"]["build"] = "0" * 16
    path.write_text(json.dumps(about))
    again = open_store(Sources(**options)).front
    assert said in capsys.readouterr().err
    assert (again.weights, again.platt) == (first.weights, first.platt)


def test_the_command_shows_pages(made, capsys):
    storefront.run(storefront.Config(steps="page", **made))
    shown = capsys.readouterr().out
    assert shown.count("layout B") == 4 and "user unknown" in shown
    storefront.run(storefront.Config(steps="page", user="nobody", json=True, **made))
    out = capsys.readouterr()
    assert out.out.startswith("{") and "is unknown" in out.err


def test_the_default_layouts():
    assert [p.intent for p in default_layout("A").placements] == ["restock", *["browse"] * 5]
    assert {p.intent for p in default_layout("B").placements} == {"discover"}
