"""Request-level training samples (EGA-V1 Sec. 4.1): one row a request, its exposed ads and ads drawn by popularity.

Legend: R requests, A ads (union over days), T days, K slots, N_s unexposed, M = K + N_s, L behaviours, P targets.
A sample folder holds the arrays of `schema.SAMPLE_ARRAYS` as .npy files to be memory-mapped, `vocab.json`, `samples.json`
and `manifest.json` (sha256 and size of every file). Work and memory are linear in R.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from features.build import DAY_US, microseconds, rows_before
from features.encoding import Vocabulary, encode_ads, encode_requests
from features.store import histories_as_of, load_catalogue_days, open_store, profiles_as_of, read_snapshot
from marketplace.logs import data_hash, has_table, read_table
from marketplace.schema import (
    ACTION_PURCHASE,
    ACTION_VISIT,
    AD_FIELDS,
    BEHAVIOUR_FIELDS,
    CONTEXT_FIELDS,
    ORGANIC,
    PAGE_ARRAYS,
    SAMPLE_ARRAYS,
    TEST,
    TRAIN,
    USER_FIELDS,
    VALIDATION,
    SampleArray,
    geo_cell,
)

SAMPLES_VERSION = 1
_CHUNK = 20_000
"""Requests encoded at a time."""
_SESSION_LIMIT = 256
"""Behaviours of a session looked at per request, so that one endless session cannot make the work quadratic."""
_RACE_CELLS = 4_000_000
"""Requests x ads handled at once by the exponential race."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class SamplingConfig:
    """How samples are drawn and split."""

    unexposed: int = Field(default=95, ge=1)
    """N_s, unexposed ads beside the exposed ones of a request."""
    popularity_power: float = Field(default=0.75, ge=0.0, le=2.0)
    """Exponent of (count + 1) in the sampling weight of an ad; 0 draws uniformly."""
    keep_unexposed_positives: bool = True
    """Always include the ads that the user chose elsewhere in the session (their chance of being drawn is still what the correction needs)."""
    targets: int = Field(default=8, ge=1)
    """P, most ads kept as what the user chose elsewhere after the request."""
    validation_days: int = Field(default=1, ge=1)
    """Days before the test days that choose hyper-parameters and stop training."""
    test_days: int = Field(default=2, ge=1)
    """Last days, reported once."""


@dataclass(frozen=True)
class SampleInfo:
    """What `samples.json` records."""

    format_version: int
    """Layout of the folder."""
    days: list[str]
    """The T days with requests, ISO dates in order."""
    train_days: int
    """How many of the first days train; then `validation_days`, then `test_days`."""
    validation_days: int
    """See train_days."""
    test_days: int
    """See train_days."""
    requests: dict[str, int]
    """R of each split."""
    ads: int
    """A, rows of the ad table."""
    slots: int
    """K, longest page in the logs."""
    unexposed: int
    """N_s."""
    behaviours: int
    """L."""
    targets: int
    """P."""
    field_sizes: dict[str, dict[str, int]]
    """Rows of every field's embedding table, by group."""
    positives: dict[str, int]
    """Clicks on exposed ads, and unexposed ads chosen elsewhere."""
    data_hash: str
    """Identity of the logs."""
    seed: int
    """Seed of the draw."""
    config: dict[str, Any]
    """The SamplingConfig."""


# ---------------------------------------------------------------------------------------------------------------------
# Drawing without replacement


def expected_distinct(scale: np.ndarray, weights: np.ndarray, copies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of 1 - exp(-t w) over ads, and its derivative in t. Args: scale, t [R]; weights, copies: distinct weights [U] and how many ads have each."""
    left = np.exp(-scale[:, None] * weights)
    return (copies * (1.0 - left)).sum(axis=1), (copies * weights * left).sum(axis=1)


def _newton(measure: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]], scale: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Solve measure(t) = wanted from the left: steps on a concave increasing function never overshoot. `measure` gets t and the rows asked."""
    rows = np.arange(len(scale))
    for _ in range(60):
        total, slope = measure(scale[rows], rows)
        step = (wanted[rows] - total) / slope
        scale[rows] += step
        rows = rows[np.abs(step) > 1e-9 * scale[rows]]
        if not len(rows):
            break
    return scale


def _table(distinct: np.ndarray, copies: np.ndarray, low: float, high: float) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """`expected_distinct` between two scales as a cubic Hermite table in log t; the error is below 1e-6 of the value."""
    nodes = np.linspace(np.log(low) - 1e-6, np.log(high) + 1e-6, 129)
    width = nodes[1] - nodes[0]
    value, slope = expected_distinct(np.exp(nodes), distinct, copies)
    tangent = slope * np.exp(nodes) * width

    def look_up(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = (np.log(scale) - nodes[0]) / width
        cell = np.clip(at.astype(np.int64), 0, len(nodes) - 2)
        x = at - cell
        rise = value[cell + 1] - value[cell]
        a, b = tangent[cell] - rise, rise - tangent[cell + 1]
        bend = x * (1 - x)
        total = value[cell] + x * rise + bend * (a * (1 - x) + b * x)
        change = rise + (1 - 2 * x) * (a * (1 - x) + b * x) + bend * (b - a)
        return total, change / (scale * width)

    return look_up


def inclusion_scale(weights: np.ndarray, excluded: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """t per request such that the inclusion probabilities 1 - exp(-t w) of the eligible ads sum to the number wanted; float64 [R].

    Args: weights [N] > 0; excluded int [R, E], rows of weights that cannot be drawn, -1 padding; wanted int [R].
    Returns: infinity where every eligible ad is wanted, 0 where none is. The sum over all ads is tabulated once and the excluded
    ads are subtracted, so a request costs O(E), whatever N; only requests that want nearly every ad sum exactly.
    """
    distinct, copies = np.unique(weights, return_counts=True)
    weight_out = np.where(excluded >= 0, weights[excluded], 0.0)
    eligible = len(weights) - (excluded >= 0).sum(axis=1)
    scale = np.where(wanted >= eligible, np.inf, 0.0)
    todo = (wanted > 0) & (wanted < eligible)
    many = wanted + excluded.shape[1] < 0.95 * len(weights)

    def solve(rows: np.ndarray, total_of: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], start: np.ndarray) -> None:
        def measure(t: np.ndarray, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            total, slope = total_of(t)
            out = weight_out[rows[part]]
            left = np.exp(-t[:, None] * out)
            return total - (1.0 - left).sum(axis=1), slope - (out * left).sum(axis=1)

        scale[rows] = _newton(measure, start, wanted[rows].astype(np.float64))

    def exact(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return expected_distinct(t, distinct, copies)

    rows = np.flatnonzero(todo & many)
    if len(rows):
        ends = np.array([wanted[rows].min(), wanted[rows].max() + excluded.shape[1]], np.float64)
        low, high = _newton(lambda t, _: exact(t), ends / weights.sum(), ends)
        numbers, group = np.unique(wanted[rows], return_inverse=True)
        without_exclusion = _newton(lambda t, _: exact(t), numbers / weights.sum(), numbers.astype(np.float64))
        solve(rows, _table(distinct, copies, low, high), without_exclusion[group])
    rest = np.flatnonzero(todo & ~many)
    for start in range(0, len(rest), _CHUNK):
        rows = rest[start : start + _CHUNK]
        solve(rows, exact, wanted[rows] / (weights.sum() - weight_out[rows].sum(axis=1)))
    return scale


def _race(weights: np.ndarray, excluded: np.ndarray, wanted: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Successive sampling by exponential clocks: each ad rings at rate w, the first ones win. O(N) a request."""
    width = int(wanted.max(initial=0))
    picked = np.full((len(wanted), width), -1, np.int64)
    step = max(1, _RACE_CELLS // max(len(weights), 1))
    for start in range(0, len(wanted), step):
        rows = slice(start, start + step)
        clock = rng.standard_exponential((len(wanted[rows]), len(weights))) / weights
        row, column = np.nonzero(excluded[rows] >= 0)
        clock[row, excluded[rows][row, column]] = np.inf
        first = np.argpartition(clock, min(width, len(weights)) - 1, axis=1)[:, :width]
        rank = np.argsort(np.take_along_axis(clock, first, axis=1), axis=1)
        first = np.take_along_axis(first, rank, axis=1)
        real = np.isfinite(np.take_along_axis(clock, first, axis=1)) & (np.arange(first.shape[1]) < wanted[rows, None])
        picked[rows, : first.shape[1]] = np.where(real, first, -1)
    return picked


def draw_unexposed(weights: np.ndarray, excluded: np.ndarray, wanted: np.ndarray, scale: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw ads one after another without replacement with probability proportional to their weight (successive sampling).

    Large N: draw with replacement and keep first occurrences, O(N_s) a request; small N, and the rare
    rows that fall short: the exponential race, which continues the same law.

    Args: weights [N] > 0; excluded int [R, E], -1 padding; wanted int [R]; scale from `inclusion_scale`.
    Returns: rows of weights int64 [R, max wanted], in order of drawing, -1 padding (fewer eligible than wanted).
    """
    width = int(wanted.max(initial=0))
    finite = scale[np.isfinite(scale)]
    draws = int(1.1 * finite.max(initial=0.0) * weights.sum()) + 16
    if not len(finite) or draws + excluded.shape[1] > len(weights) // 2:
        return _race(weights, excluded, wanted, rng)
    times = rng.multinomial(len(wanted) * draws, weights / weights.sum())  # shuffled, these are independent draws, without a search for each
    drawn = np.repeat(np.arange(len(weights), dtype=np.int32), times)
    rng.shuffle(drawn)
    drawn = drawn.reshape(len(wanted), draws)
    sequence = np.concatenate([excluded, drawn], axis=1).astype(np.int32)
    order = np.argsort(sequence, axis=1, kind="stable")
    ranked = np.take_along_axis(sequence, order, axis=1)
    fresh = np.zeros(sequence.shape, bool)
    np.put_along_axis(fresh, order, np.concatenate([np.ones((len(ranked), 1), bool), ranked[:, 1:] != ranked[:, :-1]], axis=1), axis=1)
    fresh = fresh[:, excluded.shape[1] :]
    place = np.cumsum(fresh, axis=1)
    row, column = np.nonzero(fresh & (place <= wanted[:, None]))
    picked = np.full((len(wanted), width), -1, np.int64)
    picked[row, place[row, column] - 1] = drawn[row, column]
    short = np.flatnonzero(place[:, -1] < wanted)
    if len(short):
        got = place[short, -1]
        more = _race(weights, np.concatenate([excluded[short], picked[short]], axis=1), wanted[short] - got, rng)
        row, column = np.nonzero(more >= 0)
        picked[short[row], got[row] + column] = more[row, column]
    return picked


# ---------------------------------------------------------------------------------------------------------------------
# The ad table, vocabulary and labels


def _spread(start: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranges start..start+count laid end to end: (which range, the value) of every element."""
    which = np.repeat(np.arange(len(start)), count)
    offset = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
    return which, start[which] + offset


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class _Ads:
    """The ads of all days: newest attributes by ad_id, and bids by day."""

    table: pd.DataFrame
    bid: np.ndarray
    reserve: np.ndarray

    @property
    def ids(self) -> np.ndarray:
        return self.table["ad_id"].to_numpy()


def _day_rows(frame: pd.DataFrame, days: list[date]) -> np.ndarray:
    """Index into `days` of every row's UTC day."""
    return np.searchsorted(np.array(days, "datetime64[D]"), microseconds(frame["event_timestamp"]).astype("datetime64[us]").astype("datetime64[D]"))


def _read_ads(logs: Path, days: list[date]) -> _Ads:
    ads = read_table(logs, "ads", days=days)
    day = _day_rows(ads, days)
    empty = sorted(set(range(len(days))) - set(day.tolist()))
    if empty:
        raise ValueError(f"the ads table has no partition for {days[empty[0]]}, a day with requests; every such day needs its catalogue")
    ids, row = np.unique(ads["ad_id"].to_numpy(), return_inverse=True)
    bid, reserve = np.full((2, len(days), len(ids)), np.nan)
    bid[day, row], reserve[day, row] = ads["bid"], ads["reserve"]
    newest = ads.sort_values(["ad_id", "event_timestamp"], kind="stable").drop_duplicates("ad_id", keep="last").reset_index(drop=True)
    return _Ads(newest, bid, reserve)


def _row_of(ids: np.ndarray, wanted: np.ndarray, what: str) -> np.ndarray:
    position = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    if len(wanted) and not (ids[position] == wanted).all():
        raise ValueError(f"{what} {wanted[ids[position] != wanted][0]} is in the impressions but not in its table")
    return position


def _learn_vocabulary(logs: Path, ads: pd.DataFrame, behaviours: pd.DataFrame, requests: pd.DataFrame, until: np.datetime64) -> Vocabulary:
    """Ids seen in the catalogue, behaviours, requests and profiles before the end of the training days."""
    users = read_table(logs, "users", columns=["event_timestamp", "home_latitude", "home_longitude"])
    ads, behaviours, requests, users = (
        frame[frame["event_timestamp"] < pd.Timestamp(until, tz="UTC")] for frame in (ads, behaviours, requests, users)
    )
    cells = [
        np.unique(geo_cell(frame[f"{prefix}latitude"].to_numpy(), frame[f"{prefix}longitude"].to_numpy()))
        for frame, prefix in ((ads, ""), (behaviours, ""), (requests, ""), (users, "home_"))
    ]
    ids = {field.vocabulary: [ads[f"{field.name}_id"].to_numpy()] for field in AD_FIELDS if field.vocabulary and field.name != "geo"}
    ids["poi"].append(behaviours["poi_id"].to_numpy())
    ids["category"].append(behaviours["category_id"].to_numpy())
    return Vocabulary.learn(ids | {"geo": cells})


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class _Chosen:
    """Ads that users chose elsewhere: one row per (request, ad), sorted by request, then time."""

    request: np.ndarray
    ad: np.ndarray
    purchase: np.ndarray


def _rest_of_session(requests: pd.DataFrame, behaviours: pd.DataFrame) -> tuple[np.ndarray, pd.DataFrame]:
    """Behaviours of the same user and session at or after each request: (request row of every one, the behaviours), by request, then time."""
    behaviours = behaviours[behaviours["session_id"] != 0]
    behaviours = behaviours.assign(time_us=microseconds(behaviours["event_timestamp"])).sort_values(["session_id", "time_us", "behaviour_id"], kind="stable")
    session, when = behaviours["session_id"].to_numpy(), behaviours["time_us"].to_numpy()
    if not len(session):
        return np.empty(0, np.int64), behaviours
    asked = requests["session_id"].to_numpy()
    start = rows_before(session, when, asked, microseconds(requests["event_timestamp"]))
    count = np.where(asked != 0, np.clip(np.searchsorted(session, asked, side="right") - start, 0, _SESSION_LIMIT), 0)
    request, event = _spread(start, count)
    same = behaviours["user_id"].to_numpy()[event] == requests["user_id"].to_numpy()[request]
    return request[same], behaviours.iloc[event[same]]


def _chosen_elsewhere(requests: pd.DataFrame, day: np.ndarray, behaviours: pd.DataFrame, ads: _Ads, shown_request: np.ndarray, shown_ad: np.ndarray) -> _Chosen:
    """Behaviours of the same user and session at or after the request, at the place of an ad that is active that day in the request's city.

    A click or purchase at a place whose ad this very page showed is the page's own and does not count; a visit does.
    """
    request, events = _rest_of_session(requests, behaviours[behaviours["poi_id"].isin(ads.table["poi_id"])])
    if not len(request):
        nothing = np.empty(0, np.int64)
        return _Chosen(nothing, nothing, nothing)
    action, poi = events["action"].to_numpy(), events["poi_id"].to_numpy()
    poi_ids, ad_poi = np.unique(ads.table["poi_id"].to_numpy(), return_inverse=True)
    poi = np.searchsorted(poi_ids, poi)
    own = np.isin(request * len(poi_ids) + poi, shown_request * len(poi_ids) + ad_poi[shown_ad])
    keep = ~(own & (action != ACTION_VISIT))
    request, poi, purchase = request[keep], poi[keep], (action == ACTION_PURCHASE)[keep]

    by_poi = np.argsort(ad_poi, kind="stable")
    first = np.searchsorted(ad_poi[by_poi], np.arange(len(poi_ids) + 1))
    pair, position = _spread(first[poi], np.diff(first)[poi])
    request, ad, purchase = request[pair], by_poi[position], purchase[pair]
    active = ~np.isnan(ads.bid[day[request], ad]) & (ads.table["city_id"].to_numpy()[ad] == requests["city_id"].to_numpy()[request])
    request, ad, purchase = request[active], ad[active], purchase[active]

    key = request * len(ads.table) + ad
    distinct, first_seen, group = np.unique(key, return_index=True, return_inverse=True)
    bought = np.bincount(group, purchase, len(distinct)) > 0
    order = np.argsort(first_seen, kind="stable")  # pairs came sorted by request, then time
    return _Chosen(request[first_seen[order]], ad[first_seen[order]], bought[order].astype(np.int64))


def _ranks(groups: np.ndarray) -> np.ndarray:
    """Position of every row within its group; groups are contiguous."""
    if not len(groups):
        return np.empty(0, np.int64)
    starts = np.flatnonzero(np.append(True, groups[1:] != groups[:-1]))
    return np.arange(len(groups)) - np.repeat(starts, np.diff(np.append(starts, len(groups))))


def _padded(request: np.ndarray, values: np.ndarray, rows: int, width: int, fill: Any, dtype: str) -> np.ndarray:
    """Values of contiguous request groups as [rows, width]; what does not fit is left out."""
    out = np.full((rows, width), fill, dtype)
    rank = _ranks(request)
    keep = rank < width
    out[request[keep], rank[keep]] = values[keep]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The folder


class _Folder:
    """A sample folder in the making: arrays in `.part`, moved into place when complete."""

    def __init__(self, out: Path, sizes: dict[str, int], wanted: tuple[SampleArray, ...]) -> None:
        self.out, self.part = Path(out), Path(out).with_name(f".{Path(out).name}.part")
        shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir(parents=True)
        self.arrays = {
            array.name: np.lib.format.open_memmap(
                self.part / f"{array.name}.npy", "w+", np.dtype(array.dtype), tuple(int(letter) if letter.isdigit() else sizes[letter] for letter in array.shape.split())
            )
            for array in wanted
        }

    def __setitem__(self, name: str, values: np.ndarray) -> None:
        target = self.arrays[name]
        if target.shape != np.shape(values):
            raise ValueError(f"sample array {name} has shape {list(target.shape)}, got {list(np.shape(values))}")
        target[...] = values

    def finish(self, documents: dict[str, bytes]) -> None:
        for array in self.arrays.values():
            array.flush()
        self.arrays.clear()
        for name, content in documents.items():
            (self.part / name).write_bytes(content)
        files = {path.name: {"sha256": _sha256(path), "size": path.stat().st_size} for path in sorted(self.part.iterdir())}
        (self.part / "manifest.json").write_text(json.dumps({"format_version": SAMPLES_VERSION, "files": files}, indent=1) + "\n")
        for path in self.part.iterdir():
            _sync(path)
        shutil.rmtree(self.out, ignore_errors=True)
        os.replace(self.part, self.out)
        _sync(self.out.parent)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _split_of(days: int, config: SamplingConfig) -> np.ndarray:
    train = days - config.validation_days - config.test_days
    if train < 1:
        raise ValueError(
            f"the logs have {days} days of requests; {config.validation_days} validation and {config.test_days} test days leave none for training: bring more days or lower them"
        )
    return np.repeat(np.array([TRAIN, VALIDATION, TEST], np.int8), [train, config.validation_days, config.test_days])


def _candidates(
    requests: pd.DataFrame, day: np.ndarray, ads: _Ads, weights: np.ndarray, exposed: np.ndarray, chosen: _Chosen, config: SamplingConfig, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per (day, city): request rows, their unexposed candidates int [r, N_s] in order of the ad table, and the log inclusion probabilities."""
    city = requests["city_id"].to_numpy()
    ad_city = ads.table["city_id"].to_numpy()
    free = ~(exposed[chosen.request] == chosen.ad[:, None]).any(axis=1)
    kept = _padded(chosen.request[free], chosen.ad[free], len(requests), config.unexposed, -1, "int32") if config.keep_unexposed_positives else None
    for today, here in np.unique(np.stack([day, city]), axis=1).T:
        rows = np.flatnonzero((day == today) & (city == here))
        active = np.flatnonzero(~np.isnan(ads.bid[today]) & (ad_city == here))
        local = np.full(len(ads.table) + 1, -1, np.int64)
        local[active] = np.arange(len(active))
        shown = local[exposed[rows]]  # -1 padding reads the spare last cell
        positives = np.full((len(rows), 0), -1, np.int64) if kept is None else -np.sort(-local[kept[rows]], axis=1)  # real ones first
        positives = positives[:, : (positives >= 0).sum(axis=1).max(initial=0)]
        excluded = np.concatenate([shown, positives], axis=1)
        wanted = config.unexposed - (positives >= 0).sum(axis=1)
        rng = np.random.default_rng([seed, int(today), int(here)])
        scale = inclusion_scale(weights[active], excluded, wanted)
        picked = draw_unexposed(weights[active], excluded, wanted, scale, rng)
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn = np.concatenate([positives, picked], axis=1)
            # A chosen ad carries the chance it would have had as one that was not chosen: the log-odds of a sampled ad exceed the true ones by
            # -log of that chance whichever label it has, and a correction that differed by label would bias every probability.
            chance = np.where(np.isinf(scale)[:, None], 0.0, np.log(np.maximum(-np.expm1(-scale[:, None] * weights[active][drawn]), 1e-9)))
        candidate = np.full((len(rows), config.unexposed + positives.shape[1]), -1, np.int64)
        candidate[:, : positives.shape[1]] = positives
        candidate[:, positives.shape[1] : positives.shape[1] + picked.shape[1]] = picked
        inclusion = np.zeros(candidate.shape)
        if kept is not None:  # drawn without regard to the label, a sample needs no correction
            inclusion[:, : drawn.shape[1]] = np.where(drawn >= 0, chance, 0.0)
        order = np.argsort(np.where(candidate < 0, len(active), candidate), axis=1, kind="stable")[:, : config.unexposed]
        candidate, inclusion = np.take_along_axis(candidate, order, axis=1), np.take_along_axis(inclusion, order, axis=1)
        yield rows, np.where(candidate >= 0, active[candidate], -1), inclusion


def _write_exposed(folder: _Folder, impressions: pd.DataFrame, request: np.ndarray, ad: np.ndarray, slots: int) -> np.ndarray:
    """Exposed part of every request-by-slot array; returns the exposed ad rows int32 [R, K]."""
    rows, slot = len(folder.arrays["request_id"]), impressions["slot"].to_numpy() - 1
    exposed = np.full((rows, slots), -1, np.int32)
    exposed[request, slot] = ad
    folder.arrays["candidate"][:, :slots] = exposed
    for name, column in (("exposed_bid", "bid"), ("exposed_payment", "payment"), ("exposed_pctr", "pctr"), ("propensity", "propensity")):
        values = np.full((rows, slots), np.nan)
        values[request, slot] = impressions[column]
        folder[name] = values
    for name in ("click", "purchase"):
        folder.arrays[name][request, slot] = impressions[name].to_numpy()
    return exposed


def _write_features(
    folder: _Folder, home: Path, vocabulary: Vocabulary, requests: pd.DataFrame, behaviours: int, pages: _Pages | None, say: Callable[[str], None]
) -> None:
    """Point-in-time features of every request, from the feature store, encoded in chunks."""
    store = open_store(home)
    users, times = requests["user_id"].to_numpy(), microseconds(requests["event_timestamp"])
    place = requests["latitude"].to_numpy(), requests["longitude"].to_numpy()
    offset = requests["utc_offset_minutes"].to_numpy()
    say("joining features as of each request")
    profiles = profiles_as_of(store, users, times)
    histories = histories_as_of(store, users, times, behaviours)
    say("encoding")
    for start in range(0, len(requests), _CHUNK):
        part = slice(start, start + _CHUNK)
        encoded = encode_requests(vocabulary, profiles.take(part), histories.take(part), place[0][part], place[1][part], times[part], offset[part])
        for name, values in encoded.items():
            folder.arrays[name][part] = values
        if pages is not None:
            seen = histories.take(part).before(times[part])
            real = np.arange(seen.poi_id.shape[1]) < seen.count[:, None]
            folder.arrays["behaviour_place"][part] = np.where(real, _index(pages.place_ids, seen.poi_id), -1)
            folder.arrays["behaviour_creative"][part] = np.where(real & (seen.creative_id > 0), pages.creative_rows(seen.creative_id), -1)


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class _Pages:
    """Creatives and organic results of the logs, and every place that is seen anywhere."""

    places: pd.DataFrame
    """poi_id (ascending), category_id, latitude, longitude."""
    creatives: pd.DataFrame
    """creative_id, ad_id, embedding; ordered by ad, then id; of ads that are in the catalogue."""
    organic: pd.DataFrame

    @property
    def place_ids(self) -> np.ndarray:
        return self.places["poi_id"].to_numpy()

    def creative_rows(self, ids: np.ndarray) -> np.ndarray:
        """Rows of creative ids of any shape; -1 for unknown ones."""
        known = self.creatives["creative_id"].to_numpy()
        order = np.argsort(known)
        at = _index(known[order], ids)
        return np.where(at >= 0, order[at], -1)


def _index(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Positions in sorted `known`; -1 for what is not there."""
    if not len(known):
        return np.full(np.shape(wanted), -1, np.int64)
    at = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    return np.where(known[at] == wanted, at, -1)


def _read_pages(logs: Path, ads: _Ads, behaviours: pd.DataFrame) -> _Pages | None:
    """None where the logs hold no creatives."""
    if not has_table(logs, "creatives"):
        return None
    creatives = read_table(logs, "creatives")
    creatives = creatives[creatives["ad_id"].isin(ads.ids)].sort_values(["ad_id", "creative_id"], ignore_index=True)
    organic = read_table(logs, "organic") if has_table(logs, "organic") else pd.DataFrame({name: [] for name in ORGANIC.names})
    columns = ["poi_id", "category_id", "latitude", "longitude"]
    places = pd.concat([ads.table[columns], organic[columns], behaviours[columns]]).drop_duplicates("poi_id").sort_values("poi_id", ignore_index=True)
    return _Pages(places.astype({"poi_id": np.int64}), creatives, organic)


def _write_pages(
    folder: _Folder, home: Path, pages: _Pages, ads: _Ads, requests: pd.DataFrame, impressions: pd.DataFrame, request: np.ndarray, behaviours: pd.DataFrame, calendar: list[date]
) -> None:
    """PAGE_ARRAYS but for the behaviours of histories."""
    folder["place_id"], folder["place_category"] = pages.place_ids, pages.places["category_id"].to_numpy()
    folder["place_position"] = pages.places[["latitude", "longitude"]].to_numpy()
    folder["ad_place_row"] = _index(pages.place_ids, ads.table["poi_id"].to_numpy())
    creative_ad = np.searchsorted(ads.ids, pages.creatives["ad_id"].to_numpy())
    folder["creative_id"], folder["creative_ad"] = pages.creatives["creative_id"].to_numpy(), creative_ad
    folder["creative_embedding"] = np.stack(pages.creatives["embedding"].to_list())
    known = load_catalogue_days(home)
    known = known[known["event_timestamp"].dt.date.isin(calendar)]
    at = _day_rows(known, calendar), _row_of(ads.ids, known["ad_id"].to_numpy(), "ad")
    folder.arrays["shown_creative"][...] = -1
    folder.arrays["shown_creative"][at] = pages.creative_rows(known["shown_creative_id"].to_numpy())
    for name in ("impressions", "clicks"):
        folder.arrays[f"ad_{name}"][at] = known[name].to_numpy()
    rows, slots = folder.arrays["exposed_creative"].shape
    slot = impressions["slot"].to_numpy() - 1
    shown = np.full((rows, slots), -1, np.int32)
    shown[request, slot] = pages.creative_rows(impressions["creative_id"].to_numpy())
    folder["exposed_creative"] = shown
    folder.arrays["creative_click"][request, slot] = impressions["creative_click"].to_numpy()

    items = folder.arrays["organic_place"].shape[1]
    folder.arrays["organic_place"][...] = -1
    if items:
        at, rank = _index_of_requests(requests, pages.organic["request_id"].to_numpy()), pages.organic["rank"].to_numpy() - 1
        folder.arrays["organic_place"][at, rank] = _index(pages.place_ids, pages.organic["poi_id"].to_numpy())
        folder.arrays["organic_click"][at, rank] = pages.organic["click"].to_numpy()
        free = np.ones((rows, slots + items), bool)
        free[at, np.minimum(pages.organic["position"].to_numpy() - 1, slots + items - 1)] = False
        place = np.argsort(~free, axis=1, kind="stable")[:, :slots]  # the free places, top first
        folder["above"] = np.minimum(np.maximum(place - np.arange(slots), 0), items)
    visits = behaviours[behaviours["action"] == ACTION_VISIT]
    asked, events = _rest_of_session(requests, visits)
    folder["next_place"] = _padded(asked, _index(pages.place_ids, events["poi_id"].to_numpy()), rows, folder.arrays["next_place"].shape[1], -1, "int32")


def _index_of_requests(requests: pd.DataFrame, ids: np.ndarray) -> np.ndarray:
    by_id = np.argsort(requests["request_id"].to_numpy())
    return by_id[_row_of(requests["request_id"].to_numpy()[by_id], ids, "request")]


def sample_requests(logs: Path, home: Path, out: Path, config: SamplingConfig, seed: int, progress: Callable[[str], None] | None = None) -> SampleInfo:
    """Write the sample folder `out` from validated logs and the feature store of `home` (build_features of the same logs).

    Days with requests are split by date: the last `test_days` test, those before validate, the rest trains. Vocabulary and
    popularity (behaviours at the ad's place) see nothing after the training days. Same logs, config and seed give the same bytes.
    Raises ValueError where the store was built from other logs or the days do not suffice.
    """
    say, logs = progress or (lambda text: None), Path(logs)
    snapshot, identity = read_snapshot(home), data_hash(logs)
    if snapshot["data_hash"] != identity:
        raise ValueError(f"the feature store of {home} was built from other logs (data hash {snapshot['data_hash'][:12]}, these have {identity[:12]}); build the features first")
    say("reading logs")
    requests = read_table(logs, "requests").sort_values(["event_timestamp", "request_id"], kind="stable", ignore_index=True)
    impressions = read_table(logs, "impressions").sort_values(["request_id", "slot"], kind="stable", ignore_index=True)
    behaviours = read_table(logs, "behaviours")
    if requests.empty:
        raise ValueError(f"{logs} holds no requests; there is nothing to sample")
    days, day = np.unique(microseconds(requests["event_timestamp"]) // DAY_US, return_inverse=True)
    calendar = [np.datetime64(int(number), "D").item() for number in days]
    split = _split_of(len(days), config)
    until = np.datetime64(int(days[split == TRAIN][-1]) + 1, "D")
    ads = _read_ads(logs, calendar)
    training_ads = read_table(logs, "ads", days=[when for when, part in zip(calendar, split, strict=True) if part == TRAIN])
    vocabulary = _learn_vocabulary(logs, training_ads, behaviours, requests, until)

    say("labelling")
    shown_request = _index_of_requests(requests, impressions["request_id"].to_numpy())
    shown_ad = _row_of(ads.ids, impressions["ad_id"].to_numpy(), "ad")
    slots = int(impressions["slot"].max()) if len(impressions) else int(requests["slots"].max())
    chosen = _chosen_elsewhere(requests, day, behaviours, ads, shown_request, shown_ad)
    sizes = {"A": len(ads.table), "T": len(days), "R": len(requests), "K": slots, "M": slots + config.unexposed, "L": int(snapshot["behaviours"]), "P": config.targets}
    sizes |= {"F_ad": len(AD_FIELDS), "F_user": len(USER_FIELDS), "F_context": len(CONTEXT_FIELDS), "F_behaviour": len(BEHAVIOUR_FIELDS)}
    pages = _read_pages(logs, ads, behaviours)
    if pages is not None:
        sizes |= {"Q": len(pages.places), "G": len(pages.creatives), "E": len(pages.creatives["embedding"].iloc[0]), "O": int(pages.organic["rank"].max()) if len(pages.organic) else 0}
    folder = _Folder(out, sizes, SAMPLE_ARRAYS if pages is None else (*SAMPLE_ARRAYS, *PAGE_ARRAYS))
    _write_tables(folder, ads, vocabulary, requests, day, split)
    exposed = _write_exposed(folder, impressions, shown_request, shown_ad, slots)
    folder["target"] = _padded(chosen.request, chosen.ad, len(requests), config.targets, -1, "int32")
    if pages is not None:
        _write_pages(folder, home, pages, ads, requests, impressions, shown_request, behaviours, calendar)

    say("drawing candidates")
    visits = behaviours.loc[behaviours["event_timestamp"] < pd.Timestamp(until, tz="UTC"), "poi_id"].value_counts()
    weights = (ads.table["poi_id"].map(visits).fillna(0).to_numpy(np.float64) + 1.0) ** config.popularity_power
    pair_key = chosen.request * len(ads.table) + chosen.ad
    pair_order = np.argsort(pair_key, kind="stable")
    unexposed_positives = 0
    for rows, candidate, inclusion in _candidates(requests, day, ads, weights, exposed, chosen, config, seed):
        folder.arrays["candidate"][rows, slots:] = candidate
        folder.arrays["log_inclusion"][rows, slots:] = inclusion
        if len(pair_key):
            key = rows[:, None] * len(ads.table) + candidate
            position = pair_order[np.minimum(np.searchsorted(pair_key, key, sorter=pair_order), len(pair_key) - 1)]
            label = (pair_key[position] == key) & (candidate >= 0)
            folder.arrays["click"][rows, slots:] = label
            folder.arrays["purchase"][rows, slots:] = label & (chosen.purchase[position] == 1)
            unexposed_positives += int(label.sum())
    _write_features(folder, home, vocabulary, requests, sizes["L"], pages, say)
    counts = {name: int((split[day] == value).sum()) for name, value in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST))}
    info = SampleInfo(
        format_version=SAMPLES_VERSION, days=[when.isoformat() for when in calendar], train_days=int((split == TRAIN).sum()),
        validation_days=config.validation_days, test_days=config.test_days, requests=counts, ads=len(ads.table), slots=slots,
        unexposed=config.unexposed, behaviours=sizes["L"], targets=config.targets, field_sizes=vocabulary.field_sizes,
        positives={"exposed": int(impressions["click"].sum()), "unexposed": unexposed_positives}, data_hash=identity, seed=seed, config=asdict(config),
    )  # fmt: skip
    say("writing")
    folder.finish({"vocab.json": vocabulary.to_json(), "samples.json": (json.dumps(asdict(info), indent=1, sort_keys=True) + "\n").encode()})
    return info


def _write_tables(folder: _Folder, ads: _Ads, vocabulary: Vocabulary, requests: pd.DataFrame, day: np.ndarray, split: np.ndarray) -> None:
    """The ad table and the plain columns of requests."""
    folder["ad_id"], folder["ad_fields"], folder["ad_city"] = ads.ids, encode_ads(vocabulary, ads.table), ads.table["city_id"].to_numpy()
    folder["ad_place"] = ads.table[["latitude", "longitude"]].to_numpy()
    folder["bid"], folder["reserve"] = ads.bid, ads.reserve
    folder["request_id"], folder["user_id"] = requests["request_id"].to_numpy(), requests["user_id"].to_numpy()
    folder["time"] = microseconds(requests["event_timestamp"]) // 1_000_000
    folder["day"], folder["split"], folder["city"] = day, split[day], requests["city_id"].to_numpy()
    folder["request_place"] = requests[["latitude", "longitude"]].to_numpy()
    folder.arrays["candidate"][...] = -1
