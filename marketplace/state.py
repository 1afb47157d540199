"""The hidden state of a world: what generators produce and the click model reads. Nothing here reaches training.

Rows, not ids, link the parts: `poi_row`, `user_row` and `ad_row` index the frames below. Shapes: U users, P places,
A ads, C categories (category_id is the index), D days, S substitutes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from marketplace.click_model import ClickConfig
from marketplace.logs import write_bytes
from marketplace.schema import FORMAT_VERSION

KM_PER_DEGREE = 111.195
"""Length of a degree of latitude on the mean sphere."""

AD_ID_BASE, CREATIVE_ID_BASE, ADVERTISER_ID_BASE, REQUEST_ID_BASE = 1_000_001, 2_000_001, 3_000_001, 5_000_000_001
"""Ids of different kinds lie apart, so that mixing them up fails loudly."""


@dataclass
class WorldState:
    """Everything about users, places, ads and what happens by itself, before any policy acts.

    users: user_id, city_id, age_band, gender, home_latitude, home_longitude, price_sensitivity, distance_sensitivity.
    pois: poi_id, city_id, category_id, price_band, latitude, longitude, quality.
    ads: ad_id (ascending), creative_id, poi_id, advertiser_id, poi_row, city_id, category_id, price_band, latitude,
        longitude, value, reserve, satisfaction, appeal.
    visits: event_timestamp, user_row, session_id, poi_row; in time order, history and live days too.
    requests: request_id (ascending), event_timestamp, user_row, session_id, city_id, latitude, longitude,
        utc_offset_minutes, local_hour, day_row, intent_poi_row (-1 none); log days and live days.
    """

    users: pd.DataFrame
    pois: pd.DataFrame
    ads: pd.DataFrame
    visits: pd.DataFrame
    requests: pd.DataFrame
    taste_UC: np.ndarray
    hour_affinity_C24: np.ndarray
    bid_DA: np.ndarray
    """NaN where the ad is not active; the last row holds for all live days."""
    drift_DA: np.ndarray
    substitute_AS: np.ndarray
    """Ad rows of the nearest ads of the same city and category; -1 padding."""
    substitute_weight_AS: np.ndarray
    habit_key: np.ndarray
    """Sorted user_row * P + poi_row of every pair with visits before the first log day."""
    habit_value: np.ndarray
    """log(1 + visits) of those pairs."""
    log_days: list[date]
    live_days: list[date]
    creative_embedding_MF: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """Creatives ordered by ad; empty where every ad has one."""
    creative_appeal_M: np.ndarray = field(default_factory=lambda: np.zeros(0))
    visual_taste_UF: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    def save(self, folder: Path) -> None:
        """Write the state as Parquet, npy and JSON files."""
        folder.mkdir(parents=True, exist_ok=True)
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, pd.DataFrame):
                value.to_parquet(folder / f"{item.name}.parquet", index=False)
            elif isinstance(value, np.ndarray):
                np.save(folder / f"{item.name}.npy", value, allow_pickle=False)
        days = {"format_version": FORMAT_VERSION, "log_days": [str(day) for day in self.log_days], "live_days": [str(day) for day in self.live_days]}
        write_bytes(folder / "days.json", json.dumps(days).encode())

    @classmethod
    def load(cls, folder: Path) -> WorldState:
        """The state that `save` wrote."""
        days = json.loads((folder / "days.json").read_text())
        if days["format_version"] != FORMAT_VERSION:
            raise ValueError(f"{folder}: world of format version {days['format_version']}, this release reads {FORMAT_VERSION}; simulate it again")
        values: dict[str, object] = {name: [date.fromisoformat(day) for day in days[name]] for name in ("log_days", "live_days")}
        for item in fields(cls):
            if (folder / f"{item.name}.parquet").exists():
                values[item.name] = pd.read_parquet(folder / f"{item.name}.parquet")
            elif (folder / f"{item.name}.npy").exists():
                values[item.name] = np.load(folder / f"{item.name}.npy", allow_pickle=False)
        return cls(**values)  # type: ignore[arg-type]


def planar_km(latitude_a: np.ndarray, longitude_a: np.ndarray, latitude_b: np.ndarray, longitude_b: np.ndarray) -> np.ndarray:
    """Distance in km on the local plane, broadcasting; within 0.1 % of the great circle inside a city, and cheap."""
    east = ((longitude_b - longitude_a + 180.0) % 360.0 - 180.0) * np.cos(np.radians(latitude_a))
    return KM_PER_DEGREE * np.sqrt(east * east + (latitude_b - latitude_a) ** 2)


def count_habits(visits: pd.DataFrame, before: pd.Timestamp, places: int) -> tuple[np.ndarray, np.ndarray]:
    """`habit_key` and `habit_value` of the visits before a time."""
    past = visits[visits["event_timestamp"] < before]
    key, count = np.unique(past["user_row"].to_numpy(np.int64) * places + past["poi_row"].to_numpy(np.int64), return_counts=True)
    return key, np.log1p(count).astype(np.float32)


def nearest_substitutes(city: np.ndarray, category: np.ndarray, latitude: np.ndarray, longitude: np.ndarray, config: ClickConfig) -> tuple[np.ndarray, np.ndarray]:
    """For every ad the nearest ads of its city and category [A, S], -1 padded, and their weights exp(-km / substitute_km)."""
    ads, wanted = len(city), config.substitutes
    rows, weight = np.full((ads, wanted), -1, np.int32), np.zeros((ads, wanted), np.float32)
    frame = pd.DataFrame({"city": city, "category": category})
    for _, members in sorted(frame.groupby(["city", "category"]).indices.items()):
        if len(members) < 2:
            continue
        east = longitude[members] * np.cos(np.radians(latitude[members].mean()))
        tree = cKDTree(np.stack([east, latitude[members]], axis=1) * KM_PER_DEGREE)
        count = min(wanted + 1, len(members))
        km, near = tree.query(tree.data, k=count)
        own = near == np.arange(len(members))[:, None]
        own[~own.any(axis=1), -1] = True  # places on one spot: the ad itself may be missing from its own list
        rows[members, : count - 1] = members[near[~own].reshape(len(members), count - 1)]
        weight[members, : count - 1] = np.exp(-km[~own] / config.substitute_km).reshape(len(members), count - 1)
    return rows, weight


def build_ads(pois: pd.DataFrame, poi_rows: np.ndarray, advertiser: np.ndarray, value_spread: float, rng: np.random.Generator, config: ClickConfig) -> pd.DataFrame:
    """The catalogue for the given places: value per click lognormal and rising with quality, a platform floor as reserve.

    Args: poi_rows [A], ascending; advertiser [A], any integers, equal for ads of one payer; value_spread, standard
    deviation of log value.
    """
    ads = pois.iloc[poi_rows][["poi_id", "city_id", "category_id", "price_band", "latitude", "longitude"]].reset_index(drop=True)
    count, categories = len(ads), int(pois["category_id"].max()) + 1
    quality, category = pois["quality"].to_numpy()[poi_rows], ads["category_id"].to_numpy()
    by_category, by_ad = rng.standard_normal(categories), rng.standard_normal(count)
    value = np.exp(0.2 + value_spread * (0.5 * quality + 0.3 * by_category[category] + 0.81 * by_ad))
    floor = np.round(0.1 * np.median(value), 2)
    ads.insert(0, "ad_id", AD_ID_BASE + np.arange(count, dtype=np.int64))
    ads.insert(1, "creative_id", CREATIVE_ID_BASE + np.arange(count, dtype=np.int64))
    ads.insert(3, "advertiser_id", ADVERTISER_ID_BASE + np.asarray(advertiser, np.int64))
    ads["poi_row"] = np.asarray(poi_rows, np.int64)
    ads["value"] = np.round(np.maximum(value, 1.2 * floor), 4)
    ads["reserve"] = floor
    ends_reading, own = rng.standard_normal(categories), rng.standard_normal(count)
    ads["satisfaction"] = config.satisfaction_spread * (0.7 * ends_reading[category] + 0.714 * own)
    ads["appeal"] = config.appeal * rng.standard_normal(count)
    return ads


def draw_bids(value: np.ndarray, days: int, jitter: float, part_time: float, rng: np.random.Generator) -> np.ndarray:
    """Bids [days, A]: truthful, with a small daily jitter; a share `part_time` of the ads starts or ends inside the period (NaN)."""
    bids = np.round(value * np.exp(jitter * rng.standard_normal((days, len(value)))), 4)
    day = np.arange(days)[:, None]
    turn = rng.integers(1, max(days, 2), len(value))
    starts = rng.random(len(value)) < 0.5
    partly = rng.random(len(value)) < part_time
    away = partly & np.where(starts, day < turn, day >= turn)
    bids[away] = np.nan
    return bids
