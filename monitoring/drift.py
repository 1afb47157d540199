"""Drift of features, scores, bids and prices against the reference period, measured by Evidently's statistics.

A distance between two samples is never zero, and people differ from day to day. So each column's threshold is the larger of the configured
one and what the reference period's own days show against each other (samples of as many users as the experiment has), times a margin.
Methods fit the type: Jensen-Shannon distance for codes, Wasserstein distance in units of the reference's standard deviation for amounts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from marketplace import logs
from marketplace.schema import distance_km
from monitoring.facts import Facts


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class DriftConfig:
    """When a shift counts as drift."""

    numeric_threshold: float = Field(0.1, gt=0)
    """Wasserstein distance over the reference's standard deviation, least alarm."""
    categorical_threshold: float = Field(0.1, gt=0)
    """Jensen-Shannon distance (natural logarithm, 0 to 0.83), least alarm."""
    noise_margin: float = Field(1.5, ge=1)
    """Factor on the greatest distance between a reference day and the other reference days."""
    reference_days: int = Field(14, ge=1)
    """Most recent days of the reference logs that are compared with."""
    least_rows: int = Field(200, ge=2)
    """Fewer rows on either side: no statement."""
    most_rows: int = Field(100_000, ge=1000)
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
    note: str
    current_summary: str
    reference_summary: str


@plain_dataclass(frozen=True)
class LogTables:
    """What drift looks at besides the facts: catalogue and profiles of a folder of logs."""

    ads: pd.DataFrame
    users: pd.DataFrame


def read_tables(folder: Path) -> LogTables:
    """Catalogue and profiles of a folder; empty frames where a folder (a traffic export, say) has none."""
    present = {name for name in ("ads", "users") if (Path(folder) / name).is_dir()}
    frames = {name: logs.read_table(folder, name) if name in present else pd.DataFrame() for name in ("ads", "users")}
    return LogTables(**frames)


def _frame(rows: pd.DataFrame, values: Any, unit: str) -> pd.DataFrame:
    frame = pd.DataFrame({"value": np.asarray(values), "day": rows["event_timestamp"].to_numpy("datetime64[s]").astype("datetime64[D]").astype("datetime64[s]"), "unit": rows[unit].to_numpy()})
    return frame[pd.notna(frame["value"])]


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
    }
    if not tables.users.empty:
        latest = tables.users.sort_values("event_timestamp").drop_duplicates("user_id", keep="last").set_index("user_id")
        for name, column in (("user age band", "age_band"), ("user gender", "gender")):
            columns[name] = _frame(rows, rows["user_id"].map(latest[column]), "user_id")
    return columns


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


_CATEGORICAL = {"hour of day, local", "city", "user age band", "user gender", "catalogue: category", "catalogue: price band"}


def _group(name: str) -> Literal["feature", "score", "bid", "price"]:
    if "pctr" in name:
        return "score"
    return "price" if "price per click" in name or "reserve" in name else "bid" if "bid" in name else "feature"


def watched_columns(current: Facts, tables: LogTables, reference: Facts, reference_tables: LogTables, control: str, treatment: str, config: DriftConfig) -> list[DriftColumn]:
    """The columns that can be compared fairly.

    What users bring is compared over both arms. What a policy shows is compared only with the same policy: the control with the reference logs if the same
    version answered there, the treatment with its own first day once it has a second one (how much days differ is then learnt from the reference logs).
    Otherwise the experiment itself would read as drift.
    """
    reference = _latest(reference, config.reference_days)
    now, before = _request_columns(current, tables), _request_columns(reference, reference_tables)
    ordinary: dict[str, pd.DataFrame] = {}
    if not tables.ads.empty and not reference_tables.ads.empty:
        days = reference_tables.ads["event_timestamp"].dt.floor("D")
        recent = reference_tables.ads[days.isin(sorted(days.unique())[-config.reference_days :])]
        now |= _catalogue_columns(tables.ads)
        before |= _catalogue_columns(recent)
    shown = {arm: current.impressions[current.impressions["arm"] == arm] for arm in (control, treatment)}
    versions = set(current.requests.loc[current.requests["arm"] == control, "model_version"])
    same = reference.requests[reference.requests["model_version"].isin(versions)]
    if len(same) and len(shown[control]):
        past = reference.impressions[reference.impressions["request_id"].isin(same["request_id"])]
        now |= _page_columns(shown[control], current.requests, tables.ads, control)
        before |= _page_columns(past, reference.requests, reference_tables.ads, control)
    if len(shown[treatment]["day"].unique()) > 1:
        first = shown[treatment]["day"] == shown[treatment]["day"].min()
        label = f"{treatment}, against its first day"
        now |= _page_columns(shown[treatment][~first], current.requests, tables.ads, label)
        before |= _page_columns(shown[treatment][first], current.requests, tables.ads, label)
        ordinary = _page_columns(reference.impressions, reference.requests, reference_tables.ads, label)
    return [DriftColumn(n, _group(n), "categorical" if n in _CATEGORICAL else "numeric", now[n], before[n], ordinary.get(n)) for n in now if n in before]


def distance(reference: np.ndarray, current: np.ndarray, kind: Kind) -> float:
    """Evidently's drift score of one column: the function behind its ValueDrift, without the drawing."""
    from evidently.legacy.calculations.stattests import jensenshannon_stat_test, wasserstein_stat_test
    from evidently.legacy.core import ColumnType

    test, column = (wasserstein_stat_test, ColumnType.Numerical) if kind == "numeric" else (jensenshannon_stat_test, ColumnType.Categorical)
    return float(test(pd.Series(reference), pd.Series(current), column, None).drift_score)


def _sample(values: np.ndarray, config: DriftConfig) -> np.ndarray:
    """At most `most_rows` of the values; the same ones on every call."""
    return values if len(values) <= config.most_rows else np.random.default_rng(config.seed).choice(values, config.most_rows, replace=False)


def _noise(column: DriftColumn, config: DriftConfig) -> float:
    """Greatest distance of one ordinary day from the other days, with as many units (users, ads) as the current side has on a day; 0 with a single day.

    If the reference is one day only, days are compared one with the next, both with that many units.
    """
    ordinary = column.reference if column.ordinary is None else column.ordinary
    days = np.sort(ordinary["day"].unique())
    if len(days) < 2:
        return 0.0
    generator = np.random.default_rng(config.seed)
    units = max(1, int(column.current.groupby("day")["unit"].nunique().median()))

    def sample(rows: pd.DataFrame) -> np.ndarray:
        present = rows["unit"].unique()
        kept = rows if len(present) <= units else rows[rows["unit"].isin(generator.choice(present, units, replace=False))]
        return _sample(kept["value"].to_numpy(), config)

    single, greatest = len(column.reference["day"].unique()) == 1, 0.0
    for index, day in enumerate(days):
        one = sample(ordinary[ordinary["day"] == day])
        if single:
            others = sample(ordinary[ordinary["day"] == days[index - 1]])
        else:
            others = _sample(ordinary.loc[ordinary["day"] != day, "value"].to_numpy(), config)
        if min(len(one), len(others)) >= config.least_rows:
            greatest = max(greatest, distance(others, one, column.kind))
    return greatest


def _summary(values: np.ndarray, kind: Kind) -> str:
    if not len(values):
        return "no rows"
    if kind == "numeric":
        low, middle, high = np.quantile(values.astype(np.float64), [0.1, 0.5, 0.9])
        return f"{middle:.4g} ({low:.4g} to {high:.4g})".replace("-", "\N{MINUS SIGN}")
    codes, counts = np.unique(values, return_counts=True)
    return f"{len(codes)} value{'s' if len(codes) > 1 else ''}, most often {codes[counts.argmax()]:g} ({100 * counts.max() / len(values):.0f} %)"


def measure(column: DriftColumn, config: DriftConfig) -> DriftRow:
    """Score, threshold and verdict of one column, with the days on which it left its range."""
    base = config.numeric_threshold if column.kind == "numeric" else config.categorical_threshold
    method = METHODS[column.kind]
    current, reference = (side["value"].to_numpy() for side in (column.current, column.reference))
    summaries = (_summary(current, column.kind), _summary(reference, column.kind))
    if min(len(current), len(reference)) < config.least_rows:
        return DriftRow(column.name, column.group, method, math.nan, base, False, [], f"too few rows ({len(current)} now, {len(reference)} before)", *summaries)
    threshold = max(base, config.noise_margin * _noise(column, config))
    kept = _sample(reference, config)
    score = distance(kept, _sample(current, config), column.kind)
    beyond = []
    for day, rows in column.current.groupby("day"):
        if len(rows) >= config.least_rows and distance(kept, _sample(rows["value"].to_numpy(), config), column.kind) > threshold:
            beyond.append(pd.Timestamp(day).strftime("%Y-%m-%d"))
    drifted = score > threshold or bool(beyond)
    return DriftRow(column.name, column.group, method, score, threshold, drifted, beyond, "", *summaries)


def side_by_side(columns: list[DriftColumn], config: DriftConfig) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Current and reference as one frame each, for Evidently: columns of different length beside each other, padded with nulls (which it skips)."""
    frames = []
    for side in ("current", "reference"):
        parts = {}
        for column in columns:
            values = _sample(getattr(column, side)["value"].to_numpy(), config)
            parts[column.name] = pd.Series(values.astype(np.int64).astype(str) if column.kind == "categorical" else values.astype(np.float64))
        frames.append(pd.concat(parts, axis=1))
    return frames[0], frames[1]
