"""The rules vectorised over B requests with the same number of candidates, for training, evaluation and benchmarks.

Pages are int [B, K] with -1 where no ad is left. Same results as the single-request functions (tests compare them). Inputs are checked the
same way. A request with fewer real candidates than N sets `eligible` False for the padding.

Shapes: B requests, N candidate ads, K slots. bid weights: a scalar, [B] (one per request, e.g. e^w over the city's median bid) or slopes [B, N, K].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from auction.checks import AuctionInputError, Bools, Floats, Ints, as_floats, as_mask, round_down
from auction.classic import position_prices, second_price
from auction.critical import reachable_slots, step_prices
from auction.shortlist import Shortlist, as_affinity, as_slopes, build_shortlist, critical_bids_of, positions_of, run_greedy, to_rows
from auction.ties import quantise


@dataclass(frozen=True)
class Counterfactuals:
    """The greedy pages of B requests with everything that their prices rest on."""

    pages: Ints
    """[B, K] displayed rows; -1 where no ad is left."""
    theta: Floats
    """[B, K, K] critical bids [request, own slot, slot]; +inf where padded."""
    without: Ints
    """[B, K, K] the page without the ad of each slot, [request, own slot, page]; -1 where padded."""
    moved: Ints
    """[B, K, K, K] the page with the ad of each slot put into another, [request, own slot, slot, page]; -1 where padded."""


def counterfactuals(pctr: Any, bids: Any, affinity: Any, slopes: Any, n_slots: int, eligible: Any = None, tie_key: Any = None) -> Counterfactuals:
    """Pages, critical bids and counterfactual pages of B requests in one pass; arguments as greedy_pages."""
    short = build_shortlist(pctr, bids, affinity, slopes, n_slots, eligible, tie_key)
    own = run_greedy(short)[:, 0]
    theta, without = _critical(short, own)
    return Counterfactuals(to_rows(short, own), theta, without, _moved(short, own))


def greedy_pages(pctr: Any, bids: Any, affinity: Any, slopes: Any, n_slots: int, eligible: Any = None, tie_key: Any = None) -> Ints:
    """Greedy page of every request, [B, K]. Args: pctr, bids [B, N]; affinity [B, N, K] or a scalar; eligible [B, N]; tie_key [N] or [B, N]."""
    short = build_shortlist(pctr, bids, affinity, slopes, n_slots, eligible, tie_key)
    return to_rows(short, run_greedy(short))[:, 0]


def gsp_prices(pctr_at_page: Any, bids_at_page: Any, runner_up_score: Any, reserve: Any = 0.0, currency_step: float = 0.0) -> Floats:
    """Generalised second prices [B, K] of pages given by the pCTR and bids of their ads.

    Args: pctr_at_page, bids_at_page [B, K] in slot order, 0 where the page is padded; runner_up_score [B], best pctr * bid that is not on
    the page (0 if none; `runner_up_scores`); reserve scalar or [B, K].
    Returns: min(bid, max(reserve, next score / own pctr)); 0 where padded. A displayed ad with bid < reserve pays its bid, so keep those off the page.
    """
    pctr = as_floats("pctr_at_page", pctr_at_page, (None, None), 0.0, 1.0)
    bids = as_floats("bids_at_page", bids_at_page, pctr.shape, 0.0)
    excluded = as_floats("runner_up_score", runner_up_score, pctr.shape[:1], 0.0)
    floor = as_floats("reserve", np.broadcast_to(np.asarray(reserve, dtype=np.float64), pctr.shape), pctr.shape, 0.0)
    scores = pctr * bids
    # The score that follows the last real ad of a padded page is 0: were an ad excluded, it would stand in the empty slot.
    following = np.concatenate([scores[:, 1:], excluded[:, None]], axis=1)
    return round_down(second_price(following, pctr, bids, floor), currency_step, floor, bids)


def vcg_prices(following: Any, slot_clicks: Any, pctr_at_page: Any, bids_at_page: Any, reserve: Any = 0.0) -> Floats:
    """VCG prices per click for clicks pCTR * slot_clicks (auction.classic.vcg_prices), [B, K]; 0 where padded.

    Args: following [B, K], pCTR * bid of the ad below each slot (below the last: of the best ad not shown; 0: none); slot_clicks [K], not
    rising; pctr_at_page, bids_at_page [B, K], 0 where padded; reserve scalar or [B, K].
    """
    pctr = as_floats("pctr_at_page", pctr_at_page, (None, None), 0.0, 1.0)
    bids = as_floats("bids_at_page", bids_at_page, pctr.shape, 0.0)
    floor = as_floats("reserve", np.broadcast_to(np.asarray(reserve, dtype=np.float64), pctr.shape), pctr.shape, 0.0)
    scores = as_floats("following", following, pctr.shape, 0.0)
    alpha = as_floats("slot_clicks", slot_clicks, pctr.shape[1:], 0.0)
    return second_price(position_prices(scores, alpha), pctr, bids, floor)


def runner_up_scores(pctr: Any, bids: Any, pages: Any, eligible: Any = None) -> Floats:
    """Best rank score pctr * bid of an eligible ad that is not displayed, [B]; 0 if there is none. pages [B, K]."""
    pctr_BN = as_floats("pctr", pctr, (None, None), 0.0, 1.0)
    bids_BN = as_floats("bids", bids, pctr_BN.shape, 0.0)
    pages_BK = _as_pages(pages, pctr_BN.shape)
    scores = pctr_BN * bids_BN
    if eligible is not None:
        scores = np.where(np.asarray(eligible, dtype=np.bool_), scores, 0.0)
    request, slot = np.nonzero(pages_BK >= 0)
    scores[request, pages_BK[request, slot]] = 0.0
    return np.asarray(scores.max(axis=1, initial=0.0), dtype=np.float64)


def at_page(values: Any, pages: Any, fill: float = 0.0) -> Floats:
    """[B, N] (or [N], shared) values of the displayed ads, [B, K]; `fill` where the page is padded."""
    pages_BK = np.asarray(pages, dtype=np.int64)
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 1:
        array = np.broadcast_to(array, (len(pages_BK), len(array)))
    return np.where(pages_BK >= 0, np.take_along_axis(array, np.maximum(pages_BK, 0), axis=1), fill)


def critical_bids(pctr: Any, bids: Any, affinity: Any, slopes: Any, pages: Any, eligible: Any = None, tie_key: Any = None) -> Floats:
    """Critical bids theta [B, K, K] of every displayed ad ([request, own slot, slot]); pages as given by greedy_pages.

    theta[b, i, k] is the least bid with which the ad in slot i of request b gets slot k or a better one; see auction.critical. May be
    -inf (won at any bid); +inf where the page is padded and for a pCTR of 0 without enough affinity.
    """
    short, own = _market(pctr, bids, affinity, slopes, pages, eligible, tie_key)
    return _critical(short, own)[0]


def critical_bids_of_all(pctr: Any, bids: Any, affinity: Any, slopes: Any, pages: Any, eligible: Any = None, tie_key: Any = None, barred: Any = None) -> Floats:
    """Critical bids theta [B, N, K] of every ad, displayed or not; +inf where the ad may not be shown at any bid.

    A loser does not move the page by leaving, so its thresholds follow from the scores of the ads displayed. `barred` [B, N] says which ads
    no bid can bring in (default: those not eligible); an ad that only its reserve keeps out is ineligible but not barred.
    """
    short, own = _market(pctr, bids, affinity, slopes, pages, eligible, tie_key)
    rows = to_rows(short, own)
    n_requests, n_slots = own.shape
    pctr_BN = np.asarray(pctr, dtype=np.float64)
    shape = pctr_BN.shape
    affinity_BNK = np.broadcast_to(as_affinity(affinity, shape, n_slots), (*shape, n_slots))
    slopes_BNK = as_slopes("bid_weight", slopes, shape, n_slots)
    if slopes_BNK.ndim == 1:
        slopes_BNK = slopes_BNK[:, None, None]
    request, slot = np.arange(n_requests)[:, None], np.arange(n_slots)[None, :]
    rival = np.where(own >= 0, short.scores[request, np.maximum(own, 0), slot], -np.inf)[:, None, :]
    rate = slopes_BNK * pctr_BN[:, :, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        tau = np.where(rate > 0.0, (rival - affinity_BNK) / rate, np.where(quantise(affinity_BNK) > quantise(rival), -np.inf, np.inf))
    theta = np.minimum.accumulate(tau, axis=2)
    theta[~as_mask("eligible", eligible, (shape[0], shape[1])) if barred is None else as_mask("barred", barred, (shape[0], shape[1]))] = np.inf
    shown = np.nonzero(rows >= 0)
    theta[shown[0], rows[shown]] = _critical(short, own)[0][shown]
    return theta


def counterfactual_pages(pctr: Any, bids: Any, affinity: Any, slopes: Any, pages: Any, eligible: Any = None, tie_key: Any = None) -> Ints:
    """The page that is shown when a displayed ad sits in another slot, [B, K, K, K] = [request, own slot, slot, page]; -1 where padded.

    Ads above it are those of the page without it; ads below are drawn again. Bids enter through the other ads only.
    """
    short, own = _market(pctr, bids, affinity, slopes, pages, eligible, tie_key)
    return _moved(short, own)


def pages_with(pctr: Any, bids: Any, affinity: Any, slopes: Any, pages: Any, losers: Any, eligible: Any = None, tie_key: Any = None) -> Ints:
    """The page that is shown when an ad that is not displayed sits in a slot, [B, J, K, K] = [request, loser, slot, page]; -1 where padded.

    Args as critical_bids; losers [B, J] rows of ads that `pages` do not show (-1: none). Ads above the slot are those of the page; below it the
    ads are drawn again. A slot that `pages` leave empty can be taken when it is the first such.
    """
    short, own = _market(pctr, bids, affinity, slopes, pages, eligible, tie_key)
    n_requests, n_slots = own.shape
    losers_BJ = _as_pages(losers, np.asarray(pctr).shape)
    if (losers_BJ[:, :, None] == np.where(own >= 0, to_rows(short, own), -2)[:, None, :]).any():
        raise AuctionInputError("losers must not be on the page")
    # One walker a slot leaves that slot free. The freed ad is one more rival further down, so the loser would lose there as well.
    slots = np.arange(n_slots)
    gap = run_greedy(short, barred=np.full((n_requests, n_slots), -1), forced_slot=np.broadcast_to(slots, (n_requests, n_slots)))
    around = np.broadcast_to(to_rows(short, gap)[:, None], (*losers_BJ.shape, n_slots, n_slots)).copy()
    around[:, :, slots, slots] = losers_BJ[:, :, None]
    reachable = slots[None, :] <= (own >= 0).sum(axis=1)[:, None]
    return np.where((reachable[:, None, :] & (losers_BJ >= 0)[:, :, None])[..., None], around, -1)


def pages_without(pctr: Any, bids: Any, affinity: Any, slopes: Any, pages: Any, eligible: Any = None, tie_key: Any = None) -> Ints:
    """Y_{-i}: the page when a displayed ad is not there, [B, K, K] = [request, own slot, page]; -1 where padded."""
    short, own = _market(pctr, bids, affinity, slopes, pages, eligible, tie_key)
    return _critical(short, own)[1]


def critical_prices(theta: Any, ctr: Any, pages: Any, bids_at_page: Any, reserve: Any = 0.0, currency_step: float = 0.0) -> tuple[Floats, Bools]:
    """Truthful prices [B, K] and whether the monotone hull was needed [B, K].

    Args: theta [B, K, K] of critical_bids; ctr [B, K, K], CTR of the ad of each slot on its counterfactual_pages (ctr[b, i, l], own slot
    i, slot l; entries above the own slot are not read); pages, bids_at_page [B, K]; reserve scalar or [B, K]. Padding pays 0.
    """
    pages_BK = np.asarray(pages, dtype=np.int64)
    n_requests, n_slots = pages_BK.shape
    bids = as_floats("bids_at_page", bids_at_page, pages_BK.shape, 0.0)
    clicks = as_floats("ctr", ctr, (n_requests, n_slots, n_slots), 0.0)
    floor = as_floats("reserve", np.broadcast_to(np.asarray(reserve, dtype=np.float64), pages_BK.shape), pages_BK.shape, 0.0)
    shown = pages_BK >= 0
    own_slot = np.broadcast_to(np.arange(n_slots), pages_BK.shape)
    theta_BKK = np.where(shown[:, :, None], np.asarray(theta, dtype=np.float64), 0.0)
    if np.isnan(theta_BKK).any():
        raise AuctionInputError("theta must not be NaN")
    reachable = reachable_slots(theta_BKK, floor, own_slot) & shown[:, None, :]
    price, repaired = step_prices(theta_BKK, clicks, reachable, own_slot, floor)
    price = np.where(shown, round_down(np.minimum(price, bids), currency_step, floor, bids), 0.0)
    return price, repaired & shown


def _as_pages(pages: Any, shape: tuple[int, ...]) -> Ints:
    array = np.asarray(pages)
    if array.ndim != 2 or array.shape[0] != shape[0] or not np.issubdtype(array.dtype, np.integer):
        raise AuctionInputError(f"pages must be integer of shape ({shape[0]}, slots), got {array.dtype} of shape {array.shape}")
    if array.size and (int(array.min()) < -1 or int(array.max()) >= shape[1]):
        raise AuctionInputError(f"pages must hold rows in [0, {shape[1]}) or -1, got {int(array.min())}..{int(array.max())}")
    return array.astype(np.int64)


def _market(pctr: Any, bids: Any, affinity: Any, slopes: Any, pages: Any, eligible: Any, tie_key: Any) -> tuple[Shortlist, Ints]:
    """Shortlist of the requests and the shortlist positions of their pages; refuses pages that are not the greedy ones."""
    pages_BK = _as_pages(pages, np.asarray(pctr).shape)
    short = build_shortlist(pctr, bids, affinity, slopes, pages_BK.shape[1], eligible, tie_key)
    differs = (to_rows(short, run_greedy(short))[:, 0] != pages_BK).any(axis=1)
    if differs.any():
        raise AuctionInputError(f"{int(differs.sum())} pages are not the greedy pages of these inputs, first request {int(np.argmax(differs))}")
    return short, positions_of(short, pages_BK)


def _critical(short: Shortlist, own: Ints) -> tuple[Floats, Ints]:
    """theta [B, K, K] and the pages without each displayed ad [B, K, K], with padding marked."""
    theta, without = critical_bids_of(short, own)
    shown = (own >= 0)[:, :, None]
    return np.where(shown, theta, np.inf), np.where(shown, to_rows(short, without), -1)


def _moved(short: Shortlist, own: Ints) -> Ints:
    """[B, K, K, K] pages with each displayed ad in each slot."""
    n_requests, n_slots = own.shape
    barred = np.repeat(own, n_slots, axis=1)
    forced = np.broadcast_to(np.tile(np.arange(n_slots), n_slots), barred.shape)
    moved = to_rows(short, run_greedy(short, barred=barred, forced_slot=forced)).reshape(n_requests, n_slots, n_slots, n_slots)
    # A slot past the end of a short page cannot be taken, nor can padding move.
    shown = np.arange(n_slots)[None, None, :] < (own >= 0).sum(axis=1)[:, None, None]
    return np.where((shown & (own >= 0)[:, :, None])[..., None], moved, -1)
