"""Tiny worlds for the marketplace's tests: seconds to build, every feature present."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from marketplace.checkins import CheckinsConfig
from marketplace.synthetic import SyntheticConfig
from marketplace.worlds import WorldConfig


def tiny_config(**clicks: float) -> WorldConfig:
    """Two cities, 120 users, 40 ads each, 5 log days, 2 live days."""
    size = SyntheticConfig(cities=2, users=120, ads_per_city=40, places_per_city=60, categories=6, history_days=8, log_days=5, live_days=2, part_time_ads=0.3)
    return WorldConfig(synthetic=size, clicks=clicks)  # type: ignore[arg-type]


def checkins_config(**changes: object) -> WorldConfig:
    return WorldConfig(kind="checkins", checkins=CheckinsConfig(requests=600, **changes))  # type: ignore[arg-type]


def write_checkins_folder(folder: Path, seed: int, users: int = 30, places: int = 80, checkins: int = 2500, id_type: str = "int32") -> Path:
    """A check-ins folder as a city might send it: null categories and names, homes, simultaneous and repeated rows, any id width."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    category = np.array(["Bar", "Home (private)", "Coffee Shop", "Gym", None, None], object)[rng.integers(0, 6, places)]
    taxonomy = np.where(rng.random(places) < 0.5, "Community and Government > Residential Building > Apartment or Condo", None)
    taxonomy = np.array([None if kind is not None else text for kind, text in zip(category, taxonomy, strict=True)], object)
    pois = pd.DataFrame(
        {
            "poi_id": np.arange(1, places + 1, dtype=np.int64) * 3,
            "lat": 35.6 + 0.05 * rng.standard_normal(places),
            "lon": 139.7 + 0.05 * rng.standard_normal(places),
            "category": category,
            "taxonomy": taxonomy,
            "name": np.array(["Chain", None, "Corner"], object)[rng.integers(0, 3, places)],
            "locality": None,
        }
    )
    pois.to_parquet(folder / "pois.parquet")
    minutes = np.sort(rng.integers(0, 40 * 1440, checkins))
    favourite = rng.integers(0, places, (users, 4))
    user = rng.integers(0, users, checkins)
    at = np.where(rng.random(checkins) < 0.6, favourite[user, rng.integers(0, 4, checkins)], rng.integers(0, places, checkins))
    frame = pd.DataFrame({"user_id": user + 1, "poi_id": (at + 1) * 3, "timestamp": pd.Timestamp("2012-04-03", tz="UTC") + pd.to_timedelta(minutes, unit="min")})
    frame = pd.concat([frame, frame.tail(20), frame.tail(10).assign(poi_id=3)], ignore_index=True)
    frame = frame.astype({"user_id": id_type, "poi_id": id_type})
    frame["timestamp"] = frame["timestamp"].astype("datetime64[us, UTC]")
    frame.to_parquet(folder / "checkins.parquet")
    return folder
