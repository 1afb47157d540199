"""Truthful prices of an allocation that can be run but not inverted: no thresholds, only the ad's CTR at a few bids below its own.

Myerson's price of a click at bid b is b - (integral of x from the reserve r to b) / x(b), x being the ad's CTR as a function of its bid. At bids drawn uniformly
from [r, b] the mean of x is an unbiased estimate of that integral over b - r, so that the expected price is Myerson's, and truthful, wherever x does not fall with the own bid:
implicit payment computation (Archer, Papadimitriou, Talwar & Tardos 2003; Babaioff, Kleinberg & Slivkins 2010).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from auction.checks import AuctionInputError, Floats


def draws(request_id: int, ad_id: int, count: int) -> Floats:
    """[count] numbers of (0, 1), one from each of `count` equal parts, the same for the same request and ad whoever asks."""
    if count < 1:
        raise AuctionInputError(f"an implicit price needs at least one draw, got {count}")
    within = np.random.default_rng([request_id, ad_id]).random(count)
    return (np.arange(count) + within) / count


def probe_bids(bid: Any, reserve: Any, drawn: Any) -> Floats:
    """Bids [..., S] at which the page is generated again: between the reserve and the own bid, both [...]; drawn [..., S]."""
    floor = np.asarray(reserve, np.float64)[..., None]
    return floor + np.asarray(drawn, np.float64) * (np.asarray(bid, np.float64)[..., None] - floor)


def implicit_price(bid: Any, reserve: Any, ctr: Any, probe_ctr: Any) -> Floats:
    """Price per click [...], reserve <= price <= bid, of ads that bid `bid` and are clicked with chance `ctr` > 0.

    probe_ctr [..., S]: the chance at each of `probe_bids`, 0 where the ad is not shown. Where it is above `ctr`, x falls with the bid: the price stops at the reserve, and is not exactly truthful.
    Raises AuctionInputError for numbers that are none, and for a ctr of 0.
    """
    bid, reserve, ctr, probe_ctr = (np.asarray(values, np.float64) for values in (bid, reserve, ctr, probe_ctr))
    if not all(np.isfinite(values).all() for values in (bid, reserve, ctr, probe_ctr)) or (ctr <= 0).any() or (probe_ctr < 0).any() or (bid < reserve).any() or (reserve < 0).any():
        raise AuctionInputError("an implicit price needs 0 <= reserve <= bid, a CTR above 0 and CTRs of at least 0 at the drawn bids, all finite")
    price = bid - (bid - reserve) * probe_ctr.mean(-1) / ctr
    charged: Floats = np.minimum(np.maximum(price, reserve), bid)
    return charged
