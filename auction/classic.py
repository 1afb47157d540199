"""The classic rules: generalised second price, Vickrey-Clarke-Groves for positions, first price."""

from __future__ import annotations

from typing import Any

import numpy as np

from auction.checks import AuctionInputError, Floats, as_floats, as_mask, as_page, as_reserves, round_down


def _checked_page(pctr: Any, bids: Any, page: Any, reserve: Any) -> tuple[Floats, Floats, Any, Floats]:
    pctr_N = as_floats("pctr", pctr, (None,), 0.0, 1.0)
    bids_N = as_floats("bids", bids, (len(pctr_N),), 0.0)
    page_K = as_page("page", page, len(pctr_N))
    reserve_N = as_reserves(reserve, len(pctr_N))
    under = bids_N[page_K] < reserve_N[page_K]
    if under.any():
        row = int(page_K[np.argmax(under)])
        raise AuctionInputError(f"ad in row {row} is on the page with bid {bids_N[row]} below its reserve {reserve_N[row]}")
    return pctr_N, bids_N, page_K, reserve_N


def best_excluded_score(pctr: Any, bids: Any, page: Any, reserve: Any = 0.0, eligible: Any = None) -> float:
    """Highest rank score pctr * bid of an eligible ad that is not on the page; 0 if there is none."""
    pctr_N, bids_N, page_K, reserve_N = _checked_page(pctr, bids, page, reserve)
    scores = np.where(as_mask("eligible", eligible, pctr_N.shape) & (bids_N >= reserve_N), pctr_N * bids_N, 0.0)
    scores[page_K] = 0.0
    return float(scores.max(initial=0.0))


def gsp_prices(pctr: Any, bids: Any, page: Any, reserve: Any = 0.0, *, eligible: Any = None, currency_step: float = 0.0) -> Floats:
    """Generalised second price per click, [K']: rank score of the next ad over the own pCTR, at least the reserve, never above the bid.

    The next ad of slot k is the one in slot k + 1; of the last slot, the best eligible ad that is not displayed (Edelman, Ostrovsky,
    Schwarz 2007, with quality scores). On a page that is not sorted by pctr * bid the cap at the bid may bind. Not truthful.

    Args: pctr [N]; bids [N]; page [K'], rows in slot order; reserve scalar or [N]; eligible [N] bool; currency_step, rounded down to it.
    """
    pctr_N, bids_N, page_K, reserve_N = _checked_page(pctr, bids, page, reserve)
    if len(page_K) == 0:
        return np.zeros(0)
    own = pctr_N[page_K]
    following = np.append((pctr_N * bids_N)[page_K[1:]], best_excluded_score(pctr_N, bids_N, page_K, reserve_N, eligible))
    price = second_price(following, own, bids_N[page_K], reserve_N[page_K])
    return round_down(price, currency_step, reserve_N[page_K], bids_N[page_K])


def second_price(next_score: Floats, pctr: Floats, bid: Floats, reserve: Floats) -> Floats:
    """min(bid, max(reserve, next_score / pctr)), elementwise; an ad without clicks pays its reserve, or its bid if a score follows it."""
    clicked = pctr > 0.0
    with np.errstate(over="ignore"):
        price = np.where(clicked, next_score / np.where(clicked, pctr, 1.0), np.where(next_score > 0.0, bid, 0.0))
    return np.minimum(np.maximum(price, reserve), bid)


def vcg_position_prices(bids: Any, slot_ctr: Any) -> Floats:
    """VCG price per click of every position, [K], for separable clicks.

    p_k * alpha_k = sum over l >= k of b_{l+1} * (alpha_l - alpha_{l+1}), bids in falling order (sorted here), missing bids 0 (Edelman et al.
    2007; Varian 2007).

    Args: bids [N] per click; slot_ctr [K] >= 0, clicks of each position (any unit), not rising. Slots without a bidder cost 0.
    """
    sorted_bids = -np.sort(-as_floats("bids", bids, (None,), 0.0))
    alpha = _slot_clicks(slot_ctr)
    following = np.zeros(len(alpha))
    following[: max(0, min(len(alpha), len(sorted_bids) - 1))] = sorted_bids[1 : len(alpha) + 1]
    return np.minimum(position_prices(following, alpha), np.append(sorted_bids, np.zeros(len(alpha)))[: len(alpha)])


def _slot_clicks(slot_ctr: Any) -> Floats:
    alpha = as_floats("slot_ctr", slot_ctr, (None,), 0.0)
    if (np.diff(alpha) > 0.0).any():
        raise AuctionInputError(f"slot_ctr must not rise from slot to slot, got {alpha.tolist()}")
    return alpha


def position_prices(following: Floats, alpha: Floats) -> Floats:
    """p_k = sum over l >= k of following_l * (alpha_l - alpha_{l+1}) / alpha_k. following [..., K], alpha [K] not rising -> [..., K]."""
    owed = np.cumsum((following * (alpha - np.append(alpha[1:], 0.0)))[..., ::-1], axis=-1)[..., ::-1]
    return np.where(alpha > 0.0, owed / np.where(alpha > 0.0, alpha, 1.0), 0.0)


def vcg_prices(pctr: Any, bids: Any, page: Any, slot_ctr: Any, reserve: Any = 0.0, *, eligible: Any = None, currency_step: float = 0.0) -> Floats:
    """VCG price per click of every ad on a page, [K'], for clicks pctr * slot_ctr (quality-weighted positions).

    Truthful when the page is sorted by pctr * bid and clicks are separable; on any other page it is a heuristic (the greedy page does not
    maximise welfare), kept within [reserve, bid]. slot_ctr [>= K'], not rising.
    """
    pctr_N, bids_N, page_K, reserve_N = _checked_page(pctr, bids, page, reserve)
    if len(page_K) == 0:
        return np.zeros(0)
    alpha = _slot_clicks(slot_ctr)
    if len(alpha) < len(page_K):
        raise AuctionInputError(f"slot_ctr has {len(alpha)} slots, the page {len(page_K)}")
    # Slots below the page go to excluded ads; their offers end with the best one, as only K' slots are sold.
    alpha = alpha[: len(page_K)]
    following = np.append((pctr_N * bids_N)[page_K[1:]], best_excluded_score(pctr_N, bids_N, page_K, reserve_N, eligible))
    price = second_price(position_prices(following, alpha), pctr_N[page_K], bids_N[page_K], reserve_N[page_K])
    return round_down(price, currency_step, reserve_N[page_K], bids_N[page_K])


def first_price(bids: Any, page: Any, reserve: Any = 0.0, *, currency_step: float = 0.0) -> Floats:
    """Every displayed ad pays its bid, [K']. Shading pays always; the yardstick for revenue without incentives."""
    bids_N = as_floats("bids", bids, (None,), 0.0)
    _, _, page_K, reserve_N = _checked_page(np.ones(len(bids_N)), bids_N, page, reserve)
    return round_down(bids_N[page_K], currency_step, reserve_N[page_K], bids_N[page_K])
