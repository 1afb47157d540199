"""Small clean logs for the validation tests: a synthetic world, and the same shape of logs from check-ins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from marketplace.checkins import CheckinsConfig
from marketplace.synthetic import SyntheticConfig
from marketplace.worlds import WorldConfig, build_world

TINY = SyntheticConfig(
    users=100, ads_per_city=40, places_per_city=60, categories=8, history_days=10, log_days=6, live_days=1, requests_per_user_day=1.5
)


def synthetic_logs(root: Path, seed: int, config: SyntheticConfig = TINY) -> Path:
    """Logs of a synthetic world: about 900 requests of 5 ads."""
    build_world(WorldConfig(synthetic=config), seed).write_logs(root)
    return root


def checkins_logs(root: Path, seed: int, with_categories: bool = True) -> Path:
    """Logs of a check-ins world over drawn check-ins: 60 users, 50 places of one city, 40 days, about 2,000 check-ins."""
    rng = np.random.default_rng(seed)
    data = root.parent / f"{root.name}-checkins"
    data.mkdir(parents=True)
    places, visits = 50, 2000
    pois = pd.DataFrame({"poi_id": np.arange(1, places + 1), "lat": 35.6 + 0.05 * rng.standard_normal(places), "lon": 139.7 + 0.05 * rng.standard_normal(places)})
    pois["name"] = [f"place {number}" for number in range(places)]
    if with_categories:
        pois["category"] = rng.choice(["Ramen", "Bar", "Museum", "Gym", "Café"], places)
    pois.to_parquet(data / "pois.parquet", index=False)
    favourites = rng.integers(1, places + 1, (60, 5))
    user = rng.integers(0, 60, visits)
    minutes = np.sort(rng.integers(0, 40 * 1440, visits))
    checkins = pd.DataFrame(
        {
            "user_id": user + 1,
            "poi_id": np.where(rng.random(visits) < 0.7, favourites[user, rng.integers(0, 5, visits)], rng.integers(1, places + 1, visits)),
            "timestamp": (pd.Timestamp("2024-03-01", tz="UTC") + pd.to_timedelta(minutes, unit="min")).astype("datetime64[us, UTC]"),
        }
    )
    checkins.to_parquet(data / "checkins.parquet", index=False)
    build_world(WorldConfig(kind="checkins", checkins=CheckinsConfig(requests=800)), seed, data).write_logs(root)
    return root
