"""Random numbers by key instead of by order: the same (seed, purpose, keys) always gives the same draw.

Two policies that answer the same request then meet the same user with the same luck (common random numbers), and one
policy's draws never shift the other's.
"""

from __future__ import annotations

import numpy as np

EXPLORE, EXPLORE_WHICH, CLICK, CONTINUE, CLICK_DELAY, PURCHASE, PURCHASE_DELAY, ORDER_VALUE = range(1, 9)
CREATIVE_EXPLORE, CREATIVE_WHICH, CREATIVE_CLICK, LAYOUT_EXPLORE, LAYOUT, ORGANIC_CLICK, ORGANIC_CONTINUE, ORGANIC_DELAY = range(9, 17)
"""Purposes: each is an independent stream."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea, Flood 2014)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def keyed_uniform(seed: int, purpose: int, *keys: np.ndarray) -> np.ndarray:
    """Uniform draws in [0, 1), float64, one per broadcast combination of the integer `keys`."""
    state = _mix(np.array([seed * 1000 + purpose], np.int64).astype(np.uint64) + _GOLDEN)
    for key in keys:
        state = _mix((state ^ np.asarray(key, np.int64).astype(np.uint64)) + _GOLDEN)
    return (state >> np.uint64(11)) * 2.0**-53
