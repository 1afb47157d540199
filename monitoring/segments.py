"""Segments: lifts inside them, with correction; and click rates that left their past, by city, hour, category, advertiser, ad and user.

The second question is the one that finds a broken city or bought clicks. A segment's clicks on a day are compared with the law that its own
past predicts: a gamma prior over the dimension's segments (empirical Bayes) and its clicks before give a negative binomial for its clicks now
(Gelman et al., Bayesian Data Analysis, 2.6). Counts are divided by the dispersion that reference days show, so that users who click in
streaks and shared shocks of a day do not pass for news.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import betainc

from monitoring import ab_stats
from monitoring.drift import DriftConfig
from monitoring.facts import Facts, per_user

HOURS_PER_BLOCK = 4
LEAST_CHANGE = 0.2
"""Relative change of a click rate that is worth an alarm."""
LEAST_SEGMENT_USERS = 20
"""Users an arm must have in a segment for its lift to be shown."""
MOST_SEGMENTS = 12
"""Segments of one dimension whose lifts are shown, the largest first."""
UNKNOWN_DISPERSION = 2.0
"""Assumed where the past has one day only."""


def hour_block(timestamp: pd.Series, offset_minutes: pd.Series) -> pd.Series:
    """Local time of day as text, "08-11" for 8:00 to 11:59."""
    start = (timestamp + pd.to_timedelta(offset_minutes, unit="m")).dt.hour // HOURS_PER_BLOCK * HOURS_PER_BLOCK
    return start.map({hour: f"{hour:02d}-{hour + HOURS_PER_BLOCK - 1:02d}" for hour in range(0, 24, HOURS_PER_BLOCK)})


# ---------------------------------------------------------------------------------------------------------------------
# Lifts by segment


def _with_segments(facts: Facts, known_users: set[int] | None) -> Facts:
    requests = facts.requests.assign(hour=hour_block(facts.requests["event_timestamp"], facts.requests["utc_offset_minutes"]))
    if known_users is not None:
        requests["history"] = np.where(requests["user_id"].isin(known_users), "returning", "new")
    extra = requests[["request_id", "hour", *(["history"] if known_users is not None else [])]]
    return Facts(requests, facts.impressions.merge(extra, on="request_id", how="left", validate="many_to_one"), facts.counts)


def segment_lifts(facts: Facts, control: str, treatment: str, metrics: dict[str, tuple[str, str, str]], alpha: float, known_users: set[int] | None) -> list[dict[str, Any]]:
    """Relative lifts inside cities, hours and new or returning users; the user is the unit in each.

    Args: metrics, {name: (label, numerator, denominator)} in columns of `per_user`; known_users, those of the reference period (None: not known).
    Returns one record a segment and metric: dimension, segment, metric, label, users, lift, lift_low, lift_high, p, p_adjusted (Benjamini-Hochberg over all
    segments of the metric). Segments are chosen by size, never by result.
    """
    marked = _with_segments(facts, known_users)
    dimensions = [("city", "city_id"), ("local hour", "hour"), *([("users", "history")] if known_users is not None else [])]
    records: list[dict[str, Any]] = []
    for dimension, column in dimensions:
        users = per_user(marked, by=[column])
        users = users[users["arm"].isin((control, treatment))]
        sizes = users[column].value_counts()
        if len(sizes) < 2:
            continue
        for segment in sorted(sizes.index[:MOST_SEGMENTS]):
            rows = users[users[column] == segment]
            sides = [rows[rows["arm"] == arm] for arm in (control, treatment)]
            if min(len(side) for side in sides) < LEAST_SEGMENT_USERS:
                continue
            for name, (label, numerator, denominator) in metrics.items():
                arms = [ab_stats.ratio_per_user(side[numerator].to_numpy(), side[denominator].to_numpy()) for side in sides]
                lift = ab_stats.lift(*arms, alpha)
                record = {"dimension": dimension, "segment": str(segment), "metric": name, "label": label, "users": len(rows)}
                records.append(record | {"lift": lift.value, "lift_low": lift.low, "lift_high": lift.high, "p": lift.p_value})
    for name in metrics:
        mine = [record for record in records if record["metric"] == name and math.isfinite(record["p"])]
        for record, adjusted in zip(mine, ab_stats.adjust_p_values([record["p"] for record in mine], "bh") if mine else [], strict=True):
            record["p_adjusted"] = float(adjusted)
    return records


# ---------------------------------------------------------------------------------------------------------------------
# Click rates that left their past


@dataclass(frozen=True)
class RateChange:
    """A segment whose clicks are not what its past predicts."""

    dimension: str
    """"all traffic", "city", "local hour", "category", "advertiser", "ad" or "user"."""
    segment: str
    arms: str
    """Arms that were taken together: those with the policy of the past."""
    day: str
    """UTC day, or "all days"."""
    clicks: int
    expected: float
    impressions: int
    p: float

    @property
    def change(self) -> float:
        """Relative change of the click rate."""
        return self.clicks / self.expected - 1

    def text(self) -> str:
        """For the report's first screen."""
        what = "CTR of all traffic" if self.dimension == "all traffic" else f"CTR of {self.dimension} {self.segment}"
        change = f"{100 * self.change:+.0f} %".replace("-", "\N{MINUS SIGN}")
        guess = " Bought or automatic clicks look like this." if self.change > 0 and self.dimension in ("advertiser", "ad", "user") else ""
        return f"{what} is {change} against its past ({self.clicks:,} clicks, {self.expected:,.0f} expected; {self.arms}, {self.day}).{guess}"


DIMENSIONS = {"all traffic": "everything", "city": "city_id", "local hour": "hour", "category": "category_id", "advertiser": "advertiser_id", "ad": "ad_id", "user": "user_id"}
_COARSE = ("all traffic", "city", "local hour", "category")


def _marked(facts: Facts, ads: pd.DataFrame) -> pd.DataFrame:
    rows = facts.impressions.merge(facts.requests[["request_id", "utc_offset_minutes", "model_version"]], on="request_id", how="left", validate="many_to_one")
    rows["hour"], rows["everything"] = hour_block(rows["event_timestamp"], rows["utc_offset_minutes"]), "all"
    if not ads.empty:
        latest = ads.sort_values("event_timestamp").drop_duplicates("ad_id", keep="last").set_index("ad_id")
        for column in ("advertiser_id", "category_id"):
            rows[column] = rows["ad_id"].map(latest[column]).astype("Int64")
    return rows


def _by_day(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Impressions and clicks by (segment, day)."""
    return rows.groupby([column, "day"], observed=True)["click"].agg(imps="size", clicks="sum")


def dispersion(counts: pd.DataFrame) -> float:
    """Pearson's variance of daily clicks over the Poisson one, at its upper end for the days there are; 1 or more."""
    total = counts.groupby(level=0).sum()
    expected = counts["imps"] * (total["clicks"] / total["imps"]).reindex(counts.index.get_level_values(0)).to_numpy()
    kept = expected > 0
    freedom = int(kept.sum()) - int((total["clicks"] > 0).sum())
    if freedom < 1:
        return UNKNOWN_DISPERSION
    value = float((((counts["clicks"] - expected) ** 2)[kept] / expected[kept]).sum()) / freedom
    return max(1.0, value * (1 + 2 * math.sqrt(2 / freedom)))


def predictive_p(clicks: np.ndarray, imps: np.ndarray, past_clicks: np.ndarray, past_imps: np.ndarray, phi: float) -> tuple[np.ndarray, np.ndarray]:
    """(expected clicks, two-sided p) of segments [S] under the negative binomial that their past predicts.

    The prior over segments is a gamma law by the moments of the past rates; all counts are divided by the dispersion phi.
    """
    mean = past_clicks.sum() / max(past_imps.sum(), 1e-12)
    if not mean > 0:
        return np.full(len(clicks), math.nan), np.ones(len(clicks))
    seen = past_imps > 0
    between = float(np.sum((past_clicks[seen] - mean * past_imps[seen]) ** 2 - phi * mean * past_imps[seen]) / max(np.sum(past_imps[seen].astype(float) ** 2), 1e-12))
    between = max(between, (0.05 * mean) ** 2)
    shape, rate = mean**2 / between + past_clicks / phi, mean / between + past_imps / phi
    k, n = clicks / phi, imps / phi
    success = rate / (rate + n)
    lower = betainc(shape, k + 1, success)
    upper = np.where(k > 0, betainc(np.maximum(k, 1e-300), shape, 1 - success), 1.0)
    return imps * shape / rate, np.minimum(1.0, 2 * np.minimum(lower, upper))


def _changes(now: pd.DataFrame, past: pd.DataFrame, dimensions: tuple[str, ...], rate: float, arms: str, day: str, relative: bool, least: float) -> list[RateChange]:
    """Segments of `now` whose click rate left that of `past`; `relative`: apart from the change of all traffic."""
    found: list[RateChange] = []
    for dimension in dimensions:
        column = DIMENSIONS[dimension]
        if column not in now or column not in past:
            continue
        history = _by_day(past, column)
        before = history.groupby(level=0).sum()
        present = now.groupby(column, observed=True)["click"].agg(imps="size", clicks="sum")
        if present.empty or (dimension != "all traffic" and len(present) < 2 and len(before) < 2):
            continue  # ads that the catalogue does not know, or a single city, which is all traffic
        before = before.reindex(present.index, fill_value=0)
        scale = (now["click"].mean() / past["click"].mean()) if relative and past["click"].sum() and now["click"].sum() else 1.0
        columns = [frame[name].to_numpy(np.float64) for frame, name in ((present, "clicks"), (present, "imps"), (before, "clicks"), (before, "imps"))]
        expected, p = predictive_p(columns[0], columns[1] * scale, *columns[2:], dispersion(history))
        # Half of the rate is shared evenly, half by impressions: a large segment hides more harm, and there a change can be told.
        limit = rate / len(dimensions) * (0.5 / len(present) + 0.5 * columns[1] / columns[1].sum())
        for index in np.flatnonzero((p < limit) & (np.abs(columns[0] / np.maximum(expected, 1e-12) - 1) >= least)):
            clicks, imps = int(columns[0][index]), int(columns[1][index])
            found.append(RateChange(dimension, str(present.index[index]), arms, day, clicks, float(expected[index]), imps, float(p[index])))
    return found


def rate_changes(facts: Facts, ads: pd.DataFrame, before: Facts | None, past_ads: pd.DataFrame, arms: tuple[str, ...], config: DriftConfig) -> list[RateChange]:
    """Click rates that left their past on a day or over all days; the false alarm rate of the config is for each day.

    Arms whose policy wrote the reference logs are taken together and compared with those; every other arm with its own earlier days. If no arm has the
    policy of the reference logs, cities and hours are also compared with them, apart from what the policy changed as a whole.
    """
    rows = _marked(facts, ads)
    rows = rows[rows["arm"].isin(arms)]
    versions = {arm: set(rows.loc[rows["arm"] == arm, "model_version"]) for arm in arms}
    past = None if before is None else _marked(before, past_ads if ads.empty else pd.concat([past_ads, ads]))
    known = set() if past is None else set(past["model_version"])
    pooled = [arm for arm in arms if versions[arm] and versions[arm] <= known]
    days = sorted(rows["day"].unique())
    spans = [(f"{day:%Y-%m-%d}", rows["day"] == day) for day in days] + ([("all days", rows["day"].notna())] if len(days) > 1 else [])
    others = [arm for arm in arms if arm not in pooled and versions[arm]]
    groups = (1 if pooled else 0) + len(others)
    found: list[RateChange] = []
    for label, mask in spans:
        now = rows[mask]
        if pooled and past is not None:
            mine = past[past["model_version"].isin(set().union(*(versions[arm] for arm in pooled)))]
            text = f"arm{'s' if len(pooled) > 1 else ''} {', '.join(pooled)}"
            found += _changes(now[now["arm"].isin(pooled)], mine, tuple(DIMENSIONS), config.false_alarm_rate / groups, text, label, False, LEAST_CHANGE)
        for arm in others:
            here = now[now["arm"] == arm]
            earlier = rows[(rows["arm"] == arm) & (rows["day"] < here["day"].min())] if label != "all days" and len(here) else rows.iloc[:0]
            if len(earlier):
                found += _changes(here, earlier, tuple(DIMENSIONS), config.false_alarm_rate / groups, f"arm {arm}", label, False, LEAST_CHANGE)
            elif past is not None and not pooled and len(here):
                found += _changes(here, past, ("city", "local hour"), config.false_alarm_rate / groups, f"arm {arm}", label, True, 1.5 * LEAST_CHANGE)
    return sorted(found, key=lambda change: (_COARSE.index(change.dimension) if change.dimension in _COARSE else 9, change.p))


MOST_NAMED = 3
"""Segments of a dimension that the alarm names; the rest is counted."""


def summarise(changes: list[RateChange]) -> list[str]:
    """One text a dimension, the strongest segments first, each with the first day it was seen on."""
    texts = []
    for dimension in DIMENSIONS:
        mine: dict[str, list[RateChange]] = {}
        for change in changes:
            if change.dimension == dimension:
                mine.setdefault(change.segment, []).append(change)
        ranked = sorted(mine.values(), key=lambda group: min(change.p for change in group))
        for group in ranked[:MOST_NAMED]:
            dated = sorted((change for change in group if change.day != "all days"), key=lambda change: change.day)
            more = f" Also on {len(dated) - 1} later day{'s' if len(dated) > 2 else ''}." if len(dated) > 1 else ""
            texts.append((dated[0] if dated else group[0]).text() + more)
        if len(ranked) > MOST_NAMED:
            texts.append(f"{len(ranked) - MOST_NAMED} more of dimension {dimension} left their past; ab_result.json lists them.")
    return texts


