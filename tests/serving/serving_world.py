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
        "shown_creative_id": np.arange(5000, 5000 + ads),
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


def bootstrap_ranking(home: Path, budgets: dict[int, float] | None = None, **settings: object) -> Ranking:
    """A warm Ranking with the bootstrap policy only, over `catalogue()`."""
    config = ServingConfig(home=home, arms=(Arm(name="control", policy="bootstrap"),), **settings)  # type: ignore[arg-type]
    ranking = Ranking(
        config,
        split_by_city(catalogue()),
        {"bootstrap": Bootstrap(config.bootstrap_epsilon, config.seed, config.currency_step)},
        UserReader(lambda user_id: None, 0.05),
        EventLog(config.event_log, budgets=budgets),
        clock=lambda: NOW,
    )
    ranking.warm_up()
    return ranking


BODY = {"user_id": 7, "city_id": 0, "latitude": 40.0, "longitude": -74.0}

KEY = b"k" * 32


def tiny_bundle(folder: Path, seed: int = 0, vocabulary: dict | None = None, key: bytes = KEY, network: dict | None = None) -> str:
    """A signed bundle with a small untrained network, or one of these sizes; returns its version."""
    import torch

    from model.bundle import write_bundle
    from model.ega_v1.network import EgaV1, NetworkConfig, VocabularySizes

    torch.manual_seed(seed)
    tiny = {"width": 16, "embedding": 4, "blocks": 1, "auction_blocks": 1, "fusion_after": (1,), "clusters": 4, "heads": 2, "feed_forward": 1, "head_hidden": (8,)}
    config = NetworkConfig(**(network or tiny))
    vocabulary = vocabulary or {"version": 1, "tables": {name: list(range(5)) for name in ("ad", "poi", "advertiser", "category", "geo", "creative")}}
    sizes = VocabularySizes(**{name: len(ids) + 2 for name, ids in vocabulary["tables"].items()})
    return write_bundle(folder, EgaV1(config, sizes), vocabulary, {}, {"test": True}, key)


def write_logs(root: Path, users: int = 30, seed: int = 2, count: int = 60) -> None:
    """A day of tiny logs over `catalogue()`: profiles and visits of users 1 up, one request each, no impressions but the first ad."""
    from marketplace.logs import write_manifest, write_table

    rng = np.random.default_rng(seed)
    ads = catalogue(count).drop(columns=["impressions", "clicks"])
    day = pd.Timestamp("2026-05-31", tz="UTC").as_unit("us")
    ids = np.arange(1, users + 1)
    visits = pd.DataFrame({"user_id": np.repeat(ids, 8), "poi_row": rng.integers(0, len(ads), 8 * users)})
    place = ads.iloc[visits["poi_row"]].reset_index(drop=True)
    frames = {
        "ads": ads.assign(event_timestamp=day),
        "users": pd.DataFrame({
            "event_timestamp": day, "user_id": ids, "city_id": ids % 2, "age_band": 3, "gender": 1, "home_latitude": 40.01, "home_longitude": -74.02,
        }),
        "behaviours": pd.DataFrame({
            "behaviour_id": np.arange(1, len(visits) + 1), "event_timestamp": day + pd.to_timedelta(np.arange(len(visits)), unit="s"),
            "user_id": visits["user_id"], "session_id": 0, "poi_id": place["poi_id"], "category_id": place["category_id"], "action": 1,
            "latitude": place["latitude"], "longitude": place["longitude"],
        }),
        "requests": pd.DataFrame({
            "request_id": ids, "event_timestamp": day + pd.Timedelta(hours=12), "user_id": ids, "session_id": 0, "city_id": ids % 2, "latitude": 40.0,
            "longitude": -74.0, "utc_offset_minutes": 0, "slots": 5, "arm": "none", "model_version": "bootstrap-1",
        }),
        "impressions": pd.DataFrame({
            "request_id": ids, "slot": 1, "event_timestamp": day + pd.Timedelta(hours=12), "user_id": ids, "ad_id": 1000 + ids % 2, "creative_id": 5000 + ids % 2,
            "bid": 1.0, "payment": 0.5, "pctr": 0.05, "propensity": 1.0, "click": 0, "click_timestamp": pd.Series(pd.NaT, index=range(users), dtype="datetime64[us, UTC]"),
            "purchase": 0, "order_value": 0.0,
        }),
    }  # fmt: skip
    for table, frame in frames.items():
        write_table(root, table, frame)
    write_manifest(root)


def vocabulary_of(ads: pd.DataFrame) -> dict:
    """The vocabulary of a catalogue, as bundles keep it."""
    from features.encoding import Vocabulary
    from marketplace.schema import geo_cell

    tables = {name: [ads[f"{name}_id"].to_numpy()] for name in ("ad", "poi", "advertiser", "category", "creative")}
    return Vocabulary.learn(tables | {"geo": [geo_cell(ads["latitude"].to_numpy(), ads["longitude"].to_numpy())]}).to_dict()


def model_ranking(home: Path, user_of: object = None, budgets: dict[int, float] | None = None, **settings: object) -> Ranking:
    """A warm Ranking with a tiny untrained model, without a feature store: users come from `user_of` (default: all unknown)."""
    from serving.policies import load_model

    tiny_bundle(home / "bundle", vocabulary=vocabulary_of(catalogue()))
    config = ServingConfig(home=home, arms=(Arm(name="ega", policy="model"),), events_synchronous="normal", **settings)  # type: ignore[arg-type]
    floor = config.quality_floor
    model = load_model(home / "bundle", KEY, "critical", learned_allowed=True, behaviours=16, threads=1, currency_step=config.currency_step, quality_floor=floor)
    users = UserReader(user_of or (lambda user_id: None), 5.0)  # type: ignore[arg-type, return-value]
    ranking = Ranking(config, split_by_city(catalogue()), {"model": model}, users, EventLog(config.event_log, "normal", budgets), clock=lambda: NOW)
    ranking.warm_up()
    return ranking


def served_home(ega_home: Path, ads: int = 60, network: dict | None = None) -> Path:
    """A home with a built feature store and an approved tiny model (or one of these sizes), signed with the key in `ega_home`; returns the home."""
    from features.build import build_features
    from model.bundle import signing_key
    from serving.store import approve_bundle, write_gate_record

    home, logs = ega_home / "tiny", ega_home / "logs"
    write_logs(logs, count=ads)
    build_features(logs, home, behaviours=16)
    key = signing_key(ega_home, create=True)
    bundle, record = ega_home / "bundle", ega_home / "gate.json"
    tiny_bundle(bundle, vocabulary=vocabulary_of(catalogue(ads)), key=key, network=network)
    gates = {"ic": {"approved": True, "reason": "test"}, "revenue": {"approved": True, "reason": "test"}}
    write_gate_record(record, bundle, gates, key)
    approve_bundle(bundle, record, home, key)
    return home
