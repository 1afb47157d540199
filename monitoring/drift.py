"""Drift of features, scores, bids and prices against the reference period, measured by Evidently's statistics.

A distance between two samples is never zero, people differ from day to day, and a user's rows go together. So each column's threshold is the
larger of the configured one and what clean days show: reference days, with as many users as the experiment has on a day, are compared as the
experiment's days are, a gamma law is fitted to their distances, and its quantile is the alarm at which all columns together raise a false one
on a clean day with the configured probability. Methods fit the type: Jensen-Shannon distance for codes, Wasserstein distance in units of the
reference's standard deviation for amounts. A column that has become constant is named as such.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field as plain_field
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from scipy import stats
from scipy.spatial.distance import jensenshannon

from marketplace import logs
from marketplace.schema import ACTION_VISIT, distance_km
from monitoring.facts import Facts


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class DriftConfig:
    """When a shift counts as drift."""

    numeric_threshold: float = Field(0.1, gt=0)
    """Wasserstein distance over the reference's standard deviation, least alarm."""
    categorical_threshold: float = Field(0.1, gt=0)
    """Jensen-Shannon distance (natural logarithm, 0 to 0.83), least alarm."""
    false_alarm_rate: float = Field(0.001, gt=0, lt=0.5)
    """Probability that a clean day raises any alarm of one family (drift, segments, calibration, traffic)."""
    noise_draws: int = Field(40, ge=10)
    """Comparisons of reference days that a column's noise is learnt from."""
    policy_days: int = Field(3, ge=1)
    """Last reference days that a policy's own quantities are compared with: a policy that learns overnight is compared with its recent self."""
    reference_days: int = Field(14, ge=1)
    """Most recent days of the reference logs that are compared with."""
    least_rows: int = Field(200, ge=2)
    """Fewer rows on either side: no statement."""
    most_rows: int = Field(20_000, ge=1000)
    """Rows of one column and side beyond which a seeded sample is compared."""
    seed: int = 0
    """Of the samples."""


Kind = Literal["numeric", "categorical"]
METHODS: dict[Kind, str] = {"numeric": "wasserstein", "categorical": "jensenshannon"}
METHOD_NAMES = {"wasserstein": "Wasserstein / sd", "jensenshannon": "Jensen-Shannon"}


@plain_dataclass(frozen=True)
class DriftColumn:
    """One watched quantity: two frames with columns value, day (UTC midnight, without zone: quick to group) and unit (user or ad; what is drawn as a whole)."""

    name: str
    group: Literal["feature", "score", "bid", "price"]
    kind: Kind
    current: pd.DataFrame
    reference: pd.DataFrame
    ordinary: pd.DataFrame | None = None
    """Days whose differences are ordinary, for the threshold; None: the reference itself."""
    window: int | None = None
    """Days before a day that it is compared with; None: all the others."""
    least: float = 0.0
    """Least threshold of this column, if above the configured one."""


@plain_dataclass(frozen=True)
class DriftRow:
    """Result for one column. `score` beyond `threshold` is drift; `days` are the experiment's days that are beyond it by themselves."""

    name: str
    group: str
    method: str
    score: float
    threshold: float
    drifted: bool
    days: list[str]
    constant: bool
    """Only one value is left, where the reference has several."""
    note: str
    current_summary: str
    reference_summary: str


@plain_dataclass(frozen=True)
class LogTables:
    """What drift looks at besides the facts: catalogue and profiles of a folder of logs."""

    ads: pd.DataFrame
    users: pd.DataFrame
    behaviours: pd.DataFrame = plain_field(default_factory=pd.DataFrame)


def read_tables(folder: Path, first: date | None = None, behaviour_days: int = 14) -> LogTables:
    """Catalogue, profiles and the last days of behaviours of a folder; empty frames where a folder (a traffic export, say) has none.

    `first`: no behaviours before it, as a folder of traffic may bring a history along.
    """
    frames = {}
    for name in ("ads", "users", "behaviours"):
        if not (Path(folder) / name).is_dir():
            frames[name] = pd.DataFrame()
            continue
        days = [day for day in logs.days_of(folder, name) if first is None or day >= first][-behaviour_days:] if name == "behaviours" else None
        frames[name] = logs.read_table(folder, name, days)
    return LogTables(**frames)


def _frame(rows: pd.DataFrame, values: Any, unit: str) -> pd.DataFrame:
    frame = pd.DataFrame({"value": np.asarray(values), "day": rows["event_timestamp"].to_numpy("datetime64[s]").astype("datetime64[D]").astype("datetime64[s]"), "unit": rows[unit].to_numpy()})
    return frame[pd.notna(frame["value"])]


def _latest_rows(frame: pd.DataFrame, days: int, by: str | None = None) -> pd.DataFrame:
    """Rows of the last days of a table (by its time) or of a column's frame (by its day)."""
    of = frame["event_timestamp"].dt.floor("D") if by is None else frame[by]
    return frame[of.isin(sorted(of.unique())[-days:])]


def _latest(facts: Facts, days: int) -> Facts:
    wanted = sorted(facts.requests["day"].unique())[-days:]
    return Facts(facts.requests[facts.requests["day"].isin(wanted)], facts.impressions[facts.impressions["day"].isin(wanted)], facts.counts)


def _request_columns(facts: Facts, tables: LogTables) -> dict[str, pd.DataFrame]:
    rows = facts.requests
    local = rows["event_timestamp"] + pd.to_timedelta(rows["utc_offset_minutes"], unit="m")
    columns = {
        "hour of day, local": _frame(rows, local.dt.hour, "user_id"),
        "city": _frame(rows, rows["city_id"], "user_id"),
        "request latitude": _frame(rows, rows["latitude"], "user_id"),
        "request longitude": _frame(rows, rows["longitude"], "user_id"),
        "ads asked for": _frame(rows, rows["slots"], "user_id"),
    }
    if not tables.users.empty:
        latest = tables.users.sort_values("event_timestamp").drop_duplicates("user_id", keep="last").set_index("user_id")
        for name, column in (("user age band", "age_band"), ("user gender", "gender"), ("user home latitude", "home_latitude"), ("user home longitude", "home_longitude")):
            columns[name] = _frame(rows, rows["user_id"].map(latest[column]), "user_id")
    return columns


def _behaviour_columns(behaviours: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Organic visits only: what a policy shows changes the clicks."""
    rows = behaviours[behaviours["action"] == ACTION_VISIT]
    return {
        "behaviour: category": _frame(rows, rows["category_id"], "user_id"),
        "behaviour: latitude": _frame(rows, rows["latitude"], "user_id"),
        "behaviour: longitude": _frame(rows, rows["longitude"], "user_id"),
    }


def _bid_change_columns(impressions: pd.DataFrame, reference: pd.DataFrame, label: str) -> dict[str, pd.DataFrame]:
    """An ad's bid over its own mean bid in the reference period, as a logarithm: the same for every policy, whatever ads it chooses."""
    before = np.log(reference.groupby("ad_id")["bid"].mean())
    rows = impressions[impressions["ad_id"].isin(before.index)]
    return {f"bid over the ad's earlier bid, {label}": _frame(rows, np.log(rows["bid"]) - rows["ad_id"].map(before), "user_id")}


def _catalogue_columns(ads: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {
        "catalogue: category": _frame(ads, ads["category_id"], "ad_id"),
        "catalogue: price band": _frame(ads, ads["price_band"], "ad_id"),
        "catalogue: bid": _frame(ads, ads["bid"], "ad_id"),
        "catalogue: reserve": _frame(ads, ads["reserve"], "ad_id"),
    }


def _page_columns(impressions: pd.DataFrame, requests: pd.DataFrame, ads: pd.DataFrame, label: str) -> dict[str, pd.DataFrame]:
    """Scores, bids and prices of the ads that one policy showed; exploration (propensity below one half) is not its choice and is left out."""
    rows = impressions[impressions["propensity"] >= 0.5]
    columns = {
        f"pctr, {label}": _frame(rows, rows["pctr"], "user_id"),
        f"bid of shown ads, {label}": _frame(rows, rows["bid"], "user_id"),
        f"price per click, {label}": _frame(rows, rows["payment"], "user_id"),
    }
    if not ads.empty:
        places = ads.drop_duplicates("ad_id", keep="last").set_index("ad_id")
        at = requests.set_index("request_id")
        distance = distance_km(
            *(rows["request_id"].map(at[c]).to_numpy(np.float64) for c in ("latitude", "longitude")),
            *(rows["ad_id"].map(places[c]).to_numpy(np.float64) for c in ("latitude", "longitude")),
        )
        columns[f"distance to shown ads, km, {label}"] = _frame(rows, distance, "user_id")
    return columns


_CATEGORICAL = {"hour of day, local", "city", "ads asked for", "user age band", "user gender", "catalogue: category", "catalogue: price band", "behaviour: category"}


def _group(name: str) -> Literal["feature", "score", "bid", "price"]:
    if "pctr" in name:
        return "score"
    return "price" if "price per click" in name or "reserve" in name else "bid" if "bid" in name else "feature"


LEAST_BID_CHANGE = 0.05
"""Change of an ad's bid over its earlier bid that is worth an alarm, as a logarithm; daily jitter is far below."""


LEAST_SPREAD = 0.001
"""Evidently's floor of the standard deviation that it divides by."""


def watched_columns(current: Facts, tables: LogTables, reference: Facts, reference_tables: LogTables, arms: Sequence[str], config: DriftConfig) -> list[DriftColumn]:
    """The columns that can be compared fairly. `arms`: control first, then the treatments.

    What users bring is compared over all arms. What a policy shows is compared only with the same policy: an arm whose version wrote reference logs with
    their last days, another arm with its own first day once it has a second one (how much days differ is then learnt from the reference logs).
    Otherwise the experiment itself would read as drift. What an ad bids over its own earlier bid is the same for every policy.
    """
    reference = _latest(reference, config.reference_days)
    now, before = _request_columns(current, tables), _request_columns(reference, reference_tables)
    if not tables.ads.empty and not reference_tables.ads.empty:
        now |= _catalogue_columns(tables.ads)
        before |= _catalogue_columns(_latest_rows(reference_tables.ads, config.reference_days))
    if not tables.behaviours.empty and not reference_tables.behaviours.empty:
        now |= _behaviour_columns(tables.behaviours)
        before |= _behaviour_columns(_latest_rows(reference_tables.behaviours, config.reference_days))
    columns = [_column(name, now[name], before[name]) for name in now if name in before]
    for arm in arms:
        shown = current.impressions[current.impressions["arm"] == arm]
        if shown.empty:
            continue
        for name, frame in _bid_change_columns(shown, reference.impressions, arm).items():
            ordinary = _bid_change_columns(reference.impressions, reference.impressions, arm)[name]
            columns.append(_column(name, frame, ordinary, least=LEAST_BID_CHANGE / max(float(ordinary["value"].std()), LEAST_SPREAD)))
        versions = set(current.requests.loc[current.requests["arm"] == arm, "model_version"])
        same = reference.requests[reference.requests["model_version"].isin(versions)]
        if len(same):
            past = reference.impressions[reference.impressions["request_id"].isin(same["request_id"])]
            now = _page_columns(shown, current.requests, tables.ads, arm)
            ordinary = _page_columns(past, reference.requests, reference_tables.ads, arm)
            columns += [_column(n, now[n], _latest_rows(o, config.policy_days, "day"), o, config.policy_days) for n, o in ordinary.items() if n in now]
        elif shown["day"].min() < shown["day"].max():
            first, label = shown["day"] == shown["day"].min(), f"{arm}, against its first day"
            now, before = (_page_columns(shown[side], current.requests, tables.ads, label) for side in (~first, first))
            ordinary = _page_columns(reference.impressions, reference.requests, reference_tables.ads, label)
            columns += [_column(n, now[n], before[n], ordinary.get(n), 1) for n in now if n in before]
    return columns


def _column(name: str, current: pd.DataFrame, reference: pd.DataFrame, ordinary: pd.DataFrame | None = None, window: int | None = None, least: float = 0.0) -> DriftColumn:
    return DriftColumn(name, _group(name), "categorical" if name in _CATEGORICAL else "numeric", current, reference, ordinary, window, least)


def distance(reference: np.ndarray, current: np.ndarray, kind: Kind) -> float:
    """Evidently's drift score of one column: the function behind its ValueDrift, without the drawing."""
    from evidently.legacy.calculations.stattests import jensenshannon_stat_test, wasserstein_stat_test
    from evidently.legacy.core import ColumnType

    test, column = (wasserstein_stat_test, ColumnType.Numerical) if kind == "numeric" else (jensenshannon_stat_test, ColumnType.Categorical)
    return float(test(pd.Series(reference), pd.Series(current), column, None).drift_score)


def _sample(values: np.ndarray, config: DriftConfig) -> np.ndarray:
    """At most `most_rows` of the values; the same ones on every call."""
    return values if len(values) <= config.most_rows else np.random.default_rng(config.seed).choice(values, config.most_rows, replace=False)


NOISE_ROWS = 3_000
"""Rows of either side in one comparison of reference days."""


def _quick_distance(reference: np.ndarray, current: np.ndarray, kind: Kind) -> float:
    """`distance` without Evidently's frames: for the many comparisons that a threshold is learnt from. A test holds the two equal."""
    if kind == "numeric":
        return float(stats.wasserstein_distance(reference, current) / max(float(np.std(reference)), LEAST_SPREAD))
    codes, inverse = np.unique(np.concatenate([reference, current]), return_inverse=True)
    shares = [np.bincount(side, minlength=len(codes)) / len(side) for side in (inverse[: len(reference)], inverse[len(reference) :])]
    return float(jensenshannon(*shares))


def _draws(column: DriftColumn, config: DriftConfig) -> np.ndarray:
    """Distances of ordinary days from the days that they would be compared with, each side with as many units (users, ads) as the experiment has."""
    ordinary = column.reference if column.ordinary is None else column.ordinary
    generator = np.random.default_rng(config.seed)
    units = max(1, int(column.current.groupby("day")["unit"].nunique().median()))
    codes = pd.factorize(ordinary["unit"])[0]
    values, day = ordinary["value"].to_numpy(), ordinary["day"].to_numpy()
    rows_of = [np.flatnonzero(day == one) for one in np.unique(day)]
    drawn: list[float] = []

    def by_units(rows: np.ndarray) -> np.ndarray:
        present = np.zeros(codes.max() + 1, bool)
        present[codes[rows]] = True
        chosen = np.flatnonzero(present)
        if len(chosen) > units:
            present[generator.choice(chosen, len(chosen) - units, replace=False)] = False
            rows = rows[present[codes[rows]]]
        return some(rows)

    def some(rows: np.ndarray) -> np.ndarray:
        return values[rows if len(rows) <= NOISE_ROWS else generator.choice(rows, NOISE_ROWS, replace=False)]

    if len(rows_of) < 2:  # one day, in two halves of its units
        half = np.isin(codes, generator.permutation(np.unique(codes))[::2])
        pairs = [(np.flatnonzero(half), np.flatnonzero(~half))]
    else:
        others = [
            np.concatenate([rows_of[other] for other in (range(len(rows_of)) if column.window is None else range(max(0, index - column.window), index)) if other != index] or [np.empty(0, np.int64)])
            for index in range(len(rows_of))
        ]
        pairs = [(one, other) for one, other in zip(rows_of, others, strict=True) if len(other)]
    for _ in range(math.ceil(config.noise_draws / len(pairs))):
        for one, other in pairs:
            left, right = by_units(one), by_units(other) if column.window == 1 else some(other)  # a day of its own is as small as the current one
            if min(len(left), len(right)) >= 2:
                drawn.append(_quick_distance(right, left, column.kind))
    return np.array(drawn)


def noise_threshold(column: DriftColumn, config: DriftConfig, columns: int) -> float:
    """The distance that clean days exceed with the configured probability, shared among `columns`; 0 if nothing is known.

    A gamma law by the draws' mean and variance, which is a little enlarged because it comes from few days.
    """
    drawn = _draws(column, config)
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < 2 or drawn.max() <= 0:
        return 0.0
    days = max(2, (column.reference if column.ordinary is None else column.ordinary)["day"].nunique())
    mean, variance = float(drawn.mean()), float(drawn.var(ddof=1)) * (1 + 2 / days) + 1e-24
    return float(stats.gamma.isf(config.false_alarm_rate / columns, mean**2 / variance, scale=variance / mean))


def _constant_days(column: DriftColumn, config: DriftConfig) -> list[str]:
    """Days on which one value is left where the reference has several, and too many units for that to be chance."""
    share = column.reference["value"].value_counts(normalize=True)
    if len(share) < 2:
        return []
    return [
        f"{day:%Y-%m-%d}"
        for day, rows in column.current.groupby("day")
        if len(rows) >= config.least_rows and (rows["value"] == rows["value"].iloc[0]).all() and rows["unit"].nunique() * math.log(share.iloc[0]) < math.log(config.false_alarm_rate) - 5
    ]


def _summary(values: np.ndarray, kind: Kind) -> str:
    if not len(values):
        return "no rows"
    if kind == "numeric":
        low, middle, high = np.quantile(values.astype(np.float64), [0.1, 0.5, 0.9])
        return f"{middle:.4g} ({low:.4g} to {high:.4g})".replace("-", "\N{MINUS SIGN}")
    codes, counts = np.unique(values, return_counts=True)
    return f"{len(codes)} value{'s' if len(codes) > 1 else ''}, most often {codes[counts.argmax()]:g} ({100 * counts.max() / len(values):.0f} %)"


def measure(column: DriftColumn, config: DriftConfig, columns: int = 20) -> DriftRow:
    """Score, threshold and verdict of one column of `columns` that are watched, with the days on which it left its range."""
    base = max(config.numeric_threshold if column.kind == "numeric" else config.categorical_threshold, column.least)
    method = METHODS[column.kind]
    current, reference = (side["value"].to_numpy() for side in (column.current, column.reference))
    summaries = (_summary(current, column.kind), _summary(reference, column.kind))
    if min(len(current), len(reference)) < config.least_rows:
        note = f"too few rows ({len(current)} now, {len(reference)} before)"
        return DriftRow(column.name, column.group, method, math.nan, base, False, [], False, note, *summaries)
    constant = _constant_days(column, config)
    noise = noise_threshold(column, config, columns)
    kept = _sample(reference, config)
    score = distance(kept, _sample(current, config), column.kind)
    by_day = column.current.groupby("day")
    usual = by_day["unit"].nunique().median()
    beyond = set(constant)
    for day, rows in by_day:
        if len(rows) < config.least_rows:
            continue
        fewer = math.sqrt(max(1.0, usual / rows["unit"].nunique()))  # a smaller day is noisier
        if distance(kept, _sample(rows["value"].to_numpy(), config), column.kind) > max(base, noise * fewer):
            beyond.add(f"{day:%Y-%m-%d}")
    threshold = max(base, noise)
    return DriftRow(column.name, column.group, method, score, threshold, score > threshold or bool(beyond), sorted(beyond), bool(constant), "", *summaries)


def _without_rounding(values: np.ndarray) -> np.ndarray:
    """Amounts that differ by rounding errors only, as one amount: a histogram has no bins for them, and Evidently's report would end there."""
    finite = values[np.isfinite(values)]
    if len(finite) and np.ptp(finite) <= 1e-12 * np.abs(finite).max():
        return np.where(np.isfinite(values), finite[0], values)
    return values


def side_by_side(columns: list[DriftColumn], config: DriftConfig) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Current and reference as one frame each, for Evidently: columns of different length beside each other, padded with nulls (which it skips)."""
    frames = []
    for side in ("current", "reference"):
        parts = {}
        for column in columns:
            values = _sample(getattr(column, side)["value"].to_numpy(), config)
            parts[column.name] = pd.Series(values.astype(np.int64).astype(str) if column.kind == "categorical" else _without_rounding(values.astype(np.float64)))
        frames.append(pd.concat(parts, axis=1))
    return frames[0], frames[1]
