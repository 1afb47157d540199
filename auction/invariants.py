"""The laws that every priced page must obey, checked on live answers; a violation must be served by a fallback and counted."""

from __future__ import annotations

from typing import Any

import numpy as np


class AuctionInvariantError(AssertionError):
    """A priced page breaks a law of the auction; the message says which, where and by what numbers."""


def check_prices(page: Any, price: Any, paced_bid: Any, bid: Any, reserve: Any, n_ads: int, n_slots: int) -> None:
    """Raise AuctionInvariantError unless the page is valid and 0 <= reserve <= price <= paced bid <= bid, all finite.

    Args: page [K'] rows; price, paced_bid, bid, reserve [K'] of the ads on it, currency per click; n_ads candidates; n_slots asked for.
    An ad that bids 0 pays 0 by this rule.
    """
    rows = np.asarray(page)
    if rows.ndim != 1 or len(rows) > n_slots or (rows.size and (not np.issubdtype(rows.dtype, np.integer) or rows.min() < 0 or rows.max() >= n_ads)):
        raise AuctionInvariantError(f"page must hold at most {n_slots} rows in [0, {n_ads}), got {rows.tolist()}")
    if len(set(rows.tolist())) != len(rows):
        raise AuctionInvariantError(f"page shows an ad twice: {rows.tolist()}")
    chain = {"reserve": reserve, "price": price, "paced bid": paced_bid, "bid": bid}
    before_name, before = "zero", np.zeros(len(rows))
    for name, value in chain.items():
        now = np.asarray(value, dtype=np.float64)
        if now.shape != rows.shape or not np.isfinite(now).all():
            raise AuctionInvariantError(f"{name} must be {len(rows)} finite numbers, got {now.tolist()}")
        wrong = ~(before <= now)
        if wrong.any():
            slot = int(np.argmax(wrong))
            raise AuctionInvariantError(f"slot {slot}, row {int(rows[slot])}: {before_name} {float(before[slot])!r} is above {name} {float(now[slot])!r}")
        before_name, before = name, now
