"""Laws of the auction (AUCTION.md, Invariants; RELIABILITY.md T17) on drawn markets full of ties, zeros and reserves.

EGA_PROPERTY_EXAMPLES sets the number of examples per law (default 60; the long proof runs 10,000).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import auction
from auction import batch
from auction.ties import RELATIVE_STEP

LAW = settings(max_examples=int(os.environ.get("EGA_PROPERTY_EXAMPLES", "60")), deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Market:
    ids: np.ndarray
    pctr: np.ndarray
    bids: np.ndarray
    affinity: np.ndarray
    slopes: np.ndarray | float
    reserve: np.ndarray
    eligible: np.ndarray
    continuation: np.ndarray
    slots: int

    @property
    def keys(self):
        return auction.tie_keys(self.ids, "request-17")

    def ctr(self, page):
        return self.pctr[page] * np.concatenate([[1.0], np.cumprod(self.continuation[page])[:-1]])[: len(page)]

    def page(self):
        return auction.greedy_allocation(self.pctr, self.bids, self.affinity, self.slopes, self.slots, self.eligible & (self.bids >= self.reserve), self.keys)

    def price(self, page, step=0.0):
        return auction.critical_prices(
            self.pctr, self.bids, self.affinity, self.slopes, page, self.ctr, self.reserve, self.eligible, self.keys, currency_step=step
        )

    def with_bid(self, ad, bid):
        bids = self.bids.copy()
        bids[ad] = bid
        return replace(self, bids=bids)


def numbers(*coarse, low, high):
    """Coarse values, for ties and edges, or any float32."""
    return st.one_of(st.sampled_from(coarse), st.floats(low, high, width=32))


SIGNED = numbers(0.0, 0.25, low=-1.0, high=1.0)
POSITIVE = numbers(0.0, 0.25, low=0.0, high=1.0)


@st.composite
def markets(draw, affinities=SIGNED):
    n, k = draw(st.integers(1, 8)), draw(st.integers(1, 4))

    def array(elements, *shape):
        return np.array(draw(st.lists(elements, min_size=int(np.prod(shape)), max_size=int(np.prod(shape)))), dtype=np.float64).reshape(shape)

    return Market(
        ids=np.array(draw(st.lists(st.integers(0, 2**63 - 1), min_size=n, max_size=n, unique=True)), dtype=np.int64),
        pctr=array(numbers(0.0, 0.25, 0.5, 1.0, low=0.0, high=1.0), n),
        bids=array(numbers(0.0, 0.5, 1.0, 2.0, low=0.0, high=100.0), n),
        affinity=array(affinities, n, k),
        slopes=array(numbers(0.5, 1.0, low=2.0**-7, high=128.0), n, k) if draw(st.booleans()) else draw(st.sampled_from([0.25, 1.0, 3.0])),
        reserve=array(numbers(0.0, 0.0, 0.5, low=0.0, high=3.0), n),
        eligible=np.array(draw(st.lists(st.sampled_from([True, True, True, False]), min_size=n, max_size=n)), dtype=np.bool_),
        continuation=array(numbers(0.0, 1.0, low=0.0, high=1.0), n),
        slots=draw(st.integers(1, k)),
    )


@LAW
@given(markets(), st.sampled_from([0.0, 0.01, 0.1, 1.0]))
def test_every_mode_keeps_price_between_reserve_and_bid(market, step):
    page = market.page()
    own = market.bids[page]
    pricing = market.price(page, step)
    eligible = market.eligible
    for price in (
        pricing.price,
        pricing.critical_price,
        auction.gsp_prices(market.pctr, market.bids, page, market.reserve, eligible=eligible, currency_step=step),
        auction.vcg_prices(market.pctr, market.bids, page, 0.5 ** np.arange(market.slots), market.reserve, eligible=eligible, currency_step=step),
        auction.first_price(market.bids, page, market.reserve, currency_step=step),
    ):
        assert auction.broken_law(page, market.pctr[page], price, market.bids, market.reserve, eligible, market.slots) is None
        assert (price[own == 0.0] == 0.0).all()
    assert (pricing.price <= pricing.critical_price + 1e-9 * np.maximum(step, pricing.critical_price)).all()
    for slot in range(len(page)):
        assert auction.is_truthful(pricing.price[slot], pricing.theta[slot], pricing.ctr[slot], slot + 1, pricing.reserve[slot], pricing.bid[slot], step)
    if step:
        steps = pricing.price / step
        assert (np.isclose(steps, np.round(steps)) | (pricing.price == pricing.reserve)).all()
    assert len(page) == min(market.slots, int((eligible & (market.bids >= market.reserve)).sum()))


@LAW
@given(markets(), st.randoms(use_true_random=False))
def test_candidate_order_changes_nothing(market, random):
    order = np.array(random.sample(range(len(market.ids)), len(market.ids)))
    slopes = market.slopes if isinstance(market.slopes, float) else market.slopes[order]
    other = Market(
        *(getattr(market, name)[order] for name in ("ids", "pctr", "bids", "affinity")),
        slopes,
        *(getattr(market, name)[order] for name in ("reserve", "eligible", "continuation")),
        market.slots,
    )
    page, shuffled = market.page(), other.page()
    assert market.ids[page].tolist() == other.ids[shuffled].tolist()
    one, two = market.price(page), other.price(shuffled)
    for name in ("price", "theta", "ctr", "reachable", "tied", "repaired"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


@LAW
@given(markets(), st.integers(0, 7), st.lists(numbers(0.0, 0.5, 1.0, 2.0, low=0.0, high=200.0), min_size=2, max_size=6))
def test_raising_the_own_bid_never_worsens_the_slot_nor_moves_the_price_within_it(market, ad, bids):
    ad %= len(market.ids)
    before_slot, before = market.slots, None
    for bid in sorted(bids):
        trial = market.with_bid(ad, bid)
        page = trial.page()
        slot = page.tolist().index(ad) if ad in page else market.slots
        assert slot <= before_slot
        price = trial.price(page).critical_price[slot] if slot < market.slots else None
        if slot == before_slot and price is not None and before is not None:
            # on a tie the price is capped by a bid that is 1e-9 below the runner-up's score
            assert abs(price - before) <= 1e-8 * max(1.0, price)
        before_slot, before = slot, price


@LAW
@given(markets(affinities=POSITIVE), st.sampled_from([0.01, 1 / 3, 7.0, 1e4]))
def test_scaling_all_money_scales_the_prices(market, factor):
    """Bids are normalised by their median in the score, so the weight falls as the money grows."""
    scaled = replace(market, bids=market.bids * factor, reserve=market.reserve * factor, slopes=np.asarray(market.slopes) / factor)
    page = market.page()
    np.testing.assert_array_equal(scaled.page(), page)
    np.testing.assert_allclose(scaled.price(page).critical_price, factor * market.price(page).critical_price, rtol=1e-8, atol=1e-12 * factor)
    np.testing.assert_allclose(
        auction.gsp_prices(scaled.pctr, scaled.bids, page, scaled.reserve),
        factor * auction.gsp_prices(market.pctr, market.bids, page, market.reserve),
        rtol=1e-12,
    )


@LAW
@given(st.lists(markets(), min_size=1, max_size=1), st.integers(1, 3))
def test_batch_and_dtype_of_transport_change_nothing(drawn, copies):
    market = drawn[0]
    page = market.page()
    eligible = market.eligible & (market.bids >= market.reserve)

    def repeat(array):
        return np.stack([array] * copies)

    slopes = market.slopes if isinstance(market.slopes, float) else repeat(market.slopes)
    result = batch.counterfactuals(repeat(market.pctr), repeat(market.bids), repeat(market.affinity), slopes, market.slots, repeat(eligible), market.keys)
    assert (result.pages[:, : len(page)] == page).all()
    assert (result.pages[:, len(page) :] == -1).all()
    np.testing.assert_array_equal(result.theta[0, : len(page), : len(page)], market.price(page).theta)
    thin = replace(market, pctr=market.pctr.astype(np.float32), bids=market.bids.astype(np.float32), affinity=market.affinity.astype(np.float32))
    np.testing.assert_array_equal(thin.page(), page)


@LAW
@given(markets(), st.integers(0, 7), numbers(0.0, 0.5, 1.0, 2.0, low=0.0, high=200.0))
def test_thresholds_predict_the_slot(market, ad, bid):
    ad %= len(market.ids)
    page = market.with_bid(ad, 1e9).page()
    if ad not in page:
        assert not market.eligible[ad] or market.reserve[ad] > 1e9 or market.pctr[ad] < 1e-6 or len(page) == market.slots
        return
    pricing = market.with_bid(ad, 1e9).price(page)
    theta = pricing.theta[page.tolist().index(ad)]
    shown = market.with_bid(ad, bid).page()
    slot = shown.tolist().index(ad) if ad in shown else len(page)
    weight = np.broadcast_to(market.slopes, market.affinity.shape)[ad] * market.pctr[ad]
    if weight.min() == 0.0:
        return  # no bid moves this ad
    closest = 4 * RELATIVE_STEP * (1.0 + weight.max() * bid) / weight.min()  # scores nearer than this are a tie, seen as bids
    if (np.abs(theta - bid) > closest).all():
        assert slot == (int((theta >= bid).sum()) if bid >= market.reserve[ad] else len(page))


@LAW
@given(markets())
def test_truthful_bidding_is_optimal_at_the_thresholds(market):
    """Cascade CTR: no misreport gains, for winners and losers."""

    def ctr(pages):
        above = np.cumprod(np.where(pages >= 0, market.continuation[pages], 1.0), axis=1)
        return market.pctr[pages] * np.concatenate([np.ones((len(pages), 1)), above[:, :-1]], axis=1)

    rule = auction.GreedyRule(
        market.pctr, market.affinity, market.slopes, market.slots, ctr, reserve=market.reserve, eligible=market.eligible, tie_key=market.keys
    )
    regret = auction.exact_regret(rule, market.bids, market.bids)
    assert regret.gain.max() <= 1e-8 * max(1.0, market.bids.max())


@LAW
@given(
    jumps=st.lists(st.tuples(st.floats(0.0, 10.0), st.floats(0.01, 0.2)), min_size=1, max_size=5), bid=st.floats(0.1, 12.0), reserve=st.floats(0.0, 5.0),
    request=st.integers(0, 2**53), ad=st.integers(0, 2**53),
)  # fmt: skip
def test_implicit_prices_keep_the_laws_and_their_expectation_is_myersons(jumps, bid, reserve, request, ad):
    """Any CTR that rises in steps with the bid: reserve <= price <= bid for every draw, and the mean over the draws of one request is off by less than one part for every jump."""
    reserve, parts = min(reserve, bid), 64

    def ctr(at):
        return sum(gain * (np.asarray(at) >= threshold) for threshold, gain in jumps)

    clicks = float(ctr(bid))
    if clicks == 0.0:
        return
    probes = ctr(auction.probe_bids(bid, reserve, auction.draws(request, ad, parts)))
    singles = auction.implicit_price(np.full(parts, bid), np.full(parts, reserve), np.full(parts, clicks), np.asarray(probes)[:, None])
    assert (singles >= reserve - 1e-12).all() and (singles <= bid + 1e-12).all()
    exact = sum(gain * max(threshold, reserve) for threshold, gain in jumps if threshold <= bid) / clicks
    assert abs(float(auction.implicit_price(bid, reserve, clicks, probes)) - exact) <= (bid - reserve) / parts * len(jumps) + 1e-9
    assert abs(singles.mean() - float(auction.implicit_price(bid, reserve, clicks, probes))) <= 1e-9
