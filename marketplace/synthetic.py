"""The synthetic world: cities as planes with clustered places, people with homes, work, tastes, habits and hours.

Organic visits are either habits (the same place around the same hour) or a softmax choice by taste, quality, price,
distance and hour. Requests come minutes before visits, from where the user is, or for no visit at all.
Shapes: U users, P places, C categories, H habits, V visits.
"""

from __future__ import annotations

from datetime import date, timedelta
from typing import NamedTuple

import numpy as np
import pandas as pd
from pydantic import ConfigDict, model_validator
from pydantic.dataclasses import dataclass

from marketplace.click_model import ClickConfig
from marketplace.state import KM_PER_DEGREE, REQUEST_ID_BASE, WorldState, build_ads, count_habits, draw_bids, nearest_substitutes

_HOUR_WEIGHT = np.array([1, 0.5, 0.3, 0.2, 0.2, 0.5, 1.5, 3, 4.5, 4, 3.5, 4.5, 6, 5, 3.5, 3.5, 4, 5, 6.5, 7, 6, 4.5, 3, 2])
"""How active people are by local hour."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class SyntheticConfig:
    """Size and habits of a synthetic world."""

    cities: int = 1
    """Number of cities; users and ads of different cities never meet."""
    users: int = 2500
    """U, users over all cities."""
    ads_per_city: int = 600
    """Ads of each city; one place each."""
    places_per_city: int = 900
    """Places of each city, with and without ads."""
    categories: int = 24
    """C, categories of places."""
    first_log_day: date = date(2025, 9, 1)
    """First UTC day with requests."""
    history_days: int = 28
    """Days of organic visits before the first log day."""
    log_days: int = 14
    """Days answered by the bootstrap policy and written as logs."""
    live_days: int = 3
    """Days after the logs, kept for live traffic."""
    visits_per_user_day: float = 1.6
    """Organic visits of a user, mean per day."""
    requests_per_user_day: float = 1.29
    """Page views that ask for ads, mean per user and day."""
    intent_share: float = 0.7
    """Share of requests that are followed by an organic visit of the same session."""
    habit_share: float = 0.55
    """Share of visits that are habits."""
    habits: int = 6
    """H, habitual places of a user."""
    value_spread: float = 0.85
    """Standard deviation of log value per click."""
    bid_jitter: float = 0.03
    """Standard deviation of a bid's daily noise, relative."""
    part_time_ads: float = 0.15
    """Share of ads that start or end inside the log days."""
    utc_offset_minutes: int = 480
    """Local time minus UTC."""

    @model_validator(mode="after")
    def _check(self) -> SyntheticConfig:
        for name in ("cities", "users", "ads_per_city", "categories", "log_days", "habits"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.places_per_city < self.ads_per_city:
            raise ValueError(f"places_per_city {self.places_per_city} must be at least ads_per_city {self.ads_per_city}")
        if self.history_days < 1 or self.live_days < 0:
            raise ValueError("history_days must be at least 1 and live_days at least 0")
        if not (0 <= self.intent_share <= 1 and 0 <= self.habit_share <= 1 and 0 <= self.part_time_ads < 1):
            raise ValueError("intent_share, habit_share and part_time_ads are shares in [0, 1]")
        if self.visits_per_user_day <= 0 or self.requests_per_user_day <= 0:
            raise ValueError("visits_per_user_day and requests_per_user_day must be positive")
        if not -840 <= self.utc_offset_minutes <= 840:
            raise ValueError(f"utc_offset_minutes must lie in [-840, 840], got {self.utc_offset_minutes}")
        return self


class _City(NamedTuple):
    """One city on its plane, in km from its centre."""

    number: int
    latitude: float
    longitude: float
    first_poi: int
    first_user: int
    users: int

    def degrees(self, x_km: np.ndarray, y_km: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.latitude + y_km / KM_PER_DEGREE, self.longitude + x_km / (KM_PER_DEGREE * np.cos(np.radians(self.latitude)))


class _People(NamedTuple):
    """Hidden traits, [U, ...] float32."""

    taste_UC: np.ndarray
    price_U: np.ndarray
    distance_U: np.ndarray
    home_U2: np.ndarray
    work_U2: np.ndarray


def generate(config: SyntheticConfig, clicks: ClickConfig, seed: int) -> WorldState:
    """Draw a synthetic world; the same config and seed give the same world."""
    rng = np.random.default_rng([seed, 1])
    affinity_C24 = _hour_affinity(config.categories, rng)
    cities, pois, centres = _places(config, rng)
    users, people = _users(config, cities, centres, rng)
    visits, requests = _events(config, cities, pois, people, affinity_C24, rng)

    poi_rows = np.concatenate([np.sort(rng.choice(config.places_per_city, config.ads_per_city, replace=False)) + city.first_poi for city in cities])
    advertiser = rng.integers(0, max(1, int(0.8 * len(poi_rows))), len(poi_rows))
    ads = build_ads(pois, poi_rows, advertiser, config.value_spread, rng, clicks)
    bid_DA = draw_bids(ads["value"].to_numpy(), config.log_days, config.bid_jitter, config.part_time_ads, rng)
    drift_DA = np.cumsum(clicks.day_drift * rng.standard_normal((config.log_days + 1, len(ads))), axis=0)
    substitute_AS, weight_AS = nearest_substitutes(*(ads[name].to_numpy() for name in ("city_id", "category_id", "latitude", "longitude")), clicks)
    first = pd.Timestamp(config.first_log_day, tz="UTC")
    habit_key, habit_value = count_habits(visits, first, len(pois))
    days = [config.first_log_day + timedelta(days=number) for number in range(config.log_days + config.live_days)]
    return WorldState(
        users=users,
        pois=pois.drop(columns=["x", "y"]),
        ads=ads,
        visits=visits,
        requests=requests,
        taste_UC=people.taste_UC,
        hour_affinity_C24=affinity_C24,
        bid_DA=np.concatenate([bid_DA, bid_DA[-1:]]),
        drift_DA=drift_DA,
        substitute_AS=substitute_AS,
        substitute_weight_AS=weight_AS,
        habit_key=habit_key,
        habit_value=habit_value,
        log_days=days[: config.log_days],
        live_days=days[config.log_days :],
    )


def _hour_affinity(categories: int, rng: np.random.Generator) -> np.ndarray:
    """[C, 24], one or two peaks a day per category; zero mean and unit variance over all."""
    hours = np.arange(24)
    peaks = rng.choice(24, (categories, 2), p=_HOUR_WEIGHT / _HOUR_WEIGHT.sum())
    second = rng.random(categories) * (rng.random(categories) < 0.5)
    away = (hours - peaks[..., None] + 12) % 24 - 12
    bump = np.exp(-0.5 * (away / 2.5) ** 2)
    affinity = bump[:, 0] + second[:, None] * bump[:, 1]
    affinity -= affinity.mean(axis=1, keepdims=True)
    return (affinity / affinity.std()).astype(np.float32)


def _places(config: SyntheticConfig, rng: np.random.Generator) -> tuple[list[_City], pd.DataFrame, list[np.ndarray]]:
    cities, parts, centres = [], [], []
    per_city = np.array_split(np.arange(config.users), config.cities)
    base_price = rng.normal(2.7, 0.9, config.categories)
    for number, members in enumerate(per_city):
        city = _City(number + 1, 30.0 + 2.5 * (number % 8), 120.0 - 3.0 * (number // 8), number * config.places_per_city, int(members[0]) if len(members) else 0, len(members))
        count, clusters = config.places_per_city, max(3, config.places_per_city // 70)
        centre = rng.normal(0.0, 5.0, (clusters, 2))
        cluster = rng.choice(clusters, count, p=rng.dirichlet(np.full(clusters, 2.0)))
        mix = rng.dirichlet(np.full(config.categories, 0.7), clusters)
        category = (mix.cumsum(axis=1)[cluster] < rng.random(count)[:, None]).sum(axis=1).clip(max=config.categories - 1)
        x, y = (centre[cluster] + rng.normal(0.0, 1.0, (count, 2))).T
        band = np.clip(np.round(base_price[category] + rng.normal(0.0, 0.8, count)), 1, 5).astype(np.int32)
        band[rng.random(count) < 0.03] = 0
        latitude, longitude = city.degrees(x, y)
        poi_id = city.first_poi + 1 + np.arange(count, dtype=np.int64)
        quality = rng.standard_normal(count)
        parts.append(
            pd.DataFrame(
                {
                    "poi_id": poi_id,
                    "city_id": np.full(count, city.number, np.int32),
                    "category_id": category.astype(np.int32),
                    "price_band": band,
                    "latitude": latitude,
                    "longitude": longitude,
                    "quality": quality,
                    "x": x,
                    "y": y,
                }
            )
        )
        cities.append(city)
        centres.append(centre)
    return cities, pd.concat(parts, ignore_index=True), centres


def _users(config: SyntheticConfig, cities: list[_City], centres: list[np.ndarray], rng: np.random.Generator) -> tuple[pd.DataFrame, _People]:
    count = config.users
    age, gender = rng.integers(1, 9, count), rng.choice([1, 2, 3], count, p=[0.49, 0.49, 0.02])
    group = rng.standard_normal((9, 4, config.categories))
    taste = np.sqrt(0.4) * group[age, gender] + np.sqrt(0.6) * rng.standard_normal((count, config.categories))
    hidden_age, hidden_gender = rng.random(count) < 0.05, rng.random(count) < 0.05
    home, work = np.empty((count, 2)), np.empty((count, 2))
    latitude, longitude, number = np.empty(count), np.empty(count), np.empty(count, np.int32)
    for city, centre in zip(cities, centres, strict=True):
        members = slice(city.first_user, city.first_user + city.users)
        home[members] = centre[rng.integers(0, len(centre), city.users)] + rng.normal(0.0, 2.0, (city.users, 2))
        work[members] = centre[rng.integers(0, max(1, len(centre) // 2), city.users)] + rng.normal(0.0, 1.0, (city.users, 2))
        latitude[members], longitude[members] = city.degrees(*home[members].T)
        number[members] = city.number
    people = _People(
        taste.astype(np.float32), np.exp(0.5 * rng.standard_normal(count) - 0.125), np.exp(0.35 * rng.standard_normal(count) - 0.06), home, work
    )
    users = pd.DataFrame(
        {
            "user_id": 100_001 + np.arange(count, dtype=np.int64),
            "city_id": number,
            "age_band": np.where(hidden_age, 0, age).astype(np.int32),
            "gender": np.where(hidden_gender, 0, gender).astype(np.int32),
            "home_latitude": latitude.round(2),
            "home_longitude": longitude.round(2),
            "price_sensitivity": people.price_U,
            "distance_sensitivity": people.distance_U,
        }
    )
    return users, people


class _Chooser:
    """Softmax choice of a place of one city: taste, quality, price, distance, hour."""

    def __init__(self, city: _City, pois: pd.DataFrame, people: _People, affinity_C24: np.ndarray) -> None:
        mine = pois.iloc[city.first_poi : city.first_poi + int((pois["city_id"] == city.number).sum())]
        self._first = city.first_poi
        self._category = mine["category_id"].to_numpy()
        self._place = mine[["x", "y"]].to_numpy(np.float32)
        self._quality = 0.7 * mine["quality"].to_numpy(np.float32)
        self._price = 0.3 * (mine["price_band"].to_numpy(np.float32) - 2.5)
        self._people, self._affinity_24C = people, np.ascontiguousarray(affinity_C24.T)

    def choose(self, user: np.ndarray, place: np.ndarray, hour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Rows of the chosen places [V] for users [V] at places [V, 2] km and local hours [V]."""
        chosen = np.empty(len(user), np.int64)
        uniform = rng.random(len(user))
        step = max(1, 2**18 // len(self._category))
        for start in range(0, len(user), step):
            part = slice(start, start + step)
            by_category = self._people.taste_UC[user[part]] + self._affinity_24C[hour[part]]
            utility = by_category[:, self._category]
            utility += self._quality
            utility -= self._people.price_U[user[part], None].astype(np.float32) * self._price
            here = place[part].astype(np.float32)
            east, north = here[:, :1] - self._place[:, 0], here[:, 1:] - self._place[:, 1]
            east *= east
            north *= north
            east += north
            log_km = np.log(np.sqrt(east, out=east) + np.float32(1.0))
            log_km *= 1.4 * self._people.distance_U[user[part], None].astype(np.float32)
            utility -= log_km
            chosen[part] = _draw_rows(np.exp(utility, out=utility), uniform[part])
        return chosen + self._first


def _draw_rows(weight: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """One column per row of `weight` [V, P], with probability proportional to it; by blocks of columns, then inside one."""
    rows, columns = weight.shape
    block = max(1, int(np.sqrt(columns)))
    blocks = -(-columns // block)
    padded = weight if blocks * block == columns else np.pad(weight, ((0, 0), (0, blocks * block - columns)))
    padded = padded.reshape(rows, blocks, block)
    upto = np.cumsum(padded.sum(axis=2, dtype=np.float64), axis=1)
    target = uniform * upto[:, -1]
    which = (upto <= target[:, None]).sum(axis=1).clip(max=blocks - 1)
    inside = np.cumsum(padded[np.arange(rows), which], axis=1, dtype=np.float64)
    below = np.where(which > 0, upto[np.arange(rows), which - 1], 0.0)
    column = (inside <= (target - below)[:, None]).sum(axis=1).clip(max=block - 1)
    return np.minimum(which * block + column, columns - 1)


def _whereabouts(people: _People, user: np.ndarray, weekday: np.ndarray, hour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Where users are [V, 2] km: mostly at work in office hours, else around home."""
    at_work = (weekday < 5) & (hour >= 9) & (hour < 18) & (rng.random(len(user)) < 0.7)
    return np.where(at_work[:, None], people.work_U2[user], people.home_U2[user]) + rng.normal(0.0, 0.5, (len(user), 2))


def _draw_seconds(count: int, rng: np.random.Generator) -> np.ndarray:
    """Local seconds of the day, by how active people are."""
    return (rng.choice(24, count, p=_HOUR_WEIGHT / _HOUR_WEIGHT.sum()) + rng.random(count)) * 3600.0


def _events(
    config: SyntheticConfig, cities: list[_City], pois: pd.DataFrame, people: _People, affinity_C24: np.ndarray, rng: np.random.Generator
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Organic visits of all days, and the requests of log and live days."""
    days = config.history_days + config.log_days + config.live_days
    activity = rng.gamma(3.0, 1.0 / 3.0, config.users)
    counts_UD = rng.poisson(config.visits_per_user_day * activity[:, None], (config.users, days))
    user, day = (np.repeat(axis.ravel(), counts_UD.ravel()) for axis in np.indices(counts_UD.shape))
    first_day = config.first_log_day - timedelta(days=config.history_days)
    weekday = (first_day.weekday() + day) % 7
    seconds = _draw_seconds(len(user), rng)
    choosers = [_Chooser(city, pois, people, affinity_C24) for city in cities]
    is_habit = rng.random(len(user)) < config.habit_share
    poi, seconds = _habit_visits(config, cities, choosers, people, user, weekday, seconds, is_habit, rng)
    hour = (seconds // 3600).astype(np.int64) % 24
    place = _whereabouts(people, user, weekday, hour, rng)
    for city, chooser in zip(cities, choosers, strict=True):
        mine = np.flatnonzero(~is_habit & (user >= city.first_user) & (user < city.first_user + city.users))
        poi[mine] = chooser.choose(user[mine], place[mine], hour[mine], rng)

    start = pd.Timestamp(first_day, tz="UTC").value // 1000  # microseconds
    utc_second = np.clip((seconds - 60.0 * config.utc_offset_minutes) % 86400.0, 60.0, 86399.0)
    visit_us = start + day * 86_400_000_000 + (utc_second * 1e6).astype(np.int64)
    visits = pd.DataFrame({"us": visit_us, "user_row": user, "poi_row": poi, "session_id": np.arange(1, len(user) + 1)})

    in_period = day >= config.history_days
    share = min(1.0, config.requests_per_user_day * config.intent_share / config.visits_per_user_day)
    with_visit = np.flatnonzero(in_period & (rng.random(len(user)) < share))
    gap = np.minimum(rng.uniform(300.0, 3600.0, len(with_visit)), 0.5 * utc_second[with_visit])
    asked = {
        "us": visit_us[with_visit] - (gap * 1e6).astype(np.int64),
        "user_row": user[with_visit],
        "session_id": with_visit + 1,
        "intent_poi_row": poi[with_visit],
        "x": place[with_visit, 0],
        "y": place[with_visit, 1],
    }
    idle = _idle_requests(config, activity, people, start, rng)
    idle["session_id"] = len(user) + 1 + np.arange(len(idle["us"]))
    requests = pd.DataFrame({name: np.concatenate([asked[name], idle[name]]) for name in asked})
    return _finish_visits(visits), _finish_requests(config, cities, requests)


def _habit_visits(
    config: SyntheticConfig,
    cities: list[_City],
    choosers: list[_Chooser],
    people: _People,
    user: np.ndarray,
    weekday: np.ndarray,
    seconds: np.ndarray,
    is_habit: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Place of every habitual visit (others are filled in later) and the local second at which visits happen."""
    shape = (config.users, config.habits)
    habit_second = _draw_seconds(config.users * config.habits, rng).reshape(shape)
    on_weekend = rng.random(shape) < 2 / 7
    owner = np.repeat(np.arange(config.users), config.habits)
    hour = (habit_second.ravel() // 3600).astype(np.int64)
    around = _whereabouts(people, owner, np.where(on_weekend.ravel(), 6, 0), hour, rng)
    habit_poi = np.empty(len(owner), np.int64)
    for city, chooser in zip(cities, choosers, strict=True):
        mine = np.flatnonzero((owner >= city.first_user) & (owner < city.first_user + city.users))
        habit_poi[mine] = chooser.choose(owner[mine], around[mine], hour[mine], rng)
    weight = rng.gamma(1.0, 1.0, shape)
    visits = np.flatnonzero(is_habit)
    fits = np.where(on_weekend[user[visits]] == (weekday[visits] >= 5)[:, None], 1.0, 0.15)
    total = np.cumsum(weight[user[visits]] * fits, axis=1)
    which = (total < (rng.random(len(visits)) * total[:, -1])[:, None]).sum(axis=1).clip(max=config.habits - 1)
    poi = np.full(len(user), -1, np.int64)
    poi[visits] = habit_poi.reshape(shape)[user[visits], which]
    seconds = seconds.copy()
    seconds[visits] = (habit_second[user[visits], which] + rng.normal(0.0, 2700.0, len(visits))) % 86400.0
    return poi, seconds


def _idle_requests(config: SyntheticConfig, activity: np.ndarray, people: _People, start: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Requests that no visit follows."""
    rate = config.requests_per_user_day * (1.0 - config.intent_share) * activity
    counts_UD = rng.poisson(rate[:, None], (config.users, config.log_days + config.live_days))
    user, day = (np.repeat(axis.ravel(), counts_UD.ravel()) for axis in np.indices(counts_UD.shape))
    day = day + config.history_days
    seconds = _draw_seconds(len(user), rng)
    weekday = ((config.first_log_day - timedelta(days=config.history_days)).weekday() + day) % 7
    place = _whereabouts(people, user, weekday, (seconds // 3600).astype(np.int64), rng)
    utc_second = np.clip((seconds - 60.0 * config.utc_offset_minutes) % 86400.0, 1.0, 86398.0)
    return {
        "us": start + day * 86_400_000_000 + (utc_second * 1e6).astype(np.int64),
        "user_row": user,
        "intent_poi_row": np.full(len(user), -1, np.int64),
        "x": place[:, 0],
        "y": place[:, 1],
    }


def _finish_visits(visits: pd.DataFrame) -> pd.DataFrame:
    visits = visits.sort_values(["us", "user_row", "session_id"], ignore_index=True)
    visits.insert(0, "event_timestamp", pd.to_datetime(visits.pop("us"), unit="us", utc=True).astype("datetime64[us, UTC]"))
    return visits


def _finish_requests(config: SyntheticConfig, cities: list[_City], requests: pd.DataFrame) -> pd.DataFrame:
    requests = requests.sort_values(["us", "user_row", "session_id"], ignore_index=True)
    time = pd.to_datetime(requests.pop("us"), unit="us", utc=True).astype("datetime64[us, UTC]")
    local = time + pd.Timedelta(minutes=config.utc_offset_minutes)
    latitude, longitude, number = np.empty(len(requests)), np.empty(len(requests)), np.empty(len(requests), np.int32)
    owner = requests["user_row"].to_numpy()
    for city in cities:
        mine = (owner >= city.first_user) & (owner < city.first_user + city.users)
        latitude[mine], longitude[mine] = city.degrees(requests["x"].to_numpy()[mine], requests["y"].to_numpy()[mine])
        number[mine] = city.number
    day = ((time - pd.Timestamp(config.first_log_day, tz="UTC")) // pd.Timedelta(days=1)).to_numpy()
    return pd.DataFrame(
        {
            "request_id": REQUEST_ID_BASE + np.arange(len(requests), dtype=np.int64),
            "event_timestamp": time,
            "user_row": owner,
            "session_id": requests["session_id"].to_numpy(np.int64),
            "city_id": number,
            "latitude": latitude.round(5),
            "longitude": longitude.round(5),
            "utc_offset_minutes": np.full(len(requests), config.utc_offset_minutes, np.int32),
            "local_hour": local.dt.hour.to_numpy(np.int64),
            "day_row": np.minimum(day, config.log_days).astype(np.int64),
            "intent_poi_row": requests["intent_poi_row"].to_numpy(np.int64),
        }
    )
