"""Counting baselines: what a policy knows that only counts a user's earlier visits. EVALUATION.md, next-poi.

Every scorer takes behaviours and requests in the log schema and gives scores [R, N]; only visits strictly before each
request count, so one table of behaviours serves all requests. Shapes: R requests, N places asked about.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from marketplace.schema import ACTION_VISIT

HOUR_DECAY = 2.0
"""Hours of clock distance over which a visit's weight falls by e."""
AGE_DECAY_DAYS = 60.0
"""Days over which a visit's weight falls by e."""
OTHER_DAY_TYPE = 0.5
"""Weight of a weekday visit at the weekend, and the other way round."""
TRANSITION_WEIGHT = 0.5
"""Weight of the transition frequencies from the last place."""

_PAIRS_AT_ONCE = 4_000_000


class _Pairs(NamedTuple):
    """Every (request, earlier visit of its user): request row and visit row."""

    request: np.ndarray
    visit: np.ndarray


def _microseconds(frame: pd.DataFrame) -> np.ndarray:
    return frame["event_timestamp"].astype("datetime64[us, UTC]").astype("int64").to_numpy()


def _visits(behaviours: pd.DataFrame) -> pd.DataFrame:
    visits = behaviours[behaviours["action"] == ACTION_VISIT]
    return visits.sort_values(["user_id", "event_timestamp", "behaviour_id"], ignore_index=True)


def _columns(poi_ids: np.ndarray, visited: np.ndarray) -> np.ndarray:
    """Column of each visited place among poi_ids; -1 where it is not asked about."""
    order = np.argsort(poi_ids, kind="stable")
    at = np.searchsorted(poi_ids[order], visited).clip(max=len(poi_ids) - 1)
    return np.where(poi_ids[order[at]] == visited, order[at], -1)


def _spans(visits: pd.DataFrame, requests: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """For each request the range [first, last) of its user's earlier visits in `visits`."""
    users, start = np.unique(visits["user_id"].to_numpy(), return_index=True)
    time = _microseconds(visits)
    rank = pd.Series(np.concatenate([time, _microseconds(requests)])).rank(method="dense").to_numpy().astype(np.int64)
    width = int(rank.max()) + 2
    user_of_visit = np.searchsorted(users, visits["user_id"].to_numpy())
    at = np.searchsorted(users, requests["user_id"].to_numpy()).clip(max=len(users) - 1)
    known = users[at] == requests["user_id"].to_numpy()
    last = np.searchsorted(user_of_visit * width + rank[: len(visits)], at * width + rank[len(visits) :], side="left")
    return np.where(known, start[at], 0), np.where(known, last, 0)


def _pairs(visits: pd.DataFrame, requests: pd.DataFrame) -> list[_Pairs]:
    first, last = _spans(visits, requests)
    count = last - first
    chunk = np.cumsum(count) // _PAIRS_AT_ONCE
    parts = []
    for number in np.unique(chunk):
        rows = np.flatnonzero(chunk == number)
        request = np.repeat(rows, count[rows])
        begin = np.cumsum(count[rows]) - count[rows]
        parts.append(_Pairs(request, np.arange(len(request)) - np.repeat(begin, count[rows]) + first[request]))
    return parts


def _add(scores: np.ndarray, request: np.ndarray, column: np.ndarray, weight: np.ndarray) -> None:
    asked = column >= 0
    cell = request[asked] * scores.shape[1] + column[asked]
    scores += np.bincount(cell, weight[asked], minlength=scores.size).reshape(scores.shape) if scores.size else 0.0


def popularity(behaviours: pd.DataFrame, requests: pd.DataFrame, poi_ids: np.ndarray) -> np.ndarray:
    """Visits of all users to each place before the first of these requests; the same row for every request."""
    visits = _visits(behaviours)
    past = visits[_microseconds(visits) < _microseconds(requests).min()] if len(requests) else visits
    column = _columns(np.asarray(poi_ids, np.int64), past["poi_id"].to_numpy())
    count = np.bincount(column[column >= 0], minlength=len(poi_ids)).astype(np.float64)
    return np.broadcast_to(count, (len(requests), len(poi_ids)))


def most_visited(behaviours: pd.DataFrame, requests: pd.DataFrame, poi_ids: np.ndarray) -> np.ndarray:
    """The user's own earlier visits to each place."""
    poi_ids, visits = np.asarray(poi_ids, np.int64), _visits(behaviours)
    column, scores = _columns(poi_ids, visits["poi_id"].to_numpy()), np.zeros((len(requests), len(poi_ids)))
    for pairs in _pairs(visits, requests):
        _add(scores, pairs.request, column[pairs.visit], np.ones(len(pairs.visit)))
    return scores


def hour_weighted(behaviours: pd.DataFrame, requests: pd.DataFrame, poi_ids: np.ndarray) -> np.ndarray:
    """Own visits weighted by exp(-hours of clock distance / 2), x 0.5 across weekday and weekend, and exp(-days / 60);
    plus half the frequencies of the user's own earlier moves from the last place. Local time is the request's."""
    poi_ids, visits = np.asarray(poi_ids, np.int64), _visits(behaviours)
    column, scores = _columns(poi_ids, visits["poi_id"].to_numpy()), np.zeros((len(requests), len(poi_ids)))
    visit_seconds, request_seconds = _microseconds(visits) / 1e6, _microseconds(requests) / 1e6
    offset = 60.0 * requests["utc_offset_minutes"].to_numpy()
    place = visits["poi_id"].to_numpy()
    _, last = _spans(visits, requests)
    for pairs in _pairs(visits, requests):
        then, now = (visit_seconds[pairs.visit] + offset[pairs.request]), (request_seconds + offset)[pairs.request]
        apart = np.abs(then % 86400.0 - now % 86400.0) / 3600.0
        apart = np.minimum(apart, 24.0 - apart)
        same_type = _weekend(then) == _weekend(now)
        weight = np.exp(-apart / HOUR_DECAY) * np.where(same_type, 1.0, OTHER_DAY_TYPE) * np.exp(-(now - then) / 86400.0 / AGE_DECAY_DAYS)
        _add(scores, pairs.request, column[pairs.visit], weight)

        newest = last[pairs.request] - 1
        moves = (pairs.visit < newest) & (place[pairs.visit] == place[newest])
        request, following = pairs.request[moves], pairs.visit[moves] + 1
        share = 1.0 / np.bincount(request, minlength=len(requests)).clip(min=1)[request]
        _add(scores, request, column[following], TRANSITION_WEIGHT * share)
    return scores


def _weekend(local_seconds: np.ndarray) -> np.ndarray:
    """Saturday or Sunday; 1 January 1970 was a Thursday."""
    return (np.floor(local_seconds / 86400.0).astype(np.int64) + 3) % 7 >= 5


SCORERS = {"popularity": popularity, "most_visited": most_visited, "hour_weighted": hour_weighted}
"""By name, for reports that print them beside a model."""
