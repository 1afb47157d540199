"""Deterministic ties: scores that differ by less than float noise are equal, and equal scores go by a salted hash of the ad id."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from auction.checks import AuctionInputError, Floats

_DROPPED_BITS = 22
"""Of the 52 mantissa bits of a float64; 30 stay, a relative step of 2**-30 = 9.3e-10."""

RELATIVE_STEP = 2.0**-30
"""Two scores further apart than this (relative) are never a tie."""


def quantise(scores: Floats) -> Floats:
    """Scores rounded to 30 mantissa bits: a non-decreasing function of the score, so a higher bid never loses by it.

    Batch size and summation order move a score by about 1e-16 relative; both results round to the same value but for the rare pair
    that falls on two sides of a rounding edge. Infinities stay.
    """
    bits = (np.asarray(scores, dtype=np.float64) + 0.0).view(np.int64)  # + 0.0 turns -0.0 into 0.0
    return ((bits + (1 << (_DROPPED_BITS - 1))) & ~((1 << _DROPPED_BITS) - 1)).view(np.float64)


def tie_keys(ad_ids: Any, salt: str = "") -> npt.NDArray[np.uint64]:
    """A salted 64-bit hash of every ad id, [N]; on a tie the lower key wins.

    The hash (the finaliser of splitmix64, Steele et al. 2014, over id xor salt) is a bijection, so distinct ids never share a key. A
    salt per request (say its id) spreads wins of eternally equal ads; the same salt gives the same winner everywhere.
    """
    ids = np.asarray(ad_ids)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise AuctionInputError(f"ad_ids must be a vector of integers, got {ids.dtype} of shape {ids.shape}")
    seed = np.uint64(int.from_bytes(hashlib.sha256(salt.encode("utf-8")).digest()[:8], "little"))
    key = ids.astype(np.uint64) ^ seed
    with np.errstate(over="ignore"):
        key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return key ^ (key >> np.uint64(31))
