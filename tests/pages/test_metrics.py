"""Scores of pages: bounds, hand-made cases, and the batch equal to one user at a time."""

import math
import random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pagellm.pages import metrics
from pagellm.pages.metrics import (
    DIRECTION,
    balance,
    described,
    dpa,
    duplicate_rate,
    entropy,
    ild,
    ndcg,
    ndcg_bound,
    near_duplicate_pairs,
    paper_scale,
    pwkt,
    recall,
    redundancy,
    score_pages,
    unknown_rate,
    was,
    wmrd,
)
from pagellm.pages.stats import average_ranks
from pagellm.serving import exchange

law = settings(deadline=None, max_examples=80)
few = settings(deadline=None, max_examples=40)
ORDER = (was, pwkt, wmrd, dpa)

N = 12
item = st.integers(0, N - 1)
refs = st.lists(item, min_size=1, max_size=5, unique=True)
pages = st.lists(item, max_size=8)  # repeats allowed
clean = st.lists(item, min_size=1, max_size=8, unique=True)
names = st.frozensets(st.sampled_from("pqrs"), max_size=3)
known = st.frozensets(st.sampled_from("pqrs"), min_size=1, max_size=3)
catalogues = st.one_of(
    st.lists(names, min_size=N, max_size=N), st.lists(known, min_size=N, max_size=N)
)
cuts = st.one_of(st.none(), st.integers(1, 9))
modes = st.sampled_from(["worst", "append", "skip"])


# Cases by hand


@pytest.mark.parametrize(
    "ref, gen, want",
    [
        ("abc", "abc", (1, 1, 0, 1)),
        ("abc", "cba", (0.5307, -1, 1.4078, 0.5684)),
        ("abc", "baxyc", (0.7531, 0.1276, 1.2346, 0.4735)),
        ("abc", "xaybz", (0.5531, 1, 2.2346, 0.3492)),
        ("abc", "xy", (0, 0, 3, 0)),
        ("abc", "", (0, 0, 3, 0)),
        ("a", "xa", (0.5, None, 1, 0.5)),
        ("", "ab", (None, None, None, None)),
    ],
)
def test_golden_order_scores(ref, gen, want):
    for score, value in zip(ORDER, want, strict=True):
        got = score(ref, gen)
        assert got is None if value is None else abs(got - value) < 5e-5


@pytest.mark.parametrize(
    "kinds, want", [("xxyy", 0.6931), ("xxxy", 0.5623), ("wxyz", 1.3863), ("xxxx", 0.0)]
)
def test_golden_entropy(kinds, want):
    categories = {n: [kind] for n, kind in enumerate(kinds)}
    assert abs(entropy(range(4), categories) - want) < 5e-5
    assert abs(redundancy(range(4), categories, 4) - (1 - want / math.log(4))) < 5e-5


def test_recall_and_ndcg_by_hand():
    assert recall("abc", "xbya", 4) == pytest.approx(2 / 3)
    assert recall("abc", "xbya", 2) == pytest.approx(1 / 3)
    assert recall("abc", "xbya", 2, cap=True) == 1 / 2
    assert recall("abc", "bbaa", 2) == pytest.approx(2 / 3)  # repeats do not use up ranks
    ideal = 1 + 1 / math.log2(3) + 1 / 2
    assert ndcg("abc", "xbya", 4) == pytest.approx((1 / math.log2(3) + 1 / math.log2(5)) / ideal)
    assert ndcg("abc", "xbya", 2) == pytest.approx((1 / math.log2(3)) / (1 + 1 / math.log2(3)))
    graded = ndcg("ab", "ba", rel=[2, 1])
    assert graded == pytest.approx((1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3)))
    assert ndcg("ab", "ab", rel=[0, 0]) is None


# Recall and NDCG


@law
@given(refs, pages, cuts, st.booleans())
def test_accuracy_is_between_none_and_all(ref, gen, k, cap):
    """0 and 1 exactly without a hit and with nothing but hits; undefined without labels."""
    r, n = recall(ref, gen, k, cap), ndcg(ref, gen, k)
    top = list(dict.fromkeys(gen))[:k]
    hits = set(top) & set(ref)
    assert 0 <= r <= 1 and 0 <= n <= 1 + 1e-12
    assert (r == 0) == (n == 0) == (not hits)
    possible = len(ref) if k is None or not cap else min(k, len(ref))
    assert (r == 1) == (len(hits) == possible)
    lead = len(ref) if k is None else min(k, len(ref))
    assert (abs(n - 1) < 1e-12) == (len(top[:lead]) == lead and set(top[:lead]) <= set(ref))
    assert recall([], gen, k) is None and ndcg([], gen, k) is None


@law
@given(refs, clean, cuts, st.data())
def test_moving_a_label_up_never_lowers_recall_or_ndcg(ref, gen, k, data):
    rel = data.draw(st.lists(st.integers(0, 3), min_size=len(ref), max_size=len(ref)))
    assume(any(rel))
    grade = dict(zip(ref, rel, strict=True))
    at = data.draw(st.integers(0, len(gen) - 1))
    to = data.draw(st.integers(0, at))
    # Past items of a lower grade only: passing a better label may well cost.
    assume(all(grade.get(other, 0) <= grade.get(gen[at], 0) for other in gen[to:at]))
    moved = gen[:at] + gen[at + 1 :]
    moved.insert(to, gen[at])
    assert recall(ref, moved, k) >= recall(ref, gen, k) or gen[at] not in ref
    assert ndcg(ref, moved, k, rel) >= ndcg(ref, gen, k, rel) - 1e-12


@law
@given(refs, pages, st.integers(1, 9))
def test_ndcg_stays_under_its_recall_bound(ref, gen, k):
    """Of lists with h hits in the first k, those with the hits in front have the highest NDCG."""
    hits = round(recall(ref, gen, k) * len(ref))
    best = sum(1 / math.log2(r + 1) for r in range(1, hits + 1))
    ideal = sum(1 / math.log2(r + 1) for r in range(1, min(k, len(ref)) + 1))
    assert ndcg(ref, gen, k) <= best / ideal + 1e-12


@few
@given(st.integers(1, 130), st.lists(st.integers(0, 199), min_size=1, max_size=110, unique=True))
def test_no_ndcg_is_above_its_recall_bound(n, gen):
    """NDCG@100 <= bound(Recall@20, Recall@40), for any list against the labels 0..n-1."""
    ref = list(range(n))
    bound = ndcg_bound([n], {k: np.array([recall(ref, gen, k)]) for k in (20, 40)})[0]
    assert ndcg(ref, gen, 100) <= bound + 1e-12


def test_the_bound_is_reached_by_hits_that_lead_each_band():
    wrong = iter(range(1000, 2000))
    gen = (
        [0, 1] + [next(wrong) for _ in range(18)] + [2] + [next(wrong) for _ in range(19)] + [3, 4]
    )
    ref = list(range(5))
    bound = ndcg_bound([5, 0], {k: np.array([recall(ref, gen, k), np.nan]) for k in (20, 40)})
    assert bound[0] == pytest.approx(ndcg(ref, gen, 100)) and np.isnan(bound[1])


@pytest.mark.slow
def test_recall_and_ndcg_equal_ranx(tmp_path, monkeypatch):
    """200 random lists, to 14 digits.

    ranx is an independent implementation. Its functions run uncompiled here: that takes seconds,
    their compilation a minute.
    """
    numba = pytest.importorskip("numba", reason="the dev extra is not installed")
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
    ranx = pytest.importorskip("ranx", reason="the dev extra is not installed")
    rng = np.random.default_rng(0)
    qrels, run, lists = {}, {}, {}
    for user in range(200):
        ref = rng.permutation(40)[: rng.integers(1, 8)].tolist()
        gen = rng.permutation(40)[: rng.integers(1, 30)].tolist()
        rel = rng.integers(1, 3, len(ref)).tolist()
        qrels[f"q{user}"] = {f"d{i}": r for i, r in zip(ref, rel, strict=True)}
        run[f"q{user}"] = {f"d{i}": float(100 - k) for k, i in enumerate(gen)}
        lists[f"q{user}"] = ref, gen, rel
    names = ["recall@5", "recall@20", "ndcg_burges@5", "ndcg_burges@20"]
    theirs = ranx.evaluate(
        ranx.Qrels(qrels), ranx.Run(run), names, return_mean=False, make_comparable=True
    )
    for at, user in enumerate(sorted(lists)):  # ranx sorts its queries by name
        ref, gen, rel = lists[user]
        ours = [
            recall(ref, gen, 5),
            recall(ref, gen, 20),
            ndcg(ref, gen, 5, rel),
            ndcg(ref, gen, 20, rel),
        ]
        assert ours == pytest.approx([theirs[name][at] for name in names], rel=1e-14)
    # The same through the files of `pagellm export --format ranx`, which has ranks only.
    files = exchange.write_ranx(tmp_path, qrels, {"run": run})
    again = ranx.evaluate(
        ranx.Qrels.from_file(str(files[0])),
        ranx.Run.from_file(str(files[1])),
        names,
        return_mean=False,
        make_comparable=True,
    )
    assert all((again[name] == theirs[name]).all() for name in names)


# Order scores


def slow(ref, gen, k, missing, real=None):
    """The definitions of was, pwkt, wmrd and dpa as plain loops; None where undefined."""
    gen = list(dict.fromkeys(gen))[:k]
    n, size = len(ref), len(gen)
    rank = dict(zip(ref, real or range(1, n + 1), strict=True))
    limit = max(size, n)
    kept = [i for i in ref if i in gen] if missing == "skip" else list(ref)
    if not kept:
        return None, None, None, None
    place = {i: gen.index(i) + 1 if i in gen else size + 1 for i in kept}
    mean = sum(1 / math.log2(1 + rank[i]) for i in kept) / len(kept)
    w = {i: 1 / math.log2(1 + rank[i]) / mean for i in kept}
    lost = {i for i in kept if i not in gen and missing == "worst"}
    shift = {i: limit if i in lost else abs(rank[i] - place[i]) for i in kept}
    a = sum(0 if i in lost else w[i] * max(0, 1 - shift[i] / limit) for i in kept) / len(kept)
    c = sum(w[i] * shift[i] for i in kept) / len(kept)
    d = sum(0 if i in lost else w[i] / (1 + math.log2(1 + shift[i])) for i in kept) / len(kept)
    top = bottom = 0.0
    for x, i in enumerate(kept):
        for j in kept[:x]:
            sign = (rank[i] - rank[j]) * (place[i] - place[j])
            top += w[i] * w[j] * ((sign > 0) - (sign < 0))
            bottom += w[i] * w[j]
    return a, (top / bottom if bottom else None), c, d


@law
@given(refs, pages, cuts, modes, st.data())
def test_order_scores_equal_the_definitions(ref, gen, k, missing, data):
    tied = data.draw(st.booleans())
    levels = data.draw(st.lists(st.integers(4, 5), min_size=len(ref), max_size=len(ref)))
    real = average_ranks(levels).tolist() if tied else None
    want = slow(ref, gen, k, missing, real)
    got = [score(ref, gen, k, missing, real) for score in ORDER]
    assert got == [None if value is None else pytest.approx(value, abs=1e-12) for value in want]


@law
@given(refs, pages, modes)
def test_order_scores_keep_their_bounds(ref, gen, missing):
    """WAS, DPA in [0, 1]; PWKT in [-1, 1]; WMRD in [0, S]; perfect if the page begins with ref."""
    size = len(set(gen))
    limit = max(size, len(ref))
    got = [score(ref, gen, missing=missing) for score in ORDER]
    assume(None not in (got[0], got[2], got[3]))
    assert 0 <= got[0] <= 1 and 0 <= got[3] <= 1 and 0 <= got[2] <= max(limit, size + 1)
    assert got[1] is None if len(ref) == 1 else got[1] is None or -1 <= got[1] <= 1
    relative = wmrd(ref, gen, missing=missing, normalize=True)
    assert relative == pytest.approx(got[2] / limit)
    if missing == "worst":
        perfect = list(dict.fromkeys(gen))[: len(ref)] == ref
        assert (got[0] == 1) == (got[2] == 0) == (got[3] == 1) == perfect
        in_order = [i for i in dict.fromkeys(gen) if i in ref] == [i for i in ref if i in gen]
        settled = in_order and [i in gen for i in ref] == sorted(
            [i in gen for i in ref], reverse=True
        )
        lost = sum(i not in gen for i in ref)
        if len(ref) > 1:  # in order, what is missing at the end and alone
            assert (got[1] == 1) == (settled and lost < 2)


@law
@given(refs, pages, cuts, modes, st.permutations(range(N)))
def test_scores_do_not_depend_on_names_or_repeats(ref, gen, k, missing, new):
    """Renamed items and a page without its repeats score the same."""
    for score in ORDER:
        want = score(ref, gen, k, missing)
        assert score([new[i] for i in ref], [new[i] for i in gen], k, missing) == want
        assert score(ref, list(dict.fromkeys(gen)), k, missing) == want
        assert score(ref, list(dict.fromkeys(gen))[:k], None, missing) == want


@law
@given(refs, clean)
def test_reversing_the_labels_turns_tau_around(ref, gen):
    """Without missing labels and with equal weights tau changes sign; if all labels tie it is 0."""
    assume(len(ref) > 1)
    whole = gen + [i for i in ref if i not in gen]
    got = pwkt(ref, whole, paper_scale=True)
    assert pwkt(ref[::-1], whole, paper_scale=True) == pytest.approx(-got)
    assert pwkt(ref, whole, ref_rank=[(len(ref) + 1) / 2] * len(ref)) == 0


def test_wrong_calls_raise():
    for score in ORDER:
        with pytest.raises(ValueError, match="missing"):
            score("ab", "ab", missing="best")
        with pytest.raises(ValueError, match="repeat"):
            score("aa", "ab")
        for ranks in ([1], [0, 1], [math.nan, 1]):
            with pytest.raises(ValueError, match="ref_rank"):
                score("ab", "ab", ref_rank=ranks)
        with pytest.raises(ValueError, match="k=0"):
            score("ab", "ab", 0)
    for rel in ([1], [1, -1], [1, math.nan]):
        with pytest.raises(ValueError, match="grades"):
            ndcg("ab", "ab", rel=rel)
    with pytest.raises(ValueError, match="repeat"):
        recall("aa", "ab")
    for both in ({}, {"categories": {}, "embedding": {}}):
        with pytest.raises(ValueError, match="one of them"):
            ild("ab", **both)


# ILD, entropy, redundancy


@law
@given(pages, catalogues, st.randoms())
def test_set_scores_ignore_order_and_repeats(gen, categories, random):
    shuffled = random.sample(gen, len(gen))
    clean_page = sorted(set(gen))
    for score in (ild, entropy, balance, redundancy, unknown_rate):
        value = score(gen, categories)
        for other in (shuffled, clean_page):
            assert score(other, categories) == (
                None if value is None else pytest.approx(value, abs=1e-12)
            )


@law
@given(clean, catalogues)
def test_set_scores_keep_their_bounds(gen, categories):
    """ILD is 1 only for disjoint sets, 0 only for equal known ones; H = 0 only for one category."""
    d, h, r = ild(gen, categories), entropy(gen, categories), redundancy(gen, categories)
    sets = [categories[i] for i in gen]
    if len(gen) < 2:
        assert d is None and r is None
    else:
        assert 0 <= d <= 1
        disjoint = all(not a & b for x, a in enumerate(sets) for b in sets[:x])
        assert (d == 1) == disjoint
        assert (d == 0) == (len(set(sets)) == 1 and sets[0] != frozenset())
    spread = frozenset().union(*sets) | ({None} if frozenset() in sets else set())
    assert 0 <= h <= math.log(len(spread)) + 1e-12
    assert (h < 1e-12) == (len(spread) == 1)
    everything = len(frozenset().union(*categories)) + (frozenset() in categories)
    assert (r is None) == (min(len(gen), everything) < 2)
    if r is not None:
        # 1 - (1 - b) rounds
        assert 0 <= r <= 1 and balance(gen, categories) == pytest.approx(1 - r, abs=1e-12)
        if all(len(s) <= 1 for s in sets):
            assert h <= math.log(min(len(gen), everything)) + 1e-12
            assert r == pytest.approx(1 - h / math.log(min(len(gen), everything)), abs=1e-12)


def test_set_scores_by_hand():
    categories = {"a": ("x", "y"), "b": ("y",), "c": (), "d": ()}
    assert ild("ab", categories) == pytest.approx(1 / 2)
    assert ild("abc", categories) == pytest.approx(1 - 0.5 / 3)
    assert ild("cd", categories) == 1 and unknown_rate("abcd", categories) == 1 / 2
    assert unknown_rate("", categories) is None
    # a gives half of its third to x and half to y
    p = np.array([1 / 6, 1 / 6 + 1 / 3, 1 / 3])
    assert entropy("abc", categories) == pytest.approx(-(p * np.log(p)).sum())
    assert entropy("cd", categories) == 0 and entropy("", categories) is None
    assert redundancy("cd", categories) == 1
    # three categories of two items: at the cap
    assert redundancy("ac", categories, n_categories=8) == 0
    assert (
        redundancy("bb", categories) is None
        and redundancy("bc", categories, n_categories=1) is None
    )
    assert redundancy("aa", {"a": "x"}) is None
    assert redundancy(range(4), "xyxy") == 0  # C = 2, K = 4
    third = entropy(range(3), "xyx") / math.log(3)
    assert redundancy(range(3), ["x", "y", "x", ()]) == pytest.approx(1 - third)


def test_categories_may_be_one_name_or_number():
    assert entropy([0, 1], ["shoes", "shoe"]) == pytest.approx(math.log(2))
    assert entropy([0, 1], np.array([3, 3])) == 0
    assert unknown_rate([0, 1, 2], ["", None, "x"]) == pytest.approx(2 / 3)
    assert unknown_rate("z", {"a": "x"}) == 1


def test_a_category_called_unknown_is_a_category():
    assert entropy([0, 1], [("unknown",), ()]) == pytest.approx(math.log(2))


@law
@given(clean, st.integers(0, 99))
def test_cosine_ild(gen, seed):
    """In [0, 2]; 0 for one direction; two opposite directions give 2; length does not matter."""
    e = np.random.default_rng(seed).integers(-2, 3, size=(N, 2)).astype(float)
    d = ild(gen, embedding=e)
    if len(gen) < 2:
        assert d is None
        return
    assert -1e-12 <= d <= 2 + 1e-12
    assert ild(gen, embedding=7 * e) == pytest.approx(d)
    assert ild(gen, embedding=np.tile([[1.0, 2.0]], (N, 1))) == pytest.approx(0, abs=1e-12)
    assert ild("ab", embedding={"a": [1.0, 0], "b": [-3.0, 0]}) == pytest.approx(2)
    assert ild("ab", embedding={"a": [1.0, 0], "b": [0.0, 0]}) == 1


def test_duplicates_by_hand():
    assert (
        duplicate_rate("abca") == 1 / 4
        and duplicate_rate("abc") == 0
        and duplicate_rate("") is None
    )
    group = {"a": 1, "b": 1, "c": 1, "d": 2, "e": None, "f": None}
    assert (
        near_duplicate_pairs("aabcdef", group) == 3
        and near_duplicate_pairs([0, 1, 2], [5, 6, 5]) == 1
    )
    assert near_duplicate_pairs("xyz", group) == 0


# All users at once


@st.composite
def populations(draw):
    """users, pages and labels; user ids with gaps; some users without labels or without a page."""
    users = np.array(sorted(draw(st.sets(st.integers(0, 30), min_size=1, max_size=4))))
    everyone = [*users.tolist(), 31]  # 31 is nobody's business
    gen = {u: draw(st.lists(item, max_size=10)) for u in everyone}
    ref = {u: draw(st.lists(item, max_size=5, unique=True)) for u in everyone}
    tied = draw(st.booleans())
    rel = {
        u: draw(st.lists(st.integers(0, 3), min_size=len(ref[u]), max_size=len(ref[u])))
        for u in everyone
    }
    rank = {
        u: average_ranks(rel[u]).tolist() if tied else list(range(1, len(ref[u]) + 1))
        for u in everyone
    }
    return users, gen, ref, rank, rel


def columns(table, *more):
    """{user: [..]} -> user column and the values, one after another."""
    user = np.array([u for u, values in table.items() for _ in values], dtype=np.int64)
    return user, *(np.array([x for u in table for x in part[u]]) for part in (table, *more))


@law
@given(
    populations(),
    catalogues,
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
    modes,
    st.randoms(),
)
def test_score_pages_equals_the_one_user_functions(
    population, categories, page_k, k, flag, missing, random
):
    check_agreement(population, categories, page_k, k, flag, missing, random)


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("missing", ["worst", "append", "skip"])
def test_score_pages_equals_the_one_user_functions_on_many_users(flag, missing):
    """Enough users for every case: ties, repeats, equal and disjoint category sets, short pages."""
    rng = np.random.default_rng(1)
    everyone = range(0, 200, 2)
    gen = {u: rng.integers(0, N, rng.integers(0, 11)).tolist() for u in everyone}
    ref = {u: rng.permutation(N)[: rng.integers(0, 6)].tolist() for u in everyone}
    rel = {u: rng.integers(0, 4, len(ref[u])).tolist() for u in everyone}
    rank = {u: average_ranks(rel[u]).tolist() for u in everyone}
    categories = [
        tuple(rng.permutation(list("pqr"))[: rng.integers(not flag, 3)]) for _ in range(N)
    ]
    users = np.array(list(everyone))[10:]
    check_agreement((users, gen, ref, rank, rel), categories, 6, 4, flag, missing, random.Random(0))


def check_agreement(population, categories, page_k, k, flag, missing, random):
    users, gen, ref, rank, rel = population
    place = {u: range(1, len(gen[u]) + 1) for u in gen}
    user, shown, at = columns(gen, place)
    labelled, label, label_rank, grade = columns(ref, rank, rel)
    # rows come in any order
    order = np.array(random.sample(range(len(user)), len(user)), dtype=int)
    back = np.array(random.sample(range(len(label)), len(label)), dtype=int)
    group = np.arange(N) // 3
    embedding = np.random.default_rng(page_k).integers(-1, 2, size=(N, 2))
    n_categories = 3 if flag else None
    got = score_pages(
        users,
        (user[order], at[order], shown[order].astype(int)),
        (labelled[back], label[back].astype(int), label_rank[back]),
        categories,
        page_k=page_k,
        recall_k=(k, 20),
        ndcg_k=k,
        cap=flag,
        rel=grade[back] if flag else None,
        missing=missing,
        normalize=flag,
        n_categories=n_categories,
        group=group,
        embedding=embedding,
    )
    for x, u in enumerate(users.tolist()):
        page = gen[u][:page_k]
        options = {"missing": missing, "ref_rank": rank[u]}
        want = {
            f"Recall@{k}": recall(ref[u], gen[u], k, flag),
            "Recall@20": recall(ref[u], gen[u], 20, flag),
            f"NDCG@{k}": ndcg(ref[u], gen[u], k, rel[u] if flag else None),
            "WAS": was(ref[u], page, **options),
            "PWKT": pwkt(ref[u], page, **options),
            "WMRD": wmrd(ref[u], page, normalize=flag, **options),
            "DPA": dpa(ref[u], page, **options),
            "ILD": ild(page, categories),
            "ILD_cosine": ild(page, embedding=embedding),
            "entropy": entropy(page, categories),
            "balance": balance(page, categories, n_categories),
            "redundancy": redundancy(page, categories, n_categories),
            "duplicate_rate": duplicate_rate(page),
            "unknown_rate": unknown_rate(page, categories),
            "near_duplicate_pairs": near_duplicate_pairs(page, group),
        }
        assert set(got) == set(want)
        for name, value in want.items():
            assert got[name].shape == users.shape and got[name].dtype == np.float64
            if value is None:
                assert math.isnan(got[name][x]), (name, got[name][x])
            else:
                assert abs(got[name][x] - value) <= 1e-12, (name, got[name][x], value)


def test_score_pages_defaults_and_mappings():
    """Page of 20, Recall@20 and 40, NDCG@100; items outside a mapping have no category."""
    users = np.array([3, 8])
    pages = np.array([3] * 60), np.arange(1, 61), np.arange(100, 160)
    refs = np.array([3, 3, 3]), np.array([120, 119, 159]), np.array([1, 2, 3])
    got = score_pages(
        users, pages, refs, {119: ["x"], 7: ["y"]}, group=np.arange(200), embedding=np.eye(200)
    )
    assert set(got) == set(DIRECTION) and set(DIRECTION.values()) == {"up", "down"}
    assert got["Recall@20"][0] == pytest.approx(1 / 3) and got["Recall@40"][0] == pytest.approx(
        2 / 3
    )
    assert got["NDCG@100"][0] == pytest.approx(ndcg([120, 119, 159], list(range(100, 160))))
    assert got["unknown_rate"][0] == pytest.approx(19 / 20)
    page = list(range(100, 120))
    assert got["WMRD"][0] == pytest.approx(wmrd([120, 119, 159], page))
    assert got["redundancy"][0] == pytest.approx(redundancy(page, {119: ["x"], 7: ["y"]}))
    for name, values in got.items():
        assert math.isnan(values[1]) or name == "near_duplicate_pairs"  # user 8: no page, no labels


def test_score_pages_cuts_its_blocks(monkeypatch):
    """Users are processed in blocks, whose size changes no score."""
    rng = np.random.default_rng(0)
    users, lists = np.arange(30), [rng.permutation(N)[:6] for _ in range(30)]
    pages = np.repeat(users, 6), np.tile(np.arange(1, 7), 30), np.concatenate(lists)
    labels = np.concatenate([rng.permutation(N)[:2] for _ in users])
    refs = np.repeat(users, 2), labels, np.tile([1, 2], 30)
    categories = [("p", "q")[: i % 3] for i in range(N)]
    whole = score_pages(users, pages, refs, categories)
    monkeypatch.setattr(metrics, "BLOCK", 80)
    for name, values in score_pages(users, pages, refs, categories).items():
        np.testing.assert_array_equal(values, whole[name])


def test_score_pages_takes_any_item_numbers_and_categories_described_before():
    """Item numbers of 18 digits, and the same scores from what `described` made once."""
    users = np.arange(6)
    rng = np.random.default_rng(0)
    item = np.stack([rng.permutation(30)[:9] for _ in users])
    item[2, 4] = item[2, 1]
    refs = (
        np.repeat(users, 2),
        np.stack([rng.permutation(30)[:2] for _ in users]).reshape(-1),
        np.tile([1, 2], 6),
    )
    pages = np.repeat(users, 9), np.tile(np.arange(9), 6), item.reshape(-1)
    categories = [("a", "b")[: n % 3] for n in range(30)]
    want = score_pages(users, pages, refs, categories)
    far = {10**17 * n: names for n, names in enumerate(categories)}
    for got in (
        score_pages(
            users, (*pages[:2], pages[2] * 10**17), (refs[0], refs[1] * 10**17, refs[2]), far
        ),
        score_pages(users, pages, refs, described(categories)),
    ):
        for name in want:
            np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_score_pages_refuses():
    page = refs_ = (np.array([0]), np.array([1]), np.array([1]))
    ok = (np.array([0]), page, refs_, [(), ()])
    score_pages(*ok)
    twice = tuple(np.tile(column, 2) for column in refs_)
    for wrong in (
        ([1, 0], page, refs_),
        ([0, 0], page, refs_),
        ([], page, refs_),
        ([0], page, twice),
        ([0], page, (np.array([0]), np.array([1]), np.array([0.5]))),
    ):
        with pytest.raises(ValueError, match="score_pages"):
            score_pages(np.array(wrong[0]), *wrong[1:], [(), ()])
    for option in (
        {"missing": "best"},
        {"page_k": 0},
        {"recall_k": (0,)},
        {"ndcg_k": 0},
        {"rel": np.array([-1.0])},
        {"rel": np.array([1.0, 1.0])},
    ):
        with pytest.raises(ValueError, match="score_pages"):
            score_pages(*ok, **option)


# The paper's scale


@few
@given(populations(), st.integers(1, 3))
def test_paper_scale_is_the_plain_mean_times_its_factor(population, batch):
    users, gen, ref, _, _ = population
    user, shown, at = columns(gen, {u: range(1, len(gen[u]) + 1) for u in gen})
    rank = {u: range(1, len(ref[u]) + 1) for u in ref}
    leaf = ["x", "y", ""] * (N // 3)
    labels = tuple(column.astype(int) for column in columns(ref, rank))
    got = paper_scale(users, (user, at, shown.astype(int)), labels, leaf, batch)
    for name, score in zip(("WAS", "PWKT", "WMRD", "DPA"), ORDER, strict=True):
        values = [score(ref[u], gen[u], paper_scale=True) for u in users.tolist() if ref[u]]
        n = len(values)
        want = sum(values) / n * math.ceil(n / batch) / n if n else math.nan
        assert got[name] == pytest.approx(want, abs=1e-12, nan_ok=True)
    values = [entropy(gen[u], leaf) for u in users.tolist() if gen[u]]
    n = len(values)
    want = sum(values) / n * math.ceil(n / batch) / n if n else math.nan
    assert got["entropy"] == pytest.approx(want, abs=1e-12, nan_ok=True)


def test_paper_scale_by_hand():
    """Other items do not count; one label gives 1, 0, 0, 1; S = 100, w = 1."""
    assert [score("a", "xyza", paper_scale=True) for score in ORDER] == [1, 0, 0, 1]
    assert [score("a", "", paper_scale=True) for score in ORDER] == [1, 0, 0, 1]
    assert [score("ab", "xbya", paper_scale=True) for score in ORDER] == [0.99, -1, 1, 0.5]
    # b 1, a 2, c tied with nobody behind them: 3
    assert was("abc", "xbya", paper_scale=True) == pytest.approx(1 - 2 / 300)
    assert wmrd("abc", "xbya", paper_scale=True) == pytest.approx(2 / 3)
    assert [score("", "a", paper_scale=True) for score in ORDER] == [None] * 4
    many = np.arange(130)
    got = paper_scale(many, (many, many * 0 + 1, many * 0), (many, many * 0, many * 0 + 1))
    assert got == {"WAS": 3 / 130, "PWKT": 0, "WMRD": 0, "DPA": 3 / 130}  # ceil(130 / 64) = 3
    deep = paper_scale(
        [0], ([0] * 50, range(50), range(50)), ([0], [0], [1]), ["x"] * 39 + ["y"] * 11
    )
    assert deep["entropy"] == pytest.approx(entropy(range(40), ["x"] * 39 + ["y"]))
