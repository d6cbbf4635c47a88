"""The simulator: samples agree with the closed form, and the closed form with an enumeration."""

import itertools

import numpy as np
import pytest

from pagellm import evaluate
from pagellm.data.shop import load
from pagellm.online import abtest, simulator
from pagellm.stage.config import PageLLMError


def small_world(how, seed=0, users=3, items=6):
    rng = np.random.default_rng(seed)
    return simulator.World(
        rng.uniform(0.1, 0.9, (users, items)),
        rng.uniform(0.1, 0.9, (users, items)),
        rng.uniform(1, 9, items),
        how,
    )


def enumerated(world, user, page):
    """Means of one session, summed over every course that it can take."""
    out = dict.fromkeys(("impressions", "clicks", "purchases", "gmv", "failure", "purchase"), 0.0)
    K = len(page)
    for course in itertools.product(
        ("unseen", "seen", "clicked", "bought"), (True, False), repeat=K
    ):
        fate, on = course[0::2], course[1::2]
        p, reads, did = 1.0, True, []
        for k, item in enumerate(page):
            if not reads:
                if fate[k] != "unseen" or not on[k]:
                    p = 0.0  # courses that differ in unseen slots count once
                continue
            look, click, buy = (
                world.how.glance ** (k % world.how.columns),
                world.click[user, item],
                world.buy[user, item],
            )
            p *= {
                "unseen": 1 - look,
                "seen": look * (1 - click),
                "clicked": look * click * (1 - buy),
                "bought": look * click * buy,
            }[fate[k]]
            did.append((fate[k], item))
            end = (k + 1) % world.how.columns == 0
            p *= (world.how.next_row if on[k] else 1 - world.how.next_row) if end else float(on[k])
            reads = (
                on[k]
                and not (fate[k] == "bought" and world.how.leave_on_purchase)
                and not (fate[k] in ("clicked", "bought") and world.how.leave_on_click)
            )
        bought = [item for f, item in did if f == "bought"]
        clicks = sum(f in ("clicked", "bought") for f, _ in did)
        for name, value in (
            ("impressions", sum(f != "unseen" for f, _ in did)),
            ("clicks", clicks),
            ("purchases", len(bought)),
            ("gmv", world.price[bought].sum()),
            ("failure", clicks == 0),
            ("purchase", len(bought) > 0),
        ):
            out[name] += p * value
    return out


HOW = {
    "leaves on purchase": simulator.Behaviour(columns=2),
    **simulator.READERS,
    "stays": simulator.Behaviour(columns=2, leave_on_purchase=False),
}


@pytest.mark.parametrize("how", HOW)
def test_the_closed_form_is_the_sum_over_all_courses(how):
    world = small_world(HOW[how])
    page = np.array([[4, 0, 2, 5]])
    got = simulator.expected(world, np.array([1]), page)
    for name, value in enumerated(world, 1, page[0].tolist()).items():
        assert got[name][0] == pytest.approx(value), name
    assert got["slots"].sum() == pytest.approx(got["clicks"][0])


@pytest.mark.parametrize("how", HOW)
def test_samples_agree_with_the_closed_form(how):
    world, n = small_world(HOW[how]), 60_000
    user, page = np.full(n, 2), np.tile([3, 1, 5, 0, -1], (n, 1))
    s = simulator.visit(world, user, page, np.random.default_rng(0))
    assert (
        not (s.clicked & ~s.seen).any()
        and not (s.bought & ~s.clicked).any()
        and not s.seen[:, 4].any()
    )
    true = simulator.expected(world, user[:1], page[:1])
    for name, value in (
        ("impressions", s.seen.sum(1)),
        ("clicks", s.clicked.sum(1)),
        ("purchases", s.bought.sum(1)),
        ("purchase", s.bought.any(1)),
        ("failure", ~s.clicked.any(1)),
        ("gmv", (s.bought * world.price[np.maximum(page, 0)]).sum(1)),
    ):
        assert abs(value.mean() - true[name][0]) < 4.5 * value.std() / np.sqrt(n), name


def test_a_better_item_higher_up_earns_more_and_the_last_row_least():
    world = small_world(simulator.Behaviour(columns=2, leave_on_purchase=False))
    order = np.argsort(-world.click[0])
    good, bad = (
        simulator.expected(world, np.array([0]), o[None])["clicks"][0] for o in (order, order[::-1])
    )
    assert good > bad


def test_a_simulated_effect_is_found_and_none_is_not():
    """Best items against worst: the interval covers the closed form. A against A: no finding."""
    world = small_world(simulator.Behaviour(columns=3), users=20, items=30)
    users = np.arange(20)
    best, worst = (np.argsort(sign * world.click, axis=1)[:, :6] for sign in (-1, 1))
    log = simulator.online_log(
        world, {"worst": (users, worst), "best": (users, best)}, 6000, 5, 2.0
    )
    true = [simulator.expected(world, users, page)["gmv"].mean() * 2 for page in (worst, best)]
    test, _ = abtest.compare(log, "worst", "GMV per user")
    assert test.p < 1e-6 and abs(test.difference - (true[1] - true[0])) < 4 * test.se
    assert abtest.compare(log, "worst", "session failure")[0].difference < 0
    log = simulator.online_log(world, {"a": (users, best), "b": (users, best)}, 6000, 5, 2.0)
    assert all(abtest.compare(log, "a", m)[0].p > 1e-4 for m in abtest.METRICS)
    assert set(log) == {
        "user",
        "arm",
        "day",
        *abtest.COLUMNS,
        *(f"pre_{c}" for c in abtest.COLUMNS),
    }


@pytest.mark.parametrize("metric", list(abtest.METRICS))
def test_p_values_of_simulated_a_against_a_are_uniform(metric):
    """200 random assignments of the same visitors: Kolmogorov's distance < 2.23 / sqrt(n)."""
    world, users = small_world(simulator.Behaviour(columns=3), users=20, items=30), np.arange(20)
    page = np.argsort(-world.click, axis=1)[:, :6]
    log = simulator.online_log(world, {"a": (users, page), "b": (users, page)}, 1500, 5, 2.0)
    p = []
    for split in range(200):
        log["arm"] = np.where(np.random.default_rng(split).random(1500) < 0.5, "a", "b")
        p.append(abtest.compare(log, "a", metric)[0].p)
    assert np.abs(np.sort(p) - (np.arange(200) + 0.5) / 200).max() + 0.5 / 200 < 2.23 / np.sqrt(200)


def test_sft_against_ppo_end_to_end(served, tmp_path, capsys):
    common = {"run": "base", "data": str(served / "data"), "runs": str(served / "runs")}
    evaluate.run(
        evaluate.Config(**common, k=6, depth=20, policies="sft,ppo", quiet=True, n_boot=10)
    )
    result = simulator.run(simulator.Config(**common, visitors=800, k=6))
    said = capsys.readouterr().out
    assert said.startswith("SIMULATED") and "closed form" in said
    assert (result["control"], result["treatment"]) == ("sft", "ppo")
    assert set(result["truth"]) == set(abtest.METRICS)
    assert set(result["visits"]) == {"adds per page view", "views per visit", "adds per visit"}
    assert "adds per visit" in said
    for metric, true in result["truth"].items():
        m = result["metrics"][metric]
        assert abs(m["difference"] - (true["treatment"] - true["control"])) < 4.5 * m["se"], metric
    with pytest.raises(PageLLMError, match="no pages of popularity"):
        simulator.run(simulator.Config(**common, control="popularity", out="x"))


@pytest.mark.parametrize("reading", simulator.READERS)
def test_another_reader_and_another_failure(served, reading, capsys):
    """If a session without a purchase counts as failed, failure = 1 - purchase."""
    common = {"run": "base", "data": str(served / "data"), "runs": str(served / "runs")}
    evaluate.run(
        evaluate.Config(**common, k=6, depth=20, policies="sft,ppo", quiet=True, n_boot=10)
    )
    result = simulator.run(
        simulator.Config(
            **common, visitors=800, k=6, reading=reading, failure="purchase", out=f"by-{reading}"
        )
    )
    m, true = result["metrics"], result["truth"]
    for metric, t in true.items():
        assert (
            abs(m[metric]["difference"] - (t["treatment"] - t["control"])) < 4.5 * m[metric]["se"]
        ), metric
    assert true["session failure"]["control"] == pytest.approx(
        1 - true["session purchase"]["control"]
    )
    with pytest.raises(PageLLMError, match="carousel, position, cascade"):
        simulator.Config(reading="sideways")
    with pytest.raises(PageLLMError, match="click or purchase"):
        simulator.Config(failure="never")


def test_a_cascade_has_one_click_at_most_and_positions_do_not_care():
    world = small_world(simulator.READERS["cascade"])
    user, page = np.zeros(5000, int), np.tile([3, 1, 5, 0], (5000, 1))
    assert simulator.visit(world, user, page, np.random.default_rng(0)).clicked.sum(1).max() == 1
    world = small_world(simulator.READERS["position"])
    slots = simulator.expected(world, user[:1], page[:1])["slots"][0]
    assert slots == pytest.approx(0.9 ** np.arange(4) * world.click[0, page[0]])


def test_only_a_shop_with_truth_can_be_simulated(served):
    from dataclasses import replace

    with pytest.raises(PageLLMError, match="no truth.npy"):
        simulator.world_of(replace(load(served / "data" / "synthetic"), truth=None))


def test_a_visit_in_closed_form_worked_out_by_hand():
    """More adds a page view, fewer page views a visit: +3.33% a view is +3.05% a visit."""
    adds, any_add = np.array([0.30, 0.31]), np.array([0.25, 0.26])
    views, per_visit = simulator.visits(adds, any_add)
    assert views == pytest.approx([1.42510, 1.42115], abs=1e-5)
    assert per_visit == pytest.approx([0.427530, 0.440558], abs=1e-6)
    assert per_visit[1] / per_visit[0] - 1 == pytest.approx(0.0305, abs=5e-5)


def test_both_denominators_of_six_users_an_arm_worked_out_by_hand():
    from pagellm.online.abtest import estimate, welch

    control = [np.array(x, float) for x in ([3, 0, 2, 5, 1, 4], [10, 4, 8, 15, 5, 12],
                                            [2, 1, 2, 3, 1, 2])]  # fmt: skip
    treated = [np.array(x, float) for x in ([4, 1, 2, 6, 1, 5], [10, 5, 7, 14, 5, 13],
                                            [2, 1, 2, 3, 1, 3])]  # fmt: skip
    wanted = ((1, (0.277778, 0.351852), 0.2667, 0.1952), (2, (1.363636, 1.583333), 0.1611, 0.2362))
    for at, values, relative, se in wanted:
        a, b = estimate(control[0], control[at]), estimate(treated[0], treated[at])
        assert (a.value, b.value) == pytest.approx(values, abs=1e-6)
        found = welch(a, b)
        assert found.relative == pytest.approx(relative, abs=1e-4)
        assert (found.relative_high - found.relative) / 1.959964 == pytest.approx(se, abs=1e-4)


def test_simulated_visits_have_the_means_of_the_closed_form():
    rng = np.random.default_rng(3)
    how = simulator.READERS["rows"]
    click, buy = rng.random((5, 30)), rng.random((5, 30)) * 0.3
    world = simulator.World(click, buy, np.ones(30), how)
    user, page = np.arange(5), np.array([rng.permutation(30)[:20] for _ in range(5)])
    one = simulator.expected(world, user, page)
    views, adds = simulator.visits(one["purchases"], one["purchase"])
    log = simulator.visit_log(world, user, page, 40_000, seed=1)
    assert log["views"].mean() == pytest.approx(views.mean(), rel=0.02)
    # A visitor goes on for reasons that hang on the page's adds, so the closed form is exact.
    assert log["adds"].mean() == pytest.approx(adds.mean(), rel=0.03)
