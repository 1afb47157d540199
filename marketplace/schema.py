"""The one source of truth for the logs: tables, columns, types, ranges, keys.

pyarrow schemas, Feast fields, Great Expectations suites, request models and docs/data.md are all derived from `TABLES`;
no other module repeats a column name's type. A folder of logs is `<root>/<table>/day=YYYY-MM-DD/*.parquet`; the day is
the UTC date of the table's time column.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

FORMAT_VERSION = 1
"""Raised when a column changes meaning; readers refuse other versions."""

TIMESTAMP = pa.timestamp("us", tz="UTC")
ID_MAX = 2**63 - 1

ACTION_VISIT, ACTION_CLICK, ACTION_PURCHASE = 1, 2, 3
"""Values of `behaviours.action`."""


@dataclass(frozen=True)
class Column:
    """One column: its storage type and what a valid value is."""

    name: str
    dtype: pa.DataType
    meaning: str
    unit: str = ""
    minimum: float | None = None
    maximum: float | None = None
    exclusive_minimum: bool = False
    nullable: bool = False
    default: float | None = None
    """What a file without this column means by leaving it out; None: the column must be there."""

    def field(self) -> pa.Field:
        return pa.field(self.name, self.dtype, nullable=self.nullable)


@dataclass(frozen=True)
class Table:
    """One log table. `key` is unique over the whole folder; `time` orders it and gives the day partition."""

    name: str
    meaning: str
    key: tuple[str, ...]
    time: str
    columns: tuple[Column, ...]

    @property
    def arrow(self) -> pa.Schema:
        return pa.schema([column.field() for column in self.columns])

    @property
    def names(self) -> list[str]:
        return [column.name for column in self.columns]

    def __getitem__(self, name: str) -> Column:
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(f"table {self.name} has no column {name!r}; it has {', '.join(self.names)}")


def _id(name: str, meaning: str) -> Column:
    return Column(name, pa.int64(), meaning, unit="id", minimum=0, maximum=ID_MAX)


def _code(name: str, meaning: str, maximum: int = 2**31 - 1) -> Column:
    return Column(name, pa.int32(), meaning, unit="code", minimum=0, maximum=maximum)


def _latitude(name: str, meaning: str) -> Column:
    return Column(name, pa.float64(), meaning, unit="degrees", minimum=-90.0, maximum=90.0)


def _longitude(name: str, meaning: str) -> Column:
    return Column(name, pa.float64(), meaning, unit="degrees", minimum=-180.0, maximum=180.0)


def _time(name: str, meaning: str, nullable: bool = False) -> Column:
    return Column(name, TIMESTAMP, meaning, unit="UTC, microseconds", nullable=nullable)


MAX_MONEY = 1e6
"""Upper bound of any bid, price or reserve per click; a guard against unit mistakes."""

ADS = Table(
    name="ads",
    meaning="The catalogue: one row for every ad that is active on a day, with that day's bid.",
    key=("event_timestamp", "ad_id"),
    time="event_timestamp",
    columns=(
        _time("event_timestamp", "Start of the day from which this row holds."),
        _id("ad_id", "The ad."),
        _id("creative_id", "The creative that is shown for the ad."),
        _id("poi_id", "The place that the ad promotes; the same id space as behaviours.poi_id."),
        _id("advertiser_id", "Who pays."),
        _code("city_id", "City; candidates of a request are the active ads of its city."),
        _code("category_id", "Category of the place."),
        _code("price_band", "Price level of the place, 0 unknown, 1 cheap to 5 dear.", 5),
        _latitude("latitude", "Where the place is."),
        _longitude("longitude", "Where the place is."),
        Column("bid", pa.float64(), "Bid for one click.", "currency per click", 0.0, MAX_MONEY, exclusive_minimum=True),
        Column("reserve", pa.float64(), "Least price of one click.", "currency per click", 0.0, MAX_MONEY),
    ),
)

USERS = Table(
    name="users",
    meaning="User profiles: a row holds from its time on, until the same user's next row.",
    key=("event_timestamp", "user_id"),
    time="event_timestamp",
    columns=(
        _time("event_timestamp", "From when this profile holds."),
        _id("user_id", "The user."),
        _code("city_id", "Home city."),
        _code("age_band", "Age band, 0 unknown.", 20),
        _code("gender", "0 unknown, 1 female, 2 male, 3 other.", 3),
        _latitude("home_latitude", "Usual place of the user, rounded as privacy asks."),
        _longitude("home_longitude", "Usual place of the user, rounded as privacy asks."),
    ),
)

BEHAVIOURS = Table(
    name="behaviours",
    meaning="What users did anywhere on the platform: visits, clicks (on ads too) and purchases.",
    key=("behaviour_id",),
    time="event_timestamp",
    columns=(
        _id("behaviour_id", "The event."),
        _time("event_timestamp", "When it happened."),
        _id("user_id", "Who did it."),
        _id("session_id", "Session it belongs to; a request of the same session shares the id; 0 none."),
        _id("poi_id", "At which place."),
        _code("category_id", "Category of the place."),
        Column("action", pa.int32(), "1 visit, 2 click, 3 purchase.", "code", 1, 3),
        _latitude("latitude", "Where the place is."),
        _longitude("longitude", "Where the place is."),
        Column("creative_id", pa.int64(), "The creative through which the user got there; 0 none.", "id", 0, ID_MAX, default=0),
    ),
)

REQUESTS = Table(
    name="requests",
    meaning="Page views that asked for ads.",
    key=("request_id",),
    time="event_timestamp",
    columns=(
        _id("request_id", "The request."),
        _time("event_timestamp", "When it was made."),
        _id("user_id", "Who made it."),
        _id("session_id", "Session it belongs to; 0 none."),
        _code("city_id", "Whose ads are candidates."),
        _latitude("latitude", "Where the user was, as far as the platform knew."),
        _longitude("longitude", "Where the user was, as far as the platform knew."),
        Column("utc_offset_minutes", pa.int32(), "Local time minus UTC.", "minutes", -840, 840),
        Column("slots", pa.int32(), "K, ads asked for.", "ads", 1, 50),
        Column("arm", pa.string(), "Experiment arm that answered; 'none' outside experiments."),
        Column("model_version", pa.string(), "Policy that answered, e.g. 'bootstrap-1' or a bundle's version."),
    ),
)

IMPRESSIONS = Table(
    name="impressions",
    meaning="Ads shown, one row a slot, with what the user then did.",
    key=("request_id", "slot"),
    time="event_timestamp",
    columns=(
        _id("request_id", "The request that was answered."),
        Column("slot", pa.int32(), "Position on the page, 1 at the top, no gaps.", "slot", 1, 50),
        _time("event_timestamp", "When the page was shown; the request's time or later."),
        _id("user_id", "Who saw it; the request's user."),
        _id("ad_id", "Ad shown; in the day's catalogue."),
        _id("creative_id", "Creative shown."),
        Column("bid", pa.float64(), "Bid that entered the auction.", "currency per click", 0.0, MAX_MONEY, exclusive_minimum=True),
        Column("payment", pa.float64(), "Price of a click on this ad; charged only if clicked; at most the bid.", "currency per click", 0.0, MAX_MONEY),
        Column("pctr", pa.float32(), "Click probability the policy predicted for this slot.", "probability", 0.0, 1.0),
        Column("propensity", pa.float32(), "Probability that the logging policy put this ad in this slot, given the slots above.", "probability", 0.0, 1.0, exclusive_minimum=True),
        Column("click", pa.int32(), "1 if clicked.", "0 or 1", 0, 1),
        _time("click_timestamp", "When it was clicked; null without a click.", nullable=True),
        Column("purchase", pa.int32(), "1 if the click led to an order.", "0 or 1", 0, 1),
        Column("order_value", pa.float64(), "Value of that order; 0 without one.", "currency", 0.0, 1e9),
        Column("creative_click", pa.int32(), "1 if the user opened the creative itself; nobody pays for it.", "0 or 1", 0, 1, default=0),
    ),
)

CREATIVES = Table(
    name="creatives",
    meaning="What an ad can look like: one row for every creative, from the day on which it exists. Without this table every ad has the one creative that `ads` names.",
    key=("creative_id",),
    time="event_timestamp",
    columns=(
        _time("event_timestamp", "From when it may be shown."),
        _id("creative_id", "The creative."),
        _id("ad_id", "The ad that it belongs to."),
        Column("embedding", pa.list_(pa.float32()), "Image and text as a vector; finite, equally long in all rows.", "-"),
    ),
)

ORGANIC = Table(
    name="organic",
    meaning="Organic results on the pages that also showed ads, in the order that must be kept. Without this table pages hold ads alone.",
    key=("request_id", "rank"),
    time="event_timestamp",
    columns=(
        _id("request_id", "The request that was answered."),
        Column("rank", pa.int32(), "Place in the organic order, 1 first, no gaps.", "rank", 1, 50),
        Column("position", pa.int32(), "Place on the whole page, 1 at the top; ads fill the places between, in slot order.", "position", 1, 100),
        _time("event_timestamp", "When the page was shown."),
        _id("user_id", "Who saw it; the request's user."),
        _id("poi_id", "The place shown."),
        _code("category_id", "Its category."),
        _latitude("latitude", "Where it is."),
        _longitude("longitude", "Where it is."),
        Column("click", pa.int32(), "1 if clicked.", "0 or 1", 0, 1),
    ),
)

TABLES: dict[str, Table] = {table.name: table for table in (ADS, USERS, BEHAVIOURS, REQUESTS, IMPRESSIONS)}
"""What every folder of logs holds."""
OPTIONAL_TABLES: dict[str, Table] = {table.name: table for table in (CREATIVES, ORGANIC)}
"""What a folder may hold beside them; `model.kind: ega_v2` learns from both."""

GEO_DEGREES = 0.01
"""Side of a geo cell in degrees, about 1.1 km of latitude."""

_CELLS_PER_ROW = round(360 / GEO_DEGREES)


def geo_cell(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Cell id of a place on a fixed grid of `GEO_DEGREES`; int64, vectorised. Used offline and online alike."""
    row = np.floor((np.asarray(latitude, np.float64) + 90.0) / GEO_DEGREES).astype(np.int64)
    column = np.floor((np.asarray(longitude, np.float64) + 180.0) / GEO_DEGREES).astype(np.int64)
    return row * _CELLS_PER_ROW + column


def geo_centre(cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Latitude and longitude of the middle of a cell, the inverse of `geo_cell` up to half a cell."""
    row, column = np.divmod(np.asarray(cell, np.int64), _CELLS_PER_ROW)
    return (row + 0.5) * GEO_DEGREES - 90.0, (column + 0.5) * GEO_DEGREES - 180.0


EARTH_RADIUS_KM = 6371.0088


def distance_km(latitude_a: np.ndarray, longitude_a: np.ndarray, latitude_b: np.ndarray, longitude_b: np.ndarray) -> np.ndarray:
    """Great-circle distance in kilometres (haversine), broadcasting."""
    lat_a, lon_a, lat_b, lon_b = (np.radians(np.asarray(x, np.float64)) for x in (latitude_a, longitude_a, latitude_b, longitude_b))
    half = np.sin((lat_b - lat_a) / 2) ** 2 + np.cos(lat_a) * np.cos(lat_b) * np.sin((lon_b - lon_a) / 2) ** 2
    distance: np.ndarray = 2 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(np.clip(half, 0.0, 1.0)))
    return distance

# ---------------------------------------------------------------------------------------------------------------------
# Encoded features and request samples: what `features/` writes and `model/` reads.


@dataclass(frozen=True)
class Encoded:
    """One categorical field after encoding. Index 0 is padding, 1 is unknown; `vocabulary` names the shared id table,
    or `size` fixes the number of codes (values are then stored as code + 2)."""

    name: str
    vocabulary: str = ""
    size: int = 0


VOCABULARIES = ("ad", "poi", "advertiser", "category", "geo", "creative")
"""Id tables learned from training days; POI, category and geo are shared between ads, users and behaviours."""

PADDING, UNKNOWN, FIRST_CODE = 0, 1, 2

AGE_BUCKET_HOURS = (1, 3, 6, 12, 24, 48, 96, 168, 336, 720, 1440, 2880)
"""Upper edges in hours of a behaviour's age at the request; one more bucket beyond the last."""

DISTANCE_BUCKET_KM = (0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 50.0)
"""Upper edges in km of a behaviour's (or an ad's) distance from the request; one more bucket beyond the last."""

AD_FIELDS = (
    Encoded("ad", "ad"),
    Encoded("poi", "poi"),
    Encoded("advertiser", "advertiser"),
    Encoded("category", "category"),
    Encoded("price_band", size=6),
    Encoded("geo", "geo"),
    Encoded("creative", "creative"),
)
USER_FIELDS = (Encoded("age_band", size=21), Encoded("gender", size=4), Encoded("home_geo", "geo"))
CONTEXT_FIELDS = (Encoded("hour", size=24), Encoded("weekday", size=7), Encoded("geo", "geo"))
BEHAVIOUR_FIELDS = (
    Encoded("poi", "poi"),
    Encoded("category", "category"),
    Encoded("geo", "geo"),
    Encoded("action", size=4),
    Encoded("age", size=len(AGE_BUCKET_HOURS) + 1),
    Encoded("hour_distance", size=13),
    Encoded("weekday_match", size=2),
    Encoded("distance", size=len(DISTANCE_BUCKET_KM) + 1),
)

TRAIN, VALIDATION, TEST = 0, 1, 2
"""Values of the sample array `split`."""


@dataclass(frozen=True)
class SampleArray:
    """One memory-mapped `<name>.npy` of a sample folder. Shape letters: A ads, R requests, T days, K slots,
    M = K + N_s candidates, L behaviours, P targets, Q places, G creatives, E width of an embedding, O organic items, and F_* the
    number of fields above."""

    name: str
    dtype: str
    shape: str
    meaning: str


SAMPLE_ARRAYS = (
    SampleArray("ad_id", "int64", "A", "raw id of each row of the ad table"),
    SampleArray("ad_fields", "int32", "A F_ad", "AD_FIELDS, encoded"),
    SampleArray("ad_city", "int32", "A", "city code"),
    SampleArray("ad_place", "float32", "A 2", "latitude, longitude"),
    SampleArray("bid", "float64", "T A", "bid of the day, currency per click; NaN where the ad is not active that day"),
    SampleArray("reserve", "float64", "T A", "reserve of the day; NaN where not active"),
    SampleArray("request_id", "int64", "R", "raw id, in time order"),
    SampleArray("user_id", "int64", "R", "raw id"),
    SampleArray("time", "int64", "R", "seconds since 1970 UTC"),
    SampleArray("day", "int32", "R", "index into samples.json `days`"),
    SampleArray("split", "int8", "R", "TRAIN, VALIDATION or TEST, by day"),
    SampleArray("city", "int32", "R", "city code"),
    SampleArray("request_place", "float32", "R 2", "latitude, longitude"),
    SampleArray("user_fields", "int32", "R F_user", "USER_FIELDS, encoded"),
    SampleArray("context_fields", "int32", "R F_context", "CONTEXT_FIELDS, encoded"),
    SampleArray("behaviours", "int32", "R L F_behaviour", "BEHAVIOUR_FIELDS, encoded, newest first, padding (0) at the end"),
    SampleArray("candidate", "int32", "R M", "row of the ad table: K exposed in slot order, then N_s unexposed; -1 padding"),
    SampleArray("click", "int8", "R M", "label: click if exposed, else click or visit of the ad's POI elsewhere in the session"),
    SampleArray("purchase", "int8", "R M", "label: purchase, by the same rule"),
    SampleArray("log_inclusion", "float32", "R M", "log probability with which sampling draws this ad when it is not chosen; the same whether or not it was; 0 for exposed, and where the draw ignores labels"),
    SampleArray("exposed_bid", "float64", "R K", "bid logged with the impression; NaN padding"),
    SampleArray("exposed_payment", "float64", "R K", "payment logged; NaN padding"),
    SampleArray("exposed_pctr", "float32", "R K", "logging policy's pctr; NaN padding"),
    SampleArray("propensity", "float32", "R K", "logging propensity; NaN padding"),
    SampleArray("target", "int32", "R P", "ad rows the user clicked or visited elsewhere in the session after the request; -1 padding"),
)

PAGE_ARRAYS = (
    SampleArray("place_id", "int64", "Q", "raw id of every place seen: of ads, behaviours and organic items"),
    SampleArray("place_category", "int32", "Q", "category code"),
    SampleArray("place_position", "float64", "Q 2", "latitude, longitude"),
    SampleArray("ad_place_row", "int32", "A", "row of the place that the ad promotes"),
    SampleArray("creative_id", "int64", "G", "raw id, ordered by ad row, then id"),
    SampleArray("creative_ad", "int32", "G", "row of its ad"),
    SampleArray("creative_embedding", "float32", "G E", "image and text"),
    SampleArray("shown_creative", "int32", "T A", "row of the creative that a selector of its own would show that day; -1 none"),
    SampleArray("ad_impressions", "int32", "T A", "times the ad was shown before that day, as the catalogue of the day says; 0 where it is not active"),
    SampleArray("ad_clicks", "int32", "T A", "times it was clicked before that day"),
    SampleArray("exposed_creative", "int32", "R K", "row of the creative shown; -1 padding"),
    SampleArray("creative_click", "int8", "R K", "label: the creative was opened"),
    SampleArray("above", "int8", "R K", "organic items above each exposed ad; those of a page without organic items are 0"),
    SampleArray("organic_place", "int32", "R O", "row of the place of each organic item in their order; -1 padding"),
    SampleArray("organic_click", "int8", "R O", "label: click"),
    SampleArray("behaviour_place", "int32", "R L", "row of the place of each behaviour, newest first; -1 padding"),
    SampleArray("behaviour_creative", "int32", "R L", "row of the creative that led there; -1 none"),
    SampleArray("next_place", "int32", "R P", "rows of the places that the user went to in the rest of the session, in time order; -1 padding"),
)
"""Written beside SAMPLE_ARRAYS where the logs hold creatives; what `model.kind: ega_v2` reads. All zero-wide where there are no organic items."""
