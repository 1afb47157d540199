"""Myerson's optimal auction of one item (Myerson 1981), with reserve and, where the distribution is irregular, ironing.

Revenue curve over the probability of sale: R(q) = q * v(q) with v(q) = F^-1(1 - q). The virtual value is its slope, phi(v) = v - (1 - F(v)) / f(v).
Ironing replaces R by its concave hull; on an ironed interval the virtual value is the hull's slope.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from auction.checks import AuctionInputError, Floats, as_floats

_GRID = 4096
"""Steps in probability of sale; an ironed interval narrower than 1 / _GRID is not seen."""


class Distribution(Protocol):
    """Values of one bidder: any object with these three methods, a frozen scipy.stats distribution among them."""

    def cdf(self, x: Any) -> Any: ...

    def pdf(self, x: Any) -> Any: ...

    def ppf(self, q: Any) -> Any: ...


@dataclass(frozen=True)
class Uniform:
    """Values uniform on [low, high]."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and 0.0 <= self.low < self.high):
            raise AuctionInputError(f"Uniform needs finite 0 <= low < high, got {self.low!r}, {self.high!r}")

    def cdf(self, x: Any) -> Any:
        return np.clip((np.asarray(x) - self.low) / (self.high - self.low), 0.0, 1.0)

    def pdf(self, x: Any) -> Any:
        return np.where((np.asarray(x) >= self.low) & (np.asarray(x) <= self.high), 1.0 / (self.high - self.low), 0.0)

    def ppf(self, q: Any) -> Any:
        return self.low + np.asarray(q) * (self.high - self.low)


@dataclass(frozen=True)
class Exponential:
    """Values exponential with the given mean."""

    mean: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and self.mean > 0.0):
            raise AuctionInputError(f"Exponential needs a finite mean > 0, got {self.mean!r}")

    def cdf(self, x: Any) -> Any:
        return -np.expm1(-np.maximum(np.asarray(x), 0.0) / self.mean)

    def pdf(self, x: Any) -> Any:
        return np.where(np.asarray(x) >= 0.0, np.exp(-np.maximum(np.asarray(x), 0.0) / self.mean) / self.mean, 0.0)

    def ppf(self, q: Any) -> Any:
        with np.errstate(divide="ignore"):
            return -self.mean * np.log1p(-np.asarray(q, dtype=np.float64))


def _each(function: Callable[[Any], Any], points: Floats) -> Floats:
    """`function` at every point, whether or not it takes arrays."""
    try:
        values = np.asarray(function(points), dtype=np.float64)
        if values.shape == points.shape:
            return values
    except (TypeError, ValueError):
        pass  # a scalar function
    return np.array([float(function(float(point))) for point in points])


@dataclass(frozen=True)
class IronedInterval:
    """Values in [low, high] share one virtual value."""

    low: float
    high: float
    virtual_value: float


class VirtualValue:
    """The ironed virtual value of one distribution, non-decreasing in the value.

    `reserve`: the least value with virtual value >= 0. `ironed`: the flat intervals, empty for a regular distribution.
    """

    def __init__(self, distribution: Distribution) -> None:
        self._distribution = distribution
        self.low, self.high = float(distribution.ppf(0.0)), float(distribution.ppf(1.0))
        if not (math.isfinite(self.low) and self.low >= 0.0 and self.high > self.low):
            raise AuctionInputError(f"values must lie in [low, high] with 0 <= low < high, got [{self.low!r}, {self.high!r}]")
        self.ironed = self._iron()
        self.reserve = self.least_value(0.0, strict=False)

    def raw(self, value: float) -> float:
        """phi(v) = v - (1 - F(v)) / f(v), before ironing; -inf where the density is 0 below the top of the support."""
        sold = 1.0 - float(self._distribution.cdf(value))
        if sold <= 0.0:
            return value
        density = float(self._distribution.pdf(value))
        return value - sold / density if density > 0.0 else -math.inf

    def __call__(self, value: float) -> float:
        if value < self.low:
            return -math.inf
        for interval in self.ironed:
            if interval.low <= value <= interval.high:
                return interval.virtual_value
        return self.raw(value)

    def least_value(self, target: float, strict: bool) -> float:
        """The infimum of the values whose virtual value is >= target (strict: > target), by bisection to the last bit."""

        def reaches(value: float) -> bool:
            return self(value) > target if strict else self(value) >= target

        if reaches(self.low):
            return self.low
        below = self.low
        above = self.high if math.isfinite(self.high) else max(1.0, 2.0 * self.low)
        while not reaches(above):
            if math.isfinite(self.high) or above > 1e300:
                return max(self.high, target)  # above the support the virtual value is the value
            above *= 2.0
        while True:
            middle = 0.5 * (below + above)
            if not below < middle < above:
                return above
            below, above = (below, middle) if reaches(middle) else (middle, above)

    def _value(self, sold: float) -> float:
        return float(self._distribution.ppf(1.0 - sold))

    def _revenue(self, sold: float) -> float:
        return sold * self._value(sold) if sold > 0.0 else 0.0

    def _iron(self) -> tuple[IronedInterval, ...]:
        sold = np.linspace(1.0, 0.0, _GRID + 1)  # falling, so that values rise
        values = _each(self._distribution.ppf, 1.0 - sold)
        inner = sold > 0.0
        with np.errstate(divide="ignore", invalid="ignore"):
            virtual = values[inner] - sold[inner] / _each(self._distribution.pdf, values[inner])
        scale = max(1.0, float(np.abs(values[inner]).max()))
        if not (np.diff(virtual[1:]) < -1e-9 * scale).any():
            return ()
        revenue = np.where(inner, sold * np.where(inner, values, 0.0), 0.0)
        hull: list[int] = []
        for point in range(_GRID, -1, -1):  # upper hull over rising probability of sale
            while len(hull) >= 2 and not _turns_right(sold, revenue, hull[-2], hull[-1], point):
                hull.pop()
            hull.append(point)
        gaps = [(a, b) for a, b in zip(hull, hull[1:], strict=False) if a - b > 1]
        return tuple(self._interval(float(sold[a]), float(sold[b])) for a, b in reversed(gaps))

    def _interval(self, sold_high_value: float, sold_low_value: float) -> IronedInterval:
        """Polish one gap of the grid's hull: the common tangent of its two ends."""
        width = 2.0 / _GRID
        right_of_top = (max(0.0, sold_high_value - width), min(1.0, sold_high_value + width))
        left_of_low = (max(0.0, sold_low_value - width), min(1.0, sold_low_value + width))
        slope = (self._revenue(sold_low_value) - self._revenue(sold_high_value)) / (sold_low_value - sold_high_value)
        for _ in range(60):  # the tangent at both maxima of R - slope * q: a Newton step, converges quadratically
            top, low = self._above_line(slope, *right_of_top), self._above_line(slope, *left_of_low)
            tangent = (self._revenue(low) - self._revenue(top)) / (low - top)
            if abs(tangent - slope) <= 1e-15 * max(1.0, abs(slope)):
                break
            slope = tangent
        return IronedInterval(self._end(slope, *left_of_low), self._end(slope, *right_of_top), slope)

    def _above_line(self, slope: float, least_sold: float, most_sold: float) -> float:
        """The probability of sale in the bracket where R(q) stands highest over the line slope * q."""
        return _maximise(lambda q: self._revenue(q) - slope * q, least_sold, most_sold)

    def _end(self, slope: float, least_sold: float, most_sold: float) -> float:
        """The value in the bracket where the raw virtual value passes the hull's slope."""
        below, above = self._value(most_sold), self._value(least_sold)
        if self.raw(below) >= slope:
            return below
        if not math.isfinite(above) or self.raw(above) < slope:
            return above
        while True:
            middle = 0.5 * (below + above)
            if not below < middle < above:
                return above
            below, above = (below, middle) if self.raw(middle) >= slope else (middle, above)


def _turns_right(x: Floats, y: Floats, a: int, b: int, c: int) -> bool:
    return bool((x[b] - x[a]) * (y[c] - y[a]) - (y[b] - y[a]) * (x[c] - x[a]) < 0.0)


def _maximise(function: Callable[[float], float], low: float, high: float) -> float:
    """Golden-section search for the maximum of a unimodal function on [low, high], ends included."""
    ratio = (math.sqrt(5.0) - 1.0) / 2.0
    ends = (low, high)
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(80):
        if at_left >= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
    return max((0.5 * (low + high), *ends), key=function)


@lru_cache(maxsize=64)
def _virtual_value_of(distribution: Any) -> VirtualValue:
    return VirtualValue(distribution)


def virtual_value(distribution: Distribution) -> VirtualValue:
    """VirtualValue of `distribution`, kept for the next call when the object can be hashed."""
    return _virtual_value_of(distribution) if isinstance(distribution, Hashable) else VirtualValue(distribution)


def myerson_optimal(values: Any, distribution: Distribution | Sequence[Distribution]) -> tuple[int, float]:
    """Winner and price of the revenue-optimal truthful auction of one item.

    The bidder with the highest ironed virtual value wins if that is >= 0 (a tie goes to the lower index) and pays the least value with
    which it would still win.

    Args: values [n] >= 0, the bids (truthful); distribution of every bidder's value, or one per bidder.
    Returns: (winner, price); (-1, 0.0) when the item is not sold.
    """
    bids = as_floats("values", values, (None,), 0.0)
    each = [virtual_value(one) for one in distribution] if isinstance(distribution, Sequence) else [virtual_value(distribution)] * len(bids)
    if len(each) != len(bids):
        raise AuctionInputError(f"{len(bids)} values but {len(each)} distributions")
    virtual = [phi(float(value)) for phi, value in zip(each, bids, strict=True)]
    winner = max(range(len(bids)), key=lambda i: (virtual[i], -i), default=-1)
    if winner < 0 or virtual[winner] < 0.0:
        return -1, 0.0
    price = each[winner].reserve
    others = [i for i in range(len(bids)) if i != winner]
    if others:
        rival = max(others, key=lambda i: (virtual[i], -i))
        if virtual[rival] >= 0.0:
            price = max(price, _price_against(each, winner, rival, float(bids[rival]), virtual[rival]))
    return winner, min(price, float(bids[winner]))


def _price_against(each: list[VirtualValue], winner: int, rival: int, rival_bid: float, rival_virtual: float) -> float:
    """Least value of the winner that beats the rival's virtual value."""
    phi = each[winner]
    if each[rival] is phi:  # same distribution: no search needed
        for interval in phi.ironed:
            if interval.low <= rival_bid <= interval.high:
                return interval.low if winner < rival else interval.high
        return rival_bid
    return phi.least_value(rival_virtual, strict=rival < winner)


def myerson_payment(clicks: Callable[[float], float], bid: float, panels: int = 64) -> float:
    """Expected payment of the truthful rule for a smooth, non-decreasing allocation: bid * x(bid) - integral of x over [0, bid].

    Args: clicks, x(b), expected clicks at own bid b; bid >= 0, currency per click; panels of 16-point Gauss-Legendre quadrature.
    Returns: currency, not per click. For step functions see auction.critical.
    """
    own = float(as_floats("bid", [bid], (1,), 0.0)[0])
    nodes, weights = np.polynomial.legendre.leggauss(16)
    edges = np.linspace(0.0, own, panels + 1)
    middle, half = 0.5 * (edges[1:] + edges[:-1]), 0.5 * (edges[1:] - edges[:-1])
    points = (middle[:, None] + half[:, None] * nodes).ravel()
    area = float((_each(clicks, points).reshape(panels, 16) * weights * half[:, None]).sum())
    return own * float(clicks(own)) - area
