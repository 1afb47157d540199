"""The laws that every priced page must obey, checked on live answers; a violation must be served by a fallback and counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

PAGE_LAWS = frozenset({"length", "unknown_ad", "repeated_ad", "ineligible_ad", "pctr"})
"""Laws about who is shown: breaking one discards the page. The others discard its prices only."""

_SAME = 1e-9
"""Relative difference between two prices that counts as rounding of float64, and between two critical bids that counts as a tie."""


def broken_law(page: Any, pctr: Any, price: Any, bids: Any, reserve: Any, eligible: Any, n_slots: int, offered: Any = None) -> str | None:
    """Name of the first law that a priced page breaks, or None: each ad once, eligible, 0 <= reserve <= price <= paced bid <= bid, finite.

    Args: page [K'] rows; pctr, price [K'] of the ads on it; bids (paced), reserve, eligible [N] as they entered the auction; n_slots asked
    for; offered [N], bids before pacing, or None where nothing was paced. Money in currency per click.
    """
    rows, ctr, charged = np.asarray(page), np.asarray(pctr, dtype=np.float64), np.asarray(price, dtype=np.float64)
    if rows.ndim != 1 or len(rows) > n_slots or ctr.shape != rows.shape or charged.shape != rows.shape:
        return "length"
    if len(rows) and (not np.issubdtype(rows.dtype, np.integer) or rows.min() < 0 or rows.max() >= len(bids)):
        return "unknown_ad"
    if len(np.unique(rows)) != len(rows):
        return "repeated_ad"
    rows = rows.astype(np.int64)
    if not np.asarray(eligible)[rows].all():
        return "ineligible_ad"
    if not (np.isfinite(ctr) & (ctr >= 0) & (ctr <= 1)).all():
        return "pctr"
    paced = np.asarray(bids, dtype=np.float64)[rows]
    if not (np.isfinite(charged) & (charged >= 0)).all():
        return "price_not_finite"
    if not (charged <= paced).all():
        return "price_above_bid"
    if offered is not None and not (paced <= np.asarray(offered, dtype=np.float64)[rows]).all():
        return "paced_bid_above_bid"
    if not (np.asarray(reserve, dtype=np.float64)[rows] <= charged).all():
        return "price_below_reserve"
    return None


def is_truthful(price: float, theta: Sequence[float | None], ctr: Sequence[float], slot: int, reserve: float, paced_bid: float, currency_step: float = 0.0) -> bool:
    """Whether a charge is the truthful price of its critical bids, up to the currency step and the rounding of float64.

    Myerson's identity in a loop of its own, from the last slot upwards, so that a fault in the vectorised rule (auction.critical) shows.
    theta [K]: critical bids, None where a slot is never reached; ctr [K]: the ad's CTR in each slot; slot: its own, counted from 1.
    """
    level = [math.inf if value is None else max(value, reserve) for value in theta]
    paid = clicks = 0.0
    least = math.inf
    for k in range(len(level) - 1, slot - 2, -1):
        above = math.inf if k == 0 else level[k - 1]
        if k != slot - 1 and not level[k] < above * (1.0 - _SAME):
            continue  # no bid wins this slot: the next better one has the same critical bid
        least = min(least, level[k])
        if ctr[k] > clicks:
            paid += level[k] * (ctr[k] - clicks)
            clicks = ctr[k]
    exact = min(paid / clicks if clicks > 0 else least, paced_bid)
    return bool(exact - currency_step - _SAME * exact <= price <= exact + _SAME * exact)


def is_implicit(price: float, probe_ctr: Sequence[float], ctr: float, reserve: float, paced_bid: float, currency_step: float = 0.0) -> bool:
    """Whether a charge is the implicit price of its draws (auction.implicit), up to the currency step and the rounding of float64; in a loop of its own, as `is_truthful`."""
    if not probe_ctr or not ctr > 0:
        return False
    share = sum(probe_ctr) / len(probe_ctr) / ctr
    exact = max(reserve, min(paced_bid, share * reserve + (1.0 - share) * paced_bid))
    slack = 1e-12 * max(1.0, paced_bid) + _SAME * exact
    return bool(max(reserve, exact - currency_step) - slack <= price <= exact + slack)
