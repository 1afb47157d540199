"""The laws that logs must keep: those that follow from `schema.TABLES`, the business rules, and the statistics.

A law is checked on one frame: a log table, `files` (one row a file) or `statistics` (one row, one column a figure). Rules
that need several tables are computed to a true/false column named after the rule, so that Great Expectations checks,
counts and documents them like any other column. Rows that another rule already reports (nulls, unknown ids) count as
kept, so that one fault is named once.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import pyarrow as pa
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as config_dataclass

from marketplace.schema import ID_MAX, OPTIONAL_TABLES, TABLES, Column
from marketplace.validation_read import DAY, LoadedLogs

CRITICAL, WARNING = "critical", "warning"


@config_dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class ValidationConfig:
    """Bounds of the checks that are a matter of degree. What the schema fixes is not configurable."""

    max_click_rate: float = Field(0.15, gt=0, le=1)
    """Highest plausible share of impressions clicked; 20 % flipped labels give at least 0.2."""
    click_rate_factor: float = Field(4.0, gt=1)
    """Clicks may differ from the sum of the logged pctr by this factor, plus four standard deviations."""
    accepted_click_rate_factor: float = Field(2.0, gt=1)
    """The click rate may differ from that of the last accepted logs by this factor, plus four standard deviations."""
    accepted_bid_factor: float = Field(8.0, gt=1)
    """The median bid may differ from that of the last accepted logs by this factor."""
    bid_factor: float = Field(5.0, gt=1)
    """A logged bid may differ from the catalogue's bid of that ad and day by this factor."""
    bid_day_factor: float = Field(10.0, gt=1)
    """An ad's bid of one day may differ from its own median over all days by this factor."""
    min_median_bid: float = Field(0.001, gt=0)
    """Lowest plausible median bid of the catalogue, currency per click; a guard against unit mistakes."""
    max_median_bid: float = Field(50.0, gt=0)
    """Highest plausible median bid of the catalogue, currency per click; a guard against unit mistakes."""
    min_payment_share: float = Field(0.02, ge=0, lt=1)
    """Lowest plausible median of payment / bid; bids multiplied by 100 fall below it."""
    max_copied_share: float = Field(0.01, ge=0, lt=1)
    """Highest share of a table's rows that may repeat another row in all columns (leaving aside an event id)."""
    min_known_history_share: float = Field(0.05, ge=0, le=1)
    """Lowest share of requests whose user has a behaviour before the request; less means shifted clocks or swapped ids."""
    constant_minimum_rows: int = Field(30, ge=2)
    """A column is asked to vary only in tables, and on days, with this many rows."""
    may_be_constant: tuple[str, ...] = ()
    """Columns, as table.column, that may hold one value only, beyond those that `ALLOWED_CONSTANTS` lists."""
    organic_clicks: bool = False
    """Behaviours also hold clicks on other things than ads, so a click without an impression is no fault."""
    clock_skew_minutes: float = Field(10.0, ge=0)
    """Timestamps may be later than now by this much, minutes."""
    late_hours: float = Field(24.0, ge=0)
    """Clicks and purchases may come this long after the last day of the logs, hours."""


MAY_BE_CONSTANT = (
    *("ads.event_timestamp", "ads.city_id", "ads.reserve", "users.event_timestamp", "users.city_id"),
    *("requests.city_id", "requests.utc_offset_minutes", "requests.slots", "requests.arm", "requests.model_version"),
    *("impressions.click_timestamp", "impressions.creative_click", "behaviours.creative_id"),
    *("creatives.event_timestamp", "organic.rank", "organic.position", "organic.click"),
)
"""Columns that one city, one day, one policy, one page layout or logs without creatives make constant. `no-lost-cities` looks after city_id."""

NEUTRAL = {"behaviours.action": 1, "impressions.slot": 1, "impressions.propensity": 1}
"""Columns that may be constant at this value: visits only (see `clicks-recorded-as-clicks`), pages of one slot, a deterministic policy."""

UNKNOWN_TOGETHER = (
    ("users.age_band", "users.gender"),
    ("ads.category_id", "ads.price_band", "behaviours.category_id"),
    ("behaviours.session_id", "requests.session_id"),
    ("impressions.purchase", "impressions.order_value"),
)
"""Columns whose 0 means unknown or none: a platform without them has 0 in all of a group; 0 in one only is a lost column."""


@dataclass(frozen=True)
class Law:
    """One expectation. `kind`: rows, columns, type, not_null, range, unique, varies, true, or within (a statistic)."""

    rule: str
    frame: str
    columns: tuple[str, ...]
    kind: str
    says: str
    remedy: str
    severity: str = CRITICAL
    low: float | None = None
    high: float | None = None
    strict_low: bool = False
    dtype: str = ""
    examples: tuple[str, ...] = ()
    show: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------------------------------
# Laws of the files and of the schema


_FILE_LAWS = (
    ("readable-files", "unreadable", "file cannot be read: truncated or damaged Parquet", "write or copy the file again"),
    ("no-missing-columns", "missing_columns", "column is missing", "write the file with all columns of docs/data.md"),
    ("no-extra-columns", "extra_columns", "column is not in the schema", "drop it: a misspelt name or a later format would go unseen"),
    ("column-types", "wrong_types", "column has a wrong type", "write it with the type of docs/data.md"),
    ("files-as-in-manifest", "changed", "file is not the one that the manifest describes", "copy the logs again, or delete manifest.json to take the folder as it is"),
)


def file_laws() -> list[Law]:
    """Laws on `files`, whose problem columns are '' where all is well."""
    laws = [Law("tables-present", "files", (f"has_{name}",), "true", f"table {name} has no readable Parquet file", f"bring {name}/day=YYYY-MM-DD/*.parquet") for name in TABLES]
    laws += [Law(rule, "files", (rule,), "true", says, remedy, show=("file", column)) for rule, column, says, remedy in _FILE_LAWS]
    laws.append(Law("no-empty-files", "files", ("no-empty-files",), "true", "file holds no rows", "write the day's rows, or leave the file out", show=("file",)))
    return laws


def files_frame(logs: LoadedLogs) -> pd.DataFrame:
    """`logs.files` with one true/false column a law of `file_laws`."""
    frame = logs.files.copy()
    for rule, column, _, _ in _FILE_LAWS:
        frame[rule] = frame[column] == ""
    frame["no-empty-files"] = (frame["rows"] > 0) | (frame["unreadable"] != "") | (frame["day"] == "")
    for name in TABLES:
        frame[f"has_{name}"] = bool(((frame["table"] == name) & (frame["unreadable"] == "") & (frame["day"] != "")).any())
    return frame


_TABLES = TABLES | OPTIONAL_TABLES
_GX_TYPES = {pa.int64(): "int64", pa.int32(): "int32", pa.float64(): "float64", pa.float32(): "float32", pa.string(): "str"}


def schema_laws(name: str, tables: dict[str, pd.DataFrame], config: ValidationConfig) -> list[Law]:
    """Row count first, then columns, types, nulls, ranges, keys and variation of one table, all from `schema.TABLES`."""
    table, frame = _TABLES[name], tables[name]
    laws = [Law("table-not-empty", name, (), "rows", f"table {name} has no rows", "bring the rows of the day", low=1)]
    lost = [column for column in table.names if column not in frame.columns]
    laws.append(Law("no-missing-columns", name, tuple(table.names), "columns", f"column is missing: {', '.join(lost)}", "write it as docs/data.md says"))
    for column in table.columns:
        if column.name in frame.columns and len(frame):
            laws += _column_laws(name, column, tables, config)
    if len(frame) and all(key in frame.columns for key in table.key):
        says = f"duplicate keys: {', '.join(table.key)} must be unique"
        laws.append(Law("no-duplicate-keys", name, table.key, "unique", says, "write every event once", show=table.key))
    return laws


def _column_laws(name: str, column: Column, tables: dict[str, pd.DataFrame], config: ValidationConfig) -> list[Law]:
    values = tables[name][column.name]
    show = tuple(dict.fromkeys((*_TABLES[name].key, column.name)))
    laws = []
    holes = values.isna().any()
    if not (pa.types.is_list(column.dtype) or (holes and pa.types.is_integer(column.dtype))):  # pandas turns integers with holes into floats; the hole is reported instead
        dtype = _GX_TYPES.get(column.dtype, "Timestamp")
        laws.append(Law("column-types", name, (column.name,), "type", f"must be {column.dtype}", "write it as docs/data.md says", dtype=dtype))
    if not column.nullable:
        laws.append(Law("no-missing-values", name, (column.name,), "not_null", f"{column.name} is missing (NaN or null)", "fill or drop these rows at the source", show=show))
    if column.minimum is not None:
        high = None if column.maximum == ID_MAX else column.maximum
        word = "negative or zero" if column.exclusive_minimum else "negative" if column.minimum == 0 else f"below {column.minimum:g}"
        says = f"{column.name} is {word}" + ("" if high is None else f" or above {high:g}")
        rule = {"bid": "no-negative-bids", "payment": "no-negative-payments"}.get(column.name, "values-in-range")
        laws.append(Law(rule, name, (column.name,), "range", says, "correct the values at the source", low=column.minimum, high=high, strict_low=column.exclusive_minimum, show=show))
    if _must_vary(name, column.name, tables, config):
        says = f"constant feature: {column.name} holds one value only"
        remedy = f"find out why the export lost it; if it is right, list {name}.{column.name} under may_be_constant"
        laws.append(Law("no-constant-features", name, (column.name,), "varies", says, remedy, low=2, show=(column.name,)))
    return laws


_ROWS_WITH_CLICKS = 1000
"""Impressions among which there is certainly a click."""


def _must_vary(table: str, column: str, tables: dict[str, pd.DataFrame], config: ValidationConfig) -> bool:
    key, values = f"{table}.{column}", tables[table][column]
    if len(values) < config.constant_minimum_rows or pa.types.is_list(_TABLES[table][column].dtype) or key in MAY_BE_CONSTANT or key in config.may_be_constant:
        return False
    if key in NEUTRAL and _always(values, NEUTRAL[key]):
        return False
    for group in UNKNOWN_TOGETHER:
        if key in group:
            others = [other.split(".") for other in group if other not in config.may_be_constant]
            return not all(_always(tables[name][other], 0) for name, other in others if other in tables[name].columns)
    return key != "impressions.click" or len(values) >= _ROWS_WITH_CLICKS


def _always(values: pd.Series, value: float) -> bool:
    return bool((values == value).all())


# ---------------------------------------------------------------------------------------------------------------------
# Lookups between tables


class Lookups:
    """Joins between the tables, computed once; duplicate keys take the first row, unknown ones give -1 or NaN."""

    def __init__(self, logs: LoadedLogs, config: ValidationConfig, now: dt.datetime) -> None:
        self.tables, self.config, self.now = logs.tables, config, now

    def has(self, *columns: str) -> bool:
        """Whether all of these (as table.column) could be read and their tables have rows."""
        return all(table in self.tables and len(self.tables[table]) and name in self.tables[table].columns for table, name in (column.split(".") for column in columns))

    def ids(self, column: str) -> np.ndarray:
        """An id column as int64, -1 for null."""
        table, name = column.split(".")
        values = self.tables[table][name]
        return values.to_numpy() if values.dtype == np.int64 else values.fillna(-1).to_numpy().astype(np.int64)

    @cached_property
    def request_rows(self) -> np.ndarray:
        """Row of `requests` of each impression, -1 unknown."""
        return first_rows(self.ids("requests.request_id"), self.ids("impressions.request_id"))

    def of_request(self, name: str) -> pd.Series:
        """A column of the request of each impression; null where the request is unknown."""
        return self._take("requests", name, self.request_rows)

    @cached_property
    def catalogue_rows(self) -> np.ndarray:
        """Row of `ads` of each impression's ad on the day of its partition, -1 if not in that day's catalogue."""
        ads, shown = self.tables["ads"], self.tables["impressions"]
        known = pd.Index(np.unique(self.ids("ads.ad_id")))
        code = known.get_indexer(self.ids("impressions.ad_id"))
        key_ads = ads[DAY].to_numpy().astype(np.int64) * len(known) + known.get_indexer(self.ids("ads.ad_id"))
        key_shown = shown[DAY].to_numpy().astype(np.int64) * len(known) + code
        return np.where(code < 0, -1, first_rows(key_ads, key_shown))

    def of_ad(self, name: str) -> pd.Series:
        """A column of the catalogue row of each impression; null where the ad is not in that day's catalogue."""
        return self._take("ads", name, self.catalogue_rows)

    def _take(self, table: str, name: str, rows: np.ndarray) -> pd.Series:
        values = self.tables[table][name].reset_index(drop=True)
        return values.reindex(rows).reset_index(drop=True)

    @cached_property
    def creative_rows(self) -> np.ndarray:
        """Row of `creatives` of each impression's creative, -1 unknown."""
        return first_rows(self.ids("creatives.creative_id"), self.ids("impressions.creative_id"))

    @cached_property
    def latest(self) -> tuple[pd.Timestamp, str]:
        """Latest plausible timestamp, and why: now, or the last day that ads, requests and impressions share."""
        limit = pd.Timestamp(self.now) + pd.Timedelta(minutes=self.config.clock_skew_minutes)
        last = [int(self.tables[name][DAY].max()) for name in ("ads", "requests", "impressions") if self.has(f"{name}.{DAY}")]
        if not last:
            return limit, f"now ({limit:%Y-%m-%d %H:%M} UTC)"
        end = pd.Timestamp(min(last) + 1, unit="D", tz="UTC")
        with_late = end + pd.Timedelta(hours=self.config.late_hours)
        if with_late < limit:
            return with_late, f"the last day of the logs ({end - pd.Timedelta(days=1):%Y-%m-%d}, and {self.config.late_hours:g} h for late events)"
        return limit, f"now ({limit:%Y-%m-%d %H:%M} UTC)"


def first_rows(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Position of the first row of `keys` equal to each of `wanted`; -1 where there is none."""
    unique, first = np.unique(keys, return_index=True)
    found = pd.Index(unique).get_indexer(wanted)
    return np.where(found < 0, -1, first[np.maximum(found, 0)])


def _known(look: Lookups, column: str, reference: str) -> np.ndarray:
    values = look.ids(column)
    return np.isin(values, np.unique(look.ids(reference))) | (values < 0)


# ---------------------------------------------------------------------------------------------------------------------
# Business rules on rows: `check` gives True where a row keeps the rule


@dataclass(frozen=True)
class RowRule:
    """A rule on the rows of one table; skipped where a column of `needs` (table.column) could not be read."""

    rule: str
    table: str
    needs: tuple[str, ...]
    says: str
    remedy: str
    check: Callable[[Lookups], np.ndarray | pd.Series]
    show: tuple[str, ...] = ()
    severity: str = CRITICAL
    value: tuple[str, Callable[[Lookups], pd.Series]] | None = None
    """A figure of each row, shown with the examples."""


def _in_own_day(table: str) -> Callable[[Lookups], pd.Series]:
    def check(look: Lookups) -> pd.Series:
        frame = look.tables[table]
        time = frame["event_timestamp"]
        return time.isna() | (time.dt.floor("D") == pd.to_datetime(frame[DAY].astype("int64"), unit="D", utc=True))

    return check


def _not_in_future(table: str) -> Callable[[Lookups], pd.Series]:
    def check(look: Lookups) -> pd.Series:
        frame, (limit, _) = look.tables[table], look.latest
        late = frame["event_timestamp"] > limit
        return ~(late | (frame["click_timestamp"] > limit)) if "click_timestamp" in frame.columns else ~late

    return check


def bid_over_catalogue(look: Lookups) -> pd.Series:
    """Logged bid of each impression over the catalogue's bid of that ad and day."""
    return look.tables["impressions"]["bid"] / look.of_ad("bid")


def bid_over_median(look: Lookups) -> pd.Series:
    """Bid of each catalogue row over the ad's own median over the days."""
    ads = look.tables["ads"]
    return ads["bid"] / ads.groupby("ad_id")["bid"].transform("median")


def _near_one(ratio: pd.Series, factor: float) -> pd.Series:
    return ~((ratio > factor) | (ratio < 1 / factor))


def _slot_is_next(look: Lookups) -> pd.Series:
    """A page with n different slots has slots 1..n: the slot's rank among its page's distinct slots is the slot."""
    shown = look.tables["impressions"]
    page = shown.groupby("request_id", sort=False)["slot"]
    whole = (page.transform("max") == page.transform("nunique")) & (page.transform("min") == 1)
    return whole | shown["request_id"].isna() | shown["slot"].isna()


def _ad_once(look: Lookups) -> pd.Series:
    """Another slot of the same page shows the same ad; whole copies of a row are `no-duplicate-keys`."""
    distinct = look.tables["impressions"][["request_id", "slot", "ad_id"]].drop_duplicates()
    twice = distinct.duplicated(["request_id", "ad_id"], keep=False)
    result = pd.Series(True, index=look.tables["impressions"].index)
    result[distinct.index[twice]] = False
    return result


def _equal(values: pd.Series, wanted: pd.Series) -> pd.Series:
    return (values.reset_index(drop=True) == wanted) | wanted.isna() | values.reset_index(drop=True).isna()


def _impression_after_request(look: Lookups) -> pd.Series:
    wait = look.tables["impressions"]["event_timestamp"] - look.of_request("event_timestamp")
    return wait.isna() | ((wait >= pd.Timedelta(0)) & (wait <= pd.Timedelta(hours=1)))


def _click_time_iff_click(look: Lookups) -> pd.Series:
    shown = look.tables["impressions"]
    return shown["click"].isna() | ((shown["click"] > 0) == shown["click_timestamp"].notna())


def _click_after_impression(look: Lookups) -> pd.Series:
    shown = look.tables["impressions"]
    return ~(shown["click_timestamp"] < shown["event_timestamp"])


def _clicks_were_shown(look: Lookups) -> np.ndarray:
    shown = look.tables["impressions"]
    on_page = (look.request_rows >= 0) & ~(shown["slot"] > look.of_request("slots")).to_numpy()
    return (shown["click"] != 1).to_numpy() | on_page


def _same_place(look: Lookups) -> np.ndarray:
    """A behaviour at an advertised place has the category and position that the catalogue gives (within 0.01 degrees)."""
    ads = look.tables["ads"].drop_duplicates("poi_id")
    rows = first_rows(ads["poi_id"].fillna(-1).to_numpy().astype(np.int64), look.ids("behaviours.poi_id"))
    done = look.tables["behaviours"]
    at_ad = rows >= 0
    wrong = np.zeros(len(done), bool)
    for name, tolerance in (("category_id", 0.0), ("latitude", 0.01), ("longitude", 0.01)):
        wrong |= np.abs(done[name].to_numpy() - ads[name].to_numpy()[rows]) > tolerance
    return ~(at_ad & wrong)


def _creative_of_the_ad(look: Lookups) -> np.ndarray | pd.Series:
    """The catalogue's creative; where there is a table of creatives, one of the ad's own."""
    if not look.has("creatives.creative_id", "creatives.ad_id"):
        return _equal(look.tables["impressions"]["creative_id"], look.of_ad("creative_id"))
    rows = look.creative_rows
    return (rows >= 0) & ((look.ids("creatives.ad_id")[rows] == look.ids("impressions.ad_id")) | (look.ids("impressions.ad_id") < 0))


def _embeddings_usable(look: Lookups) -> np.ndarray:
    """Finite, and as long as the most common one."""
    vectors = look.tables["creatives"]["embedding"]
    length = vectors.map(lambda vector: -1 if vector is None else len(vector)).to_numpy()
    values, count = np.unique(length, return_counts=True)
    return np.array([size == values[count.argmax()] and size > 0 and bool(np.isfinite(vector).all()) for size, vector in zip(length, vectors, strict=True)], bool)


def _organic_rows_of_requests(look: Lookups) -> np.ndarray:
    return first_rows(look.ids("requests.request_id"), look.ids("organic.request_id"))


def _organic_in_order(look: Lookups) -> pd.Series:
    """Ranks 1, 2, ... and rising positions on every page, none beyond the last ad and organic item."""
    rows = look.tables["organic"][["request_id", "rank", "position"]]
    ordered = rows.sort_values(["request_id", "rank"], kind="stable")
    page = ordered.groupby("request_id", sort=False)
    ads = look.tables["impressions"].groupby("request_id").size()
    room = ordered["request_id"].map(ads).fillna(0) + page["rank"].transform("size")
    kept = (ordered["rank"] == page.cumcount() + 1) & ~(page["position"].diff() < 1) & (ordered["position"] <= room)
    return kept.reindex(rows.index)


def _session_of_one_user(look: Lookups) -> np.ndarray:
    """A behaviour in a request's session is of the request's user."""
    session = look.ids("behaviours.session_id")
    rows = first_rows(look.ids("requests.session_id"), session)
    return (session <= 0) | (rows < 0) | (look.ids("behaviours.user_id") == look.ids("requests.user_id")[rows])


_PAGE = ("request_id", "slot")
ROW_RULES = (
    RowRule(
        "payment-at-most-bid", "impressions", ("impressions.payment", "impressions.bid"), "payment above the bid", "check the auction's price or the units of both columns",
        lambda look: ~(look.tables["impressions"]["payment"] > look.tables["impressions"]["bid"]), (*_PAGE, "payment", "bid"),
    ),
    RowRule(
        "payment-at-least-reserve", "impressions", ("impressions.payment", "impressions.ad_id", "ads.ad_id", "ads.reserve"), "payment below the catalogue's reserve of that ad and day",
        "check the auction's price, ads.reserve, and the units of both", lambda look: ~(look.tables["impressions"]["payment"] < look.of_ad("reserve") - 1e-9), (*_PAGE, "ad_id", "payment"),
        value=("reserve", lambda look: look.of_ad("reserve")),
    ),
    RowRule(
        "bids-match-catalogue", "impressions", ("impressions.bid", "impressions.ad_id", "ads.ad_id", "ads.bid"),
        "bid level: the logged bid is far from the catalogue's bid of that ad and day (multiplied, or another unit?)", "write bids in currency per click in both tables",
        lambda look: _near_one(bid_over_catalogue(look), look.config.bid_factor), (*_PAGE, "ad_id", "bid"), value=("bid_over_catalogue", bid_over_catalogue),
    ),
    RowRule(
        "bids-steady", "ads", ("ads.bid", "ads.ad_id"), "bid level: the ad's bid is far from its own median over the days (multiplied, or another unit?)",
        "check the days' units; raise bid_day_factor if bids do jump so far", lambda look: _near_one(bid_over_median(look), look.config.bid_day_factor),
        ("event_timestamp", "ad_id", "bid"), value=("bid_over_median", bid_over_median),
    ),
    RowRule(
        "no-unknown-requests", "impressions", ("impressions.request_id", "requests.request_id"), "unknown request: the impression's request is not in the logs",
        "export requests and impressions of the same days", lambda look: look.request_rows >= 0, _PAGE,
    ),
    RowRule(
        "no-click-without-impression", "impressions", ("impressions.click", "impressions.slot", "impressions.request_id", "requests.request_id", "requests.slots"),
        "click without an impression: clicked, but no such page was asked for and shown", "drop clicks that belong to no shown ad", _clicks_were_shown, (*_PAGE, "ad_id"),
    ),
    RowRule(
        "no-unknown-ads", "impressions", ("impressions.ad_id", "ads.ad_id"), "unknown ad: not in the catalogue on any day", "add the ad to the ads table, or drop the rows",
        lambda look: _known(look, "impressions.ad_id", "ads.ad_id"), (*_PAGE, "ad_id"),
    ),
    RowRule(
        "ad-active-that-day", "impressions", ("impressions.ad_id", "ads.ad_id"), "unknown ad on that day: the day's catalogue does not hold it", "write one ads row for every ad and day",
        lambda look: (look.catalogue_rows >= 0) | ~_known(look, "impressions.ad_id", "ads.ad_id"), (*_PAGE, "event_timestamp", "ad_id"),
    ),
    RowRule(
        "ad-in-request-city", "impressions", ("impressions.ad_id", "ads.ad_id", "ads.city_id", "impressions.request_id", "requests.request_id", "requests.city_id"),
        "the ad is of another city than its request", "check city_id in ads and requests", lambda look: _equal(look.of_ad("city_id"), look.of_request("city_id")), (*_PAGE, "ad_id"),
    ),
    RowRule(
        "creative-of-the-ad", "impressions", ("impressions.ad_id", "ads.ad_id", "ads.creative_id", "impressions.creative_id"),
        "the creative is not one of this ad's (ids remapped?)", "check ad_id and creative_id", _creative_of_the_ad,
        (*_PAGE, "ad_id", "creative_id"),
    ),
    *(
        RowRule(
            "no-unknown-users", table, (f"{table}.user_id", "users.user_id"), "unknown user: not in the users table", "export a profile row for every user, with 0 for what is unknown",
            lambda look, table=table: _known(look, f"{table}.user_id", "users.user_id"), (*_TABLES[table].key, "user_id"),
        )
        for table in ("behaviours", "requests", "impressions", "organic")
    ),
    RowRule(
        "ad-has-a-creative", "ads", ("ads.ad_id", "creatives.ad_id"), "the table of creatives holds none of this ad's", "export every creative of the active ads, or leave the table out",
        lambda look: _known(look, "ads.ad_id", "creatives.ad_id"), ("event_timestamp", "ad_id"),
    ),
    RowRule(
        "embeddings-usable", "creatives", ("creatives.embedding",), "the embedding is empty, not finite, or not as long as the others", "embed image and text of every creative with one model", _embeddings_usable,
        ("creative_id", "ad_id"),
    ),
    RowRule(
        "organic-of-known-requests", "organic", ("organic.request_id", "requests.request_id"), "unknown request: its organic results are on no page of the logs", "export requests and organic results of the same days",
        lambda look: _organic_rows_of_requests(look) >= 0, ("request_id", "rank"),
    ),
    RowRule(
        "organic-order-kept", "organic", ("organic.request_id", "organic.rank", "organic.position", "impressions.request_id"),
        "ranks must be 1, 2, ... and positions rise with them, within the page", "export every organic result of a page with its place on it", _organic_in_order, ("request_id", "rank", "position"),
    ),
    RowRule(
        "impression-user-is-request-user", "impressions", ("impressions.user_id", "impressions.request_id", "requests.request_id", "requests.user_id"),
        "the impression's user is not the request's user", "check the join of impressions and requests", lambda look: _equal(look.tables["impressions"]["user_id"], look.of_request("user_id")), (*_PAGE, "user_id"),
    ),
    RowRule(
        "no-slot-gaps", "impressions", ("impressions.request_id", "impressions.slot"), "slot gaps: a page's slots must be 1, 2, ... without a gap", "export every shown slot of a page",
        _slot_is_next, _PAGE,
    ),
    RowRule(
        "slots-at-most-asked", "impressions", ("impressions.slot", "impressions.request_id", "requests.request_id", "requests.slots"), "the slot is beyond the slots that its request asked for",
        "check requests.slots", lambda look: ~(look.tables["impressions"]["slot"] > look.of_request("slots")), _PAGE,
    ),
    RowRule(
        "no-ad-twice-on-a-page", "impressions", ("impressions.request_id", "impressions.slot", "impressions.ad_id"), "the same ad stands twice on one page", "check the page's export",
        _ad_once, (*_PAGE, "ad_id"),
    ),
    RowRule(
        "impression-after-request", "impressions", ("impressions.event_timestamp", "impressions.request_id", "requests.request_id", "requests.event_timestamp"),
        "shown before its request, or more than an hour after it", "check clocks and time zones", _impression_after_request, (*_PAGE, "event_timestamp"),
    ),
    RowRule(
        "click-time-iff-click", "impressions", ("impressions.click", "impressions.click_timestamp"), "click and click_timestamp disagree: a click has a time, no click has none (labels flipped?)",
        "write both from the same event", _click_time_iff_click, (*_PAGE, "click", "click_timestamp"),
    ),
    RowRule(
        "click-after-impression", "impressions", ("impressions.click_timestamp", "impressions.event_timestamp"), "clicked before it was shown", "check clocks and time zones",
        _click_after_impression, (*_PAGE, "event_timestamp", "click_timestamp"),
    ),
    RowRule(
        "purchase-only-with-click", "impressions", ("impressions.purchase", "impressions.click"), "purchase without a click", "attribute purchases to clicks only",
        lambda look: ~((look.tables["impressions"]["purchase"] > 0) & (look.tables["impressions"]["click"] == 0)), (*_PAGE, "click", "purchase"),
    ),
    RowRule(
        "order-value-only-with-purchase", "impressions", ("impressions.order_value", "impressions.purchase"), "order value without a purchase", "write 0 without a purchase",
        lambda look: ~((look.tables["impressions"]["order_value"] > 0) & (look.tables["impressions"]["purchase"] == 0)), (*_PAGE, "purchase", "order_value"),
    ),
    RowRule(
        "same-place-everywhere", "behaviours", tuple(f"{table}.{name}" for table in ("ads", "behaviours") for name in ("poi_id", "category_id", "latitude", "longitude")),
        "category or position differs from the catalogue's for the same poi_id (ids remapped?)", "use one place table for ads and behaviours", _same_place, ("behaviour_id", "poi_id", "category_id"),
    ),
    RowRule(
        "session-of-one-user", "behaviours", ("behaviours.session_id", "behaviours.user_id", "requests.session_id", "requests.user_id"), "the session belongs to a request of another user",
        "make session ids unique over users", _session_of_one_user, ("behaviour_id", "user_id", "session_id"),
    ),
    *(
        RowRule(
            "no-future-timestamps", table, (f"{table}.event_timestamp",), "future timestamp", "check clocks and time zones, or leave out days that are not over", _not_in_future(table),
            (*_TABLES[table].key, "event_timestamp", *(("click_timestamp",) if table == "impressions" else ())),
        )
        for table in _TABLES
    ),
    *(
        RowRule(
            "rows-in-their-day", table, (f"{table}.event_timestamp",), "the timestamp is not of the UTC day of its folder", "partition by the UTC date of event_timestamp", _in_own_day(table),
            (*_TABLES[table].key, "event_timestamp"),
        )
        for table in _TABLES
    ),
)
