"""A/B statistics with the user as the unit of analysis. Pure NumPy and SciPy: sums in, named results out.

Arm A is control, arm B is treatment. Symbols follow the usual ones: R a ratio of sums, v the variance of an estimate, n users,
alpha the two-sided error, nu Welch degrees of freedom. Sources: delta method for ratio metrics, Deng, Knoblich & Lu (KDD 2018);
CUPED, Deng et al. (WSDM 2013); asymptotic confidence sequence, Waudby-Smith et al. (2021); sample ratio mismatch, Fabijan et al.
(KDD 2019); Benjamini & Hochberg (1995), Benjamini & Yekutieli (2001), Holm (1979); Fieller (1954).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.special import gammaln

SRM_ALARM = 0.0005
"""Sample ratio mismatch: p below this, or a Bayes factor above its inverse, makes a test invalid."""

SEQUENTIAL_LEAST_USERS = 500
"""The confidence sequence holds asymptotically: no look before this many users."""

WEAK_DENOMINATOR = 0.05
"""Fieller's g above which a relative lift is not shown: the control ratio is too uncertain to divide by."""


@dataclass(frozen=True)
class Estimate:
    """One arm's value of a metric."""

    value: float
    """R, e.g. clicks per impression."""
    variance: float
    """Variance of `value`, not of a user."""
    users: int
    """n, units of analysis."""


@dataclass(frozen=True)
class Comparison:
    """B against A: an absolute difference or a relative lift (0.05 = +5 %), with its interval."""

    value: float
    low: float
    high: float
    p_value: float
    standard_error: float
    degrees: float
    """Welch degrees of freedom; infinity for the always-valid form."""


def ratio_per_user(numerator_U: np.ndarray, denominator_U: np.ndarray) -> Estimate:
    """Ratio of sums over users, variance by the delta method (F1). A plain mean is the case of a denominator of ones."""
    x, y = np.asarray(numerator_U, np.float64), np.asarray(denominator_U, np.float64)
    return ratio_from_sums(len(x), x.sum(), y.sum(), x @ x, y @ y, x @ y)


def ratio_from_sums(users: int, sum_x: float, sum_y: float, sum_xx: float, sum_yy: float, sum_xy: float) -> Estimate:
    """F1 from sufficient sums: all that an incremental or distributed join has to carry. NaN where nothing can be said."""
    if users < 2 or sum_y <= 0:
        return Estimate(math.nan, math.nan, int(users))
    ratio = sum_x / sum_y
    residual = sum_xx - 2 * ratio * sum_xy + ratio**2 * sum_yy  # the residuals x - R*y sum to zero: no centring needed
    return Estimate(ratio, max(residual, 0.0) / (users - 1) * users / sum_y**2, int(users))


def mean_from_summary(mean: float, standard_deviation: float, users: int) -> Estimate:
    """A plain mean when only its summary is known."""
    return Estimate(mean, standard_deviation**2 / users, users)


def _welch(variance_a: float, users_a: int, variance_b: float, users_b: int) -> float:
    total = variance_a + variance_b
    return total**2 / (variance_a**2 / (users_a - 1) + variance_b**2 / (users_b - 1)) if total > 0 else math.inf


def difference(a: Estimate, b: Estimate, alpha: float = 0.05) -> Comparison:
    """R_B - R_A with Welch's t (F2). Two constants that agree differ by exactly 0."""
    value, variance = b.value - a.value, a.variance + b.variance
    error, degrees = math.sqrt(variance), _welch(a.variance, a.users, b.variance, b.users)
    half = stats.t.ppf(1 - alpha / 2, degrees) * error
    p_value = 2 * stats.t.cdf(-abs(value) / error, degrees) if error > 0 else (math.nan if math.isnan(value) else float(value == 0))
    return Comparison(value, value - half, value + half, float(p_value), error, degrees)


def lift_delta(a: Estimate, b: Estimate, alpha: float = 0.05) -> Comparison:
    """Relative lift R_B / R_A - 1, symmetric interval (F3, delta); its p-value is that of the relative scale."""
    if not a.value > 0:
        return _unknown()
    value = b.value / a.value - 1
    error = math.sqrt(b.variance / a.value**2 + a.variance * b.value**2 / a.value**4)
    degrees = _welch(a.variance, a.users, b.variance, b.users)
    half = stats.t.ppf(1 - alpha / 2, degrees) * error
    p_value = 2 * stats.t.cdf(-abs(value) / error, degrees) if error > 0 else float(value == 0)
    return Comparison(value, value - half, value + half, float(p_value), error, degrees)


def lift(a: Estimate, b: Estimate, alpha: float = 0.05) -> Comparison:
    """Relative lift with the log interval (F3): the one that is shown. `p_value` is that of the difference (F2): the one that decides."""
    if not (a.value > 0 and b.value > 0):
        return _unknown()
    term_a, term_b = a.variance / a.value**2, b.variance / b.value**2
    error, degrees = math.sqrt(term_a + term_b), _welch(term_a, a.users, term_b, b.users)
    ratio, factor = b.value / a.value, math.exp(stats.t.ppf(1 - alpha / 2, degrees) * error)
    return Comparison(ratio - 1, ratio / factor - 1, ratio * factor - 1, difference(a, b, alpha).p_value, error, degrees)


def lift_fieller(a: Estimate, b: Estimate, alpha: float = 0.05) -> Comparison:
    """Relative lift with Fieller's interval (F3), which agrees exactly with the p-value of the difference; NaN bounds if g >= 1."""
    if not a.value > 0:
        return _unknown()
    absolute = difference(a, b, alpha)
    t = stats.t.ppf(1 - alpha / 2, absolute.degrees)
    g, ratio = t**2 * a.variance / a.value**2, b.value / a.value
    if g >= 1:
        return Comparison(ratio - 1, math.nan, math.nan, absolute.p_value, math.nan, absolute.degrees)
    half = t / a.value * math.sqrt(max(b.variance + ratio**2 * a.variance - g * b.variance, 0.0))
    return Comparison(ratio - 1, (ratio - half) / (1 - g) - 1, (ratio + half) / (1 - g) - 1, absolute.p_value, math.nan, absolute.degrees)


def denominator_weakness(a: Estimate, b: Estimate, alpha: float = 0.05) -> float:
    """Fieller's g. Above `WEAK_DENOMINATOR` show the absolute difference only."""
    if not a.value > 0:
        return math.inf
    return float(stats.t.ppf(1 - alpha / 2, _welch(a.variance, a.users, b.variance, b.users)) ** 2 * a.variance / a.value**2)


def _unknown() -> Comparison:
    return Comparison(math.nan, math.nan, math.nan, math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Adjusted:
    """Both arms after CUPED."""

    a: Estimate
    b: Estimate
    theta: float
    correlation: float
    """Of the linearised metric with its pre-period; the variance falls by about its square."""


def cuped(now_a: Sequence[np.ndarray], before_a: Sequence[np.ndarray], now_b: Sequence[np.ndarray], before_b: Sequence[np.ndarray]) -> Adjusted:
    """CUPED for ratio metrics (F4). Each argument is (numerator [U], denominator [U]) of an arm, `before` strictly ahead of the first exposure.

    A user without history has zeros in `before`. If nobody has any, the estimates are returned as they are (theta 0).
    """

    def linear(pair: Sequence[np.ndarray], ratio: float | None = None) -> np.ndarray:
        x, y = (np.asarray(column, np.float64) for column in pair)
        return (x - (x.sum() / y.sum() if ratio is None else ratio) * y) / y.mean()

    plain_a, plain_b = ratio_per_user(*now_a), ratio_per_user(*now_b)
    if min(np.sum(before_a[1]), np.sum(before_b[1])) <= 0 or min(plain_a.users, plain_b.users) < 2:
        return Adjusted(plain_a, plain_b, 0.0, 0.0)
    pooled_now, pooled_before = (linear([np.concatenate(pair) for pair in zip(a, b, strict=True)]) for a, b in ((now_a, now_b), (before_a, before_b)))
    covariance = np.cov(pooled_now, pooled_before)
    theta = covariance[0, 1] / covariance[1, 1] if covariance[1, 1] > 0 else 0.0
    pooled_ratio = (np.sum(before_a[0]) + np.sum(before_b[0])) / (np.sum(before_a[1]) + np.sum(before_b[1]))

    def adjust(plain: Estimate, now: Sequence[np.ndarray], before: Sequence[np.ndarray]) -> Estimate:
        value = plain.value - theta * (np.sum(before[0]) / np.sum(before[1]) - pooled_ratio)
        return Estimate(float(value), float(np.var(linear(now) - theta * linear(before), ddof=1)) / plain.users, plain.users)

    spread = math.sqrt(covariance[0, 0] * covariance[1, 1])
    return Adjusted(adjust(plain_a, now_a, before_a), adjust(plain_b, now_b, before_b), float(theta), float(covariance[0, 1] / spread) if spread > 0 else 0.0)


def always_valid(value: float, variance: float, users: int, planned_users: int, alpha: float = 0.05) -> Comparison:
    """Confidence sequence (F5): holds at every look at once, so a test may be watched daily and stopped at will.

    Args: an estimate and its variance (of `difference` or `lift_delta`), users n of both arms now, planned n. Not for n < 500.
    """
    if not (users > 0 and planned_users > 0):
        raise ValueError(f"users and planned_users must be positive, got {users} and {planned_users}")
    if not variance > 0:
        return Comparison(value, -math.inf, math.inf, 1.0, math.sqrt(variance) if variance == 0 else math.nan, math.inf)
    rate = (-2 * math.log(alpha) + math.log(1 - 2 * math.log(alpha))) / planned_users
    scale = users * rate + 1
    half = math.sqrt(variance * users) * math.sqrt(2 * scale / (users**2 * rate) * math.log(math.sqrt(scale) / alpha))
    p_value = min(1.0, math.sqrt(scale) * math.exp(-rate * users * (value**2 / variance) / (2 * scale)))
    return Comparison(value, value - half, value + half, p_value, math.sqrt(variance), math.inf)


def sample_ratio_p(counts: Sequence[int], shares: Sequence[float]) -> float:
    """Chi-square p-value that users were split as planned (F6), no continuity correction."""
    observed, planned = np.asarray(counts, np.float64), np.asarray(shares, np.float64)
    if not math.isclose(planned.sum(), 1.0, rel_tol=1e-9):
        raise ValueError(f"shares must sum to 1, got {list(shares)}")
    expected = observed.sum() * planned
    return float(stats.chi2.sf(np.sum((observed - expected) ** 2 / expected), len(observed) - 1)) if observed.sum() > 0 else 1.0


def sample_ratio_log_bayes(counts: Sequence[int], shares: Sequence[float], concentration: float = 100.0) -> float:
    """ln of the Bayes factor against the planned split (F6), valid at every daily look; alarm above -ln(SRM_ALARM)."""
    observed, prior = np.asarray(counts, np.float64), concentration * np.asarray(shares, np.float64)
    total = observed.sum()
    terms = gammaln(prior + observed) - gammaln(prior) - observed * np.log(np.asarray(shares, np.float64))
    return float(gammaln(concentration) - gammaln(concentration + total) + terms.sum())


def adjust_p_values(p_values: Sequence[float], method: str) -> np.ndarray:
    """Adjusted p-values (F7), in the order given. `method`: "holm" (several primaries), "bh" (segments, exploration), "by" (bh under any dependence)."""
    p = np.asarray(p_values, np.float64)
    if method not in ("holm", "bh", "by"):
        raise ValueError(f"method must be holm, bh or by, got {method!r}")
    if not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"p-values must lie in [0, 1], got {p.tolist()}")
    count, order = len(p), np.argsort(p, kind="stable")
    rank, adjusted = np.arange(1, count + 1), np.empty(count)
    if method == "holm":
        adjusted[order] = np.minimum(np.maximum.accumulate((count - rank + 1) * p[order]), 1.0)
    else:
        factor = 1.0 if method == "bh" else float(np.sum(1 / rank))
        adjusted[order] = np.minimum.accumulate(np.minimum(factor * count * p[order] / rank, 1.0)[::-1])[::-1]
    return adjusted


def relative_spread(estimate: Estimate) -> float:
    """kappa squared (F10): variance of one user's linearised metric over the ratio's square; what a planner needs of a metric."""
    return estimate.variance * estimate.users / estimate.value**2


def _power_quantiles(power: float, alpha: float) -> float:
    return float(stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power))


def users_needed(kappa_squared: float, true_lift: float, arms_ratio: float = 1.0, power: float = 0.8, alpha: float = 0.05) -> int:
    """Users of arm A to find a relative lift (F10); arm B needs `arms_ratio` times as many. For a guardrail of margin m pass -m (F11)."""
    z = _power_quantiles(power, alpha)
    return math.ceil(z**2 * kappa_squared * (1 + 1 / arms_ratio) / math.log1p(true_lift) ** 2)


PLAN_RESERVE = 0.1
"""Share of users that a plan asks for on top of F10: its spread comes from a pilot, and 80 % is to be reached, not approached."""


def plan_users(pilot: Estimate, true_lift: float, arms_ratio: float = 1.0, power: float = 0.8, alpha: float = 0.05) -> int:
    """Users of arm A to plan for, from a pilot of the same length as the test: F10 with `PLAN_RESERVE`. Arm B: `arms_ratio` times as many."""
    return math.ceil((1 + PLAN_RESERVE) * users_needed(relative_spread(pilot), true_lift, arms_ratio, power, alpha))


def least_detectable_lift(kappa_squared: float, users_a: int, users_b: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """MDE (F10): the true relative lift that a test of this size finds with the given power."""
    return math.exp(_power_quantiles(power, alpha) * math.sqrt(kappa_squared * (1 / users_a + 1 / users_b))) - 1


def planned_look_bounds(fractions: Sequence[float], alpha: float = 0.05, grid: int = 1201) -> np.ndarray:
    """Two-sided z bounds for looks at the given fractions of the planned size, spending alpha * t^2 (F12).

    The density of the score process S_t (Brownian, variance t) inside the earlier bounds is carried on a grid from look to look.
    """
    times = np.asarray(fractions, np.float64)
    if not (np.all(np.diff(times) > 0) and times[0] > 0 and times[-1] <= 1):
        raise ValueError(f"fractions must rise within (0, 1], got {list(fractions)}")
    bounds, spent, time, points, mass = [], 0.0, 0.0, np.zeros(1), np.ones(1)
    for t in times:
        step = math.sqrt(t - time)
        target = alpha * t**2 - spent

        def crossing(bound: float, t: float = t, step: float = step, points: np.ndarray = points, mass: np.ndarray = mass) -> float:
            edge = bound * math.sqrt(t)
            return float(mass @ (stats.norm.sf((edge - points) / step) + stats.norm.cdf((-edge - points) / step)))

        low, high = 0.0, 12.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if crossing(middle) > target else (low, middle)
        bounds.append((low + high) / 2)
        edge = bounds[-1] * math.sqrt(t)
        nodes = np.linspace(-edge, edge, grid)
        weights = np.full(grid, 2.0)  # Simpson's rule: 1 4 2 4 ... 4 1
        weights[1::2], weights[[0, -1]] = 4.0, 1.0
        density = stats.norm.pdf(nodes[:, None], points[None, :], step) @ mass
        points, mass = nodes, density * weights * (nodes[1] - nodes[0]) / 3
        spent, time = alpha * t**2, t
    return np.array(bounds)
