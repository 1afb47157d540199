"""Tiny request samples with a learnable signal, written straight in the sample format (no Feast, no logs)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from marketplace import schema


def tiny_samples(root: Path, seed: int = 0, requests: int = 400, ads: int = 60, slots: int = 5, unexposed: int = 15, behaviours: int = 8, days: int = 8) -> Path:
    """A sample folder: users return to places they visited, clicks follow category taste; seeded."""
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    categories = 6
    category = rng.integers(0, categories, ads)
    cells = schema.geo_cell(40 + rng.random(ads) * 0.1, -74 + rng.random(ads) * 0.1)
    geo = np.unique(cells)
    vocabulary = {
        "ad": list(range(ads)), "poi": list(range(ads)), "advertiser": list(range(ads // 3)), "category": list(range(categories)),
        "geo": geo.tolist(), "creative": list(range(ads)),
    }  # fmt: skip
    first = schema.FIRST_CODE
    geo_index = np.searchsorted(geo, cells) + first
    index = np.arange(ads)
    fields = np.stack([index + first, index + first, index // 3 % (ads // 3) + first, category + first, rng.integers(1, 6, ads) + first, geo_index, index + first], 1)
    arrays: dict[str, np.ndarray] = {}
    arrays["ad_id"] = index * 10
    arrays["ad_fields"] = fields
    arrays["ad_city"] = np.ones(ads)
    latitude, longitude = schema.geo_centre(cells)
    arrays["ad_place"] = np.stack([latitude, longitude], 1)
    bid = np.exp(rng.normal(0, 0.5, ads))
    arrays["bid"] = np.repeat(bid[None], days, 0)
    arrays["reserve"] = np.full((days, ads), 0.01)
    taste = rng.normal(0, 1.5, (50, categories))
    quality = rng.normal(0, 0.5, ads)
    user = rng.integers(0, 50, requests)
    day = np.sort(rng.integers(0, days, requests))
    arrays["request_id"] = np.arange(requests)
    arrays["user_id"] = user
    arrays["time"] = 1_700_000_000 + day * 86400 + np.arange(requests)
    arrays["day"] = day
    arrays["split"] = np.select([day >= days - 1, day >= days - 2], [schema.TEST, schema.VALIDATION], schema.TRAIN)
    arrays["city"] = np.ones(requests)
    arrays["request_place"] = np.tile([40.05, -73.95], (requests, 1))
    arrays["user_fields"] = np.stack([user % 5 + first, user % 3 + first, rng.choice(geo_index, requests)], 1)
    arrays["context_fields"] = np.stack([rng.integers(0, 24, requests) + first, day % 7 + first, rng.choice(geo_index, requests)], 1)
    preference = np.exp(taste[:, category] + quality)
    preference /= preference.sum(1, keepdims=True)
    history = np.stack([rng.choice(ads, behaviours, p=preference[u]) for u in user])
    codes = [history + first, category[history] + first, geo_index[history], np.full_like(history, schema.ACTION_VISIT + first)]
    codes += [rng.integers(0, top, history.shape) + first for top in (13, 13, 2, 11)]
    values = np.stack(codes, -1)
    length = rng.integers(0, behaviours + 1, requests)
    values[np.arange(behaviours)[None] >= length[:, None]] = 0
    arrays["behaviours"] = values
    popularity = preference.mean(0)
    chosen = np.stack([rng.choice(ads, slots + unexposed, replace=False, p=0.5 * popularity + 0.5 / ads) for _ in range(requests)])
    arrays["candidate"] = chosen
    attraction = 0.3 / (1 + np.exp(-(taste[user][:, category] + quality)))
    p = np.take_along_axis(attraction, chosen, 1)
    p[:, :slots] *= 0.85 ** np.arange(slots)
    p[:, slots:] *= 0.1
    click = rng.random(p.shape) < p
    arrays["click"] = click
    arrays["purchase"] = click & (rng.random(p.shape) < 0.3)
    arrays["log_inclusion"] = np.tile(np.where(np.arange(slots + unexposed) < slots, 0.0, np.log(unexposed / ads)), (requests, 1))
    arrays["exposed_bid"] = bid[chosen[:, :slots]]
    arrays["exposed_payment"] = bid[chosen[:, :slots]] * 0.7
    arrays["exposed_pctr"] = np.full((requests, slots), 0.1)
    arrays["propensity"] = np.full((requests, slots), 0.5)
    arrays["target"] = np.stack([rng.choice(ads, 2, p=preference[u]) for u in user])
    for array in schema.SAMPLE_ARRAYS:
        np.save(root / f"{array.name}.npy", arrays[array.name].astype(array.dtype))
    start = np.datetime64("2026-01-01")
    info = {"days": [str(start + d) for d in range(days)], "slots": slots, "unexposed": unexposed, "behaviours": behaviours, "data_hash": f"tiny-{seed}"}
    (root / "samples.json").write_text(json.dumps(info))
    (root / "vocab.json").write_text(json.dumps({"version": 1, "tables": vocabulary}))
    return root


def learnable(folder: Path) -> Path:
    """Clicks that a tiny network learns in seconds: by the ad's category and the slot."""
    rng = np.random.default_rng(1)
    candidate = np.load(folder / "candidate.npy")
    liked = np.load(folder / "ad_fields.npy")[candidate, [field.name for field in schema.AD_FIELDS].index("category")] % 2 == 0
    shown = 0.55 ** np.arange(5)
    probability = np.where(liked, 0.7, 0.1) * np.concatenate([shown, np.full(candidate.shape[1] - 5, 0.3)])
    click = rng.random(candidate.shape) < probability
    np.save(folder / "click.npy", click.astype(np.int8))
    np.save(folder / "purchase.npy", (click & (rng.random(click.shape) < 0.3)).astype(np.int8))
    return folder
