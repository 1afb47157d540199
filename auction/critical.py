"""Exact truthful prices of the greedy page: critical bids from counterfactual runs, prices from Myerson's identity.

Shapes: N candidate ads, K' displayed ads (= slots used); arrays [K', K'] are [displayed ad, slot].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from auction.checks import AuctionInputError, Bools, Floats, Ints, as_floats, as_mask, as_page, as_reserves, check_range, round_down
from auction.shortlist import Shortlist, critical_bids_of, run_greedy, shortlist_one, to_rows

PageCtr = Callable[[Ints], Any]
"""page [K'] -> click-through rate of every ad on it, in slot order, [K']; must not depend on any bid."""

_SAME_BID = 1e-9
"""Intervals of bids narrower than this (relative) are below the resolution of the allocation's ties and count as empty."""


@dataclass(frozen=True)
class Pricing:
    """Prices of one page and everything needed to recompute and audit them. Money in currency per click."""

    page: Ints
    """[K'] displayed rows in slot order."""
    price: Floats
    """[K'] charged: critical_price rounded down to the currency step."""
    critical_price: Floats
    """[K'] the exact truthful price."""
    bid: Floats
    """[K'] own bid."""
    reserve: Floats
    """[K'] own reserve."""
    theta: Floats
    """[K', K'] critical bids: slot k is won exactly when theta[:, k] < bid <= theta[:, k - 1]; may be negative or -inf (won at any bid)."""
    reachable: Bools
    """[K', K'] slots that some bid >= reserve wins."""
    ctr: Floats
    """[K', K'] CTR of the ad in each reachable slot from its own downwards, on the page that would then be shown; 0 elsewhere."""
    runner_up: Ints
    """[K'] the row that takes the slot if the ad leaves; -1 if none."""
    repaired: Bools
    """[K'] whether the CTR rose in a worse slot, so that the price is on the monotone hull (not exactly truthful)."""
    tied: Bools
    """[K'] whether the tie key decided that the ad stands where it stands."""

    @property
    def critical_bids(self) -> Floats:
        """[K', K'] least bid that is eligible and wins the slot or a better one: max(theta, reserve)."""
        return np.maximum(self.theta, self.reserve[:, None])


def reachable_slots(theta: Floats, reserve: Floats, own_slot: Ints) -> Bools:
    """Slots that some bid >= reserve wins, [..., K]: a slot whose interval (theta_k, theta_{k-1}] is empty is jumped over.

    The ad's own slot always counts; a tie can leave it with an empty interval.
    """
    least = np.maximum(theta, reserve[..., None])
    above = np.concatenate([np.full((*least.shape[:-1], 1), np.inf), least[..., :-1]], axis=-1)
    slots = np.arange(theta.shape[-1])
    return np.asarray((least < above * (1.0 - _SAME_BID)) | (slots == own_slot[..., None]), dtype=np.bool_)


def step_prices(theta: Floats, ctr: Floats, reachable: Bools, own_slot: Ints, reserve: Floats) -> tuple[Floats, Bools]:
    """Myerson's identity for a bid-independent step function of clicks.

    p = (1 / x_k) * sum over reachable l >= k of max(theta_l, reserve) * (x_l - x_next(l)), x after the last = 0. Where x is not monotone,
    x is replaced by its hull max over l' >= l of x_l': the price stays a weighted mean of critical bids, hence within [reserve, bid].

    Args: theta, ctr, reachable [..., K]; own_slot, reserve [...]. Returns: price [...], repaired [...].
    """
    slots = np.arange(theta.shape[-1])
    counted = reachable & (slots >= own_slot[..., None])
    clicks = np.where(counted, ctr, 0.0)
    hull = np.maximum.accumulate(clicks[..., ::-1], axis=-1)[..., ::-1]
    drop = hull - np.concatenate([hull[..., 1:], np.zeros((*hull.shape[:-1], 1))], axis=-1)
    least = np.maximum(theta, reserve[..., None])
    total = np.take_along_axis(hull, own_slot[..., None], axis=-1)[..., 0]
    paid = (np.where(drop > 0.0, least, 0.0) * drop).sum(axis=-1)
    never_clicked = np.where(counted, least, np.inf).min(axis=-1)  # no click, no charge: any price in the interval would do
    price = np.where(total > 0.0, paid / np.where(total > 0.0, total, 1.0), never_clicked)
    price = np.maximum(price, reserve)  # every bid that wins is at least the reserve; the quotient may round to below it
    return price, np.asarray((counted & (clicks < hull * (1.0 - 1e-12))).any(axis=-1), dtype=np.bool_)


def step_prices_everywhere(theta: Floats, ctr: Floats, reserve: Floats) -> Floats:
    """Truthful price per click of every ad in every slot it can reach, [..., K]: `step_prices` for each own slot at once.

    Args: theta, ctr [..., K]; reserve [...]. A slot with an empty interval of bids carries no weight; inf where never reached.
    """
    slots = theta.shape[-1]
    level = np.maximum(theta, reserve[..., None])
    result = np.full(theta.shape, np.inf)
    spent = np.zeros(theta.shape[:-1])
    below = np.zeros(theta.shape[:-1])
    for slot in range(slots - 1, -1, -1):
        upper = np.full(theta.shape[:-1], np.inf) if slot == 0 else theta[..., slot - 1]
        reachable = np.isfinite(level[..., slot]) & (level[..., slot] < upper)
        x = np.maximum(ctr[..., slot], below)
        spent = np.where(reachable, spent + np.where(reachable, level[..., slot], 0.0) * (x - below), spent)
        below = np.where(reachable, x, below)
        with np.errstate(invalid="ignore", divide="ignore"):
            result[..., slot] = np.where(reachable & (x > 0), np.maximum(spent / x, reserve), np.inf)
    return result


def _page_clicks(page_ctr: PageCtr, pages: Ints, page_ctr_batch: Callable[[Ints], Any] | None) -> Floats:
    """CTRs of P pages of equal length, [P, K']."""
    values = page_ctr_batch(pages) if page_ctr_batch is not None else [page_ctr(page) for page in pages]
    return as_floats("page_ctr(page)", values, pages.shape, minimum=0.0)


def critical_prices(
    pctr: Any,
    bids: Any,
    affinity: Any,
    bid_weight: Any,
    page: Any,
    page_ctr: PageCtr,
    reserve: Any = 0.0,
    eligible: Any = None,
    tie_key: Any = None,
    *,
    currency_step: float = 0.0,
    page_ctr_batch: Callable[[Ints], Any] | None = None,
) -> Pricing:
    """Exact truthful price of every ad on the greedy page (AUCTION.md, Myerson 1981).

    Args: as greedy_allocation; page [K'], the greedy page of these inputs (checked: no other page has these prices); page_ctr, bid-free
    CTR of a page; reserve, scalar or [N], an ad below its reserve takes no part; currency_step, charged prices are rounded down to it;
    page_ctr_batch, pages [P, K'] -> [P, K'], used instead of page_ctr: one evaluator call for the 1 + K'(K'-1)/2 pages at most.
    Returns: Pricing. Truthful exactly where CTR never rises in a worse slot (position-only and cascade CTR: always).
    """
    rows = as_page("page", page, len(np.asarray(pctr)))
    allowed, reserve_N = _allowed(bids, reserve, eligible, len(np.asarray(pctr)))
    short = shortlist_one(pctr, bids, affinity, bid_weight, max(len(rows), 1), allowed, tie_key)
    own = run_greedy(short)[0]
    greedy: Ints = to_rows(short, own)[0]
    greedy = greedy[greedy >= 0][: len(rows)]
    if not np.array_equal(greedy, rows):
        raise AuctionInputError(f"page {rows.tolist()} is not the greedy page {greedy.tolist()} of these inputs (reserves are eligibility: bid >= reserve)")
    return _price(short, own[:, : len(rows)], bids, reserve_N, page_ctr, currency_step, page_ctr_batch)


def priced_page(
    pctr: Any,
    bids: Any,
    affinity: Any,
    bid_weight: Any,
    n_slots: int,
    page_ctr: PageCtr,
    reserve: Any = 0.0,
    eligible: Any = None,
    tie_key: Any = None,
    *,
    currency_step: float = 0.0,
    page_ctr_batch: Callable[[Ints], Any] | None = None,
) -> Pricing:
    """Allocation and exact prices in one pass over the candidates: greedy_allocation (ads below their reserve left out), then critical_prices."""
    allowed, reserve_N = _allowed(bids, reserve, eligible, len(np.asarray(pctr)))
    short = shortlist_one(pctr, bids, affinity, bid_weight, n_slots, allowed, tie_key)
    own: Ints = run_greedy(short)[0]
    shown = int((own >= 0).sum())
    if shown < n_slots:  # fewer ads than slots: the empty slots are no place to move to
        short = replace(
            short, slopes=short.slopes[..., :shown], affinity=short.affinity[..., :shown], scores=short.scores[..., :shown], ranks=short.ranks[..., :shown]
        )
    return _price(short, own[:, :shown], bids, reserve_N, page_ctr, currency_step, page_ctr_batch)


def _allowed(bids: Any, reserve: Any, eligible: Any, n_ads: int) -> tuple[Bools | None, Floats]:
    """Who takes part (None: everybody) and the reserves [N]."""
    bids_N, reserve_N = as_floats("bids", bids, (n_ads,), 0.0), as_reserves(reserve, n_ads)
    below = bids_N < reserve_N
    return (None if eligible is None and not below.any() else as_mask("eligible", eligible, (n_ads,)) & ~below), reserve_N


def _price(
    short: Shortlist, own: Ints, bids: Any, reserve: Floats, page_ctr: PageCtr, currency_step: float, page_ctr_batch: Callable[[Ints], Any] | None
) -> Pricing:
    """Prices of the greedy page at shortlist positions own [1, K']."""
    page: Ints = to_rows(short, own)[0]
    n_slots = len(page)
    if n_slots == 0:
        none, square = np.zeros(0), np.zeros((0, 0))
        no, no_square = np.zeros(0, dtype=np.bool_), np.zeros((0, 0), dtype=np.bool_)
        return Pricing(page, none, none, none, none, square, no_square, square, page, no, no)
    own_bids = np.asarray(bids, dtype=np.float64)[page]
    theta_1, without = critical_bids_of(short, own)
    theta, own_slot, floor = theta_1[0], np.arange(n_slots), reserve[page]
    reachable = reachable_slots(theta, floor, own_slot)

    ad, slot = np.nonzero(reachable & (own_slot[None, :] > own_slot[:, None]))
    moved: Ints = to_rows(short, run_greedy(short, barred=own[:, ad], forced_slot=slot[None]))[0] if len(ad) else np.zeros((0, n_slots), dtype=np.int64)
    clicks = _page_clicks(page_ctr, np.concatenate([page[None], moved]), page_ctr_batch)
    ctr = np.zeros((n_slots, n_slots))
    ctr[own_slot, own_slot] = clicks[0]
    ctr[ad, slot] = clicks[1 + np.arange(len(ad)), slot]

    exact, repaired = step_prices(theta, ctr, reachable, own_slot, floor)
    exact = np.minimum(exact, own_bids)  # a win by tie key may rest on a score 1e-9 below the runner-up's
    check_range("critical price", exact, 0.0)
    rank = short.ranks[0, own[0]]
    rival = short.ranks[0, np.maximum(without[0], 0)][:, own_slot, own_slot]
    tied = ((rank == rival) & (without[0] >= 0) & (own_slot[None, :] <= own_slot[:, None])).any(axis=1)
    return Pricing(
        page=page,
        price=round_down(exact, currency_step, floor, own_bids),
        critical_price=exact,
        bid=own_bids,
        reserve=floor,
        theta=theta,
        reachable=reachable,
        ctr=ctr,
        runner_up=to_rows(short, without)[0, own_slot, own_slot],
        repaired=repaired,
        tied=tied,
    )
