"""From ids, codes, places and times to the integer arrays that the model reads; plain NumPy, the same code offline and online.

Legend: R requests, L behaviours (newest first), A ads. Fields, buckets and reserved indices come from `marketplace.schema`:
0 is padding, 1 is unknown, ids and codes start at 2. Training samples (`features.sampling`) and the ranking service call the
same `encode_requests`, so what the model was trained on is what it is served.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from marketplace.schema import (
    AD_FIELDS,
    AGE_BUCKET_HOURS,
    BEHAVIOUR_FIELDS,
    CONTEXT_FIELDS,
    DISTANCE_BUCKET_KM,
    FIRST_CODE,
    PADDING,
    UNKNOWN,
    USER_FIELDS,
    VOCABULARIES,
    Encoded,
    distance_km,
    geo_cell,
)

VOCABULARY_VERSION = 1
HOUR_US = 3_600_000_000
_DAY_US = 24 * HOUR_US
_EPOCH_WEEKDAY = 3  # 1 January 1970 was a Thursday; Monday is 0
_SATURDAY = 5

HISTORY_ARRAYS: dict[str, type[np.generic]] = {
    "behaviour_id": np.int64,
    "poi_id": np.int64,
    "category_id": np.int64,
    "action": np.int64,
    "latitude": np.float64,
    "longitude": np.float64,
    "creative_id": np.int64,
    "time_us": np.int64,
}
"""The arrays of a user's behaviour history, newest first, zero-filled after the last real one; `time_us` is microseconds since 1970 UTC."""

PROFILE_COLUMNS = ("age_band", "gender", "home_latitude", "home_longitude")
"""Columns of the users table that the model reads."""


@dataclass(frozen=True)
class Vocabulary:
    """Sorted ids of every table in `schema.VOCABULARIES`; an id's index is its position + FIRST_CODE, any other id is UNKNOWN."""

    tables: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        missing = [name for name in VOCABULARIES if name not in self.tables]
        if missing:
            raise ValueError(f"vocabulary lacks the table {missing[0]!r}; it needs {', '.join(VOCABULARIES)}")
        for name, ids in self.tables.items():
            if ids.dtype != np.int64 or ids.ndim != 1 or (len(ids) > 1 and not (np.diff(ids) > 0).all()):
                raise ValueError(f"vocabulary table {name!r} must hold strictly increasing int64 ids")

    @classmethod
    def learn(cls, ids: Mapping[str, list[np.ndarray]]) -> Vocabulary:
        """The vocabulary of all ids given for each table."""
        return cls({name: np.unique(np.concatenate([np.asarray(part, np.int64) for part in ids[name]] or [np.empty(0, np.int64)])) for name in VOCABULARIES})

    def index(self, table: str, ids: np.ndarray) -> np.ndarray:
        """int32 indices of ids of any shape; UNKNOWN for ids that were not learned."""
        known = self.tables[table]
        ids = np.asarray(ids, np.int64)
        if not len(known):
            return np.full(ids.shape, UNKNOWN, np.int32)
        position = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        return np.where(known[position] == ids, position + FIRST_CODE, UNKNOWN).astype(np.int32)

    def size(self, field: Encoded) -> int:
        """Number of indices a field can take, padding and unknown included: the rows of its embedding table."""
        return (len(self.tables[field.vocabulary]) if field.vocabulary else field.size) + FIRST_CODE

    @cached_property
    def field_sizes(self) -> dict[str, dict[str, int]]:
        """`size` of every field of the groups ad, user, context and behaviour."""
        groups = {"ad": AD_FIELDS, "user": USER_FIELDS, "context": CONTEXT_FIELDS, "behaviour": BEHAVIOUR_FIELDS}
        return {group: {field.name: self.size(field) for field in fields} for group, fields in groups.items()}

    def to_dict(self) -> dict[str, Any]:
        return {"version": VOCABULARY_VERSION, "tables": {name: self.tables[name].tolist() for name in VOCABULARIES}}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Vocabulary:
        """The inverse of `to_dict`. Raises ValueError for another version or a malformed record."""
        if record.get("version") != VOCABULARY_VERSION:
            raise ValueError(f"vocabulary has version {record.get('version')!r}, this release reads {VOCABULARY_VERSION}; train again")
        return cls({name: np.asarray(ids, np.int64) for name, ids in record["tables"].items()})

    def to_json(self) -> bytes:
        return (json.dumps(self.to_dict(), separators=(",", ":")) + "\n").encode()

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        return cls.from_dict(json.loads(Path(path).read_text()))


@dataclass(frozen=True)
class Profiles:
    """Profiles of R users; rows with `known` false (no profile yet) encode as UNKNOWN in every field."""

    known: np.ndarray  # bool [R]
    age_band: np.ndarray  # int64 [R]
    gender: np.ndarray  # int64 [R]
    home_latitude: np.ndarray  # float64 [R], degrees
    home_longitude: np.ndarray  # float64 [R], degrees

    @classmethod
    def unknown(cls, rows: int) -> Profiles:
        """The documented default of users without a profile."""
        codes, places = np.zeros(rows, np.int64), np.zeros(rows, np.float64)
        return cls(np.zeros(rows, bool), codes, codes.copy(), places, places.copy())

    def take(self, rows: np.ndarray | slice) -> Profiles:
        return Profiles(self.known[rows], self.age_band[rows], self.gender[rows], self.home_latitude[rows], self.home_longitude[rows])


@dataclass(frozen=True)
class Histories:
    """Newest behaviours of R users: `count` real ones at the front of each row of the arrays, zeros behind (HISTORY_ARRAYS)."""

    count: np.ndarray  # int64 [R]
    behaviour_id: np.ndarray  # int64 [R, L]
    poi_id: np.ndarray  # int64 [R, L]
    category_id: np.ndarray  # int64 [R, L]
    action: np.ndarray  # int64 [R, L]
    latitude: np.ndarray  # float64 [R, L], degrees
    longitude: np.ndarray  # float64 [R, L], degrees
    creative_id: np.ndarray  # int64 [R, L], 0 none
    time_us: np.ndarray  # int64 [R, L], microseconds since 1970 UTC, not increasing

    @classmethod
    def empty(cls, rows: int, length: int) -> Histories:
        """Histories of users who did nothing yet: padding only."""
        return cls(np.zeros(rows, np.int64), **{name: np.zeros((rows, length), dtype) for name, dtype in HISTORY_ARRAYS.items()})

    def take(self, rows: np.ndarray | slice) -> Histories:
        return Histories(self.count[rows], **{name: getattr(self, name)[rows] for name in HISTORY_ARRAYS})

    def before(self, time_us: np.ndarray) -> Histories:
        """Only what happened strictly before each row's time: newer behaviours are dropped and the rest moves to the front.

        A no-op for point-in-time training rows; online it guards a request that carries an earlier time than the newest event.
        """
        length = self.time_us.shape[1]
        real = np.arange(length) < self.count[:, None]
        late = (real & (self.time_us >= np.asarray(time_us)[:, None])).sum(axis=1)
        if not late.any():
            return self
        source = np.arange(length) + late[:, None]
        keep = source < self.count[:, None]
        source = np.minimum(source, length - 1)
        moved = {name: np.where(keep, np.take_along_axis(getattr(self, name), source, axis=1), 0) for name in HISTORY_ARRAYS}
        return Histories(self.count - late, **moved)


def local_hour(time_us: np.ndarray, utc_offset_minutes: np.ndarray) -> np.ndarray:
    """Hour of the local day, 0..23."""
    return (np.asarray(time_us, np.int64) + np.asarray(utc_offset_minutes, np.int64) * 60_000_000) // HOUR_US % 24


def local_weekday(time_us: np.ndarray, utc_offset_minutes: np.ndarray) -> np.ndarray:
    """Day of the local week, Monday 0 to Sunday 6."""
    return ((np.asarray(time_us, np.int64) + np.asarray(utc_offset_minutes, np.int64) * 60_000_000) // _DAY_US + _EPOCH_WEEKDAY) % 7


def _codes(values: np.ndarray, size: int) -> np.ndarray:
    """Codes 0..size-1 moved past the reserved indices; anything else is UNKNOWN."""
    values = np.asarray(values, np.int64)
    return np.where((values >= 0) & (values < size), values + FIRST_CODE, UNKNOWN).astype(np.int32)


def _columns(fields: tuple[Encoded, ...], columns: Mapping[str, np.ndarray], vocabulary: Vocabulary) -> np.ndarray:
    """Raw ids, codes and cells per field, encoded and stacked along a last axis in the order of `fields`; int32."""
    encoded = [vocabulary.index(field.vocabulary, columns[field.name]) if field.vocabulary else _codes(columns[field.name], field.size) for field in fields]
    return np.stack(encoded, axis=-1)


def encode_ads(vocabulary: Vocabulary, catalogue: pd.DataFrame) -> np.ndarray:
    """AD_FIELDS of A ads, int32 [A, F_ad]. `catalogue` has the columns of the ads table; bids are no feature."""
    raw = {field.name: catalogue[f"{field.name}_id"].to_numpy() for field in AD_FIELDS if field.vocabulary and field.name != "geo"}
    raw["price_band"] = catalogue["price_band"].to_numpy()
    raw["geo"] = geo_cell(catalogue["latitude"].to_numpy(), catalogue["longitude"].to_numpy())
    return _columns(AD_FIELDS, raw, vocabulary)


def encode_users(vocabulary: Vocabulary, profiles: Profiles) -> np.ndarray:
    """USER_FIELDS of R users, int32 [R, F_user]."""
    raw = {"age_band": profiles.age_band, "gender": profiles.gender, "home_geo": geo_cell(profiles.home_latitude, profiles.home_longitude)}
    return np.where(profiles.known[:, None], _columns(USER_FIELDS, raw, vocabulary), np.int32(UNKNOWN))


def encode_context(
    vocabulary: Vocabulary, latitude: np.ndarray, longitude: np.ndarray, time_us: np.ndarray, utc_offset_minutes: np.ndarray
) -> np.ndarray:
    """CONTEXT_FIELDS of R requests in the user's local time, int32 [R, F_context]."""
    raw = {"hour": local_hour(time_us, utc_offset_minutes), "weekday": local_weekday(time_us, utc_offset_minutes), "geo": geo_cell(latitude, longitude)}
    return _columns(CONTEXT_FIELDS, raw, vocabulary)


def encode_behaviours(
    vocabulary: Vocabulary, histories: Histories, latitude: np.ndarray, longitude: np.ndarray, time_us: np.ndarray, utc_offset_minutes: np.ndarray
) -> np.ndarray:
    """BEHAVIOUR_FIELDS relative to R requests, int32 [R, L, F_behaviour], padding (0) behind the last behaviour.

    Only behaviours strictly before the request count. Age is elapsed time; hours and weekdays are local to the request.
    """
    histories = histories.before(time_us)
    now, offset = np.asarray(time_us, np.int64)[:, None], np.asarray(utc_offset_minutes, np.int64)[:, None]
    hours_apart = np.abs(local_hour(histories.time_us, offset) - local_hour(now, offset))
    weekend = local_weekday(histories.time_us, offset) >= _SATURDAY
    far = distance_km(histories.latitude, histories.longitude, np.asarray(latitude)[:, None], np.asarray(longitude)[:, None])
    raw = {
        "poi": histories.poi_id,
        "category": histories.category_id,
        "geo": geo_cell(histories.latitude, histories.longitude),
        "action": histories.action,
        "age": np.searchsorted(np.asarray(AGE_BUCKET_HOURS, np.int64) * HOUR_US, now - histories.time_us),
        "hour_distance": np.minimum(hours_apart, 24 - hours_apart),
        "weekday_match": weekend == (local_weekday(now, offset) >= _SATURDAY),
        "distance": np.searchsorted(DISTANCE_BUCKET_KM, far),
    }
    real = np.arange(histories.time_us.shape[1]) < histories.count[:, None]
    return np.where(real[..., None], _columns(BEHAVIOUR_FIELDS, raw, vocabulary), np.int32(PADDING))


def encode_requests(
    vocabulary: Vocabulary,
    profiles: Profiles,
    histories: Histories,
    latitude: np.ndarray,
    longitude: np.ndarray,
    time_us: np.ndarray,
    utc_offset_minutes: np.ndarray,
) -> dict[str, np.ndarray]:
    """Everything the model reads about R requests.

    Args: one profile and history a request; latitude, longitude float64 [R] in degrees; time_us int64 [R], microseconds since
    1970 UTC; utc_offset_minutes [R].
    Returns: user_fields int32 [R, F_user], context_fields int32 [R, F_context], behaviours int32 [R, L, F_behaviour].
    """
    return {
        "user_fields": encode_users(vocabulary, profiles),
        "context_fields": encode_context(vocabulary, latitude, longitude, time_us, utc_offset_minutes),
        "behaviours": encode_behaviours(vocabulary, histories, latitude, longitude, time_us, utc_offset_minutes),
    }
