"""The policy that answers before any model is trained, and the control arm of experiments: pure NumPy.

Recall by distance and popularity, rank by smoothed CTR x distance decay x bid, GSP prices, epsilon exploration with
exact propensities. Shapes: B requests, A ads, M recalled ads, K slots.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from pydantic import ConfigDict, model_validator
from pydantic.dataclasses import dataclass

from auction.batch import gsp_prices

VERSION = "bootstrap-1"
"""Value of `requests.model_version` where this policy answered."""

_KM_PER_DEGREE = 111.195
_CELLS_AT_ONCE = 2**18
_MIN_LOG_PCTR = -60.0


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class BootstrapConfig:
    """Knobs of the bootstrap policy."""

    exploration: float = 0.1
    """epsilon: probability, in each slot, of a uniform draw from the recalled ads instead of the best one."""
    recall: int = 150
    """M, ads kept by distance and popularity before the bid counts."""
    distance_scale_km: float = 4.0
    """Distance over which the predicted click probability falls by e."""
    prior_impressions: float = 200.0
    """Weight of the prior in the smoothed CTR, in impressions."""
    prior_ctr: float = 0.08
    """Prior click probability of an ad next door."""

    @model_validator(mode="after")
    def _check(self) -> BootstrapConfig:
        if not 0 <= self.exploration < 1:
            raise ValueError(f"exploration must lie in [0, 1), got {self.exploration}")
        if self.recall < 1 or self.distance_scale_km <= 0 or self.prior_impressions <= 0 or not 0 < self.prior_ctr < 1:
            raise ValueError("recall, distance_scale_km and prior_impressions must be positive, prior_ctr in (0, 1)")
        return self


class RankedAds(NamedTuple):
    """One page. rows int [K'], row of each ad in the arrays the policy was built from, top slot first."""

    rows: np.ndarray
    pctr: np.ndarray
    price: np.ndarray
    propensity: np.ndarray
    next_score: np.ndarray
    """pctr * bid of the next ad, which the price is made of."""


class BootstrapPolicy:
    """Ranks the ads of one city. Built from the ads' places and the impressions and clicks that are known so far."""

    version = VERSION

    def __init__(
        self,
        ad_ids: np.ndarray,
        latitude: np.ndarray,
        longitude: np.ndarray,
        impressions: np.ndarray,
        clicks: np.ndarray,
        config: BootstrapConfig | None = None,
    ) -> None:
        self.config = config or BootstrapConfig()
        ad_ids = np.asarray(ad_ids, np.int64)
        if len(np.unique(ad_ids)) != len(ad_ids):
            raise ValueError("ad_ids must be unique")
        self._order = np.argsort(ad_ids, kind="stable")  # ties go by ad id
        latitude, longitude = np.asarray(latitude, np.float64), np.asarray(longitude, np.float64)
        self._centre = (float(latitude.mean()), float(longitude[0])) if len(ad_ids) else (0.0, 0.0)
        self._x_km, self._y_km = (plane[self._order] for plane in self._plane(latitude, longitude))
        shown, clicked = (np.asarray(count, np.float64)[self._order] for count in (impressions, clicks))
        prior = self.config.prior_impressions
        self._log_ctr = np.log((clicked + prior * self.config.prior_ctr) / (shown + prior))
        if not np.isfinite(self._log_ctr).all():
            raise ValueError("impressions and clicks must be finite and >= 0")

    def _plane(self, latitude: np.ndarray, longitude: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places in km east and north of the city's centre, float32 (a metre at 1,000 km)."""
        east = (longitude - self._centre[1] + 180.0) % 360.0 - 180.0
        x_km = _KM_PER_DEGREE * np.cos(np.radians(self._centre[0])) * east
        return x_km.astype(np.float32), (_KM_PER_DEGREE * (latitude - self._centre[0])).astype(np.float32)

    def log_pctr(self, latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
        """log pctr of every ad for requests at [B] places: log smoothed CTR - km / scale; float32 [B, A], ads in order of their ids."""
        x_km, y_km = self._plane(np.asarray(latitude, np.float64), np.asarray(longitude, np.float64))
        east, north = self._x_km - x_km[:, None], self._y_km - y_km[:, None]
        east *= east
        north *= north
        east += north
        km = np.sqrt(east, out=east)
        km *= np.float32(-1.0 / self.config.distance_scale_km)
        km += self._log_ctr.astype(np.float32)
        return np.maximum(km, np.float32(_MIN_LOG_PCTR), out=km)

    def rank(
        self,
        latitude: float,
        longitude: float,
        bids: np.ndarray,
        eligible: np.ndarray | None,
        slots: int,
        rng: np.random.Generator,
        reserve: np.ndarray | float = 0.0,
    ) -> RankedAds:
        """One page for one request.

        Args: bids [A] and reserve [A] or one number, currency per click; eligible [A] bool or None for all; slots, K;
        rng, for the exploration. Returns K' <= K ads; price <= bid; propensity of each ad given the slots above.
        """
        pages = self.rank_batch(np.array([latitude]), np.array([longitude]), bids, eligible, rng.random((1, slots, 2)), reserve)
        kept = pages.rows[0] >= 0
        return RankedAds(*(values[0][kept] for values in pages))

    def rank_batch(
        self,
        latitude: np.ndarray,
        longitude: np.ndarray,
        bids: np.ndarray,
        eligible: np.ndarray | None,
        uniforms: np.ndarray,
        reserve: np.ndarray | float = 0.0,
    ) -> RankedAds:
        """Pages for B requests of the city. uniforms [B, K, 2]: explore or not, and which. Fields [B, K]; rows -1 pads."""
        bids = np.asarray(bids, np.float64)[self._order]
        reserve = np.broadcast_to(np.asarray(reserve, np.float64), bids.shape)
        reserve = reserve[self._order]
        allowed = np.isfinite(bids) & (bids > 0) & (bids >= reserve)
        if eligible is not None:
            allowed &= np.asarray(eligible, bool)[self._order]
        kept = np.flatnonzero(allowed)
        batch, slots = uniforms.shape[:2]
        pages = RankedAds(np.full((batch, slots), -1, np.int64), *(np.zeros((batch, slots)) for _ in range(4)))
        if len(kept):
            step = max(1, _CELLS_AT_ONCE // len(bids))
            for start in range(0, batch, step):
                part = slice(start, start + step)
                found = self._rank_part(latitude[part], longitude[part], bids, kept, uniforms[part], reserve)
                for page, values in zip(pages, found, strict=True):
                    page[part, : values.shape[1]] = values
        return pages

    def _rank_part(
        self, latitude: np.ndarray, longitude: np.ndarray, bids: np.ndarray, kept: np.ndarray, uniforms: np.ndarray, reserve: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        log_pctr = self.log_pctr(latitude, longitude)
        recalled = self._recall(log_pctr, kept)  # [B, M], ascending rows
        pctr = np.exp(np.take_along_axis(log_pctr, recalled, axis=1).astype(np.float64))
        score = pctr * bids[recalled]
        place, propensity, left = choose_with_exploration(score, uniforms, self.config.exploration)
        rows = np.take_along_axis(recalled, place, axis=1)
        page_pctr = np.take_along_axis(pctr, place, axis=1)
        price = gsp_prices(page_pctr, bids[rows], left, reserve[rows])
        next_score = np.concatenate([(page_pctr * bids[rows])[:, 1:], left[:, None]], axis=1)
        return self._order[rows], page_pctr, price, propensity, next_score

    def _recall(self, log_pctr: np.ndarray, kept: np.ndarray) -> np.ndarray:
        if len(kept) <= self.config.recall:
            return np.broadcast_to(kept, (len(log_pctr), len(kept)))
        among = log_pctr if len(kept) == log_pctr.shape[1] else log_pctr[:, kept]
        best = np.argpartition(among, -self.config.recall, axis=1)[:, -self.config.recall :]
        return kept[np.sort(best, axis=1)]


def choose_with_exploration(score: np.ndarray, uniforms: np.ndarray, exploration: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fill K slots from M scored ads: the best one left, or with probability epsilon a uniform draw among those left.

    Args: score [B, M], higher is better, ties to the lower index; uniforms [B, K, 2] in [0, 1).
    Returns: index [B, K'], K' = min(K, M); propensity [B, K'] of that index given the slots above, which is
    (1 - epsilon) if it was the best one left, plus epsilon / number left; best_left [B], the best score not placed, 0 if none.
    """
    batch, ads = score.shape
    slots = min(uniforms.shape[1], ads)
    each = np.arange(batch)
    left = np.array(score, np.float64)
    index, propensity = np.empty((batch, slots), np.int64), np.empty((batch, slots))
    for slot in range(slots):
        best = left.argmax(axis=1)
        count = ads - slot
        chosen = best.copy()
        explore = np.flatnonzero(uniforms[:, slot, 0] < exploration)
        if len(explore):
            nth = np.minimum((uniforms[explore, slot, 1] * count).astype(np.int64), count - 1)
            still = np.cumsum(left[explore] > -np.inf, axis=1)
            chosen[explore] = (still <= nth[:, None]).sum(axis=1)
        index[:, slot] = chosen
        propensity[:, slot] = np.where(chosen == best, 1.0 - exploration, 0.0) + exploration / count
        left[each, chosen] = -np.inf
    best_left = left.max(axis=1)
    return index, propensity, np.where(np.isfinite(best_left), best_left, 0.0)

