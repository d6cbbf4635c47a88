"""A/B tests: calibrated under no effect, right on known effects, equal to scipy and statsmodels."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm.online import abtest
from pagellm.pages.stats import holm
from pagellm.stage.config import PageLLMError


def draw_log(n=4000, seed=0, lift=0.0):
    """Users with a level of their own in both periods; the treatment clicks `lift` more often."""
    rng = np.random.default_rng(seed)
    level, arm = rng.gamma(2.0, 0.5, n), np.where(rng.random(n) < 0.5, "a", "b")
    log = {"user": np.arange(n), "arm": arm, "day": rng.integers(10, size=n)}
    for prefix in ("pre_", ""):
        sessions = 1 + rng.poisson(3 * level)
        impressions = sessions * rng.integers(5, 20, n)
        more = 1 + lift * ((arm == "b") & (prefix == ""))
        clicks = rng.binomial(impressions, np.minimum(0.9, 0.1 * level * more))
        bought = rng.binomial(sessions, np.minimum(0.9, 0.2 * level))
        gmv = bought * rng.lognormal(2, 0.5, n)
        values = (
            impressions,
            clicks,
            sessions,
            rng.binomial(sessions - bought, 0.4),
            bought,
            bought,
            gmv,
        )
        log |= {
            prefix + name: v.astype(float) for name, v in zip(abtest.COLUMNS, values, strict=True)
        }
    return log


def save(log, path):
    pq.write_table(pa.table({k: v.tolist() for k, v in log.items()}), path)
    return str(path)


@pytest.mark.parametrize("cuped", [False, True])
@pytest.mark.parametrize("metric", list(abtest.METRICS))
def test_p_values_of_a_against_a_are_uniform(metric, cuped):
    """400 p-values: Kolmogorov's distance to the uniform < its 0.0001 quantile, 2.23 / sqrt(n)."""
    log, p = draw_log(1500), []
    for split in range(400):
        log["arm"] = np.where(np.random.default_rng(split).random(1500) < 0.5, "a", "b")
        p.append(abtest.compare(log, "a", metric, cuped=cuped)[0].p)
    p = np.sort(p)
    distance = np.abs(p - (np.arange(400) + 0.5) / 400).max() + 0.5 / 400
    assert distance < 2.23 / math.sqrt(400)


def test_clusters_matter_to_ctr():
    """A binomial standard error over impressions is far too small, because users differ."""
    log = draw_log()
    a = log["arm"] == "a"
    e = abtest.estimate(log["clicks"][a], log["impressions"][a])
    naive = e.value * (1 - e.value) / log["impressions"][a].sum()
    assert e.value == log["clicks"][a].sum() / log["impressions"][a].sum()
    assert e.var > 3 * naive


def test_the_delta_method_has_the_spread_that_resampling_users_shows():
    log, rng = draw_log(1000), np.random.default_rng(1)
    x, y = log["clicks"], log["impressions"]
    again = [x[i].sum() / y[i].sum() for i in (rng.integers(1000, size=1000) for _ in range(3000))]
    assert abtest.estimate(x, y).var == pytest.approx(np.var(again), rel=0.12)


def test_cuped_saves_variance_and_keeps_the_effect():
    log, plain, adjusted = draw_log(20_000, lift=0.1), [], []
    test, none = abtest.compare(log, "a", "CTR", cuped=False)
    better, saved = abtest.compare(log, "a", "CTR")
    assert none == 0.0 and saved > 0.3 and better.se < 0.85 * test.se
    assert abs(better.difference - test.difference) < 3 * test.se
    for seed in range(60):  # the adjusted and the plain estimate have the same mean
        log = draw_log(1000, seed, lift=0.1)
        for out, cuped in ((plain, False), (adjusted, True)):
            out.append(abtest.compare(log, "a", "CTR", cuped=cuped)[0].difference)
    assert np.std(adjusted) < np.std(plain)
    assert abs(np.mean(adjusted) - np.mean(plain)) < 3.5 * np.std(plain) / math.sqrt(60)


def test_peeking_at_welch_errs_often_and_the_sequential_test_does_not():
    rng, wrong_p, wrong_fixed, covered = np.random.default_rng(0), 0, 0, 0
    looks = np.arange(50, 2001, 50)
    for _ in range(400):
        d = np.cumsum(rng.normal(size=2000))[looks - 1] / looks
        p, half = abtest.always_valid(d, 1 / looks, tau=0.1, alpha=0.05)
        assert (np.diff(p) <= 0).all()
        wrong_p += p[-1] < 0.05
        covered += (np.abs(d) <= half).all()
        wrong_fixed += (np.abs(d) * np.sqrt(looks) > 1.96).any()
    assert wrong_p <= 400 * 0.05 and covered >= 400 * 0.95 and wrong_fixed > 400 * 0.2


def test_the_sequential_interval_and_p_agree():
    """0 is outside the interval if and only if 1 / L < alpha."""
    for d in np.linspace(0, 0.5, 60):
        p, half = abtest.always_valid([d], [0.01], 0.2, 0.05)
        assert (abs(d) > half[0]) == (p[0] < 0.05)


def test_power_is_what_the_planner_promised():
    n = round(abtest.users_needed(2.0, 0.5, alpha=0.05, power=0.8) / 2)
    rng = np.random.default_rng(0)
    found = sum(
        abtest.welch(abtest.estimate(rng.normal(0, 2, n)), abtest.estimate(rng.normal(0.5, 2, n))).p
        < 0.05
        for _ in range(1000)
    )
    assert abs(found / 1000 - 0.8) < 0.05
    assert abtest.detectable(2.0, 2 * n) == pytest.approx(0.5, rel=0.01)
    assert abtest.days_needed(101, 10) == 11


def test_the_relative_interval_covers_large_changes_as_often_as_it_says():
    """Estimates around 1 and 3: the interval of the relative change holds 2 in 95% of draws."""
    rng = np.random.default_rng(0)
    covered = [
        (test := abtest.welch(abtest.Estimate(c, 0.01**2, 9000), abtest.Estimate(t, 0.02**2, 9000)))
        and test.relative_low < 2 < test.relative_high
        for c, t in zip(rng.normal(1, 0.01, 4000), rng.normal(3, 0.02, 4000), strict=True)
    ]
    assert 0.94 < np.mean(covered) < 0.96


@pytest.mark.parametrize("cuped", [False, True])
def test_the_looks_are_at_all_users_so_far_with_the_first_looks_mixture(cuped):
    """sequence = always_valid over the days, with tau = mde |control| of the first look."""
    log = draw_log(lift=0.2)
    log["arm"][(log["day"] == 0) & (np.cumsum(log["day"] == 0) > 150)] = "a"
    config = abtest.Config(control="a", mde=0.03, alpha=0.05, cuped=cuped)
    tests, days = [], []
    for day in range(10):
        some = {name: column[log["day"] <= day] for name, column in log.items()}
        if min((some["arm"] == "a").sum(), (some["arm"] == "b").sum()) >= 100:
            tests.append(abtest.compare(some, "a", "CTR", 0.05, cuped)[0])
            days.append(day)
    assert 0 < days[0] and tests[0].control != pytest.approx(tests[-1].control, rel=1e-3)
    p, half = abtest.always_valid(
        [t.difference for t in tests], [t.se**2 for t in tests], 0.03 * tests[0].control, 0.05
    )
    stopped = [day for day, value in zip(days, p, strict=True) if value < 0.05]
    assert abtest.sequence(log, config, "CTR") == {
        "looks": len(days),
        "p": pytest.approx(p[-1]),
        "low": pytest.approx(tests[-1].difference - half[-1]),
        "high": pytest.approx(tests[-1].difference + half[-1]),
        "stopped_on_day": stopped[0],
    }


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_the_step_down_procedure(p):
    """Adjusted p < alpha if and only if Holm's step-down procedure rejects."""
    alpha, adjusted = 0.05, holm(p)
    rejected, order = set(), np.argsort(p, kind="stable")
    for step, i in enumerate(order):
        if p[i] * (len(p) - step) >= alpha:
            break
        rejected.add(int(i))
    assert set(np.flatnonzero(adjusted < alpha).tolist()) == rejected
    assert (adjusted >= np.array(p)).all()


def test_equal_to_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scipy is in the extra dev")
    rng = np.random.default_rng(0)
    for a, b in ((30, 45), (2, 3), (500, 20)):
        x, y = rng.normal(1, 2, a), rng.gamma(1, 1, b)
        ours, theirs = (
            abtest.welch(abtest.estimate(x), abtest.estimate(y)),
            stats.ttest_ind(y, x, equal_var=False),
        )
        assert (ours.p, ours.df) == pytest.approx((theirs.pvalue, theirs.df), rel=1e-9)
        assert (ours.low, ours.high) == pytest.approx(
            tuple(theirs.confidence_interval(0.95)), rel=1e-9
        )
    for df in (1, 2.5, 30, 1e6, math.inf):
        for t in (-3.0, 0.0, 1e-3, 1.0, 6.0, 25.0):
            assert abtest.t_sf(t, df) == pytest.approx(stats.t.sf(t, df), rel=1e-7, abs=1e-300)
    for counts in ((100, 130), (5000, 5000), (10, 30)):
        assert abtest.sample_ratio(counts, (0.4, 0.6)) == pytest.approx(
            stats.chisquare(counts, np.array([0.4, 0.6]) * sum(counts)).pvalue, rel=1e-9
        )


def test_equal_to_statsmodels():
    multitest = pytest.importorskip(
        "statsmodels.stats.multitest", reason="statsmodels is in the extra dev"
    )
    power = pytest.importorskip("statsmodels.stats.power", reason="statsmodels is in the extra dev")
    p = np.random.default_rng(0).random(20) ** 3
    assert holm(p) == pytest.approx(multitest.multipletests(p, method="holm")[1])
    one = power.NormalIndPower().solve_power(0.1, power=0.9, alpha=0.01, ratio=1.0)
    assert abtest.users_needed(3.0, 0.3, 0.01, 0.9) == pytest.approx(2 * one, rel=1e-6)


def test_a_log_is_read_tested_and_written(tmp_path, capsys):
    log = draw_log(6000, lift=0.15)
    result = abtest.run(
        abtest.Config(log=save(log, tmp_path / "log.parquet"), control="a", daily=600)
    )
    m = result["metrics"]["CTR"]
    assert m["holm"] < 0.01 and m["relative_low"] < 0.15 < m["relative_high"]
    # n users find the relative change at which n users are needed, and users ~ 1 / change^2
    for name, other in result["metrics"].items():
        needed = other["users_needed"] * (0.02 / other["detectable"]) ** 2
        assert needed == pytest.approx(sum(result["users"])), name
    assert m["sequential"]["looks"] == 10 and m["sequential"]["stopped_on_day"] is not None
    # an interval that is valid at every look is wider
    assert m["sequential"]["high"] - m["sequential"]["low"] > m["high"] - m["low"]
    assert result["metrics"]["session failure"]["p"] > 1e-3
    assert json.loads((tmp_path / "abtest.json").read_text()) == json.loads(json.dumps(result))
    assert "days of 600 new users" in capsys.readouterr().out
    pyarrow.csv.write_csv(pq.read_table(tmp_path / "log.parquet"), tmp_path / "log.csv")
    again = abtest.run(abtest.Config(log=str(tmp_path / "log.csv"), control="a", daily=600))
    assert again["metrics"]["CTR"]["p"] == pytest.approx(m["p"], rel=1e-6)


def test_a_sample_ratio_mismatch_is_refused(tmp_path):
    log = draw_log(2000)
    keep = (log["arm"] == "a") | (np.arange(2000) % 4 > 0)
    path = save({k: v[keep] for k, v in log.items()}, tmp_path / "log.parquet")
    with pytest.raises(PageLLMError, match="sample ratio mismatch"):
        abtest.run(abtest.Config(log=path, control="a"))
    assert abtest.run(abtest.Config(log=path, control="a", srm_alpha=0))["sample_ratio_p"] < 1e-3


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda log: log.pop("clicks"), "no column clicks"),
        (lambda log: log["user"].__setitem__(1, 0), "user 0 has 2 lines"),
        (lambda log: log["gmv"].__setitem__(1, np.nan), "column gmv"),
        (lambda log: log["clicks"].__setitem__(1, -1), "column clicks is -1 for user 1"),
        (lambda log: log["gmv"].__setitem__(1, 1e200), "column gmv"),
        (
            lambda log: log.__setitem__("user", np.array([None, *map(str, range(199))])),
            "column user is empty in 1 line",
        ),
        (
            lambda log: log.__setitem__("arm", np.array([None, *log["arm"][1:]])),
            "column arm is empty in 1 line",
        ),
        (lambda log: log.update({k: v[:0] for k, v in log.items()}), "no lines"),
        (
            lambda log: log["failed_sessions"].__setitem__(1, 1e6),
            "failed_sessions above sessions for 1 ",
        ),
        (lambda log: log.__setitem__("arm", np.full(200, "a")), "has the arms a; want two"),
    ],
)
def test_a_wrong_log_is_named(tmp_path, change, said):
    log = draw_log(200)
    change(log)
    with pytest.raises(PageLLMError, match=said):
        abtest.run(abtest.Config(log=save(log, tmp_path / "log.parquet"), control="a"))


def test_a_metric_that_nobody_could_have_is_left_out(tmp_path, capsys):
    """No impressions at all: CTR is undefined, and the other metrics do not change."""
    log = draw_log(1000)
    log["clicks"], log["impressions"] = np.zeros(1000), np.zeros(1000)
    result = abtest.run(
        abtest.Config(log=save(log, tmp_path / "log.parquet"), control="a", daily=100)
    )
    assert result["undefined"] == ["CTR"] and list(result["metrics"]) == [
        m for m in abtest.METRICS if m != "CTR"
    ]
    said = capsys.readouterr().out
    assert "CTR: left out" in said and "all metrics find" not in said
    p = [m["p"] for m in result["metrics"].values()]
    assert [m["holm"] for m in result["metrics"].values()] == pytest.approx(holm(p))


def test_users_without_a_past_count_as_zero_there(tmp_path):
    log = draw_log(1000)
    gone = dict(log)
    for name in [n for n in log if n.startswith("pre_")]:
        log[name] = np.where(np.arange(1000) % 7 == 0, 0.0, log[name])
        gone[name] = np.where(np.arange(1000) % 7 == 0, np.nan, log[name])
    both = [abtest.read_log(save(some, tmp_path / "log.parquet")) for some in (log, gone)]
    assert all((both[0][name] == both[1][name]).all() for name in both[0])
    said = []
    abtest.read_log(tmp_path / "log.parquet", said=said)
    assert "pre_clicks: empty for 143 users, who count as 0" in said


def test_a_column_with_decimal_commas_is_named_with_a_value(tmp_path):
    log = draw_log(20)
    log["gmv"] = np.array(["1,5"] * 20)
    with pytest.raises(PageLLMError, match=r"column gmv is not numbers, such as \['1,5'\]"):
        abtest.read_log(save(log, tmp_path / "log.parquet"))


def test_columns_read_and_left_over_are_named(tmp_path, capsys):
    log = draw_log(2000)
    log["Day"], log["note"] = log.pop("day"), log["arm"]
    del log["pre_gmv"]
    abtest.run(abtest.Config(log=save(log, tmp_path / "log.parquet"), control="a"))
    said = capsys.readouterr().out.splitlines()[0]
    assert "abtest: log.parquet: 2,000 rows; columns user, arm, " in said
    assert "not there: day, pre_gmv; left over: Day, note; look at Day (is day meant?)" in said


def test_an_arm_of_one_user_and_a_loss_that_shrinks(tmp_path):
    log = draw_log(400)
    keep = (log["arm"] == "a") | (np.cumsum(log["arm"] == "b") == 1)
    with pytest.raises(PageLLMError, match="1 in b; want 2 or more"):
        abtest.run(
            abtest.Config(
                log=save({k: v[keep] for k, v in log.items()}, tmp_path / "log.parquet"),
                control="a",
                srm_alpha=0,
            )
        )
    worse, better = abtest.Estimate(-2.0, 0.01, 50), abtest.Estimate(-1.0, 0.01, 50)
    assert (
        abtest.welch(worse, better).relative == 0.5 and abtest.welch(better, worse).relative == -1.0
    )


def test_a_plan_promises_what_a_test_then_needs(tmp_path, capsys):
    """A log without arms gives the users that a test with no effect would ask for."""
    log = draw_log(20_000)
    test = abtest.run(abtest.Config(log=save(log, tmp_path / "log.parquet"), control="a"))[
        "metrics"
    ]
    plain = abtest.run(abtest.Config(log=str(tmp_path / "log.parquet"), control="a", cuped=False))[
        "metrics"
    ]
    del log["arm"]
    config = abtest.Config(
        log=save(log, tmp_path / "past.parquet"), plan=True, daily=1000, mde=0.02
    )
    planned = abtest.run(config)["metrics"]
    said = capsys.readouterr().out
    assert "20,000 users; a change of 2.0%" in said and json.loads(
        (tmp_path / "plan.json").read_text()
    )
    assert list(planned) == list(abtest.METRICS)
    for name, m in planned.items():
        assert m["users"] == pytest.approx(plain[name]["users_needed"], rel=0.12), name
        assert m["users_cuped"] == pytest.approx(test[name]["users_needed"], rel=0.12), name
        assert f"{abtest.days_needed(m['users'], 1000):,}" in said
    for name in ("clicks", "impressions"):
        log[name] = np.zeros(20_000)
    assert (
        "CTR"
        not in abtest.run(abtest.Config(log=save(log, tmp_path / "past.parquet"), plan=True))[
            "metrics"
        ]
    )


def test_edges():
    one = abtest.Estimate(1.0, 0.0, 5)
    assert (
        abtest.welch(one, one).p == 1.0 and abtest.welch(one, abtest.Estimate(2.0, 0.0, 5)).p == 0.0
    )
    assert math.isnan(abtest.welch(abtest.Estimate(0.0, 0.1, 5), one).relative)
    with pytest.raises(PageLLMError, match="1 users"):
        abtest.estimate(np.ones(1))
    with pytest.raises(PageLLMError, match="tau"):
        abtest.always_valid([1.0], [1.0], 0.0)
    with pytest.raises(PageLLMError, match="no log ''"):
        abtest.run(abtest.Config())


def test_a_metric_of_zeros_is_reported_as_undefined(tmp_path):
    """Nobody bought: no relative change, no plan, no sequential test, and still valid JSON."""
    log = draw_log(1000)
    for name in ("gmv", "purchases", "purchase_sessions"):
        log[name] = np.zeros(1000)
    abtest.run(abtest.Config(log=save(log, tmp_path / "log.parquet"), control="a", daily=100))

    def refuse(word):
        raise AssertionError(word)

    m = json.loads((tmp_path / "abtest.json").read_text(), parse_constant=refuse)["metrics"]
    assert m["GMV per user"]["relative"] is None and m["GMV per user"]["sequential"] == {}
    assert m["GMV per user"]["p"] == 1.0 and m["CTR"]["relative"] is not None


@pytest.mark.parametrize("spelled", ["csv", "csv.gz", "parquet"])
def test_users_and_arms_are_text(tmp_path, spelled):
    """00000 and 0 are two users, and an arm called true is called so, in every format."""
    columns = {name: [1, 1, 1, 1] for name in abtest.COLUMNS}
    table = {"user": ["0", "00", "000", "0000"], "arm": ["true", "false"] * 2} | columns
    path = tmp_path / f"log.{spelled}"
    if spelled == "parquet":
        pq.write_table(pa.table(table | {"arm": [True, False] * 2}), path)
    else:
        with pa.output_stream(str(path), compression="detect") as stream:
            pyarrow.csv.write_csv(pa.table(table), stream)
    log = abtest.read_log(path)
    assert log["user"].tolist() == table["user"] and log["arm"].tolist() == table["arm"]
