"""The laws of a priced page, checked on every answer before it leaves, and what replaces a page that breaks one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from auction.invariants import PAGE_LAWS as AUCTION_PAGE_LAWS
from auction.invariants import broken_law, is_implicit, is_truthful
from auction.receipt import charge

PAGE_LAWS = AUCTION_PAGE_LAWS | {"propensity", "creative", "layout"}
"""Laws about who is shown: breaking one discards the page. The others discard the prices only."""


@dataclass(frozen=True)
class PricedPage:
    """A page in slot order; arrays over the K' ads shown. `rows` index the city's ads."""

    rows: np.ndarray
    pctr: np.ndarray
    """Click probability in its slot on this page."""
    price: np.ndarray
    """Charged for a click, currency."""
    critical_price: np.ndarray
    """Truthful price beside the charged one; NaN where the policy has none."""
    propensity: np.ndarray
    """Probability that the policy put this ad in this slot, given the slots above; 1 for a deterministic policy."""
    price_mode: str
    basis: list[dict[str, Any]] = field(default_factory=list)
    """What each price rests on, JSON-able, for the receipts (auction.receipt)."""
    creative_id: np.ndarray | None = None
    """What is shown of each ad; None: the creative of the catalogue."""
    above: np.ndarray | None = None
    """Organic items above each ad; None: ads and organic items alternate, an ad first."""


def broken_invariant(page: PricedPage, bids: np.ndarray, reserves: np.ndarray, eligible: np.ndarray, slots: int, offered: np.ndarray | None = None) -> str | None:
    """Name of the first broken law, or None: auction.broken_law, propensities in (0, 1], critical and implicit prices truthful.

    bids (paced), reserves, eligible, offered (before pacing): [A], of the city, as they entered the auction.
    """
    broken = broken_law(page.rows, page.pctr, page.price, bids, reserves, eligible, slots, offered)
    if broken is not None:
        return broken
    if any(len(values) != len(page.rows) for values in (page.critical_price, page.propensity)):
        return "length"
    if not (np.isfinite(page.propensity) & (page.propensity > 0) & (page.propensity <= 1)).all():
        return "propensity"
    if page.price_mode == "critical":
        for slot, (row, price, basis) in enumerate(zip(page.rows, page.price, page.basis, strict=True), start=1):
            if not is_truthful(float(price), basis["theta"], basis["slot_ctr"], slot, float(reserves[row]), float(bids[row]), basis["currency_step"]):
                return "price_not_truthful"
    if page.price_mode == "implicit":
        for row, price, basis in zip(page.rows, page.price, page.basis, strict=True):
            if not is_implicit(float(price), basis["probe_ctr"], basis["rank_ctr"], float(reserves[row]), float(bids[row]), basis["currency_step"]):
                return "price_not_truthful"
    return None


def broken_layout(page: PricedPage, ad_id: np.ndarray, creatives: dict[int, int], organic: int) -> str | None:
    """"creative" or "layout" where a page that chose them breaks their law, or None: each creative belongs to its ad, and no ad stands above the one before it.

    Args: ad_id [A] of the city, creatives: owner of every creative, organic: items on the page.
    """
    if page.creative_id is not None and (
        page.creative_id.shape != page.rows.shape or any(creatives.get(int(one)) != int(ad_id[row]) for one, row in zip(page.creative_id, page.rows, strict=True))
    ):
        return "creative"
    if page.above is not None and (
        page.above.shape != page.rows.shape or (len(page.above) and (page.above.min() < 0 or page.above.max() > organic or (np.diff(page.above) < 0).any()))
    ):
        return "layout"
    return None


def gsp_of_page(page: PricedPage, bids: np.ndarray, reserves: np.ndarray, currency_step: float) -> PricedPage:
    """The same page at GSP prices: next slot's pctr x bid over the own pctr, within [reserve, bid]; below the last slot nobody competes."""
    next_score = np.append((page.pctr * bids[page.rows])[1:], 0.0)[: len(page.rows)]
    found = gsp_page(page.rows, page.pctr, next_score, np.full(len(page.rows), np.nan), page.propensity, bids, reserves, currency_step)
    return replace(found, creative_id=page.creative_id, above=page.above)


def gsp_page(
    rows: np.ndarray, pctr: np.ndarray, next_score: np.ndarray, critical_price: np.ndarray, propensity: np.ndarray, bids: np.ndarray, reserves: np.ndarray,
    currency_step: float,
) -> PricedPage:  # fmt: skip
    """A page at generalised second prices, with what its receipts need; bids and reserves [A] of the city."""
    price = [
        charge("gsp", slot, float(bids[row]), float(reserves[row]), None, None, float(ctr), float(after), None, currency_step).price
        for slot, (row, ctr, after) in enumerate(zip(rows, pctr, next_score, strict=True), start=1)
    ]
    basis = [{"rank_ctr": float(ctr), "next_score": float(after), "currency_step": currency_step} for ctr, after in zip(pctr, next_score, strict=True)]
    return PricedPage(rows, pctr, np.array(price, np.float64), critical_price, propensity, "gsp", basis)
