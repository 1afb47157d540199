"""Whether the numbers may be read at all: the split, the completeness of the log, and arms whose traffic is short.

Broken traffic makes an experiment invalid (ABSTATS 7, rule 1); weaker signs are alarms. Each text names the arm, day or city.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from monitoring import ab_stats
from monitoring.facts import Facts, per_user

LEAST_USERS_OF_A_SPLIT = 50
"""Users below which a day or city is not tested for its split by itself."""
SHORT_TRAFFIC_P = 0.0005
"""p of the difference in requests per user below which an arm's traffic counts as short."""
LEAST_SHORTAGE = 0.01
"""Relative difference in requests per user that is worth an alarm."""


def split_problems(users: pd.DataFrame, requests: pd.DataFrame, arms: Sequence[str], shares: Sequence[float]) -> list[str]:
    """Sample ratio mismatch over the test, by day and by city (F6; days and cities with Benjamini-Hochberg).

    Args: users, one row per (arm, user); requests with arm, user_id, day, city_id.
    """
    problems = []
    counts = [int((users["arm"] == arm).sum()) for arm in arms]
    p = ab_stats.sample_ratio_p(counts, shares)
    if p < ab_stats.SRM_ALARM:
        problems.append(f"Users are not split as planned ({_against(arms, counts, shares)}; p = {p:.2g}): the assignment or the logging of one arm is broken.")
    rows = requests[requests["arm"].isin(arms)]
    looks: list[tuple[str, list[int], float]] = []
    for column, what in (("day", "On"), ("city_id", "In city")):
        if rows[column].nunique() < 2:
            continue
        seen = rows[[column, "arm", "user_id"]].drop_duplicates()
        tally = pd.crosstab(seen[column], seen["arm"]).reindex(columns=list(arms), fill_value=0)
        for value, row in tally[tally.sum(axis=1) >= LEAST_USERS_OF_A_SPLIT].iterrows():
            name = f"{what} {value:%Y-%m-%d}" if column == "day" else f"{what} {value}"
            looks.append((name, row.tolist(), ab_stats.sample_ratio_p(row.tolist(), shares)))
    if looks:
        for (name, row, _), adjusted in zip(looks, ab_stats.adjust_p_values([look[2] for look in looks], "bh"), strict=True):
            if adjusted < ab_stats.SRM_ALARM:
                problems.append(f"{name} users are not split as planned ({_against(arms, row, shares)}; adjusted p = {adjusted:.2g}).")
    return problems


def _against(arms: Sequence[str], counts: Sequence[int], shares: Sequence[float]) -> str:
    total = sum(counts)
    return ", ".join(f"{arm} {count:,} of {total * share:,.0f} expected" for arm, count, share in zip(arms, counts, shares, strict=True))


def lost_records(facts: Facts, arms: Sequence[str], responses: pd.DataFrame | None, least_completeness: float) -> list[str]:
    """Records that must have existed and are not in the log: answers that clients saw, slots above one that was shown, requests of impressions."""
    problems, most_lost = [], 1 - least_completeness
    orphans, shown = facts.counts.orphan_impressions, facts.counts.impressions
    if shown and orphans / shown > most_lost:
        problems.append(f"{orphans:,} of {shown:,} impressions have no request in the log ({100 * orphans / shown:.2f} %): requests were lost.")
    page = facts.impressions.groupby(["arm", "request_id"], observed=True)["slot"].agg(["size", "max"])
    for arm in arms:
        if arm in page.index.get_level_values(0):
            rows = page.loc[arm]
            missing, expected = int((rows["max"] - rows["size"]).sum()), int(rows["max"].sum())
            if expected and missing / expected > most_lost:
                problems.append(f"Arm {arm}: {missing:,} of {expected:,} impressions are missing from their pages ({100 * missing / expected:.2f} %): impressions were lost.")
        if responses is not None and not responses.empty:
            seen = responses.loc[responses["arm"] == arm, "request_id"].drop_duplicates()
            lost = int((~seen.isin(facts.requests["request_id"])).sum())
            if len(seen) and lost / len(seen) > most_lost:
                problems.append(f"Arm {arm}: the log lacks {lost:,} of the {len(seen):,} pages that clients saw ({100 * lost / len(seen):.2f} %).")
    return problems


def short_traffic(users: pd.DataFrame, before: pd.DataFrame | None, arms: Sequence[str]) -> list[str]:
    """Arms whose users ask for fewer pages than those of the control, with the users' own past taken out (CUPED, F4).

    Args: users, one row per (arm, user) with `requests`; before, the same of the reference period. A treatment may change how often people come:
    an alarm, not an invalid test.
    """
    alarms = []
    history = None if before is None or before.empty else before.groupby("user_id")["requests"].sum()

    def sums(arm: str) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        rows = users[users["arm"] == arm]
        past = np.zeros(len(rows)) if history is None else history.reindex(rows["user_id"]).fillna(0.0).to_numpy()
        return (rows["requests"].to_numpy(), np.ones(len(rows))), (past, np.ones(len(rows)))

    control = sums(arms[0])
    for arm in arms[1:]:
        treated = sums(arm)
        if min(len(control[0][0]), len(treated[0][0])) < LEAST_USERS_OF_A_SPLIT:
            continue
        adjusted = ab_stats.cuped(control[0], control[1], treated[0], treated[1])
        lift = ab_stats.lift(adjusted.a, adjusted.b)
        if lift.p_value < SHORT_TRAFFIC_P and abs(lift.value) > LEAST_SHORTAGE:
            less = arm if lift.value < 0 else arms[0]
            size = abs(lift.value) if lift.value < 0 else lift.value / (1 + lift.value)
            alarms.append(f"Traffic of arm {less} is short by {100 * size:.1f} % (requests per user, p = {lift.p_value:.2g}): lost requests, or users who come less often.")
    return alarms


def calibration_day_variance(before: Facts) -> float:
    """Variance of the logarithm of predicted over observed clicks from day to day, beyond what the users of a day explain.

    A policy that learns overnight is off by a little more or less each day. From successive differences (von Neumann 1941), so that a trend does not
    count; a little enlarged because it comes from few days. 0 below three days.
    """
    daily = [ab_stats.ratio_per_user(rows["predicted"].to_numpy(), rows["clicks"].to_numpy()) for _, rows in per_user(before, by=["day"]).groupby("day")]
    daily = [estimate for estimate in daily if estimate.value > 0]
    if len(daily) < 3:
        return 0.0
    steps = np.diff([math.log(estimate.value) for estimate in daily])
    sampling = float(np.mean([estimate.variance / estimate.value**2 for estimate in daily]))
    return max(0.0, float(np.mean(steps**2)) / 2 * (1 + 2 / len(daily)) - sampling)


def with_day_variance(estimate: ab_stats.Estimate, day_variance: float, days: int) -> ab_stats.Estimate:
    """A calibration over some days with the variance of its days added."""
    return replace(estimate, variance=estimate.variance + estimate.value**2 * day_variance / max(1, days))


def calibration_by_day(
    facts: Facts, arm_groups: Sequence[tuple[str, Sequence[str], ab_stats.Estimate]], margin: float, false_alarm_rate: float, day_variance: float = 0.0
) -> list[str]:
    """Days on which predicted over observed clicks left the expected ratio by more than the margin, and by more than chance.

    Args: arm_groups, (name, arms taken together, expected ratio with its own variance); false_alarm_rate, of a clean day: arms taken together get half of it;
    day_variance, of the logarithm of the ratio.
    """
    users = per_user(facts, by=["day"])
    alarms = []
    together = sum(len(arms) > 1 for _, arms, _ in arm_groups)
    alone = len(arm_groups) - together
    for name, arms, expected in arm_groups:
        days = []
        limit = false_alarm_rate / (2 * (together if len(arms) > 1 else alone) if together else alone)
        for day, rows in users[users["arm"].isin(list(arms))].groupby("day"):
            estimate = with_day_variance(ab_stats.ratio_per_user(rows["predicted"].to_numpy(), rows["clicks"].to_numpy()), day_variance, 1)
            off = ab_stats.lift(expected, estimate)
            if off.p_value < limit and abs(math.log1p(off.value)) > math.log1p(margin):
                days.append((f"{day:%Y-%m-%d}", off.value))
        if days:
            worst = max(days, key=lambda pair: abs(pair[1]))[1]
            first = days[0][0] + (f" and {len(days) - 1} more day{'s' if len(days) > 2 else ''}" if len(days) > 1 else "")
            size = f"{100 * worst:+.0f} %".replace("-", "\N{MINUS SIGN}")
            alarms.append(f"Calibration of {name} is off by {size} on {first}: predicted over observed clicks, {expected.value:.2f} was expected.")
    return alarms
