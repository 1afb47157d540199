"""Encoding: reserved indices, buckets, local time, and the same answer one by one as in a batch."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from features.encoding import HISTORY_ARRAYS, HOUR_US, Histories, Profiles, Vocabulary, encode_ads, encode_requests, local_hour, local_weekday
from marketplace.schema import AD_FIELDS, AGE_BUCKET_HOURS, BEHAVIOUR_FIELDS, FIRST_CODE, PADDING, UNKNOWN, VOCABULARIES, geo_cell

NOW = pd.Timestamp("2026-03-06 18:30", tz="UTC").value // 1000  # a Friday
FIELD = {field.name: column for column, field in enumerate(BEHAVIOUR_FIELDS)}


def vocabulary() -> Vocabulary:
    ids = {name: [np.array([30, 10, 20, 10])] for name in VOCABULARIES}
    return Vocabulary.learn(ids | {"geo": [geo_cell(np.array([40.7, 40.8]), np.array([-74.0, -74.0]))]})


def random_requests(rows: int, length: int, seed: int = 0) -> tuple[Profiles, Histories, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    histories = Histories.empty(rows, length)
    histories.count[:] = rng.integers(0, length + 1, rows)
    real = np.arange(length) < histories.count[:, None]
    fill = {
        "behaviour_id": rng.integers(1, 10**6, (rows, length)), "poi_id": rng.integers(5, 40, (rows, length)), "category_id": rng.integers(5, 40, (rows, length)),
        "action": rng.integers(1, 4, (rows, length)), "latitude": 40.7 + rng.normal(0, 0.05, (rows, length)), "longitude": -74 + rng.normal(0, 0.05, (rows, length)),
        "time_us": -np.sort(-(NOW - rng.integers(-HOUR_US, 4000 * HOUR_US, (rows, length))), axis=1),
    }  # fmt: skip
    for name, values in fill.items():
        getattr(histories, name)[real] = values[real]
    profiles = Profiles(rng.random(rows) < 0.8, rng.integers(0, 25, rows), rng.integers(0, 4, rows), 40.7 + rng.normal(0, 0.05, rows), -74 + rng.normal(0, 0.05, rows))
    return profiles, histories, 40.7 + rng.normal(0, 0.05, rows), -74 + rng.normal(0, 0.05, rows), NOW + rng.integers(0, HOUR_US, rows), rng.integers(-12, 13, rows) * 60


def test_vocabulary_round_trip_and_unknown_ids():
    words = vocabulary()
    again = Vocabulary.from_dict(json.loads(words.to_json()))
    assert again.to_json() == words.to_json()
    np.testing.assert_array_equal(again.index("poi", np.array([[10, 20], [30, 11]])), [[2, 3], [4, UNKNOWN]])
    assert words.field_sizes["ad"]["poi"] == 3 + FIRST_CODE and words.field_sizes["context"]["hour"] == 24 + FIRST_CODE
    with pytest.raises(ValueError, match="version 7"):
        Vocabulary.from_dict(words.to_dict() | {"version": 7})
    with pytest.raises(ValueError, match="lacks the table 'ad'"):
        Vocabulary({})


def test_ads_are_encoded_in_schema_order_and_bids_are_no_feature():
    catalogue = pd.DataFrame(
        {"ad_id": [10, 99], "poi_id": [20, 20], "advertiser_id": [30, 1], "category_id": [10, 2], "price_band": [0, 5], "latitude": [40.7, 0.0], "longitude": [-74.0, 0.0], "creative_id": [10, 3], "bid": [1.0, 2.0]}
    )  # fmt: skip
    encoded = encode_ads(vocabulary(), catalogue)
    assert encoded.dtype == np.int32 and encoded.shape == (2, len(AD_FIELDS))
    np.testing.assert_array_equal(encoded, [[2, 3, 4, 2, 2, 2, 2], [UNKNOWN, 3, UNKNOWN, UNKNOWN, 7, UNKNOWN, UNKNOWN]])
    np.testing.assert_array_equal(encoded, encode_ads(vocabulary(), catalogue.assign(bid=1e3)))


def test_local_time_against_the_calendar():
    rng = np.random.default_rng(1)
    times, offsets = rng.integers(0, 2**51, 200), rng.integers(-840, 841, 200)
    for time, offset, hour, weekday in zip(times, offsets, local_hour(times, offsets), local_weekday(times, offsets), strict=True):
        local = pd.Timestamp(int(time), unit="us") + pd.Timedelta(minutes=int(offset))
        assert (local.hour, local.weekday()) == (hour, weekday)


@pytest.mark.parametrize(
    ("hours_ago", "age", "hour_distance", "weekday_match"),
    [(1, 0, 1, 1), (1.5, 1, 1, 1), (3, 1, 3, 1), (12, 3, 12, 1), (20, 4, 4, 1), (24, 4, 0, 1), (24 * 5, 7, 0, 0), (24 * 200, len(AGE_BUCKET_HOURS), 0, 1)],
)
def test_behaviours_relative_to_the_request(hours_ago, age, hour_distance, weekday_match):
    histories = Histories.empty(1, 3)
    histories.count[0] = 1
    for name, value in {"poi_id": 20, "category_id": 10, "action": 2, "latitude": 40.7, "longitude": -74.0, "time_us": NOW - int(hours_ago * HOUR_US)}.items():
        getattr(histories, name)[0, 0] = value
    one = np.ones(1)
    encoded = encode_requests(vocabulary(), Profiles.unknown(1), histories, 40.7 * one, -74.0 * one, np.array([NOW]), np.array([0]))
    row = encoded["behaviours"][0, 0] - FIRST_CODE
    assert (row[FIELD["age"]], row[FIELD["hour_distance"]], row[FIELD["weekday_match"]], row[FIELD["distance"]]) == (age, hour_distance, weekday_match, 0)
    assert (row[FIELD["poi"]], row[FIELD["category"]], row[FIELD["geo"]], row[FIELD["action"]]) == (1, 0, 0, 2)
    assert (encoded["behaviours"][0, 1:] == PADDING).all() and (encoded["user_fields"] == UNKNOWN).all()


def test_a_batch_equals_its_rows():
    profiles, histories, *rest = random_requests(60, 8)
    batch = encode_requests(vocabulary(), profiles, histories, *rest)
    for row in range(60):
        part = slice(row, row + 1)
        one = encode_requests(vocabulary(), profiles.take(part), histories.take(part), *(values[part] for values in rest))
        for name in batch:
            np.testing.assert_array_equal(batch[name][part], one[name])


def test_what_happens_at_or_after_the_request_never_counts():
    profiles, histories, *rest = random_requests(80, 8, seed=2)
    times = rest[2].copy()
    times[:40] = histories.time_us[:40, 2]  # exactly the instant of a behaviour
    earlier = histories.before(times)
    for row in range(80):
        kept = [column for column in range(histories.count[row]) if histories.time_us[row, column] < times[row]]
        assert earlier.count[row] == len(kept)
        for name in HISTORY_ARRAYS:
            np.testing.assert_array_equal(getattr(earlier, name)[row], [*getattr(histories, name)[row, kept], *[0] * (8 - len(kept))])


def test_no_behaviour_length_and_empty_vocabulary_are_fine():
    profiles, _, *rest = random_requests(3, 2)
    encoded = encode_requests(Vocabulary.learn({name: [] for name in VOCABULARIES}), profiles, Histories.empty(3, 0), *rest)
    assert encoded["behaviours"].shape == (3, 0, len(BEHAVIOUR_FIELDS)) and (encoded["context_fields"][:, 2] == UNKNOWN).all()
