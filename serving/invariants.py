"""The laws of a priced page, checked on every answer before it leaves, and what replaces a page that breaks one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from auction.receipt import charge


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


def broken_invariant(page: PricedPage, bids: np.ndarray, reserves: np.ndarray, eligible: np.ndarray, slots: int) -> str | None:
    """Name of the first broken law, or None. bids, reserves, eligible: [A], of the city, as they entered the auction."""
    rows = page.rows
    if len(rows) > slots or any(len(values) != len(rows) for values in (page.pctr, page.price, page.critical_price, page.propensity)):
        return "length"
    if len(rows) and (rows.min() < 0 or rows.max() >= len(bids)):
        return "unknown_ad"
    if len(np.unique(rows)) != len(rows):
        return "repeated_ad"
    if not eligible[rows].all():
        return "ineligible_ad"
    if not np.isfinite(page.pctr).all() or (page.pctr < 0).any() or (page.pctr > 1).any():
        return "pctr"
    if not np.isfinite(page.price).all() or (page.price < 0).any():
        return "price_not_finite"
    if (page.price > bids[rows]).any():
        return "price_above_bid"
    if (page.price < reserves[rows]).any():
        return "price_below_reserve"
    if not np.isfinite(page.propensity).all() or (page.propensity <= 0).any() or (page.propensity > 1).any():
        return "propensity"
    return None


PAGE_LAWS = frozenset({"length", "unknown_ad", "repeated_ad", "ineligible_ad", "pctr", "propensity"})
"""Laws about who is shown: breaking one discards the page. The others discard the prices only."""


def gsp_of_page(page: PricedPage, bids: np.ndarray, reserves: np.ndarray, currency_step: float) -> PricedPage:
    """The same page at GSP prices: next slot's pctr x bid over the own pctr, within [reserve, bid]; below the last slot nobody competes."""
    next_score = np.append((page.pctr * bids[page.rows])[1:], 0.0)[: len(page.rows)]
    return gsp_page(page.rows, page.pctr, next_score, np.full(len(page.rows), np.nan), page.propensity, bids, reserves, currency_step)


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
