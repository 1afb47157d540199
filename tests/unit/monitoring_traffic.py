"""Seeded synthetic traffic in the log schema for the tests of monitoring: users with homes, tastes and a cascade-free click rate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from marketplace import logs

START = pd.Timestamp("2026-03-01", tz="UTC")
SLOTS = 4


def traffic(
    seed: int, days: int, users: int = 800, first_day: int = 0, arms: dict[str, float] | None = None, click_lift: float = 0.0, price_lift: float = 0.0, bid_factor: float = 1.0
) -> dict[str, pd.DataFrame]:
    """All tables. `arms`: share by arm (None: arm 'none', the logging policy); the lifts act on arm 'ega'. The same user keeps home and click rate for any seed."""
    people = np.random.default_rng(123)
    home = people.normal([40.7, -74.0], 0.05, (users, 2))
    rate = people.beta(4, 60, users)
    activity = people.gamma(2.0, 0.5, users)
    ads = 300
    place, base_bid = people.normal([40.7, -74.0], 0.05, (ads, 2)), people.lognormal(0.0, 0.5, ads)
    category = people.integers(0, 12, ads)
    generator = np.random.default_rng(seed)
    count = generator.poisson(activity * 2 * days)
    user = np.repeat(np.arange(users), count)
    total = len(user)
    offset = first_day * 86400
    time = START + pd.to_timedelta(np.sort(generator.integers(0, days * 86400, total)) + offset, unit="s")
    arm = np.full(total, "none", dtype=object)
    generator.shuffle(user)
    if arms:
        arm = np.array(list(arms), dtype=object)[np.searchsorted(np.cumsum(list(arms.values()))[:-1], np.random.default_rng(5).random(users), side="right")][user]
    version = np.where(arm == "ega", "0123456789ab", "bootstrap-1")
    requests = pd.DataFrame(
        {
            "request_id": np.arange(total) + 1_000_000 * (seed + 1),
            "event_timestamp": time,
            "user_id": user,
            "session_id": 0,
            "city_id": 1 + user % 3,
            "latitude": home[user, 0] + generator.normal(0, 0.01, total),
            "longitude": home[user, 1] + generator.normal(0, 0.01, total),
            "utc_offset_minutes": -300,
            "slots": SLOTS,
            "arm": arm,
            "model_version": version,
        }
    )
    shown = requests.loc[requests.index.repeat(SLOTS), ["request_id", "event_timestamp", "user_id", "arm"]].reset_index(drop=True)
    ad = generator.integers(0, ads, len(shown))
    treated = (shown["arm"] == "ega").to_numpy()
    probability = np.clip(rate[shown["user_id"]] * (1 + click_lift * treated), 0, 1)
    click = generator.random(len(shown)) < probability
    purchase = click & (generator.random(len(shown)) < 0.3)
    bid = base_bid[ad] * bid_factor
    shown = shown.assign(
        slot=np.tile(np.arange(1, SLOTS + 1), total),
        ad_id=ad,
        creative_id=ad,
        bid=bid,
        payment=bid * generator.uniform(0.5, 0.7, len(ad)) * (1 + price_lift * treated),
        pctr=probability.astype(np.float32),
        propensity=np.float32(1.0),
        click=click.astype(np.int32),
        click_timestamp=shown["event_timestamp"].where(click) + pd.Timedelta(30, "s"),
        purchase=purchase.astype(np.int32),
        order_value=np.where(purchase, generator.lognormal(1.5, 0.4, len(ad)), 0.0),
    ).drop(columns="arm")
    catalogue = pd.concat(
        [
            pd.DataFrame(
                {
                    "event_timestamp": START + pd.Timedelta(first_day + day, "D"),
                    "ad_id": np.arange(ads),
                    "creative_id": np.arange(ads),
                    "poi_id": np.arange(ads),
                    "advertiser_id": np.arange(ads) // 3,
                    "city_id": 1,
                    "category_id": category,
                    "price_band": 1 + np.arange(ads) % 5,
                    "latitude": place[:, 0],
                    "longitude": place[:, 1],
                    "bid": base_bid * bid_factor,
                    "reserve": 0.05,
                }
            )
            for day in range(days)
        ],
        ignore_index=True,
    )
    profiles = pd.DataFrame(
        {
            "event_timestamp": START - pd.Timedelta(1, "D"),
            "user_id": np.arange(users),
            "city_id": 1 + np.arange(users) % 3,
            "age_band": np.arange(users) % 6,
            "gender": np.arange(users) % 3,
            "home_latitude": home[:, 0].round(2),
            "home_longitude": home[:, 1].round(2),
        }
    )
    return {"ads": catalogue, "users": profiles, "requests": requests, "impressions": shown}


def write(folder: Path, tables: dict[str, pd.DataFrame]) -> Path:
    for name, frame in tables.items():
        logs.write_table(folder, name, frame)
    return folder
