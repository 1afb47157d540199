"""Greedy allocation: EGA-V1 Eq. 17 at serving time, slot by slot argmax of bid_weight * pctr * bid + affinity."""

from __future__ import annotations

from typing import Any

from auction.checks import Ints
from auction.shortlist import run_greedy, shortlist_one, to_rows


def greedy_allocation(pctr: Any, bids: Any, affinity: Any, bid_weight: Any, n_slots: int, eligible: Any = None, tie_key: Any = None) -> Ints:
    """The page of one request: every slot goes to the ad with the highest score that is not placed yet.

    Args: pctr [N] in [0, 1]; bids [N] >= 0, currency per click; affinity [N, K], free of bids, or a scalar; bid_weight > 0, e^w (over the
    median bid, when bids are normalised), or slopes [N, K]; n_slots, K or fewer; eligible [N] bool (reserves enter here: bid >= reserve);
    tie_key [N] integers, lower wins a tie (`auction.tie_keys`); without it ties go by row and the result depends on the candidate order.
    Returns: page [K'], rows in slot order, K' = min(n_slots, eligible ads).
    Raises AuctionInputError on NaN, infinity or values out of range. Raising the own bid never worsens the own slot.
    """
    short = shortlist_one(pctr, bids, affinity, bid_weight, n_slots, eligible, tie_key)
    page: Ints = to_rows(short, run_greedy(short))[0, 0]
    return page[page >= 0]
