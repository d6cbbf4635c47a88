"""Online test of two arms from a user-level log (the paper's RQ5, Table 4).

Reads   a Parquet or CSV file with one line for each user; columns below
Writes  abtest.json beside it, and prints the table

    pagellm abtest --log log.parquet --control sft
    pagellm abtest --log past.parquet --plan --mde 0.02 --daily 5000

The second command plans a test, from what users did before it.

    user               identifier, at most once in the file
    arm                name of the arm the user was sent to; exactly two names; not needed by --plan
    impressions, clicks, sessions, purchases      counts over the test
    failed_sessions    sessions that were abandoned: no click and no purchase
    purchase_sessions  sessions with a purchase
    gmv                gross merchandise value, in the shop's currency
    day                optional: whole number, the user's first day in the test. With it, the
                       sequential test looks at the data after each day
    pre_<column>       optional: the same column over a period before the test, for CUPED
                       (variance reduction); empty counts as 0, as for a new user

A metric is a ratio of sums over users, sum x / sum y; for GMV and purchases y = 1. Users are
assigned to arms at random, not sessions, so the delta method treats users as independent. A ratio
is left out, and named, if its denominator is 0 for all users of an arm. Seconds for a million
users.
"""

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from pagellm.data.tables import ids_of, read_table, told
from pagellm.data.values import is_number
from pagellm.pages.stats import holm
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check, check_numbers
from pagellm.stage.files import write_json
from pagellm.stage.outputs import check_file, is_json_with

__all__ = [
    "COLUMNS",
    "Config",
    "Estimate",
    "METRICS",
    "Test",
    "always_valid",
    "compare",
    "days_needed",
    "detectable",
    "estimate",
    "finite",
    "plan",
    "read_log",
    "run",
    "sample_ratio",
    "t_sf",
    "users_needed",
    "welch",
]


COLUMNS = (
    "impressions",
    "clicks",
    "sessions",
    "failed_sessions",
    "purchase_sessions",
    "purchases",
    "gmv",
)
METRICS = {
    "GMV per user": ("gmv", ""),
    "CTR": ("clicks", "impressions"),
    "purchases per user": ("purchases", ""),
    "session failure": ("failed_sessions", "sessions"),
    "session purchase": ("purchase_sessions", "sessions"),
}
NORMAL = NormalDist()
LARGEST = 1e15  # largest value of a column, so that sums and squares do not overflow


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compare two arms of an online test."""

    log: str = ""  # Parquet or CSV file, one line for each user; for its columns see
    # python -m pydoc pagellm.online.abtest
    control: str = "control"  # name of the arm that the other is compared with
    alpha: float = 0.01  # error rate over all metrics together (Holm)
    power: float = 0.8  # probability with which a planned test finds a change of --mde
    mde: float = 0.02  # smallest relative change worth finding; used by the planner and by the
    # sequential test
    share: float = 0.5  # share of users meant to be in the treatment
    srm_alpha: float = 0.001  # refuse the test if the sample ratio has a p below this; 0: never
    daily: float = 0.0  # new users a day in both arms together; 0: plan no duration
    cuped: bool = True  # reduce the variance with the columns pre_<column>, if there are any
    plan: bool = False  # plan a test from users' earlier behaviour: how many users, how many days
    out: str = ""  # result file; empty: abtest.json beside the log, plan.json with --plan

    def __post_init__(self):
        check_numbers(self)
        check(
            self,
            alpha=(0 < self.alpha < 1, "between 0 and 1"),
            power=(0 < self.power < 1, "between 0 and 1"),
            share=(0 < self.share < 1, "between 0 and 1"),
            mde=(self.mde > 0, "above 0"),
            srm_alpha=(self.srm_alpha < 1, "below 1"),
        )


@dataclass(frozen=True)
class Estimate:
    """One arm's ratio of sums: its value, squared standard error and number of users."""

    value: float
    var: float
    n: int


@dataclass(frozen=True)
class Test:
    """Treatment against control on one metric.

    difference  treatment - control, with its standard error se and interval low..high at 1 - alpha
    relative    difference / |control|, with its interval relative_low..relative_high
    df          degrees of freedom; infinite where nothing varies
    p           two-sided
    """

    control: float
    treatment: float
    difference: float
    se: float
    low: float
    high: float
    relative: float
    relative_low: float
    relative_high: float
    df: float
    p: float


def estimate(
    x: np.ndarray, y: np.ndarray | None = None, pre: np.ndarray | None = None, theta: float = 0.0
) -> Estimate:
    """Ratio of sums over the users of an arm, with the variance of the delta method.

        R = sum x / sum y      z_i = (x_i - R y_i) / mean(y)      Var(R) = Var(z) / n

    x, y   (n,) one value for each user; y None: 1 for everybody, so that R is the plain mean
    pre    (n,) CUPED covariate with mean 0 over both arms
    theta  its coefficient: the estimate becomes R - theta mean(pre)
    Raises PageLLMError for fewer than 2 users or a denominator of 0.
    Source: Deng, Knoblich, Lu, KDD 2018, section 3; CUPED: Deng et al., WSDM 2013.
    """
    n = len(x)
    y = np.ones(n) if y is None else y
    if n < 2 or y.sum() <= 0:
        raise PageLLMError(
            f"{n} users with a denominator of {y.sum():g}: a standard error wants 2 users or more, "
            "and a denominator above 0"
        )
    value = x.sum() / y.sum()
    z = (x - value * y) / y.mean()
    if pre is not None:
        value, z = value - theta * pre.mean(), z - theta * (pre - pre.mean())
    return Estimate(float(value), float(z.var(ddof=1) / n), n)


def linear(x: np.ndarray, y: np.ndarray | None) -> np.ndarray:
    """Each user's influence z_i on the ratio of sums (see `estimate`), (n,), with mean 0."""
    y = np.ones(len(x)) if y is None else y
    return (x - x.sum() / y.sum() * y) / y.mean() if y.sum() > 0 else np.zeros(len(x))


def welch(control: Estimate, treatment: Estimate, alpha: float = 0.05) -> Test:
    """Welch's test of two independent estimates, with Satterthwaite's degrees of freedom.

    The relative change is the difference divided by |control|: an increase is positive even if
    returns make the control's value negative. Its interval comes from the delta method; it is NaN
    if the control's value is 0. If nothing varies, p is 1 for equal values and 0 for others.
    """
    difference, var = treatment.value - control.value, control.var + treatment.var
    se = math.sqrt(var)
    df = (
        var**2 / (control.var**2 / (control.n - 1) + treatment.var**2 / (treatment.n - 1))
        if var
        else math.inf
    )
    p = 2 * t_sf(abs(difference) / se, df) if se else float(difference == 0)
    half = se * t_quantile(1 - alpha / 2, df)
    relative = spread = math.nan
    if control.value:
        relative = difference / abs(control.value)
        spread = (
            NORMAL.inv_cdf(1 - alpha / 2)
            * math.sqrt(treatment.var + (treatment.value / control.value) ** 2 * control.var)
            / abs(control.value)
        )
    return Test(
        control.value,
        treatment.value,
        difference,
        se,
        difference - half,
        difference + half,
        relative,
        relative - spread,
        relative + spread,
        df,
        p,
    )


def t_sf(t: float, df: float) -> float:
    """P(T > t) of Student's t distribution, for any t and df > 0; df infinite: the normal's."""
    if math.isinf(df):
        return 0.5 * math.erfc(t / math.sqrt(2))
    if t < 0:
        return 1.0 - t_sf(-t, df)
    return 0.5 * beta_cdf(df / (df + t * t), df / 2, 0.5)


def t_quantile(p: float, df: float) -> float:
    """The t with P(T <= t) = p; 0.5 <= p < 1.

    Newton's method on t_sf from the normal's quantile. That lies below t, and t_sf is convex above
    0, so the steps rise to t and never pass it but for rounding.
    """
    t = NORMAL.inv_cdf(p)
    if math.isinf(df):
        return t
    scale = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    for _ in range(1000):  # far fewer are needed: a bound, should rounding keep the steps above 0
        density = math.exp(scale - (df + 1) / 2 * math.log1p(t * t / df))
        step = (t_sf(t, df) - (1 - p)) / density
        t += step
        if step <= 1e-14 * t:
            break
    return t


def beta_cdf(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function I_x(a, b).

    Its continued fraction (DLMF 8.17.22), evaluated by Lentz's method.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1.0 - beta_cdf(1 - x, b, a)
    front = (
        math.exp(
            math.lgamma(a + b)
            - math.lgamma(a)
            - math.lgamma(b)
            + a * math.log(x)
            + b * math.log1p(-x)
        )
        / a
    )
    tiny = 1e-300
    c = 1.0
    d = f = 1.0 / (1.0 - (a + b) * x / (a + 1) or tiny)
    for m in range(1, 20_000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / (1.0 + term * d or tiny)
            c = 1.0 + term / c or tiny
            f *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return front * f


def sample_ratio(counts, shares) -> float:
    """p of Pearson's chi-square test that users are spread over the arms as planned.

    counts  users of each arm
    shares  planned share of each arm, in any unit
    """
    counts, shares = np.asarray(counts, float), np.asarray(shares, float)
    want = counts.sum() * shares / shares.sum()
    statistic = float(((counts - want) ** 2 / want).sum())
    return float(
        torch.special.gammaincc(
            torch.tensor((len(counts) - 1) / 2, dtype=torch.float64),
            torch.tensor(statistic / 2, dtype=torch.float64),
        )
    )


def users_needed(
    sd: float, effect: float, alpha: float = 0.05, power: float = 0.8, share: float = 0.5
) -> float:
    """Users, in both arms together, with which a two-sided normal test finds an effect.

    sd      standard deviation of a user's influence on the metric (z in `estimate`)
    effect  absolute difference to find, with probability `power`; 0 takes infinitely many users
    share   share of users in the treatment
    """
    if effect == 0:
        return math.inf
    z = NORMAL.inv_cdf(1 - alpha / 2) + NORMAL.inv_cdf(power)
    return (z * sd / effect) ** 2 / (share * (1 - share))


def detectable(
    sd: float, users: float, alpha: float = 0.05, power: float = 0.8, share: float = 0.5
) -> float:
    """Absolute effect that a number of users, both arms together, find with probability `power`.

    The inverse of users_needed.
    """
    return math.sqrt(users_needed(sd, 1.0, alpha, power, share) / users)


def days_needed(users: float, daily: float) -> int:
    """Whole days until `users` have come, at `daily` new ones a day."""
    return math.ceil(users / daily)


def always_valid(difference, var, tau: float, alpha: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """p-values and interval half-widths that stay valid however often the test is looked at.

    The mixture sequential probability ratio test:

        L = sqrt(V / (V + tau^2)) exp(tau^2 d^2 / (2 V (V + tau^2)))
        p = min over looks so far of 1 / L

    difference  (looks,) estimate d at each look
    var         (looks,) its squared standard error V; infinite before there is any estimate
    tau         standard deviation of the normal mixture, in the difference's unit; fixed in advance
    Source: Johari, Pekelis, Walsh, arXiv 1512.04922, section 5.
    """
    d, V = np.asarray(difference, float), np.maximum(np.asarray(var, float), 1e-300)
    if tau <= 0:
        raise PageLLMError(
            f"sequential test with tau={tau:g}: want above 0; the control's value is 0, or --mde is"
        )
    log_ratio = 0.5 * np.log(V / (V + tau**2)) + tau**2 * d**2 / (2 * V * (V + tau**2))
    p = np.minimum.accumulate(np.exp(-np.maximum(log_ratio, 0.0)))
    half = np.sqrt(V * (V + tau**2) / tau**2 * (2 * math.log(1 / alpha) + np.log((V + tau**2) / V)))
    return p, half


def read_log(
    path: str | Path, arms: bool = True, said: list[str] | None = None
) -> dict[str, np.ndarray]:
    """Column -> (U,) array, checked; `arms` False: no column arm is asked for.

    said  is filled with a line about what was read and what was left over, if given
    Raises PageLLMError saying which column or user is wrong.
    """
    given, path = str(path), Path(path)
    if not path.is_file():
        raise PageLLMError(
            f"no log {given!r}; give one with --log (columns: user, arm, {', '.join(COLUMNS)})"
        )
    table = read_table(path, ("user", "arm"))
    who = ("user", "arm") if arms else ("user",)
    missing = [c for c in (*who, *COLUMNS) if c not in table.column_names]
    if missing:
        raise PageLLMError(
            f"{path} has no column {', '.join(missing)}; there are {', '.join(table.column_names)}"
        )
    if not len(table):
        raise PageLLMError(f"{path} has no lines; want one a user")
    log, blank = {}, {}
    for name in who:
        log[name] = np.array(ids_of(table, name, path))
    for name in table.column_names:
        if name in COLUMNS or name == "day" or name.removeprefix("pre_") in COLUMNS:
            try:
                log[name] = table[name].to_numpy().astype(np.float64)
            except (ValueError, TypeError):
                odd = [v for v in table[name].to_pylist() if not is_number(v) and v is not None]
                raise PageLLMError(
                    f"{path}: column {name} is not numbers, such as {str(odd[:1] or '')[:60]}; "
                    "decimals want a point"
                ) from None
            if name.startswith("pre_"):
                blank[name] = int(np.isnan(log[name]).sum())
                log[name] = np.where(np.isnan(log[name]), 0.0, log[name])
            wrong = ~(np.abs(log[name]) < LARGEST) | (log[name] < 0) & (
                name.removeprefix("pre_") != "gmv"
            )
            if wrong.any():
                first = int(wrong.argmax())
                raise PageLLMError(
                    f"{path}: column {name} is {log[name][first]:g} for user {log['user'][first]} "
                    f"({int(wrong.sum()):,} such); want numbers, none missing, not finite, below 0 "
                    f"or above {LARGEST:g}"
                )
    if said is not None:
        more = ("day", *(f"pre_{name}" for name in COLUMNS))
        taken = [name for name in table.column_names if name in log]
        said.append(told(path, table, taken, [name for name in more if name not in log]))
        said += [f"{name}: empty for {n:,} users, who count as 0" for name, n in blank.items() if n]
    user, count = np.unique(log["user"], return_counts=True)
    if (count > 1).any():
        twice = user[count.argmax()]
        where = (
            f" in arm {' and '.join(sorted(set(log['arm'][log['user'] == twice])))}" if arms else ""
        )
        raise PageLLMError(
            f"{path}: user {twice} has {count.max()} lines{where}; want one line a user, summed "
            "over the test, and nobody in two arms"
        )
    for part in ("failed_sessions", "purchase_sessions"):
        if (log[part] > log["sessions"]).any():
            raise PageLLMError(
                f"{path}: {part} above sessions for {int((log[part] > log['sessions']).sum())} "
                "users"
            )
    return log


def compare(
    log: dict[str, np.ndarray], control: str, metric: str, alpha: float = 0.05, cuped: bool = True
) -> tuple[Test, float]:
    """Test one metric of METRICS.

    Returns the Test, and the share of variance that CUPED removed (0 without pre_ columns).
    """
    top, bottom = METRICS[metric]
    arms = [log["arm"] == control, log["arm"] != control]
    x, y = log[top], log[bottom] if bottom else None

    def both(pre=None, theta=0.0) -> Test:
        first, second = (
            estimate(x[a], None if y is None else y[a], None if pre is None else pre[a], theta)
            for a in arms
        )
        return welch(first, second, alpha)

    plain = both()
    needed = [f"pre_{name}" for name in (top, bottom) if name]
    if not cuped or not all(name in log for name in needed):
        return plain, 0.0
    pre = linear(log[needed[0]], log[needed[1]] if bottom else None)
    z, c = (
        np.concatenate([v - v.mean() for v in parts])
        for parts in (
            [linear(x[a], None if y is None else y[a]) for a in arms],
            [pre[a] for a in arms],
        )
    )
    if not c.any():
        return plain, 0.0
    adjusted = both(pre, float(z @ c / (c @ c)))
    return adjusted, 1 - adjusted.se**2 / plain.se**2 if plain.se else 0.0


def defined(log: dict[str, np.ndarray], metric: str, arms: list[np.ndarray]) -> bool:
    """Whether the metric's denominator is above 0 in each of these arms, (U,) bool."""
    bottom = METRICS[metric][1]
    return not bottom or all(log[bottom][a].sum() > 0 for a in arms)


def sequence(log: dict, config: Config, metric: str) -> dict:
    """Sequential test: one look at the end of each day, at all users who have come so far.

    Returns the number of looks, the last always-valid p, its interval, and the first day on which p
    was below alpha; {} if no day has 100 users in both arms.
    """
    days, differences, variances, tau = [], [], [], 0.0
    for day in np.unique(log["day"]):
        so_far = {name: column[log["day"] <= day] for name, column in log.items()}
        if (
            min((so_far["arm"] == config.control).sum(), (so_far["arm"] != config.control).sum())
            < 100
        ):
            continue  # too few for the normal approximation
        if not defined(
            so_far, metric, [so_far["arm"] == config.control, so_far["arm"] != config.control]
        ):
            continue
        test, _ = compare(so_far, config.control, metric, config.alpha, config.cuped)
        tau = tau or config.mde * abs(test.control)  # fixed at the first look
        days.append(int(day))
        differences.append(test.difference)
        variances.append(test.se**2)
    if not days or not tau:
        return {}
    p, half = always_valid(differences, variances, tau, config.alpha)
    stop = np.flatnonzero(p < config.alpha)
    return {
        "looks": len(days),
        "p": float(p[-1]),
        "low": differences[-1] - float(half[-1]),
        "high": differences[-1] + float(half[-1]),
        "stopped_on_day": days[stop[0]] if len(stop) else None,
    }


def finite(value):
    """Replace NaN and infinity, which JSON does not have, by None in nested dicts and lists."""
    if isinstance(value, dict):
        return {name: finite(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(result: dict, config: Config) -> str:
    shown = f"{100 * (1 - config.alpha):g}%"
    lines = [
        f"{result['users'][0]:,} users in {result['control']}, {result['users'][1]:,} in "
        f"{result['treatment']}; sample ratio p = {result['sample_ratio_p']:.3f}",
        "",
        f"{'':<20}{result['control'][:10]:>11}{result['treatment'][:10]:>11}{'change':>9}   "
        f"{shown + ' interval':<19}{'p':>8}{'Holm':>8}{'CUPED':>7}{'finds':>8}"
        f"{'users for ' + format(config.mde, '.1%'):>17}{'sequential p':>14}",
    ]
    for name, m in result["metrics"].items():
        span = f"[{m['relative_low']:+.2%}, {m['relative_high']:+.2%}]"
        lines.append(
            f"{name:<20}{m['control']:>11.4f}{m['treatment']:>11.4f}{m['relative']:>+9.2%}   "
            f"{span:<19}{m['p']:>8.4f}{m['holm']:>8.4f}{-m['variance_saved']:>+7.0%}"
            f"{m['detectable']:>8.1%}{m['users_needed']:>17,.0f}"
            + (f"{m['sequential']['p']:>14.4f}" if m["sequential"] else f"{'–':>14}")
        )
    lines += [
        "",
        f"change: relative to {result['control']}; interval: for one metric alone; Holm: over all, "
        f"below {config.alpha:g} is a finding",
        "CUPED: change of the variance; finds: the relative change that these "
        f"users find with power {config.power:g}",
    ]
    lines += [
        f"{name}: left out, nobody of an arm has any {METRICS[name][1]}"
        for name in result["undefined"]
    ]
    return "\n".join(
        lines + duration({n: m["users_needed"] for n, m in result["metrics"].items()}, config)
    )


def duration(users: dict[str, float], config: Config) -> list[str]:
    """One line: days until all of these metrics have the users they need; none without --daily.

    users  metric -> users needed
    """
    wanted = {name: n for name, n in users.items() if 0 < n < math.inf}
    if not config.daily or not wanted:
        return []
    names = "all metrics find" if len(wanted) == len(METRICS) else f"{', '.join(wanted)}:"
    return [
        f"{names} {config.mde:.1%} after {days_needed(max(wanted.values()), config.daily):,} days "
        f"of {config.daily:,.0f} new users"
    ]


def plan(log: dict[str, np.ndarray], config: Config) -> dict[str, dict]:
    """Plan a test from a log of users before it, over as long a period as the test will last.

    Returns for each metric: value; sd, the standard deviation of a user's influence on it; users
    that finding --mde takes, both arms together; the same with CUPED, and the share of variance
    that the pre_ columns would remove.
    """
    found = {}
    for name, (top, bottom) in METRICS.items():
        if not defined(log, name, [np.ones(len(log[top]), bool)]):
            continue
        x, y = log[top], log[bottom] if bottom else None
        e, saved = estimate(x, y), 0.0
        needed = [f"pre_{part}" for part in (top, bottom) if part]
        if config.cuped and all(part in log for part in needed):
            z, c = linear(x, y), linear(log[needed[0]], log[needed[1]] if bottom else None)
            saved = float(z @ c) ** 2 / float((z @ z) * (c @ c)) if z.any() and c.any() else 0.0
        sd = math.sqrt(e.var * e.n)
        plain, cuped = (
            users_needed(
                sd * math.sqrt(1 - part),
                config.mde * e.value,
                config.alpha,
                config.power,
                config.share,
            )
            for part in (0.0, saved)
        )
        found[name] = {
            "value": e.value,
            "sd": sd,
            "users": plain,
            "variance_saved": saved,
            "users_cuped": cuped,
        }
    return found


def plan_table(found: dict[str, dict], users: int, config: Config) -> str:
    days = "".join(f"{'days':>9}{'with CUPED':>12}" if config.daily else "")
    lines = [
        f"{users:,} users; a change of {config.mde:.1%} at {100 * config.alpha:g}%, found with "
        f"power {config.power:g}, a share of {config.share:g} treated",
        "",
        f"{'':<20}{'now':>11}{'spread':>11}{'users':>14}{'CUPED':>7}{'with CUPED':>14}{days}",
    ]
    for name, m in found.items():
        line = (
            f"{name:<20}{m['value']:>11.4f}{m['sd']:>11.4f}{m['users']:>14,.0f}"
            f"{-m['variance_saved']:>+7.0%}{m['users_cuped']:>14,.0f}"
        )
        if config.daily:
            line += "".join(
                f"{days_needed(m[n], config.daily) if math.isfinite(m[n]) else math.inf:>{wide},}"
                for n, wide in (("users", 9), ("users_cuped", 12))
            )
        lines.append(line)
    return "\n".join(
        [
            *lines,
            "",
            "users: of both arms together, for one metric alone; days: whole days of "
            f"{config.daily:,.0f} new users"
            if config.daily
            else "users: of both arms together, for one metric alone",
        ]
    )


def result_file(config: Config) -> Path:
    """The file to write. Raises PageLLMError if it is one of something else."""
    path = Path(
        config.out or Path(config.log).with_name("plan.json" if config.plan else "abtest.json")
    )
    if config.out or not is_result(path):
        # Beside the log it may stand among the files of a simulated test.
        check_file(path, is_result, anywhere=not config.out)
    return path


def is_result(path: Path) -> bool:
    """Whether a file is a plan or a result of this command."""
    return is_json_with(path, "log", "metrics")


def run(config: Config) -> dict:
    """Print the table; write and return what abtest.json (with --plan: plan.json) holds."""
    said: list[str] = []
    log = read_log(config.log, not config.plan, said)
    path = result_file(config)
    print("\n".join(f"abtest: {line}" for line in said), flush=True)
    result: dict[str, Any]
    if config.plan:
        result = {
            "log": config.log,
            "read": said,
            "users": len(log["user"]),
            "mde": config.mde,
            "alpha": config.alpha,
            "power": config.power,
            "metrics": plan(log, config),
        }
        write_json(path, finite(result))
        print(f"{plan_table(result['metrics'], len(log['user']), config)}\n{path}")
        return result
    arms = sorted(set(log["arm"]))
    if len(arms) != 2 or config.control not in arms:
        raise PageLLMError(
            f"{config.log} has the arms {', '.join(arms)}; want two, one of them --control "
            f"{config.control}"
        )
    other = next(a for a in arms if a != config.control)
    counts = [int((log["arm"] == a).sum()) for a in (config.control, other)]
    ratio = sample_ratio(counts, [1 - config.share, config.share])
    if ratio < config.srm_alpha:
        raise PageLLMError(
            f"sample ratio mismatch: {counts[0]:,} users in {config.control}, {counts[1]:,} in "
            f"{other}, meant {1 - config.share:g} to {config.share:g}; p = {ratio:.2g}\n"
            "  Users were lost or sent wrongly in one arm, so no difference can be believed: find "
            "out why. --srm_alpha 0 shows the numbers all the same."
        )
    if min(counts) < 2:
        raise PageLLMError(
            f"{config.log}: {counts[0]:,} users in {config.control}, {counts[1]:,} in {other}; "
            "want 2 or more in each"
        )
    found, sides = {}, [log["arm"] == a for a in arms]
    for name in METRICS:
        if not defined(log, name, sides):
            continue
        test, saved = compare(log, config.control, name, config.alpha, config.cuped)
        users, share = sum(counts), counts[1] / sum(counts)
        # standard deviation of one user's influence, taken to be equal in both arms
        sd = test.se * math.sqrt(users * share * (1 - share))
        found[name] = {
            **asdict(test),
            "variance_saved": saved,
            "users_needed": users_needed(
                sd, config.mde * test.control, config.alpha, config.power, share
            ),
            "detectable": detectable(sd, users, config.alpha, config.power, share)
            / abs(test.control)
            if test.control
            else math.nan,
            "sequential": sequence(log, config, name) if "day" in log else {},
        }
    for m, p in zip(found.values(), holm([m["p"] for m in found.values()]), strict=True):
        m["holm"] = float(p)
    result = {
        "log": config.log,
        "read": said,
        "control": config.control,
        "treatment": other,
        "users": counts,
        "sample_ratio_p": ratio,
        "metrics": found,
        "undefined": [name for name in METRICS if name not in found],
    }
    write_json(path, finite(result))
    print(f"{table(result, config)}\n{path}")
    return result


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm abtest"))
