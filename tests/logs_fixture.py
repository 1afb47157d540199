"""A small folder of valid logs from a seeded function, with the awkward cases on purpose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from marketplace.logs import write_manifest, write_table
from marketplace.schema import ACTION_CLICK, ACTION_PURCHASE, ACTION_VISIT

DAY_US = 86_400_000_000
START_US = pd.Timestamp("2026-03-02", tz="UTC").value // 1000  # a Monday


def _stamp(values: np.ndarray) -> pd.Series:
    return pd.Series(pd.to_datetime(values, unit="us", utc=True)).dt.as_unit("us")


def tiny_logs(
    root: Path, seed: int = 0, users: int = 15, ads: int = 24, days: int = 5, requests_per_day: int = 30, slots: int = 3, cities: int = 2, history_days: int = 10
) -> Path:
    """Write valid logs below `root` and return it. The same arguments give the same bytes.

    On purpose: behaviours in the very instant of a request, two behaviours in one instant, users without a profile or any
    behaviour, ads that join or leave during the days, two ads at one place, sessions of several requests, ids beyond 2^40.
    """
    rng = np.random.default_rng(seed)
    user_ids = np.sort(rng.choice(10**6, users, replace=False)) + 2**40
    first_request_day = history_days
    ad_ids = np.sort(rng.choice(10**5, ads, replace=False)) + 500
    poi_of_ad = 9_000 + np.arange(ads)
    poi_of_ad[-1] = poi_of_ad[0]  # two ads at one place
    city_of_ad = np.arange(ads) % cities
    city_of_ad[-1] = city_of_ad[0]
    place = rng.uniform(-0.05, 0.05, (ads, 2)) + np.array([40.7, -74.0])
    place[-1] = place[0]
    category = rng.integers(1, 6, ads)
    category[-1] = category[0]

    catalogue = []
    for day in range(days):
        active = np.ones(ads, bool)
        active[1] = day >= 2
        active[2] = day < 2
        rows = np.flatnonzero(active)
        catalogue.append(
            pd.DataFrame(
                {
                    "event_timestamp": _stamp(np.full(len(rows), START_US + (first_request_day + day) * DAY_US)),
                    "ad_id": ad_ids[rows], "creative_id": ad_ids[rows] * 10, "poi_id": poi_of_ad[rows], "advertiser_id": ad_ids[rows] % 7, "city_id": city_of_ad[rows],
                    "category_id": category[rows], "price_band": rows % 6, "latitude": place[rows, 0], "longitude": place[rows, 1],
                    "bid": np.round(rng.lognormal(0.0, 0.5, len(rows)), 4), "reserve": 0.05,
                }
            )
        )  # fmt: skip
    ads_frame = pd.concat(catalogue, ignore_index=True)

    profiled = np.arange(users) != 1  # user 1 has no profile
    users_frame = pd.DataFrame(
        {
            "event_timestamp": _stamp(np.full(profiled.sum(), START_US)), "user_id": user_ids[profiled], "city_id": np.arange(users)[profiled] % cities,
            "age_band": rng.integers(0, 8, profiled.sum()), "gender": rng.integers(0, 4, profiled.sum()),
            "home_latitude": 40.7 + rng.uniform(-0.1, 0.1, profiled.sum()), "home_longitude": -74.0 + rng.uniform(-0.1, 0.1, profiled.sum()),
        }
    )  # fmt: skip
    moved = users_frame.iloc[[0]].assign(event_timestamp=_stamp(np.array([START_US + (first_request_day + 2) * DAY_US])).iloc[0], age_band=9)
    users_frame = pd.concat([users_frame, moved], ignore_index=True)

    count = requests_per_day * days
    when = START_US + first_request_day * DAY_US + np.sort(rng.integers(0, days * DAY_US - 3_600_000_000, count))
    who = rng.integers(0, users, count)
    requests = pd.DataFrame(
        {
            "request_id": 70_000 + rng.permutation(count), "event_timestamp": _stamp(when), "user_id": user_ids[who],
            "session_id": np.where(rng.random(count) < 0.8, 1_000 + who * days + (when - START_US) // DAY_US - first_request_day + np.arange(users)[who] * 100, 0),
            "city_id": who % cities, "latitude": 40.7 + rng.uniform(-0.05, 0.05, count), "longitude": -74.0 + rng.uniform(-0.05, 0.05, count),
            "utc_offset_minutes": -300, "slots": slots, "arm": "none", "model_version": "bootstrap-1",
        }
    )  # fmt: skip

    behaviours: list[tuple[int, int, int, int, int]] = []  # time, user, session, ad row, action
    old = rng.integers(0, first_request_day * DAY_US, 12 * users)
    behaviours += [(START_US + int(t), int(u), 0, int(a), ACTION_VISIT) for t, u, a in zip(old, rng.integers(3, users, len(old)), rng.integers(0, ads, len(old)), strict=True)]
    behaviours += [(START_US + int(old[0]), 4, 0, a, ACTION_VISIT) for a in (0, 3)]  # one instant, two behaviours
    shown = []
    for row in range(count):
        session, now = int(requests["session_id"][row]), int(when[row])
        if row % 10 == 0 and who[row] != 2:  # user 2 never does anything
            behaviours.append((now, int(who[row]), session, int(rng.integers(ads)), ACTION_VISIT))
        day = (now - START_US) // DAY_US - first_request_day
        active = [ad for ad in range(ads) if city_of_ad[ad] == who[row] % cities and not (ad == 1 and day < 2) and not (ad == 2 and day >= 2)]
        page = rng.choice(active, slots, replace=False)
        bids = ads_frame.set_index(["event_timestamp", "ad_id"])["bid"] if row == 0 else bids  # noqa: F821
        midnight = _stamp(np.array([START_US + (first_request_day + day) * DAY_US])).iloc[0]
        for slot, ad in enumerate(page, start=1):
            bid, clicked = float(bids[(midnight, ad_ids[ad])]), who[row] != 2 and rng.random() < 0.15
            bought = clicked and rng.random() < 0.3
            click_us = now + 5_000_000 * slot
            if clicked:
                behaviours.append((click_us, int(who[row]), session, int(ad), ACTION_CLICK))
            if bought:
                behaviours.append((click_us + 60_000_000, int(who[row]), session, int(ad), ACTION_PURCHASE))
            shown.append((row, slot, ad, bid, clicked, click_us if clicked else None, bought))
        if session and who[row] != 2 and rng.random() < 0.6:
            behaviours.append((now + int(rng.integers(1, 1_800_000_000)), int(who[row]), session, int(rng.integers(ads)), ACTION_VISIT))

    behaviours.sort()
    time_us, user, session, ad, action = (np.array(column) for column in zip(*behaviours, strict=True))
    behaviours_frame = pd.DataFrame(
        {
            "behaviour_id": 3_000_000 + np.arange(len(behaviours)), "event_timestamp": _stamp(time_us), "user_id": user_ids[user], "session_id": session,
            "poi_id": poi_of_ad[ad], "category_id": category[ad], "action": action, "latitude": place[ad, 0], "longitude": place[ad, 1],
        }
    )  # fmt: skip
    request, slot, ad, bid, clicked, click_us, bought = (list(column) for column in zip(*shown, strict=True))
    impressions = pd.DataFrame(
        {
            "request_id": requests["request_id"].to_numpy()[request], "slot": slot, "event_timestamp": requests["event_timestamp"].to_numpy()[request],
            "user_id": requests["user_id"].to_numpy()[request], "ad_id": ad_ids[ad], "creative_id": ad_ids[ad] * 10, "bid": bid,
            "payment": np.round(np.array(bid) * 0.8, 6), "pctr": 0.1, "propensity": 0.5, "click": np.array(clicked, int),
            "click_timestamp": _stamp(pd.array(click_us, dtype="Int64")),
            "purchase": np.array(bought, int), "order_value": np.where(bought, 20.0, 0.0),
        }
    )  # fmt: skip
    impressions["event_timestamp"] = pd.to_datetime(impressions["event_timestamp"], utc=True).dt.as_unit("us")
    for name, frame in (("ads", ads_frame), ("users", users_frame), ("behaviours", behaviours_frame), ("requests", requests), ("impressions", impressions)):
        write_table(root, name, frame)
    write_manifest(root)
    return root
