"""A/B statistics of other designs than two independent groups of users: paired policies, shocks that all users of a day share, rare cases.

Sources: F8, common random numbers and the cluster bootstrap (Cameron, Gelbach & Miller 2008); F9, two-way clustering (Cameron, Gelbach &
Miller 2011); exact tests of two shares, Barnard (1945), Boschloo (1970), Fisher (1934). Shapes: U users, I observations, S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from monitoring.ab_stats import Comparison


def _checked(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    columns = [np.asarray(array, np.float64) for array in arrays]
    if len({len(column) for column in columns}) != 1 or len(columns[0]) < 2:
        raise ValueError(f"paired sums must be of the same two or more users, got {', '.join(str(len(column)) for column in columns)}")
    if columns[0].sum() <= 0 or columns[1].sum() <= 0 or columns[3].sum() <= 0:
        raise ValueError("the control's numerator and both denominators must not sum to 0: a relative lift does not exist")
    return columns


def paired_lift(x_a: np.ndarray, y_a: np.ndarray, x_b: np.ndarray, y_b: np.ndarray, alpha: float = 0.05) -> Comparison:
    """Relative lift of a ratio when both policies served the same users (F8): sums per user [U] of numerator x and denominator y.

    Identical policies differ by exactly 0 with a variance of 0.
    """
    x_a, y_a, x_b, y_b = _checked((x_a, y_a, x_b, y_b))
    users = len(x_a)
    ratio = float((x_b.sum() / y_b.sum()) / (x_a.sum() / y_a.sum()))
    z_U = ratio * ((x_b / x_b.mean() - y_b / y_b.mean()) - (x_a / x_a.mean() - y_a / y_a.mean()))
    error = float(z_U.std(ddof=1)) / math.sqrt(users)
    half = stats.t.ppf(0.5 + (1 - alpha) / 2, users - 1) * error
    value = ratio - 1
    p_value = 2 * stats.t.sf(abs(value) / error, users - 1) if error > 0 else float(value == 0)
    return Comparison(value, value - half, value + half, float(p_value), error, users - 1)


def paired_lift_bootstrap(
    x_a: np.ndarray, y_a: np.ndarray, x_b: np.ndarray, y_b: np.ndarray, generator: np.random.Generator, draws: int = 2000, alpha: float = 0.05
) -> Comparison:
    """`paired_lift` by the cluster bootstrap (F8): whole users are drawn with replacement, never their requests."""
    sums = np.stack(_checked((x_a, y_a, x_b, y_b)), axis=1)
    users, lifts = len(sums), np.empty(draws)
    step = max(1, 2**22 // users)
    for start in range(0, draws, step):
        stop = min(start + step, draws)
        totals = generator.multinomial(users, np.full(users, 1 / users), stop - start) @ sums
        lifts[start:stop] = (totals[:, 2] / totals[:, 3]) / (totals[:, 0] / totals[:, 1]) - 1
    total = sums.sum(axis=0)
    value = (total[2] / total[3]) / (total[0] / total[1]) - 1
    low, high = np.quantile(lifts, [alpha / 2, 1 - alpha / 2])
    p_value = min(1.0, 2 * (1 + min(int((lifts <= 0).sum()), int((lifts >= 0).sum()))) / (draws + 1))
    return Comparison(float(value), float(low), float(high), p_value, float(lifts.std(ddof=1)), math.inf)


def lift_over_seeds(lifts_S: Sequence[float], alpha: float = 0.05) -> Comparison:
    """Mean lift over worlds and trainings of different seeds, Student's interval with S - 1 degrees (F8). Five seeds or more."""
    lifts = np.asarray(lifts_S, np.float64)
    if len(lifts) < 2:
        raise ValueError(f"an interval over seeds needs two or more of them, got {len(lifts)}")
    mean, error, degrees = float(lifts.mean()), float(lifts.std(ddof=1)) / math.sqrt(len(lifts)), len(lifts) - 1
    half = stats.t.ppf(1 - alpha / 2, degrees) * error
    p_value = 2 * stats.t.sf(abs(mean) / error, degrees) if error > 0 else float(mean == 0)
    return Comparison(mean, mean - half, mean + half, float(p_value), error, degrees)


def cluster_variance(z_I: np.ndarray, group_I: np.ndarray) -> float:
    """Variance of the mean of z when observations of a group go together (V_g of F9); the number of groups G must be 2 or more."""
    z = np.asarray(z_I, np.float64)
    _, group = np.unique(np.asarray(group_I), return_inverse=True)
    groups = int(group.max()) + 1 if len(group) else 0
    if groups < 2:
        raise ValueError(f"clustering needs two or more groups, got {groups}")
    return float(groups / (groups - 1) * np.sum(np.bincount(group, z - z.mean()) ** 2) / len(z) ** 2)


def user_day_variance(z_I: np.ndarray, user_I: np.ndarray, day_I: np.ndarray) -> tuple[float, int]:
    """Variance of the mean of z with users and shared day shocks (F9), and its degrees of freedom, days - 1."""
    _, user = np.unique(np.asarray(user_I), return_inverse=True)
    _, day = np.unique(np.asarray(day_I), return_inverse=True)
    by_user, by_day, by_both = (cluster_variance(z_I, group) for group in (user, day, user * (day.max() + 1) + day))
    return max(by_user + by_day - by_both, by_user, by_day), int(day.max())


def lift_with_day_shocks(
    x_I: np.ndarray, y_I: np.ndarray, treated_I: np.ndarray, user_I: np.ndarray, day_I: np.ndarray, alpha: float = 0.05
) -> Comparison:
    """Relative lift of a ratio whose days are draws too (F9), on the log scale: sums x, y of each user and day.

    What this adds to the user's variance is what a lift owes to the days that happened to be in the test; NaN for one day.
    """
    x, y, treated = np.asarray(x_I, np.float64), np.asarray(y_I, np.float64), np.asarray(treated_I, bool)
    sums = [(x[side].sum(), y[side].sum()) for side in (~treated, treated)]
    unknown = Comparison(math.nan, math.nan, math.nan, math.nan, math.nan, math.nan)
    if min(min(pair) for pair in sums) <= 0 or len(np.unique(np.asarray(day_I))) < 2:
        return unknown
    (x_a, y_a), (x_b, y_b) = sums
    z = np.where(treated, x / x_b - y / y_b, y / y_a - x / x_a) * len(x)
    variance, degrees = user_day_variance(z, user_I, day_I)
    log_ratio, error = math.log((x_b / y_b) / (x_a / y_a)), math.sqrt(variance)
    half = stats.t.ppf(1 - alpha / 2, degrees) * error
    p_value = 2 * stats.t.sf(abs(log_ratio) / error, degrees) if error > 0 else float(log_ratio == 0)
    return Comparison(math.expm1(log_ratio), math.expm1(log_ratio - half), math.expm1(log_ratio + half), float(p_value), error, degrees)


def exact_shares_p(cases_a: int, users_a: int, cases_b: int, users_b: int, method: str = "boschloo") -> float:
    """Two-sided exact p-value that two shares of users are equal; for counts too small for F2. method: boschloo, barnard or fisher.

    Boschloo is Fisher's test without its loss of power; Barnard's Wald statistic is pooled.
    """
    if not (0 <= cases_a <= users_a and 0 <= cases_b <= users_b and users_a > 0 and users_b > 0):
        raise ValueError(f"cases must lie between 0 and the users of their arm, got {cases_a} of {users_a} and {cases_b} of {users_b}")
    table = [[cases_b, cases_a], [users_b - cases_b, users_a - cases_a]]
    if method == "fisher":
        return float(stats.fisher_exact(table).pvalue)
    if method not in ("boschloo", "barnard"):
        raise ValueError(f"method must be boschloo, barnard or fisher, got {method!r}")
    return float((stats.boschloo_exact if method == "boschloo" else stats.barnard_exact)(table).pvalue)
