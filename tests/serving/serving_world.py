"""A small seeded market for the serving tests: real parts, tiny data."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from serving.catalogue import split_by_city
from serving.event_log import EventLog
from serving.policies import Bootstrap
from serving.ranking import Ranking
from serving.settings import Arm, ServingConfig
from serving.users import UserReader

NOW = datetime(2026, 6, 1, 12, 0, 0, 123456, tzinfo=UTC)


def catalogue(ads: int = 60, seed: int = 1) -> pd.DataFrame:
    """Active ads of cities 0 and 1, half each, ids 1000 up, within 10 km of (40, -74) and (41, -73)."""
    rng = np.random.default_rng(seed)
    city = np.arange(ads) % 2
    shown = rng.integers(0, 5000, ads)
    return pd.DataFrame({
        "event_timestamp": pd.Timestamp("2026-05-31", tz="UTC"),
        "ad_id": np.arange(1000, 1000 + ads),
        "creative_id": np.arange(5000, 5000 + ads),
        "poi_id": np.arange(100, 100 + ads),
        "advertiser_id": np.arange(ads) // 3,
        "city_id": city.astype(np.int32),
        "category_id": rng.integers(0, 5, ads).astype(np.int32),
        "price_band": rng.integers(0, 6, ads).astype(np.int32),
        "latitude": 40.0 + city + rng.normal(0, 0.03, ads),
        "longitude": -74.0 + city + rng.normal(0, 0.03, ads),
        "bid": rng.lognormal(0, 0.5, ads),
        "reserve": np.full(ads, 0.05),
        "impressions": shown,
        "clicks": rng.binomial(shown, 0.06),
    })  # fmt: skip


def bootstrap_ranking(home: Path, **settings: object) -> Ranking:
    """A warm Ranking with the bootstrap policy only, over `catalogue()`."""
    config = ServingConfig(home=home, arms=(Arm(name="control", policy="bootstrap"),), **settings)  # type: ignore[arg-type]
    ranking = Ranking(
        config,
        split_by_city(catalogue()),
        {"bootstrap": Bootstrap(config.bootstrap_epsilon, config.seed)},
        UserReader(lambda user_id: None, 0.05),
        EventLog(config.event_log),
        clock=lambda: NOW,
    )
    ranking.warm_up()
    return ranking


BODY = {"user_id": 7, "city_id": 0, "latitude": 40.0, "longitude": -74.0}

KEY = b"k" * 32


def tiny_bundle(folder: Path, seed: int = 0, vocabulary: dict | None = None, key: bytes = KEY) -> str:
    """A signed bundle with a small untrained network; returns its version."""
    import torch

    from model.bundle import write_bundle
    from model.ega_v1.network import EgaV1, NetworkConfig, VocabularySizes

    torch.manual_seed(seed)
    config = NetworkConfig(width=16, embedding=4, blocks=1, auction_blocks=1, fusion_after=(1,), clusters=4, heads=2, feed_forward=1, head_hidden=(8,))
    tables = vocabulary or {name: list(range(5)) for name in ("ad", "poi", "advertiser", "category", "geo", "creative")}
    sizes = VocabularySizes(**{name: len(ids) + 2 for name, ids in tables.items()})
    return write_bundle(folder, EgaV1(config, sizes), tables, {}, {"test": True}, key)
