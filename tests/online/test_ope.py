"""Off-policy estimators: their expectation is the true value; small samples are refused."""

import gzip
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pagellm import evaluate
from pagellm.online import ope, simulator
from pagellm.stage.config import PageLLMError

U, M, K = 4, 4, 3


def setting(leave=False, spread=1.0, seed=0):
    """A small world, its users, their candidates, and scores of a logging and a target policy."""
    rng = np.random.default_rng(seed)
    how = simulator.Behaviour(columns=2, leave_on_purchase=leave)
    world = simulator.World(
        rng.uniform(0.1, 0.9, (U, 8)), rng.uniform(0.5, 0.9, (U, 8)), rng.uniform(1, 9, 8), how
    )
    candidates = np.stack([rng.permutation(8)[:M] for _ in range(U)])
    return (
        world,
        np.arange(U),
        candidates,
        rng.normal(size=(U, M)),
        spread * rng.normal(size=(U, M)),
    )


def every_page(leave=False):
    """Every page of every user with its expected rewards, and the probability of each page."""
    world, users, candidates, logging, target = setting(leave)
    place = np.tile(ope.all_pages(M, K), (U, 1))
    row = np.repeat(users, len(place) // U)
    page = np.take_along_axis(candidates[row], place, 1)
    reward = simulator.expected(world, row, page)["slots"]
    log = ope.Log(
        row,
        page,
        reward,
        ope.pl_propensity(logging[row], place),
        ope.pl_propensity(target[row], place),
        candidates[row],
        logging[row],
        target[row],
    )
    return log, log.propensity.prod(1) / U, ope.true_value(world, users, candidates, target, K)


def contributions(log):
    w, total = log.weights(), log.reward.sum(1)
    return {
        "IPS": w[:, -1] * total,
        "cascade IPS": (w * log.reward).sum(1),
        "cascade DR": ope.cascade_dr(log),
        "pseudo-inverse": ope.pseudo_inverse_weights(log) * total,
    }


@pytest.mark.parametrize("leave", [False, True])
def test_the_expectation_over_every_page_is_the_truth(leave):
    """E[estimate] = true value; for the pseudo-inverse only if rewards add up over slots."""
    log, p, truth = every_page(leave)
    assert p.sum() == pytest.approx(1.0)
    # the logging policy's value differs, so the estimators have something to correct
    assert (p * log.reward.sum(1)).sum() != pytest.approx(truth, rel=1e-3)
    for name, x in contributions(log).items():
        off = abs((p * x).sum() - truth)
        assert (off > 1e-4) if leave and name == "pseudo-inverse" else (off < 1e-9), name


def test_intervals_cover_the_truth_and_doubly_robust_is_steadier_than_ips():
    world, users, candidates, logging, target = setting()
    users, candidates, logging, target = (
        np.tile(x, (50, *[1] * (x.ndim - 1))) if x.ndim > 1 else np.tile(x, 50)
        for x in (users, candidates, logging, target)
    )
    truth = ope.true_value(world, users, candidates, target, K)
    covered, value = {}, {}
    for seed in range(120):
        log = ope.simulated_log(world, users, candidates, logging, target, K, 1500, seed)
        # clusters without a common user
        log.user = np.random.default_rng(seed).integers(300, size=1500)
        for name, v in ope.estimates(log, 1.0).items():
            if name == "direct":
                continue  # biased: its fitted values depend on items, not on users
            covered.setdefault(name, []).append(abs(v.value - truth) < 1.96 * v.se)
            value.setdefault(name, []).append(v.value)
    for name, hits in covered.items():
        assert np.mean(hits) > 0.86, (name, np.mean(hits))
        assert abs(np.mean(value[name]) - truth) < 4.5 * np.std(value[name]) / math.sqrt(120), name
    spread = {name: np.std(v) for name, v in value.items()}
    assert spread["cascade DR"] < spread["cascade IPS"] < spread["IPS"]
    assert spread["pseudo-inverse"] < spread["IPS"]


def test_an_estimate_rests_on_its_own_weights_and_is_clustered_by_user():
    """ess = (sum w)^2 / sum w^2 of the estimator's weights; IPS's se from sums over each user."""
    log = ope.simulated_log(*setting(), K, 600)
    page, pi = log.weights()[:, -1], ope.pseudo_inverse_weights(log)
    found = ope.estimates(log, 1.0)
    for name, value in found.items():
        weight = pi if name == "pseudo-inverse" else page
        assert value.ess == pytest.approx(weight.sum() ** 2 / (weight**2).sum()), name
    assert abs(found["pseudo-inverse"].ess / found["IPS"].ess - 1) > 0.01
    x, owners = page * log.reward.sum(1), np.unique(log.user)
    z = np.array([(x - x.mean())[log.user == u].sum() for u in owners]) / (600 / len(owners))
    assert found["IPS"].value == pytest.approx(x.mean())
    assert found["IPS"].se == pytest.approx(z.std(ddof=1) / math.sqrt(len(owners)))


def test_the_printed_interval_is_1_96_standard_errors_wide():
    log = ope.simulated_log(*setting(), K, 50)
    text = ope.report(log, {"IPS": ope.Value(1.0, 0.5, 300.0)}, None)
    assert "   1.0000    [0.0200, 1.9800]                 300" in text


def test_cascade_dr_of_a_certain_reward_has_no_spread():
    """If every slot earns r, fitted values are exact: every session's term is K r."""
    world, users, candidates, logging, target = setting()
    log = ope.simulated_log(world, users, candidates, logging, target, K, 200)
    log.reward[:] = 0.25
    assert ope.cascade_dr(log) == pytest.approx(np.full(200, 0.25 * K))
    assert log.weights().std() > 0.1


def test_the_direct_estimate_is_the_fitted_values_alone():
    """If a slot's reward depends on its item alone, `direct` is nearly right, steadier than IPS.

    It is not exact: the rewards of later slots depend on the user, and fitted values do not.
    """
    world, users, candidates, logging, target = setting()
    items, rng = np.random.default_rng(1).uniform(0.1, 0.9, 8), np.random.default_rng(2)
    log = ope.simulated_log(world, users, candidates, logging, target, K, 40_000)
    log.reward = (rng.random(log.page.shape) < items[log.page]).astype(float)
    truth = np.mean(
        [
            sum(
                ope.pl_propensity(target[u : u + 1], place[None]).prod()
                * items[candidates[u]][place].sum()
                for place in ope.all_pages(M, K)
            )
            for u in users
        ]
    )
    found = ope.estimates(log)
    assert found["direct"].value == pytest.approx(truth, rel=0.02)
    direct, robust = ope.values(log)
    assert (robust == ope.cascade_dr(log)).all() and direct.std() < robust.std() < contributions(
        log
    )["IPS"].std()
    log.target = log.target * 0
    log.candidates = None
    assert all(v.refused for v in ope.estimates(log, 0.0).values())  # all weights are 0


def test_equal_policies_give_the_logged_mean():
    world, users, candidates, logging, _ = setting()
    log = ope.simulated_log(world, users, candidates, logging, logging, K, 400)
    for name, v in ope.estimates(log).items():
        if name not in ("cascade DR", "direct"):
            assert v.value == pytest.approx(log.reward.sum(1).mean()) and v.ess == pytest.approx(
                400
            ), name


def test_plackett_luce_propensities_are_those_of_the_draws():
    score = np.array([[0.5, -1.0, 1.2, 0.0]])
    drawn = ope.draw_pages(np.repeat(score, 40_000, 0), 2, np.random.default_rng(0))
    for place in ope.all_pages(4, 2):
        p = ope.pl_propensity(score, place[None]).prod()
        assert abs((drawn == place).all(1).mean() - p) < 4.5 * math.sqrt(p * (1 - p) / 40_000)
    first, second = ope.page_moments(score, 2)
    assert first.reshape(2, 4).sum(1) == pytest.approx([1, 1])
    assert np.diagonal(second[0]) == pytest.approx(first[0])
    assert first[0, :4] == pytest.approx(np.exp(score[0]) / np.exp(score[0]).sum())


def test_few_effective_sessions_are_refused(tmp_path):
    world, users, candidates, logging, target = setting(spread=8.0)
    log = ope.simulated_log(world, users, candidates, -target, target, K, 300)
    found = ope.estimates(log)
    assert "never did" in found["pseudo-inverse"].refused
    assert "effective sessions of 300" in found["IPS"].refused
    assert math.isnan(found["IPS"].value) and found["IPS"].ess < 100
    assert ope.effective(np.ones(7)) == 7 and ope.effective(np.array([1.0, 0, 0])) == 1
    assert ope.effective(np.zeros(3)) == 0
    path = save(log, tmp_path / "log.parquet", ("candidates", "logging_score", "target_score"))
    with pytest.raises(PageLLMError, match="every estimate is refused"):
        ope.run(ope.Config(log=path))
    assert not (tmp_path / "ope.json").exists()


def save(log, path, without=(), **changed):
    columns = {
        "user": log.user,
        "page": log.page,
        "reward": log.reward,
        "propensity": log.propensity,
        "target_propensity": log.target,
        "candidates": log.candidates,
        "logging_score": log.logging_score,
        "target_score": log.target_score,
        **changed,
    }
    pq.write_table(
        pa.table({n: np.asarray(c).tolist() for n, c in columns.items() if n not in without}), path
    )
    return str(path)


def test_a_log_comes_back_as_it_was_written(tmp_path):
    world, users, candidates, logging, target = setting()
    log = ope.simulated_log(world, users, candidates, logging, target, K, 500)
    assert ope.estimates(ope.read_log(save(log, tmp_path / "a.parquet"))) == ope.estimates(log)
    fewer = ope.run(ope.Config(log=save(log, tmp_path / "b.parquet", ("candidates",)), min_ess=10))
    assert list(fewer) == ["IPS", "SNIPS", "cascade IPS"] and (tmp_path / "ope.json").exists()
    zero = log.propensity.copy()
    zero[3, 1] = 0
    for said, change in (
        ("propensity of session 3 is 0", {"propensity": zero}),
        ("off by", {"target_score": log.target_score[:, ::-1]}),
        ("not among its candidates", {"candidates": log.candidates + 100}),
        ("page of session 0 names an item twice", {"page": log.page[:, [0, 0, 1]]}),
        ("candidates of session 0 names", {"candidates": log.candidates[:, [0, 0, 1, 2]]}),
        ("score is missing", {"target_score": log.target_score * np.nan}),
        ("reward is missing", {"reward": log.reward * np.nan}),
        ("one user's", {"user": np.zeros(500)}),
        ("500 sessions, 1 of them of nobody", {"user": np.array([None, *["x"] * 499])}),
        ("candidates and scores want", {"logging_score": log.logging_score[:, :3]}),
        ("lists of numbers", {"reward": np.full((500, K), "much")}),
    ):
        with pytest.raises(PageLLMError, match=said):
            ope.estimates(ope.read_log(save(log, tmp_path / "c.parquet", **change)))
    names = {
        name: np.char.add("item ", x.astype(str))
        for name, x in (("page", log.page), ("candidates", log.candidates))
    }
    assert ope.estimates(ope.read_log(save(log, tmp_path / "e.parquet", **names))) == ope.estimates(
        log
    )
    pq.write_table(pq.read_table(tmp_path / "a.parquet").slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(PageLLMError, match="0 sessions"):
        ope.read_log(tmp_path / "empty.parquet")
    with pytest.raises(PageLLMError, match="no column reward"):
        ope.read_log(save(log, tmp_path / "d.parquet", ("reward",)))
    with pytest.raises(PageLLMError, match="no log"):
        ope.read_log(tmp_path / "nowhere")
    with pytest.raises(PageLLMError, match="shorter pages"):
        ope.all_pages(20, 5)


def test_a_target_outside_the_support_is_refused():
    world, users, candidates, logging, target = setting()
    log = ope.simulated_log(
        world, users, candidates, logging + np.array([0, 0, 0, -900.0]), target, K, 50
    )
    with pytest.raises(PageLLMError, match="never did"):
        ope.pseudo_inverse_weights(log)


def test_sft_log_judges_ppo(served, capsys):
    common = {"run": "base", "data": str(served / "data"), "runs": str(served / "runs")}
    evaluate.run(
        evaluate.Config(**common, k=6, depth=20, policies="sft,ppo", quiet=True, n_boot=10)
    )
    found = ope.run(ope.Config(**common, candidates=4, k=2, sessions=3000))
    said = capsys.readouterr().out
    truth = float(said.split("true value ")[1].split()[0])
    assert said.startswith("SIMULATED") and len(found) == 6
    for name, v in found.items():
        assert name == "direct" or abs(v.value - truth) < 4.5 * v.se, name


BANDIT = "user_feature_0,item_id,position,click,propensity_score,timestamp\n"


def test_a_log_of_single_slots_is_read_line_by_line(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(BANDIT + "a,3,1,0,0.25,x\nb,5,2,1,0.5,x\na,3,3,1,0.5,x\n")
    log = ope.read_bandit(path)
    assert log.page[:, 0].tolist() == ["3", "5", "3"] and log.reward[:, 0].tolist() == [0, 1, 1]
    assert log.user.tolist() == ["a", "b", "a"] and log.target[:, 0].tolist() == [0.5] * 3
    found = ope.estimates(log, 0.0)
    # weights 2, 1, 1: inverse propensities of the uniform policy
    assert found["IPS"].value == pytest.approx((0 + 1 + 1) / 3)
    assert found["SNIPS"].value == pytest.approx((0 + 1 + 1) / 4)
    packed = tmp_path / "log.csv.gz"
    with gzip.open(packed, "wt") as file:
        file.write(path.read_text())
    assert np.array_equal(ope.read_bandit(packed).propensity, log.propensity)


@pytest.mark.parametrize(
    "line, message",
    [("a,3,1,0,0,x", "line 2"), ("a,3,1,7,0.5,x", "line 2"), ("a,3,x,0,0.5,x", "want numbers")],
)
def test_a_broken_log_of_single_slots_is_refused(tmp_path, line, message):
    path = tmp_path / "log.csv"
    path.write_text(BANDIT + line + "\n")
    with pytest.raises(PageLLMError, match=message):
        ope.read_bandit(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(PageLLMError, match="no column item_id"):
        ope.read_bandit(path)
    with pytest.raises(PageLLMError, match="no log"):
        ope.read_bandit(tmp_path / "nobody.csv")


def test_halves_of_users_are_drawn_by_their_ids_text_alone():
    """Not by the rank of an id: numbers and their texts, and any order of lines, give the same."""
    users = np.arange(95, 115)
    half = ope.halves(users)
    assert half.sum() == 10 and (ope.halves(users.astype(str)) == half).all()
    order = np.random.default_rng(0).permutation(20)
    assert (ope.halves(users[order]) == half[order]).all()
    assert (ope.halves(users, seed=1) != half).any()
    # a rank knows which id is the smallest; here small and large ids are in both halves
    assert 0 < half[:10].sum() < 10 and half.tolist() not in ([0, 1] * 10, [1, 0] * 10)


@pytest.mark.parametrize("numbers", ["int", "text"])
def test_an_estimate_is_that_of_the_sessions_and_not_of_the_order_of_lines(tmp_path, numbers):
    log, _, _ = every_page()
    columns = {
        "user": [f"{u:03d}" if numbers == "text" else int(u) for u in log.user],
        "page": log.page.tolist(),
        "reward": log.reward.tolist(),
        "propensity": log.propensity.tolist(),
        "target_propensity": log.target.tolist(),
        "candidates": log.candidates.tolist(),
        "logging_score": log.logging_score.tolist(),
        "target_score": log.target_score.tolist(),
        "note": ["x"] * len(log.user),
    }
    table, found = pa.table(columns), []
    for order in (np.arange(len(table)), np.random.default_rng(1).permutation(len(table))):
        pq.write_table(table.take(order), tmp_path / "log.parquet")
        said = []
        found.append(ope.estimates(ope.read_log(tmp_path / "log.parquet", said), 0.0))
        assert said[0].endswith("left over: note") and len(said) == 1
    for name in found[0]:
        assert found[0][name].value == pytest.approx(found[1][name].value, rel=1e-9)


def test_optional_columns_that_are_there_in_part_are_named(tmp_path):
    log, _, _ = every_page()
    columns = {
        "user": log.user.tolist(),
        "page": log.page.tolist(),
        "reward": log.reward.tolist(),
        "propensity": log.propensity.tolist(),
        "target_propensity": log.target.tolist(),
        "candidates": log.candidates.tolist(),
        "Target Score": log.target_score.tolist(),
    }
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    said = []
    assert ope.read_log(tmp_path / "log.parquet", said).candidates is None
    assert "Target Score (is target_score meant?)" in said[0]
    assert "without logging_score, target_score no cascade DR" in said[1]
    assert "candidates alone is not used" in said[1]


def test_uniform_on_open_bandit_from_thompson_sampling_covers_the_uniform_log():
    """Shared data: the estimate from one policy's log beside what the other one's visitors did."""
    folder = Path(__file__).parents[3] / "shared" / "data" / "open_bandit"
    if not folder.exists():
        pytest.skip("shared: no Open Bandit files")
    for shop in ("men", "women"):
        drawn = ope.read_bandit(folder / "random" / shop / f"{shop}.csv.gz")
        assert np.allclose(drawn.propensity, drawn.target, rtol=1e-3)
        clicks = drawn.reward.mean()
        log = ope.read_bandit(folder / "bts" / shop / f"{shop}.csv.gz")
        found = ope.estimates(log, 10.0)["SNIPS"]
        if shop == "women":  # some propensities are 1e-6: two sessions carry all the weight
            assert found.refused
            continue
        error = (found.se**2 + clicks * (1 - clicks) / len(drawn.reward)) ** 0.5
        assert abs(found.value - clicks) < 4 * error
