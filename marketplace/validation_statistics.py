"""Figures of whole tables that must lie within bounds: some hold for any logs, others compare with the last accepted logs.

Every figure is one column of the one-row frame `statistics`, so that Great Expectations checks and documents it. Bounds
on rates leave four standard deviations for chance, so that small logs raise no alarm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd

from marketplace.schema import ACTION_CLICK, TABLES
from marketplace.validation_rules import MAY_BE_CONSTANT, Law, Lookups

_UNITS = "check the unit (per click, not per mille or cents)"


class Statistics:
    """Collects figures, the laws on them and what to keep once the logs are accepted."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self.laws: list[Law] = []

    def add(self, rule: str, figure: str, value: float, low: float | None, high: float | None, says: str, remedy: str, examples: tuple[str, ...] = ()) -> None:
        self.figures[figure] = float(value)
        if math.isfinite(value):
            self.laws.append(Law(rule, "statistics", (figure,), "within", says, remedy, low=low, high=high, examples=examples))

    def cannot(self, what: str, error: Exception) -> None:
        """A rule that broken values keep from being computed is a failure too."""
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        self.add("rules-can-be-checked", f"{what} not computed", 1, 0, 0, f"{what} cannot be computed from these values ({reason})", "correct the other failures first; if there are none, report this")

    @property
    def frame(self) -> pd.DataFrame:
        return pd.DataFrame([self.figures or {"none": 0.0}])


def compute(look: Lookups, accepted: dict | None) -> tuple[Statistics, dict]:
    """All figures that the readable columns allow; and the summary that `accept` keeps for the next logs."""
    statistics = Statistics()
    for step, needs in _STEPS:
        if look.has(*needs):
            try:
                step(look, statistics)
            except Exception as error:  # whatever broken values do to a figure is a failure of the logs, not a traceback
                statistics.cannot(step.__name__.strip("_"), error)
    summary = _summary(look)
    if accepted is not None:
        _against_accepted(look, statistics, summary, accepted)
    return statistics, summary


# ---------------------------------------------------------------------------------------------------------------------
# Bids


def _catalogue_bids(look: Lookups, statistics: Statistics) -> None:
    bids = look.tables["ads"]["bid"].dropna()
    config = look.config
    says = f"bid level: the catalogue's median bid is {bids.median():.4g} per click (bids multiplied?)"
    remedy = f"{_UNITS}, or set min_median_bid and max_median_bid for your currency"
    statistics.add("bid-level", "median_bid", bids.median(), config.min_median_bid, config.max_median_bid, says, remedy)


def _payment_share(look: Lookups, statistics: Statistics) -> None:
    shown = look.tables["impressions"]
    share = (shown["payment"] / shown["bid"]).replace([np.inf, -np.inf], np.nan).dropna().median()
    says = f"bid level: the median of payment / bid is {share:.2g} (bids multiplied, payments not?)"
    statistics.add("bid-level", "median_payment_share", share, look.config.min_payment_share, 1.0, says, _UNITS)


# ---------------------------------------------------------------------------------------------------------------------
# Click labels


def _band(expected: float, factor: float) -> tuple[float, float]:
    """Counts that a Poisson variable of a mean within `factor` of `expected` keeps to, four standard deviations wide."""
    low, high = expected / factor, expected * factor
    return max(0.0, low - 4.0 * math.sqrt(low)), high + 4.0 * math.sqrt(high + 1.0)


def _click_rate(look: Lookups, statistics: Statistics) -> None:
    clicks = look.tables["impressions"]["click"]
    count, rate = len(clicks), float((clicks > 0).mean())
    limit = look.config.max_click_rate
    says = f"label flip: {rate:.1%} of all impressions are clicked, which no page of ads reaches (click labels flipped?)"
    statistics.add("no-flipped-labels", "click_rate", rate, 0.0, min(1.0, limit + 4.0 * math.sqrt(limit * (1 - limit) / count)), says, "check how click was joined; raise max_click_rate if it is right")


def _calibration(look: Lookups, statistics: Statistics) -> None:
    shown = look.tables["impressions"]
    predicted, clicks = float(shown["pctr"].clip(0, 1).sum()), float((shown["click"] > 0).sum())
    if predicted <= 0:
        return
    low, high = _band(predicted, look.config.click_rate_factor)
    says = f"label flip: {clicks:.0f} clicks where the logged pctr promised {predicted:.0f} (click labels flipped, or pctr of another model?)"
    statistics.add("no-flipped-labels", "clicks_over_pctr", clicks / predicted, low / predicted, high / predicted, says, "check click and pctr; raise click_rate_factor if the logging policy is that far off")


def _clicks_in_behaviours(look: Lookups, statistics: Statistics) -> None:
    """If behaviours record ad clicks (any clicked impression is found there), nearly all must be, and as clicks."""
    shown, done = look.tables["impressions"], look.tables["behaviours"]
    rows = np.flatnonzero((shown["click"] == 1).to_numpy() & shown["click_timestamp"].notna().to_numpy() & (look.catalogue_rows >= 0))
    if not len(rows):
        return
    keys = ["user_id", "poi_id", "event_timestamp"]
    clicks = pd.DataFrame({"user_id": look.ids("impressions.user_id")[rows], "poi_id": look.ids("ads.poi_id")[look.catalogue_rows[rows]], "event_timestamp": shown["click_timestamp"].iloc[rows].reset_index(drop=True)})
    recorded = pd.DataFrame({"user_id": look.ids("behaviours.user_id"), "poi_id": look.ids("behaviours.poi_id"), "event_timestamp": done["event_timestamp"], "action": done["action"].to_numpy()})
    recorded = recorded[recorded["event_timestamp"] >= clicks["event_timestamp"].min()].sort_values("action", ascending=False).drop_duplicates(keys)
    clicks["row"] = rows
    clicks = clicks[clicks["event_timestamp"] <= recorded["event_timestamp"].max()]
    action = clicks.merge(recorded, how="left", on=keys)["action"]
    found = action.notna()
    if not found.any():
        return
    lost = clicks[~found.to_numpy()]["row"].to_numpy()
    says = f"label flip: {found.mean():.1%} of the clicked impressions are found among the behaviours' clicks, the others are not (click labels flipped?)"
    statistics.add("no-flipped-labels", "clicks_found_in_behaviours", found.mean(), 0.98, 1.0, says, "write click and the behaviour from the same event", show_rows(shown, lost, ("request_id", "slot", "click")))
    constant = bool((done["action"] == done["action"].iloc[0]).all())
    says = f"{'constant feature: action holds one value only; ' if constant else ''}ad clicks are recorded in behaviours with another action than 2"
    statistics.add("no-constant-features" if constant else "clicks-recorded-as-clicks", "clicks_recorded_as_clicks", (action[found] == ACTION_CLICK).mean(), 0.98, 1.0, says, "write action 2 for clicks")


def _behaviours_in_impressions(look: Lookups, statistics: Statistics) -> None:
    """Clicks in behaviours since the first request are clicks on shown ads, unless the platform logs other clicks too.

    It does if it says so (`organic_clicks`), or if the history before the requests has clicks and most later clicks are
    not on shown ads either. Clicks of the first hours may belong to pages of the day before.
    """
    shown, done, asked = look.tables["impressions"], look.tables["behaviours"], look.tables["requests"]
    first = asked["event_timestamp"].min()
    is_click = (done["action"] == ACTION_CLICK).to_numpy()
    session, known_sessions = look.ids("behaviours.session_id"), look.ids("requests.session_id")
    of_request = (session > 0) & np.isin(session, known_sessions[known_sessions > 0])
    time = done["event_timestamp"]
    rows = np.flatnonzero(is_click & ((of_request & (time >= first)) | (time >= first + pd.Timedelta(hours=look.config.late_hours))).to_numpy())
    if look.config.organic_clicks or look.has("organic.click") or not len(rows):
        return
    clicked = np.flatnonzero((shown["click"] == 1).to_numpy() & (look.catalogue_rows >= 0) & (look.request_rows >= 0))
    place = look.ids("ads.poi_id")[look.catalogue_rows[clicked]]
    by_session = pd.MultiIndex.from_arrays([known_sessions[look.request_rows[clicked]], place])
    by_time = pd.MultiIndex.from_arrays([look.ids("impressions.user_id")[clicked], place, shown["click_timestamp"].iloc[clicked]])
    poi = look.ids("behaviours.poi_id")[rows]
    found = (session[rows] > 0) & pd.MultiIndex.from_arrays([session[rows], poi]).isin(by_session)
    found |= pd.MultiIndex.from_arrays([look.ids("behaviours.user_id")[rows], poi, time.iloc[rows]]).isin(by_time)
    history_clicks = (is_click & (time < first).to_numpy()).any()
    if history_clicks and (~found).mean() > 0.5:
        return
    says = f"click without an impression: {int((~found).sum())} of {len(rows)} clicks in behaviours are on no ad that was shown and clicked"
    remedy = "export impressions and clicks of the same pages; set organic_clicks if behaviours also hold clicks on other things than ads"
    examples = show_rows(done, rows[~found], ("behaviour_id", "session_id", "poi_id"))
    statistics.add("no-click-without-impression", "behaviour_clicks_without_impression", int((~found).sum()), 0, 0, says, remedy, examples)


# ---------------------------------------------------------------------------------------------------------------------
# Rows, columns and tables


_COPY_KEYS = {"behaviours": "behaviour_id", "requests": "request_id"}
"""Event ids: a row that was written twice under two ids is a copy all the same."""


def _copies(table: str) -> Callable[[Lookups, Statistics], None]:
    def step(look: Lookups, statistics: Statistics) -> None:
        frame = look.tables[table][[name for name in TABLES[table].names if name in look.tables[table].columns and name != _COPY_KEYS.get(table)]]
        copied = frame.duplicated().to_numpy()
        share = float(copied.mean())
        says = f"duplicate rows: {table} has {copied.sum() / max(1, (~copied).sum()):.1%} more rows than different ones; {int(copied.sum()):,} of {len(frame):,} repeat another row"
        examples = show_rows(look.tables[table], np.flatnonzero(copied), TABLES[table].key)
        statistics.add("no-duplicate-rows", f"{table}_copied_share", share, 0.0, look.config.max_copied_share, says, "remove the copies: a file or a batch was written twice", examples)

    return step


def _constant_days(table: str) -> Callable[[Lookups, Statistics], None]:
    """A column that varies over all days may still be lost on one of them."""

    def step(look: Lookups, statistics: Statistics) -> None:
        frame, config = look.tables[table], look.config
        days = frame["_day"]
        large = days.map(days.value_counts()) >= config.constant_minimum_rows
        found = []
        for column in TABLES[table].columns:
            key = f"{table}.{column.name}"
            if column.name not in frame.columns or key not in _VARIES_DAILY or key in config.may_be_constant or key in MAY_BE_CONSTANT:
                continue
            values = frame[column.name]
            if not (values != values.iloc[0]).any():
                continue  # constant on all days: the suite of the table looks after that
            spread = values[large].groupby(days[large]).agg(["min", "max"])
            found += [f"{column.name} on {pd.Timestamp(int(day), unit='D'):%Y-%m-%d}" for day in spread.index[spread["min"] == spread["max"]]]
        says = f"constant feature: a column of {table} holds one value only on a whole day"
        statistics.add("no-constant-features", f"{table}_constant_days", len(found), 0, 0, says, "export that day again, or list the column under may_be_constant", tuple(found[:3]))

    return step


_VARIES_DAILY = frozenset(
    f"{table}.{name}"
    for table, names in {
        "ads": ("poi_id", "category_id", "latitude", "longitude", "bid"),
        "behaviours": ("user_id", "poi_id", "category_id", "latitude", "longitude"),
        "requests": ("user_id", "latitude", "longitude"),
        "impressions": ("user_id", "ad_id", "bid", "payment", "pctr"),
    }.items()
    for name in names
)


def _cities(look: Lookups, statistics: Statistics) -> None:
    """city_id may be constant in a one-city world, but then it is the same city in all tables."""
    cities = {table: set(look.tables[table]["city_id"].dropna().unique().tolist()) for table in ("ads", "users", "requests")}
    allowed = {column.split(".")[0] for column in look.config.may_be_constant if column.endswith(".city_id")}
    lost = []
    for table, own in cities.items():
        others = set().union(*(values for other, values in cities.items() if other != table))
        if len(own) == 1 and table not in allowed and (len(others) > 1 or not own & others):
            lost.append(table)
    says = f"constant feature: city_id holds one value only in {', '.join(lost)}, and other values in other tables"
    statistics.add("no-lost-cities", "tables_with_lost_cities", len(lost), 0, 0, says, "find out why the export lost it; if it is right, list the column under may_be_constant")


def _history(look: Lookups, statistics: Statistics) -> None:
    first = look.tables["behaviours"].groupby("user_id")["event_timestamp"].min()
    asked = look.tables["requests"]
    share = float((asked["user_id"].map(first) < asked["event_timestamp"]).mean())
    says = f"behaviours come after their requests: only {share:.1%} of the requests have a behaviour of their user before them"
    statistics.add("behaviours-before-requests", "requests_with_history", share, look.config.min_known_history_share, 1.0, says, "check time zones and user ids of behaviours and requests")


def _days(look: Lookups, statistics: Statistics) -> None:
    days = {table: set(look.tables[table]["_day"].unique().tolist()) for table in ("requests", "impressions")}
    lost = sorted(days["requests"] ^ days["impressions"])
    says = "a day has requests without impressions or impressions without requests"
    examples = tuple(f"{pd.Timestamp(day, unit='D'):%Y-%m-%d}" for day in lost[:3])
    statistics.add("same-days", "days_in_one_table_only", len(lost), 0, 0, says, "export requests and impressions of the same days", examples)


def show_rows(frame: pd.DataFrame, rows: Iterator[int] | np.ndarray, columns: tuple[str, ...], count: int = 3) -> tuple[str, ...]:
    """The first rows as 'name=value, ...' in plain words."""
    names = [name for name in dict.fromkeys(columns) if name in frame.columns]
    part = frame[names].iloc[list(rows[:count])]
    return tuple(", ".join(f"{name}={plain(value)}" for name, value in zip(names, row, strict=True)) for row in part.itertuples(index=False))


def plain(value: object) -> str:
    """A value as a person would write it."""
    if value is None or value is pd.NaT or (isinstance(value, float | np.floating) and math.isnan(value)):
        return "missing"
    if isinstance(value, pd.Timestamp):
        return value.strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, float | np.floating):
        return f"{int(value)}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.6g}"
    return str(value)


_STEPS: tuple[tuple[Callable[[Lookups, Statistics], None], tuple[str, ...]], ...] = (
    (_catalogue_bids, ("ads.bid",)),
    (_payment_share, ("impressions.bid", "impressions.payment")),
    (_click_rate, ("impressions.click",)),
    (_calibration, ("impressions.click", "impressions.pctr")),
    (
        _clicks_in_behaviours,
        (
            *("impressions.click", "impressions.click_timestamp", "impressions.user_id", "impressions.ad_id", "ads.ad_id", "ads.poi_id"),
            *("behaviours.user_id", "behaviours.poi_id", "behaviours.event_timestamp", "behaviours.action"),
        ),
    ),
    (
        _behaviours_in_impressions,
        (
            *("impressions.click", "impressions.click_timestamp", "impressions.user_id", "impressions.request_id", "impressions.ad_id", "ads.ad_id"),
            *("ads.poi_id", "requests.request_id", "requests.session_id", "requests.event_timestamp", "behaviours.user_id", "behaviours.session_id", "behaviours.poi_id", "behaviours.event_timestamp", "behaviours.action"),
        ),
    ),
    *((_copies(table), (f"{table}._day",)) for table in TABLES),
    *((_constant_days(table), (f"{table}._day",)) for table in ("ads", "behaviours", "requests", "impressions")),
    (_cities, ("ads.city_id", "users.city_id", "requests.city_id")),
    (_history, ("behaviours.user_id", "behaviours.event_timestamp", "requests.user_id", "requests.event_timestamp")),
    (_days, ("requests._day", "impressions._day")),
)


# ---------------------------------------------------------------------------------------------------------------------
# Against the last accepted logs


def _summary(look: Lookups) -> dict:
    """Plain figures of these logs, JSON-ready."""
    summary: dict = {"rows": {name: len(frame) for name, frame in look.tables.items()}, "varied": []}
    if look.has("impressions.click"):
        clicks = look.tables["impressions"]["click"]
        summary |= {"impressions": len(clicks), "clicks": int((clicks > 0).sum())}
    for name in ("ads", "impressions"):
        if look.has(f"{name}.bid") and look.tables[name]["bid"].notna().any():
            summary[f"{name}_median_bid"] = float(look.tables[name]["bid"].median())
    for table in TABLES.values():
        frame = look.tables[table.name]
        if len(frame) >= look.config.constant_minimum_rows:
            present = [name for name in table.names if name in frame.columns]
            summary["varied"] += [f"{table.name}.{name}" for name in present if bool((frame[name] != frame[name].iloc[0]).any())]
    return summary


def _against_accepted(look: Lookups, statistics: Statistics, summary: dict, accepted: dict) -> None:
    config = look.config
    for name in ("ads_median_bid", "impressions_median_bid"):
        if name in summary and accepted.get(name, 0) > 0:
            ratio = summary[name] / accepted[name]
            says = f"bid level: the {name.replace('_', ' ')} is {summary[name]:.4g}, {ratio:.3g} times that of the last accepted logs"
            factor = config.accepted_bid_factor
            statistics.add("bid-level", f"{name}_over_accepted", ratio, 1 / factor, factor, says, f"{_UNITS}; if the market did move so far, delete the accepted statistics")
    if "clicks" in summary and accepted.get("impressions", 0) > 0 and accepted.get("clicks", 0) > 0:
        rate = accepted["clicks"] / accepted["impressions"]
        expected = rate * summary["impressions"]
        noise = 1 + 4 / math.sqrt(accepted["clicks"])  # the accepted rate is an estimate too
        low, high = _band(expected, config.accepted_click_rate_factor * noise)
        ratio = summary["clicks"] / expected
        says = f"label flip or lost clicks: the click rate is {ratio:.3g} times that of the last accepted logs ({rate:.2%})"
        statistics.add("click-rate-as-accepted", "click_rate_over_accepted", ratio, low / expected, high / expected, says, "check click; if the market did move so far, delete the accepted statistics")
    large = {table for table, frame in look.tables.items() if len(frame) >= config.constant_minimum_rows}
    lost = [name for name in accepted.get("varied", []) if name.split(".")[0] in large and name not in summary["varied"] and name not in (*config.may_be_constant, *_MAY_STOP_VARYING)]
    says = f"constant feature: {', '.join(lost)} varied in the last accepted logs and holds one value only now"
    statistics.add("no-constant-features", "columns_that_stopped_varying", len(lost), 0, 0, says, "find out why the export lost it; if it is right, list it under may_be_constant", tuple(lost[:3]))


_MAY_STOP_VARYING = ("requests.arm", "requests.model_version", "ads.event_timestamp", "users.event_timestamp", "impressions.purchase", "impressions.order_value", "impressions.click_timestamp")
"""An experiment ends, a window holds one day, a small window holds no order."""
