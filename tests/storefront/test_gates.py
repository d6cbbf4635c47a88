"""What is blocked and what passes; bounds, thresholds, and the switch for generated rows."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm.stage.config import PageLLMError
from pagellm.storefront.build import read_policy
from pagellm.storefront.corpus import build_corpus
from pagellm.storefront.gates import (
    KillSwitch,
    blocked,
    check_keywords,
    check_page,
    check_placement,
    check_text,
    check_theme,
    choose_threshold,
    clopper_pearson,
    jaccard,
    kappa,
    known_words,
)
from pagellm.storefront.parts import Keyword, Placement, Row, Theme
from pagellm.storefront.policy import policy_of
from pagellm.storefront.text import stems
from tests.storefront.golden import STOCK, catalogue
from tests.storefront.test_retrieve import u1

HERE = Path(__file__).parent
POLICY = policy_of()
KNOWN = known_words((HERE / "grocery_words.txt").read_text().split())


def titles(half):
    with open(HERE / "gates.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["half"] == half]


def verdict(title, **more):
    return blocked(check_text(title, "", POLICY, KNOWN, **more))


@pytest.mark.parametrize("half", ["open", "held"])
def test_bad_titles_are_caught_and_good_ones_pass(half):
    """The rules were made while looking at the open half alone."""
    rows = titles(half)
    good, bad = (
        [r["title"] for r in rows if (r["kind"] == "good") == flag] for flag in (True, False)
    )
    assert len(good) == len(bad) == 100
    assert sum(map(verdict, bad)) >= 95
    assert sum(map(verdict, good)) <= 2


@pytest.mark.parametrize(
    "title", ["Scunthorpe fudge", "Dick's pickles", "Cocktail mixers", "Sea bass", "Dog treats"]
)
def test_words_are_matched_whole(title):
    assert not verdict(title)


def test_sugar_free_is_no_price():
    assert not verdict("Sugar free candy") and verdict("Free candy")


def test_a_title_that_repeats_the_prompt_is_seen():
    prompt = "Write a title for a row of milk and fresh bread for breakfast."
    assert not verdict("Milk and fresh bread")
    assert verdict("Milk and fresh bread", prompt=prompt)
    assert not verdict("Morning bread and butter", prompt=prompt)


@given(st.text(max_size=60))
def test_whatever_passes_is_short_plain_text(title):
    if not verdict(title):
        assert 3 <= len(title) <= 40
        assert all(char.isalnum() or char in " &',-" for char in title)


@given(st.sampled_from(titles("open")), st.sampled_from(["milk", "tea", "snacks", "bread"]))
def test_a_stricter_policy_never_lets_more_through(row, word):
    stricter = policy_of({"banned": [word]})
    if not blocked(check_text(row["title"], "", stricter, KNOWN)):
        assert not verdict(row["title"])


def test_a_policy_that_cannot_be_read_is_told_field_by_field():
    with pytest.raises(PageLLMError, match=r"sponsored_share: 2 is above 1"):
        policy_of({"sponsored_share": 2})
    with pytest.raises(PageLLMError, match="holds no word"):
        policy_of({"banned": ["!!"]})
    with pytest.raises(PageLLMError, match="want dates like"):
        season = {"name": "May", "from": "soon", "to": "later", "categories": ["a"]}
        policy_of({"calendar": [season]})


LISTS = ("banned", "claims", "sensitive", "instructions", "restricted")


@pytest.mark.parametrize("field", [*LISTS, "calendar"])
def test_an_empty_list_of_a_policy_is_refused_since_it_takes_nothing_away(field):
    with pytest.raises(PageLLMError, match=f"{field}: the list is empty.* leave {field} out"):
        policy_of({field: []})


@pytest.mark.parametrize(
    "term",
    [
        r"\bscam\b", r"sc\d+m", "scam.*", "^scam", "scam$", "*scam", "(?i)scam", "scam|fraud",
        "(scam|fraud)s?", "colou?r", "(very )+good", "a+?", "sc[a4]m", "[Ss]cam", "[a-z]+", "[a-z",
        "x{2,}", "scam\\",
    ],
)  # fmt: skip
def test_a_regular_expression_is_no_term(term):
    for field in LISTS:
        with pytest.raises(PageLLMError) as said:
            policy_of({field: ["milk", term]})
        assert f"{field}[1]: {term!r} is a regular expression" in str(said.value)
        assert "write plain words" in str(said.value)


@pytest.mark.parametrize(
    "term",
    [
        "Beer & wine (0.5 l), 3+", "treat*", "Beer (0.5 l)*", "C++", "18+", "US$", "Milk | cream",
        "Eggs [6-pack]", "[2-3 l] milk", "Ready to eat?", "Dr. Oetker", "50% off", "#1", "A/B",
        "M*A*S*H", "world's best", "a.b@c", "f*ck", "(unclosed", "+18", "5 ^ 2", "Wein & Sekt",
    ],
)  # fmt: skip
def test_signs_alone_make_no_regular_expression(term):
    for field in LISTS:
        assert getattr(policy_of({field: [term]}), field).found(f"{term} and more")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"banned": []}', "banned: the list is empty"),
        ('{"banned": ["sc.*m"]}', "banned[0]: 'sc.*m' is a regular expression"),
        ('{"banned": ["a"], "banned": ["b"]}', "'banned' is there twice"),
        ('{"sponsored_share": NaN}', "NaN is no number"),
        ('{"caps": {"Milk": -1}}', "cap of 'Milk'"),
    ],
)
def test_a_policy_file_is_named_with_what_is_wrong_in_it(text, words, tmp_path):
    path = tmp_path / "policy.json"
    path.write_text(text)
    with pytest.raises(PageLLMError) as said:
        read_policy(str(path))
    assert str(said.value).startswith(str(path)) and words in str(said.value)


@pytest.mark.parametrize(
    ("titles", "words"),
    [
        ({"browse": "{A} and more"}, "want a list of one text or more"),
        ({"browse": []}, "want a list of one text or more"),
        ({"browse": ["{C} and more"]}, "want at most 80 characters, and in braces"),
        ({"browse": ["{A.__class__}"]}, "in braces"),
        ({"browse": ["{A} and {"]}, "in braces"),
        ({"hero": ["{A}"]}, "want one of restock, browse"),
        ({"browse": ["Cheap {a}"]}, "blocks its own form 'Cheap {a}' of 'browse' by 'cheap'"),
    ],
)
def test_forms_that_no_row_could_be_named_by_are_refused(titles, words):
    with pytest.raises(PageLLMError, match=re.escape(words)):
        policy_of({"titles": titles})
    assert policy_of({"titles": {"browse": ["{A} for {season}"]}}).titles


def test_likeness_of_titles_and_of_keyword_sets():
    a, b = (frozenset(stems(t)) for t in ("Easy weekday breakfasts", "Quick weekday breakfast"))
    assert jaccard(a, b) == 0.5
    a, b = (
        frozenset(("Plant milk", "Granola", "Cereal")),
        frozenset(("Granola", "Cereal", "Coffee", "Bread")),
    )
    assert jaccard(a, b) == pytest.approx(0.4)


def test_a_theme_like_one_above_or_of_a_restricted_category_is_replaced():
    corpus = build_corpus(catalogue(), STOCK)
    one = Theme("Breakfast", "browse", ("Granola", "Cereal"))
    same = Theme("Mornings", "browse", ("Granola", "Cereal"))
    assert not blocked(check_theme(one, [], corpus, POLICY))
    assert blocked(check_theme(same, [one], corpus, POLICY))
    wine = Theme("Dinner", "browse", ("Domestic wine",))
    assert blocked(check_theme(wine, [], corpus, POLICY))
    assert not blocked(
        check_theme(Theme("Dinner", "editorial", ("Domestic wine",)), [], corpus, POLICY)
    )


def test_keywords_that_find_little_or_the_same_again_go():
    corpus = build_corpus(catalogue(), STOCK)
    offered = [Keyword(text, "category", 1.0, 1) for text in ("Dairy", "Milk", "no such", "Drinks")]
    stay, decisions = check_keywords(offered, corpus, u1(), 4, POLICY)
    assert [k.text for k in stay] == ["Dairy", "Milk", "Drinks"]
    assert [d.rule for d in decisions if d.action != "pass"] == ["corpus"]
    stay, _ = check_keywords(offered[1:2], corpus, u1(), 4, POLICY)
    assert stay == []  # one item, where a row wants four


def test_a_row_needs_items_and_agreement():
    row = Placement("p", "browse", 10)
    assert not blocked(check_placement(np.full(5, 0.9), row, 0.6))
    assert blocked(check_placement(np.full(3, 0.9), row, 0.6))
    assert blocked(check_placement(np.array([0.9, 0.9, 0.9, 0.4, 0.4]), row, 0.6))


def row_of(items, title):
    n = len(items)
    placement = Placement(title, "browse", n)
    return Row(placement, "generated", Theme(title, "browse", ()), (), np.array(items), np.zeros(n),
               np.zeros((n, 4)), (-1,) * n, np.ones(n))  # fmt: skip


def test_a_page_holds_nothing_twice_and_not_one_kind_alone():
    categories = catalogue().categories
    assert not blocked(check_page([row_of([0, 4], "a"), row_of([7, 9], "b")], categories))
    assert blocked(check_page([row_of([0, 4], "a"), row_of([4, 9], "b")], categories))
    assert blocked(check_page([row_of([0], "a"), row_of([4], "a")], categories))


@pytest.mark.parametrize(
    "k, n, side, wanted",
    [
        (59, 59, "lower", 0.9505), (95, 100, "lower", 0.8977), (190, 200, "lower", 0.9167),
        (196, 200, "lower", 0.9548), (475, 500, "lower", 0.9309), (299, 299, "lower", 0.9900),
        (0, 10, "lower", 0.0), (0, 59, "upper", 0.0495), (2, 200, "upper", 0.0311),
        (3, 300, "upper", 0.0256),
        (160, 200, "upper", 0.8454), (170, 200, "upper", 0.8899),
    ],
)  # fmt: skip
def test_clopper_pearson_bounds(k, n, side, wanted):
    assert clopper_pearson(k, n, side=side) == pytest.approx(wanted, abs=5e-5)


@given(st.integers(1, 60), st.data())
def test_a_bound_lies_on_its_side_and_one_more_success_raises_it(n, data):
    k = data.draw(st.integers(0, n - 1))
    assert clopper_pearson(k, n) <= k / n <= clopper_pearson(k, n, side="upper")
    assert clopper_pearson(k, n) < clopper_pearson(k + 1, n)


def test_wrong_counts_have_no_bound():
    for k, n in ((-1, 3), (4, 3), (0, 0)):
        with pytest.raises(ValueError):
            clopper_pearson(k, n)


def test_thresholds_worked_out_by_hand():
    score = [
        0.95,
        0.93,
        0.90,
        0.88,
        0.85,
        0.80,
        0.75,
        0.70,
        0.60,
        0.55,
        0.50,
        0.40,
        0.30,
        0.20,
        0.10,
    ]
    fits = [1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 0, 1, 0, 0, 0]
    low = choose_threshold(score, fits, 0.60)
    assert (low.value, low.blocked) == (0.55, pytest.approx(0.1))
    assert low.bound == pytest.approx(0.6058, abs=5e-5) and low.coverage == pytest.approx(2 / 3)
    high = choose_threshold(score, fits, 0.68)
    assert (high.value, high.blocked) == (0.70, pytest.approx(0.2))
    assert high.bound == pytest.approx(0.6877, abs=5e-5)
    assert choose_threshold(score, fits, 0.70) is None


def test_kappa_of_two_raters():
    assert kappa([[40, 10], [5, 45]]) == pytest.approx(0.7)


def test_the_switch_turns_off_and_stays_off_until_a_person_removes_the_file(tmp_path):
    now = [0.0]
    switch = KillSwitch(tmp_path, usual=0.05, clock=lambda: now[0])
    for n in range(500):
        switch.note(n % 10 < 3)
    assert not switch.is_off()  # .30 is not above the limit
    for _ in range(500):
        switch.note(True)
    assert switch.is_off() and "were blocked" in (tmp_path / "off.json").read_text()
    again = KillSwitch(tmp_path, 0.05, clock=lambda: now[0])
    assert again.is_off()
    (tmp_path / "off.json").unlink()
    now[0] = 3.0
    assert not again.is_off()
    (tmp_path / "off").touch()
    assert not again.is_off()
    now[0] = 6.0
    assert again.is_off()


def test_the_switch_reads_a_day_s_judgements(tmp_path):
    switch = KillSwitch(tmp_path, 0.05)
    switch.judge(170, 200)
    assert not switch.is_off()
    switch.judge(160, 200)
    assert (tmp_path / "off.json").exists()
