"""The check-ins world: real people and real places; advertisers, bids and values are synthetic and seeded.

Input: a folder with `checkins.parquet` (user_id, poi_id, timestamp in UTC) and `pois.parquet` (poi_id, lat, lon, and
where known category, taxonomy, name). Every check-in of the window at the end of the data becomes a request made a few
minutes before it, from the place of the user's previous check-in, so the destination does not leak. The attraction of
ads comes from the user's earlier check-ins and from the check-in that follows.
Private homes and residential buildings are never ads. Price bands are drawn per category (seeded), 0 where the category
is unknown; age and gender are unknown.
"""

from __future__ import annotations

from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np
import pandas as pd
from pydantic import ConfigDict, model_validator
from pydantic.dataclasses import dataclass

from marketplace.click_model import ClickConfig
from marketplace.state import REQUEST_ID_BASE, WorldState, build_ads, count_habits, draw_bids, nearest_substitutes

CITY = 1
"""city_id of everything in a check-ins world."""

_PRIVATE = r"home \(private\)|residen|apartment|condo\b|housing development|assisted living"
_SIMULTANEOUS_SECONDS = 2.0


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class CheckinsConfig:
    """How check-ins become requests, and the synthetic market around them."""

    requests: int = 40_000
    """Least number of requests (log and live days together); the window begins as late as that allows."""
    live_share: float = 0.1
    """Share of those requests, at the end, kept for live traffic."""
    timezone: str | None = None
    """Time zone of the city, e.g. America/New_York; null takes whole hours from the mean longitude."""
    max_ads: int = 6000
    """Places with ads, the most visited before the window first."""
    min_lead_minutes: float = 2.0
    """Least time from a request to the check-in that follows."""
    max_lead_minutes: float = 20.0
    """Most time from a request to the check-in that follows."""
    value_spread: float = 0.85
    """Standard deviation of log value per click."""
    bid_jitter: float = 0.03
    """Standard deviation of a bid's daily noise, relative."""
    part_time_ads: float = 0.1
    """Share of ads that start or end inside the log days."""

    @model_validator(mode="after")
    def _check(self) -> CheckinsConfig:
        if self.requests < 1 or self.max_ads < 1:
            raise ValueError(f"requests and max_ads must be at least 1, got {self.requests} and {self.max_ads}")
        if not 0 <= self.live_share < 1 or not 0 <= self.part_time_ads < 1:
            raise ValueError("live_share and part_time_ads must lie in [0, 1)")
        if not 0 < self.min_lead_minutes <= self.max_lead_minutes:
            raise ValueError("0 < min_lead_minutes <= max_lead_minutes must hold")
        if self.timezone is not None:
            try:
                ZoneInfo(self.timezone)
            except (ZoneInfoNotFoundError, ValueError):
                raise ValueError(f"timezone {self.timezone!r} is not known; give a name such as America/New_York, or null") from None
        return self


def read_checkins(data: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Check-ins (user_id, poi_id, event_timestamp UTC) sorted by user and time, and places (poi_id, latitude, longitude,
    category, taxonomy, name). Check-ins at places without coordinates and exact duplicates are left out."""
    checkins, pois = (_read(Path(data) / name, columns) for name, columns in (("checkins.parquet", ["user_id", "poi_id", "timestamp"]), ("pois.parquet", ["poi_id", "lat", "lon"])))
    for name in ("category", "taxonomy", "name"):
        if name not in pois:
            pois[name] = None
    pois = pois.rename(columns={"lat": "latitude", "lon": "longitude"})[["poi_id", "latitude", "longitude", "category", "taxonomy", "name"]]
    pois = pois.dropna(subset=["poi_id", "latitude", "longitude"]).drop_duplicates("poi_id").sort_values("poi_id", ignore_index=True)
    if not (pois["latitude"].between(-90, 90) & pois["longitude"].between(-180, 180)).all():
        raise ValueError(f"{data}/pois.parquet: lat must lie in [-90, 90] and lon in [-180, 180] degrees")
    checkins = checkins[["user_id", "poi_id", "timestamp"]].dropna().rename(columns={"timestamp": "event_timestamp"})
    for name, frame in (("user_id", checkins), ("poi_id", checkins), ("poi_id", pois)):
        if not pd.api.types.is_numeric_dtype(frame[name]) or (frame[name] < 0).any():
            raise ValueError(f"{data}: {name} must be a whole number >= 0, got {frame[name].dtype}; number the ids first")
        frame[name] = frame[name].astype(np.int64)
    if not pd.api.types.is_datetime64_any_dtype(checkins["event_timestamp"]):
        raise ValueError(f"{data}/checkins.parquet: column 'timestamp' must be a timestamp in UTC, got {checkins['event_timestamp'].dtype}")
    checkins["event_timestamp"] = pd.to_datetime(checkins["event_timestamp"], utc=True).astype("datetime64[us, UTC]")
    checkins = checkins[checkins["poi_id"].isin(pois["poi_id"])].drop_duplicates()
    if checkins.empty:
        raise ValueError(f"{data}: no check-in is at a place of pois.parquet that has coordinates")
    return checkins.sort_values(["user_id", "event_timestamp", "poi_id"], ignore_index=True), pois


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; a check-ins folder holds checkins.parquet and pois.parquet (see `ega convert-checkins`)")
    frame = pd.read_parquet(path)
    missing = [name for name in columns if name not in frame]
    if missing:
        raise ValueError(f"{path}: column {missing[0]!r} is missing; it has {', '.join(map(str, frame.columns))}")
    return frame


def category_labels(pois: pd.DataFrame) -> pd.Series:
    """One label per place: the category, else the last level of the taxonomy, else null."""
    last = pois["taxonomy"].astype("string").str.split(" > ").str[-1]
    return pois["category"].astype("string").fillna(last)


def is_private(pois: pd.DataFrame) -> np.ndarray:
    """Homes and residential buildings, by category or taxonomy; they are never ads."""
    text = pois["category"].astype("string").fillna("") + " | " + pois["taxonomy"].astype("string").fillna("")
    return text.str.contains(_PRIVATE, case=False, regex=True).to_numpy(bool)


def generate(config: CheckinsConfig, clicks: ClickConfig, data: Path, seed: int) -> WorldState:
    """The world of a check-ins folder; the same folder, config and seed give the same world."""
    rng = np.random.default_rng([seed, 2])
    checkins, places = read_checkins(data)
    labels = category_labels(places)
    names = sorted(labels.dropna().unique())
    category = labels.map({name: code for code, name in enumerate(names, start=1)}).fillna(0).astype(np.int32).to_numpy()

    checkins["poi_row"] = np.searchsorted(places["poi_id"], checkins["poi_id"])
    user_ids = np.unique(checkins["user_id"])
    checkins["user_row"] = np.searchsorted(user_ids, checkins["user_id"])
    visits, requests, log_days, live_days = _events(config, checkins, places, rng)
    first = pd.Timestamp(log_days[0], tz="UTC")
    past = visits[visits["event_timestamp"] < first]

    local_hour = _local_hour(past["event_timestamp"], config, float(places["longitude"].mean()))
    popularity = np.bincount(past["poi_row"], minlength=len(places))
    base_price = rng.normal(2.7, 0.9, len(names) + 1)
    band = np.clip(np.round(base_price[category] + rng.normal(0.0, 0.8, len(places))), 1, 5).astype(np.int32)
    pois = pd.DataFrame(
        {
            "poi_id": places["poi_id"],
            "city_id": np.full(len(places), CITY, np.int32),
            "category_id": category,
            "price_band": np.where(category == 0, 0, band).astype(np.int32),
            "latitude": places["latitude"].astype(np.float64),
            "longitude": places["longitude"].astype(np.float64),
            "quality": _standard(0.85 * _standard(np.log1p(popularity)) + 0.5 * rng.standard_normal(len(places))),
        }
    )
    poi_rows = np.flatnonzero(~is_private(places))
    if not len(poi_rows):
        raise ValueError(f"{data}: every place is a private home or residential; there is nothing to advertise")
    poi_rows = np.sort(poi_rows[np.argsort(-popularity[poi_rows], kind="stable")[: config.max_ads]])
    brand = places["name"].astype("string").fillna("").iloc[poi_rows].to_numpy(object)
    advertiser = pd.factorize(np.array([name or f"#{row}" for name, row in zip(brand, poi_rows, strict=True)], object))[0]
    ads = build_ads(pois, poi_rows, advertiser, config.value_spread, rng, clicks)
    bid_DA = draw_bids(ads["value"].to_numpy(), len(log_days), config.bid_jitter, config.part_time_ads, rng)
    drift_DA = np.cumsum(clicks.day_drift * rng.standard_normal((len(log_days) + 1, len(ads))), axis=0)
    substitute_AS, weight_AS = nearest_substitutes(*(ads[name].to_numpy() for name in ("city_id", "category_id", "latitude", "longitude")), clicks)
    habit_key, habit_value = count_habits(visits, first, len(pois))
    ad_category = ads["category_id"].to_numpy()
    taste = _affinity(past["user_row"].to_numpy(), category[past["poi_row"]], (len(user_ids), len(names) + 1), 10.0)
    hours = _affinity(category[past["poi_row"]], local_hour, (len(names) + 1, 24), 20.0)
    return WorldState(
        users=_users(user_ids, past, places, rng),
        pois=pois,
        ads=ads,
        visits=visits,
        requests=_with_home(requests, past, places, len(user_ids)),
        taste_UC=((taste - taste[:, ad_category].mean()) / max(taste[:, ad_category].std(), 1e-6)).astype(np.float32),
        hour_affinity_C24=(hours / max(hours[ad_category].std(), 1e-6)).astype(np.float32),
        bid_DA=np.concatenate([bid_DA, bid_DA[-1:]]),
        drift_DA=drift_DA,
        substitute_AS=substitute_AS,
        substitute_weight_AS=weight_AS,
        habit_key=habit_key,
        habit_value=habit_value,
        log_days=log_days,
        live_days=live_days,
    )


def _standard(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / max(float(values.std()), 1e-6)


def _affinity(row: np.ndarray, column: np.ndarray, shape: tuple[int, int], prior: float) -> np.ndarray:
    """log of (share of the column in the row, shrunk to the overall share by `prior` counts) over the overall share."""
    counts = np.zeros(shape)
    np.add.at(counts, (row, column), 1.0)
    share = (counts.sum(axis=0) + 1.0) / (counts.sum() + shape[1])
    return np.log((counts + prior * share) / (counts.sum(axis=1, keepdims=True) + prior) / share)


def _offset_minutes(time: pd.Series, config: CheckinsConfig, longitude: float) -> np.ndarray:
    if config.timezone is None:
        return np.full(len(time), 60 * round(longitude / 15.0), np.int32)
    wall = time.dt.tz_convert(config.timezone).dt.tz_localize(None)
    return ((wall - time.dt.tz_localize(None)) // pd.Timedelta(minutes=1)).to_numpy(np.int32)


def _local_hour(time: pd.Series, config: CheckinsConfig, longitude: float) -> np.ndarray:
    seconds = time.astype("int64").to_numpy() // 1_000_000 + 60 * _offset_minutes(time, config, longitude).astype(np.int64)
    return (seconds // 3600) % 24


def _events(config: CheckinsConfig, checkins: pd.DataFrame, places: pd.DataFrame, rng: np.random.Generator) -> tuple[pd.DataFrame, pd.DataFrame, list, list]:
    """Visits with sessions, the requests before them, and the log and live days."""
    us = checkins["event_timestamp"].astype("int64").to_numpy()
    user, poi = checkins["user_row"].to_numpy(), checkins["poi_row"].to_numpy()
    same_user = np.concatenate([[False], user[1:] == user[:-1]])
    since = np.where(same_user, np.diff(us, prepend=us[0]) / 1e6, np.inf)
    opens = since >= _SIMULTANEOUS_SECONDS
    session = np.cumsum(opens)
    lead = rng.uniform(60.0 * config.min_lead_minutes, 60.0 * config.max_lead_minutes, len(us))
    since_midnight = (us % 86_400_000_000) / 1e6
    lead = np.minimum(np.minimum(lead, 0.5 * since), np.maximum(0.5 * since_midnight, 1.0))
    previous = np.where(same_user, np.concatenate([[0], poi[:-1]]), -1)
    requests = pd.DataFrame({"us": us - (lead * 1e6).astype(np.int64), "user_row": user, "session_id": session, "intent_poi_row": poi, "previous": previous})[opens]
    requests["day"] = requests["us"] // 86_400_000_000
    log_days, live_days = _window(config, requests["day"].to_numpy())
    requests = requests[requests["day"] >= log_days[0]].sort_values(["us", "user_row"], ignore_index=True)

    time = pd.to_datetime(requests["us"], unit="us", utc=True).astype("datetime64[us, UTC]")
    longitude = float(places["longitude"].mean())
    at = places.reindex(requests["previous"])
    requests = pd.DataFrame(
        {
            "request_id": REQUEST_ID_BASE + np.arange(len(requests), dtype=np.int64),
            "event_timestamp": time,
            "user_row": requests["user_row"],
            "session_id": requests["session_id"].astype(np.int64),
            "city_id": np.full(len(requests), CITY, np.int32),
            "latitude": at["latitude"].to_numpy(np.float64),
            "longitude": at["longitude"].to_numpy(np.float64),
            "utc_offset_minutes": _offset_minutes(time, config, longitude),
            "local_hour": _local_hour(time, config, longitude),
            "day_row": np.searchsorted(log_days, requests["day"]).clip(max=len(log_days)).astype(np.int64),
            "intent_poi_row": requests["intent_poi_row"].astype(np.int64),
        }
    )
    visits = pd.DataFrame({"event_timestamp": checkins["event_timestamp"], "user_row": user, "session_id": session.astype(np.int64), "poi_row": poi})
    visits = visits.sort_values(["event_timestamp", "user_row", "poi_row"], ignore_index=True)
    return visits, requests, _dates(log_days), _dates(live_days)


def _dates(days: np.ndarray) -> list:
    return [timestamp.date() for timestamp in pd.to_datetime(days, unit="D")]


def _window(config: CheckinsConfig, day: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log days and live days (days since 1970, only days with requests): the last ones that hold the wanted requests."""
    days, count = np.unique(day, return_counts=True)
    from_end = np.cumsum(count[::-1])[::-1]  # requests on this day or later
    start = max(0, int((from_end >= config.requests).sum()) - 1)
    days, from_end = days[start:], from_end[start:]
    wanted = config.live_share * from_end[0]
    live = int((from_end >= wanted).sum()) - 1 if wanted > 0 else len(days)
    if live < 1:
        raise ValueError(f"the check-ins cover {len(days)} days with requests; at least one log day before the live days is needed")
    return days[:live], days[live:]


def _homes(past: pd.DataFrame, places: pd.DataFrame, users: int) -> pd.DataFrame:
    """Median place of each user's visits before the first log day; the median of all places where there are none."""
    at = places[["latitude", "longitude"]].iloc[past["poi_row"]].set_axis(past["user_row"].to_numpy())
    homes = at.groupby(level=0).median().reindex(np.arange(users))
    return homes.fillna(places[["latitude", "longitude"]].median())


def _with_home(requests: pd.DataFrame, past: pd.DataFrame, places: pd.DataFrame, users: int) -> pd.DataFrame:
    """Requests of users without an earlier check-in are made from home."""
    homes = _homes(past, places, users)
    for name in ("latitude", "longitude"):
        requests[name] = requests[name].fillna(pd.Series(homes[name].to_numpy()[requests["user_row"]], index=requests.index))
    return requests


def _users(user_ids: np.ndarray, past: pd.DataFrame, places: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    homes, count = _homes(past, places, len(user_ids)), len(user_ids)
    return pd.DataFrame(
        {
            "user_id": user_ids.astype(np.int64),
            "city_id": np.full(count, CITY, np.int32),
            "age_band": np.zeros(count, np.int32),
            "gender": np.zeros(count, np.int32),
            "home_latitude": homes["latitude"].to_numpy().round(2),
            "home_longitude": homes["longitude"].to_numpy().round(2),
            "price_sensitivity": np.exp(0.5 * rng.standard_normal(count) - 0.125),
            "distance_sensitivity": np.exp(0.35 * rng.standard_normal(count) - 0.06),
        }
    )
